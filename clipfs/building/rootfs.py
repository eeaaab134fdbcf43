"""A directory of this machine as the root file system of an image: what is in it, and the contents of its files.

Everything is reached by descriptor from the top, ``O_NOFOLLOW`` at every step, so that no link in it leads out of it.
Names come in order and holes are where the zeros are, wherever the file system has put them, so that equal trees look
equal. What is in directories of other file systems is left out. Of other mounts nothing is known: a file that is
mounted on another is taken for it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from clipfs.errors import ClipfsError, UsageError, shown
from clipfs.layers.layer import Member
from clipfs.layers.tree import Tree


class Rootfs:
    """A directory, open. A context manager.

    `scan` first: then `tree` is what is in it, `data_size` how large its data space is, `total` how many bytes are in
    files, and `warnings` says what is left out.
    """

    def __init__(self, top: Path) -> None:
        try:
            self._top = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"cannot read directory {top}: {error.strerror}") from error
        self._device = os.fstat(self._top).st_dev
        self._name = top
        self.tree = Tree()
        self.total = self.data_size = 0
        self.warnings: list[str] = []
        # Of each file: its path and what it looked like, by where it begins when all contents are put together.
        self._files: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self._addresses: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._top)

    def scan(self) -> None:
        """Look at everything. ClipfsError if something cannot be read."""
        self.tree.apply(0, self._members())
        extents, self.data_size = self.tree.finish()
        self._addresses = [(extent.address, extent.offset) for extent in extents]
        self.warnings += self.tree.warnings

    def _members(self) -> Iterator[Member]:
        first: dict[tuple[int, int], bytes] = {}
        pending = [b""]
        while pending:
            path = pending.pop()
            with self._reading(path), self._directory(path) as at:
                if not path:
                    yield self._member(path, at, b".", os.fstat(at), first)
                below = []
                for name in sorted(os.listdir(f"/proc/self/fd/{at}".encode())):
                    status = os.stat(name, dir_fd=at, follow_symlinks=False)
                    within = path + b"/" + name if path else name
                    yield self._member(within, at, name, status, first)
                    if stat.S_ISDIR(status.st_mode):
                        if status.st_dev == self._device:
                            below.append(within)
                        else:
                            self.warnings.append(f"what is mounted on {shown(within)} is left out")
                pending += reversed(below)

    def _member(
        self, path: bytes, at: int, name: bytes, status: os.stat_result, first: dict[tuple[int, int], bytes]
    ) -> Member:
        """first: by which path an inode was met first, for those that have several."""
        link, size = b"", 0
        kind = stat.S_IFMT(status.st_mode)
        known = None
        if kind != stat.S_IFDIR and status.st_nlink > 1:
            known = first.setdefault((status.st_dev, status.st_ino), path)
        if known is not None and known != path:
            return Member(path, status.st_mode, 0, 0, 0, 0, known, True, 0, {}, (), 0)
        if kind == stat.S_IFLNK:
            link = os.readlink(name, dir_fd=at)
        segments: tuple[tuple[int, int, int], ...] = ()
        if kind == stat.S_IFREG and status.st_size:
            size = status.st_size
            segments = ((0, self.total, size),)
            self._files[self.total] = path, _looks(status)
            self.total += size
        rdev = status.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
        xattrs = _xattrs(f"/proc/self/fd/{at}/".encode() + name)
        return Member(
            path, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, size, link, False, rdev, xattrs,
            segments, 0,
        )  # fmt: skip

    def pieces(self, size: int) -> Iterator[tuple[int, int, bytes]]:
        """(address of the file, offset in it, bytes) of all files, in order, cut at multiples of `size`, without
        holes."""
        for address, offset in self._addresses:
            path, looks = self._files[offset]
            with self._reading(path), self._file(path) as file:
                at, end = 0, os.fstat(file).st_size
                while at < end and _looks(os.fstat(file)) == looks:
                    at = _next_data(file, at) // size * size
                    piece = _read(file, at, min(size, end - at))
                    if piece:
                        yield address, at, piece
                    at += size
                if _looks(os.fstat(file)) != looks:
                    raise ClipfsError(f"{shown(path)} in {self._name} was changed while it was read; pack it again")

    @contextmanager
    def _reading(self, path: bytes) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ClipfsError(f"cannot read {shown(path or b'.')} in {self._name}: {error.strerror}") from error

    @contextmanager
    def _directory(self, path: bytes) -> Iterator[int]:
        at = os.dup(self._top)
        try:
            for part in filter(None, path.split(b"/")):
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
                os.close(at)
                at = below
            yield at
        finally:
            os.close(at)

    @contextmanager
    def _file(self, path: bytes) -> Iterator[int]:
        above, _, name = path.rpartition(b"/")
        with self._directory(above) as at:
            # Not blocking: it was a regular file, but may be a pipe by now.
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
        try:
            yield file
        finally:
            os.close(file)


def _looks(status: os.stat_result) -> tuple[int, ...]:
    """What is another if a file was changed or replaced."""
    return status.st_dev, status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns


def _xattrs(path: bytes) -> dict[bytes, bytes]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return {}  # the file system that it is on knows no such thing
    return {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in names}


def _next_data(file: int, at: int) -> int:
    """Where the next byte is that is not in a hole; the end if there is none."""
    try:
        return os.lseek(file, at, os.SEEK_DATA)
    except OSError:
        return os.fstat(file).st_size


def _read(file: int, at: int, length: int) -> bytes:
    piece = os.pread(file, length, at)
    while len(piece) < length and (more := os.pread(file, length - len(piece), at + len(piece))):
        piece += more
    return piece
