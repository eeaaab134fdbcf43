"""From a span's compressed bytes to its decoded bytes, verified; and which codec a layer is in.

`decode` is the one way from fetched bytes to served bytes. It checks the SHA-256 that the index demands before it
returns anything, so nothing unverified can be cached or served. It does not know where bytes come from, and it trusts
neither them nor the index: output never exceeds what the span says, and a span never says more than `MAX_SPAN`.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from typing import cast

from isal import isal_zlib

from clipfs.compression.deflate import FOOTER, HeaderError, header_end, primed
from clipfs.compression.zstd import ZstdStream, ZstdStreamError
from clipfs.errors import ImageError, IntegrityError
from clipfs.format.container import Codec, Span

# What `detect` wants to see: one tar header.
HEAD = 512

# The largest span that is read, so that a hostile index cannot ask for memory at will. Scanning makes at most half.
MAX_SPAN = 64 << 20

# The most compressed bytes that are fetched to decode one span. Only what igzip writes at its lowest level, a layer of
# one deflate block, comes near it.
MAX_FETCH = 512 << 20

# Compressed bytes given to the decoder at a time: what lies behind the end of a gzip member is copied, so this bounds
# what a span of many tiny members costs. In the middle of a member it is more: between two calls, a thread waits for
# its turn in the interpreter.
_PIECE, _LARGE_PIECE = 64 << 10, 256 << 10

# Decoded bytes thrown away at a time, and what a zstd frame's output is collected in.
_DISCARD = 1 << 20

# The first byte of a gzip header.
_MAGIC = b"\x1f"

# isal's stubs declare its error class as an instance.
_IsalError = cast("type[Exception]", isal_zlib.IsalError)

_UNSUPPORTED = {
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"LZIP": "lzip",
}


class _BrokenError(Exception):
    """The bytes do not decode; the message says why."""


def detect(head: bytes) -> Codec:
    """The codec of a layer whose first bytes (`HEAD` of them, or all) are `head`. Content decides, not media types."""
    if (codec := compression(head)) is not None:
        return codec
    for magic, name in _UNSUPPORTED.items():
        if head.startswith(magic):
            raise ImageError(
                f"the layer is compressed with {name}, which OCI does not know: convert it with "
                "`skopeo copy --dest-compress-format gzip`"
            )
    if _is_tar(head):
        return Codec.RAW
    raise ImageError("the layer is neither a tar archive nor gzip nor zstd; an encrypted layer must be decrypted first")


def compression(head: bytes) -> Codec | None:
    """The codec that these first bytes, four or more, are compressed with; None if it is none that OCI knows."""
    if head[:2] == b"\x1f\x8b":
        return Codec.GZIP
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return Codec.ZSTD
    return None


def _is_tar(head: bytes) -> bool:
    """Whether a tar archive begins with `head`: a header with its checksum, the end marker, or nothing at all."""
    if not any(head):
        return True
    field = head[148:156].strip(b" \0")
    try:
        stated = int(field, 8)
    except ValueError:
        return False
    return len(head) >= HEAD and is_checksum(stated, head[:HEAD])


def is_checksum(stated: int, header: bytes) -> bool:
    """Whether that is the checksum of a tar header's 512 bytes. Some old archivers summed up signed ones."""
    rest = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(rest)
    return stated == unsigned or stated == unsigned - 256 * sum(byte > 127 for byte in rest)


def decode(codec: Codec, span: Span, data: bytes | memoryview) -> bytes:
    """The decoded bytes of `span`, given the layer's bytes [span.start, span.end).

    Raises IntegrityError if they do not decode to what the index demands.
    """
    where = _where(span)
    if span.length > MAX_SPAN:
        raise IntegrityError(f"the index says that {where} decode to {span.length} bytes, more than any span may")
    if not 0 <= span.bit < 8:
        raise IntegrityError(f"the index says that {where} begin at bit {span.bit} of a byte")
    if len(data) != span.end - span.start:
        raise IntegrityError(f"{where} were asked for, {len(data)} bytes came")
    try:
        plain = _DECODERS[codec](span, data)
    except (_BrokenError, HeaderError) as error:
        raise IntegrityError(f"{where} do not decode: {error}") from error
    return _verified(plain, span)


def _where(span: Span) -> str:
    return f"bytes {span.start} to {span.end} of the layer"


def _verified(plain: bytes, span: Span) -> bytes:
    """The one gate that decoded bytes pass: they are what the index demands, or IntegrityError."""
    where = _where(span)
    if len(plain) != span.length:
        raise IntegrityError(f"{where} decode to {len(plain)} bytes, not to the {span.length} that the index demands")
    if hashlib.sha256(plain).digest() != span.digest:
        raise IntegrityError(f"{where} do not decode to the bytes that the index demands: SHA-256 differs")
    return plain


