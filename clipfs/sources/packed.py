"""What the layers of an index are fetched from: the image's source, or the clip that carries their data.

A place is believed to have the data of an index when the header of the file there promises data of the same SHA-256;
what comes from it is verified span by span all the same. This module knows sections, and neither spans nor inodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import trio

from clipfs.errors import FormatError, SourceError, UsageError
from clipfs.fields import quoted
from clipfs.format.container import ITSELF, Layer, Section
from clipfs.oci import Manifest
from clipfs.sources.base import Sink, is_file
from clipfs.sources.fetcher import Fetcher, LayerFetcher, SourceOptions
from clipfs.sources.place import LocalFile, Place, ReplacedError, is_url


class IndexView(Protocol):
    """What is asked of an index; `index.Index` is one."""

    @property
    def path(self) -> Path: ...

    @property
    def packed(self) -> bool: ...

    @property
    def source(self) -> str: ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def layers(self) -> Sequence[Layer]: ...


def fetcher_for(index: IndexView, options: SourceOptions | None = None) -> Fetcher:
    """What fetches the layers of this index: from its image's source, or from the clip that carries its data.

    A file with data is opened at once, so that it may be replaced or removed while it is read.
    """
    options = options or SourceOptions()
    if not index.packed:
        return LayerFetcher(index.source, index.manifest, options)
    if len(index.layers) != 1:
        raise FormatError(f"{index.path} is damaged: it is packed, but has not the one layer with its data")
    name = options.name or index.source
    return PackedFetcher(_place(name, index.path, options), index.layers[0])


def _place(name: str, clip: Path, options: SourceOptions) -> Place:
    if is_url(name):
        # Late: other mounts can do without a client for the web.
        from clipfs.sources.web import WebFile

        return WebFile(name, options)
    return LocalFile(clip if name == ITSELF else _path(name, clip))


def _path(name: str, clip: Path) -> Path:
    path = Path(name.removeprefix(ITSELF))
    if not is_file(path):
        raise UsageError(f"the data of {clip} is in {quoted(name)}, which is no file; name the packed .clip or its URL")
    return path


class PackedFetcher(Fetcher):
    """Fetches what the one layer of a packed index consists of, from a place that has it."""

    def __init__(self, place: Place, layer: Layer) -> None:
        self._place, self._layer = place, layer
        self._data: Section | None = None
        self._finding = trio.Lock()

    async def fetch_into(self, layer: int, start: int, end: int, sink: Sink) -> None:
        """See `Fetcher.fetch_into`; there is one layer, all data."""
        del layer
        given = 0

        def give(piece: bytes) -> None:
            nonlocal given
            given += len(piece)
            sink(piece)

        for again in (True, False):
            data = await self._found()
            try:
                return await self._place.read_into(data.offset + start + given, data.offset + end, give)
            except ReplacedError:
                # By the same, perhaps: servers behind one name may call the same file differently.
                self._data = None if self._data is data else self._data
                if not again:
                    break
        raise SourceError(f"{self._place.name} changes while it is read")

    def distrust(self, layer: int, at: int | None = None) -> None:
        """What came was wrong: see whether the place still has what it should have."""
        del layer, at
        self._data = None
        self._place.distrust()

    async def _found(self) -> Section:
        """Where the data is in the file, if it is the right file."""
        async with self._finding:
            if self._data is None:
                found = (await self._place.header()).data
                if found is None or (found.length, found.digest) != (self._layer.size, self._layer.digest.raw):
                    raise SourceError(
                        f"{self._place.name} does not have the data that this index was made for: the file was "
                        "replaced; take its index anew"
                    )
                self._data = found
            return self._data

    async def aclose(self) -> None:
        """See `Fetcher.aclose`."""
        await self._place.aclose()
