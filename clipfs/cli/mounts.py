"""``clipfs mount``, all of it that takes time to load, ``umount``, ``upgrade`` and ``gc``."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import assembler
from clipfs import log as logs
from clipfs.cli.options import clip_of, containers_dir
from clipfs.errors import UsageError
from clipfs.mounting import daemon, mounter
from clipfs.mounting.daemon import Standby
from clipfs.mounting.options import MountOptions, byte_count, endpoint, parse, prefetch, readable, report_path


def mount(args: argparse.Namespace, standby: Standby) -> int:
    """Mount, and return when the root answers. standby: who is to serve that."""
    options = mount_options(args, args.options)
    mounter.mount(_clip(args, options), args.directory, options, standby=standby)
    return 0


def _clip(args: argparse.Namespace, options: MountOptions) -> Path:
    """The .clip that X means; how to reach its source may have been said with -o."""
    access = {"insecure": options.insecure, "authfile": options.authfile, "ca": options.ca}
    return clip_of(argparse.Namespace(**{**vars(args), **access}))


def serve(args: argparse.Namespace) -> int:
    """Mount, and serve until somebody unmounts it."""
    options = mount_options(args, args.options)
    clip, place = _clip(args, options), args.directory.absolute()

    with _logging(options) as terminal:

        def on_ready() -> None:
            print(f"{clip} is mounted on {place}", file=terminal, flush=True)
            _notify_manager(f"READY=1\nSTATUS={clip} is mounted on {place}")

        mounter.serve(clip, place, options, on_ready)
    return 0


@contextmanager
def _logging(options: MountOptions) -> Iterator[TextIO]:
    """Meanwhile, have what is logged where and as the options say; what stderr is otherwise."""
    streams = [os.dup(number) for number in (1, 2)]
    try:
        if options.log is not None:
            daemon.log_to(options.log, options.log_format)
        elif options.log_format != "text":
            logs.to_stream(sys.stderr, logging.getLogger().getEffectiveLevel(), form=options.log_format)
        with open(streams[1], "w", closefd=False, errors="backslashreplace") as terminal:
            yield terminal
    finally:
        for number, kept in enumerate(streams, 1):
            os.dup2(kept, number)
            os.close(kept)


def _notify_manager(state: str) -> None:
    """Tell systemd, if that started us and wants to know (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        try:
            manager.connect("\0" + address[1:] if address.startswith("@") else address)
            manager.send(state.encode("utf-8", "backslashreplace"))
        except OSError as error:
            print(f"clipfs: cannot tell the service manager: {error.strerror}", file=sys.stderr)


def mount_options(args: argparse.Namespace, text: str) -> MountOptions:
    """What ``-o`` says, completed by the options that every command knows."""
    parsed = parse(text)
    if parsed.writable or parsed.remount:
        raise UsageError(f"-o {text}: an image is read-only; leave out rw and remount")
    options = parsed.options
    return replace(
        options,
        source=options.source or args.source,
        authfile=options.authfile or (args.authfile and readable(args.authfile, "credentials")),
        ca=options.ca or (args.ca and readable(args.ca, "certificates")),
        insecure=options.insecure or args.insecure,
        cache_dir=args.cache_dir.absolute() if args.cache_dir else options.cache_dir,
        cache_size=byte_count(args.cache_size, "--cache-size") if args.cache_size else options.cache_size,
        cache_compression=args.cache_compression != "none" if args.cache_compression else options.cache_compression,
        prefetch=prefetch(args.prefetch) if args.prefetch else options.prefetch,
        report=report_path(args.report) if args.report else options.report,
        view=args.view or options.view,
        metrics=endpoint(args.metrics) if args.metrics else options.metrics,
    )


def umount(args: argparse.Namespace) -> int:
    """Unmount, and wait for the processes that serve it to end."""
    mounter.unmount(args.directory)
    return 0


def upgrade(args: argparse.Namespace) -> int:
    """Have a new worker take over, and wait until it has."""
    mounter.upgrade(args.directory)
    return 0


def gc(args: argparse.Namespace) -> int:
    """Remove containers whose `clipfs run` was killed, then mounts whose process was."""
    if args.base:
        assembler.Container.check_base(args.base)
    try:
        for left in assembler.gc(args.base or containers_dir()):
            print(f"removed container {left}", file=sys.stderr)
    except PermissionError:
        # Only root runs containers, and nobody else need be able to look where they are.
        if args.base:
            raise
    finally:
        for record in mounter.gc():
            print(f"removed mount {record.mountpoint}", file=sys.stderr)
    return 0
