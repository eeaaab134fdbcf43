"""Who may fetch ahead: a few always, many where they take the link a moment only."""

from __future__ import annotations

import pytest
import trio

from clipfs.blocks.flight import RANGE
from clipfs.blocks.lane import Lane
from clipfs.blocks.link import Link

KIB = 1 << 10


def lane(rate: float) -> Lane:
    """Over a link of so many bytes a second."""
    link = Link()
    link.rate = rate
    return Lane(link)


async def entered(lane: Lane, size: int) -> int:
    """For how many of thirty ranges of this size there is room; all leave at the end, also those that wait."""
    entered = 0

    async def enter() -> None:
        nonlocal entered
        async with lane.room(size):
            entered += 1
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(enter)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return entered


@pytest.mark.parametrize(
    ("rate", "size", "most"),
    [
        (0, 100 * KIB, 3),  # not known yet
        (3e6, 100 * KIB, 3),
        (3e6, 10 * KIB, 16),
        (100e6, 100 * KIB, 16),
        (100e6, 1000 * KIB, 9),
        (100e6, RANGE, 3),
        (1e12, RANGE, 3),
        (1e12, RANGE // 2, 6),
    ],
)
async def test_as_many_as_the_link_takes_in_a_moment(rate: float, size: int, most: int) -> None:
    assert await entered(lane(rate), size) == most


async def test_room_is_given_in_the_order_in_which_it_was_asked_for() -> None:
    narrow, order = lane(0), []

    async def take(number: int, leave: trio.Event) -> None:
        async with narrow.room(RANGE):
            order.append(number)
            await leave.wait()

    async with trio.open_nursery() as nursery:
        events = [trio.Event() for _ in range(6)]
        for number, event in enumerate(events):
            nursery.start_soon(take, number, event)
            await trio.testing.wait_all_tasks_blocked()
        for event in events:
            assert len(order) <= 3 + events.index(event)
            event.set()
            await trio.testing.wait_all_tasks_blocked()
    assert order == [0, 1, 2, 3, 4, 5]


async def test_room_comes_back_from_who_fails_or_is_cancelled() -> None:
    narrow = lane(0)
    for _ in range(10):
        with pytest.raises(ValueError, match="no"):
            async with narrow.room(RANGE):
                raise ValueError("no")
        with trio.move_on_after(0):
            async with narrow.room(RANGE):
                await trio.sleep_forever()
    assert await entered(narrow, RANGE) == 3
    with trio.CancelScope() as scope:
        async with narrow.room(RANGE), narrow.room(RANGE), narrow.room(RANGE):
            scope.cancel()
            async with narrow.room(RANGE):
                raise AssertionError("there is no room")
    assert await entered(narrow, RANGE) == 3
