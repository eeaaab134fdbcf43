"""Both views of a clip beside the kernel's own file systems and other people's FUSE ones, on the same tree."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import clipfs
from benchmarks.goals import Outcome, as_fast
from benchmarks.measure import CLIPFS, Picture, Row, Section, rounds, seconds, spread_of
from benchmarks.peers import EROFS, EXT4, FORMS, FUSE_VIEW, IN_KERNEL, SQUASHFUSE, Mounting, peers
from benchmarks.programs import drop_caches, forget, one_core, run
from benchmarks.raw_loop import BARE, bare_loop
from benchmarks.reading import python_reader, random_reads
from benchmarks.workload import BIG, Workload, listing, small_files

_COLD_NAMES = {
    CLIPFS: "The kernel reads inodes and names from the index, which has to come from the disk.",
    FUSE_VIEW: "Each name is a request that Python answers, some 25 µs; squashfuse_ll answers in C.",
}
_COLD_DATA = {
    CLIPFS: "A block from the disk cache passes through Python once, on its way into the page cache of the data file.",
    FUSE_VIEW: "Each open, each read and each release is a request that Python answers.",
}
_WARM = "All are answered by caches of the kernel; a difference is the machine's."


class Way(NamedTuple):
    """Something to do with a tree.

    metadata: is it about names and attributes only? large: it takes long. settles: the warm pass is so short that what
    a server still does after the cold one, as reading ahead, would be seen in it: so another comes before it.
    """

    name: str
    unit: str
    act: Callable[[Path], float]
    metadata: bool = True
    warm: bool = True
    one_core: bool = True
    large: bool = False
    settles: bool = False

    def passes(self, mount: Mounting, mountpoint: Path) -> tuple[float, float]:
        """What it took when everything was cold, and what at once again."""
        with mount(mountpoint) as root:
            drop_caches()
            cold = self.act(root)
            if self.settles:
                self.act(root)
            return cold, self.act(root) if self.warm else 0.0


class Goal(NamedTuple):
    """clipfs (or its FUSE view) should be at least `ratio` times as fast as a peer."""

    who: str
    peer: str
    ratio: float


def views(workload: Workload) -> Section:
    """What the namespace costs in each view, and what data does."""
    clip, mountpoint, size = workload.scratch / "views.clip", workload.scratch / "views", workload.size
    clipfs.build(workload.generated, clip)
    mountpoint.mkdir()
    forget()
    mounts = peers(workload.copies, clip)
    loop = {BARE: partial(bare_loop, clip, workload.unpacked / BIG)}
    with mounts[CLIPFS](mountpoint) as root:
        run("sh", "-c", 'tar -cf - -C "$1" . | cat >/dev/null', "sh", root)
    rows: dict[str, list[Row]] = {"cold": [], "warm": []}
    outcomes: list[Outcome] = []
    for way in _ways(workload):
        with one_core() if way.one_core else nullcontext():
            count = size.large if way.large else size.rounds
            everybody = mounts | loop if way.metadata else mounts
            passes = rounds(
                count, way.name, {peer: partial(way.passes, each, mountpoint) for peer, each in everybody.items()}
            )
        for which, when in enumerate(rows if way.warm else ["cold"]):
            samples = {peer: [each[which] for each in measured] for peer, measured in passes.items()}
            row = Row(f"{way.name}, {when}", way.unit, samples, SQUASHFUSE, f"both views, {when}", _why(way, when))
            rows[when].append(row)
            outcomes += _outcomes(row, way, when)
    mountpoint.rmdir()
    return _section(workload, [*mounts, *loop], rows, outcomes)


def _ways(workload: Workload) -> list[Way]:
    size = workload.size
    ordered = small_files(workload)
    everything = listing(workload, "shuffled", random.Random(3).sample(ordered, len(ordered)))
    missing = listing(workload, "missing", [f"{path}.none" for path in ordered])
    index = listing(workload, "index", sorted([*ordered, BIG]))
    some = listing(workload, "five-thousand", ordered[:5000])
    big = listing(workload, "big", [BIG])
    tar = _program("sh", "-c", f"tar -cf - --exclude ./{BIG} . | cat >/dev/null")
    return [
        Way("stat storm", "stats/s", python_reader("stat", everything)),
        Way("missing names", "lookups/s", python_reader("missing", missing)),
        Way("git status", "paths/s", python_reader("status", index)),
        Way("find -printf", "s", _program("find", ".", "-printf", "%p %s %T@\n")),
        Way("ls -lR", "s", _program("ls", "-lR", ".")),
        Way("tar of all files", "s", tar, metadata=False, large=True),
        Way(
            f"open and read {len(ordered[:5000]):,} files",
            "files/s",
            python_reader("files", some),
            metadata=False,
            settles=True,
        ),
        Way(
            "read the large file",
            "MB/s",
            python_reader("read", big, 1e-6),
            metadata=False,
            one_core=False,
            large=True,
            settles=True,
        ),
        Way("random 4 KiB reads", "reads/s", random_reads(size.random), metadata=False, warm=False, one_core=False),
    ]


def _outcomes(row: Row, way: Way, when: str) -> list[Outcome]:
    """What was wanted of this row."""
    if way.metadata:
        goals = [Goal(CLIPFS, EROFS, 0.8), Goal(CLIPFS, SQUASHFUSE, 4)]
    else:
        goals = [Goal(CLIPFS, SQUASHFUSE, 2)] if way.name.startswith("random") else []
    if when == "warm":
        goals.append(Goal(CLIPFS, EXT4, 0.9))
    elif not way.name.startswith("random"):
        goals.append(Goal(FUSE_VIEW, SQUASHFUSE, 1.5))
    # Whatever is written in Python, answering requests costs it what that loop costs.
    best = {FUSE_VIEW: (BARE,)} if way.metadata else {}
    return [
        as_fast(row, peer, ratio, _why(way, when, who), who, best.get(who, IN_KERNEL)) for who, peer, ratio in goals
    ]


def _why(way: Way, when: str, who: str = CLIPFS) -> str:
    """Where the time goes."""
    return _WARM if when == "warm" else (_COLD_NAMES if way.metadata else _COLD_DATA)[who]


def _section(
    workload: Workload, names: Sequence[str], rows: Mapping[str, Sequence[Row]], outcomes: Sequence[Outcome]
) -> Section:
    """A column for each peer; a picture of how they stand to each other."""
    size = workload.size
    every = [row for each in zip_longest(*rows.values()) for row in each if row]
    lines = [[f"{row.name}, {row.unit}", *(_cell(row, peer) for peer in names)] for row in every]
    text = (
        f"The generated image: {size.files:,} small files and one of {size.big >> 20:,} MiB. {FORMS} *Cold*: mounted "
        "afresh, then all of the kernel's caches dropped (`sync`, then 3 into `/proc/sys/vm/drop_caches`); clipfs has "
        "the decoded data in its cache on disk. *Warm*: the same once more; where files are read, the "
        "time after that, as a server that still reads ahead would be seen. *git status*: every path of an index in "
        f"its order, then all directories for others. Random reads are {size.random:,} of fio's. All but reads of "
        f"the large file share one core with who serves them. {size.large} rounds of tar and of reading all of it. The "
        f"*{BARE}* is the least that Python can do (see *A request* below): names and attributes only."
    )

    def draw(figure: Any) -> None:
        from benchmarks import charts  # late: matplotlib is an extra

        charts.peers(figure, {f"{when} caches": row for when, row in rows.items()}, names)

    picture = Picture("views.svg", "How fast each file system is, in times of squashfuse_ll", draw)
    return Section("Both views", text, ["", *names], lines, every, outcomes, [picture])


def _cell(row: Row, peer: str) -> str:
    return spread_of(row.samples[peer]) if peer in row.samples else "–"


def _program(*command: str) -> Callable[[Path], float]:
    """A program that is started in the tree; seconds."""
    return lambda root: seconds(lambda: run("env", "-C", root, *command))
