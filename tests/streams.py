"""Compressed streams for tests: bit by bit, member by member, by the programs that people use; and what a scan of one
says, checked against the bytes that went in."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from clipfs.compression.codec import decode, detect
from clipfs.compression.spans import SPAN_SIZE, scan
from clipfs.format.container import Codec, Span
from tests.conftest import require_programs

KB, MB = 1 << 10, 1 << 20

FHCRC, FEXTRA, FNAME, FCOMMENT = 2, 4, 8, 16

# The order in which a deflate block states the lengths of its code length codes.
_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes that do not compress."""
    return random.Random(seed).randbytes(size)


def prose(size: int, seed: int = 1) -> bytes:
    """Bytes that compress to a third, no two stretches alike."""
    chance = random.Random(seed)
    words = [chance.randbytes(chance.randint(1, 9)).hex().encode() for _ in range(3000)]
    return b" ".join(chance.choices(words, k=size // 6 + 1))[:size].ljust(size, b".")


def mixed(size: int, seed: int = 1) -> bytes:
    """Some of both, and runs: every kind of deflate block comes of it."""
    pieces, chance = [], random.Random(seed)
    while size > 0:
        length = min(size, chance.randint(1, 90_000))
        pieces.append(chance.choice((prose, noise, lambda n, _: bytes(n)))(length, size))
        size -= length
    return b"".join(pieces)


class Bits:
    """A deflate stream, bit by bit."""

    def __init__(self) -> None:
        self._value = self._length = 0

    def put(self, number: int, width: int) -> Self:
        """A number, its lowest bit first."""
        self._value |= number << self._length
        self._length += width
        return self

    def code(self, number: int, width: int) -> Self:
        """A Huffman code, its highest bit first."""
        return self.put(int(f"{number:0{width}b}"[::-1], 2), width)

    def dynamic(self, literals: Sequence[int], distances: Sequence[int], *, last: bool = True) -> Self:
        """The head of a block with these lengths of codes, none of them longer than 15."""
        self.put(last, 1).put(2, 2).put(len(literals) - 257, 5).put(len(distances) - 1, 5).put(15, 4)
        for symbol in _ORDER:
            self.put(4 if symbol < 16 else 0, 3)
        for length in (*literals, *distances):
            self.code(length, 4)
        return self

    def done(self) -> bytes:
        return self._value.to_bytes(-(-self._length // 8), "little")


def deflated(
    data: bytes, level: int = 6, strategy: int = zlib.Z_DEFAULT_STRATEGY, *, flush: int = 0, every: int = 0
) -> bytes:
    """A raw deflate stream by zlib, flushed so after `every` so many bytes."""
    deflate = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
    pieces = []
    for at in range(0, len(data), every or max(1, len(data))):
        pieces.append(deflate.compress(data[at : at + (every or len(data))]))
        if every:
            pieces.append(deflate.flush(flush))
    return b"".join(pieces) + deflate.flush()


def member(
    data: bytes,
    stream: bytes | None = None,
    *,
    flags: int = 0,
    extra: bytes = b"",
    name: bytes = b"",
    comment: bytes = b"",
) -> bytes:
    """A gzip member around a deflate stream of `data`, with the header's optional parts as RFC 1952 has them."""
    flags |= bool(extra) * FEXTRA | bool(name) * FNAME | bool(comment) * FCOMMENT
    head = b"\x1f\x8b\x08" + bytes([flags]) + bytes(4) + b"\0\xff"
    head += len(extra).to_bytes(2, "little") + extra if extra else b""
    head += name + b"\0" if name else b""
    head += comment + b"\0" if comment else b""
    head += (zlib.crc32(head) & 0xFFFF).to_bytes(2, "little") if flags & FHCRC else b""
    body = deflated(data) if stream is None else stream
    return head + body + zlib.crc32(data).to_bytes(4, "little") + (len(data) & 0xFFFFFFFF).to_bytes(4, "little")


def program(*command: str, data: bytes, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    """What a program makes of `data`."""
    require_programs(command[0])
    return subprocess.run(command, input=data, capture_output=True, check=check, timeout=60)


@contextlib.contextmanager
def stored(blob: bytes) -> Iterator[tuple[Path, int, int]]:
    """A file with `blob` somewhere inside of it: path, offset, size."""
    descriptor = os.memfd_create("blob")
    try:
        os.write(descriptor, b"\x1f\x8b before")
        with open(descriptor, "ab", closefd=False) as file:
            file.write(blob + b"\x1f\x8b behind")
        yield Path(f"/proc/self/fd/{descriptor}"), 9, len(blob)
    finally:
        os.close(descriptor)


def scanned(
    blob: bytes, span_size: int = SPAN_SIZE, codec: Codec | None = None, pieces: int = 1
) -> tuple[bytes, list[Span]]:
    """What a scan says: the decoded bytes, and the spans."""
    codec = detect(blob[:512]) if codec is None else codec
    with stored(blob) as place, scan(*place, codec, span_size, pieces) as passing:
        plain = b"".join(passing)
        return plain, list(passing.spans)


def checked(
    blob: bytes, plain: bytes, span_size: int = SPAN_SIZE, codec: Codec | None = None, pieces: int = 1
) -> list[Span]:
    """The spans of `blob`, after making sure that they tile `plain`, and that each decodes alone, in any order, from
    its own compressed bytes and no others."""
    codec = detect(blob[:512]) if codec is None else codec
    found, spans = scanned(blob, span_size, codec, pieces)
    assert found == plain
    position = 0
    for span in spans:
        assert (span.position, span.length > 0) == (position, True)
        assert 0 <= span.start < span.end <= len(blob)
        assert 0 <= span.bit < 8
        assert len(span.window) <= 32 * KB
        position += span.length
    assert position == len(plain)
    for span in random.Random(5).sample(spans, len(spans)):
        assert decode(codec, span, blob[span.start : span.end]) == plain[span.position : span.position + span.length]
    return spans
