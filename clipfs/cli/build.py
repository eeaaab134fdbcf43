"""``clipfs index``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from clipfs.building.builder import build
from clipfs.cli.options import check_name, platform_of
from clipfs.cli.progress import progress, size
from clipfs.mounting.options import byte_count


def index(args: argparse.Namespace) -> int:
    """Make the .clip and say what it is."""
    check_name(args.image)
    out = args.output or Path(_file_name(args.image))
    report = build(
        args.image,
        out,
        platform=platform_of(args),
        progress=progress(),
        insecure=args.insecure,
        authfile=args.authfile,
        ca=args.ca,
        span_size=byte_count(args.span_size, "--span-size"),
    )
    for warning in report.warnings:
        print(f"clipfs: {warning}", file=sys.stderr)
    share = report.clip_size / report.compressed if report.compressed else 0.0
    print(
        f"{report.path}: {report.inodes} inodes, {report.layers} layers of {size(report.compressed)} "
        f"({size(report.uncompressed)} unpacked), index {size(report.clip_size)} ({share:.2%}), "
        f"{report.seconds:.1f} s"
    )
    return 0


def _file_name(image: str) -> str:
    """A file name that the image's own name suggests: ``docker://ghcr.io/a/app:v1`` gives ``app-v1.clip``. An address
    has a part that may be a secret, its query."""
    last = image.split("@")[0].split("?")[0].rstrip("/").rsplit("/", 1)[-1].removesuffix(".clip")
    return re.sub(r"[^A-Za-z0-9._]+", "-", last).strip("-.") + ".clip"
