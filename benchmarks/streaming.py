"""Reading all of a large file over a link, beside a plain download of the layer that it is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import clipfs
from benchmarks.goals import as_fast
from benchmarks.link import Link, slow_link
from benchmarks.measure import CLIPFS, Row, Section, number, rounds, seconds
from benchmarks.programs import drop_caches, forget, run
from benchmarks.remote import FAST, ROUND_TRIP, USUAL, registry_of_its_own
from benchmarks.workload import BIG, Workload

DOWNLOAD = "plain download of the layer"
PIPES = "the same work in pipes"

# What clipfs does with a layer, by programs of C: downloaded, decompressed, hashed, read by somebody, and kept on disk,
# compressed at the level at which the disk cache is.
_PIPES = """\
set -o pipefail
curl --silent --fail "$1" | igzip -dc | tee >(openssl dgst -sha256 >"$2.sum") >(cat >/dev/null) | zstd -1 -qf -o "$2"
"""

_WHY = "The threads that decode and that write the disk cache wait for their turn in the interpreter that serves reads."


def streaming(workload: Workload) -> Section:
    """Megabytes of the layer a second, over each link."""
    rows, links = [], []
    for speed in (USUAL, FAST):
        row, link_seconds = _over(workload, speed)
        rows.append(row)
        links.append(f"{link_seconds:.2f} s at {number(speed / 1e6)} MB/s")
    text = (
        f"`cp` of a file of {workload.size.big / 1e6:,.0f} MB to `/dev/null` from a fresh mount with empty caches (the "
        "kernel's by `sync`, then 3 into `/proc/sys/vm/drop_caches`), over links with a round trip of "
        f"{1000 * ROUND_TRIP:.0f} ms; beside curl, which downloads the whole layer and throws it away. *In pipes*, "
        "programs of C do with that download what clipfs does, and leave a file on the disk: "
        "`curl | igzip | tee >(openssl sha256) >(cat) | zstd -1`. Of clipfs only those bytes count that the file is "
        "in, and no others that it may have fetched. For every 100 MB the link "
        f"itself took so much of a core: {', '.join(links)}. {workload.size.large} rounds."
    )
    outcomes = [as_fast(row, DOWNLOAD, 0.9, _WHY) for row in rows]
    return Section.of("Streaming over a link", text, rows, outcomes)


def _over(workload: Workload, speed: float) -> tuple[Row, float]:
    """Over one link; and the seconds of a core that it took for every 100 MB."""
    clip, mountpoint = workload.scratch / f"generated-{speed:.0f}.clip", workload.scratch / "mnt"
    mountpoint.mkdir()
    with linked(workload, clip, speed) as (link, source, blob):
        with clipfs.Index.open(clip) as index:
            size, needed = index.layers[0].size, _needed(index)

        def by_clipfs() -> float:
            forget()
            drop_caches()
            with clipfs.mount(clip, mountpoint, clipfs.MountOptions(source=source)):
                return needed / 1e6 / seconds(lambda: run("cp", mountpoint / BIG, "/dev/null"))

        def by_download() -> float:
            drop_caches()  # of the registry, too, which has to read what it sends
            return size / 1e6 / seconds(lambda: run("curl", "--silent", "--fail", "--output", "/dev/null", blob))

        def by_pipes() -> float:
            drop_caches()
            kept = workload.scratch / "piped"
            took = seconds(lambda: run("bash", "-c", _PIPES, "bash", blob, kept))
            kept.unlink()
            return size / 1e6 / took

        busy = _busy(link)
        what = f"all of a large file, link of {number(speed / 1e6)} MB/s"
        samples = rounds(workload.size.large, what, {CLIPFS: by_clipfs, DOWNLOAD: by_download, PIPES: by_pipes})
        link_seconds = (_busy(link) - busy) / link.received * 1e8
    mountpoint.rmdir()
    return Row(what, "MB of the layer/s", samples, DOWNLOAD, "read over a link", _WHY), link_seconds


def _needed(index: clipfs.Index) -> int:
    """Bytes of the layer that the file is in. What else came over the link, or came twice, is no merit."""
    node = index.inode(index.resolve(BIG))
    [(_, layer, offset, length)] = index.extents(node.address, node.size)
    spans = index.layers[layer].spans
    first, last = (spans[spans.find(at)] for at in (offset, offset + length - 1))
    return last.end - first.start


@contextmanager
def linked(workload: Workload, clip: Path, speed: float) -> Iterator[tuple[Link, str, str]]:
    """The generated image behind a link: the link, clipfs' name for the image, the URL of its layer."""
    with registry_of_its_own(workload.scratch) as registry:
        clipfs.build(registry.push(workload.generated, "generated:v1"), clip)
        with clipfs.Index.open(clip) as index:
            digest = index.layers[0].digest
        with slow_link(registry.host, speed, ROUND_TRIP, workload.scratch) as link:
            host = f"127.0.0.1:{link.port}"
            yield link, f"docker://{host}/generated:v1", f"http://{host}/v2/generated/blobs/{digest}"


def _busy(link: Link) -> float:
    """Seconds of a core that the link has used."""
    return int(Path(f"/proc/{link.pid}/schedstat").read_text().split()[0]) / 1e9
