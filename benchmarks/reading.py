"""Reads through a mount, beside those of squashfuse_ll, the kernel's squashfs and the unpacked tree, and beside zstd on
the command line."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import clipfs
from benchmarks import reader
from benchmarks.goals import as_fast
from benchmarks.measure import CLIPFS, Row, Section, rounds, seconds
from benchmarks.peers import SQUASHFS, SQUASHFUSE, kernel_mount
from benchmarks.programs import clipfs_mount, drop_caches, forget, one_core, run, squashfuse_mount
from benchmarks.workload import BIG, Workload, listing, small_files

UNPACKED = "unpacked"
ZSTD = "zstd -dc"

# Where the time goes, for rows that fall short.
_SEQUENTIAL = (
    "Decoding and verifying gzip takes most of it, and what is decoded is compressed for the disk cache besides."
)
_RANDOM = (
    "A gzip layer can be entered every 0.5 to 4 MiB only: a read that misses decodes and verifies half of that, where "
    "squashfs decodes 128 KiB."
)
_CACHED = "A block from the disk cache passes through Python on its way."
_OPENING = "Names come from the kernel; every block that misses is decoded and verified in Python."
_KERNEL = "The kernel has kept all of it and asks nobody; a difference is the machine's."

# Seconds for random reads. Nearly all need a fifth of it; ratarmount has read enough by then.
_AT_MOST = 15

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
    big = listing(workload, "big", [BIG])
    some = listing(workload, "some", ordered[: size.ordered])
    mixed = listing(workload, "mixed", shuffled[: size.shuffled])
    return [
        Reader("sequential", "MB/s", python_reader("read", big, 1e-6), _SEQUENTIAL, _CACHED, _KERNEL, large=True),
        Reader("random 4 KiB", "reads/s", random_reads(size.random), _RANDOM, _CACHED, _KERNEL),
        Reader("small files, in order", "files/s", python_reader("files", some), _OPENING, _OPENING, _OPENING, True),
        Reader("small files, shuffled", "files/s", python_reader("files", mixed), _RANDOM, _CACHED, _OPENING, True),
    ]


def reading(workload: Workload) -> Section:
    """Each way to read, cold and warm."""
    size = workload.size
    rows: list[Row] = []
    with _peers(workload) as peers:
        for each in readers(workload):
            others = {ZSTD: partial(_zstd, workload)} if each.large else {}
            rows += each.measure(size.large if each.large else size.rounds, peers, others)
    sequential, at_random = (
        next(row for row in rows if row.name == f"{name}, {_WHEN['cached']}") for name in ("sequential", "random 4 KiB")
    )
    # What is compressed on disk costs the kernel its time, too.
    outcomes = [
        as_fast(sequential, ZSTD, 0.9, _CACHED, best=[SQUASHFS]),
        as_fast(at_random, SQUASHFUSE, 1.5, _CACHED, best=[SQUASHFS]),
    ]
    text = (
        f"The generated image: {size.files:,} small files and one of {size.big >> 20:,} MiB. squashfuse_ll and the "
        "kernel serve a zstd squashfs of the same tree, *unpacked* is the tree on this disk; `zstd -dc` decompresses "
        "the large file, which is on this disk as zstd makes it, to `/dev/null`. *Cold*: mounted afresh, then all of "
        "the kernel's caches dropped (`sync`, then 3 into `/proc/sys/vm/drop_caches`), and clipfs' own cache on disk "
        "empty. *From clipfs' disk cache*: as cold, but with what clipfs has kept on disk; the new mount begins to "
        "load into memory what the one before needed first, up to 32 MiB; the others' values are their cold ones. "
        "*Warm*: the same reader, the same paths and offsets, a third time on the same mount; in the second, servers "
        f"may still be reading ahead. Random reads are {size.random:,}, of fio's; small files are the first "
        f"{size.ordered:,} of the tree and {size.shuffled:,} of all. For small files reader and server share one core, "
        "whichever the peer: left to the scheduler, chance decides whether requests have to wake another core. "
        f"{size.large} rounds of sequential reads."
    )
    return Section.of("Reading", text, rows, outcomes)


#: Mounts a peer, with or without what it has kept on disk from earlier mounts.
Mounted = Callable[[bool], AbstractContextManager[Path]]


class Reader(NamedTuple):
    """A way to read. `cold`, `cached`, `warm` say where the time goes then. large: it takes long.

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
    large: bool = False

    def measure(
        self, count: int, peers: Mapping[str, Mounted], others: Mapping[str, Callable[[], Passes]]
    ) -> list[Row]:
        """A row for each kind of pass. others: those who need no mount."""

        def passes(peer: str) -> Passes:
            with peers[peer](True) as root:
                drop_caches()
                cold, _, warm = self.read(root), self.read(root), self.read(root)
            if peer != CLIPFS:
                return Passes(cold, warm, cold)
            with peers[peer](False) as root:
                drop_caches()
                return Passes(cold, warm, self.read(root))

        with one_core() if self.one_core else nullcontext():
            actions: dict[str, Callable[[], Passes]] = {peer: partial(passes, peer) for peer in peers}
            measured = rounds(count, self.name, {**actions, **others})
        return [
            Row(f"{self.name}, {words}", self.unit,
                {peer: [getattr(each, when) for each in found] for peer, found in measured.items()},
                SQUASHFUSE, f"read, {words}", getattr(self, when))
            for when, words in _WHEN.items()
        ]  # fmt: skip


def _zstd(workload: Workload) -> Passes:
    """The large file, MB/s."""
    drop_caches()
    cold, warm = (
        (workload.size.big / 1e6) / seconds(lambda: run("sh", "-c", 'zstd -dcq "$1" >/dev/null', "sh", workload.zstd))
        for _ in range(2)
    )
    return Passes(cold, warm, cold)


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
            SQUASHFS: lambda _: kernel_mount("squashfs", workload.squashfs, mountpoint),
            UNPACKED: lambda _: nullcontext(workload.unpacked),
        }
    finally:
        mountpoint.rmdir()


def python_reader(how: str, paths: Path, scale: float = 1) -> Callable[[Path], float]:
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
            "--ioengine=psync", f"--number_ios={count}", f"--runtime={_AT_MOST}", "--randseed=1", "--invalidate=0",
            "--output-format=json",
        )  # fmt: skip
        latency = json.loads(done)["jobs"][0]["read"]["lat_ns"]
        return float(1e9 / latency["mean"])

    return read
