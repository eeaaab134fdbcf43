"""The EROFS image: what is packed is what comes out, for us, for the kernel and for erofs-utils."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from clipfs.erofs.pack import pack
from clipfs.erofs.structs import BLOCK, DIRENT, MAX_PATH, Inode, decode_rdev, encode_rdev
from clipfs.errors import ImageError
from clipfs.format.index import Index
from tests.clips import TreeBuilder, kernel_mount, seen_in_index, seen_in_tree, seen_on_disk, write_clip

# cap_net_bind_service=ep, and an ACL that lets user 1000 do more than the group; the kernel parses both.
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in ((1, 6, 2**32 - 1), (2, 7, 1000), (4, 5, 2**32 - 1), (16, 7, 2**32 - 1), (32, 4, 2**32 - 1))
)


def exact_directory(tree: TreeBuilder, path: bytes, sizes: list[int]) -> None:
    """A directory whose blocks are filled to exactly these sizes, in bytes."""
    tree.directory(path)
    number, used = 0, 2 * DIRENT.size + 3
    for size in sizes:
        while used < size:
            length = min(size - used - DIRENT.size, 100)
            # What is left over must be enough for another entry, or nothing.
            if 0 < size - used - DIRENT.size - length < DIRENT.size + 8:
                length -= 20
            tree.file(path + b"/" + (b"%08d" % number).ljust(length, b"x"))
            used, number = used + DIRENT.size + length, number + 1
        assert used == size
        used = 0


def one_of_everything() -> TreeBuilder:
    tree = TreeBuilder(mtime_ns=1_700_000_000_123_456_789, xattrs={b"user.root": b"yes"})
    tree.file(b"empty", uid=2**31, gid=2**32 - 2)
    tree.file(b"file", b"hello\n", 0o6755, mtime_ns=999_999_999, xattrs={b"security.capability": CAPABILITY})
    tree.file(b"block", b"b" * BLOCK, mtime_ns=-1)
    tree.file(b"big", os.urandom(3 * BLOCK + 1), 0o400, mtime_ns=2**33 * 10**9)
    tree.file(b"sparse", bytes(10_000) + b"data" + bytes(90_000), stored=[(10_000, 4)])
    tree.file(b"acl", b"x", 0o674, xattrs={b"system.posix_acl_access": ACL, b"user.empty": b""})
    tree.directory(b"sticky", 0o1777, xattrs={b"system.posix_acl_default": ACL, b"trusted.t": bytes(range(256))})
    tree.directory(b"empty dir", mtime_ns=1)
    linked = tree.file(b"linked", b"same inode", uid=2_097_153)
    tree.add(b"sticky/again", linked)
    tree.add(b"z/y/x/deep", linked)
    tree.symlink(b"short", b"file", xattrs={b"trusted.on-a-link": b"1"})
    tree.symlink(b"absolute", b"/z/y")
    tree.symlink(b"inline to the last byte", b"i" * (BLOCK - 64))
    tree.symlink(b"too long for inline", b"p" * (BLOCK - 63))
    tree.symlink(b"longest", b"l/" * 2047 + b"l")
    tree.add(b"linked link", tree.symlink(b"first link", b"file"))
    tree.special(b"fifo", stat.S_IFIFO)
    tree.special(b"socket", stat.S_IFSOCK)
    tree.special(b"null", stat.S_IFCHR, os.makedev(1, 3))
    tree.special(b"big device", stat.S_IFBLK, os.makedev(4095, 1_048_575))
    tree.special(b"minor", stat.S_IFCHR, os.makedev(0, 256))
    tree.file(b"n" * 255, b"longest name")
    tree.file(b"\xff\xfe not \xc0 UTF-8\n\t\x01", b"bytes")
    tree.file(b"!before the dots", b"1")
    tree.file(b"..c", b"2")
    tree.file(b"\xf0\x9f\x90\xa7", b"penguin")
    tree.file(b"many xattrs", b"3", xattrs={b"user.%03d" % n: bytes([n]) * n for n in range(120)})
    tree.directory(b"large xattr", xattrs={b"user.large": os.urandom(60_000)})
    tree.symlink(b"crowded link", b"t" * 200, xattrs={b"trusted.crowd": b"c" * 3_900})
    tree.file(b"large xattr/below", b"4")
    for number in range(4_000):
        tree.file(b"many/%d-%s" % (number, b"name" * (number % 7)))
    for number in range(500):
        tree.file(b"before/!%d" % number)
    exact_directory(tree, b"exactly one block", [BLOCK])
    exact_directory(tree, b"exactly three blocks", [BLOCK, BLOCK, BLOCK])
    exact_directory(tree, b"inline to the last byte too", [BLOCK - 64])
    exact_directory(tree, b"one byte more", [BLOCK - 63])
    exact_directory(tree, b"full block and inline tail", [BLOCK, BLOCK - 64])
    return tree


@pytest.fixture(scope="module")
def everything() -> TreeBuilder:
    return one_of_everything()


@pytest.fixture(scope="module")
def clip(everything: TreeBuilder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("erofs") / "x.clip", everything.finish())


@pytest.fixture(scope="module")
def data(everything: TreeBuilder, clip: Path) -> Path:
    path = clip.with_name("data")
    everything.write_data(path)
    return path


def test_what_goes_in_comes_out(everything: TreeBuilder, clip: Path) -> None:
    with Index.open(clip) as index:
        index.check()
        assert seen_in_index(index) == seen_in_tree(everything.root)


def test_contents_are_where_the_index_says(everything: TreeBuilder, clip: Path) -> None:
    layer = everything.finish().layer
    with Index.open(clip) as index:
        for inode, content, _ in everything.contents:
            node = index.inode(inode.nid)
            found = bytearray(node.size)
            for address, number, offset, length in index.extents(node.address, node.size):
                assert number == 0
                start = address - node.address
                found[start : start + length] = layer[offset : offset + length]
            assert bytes(found) == content


def test_the_kernel_sees_the_same_tree(everything: TreeBuilder, clip: Path, data: Path, tmp_path: Path) -> None:
    with kernel_mount(clip, data, tmp_path / "mnt") as top:
        assert seen_on_disk(top) == seen_in_tree(everything.root)


def test_the_kernel_reads_the_same_contents(everything: TreeBuilder, clip: Path, data: Path, tmp_path: Path) -> None:
    contents = {id(inode): content for inode, content, _ in everything.contents}
    checked = 0
    with kernel_mount(clip, data, tmp_path / "mnt") as top:
        pending = [(b"", everything.root)]
        while pending:
            path, inode = pending.pop()
            if stat.S_ISREG(inode.mode) and inode.size:
                assert (top / os.fsdecode(path)).read_bytes() == contents[id(inode)]
                checked += 1
            pending += [(os.path.join(path, name), child) for name, child in (inode.children or {}).items()]
    assert checked > 10


def test_the_kernel_finds_every_name_and_no_other(
    everything: TreeBuilder, clip: Path, data: Path, tmp_path: Path
) -> None:
    """Lookups are a binary search in the kernel; listing does not try it."""
    with kernel_mount(clip, data, tmp_path / "mnt") as top:
        for name in (b"many", b"before", b"exactly three blocks"):
            directory = (everything.root.children or {})[name]
            prefix = os.fsencode(top) + b"/" + name + b"/"
            assert all(os.path.lexists(prefix + each) for each in directory.children or {})
            assert not any(
                os.path.lexists(prefix + each + b"~") for each in directory.children or {} if len(each) < 255
            )


def test_every_name_is_found_and_no_other(everything: TreeBuilder, clip: Path) -> None:
    with Index.open(clip) as index:
        for path, node in index.walk():
            if not stat.S_ISDIR(node.mode):
                continue
            for name, nid in index.entries(node.nid):
                assert index.lookup(node.nid, name) == nid
                assert index.lookup(node.nid, name + b"\0") == 0
                assert index.lookup(node.nid, name[:-1] + b"\xff\xff") == 0
            assert index.lookup(node.nid, b"") == 0
            above = index.resolve(os.path.dirname(path))
            assert index.lookup(node.nid, b".") == node.nid
            assert index.lookup(node.nid, b"..") == index.parent(node.nid) == above


@pytest.mark.parametrize("tool", [["fsck.erofs"], ["dump.erofs", "-s", "-S"]])
def test_erofs_utils_accept_it(tool: list[str], clip: Path, data: Path) -> None:
    subprocess.run([*tool, f"--device={data}", clip], check=True, capture_output=True, timeout=60)


def test_dump_erofs_shows_the_attributes(everything: TreeBuilder, clip: Path, data: Path) -> None:
    nid = (everything.root.children or {})[b"linked"].nid
    command = ["dump.erofs", f"--device={data}", f"--nid={nid}", str(clip)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert "Uid: 2097153" in shown
    assert "Links: 3" in shown
    assert "Size: 10 " in shown
    assert "0644/rw-r--r--" in shown


def test_packing_is_deterministic() -> None:
    """Also when children were added in another order, and when a tree is packed again."""
    one, other = TreeBuilder(), TreeBuilder()
    names = [b"%d" % number for number in range(300)]
    xattrs = {b"user.b": b"2", b"user.a": b"1"}
    for tree, order, attributes in ((one, names, xattrs), (other, names[::-1], dict(sorted(xattrs.items())))):
        for name in order:
            tree.directory(name, xattrs=attributes)
        tree.finish()
    first = pack(one.root, 0, bytes(16))
    assert pack(one.root, 0, bytes(16)) == first
    assert pack(other.root, 0, bytes(16)) == first


def test_nids_are_never_what_fuse_reserves(everything: TreeBuilder, clip: Path) -> None:
    with Index.open(clip) as index:
        assert min(node.nid for _, node in index.walk()) > 1


@pytest.mark.parametrize("rdev", [(1, 3), (0, 1), (8, 255), (8, 256), (259, 1_048_575), (4095, 0)])
def test_device_numbers_survive(rdev: tuple[int, int]) -> None:
    assert decode_rdev(encode_rdev(os.makedev(*rdev))) == os.makedev(*rdev)


def _with(inode: Inode, name: bytes = b"bad") -> Inode:
    return Inode(stat.S_IFDIR | 0o755, children={b"d": Inode(stat.S_IFDIR | 0o755, children={name: inode})}, nlink=3)


_FILE = stat.S_IFREG | 0o644


@pytest.mark.parametrize(
    ("inode", "reason"),
    [
        (Inode(_FILE, uid=2**32), "owner 4294967296:0"),
        (Inode(_FILE, gid=-1), "owner 0:-1"),
        (Inode(_FILE, mtime_ns=2**63 * 10**9), "modification time 9223372036854775808 s"),
        (Inode(_FILE, size=1, address=BLOCK), "not in the data space"),
        (Inode(_FILE, size=1, address=1), "not in the data space"),
        (Inode(_FILE, size=-1), "not in the data space"),
        (Inode(0o644), "mode 0o644"),
        (Inode(stat.S_IFCHR, rdev=os.makedev(4096, 0)), "device number 4096:0"),
        (Inode(stat.S_IFBLK, rdev=os.makedev(0, 2**20)), "device number 0:1048576"),
        (Inode(stat.S_IFCHR), "whiteout"),
        (Inode(stat.S_IFLNK, target=b""), "symlink"),
        (Inode(stat.S_IFLNK, target=b"t" * (MAX_PATH + 1)), "symlink"),
        (Inode(stat.S_IFLNK, target=b"a\0b"), "symlink"),
        (Inode(_FILE, xattrs={b"btrfs.compression": b""}), "btrfs.compression"),
        (Inode(_FILE, xattrs={b"user.": b""}), "user."),
        (Inode(_FILE, xattrs={b"system.posix_acl_access2": b""}), "posix_acl_access2"),
        (Inode(_FILE, xattrs={b"user.\0": b""}), "user."),
        (Inode(_FILE, xattrs={b"user." + b"n" * 251: b""}), "user."),
        (Inode(_FILE, xattrs={b"user.v": bytes(65_536)}), "65536 bytes"),
        (Inode(_FILE, xattrs={b"user.%d" % n: bytes(60_000) for n in range(5)}), "256 KiB"),
        (Inode(_FILE, xattrs={b"trusted.overlay.redirect": b"/"}), "trusted.overlay.redirect"),
        (Inode(_FILE, xattrs={b"user.overlay.opaque": b"y"}), "user.overlay.opaque"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(inode: Inode, reason: str) -> None:
    with pytest.raises(ImageError, match=r"can not") as caught:
        pack(_with(inode), BLOCK, bytes(16))
    assert reason in str(caught.value)
    assert caught.value.member == b"/d/bad"


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0", b"n" * 256])
def test_a_name_that_is_none_is_refused(name: bytes) -> None:
    with pytest.raises(ImageError, match="name"):
        pack(_with(Inode(_FILE), name), 0, bytes(16))


def test_a_directory_that_no_path_can_name_is_refused() -> None:
    tree = TreeBuilder()
    longest = b"/".join([b"d" * 255] * 16)
    assert len(longest) == MAX_PATH
    tree.directory(longest)
    pack(tree.finish().root, 0, bytes(16))
    tree.directory(b"e" + longest.removesuffix(b"d") + b"/e")
    with pytest.raises(ImageError, match="longer than Linux allows"):
        pack(tree.finish().root, 0, bytes(16))


def test_a_deep_tree_needs_no_deep_stack() -> None:
    tree = TreeBuilder()
    tree.directory(b"/".join([b"d"] * 2_000))
    assert pack(tree.finish().root, 0, bytes(16))


def test_more_than_the_address_space_holds_is_refused() -> None:
    with pytest.raises(ImageError, match="16 TiB"):
        pack(TreeBuilder().root, (2**32 - 1) * BLOCK, bytes(16))
