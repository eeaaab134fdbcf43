"""A minute of what `make soak` does for as long as one likes, and that it would notice what it is there to notice."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import soak_reader
from tests.conftest import require_programs, require_root
from tests.soak import RATES, soak
from tests.soaked import Sample, Soaked, plot

pytest_plugins = ("tests.mount_fixtures",)

PLANNED = dict.fromkeys(RATES, 12)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("view", "runtime")
def test_a_minute_of_trouble(demo_image: str, tmp_path: Path, view: str) -> None:
    """Half of it in each view."""
    require_root()
    require_programs("docker-registry", "skopeo", "runc", "umoci")
    result = soak(demo_image, 0.5, tmp_path / "soak", view, seed=len(view))
    assert result.wrong == []
    assert result.view == view
    assert len(result.samples) >= 8
    pytest.importorskip("matplotlib")
    plot([result, result], tmp_path / "soak.svg")
    drawn = (tmp_path / "soak.svg").read_text()
    assert [title for title in (f"{view} view", "resident memory, MB", "minutes since") if title not in drawn] == []


# --- what its reader would notice


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree, and what it must be."""
    (tmp_path / "root" / "d").mkdir(parents=True)
    (tmp_path / "root" / "d" / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "root" / "link").symlink_to("d/file")
    (tmp_path / "root" / "proc").mkdir()
    return tmp_path / "root"


def _flip(root: Path) -> None:
    before = (root / "d" / "file").stat()
    with (root / "d" / "file").open("r+b") as file:
        file.seek(77_777)
        file.write(b"y")
    os.utime(root / "d" / "file", ns=(before.st_atime_ns, before.st_mtime_ns))


def _relink(root: Path) -> None:
    (root / "link").unlink()
    (root / "link").symlink_to("d/fila")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "one wrong byte": (_flip, "d/file: "),
    "a file that is cut off": (lambda root: os.truncate(root / "d" / "file", 99_999), "d/file: "),
    "a name that is missing": (lambda root: (root / "link").unlink(), "link: is not there"),
    "a name that nobody knows": (lambda root: (root / "d" / "more").touch(), "d/more: "),
    "another mode": (lambda root: (root / "d").chmod(0o700), "d: "),
    "another target": (_relink, "link: "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_its_reader_notices(damage: str, root: Path) -> None:
    right = soak_reader.fingerprints(str(root))
    (root / "proc" / "1").touch()
    assert soak_reader.differences(right, soak_reader.fingerprints(str(root))) == []
    spoil, said = DAMAGE[damage]
    spoil(root)
    assert any(each.startswith(said) for each in soak_reader.differences(right, soak_reader.fingerprints(str(root))))


def test_its_reader_ends_at_an_error(root: Path) -> None:
    """As a program of its own, which is how it gets into the container."""
    right = json.dumps(soak_reader.fingerprints(str(root)))
    (root / "d" / "file").unlink()
    (root / "d" / "file").symlink_to("/proc/self/mem")
    program = Path(soak_reader.__file__).read_text().replace("os.lstat", "os.stat")  # so that it opens that
    done = subprocess.run(
        [sys.executable, "-c", program, root], input=f"{right}\nagain\n", capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Error" in done.stderr


# --- what its judgement would notice


def _well() -> Soaked:
    """What comes of a mount that does well."""
    samples = [Sample(2.0 * n, 20_000_000, 12, 7, 60_000_000, 20, 2, 24 << 20) for n in range(24)]
    made = {what: [float(n) for n in range(12)] for what in PLANNED}
    return Soaked("fuse", PLANNED, 24 << 20, readings=5, code=0, made=made, samples=samples)


def _growing(**fields: int) -> Callable[[Soaked], None]:
    def grow(result: Soaked) -> None:
        result.samples = [
            dataclasses.replace(sample, **{name: getattr(sample, name) + n * step for name, step in fields.items()})
            for n, sample in enumerate(result.samples)
        ]

    return grow


TROUBLE: dict[str, tuple[Callable[[Soaked], object], str]] = {
    "wrong bytes": (lambda r: r.different.append("usr/x: y"), "what was read is not what is in the image: usr/x"),
    "nothing read": (lambda r: setattr(r, "readings", 1), "read 1 times"),
    "an error": (lambda r: setattr(r, "errors", "OSError: [Errno 5]"), "Errno 5"),
    "an exit code": (lambda r: setattr(r, "code", 1), "ended with 1"),
    "a record": (lambda r: r.left.append("MountRecord"), "these were left"),
    "no trouble": (lambda r: r.made.pop("kill"), "there were to be 12 of 'kill', and there were 0"),
    "a full disk": (_growing(cached=1 << 20), "the cache on disk"),
    "a supervisor that leaks memory": (_growing(supervisor_memory=1_000_000), "the supervisor's memory grew"),
    "a supervisor that leaks descriptors": (_growing(supervisor_descriptors=1), "the supervisor's descriptors grew"),
    "dead children": (_growing(processes=1), "processes grew"),
    "a worker that leaks memory": (_growing(worker_memory=2_000_000), "the last worker's memory grew"),
    "a worker that leaks descriptors": (_growing(worker_descriptors=4), "the last worker's descriptors grew"),
}


def test_a_mount_that_does_well_is_not_blamed() -> None:
    assert _well().wrong == []


@pytest.mark.parametrize("trouble", TROUBLE)
def test_it_notices(trouble: str) -> None:
    result = _well()
    spoil, said = TROUBLE[trouble]
    spoil(result)
    assert [sentence for sentence in result.wrong if said in sentence]
