"""Fetching what somebody will want: one group of spans after the other, each as large as the link is fast.

A group that comes at once leaves the link idle for most of the time that an answer takes; one that takes long keeps
those waiting who want something else meanwhile. This module decides how much to fetch; how, `flights` knows.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from types import TracebackType

import trio

from clipfs.blocks.flights import Flights
from clipfs.errors import ClipfsError

log = logging.getLogger(__name__)

# Seconds that a group should take: several round trips of usual length, and no more than who waits would notice.
_SHORT, _LONG = 0.1, 0.4

# Groups grow up to so many times what they are at first: 128 spans of a gzip layer are ten compressed megabytes.
_GROWTH = 8

# Spans that are looked for on the disk at a time: all of them may be there, and soon seen to be.
_LOOKED_AT = 512

#: A layer and the number of one of its spans.
Place = tuple[int, int]


async def prefetch(flights: Flights, spans: Sequence[Place], why: str, least: int) -> None:
    """Bring those spans that are not on the disk, in this order and `least` of them at a time or more. Those who wait
    for others come first; errors are for those who will read there."""
    count, forgiving = least, _Forgiving()
    for at in range(0, len(spans), _LOOKED_AT):
        missing = await flights.absent(spans[at : at + _LOOKED_AT])
        while missing:
            await flights.calm()
            group, missing = missing[:count], missing[count:]
            began = trio.current_time()
            with forgiving:
                for flight in flights.board(dict.fromkeys(sorted(group), 0), why):
                    with forgiving:
                        await flight.blocks()
            seconds = trio.current_time() - began
            if seconds < _SHORT:
                count = min(2 * count, _GROWTH * least)
            elif seconds > _LONG:
                count = max(count // 2, least)


class _Forgiving(contextlib.AbstractContextManager[None]):
    """What is raised in it ends nothing else. The log has the first that nobody raised on purpose: spans are many, and
    all of them may meet the same bug."""

    def __init__(self) -> None:
        self._told = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception) and not isinstance(error, ClipfsError) and not self._told:
            self._told = True
            log.error("a bug in clipfs, please report it", exc_info=error)
        return isinstance(error, Exception)
