"""The Makefile's set-up, with programs in the place of Python and pip that only note that they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require_programs

SECONDS = 30
MAKEFILE = Path(__file__).parent.parent / "Makefile"

_PIP = """#!/bin/sh
echo begin >> log
sleep 0.2
echo end >> log
"""

# Of a version that is said in the environment; what it is to run, it runs with that.
_PYTHON = """#!/bin/sh
if [ "$1" = -m ]; then
    mkdir -p .venv/bin
    cp pip .venv/bin/
else
    exec python3 -c "import sys; sys.version_info = ($MINOR_VERSION,); $2"
fi
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with the Makefile and a name that is not plain, on a machine that has all of Debian's packages."""
    require_programs("make")
    place = tmp_path / "a check out"
    place.mkdir()
    shutil.copy(MAKEFILE, place)
    for name, content in (("pip", _PIP), ("python", _PYTHON), ("pyproject.toml", "")):
        (place / name).write_text(content)
        (place / name).chmod(0o755)
    (place / ".cache").mkdir()
    for name in ("system-packages", "system-packages-peers"):
        (place / ".cache" / name).touch()
    return place


def make(checkout: Path, *words: str, version: str = "3, 11") -> subprocess.CompletedProcess[str]:
    # Not as a part of the make that may have started us.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "PYTHON=./python", *words],
        cwd=checkout,
        env=environment | {"MINOR_VERSION": version},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def test_what_was_interrupted_is_taken_up_again(checkout: Path) -> None:
    """Ctrl-C while the virtual environment was made, which has a Python and no pip then."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to("/usr/bin/python3")
    done = make(checkout, "setup")
    assert (done.returncode, done.stderr) == (0, "")
    assert (checkout / "log").read_text() == "begin\nend\n"
    assert make(checkout, "setup").stdout == "", "there is nothing left to do"


def test_one_pip_at_a_time(checkout: Path) -> None:
    done = make(checkout, "-j", "4", ".venv/.installed-bench", ".venv/.installed-fuzz")
    assert done.returncode == 0, done.stderr
    assert (checkout / "log").read_text() == "begin\nend\n" * 3


def test_an_old_python_is_refused_before_anything_is_made_of_it(checkout: Path) -> None:
    done = make(checkout, "setup", version="3, 9")
    assert done.returncode != 0
    assert "./python is older than 3.11" in done.stderr
    assert not (checkout / ".venv").exists()
    assert make(checkout, "setup", version="3, 12").returncode == 0
