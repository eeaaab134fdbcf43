"""Damaged and hostile ``.clip`` files: whatever is in them, there is a FormatError or an answer, and soon.

Most files here are forged: changed, and then given the right checksums. What is honest but for a checksum comes first.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from clipfs.cli.main import main
from clipfs.erofs.structs import (
    BLOCK,
    DEVICE,
    DEVICE_OFFSET,
    DIRENT,
    INODE,
    SUPERBLOCK,
    SUPERBLOCK_OFFSET,
    XATTR_HEADER,
)
from clipfs.errors import FormatError
from clipfs.format.container import LAYER, SEEK, SPAN, Codec, Extent, Header, Kind, Layer, Section, Span
from clipfs.format.index import Index
from clipfs.format.pack import assemble
from clipfs.oci import Digest
from tests.clips import MEDIA_TYPE, Built, TreeBuilder, raw_layer, reseal, write_clip

# Of processor time, for going through a small file that is wrong in any way; an honest one takes a hundredth.
_SECONDS = 1.0


def drain(index: Index) -> None:
    """Ask an index everything that it can be asked."""
    nodes = dict.fromkeys(node for _, node in index.walk())
    for node in nodes:
        index.xattrs(node.nid)
        if stat.S_ISLNK(node.mode):
            index.readlink(node.nid)
        elif stat.S_ISDIR(node.mode):
            index.parent(node.nid)
            for name, _ in index.entries(node.nid):
                index.lookup(node.nid, name)
        elif node.size:
            index.extents(node.address, node.size)
    for path in (b"dir/link", b"dir/../dir/link", b"dir/file"):
        with contextlib.suppress(OSError):
            index.resolve(path)
    for layer in index.layers:
        for number, span in enumerate(layer.spans):
            layer.spans.bounds(number)
            layer.spans.find(span.position)
    _ = index.manifest, index.config, index.source


def verdict(path: Path, content: bytes) -> str:
    """What `check` says, after everything else was tried too: it must hold without a check."""
    path.write_bytes(content)
    started = time.process_time()
    try:
        with Index.open(path) as index:
            with contextlib.suppress(FormatError):
                drain(index)
            index.check()
    except FormatError as error:
        return str(error)
    finally:
        assert time.process_time() - started < _SECONDS
    return ""


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Small, so that it can be damaged in every place, with an instance of every structure."""
    tree = TreeBuilder()
    tree.file(b"dir/file", b"contents" * 700, xattrs={b"user.name": b"value"})
    tree.add(b"hard", tree.file(b"dir/hard", b"linked"))
    tree.symlink(b"dir/link", b"file")
    tree.directory(b"dir/empty")
    tree.special(b"dir/null", stat.S_IFCHR, os.makedev(1, 3))
    tree.special(b"fifo", stat.S_IFIFO)
    built = tree.finish()
    gzip = gzip_layer(built)
    path = write_clip(tmp_path_factory.mktemp("check") / "honest.clip", built, [gzip, raw_layer(b"raw")])
    assert verdict(path, path.read_bytes()) == ""
    return path.read_bytes()


def gzip_layer(built: Built) -> Layer:
    size = len(built.layer)
    spans = [Span(0, 50, 0, 100, bytes(32)), Span(49, 99, 100, size - 100, bytes(32), bit=3, window=b"w" * 32_768)]
    digest = Digest.of(built.layer)
    return Layer(digest, digest, 100, size, Codec.GZIP, "application/vnd.oci.image.layer.v1.tar+gzip", spans)


def sections_of(clip: bytes) -> dict[int, Section]:
    """The table of an honest file; the mapping is only for the type's sake, bytes do."""
    return Header.parse(clip, "").sections


def forge(honest: bytes, kind: Kind, change: Callable[[bytearray], None]) -> bytes:
    """The file with one section changed in place."""
    section = sections_of(honest)[kind]
    content = bytearray(honest[section.offset : section.end])
    change(content)
    return reseal(bytearray(honest[: section.offset] + content + honest[section.end :]))


