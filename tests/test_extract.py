"""Unpacking an image: the same tree as its judge's, inside the target and nowhere else, and what users get."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import clipfs
from clipfs.building import extractor
from clipfs.errors import ClipfsError, IntegrityError, SourceError, UsageError
from tests.conftest import require_programs, require_root
from tests.images import Compression
from tests.judges import CASES, COMPRESSIONS, expected, layers, write
from tests.oracle import Facts, Picture, differences, picture
from tests.tars import Tar

SECONDS = 60
NOBODY = 65534
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _able() -> None:
    require_root()
    require_programs("umoci", "tar")


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that all users can look into, which pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="clipfs-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def clip_of(directory: Path, *layers: Tar, compression: Compression = "gzip") -> Path:
    """The index of an image of these layers."""
    clip = directory / f"{compression}.clip"
    clipfs.build(write(layers, directory / "oci", compression), clip)
    return clip


# --- the same tree


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_judge_unpacks(name: str, tmp_path: Path) -> None:
    right = expected(name, tmp_path / "judged")
    done = clipfs.extract(clip_of(tmp_path, *layers(name)), tmp_path / "here")
    assert differences(picture(tmp_path / "here"), right) == []
    assert done.inodes == len({facts.names for facts in right.values()})
    assert done.skipped == ()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_however_it_is_compressed(compression: Compression, tmp_path: Path) -> None:
    right = expected("sizes", tmp_path / "judged")
    done = clipfs.extract(clip_of(tmp_path, *layers("sizes"), compression=compression), tmp_path / "here")
    assert differences(picture(tmp_path / "here"), right) == []
    assert done.bytes == sum(facts.size for facts in right.values())


def test_the_demo_image(demo_image: str, demo_unpacked: Path, tmp_path: Path) -> None:
    clipfs.build(demo_image, tmp_path / "demo.clip")
    clipfs.extract(tmp_path / "demo.clip", tmp_path / "here")
    assert differences(picture(tmp_path / "here"), picture(demo_unpacked)) == []


def test_holes_take_no_space(tmp_path: Path) -> None:
    done = clipfs.extract(clip_of(tmp_path, *layers("pax sparse files")), tmp_path / "here")
    for version in ("0.0", "0.1", "1.0"):
        assert (tmp_path / "here" / f"v{version}-hole").stat().st_blocks == 0
        one = (tmp_path / "here" / f"v{version}-one").stat()
        assert (one.st_size, one.st_blocks) == (8192, 4096 // 512)
    assert done.bytes < 400_000


# --- inside the target and nowhere else


def test_symlinks_lead_nowhere_outside(tmp_path: Path) -> None:
    """Whatever the image has below a symlink is below its root, as it is for a process that has it for a root."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    before = picture(outside)
    tar = Tar().symlink("abs", str(outside)).symlink("up", "../outside").symlink("file", f"{outside}/kept")
    tar.file("abs/x", b"x").file("up/y", b"y").hardlink("linked", "file").symlink("abs-up", "abs/../../../outside")
    tar.file("abs-up/z", b"z").file("file", b"replaced").dir(".", mode=0o711)
    clipfs.extract(clip_of(tmp_path, tar), tmp_path / "here")
    assert picture(outside) == before
    here = tmp_path / "here"
    assert (here / str(outside).lstrip("/") / "x").read_bytes() == b"x"
    assert (here / "outside" / "y").read_bytes() == b"y"
    assert (here / "file").read_bytes() == b"replaced"
    assert os.readlink(here / "linked") == f"{outside}/kept"


