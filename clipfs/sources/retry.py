"""How long a remote source is given, how often, and where else the same is asked for: deadlines, pauses and turns.

It knows neither HTTP nor registries, only that there are servers that have the same, and that asking one of them fails
in two ways: `Transient` is worth another attempt, anything else is that server's last word.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import trio

from clipfs.errors import ImageError, IntegrityError, SourceError, UsageError
from clipfs.sources.redact import redacted

T = TypeVar("T")

_log = logging.getLogger(__name__)

# All attempts, with the pauses between them: below the two minutes after which the kernel reports a hung task.
_TOTAL_SECONDS = 90.0
_LONGEST_TOTAL = 3600.0
# The slowest line worth using has 1 Mbit/s: what large transfers are given besides.
_SLOWEST_LINE = 1 << 17
# Four attempts outlive the restart of one backend behind a load balancer; more only delay the error.
_ATTEMPTS = 4
_FIRST_PAUSE = 0.25
# What a server may ask for with Retry-After. Docker Hub asks for hours when its quota is used up: that is an error.
_LONGEST_PAUSE = 15.0
# How long a server that failed is left alone, twice as long each time: a registry restarts in seconds, a machine in
# minutes.
_FIRST_REST, _LONGEST_REST = 5.0, 300.0
# How long a server that sent wrong bytes comes last. Its disk, or a cache in between, will not be mended soon.
_DISTRUST_SECONDS = 300.0


class Transient(Exception):  # noqa: N818 - never seen by users: `Turns` makes an error of it in the end
    """An attempt failed in a way that the next one may not. `pause`: what the server asked for, in seconds."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        self.reason = redacted(reason)
        self.pause = pause
        super().__init__(self.reason)


