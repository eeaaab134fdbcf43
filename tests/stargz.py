"""eStargz layers out of tar archives, written from the format's public description; and zstd:chunked ones by skopeo.

This module shares no code with clipfs: archives are read by Python's tarfile and compressed by its gzip. `edit` lets a
test change the table of contents before it is digested, so that the layer is hostile and well signed.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import math
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.images import LayoutBuilder
from tests.tars import END, header, padded

TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"

Toc = dict[str, Any]

_TYPES = {
    tarfile.REGTYPE: "reg",
    tarfile.AREGTYPE: "reg",
    tarfile.DIRTYPE: "dir",
    tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "hardlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.FIFOTYPE: "fifo",
}


@dataclass(frozen=True)
class Stargz:
    """A layer. toc: as it stands in the blob, which begins with the chunks and has the table at byte `end`."""

    blob: bytes
    toc: Toc
    end: int
    annotations: dict[str, str]

    @property
    def tar(self) -> bytes:
        return gzip.decompress(self.blob)


def stargz(
    tar: bytes,
    *,
    chunk_size: int = 1 << 22,
    min_chunk_size: int = 0,
    landmark: str = ".no.prefetch.landmark",
    edit: Callable[[Toc], None] = lambda toc: None,
    named: bool = False,
) -> Stargz:
    """The archive as an eStargz layer.

    chunk_size, min_chunk_size: of the parts that files are cut into, and of what one gzip member holds at least.
    named: gzip headers have file names in them, which no known writer does.
    """
    writer = _Writer(chunk_size, min_chunk_size, named)
    if landmark:
        writer.add(tarfile.TarInfo(landmark), header(landmark.encode(), size=1), b"\x0f")
    end = 0
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        for member in archive:
            before, end = end, _end(member)
            content = tar[member.offset_data : member.offset_data + member.size] if member.isreg() else b""
            writer.add(member, tar[before : member.offset_data], content)
    return writer.finish(edit)


def _end(member: tarfile.TarInfo) -> int:
    return member.offset_data + (-(-member.size // 512) * 512 if member.isreg() else 0)


def footer(toc_offset: int) -> bytes:
    """51 bytes: an empty gzip member, in whose extra field the place of the table is."""
    subfield = b"%016xSTARGZ" % toc_offset
    extra = b"SG" + len(subfield).to_bytes(2, "little") + subfield
    start = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + len(extra).to_bytes(2, "little")
    return start + extra + b"\x01\0\0\xff\xff" + bytes(8)


def packed_toc(document: bytes, name: bytes = b"stargz.index.json") -> bytes:
    """The table as the last member of the tar, in a gzip member of its own."""
    return gzip.compress(header(name, size=len(document)) + padded(document) + END, 9, mtime=0)


class _Writer:
    """Gzip members, one behind the other. `_open` is the one that has not been written yet."""

    def __init__(self, chunk_size: int, min_chunk_size: int, named: bool) -> None:
        self._chunk_size, self._min_chunk_size, self._named = chunk_size, min_chunk_size, named
        self._blob, self._open = bytearray(), bytearray()
        self._entries: list[Toc] = []

    def add(self, member: tarfile.TarInfo, headers: bytes, content: bytes) -> None:
        self._open += headers
        entry = _entry(member)
        if content:
            entry |= {"size": len(content), "digest": _sha256(content)}
        self._entries.append(entry)
        for at in range(0, len(content), self._chunk_size):
            chunk = content[at : at + self._chunk_size]
            if at:
                entry = {"name": member.name, "type": "chunk", "chunkOffset": at}
                self._entries.append(entry)
            if at + len(chunk) < len(content):
                entry["chunkSize"] = len(chunk)
            if len(self._open) >= self._min_chunk_size:
                self._close()
            entry |= {"offset": len(self._blob), "innerOffset": len(self._open), "chunkDigest": _sha256(chunk)}
            self._open += chunk
        self._open += bytes(-len(content) % 512)

    def finish(self, edit: Callable[[Toc], None]) -> Stargz:
        self._close()
        toc: Toc = {"version": 1, "entries": [{k: v for k, v in each.items() if v} for each in self._entries]}
        edit(toc)
        document = json.dumps(toc, indent="\t").encode()
        end = len(self._blob)
        blob = bytes(self._blob) + packed_toc(document) + footer(end)
        return Stargz(blob, toc, end, {TOC_DIGEST: _sha256(document)})

    def _close(self) -> None:
        packed = gzip.compress(self._open, 6, mtime=0)
        if self._named:
            packed = packed[:3] + b"\x08" + packed[4:10] + b"a name\0" + packed[10:]
        self._blob += packed
        self._open.clear()


def _entry(member: tarfile.TarInfo) -> Toc:
    prefix = "SCHILY.xattr."
    xattrs = {
        key.removeprefix(prefix): base64.b64encode(value.encode("utf-8", "surrogateescape")).decode()
        for key, value in member.pax_headers.items()
        if key.startswith(prefix)
    }
    # Rounded as Go does it: half a second is a second.
    time = (
        datetime.fromtimestamp(math.floor(member.mtime + 0.5), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if member.mtime
        else ""
    )
    return {
        "name": member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
        "type": _TYPES[member.type],
        "modtime": time,
        "linkName": member.linkname,
        "mode": member.mode,
        "uid": member.uid,
        "gid": member.gid,
        "devMajor": member.devmajor if member.isdev() else 0,
        "devMinor": member.devminor if member.isdev() else 0,
        "xattrs": xattrs,
    }


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def stargz_image(directory: Path, *layers: Stargz) -> str:
    """An image of these layers; its name."""
    made = LayoutBuilder(directory)
    for layer in layers:
        made.raw_layer(layer.blob, layer.tar, MEDIA_TYPE, layer.annotations)
    return made.config(cmd=["/bin/sh"]).write()


def chunked_image(image: str, directory: Path) -> str:
    """The image with zstd:chunked layers, by skopeo; the new one's name.

    skopeo 1.9.3 drops zeros behind the end of an archive, and its layers then do not have their diff_id. Archives of
    `tests.tars` have none.
    """
    target = f"oci:{directory}:latest"
    subprocess.run(
        ["skopeo", "copy", "--quiet", "--insecure-policy", "--dest-compress-format", "zstd:chunked", image, target],
        check=True,
        capture_output=True,
        timeout=100,
    )
    return target
