"""From an image to a ``.clip``: the same bytes every time, whole or not at all, with a sentence that names the layer.

What a tree must look like is tested elsewhere; here it is how the build goes, ends, and fails.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import zstandard

import clipfs
from clipfs import ClipfsError, ImageError, Index, IntegrityError, SourceError, UsageError
from clipfs.layers import bounds
from clipfs.oci import Descriptor
from clipfs.sources import open_source
from clipfs.sources.base import LocalBlob, Source
from clipfs.sources.layout import LayoutSource
from tests.builds import Elsewhere, Recorder, indexed, layers, spools, three_layers
from tests.images import Compression, LayoutBuilder, Tar
from tests.mounts import SECONDS, files

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    return three_layers(tmp_path_factory.mktemp("image") / "oci").write()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("CLIPFS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class TestReproducible:
    def test_it_depends_on_nothing_but_the_image(self, image: str, tmp_path: Path) -> None:
        """Not on directories, hash seeds, the clock, the time zone, the umask, or when the blobs were written."""
        code = (
            "import os, sys, time\n"
            "now, umask, name, out = sys.argv[1:]\n"
            "time.time, time.time_ns = lambda: float(now), lambda: int(now) * 10**9\n"
            "os.umask(int(umask, 8))\n"
            "import clipfs; clipfs.build(name, out)"
        )
        directory, tag = image.removeprefix("oci:").split(":")
        names = (image, f"oci:{os.path.relpath(directory, tmp_path)}:{tag}")
        made = set()
        for number, (name, now, umask) in enumerate(zip(names, ("0", "4000000000"), ("022", "077"), strict=True)):
            other = tmp_path / f"tmp {number}"
            other.mkdir()
            for path in files(Path(directory)):
                os.utime(path, (int(now), int(now)))
            environment = {
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(REPOSITORY),
                "PYTHONHASHSEED": str(number),
                "TZ": f"UTC+{number}",
                "TMPDIR": str(other),
                "CLIPFS_CACHE": str(other / "cache"),
            }
            command = [sys.executable, "-c", code, now, umask, name, str(other / "x.clip")]
            subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=SECONDS)
            assert (other / "x.clip").stat().st_mode & 0o777 == 0o666 & ~int(umask, 8)
            made.add((other / "x.clip").read_bytes())
        assert len(made) == 1

    async def test_nor_on_where_the_layers_were_read(self, image: str, tmp_path: Path) -> None:
        await indexed(open_source(image), tmp_path / "here.clip")
        await indexed(Elsewhere(image), tmp_path / "there.clip")
        assert (tmp_path / "here.clip").read_bytes() == (tmp_path / "there.clip").read_bytes()


# --- faults


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


class TestFaults:
    @pytest.mark.parametrize("number", range(3))
    @pytest.mark.parametrize(
        ("spoil", "kind", "words"),
        [
            (flipped, IntegrityError, "should have digest"),
            (cut, SourceError, "its descriptor says"),
            (emptied, SourceError, "its descriptor says"),
            (Path.unlink, SourceError, "No such file"),
        ],
    )
    def test_a_blob_that_is_not_what_it_was(
        self, spoil: Callable[[Path], None], kind: type[ClipfsError], words: str, number: int, tmp_path: Path
    ) -> None:
        made = three_layers(tmp_path / "oci")
        name, digest = made.write(), made._layers[number]["digest"]
        spoil(tmp_path / "oci" / "blobs" / "sha256" / digest.removeprefix("sha256:"))
        refused(name, tmp_path, kind, words, digest.removeprefix("sha256:"))

    @pytest.mark.parametrize("number", range(3))
    def test_a_layer_of_another_diff_id(self, number: int, tmp_path: Path) -> None:
        made = three_layers(tmp_path / "oci")
        made._diff_ids[number] = f"sha256:{'0' * 64}"
        refused(made.write(), tmp_path, IntegrityError, "uncompressed", "0" * 64, made._layers[number]["digest"])

    @pytest.mark.parametrize("change", [-1, 1, 1 << 40])
    def test_a_layer_of_another_size(self, change: int, tmp_path: Path) -> None:
        made = three_layers(tmp_path / "oci")
        made._layers[1]["size"] += change
        refused(made.write(), tmp_path, SourceError, "its descriptor says", made._layers[1]["digest"])

    def test_more_layers_than_diff_ids_and_the_reverse(self, tmp_path: Path) -> None:
        made = three_layers(tmp_path / "oci")
        lost = made._diff_ids.pop()
        refused(made.write(), tmp_path, ImageError, "its manifest lists 3 layers, its config 2 diff_ids")
        made._diff_ids += [lost, lost]
        refused(made.write(), tmp_path, ImageError, "its manifest lists 3 layers, its config 4 diff_ids")

    @pytest.mark.parametrize(
        ("how", "words"),
        [("none", "in the middle of a member"), ("gzip", "cut off"), ("zstd", "cut off"), ("zstd-frames", "cut off")],
    )
    def test_a_layer_that_was_pushed_cut_off(self, how: Compression, words: str, tmp_path: Path) -> None:
        """Its digest and its size are right, for it was broken before they were taken."""
        made = LayoutBuilder(tmp_path / "oci").layer(layers()[1]).layer(layers()[0], how)
        whole = made.directory / "blobs" / "sha256" / made._layers[1]["digest"].removeprefix("sha256:")
        half = made._blob(whole.read_bytes()[: whole.stat().st_size // 2], made._layers[1]["mediaType"])
        made._layers[1] = half
        refused(made.write(), tmp_path, ImageError, words, half["digest"])

    def test_a_layer_of_a_kind_that_is_not_read(self, tmp_path: Path) -> None:
        made = three_layers(tmp_path / "oci")
        made._layers[2] = made._blob(b"\xfd7zXZ\0" + bytes(500), "application/vnd.oci.image.layer.v1.tar+xz")
        refused(made.write(), tmp_path, ImageError, "xz", made._layers[2]["digest"])


def refused(name: str, directory: Path, kind: type[ClipfsError], *words: str) -> None:
    """The build raises one sentence, leaves no file, and an older ``.clip`` as it was."""
    out = directory / "out"
    out.mkdir(exist_ok=True)
    (out / "old.clip").write_bytes(b"as it was")
    for target in (out / "new.clip", out / "old.clip"):
        with pytest.raises(kind) as caught:
            clipfs.build(name, target)
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)
        assert files(directory / "cache") == []
    assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [("old.clip", b"as it was")]


def test_a_disk_that_fails_is_a_source_that_does(image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first page of a process is nobody's memory: reading it is an I/O error, as a bad sector is."""
    real = LayoutSource.local

    def failing(source: LayoutSource, blob: Descriptor) -> LocalBlob:
        found = real(source, blob)
        return found._replace(path=Path("/proc/self/mem")) if "layer" in blob.media_type else found

    monkeypatch.setattr(LayoutSource, "local", failing)
    said = "^cannot read layer sha256:[0-9a-f]{64} in /proc/self/mem: Input/output error$"
    with pytest.raises(SourceError, match=said):
        clipfs.build(image, tmp_path / "x.clip")


