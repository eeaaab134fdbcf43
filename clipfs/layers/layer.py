"""A layer's tar stream -> Member | Whiteout | Opaque, in the order of the archive.

This module owns how members follow each other in a stream: headers, extended headers, sparse maps, contents, the end.
`members` knows what a header means, `pax` the notations inside. What other layers hold, and what becomes of the
entries, is the affair of `tree`.

As with Go's archive/tar, an archive may end without blocks of zeros, between two members. Unlike there, global PAX
headers are applied, as POSIX has it.

The hot path is `TarWalk._plain`, flat on purpose: it reads members that need nothing but a ustar header. What it does
not know to be harmless it leaves to `_header`, which reads everything and says what is wrong.
"""

from __future__ import annotations

import stat
import struct
from zlib import adler32

from clipfs.errors import ImageError
from clipfs.layers import bounds
from clipfs.layers.members import (
    BLOCK,
    DIRECTORY,
    GNU,
    NO_XATTRS,
    REGULAR,
    SYMLINK,
    USTAR,
    Entry,
    Header,
    Member,
    Opaque,
    Segment,
    Whiteout,
    checked_size,
    entry_of,
    said_number,
)
from clipfs.layers.pax import MAX_EXTENSION, is_for_all, numeric, records
from clipfs.layers.sparse import Sparse, begin, true_name

__all__ = ["Entry", "Member", "Opaque", "TarWalk", "Whiteout"]

# What global headers say is looked at again for every member. An owner, a time, an xattr or two is what they can say.
MAX_GLOBAL = 1 << 16
_PLAIN = struct.Struct("100s8s8s8s12s12s8sc100s8s80xc")
_EXTENSIONS = (b"x", b"g", b"L", b"K")


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


