"""Seeding, on plain directories: what is made, what is copied, and what no image can make it do."""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

import clipfs
from assembler.upper import REQUIRED, seed

LIBC = ctypes.CDLL(None)
OLD = 1_500_000_000_123_456_789


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    root = tmp_path / "lower"
    root.mkdir()
    return root


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    root = tmp_path / "upper"
    root.mkdir()
    return root


def tree(root: Path) -> dict[str, str]:
    """Every path below `root` with its mode."""
    found = {}
    for directory, directories, files in os.walk(root):
        for name in directories + files:
            path = Path(directory, name)
            found[str(path.relative_to(root))] = stat.filemode(path.lstat().st_mode)
    return found


STANDARD = {
    "dev": "drwxr-xr-x",
    "proc": "dr-xr-xr-x",
    "sys": "dr-xr-xr-x",
    "tmp": "drwxrwxrwt",
    "volumes": "drwxr-xr-x",
    "workspace": "drwxr-xr-x",
}


def test_an_empty_lower_gets_all_six(lower: Path, upper: Path) -> None:
    seed(lower, upper)
    assert tree(upper) == STANDARD
    assert set(STANDARD) == set(REQUIRED)


def test_the_umask_has_no_say(lower: Path, upper: Path) -> None:
    before = os.umask(0o077)
    try:
        seed(lower, upper, ["/srv/data"])
    finally:
        os.umask(before)
    assert tree(upper) == {**STANDARD, "srv": "drwxr-xr-x", "srv/data": "drwxr-xr-x"}


def test_what_the_lower_has_stays_as_it_is(lower: Path, upper: Path) -> None:
    tmp = lower / "tmp"
    tmp.mkdir()
    (tmp / "file").write_text("is not copied")
    os.chown(tmp, 1234, 5678)
    tmp.chmod(0o2751)
    os.setxattr(tmp, "user.note", b"kept")
    os.utime(tmp, ns=(OLD, OLD + 1))
    lower.chmod(0o711)
    os.utime(lower, ns=(OLD + 2, OLD + 3))

    seed(lower, upper)

    info, root = (upper / "tmp").stat(), upper.stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (1234, 5678, 0o2751)
    assert info.st_mtime_ns == OLD + 1
    assert os.getxattr(upper / "tmp", "user.note") == b"kept"
    assert (stat.S_IMODE(root.st_mode), root.st_mtime_ns) == (0o711, OLD + 3)
    assert tree(upper) == STANDARD | {"tmp": "drwxr-s--x"}


def test_directories_on_the_way_are_copied_too(lower: Path, upper: Path) -> None:
    (lower / "srv").mkdir()
    (lower / "srv").chmod(0o750)
    os.utime(lower / "srv", ns=(OLD, OLD))
    seed(lower, upper, ["/srv/a/b"])
    assert tree(upper) == STANDARD | {"srv": "drwxr-x---", "srv/a": "drwxr-xr-x", "srv/a/b": "drwxr-xr-x"}
    assert (upper / "srv").stat().st_mtime_ns == OLD


def test_overlay_marks_of_the_image_are_not_copied(lower: Path, upper: Path) -> None:
    (lower / "tmp").mkdir()
    os.setxattr(lower / "tmp", "trusted.overlay.redirect", b"/etc")
    os.setxattr(lower / "tmp", "user.overlay.opaque", b"y")
    os.setxattr(lower / "tmp", "trusted.other", b"1")
    seed(lower, upper)
    assert [each for each in os.listxattr(upper / "tmp") if not each.startswith("security.")] == ["trusted.other"]


@pytest.mark.parametrize(
    ("target", "seeded"),
    [
        ("/var/tmp", "var/tmp"),
        ("var/tmp", "var/tmp"),
        ("private/tmp", "private/tmp"),
        ("/private/tmp/", "private/tmp"),
        ("../../../../outside", "outside"),
        ("/../../outside", "outside"),
        ("./nowhere/../var/./tmp", "var/tmp"),
        ("/link/deeper", "var/tmp/deeper"),
        ("hop", "var/tmp"),
        ("..", ""),
    ],
)
def test_a_link_stays_and_its_target_is_seeded(lower: Path, upper: Path, target: str, seeded: str) -> None:
    (lower / "var" / "tmp").mkdir(parents=True)
    (lower / "link").symlink_to("/var/tmp")
    (lower / "hop").symlink_to("../link")
    (lower / "tmp").symlink_to(target)
    outside = tree(upper.parent)

    seed(lower, upper)

    assert not os.path.lexists(upper / "tmp")
    assert (upper / seeded).is_dir()
    # A target that is made, is made as what it stands for.
    if not (lower / seeded).is_dir():
        assert stat.S_IMODE((upper / seeded).stat().st_mode) == 0o1777
    inside = {f"upper/{path}" for path in tree(upper)}
    assert {path for path in tree(upper.parent) if path not in inside} == set(outside)


@pytest.mark.parametrize("name", ["proc", "sys", "dev"])
@pytest.mark.parametrize("target", ["/var", "nowhere", "/.."])
def test_no_link_where_a_runtime_makes_things(lower: Path, upper: Path, name: str, target: str) -> None:
    (lower / "var").mkdir()
    (lower / name).symlink_to(target)
    with pytest.raises(clipfs.ImageError, match=f"needs a directory /{name}, but the image has a symbolic link there"):
        seed(lower, upper)


