"""Which blocks of which spans a read needs. Tables; no I/O."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfs.blocks.plan import BLOCK, Key, Piece, join, plan, runs
from clipfs.errors import FormatError
from tests.streams import noise
from tests.views import Extents, FakeIndex, View

# One layer in spans of 100, 2 blocks and 10, 1 block; then the rest in one.
LENGTHS = (100, 2 * BLOCK + 10, BLOCK, 5 * BLOCK)
LAYER = View.raw(noise(sum(LENGTHS)), LENGTHS)
SECOND = 100
THIRD = SECOND + 2 * BLOCK + 10
FOURTH = THIRD + BLOCK


def one(*, extents: Extents | None = None) -> FakeIndex:
    return FakeIndex([LAYER], extents, data_size=1 << 30)


@pytest.mark.parametrize(
    ("address", "length", "pieces"),
    [
        (0, 1, [(0, 1, (0, 0, 0), 0)]),
        (0, 100, [(0, 100, (0, 0, 0), 0)]),
        (99, 2, [(99, 100, (0, 0, 0), 99), (100, 101, (0, 1, 0), 0)]),
        (SECOND + BLOCK - 1, 2, [(SECOND + BLOCK - 1, SECOND + BLOCK, (0, 1, 0), BLOCK - 1),
                                 (SECOND + BLOCK, SECOND + BLOCK + 1, (0, 1, 1), 0)]),
        (THIRD - 5, 10, [(THIRD - 5, THIRD, (0, 1, 2), 5), (THIRD, THIRD + 5, (0, 2, 0), 0)]),
        (THIRD, BLOCK, [(THIRD, FOURTH, (0, 2, 0), 0)]),
        (FOURTH + BLOCK, 1, [(FOURTH + BLOCK, FOURTH + BLOCK + 1, (0, 3, 1), 0)]),
        (sum(LENGTHS) - 1, 3, [(sum(LENGTHS) - 1, sum(LENGTHS), (0, 3, 4), BLOCK - 1),
                               (sum(LENGTHS), sum(LENGTHS) + 2, None, 0)]),
        (1 << 29, 5, [(1 << 29, (1 << 29) + 5, None, 0)]),
        (7, 0, []),
    ],
)  # fmt: skip
def test_blocks(address: int, length: int, pieces: list[tuple[int, int, Key | None, int]]) -> None:
    assert plan(one(), address, length) == [Piece(*piece) for piece in pieces]


@pytest.mark.parametrize(
    ("extents", "pieces"),
    [
        ([], [(0, 50, None, 0)]),
        ([(0, 0, 10, 50)], [(0, 50, (0, 0, 0), 10)]),
        ([(10, 0, 0, 5)], [(0, 10, None, 0), (10, 15, (0, 0, 0), 0), (15, 50, None, 0)]),
        ([(10, 0, 0, 5), (15, 0, 90, 5)], [(0, 10, None, 0), (10, 15, (0, 0, 0), 0), (15, 20, (0, 0, 0), 90),
                                           (20, 50, None, 0)]),
        ([(0, 1, 0, 3), (40, 0, 98, 100)], [(0, 3, (1, 0, 0), 0), (3, 40, None, 0), (40, 42, (0, 0, 0), 98),
                                            (42, 50, (0, 1, 0), 0)]),
    ],
)  # fmt: skip
def test_extents_and_holes(extents: Extents, pieces: list[tuple[int, int, Key | None, int]]) -> None:
    index = FakeIndex([LAYER, View.raw(b"abc")], extents, data_size=1 << 30)
    assert plan(index, 0, 50) == [Piece(*piece) for piece in pieces]


@pytest.mark.parametrize("offset", [sum(LENGTHS), 1 << 40])
def test_a_place_that_no_span_holds(offset: int) -> None:
    with pytest.raises(FormatError, match=f"no span of layer 0 holds its byte {offset}"):
        plan(one(extents=[(0, 0, offset, 10)]), 0, 10)


def test_spans_with_a_gap() -> None:
    layer = View.raw(noise(300), (100,))
    del layer.spans[1]
    with pytest.raises(FormatError, match="no span of layer 0 holds its byte 100"):
        plan(FakeIndex([layer]), 50, 100)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_pieces_stand_for_the_bytes(seed: int) -> None:
    """In order, without gaps, none of them empty, and joined they are what the layers hold."""
    chance = random.Random(seed)
    layers = [View.raw(noise(300_000, seed), [chance.randint(1, 200_000) for _ in range(9)]) for _ in range(2)]
    extents, at = [], 0
    for _ in range(chance.randint(0, 12)):
        at += chance.choice((0, 1, 4096, chance.randint(0, 100_000)))
        length = chance.choice((1, 100, BLOCK, chance.randint(1, 200_000)))
        extents.append((at, chance.randrange(2), chance.randrange(300_000 - length), length))
        at += length
    index = FakeIndex(layers, extents, data_size=at + 1)
    address, length = chance.randrange(at + 1), chance.randint(1, 300_000)
    pieces = plan(index, address, length)
    assert [piece.start for piece in pieces] == [address, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == address + length
    assert all(piece.stop > piece.start for piece in pieces)
    blocks = {}
    for key in (piece.key for piece in pieces if piece.key is not None):
        position, size = layers[key[0]].spans.bounds(key[1])
        begin = position + key[2] * BLOCK
        blocks[key] = layers[key[0]].plain[begin : min(begin + BLOCK, position + size)]
    assert join(pieces, blocks) == index.expected(address, length)


def test_join_needs_every_block() -> None:
    with pytest.raises(KeyError):
        join(plan(one(), 0, 200), {(0, 0, 0): bytes(100)})


def test_runs_are_of_one_span_and_without_gaps() -> None:
    keys = [(0, 1, 6), (0, 1, 7), (0, 2, 0), (0, 2, 2), (0, 2, 3), (1, 2, 4), (1, 2, 3)]
    assert runs(keys) == [(0, 1, 6, 2), (0, 2, 0, 1), (0, 2, 2, 2), (1, 2, 4, 1), (1, 2, 3, 1)]
    assert runs([]) == []
