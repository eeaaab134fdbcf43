"""``clipfs mount``: what serves the image begins to load first, and this process loads what it needs meanwhile."""

from __future__ import annotations

import argparse

from clipfs.mounting.daemon import Standby


def mount(args: argparse.Namespace) -> int:
    """Mount, and return when the root answers; with -f serve until somebody unmounts it."""
    if args.foreground:
        from clipfs.cli import mounts

        return mounts.serve(args)
    with Standby() as standby:
        from clipfs.cli import mounts

        return mounts.mount(args, standby)
