"""`Index`: a ``.clip`` opened and mapped, with everything it says about the image.

This module puts the parts together: the tree (`erofs_read`), the tables (`tables`), the image's own documents (`oci`).
It adds what needs paths: resolving and walking. It reads no file contents; it says where they are.

Opening costs the same for any size of image. What is read later is checked when it is read; `Index.check` checks all.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from clipfs.erofs.read import Metadata
from clipfs.erofs.structs import MAX_PATH, Node
from clipfs.errors import ClipfsError, FormatError, ImageError, UsageError
from clipfs.format.container import ITSELF, Header, Kind
from clipfs.format.tables import ExtentTable, SpanTable, StoredLayer, read_layers
from clipfs.oci import MAX_CONFIG, MAX_MANIFEST, ImageConfig, Manifest, Platform

__all__ = ["Index", "Node", "SpanTable", "StoredLayer"]

# As many as Linux follows in one path (MAXSYMLINKS).
_MAX_SYMLINKS = 40

_MAX_DOCUMENT = max(MAX_MANIFEST, MAX_CONFIG)

T = TypeVar("T")


class Index:
    """An open ``.clip``. Use it as a context manager, or `close` it. One thread at a time may use it.

    path: of the file.  layers: lowest first, their spans read when asked for.  root: the root directory's nid.
    inodes: how many there are.  data_size: of the data space.
    """

    def __init__(self, path: Path, buffer: mmap) -> None:
        """Use `Index.open`. Takes over the mapping, also if this fails."""
        self.path = path
        self._buffer = buffer
        self.layers: tuple[StoredLayer, ...] = ()
        try:
            name = str(path)
            self._header = Header.parse(buffer, name)
            self._tree = Metadata(buffer, self._header[Kind.EROFS].end, name)
            self.layers = read_layers(buffer, self._header, name)
            self._extents = ExtentTable(buffer, self._header[Kind.EXTENTS], self.layers, name)
        except BaseException:
            for layer in self.layers:
                layer.spans.release()
            buffer.close()
            raise
        self.root: int = self._tree.root
        self.inodes: int = self._tree.inodes
        self.data_size: int = self._tree.data_size

    def demand(self, platform: Platform | None, name: str | None = None) -> None:
        """UsageError if the image is for another platform than this one, which somebody has asked for. name: of the
        clip, if that is not its path."""
        config = self.config
        if platform is not None and config.architecture and not platform.matches(config.platform):
            raise UsageError(f"{name or self.path} is of an image for {config.platform}, not for {platform}")

    @classmethod
    def open(cls, path: Path | str, *, shown: Path | None = None) -> Self:
        """Map the file and check its header. FormatError if it is none of ours, ClipfsError if it can not be read.

        shown: what the index calls itself, if `path` is a copy of it.
        """
        if sys.byteorder != "little":
            raise ClipfsError("clipfs reads .clip files on little-endian machines only")
        name = shown or Path(path)
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise FormatError(f"{name} is not a .clip file: it is empty")
                buffer = mmap(file.fileno(), 0, access=ACCESS_READ)
        except OSError as error:
            raise ClipfsError(f"cannot open {name}: {error.strerror}") from error
        return cls(name, buffer)

    def close(self) -> None:
        """Unmap the file. Nothing else works afterwards; closing again does no harm."""
        for layer in self.layers:
            layer.spans.release()
        self._extents.release()
        self._buffer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- what the image says about itself

    @cached_property
    def manifest(self) -> Manifest:
        """The image's manifest, verbatim in `raw`."""
        return self._document(Kind.MANIFEST, Manifest.parse)

    @cached_property
    def config(self) -> ImageConfig:
        """The image's config, verbatim in `raw`."""
        return self._document(Kind.CONFIG, ImageConfig.parse)

    @cached_property
    def source(self) -> str:
        """The canonical name of the image that the index was made of."""
        return self._section(Kind.SOURCE).decode("utf-8", "surrogateescape")

    @property
    def packed(self) -> bool:
        """Whether the one layer is the data of a packed clip, and not one of the manifest's."""
        return self._header.packed

    @property
    def carries_data(self) -> bool:
        """Whether the file itself is the packed clip."""
        return self._header.data is not None

    @property
    def spans_digest(self) -> str:
        """What tells the spans of this index from those of any other: notes about spans are kept by this name."""
        return self._header[Kind.SPANS].digest.hex()

    def section(self, kind: Kind) -> bytes:
        """A section, verbatim."""
        section = self._header[kind]
        return self._buffer[section.offset : section.end]

    # --- inodes by number

    def inode(self, nid: int) -> Node:
        """The attributes of an inode."""
        return self._tree.inode(nid)

    def lookup(self, nid: int, name: bytes) -> int:
        """The nid of `name` in the directory at `nid`, 0 if there is none. Knows ``.`` and ``..`` too."""
        return self._tree.lookup(nid, name)

    def entries(self, nid: int) -> list[tuple[bytes, int]]:
        """(name, nid) of everything in the directory at `nid`, sorted by name, without ``.`` and ``..``."""
        return [entry for entry in self._tree.entries(nid) if entry[0] not in (b".", b"..")]

    def parent(self, nid: int) -> int:
        """The directory that holds the directory at `nid`; the root's is the root."""
        return self._tree.lookup(nid, b"..") or self.root

    def readlink(self, nid: int) -> bytes:
        """The target of the symlink at `nid`."""
        return self._tree.readlink(nid)

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        """The extended attributes of the inode at `nid`, by full name."""
        return self._tree.xattrs(nid)

    def extents(self, address: int, length: int) -> list[tuple[int, int, int, int]]:
        """Where these bytes of the data space are stored, as (address, layer number, offset in the uncompressed layer,
        length), in order. What no piece covers is zeros."""
        return self._extents.find(address, length)

    def extent(self, layer: int, offset: int) -> range:
        """The bytes of an uncompressed layer around `offset` that are of the same file; none if that one is of no file.
        A packed clip does not know it of all."""
        return self._extents.around(layer, offset)

    # --- paths

    def resolve(self, path: bytes | str, follow: bool = True) -> int:
        """The nid of what `path` names, seen from the root, out of which no symlink leads.

        follow: whether a symlink that the whole path names is followed; those on the way always are.
        Raises FileNotFoundError, NotADirectoryError or OSError(ELOOP), with the path in it.
        """
        pending = os.fsencode(path).split(b"/")[::-1]
        at, links = self.root, 0
        while pending:
            name = pending.pop()
            if not stat.S_ISDIR(self.inode(at).mode):
                raise _os_error(errno.ENOTDIR, path)
            if name in (b"", b"."):
                continue
            found = self.parent(at) if name == b".." else self.lookup(at, name)
            if not found:
                raise _os_error(errno.ENOENT, path)
            if (pending or follow) and stat.S_ISLNK(self.inode(found).mode):
                links += 1
                if links > _MAX_SYMLINKS:
                    raise _os_error(errno.ELOOP, path)
                target = self.readlink(found)
                if target.startswith(b"/"):
                    at = self.root
                pending += target.split(b"/")[::-1]
            else:
                at = found
        return at

    def walk(self, path: bytes = b"", nid: int | None = None) -> Iterator[tuple[bytes, Node]]:
        """(path, node) of every name in the image: a directory before what is in it, names in order, hard links each
        time. Paths do not begin with a slash; the root's is empty. path, nid: begin there, not at the root.

        A hostile tree ends in a FormatError after no more steps than an honest one of its size has.
        """
        seen: set[int] = set()
        room = self._tree.size
        pending = [(path, self.root if nid is None else nid)]
        while pending:
            path, nid = pending.pop()
            node = self._tree.inode(nid)
            yield path, node
            if not stat.S_ISDIR(node.mode):
                continue
            room -= node.size
            if nid in seen or room < 0 or len(path) > MAX_PATH:
                raise FormatError(f"{self.path} is damaged: its directories contain each other, or share their entries")
            seen.add(nid)
            prefix = path + b"/" if path else b""
            pending += [(prefix + name, child) for name, child in reversed(self.entries(nid))]

    def check(self, *, data: bool = True) -> bool:
        """Check everything that can be checked without the image's data; FormatError at the first fault.

        Says whether any inode has xattrs, which nobody knows who has not seen all of them.

        Reads the whole file, so it takes as long as that does, plus some microseconds an inode. data: also that of a
        packed clip, which is verified when it is read in any case.
        """
        # Not needed to mount, so not imported before.
        from clipfs.format.check import check_extents, check_layers, check_packed, check_sections, check_tree

        name = str(self.path)
        check_sections(self._buffer, self._header, name, data=data)
        manifest, config = self.manifest, self.config
        if self.packed:
            check_packed(self.layers, self._header.data, name)
            if self.source == ITSELF and not self.carries_data:
                raise FormatError(f"{name} is damaged: it should carry its data and does not")
        else:
            check_layers(self.layers, manifest, config, name)
        check_extents(self._extents, self.layers, self.data_size, name)
        xattrs = check_tree(self._tree, name)
        if not self.source:
            raise FormatError(f"{name} is damaged: it does not say what image it was made of")
        return xattrs

    # --- inside

    def _section(self, kind: Kind) -> bytes:
        section = self._header[kind]
        if section.length > _MAX_DOCUMENT:
            raise FormatError(f"{self.path} is damaged: its {kind.name.lower()} has {section.length} bytes")
        return self.section(kind)

    def _document(self, kind: Kind, parse: Callable[[bytes], T]) -> T:
        try:
            return parse(self._section(kind))
        except ImageError as error:
            raise FormatError(f"{self.path} is damaged: its {kind.name.lower()} is not one: {error}") from error


def _os_error(number: int, path: bytes | str) -> OSError:
    """The subclass of OSError that belongs to `number`."""
    return OSError(number, os.strerror(number), path)
