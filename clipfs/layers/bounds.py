"""How much an image may say of its members, whatever says it: tar headers, a table of contents, one layer or many.

All of it is kept in memory, and a gzip bomb of headers is a thousandth as large as what it unpacks to. This module owns
what things count for. It does not know where they come from.
"""

from __future__ import annotations

from collections.abc import Iterator

from clipfs.errors import ImageError
from clipfs.layers.members import Entry, Member

# Counted as the bytes of tar that say it, which is about what it takes in memory. Large images have a million members,
# which count for half a GiB, or for one and a half with extended headers.
MAX_METADATA = 2 << 30

# An xattr or a piece of a sparse file takes this much memory besides its bytes; a record of an extended header takes
# as much time as this many bytes of names.
_OBJECT, RECORD = 256, 64
# What a part of a name takes time for, besides its bytes; names that fit into a header have few.
_PART = 16
# What is in xattrs counts so many times: honest ones have some twenty bytes, and nothing else is that large.
_VALUE = 8


class Budget:
    """What is left of that for the layers of one image."""

    def __init__(self) -> None:
        self._said = 0

    def take(self, size: int, name: bytes, offset: int) -> None:
        """So much more is said. ImageError, at the member of that name and offset, if it is too much."""
        self._said += size
        if self._said > MAX_METADATA:
            sentence = f"names and attributes of the image's members take more than {MAX_METADATA >> 20} MiB"
            raise ImageError(sentence, member=name, offset=offset)


def extra_weight(member: Member) -> int:
    """What a member that is not plain counts for besides its header."""
    objects = len(member.xattrs) + len(member.segments)
    values = sum(map(len, member.xattrs.values()))
    parts = member.path.count(b"/") + member.link.count(b"/")
    return len(member.path) + len(member.link) + _PART * parts + _VALUE * values + _OBJECT * objects


def drained(entries: list[Entry]) -> Iterator[Entry]:
    """Each in its order, while the list lets go of it: those of a large layer take as much memory as their tree."""
    entries.reverse()
    while entries:
        yield entries.pop()
