"""Makes a `Report` of a mount: of its index, its counters and its journal, while it lives or after it died."""

from __future__ import annotations

import math
import os
import stat
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from clipfs.blocks import journal
from clipfs.format.container import Span
from clipfs.format.index import Index
from clipfs.log import redacted
from clipfs.reports.report import TIERS, VERSION, WHYS, Ahead, Fetch, FileUse, LayerUse, Mounted, Report, Said, Touched
from clipfs.state import MountRecord


def of_mount(index: Index, record: MountRecord, counters: Mapping[str, int], *, serving: bool) -> Report:
    """The report of what a record tells of. serving: does its process go on?"""
    events = list(journal.read(record.journal))
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - record.process.started / os.sysconf("SC_CLK_TCK")
    if not serving and not record.alive:
        seconds = max((float(event["at"]) for event in events if isinstance(event.get("at"), int | float)), default=0)
    mount = Mounted(
        mountpoint=record.mountpoint,
        clip=record.clip,
        source=redacted(record.source),
        pid=(record.server or record.process).pid,
        serving=serving,
        seconds=round(seconds, 1),
    )
    return make(index, counters, events, mount, complete=record.journal.stat().st_size <= journal.MOST)


def make(
    index: Index,
    counters: Mapping[str, int],
    events: Iterable[Mapping[str, Any]],
    mount: Mounted,
    *,
    complete: bool = True,
) -> Report:
    """The report of a mount of `index`. complete: are these all events, or did the journal become too long?"""
    return _Making(index, events).report(counters, mount, complete)


