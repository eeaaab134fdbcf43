"""What an address, an answer's head or a broken connection means, in words and in seconds.

Pure, but for reading bodies up to a limit. Who asked, and what is done about it, is the business of `transport`.
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from clipfs.errors import ImageError, SourceError
from clipfs.fields import Fields, quoted
from clipfs.sources.redact import redacted
from clipfs.sources.retry import Transient

if TYPE_CHECKING:
    import httpx2

# How much of an error's body is read for its message.
MAX_ERROR = 1 << 16

GOOD = frozenset({200, 206})
# Of 5xx all, for those who stand before registries have codes of their own: 520 to 530, 529, 598.
AGAIN = frozenset({408, 425, 429, *range(500, 600)})
# How storage refuses an address that was signed for some minutes only. A new one is to be had from the registry.
EXPIRED = frozenset({400, 401, 403, 404, 410})
REDIRECTS = frozenset({301, 302, 303, 307, 308})


def origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    """Scheme, host and port: who sees a secret that is sent there."""
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def has_host(url: httpx2.URL) -> bool:
    """Whether its host can be looked up: names have no part that is empty, and none of more than 63 characters."""
    try:
        return bool(url.host and url.raw_host.decode("ascii").encode("idna"))
    except UnicodeError:
        return False


async def read_up_to(response: httpx2.Response, limit: int) -> bytes:
    """The first `limit` bytes of a body."""
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > limit:
            break
    return bytes(data[:limit])


def message(body: bytes) -> str:
    """The first message of a registry's error document, for the end of a sentence."""
    try:
        errors = Fields.parse(body, "the answer", MAX_ERROR).children("errors")
        return f": {quoted(redacted(errors[0].text('message')))}" if errors else ""
    except ImageError:
        return ""


def wish(response: httpx2.Response) -> float:
    """Seconds that the server wants to be left alone (RFC 9110 §10.2.3)."""
    text = response.headers.get("Retry-After", "")
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        # By the server's clock, if it tells the time: this machine's may be wrong.
        told = response.headers.get("Date")
        now = parsedate_to_datetime(told) if told else datetime.now(UTC)
        return max(0.0, (parsedate_to_datetime(text) - now).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def redirected(url: httpx2.URL, location: str, host: str) -> httpx2.URL:
    """Where an answer from `url` leads, or SourceError: never from https to plain http. `host` is whom to blame."""
    import httpx2

    try:
        target = url.join(location)
    except (httpx2.InvalidURL, ValueError):
        target = httpx2.URL()
    web = target.scheme in ("http", "https") and 0 < (target.port or 1) < 1 << 16
    if not web or not target.host or target.userinfo:
        raise no_address(host)
    if url.scheme == "https" and target.scheme == "http":
        raise SourceError(f"{host} redirects from https to plain http on {target.host[:255]}; refused")
    return target


def no_address(host: str) -> SourceError:
    """The sentence for a redirect to nowhere."""
    return SourceError(f"{host} redirects to something that is no web address")


def translated(error: httpx2.TransportError, who: str = "") -> Exception:
    """A broken connection as `Transient`; a certificate does not get better by trying again. who: at the other end, if
    that is not who was asked."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ssl.SSLCertVerificationError):
            return SourceError(
                f"the certificate of {error.request.url.netloc.decode()} cannot be trusted: {link.verify_message}; "
                "name the CA that signed it with --ca, or accept any with --insecure"
            )
        link = link.__cause__ or link.__context__
    return Transient(f"{type(error).__name__}: {error}".rstrip(": ") + (f" (with {who})" if who else ""))
