"""`ClipFS` by direct calls of its handlers, over a real index and a reader that can be told to miss and to fail."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyfuse3
import pytest
import trio
from pyfuse3 import FUSEError

from clipfs.erofs.structs import Inode
from clipfs.errors import SourceError
from clipfs.format.index import Index
from clipfs.format.pack import write
from clipfs.mounting import fs as fs_module
from clipfs.mounting.fs import ClipFS

CONTENT = bytes(range(256)) * 40
MTIME = 1_700_000_000_123_456_789

# No handler looks at who asks; with default_permissions that is the kernel's business.
NOBODY = cast("pyfuse3.RequestContext", None)


class Reader:
    """A data space whose first bytes are CONTENT. `memory` says whether reads hit, `failure` what misses end in."""

    def __init__(self) -> None:
        self.memory = True
        self.failure: Exception | None = None
        self.waited = 0

    def try_read(self, address: int, length: int) -> bytes | None:
        return CONTENT[address : address + length] if self.memory else None

    async def read(self, address: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self.waited += 1
        if self.failure:
            raise self.failure
        return CONTENT[address : address + length]


def tree() -> Inode:
    """One of each: directory, file with two names, symlinks, device, fifo, empty file, xattrs."""
    file = Inode(stat.S_IFREG | 0o4755, uid=1000, gid=2**31, mtime_ns=MTIME, size=len(CONTENT), nlink=2)
    file.xattrs[b"security.capability"] = b"\1\0\0\2" + bytes(16)
    file.xattrs[b"user.note"] = b"hello"
    sub = Inode(stat.S_IFDIR | 0o1777, mtime_ns=MTIME, nlink=2, children={b"again": file})
    many = {b"%05d" % number: Inode(stat.S_IFREG | 0o644) for number in range(1000)}
    return Inode(
        stat.S_IFDIR | 0o755,
        nlink=4,
        children={
            b"file": file,
            b"sub": sub,
            b"many": Inode(stat.S_IFDIR | 0o755, nlink=2, children=many),
            b"link": Inode(stat.S_IFLNK | 0o777, target=b"sub/again"),
            b"null": Inode(stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3)),
            b"disk": Inode(stat.S_IFBLK | 0o660, rdev=os.makedev(259, 70000)),
            b"fifo": Inode(stat.S_IFIFO | 0o600),
            b"no utf-8 \xff": Inode(stat.S_IFREG | 0o644, mtime_ns=-1),
        },
    )


@pytest.fixture(name="index")
def _index(tmp_path: Path) -> Iterator[Index]:
    path = tmp_path / "tree.clip"
    with path.open("wb") as out:
        write(
            out, root=tree(), extents=[], data_size=12288, layers=[], manifest=b"{}", config=b"{}", source="oci:/none"
        )
    with Index.open(path) as index:
        yield index


@pytest.fixture(name="reader")
def _reader() -> Reader:
    return Reader()


@pytest.fixture(name="fs")
def _fs(index: Index, reader: Reader) -> ClipFS:
    return ClipFS(index, reader)


async def find(fs: ClipFS, *names: bytes) -> pyfuse3.EntryAttributes:
    entry = await fs.getattr(pyfuse3.ROOT_INODE, NOBODY)
    for name in names:
        entry = await fs.lookup(entry.st_ino, name, NOBODY)
        assert entry.st_ino != 0, name
    return entry


async def opened(fs: ClipFS, *names: bytes) -> int:
    entry = await find(fs, *names)
    return (await fs.open(entry.st_ino, os.O_RDONLY, NOBODY)).fh


async def test_the_root_is_asked_for_as_one_and_every_attribute_is_the_index_s(fs: ClipFS, index: Index) -> None:
    root = await fs.getattr(pyfuse3.ROOT_INODE, NOBODY)
    assert (root.st_ino, root.st_mode, root.st_nlink) == (index.root, stat.S_IFDIR | 0o755, 4)
    assert (await fs.lookup(pyfuse3.ROOT_INODE, b"..", NOBODY)).st_ino == pyfuse3.ROOT_INODE
    file = await find(fs, b"file")
    assert (file.st_mode, file.st_uid, file.st_gid) == (stat.S_IFREG | 0o4755, 1000, 2**31)
    assert (file.st_size, file.st_blocks, file.st_nlink) == (len(CONTENT), -(-len(CONTENT) // 512), 2)
    assert file.st_atime_ns == file.st_mtime_ns == file.st_ctime_ns == MTIME
    assert (await find(fs, b"null")).st_rdev == os.makedev(1, 3)
    assert (await find(fs, b"disk")).st_rdev == os.makedev(259, 70000)
    assert stat.S_ISFIFO((await find(fs, b"fifo")).st_mode)
    assert (await find(fs, b"no utf-8 \xff")).st_mtime_ns == -1


async def test_names_looked_up_in_a_row_have_nothing_of_one_another(fs: ClipFS, index: Index) -> None:
    names = [b"file", b"null", b"fifo", b"disk", b"no utf-8 \xff", b"file", b"many", b"link"]
    for name in names:
        found = await fs.lookup(pyfuse3.ROOT_INODE, name, NOBODY)
        asked = await fs.getattr(index.lookup(index.root, name), NOBODY)
        assert found is not asked
        assert found.__getstate__() == asked.__getstate__(), name


async def test_two_names_of_one_file_are_one_inode(fs: ClipFS) -> None:
    assert (await find(fs, b"file")).st_ino == (await find(fs, b"sub", b"again")).st_ino


async def test_what_is_there_and_what_is_not_may_both_be_cached_for_years(fs: ClipFS) -> None:
    years = 50 * 365 * 86400
    present, absent = await find(fs, b"file"), await fs.lookup(1, b"nothing", NOBODY)
    assert absent.st_ino == 0
    assert min(present.entry_timeout, present.attr_timeout, absent.entry_timeout) > years


async def test_dot_names_find_the_way_back_to_the_root(fs: ClipFS) -> None:
    sub = await find(fs, b"sub")
    assert (await fs.lookup(sub.st_ino, b".", NOBODY)).st_ino == sub.st_ino
    assert (await fs.lookup(sub.st_ino, b"..", NOBODY)).st_ino == pyfuse3.ROOT_INODE
    assert (await fs.lookup(pyfuse3.ROOT_INODE, b"..", NOBODY)).st_ino == pyfuse3.ROOT_INODE


async def test_readlink_is_verbatim(fs: ClipFS) -> None:
    assert await fs.readlink((await find(fs, b"link")).st_ino, NOBODY) == b"sub/again"


async def test_xattrs(fs: ClipFS) -> None:
    file = (await find(fs, b"file")).st_ino
    assert sorted(await fs.listxattr(file, NOBODY)) == [b"security.capability", b"user.note"]
    assert await fs.getxattr(file, b"user.note", NOBODY) == b"hello"
    with pytest.raises(FUSEError) as caught:
        await fs.getxattr(file, b"security.selinux", NOBODY)
    assert caught.value.errno == errno.ENODATA
    assert await fs.listxattr(pyfuse3.ROOT_INODE, NOBODY) == []


async def test_where_no_inode_has_xattrs_the_kernel_is_told_not_to_ask(index: Index, reader: Reader) -> None:
    fs = ClipFS(index, reader, xattrs=False)
    for name in (b"security.capability", b"system.posix_acl_access"):
        with pytest.raises(FUSEError) as caught:
            await fs.getxattr(pyfuse3.ROOT_INODE, name, NOBODY)
        assert caught.value.errno == errno.ENOSYS
    assert await fs.listxattr(pyfuse3.ROOT_INODE, NOBODY) == []


async def test_statfs_is_a_full_file_system(fs: ClipFS, index: Index) -> None:
    data = await fs.statfs(NOBODY)
    assert (data.f_bsize * data.f_blocks, data.f_bfree, data.f_bavail) == (index.data_size, 0, 0)
    assert (data.f_files, data.f_ffree, data.f_namemax) == (index.inodes, 0, 255)


async def test_a_listing_read_in_pieces_has_each_name_once(
    fs: ClipFS, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bytes, int, int]] = []
    room = 0

    def reply(token: object, name: bytes, attributes: pyfuse3.EntryAttributes, next_id: int) -> bool:
        nonlocal room
        if room == 0:
            return False
        room -= 1
        seen.append((name, attributes.st_ino, next_id))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    many = await find(fs, b"many")
    handle = await fs.opendir(many.st_ino, NOBODY)
    offset = 0
    for room in (0, 1, 1, 7, 300, 300, 10_000):  # noqa: B007  `reply` reads it
        await fs.readdir(handle, offset, cast("Any", None))
        offset = seen[-1][2] if seen else 0
    names = [name for name, _, _ in seen]
    assert names == [b".", b"..", *(b"%05d" % number for number in range(1000))]
    assert seen[0][1] == many.st_ino
    assert seen[1][1] == index.root
    # An offset stays good after the listing was given up, as when two processes list the same directory.
    monkeypatch.setattr(fs_module, "_LISTED", 0)
    await fs.releasedir(handle)
    assert not fs._listings
    middle, room = seen[500], 1
    await fs.readdir(handle, middle[2], cast("Any", None))
    assert seen[-1] == seen[501]


async def test_the_listings_kept_are_those_used_last(fs: ClipFS, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyfuse3, "readdir_reply", lambda *_: True)
    monkeypatch.setattr(fs_module, "_LISTED", 1010)  # of 10, 1002 and 3 names
    sub, many = index.resolve("sub"), index.resolve("many")

    async def listed(nid: int) -> None:
        await fs.readdir(nid, 0, cast("Any", None))
        await fs.releasedir(nid)

    for nid in (sub, many, sub, index.root):
        await listed(nid)
    assert list(fs._listings) == [sub, index.root]
    assert fs._listed == sum(map(len, fs._listings.values()))
    kept = fs._listings[sub]
    await listed(sub)
    assert fs._listings[sub] is kept


async def test_a_large_directory_is_kept_while_it_is_read_and_made_bit_by_bit(
    fs: ClipFS, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image may have millions in one: attributes of all take gigabytes, and each listing anew the loop's time."""
    monkeypatch.setattr(fs_module, "_LISTED", 100)
    monkeypatch.setattr(fs_module, "_LARGE", 500)
    sub, many = index.resolve("sub"), index.resolve("many")
    made, room = [], 3

    def reply(token: Any, name: bytes, attributes: pyfuse3.EntryAttributes, next_id: int) -> bool:
        made.append(attributes.st_ino)
        return len(made) < room

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    await fs.opendir(many, NOBODY)
    await fs.readdir(many, 0, cast("Any", None))
    assert made == [many, index.root, index.lookup(many, b"00000")]
    kept = fs._listings[many]
    await fs.opendir(sub, NOBODY)
    await fs.readdir(sub, 0, cast("Any", None))
    await fs.releasedir(sub)
    assert fs._listings == {many: kept}
    await fs.releasedir(many)
    assert not fs._listings
    assert (fs._listed, fs._directories) == (0, {})


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC])
async def test_opening_for_writing_is_refused(fs: ClipFS, flags: int) -> None:
    with pytest.raises(FUSEError) as caught:
        await fs.open((await find(fs, b"file")).st_ino, flags, NOBODY)
    assert caught.value.errno == errno.EROFS


