"""The FUSE view: an index and a block reader, spoken to by the kernel.

An adapter and nothing else: it turns inodes of the index into replies and errors into errnos. What an image is and
where bytes come from, it does not know. It holds no state that a request could spoil: inode numbers are the index's
nids (the root is asked for as 1), file handles are inode numbers, and everything is immutable, so that the kernel may
cache all it is told for ever.

pyfuse3 ends the whole mount when a handler raises anything but FUSEError. So the handlers below are plain functions,
and `_answer` makes the coroutine that pyfuse3 awaits and stands between it and them.
"""
# ruff: noqa: ARG002  which parameters a handler has is pyfuse3's choice

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Protocol, TypeVar, TypeVarTuple

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, StatvfsData

from clipfs.erofs.structs import Node
from clipfs.errors import ClipfsError
from clipfs.mounting.attributes import FOR_EVER, Attributes

log = logging.getLogger(__name__)

P = TypeVarTuple("P")
T = TypeVar("T")

# As on a disk. FUSE itself lets a kilobyte through.
_MAX_NAME = 255

# Places of files kept before the table starts over.
_REMEMBERED = 4096

# Names in listings that are kept for who lists the directory again, which the kernel asks for each time: 13 MB.
_LISTED = 1 << 15
# Of a directory with more names than this, attributes are made for each reply, and not kept.
_LARGE = 1 << 12

# Distinct sentences about failed reads that are logged, each once, before they may repeat.
_SENTENCES = 256

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC


class Tree(Protocol):
    """What is served; `format.index.Index` is one, and says what these do."""

    @property
    def root(self) -> int: ...

    @property
    def inodes(self) -> int: ...

    @property
    def data_size(self) -> int: ...

    def inode(self, nid: int) -> Node: ...

    def lookup(self, nid: int, name: bytes) -> int: ...

    def entries(self, nid: int) -> list[tuple[bytes, int]]: ...

    def parent(self, nid: int) -> int: ...

    def readlink(self, nid: int) -> bytes: ...

    def xattrs(self, nid: int) -> dict[bytes, bytes]: ...


class Reader(Protocol):
    """What reads are served from; `blocks.reader.BlockReader` is one."""

    def try_read(self, address: int, length: int) -> bytes | None:
        """The bytes if they are in memory."""

    async def read(self, address: int, length: int) -> bytes:
        """The bytes; ClipfsError if they cannot be had."""


def _answer(
    handler: Callable[[ClipFS, *P], T],
) -> Callable[[ClipFS, *P], Coroutine[Any, Any, T]]:
    """The coroutine for a handler that needs no waiting. Nothing but FUSEError comes out of it."""

    @wraps(handler)
    async def answer(self: ClipFS, /, *args: *P) -> T:
        try:
            return handler(self, *args)
        except FUSEError:
            raise
        except Exception as error:  # noqa: BLE001  reported, and the mount lives on
            raise self._failure(error) from None

    return answer


