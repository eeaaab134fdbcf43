"""A worker of a mount that first does what a test has put into $CLIPFS_TEST_PATCH, which is Python.

A worker is a new program, so nothing else of a test reaches it.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from clipfs.mounting import child, worker

if TYPE_CHECKING:
    import pytest


def patch_workers(monkeypatch: pytest.MonkeyPatch, patch: str) -> None:
    """Have workers that are started from now on run this Python first."""
    monkeypatch.setattr(child, "PROGRAM", "tests.patched_worker")
    monkeypatch.setenv("CLIPFS_TEST_PATCH", patch)


if __name__ == "__main__":
    exec(os.environ["CLIPFS_TEST_PATCH"])
    sys.exit(worker.main())
