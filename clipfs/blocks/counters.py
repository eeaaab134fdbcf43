"""What a mount has done, in numbers that another process can read while it lives and after it died.

The counters are unsigned 64-bit numbers, in the order of `NAMES` and of this machine's byte order, in any buffer; in a
file, one process writes and any may read. There is no lock: each number is whole by itself, and only grows.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Self

from clipfs.errors import ClipfsError

# requests that were answered, bytes in those answers; ranges fetched, compressed bytes in them; requests answered from
# memory at once, those that had to wait; spans decoded; blocks that came from the disk; spans whose bytes were wrong at
# first; compressed bytes that were fetched before anybody asked for them; bytes that spans were decoded to; of the
# requests that had to wait, those that the disk answered and those that a source did; requests that failed; attempts
# at a source that were made again.
NAMES = (
    *("requests", "bytes_served", "fetches", "bytes_fetched", "hits", "misses", "spans_decoded"),
    *("disk_blocks", "spans_refetched", "bytes_ahead", "bytes_decoded", "disk_hits", "source_hits", "failures"),
    "retries",
)

_SIZE = 8 * len(NAMES)


class Counters:
    """Counts into a buffer of at least eight bytes a counter."""

    def __init__(self, buffer: bytearray | mmap.mmap) -> None:
        whole = memoryview(buffer)
        self._numbers = whole[:_SIZE].cast("Q")
        self._buffer = buffer

    @classmethod
    def private(cls) -> Self:
        """Counters that nobody else sees."""
        return cls(bytearray(_SIZE))

    @classmethod
    def create(cls, path: Path) -> Self:
        """Zeros in a new file, for the process that counts; in one that another process has begun, its numbers."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with open(descriptor, "r+b") as file:
                # With room on the disk: whoever counts in a hole of a file dies of it when the disk is full (SIGBUS).
                os.posix_fallocate(descriptor, 0, _SIZE)
                return cls(mmap.mmap(file.fileno(), _SIZE))
        except OSError as error:
            raise ClipfsError(f"cannot keep counters in {path}: {error.strerror}") from error

    @classmethod
    def open(cls, path: Path) -> Self:
        """The counters in an existing file, to read."""
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < _SIZE:
                    raise ClipfsError(f"{path} holds no counters: it is too short")
                return cls(mmap.mmap(file.fileno(), _SIZE, access=mmap.ACCESS_READ))
        except OSError as error:
            raise ClipfsError(f"cannot read counters from {path}: {error.strerror}") from error

    def hit(self, length: int) -> None:
        """A request was answered from memory. On the hot path, so flat."""
        numbers = self._numbers
        numbers[1] += length
        numbers[4] += 1

    def missed(self, length: int, *, tier: str) -> None:
        """A request was answered after waiting; tier: the slowest that it needed, memory, disk or source."""
        numbers = self._numbers
        numbers[1] += length
        numbers[5] += 1
        if tier == "disk":
            numbers[11] += 1
        elif tier == "source":
            numbers[12] += 1

    def failed(self) -> None:
        """A request could not be answered."""
        self._numbers[13] += 1

    def retried(self) -> None:
        """An attempt at a source failed, and another one is made."""
        self._numbers[14] += 1

    def fetched(self, length: int, *, ahead: int = 0) -> None:
        """A range of compressed bytes came; ahead: how many of them before anybody waited for them."""
        self._numbers[2] += 1
        self._numbers[3] += length
        self._numbers[9] += ahead

    def decoded(self, length: int) -> None:
        """A span was decoded to this many bytes and verified."""
        self._numbers[6] += 1
        self._numbers[10] += length

    def from_disk(self, blocks: int) -> None:
        """Blocks came from the disk cache."""
        self._numbers[7] += blocks

    def refetched(self) -> None:
        """A span's bytes were wrong, and are asked for once more."""
        self._numbers[8] += 1

    def asdict(self) -> dict[str, int]:
        """All of them. The first number in the buffer is that of versions that counted requests by themselves."""
        counted = dict(zip(NAMES, self._numbers, strict=True))
        return counted | {"requests": counted["hits"] + counted["misses"]}

    def close(self) -> None:
        """Let go of the buffer, and of the mapping if it is one. Closing again does no harm."""
        self._numbers.release()
        if isinstance(self._buffer, mmap.mmap):
            self._buffer.close()
