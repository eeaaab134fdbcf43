"""A container's directory, its id and its lock; and what `gc` takes away and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import assembler
import clipfs
from assembler import Container, kernel, names
from assembler.resolving import name_files
from clipfs.cli.main import main
from tests.conftest import require_root


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "some" / "containers"


def abandon(base: Path, name: str) -> Path:
    """What a killed owner leaves: the kernel has let go of the lock, and nothing else has happened."""
    container = Container.create(base, name)
    container.release()
    return container.path


@pytest.mark.parametrize("name", ["a", "0", "web-1", "A.b_c-d", "x" * 64])
def test_names_that_will_do(base: Path, name: str) -> None:
    with Container.create(base, name) as container:
        assert (container.id, container.path) == (name, base / name)
        assert container.path.stat().st_mode & 0o777 == 0o700
    assert not container.path.exists()


@pytest.mark.parametrize("umask", [0, 0o077])
def test_who_may_look_into_it_is_not_the_umasks_affair(tmp_path: Path, umask: int) -> None:
    """Nobody into where containers are; but those inside, whoever they are, into their /etc/hosts."""
    base, before = tmp_path / "new" / "base", os.umask(umask)
    try:
        with Container.create(base) as container:
            files = name_files(container.path, "none", "web")
            assert base.stat().st_mode & 0o777 == 0o700
            assert files["/etc/hosts"].stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mode", "owner"), [(0o775, 0), (0o757, 0), (0o1777, 0), (0o700, 65534)])
def test_what_others_can_write_to_is_no_base(base: Path, mode: int, owner: int) -> None:
    """They could have the next `gc` start a program of theirs."""
    require_root()
    abandon(base, "web")
    os.chown(base, owner, owner)
    base.chmod(mode)
    before = sorted(base.rglob("*"))
    for use in (lambda: Container.create(base), lambda: assembler.gc(base)):
        with pytest.raises(clipfs.UsageError, match=f"{base} is no place for containers, because other users"):
            use()
    assert sorted(base.rglob("*")) == before


@pytest.mark.parametrize(("mode", "owner"), [(0o777, 0), (0o700, 65534)])
def test_what_others_could_make_stays_as_it_is(
    base: Path, caplog: pytest.LogCaptureFixture, mode: int, owner: int
) -> None:
    """The base was open to them once. What they wrote into it is a program that this user would start."""
    require_root()
    for name in ("theirs", "ours"):
        abandon(base, name)
    ran = base.parent / "ran"
    program = base.parent / "program"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    (base / "theirs" / "runtime.json").write_text(json.dumps({"runtime": str(program)}))
    (base / "theirs" / "runtime" / "theirs").mkdir(parents=True)
    os.chown(base / "theirs", owner, owner)
    (base / "theirs").chmod(mode)
    assert assembler.gc(base, kept=True) == ["ours"]
    assert not ran.exists()
    assert [record.getMessage() for record in caplog.records] == [
        f"left {base / 'theirs'} as it is: other users can write to it"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "a/b", "/etc", "../../etc", "-rf", ".hidden", "_a", "a b", "a\n", "a\nb", "a,b", "a:b", "a\\b",
        "ä", "٣", "a\0b", "x" * 65, "a/../b", "\udcff",
    ],
)  # fmt: skip
def test_names_that_will_not(base: Path, name: str) -> None:
    with pytest.raises(clipfs.UsageError, match=r"is no name for a container: it takes 1 to 64 letters"):
        Container.create(base, name)
    assert not base.exists()


def test_a_name_is_taken_until_its_container_has_gone(base: Path) -> None:
    with Container.create(base, "web") as first:
        first.keep = True
        with pytest.raises(clipfs.UsageError, match="a container web already, and it is in use; choose another"):
            Container.create(base, "web")
    with pytest.raises(clipfs.UsageError, match=f"web already, and it has ended; remove {base}/web or choose another"):
        Container.create(base, "web")
    assert assembler.gc(base, kept=True) == ["web"]
    Container.create(base, "web").close()


def test_who_is_in_the_way_of_a_name(base: Path) -> None:
    """What was left may still run and be mounted: nobody is told to remove that by hand."""
    abandon(base, "web")
    with pytest.raises(clipfs.UsageError, match=f"web already, left by a run .*; run `clipfs gc --base {base}` or"):
        Container.create(base, "web")
    assert assembler.gc(base) == ["web"]
    (base / "web").mkdir()
    with pytest.raises(clipfs.UsageError, match=f"{base}/web is there and is no container; move it away or"):
        Container.create(base, "web")


def test_random_names_differ(base: Path) -> None:
    containers = [Container.create(base) for _ in range(20)]
    assert len({container.id for container in containers}) == 20
    for container in containers:
        container.close()
    assert [each.name for each in base.iterdir()] == [".clipfs.lock"]


def test_a_base_that_is_a_link_or_a_file(base: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    base.parent.mkdir()
    base.symlink_to(real)
    with Container.create(base, "web") as container:
        # A runtime refuses a root that is reached through a link.
        assert container.path == real / "web"
    base.unlink()
    base.write_text("")
    with pytest.raises(clipfs.MountError, match=r"cannot keep containers in .*/containers: "):
        Container.create(base)


def test_what_is_not_utf8_is_not_told_as_something_else(base: Path) -> None:
    with Container.create(base) as container:
        with pytest.raises(clipfs.UsageError, match=r"only be told what is UTF-8, and this is not: 'A=caf\\udce9'"):
            container.write_config({"env": ["A=café", os.fsdecode(b"A=caf\xe9!")]})
        assert not (container.path / "config.json").exists()
        container.write_config({"env": ["A=café"]})
        assert json.loads((container.path / "config.json").read_bytes()) == {"env": ["A=café"]}


class TestGc:
    def test_takes_what_nobody_owns(self, base: Path) -> None:
        (abandon(base, "dead") / "layer-0" / "upper").mkdir(parents=True)
        kept = Container.create(base, "kept")
        kept.keep = True
        kept.close()
        with Container.create(base, "living") as living:
            assert assembler.gc(base) == ["dead"]
            assert assembler.gc(base, kept=True) == ["kept"]
            assert living.path.is_dir()
        assert assembler.gc(base, kept=True) == []
        assert [each.name for each in base.iterdir()] == [".clipfs.lock"]

    def test_takes_the_place_of_a_container_that_was_just_being_made(self, base: Path) -> None:
        abandon(base, "web").rename(base / ".clipfs.new")
        with Container.create(base, "web"):
            assert not (base / ".clipfs.new").exists()
        (base / ".clipfs.new").mkdir()
        assert assembler.gc(base) == []
        assert not (base / ".clipfs.new").exists()

    def test_never_touches_what_is_not_ours(self, base: Path, tmp_path: Path) -> None:
        """Somebody may name any directory of his as base."""
        ours = abandon(tmp_path / "elsewhere", "web")
        (base / "dpkg").mkdir(parents=True)
        (base / "dpkg" / "lock").touch()
        (base / "empty").mkdir()
        (base / "file").touch()
        (base / "link").symlink_to(ours)
        before = sorted(base.rglob("*"))
        assert assembler.gc(base) == []
        assert [each for each in sorted(base.rglob("*")) if each.name != ".clipfs.lock"] == before
        assert ours.is_dir()

    def test_a_base_that_does_not_exist_is_clean(self, base: Path) -> None:
        assert assembler.gc(base) == []
        assert not base.exists()

    def test_a_base_that_is_named_must_be_one(
        self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("CLIPFS_STATE", str(tmp_path / "state"))
        assert main(["gc", "--base", str(base)]) == 2
        assert capsys.readouterr().err == f"clipfs: there is no directory {base}\n"
        base.mkdir(parents=True)
        assert main(["gc", "--base", str(base)]) == 0, "there may be some later"
        (base / "file").touch()
        assert main(["gc", "--base", str(base)]) == 2
        assert capsys.readouterr().err.startswith(f"clipfs: {base} is no directory of containers: ")
        assert [each.name for each in base.iterdir()] == ["file"]
        abandon(base, "web")
        assert main(["gc", "--base", str(base)]) == 0
        assert capsys.readouterr().err == "removed container web\n"

    def test_leaves_for_another_time_what_cannot_be_removed(self, base: Path, caplog: pytest.LogCaptureFixture) -> None:
        for name in ("a", "b", "c"):
            abandon(base, name)
        (base / "b" / "runtime.json").write_text('{"runtime": "/no/such/runtime"}')
        (base / "c" / "runtime.json").write_text("{")
        assert assembler.gc(base) == ["a"]
        assert [each.getMessage().split(":")[0] for each in caplog.records] == [
            "cannot clean up container b",
            "cannot clean up container c",
        ]
        for name in ("b", "c"):
            (base / name / "runtime.json").unlink()
        assert assembler.gc(base) == ["b", "c"]

    def test_a_lock_ends_with_its_process(self, base: Path) -> None:
        program = (
            "import sys, pathlib, assembler;"
            "c = assembler.Container.create(pathlib.Path(sys.argv[1]), 'web');"
            "print('up', flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", program, str(base)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
            try:
                assert owner.stdout
                assert owner.stdout.readline() == b"up\n"
                assert assembler.gc(base) == []
            finally:
                owner.kill()
        assert assembler.gc(base) == ["web"]

    def test_unmounts_before_it_removes(self, base: Path, tmp_path: Path) -> None:
        require_root()
        treasure = tmp_path / "treasure"
        (treasure / "chest").mkdir(parents=True)
        path = abandon(base, "web")
        (path / "lower").mkdir()
        (path / "layer-0" / "merged").mkdir(parents=True)
        try:
            for place in ("lower", "lower/chest", "lower", "layer-0/merged"):
                subprocess.run(["mount", "--bind", treasure, path / place], check=True)
            assert assembler.gc(base) == ["web"]
            assert (treasure / "chest").is_dir()
            assert kernel.mounts_below(base) == []
        finally:
            for left in kernel.mounts_below(base):
                kernel.unmount(left)


class TestRemoval:
    def test_of_everything_there_can_be(self, tmp_path: Path) -> None:
        root = tmp_path / "root"
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "file").touch()
        (root / "a" / "b").mkdir(parents=True)
        (root / "a" / "link").symlink_to(outside)
        os.mkfifo(root / "a" / "pipe")
        (root / os.fsdecode(b"\xff\n")).mkdir()
        (root / "unreadable").mkdir(mode=0)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(root / "s"))
        names.remove_tree(root)
        assert [each.name for each in tmp_path.iterdir()] == ["outside"]
        assert (outside / "file").exists()

    def test_of_a_tree_deeper_than_any_path(self, tmp_path: Path) -> None:
        """PATH_MAX is 4096, and neither recursion nor descriptors go far."""
        root = tmp_path / "root"
        root.mkdir()
        at = os.open(root, os.O_PATH)
        for _ in range(3000):
            os.mkdir("deeper", dir_fd=at)
            below = os.open("deeper", os.O_PATH, dir_fd=at)
            os.close(at)
            at = below
        os.close(at)
        names.remove_tree(root)
        assert not root.exists()

    def test_stops_at_a_mount_and_can_be_begun_again(self, tmp_path: Path) -> None:
        require_root()
        place = tmp_path / "root" / "a" / "b" / "mount"
        place.mkdir(parents=True)
        treasure = tmp_path / "treasure"
        treasure.mkdir()
        (treasure / "gold").touch()
        subprocess.run(["mount", "--bind", treasure, place], check=True)
        try:
            with pytest.raises(clipfs.MountError, match=r"cannot remove .*/root: something is still mounted below it"):
                names.remove_tree(tmp_path / "root")
        finally:
            for each in kernel.mounts_below(tmp_path):
                kernel.unmount(each)
        assert (treasure / "gold").exists()
        names.remove_tree(tmp_path / "root")
        assert not (tmp_path / "root").exists()

    def test_of_a_link_does_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        names.remove_tree(tmp_path / "link")
        names.remove_tree(tmp_path / "nothing")
        assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "real"]

    def test_a_directory_swapped_for_a_link_is_not_entered(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root, outside = tmp_path / "root", tmp_path / "outside"
        (root / "victim").mkdir(parents=True)
        outside.mkdir()
        (outside / "gold").touch()
        real = os.rename

        def swapping(source: Any, target: Any, **keywords: Any) -> None:
            real(source, target, **keywords)
            real(root / str(target), root / "was")
            os.symlink(outside, root / str(target))

        monkeypatch.setattr(os, "rename", swapping)
        with pytest.raises(clipfs.MountError, match="cannot remove"):
            names.remove_tree(root)
        assert (outside / "gold").exists()


class TestKilling:
    def test_of_processes_that_call_themselves_anything(self) -> None:
        """What the kernel says of a process has that name in it. They end by themselves when their input does."""
        script = r"printf 'a) \377' >/proc/$$/comm; exec 3<&0; cat <&3 & echo; wait"
        with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            kernel.kill_tree(process.pid)
            assert process.stdout.read() == b""
            assert process.wait(10) == -signal.SIGKILL
