"""Where clipfs keeps things on this machine, and the records of the mounts that are being served.

A record is a JSON file, written aside and renamed into place, named after the process that serves the mount. A process
is its pid *and* its start time, so that a pid used twice is never mistaken for it. This module knows no FUSE.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from clipfs.errors import ClipfsError, MountError

log = logging.getLogger(__name__)


def state_dir() -> Path:
    """Runtime state, gone after a reboot: $CLIPFS_STATE, /run/clipfs for root, $XDG_RUNTIME_DIR/clipfs otherwise."""
    if given := os.environ.get("CLIPFS_STATE"):
        return private(Path(given))
    if os.geteuid() == 0:
        return private(Path("/run/clipfs"))
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    # Without a session there is no directory that only this user can write to; one in /tmp is checked to be theirs.
    return private(Path(runtime, "clipfs") if runtime else Path(f"/tmp/clipfs-{os.geteuid()}"))  # noqa: S108


def cache_dir() -> Path:
    """What may be deleted at any time: $CLIPFS_CACHE, /var/cache/clipfs for root, $XDG_CACHE_HOME/clipfs otherwise."""
    if given := os.environ.get("CLIPFS_CACHE"):
        return private(Path(given))
    if os.geteuid() == 0:
        return private(Path("/var/cache/clipfs"))
    if home := os.environ.get("XDG_CACHE_HOME"):
        return private(Path(home) / "clipfs")
    try:
        return private(Path.home() / ".cache" / "clipfs")
    except RuntimeError:
        raise ClipfsError(f"uid {os.geteuid()} has no home to keep a cache in; set HOME or CLIPFS_CACHE") from None


def scratch_dir() -> Path:
    """Large files that live for one operation; on a disk, which the state directory is not."""
    return private(cache_dir() / "scratch")


def private(path: Path) -> Path:
    """`path` as a directory that nobody else can write to, made if it is not there."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ClipfsError(f"cannot use directory {path}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        what = f"must be a directory of uid {os.geteuid()} that nobody else can write to"
        raise ClipfsError(f"{path} {what}; `chmod go-w` it if it is yours, or name another")
    return path.absolute()


def spans_dir(named: Path | None) -> Path:
    """Where decoded data is kept: what `named` leads to, for it may be a link to a larger disk, or the usual place."""
    return private(Path(os.path.realpath(named)) if named is not None else cache_dir() / "spans")


@dataclass(frozen=True, slots=True)
class Process:
    """A process for all time: pids come back, a pid with its start time (in clock ticks since boot) does not."""

    pid: int
    started: int

    def __str__(self) -> str:
        return f"{self.pid}-{self.started}"

    @classmethod
    def current(cls) -> Process:
        """The calling process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Process:
        """A process that runs, or has ended and was not waited for; such a one has started at 0."""
        return cls(pid, _started(pid) or 0)

    @property
    def alive(self) -> bool:
        """Does it still run? One that has ended and was not waited for does not."""
        return _started(self.pid) == self.started

    def pidfd(self) -> int | None:
        """A descriptor that becomes readable when the process ends; None if it has. The caller closes it."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if not self.alive:
            os.close(descriptor)
            return None
        return descriptor


def _started(pid: int) -> int | None:
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in parentheses and may hold anything, so count from its end: 3rd and 22nd field.
    fields = line[line.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@dataclass(frozen=True, slots=True)
class MountRecord:
    """A mount being served: by whom, where, of what. device is the mount's "major:minor", "" before it is mounted.

    process answers for the mount, and all that is kept here about it is named after it; worker answers its requests,
    goes on with that if the other one is killed, and changes. name: what was asked to be mounted. view: kernel or fuse.
    copy: what is mounted in fact, a copy of the clip's index, whatever becomes of the clip.
    """

    process: Process
    mountpoint: str
    clip: str
    source: str
    device: str
    name: str = ""
    view: str = ""
    worker: Process | None = None
    copy: str = ""

    @property
    def alive(self) -> bool:
        """Is there anybody left who serves it?"""
        return self.server is not None

    @property
    def server(self) -> Process | None:
        """Who ends when the mount does: its process, its worker if that was killed, None if both were."""
        return next((one for one in (self.process, self.worker) if one is not None and one.alive), None)

    @property
    def counters(self) -> Path:
        """The file that the worker counts in, for others to read."""
        return _mounts_dir() / f"{self.process}.counters"

    @property
    def journal(self) -> Path:
        """The file in which the worker writes what it fetches."""
        return _mounts_dir() / f"{self.process}.journal"

    def save(self) -> None:
        """Write the record, or replace it; readers see the one or the other, never half of it."""
        directory = _mounts_dir()
        aside = directory / f"{self.process}.new"
        try:
            aside.write_text(json.dumps(asdict(self), indent=1))
            aside.replace(directory / f"{self.process}.json")
        except OSError as error:
            raise MountError(f"cannot keep the record of a mount in {directory}: {error.strerror}") from error

    def remove(self) -> None:
        """Remove the record and its counters. The counters stay readable to those who have them open."""
        remove_files(self.process)


def records() -> list[MountRecord]:
    """All records, of living and dead processes. One that another version has written is left out, with a warning."""
    found = []
    for file in sorted(_mounts_dir().glob("*.json")):
        try:
            fields = json.loads(file.read_bytes())
            worker = fields["worker"] and Process(**fields["worker"])
            found.append(MountRecord(**{**fields, "process": Process(**fields["process"]), "worker": worker}))
        except FileNotFoundError:
            continue  # ended while we looked
        except (ValueError, TypeError, KeyError):
            log.warning("%s is no mount record of this version of clipfs; remove it when that mount is gone", file)
    return found


def remove_files(process: Process) -> None:
    """Remove all that is kept here about a process; its record last, so that what has no record has nothing."""
    for file in sorted(_mounts_dir().glob(f"{process}.*"), key=lambda file: file.suffix == ".json"):
        file.unlink(missing_ok=True)


def remove_unrecorded() -> None:
    """Remove files of dead processes that have no record: they died on their way in or out."""
    directory = _mounts_dir()
    for file in directory.iterdir():
        pid, _, started = file.stem.partition("-")
        if file.with_suffix(".json").exists() or not (pid.isdigit() and started.isdigit()):
            continue
        if not Process(int(pid), int(started)).alive:
            file.unlink(missing_ok=True)


@contextmanager
def asking(process: Process) -> Iterator[int]:
    """A pipe on which `process` will say how it has ended, what it is about to be asked for: see `answer`."""
    path = _mounts_dir() / f"{process}.{Process.current()}.{threading.get_native_id()}.asked"
    os.mkfifo(path, 0o600)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    finally:
        path.unlink(missing_ok=True)


def answer(process: Process, why: str) -> None:
    """Tell everybody who has asked `process` for something that it is done, or if not, why."""
    try:
        questions = list(_mounts_dir().glob(f"{process}.*.asked"))
    except (OSError, ClipfsError):
        return  # somebody has taken them away, or all descriptors that there are; who waits sees to it that it ends
    for path in questions:
        # Who does not listen any more does not want to know.
        with suppress(OSError):
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(descriptor, json.dumps(why).encode())
            finally:
                os.close(descriptor)


def _mounts_dir() -> Path:
    return private(state_dir() / "mounts")
