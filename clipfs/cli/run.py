"""``clipfs run``: what serves the image begins to load first, and this process loads what it needs meanwhile."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipfs.errors import UsageError
from clipfs.mounting.daemon import Standby


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code is its own."""
    directory = _directory(args.target)
    if directory is not None:
        from clipfs.cli.container import run_directory

        return run_directory(args, directory)
    with Standby() as standby:
        from clipfs.cli import container

        return container.run(args, standby)


def _directory(target: str) -> Path | None:
    """X as an unpacked root: a path that says so itself (``/srv/root``, ``./root``), never a bare name."""
    if not (target.startswith(("/", "./", "../")) or target in (".", "..")):
        return None
    path = Path(target)
    if path.is_dir():
        return path.absolute()
    if not path.exists():
        raise UsageError(f"there is no {target}; an image is named HOST/REPO:TAG or oci:DIR, without / or . in front")
    return None
