"""The .clip reader: any file is a FormatError or answers every question, and what `check` accepts answers them all."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import random
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import zstandard

from clipfs.erofs.pack import pack
from clipfs.erofs.structs import BLOCK, SUPERBLOCK_OFFSET
from clipfs.errors import FormatError
from clipfs.format.container import ITSELF, PACKED, Codec, Header, Kind, Layer, Span
from clipfs.format.index import Index
from clipfs.format.pack import Parts, assemble, pack_tables, uuid_of
from clipfs.oci import Digest
from tests.clips import MEDIA_TYPE, Built, TreeBuilder, documents, raw_layer, write_clip
from tests.fuzz import Change, words
from tests.fuzz.judge import file_of, read

LIMIT = 64 << 10

# Of the data space, read at a time. A hostile index can say that any amount is there.
_READ = 1 << 20
_PATHS = (b"dir/link", b"dir/../dir/link/", b"/a/b/../../c", b"loop", b"dir/file/x", b"n" * 300)


def one(data: bytes) -> None:
    """Ask everything, then have it checked, then ask again if that went well."""
    with file_of(data) as path, contextlib.suppress(FormatError), Index.open(path) as index:
        with contextlib.suppress(FormatError):
            _ask(index, sound=False)
        _ask_on(index)
        index.check()
        try:
            _ask(index, sound=True)
            assert sum(1 for _ in index.walk()) >= index.inodes
        except FormatError as error:
            raise AssertionError("it passed the check, and then did not") from error


def _ask(index: Index, sound: bool) -> None:
    """Everything that a mount may ask. sound: the answers must fit together, too."""
    for _, node in index.walk():
        index.xattrs(node.nid)
        if stat.S_ISLNK(node.mode):
            assert 0 < len(index.readlink(node.nid)) == node.size
        elif stat.S_ISDIR(node.mode):
            index.parent(node.nid)
            for name, nid in index.entries(node.nid):
                assert index.lookup(node.nid, name) == nid or not sound
        elif node.size:
            read(index, node.address, min(node.size, _READ), None)
            read(index, node.address + max(0, node.size - _READ), min(node.size, _READ), None)
    for path in _PATHS:
        with contextlib.suppress(OSError):
            index.resolve(path)
    for layer in index.layers:
        for number, span in enumerate(layer.spans):
            assert layer.spans.bounds(number) == (span.position, span.length)
            assert number in layer.spans.frame(number)
            assert layer.spans.digest(number) == span.digest
            layer.spans.find(span.position)
    assert index.section(Kind.MANIFEST) == index.manifest.raw if not index.packed else index.source
    _ = index.config


def _ask_on(index: Index) -> None:
    """Each inode that could be, whatever the others are: the kernel asks by number."""
    for nid in range(40, min(index._tree.size, 4 * BLOCK) >> 5):
        with contextlib.suppress(FormatError):
            node = index.inode(nid)
            kind = stat.S_IFMT(node.mode)
            with contextlib.suppress(FormatError):
                index.xattrs(nid)
            if kind == stat.S_IFLNK:
                index.readlink(nid)
            elif kind == stat.S_IFDIR:
                with contextlib.suppress(FormatError):
                    index.lookup(nid, b"file")
                index.entries(nid)


def mutate(data: bytes, change: Change, chance: random.Random) -> bytes:
    """A section changed, and the file put together again with the right checksums; seldom the bytes as they are."""
    try:
        if chance.random() < 0.1:
            raise FormatError("as it is")
        header = Header.parse(data, "input")
        parts = {Kind(kind): data[section.offset : section.end] for kind, section in header.sections.items()}
    except (FormatError, ValueError):
        return words.changed(data, chance) if chance.random() < 0.5 else change(data, LIMIT)
    payload = parts.pop(Kind.DATA, None)
    weights = (10, 4, 3, 4, 4, 1, 1, 1, 1)
    (kind,) = chance.choices([kind for kind in Kind if kind is not Kind.DATA], weights)
    old = parts[kind]
    new = words.changed(old, chance) if chance.random() < 0.6 else change(old, min(LIMIT, len(old) + 200))
    if kind is Kind.EROFS:
        new = new[: len(old)].ljust(len(old), b"\0")
    parts[kind] = new
    if kind is Kind.SPANS and payload is not None and chance.random() < 0.3:
        payload = change(payload, len(payload) + 50)
    out = io.BytesIO()
    digest = (len(payload), hashlib.sha256(payload).digest()) if payload else None
    assemble(out, dict(parts), int(header.packed), digest)
    return out.getvalue() + (bytes(-out.tell() % 8) + payload if payload else b"")


def seeds() -> Iterator[tuple[str, bytes]]:
    """Trees with something of every kind, over a raw, a gzip and a zstd layer, and with several directory blocks."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "clip"
        yield "empty", write_clip(path, TreeBuilder().finish()).read_bytes()
        built = _tree(3)
        yield "raw", write_clip(path, built).read_bytes()
        yield "gzip", write_clip(path, built, [_gzip(built)]).read_bytes()
        yield "raw in many spans", write_clip(path, built, [raw_layer(built.layer, 1000)]).read_bytes()
        yield "several directory blocks", write_clip(path, _tree(120), source="docker://x/y:z").read_bytes()
        yield "deep", write_clip(path, _deep()).read_bytes()
    yield "packed", _packed(built)


