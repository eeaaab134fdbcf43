"""Workers that die, stall, or are replaced on purpose: readers see a pause, and what they read is right."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple, NoReturn

import pytest

import clipfs
from clipfs import MountError, MountOptions, state
from clipfs.mounting import connection, kernel, mountinfo, supervisor
from clipfs.mounting.mounter import Mount
from clipfs.state import Process
from tests.conftest import require, require_root
from tests.containers import Box
from tests.images import LayoutBuilder
from tests.mounts import SECONDS, ended, files, in_view, kill, record_of, run
from tests.patched_worker import patch_workers
from tests.tars import Tar

pytest_plugins = ("tests.mount_fixtures", "tests.container_fixtures")
pytestmark = pytest.mark.usefixtures("view", "runtime", "_root")

MB = 1 << 20

# Whatever is read comes from the image each time: little is kept in memory and nothing on disk.
FRESH = MountOptions(cache=MB, cache_size=0, prefetch="none")


@pytest.fixture
def _root() -> None:
    require_root()


@pytest.fixture(scope="session")
def content() -> bytes:
    return Random(5).randbytes(16 * MB)


@pytest.fixture(scope="session")
def large(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with one large file and many small ones."""
    directory = tmp_path_factory.mktemp("large")
    tar = Tar().file("large", content)
    for number in range(200):
        tar.file(f"small/{number}", b"%d" % number)
    clipfs.build(LayoutBuilder(directory / "oci").layer(tar).config().write(), directory / "large.clip")
    return directory / "large.clip"


def drop_caches() -> None:
    """What is in the kernel's caches is asked for again."""
    Path("/proc/sys/vm/drop_caches").write_text("3")


def worker_of(mounted: Mount) -> Process:
    worker = record_of(mounted).worker
    assert worker is not None
    return worker


def replaced(mounted: Mount, before: Process) -> Process:
    """Wait for the worker that comes after `before`, which has to be asked for something first."""
    deadline = time.monotonic() + SECONDS
    while (now := worker_of(mounted)) == before:
        assert time.monotonic() < deadline
        (mounted.mountpoint / f"none-{time.monotonic_ns()}").exists()
        drop_caches()
        (mounted.mountpoint / "large").open("rb", buffering=0).read(1)
    return now


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that the supervisor waits for in seconds, in tenths."""
    for name in ("PING_SECONDS", "STALL_SECONDS", "REST_SECONDS"):
        monkeypatch.setattr(supervisor, name, getattr(supervisor, name) / 20)
    monkeypatch.setattr(supervisor, "PAUSES", (0.0, 0.01, 0.02, 0.03, 0.04))


@contextlib.contextmanager
def reading(path: Path, right: bytes) -> Iterator[Callable[[], int]]:
    """Read `path` again and again meanwhile, from where it lies; at the end it was right each time.

    What is given tells how often it was read so far.
    """
    stop, rounds = threading.Event(), 0

    def read() -> None:
        nonlocal rounds
        while not stop.is_set():
            drop_caches()
            assert path.read_bytes() == right
            rounds += 1

    with ThreadPoolExecutor(1) as pool:
        going: Future[None] = pool.submit(read)
        try:
            yield lambda: rounds
        finally:
            stop.set()
            going.result(SECONDS)
    assert rounds


def read_at_last(path: Path) -> bytes:
    """Its bytes, as soon as reading it is no error any more."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            return path.read_bytes()
        drop_caches()
    return path.read_bytes()


class Held:
    """A patch for workers: while `held` exists, reads are not answered; each says so in the pipe `asked`."""

    PATCH = """
import os, trio
from clipfs.mounting.fs import ClipFS
original = ClipFS.read
async def read(*args):
    if os.path.exists({held!r}):
        with open({asked!r}, "wb", buffering=0) as asked:
            asked.write(b"x")
        await trio.sleep_forever()
    return await original(*args)
ClipFS.read = read
"""

    def __init__(self, directory: Path) -> None:
        self.held, self.asked = directory / "held", directory / "asked"
        os.mkfifo(self.asked)
        self.patch = self.PATCH.format(held=str(self.held), asked=str(self.asked))


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Held:
    held = Held(tmp_path)
    patch_workers(monkeypatch, held.patch)
    return held


