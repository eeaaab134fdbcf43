"""Who may be on the link: a few always, many where they take it a moment only; and until when."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
import trio.testing

from clipfs.blocks import carrier
from clipfs.blocks.counters import Counters
from clipfs.blocks.disk import DiskCache
from clipfs.blocks.flight import RANGE
from clipfs.blocks.lane import Lane
from clipfs.blocks.link import Link
from clipfs.blocks.reader import BlockReader, Tiers
from clipfs.format.container import Codec
from tests.images import compress
from tests.streams import mixed
from tests.views import FakeFetcher, FakeIndex, View

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


async def test_whose_bytes_have_come_makes_room_for_the_next() -> None:
    """Yet what is unfinished stays bounded, and one that is finished makes room for one more."""
    narrow = lane(0)
    rooms = [narrow.room(RANGE) for _ in range(8)]
    assert [room.free.is_set() for room in rooms] == [True] * 3 + [False] * 5
    async with rooms[0]:
        rooms[0].arrived()
        assert [room.free.is_set() for room in rooms] == [True] * 4 + [False] * 4
        for room in rooms[1:]:
            room.arrived()
        assert [room.free.is_set() for room in rooms] == [True] * 4 + [False] * 4, "16 MiB"
    assert [room.free.is_set() for room in rooms] == [True] * 5 + [False] * 3


async def test_small_ones_that_are_unfinished_are_bounded_too() -> None:
    narrow = lane(1e12)
    rooms = [narrow.room(10 * KIB) for _ in range(30)]
    for room in rooms:
        room.arrived()
    assert sum(room.free.is_set() for room in rooms) == 16


async def test_the_order_is_that_of_asking_not_of_entering() -> None:
    narrow, order = lane(0), []
    rooms = [narrow.room(RANGE) for _ in range(6)]

    async def take(number: int) -> None:
        async with rooms[number]:
            order.append(number)
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for number in (5, 4, 3):
            nursery.start_soon(take, number)
            await trio.testing.wait_all_tasks_blocked()
        for number in (0, 1, 2):
            narrow.leave(rooms[number])
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert order == [3, 4, 5]


async def test_who_waits_for_others_has_more_room() -> None:
    assert await entered(Lane(Link(), 8), RANGE) == 8


class Crowd(FakeFetcher):
    """most: how many ranges were on the link at once."""

    coming = most = 0

    async def fetch(self, layer: int, start: int, end: int) -> bytes:
        self.coming += 1
        self.most = max(self.most, self.coming)
        await trio.sleep(0.01)
        self.coming -= 1
        return await super().fetch(layer, start, end)


async def test_a_range_that_others_have_the_middle_of_has_come_when_its_last_part_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part is asked for after the other: none may be on the link in the room that another range was given."""
    monkeypatch.setattr(Link, "note", lambda *_: None)
    view = View.raw(random.Random(6).randbytes(32 * 64 * KIB), [64 * KIB])
    fetcher, others = Crowd(FakeIndex([view])), DiskCache(tmp_path, 1 << 30)
    claims = [others.claim(view.spans.digest(number)) for number in range(1, 32, 4)]
    wanted = {(0, number): 0 for number in range(32) if number % 4 != 3}
    tiers = Tiers(disk=DiskCache(tmp_path, 1 << 30))
    with trio.fail_after(20):
        async with BlockReader(FakeIndex([view]), fetcher, counters=Counters.private(), tiers=tiers) as reader:
            flights = reader.flights.board(wanted, "ahead")
            for number in range(0, 32, 4):
                await flights[number // 4 * 3].blocks()
                await flights[number // 4 * 3 + 2].blocks()
            for claim in claims:
                assert claim is not None
                claim.release()
            for flight in flights:
                await flight.blocks()
    assert fetcher.most == 3


async def test_a_range_that_comes_bit_by_bit_has_come_when_all_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Link, "note", lambda *_: None)
    monkeypatch.setattr(carrier, "RANGE", 64 * KIB)
    view = View.of(compress(mixed(2048 * KIB), "zstd"), Codec.ZSTD, 64 * KIB)
    size, count = len(view.plain), 8
    index = FakeIndex([view] * count, [(layer * size, layer, 0, size) for layer in range(count)])
    fetcher = Crowd(index)
    with trio.fail_after(20):
        async with BlockReader(index, fetcher, counters=Counters.private()) as reader:
            last = len(view.spans) - 1
            for flight in reader.flights.board({(layer, last): 0 for layer in range(count)}, "ahead"):
                await flight.blocks()
    assert len(fetcher.ranges) > 3 * count
    assert fetcher.most == 3
