"""``mount.clipfs`` and ``mount.fuse.clipfs``: what mount(8) starts for ``mount -t clipfs SPEC DIR`` and lines of fstab.

This module owns the protocol between mount(8) and its helpers, which is a command line and an exit code. What the
options mean is in `clipfs.options`, what a mount is in `clipfs.mounter`.
"""

from __future__ import annotations

import getopt
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipfs.cli import texts
from clipfs.errors import ClipfsError, MountError, UsageError, single
from clipfs.log import complain, discard, print_any_name
from clipfs.mounting import kernel, mountinfo
from clipfs.mounting.options import MountOptions, Parsed, parse

if TYPE_CHECKING:
    from clipfs.mounting.daemon import Standby

_USAGE = f"""\
usage: mount.clipfs SPEC DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]

SPEC is a .clip file, the URL of a packed one, or the name of an image as skopeo names it (oci:DIR:TAG,
docker://HOST/REPO:TAG, …), which is indexed first if it was not before. Usually started by mount(8):

  mount -t clipfs app.clip /mnt -o allow_other,cache=256M,log=/var/log/app.log
  /srv/app.clip  /mnt  clipfs  ro,_netdev,nofail,x-systemd.automount  0 0     (a line of /etc/fstab)

{texts.MOUNT_OPTIONS}\
What begins with -- is in `clipfs mount --help`. Those that mount(8) handles itself are taken as well; suid and dev it
never hands on, for these there are allow_suid and allow_dev.
"""

# The exit code of mount(8), bit by bit.
_WRONG_USAGE = 1
_SYSTEM_ERROR = 2
_INTERRUPTED = 8
_MOUNT_FAILURE = 32


