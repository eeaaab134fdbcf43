"""Nothing is left of containers: after a hundred of them, eight at a time, and whoever is killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from clipfs import state
from tests.containers import SECONDS, Cli, leftovers
from tests.mounts import ended, kill

pytest_plugins = ["tests.container_fixtures"]


def reaped(pid: int) -> bool:
    """Wait for a process of a killed parent to end; take note of it if it has become ours."""
    over = ended(pid)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return over


def running(cli: Cli, base: Path, *words: str | Path) -> tuple[subprocess.Popen[bytes], int]:
    """A container named web that is known to run, and its first process."""
    process = cli.start("run", "--rm", "-i", "--name", "web", *words, "cat")
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"up\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"up\n"
    return process, int((base / "web" / "pid").read_text())


class TestKilled:
    @pytest.mark.parametrize("runtime", ["runc", "crun"])
    @pytest.mark.parametrize("kind", ["v1", "v2"])
    def test_the_command_itself(
        self, kind: str, runtime: str, cli: Cli, base: Path, tree: Path, tree_clip: Path
    ) -> None:
        """`clipfs run` gets SIGKILL; `clipfs gc` finds the container, its mounts and what serves them."""
        process, first = running(cli, base, "--runtime", runtime, tree if kind == "v1" else tree_clip)
        servers = [record.process.pid for record in state.records()]
        assert len(servers) == (kind == "v2")
        # A living one is not touched.
        assert cli("gc") == (0, "", "")
        process.kill()
        process.wait(SECONDS)
        assert f"directory {base}/web" in leftovers(base)

        ran = cli("gc")

        assert (ran.code, ran.out) == (0, "")
        assert "removed container web\n" in ran.err
        assert all(reaped(pid) for pid in [first, *servers])
        assert leftovers(base) == []
        assert state.records() == []
        assert cli("gc") == (0, "", "")

    @pytest.mark.parametrize("line", [b"detected", b"mounted layer", b"now running"])
    def test_at_every_stage(self, line: bytes, cli: Cli, base: Path, tree_clip: Path) -> None:
        process = cli.start("-v", "run", "--rm", "--name", "web", tree_clip, "sleep", "1000")
        assert process.stderr
        while line not in (said := process.stderr.readline()):
            assert said
        process.kill()
        process.wait(SECONDS)
        pids = [record.process.pid for record in state.records()]
        with contextlib.suppress(FileNotFoundError, ValueError):
            pids.append(int((base / "web" / "pid").read_text()))
        assert "removed container web\n" in cli("gc").err
        assert all(reaped(pid) for pid in pids)
        assert leftovers(base) == []

    def test_while_the_runtime_is_at_work(self, cli: Cli, base: Path, tree: Path, tmp_path: Path) -> None:
        """It goes on without its caller, and makes a container that nobody waits for. `gc` waits for it."""
        for name in ("begun", "go"):
            os.mkfifo(tmp_path / name)
        slow = tmp_path / "slow-runtime"
        slow.write_text(
            f'#!/bin/sh\ncase "$*" in *" create "*) echo x > {tmp_path}/begun; cat {tmp_path}/go;; esac\n'
            'exec runc "$@"\n'
        )
        slow.chmod(0o755)
        process = cli.start("run", "--rm", "--name", "web", "--runtime", slow, tree, "sleep", "1000")
        (tmp_path / "begun").read_text()
        process.kill()
        process.wait(SECONDS)
        # Whatever happens now, the runtime goes on when this is closed.
        with (tmp_path / "go").open("w"):
            gc = cli.start("-v", "gc")
            assert gc.stderr
            assert gc.stderr.readline() == b"INFO waiting for the runtime of container_id=web\n"
            # Without the lock it would be through in a hundredth of this.
            assert not select.select([gc.stderr], [], [], 0.3)[0]
        assert gc.stderr.read() == b"removed container web\n"
        assert gc.wait(SECONDS) == 0
        assert leftovers(base) == []

    @pytest.mark.parametrize("both", [False, True])
    def test_the_runtime_itself(self, both: bool, cli: Cli, base: Path, tree: Path, tmp_path: Path) -> None:
        """In the middle of `create`: what it has made of control groups it has told nobody."""
        for name in ("begun", "go"):
            os.mkfifo(tmp_path / name)
        groups = next(each for each in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")) if each.is_dir())
        killed = tmp_path / "killed-runtime"
        killed.write_text(
            rf"""#!/bin/sh
            case "$*" in *" create "*)
                group=$(sed -n 's/.*cgroupsPath": "\(.*\)".*/\1/p' {base}/web/config.json)
                mkdir -p {base}/web/runtime/web {groups}/$group
                echo x > {tmp_path}/begun; cat {tmp_path}/go; kill -9 $$;;
            esac
            exec runc "$@"
            """
        )
        killed.chmod(0o755)
        process = cli.start("run", "--rm", "--name", "web", "--runtime", killed, tree, "true")
        (tmp_path / "begun").read_text()
        assert list(groups.glob("clipfs-web-*"))
        if both:
            process.kill()
            process.wait(SECONDS)
        (tmp_path / "go").write_text("")
        assert process.wait(SECONDS) == (-signal.SIGKILL if both else 125)
        assert cli("gc").err == ("removed container web\n" if both else "")
        assert list(groups.glob("clipfs-web-*")) == []

    def test_the_container(self, cli: Cli, base: Path, tree_clip: Path) -> None:
        process, first = running(cli, base, tree_clip)
        os.kill(first, signal.SIGKILL)
        assert process.wait(SECONDS) == 137
        assert leftovers(base) == []

    def test_one_of_the_same_name_elsewhere(self, cli: Cli, base: Path, tree: Path, tmp_path: Path) -> None:
        """A name is taken in its base only; what ends there is another container."""
        process, _ = running(cli, base, "--runtime", "crun", tree)
        words = ("run", "--rm", "--base", tmp_path / "elsewhere", "--name", "web", "--runtime", "crun", tree, "true")
        assert cli(*words) == (0, "", "")
        assert process.stdin
        process.stdin.close()
        assert process.wait(SECONDS) == 0

    def test_what_serves_its_root(self, cli: Cli, base: Path, tree_clip: Path) -> None:
        """The container goes on with what it has; its end is still an end."""
        process, _ = running(cli, base, tree_clip)
        (record,) = state.records()
        kill(record)
        assert process.stdin
        process.stdin.close()
        process.wait(SECONDS)
        assert process.stderr
        assert b"Traceback" not in process.stderr.read()
        cli("gc")
        assert leftovers(base) == []
        assert state.records() == []

    def test_processes_that_the_command_left_behind(self, cli: Cli, base: Path, tree: Path) -> None:
        """They end with the first one, also those that ignore every signal and hold our pipes."""
        script = "(trap '' HUP TERM INT; sleep 1000) & exit 3"
        assert cli("run", "--rm", tree, "sh", "-c", script) == (3, "", "")
        assert leftovers(base) == []


@pytest.mark.slow
class TestMany:
    def test_a_hundred_in_a_row(self, cli: Cli, base: Path, tree_clip: Path) -> None:
        before = open_files()
        for number in range(100):
            # Now and then one that is killed, or never starts.
            script = {0: "kill -9 -1; exit 9", 1: "exec /no/such"}.get(number % 10, f"echo {number}")
            ran = cli("run", "--rm", tree_clip, "sh", "-c", script)
            assert ran.code == {0: 9, 1: 127}.get(number % 10, 0), ran
            assert leftovers(base) == []
            assert state.records() == []
        assert open_files() == before

    def test_eight_at_a_time(self, cli: Cli, base: Path, tree_clip: Path) -> None:
        """Three rounds; in the second one all are ended by SIGTERM, in the third by SIGKILL to `clipfs run`."""
        for how in (None, signal.SIGTERM, signal.SIGKILL):
            processes = [cli.start("run", "--rm", "-i", tree_clip, "cat") for _ in range(8)]
            for number, process in enumerate(processes):
                assert process.stdin
                process.stdin.write(b"%d\n" % number)
                process.stdin.flush()
            for number, process in enumerate(processes):
                assert process.stdout
                assert select.select([process.stdout], [], [], SECONDS)[0]
                assert process.stdout.readline() == b"%d\n" % number
            firsts = [int(path.read_text()) for path in base.glob("*/pid")]
            servers = [record.process.pid for record in state.records()]
            assert (len(firsts), len(servers)) == (8, 8)
            for process in processes:
                assert process.stdin
                process.send_signal(how) if how else process.stdin.close()
            codes = {None: 0, signal.SIGTERM: 143, signal.SIGKILL: -9}
            assert [process.wait(SECONDS) for process in processes] == [codes[how]] * 8
            if how == signal.SIGKILL:
                assert cli("gc").err.count("removed container") == 8
            assert all(reaped(pid) for pid in firsts + servers)
            assert leftovers(base) == []
            assert state.records() == []


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))
