"""The cache of indexes: made once for each image, platform and tag, whoever asks for it at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import clipfs
from clipfs import ClipfsError, Index, IntegrityError, Platform
from tests.builds import Recorder, three_layers
from tests.images import LayoutBuilder, Tar, host_architecture
from tests.mounts import SECONDS, files

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    return three_layers(tmp_path_factory.mktemp("image") / "oci").write()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("CLIPFS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class TestIndexFor:
    def test_the_second_time_it_is_there(self, image: str) -> None:
        first = clipfs.index_for(image)
        status, progress = first.stat(), Recorder()
        assert clipfs.index_for(image, progress=progress) == first
        assert (first.stat().st_ino, first.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
        assert progress.advances == 0

    def test_a_tag_that_moves_gets_another(self, tmp_path: Path, cache: Path) -> None:
        name = three_layers(tmp_path / "oci").write("v1")
        before = clipfs.index_for(name)
        assert LayoutBuilder(tmp_path / "oci").layer(Tar().member("other")).config().write("v1") == name
        after = clipfs.index_for(name)
        assert sorted(files(cache)) == sorted([before, after])
        with Index.open(after) as index:
            assert index.lookup(index.root, b"other")

    def test_a_build_that_fails_is_not_kept(self, tmp_path: Path, cache: Path) -> None:
        made = three_layers(tmp_path / "oci")
        made._diff_ids[2] = made._diff_ids[0]
        name = made.write()
        for _ in range(2):
            with pytest.raises(IntegrityError):
                clipfs.index_for(name)
            assert files(cache) == []

    def test_two_processes_that_make_the_same_at_once(self, image: str, cache: Path) -> None:
        workers = [Worker(image) for _ in range(2)]
        try:
            for worker in workers:
                worker.hears("begun")
            for worker in workers:
                worker.say()
            said = {worker.finish() for worker in workers}
        finally:
            for worker in workers:
                worker.kill()
        assert said == {str(path) for path in files(cache)}
        with Index.open(clipfs.index_for(image, progress=Recorder(pytest.fail))) as index:
            index.check()

    def test_a_process_that_is_killed_leaves_nothing(self, image: str, cache: Path) -> None:
        worker = Worker(image)
        worker.hears("begun")
        worker.kill()
        assert files(cache) == []


class Worker:
    """A process that calls `index_for`, and stops when the first layer is begun until it is told to go on."""

    CODE = """if True:
        import sys, clipfs
        from clipfs.building.builder import Silent
        class Waits(Silent):
            def begin(self, what, total):
                if "1/3" in what:
                    print("begun", flush=True)
                    sys.stdin.readline()
        print(clipfs.index_for(sys.argv[1], progress=Waits()))
    """

    def __init__(self, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    def hears(self, line: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{line}\n"

    def say(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def finish(self) -> str:
        out = self._process.communicate(timeout=SECONDS)[0]
        return out.strip()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=SECONDS)


class TestPlatforms:
    @pytest.fixture
    def both(self, tmp_path: Path) -> str:
        """One tag for two platforms: this machine's, and one more."""
        for architecture in (host_architecture(), "s390x"):
            tar = Tar().member(architecture, b"it is me")
            LayoutBuilder(tmp_path / "oci").layer(tar).config().write(architecture, architecture=architecture)
        index = tmp_path / "oci" / "index.json"
        found = json.loads(index.read_bytes())
        for manifest in found["manifests"]:
            manifest["annotations"]["org.opencontainers.image.ref.name"] = "both"
        index.write_text(json.dumps(found))
        return f"oci:{tmp_path}/oci:both"

    def test_this_machine_s_or_the_one_asked_for(self, both: str) -> None:
        made = [clipfs.index_for(both, platform=which) for which in (None, Platform.parse("linux/s390x"))]
        for path, name in zip(made, (host_architecture(), "s390x"), strict=True):
            with Index.open(path) as index:
                assert [found for found, _ in index.entries(index.root)] == [name.encode()]
        assert made[0] != made[1]

    def test_one_that_there_is_not(self, both: str, tmp_path: Path) -> None:
        with pytest.raises(ClipfsError, match="s390x"):
            clipfs.build(both, tmp_path / "x.clip", platform=Platform.parse("linux/riscv64"))
        assert not (tmp_path / "x.clip").exists()
