"""Archives of whole images, by `docker save` or with an OCI layout in them: any file is an error, or an image in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from clipfs.errors import ImageError, IntegrityError, SourceError, UsageError
from clipfs.oci import MAX_CONFIG, MAX_MANIFEST, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, Manifest, Platform
from clipfs.sources.archive import Archive, OciArchiveSource
from clipfs.sources.base import LocalBlob, read_file
from clipfs.sources.docker_archive import DockerArchiveSource, _read
from clipfs.sources.layout import choose
from tests import tars
from tests.clips import MEDIA_TYPE
from tests.fuzz import Change
from tests.fuzz import tar as layers
from tests.tars import Tar

LIMIT = 24 << 10

_TAGS = (None, "app:1", "latest")
_PLATFORM = Platform("linux", "amd64")
_ANY = (ImageError, IntegrityError, SourceError, UsageError)


def one(data: bytes) -> None:
    """Look for an image in both ways, and for each blob that it says it has."""
    # A file with a name: what is read of an archive must not be a link.
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        path = Path(file.name)
        for tag in _TAGS:
            archive = Archive(path)
            with contextlib.suppress(*_ANY):
                _docker(archive, DockerArchiveSource(path, tag), tag, len(data))
            with contextlib.suppress(*_ANY):
                _oci(archive, OciArchiveSource(path, tag), tag, len(data))
        for name in ("manifest.json", "../index.json", "/", "", "a/../../b", "link"):
            with contextlib.suppress(SourceError, ImageError, UsageError):
                _inside(archive.find(name), len(data))


def _docker(archive: Archive, source: DockerArchiveSource, tag: str | None, size: int) -> None:
    manifest = Manifest.parse(_read(archive, tag).manifest)
    source._contents = _read(archive, tag)
    for blob in (manifest.config, *manifest.layers):
        _inside(source.local(blob), size)


def _oci(archive: Archive, source: OciArchiveSource, tag: str | None, size: int) -> None:
    chosen = choose(archive.read("index.json", MAX_MANIFEST), tag, _PLATFORM, "input")
    place = source.local(chosen)
    _inside(place, size)
    manifest = Manifest.parse(archive.read_blob(place, MAX_MANIFEST), chosen.media_type)
    for blob in (manifest.config, *manifest.layers):
        _inside(source.local(blob), size)
    archive.read_blob(source.local(manifest.config), MAX_CONFIG)


def _inside(place: LocalBlob, size: int) -> None:
    assert 0 <= place.offset <= place.offset + place.size <= size
    assert len(read_file(place.path, place.offset, place.size)) == place.size


def mutate(data: bytes, change: Change, chance: random.Random) -> bytes:
    """As layers are changed."""
    return layers.mutate(data, change, chance)[:LIMIT]


def seeds() -> Iterator[tuple[str, bytes]]:
    config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": [_digest(_LAYER)]}}).encode()
    yield "docker", _docker_seed(config, "layer.tar").done()
    yield "docker with links", _docker_seed(config, "again/layer.tar").symlink("again/layer.tar", "../layer.tar").done()
    yield "oci", _oci_seed(config).done()
    long = Tar().raw(tars.gnu_long(b"d/" * 60 + b"index.json")).file(b"x", b"{}").hardlink("link", "manifest.json")
    yield "long names", long.member("p", b"x", extra={"path": "manifest.json", "size": "1"}).done()


_LAYER = tars.header(b"f", size=1) + tars.padded(b"x") + tars.END


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _docker_seed(config: bytes, layer: str) -> Tar:
    name = _digest(config).removeprefix("sha256:") + ".json"
    entry = {"Config": name, "RepoTags": ["app:1"], "Layers": [layer]}
    tar = Tar().file("manifest.json", json.dumps([entry]).encode()).file(name, config)
    return tar.file("layer.tar", _LAYER)


def _oci_seed(config: bytes) -> Tar:
    def described(kind: str, data: bytes) -> dict[str, object]:
        return {"mediaType": kind, "digest": _digest(data), "size": len(data)}

    parts = {"schemaVersion": 2, "config": described(OCI_CONFIG, config), "layers": [described(MEDIA_TYPE, _LAYER)]}
    manifest = json.dumps(parts).encode()
    named = {**described(OCI_MANIFEST, manifest), "annotations": {"org.opencontainers.image.ref.name": "latest"}}
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [named]}).encode()
    tar = Tar().file("index.json", index).file("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
    for blob in (config, _LAYER, manifest):
        tar.file("blobs/" + _digest(blob).replace(":", "/"), blob)
    return tar
