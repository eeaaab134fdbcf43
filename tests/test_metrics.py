"""Counters for Prometheus: over real HTTP, of a real mount, as its own parser reads them."""

from __future__ import annotations

import http.client
import os
import socket
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import clipfs
from clipfs.blocks.counters import NAMES
from clipfs.cli.main import main
from clipfs.errors import MountError, UsageError
from clipfs.mounting.options import endpoint
from clipfs.reports import metrics
from tests.conftest import require_root
from tests.mounts import BIG, SECONDS

pytest_plugins = ["tests.mount_fixtures"]
pytestmark = pytest.mark.usefixtures("near")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scraped(port: int, host: str = "127.0.0.1") -> Samples:
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        text = answer.read().decode()
    finally:
        connection.close()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def free_port() -> int:
    """A port that nobody listens on. The kernel gives ports out in no order, so nobody else is given this one soon."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        return port


def serving(**counts: int) -> AbstractContextManager[int]:
    counted = dict.fromkeys(NAMES, 0) | counts
    return metrics.served("127.0.0.1:0", lambda: counted, 1000, {"source": "https://h/x.clip?sig=secret"})


class TestServer:
    def test_every_counter(self) -> None:
        counts = {"requests": 10, "disk_hits": 3, "source_hits": 2, "bytes_fetched": 100, "bytes_ahead": 40}
        with serving(**counts, retries=4, failures=5) as port:
            samples = scraped(port)
        assert samples["clipfs_requests_total", (("tier", "memory"),)] == 5
        assert samples["clipfs_requests_total", (("tier", "disk"),)] == 3
        assert samples["clipfs_requests_total", (("tier", "source"),)] == 2
        assert samples["clipfs_fetched_bytes_total", (("why", "read"),)] == 60
        assert samples["clipfs_fetched_bytes_total", (("why", "ahead"),)] == 40
        assert samples["clipfs_image_bytes", ()] == 1000
        assert samples["clipfs_retries_total", ()] == 4
        assert samples["clipfs_failed_requests_total", ()] == 5
        assert all(name.startswith("clipfs_") for name, _ in samples)

    def test_no_secret_in_a_label(self) -> None:
        with serving() as port:
            assert ("clipfs_mount_info", (("source", "https://h/x.clip?[redacted]"),)) in scraped(port)

    def test_a_label_that_is_no_text(self) -> None:
        labels = {"mountpoint": 'a "b"\n\\' + os.fsdecode(b"\xff")}
        with metrics.served("127.0.0.1:0", lambda: dict.fromkeys(NAMES, 0), 0, labels) as port:
            assert ("clipfs_mount_info", (("mountpoint", 'a "b"\n\\\\udcff'),)) in scraped(port)

    def test_who_says_nothing_holds_up_nobody(self) -> None:
        with serving() as port, socket.create_connection(("127.0.0.1", port), SECONDS) as silent:
            silent.sendall(b"GET /metr")
            assert scraped(port)

    def test_nor_does_his_connection_last(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(metrics, "_SECONDS", 0.2)
        with serving() as port, socket.create_connection(("127.0.0.1", port), SECONDS) as silent:
            silent.sendall(b"GET /metr")
            assert silent.recv(1) == b""

    def test_no_more_at_a_time_than_a_few(self) -> None:
        """Or who asks takes the descriptors with which workers are replaced."""
        with serving() as port:
            with ExitStack() as stack:
                for _ in range(16):
                    asking = stack.enter_context(socket.create_connection(("127.0.0.1", port), SECONDS))
                    asking.sendall(b"GET /metr")
                # Sooner than those are let go.
                one_more = stack.enter_context(socket.create_connection(("127.0.0.1", port), metrics._SECONDS / 2))
                assert one_more.recv(1) == b""
            deadline = time.monotonic() + SECONDS
            while not self._answers(port) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert scraped(port)

    def _answers(self, port: int) -> bool:
        try:
            return bool(scraped(port))
        except (OSError, http.client.HTTPException):
            return False

    def test_it_ends(self) -> None:
        with serving() as port:
            pass
        with pytest.raises(ConnectionRefusedError):
            scraped(port)
        with metrics.served(f"127.0.0.1:{port}", lambda: dict.fromkeys(NAMES, 0), 0, {}) as again:
            assert again == port

    def test_a_taken_port(self) -> None:
        with serving() as port:
            second = metrics.served(f"127.0.0.1:{port}", dict, 0, {})
            with pytest.raises(MountError, match=f"at 127.0.0.1:{port}: Address already in use"), second:
                pass

    @pytest.mark.parametrize("host", ["192.0.2.1", "nonesuch.invalid", "a..b", "a" * 64])
    def test_no_address_of_ours(self, host: str) -> None:
        with (
            pytest.raises(MountError, match=f"cannot serve metrics at {host}:0: "),
            metrics.served(f"{host}:0", dict, 0, {}),
        ):
            pass

    def test_version_6(self) -> None:
        with metrics.served("[::1]:0", lambda: dict.fromkeys(NAMES, 0), 0, {}) as port:
            assert scraped(port, "::1")


@pytest.mark.parametrize(
    ("text", "address"),
    [("9464", "127.0.0.1:9464"), (":9464", "127.0.0.1:9464"), ("0.0.0.0:1", "0.0.0.0:1"), ("[::1]:1", "[::1]:1")],
)
def test_addresses(text: str, address: str) -> None:
    assert endpoint(text) == address


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "1:2x", "h:65536", "h:-1", "h:٣", pytest.param("1" * 5000, id="thousands of digits")]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="metrics are served at HOST:PORT"):
        endpoint(text)


@pytest.mark.usefixtures("runtime")
class TestMount:
    @pytest.fixture(autouse=True)
    def _root(self) -> None:
        require_root()

    @pytest.mark.parametrize("way", ["option", "-o"])
    def test_while_it_lives(self, way: str, clip: Path, mountpoint: Path) -> None:
        port = free_port()
        given = ["--metrics", str(port)] if way == "option" else ["-o", f"metrics={port}"]
        assert main(["mount", *given, str(clip), str(mountpoint)]) == 0
        try:
            before = scraped(port)
            assert (mountpoint / "big").read_bytes() == BIG
            after = scraped(port)
        finally:
            assert main(["umount", str(mountpoint)]) == 0
        assert before["clipfs_served_bytes_total", ()] == 0
        assert after["clipfs_served_bytes_total", ()] >= len(BIG)
        with clipfs.Index.open(clip) as index:
            assert after["clipfs_image_bytes", ()] == sum(layer.size for layer in index.layers)
        with pytest.raises(ConnectionRefusedError):
            scraped(port)

    def test_a_taken_port_is_one_sentence(
        self, clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert main(["mount", "--metrics", str(port), str(clip), str(mountpoint)]) == 32
        said = capsys.readouterr().err
        assert said == f"clipfs: cannot serve metrics at 127.0.0.1:{port}: Address already in use\n"
        assert list(mountpoint.iterdir()) == []
