"""Below the gzip module: headers, streams that begin at a bit, windows without what nobody needs, block boundaries."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from clipfs.compression import deflate
from clipfs.compression.deflate import (
    HEADER_LIMIT,
    WINDOW,
    HeaderError,
    Inflater,
    Stop,
    header_end,
    primed,
)
from clipfs.compression.windows import sparse_window
from clipfs.errors import ClipfsError, ImageError
from tests.streams import FHCRC, KB, MB, Bits, deflated, member, mixed, noise, prose, stored

PLAIN = mixed(2 * MB)


class TestHeader:
    @pytest.mark.parametrize("flags", [0, 1, FHCRC])
    @pytest.mark.parametrize("extra", [b"", b"x", bytes(65535)])
    @pytest.mark.parametrize("name", [b"", b"name", b"n" * 3000])
    @pytest.mark.parametrize("comment", [b"", b"c"])
    def test_every_part(self, flags: int, extra: bytes, name: bytes, comment: bytes) -> None:
        whole = member(b"", b"", flags=flags, extra=extra, name=name, comment=comment)
        end = len(whole) - 8
        assert header_end(whole) == end
        assert header_end(b"before" + whole + b"behind", 6) == 6 + end
        assert header_end(memoryview(whole)[:end]) == end
        for short in {*range(min(end, 40)), end // 2, end - 1}:
            with pytest.raises(HeaderError, match="cut off"):
                header_end(whole[:short])

    @pytest.mark.parametrize("name", [HEADER_LIMIT - 11, HEADER_LIMIT - 10, MB])
    def test_a_name_without_end(self, name: int) -> None:
        whole = member(b"", b"", name=b"n" * name)
        if name + 11 <= HEADER_LIMIT:
            assert header_end(whole) == name + 11
        else:
            with pytest.raises(HeaderError, match="longer than 128 KiB"):
                header_end(whole)

    @pytest.mark.parametrize(
        ("head", "reason"),
        [
            (b"\x1f\x9d\x08\0", "neither another gzip member nor zero padding"),
            (b"PK\3\4", "neither another gzip member"),
            (b"\x1f\x8b\x07\0", "method or flag"),
            (b"\x1f\x8b\x08\x20", "method or flag"),
            (b"\x1f\x8b\x08\x80", "method or flag"),
            (b"\x1f\x8b\x08\x02" + bytes(6) + b"ab", "wrong checksum"),
            (b"", "cut off"),
        ],
    )
    def test_what_is_none(self, head: bytes, reason: str) -> None:
        with pytest.raises(HeaderError, match=reason):
            header_end(head.ljust(100, b"\0") if head else b"")

    @given(flags=st.integers(0, 31), rest=st.binary(max_size=300))
    def test_nonsense(self, flags: int, rest: bytes) -> None:
        """An end inside of the data, or a reason."""
        data = b"\x1f\x8b\x08" + bytes([flags]) + rest
        with contextlib.suppress(HeaderError):
            assert 10 <= header_end(data) <= len(data)


class TestPrimed:
    BLOCKS: ClassVar = {
        "stored": deflated(noise(3000), 0),
        "fixed": deflated(prose(3000), 6, zlib.Z_FIXED),
        "dynamic": deflated(prose(30_000)),
        "empty": b"\x03\0",
    }

    @pytest.mark.parametrize("low", [0, 0xFF])
    @pytest.mark.parametrize("bit", range(8))
    @pytest.mark.parametrize("kind", BLOCKS)
    def test_a_stream_that_begins_at_a_bit(self, kind: str, bit: int, low: int) -> None:
        """Whatever the bits below are. Blocks that are aligned to bytes stay so: only others can be moved like this."""
        block = self.BLOCKS[kind]
        plain = zlib.decompress(block, -15)
        if kind == "stored":
            # The type, then nothing up to the next byte, then the lengths.
            pieces = [block[at : at + 3005] for at in range(0, len(block), 3005)]
            assert len(pieces) == 1
            moved = ((1 << bit) | (low & (1 << bit) - 1)).to_bytes(2, "little")[: 1 + (bit > 5)] + block[1:]
        else:
            moved = (int.from_bytes(block, "little") << bit | low & (1 << bit) - 1).to_bytes(len(block) + 1, "little")
        for inflate in (zlib.decompressobj(-15), isal_zlib.decompressobj(-15)):
            assert inflate.decompress(bytes(primed(bit, moved))) == plain
            assert inflate.eof

    @pytest.mark.parametrize("bit", range(8))
    def test_of_nothing(self, bit: int) -> None:
        assert bytes(primed(bit, b"")) == b""

    @pytest.mark.parametrize("bit", range(1, 8))
    def test_the_prefix_is_short(self, bit: int) -> None:
        assert len(primed(bit, b"x")) <= 20


class TestSparseWindow:
    def cut(self, plain: bytes, size: int, **options: int) -> tuple[bytes, bytes]:
        """(window, data): a stream that may refer to the first `size` bytes of `plain`, and contains the others."""
        encoder = zlib.compressobj(options.get("level", 9), zlib.DEFLATED, -15, 9, 0, plain[:size])
        return plain[:size], encoder.compress(plain[size:]) + encoder.flush()

    def decoded(self, window: bytes, data: bytes, length: int) -> bytes:
        return zlib.decompressobj(-15, window).decompress(data, length)

    @settings(max_examples=100, deadline=None)
    @given(seed=st.integers(0, 1 << 30), size=st.integers(1, WINDOW), length=st.integers(1, 50_000))
    def test_decodes_the_same_and_holds_nothing_else(self, seed: int, size: int, length: int) -> None:
        chance = random.Random(seed)
        words = [chance.randbytes(chance.randint(3, 40)) for _ in range(chance.choice((1, 30, 3000)))]
        plain = b"".join(chance.choices(words, k=30_000))[: size + length]
        window, data = self.cut(plain, size, level=seed % 10)
        sparse = sparse_window(window, 0, data)
        assert self.decoded(sparse, data, len(plain)) == plain[size:]
        # Each byte that is left matters: without it something else comes out, or nothing.
        kept = [at for at, byte in enumerate(sparse) if byte]
        for at in chance.sample(kept, min(5, len(kept))):
            other = bytearray(sparse)
            other[at] ^= 0xFF
            assert self.decoded(bytes(other), data, len(plain)) != plain[size:]
        assert not sparse or sparse[0] == window[len(window) - len(sparse)]

    def test_nothing_is_left_where_nothing_is_referred_to(self) -> None:
        assert sparse_window(noise(WINDOW), 0, deflated(prose(40_000))) == b""
        assert sparse_window(b"", 0, deflated(prose(40_000))) == b""

    @pytest.mark.parametrize("byte", [0, 1, 0x7F, 0x80, 0xFF])
    def test_one_byte(self, byte: int) -> None:
        """Of 32 KiB only the last is referred to; a match of the distance one repeats it."""
        window, data = self.cut(noise(WINDOW - 1) + bytes([byte]) * 301, WINDOW)
        assert sparse_window(window, 0, data) == bytes([byte])

    def test_what_is_not_in_the_data_does_not_count(self) -> None:
        plain = noise(WINDOW) + prose(2000)
        window, data = self.cut(plain + plain[3000:4000], WINDOW)
        assert sparse_window(window, 0, data[:-500]) == b""
        assert plain[3000:4000] in sparse_window(window, 0, data)

    def test_all_is_kept_where_little_comes_of_much(self) -> None:
        """64 KiB of empty blocks, and only then what refers to the window."""
        window, data = self.cut(noise(WINDOW) * 2, WINDOW)
        far = b"\0\0\0\xff\xff" * 20_000 + data
        assert sparse_window(window, 0, far[: 64 * KB]) == window

    def test_the_end_of_a_member_is_an_end(self) -> None:
        window, data = self.cut(noise(WINDOW) + prose(100), WINDOW)
        assert sparse_window(window, 0, data + bytes(8) + member(b"next")) == b""


@contextlib.contextmanager
def inflating(blob: bytes) -> Iterator[Inflater]:
    with stored(blob) as (path, offset, size):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with Inflater(descriptor, offset, size) as inflater:
                yield inflater
        finally:
            os.close(descriptor)


def drained(inflater: Inflater, limit: int = MB, *, blocks: bool = False) -> bytes:
    """All of a stream."""
    pieces, stop = [], Stop.FULL
    while stop is not Stop.END:
        piece, stop = inflater.step(limit, blocks=blocks)
        assert len(piece) <= min(limit, MB)
        pieces.append(piece)
    return b"".join(pieces)


class TestInflater:
    @pytest.mark.parametrize("limit", [1, 4096, 10 * MB])
    @pytest.mark.parametrize("blocks", [True, False])
    def test_all_of_a_stream(self, limit: int, blocks: bool) -> None:
        plain = PLAIN[: 20 * KB if limit == 1 else len(PLAIN)]
        data = deflated(plain)
        with inflating(data + b"behind") as inflater:
            assert drained(inflater, limit, blocks=blocks) == plain
            assert inflater.position == len(data)

    def test_decoding_can_begin_at_every_boundary(self) -> None:
        data, at, met = deflated(PLAIN), 0, set()
        with inflating(data + bytes(8)) as inflater:
            stop = Stop.FULL
            while stop is not Stop.END:
                piece, stop = inflater.step(MB, blocks=True)
                at += len(piece)
                assert inflater.window == PLAIN[max(0, at - WINDOW) : at]
                if stop is Stop.BOUNDARY:
                    bit = inflater.bit
                    met.add(bit)
                    start = data[inflater.position - (bit > 0) :]
                    decoder = zlib.decompressobj(-15, inflater.window)
                    assert decoder.decompress(primed(bit, start), 5000) == PLAIN[at : at + 5000]
        assert met == set(range(8))

    def test_one_stream_after_the_other(self) -> None:
        """Forwards, backwards, and beyond what is in the buffer."""
        plains = [PLAIN[: 100 * KB], b"", PLAIN[-300 * KB :]]
        streams = [deflated(plain) for plain in plains]
        starts = [0, len(streams[0]) + 1000, len(streams[0]) + 400 * KB]
        blob = streams[0].ljust(starts[1], b"x") + streams[1]
        blob = blob.ljust(starts[2], b"x") + streams[2]
        with inflating(blob + bytes(8)) as inflater:
            for number in (0, 1, 2, 0, 2, 1):
                inflater.begin(starts[number])
                assert inflater.position == starts[number]
                assert drained(inflater) == plains[number]

    @pytest.mark.parametrize("size", [0, 1, 100, 5000])
    def test_a_stream_that_is_cut_off(self, size: int) -> None:
        with inflating(deflated(PLAIN)[:size]) as inflater, pytest.raises(ImageError, match=f"compressed byte {size}"):
            drained(inflater)

    @pytest.mark.parametrize(
        "stream",
        [Bits().put(0b111, 3), Bits().put(1, 3).put(0, 5).put(0, 32), Bits().put(0b011, 3).code(1, 7).code(0, 5)],
    )
    def test_a_stream_that_is_damaged(self, stream: Bits) -> None:
        with (
            inflating(stream.done() + bytes(9)) as inflater,
            pytest.raises(ImageError, match=r"near compressed byte \d: inv"),
        ):
            drained(inflater, blocks=True)

    def test_memory_is_one_buffer_in_and_one_out(self) -> None:
        data = deflated(bytes(64 * MB))
        tracemalloc.start()
        try:
            with inflating(data + bytes(8)) as inflater:
                stop = Stop.FULL
                while stop is not Stop.END:
                    _, stop = inflater.step(MB, blocks=False)
            assert tracemalloc.get_traced_memory()[1] < 4 * MB
        finally:
            tracemalloc.stop()

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise OSError(name)

        monkeypatch.setattr(ctypes, "CDLL", missing)
        deflate._libz.cache_clear()
        with pytest.raises(ClipfsError, match="install zlib1g"), Path("/dev/null").open() as file:
            Inflater(file.fileno(), 0, 0)
        deflate._libz.cache_clear()
