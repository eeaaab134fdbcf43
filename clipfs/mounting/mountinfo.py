"""The kernel's table of mounts, and taking an entry out of it.

This module knows that clipfs mounts are of type ``fuse.clipfs``, or EROFS of one of the indexes that `checked` keeps,
and nothing else about clipfs. Nothing here looks *into* a mount, so a dead or hung file system cannot stop it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from clipfs.errors import MountError

FSTYPE = "fuse.clipfs"

# Flags of the system call, from sys/mount.h.
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

# An index that `checked` keeps: the boot that it was made in, what it is, and what is known of it.
_CHECKED = re.compile(r"/checked/[0-9a-f-]{36}/[0-9a-f]{64}(\.no-xattrs)?\.clip$")

_OCTAL = re.compile(rb"\\([0-7]{3})")

# fusermount3 only makes a system call or two; if it takes longer than this something below it hangs.
_FUSERMOUNT_SECONDS = 20


class MountEntry(NamedTuple):
    """One line of /proc/self/mountinfo; device is "major:minor", options those of the mount, not of the file system."""

    id: int
    parent: int
    device: str
    mountpoint: str
    options: frozenset[str]
    fstype: str
    source: str

    @property
    def ours(self) -> bool:
        """Is it a clipfs mount, as far as can be seen? An EROFS of loop devices says nothing about them."""
        return self.fstype == FSTYPE or (self.fstype == "erofs" and _CHECKED.search(self.source) is not None)


def entries() -> list[MountEntry]:
    """All mounts of this process's mount namespace."""
    found = []
    # Of what ends a line elsewhere, such as CR, any may be in a name.
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            # "36 35 98:0 /root /mount/point rw,noatime shared:1 - ext4 /dev/root rw"; there may be any number of tags.
            before, _, after = line.partition(b" - ")
            left, right = before.split(b" "), after.split(b" ")
            found.append(
                MountEntry(
                    id=int(left[0]),
                    parent=int(left[1]),
                    device=left[2].decode(),
                    mountpoint=_path(left[4]),
                    options=frozenset(left[5].decode().split(",")),
                    fstype=_path(right[0]),
                    source=_path(right[1]),
                )
            )
    return found


def top_at(mountpoint: str) -> MountEntry | None:
    """The mount whose root a path lookup of `mountpoint` ends on, None if that is no mount's root.

    It goes from mount to mount as the kernel does. The table also has what nobody sees: what another mount covers, in
    the same place or in a directory above.
    """
    table = entries()
    ids = {entry.id for entry in table}
    # First the root: on something that is not in the table, or on itself.
    here, on = None, [entry for entry in table if entry.parent not in ids or entry.parent == entry.id]
    while passed := [entry for entry in on if f"{mountpoint}/".startswith(f"{entry.mountpoint.rstrip('/')}/")]:
        here = min(passed, key=lambda entry: len(entry.mountpoint))
        # Who begins at the root does not see what is mounted on that.
        on = [entry for entry in table if entry.parent == here.id and entry.mountpoint != "/"]
    return here if here is not None and here.mountpoint == mountpoint else None


def covered(mountpoint: str) -> str:
    """The sentence for a mount that is at `mountpoint`, and not seen there."""
    return f"something else is mounted on top of {mountpoint}, or of a directory above it; unmount that first"


def canonical(path: str | os.PathLike[str]) -> str:
    """`path` as mountinfo spells it. Does not touch the file system mounted there, which may be dead or hung."""
    # Not abspath: behind a link, ".." leads out of where that leads to.
    whole = Path(path).absolute()
    place = os.path.join(os.path.realpath(whole.parent), whole.name)
    return place if whole.name != ".." and top_at(place) else os.path.realpath(whole)


def device_at(mountpoint: str) -> str:
    """The device of the clipfs mount at `mountpoint`; MountError if there is none."""
    entry = top_at(mountpoint)
    if entry is None or not entry.ours:
        hidden = any(each.ours for each in entries() if each.mountpoint == mountpoint)
        why = f" that can be seen: {covered(mountpoint)}" if hidden else ""
        raise MountError(f"there is no clipfs mount on {mountpoint}{why}")
    return entry.device


def detach_dead(mountpoint: str, device: str) -> bool:
    """Detach the clipfs mount of `device` at `mountpoint`, whose processes have ended. True if it is gone, also before;
    False if something else covers it.

    Device numbers come back, so one more thing is asked of FUSE: a file system without a process says ENOTCONN. (To
    statfs; its cached attributes it still shows.) EROFS does not know. Device "" means that only the place is known.
    """
    ours = [
        entry
        for entry in entries()
        if entry.mountpoint == mountpoint
        and (entry.fstype == FSTYPE if device == "" else entry.fstype in (FSTYPE, "erofs") and entry.device == device)
    ]
    if not ours:
        return True
    top = top_at(mountpoint)
    if top is None or top not in ours:
        return False
    if top.fstype != FSTYPE or _without_process(mountpoint):
        unmount(mountpoint, lazily=True)
    return True


def _without_process(mountpoint: str) -> bool:
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def unmount(mountpoint: str, *, lazily: bool = False) -> None:
    """Unmount what is on top at `mountpoint`; `lazily`, also when it is in use. MountError says why not."""
    if os.geteuid() != 0:
        _fusermount(mountpoint, lazily)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazily else 0)
    if libc.umount2(os.fsencode(mountpoint), flags) != 0:
        code = ctypes.get_errno()
        if code == errno.EBUSY:
            raise MountError(f"{mountpoint} is in use; `fuser -vm {mountpoint}` tells by whom")
        raise MountError(f"cannot unmount {mountpoint}: {os.strerror(code)}")


def _fusermount(mountpoint: str, lazily: bool) -> None:
    """The way of those who may not call umount2: fusermount3 is setuid and unmounts what its caller has mounted."""
    command = ["fusermount3", "-u", *(["-z"] if lazily else []), "--", mountpoint]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",  # it names the mountpoint
            timeout=_FUSERMOUNT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MountError(f"cannot unmount {mountpoint}: {error}") from error
    if done.returncode:
        why = done.stderr.strip().removeprefix("fusermount3: ") or f"fusermount3 ended with {done.returncode}"
        raise MountError(f"cannot unmount {mountpoint}: {why}")


def _path(field: bytes) -> str:
    r"""A field of mountinfo, where space, tab, newline and backslash are written as \ooo."""
    return os.fsdecode(_OCTAL.sub(lambda match: bytes((int(match[1], 8),)), field))
