"""The same tree, mounted by each of those whom the two views are measured beside.

Each has its own copy of the files, made once a run: what a peer cannot read it is given in the form that it likes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import clipfs
from benchmarks.measure import CLIPFS
from benchmarks.programs import await_mount, run, squashfuse_mount, unmount
from benchmarks.workload import Workload

FUSE_VIEW = "clipfs, FUSE"
SQUASHFUSE = "squashfuse_ll"
EROFS = "native EROFS"
EXT4 = "ext4"

_SECONDS = 20


def peers(workload: Workload, clip: Path) -> dict[str, Callable[[Path], AbstractContextManager[Path]]]:
    """By name, what mounts it on a directory for a while. clip: the index of the generated image."""
    erofs, ext4 = workload.scratch / "root.erofs", workload.scratch / "root.ext4"
    run("mkfs.erofs", "--quiet", erofs, workload.unpacked)
    used = int(run("du", "-s", "--block-size=1M", workload.unpacked).split()[0])
    run("mkfs.ext4", "-q", "-N", "200000", "-d", workload.unpacked, ext4, f"{used * 3 // 2 + 200}M")
    found: dict[str, Callable[[Path], AbstractContextManager[Path]]] = {
        CLIPFS: lambda at: _clipfs(clip, at, "kernel"),
        FUSE_VIEW: lambda at: _clipfs(clip, at, "fuse"),
        SQUASHFUSE: lambda at: squashfuse_mount(workload.squashfs, at),
        "kernel squashfs": lambda at: _kernel("squashfs", workload.squashfs, at),
        EROFS: lambda at: _kernel("erofs", erofs, at),
        EXT4: lambda at: _kernel("ext4", ext4, at),
        "fuse-overlayfs": lambda at: _served(at, "fuse-overlayfs", "-f", "-o", f"lowerdir={workload.unpacked}", at),
    }
    ratarmount = Path(sys.executable).with_name("ratarmount")
    if ratarmount.exists():
        [layer] = sorted((workload.unpacked.parent / "oci" / "blobs" / "sha256").iterdir(), key=_size)[-1:]
        archive = workload.scratch / "layer.tar.gz"
        shutil.copyfile(layer, archive)
        found["ratarmount"] = lambda at: _served(at, ratarmount, "-f", archive, at)
    return found


def _size(path: Path) -> int:
    return path.stat().st_size


@contextmanager
def _clipfs(clip: Path, at: Path, view: str) -> Iterator[Path]:
    with clipfs.mount(clip, at, clipfs.MountOptions(view=view)):
        yield at


@contextmanager
def _kernel(fstype: str, image: Path, at: Path) -> Iterator[Path]:
    run("mount", "-t", fstype, "-o", "loop,ro", image, at)
    try:
        yield at
    finally:
        unmount(at)


@contextmanager
def _served(at: Path, *command: str | Path) -> Iterator[Path]:
    """A FUSE file system that stays in the foreground until it is unmounted."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, process_group=0)
    try:
        await_mount(at, process)
        yield at
    finally:
        unmount(at)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS)
        process.kill()
        process.wait()
