"""Ranges of an image's layers, by layer number: what the block reader asks, in the words that a source understands.

The source is opened when the first byte is needed, so that a mount starts without network and without credentials.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from clipfs.errors import ClipfsError, SourceError, UsageError
from clipfs.oci import Manifest
from clipfs.sources import open_source
from clipfs.sources.base import Sink, Source


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How to reach a source. name overrides the one that the index remembers. timeout: seconds that a read may take
    with all its attempts, None for $CLIPFS_TIMEOUT or 90."""

    name: str | None = None
    insecure: bool = False
    authfile: Path | None = None
    ca: Path | None = None
    timeout: float | None = None


class Fetcher(ABC):
    """Fetches compressed bytes of layers, by number. An async context manager, at whose end it lets go of what it has
    open, and does not wait for that longer than a few seconds."""

    async def fetch(self, layer: int, start: int, end: int) -> bytes:
        """Bytes [start, end) of the blob of layer `layer`; SourceError if they cannot be had."""
        data = bytearray()
        await self.fetch_into(layer, start, end, data.extend)
        return bytes(data)

    @abstractmethod
    async def fetch_into(self, layer: int, start: int, end: int, sink: Sink) -> None:
        """As `fetch`, but each piece is given to `sink` when it comes: in order, and once."""

    @abstractmethod
    def distrust(self, layer: int, at: int | None = None) -> None:
        """What came of this layer was wrong: take another way to it next time, if there is one. at: where in the layer,
        so that of several places the one that sent it is blamed; otherwise it is all that have sent something of it."""

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of what is open."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(5):
            await self.aclose()


class LayerFetcher(Fetcher):
    """Fetches from the source of an image, whose manifest has the layers."""

    def __init__(self, name: str, manifest: Manifest, options: SourceOptions | None = None) -> None:
        self._options = options or SourceOptions()
        self._name = self._options.name or name
        self._manifest = manifest
        self._source: Source | None = None
        self._opening = trio.Lock()

    async def fetch_into(self, layer: int, start: int, end: int, sink: Sink) -> None:
        """See `Fetcher.fetch_into`."""
        await (await self._open()).read_into(self._manifest.layers[layer], start, end, sink)

    def distrust(self, layer: int, at: int | None = None) -> None:
        """See `Fetcher.distrust`."""
        if self._source is not None:
            self._source.distrust(self._manifest.layers[layer], at)

    async def _open(self) -> Source:
        async with self._opening:
            if self._source is None:
                options = self._options
                try:
                    self._source = open_source(
                        self._name,
                        insecure=options.insecure,
                        authfile=options.authfile,
                        ca=options.ca,
                        timeout=options.timeout,
                    )
                except UsageError as error:
                    raise SourceError(
                        f"{error}; if the image has moved, name it with --source or -o source="
                    ) from error
            return self._source

    async def aclose(self) -> None:
        """See `Fetcher.aclose`."""
        if self._source is not None:
            await self._source.aclose()


class NoFetcher(Fetcher):
    """Of a source that is not there, or not any more: SourceError for each range. What is in a cache needs none."""

    def __init__(self, why: ClipfsError) -> None:
        self._why = why

    async def fetch_into(self, layer: int, start: int, end: int, sink: Sink) -> None:
        """See `Fetcher.fetch_into`."""
        del layer, start, end, sink
        raise SourceError(str(self._why))

    def distrust(self, layer: int, at: int | None = None) -> None:
        """See `Fetcher.distrust`."""

    async def aclose(self) -> None:
        """See `Fetcher.aclose`."""
