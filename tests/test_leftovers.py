"""That the fixture which looks for leftovers after every test sees each kind: each is left on purpose here."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from clipfs.mounting import kernel
from tests.conftest import require_root
from tests.leftovers import Places, nothing_left_behind


@contextmanager
def _a_mount(places: Places, here: Path) -> Iterator[None]:
    require_root()
    (here / "mnt").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "left", here / "mnt"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", here / "mnt"], check=True)


@contextmanager
def _a_loop_device(places: Places, here: Path) -> Iterator[None]:
    require_root()
    (here / "disk").write_bytes(bytes(1 << 16))
    with (here / "disk").open("rb") as file, kernel.loop_device(file.fileno()):
        yield


@contextmanager
def _a_process(places: Places, here: Path) -> Iterator[None]:
    """A grandchild, as daemons are."""
    started = subprocess.run(
        ["sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!"], stdout=subprocess.PIPE, text=True, check=True
    )
    try:
        yield
    finally:
        os.kill(int(started.stdout), 9)


@contextmanager
def _a_process_without_environment(places: Places, here: Path) -> Iterator[None]:
    """As one that gets no secrets: its arguments tell."""
    code = "import os, signal; print(os.getpid(), flush=True); os.close(1); signal.pause()"
    started = subprocess.run(
        ["sh", "-c", 'env -i "$1" -c "$2" "$3" 2>/dev/null &', "sh", sys.executable, code, places.state],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    try:
        yield
    finally:
        os.kill(int(started.stdout), 9)


@contextmanager
def _a_child(places: Places, here: Path) -> Iterator[None]:
    child = subprocess.Popen("true")
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    try:
        yield
    finally:
        child.wait()


@contextmanager
def _a_socket(places: Places, here: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(here / "s"))
        yield


@contextmanager
def _a_listener(places: Places, here: Path) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)):
        yield


@contextmanager
def _a_descriptor(places: Places, here: Path) -> Iterator[None]:
    with (here / "file").open("w"):
        yield


@contextmanager
def _a_temporary_file(places: Places, here: Path) -> Iterator[None]:
    with tempfile.NamedTemporaryFile():
        yield


@contextmanager
def _state(places: Places, here: Path) -> Iterator[None]:
    record = places.state / "1-1.json"
    record.touch()
    try:
        yield
    finally:
        record.unlink()


@contextmanager
def _scratch(places: Places, here: Path) -> Iterator[None]:
    places.scratch.mkdir(exist_ok=True)
    (places.scratch / "spool").touch()
    try:
        yield
    finally:
        (places.scratch / "spool").unlink()


KINDS = {
    "mount": _a_mount,
    "loop device": _a_loop_device,
    "process": _a_process,
    "process ": _a_process_without_environment,
    "child process": _a_child,
    "socket": _a_socket,
    "descriptor": _a_listener,
    "descriptor ": _a_descriptor,
    "temporary file": _a_temporary_file,
    "state": _state,
    "temporary file ": _scratch,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_is_seen(kind: str, places: Places, tmp_path: Path) -> None:
    with contextlib.ExitStack() as later:
        left: AbstractContextManager[None] = KINDS[kind](places, tmp_path)
        with pytest.raises(AssertionError, match=f"left behind: .*{kind.strip()}"), nothing_left_behind(places, 0.1):
            later.enter_context(left)
    with nothing_left_behind(places):
        pass  # it was there before, or is gone


def test_what_is_forgiven(places: Places, tmp_path: Path) -> None:
    with contextlib.ExitStack() as later, nothing_left_behind(places) as forgiven:
        later.enter_context(_a_descriptor(places, tmp_path))
        kept = later.pop_all()
        forgiven.add("descriptor")
    kept.close()


def test_the_fixture_is_used_by_every_test(request: pytest.FixtureRequest) -> None:
    assert "_nothing_left_behind" in request.fixturenames
