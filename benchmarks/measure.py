"""Taking turns at a clock, and what became of it as table rows.

This module knows values, peers by name, and how to show them. What is measured it does not know.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from benchmarks.goals import Outcome

T = TypeVar("T")

#: The peer that everything is about.
CLIPFS = "clipfs"

# The column that is no number.
_WORDS = "in words"

# Medians that differ by less are called the same: two runs on a shared machine differ by as much.
NOISE = 1.1


@dataclass(frozen=True, slots=True)
class Row:
    """One thing measured, for every peer once a round.

    samples: peer to values, in order of rounds.  unit: "s" if less is better, else something per second.
    beside: the peer that clipfs is compared with.  group: what the plot shows it under.
    why: where the time goes; told if clipfs falls short.
    """

    name: str
    unit: str
    samples: Mapping[str, Sequence[float]]
    beside: str
    group: str
    why: str = ""

    def ratio(self, who: str = CLIPFS, peer: str = "") -> float:
        """How many times as fast as a peer, or `beside`, somebody is: the median of the rounds' ratios."""
        return statistics.median(self._ratios(who, peer or self.beside))

    @property
    def falls_short(self) -> bool:
        return self.ratio() < 1 / NOISE

    def cells(self, peers: Sequence[str]) -> list[str]:
        """The row of a table whose columns are these peers."""
        values = (self.samples.get(peer) for peer in peers)
        ratios = self._ratios(CLIPFS, self.beside)
        spread = f"{number(min(ratios))}–{number(max(ratios))}×"
        return [
            f"{self.name}, {self.unit}",
            *(spread_of(each) if each else "–" for each in values),
            spread,
            self.words(),
        ]

    def words(self) -> str:
        """The ratio for somebody who reads one column only."""
        ratio = self.ratio()
        if self.falls_short:
            return f"**falls short: {number(1 / ratio)}× slower**"
        return f"{number(ratio)}× as fast" if ratio > NOISE else "the same"

    def _ratios(self, who: str, peer: str) -> list[float]:
        pairs = zip(self.samples[who], self.samples[peer], strict=True)
        return [theirs / ours if self.unit == "s" else ours / theirs for ours, theirs in pairs]


@dataclass(frozen=True, slots=True)
class Picture:
    """draw: puts it on an empty figure of matplotlib's. file: its name beside the page. text: what it shows."""

    file: str
    text: str
    draw: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Section:
    """What one benchmark found: a table, a paragraph on how to read it, the rows that have a ratio, the goals."""

    title: str
    text: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    rows: Sequence[Row] = ()
    outcomes: Sequence[Outcome] = ()
    pictures: Sequence[Picture] = ()

    @classmethod
    def of(
        cls,
        title: str,
        text: str,
        rows: Sequence[Row],
        outcomes: Sequence[Outcome] = (),
        pictures: Sequence[Picture] = (),
    ) -> Section:
        """A table with a column for every peer."""
        peers = list(dict.fromkeys(peer for row in rows for peer in row.samples))
        header = ["", *peers, f"ratio to {rows[0].beside}", _WORDS]
        return cls(title, text, header, [row.cells(peers) for row in rows], rows, outcomes, pictures)

    def table(self) -> str:
        """Names and words to the left, numbers to the right."""
        return table(self.header, self.lines, {0, len(self.header) - 1} if self.header[-1] == _WORDS else {0})


def table(header: Sequence[str], lines: Sequence[Sequence[str]], left: Container[int]) -> str:
    """As Markdown that is aligned, so that it can be read as it is. left: columns that are not numbers."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    rules = ["-" * width if n in left else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    padded = ([cell.ljust(width) if n in left else cell.rjust(width)
               for n, (cell, width) in enumerate(zip(line, widths, strict=True))]
              for line in [header, rules, *lines])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def rounds(count: int, what: str, peers: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Measure each peer `count` times, in turns, so that a busy minute of the machine hits all of them.

    Every round starts with another peer: none has always the same one before it.
    """
    found: dict[str, list[T]] = {peer: [] for peer in peers}
    order = list(peers)
    for number_of_round in range(count):
        turn = number_of_round % len(order)
        for peer in order[turn:] + order[:turn]:
            progress(f"{what}, round {number_of_round + 1}/{count}: {peer}")
            found[peer].append(peers[peer]())
    return found


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def progress(text: str) -> None:
    """Say on a terminal what is going on, in one line that is written over."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="" if text else "\r", file=sys.stderr, flush=True)


def spread_of(values: Iterable[float]) -> str:
    """Median, and lowest and highest."""
    values = list(values)
    return f"{number(statistics.median(values))} ({number(min(values))}–{number(max(values))})"


def number(value: float) -> str:
    """Three digits that count; no more is ever certain. k and M for thousands and millions."""
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * scale:
            return number(value / scale) + unit
    if value >= 9.995:
        return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.0995 else f"{value:.3f}"
