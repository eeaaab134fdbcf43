"""Measure, print the tables, and renew benchmarks/README.md and its plot: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import demo, programs, report
from benchmarks.cold import application, memory, starting_cold, streaming
from benchmarks.measure import Section, progress
from benchmarks.raw_loop import requests
from benchmarks.reading import reading
from benchmarks.starting import indexing, mounting, running, size
from benchmarks.views import views
from benchmarks.workload import QUICK, Demo, Size, Workload, prepare

_ROOT = Path(__file__).parent.parent
_CACHE = _ROOT / ".cache"

BENCHMARKS: dict[str, Callable[[Workload], Section]] = {
    each.__name__: each
    for each in (indexing, size, mounting, running, starting_cold, reading, views, requests, streaming, memory)
}
_PROGRAMS = (
    "curl",
    "docker-registry",
    "fio",
    "fuse-overlayfs",
    "mkfs.erofs",
    "mkfs.ext4",
    "mksquashfs",
    "runc",
    "skopeo",
    "squashfuse_ll",
    "umoci",
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
    applications = application(_CACHE) if starting_cold.__name__ in names else {}
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
    """Run these benchmarks and print their tables; with `out`, write the page and its plot there."""
    sections = []
    with (
        programs.interruptible(),
        programs.scratch_directory(cache) as scratch,
        programs.own_directories(scratch),
    ):
        workload = prepare(cache, demo_image, applications, how_much, scratch)
        for name in names:
            section = BENCHMARKS[name](workload)
            progress("")
            print(f"\n{section.title}\n{section.table()}", flush=True)
            sections.append(section)
    if out is not None:
        _publish(sections, how_much.rounds, out)
    return sections


def _publish(sections: Sequence[Section], rounds: int, out: Path) -> None:
    # Late: matplotlib is an extra that a look at one table does not need.
    from benchmarks import plot

    out.mkdir(parents=True, exist_ok=True)
    rows = [row for section in sections for row in section.rows]
    if rows:
        plot.draw(rows, out / "benchmarks.svg")
    (out / "README.md").write_text(report.readme(sections, rounds))
    print(f"\nwritten: {out / 'README.md'} and its plot")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure clipfs beside other tools.")
    parser.add_argument("--quick", action="store_true", help="little work, twice: to see that it works")
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), metavar="NAME",
                        help=f"one benchmark; may be given again ({', '.join(BENCHMARKS)})")  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, metavar="DIR",
                        help="where to write the page and plot (default: benchmarks/, for a whole run)")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