class _Making:
    """Events sorted out by what they tell."""

    def __init__(self, index: Index, events: Iterable[Mapping[str, Any]]) -> None:
        self._index = index
        self._spans = [len(layer.spans) for layer in index.layers]
        self._fetches: list[Mapping[str, Any]] = []
        self._wants: dict[tuple[int, int], Mapping[str, Any]] = {}
        self.said: list[Said] = []
        for event in events:
            self._sort(event)
        self._fetched: dict[tuple[int, int], tuple[str, float]] = {}
        for event in self._fetches:
            for number in range(event["first"], event["last"] + 1):
                self._fetched.setdefault((event["layer"], number), (_why(event), float(event["at"])))
        self._paths = paths(index, {event["address"] for event in self._wants.values()})
        self._starts = [_starts(layer.spans) for layer in index.layers]

    def _sort(self, event: Mapping[str, Any]) -> None:
        kind, at = event.get("event"), event.get("at")
        if not isinstance(at, int | float) or not math.isfinite(at):
            return
        if kind == "log":
            origin, message = str(event.get("origin")), redacted(str(event.get("message")))
            self.said.append(Said(float(at), str(event.get("kind")), f"{origin}: {message}"))
            return
        layer, first, last = (event.get(name) for name in ("layer", "first", "last"))
        if not (isinstance(layer, int) and isinstance(first, int) and isinstance(last, int)):
            return
        if not (0 <= layer < len(self._spans) and 0 <= first <= last < self._spans[layer]):
            return
        if kind == "fetch" and isinstance(event.get("bytes"), int) and isinstance(event.get("took"), int | float):
            self._fetches.append(event)
        elif kind == "want" and isinstance(event.get("address"), int):
            self._wants.setdefault((layer, first), event)
        elif kind == "refetch":
            reason = redacted(str(event.get("reason")))
            self.said.append(Said(float(at), "refetch", f"layer {layer}, span {first}: {reason}"))

    def report(self, counters: Mapping[str, int], mount: Mounted, complete: bool) -> Report:
        layers = self._index.layers
        served, fetched, decoded = (counters[name] for name in ("bytes_served", "bytes_fetched", "bytes_decoded"))
        total = sum(layer.size for layer in layers)
        waited = counters["disk_hits"] + counters["source_hits"]
        return Report(
            version=VERSION,
            mount=mount,
            manifest=str(self._index.manifest.digest),
            bytes_total=total,
            decoded_total=sum(layer.diff_size for layer in layers),
            bytes_fetched=fetched,
            bytes_served=served,
            bytes_decoded=decoded,
            fetched_share=_ratio(fetched, total),
            fetched_per_served=_ratio(fetched, served),
            decoded_per_served=_ratio(decoded, served),
            requests={
                "memory": counters["requests"] - waited,
                "disk": counters["disk_hits"],
                "source": counters["source_hits"],
                "failed": counters["failures"],
            },
            ahead=self._ahead(),
            counters=dict(counters),
            journal_complete=complete,
            layers=tuple(self._layer(number) for number in range(len(layers))),
            files=tuple(self._files()),
            fetches=tuple(self._ranges()),
            said=tuple(self.said),
        )

    def _size(self, layer: int, number: int) -> int:
        """Compressed bytes of a span. Those of one zstd frame begin together; each has what the one before has not."""
        starts = self._starts[layer]
        after = number + 1
        while after < len(starts) and starts[after] == starts[number]:
            after += 1
        before = bisect_left(starts, starts[number])
        end = starts[after] if after < len(starts) else self._index.layers[layer].size
        return max(0, end - starts[number]) // (after - before)

    def _ahead(self) -> dict[str, Ahead]:
        found: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for span, (why, _) in self._fetched.items():
            if why != "read":
                found[why].append(span)
        return {
            why: Ahead(
                spans=len(spans),
                bytes=sum(self._size(*span) for span in spans),
                used_spans=sum(span in self._wants for span in spans),
                used_bytes=sum(self._size(*span) for span in spans if span in self._wants),
            )
            for why, spans in sorted(found.items())
        }

    def _layer(self, number: int) -> LayerUse:
        layer = self._index.layers[number]
        touched = []
        for span in range(self._spans[number]):
            fetched, want = self._fetched.get((number, span)), self._wants.get((number, span))
            if fetched is not None:
                touched.append(Touched(span, *fetched, used=want is not None))
            elif want is not None:
                touched.append(Touched(span, "cached", float(want["at"]), used=True))
        return LayerUse(
            digest=str(layer.digest),
            codec=layer.codec.name.lower(),
            bytes=layer.size,
            decoded_bytes=layer.diff_size,
            fetched_bytes=sum(event["bytes"] for event in self._fetches if event["layer"] == number),
            starts=tuple(self._starts[number]),
            touched=tuple(touched),
        )

    def _files(self) -> Iterator[FileUse]:
        """Those that pulled most first."""
        sizes: Counter[str] = Counter()
        tiers: dict[str, Counter[str]] = defaultdict(Counter)
        first: dict[str, float] = {}
        for span, event in self._wants.items():
            path = self._paths.get(event["address"], "")
            sizes[path] += self._size(*span) if span in self._fetched else 0
            tiers[path][_tier(event)] += 1
            first.setdefault(path, float(event["at"]))
        for path, size in sorted(sizes.items(), key=lambda each: (-each[1], first[each[0]])):
            by = tiers[path]
            yield FileUse(path, first[path], size, by.total(), *(by[tier] for tier in TIERS))

    def _ranges(self) -> Iterator[Fetch]:
        for event in self._fetches:
            layer, spans = event["layer"], range(event["first"], event["last"] + 1)
            wants = (self._wants.get((layer, number)) for number in spans)
            # Who wanted it before it came, for it may have been read again by others later.
            path = next(
                (self._paths.get(want["address"], "") for want in wants if want and want["at"] <= event["at"]), ""
            )
            yield Fetch(
                at=float(event["at"]),
                took=float(event["took"]),
                layer=layer,
                first=spans.start,
                last=spans.stop - 1,
                bytes=event["bytes"],
                why=_why(event),
                path=path,
            )


def paths(index: Index, addresses: set[int]) -> dict[int, str]:
    """The files that these addresses of the data space belong to; of hard links, the first one."""
    pending = sorted(addresses)
    found: dict[int, str] = {}
    if not pending:
        return found
    for path, node in index.walk():
        if not stat.S_ISREG(node.mode) or not node.size:
            continue
        at = bisect_left(pending, node.address)
        while at < len(pending) and pending[at] < node.address + node.size:
            found.setdefault(pending[at], "/" + path.decode("utf-8", "backslashreplace"))
            at += 1
    return found


def _why(event: Mapping[str, Any]) -> str:
    # What is no known reason is the file of a trace that somebody gave.
    why = event.get("why")
    return why if why in WHYS else "trace"


def _tier(event: Mapping[str, Any]) -> str:
    tier = event.get("tier")
    return tier if tier in TIERS else "source"


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _starts(spans: Sequence[Span]) -> list[int]:
    """Where the bytes are that each span brings. Pieces that share a seek point follow each other."""
    found: list[int] = []
    end = 0
    for span in spans:
        found.append(max(found[-1], end) if span.skip and found else span.start)
        end = span.end
    return found
