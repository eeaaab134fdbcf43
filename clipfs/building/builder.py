"""From an image to its ``.clip``: one streaming pass over each layer, every digest checked on the way.

A layer that is elsewhere and brings a table of contents is spared the pass: `contents` indexes it by that.

This module owns the order of the work. It does not know how a layer is passed through (`layer_pass`), merged (`tree`)
or written down (`format_pack`).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import trio

from clipfs import blocking, sources, state
from clipfs.aside import check_place, written_aside
from clipfs.building import webclip
from clipfs.building.contents import index_by_contents
from clipfs.building.layer_pass import Progress, Silent, blob_at_hand, index_layer
from clipfs.compression.spans import SPAN_SIZE
from clipfs.errors import ImageError, UsageError
from clipfs.format import container as clip_format
from clipfs.format.index import Index
from clipfs.format.pack import write
from clipfs.layers.tree import Tree
from clipfs.oci import Digest, Platform
from clipfs.sources.base import Image, Source
from clipfs.sources.fetcher import SourceOptions
from clipfs.sources.place import is_url

__all__ = ["BuildReport", "Progress", "Silent", "build", "build_image", "index_for"]

# Spans outside of these bounds cost more than they could save: a window has up to 32 KiB, a fetch takes a round trip.
MIN_SPAN_SIZE = 64 << 10
MAX_SPAN_SIZE = 8 << 20


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did. Sizes in bytes, time in seconds."""

    path: Path
    source: str
    layers: int
    inodes: int
    compressed: int
    uncompressed: int
    clip_size: int
    seconds: float
    warnings: tuple[str, ...]


def build(
    name: str,
    out: Path | str,
    *,
    platform: Platform | None = None,
    progress: Progress | None = None,
    insecure: bool = False,
    authfile: Path | None = None,
    ca: Path | None = None,
    span_size: int = SPAN_SIZE,
) -> BuildReport:
    """Index the image `name` into the file `out`, which appears whole or not at all. If it is the URL of a packed clip,
    take the index from there. span_size: decoded bytes between two places of a layer where decoding can begin, at
    most, from 64 KiB to 8 MiB: fewer make random reads cheaper and the index larger.

    Raises ImageError for a broken or hostile image, IntegrityError where a digest does not hold, SourceError where the
    image cannot be read.
    """

    if not MIN_SPAN_SIZE <= span_size <= MAX_SPAN_SIZE:
        raise UsageError(f"a span has from {MIN_SPAN_SIZE} to {MAX_SPAN_SIZE} bytes, not {span_size}")
    if is_url(name):
        if span_size != SPAN_SIZE:
            raise UsageError(f"{name} has its spans already: their size was decided when it was packed")
        started = time.monotonic()
        webclip.save_index(name, Path(out), SourceOptions(None, insecure, authfile, ca), platform)
        return _report_on(Path(out), started)

    async def main() -> BuildReport:
        async with sources.open_source(name, insecure=insecure, authfile=authfile, ca=ca) as source:
            image = await source.image(platform)
            return await build_image(source, image, Path(out), progress or Silent(), span_size)

    return blocking.run(main)


def index_for(
    name: str,
    *,
    platform: Platform | None = None,
    progress: Progress | None = None,
    insecure: bool = False,
    authfile: Path | None = None,
    ca: Path | None = None,
) -> Path:
    """The ``.clip`` of the image `name`, or of the packed clip with this URL, in this user's index cache.

    It is made now if it is not there.

    Indexes are kept by format, source and manifest digest, so a moved tag gets an index of its own.
    """

    if is_url(name):
        return webclip.cached_index(name, SourceOptions(None, insecure, authfile, ca), platform)

    async def main() -> Path:
        async with sources.open_source(name, insecure=insecure, authfile=authfile, ca=ca) as source:
            image = await source.image(platform)
            key = Digest.of(f"{clip_format.VERSION}\n{image.name}\n{image.manifest.digest}".encode()).hex
            path = state.cache_dir() / "index" / f"{key}.clip"
            if not path.exists():
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                await build_image(source, image, path, progress or Silent())
            return path

    return blocking.run(main)


async def build_image(
    source: Source, image: Image, out: Path, progress: Progress, span_size: int = SPAN_SIZE
) -> BuildReport:
    """Index an image whose manifest and config are at hand."""
    started = time.monotonic()
    # Before minutes of work, and not after them.
    check_place(out)
    manifest, config = image.manifest, image.config
    if len(manifest.layers) != len(config.diff_ids):
        raise ImageError(
            f"image {image.name} is inconsistent: its manifest lists {len(manifest.layers)} layers, "
            f"its config {len(config.diff_ids)} diff_ids"
        )
    tree, layers = Tree(), []
    for number, (blob, diff_id) in enumerate(zip(manifest.layers, config.diff_ids, strict=True)):
        name = f"layer {number + 1}/{len(manifest.layers)}"
        layer = await index_by_contents(source, number, blob, diff_id, tree)
        if layer is None:
            async with blob_at_hand(source, blob, name, progress) as at_hand:
                progress.begin(f"indexing {name}", blob.size)
                layer = await trio.to_thread.run_sync(
                    index_layer, number, at_hand, blob, diff_id, tree, progress, span_size
                )
            progress.end()
        layers.append(layer)

    def finish() -> tuple[int, int]:
        extents, data_size = tree.finish()
        with written_aside(out) as path, path.open("wb") as file:
            write(
                file,
                root=tree.root,
                extents=extents,
                data_size=data_size,
                layers=layers,
                manifest=manifest.raw,
                config=config.raw,
                source=image.name,
            )
            file.flush()
            os.fsync(file.fileno())
            return tree.inodes, file.tell()

    inodes, clip_size = await trio.to_thread.run_sync(finish)
    return BuildReport(
        path=out,
        source=image.name,
        layers=len(layers),
        inodes=inodes,
        compressed=sum(layer.size for layer in layers),
        uncompressed=sum(layer.diff_size for layer in layers),
        clip_size=clip_size,
        seconds=time.monotonic() - started,
        warnings=tuple(tree.warnings),
    )


def _report_on(path: Path, started: float) -> BuildReport:
    with Index.open(path) as index:
        return BuildReport(
            path=path,
            source=index.source,
            layers=len(index.layers),
            inodes=index.inodes,
            compressed=sum(layer.size for layer in index.layers),
            uncompressed=sum(layer.diff_size for layer in index.layers),
            clip_size=path.stat().st_size,
            seconds=time.monotonic() - started,
            warnings=(),
        )
