"""The cache on disk: what it gives back, what it does about damage, full disks, other processes and sudden death."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from isal import isal_zlib

from clipfs.blocks import keeper, opened, store
from clipfs.blocks.disk import DiskCache, WouldWaitError
from clipfs.blocks.plan import BLOCK
from tests.conftest import require_root

SECONDS = 30
FORK = multiprocessing.get_context("fork")


def span(number: int, length: int = 3 * BLOCK + 17) -> tuple[bytes, list[bytes]]:
    """A span's digest and blocks; the first block compresses, the others do not."""
    data = bytes([number % 251]) * BLOCK + random.Random(number).randbytes(max(0, length - BLOCK))
    data = data[:length]
    return hashlib.sha256(data).digest(), [data[at : at + BLOCK] for at in range(0, length, BLOCK)]


def keep(cache: DiskCache, number: int, length: int = 3 * BLOCK + 17) -> tuple[bytes, list[bytes]]:
    digest, blocks = span(number, length)
    claim = cache.claim(digest)
    assert claim is not None
    claim.keep(blocks)
    return digest, blocks


def get(cache: DiskCache, digest: bytes, number: int, *, wait: bool = True) -> bytes | None:
    """One block, None if it is not here."""
    blocks = cache.read(digest, number, 1, wait=wait)
    return blocks[0] if blocks else None


