"""Rules that need no server: where a registry may lead, which proxy is used, what is hidden, how long is waited."""

from __future__ import annotations

import logging

import pytest

from clipfs.errors import SourceError, UsageError
from clipfs.sources.addresses import Reach, Surroundings, reach
from clipfs.sources.proxies import proxy_for
from clipfs.sources.redact import redacted, watch_client_logs
from clipfs.sources.retry import Deadlines, Transient


class TestAddresses:
    @pytest.mark.parametrize(
        ("address", "expected"),
        [
            ("8.8.8.8", Reach.WORLD), ("2606:4700::1111", Reach.WORLD), ("[2606:4700::1111]", Reach.WORLD),
            ("10.1.2.3", Reach.SITE), ("172.16.0.1", Reach.SITE), ("192.168.1.1", Reach.SITE), ("fd12::1", Reach.SITE),
            ("100.64.0.1", Reach.SITE), ("127.0.0.1", Reach.MACHINE), ("127.8.9.1", Reach.MACHINE),
            ("::1", Reach.MACHINE), ("169.254.169.254", Reach.NEVER), ("fe80::1", Reach.NEVER),
            ("fe80::1%eth0", Reach.NEVER), ("0.0.0.0", Reach.NEVER), ("::", Reach.NEVER), ("224.0.0.1", Reach.NEVER),
            ("fd00:ec2::254", Reach.NEVER), ("100.100.100.200", Reach.NEVER),
            # IPv4 in IPv6's clothing.
            ("::ffff:169.254.169.254", Reach.NEVER), ("::ffff:10.0.0.1", Reach.SITE),
            ("::ffff:127.0.0.1", Reach.MACHINE), ("64:ff9b::a9fe:a9fe", Reach.NEVER), ("2002:7f00:1::", Reach.MACHINE),
            ("example.com", None), ("", None), ("1.2.3", None),
        ],
    )  # fmt: skip
    def test_reach(self, address: str, expected: Reach | None) -> None:
        assert reach(address) == expected

    @pytest.mark.parametrize(
        ("registry", "target", "allowed"),
        [
            ("8.8.8.8", "1.1.1.1", True), ("8.8.8.8", "10.0.0.1", False), ("8.8.8.8", "127.0.0.1", False),
            ("8.8.8.8", "169.254.169.254", False), ("10.0.0.1", "1.1.1.1", True), ("10.0.0.1", "192.168.0.9", True),
            ("10.0.0.1", "127.0.0.1", False), ("10.0.0.1", "169.254.169.254", False), ("127.0.0.1", "127.0.0.1", True),
            ("127.0.0.1", "10.0.0.1", True), ("127.0.0.1", "169.254.169.254", False),
            ("127.0.0.1", "fd00:ec2::254", False),
        ],
    )  # fmt: skip
    def test_nothing_nearer_than_the_registry(self, registry: str, target: str, allowed: bool) -> None:
        for named in (False, True):
            surroundings = Surroundings("registry.example" if named else registry)
            surroundings.check("registry.example" if named else registry, registry)
            for host in (target, "storage.example"):
                if allowed:
                    surroundings.check(host, target)
                else:
                    with pytest.raises(SourceError, match=r"leads to .*; refused"):
                        surroundings.check(host, target)

    def test_the_farthest_address_of_a_registry_counts(self) -> None:
        surroundings = Surroundings("registry.example")
        surroundings.check("registry.example", "8.8.8.8")
        surroundings.check("Registry.Example", "10.0.0.1")
        with pytest.raises(SourceError, match=r"storage\.example \(10\.0\.0\.2\), an address that is nearer"):
            surroundings.check("storage.example", "10.0.0.2")

    def test_a_registry_never_seen_counts_as_far(self) -> None:
        with pytest.raises(SourceError, match="refused"):
            Surroundings("behind.a.proxy").check("10.0.0.2", "10.0.0.2")


BOTH = {"http_proxy": "http://plain:1", "https_proxy": "http://tls:2"}


