"""Mirrors: what ``registries.conf`` says, and who is asked when one of them does not do what it should."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from clipfs.building.builder import Silent, build_image
from clipfs.errors import IntegrityError, SourceError, UsageError
from clipfs.oci import Digest, Reference
from clipfs.sources import Source, open_source, retry
from clipfs.sources.mirrors import endpoints
from clipfs.sources.retry import Deadlines, Server, Transient, Turns
from tests.conftest import require_root
from tests.honest import BLOB, CONFIG, LAYER, MANIFEST, alone, blobs, content, log_in, ranged
from tests.web import Reply, Request, Web, serving

__all__ = ["alone"]

DIGEST = str(Digest.of(MANIFEST))

LISTED = """
unqualified-search-registries = ["docker.io"]
[aliases]
"debian" = "docker.io/library/debian"

[[registry]]
location = "quay.io"
[[registry.mirror]]
location = "mirror.test:5000/quay"
insecure = true
[[registry.mirror]]
location = "tags.test"
pull-from-mirror = "tag-only"
[[registry.mirror]]
location = "digests.test/"
pull-from-mirror = "digest-only"

[[registry]]
prefix = "quay.io/team"
location = "inside.test/teams/ours"
insecure = true

[[registry]]
prefix = "quay.io/bad"
blocked = true

[[registry]]
prefix = "*.example.com"
mirror-by-digest-only = true
[[registry.mirror]]
location = "all.test"

[[registry]]
location = "docker.io/library"
[[registry.mirror]]
location = "hub.test"
"""


class TestConfiguration:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("gcr.io/a:1", ["gcr.io/a:1"]),
            ("quay.io/a/b:1", ["mirror.test:5000/quay/a/b:1 insecure", "tags.test/a/b:1", "quay.io/a/b:1"]),
            (f"quay.io/a@{DIGEST}",
             [f"mirror.test:5000/quay/a@{DIGEST} insecure", f"digests.test/a@{DIGEST}", f"quay.io/a@{DIGEST}"]),
            # Only the longest prefix counts, and it ends where a part of the name does.
            ("quay.io/team/app:1", ["inside.test/teams/ours/app:1 insecure"]),
            ("quay.io/teams/app:1",
             ["mirror.test:5000/quay/teams/app:1 insecure", "tags.test/teams/app:1", "quay.io/teams/app:1"]),
            ("quay.io.test/a:1", ["quay.io.test/a:1"]),
            (f"a.b.example.com:5000/x@{DIGEST}", [f"all.test:5000/x@{DIGEST}", f"a.b.example.com:5000/x@{DIGEST}"]),
            ("a.example.com/x:1", ["a.example.com/x:1"]),
            ("example.com/x:1", ["example.com/x:1"]),
            ("debian", ["hub.test/debian:latest", "docker.io/library/debian:latest"]),
        ],
    )  # fmt: skip
    def test_where_an_image_is_looked_for(self, name: str, expected: list[str], tmp_path: Path) -> None:
        (tmp_path / "registries.conf").write_text(LISTED)
        found = endpoints(Reference.parse(name), insecure=False)
        assert [f"{each.reference}{' insecure' if each.insecure else ''}" for each in found] == expected

    def test_blocked(self, tmp_path: Path) -> None:
        (tmp_path / "registries.conf").write_text(LISTED)
        with pytest.raises(SourceError, match=r"registries\.conf blocks images of quay\.io/bad"):
            endpoints(Reference.parse("quay.io/bad/app"), insecure=False)

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("[[registry]\n", "is no valid TOML"), ("\xff", "is no valid TOML"), ("x=" + "[" * 5000, "no valid TOML"),
            ("registry = 5", "should be a list"), ("registry = [5]", "should be a JSON object"),
            ("[[registry]]", "has neither a prefix nor a location"),
            ("[[registry]]\nlocation = 5", "should be a string"),
            ("[[registry]]\nlocation = 'x.io'\ninsecure = 'yes'", "insecure should be true or false"),
            ("[[registry]]\nlocation = 'x.io'\n[[registry.mirror]]", "location should be a string"),
            ("[[registry]]\nlocation = 'x'\n[[registry.mirror]]\nlocation = 'a'\npull-from-mirror = 'b'", "one of all"),
            ("[[registry]]\nlocation = 'x.io'\n[[registry.mirror]]\nlocation = 'A B'", "a location of no use"),
            ("#" * (1 << 20) + "\n", "more than 1048576 bytes"),
        ],
    )  # fmt: skip
    def test_what_is_no_configuration(self, text: str, sentence: str, tmp_path: Path) -> None:
        (tmp_path / "registries.conf").write_bytes(text.encode("latin-1"))
        with pytest.raises(UsageError, match=sentence):
            endpoints(Reference.parse("x.io/a"), insecure=False)

    def test_the_user_stands_for_the_system_and_drop_ins_are_last(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("CONTAINERS_REGISTRIES_CONF")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        directory = tmp_path / "containers" / "registries.conf.d"
        directory.mkdir(parents=True)

        def write(path: Path, mirror: str) -> None:
            path.write_text(f'[[registry]]\nlocation = "x.test"\n[[registry.mirror]]\nlocation = "{mirror}"\n')

        def first() -> str:
            return endpoints(Reference.parse("x.test/a"), insecure=False)[0].reference.host

        assert first() == "x.test"
        write(directory.parent / "registries.conf", "user.test")
        assert first() == "user.test"
        write(directory / "20.conf", "twenty.test")
        write(directory / "10.conf", "ten.test")
        write(directory / "30.other", "other.test")
        assert first() == "twenty.test"

    def test_a_home_that_one_may_not_look_into(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever becomes another user may keep the $HOME of the first."""
        require_root()
        monkeypatch.delenv("CONTAINERS_REGISTRIES_CONF")
        tmp_path.chmod(0o700)
        os.seteuid(65534)
        try:
            found = endpoints(Reference.parse("x.test/a"), insecure=False)
        finally:
            os.seteuid(0)
        assert [str(each.reference) for each in found] == ["x.test/a:latest"]


