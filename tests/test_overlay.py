"""One container's overlay on real mounts: what is in the merged view, and that nothing is left when something fails."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import assembler
import clipfs
from assembler import Container, ContainerOverlay, kernel
from tests.conftest import require_root
from tests.containers import leftovers, read_only

SIX = {"dev": 0o755, "proc": 0o555, "sys": 0o555, "tmp": 0o1777, "volumes": 0o755, "workspace": 0o755}
ODD = os.fsdecode(b"odd ,:\\=\"'\n\t#;%\xff\\054")
OLD = 1_500_000_000_123_456_789


@pytest.fixture(autouse=True)
def _root() -> None:
    require_root()


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    root = tmp_path / "lower"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "name").write_text("lower\n")
    return root


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """Directories may be left here on purpose, mounts never."""
    directory = tmp_path / "base"
    try:
        yield directory
        assert kernel.mounts_below(tmp_path) == []
    finally:
        for place in kernel.mounts_below(tmp_path):
            kernel.unmount(place)


@pytest.fixture(params=["by context", "by options"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to mount an overlay; the second is what a kernel before 6.5 leaves."""
    if request.param == "by options":

        def unknown(*_: object) -> None:
            raise OSError(22, "Invalid argument")

        monkeypatch.setattr(kernel, "_mount_by_context", unknown)


def modes(root: Path) -> dict[str, int]:
    return {each.name: stat.S_IMODE(each.lstat().st_mode) for each in root.iterdir()}


@pytest.mark.usefixtures("way")
class TestBothWays:
    def test_the_six_are_there_at_once_and_the_lower_is_untouched(
        self, lower: Path, base: Path, tmp_path: Path
    ) -> None:
        with read_only(lower, tmp_path / "ro") as below, ContainerOverlay("web", below, base) as overlay:
            assert overlay.merged == base / "web" / "layer-0" / "merged"
            assert modes(overlay.merged) == {**SIX, "etc": 0o755}
            (overlay.merged / "etc" / "name").write_text("upper\n")
            (overlay.merged / "workspace" / "new").touch()
            assert (overlay.upper / "etc" / "name").read_text() == "upper\n"
        assert sorted(each.name for each in lower.iterdir()) == ["etc"]
        assert (lower / "etc" / "name").read_text() == "lower\n"

    def test_names_that_a_line_of_options_cannot_hold(self, tmp_path: Path, base: Path) -> None:
        root = tmp_path / ODD / "lower"
        root.mkdir(parents=True)
        (root / ODD).touch()
        with ContainerOverlay("web", root, tmp_path / ODD / "base") as overlay:
            assert ODD in os.listdir(overlay.merged)
            (overlay.merged / ODD).write_text("x")
        assert assembler.gc(tmp_path / ODD / "base", kept=True) == ["web"]

    def test_several_lowers_are_one_overlay(self, lower: Path, base: Path, tmp_path: Path) -> None:
        """The topmost comes first; and what decides about a required directory is all of them together."""
        top = tmp_path / "top"
        (top / "etc").mkdir(parents=True)
        (top / "etc" / "name").write_text("top\n")
        (top / "tmp").symlink_to("var/tmp")
        (lower / "var" / "tmp").mkdir(parents=True)
        (lower / "var" / "tmp").chmod(0o701)
        (lower / "workspace").mkdir(mode=0o750)
        with ContainerOverlay("web", [top, lower], base) as overlay:
            assert (overlay.merged / "etc" / "name").read_text() == "top\n"
            assert (overlay.merged / "tmp").is_symlink()
            assert modes(overlay.merged / "var") == {"tmp": 0o701}
            assert modes(overlay.merged)["workspace"] == 0o750
            assert len(kernel.mounts_below(base)) == 1


def test_long_paths_and_many_lowers(lower: Path, base: Path, tmp_path: Path) -> None:
    """A line of options ends at a page; these have some 20 KB."""
    lowers = []
    for number in range(60):
        path = tmp_path / ("long" * 50) / f"{number}" / ("path" * 40)
        (path / f"from-{number}").mkdir(parents=True)
        lowers.append(path)
    with ContainerOverlay("web", lowers, base) as overlay:
        assert {f"from-{number}" for number in range(60)} <= set(os.listdir(overlay.merged))


