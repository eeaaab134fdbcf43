"""A report as pictures: the layers with what was read of them, and when it came. Plain SVG, coloured by the page.

The colours are classes (``why-read``, ``why-ahead``, …) and the page says what they look like in the light and in the
dark; ``--t`` is when a span came, from 0 to 1, for whoever wants to colour by that.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

from clipfs.reports.report import Fetch, LayerUse, Report, Touched
from clipfs.reports.wording import AHEAD, duration, size

#: What each colour says.
LEGEND = {
    "read": "a reader waited for it",
    "ahead": "fetched ahead of a sequential reader",
    "trace": "fetched because an earlier run needed it (trace)",
    "all": "fetched in the background (--prefetch all)",
    "cached": "was cached already, not fetched",
    "never": "never touched",
}

_WIDTH = 960.0

# The map: a row's height and the room below it, spans in a row if all are alike, rows of the whole image at most.
_ROW, _STEP, _IN_A_ROW, _ROWS = 18, 22, 48, 14
# Above a layer's first row.
_LABEL = 22
# The smallest layer can still be seen, and cells narrower than this are not told apart but by their colour.
_LEAST, _THIN = 6.0, 4.0

# Over a span that was fetched ahead and that nobody read.
_HATCH = (
    '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="2.4" height="5" class="hatch"/></pattern></defs>'
)

# The timeline: the curve's height, a lane's, how many there are at most. Later ranges share the last one.
_CURVE, _LANE, _LANES = 120, 9, 14
# Bars that are drawn at most: the longest are what people look for.
_BARS = 3000
# Nothing came for longer than this share of the time in which something did: cut short, to this width.
_IDLE, _CUT = 0.15, 34.0
# More than can be told from each other; a stranger's report may have a million.
_MOST_CUTS = 300


def layer_map(report: Report) -> str:
    """Each layer as a run of boxes, one a span, as wide as it is long; it goes on in the next row."""
    spans = sum(len(layer.starts) for layer in report.layers)
    rows = min(max(1.0, spans / _IN_A_ROW), _ROWS)
    # Not the total that a report says: it may come from elsewhere.
    scale = rows * _WIDTH / max(1, sum(max(0, layer.bytes) for layer in report.layers))
    latest = max((each.at for layer in report.layers for each in layer.touched), default=0.0) or 1.0
    parts, y = [_HATCH], 0.0
    for number, layer in enumerate(report.layers):
        width = max(layer.bytes * scale, _LEAST)
        height = -(-width // _WIDTH) * _STEP
        what = f"layer {number} · {size(layer.bytes)} {layer.codec}"
        parts.append(
            f'<text x="0" y="{y + 14:.0f}" class="label">{escape(what)}</text>'
            f'<text x="{_WIDTH:.0f}" y="{y + 14:.0f}" class="note end">{_share(layer)}</text>'
        )
        for x, wide, cell in _cells(layer, width):
            parts += _boxes(x, wide, y + _LABEL, cell, layer, latest)
        y += _LABEL + height + 8
    return _svg(y, "What was read of each layer", parts)


def _share(layer: LayerUse) -> str:
    used = sum(each.used for each in layer.touched)
    return f"{used} of {len(layer.starts)} spans read, {size(layer.fetched_bytes)} fetched"


@dataclass(frozen=True, slots=True)
class _Cell:
    """A span, or several thin ones that look the same."""

    first: int
    last: int
    touched: Touched | None

    def like(self, other: Touched | None) -> bool:
        mine = self.touched
        if mine is None or other is None:
            return mine is other
        return (mine.why, mine.used) == (other.why, other.used)


def _cells(layer: LayerUse, width: float) -> Iterator[tuple[float, float, _Cell]]:
    """(place, width) of each cell on a line as long as the layer."""
    touched = {each.span: each for each in layer.touched}
    edges = _edges(layer, width)
    cell: _Cell | None = None
    thin = width / max(1, len(layer.starts)) < _THIN
    for number in range(len(layer.starts)):
        here = touched.get(number)
        if cell is not None and thin and cell.like(here):
            cell = _Cell(cell.first, number, cell.touched)
            continue
        if cell is not None:
            yield edges[cell.first], edges[cell.last + 1] - edges[cell.first], cell
        cell = _Cell(number, number, here)
    if cell is not None:
        yield edges[cell.first], edges[cell.last + 1] - edges[cell.first], cell


def _edges(layer: LayerUse, width: float) -> list[float]:
    """Where the spans begin, in pixels; those of one zstd frame begin at the same byte and share its room."""
    starts, end = layer.starts, max(layer.bytes, 1)
    edges: list[float] = []
    first = 0
    while first < len(starts):
        after = first + 1
        while after < len(starts) and starts[after] <= starts[first]:
            after += 1
        low, high = (min(max(0, at), end) for at in (starts[first], starts[after] if after < len(starts) else end))
        edges += [(low + (high - low) * at / (after - first)) * width / end for at in range(after - first)]
        first = after
    # What is before the first span (a head that nobody reads) belongs to it.
    return [0.0, *edges[1:], width]


def _boxes(x: float, wide: float, y: float, cell: _Cell, layer: LayerUse, latest: float) -> Iterator[str]:
    why = "never" if cell.touched is None else escape(cell.touched.why)
    when = 0.0 if cell.touched is None else min(max(0.0, cell.touched.at / latest), 1.0)
    unused = cell.touched is not None and not cell.touched.used
    style = "" if cell.touched is None else f' style="--t:{when:.3f}"'
    title = f"<title>{escape(_told(cell, layer))}</title>"
    while wide > 0:
        row, at = divmod(x, _WIDTH)
        here = min(wide, _WIDTH - at)
        room = 1.0 if here >= _THIN else 0.0
        place = f'x="{at:.2f}" y="{y + row * _STEP:.0f}" width="{max(here - room, 0.3):.2f}" height="{_ROW}"'
        yield f'<rect {place} class="why-{why}"{style}>{title}</rect>'
        if unused:
            yield f'<rect {place} class="unused"><title>{escape(_told(cell, layer))}</title></rect>'
        x, wide = x + here, wide - here
        if wide < 0.01:
            break


def _told(cell: _Cell, layer: LayerUse) -> str:
    spans = f"span {cell.first}" if cell.first == cell.last else f"spans {cell.first} to {cell.last}"
    if cell.first == cell.last:
        after = layer.starts[cell.last + 1] if cell.last + 1 < len(layer.starts) else layer.bytes
        spans += f", {size(max(0, after - layer.starts[cell.first]))}"
    if cell.touched is None:
        return f"{spans}: never touched"
    end = "" if cell.touched.used else "; not used"
    return f"{spans}: {LEGEND.get(cell.touched.why, cell.touched.why)}, {cell.touched.at:.2f} s{end}"


# --- the timeline


def timeline(report: Report) -> str:
    """How much came by when, and below it a bar for each range, from when it was asked for to when it was there."""
    fetches = sorted(report.fetches, key=lambda each: each.at - each.took)
    if not fetches:
        return ""
    axis = _Axis(fetches)
    lanes = _lanes(fetches)
    base = _CURVE + 26
    height = base + (max(lanes) + 1) * _LANE + 6
    total = sum(each.bytes for each in fetches)
    parts = [*axis.marks(_CURVE, height), *_curve(fetches, axis, total)]
    bars = list(zip(fetches, lanes, strict=True))
    if len(bars) > _BARS:
        bars = sorted(bars, key=lambda each: -each[0].took)[:_BARS]
    for fetch, lane in bars:
        left, right = axis.at(fetch.at - fetch.took), axis.at(fetch.at)
        what = fetch.path or AHEAD.get(fetch.why, fetch.why)
        title = f"{size(fetch.bytes)} in {fetch.took:.3f} s, layer {fetch.layer}: {what}"
        parts.append(
            f'<rect x="{left:.2f}" y="{base + lane * _LANE}" width="{max(right - left, 1.5):.2f}" height="{_LANE - 2}" '
            f'rx="1" class="why-{escape(fetch.why)}"><title>{escape(title)}</title></rect>'
        )
    return _svg(height, "When it came", parts)


class _Axis:
    """Time to pixels. Long times in which nothing came are cut short."""

    def __init__(self, fetches: Sequence[Fetch]) -> None:
        busy: list[list[float]] = []
        for fetch in fetches:
            begin = max(0.0, fetch.at - fetch.took)
            end = max(begin, fetch.at)
            if busy and begin <= busy[-1][1]:
                busy[-1][1] = max(busy[-1][1], end)
            else:
                busy.append([begin, end])
        spent = sum(end - begin for begin, end in busy)
        pauses = sorted((after[0] - before[1] for before, after in pairwise(busy)), reverse=True)
        least = max([_IDLE * spent, *pauses[_MOST_CUTS : _MOST_CUTS + 1]])
        self._parts: list[list[float]] = []
        for begin, end in busy:
            if self._parts and begin - self._parts[-1][1] <= least:
                self._parts[-1][1] = end
            else:
                self._parts.append([begin, end])
        # However many pauses there are, they leave room for what is between them.
        self._cut = min(_CUT, _WIDTH / 3 / len(self._parts))
        shown = max(0.001, sum(end - begin for begin, end in self._parts))
        self._scale = (_WIDTH - self._cut * (len(self._parts) - 1)) / shown
        self._step = _round(shown / 8)
        widths = [(end - begin) * self._scale + self._cut for begin, end in self._parts]
        self._lefts = list(accumulate(widths[:-1], initial=0.0))
        self._ends = [end for _, end in self._parts]

    def at(self, when: float) -> float:
        number = min(bisect_left(self._ends, when), len(self._ends) - 1)
        return min(self._lefts[number] + max(0.0, when - self._parts[number][0]) * self._scale, _WIDTH)

    def marks(self, y: float, height: float) -> Iterator[str]:
        last = -100.0
        for number, (begin, end) in enumerate(self._parts):
            if number:
                gap, left = begin - self._parts[number - 1][1], self.at(begin) - self._cut
                yield (
                    f'<rect x="{left:.1f}" y="0" width="{self._cut:.1f}" height="{height:.0f}" class="idle">'
                    f"<title>nothing came for {duration(gap)}</title></rect>"
                )
            # Counted, for a sum may be so large that a step changes nothing.
            for count in range(math.ceil(begin / self._step), math.floor(end / self._step) + 1):
                when = count * self._step
                x = self.at(when)
                if x - last >= 48 and self.at(end) - x >= 32:
                    yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height:.0f}" class="grid"/>'
                    yield f'<text x="{x + 3:.1f}" y="{y + 14:.0f}" class="note">{when:.10g} s</text>'
                    last = x


def _round(step: float) -> float:
    """The next round number: 1, 2 or 5 and zeros."""
    power = 0.001
    while power * 10 < step:
        power *= 10
    return next(power * each for each in (1, 2, 5, 10) if power * each >= step or each == 10)


def _curve(fetches: Sequence[Fetch], axis: _Axis, total: int) -> Iterator[str]:
    points, so_far = [f"0,{_CURVE}"], 0
    for fetch in sorted(fetches, key=lambda each: each.at):
        x = axis.at(fetch.at)
        points.append(f"{x:.1f},{_height(so_far, total):.1f}")
        so_far += fetch.bytes
        points.append(f"{x:.1f},{_height(so_far, total):.1f}")
    points.append(f"{_WIDTH:.0f},{_height(so_far, total):.1f}")
    yield f'<polygon points="{" ".join(points)} {_WIDTH:.0f},{_CURVE}" class="area"/>'
    yield f'<polyline points="{" ".join(points)}" class="curve"/>'
    yield f'<text x="{_WIDTH - 4:.0f}" y="22" class="note end">{size(total)}</text>'
    yield f'<line x1="0" x2="{_WIDTH:.0f}" y1="{_CURVE}" y2="{_CURVE}" class="axis"/>'


def _height(part: int, total: int) -> float:
    return _CURVE - part / max(1, total) * (_CURVE - 28)


def _lanes(fetches: Sequence[Fetch]) -> list[int]:
    """For each range a lane that is free when it begins."""
    free: list[float] = []
    lanes = []
    for fetch in fetches:
        begin = fetch.at - fetch.took
        lane = next((number for number, end in enumerate(free) if end <= begin), None)
        if lane is None:
            lane = len(free) if len(free) < _LANES else _LANES - 1
            free += [0.0] * (lane + 1 - len(free))
        free[lane] = max(free[lane], fetch.at)
        lanes.append(lane)
    return lanes


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {_WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return head + "".join(parts) + "</svg>"
