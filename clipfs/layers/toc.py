"""The table of contents that eStargz and zstd:chunked layers bring with them -> what the layer adds, and its spans.

This module owns what the entries of such a table mean and which of them can be believed: a stranger wrote them. Where
the table lies in a blob, and that it is the one that the manifest names, is the affair of `contents`.

The two formats differ little here. zstd:chunked says where files end and which chunks are zeros; eStargz may put
several chunks into one gzip member, and does not say how long the last chunk of a file is.
"""

from __future__ import annotations

import re
from base64 import b64decode
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from clipfs.compression.codec import MAX_SPAN
from clipfs.errors import ImageError, shown
from clipfs.fields import Fields, quoted
from clipfs.format.container import MAX_SKIP, Codec, Span
from clipfs.layers import bounds
from clipfs.layers.chunks import Chunk, lay_out, segments
from clipfs.layers.entries import entries_in
from clipfs.layers.members import (
    BLOCK,
    BLOCK_DEVICE,
    CHARACTER,
    DIRECTORY,
    FIFO,
    LINK,
    MAX_ID,
    MAX_MAJOR,
    MAX_MINOR,
    MAX_SIZE,
    MODES,
    NO_XATTRS,
    REGULAR,
    SYMLINK,
    Entry,
    Member,
    cleaned,
    device,
    entry_of,
    known_time,
    link_target,
)
from clipfs.layers.pax import xattrs
from clipfs.names import Digest

# What the tar member is called that holds the table of an eStargz layer. It is no file of the image.
NAME = b"stargz.index.json"
# Members that say which files to fetch ahead. Runtimes that know the formats do not show them either.
_HIDDEN = (NAME, b".prefetch.landmark", b".no.prefetch.landmark")

_KINDS = {
    "reg": REGULAR,
    "dir": DIRECTORY,
    "symlink": SYMLINK,
    "hardlink": LINK,
    "char": CHARACTER,
    "block": BLOCK_DEVICE,
    "fifo": FIFO,
}

_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?(Z|[+-][0-9]{2}:[0-9]{2})"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# What JSON says where bytes were no UTF-8.
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Table:
    """What a layer consists of. size: of all chunks together, which the spans cover."""

    entries: list[Entry]
    spans: list[Span]
    size: int


def parse(document: bytes, codec: Codec, end: int, budget: bounds.Budget | None = None) -> Table:
    """What a table of contents says. end: where in the blob the last chunk ends.  budget: of the image.

    Raises ImageError if it cannot be right, or says what a .clip cannot.
    """
    budget = budget or bounds.Budget()
    budget.take(len(document), b"", 0)
    reader = _Reader(codec, end, budget)
    for number, entry in enumerate(entries_in(document)):
        where, name = f"entry {number}", None
        try:
            fields = Fields(entry, where)
            name = _encoded(fields, "name")
            reader.add(fields, name)
        except ImageError as error:
            message = error.message if error.message.startswith(where) else f"{where}: {error.message}"
            raise ImageError(message, member=name) from None
    return reader.finish()


