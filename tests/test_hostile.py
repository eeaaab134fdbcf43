"""The table of docs/security.md: every hostile input as a user would meet it, with outcome, time and memory.

With CLIPFS_WRITE_TABLES=1 the table is written anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import clipfs
from clipfs.format.container import CHECKSUM_OFFSET, HEADER, HEADER_SIZE, MAX_SECTIONS, SECTION
from tests.conftest import require_root
from tests.hostile import IMAGES
from tests.judges import layers, write

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "security.md"
BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"

# No case may need more; each takes a tenth of it on a machine that does nothing else.
SECONDS, MEGABYTES = 300, 80
# But for those that are about how much is kept of a layer's members at the same time.
MEMORY = {
    "a million members": 600,
    "ten million members": 1600,
    "a million hard links to one file": 600,
    "10,000 files with 250 KB of xattrs each": 600,
    "2,000 PAX headers of 100,000 records each": 150,
    "a sparse file of 100,000 pieces": 150,
    "1,000 sparse files of 100,000 pieces": 1800,
    "a manifest of 4 MB of empty lists": 250,
}

# Exit code, and what is said about it.
EXPECTED: dict[str, tuple[int, str]] = {
    "a member `../evil`": (65, "leads out of the root"),
    "a member `/etc/evil`": (0, "^$"),
    "a file through a symlink to `/`": (0, "^$"),
    "a file through a symlink to `../../..`": (0, "^$"),
    "a hard link to `../../etc/passwd`": (65, "leads out of the root"),
    "a hard link named `.`": (65, "only a directory can be the root"),
    "a symlink named `/`": (65, "only a directory can be the root"),
    "parents that are a loop of symlinks": (65, "too many symbolic links"),
    "a name of 256 bytes": (65, "255"),
    "a path of 10,000 bytes": (65, "4095|4096|longer"),
    "a NUL in a PAX path": (65, "NUL"),
    "a size of -1": (65, "its size, -1, is not between"),
    "a size of 2^63-1": (65, "is not between"),
    "a mode and an owner of 2^50": (65, "is not between"),
    "a file and a directory of one name": (0, "^$"),
    "devices 8:0 and 0:0": (0, "device 'none' is left out"),
    "xattrs `trusted.overlay.*`": (0, "is left out"),
    "1,000 xattrs on one file": (0, "^$"),
    "an xattr of 1 MiB": (65, "extended header has"),
    "a PAX header of 64 MiB": (65, "extended header has"),
    "a sparse file of 1 EiB": (65, "is not between"),
    "directories 78,000 deep, by way of symlinks": (65, "longer than Linux allows"),
    "an archive that is cut off": (65, "ends in the middle of a member"),
    "no archive at all": (65, "should have a number"),
    "a million members": (0, "^$"),
    "ten million members": (65, "take more than 2048 MiB"),
    "a million hard links to one file": (0, "^$"),
    "10,000 files with 250 KB of xattrs each": (65, "take more than 2048 MiB"),
    "2,000 PAX headers of 100,000 records each": (65, "take more than 2048 MiB"),
    "2,000 PAX headers of 1 MB": (0, "^$"),
    "a sparse file of 100,000 pieces": (0, "^$"),
    "1,000 sparse files of 100,000 pieces": (65, "take more than 2048 MiB"),
    "directories 100,000 deep": (65, "longer than Linux allows"),
    "a gzip bomb: 2 GB of zeros in 2 MB": (65, "should have digest"),
    "a zstd frame with a window of 2 GiB": (65, "needs a window of 2048 MiB"),
    "a digest that is a path": (65, "is no digest"),
    "a layer that is larger than its size": (69, "its descriptor says 7"),
    "a layer of another digest": (65, "should have digest"),
    "a layer of another diff_id": (65, "should have digest"),
    "a gzip layer that says it is plain": (0, "^$"),
    "a manifest of 100 MB": (65, "are not read"),
    "an index.json of 100 MB": (65, "are not read"),
    "a manifest of 4 MB of empty lists": (0, "^$"),
    "a manifest of 20,000 layers that are one": (65, "20000 layers; more than 1024 are not read"),
    "a config of 100 MB": (65, "are not read"),
    "a manifest of 100,000 nested lists": (65, "is no valid JSON"),
    "an index that holds itself": (65, "more than 4 deep"),
    "a blob that is a symlink to a file of the host": (69, "is a link out of the layout"),
    "a layout that is a pipe where a blob should be": (69, "is not a regular file"),
    "a layout whose index.json is a symlink to a file of the host": (69, "is a link out of the layout"),
    "an oci-archive with members that lead outside": (0, "^$"),
}


class Outcome(NamedTuple):
    code: int
    said: str
    seconds: float
    megabytes: float


# A process counts as its own what the one had that started it. So a small one starts it, and tells what it took.
_LAUNCHER = """
import os, sys
pid = os.posix_spawn(sys.executable, [sys.executable, "-m", "clipfs", *sys.argv[2:]], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as told:
    print(usage.ru_maxrss, usage.ru_utime + usage.ru_stime, file=told)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def outcome(told: Path, *command: str | Path) -> Outcome:
    """Run clipfs, and what it took: seconds of processors, and the most memory that was resident."""
    words = [sys.executable, "-S", "-c", _LAUNCHER, told, *command]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))},
    )  # fmt: skip
    kilobytes, seconds = map(float, told.read_text().split())
    return Outcome(done.returncode, done.stderr.strip(), seconds, kilobytes / 1000)


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, Outcome]]:
    """What the cases came to; at the end, in the document, if that is wanted."""
    found: dict[str, Outcome] = {}
    yield found
    if os.environ.get("CLIPFS_WRITE_TABLES"):
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{_markdown(found)}{END}{after}")


