"""Writes spans to the disk cache behind everybody's back: in one thread, of low priority.

Compressing for the disk costs a third of what decoding does, and nobody waits for it. What is yet to be written is
bounded in bytes; who brings more waits until there is room.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import trio

from clipfs.blocks.disk import Claim

# Decoded bytes that may wait to be written: eight spans of usual size.
_BACKLOG = 32 << 20

# As `nice` has it: whoever waits for a read comes first.
_NICE = 10


class Keeper:
    """Belongs to one trio run; `close` when it ends, which writes what is left."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "clipfs-keeper", initializer=_give_way)
        self._backlog = 0
        self._room = trio.Event()

    async def keep(self, claim: Claim, blocks: Sequence[bytes]) -> None:
        """See to it that the span is written and its claim ends; returns when there is room for more."""
        size, token = sum(map(len, blocks)), trio.lowlevel.current_trio_token()
        self._backlog += size

        def written() -> None:
            self._backlog -= size
            # Everybody who waits looks again; whoever waits from now on waits for the next one.
            self._room.set()
            self._room = trio.Event()

        def told(_: Future[None]) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(written)

        try:
            self._pool.submit(claim.keep, blocks).add_done_callback(told)
        except RuntimeError:  # closed
            claim.release()
            return
        while self._backlog > _BACKLOG:
            await self._room.wait()

    def close(self) -> None:
        """Write what is left. Blocks, for a tenth of a second at most."""
        self._pool.shutdown()


def _give_way() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
