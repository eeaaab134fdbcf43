"""Reading blocks through memory from a source: hits, misses, who shares what, who is spared whose failure, bounds."""

from __future__ import annotations

import hashlib
import math
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from clipfs.blocks import frames, link
from clipfs.blocks.counters import Counters
from clipfs.blocks.disk import DiskCache
from clipfs.blocks.flight import RANGE
from clipfs.blocks.plan import BLOCK
from clipfs.blocks.reader import BlockReader, Tiers
from clipfs.errors import ClipfsError, FormatError, IntegrityError, SourceError
from clipfs.format.container import Codec, Span
from tests.images import Compression, compress
from tests.streams import KB, MB, mixed, noise, prose, scanned
from tests.views import FakeFetcher, FakeIndex, Spans, View, flipped, places, raising

pytestmark = pytest.mark.usefixtures("near")

SECONDS = 20
PLAIN = mixed(5 * MB)
GZIP = View.of(compress(PLAIN, "gzip"), Codec.GZIP, 4 * MB)
SPANS = len(GZIP.spans)


@pytest.fixture
def index() -> FakeIndex:
    return FakeIndex([GZIP])


@pytest.fixture
def fetcher(index: FakeIndex) -> FakeFetcher:
    return FakeFetcher(index)


def damaged_at_1() -> View:
    """A layer of ten spans of 1000 bytes, of which the second one's record cannot be read."""

    class Broken(Spans):
        def __getitem__(self, number):  # type: ignore[no-untyped-def]
            if number == 1:
                raise FormatError("the index is damaged: span 1")
            return super().__getitem__(number)

    layer = View.raw(noise(10_000), (1000,))
    layer.spans = Broken(layer.spans)
    return layer


@asynccontextmanager
async def reading(
    index: FakeIndex, fetcher: FakeFetcher, memory: int = 64 * MB, counters: Counters | None = None
) -> AsyncIterator[BlockReader]:
    with trio.fail_after(SECONDS):
        async with BlockReader(index, fetcher, counters=counters or Counters.private(), tiers=Tiers(memory)) as reader:
            yield reader


