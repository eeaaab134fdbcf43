"""Words of strangers, before they become part of a sentence or of a log: without secrets, printable, and not too many.

Sentences of ours name hosts and digests only. What a server says, and what the HTTP client raises or logs, may hold
addresses with signatures and headers with passwords.
"""

from __future__ import annotations

import logging
import re

from clipfs import log

# A header that is no header can have 100 KB, and the client quotes it.
_LONGEST = 500

# Of an address without its host, as it is in a request.
_QUERY = re.compile(r"\?[^\s\"'<>]*[=%&][^\s\"'<>]*")

# Loggers of the HTTP client that tell of addresses and headers.
_TALKATIVE = ("httpx2", "httpcore2.connection", "httpcore2.http11", "httpcore2.proxy")


def redacted(text: str) -> str:
    """`text` as far as it is for everybody."""
    text = _QUERY.sub("?…", log.redacted(text[: 4 * _LONGEST]))
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def without_login(url: str) -> str:
    """An address that may be none, without what stands before its last @: a password may have any character."""
    return redacted(re.sub(r"^([a-z0-9+.-]*://)?.*@", r"\1…@", url, flags=re.IGNORECASE | re.DOTALL))


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), None
        return True


_REDACTING = _Redacting()


def watch_client_logs() -> None:
    """From here on the HTTP client logs no secrets, also where somebody else's handlers print them."""
    for name in _TALKATIVE:
        # The same filter is added once.
        logging.getLogger(name).addFilter(_REDACTING)
