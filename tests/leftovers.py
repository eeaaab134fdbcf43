"""What a test can leave behind on this machine, and the proof that it has not.

Everything that the suite makes is below a few places of this run's own, so that another run at the same time is never
taken for a leak of this one.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from clipfs.mounting import mountinfo

# Seconds for a process that has nothing left to do.
_GRACE = 5

# Mapped by this process and its forks, until they run another program; by nobody else, whatever it is called.
_MARK = f"clipfs-tests-{os.getpid()}"
with open(os.memfd_create(_MARK), "r+b") as _marked:
    _marked.truncate(1)
    _mapped = mmap.mmap(_marked.fileno(), 1)


class Places(NamedTuple):
    """Of this run. base: pytest's directory, where tests keep what they like. state: of mounts, for all tests that
    have none of their own. temporary: $TMPDIR. scratch: for large files that live for one operation."""

    base: Path
    state: Path
    temporary: Path
    scratch: Path

    @property
    def prefixes(self) -> tuple[str, ...]:
        return f"{self.base}/", f"{self.temporary}/"


@contextlib.contextmanager
def nothing_left_behind(places: Places, grace: float = _GRACE, *, alone: bool = True) -> Iterator[set[str]]:
    """Nothing that begins in here outlives it: AssertionError with what does. It waits so long for processes to end.
    alone: nobody else runs containers meanwhile, or uses loop devices.

    What was there before, such as the mount of a fixture of larger scope, may stay; and so may things whose names begin
    with a word that is put into the set.
    """
    before, processes = _present(places, alone), _processes(places)
    descriptors, forgiven = _descriptors(places), set[str]()
    yield forgiven
    # umount(8) returns a moment before the process that has served the mount ends.
    for pid in _processes(places).keys() - processes.keys():
        with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(pid), "rb", buffering=0) as ending:
            select.select([ending], [], [], grace)
    left = _present(places, alone) - before
    left |= {f"process {pid}: {what}" for pid, what in _processes(places).items() if pid not in processes}
    if _descriptors(places).keys() - descriptors.keys():
        gc.collect()  # what nobody can use any more is closed when it is collected
    left |= {
        f"descriptor {number}: {what}" for number, what in _descriptors(places).items() if number not in descriptors
    }
    with contextlib.suppress(ChildProcessError):
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            left.add("a child process that nobody waited for")
    left = {each for each in left if each.partition(" ")[0] not in forgiven}
    assert not left, f"left behind: {sorted(left)}"


def _present(places: Places, alone: bool) -> set[str]:
    """Mounts, loop devices, control groups, sockets, and files where nothing stays."""
    ours = places.prefixes
    found = {f"mount {entry.mountpoint}" for entry in mountinfo.entries() if f"{entry.mountpoint}/".startswith(ours)}
    found |= {f"loop device of {name}" for name in _backing_files() if name.startswith(ours)}
    if alone and os.environ.get("CLIPFS_REQUIRE") == "1":  # elsewhere they may be another run's
        found |= {f"loop device of {name}" for name in _backing_files()}
        found |= {f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob("**/clipfs-*/")}
    # Bound ones have a path; abstract ones begin with "@" in its place.
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        path = line.split(maxsplit=7)[7:]
        if path and path[0].lstrip("@").startswith(ours):
            found.add(f"socket {path[0]}")
    for directory in (places.temporary, places.scratch):
        found |= {f"temporary file {path}" for path in directory.glob("*")}
    return found | {f"state {path}" for path in places.state.rglob("*") if not path.is_dir()}


def _backing_files() -> Iterator[str]:
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # somebody else's, that goes
            yield path.read_text().strip()


def _processes(places: Places) -> dict[int, str]:
    """Processes that this one started, and their forks, by pid."""
    found = {}
    me = Path("/proc/self/cmdline").read_bytes()
    ours = [f"={prefix}".encode() for prefix in places.prefixes]
    named = [f"\0{prefix}".encode() for prefix in places.prefixes]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            environment = (process / "environ").read_bytes()
            # A daemon of ours is a fork of this process, or was started below it and has our directories to work in:
            # in its environment, or, of those whose environment is none of their business, as an argument.
            forked = command == me and _MARK in (process / "maps").read_text()
            if forked or any(place in environment for place in ours) or any(place in command for place in named):
                found[int(process.name)] = repr(command.decode(errors="replace"))
    return found


def _descriptors(places: Places) -> dict[int, str]:
    """This process's own: pipes, sockets, devices, and files of ours. Libraries keep some of theirs open, as fonts."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the listing itself
            what = os.readlink(link)
            if not what.startswith("/") or what.startswith((*places.prefixes, "/dev/", "/memfd:")):
                found[int(link.name)] = what
    return found
