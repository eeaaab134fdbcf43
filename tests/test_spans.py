"""Scanning layers of every kind: spans tile what was decoded, and each decodes on its own."""

from __future__ import annotations

import os
import random
import tracemalloc
import zlib
from functools import cache
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from clipfs.compression.codec import MAX_SPAN, detect
from clipfs.compression.spans import Scan, scan
from clipfs.errors import ImageError, SourceError
from clipfs.format.container import SEEK, SPAN, Codec, Span
from tests.images import Compression, compress
from tests.streams import (
    FHCRC,
    KB,
    MB,
    Bits,
    checked,
    deflated,
    member,
    mixed,
    noise,
    program,
    prose,
    scanned,
    stored,
)

COMPRESSIONS: tuple[Compression, ...] = ("none", "gzip", "pigz", "multi-gzip", "zstd", "zstd-frames")
SIZES = (64 * KB, MB, 4 * MB)
# An empty layer that is no archive is told by its size; all others begin with what `detect` knows.
DATA = {
    "empty": b"",
    "a byte": b"x",
    "prose": prose(2 * MB),
    "noise": noise(2 * MB),
    "zeros": bytes(9 * MB),
    "mixed": mixed(6 * MB),
}


@cache
def compressed(data: str, how: Compression) -> bytes:
    return compress(DATA[data], how)


@pytest.mark.parametrize("span_size", SIZES)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("how", COMPRESSIONS)
def test_spans_tile_the_layer_and_each_decodes_alone(how: Compression, data: str, span_size: int) -> None:
    blob = compressed(data, how)
    spans = checked(blob, DATA[data], span_size, Codec.RAW if how == "none" else None)
    if how in ("none", "gzip", "pigz", "multi-gzip") and data != "zeros":  # of which a block may hold millions
        # A gzip span ends sooner where that is cheap, but not before it is worth a record.
        least = span_size if how == "none" else span_size // 8
        assert all(span.length >= least for span in spans[:-1])
        assert all(span.skip == 0 and span.length < span_size + 400 * KB for span in spans)


@pytest.mark.parametrize(
    "command",
    [("gzip", "-1"), ("gzip", "-9"), ("pigz",), ("pigz", "-p2", "-i"), ("pigz", "-0"), ("zstd", "-1"), ("zstd", "-19")],
    ids=" ".join,
)
def test_by_real_programs(command: tuple[str, ...]) -> None:
    plain = DATA["mixed"] if command[-1] != "-19" else DATA["mixed"][: 2 * MB]
    assert len(checked(program(*command, "-c", data=plain).stdout, plain, 64 * KB)) >= 2


@pytest.mark.parametrize("level", range(10))
def test_every_level_and_strategy_of_zlib(level: int) -> None:
    plain = DATA["mixed"][: 700 * KB]
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_FIXED):
        assert len(checked(member(plain, deflated(plain, level, strategy)), plain, 64 * KB)) >= 3


