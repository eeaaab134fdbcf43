"""A container's directory ``base/<id>``, which is also an OCI bundle, and how one can tell that its owner lives.

Whoever runs a container holds a lock on ``base/<id>/clipfs.lock``. The kernel lets go of it when the process ends,
however it ends; so what is not locked is either kept on purpose (a file ``kept`` says so) or debris. A directory
without that file is not ours and never touched, whatever somebody names as base. ``base/.clipfs.lock`` is held while
directories come and go, and they come with a rename, so that nobody takes one that is being made for one that was left.

Knows neither overlays nor runtimes, except that the latter keep their state in ``base/<id>/runtime``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import clipfs
from assembler import names

_log = logging.getLogger("assembler")

_LOCK, _KEPT, _RECORD, _CONFIG = "clipfs.lock", "kept", "runtime.json", "config.json"
_BASE_LOCK, _NEW = ".clipfs.lock", ".clipfs.new"


class Container:
    """A reserved id and its directory; as a context manager, removed at the end unless `keep` has been set."""

    def __init__(self, base: Path, container_id: str, lock: int) -> None:
        self.base = base
        self.id = container_id
        self.path = base / container_id
        self.keep = False
        self._lock: int | None = lock
        self._given_up = False

    @classmethod
    def create(cls, base: Path, name: str | None = None) -> Self:
        """Reserve the id `name`, or a random one, below `base`. UsageError if it is taken."""
        container_id = names.checked(name if name is not None else names.invented())
        try:
            base.mkdir(parents=True, exist_ok=True, mode=0o700)
            base = _trusted(base)
            with _locked(base):
                if os.path.lexists(base / container_id):
                    raise taken(base / container_id)
                # There may be one whose maker was killed.
                names.remove_tree(base / _NEW)
                (base / _NEW).mkdir(mode=0o700)
                lock = os.open(base / _NEW / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(lock, fcntl.LOCK_EX)
                (base / _NEW).rename(base / container_id)
        except OSError as error:
            hint = "; only root can run containers" if os.geteuid() != 0 else ""
            raise clipfs.MountError(f"cannot keep containers in {base}: {error.strerror}{hint}") from error
        return cls(base, container_id, lock)

    @staticmethod
    def check_base(base: Path) -> None:
        """UsageError if there is no directory `base`, or one of something else; it may be misspelt."""
        if not base.is_dir():
            raise clipfs.UsageError(f"there is no directory {base}")
        if not (base / _BASE_LOCK).exists() and any(base.iterdir()):
            raise clipfs.UsageError(f"{base} is no directory of containers: nothing in it is from `clipfs run`")

    @classmethod
    def abandoned(cls, base: Path, *, kept: bool = False) -> Iterator[Self]:
        """Those whose owners are gone, locked now by this process; with `kept`, also those left on purpose."""
        if not base.is_dir():
            return
        base = _trusted(base)
        if (base / _NEW).exists():
            with _locked(base):
                names.remove_tree(base / _NEW)
        for entry in sorted(base.iterdir()):
            if entry.is_symlink() or entry.name.startswith("."):
                continue
            if not _ours(entry):
                # From a time when the base was not what it should be: what it says would be done as this user.
                _log.warning("left %s as it is: other users can write to it", entry)
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
        """What `record` noted, None if it never came to that. MountError if somebody has spoilt it since."""
        try:
            return str(json.loads((self.path / _RECORD).read_bytes())["runtime"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise clipfs.MountError(f"{self.path / _RECORD} is damaged, so its runtime is not known") from error

    def recorded_cgroup(self) -> str | None:
        """What the config calls its control groups; None if it does not say."""
        try:
            return str(json.loads((self.path / _CONFIG).read_bytes())["linux"]["cgroupsPath"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_config(self, spec: dict[str, Any]) -> None:
        """The runtime spec, as the bundle's config. UsageError if it has bytes that are no text."""
        _write_json(self.path / _CONFIG, spec)

    def close(self) -> None:
        """Remove the directory, or leave it if it is to be kept, and give up the id. MountError if it is in use."""
        if self._lock is None:
            return
        try:
            if self._given_up:
                pass
            elif self.keep:
                (self.path / _KEPT).touch()
            else:
                # The lock goes last, while nobody else looks: until then this can be recognised as what it is.
                names.empty_tree(self.path, keep=_LOCK)
                with _locked(self.base):
                    names.remove_tree(self.path)
        finally:
            self.release()

    def give_up(self) -> None:
        """Leave it to `gc` instead of removing it: what is there yet is needed to remove the rest."""
        self._given_up = True

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


def taken(path: Path) -> clipfs.UsageError:
    """Why the id that would be `path` is not to be had, and what to do: never to remove what is alive or mounted."""
    if not os.path.lexists(path / _LOCK):
        return clipfs.UsageError(f"{path} is there and is no container; move it away or choose another name")
    lock = _try_lock(path / _LOCK)
    if lock is None:
        what = "and it is in use; choose another name"
    elif (path / _KEPT).exists():
        what = f"and it has ended; remove {path} or choose another name"
    else:
        what = f"left by a run that was killed; run `clipfs gc --base {path.parent}` or choose another name"
    if lock is not None:
        os.close(lock)
    return clipfs.UsageError(f"there is a container {path.name} already, {what}")


def _trusted(base: Path) -> Path:
    """The same, without links. UsageError if others could put there what would be run, or removed, as this user."""
    base = base.resolve()
    if not _ours(base):
        raise clipfs.UsageError(
            f"{base} is no place for containers, because other users can write to it; name a directory of your own "
            "with --base"
        )
    return base


def _ours(path: Path) -> bool:
    """Nobody else can have put there what is in it, nor be its owner."""
    there = path.lstat()
    return there.st_uid in (0, os.geteuid()) and not there.st_mode & 0o022


@contextlib.contextmanager
def _locked(base: Path) -> Iterator[None]:
    """The right to make and remove containers below `base`; held for a few system calls at a time."""
    fd = os.open(base / _BASE_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _try_lock(path: Path) -> int | None:
    """The lock, if there is one and its owner has let go of it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
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
    try:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    except UnicodeEncodeError as error:
        # Runtimes would put U+FFFD in their place, in silence.
        text = error.object[: error.end].rpartition('"')[2]
        raise clipfs.UsageError(f"a container can only be told what is UTF-8, and this is not: {text!a}") from None
    aside.rename(path)
