"""A cheaper trio for pyfuse3's own loop, which takes a turn of trio's and a change of tasks for every request.

pyfuse3 looks trio up in its module's namespace, so that asyncio can take its place; `install` puts a stand-in there.
It differs in two places only. A lock may be taken again by the task that let go of it, and is for another as soon as
that task steps aside. And who waits for a descriptor waits in the kernel, with trio's epoll beside it, when trio would
do nothing but wait for both. Every so often it waits as trio does, for others must get their turn. All else is trio
itself, whatever pyfuse3 asks for.
"""

from __future__ import annotations

import math
import select
import time
from types import TracebackType
from typing import Any

import pyfuse3
import trio

# Requests answered in a row before other tasks get their turn: a millisecond's worth. With 16, turns are a tenth.
_IN_A_ROW = 64

# What trio calls a wait without an end, in seconds.
_A_DAY = 86400


def install() -> bool:
    """Give pyfuse3 the stand-in. False if this version of it does not look for trio where it would be found."""
    if getattr(pyfuse3, "trio", None) is not trio:
        return False
    pyfuse3.trio = _Trio()  # type: ignore[attr-defined]
    return True


class _Watch(trio.abc.Instrument):
    """Sees trio's turns go by: knows whether the task that runs is the only one that can, and hands out locks."""

    def __init__(self) -> None:
        self._locks: list[_Lock] = []
        self._runnable = 0
        # Tasks that have run since trio looked for events. Until it first does, we know of none, and of no deadline.
        self._stepped = 2
        self._deadline = math.inf

    def lock(self) -> _Lock:
        if not self._locks:
            trio.lowlevel.add_instrument(self)
        self._locks.append(_Lock())
        return self._locks[-1]

    def before_io_wait(self, timeout: float) -> None:
        if timeout > 0:
            self._runnable = 0
        self._stepped = 0
        self._deadline = time.monotonic() + timeout if timeout < _A_DAY else math.inf

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        del task
        self._runnable += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        del task
        self._runnable -= 1
        self._stepped += 1

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        del task
        for lock in self._locks:
            lock.offer()

    def spare(self) -> int | None:
        """For how many milliseconds nobody but the task that asks has anything to do; None for as long as it likes.

        Other tasks may have set deadlines in this turn, so it must be the only one that ran; itself it may set none.
        """
        if self._runnable or self._stepped > 1:
            return 0
        if self._deadline == math.inf:
            return None
        return max(0, math.ceil((self._deadline - time.monotonic()) * 1000))


class _Lock:
    """A trio.Lock for ``async with`` that is not handed on: it is taken by who comes first."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._taken:
            await self._waiting.park()
        self._taken = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._taken = False

    def offer(self) -> None:
        """A task has stepped aside, and has the lock or has not: then the next one shall try."""
        if not self._taken and self._waiting:
            self._waiting.unpark()


class _LowLevel:
    def __init__(self, watch: _Watch) -> None:
        self._watch = watch
        self._polls: dict[int, select.poll] = {}
        self._blocking = False
        self._turns = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, descriptor: int) -> None:
        poll = self._polls.get(descriptor) or self._register(descriptor)
        self._turns += 1
        if self._turns % _IN_A_ROW:
            for ready, _ in poll.poll(self._watch.spare() if self._blocking else 0):
                if ready == descriptor:
                    return
        await trio.lowlevel.wait_readable(descriptor)

    def _register(self, descriptor: int) -> select.poll:
        poll = self._polls[descriptor] = select.poll()
        poll.register(descriptor, select.POLLIN)
        events = _events()
        self._blocking = events is not None
        if events is not None:
            poll.register(events, select.POLLIN)
        return poll


class _Trio:
    def __init__(self) -> None:
        watch = _Watch()
        self.lowlevel = _LowLevel(watch)
        self.Lock = watch.lock

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


def _events() -> int | None:
    """The descriptor of trio's epoll, readable when trio has something to do. None if this trio has it elsewhere."""
    try:
        descriptor: int = trio._core._run.GLOBAL_RUN_CONTEXT.runner.io_manager._epoll.fileno()  # type: ignore[attr-defined,unused-ignore]  # noqa: SLF001  it tells nobody
    except AttributeError:
        return None
    return descriptor
