"""How a registry is satisfied that asks for authorization: basic, or a bearer token from the server that it names.

An `Authorizer` holds the Authorization header of one repository and renews it when the registry rejects it. It does not
send requests to the registry, and does not know how requests are sent.

Who gets credentials: the registry itself, over TLS, and the token server that it names, which may be on another host
(Docker Hub's is). Docker and containerd ask no more of a token server than that the registry names it. Here it must be
spoken to over TLS as well, unless both are on this machine or plain HTTP to that very host was allowed; and only the
registry's own answers are believed to name one, never those of a host that a redirect or a layer's URL led to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import SplitResult, urlencode, urlsplit, urlunsplit

import trio

from clipfs.errors import AuthError, ImageError, SourceError
from clipfs.fields import Fields, quoted
from clipfs.sources import credentials
from clipfs.sources.credentials import Credentials

# Tokens are a few KB; containers/image stops at a megabyte too.
_MAX_TOKEN = 1 << 20

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'({_WORD})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))')
_SCHEME = re.compile(rf"({_WORD})(?=[ \t,]|$)[ \t]*(?:[A-Za-z0-9._~+/-]+=*[ \t]*(?=,|$))?")
_SEPARATORS = re.compile(r"[ \t,]*")


class Challenge(NamedTuple):
    """One way to authorize, offered in a WWW-Authenticate header."""

    scheme: str
    parameters: Mapping[str, str]


class Answer(NamedTuple):
    """What a token server said."""

    status: int
    body: bytes


class Ask(Protocol):
    """Sends one request to a token server; redirects are not followed, since the request may carry a password."""

    async def __call__(self, url: str, *, headers: Mapping[str, str], form: bytes | None, limit: int) -> Answer: ...


def parse_challenges(header: str) -> list[Challenge]:
    """The challenges of one header value (RFC 7235 §2.1). What follows a syntax error is left out."""
    found: list[tuple[str, dict[str, str]]] = []
    at = 0
    while (at := _end(_SEPARATORS.match(header, at), at)) < len(header):
        parameter = _PARAMETER.match(header, at)
        if parameter and found:
            name, quoted_value, value = parameter.groups()
            found[-1][1].setdefault(name.lower(), value or re.sub(r"\\(.)", r"\1", quoted_value or ""))
            at = parameter.end()
        elif scheme := _SCHEME.match(header, at):
            found.append((scheme[1].lower(), {}))
            at = scheme.end()
        else:
            break
    return [Challenge(scheme, parameters) for scheme, parameters in found]


class Authorizer:
    """The Authorization header for pulling from one repository of one registry. `header` is None until it is needed."""

    def __init__(self, host: str, repository: str, authfile: Path | None, ask: Ask, patience: float) -> None:
        """patience: seconds to wait for a credential helper."""
        self.header: str | None = None
        self._host = host
        self._repository = repository
        self._authfile = authfile
        self._ask = ask
        self._patience = patience
        self._known: Credentials | None = None
        self._challenges: Sequence[str] = ()
        self._lock = trio.Lock()

    async def renew(self, challenges: Sequence[str], origin: str, rejected: str | None) -> None:
        """Find a header to replace `rejected`, or raise AuthError.

        challenges: the WWW-Authenticate headers of the registry at `origin` (scheme://host). Of many requests that are
        rejected at once, one renews and the others use what it got. Where there are no challenges, the last ones count.
        """
        async with self._lock:
            if self.header != rejected:
                return
            challenges = self._challenges = challenges or self._challenges
            offered = {each.scheme: each for header in challenges for each in parse_challenges(header)}
            self._known = known = await trio.to_thread.run_sync(
                credentials.find, self._host, self._repository, self._authfile, self._patience, abandon_on_cancel=True
            )
            if "bearer" in offered:
                self.header = "Bearer " + await self._token(offered["bearer"].parameters, origin, known)
            elif "basic" in offered and known and known.user:
                self.header = known.basic()
            else:
                raise self.refused()

    def renewable(self, used: str | None) -> bool:
        """Whether a request that was sent with the header `used` could be sent with a newer one."""
        return used is not None and bool(self._challenges)

    def refused(self, said: str = "") -> AuthError:
        """The sentence for somebody whom the registry does not let in; `said`: what it gave as a reason."""
        who = f"user {self._known.user}" if self._known and self._known.user else "anonymous users"
        why = "the credentials were refused" if self._known else "no credentials are known"
        return AuthError(
            f"{self._host} does not let {who} read {self._repository}: {why}{said}. "
            f"Log in with `skopeo login {self._host}` or `docker login {self._host}`, and check the name"
        )

    async def _token(self, parameters: Mapping[str, str], origin: str, known: Credentials | None) -> str:
        realm = self._realm(parameters.get("realm", ""), origin)
        query = {"service": parameters.get("service", ""), "scope": f"repository:{self._repository}:pull"}
        form, headers = None, {}
        if known and known.refresh_token:
            query |= {"grant_type": "refresh_token", "client_id": "clipfs", "refresh_token": known.refresh_token}
            form = urlencode(query).encode()
        else:
            both = "&".join(part for part in (realm.query, urlencode(query)) if part)
            realm = realm._replace(query=both)
            headers = {"Authorization": known.basic()} if known else {}
        answer = await self._ask(urlunsplit(realm), headers=headers, form=form, limit=_MAX_TOKEN)
        if answer.status in (400, 401, 403):
            raise self.refused()
        if answer.status != 200:
            raise SourceError(f"the token server {realm.hostname} of {self._host} answered with status {answer.status}")
        return self._read_token(answer.body, realm.hostname or "")

    def _realm(self, text: str, origin: str) -> SplitResult:
        """The token server's address. A password goes there, so it must be one that nobody can listen to."""
        try:
            realm, registry = urlsplit(text), urlsplit(origin)
            port_is_number = realm.port is None or realm.port >= 0
        except ValueError:
            port_is_number = False
        if not port_is_number or not realm.hostname or "@" in realm.netloc:
            raise SourceError(f"{self._host} names no usable token server")
        near = (is_loopback(realm.hostname) and is_loopback(registry.hostname or "")) or (
            registry.scheme == "http" and realm.hostname == registry.hostname
        )
        if realm.scheme != "https" and not (realm.scheme == "http" and near):
            raise SourceError(
                f"{self._host} wants credentials sent to {quoted(realm.hostname)} without encryption; refused"
            )
        return realm._replace(fragment="")

    def _read_token(self, body: bytes, server: str) -> str:
        where = f"the token server {server}'s answer"
        try:
            fields = Fields.parse(body, where, _MAX_TOKEN)
            token = fields.text("token", "") or fields.text("access_token", "")
        except ImageError:
            # Its sentence would quote the answer, which may be a secret.
            token = ""
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise SourceError(f"{where} holds no token")
        return token


def is_loopback(host: str) -> bool:
    """Whether a host, without its port, is this machine by name or number."""
    return host.strip("[]").lower() in ("localhost", "::1") or bool(re.fullmatch(r"127(\.[0-9]{1,3}){3}", host))


def _end(match: re.Match[str] | None, otherwise: int) -> int:
    return match.end() if match else otherwise
