"""A cheaper trio for pyfuse3's own loop, where a request costs two checkpoints and two calls of epoll_ctl.

pyfuse3 looks trio up in its module's namespace, so that asyncio can take its place; `install` puts a stand-in there.
It differs in two places only: waiting for a descriptor that is readable already returns at once, and a lock that is
free is taken at once. Every so often it waits like trio, for others must get their turn. All else is trio itself,
whatever pyfuse3 asks for.
"""

from __future__ import annotations

import select
from types import TracebackType
from typing import Any

import pyfuse3
import trio

# Requests answered in a row before other tasks get their turn: less than a millisecond's worth, and more gains nothing.
_IN_A_ROW = 16


def install() -> bool:
    """Give pyfuse3 the stand-in. False if this version of it does not look for trio where it would be found."""
    if getattr(pyfuse3, "trio", None) is not trio:
        return False
    pyfuse3.trio = _Trio()  # type: ignore[attr-defined]
    return True


class _Lock:
    """A trio.Lock for ``async with``, without checkpoints as long as nobody else holds it."""

    def __init__(self) -> None:
        self._lock = trio.Lock()

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


class _LowLevel:
    def __init__(self) -> None:
        self._polls: dict[int, select.poll] = {}
        self._turns = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, descriptor: int) -> None:
        poll = self._polls.get(descriptor)
        if poll is None:
            poll = self._polls[descriptor] = select.poll()
            poll.register(descriptor, select.POLLIN)
        self._turns += 1
        if self._turns % _IN_A_ROW and poll.poll(0):
            return
        await trio.lowlevel.wait_readable(descriptor)


class _Trio:
    Lock = _Lock

    def __init__(self) -> None:
        self.lowlevel = _LowLevel()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)
