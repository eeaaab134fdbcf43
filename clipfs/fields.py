"""Strict reading of JSON that a stranger wrote: types demanded, sizes bounded, the field at fault named.

This module knows JSON and nothing of images.
"""

from __future__ import annotations

import json
from typing import Any, Self

from clipfs.errors import ImageError, shown


class Fields:
    """A JSON object that a stranger wrote: each getter demands a type, and says which field did not have it.

    null and absence are the same, as they are to the Go tools that write these documents.
    """

    __slots__ = ("value", "where")

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ImageError(f"{where} should be a JSON object")
        self.value: dict[str, Any] = value
        self.where = where

    @classmethod
    def parse(cls, raw: bytes, where: str, limit: int, *, once: bool = False) -> Self:
        """A whole document of at most `limit` bytes. once: no key may be there twice."""
        return cls(parse_json(raw, where, limit, once=once), where)

    def exact(self, *names: str) -> Self:
        """The same. ImageError for a key that is one of these but for its case: Go's tools take it for that one."""
        known = {name.casefold(): name for name in names}
        for key in self.value.keys() - names:
            if key.casefold() in known:
                raise ImageError(f"{self.where} has {quoted(key)} where others read '{known[key.casefold()]}'")
        return self

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without a default it must be there."""
        value = self.value.get(key)
        return default if value is None and default is not None else _text(value, f"{self.where}: {key}")

    def number(self, key: str, most: int, default: int | None = None) -> int:
        """A whole number from 0 to `most`; without a default it must be there."""
        value = self.value.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 <= value <= most:
            raise ImageError(f"{self.where}: {key} should be a number from 0 to {most}, not {quoted(repr(value))}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings. A bare string is a list of one: Docker once wrote Entrypoint and Cmd that way."""
        value = self.value.get(key)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, list):
            raise ImageError(f"{self.where}: {key} should be a list of strings")
        return tuple(_text(each, f"{self.where}: {key}") for each in values)

    def names(self, key: str) -> tuple[str, ...]:
        """The keys of an object."""
        return tuple(_text(each, f"{self.where}: {key}") for each in self.child(key).value)

    def mapping(self, key: str) -> dict[str, str]:
        """An object of strings."""
        where = f"{self.where}: {key}"
        return {name: _text(value, where) for name, value in self.child(key).value.items() if value is not None}

    def child(self, key: str) -> Fields:
        """An object; an empty one if it is not there."""
        value = self.value.get(key)
        child = Fields({} if value is None else value, f"{self.where}: {key}")
        for name in child.value:
            _text(name, child.where)
        return child

    def children(self, key: str) -> list[Fields]:
        """A list of objects."""
        value = self.value.get(key)
        if not isinstance(value, list | None):
            raise ImageError(f"{self.where}: {key} should be a list")
        return [Fields(each, f"{self.where}: {key}[{number}]") for number, each in enumerate(value or [])]


def parse_json(raw: bytes, where: str, limit: int, *, once: bool = False) -> object:
    """Any JSON of at most `limit` bytes; ImageError if it is none. once: also if an object has a key twice."""
    if len(raw) > limit:
        raise ImageError(f"{where} has {len(raw)} bytes; more than {limit} are not read")
    try:
        return json.loads(raw, object_pairs_hook=_once if once else None)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{where} is no valid JSON: {error}") from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _text(value: object, where: str) -> str:
    """A string that can become an argument, a file name or a header: Unicode proper, and no NUL."""
    if not isinstance(value, str):
        raise ImageError(f"{where} should be a string, not {quoted(repr(value))}")
    if "\0" in value or (not value.isascii() and any(0xD800 <= ord(c) < 0xE000 for c in value)):
        raise ImageError(f"{where} has a character in it that no string can keep: {quoted(value)}")
    return value


def quoted(text: str) -> str:
    """Text of a stranger's for a message: printable, quoted, bounded."""
    return shown(text.encode("utf-8", "backslashreplace"), 120)
