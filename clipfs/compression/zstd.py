"""A zstd stream decoded piece by piece, with a bound on what each piece becomes.

A frame consists of blocks of at most 128 KiB of content each (RFC 8878, section 3.1.1.2), but four bytes can stand for
one of them. So the stream is cut at block boundaries, into runs that decode to about `RUN` bytes, and each is decoded
as a whole. Between two runs a decoder holds nothing back, which makes every block boundary a place to stop and go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import zstandard

# Decoded bytes of a run; one block more at most.
RUN = 1 << 20

# zstd itself decodes no larger window unless told to (ZSTD_WINDOWLOG_LIMIT_DEFAULT is 27); every reader at work on a
# frame holds one.
WINDOW_LIMIT = 1 << 27

# No block decodes to more, and no frame header is longer.
MAX_BLOCK = 128 << 10
MAX_HEADER = 18

_BLOCK_HEADER = 3
_RLE, _COMPRESSED = 1, 2
_SKIPPABLE = 0x184D2A50


class Block(NamedTuple):
    """What a block's header says. size: in the stream, with the header. output: what it decodes to at most."""

    last: bool
    size: int
    output: int

    @classmethod
    def parse(cls, data: bytes | memoryview) -> Block:
        """The block that begins with `data`, of which three bytes count."""
        header = int.from_bytes(data[:_BLOCK_HEADER], "little")
        kind, size = header >> 1 & 3, header >> 3
        output = MAX_BLOCK if kind == _COMPRESSED else size
        return cls(bool(header & 1), _BLOCK_HEADER + (1 if kind == _RLE else size), output)


def skippable(head: bytes) -> int:
    """The length of the skippable frame that begins with `head`, 0 if none does."""
    if int.from_bytes(head[:4], "little") & ~0xF != _SKIPPABLE or len(head) < 8:
        return 0
    return 8 + int.from_bytes(head[4:8], "little")


class ZstdStreamError(Exception):
    """The bytes are no zstd stream; the message says why."""


class ZstdStream:
    """Decodes a stream of frames that arrives in parts, each ending at the end of a block."""

    def __init__(self) -> None:
        self._decoder: Any = None
        self._checksum = 0

    def decode(self, data: bytes | memoryview) -> Iterator[bytes]:
        """The decoded bytes, a run at a time; whoever stops asking stops the decoding."""
        try:
            for run, last in self._runs(memoryview(data)):
                plain = self._decoder.decompress(run)
                if last:
                    self._decoder = None
                yield plain
        except zstandard.ZstdError as error:
            raise ZstdStreamError(str(error)) from error

    def _runs(self, data: memoryview) -> Iterator[tuple[memoryview, bool]]:
        """The runs of whole blocks, and whether each ends its frame."""
        begin = at = output = 0
        while at < len(data):
            if self._decoder is None:
                at += self._open(data[at:])
                begin = at if self._decoder is None else begin
                continue
            block = Block.parse(data[at:])
            at += block.size + (self._checksum if block.last else 0)
            if at > len(data):
                break
            output += block.output
            if block.last or output + MAX_BLOCK > RUN:
                yield data[begin:at], block.last
                begin, output = at, 0
        if at > len(data):
            raise ZstdStreamError("they end too early")
        if begin < at:
            yield data[begin:at], False

    def _open(self, data: memoryview) -> int:
        """Begin a frame: the length of its header, or of all of a frame that is to be skipped."""
        head = bytes(data[:MAX_HEADER])
        if skipped := skippable(head):
            return skipped
        frame = zstandard.get_frame_parameters(head)
        if frame.window_size > WINDOW_LIMIT:
            raise ZstdStreamError(f"a frame needs a window of {frame.window_size >> 20} MiB")
        self._checksum = 4 if frame.has_checksum else 0
        self._decoder = zstandard.ZstdDecompressor(max_window_size=WINDOW_LIMIT).decompressobj()
        return zstandard.frame_header_size(head)
