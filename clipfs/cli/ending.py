"""An end that is asked for is as Ctrl-C: what was begun is undone first, and no file is left half written."""

from __future__ import annotations

import signal
from types import FrameType

_NUMBERS = (signal.SIGTERM, signal.SIGHUP)

_asked: int = signal.SIGINT


def as_interrupt() -> None:
    """From now on. Who was started to ignore them, or Ctrl-C, goes on doing so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        for number in _NUMBERS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _interrupt)


def exit_code() -> int:
    """Of who was interrupted, as shells have it: 128 and the signal's number."""
    return 128 + _asked


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = number
    handler = signal.getsignal(signal.SIGINT)  # it knows when an interrupt would break something: trio has its own
    if callable(handler):
        handler(signal.SIGINT, frame)
    else:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
