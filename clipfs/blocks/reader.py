"""Reads of the data space: from memory at once, from the disk cache, or after fetching what is missing.

This module owns what a read needs and in which order it looks for it. It does not know files, nor where a layer comes
from: `flights` brings spans, an index says what they mean.

Everything between awaits happens at once, as trio has it, and that is relied upon: no other task can run between
looking for blocks and joining them.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Self

import trio

from clipfs.blocks.ahead import Streams
from clipfs.blocks.cache import MemoryCache
from clipfs.blocks.counters import Counters
from clipfs.blocks.disk import DiskCache
from clipfs.blocks.flight import Flight, SpanFetcher
from clipfs.blocks.flights import Flights
from clipfs.blocks.journal import Journal
from clipfs.blocks.plan import BLOCK, IndexView, Key, Piece, join, plan
from clipfs.blocks.prefetch import prefetch
from clipfs.blocks.tier import DiskTier
from clipfs.errors import ClipfsError

DEFAULT_MEMORY = 64 << 20

# Plans of one block's worth of addresses are remembered, up to this many pieces of 0.2 KB in all. A large file has one
# or two pieces a block and small files 16, but a sparse one may have as many as it has bytes.
_PIECES = 1 << 16
_SHIFT = BLOCK.bit_length() - 1

# Bytes that read-ahead goes ahead at most: a fast link is idle while who reads is served, unless it has enough to do.
# With 16 MiB a large file came a twelfth slower from the disk cache, and a twenty-fifth slower over 100 MB/s.
_LARGEST_WINDOW = 32 << 20

# Addresses that read-ahead looks at in one go: the plan of a MiB of small files is some 256 pieces.
_STEP = 2 << 20

# Of the memory, read-ahead of one reader may take half, a quarter if there are others: it must not push out what has
# not been read yet.
_SHARE_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Tiers:
    """Where blocks are kept. memory: bytes of decoded blocks. disk: shared with other mounts, None for none."""

    memory: int = DEFAULT_MEMORY
    disk: DiskCache | None = None


class BlockReader:
    """Reads the data space of `index`. An async context manager: what it fetches, it fetches in a nursery of its own,
    so that a reader that is cancelled takes nothing from the others."""

    def __init__(
        self,
        index: IndexView,
        fetcher: SpanFetcher,
        *,
        counters: Counters,
        tiers: Tiers | None = None,
        journal: Journal | None = None,
    ) -> None:
        tiers = tiers or Tiers()
        self.counters = counters
        self.journal = journal or Journal()
        self._index = index
        disk = tiers.disk if tiers.disk is not None and tiers.disk.limit else None
        self._cache = MemoryCache(tiers.memory)
        self.flights = Flights(index, fetcher, self._cache, disk, counters, self.journal)
        self._disk = DiskTier(disk, index.layers, self._cache, self.flights.keeper, counters) if disk else None
        self._plans: dict[int, tuple[list[int], list[Piece]]] = {}
        self._planned = 0  # pieces in them
        self._streams = Streams(min(_LARGEST_WINDOW, tiers.memory // _SHARE_AHEAD))
        # The block of the last hit: the addresses [start, stop) of its piece, its bytes, and where in them start is.
        self._latest = (0, 0, b"", 0)
        #: The spans that readers needed, in the order in which they first did.
        self.wanted: dict[tuple[int, int], None] = {}
        self._manager = trio.open_nursery()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        self._nursery = await self._manager.__aenter__()
        self._start(self._nursery)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        nursery, self._nursery = self._nursery, None
        self._start(None)
        if nursery is not None:
            nursery.cancel_scope.cancel()
            await self._manager.__aexit__(None, None, None)
        self.flights.close()
        self.journal.close()

    def _start(self, nursery: trio.Nursery | None) -> None:
        self.flights.start(nursery)
        if self._disk is not None:
            self._disk.start(nursery)

    def try_read(self, address: int, length: int) -> bytes | None:
        """The bytes if all of them are in memory.

        The hot path: most reads lie in one block, often that of the read before; any other is found with two
        dictionaries and one bisect. Counts hits only.
        """
        ahead = self._streams.note(address, length)
        if ahead is not None and self._nursery is not None:
            self._nursery.start_soon(self._read_ahead, *ahead)
        start, stop, block, inner = self._latest
        if start <= address and address + length <= stop:
            self.counters.hit(length)
            inner += address - start
            return block[inner : inner + length]
        found = self._plans.get(address >> _SHIFT) or self._remember(address >> _SHIFT)
        start, stop, key, inner = found[1][bisect_right(found[0], address) - 1]
        if key is not None and address + length <= stop:
            cached = self._cache.get(key)
            if cached is None:
                return None
            self._latest = start, stop, cached, inner
            self._note_all((key,), address, "memory")
            self.counters.hit(length)
            inner += address - start
            return cached[inner : inner + length]
        return self._try_join(self._pieces(address, length), address, length)

    async def read(self, address: int, length: int) -> bytes:
        """The bytes. Raises ClipfsError if they cannot be had, or are not those that the index demands."""
        pieces = self._pieces(address, length)
        blocks, missing = self._in_memory(pieces)
        self._note_all(blocks, address, "memory")
        tier = "memory"
        if missing and self._disk is not None:
            tier, found = "disk", len(blocks)
            missing = await self._disk.read(missing, blocks)
            self._note_all(islice(blocks, found, None), address, "disk")
        # Taken from the flights and not from the cache, which may be smaller than what is asked for.
        if missing:
            tier = "source"
            self._note_all(missing, address, "source")
            await self._fly(missing, blocks)
        self.counters.missed(length, tier=tier)
        if tier == "disk" and self._disk is not None:
            self._disk.waited()
        await trio.lowlevel.checkpoint_if_cancelled()
        return join(pieces, blocks)

    async def _fly(self, missing: list[Key], blocks: dict[Key, bytes]) -> None:
        """Bring the spans of these blocks, and put the blocks into `blocks`. Nothing else of a span is held on to while
        the next one is waited for: there may be many readers, and spans are large."""
        keys: dict[tuple[int, int], list[int]] = {}
        for layer, number, block in missing:
            keys.setdefault((layer, number), []).append(block)
        try:
            wanted = {span: (max(numbers) + 1) * BLOCK for span, numbers in keys.items()}
            flights = deque(self.flights.board(wanted))
            while flights:
                flight = flights.popleft()
                blocks.update(await _taken(flight, keys[flight.layer, flight.number]))
        except ClipfsError:
            self.counters.failed()
            raise

    def _pieces(self, address: int, length: int) -> list[Piece]:
        """As `plan` has it; from the plan that is remembered, as long as that reaches."""
        region, end = address >> _SHIFT, address + length
        if end > region + 1 << _SHIFT:
            return plan(self._index, address, length)
        starts, pieces = self._plans.get(region) or self._remember(region)
        found = pieces[bisect_right(starts, address) - 1 : bisect_left(starts, end)]
        start, _, key, inner = found[-1]
        found[-1] = Piece(start, end, key, inner)
        start, stop, key, inner = found[0]
        found[0] = Piece(address, stop, key, inner + address - start)
        return found

    def _remember(self, region: int) -> tuple[list[int], list[Piece]]:
        """The plan for addresses [region * BLOCK, (region + 1) * BLOCK), and where its pieces start."""
        pieces = plan(self._index, region * BLOCK, BLOCK)
        self._planned += len(pieces)
        if self._planned > _PIECES:
            self._plans.clear()
            self._planned = len(pieces)
        found = self._plans[region] = [piece.start for piece in pieces], pieces
        return found

    def _in_memory(self, pieces: Sequence[Piece]) -> tuple[dict[Key, bytes], list[Key]]:
        """The blocks of these pieces that are in memory, and the keys of the others."""
        blocks: dict[Key, bytes] = {}
        missing: dict[Key, None] = {}
        for piece in pieces:
            if piece.key is not None:
                block = self._cache.get(piece.key)
                if block is None:
                    missing[piece.key] = None
                else:
                    blocks[piece.key] = block
        return blocks, list(missing)

    def _try_join(self, pieces: list[Piece], address: int, length: int) -> bytes | None:
        blocks, missing = self._in_memory(pieces)
        if missing:
            return None
        self._note_all(blocks, address, "memory")
        self.counters.hit(length)
        return join(pieces, blocks)

    def _note_all(self, keys: Iterable[Key], address: int, tier: str) -> None:
        for layer, number, _ in keys:
            if (layer, number) not in self.wanted:
                self._note((layer, number), address, tier)

    def _note(self, span: tuple[int, int], address: int, tier: str) -> None:
        """A reader needs a span for the first time."""
        self.wanted[span] = None
        self.journal.wanted(*span, address, tier)

    # --- ahead of the reader

    async def _read_ahead(self, start: int, end: int) -> None:
        """Bring these addresses into memory. Errors are for those who will read there."""
        end = min(end, self._index.data_size)
        spans: dict[tuple[int, int], None] = {}

        async def step(at: int) -> None:
            with contextlib.suppress(ClipfsError):
                _, missing = self._in_memory(plan(self._index, at, min(_STEP, end - at)))
                if missing and self._disk is not None:
                    missing = await self._disk.read(missing, {}, ahead=True)
                spans.update(dict.fromkeys((layer, number) for layer, number, _ in missing))

        async with trio.open_nursery() as nursery:
            for at in range(start, end, _STEP):
                nursery.start_soon(step, at)
        with contextlib.suppress(ClipfsError):  # the image is being closed, or its index is damaged
            self.flights.board(dict.fromkeys(sorted(spans), 0), "ahead")

    async def prefetch(self, spans: Sequence[tuple[int, int]], why: str, at_once: int) -> None:
        """Bring spans onto the disk, or into memory without one, in this order, `at_once` at a time or more. Those who
        wait for others come first; errors are for those who will read there."""
        await prefetch(self.flights, spans, why, at_once)

    async def warm(self, spans: Sequence[tuple[int, int]]) -> None:
        """Bring into memory what the disk has of the first of these spans, until that is half full, or many
        reads have had to wait for the disk: this time something else is read."""
        if self._disk is None:
            return
        room = self._cache.limit // 2
        with contextlib.suppress(ClipfsError):  # an index that is damaged is for those who will read there
            for layer, number in spans:
                _, length = self._index.layers[layer].spans.bounds(number)
                room -= length
                if room < 0 or self._disk.busy:
                    break
                await self._disk.read([(layer, number, at) for at in range(-(-length // BLOCK))], {})


async def _taken(flight: Flight, numbers: Sequence[int]) -> dict[Key, bytes]:
    """These blocks of a span, when it is here."""
    blocks = await flight.blocks()
    return {(flight.layer, flight.number, number): blocks[number] for number in numbers}
