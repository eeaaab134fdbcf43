"""Real containers by library: on an unpacked tree (v1) and on a ClipFS (v2), by runc and by crun."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import assembler
import clipfs
from assembler import RunError, Volume
from assembler.runner import Archive
from tests.containers import CONFIG, SECONDS, Box, busybox_root, leftovers
from tests.images import LayoutBuilder
from tests.mounts import VIEWS, in_view
from tests.tars import Tar

pytest_plugins = ["tests.container_fixtures"]

SIX = "755 /dev\n555 /proc\n555 /sys\n1777 /tmp\n755 /volumes\n755 /workspace\n"


@pytest.fixture(scope="module", params=["v1", "v2_kernel", "v2_fuse"])
def lower(request: pytest.FixtureRequest) -> Path:
    """All kinds of lower, none of which has a single one of the six directories."""
    root: Path = request.getfixturevalue(request.param)
    assert sorted(os.listdir(root)) == ["bin", "etc"]
    return root


@pytest.fixture(params=["runc", "crun"])
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def everywhere(lower: Path, runtime: str, base: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """A box on each kind of lower, with each runtime."""
    box = Box(lower, base, capfd)
    return lambda *command, **options: box(*command, runtime=runtime, **options)


class TestEverywhere:
    def test_the_six_are_there(self, everywhere: Box) -> None:
        ran = everywhere("sh", "-c", "stat -c '%a %n' /dev /proc /sys /tmp /volumes /workspace; ls /proc/1/exe")
        # The runtime has mounted its own on three of them.
        assert ran == (0, SIX + "/proc/1/exe\n", "")

    def test_streams_and_exit_code(self, everywhere: Box) -> None:
        assert everywhere("sh", "-c", "echo out; echo err >&2; exit 37") == (37, "out\n", "err\n")

    def test_it_can_write_and_the_lower_stays(self, everywhere: Box, lower: Path) -> None:
        assert (
            everywhere("sh", "-c", "echo x > /etc/passwd; rm -r /bin/cat; touch /workspace/a; ls /workspace").out
            == "a\n"
        )
        assert (lower / "etc" / "passwd").read_text().startswith("root:")
        assert sorted(os.listdir(lower)) == ["bin", "etc"]

    def test_another_user_can_write_tmp(self, everywhere: Box) -> None:
        ran = everywhere(
            "sh", "-c", "id -u; id -g; id -G; echo x > /tmp/x && cat /tmp/x; touch /workspace/x", user="app"
        )
        assert ran.out == "1000\n1000\n1000 10 77\nx\n"
        assert "Permission denied" in ran.err

    @pytest.mark.parametrize(
        ("command", "code", "sentence"),
        [("no-such-program", 127, "no-such-program"), ("/etc", 126, "/etc"), ("/etc/passwd", 126, "/etc/passwd")],
    )
    def test_what_cannot_be_executed(self, everywhere: Box, command: str, code: int, sentence: str) -> None:
        with pytest.raises(RunError, match=sentence) as caught:
            everywhere(command)
        assert caught.value.exit_code == code

    def test_killed(self, everywhere: Box) -> None:
        ran = everywhere("sleep", "1000", on_started=lambda pid: os.kill(pid, signal.SIGKILL))
        assert ran.code == 128 + signal.SIGKILL

    def test_out_of_memory(self, everywhere: Box) -> None:
        assert everywhere("tail", "/dev/zero", memory=16 << 20).code == 128 + signal.SIGKILL

    def test_isolation(self, everywhere: Box) -> None:
        ran = everywhere(
            "sh",
            "-c",
            "hostname; echo $$; ls /sys/class/net; head -c 1 /dev/zero | wc -c; grep CapEff /proc/self/status;"
            "echo 1 > /proc/sys/kernel/x; touch /sys/x; mknod /workspace/sda b 8 0 && head -c 1 /workspace/sda",
            network="none",
            hostname="box",
        )
        assert ran.out == "box\n1\nlo\n1\nCapEff:\t00000000a80425fb\n"
        assert ran.code != 0
        assert len(ran.err.splitlines()) == 3

    def test_a_volume_and_a_tmpfs_below_links(self, everywhere: Box, tmp_path: Path) -> None:
        """Links of the image lead inside the image, also those that a mount is asked for."""
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "file").write_text("data\n")
        ran = everywhere(
            "sh", "-c", "cat /new/place/file; touch /new/place/x; echo y > /own/file && ls /own",
            volumes=(Volume(tmp_path / "data", "/new/place", read_only=True), Volume(tmp_path, "/own")),
        )  # fmt: skip
        assert ran.out == "data\ncontainers\ndata\nfile\n"
        assert (tmp_path / "file").read_text() == "y\n"
        assert "Read-only file system" in ran.err


@pytest.mark.parametrize("archive", ["v1", "v2 (OCI)"])
def test_the_three_lines(lower: Path, base: Path, caplog: pytest.LogCaptureFixture, archive: Archive) -> None:
    options = assembler.RunOptions(command=("true",), name="web", remove=True)
    with caplog.at_level("INFO", "assembler"):
        assert assembler.run(lower, CONFIG, options, base, archive=archive) == 0
    assert caplog.messages == [
        f"detected {archive} archive format",
        "mounted layer container_id=web layer_index=0",
        "container is now running container_id=web",
    ]


class TestLayouts:
    """Images that have one of the six, in all the ways there are."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return busybox_root(tmp_path / "root")

    @pytest.fixture
    def here(self, root: Path, base: Path, capfd: pytest.CaptureFixture[str]) -> Box:
        return Box(root, base, capfd)

    @pytest.mark.parametrize("name", ["tmp", "workspace"])
    @pytest.mark.parametrize(
        ("target", "real"),
        [
            ("/var/there", "var/there"), ("var/there", "var/there"), ("/new/place", "new/place"), ("hop", "var/there"),
            ("../../../outside", "outside"), ("/bin/../../../../etc/x", "etc/x"),
        ],
    )  # fmt: skip
    def test_a_link(self, name: str, target: str, real: str, root: Path, here: Box) -> None:
        (root / "var" / "there").mkdir(parents=True)
        (root / "hop").symlink_to("/var/../var/there")
        (root / name).symlink_to(target)
        ran = here("sh", "-c", f"touch /{name}/x && ls /{real} && stat -c %F /{name}")
        assert ran == (0, "x\nsymbolic link\n", "")
        assert not (root / "outside").exists()

    @pytest.mark.parametrize("name", ["proc", "sys", "dev"])
    @pytest.mark.parametrize("up", ["", "/.." * 20, "../" * 20])
    def test_a_link_where_the_runtime_mounts(
        self, name: str, up: str, root: Path, here: Box, runtime: str, tmp_path: Path
    ) -> None:
        """The host's directory that it names stays as it is: runtimes make devices and links where it leads."""
        victim = tmp_path / "victim"
        victim.mkdir()
        (victim / "ptmx").touch()
        (root / name).symlink_to(f"{up}{victim}")
        with pytest.raises(clipfs.ImageError, match=f"needs a directory /{name}, but the image has a symbolic link"):
            here("true", runtime=runtime)
        assert os.listdir(victim) == ["ptmx"]
        assert (victim / "ptmx").is_file()

    @pytest.mark.parametrize("name", ["tmp", "workspace", "proc"])
    def test_a_file(self, name: str, root: Path, here: Box) -> None:
        (root / name).write_text("")
        with pytest.raises(
            clipfs.ImageError, match=f"needs a directory /{name}, but the image has a regular file there"
        ):
            here("true")

    def test_tmp_as_the_image_has_it(self, root: Path, here: Box) -> None:
        (root / "tmp").mkdir()
        (root / "tmp" / "file").touch()
        (root / "tmp").chmod(0o1777)
        os.utime(root / "tmp", (1_500_000_000, 1_500_000_000))
        ran = here("sh", "-c", "stat -c '%a %u %Y' /tmp; ls /tmp; echo x > /tmp/mine && cat /tmp/mine", user="1000")
        assert ran == (0, "1777 0 1500000000\nfile\nx\n", "")

    @pytest.mark.parametrize(("mode", "code"), [(0o755, 1), (0o700, 1), (0o777, 0)])
    def test_tmp_that_others_may_not_write_stays_so(self, mode: int, code: int, root: Path, here: Box) -> None:
        (root / "tmp").mkdir()
        (root / "tmp").chmod(mode)
        assert here("touch", "/tmp/x", user="1000").code == code
        assert here("touch", "/tmp/x").code == 0


