"""``clipfs run`` between a person and a command: bytes, ends of files, signals, terminals."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import random
import select
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

import assembler
import clipfs
from clipfs.cli.main import main
from clipfs.mounting import mounter
from tests.conftest import require_programs
from tests.containers import SECONDS, Cli, leftovers
from tests.images import LayoutBuilder
from tests.mounts import ended

pytest_plugins = ["tests.container_fixtures"]

# Every byte there is, more than any pipe holds, and no round number of pieces.
BYTES = bytes(range(256)) * 5000 + random.Random(1).randbytes(3_000_001)


@pytest.fixture(autouse=True)
def _nothing_left(base: Path) -> Iterator[None]:
    yield
    assert leftovers(base) == []


class TestPipes:
    def test_bytes_pass_through_both_ways(self, cli: Cli, tree: Path) -> None:
        words = cli.words("run", "--rm", "-i", tree, "sh", "-c", "cat; echo err >&2")
        done = subprocess.run(words, input=BYTES, capture_output=True, timeout=SECONDS, check=False, env=cli.env)
        assert (done.returncode, done.stderr) == (0, b"err\n")
        assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(BYTES).digest()

    def test_much_on_both_outputs_at_once(self, cli: Cli, tree: Path) -> None:
        script = "head -c 1000000 /dev/zero >&2 & head -c 1000000 /dev/zero; wait"
        ran = cli("run", "--rm", tree, "sh", "-c", script)
        assert (ran.code, len(ran.out), len(ran.err)) == (0, 1_000_000, 1_000_000)

    @pytest.mark.parametrize("stats", [[], ["--stats"]])
    def test_a_reader_that_leaves(self, cli: Cli, tree_clip: Path, stats: list[str]) -> None:
        """As in `clipfs run … | head -1`."""
        process = cli.start("run", "--rm", *stats, tree_clip, "yes")
        assert process.stdout
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(SECONDS) != 0
        assert process.stderr
        said = process.stderr.read()
        assert b"Traceback" not in said
        assert b"Broken pipe" in said

    @pytest.mark.parametrize("stats", [[], ["--stats"]])
    def test_a_non_blocking_pipe_loses_nothing(self, cli: Cli, tree_clip: Path, stats: list[str]) -> None:
        """Programs that share it with us, those with event loops say, make it so. Here it is full at first."""
        reader, writer = os.pipe()
        with open(reader, "rb") as ours:
            try:
                os.set_blocking(writer, False)
                filled = os.write(writer, bytes(1 << 20))
                # What the container's own pipe takes, so that it can say that it is done.
                script = "head -c 60000 /dev/zero; echo done >&2"
                process = cli.start("run", "--rm", *stats, tree_clip, "sh", "-c", script, stdout=writer)
            finally:
                os.close(writer)
            assert process.stderr
            assert process.stderr.readline() == b"done\n"
            assert len(ours.read()) == filled + 60_000
            assert process.wait(SECONDS) == 0

    def test_without_i_standard_input_stays_the_callers(self, cli: Cli, tree: Path) -> None:
        script = '"$@"; cat'
        words = ["sh", "-c", script, "sh", *cli.words("run", "--rm", tree, "wc", "-c")]
        done = subprocess.run(words, input=b"rest", capture_output=True, timeout=SECONDS, check=False, env=cli.env)
        assert done.stdout == b"0\nrest"

    def test_a_command_that_reads_no_input_ends_all_the_same(self, cli: Cli, tree: Path) -> None:
        process = cli.start("run", "--rm", "-i", tree, "true")
        assert process.wait(SECONDS) == 0

    def test_a_conversation(self, cli: Cli, tree: Path) -> None:
        """Nothing waits for a buffer to be full."""
        process = cli.start("run", "--rm", "-i", tree, "cat")
        assert process.stdin
        assert process.stdout
        for number in range(3):
            process.stdin.write(b"%d\n" % number)
            process.stdin.flush()
            assert process.stdout.readline() == b"%d\n" % number
        process.stdin.close()
        assert process.wait(SECONDS) == 0

    @pytest.mark.parametrize(
        ("closed", "out", "err"), [("<&-", b"0\n", b"err\n"), (">&-", b"", b"err\n"), ("2>&-", b"0\n", b"")]
    )
    def test_streams_that_are_closed(self, cli: Cli, tree: Path, closed: str, out: bytes, err: bytes) -> None:
        """The next file to be opened must not be taken for one of them."""
        words = cli.words("run", "--rm", "-i", tree, "sh", "-c", "wc -c; echo err >&2")
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {closed}', "sh", *words],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False, env=cli.env,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, out, err)

    def test_a_full_disk_is_the_commands_to_notice(self, cli: Cli, tree: Path) -> None:
        with open("/dev/full", "wb") as full:
            process = cli.start("run", "--rm", tree, "yes", stdout=full)
            assert process.wait(SECONDS) != 0

    def test_stats_that_nobody_takes_do_not_count(self, cli: Cli, tree_clip: Path) -> None:
        with open("/dev/full", "wb") as full:
            process = cli.start("run", "--rm", "--stats", tree_clip, "sh", "-c", "exit 3", stderr=full)
            assert process.wait(SECONDS) == 3

    def test_files_of_the_caller_are_not_given_away(self, cli: Cli, tree: Path, tmp_path: Path) -> None:
        """A runtime makes a container's user the owner of its standard streams."""
        with open(tmp_path / "out", "wb") as out:
            process = cli.start("run", "--rm", "-u", "app", tree, "echo", "x", stdout=out, stderr=out, stdin=out)
            assert process.wait(SECONDS) == 0
        assert (tmp_path / "out").read_bytes() == b"x\n"
        assert (tmp_path / "out").stat().st_uid == 0


