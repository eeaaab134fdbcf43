"""Who reads in sequence, and how far ahead of them it pays to be. Pure: no I/O, no clock.

A reader that goes on where it stopped is followed, and what lies before it is wanted as far as it has come, up to a
limit: who has read a MiB in a row is worth another. The data space is in the order of the layers, so this serves one
large file and many small ones alike.
"""

from __future__ import annotations

from dataclasses import dataclass

# Files begin at multiples of this many bytes: who has read one to its end goes on with the next.
_PAGE_SHIFT = 12
_PAGE = 1 << _PAGE_SHIFT

# Bytes in a row that make a reader sequential. Programs are mapped, and read 128 KiB here and there, or twice that.
_ENOUGH = 1 << 20

# Readers that are remembered. More at once are not sequential enough to help.
_STREAMS = 64


@dataclass(slots=True)
class _Stream:
    page: int  # where it goes on
    read: int  # bytes in a row
    ahead: int  # the address up to which everything is on its way
    alone: int = 0  # how many of the bytes had been read when somebody else last read something


class Streams:
    """Follows readers. largest: bytes to be ahead at most; zero turns it off. Half of it if others read as well."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._latest = _Stream(0, 0, 0)
        # The others, by where they go on; those that have not been heard of for longest come first.
        self._streams: dict[int, _Stream] = {}

    def note(self, address: int, length: int) -> tuple[int, int] | None:
        """Somebody reads these bytes: the bytes [start, end) to be fetched now, beyond those named before.

        On the path of every read, so flat.
        """
        stream, end = self._latest, address + length
        if stream.page != address >> _PAGE_SHIFT:
            stream = self._turn_to(address >> _PAGE_SHIFT, end)
        stream.page = end + _PAGE - 1 >> _PAGE_SHIFT
        stream.read += length
        if stream.read < _ENOUGH:
            return None
        window = min(stream.read, self._largest, self._largest // 2 + stream.read - stream.alone)
        # Asked for in halves of a window, so that ranges are long.
        if stream.ahead > end + window // 2:
            return None
        start, stream.ahead = max(stream.ahead, end), end + window
        return (start, stream.ahead) if start < stream.ahead else None

    def _turn_to(self, page: int, end: int) -> _Stream:
        """The reader that goes on at `page`, or a new one."""
        self._streams.pop(self._latest.page, None)
        self._streams[self._latest.page] = self._latest
        found = self._streams.pop(page, None)
        self._latest = found or _Stream(page, 0, end)
        self._latest.alone = self._latest.read
        if len(self._streams) >= _STREAMS:
            del self._streams[next(iter(self._streams))]
        return self._latest
