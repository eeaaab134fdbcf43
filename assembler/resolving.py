"""What a container finds names by: files of its own, which it may write to, as docker gives it.

With the host's network come the host's names, as they were when the container started. Without a network there is but
the container itself.
"""

from __future__ import annotations

import os
from pathlib import Path

import clipfs

_HOSTS, _RESOLV_CONF = "/etc/hosts", "/etc/resolv.conf"


def name_files(directory: Path, network: str, hostname: str) -> dict[str, Path]:
    """Make them in `directory`; each by where the container has it. MountError if the host's cannot be read."""
    if network == "host":
        host = [Path(place) for place in (_HOSTS, _RESOLV_CONF)]
        return {str(path): _written(directory / path.name, _read(path)) for path in host if path.is_file()}
    # By the names that programs expect.
    own = f"127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost\n"
    return {_HOSTS: _written(directory / "hosts", os.fsencode(own))}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise clipfs.MountError(f"cannot read this machine's {path}: {error.strerror}") from error


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    # Whatever our umask is.
    path.chmod(0o644)
    return path
