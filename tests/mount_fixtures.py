"""Fixtures for tests of real mounts, with proof that nothing is left of them.

A pytest plugin: modules that mount name it in `pytest_plugins`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import clipfs
from clipfs.mounting import mountinfo
from tests.mounts import VIEWS, files, kill, require_view, settled, small_image


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small image's name."""
    return small_image(tmp_path_factory.mktemp("image") / "oci")


@pytest.fixture(scope="session")
def clip(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small image's index."""
    path = tmp_path_factory.mktemp("clip") / "small image.clip"
    clipfs.build(image, path)
    return path


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that other users can look into, which pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="clipfs-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(params=VIEWS)
def view(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two views, for all mounts of a test."""
    chosen: str = request.param
    require_view(chosen)
    monkeypatch.setenv("CLIPFS_VIEW", chosen)
    return chosen


@pytest.fixture
def runtime(tmp_path: Path, public: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state and a cache directory of this test's own. Afterwards ends what still runs, and fails if anything did.

    Asks for `public` in order to be finished before that is removed.
    """
    directory = tmp_path / "run"
    monkeypatch.setenv("CLIPFS_STATE", str(directory))
    monkeypatch.setenv("CLIPFS_CACHE", str(tmp_path / "cache"))
    yield directory
    left = settled()
    for record in left:
        kill(record)
    clipfs.gc()
    assert left == []
    assert files(directory) == []
    places = (str(tmp_path), str(public))
    assert [entry.mountpoint for entry in mountinfo.entries() if entry.mountpoint.startswith(places)] == []


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    """An empty directory whose name is not plain."""
    place = tmp_path / "a place, with\\odd\tname"
    place.mkdir()
    return place
