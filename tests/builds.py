"""What tests of building share: an image of three layers, a progress that keeps records, a source that is elsewhere."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import trio

import clipfs
from clipfs import state
from clipfs.building.builder import build_image
from clipfs.oci import Descriptor, Platform
from clipfs.sources import open_source
from clipfs.sources.base import Document, LocalBlob, Sink, Source
from tests.images import LayoutBuilder, Tar
from tests.mounts import SECONDS

# Several chunks of a scan, so that there is something to be cancelled in the middle of.
BIG = b"".join(b"%09d\n" % number for number in range(600_000))


def layers() -> list[Tar]:
    return [
        Tar().member("etc", typeflag=b"5").member("etc/hosts", b"127.0.0.1\n").member("big", BIG),
        Tar().member("etc/hosts", b"::1\n", xattrs={"user.b": b"1", "user.a": b"2"}).member("new", b"x" * 5000),
        Tar().member("etc/.wh.hosts").member("last", b"z", mtime="1700000000.25"),
    ]


def three_layers(directory: Path) -> LayoutBuilder:
    made = LayoutBuilder(directory)
    gzipped, plain, zstd = layers()
    made.layer(gzipped, "gzip").layer(plain, "none").layer(zstd, "zstd")
    return made.config(cmd=["sh"])


class Recorder:
    """A `Progress` that keeps what it is told, checks the order, and calls `on_advance` each time."""

    def __init__(self, on_advance: Callable[[], object] = lambda: None) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self.advances = 0
        self._on_advance = on_advance
        self._step: list[tuple[str, int, int]] = []

    def begin(self, what: str, total: int) -> None:
        assert not self._step, f"{what} begins before {self._step} has ended"
        self._step = [(what, total, 0)]

    def advance(self, count: int) -> None:
        assert count >= 0
        [(what, total, done)] = self._step
        assert done + count <= total
        self._step = [(what, total, done + count)]
        self.advances += 1
        self._on_advance()

    def end(self) -> None:
        self.steps += self._step
        self._step = []


async def indexed(source: Source, out: Path, progress: Recorder | None = None) -> clipfs.BuildReport:
    with trio.fail_after(SECONDS):
        async with source:
            return await build_image(source, await source.image(), out, progress or Recorder())


class Elsewhere(Source):
    """An image of this machine that pretends to be on another one. `sent` may change what is streamed of a layer."""

    def __init__(self, name: str, sent: Callable[[bytes], bytes] = lambda data: data) -> None:
        self._there = open_source(name)
        self.name = self._there.name
        self._sent = sent
        self.open_streams = self.pieces = 0
        self.spools: list[int] = []

    def local(self, blob: Descriptor) -> LocalBlob | None:
        return None

    async def stream(self, blob: Descriptor) -> AsyncGenerator[bytes, None]:
        data = self._sent(await self._there.read_range(blob, 0, blob.size))
        self.open_streams += 1
        try:
            for at in range(0, len(data), 10_000):
                self.pieces += 1
                yield data[at : at + 10_000]
            self.spools.append(len(spools()))
        finally:
            self.open_streams -= 1

    async def read_into(self, blob: Descriptor, start: int, end: int, sink: Sink) -> None:
        await self._there.read_into(blob, start, end, sink)

    async def _named(self, platform: Platform) -> Document:
        return await self._there._named(platform)

    async def _manifest(self, descriptor: Descriptor) -> bytes:
        return await self._there._manifest(descriptor)


def spools() -> list[str]:
    """Files in the scratch directory that this process has open. They have no name."""
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if link.is_symlink()]
    return [target for target in targets if target.startswith(str(state.scratch_dir()))]