# --- without forging


def test_any_changed_byte_is_noticed(honest: bytes, tmp_path: Path) -> None:
    clip = bytearray(honest)
    for at in range(1024, len(clip), 7):
        clip[at] ^= 0x40
        assert verdict(tmp_path / "x.clip", bytes(clip))
        clip[at] ^= 0x40


# --- every byte, forged


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.EROFS, Kind.DATA)])
def test_no_byte_of_a_table_does_harm(honest: bytes, tmp_path: Path, kind: Kind) -> None:
    section = sections_of(honest)[kind]
    noticed = 0
    for at in range(section.length):
        for flip in (0x01, 0x80, 0xFF):

            def change(content: bytearray, at: int = at, flip: int = flip) -> None:
                content[at] ^= flip

            noticed += bool(verdict(tmp_path / "x.clip", forge(honest, kind, change)))
    assert noticed > section.length // 8 or kind is Kind.SOURCE


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_no_byte_of_the_tree_does_harm(honest: bytes, tmp_path: Path, flip: int) -> None:
    """Only bytes that mean something are flipped, and zeros around them: most of a block is neither."""
    section = sections_of(honest)[Kind.EROFS]
    noticed = 0
    for at in range(section.length):
        if not any(honest[section.offset + at - 8 : section.offset + at + 1]):
            continue

        def change(content: bytearray, at: int = at) -> None:
            content[at] ^= flip

        noticed += bool(verdict(tmp_path / "x.clip", forge(honest, Kind.EROFS, change)))
    assert noticed > 200


# --- every field that has wrong values, forged: (structure, field number, values)

_SUPERBLOCK_FIELDS = {
    "magic": (0, 0),
    "checksum": (1, 1),
    "compatible features": (2, 0, 3, 6, 2**32 - 1),
    "block size": (3, 9, 13, 255),
    "extension slots": (4, 1, 255),
    "root": (5, 0, 1, 39, 41, 0xFFFF),
    "inodes": (6, 0, 7, 9, 2**64 - 1),
    "blocks": (9, 0, 2, 2**32 - 1),
    "time of inodes": (7, 1),
    "nanoseconds of inodes": (8, 1),
    "metadata address": (10, 1, 2**32 - 1),
    "xattr address": (11, 1),
    "volume": (13, bytes(16)),
    "features": (14, 0, 0x4, 0xC, 0x108, 2**32 - 1),
    "compression": (15, 1),
    "devices": (16, 0, 2, 0xFFFF),
    "device slot": (17, 0, 8, 10, 0xFFFF),
    "directory block size": (18, 1),
    "xattr prefixes": (19, 1),
    "start of xattr prefixes": (20, 1),
    "packed inode": (21, 1, 40),
}


@pytest.mark.parametrize(
    ("field", "value"), [(fields[0], value) for fields in _SUPERBLOCK_FIELDS.values() for value in fields[1:]]
)
def test_superblock_fields(honest: bytes, tmp_path: Path, field: int, value: int | bytes) -> None:
    def change(content: bytearray) -> None:
        fields = list(SUPERBLOCK.unpack_from(content))
        assert fields[field] != value
        fields[field] = value
        SUPERBLOCK.pack_into(content, 0, *fields)

    assert verdict(tmp_path / "x.clip", forge(honest, Kind.EROFS, change))


@pytest.mark.parametrize(("field", "value"), [(1, 0), (1, 1), (1, 2**32 - 1), (2, 0), (2, 2**32 - 1)])
def test_device_fields(honest: bytes, tmp_path: Path, field: int, value: int) -> None:
    def change(content: bytearray) -> None:
        fields = list(DEVICE.unpack_from(content, DEVICE_OFFSET - SUPERBLOCK_OFFSET))
        fields[field] = value
        DEVICE.pack_into(content, DEVICE_OFFSET - SUPERBLOCK_OFFSET, *fields)

    assert verdict(tmp_path / "x.clip", forge(honest, Kind.EROFS, change))


