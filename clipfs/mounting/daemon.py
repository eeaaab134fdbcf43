"""A mount served in the background: started, and waited for until the root directory answers.

The serving process is a grandchild in a session of its own, so that it is nobody's zombie and no terminal's child. It
tells its starter three things over a pipe, a line each: who it is, that it is ready, or why it cannot be. The starter
believes "ready" only after the mounted root has answered. This module knows processes and no FUSE.

From a process of one thread it is forked off, which is fastest. Of a process with more threads, a fork would have their
locks for ever, taken or not, and all of its memory: there it begins as a new program, ``python -m
clipfs.mounting.daemon N``, which reads what to do from standard input and tells over descriptor N.
"""

from __future__ import annotations

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
from typing import IO, NoReturn

from clipfs import errors
from clipfs import log as logs
from clipfs.errors import ClipfsError, MountError
from clipfs.mounting import kernel, mountinfo, service
from clipfs.mounting.child import known_error, program
from clipfs.mounting.options import MountOptions
from clipfs.state import MountRecord, Process, records, remove_files

log = logging.getLogger(__name__)

# Opening an index takes milliseconds, importing everything less than a second. A machine that needs longer than this
# is not slow but stuck.
_START_SECONDS = 30.0

# From SIGKILL to the end of a process; only one that is stuck in the kernel needs longer.
_DEATH_SECONDS = 5.0


