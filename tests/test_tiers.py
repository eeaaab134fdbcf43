"""Reading through memory, disk and source: what is fetched how often, what is kept, and what goes ahead."""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import clipfs
from clipfs.blocks import flights, journal, trace
from clipfs.blocks.ahead import Streams
from clipfs.blocks.counters import Counters
from clipfs.blocks.disk import DiskCache
from clipfs.blocks.journal import Journal
from clipfs.blocks.reader import BlockReader, Tiers
from clipfs.errors import IntegrityError, SourceError, UsageError
from clipfs.format.index import Index
from tests.images import Compression, LayoutBuilder
from tests.tars import Tar

pytestmark = pytest.mark.usefixtures("near")

MB = 1 << 20
SECONDS = 30


def mixed(size: int) -> bytes:
    """Bytes that compress by half, and differ everywhere."""
    chance = random.Random(size)
    return b"".join(chance.randbytes(4000) + b"%08d" % at * 500 for at in range(-(-size // 8000)))[:size]


BIG = mixed(40 * MB)


class Source:
    """A fetcher over the layers' bytes. `before` is called with each range before it is answered."""

    def __init__(self, blobs: list[bytes]) -> None:
        self.blobs = blobs
        self.ranges: list[tuple[int, int, int]] = []
        self.distrusted = 0
        self.before: Callable[[int, int, int], object] = lambda *_: None
        self.spoil = 0  # how many answers are wrong

    async def fetch_into(self, layer: int, start: int, end: int, sink: Callable[[bytes], object]) -> None:
        sink(await self.fetch(layer, start, end))

    async def fetch(self, layer: int, start: int, end: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self.ranges.append((layer, start, end))
        self.before(layer, start, end)
        data = bytearray(self.blobs[layer][start:end])
        if self.spoil:
            self.spoil -= 1
            data[len(data) // 2] ^= 0x10
        return bytes(data)

    def distrust(self, layer: int, at: int | None = None) -> None:
        self.distrusted += 1

    @property
    def fetched(self) -> int:
        return sum(end - start for _, start, end in self.ranges)


def overlap(source: Source) -> int:
    """Bytes that were fetched more than once. Spans that begin or end inside a byte, or look ahead, share a few."""
    found, seen = 0, 0
    for _, start, end in sorted(source.ranges):
        found += max(0, min(seen, end) - start)
        seen = max(seen, end)
    return found


class Image:
    def __init__(self, directory: Path, compression: Compression) -> None:
        name = LayoutBuilder(directory).layer(Tar().member("big", BIG), compression).config().write()
        clipfs.build(name, directory / "x.clip")
        self.index = Index.open(directory / "x.clip")
        self.start = self.index.inode(self.index.resolve("big")).address
        self.blob = (directory / "blobs" / "sha256" / self.index.layers[0].digest.hex).read_bytes()

    def source(self) -> Source:
        return Source([self.blob])


CODECS: tuple[Compression, ...] = ("none", "gzip", "pigz", "multi-gzip", "zstd", "zstd-frames")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Compression], Image]]:
    made = {compression: Image(tmp_path_factory.mktemp(compression), compression) for compression in CODECS}
    yield lambda compression: made[compression]
    for each in made.values():
        each.index.close()


@asynccontextmanager
async def reading(
    image: Image, source: Source, *, memory: int = 64 * MB, disk: DiskCache | None = None, log: Path | None = None
) -> AsyncIterator[BlockReader]:
    with trio.fail_after(SECONDS):
        async with BlockReader(
            image.index, source, counters=Counters.private(), tiers=Tiers(memory, disk), journal=Journal(log)
        ) as reader:
            yield reader


@pytest.fixture
def disk(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "spans", 1 << 30)


class TestEveryCodec:
    @pytest.mark.parametrize("compression", CODECS)
    async def test_in_sequence_each_byte_is_fetched_once(
        self, images: Callable[[Compression], Image], compression: Compression, disk: DiskCache
    ) -> None:
        image = images(compression)
        source = image.source()
        async with reading(image, source, memory=8 * MB, disk=disk) as reader:
            for at in range(0, len(BIG), 128 << 10):
                length = min(128 << 10, len(BIG) - at)
                found = reader.try_read(image.start + at, length)
                if found is None:
                    found = await reader.read(image.start + at, length)
                assert found == BIG[at : at + length]
        assert source.fetched <= len(image.blob) + 32 * len(source.ranges)

    @pytest.mark.parametrize("compression", CODECS)
    @pytest.mark.parametrize("cached", [True, False])
    async def test_anywhere_in_any_order(
        self, images: Callable[[Compression], Image], compression: Compression, cached: bool, disk: DiskCache
    ) -> None:
        image, chance = images(compression), random.Random(7)
        async with reading(image, image.source(), memory=4 * MB, disk=disk if cached else None) as reader:

            async def some(count: int) -> None:
                for _ in range(count):
                    at = chance.randrange(len(BIG))
                    length = min(chance.choice((1, 4096, 100_000, 1 * MB)), len(BIG) - at)
                    assert await reader.read(image.start + at, length) == BIG[at : at + length]

            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(some, 10 if compression == "zstd" and not cached else 40)


class TestDisk:
    async def test_the_second_mount_fetches_nothing(
        self, images: Callable[[Compression], Image], disk: DiskCache
    ) -> None:
        image, sources = images("gzip"), [images("gzip").source() for _ in range(2)]
        for source in sources:
            async with reading(image, source, disk=disk) as reader:
                assert await reader.read(image.start + 5, 3 * MB) == BIG[5 : 3 * MB + 5]
                numbers = reader.counters.asdict()
        assert sources[0].ranges
        assert sources[1].ranges == []
        assert numbers["disk_blocks"] >= 24
        assert numbers["bytes_fetched"] == 0

    async def test_damage_on_the_disk_is_fetched_again(
        self, images: Callable[[Compression], Image], disk: DiskCache
    ) -> None:
        image = images("gzip")
        async with reading(image, image.source(), disk=disk) as reader:
            await reader.read(image.start, 100)
        for stored in disk.stored():
            data = bytearray(stored.path.read_bytes())
            data[len(data) // 2] ^= 1
            data[100] ^= 1
            stored.path.write_bytes(data)
        again = DiskCache(disk.directory, 1 << 30)
        source = image.source()
        async with reading(image, source, disk=again) as reader:
            assert await reader.read(image.start, 2 * MB) == BIG[: 2 * MB]
        assert source.ranges
        assert again.dropped >= 1
        assert all(again.has(bytes.fromhex(stored.digest)) for stored in again.stored())

    async def test_two_mounts_at_once_fetch_a_span_once(
        self, images: Callable[[Compression], Image], disk: DiskCache
    ) -> None:
        """Each with a cache object of its own, as two processes have."""
        image = images("gzip")
        sources = [image.source() for _ in range(2)]
        arrived = [trio.Event(), trio.Event()]

        async def mount(number: int) -> None:
            own = DiskCache(disk.directory, 1 << 30)
            sources[number].before = lambda *_: arrived[number].set()
            async with reading(image, sources[number], disk=own) as reader:
                assert await reader.read(image.start + 9 * MB, 1000) == BIG[9 * MB : 9 * MB + 1000]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount, 0)
            nursery.start_soon(mount, 1)
        assert len(sources[0].ranges) + len(sources[1].ranges) == 1

    async def test_when_the_first_one_fails_the_second_fetches(
        self, images: Callable[[Compression], Image], disk: DiskCache
    ) -> None:
        image = images("gzip")
        digest = image.index.layers[0].spans.digest(2)
        position, _ = image.index.layers[0].spans.bounds(2)
        claim = disk.claim(digest)
        assert claim is not None
        source = image.source()
        async with reading(image, source, disk=DiskCache(disk.directory, 1 << 30)) as reader:
            at = position - image.index.extents(image.start, 1)[0][2]

            async def read() -> None:
                assert await reader.read(image.start + at, 100) == BIG[at : at + 100]

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert source.ranges == []
                claim.release()
        assert len(source.ranges) == 1

    async def test_who_is_stopped_is_waited_for_once(
        self, images: Callable[[Compression], Image], disk: DiskCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And not for each of the spans that it was about to fetch."""
        monkeypatch.setattr(flights, "_PATIENCE", 1)
        image = images("gzip")
        spans = image.index.layers[0].spans
        claims = [disk.claim(spans.digest(number)) for number in range(len(spans))]
        async with reading(image, image.source(), disk=DiskCache(disk.directory, 1 << 30)) as reader:
            with trio.fail_after(8):
                assert await reader.read(image.start, 4 * MB) == BIG[: 4 * MB]
        for claim in claims:
            assert claim is not None
            claim.release()


class TestWrongBytes:
    async def test_once_is_forgiven(self, images: Callable[[Compression], Image]) -> None:
        image = images("gzip")
        source = image.source()
        source.spoil = 1
        async with reading(image, source) as reader:
            assert await reader.read(image.start, 1000) == BIG[:1000]
            assert reader.counters.asdict()["spans_refetched"] == 1
        assert source.distrusted == 1
        assert len(source.ranges) == 2

    @pytest.mark.parametrize("compression", CODECS)
    async def test_twice_is_an_error_and_nothing_is_kept(
        self, images: Callable[[Compression], Image], compression: Compression, disk: DiskCache
    ) -> None:
        image = images(compression)
        source = image.source()
        source.spoil = 2
        async with reading(image, source, disk=disk) as reader:
            with pytest.raises(IntegrityError):
                await reader.read(image.start, 1000)
            assert list(disk.stored()) == []
            assert await reader.read(image.start, 1000) == BIG[:1000]

    async def test_a_source_that_is_away(self, images: Callable[[Compression], Image], disk: DiskCache) -> None:
        image = images("gzip")
        source = image.source()

        def away(*_: int) -> None:
            raise SourceError("the registry is away")

        async with reading(image, source, disk=disk) as reader:
            assert await reader.read(image.start, 10) == BIG[:10]
            source.before = away
            with pytest.raises(SourceError, match="is away"):
                await reader.read(image.start + 30 * MB, 10)
            assert await reader.read(image.start + 1000, 10) == BIG[1000:1010], "what is here is still served"


class TestAhead:
    def follow(self, *reads: tuple[int, int], largest: int = 16 * MB) -> list[tuple[int, int]]:
        streams = Streams(largest)
        return [wanted for read in reads if (wanted := streams.note(*read)) is not None]

    def test_whoever_jumps_about_is_left_alone(self) -> None:
        chance = random.Random(3)
        assert self.follow(*((chance.randrange(1 << 40), 4096) for _ in range(1000))) == []

    def test_a_sequence_is_followed_further_and_further(self) -> None:
        wanted = self.follow(*((at, 128 << 10) for at in range(0, 40 * MB, 128 << 10)))
        assert wanted[0] == (MB, 2 * MB)
        assert all(start == before for (start, _), (_, before) in zip(wanted[1:], wanted, strict=False))
        assert max(end - start for start, end in wanted) >= 8 * MB
        assert wanted[-1][1] <= 40 * MB + 16 * MB

    def test_two_at_once(self) -> None:
        one = [(at, 128 << 10) for at in range(0, 4 * MB, 128 << 10)]
        two = [(at + (1 << 30), 128 << 10) for at, _ in one]
        wanted = self.follow(*(each for pair in zip(one, two, strict=True) for each in pair))
        assert [start for start, _ in wanted if start < 1 << 30]
        assert [start for start, _ in wanted if start >= 1 << 30]

    def test_who_shares_the_memory_takes_half(self) -> None:
        step = 128 << 10
        one = [(at, step) for at in range(0, 40 * MB, step)]
        assert max(end - at for at, end in self.gaps(one)) == 16 * MB
        pairs = [each for at, _ in one for each in ((at, step), (at + (1 << 30), step))]
        assert max(end - at for at, end in self.gaps(pairs)) == 8 * MB + step

    def gaps(self, reads: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Where each read ends that has something read ahead, and up to where."""
        streams = Streams(16 * MB)
        return [(at + length, wanted[1]) for at, length in reads if (wanted := streams.note(at, length)) is not None]

    def test_small_files_one_after_the_other(self) -> None:
        assert self.follow(*((at << 12, 700) for at in range(3000))) != []

    def test_none_at_all(self) -> None:
        assert self.follow(*((at, 128 << 10) for at in range(0, 40 * MB, 128 << 10)), largest=0) == []

    async def test_a_reader_that_goes_on_finds_it_in_memory(self, images: Callable[[Compression], Image]) -> None:
        image = images("gzip")
        source = image.source()
        async with reading(image, source) as reader:
            for at in range(0, 6 * MB, 128 << 10):
                reader.try_read(image.start + at, 128 << 10)
                await reader.read(image.start + at, 128 << 10)
            while not reader.counters.asdict()["bytes_ahead"]:
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert await reader.read(image.start + 9 * MB, 4096) == BIG[9 * MB : 9 * MB + 4096]
        assert overlap(source) < 32 * len(source.ranges), "it was here, or on its way"


class TestPrefetch:
    async def test_everything(self, images: Callable[[Compression], Image], disk: DiskCache) -> None:
        image = images("gzip")
        source = image.source()
        async with reading(image, source, disk=disk) as reader:
            spans = trace.everything(image.index.layers)
            await reader.prefetch(spans, "all", 1)
            assert source.fetched <= len(image.blob) + 32 * len(source.ranges), "each byte once"
            source.ranges.clear()
            await reader.read(image.start + 20 * MB, MB)
            await reader.prefetch(spans, "all", 1)
        assert source.ranges == []
        assert all(disk.has(image.index.layers[layer].spans.digest(number)) for layer, number in spans)

    async def test_errors_are_for_those_who_read(self, images: Callable[[Compression], Image]) -> None:
        image = images("gzip")
        source = image.source()

        def away(*_: int) -> None:
            raise SourceError("the registry is away")

        source.before = away
        async with reading(image, source) as reader:
            await reader.prefetch(trace.everything(image.index.layers), "all", 4)

    async def test_it_waits_for_those_who_wait(self, images: Callable[[Compression], Image]) -> None:
        image = images("gzip")
        source = image.source()
        gate = trio.Event()
        real = source.fetch

        async def slow(layer: int, start: int, end: int) -> bytes:
            data = await real(layer, start, end)
            await gate.wait()
            return data

        source.fetch = slow  # type: ignore[method-assign]
        async with reading(image, source) as reader, trio.open_nursery() as nursery:
            nursery.start_soon(reader.read, image.start, 10)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(reader.prefetch, trace.everything(image.index.layers), "all", 1)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(source.ranges) == 1
            gate.set()


class TestWarm:
    """What an earlier run needed is in memory before the next one asks, if it is on the disk."""

    async def test_the_first_of_it(self, images: Callable[[Compression], Image], disk: DiskCache) -> None:
        image = images("gzip")
        spans = trace.everything(image.index.layers)
        async with reading(image, image.source(), disk=disk) as reader:
            await reader.prefetch(spans, "all", 8)
        source = image.source()
        async with reading(image, source, disk=disk, memory=16 * MB) as reader:
            await reader.warm(spans)
            assert reader.try_read(image.start + MB, 4096) == BIG[MB : MB + 4096]
            assert reader.try_read(image.start + 6 * MB, MB) == BIG[6 * MB : 7 * MB]
            assert reader.try_read(image.start + 9 * MB, 4096) is None, "half of the memory is left"
            assert list(reader.wanted) == [(0, number) for number in sorted(number for _, number in reader.wanted)]
            assert len(reader.wanted) < len(spans) // 4, "nobody has wanted the rest"
        assert source.ranges == []

    async def test_not_for_who_reads_something_else(
        self, images: Callable[[Compression], Image], disk: DiskCache
    ) -> None:
        image = images("gzip")
        spans = trace.everything(image.index.layers)
        async with reading(image, image.source(), disk=disk) as reader:
            await reader.prefetch(spans, "all", 8)
        async with reading(image, image.source(), disk=disk) as reader:
            for at in range(40):
                await reader.read(image.start + 38 * MB - at * 64 * 1024, 10)
            await reader.warm(spans)
            assert reader.try_read(image.start, 10) is None

    async def test_nothing_is_fetched_for_it(self, images: Callable[[Compression], Image], disk: DiskCache) -> None:
        image = images("gzip")
        source = image.source()
        spans = trace.everything(image.index.layers)
        async with reading(image, source, disk=disk) as reader:
            await reader.warm(spans)
        async with reading(image, source) as reader:
            await reader.warm(spans)
        assert source.ranges == []


class TestTrace:
    def test_there_and_back(self, images: Callable[[Compression], Image], tmp_path: Path) -> None:
        layers = images("gzip").index.layers
        trace.save(tmp_path / "deep" / "x.trace", [(0, 3), (0, 1), (0, 3)])
        assert trace.load(tmp_path / "deep" / "x.trace", layers) == [(0, 3), (0, 1)]
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.trace"]

    def test_of_another_image(self, images: Callable[[Compression], Image], tmp_path: Path) -> None:
        trace.save(tmp_path / "x.trace", [(9, 0), (0, 10**6), (0, 0)])
        assert trace.load(tmp_path / "x.trace", images("gzip").index.layers) == [(0, 0)]

    @pytest.mark.parametrize(
        "text", ["", "hello", "clipfs trace 1\nx y", "clipfs trace 1\n-1 0", "clipfs trace 1\n" + "1" * 100 + " 1"]
    )
    def test_what_is_no_trace(self, images: Callable[[Compression], Image], tmp_path: Path, text: str) -> None:
        (tmp_path / "x.trace").write_text(text)
        with pytest.raises(UsageError, match="is no trace"):
            trace.load(tmp_path / "x.trace", images("gzip").index.layers)

    async def test_what_a_run_needed(self, images: Callable[[Compression], Image]) -> None:
        image = images("gzip")
        async with reading(image, image.source()) as reader:
            for at in (30, 10, 30, 20):
                await reader.read(image.start + at * MB, 10)
            numbers = [number for _, number in reader.wanted]
        assert numbers == [numbers[0], numbers[1], numbers[2]]
        assert numbers[1] < numbers[2] < numbers[0]


class TestJournal:
    async def test_what_is_written(self, images: Callable[[Compression], Image], tmp_path: Path) -> None:
        image = images("gzip")
        source = image.source()
        source.spoil = 1
        async with reading(image, source, log=tmp_path / "journal") as reader:
            await reader.read(image.start, 10)
        events = list(journal.read(tmp_path / "journal"))
        assert [event["event"] for event in events] == ["want", "fetch", "refetch", "fetch"]
        assert events[0]["address"] == image.start
        assert events[1]["bytes"] == events[3]["bytes"] == source.fetched // 2
        assert events[1]["why"] == "read"

    def test_half_a_line_and_nonsense_are_left_out(self, tmp_path: Path) -> None:
        good = json.dumps({"event": "want", "at": 0})
        (tmp_path / "journal").write_text(f"{good}\n[1]\n\x00\n{good}\n{good[:10]}")
        assert len(list(journal.read(tmp_path / "journal"))) == 2

    def test_a_full_disk_ends_it(self) -> None:
        with open("/dev/full", "wb") as full:
            log = Journal(Path(f"/proc/self/fd/{full.fileno()}"))
            log.wanted(0, 0, 0)
            log.wanted(0, 1, 0)
        log.close()


def test_descriptors_do_not_pile_up(images: Callable[[Compression], Image], tmp_path: Path) -> None:
    image = images("gzip")
    before = len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        async with reading(image, image.source(), disk=DiskCache(tmp_path, 1 << 30)) as reader:
            await reader.prefetch(trace.everything(image.index.layers), "all", 8)

    trio.run(main)
    assert len(os.listdir("/proc/self/fd")) <= before