class Fleet(NamedTuple):
    """Two mirrors and the registry that they are of, and a source that knows them."""

    first: Web
    second: Web
    main: Web
    source: Source

    def asked(self) -> list[int]:
        """How many requests for blobs each has had since this was asked last."""
        counts = []
        for web in (self.first, self.second, self.main):
            counts.append(len([each for each in web.requests if BLOB.digest.hex in each.path]))
            web.requests.clear()
        return counts


class TestFailover:
    @pytest.fixture
    async def fleet(self, tmp_path: Path) -> Fleet:  # type: ignore[misc]
        with trio.fail_after(20):
            async with AsyncExitStack() as stack:
                first, second, main = [await stack.enter_async_context(serving(content)) for _ in range(3)]
                (tmp_path / "registries.conf").write_text(
                    f'[[registry]]\nlocation = "{main.host}"\n'
                    + "".join(f'[[registry.mirror]]\nlocation = "{web.host}"\n' for web in (first, second))
                )
                source = await stack.enter_async_context(open_source(f"{main.host}/team/app:v1", timeout=6))
                yield Fleet(first, second, main, source)

    async def test_the_first_that_has_it_serves(self, fleet: Fleet) -> None:
        image = await fleet.source.image()
        assert image.name == f"docker://{fleet.main.host}/team/app@{DIGEST}"
        assert await fleet.source.read_range(BLOB, 0, 5) == LAYER[:5]
        assert fleet.asked() == [1, 0, 0]
        assert fleet.main.requests == []

    @pytest.mark.parametrize(
        "reply",
        [Reply(500), Reply(404), Reply(401), Reply(206, LAYER[:5]), Reply(429, b"", {"Retry-After": "3600"}),
         Reply(307, b"", {"Location": "file:///"}), Reply(200, b"", cut=0)],
    )  # fmt: skip
    async def test_one_that_fails_is_left_alone_for_a_while(self, fleet: Fleet, reply: Reply) -> None:
        fleet.first.handler = lambda request: reply
        for start in range(3):
            assert await fleet.source.read_range(BLOB, start, 5) == LAYER[start:5]
        assert fleet.asked()[1:] == [3, 0]
        assert len(fleet.first.requests) == 0

    async def test_a_body_that_one_breaks_off_is_finished_by_another(self, fleet: Fleet) -> None:
        def cut(request: Request) -> Reply:
            whole = ranged(request, LAYER)
            return Reply(whole.status, whole.body, whole.headers, cut=1000)

        fleet.first.handler = fleet.second.handler = blobs(cut)
        assert await fleet.source.read_range(BLOB, 0, 5000) == LAYER[:5000]
        starts = [each.requests[-1].range(BLOB.size)[0] for each in (fleet.first, fleet.second, fleet.main)]
        assert starts == [0, 1000, 2000]
        assert b"".join([chunk async for chunk in fleet.source.stream(BLOB)]) == LAYER

    async def test_a_silent_one_does_not_use_up_the_time(self, fleet: Fleet) -> None:
        fleet.first.handler = lambda request: Reply(hang=True)
        assert await fleet.source.read_range(BLOB, 0, 5) == LAYER[:5]
        began = trio.current_time()
        assert await fleet.source.read_range(BLOB, 0, 5) == LAYER[:5]
        assert trio.current_time() - began < 1

    async def test_a_download_that_takes_too_long_ends_where_it_is(self, fleet: Fleet) -> None:
        def drip(request: Request) -> Reply:
            whole = ranged(request, LAYER)
            return Reply(whole.status, whole.body, whole.headers, pieces=20)

        for web in (fleet.first, fleet.second, fleet.main):
            web.handler = blobs(drip)
        come = bytearray()

        async def download() -> None:
            async with open_source(f"{fleet.main.host}/team/app:v1", timeout=0.5) as source:
                async for chunk in source.stream(BLOB):
                    come.extend(chunk)

        with pytest.raises(SourceError, match="took too long"):
            await download()
        assert LAYER.startswith(come)
        assert len(come) < BLOB.size
        assert fleet.asked() == [1, 0, 0]

    async def test_the_registrys_word_is_the_last(self, fleet: Fleet) -> None:
        for web in (fleet.first, fleet.second):
            web.handler = lambda request: Reply(404)
        fleet.main.handler = lambda request: Reply(404, b'{"errors": [{"message": "the real one"}]}')
        with pytest.raises(SourceError, match=f"^{fleet.main.host} has no blob .*'the real one'"):
            await fleet.source.read_range(BLOB, 0, 5)

    async def test_the_last_word_of_a_mirror_is_not_the_registrys(self, fleet: Fleet) -> None:
        fleet.first.handler = lambda request: Reply(401)
        fleet.second.handler = lambda request: Reply(404)
        fleet.main.handler = lambda request: Reply(503)
        with pytest.raises(SourceError, match=f"^cannot get blob .* from {fleet.main.host}: .* status 503") as caught:
            await fleet.source.read_range(BLOB, 0, 5)
        assert caught.value.exit_code == SourceError.exit_code

    async def test_when_the_registry_fails_those_that_rest_are_asked(self, fleet: Fleet) -> None:
        fleet.first.handler = fleet.second.handler = lambda request: Reply(500)
        assert await fleet.source.read_range(BLOB, 0, 5) == LAYER[:5]
        fleet.first.handler, fleet.main.handler = content, lambda request: Reply(404)
        assert await fleet.source.read_range(BLOB, 0, 5) == LAYER[:5]

    async def test_wrong_bytes_are_blamed_on_who_sent_them(self, fleet: Fleet) -> None:
        await fleet.source.read_range(BLOB, 0, 5)
        fleet.first.handler = lambda request: Reply(500)
        await fleet.source.read_range(BLOB, 100, 105)
        assert fleet.asked()[1:] == [1, 0]
        fleet.source.distrust(BLOB, 102)
        await fleet.source.read_range(BLOB, 100, 105)
        assert fleet.asked() == [0, 0, 1]

    async def test_of_what_several_have_sent_the_mirrors_are_blamed(self, fleet: Fleet) -> None:
        """One broke off, the registry sent the rest, and all together is wrong."""

        def cut(request: Request) -> Reply:
            whole = ranged(request, LAYER)
            return Reply(whole.status, bytes(len(whole.body)), whole.headers, cut=1000)

        fleet.first.handler, fleet.second.handler = blobs(cut), lambda request: Reply(404)
        await fleet.source.read_range(BLOB, 0, 5000)
        fleet.source.distrust(BLOB)
        assert [site.distrusted for site in fleet.source._known_sites] == [True, False, False]  # type: ignore[attr-defined]

    async def test_who_sent_the_last_range_is_blamed_if_nothing_is_known(self, fleet: Fleet) -> None:
        await fleet.source.read_range(BLOB, 0, 5)
        fleet.source.distrust(BLOB)
        await fleet.source.read_range(BLOB, 0, 5)
        assert fleet.asked() == [1, 1, 0]

    async def test_each_place_that_has_it_not_is_asked_once(self, fleet: Fleet) -> None:
        for web in (fleet.first, fleet.second, fleet.main):
            web.handler = lambda request: Reply(404)
        with pytest.raises(SourceError, match=f"^{fleet.main.host} has no blob"):
            await fleet.source.read_range(BLOB, 0, 5)
        assert fleet.asked() == [1, 1, 1]

    @pytest.mark.parametrize("digest", [Digest.of(CONFIG), BLOB.digest], ids=["config", "layer"])
    async def test_an_image_that_a_mirror_has_wrong(self, fleet: Fleet, digest: Digest, tmp_path: Path) -> None:
        """Its disk is broken, say. The index is made of what another has."""

        def wrong(request: Request) -> Reply:
            reply = content(request)
            if digest.hex not in request.path:
                return reply
            return Reply(reply.status, bytes(len(reply.body)), reply.headers)

        fleet.first.handler = wrong
        image = await fleet.source.image()
        report = await build_image(fleet.source, image, tmp_path / "x.clip", Silent())
        assert report.uncompressed == len(LAYER)
        assert [digest.hex in str(web.requests) for web in (fleet.first, fleet.second, fleet.main)] == [
            True, True, False,
        ]  # fmt: skip

    @pytest.mark.parametrize("digest", [Digest.of(CONFIG), BLOB.digest], ids=["config", "layer"])
    async def test_an_image_that_all_have_wrong(self, fleet: Fleet, digest: Digest, tmp_path: Path) -> None:
        def wrong(request: Request) -> Reply:
            reply = content(request)
            return Reply(200, bytes(len(reply.body))) if digest.hex in request.path else reply

        for web in (fleet.first, fleet.second, fleet.main):
            web.handler = wrong

        async def build() -> None:
            await build_image(fleet.source, await fleet.source.image(), tmp_path / "x.clip", Silent())

        with pytest.raises(IntegrityError, match=f"should have digest {digest}"):
            await build()
        assert not await trio.Path(tmp_path / "x.clip").exists()

    async def test_each_gets_its_own_credentials(self, fleet: Fleet, tmp_path: Path) -> None:
        def locked(request: Request) -> Reply:
            if "authorization" in request.headers:
                return Reply(403)
            return Reply(401, b"", {"WWW-Authenticate": 'Basic realm="x"'})

        log_in(tmp_path, fleet.main.host)
        for web in (fleet.first, fleet.second, fleet.main):
            web.handler = locked
        with pytest.raises(SourceError, match="the credentials were refused"):
            await fleet.source.image()
        assert [any("authorization" in each.headers for each in web.requests) for web in fleet[:3]] == [
            False, False, True,
        ]  # fmt: skip


