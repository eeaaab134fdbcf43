"""From an image to a running container: indexing, the index's size, mounting, the first output."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import zstandard

import clipfs
from benchmarks.bundles import Bundle
from benchmarks.goals import at_most, more_than
from benchmarks.measure import CLIPFS, Row, Section, number, progress, rounds, seconds
from benchmarks.peers import SQUASHFUSE
from benchmarks.programs import (
    CLIPFS_COMMAND,
    clipfs_mount,
    drop_caches,
    first_output,
    forget,
    run,
    squashfuse_mount,
    unmount,
)
from benchmarks.workload import Workload
from clipfs.format.container import Header, Kind

UMOCI = "umoci unpack"
UMOCI_RUNC = "umoci unpack + runc run"
RUNC = "runc run, unpacked before"

_STARTING = "Starting Python and mounting is most of it, whatever the size of the image."


def indexing(workload: Workload) -> Section:
    """The work before the first mount of an image, beside the work before its first use without clipfs."""

    def index(image: str) -> float:
        with _in_memory() as place:
            return seconds(lambda: run(*CLIPFS_COMMAND, "index", image, "-o", place / "clip"))

    def unpack(image: str) -> float:
        with _in_memory() as place:
            return seconds(lambda: run("umoci", "unpack", "--image", image.removeprefix("oci:"), place / "bundle"))

    rows = []
    for what, image in _images(workload).items():
        count = workload.size.large if image == workload.generated else workload.size.rounds
        samples = rounds(count, f"indexing the {what}", {
            CLIPFS: lambda image=image: index(image),  # type: ignore[misc]
            UMOCI: lambda image=image: unpack(image),  # type: ignore[misc]
        })  # fmt: skip
        rows.append(Row(f"index the {what}", "s", samples, UMOCI, "index an image",
                        "Decompression is most of it."))  # fmt: skip
    text = (
        "The whole command, from a local image whose layers are in the page cache; both check every digest. Both write "
        "to memory (tmpfs), so that the disk's mood is not in it: umoci writes the whole tree, clipfs the index. "
        f"{workload.size.large} rounds of the generated image."
    )
    return Section.of("Indexing", text, rows)


def size(workload: Workload) -> Section:
    """How large indexes are, as they are and as they would be shipped."""
    lines = []
    for what, image in _images(workload).items():
        progress(f"size of the index of the {what}")
        clip = workload.scratch / "size.clip"
        report = clipfs.build(image, clip)
        with clip.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = Header.parse(data, clip.name)
            tree = sum(header[kind].length for kind in (Kind.EROFS, Kind.EXTENTS)) / report.inodes
            seeking = sum(header[kind].length for kind in (Kind.SPANS, Kind.SEEKS, Kind.WINDOWS)) / report.compressed
            shipped = len(zstandard.ZstdCompressor(level=19).compress(data[:]))
        lines.append([
            what, f"{report.inodes:,}", f"{report.compressed / 1e6:.1f} MB", f"{report.clip_size / 1e3:,.0f} kB",
            f"{number(report.clip_size / report.inodes)} B", f"{number(tree)} B", f"{seeking:.2%}",
            f"{report.clip_size / report.compressed:.2%}",
            f"{shipped / report.compressed:.2%}",
        ])  # fmt: skip
    header_line = ["image", "inodes", "layers, gzip", "index", "an inode", "of it the tree", "spans, windows",
                   "of the layers", "zstd -19, of the layers"]  # fmt: skip
    text = (
        "An index is the tree (inodes, names, extents), which grows with the number of files, and what random access "
        "needs (spans, seek-point windows), which grows with the layers' bytes. Together they are to stay below 140 "
        "bytes an inode and 0.3 % of the layers. Shares are of the compressed layers; the last column is for an index "
        "that is compressed for shipping."
    )
    return Section("Index size", text, header_line, lines)


def mounting(workload: Workload) -> Section:
    """From the command to the root directory's answer."""
    clip = workload.scratch / "mount.clip"
    clipfs.build(workload.generated, clip)
    mountpoint = workload.scratch / "mnt"
    mountpoint.mkdir()

    def by_command() -> float:
        drop_caches()
        try:
            return seconds(lambda: (run(*CLIPFS_COMMAND, "mount", clip, mountpoint), os.listdir(mountpoint)))
        finally:
            if os.path.ismount(mountpoint):
                run(*CLIPFS_COMMAND, "umount", mountpoint)

    def by_library() -> float:
        drop_caches()
        started = time.perf_counter()
        with clipfs_mount(clip, mountpoint):
            os.listdir(mountpoint)
            return time.perf_counter() - started

    def squashfuse() -> float:
        drop_caches()
        started = time.perf_counter()
        with squashfuse_mount(workload.squashfs, mountpoint):
            os.listdir(mountpoint)
            return time.perf_counter() - started

    try:
        measured = rounds(workload.size.rounds, "mounting", {
            "command": by_command, "library": by_library, SQUASHFUSE: squashfuse,
        })  # fmt: skip
    finally:
        unmount(mountpoint)
        mountpoint.rmdir()
    why = "A Python process has to start and import pyfuse3 and trio; the index itself opens in milliseconds."
    rows = [
        Row(f"mount, by {how}, cold", "s", {CLIPFS: measured[how], SQUASHFUSE: measured[SQUASHFUSE]},
            SQUASHFUSE, "mount", why)
        for how in ("command", "library")
    ]  # fmt: skip
    text = (
        "From the call to a listing of the root directory, all of the kernel's caches dropped before; the first round "
        "has left clipfs a checked copy of the index. *Library*: `clipfs.mount()` in a Python process that is already "
        "there."
    )
    return Section.of("Mounting", text, rows)


