"""Mounts of this machine, as a caller sees them: make one, find them, end them, clean up after those that died.

This module knows processes by their records and the kernel's mounts by their table. It serves nothing itself.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from clipfs import state
from clipfs.blocks.counters import Counters
from clipfs.errors import MountError
from clipfs.mounting import daemon, mountinfo
from clipfs.mounting.options import MountOptions
from clipfs.state import MountRecord

__all__ = ["Mount", "MountOptions", "gc", "mount", "mounts", "serve", "unmount"]

# How long the serving process may take to end after its mount has gone: it closes connections, which are given 5 s.
_END_SECONDS = 10.0


class Mount:
    """A mount that another process serves. As a context manager it is unmounted at the end, used or not.

    The counters are those of the serving process; the last values stay readable after the unmount.
    """

    def __init__(self, record: MountRecord, counters: Counters) -> None:
        self._record = record
        self._counters = counters

    @property
    def mountpoint(self) -> Path:
        return Path(self._record.mountpoint)

    @property
    def clip(self) -> Path:
        return Path(self._record.clip)

    @property
    def pid(self) -> int:
        """The serving process."""
        return self._record.process.pid

    def counters(self) -> dict[str, int]:
        """What was asked, fetched and decoded so far."""
        return self._counters.asdict()

    def unmount(self, *, force: bool = False) -> None:
        """Unmount, and wait for the serving process to end. Nothing happens if both have happened already.

        MountError if it is in use, unless `force`: then it disappears all the same, and its users' reads fail.
        """
        _end(self._record, force=force)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unmount(force=True)


def mount(clip: Path | str, mountpoint: Path | str, options: MountOptions | None = None) -> Mount:
    """Mount the file `clip` on the directory `mountpoint`; returns when its root directory answers.

    A process of its own serves the mount from then on. FormatError if the clip is broken, MountError if it cannot be
    mounted.
    """
    path, place = _checked(clip, mountpoint)
    process = daemon.start(path, place, options or MountOptions())
    record = next((record for record in state.records() if record.process == process), None)
    if record is None:
        raise MountError(f"mounted on {place}, but it was unmounted at once")
    return Mount(record, Counters.open(record.counters))


def serve(
    clip: Path | str,
    mountpoint: Path | str,
    options: MountOptions | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """As `mount`, but this very process serves the mount, and the call returns when it is unmounted."""
    path, place = _checked(clip, mountpoint)
    # Late, for it brings trio and pyfuse3, which a process that calls `mount` has no use for.
    from clipfs.mounting import session

    session.serve(path, place, options or MountOptions(), lambda _: on_ready())


def _checked(clip: Path | str, mountpoint: Path | str) -> tuple[Path, str]:
    """Both paths, absolute, with a sentence for each way in which they can be wrong."""
    path = Path(clip).absolute()
    if not path.is_file():
        raise MountError(f"{path} is not a file" if path.exists() else f"there is no file {path}")
    place = mountinfo.canonical(mountpoint)
    try:
        mode = os.stat(place).st_mode
        # A dead mount still shows its cached root to stat, but nothing to statvfs.
        os.statvfs(place)
    except FileNotFoundError:
        raise MountError(f"mountpoint {place} does not exist; make the directory first") from None
    except OSError as error:
        dead = error.errno == errno.ENOTCONN
        hint = f"; what served it has died, `umount {place}` or `clipfs gc` removes it" if dead else ""
        raise MountError(f"cannot use mountpoint {place}: {error.strerror}{hint}") from error
    if not stat.S_ISDIR(mode):
        raise MountError(f"mountpoint {place} is not a directory")
    return path, place


def mounts() -> list[MountRecord]:
    """The mounts of this user that are being served."""
    return [record for record in state.records() if record.device and record.process.alive]


def unmount(mountpoint: Path | str, *, force: bool = False) -> None:
    """Unmount the clipfs mount at `mountpoint` and wait for its process to end. See `Mount.unmount`."""
    place = mountinfo.canonical(mountpoint)
    device = mountinfo.device_at(place)
    for record in state.records():
        if (record.mountpoint, record.device) == (place, device):
            _end(record, force=force)
            return
    # Somebody else's, or its record is lost: it is still a clipfs mount, and the kernel decides who may unmount it.
    mountinfo.unmount(place, lazily=force)


def gc() -> list[MountRecord]:
    """Clean up after serving processes that were killed: their mounts, records and counters. Returns what was found."""
    found = state.records()
    living = {(record.mountpoint, record.device) for record in found if record.process.alive}
    cleaned = []
    for record in found:
        if record.process.alive:
            continue
        # A living process has the same place and number now, so the dead one's mount has gone before.
        if (record.mountpoint, record.device) in living or mountinfo.detach_dead(record.mountpoint, record.device):
            record.remove()
            cleaned.append(record)
    state.remove_unrecorded()
    return cleaned


def _end(record: MountRecord, *, force: bool) -> None:
    """Unmount what the record tells of, and wait for its process to end; a dead one's remains are cleaned up."""
    pidfd = record.process.pidfd()
    if pidfd is None:
        if mountinfo.detach_dead(record.mountpoint, record.device):
            record.remove()
        return
    with open(pidfd, "rb", buffering=0):
        entry = mountinfo.top_at(record.mountpoint)
        if force:
            # The process knows best how to end its session under the hands of those who use it.
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        elif entry is not None and entry.device == record.device:
            mountinfo.unmount(record.mountpoint)
        elif any(other.device == record.device for other in mountinfo.entries()):
            raise MountError(f"something else is mounted on top of {record.mountpoint}; unmount that first")
        if not select.select([pidfd], [], [], _END_SECONDS)[0]:
            raise MountError(
                f"{record.mountpoint} is unmounted but still in use, so process {record.process.pid} goes on serving it"
            )
