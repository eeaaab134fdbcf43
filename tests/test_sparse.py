"""Files with holes: four notations for one map, judged by GNU tar, and the maps that are refused."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from clipfs.errors import ImageError
from clipfs.layers.layer import Member
from clipfs.layers.members import MAX_SIZE
from tests.conftest import require_programs
from tests.tars import END, GNU, USTAR, gnu_sparse, header, padded, pax, pax_records, pax_sparse
from tests.walks import content, members, only, refused, walked

Pieces = Sequence[tuple[int, bytes]]

SHAPES: dict[str, tuple[int, Pieces]] = {
    "all hole": (1 << 20, []),
    "no bytes at all": (0, []),
    "hole first": (5000, [(4096, b"x" * 904)]),
    "hole last": (1 << 33, [(0, b"x" * 700)]),
    "pieces that touch": (1024, [(0, b"a" * 512), (512, b"b" * 512)]),
    "an empty piece": (900, [(0, b"a"), (100, b""), (512, b"b" * 10)]),
    "four, as many as a header holds": (9000, [(n * 2000, b"%d" % n * 500) for n in range(4)]),
    "sixty, with extension headers": (60 * 1024, [(n * 1024, bytes([n]) * 512) for n in range(60)]),
    "a thousand": (1000 * 1024, [(n * 1024, b"%04d" % n) for n in range(1000)]),
}


def written(size: int, pieces: Pieces, version: str) -> bytes:
    if version == "gnu":
        return gnu_sparse(b"sparse", size, pieces)
    return pax_sparse(b"sparse", size, pieces, version=version)


@pytest.mark.parametrize("version", ["gnu", "0.0", "0.1", "1.0"])
class TestMaps:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("step", [1 << 20, 511])
    def test_say_where_pieces_are(self, version: str, shape: str, step: int) -> None:
        size, pieces = SHAPES[shape]
        raw = written(size, pieces, version)
        layer = raw + header(b"after", size=5) + padded(b"after") + END
        member, after = walked(layer, step=step)
        assert isinstance(member, Member)
        assert isinstance(after, Member)
        assert (member.path, member.size) == (b"sparse", size)
        found = [(at, layer[offset : offset + length]) for at, offset, length in member.segments]
        assert found == merged(pieces)
        assert content(after, layer) == b"after"

    @pytest.mark.parametrize(
        ("size", "pieces", "sentence"),
        [
            (4096, [(512, b"a" * 512), (0, b"b" * 512)], "not in order"),
            (4096, [(0, b"a" * 512), (511, b"b" * 512)], "not in order"),
            (4096, [(0, b"a" * 512), (0, b"b" * 512)], "not in order"),
            (4096, [(4000, b"a" * 512)], "not in order within its 4096 bytes, at offset 4000"),
            (4096, [(1 << 32, b"a")], "not in order within its 4096 bytes"),
            (0, [(0, b"a")], "not in order within its 0 bytes"),
        ],
    )
    def test_that_are_out_of_order_or_bounds_are_refused(
        self, version: str, size: int, pieces: Pieces, sentence: str
    ) -> None:
        error = refused(lambda: walked(written(size, pieces, version) + END))
        assert sentence in str(error)
        assert error.member == b"sparse"

    def test_is_refused_wherever_the_archive_is_cut(self, version: str) -> None:
        raw = written(60 * 1024, SHAPES["sixty, with extension headers"][1], version)
        for at in range(512, len(raw), 512):
            error = refused(partial(walked, raw[:at]))
            assert "ends in the middle of a member" in str(error)


def merged(pieces: Pieces) -> list[tuple[int, bytes]]:
    """Pieces that touch become one, empty ones none."""
    found: list[tuple[int, bytes]] = []
    for at, data in pieces:
        if found and found[-1][0] + len(found[-1][1]) == at:
            found[-1] = (found[-1][0], found[-1][1] + data)
        elif data:
            found.append((at, data))
    return found


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=oldgnu"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ],
    ids=lambda options: options[-1],
)
def test_reads_what_gnu_tar_writes(options: list[str], tmp_path: Path) -> None:
    require_programs("tar")
    made = {b"all-hole": (1 << 20, []), b"few": (3 << 20, [(1 << 20, b"x" * 5000)])}
    made[b"many"] = (200 << 14, [(n << 14, bytes([n + 1]) * 4096) for n in range(200)])
    made[b"n" * 150] = (1 << 18, [(0, b"y")])
    for name, (size, pieces) in made.items():
        with (tmp_path / os.fsdecode(name)).open("wb") as file:
            for at, data in pieces:
                file.seek(at)
                file.write(data)
            file.truncate(size)
    command = [
        "tar",
        "-C",
        str(tmp_path),
        "--sparse",
        "--hole-detection=raw",
        *options,
        "-cf",
        "-",
        *map(os.fsdecode, made),
    ]
    layer = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=20).stdout
    found = members(layer)
    assert found.keys() == made.keys()
    for name, member in found.items():
        assert content(member, layer) == (tmp_path / os.fsdecode(name)).read_bytes()
        assert sum(length for _, _, length in member.segments) < max(member.size, 1)
    assert len(found[b"many"].segments) == 200


def old(
    pairs: bytes = b"", *, size: bytes = b"%011o\0" % 9, stored: int = 0, more: bytes = b"", magic: bytes = GNU
) -> bytes:
    """An old-GNU sparse header with any bytes in it, followed by extension blocks."""
    tail = bytes(41) + pairs.ljust(96, b"\0") + (b"\1" if more else b"\0") + size
    return header(b"s", typeflag=b"S", size=stored, magic=magic, tail=tail) + more


def said(records: Mapping[str, str], data: bytes = b"", size: int | None = None) -> bytes:
    return (
        pax(dict[str | bytes, str | bytes](records.items()))
        + header(b"s", size=len(data) if size is None else size)
        + padded(data)
    )


HUGE = str(MAX_SIZE + 1)
ONE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
ZERO = {"GNU.sparse.size": "9", "GNU.sparse.numblocks": "1"}
PAIR = b"%011o\0" % 0
ENDLESS = (b"%011o\0" % 0 * 42 + b"\1").ljust(512, b"\0")

REFUSED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "old: not GNU": ("not GNU's", lambda: old(magic=USTAR)),
    "old: negative size": ("its size, -1,", lambda: old(size=b"\xff" * 12)),
    "old: huge size": ("its size, ", lambda: old(size=b"\x80" + b"\x7f" * 11)),
    "old: size of letters": ("have a number", lambda: old(size=b"zz")),
    "old: negative offset": ("not in order", lambda: old(b"\xff" * 12 + PAIR)),
    "old: negative length": ("not in order", lambda: old(PAIR + b"\xff" * 12)),
    "old: huge length": ("not in order", lambda: old(PAIR + b"\x80" + b"\x7f" * 11)),
    "old: offset of letters": ("have a number", lambda: old(b"z" * 12 + PAIR)),
    "old: more stored than mapped": ("its sparse map is for 0 bytes, but 512", lambda: old(PAIR * 2, stored=512)),
    "old: less stored than mapped": ("its sparse map is for 8 bytes, but 0", lambda: old(PAIR + b"%011o\0" % 8)),
    "old: a map without end": ("more than 1048576 bytes", lambda: old(more=ENDLESS * 3000)),
    "1.0: no map": ("should have a number", lambda: said(ONE, bytes(512))),
    "1.0: nothing stored": ("longer than what is stored", lambda: said(ONE)),
    "1.0: half a block stored": ("longer than what is stored", lambda: said(ONE, b"0\n")),
    "1.0: more entries than lines": ("longer than what is stored", lambda: said(ONE, padded(b"2\n0\n1\n0\n"))),
    "1.0: a count of many digits": ("should have a number", lambda: said(ONE, b"9" * 512)),
    "1.0: a count of 10^19": ("longer than what", lambda: said(ONE, padded(b"9" * 19 + b"\n0\n"))),
    "1.0: negative count": ("should have a number", lambda: said(ONE, padded(b"-1\n"))),
    "1.0: negative offset": ("should have a number", lambda: said(ONE, padded(b"1\n-1\n1\n"))),
    "1.0: empty line": ("should have a number", lambda: said(ONE, padded(b"1\n\n1\n"))),
    "1.0: a map without end": ("more than 1048576 bytes", lambda: said(ONE, b"9999999\n" + b"0\n" * (1 << 20))),
    "1.0: a line without end": ("more than 1048576 bytes", lambda: said(ONE, b"1\n" + b"0" * (2 << 20))),
    "1.0: huge real size": ("its size, ", lambda: said({**ONE, "GNU.sparse.realsize": HUGE}, padded(b"0\n"))),
    "1.0: no real size": ("should have a number", lambda: said({**ONE, "GNU.sparse.realsize": ""}, padded(b"0\n"))),
    "1.0: negative real size": ("have a number", lambda: said({**ONE, "GNU.sparse.realsize": "-9"}, padded(b"0\n"))),
    "0.1: no count": ("should have a number", lambda: said({"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}, b"x")),
    "0.1: other count": ("as many entries", lambda: said({**ZERO, "GNU.sparse.map": "0,1,2,1"}, b"xx")),
    "0.1: odd": ("as many entries", lambda: said({**ZERO, "GNU.sparse.map": "0,1,2"}, b"xx")),
    "0.1: letters": ("have a number", lambda: said({**ZERO, "GNU.sparse.map": "a,b"}, b"xx")),
    "0.1: trailing comma": ("have a number", lambda: said({**ZERO, "GNU.sparse.map": "0,1,"}, b"x")),
    "0.1: count of 10^19": ("as many", lambda: said({"GNU.sparse.size": "9", "GNU.sparse.numblocks": "9" * 19})),
    "0.1: less stored": ("is for 1 bytes, but 0", lambda: said({**ZERO, "GNU.sparse.map": "0,1"})),
    "0.0: no pairs": ("as many entries", lambda: said({**ZERO})),
    "2.0": ("format '2.0'", lambda: said({"GNU.sparse.major": "2"})),
    "1.1": ("format '1.1'", lambda: said({**ONE, "GNU.sparse.minor": "1"})),
    "a version of 100 kB": ("format '9999", lambda: said({"GNU.sparse.major": "9" * 10**5})),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    sentence, make = REFUSED[name]
    before = header(b"fine", size=3) + padded(b"abc")
    raw = before + make()
    error = refused(lambda: walked(raw + END), memory=12 << 20)
    assert sentence in str(error)
    assert error.member == b"s"


@pytest.mark.parametrize("records", [{}, {"GNU.sparse.major": "0"}, {"GNU.sparse.realsize": "9"}])
def test_names_of_sparse_files_are_for_those_alone(records: dict[str | bytes, str | bytes]) -> None:
    """Go's archive/tar, and so every other tool for images, calls a member that is not sparse what its header says."""
    said = pax(records | {"GNU.sparse.name": "other"})
    assert only(said + header(b"name")).path == b"name"
    assert only(said + gnu_sparse(b"name", 9, [])).path == b"name"


def test_a_map_of_a_million_bytes_is_read_in_bounded_memory() -> None:
    pairs = 80_000
    numbers = ",".join(f"{n * 2},1" for n in range(pairs))
    raw = said(
        {"GNU.sparse.size": str(pairs * 2), "GNU.sparse.numblocks": str(pairs), "GNU.sparse.map": numbers}, bytes(pairs)
    )
    assert len(only(raw).segments) == pairs
    too_much = pax_records({"GNU.sparse.map": numbers + "0" * (1 << 20)})
    with pytest.raises(ImageError, match="no more than 1048576 are read"):
        walked(header(b"x", typeflag=b"x", size=len(too_much)) + padded(too_much) + END)
