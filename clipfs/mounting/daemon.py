"""A mount served in the background: started, and waited for until the root directory answers.

The serving process is a grandchild in a session of its own, so that it is nobody's zombie and no terminal's child. It
is told what to do over one pipe, and tells its starter three things over another, a line each: who it is, that it is
ready, or why it cannot be. The starter believes "ready" only after the mounted root has answered. This module knows
processes and no FUSE.

The process can be started before it is known what to mount: it and its worker then load what they need meanwhile.

From a process of one thread it is forked off, which is fastest. Of a process with more threads, a fork would have their
locks for ever, taken or not, and all of its memory: there it begins as a new program, ``python -m
clipfs.mounting.daemon ORDERS ANSWERS``, which inherits these two descriptors.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from clipfs import blocking, errors
from clipfs import log as logs
from clipfs.errors import ClipfsError, MountError
from clipfs.mounting import kernel, mountinfo
from clipfs.mounting.child import Child, known_error
from clipfs.mounting.options import MountOptions
from clipfs.program import absolute_paths, program
from clipfs.state import MountRecord, Process, records, remove_files

log = logging.getLogger(__name__)

# Opening an index takes milliseconds, importing everything less than a second. A machine that needs longer than this
# is not slow but stuck.
_START_SECONDS = 30.0

# From SIGTERM to the end of a process that serves a mount; its worker has 8 s.
_END_SECONDS = 10.0

# From SIGKILL to the end of a process; only one that is stuck in the kernel needs longer.
_DEATH_SECONDS = 5.0


class Standby:
    """A process that is going to serve a mount. It ends if it is not told what to serve before `close`.

    origin: see `service.serve`.
    """

    def __init__(self, origin: int | None = None) -> None:
        ordered, orders = os.pipe()
        answers, answered = os.pipe()
        self._orders = open(orders, "wb", buffering=0)  # noqa: SIM115  see close
        self.answers = open(answers, "rb", buffering=0)  # noqa: SIM115
        #: Who it is, when it has told that.
        self.process: Process | None = None
        self._heard = b""
        try:
            if origin is not None or _alone():
                _fork(ordered, answered, origin)
            else:
                _begin_anew(ordered, answered)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(ordered)
            os.close(answered)

    def order(self, clip: Path, mountpoint: str, options: MountOptions) -> None:
        """Have it serve this. Whoever is not there any more to hear it will be missed."""
        task = {"clip": str(clip), "mountpoint": mountpoint, "options": options.to_json()}
        with contextlib.suppress(BrokenPipeError):
            self._orders.write(json.dumps(task).encode() + b"\n")

    def hear(self, deadline: float) -> dict[str, int]:
        """The next thing that it tells. Its error, if that is what it has to say, and MountError if it says nothing."""
        while b"\n" not in self._heard:
            ready = kernel.readable([self.answers.fileno()], deadline - time.monotonic())
            piece = self.answers.read(1 << 12) if ready else b""
            if not piece:
                what = "ended without a word" if ready else f"was not ready after {_START_SECONDS:.0f} s"
                raise MountError(f"the process that should serve the mount {what}; a log=FILE option shows what it did")
            self._heard += piece
        line, _, self._heard = self._heard.partition(b"\n")
        kind, content = json.loads(line)
        if kind == "error":
            raise known_error(*content)
        fields: dict[str, int] = content
        return fields

    def give_up(self, mountpoint: str) -> None:
        """Leave nothing of a mount that did not come up, or that nobody wants any more."""
        if self.process is None:
            # If it was told what to serve, it is about to; if not, it ends now.
            self._orders.close()
            with contextlib.suppress(ClipfsError):
                self.process = Process(**self.hear(time.monotonic() + _END_SECONDS))
        if self.process is not None:
            _undo(self.process, mountpoint)

    def close(self) -> None:
        """Let go of it; one that has nothing to do has ended then."""
        if self.answers.closed:
            return
        self._orders.close()
        with self.answers:
            while kernel.readable([self.answers.fileno()], _DEATH_SECONDS) and self.answers.read(1 << 12):
                pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start(
    clip: Path,
    mountpoint: str,
    options: MountOptions,
    standby: Standby | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Process:
    """Serve `clip` on `mountpoint` from a new process; returns when the root answers, raises what it died of.

    standby: that process, if it has been started already. meanwhile: called when it has been told.
    """
    blocking.check("mount()", "mount, …")
    device = os.stat(mountpoint).st_dev
    deadline = time.monotonic() + _START_SECONDS
    with standby or Standby() as server:
        try:
            server.order(clip, mountpoint, options)
            server.process = process = Process(**server.hear(deadline))
            meanwhile()
            server.hear(deadline)
            _await_root(mountpoint, device, deadline)
        except BaseException:
            server.give_up(mountpoint)
            raise
    return process


def _alone() -> bool:
    """Has this process one thread only, those that Python does not know of counted?"""
    return len(os.listdir("/proc/self/task")) == 1


def _fork(orders: int, answers: int, origin: int | None) -> None:
    child = os.fork()
    if child == 0:
        _serve_and_exit(orders, answers, origin)
    with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored, the kernel has done it
        os.waitpid(child, 0)


def _begin_anew(orders: int, answers: int) -> None:
    command, environment = program(__name__, orders, answers)
    try:
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[orders, answers],
            env=environment,
            timeout=_START_SECONDS,
            check=False,  # it has told why, or is missed
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MountError(f"cannot start {sys.executable} to serve the mount: {error}") from error


def _await_root(mountpoint: str, device: int, deadline: float) -> None:
    """Wait until the mountpoint shows another file system. A thread looks: if the mount hangs, nothing else does."""
    answer: list[int | OSError] = []

    def look() -> None:
        try:
            answer.append(os.stat(mountpoint).st_dev)
        except OSError as error:
            answer.append(error)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(max(0, deadline - time.monotonic()))
    if not answer:
        raise MountError(f"mounted on {mountpoint}, but its root directory does not answer")
    if isinstance(answer[0], OSError):
        raise MountError(f"mounted on {mountpoint}, but its root directory says: {answer[0].strerror}")
    if answer[0] == device:
        raise MountError(f"mounted on {mountpoint}, but it was unmounted at once")


def _undo(process: Process, mountpoint: str) -> None:
    """End a mount, in whatever state. Killing its processes also frees who waits for their answers."""
    # It knows best what it has done so far, and undoes it if it can.
    _end(process, signal.SIGTERM, _END_SECONDS)
    record = next((record for record in records() if record.process == process), None)
    for one in (process, record.worker if record is not None else None):
        if one is not None:
            _end(one, signal.SIGKILL, _DEATH_SECONDS)
    mountinfo.detach_dead(mountpoint, record.device if record is not None else "")
    remove_files(process)


def _end(process: Process, number: signal.Signals, seconds: float) -> None:
    """Send a signal, and wait so long for the end."""
    pidfd = process.pidfd()
    if pidfd is not None:
        with open(pidfd, "rb", buffering=0):
            signal.pidfd_send_signal(pidfd, number)
            kernel.readable([pidfd], seconds)


def _serve_and_exit(orders: int, answers: int, origin: int | None) -> NoReturn:
    """What the child does. It never returns into the parent's code, whatever happens."""
    code = 1
    try:
        if os.fork() != 0:
            os._exit(0)
        # Above the standard descriptors, which are replaced; they are some of them if the parent had closed its own.
        orders, answers = (fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3) for descriptor in (orders, answers))
        code = _serve(orders, answers, origin)
    finally:
        os._exit(code)


