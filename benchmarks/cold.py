"""Starting an image that is only in a registry, over a slow link; and reading all of a large file over it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import clipfs
from benchmarks import demo
from benchmarks.link import Link, slow_link
from benchmarks.measure import CLIPFS, Row, Section, number, rounds
from benchmarks.programs import CLIPFS_COMMAND, drop_caches, first_output, forget, run
from benchmarks.reading import readers
from benchmarks.starting import Bundle
from benchmarks.workload import BIG, Demo, Workload
from tests.registry import Registry

PULL = "skopeo copy + umoci unpack + runc run"
DOWNLOAD = "plain download of the layer"

# What people run in images: a scientific Python and a Node.js.
_PACKAGES = ("python3", "python3-numpy", "python3-scipy", "nodejs")

_ROUND_TRIP = 0.02
_SLOW, _FAST = 3e6, 100e6


@dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds to the first output, bytes over the link."""

    seconds: float
    received: int


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
    rows, lines = [], []
    with _registry(workload.scratch) as registry:
        name = registry.push(next(iter(programs.values())).image, "app:v1")
        clip = workload.scratch / "app.clip"
        report = clipfs.build(name, clip)
        # Pulling takes most of a minute over the slow link, so that one program once has to do there.
        first = dict([next(iter(programs.items()))])
        for rate, count, some in ((_SLOW, 1, first), (_FAST, min(3, workload.size.rounds), programs)):
            for what, program in some.items():
                found = _starts(workload, registry, clip, program, rate, count)
                where = f"{what}, {rate / 1e6:.0f} MB/s"
                rows += _rows(where, found)
                lines += [
                    f"- {where}: {each}, {starts[0].received / report.compressed:.1%} of the image's bytes"
                    for each, starts in found.items()
                ]
    text = (
        f"An image of {report.compressed / 1e6:.0f} MB in Debian's docker-registry, behind a link with a round trip of "
        f"{1000 * _ROUND_TRIP:.0f} ms. *First*: the index is at hand, all caches are empty. *With a trace*: the same, "
        "but an earlier run has left its trace. *Again*: what was read is in the disk cache. ratarmount is no peer "
        "here: it mounts a layer, not an image.\n\nBytes over the link:\n\n" + "\n".join(lines)
    )
    return Section.of("Cold starts over a slow link", text, rows)


def _rows(where: str, found: Mapping[str, list[Start]]) -> list[Row]:
    why = "What the program reads has to come over the link, and a span of a gzip layer comes whole."
    pulled = [start.seconds for start in found[PULL]]
    return [
        Row(f"{where}: {how}", "s", {CLIPFS: [start.seconds for start in starts], PULL: pulled}, PULL,
            "start from a registry", why)
        for how, starts in found.items()
        if how != PULL
    ]  # fmt: skip


def _starts(
    workload: Workload, registry: Registry, clip: Path, program: Demo, rate: float, count: int
) -> dict[str, list[Start]]:
    scratch = workload.scratch
    with slow_link(registry.host, rate, _ROUND_TRIP, scratch) as link:
        source = f"docker://127.0.0.1:{link.port}/app:v1"
        traces, spans = Path(os.environ["CLIPFS_CACHE"]) / "traces", scratch / "spans"

        def by_clipfs() -> list[Start]:
            forget()
            command = (*CLIPFS_COMMAND, "run", "--rm", "--source", source, "--cache-dir", str(spans), str(clip))
            found = []
            for keep in ((), ("trace",), ("trace", "spans")):
                if "trace" not in keep:
                    shutil.rmtree(traces, ignore_errors=True)
                if "spans" not in keep:
                    shutil.rmtree(spans, ignore_errors=True)
                found.append(_timed(link, lambda: first_output(*command, *program.command)))
            return found

        def by_pulling() -> list[Start]:
            layout = scratch / "pulled"
            bundle = Bundle(scratch / "bundle", Demo(f"oci:{layout}:v1", program.command))

            def pull() -> float:
                run("skopeo", "copy", "--quiet", "--insecure-policy", "--src-tls-verify=false", source,
                    f"oci:{layout}:v1")  # fmt: skip
                bundle.unpack()
                return bundle.first_output()

            try:
                return [_timed(link, pull)] * 3
            finally:
                shutil.rmtree(layout, ignore_errors=True)
                shutil.rmtree(bundle.path, ignore_errors=True)

        measured = rounds(count, f"starting over {rate / 1e6:.0f} MB/s", {CLIPFS: by_clipfs, PULL: by_pulling})
    kinds = ("first", "with a trace", "again")
    found = {kind: [starts[at] for starts in measured[CLIPFS]] for at, kind in enumerate(kinds)}
    return {**found, PULL: [starts[0] for starts in measured[PULL]]}


