"""The tar walk, and the tree that comes of it: any archive is an ImageError or an image.

An input is an archive, or several with `NEXT` between them: layers, lowest first.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from functools import partial

from clipfs.errors import ImageError
from clipfs.layers.layer import Entry, Member, TarWalk
from tests import tars
from tests.cases import UMOCI
from tests.clips import raw_layer
from tests.disputed import PLAIN, TAR
from tests.fuzz import Change
from tests.fuzz.judge import judge
from tests.tars import BLOCK, Tar

LIMIT = 24 << 10

NEXT = b"--- the next layer ---\n"

_MAGIC = slice(257, 262)
_NUMBER = re.compile(rb"[0-9]{1,12}")
# Where each field of a header is, and how long.
_FIELDS = (
    (0, 100), (100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (329, 8), (337, 8),
    (345, 155), (483, 12), (500, 12),
)  # fmt: skip
_FILLINGS = (
    b"d", b"d/", b"d/a", b"l/x", b"./", b"/", b"../x", b".wh.a", b"d/.wh.a", b"d/.wh..wh..opq", b"n" * 300, b"\x80",
    b"\xff" * 12, b"ustar  \0", b"0", b"1", b"2", b"3", b"5", b"7", b"S", b"x", b"g", b"L", b"K",
)  # fmt: skip
_SEED_LIMIT = 12 << 10


def one(data: bytes) -> None:
    """Walk each layer, whole and in pieces; what is accepted must make a sound image."""
    archives = data.split(NEXT)
    try:
        layers = [(_walked(archive), raw_layer(archive, 4096)) for archive in archives]
        judge(layers, archives)
    except ImageError as error:
        assert str(error)  # noqa: PT017  what matters is that there is a sentence


class _Slow(TarWalk):
    """Reads every header by the way that is there for the odd ones."""

    def _plain(self, chunk: bytes, at: int, entries: list[Entry]) -> int:
        return at


def _walked(archive: bytes) -> list[Entry]:
    """The entries, which have to be the same however the archive arrives and is read."""
    found = _outcome(TarWalk(), archive, [len(archive)])
    assert found == _outcome(TarWalk(), archive, _steps(archive)), "pieces make a difference"
    assert found == _outcome(_Slow(), archive, [len(archive)]), "the fast path makes a difference"
    if isinstance(found, str):
        raise ImageError(found)
    for entry in found:
        if isinstance(entry, Member):
            _sound(entry, len(archive))
    return found


def _sound(member: Member, size: int) -> None:
    end = 0
    for at, offset, length in member.segments:
        assert end <= at < at + length <= member.size
        assert 0 <= offset <= offset + length <= size
        end = at + length


def _outcome(walk: TarWalk, archive: bytes, steps: list[int]) -> list[Entry] | str:
    entries, at = list[Entry](), 0
    try:
        for step in steps:
            entries += walk.feed(archive[at : at + step])
            at += step
        return entries + walk.finish()
    except ImageError as error:
        return str(error)


def _steps(archive: bytes) -> list[int]:
    """Sizes of pieces, some tiny, that are the same whenever the archive is."""
    chance, steps, left = random.Random(zlib.adler32(archive)), list[int](), len(archive)
    while left > 0:
        steps.append(min(left, chance.choice((1, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 8000))))
        left -= steps[-1]
    return steps


def mutate(data: bytes, change: Change, chance: random.Random) -> bytes:
    """Blocks moved about or bytes changed; then headers get the right checksums, most of the time."""
    if len(data) > 2 * BLOCK:
        (how,) = chance.choices([_moved, _renumbered, _refilled, None], (2, 2, 2, 4))
        data = how(data, chance) if how else change(data, LIMIT)
    else:
        data = change(data, LIMIT)
    return data if chance.random() < 0.1 else NEXT.join(map(_summed, data.split(NEXT)))


def _moved(data: bytes, chance: random.Random) -> bytes:
    """A run of blocks deleted, or put somewhere too."""
    blocks = len(data) // BLOCK
    first = chance.randrange(blocks)
    run = data[first * BLOCK : (first + chance.choice((1, 1, 2, 3))) * BLOCK]
    if chance.random() < 0.3:
        return data[: first * BLOCK] + data[first * BLOCK + len(run) :]
    at = chance.randrange(blocks + 1) * BLOCK
    return (data[:at] + run + data[at + BLOCK * chance.randrange(2) :])[:LIMIT]


def _renumbered(data: bytes, chance: random.Random) -> bytes:
    """A number, all of which are digits in headers and records, replaced by another one of as many digits."""
    found = chance.choice(list(_NUMBER.finditer(data)) or [None])
    if found is None:
        return data
    width, base = len(found[0]), chance.choice((8, 10))
    number = int(found[0], 10) + chance.choice((-512, -1, 1, 512))
    number = chance.choice((number, number, 0, 1, base**width - 1, chance.randrange(base**width)))
    digits = (b"%0*o" if base == 8 else b"%0*d") % (width, max(0, number))
    return data[: found.start()] + digits[-width:] + data[found.end() :]


def _refilled(data: bytes, chance: random.Random) -> bytes:
    """A field of a header emptied, filled up, or with what is in another header's."""
    at, other = (chance.randrange(len(data) // BLOCK) * BLOCK for _ in range(2))
    start, length = chance.choice(_FIELDS)
    name = chance.choice(_FILLINGS)
    filled = chance.choice((bytes(length), name.ljust(length, b"\0")[:length], data[other + start :][:length]))
    return data[: at + start] + filled + data[at + start + length :]


def _summed(archive: bytes) -> bytes:
    """The archive with the checksums right in whatever looks like a header."""
    out = bytearray(archive)
    for at in range(0, len(out) - BLOCK + 1, BLOCK):
        block = out[at : at + BLOCK]
        if block[_MAGIC] == b"ustar":
            out[at + 148 : at + 156] = b"%06o\0 " % (sum(block[:148]) + 8 * ord(" ") + sum(block[156:]))
    return bytes(out)


def seeds() -> Iterator[tuple[str, bytes]]:
    """The images that other tests compare with other people's programs, as far as they are small, and odd archives."""
    cases = {**UMOCI}
    cases.update({name: case.make for name, case in PLAIN.items()})
    cases.update({name: partial(_alone, case.make()) for name, case in TAR.items()})
    for name, make in cases.items():
        data = NEXT.join(tar.done() for tar in make())
        if len(data) <= _SEED_LIMIT:
            yield name, data
    for version in ("0.0", "0.1", "1.0"):
        pieces = [(512, b"one" * 100), (5000, b"two"), (90_000, b"")]
        yield f"sparse {version}", Tar().raw(tars.pax_sparse(b"sparse", 90_000, pieces, version=version)).done()
    many = [(1000 * number, b"x") for number in range(30)]
    yield "sparse GNU", Tar().raw(tars.gnu_sparse(b"sparse", 50_000, many)).done()
    yield "long names", Tar().raw(tars.gnu_long(b"d/" * 80 + b"f")).file(b"x").done()
    small = Tar().dir("d", mode=0o750).file("d/a", b"a" * 600, uid=1).dir("d/e").file("d/e/f", b"f").symlink("l", "d")
    small.hardlink("h", "d/a").char("c", 1, 3).block("b", 8, 1).fifo("p").symlink("l2", "/l/../d/e")
    for name, above in _above().items():
        yield f"layers {name}", NEXT.join((small.done(), above.done()))
    yield "nothing", b""
    yield "the end", tars.END


def _above() -> dict[str, Tar]:
    """What a second layer can do to a first one."""
    return {
        "replace": Tar()
        .file("d/a", b"new")
        .dir("h")
        .symlink("d/e", "/")
        .file("d/e/g", b"g")
        .file("p", xattrs={"user.x": b"y"}),
        "whiteout": Tar()
        .whiteout("d/a")
        .whiteout("d/e/f")
        .whiteout("nothing")
        .file("d/a", b"again")
        .hardlink("a2", "d/a"),
        "opaque": Tar().opaque("d").file("d/n", b"n").opaque("l2").hardlink("d/e2", "h").whiteout("l"),
        "links": Tar().file("l/through", b"x").file("l2/deep", b"y").symlink("d", "l").hardlink("d/h", "l/a"),
        "root": Tar().dir(".", mode=0o700, xattrs={"user.x": b"y"}).file("../../d/a").opaque(""),
    }


def _alone(tar: Tar) -> list[Tar]:
    return [tar]
