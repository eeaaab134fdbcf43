"""Paths inside a root that nobody trusts, resolved as the kernel would if that root were ``/``.

Everything is done by descriptor, one component at a time and with ``O_NOFOLLOW``: an absolute link starts at the root
again, ``..`` stops there, and a component that is swapped for a link between two steps is an error, never an escape.
``openat2(RESOLVE_IN_ROOT)`` would be one call, but it does not tell *where* a path led and which of its components are
missing, and that is what seeding is about. This module does not know what the paths are for.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

# What the kernel follows (MAXSYMLINKS, path_resolution(7)).
_MAX_LINKS = 40


class Place(NamedTuple):
    """Where a path leads: the components that exist, none of them a link, and those that do not."""

    found: tuple[bytes, ...]
    missing: tuple[bytes, ...]


@contextmanager
def opened_root(path: str | os.PathLike[str]) -> Iterator[int]:
    """A descriptor of the directory that shall be ``/``."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def opened(root: int, names: Sequence[bytes], *, flags: int = os.O_PATH) -> Iterator[int]:
    """A descriptor of the directory `names` leads to; no name may be a link."""
    fd = os.open(b".", os.O_PATH | os.O_DIRECTORY, dir_fd=root)
    try:
        for name in names:
            below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
        if flags != os.O_PATH:
            usable = os.open(b".", flags | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = usable
        yield fd
    finally:
        os.close(fd)


def locate(root: int, path: bytes) -> Place:
    """Follow `path` from `root`. OSError: ELOOP after too many links, ENOTDIR if something on the way is a file."""
    todo = path.split(b"/")[::-1]
    found: list[bytes] = []
    missing: list[bytes] = []
    links = 0
    while todo:
        name = todo.pop()
        if name in (b"", b"."):
            continue
        if name == b"..":
            # Below the missing there are no links, so going up is only arithmetic there.
            (missing or found or [b""]).pop()
            continue
        if missing:
            missing.append(name)
            continue
        with opened(root, found) as parent:
            try:
                mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
            except FileNotFoundError:
                missing.append(name)
                continue
            if stat.S_ISLNK(mode):
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fsdecode(path))
                target = os.readlink(name, dir_fd=parent)
                if target.startswith(b"/"):
                    found.clear()
                todo.extend(target.split(b"/")[::-1])
                continue
        found.append(name)
        if not stat.S_ISDIR(mode) and any(each != b"" for each in todo):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fsdecode(b"/" + b"/".join(found)))
    return Place(tuple(found), tuple(missing))


def read_file(root: int, path: bytes, limit: int) -> bytes | None:
    """The content of a regular file of at most `limit` bytes, None if there is none of that name.

    OSError if it is no regular file (EINVAL: a pipe would wait for ever) or larger (EFBIG).
    """
    place = locate(root, path)
    if place.missing or not place.found:
        return None
    with opened(root, place.found[:-1]) as parent:
        fd = os.open(place.found[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fsdecode(path))
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", os.fsdecode(path))
    return data
