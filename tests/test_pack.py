"""Packed clips: what goes in comes out, the same always, each thing once; and what is wrong with one is noticed."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clipfs
from clipfs.building.pile import SPAN, Pile
from clipfs.cli.main import main
from clipfs.compression.codec import decode
from clipfs.errors import ClipfsError, FormatError, IntegrityError
from clipfs.format.container import HEADER, SECTION, Codec, Kind
from clipfs.format.container import SPAN as SPAN_RECORD
from tests.clips import reseal, seen_in_index, seen_on_disk
from tests.conftest import require_programs, require_root
from tests.containers import busybox_root
from tests.images import LayoutBuilder, Tar
from tests.mounts import BIG, run
from tests.oracle import differences, picture
from tests.test_format import resigned

pytest_plugins = ["tests.mount_fixtures"]

# Neither compressible nor the same anywhere.
NOISE = random.Random(1).randbytes(3 * SPAN + 12_345)


def index_of(image: str, directory: Path) -> clipfs.Index:
    """What `clipfs index` makes of an image."""
    clipfs.build(image, directory / "index.clip")
    return clipfs.Index.open(directory / "index.clip")


def entry(kind: Kind) -> int:
    """Where the header has a section."""
    return HEADER.size + (kind - 1) * SECTION.size


def at(clip: bytearray, kind: Kind) -> int:
    """Where a section is."""
    offset: int = SECTION.unpack_from(clip, entry(kind))[2]
    return offset


def poke(clip: bytearray, at: int, value: int) -> None:
    assert clip[at] != value
    clip[at] = value


def packed(source: Path | str, out: Path) -> Path:
    clipfs.pack(source, out)
    return out


def rooted(directory: Path) -> Path:
    """A root file system with something of everything; as root only."""
    root = directory / "root"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "big").write_bytes(NOISE)
    (root / "deep/copy").write_bytes(NOISE)
    (root / "deep/begins alike").write_bytes(NOISE[:-1000])
    (root / "deep/er/small").write_bytes(b"small\n")
    (root / "deep/er/again").write_bytes(b"small\n")
    os.link(root / "deep/er/small", root / "link")
    (root / "empty").touch()
    with (root / "sparse").open("wb") as file:
        for at in (0, SPAN + 70_000, 9 * SPAN):
            file.seek(at)
            file.write(b"data at %d" % at)
        file.truncate(11 * SPAN + 5)
    with (root / "hole").open("wb") as file:
        file.truncate(20 * SPAN)
    (root / os.fsdecode(b"name \xff\n")).write_bytes(b"odd")
    (root / "absolute").symlink_to("/etc/passwd")
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o600, os.makedev(300, 70_000))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(root / "socket"))
    (root / "setuid").write_bytes(b"#!")
    (root / "setuid").chmod(0o4755)
    (root / "deep/er").chmod(0o1777)
    os.chown(root / "empty", 1234, 70_000)
    os.setxattr(root / "empty", "user.note", b"\0\xff")
    os.setxattr(root / "deep", "user.note", b"on a directory")
    os.utime(root / "absolute", ns=(1, 1_700_000_000_123_456_789), follow_symlinks=False)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    require_root()
    return rooted(tmp_path / "rooted")


@pytest.fixture(scope="module")
def small(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small image, packed."""
    return packed(image, tmp_path_factory.mktemp("packed") / "small.clip")


