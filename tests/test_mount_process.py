"""The process behind a mount: what it lets go of, what it survives, how `clipfs mount`, `umount` and `gc` treat it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import clipfs
from clipfs import state
from clipfs.cli.main import main
from clipfs.mounting import mountinfo
from tests.conftest import require_root
from tests.mounts import BIG, GONE, SECONDS, ended, files, kill, record_of, run, settled

pytest_plugins = ("tests.mount_fixtures",)
pytestmark = pytest.mark.usefixtures("view", "runtime", "_root")

REPOSITORY = Path(__file__).parent.parent
CLIPFS = (sys.executable, "-m", "clipfs")


@pytest.fixture
def _root() -> None:
    require_root()


@pytest.fixture
def here(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: with ``x.clip`` and an empty ``mnt``."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    shutil.copy(clip, "x.clip")
    (tmp_path / "mnt").mkdir()
    return tmp_path


@contextmanager
def foreground(here: Path, *options: str, clip: str = "x.clip") -> Iterator[subprocess.Popen[str]]:
    """`clipfs mount -f`, that says it is ready."""
    command = [*CLIPFS, "mount", "-f", *options, clip, "mnt"]
    name = clip.encode(errors="backslashreplace").decode()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=here) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == f"{here}/{name} is mounted on {here}/mnt\n"
            yield process
        finally:
            process.terminate()
            if not ended(process.pid):
                process.kill()


# --- what it lets go of


def test_a_log_is_for_nobody_else(here: Path) -> None:
    """It tells what is mounted where, and of which files reads have failed."""
    umask = os.umask(0)
    try:
        with clipfs.mount("x.clip", "mnt", clipfs.MountOptions(log=here / "log")):
            assert (here / "log").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(umask)


def test_whoever_reads_our_output_sees_its_end(here: Path) -> None:
    """The pipes of `clipfs mount`, one more that it was handed, and the working directory are all free afterwards."""
    reading, writing = os.pipe()
    command = [*CLIPFS, "mount", "x.clip", "mnt", "-o", f"log={here}/log"]
    try:
        # communicate() returns at the end of both pipes, not of the process.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(writing,)
        ) as process:
            assert process.communicate(timeout=SECONDS) == (b"", b"")
        os.close(writing)
        with open(reading, "rb", closefd=False) as end:
            assert end.read() == b""
        [record] = clipfs.mounts()
        assert record.worker is not None
        for pid in (record.process.pid, record.worker.pid):
            held = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
            # The worker's loop and its splicing have sockets and pipes of their own.
            named = {name for name in held if name.startswith("/")}
            assert {name for name in named if not name.startswith((f"{here}/run/", f"{here}/cache/"))} <= {
                *("/dev/null", "/dev/fuse", f"{here}/log", f"{here}/x.clip")
            }
            assert os.readlink(f"/proc/self/fd/{reading}") not in held
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
    finally:
        os.close(reading)
        clipfs.unmount("mnt")


def test_its_environment_means_what_it_meant_where_it_was_called(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFS_STATE", "run")
    monkeypatch.setenv("CLIPFS_CACHE", "cache")
    assert run(*CLIPFS, "mount", "x.clip", "mnt").returncode == 0
    assert Path("mnt/big").read_bytes() == BIG
    assert [record.mountpoint for record in state.records()] == [f"{here}/mnt"]
    clipfs.unmount("mnt")
    with foreground(here):
        assert Path("mnt/big").read_bytes() == BIG
    assert [path.name for path in (here / "cache").glob("*/*.trace")] != []


def test_what_is_above_a_link_in_its_environment(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is above where the link leads to, as it is to the kernel."""
    (here / "far/away").mkdir(parents=True)
    (here / "link").symlink_to("far/away")
    monkeypatch.setenv("CLIPFS_STATE", "link/../run")
    try:
        assert run(*CLIPFS, "mount", "x.clip", "mnt").returncode == 0
        assert [record.mountpoint for record in state.records()] == [f"{here}/mnt"]
    finally:
        assert run("umount", "mnt").returncode == 0


