"""The demo image: three real layers from Debian's packages, as an OCI layout.

``python -m benchmarks.demo DIR`` makes ``DIR/oci:latest`` unless it is there. The layers are

1. a minimal base: libc, coreutils, bash, busybox and what they need, as Debian's own tools configure them;
2. Python 3.11, exactly the difference that installing it makes;
3. an application, which deletes, replaces and hides things of the layers below. It leaves the image *without*
   /proc /sys /dev /tmp /workspace /volumes, which is what container images in the wild look like to a runtime.

The same packages give the same bytes: times are cut off at `EPOCH`, logs and caches are left out.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.images import LayoutBuilder
from tests.tars import Tar

SUITE = "bookworm"
# No mtime is later: this is what files get that the installation itself writes. 2026-01-01.
EPOCH = 1_767_225_600

_BASE = (
    "base-files", "base-passwd", "bash", "busybox", "coreutils", "dash", "debianutils", "diffutils", "findutils",
    "grep", "hostname", "libc-bin", "procps", "sed", "util-linux",
)  # fmt: skip
_PYTHON = ("python3",)
# Written by the installation and different each time, or none of an image's business.
_LEFT_OUT = (
    "dev/",
    "etc/hostname",
    "etc/resolv.conf",
    "proc/",
    "run/",
    "sys/",
    "tmp/",
    "var/cache/",
    "var/lib/apt/",
    "var/log/",
)

_SERVER = b"""\
import http.server
http.server.test(HandlerClass=http.server.SimpleHTTPRequestHandler, port=8080)
"""


def main(argv: list[str]) -> int:
    """Make the image in the directory named on the command line and say how large it is."""
    if len(argv) != 2:
        print("usage: python -m benchmarks.demo DIR", file=sys.stderr)
        return 2
    build(Path(argv[1]))
    return 0


def build(directory: Path, packages: Sequence[str] = _PYTHON, title: str = "clipfs demo") -> Path:
    """The demo image's OCI layout, made now if it is not there. Two builders at once do not disturb each other.

    With other packages than Python's, it is another image.
    """
    layout = directory / "oci"
    if (layout / "index.json").exists():
        return layout
    print(f"{title}: three layers from Debian packages, about half a minute", file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=directory) as scratch:
        base, python = _install(Path(scratch), packages)
        layers = (_layer(base), _layer(python, below=base), _application())
        aside = Path(scratch) / "oci"
        builder = LayoutBuilder(aside)
        for number, layer in enumerate(layers, 1):
            before = _stored(aside)
            builder.layer(layer, "gzip")
            print(f"  layer {number}: {len(layer) / 1e6:6.1f} MB, {(_stored(aside) - before) / 1e6:5.1f} MB gzipped",
                  file=sys.stderr)  # fmt: skip
        builder.config(
            env=["PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8", "PYTHONDONTWRITEBYTECODE=1"],
            cmd=["python3"],
            working_dir="/app",
            labels={"org.opencontainers.image.title": title},
        ).write("latest")
        try:
            aside.rename(layout)
        except OSError:
            if not (layout / "index.json").exists():
                raise
    return layout


def _install(scratch: Path, packages: Sequence[str]) -> tuple[Path, Path]:
    """Install the base, then the packages on top; the tree after each step as a tar file."""
    base, python = scratch / "base.tar", scratch / "python.tar"
    snapshot = 'tar -C "$1" --one-file-system --sort=name --format=gnu --numeric-owner -cf'
    install = 'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get -qq install --no-install-recommends'
    quiet = '>>"$CLIPFS_DEMO_LOG" 2>&1'
    log = scratch / "log"
    command = [
        "mmdebstrap", "--mode=root", "--variant=custom", "--quiet", "--format=null",
        f"--include={','.join(_BASE)}",
        *(f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "info", "locale", "man")),
        f'--customize-hook={snapshot} "$CLIPFS_DEMO_BASE" .',
        f'--customize-hook={install} -oDPkg::Chroot-Directory="$1" {" ".join(packages)} {quiet}',
        f'--customize-hook={snapshot} "$CLIPFS_DEMO_PYTHON" .',
        SUITE, os.devnull, *_mirrors(),
    ]  # fmt: skip
    environment = os.environ | {
        "CLIPFS_DEMO_BASE": str(base.resolve()),
        "CLIPFS_DEMO_PYTHON": str(python.resolve()),
        "CLIPFS_DEMO_LOG": str(log.resolve()),
        "SOURCE_DATE_EPOCH": str(EPOCH),
    }
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        told = done.stderr + (log.read_text(errors="replace") if log.exists() else "")
        raise SystemExit(f"mmdebstrap could not install {SUITE}:\n{told}")
    return base, python


def _mirrors() -> list[str]:
    """This machine's own mirrors of the suite as apt lines; none means mmdebstrap's default."""
    wanted = {SUITE, f"{SUITE}-updates", f"{SUITE}-security"}
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"],
        stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip
    found = (line.split() for line in listing.splitlines())
    return [f"deb {uri} {suite} main" for uri, suite, component in found if suite in wanted and component == "main"]


def _layer(tree: Path, *, below: Path | None = None) -> bytes:
    """The tree as a layer: all of it, or only what differs from the tree `below`."""
    known = {} if below is None else {_name(info): _identity(info, data) for info, data in _members(below)}
    out = io.BytesIO()
    seen = set()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in _members(tree):
            seen.add(_name(info))
            if known.get(_name(info)) == _identity(info, data):
                continue
            info.mtime = min(int(info.mtime), EPOCH)
            info.uname = info.gname = ""
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
        for gone in sorted(known.keys() - seen):
            directory, _, base = gone.rpartition("/")
            tar.addfile(tarfile.TarInfo(f"{directory}/.wh.{base}"))
    return out.getvalue()


def _members(tree: Path) -> Iterable[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(tree) as tar:
        for info in tar:
            if _name(info) and not _name(info).startswith(_LEFT_OUT):
                file = tar.extractfile(info) if info.isreg() else None
                yield info, file.read() if file else b""


def _name(info: tarfile.TarInfo) -> str:
    return info.name.removeprefix(".").removeprefix("/")


def _identity(info: tarfile.TarInfo, data: bytes) -> Mapping[str, object]:
    """What makes two members the same. A directory's mtime moves with its entries, so there it does not count."""
    mtime = 0 if info.isdir() else info.mtime
    return {"type": info.type, "mode": info.mode, "owner": (info.uid, info.gid), "mtime": mtime,
            "link": info.linkname, "data": data}  # fmt: skip


