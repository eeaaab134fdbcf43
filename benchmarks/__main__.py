"""Measure, print the tables, and renew benchmarks/README.md and its pictures: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks import demo, goals, programs, report
from benchmarks.cold import application, starting_cold
from benchmarks.containers import containers
from benchmarks.measure import Section, progress
from benchmarks.memory import memory
from benchmarks.raw_loop import requests
from benchmarks.reading import reading
from benchmarks.starting import indexing, mounting, running, size
from benchmarks.streaming import streaming
from benchmarks.views import views
from benchmarks.workload import QUICK, Demo, Size, Workload, prepare

_ROOT = Path(__file__).parent.parent
_CACHE = _ROOT / ".cache"

BENCHMARKS: dict[str, Callable[[Workload], Section]] = {
    each.__name__: each
    for each in (
        indexing,
        size,
        mounting,
        running,
        starting_cold,
        reading,
        views,
        requests,
        containers,
        streaming,
        memory,
    )
}
_PROGRAMS = (
    "curl",
    "docker-registry",
    "fio",
    "fuse-overlayfs",
    "igzip",
    "mkfs.erofs",
    "mkfs.ext4",
    "mksquashfs",
    "pigz",
    "runc",
    "skopeo",
    "squashfuse_ll",
    "umoci",
    "zstd",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    args = _parser().parse_args(argv)
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        print(f"benchmarks need root, and {', '.join(missing or _PROGRAMS)}; see `make setup`", file=sys.stderr)
        return 2
    # The page of the repository shows whole runs only.
    out = args.out or (None if args.quick or args.only else Path(__file__).parent)
    image = Demo(f"oci:{demo.build(_CACHE / 'demo')}:latest")
    names = args.only or list(BENCHMARKS)
    # Made only if it is started: it takes minutes to build.
    applications = application(_CACHE) if {starting_cold.__name__, containers.__name__} & set(names) else {}
    try:
        measure(image, applications, QUICK if args.quick else Size(), names, _CACHE / "bench", out)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def measure(
    demo_image: Demo,
    applications: Mapping[str, Demo],
    how_much: Size,
    names: Sequence[str],
    cache: Path,
    out: Path | None,
) -> list[Section]:
    """Run these benchmarks and print their tables; with `out`, write the page and its pictures there."""
    sections = []
    with (
        programs.interruptible(),
        programs.scratch_directory(cache) as scratch,
        programs.own_directories(scratch),
    ):
        workload = prepare(cache, demo_image, applications, how_much, scratch)
        for name in names:
            started = time.monotonic()
            section = BENCHMARKS[name](workload)
            progress("")
            print(f"\n{section.title} ({time.monotonic() - started:.0f} s)\n{section.table()}", flush=True)
            sections.append(section)
        print(f"\n{goals.summary([outcome for section in sections for outcome in section.outcomes])}", flush=True)
    if out is not None:
        publish(sections, how_much.rounds, out)
    return sections


def publish(sections: Sequence[Section], rounds: int, out: Path) -> None:
    """Write the page and its pictures."""
    # Late: matplotlib is an extra that a look at one table does not need.
    from benchmarks import plot

    out.mkdir(parents=True, exist_ok=True)
    pictures = [picture for section in sections for picture in section.pictures]
    # What has a picture in its section needs no bar.
    rows = [row for section in sections for row in section.rows if not section.pictures]
    outcomes = [outcome for section in sections for outcome in section.outcomes]
    if rows:
        plot.save(partial(plot.ratios, rows=rows), out / report.RATIOS[0])
    if outcomes:
        plot.save(partial(plot.goals, outcomes=outcomes), out / report.GOALS[0])
    for picture in pictures:
        plot.save(picture.draw, out / picture.file)
    (out / "README.md").write_text(report.readme(sections, rounds))
    print(f"\nwritten: {out / 'README.md'} and its pictures")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure clipfs beside other tools.")
    parser.add_argument("--quick", action="store_true", help="little work, twice: to see that it works")
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), metavar="NAME",
                        help=f"one benchmark; may be given again ({', '.join(BENCHMARKS)})")  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, metavar="DIR",
                        help="where to write page and pictures (default: benchmarks/, for a whole run)")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
