"""One member at a time: what headers of all formats mean, and which are refused."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

import pytest

from clipfs.erofs.structs import MAX_NAME, MAX_PATH
from clipfs.layers.layer import Entry, Opaque, Whiteout
from clipfs.layers.members import MAX_ID, MAX_SIZE, MAX_TIME
from tests.tars import END, GNU, USTAR, V7, Tar, gnu_long, header, padded, pax
from tests.walks import members, only, refused, walked

NUMBERS = {"mode": slice(100, 108), "uid": slice(108, 116), "gid": slice(116, 124), "size": slice(124, 136)}
NUMBERS |= {"mtime": slice(136, 148), "kind": slice(156, 157), "magic": slice(257, 265)}
NUMBERS |= {"major": slice(329, 337), "minor": slice(337, 345), "prefix": slice(345, 500), "tail": slice(500, 512)}


def patched(block: bytes, *, signed: bool = False, **fields: bytes) -> bytes:
    """A header with raw bytes in some fields, and the checksum right for them."""
    raw = bytearray(block)
    for field, value in fields.items():
        where = NUMBERS[field]
        raw[where] = value.ljust(where.stop - where.start, b"\0")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % (sum(raw) - (256 * sum(byte > 127 for byte in raw) if signed else 0))
    return bytes(raw)


class TestTypes:
    @pytest.mark.parametrize(
        ("typeflag", "mode"),
        [
            (b"0", stat.S_IFREG),
            (b"\0", stat.S_IFREG),
            (b"7", stat.S_IFREG),
            (b"2", stat.S_IFLNK),
            (b"3", stat.S_IFCHR),
            (b"4", stat.S_IFBLK),
            (b"5", stat.S_IFDIR),
            (b"6", stat.S_IFIFO),
        ],
    )
    @pytest.mark.parametrize("magic", [USTAR, GNU], ids=["ustar", "gnu"])
    def test_every_type_keeps_its_mode_and_owner(self, typeflag: bytes, mode: int, magic: bytes) -> None:
        member = only(header(b"a/b", typeflag=typeflag, mode=0o7751, uid=7, gid=8, mtime=9, link=b"t", magic=magic))
        assert (member.path, member.mode) == (b"a/b", mode | 0o7751)
        assert (member.uid, member.gid, member.mtime_ns, member.hardlink) == (7, 8, 9_000_000_000, False)
        assert member.link == (b"t" if typeflag == b"2" else b"")

    @pytest.mark.parametrize("typeflag", [b"\0", b"0", b"1", b"2"])
    def test_v7_archives_are_read(self, typeflag: bytes) -> None:
        member = only(header(b"f", typeflag=typeflag, mode=0o600, link=b"t", magic=V7))
        assert (member.path, member.hardlink) == (b"f", typeflag == b"1")

    def test_a_v7_directory_is_a_file_with_a_slash(self) -> None:
        assert only(header(b"d/", typeflag=b"\0", mode=0o755, magic=V7)).mode == stat.S_IFDIR | 0o755
        assert only(header(b"d/", typeflag=b"0", mode=0o755)).mode == stat.S_IFREG | 0o755

    @pytest.mark.parametrize("typeflag", [b"1", b"2", b"3", b"4", b"5", b"6"])
    def test_what_has_no_contents_has_no_size_whatever_its_header_says(self, typeflag: bytes) -> None:
        raw = header(b"a", typeflag=typeflag, size=10_000, link=b"t", rdev=(1, 2)) + header(b"b")
        first, second = walked(raw + END)
        assert (first.path, second.path) == (b"a", b"b")
        assert not isinstance(first, Whiteout | Opaque)
        assert (first.size, first.segments) == (0, ())

    @pytest.mark.parametrize(
        ("major", "minor"), [(1, 3), (0, 0), (0, 1), (8, 255), (8, 256), (4095, 1048575), (259, 70000)]
    )
    @pytest.mark.parametrize("typeflag", [b"3", b"4"])
    def test_device_numbers(self, typeflag: bytes, major: int, minor: int) -> None:
        assert only(header(b"d", typeflag=typeflag, rdev=(major, minor))).rdev == os.makedev(major, minor)

    def test_only_devices_have_device_numbers(self) -> None:
        assert only(header(b"f", rdev=(1, 2))).rdev == 0

    def test_hard_links_name_a_member_symlinks_anything(self) -> None:
        tar = Tar().hardlink("h", "./usr//bin/../x/").symlink("s", "./usr//bin/../x/").symlink("t", "../../../etc")
        found = members(tar)
        assert (found[b"h"].hardlink, found[b"h"].link) == (True, b"usr/x")
        assert (found[b"s"].hardlink, found[b"s"].link) == (False, b"./usr//bin/../x/")
        assert found[b"t"].link == b"../../../etc"


class TestNames:
    @pytest.mark.parametrize(
        ("name", "path"),
        [
            (b"a", b"a"),
            (b"./a", b"a"),
            (b"/a", b"a"),
            (b"///a//b", b"a/b"),
            (b"././a/./b/.", b"a/b"),
            (b"a/../b", b"b"),
            (b"/a/b/../../c", b"c"),
            (b".a/..b/...", b".a/..b/..."),
            (b".", b""),
            (b"./", b""),
            (b"/", b""),
            (b"a/..", b""),
            (b"\xff\xfe/\x80", b"\xff\xfe/\x80"),
            (b"a\nb\\c d", b"a\nb\\c d"),
            ("ü/é".encode(), "ü/é".encode()),
        ],
    )
    @pytest.mark.parametrize("how", ["header", "pax", "gnu"])
    def test_are_paths_below_the_root(self, name: bytes, path: bytes, how: str) -> None:
        before = {"header": b"", "pax": pax({"path": name}), "gnu": gnu_long(name)}[how]
        typeflag = b"0" if path else b"5"
        assert only(before + header(name if how == "header" else b"x", typeflag=typeflag)).path == path

    @pytest.mark.parametrize("length", [100, 101, 155, 255, 256, 1000, MAX_PATH])
    def test_may_be_as_long_as_linux_allows(self, length: int) -> None:
        name = (b"d" * 99 + b"/") * 50
        name = name[: length - 1] + b"f"
        for before in (pax({"path": name, "linkpath": name}), gnu_long(name) + gnu_long(name, typeflag=b"K")):
            assert only(before + header(b"x", typeflag=b"1")).link == name
            member = only(before + header(b"x", typeflag=b"2"))
            assert (member.path, member.link) == (name, name)
        assert members(Tar().file(b"n" * MAX_NAME)).keys() == {b"n" * MAX_NAME}

    def test_a_prefix_goes_in_front(self) -> None:
        block = header(b"n" * 100, tail=b"p" * 155)
        assert only(block).path == b"p" * 155 + b"/" + b"n" * 100
        # GNU has times at that place, star has them behind 131 bytes of prefix.
        times = b"%011o\0%011o\0" % (1, 2)
        assert only(header(b"n", magic=GNU, tail=times)).path == b"n"
        assert only(header(b"n", magic=GNU, tail=b"prefix")).path == b"prefix/n"
        assert only(header(b"n", tail=b"p".ljust(131, b"\0") + times + b"tar\0")).path == b"p/n"
        assert only(header(b"n", magic=V7, tail=b"prefix")).path == b"n"

    def test_pax_goes_before_the_header_and_gnus_before_that(self) -> None:
        assert only(pax({"path": "pax"}) + header(b"plain")).path == b"pax"
        assert only(pax({"path": "pax"}) + gnu_long(b"gnu") + header(b"plain")).path == b"gnu"
        assert only(gnu_long(b"gnu") + pax({"path": "pax"}) + header(b"plain")).path == b"gnu"
        assert only(gnu_long(b"") + pax({"path": "pax"}) + header(b"plain")).path == b"pax"
        assert only(pax({"path": "", "uid": ""}) + header(b"plain", uid=5)).uid == 5


class TestNumbers:
    @pytest.mark.parametrize("number", [0, (1 << 21) - 1, 1 << 21, 1 << 31, MAX_ID])
    def test_owners_of_any_size(self, number: int) -> None:
        said = pax({"uid": str(number), "gid": str(number)}) + header(b"f", uid=1, gid=1)
        for raw in (header(b"f", uid=number, gid=number), header(b"f", uid=number, gid=number, base256=True), said):
            member = only(raw)
            assert (member.uid, member.gid) == (number, number)

    @pytest.mark.parametrize(
        ("said", "nanoseconds"),
        [
            ("1700000000.123456789", 1_700_000_000_123_456_789),
            ("-1.5", -1_500_000_000),
            ("0.000000001", 1),
            (str(MAX_TIME // 10**9), MAX_TIME // 10**9 * 10**9),
        ],
    )
    def test_times_between_seconds_and_before_1970(self, said: str, nanoseconds: int) -> None:
        assert only(pax({"mtime": said}) + header(b"f", mtime=5)).mtime_ns == nanoseconds

    @pytest.mark.parametrize("seconds", [0, 1, -1, -(1 << 31), 1 << 33, -(1 << 33)])
    def test_times_in_headers(self, seconds: int) -> None:
        assert only(header(b"f", mtime=seconds)).mtime_ns == seconds * 10**9

    def test_times_that_nobody_can_have_meant_are_the_epoch(self) -> None:
        """A wrong clock is no reason to have no image. Go's zero time is the year 1."""
        assert only(pax({"mtime": "9223372037"}) + header(b"f")).mtime_ns == 0
        for seconds in (-62_135_596_800, -(1 << 60), 1 << 60):
            assert only(header(b"f", mtime=seconds)).mtime_ns == 0

    def test_sizes_in_base_256_and_pax(self) -> None:
        data = b"x" * 1000
        for raw in (header(b"f", size=1000, base256=True), pax({"size": "1000"}) + header(b"f", size=7)):
            first, second = walked(raw + padded(data) + header(b"g") + END)
            assert not isinstance(first, Whiteout | Opaque)
            assert (first.size, first.segments) == (1000, ((0, len(raw), 1000),))
            assert second.path == b"g"

    def test_a_checksum_of_signed_bytes_is_one(self) -> None:
        block = header(b"\xff\xfe")
        assert only(patched(block, signed=True)).path == b"\xff\xfe"

    def test_numbers_with_spaces_in_front(self) -> None:
        block = patched(header(b"f"), mode=b"   644 \0", uid=b"     7 \0", size=b"          0 ", mtime=b" 11")
        member = only(block)
        assert (member.mode & 0o7777, member.uid, member.mtime_ns) == (0o644, 7, 9 * 10**9)


