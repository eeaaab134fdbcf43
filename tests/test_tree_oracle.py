"""The cases of `test_tree` unpacked by umoci: the same trees, but where umoci does not keep to the OCI image spec."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require_programs, require_root
from tests.images import LayoutBuilder
from tests.tars import Tar
from tests.test_tree import MERGES, WAYS, base
from tests.walks import listing, tree_of

# Where umoci, which applies entries one by one, has another opinion or none.
OTHER = {
    "a whiteout in a directory for a symlink": "it deletes through the symlink if that is not yet replaced",
    "a target deleted, then a hard link": "it fails, and does not if they come the other way round",
    "a hard link, its target deleted and replaced": "the same",
    "a hard link to what it is already": "it deletes the file and fails to link it",
    "aufs' books": "it keeps them as files",
    "a 0:0 device": "it makes it",
    "a 0:0 device for a file": "it makes it",
    "a 0:0 device for a directory": "it makes it",
    "a 0:0 device with two names": "it makes it",
}

CASES = {name: (base(), make()) for name, (make, _) in MERGES.items() if name not in OTHER}
CASES |= {f"{name} symlink": (lower, Tar().file(said, b"x")) for name, (lower, said, _) in WAYS.items()}


def test_every_exception_is_a_case() -> None:
    assert OTHER.keys() < MERGES.keys()


@pytest.mark.parametrize("name", CASES)
def test_umoci_unpacks_the_same_tree(name: str, tmp_path: Path) -> None:
    require_root()
    require_programs("umoci")
    lower, upper = CASES[name]
    LayoutBuilder(tmp_path / "oci").layer(lower, "none").layer(upper, "none").write("t")
    command = ["umoci", "raw", "unpack", "--image", f"{tmp_path}/oci:t", str(tmp_path / "root")]
    subprocess.run(command, check=True, capture_output=True, timeout=20)
    expected = re.sub(r"=\d", "=", listing(tree_of(lower, upper)))
    assert unpacked(tmp_path / "root") == expected


def unpacked(root: Path) -> str:
    """As `listing` has it, without the layers."""
    found = {os.fsencode(path.relative_to(root)): path for path in root.rglob("*")}
    # A directory's own entries come together, in the order of their bytes.
    return " ".join(_line(name, found[name]) for name in sorted(found, key=lambda name: name.split(b"/")))


def _line(name: bytes, path: Path) -> str:
    text, about = name.decode(), path.lstat()
    if stat.S_ISLNK(about.st_mode):
        return f"{text}->{os.readlink(path)}"  # verbatim, which Path.readlink is not
    if stat.S_ISDIR(about.st_mode):
        return f"{text}/"
    if not stat.S_ISREG(about.st_mode):
        return f"{text}*"
    return f"{text}=" if about.st_size else text
