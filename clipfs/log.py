"""What clipfs has to say while it works: how a line looks, and that no secret is in it.

Everything that is logged goes through `redacted` on its way out, tracebacks included, so that no module has to think of
it: signed query strings, passwords in URLs, and what follows ``Authorization`` or ``Bearer``.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Self, TextIO

_HIDDEN = "[redacted]"

# In the order in which they are applied: who is before the host in a URL, what is asked of it, headers, and words that
# name a secret. A value ends at a space, a quote, or whatever separates it from the next one.
_SECRETS = (
    (re.compile(r"(?P<keep>\b[a-z][a-z0-9+.-]{0,20}://)[^\s/?#@'\"]{1,500}@", re.IGNORECASE), rf"\g<keep>{_HIDDEN}@"),
    (re.compile(r"(?P<keep>\b[a-z][a-z0-9+.-]{0,20}://[^\s?'\"<>]{1,2000}\?)[^\s'\"<>]+", re.IGNORECASE), None),
    (re.compile(r"(?P<keep>authorization['\"]?\s*[:=]\s*['\"]?(?:[a-z]{1,20}\s+)?)[^\s'\",;)]+", re.IGNORECASE), None),
    (re.compile(r"(?P<keep>\b(?:bearer|basic)\s+)[a-z0-9._~+/=-]{8,}", re.IGNORECASE), None),
    (
        re.compile(
            r"(?P<keep>\b(?:[a-z_]*token|password|passwd|secret|signature|x-amz-[a-z-]+)['\"]?\s*[:=]\s*['\"]?)[^\s'\",;&)]+",
            re.IGNORECASE,
        ),
        None,
    ),
)

# What this module says quietly is that an attempt at a source failed and another one is made.
_RETRIES = "clipfs.sources.retry"


def redacted(text: str) -> str:
    """`text` without what is nobody's business."""
    for pattern, with_what in _SECRETS:
        text = pattern.sub(with_what or rf"\g<keep>{_HIDDEN}", text)
    return text


class _Lines(logging.Formatter):
    """Time, level, module and message."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _JsonLines(logging.Formatter):
    """A JSON object a line: time (UTC), level, module, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        said = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "module": record.name,
            "message": redacted(record.getMessage()),
        }
        if record.exc_info:
            said["traceback"] = redacted(self.formatException(record.exc_info))
        return json.dumps(said)


def to_stream(stream: TextIO, level: int, *, form: str = "text") -> None:
    """Let this process log to `stream`, with times, and nowhere else. form: text, or json for JSON lines."""
    lines = _JsonLines() if form == "json" else _Lines("%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.basicConfig(level=level, handlers=[_handler(stream, level, lines)], force=True)


def open_closed_streams() -> None:
    """If started with ``<&-`` or the like: or the next file that is opened would be taken for that stream."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
            if number:
                stream = open(number, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
                setattr(sys, ("stdout", "stderr")[number - 1], stream)


def print_any_name() -> None:
    """From now on: names are bytes, and not all are of the characters that the terminal has."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def complain(sentence: str) -> None:
    """On stderr. Where nobody takes it, there is still the exit code."""
    try:
        print(sentence, file=sys.stderr)
    except OSError:
        discard(2)


def discard(number: int) -> None:
    """Nobody takes what is written there any more; the interpreter's last flush must not complain about it."""
    with open(os.devnull, "wb", buffering=0) as nowhere:
        os.dup2(nowhere.fileno(), number)


def to_terminal(stream: TextIO, level: int) -> None:
    """Let a command log to `stream`, unless who calls it has arranged for something else."""
    logging.basicConfig(handlers=[_handler(stream, level, _Lines("%(levelname)s %(message)s"))])
    logging.getLogger().setLevel(level)


def _handler(stream: TextIO, level: int, lines: logging.Formatter) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(lines)
    # The handler's level, and not the root's, is what counts: `Listener` hears more than the stream shows.
    handler.setLevel(level)
    return handler


class Listener(logging.Handler):
    """Tells `noted` (kind, module, message) of what people ask about later: warnings and worse, by their level, and
    attempts that failed, as "retry"; for these `retried` is called too. A context manager; it listens while it is open.
    """

    def __init__(self, noted: Callable[[str, str, str], None], retried: Callable[[], None]) -> None:
        super().__init__()
        self._noted, self._retried = noted, retried
        self._loggers = [logging.getLogger("clipfs"), logging.getLogger(_RETRIES)]

    def __enter__(self) -> Self:
        ours, retries = self._loggers
        self._level = retries.level
        retries.setLevel(logging.DEBUG)
        ours.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        ours, retries = self._loggers
        ours.removeHandler(self)
        retries.setLevel(self._level)

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.levelname.lower()
        if record.levelno < logging.WARNING:
            if record.name != _RETRIES:
                return
            kind = "retry"
            self._retried()
        self._noted(kind, record.name.removeprefix("clipfs."), redacted(record.getMessage()))
