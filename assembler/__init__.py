"""Containers from a read-only root: an overlay with a seeded upper, an OCI bundle, and a runtime to run it.

The lower may be a mounted ClipFS or any unpacked directory; the command's exit code comes back.

    import assembler, clipfs

    with clipfs.mount("debian.clip", "/mnt"), clipfs.Index.open("debian.clip") as index:
        options = assembler.RunOptions(command=("cat", "/etc/os-release"), remove=True)
        code = assembler.run(Path("/mnt"), index.config, options, Path("/run/containers"), archive="v2 (OCI)")
"""

from __future__ import annotations

from assembler.container import Container
from assembler.errors import RunError
from assembler.events import Events
from assembler.gc import gc
from assembler.options import RunOptions, Volume
from assembler.overlay import ContainerOverlay
from assembler.runner import run, run_in
from assembler.spec import runtime_spec
from assembler.upper import REQUIRED, seed

__all__ = [
    "REQUIRED",
    "Container",
    "ContainerOverlay",
    "Events",
    "RunError",
    "RunOptions",
    "Volume",
    "gc",
    "run",
    "run_in",
    "runtime_spec",
    "seed",
]
