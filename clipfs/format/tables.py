"""The tables of a ``.clip`` beside its tree: layers, spans and extents, read in place from the mapped file.

This module knows how records are encoded and checks each one when it is read. Nothing here is proportional to the size
of the image: a record is decoded when somebody asks for it.

Numbers that are bisected stay where they are and are seen through memoryviews. A mapped file can not be closed while
one is left, so whoever makes a table releases it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap

import zstandard

from clipfs.errors import FormatError
from clipfs.format.container import (
    ALGORITHMS,
    LAYER,
    MAX_SKIP,
    MAX_WINDOW,
    PLACE_BITS,
    SEEK,
    SPAN,
    Codec,
    Header,
    Kind,
    Layer,
    MadeSpans,
    Section,
    Span,
)
from clipfs.oci import Digest

_OFFSET_MASK = (1 << PLACE_BITS) - 1
_EXTENT_SIZE = 24
# SPAN is so many numbers of 64 bits long, and the first is `position`; of those of 32 bits one is `seek`.
_SPAN_WORDS, _SPAN_HALVES, _SEEK_HALF = SPAN.size // 8, SPAN.size // 4, 2
_DIGEST_SIZE = 32
# Of SEEK: the decoded byte that decoding begins with.
_ORIGIN = 1
_LONGEST = (1 << 32) - 1


class SpanTable(MadeSpans):
    """The spans of one layer. Indexing decodes a record and decompresses its window; `find` and `bounds` do neither."""

    def __init__(
        self, buffer: mmap, at: int, count: int, header: Header, size: int, diff_size: int, codec: Codec, name: str
    ) -> None:
        """at: where the first of `count` records is.  size, diff_size, codec: of the layer that they belong to."""
        self._buffer = buffer
        self._at = at
        self._count = count
        self._seeks, self._windows = header[Kind.SEEKS], header[Kind.WINDOWS]
        self._size = size
        self._diff_size = diff_size
        self._codec = codec
        self._name = name
        self._records = memoryview(buffer)[at : at + count * SPAN.size]
        self._words, self._halves = self._records.cast("Q"), self._records.cast("I")
        self._positions = self._words[::_SPAN_WORDS]
        self._seek_of = self._halves[_SEEK_HALF::_SPAN_HALVES]
        # The last place that decoding can begin at, and its window: most spans share it with the one before.
        self._latest = -1, b""

    def __len__(self) -> int:
        return self._count

    def _made(self, number: int) -> Span:
        _, seek, taken, digest = SPAN.unpack_from(self._buffer, self._at + number * SPAN.size)
        position, length = self.bounds(number)
        start, origin, window_at, window_length, bit = self._seek(seek)
        end, skip = start + taken, position - origin
        if not (
            end <= self._size
            and (bit < 8 if self._codec is Codec.GZIP else not bit and not window_length)
            and (not skip or (self._codec is not Codec.RAW and 0 < skip <= max(position, MAX_SKIP)))
        ):
            raise FormatError(f"{self._name} is damaged: span {number} of a layer is outside of it")
        known, window = self._latest
        if known != seek:
            window = self._window(window_at, window_length) if window_length else b""
            self._latest = seek, window
        return Span(start, end, position, length, digest, bit, skip, window)

    def find(self, offset: int) -> int:
        """The number of the span that holds the byte at `offset` of the uncompressed layer."""
        number = bisect_right(self._positions, offset) - 1
        if number < 0 or not 0 <= offset < self._diff_size:
            raise FormatError(f"{self._name} is damaged: no span holds byte {offset} of a layer")
        return number

    def bounds(self, number: int) -> tuple[int, int]:
        """(position, length) of a span, cheaply: what a plan needs to know."""
        position = self._positions[number]
        length = (self._positions[number + 1] if number + 1 < self._count else self._diff_size) - position
        if not 0 < length <= min(self._diff_size - position, _LONGEST):
            raise FormatError(f"{self._name} is damaged: span {number} of a layer is outside of it")
        return position, length

    def digest(self, number: int) -> bytes:
        """SHA-256 of a span's decoded bytes, cheaply: what a cache needs to know."""
        at = self._at + (number + 1) * SPAN.size
        return self._buffer[at - _DIGEST_SIZE : at]

    def frame(self, number: int) -> range:
        """The numbers of the spans that decoding passes one after the other, this one included: from the one at whose
        beginning decoding begins, to the last that follows without a gap."""
        seeks, seek = self._seek_of, self._seek_of[number]
        # They do not go down. Where they do in spite of that, the answer is wrong, and so is the index.
        first = min(bisect_left(seeks, seek, 0, number), number)
        last = max(bisect_right(seeks, seek, number), number + 1)
        begins = self._seek(seek)[_ORIGIN] == self._positions[first]
        return range(first, last) if begins else range(number, number + 1)

    def release(self) -> None:
        """Let go of the mapped file."""
        for view in (self._positions, self._seek_of, self._words, self._halves, self._records):
            view.release()

    def _seek(self, number: int) -> tuple[int, int, int, int, int]:
        """(start, origin, window offset, window length, bit) of where decoding can begin."""
        if number >= self._seeks.length // SEEK.size:
            raise FormatError(f"{self._name} is damaged: a span begins nowhere")
        fields: tuple[int, int, int, int, int] = SEEK.unpack_from(self._buffer, self._seeks.offset + number * SEEK.size)
        return fields

    def _window(self, at: int, length: int) -> bytes:
        if length > self._windows.length - at:
            raise FormatError(f"{self._name} is damaged: a window is outside of its section")
        at += self._windows.offset
        frame = self._buffer[at : at + length]
        try:
            # Asked first: zstandard allocates whatever a frame says that it holds.
            if not 0 < zstandard.frame_content_size(frame) <= MAX_WINDOW:
                raise FormatError(f"{self._name} is damaged: a window is larger than {MAX_WINDOW} bytes")
            return zstandard.ZstdDecompressor().decompress(frame, read_across_frames=False)
        except zstandard.ZstdError as error:
            raise FormatError(f"{self._name} is damaged: a window can not be decompressed: {error}") from None


