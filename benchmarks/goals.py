"""What was wanted, and what came of it.

A goal is a number that was written down before anything was measured. This module compares it with what was found, and
knows when no file system could have met it: then those that do the least do not either, on the same tree in the same
run: the kernel's own, and for what is answered in Python a loop or a handler that does nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from benchmarks.measure import CLIPFS, Row, number, table

_OUT_OF_REACH = """\
Not even the kernel's own file systems (native EROFS, ext4, squashfs) meet these, on the same tree in the same run; nor,
for the FUSE view, a bare loop in Python that answers from the same index and does nothing else, or pyfuse3 with a
handler that does nothing at all. For what comes compressed from a disk it is the kernel's squashfs alone that counts,
which decompresses it as clipfs has to; those that have it there uncompressed read it faster. The last column has the
fastest of them. In warm rows every peer is answered from the kernel's cache of names and attributes, and whose file
system it is makes little difference."""
_BEST = "the best of those"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One goal on one row.

    share: how much of the goal was reached; 1 and more is met. ceiling: the most that any of those that do the least
    reaches of it, and `evidence` in words; 0 if they have no part in it. why: where the time goes otherwise.
    """

    row: str
    wanted: str
    found: str
    share: float
    why: str = ""
    ceiling: float = 0.0
    evidence: str = "–"

    @property
    def met(self) -> bool:
        return self.share >= 1

    @property
    def out_of_reach(self) -> bool:
        """Has none of those met it either?"""
        return not self.met and 0 < self.ceiling < 1


def as_fast(row: Row, peer: str, wanted: float, why: str, who: str = CLIPFS, best: Collection[str] = ()) -> Outcome:
    """`who` should be `wanted` times as fast as a peer. best: who might show that it is possible, if not the peer."""
    found = row.ratio(who, peer)
    others = () if peer in best else best
    ceilings = {each: row.ratio(each, peer) for each in others if each in row.samples}
    top = max(ceilings, key=lambda each: ceilings[each], default="")
    return Outcome(
        row.name,
        f"{who} ≥ {wanted:g}× {peer}",
        f"{number(found)}×",
        found / wanted,
        why,
        ceilings[top] / wanted if top else 0.0,
        f"{top} has {number(ceilings[top])}×" if top else "–",
    )


def at_most(
    name: str,
    wanted: float,
    found: float,
    unit: str,
    why: str,
    what: str = CLIPFS,
    least: tuple[str, float] | None = None,
) -> Outcome:
    """A number that should not be larger than another, as "0.4 s". least: who does least, and what it takes them."""
    share = wanted / found if found > 0 else float("inf")
    return Outcome(
        name,
        f"{what} ≤ {wanted:g}{unit}",
        f"{number(found) if found > 0 else '0'}{unit}",
        share,
        why,
        wanted / least[1] if least else 0.0,
        f"{least[0]} has {number(least[1])}×" if least else "–",
    )


def more_than(row: Row, peer: str, who: str = CLIPFS) -> float:
    """By how many seconds `who` takes longer than a peer: the median of the rounds' differences."""
    pairs = zip(row.samples[who], row.samples[peer], strict=True)
    return statistics.median(ours - theirs for ours, theirs in pairs)


def summary(outcomes: Sequence[Outcome]) -> str:
    """One sentence, and a table of those that were not met and one of those that were."""
    if not outcomes:
        return "There are no goals for what was measured."
    met = [each for each in outcomes if each.met]
    missed = [each for each in outcomes if not each.met and not each.out_of_reach]
    out = [each for each in outcomes if each.out_of_reach]
    counts = (
        f"Of {len(outcomes)} goals {len(met)} are met and {len(missed)} missed; {len(out)} are out of reach of the "
        "kernel's own file systems too, or of anything in Python. Most say how many times as fast as a peer clipfs "
        "should be at least."
    )
    parts = [counts]
    if missed:
        parts += ["### Missed", _table(missed, "why", lambda each: each.why)]
    if out:
        parts += ["### Out of reach", _OUT_OF_REACH, _table(out, _BEST, lambda each: each.evidence)]
    if met:
        parts += ["### Met", _table(met, _BEST, lambda each: each.evidence)]
    return "\n\n".join(parts)


def _table(outcomes: Sequence[Outcome], last: str, text: Callable[[Outcome], str]) -> str:
    return table(("", "wanted", "found", last), [(e.row, e.wanted, e.found, text(e)) for e in outcomes], {0, 1, 3})
