"""The whole ``.clip`` checked: that what it says is true of all of it, and fits together.

What `erofs_read` and `tables` read they check as they read it. This module adds what can only be seen from above:
checksums, order, link counts, that nothing overlaps, that the parts agree. It needs no more memory than a few numbers
an inode, and no more time than an honest file of the same size would take.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Sequence
from itertools import pairwise
from mmap import mmap
from typing import NoReturn

from clipfs.erofs.read import Metadata
from clipfs.erofs.structs import BLOCK, FILE_TYPE, FIRST_INODE, INODE, MAX_PATH, SUPERBLOCK_OFFSET, Node
from clipfs.errors import FormatError
from clipfs.format.container import PLACE_BITS, Codec, Header, Layer, Section
from clipfs.format.tables import ExtentTable
from clipfs.oci import Digest, ImageConfig, Manifest

_DIRECTORY_TYPE = FILE_TYPE[stat.S_IFDIR >> 12]


def check_sections(buffer: mmap, header: Header, name: str, *, data: bool = True) -> None:
    """Every section has the SHA-256 that the header promises, and between sections there is nothing.

    data: also the section with the data, if there is one; it is the last.
    """
    end = SUPERBLOCK_OFFSET
    with memoryview(buffer) as whole:
        for number, section in enumerate(header.sections.values()):
            if section is header.data and not data:
                break
            with whole[section.offset : section.end] as content:
                if hashlib.sha256(content).digest() != section.digest:
                    raise FormatError(f"{name} is damaged: section {number} does not have its checksum")
            if any(buffer[end : section.offset]):
                raise FormatError(f"{name} is damaged: there is something before section {number}")
            end = section.end


def check_layers(layers: Sequence[Layer], manifest: Manifest, config: ImageConfig, name: str) -> None:
    """The spans of each layer cover all of it, in order, and the layers are the manifest's and the config's."""
    for number, layer in enumerate(layers):
        position = start = 0
        for span in layer.spans:
            raw_fits = layer.codec is not Codec.RAW or span.end - span.start == span.length
            if span.position != position or span.start < start or not raw_fits:
                raise FormatError(f"{name} is damaged: the spans of layer {number} do not follow each other")
            position, start = position + span.length, span.start
        if position != layer.diff_size:
            raise FormatError(f"{name} is damaged: the spans of layer {number} do not cover it")
    stored = [(layer.digest, layer.size, layer.media_type) for layer in layers]
    if stored != [(blob.digest, blob.size, blob.media_type) for blob in manifest.layers]:
        raise FormatError(f"{name} is damaged: its layers are not those of its manifest")
    if tuple(layer.diff_id for layer in layers) != config.diff_ids:
        raise FormatError(f"{name} is damaged: its layers are not those of its image config")


def check_packed(layers: Sequence[Layer], data: Section | None, name: str) -> None:
    """The one layer of a packed clip is its data: zstd frames, a span each, and nothing between them."""
    if len(layers) != 1 or layers[0].codec is not Codec.ZSTD:
        raise FormatError(f"{name} is damaged: it is packed, but has not the one layer with its data")
    layer, position, end = layers[0], 0, 0
    for span in layer.spans:
        if (span.position, span.start, span.skip) != (position, end, 0) or span.end == end:
            raise FormatError(f"{name} is damaged: the spans of its data do not follow each other")
        position, end = position + span.length, span.end
    if (position, end) != (layer.diff_size, layer.size):
        raise FormatError(f"{name} is damaged: its spans do not cover its data")
    if data is not None and (layer.digest, layer.size) != (Digest("sha256", data.digest.hex()), data.length):
        raise FormatError(f"{name} is damaged: its data is not that of its layer")


def check_extents(extents: ExtentTable, layers: Sequence[Layer], data_size: int, name: str) -> None:
    """Extents are in order, do not overlap, and lie inside their layers and the data space."""
    sizes = [layer.diff_size for layer in layers]
    mask = (1 << PLACE_BITS) - 1
    end = 0
    for start, length, place in zip(extents.starts, extents.lengths, extents.places, strict=True):
        layer = place >> PLACE_BITS
        if start < end or not length or layer >= len(sizes) or (place & mask) + length > sizes[layer]:
            raise FormatError(
                f"{name} is damaged: the extent for address {start} is out of order or outside of its layer"
            )
        end = start + length
    if end > data_size:
        raise FormatError(f"{name} is damaged: its extents go on where the data space has ended")


def check_tree(tree: Metadata, name: str) -> bool:
    """Every inode that can be reached, every entry of every directory, and that the counts are right.

    Says whether any inode has xattrs.
    """
    walk = _Tree(tree, name)
    walk.run()
    return walk.xattrs


class _Tree:
    """One pass through the tree. `links` counts the names of everything that is no directory."""

    def __init__(self, tree: Metadata, name: str) -> None:
        self._tree = tree
        self._name = name
        self._links: dict[int, int] = {}
        self._nodes: dict[int, Node] = {}
        self._directories: set[int] = set()
        # What of the image is taken, and how much of it directories still can take.
        self._taken: list[tuple[int, int]] = [(0, FIRST_INODE)]
        self._room = tree.size
        #: Has any inode that was met xattrs?
        self.xattrs = False

    def run(self) -> None:
        root = self._tree.inode(self._tree.root)
        pending = [(root, root.nid, 0)]
        self._enter(root)
        while pending:
            node, parent, path_length = pending.pop()
            below = self._directory(node, parent)
            pending += [(child, node.nid, path_length + len(name) + 1) for name, child in below]
            if path_length > MAX_PATH + 1:
                self._fail(node.nid, "its path is longer than a path can be")
        for nid, links in self._links.items():
            if self._nodes[nid].nlink != links:
                self._fail(nid, f"it says that it has {self._nodes[nid].nlink} links and has {links}")
        if len(self._directories) + len(self._links) != self._tree.inodes:
            raise FormatError(
                f"{self._name} is damaged: it does not have the {self._tree.inodes} inodes that it should have"
            )
        self._taken.sort()
        for (_, end), (start, _) in pairwise(self._taken):
            if start < end:
                raise FormatError(f"{self._name} is damaged: two things share byte {start}")

    def _directory(self, node: Node, parent: int) -> list[tuple[bytes, Node]]:
        """Check the entries of a directory; the result is its subdirectories."""
        tree = self._tree
        content = tree.content(node)
        self._room -= node.size
        if self._room < 0:
            self._fail(node.nid, "it shares entries with other directories")
        below: list[tuple[bytes, Node]] = []
        special = {b".": node.nid, b"..": parent}
        last = b""
        for number in range(content.full + 1):
            names, nids, types = tree.dirents(node, content, number)
            if names[0] <= last or not all(a < b for a, b in pairwise(names)):
                self._fail(node.nid, "its entries are not in order")
            last = names[-1]
            for name, nid, kind in zip(names, nids, types, strict=True):
                if name in special:
                    if special.pop(name) != nid or kind != _DIRECTORY_TYPE:
                        self._fail(node.nid, "its . or .. leads elsewhere")
                elif nid in self._links:
                    self._links[nid] += 1
                    if FILE_TYPE[self._nodes[nid].mode >> 12] != kind:
                        self._fail(nid, "a directory says that it is of another type")
                else:
                    child = tree.inode(nid)
                    if FILE_TYPE[child.mode >> 12] != kind:
                        self._fail(nid, "a directory says that it is of another type")
                    self._enter(child)
                    if kind == _DIRECTORY_TYPE:
                        below.append((name, child))
        if special or node.nlink != 2 + len(below):
            self._fail(node.nid, "it lacks . or .., or has another link count than 2 and one for each subdirectory")
        return below

    def _enter(self, node: Node) -> None:
        """An inode is met for the first time; only directories must not be met again."""
        nid = node.nid
        start, end = self._tree.extent(nid)
        self._taken.append((start, end))
        self._tree.check_unused(nid)
        if end - start > INODE.size:
            self._tree.xattrs(nid)
            self.xattrs = True
        kind = stat.S_IFMT(node.mode)
        if kind == stat.S_IFDIR:
            if nid in self._directories:
                self._fail(nid, "it is a directory and in more than one place")
            self._directories.add(nid)
            self._take_content(node)
            return
        self._links[nid] = 1
        self._nodes[nid] = node
        if kind == stat.S_IFLNK:
            self._tree.readlink(nid)
            self._take_content(node)
        elif kind != stat.S_IFREG and node.size:
            self._fail(nid, "it has a size, but is of a type that has no content")

    def _take_content(self, node: Node) -> None:
        start, full, tail, length = self._tree.content(node)
        if full:
            self._taken.append((start, start + full * BLOCK))
        self._taken.append((tail, tail + length))

    def _fail(self, nid: int, what: str) -> NoReturn:
        raise FormatError(f"{self._name}: inode {nid} is damaged: {what}; make the .clip again")
