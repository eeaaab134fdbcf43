"""Where ranges wait for their turn on the link: how many of them may be under way.

Each takes an answer's time, so a few at once leave a fast link idle where they are small; many at once take a slow link
from who waits. So there may always be a few, and more while all of them together take the link only a moment. One whose
bytes have come makes room for the next at once: the link is idle otherwise, while they are decoded and written.
"""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Self

import trio

from clipfs.blocks.flight import RANGE
from clipfs.blocks.link import Link

# Ranges on the link at once: always, and at most. Each holds its compressed and decoded bytes in memory.
_FEW, _MANY = 3, 16

# What more than a few may take the link, in seconds.
_SECONDS = 0.1

# Bytes of ranges that may be unfinished, if there are more than a few of them: whoever brings bytes faster than they
# are decoded and written must not fill the memory with them.
_UNFINISHED = 4 * RANGE


class Lane:
    """Belongs to one trio run. link: what is known of how fast they come. few: how many may always be on it."""

    def __init__(self, link: Link, few: int = _FEW) -> None:
        self._link, self._few = link, few
        self._waiting: deque[Room] = deque()
        self._coming: set[Room] = set()
        self._unfinished: set[Room] = set()

    def room(self, size: int) -> Room:
        """Room for a range of so many bytes, in the order in which it was asked for. It must be entered."""
        room = Room(self, size)
        self._waiting.append(room)
        self._look()
        return room

    def come(self, room: Room) -> None:
        """The bytes of that range are here, or will not come."""
        self._coming.discard(room)
        self._look()

    def leave(self, room: Room) -> None:
        """That range is finished, or not wanted any more."""
        if not room.free.is_set():
            self._waiting.remove(room)
        self._unfinished.discard(room)
        self.come(room)

    def _look(self) -> None:
        """Let those in for whom there is room."""
        while self._waiting and self._fits(self._waiting[0].size):
            room = self._waiting.popleft()
            self._coming.add(room)
            self._unfinished.add(room)
            room.free.set()

    def _fits(self, size: int) -> bool:
        if len(self._unfinished) < self._few:
            return True
        if len(self._unfinished) >= _MANY or _bytes(self._unfinished) + size > _UNFINISHED:
            return False
        most = min(self._link.rate * _SECONDS, _FEW * RANGE)
        return len(self._coming) < self._few or _bytes(self._coming) + size <= most


class Room:
    """Room for one range, as long as an ``async with`` lasts. free: set when there is."""

    def __init__(self, lane: Lane, size: int) -> None:
        self.size = size
        self.free = trio.Event()
        self._lane = lane

    def arrived(self) -> None:
        """All bytes are here, or will not come."""
        self._lane.come(self)

    async def __aenter__(self) -> Self:
        try:
            await self.free.wait()
        except BaseException:
            self._lane.leave(self)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lane.leave(self)


def _bytes(rooms: set[Room]) -> int:
    return sum(room.size for room in rooms)
