"""Files of the cache that are kept open, to spare opening and checking them for every block."""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections import OrderedDict
from pathlib import Path

from clipfs.blocks.store import Entry, WouldWaitError, opened, place

# Opening a file takes four turns of a cold disk, a read from an open one takes one. What another process evicts takes
# its room until it is closed here, so they are so few that they cannot have more than a share of the cache's limit; nor
# of the descriptors that this process may have.
_OPEN, _OPEN_SHARE, _OPEN_BYTES, _DESCRIPTORS_SHARE = 4096, 0.04, 256 << 10, 0.5

# A file's time says when it was last of use; renewing it more often than this (seconds) only costs time.
_RENEWAL = 60


class OpenFiles:
    """Open files by digest, the least recently used of too many are closed. Threads may share it.

    directory: of the cache. limit: bytes of all of it.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = str(directory)
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = int(max(16, min(_OPEN, limit * _OPEN_SHARE / _OPEN_BYTES, descriptors * _DESCRIPTORS_SHARE)))
        self._lock = threading.Lock()
        self._open: OrderedDict[bytes, tuple[Entry, float]] = OrderedDict()

    def get(self, digest: bytes, wait: bool, *, whole: bool = False) -> Entry | None:
        """The file of a span, None if there is none. WouldWaitError if not `wait` and the disk is needed. whole: as
        `Entry` has it."""
        now = time.monotonic()
        with self._lock:
            entry, due = self._open.get(digest, (None, 0.0))
            if entry is not None:
                self._open.move_to_end(digest)
        if entry is not None and now < due:
            return entry
        if not wait:
            raise WouldWaitError
        if entry is None or not entry.there:
            try:
                entry = Entry(opened(self.name(digest)), digest, whole=whole)
            except FileNotFoundError:
                self.forget(digest)
                return None
        with contextlib.suppress(OSError):
            entry.touch()
        with self._lock:
            self._open[digest] = entry, now + _RENEWAL
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        return entry

    def forget(self, digest: bytes) -> None:
        """It is there no more."""
        with self._lock:
            self._open.pop(digest, None)

    def name(self, digest: bytes) -> str:
        """Where the file of a span is."""
        return place(self._directory, digest)
