"""The documents of OCI images: descriptors, manifests, indexes and image configs, and the names they use.

Everything here is parsed from what a stranger wrote, and what does not fit is an ImageError that names the field. This
module does no I/O and does not know where images are kept; Docker's schema 2 is treated as the other spelling of the
same documents that it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from clipfs.errors import ImageError
from clipfs.fields import Fields, quoted
from clipfs.names import Digest, Platform, Reference, not_empty

__all__ = [
    "DOCKER_CONFIG",
    "DOCKER_LIST",
    "DOCKER_MANIFEST",
    "INDEX_TYPES",
    "MANIFEST_TYPES",
    "MAX_CONFIG",
    "MAX_MANIFEST",
    "OCI_CONFIG",
    "OCI_INDEX",
    "OCI_MANIFEST",
    "Descriptor",
    "Digest",
    "ImageConfig",
    "ImageIndex",
    "Manifest",
    "Platform",
    "Reference",
    "not_empty",
    "parse_manifest",
]

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (OCI_INDEX, DOCKER_LIST)
_SCHEMA_1 = re.compile(r"application/vnd\.docker\.distribution\.manifest\.v1\+")

# What is read of each document, in the one spelling that it may have.
_MANIFEST_FIELDS = ("schemaVersion", "mediaType", "artifactType", "config", "layers", "manifests")
_DESCRIPTOR_FIELDS = ("mediaType", "digest", "size", "annotations", "platform")
_CONFIG_FIELDS = ("os", "architecture", "variant", "rootfs", "config")
_RUN_FIELDS = ("Env", "Entrypoint", "Cmd", "WorkingDir", "User", "StopSignal", "Volumes", "Labels")

# The distribution spec asks registries to take at least 4 MiB of manifest; nobody can rely on more.
MAX_MANIFEST = 4 << 20
# A config grows with its history and labels; containers/image stops at half of this.
MAX_CONFIG = 8 << 20
# Docker and BuildKit make 127 at most. One layer can be listed as often as a manifest has room, and is read each time.
MAX_LAYERS = 1024
# Offsets into a layer have 48 bits in a .clip, and no blob of 256 TiB is honest.
MAX_BLOB = (1 << 48) - 1

_LAYER = re.compile(
    r"application/vnd\.(oci\.image\.layer(?P<nondistributable>\.nondistributable)?\.v1\.tar(\+(gzip|zstd))?"
    r"|docker\.image\.rootfs\.(?P<foreign>foreign\.)?diff\.tar(\.(gzip|zstd))?)"
)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A pointer to a blob: what it is, its digest, its size."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)
    platform: Platform | None = None

    @property
    def foreign(self) -> bool:
        """Whether registries need not hold this layer: the author forbade redistribution."""
        kind = _LAYER.fullmatch(self.media_type)
        return bool(kind and (kind["foreign"] or kind["nondistributable"]))


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image for one platform: its config and its layers, lowest first. ``raw`` is what the digest is of."""

    raw: bytes
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]

    @classmethod
    def parse(cls, raw: bytes, media_type: str | None = None) -> Manifest:
        """media_type: what the descriptor or the registry called it, if known; it must not contradict the document."""
        parsed = parse_manifest(raw, media_type)
        if isinstance(parsed, ImageIndex):
            raise ImageError("an image index stands where an image manifest should")
        return parsed

    @property
    def digest(self) -> Digest:
        """The SHA-256 of the document, whatever algorithm it was asked for by."""
        return Digest.of(self.raw)


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """A list of manifests, one a platform: an OCI index or a Docker manifest list."""

    manifests: tuple[Descriptor, ...]

    def select(self, wanted: Platform) -> Descriptor:
        """The manifest that runs on `wanted` best; ImageError that lists what there is."""
        ranked = [
            (distance, number)
            for number, each in enumerate(self.manifests)
            if each.platform is not None and (distance := wanted.distance(each.platform)) is not None
        ]
        if ranked:
            return self.manifests[min(ranked)[1]]
        anonymous = [each for each in self.manifests if each.platform is None]
        if len(anonymous) == 1:
            return anonymous[0]
        known = sorted({str(each.platform) for each in self.manifests if each.platform} - {"unknown/unknown"})
        raise ImageError(
            f"the image has nothing for {wanted}; it is made for {', '.join(known) or 'no platform that it names'}"
        )


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """How an image wants to be run, and the digests of its uncompressed layers."""

    raw: bytes
    os: str
    architecture: str
    diff_ids: tuple[Digest, ...]
    variant: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, raw: bytes) -> ImageConfig:
        """The config blob; its digest is the caller's to verify. One that others read differently is refused."""
        whole = Fields.parse(raw, "the image config", MAX_CONFIG, once=True).exact(*_CONFIG_FIELDS)
        rootfs = whole.child("rootfs").exact("type", "diff_ids")
        run = whole.child("config").exact(*_RUN_FIELDS)
        if rootfs.text("type", "layers") != "layers":
            raise ImageError(
                f"the image config's root file system is of type {quoted(rootfs.text('type'))}, not layers"
            )
        return cls(
            raw=bytes(raw),
            os=whole.text("os", "linux") or "linux",
            architecture=whole.text("architecture", ""),
            variant=whole.text("variant", ""),
            diff_ids=tuple(Digest.parse(text) for text in rootfs.texts("diff_ids")),
            env=run.texts("Env"),
            entrypoint=run.texts("Entrypoint"),
            cmd=run.texts("Cmd"),
            working_dir=run.text("WorkingDir", ""),
            user=run.text("User", ""),
            stop_signal=run.text("StopSignal", ""),
            volumes=run.names("Volumes"),
            labels=run.mapping("Labels"),
        )

    @property
    def platform(self) -> Platform:
        """What the image says it is made for."""
        return Platform(self.os, self.architecture, self.variant)


