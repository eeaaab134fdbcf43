"""Runtime bundles: an image's configuration as umoci makes it, a root file system from somewhere, and runc."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.programs import SECONDS, first_output, run, unmount
from benchmarks.workload import Demo

# Images often come without them, and runc mounts on them.
_MOUNTED_ON = ("dev", "proc", "sys", "tmp")


class Bundle:
    """A bundle that runs our command, or another."""

    def __init__(self, path: Path, demo: Demo) -> None:
        self.path, self._demo = path, demo

    def unpack(self) -> None:
        """All of the image, the slow way."""
        run("umoci", "unpack", "--image", self._demo.image.removeprefix("oci:"), self.path)

    @contextmanager
    def over(self, lower: Path) -> Iterator[None]:
        """A kernel overlay on the mounted root file system of the image, as engines make it; gone afterwards."""
        upper, work, merged = (self.path / name for name in ("upper", "work", "rootfs"))
        for each in (work, merged, *(upper / name for name in _MOUNTED_ON)):
            each.mkdir(parents=True)
        config = self.path / "config.json"
        run("umoci", "raw", "runtime-config", "--image", self._demo.image.removeprefix("oci:"), config)
        run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", merged)
        try:
            yield
        finally:
            unmount(merged)
            shutil.rmtree(self.path)

    def command(self, command: Sequence[str]) -> None:
        """What runs from now on."""
        config = self.path / "config.json"
        spec = json.loads(config.read_bytes())
        spec["root"]["path"] = str(self.path / "rootfs")
        spec["process"] |= {"args": list(command), "terminal": False}
        config.write_text(json.dumps(spec))

    def first_output(self, patience: float = SECONDS) -> float:
        """Run it; when the first byte came, as a point of `time.perf_counter`."""
        name, state = f"clipfs-bench-{os.getpid()}", self.path.parent / "runc"
        command = ("runc", "--root", state, "run", "--bundle", self.path, name)
        try:
            return first_output(*command, patience=patience)
        finally:
            if (state / name).exists():
                run("runc", "--root", state, "delete", "--force", name)
