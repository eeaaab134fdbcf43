"""Where ranges wait that nobody waits for yet: how many of them may be under way beside those that somebody does.

Each takes an answer's time, so a few at once leave a fast link idle where they are small; many at once take a slow link
from who waits. So there may always be a few, and more while all of them together take the link only a moment.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from clipfs.blocks.flight import RANGE
from clipfs.blocks.link import Link

# Ranges under way at once: always, and at most. Each holds its compressed and decoded bytes in memory.
_FEW, _MANY = 3, 16

# What more than a few may take the link, in seconds.
_SECONDS = 0.1


class Lane:
    """Belongs to one trio run. link: what is known of how fast they come."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._ranges = self._bytes = 0
        self._first = trio.Lock()
        self._left = trio.Event()

    @asynccontextmanager
    async def room(self, size: int) -> AsyncIterator[None]:
        """Room for a range of so many bytes, in the order in which it was asked for."""
        async with self._first:
            while not self._fits(size):
                self._left = trio.Event()
                await self._left.wait()
            self._ranges += 1
            self._bytes += size
        try:
            yield
        finally:
            self._ranges -= 1
            self._bytes -= size
            self._left.set()

    def _fits(self, size: int) -> bool:
        most = min(self._link.rate * _SECONDS, _FEW * RANGE)
        return self._ranges < _FEW or (self._ranges < _MANY and self._bytes + size <= most)
