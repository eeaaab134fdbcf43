"""Reads of the data space: from memory at once, or after fetching, decoding and verifying what is missing.

This module owns who waits for what. It does not know files, nor where a layer comes from: a `SpanFetcher` gives it
compressed bytes, an index says what they mean.

Everything between awaits happens at once, as trio has it, and that is relied upon: no other task can run between
looking a span up in `_flights` and putting it there, nor between looking for blocks and joining them.
"""

from __future__ import annotations

import copy
import os
from bisect import bisect_right
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, Self

import trio

from clipfs.blocks.cache import MemoryCache
from clipfs.blocks.counters import Counters
from clipfs.blocks.plan import BLOCK, IndexView, Key, Piece, join, plan
from clipfs.codec import decode
from clipfs.errors import ClipfsError, SourceError
from clipfs.format import Codec, Span

DEFAULT_MEMORY = 64 << 20

# Neighbouring spans are fetched as one range up to this many compressed bytes: a round trip for four spans of usual
# size, and little enough that the first of them is not kept waiting long for the last.
_RANGE = 8 << 20

# What may lie between neighbours: a gzip footer and the next member's header, with room for a name.
_GAP = 4 << 10

# Ranges under way at once. Each holds its compressed and decoded bytes in memory.
_RANGES = 8

# Plans of one block's worth of addresses are remembered, for as many addresses as this times `BLOCK`: 256 MiB. Small
# files make the largest plans, 32 pieces of 0.2 KB, so this stays below 16 MB and is usually below one.
_PLANS = 2048
_SHIFT = BLOCK.bit_length() - 1


class SpanFetcher(Protocol):
    """Where compressed bytes come from."""

    async def fetch(self, layer: int, start: int, end: int) -> bytes:
        """Bytes [start, end) of the blob of layer number `layer`. ClipfsError if they cannot be had."""


class _Flight:
    """A span under way. Everybody who needs it waits here; it ends with its blocks or with an error."""

    def __init__(self, layer: int, number: int, span: Span) -> None:
        self.layer, self.number, self.span = layer, number, span
        self._blocks: list[bytes] = []
        self._error: Exception | None = None
        self._landed = trio.Event()

    def land(self, blocks: list[bytes]) -> None:
        self._blocks = blocks
        self._landed.set()

    def fail(self, error: Exception) -> None:
        if not self._landed.is_set():
            self._error = error
            self._landed.set()

    async def blocks(self) -> list[bytes]:
        await self._landed.wait()
        if self._error is not None:
            # Each waiter raises its own copy: tracebacks of several tasks would pile up on one.
            raise copy.copy(self._error) from self._error
        return self._blocks


