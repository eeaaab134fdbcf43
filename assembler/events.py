"""What wakes a process that waits for a container: signals for it, and the ends of threads that move its bytes.

Signals are taken from Python's wake-up descriptor, so a wait is one `poll`, and no handler runs in the middle of
something. Does not know what is done with them.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

# What asks a command to end or to look up, and SIGWINCH, which tells that its terminal has a new size. Those of job
# control keep their meaning for the process that waits.
_ASKING = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH,
)  # fmt: skip

# Whatever else somebody sends on purpose, systemd's SIGRTMIN+3 for one: it would end this process, and not the command.
FORWARDED = (*_ASKING, signal.SIGALRM, signal.SIGABRT, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1))

_OTHER = 0  # no signal has this number


class Events:
    """Signals, from the moment this context is entered until it is left, and `post`ed wake-ups.

    Only the main thread can receive signals; elsewhere there are none. A signal that this process was started to
    ignore (by nohup, say) stays ignored, and one that it has a use for, a timer's say, stays its own.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self._writer.close)
            undo.callback(self._reader.close)
            if threading.current_thread() is threading.main_thread():
                before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
                undo.callback(signal.set_wakeup_fd, before)
                for number in FORWARDED:
                    handler = signal.getsignal(number)
                    if handler is signal.SIG_DFL or (number in _ASKING and handler is not signal.SIG_IGN):
                        undo.callback(signal.signal, number, signal.signal(number, lambda *_: None))
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def fileno(self) -> int:
        """Readable when `take` has something."""
        return self._reader.fileno()

    def post(self) -> None:
        """Wake whoever polls; from any thread, also after the end."""
        with contextlib.suppress(OSError):
            self._writer.send(bytes((_OTHER,)))

    def take(self) -> Iterator[int]:
        """The signals since the last call, in order; does not wait."""
        with contextlib.suppress(BlockingIOError):
            while numbers := self._reader.recv(256):
                yield from (number for number in numbers if number in FORWARDED)
