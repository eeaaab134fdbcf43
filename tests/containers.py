"""What the assembler's tests share: a tiny root file system, a read-only mount of it, a look at what is left.

As a program (``python -m tests.containers BASE ROOT '{"command": […], …}'``) it runs one container, for tests that
send its owner signals, give it a terminal or kill it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import assembler
import clipfs
from assembler import kernel

CONFIG = clipfs.ImageConfig(raw=b"{}", os="linux", architecture="amd64", diff_ids=())
SECONDS = 30  # for anything that is awaited; what works takes a hundredth

_TOOLS = (
    "cat", "chmod", "echo", "env", "grep", "id", "ls", "mkdir", "rm", "sh", "sleep", "stat", "stty", "touch", "true",
    "tty",
)  # fmt: skip


def busybox_root(root: Path) -> Path:
    """A root file system without any of the directories that a container needs."""
    binaries = root / "bin"
    binaries.mkdir(parents=True)
    shutil.copy("/bin/busybox", binaries / "busybox")
    for tool in _TOOLS:
        (binaries / tool).symlink_to("busybox")
    etc = root / "etc"
    etc.mkdir()
    (etc / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n\nbroken line\napp:x:1000:1000::/home/app:/bin/sh\n")
    (etc / "group").write_text("root:x:0:\napp:x:1000:\nwheel:x:10:root,app\nextra:x:77:app\n")
    return root


@contextlib.contextmanager
def read_only(directory: Path, at: Path) -> Iterator[Path]:
    """`directory` as a mount that cannot be written to, as a ClipFS is one."""
    at.mkdir()
    subprocess.run(["mount", "--bind", directory, at], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", at], check=True)
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@contextlib.contextmanager
def clean_base(base: Path) -> Iterator[Path]:
    """A base directory after whose use nothing may be left, and in any case nothing is."""
    try:
        yield base
        assert leftovers(base) == []
    finally:
        assembler.gc(base, kept=True)


def leftovers(base: Path) -> list[str]:
    """Mounts, directories and cgroups of containers below `base`, and children of this process."""
    found = [f"mount {each}" for each in kernel.mounts_below(base)]
    if base.exists():
        found += [f"directory {each}" for each in base.iterdir() if each.name != ".lock"]
    found += [f"cgroup {each}" for each in Path("/sys/fs/cgroup").rglob("clipfs-*")]
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        found.append("a child process")
    return found


def owner(base: Path, root: Path, **options: Any) -> list[str]:
    """The command line of a process that runs a container."""
    return [sys.executable, "-m", "tests.containers", str(base), str(root), json.dumps(options)]


def main(base: str, root: str, given: str) -> int:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    options: dict[str, Any] = json.loads(given)
    config = clipfs.ImageConfig(
        raw=b"{}", os="linux", architecture="amd64", diff_ids=(), stop_signal=options.pop("stop_signal", "")
    )
    options["command"] = tuple(options["command"])
    return assembler.run(Path(root), config, assembler.RunOptions(remove=True, **options), Path(base))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
