"""Where else an image may be read: the mirrors that ``registries.conf`` lists, in the format of containers' tools.

Of each ``[[registry]]`` table are read: prefix, location, insecure, blocked, mirror-by-digest-only, and of its
``[[registry.mirror]]`` tables: location, insecure, pull-from-mirror. The rest is for tools that complete short names.
Files are looked for where those tools look: $CONTAINERS_REGISTRIES_CONF alone; or the user's, which then stands for the
system's; and the drop-in directories beside them.

This module reads files, and knows nothing of HTTP.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import NamedTuple

from clipfs.errors import ImageError, SourceError, UsageError
from clipfs.fields import Fields
from clipfs.oci import Reference

# The longest that tools ship has 4 KB, the longest list of mirrors one can think of a hundred.
_MAX_FILE = 1 << 20
_PULLS = ("all", "digest-only", "tag-only")


class Endpoint(NamedTuple):
    """A registry that has the image, by the name that it has there."""

    reference: Reference
    insecure: bool


@dataclass(frozen=True, slots=True)
class _Mirror:
    location: str
    insecure: bool
    pulls: str


@dataclass(frozen=True, slots=True)
class _Table:
    """One ``[[registry]]``. location: empty if the image's own name is the place."""

    prefix: str
    location: str
    insecure: bool
    blocked: bool
    mirrors: tuple[_Mirror, ...]
    where: str

    def matched(self, name: str) -> int:
        """How many characters of an image's name this table is about; 0 if it is not meant."""
        if self.prefix.startswith("*."):
            host = name.partition("/")[0].partition(":")[0]
            return len(host) if host.endswith(self.prefix[1:]) else 0
        rest = name[len(self.prefix) :]
        return len(self.prefix) if name.startswith(self.prefix) and rest[:1] in ("", "/", ":", "@") else 0


def endpoints(reference: Reference, *, insecure: bool) -> list[Endpoint]:
    """Where to read an image, in this order; the last is the registry itself.

    UsageError for a file that cannot be understood, SourceError if it forbids the image.
    """
    name = str(reference)
    found = [(length, table) for table in _tables() if (length := table.matched(name))]
    if not found:
        return [Endpoint(reference, insecure)]
    # The longest match decides; a wildcard matches the host and nothing more.
    length, table = max(found, key=lambda each: (each[0], not each[1].prefix.startswith("*")))
    if table.blocked:
        raise SourceError(f"{table.where} blocks images of {table.prefix}")
    wanted = "digest-only" if reference.digest else "tag-only"
    places = [
        Endpoint(_moved(mirror.location, name, length, table.where), mirror.insecure)
        for mirror in table.mirrors
        if mirror.pulls in ("all", wanted)
    ]
    itself = _moved(table.location, name, length, table.where) if table.location else reference
    return [*places, Endpoint(itself, insecure or table.insecure)]


def _moved(location: str, name: str, length: int, where: str) -> Reference:
    try:
        return Reference.parse(location + name[length:])
    except UsageError as error:
        raise UsageError(f"{where} has a location of no use: {error}") from None


def _tables() -> list[_Table]:
    """All tables; of two with the same prefix, the later one."""
    tables: dict[str, _Table] = {}
    for path in _files():
        for table in _read(path):
            tables[table.prefix] = table
    return list(tables.values())


def _files() -> Iterator[Path]:
    if named := os.environ.get("CONTAINERS_REGISTRIES_CONF"):
        yield Path(named)
        return
    home = Path(os.environ.get("HOME") or "/")
    user = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers"
    system = Path("/etc/containers")
    # In a way that takes what this user may not look into for empty: $HOME may be another's.
    both = [user] if os.path.isfile(user / "registries.conf") else [system, user]
    yield both[0] / "registries.conf"
    for directory in both:
        dropped_in = directory / "registries.conf.d"
        yield from (dropped_in / name for name in sorted(glob("*.conf", root_dir=dropped_in)))


def _read(path: Path) -> Iterator[_Table]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE + 1)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if len(raw) > _MAX_FILE:
        raise UsageError(f"{path} has more than {_MAX_FILE} bytes, which are not read")
    try:
        document = Fields(tomllib.loads(raw.decode()), str(path))
        for table in document.children("registry"):
            yield _table(table, str(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no valid TOML: {error}") from None
    except ImageError as error:
        raise UsageError(str(error)) from None


def _table(table: Fields, where: str) -> _Table:
    location = table.text("location", "").rstrip("/")
    prefix = table.text("prefix", "").rstrip("/") or location
    if not prefix:
        raise UsageError(f"{table.where} has neither a prefix nor a location")
    by_digest = _flag(table, "mirror-by-digest-only")
    mirrors = []
    for mirror in table.children("mirror"):
        pulls = "digest-only" if by_digest else mirror.text("pull-from-mirror", "all")
        if pulls not in _PULLS:
            raise UsageError(f"{mirror.where}: pull-from-mirror is one of {', '.join(_PULLS)}")
        place = mirror.text("location").rstrip("/")
        mirrors.append(_Mirror(place, _flag(mirror, "insecure"), pulls))
    return _Table(prefix, location, _flag(table, "insecure"), _flag(table, "blocked"), tuple(mirrors), where)


def _flag(table: Fields, key: str) -> bool:
    value = table.value.get(key, False)
    if not isinstance(value, bool):
        raise UsageError(f"{table.where}: {key} should be true or false")
    return value
