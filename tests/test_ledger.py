"""What a scan of a layer keeps: the blob read in any order, and spans that tile what was decoded."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipfs.compression.deflate import WINDOW
from clipfs.compression.ledger import Ledger, Region, Seek

DATA = os.urandom(3 << 20)


@pytest.fixture
def region(tmp_path: Path) -> Iterator[Region]:
    """A blob with other bytes before and behind it."""
    path = tmp_path / "blob"
    path.write_bytes(b"before" + DATA + b"behind")
    descriptor = os.open(path, os.O_RDONLY)
    yield Region(descriptor, 6, len(DATA))
    os.close(descriptor)


class TestRegion:
    @pytest.mark.parametrize(
        ("start", "count"),
        [
            (0, 10),
            (5, 0),
            (100, 2 << 20),
            (1 << 20, 1),
            ((3 << 20) - 5, 100),
            (3 << 20, 10),
            (4 << 20, 10),
            (0, 9 << 20),
        ],
    )
    def test_has_these_bytes_and_no_others(self, region: Region, start: int, count: int) -> None:
        for _ in range(2):
            assert region.read(start, count) == DATA[start : start + count]

    def test_can_be_read_in_any_order(self, region: Region) -> None:
        places = [0, 7, (1 << 20) - 3, 3, 2 << 20, (1 << 20) + 9, (3 << 20) - 4, 0]
        assert [region.read(at, 6) for at in places] == [DATA[at : at + 6] for at in places]


class TestLedger:
    def test_tiles_what_was_decoded_with_spans(self, region: Region) -> None:
        ledger = Ledger(region)
        try:
            ledger.begin(Seek(5))
            ledger.add(b"abc")
            ledger.begin(Seek(6))  # within a span: it is not from here that it can be decoded
            ledger.add(b"def")
            ledger.cut(100, Seek(90, 3))
            ledger.cut(100, Seek(95))  # nothing came since
            ledger.add(b"g" * 1000)
            ledger.cut(200)
            ledger.add(b"h")
            ledger.cut(300)
            ledger.cut(300)
            spans = ledger.spans()
        finally:
            ledger.close()
        assert [(s.start, s.end, s.position, s.length, s.bit, s.skip) for s in spans] == [
            (5, 100, 0, 6, 0, 0),
            (90, 200, 6, 1000, 3, 0),
            # It begins where the one before it did, with so much to pass over.
            (90, 300, 1006, 1, 3, 1000),
        ]
        assert [s.digest for s in spans] == [hashlib.sha256(data).digest() for data in (b"abcdef", b"g" * 1000, b"h")]

    def test_of_nothing_has_no_spans(self, region: Region) -> None:
        ledger = Ledger(region)
        ledger.begin(Seek(0))
        ledger.cut(len(DATA))
        assert not ledger.spans()
        ledger.close()

    def test_digests_follow_chunks_in_their_order_however_many_there_are(self, region: Region) -> None:
        ledger = Ledger(region)
        for at in range(0, len(DATA), 10_000):
            ledger.add(DATA[at : at + 10_000])
        assert ledger.length == len(DATA)
        ledger.cut(len(DATA))
        (span,) = ledger.spans()
        assert span.digest == hashlib.sha256(DATA).digest()
        ledger.close()

    def test_windows_are_small_until_they_are_asked_for(self, region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing here is deflate, so all of each window is kept."""

        def window(number: int) -> bytes:
            return b"%08d" % number * (WINDOW // 8)

        count, ledger = 50, Ledger(region)
        monkeypatch.setattr(region, "peek", lambda start, count: b"\xff" * count)
        tracemalloc.start()
        try:
            for number in range(count):
                ledger.add(b"x")
                ledger.cut(number, Seek(number, window=window(number)))
                ledger.add(b"y")
                ledger.cut(number)
            ledger.add(b"z")
            ledger.cut(count)
            spans = ledger.spans()
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            ledger.close()
        assert held < count * WINDOW // 4
        assert [span.window for span in spans] == [b"", *(window(at) for at in range(count) for _ in range(2))]
