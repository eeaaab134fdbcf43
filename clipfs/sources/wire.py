"""The HTTP client: its connections, which way they go, and whom they may reach.

Owned here: everything about the client that is decided once, and not for each request. `Connections` counts who uses a
client, so that one that is given up can be closed when nobody needs it. What is sent is the business of `transport`.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import NamedTuple

import httpcore2
import httpx2
import trio

from clipfs.errors import SourceError, UsageError
from clipfs.sources.addresses import Surroundings
from clipfs.sources.answers import has_host
from clipfs.sources.proxies import proxy_for
from clipfs.sources.redact import watch_client_logs, without_login
from clipfs.sources.retry import Deadlines

# Parallel requests to one host: browsers use 6, and read-ahead wants a few for itself.
_CONNECTIONS = 16
_LIMITS = httpx2.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
# Bytes that are taken from a connection at once, if they are there.
_AT_ONCE = 256 << 10
# More than the client takes for the head of an answer, which is 100 KiB.
_LARGEST_HEAD = 128 << 10
# Ranges count bytes as they are stored; a compressed answer would have other ones.
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "clipfs"}


class Connections:
    """An HTTP client. `users` counts the requests under way."""

    def __init__(self, trust: Trust, surroundings: Surroundings, deadlines: Deadlines) -> None:
        self.users = 0
        self.client = httpx2.AsyncClient(
            transport=_Routes(trust, surroundings),
            follow_redirects=False,
            trust_env=False,
            timeout=httpx2.Timeout(deadlines.silence, connect=deadlines.connect, pool=None),
            headers=_HEADERS,
            # None are kept, as docker keeps none: a registry could send more with each answer, without end.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        )

    async def aclose(self) -> None:
        """Close all of them; requests under way fail."""
        await self.client.aclose()


class Trust(NamedTuple):
    """Which certificates are believed of the registry, and of a proxy on the way there: that is another's machine."""

    registry: ssl.SSLContext
    proxy: ssl.SSLContext


def trusted_certificates(insecure: bool, ca: Path | None) -> Trust:
    """Blocks: reads the system's certificates."""
    watch_client_logs()
    strict = _context(True, ca)
    return Trust(_context(False, ca) if insecure else strict, strict)


def _context(verify: bool, ca: Path | None) -> ssl.SSLContext:
    context = httpx2.create_ssl_context(verify=verify)
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"cannot read certificates from {ca}: {error.strerror or error}") from None
    return context


class _Routes(httpx2.AsyncBaseTransport):
    """Directly, or through the proxy that the environment names."""

    def __init__(self, trust: Trust, surroundings: Surroundings) -> None:
        self._trust, self._surroundings = trust, surroundings
        self._direct = _Guarded(trust.registry, surroundings)
        self._proxies: dict[str, httpx2.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        # An address can be judged at once; what a name means shows when there is a connection.
        self._surroundings.check(url.host, url.host)
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        proxy = proxy_for(url.scheme, url.host, port, os.environ)
        route = self._direct if proxy is None else self._through(proxy)
        return await route.handle_async_request(request)

    def _through(self, proxy: str) -> httpx2.AsyncHTTPTransport:
        if proxy not in self._proxies:
            try:
                url = httpx2.URL(proxy)
                if not has_host(url):
                    raise httpx2.InvalidURL(proxy)
                way = httpx2.Proxy(url, ssl_context=self._trust.proxy if url.scheme == "https" else None)
                self._proxies[proxy] = httpx2.AsyncHTTPTransport(verify=self._trust.registry, limits=_LIMITS, proxy=way)
            except (httpx2.InvalidURL, ValueError):
                raise UsageError(f"the environment names a proxy of no use: {without_login(proxy)}") from None
        return self._proxies[proxy]

    async def aclose(self) -> None:
        await self._direct.aclose()
        for transport in self._proxies.values():
            await transport.aclose()


class _Guarded(httpx2.AsyncHTTPTransport):
    """Connects to what the surroundings allow, and nothing else."""

    def __init__(self, context: ssl.SSLContext, surroundings: Surroundings) -> None:
        super().__init__(verify=context, limits=_LIMITS)
        # The one way to have a say in where connections go: httpx2 passes no backend on.
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=context,
            max_connections=_LIMITS.max_connections,
            max_keepalive_connections=_LIMITS.max_keepalive_connections,
            keepalive_expiry=_LIMITS.keepalive_expiry,
            network_backend=_Backend(surroundings),
        )


class _Backend(httpcore2.AsyncNetworkBackend):
    """Looks where each new connection has led before a byte is sent on it."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self._trio = httpcore2.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  as httpcore2 has it
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        stream = await self._trio.connect_tcp(host, port, timeout, local_address, socket_options)
        try:
            self._surroundings.check(host, stream.get_extra_info("server_addr")[0])
        except SourceError:
            await stream.aclose()
            raise
        except OSError as error:  # it is gone already
            raise httpcore2.ConnectError(str(error)) from error
        return _Stream(stream)

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class _Stream(httpcore2.AsyncNetworkStream):
    """Takes as much as has come: the client asks for 64 KiB, and each time costs it a tenth of a millisecond.

    But not of the beginning of an answer. The client refuses a head that is too large when some of it has yet to come.
    """

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream
        self._come = 0  # bytes since something was sent

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  as httpcore2 has it
        most = max(max_bytes, _AT_ONCE) if self._come > _LARGEST_HEAD else max_bytes
        data = await self._stream.read(most, timeout)
        self._come += len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109  as httpcore2 has it
        self._come = 0
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  as httpcore2 has it
    ) -> httpcore2.AsyncNetworkStream:
        return _Stream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)
