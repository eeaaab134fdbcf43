"""The stand-in for trio that pyfuse3 gets: it behaves as trio does, only sooner."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pyfuse3
import pytest
import trio

import clipfs
from clipfs.mounting import child, loop
from tests.conftest import require_root

pytest_plugins = ["tests.mount_fixtures"]

SECONDS = 20


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> loop._Trio:
    monkeypatch.setattr(pyfuse3, "trio", trio)
    assert loop.install()
    found: object = vars(pyfuse3)["trio"]
    assert isinstance(found, loop._Trio)
    return found


async def test_what_is_readable_is_not_waited_for(stand_in: loop._Trio) -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, b"x")
        ran = []

        async def other() -> None:
            ran.append(True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(loop._IN_A_ROW - 1):
                await stand_in.lowlevel.wait_readable(reading)
            assert not ran, "nobody else had a turn"
            for _ in range(loop._IN_A_ROW + 1):
                await stand_in.lowlevel.wait_readable(reading)
            assert ran, "and now they had"
    finally:
        os.close(reading)
        os.close(writing)


async def test_what_is_not_readable_is_waited_for(stand_in: loop._Trio) -> None:
    reading, writing = os.pipe()
    try:
        with trio.move_on_after(0.05) as scope:
            await stand_in.lowlevel.wait_readable(reading)
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stand_in.lowlevel.wait_readable, reading)
            await trio.testing.wait_all_tasks_blocked()
            os.write(writing, b"x")
    finally:
        os.close(reading)
        os.close(writing)


async def test_a_lock_is_one(stand_in: loop._Trio) -> None:
    lock, inside, order = stand_in.Lock(), 0, []

    async def enter(number: int) -> None:
        nonlocal inside
        async with lock:
            inside += 1
            assert inside == 1
            order.append(number)
            await trio.lowlevel.checkpoint()
            inside -= 1

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(enter, number)
    assert sorted(order) == [0, 1, 2, 3, 4]


def test_all_else_is_trio(stand_in: loop._Trio) -> None:
    assert stand_in.open_nursery is trio.open_nursery
    assert stand_in.ClosedResourceError is trio.ClosedResourceError
    assert stand_in.lowlevel.current_task is trio.lowlevel.current_task
    with pytest.raises(AttributeError):
        stand_in.nonesuch  # noqa: B018


def test_another_pyfuse3_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other = object()
    monkeypatch.setattr(pyfuse3, "trio", other)
    assert not loop.install()
    assert vars(pyfuse3)["trio"] is other


@pytest.mark.usefixtures("runtime")
def test_a_mount_uses_it(clip: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it asks for no more of trio than what was looked at: a new pyfuse3 that does is looked at again."""
    require_root()
    program = """
import atexit, pyfuse3
from clipfs.mounting import loop
asked = set()
class Recording(loop._Trio):
    def __getattribute__(self, name):
        asked.add(name)
        return super().__getattribute__(name)
loop._Trio = Recording
@atexit.register
def tell():
    with open({out!r}, "w") as out:
        print(*sorted(name for name in asked if not name.startswith("__")), pyfuse3.trio.lowlevel._turns, file=out)
"""
    told = tmp_path / "asked"
    monkeypatch.setattr(child, "PROGRAM", "tests.patched_worker")
    monkeypatch.setenv("CLIPFS_TEST_PATCH", program.format(out=str(told)))
    with clipfs.mount(clip, mountpoint, clipfs.MountOptions(view="fuse")):
        for name in range(2000):
            assert not (mountpoint / str(name)).exists()
    *asked, turns = told.read_text().split()
    assert set(asked) <= {"Lock", "lowlevel", "open_nursery", "ClosedResourceError", "from_thread", "WouldBlock"}
    assert {"Lock", "lowlevel"} <= set(asked)
    assert int(turns) >= 2000


@pytest.mark.usefixtures("runtime")
def test_the_loop_stays_awake_under_load(clip: Path, mountpoint: Path) -> None:
    """Signals are taken and reads are answered while somebody asks without a pause."""
    require_root()
    with clipfs.mount(clip, mountpoint, clipfs.MountOptions(view="fuse")) as mounted:
        program = "import os, sys\ni = 0\nwhile True:\n  i += 1\n  os.path.exists(f'{sys.argv[1]}/{i}')"
        storm = subprocess.Popen([sys.executable, "-c", program, mountpoint])
        try:
            for _ in range(20):
                assert (mountpoint / "hello").read_bytes() == b"hello\n"
            began = time.monotonic()
            mounted.unmount(force=True)
            assert time.monotonic() - began < SECONDS / 2
        finally:
            storm.kill()
            storm.wait()
