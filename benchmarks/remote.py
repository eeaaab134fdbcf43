"""What the benchmarks over a link have in common: a registry of their own, and ratarmount as a client of it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers import INDEXING_SECONDS
from benchmarks.programs import run, served
from tests.registry import Registry

ROUND_TRIP = 0.02
# Bytes a second: 24, 200 and 800 Mbit/s.
SLOW, USUAL, FAST = 3e6, 25e6, 100e6

# MiB between its seek points. By default 16, and then it reads and decodes as much again and again.
_SPACING = 1


@contextmanager
def registry_of_its_own(scratch: Path) -> Iterator[Registry]:
    """A registry that is gone afterwards, with all that was pushed to it."""
    place = scratch / "registry-of-its-own"
    place.mkdir()
    try:
        with Registry(place) as registry:
            yield registry
    finally:
        shutil.rmtree(place)


def upload(registry: Registry, repository: str, file: Path) -> str:
    """Put a file into a registry, as a blob; its path there."""
    with file.open("rb") as data:
        digest = f"sha256:{hashlib.file_digest(data, 'sha256').hexdigest()}"
    url = f"http://{registry.host}/v2/{repository}/blobs"
    answer = run("curl", "--silent", "--fail", "-X", "POST", "--dump-header", "-", f"{url}/uploads/")
    place = re.search(r"^location: (\S+)", answer, re.IGNORECASE | re.MULTILINE)
    assert place is not None, answer
    run("curl", "--silent", "--fail", "-X", "PUT", "-H", "Content-Type: application/octet-stream",
        "--upload-file", file, f"{place[1]}&digest={digest}")  # fmt: skip
    return f"/v2/{repository}/blobs/{digest}"


@contextmanager
def ratarmount(program: Path, url: str, index: Path, at: Path) -> Iterator[Path]:
    """A `.tar.gz` mounted by its URL; the index is made if it is not there."""
    command = (program, "-f", "--gzip-seek-point-spacing", str(_SPACING), "--index-file", index, url, at)
    with served(at, *command, seconds=INDEXING_SECONDS):
        os.listdir(at)
        yield at
