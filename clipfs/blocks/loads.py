"""Who reads ahead from the disk cache, and much, has it done by a process of its own: a `loader`.

Looking up, checking and decompressing in threads of this process costs those who read their turns in the interpreter,
and the threads theirs. The process is started when it is worth it, and ends when nothing has been asked of it for a
while. It may end, or fail, whenever it likes: then this process does it all by itself.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import trio

from clipfs.blocks.loader import BLOCKS, MESSAGE, READY, RUNS, SLOT, WIRE, Question, Run, answered, slot_of
from clipfs.program import program

log = logging.getLogger(__name__)

# Questions at a time. With so many, a disk is asked for 8 MiB ahead of what is decompressed.
_SLOTS = 4

# Blocks that this process has loaded itself before another one is started, 32 MiB: that takes a tenth of a second of a
# core.
_WORTH = 512

# Seconds without a question after which it ends; and without an answer, after which it is given up.
_PATIENCE = 10

# What of the environment it is to have: how its interpreter finds things and handles memory.
_ITS = ("PYTHON", "MALLOC_", "LD_LIBRARY_PATH", "LD_PRELOAD")

_Found = list[list[bytes] | None]


class _Waiting(NamedTuple):
    runs: Sequence[Run]
    found: _Found
    done: trio.Event


class Loads:
    """The loader process of one reader of the cache in `directory`; `start` gives it the nursery that it lives in."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._nursery: trio.Nursery | None = None
        self._done = 0  # blocks that were loaded for want of another process
        self._begun = False
        self._failed = False
        self._channel: socket.socket | None = None
        self._memory = memoryview(b"")
        # A slot is free again when it has been answered for, whoever waits for that.
        self._give, self._free = trio.open_memory_channel[int](_SLOTS)
        for slot in range(_SLOTS):
            self._give.send_nowait(slot)
        self._waiting: dict[int, _Waiting] = {}

    def start(self, nursery: trio.Nursery | None) -> None:
        """From now on there may be a process; None: no more."""
        self._nursery = nursery

    @property
    def there(self) -> bool:
        """Is there a process to `load`?"""
        return self._channel is not None

    async def load(self, runs: Sequence[Run]) -> _Found:
        """Of each run its blocks, none if they are not all there; None for one that nobody has looked for."""
        found: _Found = []
        for some in _questions(runs):
            found += await self._ask(some)
        return found

    def did(self, blocks: int) -> None:
        """So many had to be loaded here."""
        self._done += blocks
        if self._done >= _WORTH and not self._begun and not self._failed and self._nursery is not None:
            self._begun = True
            self._nursery.start_soon(self._live)

    async def _ask(self, runs: Sequence[Run]) -> _Found:
        nothing: _Found = [None] * len(runs)
        if sum(run.blocks for run in runs) > BLOCKS:
            return nothing
        slot = await self._free.receive()
        if self._channel is None:
            self._give.send_nowait(slot)
            return nothing
        waiting = self._waiting[slot] = _Waiting(runs, [], trio.Event())
        try:
            self._channel.send(Question(slot, runs).to_bytes())
        except OSError:
            self._answer(slot, nothing)
        await waiting.done.wait()
        return waiting.found

    def _answer(self, slot: int, found: _Found) -> None:
        waiting = self._waiting.pop(slot)
        waiting.found.extend(found)
        waiting.done.set()
        self._give.send_nowait(slot)

    # --- the process

    async def _live(self) -> None:
        """From its beginning to its end."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with ours, theirs:
                ours.setblocking(False)
                memory = os.memfd_create("clipfs-loads")
                try:
                    os.ftruncate(memory, _SLOTS * SLOT)
                    with mmap.mmap(memory, 0) as shared, memoryview(shared) as self._memory:
                        await self._serve(ours, theirs, memory)
                finally:
                    os.close(memory)
        except Exception as error:  # reported, and the mount lives on
            trace = None if isinstance(error, OSError) else error
            log.warning("cannot have another process read the cache, this one does: %s", error, exc_info=trace)
            self._failed = True
        finally:
            self._begun, self._done = False, 0

    async def _serve(self, ours: socket.socket, theirs: socket.socket, memory: int) -> None:
        command, environment = program("clipfs.blocks.loader", WIRE, theirs.fileno(), memory, self._directory)
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[theirs.fileno(), memory],
            # It has no use for credentials, and anything else may be one.
            env={name: value for name, value in environment.items() if name.startswith(_ITS)},
            process_group=0,
        )
        try:
            theirs.close()
            self._failed = not await self._hear(ours)
            if self._failed:
                log.warning("the process that reads the cache does not answer: this one reads it from now on")
        finally:
            self._channel = None
            for slot in list(self._waiting):
                self._answer(slot, [None] * len(self._waiting[slot].runs))
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    async def _hear(self, ours: socket.socket) -> bool:
        """Take answers, until it has not been asked for a while. False if it ends before, or does not answer."""
        while True:
            owes, began = self._owes, trio.current_time()
            with trio.move_on_after(_PATIENCE) as patience:
                await trio.lowlevel.wait_readable(ours)
            if patience.cancelled_caught:
                # What was asked meanwhile has its time as well; and so has it if this process stood still, too.
                if owes == self._owes and trio.current_time() - began < 2 * _PATIENCE:
                    return not owes
                continue
            try:
                message = ours.recv(MESSAGE)
            except BlockingIOError:
                continue
            except OSError:
                return False
            if not message:
                return False
            if message == READY:
                self._channel = ours
            else:
                slot = slot_of(message)
                self._answer(slot, answered(message, self._memory, self._waiting[slot].runs))

    @property
    def _owes(self) -> bool:
        """Has it something to say?"""
        return self._channel is None or bool(self._waiting)


def _questions(runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
    """In their order, as many at a time as one may ask for. A run that is too long for that is alone."""
    some: list[Run] = []
    blocks = 0
    for run in runs:
        if some and (blocks + run.blocks > BLOCKS or len(some) >= RUNS):
            yield some
            some, blocks = [], 0
        some.append(run)
        blocks += run.blocks
    if some:
        yield some
