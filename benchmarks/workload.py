"""What is measured on: the demo image, and a generated one that has what benchmarks need.

Both are made once and kept, with the peers' copies of the same files. The generated image is the same on every
machine: many small files in many directories and one large one, text and noise mixed, in one gzip layer.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
# To make these things takes longer than to measure anything.
_SECONDS = 900.0
# Of ten pieces of the large file, so many are text; the image's compression comes out at that of a usual layer.
_TEXT_OF_TEN = 7


@dataclass(frozen=True, slots=True)
class Size:
    """How much work there is: of the generated image, of each reader, and how often."""

    rounds: int = 5
    large: int = 3  # rounds of what reads all of the large file, or unpacks all of the image
    files: int = 60_000
    big: int = 1 << 30
    ordered: int = 8_000  # files read in the order of the tree
    shuffled: int = 2_000  # files read in no order
    random: int = 4_000  # reads of 4 KiB


QUICK = Size(rounds=2, large=1, files=2_000, big=32 << 20, ordered=1_000, shuffled=500, random=200)


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
    copies: Copies  # of the generated image
    zstd: Path  # its large file, as zstd compresses it by default
    kept: Path  # what may stay for the next run
    scratch: Path

    @property
    def unpacked(self) -> Path:
        return self.copies.tree

    @property
    def squashfs(self) -> Path:
        return self.copies.squashfs


@dataclass(frozen=True, slots=True)
class Copies:
    """The same tree for every peer, each in the form that it likes. archive: gzip, as ratarmount reads it."""

    tree: Path
    squashfs: Path
    erofs: Path
    ext4: Path
    archive: Path


def prepare(cache: Path, demo: Demo, applications: Mapping[str, Demo], size: Size, scratch: Path) -> Workload:
    """The workload, made now if it is not in `cache`."""
    place = cache / f"{size.files}-files-{size.big >> 20}-MiB"
    layout = _once(place / "oci", lambda to: _generate(to, size))
    image = f"oci:{layout}:latest"
    found = copies(image, place)
    zstd = _once(place / "big.zst", lambda to: _run("zstd", "-q", found.tree / BIG, "-o", to))
    return Workload(size, demo, applications, image, found, zstd, cache, scratch)


def _generate(layout: Path, size: Size) -> None:
    layout.mkdir()
    LayoutBuilder(layout).layer(_layer(size), "gzip").write("latest")


def copies(image: str, place: Path) -> Copies:
    """An image's tree in all its forms, made now where they are not in `place` yet; minutes, for a large one."""
    made = Copies(*(place / name for name in ("root", "root.squashfs", "root.erofs", "root.ext4", "root.tar.gz")))
    forms: dict[Path, Callable[[Path], object]] = {
        made.tree: lambda to: _run("umoci", "raw", "unpack", "--image", image.removeprefix("oci:"), to),
        # The better of its codecs, at its default level and block size.
        made.squashfs: lambda to: _run("mksquashfs", made.tree, to, "-comp", "zstd", "-quiet", "-no-progress"),
        made.erofs: lambda to: _run("mkfs.erofs", "--quiet", to, made.tree),
        made.ext4: lambda to: _run("mkfs.ext4", "-q", "-N", "200000", "-d", made.tree, to, _room(made.tree)),
        made.archive: lambda to: _run("sh", "-c", 'tar -C "$1" -cf - . | pigz -6 >"$2"', "sh", made.tree, to),
    }
    for path, make in forms.items():
        _once(path, make)
    return made


def copies_of(workload: Workload, image: str) -> Copies:
    """Copies of another image, which are kept by what tells it from others."""
    layout, _, _ = image.removeprefix("oci:").rpartition(":")
    digest = hashlib.sha256((Path(layout) / "index.json").read_bytes()).hexdigest()
    return copies(image, workload.kept / f"image-{digest[:12]}")


def _room(tree: Path) -> str:
    """The size of an ext4 that has room for a tree."""
    used = int(_run("du", "-s", "--block-size=1M", tree).split()[0])
    return f"{used * 5 // 4 + 200}M"


def _once(path: Path, make: Callable[[Path], object]) -> Path:
    """Have it made if it is not there; halves are never there."""
    if not path.exists():
        progress(f"making {path.name} (once)")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as aside:
            make(Path(aside) / path.name)
            (Path(aside) / path.name).rename(path)
    return path


_run = partial(run, seconds=_SECONDS)


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
