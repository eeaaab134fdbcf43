"""What programs see in a mount: answers, refusals, and how rarely they have to ask for them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import clipfs
from clipfs import MountOptions
from tests.conftest import require_programs, require_root
from tests.images import LayoutBuilder, Tar
from tests.mounts import BIG, VIEWS, require_view, run
from tests.patched_worker import patch_workers

pytest_plugins = ("tests.mount_fixtures",)
pytestmark = pytest.mark.usefixtures("runtime")

MANY = 1500
AS_NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
LONGEST = "n" * 255
ATTRIBUTES = {"user.long": b"v" * 3000, "user.none": b"", "trusted.t": b"1", "security.s": b"2"}


@pytest.fixture(scope="module")
def view_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of an image with something of everything."""
    tar = (
        Tar()
        .member("dir", typeflag=b"5", mode=0o755)
        .member("dir/file", b"content\n", mode=0o640, mtime="1700000000.123456789", xattrs=ATTRIBUTES)
        .member("dir/again", typeflag=b"1", link="dir/file")
        .member("dir/link", typeflag=b"2", mode=0o777, link="file")
        .member("dir/fifo", typeflag=b"6", mode=0o600)
        .member(f"dir/{LONGEST}", b"")
        .member("empty", typeflag=b"5", mode=0o700)
        .member("big", BIG)
        .member("many", typeflag=b"5", mode=0o755)
    )
    for number in range(MANY):
        tar.member(f"many/{number:05}", b"x" * (number % 3))
    directory = tmp_path_factory.mktemp("view")
    clipfs.build(LayoutBuilder(directory / "oci").layer(tar).config().write(), directory / "view.clip")
    return directory / "view.clip"


@pytest.fixture(params=VIEWS)
def mounted(request: pytest.FixtureRequest, view_clip: Path, public: Path) -> Iterator[clipfs.Mount]:
    """The image, in each view, mounted where everybody can look."""
    require_view(request.param)
    with clipfs.mount(view_clip, public, MountOptions(view=request.param)) as mounted:
        assert mounted.view == request.param
        yield mounted


@pytest.fixture
def view(mounted: clipfs.Mount) -> Path:
    """Its root."""
    return mounted.mountpoint


# --- answers


def test_programs_that_look_at_everything_have_nothing_to_complain_about(view: Path, tmp_path: Path) -> None:
    require_programs("getfattr")
    for command in (
        ("ls", "-lR", "--full-time"),
        ("find", "-printf", "%p %i %l %m %n %s %T@ %Y\n"),
        ("du", "-a"),
        ("stat", "-f", "."),
        ("df", "-a", "."),
        ("getfattr", "-R", "-h", "-d", "-m", "-", "."),
        ("tar", "-cf", "/dev/null", "--xattrs", "--xattrs-include=*", "--sparse", "."),
        ("cp", "-a", "--sparse=always", ".", tmp_path / "copy"),
        ("diff", "-r", "--no-dereference", "--exclude=fifo", ".", tmp_path / "copy"),
    ):
        done = run(*command, cwd=view)
        assert (done.returncode, done.stderr) == (0, ""), command


def test_a_directory_s_listing_agrees_with_what_stat_says(view: Path) -> None:
    """In what is listed with the names: types and inode numbers, of which two names of one file share one."""
    for path, _, _ in os.walk(view):
        with os.scandir(path) as entries:
            for entry in entries:
                found = os.lstat(entry.path)
                assert entry.inode() == found.st_ino
                assert (entry.is_symlink(), entry.is_dir(follow_symlinks=False)) == (
                    stat.S_ISLNK(found.st_mode),
                    stat.S_ISDIR(found.st_mode),
                )
    first, second = (view / "dir" / "file").stat(), (view / "dir" / "again").stat()
    assert first == second
    assert (first.st_nlink, first.st_mode, first.st_mtime_ns) == (2, stat.S_IFREG | 0o640, 1_700_000_000_123_456_789)
    assert sorted(os.listdir(view / "many")) == [f"{number:05}" for number in range(MANY)]


