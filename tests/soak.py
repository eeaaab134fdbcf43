"""A container reads and checksums its whole image again and again while everything around it fails.

``python -m tests.soak --minutes M [--plot FILE]``: 12 times a minute its worker is SIGKILLed at a moment of chance, it
is upgraded, the registry goes away for a second, the kernel forgets its caches, and what is kept on disk is at its cap.
Afterwards it says how often the image was read, that it was right each time, and how memory, descriptors and processes
were at the beginning and at the end. Exit code 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import clipfs
from clipfs import state
from clipfs.state import MountRecord
from tests.faults import FaultProxy
from tests.registry import Registry

ROOT = Path(__file__).parent.parent

#: Each minute's share.
KILLS, UPGRADES, FLAPS, FORGOTTEN = 12, 1, 6, 30
_AWAY_SECONDS = 1.0

# Of the few tens of megabytes that the image decodes to.
_MEMORY, _DISK = 8 << 20, 24 << 20

# For one reading of the image, whatever happens meanwhile.
_ROUND_SECONDS = 120

# In the container: one line with the digest of every name and every byte of the image, for each line that comes in.
_READER = """
import hashlib, os, sys
def digest():
    whole = hashlib.sha256()
    for top, directories, names in os.walk("/usr"):
        directories.sort()
        for name in sorted(names):
            path = os.path.join(top, name)
            whole.update(os.fsencode(path))
            if not os.path.islink(path):
                with open(path, "rb") as file:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
for line in sys.stdin:
    print(digest(), flush=True)
