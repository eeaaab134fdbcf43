"""Mount and run container images without downloading or unpacking them.

The names below are the library; everything else is how it is done. They are imported when first used, because a mount
should not wait for an HTTP client that it may never need.

    import clipfs

    report = clipfs.build("docker://debian:12", "debian.clip")
    with clipfs.mount("debian.clip", "/mnt") as mounted:
        print(mounted.counters())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from clipfs.building.builder import BuildReport, build, index_for
    from clipfs.building.extractor import extract
    from clipfs.building.packer import PackReport, pack
    from clipfs.errors import (
        AuthError,
        ClipfsError,
        FormatError,
        ImageError,
        IntegrityError,
        MountError,
        SourceError,
        UsageError,
    )
    from clipfs.format.index import Index
    from clipfs.mounting.mounter import Mount, MountOptions, gc, mount, mounts, unmount, upgrade
    from clipfs.oci import Digest, ImageConfig, Manifest, Platform, Reference
    from clipfs.sources.fetcher import SourceOptions

_HOME = {
    "AuthError": "errors",
    "BuildReport": "building.builder",
    "ClipfsError": "errors",
    "Digest": "oci",
    "FormatError": "errors",
    "ImageConfig": "oci",
    "ImageError": "errors",
    "Index": "format.index",
    "IntegrityError": "errors",
    "Manifest": "oci",
    "Mount": "mounting.mounter",
    "MountError": "errors",
    "MountOptions": "mounting.mounter",
    "PackReport": "building.packer",
    "Platform": "oci",
    "Reference": "oci",
    "SourceError": "errors",
    "SourceOptions": "sources.fetcher",
    "UsageError": "errors",
    "build": "building.builder",
    "extract": "building.extractor",
    "gc": "mounting.mounter",
    "index_for": "building.builder",
    "mount": "mounting.mounter",
    "mounts": "mounting.mounter",
    "pack": "building.packer",
    "unmount": "mounting.mounter",
    "upgrade": "mounting.mounter",
}

__all__ = [
    "AuthError",
    "BuildReport",
    "ClipfsError",
    "Digest",
    "FormatError",
    "ImageConfig",
    "ImageError",
    "Index",
    "IntegrityError",
    "Manifest",
    "Mount",
    "MountError",
    "MountOptions",
    "PackReport",
    "Platform",
    "Reference",
    "SourceError",
    "SourceOptions",
    "UsageError",
    "build",
    "extract",
    "gc",
    "index_for",
    "mount",
    "mounts",
    "pack",
    "unmount",
    "upgrade",
]


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'clipfs' has no attribute {name!r}") from None
    return getattr(import_module(f"clipfs.{home}"), name)
