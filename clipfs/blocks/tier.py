"""The disk cache below the memory of one reader: on the loop while it answers quickly, in threads otherwise.

This module owns where a read waits for the disk, and that a block is loaded once for all who want it meanwhile. What is
on the disk, and how, is `disk`'s affair.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import trio

from clipfs.blocks.cache import MemoryCache
from clipfs.blocks.counters import Counters
from clipfs.blocks.disk import DiskCache, WouldWaitError
from clipfs.blocks.keeper import Keeper
from clipfs.blocks.loader import Run
from clipfs.blocks.loads import Loads
from clipfs.blocks.plan import Key, LayerView, runs

# Blocks that are decompressed on the loop rather than in a thread: each takes 0.04 ms, a thread and back twice
# as much, and a read of 128 KiB that is not aligned has three.
_AT_ONCE = 3

# Threads that look on the disk at once. They wait more than they decompress: with 8, a large file comes a fifth faster
# than with one a core.
_THREADS = 8

# A disk that answers in less than this many seconds, on average of late, is waited for on the loop, for that reason.
# Each answer counts for a tenth of the average, so that a slow one sends the next dozen to threads.
_QUICK, _LATE = 0.0005, 0.1

# Who wants less in memory than this would not want another process there, which takes more.
_ROOM = 32 << 20

# After so many reads that waited for the disk, who starts this image does something else than earlier runs did.
_MANY = 32


class DiskTier:
    """Brings blocks of `layers` from `disk` into `memory`. keeper: has what is not on the disk yet."""

    def __init__(
        self, disk: DiskCache, layers: Sequence[LayerView], memory: MemoryCache, keeper: Keeper, counters: Counters
    ) -> None:
        self._disk, self._layers, self._memory = disk, layers, memory
        self._keeper, self._counters = keeper, counters
        self._loading: dict[Key, trio.Event] = {}
        self._seconds = math.inf  # that the disk takes to answer
        self._reads = 0
        self._threads = trio.CapacityLimiter(_THREADS)
        self._loads = Loads(disk.directory)

    def start(self, nursery: trio.Nursery | None) -> None:
        """Processes may be started in this nursery; None: no more."""
        self._loads.start(nursery)

    @property
    def busy(self) -> bool:
        """Have many reads waited for it?"""
        return self._reads >= _MANY

    def waited(self) -> None:
        """Somebody has waited for it."""
        self._reads += 1

    async def read(self, keys: Sequence[Key], blocks: dict[Key, bytes], *, ahead: bool = False) -> list[Key]:
        """Take what there is of these into `blocks` and into memory. Returns the keys of what there is not. ahead: of
        somebody who reads in sequence, and has not asked for them."""
        await self._loaded(keys)
        known = {key: block for key in keys if (block := self._memory.get(key) or self._unwritten(key)) is not None}
        blocks.update(known)
        rest = [key for key in keys if key not in known]
        if not rest:
            return rest
        # If others wait, too, threads are better: a disk can do several things at a time.
        quick = self._seconds < _QUICK and not self._loading
        try:
            if ahead or len(rest) > _AT_ONCE:
                raise WouldWaitError
            found = self._look_up(rest, wait=quick)
        except WouldWaitError:
            found = await self._load(rest, ahead)
        self._counters.from_disk(len(found))
        for key, block in found.items():
            self._memory.put(key, block)
        blocks.update(found)
        return [key for key in rest if key not in found]

    def _unwritten(self, key: Key) -> bytes | None:
        layer, number, at = key
        return self._keeper.unwritten(self._layers[layer].spans.digest(number), at)

    async def _loaded(self, keys: Sequence[Key]) -> None:
        """Wait for those blocks that somebody else is loading from the disk."""
        while events := {id(event): event for key in keys if (event := self._loading.get(key)) is not None}:
            for event in events.values():
                await event.wait()

    async def _load(self, keys: Sequence[Key], ahead: bool) -> dict[Key, bytes]:
        """In a thread or another process, what the disk has of these; who wants the same meanwhile waits."""
        done = trio.Event()
        self._loading.update(dict.fromkeys(keys, done))
        try:
            found, rest = await self._loaded_aside(keys) if ahead and self._loads.there else ({}, keys)
            if rest:
                here = await trio.to_thread.run_sync(self._look_up, rest, limiter=self._threads)
                if ahead and self._memory.limit >= _ROOM:
                    self._loads.did(len(here))
                found.update(here)
            return found
        finally:
            for key in keys:
                if self._loading.get(key) is done:
                    del self._loading[key]
            done.set()

    async def _loaded_aside(self, keys: Sequence[Key]) -> tuple[dict[Key, bytes], list[Key]]:
        """What another process has found of these, and the keys for which there is none that looks."""
        wanted = runs(keys)
        loaded = await self._loads.load(
            [Run(self._layers[layer].spans.digest(number), first, count) for layer, number, first, count in wanted]
        )
        found: dict[Key, bytes] = {}
        rest: list[Key] = []
        for (layer, number, first, count), blocks in zip(wanted, loaded, strict=True):
            if blocks is None:
                rest += [(layer, number, at) for at in range(first, first + count)]
            else:
                found.update({(layer, number, at): block for at, block in enumerate(blocks, first)})
        return found, rest

    def _look_up(self, keys: Sequence[Key], wait: bool = True) -> dict[Key, bytes]:
        """What the disk has of these. wait: else WouldWaitError, if it has to be waited for."""
        began = time.perf_counter()
        found = {}
        for layer, number, first, count in runs(keys):
            blocks = self._disk.read(self._layers[layer].spans.digest(number), first, count, wait=wait)
            found.update({(layer, number, at): block for at, block in enumerate(blocks, first)})
        if wait and len(keys) <= _AT_ONCE:
            seconds, average = time.perf_counter() - began, self._seconds
            self._seconds = seconds if math.isinf(average) else average + (seconds - average) * _LATE
        return found
