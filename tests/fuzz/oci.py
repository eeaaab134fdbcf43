"""Documents and names that a stranger wrote: manifests, image configs, tables of contents, references, platforms, and
what registries say in heads and errors.

The first byte of an input says what the rest is; `KINDS` has the letters.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from clipfs.errors import ImageError, UsageError
from clipfs.format.container import Codec, Layer
from clipfs.layers.entries import entries_in
from clipfs.layers.toc import parse
from clipfs.oci import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    INDEX_TYPES,
    MANIFEST_TYPES,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Digest,
    ImageConfig,
    ImageIndex,
    Manifest,
    Platform,
    Reference,
    parse_manifest,
)
from clipfs.sources.answers import message
from clipfs.sources.auth import parse_challenges
from tests.clips import MEDIA_TYPE
from tests.fuzz import Change
from tests.fuzz.judge import judge
from tests.stargz import stargz
from tests.tars import Tar

LIMIT = 8 << 10

# The table is behind so many bytes of layer.
_END = 1 << 20
_ARM = Platform("linux", "arm", "v7")


def one(data: bytes) -> None:
    kind = KINDS.get(data[:1])
    if kind is not None:
        with contextlib.suppress(ImageError, UsageError):
            kind(data[1:])


def _manifest(raw: bytes) -> None:
    parsed = parse_manifest(raw)
    for called in (*MANIFEST_TYPES, *INDEX_TYPES, "text/plain"):
        with contextlib.suppress(ImageError):
            assert parse_manifest(raw, called) in (parsed, parse_manifest(raw, called))
    if isinstance(parsed, ImageIndex):
        for platform in (_ARM, Platform("linux", "amd64")):
            with contextlib.suppress(ImageError):
                assert parsed.select(platform) in parsed.manifests
        return
    assert parsed.raw == raw
    again = parse_manifest(json.dumps(json.loads(raw)).encode())
    assert isinstance(again, Manifest)
    assert (again.config, again.layers) == (parsed.config, parsed.layers)
    for blob in (parsed.config, *parsed.layers):
        assert Digest.parse(str(blob.digest)) == blob.digest
        assert 0 <= blob.size < 1 << 48
        assert blob.foreign in (False, True)


def _config(raw: bytes) -> None:
    parsed = ImageConfig.parse(raw)
    assert parsed.raw == raw
    assert isinstance(_ARM.matches(parsed.platform), bool)
    # What becomes an argument of a program must be able to.
    for text in (*parsed.env, *parsed.entrypoint, *parsed.cmd, *parsed.volumes, parsed.working_dir, parsed.user):
        assert b"\0" not in text.encode()


def _table(document: bytes, codec: Codec) -> None:
    # Entries are read one by one, and have to be those of the whole.
    assert list(entries_in(document)) == (json.loads(document)["entries"] or [])
    table = parse(document, codec, _END)
    assert sum(span.length for span in table.spans) == table.size
    for before, span in pairwise(table.spans):
        shares = before.start == span.start
        assert before.skip + before.length <= span.skip if shares else before.end <= span.start
    digest = Digest.of(b"")
    judge([(table.entries, Layer(digest, digest, _END, table.size, codec, MEDIA_TYPE, table.spans))])


def _reference(raw: bytes) -> None:
    found = Reference.parse(raw.decode("utf-8", "surrogateescape"))
    assert Reference.parse(str(found)) == found
    assert str(found).isascii()
    assert ".." not in found.repository.split("/")


def _platform(raw: bytes) -> None:
    found = Platform.parse(raw.decode("utf-8", "surrogateescape"))
    assert Platform.parse(str(found)) == found
    assert found.matches(found)


def _digest(raw: bytes) -> None:
    found = Digest.parse(raw.decode("utf-8", "surrogateescape"))
    assert Digest.parse(str(found)) == found
    assert len(found.raw) == found.hasher().digest_size


def _challenges(raw: bytes) -> None:
    for challenge in parse_challenges(raw.decode("latin-1")):
        assert challenge.scheme == challenge.scheme.lower()


def _error(raw: bytes) -> None:
    assert len(message(raw)) < 500


KINDS: dict[bytes, Callable[[bytes], None]] = {
    b"M": _manifest,
    b"C": _config,
    b"G": lambda document: _table(document, Codec.GZIP),
    b"Z": lambda document: _table(document, Codec.ZSTD),
    b"R": _reference,
    b"P": _platform,
    b"D": _digest,
    b"W": _challenges,
    b"E": _error,
}


# --- new inputs

_VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 1 << 31, 1 << 48, 1 << 63, 1 << 64, 1e400, 0.5, "", "\0", "\ud800", "../..", "/", ".wh.x",
    ".wh..wh..opq", "sha256:" + "a" * 64, "2024-02-30T00:00:00Z", "9999-12-31T23:59:59-23:59", [], {}, [[]],
    "chunk", "reg", "dir", "symlink", "hardlink", "char", "zeros", OCI_MANIFEST, OCI_INDEX, OCI_CONFIG, DOCKER_MANIFEST,
)  # fmt: skip


def mutate(data: bytes, change: Change, chance: random.Random) -> bytes:
    """Bytes changed, or one place of the JSON replaced, dropped, doubled or exchanged for another."""
    if chance.random() < 0.6:
        with contextlib.suppress(ValueError, RecursionError):
            document = json.loads(data[1:])
            _edit(document, chance)
            return data[:1] + json.dumps(document).encode()[: LIMIT - 1]
    return change(data, LIMIT)


def _edit(document: Any, chance: random.Random) -> None:
    places: list[tuple[Any, Any]] = []
    pending = [document]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        places += [(node, key) for key in keys]
        pending += [node[key] for key in keys]
    if not places:
        return
    (node, key), (other, there) = chance.choice(places), chance.choice(places)
    what = chance.randrange(6)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, list):
        node.insert(key, json.loads(json.dumps(other[there])))
    elif what == 2:
        node[key] = json.loads(json.dumps(other[there]))
    elif what == 3 and isinstance(node[key], int):
        node[key] += chance.choice((-512, -1, 1, 512))
    elif what == 4 and isinstance(node, dict):
        node[str(there)] = node.pop(key)
    else:
        node[key] = chance.choice(_VALUES)


# --- what to begin with


def seeds() -> Iterator[tuple[str, bytes]]:
    for letter, name, document in _documents():
        yield name, letter + json.dumps(document).encode()
    digest = "sha256:" + "0" * 64
    for text in ("alpine", "localhost:5000/a/b:v1", f"[::1]:80/a__b/c-d@{digest}", f"ghcr.io/x/y:tag@{digest}"):
        yield f"reference {text[:20]}", b"R" + text.encode()
    for text in ("linux/arm/v7", "linux/x86_64", "linux/arm64/v8"):
        yield f"platform {text}", b"P" + text.encode()
    yield "digest sha256", b"D" + digest.encode()
    yield "challenges", b'WBearer realm="https://a/t",service="a",scope="x:y,z" , Basic realm="\\"q\\""'
    yield "error", b'E{"errors": [{"code": "DENIED", "message": "no token=secret for you"}]}'
    yield "digest sha512", b"Dsha512:" + b"f" * 128


def _documents() -> Iterator[tuple[bytes, str, Any]]:
    def blob(kind: str, **more: Any) -> dict[str, Any]:
        return {"mediaType": kind, "digest": "sha256:" + "1" * 64, "size": 1234, **more}

    layers = [blob(MEDIA_TYPE + suffix, annotations={"a": "b"}) for suffix in ("", "+gzip", "+zstd")]
    layers.append(blob("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", urls=["http://x"]))
    manifest = {"schemaVersion": 2, "config": blob(OCI_CONFIG), "layers": layers}
    yield b"M", "manifest", manifest
    yield b"M", "manifest of Docker", {**manifest, "mediaType": DOCKER_MANIFEST}
    platforms: list[dict[str, str]] = [
        {"os": "linux", "architecture": "amd64"},
        {"os": "linux", "architecture": "arm", "variant": "v6"},
        {"os": "unknown", "architecture": "unknown"},
    ]
    listed = [blob(OCI_MANIFEST, platform=each) for each in platforms] + [blob(OCI_MANIFEST)]
    yield b"M", "index", {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}
    yield b"M", "list of Docker", {"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": listed[:1]}
    run = {
        "Env": ["PATH=/bin", "A=ü"], "Entrypoint": ["/bin/sh"], "Cmd": "a string", "WorkingDir": "/w", "User": "1:2",
        "StopSignal": "SIGTERM", "Volumes": {"/v": {}}, "Labels": {"x": "y"},
    }  # fmt: skip
    rootfs = {"type": "layers", "diff_ids": ["sha256:" + "2" * 64, "sha512:" + "3" * 128]}
    platform = {"os": "linux", "architecture": "arm64", "variant": "v8"}
    yield b"C", "config", {**platform, "config": run, "rootfs": rootfs}
    yield b"C", "config of nothing", {"rootfs": {"diff_ids": []}}
    yield b"G", "table of eStargz", _toc(1 << 20, 0)
    yield b"G", "table of chunks", _toc(700, 3000)
    yield b"Z", "table of zstd chunked", _toc_of_frames()
    yield b"Z", "table of nothing", {"version": 1, "entries": None}


def _toc(chunk: int, member: int) -> Any:
    tar = Tar().dir("d", uid=3).file("d/f", b"contents" * 300, xattrs={"user.x": b"y"}).file("e", b"e").file("empty")
    tar.symlink("l", "d/f").hardlink("h", "e").char("c", 1, 3).fifo("p").whiteout("gone").opaque("d")
    return stargz(tar.done(), chunk_size=chunk, min_chunk_size=member).toc


def _toc_of_frames() -> Any:
    digest = "sha256:" + "4" * 64
    file = {"type": "reg", "name": "d/f", "size": 5000, "offset": 100, "endOffset": 900, "digest": digest}
    first = {**file, "chunkSize": 2000, "chunkDigest": digest, "modtime": "2024-01-02T03:04:05.5+01:00", "mode": 0o4755}
    hole = {"type": "chunk", "name": "d/f", "offset": 300, "chunkSize": 1000, "chunkOffset": 2000, "chunkType": "zeros"}
    last = {"type": "chunk", "name": "d/f", "offset": 400, "chunkOffset": 3000, "chunkDigest": digest}
    small = {**file, "name": "g", "size": 7, "offset": 1000, "endOffset": 1020}
    return {"version": 1, "entries": [{"type": "dir", "name": "d/", "mode": 0o755}, first, hole, last, small]}
