"""That nothing outlives a test run that was killed, for long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import clipfs
from clipfs.mounting import mountinfo
from clipfs.state import Process
from tests import guard
from tests.containers import Cli
from tests.mounts import SECONDS, ended, record_of

pytest_plugins = ("tests.mount_fixtures", "tests.container_fixtures")


def below(place: Path) -> list[str]:
    return [entry.mountpoint for entry in mountinfo.entries() if entry.mountpoint.startswith(f"{place}/")]


def stand_in(place: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A run with its guard, as the suite has one; it has begun."""
    code = "import sys, pathlib; from tests.guard import guarded\n"
    code += "with guarded(pathlib.Path(sys.argv[1])) as pid: print(pid, flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=guard._ROOT
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_what_a_killed_run_leaves(runtime: Path, cli: Cli, tree_clip: Path, tmp_path: Path) -> None:
    """A mount, and a container on another one: the kernel keeps both for those who use them."""
    killed, other = tmp_path / "killed", tmp_path / "other"
    run, guardian = stand_in(killed)
    groups = set(Path("/sys/fs/cgroup").rglob("clipfs-*"))
    try:
        other.mkdir()
        (killed / "mnt").mkdir(parents=True)
        cli.base = killed / "containers"
        subprocess.run(["mount", "-t", "tmpfs", "other", other], check=True)
        mounted = record_of(clipfs.mount(tree_clip, killed / "mnt"))
        container = cli.start("run", tree_clip, "sh", "-c", "echo up; sleep 1000")
        assert container.stdout is not None
        assert container.stdout.readline() == b"up\n"
        container.kill()
        container.wait(SECONDS)
        processes = [pid for pid in guard._processes((f"{killed}/",)) if pid != guardian]
        assert len(processes) >= 3, "the container, and the supervisor and the worker of what it runs on"
        assert len(below(killed)) >= 3
        run.kill()
        assert ended(guardian)
        assert [pid for pid in (*processes, mounted.process.pid) if not ended(pid)] == []
        assert set(Path("/sys/fs/cgroup").rglob("clipfs-*")) <= groups
        assert below(tmp_path) == [str(other)], "what others have mounted is theirs"
    finally:
        run.kill()
        run.communicate()
        subprocess.run(["umount", other], check=True)
        assert cli("gc").code == 0  # records of what is no more


def test_a_run_that_ends_takes_its_guard_with_it(tmp_path: Path) -> None:
    run, guardian = stand_in(tmp_path)
    process = Process.of(guardian)
    assert process.alive
    run.communicate(timeout=SECONDS)
    assert run.returncode == 0
    assert not process.alive