class ClipFS(pyfuse3.Operations):
    """Serves one index. Make it, hand it to ``pyfuse3.init``, run ``pyfuse3.main``.

    on_init is called when FUSE_INIT has been read and has not been answered. xattrs: False if no inode has
    any. Then the kernel is told that there is no such thing, and never asks again for ACLs and capabilities.
    """

    supports_dot_lookup = True
    # An image's POSIX ACLs grant and deny as they would on a disk; costs nothing for the owner of a file.
    enable_acl = True
    enable_writeback_cache = False

    def __init__(
        self, index: Tree, reader: Reader, on_init: Callable[[], None] = lambda: None, *, xattrs: bool = True
    ) -> None:
        super().__init__()
        self._index = index
        self._reader = reader
        self._on_init = on_init
        self._no_xattrs = not xattrs
        self._attributes = Attributes(index.inode)
        self._files: dict[int, tuple[int, int]] = {}
        # In large directories the number of an inode stands for its attributes, until somebody has read as far.
        self._listings: dict[int, list[tuple[bytes, EntryAttributes | int]]] = {}
        self._listed = 0  # names in them
        self._directories: dict[int, int] = {}  # how often each directory is open
        self._complaints: set[str] = set()
        # A reply with inode 0 is cached as "no such name"; the errno ENOENT would be asked for again and again.
        self._absent = EntryAttributes()
        self._absent.st_ino = 0
        self._absent.entry_timeout = FOR_EVER
        # Read by pyfuse3 before anybody else runs, so that one serves for all.
        self._opened = FileInfo(keep_cache=True)
        # Where a reply says which inode is meant and not only what is known of it, the root has a name of its own.
        self._root = self._attributes.made(index.root)
        self._root.st_ino = pyfuse3.ROOT_INODE

    def init(self) -> None:
        self._on_init()

    # --- names and attributes

    @_answer
    def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if len(name) > _MAX_NAME:
            raise FUSEError(errno.ENAMETOOLONG)
        index = self._index
        nid = index.lookup(index.root if parent_inode == 1 else parent_inode, name)
        if not nid:
            return self._absent
        if nid == index.root:
            return self._root
        # Not remembered: the kernel does, and asks for another name next.
        return self._attributes.passing(nid)

    @_answer
    def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._attributes.of(self._nid(inode))

    @_answer
    def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self._index.readlink(self._nid(inode))

    @_answer
    def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        if self._no_xattrs:
            raise FUSEError(errno.ENOSYS)
        try:
            return self._index.xattrs(self._nid(inode))[name]
        except KeyError:
            raise FUSEError(errno.ENODATA) from None

    @_answer
    def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        # Not ENOSYS here: then there is no list, which is more than some programs can take.
        return [] if self._no_xattrs else list(self._index.xattrs(self._nid(inode)))

    @_answer
    def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Asked only without default_permissions, with which the kernel decides; we always mount with it."""
        return True

    @_answer
    def statfs(self, ctx: RequestContext) -> StatvfsData:
        """A full file system of the image's size. Overlayfs accepts no lower directory that has no answer to this."""
        data = StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = self._index.data_size // 4096
        data.f_files = self._index.inodes
        data.f_namemax = _MAX_NAME
        return data

    # --- directories

    @_answer
    def opendir(self, inode: int, ctx: RequestContext) -> int:
        self._directories[inode] = self._directories.get(inode, 0) + 1
        return inode

    @_answer
    def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """Entry number n has offset n + 1, for good: directories do not change. The list is made at the first call."""
        listing = self._listings.get(fh) or self._list(fh)
        reply, made = pyfuse3.readdir_reply, self._attributes.made
        for at in range(start_id, len(listing)):
            name, attributes = listing[at]
            if isinstance(attributes, int):
                attributes = made(attributes)
            if not reply(token, name, attributes, at + 1):
                return

    @_answer
    def releasedir(self, fh: int) -> None:
        """Forget the lists that nobody has asked for lately, if there are too many, and nobody is in the middle of."""
        # Opened for a worker before this one, maybe.
        self._directories[fh] = self._directories.get(fh, 1) - 1
        if not self._directories[fh]:
            del self._directories[fh]
        if fh in self._listings:
            self._listings[fh] = self._listings.pop(fh)
        if self._listed > _LISTED:
            for each in [each for each in self._listings if each not in self._directories]:
                self._listed -= len(self._listings.pop(each))
                if self._listed <= _LISTED:
                    break

    # --- file contents

    @_answer
    def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        if flags & _WRITING:
            raise FUSEError(errno.EROFS)
        if inode not in self._files:
            self._locate(inode)
        self._opened.fh = inode
        return self._opened

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """The hot path, and the one handler that may wait. Up to `try_read` there is no await on purpose: a hit is
        answered before anybody else gets to run."""
        try:
            address, end = self._files.get(fh) or self._locate(fh)
            if size > end - off:
                size = max(0, end - off)
            if not size:
                return b""
            data = self._reader.try_read(address + off, size)
            return data if data is not None else await self._reader.read(address + off, size)
        except FUSEError:
            raise
        except Exception as error:  # noqa: BLE001  reported, and the mount lives on
            raise self._failure(error) from None

    @_answer
    def flush(self, fh: int) -> None:
        """ENOSYS is final: the kernel stops asking."""
        raise FUSEError(errno.ENOSYS)

    @_answer
    def release(self, fh: int) -> None:
        pass

    # --- what cannot be done

    async def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        """The mount is read-only, so that the kernel asks for none of these; only a forced remount makes it."""
        raise FUSEError(errno.EROFS)

    setattr = mknod = mkdir = unlink = rmdir = symlink = rename = link = _refuse
    create = write = setxattr = removexattr = _refuse

    # --- inside

    def _nid(self, inode: int) -> int:
        return self._index.root if inode == pyfuse3.ROOT_INODE else inode

    def _list(self, inode: int) -> list[tuple[bytes, EntryAttributes | int]]:
        nid, made = self._nid(inode), self._attributes.made
        entries = [(b".", nid), (b"..", self._index.parent(nid)), *self._index.entries(nid)]
        listing: list[tuple[bytes, EntryAttributes | int]]
        listing = [*entries] if len(entries) > _LARGE else [(name, made(each)) for name, each in entries]
        self._listings[inode] = listing
        self._listed += len(listing)
        return listing

    def _locate(self, inode: int) -> tuple[int, int]:
        """Where a regular file's bytes are: data-space address, size."""
        node = self._index.inode(self._nid(inode))
        if not stat.S_ISREG(node.mode):
            raise FUSEError(errno.EINVAL)
        if len(self._files) >= _REMEMBERED:
            self._files.clear()
        place = self._files[inode] = node.address, node.size
        return place

    def _failure(self, error: Exception) -> FUSEError:
        """EIO for the reader, the reason for the log: a sentence, and that once, or for a bug the traceback."""
        if not isinstance(error, ClipfsError):
            log.error("a bug in clipfs, please report it", exc_info=error)
            return FUSEError(errno.EIO)
        sentence = str(error)
        if sentence not in self._complaints:
            if len(self._complaints) >= _SENTENCES:
                self._complaints.clear()
            self._complaints.add(sentence)
            log.error("%s", sentence)
        return FUSEError(errno.EIO)
