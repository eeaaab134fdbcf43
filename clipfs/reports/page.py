"""A report as one HTML page that needs nothing but itself, in the light and in the dark.

Whatever is in the report comes from an image that somebody made, so all of it is escaped, and the page forbids scripts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from clipfs.reports.picture import LEGEND, layer_map, timeline
from clipfs.reports.report import Report, slowest
from clipfs.reports.wording import AHEAD, duration, size, verdict

# In a title, a digest is as long as git shows one; in the table of all numbers it is whole.
_DIGEST = re.compile(r"(sha256:[0-9a-f]{12})[0-9a-f]+")

# Lines of each table; the JSON has all.
_FILES, _RANGES, _SAID = 40, 15, 40

_STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --card: #f3f3f0; --ink: #1c1d20; --soft: #63656c; --line: #dcdcd7;
  --read: #2563c9; --ahead: #1a9a78; --trace: #8a55c8; --all: #d98a12; --cached: #8d9bb0; --never: #e3e3de;
  --bad: #b3261e; --early: #fde6a2; --late: #4a148c; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181b; --card: #212327; --ink: #e8e8e6; --soft: #a0a3ab;
  --line: #34363c; --read: #6b9df5; --ahead: #3cc39c; --trace: #b58cf0; --all: #efb04a; --cached: #74839b;
  --never: #2c2e34; --bad: #f2857d; --early: #4b3a86; --late: #ffd866; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.05rem; font-weight: 500; color: var(--soft); margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .3rem; }
p { margin: .3rem 0; max-width: 46rem; color: var(--soft); }
p.verdict { font-size: 1.6rem; line-height: 1.3; color: var(--ink); margin: .4rem 0 1.4rem; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; }
.tile { flex: 1 1 11rem; background: var(--card); border-radius: 8px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.3rem; font-weight: 600; }
.tile.bad b { color: var(--bad); }
.tile span { color: var(--soft); font-size: .87rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: .7rem 0 1rem; padding: 0; list-style: none;
  color: var(--soft); font-size: .87rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
fieldset { border: 0; padding: 0; margin: .6rem 0 0; font-size: .87rem; color: var(--soft); }
fieldset label { margin-right: 1rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg text.note { fill: var(--soft); font-size: 11px; } svg text.end { text-anchor: end; }
.why-read { fill: var(--read); background: var(--read); } .why-ahead { fill: var(--ahead); background: var(--ahead); }
.why-trace { fill: var(--trace); background: var(--trace); } .why-all { fill: var(--all); background: var(--all); }
.why-cached { fill: var(--cached); background: var(--cached); }
.why-never { fill: var(--never); background: var(--never); }
.unused { fill: url(#hatch); } .hatch { fill: var(--paper); opacity: .7; }
.area { fill: var(--read); opacity: .13; } .curve { fill: none; stroke: var(--read); stroke-width: 1.5; }
.axis, .grid { stroke: var(--line); } .idle { fill: var(--card); }
.map:has(#when:checked) rect[style] { fill: color-mix(in oklab, var(--late) calc(var(--t) * 100%), var(--early)); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin-top: .5rem; }
th { text-align: left; font-weight: 500; color: var(--soft); border-bottom: 1px solid var(--line); padding: .25rem .7rem
  .25rem 0; white-space: nowrap; }
td { border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0; vertical-align: top;
  overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.path { width: 60%; }
"""


def page(report: Report) -> str:
    """The whole document."""
    mount = report.mount
    what = "what it has fetched so far" if mount.serving else "what it fetched"
    source = _DIGEST.sub(r"\1…", mount.source)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>clipfs: {escape(mount.mountpoint)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(source)}, mounted on {escape(mount.mountpoint)} for {duration(mount.seconds)}: {what}</h1>",
        f'<p class="verdict">{escape(verdict(report))}</p>',
        _tiles(report),
        _map(report),
        _timeline(report),
        _files(report),
        _ranges(report),
        _said(report),
        _facts(report),
        "</body></html>\n",
    ]
    return "".join(parts)


