"""Tar archives by hand: every field of a header can be said, also what no archiver would write.

This module knows the tar formats (ustar, PAX, GNU) and nothing of images. It writes and never reads, shares no code
with clipfs, and refuses nothing: broken archives are what half of the tests are made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

BLOCK = 512
END = bytes(2 * BLOCK)

# POSIX names the magic and version of ustar; GNU tar writes its own for archives with GNU members.
USTAR = b"ustar\x0000"
GNU = b"ustar  \x00"
V7 = bytes(8)

# How many (offset, length) pairs an old-GNU sparse header holds, and each extension block after it.
_SPARSE_IN_HEADER = 4
_SPARSE_IN_EXTENSION = 21


def header(
    name: bytes,
    *,
    typeflag: bytes = b"0",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    size: int | bytes = 0,
    mtime: int = 0,
    link: bytes = b"",
    magic: bytes = USTAR,
    rdev: tuple[int, int] = (0, 0),
    tail: bytes = b"",
    base256: bool = False,
    checksum: int | None = None,
) -> bytes:
    """One 512-byte header block.

    Names longer than their field are cut. Numbers that do not fit in octal, and all of them with `base256`, are
    written the GNU way; `size` may be the raw twelve bytes. `tail` is what follows the device numbers: the ustar
    prefix, or GNU's fields. `checksum` overrides the right one.
    """

    def number(value: int, width: int) -> bytes:
        if not base256 and 0 <= value < 8 ** (width - 1):
            return b"%0*o\0" % (width - 1, value)
        raw = bytearray(value.to_bytes(width, "big", signed=True))
        raw[0] |= 0x80
        return bytes(raw)

    before = b"".join(
        (
            name[:100].ljust(100, b"\0"),
            number(mode, 8),
            number(uid, 8),
            number(gid, 8),
            size.ljust(12, b"\0") if isinstance(size, bytes) else number(size, 12),
            number(mtime, 12),
        )
    )
    devices = number(rdev[0], 8) + number(rdev[1], 8) if magic != V7 else bytes(16)
    after = typeflag + link[:100].ljust(100, b"\0") + magic + bytes(64) + devices + tail.ljust(167, b"\0")
    if checksum is None:
        checksum = sum(before) + 8 * ord(" ") + sum(after)
    return before + b"%06o\0 " % checksum + after


def padded(data: bytes) -> bytes:
    """`data`, filled up to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def pax_records(records: Mapping[str | bytes, str | bytes]) -> bytes:
    """PAX records, each of which states its own length, which includes the digits of the length."""
    out = bytearray()
    for key, value in records.items():
        line = b" " + _raw(key) + b"=" + _raw(value) + b"\n"
        length = len(line)
        while length != len(line) + len(str(length)):
            length = len(line) + len(str(length))
        out += b"%d" % length + line
    return bytes(out)


def pax(records: Mapping[str | bytes, str | bytes], *, typeflag: bytes = b"x") -> bytes:
    """A PAX header for the next member, or with typeflag ``g`` for all that follow."""
    body = pax_records(records)
    return header(b"././@PaxHeader", typeflag=typeflag, size=len(body)) + padded(body)


def gnu_long(value: bytes, *, typeflag: bytes = b"L") -> bytes:
    """GNU's way to say a long name (``L``) or a long link target (``K``)."""
    body = value + b"\0"
    return header(b"././@LongLink", typeflag=typeflag, size=len(body), magic=GNU) + padded(body)


def gnu_sparse(name: bytes, size: int, pieces: Sequence[tuple[int, bytes]], *, mode: int = 0o644) -> bytes:
    """An old-GNU sparse member of `size` bytes with data only at `pieces`; uses extension blocks when it must."""

    def pair(offset: int, length: int) -> bytes:
        return b"%011o\0%011o\0" % (offset, length)

    pairs = [pair(offset, len(data)) for offset, data in pieces]
    # The end of the file is said by an empty piece there, as GNU tar does it.
    pairs.append(pair(size, 0))
    first, rest = pairs[:_SPARSE_IN_HEADER], pairs[_SPARSE_IN_HEADER:]
    # atime, ctime, offset, longnames and one unused byte (41 in all), the pairs, isextended, realsize
    tail = bytes(41) + b"".join(first).ljust(96, b"\0") + (b"\1" if rest else b"\0") + b"%011o\0" % size
    stored = b"".join(data for _, data in pieces)
    out = header(name, typeflag=b"S", mode=mode, size=len(stored), magic=GNU, tail=tail)
    while rest:
        block, rest = rest[:_SPARSE_IN_EXTENSION], rest[_SPARSE_IN_EXTENSION:]
        out += b"".join(block).ljust(504, b"\0") + (b"\1" if rest else b"\0") + bytes(7)
    return out + padded(stored)


