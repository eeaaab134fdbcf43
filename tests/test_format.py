"""The container: header, sections, layers and spans, written and read back."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from clipfs.erofs.structs import Inode
from clipfs.errors import FormatError, ImageError
from clipfs.format import container as clip_format
from clipfs.format.container import HEADER, SECTION, Codec, Header, Layer, Section, Span
from clipfs.format.index import Index
from clipfs.format.pack import write
from clipfs.oci import Digest
from tests.clips import Built, TreeBuilder, documents, raw_layer, reseal, write_clip

# Of the clip that `small` makes. When this changes, the format has changed: see "Versions" in docs/format.md.
GOLDEN = "d3b23a8aff8a7e77626342027547f5d2fa42023bebe726a15432ddb2a9ad1505"


def small() -> Built:
    tree = TreeBuilder(mtime_ns=1)
    tree.file(b"etc/hostname", b"clip\n", uid=1, xattrs={b"user.a": b"b"})
    tree.symlink(b"etc/name", b"hostname")
    tree.special(b"dev/null", stat.S_IFCHR, os.makedev(1, 3))
    return tree.finish()


def layers_of_all_kinds() -> list[Layer]:
    def digest(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    sparse = bytes(20_000) + b"window" * 50
    gzip = [
        Span(0, 700, 0, 4096, digest("a")),
        Span(699, 1400, 4096, 1, digest("b"), bit=7, window=sparse),
        Span(1400, 9000, 4097, 2**32 - 1, digest("c"), window=os.urandom(32_768)),
    ]
    zstd = [Span(0, 10, 0, 5, digest("d")), Span(0, 30, 5, 7, digest("e"), skip=5)]
    names = [f"application/vnd.oci.image.layer.v1.tar{suffix}" for suffix in ("+gzip", "+zstd", "")]
    sha512 = Digest("sha512", hashlib.sha512(b"x").hexdigest())
    return [
        Layer(Digest.of(b"1"), Digest.of(b"2"), 9000, 4096 + 2**32, Codec.GZIP, names[0], gzip),
        Layer(Digest.of(b"3"), sha512, 31, 12, Codec.ZSTD, names[1], zstd),
        Layer(sha512, Digest.of(b""), 0, 0, Codec.RAW, names[2], []),
        raw_layer(b"plain" * 500_000),
    ]


@pytest.fixture
def clip(tmp_path: Path) -> bytearray:
    return bytearray(write_clip(tmp_path / "small.clip", small()).read_bytes())


def opened(tmp_path: Path, content: bytes) -> Index:
    path = tmp_path / "opened.clip"
    path.write_bytes(content)
    return Index.open(path)


def test_layers_and_spans_survive(tmp_path: Path) -> None:
    layers = layers_of_all_kinds()
    path = write_clip(tmp_path / "x.clip", TreeBuilder().finish(), layers)
    with Index.open(path) as index:
        index.check()
        for found, wanted in zip(index.layers, layers, strict=True):
            assert replace(wanted, spans=[]) == Layer(
                found.digest, found.diff_id, found.size, found.diff_size, found.codec, found.media_type, []
            )
            assert list(found.spans) == list(wanted.spans)


def test_documents_survive_verbatim(tmp_path: Path) -> None:
    """The source may be a path, and paths need not be UTF-8."""
    source = os.fsdecode(b"oci:/images/\xff\xc3\xa4:1")
    built = small()
    texts = documents([raw_layer(built.layer)])
    with Index.open(write_clip(tmp_path / "x.clip", built, source=source)) as index:
        assert index.source == source
        assert index.manifest.raw == texts["manifest"]
        assert index.config.raw == texts["config"]
        assert index.config.architecture == "amd64"


def test_writing_is_deterministic(tmp_path: Path) -> None:
    one = write_clip(tmp_path / "1.clip", small(), layers_of_all_kinds()[1:])
    other = write_clip(tmp_path / "2.clip", small(), layers_of_all_kinds()[1:])
    assert one.read_bytes() == other.read_bytes()


def test_the_format_is_what_it_was(clip: bytearray) -> None:
    assert hashlib.sha256(clip).hexdigest() == GOLDEN


def test_writing_needs_no_seeking(clip: bytearray) -> None:
    class Pipe(io.BytesIO):
        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

    built = small()
    layers = [raw_layer(built.layer)]
    pipe = Pipe()
    write(
        pipe,
        root=built.root,
        extents=built.extents,
        data_size=built.data_size,
        layers=layers,
        source="oci:/image:1",
        **documents(layers),
    )
    assert pipe.getvalue() == clip


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a .clip"),
        (b"\x89CLIP\r\n\x1a\n", "not a .clip"),
        (b"PK\3\4" + bytes(5000), "not a .clip"),
        # As a transfer in text mode leaves it.
        (b"\x89CLIP\n\x1a\n" + bytes(5000), "not a .clip"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        opened(tmp_path, content)


def resigned(clip: bytearray) -> bytes:
    """The header's checksum made right for whatever is in it now."""
    clip[992:1024] = hashlib.sha256(clip[:992]).digest()
    return bytes(clip)


@pytest.mark.parametrize("version", [0, 1, 2, 4, 2**32 - 1])
def test_other_versions_are_refused(tmp_path: Path, clip: bytearray, version: int) -> None:
    clip[12:16] = version.to_bytes(4, "little")
    with pytest.raises(
        FormatError, match=rf"format version {version}; this clipfs reads version 3: make it of its image again"
    ):
        opened(tmp_path, resigned(clip))


