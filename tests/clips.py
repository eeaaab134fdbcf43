"""File trees and ``.clip`` files for tests, made in memory without an image to start from.

A `TreeBuilder` plays the part of the layers: it has one raw layer in which file contents lie one after the other with
something between them, as in a tar.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from clipfs.erofs.structs import BLOCK, Inode
from clipfs.format import container as clip_format
from clipfs.format.container import SECTION, Codec, Extent, Kind, Layer, Section, Span
from clipfs.format.index import Index
from clipfs.format.pack import write
from clipfs.oci import Digest

MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar"
_MNT_RDONLY, _UMOUNT_NOFOLLOW = 1, 8


class TreeBuilder:
    """Add things by path; missing parents come into being. `finish` fills in what the tree's owner would."""

    def __init__(self, **root: Any) -> None:
        self.root = Inode(stat.S_IFDIR | 0o755, **root)
        self.root.children = {}
        self.contents: list[tuple[Inode, bytes, Sequence[tuple[int, int]]]] = []

    def add(self, path: bytes, inode: Inode) -> Inode:
        at = self.root
        *above, name = path.split(b"/")
        for part in above:
            assert at.children is not None
            at = at.children.setdefault(part, Inode(stat.S_IFDIR | 0o755, children={}))
        assert at.children is not None
        at.children[name] = inode
        return inode

    def directory(self, path: bytes, mode: int = 0o755, **attributes: Any) -> Inode:
        return self.add(path, Inode(stat.S_IFDIR | mode, children={}, **attributes))

    def file(
        self,
        path: bytes,
        content: bytes = b"",
        mode: int = 0o644,
        stored: Sequence[tuple[int, int]] | None = None,
        **attributes: Any,
    ) -> Inode:
        """stored: (offset, length) of the pieces that are no holes."""
        inode = self.add(path, Inode(stat.S_IFREG | mode, size=len(content), **attributes))
        self.contents.append((inode, content, [(0, len(content))] if stored is None else stored))
        return inode

    def symlink(self, path: bytes, target: bytes, **attributes: Any) -> Inode:
        return self.add(path, Inode(stat.S_IFLNK | 0o777, target=target, **attributes))

    def special(self, path: bytes, kind: int, rdev: int = 0, **attributes: Any) -> Inode:
        return self.add(path, Inode(kind | 0o640, rdev=rdev, **attributes))

    def finish(self) -> Built:
        """Count links, lay out the data space and the layer."""
        links: dict[int, tuple[Inode, int]] = {}
        pending = [self.root]
        while pending:
            directory = pending.pop()
            children = list((directory.children or {}).values())
            below = [child for child in children if child.children is not None]
            directory.nlink = 2 + len(below)
            pending += below
            for child in children:
                if child.children is None:
                    links[id(child)] = child, links.get(id(child), (child, 0))[1] + 1
        for inode, count in links.values():
            inode.nlink = count
        layer, extents, address = bytearray(), [], 0
        for inode, content, stored in self.contents:
            inode.address = address if content else 0
            for offset, length in stored:
                layer += b"between files".ljust(512, b".")
                if length:
                    extents.append(Extent(address + offset, 0, len(layer), length))
                layer += content[offset : offset + length]
            address += -(-len(content) // BLOCK) * BLOCK
        return Built(self.root, extents, address, bytes(layer))

    def write_data(self, path: Path) -> None:
        """What the kernel's EROFS wants as its second device: the data space as a file."""
        with path.open("wb") as file:
            for inode, content, _ in self.contents:
                if content:
                    file.seek(inode.address)
                    file.write(content)
            file.truncate(-(-file.tell() // BLOCK) * BLOCK)


class Built(NamedTuple):
    """A finished tree and the one layer that holds its contents."""

    root: Inode
    extents: list[Extent]
    data_size: int
    layer: bytes


def raw_layer(data: bytes, span_size: int = 1 << 20) -> Layer:
    """`data` as a layer that is not compressed."""
    spans = []
    for at in range(0, len(data), span_size):
        part = data[at : at + span_size]
        spans.append(Span(at, at + len(part), at, len(part), hashlib.sha256(part).digest()))
    digest = Digest.of(data)
    return Layer(digest, digest, len(data), len(data), Codec.RAW, MEDIA_TYPE, spans)


def documents(layers: Sequence[Layer]) -> dict[str, bytes]:
    """A manifest and a config for these layers, as arguments of `format_pack.write`."""
    config = json.dumps(
        {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": [str(layer.diff_id) for layer in layers]},
        }
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": str(Digest.of(config)),
            "size": len(config),
        },
        "layers": [{"mediaType": each.media_type, "digest": str(each.digest), "size": each.size} for each in layers],
    }
    return {"manifest": json.dumps(manifest).encode(), "config": config}


def write_clip(path: Path, built: Built, layers: Sequence[Layer] | None = None, source: str = "oci:/image:1") -> Path:
    """Write a ``.clip`` of `built`; its layer is raw unless other `layers` are given."""
    layers = [raw_layer(built.layer)] if layers is None else layers
    with path.open("wb") as file:
        write(
            file,
            root=built.root,
            extents=built.extents,
            data_size=built.data_size,
            layers=layers,
            source=source,
            **documents(layers),
        )
    return path


def reseal(clip: bytearray) -> bytes:
    """Make all checksums right again after a clip was changed: what a forger would do."""
    sections = []
    _, _, features, _, _, count, _ = clip_format.HEADER.unpack_from(clip)
    for number in range(count):
        kind, _, offset, length, _ = SECTION.unpack_from(clip, clip_format.HEADER.size + number * SECTION.size)
        digest = hashlib.sha256(clip[offset : offset + length]).digest()
        sections.append((Kind(kind), Section(offset, length, digest)))
    clip[:1024] = clip_format.Header.pack(sections, features)
    return bytes(clip)


class Seen(NamedTuple):
    """What there is to know of one path, however it was found out."""

    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    nlink: int
    rdev: int
    target: bytes
    xattrs: Mapping[bytes, bytes]
    first: bytes  # the first of all paths that lead to the same inode


def seen_in_tree(root: Inode) -> dict[bytes, Seen]:
    """Directories have no size here: it is an affair of the file system."""
    found: dict[bytes, Seen] = {}
    first: dict[int, bytes] = {}
    pending = [(b"", root)]
    while pending:
        path, inode = pending.pop()
        found[path] = Seen(
            inode.mode, inode.uid, inode.gid, inode.size or len(inode.target), inode.mtime_ns, inode.nlink,
            inode.rdev, inode.target, inode.xattrs, first.setdefault(id(inode), path),
        )  # fmt: skip
        children = sorted((inode.children or {}).items(), reverse=True)
        pending += [(path + b"/" + name if path else name, child) for name, child in children]
    return found


def seen_in_index(index: Index) -> dict[bytes, Seen]:
    found: dict[bytes, Seen] = {}
    first: dict[int, bytes] = {}
    for path, node in index.walk():
        found[path] = Seen(
            node.mode, node.uid, node.gid, 0 if stat.S_ISDIR(node.mode) else node.size, node.mtime_ns, node.nlink,
            node.rdev, index.readlink(node.nid) if stat.S_ISLNK(node.mode) else b"", index.xattrs(node.nid),
            first.setdefault(node.nid, path),
        )  # fmt: skip
    return found


def seen_on_disk(top: Path) -> dict[bytes, Seen]:
    found: dict[bytes, Seen] = {}
    first: dict[int, bytes] = {}
    pending = [b""]
    while pending:
        path = pending.pop()
        full = os.path.join(os.fsencode(top), path)
        status = os.lstat(full)
        xattrs = {
            os.fsencode(name): os.getxattr(full, name, follow_symlinks=False)
            for name in os.listxattr(full, follow_symlinks=False)
        }
        found[path] = Seen(
            status.st_mode, status.st_uid, status.st_gid, 0 if stat.S_ISDIR(status.st_mode) else status.st_size,
            status.st_mtime_ns, status.st_nlink, status.st_rdev,
            os.readlink(full) if stat.S_ISLNK(status.st_mode) else b"", xattrs, first.setdefault(status.st_ino, path),
        )  # fmt: skip
        if stat.S_ISDIR(status.st_mode):
            names = sorted(os.listdir(full), reverse=True)
            pending += [path + b"/" + name if path else name for name in names]
    return found


@contextmanager
def kernel_mount(clip: Path, data: Path, mountpoint: Path) -> Iterator[Path]:
    """The clip mounted by the kernel's own EROFS. By mount(2): mount(8) would make a loop device of the file."""
    libc = ctypes.CDLL(None, use_errno=True)
    mountpoint.mkdir()
    arguments = os.fsencode(clip), os.fsencode(mountpoint), b"erofs", _MNT_RDONLY, b"device=" + os.fsencode(data)
    if libc.mount(*arguments):
        raise OSError(ctypes.get_errno(), f"the kernel does not mount {clip}")
    try:
        yield mountpoint
    finally:
        if libc.umount2(os.fsencode(mountpoint), _UMOUNT_NOFOLLOW):
            raise OSError(ctypes.get_errno(), f"cannot unmount {mountpoint}")
