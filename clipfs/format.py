"""The ``.clip`` container: what it consists of, its header, and how it is written.

This module owns the layout that docs/format.md specifies, except for the EROFS image, which belongs to `erofs`. It
knows how sections are written; `tables` reads them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from mmap import mmap
from typing import BinaryIO, Self

import zstandard

from clipfs.erofs import SUPERBLOCK_OFFSET, Inode
from clipfs.erofs_pack import pack
from clipfs.errors import FormatError, ImageError
from clipfs.oci import Digest

# As PNG's: a high bit, CR LF, control-Z and LF tell a file that was transferred as text from one that was not.
MAGIC = b"\x89CLIP\r\n\x1a\n"
VERSION = 2
# Bits in the header whose meaning a reader must know. There are none yet.
FEATURES = 0

# Bytes 0 to 1023 are the header: fixed fields, then the section table, and its SHA-256 at the end.
HEADER = struct.Struct("<9s3xIIIQII")
SECTION = struct.Struct("<IIQQ32s")
CHECKSUM_OFFSET = SUPERBLOCK_OFFSET - 32
MAX_SECTIONS = (CHECKSUM_OFFSET - HEADER.size) // SECTION.size
ALIGNMENT = 8

LAYER = struct.Struct("<BBB5x64s64sQQQQB255s")
SPAN = struct.Struct("<QQQQQIIB7x32s")

# An extent's place is its layer's number and, in the low bits, the offset in the uncompressed layer.
PLACE_BITS = 48
MAX_LAYERS = 1 << 64 - PLACE_BITS

# What a deflate stream can refer back to.
MAX_WINDOW = 32768

ALGORITHMS = {1: "sha256", 2: "sha512"}

# Measured on real sparse windows: 0.14 ms each; level 19 takes 30 times as long for 4 % less.
_WINDOW_LEVEL = 9


class Codec(IntEnum):
    """How a layer is compressed."""

    RAW = 0
    GZIP = 1
    ZSTD = 2


class Kind(IntEnum):
    """What a section holds. Number 9 is taken: it will be the data of packed clips."""

    EROFS = 1
    LAYERS = 2
    EXTENTS = 3
    SPANS = 4
    WINDOWS = 5
    MANIFEST = 6
    CONFIG = 7
    SOURCE = 8


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

    @property
    def end(self) -> int:
        return self.offset + self.length


class Header:
    """The section table. A section of a kind that this version does not know is no obstacle."""

    def __init__(self, sections: dict[int, Section]) -> None:
        self.sections = sections

    def __getitem__(self, kind: Kind) -> Section:
        return self.sections[kind]

    @classmethod
    def parse(cls, buffer: mmap, name: str) -> Self:
        """The header of the file that is mapped as `buffer`, and is called `name` in errors.

        Afterwards every section is known to lie inside the file.
        """
        if len(buffer) < SUPERBLOCK_OFFSET or buffer[: len(MAGIC)] != MAGIC:
            raise FormatError(f"{name} is not a .clip file")
        _, version, features, _, length, count, reserved = HEADER.unpack_from(buffer, 0)
        if version != VERSION:
            raise FormatError(f"{name} has format version {version}; this clipfs reads version {VERSION}")
        if features & ~FEATURES:
            raise FormatError(f"{name} needs features {features & ~FEATURES:#x} that this clipfs does not have")
        table = buffer[:CHECKSUM_OFFSET]
        if hashlib.sha256(table).digest() != buffer[CHECKSUM_OFFSET:SUPERBLOCK_OFFSET]:
            raise FormatError(f"{name} is damaged: its header does not have the checksum that it should have")
        if length != len(buffer):
            raise FormatError(f"{name} is damaged: it should have {length} bytes and has {len(buffer)}")
        if count > MAX_SECTIONS or reserved:
            raise FormatError(f"{name} is damaged: its section table is not one")
        return cls(_parse_sections(table, count, length, name))

    @staticmethod
    def pack(sections: Iterable[tuple[Kind, Section]]) -> bytes:
        """Bytes 0 to 1023 of a file that consists of these sections, in this order."""
        entries = [SECTION.pack(kind, 0, each.offset, each.length, each.digest) for kind, each in sections]
        length = max(each.end for _, each in sections)
        fixed = HEADER.pack(MAGIC, VERSION, FEATURES, 0, length, len(entries), 0)
        table = (fixed + b"".join(entries)).ljust(CHECKSUM_OFFSET, b"\0")
        return table + hashlib.sha256(table).digest()


def _parse_sections(table: bytes, count: int, length: int, name: str) -> dict[int, Section]:
    """Sections follow each other with less than `ALIGNMENT` bytes between them, each kind at most once."""
    sections: dict[int, Section] = {}
    end = SUPERBLOCK_OFFSET
    for number in range(count):
        kind, flags, offset, size, digest = SECTION.unpack_from(table, HEADER.size + number * SECTION.size)
        if flags or kind in sections or offset != _aligned(end) or size > length - offset:
            raise FormatError(f"{name} is damaged: section {number} is not where it should be")
        sections[kind] = Section(offset, size, digest)
        end = offset + size
    missing = [kind.name.lower() for kind in Kind if kind not in sections]
    if missing or end != length or sections[Kind.EROFS].offset != SUPERBLOCK_OFFSET:
        raise FormatError(f"{name} is damaged: it lacks {', '.join(missing) or 'a clear end'}")
    return sections


def write(
    out: BinaryIO,
    *,
    root: Inode,
    extents: Sequence[Extent],
    data_size: int,
    layers: Sequence[Layer],
    manifest: bytes,
    config: bytes,
    source: str,
) -> None:
    """Write a ``.clip``. The same arguments give the same bytes.

    root: the tree, complete with link counts and addresses; its inodes get their nids.  extents: sorted by address.
    data_size: of the data space, a multiple of 4096.  source: the image's canonical name.
    Raises ImageError for what the format can not hold.
    """
    if len(layers) > MAX_LAYERS or any(layer.diff_size >> PLACE_BITS for layer in layers):
        raise ImageError("the image has more than 65,536 layers or one of more than 256 TiB; a .clip can not hold that")
    image = pack(root, data_size, hashlib.sha256(manifest).digest()[:16])
    spans, windows = _pack_spans(layers)
    parts: list[tuple[Kind, bytes | memoryview]] = [
        (Kind.EROFS, memoryview(image)[SUPERBLOCK_OFFSET:]),
        (Kind.LAYERS, b"".join(map(_pack_layer, layers))),
        (Kind.EXTENTS, _pack_extents(extents)),
        (Kind.SPANS, spans),
        (Kind.WINDOWS, windows),
        (Kind.MANIFEST, manifest),
        (Kind.CONFIG, config),
        (Kind.SOURCE, source.encode("utf-8", "surrogateescape")),
    ]
    sections: list[tuple[Kind, Section]] = []
    end = SUPERBLOCK_OFFSET
    for kind, content in parts:
        section = Section(_aligned(end), len(content), hashlib.sha256(content).digest())
        sections.append((kind, section))
        end = section.end
    out.write(Header.pack(sections))
    end = SUPERBLOCK_OFFSET
    for (_, content), (_, section) in zip(parts, sections, strict=True):
        out.write(bytes(section.offset - end))
        out.write(content)
        end = section.end


def _pack_layer(layer: Layer) -> bytes:
    media_type = layer.media_type.encode()
    if len(media_type) > 255:
        raise ImageError("its media type is longer than 255 bytes", layer=layer.digest)
    numbers = {name: number for number, name in ALGORITHMS.items()}
    return LAYER.pack(
        numbers[layer.digest.algorithm],
        numbers[layer.diff_id.algorithm],
        layer.codec,
        layer.digest.raw,
        layer.diff_id.raw,
        layer.size,
        layer.diff_size,
        len(layer.spans),
        0,
        len(media_type),
        media_type,
    )


def _pack_extents(extents: Sequence[Extent]) -> bytes:
    """Three columns of 64-bit numbers, so that a reader can bisect the first in place."""
    column = struct.Struct(f"<{len(extents)}Q")
    return b"".join(
        (
            column.pack(*(extent.address for extent in extents)),
            column.pack(*(extent.length for extent in extents)),
            column.pack(*(extent.layer << PLACE_BITS | extent.offset for extent in extents)),
        )
    )


def _pack_spans(layers: Sequence[Layer]) -> tuple[bytes, bytes]:
    """(records, windows). Windows are compressed one by one, because they are needed one by one."""
    compressor = zstandard.ZstdCompressor(level=_WINDOW_LEVEL, write_checksum=False)
    records: list[bytes] = []
    windows: list[bytes] = []
    at = 0
    for layer in layers:
        for span in layer.spans:
            window = compressor.compress(span.window) if span.window else b""
            try:
                record = SPAN.pack(
                    span.start, span.end, span.position, span.skip, at if window else 0, span.length, len(window),
                    span.bit, span.digest,
                )  # fmt: skip
            except struct.error:
                raise ImageError("one stretch of it decodes to more than 4 GiB", layer=layer.digest) from None
            records.append(record)
            windows.append(window)
            at += len(window)
    return b"".join(records), b"".join(windows)


def _aligned(offset: int) -> int:
    return offset + ALIGNMENT - 1 & ~(ALIGNMENT - 1)
