"""The same tree, mounted by each of those whom the two views are measured beside."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import clipfs
from benchmarks.measure import CLIPFS
from benchmarks.programs import run, served, squashfuse_mount, unmount
from benchmarks.workload import Copies

FUSE_VIEW = "clipfs, FUSE"
SQUASHFUSE = "squashfuse_ll"
SQUASHFS = "kernel squashfs"
EROFS = "native EROFS"
EXT4 = "ext4"
RATARMOUNT = "ratarmount"

#: Those that are in the kernel and have all of the data at hand: what no file system is much faster than.
IN_KERNEL = (EROFS, EXT4, SQUASHFS)

#: How each peer has the tree.
FORMS = (
    "*clipfs* is the kernel view. squashfuse_ll and the kernel have a zstd squashfs of the same tree, native EROFS and "
    "ext4 an image that is not compressed, fuse-overlayfs the unpacked tree, ratarmount a `.tar.gz`."
)

#: Mounts a peer on a directory, for a while.
Mounting = Callable[[Path], AbstractContextManager[Path]]

#: The first time ratarmount reads all of the archive, before it mounts.
INDEXING_SECONDS = 300.0


def peers(copies: Copies, clip: Path) -> dict[str, Mounting]:
    """By name. clip: the index of the image that these are copies of."""
    found: dict[str, Mounting] = {
        CLIPFS: lambda at: _clipfs(clip, at, "kernel"),
        FUSE_VIEW: lambda at: _clipfs(clip, at, "fuse"),
        SQUASHFUSE: lambda at: squashfuse_mount(copies.squashfs, at),
        SQUASHFS: lambda at: kernel_mount("squashfs", copies.squashfs, at),
        EROFS: lambda at: kernel_mount("erofs", copies.erofs, at),
        EXT4: lambda at: kernel_mount("ext4", copies.ext4, at),
        "fuse-overlayfs": lambda at: served(at, "fuse-overlayfs", "-f", "-o", f"lowerdir={copies.tree}", at),
    }
    ratarmount = ratarmount_program()
    if ratarmount:
        found[RATARMOUNT] = lambda at: served(at, ratarmount, "-f", copies.archive, at, seconds=INDEXING_SECONDS)
    return found


def ratarmount_program() -> Path | None:
    """It comes with the extra "bench", or not at all."""
    program = Path(sys.executable).with_name("ratarmount")
    return program if program.exists() else None


@contextmanager
def _clipfs(clip: Path, at: Path, view: str) -> Iterator[Path]:
    with clipfs.mount(clip, at, clipfs.MountOptions(view=view)):
        yield at


@contextmanager
def kernel_mount(fstype: str, image: Path, at: Path) -> Iterator[Path]:
    """An image that the kernel mounts by itself, on a loop device."""
    run("mount", "-t", fstype, "-o", "loop,ro", image, at)
    try:
        yield at
    finally:
        unmount(at)
