"""``clipfs explain``: is this mount lazy, and why not?"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from clipfs.aside import written_aside
from clipfs.blocks.counters import Counters
from clipfs.errors import UsageError, printable
from clipfs.format.index import Index
from clipfs.mounting import mounter, mountinfo
from clipfs.reports import reporter
from clipfs.reports.report import MOST_BYTES, Report, parse, slowest
from clipfs.reports.wording import AHEAD, duration, size, verdict

# Lines of each list on a terminal. The JSON has all.
_FILES, _RANGES, _SAID = 12, 5, 8


def explain(args: argparse.Namespace) -> int:
    """Tell the facts, as text, as JSON, or as a page."""
    report = _report(args.target)
    if args.html is not None:
        # Late: a page is asked for less often than a line.
        from clipfs.reports.page import page

        with written_aside(args.html) as aside:
            aside.write_text(page(report), encoding="utf-8", errors="backslashreplace")
    if args.json:
        print(report.to_json())
    elif args.html is None:
        print("\n".join(map(printable, _lines(report))))
    return 0


def _report(target: str) -> Report:
    """Of a mount, served or dead but not yet cleaned up, or from a file."""
    path = Path(target)
    place = mountinfo.canonical(target)
    record = mounter.record_at(place)
    if record is not None:
        # The clip may be another one by now, or gone; copies that nobody has used for long are removed.
        index_path = record.copy if os.path.exists(record.copy) else record.clip
        with Index.open(index_path, shown=Path(record.clip)) as index:
            counters = Counters.open(record.counters)
            try:
                return reporter.of_mount(index, record, counters.asdict(), serving=record.alive)
            finally:
                counters.close()
    if path.is_dir():
        raise UsageError(
            f"no clipfs mount of yours is on {target}; what an earlier one did, only a report of it can tell"
        )
    # Once, for it may be a pipe, and without an end.
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if raw.startswith(b"\x89CLIP\r\n\x1a"):
        raise UsageError(f"{target} is an image, which does nothing by itself; name the directory where it is mounted")
    return parse(raw, target)


def _lines(report: Report) -> Iterator[str]:
    mount = report.mount
    # A report may come from elsewhere, and not have them all.
    counters, requests = Counter(report.counters), Counter(report.requests)
    state_of_it = f"served by process {mount.pid}" if mount.serving else "no longer served"
    yield f"{mount.mountpoint}: {mount.source}, {state_of_it}, {duration(mount.seconds)}"
    yield verdict(report)
    yield ""
    yield (
        f"fetched     {size(report.bytes_fetched)} of {size(report.bytes_total)}{_percent(report.fetched_share)} "
        f"in {counters['fetches']} ranges"
    )
    yield from _aheads(report)
    yield (
        f"served      {size(report.bytes_served)}, in {counters['requests']} requests: {requests['memory']} from "
        f"memory, {requests['disk']} from the disk cache, {requests['source']} from the source"
    )
    if report.fetched_per_served is not None and report.decoded_per_served is not None:
        yield (
            f"per byte    {report.fetched_per_served:.2f} bytes fetched and {report.decoded_per_served:.2f} decoded "
            "for each byte served"
        )
    yield (
        f"trouble     {counters['retries']} attempts failed and were made again, {counters['spans_refetched']} spans "
        f"were wrong and fetched again, {requests['failed']} requests failed"
    )
    if not report.journal_complete:
        yield "            the journal became too long; what is below is about the beginning only"
    yield from _lists(report)


def _aheads(report: Report) -> Iterator[str]:
    for why, ahead in report.ahead.items():
        used = ahead.used_bytes / ahead.bytes if ahead.bytes else 0.0
        yield f"            {size(ahead.bytes)} of it {AHEAD.get(why, why)}; {used:.0%} of that was used"


def _lists(report: Report) -> Iterator[str]:
    if report.files:
        yield from ("", "files that were the first to need something")
        for each in report.files[:_FILES]:
            yield f"  {size(each.bytes):>10}  {_spans(each.spans):>10}  {each.path or '(unknown)'}"
        yield from _more(report.files, _FILES)
    if report.fetches:
        yield from ("", "slowest ranges")
        for fetch in slowest(report, _RANGES):
            spans = f"{fetch.first}" if fetch.first == fetch.last else f"{fetch.first}–{fetch.last}"
            what = fetch.path or AHEAD.get(fetch.why, fetch.why)
            yield f"  {fetch.took:8.3f} s  {size(fetch.bytes):>10}  layer {fetch.layer}, span {spans}: {what}"
    if report.said:
        yield from ("", "what went another way")
        for said in report.said[:_SAID]:
            yield f"  {said.at:8.3f} s  {said.kind}: {said.message}"
        yield from _more(report.said, _SAID)


def _more(things: Sequence[object], shown: int) -> Iterator[str]:
    if len(things) > shown:
        yield f"  … and {len(things) - shown} more; --json has them all"


def _spans(count: int) -> str:
    return "1 span" if count == 1 else f"{count} spans"


def _percent(share: float | None) -> str:
    return "" if share is None else f" ({share:.1%})"
