"""What is logged, and above all what is not."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from clipfs import log


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET https://h/p?X-Amz-Signature=abc&x=1 gave 403", "GET https://h/p?[redacted] gave 403"),
        ("'https://h/p?sig=abc', again", "'https://h/p?[redacted]', again"),
        ("https://user:pass@h/p", "https://[redacted]@h/p"),
        ("docker://user@h/p", "docker://[redacted]@h/p"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer [redacted]"),
        ("{'authorization': 'Basic dXNlcjpwYXNz'}", "{'authorization': 'Basic [redacted]'}"),
        ("sent bearer abcdefghijkl to h", "sent bearer [redacted] to h"),
        ('{"access_token": "abc", "token":"def"}', '{"access_token": "[redacted]", "token":"[redacted]"}'),
        ("password=hunter2; next", "password=[redacted]; next"),
        ("is it? oci:/a@sha256:00 says yes", "is it? oci:/a@sha256:00 says yes"),
        ("basic ideas about tokens", "basic ideas about tokens"),
    ],
)
def test_what_is_hidden(text: str, shown: str) -> None:
    assert log.redacted(text) == shown


def test_hiding_takes_no_time_however_odd_the_text() -> None:
    for text in ("a://" * 50_000, "?" * 200_000, "token=" * 30_000, "authorization " * 20_000, "a" * 300_000):
        log.redacted(text)


@pytest.fixture
def _root() -> Iterator[None]:
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    yield
    root.handlers[:] = kept
    root.setLevel(level)


@pytest.mark.usefixtures("_root")
class TestStreams:
    def test_lines(self) -> None:
        out = io.StringIO()
        log.to_stream(out, logging.INFO)
        logging.getLogger("x").info("see %s", "http://h/?a=secret")
        logging.getLogger("x").debug("not shown")
        date, time, *rest = out.getvalue().split()
        assert (len(date), len(time)) == (10, 12)
        assert rest == ["INFO", "x:", "see", "http://h/?[redacted]"]

    def test_json_lines(self) -> None:
        out = io.StringIO()
        log.to_stream(out, logging.INFO, form="json")
        try:
            raise ValueError("token=secret")
        except ValueError as error:
            logging.getLogger("x").error("two\nlines", exc_info=error)
        (line,) = out.getvalue().splitlines()
        said = json.loads(line)
        assert (said["level"], said["module"], said["message"]) == ("error", "x", "two\nlines")
        assert "ValueError: token=[redacted]" in said["traceback"]
        assert said["time"].endswith("+00:00")

    def test_a_traceback_is_redacted_too(self) -> None:
        out = io.StringIO()
        log.to_stream(out, logging.INFO)
        logging.getLogger("x").error("failed", exc_info=ValueError("http://u:p@h/"))
        assert "http://[redacted]@h/" in out.getvalue()


@pytest.mark.usefixtures("_root")
def test_the_listener_hears_warnings_and_attempts() -> None:
    out = io.StringIO()
    log.to_stream(out, logging.INFO)
    heard: list[tuple[str, str, str]] = []
    attempts: list[None] = []
    with log.Listener(lambda *said: heard.append(said), lambda: attempts.append(None)):
        logging.getLogger("clipfs.blocks.disk").warning("of limited use: %s", "https://h/?k=v")
        logging.getLogger("clipfs.blocks.disk").info("nothing")
        logging.getLogger("clipfs.sources.retry").debug("attempt 1: 503")
        logging.getLogger("clipfs.sources.retry").warning("gave up a mirror")
        logging.getLogger("other").error("not ours")
    logging.getLogger("clipfs").error("too late")
    assert heard == [
        ("warning", "blocks.disk", "of limited use: https://h/?[redacted]"),
        ("retry", "sources.retry", "attempt 1: 503"),
        ("warning", "sources.retry", "gave up a mirror"),
    ]
    assert len(attempts) == 1
    assert "attempt 1" not in out.getvalue(), "what the listener hears, the log need not show"
