"""Contents piled up as spans: in what order they lie, where spans are cut, and what is stored once.

A pile is what the data section of a packed clip becomes (docs/format.md, "Packed clips"). It takes pieces of files in
the order of their addresses and knows neither files nor trees.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import zstandard

from clipfs.format.container import Codec, Extent, Layer, Span
from clipfs.oci import Digest

# Decoded bytes of a span; the last piece that comes into one may make it half as long again. A read at random costs a
# whole span, and a request unless its neighbours are wanted too, so this stands between two evils. What a Python
# program fetches until it runs, of the demo image's data, in MB: 5.8 of 40.9 with 256 KiB, 7.5 of 39.8 with 512 KiB,
# 10.2 of 38.5 with 1 MiB, 17.2 of 36.3 with 4 MiB.
SPAN = 512 << 10

# Of zstd. Level 12 makes the data 0.5 % smaller; 15 takes four times as long for 1.2 %.
_LEVEL = 9

# So many zeros, at a multiple of their number from the beginning of a piece, are a hole.
_ZEROS = bytes(64 << 10)

# Spans being compressed, or waiting for those before them. Each is in memory, decoded.
_WAITING = 2 * max(2, os.cpu_count() or 1)

MEDIA_TYPE = "application/vnd.clipfs.data.v1+zstd"


class _Squeezed(NamedTuple):
    length: int
    digest: bytes
    data: bytes


class Pile:
    """Writes spans to `out`, which is empty; a context manager. `extents` is where the contents are, `content` and
    `unique` how many bytes have come and how many of them were new."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self.extents: list[Extent] = []
        self.content = self.unique = 0
        self._spans: list[Span] = []
        self._digest, self._plain_digest = hashlib.sha256(), hashlib.sha256()
        self._size = 0
        # Where a piece is, by its SHA-256.
        self._known: dict[bytes, int] = {}
        self._next = bytearray()
        self._pool = ThreadPoolExecutor(max(2, os.cpu_count() or 1), "clipfs-pack")
        self._waiting: deque[Future[_Squeezed]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, address: int, at: int, piece: bytes) -> None:
        """`piece`, `SPAN` bytes at most, is at offset `at` of the file at `address` of the data space. Both go up."""
        self.content += len(piece)
        for start, end in _stored(piece):
            self._place(address + at + start, piece[start:end], goes_on=at + start > 0)

    def finish(self) -> Layer:
        """All of it as a layer, when the last piece has come."""
        self._cut()
        while self._waiting:
            self._write(self._waiting.popleft().result())
        return Layer(
            digest=Digest("sha256", self._digest.hexdigest()),
            diff_id=Digest("sha256", self._plain_digest.hexdigest()),
            size=self._size,
            diff_size=self.unique,
            codec=Codec.ZSTD,
            media_type=MEDIA_TYPE,
            spans=self._spans,
        )

    def _place(self, address: int, piece: bytes, goes_on: bool) -> None:
        digest = hashlib.sha256(piece).digest()
        offset = self._known.get(digest)
        if offset is None:
            # No piece is in two spans, so that no file shorter than a span needs two fetches.
            if len(self._next) >= SPAN // 2 and len(self._next) + len(piece) > SPAN:
                self._cut()
            offset = self._known[digest] = self.unique
            self.unique += len(piece)
            self._next += piece
        last = self.extents[-1] if self.extents and goes_on else None
        if last and (last.address + last.length, last.offset + last.length) == (address, offset):
            self.extents[-1] = Extent(last.address, 0, last.offset, last.length + len(piece))
        else:
            self.extents.append(Extent(address, 0, offset, len(piece)))

    def _cut(self) -> None:
        if self._next:
            plain, self._next = bytes(self._next), bytearray()
            self._plain_digest.update(plain)
            self._waiting.append(self._pool.submit(_squeeze, plain))
        if len(self._waiting) >= _WAITING:
            self._write(self._waiting.popleft().result())

    def _write(self, squeezed: _Squeezed) -> None:
        length, digest, data = squeezed
        position = self._spans[-1].position + self._spans[-1].length if self._spans else 0
        self._spans.append(Span(self._size, self._size + len(data), position, length, digest))
        self._size += len(data)
        self._digest.update(data)
        self._out.write(data)


def _squeeze(plain: bytes) -> _Squeezed:
    """In a thread: a span's frame. Both zstd and hashlib let go of the interpreter."""
    data: bytes = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False).compress(plain)
    return _Squeezed(len(plain), hashlib.sha256(plain).digest(), data)


def _stored(piece: bytes) -> Iterator[tuple[int, int]]:
    """The parts [start, end) of a piece that are no holes."""
    start = at = 0
    while at < len(piece):
        end = min(at + len(_ZEROS), len(piece))
        if piece[at:end] == _ZEROS[: end - at]:
            if start < at:
                yield start, at
            start = end
        at = end
    if start < at:
        yield start, at
