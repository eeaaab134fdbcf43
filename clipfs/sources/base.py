"""What a source is: somewhere that gives an image's documents, and ranges of its blobs by digest.

How a name leads to one manifest is decided here, once for all sources: indexes are followed, platforms chosen, and
every document verified against its digest. Sources know nothing of spans, inodes or the ``.clip`` format.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import trio

from clipfs.errors import ImageError, IntegrityError, SourceError
from clipfs.fields import quoted
from clipfs.oci import MAX_CONFIG, MAX_MANIFEST, Descriptor, ImageConfig, Manifest, Platform, parse_manifest

T = TypeVar("T")

#: Takes what has come of something longer.
Sink = Callable[[bytes], object]

# Index → index → manifest is the deepest that tools make (a layout's index.json, an image's index, its manifest).
_MAX_NESTING = 4
# A streamed blob comes in pieces of this size: large enough for few thread hops, small enough for flat memory.
PIECE = 1 << 20


class Image(NamedTuple):
    """One image for one platform. `name` leads to exactly this image, also from another working directory."""

    name: str
    manifest: Manifest
    config: ImageConfig


class LocalBlob(NamedTuple):
    """A blob that lies in a file of this machine."""

    path: Path
    offset: int
    size: int


class Document(NamedTuple):
    """A manifest or index as it was found, and what its finder called it."""

    raw: bytes
    media_type: str | None


class Source(ABC):
    """An async context manager; nothing is opened before it is needed."""

    name: str

    async def image(self, platform: Platform | None = None) -> Image:
        """The image that the name means, for `platform` (this machine's, if None).

        An image without an index is for one platform only; it is refused if another one was asked for explicitly.
        """
        manifest = await self._manifest_for(platform or Platform.host())
        if manifest.config.size > MAX_CONFIG:
            raise ImageError(f"the image config has {manifest.config.size} bytes; more than {MAX_CONFIG} are not read")
        config = ImageConfig.parse(await self.believed(manifest.config, lambda: self._config(manifest.config)))
        if config.os != "linux":
            raise ImageError(f"the image is for {quoted(config.os)}; only Linux images can be mounted")
        if platform and config.architecture and not platform.matches(config.platform):
            raise ImageError(f"the image is for {config.platform} only, not for {platform}")
        return Image(self._canonical(manifest), manifest, config)

    async def believed(self, blob: Descriptor, get: Callable[[], Awaitable[T]]) -> T:
        """What `get` makes of a blob. If that finds it to be wrong (IntegrityError), once more, from elsewhere if there
        is another place."""
        try:
            return await get()
        except IntegrityError:
            self.distrust(blob)
            return await get()

    async def _config(self, blob: Descriptor) -> bytes:
        return blob.digest.verify(await self.read_range(blob, 0, blob.size), "the image config")

    async def read_range(self, blob: Descriptor, start: int, end: int) -> bytes:
        """Exactly the bytes [start, end) of a blob, or SourceError. They are not verified: a range has no digest."""
        data = bytearray()
        await self.read_into(blob, start, end, data.extend)
        return bytes(data)

    @abstractmethod
    async def read_into(self, blob: Descriptor, start: int, end: int, sink: Sink) -> None:
        """As `read_range`, but each piece is given to `sink` when it comes: in order, and once."""

    @abstractmethod
    def local(self, blob: Descriptor) -> LocalBlob | None:
        """Where the blob lies on this machine, None if it does not."""

    @abstractmethod
    def stream(self, blob: Descriptor) -> AsyncGenerator[bytes, None]:
        """The whole blob in pieces, in order, each once. Who may stop early closes it, by `contextlib.aclosing`."""

    def distrust(self, blob: Descriptor, at: int | None = None) -> None:  # noqa: B027 - most have one place to read from
        """What came of a blob was wrong, at the offset `at` if that is known: take another way to it next time, if
        there is one."""

    async def aclose(self) -> None:  # noqa: B027 - most sources hold nothing
        """Let go of connections. May be called more than once."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @abstractmethod
    async def _named(self, platform: Platform) -> Document:
        """The document that the name leads to; if the name has a digest, it was verified."""

    @abstractmethod
    async def _manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest or index that another one points to; the caller verifies it."""

    async def _pointed_at(self, chosen: Descriptor) -> Document:
        """A manifest or index that a document points to, verified; ImageError if it is larger than any may be."""
        if chosen.size > MAX_MANIFEST:
            raise ImageError(f"the manifest has {chosen.size} bytes; more than {MAX_MANIFEST} are not read")
        return Document(chosen.digest.verify(await self._manifest(chosen), "the manifest"), chosen.media_type)

    def _canonical(self, manifest: Manifest) -> str:
        """The name under which `manifest` is found again."""
        del manifest
        return self.name

    async def _manifest_for(self, wanted: Platform) -> Manifest:
        found = await self._named(wanted)
        for _ in range(_MAX_NESTING):
            parsed = parse_manifest(found.raw, found.media_type)
            if isinstance(parsed, Manifest):
                return parsed
            chosen = parsed.select(wanted)
            found = await self._pointed_at(chosen)
        raise ImageError(f"the image's indexes point to indexes more than {_MAX_NESTING} deep")


class LocalSource(Source):
    """A source in the file system: every blob lies in some file, at some offset. Blocking I/O runs in threads."""

    @abstractmethod
    def local(self, blob: Descriptor) -> LocalBlob:
        """Where the blob lies; SourceError if it is not there or has not the size that the descriptor says."""

    async def read_range(self, blob: Descriptor, start: int, end: int) -> bytes:
        """See `Source.read_range`."""
        check_range(blob, start, end)
        # Abandoning is safe: the thread owns its descriptor and nobody sees what it read.
        return await trio.to_thread.run_sync(self._read, blob, start, end, abandon_on_cancel=True)

    async def read_into(self, blob: Descriptor, start: int, end: int, sink: Sink) -> None:
        """See `Source.read_into`."""
        for at in range(start, end, PIECE):
            sink(await self.read_range(blob, at, min(at + PIECE, end)))

    async def stream(self, blob: Descriptor) -> AsyncGenerator[bytes, None]:
        """See `Source.stream`."""
        for start in range(0, blob.size, PIECE):
            yield await self.read_range(blob, start, min(start + PIECE, blob.size))

    async def _manifest(self, descriptor: Descriptor) -> bytes:
        return await self.read_range(descriptor, 0, descriptor.size)

    def _read(self, blob: Descriptor, start: int, end: int) -> bytes:
        place = self.local(blob)
        data = read_file(place.path, place.offset + start, end - start)
        if len(data) != end - start:
            raise SourceError(f"{place.path} ends before the last byte of {blob.digest}")
        return data


def check_range(blob: Descriptor, start: int, end: int) -> None:
    """SourceError unless [start, end) lies inside the blob."""
    if not 0 <= start <= end <= blob.size:
        raise SourceError(f"bytes {start} to {end} were asked of blob {blob.digest}, which has {blob.size}")


def is_file(path: Path) -> bool:
    """Whether there is a regular file; SourceError if that cannot be found out."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error


def read_file(path: Path, offset: int, length: int) -> bytes:
    """Up to `length` bytes of a regular file, fewer only at its end; SourceError with the reason if it cannot be read.

    Devices and pipes are refused before a byte is read of them: reading has effects there, and may never end.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise SourceError(f"{path} is not a regular file")
            data = os.pread(handle, length, offset)
            while len(data) < length and (piece := os.pread(handle, length - len(data), offset + len(data))):
                data += piece
            return data
        finally:
            os.close(handle)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
