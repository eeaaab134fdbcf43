"""Blocks in memory: bounded in bytes, the least recently used go first.

It knows keys and bytes, not what they mean. Every method is synchronous, so that between looking and taking nothing
can be evicted.
"""

from __future__ import annotations

from collections import OrderedDict

from clipfs.blocks.plan import Key

# What an entry costs beside its bytes: the key, its numbers, the dictionary's slot and the objects' heads. It counts
# where a hostile index has spans of one byte.
_OVERHEAD = 400


class MemoryCache:
    """Blocks by key. limit: bytes, everything included; zero keeps nothing."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._blocks: OrderedDict[Key, bytes] = OrderedDict()
        self._newest: Key | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: Key) -> bytes | None:
        """The block, now the most recently used."""
        block = self._blocks.get(key)
        # Who reads a block bit by bit comes for the same one again and again.
        if key is not self._newest and block is not None:
            self._blocks.move_to_end(key)
            self._newest = key
        return block

    def put(self, key: Key, block: bytes) -> None:
        """Keep a verified block, and let go of others until all fit."""
        old = self._blocks.pop(key, None)
        if old is not None:
            self.size -= len(old) + _OVERHEAD
        self._blocks[key] = block
        self._newest = key
        self.size += len(block) + _OVERHEAD
        while self.size > self.limit:
            _, oldest = self._blocks.popitem(last=False)
            self.size -= len(oldest) + _OVERHEAD
