"""A tree of inodes in, an EROFS image out.

This module owns where everything goes in the image. What the structures mean is written down in `erofs` and in
docs/format.md. Packing is deterministic and linear in the number of names.

It goes through the tree twice: first to give every inode its place (a directory's entries need the nids of its
children), then to write.
"""

from __future__ import annotations

import stat
import struct
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, repeat

from clipfs.erofs.structs import (
    BLOCK,
    DIRENT,
    FILE_TYPE,
    FIRST_INODE,
    INLINE,
    INODE,
    MAX_NAME,
    MAX_PATH,
    PLAIN,
    SUPERBLOCK_OFFSET,
    XATTR,
    XATTR_HEADER,
    XATTR_PREFIXES,
    Inode,
    device_slot,
    encode_rdev,
    is_whiteout,
    is_xattr_name,
    superblock,
)
from clipfs.errors import ImageError, shown

# The data space begins at a multiple of this many blocks (4 GiB) of EROFS's unified address space. Any address behind
# the metadata would do; a round one makes dumps readable and the inodes of similar images similar.
_MAPPED_STEP = 1 << 20

# Stored where there is no block to point to.
_NO_BLOCK = 0xFFFFFFFF

_INODE_SIZE = 64


@dataclass(slots=True)
class _Directory:
    """A directory whose own place is known. names: sorted, with ``.`` and ``..``; cuts: where each block begins."""

    inode: Inode
    parent: Inode
    names: list[bytes]
    cuts: list[int]
    tail: int
    path_length: int