def test_inode_numbers_are_the_same_in_every_mount(view: Path, view_clip: Path, mountpoint: Path) -> None:
    with clipfs.mount(view_clip, mountpoint):
        for name in ("", "dir", "dir/file", "many/00007"):
            assert (view / name).stat().st_ino == (mountpoint / name).stat().st_ino
        assert view.stat().st_dev != mountpoint.stat().st_dev


def test_the_file_system_is_full_and_of_the_image_s_size(mounted: clipfs.Mount, view_clip: Path) -> None:
    found = os.statvfs(mounted.mountpoint)
    with clipfs.Index.open(view_clip) as index:
        if mounted.view == "fuse":
            assert (found.f_blocks * found.f_frsize, found.f_files) == (index.data_size, index.inodes)
        else:
            # EROFS counts its metadata, too, and no inodes.
            metadata = found.f_blocks * found.f_frsize - index.data_size
            assert 0 < metadata < view_clip.stat().st_size
            found = os.statvfs_result((*found[:5], 0, 0, 0, *found[8:]))
    assert (found.f_bfree, found.f_bavail, found.f_ffree, found.f_namemax) == (0, 0, 0, 255)


def test_xattrs_and_buffers_that_are_too_small_for_them(view: Path) -> None:
    file = view / "dir" / "file"
    assert {name: os.getxattr(file, name) for name in os.listxattr(file)} == ATTRIBUTES
    libc = ctypes.CDLL(None, use_errno=True)
    path, buffer = os.fsencode(file), ctypes.create_string_buffer(8192)
    listed = sum(len(name) + 1 for name in ATTRIBUTES)
    assert libc.getxattr(path, b"user.long", None, 0) == 3000
    assert libc.listxattr(path, None, 0) == listed
    assert (libc.getxattr(path, b"user.long", buffer, 2999), ctypes.get_errno()) == (-1, errno.ERANGE)
    assert (libc.listxattr(path, buffer, listed - 1), ctypes.get_errno()) == (-1, errno.ERANGE)
    assert libc.getxattr(path, b"user.long", buffer, 3000) == 3000
    for name in ("user.other", "user." + "x" * 250, "security.capability", "system.posix_acl_access"):
        with pytest.raises(OSError, match="No data available"):
            os.getxattr(file, name)


def test_names_that_are_too_long(view: Path) -> None:
    assert (view / "dir" / LONGEST).stat().st_size == 0
    with pytest.raises(OSError, match="File name too long"):
        (view / "dir" / (LONGEST + "n")).stat()


def test_every_way_of_reading(view: Path, tmp_path: Path) -> None:
    descriptor = os.open(view / "big", os.O_RDONLY)
    out = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    try:
        assert os.sendfile(out, descriptor, 0, len(BIG)) == len(BIG)
        assert os.pread(out, len(BIG), 0) == BIG
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == BIG
        assert os.lseek(descriptor, 0, os.SEEK_HOLE) == len(BIG)
        assert os.lseek(descriptor, 5, os.SEEK_DATA) == 5
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with contextlib.suppress(OSError):  # EROFS has nothing to say to that
            os.fsync(descriptor)
    finally:
        for each in (descriptor, out):
            os.close(each)


def test_reading_past_the_page_cache(mounted: clipfs.Mount) -> None:
    """EROFS can do that with block devices only, and says so when the file is opened."""
    path = mounted.mountpoint / "big"
    if mounted.view == "kernel":
        with pytest.raises(OSError, match="Invalid argument"):
            os.open(path, os.O_RDONLY | os.O_DIRECT)
        return
    direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 8192) as aligned:
            assert os.preadv(direct, [aligned], 4096) == 8192
            assert aligned[:] == BIG[4096 : 4096 + 8192]
    finally:
        os.close(direct)


# --- refusals