@pytest.mark.parametrize("level", range(4))
def test_igzip(level: int) -> None:
    """At level 0 it writes one block however long the data is, so that spans have to skip."""
    plain = DATA["mixed"]
    encoder = isal_zlib.compressobj(level, wbits=31)
    spans = checked(encoder.compress(plain) + encoder.flush(), plain, MB // 4)
    assert (max(span.skip for span in spans) > 0) == (level == 0)


@pytest.mark.parametrize("plain", [prose(20 * KB), bytes(5000), b"aab" * 3000, mixed(50 * KB)], ids=len)
def test_spans_that_end_inside_a_block(plain: bytes) -> None:
    """Decoders look ahead, isal several short codes at once: a span must hold what it takes to decode it."""
    for stream in (isal_zlib.compress(plain, 0, -15), deflated(plain, 9, zlib.Z_HUFFMAN_ONLY)):
        for span_size in range(len(plain) // 200, len(plain) // 200 + 20):
            spans = checked(member(plain, stream), plain, span_size)
            assert any(span.skip for span in spans)


def test_what_a_decoder_sees_ahead_may_refer_to_the_window() -> None:
    """It fails there and then, whether that output is wanted or not. So the window must hold that too."""
    plain = bytes(random.Random(3).choices(range(20), k=2000))
    blob = member(plain, deflated(plain, 8, zlib.Z_FIXED, flush=zlib.Z_PARTIAL_FLUSH, every=100))
    for span_size in (1, 2, 3, 5):
        checked(blob, plain, span_size)


@pytest.mark.parametrize("flush", [zlib.Z_PARTIAL_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_BLOCK])
@pytest.mark.parametrize("every", [997, 64 * KB])
def test_flush_points(flush: int, every: int) -> None:
    plain = DATA["mixed"][: 600 * KB]
    checked(member(plain, deflated(plain, flush=flush, every=every)), plain, 64 * KB)


def block_type(blob: bytes, span: Span) -> int:
    """How the deflate block that a span begins with is stored: 0 stored, 1 fixed codes, 2 dynamic ones."""
    return (int.from_bytes(blob[span.start : span.start + 2], "little") >> span.bit >> 1) & 3


def test_spans_begin_at_every_bit_and_with_every_kind_of_block() -> None:
    """`checked` decodes them. Stored blocks are what goes wrong where bits are shifted, pigz's sync markers too."""
    met: set[tuple[int, int]] = set()
    plain = DATA["mixed"]
    for stream in (deflated(plain), deflated(plain, 6, zlib.Z_FIXED), deflated(plain, flush=zlib.Z_BLOCK, every=5000)):
        blob = member(plain, stream)
        met |= {(span.bit, block_type(blob, span)) for span in checked(blob, plain, 16 * KB)}
    assert met >= {(bit, kind) for bit in range(8) for kind in (0, 1, 2)}


def test_a_span_may_begin_with_a_sync_marker() -> None:
    pieces = [prose(20 * KB, seed) for seed in range(40)]
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    stream = b"".join(deflate.compress(piece) + deflate.flush(zlib.Z_SYNC_FLUSH) for piece in pieces) + deflate.flush()
    blob = member(b"".join(pieces), stream)
    spans = checked(blob, b"".join(pieces), 20 * KB)
    # Three bits and padding to a whole byte, then the empty block's lengths.
    markers = [s for s in spans if blob[s.start + (s.bit > 5) + 1 :][:4] == b"\0\0\xff\xff" and not block_type(blob, s)]
    assert len({span.bit for span in markers}) > 4


def test_the_farthest_byte_that_a_block_can_refer_to() -> None:
    """32,768 bytes back; zlib's own encoder stops 262 bytes short of that, others do not."""
    before = noise(32 * KB)
    stored_block = Bits().put(0, 8).put(0x8000 | 0x7FFF << 16, 32).put(int.from_bytes(before, "little"), 8 * 32 * KB)
    stream = stored_block.put(0b011, 3).code(1, 7).code(29, 5).put(8191, 13).code(0, 7).done()
    spans = checked(member(before + before[:3], stream), before + before[:3], 32 * KB - 1)
    assert spans[1].window.rstrip(b"\0") == before[:3]


HEADERS = {
    "plain": member(b"data"),
    "name": member(b"data", name=b"layer.tar"),
    "long name": member(b"data", name=b"n" * 100_000),
    "comment": member(b"data", comment=b"by hand"),
    "extra": member(b"data", extra=b"\0" * 65535),
    "extra with zeros, name, comment": member(b"data", extra=b"AB\2\0\0\0", name=b"a", comment=b"b"),
    "checksum": member(b"data", flags=FHCRC),
    "all": member(b"data", flags=FHCRC | 1, extra=b"xy\1\0z", name=b"a", comment=b"b"),
    "the longest": member(b"data", flags=FHCRC, extra=b"\0" * 65535, name=b"a" * 60_000),
}


@pytest.mark.parametrize("header", HEADERS)
def test_gzip_headers(header: str) -> None:
    """As the first member, and inside of a span."""
    blob = HEADERS[header]
    checked(blob, b"data")
    checked(member(b"more") + blob + blob, b"moredatadata")
    assert program("gzip", "-dc", data=blob).stdout == b"data", "gzip reads it too"


class TestMembers:
    def test_tiny_and_empty_ones(self) -> None:
        chance = random.Random(1)
        pieces = [noise(chance.choice((0, 0, 1, 7, 3000)), n) for n in range(1000)]
        blob = b"".join(member(piece, name=b"n" * (n % 3)) for n, piece in enumerate(pieces))
        assert len(checked(blob, b"".join(pieces), 64 * KB)) > 5
        checked(blob, b"".join(pieces), 1000)

    @pytest.mark.parametrize("count", [1, 5])
    def test_nothing_but_empty_ones(self, count: int) -> None:
        assert checked(member(b"") * count, b"") == []

    def test_what_decodes_to_nothing_ends_a_span_too(self) -> None:
        """Otherwise a single byte on each side of them would make one reader fetch them all."""
        deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
        start = deflate.compress(b"x") + deflate.flush(zlib.Z_SYNC_FLUSH)
        for blob in (
            member(b"x") + member(b"") * 100_000 + member(b"y"),
            member(b"xy", start + b"\0\0\0\xff\xff" * 400_000 + deflated(b"y")),
        ):
            spans = checked(blob, b"xy", 64 * KB)
            assert sum(span.end - span.start for span in spans) < len(blob) / 2

    @pytest.mark.parametrize("zeros", [1, 9, 511, 3 * MB])
    def test_zeros_behind_the_last_one_are_padding(self, zeros: int) -> None:
        blob = member(DATA["prose"]) + bytes(zeros)
        checked(blob, DATA["prose"])
        assert program("gzip", "-t", data=blob).returncode == 0, "gzip agrees"

    @pytest.mark.parametrize(
        "behind", [b"garbage", bytes(100) + b"x", b"\0" + member(b"data"), b"\x1f", b"\x1f\x8b\x08"]
    )
    def test_anything_else_is_refused(self, behind: bytes) -> None:
        """gzip warns of it and ends with 2 (or 1); Go's reader, which is what runtimes unpack with, refuses it."""
        blob = member(DATA["prose"])
        with pytest.raises(ImageError, match=f"compressed byte {len(blob)}: "):
            scanned(blob + behind)
        assert program("gzip", "-t", data=blob + behind, check=False).returncode in (1, 2)


class TestBrokenGzip:
    BLOB = member(DATA["prose"])

    @pytest.mark.parametrize("share", [0, 0.0001, 0.001, 0.3, 0.9])
    def test_cut_off(self, share: float) -> None:
        end = max(2, int(len(self.BLOB) * share))
        with pytest.raises(ImageError, match=r"cut off (inside|at compressed byte \d+)"):
            scanned(self.BLOB[:end])

    @pytest.mark.parametrize("missing", range(1, 9))
    def test_cut_off_in_the_footer(self, missing: int) -> None:
        with pytest.raises(ImageError, match=f"cut off at compressed byte {len(self.BLOB) - 8}"):
            scanned(self.BLOB[:-missing])

    @pytest.mark.parametrize("at", range(1, 9))
    def test_footers_are_checked(self, at: int) -> None:
        for following in (b"", member(b"another")):
            blob = bytearray(self.BLOB + following)
            blob[len(self.BLOB) - at] ^= 0x40
            assert program("gzip", "-t", data=bytes(blob), check=False).returncode == 1
            with pytest.raises(ImageError, match=f"ends at compressed byte {len(self.BLOB) - 8} has a wrong checksum"):
                scanned(bytes(blob))

    def test_a_damaged_byte_anywhere(self) -> None:
        chance = random.Random(2)
        for at in [*range(18), *(chance.randrange(18, len(self.BLOB)) for _ in range(150))]:
            blob = bytearray(self.BLOB)
            blob[at] ^= 1 << chance.randrange(8)
            if 3 < at < 10 or (at == 3 and blob[at] == 1):
                assert scanned(bytes(blob))[0] == DATA["prose"], "time, system and 'is text' mean nothing to us"
            else:
                with pytest.raises(ImageError, match="compressed byte"):
                    scanned(bytes(blob), codec=Codec.GZIP)

    def test_the_sentence_says_where(self) -> None:
        blob = self.BLOB[:300_000] + b"\xff" * 100_000 + self.BLOB[400_000:]
        with pytest.raises(ImageError) as caught:
            scanned(blob)
        (near,) = [int(word.rstrip(":")) for word in str(caught.value).split() if word.rstrip(":").isdigit()]
        assert 299_000 < near < 500_000


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.binary(max_size=3000), st.integers(1, 60), st.integers(0, 9)), max_size=8),
    strategy=st.integers(0, 4),
    span_size=st.integers(1, 50_000),
)
def test_whatever_is_compressed_however(pieces: list[tuple[bytes, int, int]], strategy: int, span_size: int) -> None:
    """Members of random contents, repeated so that blocks refer to what came before."""
    plains = [data * times for data, times, _ in pieces] or [b""]
    levels = [level for *_, level in pieces] or [6]
    blob = b"".join(
        member(plain, deflated(plain, level, strategy, flush=level % 4, every=level and 2000))
        for plain, level in zip(plains, levels, strict=True)
    )
    checked(blob, b"".join(plains), span_size)


