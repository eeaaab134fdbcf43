"""Debian's real docker-registry on this machine, for tests and benchmarks that want no fake.

    with Registry(tmp_path, auth=("user", "secret"), tls=True) as registry:
        name = registry.push("oci:/some/layout:tag", "app:v1")      # docker://127.0.0.1:PORT/app:v1

It keeps its images below the directory it is given, chooses a free port, and is gone when the block ends.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

# The registry starts in half a second; a machine that is busy with other tests takes a few.
_START_SECONDS = 30

_CONFIG = """\
version: 0.1
log: {{level: info, accesslog: {{disabled: false}}}}
storage: {{filesystem: {{rootdirectory: {directory}/data}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:0", secret: tests{tls}}}
{auth}"""


class Registry:
    """A registry process. host: ``127.0.0.1:PORT``; ca: what signed its certificate, None over plain HTTP."""

    host: str

    def __init__(self, directory: Path, *, auth: tuple[str, str] | None = None, tls: bool = False) -> None:
        self._directory = directory / "registry"
        self._directory.mkdir()
        self.auth = auth
        self.ca = make_certificate(self._directory) if tls else None
        self._log: list[str] = []
        self._logged = threading.Condition()
        self._marks = 0
        self._listening = threading.Event()

    @property
    def requests(self) -> list[str]:
        """The access log so far: a line a request, ``… "GET /v2/… HTTP/1.1" 206 4096 …``, written after its answer."""
        return [line for line in self._log if re.search(r'HTTP/1\.[01]" [0-9]{3} ', line)]

    def settled(self) -> list[str]:
        """The access log, with all in it that was answered before: waits for the line of a request of its own."""
        self._marks += 1
        mark = f"/settled/{self._marks}"
        scheme, trust = ("https", ssl.create_default_context(cafile=self.ca)) if self.ca else ("http", None)
        with contextlib.suppress(urllib.error.HTTPError):  # there is no such page
            urllib.request.urlopen(f"{scheme}://{self.host}{mark}", context=trust, timeout=_START_SECONDS).close()
        with self._logged:
            assert self._logged.wait_for(lambda: any(f'"GET {mark} ' in line for line in self._log), _START_SECONDS)
        return [line for line in self.requests if "/settled/" not in line]

    def push(self, image: str, name: str) -> str:
        """Copy an image (skopeo's name for it) to REPOSITORY:TAG of this registry; returns clipfs' name for it."""
        target = f"docker://{self.host}/{name}"
        login = ["--dest-creds", ":".join(self.auth)] if self.auth else []
        trust = ["--dest-cert-dir", str(self.ca.parent)] if self.ca else ["--dest-tls-verify=false"]
        subprocess.run(
            ["skopeo", "copy", "--quiet", "--insecure-policy", "--preserve-digests", *login, *trust, image, target],
            check=True,
            timeout=120,
        )
        return target

    def authfile(self) -> Path:
        """A credentials file that holds this registry's user, as `docker login` writes it."""
        path = self._directory / "auth.json"
        secret = base64.b64encode(":".join(self.auth or ("", "")).encode()).decode()
        path.write_text(json.dumps({"auths": {self.host: {"auth": secret}}}))
        return path

    def __enter__(self) -> Self:
        config = self._directory / "config.yml"
        config.write_text(_CONFIG.format(directory=self._directory, tls=self._tls_config(), auth=self._auth_config()))
        self._process = subprocess.Popen(
            ["docker-registry", "serve", str(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        # The pipe must be drained for as long as the registry lives, or it blocks.
        self._reader = threading.Thread(target=self._read_log, name="registry log")
        self._reader.start()
        if not self._listening.wait(_START_SECONDS) or not hasattr(self, "host"):
            self.__exit__()
            raise RuntimeError(f"docker-registry did not start:\n{''.join(self._log)}")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _read_log(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._logged:
                    self._log.append(line)
                    self._logged.notify_all()
                if found := re.search(r"listening on (127\.0\.0\.1:[0-9]+)", line):
                    self.host = found[1]
                    self._listening.set()
        self._listening.set()

    def _tls_config(self) -> str:
        if self.ca is None:
            return ""
        return f", tls: {{certificate: {self.ca}, key: {key_of(self.ca)}}}"

    def _auth_config(self) -> str:
        if self.auth is None:
            return ""
        # Cost 4 is the lowest that bcrypt has; the registry computes it for every request.
        users = subprocess.run(["htpasswd", "-nbB", "-C4", *self.auth], capture_output=True, check=True).stdout
        path = self._directory / "htpasswd"
        path.write_bytes(users)
        return f"auth: {{htpasswd: {{realm: tests, path: {path}}}}}\n"


def make_certificate(directory: Path) -> Path:
    """A self-signed certificate for this machine's loopback, alone in a directory; its key is ``key_of(path)``."""
    path = directory / "certificates" / "ca.crt"
    path.parent.mkdir()
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", "/CN=clipfs tests", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost",
            "-keyout", str(key_of(path)), "-out", str(path),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return path


def key_of(certificate: Path) -> Path:
    """The private key of a certificate of `make_certificate`. skopeo takes a key beside it for a client's."""
    return certificate.parent.parent / "server.key"