_TAIL_OF_THE_SUPERBLOCK = range(SUPERBLOCK.size - 24, SUPERBLOCK.size)
_TAIL_OF_THE_DEVICE = range(SUPERBLOCK.size + DEVICE.size - 56, SUPERBLOCK.size + DEVICE.size)


@pytest.mark.parametrize("at", [*_TAIL_OF_THE_SUPERBLOCK, *_TAIL_OF_THE_DEVICE])
def test_what_only_later_kernels_know_of_the_superblock(honest: bytes, tmp_path: Path, at: int) -> None:
    def change(content: bytearray) -> None:
        content[at] = 1

    assert "superblock" in verdict(tmp_path / "x.clip", forge(honest, Kind.EROFS, change))


@pytest.mark.parametrize("at", [6, 7, *range(20, 24), *range(48, 64)])
@pytest.mark.parametrize("path", [b"", b"dir/file", b"dir/link", b"fifo"])
def test_what_only_later_kernels_know_of_inodes(honest: bytes, tmp_path: Path, path: bytes, at: int) -> None:
    """Bytes 6 and 7, for one, are the upper half of a block address since Linux 6.15."""
    at += nid_of(honest, tmp_path, path) * 32 - SUPERBLOCK_OFFSET

    def change(content: bytearray) -> None:
        content[at] = 1

    assert "where inodes have nothing" in verdict(tmp_path / "x.clip", forge(honest, Kind.EROFS, change))


@pytest.mark.parametrize("at", range(XATTR_HEADER))
def test_the_header_of_xattrs(honest: bytes, tmp_path: Path, at: int) -> None:
    """Its first four bytes can hide names of xattrs that are there, and the fifth adds some from elsewhere."""
    at += nid_of(honest, tmp_path, b"dir/file") * 32 + INODE.size - SUPERBLOCK_OFFSET

    def change(content: bytearray) -> None:
        content[at] = 1

    assert "xattrs are" in verdict(tmp_path / "x.clip", forge(honest, Kind.EROFS, change))


# INODE's fields: 0 format, 1 xattrs, 2 mode, 4 size, 5 union, 9 seconds, 10 nanoseconds, 11 links.
_INODE_VALUES = [
    *((path, 0, value) for path in (b"", b"dir/file", b"dir/link", b"fifo") for value in (0, 2, 3, 4, 7, 9, 0xFFFF)),
    *((path, 0, 5) for path in (b"dir/file", b"fifo", b"dir/null")),
    *((path, 1, value) for path in (b"", b"dir", b"dir/file", b"dir/link") for value in (1, 2, 300, 0xFFFF)),
    *((path, 2, value) for path in (b"", b"dir", b"dir/file", b"dir/link") for value in (0, 0o644, 0o170000, 0o020644)),
    (b"", 2, 0o100644),
    (b"dir", 2, 0o100755),
    (b"dir/file", 2, 0o040755),
    (b"dir/file", 2, 0o120777),
    (b"dir/link", 2, 0o040755),
    (b"dir/null", 2, 0o060640),
    *((path, 4, value) for path in (b"", b"dir", b"dir/link") for value in (0, 4096, 4097, 2**31, 2**64 - 1)),
    *((path, 4, value) for path in (b"", b"dir") for value in (1, 12, 13)),
    *((b"dir/file", 4, value) for value in (2 * BLOCK + BLOCK + 1, 2**32, 2**63, 2**64 - 1)),
    (b"fifo", 4, 1),
    (b"dir/null", 5, 0),
    *((b"dir/file", 5, value) for value in (0, 1, 2**20 - 1, 2**20 + 2, 2**32 - 1)),
    *((path, 10, value) for path in (b"", b"dir/file") for value in (10**9, 2**32 - 1)),
    *((path, 11, value) for path in (b"", b"dir", b"dir/file", b"dir/hard", b"fifo") for value in (0, 5, 2**32 - 1)),
]  # fmt: skip