# --- death


def test_a_read_outlives_the_worker_that_was_asked(large: Path, content: bytes, mountpoint: Path, held: Held) -> None:
    with clipfs.mount(large, mountpoint, FRESH) as mounted, ThreadPoolExecutor(1) as pool:
        before = worker_of(mounted)
        held.held.touch()
        reader = pool.submit((mountpoint / "large").read_bytes)
        with open(held.asked, "rb", buffering=0) as asked:
            assert asked.read(1) == b"x"
            held.held.unlink()
            os.kill(before.pid, signal.SIGKILL)
        assert reader.result(SECONDS) == content
        assert worker_of(mounted) != before


@pytest.mark.usefixtures("quick")
def test_thirty_deaths_under_load(
    large: Path, content: bytes, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "DEATHS", 1000)
    monkeypatch.setattr(supervisor, "PAUSES", (0.0,) * 1000)
    chance = Random(1)
    with clipfs.mount(large, mountpoint, FRESH) as mounted:
        held = len(os.listdir(f"/proc/{mounted.pid}/fd"))
        with reading(mountpoint / "large", content):
            for _ in range(30):
                worker = worker_of(mounted)
                time.sleep(chance.random() / 10)  # a moment of chance is what this is about
                os.kill(worker.pid, signal.SIGKILL)
                assert ended(worker.pid)
                replaced(mounted, worker)
        assert len(os.listdir(f"/proc/{mounted.pid}/fd")) <= held


@pytest.mark.usefixtures("quick")
def test_one_that_stands_still_is_replaced(large: Path, content: bytes, mountpoint: Path) -> None:
    with clipfs.mount(large, mountpoint, FRESH) as mounted:
        worker = worker_of(mounted)
        os.kill(worker.pid, signal.SIGSTOP)
        drop_caches()
        assert (mountpoint / "large").read_bytes() == content
        assert worker_of(mounted) != worker
        assert ended(worker.pid)


