"""A web server on 127.0.0.1 that does what a test says: for answers that no honest server gives.

async with serving(lambda request: Reply(200, b"hello")) as web: ...   # web.host, web.url, web.requests
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import h11
import trio

from tests.registry import key_of


@dataclass(frozen=True)
class Request:
    """What the server was asked."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    def range(self, size: int) -> tuple[int, int]:
        """The bytes [start, end) that the Range header asks for, of `size`."""
        first, _, last = self.headers.get("range", f"bytes=0-{size - 1}").removeprefix("bytes=").partition("-")
        return int(first), int(last) + 1


@dataclass(frozen=True)
class Reply:
    """What it answers. cut: the connection ends after so many bytes of the body; hang: it is kept and nothing comes;
    pieces: how many the body comes in, a tenth of a second apart."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    hang: bool = False
    pieces: int = 1


Handler = Callable[[Request], Reply]


@dataclass
class Web:
    """A running server; `handler` may be replaced while it runs. before_answer: awaited before a request is handled."""

    handler: Handler
    host: str
    scheme: str
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    before_answer: Callable[[Request], Awaitable[None]] | None = None

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}"

    async def serve(self, stream: trio.abc.Stream) -> None:
        """One connection, until either side closes it."""
        self.connections += 1
        connection = h11.Connection(h11.SERVER)
        try:
            while (request := await _receive(connection, stream)) is not None:
                self.requests.append(request)
                if self.before_answer is not None:
                    await self.before_answer(request)
                reply = self.handler(request)
                if reply.hang:
                    await trio.sleep_forever()
                headers = [("Content-Length", str(len(reply.body))), *reply.headers.items()]
                answer = h11.Response(status_code=reply.status, headers=headers)
                await stream.send_all(connection.send(answer) or b"")
                if request.method != "HEAD":
                    body = reply.body[: reply.cut]
                    for at in range(0, len(body), size := -(-len(body) // reply.pieces) or 1):
                        await trio.sleep(0.1 if at else 0)
                        await stream.send_all(connection.send(h11.Data(data=body[at : at + size])) or b"")
                if reply.cut is not None:
                    return
                await stream.send_all(connection.send(h11.EndOfMessage()) or b"")
                connection.start_next_cycle()
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            return  # the client hung up, or spoke TLS to a server that speaks none
        finally:
            await trio.aclose_forcefully(stream)


@asynccontextmanager
async def serving(handler: Handler, certificate: Path | None = None) -> AsyncIterator[Web]:
    """A `Web` for as long as the block lasts."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    web = Web(handler, f"127.0.0.1:{port}", "https" if certificate else "http")
    listeners: list[trio.abc.Listener[trio.abc.Stream]] = [listener]
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key_of(certificate))
        listeners = [trio.SSLListener(listener, context, https_compatible=True)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, web.serve, listeners, handler_nursery=nursery))
        try:
            yield web
        finally:
            nursery.cancel_scope.cancel()


async def _receive(connection: h11.Connection, stream: trio.abc.Stream) -> Request | None:
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(65536)))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            headers = {name.decode(): value.decode() for name, value in head.headers}
            return Request(head.method.decode(), head.target.decode(), headers, bytes(body))
        else:
            return None
