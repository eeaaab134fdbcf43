"""One pass over a layer: decoded bytes in order for whoever parses them, and its spans at the end.

This module decides where spans begin and end, and takes their digests while the bytes pass. It does not know tar, and
it verifies no digest of the whole layer: the caller sees every byte and does.

A span ends where decoding can begin anew: at a deflate block or a gzip member, which `stretch` chooses so that it holds
`span_size` decoded bytes at most, or at the first zstd frame by which it holds as many. Where there is no such place
(one huge deflate block, a zstd layer of one frame) it is cut all the same, and the next span begins at the same
compressed byte with a longer `skip`.

Spans tile the decoded bytes. The compressed ranges need not: neighbours share a byte when a block begins inside one,
ranges with `skip` overlap, and what holds no content (headers, footers, padding) may lie between two of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import zstandard
from isal import isal_zlib

from clipfs.compression.codec import MAX_FETCH, MAX_SPAN
from clipfs.compression.deflate import FOOTER, HEADER_LIMIT, HeaderError, Inflater, Stop, header_end
from clipfs.compression.ledger import Ledger, Region, Seek
from clipfs.compression.stretch import DENSITY, Stretch
from clipfs.compression.zstd import MAX_BLOCK, MAX_HEADER, WINDOW_LIMIT, Block, skippable
from clipfs.errors import ImageError, SourceError
from clipfs.format.container import Codec, Span

# What an index costs and a start fetches go against each other. A gzip span ends sooner where that costs little, see
# `stretch`. For numpy in a 260 MB image, a start needs 11.9 % of the layers, and windows and spans are 0.45 % of them;
# it took 12.5 %, and half a second more over 3 MB/s, when they were 0.25 %. Without anything to spare they are to stay
# below 0.3 %, of text, whose windows are dear, too.
SPAN_SIZE = 4 << 20

# A gzip span is cut into so many pieces or fewer, which share its seek point and window: whoever needs the first of
# them fetches and decodes no more, and who needs a later one gets those before it besides. With 8, a start over 3 MB/s
# of 12.7 s would take 0.8 s longer, going by what it read.
PIECES = 16

# A zstd frame may be as long as one likes: its spans are as many times as long as others.
_PATIENCE = 4

# Compressed bytes that a span takes beyond its end, if that is inside a deflate block. isal decodes up to three short
# codes at once, and none of them if input ends among them.
_AHEAD = 8

# Decoded bytes yielded at a time, and at least, but for the last. Boundaries of gzip blocks are some 60 KB from each
# other; whoever gets bytes has work to do each time.
_CHUNK, _TOGETHER = 1 << 20, 256 << 10

# Enough for any gzip header that gzip, Go or pigz write; longer ones are read again whole.
_USUAL_HEADER = 512


class Scan:
    """Iterates over the decoded bytes of a layer, in order; afterwards `spans` describes them. A context manager.

    Iterating raises ImageError where the compressed stream is damaged, cut off, or of a kind that is not read.
    """

    def __init__(
        self, path: Path, offset: int, size: int, codec: Codec, span_size: int = SPAN_SIZE, pieces: int = 1
    ) -> None:
        if not 0 < span_size <= MAX_SPAN // (2 * _PATIENCE):
            raise ValueError(f"span_size must be between 1 and {MAX_SPAN // (2 * _PATIENCE)}, not {span_size}")
        self.spans: Sequence[Span] = []
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error
        self._region = Region(self._descriptor, offset, size)
        self._ledger = Ledger(self._region)
        self._chunks = _SCANNERS[codec](self._region, self._ledger, span_size, pieces)
        self._reported = 0
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        parts: list[bytes] = []
        size = 0
        for chunk in self._chunks:
            parts.append(chunk)
            size += len(chunk)
            if size >= _TOGETHER:
                yield b"".join(parts)
                parts, size = [], 0
        if parts:
            yield b"".join(parts)
        self.spans = self._ledger.spans()

    def spare(self, size: int) -> None:
        """So many bytes of the index are left over by what else is in it so far: more spans may begin anew."""
        self._ledger.spare = size

    def consumed(self) -> int:
        """Compressed bytes that were read since this was last asked: what a progress bar counts."""
        fresh = self._region.position - self._reported
        self._reported += fresh
        return fresh

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._chunks.close()
            self._ledger.close()
            os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def scan(path: Path, offset: int, size: int, codec: Codec, span_size: int = SPAN_SIZE, pieces: int = 1) -> Scan:
    """A pass over the layer in bytes [offset, offset + size) of the file `path`; use it in a ``with``."""
    return Scan(path, offset, size, codec, span_size, pieces)


def _raw(region: Region, ledger: Ledger, span_size: int, pieces: int) -> Generator[bytes, None, None]:
    span_size = max(1, span_size // pieces)
    while region.position < region.size:
        ledger.begin(Seek(region.position))
        chunk = region.read(region.position, min(_CHUNK, span_size - ledger.length))
        if not chunk:
            raise ImageError(f"the layer ends at byte {region.position}, not {region.size}")
        region.position += len(chunk)
        ledger.add(chunk)
        if ledger.length == span_size or region.position == region.size:
            ledger.cut(region.position, Seek(region.position))
        yield chunk


def _gzip(region: Region, ledger: Ledger, span_size: int, pieces: int) -> Generator[bytes, None, None]:
    stretch = Stretch(ledger, span_size, max(1, span_size // pieces))
    with Inflater(region.descriptor, region.offset, region.size) as inflater:
        member: int | None = 0
        while member is not None:
            inflater.begin(_deflate_start(region, member))
            if stretch.wants(inflater.position, window=False):
                stretch.place(Seek(inflater.position))
            size = checksum = 0
            stop = Stop.FULL
            while stop is not Stop.END:
                chunk, stop = inflater.step(stretch.piece, blocks=True)
                position = region.position = inflater.position
                if chunk:
                    size, checksum = size + len(chunk), isal_zlib.crc32(chunk, checksum)
                    yield chunk
                stretch.add(chunk, position if stop is Stop.END else min(position + _AHEAD, region.size))
                if stop is Stop.BOUNDARY and stretch.wants(position, window=True):
                    stretch.place(Seek(position - (inflater.bit > 0), inflater.bit, inflater.window))
                stretch.settle(position)
                _reachable("gzip", ledger.start, position)
            member = _next_member(region, inflater.position, checksum, size)
        stretch.finish()


def _reachable(codec: str, start: int, end: int) -> None:
    if end - start > MAX_FETCH:
        raise ImageError(
            f"the {codec} stream has no place between its bytes {start} and {end} at which decoding can begin, and "
            f"clipfs fetches at most {MAX_FETCH >> 20} MiB at once: compress the layer with another tool"
        )


def _deflate_start(region: Region, member: int) -> int:
    try:
        try:
            return member + header_end(region.read(member, _USUAL_HEADER))
        except HeaderError:
            return member + header_end(region.read(member, HEADER_LIMIT))
    except HeaderError as error:
        raise ImageError(f"the gzip stream is damaged at compressed byte {member}: {error}") from None


def _next_member(region: Region, footer: int, checksum: int, size: int) -> int | None:
    """Check the footer of a member; where the next one begins, None if there is none.

    Zeros after the last member are padding, as for GNU gzip (tapes have it); anything else is an error, as for Go.
    """
    found = region.read(footer, FOOTER)
    if len(found) < FOOTER:
        raise ImageError(f"the gzip stream is cut off at compressed byte {footer}")
    if found != checksum.to_bytes(4, "little") + (size & 0xFFFFFFFF).to_bytes(4, "little"):
        raise ImageError(f"the gzip member that ends at compressed byte {footer} has a wrong checksum or length")
    at = member = footer + FOOTER
    if region.read(at, 1) == b"\0":
        while (rest := region.read(at, _CHUNK)) and not rest.strip(b"\0"):
            at += len(rest)
    region.position = at
    return None if at == region.size else member


def _full(ledger: Ledger, position: int, span_size: int) -> bool:
    """Is it time to end the span under way, at compressed byte `position`? Frames that decode to nothing have to be
    fetched too."""
    return ledger.run >= span_size or position - ledger.start >= DENSITY * span_size


def _zstd(region: Region, ledger: Ledger, span_size: int, _: int) -> Generator[bytes, None, None]:
    end = 0
    while region.position < region.size:
        start = region.position
        head = region.read(start, MAX_HEADER)
        if skipped := skippable(head):
            region.position += skipped
            if region.position > region.size:
                raise ImageError(f"the zstd stream is cut off in the skippable frame at compressed byte {start}")
            continue
        expected = _frame_content(head, start)
        if ledger.length + (expected or 0) > span_size or _full(ledger, start, span_size):
            ledger.cut(end)
        ledger.begin(Seek(start))
        yield from _zstd_frame(region, ledger, span_size * _PATIENCE, expected)
        end = region.position
    ledger.cut(end)


def _frame_content(head: bytes, start: int) -> int | None:
    """What the frame header says its content's size is. ImageError for what `decode` will not read."""
    try:
        frame = zstandard.get_frame_parameters(head)
    except zstandard.ZstdError:
        raise ImageError(f"no zstd frame begins at compressed byte {start}") from None
    if frame.dict_id:
        raise ImageError(f"the zstd frame at compressed byte {start} needs dictionary {frame.dict_id}: OCI has none")
    if frame.window_size > WINDOW_LIMIT:
        raise ImageError(
            f"the zstd frame at compressed byte {start} needs a window of {frame.window_size >> 20} MiB, and "
            f"clipfs reads up to {WINDOW_LIMIT >> 20} MiB, as zstd itself does: compress the layer without --long"
        )
    return None if frame.content_size == zstandard.CONTENTSIZE_UNKNOWN else frame.content_size


