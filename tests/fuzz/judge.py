"""What must be true of whatever the parsers accept: it becomes a .clip that the checks accept, and says the same."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clipfs.blocks.plan import BLOCK, join, plan
from clipfs.compression.codec import decode
from clipfs.erofs.structs import Inode
from clipfs.format.container import Layer
from clipfs.format.index import Index
from clipfs.layers.layer import Entry
from clipfs.layers.tree import Tree
from tests.clips import Built, seen_in_index, seen_in_tree, write_clip

# Files are read up to this size; a sparse one of 16 TiB costs nobody anything but the reader.
_READ = 1 << 20


@contextmanager
def file_of(content: bytes = b"") -> Iterator[Path]:
    """A file in memory."""
    descriptor = os.memfd_create("input")
    try:
        os.write(descriptor, content)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def judge(layers: Sequence[tuple[Sequence[Entry], Layer]], blobs: Sequence[bytes] | None = None) -> None:
    """Layers that were parsed become an image. Raises ImageError if they cannot be one.

    blobs: the layers as they are stored, not compressed, if files are to be read.
    """
    tree = Tree()
    for number, (entries, _) in enumerate(layers):
        tree.apply(number, entries)
    extents, data_size = tree.finish()
    with file_of() as file:
        write_clip(file, Built(tree.root, extents, data_size, b""), [layer for _, layer in layers])
        with Index.open(file) as index:
            index.check()
            assert seen_in_index(index) == seen_in_tree(tree.root)
            assert index.inodes == tree.inodes
            inodes = dict(_inodes(tree.root))
            for path, node in index.walk():
                if stat.S_ISREG(node.mode) and 0 < node.size <= _READ:
                    got = read(index, node.address, node.size, blobs)
                    assert blobs is None or got == _content(inodes[path], blobs)


def _inodes(root: Inode) -> Iterator[tuple[bytes, Inode]]:
    pending = [(b"", root)]
    while pending:
        path, inode = pending.pop()
        yield path, inode
        pending += [(path + b"/" + name if path else name, child) for name, child in (inode.children or {}).items()]


def _content(inode: Inode, blobs: Sequence[bytes]) -> bytes:
    """What is in a file, if layers are not compressed."""
    content = bytearray(inode.size)
    for at, layer, offset, length in inode.segments:
        content[at : at + length] = blobs[layer][offset : offset + length]
    return bytes(content)


def read(index: Index, address: int, length: int, blobs: Sequence[bytes] | None) -> bytes:
    """Bytes of the data space, read as a mount does from layers that are in memory. Without `blobs`, it is only planned
    how."""
    pieces = plan(index, address, length)
    assert [piece.start for piece in pieces] == [address, *(piece.stop for piece in pieces[:-1])]
    assert not pieces or pieces[-1].stop == address + length
    if blobs is None:
        return b""
    blocks = {}
    for key in {piece.key for piece in pieces if piece.key is not None}:
        layer, number, block = key
        span = index.layers[layer].spans[number]
        plain = decode(index.layers[layer].codec, span, blobs[layer][span.start : span.end])
        blocks[key] = plain[block * BLOCK : (block + 1) * BLOCK]
    content = join(pieces, blocks)
    assert len(content) == length
    return content
