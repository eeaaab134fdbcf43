"""Fuzzing: inputs that nobody thought of, for every parser that a stranger's bytes reach.

Each target is a module here with

- ``one(data)``: give the input to the code. It returns, whatever the input; any exception that gets out is a finding;
- ``seeds()``: (name, input) of what to begin with; ``tests/fuzz/corpus/<target>`` holds them, and what was found since;
- ``mutate(data, change, chance)``: a new input out of an old one that gets past checksums, or past the JSON parser.
  `change` is the fuzzer's own way to mutate bytes, up to a length.

``make fuzz`` runs them for a given time, guided by coverage. What it finds is kept in ``tests/should_fail/<target>``,
and every run of the tests gives all of that, and the corpora, to the targets.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, cast

TARGETS = ("tar", "clip", "spans", "plan", "oci", "archive")

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
FOUND = HERE.parent / "should_fail"
# What runs have learnt on this machine.
STATE = HERE.parent.parent / ".cache" / "fuzz"

Change = Callable[[bytes, int], bytes]


class Target(Protocol):
    """What a target's module has. LIMIT: bytes of an input at most."""

    LIMIT: int

    def one(self, data: bytes) -> None: ...

    def seeds(self) -> Iterator[tuple[str, bytes]]: ...

    def mutate(self, data: bytes, change: Change, chance: random.Random) -> bytes: ...


def load(name: str) -> Target:
    """The target called so."""
    return cast("Target", importlib.import_module(f"tests.fuzz.{name}"))
