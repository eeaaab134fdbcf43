"""A layer's tar stream -> Member | Whiteout | Opaque, in the order of the archive.

This module owns the tar formats (V7, ustar, PAX, GNU, star's prefix) and OCI's names for what a layer deletes; `pax`
reads the notations inside headers. It does not know what other layers hold or what becomes of the entries: `tree` does.

Where formats leave room it reads as Go's archive/tar does, since that is what container tools read layers with: sizes
of links, devices and directories mean nothing, a type-NUL member with a trailing slash is a directory, an archive may
end without blocks of zeros, between two members. Unlike Go it applies global PAX headers, as POSIX has it.

The hot path is `TarWalk._plain`, flat on purpose: it reads members that need nothing but a ustar header. What it does
not know to be harmless it leaves to `_header`, which reads everything and says what is wrong.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from zlib import adler32

from clipfs.erofs import MAX_NAME, MAX_PATH
from clipfs.errors import ImageError, shown
from clipfs.pax import (
    MapReader,
    Segment,
    decimal,
    numeric,
    old_sparse_map,
    records,
    segments,
    sparse_map,
    timestamp,
    xattrs,
)

BLOCK = 512
# Go's archive/tar reads no larger extended header, long name or sparse map, so no layer in use has one.
MAX_EXTENSION = 1 << 20
# A .clip addresses 2^32 blocks of 4 KiB.
MAX_SIZE = 1 << 44
# What one layer may put into memory, counted as the bytes of tar that say it. Large images have a million members,
# which count for half a GiB; a gzip bomb of headers, a thousandth as large as it unpacks to, ends here.
MAX_METADATA = 2 << 30
# Chown takes the owner 2^32-1 to mean "leave it as it is".
_MAX_ID = (1 << 32) - 2
# Times are nanoseconds in 64 bits, from here to the kernel.
_MAX_TIME = (1 << 63) - 1

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12s")
_PLAIN = struct.Struct("100s8s8s8s12s12s8sc100s8s80xc")
_USTAR = b"ustar\x0000"
_GNU = b"ustar  \0"
# Behind this, star keeps times where others have the end of the prefix.
_STAR_TAIL = b"tar\0"
_STAR_PREFIX = 131

# Old GNU sparse: pairs in the header, whether more follow, the real size; then the pairs in an extension block.
_SPARSE_PAIRS = slice(386, 482)
_SPARSE_EXTENDED = 482
_SPARSE_SIZE = slice(483, 495)
_EXTENSION_PAIRS = slice(0, 504)
_EXTENSION_EXTENDED = 504

_REGULAR, _LINK, _SYMLINK, _CHAR, _BLOCK_DEVICE, _DIRECTORY, _FIFO, _SPARSE = b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"S"
_MODES = {
    _REGULAR: stat.S_IFREG,
    _SPARSE: stat.S_IFREG,
    _LINK: stat.S_IFREG,
    _SYMLINK: stat.S_IFLNK,
    _CHAR: stat.S_IFCHR,
    _BLOCK_DEVICE: stat.S_IFBLK,
    _DIRECTORY: stat.S_IFDIR,
    _FIFO: stat.S_IFIFO,
}
_EXTENSIONS = (b"x", b"g", b"L", b"K")

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
# aufs kept its own books under these names; old images have them and they are no files.
_AUFS = b".wh..wh."

# An xattr or a piece of a sparse file takes this much memory besides its bytes.
_OBJECT = 256
# Members without xattrs, nearly all, share this; it is never written to.
_NO_XATTRS: dict[bytes, bytes] = {}


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


class _Numbers(dict[bytes, int]):
    """The values of header fields. Members of one image have few different ones; so looking one up is faster than
    parsing it, and equal ones share an object. Raises KeyError for all that is not plain octal."""

    # Sizes and checksums differ a lot; this is a few MB when full.
    _LIMIT = 1 << 15

    def __missing__(self, field: bytes) -> int:
        digits = field.rstrip(b" \0")
        if len(digits) == len(field) or not digits.isdigit() or b"8" in digits or b"9" in digits:
            raise KeyError(field)
        if len(self) >= self._LIMIT:
            self.clear()
        self[field] = value = self._value(int(digits, 8))
        return value

    def _value(self, number: int) -> int:
        return number


class _Times(_Numbers):
    """The same for times, in nanoseconds."""

    def _value(self, number: int) -> int:
        return number * 1_000_000_000


@dataclass(slots=True)
class _Sparse:
    """A sparse member whose map is not complete: the member, how much of it is stored, and the map so far."""

    member: Member
    stored: int
    numbers: list[int]
    reader: MapReader | None
    blocks: int = 0


class TarWalk:
    """Parses a tar stream that arrives in pieces of any size; which pieces makes no difference to the result.

    No more than one extended header is held back. After an error the walk is over.
    """

    def __init__(self) -> None:
        self._numbers = _Numbers()
        self._times = _Times()
        self._held = bytearray()  # begun, but shorter than `_need`
        self._need = BLOCK
        self._position = 0  # in the layer, of the first byte of `_held`
        self._skip = 0  # contents still to pass over, padding included
        self._padding = 0
        self._zeros = 0
        self._metadata = 0
        self._name = b""  # the member at hand, for errors
        self._offset = 0
        # What is said of the member to come: by all global headers, by its PAX header, by GNU long names.
        self._global: dict[bytes, bytes] = {}
        self._records: dict[bytes, bytes] | None = None
        self._long: dict[bytes, bytes] = {}
        # What comes next if it is no header: an extension's body (type, size) or more of a sparse map.
        self._extension: tuple[bytes, int] | None = None
        self._sparse: _Sparse | None = None

    def feed(self, chunk: bytes) -> list[Entry]:
        """The entries that are complete with this piece of the archive. Raises ImageError."""
        entries: list[Entry] = []
        if self._held:
            self._held += chunk
            if len(self._held) < self._need:
                return entries
            chunk = bytes(self._held)
            self._held.clear()
        at = self._pass_contents(chunk, 0)
        while self._zeros < 2 and len(chunk) - at >= self._need:
            if self._expects_plain():
                at = self._plain(chunk, at, entries)
                if len(chunk) - at < BLOCK:
                    break
            block = chunk[at : at + self._need]
            entry = self._slow(block, self._position + at)
            if entry is not None:
                entries.append(entry)
            at = self._pass_contents(chunk, at + len(block))
        if self._zeros == 2:
            at = len(chunk)  # whatever follows the end is nobody's
        self._held += chunk[at:]
        self._position += at
        self._metadata += BLOCK * len(entries)
        if self._metadata > MAX_METADATA:
            raise ImageError(
                f"names and attributes of the layer's members take more than {MAX_METADATA >> 30} GiB",
                offset=self._position,
            )
        return entries

    def finish(self) -> list[Entry]:
        """To be called at the end of the stream. Raises ImageError if the archive is not whole."""
        if self._held or self._skip > self._padding or self._extension or self._sparse or self._pending():
            raise ImageError("the layer ends in the middle of a member", member=self._name, offset=self._offset)
        return []

    def _pending(self) -> bool:
        """Whether a header said something about the next member."""
        return self._records is not None or bool(self._long)

    def _expects_plain(self) -> bool:
        """Whether the next block is a header that nothing else adds to."""
        return not (self._extension or self._sparse or self._global or self._pending() or self._zeros)

    def _pass_contents(self, chunk: bytes, at: int) -> int:
        step = min(self._skip, len(chunk) - at)
        self._skip -= step
        return at + step

    def _plain(self, chunk: bytes, at: int, entries: list[Entry]) -> int:
        """Read files, directories and symlinks from `at` on, as long as a ustar header says all of them.

        Returns where it stopped: at a header that it leaves to `_header`, or near the end of the chunk.
        """
        numbers, times, unpack, base = self._numbers, self._times, _PLAIN.unpack_from, self._position
        end = len(chunk)
        try:
            while at <= end - BLOCK:
                name, mode, uid, gid, size, mtime, checksum, kind, link, magic, prefix = unpack(chunk, at)
                # The low half of Adler-32 is one plus the sum of the bytes. The checksum itself counts as spaces, 256.
                total = adler32(chunk[at + 156 : at + BLOCK], adler32(chunk[at : at + 148])) & 0xFFFF
                if total != (numbers[checksum] - 255) % 65521 or prefix != b"\0" or magic not in (_USTAR, _GNU):
                    break
                path = name.split(b"\0", 1)[0]
                if kind == _DIRECTORY:
                    path = path.rstrip(b"/")
                if path[:2] == b"./":
                    path = path[2:]
                if path[:1] in b"./" or b"/." in path or b"//" in path or path[-1:] == b"/":
                    break
                bits, owner, group, time = numbers[mode] & 0o7777, numbers[uid], numbers[gid], times[mtime]
                offset = base + at
                if kind == _REGULAR:
                    length = numbers[size]
                    parts = ((0, offset + BLOCK, length),) if length else ()
                    entries.append(
                        Member(
                            path, 0o100000 | bits, owner, group, time, length, b"", False, 0, _NO_XATTRS, parts, offset
                        )
                    )
                    at += BLOCK + (length + 511 & ~511)
                    if at > end:
                        self._skip, self._padding = at - end, -length % BLOCK
                        self._name, self._offset = path, offset
                        return end
                    continue
                target = b""
                if kind == _SYMLINK:
                    bits |= stat.S_IFLNK
                    target = link.split(b"\0", 1)[0]
                    if not target:
                        break
                elif kind == _DIRECTORY:
                    bits |= stat.S_IFDIR
                else:
                    break
                entries.append(Member(path, bits, owner, group, time, 0, target, False, 0, _NO_XATTRS, (), offset))
                at += BLOCK
        except KeyError:
            pass  # a number that is not plain octal
        return at

    def _slow(self, block: bytes, offset: int) -> Entry | None:
        """Read what comes next, whatever it is. Here errors learn of which member they are."""
        try:
            if self._extension:
                self._read_extension(*self._extension, block)
                return None
            if self._sparse:
                return self._read_map(self._sparse, block, offset)
            self._offset = offset
            return self._header(block, offset)
        except ImageError as error:
            raise ImageError(error.message, member=self._name, offset=self._offset) from None

    def _header(self, block: bytes, offset: int) -> Entry | None:
        if not any(block):
            self._zeros += 1
            if self._pending():
                raise ImageError("the archive ends after an extended header, without the member it belongs to")
            return None
        header = _Header(block)
        self._name = header.name
        header.check()
        if self._zeros:
            raise ImageError("a block of zeros, which ends an archive, is followed by a member")
        if header.kind not in _EXTENSIONS:
            return self._member(header, offset)
        size = numeric(header.size)
        if not 0 <= size <= MAX_EXTENSION:
            raise ImageError(f"its extended header has {size} bytes; no more than {MAX_EXTENSION} are read")
        self._extension, self._need = (header.kind, size), _padded(size)
        return None

    def _read_extension(self, kind: bytes, size: int, body: bytes) -> None:
        self._extension, self._need = None, BLOCK
        body = body[:size]
        self._metadata += size
        if kind == b"L":
            self._long[b"path"] = body.split(b"\0", 1)[0]
        elif kind == b"K":
            self._long[b"linkpath"] = body.split(b"\0", 1)[0]
        elif kind == b"x":
            self._records = records(body)
        else:
            # Comments, which is all that most global headers hold, must not take the fast path away.
            found = {key: value for key, value in records(body).items() if _is_understood(key)}
            self._global = {key: value for key, value in (self._global | found).items() if value}
            if sum(map(len, self._global)) + sum(map(len, self._global.values())) > MAX_EXTENSION:
                raise ImageError(f"the archive's global headers say more than {MAX_EXTENSION} bytes")

    def _member(self, header: _Header, offset: int) -> Entry | None:
        """A member from its header and all that was said before it."""
        said = self._global | (self._records or {}) | self._long
        self._records, self._long = None, {}
        name = said.get(b"GNU.sparse.name") or said.get(b"path") or header.name
        self._name = name
        kind = header.kind
        if kind == b"\0":
            kind = _DIRECTORY if name.endswith(b"/") else _REGULAR
        elif kind == b"7":
            kind = _REGULAR
        if kind not in _MODES:
            raise ImageError(f"its type {shown(kind)} is none that a layer may have")
        member = Member(
            path=_cleaned(name),
            mode=_MODES[kind] | numeric(header.mode) & 0o7777,
            uid=_identity(_said_number(said, b"uid", header.uid)),
            gid=_identity(_said_number(said, b"gid", header.gid)),
            mtime_ns=_time(said.get(b"mtime"), header.mtime),
            size=0,
            link=_link(kind, said.get(b"linkpath") or _text(header.link)),
            hardlink=kind == _LINK,
            rdev=header.rdev() if kind in (_CHAR, _BLOCK_DEVICE) else 0,
            xattrs=xattrs(said) or _NO_XATTRS,
            segments=(),
            offset=offset,
        )
        if not member.path and kind != _DIRECTORY:
            raise ImageError("it has no name; only a directory can be the root")
        if kind not in (_REGULAR, _SPARSE):
            return self._complete(member, (), 0)
        stored = _size(_said_number(said, b"size", header.size))
        sparse = _sparse(header, kind, said, member, stored)
        if sparse is None:
            member.size = stored
            whole = ((0, offset + BLOCK, stored),) if stored else ()
            return self._complete(member, whole, stored)
        if sparse.reader is not None or (kind == _SPARSE and header.block[_SPARSE_EXTENDED]):
            self._sparse = sparse
            return None
        return self._complete(member, segments(sparse.numbers, member.size, stored, offset + BLOCK), stored)

    def _read_map(self, sparse: _Sparse, block: bytes, offset: int) -> Entry | None:
        """One more block of a sparse map: an extension of the header, or the first part of what is stored."""
        sparse.blocks += 1
        if sparse.blocks * BLOCK > MAX_EXTENSION:
            raise ImageError(f"its sparse map has more than {MAX_EXTENSION} bytes")
        if sparse.reader is None:
            sparse.numbers += old_sparse_map(block[_EXTENSION_PAIRS])
            more, stored = bool(block[_EXTENSION_EXTENDED]), sparse.stored
        else:
            numbers = sparse.reader.feed(block)
            sparse.numbers = numbers or []
            more, stored = numbers is None, sparse.stored - sparse.blocks * BLOCK
            if stored < 0:
                raise ImageError("its sparse map is longer than the member")
        if more:
            return None
        self._sparse = None
        found = segments(sparse.numbers, sparse.member.size, stored, offset + BLOCK)
        return self._complete(sparse.member, found, stored)

    def _complete(self, member: Member, parts: tuple[Segment, ...], stored: int) -> Entry | None:
        """The entry for a member whose headers are read; `stored` bytes of contents follow."""
        member.segments = parts
        self._padding = -stored % BLOCK
        self._skip = stored + self._padding
        self._metadata += len(member.path) + len(member.link) + _OBJECT * (len(member.xattrs) + len(parts))
        return _entry(member)


class _Header:
    """The fields of one header block, not yet believed."""

    __slots__ = ("block", "checksum", "gid", "kind", "link", "magic", "major", "minor", "mode", "mtime", "name", "size", "uid")

    def __init__(self, block: bytes) -> None:
        self.block = block
        (
            name, self.mode, self.uid, self.gid, self.size, self.mtime, self.checksum, self.kind, self.link,
            self.magic, self.major, self.minor, prefix, tail,
        ) = _HEADER.unpack(block)  # fmt: skip
        front = self._prefix(prefix, tail)
        self.name = front + b"/" + _text(name) if front else _text(name)

    def _prefix(self, prefix: bytes, tail: bytes) -> bytes:
        """What ustar puts in front of a name that is longer than 100 bytes.

        GNU has times there. Go before 1.8, and with it old Docker, wrote prefixes into GNU headers all the same.
        """
        if self.magic == _GNU:
            try:
                numeric(prefix[:12]), numeric(prefix[12:24])
            except ImageError:
                return _text(prefix)
            return b""
        if self.magic[:6] != _USTAR[:6]:
            return b""
        return _text(prefix[:_STAR_PREFIX] if tail.endswith(_STAR_TAIL) else prefix)

    def check(self) -> None:
        """Some old archivers summed up signed bytes."""
        rest = self.block[:148] + b" " * 8 + self.block[156:]
        unsigned = sum(rest)
        if numeric(self.checksum) not in (unsigned, unsigned - 256 * sum(byte > 127 for byte in rest)):
            raise ImageError("this is no tar header, or a damaged one: its checksum is wrong")

    def rdev(self) -> int:
        if self.magic[:5] != _USTAR[:5]:
            return 0
        major, minor = numeric(self.major), numeric(self.minor)
        if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
            raise ImageError(f"its device number {major}:{minor} is not one of Linux, which end at 4095:1048575")
        return os.makedev(major, minor)


def _sparse(
    header: _Header, kind: bytes, said: dict[bytes, bytes], member: Member, stored: int
) -> _Sparse | None:
    """How the map of a sparse member is to be read; None if it is not one. Sets the member's real size."""
    if kind == _SPARSE:
        if header.magic != _GNU:
            raise ImageError("it is sparse in a way that is not GNU's")
        member.size = _size(numeric(header.block[_SPARSE_SIZE]))
        return _Sparse(member, stored, old_sparse_map(header.block[_SPARSE_PAIRS]), None)
    version = said.get(b"GNU.sparse.major", b"0") + b"." + said.get(b"GNU.sparse.minor", b"0")
    if version == b"0.0" and b"GNU.sparse.map" not in said and b"GNU.sparse.numblocks" not in said:
        return None
    member.size = _size(decimal(said.get(b"GNU.sparse.realsize") or said.get(b"GNU.sparse.size", b"")))
    if version == b"1.0":
        return _Sparse(member, stored, [], MapReader())
    if version not in (b"0.0", b"0.1"):
        raise ImageError(f"it is sparse in GNU's format {shown(version)}; 0.0, 0.1 and 1.0 are known")
    return _Sparse(member, stored, sparse_map(said), None)


