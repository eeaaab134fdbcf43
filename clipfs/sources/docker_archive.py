"""What ``docker save`` writes: a tar with ``manifest.json``, the config, and a tar for each layer.

Such an archive has no OCI manifest, so one is made here, always the same for the same archive. A plain tar's digest is
its diff_id, which the config knows; only layers that some tool compressed have to be hashed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import trio

from clipfs.compression.codec import compression
from clipfs.errors import ClipfsError, ImageError, SourceError, UsageError
from clipfs.fields import Fields, parse_json, quoted
from clipfs.format.container import Codec
from clipfs.oci import (
    MAX_CONFIG,
    MAX_MANIFEST,
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    Digest,
    ImageConfig,
    Platform,
    Reference,
)
from clipfs.sources.archive import Archive
from clipfs.sources.base import PIECE, Document, LocalBlob, LocalSource, read_file

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_SUFFIX = {Codec.GZIP: "+gzip", Codec.ZSTD: "+zstd", None: ""}


class _Contents(NamedTuple):
    manifest: bytes
    blobs: dict[Digest, LocalBlob]


class DockerArchiveSource(LocalSource):
    """``docker-archive:FILE[:NAME[:TAG]]``."""

    def __init__(self, path: Path, tag: str | None = None) -> None:
        self._archive = Archive(path)
        self._tag = tag
        self._contents: _Contents | None = None
        self.name = f"docker-archive:{self._archive.path}" + (f":{tag}" if tag else "")

    def local(self, blob: Descriptor) -> LocalBlob:
        """See `LocalSource.local`."""
        contents = self._contents
        if contents is None:
            # Two threads may both get here; they find the same.
            contents = self._contents = _read(self._archive, self._tag)
        place = contents.blobs.get(blob.digest)
        if place is None or place.size != blob.size:
            raise SourceError(f"{self._archive.path} has no blob {blob.digest} of {blob.size} bytes; did it change?")
        return place

    def distrust(self, blob: Descriptor, at: int | None = None) -> None:
        """See `Source.distrust`: it may lie elsewhere in a file that was written anew."""
        del blob, at
        self._archive.forget()
        self._contents = None

    async def _named(self, platform: Platform) -> Document:
        del platform  # such an archive has no indexes
        self._contents = await trio.to_thread.run_sync(_read, self._archive, self._tag, abandon_on_cancel=True)
        return Document(self._contents.manifest, OCI_MANIFEST)


def _read(archive: Archive, tag: str | None) -> _Contents:
    """Find the image, and make the manifest that it would have in a registry that kept its layers as they are."""
    entry = _choose(archive, tag)
    name = entry.text("Config")
    place = archive.find(name)
    raw = archive.read_blob(place, MAX_CONFIG)
    digest = Digest.of(raw)
    told = re.search(r"([0-9a-f]{64})(\.json)?$", name)
    if told:
        Digest("sha256", told[1]).verify(raw, "the image config")
    config = ImageConfig.parse(raw)
    layers = entry.texts("Layers")
    if len(layers) != len(config.diff_ids):
        raise ImageError(f"{archive.path} is inconsistent: {len(layers)} layers, but {len(config.diff_ids)} diff_ids")
    blobs = {digest: place}
    descriptors = []
    for layer, diff_id in zip(layers, config.diff_ids, strict=True):
        place = archive.find(layer)
        suffix = _SUFFIX[compression(read_file(place.path, place.offset, 4))]
        digest_of_layer = _hash(place) if suffix else diff_id
        blobs[digest_of_layer] = place
        descriptors.append(_descriptor(_LAYER + suffix, digest_of_layer, place.size))
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": _descriptor(OCI_CONFIG, digest, len(raw)),
        "layers": descriptors,
    }
    return _Contents(json.dumps(manifest, separators=(",", ":")).encode(), blobs)


def _choose(archive: Archive, tag: str | None) -> Fields:
    """The image's entry in ``manifest.json``: the one that has the tag, or the only one."""
    if "manifest.json" not in archive:
        hint = f"; say oci-archive:{archive.path}" if "index.json" in archive else ""
        raise UsageError(f"{archive.path} is no docker archive: it has no manifest.json{hint}")
    images = parse_json(archive.read("manifest.json", MAX_MANIFEST), "manifest.json", MAX_MANIFEST)
    if not isinstance(images, list) or not images:
        raise ImageError(f"manifest.json of {archive.path} should be a list of images")
    entries = [Fields(image, f"manifest.json[{number}]") for number, image in enumerate(images)]
    found = [entry for entry in entries if tag is None or _same(tag, entry.texts("RepoTags"))]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(quoted(name) for entry in entries for name in entry.texts("RepoTags")) or "none with a name"
    if not found:
        raise UsageError(f"{archive.path} has no image {quoted(tag or '')}; it has {listed}")
    raise UsageError(f"{archive.path} has {len(found)} images; add one of these names: {listed}")


def _same(tag: str, names: tuple[str, ...]) -> bool:
    """Whether the name a person gave is one of these, with Docker's defaults on both sides."""
    try:
        return str(Reference.parse(tag)) in {str(Reference.parse(name)) for name in names}
    except ClipfsError:
        return tag in names


def _descriptor(media_type: str, digest: Digest, size: int) -> dict[str, object]:
    return {"mediaType": media_type, "digest": str(digest), "size": size}


def _hash(place: LocalBlob) -> Digest:
    hasher = Digest.of(b"").hasher()
    for start in range(0, place.size, PIECE):
        hasher.update(read_file(place.path, place.offset + start, min(PIECE, place.size - start)))
    return Digest("sha256", hasher.hexdigest())
