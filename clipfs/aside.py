"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipfs.errors import ClipfsError, UsageError


def check_place(out: Path) -> None:
    """UsageError or ClipfsError, with the reason, unless a file could be written to `out` now."""
    _check_kind(out)
    try:
        # Most file systems make this one without a name, so that nobody ever sees it.
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise ClipfsError(f"cannot write {out}: {error.strerror}") from error


def _check_kind(out: Path) -> None:
    try:
        there = os.stat(out)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ClipfsError(f"cannot write {out}: {error.strerror}") from error
    if stat.S_ISDIR(there.st_mode):
        raise UsageError(f"cannot write {out}: it is a directory")
    if not stat.S_ISREG(there.st_mode):
        raise UsageError(f"cannot write {out}: it is there and is no regular file")


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A path beside `out` to write to; it becomes `out` if all goes well and disappears if not.

    An OSError of who writes there is a ClipfsError about `out`: nobody else knows that path.
    """
    _check_kind(out)
    try:
        # Not of the whole name, which may be as long as one can be.
        handle, name = tempfile.mkstemp(prefix=f".{out.name[:32]}.", dir=out.parent)
    except OSError as error:
        raise ClipfsError(f"cannot write {out}: {error.strerror}") from error
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)
        aside.replace(out)
    except OSError as error:
        raise ClipfsError(f"cannot write {out}: {error.strerror}") from error
    finally:
        aside.unlink(missing_ok=True)
