"""Gzip spans in pieces, which share a seek point: each alone, and all of them forward."""

from __future__ import annotations

import contextlib
import random
from itertools import groupby

import pytest

from clipfs.compression.codec import Forward, decode
from clipfs.errors import IntegrityError
from clipfs.format.container import Codec, Span
from tests.images import Compression, compress
from tests.streams import KB, MB, checked, member, mixed, prose, scanned

PLAIN = mixed(3 * MB)
WAYS: tuple[Compression, ...] = ("gzip", "pigz", "multi-gzip")


def frames(spans: list[Span]) -> list[list[Span]]:
    return [list(frame) for _, frame in groupby(spans, lambda span: (span.start, span.bit, span.window))]


def all_forward(frame: list[Span], blob: bytes) -> list[bytes]:
    forward, at, found = Forward(Codec.GZIP, frame[0]), frame[0].start, []
    for span in frame:
        found.append(forward.decode(span, blob[at : span.end]))
        at = span.end
    return found


@pytest.mark.parametrize("pieces", [2, 4, 8])
@pytest.mark.parametrize("how", WAYS)
def test_each_decodes_alone(how: Compression, pieces: int) -> None:
    spans = checked(compress(PLAIN, how), PLAIN, 256 * KB, pieces=pieces)
    assert len(spans) >= 3 * MB // (256 * KB) * (pieces - 1) * 0.9
    for frame in frames(spans):
        assert [span.skip for span in frame] == [span.position - frame[0].position for span in frame]
        assert [span.end for span in frame] == sorted(span.end for span in frame)


@pytest.mark.parametrize("how", WAYS)
def test_forward(how: Compression) -> None:
    blob = compress(PLAIN, how)
    for frame in frames(scanned(blob, 256 * KB, pieces=4)[1]):
        found = all_forward(frame, blob)
        assert found == [PLAIN[span.position : span.position + span.length] for span in frame]


@pytest.mark.parametrize("count", range(1, 5))
def test_forward_out_of_a_member_that_ends_within_a_few_bytes(count: int) -> None:
    """Whoever decodes looks ahead, and may have had a member's end when the piece before it was decoded."""
    zeros, more = bytes(count * 4 * KB), b"ab" * 3000
    blob = member(zeros) + member(more)
    spans = scanned(blob, 64 * KB, pieces=16)[1]
    assert len(spans) > count
    assert b"".join(piece for frame in frames(spans) for piece in all_forward(frame, blob)) == zeros + more


def test_the_first_piece_needs_less() -> None:
    blob = compress(prose(6 * MB), "gzip")  # of one kind, so that halves weigh the same
    several = [frame for frame in frames(scanned(blob, 2 * MB, pieces=32)[1]) if len(frame) >= 3]
    assert several
    for frame in several:
        needed = [span.end - span.start for span in frame]
        assert needed[0] < needed[-1] / 2


def test_windows_are_shared() -> None:
    spans = scanned(compress(PLAIN, "gzip"), 256 * KB, pieces=4)[1]
    assert any(span.window for span in spans)
    for frame in frames(spans):
        assert len({id(span.window) for span in frame}) == 1


def test_damage_is_noticed_on_the_way_and_alone() -> None:
    blob = compress(PLAIN, "gzip")
    chance = random.Random(6)
    frame = max(frames(scanned(blob, 512 * KB, pieces=4)[1]), key=len)
    assert len(frame) > 1
    for _ in range(40):
        bad = bytearray(blob)
        bad[chance.randrange(frame[0].start + 1, frame[-1].end - 10)] ^= 1 << chance.randrange(8)
        with pytest.raises(IntegrityError):
            all_forward(frame, bytes(bad))
        # What is skipped is not looked at, but then it makes no difference either.
        with contextlib.suppress(IntegrityError):
            last = frame[-1]
            plain = decode(Codec.GZIP, last, bytes(bad[last.start : last.end]))
            assert plain == PLAIN[last.position : last.position + last.length]


def test_a_piece_out_of_its_order() -> None:
    blob = compress(PLAIN, "gzip")
    first, second, *_ = max(frames(scanned(blob, 512 * KB, pieces=4)[1]), key=len)
    with pytest.raises(IntegrityError):
        Forward(Codec.GZIP, first).decode(second, blob[first.end : second.end])
