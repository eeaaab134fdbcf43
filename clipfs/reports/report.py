"""What a mount has done, as facts: what was fetched of what there is, why, for which files, what went wrong on the way.

This module owns what a report says, and its JSON, written and read back. `reporter` makes reports; how they look on a
terminal is `cli.explain`'s affair, as a page `page`'s.

The JSON is stable: within a `VERSION`, fields are added and neither renamed nor removed. Sizes are bytes, times seconds
since the mount began.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from clipfs.errors import UsageError

VERSION = 1

#: Why a span was fetched: a reader waited for it; read-ahead; a trace; ``--prefetch all``. A span that was only used
#: was ``cached``, on the disk or in memory.
WHYS = ("read", "ahead", "trace", "all", "cached")
TIERS = ("memory", "disk", "source")

#: What a saved report may have; one of an image of 100 GB with a full journal has half of that.
MOST_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Mounted:
    """What is mounted where, and for how long it has been served. serving: does it go on?"""

    mountpoint: str
    clip: str
    source: str
    pid: int
    serving: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Ahead:
    """What one kind of fetching ahead brought, and how much of it readers needed."""

    spans: int
    bytes: int
    used_spans: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class Touched:
    """A span that was fetched or used: its number, why it came and when; used: did a reader need it?"""

    span: int
    why: str
    at: float
    used: bool


@dataclass(frozen=True, slots=True)
class LayerUse:
    """A layer; starts: the compressed byte at which each span begins."""

    digest: str
    codec: str
    bytes: int
    decoded_bytes: int
    fetched_bytes: int
    starts: tuple[int, ...]
    touched: tuple[Touched, ...]


@dataclass(frozen=True, slots=True)
class Fetch:
    """One range that came: spans first to last of a layer, at the time `at`, after it `took` so long. path: the file
    that was waited for, empty if none was."""

    at: float
    took: float
    layer: int
    first: int
    last: int
    bytes: int
    why: str
    path: str


@dataclass(frozen=True, slots=True)
class FileUse:
    """A file that was the first to need some spans. bytes: compressed, of those that were fetched in this mount, for it
    or ahead of it; memory, disk, source: the spans by where they were when they were needed."""

    path: str
    at: float
    bytes: int
    spans: int
    memory: int
    disk: int
    source: int


@dataclass(frozen=True, slots=True)
class Said:
    """Something that went another way than it should: an attempt that failed, a warning, bytes that were wrong."""

    at: float
    kind: str  # retry, refetch, or the level of what was logged
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything. bytes_total: of all layers, compressed. counters: as `blocks.counters` names them."""

    version: int
    mount: Mounted
    manifest: str
    bytes_total: int
    decoded_total: int
    bytes_fetched: int
    bytes_served: int
    bytes_decoded: int
    fetched_share: float | None
    fetched_per_served: float | None
    decoded_per_served: float | None
    requests: dict[str, int]
    ahead: dict[str, Ahead]
    counters: dict[str, int]
    journal_complete: bool
    layers: tuple[LayerUse, ...]
    files: tuple[FileUse, ...]
    fetches: tuple[Fetch, ...]
    said: tuple[Said, ...]

    def to_json(self) -> str:
        """The report as `parse` reads it."""
        return json.dumps(asdict(self), ensure_ascii=True)


# --- reading one back


def parse(raw: bytes, name: str) -> Report:
    """A report that `Report.to_json` wrote. UsageError if it is none."""
    try:
        if len(raw) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
        found = json.loads(raw)
        version = found.get("version") if isinstance(found, dict) else None
        if version != VERSION:
            raise ValueError("it is of another version" if version else "it has no version")
        report: Report = _load(Report, found, "")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is no report of a mount: {error}") from None
    for layer in report.layers:
        if any(not 0 <= each.span < len(layer.starts) for each in layer.touched):
            raise UsageError(f"{name} is no report of a mount: a layer has no such span")
    return report


def _load(kind: Any, value: Any, where: str) -> Any:
    """`value` as what the annotation `kind` says. ValueError names the place at which it is something else."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        hints, names = typing.get_type_hints(kind), [each.name for each in fields(kind)]
        loaded = {name: _load(hints[name], value.get(name), f"{where}.{name}") for name in names}
        return typing.cast("type[Any]", kind)(**loaded)
    if origin is tuple and isinstance(value, list):
        return tuple(_load(arguments[0], each, f"{where}[{at}]") for at, each in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _load(arguments[1], each, f"{where}.{key}") for key, each in value.items()}
    if origin is types.UnionType:
        return None if value is None else _load(arguments[0], value, where)
    # No NaN is below it; nor must it become a float to be compared, which an integer may be too large for.
    if kind is float and type(value) in (int, float) and abs(value) < 1e15:
        return float(value)
    # Counters have 64 bits.
    if kind in (int, str, bool) and type(value) is kind and (kind is not int or abs(value) < 1 << 64):
        return value
    raise ValueError(f"{where.lstrip('.') or 'it'} is not what it should be")


def slowest(report: Report, count: int = 10) -> Sequence[Fetch]:
    """The ranges that took longest."""
    return sorted(report.fetches, key=lambda each: -each.took)[:count]