@pytest.mark.parametrize(("path", "field", "value"), _INODE_VALUES)
def test_inode_fields(honest: bytes, tmp_path: Path, path: bytes, field: int, value: int) -> None:
    at = nid_of(honest, tmp_path, path) * 32 - SUPERBLOCK_OFFSET

    def change(content: bytearray) -> None:
        fields = list(INODE.unpack_from(content, at))
        assert fields[field] != value
        fields[field] = value
        INODE.pack_into(content, at, *fields)

    assert verdict(tmp_path / "x.clip", forge(honest, Kind.EROFS, change))


def nid_of(clip: bytes, tmp_path: Path, path: bytes) -> int:
    file = tmp_path / "honest.clip"
    file.write_bytes(clip)
    with Index.open(file) as index:
        return index.resolve(path, follow=False)


def dirents_forged(honest: bytes, tmp_path: Path, change: Callable[[bytearray, dict[bytes, int]], None]) -> bytes:
    """The file with the entries of `dir` changed. `change` is given them and where each name's entry is in them."""
    at = nid_of(honest, tmp_path, b"dir") * 32 + 64 - SUPERBLOCK_OFFSET

    def all_of_it(content: bytearray) -> None:
        size = struct.unpack_from("<Q", content, at - 64 + 8)[0]
        entries = content[at : at + size]
        head = struct.unpack_from("<H", entries, 8)[0]
        names = bytes(entries[head:])
        offsets = [struct.unpack_from("<H", entries, number + 8)[0] for number in range(0, head, DIRENT.size)]
        ends = [*offsets[1:], size]
        places = {
            names[start - head : end - head]: number * DIRENT.size
            for number, (start, end) in enumerate(zip(offsets, ends, strict=True))
        }
        change(entries, places)
        assert len(entries) == size
        content[at : at + size] = entries

    return forge(honest, Kind.EROFS, all_of_it)


@pytest.mark.parametrize("name", [b".", b"..", b"empty", b"file", b"null"])
@pytest.mark.parametrize("nid", [0, 1, 39, 41, 2**32, 2**63, 2**64 - 1])
def test_an_entry_that_leads_nowhere(honest: bytes, tmp_path: Path, name: bytes, nid: int) -> None:
    def change(entries: bytearray, places: dict[bytes, int]) -> None:
        struct.pack_into("<Q", entries, places[name], nid)

    assert verdict(tmp_path / "x.clip", dirents_forged(honest, tmp_path, change))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, target) for name in (b"empty", b"file", b"null") for target in (b"", b"dir", b"fifo", b"dir/hard")),
        *((b"..", target) for target in (b"dir", b"dir/empty", b"dir/file", b"fifo")),
    ],
)
def test_an_entry_that_leads_to_the_wrong_place(honest: bytes, tmp_path: Path, name: bytes, target: bytes) -> None:
    """Loops among them: a directory inside itself."""
    nid = nid_of(honest, tmp_path, target)

    def change(entries: bytearray, places: dict[bytes, int]) -> None:
        struct.pack_into("<Q", entries, places[name], nid)

    assert verdict(tmp_path / "x.clip", dirents_forged(honest, tmp_path, change))


