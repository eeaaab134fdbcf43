"""The demo image in Debian's docker-registry: what a mount fetches of it, by its own count and by the registry's."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypedDict

import pytest

import clipfs
from tests.conftest import require_programs, require_root
from tests.judges import layers, write
from tests.oracle import differences, picture
from tests.registry import Registry

# Of all layers but the last: a few bytes, a whole large file, and from the middle of another.
READ = ("etc/passwd", "usr/bin/python3.11", "usr/lib/python3.11/os.py", "usr/bin/bash")

_BLOB = re.compile(r'"GET /v2/demo/app/blobs/(sha256:[0-9a-f]{64}) HTTP/1\.1" ([0-9]{3}) ([0-9]+) ')


pytest_plugins = ["tests.mount_fixtures"]
pytestmark = pytest.mark.usefixtures("near")


class Access(TypedDict):
    """What it takes to get in; nothing for a registry that is open to all."""

    ca: Path | None
    authfile: Path | None


class Remote(NamedTuple):
    """A registry that serves the demo image, and the index that was made of it there."""

    registry: Registry
    clip: Path

    @property
    def access(self) -> Access:
        return access(self.registry)

    def blobs(self) -> list[tuple[str, int, int]]:
        """(digest, status, bytes) of each answer to a request for a blob so far, but for those that ask who it is."""
        found = [_BLOB.search(line) for line in self.registry.settled()]
        return [(match[1], int(match[2]), int(match[3])) for match in found if match and match[2] != "401"]


def access(registry: Registry) -> Access:
    return Access(ca=registry.ca, authfile=registry.authfile() if registry.auth else None)


@pytest.fixture(scope="module", params=["plain HTTP", "TLS and a password"])
def remote(
    request: pytest.FixtureRequest, demo_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Remote]:
    require_root()
    require_programs("docker-registry", "skopeo", "openssl", "htpasswd")
    directory = tmp_path_factory.mktemp("remote")
    locked = request.param != "plain HTTP"
    with Registry(directory, auth=("user", "s3cret") if locked else None, tls=locked) as registry:
        name = registry.push(demo_image, "demo/app:v1")
        clipfs.build(name, directory / "demo.clip", **access(registry))
        yield Remote(registry, directory / "demo.clip")


def options(remote: Remote) -> clipfs.MountOptions:
    """Nothing from the disk, nothing of earlier mounts: what a read needs is fetched."""
    return clipfs.MountOptions(cache_size=0, prefetch="none", **remote.access)


def touched(index: clipfs.Index, paths: tuple[str, ...]) -> tuple[int, int]:
    """Compressed bytes of all spans that hold anything of these files: at least, and when each is fetched by itself.

    Spans of one stretch are decoded from the same place, so what lies before both is fetched once or twice.
    """
    spans = set[tuple[int, int, int]]()
    for path in paths:
        node = index.inode(index.resolve(path))
        for _, number, offset, length in index.extents(node.address, node.size):
            table = index.layers[number].spans
            for which in range(table.find(offset), table.find(offset + length - 1) + 1):
                spans.add((number, table[which].start, table[which].end))
    once, reached = 0, (-1, 0)
    for number, start, end in sorted(spans):
        begin = max(start, reached[1]) if number == reached[0] else start
        once += max(end - begin, 0)
        reached = max(reached, (number, end))
    return once, sum(end - start for _, start, end in spans)


def test_indexing_reads_each_layer_once(remote: Remote) -> None:
    with clipfs.Index.open(remote.clip) as index:
        whole = [(str(layer.digest), 200, layer.size) for layer in index.layers]
        assert index.source == f"docker://{remote.registry.host}/demo/app@{index.manifest.digest}"
        config = str(index.manifest.config.digest)
    # The first of all requests are those of the push and the index; skopeo asks for no blob's bytes.
    assert [answer for answer in remote.blobs() if answer[0] != config][: len(whole)] == whole


def test_a_mount_fetches_ranges(remote: Remote, demo_unpacked: Path, mountpoint: Path) -> None:
    with clipfs.Index.open(remote.clip) as index:
        (once, each), image = touched(index, READ), sum(layer.size for layer in index.layers)
        sizes = {str(layer.digest): layer.size for layer in index.layers}
    before = len(remote.blobs())
    with clipfs.mount(remote.clip, mountpoint, options(remote)) as mount:
        assert names(mountpoint) == names(demo_unpacked)
        assert remote.blobs()[before:] == []
        for path in READ:
            assert (mountpoint / path).read_bytes() == (demo_unpacked / path).read_bytes()
        mount.unmount()
        counted = mount.counters()
    answers = remote.blobs()[before:]
    # All that somebody waited for was needed; what came besides was announced by reading in order.
    assert once <= counted["bytes_fetched"] <= each + counted["bytes_ahead"]
    assert counted["bytes_fetched"] < image / 4
    assert len(answers) >= len(READ) - 1
    # What is still on its way when the mount ends is in the registry's books only.
    assert counted["bytes_fetched"] <= sum(size for _, _, size in answers) < image / 3
    assert {status for _, status, _ in answers} == {206}
    assert all(size < sizes[digest] / 2 for digest, _, size in answers)


def names(top: Path) -> list[str]:
    """Of all files and directories, with what a listing shows. It takes no bytes of any file."""
    found = {path.relative_to(top): path.lstat() for path in top.rglob("*")}
    return sorted(f"{path} {about.st_mode:o} {about.st_mtime_ns}" for path, about in found.items())


def test_everything_read_is_the_image(remote: Remote, demo_unpacked: Path, mountpoint: Path) -> None:
    """With a memory that holds all of it, hardly a byte of the layers is fetched twice."""
    with clipfs.Index.open(remote.clip) as index:
        image = sum(layer.size for layer in index.layers)
    settings = clipfs.MountOptions(cache=256 << 20, cache_size=0, prefetch="none", **remote.access)
    with clipfs.mount(remote.clip, mountpoint, settings) as mount:
        assert differences(picture(mountpoint), picture(demo_unpacked)) == []
        assert mount.counters()["bytes_fetched"] < image * 1.01


def test_an_index_outlives_its_tag(remote: Remote, demo_image: str, mountpoint: Path, tmp_path: Path) -> None:
    other = write(layers("kinds"), tmp_path / "oci")
    with clipfs.Index.open(remote.clip) as index:
        digest = index.manifest.digest
    remote.registry.push(other, "demo/app:v1")
    try:
        moved = tmp_path / "moved.clip"
        clipfs.build(f"docker://{remote.registry.host}/demo/app:v1", moved, **remote.access)
        with clipfs.Index.open(moved) as index:
            assert index.manifest.digest != digest
        with clipfs.mount(remote.clip, mountpoint, options(remote)):
            assert (mountpoint / "etc" / "passwd").read_bytes().startswith(b"root:")
    finally:
        remote.registry.push(demo_image, "demo/app:v1")


@pytest.mark.parametrize("remote", ["TLS and a password"], indirect=True)
def test_without_credentials_names_are_there_and_bytes_are_not(
    remote: Remote, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    log = tmp_path / "log"
    settings = clipfs.MountOptions(cache_size=0, prefetch="none", ca=remote.registry.ca, log=log)
    with clipfs.mount(remote.clip, mountpoint, settings):
        assert (mountpoint / "etc" / "passwd").stat().st_size > 100
        with pytest.raises(OSError, match=r"Input/output error") as caught:
            (mountpoint / "etc" / "passwd").read_bytes()
        assert caught.value.errno == errno.EIO
    assert "no credentials are known" in log.read_text()
