"""Layers applied in order -> one tree of inodes, and the places of all file contents in the data space.

This module owns what a later layer does to an earlier one: replace, merge, delete (OCI image spec, "Layer Filesystem
Changeset"). It does not know how entries were stored in a layer, nor how the tree will be written down.

The spec lets whiteouts hide what lower layers have, never what their own layer brings, in whatever order they stand.
So a layer is applied in two steps: its whiteouts first, then its members.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator

from clipfs.erofs import BLOCK, XATTR_PREFIXES, Inode, is_whiteout, is_xattr_name
from clipfs.errors import ImageError, shown
from clipfs.format import Extent
from clipfs.layer import Entry, Member, Opaque, Whiteout

# As the kernel's MAXSYMLINKS: a path that needs more is a loop.
_MAX_LINKS = 40


class Tree:
    """The tree so far. `warnings` says in a sentence each what an image held that the result cannot."""

    def __init__(self) -> None:
        self.root = _implied()
        self.warnings: list[str] = []
        self.inodes = 0
        # Parents resolved before, by path: members of a directory follow each other. Emptied when a path may lead
        # elsewhere than it did.
        self._parents: dict[bytes, Inode] = {}

    def apply(self, layer: int, entries: Iterable[Entry]) -> None:
        """Put layer number `layer` on top. ImageError names the entry that cannot be applied."""
        self._parents.clear()
        members: list[Member] = []
        for entry in entries:
            if isinstance(entry, Member):
                members.append(entry)
            else:
                self._delete(entry)
        self._parents.clear()
        for member in members:
            self._add(layer, member)

    def _delete(self, entry: Whiteout | Opaque) -> None:
        try:
            if isinstance(entry, Opaque):
                directory = self._find(entry.path, follow=True)
                if directory is not None and directory.children is not None:
                    directory.children.clear()
                return
            above, _, name = entry.path.rpartition(b"/")
            directory = self._find(above, follow=True)
            if directory is not None and directory.children is not None:
                directory.children.pop(name, None)
        except _LinkLoopError:
            raise ImageError(_LOOP, member=entry.path, offset=entry.offset) from None

    def _add(self, layer: int, member: Member) -> None:
        above, _, name = member.path.rpartition(b"/")
        if not name:
            self._dress_root(member)
            return
        siblings = self._parent(above, member).children
        assert siblings is not None  # noqa: S101  _parent returns directories only
        before = siblings.get(name)
        if member.hardlink:
            inode = self._link_target(member)
            if inode is before:
                return
        else:
            inode = self._inode(layer, member)
            if before is not None and before.children is not None and inode.children is not None:
                inode.children = before.children
        if before is not None and (before.children is not None or before.target):
            self._parents.clear()
        if is_whiteout(inode.mode, inode.rdev):
            self.warnings.append(f"device {shown(member.path)} is left out: 0:0 would be a whiteout to overlayfs")
            siblings.pop(name, None)
        else:
            siblings[name] = inode

    def _dress_root(self, member: Member) -> None:
        if member.hardlink or not stat.S_ISDIR(member.mode):
            raise ImageError("the root of an image must be a directory", member=b"/", offset=member.offset)
        children, self.root = self.root.children, self._inode(0, member)
        self.root.children = children
        self._parents.clear()

    def _inode(self, layer: int, member: Member) -> Inode:
        kind = stat.S_IFMT(member.mode)
        return Inode(
            member.mode,
            member.uid,
            member.gid,
            member.mtime_ns,
            member.size if kind == stat.S_IFREG else 0,
            member.rdev,
            member.link if kind == stat.S_IFLNK else b"",
            self._xattrs(member) if member.xattrs else {},
            {} if kind == stat.S_IFDIR else None,
            1,
            tuple((at, layer, offset, length) for at, offset, length in member.segments if length),
        )

    def _xattrs(self, member: Member) -> dict[bytes, bytes]:
        kept = {}
        for name, value in member.xattrs.items():
            if any(is_xattr_name(name, prefix) for prefix in XATTR_PREFIXES.values()):
                kept[name] = value
            else:
                self.warnings.append(f"xattr {shown(name)} of {shown(member.path)} is left out: no image may set it")
        return kept

    def _link_target(self, member: Member) -> Inode:
        above, _, name = member.link.rpartition(b"/")
        try:
            directory = self._find(above, follow=True)
        except _LinkLoopError:
            raise ImageError(_LOOP, member=member.path, offset=member.offset) from None
        found = directory.children.get(name) if directory is not None and directory.children is not None else None
        if found is None or found.children is not None:
            what = "which is a directory" if found is not None or not name else "which does not exist"
            raise ImageError(f"hard link to {shown(member.link)}, {what}", member=member.path, offset=member.offset)
        return found

    def _parent(self, path: bytes, member: Member) -> Inode:
        """The directory `path`, made where it is missing."""
        directory = self._parents.get(path)
        if directory is None:
            try:
                directory = self._find(path, follow=True, make=True)
            except _LinkLoopError:
                raise ImageError(_LOOP, member=member.path, offset=member.offset) from None
            if directory is None or directory.children is None:
                raise ImageError(
                    f"{shown(path)} is no directory, so nothing can be in it", member=member.path, offset=member.offset
                )
            self._parents[path] = directory
        return directory

    def _find(self, path: bytes, *, follow: bool, make: bool = False) -> Inode | None:
        """The inode at `path` with symlinks followed inside the root, None if there is none.

        make: directories that are missing come into being, also where a dangling link points.
        """
        trail, names, links = [self.root], path.split(b"/")[::-1], 0
        while names:
            name = names.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                # As in a chroot: above the root is the root.
                if len(trail) > 1:
                    trail.pop()
                continue
            children = trail[-1].children
            if children is None:
                return None
            inode = children.get(name)
            if inode is None:
                if not make:
                    return None
                inode = children[name] = _implied()
            if inode.target and (names or follow):
                links += 1
                if links > _MAX_LINKS:
                    raise _LinkLoopError
                names += inode.target.split(b"/")[::-1]
                if inode.target.startswith(b"/"):
                    del trail[1:]
            else:
                trail.append(inode)
        return trail[-1]

    def finish(self) -> tuple[list[Extent], int]:
        """Count links and lay out the data space: (extents by address, bytes of data space).

        Contents lie in the order of the layers, so that what was archived together is read together.
        """
        files: dict[int, Inode] = {}
        self.inodes = 0
        for inode in self._inodes():
            if inode.children is not None:
                self.inodes += 1
                inode.nlink = 2 + sum(child.children is not None for child in inode.children.values())
            elif id(inode) in files:
                inode.nlink += 1
            else:
                files[id(inode)] = inode
                self.inodes += 1
                inode.nlink = 1
        stored = [inode for inode in files.values() if inode.size]
        # A file without contents of its own (all hole) goes to the end; sorting is stable, so the order is the tree's.
        stored.sort(key=lambda inode: inode.segments[0][1:3] if inode.segments else (1 << 32, 0))
        extents, end = [], 0
        for inode in stored:
            inode.address = end
            extents += [Extent(end + at, layer, offset, size) for at, layer, offset, size in inode.segments]
            end += -(-inode.size // BLOCK) * BLOCK
        return extents, end

    def _inodes(self) -> Iterator[Inode]:
        """Every name's inode, in the order of the names; one with two names comes twice."""
        pending = [self.root]
        while pending:
            inode = pending.pop()
            yield inode
            if inode.children:
                pending += [inode.children[name] for name in sorted(inode.children, reverse=True)]


_LOOP = "too many symbolic links on the way"


class _LinkLoopError(Exception):
    """More than `_MAX_LINKS` links were followed; the caller knows for which entry."""


def _implied() -> Inode:
    """A directory that no layer describes: what `mkdir` would make of it, at the epoch."""
    return Inode(stat.S_IFDIR | 0o755, children={})
