"""`Index`: paths, extents and spans, and what it costs to open one."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipfs.erofs import read as erofs_read
from clipfs.erofs.structs import Inode
from clipfs.errors import ClipfsError, FormatError
from clipfs.format.container import Extent
from clipfs.format.index import Index
from tests.clips import Built, TreeBuilder, raw_layer, write_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = TreeBuilder()
    tree.file(b"a/b/file", b"contents")
    tree.file(b"a/b-side", b"next to it")
    tree.file(b"top", b"t")
    tree.symlink(b"to-a", b"a")
    tree.symlink(b"absolute", b"/a/b/file")
    tree.symlink(b"a/b/up", b"../../top")
    tree.symlink(b"a/b/out", b"../../../../../../../top")
    tree.symlink(b"a/b/home", b"/")
    tree.symlink(b"dangling", b"nowhere")
    tree.symlink(b"loop", b"pool")
    tree.symlink(b"pool", b"loop")
    tree.symlink(b"slash", b"top/")
    for number in range(42):
        tree.symlink(b"chain%d" % number, b"chain%d" % (number + 1))
    tree.file(b"chain42", b"end")
    tree.file("naïve".encode(), b"n")
    return write_clip(tmp_path_factory.mktemp("index") / "x.clip", tree.finish())


@pytest.fixture
def index(clip: Path) -> Iterator[Index]:
    with Index.open(clip) as index:
        yield index


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        (b"", b""),
        (b"/", b""),
        (b"a/b/file", b"a/b/file"),
        (b"/a/b/file", b"a/b/file"),
        ("/a/b/file", b"a/b/file"),
        ("naïve", "naïve".encode()),
        (b"//a///b/./file", b"a/b/file"),
        (b"a/b/", b"a/b"),
        (b"a/b/..", b"a"),
        (b"a/b/../b-side", b"a/b-side"),
        (b"..", b""),
        (b"../../a", b"a"),
        (b"to-a", b"a"),
        (b"to-a/b/file", b"a/b/file"),
        (b"to-a/..", b""),
        (b"absolute", b"a/b/file"),
        (b"a/b/up", b"top"),
        (b"a/b/out", b"top"),
        (b"a/b/home/top", b"top"),
        (b"chain2", b"chain42"),
    ],
)
def test_paths_resolve(index: Index, path: bytes | str, wanted: bytes) -> None:
    paths = {node.nid: path for path, node in index.walk()}
    assert paths[index.resolve(path)] == wanted


@pytest.mark.parametrize(
    ("path", "wanted"),
    [(b"to-a", b"to-a"), (b"to-a/b/up", b"a/b/up"), (b"to-a/", b"a"), (b"to-a/.", b"a"), (b"dangling", b"dangling")],
)
def test_the_last_symlink_can_be_asked_for(index: Index, path: bytes, wanted: bytes) -> None:
    paths = {node.nid: path for path, node in index.walk()}
    assert paths[index.resolve(path, follow=False)] == wanted


@pytest.mark.parametrize(
    ("path", "number"),
    [
        (b"missing", errno.ENOENT),
        (b"a/missing/file", errno.ENOENT),
        (b"dangling", errno.ENOENT),
        (b"top/file", errno.ENOTDIR),
        (b"top/", errno.ENOTDIR),
        (b"top/.", errno.ENOTDIR),
        (b"top/..", errno.ENOTDIR),
        (b"slash", errno.ENOTDIR),
        (b"absolute/x", errno.ENOTDIR),
        (b"loop", errno.ELOOP),
        (b"loop/x", errno.ELOOP),
        (b"chain0", errno.ELOOP),
    ],
)
def test_paths_that_lead_nowhere(index: Index, path: bytes, number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        index.resolve(path)
    assert (caught.value.errno, caught.value.filename) == (number, path)


def test_walk_goes_in_order_and_parents_first(index: Index) -> None:
    paths = [path for path, _ in index.walk()]
    assert paths[:6] == [b"", b"a", b"a/b", b"a/b/file", b"a/b/home", b"a/b/out"]
    assert [path.split(b"/") for path in paths[1:]] == sorted(path.split(b"/") for path in paths[1:])


def test_asking_the_wrong_kind_of_inode(index: Index) -> None:
    file, link = index.resolve(b"top"), index.resolve(b"to-a", follow=False)
    with pytest.raises(NotADirectoryError):
        index.entries(file)
    with pytest.raises(NotADirectoryError):
        index.lookup(link, b"b")
    with pytest.raises(OSError, match="Invalid argument") as caught:
        index.readlink(file)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("nid", [-1, 0, 1, 39, 2**32, 2**64 - 1])
def test_a_number_that_is_no_inode(index: Index, nid: int) -> None:
    for question in (index.inode, index.readlink, index.xattrs, index.entries, index.parent):
        with pytest.raises(FormatError, match="outside of the file"):
            question(nid)


def test_few_names_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erofs_read, "_NAMES", 500)
    tree = TreeBuilder()
    for number in range(1000):
        tree.file(b"%d/name" % number)
        tree.file((b"%d" % number).rjust(200, b"x"))
    with Index.open(write_clip(tmp_path / "x.clip", tree.finish())) as index:
        for _ in range(2):
            for number in range(1000):
                assert index.resolve(b"%d/name" % number)
                assert index.resolve((b"%d" % number).rjust(200, b"x"))
        kept = sum(map(len, index._tree._tables.values()))
        assert 400 < kept == index._tree._names <= 500


def extents_clip(path: Path, extents: list[Extent], data_size: int) -> Path:
    root = Inode(stat.S_IFDIR | 0o755, children={}, nlink=2)
    return write_clip(path, Built(root, extents, data_size, b""), [raw_layer(bytes(50_000)), raw_layer(bytes(60_000))])


def test_extents(tmp_path: Path) -> None:
    extents = [Extent(4096, 1, 500, 100), Extent(4196, 0, 7, 1), Extent(8192, 0, 49_000, 1_000)]
    with Index.open(extents_clip(tmp_path / "x.clip", extents, 16_384)) as index:
        assert index.extents(0, 16_384) == [(4096, 1, 500, 100), (4196, 0, 7, 1), (8192, 0, 49_000, 1_000)]
        assert index.extents(4100, 3) == [(4100, 1, 504, 3)]
        assert index.extents(4195, 2) == [(4195, 1, 599, 1), (4196, 0, 7, 1)]
        assert index.extents(4197, 3995) == []
        assert index.extents(9191, 100) == [(9191, 0, 49_999, 1)]
        assert index.extents(9192, 100) == []
        assert index.extents(0, 4096) == []
        assert index.extents(5000, 0) == []


def test_the_extent_of_a_byte_of_a_layer(tmp_path: Path) -> None:
    extents = [Extent(0, 0, 512, 100), Extent(4096, 0, 1024, 5_000), Extent(12_288, 1, 512, 1)]
    with Index.open(extents_clip(tmp_path / "x.clip", extents, 16_384)) as index:
        for extent in extents:
            whole = range(extent.offset, extent.offset + extent.length)
            assert {index.extent(extent.layer, at) for at in (whole[0], whole[len(whole) // 2], whole[-1])} == {whole}
            assert not index.extent(extent.layer, whole.start - 1)
            assert not index.extent(extent.layer, whole.stop)
        assert not index.extent(1, 0)


def test_the_extent_of_a_byte_where_layers_are_mixed(tmp_path: Path) -> None:
    """As in a packed clip: it is found, or none is."""
    extents = [Extent(0, 1, 500, 100), Extent(4096, 0, 7, 1), Extent(8192, 0, 49_000, 1_000), Extent(12_288, 0, 100, 9)]
    with Index.open(extents_clip(tmp_path / "x.clip", extents, 16_384)) as index:
        for extent in extents:
            found = index.extent(extent.layer, extent.offset)
            assert not found or found == range(extent.offset, extent.offset + extent.length)


def test_extents_cover_what_a_map_of_single_bytes_says(tmp_path: Path) -> None:
    chance = random.Random(20)
    extents, at, byte_map = [], 0, {}
    for _ in range(60):
        at += chance.choice([0, 0, 1, 50])
        extent = Extent(at, chance.randrange(2), chance.randrange(40_000), chance.randrange(1, 60))
        extents.append(extent)
        for number in range(extent.length):
            byte_map[at + number] = (extent.layer, extent.offset + number)
        at += extent.length
    with Index.open(extents_clip(tmp_path / "x.clip", extents, 8192)) as index:
        for _ in range(2_000):
            start, length = chance.randrange(at), chance.randrange(200)
            found = {
                address + n: (layer, offset + n)
                for address, layer, offset, size in index.extents(start, length)
                for n in range(size)
            }
            assert found == {n: byte_map[n] for n in range(start, start + length) if n in byte_map}


def test_an_image_without_files_has_no_extents(tmp_path: Path) -> None:
    with Index.open(write_clip(tmp_path / "x.clip", TreeBuilder().finish())) as index:
        assert index.extents(0, 4096) == []
        assert index.data_size == 0
        assert index.inodes == 1
        assert list(index.walk()) == [(b"", index.inode(index.root))]


def test_spans_are_found_by_offset(tmp_path: Path) -> None:
    layer = raw_layer(os.urandom(10_500), span_size=1_000)
    with Index.open(write_clip(tmp_path / "x.clip", TreeBuilder().finish(), [raw_layer(b"!"), layer])) as index:
        spans = index.layers[1].spans
        assert len(spans) == 11
        for offset in (0, 1, 999, 1_000, 5_555, 10_000, 10_499):
            number = spans.find(offset)
            assert number == offset // 1_000
            assert spans.bounds(number) == (spans[number].position, spans[number].length)
        assert spans[-1] == spans[10] == layer.spans[10]
        assert spans[2:4] == list(layer.spans[2:4])
        for offset in (-1, 10_500, 2**64):
            with pytest.raises(FormatError, match="no span"):
                spans.find(offset)
        for number in (11, -12):
            with pytest.raises(IndexError):
                spans[number]


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_closing_lets_go_of_the_file(clip: Path) -> None:
    index = Index.open(clip)
    assert mapped(clip)
    index.extents(0, 100)
    index.layers[0].spans.find(0)
    index.resolve(b"a/b/file")
    index.close()
    index.close()
    assert not mapped(clip)


def test_failing_to_open_lets_go_of_the_file(clip: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.clip"
    damaged.write_bytes(clip.read_bytes()[:-1])
    with pytest.raises(FormatError):
        Index.open(damaged)
    assert not mapped(damaged)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ClipfsError, match="No such file"):
        Index.open(tmp_path / "missing.clip")
    with pytest.raises(ClipfsError, match="directory"):
        Index.open(tmp_path)


_OPEN = """
import sys, time
from clipfs.format.index import Index

