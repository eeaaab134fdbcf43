"""Running a command in a container, from a lower directory to an exit code. The order of things is here, and no detail.

Nothing is waited for by looking again: the overlay is seeded before it is mounted, the runtime's `create` and `start`
return when they are done, and the rest is one `poll` on the container's process, signals and its output.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Literal, TypeVar

import clipfs
from assembler import kernel
from assembler.command import command
from assembler.container import Container
from assembler.errors import RunError
from assembler.events import Events
from assembler.options import RunOptions
from assembler.overlay import ContainerOverlay
from assembler.resolving import name_files
from assembler.runtime import Runtime
from assembler.spec import hostname_of, required_directories, runtime_spec
from assembler.stdio import Stdio

_log = logging.getLogger("assembler")

Archive = Literal["v1", "v2 (OCI)"]
_T = TypeVar("_T")


def run(
    lower: Path | Sequence[Path],
    config: clipfs.ImageConfig,
    options: RunOptions,
    base: Path,
    *,
    archive: Archive = "v1",
    on_started: Callable[[int], None] = lambda _: None,
) -> int:
    """Reserve a container below `base`, run it, and clean up; see `run_in`."""
    with Events() as events, Container.create(base, options.name) as container:
        return run_in(container, events, lower, config, options, archive=archive, on_started=on_started)


def run_in(
    container: Container,
    events: Events,
    lower: Path | Sequence[Path],
    config: clipfs.ImageConfig,
    options: RunOptions,
    *,
    archive: Archive = "v1",
    on_started: Callable[[int], None] = lambda _: None,
    on_output: Callable[[], None] = lambda: None,
) -> int:
    """Run a command over `lower` (or several, topmost first) and return its exit code, 128 + n if signal n ended it.

    lower: a root file system that is not written to: archive "v2 (OCI)" if a ClipFS serves it, "v1" if it was unpacked.
    events: entered before there is anything to take down, and left afterwards. A signal that comes before the command
    runs ends it all, later ones go to the command, and those that come while things are taken down are too late.
    on_started is called with the first process's pid once it runs; on_output, in another thread, whenever something
    comes on its standard output.

    RunError with podman's exit code if it could not be started, other ClipfsErrors if the options or the image do not
    fit; in any case mounts, cgroups and processes are gone.
    """
    _log.info("detected %s archive format", archive)
    if os.geteuid() != 0:
        raise RunError("only root can run containers: it takes mounts and cgroups")
    words = command(config, options)
    runtime = Runtime(options.runtime, container)
    required = required_directories(config, options)
    overlay = ContainerOverlay(
        container.id, lower, container.base, required, upper=options.upper, on_step=lambda: _end_early(events)
    )
    try:
        with overlay:
            files = name_files(container.path, options.network, hostname_of(options, container.id))
            spec = _aside(events, lambda: runtime_spec(config, options, overlay.merged, container.id, files))
            container.write_config(spec)
            container.record(runtime.program)
            streams = Stdio(
                container.path,
                interactive=options.interactive,
                terminal=options.tty,
                on_end=events.post,
                on_output=on_output,
            )
            with streams, _created(container, runtime, streams, words[0], events) as process:
                _end_early(events)
                runtime.start()
                # Whatever fails from here on: what it has written is its user's.
                container.keep = not options.remove
                _log.info("container is now running container_id=%s", container.id)
                on_started(process.pid)
                code = process.attend(events, streams, _stop_signal(config))
    except _Interrupted as ended:
        code = ended.code
    return code


class _Interrupted(KeyboardInterrupt):
    """A signal came before the command ran, and would have ended it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _end_early(events: Events) -> None:
    for number in events.take():
        if number in _ENDING:
            raise _Interrupted(128 + number)


def _aside(events: Events, work: Callable[[], _T], stop: Callable[[], None] | None = None) -> _T:
    """What `work` returns, unless a signal ends it all before. `stop` is called then until `work` has ended.

    In a thread: it reads the image, whose server may be silent, and no signal but SIGKILL interrupts such a read. Who
    is left in one is freed when the image is unmounted.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  raised by `result`
            future.set_exception(error)
        events.post()

    thread = threading.Thread(target=run, name="container-spec", daemon=True)
    thread.start()
    poller = select.poll()
    poller.register(events, select.POLLIN)
    try:
        while not future.done():
            poller.poll()
            _end_early(events)
    except BaseException:
        while stop and thread.is_alive():
            stop()
            thread.join(0.01)
        raise
    thread.join()
    return future.result()


@contextlib.contextmanager
def _created(
    container: Container, runtime: Runtime, streams: Stdio, program: str, events: Events
) -> Iterator[_Process]:
    """The container's first process, not yet started; in the end it is dead and the runtime has forgotten it."""
    try:
        try:
            with kernel.adopting_orphans():
                pid = _aside(events, lambda: runtime.create(streams), runtime.stop)
        except RunError as error:
            if error.exit_code == RunError.FAILED or program in str(error):
                raise
            raise RunError(f"cannot execute {program}: {error}", error.exit_code) from error
        process = _Process(pid)
        try:
            streams.connect()
            yield process
        finally:
            process.close()
    finally:
        try:
            runtime.delete()
        except BaseException:
            # Only the runtime knows what is left, and only as long as its state is there.
            container.give_up()
            raise


