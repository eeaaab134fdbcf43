"""What happens around a mount while containers use it: new versions, clocks that jump, disks that are full, strays.

Who takes over from whom is in `test_takeover`; what the processes let go of, in `test_mount_process`.
"""

from __future__ import annotations

import base64
import logging
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

import clipfs
from assembler import kernel
from clipfs import MountOptions, state
from clipfs.blocks.counters import Counters
from clipfs.errors import ClipfsError
from clipfs.mounting import kernel as mounting
from clipfs.mounting.control import Channel
from tests.conftest import require_programs, require_root
from tests.containers import Cli, leftovers
from tests.images import LayoutBuilder
from tests.mounts import BIG, SECONDS, ended, run
from tests.patched_worker import patch_workers
from tests.registry import Registry
from tests.tars import Tar

pytest_plugins = ("tests.mount_fixtures", "tests.container_fixtures")
pytestmark = pytest.mark.usefixtures("view", "runtime", "_root")

REPOSITORY = Path(__file__).parent.parent
MB = 1 << 20
CONTENT = Random(9).randbytes(8 * MB)


@pytest.fixture
def _root() -> None:
    require_root()


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with one large file."""
    directory = tmp_path_factory.mktemp("lifecycle")
    layout = LayoutBuilder(directory / "oci").layer(Tar().file("large", CONTENT)).config().write()
    clipfs.build(layout, directory / "large.clip")
    return directory / "large.clip"


def drop_caches() -> None:
    """What is in the kernel's caches is asked for again."""
    Path("/proc/sys/vm/drop_caches").write_text("3")


def read_anew(mountpoint: Path) -> bytes:
    drop_caches()
    return (mountpoint / "large").read_bytes()


def the_record() -> state.MountRecord:
    [record] = state.records()
    return record


def kill_worker() -> None:
    worker = the_record().worker
    assert worker is not None
    os.kill(worker.pid, signal.SIGKILL)
    assert ended(worker.pid)


# --- under a container that runs


class Container:
    """One that says, for each line that it gets, the digest of a program in its image, which it runs for that."""

    SCRIPT = "while read line; do md5sum /bin/busybox; done"

    def __init__(self, cli: Cli, *words: str | Path) -> None:
        self._process = cli.start("run", "--rm", "-i", "--prefetch", "none", *words, "sh", "-c", self.SCRIPT)
        self.right = self.read()

    @property
    def pid(self) -> int:
        """Of the command."""
        return self._process.pid

    def read(self) -> bytes:
        assert self._process.stdin
        assert self._process.stdout
        drop_caches()
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def end(self) -> tuple[int, bytes]:
        _, said = self._process.communicate(timeout=SECONDS)
        return self._process.returncode, said


def test_kills_and_upgrades_under_a_container(cli: Cli, base: Path, tree_clip: Path, view: str) -> None:
    container = Container(cli, "--view", view, tree_clip)
    assert b"/bin/busybox" in container.right
    for _ in range(3):
        kill_worker()
        assert container.read() == container.right
        clipfs.upgrade(the_record().mountpoint)
        assert container.read() == container.right
    assert container.end() == (0, b"")
    assert leftovers(base) == []


def test_a_clip_that_is_cut_off_under_a_container(cli: Cli, tree_clip: Path, tmp_path: Path, view: str) -> None:
    """Nobody has it mapped: not the mount, and not the command that waits for the container."""
    clip = tmp_path / "x.clip"
    shutil.copy(tree_clip, clip)
    container = Container(cli, "--view", view, "--stats", clip)
    for pid in (container.pid, the_record().process.pid):
        assert str(clip) not in Path(f"/proc/{pid}/maps").read_text()
    os.truncate(clip, 0)
    kill_worker()
    assert container.read() == container.right
    code, said = container.end()
    assert (code, b"fetched" in said) == (0, True), said


# What a version to come may do: name itself, and say words that this one does not know.
_NEWER = """
    Path({marker!r}).write_text("2.0")
    channel.say("weather", temperature=21)
    channel._end.send(b"no message at all")
"""


