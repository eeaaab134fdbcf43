"""``clipfs pack``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from clipfs.building.packer import pack as pack_up
from clipfs.cli.options import platform_of
from clipfs.cli.progress import progress, size
from clipfs.errors import UsageError
from clipfs.oci import not_empty
from clipfs.sources.fetcher import SourceOptions


def pack(args: argparse.Namespace) -> int:
    """Write one file that has everything in it, and say what came of it."""
    target: str = args.target
    not_empty(target)
    if target.endswith(".clip") and "://" not in target and not Path(target).is_file():
        raise UsageError(f"there is no file {target}")
    output = args.output or Path(_file_name(target))
    if Path(target).is_dir() and output.absolute().resolve().is_relative_to(Path(target).resolve()):
        raise UsageError(f"{output} would be in what is packed; name another place with -o")
    report = pack_up(
        target,
        output,
        platform=platform_of(args),
        progress=progress(),
        access=SourceOptions(name=args.source, insecure=args.insecure, authfile=args.authfile, ca=args.ca),
    )
    for warning in report.warnings:
        print(f"clipfs: {warning}", file=sys.stderr)
    print(
        f"{report.path}: {report.inodes} inodes, {size(report.content)} in files, {size(report.unique)} of it unique, "
        f"packed to {size(report.clip_size)} in {report.spans} spans, {report.seconds:.1f} s"
    )
    return 0


def _file_name(target: str) -> str:
    """A file name that what is packed suggests, and no index has."""
    if Path(target).is_dir():
        target = str(Path(target).resolve())
    last = target.split("@")[0].split("?")[0].rstrip("/").rsplit("/", 1)[-1].removesuffix(".clip")
    return re.sub(r"[^A-Za-z0-9._]+", "-", last).strip("-.") + ".packed.clip"
