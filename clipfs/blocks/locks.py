"""Who fetches which span: locks that all processes with the same cache see, and that end when their holder does.

A lock is a byte of one file, at a place that the span's digest names; the file stays empty. They are open file
description locks (fcntl(2)): the kernel lets go of them when a process dies, and to take one costs a system call, where
a file of its own to lock took a hundred times as long on ext4.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from pathlib import Path

# struct flock: what for, from where, which bytes; nobody's process number.
_FLOCK = struct.Struct("hhqqi0q")

# Places are this many bits of the digest. Two spans that share one keep each other waiting, and nothing else.
_PLACE = struct.Struct(">q")
_MASK = (1 << 62) - 1


class SpanLocks:
    """Locks in the file `path`, which is made with the first. Threads may share them. OSError if there can be none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._held: set[bytes] = set()
        self._guard = threading.Lock()

    def __del__(self) -> None:
        self._close()

    def take(self, digest: bytes) -> bool:
        """Hold the lock of a span. False if somebody holds it, in this process or in another."""
        with self._guard:
            if digest in self._held:
                return False
            if self._descriptor < 0:
                self._descriptor = self._open()
            try:
                fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, digest))
                self._held.add(digest)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            finally:
                if not self._held:
                    self._close()
            return digest in self._held

    def release(self, digest: bytes) -> None:
        """Let go of a lock that is held here."""
        with self._guard:
            self._held.remove(digest)
            if self._held:
                fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, digest))
            else:
                self._close()

    def wait(self, digest: bytes) -> None:
        """Return when nobody holds the lock. Blocks; for a worker thread."""
        # With a description of its own: the locks of one do not keep each other waiting.
        descriptor = self._open()
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _flock(fcntl.F_RDLCK, digest))
        finally:
            os.close(descriptor)

    def _close(self) -> None:
        """As long as it is open, nobody can make the file system read-only."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _flock(kind: int, digest: bytes) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, _PLACE.unpack_from(digest)[0] & _MASK, 1, 0)
