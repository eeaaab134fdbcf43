"""An image, or a directory, as one file that has everything in it: a packed ``.clip``.

This module owns the order of the work. How contents become spans is the affair of `pile`, where they come from that of
`blocks` and `rootfs`, how all is written down that of `format`.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import trio

from clipfs import blocking
from clipfs.aside import check_place, written_aside
from clipfs.blocks.counters import Counters
from clipfs.blocks.reader import BlockReader
from clipfs.building.builder import Progress, Silent, index_for
from clipfs.building.pile import SPAN, Pile
from clipfs.building.rootfs import Rootfs
from clipfs.erofs.pack import pack as pack_tree
from clipfs.erofs.structs import SUPERBLOCK_OFFSET
from clipfs.errors import ClipfsError, ImageError
from clipfs.format.container import ITSELF, PACKED, Kind
from clipfs.format.index import Index
from clipfs.format.pack import Parts, assemble, pack_tables, uuid_of
from clipfs.oci import OCI_CONFIG, OCI_MANIFEST, Digest, Platform, not_empty
from clipfs.sources.fetcher import SourceOptions
from clipfs.sources.packed import fetcher_for

# What is read of an image before it is handed to a thread: few hops, and little enough to be read ahead of.
_BATCH = 4 << 20


@dataclass(frozen=True, slots=True)
class PackReport:
    """What packing did. content: bytes in files (one with several names counts once); unique: those of them that are
    stored; data: what they are compressed to; clip_size: of the whole file. seconds: how long it took."""

    path: Path
    inodes: int
    content: int
    unique: int
    data: int
    spans: int
    clip_size: int
    seconds: float
    warnings: tuple[str, ...]


def pack(
    source: Path | str,
    out: Path | str,
    *,
    platform: Platform | None = None,
    progress: Progress | None = None,
    access: SourceOptions | None = None,
) -> PackReport:
    """Write the file `out`, a clip that carries its data: it can be mounted, run and served as it is.

    source: a directory that is a root file system, a ``.clip`` whose source can be reached, or the name of an image.
    The same contents give the same bytes. Raises what `build` and reading an image raise.
    """
    access, shown, path, out = access or SourceOptions(), progress or Silent(), Path(source), Path(out)
    if isinstance(source, str):
        not_empty(source)
    # Before minutes of work, and not after them.
    check_place(out)
    if path.is_dir():
        return _pack_directory(path, out, platform or Platform.host(), shown)
    if not path.is_file():
        path = index_for(
            str(source),
            platform=platform,
            progress=progress,
            insecure=access.insecure,
            authfile=access.authfile,
            ca=access.ca,
        )
    with Index.open(path) as index:
        index.demand(platform)
        return _pack_index(index, access, out, shown)


class _Work:
    """A pile on its way into a file."""

    def __init__(self, out: Path, spool: IO[bytes], pile: Pile) -> None:
        self.out, self.spool, self.pile = out, spool, pile
        self.started = time.monotonic()

    @classmethod
    @contextmanager
    def begin(cls, out: Path) -> Iterator[_Work]:
        """The data goes to a file that has no name, since what comes before it in the clip is known after it."""
        # What is read meanwhile has errors of its own; closing a spool on a full disk writes once more.
        try:
            with tempfile.TemporaryFile(dir=out.parent) as spool, Pile(spool) as pile:
                yield cls(out, spool, pile)
        except OSError as error:
            raise ClipfsError(f"cannot write {out}: {error.strerror}") from error

    def finish(self, inodes: int, parts: Parts, warnings: list[str]) -> PackReport:
        """Write the clip: these sections, the tables, the data."""
        layer = self.pile.finish()
        self.spool.flush()
        parts = {**parts, **pack_tables([layer], self.pile.extents), Kind.SOURCE: ITSELF.encode()}
        with written_aside(self.out) as aside, aside.open("wb") as file:
            assemble(file, parts, PACKED, (layer.size, layer.digest.raw))
            file.flush()
            _copy(self.spool.fileno(), file.fileno(), layer.size)
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        return PackReport(
            path=self.out,
            inodes=inodes,
            content=self.pile.content,
            unique=self.pile.unique,
            data=layer.size,
            spans=len(layer.spans),
            clip_size=size,
            seconds=time.monotonic() - self.started,
            warnings=tuple(warnings),
        )


def _pack_index(index: Index, access: SourceOptions, out: Path, progress: Progress) -> PackReport:
    """The tree of the packed clip is the index's own, byte for byte, and so are its documents."""
    index.check()
    with _Work.begin(out) as work:
        progress.begin("packing", sum(length for _, _, _, length in index.extents(0, index.data_size)))
        blocking.run(lambda: _read_index(index, access, work.pile, progress))
        progress.end()
        verbatim = (Kind.EROFS, Kind.MANIFEST, Kind.CONFIG)
        return work.finish(index.inodes, {kind: index.section(kind) for kind in verbatim}, [])


