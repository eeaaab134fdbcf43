"""Images that umoci 0.4.7 does not understand or gets wrong, each with the reason, and by whom it is judged instead.

`TAR`: one layer, which GNU tar extracts as POSIX and the OCI image spec have it.
`PLAIN`: neither is right. The same tree is said by hand in other members, and so that umoci gets that right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tests.cases import Layers, pieces, tree
from tests.tars import Tar, gnu_sparse, pax

__all__ = ["PLAIN", "TAR", "ForTar", "Plain"]


class ForTar(NamedTuple):
    """why: what umoci makes of it."""

    why: str
    make: Callable[[], Tar]


class Plain(NamedTuple):
    """why: what is wrong with what umoci makes of it.  plainly: the same, so that umoci gets it right."""

    why: str
    make: Callable[[], Layers]
    plainly: Callable[[], Layers]


# --- what umoci 0.4.7 does not know


def _old_gnu_sparse() -> Tar:
    tar = Tar().dir("./").raw(gnu_sparse(b"four", 50_000, pieces(3))).raw(gnu_sparse(b"five", 50_000, pieces(4)))
    tar.raw(gnu_sparse(b"many", 1_000_001, pieces(100), mode=0o755)).file("next", b"next")
    tar.raw(gnu_sparse(b"hole", 1 << 20, [])).raw(gnu_sparse(b"to-the-end", 4608, [(4096, b"x" * 512)]))
    return tar.hardlink("again", "many")


def _type_7() -> Tar:
    tar = Tar().dir("./").member("f", b"contiguous", typeflag=b"7", mode=0o755, uid=3).file("g", b"next")
    return tar.member("empty", typeflag=b"7", xattrs={"user.x": b"x"}).hardlink("h", "f")


def _global_pax() -> Tar:
    tar = Tar().file("before", b"0").dir("./")
    tar.raw(pax({"uid": "77", "gid": str(1 << 30), "mtime": "1500000000.5", "comment": "nothing"}, typeflag=b"g"))
    tar.file("by-all", b"1").member("its-own", b"2", extra={"uid": "5", "mtime": "7"}).dir("d", gid=6)
    return tar.symlink("l", "by-all").hardlink("h", "by-all").char("c", 1, 3)


def _empty_xattrs() -> Tar:
    tar = Tar().dir("./").file("f", b"f", xattrs={"user.empty": b"", "user.x": b"x"})
    return tar.dir("d", xattrs={"trusted.empty": b""})


TAR: dict[str, ForTar] = {
    "old-GNU sparse files": ForTar("umoci refuses members of type S", _old_gnu_sparse),
    "contiguous files": ForTar("umoci refuses members of type 7", _type_7),
    "global PAX headers": ForTar("umoci refuses them", _global_pax),
    "xattrs without a value": ForTar("umoci, as all that is written in Go, takes no value for no xattr", _empty_xattrs),
}


# --- what umoci 0.4.7 gets wrong


def _on_the_tree(change: Callable[[Tar], Tar]) -> Callable[[], Layers]:
    """The tree of many kinds, and one layer on top."""
    return lambda: [tree(), change(Tar())]


def _alone(change: Callable[[Tar], Tar]) -> Callable[[], Layers]:
    return lambda: [change(Tar())]


def _new_directories(tar: Tar) -> Tar:
    for name in ("x", "x/y", "p", "p/q"):
        tar.dir(name, mtime=0)
    return tar.file("x/y/c", b"c").symlink("to", "p/q").file("p/q/z", b"z")


def _global_after_global(tar: Tar) -> Tar:
    tar.raw(pax({"uid": "77", "mtime": "1500000000.5"}, typeflag=b"g"))
    return tar.raw(pax({"uid": "78", "gid": "9", "SCHILY.xattr.user.all": "1"}, typeflag=b"g")).file("f")


_OVERLAY = {"trusted.overlay.opaque": b"y", "user.overlay.redirect": b"/etc", "user.kept": b"1"}
_LIBARCHIVE = {"LIBARCHIVE.xattr.user.a%20b": "AP8", "LIBARCHIVE.xattr.trusted.t": "dA=="}
_REMADE = "it empties the directory afterwards, so that its mtime is that of the unpacking and not what its entry says"

PLAIN: dict[str, Plain] = {
    "one global PAX header after another": Plain(
        "it refuses them, and GNU tar forgets the first at the second; by POSIX a value holds until another comes",
        _alone(_global_after_global),
        _alone(lambda tar: tar.member("f", mtime="1500000000.5", uid=78, gid=9, xattrs={"user.all": b"1"})),
    ),
    "implied parents": Plain(
        "their mtime is that of the unpacking; with us nothing but the image decides, and it is the epoch",
        _on_the_tree(lambda tar: tar.file("x/y/c", b"c").symlink("to", "p/q").file("to/z", b"z")),
        _on_the_tree(_new_directories),
    ),
    "a new directory, then a whiteout of its name": Plain(
        _REMADE,
        _on_the_tree(lambda tar: tar.dir("d/sub", mode=0o700, mtime=5).file("d/sub/n", b"n").whiteout("d/sub")),
        _on_the_tree(lambda tar: tar.whiteout("d/sub").dir("d/sub", mode=0o700, mtime=5).file("d/sub/n", b"n")),
    ),
    "a new directory, then its parent opaque": Plain(
        _REMADE,
        _on_the_tree(lambda tar: tar.dir("d", mtime=6).dir("d/sub", mode=0o700, mtime=5).opaque("d")),
        _on_the_tree(lambda tar: tar.dir("d", mtime=6).opaque("d").dir("d/sub", mode=0o700, mtime=5)),
    ),
    "xattrs as libarchive says them": Plain(
        "it knows star's notation alone, as GNU tar does",
        _alone(lambda tar: tar.member("f", b"f", extra=_LIBARCHIVE)),
        _alone(lambda tar: tar.member("f", b"f", xattrs={"user.a b": b"\0\xff", "trusted.t": b"t"})),
    ),
    "xattrs of overlayfs": Plain(
        "it sets them, and so lets the image tell overlayfs what to hide",
        _alone(lambda tar: tar.dir("d", xattrs=_OVERLAY).file("d/f", b"f")),
        _alone(lambda tar: tar.dir("d", xattrs={"user.kept": b"1"}).file("d/f", b"f")),
    ),
    "xattrs that Linux cannot have": Plain(
        "it gives up",
        _alone(lambda tar: tar.file("f", b"f", xattrs={"user.": b"1", "other.x": b"2", "user.x": b"x"}).fifo("p")),
        _alone(lambda tar: tar.file("f", b"f", xattrs={"user.x": b"x"}).fifo("p")),
    ),
    "0:0 devices": Plain(
        "it makes them, and overlayfs takes them for whiteouts",
        _on_the_tree(lambda tar: tar.char("fifo", 0, 0).char("new", 0, 0).block("not-one", 0, 0)),
        _on_the_tree(lambda tar: tar.whiteout("fifo").block("not-one", 0, 0)),
    ),
    "aufs' books": Plain(
        "it keeps them as files; the spec reserves their names",
        _on_the_tree(lambda tar: tar.dir(".wh..wh.plnk").file(".wh..wh.plnk/1.2", b"x").file(".wh..wh.aufs")),
        _on_the_tree(lambda tar: tar),
    ),
    "a file deleted, then a hard link to it": Plain(
        "it gives up, and would not if they came the other way round",
        _on_the_tree(lambda tar: tar.whiteout("d/a").hardlink("a", "d/a")),
        _on_the_tree(lambda tar: tar.hardlink("a", "d/a").whiteout("d/a")),
    ),
    "a hard link to its own name": Plain(
        "it deletes the file before it links it, and gives up",
        _on_the_tree(lambda tar: tar.hardlink("f", "f")),
        _on_the_tree(lambda tar: tar),
    ),
    "a whiteout below a symlink that becomes a directory": Plain(
        "it deletes through the symlink if that is not replaced yet",
        _on_the_tree(lambda tar: tar.whiteout("to-d/a").dir("to-d", mode=0o700)),
        _on_the_tree(lambda tar: tar.dir("to-d", mode=0o700)),
    ),
}