def test_a_circle_of_links_is_an_error(lower: Path, upper: Path) -> None:
    (lower / "tmp").symlink_to("other")
    (lower / "other").symlink_to("tmp")
    with pytest.raises(clipfs.MountError, match=r"directory tmp .*symbolic links"):
        seed(lower, upper)


def make_file(path: Path) -> None:
    path.write_text("")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (make_file, "a regular file"),
        (os.mkfifo, "a named pipe"),
        (make_socket, "a socket"),
        (lambda path: os.mknod(path, stat.S_IFCHR, os.makedev(1, 3)), "a character device"),
    ],
)
@pytest.mark.parametrize("name", ["workspace", "tmp"])
def test_something_else_in_the_place_is_an_error(lower: Path, upper: Path, name: str, make: object, kind: str) -> None:
    make(lower / name)  # type: ignore[operator]
    with pytest.raises(clipfs.ImageError, match=f"needs a directory /{name}, but the image has {kind} there"):
        seed(lower, upper)


def test_a_link_to_a_file_and_a_file_on_the_way_are_errors(lower: Path, upper: Path) -> None:
    (lower / "file").write_text("")
    (lower / "tmp").symlink_to("file")
    with pytest.raises(clipfs.ImageError, match="needs a directory /file"):
        seed(lower, upper)
    (lower / "tmp").unlink()
    with pytest.raises(clipfs.ImageError, match=r"needs a directory /file/below, but /file is not a directory"):
        seed(lower, upper, ["/file/below"])


def test_a_path_that_is_too_long_is_an_error(lower: Path, upper: Path) -> None:
    longest = ("/" + "n" * 254) * 16 + "/" + "n" * 14
    seed(lower, upper, [longest])
    with pytest.raises(clipfs.ImageError, match=r"needs a directory /n+…, but no path on Linux is longer than 4095"):
        seed(lower, upper, [f"{longest}n"])


def test_it_can_be_ended_at_every_directory(lower: Path, upper: Path) -> None:
    (lower / "a" / "b").mkdir(parents=True)
    steps: list[set[str]] = []
    seed(lower, upper, ["/a/b/c/d"], lambda: steps.append(set(tree(upper))))
    assert all(len(after - before) <= 1 for before, after in itertools.pairwise(steps))
    assert {"a", "a/b", "a/b/c", "a/b/c/d", *STANDARD} == steps[-1]


def test_names_are_bytes(lower: Path, upper: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \\ , : \n")
    seed(lower, upper, [f"/{name}/x"])
    assert (upper / name / "x").is_dir()


def test_a_component_swapped_for_a_link_leads_nowhere(
    lower: Path, upper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image's owner replaces a directory by a link to the host's, between our look and our step."""
    (lower / "srv" / "data").mkdir(parents=True)
    outside = tmp_path / "outside"
    (outside / "data").mkdir(parents=True)
    real = os.stat

    def swapping(path: Any, **keywords: Any) -> os.stat_result:
        info = real(path, **keywords)
        if path == b"srv":
            (lower / "srv").rename(lower / "was")
            (lower / "srv").symlink_to(outside)
        return info

    monkeypatch.setattr(os, "stat", swapping)
    with pytest.raises((clipfs.ClipfsError, OSError)):
        seed(lower, upper, ["/srv/data/new"])
    assert tree(outside) == {"data": "drwxr-xr-x"}


def test_swaps_while_it_seeds(lower: Path, tmp_path: Path) -> None:
    """A thread of the image's owner swaps each directory on the way for a link to the host's, again and again.

    Whatever a seeding comes to, nothing of the host is made, changed, or copied.
    """
    outside = tmp_path / "outside"
    (outside / "data").mkdir(parents=True)
    outside.chmod(0o2741)
    os.setxattr(outside, "user.secret", b"of the host")
    for place in (lower / "srv", lower / "tmp", lower / "srv" / "data"):
        place.mkdir()
        place.with_name(f"{place.name}.link").symlink_to(outside)
    before, stop, swaps = (tree(outside), outside.stat().st_mtime_ns), threading.Event(), 0

    def swap() -> None:
        nonlocal swaps
        while not stop.is_set():
            for name in (b"srv/data", b"srv", b"tmp"):
                # Both exist all the time; only what they are changes (RENAME_EXCHANGE).
                place = os.fsencode(lower) + b"/" + name
                LIBC.renameat2(-100, place, -100, place + b".link", 2)
            swaps += 1

    thread, outcomes = threading.Thread(target=swap), set[str]()
    thread.start()
    try:
        for number in range(150):
            upper = tmp_path / f"upper-{number}"
            upper.mkdir()
            try:
                seed(lower, upper, ["/srv/data/new", "/tmp/new"])
                outcomes.add("seeded")
            except (clipfs.ClipfsError, OSError):
                outcomes.add("refused")
            for path in [upper, *upper.rglob("*")]:
                assert not path.is_symlink()
                assert "user.secret" not in os.listxattr(path)
    finally:
        stop.set()
        thread.join()
    assert swaps > 100
    assert outcomes == {"seeded", "refused"}
    assert (tree(outside), outside.stat().st_mtime_ns) == before
