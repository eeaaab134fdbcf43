"""The picture: for every row one bar, from "as fast as the other tool" to the left or to the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.measure import NOISE, Row

# Text as text, so that the file is small and looks like the page around it; the same numbers give the same file.
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "clipfs", "font.family": "sans-serif", "font.size": 9}
_FASTER, _SLOWER, _SAME, _INK = "#2a7f62", "#d1495b", "#999999", "#30303a"


def draw(rows: Sequence[Row], file: Path) -> None:
    """Write the picture as an SVG file."""
    lines = list(_lines(rows))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.8, 0.23 * len(lines) + 1.1), layout="constrained")
        figure.suptitle("clipfs beside other tools: how many times slower or faster", weight="bold", color=_INK)
        axes = figure.add_subplot()
        for y, (_, row) in enumerate(lines):
            if row:
                _bar(axes, y, row.ratio())
        axes.set_yticks(range(len(lines)), [text for text, _ in lines])
        for label, (_, row) in zip(axes.get_yticklabels(), lines, strict=True):
            label.set(weight="normal" if row else "bold", color=_INK)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        _frame(axes, [row.ratio() for row in rows])
        figure.savefig(file, metadata={"Date": None})


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, Row | None]]:
    """From top to bottom: a heading, then the rows of its group."""
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        yield f"{group[0].upper()}{group[1:]}, beside {members[0].beside}", None
        for row in members:
            yield row.name.removesuffix(f", {group.rpartition(', ')[2]}"), row


def _bar(axes: Any, y: int, ratio: float) -> None:
    faster, slower = ratio > NOISE, ratio < 1 / NOISE
    colour = _FASTER if faster else _SLOWER if slower else _SAME
    factor = max(ratio, 1 / ratio)
    digits = 0 if factor >= 10 else 1
    words = f"{factor:.{digits}f}× {'faster' if faster else 'slower'}" if faster or slower else "about the same"
    axes.barh(y, ratio - 1, left=1, height=0.66, color=colour)
    axes.annotate(words, (min(ratio, 1) if slower else max(ratio, 1), y), (-4 if slower else 4, 0),
                  textcoords="offset points", va="center", ha="right" if slower else "left", color=colour)  # fmt: skip


def _frame(axes: Any, ratios: Sequence[float]) -> None:
    """A logarithmic axis that ends where the words beside the longest bars do."""
    least, most = min(1.0, *ratios), max(1.0, *ratios)
    room = max((most / least) ** 0.35, 2)
    axes.set_xscale("log")
    axes.set_xlim(least / room, most * room)
    steps = (2, 5, 10, 20, 50, 100, 200, 500) if most / least < 50 else (3, 10, 30, 100, 300, 1000)
    ticks: dict[float, str] = {1 / step: f"{step}×\nslower" for step in steps if 1 / step > least / room}
    ticks[1] = "same"
    ticks.update((step, f"{step}×\nfaster") for step in steps if step < most * room)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks([], minor=True)
    axes.tick_params(length=0)
    axes.axvline(1, color=_INK, linewidth=1)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#e6e6e6")
    axes.spines[["top", "right", "left"]].set_visible(False)