@dataclass(frozen=True, slots=True)
class _Request:
    """The command line, understood."""

    spec: str
    directory: str
    parsed: Parsed
    namespace: str | None
    fake: bool
    verbose: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Do what mount(8) asks; the exit code is one that it understands."""
    print_any_name()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments) or not arguments:
        try:
            print(_USAGE, end="", file=sys.stdout if arguments else sys.stderr, flush=True)
        except OSError as error:
            discard(1)
            return _failed(error.strerror or "cannot print", _SYSTEM_ERROR)
        return 0 if arguments else _WRONG_USAGE
    try:
        request = _understood(arguments)
    except UsageError as error:
        return _failed(error, _WRONG_USAGE)
    try:
        return _obey(request)
    except BaseException as error:
        match single(error):
            case ClipfsError() as one:
                return _failed(one, _MOUNT_FAILURE)
            case OSError() as one:
                return _failed(one, _SYSTEM_ERROR)
            case KeyboardInterrupt():
                return _failed("interrupted", _INTERRUPTED)
        raise


def _failed(error: Exception | str, code: int) -> int:
    complain(f"mount.clipfs: {error}")
    return code


def _understood(arguments: list[str]) -> _Request:
    try:
        switches, places = getopt.gnu_getopt(arguments, "sfnvN:o:t:")
    except getopt.GetoptError as error:
        raise UsageError(f"{error}; see `mount.clipfs --help`") from None
    if len(places) != 2:
        raise UsageError("what to mount, and where, is all that is wanted besides options; see `mount.clipfs --help`")
    given = [switch for switch, _ in switches]
    options = ",".join(value for switch, value in switches if switch == "-o")
    kind = next((value for switch, value in switches if switch == "-t"), "clipfs")
    if kind not in ("clipfs", mountinfo.FSTYPE):
        raise UsageError(f"cannot mount file systems of type {kind}, only clipfs")
    return _Request(
        spec=places[0],
        directory=places[1],
        parsed=parse(options, sloppy="-s" in given),
        namespace=next((value for switch, value in switches if switch == "-N"), None),
        fake="-f" in given,
        verbose="-v" in given,
    )


def _obey(request: _Request) -> int:
    def say(sentence: str) -> None:
        if request.verbose:
            print(f"mount.clipfs: {sentence}")

    if request.parsed.remount:
        # A remount changes nothing. mount(8) asks for `rw` where it means nothing by it, but who wants to write, or to
        # have nobody execute, must not believe to have got it.
        if request.parsed.writable:
            raise MountError(f"{request.directory} is an image, which is read-only; it cannot be remounted rw")
        _refuse_changes(request)
        say(f"{request.directory} is read-only already")
        return 0
    if request.parsed.writable:
        say("an image is read-only, and is mounted so")
    if request.fake:
        say(f"would mount {request.spec} on {request.directory}")
        return 0

    if request.parsed.nofail and request.spec.endswith(".clip") and not os.path.lexists(request.spec):
        say(f"there is no file {request.spec}, which nofail forgives")
        return 0

    # Late, for the answers above need nothing of it.
    from clipfs.mounting.daemon import Standby

    origin = None if request.namespace is None else _enter(request.namespace)
    with Standby(origin) as standby:
        return _mount(request, standby, say)


def _refuse_changes(request: _Request) -> None:
    """MountError if a remount asks for what the mount is not. What it does not name stays as it is anyway."""
    named = [name for name in ("suid", "dev", "noexec") if name in request.parsed.named]
    if not named:
        return
    entry = mountinfo.top_at(mountinfo.canonical(request.directory))
    if entry is None:
        raise MountError(f"there is no clipfs mount on {request.directory}")
    is_so = {
        "suid": "nosuid" not in entry.options,
        "dev": "nodev" not in entry.options,
        "noexec": "noexec" in entry.options,
    }
    other = [name for name in named if getattr(request.parsed.options, name) != is_so[name]]
    if other:
        raise MountError(
            f"{request.directory} cannot be remounted with another setting of {', '.join(other)}; "
            "unmount it, and mount it with that"
        )


def _mount(request: _Request, standby: Standby, say: Callable[[str], None]) -> int:
    """standby: who is to serve it. That loads what it needs while this process does."""
    from clipfs.mounting.mounter import mount, record_at

    record, path = record_at(mountinfo.canonical(request.directory)), Path(request.spec)
    # A path may begin elsewhere than one of the same words did.
    same = record is not None and (
        record.clip == str(path.absolute()) if path.exists() else record.name == request.spec
    )
    if record is not None and record.alive and same:
        # `mount -a` compares with the table of mounts, which says of the kernel view what EROFS mounts.
        say(f"{request.spec} is mounted on {request.directory} already")
        return 0
    options = request.parsed.options
    clip = _clip(request.spec, options)
    if str(clip) != request.spec:
        # By this name it is found to be mounted already.
        options = replace(options, name=request.spec)
    mounted = mount(clip, request.directory, options, standby=standby)
    say(f"{clip} is mounted on {mounted.mountpoint}, served by process {mounted.pid}")
    return 0


def _clip(spec: str, options: MountOptions) -> Path:
    """The .clip that SPEC names: a file, or the index of an image."""
    path = Path(spec)
    if path.exists() or (spec.endswith(".clip") and "://" not in spec):
        return path
    # Late, for it brings decoders and trio, which a .clip has no use for.
    from clipfs.building.builder import index_for

    kernel.undumpable()  # it may read credentials
    return index_for(spec, insecure=options.insecure, authfile=options.authfile, ca=options.ca)


def _enter(namespace: str) -> int:
    """Change to another mount namespace (mount -N), named by a process or by a file; a descriptor of the one before."""
    # Everything is imported first: the other namespace may have no Python in it, or another.
    from clipfs.mounting import mounter  # noqa: F401
    from clipfs.reports import metrics, reporter  # noqa: F401

    origin = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    path = f"/proc/{namespace}/ns/mnt" if namespace.isdigit() else namespace
    with open(path, "rb") as file:
        try:
            kernel.enter_mount_namespace(file.fileno())
        except OSError as error:
            raise MountError(f"cannot enter mount namespace {namespace}: {error.strerror}") from None
    return origin


if __name__ == "__main__":
    sys.exit(main())
