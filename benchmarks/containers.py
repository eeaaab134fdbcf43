"""Programs in containers whose root file system each peer serves: the same tree, overlay and runc."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import clipfs
from benchmarks.bundles import Bundle
from benchmarks.measure import CLIPFS, Picture, Row, Section, rounds
from benchmarks.peers import FORMS, SQUASHFUSE, Mounting, peers
from benchmarks.programs import drop_caches, forget, run
from benchmarks.workload import Demo, Workload, copies_of

_WHY = {
    "cold": "What a program reads passes through Python once, on its way from the disk cache into the page cache.",
    "warm": "The kernel has kept all of it and asks nobody; a difference is the machine's.",
}


class Starts(NamedTuple):
    """Seconds from runc's start to the first output."""

    cold: float
    warm: float


def containers(workload: Workload) -> Section:
    """Starts of Python and of Node.js, cold and warm."""
    programs, scratch = workload.applications, workload.scratch
    demo = next(iter(programs.values()))
    clip, mountpoint = scratch / "containers.clip", scratch / "mnt"
    clipfs.build(demo.image, clip)
    mountpoint.mkdir()
    forget()
    mounts = peers(copies_of(workload, demo.image), clip)
    with mounts[CLIPFS](mountpoint) as root:
        run("sh", "-c", 'tar -cf - -C "$1" . | cat >/dev/null', "sh", root)
    found = rounds(workload.size.rounds, "containers", {
        peer: partial(_starts, mount, mountpoint, Bundle(scratch / "container", demo), programs)
        for peer, mount in mounts.items()
    })  # fmt: skip
    mountpoint.rmdir()
    rows = {
        when: [
            Row(f"{program} in a container, {when}", "s",
                {peer: [getattr(each[program], when) for each in measured] for peer, measured in found.items()},
                SQUASHFUSE, f"programs in containers, {when}", why)
            for program in programs
        ]
        for when, why in _WHY.items()
    }  # fmt: skip
    commands = "; ".join(f"{name}: `{' '.join(each.command)}`" for name, each in programs.items())
    text = (
        f"{commands}. From the start of runc to the program's first byte of output, in a kernel overlay on the tree as "
        f"each peer mounts it. {FORMS} *Cold*: all of the kernel's caches dropped (`sync`, then 3 into "
        "`/proc/sys/vm/drop_caches`); clipfs has the decoded data in its cache on disk, the others have theirs. "
        "*Warm*: once more, in another container on the same mount."
    )

    def draw(figure: Any) -> None:
        from benchmarks import charts  # late: matplotlib is an extra

        charts.peers(figure, {f"{when} caches": each for when, each in rows.items()}, list(mounts))

    picture = Picture("containers.svg", "How soon programs start on each file system, in times of squashfuse_ll", draw)
    return Section.of("Programs in containers", text, [*rows["cold"], *rows["warm"]], (), [picture])


def _starts(mount: Mounting, mountpoint: Path, bundle: Bundle, programs: Mapping[str, Demo]) -> dict[str, Starts]:
    with mount(mountpoint) as root, bundle.over(root):
        found = {}
        for name, program in programs.items():
            bundle.command(program.command)
            drop_caches()
            found[name] = Starts(*(_seconds(bundle) for _ in range(2)))
        return found


def _seconds(bundle: Bundle) -> float:
    started = time.perf_counter()
    return bundle.first_output() - started
