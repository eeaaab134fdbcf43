"""Real mounts: that they serve the image, that they end in every way there is, and that nothing is left of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

import clipfs
from clipfs import FormatError, MountError, MountOptions, UsageError, state
from clipfs.mounting import daemon, kernel, mountinfo, service, views
from clipfs.mounting.connection import amended, detached
from tests.images import LayoutBuilder
from tests.mounts import BIG, GONE, SECONDS, ended, files, kill, record_of, run
from tests.tars import Tar

pytest_plugins = ("tests.mount_fixtures",)
pytestmark = pytest.mark.usefixtures("view", "runtime")

REPOSITORY = Path(__file__).parent.parent

# What conftest.py puts something else in place of.
ALONE = daemon._alone


# --- what a mount shows


def test_the_tree_is_there_when_mount_returns(clip: Path, mountpoint: Path) -> None:
    with clipfs.mount(clip, mountpoint) as mounted:
        assert sorted(os.listdir(mountpoint)) == ["big", "bin", "hello", "secret", "usr", "zero"]
        hello = (mountpoint / "hello").stat()
        assert (hello.st_mode, hello.st_nlink, hello.st_mtime_ns) == (stat.S_IFREG | 0o644, 1, 1700000000123456789)
        assert (mountpoint / "bin" / "id").read_bytes() == Path("/usr/bin/id").read_bytes()
        assert (mountpoint / "bin").readlink() == Path("usr/bin")
        assert (mountpoint / "big").read_bytes() == BIG
        assert os.getxattr(mountpoint / "hello", "user.note") == b"kept"
        assert (mountpoint / "zero").stat().st_rdev == os.makedev(1, 5)
        assert not (mountpoint / "absent").exists()
        assert mounted.counters()["bytes_served"] >= len(BIG)
    assert os.listdir(mountpoint) == []


def test_the_kernel_shows_what_is_mounted_and_how(clip: Path, mountpoint: Path, tmp_path: Path, view: str) -> None:
    with clipfs.mount(clip, mountpoint) as mounted:
        assert mounted.view == view
        entry = mountinfo.top_at(str(mountpoint))
        assert entry is not None
        assert entry.fstype == {"kernel": "erofs", "fuse": "fuse.clipfs"}[view]
        if view == "kernel":
            assert entry.source.startswith(f"{tmp_path}/cache/checked/")
        else:
            assert entry.source == str(clip)
        flags = os.statvfs(mountpoint).f_flag
        assert flags & (os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV) == os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV
        with pytest.raises(OSError, match="Read-only"):
            (mountpoint / "new").write_text("x")


def test_other_users_may_look_in_but_permissions_hold(clip: Path, public: Path) -> None:
    with clipfs.mount(clip, public):
        assert as_nobody("cat", public / "hello").stdout == "hello\n"
        assert "Permission denied" in as_nobody("cat", public / "secret").stderr
    with pytest.raises(MountError, match="EROFS cannot be for one user alone"):
        clipfs.mount(clip, public, MountOptions(view="kernel", allow_other=False))
    with clipfs.mount(clip, public, MountOptions(view="fuse", allow_other=False)):
        assert "Permission denied" in as_nobody("cat", public / "hello").stderr


def test_setuid_and_devices_work_if_asked_for(clip: Path, public: Path) -> None:
    with clipfs.mount(clip, public):
        assert as_nobody(public / "usr/bin/id", "-u").stdout == "65534\n"
        with pytest.raises(PermissionError):
            (public / "zero").open("rb")
    with clipfs.mount(clip, public, MountOptions(suid=True, dev=True)):
        assert as_nobody(public / "usr/bin/id", "-u").stdout == "0\n"
        with (public / "zero").open("rb") as zero:
            assert zero.read(3) == bytes(3)


def test_an_overlay_honours_setuid_and_devices_of_a_mount_that_does_not(clip: Path, public: Path) -> None:
    lower, upper, work, merged = (public / name for name in ("lower", "upper", "work", "merged"))
    for directory in (lower, upper, work, merged):
        directory.mkdir()
    with clipfs.mount(clip, lower) as mounted:
        layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
        assert run("mount", "-t", "overlay", "overlay", "-o", layers, merged).stderr == ""
        try:
            assert as_nobody(merged / "usr/bin/id", "-u").stdout == "0\n"
            with (merged / "zero").open("rb") as zero:
                assert zero.read(3) == bytes(3)
            # The overlay keeps the file system below alive, whatever happens to the place where it was mounted.
            assert run("umount", lower).returncode == 0
            assert (merged / "big").read_bytes() == BIG
        finally:
            assert run("umount", merged).returncode == 0
        assert ended(mounted.pid)


def test_mounting_needs_no_source_until_a_read_does(image: str, mountpoint: Path, tmp_path: Path) -> None:
    layout, logfile = tmp_path / "oci", tmp_path / "log"
    shutil.copytree(image.split(":")[1], layout)
    clip = tmp_path / "copy.clip"
    clipfs.build(f"oci:{layout}:latest", clip)
    layout.rename(tmp_path / "away")
    with clipfs.mount(clip, mountpoint, MountOptions(log=logfile)):
        assert (mountpoint / "hello").stat().st_size == 6
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                (mountpoint / "hello").read_bytes()
        (tmp_path / "away").rename(layout)
        assert (mountpoint / "hello").read_text() == "hello\n"
    failures = [line for line in logfile.read_text().splitlines() if " ERROR " in line]
    assert len(failures) == 1, failures
    assert str(layout) in failures[0]


def test_another_source_can_be_named(image: str, clip: Path, mountpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(image.split(":")[1], tmp_path / "copy")
    with clipfs.mount(clip, mountpoint, MountOptions(source=f"oci:{tmp_path}/copy:latest")):
        assert (mountpoint / "hello").read_text() == "hello\n"
        assert [record.source for record in clipfs.mounts()] == [f"oci:{tmp_path}/copy:latest"]


def test_paths_in_options_are_the_caller_s(
    image: str, clip: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what serves the mount is in another directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image.split(":")[1], "copy")
    Path("trace").write_text("clipfs trace 1\n")
    options = MountOptions(
        source="oci:copy:latest",
        prefetch="./trace",
        log=Path("log"),
        report=Path("report"),
        cache_dir=Path("cache"),
    )
    with clipfs.mount(clip, mountpoint, options):
        assert (mountpoint / "hello").read_text() == "hello\n"
        assert [record.source for record in clipfs.mounts()] == [f"oci:{tmp_path}/copy:latest"]
    assert {each.name for each in tmp_path.iterdir()} >= {"cache", "log", "report"}


@pytest.mark.parametrize("option", [{"view": "x"}, {"timeout": -1.0}, {"metrics": "x"}, {"log_format": "x"}])
def test_options_without_sense_are_refused(clip: Path, mountpoint: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(option)).replace('_', '-')}.*{next(iter(option.values()))}"):
        clipfs.mount(clip, mountpoint, MountOptions(**option))


@pytest.mark.parametrize("name", ["CLIPFS_TIMEOUT", "CLIPFS_VIEW"])
def test_variables_without_sense_are_refused(
    clip: Path, mountpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: a deadline is not needed before the first read, which would be too late to say so."""
    monkeypatch.setenv(name, "90s")
    with pytest.raises(UsageError, match=f"{name} is .*not '90s'"):
        clipfs.mount(clip, mountpoint)


