"""HTTP requests towards one registry: one attempt each, ending in an answer, in `Transient`, or in one clear sentence.

Owned here: the connections, which of http and https is spoken, who may see the Authorization header, and what a status
means in words. It does not know what is fetched, nor when to try again.

Redirects are followed by hand. The header goes to the registry's own origin and nowhere else, https never turns into
http, and where a blob was found is remembered until that place fails, which saves a round trip a range.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from clipfs.errors import ImageError, SourceError, UsageError
from clipfs.fields import Fields, quoted
from clipfs.sources.auth import Answer, Authorizer, is_loopback
from clipfs.sources.retry import Transient

if TYPE_CHECKING:
    import httpx2

# A reader waits in the kernel meanwhile. TCP gives a lost SYN three tries in 7 s, so 10 s is "nobody there".
_CONNECT_SECONDS = 10.0
# The longest silence in the middle of an answer. Object stores have first-byte latencies of seconds on a bad day.
_SILENCE_SECONDS = 20.0
# Closing sends at most a TLS goodbye; it also has to happen when the reader was cancelled.
_CLOSE_SECONDS = 1.0
# Registry → storage → CDN is three; browsers give up at 20, but a read must not wander that long.
_MAX_HOPS = 5
# How much of an error's body is read for its message.
_MAX_ERROR = 1 << 16
# Parallel requests to one host: browsers use 6, and read-ahead wants a few for itself.
_CONNECTIONS = 16
_GOOD = frozenset({200, 206})
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_USER_AGENT = "clipfs"


class Transport:
    """GET for one repository of the registry at `host`, authorized. Opens nothing before the first request."""

    def __init__(self, host: str, repository: str, *, insecure: bool, authfile: Path | None, ca: Path | None) -> None:
        self._host = host
        self._insecure = insecure
        self._ca = ca
        self._authorizer = Authorizer(host, repository, authfile, self._ask)
        self._client: httpx2.AsyncClient | None = None
        self._origin: httpx2.URL | None = None
        self._starting = trio.Lock()
        self._found_at: dict[str, httpx2.URL] = {}

    async def aclose(self) -> None:
        """Close all connections."""
        client, self._client, self._origin = self._client, None, None
        if client is not None:
            await client.aclose()

    @asynccontextmanager
    async def get(
        self, path: str, headers: Mapping[str, str], *, what: str, remember: str | None = None
    ) -> AsyncIterator[httpx2.Response]:
        """The answer to GET `path`, 200 or 206, with its body unread.

        what: for the sentence if the registry says no. remember: a key under which to keep where redirects led.
        Raises Transient for what deserves another attempt, SourceError or AuthError for the rest.
        """
        import httpx2

        client, origin = await self._started()
        response = await self._follow(client, origin.join(path), headers, remember)
        try:
            if response.status_code not in _GOOD:
                raise await self._refusal(response, what)
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise SourceError(f"{self._host} sent {what} in an encoding that nobody asked for")
            yield response
        except httpx2.TransportError as error:
            raise self._translated(error) from error
        finally:
            # A body that was not read to its end takes its connection with it: nothing more is transferred.
            with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                await response.aclose()

    async def _follow(
        self, client: httpx2.AsyncClient, start: httpx2.URL, headers: Mapping[str, str], remember: str | None
    ) -> httpx2.Response:
        """Send, authorize, follow redirects. The caller closes what it gets."""
        if remember is not None and remember in self._found_at:
            response = await self._shortcut(client, remember, headers)
            if response is not None:
                return response
        url, hops, authorized = start, 0, False
        while True:
            used = self._authorizer.header
            response = await self._send(client, url, headers)
            own = _origin(url) == _origin(start)
            if response.status_code == 401 and own and not authorized:
                challenges = response.headers.get_list("WWW-Authenticate")
                await self._finish(response)
                await self._authorizer.renew(challenges, str(start.copy_with(raw_path=b"/")), used)
                authorized = True
            elif response.status_code in _REDIRECTS:
                await self._finish(response)
                hops += 1
                url = self._redirected(url, response.headers.get("Location", ""), hops)
            else:
                if remember is not None and url != start and response.status_code in _GOOD:
                    self._found_at[remember] = url
                return response

    async def _shortcut(
        self, client: httpx2.AsyncClient, key: str, headers: Mapping[str, str]
    ) -> httpx2.Response | None:
        """The answer from where a redirect led last time. Such addresses are signed for minutes; None if it expired."""
        try:
            response = await self._send(client, self._found_at[key], headers)
            if response.status_code in _GOOD:
                return response
            await self._finish(response)
        except Transient:
            pass
        self._found_at.pop(key, None)
        return None

    async def _send(self, client: httpx2.AsyncClient, url: httpx2.URL, headers: Mapping[str, str]) -> httpx2.Response:
        """One request, one answer; the Authorization header is added for the registry itself only."""
        import httpx2

        own = dict(headers)
        if self._authorizer.header is not None and self._origin is not None and _origin(url) == _origin(self._origin):
            own["Authorization"] = self._authorizer.header
        try:
            return await client.send(client.build_request("GET", url, headers=own), stream=True)
        except httpx2.TransportError as error:
            raise self._translated(error) from error

    async def _finish(self, response: httpx2.Response) -> None:
        """Close an answer of which only the head counts; a short body is read, so that its connection serves again."""
        import httpx2

        try:
            await _read_up_to(response, _MAX_ERROR)
        except httpx2.TransportError as error:
            raise self._translated(error) from error
        finally:
            with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                await response.aclose()

    def _redirected(self, url: httpx2.URL, location: str, hops: int) -> httpx2.URL:
        import httpx2

        if hops > _MAX_HOPS:
            raise SourceError(f"{self._host} redirects more than {_MAX_HOPS} times")
        try:
            target = url.join(location)
        except (httpx2.InvalidURL, ValueError):
            target = httpx2.URL()
        if target.scheme not in ("http", "https") or not target.host or target.userinfo:
            raise SourceError(f"{self._host} redirects to something that is no web address")
        if url.scheme == "https" and target.scheme == "http":
            raise SourceError(f"{self._host} redirects from https to plain http on {target.host}; refused")
        return target

    async def _ask(self, url: str, *, headers: Mapping[str, str], form: bytes | None, limit: int) -> Answer:
        """See `auth.Ask`."""
        import httpx2

        client, _ = await self._started()
        typed = {"Content-Type": "application/x-www-form-urlencoded"} if form is not None else {}
        try:
            request = client.build_request("POST" if form else "GET", url, headers={**headers, **typed}, content=form)
            response = await client.send(request, stream=True)
            try:
                if response.status_code in _AGAIN:
                    raise Transient(f"its token server answered with status {response.status_code}", _wish(response))
                return Answer(response.status_code, await _read_up_to(response, limit))
            finally:
                with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                    await response.aclose()
        except httpx2.InvalidURL:
            raise SourceError(f"{self._host} names no usable token server") from None
        except httpx2.TransportError as error:
            raise self._translated(error) from error

    async def _refusal(self, response: httpx2.Response, what: str) -> Exception:
        """What an answer without the bytes means."""
        status = response.status_code
        said = _message(await _read_up_to(response, _MAX_ERROR))
        own = self._origin is not None and _origin(response.url) == _origin(self._origin)
        if status in _AGAIN:
            return Transient(f"it answered with status {status}{said}", _wish(response))
        if status in (401, 403) and own:
            return self._authorizer.refused(said)
        where = self._host if own else f"{response.url.host}, where {self._host} redirects to,"
        if status == 404:
            return SourceError(f"{where} has no {what}{said}")
        if status == 416:
            return SourceError(f"{where} has {what} in another size")
        return SourceError(f"{where} answered the request for {what} with status {status}{said}")

    def _translated(self, error: httpx2.TransportError) -> Exception:
        """A broken connection as `Transient`; a certificate does not get better by trying again."""
        link: BaseException | None = error
        while link is not None:
            if isinstance(link, ssl.SSLCertVerificationError):
                return SourceError(
                    f"the certificate of {self._host} cannot be trusted: {link.verify_message}; "
                    "name the CA that signed it with --ca, or accept any with --insecure"
                )
            link = link.__cause__ or link.__context__
        return Transient(f"{type(error).__name__}: {error}".rstrip(": "))

    async def _started(self) -> tuple[httpx2.AsyncClient, httpx2.URL]:
        """The client and the registry's origin, made when first needed: an HTTP client costs 0.2 s of imports."""
        async with self._starting:
            if self._client is None:
                self._client = await trio.to_thread.run_sync(_make_client, self._insecure, self._ca)
            if self._origin is None:
                self._origin = await self._find_origin(self._client)
            return self._client, self._origin

    async def _find_origin(self, client: httpx2.AsyncClient) -> httpx2.URL:
        """Docker's rule: TLS comes first, and only where nobody can listen may plain HTTP take its place."""
        import httpx2

        # Docker Hub's API lives under another name than its images.
        host = "registry-1.docker.io" if self._host == "docker.io" else self._host
        secure = httpx2.URL(f"https://{host}")
        if self._ca is not None or not (self._insecure or is_loopback(secure.host)):
            return secure
        for origin in (secure, httpx2.URL(f"http://{host}")):
            try:
                response = await self._send(client, origin.join("/v2/"), {})
            except Transient as failure:
                reason = failure
            else:
                await self._finish(response)
                return origin
        raise reason


