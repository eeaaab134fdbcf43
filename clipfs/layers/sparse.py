"""How tar archives store files with holes: GNU's own format and its three ways to say the same in PAX.

This module owns the maps, which tell where the stored pieces belong. It does not know how blocks get here, nor what
else there is to know of a member. A map must be in order, within the file, and account for all that is stored; that
is what Go's archive/tar demands, and it leaves one reading of every archive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from clipfs.errors import ImageError, shown
from clipfs.layers.members import BLOCK, GNU, SPARSE, Header, Segment, checked_size
from clipfs.layers.pax import MAX_EXTENSION, SPARSE_MAP, decimal, numeric

# Old GNU: pairs in the header, whether more follow, the real size; then the pairs in an extension block.
_PAIR = 24
_PAIRS = slice(386, 482)
_EXTENDED = 482
_REAL_SIZE = slice(483, 495)
_EXTENSION_PAIRS = slice(0, 504)
_EXTENSION_EXTENDED = 504


@dataclass(slots=True)
class Sparse:
    """The map of a sparse file, which may have to be completed.

    size: of the file.  stored: how many bytes of contents follow what was read.  numbers: the map so far, flat: offset,
    length, offset, length …  more: whether it goes on.
    """

    size: int
    stored: int
    numbers: list[int]
    more: bool = False
    _read: int = 0

    def feed(self, block: bytes) -> None:
        """Read one more block of the map. Old GNU: an extension of the header."""
        self._count()
        self.numbers += _old_pairs(block[_EXTENSION_PAIRS])
        self.more = bool(block[_EXTENSION_EXTENDED])

    def _count(self) -> None:
        self._read += BLOCK
        if self._read > MAX_EXTENSION:
            raise ImageError(f"its sparse map has more than {MAX_EXTENSION} bytes")

    def segments(self, position: int) -> tuple[Segment, ...]:
        """Where the pieces of the file are, if the first one is stored at `position` of the layer."""
        found: list[Segment] = []
        end, at = 0, position
        for offset, length in zip(self.numbers[::2], self.numbers[1::2], strict=True):
            if not end <= offset <= offset + length <= self.size:
                raise ImageError(f"its sparse map is not in order within its {self.size} bytes, at offset {offset}")
            if length and found and found[-1][0] + found[-1][2] == offset:
                start, place, before = found.pop()
                found.append((start, place, before + length))
            elif length:
                found.append((offset, at, length))
            end, at = offset + length, at + length
        if at - position != self.stored:
            raise ImageError(f"its sparse map is for {at - position} bytes, but {self.stored} are stored")
        return tuple(found)


@dataclass(slots=True)
class _Sparse1(Sparse):
    """Format 1.0: decimal numbers, one a line, how many pairs there are first, in the first blocks of the contents."""

    _text: bytearray = field(default_factory=bytearray)
    _lines: int = 0
    _wanted: int = 0

    def feed(self, block: bytes) -> None:
        self._count()
        self.stored -= BLOCK
        if self.stored < 0:
            raise ImageError("its sparse map is longer than what is stored of it")
        self._text += block
        self._lines += block.count(b"\n")
        if not self._wanted:
            self._wanted = 1 + 2 * decimal(block.split(b"\n", 1)[0])
        if self._lines >= self._wanted:
            self.numbers = [decimal(line) for line in bytes(self._text).split(b"\n", self._wanted)[1:-1]]
            self.more = False


def begin(header: Header, said: Mapping[bytes, bytes], stored: int) -> Sparse | None:
    """The map, as far as a header and the PAX records before it say it; None if the file is not sparse.

    stored: the size that they state, which is that of what is in the archive.
    """
    if header.kind == SPARSE:
        if header.magic != GNU:
            raise ImageError("it is sparse in a way that is not GNU's")
        size = checked_size(numeric(header.block[_REAL_SIZE]))
        return Sparse(size, stored, _old_pairs(header.block[_PAIRS]), more=bool(header.block[_EXTENDED]))
    version = _version(said)
    if not version:
        return None
    if version not in (b"0.0", b"0.1", b"1.0"):
        raise ImageError(f"it is sparse in GNU's format {shown(version)}; 0.0, 0.1 and 1.0 are known")
    size = checked_size(decimal(said.get(b"GNU.sparse.realsize") or said.get(b"GNU.sparse.size", b"")))
    if version == b"1.0":
        return _Sparse1(size, stored, [], more=True)
    return Sparse(size, stored, _map_in_record(said))


def true_name(header: Header, said: Mapping[bytes, bytes]) -> bytes:
    """What a file is called whose header has a name that is made up, since others would extract what is stored of it.

    b"" where nobody says so, or the file is not sparse.
    """
    return said.get(b"GNU.sparse.name", b"") if header.kind != SPARSE and _version(said) else b""


def _version(said: Mapping[bytes, bytes]) -> bytes:
    """Which of its formats in PAX these records are of, b"" if of none."""
    version = said.get(b"GNU.sparse.major", b"0") + b"." + said.get(b"GNU.sparse.minor", b"0")
    return b"" if version == b"0.0" and SPARSE_MAP not in said and b"GNU.sparse.numblocks" not in said else version


def _map_in_record(said: Mapping[bytes, bytes]) -> list[int]:
    """Formats 0.0 and 0.1."""
    text = said.get(SPARSE_MAP, b"")
    numbers = [decimal(number) for number in text.split(b",")] if text else []
    if len(numbers) != 2 * decimal(said.get(b"GNU.sparse.numblocks", b"")):
        raise ImageError("its sparse map does not have as many entries as it says")
    return numbers


def _old_pairs(fields: bytes) -> list[int]:
    """The pairs in a GNU sparse header or one of its extension blocks; the first empty one ends them."""
    numbers: list[int] = []
    for at in range(0, len(fields) - _PAIR + 1, _PAIR):
        if not fields[at]:
            break
        numbers += numeric(fields[at : at + 12]), numeric(fields[at + 12 : at + _PAIR])
    return numbers