def everything(cache: DiskCache, digest: bytes, count: int) -> list[bytes | None]:
    return [get(cache, digest, number) for number in range(count)]


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 1 << 30)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 << 20])
def test_what_is_kept_is_found(tmp_path: Path, length: int, compress: bool) -> None:
    cache = DiskCache(tmp_path, 1 << 30, compress=compress)
    digest, blocks = keep(cache, 1, length)
    assert everything(cache, digest, len(blocks)) == blocks
    assert everything(DiskCache(tmp_path, 1 << 30), digest, len(blocks)) == blocks
    assert get(cache, digest, len(blocks)) is None, "there is no such block"


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("wait", [True, False])
def test_several_blocks_in_one_call(tmp_path: Path, compress: bool, wait: bool) -> None:
    """Compressed ones and others next to each other, the short one at the end among them."""
    cache = DiskCache(tmp_path, 1 << 30, compress=compress)
    data = b"".join(random.Random(n).randbytes(BLOCK) if n % 3 else bytes([n]) * BLOCK for n in range(7)) + b"end" * 99
    digest, blocks = hashlib.sha256(data).digest(), [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    claim = cache.claim(digest)
    assert claim is not None
    claim.keep(blocks)
    assert get(cache, digest, 0) == blocks[0], "it is open"
    for first in range(len(blocks)):
        for stop in range(first + 1, len(blocks) + 1):
            assert cache.read(digest, first, stop - first, wait=wait) == blocks[first:stop]


def test_of_several_blocks_one_is_damaged_or_too_many(cache: DiskCache) -> None:
    for number, bad in ((1, 2), (2, 0)):
        digest, blocks = keep(cache, number)
        [stored] = [each for each in cache.stored() if each.digest == digest.hex()]
        data = bytearray(stored.path.read_bytes())
        data[-1 if bad else 100] ^= 1
        stored.path.write_bytes(data)
        assert cache.read(digest, bad, len(blocks) - bad) == []
        assert not stored.path.exists()
    digest, blocks = keep(cache, 3)
    assert cache.read(digest, 1, len(blocks)) == []


def test_what_is_not_kept_is_not_found(cache: DiskCache) -> None:
    assert get(cache, span(1)[0], 0) is None
    assert not cache.has(span(1)[0])


def test_compression_saves_space(tmp_path: Path) -> None:
    sizes = []
    for compress in (True, False):
        cache = DiskCache(tmp_path / str(compress), 1 << 30, compress=compress)
        keep(cache, 1, BLOCK)
        sizes += [stored.size for stored in cache.stored()]
    assert sizes[0] * 10 < sizes[1]


def test_without_waiting(cache: DiskCache) -> None:
    """The loop must not wait for a disk: what is not open, or not in memory, is for a thread."""
    digest, blocks = keep(cache, 1)
    with pytest.raises(WouldWaitError):
        get(cache, digest, 0, wait=False)
    assert get(cache, digest, 0) == blocks[0]
    assert get(cache, digest, 0, wait=False) == blocks[0]


def test_nobody_else_may_look_into_it(tmp_path: Path) -> None:
    """Of a private image, or of a file that only some may read. Whatever the umask is."""
    umask = os.umask(0)
    try:
        cache = DiskCache(tmp_path / "new" / "cache", 1 << 30)
        for _ in range(2):  # the second in a directory that is there
            cache.trim(0)
            keep(cache, 1)
    finally:
        os.umask(umask)
    found = [cache.directory, *cache.directory.rglob("*")]
    assert len(found) == 5, "the directory, one in it with a span, the total, the locks"
    assert [path for path in found if path.stat().st_mode & 0o077] == []


class TestOpenFiles:
    def test_no_more_than_a_share_of_the_limit_is_held(self, tmp_path: Path) -> None:
        """What others evict takes its room until it is closed here."""
        cache = DiskCache(tmp_path, 1 << 30)
        kept = [keep(cache, number, 100) for number in range(200)]
        small = DiskCache(tmp_path, 100 << 20)
        before = len(os.listdir("/proc/self/fd"))
        for digest, _ in kept:
            get(small, digest, 0)
        assert len(os.listdir("/proc/self/fd")) - before <= 16

    def test_nor_more_than_a_share_of_the_descriptors(self, tmp_path: Path) -> None:
        kept = [keep(DiskCache(tmp_path, 1 << 40), number, 100) for number in range(100)]
        before, limits = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 60, limits[1]))
        try:
            few = DiskCache(tmp_path, 1 << 40)
            assert all(get(few, digest, 0) == blocks[0] for digest, blocks in kept)
            assert 16 <= len(os.listdir("/proc/self/fd")) - before <= (before + 60) // 2
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    def test_after_a_while_it_is_looked_whether_a_file_is_still_there(
        self, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And noted that it is of use: others decide by that which go first."""
        now = [1000.0]
        monkeypatch.setattr(opened, "time", SimpleNamespace(monotonic=lambda: now[0]))
        digest, blocks = keep(cache, 1)
        [stored] = cache.stored()
        assert get(cache, digest, 0) == blocks[0]
        os.utime(stored.path, (1, 1))
        assert get(cache, digest, 0) == blocks[0]
        assert stored.path.stat().st_mtime == 1, "not at each use: that costs time"
        now[0] += 100
        assert get(cache, digest, 0) == blocks[0]
        assert stored.path.stat().st_mtime > 1
        stored.path.unlink()
        assert get(cache, digest, 0) == blocks[0], "it is open"
        now[0] += 100
        assert get(cache, digest, 0) is None


class TestDamage:
    @pytest.mark.parametrize("seed", range(3))
    def test_a_flipped_bit_is_noticed_wherever_it_is(self, cache: DiskCache, seed: int) -> None:
        chance = random.Random(seed)
        digest, blocks = keep(cache, 1)
        [stored] = cache.stored()
        good = stored.path.read_bytes()
        places = [*range(150), *(chance.randrange(len(good)) for _ in range(100))]
        for at in places:
            bad = bytearray(good)
            bad[at] ^= 1 << chance.randrange(8)
            stored.path.write_bytes(bad)
            fresh = DiskCache(cache.directory, 1 << 30)
            found = everything(fresh, digest, len(blocks))
            assert None in found, f"byte {at} was changed and nobody noticed"
            assert all(block in (None, right) for block, right in zip(found, blocks, strict=True))
            assert fresh.dropped == 1
            assert not stored.path.exists(), "what is damaged is dropped"

    @pytest.mark.parametrize("share", [0.0, 0.0001, 0.3, 0.999])
    def test_a_file_cut_short(self, cache: DiskCache, share: float) -> None:
        digest, blocks = keep(cache, 1)
        [stored] = cache.stored()
        os.truncate(stored.path, int(stored.path.stat().st_size * share))
        found = everything(cache, digest, len(blocks))
        assert None in found
        assert all(block in (None, right) for block, right in zip(found, blocks, strict=True))
        keep(cache, 1)
        assert everything(cache, digest, len(blocks)) == blocks

    def test_somebody_else_under_its_name(self, cache: DiskCache) -> None:
        digest, _ = keep(cache, 1)
        other, _ = keep(cache, 2)
        path, other_path = (Path(cache.files.name(each)) for each in (digest, other))
        other_path.replace(path)
        assert get(DiskCache(cache.directory, 1 << 30), digest, 0) is None

    def test_a_link_is_not_followed(self, cache: DiskCache, tmp_path: Path) -> None:
        digest, _ = keep(cache, 1)
        [stored] = cache.stored()
        stored.path.rename(tmp_path / "elsewhere")
        stored.path.symlink_to(tmp_path / "elsewhere")
        assert get(DiskCache(cache.directory, 1 << 30), digest, 0) is None

    def test_nor_is_one_in_place_of_the_total(self, cache: DiskCache, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.write_text("something of somebody's")
        (cache.directory / "total").symlink_to(victim)
        keep(cache, 1)
        with pytest.raises(OSError, match="symbolic links"):
            cache.trim(0)
        assert victim.read_text() == "something of somebody's"

    def test_a_lost_or_wrong_total_is_counted_anew(self, cache: DiskCache) -> None:
        keep(cache, 1)
        size = sum(stored.size for stored in cache.stored())
        for damage in (b"", b"123", b"\xff" * 8):
            (cache.directory / "total").write_bytes(damage)
            assert cache.trim(1 << 30) == size

    @pytest.mark.parametrize("damage", [b"", b"123", b"\xff" * 8])
    def test_the_limit_holds_although_the_total_was_lost(self, tmp_path: Path, damage: bytes) -> None:
        limit = 10 << 20
        for number in range(15):
            # Each a process of its own, which has counted nothing before.
            cache = DiskCache(tmp_path, limit, compress=False)
            keep(cache, number, 1 << 20)
            if number == 8:
                (tmp_path / "total").write_bytes(damage)
            assert sum(stored.size for stored in cache.stored()) <= limit

    def test_blocks_that_are_whole_but_of_another_length(self, cache: DiskCache) -> None:
        """A file that says of itself that it is good."""
        digest, blocks = keep(cache, 1, 2 * BLOCK)
        other = [blocks[0], blocks[0][:100]]
        head, *_ = store.pack(digest, [bytes(BLOCK), bytes(BLOCK)], compress=True)
        _, _, *frames = store.pack(digest, other, compress=True)
        crcs = [isal_zlib.crc32(b"".join(frames[:stop])) for stop in range(1, len(frames) + 1)]
        rows = b"".join(store._ROW.pack(len(frame), crc) for frame, crc in zip(frames, crcs, strict=True))
        head = head[: store._HEAD.size] + rows
        [stored] = cache.stored()
        stored.path.write_bytes(b"".join([head, store._CRC.pack(isal_zlib.crc32(head)), *frames]))
        assert cache.read(digest, 1, 1) == []
        assert not stored.path.exists()


class TestLimit:
    def test_it_holds_under_churn(self, tmp_path: Path) -> None:
        limit = 20 << 20
        cache = DiskCache(tmp_path, limit, compress=False)
        largest = 0
        for number in range(150):
            keep(cache, number, random.Random(number).randrange(1, 2 << 20))
            largest = max(largest, sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*")))
        assert limit * 0.8 < largest < limit * 1.05

    def test_eviction_makes_room_for_many(self, tmp_path: Path) -> None:
        """Counting anew takes as long as there are files: not for each that is kept."""
        limit, sizes = 4 << 20, list[int]()
        cache = DiskCache(tmp_path, limit, compress=False)
        for number in range(limit // 20_000):
            keep(cache, number, 20_000)
            sizes.append(sum(stored.size for stored in cache.stored()))
        [after] = [after for before, after in pairwise(sizes) if after < before]
        assert limit * 0.9 < after <= limit * 0.95

    def test_the_least_recently_used_goes_first(self, tmp_path: Path) -> None:
        cache = DiskCache(tmp_path, 10 << 20, compress=False)
        digests = [keep(cache, number, 1 << 20)[0] for number in range(8)]
        for age, digest in enumerate(reversed(digests)):
            os.utime(cache.files.name(digest), (1_000_000_000 + age, 1_000_000_000 + age))
        assert get(cache, digests[7], 0), "and with that it is the most recently used"
        cache.trim(3 << 20)
        left = {stored.digest for stored in cache.stored()}
        assert left == {digests[7].hex(), digests[0].hex()}

    def test_what_was_used_before_the_clock_was_set_back_goes_first(self, tmp_path: Path) -> None:
        cache = DiskCache(tmp_path, 10 << 20, compress=False)
        old, new = keep(cache, 0, 1 << 20)[0], keep(cache, 1, 1 << 20)[0]
        ahead = time.time() + 1e6
        os.utime(cache.files.name(old), (ahead, ahead))
        cache.trim(3 << 19)
        assert [stored.digest for stored in cache.stored()] == [new.hex()]

    def test_files_of_another_version_are_nobodys_and_go_first(self, tmp_path: Path) -> None:
        """Earlier ones had no version in their names."""
        cache = DiskCache(tmp_path, 10 << 20, compress=False)
        digests = [keep(cache, number, 1 << 20)[0] for number in range(3)]
        theirs = [Path(cache.files.name(digests[0])[:-2]), Path(cache.files.name(digests[1])[:-1] + "77")]
        for path, digest in zip(theirs, digests, strict=False):
            Path(cache.files.name(digest)).rename(path)
            os.utime(path, (1_000_000_000, 1_000_000_000))
            assert not cache.has(digest)
            assert get(cache, digest, 0) is None
            assert cache.verify(digest.hex())
        assert cache.dropped == 0
        assert len(list(cache.stored())) == 3, "they take room"
        cache.trim(3 << 19)
        assert [stored.digest for stored in cache.stored()] == [digests[2].hex()]

    def test_what_is_larger_than_the_cache_is_not_kept(self, tmp_path: Path) -> None:
        cache = DiskCache(tmp_path, 1 << 20, compress=False)
        digest, _ = keep(cache, 1, 4 << 20)
        assert not cache.has(digest)
        assert list(cache.stored()) == []

    def test_others_may_write_while_much_is_removed(self, cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever keeps something waits for the lock of the total, and an unmount waits for that."""
        for number in range(5):
            keep(cache, number)
        free = []

        def forget(_: bytes) -> None:
            with open(cache.directory / "total") as total:
                fcntl.flock(total, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free.append(True)

        monkeypatch.setattr(cache.files, "forget", forget)
        assert cache.trim(0) == 0
        assert free == [True] * 5

    def test_none_at_all(self, tmp_path: Path) -> None:
        cache = DiskCache(tmp_path, 0)
        digest, _ = keep(cache, 1)
        assert get(cache, digest, 0) is None
        assert list(tmp_path.rglob("*/*")) == []

    def test_the_default_is_a_share_of_the_disk(self, tmp_path: Path) -> None:
        room = os.statvfs(tmp_path)
        assert DiskCache(tmp_path).limit == pytest.approx(room.f_blocks * room.f_frsize / 10, rel=0.01)


class TestClaims:
    def test_one_at_a_time(self, cache: DiskCache) -> None:
        digest, blocks = span(1)
        first = cache.claim(digest)
        assert first is not None
        assert cache.claim(digest) is None
        assert DiskCache(cache.directory, 1 << 30).claim(digest) is None
        waiting = threading.Thread(target=cache.wait, args=(digest,))
        waiting.start()
        first.keep(blocks)
        waiting.join(SECONDS)
        assert not waiting.is_alive()
        assert get(cache, digest, 0) == blocks[0]

    def test_given_back(self, cache: DiskCache) -> None:
        digest, _ = span(1)
        first = cache.claim(digest)
        assert first is not None
        first.release()
        first.release()
        second = cache.claim(digest)
        assert second is not None
        second.release()
        assert [path.name for path in cache.directory.rglob("*") if path.is_file()] == ["locks"]

    def test_waiting_for_nobody(self, cache: DiskCache) -> None:
        cache.wait(span(1)[0])

    def test_the_dead_hold_nothing(self, cache: DiskCache) -> None:
        digest, blocks = span(1)
        claimed = FORK.Event()

        def die() -> None:
            cache.claim(digest)
            claimed.set()
            signal.pause()

        process = FORK.Process(target=die)
        process.start()
        assert claimed.wait(SECONDS)
        assert cache.claim(digest) is None
        waiting = threading.Thread(target=cache.wait, args=(digest,))
        waiting.start()
        process.kill()
        process.join(SECONDS)
        waiting.join(SECONDS)
        assert not waiting.is_alive()
        claim = cache.claim(digest)
        assert claim is not None
        claim.keep(blocks)
        assert cache.has(digest)

    def test_what_the_dead_left_is_removed(self, cache: DiskCache) -> None:
        digest, _ = span(1)
        part = Path(f"{cache.files.name(digest)}.part")
        part.parent.mkdir()
        part.write_bytes(b"half a span")
        cache.trim(1 << 30)
        assert part.exists(), "it may be somebody's who has only just begun"
        os.utime(part, (1, 1))
        claim = cache.claim(digest)
        assert claim is not None
        cache.trim(1 << 30)
        assert part.exists(), "somebody is still at it"
        claim.release()
        cache.trim(1 << 30)
        assert not part.exists()
        assert cache.claim(digest) is not None, "who has removed it holds nothing"


def churn(directory: Path, numbers: range, started: Event | None = None) -> None:
    """Keep spans, and check what is found, in an endless random order if `started` is given."""
    cache = DiskCache(directory, 4 << 20)
    chance = random.Random(os.getpid())
    while True:
        for number in chance.sample(numbers, len(numbers)):
            digest, blocks = span(number, 1 + number * 7919 % (1 << 20))
            found = everything(cache, digest, len(blocks))
            assert all(block in (None, right) for block, right in zip(found, blocks, strict=True))
            claim = cache.claim(digest)
            if claim is not None:
                claim.keep(blocks)
            if started is not None:
                started.set()
        if started is None:
            return


@pytest.mark.slow
def test_killed_200_times(tmp_path: Path) -> None:
    """SIGKILL at any instant leaves nothing that is later served wrong, nor a lock, nor a wrong total for long."""
    chance = random.Random(1)
    numbers = range(12)
    for _ in range(200):
        started = FORK.Event()
        process = FORK.Process(target=churn, args=(tmp_path, numbers, started))
        process.start()
        assert started.wait(SECONDS)
        process.join(chance.random() * 0.01)
        process.kill()
        process.join(SECONDS)
    cache = DiskCache(tmp_path, 4 << 20)
    for number in numbers:
        digest, blocks = span(number, 1 + number * 7919 % (1 << 20))
        found = everything(cache, digest, len(blocks))
        assert all(block in (None, right) for block, right in zip(found, blocks, strict=True))
        claim = cache.claim(digest)
        assert claim is not None
        claim.release()
    assert cache.dropped == 0, "renaming is the last step: nothing half-written has a name"
    assert cache.trim(4 << 20) == sum(stored.size for stored in cache.stored())


def test_two_processes_at_once(tmp_path: Path) -> None:
    processes = [FORK.Process(target=churn, args=(tmp_path, range(40))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0, 0]
    total = sum(stored.size for stored in DiskCache(tmp_path, 4 << 20).stored())
    assert total <= (4 << 20) * 1.05


class TestBadDisks:
    @pytest.fixture
    def small(self, tmp_path: Path) -> Iterator[Path]:
        """A disk of two megabytes."""
        require_root()
        place = tmp_path / "small"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "small", place], check=True)
        try:
            yield place
        finally:
            # Lazily: the traceback of a test that fails has files open there.
            subprocess.run(["umount", "--lazy", place], check=True)

    def test_full_because_of_others(self, small: Path, caplog: pytest.LogCaptureFixture) -> None:
        cache = DiskCache(small / "cache", 100 << 20, compress=False)
        (small / "others").write_bytes(bytes(1_700_000))
        for number in range(10):
            digest, blocks = keep(cache, number, 400_000)
            assert get(cache, digest, 0) in (None, blocks[0])
        assert len([record for record in caplog.records if "limited use" in record.message]) == 1
        (small / "others").unlink()
        digest, blocks = keep(cache, 99, 400_000)
        assert everything(cache, digest, len(blocks)) == blocks

    def test_full_of_its_own(self, small: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A limit beyond the disk: the oldest go when there is no more room."""
        cache = DiskCache(small / "cache", 100 << 20, compress=False)
        for number in range(20):
            digest, blocks = keep(cache, number, 400_000)
            assert everything(cache, digest, len(blocks)) == blocks
        assert caplog.records == []

    def test_read_only(self, small: Path, caplog: pytest.LogCaptureFixture) -> None:
        cache = DiskCache(small / "cache", 100 << 20)
        digest, blocks = keep(cache, 1)
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        again = DiskCache(small / "cache", 100 << 20)
        assert everything(again, digest, len(blocks)) == blocks, "what is there is still good"
        other, _ = keep(again, 2)
        assert get(again, other, 0) is None
        assert len(caplog.records) == 1

    def test_a_directory_that_cannot_be(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "file").write_text("")
        cache = DiskCache(tmp_path / "file" / "cache", 1 << 20)
        digest, _ = keep(cache, 1)
        assert get(cache, digest, 0) is None
        assert len(caplog.records) == 1

    def test_a_directory_that_is_removed(self, cache: DiskCache) -> None:
        digest, _ = keep(cache, 1)
        subprocess.run(["rm", "-r", cache.directory], check=True)
        assert get(DiskCache(cache.directory, 1 << 30), digest, 0) is None
        assert get(cache, digest, 1) in (None, span(1)[1][1])
        keep(cache, 2)

    def test_a_directory_that_is_removed_is_not_made_again(self, cache: DiskCache) -> None:
        """It would be as the umask has it, which may be open to others, and then nobody could use it."""
        claim = cache.claim(span(1)[0])
        keep(cache, 2)
        subprocess.run(["rm", "-r", cache.directory], check=True)
        keep(cache, 3)
        assert not cache.directory.exists()
        assert claim is not None
        claim.release()


async def test_what_comes_faster_than_it_can_be_compressed_is_written_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, zeros = DiskCache(tmp_path / "cache", 1 << 30), [[bytes([number]) * BLOCK] * 8 for number in range(20)]
    monkeypatch.setattr(keeper, "_BEHIND", 4 * 8 * BLOCK)
    writer, gate = keeper.Keeper(), threading.Event()

    def wait() -> None:
        gate.wait(SECONDS)

    with trio.fail_after(SECONDS):
        await writer._do(b"", [], wait)
        for blocks in zeros:
            claim = cache.claim(hashlib.sha256(b"".join(blocks)).digest())
            assert claim is not None
            await writer.keep(claim, blocks)
            assert writer.unwritten(claim.digest, 7) == blocks[7], "nobody has to fetch it again meanwhile"
        gate.set()
        await trio.to_thread.run_sync(writer.close)
    assert sorted(stored.size < BLOCK for stored in cache.stored()) == [False] * 16 + [True] * 4
    for blocks in zeros:
        assert everything(cache, hashlib.sha256(b"".join(blocks)).digest(), 8) == blocks


async def test_many_wait_for_room_and_all_get_it(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is forgotten who has to wait for the writer."""
    monkeypatch.setattr(keeper, "_BACKLOG", BLOCK)
    writer = keeper.Keeper()
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            for number in range(60):
                digest, blocks = span(number)
                claim = cache.claim(digest)
                assert claim is not None
                nursery.start_soon(writer.keep, claim, blocks)
    writer.close()
    assert all(cache.has(span(number)[0]) for number in range(60))


async def test_a_cache_that_hangs_is_done_without(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process was stopped while it had the cache's lock."""
    monkeypatch.setattr(keeper, "_BACKLOG", BLOCK)
    monkeypatch.setattr(keeper, "_PATIENCE", 0.05)
    writer = keeper.Keeper()

    async def kept(number: int) -> None:
        digest, blocks = span(number)
        claim = cache.claim(digest)
        assert claim is not None, "what was not kept may be claimed by others"
        await writer.keep(claim, blocks)

    total = os.open(cache.directory / "total", os.O_RDWR | os.O_CREAT, 0o600)
    with trio.fail_after(SECONDS):
        try:
            fcntl.flock(total, fcntl.LOCK_EX)
            for number in (0, 1, 1, 1):
                await kept(number)
            assert [record.getMessage() for record in caplog.records] == [
                "the cache has taken nothing for 0 s: it is left alone until it does"
            ]
            assert not cache.has(span(0)[0])
            room = writer._room
        finally:
            os.close(total)
        await room.wait()
        await kept(2)
        await trio.to_thread.run_sync(writer.close)
    assert [cache.has(span(number)[0]) for number in range(3)] == [True, False, True]
