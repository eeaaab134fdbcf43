"""Containers' ids, and the removal of what was kept under them. Knows nothing of what the directories are for."""

from __future__ import annotations

import errno
import itertools
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


def remove_tree(root: Path) -> None:
    """Remove a directory and all below it; see `empty_tree`. Nothing happens if it is not there."""
    if root.is_dir() and not root.is_symlink():
        empty_tree(root)
        root.rmdir()


def empty_tree(root: Path, *, keep: str | None = None) -> None:
    """Remove all that is in a directory, except an entry of the name `keep`.

    Never across a mount point: before a directory is entered it is renamed to a place directly below `root`, which the
    kernel refuses for whatever something is mounted on (EBUSY, a MountError here). That also makes a tree of any depth
    flat, so neither recursion nor descriptors run out, and a removal that was cut short can be begun again.
    """
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _empty(top, keep)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise clipfs.MountError(f"cannot remove {root}: something is still mounted below it") from error
        raise clipfs.MountError(f"cannot remove {root}: {error.strerror}") from error
    finally:
        os.close(top)


def _empty(top: int, keep: str | None) -> None:
    prefix = f"#{secrets.token_hex(4)}."
    numbers = itertools.count()

    def flatten(directory: int, name: str) -> str:
        moved = f"{prefix}{next(numbers)}"
        os.rename(name, moved, src_dir_fd=directory, dst_dir_fd=top)
        return moved

    todo = [name for name in os.listdir(top) if name != keep]
    while todo:
        name = todo.pop()
        if _unlink(top, name):
            continue
        if not name.startswith(prefix):
            name = flatten(top, name)
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
        try:
            todo += [flatten(inner, each) for each in os.listdir(inner) if not _unlink(inner, each)]
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=top)


def _unlink(directory: int, name: str) -> bool:
    """False if it is a directory."""
    try:
        os.unlink(name, dir_fd=directory)
    except IsADirectoryError:
        return False
    except FileNotFoundError:
        pass
    return True
