"""HTTP requests towards one registry: one attempt each, ending in an answer, in `Transient`, or in one clear sentence.

Owned here: which of http and https is spoken, who may see the Authorization header, and where redirects may lead.
It does not know what is fetched, nor when to try again; connections are the business of `wire`.

Redirects are followed by hand. The header goes to the registry's own origin and nowhere else, https never turns into
http, nothing leads to addresses nearer than the registry (see `addresses`), and where a blob was found is remembered
until that place fails, which saves a round trip a range.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from clipfs.errors import SourceError
from clipfs.sources.addresses import Surroundings
from clipfs.sources.answers import (
    AGAIN,
    EXPIRED,
    GOOD,
    MAX_ERROR,
    REDIRECTS,
    has_host,
    message,
    no_address,
    origin,
    read_up_to,
    redirected,
    translated,
    wish,
)
from clipfs.sources.auth import Answer, Authorizer, is_loopback
from clipfs.sources.retry import Deadlines, Transient

if TYPE_CHECKING:
    import httpx2

    from clipfs.sources.wire import Connections, Trust

# Closing sends at most a TLS goodbye; it also has to happen when the reader was cancelled.
_CLOSE_SECONDS = 1.0
# Registry → storage → CDN is three; browsers give up at 20, but a read must not wander that long.
_MAX_HOPS = 5


class Transport:
    """GET for one repository of the registry at `host`, authorized. Opens nothing before the first request."""

    def __init__(
        self,
        host: str,
        repository: str,
        *,
        insecure: bool,
        authfile: Path | None,
        ca: Path | None,
        deadlines: Deadlines,
        scheme: str | None = None,
    ) -> None:
        """scheme: "http" or "https", None for what is found by docker's rule."""
        self._host = host
        self._scheme = scheme
        self._insecure = insecure
        self._ca = ca
        self._deadlines = deadlines
        self._authorizer = Authorizer(host, repository, authfile, self._ask, deadlines.helper)
        # Docker Hub's API lives under another name than its images.
        self._server = "registry-1.docker.io" if host == "docker.io" else host
        self._connections: Connections | None = None
        self._given_up: list[Connections] = []
        self._trust: Trust | None = None
        self._surroundings: Surroundings | None = None
        self._origin: httpx2.URL | None = None
        self._starting = trio.Lock()
        self._found_at: dict[str, httpx2.URL] = {}
        self._doubted: set[str] = set()

    async def aclose(self) -> None:
        """Close all connections."""
        connections, self._connections, self._origin = self._connections, None, None
        for each in filter(None, (connections, *self._given_up)):
            await each.aclose()
        self._given_up.clear()

    def distrust(self, remember: str) -> None:
        """What came of this was wrong: ask anew where it is, over new connections, and past caches on the way."""
        self._found_at.pop(remember, None)
        self._doubted.add(remember)
        if self._connections is not None:
            self._given_up.append(self._connections)
            self._connections = None

    @asynccontextmanager
    async def get(
        self, path: str, headers: Mapping[str, str], *, what: str, remember: str | None = None
    ) -> AsyncIterator[httpx2.Response]:
        """The answer to GET `path`, 200 or 206, with its body unread.

        what: for the sentence if the registry says no. remember: a key under which to keep where redirects led.
        Raises Transient for what deserves another attempt, SourceError or AuthError for the rest.
        """
        import httpx2

        connections, registry = await self._started()
        if remember in self._doubted:
            headers = {**headers, "Cache-Control": "no-cache"}
        connections.users += 1
        fine = False
        try:
            # Not joined to it: a path that begins with // would lead to another host.
            start = registry.copy_with(raw_path=path.encode("ascii"))
            response = await self._head(connections.client, start, headers, remember)
            try:
                if response.status_code not in GOOD:
                    raise await self._refusal(response, what)
                if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                    raise SourceError(f"{self._host} sent {what} in an encoding that nobody asked for")
                yield response
                fine = True
            finally:
                # A body that was not read to its end takes its connection with it: nothing more is transferred.
                with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                    await response.aclose()
        except httpx2.TransportError as error:
            raise self._translated(error) from error
        finally:
            connections.users -= 1
            if not fine and remember is not None:
                # Also when whoever waited ran out of patience: the next attempt asks where else it is.
                self._found_at.pop(remember, None)

    async def _head(
        self, client: httpx2.AsyncClient, start: httpx2.URL, headers: Mapping[str, str], remember: str | None
    ) -> httpx2.Response:
        """See `_follow`. Heads that come byte by byte do not come for ever."""
        try:
            with trio.fail_after(self._deadlines.attempt_for(0)):
                return await self._follow(client, start, headers, remember)
        except trio.TooSlowError:
            raise Transient("no answer in time") from None

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
            if self._own(url) and not authorized and self._may_renew(response, used):
                challenges = response.headers.get_list("WWW-Authenticate")
                await self._finish(response)
                await self._authorizer.renew(challenges, str(start.copy_with(raw_path=b"/")), used)
                authorized = True
            elif response.status_code in REDIRECTS:
                await self._finish(response)
                hops += 1
                if hops > _MAX_HOPS:
                    raise SourceError(f"{self._host} redirects more than {_MAX_HOPS} times")
                url = redirected(url, response.headers.get("Location", ""), self._host)
            else:
                if remember is not None and url != start and response.status_code in GOOD:
                    self._found_at[remember] = url
                return response

    def _own(self, url: httpx2.URL) -> bool:
        """Is it the registry itself that is spoken to there?"""
        return self._origin is not None and origin(url) == origin(self._origin)

    def _may_renew(self, response: httpx2.Response, used: str | None) -> bool:
        """Whether other credentials may help. Some registries call an expired token 403 (ECR does), others say so to
        whoever may not read, so that is asked about once a request at most."""
        return response.status_code == 401 or (response.status_code == 403 and self._authorizer.renewable(used))

    async def _shortcut(
        self, client: httpx2.AsyncClient, key: str, headers: Mapping[str, str]
    ) -> httpx2.Response | None:
        """The answer from where a redirect led last time. Such addresses are signed for minutes; None if it expired."""
        try:
            response = await self._send(client, self._found_at[key], headers)
            if response.status_code in GOOD:
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
        if self._authorizer.header is not None and self._own(url):
            own["Authorization"] = self._authorizer.header
        try:
            return await client.send(client.build_request("GET", url, headers=own), stream=True)
        except httpx2.TransportError as error:
            raise self._translated(error) from error
        except UnicodeError:  # the host of `url`, or of a redirect in the answer, can be none
            raise no_address(self._host) from None

    async def _finish(self, response: httpx2.Response) -> None:
        """Close an answer of which only the head counts; a short body is read, so that its connection serves again."""
        import httpx2

        try:
            await read_up_to(response, MAX_ERROR)
        except httpx2.TransportError as error:
            raise self._translated(error) from error
        finally:
            with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                await response.aclose()

    def _translated(self, error: httpx2.TransportError) -> Exception:
        """See `translated`."""
        url = error.request.url
        strange = self._origin is not None and not self._own(url)
        return translated(error, self._elsewhere(url) if strange else "")

    def _elsewhere(self, url: httpx2.URL) -> str:
        return f"{url.netloc.decode()}, where {self._host} redirects to"

    async def _ask(self, url: str, *, headers: Mapping[str, str], form: bytes | None, limit: int) -> Answer:
        """See `auth.Ask`."""
        import httpx2

        connections, _ = await self._started()
        client = connections.client
        typed = {"Content-Type": "application/x-www-form-urlencoded"} if form is not None else {}
        try:
            request = client.build_request("POST" if form else "GET", url, headers={**headers, **typed}, content=form)
            response = await client.send(request, stream=True)
            try:
                if response.status_code in AGAIN:
                    raise Transient(
                        f"its token server {request.url.netloc.decode()} answered with status {response.status_code}",
                        wish(response),
                    )
                return Answer(response.status_code, await read_up_to(response, limit))
            finally:
                with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                    await response.aclose()
        except (httpx2.InvalidURL, UnicodeError):
            raise SourceError(f"{self._host} names no usable token server") from None
        except httpx2.TransportError as error:
            raise translated(error, f"its token server {error.request.url.netloc.decode()}") from error

    async def _refusal(self, response: httpx2.Response, what: str) -> Exception:
        """What an answer without the bytes means."""
        status = response.status_code
        said = ""
        # Without its reason, if that comes byte by byte.
        with trio.move_on_after(self._deadlines.silence):
            said = message(await read_up_to(response, MAX_ERROR))
        own = self._own(response.url)
        where = self._host if own else f"{self._elsewhere(response.url)},"
        if status in AGAIN or (not own and status in EXPIRED):
            return Transient(f"{'it' if own else where} answered with status {status}{said}", wish(response))
        if status in (401, 403) and own:
            return self._authorizer.refused(said)
        if status == 404:
            return SourceError(f"{where} has no {what}{said}")
        if status == 416:
            return SourceError(f"{where} has {what} in another size")
        return SourceError(f"{where} answered the request for {what} with status {status}{said}")

    async def _started(self) -> tuple[Connections, httpx2.URL]:
        """Connections and the registry's origin, made when first needed: an HTTP client costs 0.2 s of imports."""
        async with self._starting:
            # Held on to: whoever distrusts what came of them meanwhile has them given up.
            connections = self._connections
            if connections is None:
                connections = self._connections = await trio.to_thread.run_sync(self._connect)
            idle = [each for each in self._given_up if not each.users]
            self._given_up = [each for each in self._given_up if each.users]
            for each in idle:
                await each.aclose()
            if self._origin is None:
                self._origin = await self._find_origin(connections.client)
            return connections, self._origin

    def _connect(self) -> Connections:
        """Blocks: imports, and reads the system's certificates."""
        import httpx2

        from clipfs.sources.wire import Connections, trusted_certificates

        if self._trust is None:
            self._trust = trusted_certificates(self._insecure, self._ca)
        if self._surroundings is None:
            try:
                own = httpx2.URL(f"https://{self._server}")
            except httpx2.InvalidURL:
                own = httpx2.URL()
            if not has_host(own):
                raise SourceError(f"{self._host} is neither the name of a host nor an address of one")
            self._surroundings = Surroundings(own.host)
        return Connections(self._trust, self._surroundings, self._deadlines)

    async def _find_origin(self, client: httpx2.AsyncClient) -> httpx2.URL:
        """Docker's rule: TLS comes first, and only where nobody can listen may plain HTTP take its place."""
        import httpx2

        secure = httpx2.URL(f"{self._scheme or 'https'}://{self._server}")
        if self._scheme or not (self._insecure or (is_loopback(secure.host) and self._ca is None)):
            return secure
        for candidate in (secure, httpx2.URL(f"http://{self._server}")):
            try:
                response = await self._send(client, candidate.join("/v2/"), {})
            except Transient as failure:
                reason = failure
            else:
                await self._finish(response)
                # Where TLS was only late: its port answers plain HTTP so, and a server beside it leads back.
                led = response.headers.get("Location", "").lower().startswith("https:")
                if candidate == secure or not (led or response.status_code == 400):
                    return candidate
        raise reason
