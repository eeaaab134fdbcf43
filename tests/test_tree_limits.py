"""The data space that a finished tree gets, and what bounds the time and memory that a tree takes."""

from __future__ import annotations

import stat
import time
import tracemalloc
from collections.abc import Iterator

import pytest

from clipfs.erofs.structs import BLOCK
from clipfs.errors import ImageError
from clipfs.format.container import Extent
from clipfs.layers import bounds
from clipfs.layers import tree as tree_module
from clipfs.layers.layer import Member
from clipfs.layers.tree import Tree
from tests.tars import Tar, gnu_sparse
from tests.walks import paths, refused, stored, tree_of, walked


def a_member(path: bytes, *, mode: int = stat.S_IFREG | 0o644, link: bytes = b"", hardlink: bool = False) -> Member:
    return Member(path, mode, 0, 0, 0, 0, link, hardlink, 0, {}, (), 512)


class TestDataSpace:
    def test_is_in_the_order_of_the_layers_and_aligned(self) -> None:
        layers = [
            Tar().file("z", b"z" * 5000).file("gone", b"-").file("a", b"a").file("empty").done(),
            Tar().file("m", b"m" * BLOCK).whiteout("gone").hardlink("y", "z").done(),
        ]
        tree = Tree()
        for number, layer in enumerate(layers):
            tree.apply(number, walked(layer))
        extents, size = tree.finish()
        found = paths(tree)
        assert {path: found[path].address for path in (b"z", b"y", b"a", b"m")} == {
            b"z": 0,
            b"y": 0,
            b"a": 2 * BLOCK,
            b"m": 3 * BLOCK,
        }
        assert size == 4 * BLOCK
        assert [(extent.address, extent.layer, extent.length) for extent in extents] == [
            (0, 0, 5000),
            (2 * BLOCK, 0, 1),
            (3 * BLOCK, 1, BLOCK),
        ]
        for extent in extents:
            assert layers[extent.layer][extent.offset : extent.offset + extent.length].strip(b"zam") == b""

    def test_holes_have_addresses_but_no_extents(self) -> None:
        layer = gnu_sparse(b"s", 5 * BLOCK, [(BLOCK + 1, b"x" * 10), (3 * BLOCK, b"y")])
        layer += gnu_sparse(b"hole", 1 << 32, []) + Tar().file("after", b"!").done()
        tree = Tree()
        tree.apply(7, walked(layer))
        extents, size = tree.finish()
        found = paths(tree)
        assert [extent.address for extent in extents] == [BLOCK + 1, 3 * BLOCK, 5 * BLOCK]
        assert all(isinstance(extent, Extent) and extent.layer == 7 for extent in extents)
        assert (found[b"hole"].address, size) == (6 * BLOCK, 6 * BLOCK + (1 << 32))
        assert stored(found[b"s"], *[b""] * 7, layer)[BLOCK : 3 * BLOCK + 2].strip(b"\0") == (
            b"x" * 10 + bytes(2 * BLOCK - 11) + b"y"
        )

    def test_finishing_twice_changes_nothing(self) -> None:
        tree = tree_of(Tar().file("a", b"a").hardlink("b", "a").dir("d/e"))
        first, before = tree.finish(), {path: inode.nlink for path, inode in paths(tree).items()}
        assert tree.finish() == first
        assert {path: inode.nlink for path, inode in paths(tree).items()} == before

    def test_of_nothing_is_empty(self) -> None:
        tree = Tree()
        assert tree.finish() == ([], 0)
        assert (tree.root.nlink, tree.inodes) == (2, 1)