class _Reader:
    """The entries read so far. A file's chunks follow its entry."""

    def __init__(self, codec: Codec, end: int, budget: bounds.Budget) -> None:
        self._codec, self._end, self._budget = codec, end, budget
        self._entries: list[Entry] = []
        self._files: list[tuple[Member, list[Chunk]]] = []
        # The file that more chunks may follow of, and how many bytes those before have.
        self._file: Member | None = None
        self._filled = 0

    def add(self, fields: Fields, name: bytes) -> None:
        """The next entry. Errors do not say which it is."""
        # As if it was tar. A chunk stays as a span and a segment, which take no more than that.
        self._budget.take(BLOCK, name, 0)
        kind = fields.text("type")
        if kind == "chunk":
            if self._file is None:
                raise ImageError("it is a chunk of no file")
            self._add_chunk(fields, self._file)
            return
        self._complete()
        if kind not in _KINDS:
            raise ImageError(f"its type {quoted(kind)} is none that a layer may have")
        member = self._member(_KINDS[kind], fields, name)
        self._budget.take(bounds.extra_weight(member), name, 0)
        entry = entry_of(member)
        if entry is not None and member.path not in _HIDDEN:
            self._entries.append(entry)
        if member.size:
            self._file, self._filled = member, 0
            self._files.append((member, []))
            self._add_chunk(fields, member)

    def finish(self) -> Table:
        """To be called after the last entry. Raises ImageError if the chunks do not fit together."""
        self._complete()
        spans, size = lay_out((chunk for _, chunks in self._files for chunk in chunks), self._codec, self._end)
        for member, chunks in self._files:
            member.segments, member.offset = segments(chunks), chunks[0].position
        return Table(self._entries, spans, size)

    def _member(self, kind: bytes, fields: Fields, name: bytes) -> Member:
        link = _encoded(fields, "linkName") if kind in (LINK, SYMLINK) else b""
        member = Member(
            path=cleaned(name),
            mode=MODES[kind] | fields.number("mode", (1 << 32) - 1, 0) & 0o7777,
            uid=fields.number("uid", MAX_ID, 0),
            gid=fields.number("gid", MAX_ID, 0),
            mtime_ns=_time(fields.text("modtime", "")),
            size=fields.number("size", MAX_SIZE, 0) if kind == REGULAR else 0,
            link=link_target(kind, link),
            hardlink=kind == LINK,
            rdev=_device(fields) if kind in (CHARACTER, BLOCK_DEVICE) else 0,
            xattrs=_xattrs(fields) if fields.value.get("xattrs") else NO_XATTRS,
            segments=(),
            offset=0,
        )
        if not member.path and kind != DIRECTORY:
            raise ImageError("it has no name; only a directory can be the root")
        return member

    def _add_chunk(self, fields: Fields, file: Member) -> None:
        """A chunk. The first is in the file's own entry, the last need not say how long it is."""
        left = file.size - self._filled
        length = fields.number("chunkSize", MAX_SIZE, 0) or left
        at = fields.number("chunkOffset", MAX_SIZE, 0)
        if at != self._filled or not 0 < length <= left:
            raise ImageError(
                f"a chunk of {length} bytes is at {at}, after {self._filled} of the file's {file.size} bytes"
            )
        start, inner = fields.number("offset", self._end, 0), fields.number("innerOffset", MAX_SKIP, 0)
        # The first bytes of a layer are a tar header.
        if start == inner == 0 or start >= self._end or (inner and self._codec is not Codec.GZIP):
            raise ImageError(f"no chunk can be {inner} bytes into what begins at byte {start} of the layer")
        kind = fields.text("chunkType", "")
        if kind not in ("", "zeros"):
            raise ImageError(f"a chunk is of type {quoted(kind)}, which clipfs does not know")
        digest = b"" if kind else _digest(fields, length == file.size)
        if digest and length > MAX_SPAN:
            raise ImageError(f"a chunk has {length} bytes, and clipfs reads at most {MAX_SPAN} at once")
        end = fields.number("endOffset", self._end, 0)
        self._files[-1][1].append(Chunk(start, inner, end, at, length, digest))
        self._filled += length

    def _complete(self) -> None:
        """The file under way gets no more chunks."""
        file, self._file = self._file, None
        if file is None:
            return
        if self._filled != file.size:
            raise ImageError(f"the chunks of {shown(file.path)} have {self._filled} bytes, not its {file.size}")
        # The entry of a file says where the last of its chunks ends.
        chunks = self._files[-1][1]
        end = chunks[0].end
        for chunk in chunks:
            chunk.end = 0
        chunks[-1].end = end


def _digest(fields: Fields, whole: bool) -> bytes:
    """SHA-256 of a chunk. Where a file is one chunk, the file's digest will do."""
    digest = fields.text("chunkDigest", "") or (fields.text("digest", "") if whole else "")
    if not digest:
        raise ImageError("a chunk has no digest, so that it could not be verified")
    known = Digest.parse(digest)
    if known.algorithm != "sha256":
        raise ImageError(f"a chunk has a digest by {known.algorithm}; clipfs verifies chunks by sha256")
    return known.raw


def _encoded(fields: Fields, key: str) -> bytes:
    text = fields.text(key)
    if _REPLACEMENT in text:
        raise ImageError(f"its {key} {quoted(text)} was no UTF-8, and the table has lost what it was")
    return text.encode()


def _xattrs(fields: Fields) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for name, value in fields.mapping("xattrs").items():
        if _REPLACEMENT in name:
            raise ImageError(f"its xattr {quoted(name)} was no UTF-8, and the table has lost what it was")
        try:
            found[b"SCHILY.xattr." + name.encode()] = b64decode(value, validate=True)
        except ValueError:
            raise ImageError(f"its xattr {quoted(name)} is no base64") from None
    return xattrs(found)


def _device(fields: Fields) -> int:
    return device(fields.number("devMajor", MAX_MAJOR, 0), fields.number("devMinor", MAX_MINOR, 0))


# What was archived together often has one time.
@lru_cache(1 << 12)
def _time(text: str) -> int:
    """A time as RFC 3339 has it, in nanoseconds."""
    if not text:
        return 0
    parts = _TIME.fullmatch(text)
    try:
        if parts is None:
            raise ValueError(text)
        seconds = (datetime.fromisoformat(parts[1] + parts[3]) - _EPOCH) // timedelta(seconds=1)
    except (ValueError, OverflowError):
        raise ImageError(f"its modification time {quoted(text)} is none") from None
    return known_time(seconds * 1_000_000_000 + int((parts[2] or "0").ljust(9, "0")))
