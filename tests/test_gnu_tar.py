"""Archives of real archivers: what GNU tar writes, judged by what it extracts, and what Python's tarfile writes."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfs.erofs.structs import Inode
from clipfs.layers.layer import Member
from tests.conftest import require_programs, require_root
from tests.walks import content, members, paths, stored, tree_of, walked

Format = Literal["v7", "ustar", "oldgnu", "gnu", "posix"]

CAPABILITY = b"\1\0\0\2\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
# Not a second of these is whole, one lies before 1970, and a year has five digits.
TIMES = [1_700_000_000_123_456_789, -86_400_500_000_000, 999_999_999, 8_000_000_000_000_000_001]


def make(root: Path, name: bytes) -> Path:
    path = root / os.fsdecode(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def plain_tree(root: Path) -> None:
    """What every format can say, V7 included."""
    make(root, b"usr/bin/tool").write_bytes(b"\x7fELF" * 1000)
    make(root, b"usr/bin/empty").touch()
    make(root, b"usr/bin/block").write_bytes(b"b" * 512)
    for name, mode in ((b"usr/bin/suid", 0o4755), (b"usr/bin/sgid", 0o2711), (b"tmp/.keep", 0o400)):
        make(root, name).write_bytes(name)
        os.chown(root / os.fsdecode(name), 1000, 2000)
        (root / os.fsdecode(name)).chmod(mode)
    (root / "tmp").chmod(0o1777)
    make(root, b"link").symlink_to("usr/bin/../bin/tool")
    make(root, b"dangling").symlink_to("/no/where")
    make(root, b"zz/hard").hardlink_to(root / "usr/bin/tool")
    make(root, b"empty-dir/x").parent.chmod(0o700)
    make(root, b"spaces and\nnewlines").write_bytes(b"1")
    make(root, b"\xff\xfe not utf-8 \x80").write_bytes(b"2")
    make(root, "ünï".encode()).write_bytes(b"3")


def rich_tree(root: Path, *, times: list[int]) -> None:
    """What takes PAX or GNU headers besides."""
    plain_tree(root)
    long = b"/".join([b"d" * 120] * 4)
    make(root, long + b"/" + b"f" * 255).write_bytes(b"long")
    make(root, b"long-link").symlink_to(os.fsdecode(long) * 4)
    make(root, b"long-hard/" + b"h" * 200).hardlink_to(root / os.fsdecode(long + b"/" + b"f" * 255))
    os.mknod(make(root, b"dev/null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(make(root, b"dev/disk"), stat.S_IFBLK | 0o660, os.makedev(259, 300))
    os.mkfifo(make(root, b"dev/pipe"), 0o622)
    make(root, b"owned").write_bytes(b"4")
    os.chown(root / "owned", (1 << 21) + 5, 4_000_000_000)
    for number, time in enumerate(times):
        make(root, b"times/%d" % number).write_bytes(b"5")
        os.utime(root / f"times/{number}", ns=(time, time))
    with make(root, b"holes").open("wb") as file:
        for at in range(0, 60 << 16, 1 << 16):
            file.seek(at)
            file.write(b"data")
        file.truncate(61 << 16)


def archived(root: Path, form: Format) -> bytes:
    command = ["tar", "-C", str(root), f"--format={form}", "--numeric-owner", "-cf", "-"]
    if form == "posix":
        command += ["--xattrs", "--xattrs-include=*"]
    if form not in ("v7", "ustar"):
        command += ["--sparse"]
    return subprocess.run([*command, "."], stdout=subprocess.PIPE, check=True, timeout=20).stdout


def extracted(layer: bytes, target: Path) -> dict[bytes, Path]:
    target.mkdir()
    options = ["--numeric-owner", "--same-owner", "--xattrs", "--xattrs-include=*"]
    subprocess.run(["tar", "-C", str(target), *options, "-xpf", "-"], input=layer, check=True, timeout=20)
    return {os.fsencode(path.relative_to(target)): path for path in target.rglob("*")}


def described(path: Path) -> dict[str, Any]:
    about = path.lstat()
    kind = stat.S_IFMT(about.st_mode)
    return {
        "mode": oct(about.st_mode),
        "owner": (about.st_uid, about.st_gid),
        "mtime": about.st_mtime_ns,
        "size": about.st_size if kind == stat.S_IFREG else 0,
        "rdev": about.st_rdev,
        "target": os.fsencode(path.readlink()) if kind == stat.S_IFLNK else b"",
        "nlink": about.st_nlink if kind != stat.S_IFDIR else None,
        "xattrs": {
            os.fsencode(name): os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
        },
        "data": path.read_bytes() if kind == stat.S_IFREG else b"",
    }


def parsed(inode: Inode, layer: bytes) -> dict[str, Any]:
    return {
        "mode": oct(inode.mode),
        "owner": (inode.uid, inode.gid),
        "mtime": inode.mtime_ns,
        "size": inode.size,
        "rdev": inode.rdev,
        "target": inode.target,
        "nlink": inode.nlink if inode.children is None else None,
        "xattrs": inode.xattrs,
        "data": stored(inode, layer),
    }


@pytest.mark.parametrize("form", ["v7", "ustar", "oldgnu", "gnu", "posix"])
def test_a_tree_is_what_gnu_tar_extracts_from_its_archive(form: Format, tmp_path: Path) -> None:
    require_root()
    require_programs("tar")
    root = tmp_path / "root"
    if form in ("v7", "ustar"):
        plain_tree(root)
    else:
        # Whole seconds are all that GNU's formats can say.
        rich_tree(root, times=TIMES if form == "posix" else [time // 10**9 * 10**9 for time in TIMES])
    if form == "posix":
        os.setxattr(root / "usr/bin/empty", "security.capability", CAPABILITY)
        os.setxattr(root / "usr/bin", "user.nul", b"\0=\n\0")
        os.setxattr(root / "usr/bin", "user.empty", b"")
        os.setxattr(root / "link", "trusted.on-a-link", b"1", follow_symlinks=False)
    layer = archived(root, form)
    there = extracted(layer, tmp_path / "extracted")
    tree = tree_of(layer)
    assert tree.warnings == []
    found = paths(tree)
    assert found.keys() == there.keys()
    for path, inode in found.items():
        assert parsed(inode, layer) == described(there[path]), path
    # Names of one file are one inode, and of different files are not.
    numbers = {path: there[path].lstat().st_ino for path in there}
    assert len({(numbers[path], id(inode)) for path, inode in found.items()}) == len(set(numbers.values()))
    assert len({id(inode) for inode in found.values()}) == len(set(numbers.values()))


_PART = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=60).filter(
    lambda part: part not in (".", "..") and not part.startswith(".wh.") and len(part.encode()) <= 255
)
_NAME = st.lists(_PART, min_size=1, max_size=6).map("/".join)
_KIND = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])


@st.composite
def infos(draw: st.DrawFn) -> tarfile.TarInfo:
    info = tarfile.TarInfo(draw(_NAME))
    info.type = draw(_KIND)
    info.mode = draw(st.integers(0, 0o7777))
    info.uid, info.gid = draw(st.integers(0, (1 << 32) - 2)), draw(st.integers(0, (1 << 21) - 1))
    info.mtime = draw(st.integers(0, (1 << 33) - 1))
    info.size = draw(st.integers(0, 1500)) if info.type == tarfile.REGTYPE else 0
    info.linkname = draw(_NAME) if info.type == tarfile.SYMTYPE else ""
    info.devmajor, info.devminor = draw(st.integers(1, 4095)), draw(st.integers(0, (1 << 20) - 1))
    return info


@settings(max_examples=80, deadline=None)
@given(
    st.lists(infos(), max_size=8),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.integers(1, 3000),
)
def test_members_are_those_that_tarfile_wrote(wanted: list[tarfile.TarInfo], form: int, step: int) -> None:
    out = io.BytesIO()
    written = []
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8") as archive:
        for number, info in enumerate(wanted):
            try:
                archive.addfile(info, io.BytesIO(bytes([number]) * info.size))
            except ValueError:
                assert form == tarfile.USTAR_FORMAT  # which cannot say everything
            else:
                written.append((number, info))
    layer = out.getvalue()
    found = walked(layer, step=step)
    assert len(found) == len(written)
    for member, (number, info) in zip(found, written, strict=True):
        assert isinstance(member, Member)
        assert os.fsdecode(member.path) == info.name
        assert (member.mode & 0o7777, member.uid, member.gid) == (info.mode, info.uid, info.gid)
        assert (member.mtime_ns, member.size) == (info.mtime * 10**9, info.size)
        assert os.fsdecode(member.link) == info.linkname
        assert content(member, layer) == bytes([number]) * info.size
        if info.type == tarfile.CHRTYPE:
            assert member.rdev == os.makedev(info.devmajor, info.devminor)


def test_tarfile_says_times_xattrs_and_global_headers_as_we_read_them() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", pax_headers={"comment": "x", "uid": "77"}) as archive:
        info = tarfile.TarInfo("f")
        info.mtime = -1.25
        info.pax_headers = {"SCHILY.xattr.user.a": "\0b", "LIBARCHIVE.xattr.user.c": "ZA"}
        archive.addfile(info)
    member = members(out.getvalue())[b"f"]
    assert (member.uid, member.mtime_ns) == (77, -1_250_000_000)
    assert member.xattrs == {b"user.a": b"\0b", b"user.c": b"d"}
