"""The ``.clip`` container: what it consists of, and its header.

This module owns the layout that docs/format.md specifies, except for the EROFS image, which belongs to `erofs`.
`format_pack` writes sections, `tables` reads them.
"""

from __future__ import annotations

import hashlib
import struct
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from mmap import mmap
from typing import Self, overload

from clipfs.erofs.structs import SUPERBLOCK_OFFSET
from clipfs.errors import FormatError
from clipfs.oci import Digest

# As PNG's: a high bit, CR LF, control-Z and LF tell a file that was transferred as text from one that was not.
MAGIC = b"\x89CLIP\r\n\x1a\n"
VERSION = 3
# Bits in the header whose meaning a reader must know. PACKED: the one layer is not the manifest's but the section
# `data` of a packed clip, this one or the one that `source` names.
PACKED = 1
FEATURES = PACKED

# The source of a clip that carries its data: the file itself, wherever it is.
ITSELF = "clip:"

# Bytes 0 to 1023 are the header: fixed fields, then the section table, and its SHA-256 at the end.
HEADER = struct.Struct("<9s3xIIIQII")
SECTION = struct.Struct("<IIQQ32s")
HEADER_SIZE = SUPERBLOCK_OFFSET
CHECKSUM_OFFSET = HEADER_SIZE - 32
MAX_SECTIONS = (CHECKSUM_OFFSET - HEADER.size) // SECTION.size
ALIGNMENT = 8

LAYER = struct.Struct("<BBB5x64s64sQQQQB255s")
SPAN = struct.Struct("<QII32s")
# Compressed bytes from where decoding begins to the end of a span.
MAX_TAKEN = (1 << 32) - 1
SEEK = struct.Struct("<QqQIB3x")

# An extent's place is its layer's number and, in the low bits, the offset in the uncompressed layer.
PLACE_BITS = 48
MAX_LAYERS = 1 << 64 - PLACE_BITS

# What a deflate stream can refer back to.
MAX_WINDOW = 32768

# Decoded bytes that a span may throw away even if there are not so many before it: where the uncompressed layer is only
# the contents of files, headers between them count as well.
MAX_SKIP = 64 << 20

ALGORITHMS = {1: "sha256", 2: "sha512"}


class Codec(IntEnum):
    """How a layer is compressed."""

    RAW = 0
    GZIP = 1
    ZSTD = 2


class Kind(IntEnum):
    """What a section holds. Packed clips have DATA, the others all but that."""

    EROFS = 1
    LAYERS = 2
    EXTENTS = 3
    SPANS = 4
    SEEKS = 5
    WINDOWS = 6
    MANIFEST = 7
    CONFIG = 8
    SOURCE = 9
    DATA = 10


@dataclass(frozen=True, slots=True)
class Span:
    """A run of compressed bytes that can be decoded on its own.

    start, end: what to fetch, in the compressed layer.  position, length: what it decodes to, in the uncompressed one.
    digest: SHA-256 of the decoded bytes.  bit (gzip): how many low bits of the first byte belong to the deflate block
    before, 0 to 7.  skip: decoded bytes to throw away first, where decoding cannot begin at the span itself.
    window (gzip): the up to 32 KiB of decoded bytes before the span, zeroed where nothing refers to them.
    """

    start: int
    end: int
    position: int
    length: int
    digest: bytes
    bit: int = 0
    skip: int = 0
    window: bytes = b""


