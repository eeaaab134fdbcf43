"""Counters in a file: what another process finds there. What is counted when is a matter of who reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipfs.blocks.counters import NAMES, Counters
from clipfs.errors import ClipfsError


def test_names_are_those_of_the_numbers(tmp_path: Path) -> None:
    counters = Counters.create(tmp_path / "counters")
    counters.hit(1 << 40)
    seen = Counters.open(tmp_path / "counters")
    assert tuple(seen.asdict()) == NAMES
    assert seen.asdict()["bytes_served"] == 1 << 40
    with pytest.raises(TypeError):
        seen.hit(1)
    seen.close()
    counters.close()


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"short")
    with pytest.raises(ClipfsError, match="holds no counters"):
        Counters.open(tmp_path / "short")
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ClipfsError, match="cannot read counters from"):
            Counters.open(path)
    with pytest.raises(ClipfsError, match="cannot keep counters in"):
        Counters.create(tmp_path / "absent" / "counters")
