"""What is read of an image before its command runs: the beginnings of files and of the interpreters that they name."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import clipfs
from clipfs.blocks import trace
from clipfs.blocks.counters import Counters
from clipfs.blocks.reader import BlockReader, Tiers
from clipfs.mounting.beginning import interpreter, read_beginnings
from clipfs.sources.fetcher import LayerFetcher
from tests.conftest import require_root
from tests.images import LayoutBuilder, Tar
from tests.mounts import SECONDS
from tests.patched_worker import patch_workers
from tests.streams import KB, MB, noise

pytest_plugins = ["tests.mount_fixtures"]


def elf(path: bytes, *, entry: int = 56, count: int = 2, offset: int | None = None) -> bytes:
    """A program of 64 bits as elf(5) has it, with a segment to load and one that names `path`."""
    at = 64 + 2 * 56 if offset is None else offset
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, entry, count, 0, 0, 0)
    load, interp = ((1, 0, 0), (3, at, len(path) + 1))
    return head + b"".join(struct.pack("<IIQQQQQQ", kind, 4, where, 0, 0, size, size, 1) for kind, where, size in
                           (load, interp)) + path + b"\0"  # fmt: skip


class TestInterpreter:
    def test_of_this_machines_shell(self) -> None:
        assert Path(os.fsdecode(interpreter(Path("/bin/sh").read_bytes()[: 128 * KB]))).is_file()

    @pytest.mark.parametrize(
        ("head", "path"),
        [
            (elf(b"/lib/ld.so.2"), b"/lib/ld.so.2"),
            (elf(b"/lib/ld.so.2", count=1), b""),
            (b"#!/bin/sh\n", b"/bin/sh"),
            (b"#! /usr/bin/env python3 -u\nimport x", b"/usr/bin/env"),
            (b"#!", b""),
            (b"#!\n/bin/sh", b""),
            (b"", b""),
            (b"\x7fELF\x01\x01" + bytes(100), b""),
            (noise(4096), b""),
        ],
    )
    def test_as_the_file_says(self, head: bytes, path: bytes) -> None:
        assert interpreter(head) == path

    @pytest.mark.parametrize("wrong", [{"entry": 0}, {"entry": 1}, {"count": 65_535}, {"offset": 1 << 60}])
    def test_a_hostile_program_names_none(self, wrong: dict[str, int]) -> None:
        assert interpreter(elf(b"/lib/ld.so.2", **wrong)) in (b"", b"/lib/ld.so.2")

    def test_a_program_that_is_cut_off(self) -> None:
        whole = elf(b"/lib/ld.so.2")
        assert all(whole[64 + 112 :].startswith(interpreter(whole[:size])) for size in range(len(whole)))


def image(directory: Path) -> str:
    """Files that are far from each other, for each is a layer of its own; that of the last is read by nobody."""
    made = LayoutBuilder(directory)
    files = {
        "bin/tool": elf(b"/lib/ld.so") + noise(MB),
        "lib/ld.so": noise(MB, 1),
        "bin/script": b"#!/bin/tool -x\n",
        "bin/mirror": b"#!/bin/mirror\n",
        "bin/empty": b"",
        "other": noise(MB, 2),
    }
    for name, data in files.items():
        made.layer(Tar().file(name, data), "none")
    links = Tar().symlink("usr/bin/tool", "../../bin/tool").symlink("bin/loop", "loop").dir("bin/directory")
    return made.layer(links, "none").config(cmd=["tool"]).write("latest")


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[tuple[clipfs.Index, BlockReader]]:
    name, clip = image(directory / "oci"), directory / "x.clip"
    await trio.to_thread.run_sync(clipfs.build, name, clip)
    with clipfs.Index.open(clip) as index, trio.fail_after(SECONDS):
        fetcher = LayerFetcher(index.source, index.manifest)
        async with fetcher, BlockReader(index, fetcher, counters=Counters.private(), tiers=Tiers(MB)) as reader:
            yield index, reader


@pytest.mark.parametrize(
    ("paths", "layers"),
    [
        (["/bin/tool"], {0, 1}),
        (["/usr/bin/tool"], {0, 1}),
        (["bin/script", "/bin/tool"], {0, 1, 2}),
        (["/bin/mirror"], {3}),
        (["/nowhere", "/bin/empty", "/bin/directory", "/bin/loop", "/bin/tool/x", "/lib/ld.so"], {1}),
        ([], set()),
    ],
)
async def test_files_and_their_interpreters_are_read(paths: list[str], layers: set[int], tmp_path: Path) -> None:
    async with opened(tmp_path) as (index, reader):
        await read_beginnings(index, reader, paths)
        assert {layer for layer, _ in reader.wanted} == layers
        assert reader.counters.asdict()["bytes_served"] <= len(layers) * 128 * KB


async def test_an_image_that_has_gone_is_no_error_of_theirs(tmp_path: Path) -> None:
    async with opened(tmp_path) as (index, reader):
        (tmp_path / "oci").rename(tmp_path / "gone")
        await read_beginnings(index, reader, ["/bin/tool"])
        with pytest.raises(clipfs.ClipfsError, match="is no OCI layout"):
            await reader.read(index.inode(index.resolve("/bin/tool")).address, 10)


PATCH = """
import os
from clipfs.mounting import session
async def told(index, reader, paths):
    os.write(os.open({path!r}, os.O_WRONLY), repr(paths).encode())
session.read_beginnings = told
"""


@pytest.mark.parametrize(
    ("prefetch", "traced", "told"),
    [("trace", False, "('/bin/tool', '/x')"), ("trace", True, ""), ("none", False, ""), ("all", False, "")],
)
def test_a_mount_is_told_of_them(
    prefetch: str, traced: bool, told: str, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes by a trace, if there is one, or by what else it was told to fetch."""
    require_root()
    clip, said = tmp_path / "x.clip", tmp_path / "said"
    said.touch()
    clipfs.build(image(tmp_path / "oci"), clip)
    with clipfs.Index.open(clip) as index:
        known = clipfs.state.cache_dir() / "traces" / f"{index.spans_digest}.trace"
    if traced:
        trace.save(known, [(0, 0)])
    patch_workers(monkeypatch, PATCH.format(path=str(said)))
    with clipfs.mount(clip, mountpoint, clipfs.MountOptions(prefetch=prefetch, first=("/bin/tool", "/x"))):
        assert (mountpoint / "bin" / "script").read_bytes() == b"#!/bin/tool -x\n"
    assert said.read_text() == told