def test_what_all_layers_say_is_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_METADATA", 1 << 20)
    whiteouts = Tar()
    for number in range(1000):
        whiteouts.whiteout(f"w{number}")
    image = LayoutBuilder(tmp_path)
    for _ in range(3):
        image.layer(whiteouts, "zstd")
    with pytest.raises(clipfs.ImageError, match="take more than 1 MiB"):
        clipfs.build(image.write(), tmp_path / "x.clip")


class TestOutput:
    def test_an_older_one_is_replaced_in_one_step(self, image: str, tmp_path: Path) -> None:
        out = tmp_path / "x.clip"
        out.write_bytes(b"old")
        with out.open("rb") as reader:
            clipfs.build(image, out)
            assert reader.read() == b"old"
        with Index.open(out) as index:
            index.check()

    @pytest.mark.parametrize(
        ("place", "kind", "words"),
        [
            ("none/x.clip", ClipfsError, "No such file or directory"),
            ("file/x.clip", ClipfsError, "Not a directory"),
            ("/proc/x.clip", ClipfsError, "cannot write /proc/x.clip"),
            ("directory", UsageError, "it is a directory"),
        ],
    )
    def test_a_place_that_cannot_be_written_is_told_before_the_work(
        self, place: str, kind: type[ClipfsError], words: str, image: str, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "directory").mkdir()
        progress = Recorder()
        with pytest.raises(kind, match=words):
            clipfs.build(image, tmp_path / place, progress=progress)
        assert progress.advances == 0

    def test_a_disk_that_fills_up_leaves_the_older_one(self, image: str, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x.clip").write_bytes(b"old")
        code = (
            "import resource, sys, clipfs\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "try: clipfs.build(*sys.argv[1:])\n"
            "except clipfs.ClipfsError as error: print(error)"
        )
        command = [sys.executable, "-c", code, image, str(tmp_path / "out" / "x.clip")]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=SECONDS)
        assert (done.stdout, done.stderr) == (f"cannot write {tmp_path}/out/x.clip: File too large\n", "")
        assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [("x.clip", b"old")]