class TestSignals:
    TRAPS = (
        'for s in HUP INT QUIT TERM USR1 USR2 ALRM ABRT 37; do trap "echo $s; exit 5" $s; done; echo up;'
        "while :; do sleep 0.05; done"
    )

    @pytest.mark.parametrize("name", ["HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "ALRM", "ABRT", "37"])
    def test_reach_the_command(self, cli: Cli, tree: Path, name: str) -> None:
        process = cli.start("run", "--rm", tree, "sh", "-c", self.TRAPS)
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        process.send_signal(int(name) if name.isdecimal() else getattr(signal, f"SIG{name}"))
        assert process.stdout.read() == name.encode() + b"\n"
        assert process.wait(SECONDS) == 5

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGALRM, 142)])
    def test_end_a_command_that_does_not_care(self, cli: Cli, tree_clip: Path, number: int, code: int) -> None:
        process = cli.start("run", "--rm", "-i", tree_clip, "cat")
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"up\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.wait(SECONDS) == code
        assert process.stderr
        assert process.stderr.read() == b""

    def test_a_new_size_of_the_window_costs_no_output(self, cli: Cli, base: Path, tree: Path) -> None:
        """As in `clipfs run … | less`: the command has ended long before all has been read."""
        # More than our pipe holds, and less than that and the container's together.
        script = "echo begun >&2; exec head -c 100000 /dev/zero"
        process = cli.start("run", "--rm", "--name", "web", tree, "sh", "-c", script)
        assert process.stdout
        assert process.stderr
        assert process.stderr.readline() == b"begun\n"
        assert ended(int((base / "web" / "pid").read_text()))
        process.send_signal(signal.SIGWINCH)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert len(process.stdout.read()) == 100_000
        assert process.wait(SECONDS) == 0

    @pytest.mark.parametrize("stats", [[], ["--stats"]])
    def test_end_us_when_nobody_reads(self, cli: Cli, base: Path, tree_clip: Path, stats: list[str]) -> None:
        """The first one is for the command, the second one for the wait for a reader."""
        process = cli.start("run", "--rm", "--name", "web", *stats, tree_clip, "yes")
        assert process.stdout
        assert process.stdout.read(1) == b"y"
        process.terminate()
        assert ended(int((base / "web" / "pid").read_text()))
        # Not only once: it may not have noticed the end of the command yet. One more may come when all is done.
        deadline = time.monotonic() + SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            process.terminate()
            time.sleep(0.05)
        assert process.poll() in (143, -signal.SIGTERM)
        assert leftovers(base) == []

    def test_an_images_stop_signal(self, cli: Cli, tree_layer: bytes, tmp_path: Path) -> None:
        image = LayoutBuilder(tmp_path / "oci").layer(tree_layer).config(stop_signal="SIGUSR2").write()
        process = cli.start("run", "--rm", image, "sh", "-c", self.TRAPS)
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        process.terminate()
        assert process.communicate(timeout=SECONDS)[0] == b"USR2\n"

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    @pytest.mark.parametrize("line", [b"detected", b"mounted layer", b"now running"])
    def test_at_every_stage_leave_nothing(self, cli: Cli, tree_clip: Path, number: int, line: bytes) -> None:
        """Sent the moment that the log says how far it is; what was made by then goes."""
        process = cli.start("-v", "run", "--rm", tree_clip, "sleep", "1000")
        assert process.stderr
        while line not in (said := process.stderr.readline()):
            assert said
        process.send_signal(number)
        assert process.wait(SECONDS) == 128 + number

    @pytest.mark.parametrize(("number", "view"), [(signal.SIGTERM, "kernel"), (signal.SIGINT, "fuse")])
    def test_while_the_image_is_silent(self, cli: Cli, tree_clip: Path, tmp_path: Path, number: int, view: str) -> None:
        """Nothing but SIGKILL interrupts a read of a file; who waits for one is not to be seen waiting."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            source = f"docker://127.0.0.1:{silent.getsockname()[1]}/x:y"
            process = cli.start("-v", "run", "--rm", "--source", source, "--insecure", "--view", view,
                                "--cache-dir", tmp_path / "cache", tree_clip, "sleep", "1000")  # fmt: skip
            assert process.stderr
            while b"mounted layer" not in (said := process.stderr.readline()):
                assert said
            process.send_signal(number)
            assert process.wait(SECONDS) == 128 + number

    @pytest.mark.parametrize("view", ["kernel", "fuse"])
    def test_while_the_runtime_waits_for_the_image(self, cli: Cli, tree: Path, tmp_path: Path, view: str) -> None:
        """It reads /etc/group itself, also when nobody else has to."""
        tar = subprocess.run(["tar", "-C", tree, "-c", "bin", "etc/group"], stdout=subprocess.PIPE, check=True).stdout
        clip = tmp_path / "x.clip"
        clipfs.build(LayoutBuilder(tmp_path / "oci").layer(tar).config().write(), clip)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            source = f"docker://127.0.0.1:{silent.getsockname()[1]}/x:y"
            process = cli.start("run", "--rm", "-u", "0:0", "--source", source, "--insecure", "--view", view,
                                "--name", "web", "--cache-dir", tmp_path / "cache", clip, "sleep", "1000")  # fmt: skip
            state = cli.base / "web" / "runtime" / "web"
            deadline = time.monotonic() + SECONDS
            while not state.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            process.terminate()
            assert process.wait(SECONDS) == 143

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_while_it_mounts(
        self, base: Path, tree_clip: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = mounter.mount

        def interrupted(*given: Any, **named: Any) -> mounter.Mount:
            os.kill(os.getpid(), number)
            return real(*given, **named)

        monkeypatch.setattr(mounter, "mount", interrupted)
        assert main(["run", "--rm", "--base", str(base), str(tree_clip), "sleep", "1000"]) == code


class Terminal:
    """A terminal with the command on it, as a person has one: what is typed, and what comes on the screen."""

    def __init__(self, cli: Cli, *words: str | Path, rows: int = 31, columns: int = 97, **how: Any) -> None:
        require_programs("setsid")
        self.master, self.slave = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(self.slave)
        # Its controlling terminal, so that a change of size is a signal to it.
        streams = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave}
        self.process = cli.start(*words, by=("setsid", "--ctty"), **{**streams, **how})
        self._seen = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(SECONDS)
        self.close()
        os.close(self.slave)

    def close(self) -> None:
        if self.master >= 0:
            os.close(self.master)
        self.master = -1

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def until(self, text: bytes) -> bytes:
        """Wait for `text`; what has come on the screen up to its end since the last call."""
        deadline = time.monotonic() + SECONDS
        while text not in self._seen:
            ready = select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"{text!r} did not come, only {self._seen!r}"
            self._seen += os.read(self.master, 4096)
        before, _, self._seen = self._seen.partition(text)
        return before + text

    def ended(self) -> int:
        """The exit code; by then the terminal is as it was."""
        code = self.process.wait(SECONDS)
        assert termios.tcgetattr(self.slave) == self.before
        return code


class TestTerminal:
    @pytest.mark.parametrize("runtime", ["runc", "crun"])
    def test_it_is_one_of_the_size_of_ours(self, cli: Cli, tree: Path, runtime: str) -> None:
        with Terminal(
            cli, "run", "--rm", "-it", "--runtime", runtime, tree, "sh", "-c", "tty; stty size; exit 4"
        ) as tty:
            assert tty.until(b"31 97\r\n") == b"/dev/pts/0\r\n31 97\r\n"
            assert tty.ended() == 4

    def test_another_user_owns_it_and_ours_stays_ours(self, cli: Cli, tree: Path) -> None:
        script = "echo x > $(tty); stat -c %u $(tty)"
        with Terminal(cli, "run", "--rm", "-it", "-u", "app", tree, "sh", "-c", script) as tty:
            tty.until(b"x\r\n1000\r\n")
            assert tty.ended() == 0
            assert os.fstat(tty.slave).st_uid == os.getuid()

    def test_a_shell(self, cli: Cli, tree_clip: Path) -> None:
        with Terminal(cli, "run", "--rm", "-it", tree_clip, "sh") as tty:
            tty.until(b"# ")
            tty.type(b"echo $((6*7))\n")
            tty.until(b"42\r\n")
            tty.until(b"# ")
            # Ctrl-C ends what runs in the shell, and not the shell; Ctrl-D ends the shell.
            tty.type(b"sh -c 'echo begun; exec sleep 1000'\n")
            tty.until(b"\r\nbegun\r\n")
            tty.type(b"\x03")
            tty.until(b"# ")
            tty.type(b"echo code $?\n")
            tty.until(b"code 130\r\n")
            tty.until(b"# ")
            tty.type(b"\x04")
            assert tty.ended() == 0

    def test_a_new_size_is_passed_on(self, cli: Cli, tree: Path) -> None:
        script = "trap 'stty size; exit 6' WINCH; echo up; while :; do sleep 0.05; done"
        with Terminal(cli, "run", "--rm", "-it", tree, "sh", "-c", script) as tty:
            tty.until(b"up\r\n")
            tty.resize(12, 34)
            tty.until(b"12 34\r\n")
            assert tty.ended() == 6

    def test_ctrl_c_without_t(self, cli: Cli, tree: Path) -> None:
        """Then it is our terminal that makes a signal of it, for us to pass on."""
        with Terminal(
            cli,
            "run",
            "--rm",
            "-i",
            tree,
            "sh",
            "-c",
            "trap 'echo caught; exit 5' INT; echo up; while :; do sleep 0.05; done",
        ) as tty:
            tty.until(b"up\r\n")
            tty.type(b"\x03")
            tty.until(b"caught\r\n")
            assert tty.ended() == 5

    def test_a_sigterm_gives_the_terminal_back(self, cli: Cli, tree: Path) -> None:
        with Terminal(cli, "run", "--rm", "-it", tree, "cat") as tty:
            tty.type(b"up\n")
            tty.until(b"up\r\nup\r\n")
            assert termios.tcgetattr(tty.slave) != tty.before
            tty.process.terminate()
            assert tty.ended() == 143

    def test_a_window_that_is_closed(self, cli: Cli, base: Path, tree: Path) -> None:
        """It ends the command, and costs nothing that the command has written."""
        with Terminal(cli, "run", "--name", "web", "-it", tree, "sh", stderr=subprocess.PIPE) as tty:
            tty.type(b"echo x > /workspace/x; echo do''ne\n")
            tty.until(b"done\r\n")
            tty.close()
            assert tty.process.wait(SECONDS) == 128 + signal.SIGHUP
            assert tty.process.stderr
            assert tty.process.stderr.read() == b""
        assert (base / "web" / "layer-0" / "upper" / "workspace" / "x").read_text() == "x\n"
        assert assembler.gc(base, kept=True) == ["web"]

    @pytest.mark.parametrize("typed", [b"abc", b"abc\n", b""])
    def test_the_end_of_a_pipe_is_the_end(self, cli: Cli, tree: Path, typed: bytes) -> None:
        """In the middle of a line too, where one Ctrl-D is not enough."""
        ran = cli("run", "--rm", "-it", tree, "sh", "-c", "cat | md5sum", input=typed)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.endswith(f"{hashlib.md5(typed).hexdigest()}  -\r\n")

    @pytest.mark.parametrize("runtime", ["runc", "crun"])
    def test_a_reader_that_leaves(self, cli: Cli, tree: Path, runtime: str) -> None:
        """As with a pipe, also while somebody may still type."""
        process = cli.start("run", "--rm", "-it", "--runtime", runtime, tree, "yes")
        assert process.stdout
        assert process.stdout.readline() == b"y\r\n"
        process.stdout.close()
        assert process.wait(SECONDS) != 0
        assert process.stderr
        assert process.stderr.read() == b""

    def test_input_from_a_pipe(self, cli: Cli, tree: Path) -> None:
        """-t without a terminal of our own: the container has one, and the end of the pipe is its Ctrl-D."""
        ran = cli("run", "--rm", "-it", tree, "sh", "-c", "stty -echo; tty; cat", input=b"typed\n")
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.endswith("typed\r\n")
        assert "/dev/pts/0\r\n" in ran.out