class TestReads:
    async def test_a_hit_needs_no_await(self, index: FakeIndex, fetcher: FakeFetcher) -> None:
        async with reading(index, fetcher) as reader:
            assert reader.try_read(1000, 100) is None
            assert await reader.read(1000, 100) == PLAIN[1000:1100]
            fetched, most = len(fetcher.ranges), GZIP.spans[0].length - 5
            assert most > 6 * BLOCK
            with trio.testing.assert_no_checkpoints():
                assert reader.try_read(1000, 100) == PLAIN[1000:1100]
                assert reader.try_read(BLOCK - 10, 20) == PLAIN[BLOCK - 10 : BLOCK + 10], "of two blocks"
                assert reader.try_read(5, most) == PLAIN[5 : 5 + most], "of many"
                assert reader.try_read(2 * MB, 1) is None
            assert len(fetcher.ranges) == fetched

    async def test_exactly_the_span_is_fetched(self, index: FakeIndex, fetcher: FakeFetcher) -> None:
        for number in (2, 0):
            span = GZIP.spans[number]
            async with reading(index, fetcher) as reader:
                await reader.read(span.position + span.length - 1, 1)
            assert fetcher.ranges.pop() == (0, span.start, span.end)
            assert not fetcher.ranges

    async def test_neighbours_are_fetched_as_one_range(self, index: FakeIndex, fetcher: FakeFetcher) -> None:
        async with reading(index, fetcher) as reader:
            assert await reader.read(0, len(PLAIN)) == PLAIN
        assert len(fetcher.ranges) == -(-len(GZIP.blob) // RANGE) < SPANS
        assert all(end - start <= RANGE for _, start, end in fetcher.ranges)
        assert reader.counters.asdict()["spans_decoded"] == SPANS

    async def test_frames_that_are_done_make_room_for_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the order in which they are read to their ends, nothing is fetched twice for want of room."""
        monkeypatch.setitem(frames._OPEN, Codec.GZIP, 2)
        blob = compress(PLAIN, "gzip")
        spans = Spans(scanned(blob, 512 * KB, Codec.GZIP, pieces=4)[1])
        layer = View(spans, Codec.GZIP, blob, PLAIN)
        several = sorted({spans.frame(at) for at in range(len(spans)) if len(spans.frame(at)) > 1}, key=lambda r: -r[0])
        assert len(several) > 3
        index = FakeIndex([layer])
        fetcher = FakeFetcher(index)
        async with reading(index, fetcher) as reader:
            kept = several.pop()
            await reader.read(spans[kept[0]].position, 10)
            for frame in several:
                first, last = spans[frame[0]], spans[frame[-1]]
                await reader.read(first.position, last.position + last.length - first.position)
            fetcher.ranges.clear()
            at = spans[kept[1]].position
            assert await reader.read(at, 10) == PLAIN[at : at + 10]
        assert fetcher.ranges == [(0, spans[kept[0]].end, spans[kept[1]].end)], "it is decoded on from where it was"

    @pytest.mark.parametrize("how", ["none", "gzip", "pigz", "multi-gzip", "zstd", "zstd-frames"])
    @pytest.mark.parametrize("memory", [0, MB, 64 * MB])
    async def test_many_extents_holes_and_the_end(self, how: Compression, memory: int) -> None:
        """A data space of small files, large ones and holes, in two layers, read at random by several at once."""
        codec = {"none": Codec.RAW, "zstd": Codec.ZSTD, "zstd-frames": Codec.ZSTD}.get(how, Codec.GZIP)
        plain = PLAIN[: 3 * MB]
        layer, other = View.of(compress(plain, how), codec, 128 * KB), View.raw(noise(MB), (100 * KB,))
        extents, at = [], 0
        for number, size in enumerate([1, 4095, 4096, 100, 300 * KB, 7, MB, 5000] * 3):
            which = (layer, other)[number % 2]
            offset = number * 37_001 % (len(which.plain) - min(size, 500 * KB))
            extents.append((at, number % 2, offset, min(size, 500 * KB)))
            at += -(-size // 4096) * 4096 + (8192 if number % 5 == 0 else 0)
        index = FakeIndex([layer, other], extents, data_size=at)

        async def some(seed: int) -> None:
            for address, length in places(at, 25, 400 * KB, seed):
                found = reader.try_read(address, length)
                assert (await reader.read(address, length) if found is None else found) == index.expected(
                    address, length
                )

        async with reading(index, FakeFetcher(index), memory) as reader, trio.open_nursery() as nursery:
            for seed in range(4):
                nursery.start_soon(some, seed)

    async def test_holes_and_what_lies_behind_the_end_are_zeros(self, fetcher: FakeFetcher) -> None:
        index = FakeIndex([GZIP], [(4096, 0, 0, 10)], data_size=8192)
        async with reading(index, fetcher) as reader:
            assert reader.try_read(0, 4096) == bytes(4096)
            assert reader.try_read(1 << 40, 100) == bytes(100)
            assert await reader.read(8000, 5000) == bytes(5000)
            assert not fetcher.ranges
            assert await reader.read(4090, 30) == bytes(6) + PLAIN[:10] + bytes(14)

    async def test_spans_of_a_byte(self) -> None:
        """They are allowed, and cost no more memory than is allowed."""
        index = FakeIndex([View.raw(noise(2000), (1,))])
        async with reading(index, FakeFetcher(index), 10_000) as reader:
            assert await reader.read(0, 2000) == index.layers[0].plain
            assert reader._cache.size <= 10_000

    async def test_plans_of_many_pieces_are_not_kept(self) -> None:
        """A file may be as sparse as its maker likes: a piece for every sixteenth byte."""
        index = FakeIndex([View.raw(noise(100))], data_size=1 << 30)
        calls = 0

        def extents(address: int, length: int) -> list[tuple[int, int, int, int]]:
            nonlocal calls
            calls += 1
            return [(at, 0, 0, 1) for at in range(address, address + length, 16)]

        index.extents = extents  # type: ignore[method-assign]
        async with reading(index, FakeFetcher(index)) as reader:
            await reader.read(0, 1)
            for region in range(40):
                assert reader.try_read(region * BLOCK, 1) is not None
            assert sum(len(pieces) for _, pieces in reader._plans.values()) < 100_000
            calls = 0
            assert reader.try_read(39 * BLOCK, 1) is not None
            assert calls == 0, "but the last one is"


class TestSharing:
    async def test_one_fetch_however_many_readers(self, index: FakeIndex, fetcher: FakeFetcher) -> None:
        fetcher.gate = trio.Event()
        found = []

        async def read(at: int) -> None:
            found.append(await reader.read(at, 100) == PLAIN[at : at + 100])

        async with reading(index, fetcher) as reader, trio.open_nursery() as nursery:
            for at in range(100):
                nursery.start_soon(read, at * (GZIP.spans[0].length // 101))
            await trio.testing.wait_all_tasks_blocked()
            fetcher.gate.set()
        assert found == [True] * 100
        assert len(fetcher.ranges) == 1
        assert reader.counters.asdict()["spans_decoded"] == 1

    async def test_the_first_is_cancelled_and_the_others_are_served(
        self, index: FakeIndex, fetcher: FakeFetcher
    ) -> None:
        fetcher.gate = trio.Event()
        found: list[bytes] = []

        async def first(scope: trio.CancelScope) -> None:
            with scope:
                await reader.read(0, 10)
                found.append(b"cancelled, and yet answered")

        async def other() -> None:
            found.append(await reader.read(20, 10))

        async with reading(index, fetcher) as reader, trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            nursery.start_soon(first, scope)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(other)
            nursery.start_soon(other)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            fetcher.gate.set()
        assert scope.cancelled_caught
        assert found == [PLAIN[20:30]] * 2
        assert len(fetcher.ranges) == 1

    async def test_all_are_cancelled_and_the_next_one_finds_it(self, index: FakeIndex, fetcher: FakeFetcher) -> None:
        fetcher.gate = trio.Event()
        async with reading(index, fetcher) as reader:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    for _ in range(5):
                        nursery.start_soon(reader.read, 0, 10)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            fetcher.gate.set()
            assert await reader.read(0, 10) == PLAIN[:10]
        assert len(fetcher.ranges) == 1

    @pytest.mark.parametrize("why", ["read", "ahead", "all"])
    async def test_what_came_after_it_was_looked_for_is_not_fetched_again(
        self, index: FakeIndex, fetcher: FakeFetcher, why: str
    ) -> None:
        async with reading(index, fetcher) as reader:
            await reader.read(0, 10)
            (flight,) = reader.flights.board({(0, 0): 10 if why == "read" else 0}, why)
            assert b"".join(await flight.blocks()) == PLAIN[: GZIP.spans[0].length]
        assert len(fetcher.ranges) == 1
        assert reader.counters.asdict()["spans_decoded"] == 1

    async def test_closing_does_not_leave_anybody_waiting(self, index: FakeIndex, fetcher: FakeFetcher) -> None:
        fetcher.gate = trio.Event()
        outcomes: list[str] = []

        async def read() -> None:
            try:
                await reader.read(0, 10)
            except ClipfsError as error:
                outcomes.append(str(error))

        async with trio.open_nursery() as nursery:
            async with reading(index, fetcher) as reader:
                nursery.start_soon(read)
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(read)
        assert [words.split(" ", 3)[:3] for words in outcomes] == [["the", "image", "was"], ["the", "image", "is"]]

    async def test_an_error_in_the_body_comes_out_as_it_is(self, index: FakeIndex, fetcher: FakeFetcher) -> None:
        fetcher.gate = trio.Event()

        async def body() -> None:
            async with reading(index, fetcher) as reader:
                with trio.move_on_after(0.01):
                    await reader.read(0, 1)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await body()


class TestFurther:
    """What lies behind a span that somebody waits for comes with it from far away, and keeps nobody waiting."""

    @pytest.fixture(autouse=True)
    def far(self, near: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """50 ms, and as much as the two next spans take."""
        room = GZIP.spans[2].end - GZIP.spans[0].end
        monkeypatch.setattr(link, "_FAR", -1)
        monkeypatch.setattr(link, "_SECONDS", math.inf)
        monkeypatch.setattr(link, "_MOST", room)

    @pytest.fixture
    async def reader(self, index: FakeIndex, fetcher: FakeFetcher) -> AsyncIterator[BlockReader]:
        async with reading(index, fetcher) as reader:
            reader.flights._carrier.link.note(MB, 0.05, 0.1)
            yield reader

    async def test_it_comes_in_the_same_range(self, reader: BlockReader, fetcher: FakeFetcher) -> None:
        assert await reader.read(0, 10) == PLAIN[:10]
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert fetcher.ranges == [(0, GZIP.spans[0].start, GZIP.spans[2].end)]
        at = GZIP.spans[2].position
        assert reader.try_read(at, 100) == PLAIN[at : at + 100]
        assert list(reader.wanted) == [(0, 0), (0, 2)]
        numbers = reader.counters.asdict()
        assert numbers["bytes_fetched"] == GZIP.spans[2].end - GZIP.spans[0].start
        assert numbers["bytes_ahead"] == GZIP.spans[2].end - GZIP.spans[0].end

    async def test_nobody_waits_for_it(
        self, reader: BlockReader, fetcher: FakeFetcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rest = trio.Event()

        async def slow(layer: int, start: int, end: int, sink: Callable[[bytes], object]) -> None:
            here = GZIP.spans[0].end
            sink(GZIP.blob[start:here])
            await rest.wait()
            sink(GZIP.blob[here:end])

        monkeypatch.setattr(fetcher, "fetch_into", slow)
        assert await reader.read(0, 10) == PLAIN[:10]
        at = GZIP.spans[1].position
        assert reader.try_read(at, 10) is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.read, at, 10)
            await trio.testing.wait_all_tasks_blocked(0.01)
            rest.set()
        assert reader.try_read(at, 10) == PLAIN[at : at + 10]

    async def test_its_failure_is_not_theirs(
        self, reader: BlockReader, fetcher: FakeFetcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def broken(layer: int, start: int, end: int, sink: Callable[[bytes], object]) -> None:
            sink(GZIP.blob[start : GZIP.spans[0].end + 5])
            raise SourceError("the registry is away")

        with monkeypatch.context() as patch:
            patch.setattr(fetcher, "fetch_into", broken)
            assert await reader.read(0, 10) == PLAIN[:10]
            await trio.testing.wait_all_tasks_blocked(0.01)
        at = GZIP.spans[1].position
        assert await reader.read(at, 10) == PLAIN[at : at + 10], "asked for again"

    async def test_what_is_here_or_coming_is_not_asked_for(self, reader: BlockReader, fetcher: FakeFetcher) -> None:
        at = GZIP.spans[2].position
        await reader.read(at, 10)
        await trio.testing.wait_all_tasks_blocked(0.01)
        fetcher.gate = trio.Event()
        fetcher.ranges.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.read, 0, 10)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(reader.read, GZIP.spans[1].position, 10)
            await trio.testing.wait_all_tasks_blocked()
            fetcher.gate.set()
        assert fetcher.ranges == [(0, GZIP.spans[0].start, GZIP.spans[1].end)]

    @pytest.mark.parametrize(("read", "seconds", "last"), [(0, 10, 0), (2 * BLOCK, 10, 2), (0, 0.06, 2)])
    async def test_a_large_file_that_nobody_has_read_is_left_out_where_it_is_dear(
        self, read: int, seconds: float, last: int
    ) -> None:
        """The file begins in the third block of the first span, and goes on to the end."""
        whole = len(PLAIN)
        index = FakeIndex([GZIP], [(0, 0, 0, 2 * BLOCK), (2 * BLOCK, 0, 2 * BLOCK, whole - 2 * BLOCK)])
        fetcher = FakeFetcher(index)
        async with reading(index, fetcher) as reader:
            reader.flights._carrier.link.note(MB, 0.05, seconds)
            await reader.read(read, 10)
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert fetcher.ranges == [(0, GZIP.spans[0].start, GZIP.spans[last].end)]

    async def test_however_many_small_files_it_has(self) -> None:
        """Spans of many small files belong together as those of one large file do."""
        step = BLOCK // 2
        index = FakeIndex([GZIP], [(at, 0, at, step) for at in range(0, len(PLAIN), step)])
        fetcher = FakeFetcher(index)
        async with reading(index, fetcher) as reader:
            reader.flights._carrier.link.note(MB, 0.05, 10)
            await reader.read(0, 10)
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert fetcher.ranges == [(0, GZIP.spans[0].start, GZIP.spans[2].end)]

    async def test_not_if_there_is_no_room_for_it(self, index: FakeIndex, fetcher: FakeFetcher) -> None:
        async with reading(index, fetcher, memory=8 * MB) as reader:
            reader.flights._carrier.link.note(MB, 0.05, 0.1)
            await reader.read(0, 10)
        assert fetcher.ranges == [(0, GZIP.spans[0].start, GZIP.spans[0].end)]

    async def test_a_damaged_index_behind_it_is_not_theirs(self, fetcher: FakeFetcher) -> None:
        layer = damaged_at_1()
        index = FakeIndex([layer])
        async with reading(index, FakeFetcher(index)) as reader:
            reader.flights._carrier.link.note(MB, 0.05, 0.1)
            assert await reader.read(0, 10) == layer.plain[:10]


class TestFailures:
    @pytest.mark.parametrize(
        ("changes", "error", "sentence"),
        [
            ([raising(SourceError("the registry is away"))], SourceError, "the registry is away"),
            ([flipped, flipped], IntegrityError, "do not decode"),
            ([lambda data: data[:-1]], SourceError, "were asked for"),
            ([lambda data: data + b"x"], SourceError, "were asked for"),
            ([lambda data: b""], SourceError, "0 came"),
            ([flipped, raising(SourceError("away too"))], SourceError, "away too"),
            ([raising(ValueError("a bug"))], ValueError, "a bug"),
        ],
    )
    async def test_everybody_is_told_nothing_is_kept_and_the_next_try_succeeds(
        self, index: FakeIndex, fetcher: FakeFetcher, changes: list[object], error: type[Exception], sentence: str
    ) -> None:
        fetcher.gate, fetcher.changes = trio.Event(), list(changes)  # type: ignore[arg-type]
        told: list[Exception] = []

        async def read(at: int) -> None:
            with pytest.raises(error, match=sentence) as caught:
                await reader.read(at, 10)
            told.append(caught.value)

        async with reading(index, fetcher) as reader:
            async with trio.open_nursery() as nursery:
                for at in range(4):
                    nursery.start_soon(read, at)
                await trio.testing.wait_all_tasks_blocked()
                fetcher.gate.set()
            assert len(told) == len({id(each) for each in told}) == 4, "each has an error of its own"
            assert reader.try_read(0, 10) is None
            assert len(reader._cache) == 0
            assert await reader.read(0, 10) == PLAIN[:10]
        numbers = reader.counters.asdict()
        assert numbers["requests"] == numbers["misses"] == 1

    async def test_one_bad_span_of_a_range_is_no_fault_of_its_neighbours(
        self, index: FakeIndex, fetcher: FakeFetcher
    ) -> None:
        span = GZIP.spans[1]
        middle = (span.start + span.end) // 2
        fetcher.changes = [lambda data: data[:middle] + bytes(9) + data[middle + 9 :], flipped]
        async with reading(index, fetcher) as reader:
            with pytest.raises(IntegrityError, match=f"bytes {span.start} to {span.end}"):
                await reader.read(0, 3 * MB)
            assert reader.try_read(0, 10) == PLAIN[:10]
            assert await reader.read(0, 3 * MB) == PLAIN[: 3 * MB]
        assert fetcher.distrusted == [0]

    async def test_what_is_good_of_a_frame_is_read_although_the_rest_is_not(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The link is far, so that more is fetched than was asked for, and all of it is here when it is decoded."""
        monkeypatch.setattr(link, "_FAR", -1)
        plain = prose(2 * MB)
        blob = compress(plain, "gzip")
        pieces = Spans(scanned(blob, 4 * MB, Codec.GZIP, 16)[1])
        assert pieces.frame(0) == range(len(pieces))
        bad = pieces[2].end - 20 * KB
        damaged = blob[:bad] + flipped(blob[bad : bad + 1]) + blob[bad + 1 :]
        index = FakeIndex([View(pieces, Codec.GZIP, damaged, plain)])
        fetcher = FakeFetcher(index)
        async with reading(index, fetcher) as reader:
            reader.flights._carrier.link.note(10 * MB, 0.02, 0.12)
            start = pieces[1].position
            assert await reader.read(start, 100) == plain[start : start + 100]
            with pytest.raises(IntegrityError, match="do not decode"):
                await reader.read(pieces[2].position, 100)
            assert fetcher.distrusted

    async def test_the_sender_of_the_wrong_bytes_is_blamed(self) -> None:
        """A frame is decoded as far as it is needed, and its bytes may be from several senders."""
        plain = prose(2 * MB)
        blob = compress(plain, "gzip")
        pieces = Spans(scanned(blob, 4 * MB, Codec.GZIP, 16)[1])
        index = FakeIndex([View(pieces, Codec.GZIP, blob, plain)])
        fetcher = FakeFetcher(index)
        async with reading(index, fetcher) as reader:
            await reader.read(0, 100)
            fetcher.changes = [flipped]
            start = pieces[3].position
            assert await reader.read(start, 100) == plain[start : start + 100]
        assert fetcher.distrusted_at == [pieces[0].end]

    async def test_spans_that_need_no_bytes_of_their_own_are_not_without_number(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An index of a megabyte may have 20,000 of them, all of one frame, and is sound by itself."""
        monkeypatch.setattr(link, "_FAR", -1)
        plain, one = bytes(4000), hashlib.sha256(b"\0").digest()
        blob = compress(plain, "gzip")
        spans = Spans(Span(0, len(blob), at, 1, one, 0, at) for at in range(len(plain)))
        index = FakeIndex([View(spans, Codec.GZIP, blob, plain)])
        fetcher = FakeFetcher(index)
        async with reading(index, fetcher) as reader:
            reader.flights._carrier.link.note(10 * MB, 0.02, 0.12)
            fetcher.gate = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader.read, 0, 1)
                await trio.testing.wait_all_tasks_blocked()
                assert len(reader.flights._flights) < 1000
                fetcher.gate.set()

    async def test_a_damaged_index_ends_one_read_and_nothing_else(self, index: FakeIndex, fetcher: FakeFetcher) -> None:
        """Also where it is read-ahead or prefetching that comes upon the damage: there nobody waits to be told."""
        index.damaged = range(3 * MB, 3 * MB + 10)
        async with reading(index, fetcher) as reader:
            for at in range(0, 2 * MB, 128 * KB):
                assert (reader.try_read(at, 128 * KB) or await reader.read(at, 128 * KB)) == PLAIN[at : at + 128 * KB]
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(FormatError):
                reader.try_read(3 * MB, 1)
            with pytest.raises(FormatError):
                await reader.read(3 * MB, 1)
            assert await reader.read(4 * MB, 10) == PLAIN[4 * MB : 4 * MB + 10]

    async def test_spans_that_cannot_be_read_do_not_end_warming(self, tmp_path: Path) -> None:
        index = FakeIndex([damaged_at_1()])
        tiers = Tiers(64 * MB, DiskCache(tmp_path, 1 << 30))
        async with BlockReader(index, FakeFetcher(index), counters=Counters.private(), tiers=tiers) as reader:
            await reader.warm([(0, number) for number in range(10)])

    async def test_spans_that_cannot_be_read_do_not_end_prefetching(self) -> None:
        layer = damaged_at_1()
        index = FakeIndex([layer])
        async with reading(index, FakeFetcher(index)) as reader:
            await reader.prefetch([(0, number) for number in range(10)], "all", 1)
            assert reader.try_read(9000, 10) == layer.plain[9000:9010]

    @pytest.mark.parametrize("end", [1 << 40, 0])
    async def test_no_more_is_fetched_than_may_be(self, end: int) -> None:
        layer = View.raw(noise(1000))
        layer.spans[0] = layer.spans[0].__class__(10, end, 0, 1000, bytes(32))
        index = FakeIndex([layer])
        fetcher = FakeFetcher(index)
        async with reading(index, fetcher) as reader:
            with pytest.raises(FormatError, match=f"bytes 10 to {end} of layer 0 are no range to fetch"):
                await reader.read(0, 1)
        assert not fetcher.ranges


class TestBounds:
    async def test_memory_is_bounded_under_churn(self, index: FakeIndex, fetcher: FakeFetcher) -> None:
        async with reading(index, fetcher, MB) as reader:
            for address, length in places(len(PLAIN), 60, 200 * KB):
                await reader.read(address, length)
                assert reader._cache.size <= MB
        assert len(fetcher.ranges) > SPANS, "what was let go of was fetched again"

    async def test_many_readers_at_once(self) -> None:
        """Fifty readers of other spans, two each: 200 MB pass, a fraction is there at a time."""
        unit = noise(MB)
        layer = View.raw(b"".join(bytes([number]) + unit[1:] for number in range(100)) * 2, (2 * MB,))
        index = FakeIndex([layer])

        async def read(number: int) -> None:
            at = (2 * number + 1) * 2 * MB - 10
            assert await reader.read(at, 20) == layer.plain[at : at + 20]

        tracemalloc.start()
        try:
            async with reading(index, FakeFetcher(index), 8 * MB) as reader, trio.open_nursery() as nursery:
                for number in range(50):
                    nursery.start_soon(read, number)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 100 * MB


class TestCounters:
    async def test_what_is_counted(self, index: FakeIndex, fetcher: FakeFetcher, tmp_path: Path) -> None:
        """And another process sees it, also after this one has closed the file."""
        counters = Counters.create(tmp_path / "counters")
        async with reading(index, fetcher, counters=counters) as reader:
            await reader.read(0, 1000)
            reader.try_read(500, 200)
            reader.try_read(0, BLOCK + 1)
            reader.try_read(4 * MB, 1)
            await reader.read(10, 5)
        expected = {
            "requests": 4,
            "hits": 2,
            "misses": 2,
            "bytes_served": 1000 + 200 + BLOCK + 1 + 5,
            "fetches": 1,
            "bytes_fetched": GZIP.spans[0].end - GZIP.spans[0].start,
            "spans_decoded": 1,
            "disk_blocks": 0,
            "spans_refetched": 0,
            "bytes_ahead": 0,
        }
        assert counters.asdict().items() >= expected.items()
        program = "import sys; from pathlib import Path; from clipfs.blocks.counters import Counters as C\n"
        program += "print(C.open(Path(sys.argv[1])).asdict())"
        for _ in range(2):
            command = [sys.executable, "-c", program, str(tmp_path / "counters")]
            shown = await trio.run_process(command, capture_stdout=True)
            assert f"'bytes_served': {expected['bytes_served']},".encode() in shown.stdout
            counters.close()

    async def test_what_came_before_the_link_broke_has_come(self, index: FakeIndex) -> None:
        come = GZIP.spans[2].start + 10

        class Breaking(FakeFetcher):
            async def fetch_into(self, layer: int, start: int, end: int, sink: Callable[[bytes], object]) -> None:
                sink((await self.fetch(layer, start, end))[: come - start])
                raise SourceError("the registry is away")

        async with reading(index, Breaking(index)) as reader:
            with pytest.raises(SourceError, match="away"):
                await reader.read(0, GZIP.spans[2].position + 1)
            assert reader.try_read(GZIP.spans[1].position, 10) is not None
        numbers = reader.counters.asdict()
        assert (numbers["spans_decoded"], numbers["fetches"]) == (2, 1)
        assert numbers["bytes_fetched"] == come - GZIP.spans[0].start
