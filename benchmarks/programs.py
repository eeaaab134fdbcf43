"""Other programs, and mounts: started, waited for within bounds, and gone at the end whatever happens."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import clipfs
from clipfs.mounting import mountinfo

_ROOT = Path(__file__).parent.parent

#: The command line tool, of this very source tree.
CLIPFS_COMMAND = (sys.executable, "-P", "-c", "import sys; from clipfs.cli.main import main; sys.exit(main())")

# Longer than anything here takes, unpacking on a machine that is busy with something else included.
SECONDS = 120.0
_MOUNT_SECONDS = 20.0


class NotInTime(SystemExit):
    """A program took longer than we wait."""


@contextmanager
def own_directories(scratch: Path) -> Iterator[None]:
    """Nothing of the user's is used or left by any clipfs, in this process or started by it."""
    own = {f"CLIPFS_{what}": str(scratch / what.lower()) for what in ("STATE", "CACHE", "CONTAINERS")}
    before = dict(os.environ)
    os.environ.update(own, PYTHONPATH=str(_ROOT))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def forget() -> None:
    """Empty clipfs' own cache on disk: indexes, decoded spans, traces of earlier runs."""
    shutil.rmtree(os.environ["CLIPFS_CACHE"], ignore_errors=True)


def run(*command: str | Path, seconds: float = SECONDS) -> str:
    """Run a program to its good end; what it prints."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{words[0]} took more than {seconds:.0f} s: {' '.join(words)}") from None
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\nended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def first_output(*command: str | Path, patience: float = SECONDS) -> float:
    """Start a program and wait for its end; when its first byte of output came, as a point of `time.perf_counter`.

    NotInTime, if that takes longer than `patience`.
    """
    words = [str(word) for word in command]
    # A group of its own, so that Ctrl-C reaches it through us only, who then wait for it to clean up.
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, process_group=0) as process:
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], patience)
            came = time.perf_counter()
            if not ready:
                raise NotInTime(f"{' '.join(words)}\nprinted nothing within {patience:.0f} s")
            if not process.stdout.read() or process.wait(SECONDS):
                raise SystemExit(f"{' '.join(words)}\nprinted nothing, or failed")
            return came
        finally:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()


def drop_caches() -> None:
    """Make the kernel forget all files, names and attributes; what is not on disk yet goes there first."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@contextmanager
def clipfs_mount(clip: Path, mountpoint: Path) -> Iterator[Path]:
    """A fresh ClipFS with default options."""
    with clipfs.mount(clip, mountpoint):
        yield mountpoint


@contextmanager
def served(at: Path, *command: str | Path, seconds: float = _MOUNT_SECONDS) -> Iterator[Path]:
    """A FUSE file system that stays in the foreground, where it can be waited for, until it is unmounted.

    seconds: that it may take to mount.
    """
    quiet = subprocess.DEVNULL
    with tempfile.TemporaryFile() as said:
        # In a group of its own no Ctrl-C ends it before we unmount it.
        process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=said, process_group=0)
        try:
            if not _await_mount(at, process, seconds):
                said.seek(0)
                words = " ".join(map(str, command))
                raise SystemExit(f"{words}\ndid not mount: {said.read().decode(errors='replace').strip()}")
            yield at
        finally:
            unmount(at)
            try:
                process.wait(_MOUNT_SECONDS)
            finally:
                process.kill()
                process.wait()


def squashfuse_mount(archive: Path, mountpoint: Path) -> AbstractContextManager[Path]:
    """A fresh squashfuse_ll with default options."""
    return served(mountpoint, "squashfuse_ll", "-f", archive, mountpoint)


def _await_mount(mountpoint: Path, process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for the kernel to say that its table of mounts has changed, and for the right change."""
    deadline = time.monotonic() + seconds
    with open("/proc/self/mountinfo") as table, open(os.pidfd_open(process.pid), "rb", buffering=0) as death:
        poll = select.poll()
        poll.register(table, select.POLLPRI)
        poll.register(death, select.POLLIN)
        while not os.path.ismount(mountpoint):
            if process.poll() is not None or time.monotonic() > deadline:
                return False
            poll.poll(1000 * (deadline - time.monotonic()))
    return True


def unmount(mountpoint: Path) -> None:
    """Unmount what is mounted there, if anything; at once from names, if somebody is still in it."""
    # The kernel's table and not os.path.ismount(), which sees no bind mounts.
    if mountinfo.top_at(str(mountpoint)) is not None:
        run("umount", "--lazy", mountpoint)


@contextmanager
def one_core() -> Iterator[None]:
    """All that is started inside stays on one core of those that we may use."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def scratch_directory(beside: Path) -> Iterator[Path]:
    """A directory on the same disk as `beside`, for one run. Mounts below it go before it is removed."""
    beside.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="run-", dir=beside.resolve()))
    try:
        yield place
    finally:
        below = [entry.mountpoint for entry in mountinfo.entries() if entry.mountpoint.startswith(f"{place}/")]
        for mountpoint in reversed(below):
            unmount(Path(mountpoint))
        shutil.rmtree(place)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP as Ctrl-C: everything is undone on the way out."""

    handled = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(each, signal.default_int_handler) for each in handled]
    try:
        yield
    finally:
        for each, handler in zip(handled, before, strict=True):
            signal.signal(each, handler)