class TestTurns:
    """The order of things, without a network."""

    async def test_rest_grows_and_ends(self, autojump_clock: trio.testing.MockClock) -> None:
        mirror, main = Server("mirror"), Server("main")
        rests = []
        for _ in range(8):
            turns = Turns([mirror, main], "blob", 0, Deadlines())
            assert turns.server is mirror
            await turns.failed(Transient("down"))
            assert turns.server is main
            rests.append(round(mirror._rests_until - trio.current_time()))
            await trio.sleep(rests[-1] - 1)
            assert mirror.rests
            await trio.sleep(2)
            assert not mirror.rests
        assert rests == [5, 10, 20, 40, 80, 160, 300, 300]
        mirror.worked()
        mirror.failed()
        await trio.sleep(6)
        assert not mirror.rests

    async def test_trouble_that_many_meet_counts_once(self, autojump_clock: trio.testing.MockClock) -> None:
        mirror, main = Server("mirror"), Server("main")
        for turns in [Turns([mirror, main], "blob", 0, Deadlines()) for _ in range(8)]:
            await turns.failed(Transient("reset"))
        assert round(mirror._rests_until - trio.current_time()) == 5

    async def test_four_rounds_of_all(self, autojump_clock: trio.testing.MockClock) -> None:
        places = [Server("a"), Server("b"), Server("main")]
        turns, asked = Turns(places, "blob", 0, Deadlines()), []

        async def ask_all() -> None:
            while True:
                asked.append(turns.server.host[0])
                await turns.failed(Transient("down"))

        with pytest.raises(SourceError, match="cannot get blob from main: down"):
            await ask_all()
        assert "".join(asked) == "abm" + 3 * "mab"

    async def test_what_a_mirror_says_is_not_said_of_the_registry(self, autojump_clock: trio.testing.MockClock) -> None:
        turns, failed = Turns([Server("mirror"), Server("main")], "blob", 0, Deadlines()), list[str]()

        async def ask_all() -> None:
            while True:
                failed.append(turns.server.host)
                # An hour's rest is the mirror's own affair.
                await turns.failed(Transient("busy", 3600) if turns.server.host == "mirror" else Transient("reset"))

        with pytest.raises(SourceError, match=r"^cannot get blob from main: reset$"):
            await ask_all()
        assert failed == ["mirror", *4 * ["main"]]

    async def test_a_mirror_is_left_alone_for_as_long_as_it_asks_for(
        self, autojump_clock: trio.testing.MockClock
    ) -> None:
        places = [Server("mirror"), Server("main")]
        await Turns(places, "blob", 0, Deadlines()).failed(Transient("busy", 60))
        await trio.sleep(59)
        assert Turns(places, "blob", 0, Deadlines()).server.host == "main"
        await trio.sleep(2)
        assert Turns(places, "blob", 0, Deadlines()).server.host == "mirror"

    async def test_who_is_slow_is_named(self, autojump_clock: trio.testing.MockClock) -> None:
        """Not the mirror that could not be reached before."""
        turns = Turns([Server("mirror"), Server("main")], "blob", 0, Deadlines())
        await turns.failed(Transient("down"))
        await trio.sleep(200)
        with pytest.raises(SourceError, match=r"^cannot get blob from main: it took too long$"):
            turns.progressed()

    async def test_who_gets_on_may_fail_now_and_then(self, autojump_clock: trio.testing.MockClock) -> None:
        turns = Turns([Server("main")], "blob", 0, Deadlines(3600))
        for _ in range(10):
            for _ in range(3):
                await turns.failed(Transient("down"))
            turns.progressed()
        for _ in range(3):
            await turns.failed(Transient("down"))
        with pytest.raises(SourceError, match="down"):
            await turns.failed(Transient("down"))

    async def test_a_distrusted_place_comes_last_for_a_while(self, autojump_clock: trio.testing.MockClock) -> None:
        places = [Server("a"), Server("main")]
        places[0].distrust()
        assert Turns(places, "blob", 0, Deadlines()).server.host == "main"
        places[1].distrust()
        assert Turns(places, "blob", 0, Deadlines()).server.host == "a"
        await trio.sleep(retry._DISTRUST_SECONDS + 1)
        assert Turns(places, "blob", 0, Deadlines()).server.host == "a"
