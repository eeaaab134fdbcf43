"""Deflate and gzip below the level that Python's own modules reach: block boundaries, single bits.

This module owns the shape of gzip members (RFC 1952) and the points inside a deflate stream (RFC 1951) where decoding
can begin. It does not know spans, layers or digests. Facts that the rest leans on:

- decoding may begin at any block boundary, given the boundary's bit and the 32 KiB of output before it (the window);
- only the first 32 KiB after the boundary can refer to the window, and what they do not refer to may be zero.

Finding boundaries takes zlib's Z_BLOCK, which no Python module exposes, so libz is called directly. A reader of many
threads that guesses at boundaries is faster on many cores, but keeps whole blocks in memory: a hostile 4 MB stream of
one block took 3.7 GB. Here memory is one buffer in and one out, whatever comes.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from enum import Enum
from functools import cache
from types import TracebackType
from typing import Self

from clipfs.errors import ClipfsError, ImageError

WINDOW = 1 << 15

# FEXTRA alone may take 64 KiB; names and comments longer than the rest have never been seen (Go refuses beyond 512).
HEADER_LIMIT = 128 << 10

FOOTER = 8

_FHCRC, _FEXTRA, _FNAME, _FCOMMENT, _RESERVED = 0x02, 0x04, 0x08, 0x10, 0xE0

# One read of the file. Smaller costs calls, larger only cache misses.
_INPUT = 256 << 10

# One piece of output. The GIL is free for the 2 ms that it takes.
_OUTPUT = 1 << 20

_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR = 0, 1, -5
_Z_NO_FLUSH, _Z_BLOCK = 0, 5
_AFTER_BLOCK, _LAST_BLOCK, _UNUSED_BITS = 128, 64, 7
_RAW = -15


class HeaderError(ValueError):
    """What begins here is no gzip header; the message is the reason."""


def header_end(data: bytes | memoryview, start: int = 0) -> int:
    """Where the deflate stream begins, for the gzip member whose header begins at `start` of `data`."""
    view = memoryview(data)[start : start + HEADER_LIMIT]
    if len(view) < 10:
        raise HeaderError("it is cut off inside a gzip header")
    if (view[0], view[1]) != (0x1F, 0x8B):
        raise HeaderError("what follows is neither another gzip member nor zero padding")
    if view[2] != zlib.DEFLATED or view[3] & _RESERVED:
        raise HeaderError("a gzip header asks for a method or flag that RFC 1952 does not know")
    flags, at = view[3], 10
    if flags & _FEXTRA:
        at += 2 + int.from_bytes(view[10:12], "little")
    for flag in (_FNAME, _FCOMMENT):
        if flags & flag:
            at = _after_zero(view, at)
    if flags & _FHCRC:
        at += 2
        if at <= len(view) and int.from_bytes(view[at - 2 : at], "little") != zlib.crc32(view[: at - 2]) & 0xFFFF:
            raise HeaderError("a gzip header has a wrong checksum")
    if at > len(view):
        raise HeaderError("it is cut off inside a gzip header, or the header is longer than 128 KiB")
    return start + at


def _after_zero(view: memoryview, at: int) -> int:
    """The place behind the first zero from `at` on; beyond the end if there is none. Copies little: names are short."""
    step = 64
    while at < len(view):
        zero = bytes(view[at : at + step]).find(0)
        if zero >= 0:
            return at + zero + 1
        at, step = at + step, step * 4
    return len(view) + 1


def primed(bit: int, data: bytes | memoryview) -> bytes | memoryview:
    """A deflate stream whose output begins with block boundary `bit` bits into `data`.

    Shifting the data would break stored blocks, which are aligned to bytes. So a prefix of empty blocks ends exactly
    on the boundary's bit instead, and the low bits of data's first byte, the block before, are replaced by it.
    """
    if bit == 0 or not data:
        return data
    prefix = bytearray(_prefix(bit))
    prefix[-1] |= data[0] >> bit << bit
    return bytes(prefix) + data[1:]


@cache
def _prefix(bit: int) -> bytes:
    """Empty blocks that end `bit` (1..7) bits into their last byte.

    An empty block with fixed codes takes 10 bits, one with dynamic codes at least 93: fixed ones alone reach the even
    bits, one dynamic block in front of them the odd ones.
    """
    value = length = 0
    if bit % 2:
        value, length = _empty_dynamic_block()
    while length % 8 != bit:
        value |= 0b010 << length  # not the last block, fixed codes; then end-of-block: seven zero bits
        length += 10
    return value.to_bytes(length // 8 + 1, "little")


def _empty_dynamic_block() -> tuple[int, int]:
    """The bits, and how many, of a block with dynamic codes and no content: 93 of them."""
    value = length = 0

    def put(number: int, width: int) -> None:
        nonlocal value, length
        value |= number << length
        length += width

    put(0b100, 3)  # not the last block, dynamic codes
    put(0, 5)  # 257 literal and length symbols,
    put(0, 5)  # one distance symbol,
    put(15, 4)  # all 19 lengths of the codes that the code lengths are written in:
    for symbol in (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15):
        put(int(symbol in (1, 18)), 3)  # two in use, so "length 1" is written 0 and "a run of zeros" 1
    for run in (138, 118):  # no literal has a code
        put(1, 1)
        put(run - 11, 7)
    put(0, 1)  # end-of-block has one, of one bit,
    put(0, 1)  # as has the distance
    put(0, 1)  # end-of-block
    return value, length


class Stop(Enum):
    """Why `Inflater.step` returned."""

    FULL = "as much output as was asked for, or all that the input at hand gives"
    BOUNDARY = "at the end of a block that is not the last"
    END = "at the end of the deflate stream"


class _ZStream(ctypes.Structure):
    """z_stream of zlib.h."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


