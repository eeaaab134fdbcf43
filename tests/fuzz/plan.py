"""The read plan over the tables of a .clip: it tiles every read, or the tables are damaged.

An input is a head, a record a layer, and then the tables as a .clip has them: spans, seeks, the three columns of the
extents, and after them the reads to plan, as pairs of address and length.
"""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap

from clipfs.blocks.plan import BLOCK, Piece, plan
from clipfs.errors import FormatError
from clipfs.format.check import check_extents
from clipfs.format.container import PLACE_BITS, SEEK, SPAN, Codec, Header, Kind, Section
from clipfs.format.tables import ExtentTable, SpanTable, StoredLayer
from clipfs.oci import Digest
from tests.fuzz import Change, words

LIMIT = 8 << 10

# How many layers, extents, reads and seeks there are. Of a layer: how many spans, its codec, its uncompressed size.
_HEAD = struct.Struct("<BBBB4x")
_LAYER = struct.Struct("<BB6xQ")
_READ = struct.Struct("<QQ")
# Of a read at most: a mount is asked for no more, and what reads ahead takes spans.
_LONGEST = 4 << 20
_DIGEST = Digest.of(b"")
_EXTENT = struct.Struct("<QQQ")


@dataclass(frozen=True)
class _Index:
    """What `plan` wants to know."""

    layers: Sequence[StoredLayer]
    table: ExtentTable
    data_size: int

    def extents(self, address: int, length: int) -> list[tuple[int, int, int, int]]:
        return self.table.find(address, length)

    def extent(self, layer: int, offset: int) -> range:
        return self.table.around(layer, offset)


def one(data: bytes) -> None:
    if len(data) < _HEAD.size:
        return
    count, extents, reads, seeks = _HEAD.unpack_from(data)
    spans_at = _HEAD.size + count * _LAYER.size
    if len(data) < spans_at:
        return
    told = list(_LAYER.iter_unpack(data[_HEAD.size : spans_at]))
    seeks_at = spans_at + sum(spans for spans, _, _ in told) * SPAN.size
    extents_at = seeks_at + seeks * SEEK.size
    reads_at = extents_at + extents * _EXTENT.size
    if len(data) < reads_at + reads * _READ.size:
        return
    asked = [
        (address % (1 << 45), length % _LONGEST)
        for address, length in _READ.iter_unpack(data[reads_at : reads_at + reads * _READ.size])
    ]
    with mmap(-1, len(data)) as buffer:
        buffer[:] = data
        layers = []
        header = Header({Kind.SEEKS: Section(seeks_at, extents_at - seeks_at, b""), Kind.WINDOWS: Section(0, 0, b"")})
        for spans, codec, size in told:
            layers.append(_layer(buffer, spans_at, spans, header, Codec(codec % len(Codec)), size % (1 << PLACE_BITS)))
            spans_at += spans * SPAN.size
        table = ExtentTable(buffer, Section(extents_at, reads_at - extents_at, b""), layers, "input")
        try:
            _reads(_Index(layers, table, 1 << 45), asked)
        finally:
            table.release()
            for layer in layers:
                layer.spans.release()


def _layer(buffer: mmap, at: int, count: int, header: Header, codec: Codec, size: int) -> StoredLayer:
    table = SpanTable(buffer, at, count, header, 1 << 40, size, codec, "input")
    return StoredLayer(_DIGEST, _DIGEST, 1 << 40, size, codec, "", table)


def _reads(index: _Index, asked: Sequence[tuple[int, int]]) -> None:
    sound = _is_sound(index)
    for address, length in asked:
        try:
            pieces = plan(index, address, length)
        except FormatError as error:
            if sound:
                raise AssertionError("sound tables are said to be damaged") from error
            continue
        _tiled(index, pieces, address, length)
        if sound:
            assert _joined(_placed(index, pieces)) == _joined(_expected(index, address, length))


def _is_sound(index: _Index) -> bool:
    """Whether `check` would have nothing against the tables."""
    try:
        check_extents(index.table, index.layers, index.data_size, "input")
        for layer in index.layers:
            position = 0
            for number in range(len(layer.spans)):
                start, length = layer.spans.bounds(number)
                if start != position:
                    return False
                position += length
            if position != layer.diff_size:
                return False
    except FormatError:
        return False
    return True


