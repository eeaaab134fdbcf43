"""OCI image layouts for tests and benchmarks, built from the bytes of their layers.

This module knows the image spec's JSON and the ways a layer can be compressed. Layers come as tar archives, by hand
from `tests.tars` or from anywhere else.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import zstandard

from tests.tars import Tar

__all__ = ["Compression", "LayoutBuilder", "Tar", "compress", "host_architecture"]

Compression = Literal["none", "gzip", "pigz", "multi-gzip", "zstd", "zstd-frames"]

_OCI = "application/vnd.oci.image"
_SUFFIX: dict[Compression, str] = {
    "none": "",
    "gzip": "+gzip",
    "pigz": "+gzip",
    "multi-gzip": "+gzip",
    "zstd": "+zstd",
    "zstd-frames": "+zstd",
}
# Small enough that a layer of a few MB has many members or frames, and cuts fall inside of tar headers.
_PIECE = 300_001


def compress(data: bytes, how: Compression) -> bytes:
    """The layer as each kind of tool would compress it. Deterministic."""
    if how == "none":
        return data
    if how == "gzip":
        return gzip.compress(data, 6, mtime=0)
    if how == "pigz":
        # Its sync markers (empty stored blocks) are what trips decoders that shift bits. Chunks of 128 KiB.
        return subprocess.run(["pigz", "-6nc"], input=data, stdout=subprocess.PIPE, check=True).stdout
    pieces = [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]
    if how == "multi-gzip":
        # Members differ in level and one has a file name, so that header and footer are not all of one length.
        return b"".join(_gzip_member(piece, number) for number, piece in enumerate(pieces)) or gzip.compress(b"")
    if how == "zstd":
        return zstandard.ZstdCompressor(level=3).compress(data)
    return b"".join(zstandard.ZstdCompressor(level=3).compress(piece) for piece in pieces)


def _gzip_member(data: bytes, number: int) -> bytes:
    name = b"piece-%d\0" % number if number % 2 else b""
    deflate = zlib.compressobj(1 + number % 9, zlib.DEFLATED, -15)
    body = deflate.compress(data) + deflate.flush()
    flags = b"\x08" if name else b"\0"
    footer = zlib.crc32(data).to_bytes(4, "little") + (len(data) & 0xFFFFFFFF).to_bytes(4, "little")
    return b"\x1f\x8b\x08" + flags + bytes(4) + b"\0\xff" + name + body + footer


class LayoutBuilder:
    """One image a builder: `layer` as often as there are layers, `config`, then `write`, which gives its name.

    Several builders may write different tags of the same directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._layers: list[dict[str, Any]] = []
        self._diff_ids: list[str] = []
        self._config: dict[str, Any] = {}

    def layer(self, tar: bytes | Tar, compression: Compression = "gzip") -> Self:
        """Add a layer. The digest and size in the manifest are right; a test that wants them wrong edits blobs."""
        data = tar.done() if isinstance(tar, Tar) else tar
        media_type = f"{_OCI}.layer.v1.tar{_SUFFIX[compression]}"
        self._layers.append(self._blob(compress(data, compression), media_type))
        self._diff_ids.append(f"sha256:{hashlib.sha256(data).hexdigest()}")
        return self

    def raw_layer(self, blob: bytes, tar: bytes, media_type: str, annotations: Mapping[str, str]) -> Self:
        """Add a layer that is compressed already; `tar` is what it is of."""
        self._layers.append(self._blob(blob, media_type) | {"annotations": dict(annotations)})
        self._diff_ids.append(f"sha256:{hashlib.sha256(tar).hexdigest()}")
        return self

    def config(
        self,
        *,
        env: Sequence[str] = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",),
        entrypoint: Sequence[str] = (),
        cmd: Sequence[str] = (),
        working_dir: str = "",
        user: str = "",
        stop_signal: str = "",
        volumes: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
    ) -> Self:
        given = {
            "Env": list(env),
            "Entrypoint": list(entrypoint),
            "Cmd": list(cmd),
            "WorkingDir": working_dir,
            "User": user,
            "StopSignal": stop_signal,
            "Volumes": {volume: {} for volume in volumes},
            "Labels": dict(labels or {}),
        }
        self._config = {key: value for key, value in given.items() if value}
        return self

    def write(self, tag: str = "latest", *, architecture: str | None = None) -> str:
        """Write manifest, config and index; the result is the image's name, ``oci:DIR:TAG``."""
        config = {
            "created": "2024-01-01T00:00:00Z",
            "architecture": architecture or host_architecture(),
            "os": "linux",
            "config": self._config,
            "rootfs": {"type": "layers", "diff_ids": self._diff_ids},
            "history": [{"created_by": f"layer {number}"} for number in range(len(self._layers))],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{_OCI}.manifest.v1+json",
            "config": self._blob(_json(config), f"{_OCI}.config.v1+json"),
            "layers": self._layers,
        }
        descriptor = self._blob(_json(manifest), f"{_OCI}.manifest.v1+json")
        descriptor["platform"] = {"architecture": config["architecture"], "os": "linux"}
        descriptor["annotations"] = {"org.opencontainers.image.ref.name": tag}
        (self.directory / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
        index = self.directory / "index.json"
        manifests = json.loads(index.read_bytes())["manifests"] if index.exists() else []
        manifests = [m for m in manifests if m["annotations"]["org.opencontainers.image.ref.name"] != tag]
        index.write_bytes(_json({"schemaVersion": 2, "manifests": [*manifests, descriptor]}))
        return f"oci:{self.directory}:{tag}"

    def _blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs = self.directory / "blobs" / "sha256"
        blobs.mkdir(parents=True, exist_ok=True)
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def host_architecture() -> str:
    """This machine's architecture as the image spec spells it."""
    machine = platform.machine()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
