"""A slow link: a TCP proxy with a bandwidth and a latency, as a process of its own.

``python -m benchmarks.link HOST:PORT BYTES_A_SECOND ROUND_TRIP_SECONDS COUNTER`` prints the port that it listens on,
and serves until it is killed. COUNTER is a file that always holds the bytes that came through towards the client.

All connections share the bandwidth, one bucket a direction. A connection is made one round trip late, as a handshake
is, and every byte arrives half a round trip after it was let through.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

# Bytes that are passed on at a time, at most. A hundredth of a second's worth, so that a slow link is smooth.
_PIECE = 512 << 10
_SMOOTH = 0.01

# What is on the way, in pieces; more than any bandwidth times any latency here.
_ON_THE_WAY = 4096

# Seconds that nobody sleeps for: a sleep costs as much.
_AT_ONCE = 0.002


class _Direction:
    """The shared bucket of one direction: bytes pass one piece after the other, each as long as the rate has it."""

    def __init__(self, rate: float) -> None:
        self._rate, self._free = rate, 0.0
        self.piece = max(4096, min(_PIECE, int(rate * _SMOOTH)))

    async def passing(self, size: int) -> float:
        """When the last of these bytes is through; returns at that time."""
        self._free = max(self._free, trio.current_time()) + size / self._rate
        await _until(self._free)
        return self._free


async def _until(moment: float) -> None:
    if moment - trio.current_time() > _AT_ONCE:
        await trio.sleep_until(moment)


async def _pump(
    source: trio.SocketStream, target: trio.SocketStream, way: _Direction, delay: float, counters: list[mmap.mmap]
) -> None:
    into, out = trio.open_memory_channel[tuple[float, bytes]](_ON_THE_WAY)

    async def arrive() -> None:
        async for at, data in out:
            await _until(at)
            await target.send_all(data)
            for counter in counters:
                counter[:8] = (int.from_bytes(counter[:8], "little") + len(data)).to_bytes(8, "little")
        await target.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(arrive)
        async with into:
            while data := await source.receive_some(way.piece):
                await into.send((await way.passing(len(data)) + delay, data))


async def _serve(host: str, port: int, rate: float, round_trip: float, counter: mmap.mmap) -> None:
    up, down = _Direction(rate), _Direction(rate)

    async def connection(client: trio.SocketStream) -> None:
        try:
            await trio.sleep(round_trip)
            server = await trio.open_tcp_stream(host, port)
            async with server, trio.open_nursery() as nursery:
                nursery.start_soon(_pump, client, server, up, round_trip / 2, [])
                nursery.start_soon(_pump, server, client, down, round_trip / 2, [counter])
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # one side has had enough

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print(listener.socket.getsockname()[1], flush=True)
    await trio.serve_listeners(connection, [listener])


class Link:
    """A running link. port: where it listens."""

    def __init__(self, port: int, counter: Path) -> None:
        self.port, self._counter = port, counter

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
            yield Link(int(process.stdout.readline()), counter)
        finally:
            process.kill()


def main(server: str, rate: str, round_trip: str, counter: str) -> None:
    host, _, port = server.rpartition(":")
    with open(counter, "r+b") as file, mmap.mmap(file.fileno(), 8) as shared:
        trio.run(_serve, host, int(port), float(rate), float(round_trip), shared)


if __name__ == "__main__":
    main(*sys.argv[1:])
