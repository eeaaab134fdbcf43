"""Users and groups, looked up in files that an image's author wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import clipfs
from assembler.users import Identity, look_up

PASSWD = """\
root:x:0:0:root:/root:/bin/sh

# no user
short:x:1
app:x:1000:1001:An App:/home/app:/bin/sh
homeless:x:1002:1002::
negative:x:-1:0::/:
word:x:ten:0::/:
huge:x:2147483648:0::/:
77:x:0:0:a number that would be root:/root:
99999999999:x:0:0:another one:/root:
four:x:2000:2001
+::::::
twin:x:1000:9:the same uid:/twin:
"""
GROUP = """\
root:x:0:
app:x:1001:
wheel:x:10:root,app
audio:x:29:app
audio-too:x:29:app
others:x:30:application
four:x:nan:app
short:x:55
88:x:0:
"""


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    directory = tmp_path / "root" / "etc"
    directory.mkdir(parents=True)
    (directory / "passwd").write_text(PASSWD)
    (directory / "group").write_text(GROUP)
    return directory


@pytest.fixture
def root(etc: Path) -> Iterator[int]:
    fd = os.open(etc.parent, os.O_PATH)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("wanted", "identity"),
    [
        ("", Identity(0, 0, (0, 10), "/root")),
        ("root", Identity(0, 0, (0, 10), "/root")),
        ("0", Identity(0, 0, (0, 10), "/root")),
        ("app", Identity(1000, 1001, (10, 29, 1001), "/home/app")),
        ("1000", Identity(1000, 1001, (10, 29, 1001), "/home/app")),
        ("app:wheel", Identity(1000, 10, (10,), "/home/app")),
        ("app:12345", Identity(1000, 12345, (12345,), "/home/app")),
        ("app:", Identity(1000, 1001, (10, 29, 1001), "/home/app")),
        (":wheel", Identity(0, 10, (10,), "/root")),
        ("4242", Identity(4242, 0, (0,), "/")),
        ("000000004242", Identity(4242, 0, (0,), "/")),
        ("0" * 5000 + "7:" + "0" * 5000 + "8", Identity(7, 8, (8,), "/")),
        ("4242:4343", Identity(4242, 4343, (4343,), "/")),
        ("2147483647", Identity(2147483647, 0, (0,), "/")),
        ("homeless", Identity(1002, 1002, (1002,), "/")),
        ("77", Identity(77, 0, (0,), "/")),
        ("app:88", Identity(1000, 88, (88,), "/home/app")),
        ("four", Identity(2000, 2001, (2001,), "/")),
        ("app:short", Identity(1000, 55, (55,), "/home/app")),
        ("twin", Identity(1000, 9, (9,), "/twin")),
    ],
)
def test_look_up(root: int, wanted: str, identity: Identity) -> None:
    assert look_up(root, wanted) == identity


@pytest.mark.parametrize("wanted", ["2147483648", "9" * 11, "9" * 5000, "0:2147483648", "0" * 9 + "9" * 11])
def test_numbers_that_no_runtime_takes(root: int, wanted: str) -> None:
    with pytest.raises(clipfs.UsageError, match=r"go up to 2147483647, and (2147483648|9{11}|9{20}) is more"):
        look_up(root, wanted)


@pytest.mark.parametrize("wanted", ["nobody", "negative", "word", "huge", "short", "-1", "٣"])
def test_unknown_users(root: int, wanted: str) -> None:
    with pytest.raises(clipfs.UsageError, match="the image has no user"):
        look_up(root, wanted)


@pytest.mark.parametrize("wanted", ["app:nobody", "app:four", "0:a:b"])
def test_unknown_groups(root: int, wanted: str) -> None:
    with pytest.raises(clipfs.UsageError, match="the image has no group"):
        look_up(root, wanted)


def test_an_image_without_the_files_knows_root_and_numbers(etc: Path, root: int) -> None:
    (etc / "passwd").unlink()
    (etc / "group").unlink()
    assert look_up(root, "") == look_up(root, "0:0") == Identity(0, 0, (0,), "/")
    with pytest.raises(clipfs.UsageError, match="no user 'root'"):
        look_up(root, "root")


def test_bytes_that_are_no_utf8_do_no_harm(etc: Path, root: int) -> None:
    (etc / "passwd").write_bytes(b"\xff\xfe:x:5:5::/:\nroot:x:0:0:\xff:/r\xff:/bin/sh\n\0\0\0")
    assert look_up(root, "root").home == os.fsdecode(b"/r\xff")


def test_links_stay_in_the_image(etc: Path, root: int) -> None:
    """The host's own files would know users that the image does not."""
    (etc / "passwd").unlink()
    (etc / "passwd").symlink_to("/../../../../etc/users")
    (etc / "users").write_text("inside:x:7:8::/in:/bin/sh\n")
    assert look_up(root, "inside") == Identity(7, 8, (8,), "/in")
    with pytest.raises(clipfs.UsageError, match="no user 'root'"):
        look_up(root, "root")


def test_what_is_no_regular_file_is_an_error_and_no_wait(etc: Path, root: int) -> None:
    (etc / "passwd").unlink()
    os.mkfifo(etc / "passwd")
    with pytest.raises(clipfs.ImageError, match="cannot read the image's /etc/passwd: not a regular file"):
        look_up(root, "root")


def test_a_huge_file_is_refused(etc: Path, root: int) -> None:
    os.truncate(etc / "group", 1 << 40)
    with pytest.raises(clipfs.ImageError, match="cannot read the image's /etc/group: larger than"):
        look_up(root, "app")


def test_a_circle_of_links_is_an_error(etc: Path, root: int) -> None:
    (etc / "passwd").unlink()
    (etc / "passwd").symlink_to("passwd")
    with pytest.raises(clipfs.ImageError, match=r"cannot read the image's /etc/passwd: .*symbolic links"):
        look_up(root, "root")
