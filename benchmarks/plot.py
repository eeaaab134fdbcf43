"""How pictures look, and two that span sections: the goals, and every row beside its peer.

Colours are those of Okabe and Ito, which people tell apart however they see colours; where two things must not be
confused, shape or place differs as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.goals import Outcome
from benchmarks.measure import NOISE, Row

BLUE, ORANGE, VERMILION, GREEN, GREY, INK = "#0072b2", "#e69f00", "#d55e00", "#009e73", "#8c8c8c", "#30303a"

# Text as text, so that the file is small and looks like the page around it; the same numbers give the same file.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clipfs",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def save(draw: Callable[[Any], None], file: Path) -> None:
    """Write a picture; as SVG, or what else the file's name says."""
    with mpl.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        draw(figure)
        figure.savefig(file, **({"metadata": {"Date": None}} if file.suffix == ".svg" else {"dpi": 100}))


def bare(axes: Any, axis: str = "x") -> None:
    """Lines to read values from, and little else."""
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    axes.grid(axis=axis, color="#e6e6e6")
    axes.spines[["top", "right", "left"]].set_visible(False)


def times_axis(axes: Any, ratios: Sequence[float], steps: Sequence[float]) -> None:
    """A logarithmic axis of ratios that has all of these on it, with ticks at some of the steps and their inverses."""
    least, most = min(1.0, *ratios) / 1.25, max(1.0, *ratios) * 1.25
    axes.set_xscale("log")
    axes.set_xlim(least, most)
    ticks = {**{1 / step: f"1/{step:g}×" for step in steps}, 1: "1×", **{step: f"{step:g}×" for step in steps}}
    shown = {at: text for at, text in ticks.items() if least < at < most}
    axes.set_xticks(list(shown), list(shown.values()))
    axes.set_xticks([], minor=True)
    axes.axvline(1, color=INK, linewidth=1)


def goals(figure: Any, outcomes: Sequence[Outcome]) -> None:
    """A line for every goal, a mark for every row that it is about."""
    lines = list(dict.fromkeys(each.wanted for each in outcomes))
    figure.set_size_inches(8.8, 0.34 * len(lines) + 1.3)
    figure.suptitle("Goals: what was found, in times of what was wanted", weight="bold")
    axes = figure.add_subplot()
    kinds: tuple[tuple[str, str, str, Callable[[Outcome], bool]], ...] = (
        ("met", "o", BLUE, lambda each: each.met),
        ("missed", "X", VERMILION, lambda each: not each.met and not each.out_of_reach),
        ("out of reach: those that do the least miss it, too", "D", GREY, lambda each: each.out_of_reach),
    )
    for label, marker, colour, chosen in kinds:
        found = [(_shown(each.share), lines.index(each.wanted)) for each in outcomes if chosen(each)]
        axes.scatter([x for x, _ in found], [y for _, y in found], s=46, marker=marker, color=colour, alpha=0.75,
                     label=label, edgecolors="white", linewidths=0.6)  # fmt: skip
    axes.set_yticks(range(len(lines)), lines)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    times_axis(axes, [_shown(each.share) for each in outcomes], (2, 5, 10, 30, 100))
    bare(axes)
    axes.grid(axis="y", color="#f0f0f0")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)


def _shown(share: float) -> float:
    """What goes to infinity ends at the edge."""
    return min(max(share, 0.01), 100)


def ratios(figure: Any, rows: Sequence[Row]) -> None:
    """For every row one bar, from "as fast as the other tool" to the left or to the right."""
    lines = list(_lines(rows))
    figure.set_size_inches(8.8, 0.23 * len(lines) + 1.1)
    figure.suptitle("clipfs beside other tools: how many times slower or faster", weight="bold")
    axes = figure.add_subplot()
    for y, (_, row) in enumerate(lines):
        if row:
            _bar(axes, y, row.ratio())
    axes.set_yticks(range(len(lines)), [text for text, _ in lines])
    for label, (_, row) in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_weight("normal" if row else "bold")
    axes.set_ylim(len(lines) - 0.4, -0.6)
    _frame(axes, [row.ratio() for row in rows])
    bare(axes)


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, Row | None]]:
    """From top to bottom: a heading, then the rows of its group."""
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        yield f"{group[0].upper()}{group[1:]}, beside {members[0].beside}", None
        for row in members:
            yield row.name.removesuffix(f", {group.rpartition(', ')[2]}"), row


def _bar(axes: Any, y: int, ratio: float) -> None:
    faster, slower = ratio > NOISE, ratio < 1 / NOISE
    colour = BLUE if faster else VERMILION if slower else GREY
    factor = max(ratio, 1 / ratio)
    digits = 0 if factor >= 10 else 1
    words = f"{factor:.{digits}f}× {'faster' if faster else 'slower'}" if faster or slower else "about the same"
    axes.barh(y, ratio - 1, left=1, height=0.66, color=colour)
    axes.annotate(words, (min(ratio, 1) if slower else max(ratio, 1), y), (-4 if slower else 4, 0),
                  textcoords="offset points", va="center", ha="right" if slower else "left", color=colour)  # fmt: skip


def _frame(axes: Any, found: Sequence[float]) -> None:
    """A logarithmic axis that ends where the words beside the longest bars do."""
    least, most = min(1.0, *found), max(1.0, *found)
    room = max((most / least) ** 0.35, 2)
    axes.set_xscale("log")
    axes.set_xlim(least / room, most * room)
    steps = (2, 5, 10, 20, 50, 100, 200, 500) if most / least < 50 else (3, 10, 30, 100, 300, 1000)
    ticks: dict[float, str] = {1 / step: f"{step}×\nslower" for step in steps if 1 / step > least / room}
    ticks[1] = "same"
    ticks.update((step, f"{step}×\nfaster") for step in steps if step < most * room)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks([], minor=True)
    axes.axvline(1, color=INK, linewidth=1)
