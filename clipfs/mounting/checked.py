"""Private copies of indexes that have passed every check: what a mount is made of.

A ``.clip`` may come from a stranger, who may change or truncate it while it is mounted; a process that has it mapped
would die of that (SIGBUS), and the kernel, which reads it with all rights, must never see bytes that nobody has
checked. So a mount uses a copy that only its user can write to. A copy is made once and named by the SHA-256 of the
clip's header, which has the SHA-256 of all else: finding it again costs one read of the clip, whatever its size.

What the checks have found out is in the name, too: whether there are xattrs, which takes a look at every inode.

Copies of another boot are not believed, for nothing makes sure that they have reached the disk.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from clipfs import state
from clipfs.erofs.structs import SUPERBLOCK_OFFSET
from clipfs.errors import ClipfsError
from clipfs.format.container import Header
from clipfs.format.index import Index

log = logging.getLogger(__name__)

# Bytes of copies that are kept for the next mount. One that is removed while it is mounted stays until the unmount.
_KEPT = 1 << 30

_PIECE = 1 << 20


# The ends of a copy's name, by whether it has xattrs.
_ENDS = {False: ".no-xattrs.clip", True: ".clip"}


class Copy(NamedTuple):
    """An open descriptor of a copy, a path to it for all processes, and whether any of its inodes has xattrs."""

    descriptor: int
    path: str
    xattrs: bool


@contextmanager
def checked(clip: Path) -> Iterator[Copy]:
    """A copy of the index in `clip`, without the data of a packed one.

    FormatError with the first fault of a clip that is damaged, ClipfsError if it cannot be read.
    """
    try:
        with clip.open("rb") as file:
            beginning = file.read(SUPERBLOCK_OFFSET)
            size = os.fstat(file.fileno()).st_size
            data = Header.parse(beginning, str(clip), size).data
            name = hashlib.sha256(beginning).hexdigest()
            copy = _kept(name) or _made(file.fileno(), data.offset if data else size, size, clip, name)
    except OSError as error:
        raise ClipfsError(f"cannot open {clip}: {error.strerror}") from error
    try:
        yield copy
    finally:
        os.close(copy.descriptor)


def _kept(name: str) -> Copy | None:
    """The copy that an earlier mount has made."""
    for xattrs, end in _ENDS.items():
        try:
            path = _directory() / f"{name}{end}"
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (OSError, ClipfsError):
            continue
        with suppress(OSError):
            os.utime(descriptor)
        return Copy(descriptor, str(path), xattrs)
    return None


def _made(source: int, length: int, size: int, clip: Path, name: str) -> Copy:
    """A new copy: on disk, or in memory if that has no place for it."""
    try:
        directory = _directory()
        _trim(directory, _KEPT - length)
        descriptor, aside = tempfile.mkstemp(prefix=".", dir=directory)
    except (OSError, ClipfsError) as error:
        log.warning("the index of %s is kept in memory only: %s", clip, error)
        return _in_memory(source, length, size, clip)
    try:
        _copy(source, descriptor, length, size)
        xattrs = _check(descriptor, clip)
        path = directory / f"{name}{_ENDS[xattrs]}"
        os.rename(aside, path)
    except BaseException as error:
        os.close(descriptor)
        with suppress(OSError):
            os.unlink(aside)
        if isinstance(error, OSError):
            log.warning("the index of %s is kept in memory only: %s", clip, error.strerror)
            return _in_memory(source, length, size, clip)
        raise
    return Copy(descriptor, str(path), xattrs)


def _in_memory(source: int, length: int, size: int, clip: Path) -> Copy:
    descriptor = os.memfd_create("clip", os.MFD_CLOEXEC)
    try:
        _copy(source, descriptor, length, size)
        xattrs = _check(descriptor, clip)
    except BaseException:
        os.close(descriptor)
        raise
    return Copy(descriptor, f"/proc/{os.getpid()}/fd/{descriptor}", xattrs)


def _copy(source: int, target: int, length: int, size: int) -> None:
    """The first `length` bytes; the rest of `size` is a hole. Whatever happens to the source, this only reads."""
    at = 0
    while at < length:
        sent = os.sendfile(target, source, at, min(_PIECE, length - at))
        if not sent:
            break  # cut off meanwhile: the check will say so
        at += sent
    os.truncate(target, size)


def _check(descriptor: int, clip: Path) -> bool:
    with Index.open(Path(f"/proc/self/fd/{descriptor}"), shown=clip) as index:
        return index.check(data=False)


def _trim(directory: Path, limit: int) -> None:
    """Remove the copies that were used longest ago until the others have at most `limit` bytes."""
    total = 0
    known = [(entry.stat(), entry.path) for entry in os.scandir(directory)]
    for found, path in sorted(known, key=lambda each: each[0].st_mtime_ns, reverse=True):
        total += found.st_blocks * 512
        if total > limit:
            with suppress(OSError):
                os.unlink(path)


def _directory() -> Path:
    """Where the copies of this boot are; those of others are removed."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    parent = state.private(state.cache_dir() / "checked")
    directory = parent / boot
    if not directory.is_dir():
        for other in os.scandir(parent):
            if other.name != boot:  # somebody else may just have made it
                shutil.rmtree(other.path, ignore_errors=True)
    return state.private(directory)
