"""Read random pieces of a file in every way that Linux has, and compare each with the same piece of another file.

`compare` does it here; `python -m tests.reads CLIP PATH MOUNTPOINT ROOT WAY COUNT SEED` in a process of its own, which
fails at the first difference. Half of the pieces begin or end near a border: of the file, a block, a span, a hole.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from random import Random

from clipfs.blocks.plan import BLOCK
from clipfs.format.index import Index

_LARGEST = 1 << 20
_PAGE = 4096
# So often in a run the kernel is made to forget what it has of the file, or later pieces would be its own affair.
_COLD = 3

Read = Callable[[int, int], bytes]


def borders(index: Index, path: str) -> list[int]:
    """Offsets in the file at which a piece may begin that is stored elsewhere than what is before it."""
    node = index.inode(index.resolve(path))
    found = {0, node.size}
    for at, layer, offset, length in index.extents(node.address, node.size):
        start = at - node.address
        found |= {start, start + length}
        for span in index.layers[layer].spans:
            if offset < span.position < offset + length:
                found.add(start + span.position - offset)
            # Blocks are counted from the beginning of their span.
            for block in range(span.position, span.position + span.length, BLOCK):
                if offset < block < offset + length:
                    found.add(start + block - offset)
    return sorted(found)


def pieces(chance: Random, near: list[int], size: int, count: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of `count` pieces, some of which reach beyond the end of the file."""
    for number in range(count):
        length = int(_LARGEST ** chance.random())
        offset = chance.randrange(size)
        if number % 2:
            offset = chance.choice(near) + chance.randint(-3, 3) - chance.choice((0, length))
        yield max(0, offset), length


def compare(index: Index, path: str, top: Path, root: Path, way: str, count: int, seed: int) -> None:
    """Compare `count` pieces of `path` below `top` with those below `root`. AssertionError at a difference."""
    chance = Random(f"{way} {seed}")
    right = (root / path).read_bytes()
    with ExitStack() as stack:
        flags = os.O_RDONLY | (os.O_DIRECT if way == "direct" else 0)
        fd = os.open(top / path, flags)
        stack.callback(os.close, fd)
        read = _WAYS[way](fd, stack)
        for number, (offset, length) in enumerate(pieces(chance, borders(index, path), len(right), count)):
            if number % (count // _COLD) == 0:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            data = read(offset, length)
            assert data == right[offset : offset + length], f"{way} {path}: {offset}+{length} differs"


def _pread(fd: int, stack: ExitStack) -> Read:
    return lambda offset, length: os.pread(fd, length, offset)


def _direct(fd: int, stack: ExitStack) -> Read:
    """O_DIRECT wants its memory, offsets and lengths aligned, at least by custom."""
    memory = stack.enter_context(closing(mmap.mmap(-1, _LARGEST + 2 * _PAGE)))

    def read(offset: int, length: int) -> bytes:
        before = offset % _PAGE
        count = os.preadv(fd, [memoryview(memory)[: -(-(before + length) // _PAGE) * _PAGE]], offset - before)
        return memory[before : min(count, before + length)]

    return read


def _mapped(fd: int, stack: ExitStack) -> Read:
    memory = stack.enter_context(closing(mmap.mmap(fd, 0, prot=mmap.PROT_READ)))
    return lambda offset, length: memory[offset : offset + length]


def _sent(fd: int, stack: ExitStack) -> Read:
    """From file to file within the kernel, by splicing pages."""
    out = os.memfd_create("sent")
    stack.callback(os.close, out)

    def read(offset: int, length: int) -> bytes:
        os.lseek(out, 0, os.SEEK_SET)
        sent = 0
        while count := os.sendfile(out, fd, offset + sent, length - sent):
            sent += count
        return os.pread(out, sent, 0)

    return read


_WAYS: dict[str, Callable[[int, ExitStack], Read]] = {
    "pread": _pread,
    "direct": _direct,
    "mmap": _mapped,
    "sendfile": _sent,
}
WAYS = tuple(_WAYS)

if __name__ == "__main__":
    _clip, _path, _top, _root, _way, _count, _seed = sys.argv[1:]
    with Index.open(_clip) as _index:
        compare(_index, _path, Path(_top), Path(_root), _way, int(_count), int(_seed))
