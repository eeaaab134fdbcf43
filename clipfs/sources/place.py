"""Something that has a packed clip, and ranges of it: here a file of this machine, in `web` one on a server.

A place knows the header of a clip, and nothing of what the ranges mean.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

import trio

from clipfs.errors import SourceError
from clipfs.format.container import HEADER_SIZE, Header
from clipfs.sources.base import PIECE, Sink


def is_url(name: str) -> bool:
    """Whether `name` is where a web server has something, and neither a file nor an image."""
    return name.lower().startswith(("https://", "http://"))


class ReplacedError(Exception):
    """The place has something else now."""


class Place(ABC):
    """Something that has a packed clip. `name` is for sentences, and has no secrets in it."""

    name: str

    @abstractmethod
    async def header(self) -> Header:
        """The header of what is there now. Ranges are of the same, from here on."""

    async def read(self, start: int, end: int) -> bytes:
        """Exactly these bytes of it. SourceError if they cannot be had, ReplacedError if it is there no more."""
        data = bytearray()
        await self.read_into(start, end, data.extend)
        return bytes(data)

    @abstractmethod
    async def read_into(self, start: int, end: int, sink: Sink) -> None:
        """As `read`, but each piece is given to `sink` when it comes: in order, and once."""

    def distrust(self) -> None:  # noqa: B027 - a file is read in one way only
        """What came last was wrong: take another way to it, if there is one."""

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of it."""


class LocalFile(Place):
    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error

    async def header(self) -> Header:
        """See `Place.header`."""
        size = os.fstat(self._file.fileno()).st_size
        return Header.parse(await self.read(0, min(size, HEADER_SIZE)), self.name, size)

    async def read(self, start: int, end: int) -> bytes:
        """See `Place.read`."""
        data = await trio.to_thread.run_sync(self._read, start, end)
        if len(data) != end - start:
            raise SourceError(f"{self.name} ends before byte {end}; it was cut off since it was opened")
        return data

    async def read_into(self, start: int, end: int, sink: Sink) -> None:
        """See `Place.read_into`."""
        for at in range(start, end, PIECE):
            sink(await self.read(at, min(at + PIECE, end)))

    def _read(self, start: int, end: int) -> bytes:
        data = b""
        try:
            while piece := os.pread(self._file.fileno(), end - start - len(data), start + len(data)):
                data += piece
        except OSError as error:
            raise SourceError(f"cannot read {self.name}: {error.strerror}") from error
        return data

    async def aclose(self) -> None:
        """See `Place.aclose`."""
        self._file.close()
