"""A layer by its own table of contents: where that lies, and that it is the one which the manifest names.

This module knows the annotations of eStargz and zstd:chunked, eStargz' footer, and how both wrap the table. It fetches
that and nothing else of the layer. What the table says is the affair of `toc`.

A manifest is verified before its annotations are seen, and they hold the digest of the table. So the table is what the
author of the image made it. It need not be what is in the tar: who reads the layer in the ordinary way gets that.
"""

from __future__ import annotations

import re
import zlib

import trio

from clipfs.compression.zstd import ZstdStream, ZstdStreamError
from clipfs.errors import ImageError, IntegrityError
from clipfs.fields import quoted
from clipfs.format.container import Codec, Layer
from clipfs.layers.bounds import Budget, drained
from clipfs.layers.layer import Member, TarWalk
from clipfs.layers.toc import NAME, Table, parse
from clipfs.layers.tree import Tree
from clipfs.oci import Descriptor, Digest
from clipfs.sources.base import Source

_STARGZ = "containerd.io/snapshot/stargz/toc.digest"
# The newer name, and the one that Debian 12's skopeo and buildah write.
_CHUNKED = ("io.github.containers.zstd-chunked", "io.containers.zstd-chunked")

# A million entries take 200 MB and more; before that a table is no bargain. Both are held in memory while it is read.
MAX_COMPRESSED = 64 << 20
MAX_TABLE = 256 << 20

# An empty gzip member whose extra field says where the table is.
_FOOTER_SIZE = 51
_FOOTER = re.compile(
    rb"\x1f\x8b\x08\x04.{6}\x1a\x00SG\x16\x00([0-9A-Fa-f]{16})STARGZ\x01\x00\x00\xff\xff\x00{8}", re.DOTALL
)
_EXTERNAL = b"STARGZEXTERNALTOC"

# offset:length:length when decompressed:type. The offset is behind the 8 bytes that begin a skippable frame.
_POSITION = re.compile(r"([0-9]{1,15}):([0-9]{1,15}):([0-9]{1,15}):([0-9]{1,15})")
_FRAME_HEADER = 8

# The tar header before the table in an eStargz layer, with room for extended headers.
_TAR_HEADER = 64 << 10


async def index_by_contents(source: Source, number: int, blob: Descriptor, diff_id: Digest, tree: Tree) -> Layer | None:
    """Put layer `number` on top of the tree by its table of contents.

    None if it has to be read as a whole: it lies on this machine, brings no table, or one that is of no use, which is
    then among the tree's warnings. Raises ImageError if what the table says does not fit on the layers below.
    """
    if source.local(blob) is not None:
        return None
    try:
        found = await _contents(source, blob, tree.budget)
    except (ImageError, IntegrityError) as error:
        tree.warnings.append(f"layer {blob.digest} is downloaded and read as a whole: {error}")
        return None
    if found is None:
        return None
    codec, table = found
    try:
        await trio.to_thread.run_sync(tree.apply, number, drained(table.entries))
    except ImageError as error:
        raise error.within(blob.digest) from None
    return Layer(blob.digest, diff_id, blob.size, table.size, codec, blob.media_type, table.spans)


async def _contents(source: Source, blob: Descriptor, budget: Budget) -> tuple[Codec, Table] | None:
    """What the layer says of itself, if it does. budget: of the image.

    Raises ImageError if it brings a table that cannot be used, IntegrityError if not the one that it should be.
    """
    stargz = blob.annotations.get(_STARGZ)
    chunked = [prefix for prefix in _CHUNKED if f"{prefix}.manifest-checksum" in blob.annotations]
    if stargz is not None and chunked:
        raise ImageError("its annotations are those of eStargz and of zstd:chunked at once")
    if stargz is not None:
        return Codec.GZIP, await _stargz(source, blob, Digest.parse(stargz), budget)
    if chunked:
        digest = Digest.parse(blob.annotations[f"{chunked[0]}.manifest-checksum"])
        position = blob.annotations.get(f"{chunked[0]}.manifest-position", "")
        return Codec.ZSTD, await _chunked(source, blob, digest, position, budget)
    return None


async def _stargz(source: Source, blob: Descriptor, digest: Digest, budget: Budget) -> Table:
    """The last member of the tar, in gzip members of its own, with a footer behind it."""
    end = blob.size - _FOOTER_SIZE
    footer = await source.read_range(blob, end, blob.size) if end > 0 else b""
    matched = _FOOTER.fullmatch(footer)
    if matched is None:
        elsewhere = "its table of contents is in another image" if _EXTERNAL in footer else "it has no eStargz footer"
        raise ImageError(f"it is annotated as eStargz, but {elsewhere}")
    start = int(matched[1], 16)
    if not 0 < start < end or end - start > MAX_COMPRESSED:
        raise ImageError(f"its eStargz footer says that the table of contents is at byte {start} of {blob.size}")
    packed = await source.read_range(blob, start, end)

    def read() -> Table:
        document = _member(packed)
        digest.verify(document, "the table of contents")
        return parse(document, Codec.GZIP, start, budget)

    return await trio.to_thread.run_sync(read)


async def _chunked(source: Source, blob: Descriptor, digest: Digest, position: str, budget: Budget) -> Table:
    """In a skippable frame behind the tar. The digest is of the compressed table."""
    matched = _POSITION.fullmatch(position)
    start, length, size, kind = map(int, matched.groups()) if matched else (0, 0, 0, 0)
    if kind != 1:
        raise ImageError(f"its annotation does not say where its table of contents is: {quoted(position)}")
    if not _FRAME_HEADER <= start <= start + length <= blob.size or length > MAX_COMPRESSED or size > MAX_TABLE:
        raise ImageError(
            f"its annotation says that its table of contents is at {quoted(position)} of {blob.size} bytes"
        )
    packed = await source.read_range(blob, start, start + length)

    def read() -> Table:
        digest.verify(packed, "the table of contents")
        return parse(_unzstd(packed, size), Codec.ZSTD, start - _FRAME_HEADER, budget)

    return await trio.to_thread.run_sync(read)


def _member(packed: bytes) -> bytes:
    """The table out of a compressed tar of which it is the only member."""
    decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        tar = decoder.decompress(packed, _TAR_HEADER + MAX_TABLE)
    except zlib.error as error:
        raise ImageError(f"its table of contents is no gzip stream: {error}") from None
    entries = TarWalk().feed(tar[:_TAR_HEADER])
    table = entries[0] if entries else None
    if not isinstance(table, Member) or table.path != NAME or len(table.segments) != 1:
        raise ImageError(f"there is no {NAME.decode()} where its table of contents should be")
    _, start, length = table.segments[0]
    if length > len(tar) - start:
        raise ImageError(f"its table of contents is cut off, or has more than the {MAX_TABLE} bytes that are read")
    return tar[start : start + length]


def _unzstd(packed: bytes, size: int) -> bytes:
    pieces, left = [], size
    try:
        for piece in ZstdStream().decode(packed):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                break
    except ZstdStreamError as error:
        raise ImageError(f"its table of contents is no zstd stream: {error}") from None
    if left:
        raise ImageError(f"its table of contents does not have the {size} bytes that its annotation says")
    return b"".join(pieces)
