"""A progress line on stderr, when stderr is a terminal; silence otherwise."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

from clipfs.building.builder import Progress, Silent
from clipfs.reports.wording import size

__all__ = ["progress", "size"]

# Redrawing more often than this only costs time: nobody reads faster.
_INTERVAL = 0.1


def progress(stream: TextIO | None = None) -> Progress:
    """What fits the stream: a drawn line for a terminal, nothing for a file."""
    stream = stream or sys.stderr
    return _Line(stream) if stream.isatty() else Silent()


class _Line:
    """One line, redrawn in place, wiped when the step is done. Safe to call from several threads."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._what, self._total, self._done = "", 0, 0
        self._started = self._drawn = 0.0

    def begin(self, what: str, total: int) -> None:
        with self._lock:
            self._what, self._total, self._done = what, total, 0
            self._started = time.monotonic()
            self._draw()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._drawn >= _INTERVAL:
                self._drawn = now
                self._draw()

    def end(self) -> None:
        with self._lock:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _draw(self) -> None:
        share = self._done / self._total if self._total else 0.0
        bar = "█" * int(share * 24) + "░" * (24 - int(share * 24))
        seconds = time.monotonic() - self._started
        rate = f"  {size(self._done / seconds)}/s" if seconds > _INTERVAL else ""
        self._stream.write(f"\r\x1b[K{self._what} {bar} {share:4.0%} of {size(self._total)}{rate}")
        self._stream.flush()
