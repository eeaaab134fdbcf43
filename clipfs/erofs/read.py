"""An EROFS image read in place, by inode number.

This module owns the way from a nid to attributes, entries, link targets and xattrs. It knows no paths, and of the rest
of the ``.clip`` nothing at all.

Whoever made the bytes may be hostile. Everything is checked when it is touched, and what does not fit is a FormatError;
that the tree as a whole makes sense is for `check` to find out.
"""

from __future__ import annotations

import os
import stat
import struct
from errno import EINVAL
from mmap import mmap
from typing import NamedTuple, NoReturn

from clipfs.erofs.structs import (
    BLOCK,
    COMPAT_MTIME,
    DEVICE,
    DEVICE_OFFSET,
    DIRENT,
    FIRST_INODE,
    INCOMPAT_DEVICE_TABLE,
    INLINE,
    INODE,
    MAX_NAME,
    MAX_PATH,
    PLAIN,
    SUPERBLOCK,
    SUPERBLOCK_MAGIC,
    SUPERBLOCK_OFFSET,
    UNUSED,
    XATTR,
    XATTR_HEADER,
    XATTR_PREFIXES,
    Node,
    decode_rdev,
    device_slot,
    is_whiteout,
    is_xattr_name,
    superblock,
)
from clipfs.errors import FormatError

# Names in the directory blocks that are kept as dicts, 0.15 KB each. An image with more that is walked in no order
# costs a table for every other name.
_NAMES = 1 << 17

_U16 = struct.Struct("<H")


class Content(NamedTuple):
    """Where a directory or symlink is stored: `full` whole blocks from byte `start`, then the tail, 1 to 4096 bytes."""

    start: int
    full: int
    tail: int
    tail_length: int


class Dirents(NamedTuple):
    """The entries of one directory block, ``.`` and ``..`` among them, as three columns."""

    names: list[bytes]
    nids: tuple[int, ...]
    types: tuple[int, ...]