CHANGES: dict[str, Callable[[Path], object]] = {
    "open": lambda view: os.open(view / "big", os.O_WRONLY),
    "open rw": lambda view: os.open(view / "big", os.O_RDWR),
    "truncating open": lambda view: os.open(view / "big", os.O_RDONLY | os.O_TRUNC),
    "create": lambda view: os.open(view / "new", os.O_WRONLY | os.O_CREAT),
    "tmpfile": lambda view: os.open(view, os.O_TMPFILE | os.O_RDWR),
    "truncate": lambda view: os.truncate(view / "big", 0),
    "mkdir": lambda view: os.mkdir(view / "new"),
    "mkfifo": lambda view: os.mkfifo(view / "new"),
    "symlink": lambda view: os.symlink("x", view / "new"),
    "link": lambda view: os.link(view / "big", view / "new"),
    "rename": lambda view: os.rename(view / "big", view / "new"),
    "unlink": lambda view: os.unlink(view / "big"),
    "rmdir": lambda view: os.rmdir(view / "empty"),
    "chmod": lambda view: os.chmod(view / "big", 0),
    "chown": lambda view: os.chown(view / "big", 1, 1),
    "utime": lambda view: os.utime(view / "big"),
    "setxattr": lambda view: os.setxattr(view / "big", "user.x", b""),
    "removexattr": lambda view: os.removexattr(view / "dir" / "file", "user.none"),
}


@pytest.mark.parametrize("remounted", [False, True])
def test_nothing_can_be_changed(view: Path, remounted: bool) -> None:
    """Also when somebody goes round mount.clipfs and makes the kernel believe that it is writable."""
    if remounted:
        assert run("mount", "-i", "-o", "remount,rw", view).stderr == ""
    for name, change in CHANGES.items():
        with pytest.raises(OSError) as caught:  # noqa: PT011  which one is asked below
            change(view)
        wanted = (errno.EROFS, errno.EOPNOTSUPP) if name == "tmpfile" else (errno.EROFS,)
        assert caught.value.errno in wanted, name
    assert (view / "big").read_bytes() == BIG


def test_permissions_are_the_kernel_s_affair(view: Path) -> None:
    for path, flag, allowed in (
        ("big", "-r", True),
        ("big", "-x", False),
        ("dir", "-x", True),
        ("dir/file", "-r", False),
        ("empty", "-r", False),
        ("dir/link", "-r", False),
        ("dir/link", "-e", True),
    ):
        assert (run(*AS_NOBODY, "test", flag, view / path).returncode == 0) == allowed, (path, flag)
    assert (
        run("setpriv", "--reuid", "1", "--regid", "0", "--clear-groups", "cat", view / "dir/file").stdout == "content\n"
    )
    assert not os.access(view / "big", os.W_OK)


# --- how rarely they ask


class Requests:
    """How often the worker was asked for what, since this was last asked. It appends a line for each request."""

    NAMES = ("lookup", "getattr", "readlink", "getxattr", "listxattr", "statfs", "opendir", "readdir", "open", "read")
    COUNTING = """
import functools, os
from clipfs.mounting.fs import ClipFS
out = os.open({path!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def counted(name, original):
    async def handler(*args):
        os.write(out, name.encode() + b"\\n")
        return await original(*args)
    return functools.wraps(original)(handler)
for name in {names!r}:
    setattr(ClipFS, name, counted(name, getattr(ClipFS, name)))
"""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = 0
        self.patch = self.COUNTING.format(path=str(path), names=self.NAMES)

    def fresh(self) -> dict[str, int]:
        said = self._path.read_text().split()
        fresh, self._seen = said[self._seen :], len(said)
        return dict(Counter(fresh))


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Requests:
    counted = Requests(tmp_path / "requests")
    patch_workers(monkeypatch, counted.patch)
    return counted


@pytest.fixture
def counted_view(requests: Requests, view_clip: Path, public: Path) -> Iterator[Path]:
    """The image by FUSE alone, served by a worker that counts."""
    require_root()
    with clipfs.mount(view_clip, public, MountOptions(view="fuse")):
        requests.fresh()
        yield public


def test_what_is_not_there_is_asked_for_once(counted_view: Path, requests: Requests) -> None:
    for _ in range(100):
        assert not (counted_view / "dir" / "absent").exists()
        with contextlib.suppress(FileNotFoundError):
            os.open(counted_view / "absent", os.O_RDONLY)
    assert requests.fresh() == {"lookup": 3}  # dir, dir/absent, absent


def test_attributes_are_asked_for_once(counted_view: Path, requests: Requests) -> None:
    paths = [counted_view / "many" / f"{number:05}" for number in range(MANY)]
    paths += [counted_view / "dir" / name for name in ("file", "again", "link", "fifo")]
    for path in paths:
        path.lstat()
    assert requests.fresh() == {"lookup": len(paths) + 2}
    for path in paths:
        path.lstat()
    assert requests.fresh() == {}


