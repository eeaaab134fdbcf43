"""Makes a mount that is seen: of a connection and a worker who answers, the view that the options ask for.

The FUSE view is the connection's own file system. In the kernel view that has one file, the data space, and the
kernel's EROFS mounts the index with that file as its data device; what users see is EROFS. Either is put together out
of sight and attached to its place last, so that an attempt that fails has never been there.

Whatever waits for a worker's answer waits in a thread, for a worker may die over it; closing the connection frees that.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from clipfs.errors import MountError, reason
from clipfs.mounting import connection, kernel, mountinfo
from clipfs.mounting.child import Child
from clipfs.mounting.connection import Connection
from clipfs.mounting.options import MountOptions, view

log = logging.getLogger(__name__)

# KiB that the kernel reads ahead in the data file, and the most that it asks for in one request.
_READ_AHEAD = 128


class UnsuitableError(Exception):
    """This machine, or this user, cannot have that view; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to mount where. name: for the table of mounts. index: a checked copy of the index, as a path."""

    name: str
    mountpoint: str
    index: str
    options: MountOptions


@dataclass(frozen=True, slots=True)
class Made:
    """A mount that is attached. device is its "major:minor"."""

    connection: Connection
    child: Child
    view: str
    device: str


def make(plan: Plan, begin: Callable[[Connection, str], Child], seconds: float) -> Made:
    """The best view that the options allow and that works here. `begin` starts a worker for a connection and a view.

    MountError, or what a worker has died of, if there is none. Nothing is left of an attempt that fails.
    """
    deadline = time.monotonic() + seconds
    wanted = plan.options.view
    if wanted == "auto" and (preferred := os.environ.get("CLIPFS_VIEW")):
        wanted = view(preferred, "CLIPFS_VIEW")
    if wanted != "fuse":
        try:
            return _kernel(plan, begin, deadline)
        except UnsuitableError as error:
            if wanted == "kernel":
                raise MountError(f"the kernel view is not possible on {plan.mountpoint}: {error}") from None
            log.info("%s is mounted by FUSE alone, for the kernel view is not possible: %s", plan.mountpoint, error)
    return _fuse(plan, begin, deadline)


def _fuse(plan: Plan, begin: Callable[[Connection, str], Child], deadline: float) -> Made:
    """The FUSE view: detached until a worker answers, or for those who may not mount, by fusermount3 in its place."""
    with _undone() as undo:
        mount = None
        try:
            conn, mount = connection.detached(plan.name, plan.options)
            undo.callback(os.close, mount)
        except OSError as error:
            if os.geteuid() == 0 and error.errno not in (errno.EPERM, errno.ENOSYS):
                raise MountError(f"cannot mount on {plan.mountpoint}: {reason(error)}") from error
            conn = connection.by_fusermount(plan.name, plan.mountpoint, plan.options)
            undo.failed.callback(mountinfo.detach_dead, plan.mountpoint, "")
        undo.failed.callback(conn.close)
        child = begin(conn, "fuse")
        undo.failed.callback(child.destroy)
        _introduce(conn, child, deadline)

        def attach() -> str:
            if mount is not None:
                kernel.attach(mount, plan.mountpoint)
                device = _device(mount)
            else:
                device = _device_at(plan.mountpoint)
            kernel.set_read_ahead_of(device, _READ_AHEAD)
            return device

        device = _guarded(attach, child, deadline)
    return Made(conn, child, "fuse", device)


def _kernel(plan: Plan, begin: Callable[[Connection, str], Child], deadline: float) -> Made:
    """The kernel view. UnsuitableError before a worker is needed, where that can be known."""
    if os.geteuid() != 0:
        raise UnsuitableError("only root may mount EROFS")
    if plan.options.allow_other is False:
        raise UnsuitableError("EROFS cannot be for one user alone, as allow_other=False demands")
    with _undone() as undo:
        try:
            kernel.known("erofs")
            # For nobody's eyes: what users may do is EROFS's affair.
            conn, mount = connection.detached(plan.name, MountOptions(allow_other=False, noexec=True))
        except OSError as error:
            raise UnsuitableError(reason(error)) from None
        undo.callback(os.close, mount)
        undo.failed.callback(conn.close)
        child = begin(conn, "kernel")
        undo.failed.callback(child.destroy)
        _introduce(conn, child, deadline)

        def attach() -> str:
            data = os.open("data", os.O_RDONLY | os.O_CLOEXEC, dir_fd=mount)
            try:
                if not kernel.set_read_ahead(data, _READ_AHEAD):
                    log.info("cannot tell the kernel how far to read ahead in %s", plan.mountpoint)
                with _erofs(plan, data) as erofs:
                    kernel.attach(erofs, plan.mountpoint)
                    return _device(erofs)
            finally:
                os.close(data)

        device = _guarded(attach, child, deadline)
    return Made(conn, child, "kernel", device)


@contextmanager
def _erofs(plan: Plan, data: int) -> Iterator[int]:
    """A detached mount of the index: of the two files themselves (Linux ≥ 6.12), or of loop devices over them."""
    attributes = connection.attributes(plan.options)
    with ExitStack() as stack:
        try:
            mount = _erofs_of(plan.index, f"/proc/self/fd/{data}", attributes)
        except OSError as direct:
            try:
                with open(plan.index, "rb", buffering=0) as index:
                    source = stack.enter_context(kernel.loop_device(index.fileno()))
                device = stack.enter_context(kernel.loop_device(data))
                mount = _erofs_of(source, device, attributes)
            except OSError as error:
                raise UnsuitableError(
                    f"EROFS of files: {direct.strerror}; EROFS of loop devices: {error.strerror}"
                ) from None
            log.info(
                "%s is EROFS of loop devices, for of files it is not possible: %s", plan.mountpoint, direct.strerror
            )
        try:
            yield mount
        finally:
            os.close(mount)


def _erofs_of(source: str, device: str, attributes: int) -> int:
    return kernel.detached("erofs", {"source": source, "device": device, "ro": None}, attributes)


def _device(mount: int) -> str:
    """Of the mount itself: somebody else may have put another one on top of it already."""
    device = os.fstat(mount).st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def _device_at(mountpoint: str) -> str:
    entry = mountinfo.top_at(mountpoint)
    if entry is None:
        raise MountError(f"mounted on {mountpoint}, but it was unmounted at once")
    return entry.device


def _introduce(conn: Connection, child: Child, deadline: float) -> None:
    """Let a worker that has everything ready take over the connection."""
    child.await_word("waiting", deadline)
    child.channel.say("begin", init=conn.introduction(deadline).hex())
    child.await_word("ready", deadline)


def _guarded(action: Callable[[], str], child: Child, deadline: float) -> str:
    """Do it in a thread, while the worker lives and there is time. MountError if either ends first."""
    outcome: list[str | BaseException] = []
    done = os.eventfd(0, os.EFD_CLOEXEC)

    def act() -> None:
        try:
            outcome.append(action())
        except BaseException as error:  # noqa: BLE001  raised below
            outcome.append(error)
        os.eventfd_write(done, 1)

    threading.Thread(target=act, daemon=True).start()
    ready = kernel.readable([done, child.pidfd], deadline - time.monotonic())
    if done not in ready:
        what = "has died over it" if ready else "does not answer"
        raise MountError(f"cannot mount: the process that should serve the mount {what}")
    os.close(done)
    [result] = outcome
    if isinstance(result, OSError):
        raise MountError(f"cannot mount: {result.strerror}") from result
    if isinstance(result, BaseException):
        raise result
    return result


class _Undone(ExitStack):
    """What is undone at the end; `failed`, what only if it is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.failed = ExitStack()


@contextmanager
def _undone() -> Iterator[_Undone]:
    with _Undone() as undo:
        try:
            yield undo
        except BaseException:
            undo.failed.close()
            raise
