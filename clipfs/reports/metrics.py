"""The counters of a mount in Prometheus' format, served over HTTP by a thread of the process that serves the mount.

It reads what is counted anyway and touches nothing else, so that who asks can at worst keep his own thread waiting, and
others who ask.
"""

from __future__ import annotations

import logging
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector

from clipfs.errors import MountError
from clipfs.log import redacted

log = logging.getLogger(__name__)

# A client that says nothing for this long is let go.
_SECONDS = 5.0

# Connections at a time. Each takes a thread and a descriptor of the process that has to replace workers.
_AT_ONCE = 16

# What is one number: the counter, its name and its help.
_PLAIN = (
    ("bytes_served", "clipfs_served_bytes", "Bytes of file data that readers were given"),
    ("fetches", "clipfs_fetches", "Ranges fetched from the source"),
    ("spans_decoded", "clipfs_decoded_spans", "Spans decoded and verified"),
    ("bytes_decoded", "clipfs_decoded_bytes", "Bytes that spans were decoded to"),
    ("spans_refetched", "clipfs_refetched_spans", "Spans whose bytes were wrong and were asked for again"),
    ("retries", "clipfs_retries", "Attempts at the source that failed and were made again"),
    ("failures", "clipfs_failed_requests", "Requests that could not be answered"),
)


class _Counters(Collector):
    def __init__(self, read: Callable[[], Mapping[str, int]], image_bytes: int, labels: Mapping[str, str]) -> None:
        self._read, self._image_bytes, self._labels = read, image_bytes, labels

    def collect(self) -> Iterator[Metric]:
        counts = self._read()
        yield InfoMetricFamily("clipfs_mount", "What is mounted", {k: _label(v) for k, v in self._labels.items()})
        yield GaugeMetricFamily("clipfs_image_bytes", "Size of all layers, compressed", self._image_bytes)
        requests = CounterMetricFamily("clipfs_requests", "Requests by where the answer came from", labels=["tier"])
        waited = counts["disk_hits"] + counts["source_hits"]
        requests.add_metric(["memory"], counts["requests"] - waited)
        requests.add_metric(["disk"], counts["disk_hits"])
        requests.add_metric(["source"], counts["source_hits"])
        yield requests
        fetched = CounterMetricFamily(
            "clipfs_fetched_bytes", "Compressed bytes fetched, because somebody waits or ahead of that", labels=["why"]
        )
        fetched.add_metric(["read"], counts["bytes_fetched"] - counts["bytes_ahead"])
        fetched.add_metric(["ahead"], counts["bytes_ahead"])
        yield fetched
        for key, name, text in _PLAIN:
            yield CounterMetricFamily(name, text, counts[key])


def _label(value: str) -> str:
    """Paths are bytes, and the format is UTF-8."""
    return redacted(value).encode(errors="backslashreplace").decode()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, place: Any, handler: type[MetricsHandler]) -> None:
        self._room = threading.Semaphore(_AT_ONCE)
        super().__init__(place, handler)

    def verify_request(self, request: object, client_address: object) -> bool:  # noqa: ARG002  as the base has it
        """False where too many ask already: the connection is closed."""
        return self._room.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002  as the base has it
        """Who asked has left before the answer; that is his affair."""
        log.debug("metrics for %s: %s", client_address, sys.exc_info()[1])


@contextmanager
def served(
    address: str, read: Callable[[], Mapping[str, int]], image_bytes: int, labels: Mapping[str, str]
) -> Iterator[int]:
    """Serve what `read` returns at `address` (HOST:PORT, as `options.endpoint` has it) until the block ends.

    Yields the port, which is a free one if 0 was asked for. MountError if the address cannot be had.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Counters(read, image_bytes, labels))
    handler = type("_Handler", (MetricsHandler.factory(registry),), {"timeout": _SECONDS})
    host, _, port = address.rpartition(":")
    try:
        family, *_, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        kind = type("_FamilyServer", (_Server,), {"address_family": family})
        server = kind(place, handler)
    except OSError as error:
        raise MountError(f"cannot serve metrics at {address}: {error.strerror}") from None
    except UnicodeError:
        raise MountError(f"cannot serve metrics at {address}: {host} is no name of a host") from None
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="clipfs-metrics", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
