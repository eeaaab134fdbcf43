"""``clipfs explain``: a real mount tells what it did while it lives, after it died, and from a report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import clipfs
from clipfs import MountOptions
from clipfs.cli.main import main
from clipfs.errors import printable
from clipfs.reports.report import parse
from clipfs.state import Process
from tests.conftest import require_root
from tests.images import LayoutBuilder
from tests.mounts import BIG, SECONDS, ended, kill, record_of, run
from tests.tars import Tar
from tests.test_page import made

pytest_plugins = ["tests.mount_fixtures"]

pytestmark = pytest.mark.usefixtures("runtime", "near")


@pytest.fixture(scope="module", autouse=True)
def _root() -> None:
    require_root()


def explained(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["explain", "--json", *map(str, words)]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


class TestMount:
    def test_what_it_did(self, clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with clipfs.mount(clip, mountpoint):
            nothing = explained(capsys, mountpoint)
            assert (mountpoint / "big").read_bytes() == BIG
            facts = explained(capsys, mountpoint)
            assert main(["explain", str(mountpoint)]) == 0
            text = capsys.readouterr().out
        assert (nothing["bytes_fetched"], nothing["files"], nothing["fetches"]) == (0, [], [])
        assert facts["mount"]["serving"] is True
        assert facts["mount"]["mountpoint"] == str(mountpoint)
        assert facts["bytes_fetched"] == sum(each["bytes"] for each in facts["fetches"]) > 0
        assert facts["bytes_fetched"] <= facts["bytes_total"]
        assert facts["bytes_decoded"] >= facts["bytes_served"] >= len(BIG)
        assert facts["requests"]["source"] >= 1
        assert "/big" in [each["path"] for each in facts["files"]]
        assert facts["fetches"][0]["path"] == "/big"
        assert "/big" in text
        assert text.splitlines()[0].startswith(f"{printable(str(mountpoint))}: oci:")
        assert f"in {facts['counters']['requests']} requests" in text.replace(", in ", " in ")

    def test_the_second_mount_finds_it_on_the_disk(
        self, clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for _ in range(2):
            with clipfs.mount(clip, mountpoint, MountOptions(prefetch="none")):
                assert (mountpoint / "big").read_bytes() == BIG
                facts = explained(capsys, mountpoint)
        assert (facts["bytes_fetched"], facts["requests"]["source"]) == (0, 0)
        assert facts["requests"]["disk"] >= 1
        assert {each["why"] for layer in facts["layers"] for each in layer["touched"]} == {"cached"}
        assert facts["files"][0] == facts["files"][0] | {"path": "/big", "bytes": 0, "source": 0}

    def test_one_that_was_killed(self, clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        mounted = clipfs.mount(clip, mountpoint)
        try:
            (mountpoint / "hello").read_bytes()
            kill(record_of(mounted))
            facts = explained(capsys, mountpoint)
        finally:
            mounted.unmount(force=True)
        assert facts["mount"]["serving"] is False
        assert [each["path"] for each in facts["files"]] == ["/hello"]

    def test_whatever_becomes_of_the_clip(
        self, clip: Path, tmp_path: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Another image is indexed into its file, and then that is deleted."""
        mine = tmp_path / "mine.clip"
        shutil.copy(clip, mine)
        with clipfs.mount(mine, mountpoint):
            assert (mountpoint / "big").read_bytes() == BIG
            before = explained(capsys, mountpoint)
            (tmp_path / "oci").mkdir()
            clipfs.build(LayoutBuilder(tmp_path / "oci").layer(Tar().file("other", BIG)).config().write(), mine)
            other = explained(capsys, mountpoint)
            mine.unlink()
            gone = explained(capsys, mountpoint)
        for facts in (other, gone):
            assert facts["mount"]["clip"] == str(mine)
            assert {name: facts[name] for name in ("manifest", "layers", "files", "fetches")} == {
                name: before[name] for name in ("manifest", "layers", "files", "fetches")
            }

    def test_the_source_that_fails(self, tmp_path: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "oci").mkdir()
        image = LayoutBuilder(tmp_path / "oci").layer(Tar().member("one", b"1" * 9999)).config().write()
        clipfs.build(image, tmp_path / "x.clip")
        for blob in (tmp_path / "oci" / "blobs" / "sha256").iterdir():
            data = bytearray(blob.read_bytes())
            data[len(data) // 2] ^= 0x10
            blob.write_bytes(data)
        with clipfs.mount(tmp_path / "x.clip", mountpoint):
            with pytest.raises(OSError, match="Input/output"):
                (mountpoint / "one").read_bytes()
            facts = explained(capsys, mountpoint)
        assert facts["requests"]["failed"] >= 1
        assert facts["counters"]["spans_refetched"] >= 1
        assert {"refetch", "error"} <= {each["kind"] for each in facts["said"]}


class TestReport:
    def test_it_is_written_at_the_end(
        self, clip: Path, mountpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "report.json"
        assert main(["mount", "--report", str(file), str(clip), str(mountpoint)]) == 0
        try:
            (mountpoint / "hello").read_bytes()
            living = explained(capsys, mountpoint)
        finally:
            assert main(["umount", str(mountpoint)]) == 0
        kept = json.loads(file.read_bytes())
        assert kept == explained(capsys, file)
        assert kept["mount"]["serving"] is False
        assert kept["files"] == living["files"]
        assert kept["fetches"] == living["fetches"]

    def test_by_an_option_of_mount(self, clip: Path, mountpoint: Path, tmp_path: Path) -> None:
        file = tmp_path / "report.json"
        assert main(["mount", "-o", f"report={file}", str(clip), str(mountpoint)]) == 0
        assert main(["umount", str(mountpoint)]) == 0
        assert parse(file.read_bytes(), "x").bytes_fetched == 0

    @pytest.mark.parametrize("place", ["", "nonesuch/report"])
    def test_a_place_where_it_cannot_be(
        self, place: str, clip: Path, mountpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["mount", "--report", str(tmp_path / place), str(clip), str(mountpoint)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"clipfs: cannot write a report to {tmp_path / place}")
        assert said.count("\n") == 1

    @pytest.mark.parametrize("place", ["/dev/full", "/proc/report", "/sys/report"])
    def test_a_place_that_nobody_can_write_to(
        self, place: str, clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Said now: when it is to be written, there may be nobody left to be told."""
        assert main(["mount", "--report", place, str(clip), str(mountpoint)]) != 0
        said = capsys.readouterr().err
        assert said.startswith(f"clipfs: cannot write {place}: ")
        assert said.count("\n") == 1

    def test_a_dead_mount_whose_number_came_back_is_not_meant(
        self, clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        require_root()
        with clipfs.mount(clip, mountpoint) as mounted:
            record = record_of(mounted)
            dead = replace(record, process=Process(1, 7), worker=None, clip="/dead.clip")
            dead.save()
            try:
                assert explained(capsys, mountpoint)["mount"]["clip"] == str(clip)
            finally:
                dead.remove()

    def test_whoever_serves_it_is_named(self, clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Not its supervisor, when that has died."""
        require_root()
        mounted = clipfs.mount(clip, mountpoint)
        record = record_of(mounted)
        os.kill(mounted.pid, signal.SIGKILL)
        assert ended(mounted.pid)
        try:
            assert record.worker is not None
            assert explained(capsys, mountpoint)["mount"]["pid"] == record.worker.pid
        finally:
            clipfs.unmount(mountpoint)
            assert record.worker is None or ended(record.worker.pid)


class TestFailures:
    @pytest.mark.parametrize(
        ("target", "words"),
        [
            ("nonesuch", "nonesuch: No such file"),
            ("clip", "is an image, which does nothing by itself"),
            ("empty", "no clipfs mount of yours is on"),
            ("text", "is no report of a mount"),
        ],
    )
    def test_one_sentence(
        self, target: str, words: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "text").write_text("hello")
        path = clip if target == "clip" else tmp_path / target
        assert main(["explain", str(path)]) in (2, 74)
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1


def test_a_page_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report").write_text(made().to_json())
    disk = tmp_path / "small"
    disk.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4k", "none", disk)
    try:
        assert main(["explain", str(tmp_path / "report"), "--html", str(disk / "page")]) == 74
        assert capsys.readouterr().err == f"clipfs: cannot write {disk}/page: No space left on device\n"
        assert list(disk.iterdir()) == []
    finally:
        run("umount", disk)


def test_a_report_of_a_stranger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It lacks what it should have counted, and has names that a terminal would obey."""
    hostile = "\x1b]0;owned\x07\x9b2J\n\u202e"
    report = made(path=hostile)
    report = replace(report, mount=replace(report.mount, source=hostile), counters={}, requests={})
    (tmp_path / "report").write_text(report.to_json())
    assert main(["explain", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert all(character.isprintable() for character in said.replace("\n", ""))
    assert r"\x1b]0;owned\x07\x9b2J\n\u202e, served by process 1" in said
    assert "0 attempts failed" in said


def test_a_report_from_a_pipe() -> None:
    command = [sys.executable, "-m", "clipfs", "explain", "/dev/stdin"]
    done = subprocess.run(command, input=made().to_json(), capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "/mnt/<x>: docker://h/app@" in done.stdout


def test_a_run_keeps_its_report(clip: Path, tmp_path: Path) -> None:
    """Whatever the container does: this one has no program that could be executed."""
    file = tmp_path / "report.json"
    words = ["run", "--rm", "--base", tmp_path / "containers", "--report", file, clip, "/hello"]
    done = subprocess.run(
        [sys.executable, "-m", "clipfs", *map(str, words)], capture_output=True, timeout=SECONDS, check=False
    )
    assert done.returncode in (126, 127), done.stderr
    assert parse(file.read_bytes(), "report").mount.serving is False
