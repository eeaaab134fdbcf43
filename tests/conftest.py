"""What every test gets: state directories of its own, nothing left behind, and the capabilities that the suite needs.

A capability that is missing skips a test on a developer's machine and fails it in CI, where ``CLIPFS_REQUIRE=1``.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import demo
from clipfs.mounting import mountinfo

_ROOT = Path(__file__).parent.parent
_DEMO = _ROOT / ".cache" / "demo"


# A shell that starts us in the background has us and all that we start ignore Ctrl-C. A person has it otherwise.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# Seconds for a process that has nothing left to do.
_GRACE = 5


def require(capability: bool, what: str) -> None:
    """Skip the test unless the machine can do `what`; in CI, fail it."""
    if capability:
        return
    if os.environ.get("CLIPFS_REQUIRE") == "1":
        pytest.fail(f"this machine must have {what}, and has not")
    pytest.skip(f"needs {what}")


def require_root() -> None:
    """For tests that mount, own files or run containers."""
    require(os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK), "root and /dev/fuse")


def require_programs(*names: str) -> None:
    """For tests that judge by other people's programs."""
    for name in names:
        require(shutil.which(name) is not None, f"the program {name}")


@pytest.fixture(scope="session", autouse=True)
def _own_directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test sees or touches the mounts, caches and containers of this machine. All that it makes is below this."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STATE", "CACHE", "CONTAINERS"):
            patch.setenv(f"CLIPFS_{name}", str(tmp_path_factory.mktemp(name.lower())))
        yield tmp_path_factory.getbasetemp()


@pytest.fixture(autouse=True)
def _nothing_left_behind(_own_directories: Path) -> Iterator[None]:
    """No mount, loop device, cgroup or process outlives a test. What larger-scoped fixtures hold is there before it."""
    before, processes = _present(_own_directories), _processes(_own_directories)
    yield
    # umount(8) returns a moment before the process that has served the mount ends.
    for pid in _processes(_own_directories).keys() - processes.keys():
        with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(pid), "rb", buffering=0) as ending:
            select.select([ending], [], [], _GRACE)
    left = _present(_own_directories) - before
    left |= {f"process {pid}: {what}" for pid, what in _processes(_own_directories).items() if pid not in processes}
    with contextlib.suppress(ChildProcessError):
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            left.add("a child process that nobody waited for")
    assert not left, f"left behind: {sorted(left)}"


def _present(ours: Path) -> set[str]:
    """What is there now. Another run of the suite on the same machine must not look like a leak of this one."""
    places = (str(ours), f"{tempfile.gettempdir()}/clipfs-test-")
    found = {f"mount {entry.mountpoint}" for entry in mountinfo.entries() if entry.mountpoint.startswith(places)}
    found |= {f"loop device {path.parent.name}" for path in Path("/sys/block").glob("loop*/loop")}
    if os.environ.get("CLIPFS_REQUIRE") == "1":  # elsewhere they may be another run's
        found |= {f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob("**/clipfs-*/")}
    return found


def _processes(ours: Path) -> dict[int, str]:
    """Processes that this one started, and their forks, by pid."""
    found = {}
    me = Path("/proc/self/cmdline").read_bytes()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            # A daemon of ours is a fork of this process, or was started below it and has our directories to work in.
            if command == me or f"={ours}/".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = repr(command.decode(errors="replace"))
    return found


@pytest.fixture(scope="session")
def demo_image() -> str:
    """The name of the demo image, which is made first if need be."""
    require_programs("mmdebstrap")
    if not (_DEMO / "oci" / "index.json").exists():
        assert demo.main(["demo", str(_DEMO)]) == 0
    return f"oci:{_DEMO}/oci:latest"


@pytest.fixture(scope="session")
def demo_unpacked(demo_image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo image as umoci unpacks it: what it must look like. Not to be written to."""
    require_root()
    require_programs("umoci")
    return unpack(demo_image, tmp_path_factory.mktemp("unpacked") / "root")


def unpack(image: str, target: Path) -> Path:
    """Unpack ``oci:DIR:TAG`` by umoci; the root directory."""
    subprocess.run(["umoci", "raw", "unpack", "--image", image.removeprefix("oci:"), target], check=True, timeout=100)
    return target
