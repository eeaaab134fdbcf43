"""A clip that a web server has: ranges of one version of it, and the way of its index to this machine.

Connections and redirects are the business of `transport`, patience is that of `retry`.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Self, TypeVar
from urllib.parse import urlsplit

import trio

from clipfs.errors import FormatError, SourceError, UsageError
from clipfs.format.container import HEADER_SIZE, PACKED, Header, Kind, Section
from clipfs.sources.auth import is_loopback
from clipfs.sources.base import Sink
from clipfs.sources.fetcher import SourceOptions
from clipfs.sources.place import Place, ReplacedError
from clipfs.sources.retry import Deadlines, Server, Transient, Turns, persist
from clipfs.sources.transport import Transport

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

# The index of an image with as many files as are indexed at all (`tree.MAX_INODES`) has 1.2 GB; a server that speaks of
# more shall not fill the disk.
_MAX_INDEX = 1 << 32

# Characters of an address. Few servers take more, and the client takes no more than 65536.
_LONGEST = 1 << 13

# The index part is fetched in ranges of this many bytes, so that memory stays flat.
_PIECE = 8 << 20

# What the transport remembers by: there is but one thing to ask for.
_DATA = "data"

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")


@dataclass(frozen=True, slots=True)
class _Version:
    """What a web server says of one version of a file. unless_replaced: the header that asks for a range of this
    version and no other (RFC 9110 §13.1.5); none if the server gives nothing to go by, then only digests tell."""

    size: int
    unless_replaced: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, response: httpx2.Response, size: int) -> Self:
        tag: str = response.headers.get("ETag", "")
        # A weak tag is for files that mean the same, not for equal bytes.
        value = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")
        return cls(size, {"If-Range": value} if value else {})


class WebFile(Place):
    """A file on a web server, a clip probably. Opens nothing before it is asked. `head` is what its header consists of,
    when that was read."""

    def __init__(self, url: str, options: SourceOptions) -> None:
        try:
            parts = urlsplit(url)
            sound = parts.hostname and (parts.port is None or parts.port > 0) and "@" not in parts.netloc
        except ValueError:
            sound = False
        if not (sound and url.isascii() and url.isprintable() and " " not in url and len(url) <= _LONGEST):
            # Not quoted: there may be a password in it.
            raise UsageError(
                f"a web address has the form https://HOST/PATH, no password in it, and up to {_LONGEST} characters"
            )
        self.name = f"{parts.scheme}://{parts.netloc}{parts.path}"
        if not (parts.scheme == "https" or options.insecure or is_loopback(parts.hostname or "")):
            raise UsageError(f"{self.name} would be read without encryption; use https, or allow it with --insecure")
        self._path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        self._host = parts.netloc
        self._server = Server(parts.netloc)
        self._deadlines = Deadlines.chosen(options.timeout)
        self._transport = Transport(
            parts.netloc,
            parts.path.strip("/"),
            insecure=options.insecure,
            authfile=options.authfile,
            ca=options.ca,
            deadlines=self._deadlines,
            scheme=parts.scheme,
        )
        self._version: _Version | None = None
        self.head = b""

    async def aclose(self) -> None:
        """See `Place.aclose`."""
        await self._transport.aclose()

    def distrust(self) -> None:
        """See `Place.distrust`."""
        self._transport.distrust(_DATA)

    async def header(self) -> Header:
        """See `Place.header`."""
        head = bytearray()
        try:
            self._version = await self._read(0, HEADER_SIZE, None, head.extend)
        except ReplacedError:
            raise SourceError(f"{self.name} was replaced while its header was read; try again") from None
        self.head = bytes(head)
        return Header.parse(self.head, self.name, self._version.size)

    async def read_into(self, start: int, end: int, sink: Sink) -> None:
        """See `Place.read_into`. What has come stays when a connection breaks, and the rest is asked for."""
        if start != end:
            await self._read(start, end, self._version, sink)

    async def _read(self, start: int, end: int, version: _Version | None, sink: Sink) -> _Version:
        """The version that the bytes are of: this one, if one is given."""
        at = start

        async def attempt(_: Server) -> _Version:
            nonlocal at, version
            if version and at == end:  # the last answer broke when all of it was here
                return version
            wanted = {"Range": f"bytes={at}-{end - 1}"} | (version.unless_replaced if version else {})
            async with self._transport.get(self._path, wanted, what=self.name, remember=_DATA) as response:
                version = self._believed(response, at, end, version)
                async for piece in response.aiter_raw():
                    at += len(piece)
                    if at > end:
                        raise SourceError(f"{self._host} sent more of {self.name} than it was asked for")
                    sink(piece)
            if at < end:
                raise Transient(f"the connection ended {end - at} bytes early")
            return version

        return await persist(Turns([self._server], self.name, end - start, self._deadlines), attempt)

    def _believed(self, response: httpx2.Response, start: int, end: int, version: _Version | None) -> _Version:
        """The version of an answer that has the range that was asked for."""
        if response.status_code != 206:
            if version and version.unless_replaced != _Version.of(response, 0).unless_replaced:
                raise ReplacedError
            raise SourceError(
                f"{self._host} answers no range requests, so that nothing can be read in place; download {self.name}, "
                "or put it on a server that does (nginx, Apache and object stores do)"
            )
        told = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if told is None:
            raise SourceError(f"{self._host} does not say which bytes of {self.name} it sends")
        first, last, size = map(int, told.groups())
        found = _Version.of(response, size)
        if version and version != found:
            raise ReplacedError
        if (first, last + 1) != (start, end):
            if last + 1 == size < end == HEADER_SIZE:
                raise FormatError(f"{self.name} is not a .clip file")
            raise SourceError(f"{self._host} was asked for bytes {start} to {end} of {self.name} and sent others")
        return found

    async def copy_index(self, out: BinaryIO, source: str) -> None:
        """Write a clip without data, whose source is `source`; nothing changes about one that has none. Its sections
        are not verified."""
        header = await self.header()
        end = header[Kind.SOURCE].end if header.data is None else header[Kind.SOURCE].offset
        if end > _MAX_INDEX:
            raise FormatError(f"{self.name} says that its index has {end} bytes; more than {_MAX_INDEX} are not read")
        head, tail = self.head, b""
        if header.data is not None:
            tail = source.encode()
            sections = [(Kind(kind), each) for kind, each in header.sections.items() if kind <= Kind.CONFIG]
            head = Header.pack([*sections, (Kind.SOURCE, Section.of(end, tail))], PACKED)
        await trio.to_thread.run_sync(out.write, head)
        for at in range(HEADER_SIZE, end, _PIECE):
            piece = await self._unchanged(self.read(at, min(at + _PIECE, end)))
            await trio.to_thread.run_sync(out.write, piece)
        out.write(tail)

    async def _unchanged(self, reading: Awaitable[T]) -> T:
        try:
            return await reading
        except ReplacedError:
            raise SourceError(f"{self.name} was replaced while its index was read; try again") from None
