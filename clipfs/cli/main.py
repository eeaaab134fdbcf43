"""The ``clipfs`` command: parses the line, calls the command's module, turns errors into sentences and exit codes.

Each command lives in a module of its own that is imported when it runs, so that ``clipfs run`` never pays for what
``clipfs index`` needs. This module knows their arguments; they know what to do with them.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import clipfs
from clipfs.cli import ending, texts
from clipfs.errors import ClipfsError, UsageError, reason, single
from clipfs.log import complain, discard, open_closed_streams, print_any_name, to_terminal

_log = logging.getLogger(__name__)


# 128 + SIGPIPE, as shells have it; EX_IOERR of sysexits(3).
_BROKEN_PIPE = 141
_INPUT_OUTPUT = 74

# What `podman run` says when it failed, when the command cannot be executed, and when there is no such command.
_NOT_RUN = 125
_RUN_CODES = (125, 126, 127)

# To the first column, and clear the line.
_WIPED = "\r\x1b[K"


_X = "a .clip file or the name of an image, see below"


class _Parser(argparse.ArgumentParser):
    #: One positional may be left out, and is taken for that at an option behind the others: what is left over then is
    #: another try's. Not the default, as that knows neither subcommands nor what takes the rest of the line.
    mixed = False
    _halfway = False

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Of --help and --version. The default says nothing if that fails."""
        print(message, end="", file=file, flush=True)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A command's parser leaves what it does not know to the one above, whose help says nothing about it."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown and self.mixed and not self._halfway:
            self._halfway = True  # it comes back here, for the options first and then for the rest
            found, unknown = self.parse_known_intermixed_args(args, namespace)
            self._halfway = False
        if unknown and not self._halfway:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code is the command's own for ``run`` and the error's kind otherwise."""
    open_closed_streams()
    # Who starts us may ignore it, and so would we: then nobody could say how a child has ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ending.as_interrupt()
    print_any_name()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _obey(words)
    except ClipfsError as error:
        _say(str(error))
        # One of no kind of its own, for which the system had a reason, is about a file.
        plain = type(error) is ClipfsError and isinstance(error.__cause__, OSError)
        return _failure(words, _INPUT_OUTPUT if plain else error.exit_code)
    except KeyboardInterrupt:
        _say("interrupted")
        return ending.exit_code()
    except BrokenPipeError:
        discard(1)
        return _BROKEN_PIPE
    except OSError as error:
        _log.debug("where it came from", exc_info=True)
        _say(reason(error))
        discard(1)
        return _failure(words, _INPUT_OUTPUT)


def _obey(words: list[str]) -> int:
    args = _parser().parse_args(words)
    to_terminal(sys.stderr, {0: logging.WARNING, 1: logging.INFO}.get(args.verbose, logging.DEBUG))
    if hasattr(args, "authfile"):  # it may read credentials
        from clipfs.mounting.kernel import undumpable

        undumpable()
    command = import_module(f"clipfs.cli.{args.module}")
    try:
        code: int = getattr(command, args.call)(args)
    except BaseExceptionGroup as group:
        raise single(group) from None
    sys.stdout.flush()
    return code


def _say(sentence: str) -> None:
    """On stderr, in place of a progress line that may be there."""
    complain(f"{_WIPED if sys.stderr.isatty() else ''}clipfs: {sentence}")


def _failure(words: Sequence[str], code: int) -> int:
    """The exit code for an error of our own: for ``run`` one that is rarely the command's, as podman has it."""
    running = next((word for word in words if not word.startswith("-")), "") == "run"
    return _NOT_RUN if running and code not in _RUN_CODES else code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="clipfs",
        description="Mount and run container images without downloading or unpacking them.",
        epilog=texts.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clipfs {clipfs.__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more; twice for everything")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _add_image_commands(commands)
    _add_mount_commands(commands)
    _add_run(commands)
    _add_telling_commands(commands)
    return parser


def _directory(text: str) -> Path:
    """A variable of a shell that is not set does not mean the working directory, as a path without a word would."""
    if not text:
        raise argparse.ArgumentTypeError("it has no name")
    return Path(text)


Commands = argparse._SubParsersAction  # noqa: SLF001  argparse gives the type no public name


def _command(
    commands: Commands[_Parser], name: str, module: str, summary: str, *, epilog: str = texts.IMAGE_NAMES
) -> _Parser:
    parser: _Parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(module=module, call=name)
    return parser


def _add_source_options(parser: argparse.ArgumentParser, *, reads: bool = False) -> None:
    group = parser.add_argument_group("where the image comes from")
    group.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", help="which image of a multi-platform one")
    group.add_argument("--authfile", type=Path, metavar="FILE", help="credentials (default: as docker and skopeo)")
    group.add_argument("--ca", type=Path, metavar="FILE", help="trust these certificate authorities (PEM)")
    group.add_argument("--insecure", action="store_true", help="allow plain HTTP and unverified TLS")
    if reads:
        group.add_argument("--source", metavar="IMAGE", help="read the bytes here, not where the index says")


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is kept and fetched ahead")
    group.add_argument(
        "--cache-dir", type=_directory, metavar="DIR", help="decoded data on disk (root's: /var/cache/clipfs/spans)"
    )
    group.add_argument("--cache-size", metavar="SIZE", help="of it at most (default: a tenth of the disk; 0 for none)")
    group.add_argument("--cache-compression", choices=("zstd", "none"), help="default: zstd")
    group.add_argument("--prefetch", metavar="trace|all|none|FILE", help="default: trace, what earlier runs needed")
    group = parser.add_argument_group("how it is served")
    group.add_argument("--view", choices=("auto", "kernel", "fuse"), help="who answers for names (default: auto)")
    group = parser.add_argument_group("what is told")
    group.add_argument("--report", metavar="FILE", help="keep what was fetched and why, for `clipfs explain FILE`")
    group.add_argument("--metrics", metavar="[HOST:]PORT", help="serve counters for Prometheus here")


def _add_image_commands(commands: Commands[_Parser]) -> None:
    parser = _command(commands, "index", "build", "make the .clip index of an image", epilog=texts.INDEXED)
    parser.add_argument("image", metavar="IMAGE", help="its name, see below")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (default: NAME.clip here)")
    parser.add_argument(
        "--span-size", default="4M", metavar="SIZE", help="between places to begin decoding, at most (default: 4M)"
    )
    _add_source_options(parser)

    parser = _command(
        commands,
        "pack",
        "pack",
        "put an image into one file that carries its data",
        epilog=texts.PACKED + texts.IMAGE_NAMES,
    )
    parser.add_argument("target", metavar="X", help="as below, or a directory that holds a root file system")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (default: NAME.packed.clip here)")
    _add_source_options(parser, reads=True)

    parser = _command(commands, "inspect", "look", "say what an image is made of")
    parser.add_argument("target", metavar="X", help=_X)
    parser.add_argument("--json", action="store_true", help="for programs")
    _add_source_options(parser)

    parser = _command(commands, "ls", "look", "list files of an image; fetches nothing")
    parser.mixed = True
    parser.add_argument("target", metavar="X", help=_X)
    parser.add_argument("path", metavar="PATH", nargs="?", default="/", help="in the image (default: /)")
    parser.add_argument("-l", dest="long", action="store_true", help="with mode, owner, size and time")
    parser.add_argument("-R", dest="recursive", action="store_true", help="with everything below")
    _add_source_options(parser)

    parser = _command(commands, "cat", "data", "write a file of an image to standard output")
    parser.add_argument("target", metavar="X", help=_X)
    parser.add_argument("path", metavar="PATH", help="of a regular file in the image; links are followed")
    _add_source_options(parser, reads=True)

    parser = _command(commands, "check", "data", "verify a .clip, and with --data all bytes it points at")
    parser.add_argument("target", metavar="X", help=_X)
    parser.add_argument("--data", action="store_true", help="fetch, decode and verify every span")
    _add_source_options(parser, reads=True)

    parser = _command(commands, "extract", "data", "unpack a whole image into a directory")
    parser.add_argument("target", metavar="X", help=_X)
    parser.add_argument("directory", metavar="DIR", type=_directory, help="an empty or a new one")
    _add_source_options(parser, reads=True)


def _add_mount_commands(commands: Commands[_Parser]) -> None:
    parser = _command(
        commands, "mount", "mount", "mount an image on a directory", epilog=texts.MOUNT_OPTIONS + texts.IMAGE_NAMES
    )
    parser.add_argument("target", metavar="X", help=_X)
    parser.add_argument("directory", metavar="DIR", type=_directory, help="where; it must exist")
    parser.add_argument(
        "-o", dest="options", metavar="OPTS", default="", help="separated by commas; they are listed below"
    )
    parser.add_argument("-f", dest="foreground", action="store_true", help="stay, and serve until unmounted")
    _add_source_options(parser, reads=True)
    _add_cache_options(parser)

    parser = _command(commands, "umount", "mounts", "unmount what `clipfs mount` mounted", epilog="")
    parser.add_argument("directory", metavar="DIR", type=_directory, help="where it is mounted")

    parser = _command(
        commands, "upgrade", "mounts", "serve a mount by a new process of the version installed now", epilog=""
    )
    parser.add_argument(
        "directory", metavar="DIR", type=_directory, help="where it is mounted; its readers notice nothing"
    )

    parser = _command(commands, "gc", "mounts", "clean up what killed processes left behind", epilog="")
    parser.add_argument("--base", type=_directory, metavar="DIR", help="where containers live (default: as of `run`)")


def _add_telling_commands(commands: Commands[_Parser]) -> None:
    parser = _command(
        commands,
        "explain",
        "explain",
        "say what a mount has fetched, when, why and for which files",
        epilog=texts.EXPLAIN,
    )
    parser.add_argument("target", metavar="DIR|FILE", help="where it is mounted, or a report that was kept")
    parser.add_argument("--json", action="store_true", help="for programs; this is what a report is")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a picture of the layers")

    parser = _command(
        commands, "cache", "cache", "look after the decoded data that is kept on disk", epilog=texts.CACHE
    )
    parser.add_argument("what", choices=("ls", "gc", "prune", "verify"), metavar="ls|gc|prune|verify", help="see below")
    parser.add_argument("--cache-dir", type=_directory, metavar="DIR", help="default: as `clipfs mount`")
    parser.add_argument("--cache-size", metavar="SIZE", help="for ls and gc: the limit (default: as `clipfs mount`)")
    parser.add_argument("--json", action="store_true", help="for programs")


def _add_run(commands: Commands[_Parser]) -> None:
    parser = _command(commands, "run", "run", "run a command in an image, a .clip or an unpacked directory")
    parser.usage = "clipfs run [OPTIONS] X [COMMAND [ARG ...]]"
    parser.add_argument("target", metavar="X", help=_X)
    # argparse counts what takes the rest among what must be given; then it would be named in complaints about X.
    rest = parser.add_argument(
        "command", metavar="COMMAND", nargs=argparse.REMAINDER, help="instead of the image's own"
    )
    rest.required = False
    _add_source_options(parser, reads=True)
    _add_cache_options(parser)
    group = parser.add_argument_group("the container")
    group.add_argument("--name", help="its name (default: a random one)")
    group.add_argument("--rm", action="store_true", help="remove its files afterwards")
    group.add_argument("-i", "--interactive", action="store_true", help="connect standard input")
    group.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    group.add_argument("-e", "--env", action="append", default=[], metavar="K[=V]", help="set, or pass on, a variable")
    group.add_argument("--env-file", action="append", default=[], type=Path, metavar="FILE", help="one K[=V] a line")
    group.add_argument("-w", "--workdir", metavar="DIR", help="start here")
    group.add_argument("-u", "--user", metavar="USER[:GROUP]", help="names or numbers")
    group.add_argument(
        "-v", "--volume", action="append", default=[], metavar="SRC:DST[:ro]", help="bind SRC of the host"
    )
    group.add_argument("--tmpfs", action="append", default=[], metavar="DIR", help="memory, empty at first")
    group.add_argument("--hostname", help="default: the host's, or its id without a network")
    group.add_argument("--network", choices=("host", "none"), default="host", help="default: host")
    group.add_argument("--memory", metavar="SIZE", help="limit, swap included, e.g. 512M")
    group.add_argument("--cpus", type=float, metavar="N", help="limit, e.g. 1.5")
    group.add_argument("--read-only", action="store_true", help="no writes outside volumes and tmpfs")
    group.add_argument("--entrypoint", metavar="COMMAND", help="instead of the image's; '' for none")
    group.add_argument("--runtime", default="runc", metavar="runc|crun|PATH", help="default: runc")
    group.add_argument("--dir", dest="required", action="append", default=[], metavar="DIR", help="make it exist")
    group.add_argument("--upper", type=_directory, metavar="DIR", help="keep what the container writes here")
    group.add_argument(
        "--base", type=_directory, metavar="DIR", help="where containers live (default: /var/lib/clipfs/containers)"
    )
    group.add_argument("--stats", action="store_true", help="say at the end how much was fetched, and how fast")
