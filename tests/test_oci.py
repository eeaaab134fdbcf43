"""The vocabulary of images: what is understood, and what is refused in which words."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfs.errors import ImageError, IntegrityError, UsageError
from clipfs.oci import (
    DOCKER_CONFIG,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MAX_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Digest,
    ImageConfig,
    ImageIndex,
    Manifest,
    Platform,
    Reference,
    parse_manifest,
)

A = "sha256:" + "a" * 64
B = "sha256:" + "b" * 64
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def packed(value: object) -> bytes:
    return json.dumps(value).encode()


def described(media_type: str = LAYER, digest: str = A, size: Any = 3, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size, **more}


def manifest(**changes: Any) -> dict[str, Any]:
    return {"schemaVersion": 2, "config": described(OCI_CONFIG), "layers": [described()], **changes}


def platforms(*names: str) -> ImageIndex:
    """An index of one manifest a platform; the sizes number them."""
    split = [(*name.split("/"), "")[:3] for name in names]
    return ImageIndex(
        tuple(
            Descriptor(OCI_MANIFEST, Digest.parse(A), number, platform=Platform(*parts))
            for number, parts in enumerate(split)
        )
    )


class TestDigest:
    def test_parse_and_print(self) -> None:
        digest = Digest.parse(A)
        assert (str(digest), digest.raw, digest.algorithm) == (A, b"\xaa" * 32, "sha256")
        assert Digest.parse("sha512:" + "0" * 128).raw == bytes(64)

    def test_of_and_hasher_agree(self) -> None:
        hasher = Digest.of(b"").hasher()
        hasher.update(b"clip")
        assert Digest.of(b"clip").hex == hasher.hexdigest()

    @pytest.mark.parametrize(
        "text",
        ["", "sha256:", "sha256:" + "A" * 64, "sha256:" + "a" * 63, "sha256:" + "a" * 128, "md5:" + "a" * 32,
         "sha512:" + "a" * 64, "a" * 64, "sha256:../" + "a" * 61, "sha256:" + "a" * 64 + "\n", "sha256:" + "٣" * 64],
    )  # fmt: skip
    def test_malformed_is_refused(self, text: str) -> None:
        with pytest.raises(ImageError, match="is no digest"):
            Digest.parse(text)

    def test_the_constructor_is_as_strict(self) -> None:
        with pytest.raises(ImageError):
            Digest("sha256", "../../etc/passwd")

    def test_verify(self) -> None:
        assert Digest.of(b"right").verify(b"right", "the blob") == b"right"
        with pytest.raises(IntegrityError, match="the blob should have digest sha256:"):
            Digest.of(b"right").verify(b"wrong", "the blob")


class TestPlatform:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [("linux/amd64", "linux/amd64"), ("linux/x86_64", "linux/amd64"), ("Linux/aarch64", "linux/arm64"),
         ("linux/arm64/v8", "linux/arm64"), ("linux/arm", "linux/arm"), ("linux/arm/v6", "linux/arm/v6"),
         ("linux/armel", "linux/arm/v6"), ("linux/riscv64", "linux/riscv64"), ("linux/amd64/v3", "linux/amd64/v3")],
    )  # fmt: skip
    def test_spellings(self, text: str, shown: str) -> None:
        assert str(Platform.parse(text)) == shown

    @pytest.mark.parametrize("text", ["", "linux", "linux/", "/amd64", "linux/arm/v7/x", "linux/a b"])
    def test_malformed_is_refused(self, text: str) -> None:
        with pytest.raises(UsageError, match="OS/ARCH"):
            Platform.parse(text)

    @pytest.mark.parametrize(
        ("wanted", "offered", "fits"),
        [("linux/arm64", "linux/arm64/v8", True), ("linux/arm64/v8", "linux/arm64", True),
         ("linux/arm/v7", "linux/arm", True), ("linux/arm/v7", "linux/arm/v6", True),
         ("linux/arm/v6", "linux/arm/v7", False), ("linux/amd64", "linux/amd64/v3", False),
         ("linux/amd64/v3", "linux/amd64", True), ("linux/amd64", "windows/amd64", False),
         ("linux/ppc64le", "linux/ppc64le/power9", False), ("linux/arm64", "linux/arm/v8", False)],
    )  # fmt: skip
    def test_a_lower_variant_runs_on_a_higher_one(self, wanted: str, offered: str, fits: bool) -> None:
        assert Platform.parse(wanted).matches(Platform.parse(offered)) is fits


class TestReference:
    @pytest.mark.parametrize(
        ("text", "full"),
        [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("someone/app", "docker.io/someone/app:latest"),
            ("docker.io/debian", "docker.io/library/debian:latest"),
            ("index.docker.io/library/debian", "docker.io/library/debian:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/a/b__c/d-e.f:V1_.-", "localhost:5000/a/b__c/d-e.f:V1_.-"),
            ("registry.example.com/app", "registry.example.com/app:latest"),
            ("Registry/app", "Registry/app:latest"),
            ("[::1]:5000/app:x", "[::1]:5000/app:x"),
            (f"debian@{A}", f"docker.io/library/debian@{A}"),
            (f"h:1/a:t@{A}", f"h:1/a:t@{A}"),
            ("a:5000", "docker.io/library/a:5000"),
        ],
    )
    def test_defaults_are_dockers(self, text: str, full: str) -> None:
        reference = Reference.parse(text)
        assert str(reference) == full
        assert Reference.parse(full) == reference

    @pytest.mark.parametrize(
        "text",
        ["", ":", "debian:", "UPPER", "a//b", "/a", "a/", "-a", "a..b", "a___b", "h:0/x", "h:65536/x", "a:b:c",
         "a@", "a@sha256:1", f"a@{A}@{B}", "a b", "a:" + "t" * 129, "h.example/" + "a" * 255, "x" * 5000,
         "ho_st.example/a", "user@host/a", "a/../b", "é", "a\n"],
    )  # fmt: skip
    def test_malformed_is_refused(self, text: str) -> None:
        with pytest.raises(UsageError, match="is no image name"):
            Reference.parse(text)

    def test_pinned_forgets_the_tag(self) -> None:
        assert str(Reference.parse("h:1/a:t").pinned(Digest.parse(B))) == f"h:1/a@{B}"

    @given(st.text(max_size=80))
    def test_anything_else_is_one_of_the_two(self, text: str) -> None:
        try:
            reference = Reference.parse(text)
        except UsageError:
            return
        assert Reference.parse(str(reference)) == reference


class TestManifest:
    def test_oci(self) -> None:
        raw = packed(manifest())
        parsed = Manifest.parse(raw, OCI_MANIFEST)
        assert parsed.digest == Digest.of(raw)
        assert (parsed.raw, parsed.media_type, parsed.config.media_type) == (raw, OCI_MANIFEST, OCI_CONFIG)
        assert parsed.layers == (Descriptor(LAYER, Digest.parse(A), 3),)

    def test_docker(self) -> None:
        layer = described("application/vnd.docker.image.rootfs.diff.tar.gzip")
        raw = packed(manifest(mediaType=DOCKER_MANIFEST, config=described(DOCKER_CONFIG), layers=[layer]))
        assert Manifest.parse(raw).media_type == DOCKER_MANIFEST

    @pytest.mark.parametrize(
        "media_type",
        ["application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
         "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"],
    )  # fmt: skip
    def test_foreign_layers_are_noted(self, media_type: str) -> None:
        parsed = Manifest.parse(packed(manifest(layers=[described(media_type), described()])))
        assert [layer.foreign for layer in parsed.layers] == [True, False]

    @pytest.mark.parametrize(
        ("document", "media_type", "sentence"),
        [
            ({"schemaVersion": 1, "fsLayers": []}, None, "schema 1"),
            (manifest(), "application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1"),
            (
                {"mediaType": "application/vnd.oci.artifact.manifest.v1+json", "blobs": []},
                None,
                "artifact.*is no image",
            ),
            (manifest(manifests=[]), None, "at once"),
            (manifest(mediaType=OCI_INDEX), None, "is no image"),
            (manifest(mediaType=DOCKER_MANIFEST), OCI_MANIFEST, "is served as"),
            (manifest(mediaType="text/html"), None, "is no image"),
            (manifest(config=described("application/vnd.cncf.helm.config.v1+json")), None, "artifact of type"),
            (manifest(config=described("application/vnd.oci.empty.v1+json"), artifactType="a/b"), None, "type 'a/b'"),
            (manifest(layers=[described("application/vnd.in-toto+json")]), None, "not a file system layer"),
            (manifest(layers=[described(LAYER + "+encrypted")]), None, "encrypted"),
            (manifest(layers={}), None, "should be a list"),
            (manifest(layers=["x"]), None, "should be a JSON object"),
            (manifest(layers=[described(size=-1)]), None, "number of bytes"),
            (manifest(layers=[described(size=True)]), None, "number of bytes"),
            (manifest(layers=[described(size=1.5)]), None, "number of bytes"),
            (manifest(layers=[described(size=1 << 60)]), None, "number of bytes"),
            (manifest(layers=[described(digest="sha256:x")]), None, "no digest"),
            (manifest(layers=[described(annotations={"a": 1})]), None, "annotations should be a string"),
            (manifest(config=described(OCI_CONFIG, platform={"os": "\ud800"})), None, "no string can keep"),
            (manifest(Layers=[]), None, "the manifest has 'Layers' where others read 'layers'"),
            ({**manifest(), "layer\u017f": []}, None, "where others read 'layers'"),
            (manifest(layers=[described(Digest=A)]), None, r"layers\[0\] has 'Digest'"),
            (manifest(config=described(OCI_CONFIG, platform={"OS": "linux"})), None, "'os'"),
            ([], None, "should be a JSON object"),
        ],
    )
    def test_what_is_no_image_is_refused(self, document: object, media_type: str | None, sentence: str) -> None:
        with pytest.raises(ImageError, match=sentence):
            Manifest.parse(packed(document), media_type)

    @pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000, b" " * (MAX_MANIFEST + 1)])
    def test_what_is_no_json_is_refused(self, raw: bytes) -> None:
        with pytest.raises(ImageError, match="manifest"):
            Manifest.parse(raw)

    def test_a_field_is_there_once(self) -> None:
        """Go's tools read the second list into what they have read of the first."""
        raw = packed(manifest()).replace(b'"layers"', b'"layers": [], "layers"')
        with pytest.raises(ImageError, match="the manifest is no valid JSON: an object has a key twice"):
            Manifest.parse(raw)

    def test_an_index_is_no_manifest(self) -> None:
        with pytest.raises(ImageError, match="index stands where"):
            Manifest.parse(packed({"schemaVersion": 2, "manifests": []}))

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda children: (
                st.lists(children, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["layers", "config", "digest", "size", "mediaType", "manifests", "platform"]),
                    children,
                )
            ),
            max_leaves=12,
        )
    )
    def test_no_json_causes_another_error(self, document: object) -> None:
        for parse in (parse_manifest, ImageConfig.parse):
            with suppress(ImageError):
                parse(packed(document))


