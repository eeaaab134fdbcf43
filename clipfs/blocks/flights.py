"""Spans on their way from a source into memory and onto the disk: who fetches, who waits, what is kept.

A span is fetched once, however many tasks, mounts and processes want it. This module knows spans, not what they mean
and not who reads; `reader` does. Bytes reach anybody only through `codec`, which verifies them.

Everything between awaits happens at once, as trio has it, and that is relied upon: no other task can run between
looking a span up in `_flights` and putting it there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import trio

from clipfs.blocks.cache import MemoryCache
from clipfs.blocks.carrier import Carrier
from clipfs.blocks.counters import Counters
from clipfs.blocks.disk import Claim, DiskCache
from clipfs.blocks.flight import Flight, SpanFetcher, neighbours, together
from clipfs.blocks.journal import Journal
from clipfs.blocks.keeper import Keeper
from clipfs.blocks.lane import Lane, Room
from clipfs.blocks.plan import BLOCK, IndexView
from clipfs.errors import ClipfsError

# Ranges on the link at once for those who wait.
_RANGES = 8

# Without a cache on disk, what nobody has asked for is fetched only if memory has so many bytes to keep it in.
_ROOMY = 16 << 20

# What a span that nobody has asked for counts as at least, in compressed bytes: a damaged index may have any number of
# empty ones.
_LEAST = 4 << 10

# Seconds to wait for other processes that fetch the same spans. They may be slow, or stopped; then both fetch them.
_PATIENCE = 30


class Flights:
    """All spans under way of one image. `start` gives it the nursery that they fly in."""

    def __init__(
        self,
        index: IndexView,
        fetcher: SpanFetcher,
        memory: MemoryCache,
        disk: DiskCache | None,
        counters: Counters,
        journal: Journal,
    ) -> None:
        self._index, self._layers = index, index.layers
        self._memory, self._disk = memory, disk
        self._flights: dict[tuple[int, int], Flight] = {}
        # zstandard, isal and hashlib let go of the interpreter while they work.
        self._decoders = trio.CapacityLimiter(max(2, min(os.cpu_count() or 1, 4)))
        self.keeper = Keeper()
        self._carrier = Carrier(
            index.layers,
            fetcher,
            land=self._arrived,
            fail=self._end,
            keeper=self.keeper,
            disk=disk,
            decoders=self._decoders,
            counters=counters,
            journal=journal,
        )
        self._asked, self._ahead = Lane(self._carrier.link, _RANGES), Lane(self._carrier.link)
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

        return await trio.to_thread.run_sync(look, limiter=self._decoders)

    async def calm(self) -> None:
        """Return when nobody waits for a span."""
        await self._calm.wait()

    def board(self, spans: Mapping[tuple[int, int], int], why: str = "read") -> list[Flight]:
        """The flights that bring these spans: those under way, those that have come since they were looked for, and new
        ones for the rest.

        spans: each with how many of its first decoded bytes somebody waits for. why: ``read`` if somebody does, or else
        what they are fetched ahead for.
        """
        if self._nursery is None:
            raise ClipfsError("the image is being closed: nothing more is read from it")
        boarded, fresh = [], []
        for (layer, number), wanted in spans.items():
            flight = self._flights.get((layer, number))
            if flight is None:
                flight = self._flight(layer, number, wanted)
                blocks = self._remembered(flight)
                if blocks is None:
                    fresh.append(flight)
                else:
                    flight.land(blocks)
            boarded.append(flight)
        for flight in fresh:
            self._flights[flight.layer, flight.number] = flight
        for group in neighbours(fresh):
            # An index that is damaged behind what somebody wants is no fault of that.
            with contextlib.suppress(ClipfsError):
                group.extend(self._further(group))
            self._nursery.start_soon(self._fly, group, why, self._room(group, why))
        return boarded

    def _flight(self, layer: int, number: int, wanted: int = 0) -> Flight:
        forward = self._carrier.frames.serves(layer, number)
        return Flight(layer, number, self._layers[layer].spans[number], forward=forward, wanted=wanted)

    def _further(self, group: list[Flight]) -> Iterator[Flight]:
        """What lies behind spans that somebody waits for, as far as the link makes it worth while, or up to a span that
        is dear and all of a file which nobody has read. Nobody waits longer: spans are decoded as their bytes come."""
        last = group[-1]
        asked = last.span.position + last.wanted
        kept = self._disk is not None or self._memory.limit >= _ROOMY
        room = self._carrier.link.further if last.wanted and kept else 0
        for number in range(last.number + 1, len(self._layers[last.layer].spans)):
            flight = self._flight(last.layer, number)
            size = flight.span.end - max(last.span.end, flight.span.start)
            room -= max(size, _LEAST)
            if room < 0 or self._known(flight) or not together(group[0], last, flight):
                return
            if self._carrier.link.dear(size) and self._of_another_file(flight, asked):
                return
            self._flights[flight.layer, flight.number] = last = flight
            yield flight

    def _of_another_file(self, flight: Flight, asked: int) -> bool:
        """Is all of this span of one file, which begins behind the decoded byte up to which somebody has read?"""
        start, stop = flight.span.position, flight.span.position + flight.span.length
        file = self._index.extent(flight.layer, start)
        return asked <= file.start < stop <= file.stop

    def _known(self, flight: Flight) -> bool:
        """Is it on its way, in memory or on the disk?"""
        key = flight.layer, flight.number
        on_disk = self._disk is not None and self._disk.has(flight.span.digest)
        return key in self._flights or on_disk or self._memory.get((*key, 0)) is not None

    def _remembered(self, flight: Flight) -> list[bytes] | None:
        """All blocks of a span, if memory has them."""
        blocks = []
        for at in range(-(-flight.span.length // BLOCK)):
            block = self._memory.get((flight.layer, flight.number, at))
            if block is None:
                return None
            blocks.append(block)
        return blocks

    def _room(self, group: Sequence[Flight], why: str) -> Room:
        """Its turn to be under way, for a range that brings these spans."""
        lane = self._asked if why == "read" else self._ahead
        return lane.room(group[-1].span.end - group[0].span.start)

    async def _fly(self, group: list[Flight], why: str, room: Room) -> None:
        """Bring spans that lie together. Errors go to those who wait, and end nothing else."""
        if why == "read":
            self._urgent += 1
            if self._urgent == 1:
                self._calm = trio.Event()
        try:
            async with room:
                claims, others = self._claim(group)
                try:
                    await self._land_stored(group, claims)
                    mine = [flight for flight in group if flight.number not in others and not flight.landed]
                    # What others brought meanwhile may have left gaps.
                    for part in neighbours(mine):
                        await self._carrier.bring(part, claims, why, _arrival_of(group, room))
                finally:
                    for claim in claims.values():
                        claim.release()
            patience = trio.current_time() + _PATIENCE
            for flight in others.values():
                await self._await_other(flight, patience, why)
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
        """The claims on those spans that are ours to fetch, and the flights that others have begun.

        Not in a thread: each takes some microseconds, and a thread would wait as long for its turn in the interpreter.
        """
        claims: dict[int, Claim] = {}
        others: dict[int, Flight] = {}
        if self._disk is not None:
            for flight in group:
                claim = self._disk.claim(flight.span.digest)
                if claim is None:
                    others[flight.number] = flight
                else:
                    claims[flight.number] = claim
        return claims, others

    async def _land_stored(self, group: list[Flight], claims: dict[int, Claim]) -> None:
        """What has come onto the disk before we claimed it lands at once."""
        disk = self._disk
        stored = [each for each in group if disk and each.number in claims and disk.has(each.span.digest)]

        def load() -> None:
            for flight in stored:
                blocks = self._stored(flight)
                if blocks is not None:
                    trio.from_thread.run_sync(self._land, flight, blocks)

        if stored:
            await trio.to_thread.run_sync(load, limiter=self._decoders)

    def _stored(self, flight: Flight) -> list[bytes] | None:
        """In a thread: all blocks of a span, if the disk has them."""
        assert self._disk is not None
        return self._disk.read(flight.span.digest, 0, -(-flight.span.length // BLOCK)) or None

    async def _await_other(self, flight: Flight, patience: float, why: str) -> None:
        """Somebody else fetches the span: wait until they have, or it is up to us after all; at `patience` it is."""
        assert self._disk is not None
        with trio.move_on_at(patience):
            await trio.to_thread.run_sync(
                self._disk.wait, flight.span.digest, abandon_on_cancel=True, limiter=self._waiters
            )
        blocks = await trio.to_thread.run_sync(self._stored, flight, limiter=self._decoders)
        if blocks is not None:
            self._land(flight, blocks)
        elif not flight.landed:
            async with self._room([flight], why) as room:
                await self._carrier.bring([flight], {}, why, _arrival_of([flight], room))

    # --- the end of a flight

    def _land(self, flight: Flight, blocks: list[bytes]) -> None:
        self._remember(flight.layer, flight.number, blocks)
        if self._flights.get((flight.layer, flight.number)) is flight:
            del self._flights[flight.layer, flight.number]
        flight.land(blocks)

    def _arrived(self, layer: int, number: int, blocks: list[bytes]) -> None:
        """A span is here, whether somebody has asked for it or it was on the way."""
        flight = self._flights.get((layer, number))
        if flight is not None:
            self._land(flight, blocks)
        else:
            self._remember(layer, number, blocks)

    def _remember(self, layer: int, number: int, blocks: list[bytes]) -> None:
        for at, block in enumerate(blocks):
            self._memory.put((layer, number, at), block)

    def _end(self, group: Iterable[Flight], error: Exception) -> None:
        """Fail those that have not landed. Nothing is kept: whoever asks next tries again."""
        for flight in group:
            if self._flights.get((flight.layer, flight.number)) is flight:
                del self._flights[flight.layer, flight.number]
            flight.fail(error)


def _arrival_of(group: Sequence[Flight], room: Room) -> Callable[[int], None]:
    """Told up to where bytes are here: the group may come in parts, and has come with the last of them."""

    def arrived(upto: int) -> None:
        if upto >= group[-1].span.end:
            room.arrived()

    return arrived