async def _read_index(index: Index, access: SourceOptions, pile: Pile, progress: Progress) -> None:
    """Read all that is stored, in order, which the reader notices and reads ahead."""

    def add(batch: list[tuple[int, int, bytes]]) -> None:
        for address, at, piece in batch:
            pile.add(address, at, piece)
            progress.advance(len(piece))

    async with (
        fetcher_for(index, access) as fetcher,
        BlockReader(index, fetcher, counters=Counters.private()) as reader,
    ):
        batch: list[tuple[int, int, bytes]] = []
        size = 0
        for address, at, length in _pieces(index):
            piece = reader.try_read(address + at, length)
            batch.append((address, at, await reader.read(address + at, length) if piece is None else piece))
            size += length
            if size >= _BATCH:
                await trio.to_thread.run_sync(add, batch)
                batch, size = [], 0
        await trio.to_thread.run_sync(add, batch)


def _pieces(index: Index) -> Iterator[tuple[int, int, int]]:
    """(address of the file, offset in it, length) of all files, in order, cut at multiples of `SPAN`, without holes."""
    end = 0
    files = {(node.address, node.size) for _, node in index.walk() if stat.S_ISREG(node.mode) and node.size}
    for address, size in sorted(files):
        if address < end:
            raise ImageError(f"in {index.path}, two files share a part of what they contain")
        at = address
        for start, _, _, length in index.extents(address, size):
            at = max(at, start - (start - address) % SPAN)
            while at < start + length:
                yield address, at - address, min(SPAN, address + size - at)
                at += SPAN
        end = address + size


def _pack_directory(top: Path, out: Path, platform: Platform, progress: Progress) -> PackReport:
    """A directory has no documents, so it gets the least that an image must have."""
    with Rootfs(top) as rootfs, _Work.begin(out) as work:
        rootfs.scan()
        progress.begin("packing", rootfs.total)
        for address, at, piece in rootfs.pieces(SPAN):
            work.pile.add(address, at, piece)
            progress.advance(len(piece))
        progress.end()
        manifest, config = _documents(platform)
        image = pack_tree(rootfs.tree.root, rootfs.data_size, uuid_of(manifest))
        parts: Parts = {
            Kind.EROFS: memoryview(image)[SUPERBLOCK_OFFSET:],
            Kind.MANIFEST: manifest,
            Kind.CONFIG: config,
        }
        return work.finish(rootfs.tree.inodes, parts, rootfs.warnings)


def _documents(platform: Platform) -> tuple[bytes, bytes]:
    """(manifest, config) of an image that has no layers and says nothing but what it runs on."""
    about = {"architecture": platform.architecture, "os": platform.os, "rootfs": {"type": "layers", "diff_ids": []}}
    if platform.variant:
        about["variant"] = platform.variant
    config = json.dumps(about, sort_keys=True).encode()
    described = {"mediaType": OCI_CONFIG, "digest": str(Digest.of(config)), "size": len(config)}
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described, "layers": []}
    return json.dumps(manifest, sort_keys=True).encode(), config


def _copy(source: int, target: int, size: int) -> None:
    """In the kernel, from the beginning of one file to where the other one stands."""
    at = 0
    while at < size:
        at += os.sendfile(target, source, at, size - at)