class Forward:
    """Decodes the spans of one frame in order, each once: the first where the frame begins, each next one from where
    the one before it ended. A frame is what several spans share that begin at the same compressed byte."""

    def __init__(self, codec: Codec, first: Span) -> None:
        self._stream = _GzipStream(first) if codec is Codec.GZIP else ZstdStream()

    def decode(self, span: Span, data: bytes | memoryview) -> bytes:
        """The decoded bytes of the next span, given the layer's bytes from the end of the last one to span.end.

        Raises IntegrityError if they are not what the index demands; then this object is of no more use.
        """
        if span.length > MAX_SPAN:
            raise IntegrityError(f"the index says that a span decodes to {span.length} bytes, more than any may")
        try:
            plain = _taken(self._decode(data, span.length), 0, span.length)
        except (_BrokenError, HeaderError, ZstdStreamError) as error:
            raise IntegrityError(f"{_where(span)} do not decode: {error}") from error
        return _verified(plain, span)

    def _decode(self, data: bytes | memoryview, wanted: int) -> Iterator[bytes]:
        stream = self._stream
        return stream.decode(data) if isinstance(stream, ZstdStream) else stream.decode(data, wanted)


def _copy(span: Span, data: bytes | memoryview) -> bytes:
    return bytes(data[span.skip : span.skip + span.length])


class _GzipStream:
    """A deflate stream from a seek point on, through as many gzip members as there are, that arrives in parts.

    It begins at a deflate block or at the header of a gzip member. No block begins with the first byte of a header,
    whose lowest three bits would make it one of a type that is reserved.
    """

    def __init__(self, span: Span) -> None:
        self._bit = span.bit
        self._decoder = isal_zlib.decompressobj(wbits=-zlib.MAX_WBITS, zdict=span.window)
        self._stream: memoryview | None = None
        self._at = 0
        self._piece = _PIECE
        self._ended = False  # a member has, and its footer is next

    def decode(self, data: bytes | memoryview, wanted: int) -> Iterator[bytes]:
        """`wanted` decoded bytes, in pieces. What they do not need of `data` is kept for the next call."""
        if self._stream is None:
            self._stream = memoryview(primed(self._bit, data))
            self._at = header_end(self._stream) if self._bit == 0 and self._stream[:1] == _MAGIC else 0
        else:
            self._stream, self._at = memoryview(b"".join((self._stream[self._at :], data))), 0
        while wanted:
            if self._ended:
                # Only now: a span may end where a member does, and then nobody needs to know what follows.
                self._at, self._ended = header_end(self._stream, self._at + FOOTER), False
            fed = self._stream[self._at : self._at + self._piece]
            try:
                piece = self._decoder.decompress(fed, min(wanted, _DISCARD))
            except _IsalError as error:
                raise _BrokenError(str(error)) from error
            self._at += len(fed) - len(self._decoder.unconsumed_tail) - len(self._decoder.unused_data)
            wanted -= len(piece)
            if self._decoder.eof:
                if self._at < 0:
                    # The decoder had looked ahead, into bytes of the call before, which are not here any more.
                    early = self._decoder.unused_data[: -self._at]
                    self._stream, self._at = memoryview(b"".join((early, self._stream))), 0
                self._decoder, self._ended = isal_zlib.decompressobj(wbits=-zlib.MAX_WBITS), True
                self._piece = _PIECE
            elif piece:
                self._piece = _LARGE_PIECE
            elif not fed:
                raise _BrokenError("they end too early")
            if piece:
                yield piece


def _gunzip(span: Span, data: bytes | memoryview) -> bytes:
    return _taken(_GzipStream(span).decode(data, span.skip + span.length), span.skip, span.length)


def _unzstd(span: Span, data: bytes | memoryview) -> bytes:
    """A span begins at a frame, and holds one or more of them or the beginning of one."""
    try:
        return _taken(ZstdStream().decode(data), span.skip, span.length)
    except ZstdStreamError as error:
        raise _BrokenError(str(error)) from error


def _taken(pieces: Iterable[bytes], skip: int, wanted: int) -> bytes:
    """`wanted` bytes of these, after `skip` others."""
    taken = []
    for piece in pieces:
        kept = piece[skip : skip + wanted]
        skip -= min(skip, len(piece))
        if kept:
            taken.append(kept)
            wanted -= len(kept)
        if not wanted:
            break
    if wanted:
        raise _BrokenError("they end too early")
    return b"".join(taken)


_DECODERS = {Codec.RAW: _copy, Codec.GZIP: _gunzip, Codec.ZSTD: _unzstd}