# --- how mounts end


def by_signal(number: signal.Signals) -> Callable[[clipfs.Mount], object]:
    return lambda mounted: os.kill(mounted.pid, number)


ENDS: dict[str, Callable[[clipfs.Mount], object]] = {
    "Mount.unmount": lambda mounted: mounted.unmount(),
    "clipfs.unmount": lambda mounted: clipfs.unmount(mounted.mountpoint),
    "umount": lambda mounted: run("umount", mounted.mountpoint),
    "umount -l": lambda mounted: run("umount", "-l", mounted.mountpoint),
    "fusermount3 -u": lambda mounted: run("fusermount3", "-u", mounted.mountpoint),
    "SIGTERM": by_signal(signal.SIGTERM),
    "SIGINT": by_signal(signal.SIGINT),
}


@pytest.mark.parametrize("how", ENDS)
def test_it_ends_whoever_ends_it(clip: Path, mountpoint: Path, runtime: Path, how: str) -> None:
    mounted = clipfs.mount(clip, mountpoint)
    (mountpoint / "hello").read_bytes()
    assert [record.process.pid for record in clipfs.mounts()] == [mounted.pid]
    ENDS[how](mounted)
    assert ended(mounted.pid)
    assert mountinfo.top_at(str(mountpoint)) is None
    assert files(runtime) == []
    assert mounted.counters()["bytes_served"] >= 6  # the last count stays
    mounted.unmount()  # once more does no harm


