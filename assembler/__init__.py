"""Containers from a read-only root: an overlay with a seeded upper, an OCI bundle, and a runtime to run it.

The lower may be a mounted ClipFS or any unpacked directory; the command's exit code comes back. The names below are
the library. They are imported when first used: a mount is made while what runs a container is still being loaded.

    import assembler, clipfs

    with clipfs.mount("debian.clip", "/mnt"), clipfs.Index.open("debian.clip") as index:
        options = assembler.RunOptions(command=("cat", "/etc/os-release"), remove=True)
        code = assembler.run(Path("/mnt"), index.config, options, Path("/run/containers"), archive="v2 (OCI)")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assembler.command import first_read
    from assembler.container import Container
    from assembler.errors import RunError
    from assembler.events import Events
    from assembler.garbage import gc
    from assembler.options import RunOptions, Volume
    from assembler.overlay import ContainerOverlay
    from assembler.runner import run, run_in
    from assembler.spec import runtime_spec
    from assembler.upper import REQUIRED, seed

_HOME = {
    "REQUIRED": "upper",
    "Container": "container",
    "ContainerOverlay": "overlay",
    "Events": "events",
    "RunError": "errors",
    "RunOptions": "options",
    "Volume": "options",
    "first_read": "command",
    "gc": "garbage",
    "run": "runner",
    "run_in": "runner",
    "runtime_spec": "spec",
    "seed": "upper",
}

__all__ = [
    "REQUIRED",
    "Container",
    "ContainerOverlay",
    "Events",
    "RunError",
    "RunOptions",
    "Volume",
    "first_read",
    "gc",
    "run",
    "run_in",
    "runtime_spec",
    "seed",
]


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'assembler' has no attribute {name!r}") from None
    return getattr(import_module(f"assembler.{home}"), name)
