"""One span's blocks as a file: how it is laid out, written and read back.

A file is a head (`_HEAD`: magic, version, size of a block, decoded length, the span's SHA-256), a table (`_ROW` a
block: length of what is stored, and the CRC-32 of all that is stored up to its end), a CRC-32 of both, and the blocks,
one zstd frame each, or as they are where that is smaller. So a block is read with one pread and nothing around it is
decompressed, and as many as follow each other are checked in one go. Everything is checked before it is believed: a
machine that lost power may have left anything under a name that was right.

This module knows one file; which there are, and how many may be, is `disk`'s affair.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from array import array
from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from typing import TypeAlias

import zstandard
from isal import isal_zlib

from clipfs.blocks.plan import BLOCK

_MAGIC = b"clipspan"
# Of all that is said here, the size of a block included.
_VERSION = 2
#: Of the names of files that this version can read.
SUFFIX = f".{_VERSION}"
_HEAD = struct.Struct("<8sIIQ32s")
_ROW = struct.Struct("<II")
_CRC = struct.Struct("<I")

# The fastest that still halves typical file data: level 3 takes half as long again for a twentieth less space.
_LEVEL = 1

# More than the largest span has blocks.
_MAX_BLOCKS = 1 << 16

# Holds the table of a span of 31 MiB.
_AT_FIRST = 4096

# Holds the file of a span of a quarter of a MiB, unless nothing of it could be compressed.
_WHOLE = 256 << 10

_local = threading.local()

Buffer: TypeAlias = bytes | bytearray | memoryview


class DamagedError(Exception):
    """The file is not what was written."""


class WouldWaitError(Exception):
    """The bytes are not in the page cache, and the caller does not want to wait for the disk."""


def place(directory: str, digest: bytes) -> str:
    """Where the file of a span is. A string: a Path takes as long as opening it does.

    Another version of clipfs has its own, so that both can run on a machine and none counts on what it cannot read.
    """
    name = digest.hex()
    return f"{directory}/{name[:2]}/{name[2:]}{SUFFIX}"


def opened(path: str) -> int:
    """A descriptor of the file of a span, for an `Entry`. OSError if there is none, FileNotFoundError as a rule."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)


def pack(digest: bytes, blocks: Sequence[bytes], *, compress: bool) -> list[bytes]:
    """The file's bytes, in pieces."""
    stored = _squeezed(blocks) if compress else blocks
    crcs = accumulate(stored, lambda crc, data: isal_zlib.crc32(data, crc), initial=0)
    rows = b"".join(_ROW.pack(len(data), crc) for data, crc in zip(stored, islice(crcs, 1, None), strict=True))
    head = _HEAD.pack(_MAGIC, _VERSION, BLOCK, sum(map(len, blocks)), digest) + rows
    return [head, _CRC.pack(isal_zlib.crc32(head)), *stored]


def _squeezed(blocks: Sequence[bytes]) -> list[bytes]:
    """All in one call: between two, this thread would have to wait for its turn in the interpreter."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
    squeezed = _local.compressor.multi_compress_to_buffer(list(blocks), threads=1) if blocks else ()
    return [
        small.tobytes() if len(small) < len(block) else block for small, block in zip(squeezed, blocks, strict=True)
    ]


def _unsqueezed(frames: Sequence[Buffer], lengths: Sequence[int]) -> list[Buffer]:
    """The blocks of these lengths, in one call as well. ZstdError if the frames are of others."""
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    if len(frames) == 1:
        return [_local.decompressor.decompress(frames[0], max_output_size=lengths[0])]
    sizes = array("Q", lengths)
    found = _local.decompressor.multi_decompress_to_buffer(list(frames), decompressed_sizes=sizes, threads=1)
    return [memoryview(block) for block in found]


class Entry:
    """A file of blocks, open. It stays readable when it is removed, until nobody refers to it any more.

    What is held of its table is 12 bytes a block: hundreds of them are open in a process.
    """

    def __init__(self, descriptor: int, digest: bytes, *, whole: bool = False) -> None:
        """Takes the descriptor over. DamagedError if the head is not that of a file for `digest`. whole: all blocks are
        going to be read next, and come with the head."""
        self._descriptor = descriptor
        # Head and table in one go, as good as always: a cold disk takes its time for each.
        head = os.pread(descriptor, _WHOLE if whole else _AT_FIRST, 0)
        self._known = head if whole else b""  # the beginning of the file, for the next read
        if len(head) < _HEAD.size:
            raise DamagedError
        magic, version, block, self.length, found = _HEAD.unpack_from(head)
        if (magic, version, block, found) != (_MAGIC, _VERSION, BLOCK, digest) or self.length > _MAX_BLOCKS * BLOCK:
            raise DamagedError
        at = _HEAD.size + -(-self.length // BLOCK) * _ROW.size
        if len(head) < at + _CRC.size:
            head = os.pread(descriptor, at + _CRC.size, 0)
        if len(head) < at + _CRC.size or isal_zlib.crc32(head[:at]) != _CRC.unpack_from(head, at)[0]:
            raise DamagedError
        rows = struct.unpack(f"<{(at - _HEAD.size) // 4}I", head[_HEAD.size : at])
        self._crcs = array("I", (0, *rows[1::2]))
        self._offsets = array("Q", accumulate(rows[::2], initial=at + _CRC.size))

    def __del__(self) -> None:
        os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self._crcs) - 1

    @property
    def there(self) -> bool:
        """Has it still a name? Not after it was evicted, or replaced by another."""
        return os.fstat(self._descriptor).st_nlink > 0

    def touch(self) -> None:
        """It is of use now."""
        os.utime(self._descriptor)

    def read(self, first: int, count: int, *, wait: bool) -> list[bytes]:
        """So many blocks. DamagedError if they are not what was written; WouldWaitError as `wait` has it."""
        return [bytes(block) for block in self.view(first, count, wait=wait)]

    def view(self, first: int, count: int, *, wait: bool) -> list[Buffer]:
        """As `read`, where they came to lie: for who copies them to another place."""
        stop = first + count
        if stop > len(self):
            raise DamagedError
        offsets, start = self._offsets, self._offsets[first]
        size = offsets[stop] - start
        known, self._known = self._known, b""
        if start + size <= len(known):
            data: Buffer = memoryview(known)[start : start + size]
        else:
            data = os.pread(self._descriptor, size, start) if wait else self._cached(size, start)
        if len(data) != size or isal_zlib.crc32(data, self._crcs[first]) != self._crcs[stop]:
            raise DamagedError
        # One that is alone is taken as it came, and then not copied if it is not compressed.
        view = memoryview(data)
        ends = offsets[first : stop + 1]
        stored: list[Buffer]
        stored = [data] if count == 1 else [view[at - start : end - start] for at, end in pairwise(ends)]
        lengths = [min(BLOCK, self.length - at * BLOCK) for at in range(first, stop)]
        packed = [at for at in range(count) if len(stored[at]) != lengths[at]]
        if packed:
            try:
                plain = _unsqueezed([stored[at] for at in packed], [lengths[at] for at in packed])
            except zstandard.ZstdError:
                raise DamagedError from None
            for at, block in zip(packed, plain, strict=True):
                if len(block) != lengths[at]:
                    raise DamagedError
                stored[at] = block
        return stored

    def _cached(self, size: int, offset: int) -> bytearray:
        data = bytearray(size)
        try:
            if os.preadv(self._descriptor, [data], offset, os.RWF_NOWAIT) == size:
                return data
        except OSError as error:
            # tmpfs, among others, does not know the flag; EAGAIN is its answer where it is known.
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
        raise WouldWaitError
