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
from benchmarks.measure import Row, Section, number

_METHOD = """\
All peers are measured in one run, in turns, each round beginning with another one; a busy machine hits all of them.
Cells are medians with the lowest and highest round. Ratios are those of neighbours in time: the median, and the lowest
and highest, of the rounds' ratios; above 1 clipfs is faster. Differences below a tenth count as none. Every reader is
a process of its own, the same program for all peers, which have their default options: fio for random reads, else
[reader.py](reader.py). Absolute numbers say as much about the machine as about the programs.
"""


def readme(sections: Sequence[Section], rounds: int) -> str:
    """The whole page."""
    rows = [row for section in sections for row in section.rows]
    today = dt.datetime.now(dt.UTC).date()
    parts = [
        "# Benchmarks",
        f"Made by `make bench` on {today}, {rounds} rounds. Do not edit: the next run writes it anew.",
        "![clipfs beside umoci and squashfuse_ll: how many times faster or slower](benchmarks.svg)",
        "## Where clipfs falls short",
        _shortfalls(rows),
    ]
    for section in sections:
        parts += [f"## {section.title}", section.text, section.table()]
    parts += ["## How it is measured", _METHOD.rstrip(), machine()]
    return "\n\n".join(parts) + "\n"


def _shortfalls(rows: Sequence[Row]) -> str:
    lines = [
        f"- {row.name}: {number(1 / row.ratio())}× slower than {row.beside}. {row.why}".rstrip()
        for row in rows
        if row.falls_short
    ]
    return "\n".join(lines) or "In none of the rows."


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
