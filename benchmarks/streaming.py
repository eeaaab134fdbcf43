"""Reading all of a large file over a link, beside a plain download of the layer that it is in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import clipfs
from benchmarks.goals import as_fast
from benchmarks.link import Link, slow_link
from benchmarks.measure import CLIPFS, Row, Section, number, rounds
from benchmarks.programs import drop_caches, forget, run
from benchmarks.remote import FAST, ROUND_TRIP, registry_of_its_own
from benchmarks.workload import BIG, Workload

DOWNLOAD = "plain download of the layer"

_WHY = "Decoding, verifying and the disk cache share two cores with the registry, the link and the reader."


def streaming(workload: Workload) -> Section:
    """Megabytes of the layer a second."""
    clip, mountpoint = workload.scratch / "generated.clip", workload.scratch / "mnt"
    mountpoint.mkdir()
    with linked(workload, clip) as (link, source, blob):
        with clipfs.Index.open(clip) as index:
            size, big = index.layers[0].size, index.inode(index.resolve(BIG)).size

        def by_clipfs() -> float:
            forget()
            drop_caches()
            with clipfs.mount(clip, mountpoint, clipfs.MountOptions(source=source)):
                before, started = link.received, time.perf_counter()
                run("cp", mountpoint / BIG, "/dev/null")
                return (link.received - before) / 1e6 / (time.perf_counter() - started)

        def by_download() -> float:
            started = time.perf_counter()
            run("curl", "--silent", "--fail", "--output", "/dev/null", blob)
            return size / 1e6 / (time.perf_counter() - started)

        busy = _busy(link)
        samples = rounds(workload.size.large, "streaming", {CLIPFS: by_clipfs, DOWNLOAD: by_download})
        passed = link.received
        spent = _busy(link) - busy
    mountpoint.rmdir()
    row = Row("all of a large file, MB of the layer a second", "MB/s", samples, DOWNLOAD, "read over a link", _WHY)
    text = (
        f"`cp` of a file of {big / 1e6:,.0f} MB to `/dev/null` from a fresh mount with empty caches (the kernel's by "
        "`sync`, then 3 into `/proc/sys/vm/drop_caches`), over a link of "
        f"{number(FAST / 1e6)} MB/s and a round trip of {1000 * ROUND_TRIP:.0f} ms; beside curl, which downloads the "
        f"layer of {size / 1e6:,.0f} MB and throws it away. The link itself took {spent / passed * 1e8:.2f} s of a "
        f"core for every 100 MB. {workload.size.large} rounds."
    )
    return Section.of("Streaming over a link", text, [row], [as_fast(row, DOWNLOAD, 0.9, _WHY)])


@contextmanager
def linked(workload: Workload, clip: Path) -> Iterator[tuple[Link, str, str]]:
    """The generated image behind the fast link: the link, clipfs' name for the image, the URL of its layer."""
    with registry_of_its_own(workload.scratch) as registry:
        clipfs.build(registry.push(workload.generated, "generated:v1"), clip)
        with clipfs.Index.open(clip) as index:
            digest = index.layers[0].digest
        with slow_link(registry.host, FAST, ROUND_TRIP, workload.scratch) as link:
            host = f"127.0.0.1:{link.port}"
            yield link, f"docker://{host}/generated:v1", f"http://{host}/v2/generated/blobs/{digest}"


def _busy(link: Link) -> float:
    """Seconds of a core that the link has used."""
    return int(Path(f"/proc/{link.pid}/schedstat").read_text().split()[0]) / 1e9