class TestCancelling:
    """The layer under work is given up in its middle, not at its end."""

    @pytest.mark.parametrize("remote", [False, True])
    async def test_by_trio(self, remote: bool, image: str, tmp_path: Path, cache: Path) -> None:
        scope = trio.CancelScope()

        def on_advance() -> None:
            if any("fetching" in what for what, _, _ in progress.steps) or not remote:
                trio.from_thread.run_sync(scope.cancel)

        progress = Recorder(on_advance)
        with scope:
            await indexed(Elsewhere(image) if remote else open_source(image), tmp_path / "x.clip", progress)
        assert scope.cancelled_caught
        assert [what for what, _, _ in progress.steps] == (["fetching layer 1/3"] if remote else [])
        assert files(tmp_path) == []

    def test_by_control_c(self, image: str, tmp_path: Path) -> None:
        def interrupt() -> None:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            for _ in range(2):  # rounds of the loop, after which it knows
                trio.from_thread.run_sync(lambda: None)

        progress = Recorder(interrupt)
        with pytest.raises(KeyboardInterrupt):
            clipfs.build(image, tmp_path / "x.clip", progress=progress)
        assert progress.advances == 1
        assert files(tmp_path) == []


class TestRemote:
    async def test_one_layer_at_a_time_is_on_the_disk_and_none_afterwards(
        self, image: str, tmp_path: Path, cache: Path
    ) -> None:
        source = Elsewhere(image)
        await indexed(source, tmp_path / "x.clip")
        assert (source.spools, source.open_streams) == ([1, 1, 1], 0)
        assert (spools(), files(cache)) == ([], [])

    async def test_what_never_ends_is_not_kept(self, image: str, tmp_path: Path, cache: Path) -> None:
        source = Elsewhere(image, lambda data: data + bytes(100 << 20))
        with pytest.raises(SourceError, match=r"sent more than the [0-9]+ bytes of layer sha256:"):
            await indexed(source, tmp_path / "x.clip")
        async with open_source(image) as here:
            size = (await here.image()).manifest.layers[0].size
        assert source.pieces <= size // 10_000 + 1
        # Closed by who used it, not whenever the garbage collector comes by.
        assert source.open_streams == 0
        assert (spools(), files(tmp_path)) == ([], [])

    async def test_what_ends_early_is_told(self, image: str, tmp_path: Path) -> None:
        source = Elsewhere(image, lambda data: data[:-1])
        with pytest.raises(SourceError, match=r"of the [0-9]+ bytes of layer sha256:"):
            await indexed(source, tmp_path / "x.clip")
        assert (spools(), files(tmp_path)) == ([], [])

    async def test_what_was_changed_on_the_way_is_told(self, image: str, tmp_path: Path) -> None:
        source = Elsewhere(image, lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        with pytest.raises(IntegrityError, match=r"layer sha256:.* fetch it again"):
            await indexed(source, tmp_path / "x.clip")
        assert (spools(), files(tmp_path)) == ([], [])


@pytest.mark.parametrize("make", [clipfs.build, clipfs.pack, lambda name, out: clipfs.index_for(name)])
@pytest.mark.parametrize("name", ["oci:/image", "https://localhost/x.clip"])
async def test_inside_of_trio(make: Callable[[str, Path], object], name: str, tmp_path: Path) -> None:
    """Nobody else would run meanwhile."""
    with pytest.raises(UsageError, match=r"await trio\.to_thread\.run_sync"):
        make(name, tmp_path / "x.clip")


class TestProgress:
    @pytest.mark.parametrize("remote", [False, True])
    async def test_every_step_is_counted_to_its_end(self, remote: bool, image: str, tmp_path: Path) -> None:
        progress = Recorder()
        source: Source = Elsewhere(image) if remote else open_source(image)
        report = await indexed(source, tmp_path / "x.clip", progress)
        wanted = ("fetching layer", "indexing layer") if remote else ("indexing layer",)
        assert [what for what, _, _ in progress.steps] == [f"{what} {n}/3" for n in (1, 2, 3) for what in wanted]
        assert [done for _, _, done in progress.steps] == [total for _, total, _ in progress.steps]
        assert sum(total for _, total, _ in progress.steps) == len(wanted) * report.compressed


def test_the_index_of_a_real_image_is_small(demo_image: str, tmp_path: Path) -> None:
    """The bounds that the format promises; the bytes are the same every time, too."""
    report = clipfs.build(demo_image, tmp_path / "demo.clip")
    data = (tmp_path / "demo.clip").read_bytes()
    assert len(data) == report.clip_size <= 140 * report.inodes + 0.003 * report.compressed
    assert len(zstandard.ZstdCompressor(level=19).compress(data)) <= 0.01 * report.compressed
    assert clipfs.index_for(demo_image).read_bytes() == data
