"""Packed clips on web servers: only what is read is fetched, and no server can make wrong bytes of it."""

from __future__ import annotations

import errno
import filecmp
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

import clipfs
from clipfs.cli.main import main
from clipfs.compression.codec import decode
from clipfs.errors import ClipfsError, FormatError, SourceError, UsageError
from clipfs.sources.fetcher import SourceOptions
from clipfs.sources.packed import fetcher_for
from clipfs.sources.place import ReplacedError
from clipfs.sources.web import WebFile
from tests.conftest import require_programs, require_root
from tests.honest import log_in, ranged
from tests.mounts import BIG, files, run
from tests.nginx import Nginx
from tests.oracle import differences, picture
from tests.web import Handler, Reply, Request, serving

pytest_plugins = ["tests.mount_fixtures"]
pytestmark = pytest.mark.usefixtures("near")


@pytest.fixture(scope="session")
def packed(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small image, packed."""
    path = tmp_path_factory.mktemp("packed") / "small.clip"
    clipfs.pack(image, path)
    return path


@pytest.fixture(scope="session")
def content(packed: Path) -> bytes:
    return packed.read_bytes()


@pytest.fixture
def nginx(packed: Path, tmp_path: Path) -> Iterator[Nginx]:
    """nginx with TLS, and the packed image as ``x.clip``."""
    require_root()
    require_programs("nginx", "openssl")
    with Nginx(tmp_path, {"x.clip": packed}, tls=True) as running:
        yield running


def options(nginx: Nginx, **others: object) -> clipfs.MountOptions:
    base = clipfs.MountOptions(ca=nginx.ca, cache_size=0, prefetch="none")
    return replace(base, **others)  # type: ignore[arg-type]


class TestNginx:
    def test_everything_is_as_from_the_file(
        self, nginx: Nginx, packed: Path, runtime: Path, public: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "mnt").mkdir()
        with clipfs.mount(packed, tmp_path / "mnt", clipfs.MountOptions(cache_size=0)):
            expected = picture(tmp_path / "mnt")
        clip = clipfs.index_for(f"{nginx.url}/x.clip", ca=nginx.ca)
        with clipfs.mount(clip, tmp_path / "mnt", options(nginx)):
            assert differences(picture(tmp_path / "mnt"), expected) == []

    def test_only_what_is_read_is_fetched(self, tmp_path: Path, runtime: Path) -> None:
        require_root()
        require_programs("nginx", "openssl")
        (tmp_path / "root").mkdir()
        for name in "abc":
            (tmp_path / "root" / name).write_bytes(os.urandom(2 << 20))
        clipfs.pack(tmp_path / "root", tmp_path / "x.clip")
        (tmp_path / "mnt").mkdir()
        with Nginx(tmp_path, {"x.clip": tmp_path / "x.clip"}, tls=True) as nginx:
            clip = clipfs.index_for(f"{nginx.url}/x.clip", ca=nginx.ca)
            whole, index = (tmp_path / "x.clip").stat().st_size, clip.stat().st_size
            assert index < whole / 500
            with clipfs.mount(clip, tmp_path / "mnt", options(nginx)) as mounted:
                with (tmp_path / "mnt/b").open("rb") as file:
                    assert file.read(4096) == (tmp_path / "root/b").read_bytes()[:4096]
                assert mounted.counters()["bytes_fetched"] < whole / 4
        asked = nginx.requests
        assert {each.status for each in asked} == {206}
        assert sum(each.sent for each in asked) < whole / 4 + index + 600 * len(asked)

    def test_commands_take_the_url(
        self, nginx: Nginx, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        url = f"{nginx.url}/x.clip"
        for words in (["ls", "-lR"], ["inspect"], ["check"], ["check", "--data"]):
            assert main([*words, "--ca", str(nginx.ca), url]) == 0, words
        capsysbinary.readouterr()
        assert main(["cat", "--ca", str(nginx.ca), url, "/big"]) == 0
        assert capsysbinary.readouterr().out == BIG
        assert main(["extract", "--ca", str(nginx.ca), url, str(tmp_path / "out")]) == 0
        assert (tmp_path / "out/big").read_bytes() == BIG
        assert main(["pack", "--ca", str(nginx.ca), url, "-o", str(tmp_path / "back.clip")]) == 0
        assert (tmp_path / "back.clip").read_bytes() == (nginx.root / "x.clip").read_bytes()

    def test_mount_by_the_url(self, nginx: Nginx, runtime: Path, tmp_path: Path) -> None:
        (tmp_path / "mnt").mkdir()
        url = f"{nginx.url}/x.clip"
        done = run(
            sys.executable, "-m", "clipfs.cli.helper", url, tmp_path / "mnt", "-o", f"ca={nginx.ca},cache-size=0"
        )
        assert done.returncode == 0, done.stderr
        try:
            assert (tmp_path / "mnt/big").read_bytes() == BIG
        finally:
            clipfs.unmount(tmp_path / "mnt")

    def test_how_to_reach_it_may_be_an_option_of_the_mount(self, nginx: Nginx, runtime: Path, tmp_path: Path) -> None:
        (tmp_path / "mnt").mkdir()
        words = ["mount", f"{nginx.url}/x.clip", str(tmp_path / "mnt"), "-o", f"ca={nginx.ca},cache-size=0"]
        assert main(words) == 0
        try:
            assert (tmp_path / "mnt/big").read_bytes() == BIG
        finally:
            clipfs.unmount(tmp_path / "mnt")

    def test_for_another_platform(
        self, nginx: Nginx, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        url = f"{nginx.url}/x.clip"
        asked = ["--ca", str(nginx.ca), "--platform", "linux/s390x", url]
        for words in (["index", *asked], ["ls", *asked], ["index", *asked[:2], "--span-size", "64K", url]):
            assert main(words) == 2
            said = capsys.readouterr().err
            assert f"clipfs: {url} is of an image for linux/amd64, not" in said or "has its spans already" in said
        assert not (tmp_path / "x.clip").exists()

    def test_what_an_index_is_called_has_no_secrets(
        self, nginx: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["index", "--ca", str(nginx.ca), f"{nginx.url}/x.clip?signature={'s3cret' * 50}"]) == 0
        assert "s3cret" not in capsys.readouterr().out
        assert (tmp_path / "x.clip").is_file()

    def test_an_index_that_a_disk_has_lost_is_made_anew(self, nginx: Nginx) -> None:
        clip = clipfs.index_for(f"{nginx.url}/x.clip", ca=nginx.ca)
        good = clip.read_bytes()
        for left in (0, 100, len(good) - 1):
            os.truncate(clip, left)
            assert clipfs.index_for(f"{nginx.url}/x.clip", ca=nginx.ca) == clip
            assert clip.read_bytes() == good

    def test_its_index_alone_is_enough_to_mount(self, nginx: Nginx, runtime: Path, tmp_path: Path) -> None:
        """With the server down nothing can be read, but all of the tree is there."""
        (tmp_path / "mnt").mkdir()
        assert main(["index", "--ca", str(nginx.ca), f"{nginx.url}/x.clip", "-o", str(tmp_path / "x.clip")]) == 0
        assert main(["check", str(tmp_path / "x.clip")]) == 0
        nginx.__exit__()
        with clipfs.mount(tmp_path / "x.clip", tmp_path / "mnt", options(nginx)):
            assert (tmp_path / "mnt/hello").stat().st_size == 6
        # The file itself may be elsewhere by now.
        moved = options(nginx, source=str(nginx.root / "x.clip"))
        with clipfs.mount(tmp_path / "x.clip", tmp_path / "mnt", moved):
            assert (tmp_path / "mnt/hello").read_bytes() == b"hello\n"

    def test_a_file_replaced_under_the_mount(self, nginx: Nginx, packed: Path, runtime: Path, tmp_path: Path) -> None:
        """By other data: reads fail, and the log says why. By the same data: nobody notices."""
        (tmp_path / "root").mkdir()
        (tmp_path / "root/big").write_bytes(BIG[::-1])
        clipfs.pack(tmp_path / "root", tmp_path / "other.clip")
        clip = clipfs.index_for(f"{nginx.url}/x.clip", ca=nginx.ca)
        (tmp_path / "mnt").mkdir()
        for replacement, outcome in ((packed, BIG), (tmp_path / "other.clip", None)):
            log = tmp_path / "log"
            with clipfs.mount(clip, tmp_path / "mnt", options(nginx, log=log)):
                assert (tmp_path / "mnt/hello").read_bytes() == b"hello\n"
                new = Path(shutil.copy(replacement, nginx.root / "new"))
                os.utime(new, (1, 1))
                new.replace(nginx.root / "x.clip")
                if outcome is not None:
                    assert (tmp_path / "mnt/big").read_bytes() == outcome
                    continue
                with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                    (tmp_path / "mnt/big").read_bytes()
            assert "the file was replaced; take its index anew" in log.read_text()


def honest(clip: bytes, tag: str = '"1"', **headers: str) -> Handler:
    """A server of one file."""

    def answer(request: Request) -> Reply:
        start, end = request.range(len(clip))
        if request.headers.get("if-range", tag) != tag:
            return Reply(200, clip, {"ETag": tag})
        end = min(end, len(clip))
        given = {"Content-Range": f"bytes {start}-{end - 1}/{len(clip)}", "ETag": tag, **headers}
        return Reply(206, clip[start:end], {name: value for name, value in given.items() if value})

    return answer


def altered(change: Callable[[Request, Reply], Reply], clip: bytes) -> Handler:
    serve = honest(clip)
    return lambda request: change(request, serve(request))


async def read_all(url: str, directory: Path) -> None:
    """Take the index from `url`, then all data."""
    out = directory / "index.clip"
    await trio.to_thread.run_sync(clipfs.build, url, out)
    with clipfs.Index.open(out) as index:
        index.check()
        async with fetcher_for(index) as fetcher:
            for span in index.layers[0].spans:
                data = await fetcher.fetch(0, span.start, span.end)
                assert len(decode(index.layers[0].codec, span, data)) == span.length


class TestOtherServers:
    async def test_one_that_does_as_it_should(self, content: bytes, tmp_path: Path) -> None:
        async with serving(honest(content)) as web:
            await read_all(f"{web.url}/x.clip", tmp_path)

    async def test_one_without_validators(self, content: bytes, tmp_path: Path) -> None:
        async with serving(honest(content, ETag="")) as web:
            await read_all(f"{web.url}/x.clip", tmp_path)

    async def test_one_whose_tags_are_weak(self, content: bytes, tmp_path: Path) -> None:
        """Apache's are, of a file that was just written. By such a tag nobody may ask for a range: all of it comes."""

        def weak(request: Request, reply: Reply) -> Reply:
            headers = {**reply.headers, "ETag": 'W/"a"'}
            return Reply(200, content, headers) if "if-range" in request.headers else replace(reply, headers=headers)

        async with serving(altered(weak, content)) as web:
            await read_all(f"{web.url}/x.clip", tmp_path)

    async def test_one_that_is_replaced_while_its_header_comes(self, content: bytes) -> None:
        answers = [Reply(206, content[:1024], {"ETag": '"a"', "Content-Range": f"bytes 0-1023/{len(content)}"}, cut=10)]

        def replacing(request: Request) -> Reply:
            whole = ranged(request, content)
            first = request.path == "/x.clip" and answers
            return answers.pop() if first else replace(whole, headers={**whole.headers, "ETag": '"b"'})

        async with serving(replacing) as web:
            place = WebFile(f"{web.url}/x.clip", SourceOptions())
            try:
                with pytest.raises(SourceError, match="was replaced while its header was read"):
                    await place.header()
            finally:
                await place.aclose()

    @pytest.mark.parametrize("later", [{"ETag": '"b"'}, {}, {"Content-Range": "bytes 0-9/77"}])
    async def test_one_that_sends_ranges_of_whatever_it_has_by_now(self, content: bytes, later: dict[str, str]) -> None:
        """It does not heed that a range of one version is asked for; a span would be of two."""
        headers = {"ETag": '"a"'}

        def heedless(request: Request) -> Reply:
            whole = ranged(request, content)
            return replace(whole, headers={**whole.headers, **headers})

        async with serving(heedless) as web:
            place = WebFile(f"{web.url}/x.clip", SourceOptions())
            await place.header()
            assert await place.read(0, 10) == content[:10]
            headers = later
            with pytest.raises(ReplacedError):
                await place.read(0, 10)
            await place.aclose()

    async def test_a_connection_that_breaks_is_taken_up_again(self, content: bytes, tmp_path: Path) -> None:
        seen: set[str] = set()

        def cut(request: Request, reply: Reply) -> Reply:
            # What had come is not asked for again, so that a range is known by its end.
            _, _, end = request.headers.get("range", "").partition("-")
            first = end not in seen
            seen.add(end)
            return replace(reply, cut=100) if first else reply

        async with serving(altered(cut, content)) as web:
            await read_all(f"{web.url}/x.clip", tmp_path)

    async def test_answers_that_break_where_they_end(self, content: bytes, tmp_path: Path) -> None:
        def endless(request: Request, reply: Reply) -> Reply:
            if request.path != "/x.clip":
                return reply
            return replace(reply, headers={**reply.headers, "Transfer-Encoding": "chunked"}, cut=len(reply.body))

        async with serving(altered(endless, content)) as web:
            await read_all(f"{web.url}/x.clip", tmp_path)
        asked = [request.range(len(content)) for request in web.requests if request.path == "/x.clip"]
        assert all(start < end for start, end in asked)

    async def test_what_is_to_be_encrypted_is(self, content: bytes, tmp_path: Path) -> None:
        """A registry on this machine may turn out to speak plain HTTP; here the address says what is spoken."""
        async with serving(honest(content)) as web:
            with pytest.raises(SourceError, match="ConnectError"):
                await read_all(f"https://{web.host}/x.clip", tmp_path)
            assert web.requests == []
            await read_all(f"http://{web.host}/x.clip", tmp_path)
            assert len({request.path for request in web.requests}) == 1  # no look at what there is beside it

    async def test_an_index_is_served_too(self, clip: Path, tmp_path: Path) -> None:
        """One without data leads to its image, wherever it comes from."""
        async with serving(honest(await trio.Path(clip).read_bytes())) as web:
            await trio.to_thread.run_sync(clipfs.build, f"{web.url}/x.clip", tmp_path / "x.clip")
        assert filecmp.cmp(clip, tmp_path / "x.clip", shallow=False)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda _, reply: Reply(200, reply.body), "answers no range requests"),
            (lambda *_: Reply(404), "has no https?://.*/x.clip"),
            (lambda *_: Reply(403), "does not let anonymous users read x.clip"),
            (lambda _, reply: replace(reply, headers={}), "does not say which bytes"),
            (lambda _, reply: replace(reply, headers={"Content-Range": "bytes 5-9/77"}), "and sent others"),
            (lambda _, reply: replace(reply, body=reply.body + b"x"), "sent more"),
            (lambda *_: Reply(302, headers={"Location": "/x.clip"}), "redirects more than"),
        ],
    )
    async def test_those_that_do_not(
        self, change: Callable[[Request, Reply], Reply], words: str, content: bytes, tmp_path: Path
    ) -> None:
        async with serving(altered(change, content)) as web:
            with pytest.raises(ClipfsError, match=words):
                await read_all(f"{web.url}/x.clip", tmp_path)
        assert files(tmp_path) == []

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda clip: clip[:-1], r"is damaged: it should have [0-9]+ bytes and has [0-9]+"),
            (lambda clip: clip[:700], "is not a .clip file"),
            (lambda _: b"<html>" * 999, "is not a .clip file"),
            (lambda clip: clip[:1500] + b"\xff" + clip[1501:], "is damaged: section 0 does not have its checksum"),
            (lambda clip: clip[:30] + b"\xff" + clip[31:], "its header does not have the checksum"),
        ],
    )
    async def test_files_that_are_none(
        self, change: Callable[[bytes], bytes], words: str, content: bytes, tmp_path: Path
    ) -> None:
        async with serving(honest(change(content))) as web:
            with pytest.raises(FormatError, match=words):
                await read_all(f"{web.url}/x.clip", tmp_path)
        assert files(tmp_path) == []

    async def test_one_whose_file_changes_all_the_time(self, content: bytes, tmp_path: Path) -> None:
        versions = iter(range(1000))
        async with serving(honest(content)) as web:
            await trio.to_thread.run_sync(clipfs.build, f"{web.url}/x.clip", tmp_path / "x.clip")
            web.handler = lambda request: honest(content, f'"{next(versions)}"')(request)
            with clipfs.Index.open(tmp_path / "x.clip") as index:
                async with fetcher_for(index) as fetcher:
                    with pytest.raises(SourceError, match="changes while it is read"):
                        await fetcher.fetch(0, 0, 100)

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("http://example.org/x.clip", "would be read without encryption; use https"),
            ("https://", "a web address has the form"),
            ("https://user:secret@example.org/x.clip", "no password in it"),
            ("https://example.org:99999/x.clip", "a web address has the form"),
            ("https://[::/x.clip", "a web address has the form"),
            ("https://example.org/ x.clip", "a web address has the form"),
            (f"https://example.org/{'x' * 70_000}", "up to 8192 characters"),
        ],
    )
    def test_addresses_that_are_not_asked(self, url: str, words: str) -> None:
        with pytest.raises(UsageError, match=words) as caught:
            clipfs.index_for(url)
        assert "secret" not in str(caught.value)

    async def test_a_signature_in_the_address_stays_secret(self, content: bytes, tmp_path: Path) -> None:
        def answer(request: Request) -> Reply:
            return honest(content)(request) if request.target.endswith("?sig=s3cret") else Reply(404)

        async with serving(answer) as web:
            await read_all(f"{web.url}/x.clip?sig=s3cret", tmp_path)
            web.handler = lambda _: Reply(404)
            with clipfs.Index.open(tmp_path / "index.clip") as index:
                fetcher = fetcher_for(index, SourceOptions())
                async with fetcher:
                    with pytest.raises(SourceError, match="has no http") as caught:
                        await fetcher.fetch(0, 0, 10)
        assert "s3cret" not in str(caught.value)

    async def test_a_path_that_looks_like_a_host_is_a_path(self, content: bytes, tmp_path: Path) -> None:
        """Who made a clip says where its data is, and shall not say who gets the password of that place."""

        def ask_for_credentials(_: Request) -> Reply:
            return Reply(401, b"", {"WWW-Authenticate": f'Bearer realm="{other.url}/token"'})

        async with serving(honest(content)) as web, serving(ask_for_credentials) as other:
            log_in(tmp_path, web.host)
            login = SourceOptions(authfile=tmp_path / ".docker/config.json")
            place = WebFile(f"{web.url}//{other.host}/x.clip", login)
            try:
                assert (await place.header()).data is not None
            finally:
                await place.aclose()
        assert web.requests[-1].target == f"//{other.host}/x.clip"
        assert other.requests == []

    async def test_the_index_is_fetched_once(self, content: bytes, runtime: Path) -> None:
        async with serving(honest(content)) as web:
            once = functools.partial(clipfs.index_for, f"{web.url}/x.clip")
            first = await trio.to_thread.run_sync(once)
            before = len(web.requests)
            assert await trio.to_thread.run_sync(once) == first
            asked = [request for request in web.requests[before:] if request.path == "/x.clip"]
            assert [request.headers["range"] for request in asked] == ["bytes=0-1023"]
            web.handler = honest(content[:-1])
            with pytest.raises(FormatError):
                await trio.to_thread.run_sync(once)
