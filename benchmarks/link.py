"""A slow link: a TCP proxy with a bandwidth and a latency, as a process of its own.

``python -m benchmarks.link HOST:PORT BYTES_A_SECOND ROUND_TRIP_SECONDS COUNTER`` prints the port that it listens on,
and serves until it is killed. COUNTER is a file that always holds the bytes that came through towards the client.

All connections share the bandwidth, one clock a direction. A connection is made one round trip late, as a handshake
is, and every byte arrives half a round trip after it was let through. TCP's slow start is not imitated.

The cores are wanted by those who are measured. So bytes pass in few large pieces: the next one gathers in the socket
while the link is busy with the one before. A wait that ends late costs no bandwidth, because a piece is taken a little
before the link is free for it, and its arrival is reckoned from the clock.
"""

from __future__ import annotations

import mmap
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

# Seconds' worth of bytes that are let through in one piece, and by how much the clock may be ahead when the next one
# is taken: longer than a busy machine makes us wait, so that no bandwidth is lost.
_PIECE, _AHEAD = 0.005, 0.005

# Pieces on the way, and bytes that a socket gathers: more than any bandwidth here times those seconds and the latency.
_ON_THE_WAY, _SOCKET = 4096, 4 << 20

# linux/socket.h: as SO_RCVBUF and SO_SNDBUF, past what is allowed to users.
_RECEIVED, _SENT = 33, 32

# trio wakes at a whole millisecond, the next one.
_EARLY = 0.0005


class _Bandwidth:
    """The clock of one direction: bytes pass one piece after the other, each for as long as the rate has it."""

    def __init__(self, rate: float) -> None:
        self._rate, self._free = rate, 0.0
        self._turn = trio.Lock()  # first come, first served
        self._piece = max(4096, int(rate * _PIECE))

    async def take(self, source: trio.socket.SocketType) -> tuple[float, bytes]:
        """Let a piece through that can be read: when its last byte is through, and the bytes; none at the end."""
        async with self._turn:
            await trio.sleep_until(self._free - _AHEAD)
            data = await source.recv(self._piece)
            self._free = max(self._free, trio.current_time()) + len(data) / self._rate
            return self._free, data


async def _pump(
    source: trio.socket.SocketType,
    target: trio.socket.SocketType,
    way: _Bandwidth,
    delay: float,
    counters: list[mmap.mmap],
) -> None:
    """One direction of a connection, until its end is through."""
    into, wire = trio.open_memory_channel[tuple[float, bytes]](_ON_THE_WAY)

    async def arrive() -> None:
        async for at, data in wire:
            await trio.sleep_until(at - _EARLY)
            # Counted first: who has got the last byte may look at once.
            for counter in counters:
                counter[:8] = (int.from_bytes(counter[:8], "little") + len(data)).to_bytes(8, "little")
            left = memoryview(data)
            while left:
                left = left[await target.send(left) :]
        target.shutdown(socket.SHUT_WR)

    async with trio.open_nursery() as nursery, into:
        nursery.start_soon(arrive)
        while True:
            await trio.lowlevel.wait_readable(source)
            through, data = await way.take(source)
            if not data:
                break
            await into.send((through + delay, data))


async def _serve(host: str, port: int, rate: float, round_trip: float, counter: mmap.mmap) -> None:
    up, down = _Bandwidth(rate), _Bandwidth(rate)

    async def connection(stream: trio.SocketStream) -> None:
        try:
            await trio.sleep(round_trip)
            async with await trio.open_tcp_stream(host, port) as other:
                client, server = stream.socket, other.socket
                for each, buffer in ((server, _RECEIVED), (client, _SENT)):
                    each.setsockopt(socket.SOL_SOCKET, buffer, _SOCKET)
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_pump, client, server, up, round_trip / 2, [])
                    nursery.start_soon(_pump, server, client, down, round_trip / 2, [counter])
        except* OSError:
            pass  # one side has had enough

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print(listener.socket.getsockname()[1], flush=True)
    await trio.serve_listeners(connection, [listener])


class Link:
    """A running link. port: where it listens; pid: its process."""

    def __init__(self, port: int, pid: int, counter: Path) -> None:
        self.port, self.pid, self._counter = port, pid, counter

    @property
    def received(self) -> int:
        """Bytes that came through to the client so far."""
        return int.from_bytes(self._counter.read_bytes(), "little")


@contextmanager
def slow_link(server: str, rate: float, round_trip: float, scratch: Path) -> Iterator[Link]:
    """A link to ``HOST:PORT``, gone afterwards."""
    counter = scratch / f"link-{time.monotonic_ns()}"
    counter.write_bytes(bytes(8))
    command = [sys.executable, "-m", "benchmarks.link", server, str(rate), str(round_trip), str(counter)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, process_group=0) as process:
        try:
            assert process.stdout is not None
            yield Link(int(process.stdout.readline()), process.pid, counter)
        finally:
            process.kill()


def main(server: str, rate: str, round_trip: str, counter: str) -> None:
    host, _, port = server.rpartition(":")
    with open(counter, "r+b") as file, mmap.mmap(file.fileno(), 8) as shared:
        trio.run(_serve, host, int(port), float(rate), float(round_trip), shared)


if __name__ == "__main__":
    main(*sys.argv[1:])
