"""Which tests may run beside others, and that no others do: of several workers (pytest-xdist), one gets all those that
want the machine to themselves.

Those that may judge bytes and sentences, by no clock, and count nothing that is the whole machine's. They have a low
priority, so that they run on the core that the others leave idle.
"""

from __future__ import annotations

import os
from pathlib import PurePath

import pytest
from xdist.scheduler import LoadScopeScheduling

_MODULES = frozenset(
    f"test_{name}"
    for name in (
        "builder", "check", "codec", "deflate", "extract", "format", "fuzz", "gnu_tar", "hostile", "layer", "members",
        "names", "oci", "oracle", "pack", "pax", "pieces", "reads", "sources", "spans", "sparse", "toc", "toc_images",
        "tree", "tree_limits", "tree_oracle", "zstd_spans",
    )
)  # fmt: skip


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # untyped
    """Of what wants the machine to itself, all goes to whoever gets the first of it; the rest to who has time."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if PurePath(nodeid.partition("::")[0]).stem in _MODULES else "alone"


def is_beside_others(item: pytest.Item) -> bool:
    """Whether others may be running while this test does. If so, its thread's priority is the lowest from now on."""
    beside = hasattr(item.config, "workerinput") and item.path.stem in _MODULES
    if beside:
        os.nice(19)
    return beside