class TestBounds:
    def test_no_depth_is_too_deep_for_the_tree_itself(self) -> None:
        tree = Tree()
        tree.apply(0, [a_member(b"d/" * 100_000 + b"f")])
        assert tree.finish() == ([], 0)
        assert tree.inodes == 100_002

    def test_the_number_of_inodes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tree_module, "MAX_INODES", 1000)
        enough = [a_member(b"f%d" % number) for number in range(1000)]
        Tree().apply(0, enough)
        error = refused(lambda: Tree().apply(0, [*enough, a_member(b"more")]))
        assert "more than 1000 files and directories" in str(error)
        assert error.member == b"more"

    def test_the_number_of_directories_that_long_names_imply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tree_module, "MAX_INODES", 100_000)
        names = (a_member(b"%d/" % number + b"d/" * 2000 + b"f") for number in range(50))
        error = refused(lambda: Tree().apply(0, names), seconds=3, memory=8 << 20)
        assert "more than 100000 files and directories" in str(error)

    @pytest.mark.parametrize("target", [b"./" * 2000, b"../t/" * 800, b"/" * 4000 + b"t"])
    def test_the_length_of_the_ways_that_symlinks_make(self, target: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        """Names of a hundred bytes that lead over forty thousand parts each, and no two the same way."""
        monkeypatch.setattr(tree_module, "_MAX_DETOURS", 1 << 18)

        def entries() -> Iterator[Member]:
            yield a_member(b"t", mode=stat.S_IFDIR | 0o755)
            for number in range(20):
                yield a_member(b"t/s%d" % number, mode=stat.S_IFLNK, link=target)
            for number in range(500):
                yield a_member(b"/".join([b"t"] + [b"s%d" % n for n in range(20)]) + b"/%d/f" % number)

        error = refused(lambda: Tree().apply(0, entries()))
        assert "too many symbolic links on the way" in str(error)

    def test_warnings_that_nobody_reads_take_no_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """To make a name of 64 KiB printable takes 20 ms."""
        names: list[bytes] = []

        def counted(name: bytes) -> str:
            names.append(name)
            return ""

        monkeypatch.setattr(tree_module, "shown", counted)
        tree_of(Tar().file("f", xattrs={f"nothing.{number}": b"" for number in range(300)}))
        assert len(names) == 200

    def test_members_that_replace_each_other_take_no_memory(self) -> None:
        """Duplicates without end: the last wins, and what it replaced is gone."""
        entries = (
            a_member(b"d/f" if number % 2 else b"d", mode=stat.S_IFREG if number % 2 else stat.S_IFDIR)
            for number in range(40_000)
        )
        tree = Tree()
        tracemalloc.start()
        tree.apply(0, entries)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 1 << 20
        tree.finish()
        assert tree.inodes == 3


def image(count: int) -> list[Member]:
    """Members as images have them: two dozen a directory, some symlinks and hard links."""
    found = []
    for number in range(count):
        directory = b"usr/lib/python3/dist-packages/package%d" % (number // 24)
        name = directory + b"/file%d" % number
        if number % 24 == 0:
            found.append(a_member(directory, mode=stat.S_IFDIR | 0o755))
        elif number % 24 == 1:
            found.append(a_member(name, mode=stat.S_IFLNK, link=b"elsewhere"))
        elif number % 24 == 2:
            found.append(a_member(name, link=directory + b"/file%d" % (number + 20), hardlink=True))
        else:
            member = a_member(name)
            member.size, member.segments = 100, ((0, number * 1024, 100),)
            found.append(member)
    return [member for member in found if not member.hardlink] + [member for member in found if member.hardlink]


def test_merges_sixty_thousand_members_in_a_second() -> None:
    """Twice, as two layers; usually this takes 0.4 s."""
    members = image(60_000)

    def took() -> float:
        tree, start = Tree(), time.process_time()
        tree.apply(0, members)
        tree.apply(1, members)
        tree.finish()
        return time.process_time() - start

    assert min(took() for _ in range(3)) < 1.2


def test_a_million_tiny_members_would_take_bounded_memory() -> None:
    """Measured with fewer: bytes a member, for the tree and the archive's entries together."""
    count = 20_000
    tar = Tar()
    for number in range(count):
        tar.file(f"d{number // 100}/f{number}", b"x")
    data = tar.done()
    tracemalloc.start()
    entries = walked(data)
    listed, _ = tracemalloc.get_traced_memory()
    tree = Tree()
    tree.apply(0, bounds.drained(entries))
    tree.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert entries == []
    assert peak / count < 600
    # The two are never there whole at the same time.
    assert peak < 1.5 * listed


def test_an_error_of_the_tree_says_where() -> None:
    with pytest.raises(ImageError) as caught:
        tree_of(Tar().file("f"), Tar().file("ok", b"1").file("f/\x1b\nx"))
    assert str(caught.value.within("sha256:ab")).endswith("(layer sha256:ab, member 'f/\\x1b\\nx', offset 1024)")
