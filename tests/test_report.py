"""What a report says of a mount, from events that are known; that it survives being JSON; what is no report."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

import clipfs
from clipfs.blocks import journal
from clipfs.blocks.counters import NAMES, Counters
from clipfs.blocks.journal import Journal
from clipfs.blocks.reader import BlockReader
from clipfs.errors import UsageError
from clipfs.format.index import Index
from clipfs.reports import reporter
from clipfs.reports.report import Ahead, FileUse, Mounted, Report, Said, Touched, parse, slowest
from clipfs.reports.wording import duration, size, verdict
from clipfs.sources.fetcher import SourceOptions
from clipfs.sources.packed import fetcher_for
from clipfs.state import MountRecord, Process
from tests.images import LayoutBuilder
from tests.tars import Tar

pytestmark = pytest.mark.usefixtures("near")

MOUNT = Mounted("/mnt", "/x.clip", "oci:/x:latest", 7, serving=True, seconds=12.5)
MB = 1 << 20
SECONDS = 30


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    """Two layers: one of three files and several spans, one that is small."""
    chance = random.Random(1)
    one = Tar()
    for name in ("a", "b", "c"):
        one.member(name, chance.randbytes(6 * MB))
    directory = tmp_path_factory.mktemp("image")
    image = LayoutBuilder(directory / "oci").layer(one, "pigz").layer(Tar().member("d", b"small"), "gzip")
    (directory / "oci").mkdir(exist_ok=True)
    clipfs.build(image.config().write(), directory / "x.clip")
    with Index.open(directory / "x.clip") as index:
        yield index


def span_of(index: Index, path: str, offset: int = 0) -> tuple[int, int, int]:
    """Layer, span and address of a byte of a file."""
    address = index.inode(index.resolve(path)).address + offset
    ((_, layer, place, _),) = index.extents(address, 1)
    return layer, index.layers[layer].spans.find(place), address


def fetch(at: float, layer: int, first: int, last: int, why: str = "read", took: float = 0.1) -> dict[str, Any]:
    return {
        "at": at,
        "event": "fetch",
        "layer": layer,
        "first": first,
        "last": last,
        "bytes": 1000,
        "took": took,
        "why": why,
    }


def want(index: Index, at: float, path: str, tier: str = "source", offset: int = 0) -> dict[str, Any]:
    layer, span, address = span_of(index, path, offset)
    return {"at": at, "event": "want", "layer": layer, "first": span, "last": span, "address": address, "tier": tier}


def counted(**given: int) -> dict[str, int]:
    return dict.fromkeys(NAMES, 0) | given


def made(index: Index, *events: dict[str, Any], **given: int) -> Report:
    return reporter.make(index, counted(**given), events, MOUNT)


class TestNumbers:
    def test_shares_and_tiers(self, index: Index) -> None:
        total = sum(layer.size for layer in index.layers)
        report = made(
            index,
            requests=100,
            disk_hits=20,
            source_hits=5,
            failures=1,
            bytes_fetched=total // 4,
            bytes_served=total // 2,
            bytes_decoded=total,
        )
        assert report.bytes_total == total
        assert report.requests == {"memory": 75, "disk": 20, "source": 5, "failed": 1}
        assert (report.fetched_share, report.fetched_per_served, report.decoded_per_served) == (0.25, 0.5, 2.0)

    def test_of_nothing_there_is_no_share(self, index: Index) -> None:
        report = made(index)
        assert report.fetched_per_served is None
        assert (report.fetches, report.files, report.ahead) == ((), (), {})
        assert verdict(report) == "Nothing was fetched: nobody has read anything."
        failed = replace(report, requests={**report.requests, "failed": 3})
        assert verdict(failed) == "Nothing was fetched: 3 requests failed."

    def test_who_pulled_what(self, index: Index) -> None:
        layer, a, _ = span_of(index, "a")
        _, c, _ = span_of(index, "c", 3 * MB)
        spans = index.layers[layer].spans
        sizes = [
            spans[number].end - (spans[number - 1].end if spans[number].skip else spans[number].start)
            for number in (a, c)
        ]
        report = made(
            index,
            want(index, 0.1, "a"),
            fetch(0.2, layer, a, a),
            fetch(0.3, layer, c, c, "ahead"),
            want(index, 0.5, "c", "memory", 3 * MB),
            want(index, 0.6, "d", "disk"),
        )
        by_path = {each.path: each for each in report.files}
        assert by_path == {
            "/a": FileUse("/a", 0.1, _about(by_path["/a"].bytes, sizes[0]), 1, memory=0, disk=0, source=1),
            "/c": FileUse("/c", 0.5, _about(by_path["/c"].bytes, sizes[1]), 1, memory=1, disk=0, source=0),
            "/d": FileUse("/d", 0.6, 0, 1, memory=0, disk=1, source=0),
        }
        assert [each.path for each in report.files][-1] == "/d", "who pulled most comes first"
        assert [(each.why, each.path) for each in report.fetches] == [("read", "/a"), ("ahead", "")]

    def test_what_was_ahead_and_how_much_of_it_was_used(self, index: Index) -> None:
        layer, first, _ = span_of(index, "a")
        _, last, _ = span_of(index, "c", 5 * MB)
        assert last > first + 1
        report = made(
            index,
            fetch(0.1, layer, first, last, "all"),
            want(index, 0.2, "a", "memory"),
            fetch(0.3, 1, 0, 0, "/a/trace"),
        )
        everything, trace = report.ahead["all"], report.ahead["trace"]
        assert (everything.spans, everything.used_spans) == (last - first + 1, 1)
        assert 0 < everything.used_bytes < everything.bytes <= index.layers[layer].size
        assert trace == Ahead(1, trace.bytes, 0, 0)

    async def test_a_reader_that_ran(self, index: Index, tmp_path: Path) -> None:
        """What the reader writes down is what the report is made of."""
        counters, log = Counters.private(), tmp_path / "journal"
        fetcher = fetcher_for(index, SourceOptions())
        _, last, address = span_of(index, "c", 5 * MB)
        with trio.fail_after(SECONDS):
            async with fetcher, BlockReader(index, fetcher, counters=counters, journal=Journal(log)) as reader:
                await reader.prefetch([(0, last), (1, 0)], "all", 2)
                assert reader.try_read(address, 10) is not None
                await reader.read(index.inode(index.resolve("a")).address, 10)
                wanted = list(reader.wanted)
        report = reporter.make(index, counters.asdict(), journal.read(log), MOUNT)
        first = span_of(index, "a")[1]
        assert wanted == [(0, last), (0, first)], "also what was there already is worth a place in the trace"
        assert [(each.span, each.why, each.used) for layer in report.layers for each in layer.touched] == [
            (first, "read", True),
            (last, "all", True),
            (0, "all", False),
        ]
        assert report.requests == {"memory": 1, "disk": 0, "source": 1, "failed": 0}
        assert {each.path: (each.memory, each.source) for each in report.files} == {"/a": (0, 1), "/c": (1, 0)}
        assert report.bytes_fetched == sum(each.bytes for each in report.fetches)
        assert (report.ahead["all"].spans, report.ahead["all"].used_spans) == (2, 1)

    def test_the_map(self, index: Index) -> None:
        layer, a, _ = span_of(index, "a")
        report = made(index, fetch(0.2, layer, a, a + 1, "trace"), want(index, 0.1, "a"), want(index, 0.6, "d", "disk"))
        assert report.layers[0].touched == (Touched(a, "trace", 0.2, True), Touched(a + 1, "trace", 0.2, False))
        assert report.layers[1].touched == (Touched(0, "cached", 0.6, True),)
        assert [len(each.starts) for each in report.layers] == [len(each.spans) for each in index.layers]
        assert report.layers[0].fetched_bytes == 1000

    def test_bytes_are_those_of_the_layer(self, index: Index) -> None:
        report = made(index, fetch(0.2, 0, 0, 0), fetch(0.3, 1, 0, 0), fetch(0.4, 1, 0, 0))
        assert [each.fetched_bytes for each in report.layers] == [1000, 2000]

    def test_a_mount_by_its_record(self, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
        source = "https://user:s3cret@host/x.clip?sig=s3cret"
        record = MountRecord(Process.current(), "/mnt", "/x.clip", source, device="")
        try:
            record.journal.write_text(json.dumps(fetch(1.5, 0, 0, 0)) + "\n")
            whole = reporter.of_mount(index, record, counted(), serving=True)
            monkeypatch.setattr(journal, "MOST", 10)
            cut_short = reporter.of_mount(index, record, counted(), serving=True)
        finally:
            record.remove()
        assert "s3cret" not in whole.to_json()
        assert len(whole.fetches) == 1
        assert (whole.journal_complete, cut_short.journal_complete) == (True, False)

    def test_what_took_longest(self, index: Index) -> None:
        report = made(index, *(fetch(number, 1, 0, 0, took=number % 7) for number in range(20)))
        assert [each.took for each in slowest(report, 4)] == [6, 6, 5, 5]

    def test_what_went_wrong_is_told_without_secrets(self, index: Index) -> None:
        url = "https://host/blob?sig=verysecret"
        report = made(
            index,
            {"at": 1, "event": "log", "kind": "retry", "origin": "sources.retry", "message": f"503 from {url}"},
            {"at": 2, "event": "refetch", "layer": 1, "first": 0, "last": 0, "reason": f"wrong bytes from {url}"},
        )
        assert report.said == (
            Said(1, "retry", "sources.retry: 503 from https://host/blob?[redacted]"),
            Said(2, "refetch", "layer 1, span 0: wrong bytes from https://host/blob?[redacted]"),
        )

    @pytest.mark.parametrize(
        "event",
        [
            {"event": "fetch"},
            {"event": "fetch", "at": "x", "layer": 0, "first": 0, "last": 0, "bytes": 1, "took": 1},
            {"event": "fetch", "at": float("nan"), "layer": 0, "first": 0, "last": 0, "bytes": 1, "took": 1},
            {"event": "fetch", "at": 1, "layer": 2, "first": 0, "last": 0, "bytes": 1, "took": 1},
            {"event": "fetch", "at": 1, "layer": -1, "first": 0, "last": 0, "bytes": 1, "took": 1},
            {"event": "fetch", "at": 1, "layer": 0, "first": 1, "last": 0, "bytes": 1, "took": 1},
            {"event": "fetch", "at": 1, "layer": 0, "first": 0, "last": 1 << 60, "bytes": 1, "took": 1},
            {"event": "want", "at": 1, "layer": 0, "first": 0, "last": 0},
            {"event": "nonesuch", "at": 1, "layer": 0, "first": 0, "last": 0},
        ],
    )
    def test_what_is_no_event_changes_nothing(self, index: Index, event: dict[str, Any]) -> None:
        assert made(index, event) == made(index)


def _about(found: int, size: int) -> int:
    """`found`, if it is the size of the span but for what it shares with the next one."""
    assert abs(found - size) <= 64
    return found


class TestJson:
    def test_there_and_back(self, index: Index) -> None:
        report = made(index, want(index, 0.1, "a"), fetch(0.2, 0, 0, 1), fetch(0.3, 1, 0, 0, "ahead"), bytes_served=3)
        assert parse(report.to_json().encode(), "x") == report

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"version": 2}, "of another version"),
            ({"version": None}, "has no version"),
            ({"mount": None}, "mount is not what it should be"),
            ({"bytes_total": "1"}, "bytes_total"),
            ({"bytes_total": True}, "bytes_total"),
            ({"bytes_total": 10**400}, "bytes_total"),
            ({"fetched_share": float("inf")}, "fetched_share"),
            ({"fetched_share": float("nan")}, "fetched_share"),
            ({"fetched_share": 10**400}, "fetched_share"),
            ({"layers": [{}]}, r"layers\[0\].digest"),
            ({"fetches": {}}, "fetches"),
            ({"said": [{"at": 0, "kind": "x", "message": 1}]}, r"said\[0\].message"),
        ],
    )
    def test_what_is_no_report(self, index: Index, change: dict[str, Any], words: str) -> None:
        raw = json.dumps(json.loads(made(index).to_json()) | change).encode()
        with pytest.raises(UsageError, match=f"x.json is no report of a mount: .*{words}"):
            parse(raw, "x.json")

    @pytest.mark.parametrize("raw", [b"", b"[]", b"1", b"\xff", b"[" * 100_000, b"1" * 5000, b'{"version":'])
    def test_what_is_no_json(self, raw: bytes) -> None:
        with pytest.raises(UsageError, match=r"x\.json is no report of a mount"):
            parse(raw, "x.json")

    def test_a_span_that_is_not_there(self, index: Index) -> None:
        report = made(index)
        layers = (replace(report.layers[1], touched=(Touched(1, "read", 0.0, True),)),)
        with pytest.raises(UsageError, match="no such span"):
            parse(replace(report, layers=layers).to_json().encode(), "x")


class TestWords:
    @pytest.mark.parametrize(
        ("fetched", "ahead", "words"),
        [
            (10, {}, "Lazy: 10.0% of"),
            (
                90,
                {},
                "Not lazy: 90.0% of the image's bytes were fetched, its readers asked for that, most of it for /a.",
            ),
            (90, {"all": Ahead(9, 80, 0, 0)}, "most of that because of --prefetch all."),
        ],
    )
    def test_lazy_or_not(self, index: Index, fetched: int, ahead: dict[str, Ahead], words: str) -> None:
        report = replace(
            made(index),
            bytes_fetched=fetched,
            fetched_share=fetched / 100,
            ahead=ahead,
            files=(FileUse("/a", 0, 1, 1, 0, 0, 1),),
        )
        assert words in verdict(report)

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(1.26, "1.3 s"), (61, "1 min 1 s"), (3660, "1 h 1 min"), (90000, "1 d 1 h")],
    )
    def test_durations(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text

    def test_sizes(self) -> None:
        assert [size(1 << 10 * power) for power in range(6)] == [
            *("1 B", "1.0 KiB", "1.0 MiB", "1.0 GiB", "1.0 TiB", "1024.0 TiB")
        ]


def test_paths_of_addresses(index: Index, tmp_path: Path) -> None:
    addresses = [index.inode(index.resolve(name)).address for name in "abc"]
    asked = {addresses[0], addresses[1] + 6 * MB - 1, addresses[1] + 6 * MB, 1 << 60}
    assert reporter.paths(index, asked) == {addresses[0]: "/a", addresses[1] + 6 * MB - 1: "/b"} | (
        {addresses[2]: "/c"} if addresses[2] == addresses[1] + 6 * MB else {}
    )
