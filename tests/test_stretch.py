"""Where gzip spans begin: early where a window is cheap, at the best place where none is, the same each time."""

from __future__ import annotations

import os
import random
import statistics
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import zstandard
from isal import isal_zlib

from clipfs.compression.ledger import Ledger, Region, Seek
from clipfs.compression.spans import scan
from clipfs.compression.stretch import Stretch
from clipfs.compression.windows import sparse_window, window_cost
from clipfs.format.container import SPAN, Codec, Span
from tests.streams import KB, MB, checked, deflated, member, mixed, noise, prose, scanned

# Each refers to itself a lot and not to the others, as the files of an archive do.
FILES = [prose(90 * KB, seed) + noise(30 * KB, seed) for seed in range(60)]


def seek_points(spans: list[Span]) -> list[Span]:
    return [span for span in spans if not span.skip]


class TestCost:
    def test_of_no_window(self) -> None:
        assert window_cost(b"", 0, b"anything", b"") == 0

    def test_is_about_what_keeping_the_window_takes(self) -> None:
        """Of two windows, the one that is judged to cost twice as much does cost more."""
        plain = b"".join(FILES)
        blob = member(plain, deflated(plain))
        judged = []
        for span in checked(blob, plain, 64 * KB)[1:]:
            data = blob[span.start :]
            window = plain[max(0, span.position - 32 * KB) : span.position]
            kept = len(zstandard.compress(sparse_window(window, span.bit, data)))
            following = plain[span.position : span.position + 8 * KB]
            judged.append((window_cost(window, span.bit, data[: 16 * KB], following), kept))
        pairs = [(one, other) for one in judged for other in judged if one[0] > 2 * other[0] + 50]
        assert len(pairs) > 100
        assert sum(one[1] > other[1] for one, other in pairs) > 0.9 * len(pairs)

    def test_of_a_damaged_stream_is_the_whole_window(self) -> None:
        assert window_cost(bytes(1000), 0, b"\xff" * 100, b"x" * 100) == 1000


class TestSeekPoints:
    def test_are_where_little_refers_to_what_was_before(self) -> None:
        """Their windows are a fraction of what windows are elsewhere."""
        plain = b"".join(FILES)
        blob = member(plain, deflated(plain))
        chosen, everywhere = (
            statistics.mean(len(zstandard.compress(point.window)) for point in seek_points(scanned(blob, size)[1])[1:])
            for size in (2 * MB, 16 * KB)
        )
        assert chosen < everywhere / 3

    def test_cost_a_bounded_share_where_they_are_near(self) -> None:
        """Whoever has them sooner than at the most bytes of a span pays for it, but not more than was set."""
        plain = mixed(24 * MB)
        blob = member(plain, deflated(plain))
        spans = checked(blob, plain, 4 * MB, pieces=8)
        early = 0
        for point, following in pairwise(seek_points(spans)):
            if following.position - point.position < 3 * MB:
                early += 1
                pieces = sum(point.position <= span.position < following.position for span in spans)
                window = len(zstandard.compress(following.window, 9))
                assert window + (pieces - 1) * SPAN.size < 0.006 * (following.start - point.start)
        assert early

    def test_are_nearer_where_there_is_more_to_spend(self, tmp_path: Path) -> None:
        """What is spared elsewhere buys windows, and about as many as it is enough for."""
        plain = prose(24 * MB)
        blob = member(plain, deflated(plain))
        (tmp_path / "blob").write_bytes(blob)
        points, costs = [], []
        for spare in (0, 40_000):
            with scan(tmp_path / "blob", 0, len(blob), Codec.GZIP, 4 * MB, 8) as passing:
                passing.spare(spare)
                assert b"".join(passing) == plain
            points.append(len(seek_points(list(passing.spans))))
            costs.append(sum(len(zstandard.compress(each.window, 9)) for each in passing.spans if not each.skip))
        assert points[0] * 1.5 < points[1]
        assert costs[0] + 20_000 < costs[1] < costs[0] + 80_000

    def test_members_are_free(self) -> None:
        """Nothing refers to what was before a gzip member, so spans begin with one unless a window costs next to it."""
        blob = b"".join(member(file) for file in FILES)
        points = seek_points(checked(blob, b"".join(FILES), MB))
        assert len(points) > 7
        assert sum(not point.window for point in points) > 0.8 * len(points)

    def test_are_the_same_each_time(self) -> None:
        plain = b"".join(FILES)
        blob = member(plain, deflated(plain))
        once = scanned(blob, MB, pieces=4)[1]
        assert all(scanned(blob, MB, pieces=4)[1] == once for _ in range(5))

    def test_pieces_tile_each_stretch(self) -> None:
        plain = b"".join(FILES)
        spans = checked(member(plain, deflated(plain)), plain, 2 * MB, pieces=8)
        for _, pieces in groupby(spans, key=lambda span: (span.start, span.bit)):
            lengths = [piece.length for piece in pieces]
            assert all(256 * KB <= length < 512 * KB for length in lengths[:-1])


def test_tiny_blocks_are_held_in_little_memory(tmp_path: Path) -> None:
    """Of places that are near to one another few are looked at, for each is held with its window."""
    blob = tmp_path / "blob"
    blob.write_bytes(os.urandom(4 * MB))
    descriptor = os.open(blob, os.O_RDONLY)
    ledger = Ledger(Region(descriptor, 0, 4 * MB))
    chance = random.Random(1)
    looked = 0
    try:
        stretch = Stretch(ledger, MB, 128 * KB)
        for at in range(0, MB - 1000, 10):
            stretch.add(chance.randbytes(10), at + 10)
            if stretch.wants(at + 10, window=True):
                looked += 1
                stretch.place(Seek(at + 10, 0, b"w" * 32 * KB))
            stretch.settle(at + 10)
        stretch.finish()
    finally:
        ledger.close()
        os.close(descriptor)
    assert 4 < looked <= 64


@pytest.mark.parametrize("size", [64 * KB, MB])
def test_where_there_is_no_place_pieces_are_longer(size: int) -> None:
    """One block as long as the layer, as igzip writes at its lowest level."""
    plain = mixed(6 * MB)
    encoder = isal_zlib.compressobj(0, wbits=31)
    spans = checked(encoder.compress(plain) + encoder.flush(), plain, size, pieces=4)
    assert {span.start for span in spans} == {10}
    assert max(span.length for span in spans) >= size // 4 * 4
