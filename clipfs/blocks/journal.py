"""What was fetched, when and why: a line of JSON an event, for `clipfs explain` and for the trace of a run.

Times are seconds since the mount began. A journal is appended to by the processes of one mount and may be read by any,
while they live and after they died. It is bounded: what a mount does in its first hours is what people ask about.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from clipfs.errors import ClipfsError

# A line has some hundred bytes.
MOST = 16 << 20


class Journal:
    """Writes events to the end of a file, or nowhere. began: when the mount did, by the monotonic clock."""

    def __init__(self, path: Path | None = None, *, began: float | None = None) -> None:
        self._began = time.monotonic() if began is None else began
        self._size = 0
        self._file: BinaryIO | None = None
        if path is not None:
            try:
                self._file = path.open("ab", buffering=0)
                self._size = self._file.tell()
            except OSError as error:
                raise ClipfsError(f"cannot keep a journal in {path}: {error.strerror}") from error

    def fetched(self, layer: int, first: int, last: int, size: int, seconds: float, why: str) -> None:
        """Spans first to last of a layer came, in one range of `size` bytes."""
        self._write(event="fetch", layer=layer, first=first, last=last, bytes=size, took=round(seconds, 4), why=why)

    def refetched(self, layer: int, number: int, reason: str) -> None:
        """A span's bytes were wrong and are fetched again."""
        self._write(event="refetch", layer=layer, first=number, last=number, reason=reason)

    def wanted(self, layer: int, number: int, address: int, tier: str = "source") -> None:
        """A reader needed this span, for the first time in this mount; address: of the data space, what it read.

        tier: where the span was by then, ``memory``, ``disk`` or still at its ``source``.
        """
        self._write(event="want", layer=layer, first=number, last=number, address=address, tier=tier)

    def said(self, kind: str, origin: str, message: str) -> None:
        """The module `origin` had something to say: an attempt that failed, a way around it that was taken."""
        self._write(event="log", kind=kind, origin=origin, message=message)

    def _write(self, **event: Any) -> None:
        if self._file is None or self._size > MOST:
            return
        line = json.dumps({"at": round(time.monotonic() - self._began, 4), **event}).encode() + b"\n"
        try:
            self._size += self._file.write(line)
        except OSError:
            self._file.close()
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The events in a journal. The last line may be half written; what is no event is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ClipfsError(f"cannot read the journal {path}: {error.strerror}") from error
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            yield event