def _tiles(report: Report) -> str:
    counters, requests = report.counters, report.requests
    tiles = [
        _tile(
            f"{size(report.bytes_fetched)}",
            f"fetched of {size(report.bytes_total)} in {_count(counters, 'fetches')} ranges",
        ),
        _tile(
            size(report.bytes_served),
            f"given to readers in {_count(counters, 'requests')} requests: {requests.get('memory', 0)} from memory, "
            f"{requests.get('disk', 0)} from the disk cache, {requests.get('source', 0)} from the source",
        ),
    ]
    if report.fetched_per_served is not None:
        tiles.append(
            _tile(
                f"{report.fetched_per_served:.2f}",
                f"bytes fetched for each byte served, {report.decoded_per_served or 0:.2f} decoded",
            )
        )
    for why, ahead in report.ahead.items():
        used = f"{ahead.used_bytes / ahead.bytes:.0%}" if ahead.bytes else "0%"
        tiles.append(_tile(used, f"used, of {size(ahead.bytes)} fetched {AHEAD.get(why, why)}"))
    troubles = _count(counters, "retries"), _count(counters, "spans_refetched"), requests.get("failed", 0)
    text = (
        f"troubles: {troubles[0]} attempts made again, {troubles[1]} spans fetched again, {troubles[2]} requests failed"
    )
    tiles.append(_tile(str(sum(troubles)), text, bad=bool(sum(troubles))))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(number: str, text: str, *, bad: bool = False) -> str:
    return f'<div class="tile{" bad" if bad else ""}"><b>{escape(number)}</b><span>{escape(text)}</span></div>'


def _count(counters: dict[str, int], name: str) -> int:
    return counters.get(name, 0)


def _map(report: Report) -> str:
    there = {each.why for layer in report.layers for each in layer.touched} | {"never"}
    legend = "".join(
        f'<li><i class="why-{why}"></i>{escape(text)}</li>' for why, text in LEGEND.items() if why in there
    )
    if any(not each.used for layer in report.layers for each in layer.touched):
        legend += "<li>striped: nobody has read it</li>"
    return (
        '<section class="map"><h2>The layers</h2>'
        "<p>An image is a stack of compressed layers. Each box is a span: a piece of a layer that is fetched and "
        "decoded as a whole, as wide as it has bytes. A layer goes on in the next row. Point at a box to see more.</p>"
        '<fieldset><label><input type="radio" name="by" checked> colour by reason</label>'
        '<label><input type="radio" name="by" id="when"> colour by time (pale is early)</label></fieldset>'
        f'<ul class="legend">{legend}</ul>{layer_map(report)}</section>'
    )


def _timeline(report: Report) -> str:
    picture = timeline(report)
    if not picture:
        return ""
    cut = "" if report.journal_complete else " The journal became too long: only the beginning is here."
    return (
        "<h2>The time</h2><p>Above, how much had come by when. Below, a bar for each range that was fetched, from when "
        f"it was asked for until it was there. Grey: nothing came for a while, cut short.{cut}</p>{picture}"
    )


def _files(report: Report) -> str:
    rows = (
        (size(each.bytes), str(each.spans), f"{each.at:.2f} s", each.path or "(unknown)")
        for each in report.files[:_FILES]
    )
    return _table(
        "The files",
        "Files that were the first to need a span, and how much came because of them. Others found it there.",
        ("fetched", "spans", "first at", "file"),
        rows,
        len(report.files),
    )


def _ranges(report: Report) -> str:
    rows = (
        (
            f"{each.took:.3f} s",
            size(each.bytes),
            f"{each.layer}",
            f"{each.first}" if each.first == each.last else f"{each.first}–{each.last}",
            each.path or LEGEND.get(each.why, each.why),
        )
        for each in slowest(report, _RANGES)
    )
    return _table("The slowest ranges", "", ("took", "bytes", "layer", "spans", "for"), rows, len(report.fetches))


def _said(report: Report) -> str:
    rows = ((f"{each.at:.2f} s", each.kind, each.message) for each in report.said[:_SAID])
    return _table("What went another way", "", ("at", "kind", "what"), rows, len(report.said))


def _table(title: str, text: str, heads: Sequence[str], rows: Iterable[Sequence[str]], count: int) -> str:
    """All columns but the last are numbers."""
    lines = []
    for row in rows:
        cells = "".join(f'<td class="number">{escape(cell)}</td>' for cell in row[:-1])
        lines.append(f'<tr>{cells}<td class="path">{escape(row[-1])}</td></tr>')
    if not lines:
        return ""
    head = "".join(f'<th class="number">{escape(each)}</th>' for each in heads[:-1]) + f"<th>{escape(heads[-1])}</th>"
    more = f"<p>… and {count - len(lines)} more, which the JSON has.</p>" if count > len(lines) else ""
    return (
        f"<h2>{escape(title)}</h2>"
        + (f"<p>{escape(text)}</p>" if text else "")
        + f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>{more}'
    )


def _facts(report: Report) -> str:
    facts = (
        ("image", report.mount.source),
        ("manifest", report.manifest),
        ("index", report.mount.clip),
        ("process", f"{report.mount.pid}" + ("" if report.mount.serving else ", no longer serving")),
        *((name.replace("_", " "), str(count)) for name, count in report.counters.items()),
    )
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    return f'<h2>All numbers</h2><div class="scroll"><table>{rows}</table></div>'
