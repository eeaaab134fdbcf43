"""Unpack a whole image into a directory: the v1 way, for tools that want plain files.

The tree comes from the index, whose directories are real directories, and everything is made by descriptor below the
target (``O_NOFOLLOW`` at every step), so no image can write outside it. Files are written in data-space order, so that
each span is decoded once.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clipfs import blocking
from clipfs.blocks.counters import Counters
from clipfs.blocks.reader import BlockReader
from clipfs.errors import ClipfsError, UsageError, shown
from clipfs.format.index import Index, Node
from clipfs.sources.fetcher import SourceOptions
from clipfs.sources.packed import fetcher_for

# A file is copied in pieces of this many bytes: one gzip span, so a piece costs at most two decodes.
_PIECE = 4 << 20

Read = Callable[[int, int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Extracted:
    """What an extraction made; `skipped` says in a sentence each what this user was not allowed to make."""

    inodes: int
    bytes: int
    skipped: tuple[str, ...]


def extract(clip: Path | str, target: Path | str, access: SourceOptions | None = None) -> Extracted:
    """Write the tree of the file `clip` into `target`, an empty or a new directory.

    As root everything is exact; others get the files without owners, devices and privileged xattrs. `access` says how
    to reach the source of the bytes. UsageError if the directory cannot be used, and what reading an image raises.
    """
    place = Path(target)
    _prepare(place)

    async def main() -> Extracted:
        async with (
            fetcher_for(index, access) as fetcher,
            BlockReader(index, fetcher, counters=Counters.private()) as reader,
        ):
            unpacking = _Unpacking(index, place)
            await unpacking.run(reader.read)
            return Extracted(len(unpacking.first), unpacking.written, tuple(unpacking.skipped))

    with Index.open(clip) as index:
        try:
            return blocking.run(main)
        except OSError as error:
            what = shown(os.fsencode(error.filename)) if error.filename else "a part of it"
            raise ClipfsError(f"cannot unpack into {target}: {what}: {error.strerror}") from error


def _prepare(target: Path) -> None:
    try:
        target.mkdir(exist_ok=True)
        if any(target.iterdir()):
            raise UsageError(f"{target} is not empty; name an empty or a new directory to unpack into")
    except OSError as error:
        raise UsageError(f"cannot unpack into {target}: {error.strerror}") from error


class _Unpacking:
    """The state of one extraction: where each inode was first made, so that later names are hard links to it."""

    def __init__(self, index: Index, target: Path) -> None:
        self.index = index
        self.target = target
        self.first: dict[int, bytes] = {}
        self.skipped: list[str] = []
        self.written = 0
        self.privileged = os.geteuid() == 0

    async def run(self, read: Read) -> None:
        directories: list[tuple[bytes, Node]] = []
        files: list[tuple[bytes, Node]] = []
        for path, node in self.index.walk():
            if node.nid in self.first:
                with self._parent(path) as (at, name), self._parent(self.first[node.nid]) as (from_at, from_name):
                    os.link(from_name, name, src_dir_fd=from_at, dst_dir_fd=at, follow_symlinks=False)
            elif self._make(path, node):
                self.first[node.nid] = path
                if stat.S_ISDIR(node.mode):
                    directories.append((path, node))
                elif stat.S_ISREG(node.mode):
                    files.append((path, node))
                else:
                    self._dress(path, node)
        for path, node in sorted(files, key=lambda item: item[1].address):
            await self._fill(path, node, read)
            self._dress(path, node)
        # Deepest first: what is made inside a directory changes its mtime.
        for path, node in reversed(directories):
            self._dress(path, node)

    @contextmanager
    def _parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """(descriptor of the directory that holds `path`, last component), reached without following any link."""
        *above, name = path.split(b"/")
        at = os.open(self.target, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in above:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                os.close(at)
                at = below
            yield at, name or b"."
        finally:
            os.close(at)

    def _make(self, path: bytes, node: Node) -> bool:
        """Make an empty inode; its attributes follow when its content stands. False if this user may not."""
        kind = stat.S_IFMT(node.mode)
        with self._parent(path) as (at, name):
            try:
                if kind == stat.S_IFDIR:
                    if path:
                        os.mkdir(name, 0o700, dir_fd=at)
                elif kind == stat.S_IFREG:
                    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=at))
                elif kind == stat.S_IFLNK:
                    os.symlink(self.index.readlink(node.nid), name, dir_fd=at)
                else:
                    os.mknod(name, kind | 0o600, node.rdev, dir_fd=at)
            except PermissionError:
                if self.privileged or kind not in (stat.S_IFCHR, stat.S_IFBLK):
                    raise
                self.skipped.append(f"device {shown(path)}: only root can make it")
                return False
        return True

    async def _fill(self, path: bytes, node: Node, read: Read) -> None:
        with self._parent(path) as (at, name):
            fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW, dir_fd=at)
        try:
            os.truncate(fd, node.size)
            for start in range(0, node.size, _PIECE):
                length = min(_PIECE, node.size - start)
                # A hole stays one: only what the image stores is written.
                for address, _layer, _offset, size in self.index.extents(node.address + start, length):
                    data = await read(address, size)
                    # A disk that fills up writes a part, and says why only when asked for the rest.
                    while data:
                        count = os.pwrite(fd, data, address - node.address)
                        address, data = address + count, data[count:]
                    self.written += size
        except OSError as error:
            raise ClipfsError(f"cannot write {shown(path)} below {self.target}: {error.strerror}") from error
        finally:
            os.close(fd)

    def _dress(self, path: bytes, node: Node) -> None:
        """Owner, xattrs, mode and times, in the order in which one does not undo another."""
        with self._parent(path) as (at, name):
            if self.privileged:
                os.chown(name, node.uid, node.gid, dir_fd=at, follow_symlinks=False)
            for key, value in self.index.xattrs(node.nid).items():
                try:
                    os.setxattr(f"/proc/self/fd/{at}/".encode() + name, key, value, follow_symlinks=False)
                except OSError as error:
                    self.skipped.append(f"xattr {shown(key)} of {shown(path)}: {error.strerror}")
            if not stat.S_ISLNK(node.mode):
                os.chmod(name, stat.S_IMODE(node.mode), dir_fd=at)
            os.utime(name, ns=(node.mtime_ns, node.mtime_ns), dir_fd=at, follow_symlinks=False)
