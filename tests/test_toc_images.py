"""Whole images by their tables of contents, and by the ordinary pass: the same in all that can be asked.

The layers come from `tests.stargz`: eStargz by hand, zstd:chunked by skopeo. The ordinary pass, which is what images of
this machine get, is judged by other people's tools elsewhere.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

import pytest
import trio

import clipfs
from clipfs.building import contents
from clipfs.building.builder import Silent, build_image
from clipfs.layers import bounds
from clipfs.oci import Descriptor
from clipfs.sources.registry import RegistrySource
from tests.builds import Elsewhere
from tests.cases import CAPABILITY, UMOCI, Layers, tree
from tests.conftest import require_programs, require_root
from tests.images import LayoutBuilder, Tar
from tests.mounts import SECONDS
from tests.oracle import Picture, differences, picture
from tests.registry import Registry
from tests.stargz import TOC_DIGEST, Stargz, Toc, chunked_image, footer, packed_toc, stargz, stargz_image

pytestmark = pytest.mark.usefixtures("near")

pytest_plugins = ("tests.mount_fixtures",)

# Not sparse files: tarfile does not give them back as they are stored, and OCI advises against them.
CASES = [
    "kinds", "hardlinks", "times", "names", "xattrs", "sizes", "the root has attributes", "duplicates", "whiteouts",
    "opaque directories", "empty layers", "random 0",
]  # fmt: skip

CHUNKED = "io.github.containers.zstd-chunked"

SECOND = 1_000_000_000


@pytest.fixture(autouse=True)
def _able() -> None:
    require_root()
    require_programs("skopeo", "docker-registry")


class Counted(Elsewhere):
    """Counts what is read of the layers."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.ranges = 0

    async def read_range(self, blob: Descriptor, start: int, end: int) -> bytes:
        self.ranges += end - start if "layer" in blob.media_type else 0
        return await super().read_range(blob, start, end)


def indexed(image: str, out: Path) -> tuple[clipfs.BuildReport, Counted]:
    """Index an image as if it was not on this machine."""

    async def main() -> tuple[clipfs.BuildReport, Counted]:
        with trio.fail_after(SECONDS):
            async with Counted(image) as source:
                return await build_image(source, await source.image(), out, Silent()), source

    return trio.run(main)


def extracted(clip: Path, target: Path) -> Picture:
    with clipfs.Index.open(clip) as index:
        index.check()
    clipfs.extract(clip, target)
    return picture(target)