def test_a_directory_inside_itself_is_not_listed_for_ever(
    honest: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nid = nid_of(honest, tmp_path, b"dir")

    def change(entries: bytearray, places: dict[bytes, int]) -> None:
        struct.pack_into("<Q", entries, places[b"empty"], nid)

    (tmp_path / "x.clip").write_bytes(dirents_forged(honest, tmp_path, change))
    for place in ("/", "dir"):
        assert main(["ls", "-R", str(tmp_path / "x.clip"), place]) == 65
        assert "its directories contain each other" in capsys.readouterr().err


@pytest.mark.parametrize("name", [b".", b"empty", b"null"])
@pytest.mark.parametrize("offset", [0, 1, 12, 13, 71, 73, 4095, 0xFFFF])
def test_an_entry_with_another_name_offset(honest: bytes, tmp_path: Path, name: bytes, offset: int) -> None:
    def change(entries: bytearray, places: dict[bytes, int]) -> None:
        struct.pack_into("<H", entries, places[name] + 8, offset)

    assert verdict(tmp_path / "x.clip", dirents_forged(honest, tmp_path, change))


@pytest.mark.parametrize("name", [b".", b"..", b"file", b"link", b"null"])
@pytest.mark.parametrize("kind", [0, 4, 8, 255])
def test_an_entry_of_another_type(honest: bytes, tmp_path: Path, name: bytes, kind: int) -> None:
    def change(entries: bytearray, places: dict[bytes, int]) -> None:
        entries[places[name] + 10] = kind

    assert verdict(tmp_path / "x.clip", dirents_forged(honest, tmp_path, change))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"empty", b"zmpty"),  # no longer in order
        (b"file", b"fi/e"),
        (b"file", b"fi\0e"),
        (b"null", b"\0\0\0\0"),
        (b"hard", b"file"),  # twice
    ],
)
def test_an_entry_with_a_name_that_cannot_be(honest: bytes, tmp_path: Path, old: bytes, new: bytes) -> None:
    def change(entries: bytearray, _: dict[bytes, int]) -> None:
        assert old in entries
        entries[:] = entries.replace(old, new, 1)

    assert verdict(tmp_path / "x.clip", dirents_forged(honest, tmp_path, change))


@pytest.mark.parametrize("name", [b"trusted.overlay.x", b"user.overlay.x"])
def test_xattrs_that_overlayfs_would_obey(tmp_path: Path, name: bytes) -> None:
    """The writer refuses them, so a name of the same length is forged."""
    tree = TreeBuilder()
    tree.file(b"file", b"", xattrs={name.replace(b"overlay", b"0verlay"): b"y"})
    clip = write_clip(tmp_path / "x.clip", tree.finish()).read_bytes()
    forged = reseal(bytearray(clip.replace(b"0verlay", b"overlay")))
    assert "xattr" in verdict(tmp_path / "x.clip", forged)


# --- large directories


def large_directory(tmp_path: Path) -> bytes:
    tree = TreeBuilder()
    for number in range(1_000):
        tree.file(b"%05d" % number)
    return write_clip(tmp_path / "large.clip", tree.finish()).read_bytes()


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_no_byte_of_a_directory_block_does_harm(tmp_path: Path, flip: int) -> None:
    clip = large_directory(tmp_path)
    end = sections_of(clip)[Kind.EROFS].end - SUPERBLOCK_OFFSET
    noticed = 0
    places = [*range(end - 2 * BLOCK, end - 2 * BLOCK + 40), *range(end - BLOCK, end, 97)]
    for at in places:

        def change(content: bytearray, at: int = at) -> None:
            content[at] ^= flip

        noticed += bool(verdict(tmp_path / "x.clip", forge(clip, Kind.EROFS, change)))
    assert noticed > len(places) * 0.8


def test_directories_that_share_their_entries_end_soon(tmp_path: Path) -> None:
    """Each of 300 directories claims the entries of a large one as its own: followed, that would be 300 times 3000."""
    tree = TreeBuilder()
    for number in range(3_000):
        tree.file(b"large/%05d" % number)
    for number in range(300):
        tree.directory(b"d%d" % number)
    clip = write_clip(tmp_path / "x.clip", tree.finish()).read_bytes()
    large = nid_of(clip, tmp_path, b"large")
    others = [nid_of(clip, tmp_path, b"d%d" % number) for number in range(300)]

    def change(content: bytearray) -> None:
        stolen = content[large * 32 - 1024 : large * 32 - 1024 + 64]
        for nid in others:
            size = struct.unpack_from("<Q", stolen, 8)[0] // BLOCK * BLOCK
            at = nid * 32 - 1024
            content[at : at + 64] = stolen
            # Without the inline tail, which is elsewhere.
            struct.pack_into("<HxxxxxxQ", content, at, 1, size)

    forged = forge(clip, Kind.EROFS, change)
    path = tmp_path / "forged.clip"
    assert verdict(path, forged)
    with Index.open(path) as index, pytest.raises(FormatError, match="share"):
        for _ in index.walk():
            pass


