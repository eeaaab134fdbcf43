"""OCI image layouts: a directory with ``index.json`` and ``blobs/ALGORITHM/HEX``.

How an index of several tagged images is searched is here too, because archives of layouts search theirs the same way.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import trio

from clipfs.errors import ImageError, SourceError, UsageError
from clipfs.fields import quoted
from clipfs.oci import MAX_MANIFEST, Descriptor, ImageIndex, Platform, parse_manifest
from clipfs.sources.base import Document, LocalBlob, LocalSource, is_file, read_file

_TAG = "org.opencontainers.image.ref.name"
# Tags that an error lists before it stops; a mirror's layout may have thousands.
_SHOWN_TAGS = 20


class LayoutSource(LocalSource):
    """``oci:DIR[:TAG]``."""

    def __init__(self, directory: Path, tag: str | None = None) -> None:
        self._root = Path(os.path.realpath(directory))
        if not is_file(self._root / "index.json"):
            raise UsageError(f"{directory} is no OCI layout: it has no file index.json")
        self._tag = tag
        self.name = f"oci:{self._root}" + (f":{tag}" if tag else "")

    def local(self, blob: Descriptor) -> LocalBlob:
        """See `LocalSource.local`. What is not a file beneath the layout is refused, however it is linked."""
        path = self._beneath(f"blobs/{blob.digest.algorithm}/{blob.digest.hex}")
        size = path.stat().st_size
        if size != blob.size:
            raise SourceError(f"blob {blob.digest} has {size} bytes in {self._root}; its descriptor says {blob.size}")
        return LocalBlob(path, 0, size)

    async def _named(self, platform: Platform) -> Document:
        raw = await trio.to_thread.run_sync(self._index)
        return await self._pointed_at(choose(raw, self._tag, platform, str(self._root)))

    def _index(self) -> bytes:
        return read_file(self._beneath("index.json"), 0, MAX_MANIFEST + 1)

    def _beneath(self, name: str) -> Path:
        """The real path of a regular file of the layout; a layout from a stranger may hold links to anywhere."""
        path = self._root / name
        try:
            real = Path(os.path.realpath(path, strict=True))
            if not real.is_relative_to(self._root):
                raise SourceError(f"{path} is a link out of the layout; copy the file itself into it")
            if not stat.S_ISREG(real.stat().st_mode):
                raise SourceError(f"{path} is not a regular file")
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error
        return real


def choose(raw: bytes, tag: str | None, platform: Platform, where: str) -> Descriptor:
    """The entry of a layout's ``index.json`` that `tag` names, or the only one; UsageError that lists the tags."""
    index = parse_manifest(raw)
    if not isinstance(index, ImageIndex):
        raise ImageError(f"index.json of {where} is no image index")
    found = [each for each in index.manifests if tag is None or each.annotations.get(_TAG) == tag]
    if len(found) == 1:
        return found[0]
    tags = sorted({name for each in index.manifests if (name := each.annotations.get(_TAG))})
    listed = ", ".join(quoted(name) for name in tags[:_SHOWN_TAGS]) + (", …" if len(tags) > _SHOWN_TAGS else "")
    if not found:
        raise UsageError(f"{where} has no image {quoted(tag or '')}; it has {listed or 'none with a tag'}")
    if len({each.annotations.get(_TAG) for each in found}) > 1:
        raise UsageError(f"{where} has {len(found)} images; add one of these tags to the name: {listed}")
    # Several under one tag, or under none, can only be the platforms of one image.
    return ImageIndex(tuple(found)).select(platform)