async def test_an_open_file_keeps_its_page_cache(fs: ClipFS) -> None:
    assert (await fs.open((await find(fs, b"file")).st_ino, os.O_RDONLY, NOBODY)).keep_cache


@pytest.mark.parametrize("hit", [True, False])
@pytest.mark.parametrize(
    ("offset", "size"), [(0, 10), (4000, 5000), (len(CONTENT) - 3, 4096), (len(CONTENT), 1), (10**12, 1)]
)
async def test_reads_end_where_the_file_ends(fs: ClipFS, reader: Reader, hit: bool, offset: int, size: int) -> None:
    reader.memory = hit
    assert await fs.read(await opened(fs, b"file"), offset, size) == CONTENT[offset : offset + size]


async def test_a_hit_does_not_wait(fs: ClipFS, reader: Reader) -> None:
    handle = await opened(fs, b"file")
    call = fs.read(handle, 0, 10)
    with pytest.raises(StopIteration) as done:
        call.send(None)
    assert (done.value.value, reader.waited) == (CONTENT[:10], 0)


async def test_handles_outlive_what_is_remembered_about_files(fs: ClipFS) -> None:
    handle = await opened(fs, b"file")
    fs._files.clear()
    assert await fs.read(handle, 1, 2) == CONTENT[1:3]