def test_it_serves_on_when_its_clip_is_deleted_or_replaced(here: Path) -> None:
    with clipfs.mount("x.clip", "mnt"):
        Path("x.clip").unlink()
        assert Path("mnt/hello").read_text() == "hello\n"
        Path("other").write_bytes(b"no clip at all")
        Path("other").rename("x.clip")
        assert sorted(os.listdir("mnt")) == ["big", "bin", "hello", "secret", "usr", "zero"]
        assert Path("mnt/big").read_bytes() == BIG


def test_it_is_small(here: Path) -> None:
    """What only these processes have in memory, in KiB. Reads come on top: at most the cache that they were given."""
    with clipfs.mount("x.clip", "mnt", clipfs.MountOptions(cache=1 << 20)) as mounted:
        assert Path("mnt/big").read_bytes() == BIG
        record = record_of(mounted)
        assert record.worker is not None
        for pid, most in ((record.process.pid, 24 << 10), (record.worker.pid, 64 << 10)):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            private = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
            assert private < most, lines


# --- in the foreground


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(here: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"{here}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}" if abstract else name)
        manager.settimeout(SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        with foreground(here):
            assert manager.recv(1000).decode() == f"READY=1\nSTATUS={here}/x.clip is mounted on {here}/mnt"


def test_its_log_is_where_the_options_say(here: Path) -> None:
    """What the supervisor says, and its workers; the terminal is told that it is mounted, and of no more than that."""
    with foreground(here, "-o", f"log={here}/log,log-format=json") as process:
        clipfs.upgrade("mnt")
        clipfs.unmount("mnt")
        assert process.communicate(timeout=SECONDS)[1] == ""
    said = [json.loads(line) for line in (here / "log").read_text().splitlines()]
    assert f"{here}/mnt gets a new worker" in [line["message"] for line in said]


def test_what_fails_is_told_on_the_terminal_whatever_the_log(here: Path) -> None:
    done = run(*CLIPFS, "mount", "-f", "x.clip", "mnt", "-o", f"log={here}/log,metrics=192.0.2.1:1")
    assert done.returncode == 32
    assert done.stderr.startswith("clipfs: cannot serve metrics at 192.0.2.1:1: ")
    done = run(*CLIPFS, "mount", "-f", "x.clip", "mnt", "-o", f"log={here}/none/log")
    assert (done.returncode, done.stderr) == (
        32,
        f"clipfs: cannot write to log {here}/none/log: No such file or directory\n",
    )


def test_in_the_foreground_with_a_name_that_nobody_can_print(here: Path) -> None:
    clip = os.fsdecode(b"\xff.clip")
    (here / "x.clip").rename(here / clip)
    with foreground(here, clip=clip):
        assert (here / "mnt" / "hello").read_text() == "hello\n"


def test_a_log_has_names_that_nobody_can_print(here: Path) -> None:
    place = here / os.fsdecode(b"\xff")
    place.mkdir()
    with clipfs.mount("x.clip", place, clipfs.MountOptions(log=here / "log")):
        assert f"serving {here}/x.clip on {here}/\\udcff\n" in (here / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_under_the_hands_of_readers(here: Path, number: int) -> None:
    with foreground(here) as process:
        descriptor = os.open("mnt/big", os.O_RDONLY)
        try:
            process.send_signal(number)
            assert process.wait(SECONDS) == 0
            with pytest.raises(OSError, match=GONE):
                os.pread(descriptor, 10, 0)
        finally:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        assert mountinfo.top_at(f"{here}/mnt") is None


@pytest.mark.parametrize("end", ["umount mnt", "umount -l mnt", "fusermount3 -u mnt", "clipfs umount mnt"])
def test_whoever_unmounts_it_ends_it(here: Path, end: str) -> None:
    with foreground(here) as process:
        words = end.split()
        assert run(*(CLIPFS if words[0] == "clipfs" else words[:1]), *words[1:]).returncode == 0
        assert process.wait(SECONDS) == 0
        assert settled() == []


def test_a_lazy_unmount_lets_readers_finish(here: Path) -> None:
    with foreground(here) as process:
        descriptor = os.open("mnt/big", os.O_RDONLY)
        try:
            assert run("umount", "-l", "mnt").returncode == 0
            assert os.pread(descriptor, len(BIG), 0) == BIG
            assert process.poll() is None
        finally:
            os.close(descriptor)
        assert process.wait(SECONDS) == 0


def test_gc_cleans_up_after_a_kill(here: Path, runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with foreground(here) as process:
        [record] = clipfs.mounts()
        kill(record)
        assert process.wait(SECONDS) == -signal.SIGKILL
        with pytest.raises(OSError, match=GONE):
            Path("mnt/big").read_bytes()
        assert main(["gc"]) == 0
        assert capsys.readouterr().err == f"removed mount {here}/mnt\n"
    assert os.listdir("mnt") == []
    assert files(runtime) == []


# --- places


def test_what_a_mount_covers_comes_back(here: Path) -> None:
    Path("mnt/kept").touch()
    with clipfs.mount("x.clip", "mnt"):
        assert not Path("mnt/kept").exists()
    assert os.listdir("mnt") == ["kept"]


def test_twice_in_one_place_is_one_on_the_other(here: Path) -> None:
    below = clipfs.mount("x.clip", "mnt")
    above = clipfs.mount("x.clip", "mnt")
    assert len(clipfs.mounts()) == 2
    with pytest.raises(clipfs.MountError, match="on top"):
        below.unmount()
    assert Path("mnt/hello").read_text() == "hello\n"
    clipfs.unmount("mnt")
    assert ended(above.pid)
    assert [record.process.pid for record in clipfs.mounts()] == [below.pid]
    assert Path("mnt/hello").read_text() == "hello\n"
    below.unmount()
    assert ended(below.pid)


@pytest.mark.parametrize("place", ["mnt", "./mnt/", "link", "mnt/../mnt", "../{}/mnt", "below/..", "mnt//."])
def test_any_name_of_the_place_will_do(here: Path, place: str) -> None:
    Path("link").symlink_to("mnt")
    Path("mnt/sub").mkdir()
    Path("below").symlink_to("mnt/sub")
    place = place.format(here.name)
    assert main(["mount", "x.clip", place]) == 0
    assert [record.mountpoint for record in clipfs.mounts()] == [f"{here}/mnt"]
    assert main(["umount", place]) == 0
    assert settled() == []


# --- refusals


def test_what_cannot_be_unmounted_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with clipfs.mount("x.clip", "mnt"):
        descriptor = os.open("mnt/big", os.O_RDONLY)
        try:
            assert main(["umount", "mnt"]) == 32
            assert capsys.readouterr().err == f"clipfs: {here}/mnt is in use; `fuser -vm {here}/mnt` tells by whom\n"
        finally:
            os.close(descriptor)
        assert Path("mnt/hello").read_text() == "hello\n"
    for place in ("mnt", "none", "/proc", "x.clip"):
        assert main(["umount", place]) == 32
        assert "there is no clipfs mount on" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "open", "/proc/clipfs", "readonly"])
def test_no_state_directory_no_mount(
    here: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    Path("open").mkdir()
    Path("open").chmod(0o777)
    Path("readonly").mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("CLIPFS_STATE", place if place.startswith("/") else f"{here}/{place}")
        assert run("mount", "-t", "tmpfs", "-o", "ro,mode=700", "none", "readonly").returncode == 0
        try:
            assert main(["mount", "x.clip", "mnt"]) == (1 if place == "open" else 74)
        finally:
            assert run("umount", "readonly").returncode == 0
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert place in said
    assert mountinfo.top_at(f"{here}/mnt") is None
    assert state.records() == []


@pytest.mark.parametrize(
    ("target", "place", "code", "words"),
    [
        ("x.clip", "none", 32, "does not exist; make the directory first"),
        ("x.clip", "x.clip", 32, "is not a directory"),
        ("none.clip", "mnt", 2, "none.clip"),
        ("bad.clip", "mnt", 65, "bad.clip"),
        ("cut.clip", "mnt", 65, "cut.clip"),
    ],
)
def test_no_clip_or_no_place_no_mount(
    here: Path, target: str, place: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.clip").write_bytes(b"bad")
    Path("cut.clip").write_bytes(Path("x.clip").read_bytes()[:5000])
    for foreground in ([], ["-f"]):
        assert main(["mount", *foreground, target, place]) == code
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert state.records() == []
