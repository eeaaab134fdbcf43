"""How much is fetched ahead at a time: as much as the link brings in a few round trips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import pytest
import trio
import trio.testing

from clipfs.blocks.flights import Flights
from clipfs.blocks.prefetch import Place, prefetch
from clipfs.errors import SourceError

PLACES = [(0, number) for number in range(400)]


class Link:
    """Stands for flights: a group takes a round trip, and its share of the rate. Notes groups."""

    def __init__(self, round_trip: float, spans_a_second: float) -> None:
        self.groups: list[list[Place]] = []
        self.fails: Exception | None = None
        self.busy = 0
        self.here: set[Place] = set()
        self._round_trip, self._rate = round_trip, spans_a_second

    async def absent(self, spans: Sequence[Place]) -> Sequence[Place]:
        return [span for span in spans if span not in self.here]

    async def calm(self) -> None:
        if self.busy:
            self.busy -= 1
            await trio.sleep(1)

    def board(self, spans: Mapping[Place, int], why: str) -> Sequence[Link]:
        assert why == "trace"
        self.groups.append(list(spans))
        return [self]

    async def blocks(self) -> None:
        await trio.sleep(self._round_trip + len(self.groups[-1]) / self._rate)
        if self.fails is not None:
            raise self.fails


async def sizes(link: Link) -> list[int]:
    await prefetch(cast("Flights", link), PLACES, "trace", 8)
    assert [place for group in link.groups for place in group] == PLACES, "each once, in order"
    return [len(group) for group in link.groups]


async def test_a_slow_link_gets_little_at_a_time(autojump_clock: trio.testing.MockClock) -> None:
    assert set(await sizes(Link(0.02, 20))) == {8}


async def test_a_fast_link_gets_more_and_more(autojump_clock: trio.testing.MockClock) -> None:
    assert (await sizes(Link(0.02, 10_000)))[:5] == [8, 16, 32, 64, 64]


async def test_it_settles_where_a_group_takes_a_few_round_trips(autojump_clock: trio.testing.MockClock) -> None:
    found = await sizes(Link(0.02, 300))
    assert set(found[2:-1]) == {32}


async def test_a_link_that_becomes_slow_gets_less(autojump_clock: trio.testing.MockClock) -> None:
    link = Link(0.02, 10_000)
    board = link.board

    def slower(spans: Mapping[Place, int], why: str) -> Sequence[Link]:
        if len(link.groups) == 4:
            link._rate = 50
        return board(spans, why)

    link.board = slower  # type: ignore[method-assign]
    assert (await sizes(link))[3:8] == [64, 64, 32, 16, 16]


@pytest.mark.parametrize(
    ("error", "said"), [(SourceError("the registry is away"), 0), (RuntimeError("nobody thought of that"), 1)]
)
async def test_errors_are_for_those_who_read(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, error: Exception, said: int
) -> None:
    """And a bug, however many spans meet it, is for the log too."""
    link = Link(0.2, 100)
    link.fails = error
    await sizes(link)
    assert [record.getMessage() for record in caplog.records] == ["a bug in clipfs, please report it"] * said
    assert caplog.text.count(f"{type(error).__name__}: {error}") == said


async def test_it_waits_for_those_who_wait(autojump_clock: trio.testing.MockClock) -> None:
    link, began = Link(0.2, 10_000), trio.current_time()
    link.busy = 10
    await sizes(link)
    assert trio.current_time() - began > 10


@pytest.mark.parametrize("here", [PLACES, PLACES[:200]])
async def test_what_is_here_is_not_fetched(autojump_clock: trio.testing.MockClock, here: list[Place]) -> None:
    link = Link(0.2, 10_000)
    link.here = set(here)
    await prefetch(cast("Flights", link), PLACES, "trace", 8)
    assert [place for group in link.groups for place in group] == PLACES[len(here) :]
    assert all(link.groups)
