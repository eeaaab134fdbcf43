"""The chunks of a layer's files, as a table of contents lists them -> spans of the layer, and segments of its files.

This module owns where chunks can be in a blob: what each needs to be decoded, and that none overlaps another. A chunk
is a part of a regular file that has a digest, and lies in a gzip member (eStargz) or is a zstd frame (zstd:chunked).

For a layer that is known by its table, the *uncompressed layer* is not the tar but the chunks, one behind the other in
the order of the blob: the table knows nothing of tar headers. Chunks of zeros are holes, and not part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clipfs.errors import ImageError
from clipfs.format.container import Codec, Span
from clipfs.layers.members import Segment

# Compressed bytes that a chunk can take beyond its decoded ones: encoders store what they cannot shrink, in pieces of
# some 10 KiB or more with a few bytes around each.
_SLACK_SHIFT, _SLACK = 8, 64 << 10


@dataclass(slots=True)
class Chunk:
    """start: where its gzip member or zstd frame begins in the blob.  inner: how many decoded bytes of that come before
    it.  end: of its compressed bytes, 0 where nobody says.  at: where it begins in its file.  digest: empty for zeros.
    position: in the uncompressed layer, once it is known.
    """

    start: int
    inner: int
    end: int
    at: int
    length: int
    digest: bytes
    position: int = 0


def lay_out(chunks: Iterable[Chunk], codec: Codec, end: int) -> tuple[list[Span], int]:
    """A span for each chunk, in the order of the blob, and how many bytes they decode to; chunks learn their positions.

    end: where in the blob the last chunk ends. Raises ImageError for chunks that cannot be in one blob.
    """
    order = sorted(chunks, key=lambda chunk: (chunk.start, chunk.inner))
    spans, position = list[Span](), 0
    for chunk, stop in zip(order, _ends(order, codec, end), strict=True):
        chunk.position = position
        if chunk.digest:
            spans.append(Span(chunk.start, stop, position, chunk.length, chunk.digest, skip=chunk.inner))
            position += chunk.length
    return spans, position


def _ends(order: Sequence[Chunk], codec: Codec, end: int) -> list[int]:
    """Where the compressed bytes of each chunk end: where the next gzip member or frame begins, if not before."""
    ends = list[int]()
    begun, later = end, 0  # of the chunk behind: where its member begins, and where in that it begins itself
    for chunk in reversed(order):
        if chunk.start != begun:
            end, begun = begun, chunk.start
        elif chunk.inner + chunk.length > later:
            raise ImageError(f"two chunks share bytes of what begins at byte {chunk.start} of the layer")
        if chunk.end and not chunk.start < chunk.end <= end:
            raise ImageError(f"the chunk at byte {chunk.start} of the layer goes on beyond the beginning of the next")
        ends.append(_bounded(chunk, chunk.end or end, codec))
        later = chunk.inner
    return ends[::-1]


def _bounded(chunk: Chunk, end: int, codec: Codec) -> int:
    """Not to fetch what follows in the same gzip member without need: headers of members that have no contents."""
    output = chunk.inner + chunk.length
    most = chunk.start + output + (output >> _SLACK_SHIFT) + _SLACK
    if end > most and chunk.digest and codec is not Codec.GZIP:
        raise ImageError(f"{end - chunk.start} bytes from byte {chunk.start} of the layer are for {output} of contents")
    return min(end, most)


def segments(chunks: Sequence[Chunk]) -> tuple[Segment, ...]:
    """Where the contents of a file are whose chunks these are, in order; what is stored in one run is said at once."""
    found: list[Segment] = []
    for chunk in chunks:
        if not chunk.digest:
            continue
        at, position, length = found[-1] if found else (0, 0, 0)
        if length and (at + length, position + length) == (chunk.at, chunk.position):
            found[-1] = (at, position, length + chunk.length)
        else:
            found.append((chunk.at, chunk.position, chunk.length))
    return tuple(found)
