"""How long a remote source is given, and how often: the deadlines and the pauses between attempts.

It knows neither HTTP nor registries, only that attempts fail in two ways: `Transient` is worth another one, anything
else is final.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from clipfs.errors import SourceError

T = TypeVar("T")

_log = logging.getLogger(__name__)

# One attempt may take this, plus the time that its bytes take on the slowest line worth using (1 Mbit/s).
_ATTEMPT_SECONDS = 30.0
_SLOWEST_LINE = 1 << 17
# All attempts, with the pauses between them: below the two minutes after which the kernel reports a hung task.
_TOTAL_SECONDS = 90.0
# Four attempts outlive the restart of one backend behind a load balancer; more only delay the error.
_ATTEMPTS = 4
_FIRST_PAUSE = 0.25
# What a server may ask for with Retry-After. Docker Hub asks for hours when its quota is used up: that is an error.
_LONGEST_PAUSE = 15.0


class Transient(Exception):  # noqa: N818 - never seen by users: `Patience` turns it into an error when it runs out
    """An attempt failed in a way that the next one may not. `pause`: what the server asked for, in seconds."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        self.reason = reason
        self.pause = pause
        super().__init__(reason)


class Patience:
    """What is left of it for one transfer of `size` bytes; `what` and `host` are for the sentence at its end."""

    def __init__(self, host: str, what: str, size: int) -> None:
        self.attempt_seconds = _ATTEMPT_SECONDS + size / _SLOWEST_LINE
        self.deadline = trio.current_time() + _TOTAL_SECONDS + size / _SLOWEST_LINE
        self._host = host
        self._what = what
        self._failures = 0
        self._reason = "it took too long"

    def progressed(self) -> None:
        """Bytes came. A long download may fail now and then, as long as it gets on; but not for ever."""
        self._failures = 0
        if trio.current_time() > self.deadline:
            raise self.exhausted()

    async def pause(self, failure: Transient) -> None:
        """Wait before the next attempt, or raise SourceError if there should be none."""
        self._reason = failure.reason
        self._failures += 1
        _log.debug("%s from %s: attempt %d: %s", self._what, self._host, self._failures, failure.reason)
        if failure.pause > _LONGEST_PAUSE:
            self._reason += f", and wants to be left alone for {failure.pause:.0f} s"
        # Jitter, so that readers which failed together do not come back together.
        seconds = max(failure.pause, _FIRST_PAUSE * 2**self._failures * random.uniform(0.5, 1.0))  # noqa: S311
        if failure.pause > _LONGEST_PAUSE or self._failures >= _ATTEMPTS or self._left() < seconds:
            raise self.exhausted()
        await trio.sleep(seconds)

    def exhausted(self) -> SourceError:
        """The error that says why there was no success."""
        return SourceError(f"cannot get {self._what} from {self._host}: {self._reason}")

    def _left(self) -> float:
        return self.deadline - trio.current_time()


async def persist(host: str, what: str, size: int, attempt: Callable[[], Awaitable[T]]) -> T:
    """Run `attempt` until it returns: a few times, with growing pauses, up to a deadline. Then SourceError."""
    patience = Patience(host, what, size)
    with trio.move_on_at(patience.deadline):
        while True:
            try:
                with trio.fail_after(patience.attempt_seconds):
                    return await attempt()
            except trio.TooSlowError:
                failure = Transient(f"no complete answer within {patience.attempt_seconds:.0f} s")
            except Transient as caught:
                failure = caught
            await patience.pause(failure)
    raise patience.exhausted()
