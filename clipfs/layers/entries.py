"""The entries of a layer's table of contents, one by one out of its JSON.

This module knows JSON and the outermost shape of the table, `{"version": 1, "entries": [{…}, …]}`, and not what entries
mean. A table can have a million of them, and hide a bomb: what costs three bytes as JSON costs seventy as a list. So
never more than one entry is taken out of the text, and none that is larger than an entry can be.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator

from clipfs.errors import ImageError, shown
from clipfs.fields import parse_json, quoted

# One entry as JSON: names and xattrs of Linux at their longest, in base64 and with escapes, are below this.
MAX_ENTRY = 1 << 20

# An object without lists, in which objects are at most one deep, as xattrs are. Possessive, so that it is tried once.
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_FLAT = rb'[^{}"\[\]]++|' + _STRING
_ENTRY = re.compile(rb"\{(?:" + _FLAT + rb"|\{(?:" + _FLAT + rb")*+\})*+\}", re.DOTALL)
_SCALAR = re.compile(_STRING + rb"|[-+.0-9a-zA-Z]++", re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*+")


def entries_in(document: bytes) -> Iterator[object]:
    """Each entry as Python has it. Raises ImageError where the document is no table of contents."""
    at, found = _after(document, 0, b"{"), False
    while True:
        key, at = _scalar(document, at)
        at = _after(document, at, b":")
        if key == "entries" and document[at : at + 1] == b"[" and not found:
            found = True
            at = yield from _list(document, at)
        else:
            value, at = _scalar(document, at)
            if key == "version" and value != 1:
                raise ImageError(f"it is of version {quoted(str(value))}, and clipfs reads version 1")
            found = found or (key == "entries" and value is None)  # what Go makes of an empty list
        at = _space(document, at)
        if document[at : at + 1] == b"}":
            break
        at = _after(document, at, b",")
    if not found or _space(document, at + 1) != len(document):
        raise ImageError(f"it is no table of contents: it {'goes on after its end' if found else 'has no entries'}")


def _list(document: bytes, at: int) -> Generator[object, None, int]:
    """The objects of the list that begins at `at`; returns where it has ended."""
    at = _space(document, at + 1)
    if document[at : at + 1] == b"]":
        return at + 1
    while True:
        entry = _ENTRY.match(document, at, at + MAX_ENTRY)
        if entry is None:
            raise ImageError(f"it is no table of contents: no entry of at most {MAX_ENTRY >> 20} MiB is at byte {at}")
        yield parse_json(entry[0], f"the entry at byte {at}", MAX_ENTRY)
        at = _space(document, entry.end())
        if document[at : at + 1] == b"]":
            return at + 1
        at = _after(document, at, b",")


def _scalar(document: bytes, at: int) -> tuple[object, int]:
    """The string or number at `at`, and where it has ended."""
    found = _SCALAR.match(document, at, at + MAX_ENTRY)
    if found is None:
        raise ImageError(f"it is no table of contents: neither a string nor a number is at byte {at}")
    return parse_json(found[0], f"what is at byte {at}", MAX_ENTRY), found.end()


def _after(document: bytes, at: int, mark: bytes) -> int:
    at = _space(document, at)
    if document[at : at + 1] != mark:
        raise ImageError(f"it is no table of contents: {shown(mark)} should be at byte {at}")
    return _space(document, at + 1)


def _space(document: bytes, at: int) -> int:
    found = _SPACE.match(document, at)
    return found.end() if found else at
