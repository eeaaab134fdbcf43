"""``clipfs run`` as a person types it: what its options do, what its exit codes and complaints are."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import assembler
from tests.containers import SECONDS, Cli, Ran, leftovers
from tests.images import LayoutBuilder, Tar

pytest_plugins = ["tests.container_fixtures"]

SHOW = "stat -c '%a %n' /dev /proc /sys /tmp /volumes /workspace"
SIX = "755 /dev\n555 /proc\n555 /sys\n1777 /tmp\n755 /volumes\n755 /workspace\n"


@pytest.fixture(autouse=True)
def _nothing_left(base: Path) -> Iterator[None]:
    yield
    assert leftovers(base) == []


def complaint(ran: Ran) -> str:
    """The one sentence of a run that failed, and no traceback."""
    assert ran.out == ""
    assert ran.err.startswith("clipfs: ")
    assert ran.err.endswith("\n")
    assert ran.err.count("\n") == 1
    return ran.err.removeprefix("clipfs: ").rstrip("\n")


@pytest.mark.parametrize("runtime", ["runc", "crun"])
@pytest.mark.parametrize(
    ("kind", "view"),
    [("clip", "kernel"), ("clip", "fuse"), ("image", "kernel"), ("image", "fuse"), ("directory", "auto")],
)
def test_all_that_x_can_be(kind: str, view: str, runtime: str, cli: Cli, tree: Path, tree_clip: Path) -> None:
    x = {"clip": str(tree_clip), "image": f"oci:{tree_clip.parent}/oci", "directory": str(tree)}[kind]
    options = ("--rm", "--name", "web", "--runtime", runtime, "--view", view)
    ran = cli("-v", "run", *options, x, "sh", "-c", f"{SHOW}; exit 3")
    assert (ran.code, ran.out) == (3, SIX)
    archive = "v1" if kind == "directory" else "v2 (OCI)"
    assert [line for line in ran.err.splitlines() if "container_id" in line or "archive" in line] == [
        f"INFO detected {archive} archive format",
        "INFO mounted layer container_id=web layer_index=0",
        "INFO container is now running container_id=web",
    ]


def test_a_relative_directory(cli: Cli, tree: Path) -> None:
    assert cli("run", "--rm", f"./{tree.name}", "echo", "x", cwd=tree.parent) == (0, "x\n", "")
    assert cli("run", "--rm", ".", "echo", "x", cwd=tree) == (0, "x\n", "")


@pytest.mark.parametrize("kind", ["directory", "clip"])
def test_started_by_who_ignores_its_children(kind: str, cli: Cli, tree: Path, tree_clip: Path) -> None:
    """That is inherited, and then the kernel waits for children itself and tells nobody how they ended."""
    starter = (
        "from os import *; from signal import *; from sys import *; signal(SIGCHLD, SIG_IGN); execv(argv[1], argv[1:])"
    )
    x = tree if kind == "directory" else tree_clip
    process = cli.start("run", "--rm", x, "sh", "-c", "exit 3", by=(sys.executable, "-c", starter))
    assert process.wait(SECONDS) == 3
    assert process.stderr
    assert process.stderr.read() == b""


class TestOptions:
    """Each on the unpacked tree, which is quickest."""

    def test_environment(self, cli: Cli, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FROM_HOST", "h o s t")
        monkeypatch.setenv("NOT_PASSED", "x")
        file = tmp_path / "env"
        file.write_text("# a comment\n\nFILE=from 'file' #1\n  BOTH=file\nFROM_HOST\nUNSET_VARIABLE\n")
        ran = cli("run", "--rm", "--env-file", file, "-e", "BOTH=line", "--env=EQ=a=b", "-e", "E=", tree, "env")
        lines = ran.out.splitlines()
        assert {"FILE=from 'file' #1", "BOTH=line", "FROM_HOST=h o s t", "EQ=a=b", "E="} <= set(lines)
        assert not [line for line in lines if line.startswith(("NOT_PASSED", "UNSET", "TERM", "CLIPFS", "#"))]

    def test_an_env_file_says_what_docker_reads_in_it(self, cli: Cli, tree: Path, tmp_path: Path) -> None:
        file = tmp_path / "env"
        file.write_bytes("\ufeffA=x \t\r\nB=form\x0cfeed\u2028and\u0085more\n \tC=c\rr\nHOME \n".encode())
        words = cli.words("run", "--rm", "--env-file", file, tree, "env")
        done = subprocess.run(words, capture_output=True, timeout=SECONDS, check=True, env={**cli.env, "HOME": "/h"})
        lines = done.stdout.decode().split("\n")
        assert {"A=x \t", "B=form\x0cfeed\u2028and\u0085more", "C=c\rr", "HOME=/h"} <= set(lines)

    @pytest.mark.parametrize(
        ("user", "ids"),
        [
            ("app", "1000 1000 10 77"),
            ("1000", "1000 1000 10 77"),
            ("app:wheel", "1000 10"),
            ("7:8", "7 8"),
            ("7", "7 0"),
        ],
    )
    def test_user(self, cli: Cli, tree: Path, user: str, ids: str) -> None:
        uid, *groups = ids.split()
        ran = cli("run", "--rm", "-u", user, tree, "sh", "-c", "id -u; id -G")
        assert ran.out == f"{uid}\n{' '.join(groups)}\n"

    def test_place_and_name(self, cli: Cli, tree: Path) -> None:
        ran = cli("run", "--rm", "-w", "/new/place", "--hostname", "box", "--dir", "/also/this", "--dir", "that", tree,
                  "sh", "-c", "pwd; hostname; stat -c %a /also/this /that; echo $HOSTNAME")  # fmt: skip
        assert ran == (0, "/new/place\nbox\n755\n755\nbox\n", "")

    def test_volumes(self, cli: Cli, tree: Path, tmp_path: Path) -> None:
        data = tmp_path / "d a,t=a"
        data.mkdir()
        (data / "file").write_text("data\n")
        volumes = ("-v", f"{data}:/deep/in/side", "-v", f"./{data.name}:/ro:ro", "-v", f"{data}/file:/etc/passwd")
        script = "cat /deep/in/side/file /etc/passwd; echo x > /deep/in/side/new; touch /ro/x"
        ran = cli("run", "--rm", *volumes, tree, "sh", "-c", script, cwd=tmp_path)
        assert (ran.code, ran.out, ran.err) == (1, "data\ndata\n", "touch: /ro/x: Read-only file system\n")
        assert (data / "new").read_text() == "x\n"
        assert not (data / "x").exists()

    def test_what_lies_in_a_volume_is_seen_in_it(self, cli: Cli, tree: Path, tmp_path: Path) -> None:
        """In whatever order it was said: what was to be read-only, or in memory, is not on the host's disk instead."""
        for name in ("outer/ro", "outer/cache", "inner"):
            (tmp_path / name).mkdir(parents=True)
        volumes = ("-v", "./inner:/data/ro:ro", "--tmpfs", "/data/cache", "-v", "./outer:/data")
        script = "touch /data/cache/secret /data/plain; touch /data/ro/x"
        ran = cli("run", "--rm", *volumes, tree, "sh", "-c", script, cwd=tmp_path)
        assert (ran.code, ran.err) == (1, "touch: /data/ro/x: Read-only file system\n")
        assert [each.name for each in tmp_path.rglob("outer/**/*") if each.is_file()] == ["plain"]

    def test_a_volume_below_a_link_of_the_image_stays_inside(self, cli: Cli, tmp_path: Path, tree_layer: bytes) -> None:
        data, victim = tmp_path / "data", tmp_path / "victim"
        data.mkdir()
        victim.mkdir()
        (data / "file").write_text("data\n")
        tar = Tar().symlink("link", f"/../../../../..{victim}").symlink("here", "there")
        layout = LayoutBuilder(tmp_path / "oci").layer(tree_layer).layer(tar)
        image = layout.config().write()
        ran = cli("run", "--rm", "-v", f"{data}:/link/new", "-v", f"{data}:/here", image, "cat", "/link/new/file",
                  "/there/file", f"{victim}/new/file")  # fmt: skip
        assert ran.out == "data\n" * 3
        assert list(victim.iterdir()) == []

    def test_tmpfs_and_read_only(self, cli: Cli, tree: Path) -> None:
        script = "echo x > /tmp/x && cat /tmp/x; stat -c %a /run /tmp; touch /workspace/x"
        ran = cli("run", "--rm", "--read-only", "--tmpfs", "/tmp", "--tmpfs", "/run:mode=711", tree, "sh", "-c", script)
        assert (ran.code, ran.out) == (1, "x\n711\n1777\n")
        assert "Read-only file system" in ran.err

    @pytest.mark.parametrize("runtime", ["runc", "crun"])
    def test_what_is_in_memory_is_not_run_unless_that_is_said(self, cli: Cli, tree: Path, runtime: str) -> None:
        script = "cp /bin/busybox /t/true && /t/true"
        words = ("run", "--rm", "--runtime", runtime, "--tmpfs")
        assert cli(*words, "/t", tree, "sh", "-c", script).code == 126
        assert cli(*words, "/t:exec", tree, "sh", "-c", script).code == 0

    @pytest.mark.parametrize("runtime", ["runc", "crun"])
    def test_a_place_for_a_volume_is_for_everybody(
        self, cli: Cli, tree: Path, tmp_path: Path, public: Path, runtime: str
    ) -> None:
        """Whatever the umask of who runs it."""
        (public / "file").write_text("data\n")
        (public / "file").chmod(0o644)
        words = cli.words("run", "--rm", "--runtime", runtime, "-u", "app", "-v", f"{public}:/deep/in/side", tree,
                          "cat", "/deep/in/side/file")  # fmt: skip
        done = subprocess.run(words, capture_output=True, timeout=SECONDS, check=False, env=cli.env, umask=0o077)
        assert (done.stdout, done.stderr) == (b"data\n", b"")

    def test_network(self, cli: Cli, tree: Path) -> None:
        def script(network: str) -> list[str]:
            return cli("run", "--rm", "--network", network, tree, "ls", "/sys/class/net").out.split()

        assert script("none") == ["lo"]
        words = cli.words("run", "--rm", "--network=none", "--hostname=box", "-u", "app", tree, "cat", "/etc/hosts")
        done = subprocess.run(words, capture_output=True, timeout=SECONDS, check=False, env=cli.env, umask=0o077)
        assert (done.stdout, done.stderr) == (b"127.0.0.1\tlocalhost box\n::1\tlocalhost\n", b"")
        # With the host's network its names: the container's own copy, to write to.
        change = "echo 192.0.2.1 other >> /etc/hosts && echo >> /etc/resolv.conf && cat /etc/hosts"
        host = Path("/etc/hosts").read_text()
        assert cli("run", "--rm", tree, "sh", "-c", change).out == f"{host}192.0.2.1 other\n"
        assert Path("/etc/hosts").read_text() == host
        assert set(script("host")) == {each.name for each in Path("/sys/class/net").iterdir() if each.is_symlink()}

    def test_limits(self, cli: Cli, tree: Path) -> None:
        quota = "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu.max 2>/dev/null"
        ran = cli("run", "--rm", "--cpus", "0.5", tree, "sh", "-c", quota)
        assert ran.out.split()[0] == "50000"
        assert cli("run", "--rm", "--memory", "16M", tree, "tail", "/dev/zero").code == 137
        swap = "cat /sys/fs/cgroup/memory/memory.memsw.limit_in_bytes /sys/fs/cgroup/memory.swap.max 2>/dev/null"
        assert cli("run", "--rm", "--memory", "16M", tree, "sh", "-c", swap).out in (f"{16 << 20}\n", "0\n", "")

    def test_a_kept_upper(self, cli: Cli, tree_clip: Path, tmp_path: Path) -> None:
        upper = tmp_path / "kept"
        for number in range(2):
            ran = cli(
                "run", "--rm", "--upper", upper, tree_clip, "sh", "-c", f"ls /workspace; touch /workspace/{number}"
            )
            assert ran == (0, "0\n" * number, "")
        assert sorted(each.name for each in (upper / "workspace").iterdir()) == ["0", "1"]

    def test_a_name_is_refused_while_it_is_taken(self, cli: Cli, tree: Path) -> None:
        assert cli("run", "--name", "web", tree, "true").code == 0
        assert "there is a container web already" in complaint(cli("run", "--name", "web", tree, "true"))
        assert (cli.base / "web" / "layer-0" / "upper").is_dir()
        os.rename(cli.base / "web", cli.base / "was")
        assert cli("run", "--rm", "--name", "web", tree, "true").code == 0
        assert assembler.gc(cli.base, kept=True) == ["was"]

    def test_what_follows_x_is_the_commands(self, cli: Cli, tree: Path) -> None:
        assert cli("run", "--rm", tree, "echo", "--rm", "-e", "--", "--help").out == "--rm -e -- --help\n"
        assert cli("run", "--rm", "--", tree, "echo", "x").out == "x\n"
        assert cli("run", "--rm", tree, "--", "echo", "x").out == "x\n"

    def test_stats(self, cli: Cli, tree_clip: Path) -> None:
        ran = cli("run", "--rm", "--stats", tree_clip, "echo", "x")
        assert ran.out == "x\n"
        assert re.match(r"clipfs: first output after [0-9]\.[0-9]{2} s; fetched [0-9]+ of", ran.err)
        assert " bytes (" in ran.err