class Metadata:
    """An EROFS image, read in place from the start of a mapped file.

    end: where the image ends and the file goes on.  name: what errors call the file.
    The methods that take a nid are the hot path of a mount, and therefore flat: one `unpack_from`, then plain checks.
    """

    def __init__(self, buffer: mmap, end: int, name: str) -> None:
        self._buffer = buffer
        self._end = end
        self._name = name
        self._tables: dict[tuple[int, int], dict[bytes, int]] = {}
        self._names = 0  # in them
        if end % BLOCK or end < BLOCK:
            raise FormatError(f"{name}: its EROFS image does not end at a block's end")
        (
            magic, _, compat, _, _, self.root, self.inodes, _, _, blocks, _, _, self.uuid, _, incompat, *_,
        ) = SUPERBLOCK.unpack_from(buffer, SUPERBLOCK_OFFSET)  # fmt: skip
        if magic != SUPERBLOCK_MAGIC:
            raise FormatError(f"{name}: it has no EROFS superblock")
        if (compat, incompat) != (COMPAT_MTIME, INCOMPAT_DEVICE_TABLE):
            found = f"{compat:#x} and {incompat:#x}"
            raise FormatError(f"{name}: its EROFS features {found} are not the ones that .clip files have")
        _tag, data_blocks, self._mapped = DEVICE.unpack_from(buffer, DEVICE_OFFSET)
        # Of any other a kernel may make what nothing here knows of.
        head = superblock(self.root, self.inodes, blocks, self.uuid) + device_slot(data_blocks, self._mapped)
        if buffer[SUPERBLOCK_OFFSET:FIRST_INODE] != head:
            raise FormatError(f"{name}: its EROFS superblock asks for a layout that .clip files do not have")
        if blocks * BLOCK != end or self._mapped < blocks or self._mapped + data_blocks > 1 << 32:
            raise FormatError(f"{name}: its EROFS superblock gives sizes that can not be")
        self.data_size = data_blocks * BLOCK
        self.size = end
        if not stat.S_ISDIR(self.inode(self.root).mode):
            raise FormatError(f"{name}: its root is not a directory")

    def inode(self, nid: int) -> Node:
        """The inode at `nid`."""
        offset = nid << 5
        if not FIRST_INODE <= offset <= self._end - 64:
            self._refuse(nid, "its number is outside of the file")
        layout, _, mode, _, size, union, _, uid, gid, seconds, nanoseconds, nlink = INODE.unpack_from(
            self._buffer, offset
        )
        rdev = address = 0
        kind = mode & 0o170000
        if kind == stat.S_IFREG:
            if size:
                address = (union - self._mapped) * BLOCK
                if address < 0 or address + size > self.data_size:
                    self._refuse(nid, "its content is outside of the data space")
        elif kind in (stat.S_IFDIR, stat.S_IFLNK):
            if not 0 < size <= self._end:
                self._refuse(nid, f"its size is {size}")
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            rdev = decode_rdev(union)
            if is_whiteout(mode, rdev):
                self._refuse(nid, "it is a whiteout of overlayfs")
        elif kind not in (stat.S_IFIFO, stat.S_IFSOCK):
            self._refuse(nid, f"its mode is {mode:#o}")
        if layout != PLAIN and (layout != INLINE or kind not in (stat.S_IFDIR, stat.S_IFLNK)):
            self._refuse(nid, f"its format is {layout:#x}")
        if nanoseconds >= 1_000_000_000 or not nlink:
            self._refuse(nid, f"it has {nlink} links and {nanoseconds} nanoseconds")
        mtime = seconds * 1_000_000_000 + nanoseconds
        # `Node(...)` does the same, and takes twice as long.
        return Node._make((nid, mode, uid, gid, size, mtime, nlink, rdev, address))

    def content(self, node: Node) -> Content:
        """Where the entries of a directory or the target of a symlink are."""
        offset = node.nid << 5
        layout, xattrs, _, _, size, union, *_ = INODE.unpack_from(self._buffer, offset)
        full = (size - 1) // BLOCK
        start, tail_length = union * BLOCK, size - full * BLOCK
        if layout == INLINE:
            tail = offset + 64 + _xattr_size(xattrs)
            if tail % BLOCK + tail_length > BLOCK:
                self._refuse(node.nid, "its inline content crosses a block boundary")
        else:
            tail = start + full * BLOCK
        if tail + tail_length > self._end or ((full or layout == PLAIN) and not 0 < start <= self._end - full * BLOCK):
            self._refuse(node.nid, "its content is outside of the file")
        return Content(start, full, tail, tail_length)

    def extent(self, nid: int) -> tuple[int, int]:
        """The bytes [start, end) that the inode at `nid` takes with its xattrs, without inline content."""
        start = nid << 5
        return start, start + 64 + _xattr_size(_U16.unpack_from(self._buffer, start + 2)[0])

    def check_unused(self, nid: int) -> None:
        """FormatError if anything is where inodes have nothing: kernels may obey what no reader here looks at."""
        if any(UNUSED.unpack_from(self._buffer, nid << 5)):
            self._refuse(nid, "there is something where inodes have nothing")

    def dirents(self, node: Node, content: Content, number: int) -> Dirents:
        """Block `number` of a directory. Names are sound: 1 to 255 bytes, no slash, no NUL."""
        start = content.start + number * BLOCK
        if number < content.full:
            block = self._buffer[start : start + BLOCK]
        else:
            block = self._buffer[content.tail : content.tail + content.tail_length]
        head = _U16.unpack_from(block, 8)[0] if len(block) > DIRENT.size else 0
        if head % DIRENT.size or not DIRENT.size <= head < len(block):
            self._refuse(node.nid, f"block {number} of this directory has no entries")
        nids, offsets, types, _ = zip(*DIRENT.iter_unpack(block[:head]), strict=True)
        end = block.find(b"\0", offsets[-1])
        if end < 0:
            end = len(block)
        # Offsets that go backwards or beyond the block make an empty name, and so do not get past the next check.
        names = [block[a:b] for a, b in zip(offsets, (*offsets[1:], end), strict=True)]
        text = block[head:end]
        if not all(names) or max(map(len, names)) > MAX_NAME or b"/" in text or b"\0" in text:
            self._refuse(node.nid, f"block {number} of this directory has an entry whose name can not be")
        return Dirents(names, nids, types)

    def entries(self, nid: int) -> list[tuple[bytes, int]]:
        """(name, nid) of all entries of a directory, ``.`` and ``..`` among them, as stored: sorted."""
        node = self._directory(nid)
        content = self.content(node)
        found: list[tuple[bytes, int]] = []
        for number in range(content.full + 1):
            names, nids, _ = self.dirents(node, content, number)
            found += zip(names, nids, strict=True)
        return found

    def lookup(self, nid: int, name: bytes) -> int:
        """The nid of `name` in the directory at `nid`, or 0.

        Names are looked up in dicts, one a block; those that were used last are kept. Nearly all directories are of one
        block. Taking a table out and putting it back keeps the dict in order of use.
        """
        key = (nid, 0)
        table = self._tables.pop(key, None)
        if table is None:
            node = self._directory(nid)
            content = self.content(node)
            number = self._block_of(node, content, name) if content.full else 0
            # A directory of several blocks has no block 0 here, so that the search above is never skipped.
            key = (nid, number + 1 if content.full else 0)
            table = self._tables.pop(key, None)
            if table is None:
                names, nids, _ = self.dirents(node, content, number)
                table = dict(zip(names, nids, strict=True))
                self._names += len(table)
                while self._names > _NAMES and self._tables:
                    self._names -= len(self._tables.pop(next(iter(self._tables))))
        self._tables[key] = table
        return table.get(name, 0)

    def readlink(self, nid: int) -> bytes:
        """The target of the symlink at `nid`."""
        node = self.inode(nid)
        if not stat.S_ISLNK(node.mode):
            raise OSError(EINVAL, os.strerror(EINVAL))
        content = self.content(node)
        target = self._buffer[content.tail : content.tail + content.tail_length]
        if content.full or len(target) > MAX_PATH or b"\0" in target:
            self._refuse(nid, "its target can not be")
        return target

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        """The extended attributes of the inode at `nid` by full name, in the order in which they are stored."""
        self.inode(nid)
        start, end = self.extent(nid)
        start += 64
        found: dict[bytes, bytes] = {}
        if start == end:
            return found
        if end > self._end or any(self._buffer[start : start + XATTR_HEADER]):
            self._refuse(nid, "its xattrs are shared, filtered or outside of the file")
        at = start + XATTR_HEADER
        while at < end:
            name_length, prefix, size = XATTR.unpack_from(self._buffer, at)
            at += XATTR.size
            stop = at + name_length + size
            base = XATTR_PREFIXES.get(prefix, b"")
            name = base + self._buffer[at : at + name_length]
            if not base or stop > end or not is_xattr_name(name, base) or name in found:
                self._refuse(nid, "it has an xattr that can not be")
            found[name] = self._buffer[at + name_length : stop]
            at = stop + 3 & ~3
        if not found:
            self._refuse(nid, "it has room for xattrs, and none")
        return found

    def _directory(self, nid: int) -> Node:
        node = self.inode(nid)
        if not stat.S_ISDIR(node.mode):
            raise NotADirectoryError(f"{self._name}: inode {nid} is not a directory")
        return node

    def _block_of(self, node: Node, content: Content, name: bytes) -> int:
        """The last block of a directory that does not begin with a greater name: where `name` is, if anywhere."""
        low, high = 0, content.full
        while low < high:
            middle = (low + high + 1) // 2
            if self._first_name(node, content, middle) <= name:
                low = middle
            else:
                high = middle - 1
        return low

    def _first_name(self, node: Node, content: Content, number: int) -> bytes:
        start = content.start + number * BLOCK if number < content.full else content.tail
        block = self._buffer[start : start + BLOCK]
        head = _U16.unpack_from(block, 8)[0] if len(block) > DIRENT.size else 0
        if not DIRENT.size <= head < len(block):
            self._refuse(node.nid, f"block {number} of this directory has no entries")
        end = _U16.unpack_from(block, DIRENT.size + 8)[0] if head >= 2 * DIRENT.size else len(block)
        return block[head:end].partition(b"\0")[0]

    def _refuse(self, nid: int, what: str) -> NoReturn:
        raise FormatError(f"{self._name}: inode {nid} is damaged: {what}; make the .clip again")


def _xattr_size(count: int) -> int:
    """Bytes of xattrs behind an inode, from its i_xattr_icount: the header, then 4-byte units."""
    return XATTR_HEADER + 4 * (count - 1) if count else 0
