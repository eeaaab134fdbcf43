"""Cleaning up after containers whose owners were killed: processes, mounts, cgroups, directories.

A container whose owner lives is never touched, however it looks: its lock says so (see `container`).
"""

from __future__ import annotations

import logging
from pathlib import Path

import clipfs
from assembler import kernel
from assembler.container import Container
from assembler.overlay import remove_kept_work
from assembler.runtime import recorded

_log = logging.getLogger("assembler")


def gc(base: Path, *, kept: bool = False) -> list[str]:
    """Clean up below `base` and return the ids of what was found; with `kept`, of containers left on purpose too.

    What cannot be removed is logged and left, for another time; the rest is cleaned up all the same.
    """
    cleaned = []
    for container in Container.abandoned(base, kept=kept):
        try:
            _end(container)
            container.close()
            cleaned.append(container.id)
        except (clipfs.ClipfsError, OSError) as error:
            _log.warning("cannot clean up container %s: %s", container.id, error)
        finally:
            container.release()
    return cleaned


def _end(container: Container) -> None:
    """The way back from wherever its owner was killed: process, overlay, the lower's mount, a kept upper's work."""
    if (runtime := recorded(container)) is not None:
        # Its owner may have been killed in the middle of a call, which goes on without it.
        _log.info("waiting for the runtime of container_id=%s", container.id)
        runtime.settle()
        runtime.delete()
    # Unmounting a FUSE lower also ends the process that serves it.
    for place in kernel.mounts_below(container.path):
        kernel.unmount(place)
    remove_kept_work(container)
