"""The index of a clip that a web server has, brought to this machine; the data stays where it is.

What is made here is a clip like others: its sections are those of the file on the server, its source is the URL.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TypeVar

from clipfs import blocking, state
from clipfs.aside import written_aside
from clipfs.errors import FormatError
from clipfs.format.check import check_sections
from clipfs.format.container import Header
from clipfs.format.index import Index
from clipfs.oci import Digest, Platform
from clipfs.sources.fetcher import SourceOptions
from clipfs.sources.web import WebFile

T = TypeVar("T")


def save_index(url: str, out: Path, options: SourceOptions, platform: Platform | None = None) -> None:
    """Write the index of the clip at `url` to `out`. SourceError if it cannot be had, FormatError if it is none,
    UsageError if its image is for another platform."""

    async def main(web: WebFile) -> None:
        await _save(web, url, out, platform)

    _with(url, options, main)


def cached_index(url: str, options: SourceOptions, platform: Platform | None = None) -> Path:
    """The same in this user's index cache. Only the header is fetched of one that is there already: it has the digests
    of all the rest, so it is kept by the header and a file that was replaced gets another one."""

    async def main(web: WebFile) -> Path:
        await web.header()
        path = state.cache_dir() / "index" / f"{Digest.of(url.encode() + web.head).hex}.clip"
        if not path.exists() or _damaged(path, web.name, platform):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            await _save(web, url, path, platform)
        return path

    return _with(url, options, main)


def _with(url: str, options: SourceOptions, act: Callable[[WebFile], Awaitable[T]]) -> T:
    async def main() -> T:
        web = WebFile(url, options)
        try:
            return await act(web)
        finally:
            await web.aclose()

    return blocking.run(main)


async def _save(web: WebFile, url: str, out: Path, platform: Platform | None) -> None:
    with written_aside(out) as aside, aside.open("w+b") as file:
        await web.copy_index(file, url)
        file.flush()
        # What came over the net is verified once, here; what is read later is checked as it is read, as ever.
        with mmap(file.fileno(), 0, access=ACCESS_READ) as buffer:
            check_sections(buffer, Header.parse(buffer, web.name), web.name)
        with Index.open(aside) as index:
            index.demand(platform, web.name)
        os.fsync(file.fileno())


def _damaged(path: Path, name: str, platform: Platform | None) -> bool:
    """Has a disk lost some of it? Then it is made anew. UsageError if the image is for another platform."""
    try:
        with Index.open(path) as index:
            index.demand(platform, name)
    except FormatError:
        return True
    return False
