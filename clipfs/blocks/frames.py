"""Long zstd frames, in which decoding cannot begin: decoded forward, once, as far as somebody wants.

A few frames are held open, each at the place that decoding has come to. Who wants a span behind that place has to begin
anew, which the cache on disk makes rare. This module fetches nothing; it says which bytes are needed next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from clipfs.blocks.plan import BLOCK, LayerView, Spans
from clipfs.codec import Forward
from clipfs.format import Codec

# Frames held open. Each has a window of up to 128 MiB, usually 8.
_OPEN = 2


class Frame:
    """One frame of a layer, and how far it is decoded. `numbers` are its spans."""

    def __init__(self, spans: Spans, numbers: range) -> None:
        self.lock = trio.Lock()
        self._spans, self._numbers = spans, numbers
        self._next = numbers.start
        self._forward = Forward()

    def begin_before(self, number: int) -> None:
        """Make sure that span `number` is still to come."""
        if number < self._next:
            self._next = self._numbers.start
            self._forward = Forward()

    def stretch(self, last: int, most: int) -> tuple[range, int, int]:
        """What to decode next: spans up to `last`, of about `most` compressed bytes, and the bytes [start, end) that
        they need."""
        first = self._spans[self._next]
        start = first.start if self._next == self._numbers.start else self._spans[self._next - 1].end
        stop, end = self._next + 1, first.end
        while stop <= last and self._spans[stop].end - start <= most:
            end = self._spans[stop].end
            stop += 1
        return range(self._next, stop), start, end

    def decode(self, data: bytes, numbers: range) -> list[tuple[int, list[bytes]]]:
        """In a thread: the blocks of these spans, from the bytes that `stretch` asked for."""
        found, view, at = [], memoryview(data), 0
        start = self._spans[numbers[-1]].end - len(data)
        try:
            for number in numbers:
                span = self._spans[number]
                plain = self._forward.decode(span, view[at : span.end - start])
                at = span.end - start
                found.append((number, [plain[each : each + BLOCK] for each in range(0, len(plain), BLOCK)]))
                self._next = number + 1
        except BaseException:
            # It stands in the middle of a span now.
            self._next, self._forward = self._numbers.start, Forward()
            raise
        return found


class Frames:
    """The frames of an image that are being decoded."""

    def __init__(self, layers: Sequence[LayerView]) -> None:
        self._layers = layers
        self._open: OrderedDict[tuple[int, int], Frame] = OrderedDict()

    def serves(self, layer: int, number: int) -> bool:
        """Is this span one of several of the same frame?"""
        return self._layers[layer].codec is Codec.ZSTD and len(self._layers[layer].spans.frame(number)) > 1

    @asynccontextmanager
    async def at(self, layer: int, number: int) -> AsyncIterator[Frame]:
        """The frame of a span, for one user at a time."""
        numbers = self._layers[layer].spans.frame(number)
        key = (layer, numbers.start)
        frame = self._open.pop(key, None) or Frame(self._layers[layer].spans, numbers)
        self._open[key] = frame
        if len(self._open) > _OPEN:
            # Whoever uses it goes on; it is only not found any more.
            self._open.popitem(last=False)
        async with frame.lock:
            yield frame
