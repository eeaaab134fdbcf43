"""Images that cover what the OCI image spec lets layers say, a function each; umoci 0.4.7 is right about all of them.

Those on which it is not to be asked are in `tests.disputed`. This module makes layers and knows nothing of trees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random

from tests.tars import GNU, Tar, gnu_long, header, padded, pax_sparse

__all__ = ["UMOCI", "Layers", "pieces", "tree"]

Layers = Sequence[Tar]

UMOCI: dict[str, Callable[[], Layers]] = {}

# cap_net_bind_service+ep, as setcap writes it.
CAPABILITY = b"\1\0\0\2\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0"


def _umoci(make: Callable[[], Layers]) -> Callable[[], Layers]:
    UMOCI[make.__name__.replace("_", " ")] = make
    return make


# --- kinds of members, and what they can have


def tree() -> Tar:
    """Something of every kind; what later layers are put upon."""
    tar = Tar().dir(".", mode=0o755).dir("d", mode=0o750, uid=7, gid=8).dir("d/sub", mode=0o711)
    tar.file("d/a", b"a" * 5000, uid=1).file("d/b", b"b").file("d/sub/c", b"c" * 513, mtime="1600000000.987654321")
    tar.file("f", b"f", mode=0o600).symlink("to-d", "d").symlink("to-f", "/f").symlink("dangling", "no/where")
    return tar.hardlink("f2", "f").char("char", 1, 3).block("block", 8, 1).fifo("fifo").dir("empty")


@_umoci
def kinds() -> Layers:
    tar = tree().char("dev-large", 259, 1_048_575).block("dev-4095", 4095, 70_000).char("dev-0-1", 0, 1)
    tar.member("d/trailing", b"x", typeflag=b"\0", magic=bytes(8)).member("v7-directory/", typeflag=b"\0")
    return [tar]


@_umoci
def modes() -> Layers:
    tar = Tar()
    for mode in (0, 0o1, 0o4755, 0o2755, 0o1777, 0o7777, 0o4000, 0o2710, 0o111):
        tar.file(f"f{mode:o}", b"x", mode=mode).dir(f"d{mode:o}", mode=mode, uid=3, gid=4).fifo(f"p{mode:o}", mode=mode)
        tar.file(f"owned{mode:o}", b"x", mode=mode, uid=1000, gid=1000)
    return [tar, Tar().dir("d0", mode=0o700).dir("d1777", mode=0o755).file("f4755", mode=0o644)]


@_umoci
def hardlinks() -> Layers:
    tar = tree().hardlink("d/f3", "./f").hardlink("to-f2", "to-f").hardlink("fifo2", "fifo").hardlink("char2", "/char")
    tar.file("many", b"many")
    for number in range(200):
        tar.hardlink(f"d/sub/many{number}", "many")
    above = Tar().hardlink("f4", "f").hardlink("empty/a2", "d/a").hardlink("d/sub/b", "d/b").whiteout("d/b")
    last = Tar().file("f", b"new").whiteout("f2").hardlink("g", "f4")
    return [tar, above, last]


@_umoci
def times() -> Layers:
    tar = Tar()
    said = "0 1 1700000000.5 1700000000.000000001 1700000000.999999999 -1 -86400.25 4294967296 8000000000.125 1e-0"
    for time in said.split()[:-1]:
        tar.file(f"f{time}", b"x", mtime=time).dir(f"d{time}", mtime=time).symlink(f"l{time}", "x", mtime=time)
    tar.file("finer", mtime="1700000000.1234567899")
    return [tar]


@_umoci
def owners() -> Layers:
    tar = Tar()
    for number in (1, 65_534, (1 << 21) - 1, 1 << 21, (1 << 31) + 7, (1 << 32) - 2):
        tar.file(f"gnu{number}", b"x", uid=number, gid=number - 1)  # base-256 where octal has no room
        said = {"uid": str(number), "gid": str(number - 1)}
        tar.member(f"pax{number}", b"x", extra=said).member(f"dir{number}", typeflag=b"5", mode=0o755, extra=said)
    return [tar]


@_umoci
def numbers_in_base_256() -> Layers:
    tar = Tar().member("all", b"x" * 700, mode=0o4711, uid=9, gid=8, mtime=1_700_000_000, base256=True, magic=GNU)
    return [tar.member("before 1970", b"y", mtime=-5, base256=True, magic=GNU).file("after", b"z")]


@_umoci
def names() -> Layers:
    tar = Tar().dir("./").file("./dot", b"1").file("/absolute", b"2").dir("./a/").file("a//b", b"3").file("a/./c", b"4")
    for name in (
        b"\xff\xfe \x80",
        "ünï→".encode(),
        b"new\nline",
        b"\\back",
        b" ",
        b"-rf",
        b"a.wh.b",
        b"...",
        b"n" * 255,
    ):
        tar.file(name, name).dir(b"in-" + name[:200]).file(b"in-" + name[:200] + b"/" + name, b"x")
        tar.symlink(b"to-" + name[:252], name)
    tar.symlink("dots", "../../././a//").symlink("not-utf8", b"\xff/\x80").symlink("long-target", "t/" * 2000 + "t")
    return [tar.hardlink("./linked", "./dot").hardlink("linked2", "/absolute")]


@_umoci
def long_names() -> Layers:
    tar, deep = Tar(), b"/".join([b"d" * 120] * 8)
    for at in range(1, 9):
        tar.dir(deep[: 121 * at - 1])
    tar.file(deep + b"/" + b"f" * 255, b"pax").hardlink("pax-link", deep + b"/" + b"f" * 255)
    for number in (99, 100, 101, 255):
        tar.file(b"p" * number, b"%d" % number)
    gnu = b"g" * 254
    tar.raw(gnu_long(gnu)).member(b"short", b"gnu", magic=GNU)
    tar.raw(gnu_long(gnu, typeflag=b"K")).member("gnu-link", typeflag=b"1", link=b"short", magic=GNU)
    tar.raw(gnu_long(b"s" * 300, typeflag=b"K") + gnu_long(b"S" * 200)).member(b"short", typeflag=b"2", magic=GNU)
    tar.dir(b"prefix").raw(header(b"ustar", size=1, tail=b"prefix") + padded(b"u"))
    return [tar]


@_umoci
def xattrs() -> Layers:
    tar = Tar().file("caps", b"x", mode=0o755, uid=5, xattrs={"security.capability": CAPABILITY})
    tar.file("user", xattrs={"user.a": b"1", "user.binary": b"\0=\n\xff\0"})
    tar.file("trusted", xattrs={"trusted.t": b"t", "security.s": b"s"}).dir(
        "d", xattrs={"user.d": b"d", "trusted.x": b"x"}
    )
    tar.member("link", typeflag=b"2", link="caps", xattrs={"trusted.on-link": b"l"})
    tar.file("large", xattrs={"user.large": bytes(range(256)) * 8}).file("n", xattrs={"user." + "n" * 250: b"n"})
    tar.hardlink("caps2", "caps").fifo("fifo").member("dev", typeflag=b"3", rdev=(1, 3), xattrs={"trusted.dev": b"d"})
    acl = b"\2\0\0\0" + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + who.to_bytes(4, "little")
        for tag, bits, who in (
            (1, 6, 2**32 - 1),
            (2, 4, 1000),
            (4, 4, 2**32 - 1),
            (16, 4, 2**32 - 1),
            (32, 0, 2**32 - 1),
        )
    )
    tar.file("acl", b"x", mode=0o640, xattrs={"system.posix_acl_access": acl})
    tar.dir("acl-dir", mode=0o740, xattrs={"system.posix_acl_default": acl})
    return [tar, Tar().file("caps2", b"no capability").dir("d", xattrs={"user.e": b"e"})]


def pieces(count: int) -> list[tuple[int, bytes]]:
    """Of whole blocks: GNU tar pads each piece of a file to that, and others only the last."""
    return [(number * 9000 + 100, b"%04d" % number * 256) for number in range(count)]


@_umoci
def pax_sparse_files() -> Layers:
    tar = Tar()
    for version in ("0.0", "0.1", "1.0"):
        name = f"v{version}".encode()
        tar.raw(pax_sparse(name + b"-some", 50_000, pieces(5), version=version))
        tar.raw(pax_sparse(name + b"-many", 1_000_001, pieces(100), version=version))
        tar.raw(pax_sparse(name + b"-one", 8192, [(4096, b"x" * 512)], version=version)).file(name + b"-next", b"next")
        tar.raw(pax_sparse(name + b"-hole", 1 << 20, [(1 << 20, b"")], version=version))
    return [tar, Tar().hardlink("again", "v1.0-some")]


@_umoci
def sizes() -> Layers:
    tar, chance = Tar(), Random(1)
    for size in (0, 1, 511, 512, 513, 4095, 4096, 4097, 131_071, 131_072, 131_073, 300_000, 300_001, 5 << 20):
        tar.file(f"random{size}", chance.randbytes(size)).file(f"plain{size}", b"%07d\n" % size * (size // 8))
    return [tar, Tar().file("random1", b"other").file("last", chance.randbytes(100_000))]


# --- layers on top of each other


@_umoci
def directories_merge() -> Layers:
    above = Tar().dir("d", mode=0o1777, uid=9, mtime="1650000000.25", xattrs={"user.new": b"1"}).file("d/new", b"new")
    last = Tar().dir("d/sub", mode=0o500, mtime=5).file("d/sub/new", b"x").file("d/a", b"A", mtime=7)
    return [tree(), above, last, Tar().dir("d/sub", mode=0o755, mtime=6)]


@_umoci
def the_root_has_attributes() -> Layers:
    return [
        Tar().dir("./", mode=0o700, uid=3, gid=4, mtime=1).file("x", b"x"),
        Tar().file("y", b"y").dir("./", mode=0o751, uid=5, mtime="1500000000.5", xattrs={"user.root": b"r"}),
    ]


@_umoci
def a_parent_is_a_symlink() -> Layers:
    lower = (
        tree()
        .symlink("abs", "/d/sub")
        .symlink("up", "../../../d")
        .symlink("d/chain", "../abs")
        .symlink("dots", "d/./..")
    )
    above = Tar().file("to-d/x", b"x").file("abs/y", b"y").file("up/sub/z", b"z").file("d/chain/w", b"w")
    above.dir("to-d/sub/deep").symlink("to-d/l", "a").hardlink("to-d/h", "to-d/a").hardlink("to-d/f2", "f").fifo(
        "dots/p"
    )
    return [lower, above, Tar().file("to-d/sub/deep/v", b"v").whiteout("to-d/b").whiteout("abs/c").opaque("up/none")]


def _put(tar: Tar, kind: str, name: str) -> Tar:
    match kind:
        case "file":
            return tar.file(name, name.encode(), mode=0o640)
        case "dir":
            return (
                tar.dir(name, mode=0o750).file(f"{name}/in", b"in").dir(f"{name}/below").file(f"{name}/below/x", b"x")
            )
        case "symlink":
            return tar.symlink(name, "elsewhere")
        case "dangling":
            return tar.symlink(name, "/no/where")
        case "hard":
            return tar.hardlink(name, "original")
        case "char":
            return tar.char(name, 1, 7)
    return tar.fifo(name)


_KINDS = ("file", "dir", "symlink", "dangling", "hard", "char", "fifo")


@_umoci
def every_kind_replaces_every_kind() -> Layers:
    lower = Tar().dir("elsewhere", mode=0o711).file("elsewhere/kept", b"kept").file("original", b"original")
    above = Tar()
    for before in _KINDS:
        for after in _KINDS:
            _put(lower, before, f"{before}-{after}")
            _put(above, after, f"{before}-{after}")
    return [lower, above]


@_umoci
def duplicates() -> Layers:
    tar = Tar().dir("elsewhere").file("original", b"original")
    for before in _KINDS:
        for after in _KINDS:
            _put(_put(tar, before, f"{before}-{after}"), after, f"{before}-{after}")
    for number in range(5):
        tar.file("same", b"%d" % number, mtime=number, mode=0o600 + number).dir("same-dir", mode=0o700 + number)
    return [tar]


@_umoci
def whiteouts() -> Layers:
    lower = tree().dir("gone").file("gone/x").dir("gone/y").file("gone/y/z").file(b"\xff", b"not utf-8")
    above = (
        Tar().whiteout("d/a").whiteout("gone").whiteout("to-f").whiteout(b"\xff").whiteout("none").whiteout("no/where")
    )
    above.whiteout("f").whiteout("char").whiteout("dangling").whiteout("empty")
    return [lower, above, Tar().file("gone", b"a file now").dir("empty", mode=0o700).file("f", b"again")]


@_umoci
def whiteouts_and_new_entries_in_any_order() -> Layers:
    lower = tree().dir("e").file("e/old", b"old").dir("e/deep").file("e/deep/old", b"old")
    above = Tar().file("f", b"new").whiteout("f").file("n", b"n").whiteout("n").whiteout("d/a").file("d/a", b"new a")
    return [lower, above.whiteout("e").dir("e", mode=0o700).file("e/new", b"new").whiteout("e/deep")]


@_umoci
def opaque_directories() -> Layers:
    lower = tree().dir("e").file("e/old", b"old").dir("e/deep").file("e/deep/old", b"old").dir("g").file("g/x", b"x")
    above = Tar().dir("d", mode=0o700).opaque("d").file("d/new", b"new")
    above.dir("e").file("e/new", b"new").opaque("e").opaque("g").opaque("none")
    return [lower, above, Tar().file("d/a", b"again").opaque("empty")]


@_umoci
def an_opaque_root() -> Layers:
    return [tree(), Tar().file("new", b"new").opaque("").dir("d", mode=0o711), Tar().file("d/x", b"x", mtime=3)]


@_umoci
def a_directory_of_thousands() -> Layers:
    tar = Tar().dir("many")
    for number in range(1200):
        tar.file(f"many/{number:05d}-{'x' * (number % 90)}", b"%d" % number)
    above = Tar()
    for number in range(0, 1200, 7):
        above.whiteout(f"many/{number:05d}-{'x' * (number % 90)}")
    return [tar, above]


@_umoci
def empty_layers() -> Layers:
    return [Tar(), tree(), Tar(), Tar().file("last", b"last"), Tar()]


def random_layers(seed: int) -> Layers:
    """Layers that do anything to a few names. Parents always exist as directories of the layer itself or below."""
    chance = Random(seed)
    layers = []
    for _ in range(4):
        tar, names = Tar(), [f"{top}/{name}" for top in "abc" for name in "uvwxyz"]
        for top in "abc":
            if chance.random() < 0.2:
                tar.whiteout(top)
            tar.dir(top, mode=chance.choice((0o755, 0o700, 0o1777)), mtime=chance.randrange(1 << 31))
            if chance.random() < 0.2:
                tar.opaque(top)
        files: list[str] = []
        for name in chance.choices(names, k=30):
            match chance.randrange(8):
                case 0:
                    tar.dir(name, uid=chance.randrange(9)).file(f"{name}/in{chance.randrange(3)}", chance.randbytes(9))
                    files = [file for file in files if file != name]
                case 1:
                    tar.symlink(name, chance.choice(names))
                    files = [file for file in files if file != name]
                case 2 if files and name not in files:
                    tar.hardlink(name, chance.choice(files))
                    files.append(name)
                case 3 if name not in files:
                    tar.whiteout(name)
                case 4:
                    tar.fifo(name)
                    files = [file for file in files if file != name]
                case _:
                    tar.file(name, chance.randbytes(chance.randrange(2000)), mtime=chance.randrange(1 << 31))
                    files.append(name)
        layers.append(tar)
    return layers


UMOCI |= {f"random {seed}": partial(random_layers, seed) for seed in range(6)}
