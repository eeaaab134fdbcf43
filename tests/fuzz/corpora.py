"""The corpora in the repository: ``python -m tests.fuzz.corpora`` writes the seeds of each target anew, and ``--learn``
adds what fuzzing has found since, as few and as small inputs as take every way through the code that is known.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz import CORPUS, STATE, TARGETS, Target, load

_CODE = str(Path(__file__).parents[2] / "clipfs")

# What a file costs, however short it is.
_FILE = 500

# From one line to the next one in a file.
Way = tuple[str, int, int]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.corpora", description=__doc__)
    parser.add_argument("--learn", action="store_true", help="add what fuzzing has found")
    parser.add_argument("--state", type=Path, default=STATE, help="where `python -m tests.fuzz` has put that")
    given = parser.parse_args()
    for name in TARGETS:
        write_seeds(name)
        if given.learn:
            print(f"{name}: {learn(name, given.state / name)} inputs added", flush=True)


def write_seeds(name: str) -> None:
    directory = CORPUS / name
    directory.mkdir(parents=True, exist_ok=True)
    for title, content in load(name).seeds():
        (directory / file_name(title)).write_bytes(content)


def file_name(title: str) -> str:
    """What the seed called `title` is called as a file."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", title).strip("-")


def learn(name: str, learnt: Path) -> int:
    """Add to the corpus what takes ways that nothing in it takes, most ways a byte first; returns how many."""
    target, known = load(name), set[Way]()
    for path in (CORPUS / name).iterdir():
        known |= ways(target, path.read_bytes())
    contents = [path.read_bytes() for path in learnt.iterdir()]
    open_ways = [(content, ways(target, content) - known) for content in contents]
    added = 0
    while open_ways := [(content, new - known) for content, new in open_ways if new - known]:
        content, new = max(open_ways, key=lambda each: len(each[1]) / (len(each[0]) + _FILE))
        known |= new
        added += 1
        (CORPUS / name / f"learnt-{hashlib.sha256(content).hexdigest()[:12]}").write_bytes(content)
    return added


def ways(target: Target, content: bytes) -> set[Way]:
    """The ways through the code that an input takes."""
    taken = set[Way]()

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(_CODE):
            return None
        last = 0

        def follow(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                taken.add((file, last, frame.f_lineno))
                last = frame.f_lineno
            return follow

        return follow

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        target.one(content)
    finally:
        sys.settrace(before)
    return taken


if __name__ == "__main__":
    main()
