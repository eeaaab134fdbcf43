"""Starting an image that is only in a registry, over a slow link."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clipfs
from benchmarks import demo
from benchmarks.bundles import Bundle
from benchmarks.goals import Outcome, as_fast, at_most
from benchmarks.link import Link, slow_link
from benchmarks.measure import CLIPFS, Picture, Row, Section, number, progress, rounds, spread_of
from benchmarks.peers import RATARMOUNT, ratarmount_program
from benchmarks.programs import CLIPFS_COMMAND, NotInTime, drop_caches, first_output, forget, run
from benchmarks.remote import FAST, ROUND_TRIP, SLOW, ratarmount, registry_of_its_own, upload
from benchmarks.workload import Demo, Workload, copies_of
from tests.registry import Registry

PULL = "skopeo copy + umoci unpack + runc run"

# What people run in images: a scientific Python and a Node.js.
_PACKAGES = ("python3", "python3-numpy", "python3-scipy", "nodejs")

_FIRST, _TRACE, _AGAIN = KINDS = ("first", "with a trace", "again")
_WHY = "What the program reads has to come over the link, and a span of a gzip layer comes whole."
# For ratarmount, whose bytes over the link say when it would be through.
_PATIENCE = 90.0


@dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds to the first output, bytes over the link."""

    seconds: float
    received: int


