"""What a layer consists of: Member, Whiteout and Opaque, and how a tar header becomes one of them.

This module owns what single headers mean (V7, ustar, PAX, GNU, star's prefix), which names and numbers a layer may
use, and OCI's names for what a layer deletes. It does not know of streams: `layer` cuts them into headers.

Where formats leave room it reads as Go's archive/tar does, since that is what container tools read layers with: sizes
of links, devices and directories mean nothing, and a member of type NUL with a trailing slash is a directory.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from clipfs.compression.codec import is_checksum
from clipfs.erofs.structs import MAX_NAME, MAX_PATH
from clipfs.errors import ImageError, shown
from clipfs.layers.pax import decimal, numeric, timestamp, xattrs

BLOCK = 512
USTAR = b"ustar\x0000"
GNU = b"ustar  \0"

# The type flags of what a layer may hold, and the type bits of their modes. Type 7 and NUL become REGULAR.
REGULAR = b"0"
LINK = b"1"
SYMLINK = b"2"
CHARACTER = b"3"
BLOCK_DEVICE = b"4"
DIRECTORY = b"5"
FIFO = b"6"
SPARSE = b"S"
MODES = {
    REGULAR: stat.S_IFREG,
    SPARSE: stat.S_IFREG,
    LINK: stat.S_IFREG,
    SYMLINK: stat.S_IFLNK,
    CHARACTER: stat.S_IFCHR,
    BLOCK_DEVICE: stat.S_IFBLK,
    DIRECTORY: stat.S_IFDIR,
    FIFO: stat.S_IFIFO,
}

# A .clip addresses 2^32 blocks of 4 KiB.
MAX_SIZE = 1 << 44
# Chown takes the owner 2^32-1 to mean "leave it as it is".
MAX_ID = (1 << 32) - 2
# Times are nanoseconds in 64 bits, from here to the kernel: 292 years around 1970.
MAX_TIME = (1 << 63) - 1
MAX_MAJOR = (1 << 12) - 1
MAX_MINOR = (1 << 20) - 1

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12s")
# Behind this, star keeps times where others have the end of the prefix.
_STAR_TAIL = b"tar\0"
_STAR_PREFIX = 131

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
# aufs kept its own books under such names; old images have them and they are no files.
_AUFS = b".wh..wh."

# Members without xattrs, nearly all, share this; it is never written to.
NO_XATTRS: dict[bytes, bytes] = {}

_TOO_LONG = f"its name is longer than Linux allows, {MAX_NAME} bytes a part and {MAX_PATH} in all"

# (offset in the file, offset in the uncompressed layer, length)
Segment = tuple[int, int, int]


@dataclass(slots=True)
class Member:
    """One thing that a layer adds.

    path: without "/" or "./" in front or "/" behind; b"" is the root.  mode: with type bits.
    link: a symlink's target, verbatim, or the path of the member that a hard link is another name for.
    hardlink: all attributes but path and link are then the archiver's opinion, not the file's.
    rdev: of a device, as `os.makedev` has it.  segments: where the contents of a regular file are; the rest is holes.
    offset: of the header, in the uncompressed layer.
    """

    path: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    link: bytes
    hardlink: bool
    rdev: int
    xattrs: dict[bytes, bytes]
    segments: tuple[Segment, ...]
    offset: int


@dataclass(slots=True)
class Whiteout:
    """What lower layers have at `path` is deleted."""

    path: bytes
    offset: int


@dataclass(slots=True)
class Opaque:
    """What lower layers have in the directory `path` is deleted."""

    path: bytes
    offset: int


Entry = Member | Whiteout | Opaque


class Header:
    """The fields of one header block, not yet believed. `block` is all of it."""

    def __init__(self, block: bytes) -> None:
        self.block = block
        (
            name, self._mode, self._uid, self._gid, self.size, self._mtime, self._checksum, self.kind, self._link,
            self.magic, self._major, self._minor, prefix, tail,
        ) = _HEADER.unpack(block)  # fmt: skip
        front = self._prefix(prefix, tail)
        self.name = front + b"/" + _text(name) if front else _text(name)

    def _prefix(self, prefix: bytes, tail: bytes) -> bytes:
        """What ustar puts in front of a name that is longer than 100 bytes.

        GNU has times there. Go before 1.8, and with it old Docker, wrote prefixes into GNU headers all the same.
        """
        if self.magic == GNU:
            try:
                numeric(prefix[:12]), numeric(prefix[12:24])
            except ImageError:
                return _text(prefix)
            return b""
        if not self.magic.startswith(USTAR[:6]):
            return b""
        return _text(prefix[:_STAR_PREFIX] if tail.endswith(_STAR_TAIL) else prefix)

    def check(self) -> None:
        """Refuse what is no header."""
        if not is_checksum(numeric(self._checksum), self.block):
            raise ImageError("this is no tar header, or a damaged one: its checksum is wrong")

    def member(self, name: bytes, said: Mapping[bytes, bytes], offset: int) -> Member:
        """The member that this header and PAX records, `said`, describe; size and segments are left to the caller."""
        kind = self._member_kind(name)
        member = Member(
            path=cleaned(name),
            mode=MODES[kind] | numeric(self._mode) & 0o7777,
            uid=checked_id(said_number(said, b"uid", self._uid)),
            gid=checked_id(said_number(said, b"gid", self._gid)),
            mtime_ns=_time(said.get(b"mtime"), self._mtime),
            size=0,
            link=link_target(kind, said.get(b"linkpath") or _text(self._link)),
            hardlink=kind == LINK,
            rdev=self._rdev() if kind in (CHARACTER, BLOCK_DEVICE) else 0,
            xattrs=xattrs(said) or NO_XATTRS,
            segments=(),
            offset=offset,
        )
        if not member.path and kind != DIRECTORY:
            raise ImageError("it has no name; only a directory can be the root")
        return member

    def _member_kind(self, name: bytes) -> bytes:
        if self.kind == b"\0":
            return DIRECTORY if name.endswith(b"/") else REGULAR
        kind = REGULAR if self.kind == b"7" else self.kind
        if kind not in MODES:
            raise ImageError(f"its type {shown(kind)} is none that a layer may have")
        return kind

    def _rdev(self) -> int:
        if not self.magic.startswith(USTAR[:5]):
            return 0
        return device(numeric(self._major), numeric(self._minor))


def entry_of(member: Member) -> Entry | None:
    """The member, or what it stands for if it has one of the names that OCI reserves."""
    if _WHITEOUT not in member.path:
        return member
    if any(part.startswith(_AUFS) and part != _OPAQUE for part in member.path.split(b"/")):
        return None
    parent, _, base = member.path.rpartition(b"/")
    if base == _OPAQUE:
        return Opaque(parent, member.offset)
    if not base.startswith(_WHITEOUT):
        return member
    name = base.removeprefix(_WHITEOUT)
    if name in (b"", b".", b".."):
        raise ImageError("it is a whiteout of nothing that a directory could hold")
    return Whiteout(parent + b"/" + name if parent else name, member.offset)


def cleaned(name: bytes) -> bytes:
    """A name from an archive as a path below the root."""
    parts: list[bytes] = []
    if len(name) > 2 * MAX_PATH:  # no archiver's dots and slashes make up half of a name
        raise ImageError(_TOO_LONG)
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise ImageError("its name, or that of the file it links to, leads out of the root")
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    path = b"/".join(parts)
    if b"\0" in path:
        raise ImageError("there is a NUL in its name, or in that of the file it links to")
    if len(path) > MAX_PATH or any(len(part) > MAX_NAME for part in parts):
        raise ImageError(_TOO_LONG)
    return path


def link_target(kind: bytes, target: bytes) -> bytes:
    """What a member of this kind links to, b"" for one that is no link."""
    if kind == LINK:
        return cleaned(target)
    if kind != SYMLINK:
        return b""
    if not 0 < len(target) <= MAX_PATH or b"\0" in target:
        raise ImageError(f"its target is not one that a symlink can have, 1 to {MAX_PATH} bytes without a NUL")
    return target


def device(major: int, minor: int) -> int:
    if not (0 <= major <= MAX_MAJOR and 0 <= minor <= MAX_MINOR):
        raise ImageError(f"its device number {major}:{minor} is not one of Linux, which end at 4095:1048575")
    return os.makedev(major, minor)


def said_number(said: Mapping[bytes, bytes], key: bytes, field: bytes) -> int:
    """A number from a PAX record, or from the header where none says it."""
    value = said.get(key)
    return decimal(value) if value else numeric(field)


def checked_id(number: int) -> int:
    if not 0 <= number <= MAX_ID:
        raise ImageError(f"its owner or group {number} is not between 0 and {MAX_ID}")
    return number


def _time(value: bytes | None, field: bytes) -> int:
    return known_time(timestamp(value) if value else numeric(field) * 1_000_000_000)


def known_time(time: int) -> int:
    """The time, or 1970 for one that nobody can have meant, as containerd has it: Go writes the year 1 for none."""
    return time if abs(time) <= MAX_TIME else 0


def checked_size(number: int) -> int:
    if not 0 <= number <= MAX_SIZE:
        raise ImageError(f"its size, {number}, is not between 0 and {MAX_SIZE}")
    return number


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]
