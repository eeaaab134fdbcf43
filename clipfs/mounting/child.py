"""A worker as its supervisor sees it: started, talked to, waited for, and killed."""

from __future__ import annotations

import math
import os
import subprocess
import time
from typing import Any

from clipfs import errors
from clipfs.errors import ClipfsError, MountError
from clipfs.mounting import kernel
from clipfs.mounting.control import NUDGE, Channel, Job
from clipfs.program import program
from clipfs.state import Process

# The module that a worker runs.
PROGRAM = "clipfs.mounting.worker"

# Spans are decoded in threads. With an arena for each, glibc keeps half as much again of what they have freed; and it
# keeps ever larger pieces for itself, unless told from what size on they go back.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": f"{1 << 20}", "MALLOC_TRIM_THRESHOLD_": f"{8 << 20}"}

# From SIGKILL to the end of a process; only one that is stuck in the kernel needs longer.
_DEATH_SECONDS = 5.0


class Child:
    """A worker process, which loads what it needs until it is given a job.

    origin: a descriptor of the mount namespace that it is to be in, None for this one.
    """

    def __init__(self, origin: int | None = None) -> None:
        self.channel, theirs = Channel.pair()
        command, environment = program(PROGRAM, theirs.fileno())
        try:
            with theirs:
                # A session of its own: what is typed at a terminal is for the supervisor, and a terminal's end is no
                # affair of this one's.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    pass_fds=[theirs.fileno()],
                    env={**_ENVIRONMENT, **environment},
                    cwd="/",
                    start_new_session=True,
                    # Nothing of ours runs in the new process but this one call.
                    preexec_fn=None if origin is None else lambda: kernel.enter_mount_namespace(origin),
                )
        except BaseException:
            self.channel.close()
            raise
        self.pidfd = os.pidfd_open(self._process.pid)
        self.process = Process.of(self._process.pid)
        #: When it last showed that it is well, by the monotonic clock.
        self.heard = time.monotonic()
        #: When it took over, by the same clock; in the future of one that has not.
        self.served_since = math.inf
        #: Has it everything ready, and waits for the connection?
        self.waiting = False
        #: Has it closed its end of the channel? Then it is about to end.
        self.mute = False
        #: Was it killed because it did not answer?
        self.stood_still = False
        #: What it has died of, as far as it could tell.
        self.last_words = ""

    def give(self, job: Job) -> None:
        """What it is to work on, with the descriptors that it needs for that."""
        self.channel.hand("job", job.descriptors, job=job.to_json())

    def await_word(self, word: str, deadline: float) -> None:
        """Wait until it says so. The error that it died of, or MountError if it died silently or is too slow."""
        while (message := self._hear_until(deadline)) is not None:
            if message["say"] == "failed":
                raise known_error(message["kind"], message["sentence"])
            if message["say"] == word:
                return
        raise MountError(f"the process that should serve the mount {self._end()}; a log=FILE option shows what it did")

    def _hear_until(self, deadline: float) -> dict[str, Any] | None:
        ready = kernel.readable([self.channel.fileno()], deadline - time.monotonic())
        return self.channel.hear() if ready else None

    def _end(self) -> str:
        return "ended without a word" if self.wait(0.1) is not None else "was not ready in time"

    def wait(self, seconds: float) -> int | None:
        """How it has ended: its exit code, minus a signal's number, or None if it has not ended within that time."""
        if not kernel.readable([self.pidfd], seconds):
            return None
        return self._process.wait()

    def nudge(self) -> None:
        """If it waits in the kernel for a request that is no more, as who made it was killed, it waits no longer."""
        # Before it serves, it may not have come to where it expects this.
        if math.isfinite(self.served_since):
            self._process.send_signal(NUDGE)

    def kill(self) -> None:
        """SIGKILL. Its end is seen at `pidfd`, and frees who waits for its answers if it was the last to be asked."""
        self._process.kill()

    def destroy(self) -> None:
        """Kill it, wait for its end, and close what we have of it."""
        self.kill()
        self.wait(_DEATH_SECONDS)
        self.close()

    def close(self) -> None:
        """Let go of a worker that has ended, or that is to go on alone."""
        self.channel.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def known_error(kind: str, sentence: str) -> ClipfsError:
    """The error that another process has told of."""
    error: ClipfsError = getattr(errors, kind, MountError)(sentence)
    return error


def said(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "does not end"
    return f"was killed by signal {-code}" if code < 0 else f"has ended with exit code {code}"