@dataclass(frozen=True, slots=True)
class Scene:
    """One program behind one link, and all the starts that there were, by how."""

    program: str
    rate: float
    starts: Mapping[str, list[Start]]

    @property
    def name(self) -> str:
        return f"{self.program}, {self.rate / 1e6:g} MB/s"

    def rows(self) -> list[Row]:
        pulled = [start.seconds for start in self.starts[PULL]]
        return [
            Row(f"{self.name}: {kind}", "s", {CLIPFS: [start.seconds for start in self.starts[kind]], PULL: pulled},
                PULL, "start from a registry", _WHY)
            for kind in KINDS
        ]  # fmt: skip

    def medians(self) -> dict[str, Start]:
        """Of each way the start in the middle."""
        return {
            how: sorted(starts, key=lambda start: start.seconds)[len(starts) // 2]
            for how, starts in self.starts.items()
            if starts
        }


def application(cache: Path) -> Mapping[str, Demo]:
    """The programs to start, by name, all in one image that is made now if need be."""
    image = f"oci:{demo.build(cache / 'application', _PACKAGES, 'clipfs benchmark application')}:latest"
    return {
        "Python with numpy": Demo(image, ("python3", "-c", "import numpy; print(numpy.arange(9).sum())")),
        "Node.js": Demo(image, ("node", "-e", "console.log(require('os').arch())")),
    }


def starting_cold(workload: Workload) -> Section:
    """Time to the first output and bytes on the wire, beside pulling and unpacking."""
    programs = workload.applications
    first = next(iter(programs))
    with registry_of_its_own(workload.scratch) as registry:
        name = registry.push(programs[first].image, "app:v1")
        report = clipfs.build(name, workload.scratch / "app.clip")
        # Pulling takes most of two minutes over the slow link, so that one program once has to do there.
        plan = [(SLOW, 1, first), *((FAST, min(3, workload.size.rounds), each) for each in programs)]
        scenes = [_Stage(workload, registry, programs[what], rate).play(what, count) for rate, count, what in plan]
        beside = _by_ratarmount(workload, registry, programs[first])
    scenes = [each if each.rate != FAST or each.program != first else
              Scene(each.program, each.rate, {**each.starts, RATARMOUNT: beside}) for each in scenes]  # fmt: skip
    lines = [
        [f"{scene.name}: {how}, s", spread_of(start.seconds for start in starts), f"{middle.received / 1e6:.1f} MB",
         f"{middle.received / report.compressed:.1%}"]
        for scene in scenes for how, starts in scene.starts.items() if (middle := scene.medians().get(how))
    ]  # fmt: skip
    text = (
        f"An image of {report.compressed / 1e6:.0f} MB in Debian's docker-registry, behind a link with a round trip of "
        f"{1000 * ROUND_TRIP:.0f} ms; the kernel's caches dropped before each start (`sync`, then 3 into "
        "`/proc/sys/vm/drop_caches`). *First*: the index is at hand, clipfs' own cache is empty. *With a trace*: the "
        "same, but an earlier run has left its trace and a checked copy of the index. *Again*: what was read is in the "
        "disk cache. The last column is "
        f"the share of the image's compressed bytes. One round at {number(SLOW / 1e6)} MB/s, "
        f"{min(3, workload.size.rounds)} at {number(FAST / 1e6)} MB/s. {_of_ratarmount(beside)}"
    )
    header = ["", "time to first output", "bytes over the link", "of the image"]
    rows = [row for scene in scenes for row in scene.rows()]

    def draw(figure: Any) -> None:
        from benchmarks import charts  # late: matplotlib is an extra

        charts.starts(figure, [(scene.name, scene.medians()) for scene in scenes], KINDS)

    picture = Picture("cold-starts.svg", "Cold starts: time to first output, bytes over the link", draw)
    return Section("Cold starts over a slow link", text, header, lines, rows, _outcomes(scenes[0], report), [picture])


def _outcomes(scene: Scene, report: clipfs.BuildReport) -> list[Outcome]:
    """What was wanted of the first program behind the slow link."""
    row = scene.rows()[0]
    share = scene.medians()[_FIRST].received / report.compressed
    return [
        as_fast(row, PULL, 8, _WHY),
        at_most(f"{row.name}, bytes over the link", 15, 100 * share, " % of the image", _WHY),
    ]


class _Stage:
    """One program behind a link of its own."""

    def __init__(self, workload: Workload, registry: Registry, program: Demo, rate: float) -> None:
        self._scratch, self._registry, self._program, self._rate = workload.scratch, registry, program, rate
        self._clip, self._spans = workload.scratch / "app.clip", workload.scratch / "spans"

    def play(self, what: str, count: int) -> Scene:
        with slow_link(self._registry.host, self._rate, ROUND_TRIP, self._scratch) as link:
            source = f"docker://127.0.0.1:{link.port}/app:v1"
            measured = rounds(count, f"{what} over {self._rate / 1e6:.0f} MB/s", {
                CLIPFS: lambda: self._by_clipfs(link, source), PULL: lambda: self._by_pulling(link, source),
            })  # fmt: skip
        found = {kind: [starts[at] for starts in measured[CLIPFS]] for at, kind in enumerate(KINDS)}
        return Scene(what, self._rate, {**found, PULL: [starts[0] for starts in measured[PULL]]})

    def _by_clipfs(self, link: Link, source: str) -> list[Start]:
        forget()
        traces = Path(os.environ["CLIPFS_CACHE"]) / "traces"
        options = ("--rm", "--source", source, "--cache-dir", str(self._spans))
        command = (*CLIPFS_COMMAND, "run", *options, str(self._clip), *self._program.command)
        found = []
        for kind in KINDS:
            if kind == _FIRST:
                shutil.rmtree(traces, ignore_errors=True)
            if kind != _AGAIN:
                shutil.rmtree(self._spans, ignore_errors=True)
            found.append(_timed(link, lambda: first_output(*command)))
        return found

    def _by_pulling(self, link: Link, source: str) -> list[Start]:
        layout = self._scratch / "pulled"
        bundle = Bundle(self._scratch / "bundle", Demo(f"oci:{layout}:v1"))

        def pull() -> float:
            run("skopeo", "copy", "--quiet", "--insecure-policy", "--src-tls-verify=false", source, f"oci:{layout}:v1",
                seconds=600)  # fmt: skip
            bundle.unpack()
            bundle.command(self._program.command)
            return bundle.first_output()

        try:
            return [_timed(link, pull)]
        finally:
            shutil.rmtree(layout, ignore_errors=True)
            shutil.rmtree(bundle.path, ignore_errors=True)


def _by_ratarmount(workload: Workload, registry: Registry, program: Demo) -> list[Start]:
    """Over the fast link, once; nothing if it is not there or not ready in time."""
    client = ratarmount_program()
    if client is None:
        return []
    progress("ratarmount over the fast link")
    scratch = workload.scratch
    mountpoint, index = scratch / "mnt", scratch / "ratarmount.sqlite"
    path = upload(registry, "flat", copies_of(workload, program.image).archive)
    mountpoint.mkdir()
    try:
        with ratarmount(client, f"http://{registry.host}{path}", index, mountpoint):
            pass  # it has an index now, as clipfs has
        with slow_link(registry.host, FAST, ROUND_TRIP, scratch) as link, suppress(NotInTime):
            bundle = Bundle(scratch / "container", program)

            def start() -> float:
                url = f"http://127.0.0.1:{link.port}{path}"
                with ratarmount(client, url, index, mountpoint) as root, bundle.over(root):
                    bundle.command(program.command)
                    return bundle.first_output(_PATIENCE)

            return [_timed(link, start)]
    finally:
        mountpoint.rmdir()
    return []


def _of_ratarmount(beside: list[Start]) -> str:
    known = (
        "ratarmount knows nothing of images. It mounts a `.tar.gz` of the flattened tree by the URL of its blob in the "
        "same registry, with its index at hand and seek points every MiB (by default every 16), under the overlay and "
        "runc of the others, once over the fast link only: "
    )
    if not beside:
        return f"{known}it was not there, or had printed nothing after {_PATIENCE:.0f} s."
    return (
        f"{known}it fetches the same ranges again and again, and the bytes of that one start would take "
        f"{beside[0].received / SLOW:,.0f} s over the slow one."
    )


def _timed(link: Link, action: Callable[[], float]) -> Start:
    drop_caches()
    before, started = link.received, time.perf_counter()
    return Start(action() - started, link.received - before)
