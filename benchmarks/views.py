"""Both views of a clip beside the kernel's own file systems and other people's FUSE ones, on the same tree."""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import clipfs
from benchmarks import reader
from benchmarks.measure import CLIPFS, Row, Section, number, rounds, seconds, spread_of
from benchmarks.peers import EROFS, EXT4, FUSE_VIEW, SQUASHFUSE, peers
from benchmarks.programs import drop_caches, forget, one_core, run
from benchmarks.reading import random_reads
from benchmarks.workload import BIG, Workload, listing, small_files

_BLOCKS = "A block from the disk cache passes through Python once, on its way into the page cache of the data file."

_NAMES = "Both are answered by caches of the kernel; a difference is the machine's."


class Way(NamedTuple):
    """Something to do with a tree. `warm`: is there a second pass? metadata: is it about names and attributes only?"""

    name: str
    unit: str
    act: Callable[[Path], float]
    metadata: bool = True
    cold: bool = True
    warm: bool = True
    one_core: bool = True


class Goal(NamedTuple):
    """clipfs (or its FUSE view) should be at least `ratio` times as fast as a peer."""

    who: str
    peer: str
    ratio: float


def views(workload: Workload) -> Section:
    """What the namespace costs in each view, and what data does."""
    clip, mountpoint = workload.scratch / "views.clip", workload.scratch / "views"
    clipfs.build(workload.generated, clip)
    mountpoint.mkdir()
    forget()
    mounts = peers(workload, clip)
    with mounts[CLIPFS](mountpoint) as root:
        run("sh", "-c", 'tar -cf - -C "$1" . | cat >/dev/null', "sh", root)
    found: list[tuple[Row, list[Goal]]] = []
    for way in _ways(workload):
        with one_core() if way.one_core else nullcontext():
            passes = rounds(
                workload.size.rounds, way.name, {p: partial(_pass, way, m, mountpoint) for p, m in mounts.items()}
            )
        for which, when in enumerate(("cold", "warm")):
            if way.cold if when == "cold" else way.warm:
                why = _NAMES if way.metadata else _BLOCKS
                samples = {peer: [each[which] for each in measured] for peer, measured in passes.items()}
                row = Row(f"{way.name} (views), {when}", way.unit, samples, SQUASHFUSE, f"both views, {when}", why)
                found.append((row, _goals(way, when)))
    mountpoint.rmdir()
    return _section(workload, list(mounts), found)


def _pass(way: Way, mount: Callable[[Path], object], mountpoint: Path) -> tuple[float, float]:
    """What it took when everything was cold, and what at once again."""
    with mount(mountpoint) as root:  # type: ignore[attr-defined]
        drop_caches()
        return way.act(root), way.act(root) if way.warm else 0.0


def _ways(workload: Workload) -> list[Way]:
    size = workload.size
    ordered = small_files(workload)
    everything = listing(workload, "shuffled", random.Random(3).sample(ordered, len(ordered)))
    missing = listing(workload, "missing", [f"{path}.none" for path in ordered])
    some = listing(workload, "five-thousand", ordered[:5000])
    big = listing(workload, "big", [BIG])
    return [
        Way("stat storm", "stats/s", _python("stat", everything)),
        Way("missing names", "lookups/s", _python("missing", missing)),
        Way("find -printf", "s", _program("find", ".", "-printf", "%p %s %T@\n")),
        Way("ls -lR", "s", _program("ls", "-lR", ".")),
        Way(
            "tar of all files",
            "s",
            _program("sh", "-c", f"tar -cf - --exclude ./{BIG} . | cat >/dev/null"),
            metadata=False,
        ),
        Way("open and read 5,000 files", "files/s", _python("files", some), metadata=False),
        Way("sequential", "MB/s", _python("read", big, 1e-6), metadata=False, one_core=False),
        Way("random 4 KiB", "reads/s", random_reads(size.random), metadata=False, warm=False, one_core=False),
    ]


def _goals(way: Way, when: str) -> list[Goal]:
    if way.metadata:
        warm = [Goal(CLIPFS, EXT4, 0.9)] if when == "warm" else [Goal(FUSE_VIEW, SQUASHFUSE, 1.5)]
        return [Goal(CLIPFS, EROFS, 0.8), Goal(CLIPFS, SQUASHFUSE, 4), *warm]
    if way.name.startswith("random"):
        return [Goal(CLIPFS, SQUASHFUSE, 2)]
    return [Goal(CLIPFS, EXT4, 0.9)] if when == "warm" else [Goal(FUSE_VIEW, SQUASHFUSE, 1.5)]


def _section(workload: Workload, names: Sequence[str], found: Sequence[tuple[Row, list[Goal]]]) -> Section:
    """A column for each peer, and in words which goals are met."""
    lines = []
    for row, goals in found:
        said = [_outcome(row.samples, row.unit, goal) for goal in goals]
        lines.append([f"{row.name}, {row.unit}", *(spread_of(row.samples[peer]) for peer in names), "; ".join(said)])
    text = (
        f"The generated image: {workload.size.files:,} small files and one of {workload.size.big >> 20} MiB, which "
        "each peer has in its own form: squashfuse_ll and the kernel a zstd squashfs, native EROFS and ext4 an image "
        "that is not compressed, fuse-overlayfs the unpacked tree, ratarmount the layer itself. *clipfs* is the kernel "
        "view. *Cold*: mounted afresh, then all of the kernel's caches dropped; clipfs has the decoded data in its "
        "cache on disk. *Warm*: the same once more. All but sequential and random reads share one core with who serves "
        "them. The last column says what was wanted, as clipfs' speed in that of a peer, and what came of it."
    )
    header = ["", *names, "wanted and found"]
    return Section("Both views", text, header, lines, [row for row, _ in found])


def _outcome(samples: Mapping[str, Sequence[float]], unit: str, goal: Goal) -> str:
    pairs = zip(samples[goal.who], samples[goal.peer], strict=True)
    ratio = statistics.median(theirs / ours if unit == "s" else ours / theirs for ours, theirs in pairs)
    words = f"{'FUSE ' if goal.who == FUSE_VIEW else ''}{number(ratio)}× {goal.peer} (≥ {goal.ratio})"
    return words if ratio >= goal.ratio else f"**falls short: {words}**"


def _python(how: str, paths: Path, scale: float = 1) -> Callable[[Path], float]:
    def act(root: Path) -> float:
        done = json.loads(run(sys.executable, "-I", "-S", reader.__file__, how, root, paths))
        return float(done["count"] * scale / done["seconds"])

    return act


def _program(*command: str) -> Callable[[Path], float]:
    """A program that is started in the tree; seconds."""
    return lambda root: seconds(lambda: run("env", "-C", root, *command))
