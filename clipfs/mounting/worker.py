"""A worker: the process that answers the requests of one mount, until the mount, its supervisor or its work ends.

``python -m clipfs.mounting.worker N``: N is its end of the `control` socket, where its job comes from, for which it
waits when it has loaded everything. It begins as a new program, so that it is of whatever version is installed by then,
and gives up every right that it has no use for.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import struct
import sys
from pathlib import Path

from clipfs import log as logs
from clipfs.errors import ClipfsError, sentence
from clipfs.mounting import kernel
from clipfs.mounting.control import NUDGE, Channel, Job

log = logging.getLogger(__name__)

_NO_NEW_PRIVS = 38  # linux/prctl.h

# linux/capability.h. An image may be in the files of any user, and a log or a trace may have to go to them.
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2
_CAPABILITY_VERSION = 0x20080522


def main() -> int:
    """Do what comes over the socket; 0 when there is nothing more to do."""
    channel = Channel.inherited(int(sys.argv[1]))
    # Whoever ends a terminal or types Ctrl-C means the supervisor, who will tell.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    # Unlike one that is ignored, it ends a read(2) with EINTR.
    signal.signal(NUDGE, lambda *_: None)
    _restrict()
    try:
        # Late: an error in what it brings is told, too. Of what is imported, nothing will ever be garbage.
        gc.disable()
        from clipfs.mounting.session import serve

        gc.freeze()
        gc.enable()
        job = _job(channel)
        if job is not None:
            serve(job, channel)
    except BaseException as error:
        if not isinstance(error, ClipfsError):
            log.error("a worker has ended", exc_info=error)
        channel.say("failed", kind=type(error).__name__, sentence=sentence(error))
        return 1
    return 0


def _job(channel: Channel) -> Job | None:
    """What to do, when it is known, and from then on say things where they are to be said. None if there is nothing."""
    message, descriptors = channel.take()
    if message is None:
        return None
    job = Job.of_json(message["job"]).as_received(descriptors)
    for number in (1, 2):
        os.dup2(job.log, number)
    logs.to_stream(sys.stderr, job.level, form=job.options.log_format)
    if job.oom is not None:
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(job.oom))
    return job


def _restrict() -> None:
    """Give up what is not needed: new privileges, capabilities and core dumps."""
    # It has credentials and tokens in memory.
    kernel.undumpable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The usual 1024 are for programs that call select(2). Nothing here does, and files of the cache are kept open.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.geteuid() == 0:
        kept = 1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH
        # Effective, permitted, inheritable: the first 32 of each, then the others.
        header = struct.pack("<Ii", _CAPABILITY_VERSION, 0)
        if libc.capset(header, struct.pack("<6I", kept, kept, 0, 0, 0, 0)) != 0:
            log.warning("cannot give up capabilities: %s", os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    sys.exit(main())
