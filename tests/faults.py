"""A proxy in front of a registry that misbehaves on demand, over real TCP connections.

    with FaultProxy(registry.host) as proxy:
        proxy.strike(digest, FAULTS["reset"], middle=True, times=1)     # the next request for that blob
        …
        proxy.calm(digest)

It speaks plain HTTP on 127.0.0.1, wants a bearer token of its own for everything (anonymous users get one), and passes
honest answers through. A fault is a change of such an answer, or of what happens while it is sent.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import Literal, NamedTuple, Self

_SECONDS = 20
_BLOB = re.compile(r"/v2/.*/blobs/(sha256:[0-9a-f]{64})$")
#: What is in signatures and tokens, and must never be in an error or a log.
SECRETS = ("s3cret", "t0ken")

Then = Literal["", "close", "reset", "silence", "drip", "endless"]


@dataclass(frozen=True)
class Answer:
    """What is sent. Of the body, `cut` bytes are, if that is not None, and `then` something else happens; a negative
    `cut` counts from the end of the head, which is cut off then."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    cut: int | None = None
    then: Then = ""

    def head(self) -> bytes:
        length = {} if self.then == "endless" else {"Content-Length": str(len(self.body))}
        lines = [f"HTTP/1.1 {self.status} Whatever", *(f"{k}: {v}" for k, v in {**length, **self.headers}.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


class Request(NamedTuple):
    method: str
    target: str
    headers: Mapping[str, str]


class Fault(NamedTuple):
    """change(honest answer, where in the body, this proxy's address) is what is answered. in_body: it can strike while
    a body is sent; otherwise, to strike in the middle is to break a body off and to strike the request for the rest.
    whole: the answer to change is the one to a request without a range."""

    change: Callable[[Answer, int, str], Answer]
    in_body: bool = False
    whole: bool = False


def _status(status: int, **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    said = json.dumps({"errors": [{"code": "X", "message": "token=t0ken-1 will not do"}]}).encode()
    return Fault(lambda honest, at, host: Answer(status, named, said))


def _redirect(location: str) -> Fault:
    return Fault(lambda honest, at, host: Answer(307, {"Location": location.format(host=host)}))


def _headers(**headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Fault(lambda honest, at, host: replace(honest, headers={**honest.headers, **named}))


def _then(then: Then) -> Fault:
    return Fault(lambda honest, at, host: replace(honest, cut=at, then=then), in_body=True)


def _garbled(honest: Answer, at: int, host: str) -> Answer:
    return replace(honest, body=honest.body[:at] + bytes(byte ^ 0x55 for byte in honest.body[at:]))


def _shifted(honest: Answer, at: int, host: str) -> Answer:
    """The bytes before those that were asked for, and it says so."""
    size = len(honest.body)
    told = honest.headers.get("Content-Range", f"bytes 1-{size}/{size}")
    start, end, size = map(int, re.findall("[0-9]+", told))
    return Answer(206, {"Content-Range": f"bytes {start - 1}-{end - 1}/{size}"}, honest.body)


FAULTS: dict[str, Fault] = {
    "refused: 401, the token expired": Fault(lambda honest, at, host: Answer(401, _challenge(host))),
    "refused: 401, tokens are where clouds keep credentials": _status(
        401, WWW_Authenticate='Bearer realm="http://169.254.169.254/latest/api/token",service="tests"'
    ),
    "refused: 403, the token expired": _status(403),
    "not found: 404": _status(404),
    "busy: 408": _status(408),
    "busy: 429, back in a second": _status(429, Retry_After="1"),
    "busy: 429, back at a time of day": Fault(
        lambda h, at, host: Answer(429, {"Retry-After": formatdate(usegmt=True)})
    ),
    "busy: 429, back in an hour": _status(429, Retry_After="3600"),
    "broken: 500": _status(500),
    "broken: 502": _status(502),
    "broken: 503, with nonsense": _status(503, Retry_After="soon"),
    "broken: 504": _status(504),
    "the connection is reset": _then("reset"),
    "the connection ends": _then("close"),
    "silence": _then("silence"),
    "silence before the head": Fault(lambda honest, at, host: replace(honest, cut=-9999, then="silence")),
    "a byte now and then": _then("drip"),
    "a head that comes byte by byte": Fault(lambda honest, at, host: replace(honest, cut=-20, then="drip")),
    "wrong bytes": Fault(_garbled, in_body=True),
    "bytes without end": _then("endless"),
    "fewer bytes, and says so": Fault(lambda honest, at, host: replace(honest, body=honest.body[:at]), in_body=True),
    "another range": Fault(_shifted),
    "no range: 200": Fault(lambda honest, at, host: honest, whole=True),
    "no range: 416": _status(416),
    "several parts": _headers(Content_Type="multipart/byteranges; boundary=x", Content_Range=""),
    "an encoding": _headers(Content_Encoding="gzip"),
    "a head of 200 KB": _headers(X_Bomb="x" * 200_000),
    "a head of 20,000 lines": _headers(**{f"X_{number}": "x" for number in range(20_000)}),
    "no HTTP": Fault(lambda honest, at, host: replace(honest, headers={"": "\0"})),
    "a signed address that expired": _redirect("http://{host}/storage/expired?X-Amz-Signature=s3cret"),
    "a redirect without end": _redirect(""),
    "a redirect to where clouds keep credentials": _redirect("http://169.254.169.254/latest/meta-data/"),
    "a redirect to another protocol": _redirect("file:///etc/passwd"),
    "a redirect to nobody": _redirect("http://127.0.0.1:1/"),
}


def _challenge(host: str) -> dict[str, str]:
    return {"WWW-Authenticate": f'Bearer realm="http://{host}/token",service="tests"'}


@dataclass
class _Strike:
    fault: Fault
    middle: bool
    times: float
    cut_off: bool = False
    struck: bool = False


class FaultProxy:
    """The proxy. `host` stays the same from the first `up` on; `asked` counts requests for blobs by digest."""

    def __init__(self, upstream: str) -> None:
        self.asked: Counter[str] = Counter()
        self.upstream = upstream
        self._port = 0
        self._strikes: dict[str, _Strike] = {}
        self._tokens: set[str] = set()
        self._numbers = itertools.count(1)
        self._lock = threading.Condition()
        self._listener: socket.socket | None = None
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._port}"

    def strike(self, digest: str, fault: Fault, *, middle: bool = False, times: float = 1) -> None:
        """Let the next `times` requests for a blob's bytes meet with a fault."""
        with self._lock:
            self._strikes[digest] = _Strike(fault, middle, times)

    def calm(self, digest: str) -> None:
        """Let no fault strike there any more."""
        with self._lock:
            self._strikes.pop(digest, None)

    def struck(self, digest: str) -> bool:
        """Whether the fault has struck there at all."""
        with self._lock:
            return self._strikes[digest].struck

    def await_strikes(self, seconds: float) -> bool:
        """Wait until each fault has struck; False if that takes longer."""
        with self._lock:
            return self._lock.wait_for(lambda: all(each.struck for each in self._strikes.values()), seconds)

    def expire_tokens(self) -> None:
        """From here on no token is good that was given out so far."""
        with self._lock:
            self._tokens.clear()

    def up(self) -> None:
        """Listen, where it listened before."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        self._start(self._accept, self._listener)

    def down(self) -> None:
        """Listen no more, and end all connections. Returns when all threads are done."""
        listener, self._listener = self._listener, None
        with self._lock:
            for each in (*filter(None, [listener]), *self._connections):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        if listener is not None:
            listener.close()
        for thread in self._threads:
            thread.join(_SECONDS)
        self._threads.clear()

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def _start(self, target: Callable[[socket.socket], None], what: socket.socket) -> None:
        thread = threading.Thread(target=target, args=(what,), name="fault proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with self._lock:
                    self._connections.add(connection)
                self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as lines:
                while (request := _receive(lines)) is not None:
                    answer = self._answer(request)
                    if not _send(connection, answer, head_only=request.method == "HEAD"):
                        return
        except OSError:
            pass  # the client hung up
        finally:
            with self._lock:
                self._connections.discard(connection)

    # --- what is answered

    def _answer(self, request: Request) -> Answer:
        if request.target.startswith("/token"):
            return self._new_token()
        if request.target.startswith("/storage/"):
            return Answer(403, {"Content-Type": "application/xml"}, b"<Code>AccessDenied</Code>")
        with self._lock:
            known = request.headers.get("authorization", "").removeprefix("Bearer ") in self._tokens
        if not known:
            return Answer(401, _challenge(self.host))
        blob = _BLOB.match(request.target)
        if blob is None:
            return self._honest(request)
        with self._lock:
            self.asked[blob[1]] += 1
        return self._struck_by_fault(blob[1], request)

    def _struck_by_fault(self, digest: str, request: Request) -> Answer:
        with self._lock:
            strike = self._strikes.get(digest)
        if strike is None or not strike.times:
            return self._honest(request)
        with self._lock:
            broken_off = strike.middle and not strike.fault.in_body and not strike.cut_off
            strike.cut_off = True
            if not broken_off:
                strike.times -= 1
                strike.struck = True
                self._lock.notify_all()
            whole = strike.fault.whole and not broken_off
        honest = self._honest(request, whole=whole)
        half = len(honest.body) // 2
        if broken_off:
            return replace(honest, cut=half, then="reset")
        return strike.fault.change(honest, half if strike.middle else 0, self.host)

    def _new_token(self) -> Answer:
        token = f"t0ken-{next(self._numbers)}"
        with self._lock:
            self._tokens.add(token)
        return Answer(200, {"Content-Type": "application/json"}, json.dumps({"token": token}).encode())

    def _honest(self, request: Request, *, whole: bool = False) -> Answer:
        """What the registry answers; whole: to the same request without a range."""
        upstream = http.client.HTTPConnection(self.upstream, timeout=_SECONDS)
        try:
            known = ("accept",) if whole else ("accept", "range")
            kept = {name: value for name, value in request.headers.items() if name in known}
            upstream.request(request.method, request.target, headers=kept)
            response = upstream.getresponse()
            headers = {
                name: value
                for name, value in response.getheaders()
                if name in ("Content-Type", "Content-Range", "Docker-Content-Digest", "Location")
            }
            return Answer(response.status, headers, response.read())
        finally:
            upstream.close()


def _receive(lines: Iterator[bytes]) -> Request | None:
    """The head of a request; None when there is none, or no HTTP: clients try TLS first."""
    first = next(lines, b"")
    parts = first.decode("latin-1").split()
    if len(parts) != 3 or not parts[2].startswith("HTTP/"):
        return None
    headers: dict[str, str] = {}
    for line in lines:
        if not line.strip():
            return Request(parts[0], parts[1], headers)
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return None


def _send(connection: socket.socket, answer: Answer, *, head_only: bool) -> bool:
    """Send it; whether the connection is good for another one."""
    head, body = answer.head(), b"" if head_only else answer.body
    if answer.cut is None:
        connection.sendall(head + body)
        return True
    whole = head + body
    at = max(0, len(head) + answer.cut)
    connection.sendall(whole[:at])
    if answer.then == "silence":
        connection.recv(1)  # returns when the client has given up, or the proxy ends
    elif answer.then == "drip":
        connection.settimeout(0.1)
        for position in range(at, len(whole)):
            connection.sendall(whole[position : position + 1])
            with contextlib.suppress(TimeoutError):
                if not connection.recv(1):
                    break
    elif answer.then == "endless":
        while True:
            connection.sendall(bytes(1 << 16))
    elif answer.then == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False