class _Process:
    """The first process of a container, a child of ours since the runtime that made it has ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._runtime_program = _program(pid)
        self._code: int | None = None
        self._killed_for: int | None = None

    def attend(self, events: Events, streams: Stdio, stop: int) -> int:
        """Wait until it has ended and its output is out; pass signals on. SIGTERM arrives as the image's `stop`."""
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        poller.register(events, select.POLLIN)
        while self._code is None or not streams.drained:
            ready = [fd for fd, _ in poller.poll()]
            if self._pidfd in ready:
                self._reap()
                poller.unregister(self._pidfd)
            for number in events.take():
                if self._code is not None:
                    # It is over, and only our own output keeps us: whoever wants an end now means us.
                    if number in _ENDING:
                        return self._code
                elif number != signal.SIGWINCH or not streams.resize():
                    self._signal(stop if number == signal.SIGTERM else number)
            streams.hang_up_if_refused()
        return self._code

    def close(self) -> None:
        """Kill it if it lives. The kernel has then killed all others of its container, before it let this one go."""
        if self._code is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._reap()
        os.close(self._pidfd)

    def _reap(self) -> None:
        ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        if ended is None:
            raise RunError(f"the container's process {self.pid} cannot be waited for")
        if ended.si_code == os.CLD_EXITED:
            self._code = ended.si_status
        elif ended.si_status == signal.SIGKILL and self._killed_for is not None:
            self._code = 128 + self._killed_for
        else:
            self._code = 128 + ended.si_status

    def _signal(self, number: int) -> None:
        """Send a signal that has the effect it would have outside.

        The kernel drops what the first process of a pid namespace has no handler for; so where the default is to end,
        we end it. So we do in the moment when it is still the runtime, which has handlers but not the command's.
        """
        if number not in _ENDING:
            signal.pidfd_send_signal(self._pidfd, number)
            return
        handled = _program(self.pid) != self._runtime_program
        if handled:
            signal.pidfd_send_signal(self._pidfd, number)
            handled = not _is_default(self.pid, number)
        if not handled:
            self._killed_for = number
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


# Signals that we pass on or that images choose as their stop signal, and whose default is to end a process.
_ENDING = frozenset(
    {
        signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
        signal.SIGABRT, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
    }
)  # fmt: skip


_STOP_SIGNAL = re.compile(r"(?:SIG)?([A-Z]{1,9}[0-9]?|[0-9]{1,2})([+-][0-9]{1,2})?")


def _program(pid: int) -> tuple[int, int] | None:
    """The file that a process executes; None if it has ended."""
    try:
        info = os.stat(f"/proc/{pid}/exe")
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino


def _is_default(pid: int, number: int) -> bool:
    """Whether a process leaves a signal at its default. proc(5): SigBlk, SigIgn and SigCgt are masks."""
    held = 0
    with contextlib.suppress(OSError):
        # A process gives itself a name of any bytes, of which the kernel quotes the newline alone.
        for line in Path(f"/proc/{pid}/status").read_bytes().split(b"\n"):
            key, _, value = line.partition(b":")
            if key in (b"SigBlk", b"SigIgn", b"SigCgt"):
                held |= int(value, 16)
    return not held >> (number - 1) & 1


def _stop_signal(config: clipfs.ImageConfig) -> int:
    """``SIGQUIT``, ``QUIT``, ``3``, ``SIGRTMIN+3``, ``SIGRTMAX-3``; SIGTERM if the image says nothing sensible."""
    text = config.stop_signal.strip().upper()
    if not text:
        return signal.SIGTERM
    known = {each.name.removeprefix("SIG"): int(each) for each in signal.Signals}
    if said := _STOP_SIGNAL.fullmatch(text):
        number = known.get(said[1], int(said[1]) if said[1].isdecimal() else 0) + int(said[2] or 0)
        if 0 < number <= signal.SIGRTMAX:
            return number
    _log.warning("the image's stop signal %.100r is none; SIGTERM is used", config.stop_signal)
    return signal.SIGTERM
