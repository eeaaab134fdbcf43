"""Which spans a run needed, in order: recorded in the first run of an image, replayed in later ones.

A trace is a text file, a line a span: layer number, span number. It is kept by the digest of the spans that it speaks
of. A trace that does not fit its image is of no use but does no harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from clipfs.aside import written_aside
from clipfs.blocks.plan import LayerView
from clipfs.errors import UsageError

_HEAD = "clipfs trace 1"

# Spans in a trace. At a MiB each, more than any image's start needs.
_MOST = 100_000

Place = tuple[int, int]


def load(path: Path, layers: Sequence[LayerView]) -> list[Place]:
    """The spans of a trace that this image has. UsageError if the file is no trace."""
    try:
        head, *lines = path.read_text().splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the trace {path}: {error}") from error
    if head != _HEAD:
        raise UsageError(f"{path} is no trace: it does not begin with '{_HEAD}'")
    found: dict[Place, None] = {}
    for line in lines[:_MOST]:
        layer, _, number = line.partition(" ")
        if not (layer.isdecimal() and number.isdecimal() and len(line) < 40):
            raise UsageError(f"{path} is no trace: '{line[:40]}' is not a layer's and a span's number")
        place = int(layer), int(number)
        if place[0] < len(layers) and place[1] < len(layers[place[0]].spans):
            found[place] = None
    return list(found)


def save(path: Path, spans: Iterable[Place]) -> None:
    """Write a trace, whole or not at all. ClipfsError or OSError if it cannot be written."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = "\n".join((_HEAD, *(f"{layer} {number}" for layer, number in spans))) + "\n"
    with written_aside(path) as aside:
        aside.write_text(text)


def everything(layers: Sequence[LayerView]) -> list[Place]:
    """All spans of an image, in order."""
    return [(layer, number) for layer, each in enumerate(layers) for number in range(len(each.spans))]
