"""Where a user's registry credentials are kept: Docker's and Podman's files, and Docker's credential helpers.

Everything blocks, so callers use a thread. Nothing found is no error: most images are public. Secrets stay out of every
message and every ``repr``.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clipfs.errors import ImageError, UsageError
from clipfs.fields import Fields

_log = logging.getLogger(__name__)

_MAX_FILE = 4 << 20
# Docker's own registry goes by many names, and `docker login` writes the oldest.
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HUB_KEY = "https://index.docker.io/v1/"
# The user name by which helpers say that the secret is an OAuth2 refresh token.
_REFRESH_USER = "<token>"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and password, or a refresh token in their place."""

    user: str
    password: str = field(repr=False)
    refresh_token: str = field(default="", repr=False)

    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def find(host: str, repository: str, authfile: Path | None = None, patience: float = 15.0) -> Credentials | None:
    """What is known for a repository, the most specific first. UsageError for a named file that cannot be used.

    patience: seconds that a helper is given. It may ask the user, and somebody may be waiting for a read.
    """
    for path, demanded in _files(authfile):
        config = _load(path, demanded)
        if config is not None and (found := _in_config(config, host, repository, patience)):
            return found
    return None


def _files(authfile: Path | None) -> Iterator[tuple[Path, bool]]:
    """The files to look into, in order, and whether each must exist."""
    if named := authfile or os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(named), True
        return
    home = Path(os.environ.get("HOME") or "/")
    session = os.environ.get("XDG_RUNTIME_DIR")
    yield Path(f"{session}/containers" if session else f"/run/containers/{os.getuid()}") / "auth.json", False
    yield Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers" / "auth.json", False
    yield Path(os.environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json", False


def _load(path: Path, demanded: bool) -> Fields | None:
    try:
        return Fields.parse(path.read_bytes(), f"the credentials file {path}", _MAX_FILE)
    except FileNotFoundError:
        if demanded:
            raise UsageError(f"there is no credentials file {path}") from None
    except ImageError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        if demanded:
            raise UsageError(f"cannot read the credentials file {path}: {error.strerror}") from None
        _log.warning("cannot read %s: %s", path, error.strerror)
    return None


def _in_config(config: Fields, host: str, repository: str, patience: float) -> Credentials | None:
    """One file's answer. As in Docker, a helper comes before what is written in the file itself."""
    try:
        keys = _keys(host, repository)
        helpers = {_bare(key): helper for key, helper in config.mapping("credHelpers").items()}
        helper = next((helpers[key] for key in keys if key in helpers), config.text("credsStore", ""))
        if helper and (found := _ask(helper, _HUB_KEY if host in _DOCKER_HUB else host, patience)):
            return found
        auths = config.child("auths")
        # Docker's login by browser keeps tokens of its own below the address that the login itself is kept by.
        entries = {_bare(key): key for key in sorted(auths.value, key=len, reverse=True)}
        for key in keys:
            if key in entries and (found := _entry(auths.child(entries[key]))):
                return found
    except ImageError as error:
        raise UsageError(str(error)) from None
    return None


def _keys(host: str, repository: str) -> list[str]:
    """host/a/b, host/a, host: Podman keeps credentials for parts of a registry, too."""
    parts = repository.split("/")
    hosts = _DOCKER_HUB if host in _DOCKER_HUB else (host,)
    return ["/".join([each, *parts[:count]]) for count in range(len(parts), -1, -1) for each in hosts]


def _bare(key: str) -> str:
    """A key as _keys() makes them: Docker's are URLs of an API, Podman's are names."""
    scheme, separator, rest = key.partition("://")
    return rest.split("/", 1)[0] if separator else scheme.rstrip("/")


def _entry(entry: Fields) -> Credentials | None:
    token = entry.text("identitytoken", "")
    auth = entry.text("auth", "")
    user, password = entry.text("username", ""), entry.text("password", "")
    if auth:
        try:
            user, _, password = base64.b64decode(auth, validate=True).decode().rstrip("\0").partition(":")
        except ValueError:
            raise UsageError(f"{entry.where} holds an 'auth' that is not base64; log in again") from None
    return Credentials(user, password, token) if token or user else None


def _ask(helper: str, server: str, patience: float) -> Credentials | None:
    """Ask ``docker-credential-HELPER get``. A helper that fails leaves the user anonymous, with a word in the log."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", helper):
        raise UsageError(f"the credentials file names a credential helper {helper!r}, which is no program's name")
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"], input=server.encode(), capture_output=True, timeout=patience, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = f"no answer in {patience:.3g} s" if isinstance(error, subprocess.TimeoutExpired) else error.strerror
        _log.warning("%s gave no credentials for %s: %s", program, server, reason)
        return None
    if done.returncode != 0:
        _log.info("%s has no credentials for %s", program, server)
        return None
    try:
        answer = Fields.parse(done.stdout, f"the answer of {program}", _MAX_FILE)
        user, secret = answer.text("Username", ""), answer.text("Secret", "")
    except ImageError as error:
        # Such a message may quote what was wrong, and that may be the secret.
        _log.warning("%s gave no credentials for %s: malformed answer (%s)", program, server, type(error).__name__)
        return None
    return Credentials("", "", secret) if user == _REFRESH_USER else Credentials(user, secret) if user else None
