"""Fixtures for tests of real containers, by library and by command, with proof that nothing is left of them.

A pytest plugin: modules that run containers name it in `pytest_plugins`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import clipfs
from tests.conftest import require_programs, require_root
from tests.containers import Box, Cli, busybox_root, clean_base, read_only
from tests.images import LayoutBuilder
from tests.mounts import in_view


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny root file system. Not to be written to."""
    require_root()
    require_programs("busybox", "runc", "crun")
    return busybox_root(tmp_path_factory.mktemp("busybox") / "root")


@pytest.fixture(scope="session")
def tree_layer(tree: Path) -> bytes:
    """The same as a layer."""
    return subprocess.run(["tar", "-C", tree, "-c", "bin", "etc"], stdout=subprocess.PIPE, check=True).stdout


@pytest.fixture(scope="session")
def tree_clip(tree_layer: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an image's index."""
    directory = tmp_path_factory.mktemp("busybox-image")
    path = directory / "busybox.clip"
    clipfs.build(LayoutBuilder(directory / "oci").layer(tree_layer).config().write(), path)
    return path


@pytest.fixture(scope="module")
def v1(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A lower of the old kind: it was unpacked, and is read-only."""
    with read_only(tree, tmp_path_factory.mktemp("v1") / "root") as mounted:
        yield mounted


@pytest.fixture(scope="module")
def v2_kernel(tree_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A lower of the new kind, in the kernel's view."""
    with in_view("kernel", tree_clip, tmp_path_factory.mktemp("v2")) as root:
        yield root


@pytest.fixture(scope="module")
def v2_fuse(tree_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A lower of the new kind, by FUSE."""
    with in_view("fuse", tree_clip, tmp_path_factory.mktemp("v2")) as root:
        yield root


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """Where containers live; afterwards none is left there."""
    with clean_base(tmp_path / "containers") as directory:
        yield directory


@pytest.fixture
def box(v1: Path, base: Path, capfd: pytest.CaptureFixture[str]) -> Box:
    """Containers on the unpacked tree."""
    return Box(v1, base, capfd)


@pytest.fixture
def cli(base: Path) -> Iterator[Cli]:
    """The command; processes that a test started have ended when it has."""
    cli = Cli(base)
    try:
        yield cli
    finally:
        cli.end()
