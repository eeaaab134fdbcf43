"""One mount from its clip to its end: what a supervisor needs before it has one, and what is told when it is over."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from clipfs.aside import written_aside
from clipfs.blocks.counters import Counters
from clipfs.blocks.journal import Journal
from clipfs.errors import ClipfsError
from clipfs.format.index import Index
from clipfs.log import Listener
from clipfs.mounting import views
from clipfs.mounting.checked import checked
from clipfs.mounting.child import Child
from clipfs.mounting.connection import Connection
from clipfs.mounting.control import Job
from clipfs.mounting.options import MountOptions
from clipfs.mounting.supervisor import Supervisor, held_signals
from clipfs.state import MountRecord, Process

log = logging.getLogger(__name__)

# A worker that is not there after this time is not slow but stuck.
_START_SECONDS = 30.0

# Of two processes that the kernel may kill for their memory, it is to be the one that can be replaced.
_OOM_ADJUSTMENT = -900


def serve(
    clip: Path,
    mountpoint: str,
    options: MountOptions,
    on_ready: Callable[[MountRecord], None],
    worker: Child | None = None,
    origin: int | None = None,
) -> None:
    """Mount `clip` on the directory `mountpoint` (as `mountinfo.canonical` spells it) and see to it until the end.

    The end comes when somebody unmounts it, or with SIGTERM or SIGINT, which unmount it whoever uses it. `on_ready` is
    called when the mount is there. No network is used before a read needs it. worker: one that has been started
    already; it is this function's from now on. origin: a descriptor of the mount namespace that this process has come
    from, for those who do its work.
    """
    with ExitStack() as stack:
        began = time.monotonic()
        # It loads what it needs meanwhile.
        idle = [worker or Child(origin)]
        stack.callback(_destroy, idle)
        copy = stack.enter_context(checked(clip))
        original = os.open(clip, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, original)
        index = stack.enter_context(Index.open(f"/proc/self/fd/{copy.descriptor}", shown=clip))
        source = options.source or index.source
        name = options.name or str(clip)
        me = Process.current()
        record = MountRecord(me, mountpoint, str(clip), source, device="", name=name, copy=copy.path)
        signals = stack.enter_context(held_signals())
        # First the record, then what it tells of: whatever moment we are killed at, `gc` finds the rest.
        record.save()
        stack.callback(record.remove)
        counters = stack.enter_context(contextlib.closing(Counters.create(record.counters)))
        journal = stack.enter_context(contextlib.closing(Journal(record.journal, began=began)))
        stack.enter_context(Listener(journal.said, lambda: None))
        files = [os.open(file, os.O_RDWR | os.O_CLOEXEC) for file in (record.counters, record.journal)]
        for descriptor in files:
            stack.callback(os.close, descriptor)
        stack.enter_context(_metrics(index, record, counters, options.metrics))
        oom = _shield(stack)

        def begin(connection: Connection, view: str) -> Child:
            job = Job(
                fuse=connection.descriptor,
                index=copy.descriptor,
                clip=original,
                counters=files[0],
                journal=files[1],
                log=2,
                view=view,
                path=str(clip),
                source=source,
                process=record.process,
                began=began,
                level=logging.getLogger().getEffectiveLevel(),
                oom=oom,
                xattrs=copy.xattrs,
                founding=bool(idle),
                options=options,
            )
            child = idle.pop() if idle else Child(origin)
            child.give(job)
            return child

        plan = views.Plan(name, mountpoint, copy.path, options)
        supervisor = Supervisor(views.make(plan, begin, _START_SECONDS), record, begin)
        try:
            supervisor.run(on_ready, signals)
        finally:
            if options.report is not None:
                _save_report(index, record, counters, options.report)


def _destroy(workers: list[Child]) -> None:
    for worker in workers:
        worker.destroy()


@contextmanager
def _metrics(index: Index, record: MountRecord, counters: Counters, address: str | None) -> Iterator[None]:
    """Meanwhile, serve the counters to who wants to see them, if that was asked for."""
    if address is None:
        yield
        return
    # Late, for few ask for it.
    from clipfs.reports import metrics

    image_bytes = sum(layer.size for layer in index.layers)
    labels = {"mountpoint": record.mountpoint, "clip": record.clip, "source": record.source}
    with metrics.served(address, counters.asdict, image_bytes, labels):
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


def _shield(stack: ExitStack) -> int | None:
    """Make this process the last to be killed for want of memory; what workers are to be again, if it is allowed."""
    path = Path("/proc/self/oom_score_adj")
    try:
        before = int(path.read_text())
        path.write_text(str(_OOM_ADJUSTMENT))
    except (OSError, ValueError):
        return None
    stack.callback(path.write_text, str(before))
    return before