class TestImage:
    """What an image says about how it wants to be run, and the options against it."""

    @pytest.fixture(scope="class")
    @classmethod
    def image(cls, tree_layer: bytes, tmp_path_factory: pytest.TempPathFactory) -> str:
        layout = LayoutBuilder(tmp_path_factory.mktemp("config") / "oci").layer(tree_layer)
        return layout.config(
            env=["PATH=/bin", "A=image"], entrypoint=["echo", "e"], cmd=["c"], working_dir="/srv", user="app:wheel",
            volumes=["/data"],
        ).write()  # fmt: skip

    @pytest.mark.parametrize(
        ("options", "command", "out"),
        [
            ([], [], "e c\n"),
            ([], ["x", "y"], "e x y\n"),
            (["--entrypoint", "ls"], ["-d", "/data"], "/data\n"),
            (["--entrypoint", ""], ["id", "-g"], "10\n"),
            (["--entrypoint", ""], ["pwd"], "/srv\n"),
            (["--entrypoint", "", "-w", "/w"], ["pwd"], "/w\n"),
            (["--entrypoint", "", "-u", "0"], ["id", "-u"], "0\n"),
            (["--entrypoint", json.dumps(["sh", "-c", "echo $A $PATH $HOME; ls -d /data"])], [],
             "image /bin /home/app\n/data\n"),
        ],
    )  # fmt: skip
    def test_runs(self, cli: Cli, image: str, options: list[str], command: list[str], out: str) -> None:
        assert cli("run", "--rm", *options, image, *command) == (0, out, "")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ("run", 125, "the following arguments are required: X; see `clipfs run --help`"),
        ("run --no-such TREE true", 125, "--no-such"),
        ("run TREE", 125, "the image names no command of its own; say what to run in it"),
        ("run /no/such true", 125, "there is no /no/such; an image is named HOST/REPO:TAG or oci:DIR"),
        ("run no.clip true", 125, "there is no file no.clip; make it with `clipfs index IMAGE -o no.clip`"),
        ("run oci:/no/such true", 125, "/no/such"),
        ("run TREE no-such-program", 127, "no-such-program"),
        ("run TREE /etc", 126, "/etc"),
        ("run --runtime crun TREE no-such-program", 127, "no-such-program"),
        ("run --runtime crun TREE /etc/passwd", 126, "cannot execute /etc/passwd: open executable: Permission denied"),
        ("run --runtime no-such TREE true", 125, "there is no runtime no-such; install it"),
        ("run --runtime /bin/false TREE true", 125, "false create ended with 1 and did not say why"),
        ("run --runtime /bin/true TREE true", 125, "true has made no container: is it a runtime?"),
        ("run -u nobody-knows TREE true", 125, "the image has no user 'nobody-knows' in its /etc/passwd"),
        ("run -u app:nothing TREE true", 125, "the image has no group 'nothing' in its /etc/group"),
        ("run --name a/b TREE true", 125, "'a/b' is no name for a container"),
        ("run --name ../x TREE true", 125, "'../x' is no name for a container"),
        ("run -v /no/such:/x TREE true", 125, "the volume /no/such does not exist"),
        ("run -v /etc TREE true", 125, "a volume is given as SRC:/DST or SRC:/DST:ro, not '/etc'"),
        ("run -v /etc:/ TREE true", 125, "a volume lies below the root of the container"),
        ("run --tmpfs run TREE true", 125, "a tmpfs is an absolute path"),
        ("run -w here TREE true", 125, "a working directory is an absolute path inside the container, not 'here'"),
        ("run -w /etc/passwd TREE true", 125, "needs a directory /etc/passwd, but the image has a regular file there"),
        ("run --dir /etc/passwd/x TREE true", 125, "/etc/passwd is not a directory"),
        ("run --dir '' TREE true", 125, "needs a name"),
        ("run -e =x TREE true", 125, "a variable is given as K=V or K, not '=x'"),
        ("run --env-file /no/such TREE true", 125, "cannot read --env-file /no/such: No such file or directory"),
        ("run --env-file /bin/busybox TREE true", 125, "--env-file /bin/busybox is not UTF-8 at byte"),
        ("run --stats TREE true", 125, "is a directory, and no image that is mounted: --stats says nothing about it"),
        ("run --cache-size 1G TREE true", 125, "--cache-size says nothing about it"),
        ("run --memory 1k TREE true", 125, "at least 6 MiB of memory"),
        ("run --memory much TREE true", 125, "--memory wants a size such as 512M or 2G, not 'much'"),
        ("run --cpus inf TREE true", 125, "at least 0.01 CPUs and at most 8192, not inf"),
        ("run --cpus many TREE true", 125, "--cpus: invalid float value: 'many'"),
        ("run --network bridge TREE true", 125, "--network: invalid choice: 'bridge'"),
        ("run --hostname " + "x" * 65 + " TREE true", 125, "a host name has at most 64 bytes"),
        ("run --entrypoint '[1]' TREE true", 125, "an entrypoint is a command, or a JSON list of words"),
        ("run --entrypoint '[' TREE true", 125, "an entrypoint is a command, or a JSON list of words"),
        ("run --upper /etc/passwd TREE true", 125, "needs a directory, and /etc/passwd is none"),
        ("run --upper '' TREE true", 125, "argument --upper: it has no name"),
        ("run --base '' TREE true", 125, "argument --base: it has no name"),
        ("run --upper / TREE true", 125, "cannot go to the root of this machine"),
        ("run --memory '' TREE true", 125, "--memory wants a size"),
        ("run --upper /proc/x TREE true", 125, "/proc/x: No such file or directory"),
        ("run --base /etc/passwd TREE true", 125, "cannot keep containers in /etc/passwd"),
        ("run --platform nonsense oci:CLIP true", 125, "nonsense"),
        ("run --ca /no/such oci:CLIP true", 125, "cannot read certificates from /no/such: No such file or directory"),
        ("run -e A=\udcff TREE true", 125, "only be told what is UTF-8"),
    ],
)
def test_complaints(words: str, code: int, sentence: str, cli: Cli, tree: Path, tree_clip: Path) -> None:
    filled = words.replace("TREE", str(tree)).replace("CLIP", f"{tree_clip.parent}/oci")
    ran = cli(*shlex.split(filled))
    assert sentence in complaint(ran)
    assert ran.code == code


def test_something_in_the_way_leaves_nothing(cli: Cli, tree_layer: bytes, tmp_path: Path) -> None:
    image = LayoutBuilder(tmp_path / "oci").layer(tree_layer).layer(Tar().file("tmp", b"")).config().write()
    ran = cli("run", "--rm", image, "true")
    assert ran.code == 125
    assert complaint(ran) == "the container needs a directory /tmp, but the image has a regular file there"