def parse_manifest(raw: bytes, media_type: str | None = None) -> Manifest | ImageIndex:
    """A manifest or an index, whichever it is.

    A document that could be read as both, or that is called something else than it says it is, is refused: two tools
    would see two different images under one digest (CVE-2021-41190).
    """
    whole = Fields.parse(raw, "the manifest", MAX_MANIFEST, once=True).exact(*_MANIFEST_FIELDS)
    named = whole.text("mediaType", "")
    known = (*MANIFEST_TYPES, *INDEX_TYPES)
    called = named or media_type or ""
    if whole.value.get("schemaVersion") == 1 or _SCHEMA_1.match(called):
        raise ImageError(
            "the image has a Docker schema 1 manifest, which has no layer sizes and was retired in 2019; "
            "push the image again with a current tool"
        )
    if "layers" in whole.value and "manifests" in whole.value:
        raise ImageError("the manifest claims to be an image and an index at once")
    given = media_type if media_type in known else None
    if named and given and named != given:
        raise ImageError(f"the manifest says it is {quoted(named)}, but is served as {quoted(given)}")
    is_index = "manifests" in whole.value
    kind = named or given or (OCI_INDEX if is_index else OCI_MANIFEST)
    if kind not in (INDEX_TYPES if is_index else MANIFEST_TYPES):
        raise ImageError(f"the manifest is of type {quoted(kind)}, which is no image")
    if is_index:
        return ImageIndex(tuple(_descriptor(each) for each in whole.children("manifests")))
    return _image_manifest(whole, bytes(raw), kind)


def _image_manifest(whole: Fields, raw: bytes, kind: str) -> Manifest:
    config = _descriptor(whole.child("config"))
    if config.media_type not in (OCI_CONFIG, DOCKER_CONFIG):
        artifact = whole.text("artifactType", "") or config.media_type
        raise ImageError(
            f"this is an artifact of type {quoted(artifact)}, not a container image; it has no file system"
        )
    layers = tuple(_descriptor(each) for each in whole.children("layers"))
    if len(layers) > MAX_LAYERS:
        raise ImageError(f"the image has {len(layers)} layers; more than {MAX_LAYERS} are not read")
    for layer in layers:
        if layer.media_type.endswith("+encrypted"):
            raise ImageError(
                "the layer is encrypted; decrypt the image first (skopeo copy --decryption-key)", layer=layer.digest
            )
        if not _LAYER.fullmatch(layer.media_type):
            raise ImageError(
                f"the layer is of type {quoted(layer.media_type)}, not a file system layer", layer=layer.digest
            )
    return Manifest(raw, kind, config, layers)


def _descriptor(fields: Fields) -> Descriptor:
    size = fields.exact(*_DESCRIPTOR_FIELDS).value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_BLOB:
        raise ImageError(f"{fields.where}: a size should be a number of bytes, not {quoted(repr(size))}")
    target = None
    if fields.value.get("platform") is not None:
        told = fields.child("platform").exact("os", "architecture", "variant")
        target = Platform(told.text("os", ""), told.text("architecture", ""), told.text("variant", ""))
    return Descriptor(
        media_type=fields.text("mediaType", ""),
        digest=Digest.parse(fields.text("digest")),
        size=size,
        annotations=fields.mapping("annotations"),
        platform=target,
    )
