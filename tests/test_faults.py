"""The fault table: what a registry can do wrong, and what somebody who reads through a real mount gets of it.

Whatever happens, it is the right bytes, or EIO before the deadline and the right bytes once the fault is over. Each row
of the table has a layer of its own, which a checking reader reads four times over: the fault strikes once or goes on,
and it strikes with the first byte or in the middle of the range.
"""

from __future__ import annotations

import errno
import itertools
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

import clipfs
from tests.conftest import require_programs, require_root
from tests.faults import FAULTS, SECRETS, FaultProxy
from tests.images import LayoutBuilder, Tar
from tests.registry import Registry

pytest_plugins = ["tests.mount_fixtures"]

# How long clipfs may take for a read, in seconds. The kernel asks twice before it gives up, once for reading ahead and
# once for the reader; what is added is for a busy machine.
TIMEOUT = 2.0
LATEST = 2 * TIMEOUT + 3

BYTES, EIO = "bytes", "EIO"

# fault: (what comes of it if it strikes once, what if it goes on)
TABLE = {
    "refused: 401, the token expired": (BYTES, EIO),
    "refused: 401, tokens are where clouds keep credentials": (BYTES, EIO),
    "refused: 403, the token expired": (BYTES, EIO),
    "not found: 404": (BYTES, EIO),
    "busy: 408": (BYTES, EIO),
    "busy: 429, back in a second": (BYTES, EIO),
    "busy: 429, back at a time of day": (BYTES, EIO),
    "busy: 429, back in an hour": (BYTES, EIO),
    "broken: 500": (BYTES, EIO),
    "broken: 502": (BYTES, EIO),
    "broken: 503, with nonsense": (BYTES, EIO),
    "broken: 504": (BYTES, EIO),
    "the connection is reset": (BYTES, EIO),
    "the connection ends": (BYTES, EIO),
    "silence": (BYTES, EIO),
    "silence before the head": (BYTES, EIO),
    "a byte now and then": (BYTES, EIO),
    "a head that comes byte by byte": (BYTES, EIO),
    "wrong bytes": (BYTES, EIO),
    "bytes without end": (BYTES, EIO),
    "fewer bytes, and says so": (BYTES, EIO),
    "another range": (BYTES, EIO),
    "no range: 200": (BYTES, BYTES),  # the layers are small; see test_registry for large ones
    "no range: 416": (BYTES, EIO),
    "several parts": (BYTES, EIO),
    "an encoding": (BYTES, EIO),
    "a head of 200 KB": (BYTES, EIO),
    "a head of 20,000 lines": (BYTES, EIO),
    "no HTTP": (BYTES, EIO),
    "a signed address that expired": (BYTES, EIO),
    "a redirect without end": (BYTES, EIO),
    "a redirect to where clouds keep credentials": (BYTES, EIO),
    "a redirect to another protocol": (BYTES, EIO),
    "a redirect to nobody": (BYTES, EIO),
}


class Row(NamedTuple):
    fault: str
    middle: bool
    lasting: bool

    @property
    def expected(self) -> str:
        return TABLE[self.fault][self.lasting]

    def __str__(self) -> str:
        return f"{self.fault}, {'mid-span' if self.middle else 'first byte'}, {'lasting' if self.lasting else 'once'}"


ROWS = [Row(*each) for each in itertools.product(TABLE, (False, True), (False, True))]


class Outcome(NamedTuple):
    """What came of a read, after how long, and what came of the next one, when the fault was over."""

    got: str
    seconds: float
    struck: bool
    afterwards: str


class Remote(NamedTuple):
    """An image with a layer a row; each has a file of its row's number."""

    registry: Registry
    name: str
    clip: Path
    digests: list[str]
    proxy: FaultProxy


def content(number: int) -> bytes:
    return random.Random(number).randbytes(150_000)


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    require_root()
    require_programs("docker-registry", "skopeo")
    directory = tmp_path_factory.mktemp("faults")
    image = LayoutBuilder(directory / "oci")
    (directory / "oci").mkdir()
    for number in range(len(ROWS)):
        # Padding makes a first span that nobody reads, so that the second one is a range.
        tar = Tar().member(f"padding/{number}", bytes(4 << 20)).member(str(number), content(number))
        image.layer(tar, "zstd-frames")
    with Registry(directory) as registry, FaultProxy("") as proxy:
        registry.push(image.config().write(), "team/app:v1")
        proxy.upstream = registry.host
        name = f"docker://{proxy.host}/team/app:v1"
        clipfs.build(name, directory / "image.clip")
        with clipfs.Index.open(directory / "image.clip") as index:
            digests = [str(layer.digest) for layer in index.layers]
        yield Remote(registry, name, directory / "image.clip", digests, proxy)


def read(path: Path, number: int) -> str:
    """What a reader gets: the right bytes, an error by its name, or wrong bytes."""
    try:
        return BYTES if path.read_bytes() == content(number) else "wrong bytes"
    except OSError as error:
        return errno.errorcode[error.errno or 0]


class Mounted(NamedTuple):
    outcomes: dict[Row, Outcome]
    log: str


