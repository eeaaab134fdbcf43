"""What a container executes, where and in which environment, by its image's config and the user's options.

Pure, and cheap to import: what serves the image is told which files come first before anything else is loaded.
"""

from __future__ import annotations

import os
import posixpath

import clipfs
from assembler.options import RunOptions

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def command(config: clipfs.ImageConfig, options: RunOptions) -> tuple[str, ...]:
    """What is executed. UsageError if neither the image nor the user names anything."""
    if options.entrypoint is not None:
        words = options.entrypoint + options.command
    else:
        words = config.entrypoint + (options.command or config.cmd)
    if not words or not words[0]:
        raise clipfs.UsageError("the image names no command of its own; say what to run in it")
    return words


def working_directory(config: clipfs.ImageConfig, options: RunOptions) -> str:
    """Always absolute; an image's relative one starts at the root."""
    return options.workdir or "/" + config.working_dir.lstrip("/")


def environment(config: clipfs.ImageConfig, options: RunOptions, home: str, hostname: str) -> list[str]:
    """Defaults, then the image's, then the user's; of several the last one counts."""
    variables = {"PATH": _PATH, "HOSTNAME": hostname, "HOME": home}
    if options.tty:
        variables["TERM"] = "xterm"
    caller = os.environ if options.environ is None else options.environ
    for entry in config.env:
        key, _, value = entry.partition("=")
        variables[key] = value
    for entry in options.env:
        key, given, value = entry.partition("=")
        if given:
            variables[key] = value
        elif key in caller:
            variables[key] = caller[key]
    return [f"{key}={value}" for key, value in variables.items() if key]


def first_read(config: clipfs.ImageConfig, options: RunOptions) -> tuple[str, ...]:
    """The files that are read before the command runs: the users, and wherever the command is looked for (execvp(3)).

    None of them need exist. UsageError if there is no command.
    """
    program, directory = command(config, options)[0], working_directory(config, options)
    places = [""]
    if "/" not in program:
        variables = environment(config, options, home="", hostname="")
        places = next(each for each in variables if each.startswith("PATH=")).removeprefix("PATH=").split(":")
    return ("/etc/passwd", *(posixpath.join(directory, place, program) for place in places))
