"""Imports point one way, modules stay small, and the public names are what they say."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import assembler
import clipfs

ROOT = Path(__file__).parent.parent

# From the ground up; a module imports what stands before it, wherever in the module the import statement is.
ORDER = (
    "clipfs.errors",
    "clipfs.aside",
    "clipfs.fields",
    "clipfs.log",
    "clipfs.names",
    "clipfs.program",
    "clipfs.oci",
    "clipfs.erofs.structs",
    "clipfs.erofs.pack",
    "clipfs.erofs.read",
    "clipfs.format.container",
    "clipfs.format.pack",
    "clipfs.format.tables",
    "clipfs.compression.deflate",
    "clipfs.compression.zstd",
    "clipfs.compression.codec",
    "clipfs.compression.windows",
    "clipfs.compression.ledger",
    "clipfs.compression.stretch",
    "clipfs.compression.spans",
    "clipfs.layers.pax",
    "clipfs.layers.members",
    "clipfs.layers.bounds",
    "clipfs.layers.sparse",
    "clipfs.layers.layer",
    "clipfs.layers.entries",
    "clipfs.layers.chunks",
    "clipfs.layers.toc",
    "clipfs.layers.tree",
    "clipfs.format.check",
    "clipfs.format.index",
    # Below this line, trio.
    "clipfs.blocking",
    "clipfs.blocks.plan",
    "clipfs.blocks.cache",
    "clipfs.blocks.counters",
    "clipfs.blocks.journal",
    "clipfs.blocks.ahead",
    "clipfs.blocks.store",
    "clipfs.blocks.opened",
    "clipfs.blocks.locks",
    "clipfs.blocks.disk",
    "clipfs.blocks.arrival",
    "clipfs.blocks.frames",
    "clipfs.blocks.keeper",
    "clipfs.blocks.loader",
    "clipfs.blocks.loads",
    "clipfs.blocks.tier",
    "clipfs.blocks.flight",
    "clipfs.blocks.link",
    "clipfs.blocks.lane",
    "clipfs.blocks.carrier",
    "clipfs.blocks.flights",
    "clipfs.blocks.prefetch",
    "clipfs.blocks.trace",
    "clipfs.blocks.reader",
    "clipfs.sources.base",
    "clipfs.sources.redact",
    "clipfs.sources.retry",
    "clipfs.sources.credentials",
    "clipfs.sources.auth",
    "clipfs.sources.addresses",
    "clipfs.sources.answers",
    "clipfs.sources.proxies",
    "clipfs.sources.wire",
    "clipfs.sources.transport",
    "clipfs.sources.layout",
    "clipfs.sources.archive",
    "clipfs.sources.docker_archive",
    "clipfs.sources.mirrors",
    "clipfs.sources.registry",
    "clipfs.sources",
    "clipfs.sources.fetcher",
    "clipfs.sources.place",
    "clipfs.sources.web",
    "clipfs.sources.packed",
    "clipfs.mounting.mountinfo",
    "clipfs.state",
    "clipfs.mounting.options",
    "clipfs.mounting.kernel",
    "clipfs.mounting.control",
    "clipfs.mounting.connection",
    "clipfs.mounting.checked",
    "clipfs.mounting.child",
    "clipfs.mounting.views",
    "clipfs.mounting.supervisor",
    "clipfs.reports.report",
    "clipfs.reports.reporter",
    "clipfs.reports.wording",
    "clipfs.reports.picture",
    "clipfs.reports.page",
    "clipfs.reports.metrics",
    "clipfs.building.webclip",
    "clipfs.building.contents",
    "clipfs.building.layer_pass",
    "clipfs.building.builder",
    "clipfs.building.rootfs",
    "clipfs.building.pile",
    "clipfs.building.packer",
    "clipfs.building.extractor",
    "clipfs.mounting.dataspace",
    "clipfs.mounting.attributes",
    "clipfs.mounting.fs",
    "clipfs.mounting.loop",
    "clipfs.mounting.beginning",
    "clipfs.mounting.session",
    "clipfs.mounting.worker",
    "clipfs.mounting.service",
    "clipfs.mounting.daemon",
    "clipfs.mounting.mounter",
)
FIRST_WITH_TRIO = ORDER.index("clipfs.blocking")

# Where the public names come together and where the command line begins: these may look at anything below them.
PACKAGES = ("blocks", "building", "compression", "erofs", "format", "layers", "mounting", "reports")
FACADES = ("clipfs", "clipfs.__main__", *(f"clipfs.{package}" for package in PACKAGES))

WITH_FUSE = tuple(f"clipfs.mounting.{name}" for name in ("attributes", "fs", "loop", "session"))

# Of the modules that see what the HTTP client answers, one sends what it asks.
WITH_HTTP = tuple(f"clipfs.sources.{name}" for name in ("answers", "wire", "transport", "registry", "web"))


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


CLIPFS, ASSEMBLER = modules("clipfs"), modules("assembler")
CORE = {name: path for name, path in CLIPFS.items() if not name.startswith("clipfs.cli") and name not in FACADES}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, as precisely as the statement says it."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in CLIPFS or whole in ASSEMBLER else str(node.module)


def test_the_order_names_every_module() -> None:
    assert sorted(ORDER) == sorted(CORE)


@pytest.mark.parametrize("name", CORE)
def test_imports_point_one_way(name: str) -> None:
    allowed = ORDER[: ORDER.index(name)]
    wrong = [other for other in imported(CORE[name]) if other.split(".")[0] == "clipfs" and other not in allowed]
    assert wrong == []
    assert not [other for other in imported(CORE[name]) if other.split(".")[0] == "assembler"]


@pytest.mark.parametrize("name", ORDER[:FIRST_WITH_TRIO])
def test_no_loop_in_the_lower_half(name: str) -> None:
    assert not {"trio", "pyfuse3", "httpx2"} & {other.split(".")[0] for other in imported(CORE[name])}


def test_who_knows_whom() -> None:
    for name, path in CLIPFS.items():
        known = set(imported(path))
        if name.startswith("clipfs.sources"):
            assert not {"clipfs.format.index", "clipfs.erofs.structs"} & known, (
                f"{name}: sources know digests, never inodes"
            )
        if "pyfuse3" in known:
            assert name in WITH_FUSE, f"{name}: FUSE is an adapter's business"
        if "httpx2" in known:
            assert name in WITH_HTTP, f"{name}: there is one HTTP client"


@pytest.mark.parametrize("name", ASSEMBLER)
def test_the_assembler_uses_the_public_library_only(name: str) -> None:
    ours = {other for other in imported(ASSEMBLER[name]) if other.split(".")[0] == "clipfs"}
    assert ours <= {"clipfs"}


def test_the_assembler_has_no_cycle() -> None:
    pending = {name: {o for o in imported(path) if o in ASSEMBLER and o != name} for name, path in ASSEMBLER.items()}
    while pending:
        free = [name for name, needs in pending.items() if not needs & set(pending)]
        assert free, f"a cycle among {sorted(pending)}"
        for name in free:
            del pending[name]


@pytest.mark.parametrize("path", [*CLIPFS.values(), *ASSEMBLER.values()], ids=str)
def test_modules_can_be_read_in_one_go(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 330
    tree = ast.parse(source)
    assert not source or ast.get_docstring(tree), "a module opens by saying what it owns"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno <= 75, f"{node.name} does not fit a screen"


@pytest.mark.parametrize("library", [clipfs, assembler])
def test_public_names_exist_and_are_documented(library: object) -> None:
    names = library.__all__  # type: ignore[attr-defined]
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(library, name).__doc__, f"{library} {name}"


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonesuch"):
        clipfs.nonesuch  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "late"),
    [
        ("import clipfs, assembler", {"trio", "pyfuse3", "httpx2", "isal", "zstandard", "argparse"}),
        ("import clipfs.cli.main", {"trio", "pyfuse3", "httpx2", "isal", "zstandard", "prometheus_client"}),
        ("import clipfs.cli.helper", {"trio", "pyfuse3", "httpx2", "isal", "zstandard", "argparse"}),
        ("import clipfs; clipfs.mount, clipfs.Index", {"trio", "pyfuse3", "httpx2", "isal"}),
        ("import clipfs; clipfs.build, clipfs.extract", {"httpx2", "pyfuse3"}),
        (
            "import clipfs.mounting.session",
            {f"clipfs.sources.{name}" for name in ("registry", "layout", "archive", "web")},
        ),
    ],
)
def test_what_is_expensive_is_imported_late(statement: str, late: set[str]) -> None:
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not late & set(done.stdout.split())
