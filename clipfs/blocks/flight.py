"""One span under way, and which of them travel together. Who steers them is in `flights`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Protocol

import trio

from clipfs.format.container import Span

# Neighbouring spans are fetched as one range up to this many compressed bytes. A request costs a millisecond of CPU
# time, and the link is idle for a round trip. Over 100 MB/s, with two cores and no cache on disk, a large file came
# with 90 MB/s, and with 79 in ranges of 2 MiB.
RANGE = 4 << 20

# What may lie between neighbours: a gzip footer and the next member's header, with room for a name.
_GAP = 4 << 10


class SpanFetcher(Protocol):
    """Where compressed bytes come from."""

    async def fetch_into(self, layer: int, start: int, end: int, sink: Callable[[bytes], object]) -> None:
        """Give bytes [start, end) of the blob of layer number `layer` to `sink`, each piece when it comes, in order and
        once. ClipfsError if they cannot be had."""

    def distrust(self, layer: int, at: int | None = None) -> None:
        """What came of this layer, from the compressed byte `at` on, was wrong: take another way next time."""


class Flight:
    """A span under way. Everybody who needs it waits here; it ends with its blocks or with an error.

    forward: is it one of several of a frame? wanted: up to which decoded byte somebody waited for it when it was asked
    for; 0 if nobody did.
    """

    def __init__(self, layer: int, number: int, span: Span, *, forward: bool, wanted: int = 0) -> None:
        self.layer, self.number, self.span = layer, number, span
        self.forward, self.wanted = forward, wanted
        self._blocks: list[bytes] = []
        self._error: Exception | None = None
        self._landed = trio.Event()

    @property
    def landed(self) -> bool:
        return self._landed.is_set()

    def land(self, blocks: list[bytes]) -> None:
        if not self.landed:
            self._blocks = blocks
            self._landed.set()

    def fail(self, error: Exception) -> None:
        if not self.landed:
            self._error = error
            self._landed.set()

    async def blocks(self) -> list[bytes]:
        await self._landed.wait()
        if self._error is not None:
            # Each waiter raises its own copy: tracebacks of several tasks would pile up on one.
            raise copy.copy(self._error) from self._error
        return self._blocks


def neighbours(flights: list[Flight]) -> list[list[Flight]]:
    """The flights in groups that are fetched together."""
    groups: list[list[Flight]] = []
    for flight in flights:
        group = groups[-1] if groups else []
        if group and together(group[0], group[-1], flight):
            group.append(flight)
        else:
            groups.append([flight])
    return groups


def of_each_frame(group: list[Flight]) -> Iterator[list[Flight]]:
    """The flights of a group that are decoded together."""
    for _, flights in groupby(group, key=lambda flight: (flight.span.start, flight.span.position - flight.span.skip)):
        yield list(flights)


def together(first: Flight, last: Flight, flight: Flight) -> bool:
    """May a range that goes from one flight to another go on to a third?"""
    if last.layer != flight.layer or last.number >= flight.number:
        return False
    start, end = flight.span.start, flight.span.end
    if last.forward and flight.forward and last.span.start == start:
        return True
    # In the middle of another frame: what is needed depends on how far that has been decoded.
    if flight.span.skip:
        return False
    return first.span.start <= start <= last.span.end + _GAP and end - first.span.start <= RANGE
