"""What a scan keeps while it passes over a layer: its place in the blob, the span under way, and those that are done.

This module does not know codecs; `spans` tells it where decoding can begin and which bytes came out. Digests are taken,
windows made sparse, and their costs judged, in a thread of their own, which never falls far behind.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from clipfs.compression.windows import REACH, SAMPLE, packed, sparse_window, unpacked, window_cost
from clipfs.errors import ImageError
from clipfs.format.container import MAX_TAKEN, MadeSpans, Span

# What small reads in sequence are served from.
_READ = 1 << 20

# Decoded bytes that are handed to the hashing thread at a time: handing over costs as much as hashing 64 KiB.
_TOGETHER = 512 << 10

# Pieces of work that it may be behind: 4 MiB.
_BACKLOG = 8


@dataclass(frozen=True, slots=True)
class Seek:
    """Where decoding can begin; the fields are those of Span."""

    start: int
    bit: int = 0
    window: bytes = b""
    skip: int = 0


class Region:
    """The blob's bytes: a part of a file. `position` is how far the scan has come."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self.descriptor, self.offset, self.size = descriptor, offset, size
        self.position = 0
        self._buffer, self._start = b"", 0

    def read(self, start: int, count: int) -> bytes:
        """Bytes [start, start + count), fewer at the end. Small reads in sequence cost one large one."""
        at = start - self._start
        if at < 0 or at + count > len(self._buffer):
            length = max(0, min(max(count, _READ), self.size - start))
            self._buffer, self._start, at = os.pread(self.descriptor, length, self.offset + start), start, 0
        return self._buffer[at : at + count]

    def peek(self, start: int, count: int) -> bytes:
        """The same, for other threads: past the buffer."""
        return os.pread(self.descriptor, min(self.size - start, count), self.offset + start)


class Spans(MadeSpans):
    """Spans whose windows are compressed until one is asked for: those of an image of 50 GB would take one."""

    def __init__(self, packed_spans: list[Span]) -> None:
        self._packed = packed_spans
        self._last = b"", b""  # a window as it is kept, which neighbours share, and as it is

    def __len__(self) -> int:
        return len(self._packed)

    def _made(self, number: int) -> Span:
        span = self._packed[number]
        if span.window is not self._last[0]:
            self._last = span.window, unpacked(span.window)
        return replace(span, window=self._last[1])


class Ledger:
    """The spans, in order. `length` is how much the one under way holds; `spare`, what they may cost besides a share of
    the layer, in bytes of the index."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._thread = ThreadPoolExecutor(1, "clipfs-spans")
        self._behind: deque[Future[Any]] = deque()
        self._done: list[Span] = []  # with packed windows; the thread appends to it
        self._hash = hashlib.sha256()
        self._parts: list[bytes | bytearray] = []
        self._collected = 0  # bytes in them
        self._seek = Seek(0)
        self._position = self._end = 0
        self._sparse: tuple[bytes, bytes] = b"", b""
        self.length = self.spare = 0

    @property
    def start(self) -> int:
        """The compressed byte that decoding of the span under way begins at."""
        return self._seek.start

    @property
    def run(self) -> int:
        """Decoded bytes since decoding could begin."""
        return self._seek.skip + self.length

    def begin(self, seek: Seek) -> None:
        """Decoding can begin here. Only a span that holds nothing yet makes use of it."""
        if not self.length:
            self._seek = seek

    def add(self, chunk: bytes | bytearray) -> None:
        """The next decoded bytes."""
        self.length += len(chunk)
        self._parts.append(chunk)
        self._collected += len(chunk)
        if self._collected >= _TOGETHER:
            self._submit(self._thread.submit(_update, self._hash, self._taken()))

    def cut(self, end: int, seek: Seek | None = None) -> None:
        """The span ends, with the compressed bytes before `end`. seek: where the next begins; without one, it has to
        begin where this one did."""
        if not self.length:
            return
        # What one piece takes beyond its end may be more than all of the next one.
        end = self._end = max(end, self._end) if self._seek.skip else end
        if end - self.start > MAX_TAKEN:
            raise ImageError(
                f"what begins at compressed byte {self.start} has 4 GiB and more without another place where decoding "
                "can begin, and a .clip cannot hold that: compress the layer with another tool, or with "
                "`skopeo copy --dest-compress-format zstd:chunked`"
            )
        rest = self._taken()
        self._submit(self._thread.submit(self._span, self._seek, end, self._position, self.length, self._hash, rest))
        done = self._seek
        self._seek = seek or Seek(done.start, done.bit, done.window, done.skip + self.length)
        self._position += self.length
        self.length = 0
        self._hash = hashlib.sha256()

    def cost(self, seek: Seek, plain: bytes) -> Future[int]:
        """What it takes to keep the window of a place where decoding can begin. plain: what follows it."""
        return self._thread.submit(self._cost, seek, plain)

    def spans(self) -> Spans:
        """All of them, at the end."""
        while self._behind:
            self._behind.popleft().result()
        return Spans(self._done)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _submit(self, job: Future[Any]) -> None:
        self._behind.append(job)
        if len(self._behind) > _BACKLOG:
            self._behind.popleft().result()

    def _cost(self, seek: Seek, plain: bytes) -> int:
        head = self._region.peek(seek.start, 2 * SAMPLE) if seek.window else b""
        return window_cost(seek.window, seek.bit, head, plain)

    def _taken(self) -> list[bytes | bytearray]:
        parts, self._parts, self._collected = self._parts, [], 0
        return parts

    def _span(
        self, seek: Seek, end: int, position: int, length: int, digest: Any, rest: list[bytes | bytearray]
    ) -> None:
        _update(digest, rest)
        if seek.window is not self._sparse[0]:
            # All pieces that begin there share it, and some are shorter than what may refer to it.
            head = self._region.peek(seek.start, REACH)
            self._sparse = seek.window, packed(sparse_window(seek.window, seek.bit, head))
        span = Span(seek.start, end, position, length, digest.digest(), seek.bit, seek.skip, self._sparse[1])
        self._done.append(span)


def _update(digest: Any, parts: list[bytes | bytearray]) -> None:
    for part in parts:
        digest.update(part)
