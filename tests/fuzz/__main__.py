"""Runs the targets for a time each, guided by coverage: ``python -m tests.fuzz --seconds 60 [TARGET ...]``.

What a run found interesting is kept in ``--state``, so that the next one goes on from there. An input that does what it
must not is kept in ``--found``, under a name that says what it does; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from tests.fuzz import CORPUS, FOUND, HERE, STATE, TARGETS, load

_ROOT = HERE.parent.parent
# No input may take longer, or more memory, than this; honest ones of the same size take milliseconds, and 60 MB.
_SECONDS, _MEGABYTES = 20, 1024
# A target that fails this often in one run is left alone: what else there is to find hides behind that.
_FAILURES = 5

_COVERAGE = re.compile(r"cov: (\d+)")
_RUNS = re.compile(r"stat::number_of_executed_units: +(\d+)")


class Run(NamedTuple):
    """What one process did. coverage: branches that were seen, at the beginning and at the end; none if a
    seed failed."""

    executions: int
    coverage: list[int]
    artifacts: list[Path]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the parsers of clipfs.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all if none is given")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--state", type=Path, default=STATE, help="where to keep what was learnt")
    parser.add_argument("--found", type=Path, default=FOUND, help="where to keep inputs that fail")
    given = parser.parse_args(arguments)
    if unknown := set(given.targets) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    print(f"{'target':8}{'executions':>12}{'a second':>10}{'coverage':>10}{'new':>6}  findings", flush=True)
    findings = [fuzz(name, given.seconds, given.state, given.found) for name in given.targets or TARGETS]
    return int(any(findings))


def fuzz(name: str, seconds: int, state: Path, found: Path) -> set[str]:
    """Fuzz a target; prints a line, and returns the names of what was found."""
    executions, findings, coverage = 0, dict[str, Path](), list[int]()
    begun = time.monotonic()
    for _ in range(_FAILURES):
        left = seconds - int(time.monotonic() - begun)
        if left <= 0:
            break
        with tempfile.TemporaryDirectory() as directory:
            run = _run(name, left, state, Path(directory))
            executions += run.executions
            coverage += run.coverage
            for artifact in run.artifacts:
                if not artifact.name.startswith(("slow-", "timeout-")) or slow(name, artifact.read_bytes()):
                    what = keep(name, artifact, found)
                    findings.setdefault(what.name, what)
        if not run.artifacts:
            break
    rate = executions / max(1.0, time.monotonic() - begun)
    first, last = min(coverage, default=0), max(coverage, default=0)
    said = ", ".join(str(path) for path in findings.values()) or "none"
    print(f"{name:8}{executions:12,}{rate:10,.0f}{last:10,}{last - first:6,}  {said}", flush=True)
    return set(findings)


def _run(name: str, seconds: int, state: Path, artifacts: Path) -> Run:
    learnt, log = state / name, state / f"{name}.log"
    learnt.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "tests.fuzz.engine", name,
        f"-max_total_time={seconds}", f"-timeout={_SECONDS}", f"-rss_limit_mb={_MEGABYTES}",
        f"-max_len={load(name).LIMIT}", f"-artifact_prefix={artifacts}/", "-print_final_stats=1",
    ]  # fmt: skip
    words = HERE / f"{name}.dict"
    if words.exists():
        command.append(f"-dict={words}")
    seeds = [directory for directory in (learnt, CORPUS / name, FOUND / name) if directory.exists()]
    with log.open("wb") as out:
        done = subprocess.run([*command, *map(str, seeds)], cwd=_ROOT, stdout=out, stderr=out, check=False)
    text = log.read_text(errors="replace")
    found, runs, seen = sorted(artifacts.iterdir()), _RUNS.search(text), _COVERAGE.findall(text)
    if runs is None or (done.returncode and not found):
        sys.exit(f"fuzzing {name} did not work (exit code {done.returncode}); {log} ends in\n{text[-2000:]}")
    return Run(int(runs[1]), [int(each) for each in (*seen[:1], *seen[-1:])], found)


def keep(target: str, artifact: Path, found: Path) -> Path:
    """Keep an input that fails, unless one that fails in the same way is there already."""
    content = artifact.read_bytes()
    what = fault(target, content) if artifact.name.startswith("crash-") else artifact.name.partition("-")[0]
    directory = found / target
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob(f"{what}-????????"):
        return path
    path = directory / f"{what}-{hashlib.sha256(content).hexdigest()[:8]}"
    path.write_bytes(content)
    return path


class _TooSlow(BaseException):
    """Not an error that anything but `slow` would catch."""


def slow(target: str, content: bytes) -> bool:
    """Whether an input takes long by itself. The fuzzer goes by the clock, and on a busy machine all takes long."""

    def out_of_time(*_: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGPROF, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS / 4)
    try:
        load(target).one(content)
    except (_TooSlow, Exception):  # noqa: BLE001  one that fails is no better
        return True
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return False


def fault(target: str, content: bytes) -> str:
    """What goes wrong with an input, and where: ``KeyError-in-members._rdev``."""
    try:
        load(target).one(content)
    except Exception as error:  # noqa: BLE001  whatever it is, it is what was looked for
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_ROOT)] or list(frames)
        return f"{type(error).__name__}-in-{Path(ours[-1].filename).stem}.{ours[-1].name}"
    return "crash-not-repeatable"


if __name__ == "__main__":
    sys.exit(main())
