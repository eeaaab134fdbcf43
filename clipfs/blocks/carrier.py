"""Spans brought: a range fetched, and each span in it decoded when its bytes are here, whatever else is to come.

Bytes reach anybody only through `codec`, which verifies them. Who waits for a span, and which are fetched together,
`flights` knows.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, aclosing
from functools import partial

import trio

from clipfs.blocks.arrival import Arrival
from clipfs.blocks.counters import Counters
from clipfs.blocks.disk import Claim, DiskCache
from clipfs.blocks.flight import RANGE, Flight, SpanFetcher, of_each_frame
from clipfs.blocks.frames import Frames, Turn
from clipfs.blocks.journal import Journal
from clipfs.blocks.keeper import Keeper
from clipfs.blocks.link import Link
from clipfs.blocks.plan import LayerView, blocks_of
from clipfs.compression.codec import MAX_FETCH, decode
from clipfs.errors import FormatError, IntegrityError
from clipfs.format.container import Codec, Span


class Carrier:
    """Brings spans of these layers.

    land: told of each that is here, also of those that decoding passes. fail: told of those that cannot be had. keeper:
    writes what was brought to `disk`. decoders: how many threads decode.
    """

    def __init__(
        self,
        layers: Sequence[LayerView],
        fetcher: SpanFetcher,
        *,
        land: Callable[[int, int, list[bytes]], None],
        fail: Callable[[Iterable[Flight], Exception], None],
        keeper: Keeper,
        disk: DiskCache | None,
        decoders: trio.CapacityLimiter,
        counters: Counters,
        journal: Journal,
    ) -> None:
        self._layers, self._fetcher = layers, fetcher
        self._land, self._fail = land, fail
        self._keeper, self._disk, self._decoders = keeper, disk, decoders
        self._counters, self._journal = counters, journal
        self.frames = Frames(layers)
        self.link = Link()

    async def bring(
        self, group: list[Flight], claims: dict[int, Claim], why: str, arrived: Callable[[int], None]
    ) -> None:
        """Fetch spans that lie together as one range, and decode them: those of one frame one after the other.

        What the spans need is asked for at once, though others may be at their frame; of a long frame more is when that
        is decoded. arrived: told when the bytes up to there are here, or will not come.
        """
        layer, extents = group[0].layer, list[tuple[int, int]]()
        jobs: list[Callable[[Arrival], Awaitable[None]]] = []
        with ExitStack() as turns:
            for flights in of_each_frame(group):
                first, last = flights[0], flights[-1]
                if first.forward:
                    turn = self.frames.book(layer, first.number, last.number, RANGE)
                    turns.callback(turn.close)
                    jobs.append(partial(self._decode_forward, turn, flights, claims, why))
                    if turn.extent:
                        extents.append(turn.extent)
                else:
                    jobs.append(partial(self._decode, first, claims, why))
                    extents.append((first.span.start, first.span.end))
            start, end = min((start for start, _ in extents), default=0), max((end for _, end in extents), default=0)
            arrival = _expected(layer, start, end)
            async with trio.open_nursery() as nursery:
                if extents:
                    nursery.start_soon(self._fetch, arrival, group, why, arrived)
                else:
                    arrival.close()  # an index that is damaged may say that it has what is needed
                for decode_it in jobs:
                    nursery.start_soon(decode_it, arrival)

    async def _fetch(
        self, arrival: Arrival, group: list[Flight], why: str, arrived: Callable[[int], None] = lambda _: None
    ) -> None:
        """Have these bytes come. An error is for those who wait for them; what came before it has been fetched."""
        layer, error = group[0].layer, None
        try:
            await self._fetcher.fetch_into(layer, arrival.start, arrival.end, arrival.add)
        except Exception as raised:  # noqa: BLE001  raised again by everybody who waits
            error = raised
        arrival.close(error)
        arrived(arrival.end)
        size, seconds = arrival.come - arrival.start, time.monotonic() - arrival.asked
        if error is None:
            self.link.note(size, min(arrival.delay, seconds), seconds)
        elif not size:
            return
        else:
            group = [flight for flight in group if flight.span.end <= arrival.come] or group[:1]
        wanted = max((flight.span.end for flight in group if flight.wanted), default=0)
        self._counters.fetched(size, ahead=min(size, max(0, arrival.come - wanted)))
        self._journal.fetched(layer, group[0].number, group[-1].number, size, seconds, why)

    async def _fetched(self, group: list[Flight], start: int, end: int, why: str) -> Arrival:
        """These bytes once more, or more of them, all here or failed."""
        arrival = _expected(group[0].layer, start, end)
        await self._fetch(arrival, group, why)
        return arrival

    async def _decode(self, flight: Flight, claims: dict[int, Claim], why: str, arrival: Arrival) -> None:
        try:
            try:
                blocks = await self._decoded(flight, arrival)
            except IntegrityError as error:
                # The source sent something else. It may not do so twice, and another one may be better.
                self._distrust(flight.layer, flight.number, flight.span.start, error)
                again = await self._fetched([flight], flight.span.start, flight.span.end, why)
                blocks = await self._decoded(flight, again)
        except Exception as error:  # noqa: BLE001  raised again by everybody who waits
            self._fail([flight], error)
            return
        self._land(flight.layer, flight.number, blocks)
        if flight.number in claims:
            await self._keeper.keep(claims.pop(flight.number), blocks)

    def _distrust(self, layer: int, number: int, start: int, error: IntegrityError) -> None:
        """A span was wrong, of which the bytes came that begin at `start`; a frame's may have come bit by bit."""
        self._counters.refetched()
        self._journal.refetched(layer, number, str(error))
        self._fetcher.distrust(layer, start)

    async def _decoded(self, flight: Flight, arrival: Arrival) -> list[bytes]:
        codec, span = self._layers[flight.layer].codec, flight.span
        data = await arrival.bytes(span.start, span.end)
        blocks = await trio.to_thread.run_sync(_decode, codec, span, data, limiter=self._decoders)
        self._counters.decoded(flight.span.length)
        return blocks

    async def _decode_forward(
        self, turn: Turn, flights: list[Flight], claims: dict[int, Claim], why: str, arrival: Arrival
    ) -> None:
        """Spans of one frame, when it is their turn. Those that decoding passes on its way land too, or are kept.

        What they need comes in `arrival`, unless those before them did not do what they had booked.
        """
        layer, used, distrusted = flights[0].layer, False, False
        try:
            frame = await turn.come()
            while missing := [flight for flight in flights if not flight.landed]:
                numbers, start, end = frame.next(missing[0].number, missing[-1].number, RANGE)
                if used or not arrival.start <= start <= end <= arrival.end:
                    arrival = await self._fetched(missing, start, end, why)
                used = True
                try:
                    async with aclosing(frame.parts(numbers, start, arrival, singly=distrusted)) as parts:
                        async for part, data in parts:
                            found = await trio.to_thread.run_sync(frame.decode, data, part, limiter=self._decoders)
                            for number, blocks in found:
                                self._counters.decoded(sum(map(len, blocks)))
                                await self._passed(layer, number, blocks, claims.pop(number, None))
                except IntegrityError as error:
                    # As above; only that the frame has to be decoded from its beginning again, and that what comes
                    # before a span which is wrong once more is good.
                    if distrusted:
                        raise
                    distrusted = True
                    self._distrust(layer, numbers.start, start, error)
        except Exception as error:  # noqa: BLE001  raised again by everybody who waits
            self._fail(flights, error)
        finally:
            turn.close()

    async def _passed(self, layer: int, number: int, blocks: list[bytes], claim: Claim | None) -> None:
        self._land(layer, number, blocks)
        if claim is not None:
            await self._keeper.keep(claim, blocks)
        elif self._disk is not None:
            await self._keeper.keep_unclaimed(self._disk, self._layers[layer].spans.digest(number), blocks)


def _expected(layer: int, start: int, end: int) -> Arrival:
    if not 0 <= end - start <= MAX_FETCH:
        raise FormatError(f"the index is damaged: bytes {start} to {end} of layer {layer} are no range to fetch")
    return Arrival(start, end)


def _decode(codec: Codec, span: Span, data: memoryview) -> list[bytes]:
    return blocks_of(decode(codec, span, data))