def test_tmp_of_the_image_stays_what_it_is(lower: Path, base: Path) -> None:
    (lower / "tmp").mkdir()
    (lower / "tmp" / "file").touch()
    (lower / "tmp").chmod(0o1777)
    os.chown(lower / "tmp", 12, 34)
    os.setxattr(lower / "tmp", "user.note", b"kept")
    os.utime(lower / "tmp", ns=(OLD, OLD))
    with ContainerOverlay("web", lower, base, ["/srv/data"]) as overlay:
        info = (overlay.merged / "tmp").stat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_mtime_ns) == (0o1777, 12, 34, OLD)
        assert os.getxattr(overlay.merged / "tmp", "user.note") == b"kept"
        assert os.listdir(overlay.merged / "tmp") == ["file"]
        assert (overlay.merged / "srv" / "data").is_dir()


def test_the_log_line(lower: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), ContainerOverlay("web", lower, base):
        assert "mounted layer container_id=web layer_index=0" in caplog.messages


@pytest.mark.usefixtures("way")
def test_redirects_and_metacopies_of_an_image_are_not_followed(lower: Path, base: Path, tmp_path: Path) -> None:
    """Xattrs by which one directory could show another's content, and a file another's attributes: from one lower into
    the next."""
    (lower / "secret").mkdir()
    (lower / "secret" / "key").write_text("key")
    top = tmp_path / "top"
    (top / "public").mkdir(parents=True)
    os.setxattr(top / "public", "trusted.overlay.redirect", b"/secret")
    (top / "file").write_text("own")
    os.setxattr(top / "file", "trusted.overlay.metacopy", b"")
    os.setxattr(top / "file", "trusted.overlay.redirect", b"/secret/key")
    with ContainerOverlay("web", [top, lower], base) as overlay:
        # To refuse it altogether is as good; kernels differ.
        with contextlib.suppress(PermissionError):
            assert os.listdir(overlay.merged / "public") == []
        with contextlib.suppress(PermissionError):
            assert (overlay.merged / "file").read_text() == "own"


