"""Bytes on their way: used when they are here, and whoever waits for more is told when that will not come."""

from __future__ import annotations

import math
import random
import tracemalloc
from itertools import pairwise

import pytest
import trio
import trio.testing

from clipfs.blocks import arrival as arrival_module
from clipfs.blocks.arrival import Arrival
from clipfs.blocks.link import Link
from clipfs.errors import SourceError


async def test_each_gets_what_it_waits_for_as_soon_as_that_is_here() -> None:
    arrival, got = Arrival(100, 110), []

    async def wait(start: int, end: int) -> None:
        got.append(bytes(await arrival.bytes(start, end)))

    async with trio.open_nursery() as nursery:
        for start, end in ((100, 110), (102, 104), (100, 104), (108, 110)):
            nursery.start_soon(wait, start, end)
        await trio.testing.wait_all_tasks_blocked()
        assert got == []
        arrival.add(b"012")
        await trio.testing.wait_all_tasks_blocked()
        assert got == []
        arrival.add(b"345")
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(got) == [b"0123", b"23"]
        arrival.add(b"6789")
    assert sorted(got) == [b"0123", b"0123456789", b"23", b"89"]
    assert arrival.come == arrival.end


async def test_what_has_come_stays_good_when_the_rest_fails() -> None:
    arrival, told = Arrival(0, 10), []

    async def wait() -> None:
        with pytest.raises(SourceError, match="away") as caught:
            await arrival.bytes(0, 10)
        told.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        arrival.add(b"01234")
        arrival.close(SourceError("the registry is away"))
    assert len({id(each) for each in told}) == 2, "each has an error of its own"
    assert bytes(await arrival.bytes(1, 5)) == b"1234"
    with pytest.raises(SourceError, match="away"):
        await arrival.bytes(4, 6)


@pytest.mark.parametrize("came", [b"", b"012345678"])
async def test_too_few(came: bytes) -> None:
    arrival = Arrival(7, 17)
    arrival.add(came)
    arrival.close()
    with pytest.raises(SourceError, match=f"10 bytes of a layer were asked for, {len(came)} came"):
        await arrival.bytes(7, 17)


def test_too_many() -> None:
    arrival = Arrival(7, 17)
    arrival.add(b"0123456789")
    with pytest.raises(SourceError, match="and more came"):
        arrival.add(b"x")


def test_it_knows_how_long_the_first_byte_took() -> None:
    arrival = Arrival(0, 10)
    assert math.isinf(arrival.delay)
    arrival.add(b"0")
    first = arrival.delay
    arrival.add(b"1")
    assert 0 <= first == arrival.delay < 10


class TestLink:
    def test_one_that_is_near_is_asked_again_instead(self) -> None:
        link = Link()
        assert link.further == 0
        link.note(1 << 20, 0.001, 0.011)
        assert link.further == 0

    @pytest.mark.parametrize(("rate", "further"), [(1e5, 7_000), (3e6, 210_000), (1e9, 1600 << 10)])
    def test_it_is_busy_for_a_while_and_not_with_too_much(self, rate: float, further: int) -> None:
        link = Link()
        link.note(150_000, 0.02, 0.02 + 150_000 / rate)
        assert link.further == pytest.approx(further, rel=0.01)

    def test_it_follows_what_it_sees(self) -> None:
        link = Link()
        link.note(1 << 20, 0.05, 0.05 + 0.01)
        for _ in range(30):
            link.note(150_000, 0.02, 0.02 + 0.05)
        assert link.rate == pytest.approx(3e6, rel=0.1)
        assert link.delay == pytest.approx(0.02, rel=0.1)
        for _ in range(30):
            link.note(150_000, 0.0002, 0.0005)
        assert link.further == 0

    def test_all_at_once(self) -> None:
        link = Link()
        link.note(1000, 0.02, 0.02)
        assert link.further == 1600 << 10


async def test_bytes_that_come_one_by_one_take_little_more_than_their_room() -> None:
    size = 100_000
    arrival, data = Arrival(0, size), random.Random(5).randbytes(size)
    tracemalloc.start()
    try:
        for at in range(0, size, 2):
            arrival.add(data[at : at + 2])
            arrival.add(b"")
        assert tracemalloc.get_traced_memory()[0] < 2 * size
    finally:
        tracemalloc.stop()
    assert bytes(await arrival.bytes(1, size - 1)) == data[1:-1]


async def test_any_part_of_what_came_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival_module, "_SMALL", 30)
    chance, data = random.Random(3), random.Random(4).randbytes(1000)
    for _ in range(50):
        cuts = sorted({0, 1000, *(chance.randrange(1, 1000) for _ in range(chance.randrange(20)))})
        arrival = Arrival(500, 1500)
        for start, stop in pairwise(cuts):
            arrival.add(data[start:stop])
            arrival.add(b"")
        for start, stop in [
            (0, 0),
            (1000, 1000),
            (0, 1000),
            *(sorted(chance.choices(range(1001), k=2)) for _ in range(20)),
        ]:
            assert bytes(await arrival.bytes(500 + start, 500 + stop)) == data[start:stop]
