"""The pictures of single sections: peers beside each other, cold starts, memory over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from benchmarks.measure import CLIPFS, Row
from benchmarks.peers import FUSE_VIEW
from benchmarks.plot import BLUE, GREY, INK, ORANGE, VERMILION, bare, times_axis

# Ours are large and coloured, all others small and grey; nobody has the shape of another.
_OURS = {CLIPFS: ("o", BLUE), FUSE_VIEW: ("D", ORANGE)}
_SHAPES = "s^v<>Pp*"


def peers(figure: Any, panels: Mapping[str, Sequence[Row]], names: Sequence[str]) -> None:
    """A line for each row, and on it a mark for each peer: how fast it is, in times of the rows' `beside`."""
    [beside] = {row.beside for rows in panels.values() for row in rows}
    labels = list(dict.fromkeys(_label(row) for rows in panels.values() for row in rows))
    figure.set_size_inches(9.6, 0.38 * len(labels) + 1.6)
    figure.suptitle(f"How many times as fast as {beside} (log scale; further right is faster)", weight="bold")
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    others = [name for name in names if name not in _OURS and name != beside]
    for axes, (title, rows) in zip(every, panels.items(), strict=True):
        axes.set_title(title)
        for name in (*others, *(each for each in names if each in _OURS)):
            where = [(row.ratio(name), labels.index(_label(row))) for row in rows if name in row.samples]
            marker, colour = _OURS.get(name, (_SHAPES[others.index(name)] if name in others else "", "none"))
            axes.scatter([x for x, _ in where], [y for _, y in where], s=58 if name in _OURS else 36, marker=marker,
                         color=colour, edgecolors="white" if name in _OURS else GREY, linewidths=0.6 if name in _OURS
                         else 1.1, zorder=3 if name in _OURS else 2, label=name)  # fmt: skip
        times_axis(axes, [row.ratio(name) for row in rows for name in row.samples], (2, 5, 20, 100))
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_yticks(range(len(labels)), labels)
        bare(axes)
        axes.grid(axis="y", color="#f0f0f0")
    handles, texts = every[0].get_legend_handles_labels()
    ordered = sorted(zip(texts, handles, strict=True), key=lambda each: list(names).index(each[0]))
    figure.legend([handle for _, handle in ordered], [text for text, _ in ordered], loc="outside lower center",
                  ncols=4, frameon=False)  # fmt: skip


def _label(row: Row) -> str:
    """Without the "cold" or "warm" that the panel says."""
    return row.name.rpartition(", ")[0] or row.name


class Started(Protocol):
    """A start: seconds to the first output, bytes over the link."""

    @property
    def seconds(self) -> float: ...

    @property
    def received(self) -> int: ...


def starts(figure: Any, scenes: Sequence[tuple[str, Mapping[str, Started]]], ours: Sequence[str]) -> None:
    """For each scene its ways to start: how long they take to the left, what they fetch to the right. ours: clipfs'."""
    figure.set_size_inches(9.6, sum(0.3 * len(found) + 0.55 for _, found in scenes) + 0.5)
    figure.suptitle("Cold starts over a slow link", weight="bold")
    grid = figure.subplots(len(scenes), 2, squeeze=False, height_ratios=[len(found) + 1.5 for _, found in scenes])
    for (name, found), (left, right) in zip(scenes, grid, strict=True):
        labels = [f"clipfs, {how}" if how in ours else how for how in found]
        for axes, what, unit, values in (
            (left, "time to first output", "s", [start.seconds for start in found.values()]),
            (right, "bytes over the link", "MB", [start.received / 1e6 for start in found.values()]),
        ):
            colours = [BLUE if how in ours else GREY for how in found]
            axes.barh(range(len(values)), values, height=0.7, color=colours)
            for y, value in enumerate(values):
                axes.annotate(f"{value:,.{0 if value >= 100 or not value else 1}f} {unit}", (value, y), (4, 0),
                              textcoords="offset points", va="center")  # fmt: skip
            axes.set_title(f"{name}: {what}", loc="left")
            axes.set_xlim(0, max(*values, 0.001) * 1.25)
            axes.set_ylim(len(values) - 0.4, -0.6)
            axes.set_xticks([])
            axes.set_yticks(range(len(values)), labels if axes is left else [""] * len(values))
            bare(axes)
            axes.spines["bottom"].set_visible(False)


def memory(figure: Any, series: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], bound: float) -> None:
    """A panel for each workload, all of one height: megabytes over seconds, and the bound."""
    columns = 2
    lines = -(-len(series) // columns)
    figure.set_size_inches(9.6, 1.45 * lines + 0.9)
    figure.suptitle("Resident memory of a mount, MB over seconds", weight="bold")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    panels = [axes for line in grid for axes in line]
    highest = max([bound, *(value for views in series.values() for each in views.values() for _, value in each)])
    for axes, (name, views) in zip(panels, series.items(), strict=False):
        for who, samples in views.items():
            _, colour = _OURS[who]
            axes.plot([at for at, _ in samples], [value / 1e6 for _, value in samples], color=colour, linewidth=1.4,
                      linestyle="-" if who == CLIPFS else "-.", label=who)  # fmt: skip
        axes.axhline(bound / 1e6, color=VERMILION, linestyle="--", linewidth=1.1, label=f"bound, {bound / 1e6:.0f} MB")
        axes.set_title(name, loc="left", color=INK)
        axes.set_ylim(0, highest / 1e6 * 1.1)
        axes.set_xlim(left=0)
        bare(axes, "y")
    for axes in panels[len(series) :]:
        axes.set_visible(False)
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=3, frameon=False)