class TarWalk:
    """Parses a tar stream that arrives in pieces of any size; which pieces makes no difference to the result.

    No more than one extended header is held back. After an error the walk is over. budget: of the image.
    """

    def __init__(self, budget: bounds.Budget | None = None) -> None:
        self._numbers = _Numbers()
        self._times = _Times()
        self._held = bytearray()  # begun, but shorter than `_need`
        self._need = BLOCK
        self._position = 0  # in the layer, of the first byte of `_held`
        self._skip = 0  # contents still to pass over, padding included
        self._padding = 0
        self._zeros = 0
        self._count = (budget or bounds.Budget()).take
        self._name = b""  # the member at hand, for errors
        self._offset = 0
        # What is said of the member to come: by all global headers, by its PAX header, by GNU long names.
        self._global: dict[bytes, bytes] = {}
        self._for_each = 0  # what looking at that counts for
        self._records: dict[bytes, bytes] | None = None
        self._long: dict[bytes, bytes] = {}
        # What comes next if it is no header: an extension's body (type, size) or more of a sparse map.
        self._extension: tuple[bytes, int] | None = None
        self._sparse: tuple[Member, Sparse] | None = None

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
                before = len(entries)
                at = self._plain(chunk, at, entries)
                if found := len(entries) - before:
                    self._count(BLOCK * found, entries[-1].path, entries[-1].offset)
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
        return entries

    def finish(self) -> list[Entry]:
        """To be called at the end of the stream. Raises ImageError if the archive is not whole."""
        if self._skip > self._padding or self._extension or self._sparse or self._pending():
            raise ImageError("the layer ends in the middle of a member", member=self._name, offset=self._offset)
        if self._held:
            raise ImageError("the layer ends in the middle of a header", offset=self._position)
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
                if total != (numbers[checksum] - 255) % 65521 or prefix != b"\0" or magic not in (USTAR, GNU):
                    break
                path = name.split(b"\0", 1)[0]
                if kind == DIRECTORY:
                    path = path.rstrip(b"/")
                if path[:2] == b"./":
                    path = path[2:]
                if path[:1] in b"./" or b"/." in path or b"//" in path or path[-1:] == b"/":
                    break
                bits, owner, group, time = numbers[mode] & 0o7777, numbers[uid], numbers[gid], times[mtime]
                offset = base + at
                if kind == REGULAR:
                    length = numbers[size]
                    parts = ((0, offset + BLOCK, length),) if length else ()
                    entries.append(
                        Member(
                            path, 0o100000 | bits, owner, group, time, length, b"", False, 0, NO_XATTRS, parts, offset
                        )
                    )
                    at += BLOCK + (length + 511 & ~511)
                    if at > end:
                        self._skip, self._padding = at - end, -length % BLOCK
                        self._name, self._offset = name.split(b"\0", 1)[0], offset
                        return end
                    continue
                target = b""
                if kind == SYMLINK:
                    bits |= stat.S_IFLNK
                    target = link.split(b"\0", 1)[0]
                    if not target:
                        break
                elif kind == DIRECTORY:
                    bits |= stat.S_IFDIR
                else:
                    break
                entries.append(Member(path, bits, owner, group, time, 0, target, False, 0, NO_XATTRS, (), offset))
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
                self._count(BLOCK, self._name, self._offset)
                self._sparse[1].feed(block)
                return self._take_map(*self._sparse, offset)
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
        header = Header(block)
        self._name = header.name
        header.check()
        self._count(BLOCK, self._name, offset)  # also what comes to nothing: it takes time
        if self._zeros:
            raise ImageError("a block of zeros, which ends an archive, is followed by a member")
        if header.kind not in _EXTENSIONS:
            return self._member(header, offset)
        size = numeric(header.size)
        if not 0 <= size <= MAX_EXTENSION:
            raise ImageError(f"its extended header has {size} bytes; no more than {MAX_EXTENSION} are read")
        self._count(size, self._name, offset)
        self._extension, self._need = (header.kind, size), _padded(size)
        return None

    def _read_extension(self, kind: bytes, size: int, body: bytes) -> None:
        self._extension, self._need = None, BLOCK
        body = body[:size]
        # At least as often as there are records.
        self._count(bounds.RECORD * body.count(b"="), self._name, self._offset)
        if kind == b"L":
            self._long[b"path"] = body.split(b"\0", 1)[0]
        elif kind == b"K":
            self._long[b"linkpath"] = body.split(b"\0", 1)[0]
        elif kind == b"x":
            self._records = records(body)
        else:
            # Comments, which is all that most global headers hold, must not take the fast path away.
            found = {key: value for key, value in records(body).items() if is_for_all(key)}
            self._global = {key: value for key, value in (self._global | found).items() if value}
            size = sum(map(len, self._global)) + sum(map(len, self._global.values()))
            self._for_each = size + bounds.RECORD * len(self._global)
            self._count(self._for_each, self._name, self._offset)
            if size > MAX_GLOBAL:
                raise ImageError(f"what global headers say of all members has more than {MAX_GLOBAL} bytes")

    def _member(self, header: Header, offset: int) -> Entry | None:
        """A member from its header and all that was said before it."""
        self._count(self._for_each, self._name, offset)
        said = self._global | (self._records or {}) | {key: value for key, value in self._long.items() if value}
        self._records, self._long = None, {}
        self._name = true_name(header, said) or said.get(b"path") or header.name
        member = header.member(self._name, said, offset)
        if member.hardlink or not stat.S_ISREG(member.mode):
            return self._complete(member, (), 0)
        stored = checked_size(said_number(said, b"size", header.size))
        sparse = begin(header, said, stored)
        if sparse is not None:
            return self._take_map(member, sparse, offset)
        member.size = stored
        return self._complete(member, ((0, offset + BLOCK, stored),) if stored else (), stored)

    def _take_map(self, member: Member, sparse: Sparse, offset: int) -> Entry | None:
        """The entry of a sparse member if the block at `offset` completed its map."""
        self._sparse = (member, sparse) if sparse.more else None
        if self._sparse:
            return None
        self._count(bounds.RECORD * len(sparse.numbers), member.path, member.offset)
        member.size = sparse.size
        return self._complete(member, sparse.segments(offset + BLOCK), sparse.stored)

    def _complete(self, member: Member, parts: tuple[Segment, ...], stored: int) -> Entry | None:
        """The entry for a member whose headers are read; `stored` bytes of contents follow."""
        member.segments = parts
        self._padding = -stored % BLOCK
        self._skip = stored + self._padding
        self._count(bounds.extra_weight(member), member.path, member.offset)
        return entry_of(member)


def _padded(size: int) -> int:
    return size + BLOCK - 1 & ~(BLOCK - 1)
