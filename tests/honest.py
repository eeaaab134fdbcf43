"""An honest registry on `tests.web`, to be made dishonest where a test wants it, and a source that reads from it.

    async with registry(blobs(lambda request: Reply(500))) as (source, web): ...

Modules that use it import the fixture `alone` too.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from clipfs.oci import OCI_CONFIG, OCI_MANIFEST, Descriptor, Digest
from clipfs.sources import Source, open_source, retry
from tests import tars
from tests.web import Handler, Reply, Request, Web, serving

LAYER = tars.header(b"file", size=300_000) + bytes(range(256)) * 1172 + bytes(480) + tars.END
BLOB = Descriptor("application/vnd.oci.image.layer.v1.tar", Digest.of(LAYER), len(LAYER))
CONFIG = json.dumps({"os": "linux", "rootfs": {"diff_ids": [str(BLOB.digest)]}}).encode()
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "config": {"mediaType": OCI_CONFIG, "digest": str(Digest.of(CONFIG)), "size": len(CONFIG)},
        "layers": [{"mediaType": BLOB.media_type, "digest": str(BLOB.digest), "size": BLOB.size}],
    }
).encode()


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login of whoever runs the tests, no mirrors or proxy, and no long pauses."""
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "CLIPFS_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    # A name of no file, which is no error: the machine's own mirrors stay out of it.
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "registries.conf"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.001)


def log_in(home: Path, host: str, user: str = "user", password: str = "s3cret") -> None:
    path = home / ".docker" / "config.json"
    path.parent.mkdir(exist_ok=True)
    secret = base64.b64encode(f"{user}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": secret}}}))


def content(request: Request) -> Reply:
    """What an honest registry answers."""
    name = request.path.rpartition("/")[2]
    if "/manifests/" in request.path:
        return Reply(200, MANIFEST, {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": str(Digest.of(MANIFEST))})
    data = {str(BLOB.digest): LAYER, str(Digest.of(CONFIG)): CONFIG}.get(name)
    return ranged(request, data) if data else Reply(404 if request.path != "/v2/" else 200)


def ranged(request: Request, data: bytes) -> Reply:
    if "range" not in request.headers:
        return Reply(200, data)
    start, end = request.range(len(data))
    return Reply(206, data[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})


def blobs(replace: Callable[[Request], Reply | None]) -> Handler:
    """A registry that is honest about manifests, and answers for blobs with `replace` (None: honest again)."""

    def handle(request: Request) -> Reply:
        return ("/blobs/" in request.path and replace(request)) or content(request)

    return handle


@asynccontextmanager
async def registry(handler: Handler, **options: Any) -> AsyncIterator[tuple[Source, Web]]:
    """A source over a web server that answers with `handler`. No test may take longer than ten seconds."""
    with trio.fail_after(10):
        async with serving(handler) as web, open_source(f"{web.host}/team/app:v1", **options) as source:
            yield source, web
