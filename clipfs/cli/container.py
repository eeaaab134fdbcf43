"""``clipfs run``, all of it that takes time to load: mount, overlay, container; then say what it cost, if asked."""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import assembler
from clipfs.cli.mounts import mount_options
from clipfs.cli.options import clip_of, containers_dir
from clipfs.errors import UsageError
from clipfs.format.index import Index
from clipfs.log import complain
from clipfs.mounting import mounter
from clipfs.mounting.daemon import Standby
from clipfs.mounting.options import byte_count
from clipfs.oci import ImageConfig
from clipfs.state import Process

# Options about how an image is reached, and what is told of its mount.
_OF_IMAGES = (
    "platform", "insecure", "authfile", "ca", "source", "cache_dir", "cache_size", "cache_compression", "prefetch",
    "report", "metrics", "stats",
)  # fmt: skip


def run(args: argparse.Namespace, standby: Standby) -> int:
    """Run the command in an image; the exit code is its own. standby: who is to serve that."""
    base: Path = args.base or containers_dir()
    options = _options(args)
    with ExitStack() as stack:
        clip = clip_of(args)
        # Not for longer: who has a file mapped dies if somebody cuts it off (SIGBUS). A mount has a copy.
        with Index.open(clip) as index:
            config, compressed = index.config, sum(layer.size for layer in index.layers)
        mount = replace(mount_options(args, "suid,dev"), first=assembler.first_read(config, options))
        # From here on there is something to take down, and no signal may come between.
        events = stack.enter_context(assembler.Events())
        container = stack.enter_context(assembler.Container.create(base, options.name))
        place = container.mountpoint()
        mounted = stack.enter_context(mounter.mount(clip, place, mount, standby=standby, meanwhile=_load_runner))
        output = _FirstOutput()
        code = assembler.run_in(
            container, events, mounted.mountpoint, config, options, archive="v2 (OCI)", on_output=output
        )
        if args.stats:
            _report(output.seconds, mounted.counters()["bytes_fetched"], compressed)
        return code


def run_directory(args: argparse.Namespace, directory: Path) -> int:
    """Run the command in an unpacked root."""
    given = [f"--{name.replace('_', '-')}" for name in _OF_IMAGES if getattr(args, name)]
    if given:
        raise UsageError(f"{directory} is a directory, and no image that is mounted: {given[0]} says nothing about it")
    return assembler.run(directory, _no_image(), _options(args), args.base or containers_dir(), archive="v1")


def _load_runner() -> None:
    """What runs the container, while the mount is being made."""
    import assembler.runner  # noqa: F401


def _no_image() -> ImageConfig:
    """The config of a directory, which says nothing: the defaults of the runtime spec hold."""
    return ImageConfig.parse(b'{"os": "linux", "architecture": "", "rootfs": {"type": "layers", "diff_ids": []}}')


def _options(args: argparse.Namespace) -> assembler.RunOptions:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    return assembler.RunOptions(
        command=tuple(command),
        entrypoint=None if args.entrypoint is None else _words(args.entrypoint),
        name=args.name,
        env=(*(line for file in args.env_file for line in _env_file(file)), *args.env),
        workdir=args.workdir,
        user=args.user,
        volumes=tuple(assembler.Volume.parse(text) for text in args.volume),
        tmpfs=tuple(args.tmpfs),
        hostname=args.hostname,
        network=args.network,
        memory=byte_count(args.memory, "--memory") if args.memory is not None else None,
        cpus=args.cpus,
        read_only=args.read_only,
        interactive=args.interactive,
        tty=args.tty,
        remove=args.rm,
        runtime=args.runtime,
        required=tuple(args.required),
        upper=args.upper,
    )


def _words(entrypoint: str) -> tuple[str, ...]:
    """One word, or several as a JSON list, as podman has it; nothing is split at spaces."""
    if not entrypoint.startswith("["):
        return (entrypoint,) if entrypoint else ()
    try:
        words = json.loads(entrypoint)
    except ValueError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UsageError(
            f"an entrypoint is a command, or a JSON list of words such as '[\"sh\", \"-c\"]', not '{entrypoint}'"
        )
    return tuple(words)


def _env_file(path: Path) -> list[str]:
    """The lines of an env file as docker and podman read it: no quoting, ``#`` begins a comment line.

    A value ends where its line does, which no character but the newline ends, and keeps the blanks at its end.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read --env-file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--env-file {path} is not UTF-8 at byte {error.start}") from error
    lines = (line.removesuffix("\r").lstrip() for line in text.split("\n"))
    return [line if "=" in line else line.rstrip() for line in lines if line and not line.startswith("#")]


def _report(first_output: float | None, fetched: int, total: int) -> None:
    # Late: it brings what makes indexes, and trio with that.
    from clipfs.cli.progress import size

    share = fetched / total if total else 0.0
    when = "no output" if first_output is None else f"first output after {first_output:.2f} s"
    complain(f"clipfs: {when}; fetched {fetched} of {total} bytes ({share:.1%}): {size(fetched)} of {size(total)}")


class _FirstOutput:
    """To be called when output comes; remembers the first time."""

    def __init__(self) -> None:
        #: From the start of this process to the first byte.
        self.seconds: float | None = None

    def __call__(self) -> None:
        if self.seconds is None:
            started = Process.current().started / os.sysconf("SC_CLK_TCK")
            self.seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - started
