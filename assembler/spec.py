"""From an image's config and the user's options to a runtime spec, the ``config.json`` of an OCI bundle.

What is isolated, mounted, masked and allowed is what docker does by default. Left out: its seccomp profile, a table of
some 400 system calls that belongs to whoever maintains the host, and its AppArmor profile, which must be loaded first.
Resource limits (ulimits) are the caller's own.

A ``VOLUME`` of an image is seeded like any required directory. It needs no directory of its own, because the upper is
private to the container anyway, and so it has the image's files without copying any. Only under a read-only root is
it mounted on itself, to be writable.
"""

from __future__ import annotations

import os
import posixpath
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import clipfs
from assembler import names
from assembler.beneath import locate, opened_root
from assembler.command import command, environment, working_directory
from assembler.options import RunOptions, shortest
from assembler.users import Identity, look_up

_CAPABILITIES = (
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
)  # fmt: skip

_MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap",
    "/sys/firmware",
)  # fmt: skip
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_CPU_PERIOD = 100_000  # µs; the kernel's default

_CGROUPS = Path("/sys/fs/cgroup")
# There if the kernel counts swap; runtimes fail otherwise. In the unified hierarchy all groups have it but the root.
_SWAP = ("memory/memory.memsw.limit_in_bytes", "memory.swap.max", "*/memory.swap.max")


def required_directories(config: clipfs.ImageConfig, options: RunOptions) -> tuple[str, ...]:
    """What must exist besides the standard directories."""
    return (*options.required, *config.volumes, working_directory(config, options))


def runtime_spec(
    config: clipfs.ImageConfig,
    options: RunOptions,
    rootfs: Path,
    container_id: str,
    files: Mapping[str, Path] = MappingProxyType({}),
) -> dict[str, Any]:
    """The spec of a container whose root is `rootfs`, mounted and seeded: users and volumes are looked up in it.

    files: what it has in place of its image's, by where that is (see `resolving`).
    """
    with opened_root(rootfs) as root:
        user = look_up(root, options.user or config.user)
        volumes = _image_volumes(config, rootfs, root) if options.read_only else []
    others = _user_mounts(options)
    hostname = hostname_of(options, container_id)
    spec: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": _process(config, options, user, hostname),
        "root": {"path": str(rootfs), "readonly": options.read_only},
        "hostname": hostname,
        "mounts": [
            *_standard_mounts(),
            *volumes,
            *_files(files, others, "ro" if options.read_only else "rw"),
            # The last covers what is there, so what lies in another comes after that, however it was said.
            *sorted(others, key=lambda mount: shortest(mount["destination"]).count("/")),
        ],
        "linux": _linux(options, container_id),
    }
    if config.stop_signal:
        # The name that the image spec gives it in a runtime spec.
        spec["annotations"] = {"org.opencontainers.image.stopSignal": config.stop_signal}
    return spec


def hostname_of(options: RunOptions, container_id: str) -> str:
    """What a container calls itself: with the host's network, as the host."""
    return options.hostname or (socket.gethostname() if options.network == "host" else container_id)


def _process(config: clipfs.ImageConfig, options: RunOptions, user: Identity, hostname: str) -> dict[str, Any]:
    # Without inheritable and ambient ones, a user other than root has none after exec, whatever is permitted here.
    allowed = list(_CAPABILITIES)
    held = allowed if user.uid == 0 else []
    return {
        "terminal": options.tty,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups), "umask": 0o022},
        "args": list(command(config, options)),
        "env": environment(config, options, user.home, hostname),
        "cwd": working_directory(config, options),
        "capabilities": {"bounding": allowed, "effective": held, "permitted": held, "inheritable": [], "ambient": []},
        "noNewPrivileges": False,
    }


def _linux(options: RunOptions, container_id: str) -> dict[str, Any]:
    kinds = ["pid", "ipc", "uts", "mount"]
    if options.network == "none":
        kinds.append("network")
    if (_CGROUPS / "cgroup.controllers").exists():
        # Only in the unified hierarchy does a namespace hide the others' groups.
        kinds.append("cgroup")
    resources: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}]}
    if options.memory is not None:
        resources["memory"] = _memory(options.memory)
    if options.cpus is not None:
        resources["cpu"] = {"quota": round(options.cpus * _CPU_PERIOD), "period": _CPU_PERIOD}
    return {
        "namespaces": [{"type": kind} for kind in kinds],
        # Below the caller's own, so that no directory in between stays behind. Of its own name, because one of the
        # same id, kept elsewhere, would share its limits and its end.
        "cgroupsPath": f"clipfs-{container_id}-{names.invented()}",
        "resources": resources,
        "maskedPaths": list(_MASKED),
        "readonlyPaths": list(_READ_ONLY),
    }


def _memory(limit: int) -> dict[str, int]:
    """Swap counts, if anybody counts it: what goes on on the disk instead is not limited."""
    counted = any(next(_CGROUPS.glob(pattern), None) for pattern in _SWAP)
    return {"limit": limit, "swap": limit} if counted else {"limit": limit}


def _standard_mounts() -> list[dict[str, Any]]:
    quiet = ("nosuid", "noexec", "nodev")
    return [
        _mount("/proc", "proc", "proc", *quiet),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
        ),
        _mount("/dev/shm", "tmpfs", "shm", *quiet, "mode=1777", "size=65536k"),  # noqa: S108
        _mount("/dev/mqueue", "mqueue", "mqueue", *quiet),
        _mount("/sys", "sysfs", "sysfs", *quiet, "ro"),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", *quiet, "relatime", "ro"),
    ]


def _files(files: Mapping[str, Path], others: Sequence[dict[str, Any]], access: str) -> list[dict[str, Any]]:
    """None where one of the others is mounted: that has its own, or shall have none."""
    taken = {shortest(mount["destination"]) for mount in others}
    return [
        _mount(path, "bind", str(source), "bind", "rprivate", access)
        for path, source in files.items()
        if taken.isdisjoint((path, posixpath.dirname(path)))
    ]


def _user_mounts(options: RunOptions) -> list[dict[str, Any]]:
    mounts = []
    for entry in options.tmpfs:
        place, _, extra = entry.partition(":")
        more: Sequence[str] = extra.split(",") if extra else ()
        # crun does not take it back where `exec` comes later.
        noexec = () if "exec" in more else ("noexec",)
        mounts.append(_mount(place, "tmpfs", "tmpfs", "nosuid", "nodev", *noexec, "mode=1777", *more))
    for volume in options.volumes:
        if not volume.source.exists():
            raise clipfs.UsageError(f"the volume {volume.source} does not exist")
        # Read-only means everything below it too, other mounts included.
        access = "rro" if volume.read_only else "rw"
        mounts.append(_mount(volume.destination, "bind", str(volume.source), "rbind", "rprivate", access))
    return mounts


def _image_volumes(config: clipfs.ImageConfig, rootfs: Path, root: int) -> list[dict[str, Any]]:
    """Each of the image's volumes mounted on itself; the source is where it leads, free of links."""
    mounts = []
    for volume in config.volumes:
        place = os.fsdecode(b"/".join(locate(root, os.fsencode(volume)).found))
        mounts.append(_mount(f"/{place}", "bind", str(rootfs / place), "bind", "rprivate", "rw"))
    return mounts


def _mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}
