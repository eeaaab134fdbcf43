"""Images in a registry that speaks the OCI distribution protocol: manifests by tag or digest, ranges of blobs.

It knows the protocol's paths and what an answer must look like to be believed; connections, credentials and retries are
the business of `transport`, `auth` and `retry`. Where mirrors are configured, they are asked first; a digest means the
same bytes everywhere, so a transfer that one place broke off goes on at another.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import trio

from clipfs.errors import ImageError
from clipfs.oci import INDEX_TYPES, MANIFEST_TYPES, MAX_MANIFEST, Descriptor, Digest, Manifest, Platform, Reference
from clipfs.sources import mirrors
from clipfs.sources.base import Document, LocalBlob, Sink, Source, check_range
from clipfs.sources.retry import FAILURES, Deadlines, Server, Transient, Turns, persist
from clipfs.sources.transport import Transport

if TYPE_CHECKING:
    import httpx2

# Schema 1 is not among them, so that registries convert what they can instead of sending it.
_ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")

# What may come before the wanted bytes, and is thrown away, when a server sends the whole blob instead of a range: a
# second on a slow line. More than that would be a full download for every range.
_MAX_SKIPPED = 4 << 20

# Ranges whose sender is remembered: more than are under way at once, so that wrong bytes can be blamed on somebody.
_REMEMBERED = 64


class _Site(Server):
    """A registry that has the repository, under the name that it has there."""

    def __init__(self, reference: Reference, transport: Transport) -> None:
        super().__init__(reference.host)
        self.reference = reference
        self.transport = transport


class _Served(NamedTuple):
    digest: Digest
    start: int
    end: int
    site: _Site


class RegistrySource(Source):
    """``docker://HOST/REPOSITORY[:TAG|@DIGEST]``. Needs no network before the first byte is asked for."""

    def __init__(
        self,
        reference: Reference,
        *,
        insecure: bool = False,
        authfile: Path | None = None,
        ca: Path | None = None,
        timeout: float | None = None,
    ) -> None:
        self.name = f"docker://{reference}"
        self._reference = reference
        self._insecure, self._authfile, self._ca = insecure, authfile, ca
        self._deadlines = Deadlines.chosen(timeout)
        self._known_sites: list[_Site] = []
        self._finding = trio.Lock()
        self._served: deque[_Served] = deque(maxlen=_REMEMBERED)

    async def aclose(self) -> None:
        """See `Source.aclose`."""
        for site in self._known_sites:
            await site.transport.aclose()

    def local(self, blob: Descriptor) -> LocalBlob | None:
        """See `Source.local`: nothing in a registry is on this machine."""
        del blob
        return None

    def distrust(self, blob: Descriptor, at: int | None = None) -> None:
        """See `Source.distrust`."""
        sent = [
            each.site
            for each in self._served
            if each.digest == blob.digest and (at is None or each.start <= at < each.end)
        ]
        if not sent:
            return
        # A byte is whose that was sent last. Of all together it may be any's, and the registry's if there is no other.
        mirrors = {site for site in sent if site is not self._known_sites[-1]}
        for site in mirrors if at is None and mirrors else sent[-1:]:
            site.distrust()
            site.transport.distrust(str(blob.digest))

    async def read_into(self, blob: Descriptor, start: int, end: int, sink: Sink) -> None:
        """See `Source.read_into`. What has come stays when a connection breaks, and the rest is asked for."""
        check_range(blob, start, end)
        if start == end:
            return
        at = start
        turns = await self._turns(_what(blob), end - start)

        async def attempt(site: _Site) -> None:
            nonlocal at
            if at == end:  # the last answer broke when all of it was here
                return
            async with (
                _blob(site, blob, at, end) as response,
                aclosing(_exactly(response, at, end, blob)) as chunks,
            ):
                self._served.append(_Served(blob.digest, at, end, site))
                async for chunk in chunks:
                    at += len(chunk)
                    sink(chunk)

        await persist(turns, attempt)

    async def stream(self, blob: Descriptor) -> AsyncGenerator[bytes, None]:
        """See `Source.stream`. A broken connection is taken up again where it broke."""
        position = 0
        turns = await self._turns(_what(blob), blob.size)
        while position < blob.size:
            try:
                async with (
                    _blob(turns.server, blob, position, blob.size) as response,
                    aclosing(_exactly(response, position, blob.size, blob)) as chunks,
                ):
                    self._served.append(_Served(blob.digest, position, blob.size, turns.server))
                    async for chunk in chunks:
                        position += len(chunk)
                        turns.progressed()
                        yield chunk
            except FAILURES as failure:
                await turns.failed(failure)

    async def _named(self, platform: Platform) -> Document:
        del platform
        return await self._document(self._reference.digest, self._reference.tag)

    async def _manifest(self, descriptor: Descriptor) -> bytes:
        return (await self._document(descriptor.digest, None)).raw

    def _canonical(self, manifest: Manifest) -> str:
        return f"docker://{self._reference.pinned(manifest.digest)}"

    async def _document(self, digest: Digest | None, tag: str | None) -> Document:
        """A manifest or index; verified if its digest is known, by the name or by the registry's own word."""
        what = f"image {self._reference.repository}{f'@{digest}' if digest else f':{tag}'}"

        async def attempt(site: _Site) -> Document:
            path = f"/v2/{site.reference.repository}/manifests/{digest or tag}"
            async with site.transport.get(path, {"Accept": _ACCEPT}, what=what) as response:
                raw = bytearray()
                async for chunk in response.aiter_raw():
                    raw += chunk
                    if len(raw) > MAX_MANIFEST:
                        raise ImageError(f"the manifest has more than {MAX_MANIFEST} bytes, which are not read")
                stated = response.headers.get("Docker-Content-Digest")
                kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
                known = digest or (Digest.parse(stated) if stated else None)
                return Document(known.verify(bytes(raw), "the manifest") if known else bytes(raw), kind or None)

        return await persist(await self._turns(what, 0), attempt)

    async def _turns(self, what: str, size: int) -> Turns[_Site]:
        return Turns(await self._sites(), what, size, self._deadlines)

    async def _sites(self) -> list[_Site]:
        """Mirrors and the registry itself, in the order in which they are asked; looked up when first needed."""
        async with self._finding:
            if not self._known_sites:
                found = await trio.to_thread.run_sync(self._endpoints)
                self._known_sites = [self._site(endpoint) for endpoint in found]
            return self._known_sites

    def _endpoints(self) -> list[mirrors.Endpoint]:
        return mirrors.endpoints(self._reference, insecure=self._insecure)

    def _site(self, endpoint: mirrors.Endpoint) -> _Site:
        there = endpoint.reference
        transport = Transport(
            there.host,
            there.repository,
            insecure=endpoint.insecure,
            authfile=self._authfile,
            ca=self._ca,
            deadlines=self._deadlines,
        )
        return _Site(there, transport)


