"""Where the next span of a gzip layer begins: at the first place where decoding could whose window is cheap.

This module owns that choice, and what has to be kept until it is made: all that was decoded since the last span began.
A span that has become as long as it may is ended at the best of the places that were passed, and the rest begins the
next one. Nothing is decoded here; what a window costs the ledger finds out, while decoding goes on.
"""

from __future__ import annotations

from concurrent.futures import Future

from clipfs.compression.ledger import Ledger, Seek
from clipfs.compression.windows import SAMPLE
from clipfs.format.container import SEEK, SPAN

# What all spans of a layer may cost in the index, windows and records, as a share of its compressed bytes, besides what
# the ledger has to spare; and one of them, in terms of what all may. There is a place every 80 KB of usual data, and at
# one in ten hardly anything refers to the window.
_SHARE, _OF_ONE = 0.0029, 1.6

# No span is ended before it has this share of its size, however cheaply: records cost, too.
_SOONEST = 1 / 8

# Of places that are nearer to one another than this share of a span, one is looked at: it is kept with its window.
_SPACING = 1 / 64

# A span ends, however little it holds, once it takes this many times as many compressed bytes as it should hold.
DENSITY = 2

# Where there is no place to begin the next span, pieces are this many times as long.
_PATIENCE = 4


class _Run:
    """Decoded bytes, and where decoding can begin behind them, if that is worth a look."""

    def __init__(self, end: int = 0) -> None:
        self.data = bytearray()
        self.stop = 0  # decoded bytes of the layer up to here
        self.end = end  # the compressed byte that a span which ends here needs no more
        self.seek: Seek | None = None
        self.cost: Future[int] | None = None  # of the window there


class Stretch:
    """What was decoded since the last span began, on its way to the ledger.

    size: decoded bytes of a span at most, if there is a place to end it. piece: of one of its pieces, about.
    """

    def __init__(self, ledger: Ledger, size: int, piece: int) -> None:
        self._ledger, self._size, self.piece = ledger, size, piece
        self._runs = [_Run()]
        self._start = self._stop = 0  # decoded bytes of the layer before the span, and up to here
        self._spent = 0  # bytes of the index for the spans before it
        # The last three places: one that was just passed, one whose cost is being found out, one that is to be judged.
        self._latest: _Run | None = None
        self._appraised: _Run | None = None
        self._due: _Run | None = None
        # How far the span had come at the last place that was looked at, by whether there was a window: those without
        # cost nothing, and are looked at whatever is near them.
        self._seen = {True: 0.0, False: 0.0}

    def add(self, chunk: bytes, end: int) -> None:
        """The next decoded bytes. end: the compressed byte that a span which ends behind them needs no more."""
        run = self._runs[-1]
        if run.seek is not None or len(run.data) >= self.piece:
            run = _Run()
            self._runs.append(run)
        run.data += chunk
        self._stop += len(chunk)
        run.stop, run.end = self._stop, end

    def wants(self, position: int, *, window: bool) -> bool:
        """Is it worth a look that decoding can begin at compressed byte `position`, with a window or without?"""
        if self._stop == self._start and not window:
            return True
        come = self._come(self._stop, position)
        return come >= _SOONEST and come - self._seen[window] >= _SPACING

    def place(self, seek: Seek) -> None:
        """Decoding can begin behind what was added."""
        if self._stop == self._start:
            self._ledger.begin(seek)
            return
        self._seen[bool(seek.window)] = self._come(self._stop, seek.start)
        self._appraise(self._latest)
        self._due, self._appraised, self._latest = self._appraised, self._latest, self._runs[-1]
        self._latest.seek = seek

    def settle(self, position: int) -> None:
        """End the span if it is time to, decoding having come to compressed byte `position`.

        What a place costs is found out when what follows is known, at the next one, and it is judged at the one after
        that: until then nobody waits for it, and where spans begin does not depend on how long that takes.
        """
        due, self._due = self._due, None
        if due is not None and due.seek is not None and self._affordable(due):
            self._cut(due)
        if self._come(self._stop, position) >= 1:
            places = [run for run in self._runs if run.seek is not None]
            self._appraise(self._latest)
            if places:
                self._cut(min(reversed(places), key=self._price))
            else:
                self._pass_on(len(self._runs))

    def finish(self) -> None:
        """The layer has ended."""
        self._ledger.cut(self._pass_on(len(self._runs)))

    def _appraise(self, run: _Run | None) -> None:
        """Have it found out what a place costs."""
        if run is not None and run.seek is not None and run.cost is None:
            following = self._runs[self._runs.index(run) + 1 :]
            run.cost = self._ledger.cost(run.seek, bytes(following[0].data[:SAMPLE]) if following else b"")

    def _come(self, stop: int, position: int) -> float:
        """How far a span has come that ends there, decoded and compressed, as a share of what it may have."""
        return max((stop - self._start) / self._size, (position - self._ledger.start) / (DENSITY * self._size))

    def _affordable(self, run: _Run) -> bool:
        """Is that a place to end the span at, though it may become longer?"""
        assert run.seek is not None
        allowed = _SHARE * run.seek.start + self._ledger.spare
        one = _OF_ONE * allowed / max(1, run.seek.start)
        return self._price(run) <= one and self._spent + self._cost(run) <= allowed

    def _price(self, run: _Run) -> float:
        """Bytes of the index for each compressed byte of the span, if it ends here."""
        assert run.seek is not None
        return self._cost(run) / max(1, run.seek.start - self._ledger.start)

    def _cost(self, run: _Run) -> int:
        """Bytes of the index for the span, if it ends here."""
        assert run.cost is not None
        records = max(1, (run.stop - self._start) // self.piece) * SPAN.size
        return run.cost.result() + SEEK.size + records

    def _cut(self, last: _Run) -> None:
        """End the span behind this run, and begin the next one there."""
        assert last.seek is not None
        seek = last.seek
        self._spent += self._cost(last)
        end = self._pass_on(self._runs.index(last) + 1)
        # Less than where the input was for a decoder that looks ahead: what ends with a block needs nothing behind it.
        self._ledger.cut(min(end, seek.start + (seek.bit > 0)))
        self._ledger.begin(seek)
        self._start, self._seen = last.stop, {True: 0.0, False: 0.0}
        for run in self._runs:
            if run.seek is not None and self._come(run.stop, run.seek.start) < _SOONEST:
                run.seek = run.cost = None
        self._latest, self._appraised = (self._kept(run) for run in (self._latest, self._appraised))

    def _kept(self, run: _Run | None) -> _Run | None:
        return run if run in self._runs and run is not None and run.seek is not None else None

    def _pass_on(self, count: int) -> int:
        """Give the first runs to the ledger, in pieces; the compressed byte that they end with."""
        passed, self._runs = self._runs[:count], self._runs[count:] or [_Run(self._runs[-1].end)]
        for run in passed:
            self._ledger.add(run.data)
            if self._ledger.length >= self.piece * (_PATIENCE if self._ledger.run >= self._size else 1):
                self._ledger.cut(run.end)
        return passed[-1].end