class TestImageConfig:
    def test_everything_at_once(self, box: Box) -> None:
        box.config = replace(
            CONFIG,
            env=("A=image", "B=image"),
            entrypoint=("sh", "-c"),
            cmd=("pwd; id -un; echo $A $B $HOME; touch /data/x",),
            working_dir="/srv/app",
            user="app",
            volumes=("/data",),
        )
        ran = box(env=("B=user",))
        assert ran.out == "/srv/app\napp\nimage user /home/app\n"
        assert "Permission denied" in ran.err

    def test_a_volume_is_writable_on_a_read_only_root(self, box: Box) -> None:
        box.config = replace(CONFIG, volumes=("/data",))
        ran = box("sh", "-c", "echo x > /data/x && cat /data/x; touch /y; touch /tmp/z", read_only=True)
        assert ran.out == "x\n"
        assert ran.err.count("Read-only file system") == 2

    @pytest.mark.parametrize(
        ("stop", "sent", "seen"),
        [
            ("", signal.SIGTERM, "TERM"),
            ("SIGQUIT", signal.SIGTERM, "QUIT"),
            ("10", signal.SIGTERM, "USR1"),
            (f"SIGRTMAX-{signal.SIGRTMAX - 10}", signal.SIGTERM, "USR1"),
            ("nonsense", signal.SIGTERM, "TERM"),
            pytest.param("9" * 5000, signal.SIGTERM, "TERM", id="huge"),
            ("SIGQUIT", signal.SIGINT, "INT"),
        ],
    )
    def test_the_stop_signal_takes_the_place_of_sigterm(self, box: Box, stop: str, sent: int, seen: str) -> None:
        box.config = replace(CONFIG, stop_signal=stop)
        traps = "; ".join(f"trap 'echo {each}; exit 5' {each}" for each in ("TERM", "INT", "QUIT", "USR1"))
        # It is our own signal, sent when the command says that it is ready.
        with Told(box.base.parent / "ready", lambda: os.kill(os.getpid(), sent)) as volume:
            ran = box("sh", "-c", f"{traps}; echo > /ready/pipe; while :; do sleep 0.05; done", volumes=(volume,))
        assert ran == (5, f"{seen}\n", "")

    @pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
    def test_a_signal_that_nobody_handles_ends_it(self, box: Box, sent: int, code: int) -> None:
        """The kernel would spare the first process of a pid namespace."""
        assert box("sleep", "1000", on_started=lambda _: os.kill(os.getpid(), sent)).code == code

    def test_a_command_may_call_itself_anything(self, box: Box) -> None:
        """Its name stands where the kernel says which signals it handles."""
        with Told(box.base.parent / "ready", lambda: os.kill(os.getpid(), signal.SIGTERM)) as volume:
            command = "printf '\\377\\rSigIgn:x' > /proc/1/comm; echo > /ready/pipe; while :; do sleep 0.05; done"
            assert box("sh", "-c", command, volumes=(volume,)) == (143, "", "")


