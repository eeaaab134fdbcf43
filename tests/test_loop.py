"""The stand-in for trio that pyfuse3 gets: it behaves as trio does, only sooner."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyfuse3
import pytest
import trio

import clipfs
from clipfs.mounting import loop
from tests.conftest import require_root
from tests.patched_worker import patch_workers

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


async def test_who_waits_keeps_nobody_else_waiting(stand_in: loop._Trio) -> None:
    """It may wait in the kernel, and returns for whatever trio has to do: threads, deadlines, descriptors."""
    reading, writing = os.pipe()
    other, told = os.pipe()
    done: list[str] = []
    limit = trio.Event()

    async def serve() -> None:
        lock = stand_in.Lock()
        while True:
            async with lock:
                await stand_in.lowlevel.wait_readable(reading)
            os.read(reading, 1)
            done.append("request")

    async def thread() -> None:
        for _ in range(3):
            await trio.to_thread.run_sync(time.sleep, 0.01)
        done.append("thread")

    async def deadline() -> None:
        for _ in range(3):
            await trio.sleep(0.01)
        done.append("deadline")
        limit.set()

    async def descriptor() -> None:
        await trio.lowlevel.wait_readable(other)
        done.append("descriptor")

    def tell() -> None:
        time.sleep(0.02)
        os.write(writing, b"x")
        time.sleep(0.02)
        os.write(told, b"x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await trio.testing.wait_all_tasks_blocked()
        assert stand_in.lowlevel._blocking, "this trio has its epoll elsewhere"
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as others:
                for each in (thread, deadline, descriptor):
                    others.start_soon(each)
                others.start_soon(trio.to_thread.run_sync, tell)
            await limit.wait()
        nursery.cancel_scope.cancel()
    for end in (reading, writing, other, told):
        os.close(end)
    assert sorted(done) == ["deadline", "descriptor", "request", "thread"]


async def test_requests_in_a_row_are_one_turn_of_trio(stand_in: loop._Trio) -> None:
    """As long as nobody else has anything to do, also when each request comes a while after the last answer."""
    ours, theirs = socket.socketpair()
    steps = []

    class Counting(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            steps.append(task)

    async def serve() -> None:
        lock = stand_in.Lock()
        for _ in range(10 * loop._IN_A_ROW):
            async with lock:
                await stand_in.lowlevel.wait_readable(ours.fileno())
            ours.send(ours.recv(1))

    def ask() -> None:
        for _ in range(10 * loop._IN_A_ROW):
            theirs.send(b"x")
            assert theirs.recv(1) == b"x"

    with ours, theirs:
        client = threading.Thread(target=ask)
        trio.lowlevel.add_instrument(Counting())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            await trio.testing.wait_all_tasks_blocked()
            steps.clear()
            client.start()
        client.join()
    assert 10 <= len(steps) <= 30


async def test_without_trio_s_epoll_it_waits_as_trio_does(
    stand_in: loop._Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_events", lambda: None)
    reading, writing = os.pipe()
    async with trio.open_nursery() as nursery, stand_in.Lock():
        nursery.start_soon(trio.to_thread.run_sync, os.write, writing, b"x")
        await stand_in.lowlevel.wait_readable(reading)
    assert not stand_in.lowlevel._blocking
    os.close(reading)
    os.close(writing)


async def test_a_lock_is_for_others_when_its_owner_steps_aside(stand_in: loop._Trio) -> None:
    lock, order = stand_in.Lock(), []

    async def take(name: str) -> None:
        for _ in range(3):
            async with lock:
                order.append(name)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        async with lock:
            for name in "abc":
                nursery.start_soon(take, name)
            await trio.testing.wait_all_tasks_blocked()
            assert not order
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert "".join(order) in {a * 3 + b * 3 + c * 3 for a, b, c in itertools.permutations("abc")}


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
    patch_workers(monkeypatch, program.format(out=str(told)))
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