class TestReservedNames:
    @pytest.mark.parametrize(
        ("name", "entry"),
        [
            (b".wh.a", Whiteout(b"a", 0)),
            (b"./d/.wh.a", Whiteout(b"d/a", 0)),
            (b"d/.wh..a", Whiteout(b"d/.a", 0)),
            (b"d/.wh.\xff", Whiteout(b"d/\xff", 0)),
            (b".wh..wh..opq", Opaque(b"", 0)),
            (b"d/e/.wh..wh..opq", Opaque(b"d/e", 0)),
            (b".wh..wh.plnk", None),
            (b"./.wh..wh.plnk/12.34", None),
            (b".wh..wh.aufs", None),
            (b"d/.wh..wh.orph/x", None),
        ],
    )
    @pytest.mark.parametrize("typeflag", [b"0", b"3", b"5"])
    def test_stand_for_what_a_layer_deletes(self, name: bytes, entry: Entry | None, typeflag: bytes) -> None:
        assert walked(header(name, typeflag=typeflag) + END) == ([entry] if entry else [])

    def test_are_nothing_but_the_whole_of_a_name(self) -> None:
        assert members(Tar().file("a.wh.b").file("d/x.wh..wh..opq").file(".whx")).keys() == {
            b"a.wh.b",
            b"d/x.wh..wh..opq",
            b".whx",
        }