# --- tables


@pytest.mark.parametrize(
    "extents",
    [
        [Extent(0, 0, 0, 0)],
        [Extent(0, 0, 9_999, 2)],
        [Extent(0, 0, 2**48 - 1, 1)],
        [Extent(0, 1, 0, 1)],
        [Extent(0, 0, 0, 2**64 - 1)],
        [Extent(4096, 0, 0, 1), Extent(0, 0, 0, 1)],
        [Extent(0, 0, 0, 10), Extent(9, 0, 0, 10)],
        [Extent(8191, 0, 0, 2)],
        [Extent(2**64 - 1, 0, 0, 1)],
    ],
)
def test_extents_that_cannot_be(tmp_path: Path, extents: list[Extent]) -> None:
    built = Built(TreeBuilder().finish().root, extents, 8192, bytes(10_000))
    assert "extent" in verdict(tmp_path / "x.clip", write_clip(tmp_path / "y.clip", built).read_bytes())


def test_names_that_go_down_from_one_block_to_the_next(tmp_path: Path) -> None:
    """Whoever looks a name up goes by the first of each block."""
    tree = TreeBuilder()
    for number in range(100):
        tree.file(b"dir/%03d-%s" % (number, b"x" * 60), b"")
    clip = write_clip(tmp_path / "y.clip", tree.finish()).read_bytes()
    with Index.open(tmp_path / "y.clip") as index:
        node = index.inode(index.resolve(b"dir"))
        names, _, _ = index._tree.dirents(node, index._tree.content(node), 1)
    assert names[0] > b"000"

    def change(content: bytearray) -> None:
        at = content.index(names[0])
        content[at : at + 3] = b"000"

    assert "not in order" in verdict(tmp_path / "x.clip", forge(clip, Kind.EROFS, change))


_GOOD = [Span(0, 10, 0, 5, bytes(32)), Span(10, 20, 5, 5, bytes(32))]


@pytest.mark.parametrize(
    ("codec", "spans"),
    [
        (Codec.GZIP, []),
        (Codec.GZIP, _GOOD[1:]),
        (Codec.GZIP, _GOOD[::-1]),
        (Codec.GZIP, [replace(_GOOD[0], start=5), replace(_GOOD[1], start=0)]),
        (Codec.GZIP, [*_GOOD, Span(20, 20, 10, 1, bytes(32))]),
        (Codec.GZIP, [_GOOD[0], replace(_GOOD[1], position=0)]),
        (Codec.GZIP, [_GOOD[0], replace(_GOOD[1], position=2**62)]),
        (Codec.GZIP, [_GOOD[0], replace(_GOOD[1], end=21)]),
        (Codec.GZIP, [_GOOD[0], replace(_GOOD[1], start=15, end=21)]),
        (Codec.GZIP, [_GOOD[0], replace(_GOOD[1], bit=8)]),
        (Codec.GZIP, [_GOOD[0], replace(_GOOD[1], skip=2**32)]),
        (Codec.GZIP, [_GOOD[0], replace(_GOOD[1], window=bytes(32_769))]),
        (Codec.ZSTD, [_GOOD[0], replace(_GOOD[1], bit=1)]),
        (Codec.ZSTD, [_GOOD[0], replace(_GOOD[1], window=b"w")]),
        (Codec.RAW, _GOOD),
    ],
)
def test_spans_that_cannot_be(tmp_path: Path, codec: Codec, spans: list[Span]) -> None:
    layer = Layer(Digest.of(b""), Digest.of(b""), 20, 10, codec, MEDIA_TYPE, spans)
    clip = write_clip(tmp_path / "y.clip", TreeBuilder().finish(), [layer]).read_bytes()
    assert "span" in (found := verdict(tmp_path / "x.clip", clip)) or "window" in found


