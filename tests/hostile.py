"""Images that no honest tool makes, each as small as it can be: what `tests.test_hostile` gives to the command line.

A case writes an image into a directory and gives its name. What becomes of it is in the table of docs/security.md.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from tests.images import LayoutBuilder
from tests.tars import END, Tar, header, pax, pax_sparse

MB = 1 << 20

#: A name for people, and what makes the image.
IMAGES: dict[str, Callable[[Path], str]] = {}


def _image(name: str) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    def add(make: Callable[[Path], str]) -> Callable[[Path], str]:
        IMAGES[name] = make
        return make

    return add


def _of(name: str, make: Callable[[], Tar | bytes]) -> None:
    IMAGES[name] = lambda at: LayoutBuilder(at).layer(make()).config().write()


_of("a member `../evil`", lambda: Tar().file("../evil", b"x"))
_of("a member `/etc/evil`", lambda: Tar().file("/etc/evil", b"x"))
_of("a file through a symlink to `/`", lambda: Tar().symlink("out", "/").file("out/evil", b"x"))
_of("a file through a symlink to `../../..`", lambda: Tar().symlink("out", "../../..").file("out/evil", b"x"))
_of("a hard link to `../../etc/passwd`", lambda: Tar().hardlink("passwd", "../../etc/passwd"))
_of("a hard link named `.`", lambda: Tar().file("a", b"x").hardlink(".", "a"))
_of("a symlink named `/`", lambda: Tar().symlink("/", "/tmp"))
_of("parents that are a loop of symlinks", lambda: Tar().symlink("a", "b").symlink("b", "a").file("a/x", b"x"))
_of("a name of 256 bytes", lambda: Tar().file("n" * 256, b"x"))
_of("a path of 10,000 bytes", lambda: Tar().file("/".join(["d" * 99] * 100), b"x"))
_of("a NUL in a PAX path", lambda: pax({"path": b"a\0b"}) + header(b"x", size=0) + END)
_of("a size of -1", lambda: header(b"x", size=-1) + END)
_of("a size of 2^63-1", lambda: header(b"x", size=(1 << 63) - 1) + END)
_of("a mode and an owner of 2^50", lambda: header(b"x", mode=1 << 50, uid=1 << 50) + END)
_of("a file and a directory of one name", lambda: Tar().file("x", b"1").dir("x").file("x/y", b"2").file("x", b"3"))
_of("devices 8:0 and 0:0", lambda: Tar().block("disk", 8, 0).char("none", 0, 0))
_of("xattrs `trusted.overlay.*`", lambda: Tar().member("d", typeflag=b"5", xattrs={"trusted.overlay.opaque": b"y"}))
_of("1,000 xattrs on one file", lambda: Tar().member("f", b"x", xattrs={f"user.{n}": b"v" * 99 for n in range(1000)}))
_of("an xattr of 1 MiB", lambda: Tar().member("f", b"x", xattrs={"user.x": b"v" * MB}))
_of("a PAX header of 64 MiB", lambda: pax({"comment": b"c" * (64 * MB)}) + header(b"x", size=0) + END)
_of("an archive that is cut off", lambda: Tar().file("x", b"x" * 5000).done()[:2000])
_of("no archive at all", lambda: b"\0\1\2\3" * 300)


def _huge_hole() -> bytes:
    said: dict[str | bytes, str | bytes] = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s"}
    records = pax({**said, "GNU.sparse.realsize": str(1 << 60)})
    return records + header(b"s", size=512) + b"0\n".ljust(512, b"\0") + END


_of("a sparse file of 1 EiB", _huge_hole)


def _pieces(count: int) -> bytes:
    return pax_sparse(b"s", 2 * count, [(2 * number, b"x") for number in range(count)], version="1.0")


def _xattrs() -> bytes:
    values: dict[str | bytes, str | bytes] = {f"SCHILY.xattr.user.{n}": b"v" * 62_000 for n in range(4)}
    return pax(values) + header(b"f")


def _hard_links(count: int) -> bytes:
    return header(b"f") + b"".join(header(b"%x" % number, typeflag=b"1", link=b"f") for number in range(count))


def _deep_by_links() -> Tar:
    """Each link leads 2,000 directories down, to where the next one is; a path follows 40 at most."""
    tar = Tar()
    for number in range(1, 40):
        tar.symlink("/".join(["l"] * number), "d/" * 2000 + "d")
    return tar.file("/".join(["l"] * 39) + "/x", b"x")


_of("directories 78,000 deep, by way of symlinks", _deep_by_links)


def _members(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield header(b"%x" % number)
    yield END


def _again(name: str, times: int, make: Callable[[], bytes]) -> None:
    """A layer of one piece of tar, so many times over: as many members of a gzip stream, a thousandth as large."""

    def write(at: Path) -> str:
        piece, whole = make(), hashlib.sha256()
        for _ in range(times):
            whole.update(piece)
        builder = LayoutBuilder(at)
        kind = "application/vnd.oci.image.layer.v1.tar+gzip"
        builder.raw_layer(gzip.compress(piece, 1, mtime=0) * times, b"", kind, {})
        builder._diff_ids = [f"sha256:{whole.hexdigest()}"]
        return builder.config().write()

    IMAGES[name] = write


_of("a million members", lambda: b"".join(_members(1_000_000)))
_again("ten million members", 1000, lambda: b"".join(header(b"%x" % number) for number in range(10_000)))
_again("a million hard links to one file", 100, lambda: _hard_links(10_000))
_again("10,000 files with 250 KB of xattrs each", 1000, lambda: _xattrs() * 10)
_again("2,000 PAX headers of 100,000 records each", 2000, lambda: pax({b"%d" % n: b"" for n in range(100_000)}))
_again("2,000 PAX headers of 1 MB", 2000, lambda: pax({"comment": b"c" * 1_000_000}) + header(b"x"))
_of("a sparse file of 100,000 pieces", lambda: _pieces(100_000) + END)
_again("1,000 sparse files of 100,000 pieces", 1000, lambda: _pieces(100_000))
_of("directories 100,000 deep", lambda: pax({"path": b"d/" * 100_000}) + header(b"x", typeflag=b"5") + END)


@_image("a gzip bomb: 2 GB of zeros in 2 MB")
def _gzip_bomb(at: Path) -> str:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    blob = b"".join([packer.compress(bytes(16 * MB)) for _ in range(128)]) + packer.flush()
    return LayoutBuilder(at).raw_layer(blob, b"", "application/vnd.oci.image.layer.v1.tar+gzip", {}).config().write()


@_image("a zstd frame with a window of 2 GiB")
def _zstd_window(at: Path) -> str:
    parameters = zstandard.ZstdCompressionParameters(window_log=31, compression_level=1, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    blob = packer.compress(Tar().file("x", b"x" * MB).done()) + packer.flush()
    return LayoutBuilder(at).raw_layer(blob, b"", "application/vnd.oci.image.layer.v1.tar+zstd", {}).config().write()


def _blob(at: Path, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    (at / "blobs" / "sha256" / digest).write_bytes(data)
    return f"sha256:{digest}"


def _changed(at: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """An honest image whose manifest is changed, and is the index's again."""
    LayoutBuilder(at).layer(Tar().file("x", b"x" * 100)).config().write()
    index = json.loads((at / "index.json").read_bytes())
    [descriptor] = index["manifests"]
    manifest = json.loads((at / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes())
    change(manifest)
    data = json.dumps(manifest).encode()
    descriptor.update(digest=_blob(at, data), size=len(data))
    (at / "index.json").write_text(json.dumps(index))
    return f"oci:{at}:latest"


@_image("a digest that is a path")
def _path_digest(at: Path) -> str:
    return _changed(at, lambda manifest: manifest["layers"][0].update(digest="sha256:../../../../etc/passwd"))


@_image("a layer that is larger than its size")
def _lying_size(at: Path) -> str:
    return _changed(at, lambda manifest: manifest["layers"][0].update(size=7))


@_image("a layer of another digest")
def _lying_digest(at: Path) -> str:
    name = _changed(at, lambda manifest: None)
    for path in (at / "blobs" / "sha256").iterdir():
        if path.read_bytes()[:2] == b"\x1f\x8b":
            other = gzip.compress(Tar().file("y", b"y" * 100).done(), mtime=0)
            path.write_bytes(other.ljust(path.stat().st_size, b"\0"))
    return name


@_image("a layer of another diff_id")
def _lying_diff_id(at: Path) -> str:
    builder = LayoutBuilder(at)
    blob = gzip.compress(Tar().file("x", b"x").done())
    return builder.raw_layer(blob, b"other", "application/vnd.oci.image.layer.v1.tar+gzip", {}).config().write()


@_image("a gzip layer that says it is plain")
def _lying_type(at: Path) -> str:
    return _changed(
        at, lambda manifest: manifest["layers"][0].update(mediaType="application/vnd.oci.image.layer.v1.tar")
    )


@_image("a manifest of 100 MB")
def _large_manifest(at: Path) -> str:
    return _changed(at, lambda manifest: manifest.update(annotations={"x": "x" * 100_000_000}))


@_image("an index.json of 100 MB")
def _large_index(at: Path) -> str:
    name = _changed(at, lambda manifest: None)
    with (at / "index.json").open("ab") as index:
        index.write(b" " * 100_000_000)
    return name


@_image("a manifest of 4 MB of empty lists")
def _manifest_of_lists(at: Path) -> str:
    return _changed(at, lambda manifest: manifest.update(x=[[]] * 1_000_000))


@_image("a manifest of 20,000 layers that are one")
def _many_layers(at: Path) -> str:
    def change(manifest: dict[str, Any]) -> None:
        manifest["layers"] *= 20_000

    return _changed(at, change)


@_image("a config of 100 MB")
def _large_config(at: Path) -> str:
    def change(manifest: dict[str, Any]) -> None:
        data = json.dumps({"os": "linux", "x": "x" * 100_000_000}).encode()
        manifest["config"].update(digest=_blob(at, data), size=len(data))

    return _changed(at, change)


@_image("a manifest of 100,000 nested lists")
def _deep_manifest(at: Path) -> str:
    name = _changed(at, lambda manifest: None)
    index = json.loads((at / "index.json").read_bytes())
    data = b'{"schemaVersion": 2, "layers": ' + b"[" * 100_000
    index["manifests"][0].update(digest=_blob(at, data), size=len(data))
    (at / "index.json").write_text(json.dumps(index))
    return name


@_image("an index that holds itself")
def _index_loop(at: Path) -> str:
    """By a digest that cannot be right, for no index can have its own."""
    name = _changed(at, lambda manifest: None)
    index = json.loads((at / "index.json").read_bytes())
    media_type = "application/vnd.oci.image.index.v1+json"
    for _ in range(50):
        data = json.dumps({"schemaVersion": 2, "mediaType": media_type, "manifests": index["manifests"]}).encode()
        index["manifests"][0] = {
            "mediaType": media_type, "digest": _blob(at, data), "size": len(data),
            "annotations": {"org.opencontainers.image.ref.name": "latest"},
        }  # fmt: skip
    (at / "index.json").write_text(json.dumps(index))
    return name


@_image("a blob that is a symlink to a file of the host")
def _symlinked_blob(at: Path) -> str:
    name = _changed(at, lambda manifest: None)
    for path in (at / "blobs" / "sha256").iterdir():
        if path.read_bytes()[:2] == b"\x1f\x8b":
            path.unlink()
            path.symlink_to("/etc/passwd")
    return name


@_image("a layout that is a pipe where a blob should be")
def _pipe(at: Path) -> str:
    name = _changed(at, lambda manifest: None)
    for path in (at / "blobs" / "sha256").iterdir():
        if path.read_bytes()[:2] == b"\x1f\x8b":
            path.unlink()
            os.mkfifo(path)
    return name


@_image("a layout whose index.json is a symlink to a file of the host")
def _symlinked_index(at: Path) -> str:
    name = _changed(at, lambda manifest: None)
    (at / "index.json").unlink()
    (at / "index.json").symlink_to("/etc/passwd")
    return name


@_image("an oci-archive with members that lead outside")
def _archive(at: Path) -> str:
    _changed(at / "layout", lambda manifest: None)
    with tarfile.open(at / "image.tar", "w") as tar:
        for path in sorted((at / "layout").rglob("*")):
            tar.add(path, path.relative_to(at / "layout"), recursive=False)
        info = tarfile.TarInfo("blobs/sha256/../../../evil")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    return f"oci-archive:{at}/image.tar"
