"""What a supervisor and its workers say to each other: messages of JSON over a socket that keeps them apart.

A supervisor says ``begin`` (with the kernel's FUSE_INIT), ``ping``, ``leave`` (another worker goes on) and ``end``. A
worker says ``waiting`` (for ``begin``), ``ready``, ``pong``, ``left`` (it takes no more requests, and ends when it has
answered those that it has), and ``failed``. The two may be of different versions, after an upgrade: what one does not
know, it ignores.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from clipfs.mounting.options import MountOptions
from clipfs.state import Process

# A supervisor sends it to a worker that is silent: whatever that waits for in the kernel, it shall look around.
NUDGE = signal.SIGUSR1

_DESCRIPTORS = ("fuse", "index", "clip", "counters", "journal", "log")

# A job is some KB; the kernel lets 200 KB through.
_LARGEST = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker works on. The first numbers are descriptors, which it is handed and knows by other numbers.

    fuse: the connection. index: a checked copy of the index. clip: the file itself, for the data in a packed one.
    counters, journal: the files of `state.MountRecord`, which are named after `process`. log: for what it writes. path:
    what the clip is called. source: where its data is. began: when the mount did, by the monotonic clock. level: of
    logging. oom: what the worker's oom_score_adj is to be, None if that of the supervisor was not changed. xattrs:
    False if no inode of the index has any. founding: is the mount made with this worker? What it is given and cannot
    use is an error then; one that comes later does without.
    """

    fuse: int
    index: int
    clip: int
    counters: int
    journal: int
    log: int
    view: str
    path: str
    source: str
    process: Process
    began: float
    level: int
    oom: int | None
    options: MountOptions
    xattrs: bool = True
    founding: bool = False

    @property
    def descriptors(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in _DESCRIPTORS)

    def as_received(self, descriptors: Sequence[int]) -> Self:
        """By the numbers that its descriptors have in the process that they were handed to."""
        numbers: dict[str, Any] = dict(zip(_DESCRIPTORS, descriptors, strict=True))
        return replace(self, **numbers)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "options": self.options.to_json()}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Self:
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in values.items() if name in known}
        given["options"] = MountOptions.of_json(values["options"])
        given["process"] = Process(**values["process"])
        return cls(**given)


class Channel:
    """One end of the socket between the two."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    @classmethod
    def pair(cls) -> tuple[Self, socket.socket]:
        """Ours, and the other end for a process that inherits it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), theirs

    @classmethod
    def inherited(cls, descriptor: int) -> Self:
        return cls(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        return self._end.fileno()

    def close(self) -> None:
        self._end.close()

    def say(self, what: str, **fields: Any) -> None:
        """Nobody may be there any more to hear it: whoever waits for an answer will notice.

        A worker that does not listen for hours fills the socket; then it is not told any more, and missed in time.
        """
        self.hand(what, (), **fields)

    def hand(self, what: str, descriptors: Sequence[int], **fields: Any) -> None:
        """As `say`, and the other one gets copies of the descriptors (unix(7), SCM_RIGHTS)."""
        message = json.dumps({"say": what, **fields}).encode()
        with contextlib.suppress(OSError):
            socket.send_fds(self._end, [message], descriptors, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def take(self) -> tuple[dict[str, Any] | None, list[int]]:
        """As `hear`, with the descriptors that were handed with it."""
        try:
            message, descriptors, _, _ = socket.recv_fds(
                self._end, _LARGEST, len(_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            return None, []
        return _understood(message), descriptors

    def hear(self) -> dict[str, Any] | None:
        """The next message, waiting for it. None if the other one is gone. What is no message says nothing."""
        try:
            return _understood(self._end.recv(_LARGEST))
        except ConnectionError:
            return None


def _understood(message: bytes) -> dict[str, Any] | None:
    if not message:
        return None
    try:
        heard = json.loads(message)
    except (ValueError, RecursionError):
        heard = None
    return heard if isinstance(heard, dict) and isinstance(heard.get("say"), str) else {"say": ""}
