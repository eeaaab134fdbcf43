"""A ``.clip`` written: a tree, the places of its contents and the image's documents in, a file out.

What the bytes mean is written down in `format`, `erofs` and docs/format.md. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import BinaryIO, TypeAlias

import zstandard

from clipfs.erofs.pack import pack
from clipfs.erofs.structs import SUPERBLOCK_OFFSET, Inode
from clipfs.errors import ImageError
from clipfs.format.container import (
    ALGORITHMS,
    LAYER,
    MAX_LAYERS,
    PLACE_BITS,
    SEEK,
    SPAN,
    Extent,
    Header,
    Kind,
    Layer,
    Section,
    aligned,
)

# Measured on real sparse windows: 0.14 ms each; level 19 takes 30 times as long for 4 % less.
_WINDOW_LEVEL = 9

# What is in each section but the data.
Parts: TypeAlias = dict[Kind, bytes | memoryview]


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
    parts: Parts = {
        Kind.EROFS: memoryview(pack(root, data_size, uuid_of(manifest)))[SUPERBLOCK_OFFSET:],
        **pack_tables(layers, extents),
        Kind.MANIFEST: manifest,
        Kind.CONFIG: config,
        Kind.SOURCE: source.encode("utf-8", "surrogateescape"),
    }
    assemble(out, parts)


def uuid_of(manifest: bytes) -> bytes:
    """What the EROFS image of an image with this manifest is called."""
    return hashlib.sha256(manifest).digest()[:16]


def pack_tables(layers: Sequence[Layer], extents: Sequence[Extent]) -> Parts:
    """The sections layers, extents, spans, seeks and windows."""
    records = b"".join(map(_pack_layer, layers))
    return {Kind.LAYERS: records, Kind.EXTENTS: _pack_extents(extents), **_pack_spans(layers)}


def assemble(out: BinaryIO, parts: Parts, features: int = 0, data: tuple[int, bytes] | None = None) -> None:
    """Write a file of these sections. data: length and SHA-256 of the data that the caller will write behind them."""
    sections: list[tuple[Kind, Section]] = []
    end = SUPERBLOCK_OFFSET
    for kind in (each for each in Kind if each in parts):
        section = Section.of(aligned(end), parts[kind])
        sections.append((kind, section))
        end = section.end
    if data is not None:
        sections.append((Kind.DATA, Section(aligned(end), *data)))
    out.write(Header.pack(sections, features))
    end = SUPERBLOCK_OFFSET
    for kind, section in sections:
        out.write(bytes(section.offset - end))
        if kind in parts:
            out.write(parts[kind])
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


def _pack_spans(layers: Sequence[Layer]) -> Parts:
    """The sections spans, seeks and windows. Windows are compressed one by one, because they are needed one by one."""
    compressor = zstandard.ZstdCompressor(level=_WINDOW_LEVEL, write_checksum=False)
    spans: list[bytes] = []
    seeks: list[bytes] = []
    windows = bytearray()
    at, last, size = 0, b"", 0
    for layer in layers:
        seek: tuple[int, ...] = ()  # the spans of a layer share none with those of another
        for span in layer.spans:
            if span.length >> 32:
                raise ImageError("one stretch of it decodes to more than 4 GiB", layer=layer.digest)
            if span.window and span.window != last:
                at, last = len(windows), span.window
                windows += compressor.compress(last)
                size = len(windows) - at
            before, shared = seek, (at, size) if span.window else (0, 0)
            seek = (span.start, span.position - span.skip, *shared, span.bit)
            if seek != before:
                seeks.append(SEEK.pack(*seek))
            try:
                spans.append(SPAN.pack(span.position, len(seeks) - 1, span.end - span.start, span.digest))
            except struct.error:
                raise ImageError("one stretch of it takes more than 4 GiB", layer=layer.digest) from None
    return {Kind.SPANS: b"".join(spans), Kind.SEEKS: b"".join(seeks), Kind.WINDOWS: memoryview(windows)}
