"""``clipfs cache``: what is in the cache on disk, and keeping it in order."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clipfs import state
from clipfs.blocks.disk import LOCKS, DiskCache, Stored
from clipfs.cli.progress import progress, size
from clipfs.errors import ClipfsError, FormatError, printable
from clipfs.format.index import Index
from clipfs.mounting.options import byte_count

# EX_DATAERR of sysexits(3), as for everything else that is damaged.
_DAMAGED = 65


def cache(args: argparse.Namespace) -> int:
    """Do what is asked, and say what came of it; exit code 65 if `verify` found damage."""
    limit = byte_count(args.cache_size, "--cache-size") if args.cache_size else None
    if args.cache_dir is not None:
        if not args.cache_dir.is_dir():
            raise ClipfsError(f"there is no directory {args.cache_dir}")
        if not (args.cache_dir / LOCKS).is_file() and any(args.cache_dir.iterdir()):
            raise ClipfsError(f"{args.cache_dir} is no cache: nothing in it is from a mount with --cache-dir")
    directory = state.spans_dir(args.cache_dir)
    action: Callable[[DiskCache], tuple[dict[str, Any], str]] = _ACTIONS[args.what]
    facts, sentence = action(DiskCache(directory, limit))
    print(json.dumps(facts, indent=2) if args.json else sentence)
    return _DAMAGED if facts.get("damaged") else 0


def _ls(disk: DiskCache) -> tuple[dict[str, Any], str]:
    files = list(disk.stored())
    stored = {each.digest: each for each in files if each.current}
    images = sorted(_images(stored), key=lambda each: -each["bytes"])
    known = {digest for image in images for digest in image.pop("digests")}
    total = sum(each.size for each in files)
    other = total - sum(each.size for digest, each in stored.items() if digest in known)
    facts = {
        "directory": str(disk.directory),
        "spans": len(files),
        "bytes": total,
        "limit": disk.limit,
        "images": images,
        "other_bytes": other,
    }
    lines = [f"{disk.directory}: {len(files)} spans, {size(total)} of at most {size(disk.limit)}"]
    lines += [
        f"  {size(each['bytes']):>10}  {each['spans']} of {each['of']} spans of {each['source']}" for each in images
    ]
    if other:
        lines.append(f"  {size(other):>10}  of images whose index is not here, or of another version of clipfs")
    if len(images) > 1:
        lines.append("(what images share is counted with each of them)")
    return facts, "\n".join(map(printable, lines))


def _images(stored: dict[str, Stored]) -> Iterator[dict[str, Any]]:
    """What of the cache belongs to each image that has an index in the cache directory, or is mounted."""
    paths = {Path(record.clip) for record in state.records()} | set((state.cache_dir() / "index").glob("*.clip"))
    for path in sorted(paths):
        try:
            with Index.open(path) as index:
                digests = [
                    layer.spans.digest(number).hex() for layer in index.layers for number in range(len(layer.spans))
                ]
                source = index.source
        except (FormatError, ClipfsError):
            continue  # of another version, or just removed
        here = Counter(digest for digest in digests if digest in stored)
        if here:
            yield {
                "source": source,
                "clip": str(path),
                "spans": len(here),
                "of": len(set(digests)),
                "bytes": sum(stored[digest].size for digest in here),
                "digests": list(here),
            }


def _gc(disk: DiskCache) -> tuple[dict[str, Any], str]:
    before = sum(each.size for each in disk.stored())
    left = disk.trim(disk.limit)
    return _freed(disk, before, left)


def _prune(disk: DiskCache) -> tuple[dict[str, Any], str]:
    before = sum(each.size for each in disk.stored())
    return _freed(disk, before, disk.trim(0, stale=0))


def _freed(disk: DiskCache, before: int, left: int) -> tuple[dict[str, Any], str]:
    freed = max(0, before - left)
    facts = {"directory": str(disk.directory), "freed": freed, "bytes": left, "limit": disk.limit}
    return facts, f"{disk.directory}: {size(freed)} freed, {size(left)} left"


def _verify(disk: DiskCache) -> tuple[dict[str, Any], str]:
    stored, shown = sorted(each for each in disk.stored() if each.current), progress()
    shown.begin("verifying", sum(each.size for each in stored))
    damaged: list[Stored] = []
    left: list[Stored] = []
    why: str | None = None
    for each in stored:
        if not disk.verify(each.digest):
            damaged.append(each)
            try:
                disk.remove(bytes.fromhex(each.digest))
            except OSError as error:
                left.append(each)
                why = error.strerror
        shown.advance(each.size)
    shown.end()
    lost, kept = (sum(each.size for each in some) for some in (damaged, left))
    facts = {
        "directory": str(disk.directory),
        "spans": len(stored),
        "bytes": sum(each.size for each in stored),
        "damaged": [each.digest for each in damaged],
        "damaged_bytes": lost,
        "not_removed": [each.digest for each in left],
    }
    sentence = f"{disk.directory}: {len(stored) - len(damaged)} of {len(stored)} spans are good"
    if len(damaged) > len(left):
        sentence += f"; removed {len(damaged) - len(left)} that were not, {size(lost - kept)}"
    if left:
        sentence += f"; could not remove {len(left)} that are not, {size(kept)}: {why}"
    return facts, sentence


_ACTIONS = {"ls": _ls, "gc": _gc, "prune": _prune, "verify": _verify}
