"""Containers' ids, and the removal of what was kept under them. Knows nothing of what the directories are for."""

from __future__ import annotations

import errno
import os
import re
import secrets
from pathlib import Path

import clipfs

# An id becomes the name of a directory, of a cgroup and of a host.
_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}")


def checked(container_id: str) -> str:
    """The id itself; UsageError if it cannot be one."""
    if not _ID.fullmatch(container_id):
        raise clipfs.UsageError(
            f"{container_id!r} is no name for a container: it takes 1 to 64 letters, digits, '.', '_' and '-', "
            "and begins with a letter or a digit"
        )
    return container_id


def invented() -> str:
    """A random id, as long as those that docker shows."""
    return secrets.token_hex(6)


def remove_tree(root: Path, last: tuple[str, ...] = ()) -> None:
    """Remove a directory and all below it, the entries named `last` at the very end. Nothing happens if it is not there.

    Never across a mount point: before a directory is entered it is renamed to a place directly below `root`, which the
    kernel refuses for whatever something is mounted on (EBUSY, a MountError here). That also makes a tree of any depth
    flat, so neither recursion nor descriptors run out, and a removal that was cut short can be begun again.
    """
    try:
        top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        _empty(top, keep=last)
        for name in last:
            _unlink(top, name)
        os.rmdir(root)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise clipfs.MountError(f"cannot remove {root}: something is still mounted below it") from error
        raise clipfs.MountError(f"cannot remove {root}: {error.strerror}") from error
    finally:
        os.close(top)


def _empty(top: int, keep: tuple[str, ...]) -> None:
    number = 0
    waiting = [top]
    while waiting:
        here = waiting.pop()
        for name in os.listdir(here):
            if here == top and name in keep:
                continue
            if not _unlink(here, name):
                moved = f"#{number}.{secrets.token_hex(4)}"
                number += 1
                os.rename(name, moved, src_dir_fd=here, dst_dir_fd=top)
    raise NotImplementedError


def _unlink(directory: int, name: str) -> bool:
    """False if it is a directory."""
    try:
        os.unlink(name, dir_fd=directory)
    except IsADirectoryError:
        return False
    except FileNotFoundError:
        pass
    return True
