"""What a command needs before it runs: the beginning of its file, and of the interpreter that this one names.

Who mounts an image to run a command knows that before the kernel asks for it, and the first round trips are made while
the mount is. This module reads as others do, so that nothing is fetched that would not be needed anyway.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable
from contextlib import suppress

import trio

from clipfs.blocks.reader import BlockReader
from clipfs.errors import ClipfsError
from clipfs.format.index import Index

# What the kernel reads at once of a file that it executes.
_HEAD = 128 << 10

# elf(5), of 64 bits and little-endian, as on all that containers usually run on: e_phoff, e_phentsize and e_phnum;
# p_type, p_offset and p_filesz.
_ELF = b"\x7fELF\x02\x01"
_HEADER = struct.Struct("<32xQ14xHH")
_SEGMENT = struct.Struct("<I4xQ16xQ")
_PT_INTERP = 3


async def read_beginnings(index: Index, reader: BlockReader, paths: Iterable[str]) -> None:
    """Read the first 128 KiB of those of these files that there are, and of their interpreters. Errors are for those
    who will read there."""
    seen: set[int] = set()

    async def read(path: str | bytes) -> None:
        with suppress(ClipfsError, OSError):
            nid = index.resolve(path)
            node = index.inode(nid)
            if nid in seen or not stat.S_ISREG(node.mode) or not node.size:
                return
            seen.add(nid)
            named = interpreter(await reader.read(node.address, min(node.size, _HEAD)))
            if named:
                await read(named)

    async with trio.open_nursery() as nursery:
        for path in paths:
            nursery.start_soon(read, path)


def interpreter(head: bytes) -> bytes:
    """The path of the program that runs one that begins like this: a script's, or the dynamic linker; else nothing."""
    if head.startswith(b"#!"):
        words = head[2:].partition(b"\n")[0].split()
        return words[0] if words else b""
    if not head.startswith(_ELF) or len(head) < _HEADER.size:
        return b""
    start, size, count = _HEADER.unpack_from(head)
    if size < _SEGMENT.size:
        return b""
    for at in range(start, min(start + size * count, len(head) - _SEGMENT.size + 1), size):
        kind, offset, length = _SEGMENT.unpack_from(head, at)
        if kind == _PT_INTERP:
            return head[offset : offset + length].rstrip(b"\0")
    return b""
