"""Reads a whole root file system and says how it differs from what it should be.

A program of its own, without anything of ours: it runs in the container, where `tests.soak` pipes it in, and outside,
to tell what another tool has unpacked. The first line that comes in is that, as JSON. After each further line, all is
read, and a list of sentences is the answer.
"""

import hashlib
import json
import os
import stat
import sys

# A container has mounts there, or what `clipfs run` makes and mounts.
_OTHERS = ("dev", "proc", "sys", "tmp", "workspace", "volumes", "etc/hosts", "etc/resolv.conf")
# Where that changes the time of a directory.
_TOUCHED = ("etc",)
# Sentences that are said of one reading.
_MOST = 20


def fingerprints(root: str) -> dict[str, str]:
    """Everything below `root` that readers can tell apart, by path. Raises OSError if anything cannot be read."""
    found = {}

    def fail(error: OSError) -> None:
        raise error

    for top, directories, names in os.walk(root, onerror=fail):
        inside = os.path.relpath(top, root)
        directories[:] = [name for name in directories if os.path.normpath(f"{inside}/{name}") not in _OTHERS]
        for name in [*directories, *names]:
            path = os.path.join(top, name)
            shown = os.path.normpath(f"{inside}/{name}")
            if shown not in _OTHERS:
                found[os.fsencode(shown).decode("latin-1")] = _fingerprint(path, timed=shown not in _TOUCHED)
    return found


def _fingerprint(path: str, *, timed: bool) -> str:
    info = os.lstat(path)
    content = ""
    if stat.S_ISREG(info.st_mode):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    elif stat.S_ISLNK(info.st_mode):
        content = os.fsencode(os.readlink(path)).decode("latin-1")
    size = info.st_size if stat.S_ISREG(info.st_mode) else 0
    time = int(info.st_mtime) if timed else 0
    return f"{info.st_mode:o} {info.st_uid} {info.st_gid} {size} {time} {content}"


def differences(right: dict[str, str], found: dict[str, str]) -> list[str]:
    """A sentence for each path that is not as it should be, up to a number."""
    return [
        f"{path}: {found.get(path, 'is not there')}, not {right.get(path, 'there')}"
        for path in sorted({*right, *found})
        if right.get(path) != found.get(path)
    ][:_MOST]


def main(root: str) -> None:
    """Until there is nothing more to read."""
    right = json.loads(sys.stdin.readline())
    for _ in sys.stdin:
        print(json.dumps(differences(right, fingerprints(root))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "/")
