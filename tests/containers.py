"""What the assembler's tests share: a tiny root file system, a read-only mount of it, a look at what is left.

The fixtures that go with it are in `tests.container_fixtures`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import assembler
import clipfs
from assembler import kernel

# Any wait of these tests; what they wait for takes a hundredth.
SECONDS = 30


CONFIG = clipfs.ImageConfig(raw=b"{}", os="linux", architecture="amd64", diff_ids=())

_TOOLS = (
    "cat", "chmod", "echo", "env", "grep", "head", "hostname", "id", "ls", "md5sum", "mkdir", "mkfifo", "mknod", "pwd",
    "rm", "sh", "sleep", "stat", "stty", "tail", "touch", "true", "tty", "wc", "yes",
)  # fmt: skip


def busybox_root(root: Path) -> Path:
    """A root file system without any of the directories that a container needs. Its busybox must be a static one."""
    binaries = root / "bin"
    binaries.mkdir(parents=True)
    shutil.copy("/bin/busybox", binaries / "busybox")
    for tool in _TOOLS:
        (binaries / tool).symlink_to("busybox")
    etc = root / "etc"
    etc.mkdir()
    (etc / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n\nbroken line\napp:x:1000:1000::/home/app:/bin/sh\n")
    (etc / "group").write_text("root:x:0:\napp:x:1000:\nwheel:x:10:root,app\nextra:x:77:app\n")
    return root


@contextlib.contextmanager
def read_only(directory: Path, at: Path) -> Iterator[Path]:
    """`directory` as a mount that cannot be written to, as a ClipFS is one."""
    at.mkdir()
    subprocess.run(["mount", "--bind", directory, at], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", at], check=True)
        yield at
    finally:
        # Lazily: the traceback of a test that fails has files open there.
        subprocess.run(["umount", "--lazy", at], check=True)


@contextlib.contextmanager
def clean_base(base: Path) -> Iterator[Path]:
    """A base directory after whose use nothing may be left, and in any case nothing is."""
    try:
        yield base
        assert leftovers(base) == []
    finally:
        assembler.gc(base, kept=True)


# What somebody else has left on this machine, before these tests began.
_FOREIGN = frozenset(Path("/sys/fs/cgroup").rglob("clipfs-*"))


def leftovers(base: Path) -> list[str]:
    """Mounts, directories and cgroups of containers below `base`, and children of this process."""
    found = [f"mount {each}" for each in kernel.mounts_below(base)]
    if base.exists():
        found += [f"directory {each}" for each in base.iterdir() if each.name != ".clipfs.lock"]
    # One with processes in it is somebody else's: those of ours would have been found by now.
    for group in set(Path("/sys/fs/cgroup").rglob("clipfs-*")) - _FOREIGN:
        with contextlib.suppress(OSError):
            found += [] if (group / "cgroup.procs").read_text() else [f"cgroup {group}"]
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        found.append("a child process")
    return found


class Ran(NamedTuple):
    """What came of a container."""

    code: int
    out: str
    err: str = ""


class Box:
    """Runs containers through the library: ``box("id", "-u", user="app")``. `config` is the image's."""

    def __init__(self, lower: Path, base: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.lower = lower
        self.base = base
        self.config = CONFIG
        self._capture = capture

    def __call__(self, *command: str, on_started: Callable[[int], None] = lambda _: None, **options: Any) -> Ran:
        wanted = assembler.RunOptions(command=command, remove=True, **options)
        self._capture.readouterr()
        code = assembler.run(self.lower, self.config, wanted, self.base, on_started=on_started)
        return Ran(code, *self._capture.readouterr())


class Cli:
    """Runs the command in processes of its own: ``cli("run", "--rm", root, "true")``."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._started: list[subprocess.Popen[bytes]] = []

    def words(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "clipfs", *map(str, words)]

    def __call__(self, *words: str | Path, input: bytes | None = None, cwd: Path | None = None) -> Ran:  # noqa: A002
        given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
        done = subprocess.run(
            self.words(*words), capture_output=True, timeout=SECONDS, check=False, env=self.env, cwd=cwd, **given
        )
        return Ran(done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr))

    def start(self, *words: str | Path, by: tuple[str, ...] = (), **how: Any) -> subprocess.Popen[bytes]:
        """Start it and do not wait; its streams are pipes unless `how` says otherwise."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen([*by, *self.words(*words)], env=self.env, **{**pipes, **how})
        self._started.append(process)
        return process

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "CLIPFS_CONTAINERS": str(self.base), "PYTHONPATH": str(Path(__file__).parent.parent)}

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.wait(SECONDS)
            for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