class TestWhatComesOut:
    def test_a_directory(self, root: Path, tmp_path: Path) -> None:
        clip = packed(root, tmp_path / "x.clip")
        with clipfs.Index.open(clip) as index:
            index.check()
            assert seen_in_index(index) == seen_on_disk(root)
        clipfs.extract(clip, tmp_path / "out")
        assert differences(picture(tmp_path / "out"), picture(root)) == []
        assert (tmp_path / "out/sparse").stat().st_blocks * 512 < 4 * SPAN, "holes are holes"

    def test_a_file_system_without_xattrs(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(*_: object, **__: object) -> list[str]:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

        with monkeypatch.context() as patched:
            patched.setattr(os, "listxattr", unknown)
            clip = packed(root, tmp_path / "x.clip")
        with clipfs.Index.open(clip) as index:
            index.check()
            assert not any(index.xattrs(node.nid) for _, node in index.walk())
        os.removexattr(root / "empty", "user.note")
        os.removexattr(root / "deep", "user.note")
        clipfs.extract(clip, tmp_path / "out")
        assert differences(picture(tmp_path / "out"), picture(root)) == []

    def test_the_demo_image(self, demo_image: str, demo_unpacked: Path, runtime: Path, tmp_path: Path) -> None:
        require_programs("fsck.erofs")
        clip = packed(demo_image, tmp_path / "x.clip")
        (tmp_path / "mnt").mkdir()
        with clipfs.mount(clip, tmp_path / "mnt", clipfs.MountOptions(cache_size=0, prefetch="none")):
            assert differences(picture(tmp_path / "mnt"), picture(demo_unpacked)) == []
        (tmp_path / "device").touch()
        assert run("fsck.erofs", f"--device={tmp_path / 'device'}", clip).returncode == 0
        with clipfs.Index.open(clip) as index:
            index.check()
            layers = sum(blob.size for blob in index.manifest.layers)
            assert clip.stat().st_size < layers, "smaller than the layers that it was made of"

    def test_its_documents_are_the_images(self, image: str, small: Path, tmp_path: Path) -> None:
        with index_of(image, tmp_path) as original, clipfs.Index.open(small) as index:
            assert (index.manifest.raw, index.config.raw) == (original.manifest.raw, original.config.raw)
            assert (index.packed, index.carries_data) == (True, True)

    def test_commands_take_it(self, small: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
        require_root()
        for words in (["ls", "-lR"], ["inspect"], ["check"], ["check", "--data"], ["inspect", "--json"]):
            assert main([*words, str(small)]) == 0, words
        assert b'"packed": true' in capsysbinary.readouterr().out
        assert main(["cat", str(small), "/big"]) == 0
        assert capsysbinary.readouterr().out == BIG
        assert main(["extract", str(small), str(tmp_path / "out")]) == 0
        assert (tmp_path / "out/big").read_bytes() == BIG

    def test_a_container_runs_in_a_packed_directory(self, runtime: Path, tmp_path: Path) -> None:
        require_root()
        require_programs("runc", "busybox")
        clip = packed(busybox_root(tmp_path / "root"), tmp_path / "x.clip")
        done = run(sys.executable, "-m", "clipfs", "run", "--rm", "--base", tmp_path / "base", clip, "echo", "hello")
        assert (done.stdout, done.returncode) == ("hello\n", 0), done.stderr

    def test_a_file_that_is_replaced_is_read_on(self, small: Path, runtime: Path, tmp_path: Path) -> None:
        """As docs/format.md tells to do it: by renaming another over it."""
        require_root()
        clip = shutil.copy(small, tmp_path / "x.clip")
        (tmp_path / "mnt").mkdir()
        with clipfs.mount(clip, tmp_path / "mnt", clipfs.MountOptions(cache_size=0)):
            (tmp_path / "new").write_bytes(b"something else")
            (tmp_path / "new").replace(clip)
            assert (tmp_path / "mnt/big").read_bytes() == BIG


class TestTheSameAlways:
    def test_again(self, small: Path, image: str, tmp_path: Path) -> None:
        assert packed(image, tmp_path / "x.clip").read_bytes() == small.read_bytes()

    def test_from_an_index(self, clip: Path, small: Path, tmp_path: Path) -> None:
        assert packed(clip, tmp_path / "x.clip").read_bytes() == small.read_bytes()

    def test_from_itself(self, root: Path, tmp_path: Path) -> None:
        first = packed(root, tmp_path / "x.clip").read_bytes()
        assert packed(tmp_path / "x.clip", tmp_path / "x.clip").read_bytes() == first

    def test_from_a_copy_with_other_holes(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        for name in ("sparse", "big", "deep"):
            subprocess.run(["cp", "-a", "--sparse=never", root / name, tmp_path / "a"], check=True)
        subprocess.run(["cp", "-a", "--sparse=always", tmp_path / "a", tmp_path / "b"], check=True)
        assert (tmp_path / "a/sparse").stat().st_blocks > (tmp_path / "b/sparse").stat().st_blocks
        first = packed(tmp_path / "a", tmp_path / "a.clip").read_bytes()
        assert packed(tmp_path / "b", tmp_path / "b.clip").read_bytes() == first


class TestEachOnce:
    def test_equal_contents_are_stored_once(self, root: Path, tmp_path: Path) -> None:
        report = clipfs.pack(root, tmp_path / "x.clip")
        # The file that only begins like another shares what whole pieces they have in common.
        alike = len(NOISE) % SPAN - 1000
        small = len(b"small\nodd#!") + 3 * (64 << 10)
        assert len(NOISE) + alike < report.unique <= len(NOISE) + alike + small
        assert report.data < report.unique + 1000
        with clipfs.Index.open(tmp_path / "x.clip") as index:
            nodes = [index.inode(index.resolve(name)) for name in ("big", "deep/copy")]
            places = [index.extents(node.address, node.size)[0][1:] for node in nodes]
        assert places[0] == places[1] == (0, places[0][1], len(NOISE))

    def test_zeros_take_no_place(self, tmp_path: Path) -> None:
        require_root()
        (tmp_path / "root").mkdir()
        (tmp_path / "root/zeros").write_bytes(bytes(5 * SPAN + 1))
        report = clipfs.pack(tmp_path / "root", tmp_path / "x.clip")
        assert (report.unique, report.spans) == (0, 0)
        clipfs.extract(tmp_path / "x.clip", tmp_path / "out")
        assert (tmp_path / "out/zeros").read_bytes() == bytes(5 * SPAN + 1)

    def test_a_tebibyte_of_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "root").mkdir()
        with (tmp_path / "root/hole").open("wb") as file:
            file.truncate(1 << 40)
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
        assert clipfs.pack(tmp_path / "root", tmp_path / "x.clip").unique == 64 << 10
        assert clipfs.pack(tmp_path / "x.clip", tmp_path / "y.clip").unique == 64 << 10

    def test_small_files_share_a_span(self, image: str, tmp_path: Path) -> None:
        tar = Tar()
        for number in range(500):
            tar.member(f"f{number}", b"%d " % number * 50)
        (tmp_path / "oci").mkdir()
        image = LayoutBuilder(tmp_path / "oci").layer(tar).write()
        assert clipfs.pack(image, tmp_path / "x.clip").spans == 1

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, SPAN)), max_size=12))
    def test_spans_hold_what_extents_say(self, files: list[tuple[int, int]]) -> None:
        """Files are beginnings of a few contents, of which one is mostly zeros."""
        contents = [bytes(SPAN // 2) + b"x" * (SPAN // 2), *(bytes([n]) * SPAN for n in range(1, 6))]
        placed = {}
        with io.BytesIO() as out, Pile(out) as pile:
            for number, (which, size) in enumerate(files):
                pile.add(2 * SPAN * number, 0, contents[which][:size])
                placed[2 * SPAN * number] = contents[which][:size]
            layer = pile.finish()
            out.seek(0)
            data = out.read()
        assert hashlib.sha256(data).hexdigest() == layer.digest.hex
        assert [span.end for span in layer.spans][-1:] == ([len(data)] if data else [])
        assert all(span.length <= SPAN * 3 // 2 for span in layer.spans)
        plain = b"".join(decode(Codec.ZSTD, span, data[span.start : span.end]) for span in layer.spans)
        assert hashlib.sha256(plain).hexdigest() == layer.diff_id.hex
        found = {address: bytearray(len(content)) for address, content in placed.items()}
        for extent in pile.extents:
            start, within = extent.address // (2 * SPAN) * 2 * SPAN, extent.address % (2 * SPAN)
            found[start][within : within + extent.length] = plain[extent.offset : extent.offset + extent.length]
        assert found == placed


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        ("source", "out", "words"),
        [
            ("/nonesuch.clip", "x.clip", "there is no file /nonesuch.clip"),
            ("oci:/nonesuch", "x.clip", "/nonesuch is no OCI layout"),
            ("IMAGE", "nonesuch/x.clip", "cannot write nonesuch/x.clip: No such file or directory"),
            ("IMAGE", ".", "cannot write .: it is a directory"),
            ("IMAGE", "/dev/null", "cannot write /dev/null: it is there and is no regular file"),
            ("IMAGE", "x" * 256, "File name too long"),
            ("", "/dev/shm/x.clip", "'' is no image name, nor that of a file: it is empty"),
            ("DIRECTORY", "/dev/null", "cannot write /dev/null"),
            ("DIRECTORY", "x.clip", "x.clip would be in what is packed; name another place with -o"),
        ],
    )
    def test_of_a_call(
        self, source: str, out: str, words: str, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        assert main(["pack", {"IMAGE": image, "DIRECTORY": str(tmp_path)}.get(source, source), "-o", out]) != 0
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    def test_where_one_stands_is_no_place_for_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["pack", "."]) == 2
        assert f"{tmp_path.name}.packed.clip would be in what is packed" in capsys.readouterr().err

    @pytest.mark.parametrize("size", ["256k", "2m"], ids=["no room for the data", "no room for all of it"])
    def test_a_disk_that_fills_up(self, size: str, root: Path, tmp_path: Path) -> None:
        small = tmp_path / "small"
        small.mkdir()
        (root / "noise").write_bytes(NOISE)
        layers = LayoutBuilder(tmp_path / "oci").layer(Tar().file("noise", NOISE))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", small], check=True)
        try:
            for source in (root, layers.config().write()):
                with pytest.raises(ClipfsError, match=f"^cannot write {small}/x.clip: No space left on device$"):
                    clipfs.pack(source, small / "x.clip")
            assert list(small.iterdir()) == []
        finally:
            subprocess.run(["umount", small], check=True)

    def test_a_file_that_changes_meanwhile(self, root: Path, tmp_path: Path) -> None:
        class Writer:
            """Appends to a file as soon as a part of it is read."""

            def begin(self, what: str, total: int) -> None: ...

            def end(self) -> None: ...

            def advance(self, count: int) -> None:
                with (root / "big").open("ab") as file:
                    file.write(b"more")

        with pytest.raises(ClipfsError, match=r"^'big' in .* was changed while it was read; pack it again"):
            clipfs.pack(root, tmp_path / "x.clip", progress=Writer())
        assert not (tmp_path / "x.clip").exists()

    def test_what_cannot_be_in_an_image_is_said(self, root: Path, tmp_path: Path) -> None:
        os.mknod(root / "whiteout", stat.S_IFCHR, 0)
        os.setxattr(root / "deep", "trusted.overlay.opaque", b"y")
        (root / "deep/mounted").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", root / "deep/mounted"], check=True)
        try:
            (root / "deep/mounted/hidden").touch()
            report = clipfs.pack(root, tmp_path / "x.clip")
        finally:
            subprocess.run(["umount", root / "deep/mounted"], check=True)
        said = "\n".join(report.warnings)
        assert "what is mounted on 'deep/mounted' is left out" in said
        assert "device 'whiteout' is left out" in said
        assert "trusted.overlay.opaque" in said
        with clipfs.Index.open(tmp_path / "x.clip") as index:
            index.check()
            assert index.entries(index.resolve("deep/mounted")) == []

    def test_a_flipped_bit_anywhere_in_the_data(self, small: Path, tmp_path: Path) -> None:
        with clipfs.Index.open(small) as index:
            first = index.layers[0].spans[0]
            at = small.stat().st_size - index.layers[0].size + first.end // 2
        clip = bytearray(small.read_bytes())
        clip[at] ^= 4
        (tmp_path / "x.clip").write_bytes(clip)
        with (
            clipfs.Index.open(tmp_path / "x.clip") as index,
            pytest.raises(FormatError, match="does not have its checksum"),
        ):
            index.check()
        with pytest.raises(IntegrityError, match="do not decode"):
            clipfs.extract(tmp_path / "x.clip", tmp_path / "out")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda clip: poke(clip, 16, 0), "its data is not where it should be"),
            (lambda clip: poke(clip, entry(Kind.DATA), 77), "it should carry its data and does not"),
            (lambda clip: poke(clip, at(clip, Kind.DATA), 0), "its data is not that of its layer"),
            (lambda clip: poke(clip, at(clip, Kind.LAYERS) + 8, 0xEE), "its data is not that of its layer"),
            (lambda clip: poke(clip, at(clip, Kind.LAYERS) + 2, 0), "has not the one layer"),
            (lambda clip: poke(clip, at(clip, Kind.SPANS) + SPAN_RECORD.size, 1), "do not follow each other"),
            (lambda clip: poke(clip, at(clip, Kind.LAYERS) + 148, 1), "is outside of it"),
            (lambda clip: poke(clip, at(clip, Kind.SEEKS) - SPAN_RECORD.size + 12, 1), "do not cover its data"),
        ],
    )
    def test_forgeries(self, change: Callable[[bytearray], None], words: str, small: Path, tmp_path: Path) -> None:
        """All checksums are right, and still it is not believed."""
        require_root()
        (tmp_path / "root").mkdir()
        (tmp_path / "root/noise").write_bytes(NOISE)
        clip = bytearray(packed(tmp_path / "root", tmp_path / "x.clip").read_bytes())
        change(clip)
        known = clip[entry(Kind.DATA)] == Kind.DATA
        (tmp_path / "x.clip").write_bytes(reseal(clip) if known else resigned(clip))
        with pytest.raises(FormatError, match=words), clipfs.Index.open(tmp_path / "x.clip") as index:
            index.check()

    def test_no_other_source_but_a_packed_clip(
        self, small: Path, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "x").write_bytes(b"no clip")
        for source, words in ((image, "name the packed .clip or its URL"), (tmp_path / "x", "is not a .clip file")):
            assert main(["check", "--data", "--source", str(source), str(small)]) != 0
            assert words in capsys.readouterr().err