"""


@dataclass
class Sample:
    """At one moment. seconds: since the beginning. memory: resident bytes of both processes."""

    seconds: float
    memory: int
    descriptors: int
    cached: int


@dataclass
class Soaked:
    """What came of it."""

    digests: list[str] = field(default_factory=list)
    errors: str = ""
    code: int | None = None
    kills: int = 0
    upgrades: int = 0
    flaps: int = 0
    samples: list[Sample] = field(default_factory=list)
    left: list[MountRecord] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """A sentence for each thing that should not have been."""
        found = []
        if len(set(self.digests)) != 1:
            found.append(f"{len(self.digests)} readings of the image gave {len(set(self.digests))} digests")
        if self.code or self.errors:
            found.append(f"the container ended with {self.code} and said: {self.errors[-2000:]}")
        if self.left:
            found.append(f"these were left: {self.left}")
        first, last = self.samples[len(self.samples) // 4], self.samples[-1]
        if last.descriptors > first.descriptors + 8:
            found.append(f"descriptors grew from {first.descriptors} to {last.descriptors}")
        most = max(sample.cached for sample in self.samples)
        if most > 1.05 * _DISK:
            found.append(f"the cache on disk had {most} bytes, of {_DISK} allowed")
        return found


def soak(image: str, minutes: float, directory: Path, seed: int = 1) -> Soaked:
    """Let a container read `image` for so long. directory: for everything that is needed; its registry among it."""
    result = Soaked()
    (directory / "registry").mkdir(parents=True)
    with ExitStack() as stack:
        registry = stack.enter_context(Registry(directory / "registry"))
        registry.push(image, "soaked")
        proxy = stack.enter_context(FaultProxy(registry.host))
        clip = directory / "soaked.clip"
        clipfs.build(f"docker://{proxy.host}/soaked:latest", clip, insecure=True)
        container = stack.enter_context(_container(clip, directory))
        record = _mounted(container)
        trouble = threading.Thread(target=_trouble, args=(result, record, proxy, minutes * 60, seed, directory))
        trouble.start()
        try:
            while trouble.is_alive() or not result.digests:
                result.digests.append(_read(container))
        finally:
            trouble.join()
        result.digests.append(_read(container))
        _, result.errors = container.communicate(timeout=60)
        result.code = container.returncode
    result.left = state.records()
    return result


@contextmanager
def _container(clip: Path, directory: Path) -> Iterator[subprocess.Popen[str]]:
    options = ("--rm", "-i", "--insecure", "--prefetch", "none", "--cache-size", str(_DISK))
    places = ("--cache-dir", str(directory / "spans"), "--base", str(directory / "containers"))
    command = ["run", *options, *places, str(clip)]
    with subprocess.Popen(
        [sys.executable, "-m", "clipfs", *command, "python3", "-c", _READER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def _read(container: subprocess.Popen[str]) -> str:
    """Have the image read once; its digest, or nothing if the container has ended."""
    assert container.stdin is not None
    assert container.stdout is not None
    watchdog = threading.Timer(_ROUND_SECONDS, container.kill)
    watchdog.start()
    try:
        container.stdin.write("\n")
        container.stdin.flush()
        line = container.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        watchdog.cancel()
    if not line:
        raise SystemExit(f"the container ended: {container.communicate(timeout=60)[1]}")
    return line.strip()


def _mounted(container: subprocess.Popen[str]) -> MountRecord:
    """The mount that the container is on. When it has read something, it is there."""
    first = _read(container)
    assert first
    [record] = clipfs.mounts()
    return record


def _trouble(
    result: Soaked, record: MountRecord, proxy: FaultProxy, seconds: float, seed: int, directory: Path
) -> None:
    """Make it for so long, and look at the processes meanwhile."""
    chance, began = Random(seed), time.monotonic()
    events: list[tuple[float, str]] = []
    for what, rate in (("kill", KILLS), ("upgrade", UPGRADES), ("away", FLAPS), ("forget", FORGOTTEN)):
        count = max(1, round(rate * seconds / 60))
        slot = seconds / count
        events += [((number + chance.random()) * slot, what) for number in range(count)]
    events += [(at + _AWAY_SECONDS, "back") for at, what in events if what == "away"]
    for at, what in sorted(events):
        time.sleep(max(0.0, began + at - time.monotonic()))  # moments of chance are what this is about
        match what:
            case "kill":
                worker = _now(record).worker
                if worker is not None and worker.alive:
                    os.kill(worker.pid, signal.SIGKILL)
                    result.kills += 1
            case "upgrade":
                try:
                    clipfs.upgrade(record.mountpoint)
                    result.upgrades += 1
                except clipfs.MountError as error:
                    # A worker that was killed while another was getting ready is replaced by that.
                    if "has ended" not in str(error) and "keep dying" not in str(error):
                        raise
            case "away":
                proxy.down()
                result.flaps += 1
            case "back":
                proxy.up()
            case "forget":
                Path("/proc/sys/vm/drop_caches").write_text("3")
                result.samples.append(_sample(_now(record), time.monotonic() - began, directory))


def _now(record: MountRecord) -> MountRecord:
    return next((known for known in state.records() if known.process == record.process), record)


def _sample(record: MountRecord, seconds: float, directory: Path) -> Sample:
    memory = descriptors = 0
    for process in (record.process, record.worker):
        try:
            assert process is not None
            text = Path(f"/proc/{process.pid}/status").read_text()
            resident = [line.split()[1] for line in text.splitlines() if line.startswith("VmRSS")]
            memory += sum(map(int, resident)) << 10
            if process == record.process:
                descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
        except OSError:
            continue  # it has just been killed
    cached = 0
    for path in (directory / "spans").rglob("*"):
        try:
            cached += path.stat().st_size if path.is_file() and not path.name.endswith(".part") else 0
        except OSError:
            continue
    return Sample(seconds, memory, descriptors, cached)


def plot(result: Soaked, file: Path) -> None:
    """Memory, descriptors and cache over time."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    minutes = [sample.seconds / 60 for sample in result.samples]
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(8, 6), layout="constrained")
    for axis, title, values in (
        (axes[0], "resident memory of supervisor and worker, MB", [s.memory / 1e6 for s in result.samples]),
        (axes[1], "descriptors of the supervisor", [float(s.descriptors) for s in result.samples]),
        (axes[2], "cache on disk, MB", [s.cached / 1e6 for s in result.samples]),
    ):
        axis.plot(minutes, values, linewidth=1)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].axhline(_DISK / 1e6, linestyle=":", linewidth=1, color="black")
    axes[2].set_xlabel(f"minutes; {result.kills} kills, {result.upgrades} upgrades, {result.flaps} times no registry")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="A mount under permanent trouble.")
    parser.add_argument("--minutes", type=float, default=25.0, help="default: 25, which are 300 kills")
    parser.add_argument("--image", default=f"oci:{ROOT}/.cache/demo/oci:latest", help="default: the demo image")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory, descriptors and cache here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="clipfs-soak-") as scratch:
        for what in ("STATE", "CACHE"):
            os.environ[f"CLIPFS_{what}"] = str(Path(scratch) / what.lower())
        result = soak(args.image, args.minutes, Path(scratch))
    if args.plot:
        plot(result, args.plot)
    resident = [sample.memory / 1e6 for sample in result.samples]
    half = len(resident) // 2
    print(
        f"{len(result.digests)} readings of the whole image, all right; {result.kills} kills, {result.upgrades} "
        f"upgrades, {result.flaps} times no registry; resident at most {max(resident[:half]):.0f} MB in the first "
        f"half, {max(resident[half:]):.0f} MB in the second"
        if not result.wrong
        else "\n".join(itertools.chain(["soak: FAILED"], result.wrong))
    )
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
