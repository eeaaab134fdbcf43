"""A container's directory ``base/<id>``, which is also an OCI bundle, and how one can tell that its owner lives.

Whoever runs a container holds a lock on ``base/<id>/lock``. The kernel lets go of it when the process ends, however it
ends; so what is not locked is either kept on purpose (a file ``kept`` says so) or debris. ``base/.lock`` is held while
directories come and go, so that nobody takes one that is just being made for one that was left.

Knows neither overlays nor runtimes, except that the latter keep their state in ``base/<id>/runtime``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import clipfs
from assembler import names

_LOCK, _KEPT, _RECORD = "lock", "kept", "runtime.json"


class Container:
    """A reserved id and its directory; as a context manager, removed at the end unless `keep` has been set."""

    def __init__(self, base: Path, container_id: str, lock: int) -> None:
        self.base = base
        self.id = container_id
        self.path = base / container_id
        self.keep = False
        self._lock: int | None = lock

    @classmethod
    def create(cls, base: Path, name: str | None = None) -> Self:
        """Reserve the id `name`, or a random one, below `base`. UsageError if it is taken."""
        container_id = names.checked(name if name is not None else names.invented())
        try:
            base.mkdir(parents=True, exist_ok=True, mode=0o700)
            base = base.resolve()
            with _locked(base):
                (base / container_id).mkdir(mode=0o700)
                lock = os.open(base / container_id / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except FileExistsError:
            raise clipfs.UsageError(
                f"there is a container {container_id} already; remove {base / container_id} or choose another name"
            ) from None
        except OSError as error:
            raise clipfs.MountError(f"cannot make a directory for the container: {error}") from error
        return cls(base, container_id, lock)

    @classmethod
    def abandoned(cls, base: Path, *, kept: bool = False) -> Iterator[Self]:
        """Those whose owners are gone, locked now by this process; with `kept`, also those left on purpose."""
        if not base.is_dir():
            return
        base = base.resolve()
        for entry in sorted(base.iterdir()):
            if not entry.is_dir() or entry.is_symlink() or entry.name.startswith("."):
                continue
            with _locked(base):
                lock = _try_lock(entry / _LOCK)
            if lock is None:
                continue
            if (entry / _KEPT).exists() and not kept:
                os.close(lock)
                continue
            yield cls(base, entry.name, lock)

    def mountpoint(self) -> Path:
        """A directory for the mount that this container has for a lower; `gc` unmounts it if the owner could not."""
        place = self.path / "lower"
        place.mkdir(exist_ok=True)
        return place

    @property
    def runtime_state(self) -> Path:
        """Where the runtime keeps what it knows of this container."""
        return self.path / "runtime"

    def record(self, runtime: str) -> None:
        """Note which runtime knows this container, before it does."""
        _write_json(self.path / _RECORD, {"runtime": runtime})

    def recorded_runtime(self) -> str | None:
        """What `record` noted, None if it never came to that."""
        try:
            noted = json.loads((self.path / _RECORD).read_bytes())
        except FileNotFoundError:
            return None
        return str(noted["runtime"])

    def write_config(self, spec: dict[str, Any]) -> None:
        """The runtime spec, as the bundle's config."""
        _write_json(self.path / "config.json", spec)

    def close(self) -> None:
        """Remove the directory, or leave it if it is to be kept, and give up the id. MountError if it is in use."""
        if self._lock is None:
            return
        try:
            if self.keep:
                (self.path / _KEPT).touch()
            else:
                # The lock goes last, while nobody else looks: until then this can be recognised as what it is.
                names.empty_tree(self.path, keep=_LOCK)
                with _locked(self.base):
                    names.remove_tree(self.path)
        finally:
            self.release()

    def release(self) -> None:
        """Let go of it as it is; unless it was to be kept, it is debris now."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def _locked(base: Path) -> Iterator[None]:
    """The right to make and remove containers below `base`; held for a few system calls at a time."""
    fd = os.open(base / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _try_lock(path: Path) -> int | None:
    """The lock, if its owner has let go of it."""
    try:
        # Made here if its owner was killed before it could.
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _write_json(path: Path, value: dict[str, Any]) -> None:
    # Aside and renamed: a reader finds all of it or nothing.
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(json.dumps(value, indent=1))
    aside.rename(path)
