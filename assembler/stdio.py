"""The container's standard streams: pipes or a terminal of its own, and the threads that connect them with ours.

The container never gets the caller's own files. A runtime gives a container's standard streams to the container's
user, and that must not be the caller's terminal or the file it writes to. Does not know what runs in the container.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import subprocess
import termios
import threading
import tty
from collections.abc import Callable
from pathlib import Path

# A pipe holds this much; larger reads return no more.
_PIECE = 64 << 10

_END_OF_INPUT = b"\x04"  # what a terminal's line discipline takes for end of file (VEOF)


class Stdio:
    """One container's streams. In order: give `child` and `console` to the runtime, `connect`, wait, `close`.

    on_end is called, in another thread, each time that an output has come to its end.
    """

    def __init__(self, directory: Path, *, interactive: bool, terminal: bool, on_end: Callable[[], None]) -> None:
        self.interactive = interactive
        self.terminal = terminal
        self._on_end = on_end
        self._undo = contextlib.ExitStack()
        self._master: int | None = None
        self._outputs: list[_Output] = []
        self._listener: socket.socket | None = None
        self.console: str | None = None
        self.child: tuple[int, int, int]
        if terminal:
            self._open_console(directory)
        else:
            self._open_pipes()

    @property
    def drained(self) -> bool:
        """Whether all that the container wrote has been passed on."""
        return all(output.ended for output in self._outputs)

    def connect(self) -> None:
        """Begin to move bytes. Call it when the runtime has made the container."""
        if self._listener is not None:
            connection, _ = self._listener.accept()
            with connection:
                _, received, _, _ = socket.recv_fds(connection, 4096, 1)
            self._master = received[0]
            self._undo.callback(os.close, self._master)
            self.resize()
            self._output(self._undo_dup(self._master), 1)
            if self.interactive:
                self._raw()
                self._input(self._undo_dup(self._master), at_end=_END_OF_INPUT)
        for fd in self._given:
            os.close(fd)
        self._given.clear()