class TestIndex:
    @pytest.mark.parametrize("media_type", [OCI_INDEX, DOCKER_LIST])
    def test_both_kinds(self, media_type: str) -> None:
        entry = described(OCI_MANIFEST, platform={"os": "linux", "architecture": "arm", "variant": "v7"})
        index = parse_manifest(packed({"mediaType": media_type, "manifests": [entry]}))
        assert isinstance(index, ImageIndex)
        assert index.manifests[0].platform == Platform("linux", "arm", "v7")

    @pytest.mark.parametrize(
        ("wanted", "number"),
        [("linux/amd64", 0), ("linux/arm64", 3), ("linux/arm", 2), ("linux/arm/v6", 1), ("linux/arm/v8", 2)],
    )
    def test_the_best_one_is_chosen(self, wanted: str, number: int) -> None:
        index = platforms("linux/amd64", "linux/arm/v6", "linux/arm/v7", "linux/arm64/v8", "unknown/unknown")
        assert index.select(Platform.parse(wanted)).size == number

    def test_the_first_of_equals_is_chosen(self) -> None:
        assert platforms("linux/s390x", "linux/amd64", "linux/amd64").select(Platform.parse("linux/amd64")).size == 1

    def test_what_there_is_is_listed(self) -> None:
        index = platforms("linux/arm64/v8", "linux/amd64", "unknown/unknown")
        with pytest.raises(ImageError, match=r"nothing for linux/s390x; it is made for linux/amd64, linux/arm64$"):
            index.select(Platform.parse("linux/s390x"))

    def test_a_single_entry_need_not_say(self) -> None:
        only = Descriptor(OCI_MANIFEST, Digest.parse(A), 1)
        assert ImageIndex((only,)).select(Platform.host()) is only
        with pytest.raises(ImageError, match="no platform that it names"):
            ImageIndex((only, only)).select(Platform.host())


