"""What a mount can be told, and the comma-separated spelling of it that mount(8), fstab and ``clipfs mount -o`` share.

This module knows neither FUSE nor processes. It must stay cheap to import: it is on the path of every mount.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from clipfs.errors import UsageError

# What mount(8), systemd and fstab put on the line for their own use, and what changes nothing on a read-only tree.
_IGNORED = frozenset(
    (
        *("defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "_netdev", "_rnetdev"),
        *("async", "sync", "dirsync", "silent", "loud", "lazytime", "nolazytime", "diratime", "nodiratime"),
        *("atime", "noatime", "relatime", "norelatime", "strictatime", "nostrictatime", "default_permissions"),
    )
)
# The last four are what the kernel shows of a mount; mount(8) hands them back with a remount.
_IGNORED_KEYS = frozenset(("user", "helper", "uhelper", "comment", "user_id", "group_id", "max_read", "blksize"))

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}

# Of a size: below the 2^63 bytes that a file, a disk or a limit can have. int() refuses thousands of digits.
_DIGITS = 19

_LONGEST_TIMEOUT = 3600.0

# What stands before a path in the name of an image, or of what carries its data.
_PATH_FORMS = ("oci", "oci-archive", "docker-archive", "clip")


@dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """How to mount. `source`, `authfile`, `ca` and `insecure` say where the bytes come from and how to get in; timeout,
    how many seconds a read may take with all its attempts (None for $CLIPFS_TIMEOUT or 90).

    view: who answers for names and attributes. ``kernel``: the kernel's own EROFS, and as fast; for root, on Linux
    ≥ 6.12 (or ≥ 5.16 with loop devices). ``fuse``: this library. ``auto``: what $CLIPFS_VIEW
    says, or the kernel where that is possible.
    allow_other: may other users look in? None means yes for root, whose mounts are meant for others, and no otherwise.
    cache: bytes of decoded data kept in memory. cache_dir: where it is kept on disk, None for this user's usual place;
    cache_size: how many bytes of it, None for a tenth of that disk, 0 for none; cache_compression: by zstd.
    prefetch: what to fetch before it is asked for: ``trace`` (what earlier mounts of the image needed), ``all``,
    ``none``, or a file with a trace. first: files of the image that will be read first: without a trace, the beginnings
    of these and of their interpreters are fetched while the mount is made. log: a file for what the serving process has
    to say; log_format: text, or json for a JSON object a line. report: a file for what the mount has done, written at
    its end (see `report`). metrics: HOST:PORT where counters are served in Prometheus' format.
    suid, dev: honour setuid bits and device nodes in this mount itself; an overlay on top of it goes by its own flags.
    name: what the table of mounts calls it, None for the path of the .clip.
    """

    view: str = "auto"
    allow_other: bool | None = None
    cache: int = 64 << 20
    cache_dir: Path | None = None
    cache_size: int | None = None
    cache_compression: bool = True
    prefetch: str = "trace"
    first: tuple[str, ...] = ()
    log: Path | None = None
    log_format: str = "text"
    report: Path | None = None
    metrics: str | None = None
    suid: bool = False
    dev: bool = False
    noexec: bool = False
    name: str | None = None
    source: str | None = None
    authfile: Path | None = None
    ca: Path | None = None
    insecure: bool = False
    timeout: float | None = None

    def settled(self) -> Self:
        """The same for a process in another directory: all paths are absolute. UsageError for what has no sense."""
        view(self.view)
        log_format(self.log_format)
        values: dict[str, Any] = {
            name: value.absolute() for name, value in asdict(self).items() if isinstance(value, Path)
        }
        if self.timeout is not None:
            timeout(str(self.timeout))
        elif text := os.environ.get("CLIPFS_TIMEOUT"):
            values["timeout"] = timeout(text, "CLIPFS_TIMEOUT")
        if self.prefetch not in _PREFETCH:
            values["prefetch"] = str(Path(self.prefetch).absolute())
        if self.metrics is not None:
            values["metrics"] = endpoint(self.metrics)
        if self.source is not None:
            values["source"] = source(self.source)
        return replace(self, **values)

    def to_json(self) -> dict[str, Any]:
        """As values of JSON, for another process."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` has made, also of an older or a newer version of this class."""
        known = {field.name: field.type for field in fields(cls)}
        given: dict[str, Any] = {name: value for name, value in values.items() if name in known}
        paths = [name for name, value in given.items() if known[name] == "Path | None" and value is not None]
        given |= {name: Path(given[name]) for name in paths}
        return cls(**given | {"first": tuple(given.get("first", ()))})


_PREFETCH = ("trace", "all", "none")

# Each option that means something here: the field it sets, and the value in terms of the text after '='. Those
# without a converter take no value; of the pairs that mount(8) knows, the last one on the line wins.
_FLAGS: dict[str, tuple[str, bool]] = {
    "allow_other": ("allow_other", True),
    "suid": ("suid", True),
    "nosuid": ("suid", False),
    "dev": ("dev", True),
    # mount(8) takes suid and dev for what is so anyway, and never hands them on.
    "allow_suid": ("suid", True),
    "allow_dev": ("dev", True),
    "nodev": ("dev", False),
    "noexec": ("noexec", True),
    "exec": ("noexec", False),
    "insecure": ("insecure", True),
}
_VALUES: dict[str, Callable[[str], object]] = {
    "view": lambda text: view(text),
    "cache": lambda text: byte_count(text, "cache="),
    "cache-dir": lambda text: Path(text).absolute(),
    "cache-size": lambda text: byte_count(text, "cache-size="),
    "cache-compression": lambda text: compression(text),
    "prefetch": lambda text: prefetch(text),
    "log": lambda text: Path(text).absolute(),
    "log-format": lambda text: log_format(text),
    "report": lambda text: report_path(text),
    "metrics": lambda text: endpoint(text),
    "source": lambda text: source(text),
    "authfile": lambda text: readable(text, "credentials"),
    "ca": lambda text: readable(text, "certificates"),
    "timeout": lambda text: timeout(text),
}


