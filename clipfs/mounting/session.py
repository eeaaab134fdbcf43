"""What a worker does: it opens the index, says so, takes over the connection when told, and answers until the end.

pyfuse3 keeps its session in module globals, so a process serves one mount once. libfuse wants to begin with the
kernel's FUSE_INIT, which the kernel sends once, to the first of many workers: so each is shown a copy through a socket,
in whose place the real connection is put as soon as it has been answered. Imports trio and pyfuse3.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pyfuse3
import trio

from clipfs import state
from clipfs.blocks import trace
from clipfs.blocks.counters import Counters
from clipfs.blocks.disk import DiskCache
from clipfs.blocks.journal import Journal
from clipfs.blocks.reader import BlockReader, Tiers
from clipfs.errors import ClipfsError
from clipfs.format.container import ITSELF
from clipfs.format.index import Index
from clipfs.log import Listener
from clipfs.mounting import connection, loop
from clipfs.mounting.beginning import read_beginnings
from clipfs.mounting.control import Channel, Job
from clipfs.mounting.dataspace import DataSpace
from clipfs.mounting.fs import ClipFS
from clipfs.mounting.options import MountOptions
from clipfs.sources.fetcher import Fetcher, NoFetcher, SourceOptions
from clipfs.sources.packed import fetcher_for

log = logging.getLogger(__name__)

# Spans on their way at the same time that nobody has asked for: enough to fill a range or two.
_AHEAD_AT_ONCE = 16

# Requests handled at the same time. Each that waits for the network holds one, and lookups must still get through.
_TASKS = 1000


# An answer to FUSE_INIT has 80 bytes.
_ANSWER = 4096


def serve(job: Job, channel: Channel) -> None:
    """Answer the requests of a mount until it is unmounted, or the supervisor or SIGTERM says that it is enough."""
    with Index.open(f"/proc/self/fd/{job.index}", shown=Path(job.path)) as index:
        trio.run(_Session(job, channel, index).serve)


class _Session:
    def __init__(self, job: Job, channel: Channel, index: Index) -> None:
        self._job, self._channel, self._index = job, channel, index
        self._begin = trio.Event()
        self._supervised, self._left = True, False

    async def serve(self) -> None:
        job, index, options = self._job, self._index, self._job.options
        access = SourceOptions(
            name=f"{ITSELF}/proc/self/fd/{job.clip}" if job.source == ITSELF else job.source,
            insecure=options.insecure,
            authfile=options.authfile,
            ca=options.ca,
            timeout=options.timeout,
        )
        fetcher = _fetcher(index, access, founding=job.founding)
        reader = BlockReader(
            index,
            fetcher,
            counters=Counters.create(Path(f"/proc/self/fd/{job.counters}")),
            tiers=Tiers(options.cache, _disk_cache(options, founding=job.founding)),
            journal=Journal(Path(f"/proc/self/fd/{job.journal}"), began=job.began),
        )
        planned = _planned(index, options, founding=job.founding)
        introduced, shown = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        place = shown.detach()
        introducing = trio.CancelScope()
        files = job.view == "fuse"
        tree = index if files else DataSpace(index)
        pyfuse3.init(
            ClipFS(tree, reader, introducing.cancel, xattrs=files and job.xattrs),
            f"/dev/fd/{place}",
            {f"fsname={place}"},
        )
        loop.install()
        with (
            trio.open_signal_receiver(signal.SIGTERM) as signals,
            Listener(reader.journal.said, reader.counters.retried),
        ):
            try:
                async with fetcher, reader, trio.open_nursery() as nursery:
                    nursery.start_soon(self._listen, nursery.cancel_scope)
                    nursery.start_soon(_cancel_on_signal, signals, nursery.cancel_scope)
                    self._channel.say("waiting")
                    if options.prefetch == "trace" and not planned:
                        nursery.start_soon(read_beginnings, index, reader, options.first)
                    await self._begin.wait()
                    with introduced:
                        introduced.send(self._init)
                        # It has answered when it wants to read on.
                        with introducing:
                            await pyfuse3.main(max_tasks=1)
                        answer = introduced.recv(_ANSWER, socket.MSG_DONTWAIT)
                    # To all but the first worker's, the kernel says that it has asked for nothing.
                    with suppress(FileNotFoundError):
                        os.write(job.fuse, connection.amended(answer, self._init))
                    os.dup2(job.fuse, place, inheritable=False)
                    self._channel.say("ready")
                    nursery.start_soon(reader.warm, planned)
                    nursery.start_soon(reader.prefetch, planned, options.prefetch, _AHEAD_AT_ONCE)
                    await pyfuse3.main(max_tasks=_TASKS)
                    # It returns when the kernel has ended the session, or somebody else goes on with it.
                    nursery.cancel_scope.cancel()
            finally:
                pyfuse3.close(unmount=False)
                _save_trace(index, reader)
                # Of a mount that goes on without us, or is there yet, `gc` has to know.
                if not (self._supervised or self._left or connection.is_alive(job.fuse)):
                    state.remove_files(job.process)

    async def _listen(self, scope: trio.CancelScope) -> None:
        """Do what the supervisor says. Without one there is nobody to end us but SIGTERM and the unmount."""
        while True:
            await trio.lowlevel.wait_readable(self._channel)
            message = self._channel.hear()
            if message is None:
                break
            match message["say"]:
                case "begin":
                    self._init = bytes.fromhex(message["init"])
                    self._begin.set()
                case "ping":
                    self._channel.say("pong")
                case "leave":
                    await self._leave()
                case "end":
                    scope.cancel()
        if not self._begin.is_set():
            scope.cancel()
            return
        self._supervised = False
        log.warning("the supervisor has died; process %d serves %s without one", os.getpid(), self._job.path)

    async def _leave(self) -> None:
        """Take no more requests, so that another worker can. What was taken is still answered; then `main` returns."""
        pyfuse3.terminate()
        # A task that had been told of a request, and has not taken it, does so now, and it is lost; see `Supervisor`.
        for _ in range(2):
            await trio.lowlevel.checkpoint()
        self._left = True
        self._channel.say("left")


def _fetcher(index: Index, access: SourceOptions, *, founding: bool) -> Fetcher:
    """Of a later worker, what has become of the source is the affair of those who read from it."""
    try:
        return fetcher_for(index, access)
    except ClipfsError as error:
        if founding:
            raise
        log.error("%s", error)
        return NoFetcher(error)


def _disk_cache(options: MountOptions, *, founding: bool) -> DiskCache | None:
    """The cache on disk; none, and a warning, for a user who has no place for it. One that was named has to do."""
    try:
        directory = state.spans_dir(options.cache_dir)
    except ClipfsError as error:
        if founding and options.cache_dir is not None:
            raise
        log.warning("there is no cache on disk: %s", error)
        return None
    return DiskCache(directory, options.cache_size, compress=options.cache_compression)


def _planned(index: Index, options: MountOptions, *, founding: bool) -> list[trace.Place]:
    """The spans to fetch before anybody asks for them. A trace that was named has to be one."""
    if options.prefetch == "none":
        return []
    if options.prefetch == "all":
        return trace.everything(index.layers)
    named = options.prefetch != "trace"
    try:
        path = Path(options.prefetch) if named else _trace_path(index)
        return trace.load(path, index.layers) if named or path.exists() else []
    except ClipfsError as error:
        if founding and named:
            raise
        log.warning("there is no trace to go by: %s", error)
        return []


def _save_trace(index: Index, reader: BlockReader) -> None:
    """Keep what this run needed for the next one, after what earlier runs did."""
    try:
        path = _trace_path(index)
        try:
            known = trace.load(path, index.layers) if path.exists() else []
        except ClipfsError:
            known = []  # of another version, or what a machine that lost power has left of it
        if reader.wanted.keys() - set(known):
            trace.save(path, dict.fromkeys([*known, *reader.wanted]))
    except (ClipfsError, OSError) as error:
        log.warning("cannot keep the trace of this run: %s", error)


def _trace_path(index: Index) -> Path:
    return state.cache_dir() / "traces" / f"{index.spans_digest}.trace"


async def _cancel_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()
