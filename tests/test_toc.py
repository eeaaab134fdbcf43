"""Tables of contents by hand: what their entries become, and what is refused, soon and in one sentence."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from typing import Any

import pytest

from clipfs.errors import ImageError
from clipfs.format.container import Codec, Span
from clipfs.layers import bounds
from clipfs.layers.layer import Member, Opaque, Whiteout
from clipfs.layers.toc import Table, parse

Entry = dict[str, Any]
Entries = list[Entry]

# Where the chunks of these layers end.
END = 1000
A, B = "sha256:" + "aa" * 32, "sha256:" + "bb" * 32
RAW_A, RAW_B = b"\xaa" * 32, b"\xbb" * 32


def table(*entries: Entry, codec: Codec = Codec.GZIP, end: int = END) -> Table:
    return parse(json.dumps({"version": 1, "entries": entries}).encode(), codec, end)


def only(**entry: object) -> Member:
    """The member that this is the entry of."""
    [member] = table({"name": "x", "type": "reg", **entry}).entries
    assert isinstance(member, Member)
    return member


def good() -> Entries:
    """A directory, a file of two chunks, and one of one."""
    return [
        {"name": "d/", "type": "dir", "mode": 0o755},
        {"name": "d/f", "type": "reg", "size": 10, "offset": 100, "chunkSize": 6, "chunkDigest": A},
        {"name": "d/f", "type": "chunk", "offset": 200, "chunkOffset": 6, "chunkDigest": B},
        {"name": "g", "type": "reg", "size": 5, "offset": 300, "digest": A, "chunkDigest": A},
    ]


class TestMembers:
    def test_every_field(self) -> None:
        member = only(
            name="./a//b",
            mode=0o104751,
            uid=5,
            gid=(1 << 32) - 2,
            modtime="2023-11-14T22:13:20Z",
            userName="somebody",
            xattrs={"user.a": "AP8=", "security.b": ""},
            size=3,
            offset=7,
            digest=A,
            NumLink=0,
        )
        assert member == Member(
            path=b"a/b",
            mode=stat.S_IFREG | 0o4751,
            uid=5,
            gid=(1 << 32) - 2,
            mtime_ns=1_700_000_000 * 10**9,
            size=3,
            link=b"",
            hardlink=False,
            rdev=0,
            xattrs={b"user.a": b"\0\xff", b"security.b": b""},
            segments=((0, 0, 3),),
            offset=0,
        )

    @pytest.mark.parametrize(
        ("entry", "kind"),
        [
            ({"type": "dir", "name": "x/"}, stat.S_IFDIR),
            ({"type": "reg"}, stat.S_IFREG),
            ({"type": "reg", "size": 0, "digest": A}, stat.S_IFREG),
            ({"type": "symlink", "linkName": "../y"}, stat.S_IFLNK),
            ({"type": "char", "devMajor": 1, "devMinor": 3}, stat.S_IFCHR),
            ({"type": "block", "devMajor": 4095, "devMinor": 1_048_575}, stat.S_IFBLK),
            ({"type": "fifo", "size": 77}, stat.S_IFIFO),
        ],
    )
    def test_types(self, entry: Entry, kind: int) -> None:
        member = only(**entry)
        assert stat.S_IFMT(member.mode) == kind
        assert member.rdev == os.makedev(entry.get("devMajor", 0), entry.get("devMinor", 0))
        assert (member.link, member.size, member.segments) == (entry.get("linkName", "").encode(), 0, ())

    def test_hard_links(self) -> None:
        member = only(type="hardlink", linkName="./a/../b")
        assert (member.hardlink, member.link) == (True, b"b")

    @pytest.mark.parametrize(
        ("text", "time_ns"),
        [
            ("", 0),
            ("0001-01-01T00:00:00Z", 0),
            ("9999-12-31T23:59:59Z", 0),
            ("1969-12-31T23:59:59Z", -(10**9)),
            ("2023-11-14T22:13:20.000000001Z", 1_700_000_000 * 10**9 + 1),
            ("2023-11-14T22:13:20.5Z", 1_700_000_000 * 10**9 + 5 * 10**8),
            ("2023-11-15T00:13:20+02:00", 1_700_000_000 * 10**9),
            ("2223-07-06T22:13:20.125-01:00", 8_000_032_400_125_000_000),
        ],
    )
    def test_times(self, text: str, time_ns: int) -> None:
        assert only(modtime=text).mtime_ns == time_ns

    def test_whiteouts_and_what_is_not_shown(self) -> None:
        names = [".wh.a", "d/.wh..wh..opq", ".wh..wh.plnk", "stargz.index.json", ".prefetch.landmark"]
        names += [".no.prefetch.landmark", "d/.prefetch.landmark", "./.prefetch.landmark"]
        found = table(*[{"name": name, "type": "reg"} for name in names])
        assert [(type(entry), entry.path) for entry in found.entries] == [
            (Whiteout, b"a"),
            (Opaque, b"d"),
            (Member, b"d/.prefetch.landmark"),
        ]

    def test_no_entries(self) -> None:
        assert parse(b'{"version": 1, "entries": []}', Codec.GZIP, END) == Table([], [], 0)
        assert parse(b'{"entries":null,"version":1}\n', Codec.GZIP, END) == Table([], [], 0)


class TestChunks:
    def test_spans_tile_and_segments_follow(self) -> None:
        found = table(*good())
        assert found.spans == [
            Span(100, 200, 0, 6, RAW_A),
            Span(200, 300, 6, 4, RAW_B),
            Span(300, END, 10, 5, RAW_A),
        ]
        assert found.size == 15
        assert segments(found) == {b"d": (), b"d/f": ((0, 0, 10),), b"g": ((0, 10, 5),)}

    def test_order_of_the_blob_and_not_of_the_table(self) -> None:
        entries = good()
        entries[1]["offset"], entries[2]["offset"], entries[3]["offset"] = 300, 100, 200
        found = table(*entries)
        assert [(span.start, span.end, span.digest) for span in found.spans] == [
            (100, 200, RAW_B),
            (200, 300, RAW_A),
            (300, END, RAW_A),
        ]
        assert segments(found) == {b"d": (), b"d/f": ((0, 9, 6), (6, 0, 4)), b"g": ((0, 4, 5),)}

    def test_many_in_one_gzip_member(self) -> None:
        entries = good()
        entries[2] |= {"offset": 100, "innerOffset": 1024}
        entries[3] |= {"offset": 100, "innerOffset": 1028}
        assert table(*entries).spans == [
            Span(100, END, 0, 6, RAW_A),
            Span(100, END, 6, 4, RAW_B, skip=1024),
            Span(100, END, 10, 5, RAW_A, skip=1028),
        ]

    def test_the_first_member_may_begin_the_layer(self) -> None:
        [span] = table({"name": "x", "type": "reg", "size": 5, "innerOffset": 512, "digest": A}).spans
        assert span == Span(0, END, 0, 5, RAW_A, skip=512)

    def test_zeros_are_holes_and_files_have_ends(self) -> None:
        entries = good()
        entries[1]["endOffset"], entries[3]["endOffset"] = 250, 310
        entries[1]["size"] = 110
        entries[2]["chunkSize"] = 4
        entries.insert(3, {"name": "d/f", "type": "chunk", "offset": 230, "chunkOffset": 10, "chunkType": "zeros"})
        found = table(*entries, codec=Codec.ZSTD)
        assert [(span.start, span.end) for span in found.spans] == [(100, 200), (200, 230), (300, 310)]
        assert segments(found) == {b"d": (), b"d/f": ((0, 0, 10),), b"g": ((0, 10, 5),)}
        assert found.size == 15

    def test_a_hole_in_the_middle(self) -> None:
        entries = good()
        entries[1] |= {"size": 20, "chunkType": "zeros", "chunkSize": 16}
        entries[2] |= {"chunkOffset": 16}
        assert segments(table(*entries, codec=Codec.ZSTD))[b"d/f"] == ((16, 0, 4),)

    def test_no_more_is_fetched_than_a_chunk_can_take(self) -> None:
        """Headers of a million symlinks may follow a small file in the same member."""
        [span, *_] = table(*good(), end=1 << 30).spans[2:]
        assert span.end - span.start < 1 << 17


def segments(found: Table) -> dict[bytes, tuple[tuple[int, int, int], ...]]:
    return {entry.path: entry.segments for entry in found.entries if isinstance(entry, Member)}


def refusal(act: Callable[[], object], seconds: float = 1) -> str:
    """The one sentence with which `act` refuses a table, soon."""
    start = time.perf_counter()
    with pytest.raises(ImageError) as caught:
        act()
    assert time.perf_counter() - start < seconds
    sentence = str(caught.value)
    assert sentence.isprintable()
    assert len(sentence) < 700
    return sentence


# What is done to one entry of `good()`, and what is said to it.
HOSTILE: list[tuple[int, Entry, str]] = [
    (1, {"offset": END}, "no chunk can be"),
    (1, {"offset": END + 1}, "offset should be a number from 0 to 1000"),
    (1, {"offset": -1}, "offset should be a number"),
    (1, {"offset": 1.5}, "offset should be a number"),
    (1, {"offset": True}, "offset should be a number"),
    (1, {"offset": "100"}, "offset should be a number"),
    (1, {"offset": [100]}, "no entry of at most"),
    (1, {"offset": 0}, "no chunk can be"),
    (1, {"offset": 200}, "two chunks share bytes"),
    (2, {"offset": 300}, "two chunks share bytes"),
    (2, {"offset": 100, "innerOffset": 5}, "two chunks share bytes"),
    (2, {"innerOffset": 1 << 40}, "innerOffset should be"),
    (3, {"endOffset": 300}, "goes on beyond"),
    (1, {"endOffset": 301}, "goes on beyond"),
    (3, {"endOffset": END + 1}, "endOffset should be"),
    (1, {"chunkDigest": None}, "no digest"),
    (1, {"chunkDigest": None, "digest": A}, "no digest"),
    (1, {"chunkDigest": ""}, "no digest"),
    (1, {"chunkDigest": "sha256:12"}, "no digest; sha256"),
    (1, {"chunkDigest": "md5:" + "a" * 32}, "is no digest"),
    (1, {"chunkDigest": "sha512:" + "a" * 128}, "by sha512"),
    (1, {"chunkDigest": 7}, "chunkDigest should be a string"),
    (1, {"chunkSize": 5}, "after 5 of the file's 10 bytes"),
    (1, {"chunkSize": 11}, "a chunk of 11 bytes"),
    (1, {"chunkSize": 10}, "after 10 of the file's 10 bytes"),
    (1, {"chunkOffset": 1}, "at 1, after 0"),
    (1, {"size": 11, "chunkType": "holes"}, "which clipfs does not know"),
    (2, {"chunkSize": 3}, "have 9 bytes, not its 10"),
    (2, {"chunkOffset": 7}, "at 7, after 6"),
    (1, {"size": 1 << 50}, "size should be a number"),
    (1, {"size": -10}, "size should be a number"),
    (1, {"size": 0}, "a chunk of no file"),
    (0, {"type": "chunk"}, "a chunk of no file"),
    (3, {"size": (64 << 20) + 1}, "at most 67108864 at once"),
    (0, {"type": "socket"}, "type 'socket' is none"),
    (0, {"type": None}, "type should be a string"),
    (0, {"name": None}, "name should be a string"),
    (0, {"name": "../x"}, "leads out of the root"),
    (0, {"name": "a/../../x"}, "leads out of the root"),
    (0, {"name": "x" * 256}, "longer than Linux allows"),
    (0, {"name": "x/" * 2500}, "longer than Linux allows"),
    (0, {"name": "a\0b"}, "no string can keep"),
    (0, {"name": "\ud800"}, "no string can keep"),
    (0, {"name": "caf\ufffd"}, "was no UTF-8"),
    (3, {"name": ""}, "only a directory can be the root"),
    (0, {"type": "symlink"}, "linkName should be a string"),
    (0, {"type": "symlink", "linkName": ""}, "its target is not one"),
    (0, {"type": "symlink", "linkName": "x" * 4096}, "its target is not one"),
    (0, {"type": "hardlink", "linkName": "../../etc"}, "leads out of the root"),
    (0, {"uid": -1}, "uid should be"),
    (0, {"gid": (1 << 32) - 1}, "gid should be"),
    (0, {"mode": "0755"}, "mode should be"),
    (0, {"type": "char", "devMajor": 4096}, "devMajor should be"),
    (0, {"modtime": "yesterday"}, "none"),
    (0, {"modtime": "2023-13-14T22:13:20Z"}, "none"),
    (0, {"modtime": 1_700_000_000}, "modtime should be a string"),
    (0, {"xattrs": "user.a"}, "xattrs should be a JSON object"),
    (0, {"xattrs": {"user.a": "?"}}, "no base64"),
    (0, {"xattrs": {"user.a": "é"}}, "no base64"),
    (0, {"xattrs": {"user.\ufffd": ""}}, "was no UTF-8"),
    (0, {"xattrs": {"user.a": "A" * 100_000}}, "are the most"),
    (0, {"xattrs": {"user.a": {"b": "c"}}}, "no entry of at most"),
    (0, {"junk": "x" * (1 << 20)}, "no entry of at most 1 MiB"),
]


class TestHostile:
    @pytest.mark.parametrize(("number", "change", "said"), HOSTILE)
    def test_one_thing_wrong(self, number: int, change: Entry, said: str) -> None:
        entries = good()
        entries[number] |= change
        assert said in refusal(lambda: table(*entries))

    @pytest.mark.parametrize("where", range(len(good())))
    def test_nothing_is_wrong_with_what_is_changed(self, where: int) -> None:
        entries = good()
        entries[where]["unknown"] = "ignored"
        assert table(*entries) == table(*good())

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"offset": 100, "innerOffset": 512}, "no chunk can be 512 bytes into"),
            ({"offset": 400}, "bytes from byte 400"),
        ],
    )
    def test_only_zstd_cannot(self, change: Entry, said: str) -> None:
        entries = good()
        entries[3] |= change
        if "innerOffset" not in change:
            table(*entries, end=1 << 30)
        assert said in refusal(lambda: table(*entries, codec=Codec.ZSTD, end=1 << 30))

    @pytest.mark.parametrize(
        ("document", "said"),
        [
            (b"", "should be at byte 0"),
            (b"[]", "should be at byte 0"),
            (b"{}", "neither a string nor a number"),
            (b'{"version": 1}', "has no entries"),
            (b'{"version": 2, "entries": []}', "version '2'"),
            (b'{"version": "1", "entries": []}', "version '1'"),
            (b'{"version": 1, "entries": [', "no entry of at most"),
            (b'{"version": 1, "entries": [{}', "name should be a string"),
            (b'{"version": 1, "entries": {}}', "neither a string nor a number"),
            (b'{"version": 1, "entries": [7]}', "no entry of at most"),
            (b'{"version": 1, "entries": [[]]}', "no entry of at most"),
            (b'{"version": 1, "entries": [{"name":}]}', "no valid JSON"),
            (b'{"version": 1, "entries": [{"name": "\xff"}]}', "no valid JSON"),
            (b'{"version": 1, "entries": [], "entries": []}', "neither a string nor a number"),
            (b'{"version": 1, "entries": []}{}', "goes on after its end"),
            (b'{"version": 1, "entries": [] "a": 1}', "',' should be at byte"),
            (b'{"version": ' + b"9" * 10_000 + b"}", "no valid JSON"),
            (b'{"version": 1, "entries": [' + b"{" * 100_000, "no entry of at most"),
            (b'{"a": [' + b"[" * 100_000, "neither a string nor a number"),
            (b'{"version": 1, "entries": [{"a": "' + b"\\" * (1 << 21), "no entry of at most"),
            (b'{"version": 1, "entries": [{' + b'"",' * (1 << 20), "no entry of at most"),
            (b'{"version": 1, "entries": [{' + b"{}," * (1 << 20), "no entry of at most"),
            (b'{"a' + b"a" * (1 << 21), "neither a string nor a number"),
        ],
    )
    def test_no_table(self, document: bytes, said: str) -> None:
        assert said in refusal(lambda: parse(document, Codec.GZIP, END))

    def test_every_truncation(self) -> None:
        document = json.dumps({"version": 1, "entries": good()}).encode()
        parse(document, Codec.GZIP, END)
        for length in range(len(document)):
            refusal(lambda length=length: parse(document[:length], Codec.GZIP, END))  # type: ignore[misc]

    def test_what_is_said_in_all_layers_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Chunks stay as spans, and the bytes of a table take time; neither is seen in the members that come of it."""
        monkeypatch.setattr(bounds, "MAX_METADATA", 1 << 20)
        size = 500
        first = {"name": "f", "type": "reg", "size": size, "offset": 1, "chunkSize": 1, "chunkDigest": A}
        more = [
            {"name": "f", "type": "chunk", "offset": 1 + at, "chunkOffset": at, "chunkSize": 1, "chunkDigest": A}
            for at in range(1, size)
        ]
        tables = {
            "chunks": json.dumps({"version": 1, "entries": [first, *more]}).encode(),
            "names of chunks": json.dumps({"entries": [first | {"size": 1, "comment": "x" * 300_000}]}).encode(),
        }
        for document in tables.values():
            budget = bounds.Budget()
            parse(document, Codec.ZSTD, END, budget)
            parse(document, Codec.ZSTD, END, budget)
            with pytest.raises(ImageError, match="take more than 1 MiB"):
                parse(document, Codec.ZSTD, END, budget), parse(document, Codec.ZSTD, END, budget)

    def test_many_entries(self) -> None:
        chunk = '{"name": "d/%d", "type": "reg", "size": 5, "offset": %d, "chunkDigest": "' + A + '"}'
        entries = ",".join(chunk % (number, 1 + 30 * number) for number in range(50_000))
        document = f'{{"version": 1, "entries": [{entries}]}}'.encode()
        start = time.perf_counter()
        found = parse(document, Codec.GZIP, 30 * 50_000 + 1)
        assert time.perf_counter() - start < 10
        assert (len(found.entries), len(found.spans), found.size) == (50_000, 50_000, 250_000)
