"""What the library does by trio, for callers without."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from clipfs.errors import UsageError

T = TypeVar("T")


def run(main: Callable[[], Awaitable[T]]) -> T:
    """`trio.run`. UsageError where that is running already, which `main` would hold up."""
    if trio.lowlevel.in_trio_run():
        raise UsageError("this function blocks; inside of trio call it as `await trio.to_thread.run_sync(…)`")
    return trio.run(main)
