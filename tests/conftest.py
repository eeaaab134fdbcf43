"""What every test gets: state directories of its own, nothing left behind, and the capabilities that the suite needs.

A capability that is missing skips a test on a developer's machine and fails it in CI, where ``CLIPFS_REQUIRE=1``.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo
from clipfs.blocks import link
from clipfs.mounting import daemon
from tests.beside import Scheduling, is_beside_others
from tests.guard import guarded
from tests.leftovers import Places, nothing_left_behind
from tests.patched_worker import patch_workers

_ROOT = Path(__file__).parent.parent
_DEMO = _ROOT / ".cache" / "demo"

_FAILED = pytest.StashKey[bool]()


# A shell that starts us in the background has us and all that we start ignore Ctrl-C. A person has it otherwise.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
# Who ends a run in the usual way has it clean up, as by Ctrl-C; for any other way there is `tests.guard`.
signal.signal(signal.SIGTERM, signal.default_int_handler)

# What an image does not describe, its judges make as the umask has it, and other users may look into what we make.
os.umask(0o022)


def require(capability: bool, what: str) -> None:
    """Skip the test unless the machine can do `what`; in CI, fail it."""
    if capability:
        return
    if os.environ.get("CLIPFS_REQUIRE") == "1":
        pytest.fail(f"this machine must have {what}, and has not")
    pytest.skip(f"needs {what}")


def require_root() -> None:
    """For tests that mount, own files or run containers."""
    require(os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK), "root and /dev/fuse")


def require_programs(*names: str) -> None:
    """For tests that judge by other people's programs."""
    for name in names:
        require(shutil.which(name) is not None, f"the program {name}")


@pytest.fixture(scope="session", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """No test sees or touches the mounts, caches and containers of this machine. All that it makes is below these."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STATE", "CACHE", "CONTAINERS"):
            patch.setenv(f"CLIPFS_{name}", str(tmp_path_factory.mktemp(name.lower())))
        # Other users can look into it, which they cannot into pytest's own.
        with tempfile.TemporaryDirectory(prefix="clipfs-test-") as directory:
            temporary = Path(directory)
            temporary.chmod(0o755)
            patch.setenv("TMPDIR", directory)
            patch.setattr(tempfile, "tempdir", directory)
            # What serves a mount inherits what a test has patched, although earlier tests have left idle threads here.
            patch.setattr(daemon, "_alone", lambda: True)
            with guarded(base, temporary):
                state, scratch = Path(os.environ["CLIPFS_STATE"]), Path(os.environ["CLIPFS_CACHE"], "scratch")
                yield Places(base, state, temporary, scratch)
            assert list(temporary.iterdir()) == []


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is: nothing that a test counts is asked for because its source seems to be far away."""
    monkeypatch.setattr(link, "_FAR", math.inf)
    patch_workers(monkeypatch, "import math; from clipfs.blocks import link; link._FAR = math.inf")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """See `tests.beside`."""
    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _nothing_left_behind(places: Places, request: pytest.FixtureRequest) -> Iterator[None]:
    """See `tests.leftovers`. What larger-scoped fixtures hold is there before it."""
    with nothing_left_behind(places, alone=not is_beside_others(request.node)) as forgiven:
        yield
        # What the test was given is nobody's any more, and ends if that is how it ends. A report has more of it.
        (request.node.funcargs or {}).clear()  # none of a test that Ctrl-C has ended
        if request.node.stash.get(_FAILED, False):
            forgiven.add("descriptor")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Note whether a test failed, for its fixtures."""
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.fixture(scope="session")
def demo_image() -> str:
    """The name of the demo image, which is made first if need be."""
    require_programs("mmdebstrap")
    if not (_DEMO / "oci" / "index.json").exists():
        assert demo.main(["demo", str(_DEMO)]) == 0
    return f"oci:{_DEMO}/oci:latest"


@pytest.fixture(scope="session")
def demo_unpacked(demo_image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo image as umoci unpacks it: what it must look like. Not to be written to."""
    require_root()
    require_programs("umoci")
    return unpack(demo_image, tmp_path_factory.mktemp("unpacked") / "root")


def unpack(image: str, target: Path) -> Path:
    """Unpack ``oci:DIR:TAG`` by umoci; the root directory."""
    subprocess.run(["umoci", "raw", "unpack", "--image", image.removeprefix("oci:"), target], check=True, timeout=100)
    return target
