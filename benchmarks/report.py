"""benchmarks/README.md: the tables, the machine they come from, and where clipfs falls short, in words."""

from __future__ import annotations

import datetime as dt
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import clipfs
from benchmarks.goals import summary
from benchmarks.measure import Picture, Row, Section, number, table

#: Pictures that are about more than one section: their files, and what they show.
GOALS = ("goals.svg", "Each goal, and by how much each row met or missed it")
RATIOS = ("benchmarks.svg", "clipfs beside one other tool a row: how many times faster or slower")

_METHOD = """\
All peers are measured in one run, in turns, each round beginning with another one; a busy machine hits all of them.
Cells are medians with the lowest and highest round; k and M are thousands and millions. Ratios are those of neighbours
in time: the median, and the lowest and highest, of the rounds' ratios; above 1 clipfs is faster. Differences below a
tenth count as none. Every reader is a process of its own, the same program for all peers, which have their default
options: fio for random reads, else [reader.py](reader.py). *Caches dropped* means `sync`, then 3 written to
`/proc/sys/vm/drop_caches`; the machine's own disk may still keep what it likes. A *link* is
[a proxy](link.py) with a bandwidth and a delay. Absolute numbers say as much about the machine as about the programs.
"""


def readme(sections: Sequence[Section], rounds: int) -> str:
    """The whole page."""
    outcomes = [outcome for section in sections for outcome in section.outcomes]
    today = dt.datetime.now(dt.UTC).date()
    parts = [
        "# Benchmarks",
        f"Made by `make bench` on {today}, {rounds} rounds if not said otherwise. The next run writes all of it anew.",
        "## Goals, and what came of them",
        *([_image(GOALS)] if outcomes else []),
        summary(outcomes),
        "## Where clipfs is slower than the tool beside it",
        _shortfalls([row for section in sections for row in section.rows]),
        _image(RATIOS),
    ]
    for section in sections:
        pictures = [_image(picture) for picture in section.pictures]
        parts += [f"## {section.title}", section.text, *pictures, section.table()]
    parts += ["## How it is measured", _METHOD.rstrip(), machine()]
    return "\n\n".join(parts) + "\n"


def _image(picture: tuple[str, str] | Picture) -> str:
    file, text = picture if isinstance(picture, tuple) else (picture.file, picture.text)
    return f"![{text}]({file})"


def _shortfalls(rows: Sequence[Row]) -> str:
    """A table: which row, beside whom, and where the time goes."""
    lines = [
        (row.name, f"{number(1 / row.ratio())}× slower than {row.beside}", row.why) for row in rows if row.falls_short
    ]
    return table(("", "found", "why"), lines, {0, 1, 2}) if lines else "In none of the rows."


def machine() -> str:
    """What it ran on, as a list."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    tools = {
        "umoci": ("umoci", "--version"),
        "squashfuse": ("squashfuse_ll", "--help"),
        "mksquashfs": ("mksquashfs", "-version"),
        "runc": ("runc", "--version"),
        "fio": ("fio", "--version"),
    }
    libraries = ("pyfuse3", "trio", "zstandard", "isal")
    return "\n".join((
        f"- {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory",
        f"- Linux {platform.release()}, Python {platform.python_version()}",
        f"- clipfs {clipfs.__version__}, {', '.join(f'{name} {version(name)}' for name in libraries)}",
        f"- {', '.join(f'{name} {_version(*command)}' for name, command in tools.items())}",
    ))  # fmt: skip


def _version(*command: str) -> str:
    """The first thing that looks like a version in what the program says of itself."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=10)
    found = re.search(r"\d+(\.\d+)+\S*", done.stdout)
    return found[0] if found else "of unknown version"