def _make_client(insecure: bool, ca: Path | None) -> httpx2.AsyncClient:
    """Blocks: imports, and reads the system's certificates."""
    import httpx2

    context = httpx2.create_ssl_context(verify=not insecure)
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"cannot read certificates from {ca}: {error.strerror or error}") from None
    return httpx2.AsyncClient(
        verify=context,
        follow_redirects=False,
        timeout=httpx2.Timeout(_SILENCE_SECONDS, connect=_CONNECT_SECONDS, pool=None),
        limits=httpx2.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS),
        # Ranges count bytes as they are stored; a compressed answer would have other ones.
        headers={"Accept-Encoding": "identity", "User-Agent": _USER_AGENT},
    )


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    """Scheme, host and port: who sees a secret that is sent there."""
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


async def _read_up_to(response: httpx2.Response, limit: int) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > limit:
            break
    return bytes(data[:limit])


def _message(body: bytes) -> str:
    """The first message of a registry's error document, for the end of a sentence."""
    try:
        errors = Fields.parse(body, "the answer", _MAX_ERROR).children("errors")
        return f": {quoted(errors[0].text('message'))}" if errors else ""
    except ImageError:
        return ""


def _wish(response: httpx2.Response) -> float:
    """Seconds that the server wants to be left alone (RFC 9110 §10.2.3)."""
    text = response.headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0
