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
import termios
import threading
import tty
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# A pipe holds this much, so larger reads return no more.
_PIECE = 64 << 10

_END_OF_INPUT = b"\x04"  # what a terminal's line discipline takes for end of file (VEOF)

# The thread that reads our input ends when it is told to, except in a read that somebody else's read made empty.
_JOIN_SECONDS = 1.0


class Stdio:
    """One container's streams, a context: give `child` and `console` to the runtime, `connect`, await `drained`.

    directory: where the socket may be made over which the runtime hands out the terminal. on_end is called, in another
    thread, each time that an output has come to its end; and so is on_output when something comes on standard output.
    """

    def __init__(
        self,
        directory: Path,
        *,
        interactive: bool,
        terminal: bool,
        on_end: Callable[[], None],
        on_output: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory = directory
        self._interactive = interactive
        self._terminal = terminal
        self._on_end = on_end
        self._on_output = on_output
        self._undo = contextlib.ExitStack()
        self._given = contextlib.ExitStack()
        self._listener: socket.socket | None = None
        self._master: int | None = None
        self._sources: list[tuple[int, int]] = []
        self._input: int | None = None
        self._outputs: list[_Output] = []
        #: Descriptors for the standard streams of the runtime, which passes them on to the container.
        self.child: tuple[int, int, int] = (-1, -1, -1)
        #: The socket to which the runtime shall send the terminal, if there shall be one.
        self.console: str | None = None

    def __enter__(self) -> Self:
        nothing = self._keep(os.open(os.devnull, os.O_RDWR), self._given)
        self.child = (nothing, nothing, nothing)
        if self._terminal:
            self._listen()
        else:
            self._open_pipes()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given.close()
        self._undo.close()
        for fd in [*(source for source, _ in self._sources), *([] if self._input is None else [self._input])]:
            os.close(fd)

    @property
    def drained(self) -> bool:
        """Whether all that the container wrote has been passed on."""
        return all(output.ended for output in self._outputs)

    def connect(self) -> None:
        """Begin to move bytes. Call it when the runtime has made the container."""
        self._given.close()
        if self._listener is not None:
            self._receive_master(self._listener)
        for source, sink in self._sources:
            self._outputs.append(_Output(source, sink, self._on_end, self._on_output if sink == 1 else lambda: None))
            self._outputs[-1].start()
        self._sources.clear()
        if self._input is not None:
            if self._master is not None and os.isatty(0):
                # Now each key, Ctrl-C too, is the container's terminal's to understand.
                self._undo.callback(_set_back, termios.tcgetattr(0))
                tty.setraw(0, termios.TCSADRAIN)
            self._start_input(self._input)
            self._input = None

    def hang_up_if_refused(self) -> None:
        """Close the container's terminal when nobody takes its output any more: it has no pipe to notice that by."""
        if self._master is not None and any(output.refused for output in self._outputs):
            self._master = None
            # All of our descriptors of it, that of the thread which brings input too.
            self._undo.close()

    def resize(self) -> bool:
        """Give the container's terminal the size of ours. False if it has none."""
        if self._master is None:
            return False
        for fd in (0, 1, 2):
            with contextlib.suppress(OSError):
                size = fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))
                fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)
                break
        return True

    def _open_pipes(self) -> None:
        child = [self.child[0]]
        if self._interactive:
            reader, self._input = os.pipe()
            child = [self._keep(reader, self._given)]
        for sink in (1, 2):
            reader, writer = os.pipe()
            self._sources.append((reader, sink))
            child.append(self._keep(writer, self._given))
        self.child = (child[0], child[1], child[2])

    def _listen(self) -> None:
        """By descriptor, because the path of a socket has 107 bytes at most."""
        place = self._keep(os.open(self._directory, os.O_PATH | os.O_DIRECTORY), self._undo)
        self.console = f"/proc/{os.getpid()}/fd/{place}/console"
        self._listener = self._undo.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(self.console)
        self._listener.listen(1)

    def _receive_master(self, listener: socket.socket) -> None:
        # The runtime has connected and sent, or it would have failed; this does not wait.
        connection, _ = listener.accept()
        with connection:
            _, received, _, _ = socket.recv_fds(connection, 4096, 1)
        self._master = self._keep(received[0], self._undo)
        self.resize()
        self._sources.append((os.dup(self._master), 1))
        if self._interactive:
            self._input = os.dup(self._master)

    def _start_input(self, target: int) -> None:
        stop, stopper = os.pipe()
        at_end = b"" if self._master is None else _END_OF_INPUT
        thread = threading.Thread(target=_pass_input, args=(target, stop, at_end), name="container-stdin", daemon=True)
        self._undo.callback(thread.join, _JOIN_SECONDS)
        self._undo.callback(os.close, stopper)
        thread.start()

    def _keep(self, fd: int, until: contextlib.ExitStack) -> int:
        until.callback(os.close, fd)
        return fd


class _Output(threading.Thread):
    """Copies until the container's side is closed or ours does not take any more, which the container then notices.

    A thread, because our output may be as slow as it likes, and signals must get through all the same.
    """

    def __init__(self, source: int, sink: int, on_end: Callable[[], None], on_output: Callable[[], None]) -> None:
        super().__init__(name="container-output", daemon=True)
        self._source = source
        self._sink = sink
        self._on_end = on_end
        self._on_output = on_output
        self.ended = False
        #: Whether it has ended because ours does not take any more.
        self.refused = False

    def run(self) -> None:
        # A terminal ends with EIO, a reader that has left is EPIPE: both are ends, not faults.
        with contextlib.suppress(OSError):
            while data := os.read(self._source, _PIECE):
                self._on_output()
                try:
                    write_all(self._sink, data)
                except OSError:
                    self.refused = True
                    break
        os.close(self._source)
        self.ended = True
        self._on_end()


def _set_back(mode: list[Any]) -> None:
    """Give our terminal its mode back; there is none any more if its window was closed."""
    with contextlib.suppress(termios.error):
        termios.tcsetattr(0, termios.TCSADRAIN, mode)


def _pass_input(target: int, stop: int, at_end: bytes) -> None:
    """Copy our standard input to `target` until it ends, nobody reads it, or the other end of `stop` is closed."""
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(stop, select.POLLIN)
    last = b"\n"
    with contextlib.suppress(OSError):
        while not any(fd == stop for fd, _ in poller.poll()):
            data = os.read(0, _PIECE)
            if not data:
                # In the middle of a line the first one only ends that line.
                write_all(target, at_end if last == b"\n" else at_end * 2)
                break
            write_all(target, data)
            last = data[-1:]
    os.close(target)
    os.close(stop)


def write_all(fd: int, data: bytes) -> None:
    """Write everything, however long it takes; whoever gave us a file may have made it non-blocking."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll()