class TestScan:
    def test_consumed_adds_up_to_the_layer(self) -> None:
        for how in COMPRESSIONS:
            blob = compressed("mixed", how)
            with stored(blob) as place, scan(*place, Codec.RAW if how == "none" else detect(blob)) as passing:
                counts = [passing.consumed() for _ in passing]
                counts.append(passing.consumed())
            assert sum(counts) == len(blob)
            assert min(counts) >= 0

    def test_can_be_left_half_way(self) -> None:
        with stored(compressed("mixed", "gzip")) as place:
            with scan(*place, Codec.GZIP) as passing:
                next(iter(passing))
            passing.close()
            assert passing.spans == []

    def test_a_file_that_is_not_there(self) -> None:
        with pytest.raises(SourceError, match="cannot read /nowhere/blob: No such file"):
            Scan(Path("/nowhere/blob"), 0, 1, Codec.RAW)

    @pytest.mark.parametrize("codec", Codec)
    def test_a_file_that_is_shorter_than_said(self, codec: Codec, tmp_path: Path) -> None:
        how: dict[Codec, Compression] = {Codec.RAW: "none", Codec.GZIP: "gzip", Codec.ZSTD: "zstd"}
        blob = compressed("mixed", how[codec])
        (tmp_path / "blob").write_bytes(blob)
        with scan(tmp_path / "blob", 0, len(blob) + 100, codec) as passing, pytest.raises(ImageError):
            for _ in passing:
                pass

    @pytest.mark.parametrize("size", [0, -1, MAX_SPAN])
    def test_spans_that_nobody_could_read(self, size: int) -> None:
        with pytest.raises(ValueError, match="span_size must be"):
            Scan(Path("/nowhere/blob"), 0, 1, Codec.RAW, size)