def _markdown(found: dict[str, Outcome]) -> str:
    lines = ["| input | exit code | what is said | CPU s | MB |", "| --- | ---: | --- | ---: | ---: |"]
    for name, each in found.items():
        lines.append(f"| {name} | {each.code} | {_plain(each.said)} | {each.seconds:.1f} | {each.megabytes:.0f} |")
    return "\n".join(lines) + "\n"


def _plain(said: str) -> str:
    """Without what differs from run to run, or is too long for a table."""
    said = re.sub(r"^clipfs: |/\S*/(?=blobs|x\.clip|image\.tar|i\b)", "", said)
    said = re.sub(r"[0-9a-f]{64}", lambda digest: digest[0][:8] + "…", said)
    return (said[:180] + " …" if len(said) > 180 else said).replace("|", "\\|").replace("\n", "; ") or "–"


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_no_honest_tool_makes(name: str, tmp_path: Path, table: dict[str, Outcome]) -> None:
    """One clear sentence, or an index that is sound; in bounded time and memory."""
    (tmp_path / "i").mkdir()
    image, clip = IMAGES[name](tmp_path / "i"), tmp_path / "x.clip"
    found = table[name] = outcome(tmp_path / "told", "index", image, "-o", clip)
    code, pattern = EXPECTED[name]
    assert (found.code, bool(re.search(pattern, found.said))) == (code, True), found
    assert "Traceback" not in found.said
    assert found.said.count("\n") == 0
    assert found.megabytes < MEMORY.get(name, MEGABYTES)
    assert clip.exists() == (code == 0)
    assert not (tmp_path / "evil").exists()
    if code == 0:
        checked = outcome(tmp_path / "told", "check", clip)
        assert (checked.code, checked.megabytes < MEMORY.get(name, MEGABYTES)) == (0, True), checked


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A .clip of everything."""
    directory = tmp_path_factory.mktemp("honest")
    clipfs.build(write(layers("kinds"), directory / "oci"), directory / "x.clip")
    return (directory / "x.clip").read_bytes()


def _repaired(data: bytes) -> bytes:
    """With the right checksums, as somebody who means harm would write them."""
    out = bytearray(data)
    count = HEADER.unpack_from(out, 0)[5]
    for number in range(min(count, MAX_SECTIONS)):
        at = HEADER.size + number * SECTION.size
        kind, flags, offset, size, _ = SECTION.unpack_from(out, at)
        digest = hashlib.sha256(out[offset : offset + size]).digest()
        SECTION.pack_into(out, at, kind, flags, offset, size, digest)
    out[CHECKSUM_OFFSET:HEADER_SIZE] = hashlib.sha256(out[:CHECKSUM_OFFSET]).digest()
    return bytes(out)


def _with(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + piece + data[at + len(piece) :]


def _root(data: bytes) -> int:
    return 32 * int.from_bytes(data[1024 + 14 : 1024 + 16], "little")


def _first_name(data: bytes) -> int:
    """Where the root's first name is, but for those that every directory has."""
    entries = _root(data) + 64
    return entries + int.from_bytes(data[entries + 2 * 12 + 8 : entries + 2 * 12 + 10], "little")


