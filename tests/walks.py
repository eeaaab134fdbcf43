"""What tests of layers do with archives: read them whole, in pieces, into a tree, or not at all.

This module knows `TarWalk` and `Tree` from outside. Archives come from `tests.tars`, or from real archivers.
"""

from __future__ import annotations

import stat
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from clipfs.erofs.structs import Inode
from clipfs.errors import ImageError
from clipfs.layers.layer import Entry, Member, TarWalk
from clipfs.layers.tree import Tree
from tests.tars import END, Tar

LAYER = "sha256:" + "5" * 64


def walked(tar: bytes | Tar, *, step: int = 1 << 20) -> list[Entry]:
    """All entries of an archive that arrives in pieces of `step` bytes."""
    data = tar.done() if isinstance(tar, Tar) else tar
    walk, entries = TarWalk(), list[Entry]()
    for at in range(0, len(data), step):
        entries += walk.feed(data[at : at + step])
    return entries + walk.finish()


def members(tar: bytes | Tar) -> dict[bytes, Member]:
    """The members of an archive without whiteouts, by path."""
    found = {}
    for entry in walked(tar):
        assert isinstance(entry, Member), entry
        found[entry.path] = entry
    return found


def only(raw: bytes) -> Member:
    """The one member of which `raw` is everything but the end of the archive."""
    (entry,) = walked(raw + END)
    assert isinstance(entry, Member)
    return entry


def content(member: Member, layer: bytes) -> bytes:
    """What the segments of a file say that is in it."""
    data = bytearray(member.size)
    end = 0
    for at, offset, length in member.segments:
        assert end <= at <= at + length <= member.size
        assert offset + length <= len(layer)
        data[at : at + length] = layer[offset : offset + length]
        end = at + length
    return bytes(data)


def stored(inode: Inode, *layers: bytes) -> bytes:
    """What is in a file of a tree."""
    data = bytearray(inode.size)
    for at, layer, offset, length in inode.segments:
        data[at : at + length] = layers[layer][offset : offset + length]
    return bytes(data)


def tree_of(*layers: bytes | Tar | Sequence[Entry]) -> Tree:
    """The layers on top of each other, finished."""
    tree = Tree()
    for number, layer in enumerate(layers):
        tree.apply(number, walked(layer) if isinstance(layer, bytes | Tar) else layer)
    tree.finish()
    return tree


def paths(tree: Tree) -> dict[bytes, Inode]:
    """Every inode below the root, by each of its paths."""
    return dict(_below(tree.root, b""))


def _below(directory: Inode, prefix: bytes) -> Iterator[tuple[bytes, Inode]]:
    for name, inode in sorted((directory.children or {}).items()):
        yield prefix + name, inode
        if inode.children is not None:
            yield from _below(inode, prefix + name + b"/")


def listing(tree: Tree) -> str:
    """A tree in one line: ``d/ d/f=2 s->t``, where 2 is the layer that the contents are from."""
    return " ".join(_line(path.decode(), inode) for path, inode in paths(tree).items())


def _line(path: str, inode: Inode) -> str:
    if inode.children is not None:
        return path + "/"
    if inode.target:
        return f"{path}->{inode.target.decode()}"
    return path + (f"={inode.segments[0][1]}" if inode.segments else "" if stat.S_ISREG(inode.mode) else "*")


def refused(act: Callable[[], Any], *, seconds: float = 1, memory: int = 4 << 20) -> ImageError:
    """The error with which `act` refuses a layer: one sentence that says where, soon, and without much memory."""
    tracemalloc.start()
    start = time.process_time()  # not what others on this machine take
    try:
        with pytest.raises(ImageError) as caught:
            act()
        took, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    error = caught.value
    sentence = str(error.within(LAYER))
    assert f"layer {LAYER}" in sentence
    assert error.offset is not None
    assert f"offset {error.offset}" in sentence
    assert sentence.isprintable()
    assert len(sentence) < 700
    assert took < seconds, f"{took:.2f} s"
    assert peak < memory, f"{peak >> 10} KiB"
    return error