@cache
def _libz() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libz.so.1")
    except OSError as error:
        raise ClipfsError("indexing gzip layers needs libz.so.1, which is not here: install zlib1g") from error
    library.zlibVersion.restype = ctypes.c_char_p
    return library


class Inflater:
    """Inflates the deflate streams of a file region, one piece of output at a time, and sees block boundaries.

    A context manager. `position` is the offset, in the region, of the next compressed byte; `bit` says how many low
    bits of the byte before it are used up, if that is not all of them.
    """

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self._descriptor, self._offset, self._size = descriptor, offset, size
        self._libz = _libz()
        self._input = ctypes.create_string_buffer(_INPUT)
        self._output = ctypes.create_string_buffer(_OUTPUT)
        self._dictionary = ctypes.create_string_buffer(WINDOW)
        self._stream = _ZStream()
        self._read = 0  # region offset that the input buffer has been filled up to
        version = self._libz.zlibVersion()
        code = self._libz.inflateInit2_(ctypes.byref(self._stream), _RAW, version, ctypes.sizeof(self._stream))
        if code != _Z_OK:
            raise ClipfsError(f"zlib cannot be initialised (code {code})")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._libz.inflateEnd(ctypes.byref(self._stream))

    @property
    def position(self) -> int:
        return self._read - int(self._stream.avail_in)

    @property
    def bit(self) -> int:
        return -int(self._stream.data_type & _UNUSED_BITS) % 8

    @property
    def window(self) -> bytes:
        """The last 32 KiB of output of this stream, or all of it if that is less."""
        length = ctypes.c_uint(0)
        self._libz.inflateGetDictionary(ctypes.byref(self._stream), self._dictionary, ctypes.byref(length))
        return self._dictionary.raw[: length.value]

    def begin(self, position: int) -> None:
        """A new deflate stream begins at `position`."""
        ahead = position - self.position
        if 0 <= ahead <= self._stream.avail_in:
            self._stream.avail_in -= ahead
            self._stream.next_in = (self._stream.next_in or 0) + ahead
        else:
            self._stream.avail_in, self._read = 0, position
        self._libz.inflateReset(ctypes.byref(self._stream))

    def step(self, limit: int, *, blocks: bool) -> tuple[bytes, Stop]:
        """At most `limit` (> 0) more bytes. blocks: stop at the next boundary too. ImageError for a damaged stream."""
        stream = self._stream
        if not stream.avail_in:
            self._fill()
        room = min(limit, _OUTPUT)
        stream.next_out, stream.avail_out = ctypes.addressof(self._output), room
        code = self._libz.inflate(ctypes.byref(stream), _Z_BLOCK if blocks else _Z_NO_FLUSH)
        piece = ctypes.string_at(self._output, room - stream.avail_out)
        if code == _Z_STREAM_END:
            return piece, Stop.END
        if code not in (_Z_OK, _Z_BUF_ERROR):
            reason = (stream.msg or b"out of memory").decode()
            raise ImageError(f"the gzip stream is damaged near compressed byte {self.position}: {reason}")
        boundary = stream.data_type & _AFTER_BLOCK and not stream.data_type & _LAST_BLOCK
        return piece, Stop.BOUNDARY if boundary else Stop.FULL

    def _fill(self) -> None:
        count = min(_INPUT, self._size - self._read)
        got = os.preadv(self._descriptor, [memoryview(self._input)[:count]], self._offset + self._read) if count else 0
        if not got:
            raise ImageError(f"the gzip stream is cut off at compressed byte {self._read}")
        self._read += got
        self._stream.next_in, self._stream.avail_in = ctypes.addressof(self._input), got
