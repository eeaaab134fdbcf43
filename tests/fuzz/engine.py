"""One target under atheris: ``python -m tests.fuzz.engine TARGET`` and libFuzzer's own arguments.

All of clipfs is imported under instrumentation, so that the fuzzer sees which branches an input takes.
"""

from __future__ import annotations

import random
import sys

import atheris


def main() -> None:
    name = sys.argv[1]
    with atheris.instrument_imports(include=["clipfs"]):
        from tests.fuzz import load

        target = load(name)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        return target.mutate(data, lambda part, room: bytes(atheris.Mutate(part, room)), random.Random(seed))[:most]

    atheris.Setup([sys.argv[0], *sys.argv[2:]], target.one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