def _application() -> bytes:
    """Layer 3: what a Dockerfile's last steps leave."""
    tar = Tar()
    tar.dir("app", uid=1000, gid=1000)
    tar.file("app/server.py", _SERVER, uid=1000, gid=1000)
    tar.file("app/data.bin", bytes(range(256)) * 4096, mtime="1700000000.123456789")
    tar.hardlink("app/data.link", "app/data.bin")
    tar.symlink("app/python", "/usr/bin/python3")
    tar.file("usr/local/bin/serve", b"#!/bin/sh\nexec python3 /app/server.py\n", mode=0o755)
    # Replaced: a symlink by a file, a file by a symlink, a directory by a file.
    tar.file("etc/os-release", b'PRETTY_NAME="clipfs demo"\nID=clipfs-demo\n')
    tar.symlink("etc/issue", "os-release")
    tar.whiteout("etc/dpkg").file("etc/dpkg", b"a directory once\n")
    # Deleted: the package manager with its database, and the directories that a runtime wants to mount on.
    for path in ("usr/bin/dpkg", "usr/bin/dpkg-deb", "var/lib/dpkg", "proc", "sys", "dev", "tmp"):
        tar.whiteout(path)
    # Hidden: all that was in the directory, but for what this layer puts there.
    tar.dir("usr/share/python3").opaque("usr/share/python3").file("usr/share/python3/README", b"nothing below\n")
    return tar.done()


def _stored(layout: Path) -> int:
    return sum(blob.stat().st_size for blob in layout.glob("blobs/sha256/*"))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
