"""Names as promises: what a Digest, a Platform or a Reference exists for, whoever wrote the text it was made of."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfs.errors import ImageError, IntegrityError, UsageError
from clipfs.names import Digest, Platform, Reference

_T = TypeVar("_T")
_PART = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}", fullmatch=True)
_REPOSITORY = st.lists(_PART, min_size=1, max_size=4).map("/".join)
_HOST = st.sampled_from(
    ["localhost", "docker.io", "ghcr.io", "h:1", "a-b.c:65535", "127.0.0.1:5000", "[::1]:443", "HOST"]
)
_TAG = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
_DIGEST = st.binary(max_size=9).map(Digest.of)


def attempt(make: Callable[[str], _T], text: str) -> _T | None:
    """What is made of the text, or None if a sentence says why nothing is."""
    try:
        return make(text)
    except (ImageError, UsageError) as error:
        sentence = str(error)
    assert sentence.isprintable()
    assert len(sentence) < 1000
    return None


class TestDigest:
    @given(st.binary(max_size=200))
    def test_names_bytes(self, data: bytes) -> None:
        digest = Digest.of(data)
        assert digest == Digest.parse(str(digest)) == Digest("sha256", digest.raw.hex())
        assert digest.verify(data, "it") is data
        assert len({digest, Digest.parse(str(digest))}) == 1

    @pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
    def test_verifies_by_its_own_algorithm(self, algorithm: str) -> None:
        digest = Digest(algorithm, hashlib.new(algorithm, b"data").hexdigest())
        assert digest.verify(b"data", "it") == b"data"
        with pytest.raises(
            IntegrityError, match=f"it should have digest {digest}, but has {algorithm}:[0-9a-f]+; it is"
        ):
            digest.verify(b"date", "it")

    @given(st.text(max_size=100))
    def test_of_any_text_is_a_file_name_or_refused(self, text: str) -> None:
        for make in (Digest.parse, lambda hexadecimal: Digest("sha256", hexadecimal)):
            digest = attempt(make, text)
            assert digest is None or set(digest.hex) <= set("0123456789abcdef")


class TestPlatform:
    @pytest.mark.parametrize(
        ("wanted", "offered", "distance"),
        [
            ("linux/arm/v7", "linux/arm/v7", 0),
            ("linux/arm/v7", "linux/arm", 0),
            ("linux/arm/v7", "linux/arm/v6", 1),
            ("linux/arm/v7", "linux/arm/v5", 2),
            ("linux/armhf", "linux/armel", 1),
            ("linux/amd64/v4", "linux/x86_64", 3),
            ("linux/arm/v6", "linux/arm/v7", None),
            ("linux/arm64", "linux/arm", None),
            ("linux/ppc64le/power9", "linux/ppc64le/power9", 0),
            ("linux/ppc64le/power9", "linux/ppc64le", None),
        ],
    )
    def test_how_far_one_that_runs_is_from_what_is_wanted(
        self, wanted: str, offered: str, distance: int | None
    ) -> None:
        assert Platform.parse(wanted).distance(Platform.parse(offered)) == distance

    def test_of_this_machine_is_one_that_can_be_typed(self) -> None:
        assert Platform.parse(str(Platform.host())) == Platform.host()
        assert Platform.host().matches(Platform.host())

    @given(st.text(max_size=40))
    def test_of_any_text_is_in_one_spelling_or_refused(self, text: str) -> None:
        platform = attempt(Platform.parse, text)
        assert platform is None or platform.normal() == platform == Platform.parse(str(platform))


class TestReference:
    @given(_HOST, _REPOSITORY, st.none() | _TAG, st.none() | _DIGEST)
    def test_comes_back_from_its_own_text(self, host: str, path: str, tag: str | None, digest: Digest | None) -> None:
        text = f"{host}/{path}" + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
        reference = Reference.parse(text)
        assert (reference.host, reference.digest) == (host, digest)
        assert reference.repository in (path, f"library/{path}")
        assert reference.tag == (tag or (None if digest else "latest"))
        assert Reference.parse(str(reference)) == reference

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("Debian", "repositories are lower-case"),
            ("ghcr.io/A/b", "repositories are lower-case"),
            ("a:-x", "a tag is up to 128"),
            ("h:99999/a", "is no host"),
            ("h:/a", "is no host"),
            ("[::1/a", "is no host"),
            ("a@sha1:00", "is no digest"),
            ("a/" * 130 + "a", "longer than 255"),
            ("a" * 600, "too long"),
        ],
    )
    def test_says_what_is_wrong(self, text: str, why: str) -> None:
        with pytest.raises(UsageError, match="is no image name: ") as caught:
            Reference.parse(text)
        assert why in str(caught.value)

    @pytest.mark.parametrize("piece", ["a", "a-", "-", "a.", "a__", "_", "A", "a/", "1.", "[", ":", "a:", "@", "aA"])
    @pytest.mark.parametrize("end", ["", "!", "/!", "/", ":", "@"])
    def test_takes_no_time_to_refuse(self, piece: str, end: str) -> None:
        """Regular expressions that backtrack would take minutes for some of these."""
        start = time.perf_counter()
        for length in (250, 500, 100_000):
            attempt(Reference.parse, piece * (length // len(piece)) + end)
            attempt(Platform.parse, piece * (length // len(piece)) + end)
        assert time.perf_counter() - start < 0.5
