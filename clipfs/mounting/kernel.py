"""The mount calls of the kernel that Python has no names for: file system contexts, loop devices, namespaces.

Nothing here knows what is mounted. A mount is made *detached* (``fsopen``, ``fsconfig``, ``fsmount``, Linux ≥ 5.2) and
is attached to a place later, or never: a file system lives as long as somebody has a file of it open. OSError says
why something cannot be done, in the kernel's own words where it has any.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import math
import os
import select
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)

# System calls younger than 424 have the same number on every architecture.
_SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 429, 430, 431, 432
_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CMD_CREATE = 0, 1, 6
_FROM_EMPTY_PATH = 4
_AT_FDCWD = -100
_CLONE_NEWNS = 0x20000

_DUMPABLE = 4  # linux/prctl.h

# Attributes of a mount (linux/mount.h).
RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8

# linux/loop.h: struct loop_config is a descriptor, a block size, a loop_info64 and a reserve.
_LOOP_GET_FREE, _LOOP_CONFIGURE = 0x4C82, 0x4C0A
_LOOP_CONFIG = struct.Struct("<II40xIIII64s64s32s16x64x")
_LOOP_READ_ONLY, _LOOP_AUTOCLEAR = 1, 4
# Somebody else may take the device that was free, again and again.
_LOOP_TRIES = 32

_MESSAGE = 4096


def detached(fstype: str, options: Mapping[str, str | None], attributes: int) -> int:
    """A mount of a new file system, not attached to any place yet; the caller closes the descriptor.

    An option without a value is a flag.
    """
    context = _call(_SYS_FSOPEN, fstype.encode(), _CLOEXEC)
    try:
        for name, value in options.items():
            kind = _SET_FLAG if value is None else _SET_STRING
            text = None if value is None else os.fsencode(value)
            _explained(context, _SYS_FSCONFIG, context, kind, name.encode(), text, 0)
        _explained(context, _SYS_FSCONFIG, context, _CMD_CREATE, None, None, 0)
        return _explained(context, _SYS_FSMOUNT, context, _CLOEXEC, attributes)
    finally:
        os.close(context)


def known(fstype: str) -> None:
    """OSError if this kernel has no such file system, also not as a module, or its name must not be used."""
    os.close(_call(_SYS_FSOPEN, fstype.encode(), _CLOEXEC))


def attach(mount: int, place: str) -> None:
    """Attach a detached mount to a directory, of this process's mount namespace."""
    _call(_SYS_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(place), _FROM_EMPTY_PATH)


def enter_mount_namespace(descriptor: int) -> None:
    """Change this process's mount namespace; it must have one thread only."""
    if _LIBC.setns(descriptor, _CLONE_NEWNS) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def undumpable() -> None:
    """From here on, nothing that this process knows gets into a core dump, not even one that the kernel pipes to a
    program, which no limit binds; nor can other processes of the same user look into it."""
    _LIBC.prctl(_DUMPABLE, 0, 0, 0, 0)


@contextlib.contextmanager
def loop_device(descriptor: int) -> Iterator[str]:
    """A read-only block device with a file's contents. It goes by itself when nobody has it open any more."""
    with open("/dev/loop-control", "rb", buffering=0) as control:
        for attempt in range(_LOOP_TRIES):
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_GET_FREE)}"
            with open(path, "rb", buffering=0) as device:
                flags = _LOOP_READ_ONLY | _LOOP_AUTOCLEAR
                config = _LOOP_CONFIG.pack(descriptor, 4096, 0, 0, 0, flags, b"clipfs", b"", b"")
                try:
                    fcntl.ioctl(device, _LOOP_CONFIGURE, config)
                except OSError as error:
                    if error.errno != errno.EBUSY or attempt == _LOOP_TRIES - 1:
                        raise
                    continue
                yield path
                return


def readable(descriptors: Iterable[int], seconds: float | None) -> set[int]:
    """Those that can be read from, or will never have anything more; waits that long for the first, None for ever.

    As select(2), which cannot do descriptors above 1023.
    """
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    # Rounded up: less than a millisecond would be no wait at all.
    return {descriptor for descriptor, _ in poller.poll(None if seconds is None else math.ceil(max(0, seconds) * 1000))}


def set_read_ahead(descriptor: int, kib: int) -> bool:
    """How far the kernel reads ahead in the file system of an open file. False if it cannot be told, or may not."""
    device = os.fstat(descriptor).st_dev
    return set_read_ahead_of(f"{os.major(device)}:{os.minor(device)}", kib)


def set_read_ahead_of(device: str, kib: int) -> bool:
    """The same for a file system by its "major:minor"."""
    try:
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(kib))
    except OSError:
        return False
    return True


def _explained(context: int, *arguments: int | bytes | None) -> int:
    """A system call on a file system context, which has messages to say what was wrong."""
    try:
        return _call(*arguments)
    except OSError as error:
        words = []
        with contextlib.suppress(OSError):
            while True:
                words.append(os.read(context, _MESSAGE).decode(errors="replace")[2:].strip())
        raise OSError(error.errno, "; ".join(words) or error.strerror) from None


def _call(*arguments: int | bytes | None) -> int:
    result: int = _LIBC.syscall(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
