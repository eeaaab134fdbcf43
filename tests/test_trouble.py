"""Registries in trouble, request by request: what is asked again, where, and with which secrets.

What somebody who reads through a mount gets of it is in `test_faults`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import pytest
import trio

from clipfs.errors import AuthError, SourceError, UsageError
from clipfs.oci import Descriptor, Digest
from clipfs.sources import open_source, retry, transport, wire
from clipfs.sources.addresses import Surroundings
from tests.honest import BLOB, LAYER, alone, blobs, content, ranged, registry
from tests.web import Reply, Request, serving

__all__ = ["alone"]


def ranges(requests: list[Request]) -> list[tuple[int, int]]:
    return [each.range(BLOB.size) for each in requests if "/blobs/" in each.path]


class TestResuming:
    async def test_a_range_is_taken_up_where_it_broke(self) -> None:
        cuts = [100, 1, 50_000]

        def cut(request: Request) -> Reply | None:
            whole = ranged(request, LAYER)
            return Reply(whole.status, whole.body, whole.headers, cut=cuts.pop(0)) if cuts else None

        async with registry(blobs(cut)) as (source, web):
            assert await source.read_range(BLOB, 1000, 200_000) == LAYER[1000:200_000]
        assert ranges(web.requests) == [(1000, 200_000), (1100, 200_000), (1101, 200_000), (51_101, 200_000)]

    @pytest.mark.parametrize(("start", "end"), [(0, BLOB.size), (100, 5000)])
    async def test_what_is_all_here_is_not_asked_for_again(self, start: int, end: int) -> None:
        """The answer breaks where it should say that it ends."""

        def endless(request: Request) -> Reply:
            whole = ranged(request, LAYER)
            return Reply(
                whole.status, whole.body, {**whole.headers, "Transfer-Encoding": "chunked"}, cut=len(whole.body)
            )

        async with registry(blobs(endless)) as (source, web):
            assert await source.read_range(BLOB, start, end) == LAYER[start:end]
            assert b"".join([chunk async for chunk in source.stream(BLOB)]) == LAYER
        assert ranges(web.requests) == [(start, end), (0, BLOB.size)]

    async def test_a_range_that_only_ever_breaks_ends(self) -> None:
        def cut(request: Request) -> Reply:
            whole = ranged(request, LAYER)
            return Reply(whole.status, whole.body, whole.headers, cut=0)

        async with registry(blobs(cut)) as (source, web):
            with pytest.raises(SourceError, match="cannot get blob"):
                await source.read_range(BLOB, 0, 1000)
        assert len(ranges(web.requests)) == 4


class TestWholeBlobs:
    """Servers that send all of a blob whatever is asked for."""

    large = bytes(5 << 20)
    blob = Descriptor(BLOB.media_type, Digest.of(large), len(large))

    async def test_what_is_near_the_start_is_taken(self) -> None:
        async with registry(lambda _: Reply(200, self.large)) as (source, _):
            assert await source.read_range(self.blob, 4 << 20, (4 << 20) + 5) == bytes(5)

    async def test_what_is_far_from_it_is_not(self) -> None:
        async with registry(lambda _: Reply(200, self.large)) as (source, _):
            with pytest.raises(SourceError, match=r"answers no range requests.*skopeo copy"):
                await source.read_range(self.blob, (4 << 20) + 1, (4 << 20) + 5)

    async def test_one_server_of_many_is_forgiven(self) -> None:
        answers = [Reply(200, self.large)]
        async with registry(lambda request: answers.pop() if answers else ranged(request, self.large)) as (source, _):
            assert await source.read_range(self.blob, (4 << 20) + 1, (4 << 20) + 5) == bytes(4)


class TestExpiry:
    @pytest.mark.parametrize("status", [401, 403])
    async def test_a_token_that_expired(self, status: int) -> None:
        """Some registries say 403 to an expired token, and then no word of how to get a new one."""
        good = "token-1"
        given: list[str] = []

        def handle(request: Request) -> Reply:
            if request.path == "/token":
                given.append(f"token-{len(given) + 1}")
                return Reply(200, json.dumps({"token": given[-1]}).encode())
            used = request.headers.get("authorization", "")
            if used == f"Bearer {good}":
                return content(request)
            if used and status == 403:
                return Reply(403)
            return Reply(401, b"", {"WWW-Authenticate": f'Bearer realm="http://{request.headers["host"]}/token"'})

        async with registry(handle) as (source, _):
            assert await source.read_range(BLOB, 0, 5) == LAYER[:5]
            good = "token-2"
            assert await source.read_range(BLOB, 5, 9) == LAYER[5:9]
            good = "none"
            with pytest.raises(AuthError):
                await source.read_range(BLOB, 5, 9)
        assert given == ["token-1", "token-2", "token-3"]

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
    async def test_an_address_that_expired_before_it_was_used(self, status: int) -> None:
        refusals = [Reply(status, b"<Error/>")]

        def store(request: Request) -> Reply:
            return refusals.pop() if refusals else ranged(request, LAYER)

        async with serving(store) as storage:
            move = blobs(lambda _: Reply(307, b"", {"Location": f"{storage.url}/{len(storage.requests)}"}))
            async with registry(move) as (source, _):
                assert await source.read_range(BLOB, 0, 5) == LAYER[:5]
        assert [each.path for each in storage.requests] == ["/0", "/1"]

    async def test_an_address_that_expires_in_mid_body(self) -> None:
        used: set[str] = set()

        def store(request: Request) -> Reply:
            if request.target in used:
                return Reply(403)
            used.add(request.target)
            whole = ranged(request, LAYER)
            return Reply(whole.status, whole.body, whole.headers, cut=50_000 if len(used) < 3 else None)

        async with serving(store) as storage:
            move = blobs(lambda _: Reply(307, b"", {"Location": f"{storage.url}/layer?signature={len(used)}"}))
            async with registry(move) as (source, _):
                assert await source.read_range(BLOB, 7, 200_000) == LAYER[7:200_000]
        assert [each.range(BLOB.size)[0] for each in storage.requests] == [7, 50_007, 100_007]


class TestDistrust:
    async def test_the_next_attempt_takes_another_way(self) -> None:
        """Where the blob is is asked anew, over another connection, and past caches; other blobs are left alone."""
        async with serving(lambda request: ranged(request, LAYER)) as storage:
            move = blobs(lambda _: Reply(307, b"", {"Location": f"{storage.url}/layer"}))
            async with registry(move) as (source, web):
                for _ in range(2):
                    await source.read_range(BLOB, 0, 5)
                assert (len(ranges(web.requests)), storage.connections) == (1, 1)
                source.distrust(BLOB, 3)
                await source.read_range(BLOB, 0, 5)
                assert (len(ranges(web.requests)), storage.connections) == (2, 2)
                assert [each.headers.get("cache-control") for each in storage.requests] == [None, None, "no-cache"]

    async def test_requests_under_way_are_not_cut_off(self) -> None:
        arrived, go_on = trio.Event(), trio.Event()
        async with registry(content) as (source, web):
            await source.read_range(BLOB, 0, 5)

            async def slow(request: Request) -> None:
                arrived.set()
                await go_on.wait()

            web.before_answer = slow
            got: list[bytes] = []
            async with trio.open_nursery() as nursery:

                async def reader() -> None:
                    got.append(await source.read_range(BLOB, 5, 9))

                nursery.start_soon(reader)
                await arrived.wait()
                web.before_answer = None
                source.distrust(BLOB)
                assert await source.read_range(BLOB, 9, 12) == LAYER[9:12]
                go_on.set()
            assert got == [LAYER[5:9]]
            assert len([each for each in web.requests if each.range(BLOB.size) == (5, 9)]) == 1

    async def test_more_may_be_wrong_while_connections_are_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        close = wire.Connections.aclose

        async def close_and_distrust(connections: wire.Connections) -> None:
            source.distrust(BLOB)
            await close(connections)

        async with registry(content) as (source, _):
            await source.read_range(BLOB, 0, 5)
            source.distrust(BLOB)
            monkeypatch.setattr(wire.Connections, "aclose", close_and_distrust)
            assert await source.read_range(BLOB, 5, 9) == LAYER[5:9]

    async def test_what_never_came_is_nobodys_fault(self) -> None:
        async with registry(content) as (source, _):
            source.distrust(BLOB)
            await source.read_range(BLOB, 0, 5)
            source.distrust(BLOB, 5)
            source.distrust(Descriptor(BLOB.media_type, Digest.of(b""), 9), 0)


class TestHostile:
    @pytest.mark.parametrize(
        "location",
        ["http://169.254.169.254/latest/meta-data/", "http://[fe80::1]/", "http://[::ffff:169.254.169.254]/",
         "http://0.0.0.0:1/", "http://[fd00:ec2::254]/latest", "http://100.100.100.200/"],
    )  # fmt: skip
    async def test_redirects_to_where_nobody_has_any_business(self, location: str) -> None:
        async with registry(blobs(lambda _: Reply(307, b"", {"Location": location}))) as (source, web):
            with pytest.raises(SourceError, match="an address that is nobody's to lead to; refused"):
                await source.read_range(BLOB, 0, 5)
        assert len(ranges(web.requests)) == 1

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
    async def test_redirects_from_far_to_near(self, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The registry passes for one on the Internet; a name is judged by where it leads, before anything is sent."""

        def far(own: str) -> Surroundings:
            surroundings = Surroundings(own)
            surroundings.check(own, "8.8.8.8")
            return surroundings

        monkeypatch.setattr(transport, "Surroundings", far)
        async with serving(lambda request: ranged(request, LAYER)) as storage:
            place = f"http://{host}:{storage.host.partition(':')[2]}/layer"
            async with registry(blobs(lambda _: Reply(307, b"", {"Location": place}))) as (source, _):
                with pytest.raises(SourceError, match="nearer to this machine than the registry itself; refused"):
                    await source.read_range(BLOB, 0, 5)
            assert storage.requests == []

    async def test_a_token_server_where_nobody_has_any_business(self) -> None:
        challenge = 'Bearer realm="https://169.254.169.254/latest/api/token"'
        async with registry(lambda _: Reply(401, b"", {"WWW-Authenticate": challenge})) as (source, _):
            with pytest.raises(SourceError, match="nobody's to lead to"):
                await source.image()

    async def test_a_token_server_whose_name_is_for_terminals(self) -> None:
        challenge = f'Bearer realm="http://\x1bc{"x" * 50_000}/"'
        async with registry(lambda _: Reply(401, b"", {"WWW-Authenticate": challenge})) as (source, _):
            with pytest.raises(SourceError, match="without encryption; refused") as caught:
                await source.image()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000

    async def test_storage_is_not_believed_to_name_a_token_server(self) -> None:
        asked = []

        def tokens(request: Request) -> Reply:
            asked.append(request)
            return Reply(200, b'{"token": "t"}')

        async with serving(tokens) as other:
            challenge = {"WWW-Authenticate": f'Bearer realm="{other.url}/token"'}
            async with serving(lambda _: Reply(401, b"", challenge)) as storage:
                move = blobs(lambda _: Reply(307, b"", {"Location": f"{storage.url}/layer"}))
                async with registry(move) as (source, _):
                    with pytest.raises(SourceError, match="status 401"):
                        await source.read_range(BLOB, 0, 5)
        assert asked == []

    async def test_messages_of_strangers(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        words = "no https://x/y?sig=s3cret\n\x1b[2J for Bearer s3crets3crets3cret"
        said = {"errors": [{"message": words + "!" * 9999}]}
        async with registry(blobs(lambda _: Reply(500, json.dumps(said).encode()))) as (source, _):
            with pytest.raises(SourceError, match=r"status 500: 'no https://x/y\?") as caught:
                await source.read_range(BLOB, 0, 5)
        assert len(str(caught.value)) < 1000
        assert str(caught.value).isprintable()
        assert "s3cret" not in str(caught.value)
        assert "s3cret" not in caplog.text


class TestProxies:
    """`tests.web` as a proxy: it is asked for whole addresses, and to connect."""

    @pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
    async def test_a_registry_behind_one(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def proxy(request: Request) -> Reply:
            return Reply(502) if request.method == "CONNECT" else content(request)

        with trio.fail_after(10):
            async with serving(proxy) as web:
                monkeypatch.setenv(name, f"http://user:s3cret@{web.host}")
                async with open_source("registry.test/team/app:v1", insecure=True) as source:
                    await source.image()
                    assert await source.read_range(BLOB, 0, 5) == LAYER[:5]
        targets = [each.target for each in web.requests if each.method == "GET"]
        assert targets
        assert {target[: len("http://registry.test/v2/")] for target in targets} == {"http://registry.test/v2/"}
        assert {each.headers["proxy-authorization"] for each in web.requests} == {"Basic dXNlcjpzM2NyZXQ="}

    async def test_none_for_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
        async with registry(content) as (source, _):
            await source.image()

    @pytest.mark.parametrize("password", ["s3cret", "s3/cret", "s3#cret", "s3?cret", "s3@cret"])
    @pytest.mark.parametrize("host", ["a..b", "256.1.1.1"])
    async def test_one_that_is_none(self, host: str, password: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ALL_PROXY", f"http://user:{password}@{host}")
        async with open_source("registry.test/team/app:v1") as source:
            with pytest.raises(UsageError, match=f"names a proxy of no use: .*@{host}") as caught:
                await source.image()
        assert [part for part in ("s3", "cret", "user") if part in str(caught.value)] == []

    async def test_addresses_are_refused_there_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        move = blobs(lambda _: Reply(307, b"", {"Location": "http://169.254.169.254/"}))

        def proxy(request: Request) -> Reply:
            return Reply(502) if request.method == "CONNECT" else move(request)

        with trio.fail_after(10):
            async with serving(proxy) as web:
                monkeypatch.setenv("ALL_PROXY", web.url)
                async with open_source("registry.test/team/app:v1", insecure=True) as source:
                    with pytest.raises(SourceError, match="nobody's to lead to"):
                        await source.read_range(BLOB, 0, 5)
        assert not [each for each in web.requests if "169.254" in each.target]


@pytest.mark.parametrize(
    ("make", "least"),
    [(lambda: "0", 0.0), (lambda: "1", 1.0), (lambda: "nonsense", 0.0), (lambda: "-5", 0.0),
     (lambda: "99999999999999999999", 999_999_999.0), (lambda: "Fri, 31 Dec 9999 23:59:59 GMT", 1e9),
     (lambda: "Thu, 01 Jan 1970 00:00:00 GMT", 0.0), (lambda: "²", 0.0)],
)  # fmt: skip
def test_retry_after(make: Callable[[], str], least: float) -> None:
    import httpx2

    from clipfs.sources.answers import wish

    wished = wish(httpx2.Response(429, headers=[(b"Retry-After", make().encode("latin-1"))]))
    assert wished >= least
    assert least or wished == 0.0


def test_retry_after_by_the_clock_of_who_says_it() -> None:
    import httpx2

    from clipfs.sources.answers import wish

    told = {"Date": "Thu, 01 Jan 2060 00:00:00 GMT", "Retry-After": "Thu, 01 Jan 2060 00:00:03 GMT"}
    assert wish(httpx2.Response(503, headers=told)) == 3.0


async def test_a_busy_registry_is_left_alone_as_long_as_it_wants(autojump_clock: trio.testing.MockClock) -> None:
    """Up to a limit, and not beyond the deadline."""
    for wanted, total, waits in ((10.0, 90.0, True), (16.0, 90.0, False), (10.0, 9.0, False)):
        began = trio.current_time()
        turns = retry.Turns([retry.Server("x")], "blob", 0, retry.Deadlines(total))
        if waits:
            await turns.failed(retry.Transient("busy", wanted))
            assert trio.current_time() - began == pytest.approx(10)
        else:
            with pytest.raises(SourceError, match="busy"):
                await turns.failed(retry.Transient("busy", wanted))
            assert trio.current_time() == began
