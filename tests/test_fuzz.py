"""The targets of `tests.fuzz`: on what is kept of former runs, on structured inputs, and for a moment under atheris.

``make fuzz`` is the long form.
"""

from __future__ import annotations

import importlib.util
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipfs.blocks import plan as plan_module
from clipfs.compression import codec
from clipfs.errors import FormatError
from clipfs.format import check
from clipfs.format.container import Span
from clipfs.format.index import Index
from clipfs.layers import members
from clipfs.layers.tree import Tree
from clipfs.names import Reference
from tests.clips import TreeBuilder, seen_in_index, seen_in_tree, write_clip
from tests.conftest import require, require_programs
from tests.fuzz import CORPUS, FOUND, TARGETS, Change, Target, __main__, corpora, load
from tests.fuzz import plan as plan_target
from tests.fuzz import tar as tar_target

# Seconds under atheris for each target; starting it takes two more.
_MOMENT = 5

KEPT = sorted(path for path in FOUND.glob("*/*") if path.is_file())


def inputs(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


# --- what is kept


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(target: str) -> None:
    found = inputs(target)
    assert len(found) > 15
    for path in found:
        try:
            load(target).one(path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{path} is not handled") from error


@pytest.mark.parametrize("path", KEPT, ids=[f"{path.parent.name}/{path.name}" for path in KEPT])
def test_what_once_failed(path: Path) -> None:
    load(path.parent.name).one(path.read_bytes())


def test_something_is_kept() -> None:
    assert KEPT
    assert {path.parent.name for path in KEPT} <= set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.glob("*/*")) < 1 << 20


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_are_in_the_corpus(target: str) -> None:
    """`python -m tests.fuzz.corpora` puts them there."""
    kept = {path.read_bytes() for path in inputs(target)}
    named = {path.name for path in inputs(target)}
    for name, content in load(target).seeds():
        assert content in kept or corpora.file_name(name) in named, name


def test_clips_that_pass_the_check_are_sound_to_others(tmp_path: Path) -> None:
    """The kernel is handed what passes; EROFS' own checker has the last word on it."""
    require_programs("fsck.erofs")
    target, chance, clip, device = load("clip"), random.Random(3), tmp_path / "clip", tmp_path / "device"
    kept = [path.read_bytes() for path in [*inputs("clip"), *(FOUND / "clip").iterdir()]]
    sound = [content for content in kept if data_size(content, clip) is not None]
    accepted = 0
    for number, content in enumerate(
        [*sound, *(target.mutate(chance.choice(sound), _same, chance) for _ in range(150))]
    ):
        size = data_size(content, clip)
        if size is None:
            continue
        accepted += 1
        with device.open("wb") as file:
            file.truncate(min(max(size, 4096), 1 << 40))
        done = subprocess.run(["fsck.erofs", f"--device={device}", clip], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"input {number}: {done.stderr}{done.stdout}"
    assert accepted > 50


def data_size(content: bytes, clip: Path) -> int | None:
    """Of the data space, if the content passes the check as the file `clip`."""
    clip.write_bytes(content)
    try:
        with Index.open(clip) as index:
            index.check()
            return index.data_size
    except FormatError:
        return None


def test_a_corpus_learns_what_takes_new_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "CORPUS", tmp_path / "corpus")
    learnt, kept = tmp_path / "learnt", tmp_path / "corpus" / "plan"
    for directory in (learnt, kept):
        directory.mkdir(parents=True)
    (kept / "nothing").write_bytes(b"")
    (learnt / "same").write_bytes(b"\0")
    for name, content in load("plan").seeds():
        (learnt / name).write_bytes(content)
    assert 0 < corpora.learn("plan", learnt) < len(list(learnt.iterdir())) - 1
    assert corpora.learn("plan", learnt) == 0


# --- the targets themselves: each sees what is wrong


def _keeps_nothing(tree: Tree) -> tuple[list[Any], int]:
    extents, size = _finish(tree)
    return extents[1:], size


_finish = Tree.finish


def _unverified(plain: bytes, span: Span) -> bytes:
    return plain


def _one_short(index: plan_module.IndexView, address: int, length: int) -> list[plan_module.Piece]:
    return _plan(index, address, length)[:-1]


_plan = plan_module.plan


def _no_bounds(name: bytes) -> bytes:
    return name.split(b"/")[50]


# What is broken, which target sees it, and as what.
BREAKS: dict[str, tuple[object, str, Any, str, type[Exception]]] = {
    "an exception that is none of ours": (members, "cleaned", _no_bounds, "tar", IndexError),
    "contents that are lost": (Tree, "finish", _keeps_nothing, "tar", AssertionError),
    "a check that sees nothing": (check, "check_tree", print, "clip", AssertionError),
    "bytes that nobody verified": (codec, "_verified", _unverified, "spans", AssertionError),
    "a read that ends too early": (plan_target, "plan", _one_short, "plan", AssertionError),
    "a name that is another's": (Reference, "__str__", lambda _: "other/name", "oci", AssertionError),
}


@pytest.mark.parametrize("name", BREAKS)
def test_targets_see_faults(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, what, broken, target, expected = BREAKS[name]
    module = load(target)
    contents = [path.read_bytes() for path in inputs(target)]
    chance = random.Random(1)
    contents += [module.mutate(chance.choice(contents), _same, chance) for _ in range(300)]
    monkeypatch.setattr(where, what, broken)
    with pytest.raises(expected):
        _all(module, contents)


def _all(target: Target, contents: Sequence[bytes]) -> None:
    for content in contents:
        target.one(content)


def test_findings_get_a_name_and_are_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "cleaned", _no_bounds)
    for number, path in enumerate([CORPUS / "tar" / "sparse-0.0", CORPUS / "tar" / "sparse-0.1"]):
        (tmp_path / f"crash-{number}").write_bytes(path.read_bytes())
        kept = __main__.keep("tar", tmp_path / f"crash-{number}", tmp_path / "found")
        assert kept.name.startswith("IndexError-in-test_fuzz._no_bounds-")
    (tmp_path / "timeout-1").write_bytes(b"slow")
    assert __main__.keep("tar", tmp_path / "timeout-1", tmp_path / "found").name.startswith("timeout-")
    assert len(list((tmp_path / "found" / "tar").iterdir())) == 2


def test_what_takes_long_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor's time: a machine that stands still makes no input a finding."""
    content = (CORPUS / "tar" / "sparse-0.0").read_bytes()
    assert not __main__.slow("tar", content)
    monkeypatch.setattr(__main__, "_SECONDS", 0.2)

    def turning(*_: object) -> list[Any]:
        while True:
            pass

    monkeypatch.setattr(tar_target, "_walked", turning)
    assert __main__.slow("tar", content)

    def waiting(*_: object) -> list[Any]:
        time.sleep(0.2)
        return []

    monkeypatch.setattr(tar_target, "_walked", waiting)
    assert not __main__.slow("tar", content)


# --- structured inputs


def _same(data: bytes, limit: int) -> bytes:
    return data[:limit]


def _change(chance: random.Random) -> Change:
    """What stands in for the fuzzer's own mutations: a few bytes replaced, dropped or doubled."""

    def change(data: bytes, limit: int) -> bytes:
        out = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(out) + 1)
            out[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        return bytes(out[:limit])

    return change


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), seed=st.integers(0, 1 << 32), steps=st.integers(1, 6))
def test_mutations(target: str, data: st.DataObject, seed: int, steps: int) -> None:
    """A few steps away from the corpus, by the mutators that the fuzzer uses too."""
    module = load(target)
    content = data.draw(st.sampled_from(inputs(target))).read_bytes()
    chance = random.Random(seed)
    for _ in range(steps):
        content = module.mutate(content, _change(chance), chance)[: module.LIMIT]
        module.one(content)


_NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: not {0, 0x2F} & set(name) and name not in (b".", b"..")
)
_XATTRS = st.dictionaries(
    st.sampled_from([b"user.a", b"user.b", b"trusted.t", b"security.capability", b"system.posix_acl_access"]),
    st.binary(max_size=80),
    max_size=3,
)
_ATTRIBUTES = st.fixed_dictionaries(
    {
        "uid": st.integers(0, (1 << 32) - 2),
        "gid": st.integers(0, (1 << 32) - 2),
        "mtime_ns": st.integers(-(1 << 62), 1 << 62),
        "xattrs": _XATTRS,
    }
)
_KINDS = st.sampled_from(["file", "sparse", "directory", "symlink", "device", "fifo", "hard link"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(st.tuples(_PATHS, _KINDS, _ATTRIBUTES, st.integers(0, 9000)), max_size=25))
def test_any_tree_is_what_its_clip_says(tmp_path_factory: pytest.TempPathFactory, steps: Sequence[Any]) -> None:
    tree = TreeBuilder()
    for parts, kind, attributes, number in steps:
        _grow(tree, parts, kind, attributes, number)
    built = tree.finish()
    path = write_clip(tmp_path_factory.getbasetemp() / "any.clip", built)
    with Index.open(path) as index:
        index.check()
        assert seen_in_index(index) == seen_in_tree(built.root)


def _grow(tree: TreeBuilder, parts: list[bytes], kind: str, attributes: dict[str, Any], number: int) -> None:
    """Add something, unless what is there already is in the way."""
    at = tree.root
    for part in parts[:-1]:
        found = (at.children or {}).get(part)
        if found is None:
            break
        if found.children is None:
            return
        at = found
    else:
        if parts[-1] in (at.children or {}):
            return
    path = b"/".join(parts)
    if kind == "directory":
        tree.directory(path, **attributes)
    elif kind == "symlink":
        tree.symlink(path, b"t" * (number % 4095 + 1), **attributes)
    elif kind == "device":
        tree.special(path, stat.S_IFCHR, os.makedev(number % 4096, number + 1), **attributes)
    elif kind == "fifo":
        tree.special(path, stat.S_IFIFO, **attributes)
    elif kind == "hard link" and tree.contents:
        tree.add(path, tree.contents[number % len(tree.contents)][0])
    else:
        stored = [(number // 3, number // 4)] if kind == "sparse" and number > 4 else None
        tree.file(path, bytes(number), stored=stored, **attributes)


# --- under atheris


@pytest.mark.parametrize("target", TARGETS)
def test_a_moment_of_fuzzing(target: str, tmp_path: Path) -> None:
    require(importlib.util.find_spec("atheris") is not None, "atheris (make fuzz installs it)")
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", str(_MOMENT), target]
    command += ["--state", str(tmp_path / "state"), "--found", str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    row = done.stdout.splitlines()[-1].split()
    assert row[0] == target
    assert row[-1] == "none"
    assert int(row[1].replace(",", "")) > 50
    assert list((tmp_path / "state" / target).iterdir())


def test_unknown_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["nothing"])
    assert "there is no target nothing" in capsys.readouterr().err
