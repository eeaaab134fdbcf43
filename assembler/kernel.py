"""The mount calls of the kernel that Python has no names for, and the mount table.

Knows overlayfs' options and nothing about containers. Two ways lead to a mounted overlay: a file system context
(``fsopen``, with one ``lowerdir+`` a layer, Linux ≥ 6.5) takes any path as it is; ``mount(2)`` takes one line of
options with escapes, at most a page of it. The first is tried first, the second speaks for older kernels.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import clipfs

_LIBC = ctypes.CDLL(None, use_errno=True)

# System calls younger than 424 have the same number on every architecture.
_SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 429, 430, 431, 432
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6
_MOUNT_ATTR_NODEV = 4
_MOVE_MOUNT_F_EMPTY_PATH = 4
_AT_FDCWD = -100
_MS_NODEV = 4
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37

_ADOPTING = threading.Lock()

# fsconfig(2) takes strings of up to 255 bytes; a longer path is named by its descriptor.
_MAX_VALUE = 255

# The lower may be an image that nobody trusts. It shall not point elsewhere in itself (redirects; "off" would follow
# them on kernels built so), nor pass one file's attributes off as another's (metacopy). The rest we have no use for.
_OPTIONS = (("redirect_dir", "nofollow"), ("metacopy", "off"), ("index", "off"), ("xino", "off"))

_OCTAL = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo."""

    mountpoint: str
    fstype: str
    device: str


def mount_overlay(target: Path, lowers: Sequence[Path], upper: Path | None = None, work: Path | None = None) -> None:
    """Mount an overlay on `target`; `lowers` from top to bottom, read-only without an upper. OSError says why not.

    Device files in it open nothing: an image has no business bringing its own.
    """
    try:
        _mount_by_context(target, lowers, upper, work)
    except OSError as first:
        if first.errno not in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
            raise
        try:
            _mount_by_options(target, lowers, upper, work)
        except OSError as second:
            # When both say the same, the context says it in words.
            raise (first if second.errno == first.errno else second) from second


def unmount(path: Path | str) -> bool:
    """Unmount what is on top at `path`. False if it was in use: then it is detached, and ends with its users."""
    place = os.fsencode(path)
    if _LIBC.umount2(place, _UMOUNT_NOFOLLOW) == 0:
        return True
    if ctypes.get_errno() == errno.EBUSY and _LIBC.umount2(place, _UMOUNT_NOFOLLOW | _MNT_DETACH) == 0:
        return False
    raise clipfs.MountError(f"cannot unmount {path}: {os.strerror(ctypes.get_errno())}")


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Orphans below this process become its children meanwhile: so it can wait for what a program left running.

    It is an attribute of the whole process, so one thread does this at a time, and it is as before afterwards: nobody
    else expects to have to wait for strangers.
    """
    with _ADOPTING:
        before = ctypes.c_int()
        _call("prctl", _PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
        _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            yield
        finally:
            _call("prctl", _PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def kill_tree(pid: int) -> None:
    """SIGKILL to a child of this process and to all that descend from it; who becomes ours by that is waited for."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # Bytes: it has the process's name, which may be any.
            parent = int(path.read_bytes().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    below = [pid]
    for each in below:
        below += children.get(each, [])
    for each in below:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    # Parents first: only then are their children ours. The first one's end is for who has started it.
    for each in below:
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, each, os.WEXITED | (os.WNOWAIT if each == pid else 0))


def mounts_below(path: Path) -> list[str]:
    """Mountpoints at or below `path`, in the order in which they can be unmounted."""
    prefix = f"{path}/"
    here = [each.mountpoint for each in mounts() if each.mountpoint == str(path) or each.mountpoint.startswith(prefix)]
    # The table grows at its end: what was mounted later stands later, and may lie on top.
    return here[::-1]


def mounts() -> list[Mount]:
    """This process's mount namespace. Touches no file system but /proc."""
    table = []
    # Of what ends a line elsewhere, such as CR, any may be in a name.
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            before, _, after = line.partition(b" - ")
            fields = before.split(b" ")
            place = _OCTAL.sub(lambda match: bytes((int(match[1], 8),)), fields[4])
            table.append(Mount(os.fsdecode(place), after.split(b" ")[0].decode(), fields[2].decode()))
    return table


def _mount_by_context(target: Path, lowers: Sequence[Path], upper: Path | None, work: Path | None) -> None:
    context = _syscall(_SYS_FSOPEN, b"overlay", _FSOPEN_CLOEXEC)
    held: list[int] = []
    try:
        settings = [("source", "overlay"), *_OPTIONS]
        settings += [("lowerdir+", _value(lower, held)) for lower in lowers]
        if upper and work:
            settings += [("upperdir", _value(upper, held)), ("workdir", _value(work, held))]
        for key, value in settings:
            _syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mounted = _syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, _MOUNT_ATTR_NODEV)
        held.append(mounted)
        _syscall(_SYS_MOVE_MOUNT, mounted, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
    except OSError as error:
        raise OSError(error.errno, _words(context) or error.strerror) from error
    finally:
        for fd in [context, *held]:
            os.close(fd)


def _mount_by_options(target: Path, lowers: Sequence[Path], upper: Path | None, work: Path | None) -> None:
    fields = [("lowerdir", ":".join(_escaped(lower) for lower in lowers)), *_OPTIONS]
    if upper and work:
        fields += [("upperdir", _escaped(upper)), ("workdir", _escaped(work))]
    line = os.fsencode(",".join(f"{key}={value}" for key, value in fields))
    _call("mount", b"overlay", os.fsencode(target), b"overlay", ctypes.c_ulong(_MS_NODEV), line)


def _value(path: Path, held: list[int]) -> str:
    r"""`path`, or another name for it if it is too long or has a ``\``, which some kernels take for an escape."""
    if len(os.fsencode(path)) <= _MAX_VALUE and "\\" not in str(path):
        return str(path)
    held.append(os.open(path, os.O_PATH | os.O_DIRECTORY))
    return f"/proc/self/fd/{held[-1]}"


def _escaped(path: Path) -> str:
    return re.sub(r"([\\,:])", r"\\\1", str(path))


def _words(context: int) -> str:
    """What the kernel has to say about a context, in one line."""
    said = []
    try:
        while message := os.read(context, 4096):
            # "e overlay: …", where the letter is the level.
            said.append(message.decode(errors="replace").strip().partition(" ")[2])
    except OSError:
        pass
    return "; ".join(said)


def _syscall(number: int, *arguments: bytes | int | None) -> int:
    # Variadic: what is no pointer must be as wide as one.
    wide = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return _call("syscall", ctypes.c_long(number), *wide)


def _call(name: str, *arguments: object) -> int:
    result: int = getattr(_LIBC, name)(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
