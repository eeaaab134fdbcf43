"""A layer as a stream: pieces of any size, members after members, where it ends, and what bounds it."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfs.errors import ImageError
from clipfs.layers import bounds
from clipfs.layers.layer import Entry, Member, Opaque, TarWalk, Whiteout
from clipfs.layers.pax import MAX_EXTENSION
from clipfs.layers.tree import Tree
from tests.tars import END, GNU, Tar, gnu_long, gnu_sparse, header, padded, pax, pax_sparse
from tests.walks import content, members, refused, walked

PIECES = [(n * 2000, b"%d" % n * 100) for n in range(30)]
LONG = b"/".join([b"long" * 20] * 12)


def units() -> list[bytes]:
    """Members of every kind, each with all that belongs to it."""
    files = Tar().dir("usr").file("usr/empty")
    for size in (1, 511, 512, 513, 70_000):
        files.file(f"usr/f{size}", (bytes(range(256)) * 300)[:size])
    return [
        unit.done()[: -len(END)]
        for unit in (
            files,
            Tar().raw(pax({"comment": "for all", "SCHILY.xattr.user.all": "1"}, typeflag=b"g")).file("g", b"g"),
            Tar().raw(pax({"SCHILY.xattr.user.all": ""}, typeflag=b"g")).file("h", b"h"),
            Tar().symlink("link", "usr").hardlink("hard", "usr/f1").char("c", 1, 3).block("b", 8, 0).fifo("p"),
            Tar().file("caps", b"x", xattrs={"security.capability": b"\1\0\0\2", "user.empty": b""}),
            Tar().file(LONG, b"pax").symlink("to-long", LONG),
            Tar().raw(gnu_long(LONG + b"2") + gnu_long(LONG, typeflag=b"K")).symlink("x", "y"),
            Tar().whiteout("usr/gone").opaque("usr").opaque("").file(".wh..wh.plnk/1.2"),
            Tar().raw(gnu_sparse(b"s", 90_000, PIECES)),
            Tar().raw(pax_sparse(b"s0.0", 90_000, PIECES, version="0.0")),
            Tar().raw(pax_sparse(b"s0.1", 90_000, PIECES, version="0.1")),
            Tar().raw(pax_sparse(b"s1.0", 90_000, PIECES, version="1.0")),
            Tar().member("seven", b"contiguous", typeflag=b"7", magic=GNU, base256=True, mtime="-1.5"),
        )
    ]


UNITS = units()
ARCHIVE = b"".join(UNITS) + END
WHOLE = walked(ARCHIVE)


class TestPieces:
    """Which pieces the stream arrives in makes no difference."""

    def test_the_archive_has_what_there_is(self) -> None:
        kinds = {type(entry) for entry in WHOLE}
        assert kinds == {Member, Whiteout, Opaque}
        found = {entry.path: entry for entry in WHOLE if isinstance(entry, Member)}
        assert len(found) == len([entry for entry in WHOLE if isinstance(entry, Member)]) == 23
        assert content(found[b"usr/f70000"], ARCHIVE) == (bytes(range(256)) * 300)[:70_000]
        assert found[b"usr/f1"].offset == 1024

    @pytest.mark.parametrize("step", [1, 3, 100, 511, 512, 513, 1024, 4096, 65_535])
    def test_of_one_size(self, step: int) -> None:
        assert walked(ARCHIVE, step=step) == WHOLE

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, len(ARCHIVE)), max_size=40))
    def test_of_random_sizes(self, cuts: list[int]) -> None:
        walk, entries = TarWalk(), list[Entry]()
        for start, end in pairwise([0, *sorted(cuts), len(ARCHIVE)]):
            entries += walk.feed(ARCHIVE[start:end])
        assert entries + walk.finish() == WHOLE

    def test_of_any_size_on_the_fast_path_or_off_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TarWalk, "_expects_plain", lambda walk: False)
        assert walked(ARCHIVE) == WHOLE

    def test_entries_come_as_soon_as_their_headers_are_there(self) -> None:
        walk = TarWalk()
        assert [entry.path for entry in walk.feed(header(b"f", size=1 << 40))] == [b"f"]
        assert walk.feed(bytes(1 << 20)) == []

    def test_contents_are_passed_over_whatever_is_in_them(self) -> None:
        inner = Tar().file("../../escape").file("x", b"y").done()
        assert members(Tar().file("tar", inner * 3).file("after")).keys() == {b"tar", b"after"}


class TestExtendedHeaders:
    def test_global_ones_are_for_all_that_follow_until_they_are_taken_back(self) -> None:
        said: dict[str | bytes, str | bytes] = {"uid": "5", "SCHILY.xattr.user.a": "1", "mtime": "2.5"}
        tar = Tar().file("before", mtime=0).raw(pax(said, typeflag=b"g")).file("a").dir("b", uid=6)
        tar.raw(pax({"uid": "7"}) + header(b"own")).raw(pax({"uid": ""}, typeflag=b"g")).file("c", uid=8)
        found = members(tar)
        assert [found[path].uid for path in (b"before", b"a", b"b", b"own", b"c")] == [0, 5, 5, 7, 8]
        assert [found[path].mtime_ns for path in (b"before", b"a", b"c")] == [0, 2_500_000_000, 2_500_000_000]
        assert (found[b"before"].xattrs, found[b"c"].xattrs) == ({}, {b"user.a": b"1"})

    def test_local_ones_are_for_one_member_only(self) -> None:
        found = members(
            pax({"uid": "5"}) + header(b"a") + header(b"b") + gnu_long(b"c") + header(b"x") + header(b"d") + END
        )
        assert [(path, member.uid) for path, member in found.items()] == [(b"a", 5), (b"b", 0), (b"c", 0), (b"d", 0)]

    def test_the_last_of_several_counts(self) -> None:
        raw = pax({"path": "a", "uid": "5"}) + pax({"path": "b"}) + header(b"x") + gnu_long(b"c") + gnu_long(b"d")
        found = members(raw + header(b"x") + END)
        assert [(path, member.uid) for path, member in found.items()] == [(b"b", 0), (b"d", 0)]

    def test_may_be_empty(self) -> None:
        raw = header(b"x", typeflag=b"x") + header(b"g", typeflag=b"g") + header(b"l", typeflag=b"L")
        assert members(raw + header(b"name") + END).keys() == {b"name"}

    def test_the_largest_that_is_read(self) -> None:
        value = "v" * (MAX_EXTENSION - len("1048576 comment=\n"))
        assert members(pax({"comment": value}) + header(b"f") + END).keys() == {b"f"}


class TestEnd:
    @pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(10240), bytes(1024) + b"junk" * 999])
    @pytest.mark.parametrize("step", [300, 1 << 20])
    def test_an_archive_ends_with_zeros_or_with_the_stream(self, end: bytes, step: int) -> None:
        raw = header(b"f", size=3) + padded(b"abc")
        assert [entry.path for entry in walked(raw + end, step=step)] == [b"f"]
        assert walked(end, step=step) == []

    def test_padding_after_the_last_member_may_be_missing(self) -> None:
        assert members(header(b"f", size=3) + b"abc").keys() == {b"f"}
        assert members(header(b"f", size=3) + b"abc" + bytes(200)).keys() == {b"f"}

    def test_cut_anywhere_it_is_refused_or_has_ended_between_two_members(self) -> None:
        """Every block boundary, and the middle of every block."""
        starts = {sum(map(len, UNITS[:number])) for number in range(len(UNITS) + 1)}
        ends = 0
        for at in [*range(0, len(ARCHIVE), 512), *range(256, len(ARCHIVE), 512)]:
            entries, error = attempt(ARCHIVE[:at])
            assert entries == WHOLE[: len(entries)]
            if error is not None:
                assert "the layer ends in the middle of a " in str(error)
                assert 0 <= (error.offset or 0) <= at
                assert at not in starts
            else:
                ends += 1
                assert all(entry.offset >= at for entry in WHOLE[len(entries) :])
        assert ends > len(WHOLE)


def attempt(data: bytes) -> tuple[list[Entry], ImageError | None]:
    """What can be read of an archive, and why no more."""
    walk, entries = TarWalk(), list[Entry]()
    try:
        entries += walk.feed(data)
        entries += walk.finish()
    except ImageError as error:
        return entries, error
    return entries, None


def endless(block: bytes, count: int) -> Callable[[], None]:
    """Feed the same bytes again and again."""

    def act() -> None:
        walk, held = TarWalk(), list[Entry]()
        for _ in range(count):
            held += walk.feed(block)

    return act


BIG = header(b"f", size=3) + padded(b"abc")
HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "PAX header of 1 GiB": ("has 1073741824 bytes; no more than", lambda: header(b"x", typeflag=b"x", size=1 << 30)),
    "global header of 1 MiB + 1": ("no more than", lambda: header(b"x", typeflag=b"g", size=MAX_EXTENSION + 1)),
    "long name of 1 TiB": ("no more than", lambda: header(b"x", typeflag=b"L", size=1 << 40, magic=GNU)),
    "long link of -1 bytes": ("has -1 bytes", lambda: header(b"x", typeflag=b"K", size=-1, magic=GNU)),
    "extended header of letters": ("should have a number", lambda: header(b"x", typeflag=b"x", size=b"ten")),
    "PAX record without end": ("not as long", lambda: header(b"x", typeflag=b"x", size=512) + b"9" * 512),
    "PAX record without newline": ("not as long", lambda: header(b"x", typeflag=b"x", size=6) + padded(b"6 a=bc")),
    "end after an extended header": ("without the member it belongs to", lambda: pax({"uid": "1"}) + END),
    "end after a long name": ("without the member it belongs to", lambda: gnu_long(b"x") + END),
    "member after zeros": ("a block of zeros, which ends", lambda: bytes(512) + header(b"late")),
    "junk after zeros": ("should have a number", lambda: bytes(512) + b"junk" * 128),
    "global headers add up": (
        "more than 65536 bytes",
        lambda: b"".join(pax({f"SCHILY.xattr.user.{n}": "v" * 30_000}, typeflag=b"g") for n in range(3)),
    ),
}


class TestHostile:
    @pytest.mark.parametrize("name", HOSTILE)
    @pytest.mark.parametrize("step", [1 << 20, 77])
    def test_is_refused(self, name: str, step: int) -> None:
        sentence, make = HOSTILE[name]
        error = refused(lambda: walked(BIG + make(), step=step))
        assert sentence in str(error)
        assert (error.offset or 0) >= len(BIG)
        assert error.member is not None

    def test_extended_headers_without_end_take_no_memory(self) -> None:
        """A few hundred MB of them in a second or so, all held back for a member that never comes."""
        block = pax({f"k{n}": "v" * 1000 for n in range(900)})
        tracemalloc.start()
        endless(block, 40)()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 << 20

    @pytest.mark.parametrize(
        "block",
        [
            pytest.param(BIG * 500, id="tiny members"),
            pytest.param(pax({"path": b"d/" * 2000}) + header(b"x"), id="long names"),
            pytest.param(pax({"linkpath": b"d/" * 2000}) + header(b"x", typeflag=b"2"), id="long links"),
            pytest.param(pax({f"SCHILY.xattr.user.{n}": "" for n in range(3000)}) + header(b"x"), id="many xattrs"),
            pytest.param(pax({"SCHILY.xattr.user.x": "v" * 60_000}) + header(b"x"), id="large xattrs"),
            pytest.param(pax({f"k{n}": "" for n in range(20_000)}) + header(b"x"), id="records that say nothing"),
            pytest.param(gnu_long(b"d/" * 2000) + header(b"x"), id="long names of GNU's"),
            pytest.param(pax_sparse(b"s", 1 << 20, [(n * 9, b"x") for n in range(20_000)], version="1.0"), id="pieces"),
            pytest.param(header(b"x", typeflag=b"x"), id="empty headers"),
            pytest.param(header(b".wh..wh.plnk"), id="files of aufs"),
            pytest.param(pax_sparse(b"s", 9, [(0, b"")] * 20_000, version="1.0"), id="empty pieces"),
        ],
    )
    def test_what_is_kept_is_bounded(self, block: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        """The bound holds for memory, give or take what Python adds."""
        monkeypatch.setattr(bounds, "MAX_METADATA", 4 << 20)
        error = refused(endless(block, 20_000), seconds=6, memory=16 << 20)
        assert "take more than 4 MiB" in str(error)
        assert error.member

    def test_what_global_headers_add_to_counts_each_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However little one adds, all that was said before is looked at."""
        monkeypatch.setattr(bounds, "MAX_METADATA", 4 << 20)
        many = pax({f"SCHILY.xattr.{n}": "v" for n in range(2000)}, typeflag=b"g")
        raw = many + pax({"uid": "5"}, typeflag=b"g") * 100
        error = refused(lambda: walked(raw, step=len(raw)))
        assert "take more than 4 MiB" in str(error)

    def test_what_global_headers_say_counts_for_each_member(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However little comes of it: here one xattr, said in a thousand ways."""
        monkeypatch.setattr(bounds, "MAX_METADATA", 4 << 20)
        ways = product(*[(letter, f"%{ord(letter):x}") for letter in "abcdefghij"])
        everywhere = pax({f"LIBARCHIVE.xattr.user.{''.join(way)}": "AA" for way in ways}, typeflag=b"g")
        raw = everywhere + header(b"f") * 100
        assert "take more than 4 MiB" in str(refused(lambda: walked(raw, step=len(raw))))

    def test_long_ways_count_for_the_time_that_they_take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A part of a name that is one letter costs as much as a whole word."""
        monkeypatch.setattr(bounds, "MAX_METADATA", 4 << 20)
        whiteouts = gnu_long(b"d/" * 2000 + b".wh.x") + header(b"x")
        assert "take more than 4 MiB" in str(refused(endless(whiteouts, 150), memory=16 << 20))

    def test_what_layers_say_together_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What of it is replaced, or only deletes, counts too: it was there."""
        monkeypatch.setattr(bounds, "MAX_METADATA", 1 << 20)
        tar = Tar()
        for number in range(100):
            tar.file(f"f{number}", b"").whiteout(f"w{number}")
        tree = Tree()

        def layers(count: int) -> None:
            for number in range(count):
                walk = TarWalk(tree.budget)
                tree.apply(number, walk.feed(tar.done()) + walk.finish())

        layers(9)
        error = refused(lambda: layers(2))
        assert "names and attributes of the image's members take more than 1 MiB" in str(error)
        assert error.member

    def test_what_global_headers_multiply_is_bounded_within_one_piece_of_the_stream(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bounds, "MAX_METADATA", 4 << 20)
        everywhere = pax({f"SCHILY.xattr.user.{n}": "v" for n in range(2500)}, typeflag=b"g")
        raw = everywhere + header(b"f") * 8000
        error = refused(lambda: walked(raw, step=len(raw)), memory=16 << 20)
        assert "take more than 4 MiB" in str(error)
        assert error.member == b"f"

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_damage_is_read_or_refused_but_nothing_else(self, data: st.DataObject) -> None:
        """Bytes changed at random, with the checksums put right half of the time. The fast path must not see more or
        less than the slow one."""
        raw = bytearray(data.draw(st.sampled_from(UNITS[1:])) + END)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(raw) - 1))
            raw[at] = data.draw(st.integers(0, 255))
            if data.draw(st.booleans()):
                block = at & ~511
                raw[block + 148 : block + 156] = b" " * 8
                raw[block + 148 : block + 156] = b"%06o\0 " % sum(raw[block : block + 512])
        entries, error = attempt(bytes(raw))
        assert error is None or str(error).isprintable()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TarWalk, "_expects_plain", lambda walk: False)
            again, another = attempt(bytes(raw))
        assert (again, str(another)) == (entries, str(error))
        for entry in entries:
            assert not {b"", b".", b".."} & set(entry.path.split(b"/")) or not entry.path
            if isinstance(entry, Member):
                assert all(0 <= at <= at + length <= entry.size for at, _, length in entry.segments)


def best_of_three(act: Callable[[], object]) -> float:
    def took() -> float:
        start = time.process_time()  # not what others on this machine take
        act()
        return time.process_time() - start

    return min(took() for _ in range(3))


def test_reads_a_hundred_thousand_ustar_members_a_second() -> None:
    """As image layers have them: directories, symlinks, small files, names of all sizes. This is usually 250 k."""
    pick, tar, count = random.Random(1), Tar(), 30_000
    for number in range(count):
        directory = f"usr/lib/python3/dist-packages/package{number // 20}"
        if number % 20 == 0:
            tar.dir(directory)
        elif number % 20 == 1:
            tar.symlink(f"{directory}/link", "../somewhere/else.so")
        else:
            tar.file(
                f"{directory}/file{number}.py", bytes(pick.choice([0, 10, 600, 2000])), mtime=pick.randrange(1 << 31)
            )
    data = tar.done()
    chunks = [data[at : at + (1 << 20)] for at in range(0, len(data), 1 << 20)]

    def read() -> None:
        walk, found = TarWalk(), 0
        for chunk in chunks:
            found += len(walk.feed(chunk))
        walk.finish()
        assert found == count

    assert count / best_of_three(read) > 100_000


def test_reads_pax_members_no_ten_times_slower() -> None:
    """Sub-second times for every member are what archivers write by default. This is usually 50 k."""
    data = Tar()
    for number in range(4000):
        data.file(f"usr/lib/file{number}", b"x" * 600, mtime=f"1700000000.{number}")
    raw = data.done()
    assert 4000 / best_of_three(lambda: walked(raw)) > 15_000


def test_reads_the_longest_extended_headers_in_time() -> None:
    """What looks at each byte must not look twice: 40 MiB of records and of long names."""
    records = pax({f"k{number}": "" for number in range(80_000)}) * 20
    names = gnu_long(b"x/" * (MAX_EXTENSION // 2 - 1)) * 20
    start = time.process_time()
    walk = TarWalk()
    walk.feed(records)
    walk.feed(names)
    assert time.process_time() - start < 5
