"""One pass over one layer: decoded, hashed, parsed, and merged into the tree.

This module owns how a layer's bytes get to this machine and through it, and what a caller sees of that. What an image
is, and where its index goes, is `builder`'s affair.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import trio

from clipfs import state
from clipfs.compression.codec import detect
from clipfs.compression.spans import PIECES, SPAN_SIZE, scan
from clipfs.errors import ClipfsError, ImageError, IntegrityError, SourceError
from clipfs.format.container import Layer
from clipfs.layers.bounds import drained
from clipfs.layers.layer import Entry, TarWalk
from clipfs.layers.tree import Tree
from clipfs.oci import Descriptor, Digest
from clipfs.sources.base import LocalBlob, Source

# What hashing a blob reads at a time: large enough that the GIL is released for most of the second it takes.
_HASH_CHUNK = 1 << 20

# An index may have 140 bytes an inode and 0.3 % of the layers. Of those, the tree of usual images takes 113 to 121, and
# so many of what it leaves are for windows: small files, most of them texts, need more for them than large ones.
_SPARE = 12


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


class AtHand(NamedTuple):
    """A layer as bytes on a disk. verified: its digest was found right on the way there."""

    place: LocalBlob
    verified: bool


@asynccontextmanager
async def blob_at_hand(source: Source, blob: Descriptor, name: str, progress: Progress) -> AsyncIterator[AtHand]:
    """Where the layer lies, or a spool file that is gone afterwards.

    A gzip decoder has to see the whole stream once, so a remote layer passes through here once, and never again, unless
    wrong bytes came: then those who have it too are asked first.
    """
    local = source.local(blob)
    if local is not None:
        yield AtHand(local, verified=False)
        return
    # It has no name, so that it is gone with this process, however that ends. Others open it by its descriptor.
    with tempfile.TemporaryFile(dir=state.scratch_dir(), buffering=0) as spool:
        await source.believed(blob, lambda: _fetch(source, blob, name, spool, progress))
        yield AtHand(LocalBlob(Path(f"/proc/self/fd/{spool.fileno()}"), 0, blob.size), verified=True)


async def _fetch(source: Source, blob: Descriptor, name: str, spool: IO[bytes], progress: Progress) -> None:
    """IntegrityError if the spool file holds something else in the end."""
    progress.begin(f"fetching {name}", blob.size)
    spool.seek(0)
    received, hasher = 0, blob.digest.hasher()

    def keep(data: bytes) -> None:
        hasher.update(data)
        # Unbuffered writes may be short, as they are on a disk that is nearly full; the next one says why.
        rest = memoryview(data)
        while rest:
            rest = rest[spool.write(rest) :]

    async with aclosing(source.stream(blob)) as chunks:
        async for chunk in chunks:
            received += len(chunk)
            if received > blob.size:
                raise SourceError(f"{source.name} sent more than the {blob.size} bytes of layer {blob.digest}")
            try:
                await trio.to_thread.run_sync(keep, chunk)
            except OSError as error:
                raise ClipfsError(f"cannot keep {name} in {state.scratch_dir()}: {error.strerror}") from error
            progress.advance(len(chunk))
    if received != blob.size:
        raise SourceError(f"{source.name} sent {received} of the {blob.size} bytes of layer {blob.digest}")
    progress.end()
    _demand(hasher.hexdigest(), blob.digest, f"layer {blob.digest}")


def index_layer(
    number: int,
    at_hand: AtHand,
    blob: Descriptor,
    diff_id: Digest,
    tree: Tree,
    progress: Progress,
    span_size: int = SPAN_SIZE,
) -> Layer:
    """Decode, hash, parse and merge one layer. Runs in a worker thread of trio's; the hashes run in two more."""
    local, given_up = at_hand.place, threading.Event()
    entries: list[Entry] = []
    walk, diff_hash, diff_size = TarWalk(tree.budget), diff_id.hasher(), 0
    with ThreadPoolExecutor(2, "clipfs-hash") as hashers:
        whole = hashers.submit(_digest_of, at_hand, blob.digest, given_up)
        try:
            codec = detect(_head(local))
            with scan(local.path, local.offset, local.size, codec, span_size, PIECES) as decoded:
                hashed: Future[None] = hashers.submit(lambda: None)
                for chunk in decoded:
                    trio.from_thread.check_cancelled()
                    hashed.result()  # one chunk behind at most: memory stays bounded
                    hashed = hashers.submit(diff_hash.update, chunk)
                    entries += walk.feed(chunk)
                    decoded.spare(_SPARE * len(entries))
                    diff_size += len(chunk)
                    progress.advance(decoded.consumed())
                hashed.result()
                progress.advance(decoded.consumed())  # what follows the last chunk: a footer, padding
                spans = decoded.spans
            entries += walk.finish()
            _demand(whole.result(), blob.digest, f"layer {blob.digest}")
            _demand(diff_hash.hexdigest(), diff_id, f"layer {blob.digest}, uncompressed,")
            tree.apply(number, drained(entries))
        except ImageError as error:
            # A damaged download breaks the decoder first; the digest tells damage from malice.
            _demand(whole.result(), blob.digest, f"layer {blob.digest}")
            raise error.within(blob.digest) from None
        except OSError as error:
            given_up.set()
            raise SourceError(f"cannot read layer {blob.digest} in {local.path}: {error.strerror}") from error
        except BaseException:
            given_up.set()
            raise
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
        raise IntegrityError(f"{what} should have digest {wanted}, but has {wanted.algorithm}:{found}; fetch it again")


def _head(local: LocalBlob) -> bytes:
    with local.path.open("rb") as file:
        return os.pread(file.fileno(), 512, local.offset)


def _digest_of(at_hand: AtHand, wanted: Digest, given_up: threading.Event) -> str:
    if at_hand.verified:
        return wanted.hex
    local, hasher = at_hand.place, wanted.hasher()
    with local.path.open("rb") as file:
        file.seek(local.offset)
        left = local.size
        while left and not given_up.is_set() and (chunk := file.read(min(_HASH_CHUNK, left))):
            hasher.update(chunk)
            left -= len(chunk)
    return hasher.hexdigest()
