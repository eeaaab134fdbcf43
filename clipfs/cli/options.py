"""What several commands take from the line: the image X and where it comes from."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipfs.errors import UsageError
from clipfs.format.index import Index
from clipfs.oci import Platform, not_empty


def clip_of(args: argparse.Namespace) -> Path:
    """The .clip that X means: itself, or the cached index of an image, made first if need be."""
    target: str = args.target
    path = Path(target)
    if path.is_file():
        wanted = platform_of(args)
        if wanted is not None:
            with Index.open(path) as index:
                index.demand(wanted)
        return path.absolute()
    # Late: a .clip that is at hand needs neither trio nor a client, which take a third of the time to its first byte.
    from clipfs.building.builder import index_for
    from clipfs.cli.progress import progress
    from clipfs.sources.place import is_url

    if target.endswith(".clip") and not is_url(target):
        raise UsageError(f"there is no file {target}; make it with `clipfs index IMAGE -o {target}`")
    check_name(target)
    return index_for(
        target,
        platform=platform_of(args),
        progress=progress(),
        insecure=args.insecure,
        authfile=args.authfile,
        ca=args.ca,
    )


def check_name(target: str) -> None:
    """UsageError if that is empty, or the bare path of something: no registry is asked for what a person sees here."""
    not_empty(target)
    if os.path.isdir(target):
        what = f"a layout is named oci:{target}, a directory to run in {os.path.join('.', target)}"
    elif os.path.exists(target):
        what = f"an archive is named oci-archive:{target} or docker-archive:{target}"
    else:
        return
    raise UsageError(f"'{target}' is here, and is no image's name; {what}, and what a registry has docker://…")


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Index]:
    """The index that X means, open."""
    index = Index.open(clip_of(args))
    try:
        yield index
    finally:
        index.close()


def platform_of(args: argparse.Namespace) -> Platform | None:
    """What --platform asks for; None means this machine's."""
    return Platform.parse(args.platform) if args.platform else None


def containers_dir() -> Path:
    """Where containers live while they run: $CLIPFS_CONTAINERS, or /var/lib/clipfs/containers.

    On a disk, because what a container writes is there.
    """
    return Path(os.environ.get("CLIPFS_CONTAINERS") or "/var/lib/clipfs/containers")
