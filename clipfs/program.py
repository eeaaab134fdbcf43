"""A module of clipfs as a program of its own: the processes of a mount."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Variables that name a file or a directory: other processes have other working directories.
_PATHS = (
    *("CLIPFS_STATE", "CLIPFS_CACHE", "REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "CONTAINERS_REGISTRIES_CONF"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR"),
)


def program(module: str, *words: object) -> tuple[list[str], dict[str, str]]:
    """The command that runs a module of this version of clipfs with these words, and its environment."""
    home = str(Path(__file__).parents[1])
    search = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **absolute_paths(), "PYTHONPATH": search}
    return [sys.executable, "-P", "-m", module, *map(str, words)], environment


def absolute_paths() -> dict[str, str]:
    """What the environment names relative to the working directory, by variable, so that it means the same anywhere."""
    return {name: str(Path(path).absolute()) for name in _PATHS if (path := os.environ.get(name))}
