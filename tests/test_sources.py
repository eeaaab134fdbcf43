"""Images in files: layouts and archives, made by the tools that people make them with, and by hand where they lie."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import zstandard

from clipfs.errors import ClipfsError, ImageError, IntegrityError, SourceError, UsageError
from clipfs.oci import OCI_INDEX, OCI_MANIFEST, Descriptor, Digest, Platform
from clipfs.sources import Source, open_source
from clipfs.sources.archive import Archive
from clipfs.sources.base import LocalBlob, read_file
from clipfs.sources.layout import LayoutSource
from tests import tars
from tests.images import LayoutBuilder

ONE = tars.header(b"one", size=3) + b"one".ljust(512, b"\0") + tars.END
TWO = tars.header(b"two", size=3) + b"two".ljust(512, b"\0") + tars.END


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A layout with one image, ``v1``, of two layers."""
    directory = tmp_path / "layout"
    directory.mkdir()
    LayoutBuilder(directory).layer(ONE).layer(TWO, "none").config(env=["IMAGE=v1"]).write("v1")
    return directory


def run(*command: str | Path, cwd: Path | None = None) -> None:
    subprocess.run([str(part) for part in command], check=True, timeout=60, capture_output=True, cwd=cwd)


def edit_index(layout: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = layout / "index.json"
    index = json.loads(path.read_bytes())
    edit(index)
    path.write_text(json.dumps(index))


def add_blob(layout: Path, data: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


async def layers_of(source: Source) -> list[bytes]:
    """Every layer, uncompressed; read at once, as a stream, in odd ranges, and where it lies. All must agree."""
    image = await source.image()
    found = []
    for blob in image.manifest.layers:
        whole = await source.read_range(blob, 0, blob.size)
        assert b"".join([piece async for piece in source.stream(blob)]) == whole
        sunk: list[bytes] = []
        await source.read_into(blob, 3, blob.size, sunk.append)
        assert b"".join(sunk) == whole[3:]
        ranges = [(start, min(start + 7, blob.size)) for start in range(0, blob.size, 7)]
        assert b"".join([await source.read_range(blob, *each) for each in ranges[:20]]) == whole[: 7 * 20]
        place = source.local(blob)
        assert place is not None
        with place.path.open("rb") as file:
            assert os.pread(file.fileno(), place.size, place.offset) == whole
        assert Digest.of(whole) == blob.digest
        found.append(gzip.decompress(whole) if whole.startswith(b"\x1f\x8b") else whole)
    return found


class TestNames:
    @pytest.mark.parametrize(
        "name",
        ["", "oci:", "oci-archive::tag", "docker-archive:", "dir:/tmp", "https://example.com/x",
         "containers-storage:x", "docker-daemon:x", "docker://", "/etc", "./x", "oci:/no\0pe", "UPPER", "\0"],
    )  # fmt: skip
    def test_malformed_names_teach_the_forms(self, name: str) -> None:
        with pytest.raises(UsageError, match=r"oci:DIR\[:TAG\]") as caught:
            open_source(name)
        if name == "/etc":
            assert "put its form before it" in str(caught.value)

    def test_bare_references_mean_a_registry(self) -> None:
        assert open_source("debian").name == "docker://docker.io/library/debian:latest"
        assert open_source("docker://localhost:5000/a:b").name == "docker://localhost:5000/a:b"

    @pytest.mark.parametrize("form", ["oci", "oci-archive", "docker-archive"])
    def test_what_is_not_there_is_said(self, form: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="nothing"):
            open_source(f"{form}:{tmp_path}/nothing")

    @pytest.mark.parametrize("form", ["oci", "oci-archive", "docker-archive"])
    def test_what_cannot_be_looked_at_is_said(self, form: str) -> None:
        with pytest.raises(SourceError, match=r"cannot read /xx.*: File name too long"):
            open_source(f"{form}:/{'x' * 5000}")

    def test_a_long_name_is_no_path(self) -> None:
        with pytest.raises(UsageError, match="is no image name"):
            open_source("X" * 5000)

    def test_names_become_absolute(self, layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(layout.parent)
        assert open_source("oci:layout:v1").name == f"oci:{layout}:v1"


def test_an_http_client_is_imported_when_it_is_needed() -> None:
    """It costs a fifth of a second, which a mount of local files should not spend."""
    code = "import sys, clipfs.sources as s; s.open_source('debian'); sys.exit('httpx2' in sys.modules)"
    run(sys.executable, "-c", code)


class TestLayout:
    async def test_an_image_by_tag(self, layout: Path) -> None:
        async with open_source(f"oci:{layout}:v1") as source:
            image = await source.image()
            assert (image.name, image.config.env) == (f"oci:{layout}:v1", ("IMAGE=v1",))
            assert await layers_of(source) == [ONE, TWO]

    async def test_the_only_image_needs_no_tag(self, layout: Path) -> None:
        async with open_source(f"oci:{layout}") as source:
            assert (await source.image()).config.env == ("IMAGE=v1",)

    async def test_several_images_are_listed(self, layout: Path) -> None:
        LayoutBuilder(layout).layer(TWO).config(env=["IMAGE=v2"]).write("v2")
        async with open_source(f"oci:{layout}") as source:
            with pytest.raises(UsageError, match="2 images; add one of these tags to the name: 'v1', 'v2'"):
                await source.image()
        async with open_source(f"oci:{layout}:v2") as source:
            assert (await source.image()).config.env == ("IMAGE=v2",)
        async with open_source(f"oci:{layout}:v3") as source:
            with pytest.raises(UsageError, match="no image 'v3'; it has 'v1', 'v2'"):
                await source.image()

    async def test_umocis(self, tmp_path: Path) -> None:
        rootfs = tmp_path / "bundle" / "rootfs"
        run("umoci", "init", "--layout", tmp_path / "umoci")
        run("umoci", "new", "--image", f"{tmp_path}/umoci:tiny")
        run("umoci", "unpack", "--image", f"{tmp_path}/umoci:tiny", tmp_path / "bundle")
        (rootfs / "hello").write_text("hello")
        run("umoci", "repack", "--image", f"{tmp_path}/umoci:tiny", tmp_path / "bundle")
        async with open_source(f"oci:{tmp_path}/umoci:tiny") as source:
            [layer] = await layers_of(source)
            assert b"hello" in layer

    async def test_buildahs(self, tmp_path: Path) -> None:
        store = ["buildah", f"--root={tmp_path}/root", f"--runroot={tmp_path}/runroot", "--storage-driver=vfs"]
        (tmp_path / "hello").write_text("hello")
        run(*store, "from", "--name", "work", "scratch")
        run(*store, "copy", "work", tmp_path / "hello", "/hello")
        for target in (f"oci:{tmp_path}/built:tag", f"docker-archive:{tmp_path}/built.tar:built:tag"):
            run(*store, "commit", "work", target)
            async with open_source(target) as source:
                [layer] = await layers_of(source)
                assert b"hello" in layer

    async def test_a_platform_is_chosen(self, layout: Path) -> None:
        LayoutBuilder(layout).layer(TWO).config(env=["IMAGE=arm"]).write("arm", architecture="arm64")
        entries = json.loads((layout / "index.json").read_bytes())["manifests"]
        index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
        outer = {"mediaType": OCI_INDEX, **add_blob(layout, index)}
        edit_index(layout, lambda index: index.update(manifests=[outer]))
        async with open_source(f"oci:{layout}") as source:
            for name, expected in [("linux/arm64/v8", "IMAGE=arm"), (str(Platform.host()), "IMAGE=v1")]:
                assert (await source.image(Platform.parse(name))).config.env == (expected,)
            with pytest.raises(ImageError, match="made for"):
                await source.image(Platform.parse("linux/s390x"))

    async def test_an_image_of_one_platform_is_not_passed_off_as_another(self, layout: Path) -> None:
        async with open_source(f"oci:{layout}") as source:
            with pytest.raises(ImageError, match="not for linux/s390x"):
                await source.image(Platform.parse("linux/s390x"))

    async def test_indexes_do_not_nest_for_ever(self, layout: Path) -> None:
        def nest() -> None:
            index = (layout / "index.json").read_bytes()
            entry = {"mediaType": OCI_INDEX, **add_blob(layout, index)}
            edit_index(layout, lambda index: index.update(manifests=[entry]))

        nest()
        async with open_source(f"oci:{layout}") as source:
            assert (await source.image()).config.env == ("IMAGE=v1",)
            for _ in range(8):
                nest()
            with pytest.raises(ImageError, match="deep"):
                await source.image()

    async def test_blobs_are_verified(self, layout: Path) -> None:
        async with open_source(f"oci:{layout}") as source:
            manifest = (await source.image()).manifest
            for digest in (manifest.config.digest, manifest.digest):
                path = layout / "blobs" / "sha256" / digest.hex
                data = path.read_bytes()
                path.write_bytes(data.replace(b"i", b"I", 1))
                with pytest.raises(IntegrityError, match="damaged or forged"):
                    await source.image()
                path.write_bytes(data)

    async def test_a_long_range_comes_in_pieces(self, tmp_path: Path) -> None:
        plain = os.urandom(3 << 20)
        name = LayoutBuilder(tmp_path).layer(tars.Tar().member("f", plain), "none").config().write()
        async with open_source(name) as source:
            [blob] = (await source.image()).manifest.layers
            pieces: list[bytes] = []
            await source.read_into(blob, 512, 512 + (3 << 20), pieces.append)
            assert len(pieces) == 3
            assert b"".join(pieces) == plain
            with pytest.raises(SourceError):
                await source.read_into(blob, 0, blob.size + 1, pieces.append)

    async def test_links_out_of_the_layout_are_refused(self, layout: Path, tmp_path: Path) -> None:
        async with open_source(f"oci:{layout}") as source:
            blob = (await source.image()).manifest.layers[0]
            path = layout / "blobs" / "sha256" / blob.digest.hex
            secret = path.rename(tmp_path / "secret")
            path.symlink_to(secret)
            with pytest.raises(SourceError, match="link out of the layout"):
                await source.read_range(blob, 0, 10)
            path.unlink()
            path.symlink_to(secret.rename(layout / "kept"))
            assert len(await source.read_range(blob, 0, 10)) == 10

    async def test_what_is_no_file_is_refused(self, layout: Path) -> None:
        async with open_source(f"oci:{layout}") as source:
            blob = (await source.image()).manifest.layers[0]
            path = layout / "blobs" / "sha256" / blob.digest.hex
            path.unlink()
            with pytest.raises(SourceError, match="No such file"):
                await source.read_range(blob, 0, 10)
            os.mkfifo(path)
            with trio.fail_after(5), pytest.raises(SourceError, match="not a regular file"):
                await source.read_range(blob, 0, 10)

    async def test_what_becomes_another_between_look_and_read_is_refused(
        self, layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        look = LayoutSource.local

        def then_cut_off(source: LayoutSource, blob: Descriptor) -> LocalBlob:
            found = look(source, blob)
            os.truncate(found.path, 9)
            return found

        async with open_source(f"oci:{layout}") as source:
            blob = (await source.image()).manifest.layers[0]
            monkeypatch.setattr(LayoutSource, "local", then_cut_off)
            with pytest.raises(SourceError, match="ends before the last byte"):
                await source.read_range(blob, 0, 10)
        pipe, link = tmp_path / "pipe", tmp_path / "link"
        os.mkfifo(pipe)
        link.symlink_to(layout / "index.json")
        for path, why in ((pipe, "not a regular file"), (link, "symbolic links"), (Path("/dev/zero"), "not a regular")):
            with pytest.raises(SourceError, match=why):
                read_file(path, 0, 10)

    async def test_sizes_and_ranges_are_checked(self, layout: Path) -> None:
        async with open_source(f"oci:{layout}") as source:
            blob = (await source.image()).manifest.layers[0]
            assert await source.read_range(blob, 5, 5) == b""
            for start, end in [(-1, 2), (0, blob.size + 1), (3, 2)]:
                with pytest.raises(SourceError, match="were asked of"):
                    await source.read_range(blob, start, end)
            larger = Descriptor(blob.media_type, blob.digest, blob.size + 1)
            with pytest.raises(SourceError, match="descriptor says"):
                await source.read_range(larger, 0, 1)

    async def test_other_systems_are_refused(self, layout: Path) -> None:
        config = json.dumps({"os": "windows", "rootfs": {"diff_ids": []}}).encode()
        described = {"mediaType": "application/vnd.oci.image.config.v1+json", **add_blob(layout, config)}
        manifest = json.dumps({"schemaVersion": 2, "config": described, "layers": []}).encode()
        entry = {"mediaType": OCI_MANIFEST, **add_blob(layout, manifest)}
        edit_index(layout, lambda index: index.update(manifests=[entry]))
        async with open_source(f"oci:{layout}") as source:
            with pytest.raises(ImageError, match="only Linux"):
                await source.image()

    def test_a_directory_that_is_no_layout(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"no file index\.json"):
            open_source(f"oci:{tmp_path}")


class TestOciArchive:
    async def test_skopeos(self, layout: Path, tmp_path: Path) -> None:
        archive = tmp_path / "image.tar"
        run("skopeo", "copy", "--insecure-policy", f"oci:{layout}:v1", f"oci-archive:{archive}:kept")
        for name in (f"oci-archive:{archive}", f"oci-archive:{archive}:kept"):
            async with open_source(name) as source:
                assert (await source.image()).name == name
                assert await layers_of(source) == [ONE, TWO]
        async with open_source(f"oci-archive:{archive}:lost") as source:
            with pytest.raises(UsageError, match="it has 'kept'"):
                await source.image()

    @pytest.mark.parametrize("options", [["--format=posix"], ["--format=gnu"], ["--format=ustar", "-b1"]])
    async def test_gnu_tars(self, layout: Path, tmp_path: Path, options: list[str]) -> None:
        run("tar", *options, "-cf", tmp_path / "image.tar", ".", cwd=layout)
        async with open_source(f"oci-archive:{tmp_path}/image.tar:v1") as source:
            assert await layers_of(source) == [ONE, TWO]

    async def test_a_link_to_one(self, layout: Path, tmp_path: Path) -> None:
        run("tar", "-cf", tmp_path / "image.tar", ".", cwd=layout)
        (tmp_path / "link.tar").symlink_to("image.tar")
        async with open_source(f"oci-archive:{tmp_path}/link.tar") as source:
            assert (await source.image()).name == f"oci-archive:{tmp_path}/image.tar"
            assert await layers_of(source) == [ONE, TWO]

    @pytest.mark.parametrize(("tool", "suffix"), [("gzip", "gz"), ("xz", "xz"), ("zstd", "zst"), ("bzip2", "bz2")])
    async def test_compressed_ones_say_what_to_do(self, layout: Path, tmp_path: Path, tool: str, suffix: str) -> None:
        run("tar", "-cf", tmp_path / "image.tar", ".", cwd=layout)
        run(tool, tmp_path / "image.tar")
        async with open_source(f"oci-archive:{tmp_path}/image.tar.{suffix}") as source:
            with pytest.raises(UsageError, match=f"compressed with {tool}, .*decompress it first"):
                await source.image()


@pytest.mark.parametrize("form", ["oci-archive", "docker-archive"])
async def test_an_archive_that_is_written_anew(form: str, layout: Path, tmp_path: Path) -> None:
    """By tools that put something else first: what it has is found again when bytes turn out to be wrong."""
    path = tmp_path / "image.tar"
    run("skopeo", "copy", "--insecure-policy", f"oci:{layout}:v1", f"{form}:{path}:example.com/app:v1")
    async with open_source(f"{form}:{path}") as source:
        [layer, *_] = (await source.image()).manifest.layers
        right = await source.read_range(layer, 0, layer.size)
        await trio.Path(path).write_bytes(tars.header(b"first", size=5000) + bytes(5120) + path.read_bytes())
        assert await source.read_range(layer, 0, layer.size) != right
        source.distrust(layer, 0)
        assert await source.read_range(layer, 0, layer.size) == right


class TestDockerArchive:
    @pytest.fixture
    def archive(self, layout: Path, tmp_path: Path) -> Path:
        path = tmp_path / "docker.tar"
        run("skopeo", "copy", "--insecure-policy", f"oci:{layout}:v1", f"docker-archive:{path}:example.com/app:v1")
        return path

    async def test_skopeos(self, archive: Path) -> None:
        async with open_source(f"docker-archive:{archive}") as source:
            image = await source.image()
            assert [blob.digest for blob in image.manifest.layers] == list(image.config.diff_ids)
            assert await layers_of(source) == [ONE, TWO]

    async def test_a_link_to_one(self, archive: Path, tmp_path: Path) -> None:
        (tmp_path / "link.tar").symlink_to(archive)
        async with open_source(f"docker-archive:{tmp_path}/link.tar") as source:
            assert await layers_of(source) == [ONE, TWO]

    async def test_names(self, archive: Path) -> None:
        async with open_source(f"docker-archive:{archive}:example.com/app:v1") as source:
            assert (await source.image()).config.env == ("IMAGE=v1",)
        async with open_source(f"docker-archive:{archive}:app") as source:
            with pytest.raises(UsageError, match=r"it has 'example\.com/app:v1'"):
                await source.image()

    async def test_a_layer_is_found_without_asking_for_the_image_first(self, archive: Path) -> None:
        async with open_source(f"docker-archive:{archive}") as source:
            blob = (await source.image()).manifest.layers[0]
        async with open_source(f"docker-archive:{archive}") as source:
            assert await source.read_range(blob, 0, 3) == b"one"

    async def test_the_manifest_is_always_the_same(self, archive: Path) -> None:
        digests = set()
        for _ in range(2):
            async with open_source(f"docker-archive:{archive}") as source:
                digests.add((await source.image()).manifest.digest)
        assert len(digests) == 1

    async def test_gzipped_layers_links_and_several_images(self, tmp_path: Path) -> None:
        def config(*layers: bytes) -> bytes:
            diff_ids = [str(Digest.of(layer)) for layer in layers]
            return json.dumps({"os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()

        images = [
            {"Config": "a.json", "RepoTags": ["app:a"], "Layers": ["one/layer.tar", "two/layer.tar"]},
            {"Config": "b.json", "RepoTags": None, "Layers": ["one/layer.tar"]},
        ]
        files = [
            (b"manifest.json", json.dumps(images).encode()),
            (b"a.json", config(ONE, TWO)),
            (b"./b.json", config(ONE)),
            (b"kept/one.tar", gzip.compress(ONE, mtime=0)),
            (b"kept/two.tar", TWO),
        ]
        data = b"".join(
            tars.header(name, size=len(body)) + body.ljust(-(-len(body) // 512) * 512, b"\0") for name, body in files
        )
        data += tars.header(b"one/layer.tar", typeflag=b"2", link=b"../kept/one.tar")
        data += tars.header(b"two/layer.tar", typeflag=b"1", link=b"kept/two.tar") + tars.END
        (tmp_path / "x.tar").write_bytes(data)
        async with open_source(f"docker-archive:{tmp_path}/x.tar:docker.io/library/app:a") as source:
            assert await layers_of(source) == [ONE, TWO]
        async with open_source(f"docker-archive:{tmp_path}/x.tar") as source:
            with pytest.raises(UsageError, match="2 images; add one of these names: 'app:a'"):
                await source.image()

    async def test_a_layer_that_zstd_would_skip_some_of(self, tmp_path: Path) -> None:
        """Tools keep notes in frames that are skipped, at the beginning, too."""
        layer = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note" + zstandard.compress(ONE)
        config = json.dumps({"os": "linux", "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(ONE))]}}).encode()
        image = json.dumps([{"Config": "a.json", "RepoTags": None, "Layers": ["one.tar"]}]).encode()
        files = ((b"manifest.json", image), (b"a.json", config), (b"one.tar", layer))
        members = (member(name, body) for name, body in files)
        (tmp_path / "x.tar").write_bytes(b"".join(members) + tars.END)
        async with open_source(f"docker-archive:{tmp_path}/x.tar") as source:
            blob = (await source.image()).manifest.layers[0]
            assert (blob.digest, blob.media_type.rpartition("+")[2]) == (Digest.of(layer), "zstd")

    async def test_an_oci_archive_is_recognised(self, layout: Path, tmp_path: Path) -> None:
        run("tar", "-cf", tmp_path / "image.tar", ".", cwd=layout)
        async with open_source(f"docker-archive:{tmp_path}/image.tar") as source:
            with pytest.raises(UsageError, match="say oci-archive:"):
                await source.image()


def member(name: bytes, body: bytes = b"", **fields: Any) -> bytes:
    return tars.header(name, size=len(body), **fields) + body.ljust(-(-len(body) // 512) * 512, b"\0")


class TestArchive:
    @pytest.fixture
    def written(self, tmp_path: Path) -> Callable[[bytes], Archive]:
        def write(data: bytes) -> Archive:
            path = tmp_path / "some.tar"
            path.write_bytes(data)
            return Archive(path)

        return write

    @pytest.mark.parametrize(
        "prefix",
        [
            member(b"././@LongLink", b"long/name\0", typeflag=b"L", magic=tars.GNU),
            member(b"x", b"18 path=long/name\n", typeflag=b"x"),
            member(b"x", b"10 size=3\n18 comment=a=b\n=c\n18 path=long/name\n", typeflag=b"x"),
        ],
    )
    def test_long_names(self, written: Callable[[bytes], Archive], prefix: bytes) -> None:
        assert written(prefix + member(b"short", b"abc") + tars.END).read("long/name", 9) == b"abc"

    def test_a_global_header_says_nothing_of_members(self, written: Callable[[bytes], Archive]) -> None:
        data = member(b"g", b"18 path=long/name\n", typeflag=b"g") + member(b"short", b"abc")
        assert written(data).read("short", 9) == b"abc"

    def test_the_last_of_equal_names_counts(self, written: Callable[[bytes], Archive]) -> None:
        assert written(member(b"a", b"old") + member(b"./a", b"new")).read("/a", 9) == b"new"

    def test_documents_are_bounded(self, written: Callable[[bytes], Archive]) -> None:
        with pytest.raises(ImageError, match="more than 2 are not read"):
            written(member(b"a", b"old")).read("a", 2)

    def test_links_in_a_circle_end(self, written: Callable[[bytes], Archive]) -> None:
        data = member(b"a", typeflag=b"2", link=b"b") + member(b"b", typeflag=b"2", link=b"a")
        with pytest.raises(SourceError, match="has no file 'a'"):
            written(data).find("a")

    def test_links_stay_inside(self, written: Callable[[bytes], Archive]) -> None:
        data = member(b"a", typeflag=b"2", link=b"../../../etc/passwd")
        with pytest.raises(SourceError, match="has no file"):
            written(data).find("a")

    @pytest.mark.parametrize(
        ("data", "sentence"),
        [
            (b"", "no tar archive"),
            (b"text that is long enough to be a header".ljust(600), "no tar archive, or a damaged one"),
            (member(b"a", b"abc")[:-510], "is cut off"),
            (member(b"a", b"abc") + b"\1" * 512, "damaged"),
            (tars.header(b"a", size=1 << 70, base256=True), "is cut off"),
            (tars.header(b"a", size=-512, base256=True), "size is no number"),
            (tars.header(b"a", size=b"-0000000512\0"), "size is no number"),
            (member(b"x", b"13 size=-512\n", typeflag=b"x") + member(b"a"), "size is no number"),
            (member(b"x", bytes(2 << 20), typeflag=b"x"), "name of 2097152 bytes"),
        ],
    )
    def test_broken_ones_are_refused(self, written: Callable[[bytes], Archive], data: bytes, sentence: str) -> None:
        with pytest.raises(ClipfsError, match=sentence):
            written(data).find("a")

    def test_many_small_records_take_no_time(self, written: Callable[[bytes], Archive]) -> None:
        data = member(b"x", b"6 a=b\n" * 170_000, typeflag=b"x") + member(b"a", b"abc")
        assert written(data).read("a", 3) == b"abc"

    def test_many_members_are_refused(self, written: Callable[[bytes], Archive]) -> None:
        with pytest.raises(ImageError, match="more than 100000 members"):
            written(member(b"a") * 100_001).find("a")
