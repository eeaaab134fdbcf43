"""The data space of an index as a file system with one file, ``data``: where the kernel's EROFS reads contents from."""

from __future__ import annotations

import stat

from clipfs.erofs.structs import BLOCK, Node
from clipfs.format.index import Index

NAME = b"data"

_ROOT, _DATA = 1, 2


class DataSpace:
    """What `fs.ClipFS` asks of an index. The file's offsets are addresses of the data space, up to a whole block."""

    root = _ROOT
    inodes = 2

    def __init__(self, index: Index) -> None:
        self.data_size = -(-index.data_size // BLOCK) * BLOCK

    def inode(self, nid: int) -> Node:
        directory = nid == _ROOT
        mode = stat.S_IFDIR | 0o500 if directory else stat.S_IFREG | 0o400
        size = 0 if directory else self.data_size
        return Node(nid, mode, uid=0, gid=0, size=size, mtime_ns=0, nlink=1, rdev=0, address=0)

    def lookup(self, nid: int, name: bytes) -> int:
        return {b".": _ROOT, b"..": _ROOT, NAME: _DATA}.get(name, 0) if nid == _ROOT else 0

    def entries(self, nid: int) -> list[tuple[bytes, int]]:
        return [(NAME, _DATA)] if nid == _ROOT else []

    def parent(self, nid: int) -> int:
        del nid
        return _ROOT

    def readlink(self, nid: int) -> bytes:
        del nid
        return b""

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        del nid
        return {}
