"""How things are named: bytes by digest, machines by platform, images by reference.

Names are checked where they are made, so that the rest of the program may build paths and URLs of them. What an image
wrote wrongly is an ImageError, what a person typed wrongly a UsageError. Imported through `clipfs.oci`.
"""

from __future__ import annotations

import hashlib
import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipfs.errors import ImageError, IntegrityError, UsageError
from clipfs.fields import quoted

if TYPE_CHECKING:
    from hashlib import _Hash

_HEX_LENGTH = {"sha256": 64, "sha512": 128}

_DOMAIN_PART = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_DOMAIN_PART}(?:\.{_DOMAIN_PART})*|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{{1,5}}))?")
_PATH_PART = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
# What distribution/reference calls NameTotalLengthMax, plus a tag and a sha512 digest; the bound keeps regexes cheap.
_MAX_NAME, _MAX_REFERENCE = 255, 255 + 130 + 136

_ARCHITECTURES = {
    "x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386", "i486": "386", "i586": "386",
    "i686": "386", "armhf": "arm/v7", "armel": "arm/v6", "armv6l": "arm/v6", "armv7l": "arm/v7", "armv8l": "arm/v8",
}  # fmt: skip
# The variant that an architecture means when it names none.
_DEFAULT_VARIANT = {"amd64": "v1", "arm": "v7", "arm64": "v8"}


@dataclass(frozen=True, slots=True)
class Digest:
    """The name of some bytes. Only well-formed ones exist, so that ``hex`` is safe as a file name."""

    algorithm: str
    hex: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]+", self.hex) or len(self.hex) != _HEX_LENGTH.get(self.algorithm):
            raise ImageError(
                f"{quoted(str(self))} is no digest; sha256:… with 64 or sha512:… with 128 lower-case hex digits is"
            )

    @classmethod
    def parse(cls, text: str) -> Digest:
        """``algorithm:hex`` as manifests have it."""
        algorithm, _, digits = text.partition(":")
        return cls(algorithm, digits)

    @classmethod
    def of(cls, data: bytes) -> Digest:
        """The SHA-256 of `data`."""
        return cls("sha256", hashlib.sha256(data).hexdigest())

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"

    @property
    def raw(self) -> bytes:
        """The digest itself, 32 or 64 bytes."""
        return bytes.fromhex(self.hex)

    def hasher(self) -> _Hash:
        """A fresh hash object of this digest's algorithm."""
        return hashlib.new(self.algorithm)

    def verify(self, data: bytes, what: str) -> bytes:
        """`data` itself, or IntegrityError if these are not the bytes that the digest names."""
        hasher = self.hasher()
        hasher.update(data)
        if hasher.hexdigest() != self.hex:
            found = f"{self.algorithm}:{hasher.hexdigest()}"
            raise IntegrityError(f"{what} should have digest {self}, but has {found}; it is damaged or forged")
        return data


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image runs on, in Go's words: ``linux/arm64/v8``."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """What a person types: OS/ARCH[/VARIANT], with the kernel's names of architectures allowed."""
        parts = text.lower().split("/")
        if not 2 <= len(parts) <= 3 or not all(re.fullmatch(r"[a-z0-9_.-]{1,40}", part) for part in parts):
            raise UsageError(
                f"{quoted(text)} is no platform; say OS/ARCH[/VARIANT], such as linux/amd64 or linux/arm64/v8"
            )
        return cls(*parts).normal()

    @classmethod
    def host(cls) -> Platform:
        """This machine."""
        return cls("linux", platform.machine().lower()).normal()

    def matches(self, other: Platform) -> bool:
        """Whether an image for `other` runs where this is wanted: the same, or a lower variant of the same."""
        return self.distance(other) is not None

    def distance(self, other: Platform) -> int | None:
        """How many variants `other` lies below this one (v8 to v6: 2); None where it does not run at all."""
        mine, theirs = self.normal(), other.normal()
        if (mine.os, mine.architecture) != (theirs.os, theirs.architecture):
            return None
        if mine.variant == theirs.variant:
            return 0
        levels = [re.fullmatch(r"v([0-9]{1,3})", each.variant) for each in (mine, theirs)]
        if levels[0] is None or levels[1] is None:
            return None
        below = int(levels[0][1]) - int(levels[1][1])
        return below if below >= 0 else None

    def normal(self) -> Platform:
        """The same in one spelling: amd64 for x86_64, and the variant that an architecture implies."""
        architecture, _, implied = _ARCHITECTURES.get(self.architecture, self.architecture).partition("/")
        return Platform(self.os, architecture, self.variant or implied or _DEFAULT_VARIANT.get(architecture, ""))

    def __str__(self) -> str:
        default = _DEFAULT_VARIANT.get(self.architecture, "")
        return f"{self.os}/{self.architecture}" + (f"/{self.variant}" if self.variant not in ("", default) else "")


@dataclass(frozen=True, slots=True)
class Reference:
    """An image in a registry: ``host/repository[:tag][@digest]``. Where both are given, the digest decides."""

    host: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """A name as people type it, with Docker's defaults: docker.io, library/, latest."""
        try:
            return cls._parse(text)
        except ValueError as error:
            raise UsageError(f"{quoted(text)} is no image name: {error}") from None

    @classmethod
    def _parse(cls, text: str) -> Reference:
        if len(text) > _MAX_REFERENCE:
            raise ValueError("it is too long")
        rest, at, digest_text = text.partition("@")
        try:
            digest = Digest.parse(digest_text) if at else None
        except ImageError as error:
            raise ValueError(str(error)) from None
        # A colon after the last slash starts a tag; one before it belongs to a port or an IPv6 address.
        path, colon, tag = rest.rpartition(":")
        if not colon or "/" in tag:
            path, tag = rest, ""
        elif not _TAG.fullmatch(tag):
            raise ValueError(
                "a tag is up to 128 letters, digits, '_', '.' and '-', and starts with none of the last two"
            )
        first, slash, remainder = path.partition("/")
        if slash and (any(c in first for c in ".:[") or first == "localhost" or first != first.lower()):
            host = "docker.io" if first == "index.docker.io" else first
        else:
            host, remainder = "docker.io", path
        matched = _HOST.fullmatch(host)
        if not matched or not 0 < int(matched["port"] or 1) < 1 << 16:
            raise ValueError(f"{quoted(host)} is no host[:port]")
        if host == "docker.io" and "/" not in remainder:
            remainder = f"library/{remainder}"
        if not all(_PATH_PART.fullmatch(part) for part in remainder.split("/")):
            hint = "; repositories are lower-case" if remainder != remainder.lower() else ""
            raise ValueError(f"{quoted(remainder)} is no repository{hint}")
        if len(host) + 1 + len(remainder) > _MAX_NAME:
            raise ValueError(f"host and repository are longer than {_MAX_NAME} characters")
        return cls(host, remainder, tag or (None if digest else "latest"), digest)

    def pinned(self, digest: Digest) -> Reference:
        """The same repository at exactly this manifest."""
        return Reference(self.host, self.repository, None, digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.host}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")


def not_empty(name: str) -> None:
    """UsageError for a variable of a shell that is not set: it does not mean the working directory."""
    if not name:
        raise UsageError("'' is no image name, nor that of a file: it is empty")