def start(
    clip: Path,
    mountpoint: str,
    options: MountOptions,
    origin: int | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Process:
    """Serve `clip` on `mountpoint` from a new process; returns when the root answers, raises what it died of.

    origin: see `service.serve`. meanwhile: called when that process is on its way.
    """
    if "trio" in sys.modules and sys.modules["trio"].lowlevel.in_trio_run():
        raise errors.UsageError("mount() blocks; inside of trio call it as `await trio.to_thread.run_sync(mount, …)`")
    device = os.stat(mountpoint).st_dev
    deadline = time.monotonic() + _START_SECONDS
    reading, writing = os.pipe()
    with open(reading, "rb") as messages:
        with open(writing, "wb", buffering=0):
            if origin is not None or _alone():
                _fork(clip, mountpoint, options, writing, origin)
            else:
                _begin_anew(clip, mountpoint, options, writing)
        process = Process(**_message(messages, deadline))
        try:
            meanwhile()
            _message(messages, deadline)
            _await_root(mountpoint, device, deadline)
        except BaseException:
            _give_up(process, mountpoint)
            raise
    return process


def _alone() -> bool:
    """Has this process one thread only, those that Python does not know of counted?"""
    return len(os.listdir("/proc/self/task")) == 1


def _fork(clip: Path, mountpoint: str, options: MountOptions, writing: int, origin: int | None) -> None:
    child = os.fork()
    if child == 0:
        _serve_and_exit(clip, mountpoint, options, writing, origin)
    os.waitpid(child, 0)


def _begin_anew(clip: Path, mountpoint: str, options: MountOptions, writing: int) -> None:
    """What it is to do is told on standard input: command lines are for everybody to see."""
    command, environment = program(__name__, writing)
    task = json.dumps({"clip": str(clip), "mountpoint": mountpoint, "options": options.to_json()}).encode()
    try:
        subprocess.run(
            command,
            input=task,
            stdout=subprocess.DEVNULL,
            pass_fds=[writing],
            env=environment,
            timeout=_START_SECONDS,
            check=False,  # it has told why, or is missed
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MountError(f"cannot start {sys.executable} to serve the mount: {error}") from error


def _message(messages: IO[bytes], deadline: float) -> dict[str, int]:
    """The next line from the child. Its error, if that is what it has to say, and MountError if it says nothing."""
    line = b""
    while not line.endswith(b"\n"):
        ready = kernel.readable([messages.fileno()], deadline - time.monotonic())
        piece = os.read(messages.fileno(), 1) if ready else b""
        if not piece:
            what = "ended without a word" if ready else f"was not ready after {_START_SECONDS:.0f} s"
            raise MountError(f"the process that should serve the mount {what}; a log=FILE option shows what it did")
        line += piece
    kind, content = json.loads(line)
    if kind == "error":
        raise known_error(*content)
    fields: dict[str, int] = content
    return fields


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


def _give_up(process: Process, mountpoint: str) -> None:
    """Leave nothing of a mount that did not come up. Killing its processes also frees who waits for their answers."""
    record = next((record for record in records() if record.process == process), None)
    for one in (process, record.worker if record is not None else None):
        pidfd = one.pidfd() if one is not None else None
        if pidfd is not None:
            with open(pidfd, "rb", buffering=0):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                kernel.readable([pidfd], _DEATH_SECONDS)
    mountinfo.detach_dead(mountpoint, record.device if record is not None else "")
    remove_files(process)


def _serve_and_exit(clip: Path, mountpoint: str, options: MountOptions, writing: int, origin: int | None) -> NoReturn:
    """What the child does. It never returns into the parent's code, whatever happens."""
    code = 1
    try:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        # Above the standard descriptors, which are replaced; it is one of them if the parent had closed its own.
        code = _serve(clip, mountpoint, options, fcntl.fcntl(writing, fcntl.F_DUPFD_CLOEXEC, 3), origin)
    finally:
        os._exit(code)


def _serve(clip: Path, mountpoint: str, options: MountOptions, writing: int, origin: int | None) -> int:
    def say(kind: str, content: object) -> None:
        os.write(writing, json.dumps([kind, content]).encode() + b"\n")

    me = Process.current()
    say("process", {"pid": me.pid, "started": me.started})
    ready = False

    def on_ready(record: MountRecord) -> None:
        nonlocal ready
        say("ready", {})
        os.close(writing)
        ready = True
        log.info("serving %s on %s", record.clip, record.mountpoint)

    try:
        _let_go_of_parent(options.log, options.log_format, {writing} if origin is None else {writing, origin})
        service.serve(clip, mountpoint, options, on_ready, origin)
    except BaseException as error:
        if not isinstance(error, ClipfsError):
            log.error("the mount on %s has ended", mountpoint, exc_info=error)
        if not ready:
            say("error", _told(error))
        return 1
    log.info("unmounted %s", mountpoint)
    return 0


def _told(error: BaseException) -> tuple[str, str]:
    if isinstance(error, ClipfsError):
        return type(error).__name__, str(error)
    if isinstance(error, OSError):
        return "MountError", str(error)
    return "MountError", f"a bug in clipfs, please report it: {type(error).__name__}: {error}"


def _let_go_of_parent(logfile: Path | None, form: str, keep: set[int]) -> None:
    """Give up what a fork hands down: directory, signal handlers, ways of logging, and every descriptor."""
    os.chdir("/")
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    logging.getLogger().handlers[:] = [logging.NullHandler()]
    null = os.open(os.devnull, os.O_RDWR)
    try:
        out = null if logfile is None else os.open(logfile, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise MountError(f"cannot write to log {logfile}: {error.strerror}") from None
    # Overwritten and not closed: objects of the parent still own these numbers, and one that is collected late would
    # close whatever had got its number since.
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor in (1, 2):
            os.dup2(out, descriptor)
        elif descriptor not in {null, out, *keep} and os.path.exists(f"/proc/self/fd/{descriptor}"):
            os.dup2(null, descriptor)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  for as long as the process lives
    logs.to_stream(sys.stderr, logging.INFO, form=form)


def main() -> NoReturn:
    """As a new program."""
    task = json.load(sys.stdin)
    options = MountOptions.of_json(task["options"])
    _serve_and_exit(Path(task["clip"]), task["mountpoint"], options, int(sys.argv[1]), None)


if __name__ == "__main__":
    main()
