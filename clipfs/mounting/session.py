"""Serving one mount: from an open index to the end of the FUSE session, in this process.

pyfuse3 keeps its session in module globals, so a process serves one mount. This module owns the session's life: the
mount itself, signals, the record, and that all of it is gone at the end. How a process gets into the background is
`daemon`'s affair. Imports trio and pyfuse3; whoever forks imports this afterwards.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pyfuse3
import trio

from clipfs import state
from clipfs.aside import written_aside
from clipfs.blocks import trace
from clipfs.blocks.counters import Counters
from clipfs.blocks.disk import DiskCache
from clipfs.blocks.journal import Journal
from clipfs.blocks.reader import BlockReader, Tiers
from clipfs.errors import ClipfsError, MountError
from clipfs.format.index import Index
from clipfs.log import Listener
from clipfs.mounting import loop, mountinfo
from clipfs.mounting.fs import ClipFS
from clipfs.mounting.options import MountOptions
from clipfs.sources.fetcher import SourceOptions
from clipfs.sources.packed import fetcher_for
from clipfs.state import MountRecord, Process

log = logging.getLogger(__name__)

# Spans on their way at the same time that nobody has asked for: enough to fill a range or two.
_AHEAD_AT_ONCE = 8

# Requests handled at the same time. Each that waits for the network holds one, and lookups must still get through.
_TASKS = 1000


def serve(clip: Path, mountpoint: str, options: MountOptions, on_ready: Callable[[MountRecord], None]) -> None:
    """Mount `clip` on the directory `mountpoint` (as `mountinfo.canonical` spells it) and serve it until the end.

    The end comes when somebody unmounts it, or with SIGTERM or SIGINT, which unmount it whoever uses it. `on_ready` is
    called when the mount is there and its requests are about to be answered. No network is used before a read needs it.
    """
    with Index.open(clip) as index:
        source = options.source or index.source
        record = MountRecord(Process.current(), mountpoint, str(clip), source, device="")
        # First the record, then what it tells of: whatever moment we are killed at, `gc` finds the rest.
        record.save()
        try:
            trio.run(_serve, index, record, options, on_ready)
        finally:
            record.remove()


async def _serve(
    index: Index, record: MountRecord, options: MountOptions, on_ready: Callable[[MountRecord], None]
) -> None:
    access = SourceOptions(name=record.source, insecure=options.insecure, authfile=options.authfile, ca=options.ca)
    fetcher = fetcher_for(index, access)
    reader = BlockReader(
        index,
        fetcher,
        counters=Counters.create(record.counters),
        tiers=Tiers(options.cache, _disk_cache(options)),
        journal=Journal(record.journal),
    )
    planned = _planned(index, options)
    # A terminal that goes away is no reason to take a file system from under its users.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals, _observed(index, record, reader, options):
        _open_session(ClipFS(index, reader), record.mountpoint, _fuse_options(options.name or record.clip, options))
        unmounted = False
        try:
            record = replace(record, device=mountinfo.device_at(record.mountpoint))
            record.save()
            on_ready(record)
            async with fetcher, reader, trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on_signal, signals, nursery.cancel_scope)
                nursery.start_soon(reader.prefetch, planned, options.prefetch, _AHEAD_AT_ONCE)
                loop.install()
                await pyfuse3.main(max_tasks=_TASKS)
                # It returns when the kernel has ended the session. From here on the mountpoint may be somebody else's.
                unmounted = True
                nursery.cancel_scope.cancel()
        finally:
            # Closing aborts the connection, so that unmounting cannot wait for answers that we no longer give.
            pyfuse3.close(unmount=False)
            _save_trace(index, reader)
            if options.report is not None:
                _save_report(index, record, reader.counters, options.report)
            if not unmounted:
                mountinfo.detach_dead(record.mountpoint, record.device)


def _disk_cache(options: MountOptions) -> DiskCache | None:
    """The cache on disk; none, and a warning, for a user who has no place for it."""
    try:
        directory = options.cache_dir or state.cache_dir() / "spans"
    except ClipfsError as error:
        log.warning("there is no cache on disk: %s", error)
        return None
    return DiskCache(directory, options.cache_size, compress=options.cache_compression)


def _planned(index: Index, options: MountOptions) -> list[trace.Place]:
    """The spans to fetch before anybody asks for them."""
    if options.prefetch == "none":
        return []
    if options.prefetch == "all":
        return trace.everything(index.layers)
    if options.prefetch != "trace":
        return trace.load(Path(options.prefetch), index.layers)
    try:
        path = _trace_path(index)
        return trace.load(path, index.layers) if path.exists() else []
    except ClipfsError as error:
        log.warning("there is no trace to go by: %s", error)
        return []


def _save_trace(index: Index, reader: BlockReader) -> None:
    """Keep what this run needed for the next one, after what earlier runs did."""
    try:
        path = _trace_path(index)
        known = trace.load(path, index.layers) if path.exists() else []
        if reader.wanted.keys() - set(known):
            trace.save(path, dict.fromkeys([*known, *reader.wanted]))
    except (ClipfsError, OSError) as error:
        log.warning("cannot keep the trace of this run: %s", error)


@contextmanager
def _observed(index: Index, record: MountRecord, reader: BlockReader, options: MountOptions) -> Iterator[None]:
    """While the mount is served: what is logged goes into the journal too, and who wants to may read the counters."""
    with ExitStack() as stack:
        stack.enter_context(Listener(reader.journal.said, reader.counters.retried))
        if options.metrics is not None:
            # Late, for few ask for it.
            from clipfs.reports import metrics

            image_bytes = sum(layer.size for layer in index.layers)
            labels = {"mountpoint": record.mountpoint, "clip": record.clip, "source": record.source}
            stack.enter_context(metrics.served(options.metrics, reader.counters.asdict, image_bytes, labels))
        yield


def _save_report(index: Index, record: MountRecord, counters: Counters, path: Path) -> None:
    # Late, for few ask for it.
    from clipfs.reports import reporter

    try:
        report = reporter.of_mount(index, record, counters.asdict(), serving=False)
        with written_aside(path) as aside:
            aside.write_text(report.to_json())
    except (ClipfsError, OSError) as error:
        log.warning("cannot write the report %s: %s", path, error)


def _trace_path(index: Index) -> Path:
    return state.cache_dir() / "traces" / f"{index.spans_digest}.trace"


async def _cancel_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


def _open_session(ops: ClipFS, mountpoint: str, options: set[str]) -> None:
    """Open /dev/fuse and mount it. libfuse says why it failed on stderr only, which becomes the MountError."""
    with _stderr_captured() as words:
        try:
            pyfuse3.init(ops, mountpoint, options)
        except RuntimeError as error:
            why = words().removeprefix("fusermount3: ").removeprefix("fuse: ") or str(error)
            raise MountError(f"cannot mount on {mountpoint}: {why}") from None


def _fuse_options(name: str, options: MountOptions) -> set[str]:
    # Commas and backslashes mean something in a list of options, and pyfuse3 wants ASCII.
    fsname = name.encode("ascii", "replace").decode().replace("\\", "\\\\").replace(",", "\\,")
    chosen = {"ro", "default_permissions", f"fsname={fsname}", "subtype=clipfs"}
    chosen.add("suid" if options.suid else "nosuid")
    chosen.add("dev" if options.dev else "nodev")
    if options.noexec:
        chosen.add("noexec")
    if options.allow_other or (options.allow_other is None and os.geteuid() == 0):
        chosen.add("allow_other")
    return chosen


@contextmanager
def _stderr_captured() -> Iterator[Callable[[], str]]:
    """Standard error, of C code and child processes too, kept instead of shown; yields what tells it, in one line."""
    kept, saved = os.memfd_create("stderr"), os.dup(2)
    os.dup2(kept, 2)
    try:
        yield lambda: " ".join(os.pread(kept, 4096, 0).decode(errors="replace").split())
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(kept)
