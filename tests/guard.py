"""Cleans up after a test run that was killed: its mounts would outlive it, and what serves them or runs on them, too.

``python -m tests.guard PID PLACE...``: when the process PID has ended, ends all that has to do with these directories,
and unmounts all that is below them. A run that ends by itself has nothing left, and ends its guard before.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from clipfs.errors import MountError
from clipfs.mounting import mountinfo

_ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def guarded(*places: Path) -> Iterator[int]:
    """Should this process be killed while the block runs, nothing below these directories outlives it for long. The
    guard's pid."""
    # A session of its own: whoever kills this process may mean its group. None of its streams, for nobody shall wait
    # for their end. And a grandchild, for tests look at what children there are.
    started = subprocess.run(
        ["sh", "-c", '"$@" >/dev/null 2>&1 & echo $!', "sh",
         sys.executable, "-m", __name__, str(os.getpid()), *map(str, places)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, start_new_session=True,
        cwd=_ROOT, env={"PATH": os.environ.get("PATH", os.defpath)},
    )  # fmt: skip
    guard = os.pidfd_open(int(started.stdout))
    try:
        yield int(started.stdout)
    finally:
        signal.pidfd_send_signal(guard, signal.SIGKILL)
        select.select([guard], [], [])
        os.close(guard)


def main() -> int:
    """Wait, and clean up."""
    pid, *places = sys.argv[1:]
    with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(int(pid)), "rb", buffering=0) as running:
        select.select([running], [], [])
    below = tuple(f"{place}/" for place in places)
    # Once more for what one of the first has started meanwhile: of a supervisor, the next worker.
    for _ in range(2):
        for process in _processes(below):
            _kill(process)
        for entry in reversed(mountinfo.entries()):
            if entry.mountpoint.startswith(below):
                with contextlib.suppress(MountError):
                    mountinfo.unmount(entry.mountpoint, lazily=True)
    return 0


def _kill(process: int) -> None:
    """End it; the control group of a container goes with the last one in it."""
    with contextlib.suppress(OSError), open(os.pidfd_open(process), "rb", buffering=0) as ending:
        groups = re.findall(r"^.*/(clipfs-[0-9a-f-]+)$", Path(f"/proc/{process}/cgroup").read_text(), re.MULTILINE)
        signal.pidfd_send_signal(ending.fileno(), signal.SIGKILL)
        select.select([ending], [], [])
        for name in set(groups):
            for group in Path("/sys/fs/cgroup").glob(f"**/{name}"):
                with contextlib.suppress(OSError):  # there are others in it
                    group.rmdir()


def _processes(below: tuple[str, ...]) -> Iterator[int]:
    """Those that have such a place in their environment, as an argument, or as what their root is made of."""
    told = [f"{before}{place}".encode() for place in below for before in ("=", "\0")]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            said = (process / "environ").read_bytes() + b"\0" + (process / "cmdline").read_bytes()
            if any(place in said for place in told) or any(place in _root(process) for place in below):
                yield int(process.name)


def _root(process: Path) -> str:
    """What a container's root is made of, as the kernel has it."""
    lines = (process / "mountinfo").read_text(errors="replace").splitlines()
    return next((line for line in lines if line.split()[4] == "/" and " - overlay " in line), "")


if __name__ == "__main__":
    sys.exit(main())
