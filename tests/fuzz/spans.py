"""Span decoding: what a scan of a layer accepts, every span gives again by itself; other bytes are an IntegrityError.

An input is a head of 16 bytes and a compressed blob. The head's first byte chooses what is done with the blob: it is
scanned as a layer, or decoded as the span that the rest of the head describes.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import zstandard

from clipfs.compression.codec import HEAD, Forward, decode, detect
from clipfs.compression.spans import scan
from clipfs.compression.zstd import WINDOW_LIMIT
from clipfs.errors import ImageError, IntegrityError
from clipfs.format.container import Codec, Span
from tests.fuzz import Change, words
from tests.fuzz.judge import file_of

LIMIT = 16 << 10

# what to do, codec, size of spans, pieces of a span | bit, window, skip, length
_HEAD = struct.Struct("<BBBBBxHII")
_SIZES = (50, 200, 1000, 4096, 20_000, 1 << 20)
# Decoded bytes, and spans, after which a scan is given up: 4 bytes of zstd are 128 KiB.
_ENOUGH, _MANY = 1 << 20, 2000
# Spans that are decoded by themselves. A late one may have to pass over all that is before it.
_SAMPLE = 12
_SCAN, _DECODE = 0, 1


def one(data: bytes) -> None:
    if len(data) < _HEAD.size:
        return
    what, codec, size, pieces, bit, window, skip, length = _HEAD.unpack_from(data)
    blob, kind = data[_HEAD.size :], Codec(codec % len(Codec))
    with contextlib.suppress(ImageError):
        detect(blob[:HEAD])
    if what % 2 == _SCAN:
        with contextlib.suppress(ImageError):
            _scanned(blob, kind, _SIZES[size % len(_SIZES)], pieces % 6 + 1)
    else:
        dictionary = blob[: window & 0x7FFF]
        span = Span(1, 1 + len(blob), 5, length % _ENOUGH, bytes(32), bit % 8, skip % _ENOUGH, dictionary)
        _decoded(blob, kind, span)


def _scanned(blob: bytes, codec: Codec, size: int, pieces: int) -> None:
    """The bytes are those that other decoders see, and each span decodes to its part of them."""
    found = []
    with file_of(blob) as path, scan(path, 0, len(blob), codec, size, pieces) as passing:
        for chunk in passing:
            found.append(chunk)
            if sum(map(len, found)) > min(_ENOUGH, size // pieces * _MANY):
                return
    plain = b"".join(found)
    assert plain == _reference(blob, codec)
    position = 0
    for span in passing.spans:
        assert span.position == position
        assert 0 <= span.start < span.end <= len(blob)
        assert span.length
        position += span.length
    assert position == len(plain)
    chance = random.Random(len(plain))
    for span in chance.sample(passing.spans, min(_SAMPLE, len(passing.spans))):
        wanted = plain[span.position : span.position + span.length]
        data = blob[span.start : span.end]
        assert decode(codec, span, data) == wanted
        with contextlib.suppress(IntegrityError):
            assert decode(codec, span, data[:-1] + b"\0") == wanted
    if codec is not Codec.RAW:
        _forward(blob, codec, passing.spans, plain)


def _forward(blob: bytes, codec: Codec, spans: Sequence[Span], plain: bytes) -> None:
    """Spans that share their beginning, one after the other by one decoder."""
    decoder = None
    for before, span in pairwise([None, *spans]):
        assert span is not None
        goes_on = before is not None and before.start == span.start and before.skip + before.length == span.skip
        if not goes_on and span.skip:
            decoder = None  # its frame begins nowhere
            continue
        if not goes_on:
            decoder = Forward(codec, span)
        if decoder is not None:
            start = before.end if goes_on and before is not None else span.start
            got = decoder.decode(span, blob[start : span.end])
            assert got == plain[span.position : span.position + span.length]


def _reference(blob: bytes, codec: Codec) -> bytes:
    """What Python's own gzip and libzstd's streaming decoder make of it."""
    if codec is Codec.RAW:
        return blob
    if codec is Codec.GZIP:
        return gzip.decompress(blob)
    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_LIMIT)
    return decompressor.stream_reader(io.BytesIO(blob), read_across_frames=True).read()


def _decoded(blob: bytes, codec: Codec, span: Span) -> None:
    """A span that a forger made, with a digest that is never right: there is no way to any bytes."""
    try:
        decode(codec, span, blob)
    except IntegrityError:
        with contextlib.suppress(IntegrityError):
            Forward(codec, span).decode(span, blob)
        return
    raise AssertionError("bytes came whose digest is not the one that was demanded")


def mutate(data: bytes, change: Change, chance: random.Random) -> bytes:
    """The head or the blob changed; then a gzip footer that fits, if there can be one."""
    head, blob = data[: _HEAD.size].ljust(_HEAD.size, b"\0"), data[_HEAD.size :]
    if chance.random() < 0.2:
        return words.changed(head, chance) + blob
    blob = words.changed(blob, chance) if chance.random() < 0.3 else change(blob, LIMIT - len(head))
    return head + (_footed(blob) if head[1] % len(Codec) == Codec.GZIP and chance.random() < 0.7 else blob)


def _footed(blob: bytes) -> bytes:
    """The first member with the right footer, which else would be right by luck alone."""
    with contextlib.suppress(zlib.error):
        decoder = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        plain = decoder.decompress(blob[10:], _ENOUGH)
        if decoder.eof:
            end = len(blob) - len(decoder.unused_data)
            footer = zlib.crc32(plain).to_bytes(4, "little") + len(plain).to_bytes(4, "little")
            return blob[:end] + footer + blob[end + len(footer) :]
    return blob


def seeds() -> Iterator[tuple[str, bytes]]:
    """Streams of several blocks, members and frames, each with small and large spans, and one span of each codec."""
    chance = random.Random(7)
    text = b" ".join(b"%d" % chance.randrange(50) for _ in range(700))
    plain = text + chance.randbytes(1500) + bytes(30_000) + text[::-1]
    for name, codec, blob in _streams(plain, text):
        for size, pieces in ((1, 0), (2, 3), (5, 0)):
            yield f"scan {name} {_SIZES[size]} {pieces + 1}", _head(_SCAN, codec, size=size, pieces=pieces) + blob
    yield "decode raw", _head(_DECODE, Codec.RAW, skip=3, length=100) + plain[:200]
    yield "decode gzip", _head(_DECODE, Codec.GZIP, length=len(text)) + gzip.compress(text, mtime=0)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    middle = deflate.compress(text) + deflate.flush()
    yield "decode gzip at a bit", _head(_DECODE, Codec.GZIP, bit=3, window=500, length=900) + middle
    yield "decode zstd", _head(_DECODE, Codec.ZSTD, skip=10, length=900) + zstandard.compress(text)


def _head(what: int, codec: Codec, size: int = 0, pieces: int = 0, **span: int) -> bytes:
    return _HEAD.pack(
        what, codec, size, pieces, span.get("bit", 0), span.get("window", 0), span.get("skip", 0), span.get("length", 0)
    )


def _streams(plain: bytes, text: bytes) -> Iterator[tuple[str, Codec, bytes]]:
    yield "raw", Codec.RAW, plain[:5000]
    yield "gzip", Codec.GZIP, gzip.compress(plain, mtime=0)
    flushed = zlib.compressobj(9, zlib.DEFLATED, 31)
    blocks = [
        flushed.compress(plain[at : at + 3000]) + flushed.flush(zlib.Z_BLOCK) for at in range(0, len(plain), 3000)
    ]
    yield "gzip of many blocks", Codec.GZIP, b"".join(blocks) + flushed.flush()
    members = [gzip.compress(text[at : at + 500], mtime=0) for at in range(0, len(text), 500)]
    yield "gzip of many members", Codec.GZIP, b"".join(members) + bytes(600)
    yield "gzip stored", Codec.GZIP, gzip.compress(plain[:4000], 0, mtime=0)
    yield "zstd", Codec.ZSTD, zstandard.compress(plain)
    whole = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False)
    frames = [whole.compress(text[at : at + 700]) for at in range(0, len(text), 700)]
    skippable = b"\x50\x2a\x4d\x18\x05\0\0\0hello"
    yield "zstd of many frames", Codec.ZSTD, skippable.join(frames)
    stream = zstandard.ZstdCompressor(level=3).compressobj()
    parts = [
        stream.compress(plain[at : at + 5000]) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for at in range(0, len(plain), 5000)
    ]
    yield "zstd of many blocks", Codec.ZSTD, b"".join(parts) + stream.flush()
    yield "zstd of runs", Codec.ZSTD, zstandard.compress(bytes(300_000))
