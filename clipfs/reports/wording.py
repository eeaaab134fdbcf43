"""Numbers and facts of a report in words for a person."""

from __future__ import annotations

from clipfs.reports.report import Report

# Above this share of the image's bytes a mount is not called lazy.
_LAZY = 0.5

#: How a person calls what was fetched before anybody waited for it.
AHEAD = {"ahead": "ahead of sequential readers", "trace": "because of a trace", "all": "because of --prefetch all"}


def verdict(report: Report) -> str:
    """A sentence: lazy or not, and what took most if not."""
    share = report.fetched_share or 0.0
    if not report.bytes_fetched:
        failed = report.requests.get("failed", 0)
        why = "all of it was cached" if report.bytes_served else "nobody has read anything"
        return f"Nothing was fetched: {f'{failed} requests failed' if failed else why}."
    if share < _LAZY:
        return f"Lazy: {share:.1%} of the image's bytes were fetched."
    reasons = {why: ahead.bytes for why, ahead in report.ahead.items()}
    reasons["read"] = report.bytes_fetched - sum(reasons.values())
    most = max(reasons, key=lambda why: reasons[why])
    because = "its readers asked for that" if most == "read" else f"most of that {AHEAD.get(most, most)}"
    if most == "read" and report.files:
        because += f", most of it for {report.files[0].path}"
    return f"Not lazy: {share:.1%} of the image's bytes were fetched, {because}."


def size(count: float) -> str:
    """A byte count for a person, in binary units: 1536 is ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """For a person: ``3 min 12 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24} h" if hours >= 24 else f"{hours} h {minutes} min"