class MadeSpans(Sequence[Span]):
    """Spans that are made when they are asked for, and kept in less room than they take."""

    @abstractmethod
    def _made(self, number: int) -> Span:
        """Span `number`, which there is."""

    @overload
    def __getitem__(self, number: int) -> Span: ...

    @overload
    def __getitem__(self, number: slice) -> list[Span]: ...

    def __getitem__(self, number: int | slice) -> Span | list[Span]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._made(number)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: digest and size are the blob's, as the manifest has them; diff_id and diff_size the uncompressed
    tar's. The spans cover it without gaps, in order."""

    digest: Digest
    diff_id: Digest
    size: int
    diff_size: int
    codec: Codec
    media_type: str
    spans: Sequence[Span]


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes of the data space from `address` on are those from `offset` on of an uncompressed layer."""

    address: int
    layer: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Section:
    """Where a section is, and its SHA-256."""

    offset: int
    length: int
    digest: bytes

    @classmethod
    def of(cls, offset: int, content: bytes | memoryview) -> Self:
        """The section at `offset` that holds `content`."""
        return cls(offset, len(content), hashlib.sha256(content).digest())

    @property
    def end(self) -> int:
        return self.offset + self.length


class Header:
    """The section table. A section of a kind that this version does not know is no obstacle."""

    def __init__(self, sections: dict[int, Section], features: int = 0) -> None:
        self.sections = sections
        self.packed = bool(features & PACKED)

    def __getitem__(self, kind: Kind) -> Section:
        return self.sections[kind]

    @property
    def data(self) -> Section | None:
        """The section with the data, if the file carries it. It is the last one."""
        return self.sections.get(Kind.DATA)

    @classmethod
    def parse(cls, buffer: mmap | bytes, name: str, size: int | None = None) -> Self:
        """The header of the file that is mapped as `buffer`, and is called `name` in errors.

        size: of the file, if `buffer` is only its beginning. Afterwards every section is known to lie inside the file.
        """
        size = len(buffer) if size is None else size
        if len(buffer) < SUPERBLOCK_OFFSET or buffer[: len(MAGIC)] != MAGIC:
            raise FormatError(f"{name} is not a .clip file")
        _, version, features, _, length, count, reserved = HEADER.unpack_from(buffer, 0)
        if version != VERSION:
            raise FormatError(
                f"{name} has format version {version}; this clipfs reads version {VERSION}: make it of its image again"
            )
        if features & ~FEATURES:
            raise FormatError(f"{name} needs features {features & ~FEATURES:#x} that this clipfs does not have")
        table = buffer[:CHECKSUM_OFFSET]
        if hashlib.sha256(table).digest() != buffer[CHECKSUM_OFFSET:SUPERBLOCK_OFFSET]:
            raise FormatError(f"{name} is damaged: its header does not have the checksum that it should have")
        if length != size:
            raise FormatError(f"{name} is damaged: it should have {length} bytes and has {size}")
        if count > MAX_SECTIONS or reserved:
            raise FormatError(f"{name} is damaged: its section table is not one")
        header = cls(_parse_sections(table, count, length, name), features)
        if header.data is not None and not (header.packed and header.data.end == length):
            raise FormatError(f"{name} is damaged: its data is not where it should be")
        return header

    @staticmethod
    def pack(sections: Sequence[tuple[Kind, Section]], features: int = 0) -> bytes:
        """Bytes 0 to 1023 of a file that consists of these sections, in this order."""
        entries = [SECTION.pack(kind, 0, each.offset, each.length, each.digest) for kind, each in sections]
        length = max(each.end for _, each in sections)
        fixed = HEADER.pack(MAGIC, VERSION, features, 0, length, len(entries), 0)
        table = (fixed + b"".join(entries)).ljust(CHECKSUM_OFFSET, b"\0")
        return table + hashlib.sha256(table).digest()


def _parse_sections(table: bytes, count: int, length: int, name: str) -> dict[int, Section]:
    """Sections follow each other with less than `ALIGNMENT` bytes between them, each kind at most once."""
    sections: dict[int, Section] = {}
    end = SUPERBLOCK_OFFSET
    for number in range(count):
        kind, flags, offset, size, digest = SECTION.unpack_from(table, HEADER.size + number * SECTION.size)
        if flags or kind in sections or offset != aligned(end) or size > length - offset:
            raise FormatError(f"{name} is damaged: section {number} is not where it should be")
        sections[kind] = Section(offset, size, digest)
        end = offset + size
    missing = [kind.name.lower() for kind in Kind if kind not in sections and kind is not Kind.DATA]
    if missing or end != length or sections[Kind.EROFS].offset != SUPERBLOCK_OFFSET:
        raise FormatError(f"{name} is damaged: it lacks {', '.join(missing) or 'a clear end'}")
    return sections


def aligned(offset: int) -> int:
    """Where the section begins before which `offset` bytes are taken."""
    return offset + ALIGNMENT - 1 & ~(ALIGNMENT - 1)
