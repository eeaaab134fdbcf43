"""The page of a report: that it needs nothing but itself, that names are only text, that its pictures are right."""

from __future__ import annotations

import re
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from clipfs.blocks.counters import NAMES
from clipfs.cli.main import main
from clipfs.reports.page import page
from clipfs.reports.picture import layer_map, timeline
from clipfs.reports.report import Ahead, Fetch, FileUse, LayerUse, Mounted, Report, Said, Touched


def made(spans: int = 12, path: str = "/usr/bin/app") -> Report:
    """A report with something of everything."""
    layers = tuple(
        LayerUse(
            digest=f"sha256:{number}" + "0" * 63,
            codec="gzip",
            bytes=size,
            decoded_bytes=2 * size,
            fetched_bytes=size // 2,
            starts=tuple(size * at // count for at in range(count)),
            touched=tuple(
                Touched(at, ("read", "ahead", "trace", "all", "cached")[at % 5], float(at), at % 3 > 0)
                for at in range(0, count, 2)
            ),
        )
        for number, (size, count) in enumerate([(80 << 20, spans), (300, 1)])
    )
    fetches = tuple(
        Fetch(at + (1000.0 if at > 5 else 0.0), 0.5, 0, at, at, 1 << 20, "read", path) for at in range(spans)
    )
    return Report(
        version=1,
        mount=Mounted("/mnt/<x>", "/x.clip", "docker://h/app@sha256:" + "a" * 64, 1, serving=True, seconds=99.0),
        manifest="sha256:" + "b" * 64,
        bytes_total=(80 << 20) + 300,
        decoded_total=160 << 20,
        bytes_fetched=8 << 20,
        bytes_served=9 << 20,
        bytes_decoded=20 << 20,
        fetched_share=0.1,
        fetched_per_served=0.9,
        decoded_per_served=2.2,
        requests={"memory": 3, "disk": 2, "source": 1, "failed": 0},
        ahead={},
        counters=dict.fromkeys(NAMES, 1),
        journal_complete=False,
        layers=layers,
        files=(FileUse(path, 0.1, 100, 1, 0, 0, 1),),
        fetches=fetches,
        said=(Said(1.0, "retry", path),),
    )


class _Page(HTMLParser):
    """Checks that elements nest, and collects what could load or run something."""

    VOID = ("meta", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [f"{name}={value}" for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


class TestPage:
    def test_it_needs_nothing_but_itself(self) -> None:
        text = page(made())
        parsed = _Page(text)
        assert parsed.outside == []
        assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
        assert not re.search(r"url\((?!#)|@import|https?://", text)
        assert "prefers-color-scheme: dark" in text

    @pytest.mark.parametrize(
        "hostile", ["/<script>alert(1)</script>", '/"><img src=x onerror=y>', "/]]>&amp;'", "/\udcff"]
    )
    def test_names_are_text(self, hostile: str) -> None:
        report = made(path=hostile)
        report = replace(report, mount=replace(report.mount, mountpoint=hostile, source=hostile, clip=hostile))
        layers = tuple(
            replace(layer, digest=hostile, codec=hostile, touched=(replace(layer.touched[0], why=hostile),))
            for layer in report.layers
        )
        fetches = tuple(replace(fetch, why=hostile) for fetch in report.fetches)
        report = replace(report, layers=layers, fetches=fetches, ahead={hostile: Ahead(1, 1, 1, 1)})
        parsed = _Page(page(report))
        assert parsed.outside == []
        assert not {"script", "img"} & set(parsed.tags)

    def test_each_span_is_a_box(self) -> None:
        boxes = [each for each in _shapes(layer_map(made())) if each.get("class", "").startswith("why-")]
        titles = [str(each[0].text) for each in boxes]
        assert {title.split(":")[0].split(",")[0] for title in titles} == {f"span {number}" for number in range(12)}
        assert sum(each.get("class") == "why-never" for each in boxes) == 6
        assert sum(each.get("class") == "why-read" for each in boxes) == 3, "0 and 10, and the other layer's"

    def test_a_strangers_report_with_a_million_pauses(self) -> None:
        """None of its transfers took any time, so that each pause is long beside them all."""
        fetch = made().fetches[0]
        fetches = tuple(replace(fetch, at=float(at * at), took=0.0) for at in range(100_000))
        began = time.process_time()
        picture = timeline(replace(made(), fetches=fetches))
        assert time.process_time() - began < 30
        assert 100 < picture.count('class="idle"') <= 300
        places = [float(each.get("x", "")) for each in _shapes(picture) if each.get("class") == "idle"]
        assert places == sorted(places)
        assert 0 <= places[0] < places[-1] <= 960

    def test_boxes_stay_on_the_picture_and_off_each_other(self) -> None:
        for spans in (1, 12, 333, 20_000):
            places: dict[str, list[tuple[float, float]]] = {}
            for each in _shapes(layer_map(made(spans))):
                if each.get("class", "").startswith("why-"):
                    left, width = float(each.get("x", "")), float(each.get("width", ""))
                    assert 0 <= left < 960
                    assert left + width <= 960.5
                    places.setdefault(each.get("y", ""), []).append((left, left + width))
            for row in places.values():
                row.sort()
                assert all(one[1] <= other[0] + 0.5 for one, other in pairwise(row))
            assert len(places) <= 20

    def test_many_spans_make_no_large_page(self) -> None:
        assert len(page(made(20_000))) < 8 << 20

    def test_nor_do_numbers_that_cannot_be(self) -> None:
        report = made()
        far = tuple(
            replace(report.fetches[0], at=at, took=took) for at, took in [(-1e14, 1e14), (1e14, 1e14), (1e14, 0)]
        )
        for fetches in (far, far[:1], far[2:], far[::2]):
            assert len(page(replace(report, bytes_total=1, fetches=fetches))) < 1 << 20

    def test_the_timeline_cuts_what_was_idle(self) -> None:
        shapes = _shapes(timeline(made()))
        assert sum(each.get("class") == "idle" for each in shapes) == 1
        bars = [each for each in shapes if each.get("class") == "why-read"]
        assert len(bars) == 12
        assert all(0 <= float(each.get("x", "")) <= 960 for each in bars)
        assert timeline(replace(made(), fetches=())) == ""

    def test_by_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "report").write_text(made().to_json())
        assert main(["explain", "--html", str(tmp_path / "x.html"), str(tmp_path / "report")]) == 0
        assert capsys.readouterr().out == ""
        assert (tmp_path / "x.html").read_text() == page(made())


def _shapes(svg: str) -> list[ET.Element]:
    return list(ET.fromstring(svg).iter("rect"))
