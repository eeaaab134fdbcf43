"""Tar archives of images, read in place: where each member's bytes lie, found by seeking from header to header.

`Archive` is the table of contents; `OciArchiveSource` reads an OCI layout in one. Only what tools write around images
is understood here (ustar, GNU long names, PAX path and size): the tars *in* the image are layers, which are parsed
elsewhere.
"""

from __future__ import annotations

import os
import posixpath
import re
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import trio

from clipfs.errors import ImageError, SourceError, UsageError, shown
from clipfs.oci import MAX_MANIFEST, Descriptor, Platform
from clipfs.sources.base import Document, LocalBlob, LocalSource, is_file, read_file
from clipfs.sources.layout import choose

# An image has a few hundred blobs at most; a list that is longer than this is an attack on memory.
_MAX_MEMBERS = 100_000
# Long names and PAX records: PATH_MAX is 4 KiB, and what else a record holds is of no use here.
_MAX_EXTENSION = 1 << 20
# Links that lead to links: `docker save` writes one level.
_MAX_HOPS = 8

_COMPRESSIONS = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
}


# One PAX record: its length in decimal, a key, and the value up to a newline that the length counts too.
_PAX = re.compile(rb"(?P<length>[0-9]{1,7}) (?P<key>[^=]{1,256})=")


class Archive:
    """The members of one tar file, scanned when first asked for."""

    def __init__(self, path: Path) -> None:
        # Who names an archive may do so by a link; reading follows none.
        self.path = Path(os.path.realpath(path))
        if not is_file(self.path):
            raise UsageError(f"{path} is no file; name an archive of an image")

    def find(self, name: str) -> LocalBlob:
        """Where the bytes of a member lie, links inside the archive followed; SourceError if there is none."""
        at = name
        for _ in range(_MAX_HOPS):
            member = self._members.get(_clean(at))
            if isinstance(member, LocalBlob):
                return member
            if member is None:
                break
            at = member
        raise SourceError(f"archive {self.path} has no file {shown(name.encode('utf-8', 'surrogateescape'))}")

    def read(self, name: str, limit: int) -> bytes:
        """A small member, whole."""
        return self.read_blob(self.find(name), limit)

    def read_blob(self, place: LocalBlob, limit: int) -> bytes:
        """The same, at a known place."""
        if place.size > limit:
            raise ImageError(
                f"archive {self.path} has a document of {place.size} bytes; more than {limit} are not read"
            )
        return read_file(place.path, place.offset, place.size)

    def __contains__(self, name: str) -> bool:
        return _clean(name) in self._members

    def forget(self) -> None:
        """Look anew where everything is: the file may be another one by now."""
        self.__dict__.pop("_members", None)

    @cached_property
    def _members(self) -> dict[str, LocalBlob | str]:
        """Files by cleaned name, and links as the cleaned name of what they mean."""
        try:
            with self.path.open("rb") as file:
                return _scan(file, self.path)
        except OSError as error:
            raise SourceError(f"cannot read {self.path}: {error.strerror}") from error


class OciArchiveSource(LocalSource):
    """``oci-archive:FILE[:TAG]``: an OCI layout in a tar file."""

    def __init__(self, path: Path, tag: str | None = None) -> None:
        self._archive = Archive(path)
        self._tag = tag
        self.name = f"oci-archive:{self._archive.path}" + (f":{tag}" if tag else "")

    def local(self, blob: Descriptor) -> LocalBlob:
        """See `LocalSource.local`."""
        place = self._archive.find(f"blobs/{blob.digest.algorithm}/{blob.digest.hex}")
        if place.size != blob.size:
            raise SourceError(
                f"blob {blob.digest} has {place.size} bytes in {place.path}; its descriptor says {blob.size}"
            )
        return place

    def distrust(self, blob: Descriptor, at: int | None = None) -> None:
        """See `Source.distrust`: it may lie elsewhere in a file that was written anew."""
        del blob, at
        self._archive.forget()

    async def _named(self, platform: Platform) -> Document:
        raw = await trio.to_thread.run_sync(self._archive.read, "index.json", MAX_MANIFEST)
        chosen = choose(raw, self._tag, platform, str(self._archive.path))
        return await self._pointed_at(chosen)


def _scan(file: BinaryIO, path: Path) -> dict[str, LocalBlob | str]:
    """Walk the headers. Every step goes forward, so the walk ends whatever the file says."""
    end = file.seek(0, os.SEEK_END)
    members: dict[str, LocalBlob | str] = {}
    override: dict[str, bytes] = {}
    at = headers = 0
    while len(header := _read_at(file, at, 512)) == 512 and any(header):
        _check(header, at, path)
        headers += 1
        kind = header[156:157]
        extends = kind in b"LKxg"
        size = _size(header, at) if extends or "size" not in override else _decimal(override["size"], at)
        body, at = at + 512, at + 512 + -(-size // 512) * 512
        if body + size > end or headers > _MAX_MEMBERS:
            fault = "is cut off" if body + size > end else f"has more than {_MAX_MEMBERS} members"
            raise ImageError(f"archive {path} {fault}", offset=body - 512)
        if extends:
            if size > _MAX_EXTENSION:
                raise ImageError(f"archive {path} has a name of {size} bytes", offset=body - 512)
            override |= _extension(kind, _read_at(file, body, size))
            continue
        name = _clean(_text(override.get("path") or _ustar_name(header)))
        target = _text(override.get("linkpath") or header[157:257].rstrip(b"\0"))
        if kind in b"07\0":
            members[name] = LocalBlob(path, body, size)
        elif kind == b"1":
            members[name] = _clean(target)
        elif kind == b"2":
            members[name] = _clean(posixpath.join(posixpath.dirname(name), target))
        override = {}
    if not members:
        raise ImageError(f"{path} is no tar archive of an image: it has no files")
    return members


def _check(header: bytes, at: int, path: Path) -> None:
    """The header's checksum; a compressed archive is the likeliest reason why the first one has none."""
    if at == 0:
        for magic, (compression, tool) in _COMPRESSIONS.items():
            if header.startswith(magic):
                raise UsageError(
                    f"{path} is compressed with {compression}, so it cannot be read in place; "
                    f"decompress it first ({tool})"
                )
    stored = header[148:156].strip(b" \0")
    if not re.fullmatch(rb"[0-7]+", stored) or int(stored, 8) != sum(header[:148]) + 256 + sum(header[156:]):
        raise ImageError(f"{path} is no tar archive, or a damaged one", offset=at)


def _size(header: bytes, at: int) -> int:
    field = header[124:136]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ImageError("the archive has a member whose size is no number", offset=at)
    return int(digits or b"0", 8)


def _decimal(digits: bytes, at: int) -> int:
    if not re.fullmatch(rb"[0-9]{1,19}", digits):
        raise ImageError("the archive has a member whose size is no number", offset=at)
    return int(digits)


def _extension(kind: bytes, body: bytes) -> dict[str, bytes]:
    """What an extension header says about the member after it."""
    if kind in b"LK":
        return {"path" if kind == b"L" else "linkpath": body.rstrip(b"\0")}
    found: dict[str, bytes] = {}
    at = 0
    while kind == b"x" and (record := _PAX.match(body, at)):
        end = at + int(record["length"])
        if end <= record.end():
            break
        if record["key"] in (b"path", b"linkpath", b"size"):
            found[record["key"].decode()] = body[record.end() : end - 1]
        at = end
    return found


def _ustar_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _clean(name: str) -> str:
    """One spelling a member. What leads out of the archive names nothing in it."""
    return posixpath.normpath("/" + name).lstrip("/")


def _read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    return os.pread(file.fileno(), length, offset)