class _Plan:
    """Where everything goes: sets the nid of every inode, then knows how large the image is."""

    def __init__(self, root: Inode) -> None:
        self.root = root
        self.inodes: list[Inode] = []
        self.directories: list[_Directory] = []
        # Encoded xattrs by nid; most inodes have none.
        self.xattrs: dict[int, bytes] = {}
        self.inline: set[int] = set()
        # Blocks with directory entries and long symlinks come after the inodes.
        self.blocks = 0
        self._at = FIRST_INODE
        self._walk()
        self.first_block = -(-self._at // BLOCK)
        self.total_blocks = self.first_block + self.blocks
        self.mapped = -(-self.total_blocks // _MAPPED_STEP) * _MAPPED_STEP

    def _walk(self) -> None:
        """Children of a directory lie side by side in order of names, which is how they are asked for."""
        linked: set[int] = set()
        pending = [self._place_directory(self.root, self.root, 0)]
        while pending:
            directory = pending.pop()
            self.directories.append(directory)
            children = directory.inode.children or {}
            below: list[_Directory] = []
            for name in directory.names:
                child = children.get(name)
                if child is None:
                    continue
                if child.children is not None:
                    below.append(self._place_directory(child, directory.inode, directory.path_length + 1 + len(name)))
                    continue
                if child.nlink > 1:
                    if id(child) in linked:
                        continue
                    linked.add(id(child))
                self._place(child, len(child.target))
                self.inodes.append(child)
            pending += reversed(below)

    def _place_directory(self, inode: Inode, parent: Inode, path_length: int) -> _Directory:
        names = sorted(inode.children or ())
        if not _are_sound(names) or path_length > MAX_PATH + 1:
            raise self.refusal(inode, "its path, or a name in it, is longer than Linux allows, or no name at all")
        insort(names, b".")
        insort(names, b"..")
        cuts, tail = [0], DIRENT.size * len(names) + sum(map(len, names))
        if tail > BLOCK:
            tail = 0
            for number, name in enumerate(names):
                size = DIRENT.size + len(name)
                if tail + size > BLOCK:
                    cuts.append(number)
                    tail = 0
                tail += size
            self.blocks += len(cuts) - 1
        self._place(inode, tail)
        return _Directory(inode, parent, names, cuts, tail, path_length)

    def _place(self, inode: Inode, tail: int) -> None:
        """Give an inode its nid. Readers want inode, xattrs and inline tail in one block, so it starts a new one where
        the rest of the last does not hold them; a tail that fits in no block beside its inode gets one of its own."""
        size = _INODE_SIZE
        xattrs = self._encode_xattrs(inode) if inode.xattrs else b""
        size += len(xattrs)
        inline = 0 < tail <= BLOCK - size
        if inline:
            size += tail
        elif tail:
            self.blocks += 1
        offset = self._at % BLOCK
        if offset + size > BLOCK and offset:
            self._at += BLOCK - offset
        inode.nid = nid = self._at >> 5
        if xattrs:
            self.xattrs[nid] = xattrs
        if inline:
            self.inline.add(nid)
        self._at += size + 31 & ~31

    def _encode_xattrs(self, inode: Inode) -> bytes:
        parts = [bytes(XATTR_HEADER)]
        for name, value in sorted(inode.xattrs.items()):
            for index, prefix in XATTR_PREFIXES.items():
                if is_xattr_name(name, prefix) and len(value) <= 0xFFFF:
                    suffix = name.removeprefix(prefix)
                    entry = XATTR.pack(len(suffix), index, len(value)) + suffix + value
                    parts.append(entry + bytes(-len(entry) % 4))
                    break
            else:
                raise self.refusal(inode, f"EROFS can not hold the xattr {shown(name)} with {len(value)} bytes")
        encoded = b"".join(parts)
        if _xattr_count(encoded) > 0xFFFF:
            raise self.refusal(inode, "it has more than 256 KiB of xattrs")
        return encoded

    def refusal(self, inode: Inode, what: str) -> ImageError:
        """The error for an inode that can not be stored. Looks for its path only now that it is wanted."""
        return ImageError(f"this can not be put into a .clip: {what}", member=_path_of(self.root, inode))


def pack(root: Inode, data_size: int, uuid: bytes) -> bytearray:
    """The whole EROFS image from byte 0 on; bytes 0 to 1023 are zero and not EROFS's. Sets the nid of every inode.

    data_size: of the data space that regular files point into, a multiple of 4096.
    Raises ImageError, naming the path, for what EROFS or Linux can not represent.
    """
    plan = _Plan(root)
    if plan.mapped + data_size // BLOCK > 1 << 32:
        raise ImageError(f"the image holds {data_size} bytes of files; a .clip ends at about 16 TiB")
    writer = _Writer(plan, data_size)
    for directory in plan.directories:
        writer.directory(directory)
    for inode in plan.inodes:
        writer.inode(inode)
    head = superblock(root.nid, len(plan.directories) + len(plan.inodes), plan.total_blocks, uuid)
    writer.image[SUPERBLOCK_OFFSET:FIRST_INODE] = head + device_slot(data_size // BLOCK, plan.mapped)
    return writer.image


class _Writer:
    """Writes what is planned. `_next` is the first free block behind the inodes."""

    def __init__(self, plan: _Plan, data_size: int) -> None:
        self.image = bytearray(plan.total_blocks * BLOCK)
        self._plan = plan
        self._data_size = data_size
        self._next = plan.first_block

    def directory(self, directory: _Directory) -> None:
        """A directory, its entries in blocks, the last block behind the inode if it fits there."""
        inode, cuts = directory.inode, directory.cuts
        inline = inode.nid in self._plan.inline
        first = self._next if len(cuts) > 1 or not inline else _NO_BLOCK
        blocks = list(_blocks(directory))
        for block in blocks[:-1] if inline else blocks:
            self._block(block)
        size = (len(cuts) - 1) * BLOCK + directory.tail
        self._inode(inode, size, first, blocks[-1] if inline else None)

    def inode(self, inode: Inode) -> None:
        """Everything else."""
        kind = stat.S_IFMT(inode.mode)
        if kind == stat.S_IFREG:
            size, address = inode.size, inode.address
            if not size:
                self._inode(inode, 0, _NO_BLOCK)
            elif size < 0 or address < 0 or address % BLOCK or address + size > self._data_size:
                raise self._plan.refusal(inode, f"{size} bytes at {address} are not in the data space")
            else:
                self._inode(inode, size, self._plan.mapped + address // BLOCK)
        elif kind == stat.S_IFLNK:
            self._symlink(inode)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            if is_whiteout(inode.mode, inode.rdev):
                raise self._plan.refusal(inode, "overlayfs would take a character device 0:0 for a whiteout")
            try:
                self._inode(inode, 0, encode_rdev(inode.rdev))
            except ValueError as error:
                raise self._plan.refusal(inode, str(error)) from None
        else:
            self._inode(inode, 0, 0)

    def _symlink(self, inode: Inode) -> None:
        target = inode.target
        if not 0 < len(target) <= MAX_PATH or b"\0" in target:
            raise self._plan.refusal(inode, f"a symlink's target has 1 to {MAX_PATH} bytes and no NUL")
        if inode.nid in self._plan.inline:
            self._inode(inode, len(target), _NO_BLOCK, target)
        else:
            self._inode(inode, len(target), self._next)
            self._block(target)

    def _inode(self, inode: Inode, size: int, union: int, tail: bytes | None = None) -> None:
        """union: block address or device number, as the type wants it.  tail: inline content."""
        at = inode.nid << 5
        xattrs = self._plan.xattrs.get(inode.nid, b"")
        seconds, nanoseconds = divmod(inode.mtime_ns, 1_000_000_000)
        try:
            if inode.mode >> 12 not in FILE_TYPE:
                raise struct.error
            INODE.pack_into(
                self.image, at, PLAIN if tail is None else INLINE, _xattr_count(xattrs), inode.mode,
                0, size, union, 0, inode.uid, inode.gid, seconds, nanoseconds, inode.nlink,
            )  # fmt: skip
        except struct.error:
            raise self._plan.refusal(
                inode,
                f"mode {inode.mode:#o}, owner {inode.uid}:{inode.gid}, {inode.nlink} links or "
                f"modification time {seconds} s is out of range",
            ) from None
        if xattrs or tail:
            at += _INODE_SIZE
            body = xattrs + (tail or b"")
            self.image[at : at + len(body)] = body

    def _block(self, content: bytes) -> None:
        at = self._next * BLOCK
        self.image[at : at + len(content)] = content
        self._next += 1


def _blocks(directory: _Directory) -> Iterator[bytes]:
    """The blocks of a directory, not padded: the entries, then their names."""
    children, inode, names = directory.inode.children or {}, directory.inode, directory.names
    special = {b".": inode, b"..": directory.parent}
    for start, end in zip(directory.cuts, [*directory.cuts[1:], len(names)], strict=True):
        part = names[start:end]
        members = [children.get(name) or special[name] for name in part]
        offsets = accumulate(map(len, part), initial=DIRENT.size * len(part))
        types = [FILE_TYPE.get(member.mode >> 12, 0) for member in members]
        entries = map(DIRENT.pack, [member.nid for member in members], offsets, types, repeat(0))
        yield b"".join(chain(entries, part))


def _xattr_count(encoded: bytes) -> int:
    """i_xattr_icount: 1 for the header, and 1 for each 4 bytes that follow; 0 for no xattrs."""
    return (len(encoded) - XATTR_HEADER) // 4 + 1 if encoded else 0


def _are_sound(names: list[bytes]) -> bool:
    """Whether all are names that a directory can hold. `names` is sorted, so that an empty one comes first."""
    if not names:
        return True
    text = b"".join(names)
    sound = names[0] and b"/" not in text and b"\0" not in text and b"." not in names and b".." not in names
    return bool(sound) and max(map(len, names)) <= MAX_NAME


def _path_of(root: Inode, wanted: Inode) -> bytes:
    """A path of the inode `wanted`; slow, for error messages."""
    pending = [(b"", root)]
    while pending:
        path, inode = pending.pop()
        if inode is wanted:
            return path
        pending += [(path + b"/" + name, child) for name, child in (inode.children or {}).items()]
    return b"?"
