"""What the kernel is told of an inode, as pyfuse3 wants it, made from what the index says.

Each field that is set costs, so that as few as possible are, and what is made is used again.
"""

from __future__ import annotations

from collections.abc import Callable

from pyfuse3 import EntryAttributes

from clipfs.erofs.structs import Node

# Seconds that the kernel may believe us; 68 years, the most that fits where such numbers become 32-bit jiffies. As the
# float that pyfuse3 wants.
FOR_EVER = 2.0**31 - 1

# Entries kept before the table starts over, 0.4 KB each; the kernel keeps its own for ever.
_REMEMBERED = 4096


class Attributes:
    """The attributes of the inodes that `inode` knows, by number."""

    def __init__(self, inode: Callable[[int], Node]) -> None:
        self._inode = inode
        self._remembered: dict[int, EntryAttributes] = {}
        self._passing = EntryAttributes()
        self._passing.entry_timeout = self._passing.attr_timeout = FOR_EVER
        self._mtime_ns = 0  # of the inode that it is of

    def of(self, nid: int) -> EntryAttributes:
        """Remembered for a while, for who asks again."""
        known = self._remembered.get(nid)
        if known is not None:
            return known
        if len(self._remembered) >= _REMEMBERED:
            self._remembered.clear()
        entry = self._remembered[nid] = self.made(nid)
        return entry

    def made(self, nid: int) -> EntryAttributes:
        """For who keeps them."""
        node = self._inode(nid)
        entry = _filled(EntryAttributes(), node)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = node.mtime_ns
        entry.entry_timeout = entry.attr_timeout = FOR_EVER
        return entry

    def passing(self, nid: int) -> EntryAttributes:
        """For who has read them before anybody else runs: all get the same object. The times cost most, and files that
        are asked for one after the other often share them."""
        node = self._inode(nid)
        entry = _filled(self._passing, node)
        if node.mtime_ns != self._mtime_ns:
            entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._mtime_ns = node.mtime_ns
        return entry


def _filled(entry: EntryAttributes, node: Node) -> EntryAttributes:
    """With everything but times."""
    entry.st_ino = node.nid
    entry.st_mode = node.mode
    entry.st_nlink = node.nlink
    entry.st_uid = node.uid
    entry.st_gid = node.gid
    entry.st_rdev = node.rdev
    entry.st_size = size = node.size
    entry.st_blocks = (size + 511) // 512
    return entry