def pax_sparse(name: bytes, size: int, pieces: Sequence[tuple[int, bytes]], *, version: str) -> bytes:
    """A PAX sparse member as GNU tar writes it for --sparse-version=0.0, 0.1 or 1.0."""
    stored = b"".join(data for _, data in pieces)
    spans = [(offset, len(data)) for offset, data in pieces]
    if version == "0.0":
        # The one format that repeats keys, which no mapping can say.
        body = pax_records({"GNU.sparse.size": str(size), "GNU.sparse.numblocks": str(len(spans))})
        for offset, length in spans:
            body += pax_records({"GNU.sparse.offset": str(offset)}) + pax_records({"GNU.sparse.numbytes": str(length)})
        extended = header(b"././@PaxHeader", typeflag=b"x", size=len(body)) + padded(body)
        return extended + header(name, size=len(stored)) + padded(stored)
    if version == "0.1":
        numbers = ",".join(f"{offset},{length}" for offset, length in spans)
        records: dict[str | bytes, str | bytes] = {
            "GNU.sparse.size": str(size),
            "GNU.sparse.numblocks": str(len(spans)),
            "GNU.sparse.map": numbers,
            "GNU.sparse.name": name,
        }
        return pax(records) + header(b"GNUSparseFile.0/x", size=len(stored)) + padded(stored)
    in_data = padded("".join(f"{n}\n" for n in (len(spans), *(n for span in spans for n in span))).encode())
    records = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": str(size),
        "GNU.sparse.name": name,
    }
    return pax(records) + header(b"GNUSparseFile.0/x", size=len(in_data) + len(stored)) + in_data + padded(stored)


class Tar:
    """An archive in the making: one method a kind of member, `raw` for anything else, `done` for the bytes.

    What a ustar header cannot say goes into a PAX header by itself: sub-second times, long names, xattrs.
    """

    def __init__(self) -> None:
        self._out = bytearray()

    @property
    def size(self) -> int:
        """The offset at which the next member will begin."""
        return len(self._out)

    def raw(self, data: bytes) -> Self:
        self._out += data
        return self

    def member(
        self,
        name: bytes | str,
        data: bytes = b"",
        *,
        typeflag: bytes = b"0",
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
        mtime: int | str = 0,
        link: bytes | str = b"",
        rdev: tuple[int, int] = (0, 0),
        xattrs: Mapping[str, bytes] | None = None,
        extra: Mapping[str, str] | None = None,
        magic: bytes = USTAR,
        base256: bool = False,
    ) -> Self:
        name, link = _raw(name), _raw(link)
        records: dict[str | bytes, str | bytes] = {
            f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()
        }
        records.update(extra or {})
        if isinstance(mtime, str):
            records["mtime"] = mtime
        if len(name) > 100:
            records["path"] = name
        if len(link) > 100:
            records["linkpath"] = link
        if records:
            self._out += pax(records)
        self._out += header(
            name,
            typeflag=typeflag,
            mode=mode,
            uid=uid,
            gid=gid,
            size=len(data),
            mtime=int(float(mtime)),
            link=link,
            rdev=rdev,
            magic=magic,
            base256=base256,
        )
        self._out += padded(data)
        return self

    def file(
        self,
        name: bytes | str,
        data: bytes = b"",
        *,
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
        mtime: int | str = 1_700_000_000,
        xattrs: Mapping[str, bytes] | None = None,
    ) -> Self:
        return self.member(name, data, mode=mode, uid=uid, gid=gid, mtime=mtime, xattrs=xattrs)

    def dir(
        self,
        name: bytes | str,
        *,
        mode: int = 0o755,
        uid: int = 0,
        gid: int = 0,
        mtime: int | str = 1_700_000_000,
        xattrs: Mapping[str, bytes] | None = None,
    ) -> Self:
        return self.member(
            _raw(name).rstrip(b"/") + b"/", typeflag=b"5", mode=mode, uid=uid, gid=gid, mtime=mtime, xattrs=xattrs
        )

    def symlink(self, name: bytes | str, target: bytes | str, *, mtime: int | str = 1_700_000_000) -> Self:
        return self.member(name, typeflag=b"2", mode=0o777, link=target, mtime=mtime)

    def hardlink(self, name: bytes | str, target: bytes | str, *, mtime: int | str = 1_700_000_000) -> Self:
        return self.member(name, typeflag=b"1", link=target, mtime=mtime)

    def char(self, name: bytes | str, major: int, minor: int, *, mode: int = 0o600) -> Self:
        return self.member(name, typeflag=b"3", mode=mode, rdev=(major, minor), mtime=1_700_000_000)

    def block(self, name: bytes | str, major: int, minor: int, *, mode: int = 0o660) -> Self:
        return self.member(name, typeflag=b"4", mode=mode, rdev=(major, minor), mtime=1_700_000_000)

    def fifo(self, name: bytes | str, *, mode: int = 0o622) -> Self:
        return self.member(name, typeflag=b"6", mode=mode, mtime=1_700_000_000)

    def whiteout(self, name: bytes | str) -> Self:
        """Delete the lower layers' `name`."""
        directory, slash, base = _raw(name).rpartition(b"/")
        return self.member(directory + slash + b".wh." + base, mtime=1_700_000_000)

    def opaque(self, directory: bytes | str) -> Self:
        """Delete all that the lower layers have in `directory`; "" is the root."""
        prefix = _raw(directory).rstrip(b"/")
        return self.member((prefix + b"/" if prefix else b"") + b".wh..wh..opq", mtime=1_700_000_000)

    def done(self) -> bytes:
        return bytes(self._out) + END


def _raw(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
