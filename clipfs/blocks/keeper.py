"""Looks after the disk cache behind everybody's back: writes spans to it, in one thread.

Compressing for the disk costs as much as decoding does, and nobody waits for it. What is yet to be written can be read
here, and is bounded in bytes. Where more comes than can be compressed, it is written as it is, which takes a quarter of
the time; who brings even more waits until there is room.

The thread's priority is that of the others: one that has to wait for a core keeps the interpreter from all of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import trio

from clipfs.blocks.disk import Claim, DiskCache

log = logging.getLogger(__name__)

# Decoded bytes that may wait to be written: what read-ahead may be ahead, twice.
_BACKLOG = 32 << 20

# With so many, what comes is not compressed. Over 100 MB/s a large file came with 75 MB/s, and with 72 when this was
# 2 MiB.
_BEHIND = 8 << 20

# Seconds to wait for room. A disk may hang, and whoever has the cache's lock may be stopped: then nothing is kept until
# the disk answers again.
_PATIENCE = 10


class Keeper:
    """Belongs to one trio run; `close` when it ends, which writes what is left."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "clipfs-keeper")
        self._backlog = 0
        self._unwritten: dict[bytes, Sequence[bytes]] = {}
        self._room = trio.Event()
        self._hangs = False

    async def keep(self, claim: Claim, blocks: Sequence[bytes]) -> None:
        """See to it that the span is written and its claim ends; returns when there is room for more."""
        if not await self._do(claim.digest, blocks, partial(claim.keep, blocks, compress=self._backlog < _BEHIND)):
            claim.release()

    async def keep_unclaimed(self, cache: DiskCache, digest: bytes, blocks: Sequence[bytes]) -> None:
        """The same for a span that came without being asked for, unless somebody else is at it."""

        compress = self._backlog < _BEHIND

        def keep() -> None:
            claim = None if cache.has(digest) else cache.claim(digest)
            if claim is not None:
                claim.keep(blocks, compress=compress)

        await self._do(digest, blocks, keep)

    def unwritten(self, digest: bytes, number: int) -> bytes | None:
        """Block `number` of a span that is yet to be written. It may be neither in memory nor on the disk."""
        blocks = self._unwritten.get(digest)
        return None if blocks is None or number >= len(blocks) else blocks[number]

    async def _do(self, digest: bytes, blocks: Sequence[bytes], work: Callable[[], None]) -> bool:
        if self._hangs:
            return False
        token, size = trio.lowlevel.current_trio_token(), sum(map(len, blocks))
        self._backlog += size
        self._unwritten[digest] = blocks

        def written() -> None:
            self._backlog -= size
            self._hangs = False
            self._unwritten.pop(digest, None)
            # Everybody who waits looks again; whoever waits from now on waits for the next one.
            self._room.set()
            self._room = trio.Event()

        def told(_: Future[None]) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(written)

        try:
            self._pool.submit(work).add_done_callback(told)
        except RuntimeError:  # closed
            return False
        while self._backlog > _BACKLOG and not self._hangs:
            with trio.move_on_after(_PATIENCE) as patience:
                await self._room.wait()
            # It may have taken the last of it just now.
            if patience.cancelled_caught and self._backlog > _BACKLOG and not self._hangs:
                self._hangs = True
                log.warning("the cache has taken nothing for %d s: it is left alone until it does", _PATIENCE)
        return True

    def close(self) -> None:
        """Write what is left. Blocks, for a tenth of a second at most."""
        self._pool.shutdown()
