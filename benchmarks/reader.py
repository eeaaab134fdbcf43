"""The one who reads, the same for all peers: ``python reader.py HOW ROOT LIST`` in a process of its own.

LIST is a file with one path a line, relative to ROOT. Prints what was done as JSON: seconds, and how many of what
counts (files, entries or bytes). Imports next to nothing, so that a fresh process is soon at work.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable


def read(paths: list[str]) -> int:
    """Open, read to the end and close each; bytes."""
    total = 0
    buffer = bytearray(1 << 20)
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        while count := os.readv(descriptor, [buffer]):
            total += count
        os.close(descriptor)
    return total


def read_files(paths: list[str]) -> int:
    """As `read`; files."""
    read(paths)
    return len(paths)


def stat(paths: list[str]) -> int:
    """lstat each; paths."""
    for path in paths:
        os.lstat(path)
    return len(paths)


def missing(paths: list[str]) -> int:
    """lstat each, which is not there; paths."""
    for path in paths:
        try:
            os.lstat(path)
        except FileNotFoundError:
            continue
        raise SystemExit(f"{path} should not be there")
    return len(paths)


def walk(tops: list[str]) -> int:
    """List every directory and lstat every entry, as ``find -ls`` does; entries."""
    count = 0
    pending = tops
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)
                count += 1
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return count


def status(paths: list[str]) -> int:
    """lstat each, then list every directory for what is not among them, as ``git status`` does; paths and entries."""
    stat(paths)
    known = set(paths)
    count = len(paths)
    pending = ["."]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                count += 1
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.path[2:] not in known:
                    raise SystemExit(f"{entry.path} is not in the index")
    return count


HOW: dict[str, Callable[[list[str]], int]] = {
    "read": read,
    "files": read_files,
    "stat": stat,
    "walk": walk,
    "missing": missing,
    "status": status,
}


def main(how: str, root: str, listing: str) -> None:
    with open(listing) as lines:
        paths = lines.read().splitlines()
    os.chdir(root)
    action = HOW[how]
    started = time.perf_counter()
    count = action(paths)
    print(json.dumps({"seconds": time.perf_counter() - started, "count": count}))


if __name__ == "__main__":
    main(*sys.argv[1:])
