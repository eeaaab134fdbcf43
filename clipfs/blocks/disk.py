"""Verified blocks on disk: a directory that all mounts of a user share, bounded in bytes, least recently used first.

A span is a file named after the SHA-256 of its decoded bytes, so that images share what they have in common, and after
the version of such files: those of another are nobody's here, and go when there is no room for them. It is written
aside, as ``NAME.part``, and renamed. Whoever fetches a span holds its lock, so that of all processes that miss it one
fetches it and the others wait.

The cache is an aid: whatever goes wrong with the disk is said once, and then bytes are served without it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from clipfs.blocks.locks import SpanLocks
from clipfs.blocks.opened import OpenFiles
from clipfs.blocks.store import SUFFIX, DamagedError, Entry, WouldWaitError, opened, pack

log = logging.getLogger(__name__)

# Without a limit given: this share of the disk that the cache is on.
_SHARE = 0.10

# Eviction goes down to this share of the limit, so that it happens once for many spans.
_LOW = 0.95

# A part whose writer is gone is removed after this many seconds; it is of no use to anybody, but cheap.
_STALE = 3600

#: A file that each cache has, as soon as it has any.
LOCKS = "locks"

_HEX = "[0-9a-f]"
_NAMES, _PART = f"{_HEX * 2}/{_HEX * 62}", ".part"

# A process counts this much, or a share of the limit, as written before it writes, and more when that is used up.
_COUNTED, _COUNTED_SHARE = 4 << 20, 1 / 256

_TOTAL = struct.Struct("<Q")
_PAGE = 4096
# Who reads so many blocks of a span will read all of them, or all that are left.
_MANY = 3
# Pieces that a system call takes.
_IOV_MAX = 1024


class Stored(NamedTuple):
    """A file of the cache: its span's digest, its size on disk in bytes, when it was last of use (seconds). current: of
    this version, so that it can be read."""

    digest: str
    size: int
    used: float
    path: Path
    current: bool


class Claim:
    """The right, and the duty, to fetch a span: `keep` its blocks or `release` it. Both end it."""

    def __init__(self, cache: DiskCache, digest: bytes, *, locked: bool) -> None:
        """locked: by us; otherwise nothing can be kept."""
        self.digest = digest
        self._cache, self._locked = cache, locked

    def keep(self, blocks: Sequence[bytes], *, compress: bool = True) -> None:
        """Write them, compressed if the cache is, and let others find them. Blocks; for a worker thread."""
        if not self._locked:
            return
        try:
            with self._cache.aided():
                self._cache.write(self.digest, pack(self.digest, blocks, compress=self._cache.compress and compress))
        finally:
            self.release()

    def release(self) -> None:
        """Let the next one try, if nothing was kept."""
        if self._locked:
            self._locked = False
            self._cache.locks.release(self.digest)


class DiskCache:
    """The cache in `directory`. limit: bytes on disk, None for a tenth of the disk. Threads may share it."""

    def __init__(self, directory: Path, limit: int | None = None, *, compress: bool = True) -> None:
        self.directory = directory
        self.compress = compress
        self.dropped = 0
        self._complained = False
        self.limit = 0
        with self.aided():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            room = os.statvfs(directory)
            self.limit = int(room.f_blocks * room.f_frsize * _SHARE) if limit is None else limit
        self.files = OpenFiles(directory, self.limit)
        self.locks = SpanLocks(directory / LOCKS)
        self._counting = threading.Lock()
        self._counted = 0  # bytes that this process may write before it counts again

    # --- reading

    def read(self, digest: bytes, first: int, count: int, *, wait: bool = True) -> list[bytes]:
        """So many blocks of a span, from `first` on; none if not all are here.

        WouldWaitError if not `wait` and the disk is needed.
        """
        try:
            entry = self.files.get(digest, wait, whole=count >= _MANY)
            return [] if entry is None else entry.read(first, count, wait=wait)
        except DamagedError:
            log.warning("dropped %s from the cache: it is damaged", self._path(digest))
            self.dropped += 1
            self._remove(digest)
        except OSError as error:
            self._complain(error)
        return []

    def has(self, digest: bytes) -> bool:
        """Is the span here? Whether its file is good shows when it is read: this is asked of all that an image has."""
        return os.access(self.files.name(digest), os.F_OK)

    def remove(self, digest: bytes) -> None:
        """Remove a file. Its span is fetched again as if it had never been here. OSError if it stays."""
        self.files.forget(digest)
        # It is counted on, until the next eviction counts anew: others may hold the total for long.
        self._path(digest).unlink(missing_ok=True)

    def _remove(self, digest: bytes) -> None:
        with contextlib.suppress(OSError):
            self.remove(digest)

    # --- fetching

    def claim(self, digest: bytes) -> Claim | None:
        """Take a span upon oneself; None if another process, or another task, has done so and still is at it."""
        if not self.limit:
            return Claim(self, digest, locked=False)
        try:
            return Claim(self, digest, locked=True) if self.locks.take(digest) else None
        except OSError as error:
            self._complain(error)
            return Claim(self, digest, locked=False)

    def wait(self, digest: bytes) -> None:
        """Return when whoever has claimed the span is done with it, one way or another. Blocks; for a worker thread."""
        with contextlib.suppress(OSError):
            self.locks.wait(digest)

    def write(self, digest: bytes, pieces: Sequence[bytes]) -> None:
        """Make a file of the cache, for who holds the span's lock; unless it is too large for that. OSError if the disk
        does not take it, of which nothing is left then."""
        size = _on_disk(sum(map(len, pieces)))
        if size > self.limit // 2:
            return  # It would push out most of what is here, or does not fit at all.
        name = self.files.name(digest)
        part = name + _PART
        self._count(size)
        try:
            try:
                _write(part, pieces)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                # Others have filled the disk. Giving up as much as this needs is fair, trying twice would not be.
                with self._total() as total:
                    total[0] = self._evict(self.limit, least=2 * size) + size
                _write(part, pieces)
            os.rename(part, name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise

    def _count(self, size: int) -> None:
        """So many bytes will be written. They are counted before they can be found: a process that is killed leaves the
        total too high, never too low, and the next eviction counts anew."""
        with self._counting:
            if size > self._counted:
                more = max(size, min(_COUNTED, int(self.limit * _COUNTED_SHARE)))
                with self._total() as total:
                    total[0] += more
                    if total[0] > self.limit:
                        total[0] = self._evict(int(self.limit * _LOW) - more) + more
                self._counted += more
            self._counted -= size

    # --- keeping house

    def stored(self) -> Iterator[Stored]:
        """What is here, in no particular order."""
        for path in self.directory.glob(f"{_NAMES}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.suffix != _PART:
                    found = path.stat()
                    yield Stored(
                        _digest(path), _on_disk(found.st_size), found.st_mtime, path, current=path.suffix == SUFFIX
                    )

    def verify(self, digest: str) -> bool:
        """Read a span whole. False if it is damaged."""
        name, hasher = bytes.fromhex(digest), hashlib.sha256()
        try:
            # Not by `files`, for looking after a span is no use of it.
            entry = Entry(opened(self.files.name(name)), name)
            for number in range(len(entry)):
                hasher.update(entry.read(number, 1, wait=True)[0])
            return hasher.digest() == name
        except FileNotFoundError:
            return True  # evicted a moment ago, or there for another version
        except (DamagedError, OSError):
            return False  # what cannot be read is of no more use than what is wrong

    def trim(self, limit: int, *, stale: float = _STALE) -> int:
        """Evict until `limit` bytes are left, and remove what dead writers left `stale` seconds ago or earlier. Returns
        the bytes that are left."""
        now = time.time()
        for part in self.directory.glob(f"{_NAMES}*{_PART}"):
            with contextlib.suppress(OSError):
                if now - part.stat().st_mtime >= stale:
                    claim = self.claim(bytes.fromhex(_digest(part)))
                    if claim is not None:
                        try:
                            part.unlink()
                        finally:
                            claim.release()
        # Twice: whoever keeps something meanwhile, or ends, waits for the lock, and only the first time takes long.
        self._evict(limit)
        with self._total() as total:
            total[0] = self._evict(limit)
            return total[0]

    def _evict(self, target: int, *, least: int = 0) -> int:
        """Remove the least recently used, `least` bytes or more, until `target` bytes are left. Returns what is left,
        counted anew."""
        now = time.time()
        # What was used in the future was so before the clock was set back.
        stored = sorted(self.stored(), key=lambda each: each.used if each.used <= now else 0.0)
        left = sum(each.size for each in stored)
        target = min(target, left - least)
        for each in stored:
            if left <= target:
                break
            with contextlib.suppress(FileNotFoundError):
                each.path.unlink()
            self.files.forget(bytes.fromhex(each.digest))
            left -= each.size
        return left

    @contextlib.contextmanager
    def _total(self) -> Iterator[list[int]]:
        """The bytes on disk, as a list of one number, locked against other processes until the block ends."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(self.directory / "total", flags, 0o600), "r+b", 0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            known = file.read(_TOTAL.size)
            total = [_TOTAL.unpack(known)[0] if len(known) == _TOTAL.size else sum(each.size for each in self.stored())]
            yield total
            os.pwrite(file.fileno(), _TOTAL.pack(max(0, total[0])), 0)

    @contextlib.contextmanager
    def aided(self) -> Iterator[None]:
        """Around what the cache can do without: an OSError is said once and goes no further."""
        try:
            yield
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            log.warning("the cache in %s is of limited use now: %s", self.directory, error.strerror)

    def _path(self, digest: bytes) -> Path:
        return Path(self.files.name(digest))


def _digest(path: Path) -> str:
    """Whose file it is."""
    return path.parent.name + path.name[:62]


def _write(path: str, pieces: Sequence[bytes]) -> None:
    """All in one call, as a rule: between two, this thread would have to wait for its turn in the interpreter."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError:
        # Not the cache's own: whoever has removed that did so on purpose.
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(path), 0o700)
        descriptor = os.open(path, flags, 0o600)
    try:
        written = os.pwritev(descriptor, pieces[:_IOV_MAX], 0)
        if written == sum(map(len, pieces)):
            return
        whole = memoryview(b"".join(pieces))
        while written < len(whole):
            written += os.pwrite(descriptor, whole[written:], written)
    finally:
        os.close(descriptor)


def _on_disk(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


__all__ = ["LOCKS", "Claim", "DiskCache", "Stored", "WouldWaitError"]
