"""``clipfs inspect`` and ``clipfs ls``: what the index alone can tell; nothing is fetched."""

from __future__ import annotations

import argparse
import json
import os
import stat
import time
from collections.abc import Iterator
from typing import Any

from clipfs.cli.options import opened
from clipfs.cli.progress import size
from clipfs.errors import UsageError, printable
from clipfs.format.index import Index, Node


def inspect(args: argparse.Namespace) -> int:
    """What the image is made of."""
    with opened(args) as index:
        facts = _facts(index)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for line in _lines(facts):
        print(printable(line))
    return 0


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    config = facts["config"]
    yield f"source      {facts['source']}"
    yield f"manifest    {facts['manifest']}"
    yield f"platform    {facts['platform']}"
    yield f"inodes      {facts['inodes']}, {size(facts['data_size'])} of file data"
    yield f"{'packed' if facts['packed'] else 'index ':12}{size(facts['clip_size'])}, {facts['clip']}"
    yield f"command     {' '.join(config['entrypoint'] + config['cmd']) or '(none)'}"
    yield f"user        {config['user'] or 'root'}, in {config['working_dir'] or '/'}"
    for layer in facts["layers"]:
        yield (
            f"layer       {layer['digest']}  {layer['codec']:4}  {size(layer['size'])} "
            f"-> {size(layer['diff_size'])}, {layer['spans']} spans"
        )


def _facts(index: Index) -> dict[str, Any]:
    config = index.config
    return {
        "clip": str(index.path),
        "clip_size": os.path.getsize(index.path),
        "source": index.source,
        "packed": index.carries_data,
        "manifest": str(index.manifest.digest),
        "platform": str(config.platform),
        "inodes": index.inodes,
        "data_size": index.data_size,
        "config": {
            "entrypoint": list(config.entrypoint),
            "cmd": list(config.cmd),
            "env": list(config.env),
            "user": config.user,
            "working_dir": config.working_dir,
            "stop_signal": config.stop_signal,
            "volumes": list(config.volumes),
            "labels": dict(config.labels),
        },
        "layers": [
            {
                "digest": str(layer.digest),
                "diff_id": str(layer.diff_id),
                "media_type": layer.media_type,
                "codec": layer.codec.name.lower(),
                "size": layer.size,
                "diff_size": layer.diff_size,
                "spans": len(layer.spans),
            }
            for layer in index.layers
        ],
    }


def ls(args: argparse.Namespace) -> int:
    """List a directory, a tree, or one file."""
    with opened(args) as index:
        start = os.fsencode(args.path).strip(b"/")
        nid = resolve(index, args.path)
        node = index.inode(nid)
        if not stat.S_ISDIR(node.mode):
            _print(index, start, node, args.long)
        elif args.recursive:
            for path, below in index.walk(start, nid):
                _print(index, path or b".", below, args.long)
        else:
            for name, child in index.entries(nid):
                _print(index, name, index.inode(child), args.long)
    return 0


def resolve(index: Index, path: str) -> int:
    """The nid that `path` names, or a sentence why it names none."""
    try:
        return index.resolve(path)
    except OSError as error:
        raise UsageError(f"{path} in {index.path}: {error.strerror}") from error


def _print(index: Index, name: bytes, node: Node, long: bool) -> None:
    line = name
    if long:
        what = f"{os.major(node.rdev)},{os.minor(node.rdev)}" if _is_device(node.mode) else str(node.size)
        facts = f"{stat.filemode(node.mode)} {node.nlink:3} {node.uid:5} {node.gid:5} {what:>10}"
        line = f"{facts} {_when(node.mtime_ns // 10**9)} ".encode() + name
        if stat.S_ISLNK(node.mode):
            line += b" -> " + index.readlink(node.nid)
    print(printable(line.decode("utf-8", "backslashreplace")))


def _when(seconds: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (OSError, OverflowError):
        # A year that C has no number for: as ls(1) shows it. tmpfs keeps such times, and so do clips of directories.
        return f"{seconds:19}"


def _is_device(mode: int) -> bool:
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