class TestConfig:
    def test_everything(self) -> None:
        raw = packed(
            {
                "os": "linux", "architecture": "arm", "variant": "v7",
                "rootfs": {"type": "layers", "diff_ids": [A, B]},
                "config": {
                    "Env": ["PATH=/bin"], "Entrypoint": ["/init"], "Cmd": ["a", "b"], "WorkingDir": "/w", "User": "1:2",
                    "StopSignal": "SIGINT", "Volumes": {"/data": {}}, "Labels": {"k": "v"},
                },
            }
        )  # fmt: skip
        config = ImageConfig.parse(raw)
        assert (config.raw, config.platform) == (raw, Platform("linux", "arm", "v7"))
        assert config.diff_ids == (Digest.parse(A), Digest.parse(B))
        assert (config.env, config.entrypoint, config.cmd) == (("PATH=/bin",), ("/init",), ("a", "b"))
        assert (config.working_dir, config.user, config.stop_signal) == ("/w", "1:2", "SIGINT")
        assert (config.volumes, config.labels) == (("/data",), {"k": "v"})

    def test_nulls_are_absent(self) -> None:
        config = ImageConfig.parse(packed({"rootfs": {"diff_ids": None}, "config": {"Env": None, "Volumes": None}}))
        assert (config.os, config.diff_ids, config.env, config.volumes) == ("linux", (), (), ())
        assert ImageConfig.parse(packed({"config": None})).cmd == ()
        labels = {"none": None, "k": "v"}
        assert ImageConfig.parse(packed({"config": {"Labels": labels}})).labels == {"k": "v"}
        parsed = Manifest.parse(packed(manifest(layers=[described(annotations=labels)])))
        assert parsed.layers[0].annotations == {"k": "v"}

    def test_old_docker_wrote_commands_as_strings(self) -> None:
        assert ImageConfig.parse(packed({"config": {"Cmd": "sh"}})).cmd == ("sh",)

    @pytest.mark.parametrize(
        "document",
        [{"rootfs": {"type": "ostree"}}, {"rootfs": {"diff_ids": [1]}}, {"config": {"Env": ["A=\0"]}},
         {"config": {"Volumes": {"/\ud800": {}}}}, {"config": []}, {"config": {"User": 0}}, 7,
         {"Config": {}}, {"config": {"user": "1"}}, {"rootfs": {"DIFF_IDS": []}}],
    )  # fmt: skip
    def test_malformed_is_refused(self, document: object) -> None:
        with pytest.raises(ImageError):
            ImageConfig.parse(packed(document))