def _zstd_frame(region: Region, ledger: Ledger, longest: int, expected: int | None) -> Generator[bytes, None, None]:
    """expected: the size of the content, if the frame says it; libzstd does not compare it where the last block is
    empty."""
    start = reached = region.position
    decoded = 0
    decoder = zstandard.ZstdDecompressor(max_window_size=WINDOW_LIMIT).decompressobj()
    for blocks in _frame_blocks(region):
        try:
            chunk = decoder.decompress(blocks)
        except zstandard.ZstdError as error:
            raise ImageError(f"the zstd frame at compressed byte {start} is damaged: {error}") from None
        if chunk:
            decoded += len(chunk)
            ledger.add(chunk)
            yield chunk
        _reachable("zstd", reached, region.position)
        if ledger.length >= longest:
            ledger.cut(region.position, Seek(start, skip=decoded))
            reached = region.position
    if not decoder.eof or (expected is not None and decoded != expected):
        raise ImageError(f"the zstd frame at compressed byte {start} is damaged: it does not end where it says")


def _frame_blocks(region: Region) -> Iterator[bytes]:
    """The frame at the region's position, in runs of whole blocks that decode to about `_CHUNK` at most: nothing bounds
    what a run of bytes decodes to, but a block never decodes to more than 128 KiB."""
    head = region.read(region.position, MAX_HEADER)
    checksum = 4 if zstandard.get_frame_parameters(head).has_checksum else 0
    at = region.position + zstandard.frame_header_size(head)
    last, output = False, 0
    while not last:
        block = Block.parse(region.read(at, 3))
        last = block.last
        at += block.size + (checksum if last else 0)
        output += block.output
        if at > region.size:
            raise ImageError(f"the zstd stream is cut off in the frame at compressed byte {region.position}")
        if last or output + MAX_BLOCK > _CHUNK or at - region.position > _CHUNK:
            blocks = region.read(region.position, at - region.position)
            region.position, output = at, 0
            yield blocks


_SCANNERS: dict[Codec, Callable[[Region, Ledger, int, int], Generator[bytes, None, None]]] = {
    Codec.RAW: _raw,
    Codec.GZIP: _gzip,
    Codec.ZSTD: _zstd,
}
