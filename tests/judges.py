"""All cases by name, written as images, and what each must look like by the judge it has: umoci or GNU tar."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.cases import UMOCI, Layers
from tests.disputed import PLAIN, TAR
from tests.images import Compression, LayoutBuilder
from tests.oracle import Picture, picture

__all__ = ["CASES", "COMPRESSIONS", "UMOCI_READS", "by_umoci", "expected", "layers", "write"]

CASES = [*UMOCI, *TAR, *PLAIN]

# zstd layers came to umoci with 0.4.8; their trees are judged by what it makes of the same layers gzipped.
UMOCI_READS: tuple[Compression, ...] = ("none", "gzip", "pigz", "multi-gzip")
COMPRESSIONS: tuple[Compression, ...] = (*UMOCI_READS, "zstd", "zstd-frames")


def layers(name: str) -> Layers:
    """Of the case with this name."""
    if name in TAR:
        return [TAR[name].make()]
    return PLAIN[name].make() if name in PLAIN else UMOCI[name]()


def write(layers: Layers, directory: Path, compression: Compression = "gzip") -> str:
    """Make an image of these layers; its name. One directory can hold all compressions."""
    builder = LayoutBuilder(directory)
    for layer in layers:
        builder.layer(layer, compression)
    return builder.config().write(compression)


def expected(name: str, directory: Path, compression: Compression = "gzip") -> Picture:
    """What the case must look like, by its judge, who works in the new `directory`."""
    directory.mkdir()
    root = directory / "root"
    if name in TAR:
        root.mkdir()
        command = ["tar", "-C", str(root), "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", "-"]
        subprocess.run(command, input=TAR[name].make().done(), check=True, capture_output=True, timeout=20)
        return picture(root)
    said = PLAIN[name].plainly() if name in PLAIN else UMOCI[name]()
    return picture(by_umoci(write(said, directory / "oci", compression), root))


def by_umoci(image: str, target: Path) -> Path:
    """Unpack ``oci:DIR:TAG`` into `target`, which is returned. CalledProcessError if umoci will not."""
    command = ["umoci", "raw", "unpack", "--image", image.removeprefix("oci:"), str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    return target
