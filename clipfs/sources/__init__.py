"""Where images come from. `open_source` turns a name, spelled as skopeo spells it, into a `Source`.

What the kinds of sources need is imported when one is opened: a mount opens its own when a read first misses.
"""

from __future__ import annotations

import os
from pathlib import Path

from clipfs.errors import UsageError
from clipfs.fields import quoted
from clipfs.oci import Reference
from clipfs.sources.base import Image, LocalBlob, Source

__all__ = ["Image", "LocalBlob", "Source", "open_source"]

_FORMS = """An image is named like this:
  oci:DIR[:TAG]                             an OCI image layout
  oci-archive:FILE[:TAG]                    the same in a tar file
  docker-archive:FILE[:NAME[:TAG]]          what `docker save` writes
  docker://HOST/REPOSITORY[:TAG|@DIGEST]    an image in a registry; docker:// may be left out"""

_LOCAL = ("oci", "oci-archive", "docker-archive")
# Transports that skopeo has and clipfs has not; without this list they would be taken for repositories with a tag.
_OTHERS = ("containers-storage", "dir", "docker-daemon", "ftp", "http", "https", "ostree", "sif", "tarball")


def open_source(
    name: str,
    *,
    insecure: bool = False,
    authfile: Path | None = None,
    ca: Path | None = None,
    timeout: float | None = None,
) -> Source:
    """The source that `name` means. UsageError if there is no such form, file or directory; no network is used yet.

    insecure: plain HTTP and unverified TLS are acceptable; authfile: credentials in Docker's format, instead of the
    usual places; ca: certificates (PEM) to trust besides the system's; timeout: how many seconds a read may take with
    all its attempts, None for $CLIPFS_TIMEOUT or 90.
    """
    transport, colon, rest = name.partition(":")
    if colon and transport in _LOCAL:
        path, _, tag = rest.partition(":")
        if not path or "\0" in path:
            raise UsageError(f"{quoted(name)} names no file or directory.\n{_FORMS}")
        return _local(transport, Path(path), tag or None)
    if colon and transport in _OTHERS:
        raise UsageError(f"clipfs has no source {transport}:; copy the image with skopeo.\n{_FORMS}")
    try:
        reference = Reference.parse(name.removeprefix("docker://"))
    except UsageError as error:
        hint = f"If the path {quoted(name)} is meant, put its form before it. " if os.path.exists(name) else ""
        raise UsageError(f"{error}. {hint}{_FORMS}") from None
    from clipfs.sources.registry import RegistrySource

    return RegistrySource(reference, insecure=insecure, authfile=authfile, ca=ca, timeout=timeout)


def _local(transport: str, path: Path, tag: str | None) -> Source:
    if transport == "oci":
        from clipfs.sources.layout import LayoutSource

        return LayoutSource(path, tag)
    if transport == "oci-archive":
        from clipfs.sources.archive import OciArchiveSource

        return OciArchiveSource(path, tag)
    from clipfs.sources.docker_archive import DockerArchiveSource

    return DockerArchiveSource(path, tag)
