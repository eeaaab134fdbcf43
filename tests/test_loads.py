"""The process that loads blocks from the disk cache: it brings the same bytes, and nobody depends on it."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

import clipfs
from benchmarks.memory import loaders
from clipfs.blocks import loader, loads
from clipfs.blocks.disk import DiskCache
from clipfs.blocks.loader import Question, Run, answered
from clipfs.blocks.loads import Loads
from clipfs.blocks.plan import BLOCK
from clipfs.program import program
from tests.images import LayoutBuilder
from tests.mounts import VIEWS, ended, files, record_of, require_view
from tests.tars import Tar
from tests.test_disk import keep

pytest_plugins = "tests.mount_fixtures"

SECONDS = 30
SIZE = 40 * BLOCK + 100


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "spans", 1 << 30)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is worth it at once."""
    monkeypatch.setattr(loads, "_WORTH", 1)


class Watched(Loads):
    """Loads that say when their process has begun to answer, and when it is gone."""

    def __init__(self, cache: DiskCache, nursery: trio.Nursery) -> None:
        self.up, self.down = trio.Event(), trio.Event()
        super().__init__(cache.directory)
        self.start(nursery)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "_channel" and value is not None:
            self.up.set()
        if name == "_begun" and not value:
            self.down.set()
            self.up, self.down = trio.Event(), trio.Event()

    async def begin(self) -> int:
        """The pid."""
        up = self.up
        self.did(1)
        await up.wait()
        [pid] = loaders(os.getpid())
        return pid


def using(cache: DiskCache, test: Callable[[Watched, Run, list[bytes]], Awaitable[None]]) -> None:
    """Run the coroutine function `test` with a cache of one span of 41 blocks; no process is left."""
    digest, blocks = keep(cache, 1, SIZE)
    known = Run(digest, 0, len(blocks))

    async def main() -> None:
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                await test(Watched(cache, nursery), known, blocks)
                nursery.cancel_scope.cancel()

    trio.run(main)
    assert loaders(os.getpid()) == []


def test_its_blocks_are_those_that_were_kept(cache: DiskCache) -> None:
    other, others = keep(cache, 2, 7 * BLOCK)

    async def test(watched: Watched, known: Run, blocks: list[bytes]) -> None:
        await watched.begin()
        absent = Run(bytes(32), 0, 3)
        wanted = [Run(known.digest, 3, 2), absent, Run(other, 0, 7), Run(known.digest, 40, 1)]
        assert await watched.load(wanted) == [blocks[3:5], [], others, blocks[40:]]

    using(cache, test)


def test_many_at_once_get_each_their_own(cache: DiskCache) -> None:
    kept = [keep(cache, number, random.Random(number).randrange(1, 60) * BLOCK) for number in range(2, 40)]

    async def test(watched: Watched, known: Run, blocks: list[bytes]) -> None:
        await watched.begin()
        found = {}

        async def load(digest: bytes, count: int) -> None:
            # One that is longer than a question may be is for who asks.
            [found[digest]] = await watched.load([Run(digest, 0, count)])

        async with trio.open_nursery() as nursery:
            for digest, mine in kept:
                nursery.start_soon(load, digest, len(mine))
        assert found == {digest: mine if len(mine) <= loader.BLOCKS else None for digest, mine in kept}
        assert None in found.values()

    using(cache, test)


def test_who_stops_waiting_takes_nothing_from_the_others(cache: DiskCache) -> None:
    async def test(watched: Watched, known: Run, blocks: list[bytes]) -> None:
        pid = await watched.begin()
        os.kill(pid, signal.SIGSTOP)
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(3 * loads._SLOTS):
                    nursery.start_soon(watched.load, [known])
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        finally:
            os.kill(pid, signal.SIGCONT)
        assert await watched.load([known]) == [blocks]

    using(cache, test)