def _timed(link: Link, action: Callable[[], float]) -> Start:
    drop_caches()
    before, started = link.received, time.perf_counter()
    return Start(action() - started, link.received - before)


def streaming(workload: Workload) -> Section:
    """All of a large file, in order, beside a download of the layer that it is in."""
    with _registry(workload.scratch) as registry:
        name = registry.push(workload.generated, "generated:v1")
        clip = workload.scratch / "generated.clip"
        clipfs.build(name, clip)
        with clipfs.Index.open(clip) as index:
            digest, size = index.layers[0].digest, index.layers[0].size
            big = index.inode(index.resolve(BIG)).size
        mountpoint = workload.scratch / "mnt"
        mountpoint.mkdir()
        with slow_link(registry.host, _FAST, _ROUND_TRIP, workload.scratch) as link:
            source = f"docker://127.0.0.1:{link.port}/generated:v1"
            url = f"http://127.0.0.1:{link.port}/v2/generated/blobs/{digest}"

            def by_clipfs() -> float:
                forget()
                drop_caches()
                with clipfs.mount(clip, mountpoint, clipfs.MountOptions(source=source)):
                    before, started = link.received, time.perf_counter()
                    run("cp", mountpoint / BIG, "/dev/null")
                    return (link.received - before) / 1e6 / (time.perf_counter() - started)

            def by_download() -> float:
                started = time.perf_counter()
                run("curl", "--silent", "--fail", "--output", "/dev/null", url)
                return size / 1e6 / (time.perf_counter() - started)

            samples = rounds(workload.size.rounds, "streaming", {CLIPFS: by_clipfs, DOWNLOAD: by_download})
        mountpoint.rmdir()
    why = "Decoding, verifying and the disk cache share two cores with the registry, the link and the reader."
    row = Row("all of a large file, MB of the layer a second", "MB/s", samples, DOWNLOAD, "read over a link", why)
    text = (
        f"`cat` of a file of {big / 1e6:.0f} MB from a fresh mount with empty caches, over a link of "
        f"{number(_FAST / 1e6)} MB/s and a round trip of {1000 * _ROUND_TRIP:.0f} ms; beside curl, which downloads the "
        "layer and throws it away."
    )
    return Section.of("Streaming over a link", text, [row])


@contextmanager
def _registry(scratch: Path) -> Iterator[Registry]:
    place = scratch / "registry-of-its-own"
    place.mkdir()
    try:
        with Registry(place) as registry:
            yield registry
    finally:
        shutil.rmtree(place)


def memory(workload: Workload) -> Section:
    """What the serving process holds at most, while its files are read in each way."""
    lines = []
    clip, mountpoint = workload.scratch / "memory.clip", workload.scratch / "mnt"
    clipfs.build(workload.generated, clip)
    mountpoint.mkdir()
    options = clipfs.MountOptions()
    for reader in readers(workload):
        forget()
        drop_caches()
        with clipfs.mount(clip, mountpoint, options) as mounted:
            [worker] = [record.worker for record in clipfs.mounts() if record.process.pid == mounted.pid]
            assert worker is not None
            before = _resident(worker.pid, "VmRSS")
            reader.read(mountpoint)
            most = _resident(worker.pid, "VmHWM")
        without = f"{max(0, most - options.cache) / 1e6:.0f} MB"
        lines.append([reader.name, f"{before / 1e6:.0f} MB", f"{most / 1e6:.0f} MB", without])
    mountpoint.rmdir()
    header = ["workload", "just mounted", "most", "most, without the LRU"]
    text = (
        f"Resident memory of the process that serves a mount, whose LRU is {options.cache >> 20} MiB. The bound is "
        "150 MB and the LRU."
    )
    return Section("Memory", text, header, lines)


def _resident(pid: int, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) << 10
    raise SystemExit(f"process {pid} has no {key}")
