"""Bytes read through a mount beside those of the unpacked file, in every way and order, and by many at once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from random import Random

import pytest

import clipfs
from clipfs.blocks.plan import BLOCK
from tests.conftest import require_programs, require_root
from tests.images import Compression
from tests.judges import by_umoci, write
from tests.reads import WAYS, borders, compare
from tests.tars import Tar, pax_sparse

MB = 1 << 20
SECONDS = 60

# Without a disk cache, whatever the small memory has not must be fetched and decoded again. A zstd layer of one frame
# is decoded from its beginning each time, so it has the disk.
SMALL = clipfs.MountOptions(cache=8 * MB, cache_size=0, prefetch="none")
SMALL_ZSTD = clipfs.MountOptions(cache=8 * MB, prefetch="none")
DEFAULT = clipfs.MountOptions()


def mixed(size: int) -> bytes:
    """Stretches of noise, text and zeros, of any length."""
    chance, out = Random(7), bytearray()
    while len(out) < size:
        length = int(MB ** chance.uniform(0.5, 1.0))
        kind = chance.randrange(3)
        out += (chance.randbytes(length), b"line %07d\n" % len(out) * (length // 13), bytes(length))[kind]
    return bytes(out[:size])


@dataclass(frozen=True)
class Images:
    """The same image in two compressions, and what umoci makes of it."""

    clips: dict[Compression, Path]
    root: Path
    small: tuple[str, ...]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    require_root()
    require_programs("umoci")
    directory, chance = tmp_path_factory.mktemp("reads"), Random(8)
    small = tuple(f"small/{number}" for number in range(1000))
    lower = Tar().dir("small").dir("bin").file("before", b"b" * 777)
    for name in small[::2]:
        lower.file(name, chance.randbytes(chance.randrange(4000)))
    lower.file("big", mixed(56 * MB)).file("bin/sum", Path("/usr/bin/sha256sum").read_bytes(), mode=0o755)
    upper = Tar()
    for name in small[1::2]:
        upper.file(name, chance.randbytes(chance.randrange(4000)))
    holes = [(number * 70_001 + 5, chance.randbytes(512 * (1 + number % 90))) for number in range(100)]
    upper.raw(pax_sparse(b"sparse", 8 * MB + 3, holes, version="1.0"))
    names: dict[Compression, str] = {how: write([lower, upper], directory / "oci", how) for how in ("gzip", "zstd")}
    clips: dict[Compression, Path] = {}
    for how, name in names.items():
        clips[how] = directory / f"{how}.clip"
        clipfs.build(name, clips[how])
    return Images(clips, by_umoci(names["gzip"], directory / "root"), small)


@dataclass(frozen=True)
class Mounted:
    clip: Path
    top: Path
    root: Path
    ways: tuple[str, ...]


MOUNTS: dict[str, tuple[Compression, clipfs.MountOptions]] = {
    "gzip, small memory": ("gzip", SMALL),
    "gzip, small memory, fuse": ("gzip", replace(SMALL, view="fuse")),
    "gzip": ("gzip", DEFAULT),
    "zstd, small memory": ("zstd", SMALL_ZSTD),
    "zstd": ("zstd", DEFAULT),
    "zstd, fuse": ("zstd", replace(DEFAULT, view="fuse")),
}


@pytest.fixture(params=MOUNTS)
def mounted(
    request: pytest.FixtureRequest, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Mounted]:
    compression, options = MOUNTS[request.param]
    monkeypatch.setenv("CLIPFS_CACHE", str(tmp_path / "cache"))
    top = tmp_path / "mnt"
    top.mkdir()
    with clipfs.mount(images.clips[compression], top, options) as mount:
        # The kernel's view knows no direct I/O.
        ways = tuple(way for way in WAYS if mount.view == "fuse" or way != "direct")
        yield Mounted(images.clips[compression], top, images.root, ways)
    # As large as the image, for each test: pytest would keep them for a while.
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def test_twenty_thousand_preads(mounted: Mounted) -> None:
    with clipfs.Index.open(mounted.clip) as index:
        assert len(borders(index, "big")) >= 56 * MB // BLOCK
        assert len(borders(index, "sparse")) > 200
        compare(index, "big", mounted.top, mounted.root, "pread", 18_000, seed=1)
        compare(index, "sparse", mounted.top, mounted.root, "pread", 2_000, seed=2)


def test_other_ways_to_read(mounted: Mounted) -> None:
    with clipfs.Index.open(mounted.clip) as index:
        for path, way in product(("big", "sparse"), mounted.ways):
            compare(index, path, mounted.top, mounted.root, way, 400, seed=3)


def test_eight_processes_at_once(mounted: Mounted) -> None:
    """Each in its own way and its own order, all from a cold start."""
    arguments = [mounted.clip, "big", mounted.top, mounted.root]
    readers = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.reads",
                *map(str, arguments),
                mounted.ways[n % len(mounted.ways)],
                "300",
                str(n),
            ]
        )
        for n in range(8)
    ]
    try:
        assert [reader.wait(SECONDS) for reader in readers] == [0] * 8
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


def test_eight_threads_and_many_small_files(mounted: Mounted, images: Images) -> None:
    """Everybody reads every file, in an order of their own."""

    def read_all(seed: int) -> int:
        names = list(images.small)
        Random(seed).shuffle(names)
        return sum((mounted.top / name).read_bytes() == (mounted.root / name).read_bytes() for name in names)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read_all, range(8))) == [len(images.small)] * 8


def test_the_ends_of_files(mounted: Mounted) -> None:
    for path in ("big", "sparse", "before"):
        size = (mounted.root / path).stat().st_size
        with open(mounted.top / path, "rb", buffering=0) as file:
            last = os.pread(file.fileno(), 100, size - 3)
            assert (len(last), os.pread(file.fileno(), 100, size), os.pread(file.fileno(), 9, 1 << 40)) == (3, b"", b"")
            assert file.seek(0, os.SEEK_END) == size


def test_a_program_runs_from_the_mount_and_reads_it(mounted: Mounted) -> None:
    done = subprocess.run(
        [mounted.top / "bin" / "sum", mounted.top / "big"], capture_output=True, text=True, check=True, timeout=SECONDS
    )
    assert done.stdout.split()[0] == hashlib.sha256((mounted.root / "big").read_bytes()).hexdigest()
