"""A range of compressed bytes on its way: what has come of it can be used while the rest is waited for."""

from __future__ import annotations

import copy
import heapq
import math
import time
from bisect import bisect_left, bisect_right

import trio

from clipfs.errors import SourceError

# Pieces that are smaller together are joined: each takes some hundred bytes beside its own, and a server may send a
# range byte by byte.
_SMALL = 1 << 10


class Arrival:
    """Bytes [start, end) of a layer. come: up to where they are here. asked: when they were asked for, by the monotonic
    clock. delay: seconds until the first was here."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end, self.come = start, end, start
        self.delay = math.inf
        self.asked = time.monotonic()
        # As they came, and where each begins. One buffer for all would cost a page fault for each of its pages.
        self._pieces: list[bytes] = []
        self._starts: list[int] = []
        self._error: Exception | None = None
        # Who waits up to where, the nearest first; a number keeps those apart who wait for the same.
        self._waiting: list[tuple[int, int, trio.Event]] = []
        self._waited = 0

    def add(self, piece: bytes) -> None:
        """The next bytes. SourceError if there are too many."""
        if self.come == self.start:
            self.delay = time.monotonic() - self.asked
        come = self.come + len(piece)
        if come > self.end:
            raise SourceError(f"{self.end - self.start} bytes of a layer were asked for, and more came")
        if self._pieces and len(self._pieces[-1]) + len(piece) <= _SMALL:
            self._pieces[-1] += piece
        else:
            self._pieces.append(piece)
            self._starts.append(self.come)
        self.come = come
        while self._waiting and self._waiting[0][0] <= come:
            heapq.heappop(self._waiting)[2].set()

    def close(self, error: Exception | None = None) -> None:
        """No more will come; why, if some are missing."""
        asked, came = self.end - self.start, self.come - self.start
        self._error = error or SourceError(f"{asked} bytes of a layer were asked for, {came} came")
        while self._waiting:
            self._waiting.pop()[2].set()

    async def reach(self, end: int) -> None:
        """Return when the bytes before `end` are here; or the error that ended it before they were."""
        if self.come < end and self._error is None:
            here = trio.Event()
            self._waited += 1
            heapq.heappush(self._waiting, (end, self._waited, here))
            await here.wait()
        if self.come < end:
            assert self._error is not None
            # Each its own copy: tracebacks of several tasks would pile up on one.
            raise copy.copy(self._error) from self._error

    async def bytes(self, start: int, end: int) -> memoryview:
        """Bytes [start, end) of the layer, when they are here; errors as `reach`."""
        await self.reach(end)
        if start >= end:
            return memoryview(b"")
        first, stop = bisect_right(self._starts, start) - 1, bisect_left(self._starts, end)
        pieces = self._pieces[first:stop]
        joined = memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        return joined[start - self._starts[first] : end - self._starts[first]]
