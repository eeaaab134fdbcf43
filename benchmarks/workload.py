"""What is measured on: the demo image, and a generated one that has what benchmarks need.

Both are made once and kept, with the unpacked tree and the squashfs of the generated one, which are the peers' copies
of the same files. The generated image is the same on every machine: many small files in many directories and one
large one, text and noise mixed, in one gzip layer.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import progress
from benchmarks.programs import run
from tests.images import LayoutBuilder
from tests.tars import Tar

BIG = "big.bin"

# A directory of a package's modules has about as many files.
_A_DIRECTORY = 50

# Median and mean of 2 and 4 KB, with a long tail, as in Python's or Node's trees.
_SIZE_MU, _SIZE_SIGMA, _SIZE_MOST = 7.6, 1.2, 1 << 16

# The content is cut from pools at random places. They are larger than what any compressor here looks back on.
_POOL = 4 << 20
_PIECE = 1 << 16
# Of ten pieces of the large file, so many are text; the image's compression comes out at that of a usual layer.
_TEXT_OF_TEN = 7


@dataclass(frozen=True, slots=True)
class Size:
    """How much work there is: of the generated image, of each reader, and how often."""

    rounds: int = 5
    files: int = 60_000
    big: int = 1 << 30
    ordered: int = 8_000  # files read in the order of the tree
    shuffled: int = 2_000  # files read in no order
    random: int = 4_000  # reads of 4 KiB


QUICK = Size(rounds=2, files=2_000, big=32 << 20, ordered=1_000, shuffled=500, random=100)


@dataclass(frozen=True, slots=True)
class Demo:
    """An image that can be run.

    The command of the real one reads a good third of it: the interpreter, its libraries, and modules here and there.
    """

    image: str  # as ``oci:DIR:TAG``
    command: tuple[str, ...] = ("python3", "-c", "import json; print(json.dumps('hello'))")


@dataclass(frozen=True, slots=True)
class Workload:
    """Where everything is. `scratch` is this run's own, gone afterwards."""

    size: Size
    demo: Demo
    applications: Mapping[str, Demo]  # what is started from a registry, by name; all in one image
    generated: str  # an image, as ``oci:DIR:TAG``
    unpacked: Path
    squashfs: Path
    scratch: Path


def prepare(cache: Path, demo: Demo, applications: Mapping[str, Demo], size: Size, scratch: Path) -> Workload:
    """The workload, made now if it is not in `cache`."""
    place = cache / f"{size.files}-files-{size.big >> 20}-MiB"
    if not place.exists():
        aside = Path(tempfile.mkdtemp(prefix="build-", dir=cache))
        try:
            _make(aside, size)
            aside.rename(place)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return Workload(
        size, demo, applications, f"oci:{place}/oci:latest", place / "root", place / "root.squashfs", scratch
    )


def _make(place: Path, size: Size) -> None:
    progress("generating the benchmark image (once)")
    layout = place / "oci"
    layout.mkdir()
    name = LayoutBuilder(layout).layer(_layer(size), "gzip").write("latest")
    progress("unpacking it for the peers (once)")
    run("umoci", "raw", "unpack", "--image", name.removeprefix("oci:"), place / "root")
    # The better of its codecs, at its default level and block size.
    run("mksquashfs", place / "root", place / "root.squashfs", "-comp", "zstd", "-quiet", "-no-progress")


def _layer(size: Size) -> Tar:
    rng = random.Random(1)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(2000)]
    text = " ".join(rng.choices(words, k=_POOL // 6)).encode()
    noise = rng.randbytes(_POOL)

    def cut(pool: bytes, length: int) -> bytes:
        at = rng.randrange(len(pool) - length)
        return pool[at : at + length]

    tar = Tar()
    for number in range(size.files):
        directory = f"files/{number // _A_DIRECTORY:04}"
        if number % _A_DIRECTORY == 0:
            tar.dir(directory)
        length = min(int(rng.lognormvariate(_SIZE_MU, _SIZE_SIGMA)), _SIZE_MOST)
        tar.file(f"{directory}/{number:05}.txt", cut(text, length))
    pieces = range(size.big // _PIECE)
    tar.file(BIG, b"".join(cut(text if n % 10 < _TEXT_OF_TEN else noise, _PIECE) for n in pieces))
    return tar


def listing(workload: Workload, name: str, paths: list[str]) -> Path:
    """A list of paths as the reader wants it."""
    path = workload.scratch / f"{name}.list"
    path.write_text("\n".join(paths))
    return path


def small_files(workload: Workload) -> list[str]:
    """The small files, in the order of the tree."""
    return sorted(str(path.relative_to(workload.unpacked)) for path in workload.unpacked.glob("files/*/*"))
