"""The ``clipfs`` command: parses the line, calls the command's module, turns errors into sentences and exit codes.

Each command lives in a module of its own that is imported when it runs, so that ``clipfs run`` never pays for what
``clipfs index`` needs. This module knows their arguments; they know what to do with them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import clipfs
from clipfs.errors import ClipfsError, UsageError

_IMAGE_NAMES = """\
An image is named as skopeo names it:
  docker://HOST/REPO[:TAG|@DIGEST]   a registry; a bare reference such as debian:12 means this
  oci:DIR[:TAG]                      an OCI image layout
  oci-archive:FILE[:TAG]             the same in a tar file
  docker-archive:FILE[:TAG]          what `docker save` writes
X may also be a .clip file, made by `clipfs index`.
"""

_EXAMPLES = """\
examples:
  clipfs run -it debian:12 bash               a shell in an image that stays in the registry
  clipfs index oci:./app:v1 -o app.clip       make the index once …
  clipfs mount app.clip /mnt                  … mount it anywhere, without the image
  clipfs ls -l app.clip /etc                  look inside
  clipfs umount /mnt
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code is the command's own for ``run`` and the error's kind otherwise."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        args = _parser().parse_args(argv)
        logging.getLogger().setLevel({0: logging.WARNING, 1: logging.INFO}.get(args.verbose, logging.DEBUG))
        command = import_module(f"clipfs.cli.{args.module}")
        code: int = getattr(command, args.call)(args)
        sys.stdout.flush()
        return code
    except ClipfsError as error:
        print(f"clipfs: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has left; point stdout elsewhere so that the interpreter's last flush is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="clipfs",
        description="Mount and run container images without downloading or unpacking them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clipfs {clipfs.__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more; twice for everything")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _add_image_commands(commands)
    _add_mount_commands(commands)
    _add_run(commands)
    return parser


Commands = argparse._SubParsersAction  # noqa: SLF001  argparse gives the type no public name


def _command(
    commands: Commands[_Parser], name: str, module: str, summary: str, *, image: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=_IMAGE_NAMES if image else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(module=module, call=name)
    return parser


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the image comes from")
    group.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", help="which image of a multi-platform one")
    group.add_argument("--authfile", type=Path, metavar="FILE", help="credentials (default: as docker and skopeo)")
    group.add_argument("--ca", type=Path, metavar="FILE", help="trust these certificate authorities (PEM)")
    group.add_argument("--insecure", action="store_true", help="allow plain HTTP and unverified TLS")


def _add_image_commands(commands: Commands[_Parser]) -> None:
    parser = _command(commands, "index", "build", "make the .clip index of an image")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (default: NAME.clip here)")
    _add_source_options(parser)

    parser = _command(commands, "inspect", "look", "say what an image is made of")
    parser.add_argument("target", metavar="X")
    parser.add_argument("--json", action="store_true", help="for programs")
    _add_source_options(parser)

    parser = _command(commands, "ls", "look", "list files of an image; fetches nothing")
    parser.add_argument("target", metavar="X")
    parser.add_argument("path", metavar="PATH", nargs="?", default="/")
    parser.add_argument("-l", dest="long", action="store_true", help="with mode, owner, size and time")
    parser.add_argument("-R", dest="recursive", action="store_true", help="with everything below")
    _add_source_options(parser)

    parser = _command(commands, "cat", "data", "write a file of an image to standard output")
    parser.add_argument("target", metavar="X")
    parser.add_argument("path", metavar="PATH")
    _add_source_options(parser)

    parser = _command(commands, "check", "data", "verify a .clip, and with --data all bytes it points at")
    parser.add_argument("target", metavar="X")
    parser.add_argument("--data", action="store_true", help="fetch, decode and verify every span")
    _add_source_options(parser)

    parser = _command(commands, "extract", "data", "unpack a whole image into a directory")
    parser.add_argument("target", metavar="X")
    parser.add_argument("directory", metavar="DIR", type=Path)
    _add_source_options(parser)


def _add_mount_commands(commands: Commands[_Parser]) -> None:
    parser = _command(commands, "mount", "mounts", "mount an image on a directory")
    parser.add_argument("target", metavar="X")
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument(
        "-o", dest="options", metavar="OPTS", default="", help="as mount(8): ro,allow_other,cache=64M,…"
    )
    parser.add_argument("-f", dest="foreground", action="store_true", help="stay in the foreground")
    _add_source_options(parser)

    parser = _command(commands, "umount", "mounts", "unmount what `clipfs mount` mounted", image=False)
    parser.add_argument("directory", metavar="DIR", type=Path)

    parser = _command(commands, "gc", "mounts", "clean up what killed processes left behind", image=False)
    parser.add_argument("--base", type=Path, metavar="DIR", help="where containers live (default: as `clipfs run`)")


def _add_run(commands: Commands[_Parser]) -> None:
    parser = _command(commands, "run", "run", "run a command in an image, a .clip or an unpacked directory")
    parser.usage = "clipfs run [OPTIONS] X [COMMAND [ARG ...]]"
    parser.add_argument("target", metavar="X")
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER)
    _add_source_options(parser)
    group = parser.add_argument_group("the container")
    group.add_argument("--name", help="its name (default: a random one)")
    group.add_argument("--rm", action="store_true", help="remove its files afterwards")
    group.add_argument("-i", "--interactive", action="store_true", help="connect standard input")
    group.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    group.add_argument("-e", "--env", action="append", default=[], metavar="K[=V]", help="set, or pass on, a variable")
    group.add_argument("--env-file", action="append", default=[], type=Path, metavar="FILE", help="one K[=V] a line")
    group.add_argument("-w", "--workdir", metavar="DIR")
    group.add_argument("-u", "--user", metavar="USER[:GROUP]")
    group.add_argument("-v", "--volume", action="append", default=[], metavar="SRC:DST[:ro]")
    group.add_argument("--tmpfs", action="append", default=[], metavar="DIR")
    group.add_argument("--hostname")
    group.add_argument("--network", choices=("host", "none"), default="host")
    group.add_argument("--memory", metavar="SIZE", help="limit, e.g. 512M")
    group.add_argument("--cpus", type=float, metavar="N", help="limit, e.g. 1.5")
    group.add_argument("--read-only", action="store_true", help="no writes outside volumes and tmpfs")
    group.add_argument("--entrypoint", metavar="COMMAND", help="instead of the image's; '' for none")
    group.add_argument("--runtime", default="runc", metavar="runc|crun|PATH")
    group.add_argument("--dir", dest="required", action="append", default=[], metavar="DIR", help="make it exist")
    group.add_argument("--upper", type=Path, metavar="DIR", help="keep what the container writes here")
    group.add_argument("--base", type=Path, metavar="DIR", help="where containers live while they run")
    group.add_argument("--stats", action="store_true", help="say at the end how much was fetched, and how fast")
