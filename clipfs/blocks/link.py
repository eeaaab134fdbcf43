"""How far away a source is and how fast, and what it is worth to ask for besides. Pure: no I/O, no clock.

Whoever waits for one span after the other waits for a round trip each time, and the link is idle meanwhile. Programs
read on where they have begun, though not in sequence: of what lies behind a span that was needed, half is needed later.
"""

from __future__ import annotations

# Seconds that it takes a source to answer. One that does sooner is asked again instead.
_FAR = 0.004

# How long the link may be busy with what nobody has asked for, in seconds, and with how many bytes at most. numpy in a
# 260 MB image started after 13.5 s at 3 MB/s, instead of 14.7, with 13.1 % of the image instead of 12.5. At 100 MB/s it
# started after 2.9 s, with 21 % of the image; with 400 KiB after 3.7 s and 14 %; and with 4 MiB after 2.7 s and 29 %.
# Node.js: 2.4, 3.0 and 2.3 s, 16, 10 and 22 %.
_SECONDS = 0.07
_MOST = 1600 << 10

# What each answer counts for in the averages.
_LATE = 0.2


class Link:
    """Averages of late. delay: seconds until the first byte of an answer. rate: bytes a second after that."""

    def __init__(self) -> None:
        self.delay = self.rate = 0.0

    def note(self, size: int, delay: float, seconds: float) -> None:
        """So many bytes came within so many seconds, the first of them after `delay`."""
        rate = size / max(seconds - delay, 1e-6)
        if not self.rate:
            self.delay, self.rate = delay, rate
            return
        self.delay += (delay - self.delay) * _LATE
        self.rate += (rate - self.rate) * _LATE

    @property
    def further(self) -> int:
        """Bytes to ask for beyond what somebody waits for."""
        return int(min(self.rate * _SECONDS, _MOST)) if self.delay >= _FAR else 0

    def dear(self, size: int) -> bool:
        """Do so many bytes take longer than what they may spare, which is half of a round trip on average?"""
        return size > self.rate * self.delay / 2