async def test_a_source_that_fails_is_eio_and_one_line_in_the_log(
    fs: ClipFS, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    reader.memory, reader.failure = False, SourceError("registry.example says 503")
    handle = await opened(fs, b"file")
    for _ in range(3):
        with pytest.raises(FUSEError) as caught:
            await fs.read(handle, 0, 10)
        assert caught.value.errno == errno.EIO
    assert [record.getMessage() for record in caplog.records] == ["registry.example says 503"]
    reader.failure = None
    assert await fs.read(handle, 0, 10) == CONTENT[:10]


async def test_a_bug_is_eio_with_a_traceback_and_not_the_end_of_the_mount(
    fs: ClipFS, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    reader.memory, reader.failure = False, ZeroDivisionError()
    with pytest.raises(FUSEError) as caught:
        await fs.read(await opened(fs, b"file"), 0, 10)
    assert caught.value.errno == errno.EIO
    assert caplog.records[0].levelno == logging.ERROR
    assert caplog.records[0].exc_info


async def test_an_inode_number_out_of_thin_air_is_an_error_and_no_crash(fs: ClipFS) -> None:
    with pytest.raises(FUSEError) as caught:
        await fs.getattr(2**40, NOBODY)
    assert caught.value.errno == errno.EIO


async def test_a_cancelled_read_stays_cancelled(fs: ClipFS, reader: Reader) -> None:
    reader.memory = False
    handle = await opened(fs, b"file")
    with trio.CancelScope() as scope:
        scope.cancel()
        await fs.read(handle, 0, 10)
    assert scope.cancelled_caught


async def test_everything_that_writes_is_refused(fs: ClipFS) -> None:
    making = ("mknod", "mkdir", "symlink", "link", "create")
    changing = ("setattr", "unlink", "rmdir", "rename", "write", "setxattr", "removexattr")
    for name in making + changing:
        with pytest.raises(FUSEError) as caught:
            await getattr(fs, name)(1, b"x", 0, NOBODY)
        assert caught.value.errno == errno.EROFS, name
