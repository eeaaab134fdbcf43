"""Mounts of this machine, as a caller sees them: make one, find them, end them, clean up after those that died.

This module knows processes by their records and the kernel's mounts by their table. It serves nothing itself.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from clipfs import state
from clipfs.blocks.counters import Counters
from clipfs.errors import MountError
from clipfs.mounting import daemon, kernel, mountinfo, service
from clipfs.mounting.daemon import Standby
from clipfs.mounting.options import MountOptions
from clipfs.state import MountRecord

__all__ = ["Mount", "MountOptions", "gc", "mount", "mounts", "serve", "unmount", "upgrade"]

# How long the processes may take to end after their mount has gone: they close connections, which are given 5 s.
_END_SECONDS = 10.0

# A new worker has half a minute to start, the old one as long to say that it takes no more.
_UPGRADE_SECONDS = 60.0
_ANSWER = 1 << 12


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
        """The process that answers for it, and ends with it."""
        return self._record.process.pid

    @property
    def view(self) -> str:
        """Who answers for names and attributes, ``kernel`` or ``fuse``."""
        return self._record.view

    def upgrade(self) -> None:
        """See `upgrade`."""
        _upgrade(self._record)

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


def mount(
    clip: Path | str,
    mountpoint: Path | str,
    options: MountOptions | None = None,
    *,
    standby: Standby | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Mount:
    """Mount the file `clip` on the directory `mountpoint`; returns when its root directory answers.

    Processes of its own serve the mount from then on. FormatError if the clip is broken, MountError if it cannot be
    mounted. standby: those processes, for who has started them already. meanwhile: called while they make the mount.
    """
    path, place = _checked(clip, mountpoint)
    process = daemon.start(path, place, (options or MountOptions()).settled(), standby, meanwhile)
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
    """As `mount`, but this very process answers for the mount, and the call returns when it is unmounted."""
    path, place = _checked(clip, mountpoint)
    service.serve(path, place, (options or MountOptions()).settled(), lambda _: on_ready())


def _checked(clip: Path | str, mountpoint: Path | str) -> tuple[Path, str]:
    """Both paths, absolute, with a sentence for each way in which they can be wrong."""
    path = Path(clip).absolute()
    if not path.is_file():
        raise MountError(f"{path} is not a file" if path.exists() else f"there is no file {path}")
    place = mountinfo.canonical(mountpoint)
    try:
        mode = os.stat(place).st_mode
        # A dead mount of FUSE still shows its cached root to stat, but nothing to statvfs; EROFS shows both.
        os.statvfs(place)
        record = record_at(place)
        if record is not None and not record.alive:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
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
    return [record for record in state.records() if record.device and record.alive]


def unmount(mountpoint: Path | str, *, force: bool = False) -> None:
    """Unmount the clipfs mount at `mountpoint` and wait for its process to end. See `Mount.unmount`."""
    place = mountinfo.canonical(mountpoint)
    record = record_at(place)
    if record is not None:
        _end(record, force=force)
        return
    # Somebody else's, or its record is lost: if it is a clipfs mount, the kernel decides who may unmount it.
    mountinfo.device_at(place)
    mountinfo.unmount(place, lazily=force)


def upgrade(mountpoint: Path | str) -> None:
    """Have the clipfs mount at `mountpoint` served by a new worker, of the version that is installed now.

    Returns when that has taken over, unnoticed by those who read. MountError says why it has not; then the mount goes
    on as before.
    """
    place = mountinfo.canonical(mountpoint)
    record = record_at(place)
    if record is None:
        raise MountError(f"there is no clipfs mount of yours on {place}")
    _upgrade(record)


def record_at(place: str) -> MountRecord | None:
    """The record of what is seen at `place`, which is spelt as `mountinfo.canonical` does."""
    top = mountinfo.top_at(place)
    if top is None or top.fstype not in (mountinfo.FSTYPE, "erofs"):
        return None
    found = [record for record in state.records() if (record.mountpoint, record.device) == (place, top.device)]
    # A dead one's device number may have come back.
    return next((record for record in found if record.alive), found[0] if found else None)


def _upgrade(record: MountRecord) -> None:
    pidfd = record.process.pidfd()
    if pidfd is None:
        raise MountError(f"what serves {record.mountpoint} has lost its supervisor, and cannot be replaced any more")
    with open(pidfd, "rb", buffering=0), state.asking(record.process) as answer:
        signal.pidfd_send_signal(pidfd, signal.SIGHUP)
        ready = kernel.readable([pidfd, answer], _UPGRADE_SECONDS)
        why = "it has ended" if pidfd in ready else "it has not answered in time"
        if answer in ready:
            why = json.loads(os.read(answer, _ANSWER))
    if why:
        raise MountError(f"{record.mountpoint} has no new worker: {why}")


def gc() -> list[MountRecord]:
    """Clean up after mounts whose processes were killed: their mounts, records and counters. Returns what was found."""
    found = state.records()
    living = {(record.mountpoint, record.device) for record in found if record.alive}
    cleaned = []
    for record in found:
        if record.alive:
            continue
        # A living process has the same place and number now, so the dead one's mount has gone before.
        if (record.mountpoint, record.device) in living or mountinfo.detach_dead(record.mountpoint, record.device):
            record.remove()
            cleaned.append(record)
    state.remove_unrecorded()
    return cleaned


def _end(record: MountRecord, *, force: bool) -> None:
    """Unmount what the record tells of, and wait for its process to end; a dead one's remains are cleaned up."""
    # Its worker may have changed.
    record = next((known for known in state.records() if known.process == record.process), record)
    pidfd = record.server.pidfd() if record.server is not None else None
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
            raise MountError(mountinfo.covered(record.mountpoint))
        if not kernel.readable([pidfd], _END_SECONDS):
            raise MountError(f"{record.mountpoint} is unmounted but still in use, so it goes on being served")
        # A worker alone may not unmount, and leaves the record of what is mounted yet.
        if force and mountinfo.detach_dead(record.mountpoint, record.device):
            record.remove()
