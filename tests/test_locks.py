"""Locks on spans: between the tasks of a process and between processes, and when their holder dies."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
import threading
from pathlib import Path

import pytest

from clipfs.blocks.locks import SpanLocks

SECONDS = 20
FORK = multiprocessing.get_context("fork")
ONE, OTHER = (hashlib.sha256(name).digest() for name in (b"one", b"other"))


def test_one_holder_here_and_elsewhere(tmp_path: Path) -> None:
    locks, others = SpanLocks(tmp_path / "locks"), SpanLocks(tmp_path / "locks")
    assert locks.take(ONE)
    assert not locks.take(ONE)
    assert not others.take(ONE)
    assert others.take(OTHER)
    locks.release(ONE)
    assert others.take(ONE)
    assert not locks.take(ONE)


def test_who_waits_waits_for_one_lock(tmp_path: Path) -> None:
    locks = SpanLocks(tmp_path / "locks")
    assert locks.take(ONE)
    assert locks.take(OTHER)
    waiting = [threading.Thread(target=locks.wait, args=(ONE,)) for _ in range(3)]
    for thread in waiting:
        thread.start()
    locks.release(OTHER)
    waiting[0].join(0.05)
    assert all(thread.is_alive() for thread in waiting)
    locks.release(ONE)
    for thread in waiting:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in waiting)
    assert locks.take(ONE), "who has waited holds nothing"


def test_the_dead_hold_nothing(tmp_path: Path) -> None:
    path, taken = tmp_path / "locks", FORK.Event()

    def die() -> None:
        locks = SpanLocks(path)
        assert locks.take(ONE)
        taken.set()
        signal.pause()

    process = FORK.Process(target=die)
    process.start()
    try:
        assert taken.wait(SECONDS)
        locks = SpanLocks(path)
        assert not locks.take(ONE)
    finally:
        process.kill()
        process.join(SECONDS)
    locks.wait(ONE)
    assert locks.take(ONE)


def test_an_end_lets_go_of_all(tmp_path: Path) -> None:
    locks = SpanLocks(tmp_path / "locks")
    assert locks.take(ONE)
    del locks
    assert SpanLocks(tmp_path / "locks").take(ONE)


def test_nothing_is_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "locks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        SpanLocks(tmp_path / "locks").take(ONE)
    assert not (tmp_path / "elsewhere").exists()
