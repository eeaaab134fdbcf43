"""The command line as a stranger meets it: what each command prints, how it fails, and with which exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import clipfs
from clipfs.cli.main import main
from tests.clips import TreeBuilder, write_clip
from tests.conftest import require_root
from tests.images import LayoutBuilder
from tests.mounts import BIG, SECONDS, ended, kill, record_of
from tests.tars import Tar

pytest_plugins = ["tests.mount_fixtures"]

# Where `ls -l` has its names: after mode, links, owner, group, size, date and time.
LS_NAME = 7

COMMANDS = (
    *("cache", "cat", "check", "explain", "extract", "gc"),
    *("index", "inspect", "ls", "mount", "pack", "run", "umount", "upgrade"),
)


def clipfs_command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "clipfs", *map(str, words)]


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_teaches(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: clipfs {command}")
        _, _, arguments = text.split("\noptions:")[0].partition("\npositional arguments:\n")
        assert [line for line in arguments.splitlines() if len(line.split()) < 3] == [], "an argument without a word"

    def test_the_first_page_names_all(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--help"])
        text = capsys.readouterr().out
        assert [command for command in COMMANDS if f"\n    {command} " not in text] == []

    @pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"]])
    def test_nobody_who_reads_it(self, words: list[str]) -> None:
        """Python would say so in three lines, and end with 120."""
        command = ["sh", "-c", 'exec "$@" >/dev/full', "sh", *clipfs_command(*words)]
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
        code = 125 if "run" in words else 74
        assert (done.returncode, done.stderr) == (code, b"clipfs: No space left on device\n")
        with subprocess.Popen(clipfs_command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.wait(SECONDS) == 141
            assert process.stderr.read() == b""

    @pytest.mark.parametrize("words", [["--bogus"], [], ["nonesuch"], ["ls"], ["index", "a", "b"], ["run", "--bogus"]])
    def test_a_wrong_call_is_one_sentence(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(words) == (125 if words[:1] == ["run"] else 2)
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith("clipfs: ")
        known = " ".join(word for word in words[:1] if word in COMMANDS)
        assert f"see `{f'clipfs {known}'.strip()} --help`" in said


@pytest.mark.parametrize(("words", "dumpable"), [(["inspect", __file__], "0"), (["gc"], "1")])
def test_credentials_are_in_no_core_dump(words: list[str], dumpable: str) -> None:
    """Of a command that may read some, the kernel makes none (PR_GET_DUMPABLE), wherever it would send it."""
    program = "import ctypes, sys; from clipfs.cli.main import main; main(sys.argv[1:]); "
    program += "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.stdout == f"{dumpable}\n"


class TestIndex:
    def test_what_it_says(self, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "x.clip"
        assert main(["index", image, "-o", str(out)]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        assert said.out.startswith(f"{out}: 9 inodes, 1 layers of ")
        with clipfs.Index.open(out) as index:
            assert index.inodes == 9

    def test_the_default_name(self, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["index", image]) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["oci-latest.clip"]

    @pytest.mark.parametrize(
        ("name", "out", "code", "words"),
        [
            ("oci:/nonesuch", "x.clip", 2, "/nonesuch is no OCI layout"),
            ("oci-archive:/nonesuch.tar", "x.clip", 2, "/nonesuch.tar"),
            ("/dev", "x.clip", 2, "'/dev' is here, and is no image's name; a layout is named oci:/dev"),
            (__file__, "x.clip", 2, f"an archive is named oci-archive:{__file__}"),
            ("", "x.clip", 2, "'' is no image name"),
            ("docker://no such name", "x.clip", 2, "'no such name' is no image name"),
            ("IMAGE", "/nonesuch/x.clip", 74, "cannot write /nonesuch/x.clip: No such file or directory"),
            ("IMAGE", "/dev/full", 2, "/dev/full"),
            ("IMAGE", ".", 2, "it is a directory"),
        ],
    )
    def test_failures(
        self,
        name: str,
        out: str,
        code: int,
        words: str,
        image: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["index", image if name == "IMAGE" else name, "-o", out]) == code
        said = capsys.readouterr().err
        assert said.startswith("clipfs: ")
        assert words in said.splitlines()[0]
        assert list(tmp_path.iterdir()) == []


class TestLook:
    def test_inspect(self, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", str(clip)]) == 0
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert lines["command"] == "/bin/id"
        assert lines["inodes"].startswith("9, ")
        assert lines["layer"].startswith("sha256:")

    def test_inspect_for_programs(self, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", "--json", str(clip)]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["inodes"] == 9
        assert facts["clip_size"] == clip.stat().st_size
        assert facts["config"]["cmd"] == ["/bin/id"]
        assert [layer["codec"] for layer in facts["layers"]] == ["gzip"]

    def test_inspect_names_the_variant(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "root").mkdir()
        clipfs.pack(tmp_path / "root", tmp_path / "x.clip", platform=clipfs.Platform.parse("linux/arm/v6"))
        assert main(["inspect", "--json", str(tmp_path / "x.clip")]) == 0
        assert json.loads(capsys.readouterr().out)["platform"] == "linux/arm/v6"

    def test_ls(self, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["ls", str(clip)]) == 0
        assert capsys.readouterr().out.split() == ["big", "bin", "hello", "secret", "usr", "zero"]
        assert main(["ls", str(clip), "bin"]) == 0
        assert capsys.readouterr().out.split() == ["id"]

    def test_a_terminal_gets_no_command_of_a_stranger(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        hostile = "\x1b[2J\x9b2J\n\u202e"
        (tmp_path / "oci").mkdir()
        tar = Tar().file(hostile, b"").member("link", typeflag=b"2", link=hostile)
        layout = LayoutBuilder(tmp_path / "oci").layer(tar)
        clipfs.build(layout.config(cmd=[hostile], user=hostile).write(), tmp_path / "x.clip")
        for words in (["ls"], ["ls", "-l"], ["ls", "-R"], ["inspect"]):
            assert main([words[0], *words[1:], str(tmp_path / "x.clip")]) == 0
            said = capsys.readouterr().out
            assert all(character.isprintable() for character in said.replace("\n", ""))
            assert r"\x1b[2J\x9b2J\n\u202e" in said

    def test_ls_in_full(self, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["ls", "-lR", str(clip)]) == 0
        lines = {line.split()[LS_NAME]: line for line in capsys.readouterr().out.splitlines()}
        assert list(lines) == [".", "big", "bin", "hello", "secret", "usr", "usr/bin", "usr/bin/id", "zero"]
        assert lines["bin"].startswith("lrwxrwxrwx")
        assert lines["bin"].endswith("bin -> usr/bin")
        assert lines["usr/bin/id"].startswith("-rwsr-xr-x")
        assert lines["zero"].split()[4] == "1,5"
        assert "2023-11-14 22:13:20" in lines["hello"]

    @pytest.mark.parametrize(
        "words",
        [
            "ls CLIP -l /usr",
            "ls CLIP /usr -l",
            "ls -l CLIP --insecure /usr",
            "ls -l CLIP -- /usr",
            "ls -l -- CLIP /usr",
        ],
    )
    def test_options_stand_anywhere(self, words: str, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(clip) if word == "CLIP" else word for word in words.split()]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert (line[:1], line.split()[LS_NAME]) == ("d", "bin")

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("ls", "the following arguments are required: X; see `clipfs ls --help`"),
            ("ls -l X / -x --bogus", "unrecognized arguments: -x --bogus; see `clipfs ls --help`"),
            ("ls X / -l /usr", "unrecognized arguments: /usr; see `clipfs ls --help`"),
        ],
    )
    def test_a_wrong_ls(self, words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(words.split()) == 2
        assert said in capsys.readouterr().err

    def test_ls_shows_a_time_that_no_calendar_has(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """tmpfs keeps any, and who makes a clip can write any."""
        times = {b"first": -(1 << 63), b"last": (1 << 63) - 1, b"usual": 1}
        tree = TreeBuilder()
        for name, seconds in times.items():
            tree.file(name, mtime_ns=seconds * 10**9)
        assert main(["ls", "-l", str(write_clip(tmp_path / "x.clip", tree.finish()))]) == 0
        shown = [line.split()[5:] for line in capsys.readouterr().out.splitlines()]
        assert shown == [[str(-(1 << 63)), "first"], [str((1 << 63) - 1), "last"], ["1970-01-01", "00:00:01", "usual"]]

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["ls", "CLIP", "/nonesuch"], "/nonesuch"),
            (["ls", "CLIP", "/hello/x"], "Not a directory"),
            (["cat", "CLIP", "/usr"], "/usr is not a regular file"),
            (["cat", "CLIP", "/nonesuch"], "No such file"),
            (["ls", "nonesuch.clip"], "clipfs index IMAGE -o nonesuch.clip"),
            (["inspect", __file__], "is not a .clip file"),
            (["check", os.devnull], os.devnull),
            (["inspect", "--platform", "linux/s390x", "CLIP"], "is of an image for linux/amd64, not for linux/s390x"),
            (["inspect", ""], "''"),
            (["mount", "CLIP", ""], "argument DIR: it has no name"),
            (["mount", "--cache-dir", "", "CLIP", "DIR"], "argument --cache-dir: it has no name"),
            (["cache", "ls", "--cache-dir", ""], "argument --cache-dir: it has no name"),
            (["umount", ""], "argument DIR: it has no name"),
            (["upgrade", ""], "argument DIR: it has no name"),
            (["extract", "CLIP", ""], "argument DIR: it has no name"),
            (["inspect", "/etc"], "a layout is named oci:/etc, a directory to run in /etc,"),
        ],
    )
    def test_failures(self, words: list[str], said: str, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(clip) if word == "CLIP" else word for word in words]) in (2, 65)
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_a_name_that_the_terminal_cannot_show(clip: Path, tmp_path: Path, encoding: str) -> None:
    path = tmp_path / os.fsdecode(b"\xff\xc3\xa4.clip")
    shutil.copy(clip, path)
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        clipfs_command("check", path), capture_output=True, timeout=SECONDS, check=False, env=environment
    )
    assert (done.returncode, done.stderr) == (0, b"")
    shown = {"utf-8:strict": b"\\udcff\xc3\xa4", "ascii:strict": b"\\udcff\\xe4"}[encoding]
    assert done.stdout.startswith(os.fsencode(tmp_path) + b"/" + shown + b".clip: good")


@pytest.mark.parametrize("stream", [">/dev/full", ">&-"])
@pytest.mark.parametrize(("words", "code"), [(["umount", "/\udcff"], 32), (["run", "--bogus"], 125)])
def test_an_error_that_nobody_is_told_has_its_exit_code(words: list[str], code: int, stream: str) -> None:
    command = ["sh", "-c", f'exec "$@" 2{stream}', "sh", *clipfs_command(*words)]
    assert subprocess.run(command, timeout=SECONDS, check=False).returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("how", [signal.SIG_DFL, signal.SIG_IGN])
def test_who_is_asked_to_end_leaves_no_file_half_written(
    number: signal.Signals, how: signal.Handlers, image: str, tmp_path: Path
) -> None:
    code = """if True:
        import sys
        from clipfs.building import builder
        from clipfs.cli.main import main
        def write(file, **parts):
            print("writing", flush=True)
            sys.stdin.readline()
        builder.write = write
        sys.exit(main(sys.argv[1:]))
    """
    before = signal.signal(number, how)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "index", image, "-o", tmp_path / "x.clip"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    finally:
        signal.signal(number, before)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 1, "the file that is to become x.clip"
        process.send_signal(number)
        _, said = process.communicate("go on\n", SECONDS)
    if how == signal.SIG_IGN:
        assert said == ""
    else:
        assert (process.returncode, said) == (128 + number, "clipfs: interrupted\n")
    # What was in the middle of being written may have become whole.
    assert {path.name for path in tmp_path.iterdir()} <= {"x.clip"}


class TestData:
    def test_cat(self, clip: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
        assert main(["cat", str(clip), "/big"]) == 0
        assert capfdbinary.readouterr().out == BIG

    def test_cat_follows_links_inside_the_image(self, clip: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
        assert main(["cat", str(clip), "bin/id"]) == 0
        assert capfdbinary.readouterr().out == Path("/usr/bin/id").read_bytes()

    def test_cat_to_a_reader_that_leaves(self, clip: Path) -> None:
        with subprocess.Popen(
            clipfs_command("cat", clip, "big"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.close()
            assert process.wait(SECONDS) == 141
            assert process.stderr is not None
            assert process.stderr.read() == b""

    def test_cat_to_a_full_disk(self, clip: Path) -> None:
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                clipfs_command("cat", clip, "big"), stdout=full, stderr=subprocess.PIPE, check=False, timeout=SECONDS
            )
        assert (done.returncode, done.stderr) == (74, b"clipfs: No space left on device\n")

    def test_check(self, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "--data", str(clip)]) == 0
        assert capsys.readouterr().out.startswith(f"{clip}: good; 9 inodes, ")

    def test_damage_is_found_and_named(
        self, image: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        layout = tmp_path / "damaged"
        subprocess.run(["cp", "-a", image.split(":")[1], layout], check=True)
        blob = max((layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 0x40
        blob.write_bytes(data)
        assert main(["check", "--data", "--source", f"oci:{layout}", str(clip)]) == 65
        said = capsys.readouterr().err
        assert f"layer sha256:{blob.name}" in said
        assert said.count("\n") == 1

    def test_a_source_that_has_gone(self, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["cat", "--source", "oci:/nonesuch", str(clip), "/big"]) == 69
        assert "--source" in capsys.readouterr().err

    def test_extract(self, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        require_root()
        target = tmp_path / "tree"
        assert main(["extract", str(clip), str(target)]) == 0
        assert capsys.readouterr().out.startswith(f"{target}: 9 inodes, ")
        assert (target / "big").read_bytes() == BIG
        assert main(["extract", str(clip), str(target)]) == 2
        assert "not empty" in capsys.readouterr().err


@pytest.mark.usefixtures("runtime")
class TestMount:
    def test_mount_and_umount(self, clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        require_root()
        assert main(["mount", str(clip), str(mountpoint)]) == 0
        assert (mountpoint / "hello").read_bytes() == b"hello\n"
        assert main(["umount", str(mountpoint)]) == 0
        assert list(mountpoint.iterdir()) == []
        assert capsys.readouterr() == ("", "")
        assert main(["umount", str(mountpoint)]) == 32
        assert capsys.readouterr().err == f"clipfs: there is no clipfs mount on {mountpoint}\n"

    def test_who_starts_it_may_ignore_the_end_of_children(self, clip: Path, mountpoint: Path) -> None:
        require_root()
        for words in ((clip, mountpoint), (mountpoint,)):
            command = ["env", "--ignore-signal=CHLD", *clipfs_command("mount" if len(words) > 1 else "umount", *words)]
            done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
            assert (done.returncode, done.stderr) == (0, b"")

    def test_an_image_by_name(self, image: str, mountpoint: Path) -> None:
        require_root()
        assert main(["mount", image, str(mountpoint), "-o", "cache=1M"]) == 0
        try:
            assert (mountpoint / "big").read_bytes() == BIG
        finally:
            assert main(["umount", str(mountpoint)]) == 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_in_the_foreground(self, clip: Path, mountpoint: Path, number: int) -> None:
        require_root()
        with subprocess.Popen(clipfs_command("mount", "-f", clip, mountpoint), stderr=subprocess.PIPE) as process:
            try:
                assert process.stderr is not None
                assert b"mounted" in process.stderr.readline()
                assert (mountpoint / "hello").read_bytes() == b"hello\n"
                process.send_signal(number)
                assert ended(process.pid)
                assert not mountpoint.is_mount()
            finally:
                process.kill()

    @pytest.mark.parametrize(
        ("options", "words"),
        [("rw", "read-only"), ("nonsense", "unknown mount option 'nonsense'"), ("cache=many", "512M")],
    )
    def test_wrong_options(
        self, options: str, words: str, clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["mount", str(clip), str(mountpoint), "-o", options]) == 2
        assert words in capsys.readouterr().err

    def test_gc_says_what_it_removed(self, clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        require_root()
        mounted = clipfs.mount(clip, mountpoint)
        kill(record_of(mounted))
        assert main(["gc"]) == 0
        assert f"removed mount {mountpoint}" in capsys.readouterr().err
        assert not os.path.ismount(mountpoint)


def test_progress_is_drawn_on_a_terminal_and_wiped(image: str, tmp_path: Path) -> None:
    out = tmp_path / "x.clip"
    main_end, terminal = os.openpty()
    with os.fdopen(main_end, "rb", buffering=0) as seen, os.fdopen(terminal, "wb") as stream:
        subprocess.run(clipfs_command("index", image, "-o", out), stderr=stream, check=True, timeout=SECONDS)
        drawn = seen.read(1 << 16)
    assert b"indexing layer 1/1" in drawn
    assert drawn.endswith(b"\r\x1b[K")
