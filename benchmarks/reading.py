"""Reads through a mount, beside squashfuse_ll and the unpacked tree."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import clipfs
from benchmarks import reader
from benchmarks.measure import CLIPFS, Row, Section, rounds
from benchmarks.programs import clipfs_mount, drop_caches, forget, one_core, run, squashfuse_mount
from benchmarks.workload import BIG, Workload, listing, small_files

SQUASHFUSE = "squashfuse_ll"
UNPACKED = "unpacked"

# Where the time goes, for rows that fall short.
_SEQUENTIAL = (
    "Decoding and verifying gzip takes most of it, and what is decoded is compressed for the disk cache besides."
)
_RANDOM = (
    "A gzip layer can be entered every 2 MiB only: a read that misses decodes and verifies half of that, where "
    "squashfs decodes 128 KiB."
)
_CACHED = "A block from the disk cache passes through Python on its way."
_OPENING = "Names come from the kernel; every block that misses is decoded and verified in Python."
_STAT = "The kernel reads inodes and names from the index, which has to come from the disk."
_KERNEL = "The kernel has kept all of it and asks nobody; a difference is the machine's."

# Other tools have no such cache: they read their file on disk, as when cold.
_WHEN = {"cold": "cold", "cached": "from clipfs' disk cache", "warm": "warm"}


class Passes(NamedTuple):
    """What a reader got, a second: at first, when it did the very same again, and again after a new mount."""

    cold: float
    warm: float
    cached: float


def readers(workload: Workload) -> list[Reader]:
    """All the ways to read."""
    size = workload.size
    ordered = small_files(workload)
    shuffled = random.Random(2).sample(ordered, len(ordered))
    big, top = listing(workload, "big", [BIG]), listing(workload, "top", ["."])
    some = listing(workload, "some", ordered[: size.ordered])
    mixed = listing(workload, "mixed", shuffled[: size.shuffled])
    everything = listing(workload, "everything", shuffled)
    return [
        Reader("sequential", "MB/s", _python("read", big, 1e-6), _SEQUENTIAL, _CACHED, _KERNEL),
        Reader("random 4 KiB", "reads/s", random_reads(size.random), _RANDOM, _CACHED, _KERNEL),
        Reader("small files, in order", "files/s", _python("files", some), _OPENING, _OPENING, _OPENING, True),
        Reader("small files, shuffled", "files/s", _python("files", mixed), _RANDOM, _CACHED, _OPENING, True),
        Reader("stat storm", "stats/s", _python("stat", everything), _STAT, "", _KERNEL, True),
        Reader("walk (find -ls)", "entries/s", _python("walk", top), _STAT, "", _KERNEL, True),
    ]


def reading(workload: Workload) -> Section:
    """Each way to read, cold and warm."""
    size = workload.size
    with _peers(workload) as peers:
        rows = [row for each in readers(workload) for row in each.measure(size.rounds, peers)]
    text = (
        f"The generated image: {size.files:,} small files and one of {size.big >> 20} MiB. squashfuse_ll serves a "
        "zstd squashfs of the same tree, *unpacked* is the tree on this disk. *Cold*: mounted afresh, then all of the "
        "kernel's caches dropped, and clipfs' own cache on disk empty. *Warm*: the same reader, the same paths and "
        "offsets, once more on the same mount. *From clipfs' disk cache*: as cold, but with what clipfs has kept on "
        "disk; the others' values are their cold ones. For small files, stat storm and walk, reader and server share "
        "one core, whichever the peer: left to the scheduler, chance decides whether requests have to wake another "
        "core."
    )
    return Section.of("Reading", text, rows)


#: Mounts a peer, with or without what it has kept on disk from earlier mounts.
Mounted = Callable[[bool], AbstractContextManager[Path]]


class Reader(NamedTuple):
    """A way to read. `cold`, `cached`, `warm` say where the time goes then; empty if there is no such row.

    one_core: for many small requests. Free to choose, the scheduler puts reader and server on one core or on two, as
    chance has it, and where waking another core is dear, as in virtual machines, that decides more than the programs.
    """

    name: str
    unit: str
    read: Callable[[Path], float]
    cold: str
    cached: str
    warm: str
    one_core: bool = False

    def measure(self, count: int, peers: dict[str, Mounted]) -> list[Row]:
        """A row for each kind of pass."""

        def passes(peer: str) -> Passes:
            with peers[peer](True) as root:
                drop_caches()
                cold, warm = self.read(root), self.read(root)
            if peer != CLIPFS or not self.cached:
                return Passes(cold, warm, cold)
            with peers[peer](False) as root:
                drop_caches()
                return Passes(cold, warm, self.read(root))

        with one_core() if self.one_core else nullcontext():
            measured = rounds(count, self.name, {peer: partial(passes, peer) for peer in peers})
        return [
            Row(f"{self.name}, {words}", self.unit,
                {peer: [getattr(each, when) for each in found] for peer, found in measured.items()},
                SQUASHFUSE, f"read, {words}", getattr(self, when))
            for when, words in _WHEN.items() if getattr(self, when)
        ]  # fmt: skip


@contextmanager
def _peers(workload: Workload) -> Iterator[dict[str, Mounted]]:
    clip, mountpoint = workload.scratch / "read.clip", workload.scratch / "mnt"
    clipfs.build(workload.generated, clip)
    mountpoint.mkdir()

    @contextmanager
    def ours(fresh: bool) -> Iterator[Path]:
        if fresh:
            forget()
        with clipfs_mount(clip, mountpoint):
            yield mountpoint

    try:
        yield {
            CLIPFS: ours,
            SQUASHFUSE: lambda _: squashfuse_mount(workload.squashfs, mountpoint),
            UNPACKED: lambda _: nullcontext(workload.unpacked),
        }
    finally:
        mountpoint.rmdir()


def _python(how: str, paths: Path, scale: float = 1) -> Callable[[Path], float]:
    """`reader.py` on these paths."""

    def read(root: Path) -> float:
        done = json.loads(run(sys.executable, "-I", "-S", reader.__file__, how, root, paths))
        return float(done["count"] * scale / done["seconds"])

    return read


def random_reads(count: int) -> Callable[[Path], float]:
    """fio, one read at a time. It tells the kernel that it reads at random, and drops no cache by itself."""

    def read(root: Path) -> float:
        done = run(
            "fio", "--name=random", f"--filename={root / BIG}", "--readonly", "--rw=randread", "--bs=4k",
            "--ioengine=psync", f"--number_ios={count}", "--randseed=1", "--invalidate=0", "--output-format=json",
        )  # fmt: skip
        latency = json.loads(done)["jobs"][0]["read"]["lat_ns"]
        return float(1e9 / latency["mean"])

    return read