def _tree(names: int) -> Built:
    tree = TreeBuilder()
    tree.file(b"dir/file", b"contents" * 700, xattrs={b"user.name": b"value", b"security.capability": b"\1" * 20})
    tree.file(b"dir/holes", bytes(20_000), stored=[(0, 10), (9000, 100)])
    tree.add(b"hard", tree.file(b"dir/hard", b"linked"))
    tree.symlink(b"dir/link", b"../hard", xattrs={b"trusted.x": b""})
    tree.symlink(b"loop", b"loop")
    tree.symlink(b"long", b"t" * 4095)
    tree.directory(b"dir/empty", xattrs={b"system.posix_acl_default": bytes(44)})
    tree.special(b"dir/null", stat.S_IFCHR, os.makedev(1, 3))
    tree.special(b"fifo", stat.S_IFIFO)
    for number in range(names):
        tree.file(b"many/a name that takes some room %04d" % number)
    return tree.finish()


def _deep() -> Built:
    tree = TreeBuilder()
    tree.file(b"/".join(b"%d" % number for number in range(60)), b"deep")
    return tree.finish()


def _gzip(built: Built) -> Layer:
    """One member, cut in the middle: the second span passes over the first."""
    blob, half, size = gzip.compress(built.layer, mtime=0), len(built.layer) // 2, len(built.layer)
    first, second = built.layer[:half], built.layer[half:]
    spans = [
        Span(0, len(blob), 0, half, Digest.of(first).raw, window=b"a window" * 100),
        Span(0, len(blob), half, size - half, Digest.of(second).raw, skip=half, window=b"a window" * 100),
    ]
    return Layer(Digest.of(blob), Digest.of(built.layer), len(blob), size, Codec.GZIP, MEDIA_TYPE + "+gzip", spans)


def _packed(built: Built) -> bytes:
    """A clip that carries its data, a zstd frame a span."""
    spans, frames, end = list[Span](), list[bytes](), 0
    for at in range(0, len(built.layer), 4096):
        part = built.layer[at : at + 4096]
        frames.append(zstandard.compress(part))
        spans.append(Span(end, end + len(frames[-1]), at, len(part), Digest.of(part).raw))
        end += len(frames[-1])
    data = b"".join(frames)
    layer = Layer(Digest.of(data), Digest.of(built.layer), end, len(built.layer), Codec.ZSTD, MEDIA_TYPE, spans)
    told = documents([layer])
    parts: Parts = {
        Kind.EROFS: memoryview(pack(built.root, built.data_size, uuid_of(told["manifest"])))[SUPERBLOCK_OFFSET:],
        **pack_tables([layer], built.extents),
        Kind.MANIFEST: told["manifest"],
        Kind.CONFIG: told["config"],
        Kind.SOURCE: ITSELF.encode(),
    }
    out = io.BytesIO()
    assemble(out, parts, PACKED, (len(data), Digest.of(data).raw))
    return out.getvalue().ljust(-(-out.tell() // 8) * 8, b"\0") + data
