"""From an image to its ``.clip``: one streaming pass over each layer, every digest checked on the way.

This module owns the order of the work. It does not know how bytes are fetched (`sources`), decoded (`spans`), parsed
(`layer`), merged (`tree`) or written down (`format`).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from clipfs import format as clip_format
from clipfs import sources, state
from clipfs.codec import detect
from clipfs.errors import ClipfsError, ImageError, IntegrityError, SourceError, UsageError
from clipfs.format import Layer
from clipfs.layer import Entry, TarWalk
from clipfs.oci import Descriptor, Digest, Platform
from clipfs.sources.base import Image, LocalBlob, Source
from clipfs.spans import scan
from clipfs.tree import Tree

# What hashing a blob reads at a time: large enough that the GIL is released for most of the second it takes.
_HASH_CHUNK = 1 << 20


class Progress(Protocol):
    """What a caller shows of a long build. Called from worker threads."""

    def begin(self, what: str, total: int) -> None:
        """A step starts: a sentence fragment, and how many bytes it will count up to."""

    def advance(self, count: int) -> None:
        """So many bytes of the step are done."""

    def end(self) -> None:
        """The step is done, whatever it counted up to."""


class Silent:
    """A `Progress` that shows nothing."""

    def begin(self, what: str, total: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def end(self) -> None:
        pass


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
) -> BuildReport:
    """Index the image `name` into the file `out`, which appears whole or not at all.

    Raises ImageError for a broken or hostile image, IntegrityError where a digest does not hold, SourceError where the
    image cannot be read.
    """

    async def main() -> BuildReport:
        async with sources.open_source(name, insecure=insecure, authfile=authfile, ca=ca) as source:
            image = await source.image(platform)
            return await build_image(source, image, Path(out), progress or Silent())

    return trio.run(main)


def index_for(
    name: str,
    *,
    platform: Platform | None = None,
    progress: Progress | None = None,
    insecure: bool = False,
    authfile: Path | None = None,
    ca: Path | None = None,
) -> Path:
    """The ``.clip`` of the image `name` in this user's index cache, made now if it is not there.

    Indexes are kept by manifest digest and source, so a moved tag gets an index of its own.
    """

    async def main() -> Path:
        async with sources.open_source(name, insecure=insecure, authfile=authfile, ca=ca) as source:
            image = await source.image(platform)
            key = Digest.of(f"{image.name}\n{image.manifest.digest}".encode()).hex
            path = state.cache_dir() / "index" / f"{key}.clip"
            if not path.exists():
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                await build_image(source, image, path, progress or Silent())
            return path

    return trio.run(main)


async def build_image(source: Source, image: Image, out: Path, progress: Progress) -> BuildReport:
    """Index an image whose manifest and config are at hand."""
    started = time.monotonic()
    manifest, config = image.manifest, image.config
    if len(manifest.layers) != len(config.diff_ids):
        raise ImageError(
            f"image {image.name} is inconsistent: its manifest lists {len(manifest.layers)} layers, "
            f"its config {len(config.diff_ids)} diff_ids"
        )
    tree, layers = Tree(), []
    for number, (blob, diff_id) in enumerate(zip(manifest.layers, config.diff_ids, strict=True)):
        name = f"layer {number + 1}/{len(manifest.layers)}"
        async with _blob_at_hand(source, blob, name, progress) as local:
            progress.begin(f"indexing {name}", blob.size)
            layers.append(await trio.to_thread.run_sync(_index_layer, number, local, blob, diff_id, tree, progress))
        progress.end()

    def finish() -> tuple[int, int]:
        extents, data_size = tree.finish()
        with _written_aside(out) as path, path.open("wb") as file:
            clip_format.write(
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


@asynccontextmanager
async def _blob_at_hand(source: Source, blob: Descriptor, name: str, progress: Progress) -> AsyncIterator[LocalBlob]:
    """The layer as bytes on a disk: where it lies, or a spool file that is gone afterwards.

    A gzip decoder has to see the whole stream once, so a remote layer passes through here once, and never again.
    """
    local = source.local(blob)
    if local is not None:
        yield local
        return
    progress.begin(f"fetching {name}", blob.size)
    with tempfile.NamedTemporaryFile(prefix="clipfs-layer-", dir=state.scratch_dir()) as spool:
        received = 0
        async for chunk in source.stream(blob):
            received += len(chunk)
            progress.advance(len(chunk))
            if received > blob.size:
                raise SourceError(f"{source.name} sent more than the {blob.size} bytes of layer {blob.digest}")
            await trio.to_thread.run_sync(spool.write, chunk)
        spool.flush()
        if received != blob.size:
            raise SourceError(f"{source.name} sent {received} of the {blob.size} bytes of layer {blob.digest}")
        yield LocalBlob(Path(spool.name), 0, blob.size)


@contextmanager
def _written_aside(out: Path) -> Iterator[Path]:
    """A path beside `out` to write to; it becomes `out` if all goes well and disappears if not."""
    if out.exists() and not out.is_file():
        raise UsageError(f"cannot write {out}: it is there and is no regular file")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise ClipfsError(f"cannot write {out}: {error.strerror}") from error
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def _index_layer(
    number: int, local: LocalBlob, blob: Descriptor, diff_id: Digest, tree: Tree, progress: Progress
) -> Layer:
    """Decode, hash, parse and merge one layer. Runs in a worker thread; the hashes run in two more."""
    entries: list[Entry] = []
    walk, diff_hash, diff_size = TarWalk(), diff_id.hasher(), 0
    with ThreadPoolExecutor(2, "clipfs-hash") as hashers:
        whole = hashers.submit(_digest_of, local, blob.digest)
        try:
            codec = detect(_head(local))
            with scan(local.path, local.offset, local.size, codec) as decoded:
                hashed: Future[None] = hashers.submit(lambda: None)
                for chunk in decoded:
                    hashed.result()  # one chunk behind at most: memory stays bounded
                    hashed = hashers.submit(diff_hash.update, chunk)
                    entries += walk.feed(chunk)
                    diff_size += len(chunk)
                    progress.advance(decoded.consumed())
                hashed.result()
                spans = decoded.spans
            entries += walk.finish()
            _demand(whole.result(), blob.digest, "the layer's bytes")
            _demand(diff_hash.hexdigest(), diff_id, "the uncompressed layer")
            tree.apply(number, entries)
        except ImageError as error:
            # A damaged download breaks the decoder first; the digest tells damage from malice.
            _demand(whole.result(), blob.digest, "the layer's bytes")
            raise error.within(blob.digest) from None
    return Layer(
        digest=blob.digest,
        diff_id=diff_id,
        size=blob.size,
        diff_size=diff_size,
        codec=codec,
        media_type=blob.media_type,
        spans=spans,
    )


def _demand(found: str, wanted: Digest, what: str) -> None:
    if found != wanted.hex:
        raise IntegrityError(f"{what} should have digest {wanted}, but have {wanted.algorithm}:{found}; fetch it again")


def _head(local: LocalBlob) -> bytes:
    with local.path.open("rb") as file:
        return os.pread(file.fileno(), 512, local.offset)


def _digest_of(local: LocalBlob, wanted: Digest) -> str:
    hasher = wanted.hasher()
    with local.path.open("rb") as file:
        file.seek(local.offset)
        left = local.size
        while left and (chunk := file.read(min(_HASH_CHUNK, left))):
            hasher.update(chunk)
            left -= len(chunk)
    return hasher.hexdigest()