@pytest.mark.usefixtures("quick")
def test_one_that_waits_for_a_request_that_was_taken_back_goes_on(
    large: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes a request back when who made it is killed, even one that a worker was just told of."""
    gone, turns = tmp_path / "gone", tmp_path / "turns"
    os.mkfifo(turns)
    patch_workers(
        monkeypatch,
        f"""
import os
from clipfs.mounting import loop
original, waiting = loop._LowLevel.wait_readable, []
async def wait_readable(self, descriptor):
    if waiting:
        os.write(waiting.pop(), b"went on")
    if os.path.exists({str(gone)!r}):
        os.unlink({str(gone)!r})
        waiting.append(os.open({str(turns)!r}, os.O_RDWR))
        return
    await original(self, descriptor)
loop._LowLevel.wait_readable = wait_readable
""",
    )
    options = replace(FRESH, view="fuse")
    with clipfs.mount(large, mountpoint, options) as mounted, open(turns, "r+b", buffering=0) as pipe:
        worker = worker_of(mounted)
        gone.touch()
        (mountpoint / "none").exists()
        assert kernel.readable([pipe.fileno()], SECONDS)
        assert worker_of(mounted) == worker
        assert (mountpoint / "large").stat().st_size


@pytest.mark.usefixtures("quick")
def test_workers_that_keep_dying_end_in_errors_and_then_in_peace(
    large: Path, content: bytes, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ill = tmp_path / "ill"
    patch_workers(monkeypatch, f"import os\nif os.path.exists({str(ill)!r}): os._exit(3)")
    log = tmp_path / "log"
    with clipfs.mount(large, mountpoint, MountOptions(cache=MB, cache_size=0, prefetch="none", log=log)) as mounted:
        ill.touch()
        drop_caches()
        os.kill(worker_of(mounted).pid, signal.SIGKILL)
        with pytest.raises(OSError, match="Input/output error"):
            (mountpoint / "large").read_bytes()
        ill.unlink()
        # It rests for three seconds here, and fails meanwhile without making anybody wait.
        assert read_at_last(mountpoint / "large") == content
        assert (mountpoint / "large").read_bytes() == content
    assert "5 workers of" in log.read_text()


def test_a_kernel_that_cannot_repeat_ends_the_mount(
    large: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then who reads gets an error at once, and nothing stays."""
    monkeypatch.setattr(connection.Connection, "resend", lambda self: False)
    log = tmp_path / "log"
    mounted = clipfs.mount(large, mountpoint, MountOptions(cache=MB, cache_size=0, prefetch="none", log=log))
    os.kill(worker_of(mounted).pid, signal.SIGKILL)
    assert ended(mounted.pid)
    assert mountinfo.top_at(str(mountpoint)) is None
    assert "cannot repeat" in log.read_text()


def test_a_supervisor_that_dies_leaves_a_worker_that_goes_on(large: Path, content: bytes, mountpoint: Path) -> None:
    mounted = clipfs.mount(large, mountpoint, FRESH)
    worker = worker_of(mounted)
    os.kill(mounted.pid, signal.SIGKILL)
    assert ended(mounted.pid)
    drop_caches()
    assert (mountpoint / "large").read_bytes() == content
    assert [record.mountpoint for record in clipfs.mounts()] == [str(mountpoint)]
    assert clipfs.gc() == []
    with pytest.raises(MountError, match="lost its supervisor"):
        mounted.upgrade()
    clipfs.unmount(mountpoint)
    assert ended(worker.pid)
    assert mountinfo.top_at(str(mountpoint)) is None


def test_a_lone_worker_that_is_ended_leaves_what_gc_has_to_know(large: Path, mountpoint: Path) -> None:
    """It may not unmount. Without its record the mount would be nobody's."""
    mounted = clipfs.mount(large, mountpoint, FRESH)
    worker = worker_of(mounted)
    os.kill(mounted.pid, signal.SIGKILL)
    assert ended(mounted.pid)
    os.kill(worker.pid, signal.SIGTERM)
    assert ended(worker.pid)
    assert [record.mountpoint for record in clipfs.gc()] == [str(mountpoint)]
    assert mountinfo.top_at(str(mountpoint)) is None
    assert state.records() == []


@pytest.mark.parametrize("view", ["fuse"], indirect=True)  # in the other it is not FUSE that is mounted
def test_a_connection_that_is_cut_off_leaves_no_mount(large: Path, mountpoint: Path, view: str) -> None:
    """`umount -f` does so before it finds that somebody uses the mount."""
    mounted = clipfs.mount(large, mountpoint, FRESH)
    with (mountpoint / "large").open("rb"):
        assert "busy" in run("umount", "-f", mountpoint).stderr
        assert ended(mounted.pid)
    assert mountinfo.top_at(str(mountpoint)) is None
    assert state.records() == []


@pytest.mark.usefixtures("quick")
def test_what_makes_each_worker_stand_still_is_an_error_in_the_end(
    large: Path, content: bytes, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ill = tmp_path / "ill"
    patch_workers(
        monkeypatch,
        f"""
import os, time
from clipfs.mounting.fs import ClipFS
original = ClipFS.read
async def read(*args):
    if os.path.exists({str(ill)!r}):
        time.sleep({SECONDS})
    return await original(*args)
ClipFS.read = read
""",
    )
    with clipfs.mount(large, mountpoint, FRESH):
        ill.touch()
        with pytest.raises(OSError, match="Input/output error"):
            (mountpoint / "large").read_bytes()
        ill.unlink()
        assert read_at_last(mountpoint / "large") == content
        assert (mountpoint / "large").read_bytes() == content


class Group(NamedTuple):
    """A control group, and its files for the limit of memory and for what came of that (v2, or v1)."""

    directory: Path
    limit: str
    events: str


@pytest.fixture
def group() -> Iterator[Group]:
    """Whatever is in it at the end is moved out."""
    second = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    top = Path("/sys/fs/cgroup") if second else Path("/sys/fs/cgroup/memory")
    require((top / "cgroup.procs").exists(), "control groups with memory")
    if second:
        (top / "cgroup.subtree_control").write_text("+memory")
    directory = top / f"clipfs-test-{os.getpid()}"
    directory.mkdir()
    try:
        files = ("memory.max", "memory.events") if second else ("memory.limit_in_bytes", "memory.oom_control")
        yield Group(directory, *files)
    finally:
        for pid in (directory / "cgroup.procs").read_text().split():
            (top / "cgroup.procs").write_text(pid)
        directory.rmdir()


# A process of its own mounts: a supervisor is a fork of who has mounted, and that of a test is the larger of the two.
_MOUNTING = """
import sys, clipfs
from clipfs.mounting import child
child.PROGRAM = "tests.patched_worker"
clipfs.mount(sys.argv[1], sys.argv[2], clipfs.MountOptions(cache=1 << 20, cache_size=0, prefetch="none"))
"""


def test_it_is_the_worker_that_is_killed_for_its_memory(
    large: Path, content: bytes, mountpoint: Path, group: Group
) -> None:
    greed = "import signal\nsignal.signal(signal.SIGUSR2, lambda *_: b'x' * (400 << 20))"
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "CLIPFS_TEST_PATCH": greed}
    done = run(sys.executable, "-c", _MOUNTING, large, mountpoint, env=env)
    assert done.stderr == ""
    [before] = state.records()
    assert before.worker is not None
    try:
        for process in (before.process, before.worker):
            (group.directory / "cgroup.procs").write_text(str(process.pid))
        (group.directory / group.limit).write_text(str(200 << 20))
        os.kill(before.worker.pid, signal.SIGUSR2)
        assert ended(before.worker.pid)
        drop_caches()
        assert (mountpoint / "large").read_bytes() == content
        [after] = state.records()
        assert (after.process == before.process, after.worker == before.worker) == (True, False)
        assert "oom_kill 1" in (group.directory / group.events).read_text()
    finally:
        clipfs.unmount(mountpoint, force=True)


def test_a_container_goes_on_when_its_worker_is_killed(
    tree_clip: Path, tmp_path: Path, base: Path, capfd: pytest.CaptureFixture[str], view: str
) -> None:
    """Programs, which are mapped, and the overlay on top: none of it notices."""
    (tmp_path / "lower").mkdir()
    with in_view(view, tree_clip, tmp_path / "lower") as lower:
        [record] = clipfs.mounts()
        assert record.worker is not None
        script = """
            sum=$(md5sum /bin/busybox); n=0
            while [ $n -lt 20 ]; do
                n=$((n+1)); echo 3 > /drop 2>/dev/null
                [ "$(md5sum /bin/busybox)" = "$sum" ] || exit 9
                [ $n = 5 ] && echo killed
            done; exit 7
        """
        os.kill(record.worker.pid, signal.SIGKILL)
        assert Box(lower, base, capfd)("sh", "-c", script)[0] == 7


# --- upgrade


def test_an_upgrade_under_load(large: Path, content: bytes, mountpoint: Path) -> None:
    with clipfs.mount(large, mountpoint, FRESH) as mounted:
        with reading(mountpoint / "large", content) as rounds:
            seen = [worker_of(mounted)]
            for _ in range(5):
                before = rounds()
                mounted.upgrade()
                seen.append(worker_of(mounted))
                deadline = time.monotonic() + SECONDS
                while rounds() == before and time.monotonic() < deadline:
                    ended_or_not = (mountpoint / "small" / "7").read_bytes()
                    assert ended_or_not == b"7"
        assert len(set(seen)) == 6
        assert not any(worker.alive for worker in seen[:-1] if ended(worker.pid) is False)
        assert (mountpoint / "large").read_bytes() == content


def test_the_command_and_the_signal(large: Path, mountpoint: Path) -> None:
    with clipfs.mount(large, mountpoint, FRESH) as mounted:
        first = worker_of(mounted)
        done = run(sys.executable, "-m", "clipfs", "upgrade", mountpoint, env=dict(os.environ, PYTHONPATH=os.getcwd()))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        second = worker_of(mounted)
        assert second != first
        os.kill(mounted.pid, signal.SIGHUP)
        assert replaced(mounted, second) not in (first, second)
    done = run(sys.executable, "-m", "clipfs", "upgrade", mountpoint, env=dict(os.environ, PYTHONPATH=os.getcwd()))
    assert done.returncode == 32
    assert "there is no clipfs mount" in done.stderr


def test_several_may_ask_for_an_upgrade_at_once(large: Path, mountpoint: Path) -> None:
    with clipfs.mount(large, mountpoint, FRESH) as mounted, ThreadPoolExecutor(3) as pool:
        first = worker_of(mounted)
        for done in [pool.submit(mounted.upgrade) for _ in range(3)]:
            done.result(SECONDS)
        assert worker_of(mounted) != first


def test_a_new_worker_that_cannot_start_changes_nothing(
    large: Path, content: bytes, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ill = tmp_path / "ill"
    patch_workers(monkeypatch, f"import os\nif os.path.exists({str(ill)!r}): os._exit(3)")
    with clipfs.mount(large, mountpoint, FRESH) as mounted:
        before = worker_of(mounted)
        ill.touch()
        with pytest.raises(MountError, match="has ended with exit code 3"):
            mounted.upgrade()
        assert worker_of(mounted) == before
        drop_caches()
        assert (mountpoint / "large").read_bytes() == content


def test_a_kernel_that_cannot_repeat_has_no_upgrades(
    large: Path, content: bytes, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the old worker takes while it leaves would be lost, and who waits for it could not even be killed."""
    monkeypatch.setattr(connection, "_HAS_RESEND", 0)
    with clipfs.mount(large, mountpoint, FRESH) as mounted:
        before = worker_of(mounted)
        with pytest.raises(MountError, match="this kernel cannot repeat what it was asked"):
            mounted.upgrade()
        assert worker_of(mounted) == before
        assert (mountpoint / "large").read_bytes() == content


def test_a_new_worker_that_dies_when_the_old_one_has_been_asked_to_leave(
    large: Path, content: bytes, mountpoint: Path, held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one is in the middle of a read that takes long, and takes no other."""
    ill = tmp_path / "ill"
    dying = f"""
from clipfs.mounting.control import Channel
say = Channel.say
def told(self, what, **more):
    say(self, what, **more)
    if what == "waiting" and os.path.exists({str(ill)!r}):
        os._exit(3)
Channel.say = told
"""
    patch_workers(monkeypatch, held.patch + dying)
    with clipfs.mount(large, mountpoint, FRESH) as mounted, ThreadPoolExecutor(1) as pool:
        before = worker_of(mounted)
        held.held.touch()
        reader = pool.submit((mountpoint / "large").read_bytes)
        with open(held.asked, "rb", buffering=0) as asked:
            assert asked.read(1) == b"x"
            held.held.unlink()
        os.kill(before.pid, signal.SIGSTOP)
        ill.touch()
        try:
            with pytest.raises(MountError, match="has ended with exit code 3"):
                mounted.upgrade()
        finally:
            ill.unlink()
            os.kill(before.pid, signal.SIGCONT)
        assert reader.result(SECONDS) == content
        assert worker_of(mounted) != before


# --- what may happen to a mount meanwhile


def test_its_files_are_changed_under_it(large: Path, content: bytes, mountpoint: Path, tmp_path: Path) -> None:
    """The clip truncated, the cache directory gone: what is read is still right, and nobody gets SIGBUS."""
    clip = tmp_path / "x.clip"
    shutil.copy(large, clip)
    cache = tmp_path / "spans"
    options = MountOptions(cache=MB, cache_dir=cache, prefetch="none")
    with clipfs.mount(clip, mountpoint, options) as mounted:
        assert (mountpoint / "large").read_bytes() == content
        os.truncate(clip, 4096)
        shutil.rmtree(cache, ignore_errors=True)  # somebody may be writing into it
        drop_caches()
        assert (mountpoint / "large").read_bytes() == content
        # Also for a worker that comes later.
        mounted.upgrade()
        drop_caches()
        assert (mountpoint / "large").read_bytes() == content
        assert len(os.listdir(mountpoint / "small")) == 200


def test_what_a_later_worker_was_given_is_gone(large: Path, content: bytes, mountpoint: Path, tmp_path: Path) -> None:
    """The trace deleted, the cache directory open to others: it does without them."""
    trace, cache, log = tmp_path / "trace", tmp_path / "spans", tmp_path / "log"
    trace.write_text("clipfs trace 1\n0 0\n")
    with clipfs.mount(large, mountpoint, MountOptions(prefetch=str(trace), cache_dir=cache, log=log)) as mounted:
        trace.unlink()
        cache.chmod(0o777)
        mounted.upgrade()
        assert (mountpoint / "large").read_bytes() == content
    said = log.read_text()
    assert f"there is no trace to go by: cannot read the trace {trace}" in said
    assert f"there is no cache on disk: {cache} must be a directory" in said


def test_a_packed_source_that_is_gone_is_an_error_of_reads(
    large: Path, content: bytes, mountpoint: Path, tmp_path: Path
) -> None:
    """The worker that has it open goes on. A later one serves all the rest, and everything when it is back."""
    packed, moved = tmp_path / "packed.clip", tmp_path / "moved.clip"
    clipfs.pack(str(large), packed)
    with clipfs.mount(packed, mountpoint, replace(FRESH, source=str(packed))) as mounted:
        packed.rename(moved)
        drop_caches()
        assert (mountpoint / "large").read_bytes() == content
        mounted.upgrade()
        drop_caches()
        with pytest.raises(OSError, match="Input/output error"):
            (mountpoint / "large").read_bytes()
        assert len(os.listdir(mountpoint / "small")) == 200
        moved.rename(packed)
        mounted.upgrade()
        assert (mountpoint / "large").read_bytes() == content


def test_a_packed_clip_that_is_truncated_is_an_error(
    large: Path, content: bytes, mountpoint: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed.clip"
    clipfs.pack(str(large), packed)
    with clipfs.mount(packed, mountpoint, FRESH):
        drop_caches()
        os.truncate(packed, packed.stat().st_size - 8 * MB)
        with pytest.raises(OSError, match="Input/output error"):
            (mountpoint / "large").read_bytes()
        assert len(os.listdir(mountpoint / "small")) == 200


def test_what_a_worker_may_do(large: Path, mountpoint: Path) -> None:
    with clipfs.mount(large, mountpoint, MountOptions(authfile=Path("/etc/hostname"))) as mounted:
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{worker_of(mounted).pid}/status").read_text().splitlines()
        )
        limits = Path(f"/proc/{worker_of(mounted).pid}/limits").read_text()
        words = Path(f"/proc/{worker_of(mounted).pid}/cmdline").read_bytes()
    assert status["NoNewPrivs"] == "1"
    # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: an image may be in anybody's files.
    assert {status[name] for name in ("CapEff", "CapPrm")} == {"0000000000000006"}
    assert {status[name] for name in ("CapInh", "CapAmb")} == {"0000000000000000"}
    [core] = [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core")]
    assert core == ["0", "0"]
    assert b"hostname" not in words


def test_a_worker_leaves_no_core(large: Path, content: bytes, mountpoint: Path, tmp_path: Path) -> None:
    """Its memory has credentials. No limit keeps the kernel from piping a core dump to a program, as most machines do;
    so the process is one that is not dumped, and says so by whose its files in /proc are."""
    with clipfs.mount(large, mountpoint, FRESH) as mounted:
        worker = worker_of(mounted)
        # Of a process that can be dumped, this is readable by its own user; of others, root needs a capability.
        done = run("setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-all", "cat", f"/proc/{worker.pid}/mem")
        assert "Permission denied" in done.stderr
        os.kill(worker.pid, signal.SIGSEGV)
        assert ended(worker.pid)
        assert (mountpoint / "large").read_bytes() == content
        assert list(tmp_path.rglob("core*")) == []


# --- many


def test_fifty_cycles_leave_nothing(large: Path, mountpoint: Path, runtime: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        with clipfs.mount(large, mountpoint, FRESH):
            assert (mountpoint / "small" / str(number)).read_bytes() == b"%d" % number
    assert len(os.listdir("/proc/self/fd")) == before
    assert clipfs.mounts() == []
    assert files(runtime) == []


def test_eight_at_once(large: Path, content: bytes, tmp_path: Path) -> None:
    places = [tmp_path / f"place-{number}" for number in range(8)]

    def use(place: Path) -> bool:
        place.mkdir()
        done = run(sys.executable, "-m", "clipfs", "mount", large, place, env=dict(os.environ, PYTHONPATH=os.getcwd()))
        assert done.returncode == 0, done.stderr
        try:
            return (place / "large").read_bytes() == content
        finally:
            clipfs.unmount(place)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, places)) == [True] * 8
    assert [entry for entry in mountinfo.entries() if entry.mountpoint in map(str, places)] == []


# --- when the kernel view is not to be had


def test_loop_devices_when_files_will_not_do(
    large: Path, content: bytes, mountpoint: Path, view: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels before 6.12 mount EROFS of block devices only."""
    if view == "fuse":
        return
    honest = kernel.detached

    def older(fstype: str, options: dict[str, str | None], attributes: int) -> int:
        if fstype == "erofs" and not str(options["source"]).startswith("/dev/loop"):
            raise OSError(15, "Block device required")
        return honest(fstype, options, attributes)

    monkeypatch.setattr(kernel, "detached", older)
    with clipfs.mount(large, mountpoint, FRESH) as mounted:
        assert mounted.view == "kernel"
        assert (mountpoint / "large").read_bytes() == content
        assert loops() != []
    assert loops() == []


def test_fuse_when_nothing_else_will_do(
    large: Path, content: bytes, mountpoint: Path, view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if view == "fuse":
        return
    monkeypatch.delenv("CLIPFS_VIEW")
    honest = kernel.detached

    def without(fstype: str, options: dict[str, str | None], attributes: int) -> int:
        if fstype == "erofs":
            raise OSError(22, "Invalid argument")
        return honest(fstype, options, attributes)

    monkeypatch.setattr(kernel, "detached", without)
    log = tmp_path / "log"
    with clipfs.mount(large, mountpoint, MountOptions(log=log)) as mounted:
        assert mounted.view == "fuse"
        assert (mountpoint / "large").read_bytes() == content
        mine = [entry for entry in mountinfo.entries() if entry.mountpoint == str(mountpoint)]
        assert [entry.fstype for entry in mine] == ["fuse.clipfs"]
    assert "is mounted by FUSE alone" in log.read_text()
    with pytest.raises(MountError, match="the kernel view is not possible"):
        clipfs.mount(large, mountpoint, MountOptions(view="kernel"))
    assert loops() == []
    assert clipfs.mounts() == []


def test_a_machine_without_fuse(large: Path, mountpoint: Path, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> NoReturn:
        raise FileNotFoundError(2, "No such file or directory", "/dev/fuse")

    monkeypatch.setattr(connection, "detached", without)
    with pytest.raises(MountError, match=r"on .*: /dev/fuse: No such file or directory"):
        clipfs.mount(large, mountpoint, MountOptions(view=view))


def loops() -> list[str]:
    """Loop devices that are in use."""
    return sorted(path.name for path in Path("/sys/block").glob("loop*") if (path / "loop" / "backing_file").exists())


def test_kill_is_about_both(large: Path, mountpoint: Path) -> None:
    """Both processes gone: an error and no hang, and `gc` removes what is left."""
    mounted = clipfs.mount(large, mountpoint, FRESH)
    kill(record_of(mounted))
    drop_caches()
    with pytest.raises(OSError):  # noqa: PT011  either view has its own
        (mountpoint / "large").read_bytes()
    assert [record.mountpoint for record in clipfs.gc()] == [str(mountpoint)]
    assert mountinfo.top_at(str(mountpoint)) is None
