"""The copies that mounts are made of: checked before the kernel sees them, and once, whatever happens to the clip."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import clipfs
from clipfs import MountOptions, state
from clipfs.errors import FormatError
from clipfs.format.index import Index
from clipfs.mounting import checked as module
from clipfs.mounting import kernel
from clipfs.mounting.checked import checked
from tests.clips import TreeBuilder, write_clip
from tests.conftest import require_root

pytest_plugins = ("tests.mount_fixtures",)
pytestmark = pytest.mark.usefixtures("runtime")


@pytest.fixture
def here(clip: Path, tmp_path: Path) -> Path:
    """A clip of one's own."""
    path = tmp_path / "x.clip"
    shutil.copy(clip, path)
    return path


def copies() -> list[Path]:
    return [path for path in (state.cache_dir() / "checked").rglob("*") if path.is_file()]


def changed(clip: Path) -> None:
    """Another byte somewhere in the tree."""
    data = bytearray(clip.read_bytes())
    data[5000] ^= 1
    clip.write_bytes(data)


def test_it_is_checked_before_the_kernel_sees_it_and_once(
    here: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its header has the digests of is what is mounted, whatever became of the rest of the file since."""
    require_root()
    events, check, detached = tmp_path / "events", Index.check, kernel.detached

    def note(what: str) -> None:
        with events.open("a") as file:
            file.write(what)

    def noted_check(index: Index, *, data: bool = True) -> bool:
        found = check(index, data=data)
        note("c")
        return found

    def noted_mount(fstype: str, options: dict[str, str | None], attributes: int) -> int:
        if fstype == "erofs":
            note("k")
            assert os.path.samefile(str(options["source"]), copies()[-1])
        return detached(fstype, options, attributes)

    monkeypatch.setattr(Index, "check", noted_check)
    monkeypatch.setattr(kernel, "detached", noted_mount)
    for _ in range(3):
        with clipfs.mount(here, mountpoint, MountOptions(view="kernel")):
            assert (mountpoint / "hello").read_text() == "hello\n"
        changed(here)
    assert events.read_text() == "ckkk"
    with pytest.raises(FormatError, match="does not have its checksum"), Index.open(here) as index:
        check(index)


@pytest.mark.parametrize("change", [changed, lambda clip: os.truncate(clip, 3000), lambda clip: clip.write_bytes(b"")])
def test_a_clip_that_changes_while_it_is_copied(here: Path, change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    sendfile = os.sendfile

    def meddled(target: int, source: int, at: int, count: int) -> int:
        sent = sendfile(target, source, at, min(count, 2048))
        if at == 0:
            change(here)  # type: ignore[operator]
        return sent

    monkeypatch.setattr(os, "sendfile", meddled)
    with pytest.raises(FormatError), checked(here):
        pass
    assert copies() == []


def test_what_was_copied_does_not_change_with_the_clip(here: Path) -> None:
    right = here.read_bytes()
    with checked(here) as (descriptor, path, _):
        changed(here)
        os.truncate(here, 100)
        assert Path(path).read_bytes() == right
        assert os.pread(descriptor, len(right), 0) == right
        assert os.stat(path).st_mode & 0o077 == 0


def test_copies_of_another_boot_are_not_believed(here: Path) -> None:
    with checked(here) as (_, path, _):
        name = Path(path).name
    other = state.cache_dir() / "checked" / "another-boot"
    shutil.move(Path(path).parent, other)
    (other / name).write_bytes(b"what a disk made of it")
    with checked(here) as (descriptor, path, _):
        assert os.pread(descriptor, 4, 0) == here.read_bytes()[:4]
        assert Path(path).parent != other
    assert not other.exists()


def test_copies_of_this_boot_stay_whoever_made_room_for_them(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two first mounts after a boot, one finds the directory that the other one has made since it looked."""
    with checked(here) as (_, path, _):
        directory = Path(path).parent
    (directory / "another").touch()
    is_dir, too_early = Path.is_dir, [directory]

    def asked(path: Path) -> bool:
        if path in too_early:
            too_early.remove(path)
            return False
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", asked)
    with checked(here):
        assert (directory / "another").exists()


def test_of_old_copies_the_one_goes_that_was_not_used_for_longest(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = [here]
    for name in (b"other", b"third"):
        tree = TreeBuilder()
        tree.file(name)
        clips.append(write_clip(tmp_path / f"{name.decode()}.clip", tree.finish()))
    paths = []
    for clip in clips[:2]:
        with checked(clip) as (_, path, _):
            paths.append(path)
            os.utime(path, (len(paths), len(paths)))
    with checked(here):
        pass
    monkeypatch.setattr(module, "_KEPT", os.stat(paths[0]).st_blocks * 512 + clips[2].stat().st_size)
    with checked(clips[2]) as (_, path, _):
        assert {str(copy) for copy in copies()} == {paths[0], path}


def test_old_copies_make_room(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is mounted lives on without its name."""
    other, right = write_clip(tmp_path / "other.clip", TreeBuilder().finish()), here.read_bytes()
    monkeypatch.setattr(module, "_KEPT", len(right))
    with checked(here) as (descriptor, path, _), checked(other) as (_, kept, _):
        assert [str(copy) for copy in copies()] == [kept]
        assert not Path(path).exists()
        assert os.pread(descriptor, len(right), 0) == right
