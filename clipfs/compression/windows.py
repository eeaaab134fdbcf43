"""Windows of gzip seek points: what has to be kept of them, and what that will cost.

This module owns what a deflate stream takes from the 32 KiB before a place where decoding begins. Of most windows that
is little, and of some, such as those where one file ends and another begins, hardly anything.
"""

from __future__ import annotations

import sys
import threading
import zlib
from functools import cache
from itertools import compress

import zstandard

from clipfs.compression.deflate import WINDOW, primed

# Compressed bytes in which 32 KiB of output are expected: stored blocks take 5 bytes more than that.
REACH = 64 << 10

# Output by which the cost of a window is judged: it tells as much as all 32 KiB would (both agree to 0.9 with what the
# windows of a 260 MB image came to), in a third of the time.
SAMPLE = 8 << 10

_RAW = -15

# Every byte with its bits turned over; and all bits of a byte, if any is set.
_TURNED = bytes(range(255, -1, -1))
_WHOLE_BYTES = bytes([0] + [255] * 255)

# Where in a number of two bytes this machine has the lower one.
_LOW = 0 if sys.byteorder == "little" else 1

_local = threading.local()


def sparse_window(window: bytes, bit: int, data: bytes) -> bytes:
    """`window` with zeros where the stream at `data` never refers to it, and without what then leads it.

    The first 32 KiB are decoded behind three made-up windows: a byte that comes from the window differs between two
    of them, and two of them together tell its place. data: the compressed bytes from the boundary on that a decoder
    will be given, or the first `REACH` of them. How much of their output is wanted does not matter: a decoder that
    looks ahead stumbles over the rest.
    """
    if not window:
        return b""
    stream = primed(bit, data[:REACH])
    views = []
    for dictionary in _dictionaries():
        decoder = zlib.decompressobj(_RAW, dictionary[: len(window)])
        try:
            views.append(decoder.decompress(stream, WINDOW))
        except zlib.error:
            return window  # the stream is damaged; whoever scans it is about to see that, and says where
        if len(views[-1]) < WINDOW and len(data) >= REACH and not decoder.eof:
            return window  # so much input for so little output: keep it all rather than guess
    low, high, other = views
    size = len(low)
    differs = (int.from_bytes(low, "little") ^ int.from_bytes(other, "little")).to_bytes(size, "little")
    pairs = bytearray(2 * size)
    pairs[_LOW::2], pairs[1 - _LOW :: 2] = low, high
    used = set(compress(memoryview(pairs).cast("H"), differs))
    if not used:
        return b""
    kept = bytearray(len(window))
    for at in used:
        kept[at] = window[at]
    return bytes(kept[min(used) :])


def window_cost(window: bytes, bit: int, data: bytes, plain: bytes) -> int:
    """About how many bytes the sparse window of this boundary takes when it is compressed, next to those of others.

    Behind a window whose bits are all turned over, just those bytes come out otherwise that come from the window. They
    are compressed where they stand. data: the compressed bytes from the boundary on. plain: what they decode to. Of
    both, `SAMPLE` bytes and twice as many, or what there is.
    """
    if not window:
        return 0
    try:
        decoder = zlib.decompressobj(_RAW, window.translate(_TURNED))
        other = decoder.decompress(primed(bit, data), max(1, len(plain)))
    except zlib.error:
        return len(window)  # the stream is damaged; whoever scans it is about to see that, and says where
    size = min(len(other), len(plain))
    if not size:
        return len(window)
    known = int.from_bytes(plain[:size], "little")
    differs = known ^ int.from_bytes(other[:size], "little")
    taken = int.from_bytes(differs.to_bytes(size, "little").translate(_WHOLE_BYTES), "little")
    return len(_compressor().compress((known & taken).to_bytes(size, "little")))


def packed(window: bytes) -> bytes:
    """A window for as long as nobody needs it: a tenth of its size or so."""
    # Copied, because zstandard gives results as much room as they could have needed.
    return bytes(memoryview(_compressor().compress(window))) if window else b""


def unpacked(frame: bytes) -> bytes:
    """The inverse of `packed`."""
    return zstandard.ZstdDecompressor().decompress(frame, WINDOW) if frame else b""


def _compressor() -> zstandard.ZstdCompressor:
    """A fast one, of this thread."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=1, write_checksum=False, write_content_size=False)
    compressor: zstandard.ZstdCompressor = _local.compressor
    return compressor


@cache
def _dictionaries() -> tuple[bytes, bytes, bytes]:
    """Windows that hold, at each place: its low byte, its high byte, and the complement of the low one."""
    low = bytes(range(256)) * (WINDOW // 256)
    high = b"".join(bytes([number]) * 256 for number in range(WINDOW // 256))
    return low, high, low.translate(_TURNED)
