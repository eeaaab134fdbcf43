"""A full picture of a file tree, and the differences between two: what the oracle tests compare.

A `Picture` holds, for every path below a directory, all that a container could tell: whatever lstat, readlink,
listxattr and reading show. This module asks the kernel and knows nothing of images, so it sees a mount and an unpacked
tree with the same eyes.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

Picture = dict[bytes, "Facts"]


class Facts(NamedTuple):
    """What there is to know of one path.

    size: 0 for directories, whose size is an affair of the file system and not of the image.
    names: all paths of the tree that lead to this very inode.  sha256: of a regular file's contents.
    """

    type: str
    mode: str
    uid: int
    gid: int
    size: int
    mtime_ns: int
    nlink: int
    names: tuple[bytes, ...]
    target: bytes
    rdev: tuple[int, int]
    xattrs: Mapping[bytes, bytes]
    sha256: str


_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def picture(top: Path) -> Picture:
    """Of `top`, which is ``b""``, and of everything below it."""
    found = dict(_walk(os.fsencode(top)))
    names: dict[tuple[int, int], list[bytes]] = {}
    for path, (_, inode) in found.items():
        names.setdefault(inode, []).append(path)
    return {path: facts._replace(names=tuple(sorted(names[inode]))) for path, (facts, inode) in found.items()}


def _walk(top: bytes) -> Iterator[tuple[bytes, tuple[Facts, tuple[int, int]]]]:
    pending = [b""]
    while pending:
        path = pending.pop()
        full = os.path.join(top, path) if path else top
        about = os.lstat(full)
        yield path, (_facts(full, about), (about.st_dev, about.st_ino))
        if stat.S_ISDIR(about.st_mode):
            pending += [os.path.join(path, name) for name in os.listdir(full)]


def _facts(full: bytes, about: os.stat_result) -> Facts:
    kind = stat.S_IFMT(about.st_mode)
    device = kind in (stat.S_IFCHR, stat.S_IFBLK)
    return Facts(
        type=_TYPES[kind],
        mode=oct(stat.S_IMODE(about.st_mode)),
        uid=about.st_uid,
        gid=about.st_gid,
        size=0 if kind == stat.S_IFDIR else about.st_size,
        mtime_ns=about.st_mtime_ns,
        nlink=about.st_nlink,
        names=(),
        target=os.readlink(full) if kind == stat.S_IFLNK else b"",
        rdev=(os.major(about.st_rdev), os.minor(about.st_rdev)) if device else (0, 0),
        xattrs={
            os.fsencode(name): os.getxattr(full, name, follow_symlinks=False)
            for name in os.listxattr(full, follow_symlinks=False)
        },
        sha256=_sha256(full) if kind == stat.S_IFREG else "",
    )


def _sha256(path: bytes) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(found: Picture, expected: Picture) -> list[str]:
    """A line for each path that only one has, and for each fact of which they differ."""
    lines = []
    for path in sorted(found.keys() | expected.keys()):
        if path not in found:
            lines.append(f"{path!r} is missing")
        elif path not in expected:
            lines.append(f"{path!r} should not be there: {found[path].type}")
        else:
            lines += [
                f"{path!r}: {name} is {is_!r}, should be {should!r}"
                for name, is_, should in zip(Facts._fields, found[path], expected[path], strict=True)
                if is_ != should
            ]
    return lines
