"""Keeps a mount alive: holds its connection to the kernel, and sees to it that there is always a worker who answers.

A worker that dies or does not answer any more is replaced on the same connection, and what it had been asked is asked
again: who reads sees a pause. If one dies after the other, requests fail with EIO for a while.

This process does next to nothing, so that it has next to nothing to die of: it parses no image, talks to no network,
and has neither trio nor pyfuse3.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from clipfs.errors import ClipfsError
from clipfs.mounting import kernel, mountinfo
from clipfs.mounting.child import Child, said
from clipfs.mounting.connection import Connection
from clipfs.mounting.views import Made
from clipfs.state import MountRecord, answer

log = logging.getLogger(__name__)

# A worker is asked whether it is well every few seconds, and nudged if it was silent. It has as long as it may take to
# decode the largest spans on a machine that is overloaded. Only a loop that does not turn is missed: reads that wait
# for a network do not stop it.
PING_SECONDS, STALL_SECONDS = 5.0, 30.0

# So many in a row that die so soon after they took over are no accident: what they are asked kills them, or they cannot
# even start. Then requests fail for a while.
DEATHS, YOUNG_SECONDS, REST_SECONDS = 5, 2.0, 60.0

# Before the replacement of one that was well for a while; of the first, second, ... that was not.
PAUSES = (0.0, 0.0, 0.1, 0.5, 2.0)

# For a new worker to have everything ready; and for one that is to end, to close its connections, which are given 5 s.
_START_SECONDS, _END_SECONDS = 30.0, 8.0

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(slots=True)
class _Times:
    """When the next things are due, by the monotonic clock."""

    ping: float
    restart: float | None = None
    looked: float = 0.0


class Supervisor:
    """Serves a mount that was made, with workers that `begin` starts."""

    def __init__(self, made: Made, record: MountRecord, begin: Callable[[Connection, str], Child]) -> None:
        self._connection, self._view = made.connection, made.view
        self._worker: Child | None = made.child
        self._record = replace(record, device=made.device, view=made.view, worker=made.child.process)
        self._begin = begin
        self._next: Child | None = None  # who is to take over from a worker that does well
        self._leaving: list[Child] = []  # those that still answer what they have been asked
        self._young_deaths = 0
        self._refusing = self._ending = False
        made.child.served_since = time.monotonic()
        self._times = _Times(ping=time.monotonic() + PING_SECONDS)

    def run(self, on_ready: Callable[[MountRecord], None], signals: socket.socket) -> None:
        """Until the mount is gone: unmounted by somebody, or by us after SIGTERM or SIGINT, whoever uses it.

        signals: from `held_signals`.
        """
        try:
            self._record.save()
            on_ready(self._record)
            while not self._ending and self._turn(signals):
                pass
        finally:
            self._end()

    # --- one thing after the other

    def _turn(self, signals: socket.socket) -> bool:
        """Wait for something and see to it. False when the file system is no more."""
        children = self._children()
        waiting = {signals.fileno(), *(child.pidfd for child in children)}
        waiting |= {child.channel.fileno() for child in children if not child.mute}
        if self._refusing:
            waiting.add(self._connection.descriptor)
        ready = kernel.readable(waiting, self._until_due())
        self._thaw()
        if signals.fileno() in ready:
            self._obey(signals.recv(64))
        if self._refusing and self._connection.descriptor in ready and not self._connection.refuse():
            return False
        for child in children:
            if child.channel.fileno() in ready:
                self._hear(child)
            elif child.pidfd in ready and not self._bury(child):
                return False
        return self._see_to_what_is_due()

    def _children(self) -> list[Child]:
        return [child for child in (self._worker, self._next, *self._leaving) if child is not None]

    def _until_due(self) -> float:
        due = [self._times.ping, *([] if self._times.restart is None else [self._times.restart])]
        return max(0.0, min(due) - time.monotonic())

    def _thaw(self) -> None:
        """If this process stood still for long, so did its worker (a frozen cgroup): its silence means nothing."""
        now = time.monotonic()
        if now - self._times.looked > 2 * PING_SECONDS and self._worker is not None:
            self._worker.heard = now
        self._times.looked = now

    def _obey(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self._ending = True
        elif signal.SIGHUP in numbers and self._next is None:
            log.info("%s gets a new worker", self._record.mountpoint)
            self._upgrade()

    def _hear(self, child: Child) -> None:
        message = child.channel.hear()
        if message is None:
            child.mute = True
            return
        child.heard = time.monotonic()
        match message["say"]:
            case "waiting":
                child.waiting = True
                if child is self._worker:
                    self._introduce(child)
                elif self._worker is not None:
                    self._worker.channel.say("leave")
            case "left" if child is self._worker:
                self._leaving.append(child)
                self._worker, self._next = self._next, None
                if self._worker is None:  # it has died since the old one was asked to leave
                    self._times.restart = time.monotonic()
                else:
                    self._introduce(self._worker)
                # libfuse throws away a request that it reads when it is told to end. What the old one is at is asked
                # twice, to no harm: the kernel takes the one answer that it waits for.
                self._connection.resend()
            case "ready":
                log.info("process %d serves %s", child.process.pid, self._record.mountpoint)
                child.served_since = time.monotonic()
                self._record = replace(self._record, worker=child.process)
                try:
                    self._record.save()
                except ClipfsError as error:
                    # Readers are served all the same; others go on seeing the worker before.
                    log.warning("cannot note who serves %s: %s", self._record.mountpoint, error)
                answer(self._record.process, "")
            case "failed":
                log.error("%s", message["sentence"])
                child.last_words = message["sentence"]

    def _introduce(self, child: Child) -> None:
        """Hand it the connection; nobody else may be reading from that."""
        child.channel.say("begin", init=self._connection.introduction(time.monotonic()).hex())

    def _see_to_what_is_due(self) -> bool:
        now = time.monotonic()
        if self._times.restart is not None and now >= self._times.restart:
            self._times.restart = None
            self._refusing = False
            self._start()
        if now >= self._times.ping:
            self._times.ping = now + PING_SECONDS
            if self._worker is not None:
                silent = now - self._worker.heard
                if silent > STALL_SECONDS:
                    log.error("process %d has not answered for %.0f s", self._worker.process.pid, STALL_SECONDS)
                    self._worker.stood_still = True
                    self._worker.kill()
                elif silent > 1.5 * PING_SECONDS:
                    self._worker.nudge()
                self._worker.channel.say("ping")
            if self._next is not None and now - self._next.heard > _START_SECONDS:
                self._next.kill()
            # Usually the worker tells by its end; one that stands still does not.
            return self._connection.alive
        return True

    # --- workers that come and go

    def _upgrade(self) -> None:
        """Start another worker; when it has everything ready, the one that does the work is asked to leave."""
        if self._worker is None:
            self._young_deaths = 0
            self._times.restart = time.monotonic()
            return
        # What the old one takes and does not answer would be lost, and who waits for it with that (see `_hear`).
        if not self._connection.can_repeat:
            answer(self._record.process, "this kernel cannot repeat what it was asked, as Linux 6.9 can")
            return
        try:
            self._next = self._begin(self._connection, self._view)
        except OSError as error:
            answer(self._record.process, f"cannot start a new worker: {error}")

    def _start(self) -> None:
        try:
            self._worker = self._begin(self._connection, self._view)
        except OSError as error:
            log.error("cannot start a new worker for %s: %s", self._record.mountpoint, error)
            self._died(young=True)

    def _bury(self, child: Child) -> bool:
        """See to a worker that has ended. False if that is because the file system has."""
        code = child.wait(0)
        child.close()
        if child in self._leaving:
            self._leaving.remove(child)
            # One that was killed had not answered everything. What others are at is asked twice, to no harm.
            return code == 0 or self._connection.resend()
        if child is self._next:
            self._next = None
            why = child.last_words or f"the new worker {said(code)}"
            log.error("%s keeps its worker: %s", self._record.mountpoint, why)
            answer(self._record.process, why)
            return True
        self._worker = None
        if not self._connection.alive:
            return False
        log.warning("process %d, which served %s, %s", child.process.pid, self._record.mountpoint, said(code))
        if not self._connection.resend():
            log.error(
                "this kernel cannot repeat what it was asked (Linux 6.9 can), so %s ends", self._record.mountpoint
            )
            return False
        if self._next is not None:
            self._worker, self._next = self._next, None
            if self._worker.waiting:
                self._introduce(self._worker)
            return True
        # What makes one stand still is asked of the next one, too.
        self._died(young=child.stood_still or time.monotonic() - child.served_since < YOUNG_SECONDS)
        return True

    def _died(self, *, young: bool) -> None:
        """Have the next worker started soon, or after a rest if one after the other dies."""
        now = time.monotonic()
        self._young_deaths = self._young_deaths + 1 if young else 0
        if self._young_deaths < DEATHS:
            self._times.restart = now + PAUSES[min(self._young_deaths, len(PAUSES) - 1)]
            return
        self._young_deaths = 0
        self._refusing = True
        self._times.restart = now + REST_SECONDS
        words = "%d workers of %s in a row have died at once; for %.0f s, what is not in the kernel's cache is EIO"
        log.error(words, DEATHS, self._record.mountpoint, REST_SECONDS)
        answer(self._record.process, "its workers keep dying")

    def _end(self) -> None:
        """Let the workers end, then the file system, then the mount if it still is where we have put it."""
        deadline = time.monotonic() + _END_SECONDS
        for child in self._children():
            child.channel.say("end")
        for child in self._children():
            if child.wait(deadline - time.monotonic()) is None:
                log.error("process %d does not end, and is killed", child.process.pid)
            child.destroy()
        # Nobody can wait for our answers any more, so that unmounting cannot hang.
        alive = self._connection.alive
        self._connection.close()
        # A FUSE mount whose connection was cut off (`umount -f`) is there yet, too. An EROFS with its number might be
        # another's by now.
        if (alive or self._view == "fuse") and not mountinfo.detach_dead(self._record.mountpoint, self._record.device):
            log.warning("%s", mountinfo.covered(self._record.mountpoint))
        answer(self._record.process, "it was unmounted")


@contextmanager
def held_signals() -> Iterator[socket.socket]:
    """A socket that becomes readable with the numbers of signals, while what they did before is put aside.

    Who has begun to make a mount holds them: one that comes meanwhile is obeyed when there is something to undo.
    """
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        stack.enter_context(ours)
        stack.enter_context(theirs)
        theirs.setblocking(False)
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False))
        for number in _SIGNALS:
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        yield ours
