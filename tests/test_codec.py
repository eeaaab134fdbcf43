"""From fetched bytes to served bytes: what kind they are, and that nothing wrong, too large or endless comes out."""

from __future__ import annotations

import hashlib
import random
import time
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from isal import isal_zlib

from clipfs.compression.codec import HEAD, MAX_SPAN, decode, detect
from clipfs.errors import ImageError, IntegrityError
from clipfs.format.container import Codec, Span
from tests.images import Compression, compress
from tests.streams import KB, MB, Bits, deflated, member, mixed, noise, prose, scanned
from tests.tars import Tar, header

PLAIN = mixed(3 * MB)
TAR = Tar().file("name", b"data").done()


def span_of(plain: bytes, data: bytes, **fields: int | bytes) -> Span:
    """The span that is all of `data`."""
    return replace(Span(0, len(data), 0, len(plain), hashlib.sha256(plain).digest()), **fields)  # type: ignore[arg-type]


class TestDetect:
    @pytest.mark.parametrize(
        ("head", "codec"),
        [
            (b"", Codec.RAW),
            (bytes(HEAD), Codec.RAW),
            (bytes(1), Codec.RAW),
            (TAR, Codec.RAW),
            (header(b"old", magic=bytes(8)), Codec.RAW),
            (header(b"\xff\xfe", checksum=int(header(b"\xff\xfe")[148:154], 8) - 2 * 256), Codec.RAW),
            (compress(TAR, "gzip"), Codec.GZIP),
            (compress(TAR, "pigz"), Codec.GZIP),
            (compress(TAR, "zstd"), Codec.ZSTD),
            (b"\x50\x2a\x4d\x18" + bytes(4), Codec.ZSTD),
            (b"\x5f\x2a\x4d\x18" + bytes(4), Codec.ZSTD),
            (b"\x1f\x8b", Codec.GZIP),
        ],
    )
    def test_content_decides(self, head: bytes, codec: Codec) -> None:
        assert detect(head[:HEAD]) is codec

    @pytest.mark.parametrize(
        ("head", "name"),
        [(b"\xfd7zXZ\0", "xz"), (b"BZh91AY", "bzip2"), (b"\x04\x22\x4d\x18", "lz4"), (b"LZIP", "lzip")],
    )
    def test_what_oci_does_not_know(self, head: bytes, name: str) -> None:
        with pytest.raises(ImageError, match=f"compressed with {name}.*skopeo copy"):
            detect(head.ljust(HEAD, b"\1"))

    @pytest.mark.parametrize(
        "head",
        [
            noise(HEAD),
            b"PK\3\4" + noise(HEAD),
            b"\x1f",
            b"\x28\xb5\x2f",
            b"#!/bin/sh\n",
            TAR[:511],
            header(b"name", checksum=1),
            TAR[:148] + b"-1______" + TAR[156:],
        ],
    )
    def test_what_is_no_layer(self, head: bytes) -> None:
        with pytest.raises(ImageError, match="neither a tar archive nor gzip nor zstd"):
            detect(head[:HEAD])