def test_an_upgrade_to_a_newer_version_and_to_a_broken_one(
    cli: Cli, base: Path, tree_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: str
) -> None:
    """As `pip install --upgrade` does it: other files lie where those of the running version came from."""
    site = tmp_path / "site"
    for package in ("clipfs", "assembler"):
        shutil.copytree(REPOSITORY / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(Cli, "env", property(lambda cli: {
        **os.environ, "CLIPFS_CONTAINERS": str(base), "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1",
    }))  # fmt: skip
    container = Container(cli, "--view", view, tree_clip)
    place, marker = the_record().mountpoint, tmp_path / "version"
    worker = site / "clipfs" / "mounting" / "worker.py"
    line = "    channel = Channel.inherited(int(sys.argv[1]))\n"
    assert line in worker.read_text()
    worker.write_text(worker.read_text().replace(line, line + _NEWER.format(marker=str(marker))))
    clipfs.upgrade(place)
    assert marker.read_text() == "2.0"
    assert container.read() == container.right
    before = the_record().worker

    worker.write_text("import clipfs.no_such_module\n")
    with pytest.raises(clipfs.MountError, match="has ended with exit code 1"):
        clipfs.upgrade(place)
    assert the_record().worker == before
    assert container.read() == container.right
    assert container.end()[0] == 0


def test_a_container_and_its_runtime_get_the_streams_alone(
    cli: Cli, tree_clip: Path, tmp_path: Path, view: str
) -> None:
    """CVE-2024-21626: a descriptor of the host's in a container is a way out of it."""
    seen = tmp_path / "seen"
    spy = tmp_path / "runtime"
    spy.write_text(f'#!/bin/bash\nls /proc/$$/fd >> {seen}\nexec runc "$@"\n')
    spy.chmod(0o755)
    held, other = os.pipe()
    try:
        script = 'for fd in /proc/self/fd/*; do echo "${fd##*/}"; done'
        words = ("run", "--rm", "--view", view, "--runtime", spy, tree_clip, "sh", "-c", script)
        process = cli.start(*words, pass_fds=(held, other))
        out, err = process.communicate(timeout=SECONDS)
    finally:
        os.close(held)
        os.close(other)
    assert process.returncode == 0, err
    # The shells' own: what they open to list the directory, and the script that bash reads.
    assert set(out.decode().split()) <= {"0", "1", "2", "3"}
    assert set(seen.read_text().split()) <= {"0", "1", "2", "3", "255"}


# --- what may happen to the machine


def test_a_clock_that_jumps(large: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By thirty years, back and forth, under a cache that has to evict."""
    jumps = "import itertools, time\nreal, steps = time.time, itertools.cycle((1e9, -1e9, 0))\n"
    patch_workers(monkeypatch, jumps + "time.time = lambda: real() + next(steps)")
    options = MountOptions(cache=MB, cache_dir=tmp_path / "spans", cache_size=5 * MB, prefetch="none")
    with clipfs.mount(large, mountpoint, options):
        for _ in range(3):
            assert read_anew(mountpoint) == CONTENT
        kill_worker()
        assert read_anew(mountpoint) == CONTENT


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own on `place`."""
    place.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "small", place], check=True)
    try:
        yield place
    finally:
        # Lazily: the traceback of a test that fails has files open there.
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path) -> Path:
    """Write until nothing more fits."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return path
    raise AssertionError("it is never full")


def test_a_full_disk_below_the_cache(large: Path, mountpoint: Path, tmp_path: Path) -> None:
    """With nothing of the cache's own to give up, and with something."""
    with small_disk(tmp_path / "spans", "2m") as disk:
        options = MountOptions(cache=MB, cache_dir=disk, cache_size=64 * MB, prefetch="none", log=tmp_path / "log")
        with clipfs.mount(large, mountpoint, options):
            filler = fill(disk)
            assert read_anew(mountpoint) == CONTENT
            filler.unlink()
            assert read_anew(mountpoint) == CONTENT
            fill(disk)
            assert read_anew(mountpoint) == CONTENT
            kill_worker()
            assert read_anew(mountpoint) == CONTENT
    assert (tmp_path / "log").read_text().count("No space left") in (1, 2), "once for each worker that has met it"