@dataclass(frozen=True, slots=True)
class StoredLayer(Layer):
    """A layer whose spans are read from the file when asked for."""

    spans: SpanTable


class ExtentTable:
    """Where the bytes of the data space are: three columns, sorted by address."""

    def __init__(self, buffer: mmap, section: Section, layers: Sequence[Layer], name: str) -> None:
        self.count, rest = divmod(section.length, _EXTENT_SIZE)
        if rest:
            raise FormatError(f"{name} is damaged: its extents are {section.length} bytes, not a multiple of 24")
        self._name = name
        self._sizes = [layer.diff_size for layer in layers]
        step = self.count * 8
        first, second, third = (section.offset + step * number for number in range(3))
        whole = memoryview(buffer)
        self.starts = whole[first : first + step].cast("Q")
        self.lengths = whole[second : second + step].cast("Q")
        self.places = whole[third : third + step].cast("Q")
        whole.release()

    def find(self, address: int, length: int) -> list[tuple[int, int, int, int]]:
        """(address, layer, offset, length) of what is stored of these bytes of the data space; the rest is zeros.

        A hot path of every read, so flat: one bisect, then as many extents as the answer has.
        """
        starts, lengths = self.starts, self.lengths
        found: list[tuple[int, int, int, int]] = []
        end = address + length
        number = bisect_right(starts, address) - 1
        if number < 0:
            number = 0
        for number in range(number, self.count):  # noqa: B020  goes on from where it is
            start = starts[number]
            if start >= end:
                break
            stop = start + lengths[number]
            if stop <= address:
                continue
            place = self.places[number]
            layer, offset = place >> PLACE_BITS, place & _OFFSET_MASK
            if layer >= len(self._sizes) or offset + stop - start > self._sizes[layer]:
                raise FormatError(f"{self._name} is damaged: extent {number} is outside of its layer")
            if start < address:
                offset += address - start
                start = address
            if stop > end:
                stop = end
            found.append((start, layer, offset, stop - start))
            address = stop
        return found

    def around(self, layer: int, offset: int) -> range:
        """The bytes of the uncompressed layer that one extent has, and this one among them; none if no extent has it.

        Of an index whose data space is not in the order of its layers, some are not found.
        """
        place = layer << PLACE_BITS | offset
        number = bisect_right(self.places, place) - 1
        if number < 0:
            return range(0)
        start = offset - (place - self.places[number])
        found = range(start, start + self.lengths[number])
        return found if start >= 0 and offset in found else range(0)

    def release(self) -> None:
        """Let go of the mapped file."""
        for column in (self.starts, self.lengths, self.places):
            column.release()


def read_layers(buffer: mmap, header: Header, name: str) -> tuple[StoredLayer, ...]:
    """All layers. Their spans are known to lie inside the spans section, and to be all of it."""
    section, spans = header[Kind.LAYERS], header[Kind.SPANS]
    layers: list[StoredLayer] = []
    at = spans.offset
    try:
        for offset in range(section.offset, section.end, LAYER.size):
            layer = _read_layer(buffer, offset, at, header, name)
            layers.append(layer)
            at += len(layer.spans) * SPAN.size
        if at != spans.end or section.length % LAYER.size or header[Kind.SEEKS].length % SEEK.size:
            raise FormatError(f"{name} is damaged: its layers and spans do not match")
    except FormatError:
        for layer in layers:
            layer.spans.release()
        raise
    return tuple(layers)


def _read_layer(buffer: mmap, offset: int, spans_at: int, header: Header, name: str) -> StoredLayer:
    section, spans = header[Kind.LAYERS], header[Kind.SPANS]
    if offset + LAYER.size > section.end:
        raise FormatError(f"{name} is damaged: its layers and spans do not match")
    algorithm, diff_algorithm, codec, digest, diff_id, size, diff_size, count, reserved, length, media_type = (
        LAYER.unpack_from(buffer, offset)
    )
    if count > (spans.end - spans_at) // SPAN.size or diff_size >> PLACE_BITS or reserved:
        raise FormatError(f"{name} is damaged: a layer has sizes that can not be")
    try:
        kind = Codec(codec)
        digests = _digest(algorithm, digest), _digest(diff_algorithm, diff_id)
        text = media_type[:length].decode()
    except (KeyError, ValueError):
        raise FormatError(f"{name} is damaged: a layer has a digest, codec or media type that can not be") from None
    table = SpanTable(buffer, spans_at, count, header, size, diff_size, kind, name)
    return StoredLayer(*digests, size, diff_size, kind, text, table)


def _digest(algorithm: int, raw: bytes) -> Digest:
    name = ALGORITHMS[algorithm]
    return Digest(name, raw[: hashlib.new(name).digest_size].hex())