LONG = MAX_PATH + 1
MANY_XATTRS = pax({f"SCHILY.xattr.user.{number}": "" for number in range(8000)})
REFUSED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "up and out": ("leads out of the root", lambda: header(b"a/../../b")),
    "up at once": ("leads out of the root", lambda: header(b"../b")),
    "up from the root": ("leads out of the root", lambda: header(b"/../b")),
    "up and out in PAX": ("leads out of the root", lambda: pax({"path": "a/../../b"}) + header(b"x")),
    "up and out in GNU": ("leads out of the root", lambda: gnu_long(b"a/../../b") + header(b"x")),
    "hard link out": ("leads out of the root", lambda: header(b"a", typeflag=b"1", link=b"../x")),
    "no name": ("has no name", lambda: header(b"")),
    "no name but slashes": ("has no name", lambda: header(b"//")),
    "root is a symlink": ("has no name", lambda: header(b"./", typeflag=b"2", link=b"x")),
    "NUL in a name": ("there is a NUL", lambda: pax({"path": b"a\0b"}) + header(b"x")),
    "NUL in a hard link": ("there is a NUL", lambda: pax({"linkpath": b"a\0b"}) + header(b"x", typeflag=b"1")),
    "NUL in a symlink": ("its target", lambda: pax({"linkpath": b"a\0b"}) + header(b"x", typeflag=b"2")),
    "symlink to nothing": ("its target", lambda: header(b"a", typeflag=b"2")),
    "long symlink": ("its target", lambda: gnu_long(b"t" * LONG, typeflag=b"K") + header(b"a", typeflag=b"2")),
    "long part": ("longer than Linux", lambda: gnu_long(b"n" * (MAX_NAME + 1)) + header(b"x")),
    "long name": ("longer than Linux", lambda: pax({"path": b"dd/" * (LONG // 3 + 1)}) + header(b"x")),
    "depth 100000": ("longer than Linux", lambda: gnu_long(b"d/" * 10**5) + header(b"x")),
    "long hard link": ("longer than Linux", lambda: pax({"linkpath": b"d/" * LONG}) + header(b"x", typeflag=b"1")),
    "whiteout of nothing": ("a whiteout of nothing", lambda: header(b"d/.wh.")),
    "whiteout of .": ("a whiteout of nothing", lambda: header(b"d/.wh..")),
    "whiteout of ..": ("a whiteout of nothing", lambda: header(b"d/.wh...")),
    "type": ("type 'Z'", lambda: header(b"a", typeflag=b"Z")),
    "volume label": ("type 'V'", lambda: header(b"a", typeflag=b"V", magic=GNU)),
    "type of a control character": ("type '\\x1b'", lambda: header(b"a", typeflag=b"\x1b")),
    "negative size": ("its size, -1,", lambda: header(b"a", size=-1)),
    "least size": ("its size, -", lambda: patched(header(b"a"), size=b"\xc0" + bytes(11))),
    "greatest size": ("its size, ", lambda: patched(header(b"a"), size=b"\xbf" + b"\xff" * 11)),
    "huge size": (f"its size, {MAX_SIZE + 1},", lambda: header(b"a", size=MAX_SIZE + 1)),
    "huge size in PAX": ("its size, ", lambda: pax({"size": "9" * 19}) + header(b"a")),
    "negative size in PAX": ("have a number", lambda: pax({"size": "-1"}) + header(b"a")),
    "size of many digits": ("have a number", lambda: pax({"size": "9" * 10**5}) + header(b"a")),
    "size of letters": ("have a number", lambda: header(b"a", size=b"12x")),
    "base-256 with 0x80 alone as sign": ("its size, ", lambda: patched(header(b"a"), size=b"\x80" + b"\xff" * 11)),
    "negative owner": ("its owner or group -1 ", lambda: header(b"a", uid=-1)),
    "owner -1 of 32 bits": ("its owner or group 4294967295 ", lambda: header(b"a", gid=MAX_ID + 1)),
    "owner beyond 32 bits": ("its owner or group", lambda: pax({"gid": "4294967296"}) + header(b"a")),
    "mode of letters": ("have a number", lambda: patched(header(b"a"), mode=b"rwxrwxrwx"[:8])),
    "time in words": ("should have a time", lambda: pax({"mtime": "yesterday"}) + header(b"a")),
    "device": ("device number 4096:0 ", lambda: header(b"a", typeflag=b"3", rdev=(4096, 0))),
    "minor device": ("device number 1:1048576 ", lambda: header(b"a", typeflag=b"4", rdev=(1, 1 << 20))),
    "negative device": ("device number -1:0 ", lambda: header(b"a", typeflag=b"4", rdev=(-1, 0))),
    "checksum": ("checksum is wrong", lambda: header(b"a", checksum=1)),
    "checksum of letters": ("have a number", lambda: header(b"a")[:148] + b"checksum" + header(b"a")[156:]),
    "one bit": ("checksum is wrong", lambda: b"b" + header(b"a")[1:]),
    "text": ("have a number", lambda: b"This is no archive. " * 30),
    "xattrs": ("more than a file can have", lambda: MANY_XATTRS + header(b"a")),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("step", [1 << 20, 100])
def test_refuses(name: str, step: int) -> None:
    sentence, make = REFUSED[name]
    before = header(b"fine", size=3) + padded(b"abc")
    raw = before + make()
    error = refused(lambda: walked(raw + END, step=step))
    assert sentence in str(error)
    assert error.member is not None
    # An extended header is where the member that it belongs to begins; which block of it is at fault, the name says.
    assert error.offset in range(len(before), len(raw), 512)