def rounded(found: Picture) -> Picture:
    """With times as eStargz' tables have them."""
    half = SECOND // 2
    return {path: facts._replace(mtime_ns=(facts.mtime_ns + half) // SECOND * SECOND) for path, facts in found.items()}


def shown(found: Picture) -> Picture:
    """Without what runtimes that know eStargz do not show."""
    hidden = (b"stargz.index.json", b".no.prefetch.landmark", b".prefetch.landmark")
    return {path: facts for path, facts in found.items() if path not in hidden}


def as_stargz(layers: Layers, directory: Path) -> str:
    """A small chunk size, and odd, so that chunks are many and lie anyhow."""
    return stargz_image(directory, *[stargz(layer.done(), chunk_size=50_021) for layer in layers])


def as_stargz_with_many_in_a_member(layers: Layers, directory: Path) -> str:
    """Several files and chunks share a gzip member, which has a file name in its header."""
    made = [stargz(layer.done(), chunk_size=30_011, min_chunk_size=100_000, named=True) for layer in layers]
    return stargz_image(directory, *made)


def as_chunked(layers: Layers, directory: Path) -> str:
    plain = LayoutBuilder(directory.with_name("plain"))
    for layer in layers:
        plain.layer(layer, "none")
    return chunked_image(plain.write(), directory)


FORMATS: list[Callable[[Layers, Path], str]] = [as_stargz, as_stargz_with_many_in_a_member, as_chunked]


class TestTrees:
    @pytest.mark.parametrize(
        ("name", "make"),
        [*product(CASES, (as_stargz, as_chunked)), *product(("kinds", "sizes"), (as_stargz_with_many_in_a_member,))],
    )
    def test_the_table_says_what_the_tar_says(
        self, name: str, make: Callable[[Layers, Path], str], tmp_path: Path
    ) -> None:
        layers = UMOCI[name]()
        image = make(layers, tmp_path / "oci")
        clipfs.build(image, tmp_path / "whole.clip")
        report, source = indexed(image, tmp_path / "table.clip")
        right = extracted(tmp_path / "whole.clip", tmp_path / "whole")
        found = extracted(tmp_path / "table.clip", tmp_path / "table")
        if make is not as_chunked:
            right, found = rounded(shown(right)), rounded(shown(found))
        assert "\n".join(differences(found, right)) == ""
        # Names that are no UTF-8 are what JSON cannot say.
        assert (source.pieces > 0) == any("no UTF-8" in warning for warning in report.warnings)


def a_layer() -> Tar:
    return Tar().dir("d").file("d/f", Random(1).randbytes(300_000)).file("g", b"g" * 5000).symlink("l", "g")


def chunk_of(toc: Toc) -> Toc:
    """The entry of the file ``d/f``."""
    return next(entry for entry in toc["entries"] if entry["name"] == "d/f")


def overlapping(toc: Toc) -> None:
    chunk_of(toc)["offset"] += 1 << 30


def without_digest(toc: Toc) -> None:
    del chunk_of(toc)["digest"], chunk_of(toc)["chunkDigest"]


def escaping(toc: Toc) -> None:
    chunk_of(toc)["name"] = "../f"


def rewrapped(name: bytes) -> Stargz:
    """The table under another name than it should have."""
    made = stargz(a_layer().done())
    document = json.dumps(made.toc, indent="\t").encode()
    blob = made.blob[: made.end] + packed_toc(document, name) + footer(made.end)
    return replace(made, blob=blob)


def reannotated(**changes: str) -> Stargz:
    made = stargz(a_layer().done())
    return replace(made, annotations=made.annotations | changes)


def with_footer(end: bytes) -> Stargz:
    made = stargz(a_layer().done())
    return replace(made, blob=made.blob[:-51] + end)


def external() -> bytes:
    """The footer of a layer whose table is elsewhere."""
    extra = b"SG\x11\0STARGZEXTERNALTOC"
    return b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + bytes([len(extra), 0]) + extra + b"\1\0\0\xff\xff" + bytes(8)


# What makes a table useless, and what is said of it.
USELESS: dict[str, tuple[Callable[[], Stargz], str]] = {
    "another digest": (
        lambda: reannotated(**{TOC_DIGEST: "sha256:" + "0" * 64}),
        "table of contents should have digest",
    ),
    "no digest": (lambda: reannotated(**{TOC_DIGEST: "true"}), "'true:' is no digest"),
    "two formats": (lambda: reannotated(**{f"{CHUNKED}.manifest-checksum": "x"}), "at once"),
    "no footer": (lambda: with_footer(gzip.compress(b"", mtime=0)), "no eStargz footer"),
    "a footer that leads nowhere": (lambda: with_footer(footer(1 << 40)), "at byte 1099511627776 of"),
    "a footer that leads to the beginning": (lambda: with_footer(footer(0)), "at byte 0 of"),
    "a footer that leads astray": (lambda: with_footer(footer(1)), "is no gzip stream"),
    "a table elsewhere": (lambda: with_footer(external()), "in another image"),
    "another name": (lambda: rewrapped(b"index.json"), "no stargz.index.json where"),
    "an overlap": (lambda: stargz(a_layer().done(), edit=overlapping), "offset should be a number"),
    "no chunk digest": (lambda: stargz(a_layer().done(), edit=without_digest), "has no digest"),
    "a name that escapes": (lambda: stargz(a_layer().done(), edit=escaping), "leads out of the root"),
}


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> str:
    return as_chunked([a_layer()], tmp_path_factory.mktemp("chunked") / "oci")


class TestUselessTables:
    """The layer is read as a whole then, which verifies all of it; and it is said why."""

    @pytest.mark.parametrize("name", USELESS)
    def test_of_estargz(self, name: str, tmp_path: Path) -> None:
        make, said = USELESS[name]
        self._whole(stargz_image(tmp_path / "oci", make()), said, tmp_path)

    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            ("checksum", "sha256:" + "0" * 64, "should have digest"),
            ("checksum", "", "is no digest"),
            ("position", "", "does not say where"),
            ("position", "1:2:3", "does not say where"),
            ("position", "-1:2:3:1", "does not say where"),
            ("position", "{0}:{1}:{2}:2", "does not say where"),
            ("position", "7:{1}:{2}:1", "of contents is at '7:"),
            ("position", "999999999999999:{1}:{2}:1", "of contents is at '999999999999999:"),
            ("position", "{0}:999999999:{2}:1", "of contents is at"),
            ("position", "{0}:{1}:999999999:1", "of contents is at"),
            ("position", "{0}:{1}:1:1", "does not have the 1 bytes"),
            ("position", "{0}:{1}:1000000:1", "does not have the 1000000 bytes"),
            ("position", "{0}:3:{2}:1", "should have digest"),
        ],
    )
    def test_of_zstd_chunked(self, field: str, value: str, said: str, chunked: str, tmp_path: Path) -> None:
        shutil.copytree(chunked.removeprefix("oci:").removesuffix(":latest"), tmp_path / "oci")

        def edit(manifest: Toc) -> None:
            annotations = manifest["layers"][0]["annotations"]
            [checksum] = [key for key in annotations if key.endswith("manifest-checksum")]
            position = checksum.replace("checksum", "position")
            told = annotations[position].split(":")
            annotations[position if field == "position" else checksum] = value.format(*told)

        self._whole(edited(f"oci:{tmp_path}/oci:latest", edit), said, tmp_path)

    def test_one_that_is_a_bomb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(contents, "MAX_TABLE", 100)
        monkeypatch.setattr(contents, "_TAR_HEADER", 1024)
        self._whole(stargz_image(tmp_path / "oci", stargz(a_layer().done())), "more than the 100 bytes", tmp_path)

    def test_one_that_is_too_large_to_be_fetched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(contents, "MAX_COMPRESSED", 100)
        source = self._whole(stargz_image(tmp_path / "oci", stargz(a_layer().done())), "is at byte", tmp_path)
        assert source.ranges == 51

    def _whole(self, image: str, said: str, directory: Path) -> Counted:
        report, source = indexed(image, directory / "table.clip")
        [warning] = report.warnings
        assert said in warning
        assert warning.isprintable()
        assert re.match("layer sha256:[0-9a-f]{64} is downloaded and read as a whole: ", warning)
        assert source.pieces > 0
        clipfs.build(image, directory / "whole.clip")
        assert (directory / "table.clip").read_bytes() == (directory / "whole.clip").read_bytes()
        return source

    def test_one_layer_again_and_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its chunks are kept each time, and count each time; so does what is read once more as a whole."""
        monkeypatch.setattr(bounds, "MAX_METADATA", 1 << 20)
        layer = stargz(Tar().file("f", os.urandom(100_000)).done(), chunk_size=200)
        with pytest.raises(clipfs.ImageError, match="take more than 1 MiB"):
            indexed(stargz_image(tmp_path / "oci", *[layer] * 6), tmp_path / "x.clip")

    def test_a_link_to_nothing_is_an_error(self, tmp_path: Path) -> None:
        """What is wrong with the tree and not with the table would be wrong with the tar, too."""

        def edit(toc: Toc) -> None:
            toc["entries"].append({"name": "h", "type": "hardlink", "linkName": "none"})

        with pytest.raises(clipfs.ImageError, match=r"'none', which does not exist \(layer sha256:"):
            indexed(stargz_image(tmp_path / "oci", stargz(a_layer().done(), edit=edit)), tmp_path / "x.clip")


def edited(image: str, edit: Callable[[Toc], None]) -> str:
    """The image of an OCI layout with its manifest changed."""
    directory = Path(image.removeprefix("oci:").removesuffix(":latest"))
    index = json.loads((directory / "index.json").read_bytes())
    blobs = directory / "blobs" / "sha256"
    descriptor = index["manifests"][0]
    manifest = json.loads((blobs / descriptor["digest"].removeprefix("sha256:")).read_bytes())
    edit(manifest)
    raw = json.dumps(manifest).encode()
    digest = hashlib.sha256(raw).hexdigest()
    (blobs / digest).write_bytes(raw)
    descriptor |= {"digest": f"sha256:{digest}", "size": len(raw)}
    (directory / "index.json").write_text(json.dumps(index))
    return image


def library() -> Layers:
    """A layer as images have them: some large files and many small ones, and something of everything else."""
    tar, chance = tree(), Random(7)
    tar.dir("lib")
    for number in range(60):
        tar.file(f"lib/{number}", chance.randbytes(chance.randrange(100, 200_000)), mode=0o755)
    tar.file("lib/text", b"".join(b"%07d\n" % number for number in range(200_000)))
    tar.file("lib/holes", chance.randbytes(10_000) + bytes(1_000_000) + chance.randbytes(10_000))
    tar.file("lib/xattrs", b"x", xattrs={"user.a": b"\0\xff", "security.capability": CAPABILITY})
    return [tar, Tar().whiteout("d/b").opaque("d/sub").file("d/new", b"new").hardlink("lib/hard", "lib/7")]


@pytest.mark.parametrize("make", FORMATS)
class TestRegistry:
    """Through docker-registry and a real mount."""

    def test_a_mount_that_has_fetched_next_to_nothing(
        self, make: Callable[[Layers, Path], str], tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image = make(library(), tmp_path / "oci")
        fetched = count_ranges(monkeypatch)
        with Registry(tmp_path) as registry:
            report = clipfs.build(registry.push(image, "a/b:c"), tmp_path / "table.clip")
            large = [count for blob, count in fetched.items() if blob.size > 1 << 20]
            assert len(large) == 1
            assert large[0] < report.compressed / 50
            with mounted(tmp_path / "table.clip", tmp_path / "table") as top:
                found = picture(top)
                data = (top / "lib/text").read_bytes()
        assert data == b"".join(b"%07d\n" % number for number in range(200_000))
        clipfs.build(image, tmp_path / "whole.clip")
        with mounted(tmp_path / "whole.clip", tmp_path / "whole") as top:
            right = picture(top)
        if make is not as_chunked:
            right, found = rounded(shown(right)), rounded(found)
        assert "\n".join(differences(found, right)) == ""

    def test_a_wrong_byte_is_noticed(self, make: Callable[[Layers, Path], str], tmp_path: Path, runtime: Path) -> None:
        image = make(library(), tmp_path / "oci")
        clip = tmp_path / "x.clip"
        with Registry(tmp_path) as registry:
            clipfs.build(registry.push(image, "a/b:c"), clip)
            with clipfs.Index.open(clip) as index:
                layer = index.layers[0]
                node = index.inode(index.resolve("lib/11"))
                [(_, _, offset, _), *_] = index.extents(node.address, 1)
                span = layer.spans[layer.spans.find(offset)]
            [blob] = tmp_path.glob(f"registry/**/{layer.digest.hex}/data")
            raw = bytearray(blob.read_bytes())
            raw[(span.start + span.end) // 2] ^= 1
            blob.write_bytes(raw)
            with mounted(clip, tmp_path / "table") as top:
                with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                    (top / "lib/11").read_bytes()
                assert (top / "d/new").read_bytes() == b"new"
                assert len((top / "lib/text").read_bytes()) == 1_600_000

    def test_neighbours_are_fetched_together(
        self, make: Callable[[Layers, Path], str], tmp_path: Path, runtime: Path
    ) -> None:
        """Chunks are small, and a request each would be slow."""
        image = make([Tar().file("f", Random(3).randbytes(6_000_000))], tmp_path / "oci")
        with Registry(tmp_path) as registry:
            clipfs.build(registry.push(image, "a/b:c"), tmp_path / "x.clip")
            with mounted(tmp_path / "x.clip", tmp_path / "table") as top:
                assert (top / "f").read_bytes() == Random(3).randbytes(6_000_000)
            with clipfs.Index.open(tmp_path / "x.clip") as index:
                spans = len(index.layers[0].spans)
            requests = [line for line in registry.requests if '" 206 ' in line]
        assert spans > 60
        print(spans, len(requests))
        assert len(requests) < spans


@contextmanager
def mounted(clip: Path, directory: Path) -> Iterator[Path]:
    directory.mkdir()
    with clipfs.mount(clip, directory, clipfs.MountOptions(cache_size=0, prefetch="none")):
        yield directory


def count_ranges(monkeypatch: pytest.MonkeyPatch) -> dict[Descriptor, int]:
    """Bytes that the registry is asked for of each layer, from now on in this process. Whole blobs must not be."""
    counts: dict[Descriptor, int] = {}
    ordinary = RegistrySource.read_range

    async def read_range(self: RegistrySource, blob: Descriptor, start: int, end: int) -> bytes:
        data = await ordinary(self, blob, start, end)
        if "layer" in blob.media_type:
            counts[blob] = counts.get(blob, 0) + len(data)
        return data

    def stream(self: RegistrySource, blob: Descriptor) -> AsyncGenerator[bytes, None]:
        pytest.fail(f"{blob} is downloaded as a whole")

    monkeypatch.setattr(RegistrySource, "read_range", read_range)
    monkeypatch.setattr(RegistrySource, "stream", stream)
    return counts