class TestHostileSpans:
    """Fields that no scan writes."""

    DATA = deflated(PLAIN[: 100 * KB])
    GOOD = span_of(PLAIN[: 100 * KB], DATA)

    def test_the_good_one(self) -> None:
        assert decode(Codec.GZIP, self.GOOD, self.DATA) == PLAIN[: 100 * KB]
        assert decode(Codec.GZIP, self.GOOD, memoryview(self.DATA)) == PLAIN[: 100 * KB]

    @pytest.mark.parametrize("codec", Codec)
    @pytest.mark.parametrize(
        "fields",
        [
            {"bit": 1},
            {"bit": 7},
            {"bit": 8},
            {"bit": 255},
            {"bit": -1},
            {"skip": 1},
            {"skip": (1 << 64) - 1},
            {"length": 0},
            {"length": 1},
            {"length": 100 * KB + 1},
            {"length": MAX_SPAN},
            {"length": MAX_SPAN + 1},
            {"length": (1 << 32) - 1},
            {"start": 1},
            {"start": 1 << 60},
            {"start": 10, "end": 0},
            {"end": 0},
            {"digest": bytes(32)},
            {"digest": b""},
        ],
        ids=str,
    )
    def test_bad_ones(self, codec: Codec, fields: dict[str, int | bytes]) -> None:
        began = time.process_time()
        with pytest.raises(IntegrityError, match=r"bytes \d+ to \d+"):
            decode(codec, replace(self.GOOD, **fields), self.DATA)  # type: ignore[arg-type]
        assert time.process_time() - began < 1

    @pytest.mark.parametrize("codec", Codec)
    def test_no_bytes_at_all(self, codec: Codec) -> None:
        for bit in range(8 if codec is Codec.GZIP else 1):
            with pytest.raises(IntegrityError):
                decode(codec, span_of(b"x", b"", bit=bit), b"")

    @pytest.mark.parametrize("size", [10, 100, 32 * KB, 32 * KB + 1, MB])
    def test_windows_of_any_size(self, size: int) -> None:
        """Only the last 32 KiB of one can be referred to; what refers further is refused."""
        window = noise(size)
        encoder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, 0, window[-32 * KB :])
        plain = window[-200:] + b"and more"
        data = encoder.compress(plain) + encoder.flush()
        assert decode(Codec.GZIP, span_of(plain, data, window=window), data) == plain
        for other in (b"", bytes(size)):
            with pytest.raises(IntegrityError):
                decode(Codec.GZIP, span_of(plain, data, window=other), data)


COMPRESSIONS: tuple[Compression, ...] = ("none", "gzip", "pigz", "multi-gzip", "zstd", "zstd-frames")


