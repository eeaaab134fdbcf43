"""Spans that begin at the same compressed byte: decoded forward, once, as far as somebody wants.

They are what a layer has between two places where decoding can begin: the pieces between two seek points of a gzip
layer, or all of a zstd frame. A few such frames are held open, each at the place that decoding has come to. Who wants a
span behind that place has to begin anew, which the caches make rare. This module fetches nothing; it says which bytes
are needed next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence

import trio

from clipfs.blocks.arrival import Arrival
from clipfs.blocks.plan import LayerView, Spans, blocks_of
from clipfs.compression.codec import Forward
from clipfs.format.container import Codec

# Frames held open. A gzip decoder takes 74 KB, a zstd decoder a window of up to 128 MiB, usually 8.
_OPEN = {Codec.GZIP: 64, Codec.ZSTD: 2}

# Decoded bytes of spans that are decoded in one go: who waits for the first of them waits for all.
_AT_ONCE = 1 << 20


class Frame:
    """One frame of a layer, and how far it is decoded. `numbers` are its spans."""

    def __init__(self, codec: Codec, spans: Spans, numbers: range) -> None:
        self._codec, self._spans, self._numbers = codec, spans, numbers
        self._latest: Turn | None = None
        self._booked = 0  # the span that decoding will have come to after that turn
        self._begin()

    def _begin(self) -> None:
        self._next = self._numbers.start
        self._forward = Forward(self._codec, self._spans[self._next])

    @property
    def done(self) -> bool:
        """Is it decoded to its end? Then it is of no more use."""
        return self._next == self._numbers.stop

    def next(self, first: int, last: int, most: int) -> tuple[range, int, int]:
        """What to decode for spans `first` to `last`, or for the first of them if all need much more than `most`
        compressed bytes: spans, and the bytes [start, end) that they need. It begins where decoding has come to."""
        if first < self._next:
            self._begin()
        return self._from(self._next, last, most)

    def book(self, first: int, last: int, most: int, end: Callable[[], None]) -> Turn:
        """A turn at decoding these spans, as `next` has them. end: called when it is over."""
        at = self._next if self._latest is None else self._booked
        if self._latest is None and first < at:
            at = self._numbers.start  # it begins anew
        extent = self._from(at, last, most)[1:] if first >= at else None
        self._booked = max(at, last + 1)
        self._latest = Turn(self, self._latest, extent, end)
        return self._latest

    def over(self) -> None:
        """A turn is. Nothing refers to it any more: they and their frames would be garbage in a circle."""
        while self._latest is not None and self._latest.over.is_set():
            # One that was closed before it came says nothing of those before it.
            self._latest = self._latest.before

    def _from(self, at: int, last: int, most: int) -> tuple[range, int, int]:
        """As `next`, when decoding has come to span `at`."""
        start = self._spans[at].start if at == self._numbers.start else self._spans[at - 1].end
        stop, end = at + 1, self._spans[at].end
        while stop <= last and self._spans[stop].end - start <= most:
            end = self._spans[stop].end
            stop += 1
        return range(at, stop), start, end

    async def parts(
        self, numbers: range, start: int, arrival: Arrival, *, singly: bool
    ) -> AsyncGenerator[tuple[range, memoryview], None]:
        """What to decode next of the spans `numbers`, whose bytes begin at `start`: those whose bytes have come, though
        not too many, or one after the other, if some may be wrong."""
        while numbers:
            await arrival.reach(self._spans[numbers.start].end)
            here, length = 1, self._spans[numbers.start].length
            while not singly and here < len(numbers) and self._spans[numbers[here]].end <= arrival.come:
                length += self._spans[numbers[here]].length
                if length > _AT_ONCE:
                    break
                here += 1
            end = self._spans[numbers[here - 1]].end
            yield numbers[:here], await arrival.bytes(start, end)
            numbers, start = numbers[here:], end

    def decode(self, data: bytes | memoryview, numbers: range) -> list[tuple[int, list[bytes]]]:
        """In a thread: the blocks of these spans, from the bytes that `next` asked for."""
        found, view, at = [], memoryview(data), 0
        start = self._spans[numbers[-1]].end - len(data)
        try:
            for number in numbers:
                span = self._spans[number]
                plain = self._forward.decode(span, view[at : span.end - start])
                at = span.end - start
                found.append((number, blocks_of(plain)))
                self._next = number + 1
        except BaseException:
            # It stands in the middle of a span now.
            self._begin()
            raise
        return found


class Turn:
    """One user's turn at a frame. They come in the order in which they were booked, and each must be closed.

    extent: the bytes [start, end) that it needs if those before it do what they have booked; None if they may bring
    what it is for. before: the turn before it, until that is known to be over.
    """

    def __init__(
        self, frame: Frame, before: Turn | None, extent: tuple[int, int] | None, end: Callable[[], None]
    ) -> None:
        self.extent = extent
        self.before = before
        self.over = trio.Event()
        self._frame, self._end = frame, end

    async def come(self) -> Frame:
        """Wait for all those before."""
        while self.before is not None:
            # One that was closed before it came says nothing of those before it.
            await self.before.over.wait()
            self.before = self.before.before
        return self._frame

    def close(self) -> None:
        """It is over, whether it has come or not."""
        self.over.set()
        self._frame.over()
        self._end()


class Frames:
    """The frames of an image that are being decoded."""

    def __init__(self, layers: Sequence[LayerView]) -> None:
        self._layers = layers
        self._open: dict[Codec, OrderedDict[tuple[int, int], Frame]] = {codec: OrderedDict() for codec in _OPEN}

    def serves(self, layer: int, number: int) -> bool:
        """Is this span one of several of the same frame?"""
        return self._layers[layer].codec in _OPEN and len(self._layers[layer].spans.frame(number)) > 1

    def book(self, layer: int, first: int, last: int, most: int) -> Turn:
        """A turn at the frame of these spans, as `Frame.book` has it."""
        numbers = self._layers[layer].spans.frame(first)
        key = (layer, numbers.start)
        codec = self._layers[layer].codec
        opened = self._open[codec]
        frame = opened.pop(key, None) or Frame(codec, self._layers[layer].spans, numbers)
        opened[key] = frame
        if len(opened) > _OPEN[codec]:
            # Whoever uses it goes on; it is only not found any more.
            opened.popitem(last=False)

        def end() -> None:
            if frame.done and opened.get(key) is frame:
                del opened[key]

        return frame.book(first, last, most, end)