def _serve(orders: int, answers: int, origin: int | None) -> int:
    def say(kind: str, content: object) -> None:
        os.write(answers, json.dumps([kind, content]).encode() + b"\n")

    task: dict[str, Any] = {}
    ready = False

    def on_ready(record: MountRecord) -> None:
        nonlocal ready
        log.info("serving %s on %s", record.clip, record.mountpoint)
        # Not before: where systemd mounts when somebody looks (automount), the kernel lets none but its process group
        # through to what is being mounted.
        os.setsid()
        say("ready", {})
        os.close(answers)
        ready = True

    try:
        _let_go_of_parent({orders, answers} if origin is None else {orders, answers, origin})
        worker = Child(origin)
        # Late, so that the worker loads what it needs at the same time.
        from clipfs.mounting import service

        with open(orders, "rb") as told:
            line = told.readline()
        if not line:
            worker.destroy()
            return 0
        me = Process.current()
        say("process", {"pid": me.pid, "started": me.started})
        task = json.loads(line)
        options = MountOptions.of_json(task["options"])
        log_to(options.log, options.log_format)
        service.serve(Path(task["clip"]), task["mountpoint"], options, on_ready, worker, origin)
    except BaseException as error:
        if not isinstance(error, ClipfsError):
            log.error("the mount on %s has ended", task.get("mountpoint"), exc_info=error)
        if not ready:
            say("error", (type(error).__name__, errors.sentence(error)))
        return 1
    log.info("unmounted %s", task["mountpoint"])
    return 0


def _let_go_of_parent(keep: set[int]) -> None:
    """Give up what a fork hands down: directory, signal handlers, ways of logging, and every descriptor."""
    os.environ.update(absolute_paths())
    os.chdir("/")
    signal.set_wakeup_fd(-1)
    # How a worker has ended must be known, and who does not listen any more is nobody's death.
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)) or number == signal.SIGCHLD:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    logging.getLogger().handlers[:] = [logging.NullHandler()]
    null = os.open(os.devnull, os.O_RDWR)
    # Overwritten and not closed: objects of the parent still own these numbers, and one that is collected late would
    # close whatever had got its number since.
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in {null, *keep} and os.path.exists(f"/proc/self/fd/{descriptor}"):
            os.dup2(null, descriptor)
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115  it stays, and takes any name


def log_to(file: Path | None, form: str) -> None:
    """Have what is written from now on, here and by workers, in that file, or nowhere."""
    if file is not None:
        try:
            out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MountError(f"cannot write to log {file}: {error.strerror}") from None
        for number in (1, 2):
            os.dup2(out, number)
        os.close(out)
    logs.to_stream(sys.stderr, logging.INFO, form=form)


def main() -> NoReturn:
    """As a new program."""
    _serve_and_exit(int(sys.argv[1]), int(sys.argv[2]), None)


if __name__ == "__main__":
    main()