class TestDamage:
    """Whatever came over the wire: the right bytes, or one sentence. Never other bytes, never another exception."""

    @pytest.mark.parametrize("how", COMPRESSIONS)
    def test_a_flipped_bit(self, how: Compression) -> None:
        chance = random.Random(7)
        plain = PLAIN[: 400 * KB]
        blob = compress(plain, how)
        codec = Codec.RAW if how == "none" else detect(blob)
        for span in scanned(blob, 64 * KB, codec)[1]:
            good = blob[span.start : span.end]
            right = plain[span.position : span.position + span.length]
            for at in [0, 1, len(good) - 1, *(chance.randrange(len(good)) for _ in range(40))]:
                bad = bytearray(good)
                bad[at] ^= 1 << chance.randrange(8)
                assert self.outcome(codec, span, bytes(bad)) in (right, None)

    @pytest.mark.parametrize("how", COMPRESSIONS)
    def test_cut_off_or_padded(self, how: Compression) -> None:
        plain = PLAIN[: 400 * KB]
        blob = compress(plain, how)
        codec = Codec.RAW if how == "none" else detect(blob)
        span = scanned(blob, 64 * KB, codec)[1][0]
        good = blob[span.start : span.end]
        for bad in (b"", good[:1], good[: len(good) // 2], good[:-1], good + b"\0", good * 2):
            with pytest.raises(IntegrityError, match=f"{len(good)}|asked for"):
                decode(codec, span, bad)
            if len(bad) < len(good):
                with pytest.raises(IntegrityError):
                    decode(codec, replace(span, end=span.start + len(bad)), bad)

    @pytest.mark.parametrize("codec", [Codec.GZIP, Codec.ZSTD])
    def test_noise(self, codec: Codec) -> None:
        for seed in range(300):
            data = noise(2000, seed)
            head = member(b"x") if codec is Codec.GZIP else compress(b"x", "zstd")[:6]
            for start in (data, head + data, head[10:-8] + data):
                span = span_of(bytes(100_000), start, bit=seed % 8 if codec is Codec.GZIP else 0, window=data[:1000])
                assert self.outcome(codec, span, start) is None

    def outcome(self, codec: Codec, span: Span, data: bytes) -> bytes | None:
        try:
            return decode(codec, span, data)
        except IntegrityError:
            return None


class TestBombs:
    def peak(self, work: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("how", ["gzip", "zstd"])
    def test_output_is_no_longer_than_the_span(self, how: Compression) -> None:
        """A tenth of a MB that is 100 MB, of which the index says that it is one."""
        bomb = compress(bytes(100 * MB), how)
        data = bomb[10:] if how == "gzip" else bomb
        span = span_of(bytes(MB), data)
        assert self.peak(lambda: decode(detect(bomb), span, data)) < 6 * MB

    @pytest.mark.parametrize("how", ["gzip", "zstd"])
    def test_what_is_skipped_is_not_kept(self, how: Compression) -> None:
        bomb = compress(bytes(100 * MB), how)
        data = bomb[10:] if how == "gzip" else bomb
        span = span_of(bytes(MB), data, skip=99 * MB)
        assert self.peak(lambda: decode(detect(bomb), span, data)) < 6 * MB

    def test_members_without_end(self) -> None:
        """What lies behind a member is looked at again and again, but little of it."""
        data = (member(b"", name=b"name") * 100_000 + member(b"x"))[15:]
        began = time.process_time()
        assert decode(Codec.GZIP, span_of(b"x", data), data) == b"x"
        assert time.process_time() - began < 5


LITERALS = [0] * 257
LITERALS[ord("A")] = LITERALS[256] = 1


@pytest.mark.parametrize(
    "stream",
    [
        Bits().dynamic(LITERALS, [0]).code(0, 1).code(1, 1),
        Bits().dynamic(LITERALS, [1]).code(0, 1).code(1, 1),
        Bits().dynamic(LITERALS, [0] * 30).code(0, 1).code(1, 1),
        Bits().dynamic(LITERALS + [0] * 29, [1] + [0] * 29).code(0, 1).code(1, 1),
        Bits().dynamic([*LITERALS[:65], 0, *LITERALS[66:]], [0]).code(0, 1),
        Bits().put(0, 3).put(0, 5).put(0xFFFF0000, 32).put(0b011, 3).code(0x30 + 65, 8).code(0, 7),
        Bits().put(0b010, 3).code(0, 7).put(0b011, 3).code(0x30 + 65, 8).code(2, 7).code(0, 5).code(0, 7),
    ],
)
def test_unusual_blocks_decode_as_with_zlib(stream: Bits) -> None:
    """Codes of one bit or none, empty blocks: what zlib lets an index be made of must be readable afterwards."""
    data = stream.done()
    plain = zlib.decompress(data, -15)
    assert decode(Codec.GZIP, span_of(plain, data), data) == plain
    assert isal_zlib.decompress(data, -15) == plain


def test_a_span_may_begin_at_a_members_header() -> None:
    data = member(b"first", name=b"name") + member(b"second", extra=b"x")
    assert decode(Codec.GZIP, span_of(b"firstsecond", data), data) == b"firstsecond"
    assert decode(Codec.GZIP, span_of(b"second", data, skip=5), data) == b"second"
    with pytest.raises(IntegrityError, match="gzip header"):
        decode(Codec.GZIP, span_of(b"first", data[:9]), data[:9])


def test_spans_are_decoded_as_fast_as_zlib_decodes_the_whole() -> None:
    """isal is nearly twice as fast, which pays for digests and more. Best of three, in one process."""
    plain = prose(12 * MB)
    blob = compress(plain, "gzip")
    spans = scanned(blob)[1]
    assert len(spans) >= 3  # as many as cheap windows make of it
    assert sum(span.length for span in spans) == len(plain)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
        return min(times)

    ours = best(lambda: [decode(Codec.GZIP, span, blob[span.start : span.end]) for span in spans])
    theirs = best(lambda: zlib.decompress(blob, 31))
    assert ours < theirs / 0.8