class BlockReader:
    """Reads the data space of `index`. An async context manager: what it fetches, it fetches in a nursery of its own,
    so that a reader that is cancelled takes nothing from the others.

    memory: bytes of decoded blocks that are kept.
    """

    def __init__(
        self, index: IndexView, fetcher: SpanFetcher, *, memory: int = DEFAULT_MEMORY, counters: Counters
    ) -> None:
        self.counters = counters
        self._index = index
        self._fetcher = fetcher
        self._cache = MemoryCache(memory)
        self._plans: dict[int, tuple[list[int], list[Piece]]] = {}
        self._flights: dict[tuple[int, int], _Flight] = {}
        self._ranges = trio.CapacityLimiter(_RANGES)
        self._decoders = trio.CapacityLimiter(min(os.cpu_count() or 1, 4))
        self._manager = trio.open_nursery()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        self._nursery = await self._manager.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        nursery, self._nursery = self._nursery, None
        if nursery is not None:
            nursery.cancel_scope.cancel()
            await self._manager.__aexit__(None, None, None)

    def try_read(self, address: int, length: int) -> bytes | None:
        """The bytes if all of them are in memory.

        The hot path: most reads lie in one block, and find it with two dictionaries and one bisect. Counts hits only.
        """
        found = self._plans.get(address >> _SHIFT) or self._remember(address >> _SHIFT)
        start, stop, key, inner = found[1][bisect_right(found[0], address) - 1]
        if key is not None and address + length <= stop:
            block = self._cache.get(key)
            if block is None:
                return None
            inner += address - start
            self.counters.hit(length)
            return block[inner : inner + length]
        return self._try_join(plan(self._index, address, length), length)

    async def read(self, address: int, length: int) -> bytes:
        """The bytes. Raises ClipfsError if they cannot be had, or are not those that the index demands."""
        data = self.try_read(address, length)
        if data is not None:
            await trio.lowlevel.checkpoint()
            return data
        pieces = plan(self._index, address, length)
        blocks: dict[Key, bytes] = {}
        spans: dict[tuple[int, int], None] = {}
        for piece in pieces:
            if piece.key is not None:
                block = self._cache.get(piece.key)
                if block is None:
                    spans[piece.key[:2]] = None
                else:
                    blocks[piece.key] = block
        # Taken from the flights and not from the cache, which may be smaller than what is asked for.
        for flight in self._board(spans):
            decoded = await flight.blocks()
            blocks.update(((flight.layer, flight.number, number), block) for number, block in enumerate(decoded))
        self.counters.missed(length)
        return join(pieces, blocks)

    def _remember(self, region: int) -> tuple[list[int], list[Piece]]:
        """The plan for addresses [region * BLOCK, (region + 1) * BLOCK), and where its pieces start."""
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        pieces = plan(self._index, region * BLOCK, BLOCK)
        found = self._plans[region] = [piece.start for piece in pieces], pieces
        return found

    def _try_join(self, pieces: list[Piece], length: int) -> bytes | None:
        blocks: dict[Key, bytes] = {}
        for piece in pieces:
            if piece.key is not None:
                block = self._cache.get(piece.key)
                if block is None:
                    return None
                blocks[piece.key] = block
        self.counters.hit(length)
        return join(pieces, blocks)

    def _board(self, spans: Iterable[tuple[int, int]]) -> list[_Flight]:
        """The flights that bring these spans: those under way, and new ones for the rest."""
        if self._nursery is None:
            raise ClipfsError("the image is being closed: nothing more is read from it")
        boarded, fresh = [], []
        for layer, number in spans:
            flight = self._flights.get((layer, number))
            if flight is None:
                flight = _Flight(layer, number, self._index.layers[layer].spans[number])
                fresh.append(flight)
            boarded.append(flight)
        for flight in fresh:
            self._flights[flight.layer, flight.number] = flight
        for group in _neighbours(fresh):
            self._nursery.start_soon(self._fly, group)
        return boarded

    async def _fly(self, group: list[_Flight]) -> None:
        """Fetch the spans of one range, and decode each. Errors go to those who wait, and end nothing else."""
        layer, start, end = group[0].layer, group[0].span.start, max(flight.span.end for flight in group)
        try:
            async with self._ranges:
                data = await self._fetcher.fetch(layer, start, end)
                if len(data) != end - start:
                    raise SourceError(f"{end - start} bytes of layer {layer} were asked for, {len(data)} came")
                self.counters.fetched(len(data))
                view = memoryview(data)
                async with trio.open_nursery() as nursery:
                    for flight in group:
                        span = flight.span
                        nursery.start_soon(self._land, flight, view[span.start - start : span.end - start])
        except Exception as error:  # noqa: BLE001  raised again by everybody who waits
            self._end(group, error)
        finally:
            self._end(group, ClipfsError("the image was closed while it was read"))

    async def _land(self, flight: _Flight, data: memoryview) -> None:
        codec = self._index.layers[flight.layer].codec
        try:
            blocks = await trio.to_thread.run_sync(_decode, codec, flight.span, data, limiter=self._decoders)
        except Exception as error:  # noqa: BLE001  raised again by everybody who waits
            self._end([flight], error)
            return
        self.counters.decoded()
        for number, block in enumerate(blocks):
            self._cache.put((flight.layer, flight.number, number), block)
        self._flights.pop((flight.layer, flight.number), None)
        flight.land(blocks)

    def _end(self, group: Iterable[_Flight], error: Exception) -> None:
        """Fail those that have not landed. Nothing is kept: whoever asks next tries again."""
        for flight in group:
            if self._flights.get((flight.layer, flight.number)) is flight:
                del self._flights[flight.layer, flight.number]
            flight.fail(error)


def _neighbours(flights: list[_Flight]) -> list[list[_Flight]]:
    """The flights in groups that are fetched as one range."""
    groups: list[list[_Flight]] = []
    for flight in flights:
        group = groups[-1] if groups else []
        if (
            group
            and group[-1].layer == flight.layer
            and group[0].span.start <= flight.span.start <= group[-1].span.end + _GAP
            and flight.span.end - group[0].span.start <= _RANGE
        ):
            group.append(flight)
        else:
            groups.append([flight])
    return groups


def _decode(codec: Codec, span: Span, data: memoryview) -> list[bytes]:
    plain = decode(codec, span, data)
    return [plain[at : at + BLOCK] for at in range(0, len(plain), BLOCK)]