def test_a_damaged_file_is_for_who_asks_to_find(cache: DiskCache) -> None:
    digest, _ = keep(cache, 2, 5 * BLOCK)
    path = next(stored.path for stored in cache.stored() if stored.digest == digest.hex())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    async def test(watched: Watched, known: Run, blocks: list[bytes]) -> None:
        await watched.begin()
        assert await watched.load([Run(digest, 0, 5), known]) == [None, blocks]
        assert path.exists()

    using(cache, test)


def test_what_it_reads_is_of_use_now(cache: DiskCache) -> None:
    async def test(watched: Watched, known: Run, blocks: list[bytes]) -> None:
        await watched.begin()
        [stored] = cache.stored()
        os.utime(stored.path, (1, 1))
        await watched.load([known])
        [stored] = cache.stored()
        assert stored.used > 1

    using(cache, test)


def test_it_gets_no_secrets(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy")

    async def test(watched: Watched, known: Run, blocks: list[bytes]) -> None:
        pid = await watched.begin()
        environment = await trio.Path(f"/proc/{pid}/environ").read_bytes()
        assert b"PYTHONPATH" in environment
        assert b"secret" not in environment

    using(cache, test)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_it_nobody_waits(cache: DiskCache, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed, or stands still: who asks does it all alone, and it is not tried again."""

    async def test(watched: Watched, known: Run, blocks: list[bytes]) -> None:
        down = watched.down
        pid = await watched.begin()
        monkeypatch.setattr(loads, "_PATIENCE", 2)
        assert await watched.load([known]) == [blocks]  # from then on
        os.kill(pid, number)
        async with trio.open_nursery() as nursery:
            for _ in range(2 * loads._SLOTS):
                nursery.start_soon(watched.load, [known])
        assert await watched.load([known]) == [None]
        await down.wait()
        watched.did(100)
        assert not watched._begun

    using(cache, test)


def test_it_ends_when_there_is_nothing_to_do_and_comes_back(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(watched: Watched, known: Run, blocks: list[bytes]) -> None:
        down = watched.down
        pid = await watched.begin()
        with monkeypatch.context() as patient:
            patient.setattr(loads, "_PATIENCE", 2)
            assert await watched.load([known]) == [blocks]  # from then on
            await down.wait()
        assert loaders(os.getpid()) == []
        assert await watched.begin() != pid
        assert await watched.load([known]) == [blocks]

    using(cache, test)


def test_it_is_not_there_before_it_is_worth_it(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "_WORTH", 10)

    async def test(watched: Watched, known: Run, blocks: list[bytes]) -> None:
        watched.did(9)
        assert await watched.load([known]) == [None]
        assert not watched._begun

    using(cache, test)


def program_that_is_not_there(*_: object) -> tuple[list[str], dict[str, str]]:
    return ["/no/such/program"], {}


def threads_that_are_not_there(*_: object) -> tuple[list[str], dict[str, str]]:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("trouble", "said"),
    [(program_that_is_not_there, "No such file"), (threads_that_are_not_there, "can't start new thread")],
)
def test_one_that_cannot_be_started_is_done_without(
    cache: DiskCache,
    trouble: Callable[..., object],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(loads, "program", trouble)

    async def test(watched: Watched, known: Run, blocks: list[bytes]) -> None:
        down = watched.down
        watched.did(1)
        await down.wait()
        assert await watched.load([known]) == [None]

    using(cache, test)
    assert said in caplog.text


# --- a mount

MB = 1 << 20
# More than is read before a loader is worth it, and than it reads while a test looks for it.
BIG = b"".join(random.Random(number).randbytes(MB // 2) + bytes(MB // 2) for number in range(96))


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("big")
    clip = directory / "big.clip"
    clipfs.build(LayoutBuilder(directory / "oci").layer(Tar().member("big", BIG), "none").config().write(), clip)
    return clip


@contextmanager
def kept(clip: Path, view: str, tmp_path: Path) -> Iterator[clipfs.Mount]:
    """A mount whose cache on disk has everything."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    for _ in range(2):
        with clipfs.mount(clip, mountpoint, clipfs.MountOptions(view=view, prefetch="none")) as mounted:
            if files(tmp_path / "cache" / "spans"):
                yield mounted
            else:
                assert (mountpoint / "big").read_bytes() == BIG
                assert loaders(worker_of(mounted)) == [], "nothing is on the disk yet"


def worker_of(mounted: clipfs.Mount) -> int:
    worker = record_of(mounted).worker
    assert worker is not None
    return worker.pid


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("victim", ["nobody", "loader", "worker"])
def test_a_large_file_from_the_disk(runtime: Path, big: Path, view: str, victim: str, tmp_path: Path) -> None:
    """All bytes are right, whoever dies while they are read, and the loader outlives nobody who asks it."""
    require_view(view)
    with kept(big, view, tmp_path) as mounted, open(mounted.mountpoint / "big", "rb", buffering=0) as file:
        half = len(BIG) // 2
        data = b"".join(iter(lambda: file.read(MB) if file.tell() < half else b"", b""))
        worker = worker_of(mounted)
        [loader_pid] = loaders(worker)
        if victim != "nobody":
            os.kill(loader_pid if victim == "loader" else worker, signal.SIGKILL)
        data += file.readall()
        assert data == BIG
        if victim == "worker":
            assert ended(loader_pid)
    assert ended(loader_pid)


# --- the program


@contextmanager
def running(cache: DiskCache, wire: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(SECONDS)
    memory = os.memfd_create("test")
    os.ftruncate(memory, loader.SLOT)
    with ours, theirs:
        command, environment = program("clipfs.blocks.loader", wire, theirs.fileno(), memory, cache.directory)
        process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno(), memory])
        theirs.close()
        os.close(memory)
        try:
            yield process, ours
        finally:
            process.kill()
            process.wait(SECONDS)


def test_it_ends_with_who_asks(cache: DiskCache) -> None:
    with running(cache, loader.WIRE) as (process, ours):
        assert ours.recv(loader.MESSAGE) == loader.READY
        process.send_signal(signal.SIGINT)  # as typed at a terminal: not for it
        ours.send(Question(0, [Run(bytes(32), 0, 1)]).to_bytes())
        assert ours.recv(loader.MESSAGE)
        ours.close()
        assert process.wait(SECONDS) == 0


def test_another_version_does_not_answer(cache: DiskCache) -> None:
    with running(cache, f"1.{2 * BLOCK}.{loader.SLOT}") as (process, ours):
        assert ours.recv(loader.MESSAGE) == b""
        assert process.wait(SECONDS) == 1


def test_it_needs_no_more_than_it_must() -> None:
    """It is started while somebody waits, and its memory counts."""
    code = "import sys, clipfs.blocks.loader; sys.exit(bool({'trio', 'pyfuse3', 'ssl'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=SECONDS)


# --- what is said

RUNS = st.lists(
    st.builds(Run, st.binary(min_size=32, max_size=32), st.integers(0, 99), st.integers(1, 60)), max_size=90
)


@given(st.integers(0, 3), RUNS)
def test_a_question_arrives_as_it_was(slot: int, runs: list[Run]) -> None:
    assert Question.of_bytes(Question(slot, runs).to_bytes()) == Question(slot, runs)


@given(RUNS)
def test_questions_are_all_runs_in_order_and_have_bounds(runs: list[Run]) -> None:
    questions = list(loads._questions(runs))
    assert [run for question in questions for run in question] == runs
    for question in questions:
        assert 1 <= len(question) <= loader.RUNS
        assert len(question) == 1 or sum(run.blocks for run in question) <= loader.BLOCKS
        if sum(run.blocks for run in question) <= loader.BLOCKS:
            assert len(Question(0, question).to_bytes()) <= loader.MESSAGE


def test_an_answer_that_is_too_short_is_none() -> None:
    memory = memoryview(bytes(loader.SLOT))
    message = loader._HEAD.pack(0, 1) + (5).to_bytes(4, "little")
    assert answered(message, memory, [Run(bytes(32), 0, 1), Run(bytes(32), 1, 1)]) == [[bytes(5)], None]