#: What is done to an honest .clip. The kernel would believe each of them.
CLIPS: dict[str, Callable[[bytes], bytes]] = {
    "a .clip that is empty": lambda data: b"",
    "a .clip cut off in its header": lambda data: data[:700],
    "a .clip cut off in the middle": lambda data: data[: len(data) // 2],
    "a .clip with a flipped bit": lambda data: _with(data, 5000, bytes([data[5000] ^ 1])),
    "a .clip of version 99": lambda data: _repaired(_with(data, 12, b"\x63\0\0\0")),
    "a .clip with 4 billion sections": lambda data: _repaired(_with(data, HEADER.size - 8, b"\xff" * 4)),
    "a .clip whose sections overlap": lambda data: _repaired(_with(data, HEADER.size + SECTION.size + 8, bytes(8))),
    "a .clip without EROFS": lambda data: _repaired(_with(data, 1024, bytes(4))),
    "a .clip with unknown EROFS features": lambda data: _repaired(_with(data, 1024 + 80, b"\xff\xff\xff\xff")),
    "a .clip whose root is nowhere": lambda data: _repaired(_with(data, 1024 + 14, b"\xff\xff")),
    "a .clip whose root is of 2^63 bytes": lambda data: _repaired(_with(data, _root(data) + 8, b"\xff" * 7 + b"\x7f")),
    "a .clip whose root is in itself": lambda data: _repaired(
        _with(data, _root(data) + 64 + 24, data[_root(data) + 64 : _root(data) + 72])
    ),
    "a .clip whose names are out of order": lambda data: _repaired(_with(data, _first_name(data), b"\xfe")),
    "a .clip with too many inodes": lambda data: _repaired(_with(data, 1024 + 16, b"\xff\0\0\0\0\0\0\0")),
}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_that_somebody_has_changed(name: str, honest: bytes, tmp_path: Path, table: dict[str, Outcome]) -> None:
    """It is refused before the kernel sees it, in either view."""
    require_root()
    changed = CLIPS[name](honest)
    assert changed != honest
    clip = tmp_path / "x.clip"
    clip.write_bytes(changed)
    (tmp_path / "mnt").mkdir()
    found = table[name] = outcome(tmp_path / "told", "mount", clip, tmp_path / "mnt")
    assert found.code == 65, found
    assert re.search(r"^clipfs: .*(is damaged|is not a \.clip|has format|needs features|EROFS|its )", found.said), found
    assert (found.said.count("\n"), "Traceback" in found.said) == (0, False)
    assert found.megabytes < MEGABYTES
    assert not os.path.ismount(tmp_path / "mnt")


def test_the_document_names_every_case() -> None:
    text = DOCUMENT.read_text()
    assert [name for name in (*IMAGES, *CLIPS) if f"| {name} |" not in text] == []