class Told:
    """A volume with a pipe in it; what the container writes to it makes us act."""

    def __init__(self, directory: Path, act: Callable[[], object]) -> None:
        self.directory = directory
        self.thread = threading.Thread(target=self._wait)
        self.act = act

    def __enter__(self) -> Volume:
        self.directory.mkdir()
        os.mkfifo(self.directory / "pipe")
        # Open for writing too, so that neither side ever waits for the other in open.
        self.fd = os.open(self.directory / "pipe", os.O_RDWR)
        self.thread.start()
        return Volume(self.directory, "/ready")

    def __exit__(self, *_: object) -> None:
        os.write(self.fd, b"end")
        self.thread.join(SECONDS)
        os.close(self.fd)

    def _wait(self) -> None:
        if os.read(self.fd, 10) != b"end":
            self.act()


class TestTeardown:
    @pytest.mark.parametrize(
        ("options", "kind"),
        [
            ({"runtime": "no-such-runtime"}, RunError),
            ({"user": "nobody-knows"}, clipfs.UsageError),
            ({"volumes": (Volume(Path("/no/such"), "/x"),)}, clipfs.UsageError),
            ({"volumes": (Volume(Path("/etc/hostname"), "/etc/passwd/x"),)}, RunError),
            ({"required": ("/etc/passwd",)}, clipfs.ImageError),
            ({"tmpfs": ("/x:no=such",)}, RunError),
            ({"env": (os.fsdecode(b"A=\xff"),)}, clipfs.UsageError),
            ({"runtime": "/bin/false"}, RunError),
        ],
    )
    def test_of_what_never_ran(self, box: Box, options: dict[str, Any], kind: type[Exception]) -> None:
        with pytest.raises(kind):
            box("true", **options)
        assert leftovers(box.base) == []

    @pytest.mark.parametrize("step", ["create", "start", "delete"])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_from_halfway(self, box: Box, step: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """An interrupt at any step: what was there by then is gone, at the latest after `gc`."""
        from assembler.runtime import Runtime

        real = getattr(Runtime, step)

        def interrupted(self: Runtime, *given: Any) -> Any:
            if when == "after":
                real(self, *given)
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(Runtime, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            box(*(("true",) if step == "delete" else ("sleep", "1000")))
        assembler.gc(box.base)
        _reap_adopted()
        assert leftovers(box.base) == []

    def test_a_signal_ends_the_seeding(
        self, box: Box, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An image may want any number of directories; a signal does not wait for them."""

        def endless(*_: object) -> tuple[str, ...]:
            os.kill(os.getpid(), signal.SIGTERM)
            return tuple(f"/{number}" for number in range(10))

        monkeypatch.setattr("assembler.runner.required_directories", endless)
        with caplog.at_level("INFO", "assembler"):
            assert box("true").code == 143
        assert caplog.messages == ["detected v1 archive format"]
        assert leftovers(box.base) == []

    def test_an_exception_of_the_caller(self, box: Box) -> None:
        def failing(_: int) -> None:
            raise RuntimeError("of the caller")

        with pytest.raises(RuntimeError, match="of the caller"):
            box("sleep", "1000", on_started=failing)
        assert leftovers(box.base) == []

    def test_the_caller_is_what_it_was_before(self, box: Box) -> None:
        def seen() -> tuple[object, ...]:
            reaper = ctypes.c_int()
            ctypes.CDLL(None).prctl(37, ctypes.byref(reaper), 0, 0, 0)
            handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGWINCH)]
            return reaper.value, handlers, sorted(os.listdir("/proc/self/fd")), threading.active_count()

        before = seen()
        assert box("true").code == 0
        assert seen() == before

    def test_eight_at_a_time_in_one_process(self, v1: Path, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
        codes: dict[int, int] = {}

        def one(number: int) -> None:
            options = assembler.RunOptions(command=("sh", "-c", f"exit {number}"), remove=True)
            codes[number] = assembler.run(v1, CONFIG, options, base)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert codes == {number: number for number in range(8)}

    def test_without_remove_it_stays_until_gc_is_told(self, v1: Path, base: Path) -> None:
        options = assembler.RunOptions(command=("touch", "/workspace/x"), name="web")
        assert assembler.run(v1, CONFIG, options, base) == 0
        assert (base / "web" / "layer-0" / "upper" / "workspace" / "x").exists()
        assert assembler.gc(base) == []
        with pytest.raises(clipfs.UsageError, match="a container web already"):
            assembler.run(v1, CONFIG, options, base)
        assert assembler.gc(base, kept=True) == ["web"]


def _reap_adopted() -> None:
    """Children left by a run that was interrupted in `create`, dead by now."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def test_names_of_the_image_that_are_no_text(tree_layer: bytes, base: Path, tmp_path: Path, capfd: Any) -> None:
    """Commas, colons, newlines and bytes in the image and in every path of the overlay."""
    odd = b"odd ,:\\=\n\xff"
    root = tmp_path / os.fsdecode(odd)
    layout = LayoutBuilder(tmp_path / "oci").layer(tree_layer).layer(Tar().file(odd, b"found\n"))
    clipfs.build(layout.config().write(), tmp_path / "odd.clip")
    root.mkdir()
    with clipfs.mount(tmp_path / "odd.clip", root) as mounted:
        ran = Box(mounted.mountpoint, base, capfd)("sh", "-c", "cat /odd*")
    assert ran == (0, "found\n", "")


@pytest.fixture(scope="module", params=["v1", *VIEWS])
def debian(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo image: Debian's own packages, and none of the six directories."""
    if request.param == "v1":
        yield request.getfixturevalue("demo_unpacked")
        return
    directory = tmp_path_factory.mktemp("demo")
    clipfs.build(request.getfixturevalue("demo_image"), directory / "demo.clip")
    (directory / "root").mkdir()
    with in_view(request.param, directory / "demo.clip", directory / "root") as root:
        yield root


def test_the_demo_image(debian: Path, runtime: str, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert not {"proc", "sys", "dev", "tmp", "workspace", "volumes"} & set(os.listdir(debian))
    program = "import os, sys; print(len(os.listdir('/proc')) > 5, sorted(os.listdir('/workspace')), sys.argv)"
    ran = Box(debian, base, capfd)("python3", "-c", program, "x", runtime=runtime)
    assert ran == (0, "True [] ['-c', 'x']\n", "")


def test_started_by_nohup_it_ignores_what_its_starter_ignores(v1: Path, base: Path) -> None:
    """SIGHUP that this process was told to ignore is not passed on."""
    program = (
        "import os, signal, sys, assembler; from pathlib import Path; from tests.containers import CONFIG;"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "options = assembler.RunOptions(command=('sh', '-c', 'exit 9'), remove=True);"
        "code = assembler.run(Path(sys.argv[1]), CONFIG, options, Path(sys.argv[2]),"
        " on_started=lambda _: os.kill(os.getpid(), signal.SIGHUP)); sys.exit(code)"
    )
    done = subprocess.run(
        ["python3", "-c", program, v1, base], cwd=Path(__file__).parent.parent, timeout=SECONDS, check=False
    )
    assert done.returncode == 9