def _tiled(index: _Index, pieces: Sequence[Piece], address: int, length: int) -> None:
    """Pieces are in order, without gaps, none is empty, and each lies inside of its block and span."""
    at = address
    for piece in pieces:
        assert piece.start == at < piece.stop
        at = piece.stop
        if piece.key is None:
            continue
        layer, number, block = piece.key
        _, room = index.layers[layer].spans.bounds(number)
        assert 0 <= piece.inner < piece.inner + piece.stop - piece.start <= min(BLOCK, room - block * BLOCK)
        offset = index.layers[layer].spans.bounds(number)[0] + block * BLOCK + piece.inner
        found = index.extent(layer, offset)
        assert offset in found or not found
        with contextlib.suppress(FormatError):
            assert number in index.layers[layer].spans.frame(number)
            assert index.layers[layer].spans[number].length == room
    assert at == address + length


_Run = tuple[int, int, int]  # where it begins, its layer (-1: zeros), the offset there


def _placed(index: _Index, pieces: Sequence[Piece]) -> list[tuple[_Run, int]]:
    """Where the pieces are in their layers, and their lengths."""
    runs = []
    for start, stop, key, inner in pieces:
        offset = 0 if key is None else index.layers[key[0]].spans.bounds(key[1])[0] + key[2] * BLOCK + inner
        runs.append(((start, -1 if key is None else key[0], offset), stop - start))
    return runs


def _expected(index: _Index, address: int, length: int) -> list[tuple[_Run, int]]:
    """The same by looking at all extents."""
    runs, at, end = list[tuple[_Run, int]](), address, address + length
    for start, size, place in zip(index.table.starts, index.table.lengths, index.table.places, strict=True):
        low, high = max(start, address), min(start + size, end)
        if low >= high:
            continue
        if low > at:
            runs.append(((at, -1, 0), low - at))
        offset = (place & (1 << PLACE_BITS) - 1) + low - start
        runs.append(((low, place >> PLACE_BITS, offset), high - low))
        at = high
    if at < end:
        runs.append(((at, -1, 0), end - at))
    return runs


def _joined(runs: Sequence[tuple[_Run, int]]) -> list[tuple[_Run, int]]:
    """Runs that go on in the next one, as one."""
    found: list[tuple[_Run, int]] = []
    for (start, layer, offset), length in runs:
        if found:
            (first, before, place), size = found[-1]
            if layer == before and (layer < 0 or place + size == offset):
                found[-1] = (first, before, place), size + length
                continue
        found.append(((start, layer, offset), length))
    return found


def mutate(data: bytes, change: Change, chance: random.Random) -> bytes:
    """Numbers replaced, since the tables are made of nothing else."""
    return words.changed(data, chance) if chance.random() < 0.8 else change(data, LIMIT)


def seeds() -> Iterator[tuple[str, bytes]]:
    """Sound tables of several shapes, and some whose reads lie where things end."""
    for seed in range(12):
        chance = random.Random(seed)
        lengths = [
            [chance.choice((1, 100, 4096, BLOCK, BLOCK + 1, 300_000)) for _ in range(chance.randint(1, 6))]
            for _ in range(chance.randint(1, 3))
        ]
        yield f"sound {seed}", _tables(lengths, chance)
    yield "no layers", _HEAD.pack(0, 0, 1, 0) + _READ.pack(5, 4096)


def _tables(lengths: Sequence[Sequence[int]], chance: random.Random) -> bytes:
    layers, spans, seeks = b"", b"", list[bytes]()
    for each in lengths:
        layers += _LAYER.pack(len(each), chance.choice((Codec.RAW, Codec.ZSTD)), sum(each))
        position = 0
        for length in each:
            spans += SPAN.pack(position, len(seeks), length, bytes(32))
            seeks.append(SEEK.pack(position, position, 0, 0, 0))
            position += length
    extents, at = [], 0
    for _ in range(chance.randint(0, 8)):
        layer = chance.randrange(len(lengths))
        offset = chance.randrange(sum(lengths[layer]))
        size = chance.randint(1, sum(lengths[layer]) - offset)
        at += chance.choice((0, 0, 4096, 100_000))
        extents.append((at, size, layer << PLACE_BITS | offset))
        at += size
    edges = [0, at, *(start for start, _, _ in extents)]
    reads = [(max(0, chance.choice(edges) - chance.choice((0, 1, 5000))), chance.choice((1, 4096, 131_072, 1 << 20)))
             for _ in range(6)]  # fmt: skip
    columns = b"".join(struct.pack("<Q", extent[column]) for column in range(3) for extent in extents)
    head = _HEAD.pack(len(lengths), len(extents), len(reads), len(seeks))
    return head + layers + spans + b"".join(seeks) + columns + b"".join(_READ.pack(*each) for each in reads)
