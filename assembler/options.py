"""How a container is to be run, as its user says it. Checks the spelling, not whether it can be done."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import clipfs

_MAX_HOSTNAME = 64  # HOST_NAME_MAX of Linux


def shortest(path: str) -> str:
    """An absolute path in a container, in the shortest way to say it."""
    return "/" + posixpath.normpath(path).strip("/")


@dataclass(frozen=True, slots=True)
class Volume:
    """A file or directory of the host that the container sees at `destination`."""

    source: Path
    destination: str
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Volume:
        """``SRC:DST[:ro|rw]``, the source absolute or relative to the working directory."""
        source, _, rest = text.partition(":")
        destination, colon, mode = rest.partition(":")
        if not source or not destination.startswith("/") or (colon and mode not in ("ro", "rw")):
            raise clipfs.UsageError(f"a volume is given as SRC:/DST or SRC:/DST:ro, not '{text}'")
        return cls(Path(source).absolute(), destination, mode == "ro")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What `podman run` lets one say, with its defaults where the assembler has no reason for others.

    command: instead of the image's Cmd. entrypoint: instead of the image's Entrypoint, and then its Cmd does not count
    either; ``()`` for none. name: the container's id, else a random one.
    env: ``K=V``, or ``K`` to pass on the caller's. tmpfs: ``DIR[:OPTIONS]``. required: directories to seed besides the
    standard ones.
    network: "host", because an isolated network is of use only with bridges, NAT and name service around it, which
    take a daemon; or "none", which has the loopback interface only.
    memory, cpus: limits, in bytes and in processors.
    remove: nothing of the container stays on disk. upper: what it writes goes here, stays, and is there next time.
    runtime: "runc", "crun" or the path of one.
    """

    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    name: str | None = None
    env: tuple[str, ...] = ()
    workdir: str | None = None
    user: str | None = None
    volumes: tuple[Volume, ...] = ()
    tmpfs: tuple[str, ...] = ()
    hostname: str | None = None
    network: Literal["host", "none"] = "host"
    memory: int | None = None
    cpus: float | None = None
    read_only: bool = False
    interactive: bool = False
    tty: bool = False
    remove: bool = False
    runtime: str = "runc"
    required: tuple[str, ...] = ()
    upper: Path | None = None
    #: What ``K`` in `env` is taken from; None means this process's environment.
    environ: Mapping[str, str] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        mounted = [("tmpfs", each.partition(":")[0]) for each in self.tmpfs]
        mounted += [("volume", each.destination) for each in self.volumes]
        for what, path in (("working directory", "/" if self.workdir is None else self.workdir), *mounted):
            if not path.startswith("/"):
                raise clipfs.UsageError(f"a {what} is an absolute path inside the container, not '{path}'")
        places = set()
        for what, path in mounted:
            place = shortest(path)
            if place == "/":
                raise clipfs.UsageError(f"a {what} lies below the root of the container, it cannot replace it")
            if place in places:
                raise clipfs.UsageError(f"two volumes or tmpfs are to be at {place} in the container; leave one out")
            places.add(place)
        if "" in self.required:
            raise clipfs.UsageError("a directory that shall exist needs a name")
        if self.hostname is not None and len(os.fsencode(self.hostname)) > _MAX_HOSTNAME:
            raise clipfs.UsageError(f"a host name has at most {_MAX_HOSTNAME} bytes")
        if self.network not in ("host", "none"):
            raise clipfs.UsageError(f"a network is 'host' or 'none', not '{self.network}'")
        # runc's own lower bound for the period's share is 1 ms of 100; no Linux has more than 8192 processors.
        if self.cpus is not None and not 0.01 <= self.cpus <= 8192:
            raise clipfs.UsageError(f"a container needs at least 0.01 CPUs and at most 8192, not {self.cpus}")
        # The kernel starts nothing in less; the limit is docker's and podman's too.
        if self.memory is not None and self.memory < 6 << 20:
            raise clipfs.UsageError(f"a container needs at least 6 MiB of memory, not {self.memory} bytes")
        for entry in self.env:
            if entry.startswith("=") or not entry or "\0" in entry:
                raise clipfs.UsageError(f"a variable is given as K=V or K, not {entry!r}")