def test_spans_that_can_be(tmp_path: Path) -> None:
    """The table above is about what it changes."""
    layer = Layer(Digest.of(b""), Digest.of(b""), 20, 10, Codec.GZIP, MEDIA_TYPE, _GOOD)
    clip = write_clip(tmp_path / "y.clip", TreeBuilder().finish(), [layer]).read_bytes()
    assert verdict(tmp_path / "x.clip", clip) == ""


def test_a_window_that_claims_to_be_huge(honest: bytes, tmp_path: Path) -> None:
    """A zstd frame may say that it holds 2**62 bytes; nobody may try to make room for that."""

    def change(content: bytearray) -> None:
        content[:13] = b"\x28\xb5\x2f\xfd\xe0" + (2**62).to_bytes(8, "little")

    assert "window" in verdict(tmp_path / "x.clip", forge(honest, Kind.WINDOWS, change))


@pytest.mark.parametrize(("field", "values"), [(2, (2**63, 2**64 - 1)), (3, (1, 2**31, 2**32 - 1))])
def test_a_window_that_is_elsewhere(honest: bytes, tmp_path: Path, field: int, values: tuple[int, ...]) -> None:
    for value in values:

        def change(content: bytearray, value: int = value) -> None:
            fields = list(SEEK.unpack_from(content, SEEK.size))
            fields[field] = value
            SEEK.pack_into(content, SEEK.size, *fields)

        assert "window" in verdict(tmp_path / "x.clip", forge(honest, Kind.SEEKS, change))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        *((0, position, "span") for position in (1, 2**48, 2**63, 2**64 - 1)),
        *((1, seek, "begins nowhere") for seek in (3, 2**31, 2**32 - 1)),
        *((2, taken, "span") for taken in (0, 4, 2**32 - 1)),
    ],
)
def test_span_fields(honest: bytes, tmp_path: Path, field: int, value: int, words: str) -> None:
    def change(content: bytearray) -> None:
        fields = list(SPAN.unpack_from(content, len(content) - SPAN.size))
        fields[field] = value
        SPAN.pack_into(content, len(content) - SPAN.size, *fields)

    assert words in verdict(tmp_path / "x.clip", forge(honest, Kind.SPANS, change))


def test_half_a_place_to_begin_at(honest: bytes, tmp_path: Path) -> None:
    header = Header.parse(honest, "honest")
    parts = {Kind(kind): honest[section.offset : section.end] for kind, section in header.sections.items()}
    out = io.BytesIO()
    assemble(out, {**parts, Kind.SEEKS: parts[Kind.SEEKS][:-1]})
    assert "do not match" in verdict(tmp_path / "x.clip", out.getvalue())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, 0), (0, 3), (0, 2), (1, 0), (1, 255), (2, 3), (2, 255), (3, bytes(64)), (4, bytes(64)), (5, 0), (5, 98),
        (6, 0), (6, 2**48), (6, 2**64 - 1), (7, 0), (7, 1), (7, 3), (7, 4), (7, 2**61), (7, 2**64 - 1), (8, 1),
        (9, 0), (9, 255), (10, b"\xff" * 255),
    ],
)  # fmt: skip
def test_layer_fields(honest: bytes, tmp_path: Path, field: int, value: int | bytes) -> None:
    def change(content: bytearray) -> None:
        fields = list(LAYER.unpack_from(content))
        assert fields[field] != value
        fields[field] = value
        LAYER.pack_into(content, 0, *fields)

    assert "damaged" in verdict(tmp_path / "x.clip", forge(honest, Kind.LAYERS, change))


@pytest.mark.parametrize("kind", [Kind.MANIFEST, Kind.CONFIG])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"not JSON", b"\xff\xfe", b'{"layers": 1}'])
def test_documents_that_are_none(honest: bytes, tmp_path: Path, kind: Kind, content: bytes) -> None:
    def change(old: bytearray) -> None:
        old[:] = content.ljust(len(old))

    assert kind.name.lower() in verdict(tmp_path / "x.clip", forge(honest, kind, change))
