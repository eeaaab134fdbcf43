"""A process that loads blocks from the disk cache for a reader: in an interpreter of its own, on a core of its own.

``python -m clipfs.blocks.loader WIRE CHANNEL MEMORY DIRECTORY``. CHANNEL and MEMORY are descriptors: of a socket on
which it is asked, and of memory that both sides see, in slots. A question (`Question`) names runs of blocks and a slot;
the answer (`answered`) has the lengths of the blocks that lie in the slot now, one behind the other. It ends when
nobody is left to ask.

It knows nothing but the files of the cache. What is wrong with one it leaves to who has asked, who will see it, too.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import signal
import socket
import struct
import sys
import threading
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from clipfs.blocks.plan import BLOCK
from clipfs.blocks.store import DamagedError, Entry, opened, place

#: Blocks and runs of a question at most. Read-ahead asks for what 2 MiB consist of, which is 33 blocks or a few more.
BLOCKS, RUNS = 48, 64
#: Bytes of a slot.
SLOT = BLOCKS * BLOCK
#: Bytes of a message at most.
MESSAGE = 1 << 13
#: What is said first.
READY = b"ready"
#: What both sides must agree on: a worker may be older than the loader that is installed by the time it needs one. The
#: first number changes with anything else here, or in what an answer means.
WIRE = f"1.{BLOCK}.{SLOT}"

_HEAD = struct.Struct("<II")
_RUN = struct.Struct("<32sII")

# Lengths and descriptors that are none. The file is not there; or something is wrong, and who asks shall look.
_ABSENT, _UNKNOWN = -1, -2


class Run(NamedTuple):
    """So many blocks of the span with this digest, from `first` on."""

    digest: bytes
    first: int
    blocks: int


class Question(NamedTuple):
    """These runs into that slot."""

    slot: int
    runs: Sequence[Run]

    def to_bytes(self) -> bytes:
        """As it goes over the channel."""
        return _HEAD.pack(self.slot, len(self.runs)) + b"".join(_RUN.pack(*run) for run in self.runs)

    @classmethod
    def of_bytes(cls, message: bytes) -> Question:
        """As it came over the channel."""
        slot, count = _HEAD.unpack_from(message)
        return cls(slot, [Run(*_RUN.unpack_from(message, _HEAD.size + at * _RUN.size)) for at in range(count)])


def answered(message: bytes, memory: memoryview, runs: Sequence[Run]) -> list[list[bytes] | None]:
    """Of each run of a question its blocks, as `DiskCache.read` has them, or None if that shall have a look itself."""
    slot, count = _HEAD.unpack_from(message)
    lengths = struct.unpack_from(f"<{count}i", message, _HEAD.size)
    found: list[list[bytes] | None] = []
    start, at = 0, slot * SLOT
    for run in runs:
        mine = lengths[start : start + run.blocks]
        start += run.blocks
        if len(mine) < run.blocks or _UNKNOWN in mine:
            found.append(None)
        elif _ABSENT in mine:
            found.append([])
        else:
            blocks = []
            for length in mine:
                blocks.append(bytes(memory[at : at + length]))
                at += length
            found.append(blocks)
    return found


def slot_of(message: bytes) -> int:
    """Which slot an answer is about."""
    slot: int = _HEAD.unpack_from(message)[0]
    return slot


class _Loading(NamedTuple):
    """A question whose files are open, and on their way into the page cache. Instead of one, why there is none."""

    question: Question
    files: list[int]


def main() -> int:
    """Answer until nobody asks any more."""
    wire, channel, memory, directory = sys.argv[1:]
    if wire != WIRE:
        return 1
    # What is typed at a terminal is for who has started this, and who is told by the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loads: queue.SimpleQueue[_Loading | None] = queue.SimpleQueue()
    with socket.socket(fileno=int(channel)) as asked, mmap.mmap(int(memory), 0) as shared, memoryview(shared) as slots:
        threading.Thread(target=_receive, args=(asked, directory, loads), daemon=True).start()
        with contextlib.suppress(ConnectionError):
            asked.send(READY)
            while (loading := loads.get()) is not None:
                asked.send(_load(loading, slots))
    return 0


def _receive(asked: socket.socket, directory: str, loads: queue.SimpleQueue[_Loading | None]) -> None:
    """Open what is asked for as soon as it is: a disk that is asked for much at a time has three times the speed."""
    with contextlib.suppress(OSError):
        while message := asked.recv(MESSAGE):
            question = Question.of_bytes(message)
            loads.put(_Loading(question, [_begun(directory, run.digest) for run in question.runs]))
    loads.put(None)


def _begun(directory: str, digest: bytes) -> int:
    """A descriptor of a span's file, which the kernel is reading now, or what to say."""
    try:
        file = opened(place(directory, digest))
    except FileNotFoundError:
        return _ABSENT
    except OSError:
        return _UNKNOWN
    with contextlib.suppress(OSError):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
    return file


def _load(loading: _Loading, slots: memoryview) -> bytes:
    """The answer."""
    slot, runs = loading.question
    at, lengths = slot * SLOT, array("i")
    for run, file in zip(runs, loading.files, strict=True):
        if file < 0:
            lengths.extend([file] * run.blocks)
            continue
        try:
            entry = Entry(file, run.digest)
            with contextlib.suppress(OSError):
                entry.touch()
            blocks = entry.view(run.first, run.blocks, wait=True)
        except (DamagedError, OSError):
            lengths.extend([_UNKNOWN] * run.blocks)
            continue
        for block in blocks:
            slots[at : at + len(block)] = block
            at += len(block)
            lengths.append(len(block))
    return _HEAD.pack(slot, len(lengths)) + lengths.tobytes()


if __name__ == "__main__":
    sys.exit(main())