def test_a_listing_brings_all_attributes(counted_view: Path, requests: Requests) -> None:
    assert len(os.listdir(counted_view / "many")) == MANY
    asked = requests.fresh()
    assert asked.pop("readdir") < MANY / 10
    assert asked == {"lookup": 1, "opendir": 1}
    for number in range(MANY):
        (counted_view / "many" / f"{number:05}").stat()
    assert requests.fresh() == {}


def test_a_file_read_again_costs_an_open(counted_view: Path, requests: Requests) -> None:
    assert (counted_view / "big").read_bytes() == BIG
    first = requests.fresh()
    assert first["read"] <= len(BIG) // (128 << 10) + 2
    assert (counted_view / "big").read_bytes() == BIG
    assert requests.fresh() == {"open": 1}


def test_links_are_read_once(counted_view: Path, requests: Requests) -> None:
    for _ in range(10):
        assert os.readlink(counted_view / "dir" / "link") == "file"
        assert (counted_view / "dir" / "link").read_bytes() == b"content\n"
    assert requests.fresh()["readlink"] == 1
    assert "readlink" not in requests.fresh()


def test_xattrs_that_no_file_has_are_asked_for_once(requests: Requests, tmp_path: Path, public: Path) -> None:
    """Also by the next mount of the clip, which does not look at every inode; and nobody sees a difference."""
    require_root()
    require_programs("getfattr")
    tar = Tar().dir("d").file("d/program", Path("/bin/true").read_bytes(), mode=0o755).file("d/f", b"f", mode=0o640)
    clip = tmp_path / "plain.clip"
    clipfs.build(LayoutBuilder(tmp_path / "oci").layer(tar.member("d/l", typeflag=b"2", link="f")).write(), clip)
    for _ in range(2):
        with clipfs.mount(clip, public, MountOptions(view="fuse")):
            assert run("ls", "-lR", public).returncode == 0
            for command in (("ls", "-lR", "d"), ("cp", "-a", "d", tmp_path / "copy"), ("d/program",)):
                requests.fresh()
                assert run("env", "-C", public, *command).returncode == 0
                assert "getxattr" not in requests.fresh()
            assert os.listxattr(public / "d/f") == []
            with pytest.raises(OSError, match="not supported"):
                os.getxattr(public / "d/f", "security.capability")
            with pytest.raises(OSError, match="No data"):
                os.getxattr(public / "d/f", "system.posix_acl_access")
            done = run("getfattr", "-R", "-d", "-m", "-", public)
            assert (done.returncode, done.stderr) == (0, "")
            assert run(*AS_NOBODY, public / "d/program").returncode == 0
            assert run(*AS_NOBODY, "cat", public / "d/f").returncode != 0
        shutil.rmtree(tmp_path / "copy")


def test_somebody_else_asks_no_more_than_root(counted_view: Path, requests: Requests) -> None:
    """Whether they may look is decided by what the kernel knows already.

    But for the access list of the root: the kernel makes that inode before it knows that we have such lists, and then
    never caches its own.
    """
    assert run(*AS_NOBODY, "cat", counted_view / "many/00001").stdout == "x"
    requests.fresh()
    assert run(*AS_NOBODY, "cat", counted_view / "many/00001").stdout == "x"
    asked = requests.fresh()
    assert asked.pop("getxattr", 0) <= 1
    assert asked == {"open": 1}


def test_neighbours_cost_one_request_in_the_kernel_s_view(requests: Requests, view_clip: Path, public: Path) -> None:
    """Small files lie side by side in the data space, and the kernel reads ahead in that."""
    require_view("kernel")
    with clipfs.mount(view_clip, public, MountOptions(view="kernel")):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        requests.fresh()
        assert (public / "many" / "00001").read_bytes() == b"x"
        assert requests.fresh().get("read", 0) >= 1
        # Files of two sizes in 64 pages; the first read has brought some pages, and what follows brings many.
        for number in range(MANY):
            assert (public / "many" / f"{number:05}").read_bytes() == b"x" * (number % 3)
        assert requests.fresh().get("read", 0) <= MANY // 20
