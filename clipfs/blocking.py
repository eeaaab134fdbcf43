"""What the library does by trio, for callers without; and what must not be called by those who have it running."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from clipfs.errors import UsageError

T = TypeVar("T")


def run(main: Callable[[], Awaitable[T]]) -> T:
    """`trio.run`. UsageError where that is running already, which `main` would hold up."""
    check("this function", "…")
    # Late: who mounts checks only.
    import trio

    return trio.run(main)


def check(what: str, call: str) -> None:
    """UsageError inside of trio: `what` blocks, and what is to be run in a thread instead is `call`."""
    if "trio" in sys.modules and sys.modules["trio"].lowlevel.in_trio_run():
        raise UsageError(f"{what} blocks; inside of trio call it as `await trio.to_thread.run_sync({call})`")
