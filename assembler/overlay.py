"""One container's overlay: its directories, the seeded upper, the mount, and the way back.

``base/<id>/layer-0/{upper,work,merged}``. Several lowers stack in one overlay, because overlays on overlays meet the
kernel's limit of two. With an upper that is to be kept, ``upper`` and ``work`` are links to where it is, so that
whoever cleans up can see what belongs to it. Knows nothing of images, runtimes or processes.

An overlay honours ``trusted.overlay.*`` xattrs and 0:0 devices of its lowers, and there is no option against it:
whoever makes a lower from an image must leave them out. Redirects and metacopies, which could cross directories, are
off.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import clipfs
from assembler import kernel, names
from assembler.container import Container, taken
from assembler.upper import seed

_log = logging.getLogger("assembler")

_LAYER = "layer-0"


class ContainerOverlay:
    """An overlay over `lower` (or several, topmost first) for one container; as a context manager, mounted in between.

    required: more directories to seed, which takes its time; so `on_step` is called again and again, and may raise.
    upper: where what is written goes, and stays; without it, below `base`.
    Unmounting leaves `upper` as it is. Where there is no `Container` of this id yet, the overlay is its own.
    """

    def __init__(
        self,
        container_id: str,
        lower: Path | Sequence[Path],
        base: Path,
        required: Sequence[str] = (),
        *,
        upper: Path | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.container_id = names.checked(container_id)
        lowers = [lower] if isinstance(lower, Path) else lower
        # Absolute, but no link is resolved: the last component may be a mount whose server must not be asked in vain.
        self.lowers = tuple(each.absolute() for each in lowers)
        self.required = tuple(required)
        # A runtime refuses a root that is reached through a link.
        self.base = base.resolve()
        self.layer = self.base / container_id / _LAYER
        self.merged = self.layer / "merged"
        self._kept = upper.resolve() if upper else None
        self._on_step = on_step
        self._undo = ExitStack()

    @property
    def upper(self) -> Path:
        """What the container wrote: the difference to the lower, in overlayfs' notation."""
        return self._kept or self.layer / "upper"

    def mount(self) -> None:
        """Make the directories, seed the upper, mount. If one step fails, those before it are undone."""
        for lower in self.lowers:
            if not lower.is_dir():
                raise clipfs.UsageError(f"{lower} is not a directory, so it cannot be the root of a container")
        if not self.lowers:
            raise clipfs.UsageError("a container needs at least one lower directory")
        with ExitStack() as undo:
            own = None
            if not self.layer.parent.exists():
                own = undo.enter_context(Container.create(self.base, self.container_id))
            try:
                work = self._directories(undo)
                self._seed()
                kernel.mount_overlay(self.merged, self.lowers, self.upper, work)
            except OSError as error:
                raise self._explained(error) from error
            undo.callback(self._unmount_merged)
            if own is not None:
                own.keep = True
            self._undo = undo.pop_all()
        _log.info("mounted layer container_id=%s layer_index=0", self.container_id)

    def unmount(self) -> None:
        """Undo `mount`, all of it or what there is of it."""
        self._undo.close()

    def __enter__(self) -> Self:
        self.mount()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unmount()

    def _directories(self, undo: ExitStack) -> Path:
        """Make what the mount needs; returns the work directory."""
        try:
            self.layer.mkdir(mode=0o700)
        except FileExistsError:
            raise taken(self.layer.parent) from None
        self.merged.mkdir()
        if self._kept is None:
            for name in ("upper", "work"):
                (self.layer / name).mkdir()
            return self.layer / "work"
        return self._kept_directories(self._kept, undo)

    def _kept_directories(self, upper: Path, undo: ExitStack) -> Path:
        if upper.exists() and not upper.is_dir():
            raise clipfs.UsageError(f"what the container writes needs a directory, and {upper} is none")
        upper.mkdir(parents=True, exist_ok=True)
        if not upper.name:
            raise clipfs.UsageError("what the container writes cannot go to the root of this machine")
        if not undo.enter_context(_locked(upper)):
            raise clipfs.UsageError(f"another container is writing to {upper}")
        _refuse_orphans(upper)
        # The kernel wants it beside the upper, not inside, and on the same mount.
        work = upper.with_name(f".{upper.name}.clipfs-work")
        (self.layer / "upper").symlink_to(upper)
        (self.layer / "work").symlink_to(work)
        work.mkdir(exist_ok=True, mode=0o700)
        undo.callback(names.remove_tree, work)
        return work

    def _seed(self) -> None:
        """Seed the upper as the lowers want it; more than one directory is looked at through a mount of its own."""
        below = list(self.lowers)
        if self._kept and any(self._kept.iterdir()):
            below.insert(0, self._kept)
        if len(below) == 1:
            seed(below[0], self.upper, self.required, self._on_step)
            return
        kernel.mount_overlay(self.merged, below)
        try:
            seed(self.merged, self.upper, self.required, self._on_step)
        finally:
            kernel.unmount(self.merged)

    def _unmount_merged(self) -> None:
        if not kernel.unmount(self.merged):
            _log.warning("%s was still in use; it is detached and ends with its last user", self.merged)

    def _explained(self, error: OSError) -> clipfs.MountError:
        """The errno of an overlay mount means many things; say the likeliest, with what the kernel said."""
        said = error.strerror or str(error)
        if error.filename:
            return clipfs.MountError(f"cannot prepare the overlay of {self.container_id}: {error.filename}: {said}")
        if error.errno == errno.EPERM:
            return clipfs.MountError(f"only root may mount an overlay ({said})")
        if error.errno == errno.ENODEV:
            return clipfs.MountError("this kernel has no overlayfs; try `modprobe overlay`")
        hint = ""
        if error.errno == errno.ELOOP:
            hint = "; none of them may lie in another one"
        if error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EROFS):
            hint = (
                f"; its upper {self.upper} is on {_fstype(self.upper)}: it has to be writable, on one mount with its "
                "work directory, and on a file system that can be one: ext4, xfs, btrfs, tmpfs; no overlay, FUSE or NFS"
            )
        lowers = ", ".join(map(str, self.lowers))
        return clipfs.MountError(f"cannot mount an overlay over {lowers}: {said}{hint}")


def remove_kept_work(container: Container) -> None:
    """Remove the work directory beside an abandoned container's kept upper, unless another one uses it by now."""
    layer = container.path / _LAYER
    if (layer / "work").is_symlink():
        upper = (layer / "upper").readlink()
        with _locked(upper) if upper.is_dir() else nullcontext(True) as ours:
            if ours:
                names.remove_tree((layer / "work").readlink())


@contextmanager
def _locked(upper: Path) -> Iterator[bool]:
    """The right to write to a kept upper; False if somebody else has it."""
    fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except BlockingIOError:
            ours = False
        yield ours
    finally:
        os.close(fd)


def _refuse_orphans(upper: Path) -> None:
    """A container outlives an owner that was killed, and so does its overlay, but not the lock."""
    for merged in (Path(each.mountpoint) for each in kernel.mounts() if each.fstype == "overlay"):
        layer, link = merged.parent, None
        if (layer.name, merged.name) == (_LAYER, "merged"):
            with suppress(OSError):
                link = (layer / "upper").readlink()
        if link == upper:
            raise clipfs.UsageError(
                f"the container {layer.parent.name} is still writing to {upper}, though what started it is gone; "
                f"run `clipfs gc --base {layer.parent.parent}` first"
            )


def _fstype(path: Path) -> str:
    """What kind of file system `path` is on; the mount table knows, no call tells."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    return next((each.fstype for each in kernel.mounts() if each.device == wanted), "an unknown file system")
