"""A connection to the kernel's FUSE: opened, mounted, handed from one process to the next, and refused in the end.

The descriptor of ``/dev/fuse`` is the file system. Whoever holds it may read requests from it and answer them, one
process today and another tomorrow, and as long as somebody holds it, whoever waits for an answer goes on waiting. So
the process that holds it (`supervisor`) is not the one that answers (`worker`).

libfuse wants to begin with the kernel's FUSE_INIT. The kernel sends that once; here it is read and kept, and each
worker is shown it through a socket, which its answer comes back through (see linux/fuse.h for the messages).
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
import subprocess
import time

from clipfs.errors import MountError
from clipfs.mounting import kernel
from clipfs.mounting.options import MountOptions

# struct fuse_in_header, struct fuse_out_header; opcodes without an answer; the notification that has requests that
# nobody has answered yet given out anew (Linux ≥ 6.9).
_IN, _OUT = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
_INIT, _NO_ANSWER = 26, frozenset((2, 36, 42))  # FORGET, INTERRUPT, BATCH_FORGET
_RESEND = _OUT.pack(_OUT.size, 7, 0)

# struct fuse_init_in and fuse_init_out both begin so; a flag that pyfuse3 knows no name for.
_INIT_HEAD = struct.Struct("<IIII")
_CACHE_SYMLINKS = 1 << 23
# What struct fuse_init_in goes on with if the flags say so: the flags from bit 32 on.
_INIT_MORE, _MORE_FLAGS, _HAS_RESEND = struct.Struct("<IIIII"), 1 << 30, 1 << 39 - 32

# The kernel refuses smaller buffers than it may have requests (1 MiB and a page; ours are never that large).
_LARGEST = (1 << 20) + 4096

# fusermount3 makes a few system calls.
_FUSERMOUNT_SECONDS = 20

SUBTYPE = "clipfs"


def is_alive(descriptor: int) -> bool:
    """Has this ``/dev/fuse`` still a file system? Not after it was unmounted and let go of by its last user."""
    poller = select.poll()
    poller.register(descriptor, 0)
    return not any(events & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, events in poller.poll(0))


class Connection:
    """An open ``/dev/fuse`` whose file system is mounted. Closing the last descriptor of it ends the file system."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._init = b""

    def fileno(self) -> int:
        return self.descriptor

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    @property
    def alive(self) -> bool:
        """See `is_alive`."""
        return is_alive(self.descriptor)

    def introduction(self, deadline: float) -> bytes:
        """The kernel's FUSE_INIT, as every worker is to see it. It is there as soon as the mount is."""
        if not self._init:
            ready = kernel.readable([self.descriptor], deadline - time.monotonic())
            message = os.read(self.descriptor, _LARGEST) if ready else b""
            if len(message) < _IN.size or _IN.unpack_from(message)[1] != _INIT:
                raise MountError("the kernel has not introduced itself to the file system (FUSE_INIT)")
            self._init = message
        return self._init

    @property
    def can_repeat(self) -> bool:
        """Does the kernel say that it knows how to `resend`? Known as soon as it has introduced itself."""
        if len(self._init) < _IN.size + _INIT_MORE.size:
            return False
        *_, flags, more = _INIT_MORE.unpack_from(self._init, _IN.size)
        return bool(flags & _MORE_FLAGS and more & _HAS_RESEND)

    def resend(self) -> bool:
        """Have the kernel give out again what was asked and never answered. False if it is too old to know how."""
        try:
            os.write(self.descriptor, _RESEND)
        except OSError:
            return False
        return True

    def refuse(self) -> bool:
        """Answer one request with EIO, which must be waiting. False if the file system has ended."""
        try:
            message = os.read(self.descriptor, _LARGEST)
        except OSError as error:
            # ENOENT: whoever asked was killed before we looked.
            return error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT)
        _, opcode, unique, *_ = _IN.unpack_from(message)
        if opcode not in _NO_ANSWER:
            with contextlib.suppress(OSError):
                os.write(self.descriptor, _OUT.pack(_OUT.size, -errno.EIO, unique))
        return True


def amended(answer: bytes, introduction: bytes) -> bytes:
    """libfuse's answer to a FUSE_INIT, with a flag that it is not asked to set: the kernel may cache symbolic links.

    As it was, if it says no, or if the kernel has not offered that.
    """
    if len(answer) < _OUT.size + _INIT_HEAD.size or _OUT.unpack_from(answer)[1] != 0:
        return answer
    *head, flags = _INIT_HEAD.unpack_from(answer, _OUT.size)
    *_, offered = _INIT_HEAD.unpack_from(introduction, _IN.size)
    changed = _INIT_HEAD.pack(*head, flags | (offered & _CACHE_SYMLINKS))
    return answer[: _OUT.size] + changed + answer[_OUT.size + _INIT_HEAD.size :]


def detached(name: str, options: MountOptions) -> tuple[Connection, int]:
    """A connection and its mount, which is attached nowhere yet. OSError says why not; root may."""
    descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    settings: dict[str, str | None] = {
        # The kernel takes no more than 255 bytes.
        "source": os.fsdecode(os.fsencode(name)[:255]),
        "subtype": SUBTYPE,
        "fd": str(descriptor),
        "rootmode": "40000",
        "user_id": str(os.geteuid()),
        "group_id": str(os.getegid()),
        "default_permissions": None,
        "ro": None,
    }
    if options.allow_other or (options.allow_other is None and os.geteuid() == 0):
        settings["allow_other"] = None
    try:
        return Connection(descriptor), kernel.detached("fuse", settings, attributes(options))
    except BaseException:
        os.close(descriptor)
        raise


def attributes(options: MountOptions) -> int:
    """What a mount allows, as flags of `kernel`."""
    return (
        kernel.RDONLY
        | (0 if options.suid else kernel.NOSUID)
        | (0 if options.dev else kernel.NODEV)
        | (kernel.NOEXEC if options.noexec else 0)
    )


def by_fusermount(name: str, mountpoint: str, options: MountOptions) -> Connection:
    """A connection whose file system is mounted on `mountpoint`, for those who may not mount: fusermount3 is setuid.

    It sends the descriptor through a socket that it inherits.
    """
    chosen = ["ro", "default_permissions", f"subtype={SUBTYPE}", "suid" if options.suid else "nosuid"]
    chosen.append("dev" if options.dev else "nodev")
    chosen += ["noexec"] if options.noexec else []
    chosen += ["allow_other"] if options.allow_other else []
    # Commas and backslashes mean something in a list of options.
    chosen.append("fsname=" + name.replace("\\", "\\\\").replace(",", "\\,"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            done = subprocess.run(
                ["fusermount3", "-o", ",".join(chosen), "--", mountpoint],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_FUSERMOUNT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MountError(f"cannot mount on {mountpoint}: fusermount3: {error}") from error
        if done.returncode:
            words = " ".join(done.stderr.decode(errors="replace").split()).removeprefix("fusermount3: ")
            raise MountError(f"cannot mount on {mountpoint}: {words or f'fusermount3 ended with {done.returncode}'}")
        ours.settimeout(_FUSERMOUNT_SECONDS)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            [descriptor] = array.array("i", content)
            os.set_inheritable(descriptor, False)
            return Connection(descriptor)
    raise MountError(f"cannot mount on {mountpoint}: fusermount3 has handed out no connection")
