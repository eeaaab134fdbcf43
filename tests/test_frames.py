"""Spans of one frame: asked for while others are at it, decoded one user after the other, and left behind by nobody."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing

from clipfs.blocks import frames
from clipfs.blocks.counters import Counters
from clipfs.blocks.flight import RANGE
from clipfs.blocks.frames import Frame
from clipfs.blocks.reader import BlockReader
from clipfs.errors import SourceError
from clipfs.format.container import Codec
from tests.images import compress
from tests.streams import KB, MB, mixed, scanned
from tests.views import FakeFetcher, FakeIndex, Spans, View, raising

pytestmark = pytest.mark.usefixtures("near")

SECONDS = 20
PLAIN = mixed(8 * MB)
BLOB = compress(PLAIN, "zstd")
VIEW = View(Spans(scanned(BLOB, 128 * KB, Codec.ZSTD)[1]), Codec.ZSTD, BLOB, PLAIN)
SPANS = VIEW.spans


@pytest.fixture
def fetcher() -> FakeFetcher:
    """One that answers when its gate is opened."""
    assert SPANS.frame(0) == range(len(SPANS)), "one frame has all"
    fetcher = FakeFetcher(FakeIndex([VIEW]))
    fetcher.gate = trio.Event()
    return fetcher


@asynccontextmanager
async def reading(fetcher: FakeFetcher) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """What begins to read the first bytes of a span. When the block ends, answers come, and all have read them."""
    with trio.fail_after(SECONDS):
        async with (
            BlockReader(FakeIndex([VIEW]), fetcher, counters=Counters.private()) as reader,
            trio.open_nursery() as nursery,
        ):

            async def read(at: int) -> None:
                assert await reader.read(at, 10) == PLAIN[at : at + 10]

            async def begin(number: int) -> None:
                nursery.start_soon(read, SPANS[number].position)
                await trio.testing.wait_all_tasks_blocked()

            yield begin
            fetcher.gate.set()


async def test_what_goes_on_where_others_will_be_is_asked_for_at_once(fetcher: FakeFetcher) -> None:
    async with reading(fetcher) as begin:
        for number in (1, 2, 5):
            await begin(number)
        ends = [SPANS[number].end for number in (1, 2, 5)]
        assert fetcher.ranges == [(0, SPANS[0].start, ends[0]), (0, ends[0], ends[1]), (0, ends[1], ends[2])]
    assert len(fetcher.ranges) == 3, "and that is all that was needed"


async def test_what_others_may_bring_is_not(fetcher: FakeFetcher) -> None:
    async with reading(fetcher) as begin:
        for number in (3, 1, 4):
            await begin(number)
        assert fetcher.ranges == [(0, SPANS[0].start, SPANS[3].end), (0, SPANS[3].end, SPANS[4].end)]
    assert len(fetcher.ranges) == 2


async def test_if_others_fail_more_is_asked_for(fetcher: FakeFetcher) -> None:
    fetch, failed = fetcher.fetch, list[int]()

    async def fail_once(layer: int, start: int, end: int) -> bytes:
        data = await fetch(layer, start, end)
        if start == SPANS[0].start and not failed:
            failed.append(start)
            raise SourceError("away")
        return data

    fetcher.fetch = fail_once  # type: ignore[method-assign]
    with trio.fail_after(SECONDS):
        async with BlockReader(FakeIndex([VIEW]), fetcher, counters=Counters.private()) as reader:

            async def fail() -> None:
                with pytest.raises(SourceError, match="away"):
                    await reader.read(0, 10)

            async def read(number: int) -> None:
                at = SPANS[number].position
                assert await reader.read(at, 10) == PLAIN[at : at + 10]

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(read, 1)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(read, 2)
                await trio.testing.wait_all_tasks_blocked()
                assert len(fetcher.ranges) == 3
                fetcher.gate.set()
    assert fetcher.ranges[3:] == [(0, SPANS[0].start, SPANS[1].end)], "the third had what it needed"


async def test_nobody_waits_for_bytes_that_nobody_asked_for(fetcher: FakeFetcher) -> None:
    """The index is damaged: no byte is needed for a span, though some are for the one before it."""
    spans = Spans(SPANS)
    spans[1] = replace(spans[1], end=spans[1].start)
    assert spans[1].start == 0
    fetcher.changes.append(raising(SourceError("away")))
    with trio.fail_after(SECONDS):
        view = View(spans, Codec.ZSTD, BLOB, PLAIN)
        async with (
            BlockReader(FakeIndex([view]), fetcher, counters=Counters.private()) as reader,
            trio.open_nursery() as nursery,
        ):

            async def fail(number: int) -> None:
                with pytest.raises(SourceError):
                    await reader.read(spans[number].position, 10)

            for number in (3, 1):
                nursery.start_soon(fail, number)
                await trio.testing.wait_all_tasks_blocked()
            fetcher.gate.set()


async def test_turns_come_in_the_order_in_which_they_were_booked() -> None:
    frame, order = Frame(Codec.ZSTD, SPANS, SPANS.frame(0)), []
    first, second, third = (frame.book(at, at, RANGE, lambda: None) for at in (0, 1, 2))

    async def take(number: int, turn: frames.Turn) -> None:
        assert await turn.come() is frame
        order.append(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, 3, third)
        await trio.testing.wait_all_tasks_blocked()
        second.close()  # it will not come, and the first is still at it
        nursery.start_soon(take, 1, first)
        await trio.testing.wait_all_tasks_blocked()
        assert order == [1]
        first.close()
    assert order == [1, 3]
    third.close()
    assert frame.book(0, 0, RANGE, lambda: None).extent == (SPANS[0].start, SPANS[0].end)


async def test_one_that_was_closed_before_it_came_leaves_the_frame_to_who_is_at_it() -> None:
    """As where the index is damaged behind: two who decode at once would spoil what they share."""
    frame = Frame(Codec.ZSTD, SPANS, SPANS.frame(0))
    first, second = frame.book(0, 0, RANGE, lambda: None), frame.book(1, 1, RANGE, lambda: None)
    await first.come()
    second.close()
    third, come = frame.book(2, 2, RANGE, lambda: None), []

    async def take() -> None:
        come.append(await third.come())

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            await trio.testing.wait_all_tasks_blocked()
            assert not come
            first.close()
    third.close()


async def test_nobody_waits_for_much_more_than_he_wants(fetcher: FakeFetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 2 * MB
    monkeypatch.setattr(frames, "_AT_ONCE", most)
    decode, decoded = Frame.decode, []

    def counted(self: Frame, data: bytes, numbers: range) -> list[tuple[int, list[bytes]]]:
        decoded.append(numbers)
        return decode(self, data, numbers)

    monkeypatch.setattr(Frame, "decode", counted)
    async with reading(fetcher) as begin:
        await begin(len(SPANS) - 1)
    assert [number for numbers in decoded for number in numbers] == list(range(len(SPANS)))
    sizes = [sum(SPANS[number].length for number in numbers) for numbers in decoded]
    assert most / 2 < max(sizes) <= most, "several, if they are small"


async def test_frames_that_are_done_are_gone(fetcher: FakeFetcher) -> None:
    """A decoder is large: it does not wait for the garbage collector, which comes when it likes."""
    gc.collect()
    gc.disable()
    try:
        async with reading(fetcher) as begin:
            for number in (1, 0, len(SPANS) - 1):
                await begin(number)
            fetcher.gate.set()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not [each for each in gc.get_objects() if isinstance(each, (Frame, frames.Turn))]
    finally:
        gc.enable()