def running(workload: Workload) -> Section:
    """The demo image's Python says hello."""
    demo, command, scratch = workload.demo.image, workload.demo.command, workload.scratch
    clip = scratch / "run.clip"
    clipfs.build(demo, clip)
    kept = Bundle(scratch / "kept", workload.demo)
    kept.unpack()
    kept.command(command)

    def by_clipfs(what: str | Path) -> Starts:
        forget()
        return Starts(cold(lambda: once(what)), cold(lambda: once(what)), once(what))

    def once(what: str | Path) -> float:
        started = time.perf_counter()
        return first_output(*CLIPFS_COMMAND, "run", "--rm", what, *command) - started

    def by_umoci() -> Starts:
        return Starts(first := cold(unpacked), first, unpacked())

    def unpacked() -> float:
        bundle = Bundle(scratch / "bundle", workload.demo)
        try:
            started = time.perf_counter()
            bundle.unpack()
            bundle.command(command)
            return bundle.first_output() - started
        finally:
            shutil.rmtree(bundle.path, ignore_errors=True)

    def by_runc() -> Starts:
        return Starts(first := cold(bare), first, bare())

    def bare() -> float:
        started = time.perf_counter()
        return kept.first_output() - started

    measured = rounds(workload.size.rounds, "running", {
        "indexed": lambda: by_clipfs(clip), "image": lambda: by_clipfs(demo), UMOCI_RUNC: by_umoci, RUNC: by_runc,
    })  # fmt: skip
    rows = [
        Row(f"run to first output, {kind}", "s",
            {CLIPFS: [each[at] for each in measured[ours]],
             **{peer: [each[at] for each in measured[peer]] for peer in (UMOCI_RUNC, RUNC)}},
            UMOCI_RUNC, "start a container", why)
        for kind, ours, at, why in (
            ("image not seen before", "image", 0, "Indexing is most of it."),
            ("index at hand", "indexed", 0, _STARTING),
            ("image run before", "indexed", 1, _STARTING),
            ("warm caches", "indexed", 2, _STARTING),
        )
    ]  # fmt: skip
    text = (
        f"`clipfs run` on the demo image, from the call to the first byte of `{' '.join(command[:2])} …`. But for the "
        "last row all of the kernel's caches were dropped before (`sync`, then 3 into `/proc/sys/vm/drop_caches`). "
        "*Run before*: decoded spans are in clipfs' own cache on disk. *Warm caches*: the same at once again, nothing "
        "dropped. The image is on the local disk; what a registry adds is not in here, and unpacking would have to "
        "download all of it. The last peer shows what runc itself costs."
    )
    extra = more_than(rows[-1], RUNC)
    goal = at_most(rows[-1].name, 0.4, extra, " s", _STARTING, f"clipfs − {RUNC}")
    return Section.of("Running", text, rows, [goal])


class Starts(NamedTuple):
    """Seconds to the first output: with nothing at hand but an index, once more with cold caches, with warm ones."""

    first: float
    again: float
    warm: float


def cold(action: Callable[[], float]) -> float:
    """With none of the files in the kernel's caches."""
    drop_caches()
    return action()


@contextmanager
def _in_memory() -> Iterator[Path]:
    """A directory that costs no disk writes."""
    with tempfile.TemporaryDirectory(prefix="clipfs-bench-", dir="/dev/shm") as place:
        yield Path(place)


def _images(workload: Workload) -> dict[str, str]:
    return {"demo image": workload.demo.image, "generated image": workload.generated}
