"""zstd layers: single frames and many, frames that are skipped, checksums, windows; damage; memory."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfs.compression.codec import Forward, decode
from clipfs.compression.spans import scan
from clipfs.errors import ImageError, IntegrityError
from clipfs.format.container import Codec, Span
from tests.streams import KB, MB, checked, mixed, noise, program, prose, scanned, stored

PLAIN = mixed(6 * MB)
MAGIC = b"\x28\xb5\x2f\xfd"


def frame(data: bytes, write_checksum: bool = False) -> bytes:
    """A frame."""
    return zstandard.ZstdCompressor(level=3, write_checksum=write_checksum).compress(data)


def streamed(data: bytes, every: int, write_checksum: bool = False) -> bytes:
    """A frame whose header does not say how long its content is, flushed after every so many bytes."""
    stream = zstandard.ZstdCompressor(level=1, write_checksum=write_checksum).compressobj()
    pieces = []
    for at in range(0, len(data), every):
        pieces += [stream.compress(data[at : at + every]), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join(pieces) + stream.flush()


def skippable(data: bytes, number: int = 0) -> bytes:
    return bytes([0x50 + number]) + b"\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


def block(data: bytes, *, last: bool = False, kind: int = 0, size: int | None = None) -> bytes:
    header = (len(data) if size is None else size) << 3 | kind << 1 | last
    return header.to_bytes(3, "little") + data


def by_hand(*blocks: bytes, window: int = 0x50) -> bytes:
    """A frame of these blocks; no size, no checksum, and a window of 1 MiB unless said otherwise."""
    return MAGIC + bytes([0, window]) + b"".join(blocks)


def many(data: bytes, piece: int, make: Callable[[bytes], bytes] = frame) -> bytes:
    return b"".join(make(data[at : at + piece]) for at in range(0, len(data), piece))


STREAMS: dict[str, bytes] = {
    "one frame": frame(PLAIN),
    "with a checksum": frame(PLAIN, write_checksum=True),
    "without a size": streamed(PLAIN, MB),
    "without a size, with a checksum": streamed(PLAIN, 700 * KB, write_checksum=True),
    "flushed often": streamed(PLAIN, 5000),
    "frames of 100 KB": many(PLAIN, 100_000, lambda data: frame(data, write_checksum=True)),
    "frames of 1 KB": many(PLAIN, 1000),
    "frames without a size": many(PLAIN, 300_000, lambda data: streamed(data, 70_000)),
    "empty frames between": many(PLAIN, MB, lambda data: frame(b"") + frame(data) + frame(b"") * 3),
    "skippable frames": skippable(b"first") + many(PLAIN, MB, lambda data: frame(data) + skippable(bytes(999), 15)),
    "long and short ones": frame(PLAIN[:100]) + frame(PLAIN[100 : 4 * MB]) + many(PLAIN[4 * MB :], 9999),
}


@pytest.mark.parametrize("span_size", [64 * KB, MB, 4 * MB])
@pytest.mark.parametrize("name", STREAMS)
def test_spans_of(name: str, span_size: int) -> None:
    spans = checked(STREAMS[name], PLAIN, span_size)
    assert all(span.bit == 0 and span.window == b"" for span in spans)
    if name.startswith("frames"):
        assert all(span.skip == 0 for span in spans), "each begins at a frame of its own"


@pytest.mark.parametrize("blob", [frame(b""), frame(b"") * 9, skippable(b""), skippable(b"x") + frame(b"")])
def test_empty_layers(blob: bytes) -> None:
    assert checked(blob, b"") == []


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.binary(max_size=2000), st.integers(1, 100)), max_size=6),
    sized=st.booleans(),
    span_size=st.integers(1, 60_000),
)
def test_whatever_is_compressed(pieces: list[tuple[bytes, int]], sized: bool, span_size: int) -> None:
    plains = [data * times for data, times in pieces] or [b""]
    blob = b"".join(frame(data) if sized else streamed(data, 1 + len(data) // 3) for data in plains)
    checked(blob, b"".join(plains), span_size)


def test_what_decodes_to_nothing_ends_a_span_too() -> None:
    for between in (frame(b"") * 50_000, skippable(bytes(1000)) * 500):
        blob = frame(b"x") + between + frame(b"y")
        spans = checked(blob, b"xy", 64 * KB)
        assert sum(span.end - span.start for span in spans) < len(blob) / 2


class TestWindows:
    def test_far_back(self) -> None:
        """The second half of 18 MB is the first once more, 9 MB back."""
        plain = noise(9 * MB) * 2
        parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=25, enable_ldm=True)
        blob = zstandard.ZstdCompressor(compression_params=parameters).compress(plain)
        assert len(blob) < 10 * MB
        assert len(checked(blob, plain, MB)) >= 4

    @pytest.mark.parametrize("command", [("zstd", "--long=27"), ("zstd", "--ultra", "-22")], ids=" ".join)
    def test_what_the_program_makes(self, command: tuple[str, ...]) -> None:
        plain = PLAIN[:MB]
        checked(program(*command, "-c", data=plain).stdout, plain, 64 * KB)

    @pytest.mark.parametrize(("window", "size"), [(0x90, 256), (0x89, 144), (0xA8, 2048)])
    def test_larger_than_128_mib_is_refused(self, window: int, size: int) -> None:
        """As zstd -d does without --memory: who asks for it would make every reader allocate so much."""
        blob = by_hand(block(b"data", last=True), window=window)
        with pytest.raises(
            ImageError, match=f"frame at compressed byte 0 needs a window of {size} MiB.*without --long"
        ):
            scanned(blob)
        with pytest.raises(IntegrityError, match=f"needs a window of {size} MiB"):
            decode(Codec.ZSTD, Span(0, len(blob), 0, 4, bytes(32)), blob)
        assert b"emory" in program("zstd", "-dc", data=blob, check=False).stderr

    def test_128_mib_are_not(self) -> None:
        checked(by_hand(block(b"data", last=True), window=0x88), b"data")

    def test_a_dictionary_is_refused(self) -> None:
        blob = frame(PLAIN[:1000])
        named = MAGIC + bytes([blob[4] | 1]) + b"\x07" + blob[5:]
        with pytest.raises(ImageError, match="compressed byte 0 needs dictionary 7"):
            scanned(named)


def outcome(blob: bytes) -> bytes | str:
    """What a scan decodes, or the sentence that it refuses the blob with."""
    try:
        return scanned(blob, codec=Codec.ZSTD)[0]
    except ImageError as error:
        return str(error)


class TestDamage:
    @pytest.mark.parametrize("name", STREAMS)
    def test_cut_off(self, name: str) -> None:
        blob = STREAMS[name]
        for share in (0.00001, 0.2, 0.7, 0.99999):
            found = outcome(blob[: max(5, int(len(blob) * share))])
            if isinstance(found, str):
                assert "compressed byte" in found
            else:
                assert name not in ("one frame", "without a size"), "only whole frames may go missing unnoticed"
                assert PLAIN.startswith(found)

    def test_a_damaged_byte(self) -> None:
        """With a checksum no flip goes unnoticed by the scan; what does without one is for the layer's digest."""
        chance, blob = random.Random(3), streamed(PLAIN[: 300 * KB], 50_000, write_checksum=True)
        for at in [*range(4, 12), *range(len(blob) - 8, len(blob)), *(chance.randrange(len(blob)) for _ in range(100))]:
            bad = bytearray(blob)
            bad[at] ^= 1 << chance.randrange(8)
            found = outcome(bytes(bad))
            if isinstance(found, str):
                assert "compressed byte" in found
            else:
                assert (at, found) == (5, PLAIN[: 300 * KB]), "all but the size of the window matters"

    @pytest.mark.parametrize(
        ("blob", "sentence"),
        [
            (by_hand(block(b"", last=True, kind=3)), "is damaged"),
            (by_hand(block(b"x", kind=1, size=2 * MB - 1), block(b"", last=True)), "is damaged"),
            (by_hand(block(b"x" * 200_000), block(b"", last=True)), "is damaged"),
            (by_hand(block(b"x")), "is cut off"),
            (by_hand(block(b"x", size=2 * MB - 1, last=True)), "is cut off"),
            (skippable(b"x" * 100)[:50], "skippable frame at compressed byte 0"),
            (frame(b"x") + b"garbage that is no frame", "no zstd frame begins at compressed byte"),
            (frame(b"x") + bytes(100), "no zstd frame begins at compressed byte"),
            (frame(b"x") + MAGIC, "no zstd frame begins at compressed byte"),
            (frame(b"x") + MAGIC[:3], "no zstd frame begins at compressed byte"),
            (MAGIC + bytes([0x08]) + b"\0" * 20, "compressed byte 0"),
        ],
    )
    def test_frames_that_are_wrong(self, blob: bytes, sentence: str) -> None:
        with pytest.raises(ImageError, match=sentence):
            scanned(blob)

    def test_a_bomb(self) -> None:
        """Four bytes for 128 KiB, 256 MiB in all: neither scanning nor decoding a part of it takes memory for it."""
        bomb = by_hand(*[block(b"\0", kind=1, size=128 * KB)] * 2047, block(b"\0", kind=1, size=128 * KB, last=True))
        tracemalloc.start()
        try:
            with stored(bomb) as place, scan(*place, Codec.ZSTD, 64 * KB) as passing:
                total = sum(map(len, passing))
                assert tracemalloc.get_traced_memory()[1] < 24 * MB
            last = passing.spans[-1]
            tracemalloc.reset_peak()
            assert decode(Codec.ZSTD, last, bomb[last.start : last.end]) == bytes(last.length)
            assert tracemalloc.get_traced_memory()[1] < 12 * MB
        finally:
            tracemalloc.stop()
        assert total == 256 * MB

    def test_no_span_needs_more_than_may_be_fetched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("clipfs.compression.spans.MAX_FETCH", 2 * MB)
        nothing = block(b"") * 1_000_000
        with pytest.raises(ImageError, match="zstd stream has no place between its bytes 0 and"):
            scanned(by_hand(block(b"x"), nothing, block(b"y", last=True)))

    def test_a_frame_that_is_too_long_for_an_index_is_told_while_it_is_read(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("clipfs.compression.ledger.MAX_TAKEN", 3 * MB)
        first, second = frame(noise(64 * KB)), frame(noise(8 * MB))
        said = f"at compressed byte {len(first)} has 4 GiB .* `skopeo copy --dest-compress-format"
        with stored(first + second) as place, scan(*place, Codec.ZSTD, 64 * KB) as passing:
            with pytest.raises(ImageError, match=said):
                b"".join(passing)
            assert passing.consumed() < 4 * MB
        checked(many(noise(8 * MB), MB), noise(8 * MB), 64 * KB)


class TestForward:
    """Decoding one span of a long frame after the other, from where the last one ended."""

    def spans(self, name: str) -> list[Span]:
        spans = scanned(STREAMS[name], 64 * KB)[1]
        return [span for span in spans if span.start == 0]

    @pytest.mark.parametrize("name", ["one frame", "with a checksum", "without a size", "flushed often"])
    def test_in_order(self, name: str) -> None:
        blob, forward, at = STREAMS[name], Forward(Codec.ZSTD, Span(0, 0, 0, 0, b"")), 0
        spans = self.spans(name)
        assert len(spans) >= 10
        for span in spans:
            plain = forward.decode(span, blob[at : span.end])
            assert plain == PLAIN[span.position : span.position + span.length]
            at = span.end

    def test_damage(self) -> None:
        blob = STREAMS["with a checksum"]
        chance = random.Random(4)
        for _ in range(60):
            first, second, *_ = self.spans("with a checksum")
            bad = bytearray(blob[: second.end])
            bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
            forward = Forward(Codec.ZSTD, Span(0, 0, 0, 0, b""))
            with pytest.raises(IntegrityError):
                b"".join(
                    forward.decode(span, bytes(bad[at : span.end])) for at, span in ((0, first), (first.end, second))
                )

    def test_a_span_out_of_its_order(self) -> None:
        first, second, *_ = self.spans("one frame")
        with pytest.raises(IntegrityError):
            Forward(Codec.ZSTD, Span(0, 0, 0, 0, b"")).decode(second, STREAMS["one frame"][first.end : second.end])

    def test_a_span_that_is_too_long(self) -> None:
        with pytest.raises(IntegrityError, match="more than any may"):
            Forward(Codec.ZSTD, Span(0, 0, 0, 0, b"")).decode(Span(0, 4, 0, 1 << 40, bytes(32)), b"data")


def test_prose_is_cut_where_frames_end() -> None:
    """Frames are grouped up to the size of a span, and no further."""
    plain = prose(MB)
    spans = checked(many(plain, 10_000), plain, 64 * KB)
    assert {span.length for span in spans[:-1]} == {60_000}