@pytest.mark.parametrize("step", ["_make", "_fill", "_dress"])
def test_a_directory_that_somebody_replaces_meanwhile_is_not_followed(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives up, in a sentence, and what the new symlink leads to is as it was."""
    clip = clip_of(tmp_path, Tar().dir("d").dir("d/e").file("d/e/f", b"f", mode=0o4777, uid=5))
    outside, here = tmp_path / "outside", tmp_path / "here"
    (outside / "e").mkdir(parents=True)
    (outside / "e" / "f").write_bytes(b"theirs")
    os.utime(outside / "e", ns=(0, 0))
    before = picture(outside)
    real = getattr(extractor._Unpacking, step)

    def replacing(self: object, path: bytes, *rest: object) -> object:
        if path == b"d/e/f" and (here / "d").is_dir() and not (here / "d").is_symlink():
            (here / "d").rename(here / "moved")
            (here / "d").symlink_to(outside)
        return real(self, path, *rest)

    monkeypatch.setattr(extractor._Unpacking, step, replacing)
    with pytest.raises(ClipfsError, match=r"cannot (unpack|write) .*here"):
        clipfs.extract(clip, here)
    assert (here / "d").is_symlink()
    assert picture(outside) == before


# --- what cannot be done


def test_a_target_must_be_empty_or_new(tmp_path: Path) -> None:
    clip = clip_of(tmp_path, Tar().file("f", b"f"))
    full, plain = tmp_path / "full", tmp_path / "plain"
    full.mkdir()
    (full / "theirs").touch()
    plain.touch()
    for target, sentence in (
        (full, "is not empty; name an empty or a new directory"),
        (plain, "cannot unpack into .*plain: File exists"),
        (tmp_path / "no" / "where", "cannot unpack into .*where: No such file or directory"),
    ):
        with pytest.raises(UsageError, match=sentence):
            clipfs.extract(clip, target)
    assert os.listdir(full) == ["theirs"]
    clipfs.extract(clip, tmp_path / "new")
    (tmp_path / "empty").mkdir()
    clipfs.extract(clip, tmp_path / "empty")
    assert (tmp_path / "new" / "f").read_bytes() == (tmp_path / "empty" / "f").read_bytes() == b"f"


def test_wrong_or_missing_bytes_are_an_error(tmp_path: Path) -> None:
    clip = clip_of(tmp_path, Tar().file("f", b"f" * 100_000), compression="none")
    with clipfs.Index.open(clip) as index:
        blob = tmp_path / "oci" / "blobs" / "sha256" / index.layers[0].digest.hex
    data = bytearray(blob.read_bytes())
    data[50_000] ^= 1
    blob.write_bytes(data)
    with pytest.raises(IntegrityError):
        clipfs.extract(clip, tmp_path / "damaged")
    assert b"f" not in (tmp_path / "damaged" / "f").read_bytes()
    blob.unlink()
    with pytest.raises(SourceError):
        clipfs.extract(clip, tmp_path / "missing")


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    clip = clip_of(tmp_path, Tar().file("a", b"a").file("large", os.urandom(1 << 20)))
    target = tmp_path / "small"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", target], check=True, timeout=SECONDS)
    try:
        with pytest.raises(ClipfsError, match="No space left on device"):
            clipfs.extract(clip, target)
    finally:
        subprocess.run(["umount", target], check=True, timeout=SECONDS)


# --- without root

# As root it unpacks once for nothing: what is imported late may lie where only root can read it.
AS_NOBODY = """\
import os, sys, clipfs
clip, target, aside = sys.argv[1:]
clipfs.extract(clip, aside)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    done = clipfs.extract(clip, target)
except clipfs.ClipfsError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(done.inodes, *done.skipped, sep="\\n")
"""


def as_nobody(clip: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Unpack as a user who owns nothing: what was left out is in the output, a line each, after the count of inodes."""
    with tempfile.TemporaryDirectory(prefix="clipfs-test-") as aside:
        return subprocess.run(
            [sys.executable, "-c", AS_NOBODY, clip, target, aside],
            capture_output=True, text=True, check=False, timeout=SECONDS, cwd=REPOSITORY,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["kinds", "modes", "hardlinks", "xattrs", "names", "owners"])
def test_others_than_root_get_their_own_files(name: str, tmp_path: Path, public: Path) -> None:
    """Everything but owners, devices and what only root may say of a file; each thing left out is named."""
    clip = clip_of(public, *layers(name))
    home = public / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    done = as_nobody(clip, home / "here")
    assert done.stderr == ""
    count, *skipped = done.stdout.splitlines()
    right = expected(name, tmp_path / "judged")
    mine, left_out = as_mine(right)
    assert differences(picture(home / "here"), mine) == []
    assert int(count) == len({facts.names for facts in mine.values()})
    assert len(skipped) == left_out
    assert all(sentence.startswith(("device ", "xattr ")) for sentence in skipped)


def as_mine(right: Picture) -> tuple[Picture, int]:
    """The part of a picture that belongs to nobody if nobody makes it, and how many things it lacks."""
    mine: Picture = {}
    left_out = 0
    for path, facts in right.items():
        if facts.rdev != (0, 0):
            left_out += 1
            continue
        kept = {key: value for key, value in facts.xattrs.items() if key.startswith((b"user.", b"system."))}
        if path == facts.names[0]:
            left_out += len(facts.xattrs) - len(kept)
        mine[path] = Facts(*facts._replace(uid=NOBODY, gid=NOBODY, xattrs=kept))
    return mine, left_out


def test_in_a_directory_of_somebody_else(public: Path) -> None:
    done = as_nobody(clip_of(public, Tar().file("f", b"f")), public / "here")
    assert done.stderr == f"UsageError: cannot unpack into {public}/here: Permission denied\n"
    assert not (public / "here").exists()