def _entry(member: Member) -> Entry | None:
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


def _cleaned(name: bytes) -> bytes:
    """A name from an archive as a path below the root."""
    parts: list[bytes] = []
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
        raise ImageError(f"its name is longer than Linux allows, {MAX_NAME} bytes a part and {MAX_PATH} in all")
    return path


def _link(kind: bytes, target: bytes) -> bytes:
    if kind == _LINK:
        return _cleaned(target)
    if kind != _SYMLINK:
        return b""
    if not 0 < len(target) <= MAX_PATH or b"\0" in target:
        raise ImageError(f"its target is not one that a symlink can have, 1 to {MAX_PATH} bytes without a NUL")
    return target


def _is_understood(key: bytes) -> bool:
    return key in (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime") or b".xattr." in key


def _said_number(said: dict[bytes, bytes], key: bytes, field: bytes) -> int:
    """A number from a PAX record, or from the header where none says it."""
    value = said.get(key)
    return decimal(value) if value else numeric(field)


def _identity(number: int) -> int:
    if not 0 <= number <= _MAX_ID:
        raise ImageError(f"its owner or group {number} is not between 0 and {_MAX_ID}")
    return number


def _time(value: bytes | None, field: bytes) -> int:
    time = timestamp(value) if value else numeric(field) * 1_000_000_000
    if abs(time) > _MAX_TIME:
        raise ImageError(f"its modification time, {time // 1_000_000_000} s, is more than 292 years from 1970")
    return time


def _size(number: int) -> int:
    if not 0 <= number <= MAX_SIZE:
        raise ImageError(f"its size, {number}, is not between 0 and {MAX_SIZE}")
    return number


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _padded(size: int) -> int:
    return size + BLOCK - 1 & ~(BLOCK - 1)
