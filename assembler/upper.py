"""Seeding: the directories a container cannot do without, made in an overlay's upper before the overlay is mounted.

A read-only lower cannot grow ``/proc``, and a runtime that finds it missing fails in ways that look like races. So
whatever the lower is, the upper is given these directories first, and the merged view has them from its first moment.

What the lower has is copied as it is: mode, owner, xattrs and times of every directory on the way. A link stays the
link it is, and the place it leads to (inside the root) is seeded instead; only where a runtime makes things itself is
none allowed. Does not know how overlays are mounted.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import clipfs
from assembler.beneath import locate, opened, opened_root

# What a runtime mounts on, and what images expect their platform to give them. Modes as Debian's base-files has them.
REQUIRED = {"workspace": 0o755, "volumes": 0o755, "proc": 0o555, "sys": 0o555, "dev": 0o755, "tmp": 0o1777}
_DEFAULT_MODE = 0o755

# What a runtime makes in them it makes by a path of the host, where a link of the image leads out of the root.
_NO_LINKS = ("proc", "sys", "dev")

# Overlayfs' own marks. A lower that brings some was not made by this overlay, and must not speak in its name.
_OVERLAY_XATTRS = ("trusted.overlay.", "user.overlay.")
_OPAQUE = "trusted.overlay.opaque"

_MAX_PATH = 4095  # PATH_MAX less its NUL: nobody could go there

_KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}


def seed(view: Path, upper: Path, extra: Sequence[str] = (), on_step: Callable[[], None] = lambda: None) -> None:
    """Make `REQUIRED` and `extra` directories in `upper`, as they are or should be in `view`.

    view: what will be seen below what is made here: the lower, or the read-only merge of several with a used upper.
    on_step is called at every directory, because an image may name many: what it raises ends the seeding.
    ImageError if one of them cannot be a directory because the image has something else there.
    """
    with opened_root(view) as source, opened_root(upper) as target:
        seeding = _Seeding(source, target, on_step)
        seeding.copy(())
        for name in _NO_LINKS:
            seeding.check_kind((os.fsencode(name),))
        for name in dict.fromkeys([*REQUIRED, *extra]):
            if len(os.fsencode(name)) > _MAX_PATH:
                raise _in_the_way(f"{name[:40]}…", f"no path on Linux is longer than {_MAX_PATH} bytes")
            try:
                seeding.require(os.fsencode(name), REQUIRED.get(name.strip("/"), _DEFAULT_MODE))
            except NotADirectoryError as error:
                raise _in_the_way(name, f"{error.filename} is not a directory") from error
            except OSError as error:
                raise clipfs.MountError(
                    f"cannot make the directory {name} in {upper}: {error.strerror or error}"
                ) from error
        seeding.restore_times()


class _Seeding:
    """One seeding, from descriptor `view` into descriptor `upper`; remembers times until nothing is made any more."""

    def __init__(self, view: int, upper: int, on_step: Callable[[], None]) -> None:
        self.view = view
        self.upper = upper
        self.on_step = on_step
        self.times: dict[tuple[bytes, ...], tuple[int, int]] = {}

    def require(self, path: bytes, mode: int) -> None:
        place = locate(self.view, path)
        for depth in range(1, len(place.found) + 1):
            self.copy(place.found[:depth])
        whole = place.found + place.missing
        for depth in range(len(place.found) + 1, len(whole) + 1):
            self._make(whole[:depth], mode if depth == len(whole) else _DEFAULT_MODE)

    def copy(self, names: tuple[bytes, ...]) -> None:
        """Make a directory of the view in the upper too, unless it is there, with everything it has but its entries."""
        self.on_step()
        if names in self.times:
            return
        self.check_kind(names)
        with opened(self.view, names, flags=os.O_RDONLY) as source:
            info = os.fstat(source)
            self.times[names] = (info.st_atime_ns, info.st_mtime_ns)
            if not names or self._mkdir(names):
                with opened(self.upper, names, flags=os.O_RDONLY) as target:
                    os.fchown(target, info.st_uid, info.st_gid)
                    os.fchmod(target, stat.S_IMODE(info.st_mode))
                    _copy_xattrs(source, target)

    def restore_times(self) -> None:
        """Last of all: making something in a directory changes its times."""
        for names, times in self.times.items():
            self.on_step()
            with opened(self.upper, names, flags=os.O_RDONLY) as target:
                os.utime(target, ns=times)

    def check_kind(self, names: tuple[bytes, ...]) -> None:
        """ImageError if the view has something else there than a directory."""
        if not names:
            return
        with opened(self.view, names[:-1]) as parent:
            try:
                mode = os.stat(names[-1], dir_fd=parent, follow_symlinks=False).st_mode
            except FileNotFoundError:
                return
        if not stat.S_ISDIR(mode):
            where = os.fsdecode(b"/" + b"/".join(names))
            raise _in_the_way(where, f"the image has {_KINDS.get(stat.S_IFMT(mode), 'something else')} there")

    def _make(self, names: tuple[bytes, ...], mode: int) -> None:
        """A directory that the view does not have."""
        self.on_step()
        if self._mkdir(names):
            with opened(self.upper, names, flags=os.O_RDONLY) as target:
                os.fchmod(target, mode)

    def _mkdir(self, names: tuple[bytes, ...]) -> bool:
        """True if it was made, False if it was there. A whiteout (of an upper that was used before) gives way."""
        with opened(self.upper, names[:-1]) as parent:
            try:
                info = os.stat(names[-1], dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                os.mkdir(names[-1], dir_fd=parent)
                return True
            if stat.S_ISDIR(info.st_mode):
                return False
            if not (stat.S_ISCHR(info.st_mode) and info.st_rdev == 0):
                raise NotADirectoryError(errno.ENOTDIR, "", os.fsdecode(b"/" + b"/".join(names)))
            os.unlink(names[-1], dir_fd=parent)
            os.mkdir(names[-1], dir_fd=parent)
        with opened(self.upper, names, flags=os.O_RDONLY) as target:
            # What was deleted stays deleted: the lower's entries must not shine through the new directory.
            os.setxattr(target, _OPAQUE, b"y")
        return True


def _copy_xattrs(source: int, target: int) -> None:
    try:
        names = os.listxattr(source)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return
        raise
    for name in names:
        if not name.startswith(_OVERLAY_XATTRS):
            # A file system without, say, ACLs cannot keep them, and the kernel's own copy-up does not insist either.
            with suppress(OSError):
                os.setxattr(target, name, os.getxattr(source, name))


def _in_the_way(name: str, why: str) -> clipfs.ImageError:
    return clipfs.ImageError(f"the container needs a directory {name}, but {why}")
