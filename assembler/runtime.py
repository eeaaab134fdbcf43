"""runc and crun as a command line: make, start and delete one container.

A call holds a lock until the runtime has ended, even if whoever called it is killed meanwhile: so that others can wait
until there is no more coming before they clean up.

Two steps instead of one `run`, because a container that was created is known to be startable, and `start` returns when
it has started: nobody has to guess. Does not know what the container is or who waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from assembler import kernel
from assembler.container import Container
from assembler.errors import RunError
from assembler.stdio import Stdio

_CGROUPS = Path("/sys/fs/cgroup")
# Unified controllers beside the old hierarchy ("hybrid") make crun refuse to run, also without any limits.
_HYBRID = _CGROUPS / "unified"
# It is content where it does not see them: in a mount namespace of its own.
_WITHOUT_HYBRID = (
    "unshare", "--mount", "--propagation", "slave", "--",
    "sh", "-c", f'umount -l {_HYBRID} && exec "$@"', "sh",
)  # fmt: skip

# A runtime's call takes some 20 ms; on a machine without memory or disk to spare, seconds.
_SETTLE_SECONDS = 60

# Variables by which whoever started us speaks to us. A runtime would take them to itself, or pass them on.
_ENVIRONMENT = ("PATH", "XDG_RUNTIME_DIR")


class Runtime:
    """A runtime and one container of it. Its state is kept with the container, not where all containers' is."""

    def __init__(self, program: str, container: Container) -> None:
        """program: a name or a path. RunError if there is no such program."""
        found = shutil.which(program)
        if found is None:
            raise RunError(f"there is no runtime {program}; install it (`apt install runc`) or name another")
        self.program = str(Path(found).absolute())
        self._container = container
        self._caller: subprocess.Popen[bytes] | None = None
        self._log = container.path / "runtime.log"
        self._lock = container.path / "runtime.lock"
        self._pid_file = container.path / "pid"

    def create(self, stdio: Stdio) -> int:
        """Make the container of the bundle's config; its first process, whose pid is returned, waits for `start`."""
        options = ["--bundle", str(self._container.path), "--pid-file", str(self._pid_file)]
        if stdio.console is not None:
            options += ["--console-socket", stdio.console]
        self._call("create", *options, stdio=stdio.child)
        try:
            return int(self._pid_file.read_text())
        except FileNotFoundError:
            raise RunError(f"{self.program} has made no container: is it a runtime?") from None

    def start(self) -> None:
        """Let the first process execute the command."""
        self._call("start")

    def stop(self) -> None:
        """From another thread: kill the call that is under way, with all that it has started."""
        if self._caller is not None and self._caller.poll() is None:
            kernel.kill_tree(self._caller.pid)

    def settle(self) -> None:
        """Wait until no call is under way, of whoever. RunError if one takes too long."""
        waited = subprocess.run(["flock", "--timeout", str(_SETTLE_SECONDS), self._lock, "true"], check=False)
        if waited.returncode:
            raise RunError(f"{self.program} is still at work on {self._container.id}; try again later")

    def delete(self) -> None:
        """Kill what runs, and remove cgroups and state. A container that was never made is fine."""
        if (self._container.runtime_state / self._container.id).exists():
            self._call("delete", "--force")
            if not self._pid_file.exists():
                self._remove_cgroups()

    def _remove_cgroups(self) -> None:
        """A runtime that was killed may not have noted yet which it has made; what ran in them ended with it."""
        name = self._container.recorded_cgroup()
        for parent, groups, _ in os.walk(_CGROUPS):
            if name in groups:
                with contextlib.suppress(OSError):
                    os.rmdir(f"{parent}/{name}")

    def _call(self, verb: str, *options: str, stdio: tuple[int, int, int] | None = None) -> None:
        state, log = str(self._container.runtime_state), str(self._log)
        command = ["flock", "--close", str(self._lock), *self._wrapper(), self.program]
        command += ["--root", state, "--log", log, "--log-format", "json", verb, *options, self._container.id]
        streams: Any = stdio or (subprocess.DEVNULL,) * 3
        self._log.unlink(missing_ok=True)
        # A session of its own: keys pressed at our terminal are for the container, not for what makes it.
        self._caller = subprocess.Popen(
            command,
            stdin=streams[0],
            stdout=streams[1],
            stderr=streams[2],
            env={key: os.environ[key] for key in _ENVIRONMENT if key in os.environ},
            start_new_session=True,
            # It makes what mounts need in the root, for whoever the command runs as.
            umask=0o022,
        )
        if code := self._caller.wait():
            raise self._failure(verb, code)

    def _wrapper(self) -> tuple[str, ...]:
        if not Path(self.program).name.startswith("crun"):
            return ()
        try:
            return _WITHOUT_HYBRID if (_HYBRID / "cgroup.controllers").read_bytes().strip() else ()
        except OSError:
            return ()

    def _failure(self, verb: str, code: int) -> RunError:
        said = _last_error(self._log)
        name = Path(self.program).name
        if said is None:
            return RunError(f"{name} {verb} ended with {code} and did not say why")
        # Their sentences are all that tells these apart; docker and podman read them the same way.
        if re.search(r"executable file.*not found|exec.*no such file", said, re.IGNORECASE):
            return RunError(said, RunError.NOT_FOUND)
        if re.search(r"exec.*(permission denied|not permitted|is a directory|format error)", said, re.IGNORECASE):
            return RunError(said, RunError.NOT_EXECUTABLE)
        return RunError(said if said.startswith(name) else f"{name}: {said}")


def recorded(container: Container) -> Runtime | None:
    """The runtime that knows an abandoned container, None if none does. RunError if it is not installed any more."""
    program = container.recorded_runtime()
    return Runtime(program, container) if program else None


def _last_error(log: Path) -> str | None:
    """The sentence of the last error in a runtime's log."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("level") in ("error", "fatal") and entry.get("msg"):
            return str(entry["msg"])
    return None
