"""Debian's nginx on this machine: an honest web server that answers range requests.

    with Nginx(tmp_path, {"x.clip": path}, tls=True) as nginx:
        nginx.url + "/x.clip"

It serves what is in `root`, where the files are copies, says what it was asked in `requests`, and is gone when the
block ends. Its socket is made here, so that there is no port to guess and no start to wait for.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

from tests.registry import key_of, make_certificate

# To end, which takes milliseconds.
_SECONDS = 20

_CONFIG = """\
daemon off; user root; worker_processes 1; pid {directory}/pid; error_log {directory}/error.log;
events {{}}
http {{
    log_format ranges '$status $bytes_sent $request_uri $http_range';
    access_log {directory}/access.log ranges;
    client_body_temp_path {directory}/t1; proxy_temp_path {directory}/t2; fastcgi_temp_path {directory}/t3;
    uwsgi_temp_path {directory}/t4; scgi_temp_path {directory}/t5;
    server {{ listen 127.0.0.1:{port}{tls}; root {directory}/root; }}
}}
"""


class Asked(NamedTuple):
    """A line of the access log. sent: bytes, with the answer's head."""

    status: int
    sent: int
    target: str
    range: str


class Nginx:
    """A server process. url: ``https://127.0.0.1:PORT``; ca: what signed its certificate, None without TLS."""

    def __init__(self, directory: Path, files: Mapping[str, Path], *, tls: bool = False) -> None:
        self._directory = directory / "nginx"
        self.root = self._directory / "root"
        self.root.mkdir(parents=True)
        for name, path in files.items():
            shutil.copy(path, self.root / name)
        self.ca = make_certificate(self._directory) if tls else None

    @property
    def requests(self) -> list[Asked]:
        """What was answered so far; nginx writes a line when the answer is sent."""
        lines = (self._directory / "access.log").read_text().splitlines()
        found = [re.fullmatch(r"([0-9]+) ([0-9]+) (\S+) (.*)", line) for line in lines]
        return [Asked(int(line[1]), int(line[2]), line[3], line[4]) for line in found if line]

    def __enter__(self) -> Self:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            self.url = f"{'https' if self.ca else 'http'}://127.0.0.1:{port}"
            tls = f" ssl; ssl_certificate {self.ca}; ssl_certificate_key {key_of(self.ca)}" if self.ca else ""
            config = self._directory / "nginx.conf"
            config.write_text(_CONFIG.format(directory=self._directory, port=port, tls=tls))
            # How nginx hands its sockets to its successor; clients that come too early wait in the socket's queue.
            self._process = subprocess.Popen(
                ["nginx", "-c", config, "-e", self._directory / "error.log"],
                pass_fds=[listening.fileno()],
                env={**os.environ, "NGINX": f"{listening.fileno()};"},
            )
        return self

    def __exit__(self, *_: object) -> None:
        # Asked, not killed: or its worker would be left.
        self._process.terminate()
        self._process.wait(_SECONDS)
