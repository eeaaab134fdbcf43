"""The errors a caller can meet, each a sentence that says what was wrong with what, and where.

This module knows no format and no file system; it only fixes how errors read and which exit code they end in.
Exit codes follow sysexits(3) where the shell convention has nothing to say.
"""

from __future__ import annotations


class ClipfsError(Exception):
    """Base of everything clipfs raises on purpose; ``str(error)`` is a sentence for a person."""

    exit_code = 1


class UsageError(ClipfsError):
    """The call itself is wrong: an unknown option, a malformed name, a path that does not exist."""

    exit_code = 2


class ImageError(ClipfsError):
    """An image is broken or hostile.

    layer: the layer's digest, member: the tar member's name (bytes as stored), offset: byte offset of the member's
    header in the uncompressed layer. What is known is appended to the sentence.
    """

    exit_code = 65

    def __init__(
        self,
        message: str,
        *,
        layer: object | None = None,
        member: bytes | None = None,
        offset: int | None = None,
    ) -> None:
        self.message = message
        self.layer = layer
        self.member = member
        self.offset = offset
        super().__init__(message)

    def within(self, layer: object) -> ImageError:
        """The same error, now naming the layer it was found in (parsers do not know which layer they read)."""
        return ImageError(self.message, layer=layer, member=self.member, offset=self.offset)

    def __str__(self) -> str:
        where = []
        if self.layer is not None:
            where.append(f"layer {self.layer}")
        if self.member is not None:
            where.append(f"member {shown(self.member)}")
        if self.offset is not None:
            where.append(f"offset {self.offset}")
        return f"{self.message} ({', '.join(where)})" if where else self.message


class FormatError(ClipfsError):
    """A ``.clip`` file is damaged, hostile, or of a version this clipfs does not read."""

    exit_code = 65


class IntegrityError(ClipfsError):
    """Bytes do not have the digest that the index or manifest demands."""

    exit_code = 65


class SourceError(ClipfsError):
    """A registry, archive or layout could not give the bytes asked of it."""

    exit_code = 69


class AuthError(SourceError):
    """The source refused the credentials, or wants some and none are known."""

    exit_code = 77


class MountError(ClipfsError):
    """The kernel, FUSE or the mountpoint would not have it. mount(8) knows this as exit code 32."""

    exit_code = 32


def single(error: BaseException) -> BaseException:
    """What failed one task may have failed several: the first of a group, for one sentence is enough."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def sentence(error: BaseException) -> str:
    """The error for who waits in another process, where it has no traceback."""
    if isinstance(error, ClipfsError | OSError):
        return str(error)
    return f"a bug in clipfs, please report it: {type(error).__name__}: {error}"


def reason(error: OSError) -> str:
    """What the system says, and of which file if it tells."""
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename else what


def printable(text: str) -> str:
    """A stranger's text for a terminal: what that could take for a command of its own is shown, not sent."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(name: bytes, limit: int = 200) -> str:
    """A file name for a message: printable, quoted, bounded; bytes that are no UTF-8 appear as ``\\xNN``."""
    text = printable(name.decode("utf-8", "backslashreplace"))
    if len(text) > limit:
        text = f"{text[: limit // 2]}…{text[-limit // 2 :]}"
    return f"'{text}'"
