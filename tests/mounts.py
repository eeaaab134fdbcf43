"""What tests of real mounts share: a small image to mount, and bounded waits.

The fixtures that go with it are in `tests.mount_fixtures`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import clipfs
from clipfs import state
from clipfs.mounting import kernel, mountinfo
from tests.conftest import require, require_root
from tests.images import LayoutBuilder
from tests.tars import Tar

# Larger than a block, incompressible enough to span some, and different at every place.
BIG = b"".join(b"%09d\n" % number for number in range(60_000))

# What a file says whose mount has gone: FUSE and EROFS.
GONE = "not connected|Input/output"

# Who answers for names; every test of what a mount shows is about both.
VIEWS = ("kernel", "fuse")

# Any wait of these tests; what they wait for takes milliseconds.
SECONDS = 20


def small_image(directory: Path) -> str:
    """Write an image with something of everything that mounting is about; its name."""
    tar = (
        Tar()
        .member("usr", typeflag=b"5", mode=0o755)
        .member("usr/bin", typeflag=b"5", mode=0o755)
        .member("usr/bin/id", Path("/usr/bin/id").read_bytes(), mode=0o4755)
        .member("bin", typeflag=b"2", mode=0o777, link="usr/bin")
        .member("hello", b"hello\n", mtime="1700000000.123456789", xattrs={"user.note": b"kept"})
        .member("secret", b"for root\n", mode=0o600)
        .member("big", BIG)
        .member("zero", typeflag=b"3", mode=0o666, rdev=(1, 5))
    )
    directory.mkdir()
    return LayoutBuilder(directory).layer(tar).config(cmd=["/bin/id"]).write()


def files(directory: Path) -> list[Path]:
    """All that is not a directory below `directory`."""
    return [path for path in directory.rglob("*") if not stat.S_ISDIR(path.lstat().st_mode)]


def ended(pid: int) -> bool:
    """Wait for a process to end; False if it does not within SECONDS."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], SECONDS)[0])
    finally:
        os.close(descriptor)


def kill(record: state.MountRecord) -> None:
    """Kill all that serves a mount, and wait for its end."""
    for process in (record.process, record.worker):
        if process is not None and process.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            assert ended(process.pid)


def record_of(mounted: clipfs.Mount) -> state.MountRecord:
    """What is known of a mount, which changes with its worker."""
    [record] = [record for record in state.records() if record.process.pid == mounted.pid]
    return record


def erofs() -> bool:
    """Can this kernel, for this user, have a kernel view?"""
    try:
        kernel.known("erofs")
    except OSError:
        return False
    return os.geteuid() == 0


def require_view(view: str) -> None:
    """Skip a test of the kernel view where that is not possible; in CI, fail."""
    require_root()
    require(view != "kernel" or erofs(), "EROFS of files (Linux 6.12)")


@contextlib.contextmanager
def in_view(view: str, clip: Path, mountpoint: Path) -> Iterator[Path]:
    """A mount in this view; its root."""
    require_view(view)
    with clipfs.mount(clip, mountpoint, clipfs.MountOptions(view=view)) as mounted:
        assert mounted.view == view
        yield mounted.mountpoint


def settled() -> list[state.MountRecord]:
    """Wait for processes whose mount is gone, which umount(8) does not do; the records of all others."""
    # A number alone may be another's by now, who mounts at the same time.
    mounted = {(entry.device, entry.mountpoint) for entry in mountinfo.entries()}
    for record in state.records():
        if (record.device, record.mountpoint) not in mounted:
            ended(record.process.pid)
            if record.worker is not None:
                ended(record.worker.pid)
    return state.records()


def run(
    *command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, for SECONDS at most; what it says and its exit code are in the result."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False, env=env, cwd=cwd)
