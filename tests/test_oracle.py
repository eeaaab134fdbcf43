"""Every path of a mount beside the same path as other people's tools unpack it: equal in all that can be asked.

What the cases are, who judges each and why is told in `tests.cases`, `tests.disputed` and `tests.judges`. Here nothing
is left out of a comparison: a case in which umoci is wrong has another judge, and a test that umoci still is wrong.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

import clipfs
from tests.cases import UMOCI
from tests.conftest import require_programs, require_root
from tests.disputed import PLAIN, TAR
from tests.images import Compression, LayoutBuilder
from tests.judges import CASES, COMPRESSIONS, UMOCI_READS, by_umoci, expected, layers, write
from tests.mounts import VIEWS, require_view
from tests.oracle import Picture, differences, picture

SECONDS = 60


@pytest.fixture(autouse=True)
def _able() -> None:
    require_root()
    require_programs("umoci", "tar", "pigz", "fsck.erofs", "dump.erofs")


def check(image: str, directory: Path, right: Picture) -> None:
    """Index and mount the image in the new `directory`, in each view; each is `right` in all that can be asked.

    The index is sound, and the judges of EROFS agree.
    """
    clip, mountpoint = directory / "x.clip", directory / "mnt"
    mountpoint.mkdir(parents=True)
    clipfs.build(image, clip)
    with clipfs.Index.open(clip) as index:
        index.check()
    erofs(clip, "fsck.erofs")
    assert "magic number" in erofs(clip, "dump.erofs", "-s")
    for view in VIEWS:
        require_view(view)
        with clipfs.mount(clip, mountpoint, clipfs.MountOptions(cache_size=0, prefetch="none", view=view)) as mounted:
            assert mounted.view == view
            assert differences(picture(mountpoint), right) == [], view


def erofs(clip: Path, *command: str) -> str:
    """What a tool of erofs-utils says to the index. It wants a device for the data, and asks nothing of it."""
    device = clip.with_name("device")
    device.touch()
    done = subprocess.run(
        [*command, f"--device={device}", clip], check=True, capture_output=True, text=True, timeout=SECONDS
    )
    return done.stdout


# --- generated images


@pytest.mark.parametrize("name", CASES)
def test_a_mount_is_what_its_judge_unpacks(name: str, tmp_path: Path) -> None:
    right = {how: expected(name, tmp_path / f"judged-{how}", how) for how in UMOCI_READS} if name in UMOCI else {}
    right = right or {"gzip": expected(name, tmp_path / "judged")}
    assert len(right["gzip"]) > 1
    for compression in COMPRESSIONS:
        image = write(layers(name), tmp_path / "oci", compression)
        check(image, tmp_path / compression, right.get(compression, right["gzip"]))


@pytest.mark.parametrize("name", [*TAR, *PLAIN])
def test_umoci_is_no_judge_of(name: str, tmp_path: Path) -> None:
    """Each exception is one: umoci refuses the image, or makes something else of it."""
    right = expected(name, tmp_path / "judged")
    try:
        theirs = by_umoci(write(layers(name), tmp_path / "oci"), tmp_path / "root")
    except subprocess.CalledProcessError:
        return
    assert differences(picture(theirs), right)


def test_umoci_reads_no_zstd(tmp_path: Path) -> None:
    for compression in set(COMPRESSIONS) - set(UMOCI_READS):
        image = write(layers("kinds"), tmp_path / "oci", compression)
        with pytest.raises(subprocess.CalledProcessError):
            by_umoci(image, tmp_path / compression)


def test_a_difference_is_seen(tmp_path: Path) -> None:
    """The oracle itself: one fact changed is one line, or two where it concerns two paths."""
    image = write(layers("kinds"), tmp_path / "oci")
    right = picture(by_umoci(image, tmp_path / "root"))
    top = tmp_path / "root"
    (top / "d/a").write_bytes(b"A" + bytes(4999))
    os.utime(top / "d/a", ns=(0, right[b"d/a"].mtime_ns))
    os.setxattr(top / "d", "user.new", b"1")
    os.utime(top / "to-d", ns=(0, 5), follow_symlinks=False)
    (top / "f2").unlink()
    os.utime(top, ns=(0, right[b""].mtime_ns))
    found = differences(picture(top), right)
    assert [line.split(" is ")[0] for line in found] == [
        "b'd': xattrs", "b'd/a': sha256", "b'f': nlink", "b'f': names", "b'f2'", "b'to-d': mtime_ns",
    ]  # fmt: skip
    assert found[4] == "b'f2' is missing"


# --- the demo image


@pytest.fixture(scope="module")
def demo_picture(demo_unpacked: Path) -> Picture:
    return picture(demo_unpacked)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_demo_image_is_what_umoci_unpacks(
    compression: Compression, demo_image: str, demo_picture: Picture, tmp_path: Path
) -> None:
    """The image itself is gzipped; in the others its layers are compressed anew."""
    image = demo_image if compression == "gzip" else recompressed(demo_image, tmp_path / "oci", compression)
    assert len(demo_picture) > 4000
    check(image, tmp_path / "here", demo_picture)


def recompressed(image: str, directory: Path, compression: Compression) -> str:
    source = Path(image.removeprefix("oci:").rpartition(":")[0])

    def blob(digest: str) -> bytes:
        return (source / "blobs" / digest.replace(":", "/")).read_bytes()

    index = json.loads((source / "index.json").read_bytes())
    builder = LayoutBuilder(directory)
    for layer in json.loads(blob(index["manifests"][0]["digest"]))["layers"]:
        builder.layer(gzip.decompress(blob(layer["digest"])), compression)
    return builder.config().write()


def test_dump_erofs_finds_the_demo_images_paths(demo_image: str, demo_picture: Picture, tmp_path: Path) -> None:
    clip = tmp_path / "demo.clip"
    clipfs.build(demo_image, clip)
    for path in ("/usr/bin/python3.11", "/etc/passwd", "/usr/bin/python3", "/app"):
        facts = demo_picture[path[1:].encode()]
        said = erofs(clip, "dump.erofs", f"--path={path}")
        assert f"File : {path}" in said.replace("\t", " ")
        assert f"Uid: {facts.uid}" in said
        assert f"Links: {facts.nlink}" in said
        assert f"/{facts.mode.removeprefix('0o').zfill(4)}/" in said.replace("Access: ", "/")


# --- images that tools make


def test_layers_that_umoci_itself_made(tmp_path: Path) -> None:
    """Inserted, opaque, deleted, and whatever `umoci repack` makes of a changed tree."""
    image = tmp_path / "oci"

    def umoci(*words: str | Path) -> None:
        subprocess.run(["umoci", *words], check=True, capture_output=True, timeout=SECONDS)

    umoci("init", "--layout", image)
    umoci("new", "--image", f"{image}:t")
    umoci("insert", "--image", f"{image}:t", by_umoci(write(layers("kinds"), tmp_path / "kinds"), tmp_path / "k"), "/")
    umoci("insert", "--image", f"{image}:t", by_umoci(write(layers("names"), tmp_path / "names"), tmp_path / "n"), "/n")
    umoci("insert", "--image", f"{image}:t", "--opaque", tmp_path / "k" / "d" / "sub", "/d")
    umoci("insert", "--image", f"{image}:t", "--whiteout", "/n/dot")
    umoci("unpack", "--image", f"{image}:t", tmp_path / "bundle")
    change(tmp_path / "bundle" / "rootfs")
    umoci("repack", "--image", f"{image}:t", tmp_path / "bundle")
    check_as_made(f"oci:{image}:t", tmp_path, layers=5)


def test_layers_that_buildah_made(tmp_path: Path) -> None:
    require_programs("buildah")
    store = ["--root", f"{tmp_path}/store", "--runroot", f"{tmp_path}/run", "--storage-driver", "vfs"]

    def buildah(*words: str | Path) -> str:
        command = ["buildah", *store, *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        return done.stdout.strip()

    before = "scratch"
    kinds = by_umoci(write(layers("kinds"), tmp_path / "kinds"), tmp_path / "k")
    for number, then in enumerate(("one", "two", f"oci:{tmp_path}/oci:t")):
        container = buildah("from", "--pull-never", before)
        if number == 0:
            buildah("add", container, kinds, "/")
        else:
            top = Path(buildah("mount", container))
            (change if number == 1 else change_more)(top)
            buildah("umount", container)
        buildah("commit", "-q", "--format", "oci", container, then)
        before = then
    check_as_made(f"oci:{tmp_path}/oci:t", tmp_path, layers=3)


def change(top: Path) -> None:
    """Delete, replace, add and alter: things that `tree` of `tests.cases` has."""
    (top / "f").unlink()
    (top / "to-d").unlink()
    (top / "to-d").mkdir()
    (top / "to-d" / "new").write_bytes(b"new")
    (top / "fifo").unlink()
    (top / "fifo").write_bytes(b"no fifo")
    (top / "empty").rmdir()
    (top / "empty").symlink_to("/d")
    os.link(top / "to-d" / "new", top / "d" / "linked")
    os.setxattr(top / "d", "user.changed", b"yes")
    os.mknod(top / "new-device", 0o20644, os.makedev(1, 5))
    (top / "char").chmod(0o4711)


def change_more(top: Path) -> None:
    (top / "to-d" / "new").write_bytes(b"newer")
    (top / "f").write_bytes(b"once more")
    (top / "d" / "linked").unlink()
    (top / "block").unlink()


def check_as_made(image: str, directory: Path, *, layers: int) -> None:
    check(image, directory / "here", picture(by_umoci(image, directory / "judged")))
    with clipfs.Index.open(directory / "here" / "x.clip") as index:
        assert len(index.layers) == layers
