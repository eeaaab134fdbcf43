"""Images in a registry that speaks the OCI distribution protocol: manifests by tag or digest, ranges of blobs.

It knows the protocol's paths and what an answer must look like to be believed; connections, credentials and retries are
the business of `transport`, `auth` and `retry`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import TYPE_CHECKING

from clipfs.errors import ImageError, SourceError
from clipfs.oci import INDEX_TYPES, MANIFEST_TYPES, MAX_MANIFEST, Descriptor, Digest, Manifest, Platform, Reference
from clipfs.sources.base import Document, LocalBlob, Source, check_range
from clipfs.sources.retry import Patience, Transient, persist
from clipfs.sources.transport import Transport

if TYPE_CHECKING:
    import httpx2

# Schema 1 is not among them, so that registries convert what they can instead of sending it.
_ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")


class RegistrySource(Source):
    """``docker://HOST/REPOSITORY[:TAG|@DIGEST]``. Needs no network before the first byte is asked for."""

    def __init__(
        self, reference: Reference, *, insecure: bool = False, authfile: Path | None = None, ca: Path | None = None
    ) -> None:
        self.name = f"docker://{reference}"
        self._reference = reference
        self._host = reference.host
        self._transport = Transport(reference.host, reference.repository, insecure=insecure, authfile=authfile, ca=ca)

    async def aclose(self) -> None:
        """See `Source.aclose`."""
        await self._transport.aclose()

    def local(self, blob: Descriptor) -> LocalBlob | None:
        """See `Source.local`: nothing in a registry is on this machine."""
        del blob
        return None

    async def read_range(self, blob: Descriptor, start: int, end: int) -> bytes:
        """See `Source.read_range`. A registry that ignores ranges costs what lies before the range, but works."""
        check_range(blob, start, end)
        if start == end:
            return b""
        what = _what(blob)

        async def attempt() -> bytes:
            data = bytearray()
            async with (
                self._blob(blob, start, end) as response,
                aclosing(_exactly(response, start, end, blob, self._host)) as chunks,
            ):
                async for chunk in chunks:
                    data += chunk
            return bytes(data)

        return await persist(self._host, what, end - start, attempt)

    async def stream(self, blob: Descriptor) -> AsyncIterator[bytes]:
        """See `Source.stream`. A broken connection is taken up again where it broke."""
        position = 0
        patience = Patience(self._host, _what(blob), blob.size)
        while position < blob.size:
            try:
                async with (
                    self._blob(blob, position, blob.size) as response,
                    aclosing(_exactly(response, position, blob.size, blob, self._host)) as chunks,
                ):
                    async for chunk in chunks:
                        position += len(chunk)
                        patience.progressed()
                        yield chunk
            except Transient as failure:
                await patience.pause(failure)

    async def _named(self, platform: Platform) -> Document:
        del platform
        return await self._document(self._reference.digest, self._reference.tag)

    async def _manifest(self, descriptor: Descriptor) -> bytes:
        return (await self._document(descriptor.digest, None)).raw

    def _canonical(self, manifest: Manifest) -> str:
        return f"docker://{self._reference.pinned(manifest.digest)}"

    async def _document(self, digest: Digest | None, tag: str | None) -> Document:
        """A manifest or index; verified if its digest is known, by the name or by the registry's own word."""
        path = f"/v2/{self._reference.repository}/manifests/{digest or tag}"
        what = f"image {self._reference.repository}{f'@{digest}' if digest else f':{tag}'}"

        async def attempt() -> Document:
            async with self._transport.get(path, {"Accept": _ACCEPT}, what=what) as response:
                raw = bytearray()
                async for chunk in response.aiter_raw():
                    raw += chunk
                    if len(raw) > MAX_MANIFEST:
                        raise ImageError(f"the manifest has more than {MAX_MANIFEST} bytes, which are not read")
                stated = response.headers.get("Docker-Content-Digest")
                kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
                known = digest or (Digest.parse(stated) if stated else None)
                return Document(known.verify(bytes(raw), "the manifest") if known else bytes(raw), kind or None)

        return await persist(self._host, what, 0, attempt)

    def _blob(self, blob: Descriptor, start: int, end: int) -> AbstractAsyncContextManager[httpx2.Response]:
        headers = {"Range": f"bytes={start}-{end - 1}"} if (start, end) != (0, blob.size) else {}
        return self._transport.get(
            f"/v2/{self._reference.repository}/blobs/{blob.digest}",
            headers,
            what=_what(blob),
            remember=str(blob.digest),
        )


def _what(blob: Descriptor) -> str:
    note = " (a layer whose author forbids redistribution, so registries may lack it)" if blob.foreign else ""
    return f"blob {blob.digest}{note}"


async def _exactly(
    response: httpx2.Response, start: int, end: int, blob: Descriptor, host: str
) -> AsyncGenerator[bytes, None]:
    """The bytes [start, end) of a blob from an answer that has them, alone or in the whole blob."""
    partial = response.status_code == 206
    if partial:
        _check_range_header(response.headers.get("Content-Range", ""), start, end, blob, host)
    skip, left = 0 if partial else start, end - start
    async for received in response.aiter_raw():
        chunk = received[skip:]
        skip -= len(received) - len(chunk)
        wanted = chunk[:left]
        if len(wanted) < len(chunk) and (partial or end == blob.size):
            raise SourceError(f"{host} sent more of blob {blob.digest} than it should have")
        left -= len(wanted)
        if wanted:
            yield wanted
        # Otherwise read on to the end of the answer, which leaves the connection good for another request.
        if not left and not partial and end < blob.size:
            return
    if left:
        raise Transient(f"the connection ended {left} bytes early")


def _check_range_header(header: str, start: int, end: int, blob: Descriptor, host: str) -> None:
    """206 without the right Content-Range could be any bytes."""
    told = _CONTENT_RANGE.fullmatch(header)
    if told is None or (int(told[1]), int(told[2]) + 1) != (start, end):
        raise SourceError(f"{host} was asked for bytes {start} to {end} of blob {blob.digest} and sent others")
    if told[3] not in ("*", str(blob.size)):
        raise SourceError(f"{host} says that blob {blob.digest} has {told[3]} bytes; its descriptor says {blob.size}")