def private():
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

before = private()
start = time.perf_counter()
index = Index.open(sys.argv[1])
opened = time.perf_counter() - start
for path in ("0/0.000", "999/999.999", "500/missing"):
    try:
        index.resolve(path)
    except FileNotFoundError:
        pass
index.extents(index.data_size // 2, 4096)
print(index.inodes, opened * 1000, private() - before)
"""


def test_a_million_inodes(tmp_path: Path) -> None:
    """Open in less than 50 ms and 30 MB; packed in linear time. A process of its own, for a fair count of memory."""
    none: dict[bytes, bytes] = {}
    directories: dict[bytes, Inode] = {}
    root = Inode(stat.S_IFDIR | 0o755, xattrs=none, children=directories, nlink=1_002)
    extents, at = [], 0
    for directory in range(1_000):
        children = {}
        for number in range(999):
            children[b"%d.%03d" % (directory, number + 1)] = Inode(
                stat.S_IFREG | 0o644, size=100, xattrs=none, address=at
            )
            extents.append(Extent(at, 0, number, 100))
            at += 4096
        children[b"%d.000" % directory] = Inode(stat.S_IFIFO | 0o644, xattrs=none)
        directories[b"%d" % directory] = Inode(stat.S_IFDIR | 0o755, xattrs=none, children=children, nlink=2)
    path = tmp_path / "million.clip"
    start = time.process_time()
    write_clip(path, Built(root, extents, at, bytes(10_000)))
    packed = time.process_time() - start
    result = subprocess.run(
        [sys.executable, "-c", _OPEN, str(path)], check=True, capture_output=True, text=True, timeout=60
    )
    inodes, milliseconds, kilobytes = map(float, result.stdout.split())
    assert inodes == 1_001_001
    assert milliseconds < 50
    assert kilobytes < 30_000
    assert inodes / packed > 100_000


def test_checking_is_fast(tmp_path: Path) -> None:
    tree = TreeBuilder()
    for number in range(60_000):
        tree.file(b"lib/directory%d/file%d" % (number // 10, number), b"x")
    took = []
    with Index.open(write_clip(tmp_path / "x.clip", tree.finish())) as index:
        assert index.inodes > 60_000
        for _ in range(3):
            start = time.process_time()
            index.check()
            took.append(time.process_time() - start)
    assert min(took) < 0.5