def test_a_hangup_is_no_reason_to_end(clip: Path, mountpoint: Path) -> None:
    with clipfs.mount(clip, mountpoint) as mounted:
        os.kill(mounted.pid, signal.SIGHUP)
        assert (mountpoint / "hello").read_text() == "hello\n"


@pytest.mark.parametrize("xattrs", [{}, {"user.note": b"kept"}])
def test_one_without_a_record_is_known_by_what_it_is(
    mountpoint: Path, tmp_path: Path, runtime: Path, xattrs: dict[str, bytes]
) -> None:
    (tmp_path / "oci").mkdir()
    layout = LayoutBuilder(tmp_path / "oci").layer(Tar().member("file", b"", xattrs=xattrs)).config()
    clipfs.build(layout.write(), tmp_path / "x.clip")
    mounted = clipfs.mount(tmp_path / "x.clip", mountpoint)
    for record in runtime.rglob("*.json"):
        record.unlink()
    clipfs.unmount(mountpoint)
    assert ended(mounted.pid)
    assert mountinfo.top_at(str(mountpoint)) is None


def test_a_record_of_another_version_is_left_alone(
    clip: Path, mountpoint: Path, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = state.private(state.private(runtime) / "mounts")
    other = directory / "1-1.json"
    other.write_text('{"of": "another version"}')
    with clipfs.mount(clip, mountpoint):
        assert (mountpoint / "hello").read_text() == "hello\n"
        assert clipfs.gc() == []
    assert f"{other} is no mount record of this version of clipfs" in caplog.text
    other.unlink()


def test_what_is_in_use_is_not_unmounted_unless_forced(clip: Path, mountpoint: Path) -> None:
    mounted = clipfs.mount(clip, mountpoint)
    descriptor = os.open(mountpoint / "big", os.O_RDONLY)
    try:
        with pytest.raises(MountError, match="in use"):
            mounted.unmount()
        assert os.pread(descriptor, 10, 0) == BIG[:10]
        mounted.unmount(force=True)
        assert ended(mounted.pid)
        with pytest.raises(OSError, match=GONE):
            os.pread(descriptor, 10, len(BIG) - 10)
    finally:
        with contextlib.suppress(OSError):  # closing reports the lost connection, too
            os.close(descriptor)
    assert mountinfo.top_at(str(mountpoint)) is None


def test_what_covers_a_mount_is_not_unmounted_for_it(clip: Path, mountpoint: Path) -> None:
    with clipfs.mount(clip, mountpoint) as mounted:
        assert run("mount", "-t", "tmpfs", "cover", mountpoint).returncode == 0
        try:
            with pytest.raises(MountError, match="on top"):
                mounted.unmount()
            with pytest.raises(MountError, match="no clipfs mount"):
                clipfs.unmount(mountpoint)
        finally:
            assert run("umount", mountpoint).returncode == 0


def test_gc_clears_up_after_a_kill_and_spares_the_living(
    clip: Path, mountpoint: Path, tmp_path: Path, view: str
) -> None:
    (tmp_path / "other").mkdir()
    with clipfs.mount(clip, tmp_path / "other") as living:
        dead = clipfs.mount(clip, mountpoint)
        kill(record_of(dead))
        if view == "fuse":
            with pytest.raises(MountError, match="clipfs gc"):
                clipfs.mount(clip, mountpoint)
        assert [record.process.pid for record in clipfs.mounts()] == [living.pid]
        assert [record.mountpoint for record in clipfs.gc()] == [str(mountpoint)]
        assert clipfs.gc() == []
        assert mountinfo.top_at(str(mountpoint)) is None
        with clipfs.mount(clip, mountpoint):
            assert clipfs.gc() == []
            assert (mountpoint / "hello").read_text() == "hello\n"


@contextlib.contextmanager
def tmpfs(place: Path) -> Iterator[None]:
    """Something precious, mounted on `place`."""
    place.mkdir(exist_ok=True)
    assert run("mount", "-t", "tmpfs", "precious", place).returncode == 0
    try:
        yield
    finally:
        assert run("umount", "-l", place).returncode == 0


def test_two_that_are_mounted_at_the_same_time_are_told_apart(
    clip: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = kernel.attach

    def attach_with_another(mount: int, place: str) -> None:
        attach(mount, place)
        assert run("mount", "-t", "tmpfs", "another", place).returncode == 0

    monkeypatch.setattr(kernel, "attach", attach_with_another)
    mounted = clipfs.mount(clip, mountpoint)
    assert run("umount", mountpoint).returncode == 0
    recorded, seen = record_of(mounted).device, mountinfo.device_at(str(mountpoint))
    assert run("umount", mountpoint).returncode == 0
    assert recorded == seen
    assert ended(mounted.pid)


def test_what_is_seen_in_its_place_is_not_unmounted_for_it(clip: Path, tmp_path: Path) -> None:
    """A mount over a directory above hides it, and has one of its own in that place."""
    top, place = tmp_path / "top", tmp_path / "top" / "a"
    place.mkdir(parents=True)
    mounted = clipfs.mount(clip, place)
    with tmpfs(top):
        with pytest.raises(MountError, match="that can be seen: something else is mounted on top of"):
            clipfs.unmount(place)
        with tmpfs(place):
            seen = mountinfo.top_at(str(place))
            assert seen is not None
            assert seen.source == "precious"
            with pytest.raises(MountError, match="that can be seen: something else is mounted on top of"):
                clipfs.unmount(place)
            with pytest.raises(MountError, match="on top of"):
                mounted.unmount()
            kill(record_of(mounted))
            assert clipfs.gc() == []
            assert mountinfo.top_at(str(place)) == seen
    assert [record.mountpoint for record in clipfs.gc()] == [str(place)]


def test_the_kernel_sees_the_same_mounts(tmp_path: Path) -> None:
    top = tmp_path / "top"
    with tmpfs(top), tmpfs(top / "a"), tmpfs(top / "a" / "b"), tmpfs(top / "a"), tmpfs(top), tmpfs(top / "a"):
        table = mountinfo.entries()
        # Of others, somebody else may have his way with meanwhile.
        for place in {entry.mountpoint for entry in table if Path(entry.mountpoint).is_relative_to(tmp_path)}:
            try:
                looked_up = os.open(place, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:  # it is below another one
                assert mountinfo.top_at(place) is None
                continue
            info = Path(f"/proc/self/fdinfo/{looked_up}").read_text()
            os.close(looked_up)
            number = int(info.partition("mnt_id:")[2].split()[0])
            expected = next((each for each in table if (each.id, each.mountpoint) == (number, place)), None)
            assert mountinfo.top_at(place) == expected, place


def test_a_mountpoint_may_have_any_name(tmp_path: Path) -> None:
    """In a namespace of its own: what others read on this machine is their affair."""
    script = """
        import os, sys
        from assembler import kernel
        from clipfs.mounting import mountinfo
        place = os.fsencode(sys.argv[1]) + b"/" + bytes({*range(1, 256)} - {ord("/")})
        os.mkdir(place)
        os.spawnlp(os.P_WAIT, "mount", "mount", "-t", "tmpfs", os.fsdecode(bytes(range(1, 256))), place)
        entry = mountinfo.top_at(os.fsdecode(place))
        assert os.fsencode(entry.source) == bytes(range(1, 256)), entry
        assert kernel.mounts_below(sys.argv[1]) == [os.fsdecode(place)]
    """
    done = run("unshare", "--mount", sys.executable, "-c", textwrap.dedent(script), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_gc_does_not_take_a_new_mount_for_the_dead_one_before_it(clip: Path, mountpoint: Path) -> None:
    dead = clipfs.mount(clip, mountpoint)
    kill(record_of(dead))
    assert run("umount", mountpoint).returncode == 0
    with clipfs.mount(clip, mountpoint) as living:
        # On a machine that does nothing else, the kernel gives it the same device number.
        [left] = [record for record in state.records() if record.process.pid == dead.pid]
        replace(left, device=record_of(living).device).save()
        records = state.records()
        assert len({(record.mountpoint, record.device) for record in records}) == 1 < len(records)
        assert [record.process.pid for record in clipfs.gc()] == [dead.pid]
        assert (mountpoint / "hello").read_text() == "hello\n"


def test_gc_spares_what_answers_although_it_looks_like_what_has_died(clip: Path, mountpoint: Path) -> None:
    """In the same place, with the same device number, and served by somebody of whom there is no record."""
    with clipfs.mount(clip, mountpoint, MountOptions(view="fuse")) as living:
        record = record_of(living)
        dead = replace(record, process=replace(record.process, started=1), worker=None)
        record.counters.with_suffix(".json").unlink()
        dead.save()
        try:
            assert clipfs.gc() == [dead]
            assert (mountpoint / "hello").read_text() == "hello\n"
        finally:
            record.save()


def test_eight_at_a_time_and_twenty_in_a_row_leave_nothing(clip: Path, mountpoint: Path, tmp_path: Path) -> None:
    places = [tmp_path / f"place {number}" for number in range(8)]
    for place in places:
        place.mkdir()
    with ThreadPoolExecutor(len(places)) as pool:
        together = list(pool.map(lambda place: clipfs.mount(clip, place), places))
        assert [(place / "hello").read_text() for place in places] == ["hello\n"] * 8
        assert len(clipfs.mounts()) == 8
        list(pool.map(lambda mounted: mounted.unmount(), together))
    assert clipfs.mounts() == []
    for _ in range(20):
        with clipfs.mount(clip, mountpoint) as mounted:
            (mountpoint / "hello").read_bytes()
    assert ended(mounted.pid)


# --- mounts that do not come up


def test_a_mount_that_cannot_be_says_why(clip: Path, mountpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.clip"
    broken.write_bytes(clip.read_bytes()[:600])
    attempts: list[tuple[Path, Path, MountOptions, type[clipfs.ClipfsError], str]] = [
        (tmp_path / "none.clip", mountpoint, MountOptions(), MountError, "there is no file"),
        (tmp_path, mountpoint, MountOptions(), MountError, "not a file"),
        (broken, mountpoint, MountOptions(), clipfs.FormatError, "broken.clip"),
        (clip, tmp_path / "none", MountOptions(), MountError, "does not exist"),
        (clip, broken, MountOptions(), MountError, "not a directory"),
        (clip, mountpoint, MountOptions(log=tmp_path / "no" / "log"), MountError, "cannot write to log"),
    ]
    for path, place, options, kind, words in attempts:
        with pytest.raises(kind, match=words):
            clipfs.mount(path, place, options)
    assert mountinfo.top_at(str(mountpoint)) is None


@pytest.mark.parametrize("when", ["waiting", "ready"])
@pytest.mark.parametrize("how", ["stops", "dies"])
def test_a_worker_that_is_none(
    clip: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, how: str
) -> None:
    """One that stops, or dies without a word, at one moment or another of its start."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'clipfs.mounting.worker' in sys.orig_argv:\n"
        "    from clipfs.mounting.control import Channel\n"
        "    say = Channel.say\n"
        "    def sabotaged(channel, what, **fields):\n"
        f"        if what == {when!r}:\n"
        f"            os.kill(os.getpid(), signal.{ {'stops': 'SIGSTOP', 'dies': 'SIGKILL'}[how] })\n"
        "        say(channel, what, **fields)\n"
        "    Channel.say = sabotaged\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(service, "_START_SECONDS", 2.0)
    started = time.monotonic()
    with pytest.raises(MountError, match={"stops": "not ready in time", "dies": "ended without a word"}[how]):
        clipfs.mount(clip, mountpoint)
    assert time.monotonic() - started < SECONDS / 2
    assert mountinfo.top_at(str(mountpoint)) is None


def test_an_answer_to_the_kernel_is_amended_only_as_it_has_offered() -> None:
    flags = 0x1234
    head, rest = struct.pack("<IiQ", 80, 0, 2), bytes(range(48))
    answer = head + struct.pack("<IIII", 7, 38, 1 << 20, flags) + rest
    asked = bytes(40) + struct.pack("<IIII", 7, 45, 1 << 20, 0)
    offered = bytes(40) + struct.pack("<IIII", 7, 45, 1 << 20, 0xFFFFFFFF)
    assert amended(answer, asked) == answer
    assert amended(answer, offered) == head + struct.pack("<IIII", 7, 38, 1 << 20, flags | 1 << 23) + rest
    refusal = struct.pack("<IiQ", 16, -71, 2)
    assert amended(refusal, offered) == refusal
    assert amended(b"", offered) == b""


def test_a_root_that_does_not_answer_does_not_hang_mount(
    clip: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(*arguments: Any) -> None:
        """Mounts, says so, and never answers a request."""
        me = state.MountRecord(state.Process.current(), str(mountpoint), str(clip), "", "")
        me.save()
        connection, mount = detached("stuck", MountOptions())
        kernel.attach(mount, str(mountpoint))
        connection.introduction(time.monotonic())
        arguments[3](me)
        threading.Event().wait(SECONDS)

    monkeypatch.setattr(service, "serve", stuck)
    monkeypatch.setattr(daemon, "_START_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(MountError, match="does not answer"):
        clipfs.mount(clip, mountpoint)
    assert time.monotonic() - started < SECONDS / 2
    assert mountinfo.top_at(str(mountpoint)) is None


@pytest.mark.parametrize("whose", ["writable", "foreign", "link"])
def test_a_cache_directory_of_others_is_refused(clip: Path, mountpoint: Path, tmp_path: Path, whose: str) -> None:
    cache = tmp_path / "spans"
    cache.mkdir()
    match whose:
        case "writable":
            cache.chmod(0o777)
        case "foreign":
            os.chown(cache, 1000, 1000)
        case "link":
            os.chown(cache, 1000, 1000)
            cache = tmp_path / "link"
            cache.symlink_to("spans")
    with pytest.raises(
        clipfs.ClipfsError, match=f"{tmp_path / 'spans'} must be a directory of uid 0 that nobody else can write"
    ):
        clipfs.mount(clip, mountpoint, MountOptions(cache_dir=cache))
    assert mountinfo.top_at(str(mountpoint)) is None
    assert list(cache.iterdir()) == []


def test_a_cache_directory_may_be_a_link(clip: Path, mountpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "spans"
    cache.mkdir()
    (tmp_path / "link").symlink_to("spans")
    with clipfs.mount(clip, mountpoint, MountOptions(cache_dir=tmp_path / "link")):
        assert (mountpoint / "hello").read_text()
    assert list(cache.iterdir())


def test_a_trace_that_is_none_is_an_error(clip: Path, mountpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the trace"):
        clipfs.mount(clip, mountpoint, MountOptions(prefetch=str(tmp_path / "trace")))
    (tmp_path / "trace").write_text("something else\n")
    with pytest.raises(UsageError, match="is no trace"):
        clipfs.mount(clip, mountpoint, MountOptions(prefetch=str(tmp_path / "trace")))


@pytest.mark.parametrize("when", [0, 1])
def test_who_is_interrupted_leaves_no_mount(
    clip: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """Before the process that serves has said who it is, and after that."""
    readable, me, calls = kernel.readable, os.getpid(), itertools.count()

    def interrupted(descriptors: Iterable[int], seconds: float | None) -> set[int]:
        if os.getpid() == me and next(calls) == when:
            raise KeyboardInterrupt
        return readable(descriptors, seconds)

    monkeypatch.setattr(kernel, "readable", interrupted)
    with pytest.raises(KeyboardInterrupt):
        clipfs.mount(clip, mountpoint)
    assert next(calls) > when
    assert mountinfo.top_at(str(mountpoint)) is None
    assert state.records() == []


def test_a_signal_while_the_mount_is_made_is_obeyed_when_it_is(
    clip: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = views.make

    def make_and_be_told(*arguments: Any) -> views.Made:
        made = make(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return made

    monkeypatch.setattr(views, "make", make_and_be_told)
    with contextlib.suppress(MountError):  # it may have been there for a moment
        ended(clipfs.mount(clip, mountpoint).pid)
    assert mountinfo.top_at(str(mountpoint)) is None
    assert state.records() == []


def test_a_supervisor_that_crashes_is_an_error(clip: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "serve", lambda *_: os.kill(os.getpid(), signal.SIGSEGV))
    with pytest.raises(MountError, match="ended without a word"):
        clipfs.mount(clip, mountpoint)


# --- the process that serves


def test_it_holds_none_of_our_descriptors_and_is_no_child_of_ours(clip: Path, mountpoint: Path) -> None:
    reading, writing = os.pipe()
    try:
        with clipfs.mount(clip, mountpoint) as mounted:
            os.close(writing)
            assert select.select([reading], [], [], SECONDS)[0]
            assert os.read(reading, 1) == b""
            assert os.getsid(mounted.pid) != os.getsid(0)
            assert os.readlink(f"/proc/{mounted.pid}/cwd") == "/"
            with pytest.raises(ChildProcessError):
                os.waitpid(mounted.pid, os.WNOHANG)
    finally:
        os.close(reading)


def test_mounting_imports_no_loop_into_the_caller(clip: Path, mountpoint: Path) -> None:
    code = (
        "import sys, clipfs\n"
        "with clipfs.mount(*sys.argv[1:]):\n"
        "    print([name for name in ('trio', 'pyfuse3', 'httpx2') if name in sys.modules])"
    )
    done = run(sys.executable, "-c", code, clip, mountpoint, cwd=REPOSITORY)
    assert (done.stdout, done.stderr) == ("[]\n", "")


async def test_trio_programs_mount_from_a_thread(clip: Path, mountpoint: Path) -> None:
    with pytest.raises(UsageError, match="to_thread"):
        clipfs.mount(clip, mountpoint)
    with await trio.to_thread.run_sync(clipfs.mount, clip, mountpoint):
        assert await trio.Path(mountpoint / "hello").read_text() == "hello\n"


def test_something_else_is_done_meanwhile(clip: Path, mountpoint: Path) -> None:
    done: list[str] = []
    with clipfs.mount(clip, mountpoint, meanwhile=lambda: done.append("once")):
        assert (mountpoint / "hello").read_text() == "hello\n"
    assert done == ["once"]

    def fails() -> None:
        raise LookupError("something else")

    with pytest.raises(LookupError, match="something else"):
        clipfs.mount(clip, mountpoint, meanwhile=fails)
    assert mountinfo.top_at(str(mountpoint)) is None
    assert clipfs.mounts() == []


@pytest.mark.parametrize("alone", [True, False])
def test_who_serves_may_begin_early(
    clip: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    monkeypatch.setattr(daemon, "_alone", lambda: alone)
    with daemon.Standby() as standby:
        options = MountOptions(log=tmp_path / "log")
        with clipfs.mount(clip, mountpoint, options, standby=standby) as mounted:
            assert (mountpoint / "hello").read_text() == "hello\n"
            record = record_of(mounted)
            assert record.worker is not None
            for process in (record.process, record.worker):
                for number in (1, 2):
                    assert os.readlink(f"/proc/{process.pid}/fd/{number}") == str(tmp_path / "log")
    assert not any(process.alive for process in (record.process, record.worker))


@pytest.mark.parametrize("alone", [True, False])
def test_who_was_to_serve_and_is_not_asked_to_ends(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    monkeypatch.setattr(daemon, "_alone", lambda: alone)
    began = time.monotonic()
    with daemon.Standby() as standby:
        # It lets go of this when it has ended, and its worker with it.
        answers = os.dup(standby.answers.fileno())
    with open(answers, "rb", buffering=0) as ending:
        assert ending.read(1) == b""
    assert time.monotonic() - began < SECONDS / 2


def test_who_was_to_serve_and_has_died_is_missed(clip: Path, mountpoint: Path) -> None:
    with daemon.Standby() as standby:
        children = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/stat")
            if f"pipe:[{os.fstat(standby.answers.fileno()).st_ino}]" in _links(path.parent)
        ]
        for pid in children:
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(MountError, match="ended without a word"):
            clipfs.mount(clip, mountpoint, standby=standby)


def _links(process: Path) -> list[str]:
    """What the descriptors of a process are."""
    try:
        return [os.readlink(path) for path in (process / "fd").iterdir()]
    except OSError:
        return []


def test_a_process_of_many_threads_is_not_forked(
    clip: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever is forked keeps the memory of its parent, and locks that no thread will ever let go of."""
    monkeypatch.setattr(daemon, "_alone", ALONE)
    ballast = b"x" * (200 << 20)
    with ThreadPoolExecutor(1) as pool:
        options = MountOptions(name="from a thread", log=tmp_path / "log")
        with pool.submit(clipfs.mount, clip, mountpoint, options).result(SECONDS) as mounted:
            assert (mountpoint / "hello").read_text() == "hello\n"
            assert record_of(mounted).name == "from a thread"
            assert "serving" in (tmp_path / "log").read_text()
            status = Path(f"/proc/{mounted.pid}/status").read_text()
            [resident] = [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS")]
            assert resident < len(ballast) / 2
            assert os.getsid(mounted.pid) != os.getsid(0)
            assert os.readlink(f"/proc/{mounted.pid}/cwd") == "/"
        (tmp_path / "broken.clip").write_bytes(b"no index")
        with pytest.raises(FormatError, match=r"broken\.clip"):
            pool.submit(clipfs.mount, tmp_path / "broken.clip", mountpoint).result(SECONDS)
        monkeypatch.setattr(sys, "executable", "/nowhere/python3")
        with pytest.raises(MountError, match="cannot start /nowhere/python3"):
            pool.submit(clipfs.mount, clip, mountpoint).result(SECONDS)


def test_what_a_program_does_with_signals_is_its_own_affair(clip: Path, mountpoint: Path) -> None:
    before = [signal.signal(signal.SIGCHLD, signal.SIG_IGN), signal.signal(signal.SIGPIPE, signal.SIG_DFL)]
    try:
        mounted = clipfs.mount(clip, mountpoint)
    finally:
        signal.signal(signal.SIGCHLD, before[0])
        signal.signal(signal.SIGPIPE, before[1])
    with mounted:
        status = Path(f"/proc/{mounted.pid}/status").read_text()
        ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    assert ignored & 1 << signal.SIGPIPE - 1
    assert not ignored & 1 << signal.SIGCHLD - 1


def test_in_the_foreground_this_process_serves(clip: Path, mountpoint: Path) -> None:
    code = (
        "import sys\n"
        "from clipfs.mounting.mounter import serve\n"
        "serve(sys.argv[1], sys.argv[2], on_ready=lambda: print('ready', flush=True))"
    )
    command = [sys.executable, "-c", code, str(clip), str(mountpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            assert (mountpoint / "hello").read_text() == "hello\n"
            assert [record.process.pid for record in clipfs.mounts()] == [server.pid]
            server.send_signal(signal.SIGINT)
            assert server.wait(SECONDS) == 0
        finally:
            server.kill()


def as_nobody(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program as a user who owns nothing."""
    return run("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *command)