@pytest.mark.parametrize("bit", range(1, 32))
def test_unknown_features_are_refused(tmp_path: Path, clip: bytearray, bit: int) -> None:
    clip[16:20] = (1 << bit).to_bytes(4, "little")
    with pytest.raises(FormatError, match=f"features {1 << bit:#x}"):
        opened(tmp_path, resigned(clip))


def test_unknown_compatible_features_are_not(tmp_path: Path, clip: bytearray) -> None:
    clip[20:24] = b"\xff" * 4
    with opened(tmp_path, resigned(clip)) as index:
        index.check()


def test_a_section_of_an_unknown_kind_is_passed_over(tmp_path: Path, clip: bytearray) -> None:
    """The seam for what later versions add without making it necessary."""
    count = HEADER.unpack_from(clip)[5]
    clip += bytes(-len(clip) % 8)
    digest = hashlib.sha256(b"new").digest()
    SECTION.pack_into(clip, HEADER.size + count * SECTION.size, 4711, 0, len(clip), 3, digest)
    clip += b"new"
    clip[:40] = HEADER.pack(clip_format.MAGIC, clip_format.VERSION, 0, 0, len(clip), count + 1, 0)
    with opened(tmp_path, resigned(clip)) as index:
        index.check()


@pytest.mark.parametrize("change", [-1, -1000, 1])
def test_another_length_is_refused(tmp_path: Path, clip: bytearray, change: int) -> None:
    content = bytes(clip[:change] if change < 0 else clip + bytes(change))
    with pytest.raises(FormatError, match=f"should have {len(clip)} bytes and has {len(content)}"):
        opened(tmp_path, content)


def test_every_byte_of_the_header_counts(tmp_path: Path, clip: bytearray) -> None:
    """And zero bytes at its end are part of it."""
    for at in range(1024):
        clip[at] ^= 0x10
        with pytest.raises(FormatError):
            opened(tmp_path, bytes(clip))
        clip[at] ^= 0x10
    opened(tmp_path, bytes(clip)).close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, 2),  # the kind: twice the same, none that is missing
        (0, 4711),
        (1, 1),  # flags
        (2, 0),  # offset
        (2, 1024),
        (2, 2**64 - 8),
        (3, 0),  # length
        (3, 2**64 - 1),
        (3, 2**63),
    ],
)
@pytest.mark.parametrize("number", range(8))
def test_a_section_table_that_cannot_be_is_refused(
    tmp_path: Path, clip: bytearray, number: int, field: int, value: int
) -> None:
    at = HEADER.size + number * SECTION.size
    entry = list(SECTION.unpack_from(clip, at))
    if entry[field] == value:
        value ^= 1
    entry[field] = value
    SECTION.pack_into(clip, at, *entry)
    with pytest.raises(FormatError, match="damaged"):
        opened(tmp_path, resigned(clip))


@pytest.mark.parametrize("count", [0, 1, 8, 10, 16, 17, 2**32 - 1])
def test_a_section_count_that_cannot_be_is_refused(tmp_path: Path, clip: bytearray, count: int) -> None:
    clip[32:36] = count.to_bytes(4, "little")
    with pytest.raises(FormatError, match="damaged"):
        opened(tmp_path, resigned(clip))


def test_the_header_has_room_for_what_is_to_come() -> None:
    assert len(clip_format.Kind) + 6 <= clip_format.MAX_SECTIONS
    sections = [(kind, Section(1024, 0, bytes(32))) for kind in clip_format.Kind]
    assert len(Header.pack(sections)) == 1024


def test_resealing_an_honest_clip_changes_nothing(clip: bytearray) -> None:
    """Otherwise the tests of damage would test something else."""
    assert reseal(bytearray(clip)) == clip


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([replace(raw_layer(b"x"), media_type="m" * 256)], "media type"),
        ([replace(raw_layer(b"x"), spans=[Span(0, 1, 0, 2**32, bytes(32))])], "4 GiB"),
        ([replace(raw_layer(b"x"), diff_size=2**48)], "256 TiB"),
        ([raw_layer(b"")] * 65_537, "65,536 layers"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(layers: Sequence[Layer], reason: str) -> None:
    root = Inode(stat.S_IFDIR | 0o755, children={}, nlink=2)
    with pytest.raises(ImageError, match=reason):
        write(io.BytesIO(), root=root, extents=[], data_size=0, layers=layers, manifest=b"", config=b"", source="x")


def test_the_size_of_an_index(tmp_path: Path) -> None:
    """At most 140 bytes an inode with its extent, for a tree like /usr: nine entries a directory, names of 17 bytes."""
    tree = TreeBuilder()
    count = 20_000
    for number in range(count):
        tree.file(b"share/package-%05d/a-file-called-%03d" % (number // 8, number % 8), b"content")
    built = tree.finish()
    size = write_clip(tmp_path / "x.clip", built).stat().st_size
    assert size / (count + count // 8) <= 140


def test_windows_take_little_room(tmp_path: Path) -> None:
    """Sparse windows, as seek points have them, are mostly zeros."""
    window = bytearray(32_768)
    for at in range(0, 32_768, 1_500):
        window[at : at + 30] = os.urandom(30)
    spans = [
        Span(n * 1_000_000, (n + 1) * 1_000_000, n << 22, 1 << 22, bytes(32), window=bytes(window)) for n in range(100)
    ]
    digest = Digest.of(b"")
    layer = Layer(digest, digest, 100_000_000, 100 << 22, Codec.GZIP, "x", spans)
    with_spans = write_clip(tmp_path / "1.clip", small(), [layer]).stat().st_size
    without = write_clip(tmp_path / "2.clip", small(), [replace(layer, spans=[])]).stat().st_size
    assert with_spans - without <= 0.003 * layer.size