def _blob(site: _Site, blob: Descriptor, start: int, end: int) -> AbstractAsyncContextManager[httpx2.Response]:
    headers = {"Range": f"bytes={start}-{end - 1}"} if (start, end) != (0, blob.size) else {}
    path = f"/v2/{site.reference.repository}/blobs/{blob.digest}"
    return site.transport.get(path, headers, what=_what(blob), remember=str(blob.digest))


def _what(blob: Descriptor) -> str:
    note = " (a layer whose author forbids redistribution, so registries may lack it)" if blob.foreign else ""
    return f"blob {blob.digest}{note}"


async def _exactly(response: httpx2.Response, start: int, end: int, blob: Descriptor) -> AsyncGenerator[bytes, None]:
    """The bytes [start, end) of a blob from an answer that has them, alone or in the whole blob. Transient if it has
    others: whoever sent them may have been a cache in between, or one server of many."""
    partial = response.status_code == 206
    if partial:
        _check_range_header(response, start, end, blob)
    elif start > _MAX_SKIPPED:
        raise Transient(
            "it answers no range requests, so that nothing can be read in place; copy the image to a registry that "
            "does, or into an OCI layout (`skopeo copy`), and name that with --source"
        )
    skip, left = 0 if partial else start, end - start
    async for received in response.aiter_raw():
        chunk = received[skip:]
        skip -= len(received) - len(chunk)
        wanted = chunk[:left]
        if len(wanted) < len(chunk) and (partial or end == blob.size):
            raise Transient(f"it sent more of blob {blob.digest} than it should have")
        left -= len(wanted)
        if wanted:
            yield wanted
        # Otherwise read on to the end of the answer, which leaves the connection good for another request.
        if not left and not partial and end < blob.size:
            return
    if left:
        raise Transient(f"the connection ended {left} bytes early")


def _check_range_header(response: httpx2.Response, start: int, end: int, blob: Descriptor) -> None:
    """206 without the right Content-Range could be any bytes."""
    if response.headers.get("Content-Type", "").lower().startswith("multipart/"):
        raise Transient("it sent a range in several parts, for which nobody asked")
    told = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if told is None or (int(told[1]), int(told[2]) + 1) != (start, end):
        raise Transient(f"it was asked for bytes {start} to {end} and sent others")
    if told[3] not in ("*", str(blob.size)):
        raise Transient(f"it says that the blob has {told[3]} bytes; its descriptor says {blob.size}")
