"""What a soak has measured, what of it must not be, and its picture. See `tests.soak`, which makes the trouble."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a supervisor may hold more at the end than after its first quarter: allocators have their moods.
_SUPERVISOR_MB, _DESCRIPTORS = 6, 4
# The same of a worker that nobody has killed for a while: connections come and go, blocks are of different sizes.
_WORKER_MB, _WORKER_DESCRIPTORS = 16, 24

# Fewer looks than this say nothing about growth.
_ENOUGH = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """At one moment. seconds: since the beginning. Bytes that are resident, and descriptors, of the two processes;
    worker is the pid of the one that was there. processes: the supervisor and all children of its, dead ones too."""

    seconds: float
    supervisor_memory: int
    supervisor_descriptors: int
    worker: int
    worker_memory: int
    worker_descriptors: int
    processes: int
    cached: int


@dataclass
class Soaked:
    """What came of one container in one view. planned: how much trouble was to be made, by its kind. disk: the cap of
    the cache. readings: of the whole image; different: what of it was not as it should be."""

    view: str
    planned: dict[str, int]
    disk: int
    readings: int = 0
    different: list[str] = field(default_factory=list)
    errors: str = ""
    code: int | None = None
    made: dict[str, list[float]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def count(self, what: str) -> int:
        """How often there was trouble of this kind."""
        return len(self.made.get(what, ()))

    @property
    def wrong(self) -> list[str]:
        """A sentence for each thing that should not have been."""
        return [f"{self.view} view: {sentence}" for sentence in (*self._seen(), *self._grown())]

    def _seen(self) -> Iterator[str]:
        if self.different:
            yield f"what was read is not what is in the image: {'; '.join(self.different)}"
        if self.readings < 2:
            yield f"the image was read {self.readings} times"
        if self.code or self.errors:
            yield f"the container ended with {self.code} and said: {self.errors[-2000:]}"
        if self.left:
            yield f"these were left: {self.left}"
        for what, wanted in self.planned.items():
            # A worker that is just being replaced can be neither killed nor upgraded.
            if self.count(what) < wanted // 2:
                yield f"there were to be {wanted} of '{what}', and there were {self.count(what)}"

    def _grown(self) -> Iterator[str]:
        most = max((sample.cached for sample in self.samples), default=0)
        if most > 1.05 * self.disk:
            yield f"the cache on disk had {most} bytes, of {self.disk} allowed"
        yield from _growth("the supervisor's memory", self.samples, lambda s: s.supervisor_memory / 1e6, _SUPERVISOR_MB)
        yield from _growth(
            "the supervisor's descriptors", self.samples, lambda s: s.supervisor_descriptors, _DESCRIPTORS
        )
        yield from _growth("processes", self.samples, lambda s: s.processes, 1)
        calm = [sample for sample in self.samples if sample.worker == self.samples[-1].worker]
        yield from _growth("the last worker's memory", calm, lambda s: s.worker_memory / 1e6, _WORKER_MB)
        yield from _growth("the last worker's descriptors", calm, lambda s: s.worker_descriptors, _WORKER_DESCRIPTORS)


def _growth(what: str, samples: Sequence[Sample], of: Callable[[Sample], float], tolerance: float) -> Iterator[str]:
    """A sentence, if the last quarter has more than the second one: at first, everybody grows."""
    quarter = len(samples) // 4
    if len(samples) < _ENOUGH:
        return
    early, late = (statistics.median(map(of, part)) for part in (samples[quarter : 2 * quarter], samples[-quarter:]))
    if late > early + tolerance:
        yield f"{what} grew from {early:.0f} to {late:.0f}"


def plot(results: Sequence[Soaked], file: Path) -> None:
    """What both processes held over time, a column for each view; lines below are kills, and upgrades."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, columns = plt.subplots(
        4, len(results), sharex="col", sharey="row", squeeze=False, figsize=(6 * len(results), 8), layout="constrained"
    )
    for column, result in enumerate(results):
        axes = columns[:, column]
        _draw(axes[0], result, "resident memory, MB", {
            "supervisor": lambda s: s.supervisor_memory / 1e6, "worker": lambda s: s.worker_memory / 1e6,
        })  # fmt: skip
        _draw(axes[1], result, "open descriptors", {
            "supervisor": lambda s: s.supervisor_descriptors, "worker": lambda s: s.worker_descriptors,
        })  # fmt: skip
        _draw(axes[2], result, "processes of the mount", {"supervisor and its children": lambda s: s.processes})
        _draw(axes[3], result, "cache on disk, MB", {"spans": lambda s: s.cached / 1e6})
        axes[3].axhline(result.disk / 1e6, linestyle=":", linewidth=1, color="black", label="its cap")
        axes[3].legend(loc="lower right", fontsize=8)
        axes[3].set_xlabel("minutes since the beginning")
        counts = f"{result.count('kill')} kills, {result.count('upgrade')} upgrades, {result.count('away')} times"
        axes[0].set_title(
            f"{result.view} view: {result.readings} readings, {len(result.different)} wrong\n{counts} no registry",
            loc="left", fontsize=10,
        )  # fmt: skip
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _draw(axis: Any, result: Soaked, title: str, lines: dict[str, Callable[[Sample], float]]) -> None:
    minutes = [sample.seconds / 60 for sample in result.samples]
    for label, of in lines.items():
        axis.plot(minutes, [of(sample) for sample in result.samples], linewidth=1, label=label)
    axis.set_ylim(bottom=0)
    for what, colour in (("kill", "tab:red"), ("upgrade", "tab:green")):
        at = [seconds / 60 for seconds in result.made.get(what, ())]
        # A name that begins so is not in the legend; once is enough.
        label = f"{what}s" if title.startswith("resident") else f"_{what}s"
        axis.plot(at, [0] * len(at), "|", color=colour, markersize=8, label=label, clip_on=False)
    axis.set_ylabel(title)
    axis.legend(loc="lower right", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
