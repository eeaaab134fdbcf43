"""The benchmarks, all of them, on next to nothing: they run, what they say is sane, and nothing stays."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import measure, programs, report, starting
from benchmarks.measure import CLIPFS, Row, Section
from benchmarks.workload import Demo, Size, prepare
from tests.conftest import require, require_programs, require_root
from tests.images import LayoutBuilder
from tests.tars import Tar

TINY = Size(rounds=1, files=60, big=2 << 20, ordered=40, shuffled=20, random=20)
ROWS = {
    "indexing": 2,
    "mounting": 2,
    "running": 3,
    "starting_cold": 6,
    "reading": 16,
    "views": 15,
    "requests": 3,
    "streaming": 1,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def sections(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Section]:
    """All benchmarks run once, with an image that is started as fast as one can be."""
    require_root()
    require(Path("/proc/sys/vm/drop_caches").exists(), "a way to drop the kernel's caches")
    require_programs("curl", "docker-registry", "fio", "mksquashfs", "runc", "skopeo", "squashfuse_ll", "umoci")
    require_programs("fuse-overlayfs", "mkfs.erofs", "mkfs.ext4")
    layer = Tar().dir("bin").file("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755)
    image = LayoutBuilder(tmp_path_factory.mktemp("demo")).layer(layer).write()
    demo = Demo(image, ("/bin/busybox", "echo", "hello"))
    return benchmarks.measure(demo, {"busybox": demo}, TINY, list(benchmarks.BENCHMARKS), cache, None)


def rows_of(sections: list[Section]) -> list[Row]:
    return [row for section in sections for row in section.rows]


def test_every_benchmark_measures_all_of_its_peers(sections: list[Section]) -> None:
    found = dict(zip(benchmarks.BENCHMARKS, sections, strict=True))
    assert {name: len(section.rows) for name, section in found.items() if section.rows} == ROWS
    for row in rows_of(sections):
        assert {CLIPFS, row.beside} <= set(row.samples), row
        for values in row.samples.values():
            assert len(values) == TINY.rounds, row
            assert all(0 < value < 1e7 for value in values), row
        assert row.why or not row.falls_short, f"{row.name} falls short and nobody is told why"


def test_the_size_of_an_index_is_within_its_budget(demo_image: str, cache: Path, tmp_path: Path) -> None:
    section = starting.size(prepare(cache, Demo(demo_image), {}, TINY, tmp_path))
    demo = dict(zip(section.header, section.lines[0], strict=True))
    assert demo["image"] == "demo image"
    assert 64 < float(demo["of it the tree"].removesuffix(" B")) <= 140
    assert float(demo["spans, windows"].removesuffix("%")) <= 0.3
    assert float(demo["zstd -19, of the layers"].removesuffix("%")) <= 1


def test_the_page_shows_every_row(sections: list[Section]) -> None:
    page = report.readme(sections, TINY.rounds)
    for row in rows_of(sections):
        assert f"| {row.name}, {row.unit} " in page
        assert (f"- {row.name}: " in page) == row.falls_short
    assert "squashfuse 0" in page
    assert "](benchmarks.svg)" in page


def test_the_picture_shows_every_row(sections: list[Section], tmp_path: Path) -> None:
    require(find_spec("matplotlib") is not None, "matplotlib, of the extra 'bench'")
    from benchmarks import plot

    rows = rows_of(sections)
    plot.draw(rows, tmp_path / "picture.svg")
    svg = (tmp_path / "picture.svg").read_text()
    assert len(re.findall(r">(?:[\d.]+× (?:faster|slower)|about the same)<", svg)) == len(rows)


def test_a_run_leaves_only_what_it_keeps(sections: list[Section], cache: Path) -> None:
    assert sections
    assert [path.name for path in cache.iterdir()] == ["60-files-2-MiB"]


def test_what_is_mounted_in_a_scratch_directory_is_not_removed_with_it(tmp_path: Path) -> None:
    require_root()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("precious")
    with programs.scratch_directory(tmp_path / "cache") as scratch:
        (scratch / "mnt").mkdir()
        programs.run("mount", "--bind", tmp_path / "kept", scratch / "mnt")
    assert not scratch.exists()
    assert (tmp_path / "kept" / "file").read_text() == "precious"


def test_a_peer_that_fails_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    require_root()
    require_programs("squashfuse_ll")
    (tmp_path / "mnt").mkdir()
    (tmp_path / "no.squashfs").write_bytes(b"not one")
    with (
        pytest.raises(SystemExit, match="did not mount"),
        programs.squashfuse_mount(tmp_path / "no.squashfs", tmp_path / "mnt"),
    ):
        pytest.fail("mounted what is no file system")
    with pytest.raises(SystemExit, match=r"ended with 3: sorry"):
        programs.run("sh", "-c", "echo sorry >&2; exit 3")
    with pytest.raises(SystemExit, match="printed nothing, or failed"):
        programs.first_output("true")


def test_peers_take_turns() -> None:
    order: list[str] = []
    peers = {name: lambda name=name: order.append(name) for name in "abc"}
    measure.rounds(3, "turns", peers)
    assert "".join(order) == "abcbcacab"


@pytest.mark.parametrize(
    ("unit", "ours", "theirs", "words"),
    [
        ("s", [1.0, 1.0, 9.0], [2.0, 2.0, 2.0], "2.00× as fast"),
        ("s", [2.0], [1.0], "**falls short: 2.00× slower**"),
        ("MB/s", [300.0], [100.0], "3.00× as fast"),
        ("MB/s", [100.0], [1234.0], "**falls short: 12.3× slower**"),
        ("files/s", [100.0], [105.0], "the same"),
    ],
)
def test_ratios_are_told_in_words(unit: str, ours: list[float], theirs: list[float], words: str) -> None:
    row = Row("reading", unit, {CLIPFS: ours, "other": theirs}, "other", "read", "It is far away.")
    assert row.words() == words
    page = report.readme([Section.of("Reading", "text", [row])], 1)
    assert ("It is far away." in page) == words.startswith("**")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.012"), (0.5, "0.50"), (1.234, "1.23"), (56.78, "56.8"), (123.4, "123"), (45678, "45,700")],
)
def test_numbers_have_three_digits_that_count(value: float, text: str) -> None:
    assert measure.number(value) == text


def test_the_command_line_explains_itself() -> None:
    command = [sys.executable, "-m", "benchmarks"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=20, check=True).stdout
    assert all(name in shown for name in benchmarks.BENCHMARKS)
    wrong = subprocess.run([*command, "--only", "all"], capture_output=True, text=True, timeout=20)
    assert wrong.returncode == 2
