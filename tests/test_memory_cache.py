"""Blocks in memory: which of them go, and that they never take more than they may."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clipfs.blocks.cache import MemoryCache


def test_the_least_recently_used_goes_first() -> None:
    cache = MemoryCache(3 * 1500)
    for number in range(3):
        cache.put((0, 0, number), bytes(1000))
    assert cache.get((0, 0, 0)) == bytes(1000)
    cache.put((0, 0, 3), bytes(1000))
    assert [cache.get((0, 0, number)) is not None for number in range(4)] == [True, False, True, True]


def test_a_read_counts_also_when_something_new_has_come_since_the_last_one() -> None:
    cache = MemoryCache(3 * 1500)
    for number in (0, 1):
        cache.put((0, 0, number), bytes(1000))
    cache.get((0, 0, 0))
    cache.put((0, 0, 2), bytes(1000))
    cache.get((0, 0, 0))
    for number in (3, 4):
        cache.put((0, 0, number), bytes(1000))
    assert [cache.get((0, 0, number)) is not None for number in range(5)] == [True, False, False, True, True]


def test_a_block_twice_counts_once() -> None:
    cache = MemoryCache(10_000)
    cache.put((0, 0, 0), bytes(1000))
    before = cache.size
    cache.put((0, 0, 0), b"another")
    assert (cache.get((0, 0, 0)), len(cache), cache.size) == (b"another", 1, before - 993)


@given(limit=st.integers(0, 20_000), puts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9000))))
def test_the_bound_holds(limit: int, puts: list[tuple[int, int]]) -> None:
    """In bytes, with what keeping a block costs beside them: one of nothing is not free."""
    cache = MemoryCache(limit)
    for number, size in puts:
        cache.put((0, number, 0), bytes(size))
        assert cache.size <= limit
        held = [block for at in range(21) if (block := cache.get((0, at, 0))) is not None]
        assert len(held) == len(cache)
        assert sum(map(len, held)) + 100 * len(held) <= cache.size
