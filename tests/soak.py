"""A container reads and checks its whole image again and again while everything around it fails.

``python -m tests.soak --minutes M [--view VIEW] [--plot FILE]``: 12 times a minute its worker is SIGKILLed at a moment
of chance, it is upgraded, the registry goes away for a second, the kernel forgets its caches, and what is kept on disk
is at its cap. Each reading is compared with what another tool has unpacked: every byte, name and attribute. In the last
part nobody kills the worker, so that one that leaks has the time to be seen.

Afterwards it says how often the image was read, and how memory, descriptors and processes were. Exit code 1 if anything
was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import clipfs
from clipfs import state
from clipfs.state import MountRecord
from tests import soak_reader
from tests.faults import FaultProxy
from tests.leftovers import Places, nothing_left_behind
from tests.registry import Registry
from tests.soaked import Sample, Soaked, plot

ROOT = Path(__file__).parent.parent

#: Each minute's share.
RATES = {"kill": 12, "upgrade": 1, "away": 6, "forget": 30}
_AWAY_SECONDS = 1.0
# Of the time, for kills and upgrades.
_TROUBLED = 0.85

# For what is kept on disk, of the few tens of megabytes that the image decodes to.
_DISK = 24 << 20

# For one reading of the image, whatever happens meanwhile.
_ROUND_SECONDS = 180

_VIEWS = ("kernel", "fuse")


class SoakError(Exception):
    """It cannot go on."""


def soak(image: str, minutes: float, directory: Path, view: str, seed: int = 1) -> Soaked:
    """Let a container read `image` for so long. directory: for everything that is needed; its registry among it."""
    planned = {what: max(1, round(rate * minutes)) for what, rate in RATES.items()}
    result = Soaked(view, planned, _DISK)
    (directory / "registry").mkdir(parents=True)
    right = _unpacked(image, directory / "unpacked")
    with ExitStack() as stack:
        registry = stack.enter_context(Registry(directory / "registry"))
        registry.push(image, "soaked")
        proxy = stack.enter_context(FaultProxy(registry.host))
        clip = directory / "soaked.clip"
        clipfs.build(f"docker://{proxy.host}/soaked:latest", clip, insecure=True)
        container = stack.enter_context(_container(clip, directory, view))
        _tell(container, right)
        result.different += _read(container)  # when it has read something, the mount is there
        [record] = clipfs.mounts()
        assert record.view == view
        with ThreadPoolExecutor(1) as pool:
            trouble = pool.submit(_trouble, result, record, proxy, minutes * 60, seed, directory)
            while not trouble.done():
                result.different += _read(container)
                result.readings += 1
            trouble.result()
        result.different += _read(container)
        result.readings += 1
        _, result.errors = container.communicate(timeout=60)
        result.code = container.returncode
    result.left = [str(record) for record in state.records()]
    return result


def _unpacked(image: str, directory: Path) -> str:
    """What must be in the image, according to umoci."""
    words = ["umoci", "raw", "unpack", "--image", image.removeprefix("oci:"), str(directory)]
    subprocess.run(words, check=True, timeout=_ROUND_SECONDS, stdout=subprocess.DEVNULL)
    return json.dumps(soak_reader.fingerprints(str(directory)))


@contextmanager
def _container(clip: Path, directory: Path, view: str) -> Iterator[subprocess.Popen[str]]:
    options = ("--rm", "-i", "--insecure", "--prefetch", "none", "--cache-size", str(_DISK), "--view", view)
    places = ("--cache-dir", str(directory / "spans"), "--base", str(directory / "containers"))
    reader = Path(soak_reader.__file__).read_text()
    with subprocess.Popen(
        [sys.executable, "-m", "clipfs", "run", *options, *places, str(clip), "python3", "-B", "-c", reader],
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


def _tell(container: subprocess.Popen[str], line: str) -> None:
    assert container.stdin is not None
    container.stdin.write(f"{line}\n")
    container.stdin.flush()


def _read(container: subprocess.Popen[str]) -> list[str]:
    """Have the image read once; what is different."""
    assert container.stdout is not None
    watchdog = threading.Timer(_ROUND_SECONDS, container.kill)
    watchdog.start()
    try:
        _tell(container, "again")
        line = container.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        watchdog.cancel()
        watchdog.join()
    if not line:
        raise SoakError(f"the container ended: {container.communicate(timeout=60)[1]}")
    different: list[str] = json.loads(line)
    return different


def _trouble(
    result: Soaked, record: MountRecord, proxy: FaultProxy, seconds: float, seed: int, directory: Path
) -> None:
    """Make it for so long, and look at the processes meanwhile."""
    began = time.monotonic()
    for at, what in _events(result.planned, seconds, Random(seed)):
        time.sleep(max(0.0, began + at - time.monotonic()))  # moments of chance are what this is about
        if _happened(what, record, proxy):
            result.made.setdefault(what, []).append(time.monotonic() - began)
        if what == "forget" and (sample := _sample(_now(record), time.monotonic() - began, directory)):
            result.samples.append(sample)


def _events(planned: dict[str, int], seconds: float, chance: Random) -> list[tuple[float, str]]:
    """What happens when: at a moment of chance in each of as many slots as it is planned times."""
    events: list[tuple[float, str]] = []
    for what, count in planned.items():
        slot = (_TROUBLED if what in ("kill", "upgrade") else 1.0) * seconds / count
        events += [((number + chance.random()) * slot, what) for number in range(count)]
    # Absences may touch, but not overlap.
    away = sorted(at for at, what in events if what == "away")
    ends = [min(at + _AWAY_SECONDS, after) for at, after in zip(away, [*away[1:], seconds + 1], strict=True)]
    return sorted([*events, *((at, "back") for at in ends)])


def _happened(what: str, record: MountRecord, proxy: FaultProxy) -> bool:
    match what:
        case "kill":
            worker = _now(record).worker
            if worker is None or not worker.alive:
                return False
            os.kill(worker.pid, signal.SIGKILL)
        case "upgrade":
            try:
                clipfs.upgrade(record.mountpoint)
            except clipfs.MountError as error:
                # A worker that was killed while another was getting ready is replaced by that.
                if "has ended" not in str(error) and "keep dying" not in str(error):
                    raise
                return False
        case "away":
            proxy.down()
        case "back":
            proxy.up()
        case "forget":
            Path("/proc/sys/vm/drop_caches").write_text("3")
    return True


def _now(record: MountRecord) -> MountRecord:
    return next((known for known in state.records() if known.process == record.process), record)


def _sample(record: MountRecord, seconds: float, directory: Path) -> Sample | None:
    """None if the worker has just been killed."""
    assert record.worker is not None
    supervisor, worker = record.process.pid, record.worker.pid
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    try:
        held = (_memory(worker), len(os.listdir(f"/proc/{worker}/fd")))
    except (OSError, ValueError):
        return None
    return Sample(
        seconds, _memory(supervisor), len(os.listdir(f"/proc/{supervisor}/fd")), worker, *held, 1 + len(children),
        _cached(directory / "spans"),
    )  # fmt: skip


def _memory(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    [resident] = [int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("VmRSS")]
    return resident


def _cached(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() and not path.name.endswith(".part") else 0
        except OSError:
            continue
    return total


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="A mount under permanent trouble.")
    parser.add_argument("--minutes", type=float, default=25.0, help="in all; default: 25, which are 300 kills")
    parser.add_argument(
        "--view", choices=(*_VIEWS, "both"), default="both", help="default: both, half of the time each"
    )
    parser.add_argument("--image", default=f"oci:{ROOT}/.cache/demo/oci:latest", help="default: the demo image")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what the processes held here")
    args = parser.parse_args(argv)
    views = _VIEWS if args.view == "both" else (args.view,)
    results, wrong = list[Soaked](), list[str]()
    with tempfile.TemporaryDirectory(prefix="clipfs-soak-") as scratch:
        places = Places(*(Path(scratch) / name for name in ("base", "state", "tmp", "cache/scratch")))
        for name, path in (("STATE", places.state), ("CACHE", places.scratch.parent)):
            os.environ[f"CLIPFS_{name}"] = str(path)
        places.temporary.mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(places.temporary)
        try:
            for view in views:
                with nothing_left_behind(places):
                    results.append(soak(args.image, args.minutes / len(views), places.base / view, view))
        except (SoakError, AssertionError, clipfs.ClipfsError, OSError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
        tempfile.tempdir = None
    wrong += [sentence for result in results for sentence in result.wrong]
    if args.plot and results:
        plot(results, args.plot)
    for result in results:
        print(_summary(result))
    print("\n".join(["soak: FAILED", *wrong]) if wrong else "not one byte wrong, no error, nothing left behind")
    return 1 if wrong else 0


def _summary(result: Soaked) -> str:
    late = result.samples[-len(result.samples) // 4 :]
    return (
        f"{result.view} view: {result.readings} readings of the whole image; {result.count('kill')} kills, "
        f"{result.count('upgrade')} upgrades, {result.count('away')} times no registry; at last, resident "
        f"{max(s.supervisor_memory for s in late) / 1e6:.0f} MB in the supervisor and "
        f"{max(s.worker_memory for s in late) / 1e6:.0f} MB in the worker, {max(s.processes for s in late)} processes"
    )


if __name__ == "__main__":
    sys.exit(main())