# What ends an attempt at one server, and may go well at another.
FAILURES = (Transient, SourceError, ImageError, IntegrityError)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How many seconds somebody who reads is kept waiting: `total` for all attempts together, less for each part."""

    total: float = _TOTAL_SECONDS

    @classmethod
    def chosen(cls, total: float | None) -> Self:
        """`total` if it is given, or else what $CLIPFS_TIMEOUT says, or else the usual."""
        if total is not None:
            return cls(total)
        text = os.environ.get("CLIPFS_TIMEOUT", "")
        if not text:
            return cls()
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= _LONGEST_TOTAL:
            raise UsageError(
                f"CLIPFS_TIMEOUT is the number of seconds that a read waits for its source, above 0 and up to "
                f"{_LONGEST_TOTAL:.0f}, and not {text!r}"
            )
        return cls(seconds)

    def total_for(self, size: int) -> float:
        """For a transfer of so many bytes. A shorter deadline stands for a faster line, too."""
        return self.total + size / _SLOWEST_LINE * self.total / _TOTAL_SECONDS

    def attempt_for(self, size: int) -> float:
        """For one attempt at it: a third, so that there is time for another two."""
        return self.total_for(size) - self.total * 2 / 3

    @property
    def silence(self) -> float:
        """The longest silence in the middle of an answer. Object stores take seconds for a first byte on a bad day."""
        return self.total * 2 / 9

    @property
    def helper(self) -> float:
        """For a credential helper: half an attempt, so that there is time to go on without one that hangs."""
        return self.total / 6

    @property
    def connect(self) -> float:
        """TCP gives a lost SYN three tries in 7 s, so 10 s is "nobody there"."""
        return self.total / 9


class Server:
    """Somewhere that can be asked. `host` is its name in sentences."""

    def __init__(self, host: str) -> None:
        self.host = host
        self._failures = 0
        self._rests_until = self._distrusted_until = self._alone_until = 0.0

    def failed(self, pause: float = 0.0) -> None:
        """Leave it alone for a while, if there are others. The same trouble counts once, however many meet it. pause:
        for so many seconds in any case, for it has asked for them."""
        self._alone_until = max(self._alone_until, trio.current_time() + pause)
        if self.rests:
            return
        self._rests_until = trio.current_time() + min(_FIRST_REST * 2**self._failures, _LONGEST_REST)
        self._failures = min(self._failures + 1, 10)

    def worked(self) -> None:
        """It answers."""
        self._failures, self._rests_until, self._alone_until = 0, 0.0, 0.0

    def distrust(self) -> None:
        """It sent wrong bytes: ask it last for a while."""
        self._distrusted_until = trio.current_time() + _DISTRUST_SECONDS

    @property
    def rests(self) -> bool:
        return trio.current_time() < self._rests_until

    @property
    def wants_to_be_left_alone(self) -> bool:
        return trio.current_time() < self._alone_until

    @property
    def distrusted(self) -> bool:
        return trio.current_time() < self._distrusted_until


S = TypeVar("S", bound=Server)


class Turns(Generic[S]):
    """Whose turn it is to serve one transfer of `size` bytes, and what is left of patience; `what` is for sentences.

    The first servers are preferred. The last one is where the thing really is: it is never left alone.
    """

    def __init__(self, servers: Sequence[S], what: str, size: int, deadlines: Deadlines) -> None:
        self.attempt_seconds = deadlines.attempt_for(size)
        self.deadline = trio.current_time() + deadlines.total_for(size)
        self._servers = servers
        self._main = servers[-1]
        self._what = what
        self._rounds = 0
        # The last passing trouble of each server, and of this round those of all.
        self._said: dict[S, Transient] = {}
        self._passing: dict[S, Transient] = {}
        self._final: Exception | None = None
        self._queue: list[S] = self._in_order(resting=False)
        self._all_asked = len(self._queue) == len(servers)

    @property
    def server(self) -> S:
        """Who is to be asked now."""
        return self._queue[0]

    def progressed(self) -> None:
        """Bytes came. A long download may fail now and then, as long as it gets on; but not for ever."""
        self._rounds = 0
        self.server.worked()
        if trio.current_time() > self.deadline:
            raise self._late()

    async def failed(self, failure: Exception) -> None:
        """Turn to the next server, at once if there is one that has not been asked; or raise what cannot be helped."""
        server = self._queue.pop(0)
        if isinstance(failure, Transient):
            self._passing[server] = self._said[server] = failure
        elif server is self._main:  # what a mirror has not, or does not give, another may
            self._final = failure
        if server is not self._main:
            server.failed(failure.pause if isinstance(failure, Transient) else 0.0)
            _log.warning("%s from mirror %s: %s", self._what, server.host, failure)
        if trio.current_time() > self.deadline:
            raise self._final or self.exhausted()
        if not self._queue:
            await self._next_round()

    async def _next_round(self) -> None:
        if self._passing:
            await self._pause(self._telling(self._passing))
        elif self._final is not None and self._all_asked:
            raise self._final
        else:
            self._rounds += 1
        self._passing.clear()
        self._queue, self._all_asked = self._in_order(resting=True), True

    async def _pause(self, server: S) -> None:
        """Wait as `server` would have it before the next round, or raise SourceError if there should be none."""
        failure = self._passing[server]
        self._rounds += 1
        _log.debug("%s from %s: attempt %d: %s", self._what, server.host, self._rounds, failure.reason)
        # Jitter, so that readers which failed together do not come back together.
        seconds = max(failure.pause, _FIRST_PAUSE * 2**self._rounds * random.uniform(0.5, 1.0))  # noqa: S311
        left = self.deadline - trio.current_time()
        if failure.pause > _LONGEST_PAUSE or self._rounds >= _ATTEMPTS or left < seconds:
            raise self._final or self.exhausted()
        await trio.sleep(seconds)

    def exhausted(self) -> SourceError:
        """The error that says why there was no success."""
        if self._main not in self._said and self._queue:
            return self._late()
        server = self._telling(self._said)
        failure = self._said[server]
        reason = failure.reason
        if failure.pause > _LONGEST_PAUSE:
            reason += f", and wants to be left alone for {failure.pause:.0f} s"
        return SourceError(f"cannot get {self._what} from {server.host}: {reason}")

    def _late(self) -> SourceError:
        """Of who is being asked, while time runs out."""
        return SourceError(f"cannot get {self._what} from {self.server.host}: it took too long")

    def _telling(self, failures: Collection[S]) -> S:
        """Whose trouble counts: what the registry itself says, or else what a mirror does."""
        return self._main if self._main in failures else list(failures)[-1]

    def _in_order(self, *, resting: bool) -> list[S]:
        """Those to ask, the trusted before the others; those that rest only if `resting`, and then last."""

        def may_be_asked(server: S) -> bool:
            return not server.wants_to_be_left_alone and (resting or not server.rests)

        servers = [server for server in self._servers if server is self._main or may_be_asked(server)]
        return sorted(servers, key=lambda server: (server.distrusted, server.rests))


async def persist(turns: Turns[S], attempt: Callable[[S], Awaitable[T]]) -> T:
    """Run `attempt` at one server after the other until it returns, with growing pauses, up to a deadline."""
    with trio.move_on_at(turns.deadline):
        while True:
            try:
                with trio.fail_after(turns.attempt_seconds):
                    result = await attempt(turns.server)
            except trio.TooSlowError:
                failure: Exception = Transient(f"no complete answer within {turns.attempt_seconds:.3g} s")
            except FAILURES as caught:
                failure = caught
            else:
                turns.server.worked()
                return result
            await turns.failed(failure)
    raise turns.exhausted()