class TestCosts:
    def test_windows_are_small(self) -> None:
        """Of real file contents: a span's record and its window, as they are stored, are at most 0.3 % of the layer."""
        library = sorted(Path(os.__file__).parent.rglob("*.py"))
        plain = b"".join(path.read_bytes() for path in library)[: 20 * MB].ljust(10 * MB, b".")
        blob = program("gzip", "-1", data=plain).stdout
        spans = scanned(blob)[1]
        windows = sum(len(zstandard.compress(span.window, 9)) for span in spans if span.window)
        assert len(spans) >= 2
        assert any(span.window for span in spans)
        seeks = sum(not span.skip for span in spans)
        assert windows + seeks * SEEK.size + len(spans) * SPAN.size < 0.003 * len(blob)

    def test_a_bomb_is_scanned_in_little_memory(self) -> None:
        """A thousandfold, in one block: what is held is a buffer in, one out, and what is not hashed yet."""
        encoder = isal_zlib.compressobj(0, wbits=31)
        bomb = b"".join(encoder.compress(bytes(MB)) for _ in range(200)) + encoder.flush()
        tracemalloc.start()
        try:
            with stored(bomb) as place, scan(*place, Codec.GZIP) as passing:
                total = sum(map(len, passing))
                assert tracemalloc.get_traced_memory()[1] < 24 * MB
        finally:
            tracemalloc.stop()
        assert total == 200 * MB

    def test_no_span_needs_more_than_may_be_fetched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("clipfs.compression.spans.MAX_FETCH", 100 * KB)
        encoder = isal_zlib.compressobj(0, wbits=31)
        with pytest.raises(ImageError, match=r"no place between its bytes 10 and .* compress the layer with another"):
            scanned(encoder.compress(DATA["noise"]) + encoder.flush(), 64 * KB)