@pytest.mark.usefixtures("way")
def test_device_files_open_nothing(lower: Path, base: Path) -> None:
    os.mknod(lower / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with ContainerOverlay("web", lower, base) as overlay, pytest.raises(PermissionError):
        (overlay.merged / "null").read_bytes()


def test_a_lower_may_hold_the_container_itself(lower: Path) -> None:
    """As in `clipfs run / ls`."""
    with ContainerOverlay("web", lower, lower / "base") as overlay:
        assert (overlay.merged / "etc" / "name").read_text() == "lower\n"
        assert os.listdir(overlay.merged / "base" / "web" / "layer-0" / "merged") == []
    assert assembler.gc(lower / "base", kept=True) == ["web"]


class TestFailures:
    def test_something_in_the_way(self, lower: Path, base: Path) -> None:
        (lower / "workspace").write_text("")
        with pytest.raises(clipfs.ImageError, match="needs a directory /workspace, but the image has a regular file"):
            ContainerOverlay("web", lower, base).mount()
        assert leftovers(base) == []

    def test_a_mount_that_fails(self, lower: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing(*_: object) -> None:
            raise OSError(19, "No such device")

        monkeypatch.setattr(kernel, "mount_overlay", failing)
        with pytest.raises(clipfs.MountError, match="no overlayfs; try `modprobe overlay`"):
            ContainerOverlay("web", lower, base, upper=base.parent / "kept").mount()
        assert leftovers(base) == []
        assert sorted(each.name for each in base.parent.iterdir()) == ["base", "kept", "lower"]

    @pytest.mark.parametrize("step", ["_directories", "_seed"])
    def test_an_interrupt_at_any_step(
        self, lower: Path, base: Path, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = lower.with_name("other")
        other.mkdir()
        real = getattr(ContainerOverlay, step)

        def interrupted(*given: Any) -> None:
            real(*given)
            raise KeyboardInterrupt

        monkeypatch.setattr(ContainerOverlay, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            ContainerOverlay("web", [lower, other], base).mount()
        assert leftovers(base) == []

    def test_a_lower_in_a_lower(self, lower: Path, base: Path) -> None:
        with pytest.raises(clipfs.MountError, match=r"over .*; none of them may lie in another one"):
            ContainerOverlay("web", [lower, lower / "etc"], base).mount()
        assert leftovers(base) == []

    @pytest.mark.parametrize(
        ("lowers", "sentence"),
        [
            ([], "at least one lower"),
            (["no"], "no is not a directory"),
            (["lower/etc/name"], "name is not a directory"),
        ],
    )
    def test_no_lower(self, lowers: list[str], sentence: str, lower: Path, base: Path) -> None:
        with pytest.raises(clipfs.UsageError, match=sentence):
            ContainerOverlay("web", [lower.parent / each for each in lowers], base).mount()
        assert leftovers(base) == []

    def test_an_upper_where_none_can_be(self, lower: Path, base: Path, tree_mount: Path) -> None:
        """An overlay cannot write to an overlay; the kernel says EINVAL, we say what it means."""
        with pytest.raises(
            clipfs.MountError, match=r"is on overlay: it has to be writable, .* ext4, xfs, btrfs, tmpfs"
        ):
            ContainerOverlay("web", lower, base, upper=tree_mount / "tmp" / "upper").mount()
        assert leftovers(base) == []

    def test_an_id_that_is_in_use(self, lower: Path, base: Path) -> None:
        with ContainerOverlay("web", lower, base):
            with pytest.raises(clipfs.UsageError, match="a container web already"):
                ContainerOverlay("web", lower, base).mount()
            assert len(kernel.mounts_below(base)) == 1

    @pytest.mark.parametrize("name", ["../escape", "a/b", ".", "a\nb", "a,b:c"])
    def test_an_id_that_is_a_path(self, name: str, lower: Path, base: Path) -> None:
        with pytest.raises(clipfs.UsageError, match="is no name for a container"):
            ContainerOverlay(name, lower, base)

    def test_unmounting_twice_and_never_mounted(self, lower: Path, base: Path) -> None:
        overlay = ContainerOverlay("web", lower, base)
        overlay.unmount()
        overlay.mount()
        overlay.unmount()
        overlay.unmount()
        assert kernel.mounts_below(base) == []

    def test_one_in_use_is_detached(self, lower: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
        with ContainerOverlay("web", lower, base) as overlay:
            user = os.open(overlay.merged / "etc" / "name", os.O_RDONLY)
        try:
            assert kernel.mounts_below(base) == []
            assert "was still in use; it is detached" in caplog.text
            assert os.read(user, 10) == b"lower\n"
        finally:
            os.close(user)


@pytest.fixture
def tree_mount(lower: Path, tmp_path: Path) -> Iterator[Path]:
    """Another overlay."""
    with ContainerOverlay("other", lower, tmp_path / "other") as overlay:
        yield overlay.merged


class TestKeptUpper:
    def test_is_there_the_next_time(self, lower: Path, base: Path, tmp_path: Path) -> None:
        upper = tmp_path / ODD
        for number in range(3):
            with Container.create(base), ContainerOverlay(f"web-{number}", lower, base, upper=upper) as overlay:
                assert len(list((overlay.merged / "workspace").iterdir())) == number
                (overlay.merged / "workspace" / f"{number}").touch()
        assert sorted(each.name for each in (upper / "workspace").iterdir()) == ["0", "1", "2"]
        assert sorted(each.name for each in tmp_path.iterdir()) == sorted([ODD, "base", "lower"])
        assert len(assembler.gc(base, kept=True)) == 3
        assert (upper / "workspace" / "0").exists()

    def test_what_was_deleted_stays_deleted(self, lower: Path, base: Path, tmp_path: Path) -> None:
        (lower / "tmp").mkdir()
        (lower / "tmp" / "old").touch()
        (lower / "srv").mkdir()
        with ContainerOverlay("a", lower, base, upper=tmp_path / "kept") as overlay:
            subprocess.run(["rm", "-r", overlay.merged / "tmp", overlay.merged / "srv"], check=True)
        with ContainerOverlay("b", lower, base, upper=tmp_path / "kept") as overlay:
            assert list((overlay.merged / "tmp").iterdir()) == []
            assert modes(overlay.merged) == {**SIX, "etc": 0o755}

    def test_what_was_changed_stays_changed(self, lower: Path, base: Path, tmp_path: Path) -> None:
        (lower / "tmp").mkdir()
        with ContainerOverlay("a", lower, base, upper=tmp_path / "kept") as overlay:
            (overlay.merged / "tmp").chmod(0o700)
            os.utime(overlay.merged / "tmp", ns=(OLD, OLD))
        with ContainerOverlay("b", lower, base, upper=tmp_path / "kept") as overlay:
            info = (overlay.merged / "tmp").stat()
            assert (stat.S_IMODE(info.st_mode), info.st_mtime_ns) == (0o700, OLD)

    def test_serves_one_at_a_time(self, lower: Path, base: Path, tmp_path: Path) -> None:
        second = ContainerOverlay("b", lower, base, upper=tmp_path / "kept")
        with (
            ContainerOverlay("a", lower, base, upper=tmp_path / "kept"),
            pytest.raises(clipfs.UsageError, match=r"another container is writing to .*/kept"),
        ):
            second.mount()
        second.mount()
        second.unmount()

    def test_after_its_writer_was_killed(self, lower: Path, base: Path, tmp_path: Path) -> None:
        """What the writer had mounted outlives it; what it has left is not taken from the next one."""
        upper = tmp_path / "kept"
        program = (
            "import sys, pathlib, assembler;"
            "base, lower, upper = map(pathlib.Path, sys.argv[1:]);"
            "container = assembler.Container.create(base, 'a');"
            "assembler.ContainerOverlay('a', lower, base, upper=upper).mount();"
            "print('up', flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", program, *map(str, (base, lower, upper))]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
            try:
                assert owner.stdout
                assert owner.stdout.readline() == b"up\n"
            finally:
                owner.kill()
        with pytest.raises(
            clipfs.UsageError, match=rf"the container a is still writing to {upper}, .*`clipfs gc --base {base}` first"
        ):
            ContainerOverlay("b", lower, base, upper=upper).mount()
        # As a restart of the machine would.
        kernel.unmount(base / "a" / "layer-0" / "merged")
        with Container.create(base, "b"), ContainerOverlay("b", lower, base, upper=upper) as overlay:
            assert assembler.gc(base) == ["a"]
            # This takes the work directory.
            (overlay.merged / "etc" / "name").unlink()
        assert leftovers(base) == []
        assert sorted(each.name for each in tmp_path.iterdir()) == ["base", "kept", "lower"]

    def test_that_was_removed_meanwhile(self, lower: Path, base: Path, tmp_path: Path) -> None:
        container = Container.create(base, "a")
        (container.path / "layer-0").mkdir()
        for name, target in (("upper", "kept"), ("work", ".kept.clipfs-work")):
            (container.path / "layer-0" / name).symlink_to(tmp_path / target)
        (tmp_path / ".kept.clipfs-work").mkdir()
        container.release()
        assert assembler.gc(base) == ["a"]
        assert sorted(each.name for each in tmp_path.iterdir()) == ["base", "lower"]

    def test_that_is_a_file(self, lower: Path, base: Path, tmp_path: Path) -> None:
        (tmp_path / "kept").touch()
        with pytest.raises(clipfs.UsageError, match=r"needs a directory, and .*/kept is none"):
            ContainerOverlay("a", lower, base, upper=tmp_path / "kept").mount()
        assert leftovers(base) == []
