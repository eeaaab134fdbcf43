"""Registries: Debian's real one, and servers that do what no honest one does."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import trio

from clipfs.errors import AuthError, ImageError, IntegrityError, SourceError, UsageError
from clipfs.oci import Descriptor, Digest
from clipfs.sources import open_source, retry, transport
from clipfs.sources.auth import Answer, Authorizer, parse_challenges
from tests.honest import BLOB, CONFIG, LAYER, MANIFEST, alone, blobs, content, log_in, ranged, registry
from tests.images import LayoutBuilder
from tests.registry import Registry, make_certificate
from tests.web import Handler, Reply, Request, Web, serving

__all__ = ["alone"]


@pytest.fixture(scope="module")
def unlocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("unlocked")) as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("locked"), auth=("user", "s3cret"), tls=True) as running:
        yield running


class TestReal:
    """docker-registry, open over plain HTTP and locked behind TLS and a password."""

    @pytest.fixture(params=["unlocked", "locked"])
    def real(self, request: pytest.FixtureRequest, unlocked: Registry, locked: Registry) -> Registry:
        return {"unlocked": unlocked, "locked": locked}[str(request.param)]

    async def test_an_image(self, real: Registry, tmp_path: Path) -> None:
        local = LayoutBuilder(tmp_path / "layout").layer(LAYER).layer(LAYER, "none").config(env=["A=1"]).write("v1")
        name = await trio.to_thread.run_sync(real.push, local, "team/app:v1")
        async with open_source(name, **access(real)) as source, open_source(local) as there:
            image, expected = await source.image(), await there.image()
            assert (image.manifest, image.config) == (expected.manifest, expected.config)
            for blob in image.manifest.layers:
                whole = await there.read_range(blob, 0, blob.size)
                assert await source.read_range(blob, 0, blob.size) == whole
                assert await source.read_range(blob, 7, 1000) == whole[7:1000]
                sunk: list[bytes] = []
                await source.read_into(blob, 7, 1000, sunk.append)
                assert b"".join(sunk) == whole[7:1000]
                assert await source.read_range(blob, blob.size - 1, blob.size) == whole[-1:]
                assert b"".join([chunk async for chunk in source.stream(blob)]) == whole
                assert source.local(blob) is None
        async with open_source(image.name, **access(real)) as pinned:
            assert (await pinned.image()).manifest.digest == image.manifest.digest
            assert pinned.name == image.name == f"docker://{real.host}/team/app@{image.manifest.digest}"

    async def test_what_is_not_there(self, real: Registry) -> None:
        async with open_source(f"{real.host}/no/thing:v9", **access(real)) as source:
            with pytest.raises(SourceError, match="has no image no/thing:v9: 'manifest unknown'"):
                await source.image()
            with pytest.raises(SourceError, match="has no blob sha256:"):
                await source.read_range(BLOB, 0, 10)

    async def test_strangers(self, locked: Registry) -> None:
        async with open_source(f"{locked.host}/team/app:v1", ca=locked.ca) as source:
            with pytest.raises(AuthError, match=r"no credentials are known\. Log in with `skopeo login 127"):
                await source.image()

    async def test_a_wrong_password(self, locked: Registry, tmp_path: Path) -> None:
        log_in(tmp_path, locked.host, password="wr0ng")
        async with open_source(f"{locked.host}/team/app:v1", ca=locked.ca) as source:
            with pytest.raises(AuthError, match=r"user user .* the credentials were refused") as caught:
                await source.image()
        assert "wr0ng" not in str(caught.value)

    async def test_certificates(self, locked: Registry) -> None:
        name, authfile = f"{locked.host}/no/thing:v9", locked.authfile()
        async with open_source(name, authfile=authfile) as source:
            with pytest.raises(SourceError, match="cannot be trusted: self-signed certificate; name the CA"):
                await source.image()
        async with open_source(name, authfile=authfile, insecure=True) as source:
            with pytest.raises(SourceError, match="has no image"):
                await source.image()
        async with open_source(name, ca=Path("/nothing")) as source:
            with pytest.raises(UsageError, match="cannot read certificates from /nothing"):
                await source.image()


def access(real: Registry) -> dict[str, Any]:
    """What `open_source` needs for a registry."""
    return {"ca": real.ca, "authfile": real.authfile() if real.auth else None}


def token_server(user: str | None = None) -> Handler:
    """Gives out token-1, token-2 …; to `user` with the password s3cret only, if there is one."""
    issued = 0

    def handle(request: Request) -> Reply:
        nonlocal issued
        if user is not None:
            expected = "Basic " + base64.b64encode(f"{user}:s3cret".encode()).decode()
            if request.headers.get("authorization") != expected:
                return Reply(401)
        issued += 1
        return Reply(200, json.dumps({"token": f"token-{issued}"}).encode())

    return handle


def wants_token(tokens: Web, good: set[str]) -> Handler:
    """A registry that wants one of the `good` tokens of the server `tokens`; honest with them."""
    challenge = f'Bearer realm="{tokens.url}/token?account=x",service="the, registry",scope="ignored"'

    def handle(request: Request) -> Reply:
        if request.headers.get("authorization", "").removeprefix("Bearer ") in good:
            return content(request)
        return Reply(401, b"", {"WWW-Authenticate": challenge})

    return handle


class TestTokens:
    """The bearer flow: the registry names a token server, which may want credentials."""

    async def test_anonymous(self) -> None:
        async with serving(token_server()) as tokens, registry(wants_token(tokens, {"token-1"})) as (source, _):
            await source.image()
            assert await source.read_range(BLOB, 0, 5) == LAYER[:5]
        [asked] = tokens.requests
        query = {"account": ["x"], "service": ["the, registry"], "scope": ["repository:team/app:pull"]}
        assert parse_qs(urlsplit(asked.target).query) == query
        assert "authorization" not in asked.headers

    async def test_credentials_go_to_the_token_server_only(self, tmp_path: Path) -> None:
        async with (
            serving(token_server("user")) as tokens,
            registry(wants_token(tokens, {"token-1"})) as (source, web),
        ):
            log_in(tmp_path, web.host)
            await source.image()
        assert not [each for each in web.requests if each.headers.get("authorization", "").startswith("Basic")]

    async def test_what_a_token_server_does_is_not_said_of_the_registry(self) -> None:
        replies = {True: Reply(503), False: Reply(200, b"xx", cut=1)}
        async with serving(lambda _: replies[busy]) as tokens, registry(wants_token(tokens, {"x"})) as (source, web):
            for busy in replies:
                told = (
                    f"{tokens.host} answered with status 503"
                    if busy
                    else rf".* \(with its token server {tokens.host}\)"
                )
                with pytest.raises(SourceError, match=f"^cannot get image .* from {web.host}: .*{told}$"):
                    await source.image()

    async def test_wrong_credentials(self, tmp_path: Path) -> None:
        async with serving(token_server("user")) as tokens, registry(wants_token(tokens, {"x"})) as (source, web):
            log_in(tmp_path, web.host, password="wr0ng")
            with pytest.raises(AuthError, match="refused") as caught:
                await source.image()
        assert "wr0ng" not in str(caught.value)

    async def test_a_refresh_token_is_posted(self, tmp_path: Path) -> None:
        def tokens_for(request: Request) -> Reply:
            form = parse_qs(request.body.decode())
            good = request.method == "POST" and form["refresh_token"] == ["r3fresh"] and form["client_id"] == ["clipfs"]
            return Reply(200, b'{"access_token": "token-1"}') if good else Reply(403)

        async with serving(tokens_for) as tokens, registry(wants_token(tokens, {"token-1"})) as (_, web):
            path = tmp_path / "auth.json"
            path.write_text(json.dumps({"auths": {web.host: {"identitytoken": "r3fresh"}}}))
            async with open_source(f"{web.host}/team/app:v1", authfile=path) as own:
                await own.image()

    async def test_a_helper_that_hangs_does_not_use_up_the_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        helper = tmp_path / "docker-credential-hung"
        helper.write_text("#!/bin/sh\nexec sleep 60\n")
        helper.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        authfile = tmp_path / "auth.json"
        authfile.write_text('{"credsStore": "hung"}')
        async with (
            serving(token_server()) as tokens,
            registry(wants_token(tokens, {"token-1"})) as (_, web),
            open_source(f"{web.host}/team/app:v1", authfile=authfile, timeout=9) as own,
        ):
            assert await own.read_range(BLOB, 0, 5) == LAYER[:5]

    async def test_an_expired_token_is_renewed_once_for_all(self) -> None:
        good = {"token-1"}
        async with serving(token_server()) as tokens, registry(wants_token(tokens, good)) as (source, _):
            await source.image()
            good.clear()
            good.add("token-2")
            async with trio.open_nursery() as nursery:
                for start in range(8):
                    nursery.start_soon(source.read_range, BLOB, start, start + 5)
        assert len(tokens.requests) == 2

    async def test_a_token_that_does_not_help(self) -> None:
        async with serving(token_server()) as tokens, registry(wants_token(tokens, {"x"})) as (source, _):
            with pytest.raises(AuthError, match="no credentials are known"):
                await source.image()
        assert len(tokens.requests) == 1

    @pytest.mark.parametrize("body", [b"", b"{}", b'{"token": "a b"}', b'{"token": "a\\r\\nX: y"}', b'{"token": 5}'])
    async def test_what_is_no_token_is_not_sent(self, body: bytes) -> None:
        async with serving(lambda _: Reply(200, body)) as tokens, registry(wants_token(tokens, set())) as (source, _):
            with pytest.raises(SourceError, match="holds no token"):
                await source.image()

    @pytest.mark.parametrize("host", ["exam\x7fple", "a..b", "a" * 64 + ".example"])
    async def test_a_token_server_that_is_none(self, host: str) -> None:
        challenge = f'Bearer realm="https://{host}/"'
        async with registry(lambda _: Reply(401, b"", {"WWW-Authenticate": challenge})) as (source, _):
            with pytest.raises(SourceError, match="names no usable token server"):
                await source.image()

    async def test_a_token_server_in_trouble_is_asked_again(self) -> None:
        answers = [Reply(503), Reply(200, b'{"token": "token-1"}')]
        async with (
            serving(lambda _: answers.pop(0)) as tokens,
            registry(wants_token(tokens, {"token-1"})) as (source, _),
        ):
            await source.image()

    @pytest.mark.parametrize(
        ("origin", "realm", "good"),
        [
            ("https://registry.example/", "https://auth.example/token", True),
            ("https://registry.example/", "http://auth.example/token", False),
            ("https://registry.example/", "http://registry.example/token", False),
            ("https://registry.example/", "http://127.0.0.1/token", False),
            ("http://registry.example/", "http://registry.example:9/token", True),
            ("http://registry.example/", "http://auth.example/token", False),
            ("http://127.0.0.1:5000/", "http://localhost:5001/token", True),
            ("https://registry.example/", "ftp://auth.example/", False),
            ("https://registry.example/", "https://user:x@auth.example/", False),
            ("https://registry.example/", "https://auth.example:port/", False),
            ("https://registry.example/", "", False),
        ],
    )
    async def test_credentials_are_not_sent_in_the_clear(
        self, tmp_path: Path, origin: str, realm: str, good: bool
    ) -> None:
        asked: list[str] = []

        async def ask(url: str, *, headers: Mapping[str, str], form: bytes | None, limit: int) -> Answer:
            asked.append(url)
            return Answer(200, b'{"token": "t"}')

        log_in(tmp_path, "registry.example")
        authorizer = Authorizer("registry.example", "app", None, ask, 1)
        renew = partial(authorizer.renew, [f'Bearer realm="{realm}"'], origin, None)
        if good:
            await renew()
            assert authorizer.header == "Bearer t"
        else:
            with pytest.raises(SourceError, match=r"refused|no usable token server"):
                await renew()
        assert bool(asked) is good

    @pytest.mark.parametrize(
        ("header", "expected"),
        [
            ('Bearer realm="https://a/b",service="c"', [("bearer", {"realm": "https://a/b", "service": "c"})]),
            ('Basic realm="x, y\\"z"', [("basic", {"realm": 'x, y"z'})]),
            ("Negotiate", [("negotiate", {})]),
            ('Negotiate aGk=, Basic realm=x ,\tBearer a = "1" , b=2',
             [("negotiate", {}), ("basic", {"realm": "x"}), ("bearer", {"a": "1", "b": "2"})]),
            ('Basic, , Bearer realm=""', [("basic", {}), ("bearer", {"realm": ""})]),
            ('Bearer REALM="a",realm="b"', [("bearer", {"realm": "a"})]),
            ('Bearer realm="open', [("bearer", {})]),
            ("=", []), ("", []),
        ],
    )  # fmt: skip
    def test_challenges(self, header: str, expected: list[tuple[str, dict[str, str]]]) -> None:
        assert [tuple(each) for each in parse_challenges(header)] == expected


class TestRedirects:
    async def test_a_blob_elsewhere_is_read_there_without_the_header(self, tmp_path: Path) -> None:
        def locked(request: Request) -> Reply:
            if "authorization" not in request.headers:
                return Reply(401, b"", {"WWW-Authenticate": 'Basic realm="x"'})
            if "/blobs/" in request.path:
                return Reply(307, b"", {"Location": f"{storage.url}/layer?signature=s3cret"})
            return content(request)

        async with serving(lambda request: ranged(request, LAYER)) as storage, registry(locked) as (source, web):
            log_in(tmp_path, web.host)
            for start in range(5):
                assert await source.read_range(BLOB, start, 100) == LAYER[start:100]
            assert b"".join([chunk async for chunk in source.stream(BLOB)]) == LAYER
        assert len(storage.requests) == 6
        assert not [each for each in storage.requests if "authorization" in each.headers]
        # Where the blob lies was asked once, besides the request that brought the challenge.
        assert len([each for each in web.requests if "/blobs/" in each.path]) == 2
        assert storage.connections == 1

    async def test_an_address_that_expired_is_asked_for_again(self) -> None:
        current = 1

        def move(request: Request) -> Reply:
            return Reply(302, b"", {"Location": f"{storage.url}/{current}"})

        def store(request: Request) -> Reply:
            return ranged(request, LAYER) if request.path == f"/{current}" else Reply(403)

        async with serving(store) as storage, registry(blobs(move)) as (source, _):
            assert await source.read_range(BLOB, 0, 10) == LAYER[:10]
            current = 2
            assert await source.read_range(BLOB, 10, 20) == LAYER[10:20]
        assert [each.path for each in storage.requests] == ["/1", "/1", "/2"]

    async def test_storage_that_is_gone_leads_back_to_the_registry(self) -> None:
        places: list[str] = []

        def move(request: Request) -> Reply:
            return Reply(302, b"", {"Location": places[0]}) if places else ranged(request, LAYER)

        async with registry(blobs(move)) as (source, _):
            async with serving(lambda request: ranged(request, LAYER)) as storage:
                places.append(f"{storage.url}/layer")
                assert await source.read_range(BLOB, 0, 10) == LAYER[:10]
            places.clear()
            assert await source.read_range(BLOB, 10, 20) == LAYER[10:20]

    @pytest.mark.parametrize(
        ("location", "sentence"),
        [("file:///etc/passwd", "no web address"), ("https://user:s3cret@example.com/", "no web address"),
         ("mailto:x@example.com", "no web address"), ("https://256.1.1.1/", "no web address"),
         ("http://a..b/", "no web address"), (f"https://{'a' * 64}.example/", "no web address"),
         ("https://xn--a..b/", "no web address"), (f"https://127.0.0.1:{'9' * 20}/", "no web address"),
         ("https://127.0.0.1:65536/", "no web address"),
         ("/v2/team/app/blobs/again", "more than 5 times"), ("", "more than 5 times")],
    )  # fmt: skip
    async def test_bad_ones_are_refused(self, location: str, sentence: str) -> None:
        handler = blobs(lambda _: Reply(307, b"", {"Location": location}))
        async with registry(handler) as (source, _):
            with pytest.raises(SourceError, match=sentence) as caught:
                await source.read_range(BLOB, 0, 10)
        assert "s3cret" not in str(caught.value)

    async def test_https_does_not_become_http(self, tmp_path: Path) -> None:
        ca = make_certificate(tmp_path)

        def move(request: Request) -> Reply:
            return Reply(307, b"", {"Location": f"{storage.url}/layer"})

        with trio.fail_after(10):
            async with (
                serving(lambda request: ranged(request, LAYER)) as storage,
                serving(move, ca) as web,
                open_source(f"{web.host}/team/app", ca=ca) as source,
            ):
                with pytest.raises(SourceError, match="from https to plain http on 127"):
                    await source.read_range(BLOB, 0, 10)
        assert storage.requests == []

    async def test_whose_certificate_it_is_that_cannot_be_trusted(self, tmp_path: Path) -> None:
        async with serving(content, make_certificate(tmp_path)) as storage:
            handler = blobs(lambda _: Reply(307, b"", {"Location": f"{storage.url}/layer"}))
            async with registry(handler) as (source, _):
                with pytest.raises(SourceError, match=f"^the certificate of {storage.host} cannot be trusted"):
                    await source.read_range(BLOB, 0, 10)

    async def test_signatures_stay_out_of_messages(self) -> None:
        async with serving(lambda _: Reply(500)) as storage:
            handler = blobs(lambda _: Reply(307, b"", {"Location": f"{storage.url}/layer?X-Signature=s3cret"}))
            async with registry(handler) as (source, _):
                with pytest.raises(SourceError, match="status 500") as caught:
                    await source.read_range(BLOB, 0, 10)
        assert "s3cret" not in str(caught.value)

    @pytest.mark.parametrize(
        ("reply", "sentence"),
        [
            (Reply(500), "{place}, where {registry} redirects to, answered with status 500"),
            (Reply(200, LAYER, cut=0), r"RemoteProtocolError: .* \(with {place}, where {registry} redirects to\)"),
        ],
    )
    async def test_what_a_store_does_is_not_said_of_the_registry(self, reply: Reply, sentence: str) -> None:
        async with serving(lambda _: reply) as storage:
            handler = blobs(lambda _: Reply(307, b"", {"Location": f"{storage.url}/layer"}))
            async with registry(handler) as (source, web):
                expected = sentence.format(place=storage.host, registry=web.host)
                with pytest.raises(SourceError, match=f"^cannot get blob .* from {web.host}: {expected}$"):
                    await source.read_range(BLOB, 0, 10)


class TestAnswers:
    """What is believed, what is tried again, and what is an error."""

    async def test_a_registry_without_ranges_works(self) -> None:
        async with registry(blobs(lambda _: Reply(200, LAYER))) as (source, _):
            assert await source.read_range(BLOB, 100_000, 100_010) == LAYER[100_000:100_010]
            assert await source.read_range(BLOB, 7, BLOB.size) == LAYER[7:]

    @pytest.mark.parametrize(
        ("reply", "sentence"),
        [
            (Reply(206, LAYER[:10]), "sent others"),
            (Reply(206, LAYER[5:15], {"Content-Range": f"bytes 5-14/{BLOB.size}"}), "sent others"),
            (Reply(206, LAYER[:9], {"Content-Range": f"bytes 0-8/{BLOB.size}"}), "sent others"),
            (Reply(206, LAYER[:10], {"Content-Range": "bytes 0-9/12"}), "has 12 bytes"),
            (Reply(206, LAYER[:11], {"Content-Range": f"bytes 0-9/{BLOB.size}"}), "sent more"),
            (Reply(206, b"", {"Content-Range": f"bytes 0-9/{BLOB.size}"}), "10 bytes early"),
            (Reply(206, LAYER[:10], {"Content-Type": "multipart/byteranges; boundary=x"}), "several parts"),
            (Reply(200, LAYER[:10], {"Content-Encoding": "gzip"}), "encoding"),
            (Reply(200, LAYER[:9]), "1 bytes early"),
            (Reply(200, b"", {"X": "y" * 200_000}), "RemoteProtocolError"),
            (Reply(404), "has no blob sha256:"),
            (Reply(416), "in another size"),
            (Reply(403, b'{"errors": [{"message": "pay first"}]}'), "anonymous users .*: 'pay first'"),
            (Reply(418, b"<html>"), "with status 418"),
            (Reply(500), "status 500"),
            (Reply(429, b"", {"Retry-After": "3600"}), "left alone for 3600 s"),
            (Reply(503, b"", {"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}), "left alone for"),
        ],
    )  # fmt: skip
    async def test_wrong_bytes_are_an_error(self, reply: Reply, sentence: str) -> None:
        async with registry(blobs(lambda _: reply)) as (source, web):
            with pytest.raises(SourceError, match=sentence):
                await source.read_range(BLOB, 0, 10)
        assert len(web.requests) <= 6

    @pytest.mark.parametrize(
        "reply",
        [Reply(503), Reply(522), Reply(429, b"", {"Retry-After": "0"}), Reply(500, b"", {"Retry-After": "nonsense"}),
         Reply(206, LAYER[:10], {"Content-Range": f"bytes 0-9/{BLOB.size}"}, cut=4), Reply(200, b"", cut=0)],
    )  # fmt: skip
    async def test_passing_trouble_is_not_seen(self, reply: Reply) -> None:
        trouble = [reply, reply]
        async with registry(blobs(lambda _: trouble.pop() if trouble else None)) as (source, _):
            assert await source.read_range(BLOB, 0, 10) == LAYER[:10]
        assert trouble == []

    async def test_a_broken_download_is_taken_up_again(self) -> None:
        cuts = [1000, 70_000, 5]

        def cut(request: Request) -> Reply | None:
            if not cuts:
                return None
            whole = ranged(request, LAYER)
            return Reply(whole.status, whole.body, whole.headers, cut=cuts.pop(0))

        async with registry(blobs(cut)) as (source, web):
            assert b"".join([chunk async for chunk in source.stream(BLOB)]) == LAYER
        starts = [each.range(BLOB.size)[0] for each in web.requests if "/blobs/" in each.path]
        assert starts == [0, 1000, 71_000, 71_005]

    async def test_a_silent_server_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        handler = blobs(lambda request: Reply(hang=True) if BLOB.digest.hex in request.path else None)
        monkeypatch.setattr(retry.Deadlines, "silence", 60)
        async with registry(handler, timeout=1.8) as (source, web):
            await source.image()  # so that the first attempt has a connection
            monkeypatch.setattr(retry.Deadlines, "attempt_for", lambda self, size: 0.1)
            with pytest.raises(SourceError, match="no complete answer within"):
                await source.read_range(BLOB, 0, 10)
        assert len([each for each in web.requests if BLOB.digest.hex in each.path]) == 4

    async def test_the_total_time_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with registry(blobs(lambda _: Reply(hang=True)), timeout=0.3) as (source, _):
            began = trio.current_time()
            with pytest.raises(SourceError, match="cannot get blob"):
                await source.read_range(BLOB, 0, 10)
            assert trio.current_time() - began < 1

    async def test_a_silent_download_is_given_up(self) -> None:
        async with registry(blobs(lambda _: Reply(hang=True)), timeout=0.5) as (source, _):
            with pytest.raises(SourceError, match="ReadTimeout"):
                _ = [chunk async for chunk in source.stream(BLOB)]

    async def test_a_refusal_without_end_is_one_without_a_reason(self) -> None:
        async with registry(blobs(lambda _: Reply(500, b" " * 2000, pieces=1000)), timeout=1) as (source, _):
            with pytest.raises(SourceError, match=r"status 500$"):
                _ = [chunk async for chunk in source.stream(BLOB)]

    async def test_foreign_layers_explain_themselves(self) -> None:
        foreign = Descriptor("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Digest.of(b""), 9)
        async with registry(content) as (source, _):
            with pytest.raises(SourceError, match="forbids redistribution"):
                await source.read_range(foreign, 0, 9)

    async def test_nobody_there(self) -> None:
        async with registry(content) as (_, web):
            host = web.host
        async with open_source(f"{host}/app") as source:
            with trio.fail_after(10), pytest.raises(SourceError, match=f"from {host}: ConnectError"):
                await source.image()

    @pytest.mark.parametrize("host", ["256.1.1.1", "a" * 64 + ".example"])
    async def test_hosts_that_are_none(self, host: str) -> None:
        async with open_source(f"{host}/app") as source:
            with pytest.raises(SourceError, match=f"^{host} is neither the name of a host nor an address of one$"):
                await source.image()

    async def test_cookies_are_not_kept(self) -> None:
        def cookies(request: Request) -> Reply:
            whole = ranged(request, LAYER)
            return Reply(whole.status, whole.body, {**whole.headers, "Set-Cookie": f"c{request.headers['range']}=1"})

        async with registry(blobs(cookies)) as (source, web):
            for start in range(3):
                assert await source.read_range(BLOB, start, 10) == LAYER[start:10]
        assert [each for each in web.requests if "cookie" in each.headers] == []

    async def test_a_cancelled_reader_leaves_the_source_usable(self) -> None:
        hanging = trio.Event()
        hang = True

        def handle(request: Request) -> Reply | None:
            hanging.set()
            return Reply(hang=True) if hang else None

        async with registry(blobs(handle)) as (source, _):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(source.read_range, BLOB, 0, 10)
                await hanging.wait()
                nursery.cancel_scope.cancel()
            hang = False
            assert await source.read_range(BLOB, 0, 10) == LAYER[:10]
            await source.aclose()
            await source.aclose()
            assert await source.read_range(BLOB, 0, 10) == LAYER[:10]

    async def test_ranges_share_connections(self) -> None:
        async with registry(content) as (source, web):
            for start in range(20):
                await source.read_range(BLOB, start, start + 10)
        # One more was TLS, which comes first on every host.
        assert web.connections == 2

    async def test_far_hosts_are_not_spoken_to_in_the_clear(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transport, "is_loopback", lambda host: False)
        async with registry(content) as (source, web):
            with pytest.raises(SourceError, match="ConnectError"):
                await source.image()
            assert web.requests == []
        async with registry(content, insecure=True) as (source, web):
            await source.image()

    @pytest.mark.parametrize(
        "answer",
        [Reply(400, b"Client sent an HTTP request to an HTTPS server."), Reply(301, b"", {"Location": "https://x/"})],
    )
    async def test_a_port_of_tls_that_was_late_is_not_taken_for_plain_http(self, answer: Reply) -> None:
        """TLS does not come about with this server, as with one that is busy; it may the next time."""
        replies = [answer, answer]
        async with registry(lambda request: replies.pop() if replies else content(request), insecure=True) as (
            source,
            _,
        ):
            await source.image()


class TestManifests:
    async def test_the_digest_is_verified(self) -> None:
        forged = MANIFEST.replace(b"schemaVersion", b"SchemaVersion")
        stated = {"Docker-Content-Digest": str(Digest.of(MANIFEST))}
        async with registry(lambda _: Reply(200, forged, stated)) as (source, web):
            with pytest.raises(IntegrityError, match="the manifest should have digest"):
                await source.image()
            async with open_source(f"{web.host}/team/app@{Digest.of(MANIFEST)}") as pinned:
                with pytest.raises(IntegrityError, match="the manifest should have digest"):
                    await pinned.image()

    async def test_the_config_is_verified(self) -> None:
        forged = CONFIG.replace(b"linux", b"Linux")
        handler = blobs(lambda request: ranged(request, forged) if Digest.of(CONFIG).hex in request.path else None)
        async with registry(handler) as (source, _):
            with pytest.raises(IntegrityError, match="the image config should have digest"):
                await source.image()

    async def test_all_kinds_are_asked_for(self) -> None:
        async with registry(content) as (source, web):
            await source.image()
        accepted = next(each.headers["accept"] for each in web.requests if "/manifests/" in each.path)
        assert [kind.partition("+")[0].rpartition(".")[0].rpartition(".")[2] for kind in accepted.split(", ")] == [
            "manifest", "manifest", "index", "list",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("reply", "sentence"),
        [
            (Reply(200, bytes(5 << 20)), "more than 4194304 bytes"),
            (Reply(200, b"<html>"), "no valid JSON"),
            (
                Reply(200, MANIFEST, {"Content-Type": "application/vnd.docker.distribution.manifest.v1+json"}),
                "schema 1",
            ),
        ],
    )
    async def test_what_is_no_manifest(self, reply: Reply, sentence: str) -> None:
        async with registry(lambda _: reply) as (source, _):
            with pytest.raises(ImageError, match=sentence):
                await source.image()
