"""An index without a file and a source without a network, for tests of what reads through them."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from clipfs.errors import FormatError
from clipfs.format.container import Codec, Span
from tests.streams import scanned

Extents = list[tuple[int, int, int, int]]


class Spans(list[Span]):
    """The spans of a layer; knows what `tables.SpanTable` knows, and checks as little as a test needs."""

    def find(self, offset: int) -> int:
        return max(0, bisect_right([span.position for span in self], offset) - 1)

    def bounds(self, number: int) -> tuple[int, int]:
        span = list.__getitem__(self, number)
        return span.position, span.length

    def digest(self, number: int) -> bytes:
        return self[number].digest

    def frame(self, number: int) -> range:
        alike = [at for at, span in enumerate(self) if span.start == self[number].start]
        return range(alike[0], alike[-1] + 1)


@dataclass
class View:
    """A layer: its spans, the blob, and what it decodes to."""

    spans: Spans
    codec: Codec
    blob: bytes
    plain: bytes

    @classmethod
    def raw(cls, plain: bytes, lengths: Sequence[int] = ()) -> View:
        """A layer that is not compressed, in spans of these lengths; the last one repeats."""
        spans, at = Spans(), 0
        while at < len(plain):
            length = min(lengths[min(len(spans), len(lengths) - 1)] if lengths else len(plain), len(plain) - at)
            digest = hashlib.sha256(plain[at : at + length]).digest()
            spans.append(Span(at, at + length, at, length, digest))
            at += length
        return cls(spans, Codec.RAW, plain, plain)

    @classmethod
    def of(cls, blob: bytes, codec: Codec, span_size: int) -> View:
        """A layer as a scan describes it."""
        plain, spans = scanned(blob, span_size, codec)
        return cls(Spans(spans), codec, blob, plain)


class FakeIndex:
    """Layers, and extents that say what the data space consists of: (address, layer, offset, length), sorted."""

    def __init__(self, layers: Sequence[View], extents: Extents | None = None, data_size: int | None = None) -> None:
        self.layers = layers
        self.pieces = [(0, 0, 0, len(layers[0].plain))] if extents is None else extents
        self.data_size = data_size or max((at + length for at, _, _, length in self.pieces), default=0)
        self.damaged: range | None = None

    def extents(self, address: int, length: int) -> Extents:
        if self.damaged is not None and address < self.damaged.stop and address + length > self.damaged.start:
            raise FormatError("the index is damaged there")
        end, found = address + length, []
        for at, layer, offset, size in self.pieces:
            start, stop = max(at, address), min(at + size, end)
            if start < stop:
                found.append((start, layer, offset + start - at, stop - start))
        return found

    def extent(self, layer: int, offset: int) -> range:
        found = (range(start, start + size) for _, of, start, size in self.pieces if of == layer)
        return next((each for each in found if offset in each), range(0))

    def expected(self, address: int, length: int) -> bytes:
        """What a read of these bytes has to give."""
        out = bytearray(length)
        for at, layer, offset, size in self.extents(address, length):
            out[at - address : at - address + size] = self.layers[layer].plain[offset : offset + size]
        return bytes(out)


class FakeFetcher:
    """Answers from the layers' blobs. `ranges` is what was asked for; until `gate` is set nobody gets an answer."""

    def __init__(self, index: FakeIndex) -> None:
        self._index = index
        self.ranges: list[tuple[int, int, int]] = []
        self.distrusted: list[int] = []
        self.distrusted_at: list[int | None] = []
        self.gate = trio.Event()
        self.gate.set()
        #: What becomes of the next answers; each is used once.
        self.changes: list[Callable[[bytes], bytes]] = []

    async def fetch_into(self, layer: int, start: int, end: int, sink: Callable[[bytes], object]) -> None:
        sink(await self.fetch(layer, start, end))

    async def fetch(self, layer: int, start: int, end: int) -> bytes:
        self.ranges.append((layer, start, end))
        await self.gate.wait()
        data = self._index.layers[layer].blob[start:end]
        return self.changes.pop(0)(data) if self.changes else data

    def distrust(self, layer: int, at: int | None = None) -> None:
        self.distrusted.append(layer)
        self.distrusted_at.append(at)


def raising(error: Exception) -> Callable[[bytes], bytes]:
    """Instead of an answer, an error."""

    def fail(_: bytes) -> bytes:
        raise error

    return fail


def flipped(data: bytes) -> bytes:
    """An answer of which one bit is wrong."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def places(data_size: int, count: int, longest: int, seed: int = 1) -> list[tuple[int, int]]:
    """Reads anywhere in the data space, and a little beyond its end."""
    chance = random.Random(seed)
    return [(chance.randrange(data_size + 5000), chance.choice((1, 4096, longest))) for _ in range(count)]
