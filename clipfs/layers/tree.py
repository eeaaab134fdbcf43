"""Layers applied in order -> one tree of inodes, and the places of all file contents in the data space.

This module owns what a later layer does to an earlier one: replace, merge, delete (OCI image spec, "Layer Filesystem
Changeset"). It does not know how entries were stored in a layer, nor how the tree will be written down.

The spec lets whiteouts hide what lower layers have, never what their own layer brings, in whatever order they stand.
So a layer is applied in two steps: its whiteouts first, then its members.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Collection, Iterable, Iterator

from clipfs.erofs.structs import BLOCK, MAX_NAME, XATTR_PREFIXES, Inode, is_whiteout, is_xattr_name
from clipfs.errors import ImageError, shown
from clipfs.format.container import Extent
from clipfs.layers import bounds
from clipfs.layers.layer import Entry, Member, Opaque, Whiteout

# As the kernel's MAXSYMLINKS: a path that needs more is a loop.
_MAX_LINKS = 40

# Several times the largest images there are.
MAX_INODES = 1 << 23

# A directory that no member describes counts as so many inodes: images have few, a name can imply two thousand.
_IMPLIED = 8

# Parts of symlinks' targets that ways through an image may lead over, in all. Ways that members say themselves cost
# no more than reading them did; but a few symlinks could make of each short name a long way.
_MAX_DETOURS = 1 << 25

# More warnings than this are read by nobody, and a hostile image could ask for any number.
_MAX_WARNINGS = 100

# Linux has no permissions on symlinks: whatever an archive says, this is what they show when they are unpacked.
_SYMLINK = stat.S_IFLNK | 0o777

_Children = dict[bytes, Inode]


class Tree:
    """The tree so far. `warnings` says in a sentence each what an image held that the result cannot; `inodes` is how
    many there are when the tree is finished. `budget` is for those who read the layers."""

    def __init__(self) -> None:
        self.root = _implied()
        self.warnings: list[str] = []
        self.inodes = 0
        self.budget = bounds.Budget()
        self._made = 0
        self._unsaid = 0
        # Parents resolved before, by path: members of a directory follow each other. Emptied when a path may lead
        # elsewhere than it did.
        self._parents: dict[bytes, _Children] = {}
        self._detours = 0
        # Of the layer being applied: hard links' targets that it may delete, and names of whiteouts of overlayfs.
        self._linked: dict[bytes, Inode] = {}
        self._left_out: list[tuple[_Children, bytes, Member]] = []

    def apply(self, layer: int, entries: Iterable[Entry]) -> None:
        """Put layer number `layer` on top. ImageError names the entry that cannot be applied.

        No entry is held longer than it takes, so that one that nobody else holds makes room for what comes of it.
        """
        self._parents.clear()
        members: list[Member] = []
        deletions: list[Whiteout | Opaque] = []
        for entry in entries:
            if isinstance(entry, Member):
                members.append(entry)
            else:
                deletions.append(entry)
        if deletions:
            self._delete(deletions, members)
        members.reverse()
        while members:
            self._add(layer, members.pop())
        self._linked = {}
        self._leave_out()

    def _delete(self, deletions: Iterable[Whiteout | Opaque], members: Iterable[Member]) -> None:
        """Nothing there to delete is no error: a layer may be used on top of others than it was made on."""
        new = {member.path for member in members if stat.S_ISDIR(member.mode)}
        for link in [member for member in members if member.hardlink]:
            # What is deleted from its old place may have got a new name first, as archives that move things have it.
            with contextlib.suppress(ImageError):
                if inode := self._at(link.link, link):
                    self._linked[link.link] = inode
        # All are found before any is deleted, so that a deleted symlink still leads where it led for the others.
        doomed: list[tuple[dict[bytes, Inode], bytes]] = []
        for entry in deletions:
            above, _, name = entry.path.rpartition(b"/")
            place, name = (entry.path, b"") if isinstance(entry, Opaque) else (above, name)
            children = self._directory(place, entry, new=new)
            if children is not None:
                doomed.append((children, name))
        for children, name in doomed:
            if name:
                children.pop(name, None)
            else:
                children.clear()

    def _add(self, layer: int, member: Member) -> None:
        above, _, name = member.path.rpartition(b"/")
        if not name:
            self._dress_root(member)
            return
        siblings = self._parents.get(above)
        if siblings is None:
            siblings = self._parent(above, member)
        before = siblings.get(name)
        inode = self._link_target(member) if member.hardlink else self._inode(layer, member)
        if before is not None and inode is not before:
            if before.children is not None and inode.children is not None:
                inode.children = before.children
            elif before.children is not None or before.target:
                self._parents.clear()
        siblings[name] = inode
        if is_whiteout(inode.mode, inode.rdev):
            self._left_out.append((siblings, name, member))

    def _leave_out(self) -> None:
        """Drop 0:0 devices, now that all hard links to them are known."""
        for siblings, name, member in self._left_out:
            inode = siblings.get(name)
            if inode is not None and is_whiteout(inode.mode, inode.rdev):
                self._warn("device {} is left out: overlayfs would take 0:0 for a whiteout", member.path)
                del siblings[name]
        self._left_out = []

    def _dress_root(self, member: Member) -> None:
        if member.hardlink or not stat.S_ISDIR(member.mode):
            raise ImageError("the root of an image must be a directory", member=b"/", offset=member.offset)
        children, self.root = self.root.children, self._inode(0, member)
        self.root.children = children

    def _inode(self, layer: int, member: Member) -> Inode:
        self._count(member)
        parts = member.segments
        return Inode(
            _SYMLINK if member.link else member.mode,
            member.uid,
            member.gid,
            member.mtime_ns,
            member.size,
            member.rdev,
            member.link,
            self._xattrs(member) if member.xattrs else member.xattrs,
            {} if stat.S_ISDIR(member.mode) else None,
            1,
            tuple([(at, layer, offset, length) for at, offset, length in parts]) if parts else (),
        )

    def _count(self, entry: Entry, weight: int = 1) -> None:
        self._made += weight
        if self._made > MAX_INODES:
            raise ImageError(
                f"the image has more than {MAX_INODES} files and directories", member=entry.path, offset=entry.offset
            )

    def _xattrs(self, member: Member) -> dict[bytes, bytes]:
        # Linux lets users' attributes be on files and directories only, and nobody could read others.
        plain = stat.S_ISREG(member.mode) or stat.S_ISDIR(member.mode)
        kept = {}
        for name, value in member.xattrs.items():
            known = any(is_xattr_name(name, prefix) for prefix in XATTR_PREFIXES.values())
            if known and (plain or not name.startswith(b"user.")):
                kept[name] = value
            else:
                self._warn("xattr {} of {} is left out: Linux or overlayfs forbids it", name, member.path)
        return kept

    def _warn(self, sentence: str, *names: bytes) -> None:
        """names: for the braces in the sentence. A long one takes time to be made printable, so only if it is read."""
        if len(self.warnings) < _MAX_WARNINGS:
            self.warnings.append(sentence.format(*map(shown, names)))
        else:
            self._unsaid += 1

    def _link_target(self, member: Member) -> Inode:
        """What a hard link leads to: the way there may lead over symlinks, but a symlink there is linked itself."""
        found = self._at(member.link, member) or self._linked.get(member.link)
        if found is None or found.children is not None:
            what = "which is a directory" if found is not None else "which does not exist"
            raise ImageError(
                f"it is a hard link to {shown(member.link)}, {what}", member=member.path, offset=member.offset
            )
        return found

    def _at(self, path: bytes, entry: Entry) -> Inode | None:
        """What is there; a symlink there is not followed."""
        above, _, name = path.rpartition(b"/")
        if not name:
            return self.root
        siblings = self._parents.get(above)
        if siblings is None:
            siblings = self._directory(above, entry) or {}
        return siblings.get(name)

    def _parent(self, path: bytes, member: Member) -> _Children:
        """The directory `path`, made where it is missing."""
        children = self._directory(path, member, make=True)
        if children is None:
            raise ImageError(
                f"{shown(path)} is no directory, so nothing can be in it", member=member.path, offset=member.offset
            )
        self._parents[path] = children
        return children

    def _directory(
        self, path: bytes, entry: Entry, *, make: bool = False, new: Collection[bytes] = ()
    ) -> _Children | None:
        """What is in the directory `path`, with symlinks followed inside the root; None if it is not there or no
        directory. entry: on whose behalf, for errors.

        make: directories that are missing come into being, also where a dangling link points.
        new: directories that are going to replace symlinks; what such a symlink leads to is not in them.
        """
        trail, missing, names, links = [self.root], list[bytes](), path.split(b"/")[::-1], 0
        # Of `path` itself: how many parts are to come, above which are those of symlinks, and how much of it is behind.
        rest, way = len(names), 0
        while names:
            name = names.pop()
            own = len(names) < rest
            if own:
                rest, way = len(names), way + len(name) + 1
            if name in (b"", b"."):
                continue
            if name == b"..":
                # As in a chroot: above the root is the root. What is missing is made only if the way ends there.
                if missing:
                    missing.pop()
                elif len(trail) > 1:
                    trail.pop()
                continue
            children = trail[-1].children
            if children is None:
                return None
            inode = None if missing else children.get(name)
            if inode is None:
                missing.append(name)
            elif inode.target:
                if own and new and path[: way - 1] in new:
                    return None
                detour = inode.target.split(b"/")[::-1]
                links += 1
                self._detours += len(detour)
                if links > _MAX_LINKS or self._detours > _MAX_DETOURS:
                    raise ImageError("too many symbolic links on the way", member=entry.path, offset=entry.offset)
                names += detour
                if inode.target.startswith(b"/"):
                    del trail[1:]
            else:
                trail.append(inode)
        if missing and not make:
            return None
        return self._made_below(trail[-1], missing, entry)

    def _made_below(self, directory: Inode, names: list[bytes], entry: Entry) -> _Children | None:
        for name in names:
            if len(name) > MAX_NAME:
                raise ImageError("a symlink on the way has too long a name", member=entry.path, offset=entry.offset)
            self._count(entry, _IMPLIED)
            below = _implied()
            if directory.children is not None:
                directory.children[name] = below
            directory = below
        return directory.children

    def finish(self) -> tuple[list[Extent], int]:
        """Count links and lay out the data space: (extents by address, bytes of data space).

        Contents lie in the order of the layers, so that what was archived together is read together.
        """
        if self._unsaid:
            self.warnings.append(f"{self._unsaid} more things are left out for such reasons")
            self._unsaid = 0
        extents, end = [], 0
        for inode in self._stored():
            inode.address = end
            extents += [Extent(end + at, layer, offset, size) for at, layer, offset, size in inode.segments]
            end += -(-inode.size // BLOCK) * BLOCK
        return extents, end

    def _stored(self) -> list[Inode]:
        """Every file that has contents, in the order of the data space. Counts inodes and their links on the way."""
        files: dict[int, Inode] = {}
        directories = 0
        for inode in self._inodes():
            if inode.children is not None:
                directories += 1
                inode.nlink = 2 + sum([child.children is not None for child in inode.children.values()])
            elif id(inode) in files:
                inode.nlink += 1
            else:
                files[id(inode)] = inode
                inode.nlink = 1
        self.inodes = directories + len(files)
        stored = [inode for inode in files.values() if inode.size]
        # A file without contents of its own (all hole) goes to the end; sorting is stable, so the order is the tree's.
        stored.sort(key=lambda inode: inode.segments[0][1:3] if inode.segments else (1 << 32, 0))
        return stored

    def _inodes(self) -> Iterator[Inode]:
        """Every name's inode, in the order of the names; one with two names comes twice."""
        pending = [self.root]
        while pending:
            inode = pending.pop()
            yield inode
            if inode.children:
                pending += [inode.children[name] for name in sorted(inode.children, reverse=True)]


def _implied() -> Inode:
    """A directory that no layer describes: what `mkdir` would make of it, at the epoch."""
    return Inode(stat.S_IFDIR | 0o755, children={})
