"""EROFS: its structures on disk, as far as a ``.clip`` uses them, and what an inode is in memory.

This module owns what the bytes of the EROFS image in a ``.clip`` mean (docs/format.md, "The EROFS image"). `erofs_pack`
writes them, `erofs_read` reads them; both know no more of EROFS than what is here. The names are the kernel's where it
has one.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCK = 4096
SUPERBLOCK_OFFSET = 1024
SUPERBLOCK_MAGIC = 0xE0F5E1E2
DEVICE_OFFSET = 1152
# Inodes follow the device slot at once; so no nid is 0 or 1, the two numbers that FUSE gives a meaning of its own.
FIRST_INODE = 1280

# feature_incompat: all that we write and all that we read. An image with any other bit is not laid out as we expect.
INCOMPAT_DEVICE_TABLE = 0x8
# feature_compat: the times in inodes are mtimes.
COMPAT_MTIME = 0x2

# i_format of an extended (64-byte) inode: content in whole blocks, or with its last piece right behind the inode.
PLAIN = 1
INLINE = 5

# A name longer than this, or a path longer than that, can be passed to no system call.
MAX_NAME = 255
MAX_PATH = 4095

SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
DEVICE = struct.Struct("<64sII56x")
INODE = struct.Struct("<HHHHQIIIIqII16x")
# What of an inode is zero, of which some kernels make upper halves of its other numbers.
UNUSED = struct.Struct("<6xH12xI24xQQ")
DIRENT = struct.Struct("<QHBB")
XATTR = struct.Struct("<BBH")
# Before the first xattr of an inode: a name filter and shared xattrs, neither of which is used.
XATTR_HEADER = 12

# A file's type as dirents have it, by the type bits of its mode.
FILE_TYPE = {0o10: 1, 0o4: 2, 0o2: 3, 0o6: 4, 0o1: 5, 0o14: 6, 0o12: 7}

# e_name_index: which prefix is left out of a stored xattr name. An ACL's name is all prefix.
XATTR_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}

_OVERLAY_XATTRS = (b"trusted.overlay.", b"user.overlay.")


@dataclass(slots=True, eq=False)
class Inode:
    """One inode in memory, as the tree builder makes it and `pack` writes it. Hard links share the object.

    mode: with type bits.  size: of a regular file.  rdev: of a device, as `os.makedev` has it.
    xattrs: by full name, such as ``b"security.capability"``.  children: of a directory, else None.
    segments: where a regular file's bytes are, as (file offset, layer number, offset in the layer, length), sorted;
    what lies between is holes.
    nlink and address (in the data space, a multiple of `BLOCK`) are filled in when the tree is complete, nid by `pack`.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    rdev: int = 0
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    children: dict[bytes, Inode] | None = None
    nlink: int = 1
    segments: tuple[tuple[int, int, int, int], ...] = ()
    address: int = 0
    nid: int = 0


class Node(NamedTuple):
    """One inode as it is stored. `address` is where a regular file starts in the data space, 0 for all else."""

    nid: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    nlink: int
    rdev: int
    address: int


def superblock(root: int, inodes: int, blocks: int, uuid: bytes) -> bytes:
    """The superblock of a ``.clip``, of which only these vary. root: a nid.  blocks: of the image."""
    return SUPERBLOCK.pack(
        SUPERBLOCK_MAGIC, 0, COMPAT_MTIME, 12, 0, root, inodes, 0, 0, blocks, 0, 0, uuid, b"clipfs",
        INCOMPAT_DEVICE_TABLE, 0, 1, DEVICE_OFFSET // DEVICE.size, 0, 0, 0, 0,
    )  # fmt: skip


def device_slot(blocks: int, mapped: int) -> bytes:
    """The one device slot. blocks: of the data space.  mapped: the block address of its first."""
    return DEVICE.pack(b"data", blocks, mapped)


def encode_rdev(rdev: int) -> int:
    """A device number as Linux stores it: 12 bits of major and 20 of minor, the minor's upper 12 on top."""
    major, minor = os.major(rdev), os.minor(rdev)
    if major >= 1 << 12 or minor >= 1 << 20:
        raise ValueError(f"device number {major}:{minor} is beyond 4095:1048575")
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def decode_rdev(stored: int) -> int:
    """The inverse of `encode_rdev`."""
    return os.makedev(stored >> 8 & 0xFFF, stored & 0xFF | stored >> 12 & 0xFFF00)


def is_whiteout(mode: int, rdev: int) -> bool:
    """Whether overlayfs would take this inode for the absence of a file below."""
    return stat.S_ISCHR(mode) and rdev == 0


def is_xattr_name(name: bytes, prefix: bytes) -> bool:
    """Whether an xattr may be called `name`, of which `prefix` is the one of `XATTR_PREFIXES` that fits.

    Those that overlayfs takes for its own notes (redirects, opaque directories) may not be in an image.
    """
    whole = name.startswith(prefix) and len(name) > len(prefix) if prefix.endswith(b".") else name == prefix
    return whole and len(name) <= MAX_NAME and b"\0" not in name and not name.startswith(_OVERLAY_XATTRS)