@pytest.mark.parametrize(
    ("scheme", "host", "port", "environment", "expected"),
    [
        ("http", "a.example", 80, {}, None),
        ("http", "a.example", 80, BOTH, "http://plain:1"),
        ("https", "a.example", 443, BOTH, "http://tls:2"),
        ("https", "a.example", 443, {"HTTPS_PROXY": "tls:2"}, "http://tls:2"),
        ("https", "a.example", 443, {"HTTPS_PROXY": "x", "https_proxy": "y"}, "http://y"),
        ("https", "a.example", 443, {"HTTP_PROXY": "x"}, None),
        ("https", "a.example", 443, {"ALL_PROXY": "https://all"}, "https://all"),
        # This machine.
        *[("http", host, 80, BOTH, None) for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1")],
        # NO_PROXY: name, name and below, below only, wildcard, port, address, network, everything.
        *[("http", "a.example", 80, {**BOTH, "no_proxy": no}, None) for no in
          ("a.example", "example", "x, a.example ,y", ".example", "*.example", "a.example:80", "A.Example", "*")],
        *[("http", "a.example", 80, {**BOTH, "NO_PROXY": no}, "http://plain:1") for no in
          ("b.example", ".a.example", "ample", "a.example:81", "", ",", "10.0.0.0/8")],
        *[("http", "10.1.2.3", 80, {**BOTH, "no_proxy": no}, None) for no in
          ("10.1.2.3", "10.0.0.0/8", "10.1.2.3:80", "10.1.2.3/32")],
        *[("http", "10.1.2.3", 80, {**BOTH, "no_proxy": no}, "http://plain:1") for no in
          ("10.1.2.4", "11.0.0.0/8", "10.1.2.3:81", "fd00::/8")],
        *[("http", "fd00::1", 80, {**BOTH, "no_proxy": no}, None) for no in ("fd00::/8", "[fd00::1]", "[fd00::1]:80")],
    ],
)  # fmt: skip
def test_proxies(scheme: str, host: str, port: int, environment: dict[str, str], expected: str | None) -> None:
    assert proxy_for(scheme, host, port, environment) == expected


def test_a_proxy_of_another_kind() -> None:
    with pytest.raises(UsageError, match="speaks to http:// and https:// ones") as caught:
        proxy_for("http", "a.example", 80, {"http_proxy": "socks5://user:s3cret@proxy"})
    assert "s3cret" not in str(caught.value)


SECRETIVE = [
    "GET https://storage/layer?X-Amz-Signature=s3cret&X-Amz-Date=1 failed",
    "Location: https://user:s3cret@storage/layer",
    "/layer?sig=s3cret%3D",
    "Illegal header value b'Bearer s3cret.s3cret.s3cret'",
    "Authorization: Basic dXNlcjpzM2NyZXQ=s3cret",
    '{"token": "s3cret", "access_token":"s3cret"}',
    "password=s3cret",
    "(b'Location', b'https://storage/layer?token=s3cret')",
]


@pytest.mark.parametrize("text", SECRETIVE)
def test_secrets_are_taken_out(text: str) -> None:
    assert "s3cret" not in redacted(text)
    assert "s3cret" not in str(Transient(text))


@pytest.mark.parametrize(
    "text",
    ["ConnectError: [Errno 111] Connection refused", "is it there? perhaps", "blob sha256:abcdef of registry:5000"],
)
def test_the_rest_stays(text: str) -> None:
    assert redacted(text) == text


def test_what_strangers_say_is_short_and_printable() -> None:
    assert len(redacted("x" * 100_000)) < 1000
    assert redacted("a\n\x1b[2Jb\0") == "a  [2Jb "


def test_the_logs_of_the_http_client(caplog: pytest.LogCaptureFixture) -> None:
    watch_client_logs()
    watch_client_logs()
    caplog.set_level(logging.DEBUG)
    for name in ("httpx2", "httpcore2.http11", "httpcore2.proxy", "httpcore2.connection"):
        logging.getLogger(name).debug("%s", SECRETIVE[0])
    assert len(caplog.records) == 4
    assert "s3cret" not in caplog.text


class TestDeadlines:
    def test_parts(self) -> None:
        usual, short = Deadlines(), Deadlines(9.0)
        assert (usual.total, usual.attempt_for(0), usual.silence, usual.connect) == (90, 30, 20, 10)
        assert (usual.helper, short.helper) == (15, 1.5)
        assert (short.total_for(0), short.attempt_for(0), short.silence, short.connect) == (9, 3, 2, 1)
        # 1 MiB more takes 8 s on a line of 1 Mbit/s, and a tenth of it when all is ten times as fast.
        assert usual.total_for(1 << 20) == 98
        assert usual.attempt_for(1 << 20) == 38
        assert short.attempt_for(1 << 20) == pytest.approx(3.8)

    def test_what_is_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CLIPFS_TIMEOUT", raising=False)
        assert Deadlines.chosen(None) == Deadlines(90)
        monkeypatch.setenv("CLIPFS_TIMEOUT", "2.5")
        assert Deadlines.chosen(None) == Deadlines(2.5)
        assert Deadlines.chosen(7) == Deadlines(7)

    @pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e9", "soon"])
    def test_what_is_no_deadline(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CLIPFS_TIMEOUT", text)
        with pytest.raises(UsageError, match="CLIPFS_TIMEOUT is the number of seconds"):
            Deadlines.chosen(None)
