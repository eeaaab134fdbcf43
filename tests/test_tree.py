"""What layers do to each other. `listing` writes a tree as ``d/ d/file=1 link->target dev*``; 1 is the layer."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfs.errors import ImageError
from clipfs.layers.layer import Entry, Member
from tests.tars import Tar
from tests.walks import LAYER, listing, paths, tree_of, walked


def base() -> Tar:
    """A lower layer: a directory with two files and one below, a file, and links to them."""
    tar = Tar().dir("d").file("d/a", b"a").file("d/b", b"b").dir("d/sub").file("d/sub/c", b"c").file("f", b"f")
    return tar.symlink("to-d", "d").symlink("to-f", "f")


BASE = "d/ d/a=0 d/b=0 d/sub/ d/sub/c=0 f=0 to-d->d to-f->f"
REST = "f=0 to-d->d to-f->f"

MERGES: dict[str, tuple[Callable[[], Tar], str]] = {
    "nothing": (lambda: Tar(), BASE),
    "a new file": (lambda: Tar().file("d/n", b"n"), "d/ d/a=0 d/b=0 d/n=1 d/sub/ d/sub/c=0 " + REST),
    "a directory again": (lambda: Tar().dir("d").dir("d/sub"), BASE),
    "a file again": (lambda: Tar().file("f", b"F"), BASE.replace("f=0", "f=1")),
    "an empty file": (lambda: Tar().file("f"), BASE.replace("f=0", "f")),
    "a file for a directory": (lambda: Tar().file("d", b"f"), "d=1 " + REST),
    "a directory for a file": (lambda: Tar().dir("f").file("f/x", b"x"), BASE.replace("f=0", "f/ f/x=1")),
    "a symlink for a directory": (lambda: Tar().symlink("d", "f"), "d->f " + REST),
    "a directory for a symlink": (lambda: Tar().dir("to-d"), BASE.replace("to-d->d", "to-d/")),
    "a directory for a symlink, and a file": (
        lambda: Tar().dir("to-d").file("to-d/x", b"x"),
        BASE.replace("to-d->d", "to-d/ to-d/x=1"),
    ),
    "a file through a symlink that is replaced after it": (
        lambda: Tar().file("to-d/x", b"x").dir("to-d").file("to-d/y", b"y"),
        "d/ d/a=0 d/b=0 d/sub/ d/sub/c=0 d/x=1 f=0 to-d/ to-d/y=1 to-f->f",
    ),
    "a file for a directory that was used before": (
        lambda: Tar().file("d/x", b"x").file("d", b"d").dir("d").file("d/y", b"y"),
        "d/ d/y=1 " + REST,
    ),
    "a device for a file": (lambda: Tar().char("f", 1, 3), BASE.replace("f=0", "f*")),
    "duplicates": (
        lambda: Tar().file("n", b"1").file("n", b"2").symlink("n", "x"),
        BASE.replace("to-d", "n->x to-d", 1),
    ),
    "a duplicate of another type": (lambda: Tar().symlink("n", "d").dir("n"), BASE.replace("to-d->", "n/ to-d->")),
    "a duplicate directory keeps what is in it": (
        lambda: Tar().dir("n").file("n/x", b"x").dir("n", mode=0o700),
        BASE.replace("to-d->", "n/ n/x=1 to-d->"),
    ),
    "implied parents": (lambda: Tar().file("n/o/p", b"p"), BASE.replace("to-d->", "n/ n/o/ n/o/p=1 to-d->")),
    "dots and slashes": (
        lambda: Tar().file("./d//../f", b"F").file("/d/./a", b""),
        BASE.replace("f=0", "f=1").replace("a=0", "a"),
    ),
    # Whiteouts.
    "a whiteout": (lambda: Tar().whiteout("d/a"), BASE.replace(" d/a=0", "")),
    "a whiteout of a directory": (lambda: Tar().whiteout("d"), REST),
    "a whiteout of a symlink": (lambda: Tar().whiteout("to-d"), BASE.replace(" to-d->d", "")),
    "a whiteout of nothing": (lambda: Tar().whiteout("none").whiteout("no/where").whiteout("f/x").opaque("g"), BASE),
    "a whiteout, then the file": (lambda: Tar().whiteout("f").file("f", b"F"), BASE.replace("f=0", "f=1")),
    "the file, then a whiteout": (lambda: Tar().file("f", b"F").whiteout("f"), BASE.replace("f=0", "f=1")),
    "a new file, then a whiteout": (lambda: Tar().file("n", b"n").whiteout("n"), BASE.replace("to-d", "n=1 to-d", 1)),
    "a whiteout, then a directory": (lambda: Tar().whiteout("d").file("d/n", b"n"), "d/ d/n=1 " + REST),
    "a directory, then a whiteout": (lambda: Tar().dir("d").file("d/n", b"n").whiteout("d"), "d/ d/n=1 " + REST),
    "a whiteout through a symlink": (lambda: Tar().whiteout("to-d/a"), BASE.replace(" d/a=0", "")),
    "an opaque directory": (lambda: Tar().dir("d").opaque("d").file("d/n", b"n"), "d/ d/n=1 " + REST),
    "an opaque directory, said last": (lambda: Tar().dir("d").file("d/n", b"n").opaque("d"), "d/ d/n=1 " + REST),
    "an opaque directory below": (lambda: Tar().opaque("d/sub"), BASE.replace(" d/sub/c=0", "")),
    "an opaque root": (lambda: Tar().file("n", b"n").opaque(""), "n=1"),
    "an opaque file": (lambda: Tar().opaque("f"), BASE),
    "an opaque symlink": (lambda: Tar().opaque("to-d"), "d/ " + REST),
    # What overlayfs has a layer say where a directory took the place of a symlink: nothing of it is about `d`.
    "an opaque directory for a symlink": (
        lambda: Tar().dir("to-d").opaque("to-d").file("to-d/n", b"n"),
        BASE.replace("to-d->d", "to-d/ to-d/n=1"),
    ),
    "a whiteout in a directory for a symlink": (
        lambda: Tar().whiteout("to-d/a").dir("to-d").opaque("to-d/sub"),
        BASE.replace("to-d->d", "to-d/"),
    ),
    "a whiteout through a symlink where something else became a directory": (
        lambda: Tar().dir("to-f").whiteout("to-d/a"),
        BASE.replace(" d/a=0", "").replace("to-f->f", "to-f/"),
    ),
    "aufs' books": (lambda: Tar().dir(".wh..wh.plnk").file(".wh..wh.plnk/1.2", b"x").file(".wh..wh.aufs"), BASE),
    # Hard links.
    "a hard link to a lower layer's file": (lambda: Tar().hardlink("d/a2", "f"), BASE.replace(" d/b", " d/a2=0 d/b")),
    "a hard link for a directory": (lambda: Tar().hardlink("d", "f"), "d=0 " + REST),
    "a hard link to what it is already": (lambda: Tar().hardlink("f", "./f"), BASE),
    "a hard link through a symlink": (lambda: Tar().hardlink("g", "to-d/a"), BASE.replace("to-d", "g=0 to-d", 1)),
    "a hard link to a symlink": (lambda: Tar().hardlink("g", "to-f"), BASE.replace("to-d", "g->f to-d", 1)),
    "a hard link, then its target deleted": (
        lambda: Tar().hardlink("g", "f").whiteout("f"),
        BASE.replace("f=0", "g=0"),
    ),
    "a target deleted, then a hard link": (lambda: Tar().whiteout("f").hardlink("g", "f"), BASE.replace("f=0", "g=0")),
    "a hard link out of a deleted directory": (
        lambda: Tar().hardlink("g", "d/sub/c").whiteout("d"),
        "f=0 g=0 to-d->d to-f->f",
    ),
    "a hard link within an opaque directory": (lambda: Tar().hardlink("d/g", "d/a").opaque("d"), "d/ d/g=0 " + REST),
    "a hard link, then its target replaced": (
        lambda: Tar().hardlink("g", "f").file("f", b"F"),
        BASE.replace("f=0", "f=1 g=0"),
    ),
    "a target replaced, then a hard link": (
        lambda: Tar().file("f", b"F").hardlink("g", "f"),
        BASE.replace("f=0", "f=1 g=1"),
    ),
    "a hard link, its target deleted and replaced": (
        lambda: Tar().whiteout("f").hardlink("g", "f").file("f", b"F"),
        BASE.replace("f=0", "f=1 g=0"),
    ),
    "a chain of hard links": (
        lambda: Tar().hardlink("g", "f").hardlink("h", "g").file("g", b"G"),
        BASE.replace("f=0", "f=0 g=1 h=0"),
    ),
    # Devices that overlayfs would take for whiteouts.
    "a 0:0 device": (lambda: Tar().char("n", 0, 0), BASE),
    "a 0:0 device for a file": (lambda: Tar().char("f", 0, 0), BASE.replace(" f=0", "")),
    "a 0:0 device for a directory": (lambda: Tar().char("d", 0, 0), REST),
    "a 0:0 device with two names": (
        lambda: Tar().char("m", 0, 0).hardlink("n", "m").hardlink("f", "n"),
        BASE.replace(" f=0", ""),
    ),
    "a 0:0 device, then a file": (lambda: Tar().char("n", 0, 0).file("n", b"n"), BASE.replace("to-d", "n=1 to-d", 1)),
    "a 0:0 block device": (lambda: Tar().block("n", 0, 0), BASE.replace("to-d", "n* to-d", 1)),
    "a 0:1 device": (lambda: Tar().char("n", 0, 1), BASE.replace("to-d", "n* to-d", 1)),
}


@pytest.mark.parametrize("name", MERGES)
def test_a_layer_on_top(name: str) -> None:
    make, expected = MERGES[name]
    assert listing(tree_of(base(), make())) == expected


def chain(length: int) -> Tar:
    tar = Tar().dir(f"s{length}")
    for number in range(length):
        tar.symlink(f"s{number}", f"s{number + 1}")
    return tar


# A lower layer's symlinks, what is put below them, where it has to be.
WAYS: dict[str, tuple[Tar, str, str]] = {
    "relative": (Tar().dir("t").symlink("d/s", "../t"), "d/s/x", "t/x"),
    "relative, beside": (Tar().dir("d/t").symlink("d/s", "t"), "d/s/x", "d/t/x"),
    "with dots and slashes": (Tar().dir("d/t").symlink("d/s", ".//./t//."), "d/s/x", "d/t/x"),
    "absolute": (Tar().dir("t").symlink("d/s", "/t"), "d/s/x", "t/x"),
    "absolute, in vain above the root": (Tar().dir("t").symlink("d/s", "/../../t"), "d/s/x", "t/x"),
    "relative, in vain above the root": (Tar().dir("t").symlink("d/s", "../../../../t"), "d/s/x", "t/x"),
    "to the root": (Tar().symlink("d/s", "/"), "d/s/x", "x"),
    "to above the root": (Tar().symlink("d/s", "../.."), "d/s/x", "x"),
    "in the middle": (Tar().dir("t/u").symlink("d/s", "../t"), "d/s/u/x", "t/u/x"),
    "and up from where it leads": (Tar().dir("t/u").symlink("s", "t/u").symlink("d/up", "../s/.."), "d/up/x", "t/x"),
    "chain": (Tar().dir("t").symlink("a", "b").symlink("b", "/c").symlink("c", "t"), "a/x", "t/x"),
    "chain of parts": (Tar().dir("t/v").symlink("a", "t").symlink("t/u", "v"), "a/u/x", "t/v/x"),
    "dangling": (Tar().symlink("s", "new/dir"), "s/x", "new/dir/x"),
    "dangling, absolute": (Tar().symlink("d/s", "/new/dir"), "d/s/x", "new/dir/x"),
    "dangling, and back": (Tar().symlink("s", "new/../t/dir"), "s/x", "t/dir/x"),
    "dangling chain": (Tar().symlink("s", "d/u").symlink("d/u", "v"), "s/x", "d/v/x"),
    "40 links": (chain(40), "s0/x", "s40/x"),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_a_symlink_of_a_lower_layer_on_the_way(name: str) -> None:
    lower, said, place = WAYS[name]
    there = {path for path, inode in paths(tree_of(lower, Tar().file(said, b"x"))).items() if inode.segments}
    assert there == {place.encode()}
    # What is put there by that way is deleted by it, too.
    tree = tree_of(lower, Tar().file(said, b"x"), Tar().whiteout(said))
    assert place.encode() not in paths(tree)
    assert place.rpartition("/")[0].encode() in {b"", *paths(tree)}


REFUSALS: dict[str, tuple[Tar, Tar, str]] = {
    "a file is no directory": (base(), Tar().file("f/x"), "'f' is no directory, so nothing can be in it"),
    "nor is what a symlink leads to": (base(), Tar().file("to-f/x"), "'to-f' is no directory"),
    "nor a device": (Tar().char("null", 1, 3), Tar().file("null/a/x"), "'null/a' is no directory"),
    "a symlink to itself": (Tar().symlink("s", "s"), Tar().file("s/x"), "too many symbolic links"),
    "symlinks to each other": (
        Tar().symlink("s", "t").symlink("t", "/s"),
        Tar().file("s/x"),
        "too many symbolic links",
    ),
    "a symlink into itself": (Tar().symlink("s", "s/s/s"), Tar().file("s/x"), "too many symbolic links"),
    "a loop with a whiteout behind": (Tar().symlink("s", "s"), Tar().whiteout("s/x"), "too many symbolic links"),
    "a loop with a link behind": (Tar().symlink("s", "s"), Tar().hardlink("x", "s/y"), "too many symbolic links"),
    "41 links": (chain(41), Tar().file("s0/x"), "too many symbolic links"),
    "a long part of a symlink": (Tar().symlink("s", "n" * 300), Tar().file("s/x"), "too long a name"),
    "a hard link to nothing": (
        base(),
        Tar().hardlink("x", "none"),
        "it is a hard link to 'none', which does not exist",
    ),
    "a hard link below a file": (base(), Tar().hardlink("x", "f/y"), "which does not exist"),
    "a hard link to itself": (base(), Tar().hardlink("x", "x"), "which does not exist"),
    "hard links to each other": (base(), Tar().hardlink("x", "y").hardlink("y", "x"), "which does not exist"),
    "a hard link to a directory": (base(), Tar().hardlink("x", "d/sub"), "hard link to 'd/sub', which is a directory"),
    "a hard link to the root": (base(), Tar().hardlink("x", "/"), "which is a directory"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name: str) -> None:
    lower, upper, sentence = REFUSALS[name]
    above = Tar().file("fine").raw(upper.done())
    with pytest.raises(ImageError) as caught:
        tree_of(lower, above)
    assert sentence in str(caught.value)
    assert caught.value.offset in range(512, above.size, 512)
    assert f"(layer {LAYER}, member '" in str(caught.value.within(LAYER))


class TestAttributes:
    def test_are_those_of_the_last_layer_that_says_them(self) -> None:
        lower = Tar().dir("d", mode=0o700, uid=1, xattrs={"user.a": b"1"}).file("d/f", mode=0o4755, uid=1)
        tree = tree_of(lower, Tar().dir("d", mode=0o1777, gid=2, mtime="5.5").file("x/y"))
        found = paths(tree)
        directory = found[b"d"]
        assert (directory.mode & 0o7777, directory.uid, directory.gid) == (0o1777, 0, 2)
        assert (directory.mtime_ns, directory.xattrs) == (5_500_000_000, {})
        assert found[b"d/f"].mode & 0o7777 == 0o4755
        implied = found[b"x"]
        assert (implied.mode & 0o7777, implied.uid, implied.gid, implied.mtime_ns) == (0o755, 0, 0, 0)

    def test_of_the_root_can_be_said(self) -> None:
        tree = tree_of(Tar().file("f"), Tar().dir(".", mode=0o700, uid=3, xattrs={"user.r": b"1"}))
        assert (tree.root.mode & 0o7777, tree.root.uid, tree.root.xattrs) == (0o700, 3, {b"user.r": b"1"})
        assert listing(tree) == "f"
        assert tree_of(Tar()).root.mode & 0o7777 == 0o755

    def test_of_an_implied_directory_come_when_they_are_said(self) -> None:
        tree = tree_of(Tar().file("d/f").dir("d", mode=0o700))
        assert (paths(tree)[b"d"].mode & 0o7777, listing(tree)) == (0o700, "d/ d/f")

    def test_a_deleted_directory_takes_its_attributes_with_it(self) -> None:
        tree = tree_of(Tar().dir("d", mode=0o700), Tar().whiteout("d").file("d/f"))
        assert paths(tree)[b"d"].mode & 0o7777 == 0o755
        tree = tree_of(Tar().dir("d", mode=0o700).file("d/g"), Tar().opaque("d").file("d/f"))
        assert (paths(tree)[b"d"].mode & 0o7777, listing(tree)) == (0o700, "d/ d/f")

    def test_hard_links_are_one_inode_with_the_attributes_of_the_file(self) -> None:
        tar = Tar().file("a", b"a", mode=0o751, uid=4).member("b", typeflag=b"1", link="a", mode=0o600, uid=9)
        found = paths(tree_of(tar, Tar().hardlink("d/c", "b")))
        assert found[b"a"] is found[b"b"] is found[b"d/c"]
        assert (found[b"a"].mode & 0o7777, found[b"a"].uid, found[b"a"].nlink) == (0o751, 4, 3)

    def test_links_are_counted_when_all_layers_are_there(self) -> None:
        tree = tree_of(base().hardlink("g", "f").hardlink("h", "f"), Tar().whiteout("g").dir("d/n").file("h"))
        found = paths(tree)
        assert (found[b"f"].nlink, found[b"h"].nlink, found[b"to-d"].nlink) == (1, 1, 1)
        assert (tree.root.nlink, found[b"d"].nlink, found[b"d/n"].nlink) == (3, 4, 2)
        assert tree.inodes == 1 + len(found)

    def test_xattrs_that_no_lower_may_have_are_left_out_and_said(self) -> None:
        given = ["user.ok", "trusted.ok", "security.capability", "system.posix_acl_access"]
        dropped = ["trusted.overlay.opaque", "user.overlay.redirect", "system.nfs4_acl", "nothing", "user.", "USER.x"]
        tree = tree_of(Tar().file("f", xattrs=dict.fromkeys(given + dropped, b"1")))
        assert paths(tree)[b"f"].xattrs == {name.encode(): b"1" for name in given}
        assert len(tree.warnings) == len(dropped)
        assert "xattr 'trusted.overlay.opaque' of 'f' is left out" in tree.warnings[0]
        link = Tar().member("s", typeflag=b"2", link="x", xattrs={"user.a": b"1", "security.selinux": b"2"})
        assert paths(tree_of(link))[b"s"].xattrs == {b"security.selinux": b"2"}

    def test_left_out_devices_are_said_and_a_flood_of_warnings_is_counted(self) -> None:
        tar = Tar()
        for number in range(150):
            tar.char(f"n{number}", 0, 0)
        warnings = tree_of(tar).warnings
        assert "device 'n0' is left out: overlayfs would take 0:0 for a whiteout" in warnings
        assert (len(warnings), warnings[-1]) == (101, "50 more things are left out for such reasons")


_WORDS = st.sampled_from(["a", "b", "d", "d/a", "d/b", "d/e", "s", "s/a", "s/d", "d/e/a"])
_STEPS = st.lists(st.tuples(st.sampled_from(["file", "dir", "whiteout", "opaque"]), _WORDS), max_size=8)


@given(_STEPS, _STEPS, st.randoms(use_true_random=False))
def test_the_place_of_whiteouts_in_a_layer_makes_no_difference(
    lower: list[tuple[str, str]], upper: list[tuple[str, str]], chance: Random
) -> None:
    def applied(order: list[Entry]) -> str:
        try:
            return listing(tree_of(_tar([("dir", "d"), ("symlink", "s")]), _tar(lower), order))
        except ImageError as error:
            return error.message  # a file is no directory

    entries = walked(_tar(upper))
    others = [entry for entry in entries if not isinstance(entry, Member)]
    mixed: list[Entry] = [entry for entry in entries if isinstance(entry, Member)]
    for entry in others:
        mixed.insert(chance.randint(0, len(mixed)), entry)
    assert applied(mixed) == applied(entries)


def _tar(steps: list[tuple[str, str]]) -> Tar:
    tar = Tar()
    for number, (kind, name) in enumerate(steps):
        if kind == "file":
            tar.file(name, b"x", mode=number)
        elif kind == "symlink":
            tar.symlink(name, "d")
        else:
            getattr(tar, kind)(name)
    return tar
