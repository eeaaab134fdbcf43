"""``clipfs cache``: what it lists, frees, removes and finds damaged, and how it says so."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

import clipfs
from clipfs.blocks import disk as disk_module
from clipfs.blocks.disk import DiskCache
from clipfs.blocks.store import pack
from clipfs.cli.main import main
from tests.conftest import require_root
from tests.mounts import BIG, SECONDS
from tests.test_disk import everything, keep, span

pytest_plugins = ["tests.mount_fixtures"]


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "spans", 1 << 30)


@pytest.fixture
def kept(cache: DiskCache) -> list[bytes]:
    """The digests of five spans; those with a smaller number were used longer ago."""
    digests = [keep(cache, number)[0] for number in range(5)]
    for number, digest in enumerate(digests):
        os.utime(file_of(cache, digest), (number, number))
    return digests


def file_of(cache: DiskCache, digest: bytes) -> Path:
    return Path(cache.files.name(digest))


def part_of(cache: DiskCache, digest: bytes) -> Path:
    return Path(f"{cache.files.name(digest)}.part")


def told(capsys: pytest.CaptureFixture[str], cache: DiskCache, *words: str, code: int = 0) -> dict[str, Any]:
    """What it says for programs; for people it says one line of the same first."""
    assert main(["cache", *words, "--json", "--cache-dir", str(cache.directory)]) == code
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert facts["directory"] == str(cache.directory)
    return facts


def names(cache: DiskCache) -> set[str]:
    return {stored.digest for stored in cache.stored()}


class TestLs:
    def test_of_nothing(self, cache: DiskCache, capsys: pytest.CaptureFixture[str]) -> None:
        facts = told(capsys, cache, "ls", "--cache-size", "3M")
        assert (facts["spans"], facts["bytes"], facts["limit"], facts["images"]) == (0, 0, 3 << 20, [])

    def test_how_much(self, cache: DiskCache, kept: list[bytes], capsys: pytest.CaptureFixture[str]) -> None:
        facts = told(capsys, cache, "ls")
        size = sum(each.size for each in cache.stored())
        assert (facts["spans"], facts["bytes"], facts["other_bytes"]) == (5, size, size)
        assert main(["cache", "ls", "--cache-dir", str(cache.directory)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{cache.directory}: 5 spans, ")
        assert lines[1].endswith("of images whose index is not here, or of another version of clipfs")

    @pytest.mark.usefixtures("runtime")
    def test_of_which_image(self, image: str, clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A mounted one, and those that have an index in the cache directory."""
        require_root()
        assert main(["cat", image, "/hello"]) == 0
        with clipfs.mount(clip, mountpoint):
            assert (mountpoint / "big").read_bytes() == BIG
        capsys.readouterr()
        assert main(["cache", "ls", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        (found,) = facts["images"]
        with clipfs.Index.open(found["clip"]) as index:
            assert found["source"] == index.source
            assert found["of"] == len({span.digest for layer in index.layers for span in layer.spans})
        assert 0 < found["spans"] <= found["of"]
        assert (found["bytes"], facts["other_bytes"]) == (facts["bytes"], 0)


class TestGc:
    def test_down_to_the_limit(self, cache: DiskCache, kept: list[bytes], capsys: pytest.CaptureFixture[str]) -> None:
        before = sum(each.size for each in cache.stored())
        facts = told(capsys, cache, "gc", "--cache-size", f"{before // 2 // 1024}K")
        left = sum(each.size for each in cache.stored())
        assert (facts["freed"], facts["bytes"]) == (before - left, left)
        assert left <= before // 2
        assert names(cache) == {digest.hex() for digest in kept[-len(names(cache)) :]}, "the longest unused go first"

    def test_nothing_to_do(self, cache: DiskCache, kept: list[bytes], capsys: pytest.CaptureFixture[str]) -> None:
        assert told(capsys, cache, "gc")["freed"] == 0
        assert len(names(cache)) == 5

    @pytest.mark.parametrize(("age", "gone"), [(0, False), (disk_module._STALE + 60, True)])
    def test_what_dead_writers_left(
        self, age: int, gone: bool, cache: DiskCache, kept: list[bytes], capsys: pytest.CaptureFixture[str]
    ) -> None:
        part = part_of(cache, kept[0])
        part.write_bytes(b"half")
        written = part.stat().st_mtime - age
        os.utime(part, (written, written))
        told(capsys, cache, "gc")
        assert part.exists() is not gone


@pytest.mark.parametrize("what", ["ls", "gc", "prune", "verify"])
def test_a_directory_of_something_else(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may have files that are called as ours are; a git repository has."""
    own = {tmp_path / "total": b"12345678 and more", tmp_path / "ab" / ("0" * 62): b"mine"}
    for path, data in own.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    assert main(["cache", what, "--cache-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said == f"clipfs: {tmp_path} is no cache: nothing in it is from a mount with --cache-dir\n"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == own


class TestPrune:
    def test_everything_goes(self, cache: DiskCache, kept: list[bytes], capsys: pytest.CaptureFixture[str]) -> None:
        part_of(cache, kept[0]).write_bytes(b"half")
        before = sum(each.size for each in cache.stored())
        facts = told(capsys, cache, "prune")
        assert (facts["freed"], facts["bytes"]) == (before, 0)
        left = [path.name for path in cache.directory.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
        assert sorted(left) == ["locks", "total"]

    def test_what_is_just_being_written_stays(self, cache: DiskCache, capsys: pytest.CaptureFixture[str]) -> None:
        digest, blocks = span(9)
        claim = cache.claim(digest)
        assert claim is not None
        told(capsys, cache, "prune")
        claim.keep(blocks)
        assert everything(cache, digest, len(blocks)) == blocks

    @pytest.mark.usefixtures("runtime")
    def test_a_mount_goes_on(self, clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        require_root()
        with clipfs.mount(clip, mountpoint, clipfs.MountOptions(cache=0)):
            assert (mountpoint / "hello").read_bytes() == b"hello\n"
            assert main(["cache", "prune"]) == 0
            assert (mountpoint / "big").read_bytes() == BIG


class TestVerify:
    def test_all_good(self, cache: DiskCache, kept: list[bytes], capsys: pytest.CaptureFixture[str]) -> None:
        used = {each.digest: each.used for each in cache.stored()}
        facts = told(capsys, cache, "verify")
        assert (facts["spans"], facts["damaged"], facts["damaged_bytes"]) == (5, [], 0)
        assert {each.digest: each.used for each in cache.stored()} == used, "looking after it is no use of it"

    @pytest.mark.parametrize("place", ["head", "table", "middle", "end", "cut", "empty"])
    def test_damage(self, place: str, cache: DiskCache, kept: list[bytes], capsys: pytest.CaptureFixture[str]) -> None:
        file = file_of(cache, kept[2])
        size = next(each.size for each in cache.stored() if each.digest == kept[2].hex())
        data = bytearray(file.read_bytes())
        at = {"head": 9, "table": 60, "middle": len(data) // 2, "end": len(data) - 1}.get(place)
        if at is not None:
            data[at] ^= 0x04
        file.write_bytes(data if at is not None else data[: len(data) // 2 if place == "cut" else 0])
        facts = told(capsys, cache, "verify", code=65)
        assert facts["damaged"] == [kept[2].hex()]
        assert facts["damaged_bytes"] in (size, facts["bytes"] - 4 * size)
        assert names(cache) == {digest.hex() for digest in kept} - {kept[2].hex()}

    def test_files_of_another_version(
        self, cache: DiskCache, kept: list[bytes], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Only that version can say what they are."""
        other = file_of(cache, kept[2]).rename(file_of(cache, kept[2]).with_suffix(".77"))
        file_of(cache, kept[3]).with_suffix("").write_bytes(b"anything")
        assert told(capsys, cache, "verify")["spans"] == 4
        assert other.exists()

    def test_a_file_that_is_whole_but_wrong(
        self, cache: DiskCache, kept: list[bytes], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """All checksums in it are right; only its name is another's."""
        file_of(cache, kept[1]).write_bytes(b"".join(pack(kept[1], span(77)[1], compress=True)))
        assert told(capsys, cache, "verify", code=65)["damaged"] == [kept[1].hex()]
        assert main(["cache", "verify", "--cache-dir", str(cache.directory)]) == 0
        assert capsys.readouterr().out == f"{cache.directory}: 4 of 4 spans are good\n"

    def test_for_people(self, cache: DiskCache, kept: list[bytes], capsys: pytest.CaptureFixture[str]) -> None:
        file_of(cache, kept[0]).write_bytes(b"")
        assert main(["cache", "verify", "--cache-dir", str(cache.directory)]) == 65
        assert capsys.readouterr().out == f"{cache.directory}: 4 of 5 spans are good; removed 1 that were not, 0 B\n"

    def test_what_cannot_be_removed(
        self, cache: DiskCache, kept: list[bytes], capsys: pytest.CaptureFixture[str]
    ) -> None:
        require_root()
        file_of(cache, kept[0]).write_bytes(b"")
        directory = cache.directory
        subprocess.run(["mount", "--bind", "-o", "ro", directory, directory], check=True, timeout=SECONDS)
        try:
            assert told(capsys, cache, "verify", code=65)["not_removed"] == [kept[0].hex()]
            assert main(["cache", "verify", "--cache-dir", str(directory)]) == 65
        finally:
            subprocess.run(["umount", directory], check=True, timeout=SECONDS)
        assert capsys.readouterr().out == (
            f"{directory}: 4 of 5 spans are good; could not remove 1 that are not, 0 B: Read-only file system\n"
        )
        assert told(capsys, cache, "verify", code=65)["not_removed"] == []
        assert not file_of(cache, kept[0]).exists()


def test_a_directory_that_others_can_write_to(
    cache: DiskCache, kept: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    cache.directory.chmod(0o777)
    for verb in ("ls", "gc", "prune", "verify"):
        assert main(["cache", verb, "--cache-dir", str(cache.directory)]) == 1
        what = f"must be a directory of uid {os.geteuid()} that nobody else can write to"
        hint = "`chmod go-w` it if it is yours, or name another"
        assert capsys.readouterr().err == f"clipfs: {cache.directory} {what}; {hint}\n"
    assert all(file_of(cache, digest).exists() for digest in kept)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["ls", "--cache-dir", "/nonesuch/cache"], 1, "there is no directory /nonesuch/cache"),
        (["ls", "--cache-size", "many"], 2, "--cache-size wants a size such as 512M or 2G, not 'many'"),
        (["eat"], 2, "invalid choice: 'eat'"),
    ],
)
def test_failures(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *words]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
