"""How to change binary structures: numbers in place, which a fuzzer that inserts and deletes bytes rarely hits."""

from __future__ import annotations

import random

_WIDTHS = (1, 2, 4, 8)


def changed(data: bytes, chance: random.Random) -> bytes:
    """`data` with a few aligned little-endian numbers replaced by others: extremes, neighbours, numbers from elsewhere.

    The length stays. Numbers that are not zero are preferred: they are fewer, and mean more.
    """
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        width = chance.choice(_WIDTHS)
        if len(out) < width:
            break
        at = _place(out, width, chance)
        out[at : at + width] = _number(out, at, width, chance)
    return bytes(out)


def _place(data: bytearray, width: int, chance: random.Random) -> int:
    at = 0
    for _ in range(8):
        at = chance.randrange(len(data) // width) * width
        if any(data[at : at + width]):
            break
    return at


def _number(data: bytearray, at: int, width: int, chance: random.Random) -> bytes:
    most = (1 << 8 * width) - 1
    old = int.from_bytes(data[at : at + width], "little")
    kind = chance.randrange(5)
    if kind == 0:
        other = chance.randrange(len(data) // width) * width
        return bytes(data[other : other + width])
    if kind == 1:
        return (old + chance.choice((-4096, -64, -32, -8, -1, 1, 8, 32, 64, 4096)) & most).to_bytes(width, "little")
    if kind == 2:
        return (old ^ 1 << chance.randrange(8 * width)).to_bytes(width, "little")
    if kind == 3:
        return chance.choice((0, 1, most, most >> 1, (most >> 1) + 1)).to_bytes(width, "little")
    return chance.randbytes(width)
