"""What the processes of a mount hold, over time, while files are read in each way."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import clipfs
from benchmarks.goals import Outcome, at_most
from benchmarks.measure import Picture, Section, progress
from benchmarks.peers import FUSE_VIEW
from benchmarks.programs import CLIPFS_COMMAND, drop_caches, forget, run
from benchmarks.reading import python_reader, readers
from benchmarks.remote import FAST
from benchmarks.streaming import linked
from benchmarks.workload import BIG, Workload, listing, small_files

#: Bytes that a mount may hold besides its LRU.
BOUND = 150e6

# Seconds between looks at a process. Each costs some 20 µs, so that nobody notices.
_EVERY = 0.02

_VIEWS = {"clipfs": "kernel", FUSE_VIEW: "fuse"}
_WHY = "Buffers of what is fetched, decoded and stored, beside the interpreter and its libraries."


@dataclass
class Memory:
    """Resident bytes of a mount's processes: at first, at most (by the kernel's own account), and over time."""

    before: float = 0.0
    most: float = 0.0
    samples: list[tuple[float, float]] = field(default_factory=list)


def memory(workload: Workload) -> Section:
    """Both views, each way to read, and reading over a link."""
    clip, scratch = workload.scratch / "memory.clip", workload.scratch
    mountpoint = scratch / "mnt"
    clipfs.build(workload.generated, clip)
    mountpoint.mkdir()
    cache = clipfs.MountOptions().cache
    found: dict[str, dict[str, Memory]] = {}
    for name, act in _workloads(workload).items():
        found[name] = {
            who: _watched(f"{name}, {who}", clip, mountpoint, f"view={view}", act) for who, view in _VIEWS.items()
        }
    forget()
    with clipfs.mount(clip, mountpoint):
        _copy(mountpoint)
    found["sequential, from the disk cache"] = {
        who: _watched(f"from the disk cache, {who}", clip, mountpoint, f"view={view}", _copy, cached=True)
        for who, view in _VIEWS.items()
    }
    remote = scratch / "remote.clip"
    with linked(workload, remote, FAST) as (_, source, _):
        found["sequential, over a link"] = {
            who: _watched(f"over a link, {who}", remote, mountpoint, f"view={view},source={source}", _copy)
            for who, view in _VIEWS.items()
        }
    mountpoint.rmdir()
    return _section(found, BOUND + cache, cache)


def _workloads(workload: Workload) -> dict[str, Callable[[Path], object]]:
    ordered = small_files(workload)
    everything = listing(workload, "every-name", ordered)
    return {
        **{reader.name: reader.read for reader in readers(workload)},
        "stat of every name": python_reader("stat", everything),
        "git status": python_reader("status", listing(workload, "every-path", sorted([*ordered, BIG]))),
    }


def _copy(root: Path) -> None:
    run("cp", root / BIG, "/dev/null")


def _watched(
    what: str, clip: Path, mountpoint: Path, options: str, act: Callable[[Path], object], *, cached: bool = False
) -> Memory:
    """With empty caches, or with what clipfs has kept. Mounted by the command: what a library forks shares memory with
    who called it."""
    progress(f"memory: {what}")
    if not cached:
        forget()
    drop_caches()
    found = Memory()
    run(*CLIPFS_COMMAND, "mount", "-o", options, clip, mountpoint)
    try:
        [record] = clipfs.mounts()
        assert record.worker is not None
        worker, processes = record.worker.pid, (record.process.pid, record.worker.pid)
        found.before = sum(_resident(pid, "VmRSS") for pid in processes)
        mounting = _peak(processes)
        for pid in processes:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew, see proc(5)
        with _sampled(lambda: [*processes, *loaders(worker)], found.samples):
            act(mountpoint)
        found.most = max(mounting, _peak([*processes, *loaders(worker)]), *(held for _, held in found.samples))
    finally:
        clipfs.unmount(mountpoint, force=True)
    return found


@contextmanager
def _sampled(processes: Callable[[], Iterable[int]], samples: list[tuple[float, float]]) -> Iterator[None]:
    """Fill the list with (seconds, bytes) for as long as the block lasts."""
    over = threading.Event()
    page = os.sysconf("SC_PAGE_SIZE")

    def sample() -> None:
        started = time.perf_counter()
        while True:
            resident = 0
            for pid in processes():
                with suppress(FileNotFoundError, ProcessLookupError):  # a loader that has just ended
                    resident += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
            samples.append((time.perf_counter() - started, resident))
            if over.wait(_EVERY):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _section(found: Mapping[str, Mapping[str, Memory]], bound: float, cache: int) -> Section:
    lines = [
        [name, *(text for each in views.values() for text in (_mb(each.before), _mb(each.most)))]
        for name, views in found.items()
    ]
    outcomes: list[Outcome] = []
    for who in _VIEWS:
        worst = max(found, key=lambda name: found[name][who].most)
        most = found[worst][who].most
        outcomes.append(
            at_most(f"memory of a mount, {worst} (the worst)", round(bound / 1e6), most / 1e6, " MB", _WHY, who)
        )
    held = all(each.met for each in outcomes)
    text = (
        "Resident memory of the processes of a mount: supervisor, worker, and the loader that reads ahead from the "
        "disk cache. With empty caches at first if not said otherwise; *most* is the sum of their peaks as the kernel "
        "has noted them, while the mount was made or afterwards, whichever was larger, but no less than what was seen "
        "at any time. What two share counts twice. "
        f"The bound is 150 MB and the LRU of {cache >> 20} MiB, "
        f"{_mb(bound)} in all. **{'It held in every workload' if held else 'It did not hold everywhere'}**."
    )
    header = ["workload", *(f"{who}: {what}" for who in _VIEWS for what in ("just mounted", "most"))]

    def draw(figure: Any) -> None:
        from benchmarks import charts  # late: matplotlib is an extra

        series = {name: {who: each.samples for who, each in views.items()} for name, views in found.items()}
        charts.memory(figure, series, bound)

    picture = Picture("memory.svg", "Resident memory of a mount over time, in each workload, and its bound", draw)
    return Section("Memory", text, header, lines, (), outcomes, [picture])


def _mb(value: float) -> str:
    return f"{value / 1e6:.0f} MB"


def loaders(parent: int) -> list[int]:
    """The loader processes that this one has started."""
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found += (task / "children").read_text().split()
    # Before it is that program it shares all memory with the worker.
    return [int(pid) for pid in found if b"clipfs.blocks.loader" in _command(pid)]


def _command(pid: str) -> bytes:
    """Nothing of a process that has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _peak(processes: Iterable[int]) -> int:
    """Their peaks together, which they need not have had at the same time."""
    return sum(_resident(pid, "VmHWM") for pid in processes)


def _resident(pid: int, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) << 10
    raise SystemExit(f"process {pid} has no {key}")