@dataclass(frozen=True, slots=True)
class Parsed:
    """An option string understood: the mount's options, and what mount(8) asked for besides."""

    options: MountOptions
    remount: bool
    writable: bool  # the last of ro and rw was rw; nothing said counts as ro
    nofail: bool  # what does not exist is no error
    named: frozenset[str]  # the fields of the options that were said, and are no defaults


def parse(text: str, *, sloppy: bool = False) -> Parsed:
    """``ro,allow_other,cache=64M,…``. UsageError for an unknown option, unless `sloppy` (mount -s)."""
    fields: dict[str, object] = {}
    remount = writable = nofail = False
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, equals, value = word.partition("=")
        if word == "remount":
            remount = True
        elif word == "nofail":
            nofail = True
        elif word in _FLAGS:
            field, setting = _FLAGS[word]
            fields[field] = setting
        elif name in _VALUES and equals:
            if not value:
                raise UsageError(f"option {name}= wants a value")
            fields[name.replace("-", "_")] = _VALUES[name](value)
        elif word in ("ro", "rw"):
            writable = word == "rw"
        elif not (word in _IGNORED or name in _IGNORED_KEYS or name.lower().startswith("x-") or sloppy):
            known = ", ".join(sorted([*_FLAGS, *(f"{key}=" for key in _VALUES), "ro", "remount"]))
            raise UsageError(f"unknown mount option '{word}'; there are {known}, and those of mount(8) itself")
    options = MountOptions(**fields)  # type: ignore[arg-type]
    return Parsed(options, remount, writable, nofail, frozenset(fields))


def view(text: str, what: str = "view") -> str:
    """``auto``, ``kernel`` or ``fuse``. UsageError says `what` should be that."""
    if text not in ("auto", "kernel", "fuse"):
        raise UsageError(f"{what} is auto, kernel or fuse, not '{text}'")
    return text


def timeout(text: str, what: str = "timeout") -> float:
    """Seconds, above 0 and up to an hour. UsageError says `what` should be that."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        raise UsageError(f"{what} is the number of seconds that a read may take, up to 3600, not '{text}'")
    return seconds


def compression(text: str) -> bool:
    """``zstd`` or ``none``: is the disk cache compressed?"""
    if text not in ("zstd", "none"):
        raise UsageError(f"cache-compression is zstd or none, not '{text}'")
    return text == "zstd"


def log_format(text: str) -> str:
    """``text`` or ``json``."""
    if text not in ("text", "json"):
        raise UsageError(f"log-format is text or json, not '{text}'")
    return text


def readable(path: str | Path, what: str) -> Path:
    """A file to be read later, made absolute; UsageError names `what` is in it if it is not there to be read."""
    try:
        with open(path, "rb"):
            return Path(path).absolute()
    except OSError as error:
        raise UsageError(f"cannot read {what} from {path}: {error.strerror}") from None


def report_path(text: str) -> Path:
    """A file to be written later, made absolute; it must be possible, and is by somebody who has no other place to say
    that it was not."""
    # Late, for few ask for it.
    from clipfs.aside import check_place

    path = Path(text).absolute()
    if path.is_dir():
        raise UsageError(f"cannot write a report to {path}: it is a directory")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write a report to {path}: there is no directory {path.parent}")
    check_place(path)
    return path


def endpoint(text: str) -> str:
    """``PORT``, ``:PORT`` or ``HOST:PORT`` as the last; who names no host means this machine."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) < 1 << 16):
        raise UsageError(f"metrics are served at HOST:PORT, such as 127.0.0.1:9464, not at '{text}'")
    return f"{host or '127.0.0.1'}:{port}"


def prefetch(text: str) -> str:
    """``trace``, ``all``, ``none``, or the path of a trace, made absolute."""
    if text in _PREFETCH:
        return text
    path = Path(text).absolute()
    if not path.is_file():
        raise UsageError(f"prefetch is trace, all, none or the file of a trace, and there is no file {path}")
    return str(path)


def source(text: str) -> str:
    """The name of an image, or of a packed clip, in which a path is made absolute."""
    form, colon, rest = text.partition(":")
    if colon and rest and form in _PATH_FORMS:
        return f"{form}:{Path(rest).absolute()}"
    return str(Path(text).absolute()) if os.path.isfile(text) else text


def byte_count(text: str, what: str) -> int:
    """``64M`` in bytes. UsageError names `what` the number was for."""
    number = text.upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:].isalpha() else ""
    digits = number.removesuffix(unit)
    known = unit in _UNITS and digits.isascii() and digits.isdigit() and len(digits) <= _DIGITS
    if not known or (count := int(digits) << _UNITS[unit]) >= 1 << 63:
        raise UsageError(f"{what} wants a size such as 512M or 2G, not '{text}'")
    return count