def test_a_full_disk_below_the_state(
    large: Path, mountpoint: Path, tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is noted there helps people; readers do not need it. A mount that cannot be noted is not made."""
    with small_disk(tmp_path / "small", "128k") as disk:
        monkeypatch.setenv("CLIPFS_STATE", str(disk))
        log = tmp_path / "log"
        with clipfs.mount(large, mountpoint, MountOptions(cache=MB, cache_size=0, prefetch="none", log=log)):
            full = fill(disk)
            kill_worker()
            assert read_anew(mountpoint) == CONTENT
            assert "cannot note who serves" in log.read_text()
            full.unlink()
            clipfs.upgrade(mountpoint)
            assert the_record().server is not None
            assert read_anew(mountpoint) == CONTENT
        fill(disk)
        with pytest.raises(ClipfsError, match=f"in {disk}/mounts: No space left"):
            clipfs.mount(large, mountpoint)
        assert not os.path.ismount(mountpoint)


def test_counters_have_their_room_before_anybody_counts(tmp_path: Path) -> None:
    """In a hole of a file on a full disk, the first one to count would die (SIGBUS)."""
    with small_disk(tmp_path / "small", "64k") as disk:
        fill(disk)
        with pytest.raises(ClipfsError, match="No space left"):
            Counters.create(disk / "counters")
        (disk / "filler").unlink()
        counters = Counters.create(disk / "counters")
        fill(disk)
        counters.hit(1)
        counters.close()


def test_a_state_directory_that_is_taken_away(large: Path, mountpoint: Path, runtime: Path) -> None:
    mounted = clipfs.mount(large, mountpoint, MountOptions(cache=MB, cache_size=0, prefetch="none"))
    record = the_record()
    assert record.worker is not None
    shutil.rmtree(runtime)
    runtime.write_text("in its place")
    try:
        os.kill(record.worker.pid, signal.SIGKILL)
        assert ended(record.worker.pid)
        assert read_anew(mountpoint) == CONTENT
        assert record.process.alive
    finally:
        runtime.unlink()
        kernel.unmount(mountpoint)
        assert ended(mounted.pid)


def test_a_supervisor_without_descriptors(large: Path, mountpoint: Path) -> None:
    """It cannot start a worker then, nor say so to who has asked for one; but the one that it has goes on."""
    with clipfs.mount(large, mountpoint) as mounted:
        # All numbers below are taken. poll(2) wants as many as it waits for.
        _, most = limits = resource.prlimit(mounted.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(mounted.pid, resource.RLIMIT_NOFILE, (8, most))
        os.kill(mounted.pid, signal.SIGHUP)
        with open(os.pidfd_open(mounted.pid), "rb", buffering=0) as end:
            assert mounting.readable([end.fileno()], 1) == set()
        resource.prlimit(mounted.pid, resource.RLIMIT_NOFILE, limits)
        mounted.upgrade()


# --- what a machine that died has left


def test_the_state_of_a_dead_machine(cli: Cli, base: Path, tree_clip: Path, runtime: Path, view: str) -> None:
    """After a power failure, with directories that survive it: no process, no mount, no control group; only files."""
    container = Container(cli, "--view", view, "--name", "web", tree_clip)
    record = the_record()
    first = int((base / "web" / "pid").read_text())
    group = Path("/proc", str(first), "cgroup").read_text()
    assert record.worker is not None
    for pid in (container.pid, record.process.pid, record.worker.pid, first):
        os.kill(pid, signal.SIGKILL)
    for pid in (record.process.pid, record.worker.pid, first):
        assert ended(pid)
    assert container.end()[0] == -signal.SIGKILL
    for place in kernel.mounts_below(base):
        kernel.unmount(place)
    for line in group.splitlines():
        below = line.rpartition(":")[2].lstrip("/")
        for top in ("", *os.listdir("/sys/fs/cgroup")):
            directory = Path("/sys/fs/cgroup", top, below)
            if "clipfs-" in directory.name and directory.is_dir():
                directory.rmdir()
    (runtime / "mounts" / f"{record.process}.new").write_text("half a rec")

    ran = cli("gc")
    assert (ran.code, ran.out) == (0, "")
    assert "removed container web\n" in ran.err
    assert leftovers(base) == []
    assert state.records() == []
    assert cli("gc") == (0, "", "")


# --- between the two processes


@pytest.mark.parametrize("message", [b"nonsense", b"[]", b"{}", b'{"say": 7}', b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_message_says_nothing(message: bytes) -> None:
    """A worker reads what strangers write; who is not well there must not take the mount along."""
    ours, theirs = Channel.pair()
    with theirs:
        theirs.send(message)
        assert ours.hear() == {"say": ""}
    assert ours.hear() is None
    ours.close()


def test_nothing_of_ours_is_for_others(large: Path, mountpoint: Path, runtime: Path, tmp_path: Path) -> None:
    """Directories are 0700; so what is in them is nobody's business either."""
    with clipfs.mount(large, mountpoint, MountOptions(prefetch="none")):
        assert read_anew(mountpoint) == CONTENT
        for top in (runtime, tmp_path / "cache"):
            for path in [top, *top.rglob("*")]:
                if path.is_dir():
                    assert path.stat().st_mode & 0o077 == 0, path
        done = run("setpriv", "--reuid", "65534", "--clear-groups", "ls", tmp_path / "cache", runtime)
        assert done.returncode != 0


def test_a_password_is_in_no_argument_and_no_file_of_ours(
    image: str, mountpoint: Path, tmp_path: Path, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not while it is used, nor in what is kept afterwards."""
    require_programs("docker-registry", "skopeo", "openssl", "htpasswd")
    caplog.set_level(logging.DEBUG)
    password = "s3cret-of-the-registry"
    with Registry(tmp_path, auth=("user", password), tls=True) as registry:
        name, authfile = registry.push(image, "team/app:v1"), registry.authfile()
        kept = tmp_path / "kept"
        kept.mkdir()
        clipfs.build(name, kept / "x.clip", authfile=authfile, ca=registry.ca)
        options = MountOptions(
            authfile=authfile, ca=registry.ca, log=kept / "log", report=kept / "report", cache_size=0, prefetch="none"
        )
        with clipfs.mount(kept / "x.clip", mountpoint, options):
            drop_caches()
            assert (mountpoint / "big").read_bytes() == BIG
            assert registry.settled()
            record = the_record()
            assert record.worker is not None
            seen = [Path(f"/proc/{pid}/cmdline") for pid in (record.process.pid, record.worker.pid)]
            seen += [path for top in (runtime, tmp_path / "cache", kept) for path in top.rglob("*") if path.is_file()]
            texts = {str(path): path.read_bytes() for path in seen}
        texts |= {str(path): path.read_bytes() for path in kept.iterdir()}
    assert {"log", "report", "x.clip"} <= {Path(path).name for path in texts}
    assert b"serving" in texts[str(kept / "log")]
    encoded = base64.b64encode(f"user:{password}".encode())
    assert [path for path, text in texts.items() if password.encode() in text or encoded in text] == []
    assert password not in caplog.text
    assert encoded.decode() not in caplog.text