@pytest.fixture(scope="module")
def mounted(remote: Remote, tmp_path_factory: pytest.TempPathFactory) -> Mounted:
    """All rows through one mount, several at a time: what one reader suffers is nothing to the others."""
    directory = tmp_path_factory.mktemp("mounted")
    mountpoint = directory / "mnt"
    mountpoint.mkdir()

    def outcome(number: int) -> Outcome:
        row, digest, path = ROWS[number], remote.digests[number], mountpoint / str(number)
        remote.proxy.strike(digest, FAULTS[row.fault], middle=row.middle, times=float("inf") if row.lasting else 1)
        began = time.monotonic()
        got = read(path, number)
        seconds, struck = time.monotonic() - began, remote.proxy.struck(digest)
        remote.proxy.calm(digest)
        return Outcome(got, seconds, struck, read(path, number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPFS_TIMEOUT", str(TIMEOUT))
        # The kernel view asks for each page that it could not read ahead: as often as many deadlines.
        options = clipfs.MountOptions(cache_size=0, prefetch="none", log=directory / "log", view="fuse")
        with clipfs.mount(remote.clip, mountpoint, options), ThreadPoolExecutor(8) as pool:
            outcomes = dict(zip(ROWS, pool.map(outcome, range(len(ROWS))), strict=True))
    return Mounted(outcomes, (directory / "log").read_text())


def test_the_table_is_whole() -> None:
    assert list(TABLE) == list(FAULTS)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_fault(row: Row, mounted: Mounted) -> None:
    outcome = mounted.outcomes[row]
    assert (outcome.got, outcome.afterwards) == (row.expected, BYTES)
    assert outcome.seconds < LATEST
    assert outcome.struck


def test_faults_during_prefetch(remote: Remote, mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault once, in each place, while all of the image is fetched at low priority and read at the same time."""
    monkeypatch.setenv("CLIPFS_TIMEOUT", str(TIMEOUT))
    numbers = [number for number, row in enumerate(ROWS) if not row.lasting]
    for number in numbers:
        remote.proxy.strike(remote.digests[number], FAULTS[ROWS[number].fault], middle=ROWS[number].middle)
    options = clipfs.MountOptions(cache_size=0, prefetch="all")
    with clipfs.mount(remote.clip, mountpoint, options), ThreadPoolExecutor(4) as pool:
        got = pool.map(lambda number: read(mountpoint / str(number), number), numbers)
        assert {ROWS[number]: each for number, each in zip(numbers, got, strict=True) if each != BYTES} == {}
    assert [ROWS[number] for number in numbers if not remote.proxy.struck(remote.digests[number])] == []


def test_a_registry_that_is_down_when_the_mount_starts(
    remote: Remote, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPFS_TIMEOUT", str(TIMEOUT))
    remote.proxy.down()
    try:
        with clipfs.mount(remote.clip, mountpoint, clipfs.MountOptions(cache_size=0, prefetch="none", view="fuse")):
            assert len(list(mountpoint.iterdir())) == len(ROWS) + 1
            began = time.monotonic()
            assert read(mountpoint / "0", 0) == EIO
            assert time.monotonic() - began < LATEST
            remote.proxy.up()
            assert read(mountpoint / "0", 0) == BYTES
            remote.proxy.down()
            assert (read(mountpoint / "0", 0), read(mountpoint / "1", 1)) == (BYTES, EIO)
            remote.proxy.up()
            assert read(mountpoint / "1", 1) == BYTES
    finally:
        remote.proxy.down()
        remote.proxy.up()


def test_what_a_mirror_sends_wrong_comes_from_the_registry(
    remote: Remote, tmp_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(remote.registry.host) as mirror:
        config = tmp_path / "registries.conf"
        config.write_text(f'''[[registry]]
            location = "{remote.proxy.host}"
            [[registry.mirror]]
            location = "{mirror.host}"''')
        monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(config))
        bad, gone, good = 0, 1, 2
        mirror.strike(remote.digests[bad], FAULTS["wrong bytes"], middle=True, times=float("inf"))
        remote.proxy.asked.clear()
        with clipfs.mount(remote.clip, mountpoint, clipfs.MountOptions(cache_size=0, prefetch="none", view="fuse")):
            assert read(mountpoint / str(good), good) == BYTES
            assert mirror.asked == {remote.digests[good]: 1}
            assert not remote.proxy.asked
            assert read(mountpoint / str(bad), bad) == BYTES
            # Asked once, and not again for anything while there is somebody better.
            mirror.strike(remote.digests[gone], FAULTS["silence"], times=float("inf"))
            assert read(mountpoint / str(gone), gone) == BYTES
        assert mirror.asked == {remote.digests[good]: 1, remote.digests[bad]: 1}
        assert remote.proxy.asked == {remote.digests[bad]: 1, remote.digests[gone]: 1}


def test_the_log_keeps_secrets(mounted: Mounted) -> None:
    assert "cannot get blob sha256:" in mounted.log
    assert not [secret for secret in SECRETS if secret in mounted.log]


def test_faults_that_strike_what_is_fetched_ahead(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fault at once, and none that ends by itself; nobody has asked. Who reads afterwards notices nothing."""
    monkeypatch.setenv("CLIPFS_CACHE", str(tmp_path / "cache"))
    mountpoint, rows = tmp_path / "mnt", [number for number, row in enumerate(ROWS) if row.lasting and not row.middle]
    mountpoint.mkdir()
    for number in rows:
        remote.proxy.strike(remote.digests[number], FAULTS[ROWS[number].fault], times=float("inf"))
    options = clipfs.MountOptions(prefetch="all", timeout=TIMEOUT)
    with clipfs.mount(remote.clip, mountpoint, options):
        assert remote.proxy.await_strikes(60)
        for number in rows:
            remote.proxy.calm(remote.digests[number])
        with ThreadPoolExecutor(8) as pool:
            began = time.monotonic()
            assert list(pool.map(lambda number: read(mountpoint / str(number), number), rows)) == [BYTES] * len(rows)
            assert time.monotonic() - began < 3 * LATEST
