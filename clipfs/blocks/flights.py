"""Spans on their way from a source into memory and onto the disk: who fetches, who waits, what is kept.

A span is fetched once, however many tasks, mounts and processes want it. This module knows spans, not what they mean
and not who reads; `reader` does. Bytes reach anybody only through `codec`, which verifies them.

Everything between awaits happens at once, as trio has it, and that is relied upon: no other task can run between
looking a span up in `_flights` and putting it there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from functools import partial

import trio

from clipfs.blocks.cache import MemoryCache
from clipfs.blocks.counters import Counters
from clipfs.blocks.disk import Claim, DiskCache
from clipfs.blocks.flight import RANGE, Flight, SpanFetcher, neighbours, of_each_frame
from clipfs.blocks.frames import Frame, Frames
from clipfs.blocks.journal import Journal
from clipfs.blocks.keeper import Keeper
from clipfs.blocks.plan import BLOCK, LayerView, blocks_of
from clipfs.compression.codec import MAX_FETCH, decode
from clipfs.errors import ClipfsError, FormatError, IntegrityError, SourceError
from clipfs.format.container import Codec, Span

# Ranges under way at once, for those who wait and for those who may want them later. Each holds its compressed and
# decoded bytes in memory.
_RANGES = 8
_RANGES_AHEAD = 4

# Seconds to wait for another process that fetches the same span. It may be slow, or stopped; then both fetch it.
_PATIENCE = 30


class Flights:
    """All spans under way of one image. `start` gives it the nursery that they fly in."""

    def __init__(
        self,
        layers: Sequence[LayerView],
        fetcher: SpanFetcher,
        memory: MemoryCache,
        disk: DiskCache | None,
        counters: Counters,
        journal: Journal,
    ) -> None:
        self._layers, self._fetcher = layers, fetcher
        self._memory, self._disk = memory, disk
        self._counters, self._journal = counters, journal
        self._flights: dict[tuple[int, int], Flight] = {}
        self._frames = Frames(layers)
        self._ranges = trio.CapacityLimiter(_RANGES)
        self._ranges_ahead = trio.CapacityLimiter(_RANGES_AHEAD)
        # zstandard, isal and hashlib let go of the interpreter while they work.
        self.decoders = trio.CapacityLimiter(max(2, min(os.cpu_count() or 1, 4)))
        self.keeper = Keeper()
        self._waiters = trio.CapacityLimiter(64)
        self._nursery: trio.Nursery | None = None
        self._urgent = 0
        self._calm = trio.Event()
        self._calm.set()

    def start(self, nursery: trio.Nursery | None) -> None:
        self._nursery = nursery

    def close(self) -> None:
        """Write to the disk what is still to be written."""
        self.keeper.close()

    async def absent(self, spans: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """Those of these spans that are not on the disk; all, without one."""
        disk = self._disk
        if disk is None:
            return spans
        digests = [self._layers[layer].spans.digest(number) for layer, number in spans]

        def look() -> list[tuple[int, int]]:
            return [span for span, digest in zip(spans, digests, strict=True) if not disk.has(digest)]

        return await trio.to_thread.run_sync(look, limiter=self.decoders)

    async def calm(self) -> None:
        """Return when nobody waits for a span."""
        await self._calm.wait()

    def board(self, spans: Iterable[tuple[int, int]], why: str = "read") -> list[Flight]:
        """The flights that bring these spans: those under way, and new ones for the rest.

        why: ``read`` if somebody waits for them, or else what they are fetched ahead for.
        """
        if self._nursery is None:
            raise ClipfsError("the image is being closed: nothing more is read from it")
        boarded, fresh = [], []
        for layer, number in spans:
            flight = self._flights.get((layer, number))
            if flight is None:
                span = self._layers[layer].spans[number]
                flight = Flight(layer, number, span, self._frames.serves(layer, number))
                fresh.append(flight)
            boarded.append(flight)
        for flight in fresh:
            self._flights[flight.layer, flight.number] = flight
        for group in neighbours(fresh):
            self._nursery.start_soon(self._fly, group, why)
        return boarded

    async def _fly(self, group: list[Flight], why: str) -> None:
        """Bring spans that lie together. Errors go to those who wait, and end nothing else."""
        if why == "read":
            self._urgent += 1
            if self._urgent == 1:
                self._calm = trio.Event()
        try:
            async with self._ranges if why == "read" else self._ranges_ahead:
                mine = group
                claims: dict[int, Claim] = {}
                others: dict[int, Flight] = {}
                if self._disk is not None:
                    claims, others = await trio.to_thread.run_sync(self._claim, group, limiter=self.decoders)
                    mine = [flight for flight in group if flight.number in claims and not flight.landed]
                try:
                    # What others brought meanwhile may have left gaps.
                    for part in neighbours(mine):
                        await self._bring(part, claims, why)
                finally:
                    for claim in claims.values():
                        claim.release()
            for flight in others.values():
                await self._await_other(flight, why)
        except Exception as error:  # noqa: BLE001  raised again by everybody who waits
            self._end(group, error)
        finally:
            self._end(group, ClipfsError("the image was closed while it was read"))
            if why == "read":
                self._urgent -= 1
                if not self._urgent:
                    self._calm.set()

    # --- other processes

    def _claim(self, group: list[Flight]) -> tuple[dict[int, Claim], dict[int, Flight]]:
        """In a thread: the claims on those spans that are ours to fetch, and the flights that others have begun. What
        has come onto the disk meanwhile lands at once."""
        assert self._disk is not None
        claims: dict[int, Claim] = {}
        others: dict[int, Flight] = {}
        for flight in group:
            digest = flight.span.digest
            claim = self._disk.claim(digest)
            if claim is None:
                others[flight.number] = flight
                continue
            claims[flight.number] = claim
            blocks = self._stored(flight)
            if blocks is not None:
                trio.from_thread.run_sync(self._land, flight, blocks)
        return claims, others

    def _stored(self, flight: Flight) -> list[bytes] | None:
        """In a thread: all blocks of a span, if the disk has them."""
        assert self._disk is not None
        return self._disk.read(flight.span.digest, 0, -(-flight.span.length // BLOCK)) or None

    async def _await_other(self, flight: Flight, why: str) -> None:
        """Somebody else fetches the span: wait until they have, or it is up to us after all."""
        assert self._disk is not None
        with trio.move_on_after(_PATIENCE):
            await trio.to_thread.run_sync(
                self._disk.wait, flight.span.digest, abandon_on_cancel=True, limiter=self._waiters
            )
        blocks = await trio.to_thread.run_sync(self._stored, flight, limiter=self.decoders)
        if blocks is not None:
            self._land(flight, blocks)
        elif not flight.landed:
            async with self._ranges if why == "read" else self._ranges_ahead:
                await self._bring([flight], {}, why)

    # --- fetching and decoding

    async def _bring(self, group: list[Flight], claims: dict[int, Claim], why: str) -> None:
        """Fetch spans that lie together as one range, and decode them: those of one frame one after the other."""
        jobs: list[tuple[int, int, Callable[[memoryview], Awaitable[None]]]] = []
        async with AsyncExitStack() as stack:
            for flights in of_each_frame(group):
                if not flights[0].forward:
                    span = flights[0].span
                    jobs.append((span.start, span.end, partial(self._decode, flights[0], claims, why)))
                    continue
                # In ascending order, so that no two who take several wait for each other.
                frame = await stack.enter_async_context(self._frames.at(flights[0].layer, flights[0].number))
                missing = [flight for flight in flights if not flight.landed]
                if missing:
                    numbers, start, end = frame.next(missing[0].number, missing[-1].number, RANGE)
                    jobs.append((start, end, partial(self._decode_forward, frame, missing, numbers, claims, why)))
            if not jobs:
                return
            start = min(start for start, _, _ in jobs)
            view = memoryview(await self._fetch(group, start, max(end for _, end, _ in jobs), why))
            async with trio.open_nursery() as nursery:
                for first, end, decode_it in jobs:
                    nursery.start_soon(decode_it, view[first - start : end - start])

    async def _fetch(self, group: list[Flight], start: int, end: int, why: str) -> bytes:
        layer, began = group[0].layer, time.monotonic()
        if not 0 <= end - start <= MAX_FETCH:
            raise FormatError(f"the index is damaged: bytes {start} to {end} of layer {layer} are no range to fetch")
        data = await self._fetcher.fetch(layer, start, end)
        if len(data) != end - start:
            raise SourceError(f"{end - start} bytes of layer {layer} were asked for, {len(data)} came")
        self._counters.fetched(len(data), ahead=why != "read")
        self._journal.fetched(layer, group[0].number, group[-1].number, len(data), time.monotonic() - began, why)
        return data

    async def _decode(self, flight: Flight, claims: dict[int, Claim], why: str, data: memoryview) -> None:
        try:
            try:
                blocks = await self._decoded(flight, data)
            except IntegrityError as error:
                # The source sent something else. It may not do so twice, and another one may be better.
                self._distrust(flight.layer, flight.number, error)
                again = await self._fetch([flight], flight.span.start, flight.span.end, why)
                blocks = await self._decoded(flight, memoryview(again))
        except Exception as error:  # noqa: BLE001  raised again by everybody who waits
            self._end([flight], error)
            return
        self._land(flight, blocks)
        if flight.number in claims:
            await self.keeper.keep(claims.pop(flight.number), blocks)

    def _distrust(self, layer: int, number: int, error: IntegrityError) -> None:
        self._counters.refetched()
        self._journal.refetched(layer, number, str(error))
        self._fetcher.distrust(layer, self._layers[layer].spans[number].start)

    async def _decoded(self, flight: Flight, data: memoryview) -> list[bytes]:
        codec = self._layers[flight.layer].codec
        blocks = await trio.to_thread.run_sync(_decode, codec, flight.span, data, limiter=self.decoders)
        self._counters.decoded(flight.span.length)
        return blocks

    async def _decode_forward(
        self, frame: Frame, flights: list[Flight], numbers: range, claims: dict[int, Claim], why: str, data: memoryview
    ) -> None:
        """Spans of one frame, whose lock we have. Those that decoding passes on its way land too, or are kept.

        data: the bytes that the frame needs for spans `numbers`; what others need is fetched.
        """
        layer, last, distrusted = flights[0].layer, flights[-1].number, False
        try:
            while True:
                try:
                    found = await trio.to_thread.run_sync(frame.decode, data, numbers, limiter=self.decoders)
                except IntegrityError as error:
                    # As above; only that the frame has to be decoded from its beginning again.
                    if distrusted:
                        raise
                    distrusted = True
                    self._distrust(layer, numbers.start, error)
                else:
                    for number, blocks in found:
                        self._counters.decoded(sum(map(len, blocks)))
                        await self._passed(layer, number, blocks, claims.pop(number, None))
                missing = [flight for flight in flights if not flight.landed]
                if not missing:
                    return
                numbers, start, end = frame.next(missing[0].number, last, RANGE)
                data = memoryview(await self._fetch(missing, start, end, why))
        except Exception as error:  # noqa: BLE001  raised again by everybody who waits
            self._end(flights, error)

    async def _passed(self, layer: int, number: int, blocks: list[bytes], claim: Claim | None) -> None:
        flight = self._flights.get((layer, number))
        if flight is not None:
            self._land(flight, blocks)
        else:
            self._remember(layer, number, blocks)
        if claim is not None:
            await self.keeper.keep(claim, blocks)
        elif self._disk is not None:
            await self.keeper.keep_unclaimed(self._disk, self._layers[layer].spans.digest(number), blocks)

    # --- the end of a flight

    def _land(self, flight: Flight, blocks: list[bytes]) -> None:
        self._remember(flight.layer, flight.number, blocks)
        if self._flights.get((flight.layer, flight.number)) is flight:
            del self._flights[flight.layer, flight.number]
        flight.land(blocks)

    def _remember(self, layer: int, number: int, blocks: list[bytes]) -> None:
        for at, block in enumerate(blocks):
            self._memory.put((layer, number, at), block)

    def _end(self, group: Iterable[Flight], error: Exception) -> None:
        """Fail those that have not landed. Nothing is kept: whoever asks next tries again."""
        for flight in group:
            if self._flights.get((flight.layer, flight.number)) is flight:
                del self._flights[flight.layer, flight.number]
            flight.fail(error)


def _decode(codec: Codec, span: Span, data: memoryview) -> list[bytes]:
    return blocks_of(decode(codec, span, data))
