"""``mount.clipfs`` by direct calls: options, command line and exit codes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import clipfs
from clipfs import MountOptions, UsageError
from clipfs.building import builder
from clipfs.cli import helper
from clipfs.mounting import mountinfo, options
from clipfs.mounting.options import byte_count, parse
from tests.mounts import SECONDS, kill, record_of

pytest_plugins = ("tests.mount_fixtures",)


# --- options


def test_options_that_mean_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ca.pem").touch()
    text = "ro,allow_other,cache=1G,log=my.log,source=oci:/a:b,authfile=/dev/null,ca=ca.pem,insecure,suid,dev,noexec"
    assert parse(text).options == MountOptions(
        allow_other=True,
        cache=1 << 30,
        log=tmp_path / "my.log",
        source="oci:/a:b",
        authfile=Path("/dev/null"),
        ca=tmp_path / "ca.pem",
        insecure=True,
        suid=True,
        dev=True,
        noexec=True,
    )


MALFORMED = (
    "frobnicate", "cache", "cache=", "cache=lots", "allow_other=1", "log=", "timeout=0", "timeout=x", "timeout=nan",
    "view=x",
)  # fmt: skip


def test_options_that_are_mount_s_own_change_nothing() -> None:
    text = (
        "defaults,_netdev,nofail,user=joe,users,noatime,helper=x,uhelper=y,x-systemd.automount,X-mount.mkdir,noauto,rw"
    )
    assert parse(text).options == MountOptions()


def test_the_last_of_a_pair_wins() -> None:
    assert parse("suid,nosuid,nodev,dev,noexec,exec").options == MountOptions(dev=True)
    assert parse("ro,rw").writable
    assert not parse("rw,ro").writable
    assert not parse("").writable


@pytest.mark.parametrize(
    ("name", "absolute"),
    [
        ("oci:a/b:v1", "oci:/here/a/b:v1"),
        ("oci:/a:v1", "oci:/a:v1"),
        ("docker-archive:a.tar", "docker-archive:/here/a.tar"),
        ("clip:a.clip", "clip:/here/a.clip"),
        ("https://example.org/a.clip", "https://example.org/a.clip"),
        ("docker://example.org/a:v1", "docker://example.org/a:v1"),
        ("debian:12", "debian:12"),
    ],
)
def test_a_source_is_the_same_in_any_directory(
    name: str, absolute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(f"source={name}").options.source == absolute.replace("/here", str(tmp_path))


@pytest.mark.parametrize("text", MALFORMED)
def test_unknown_or_malformed_options_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(f"ro,{text},noatime")
    assert text.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize(("option", "what"), [("ca", "certificates"), ("authfile", "credentials")])
def test_files_that_are_not_there_are_missed_at_once(option: str, what: str) -> None:
    with pytest.raises(UsageError, match=f"cannot read {what} from /no/such: No such file or directory"):
        parse(f"{option}=/no/such")


def test_sloppy_forgives_unknown_options_only() -> None:
    assert parse("frobnicate,cache=1K", sloppy=True).options == MountOptions(cache=1024)
    with pytest.raises(UsageError):
        parse("cache=lots", sloppy=True)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("512", 512),
        ("64k", 65536),
        ("64M", 1 << 26),
        ("2GiB", 2 << 30),
        ("1tb", 1 << 40),
        (str((1 << 63) - 1), (1 << 63) - 1),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert byte_count(text, "cache=") == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "-1",
        "1.5G",
        "1X",
        "1MM",
        "0x10",
        "１",
        pytest.param("9" * 5000, id="thousands of digits"),
        str(1 << 63),
        "8388608T",
    ],
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="cache="):
        byte_count(text, "cache=")


# --- the protocol


def test_wrong_usage_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["one"],
        ["a", "b", "c"],
        ["a", "b", "-z"],
        ["a", "b", "-t", "ext4"],
        ["a", "b", "-o", "what"],
        [],
    ):
        assert helper.main(arguments) == 1, arguments
        assert capsys.readouterr().err
    assert helper.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: mount.clipfs")
    assert [name for name in options._VALUES if f"{name}=" not in text] == []


def test_a_mount_that_fails_is_exit_code_32_and_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.clip"
    broken.write_bytes(b"no clip")
    for spec, place in (
        (tmp_path / "none.clip", tmp_path),
        (broken, tmp_path),
        (broken, tmp_path / "none"),
        ("oci:none", "/"),
    ):
        assert helper.main([str(spec), str(place)]) == 32
        said = capsys.readouterr()
        assert said.err.startswith("mount.clipfs: ")
        assert said.err.count("\n") == 1
        assert said.out == ""


def test_an_error_that_nobody_is_told_has_its_exit_code() -> None:
    command = [sys.executable, "-m", "clipfs.cli.helper", "none.clip", "/none"]
    with open("/dev/full", "wb") as full:
        assert subprocess.run(command, stderr=full, timeout=SECONDS, check=False).returncode == 32


def test_who_interrupts_gets_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also while tasks wait for a registry, which tell of it in a group."""

    def interrupted(*_: object, **__: object) -> Path:
        raise BaseExceptionGroup("tasks", [KeyboardInterrupt()])

    monkeypatch.setattr(builder, "index_for", interrupted)
    assert helper.main(["docker://registry.invalid/app", str(tmp_path)]) == 8
    assert capsys.readouterr().err == "mount.clipfs: interrupted\n"


def test_a_remount_is_a_no_op_for_ro_and_refused_for_rw(capsys: pytest.CaptureFixture[str]) -> None:
    assert helper.main(["x.clip", "/none", "-o", "remount,ro,noatime"]) == 0
    assert helper.main(["x.clip", "/none", "-o", "remount,rw"]) == 32
    assert "read-only" in capsys.readouterr().err


def test_a_name_that_nobody_can_print() -> None:
    command = [sys.executable, "-m", "clipfs.cli.helper", "x.clip", os.fsdecode(b"/\xff"), "-v", "-o", "remount,ro"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"mount.clipfs: /\\udcff is read-only already\n"


@pytest.mark.usefixtures("runtime")
def test_a_remount_does_not_say_that_it_has_changed_something(
    clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str], view: str
) -> None:
    with clipfs.mount(clip, mountpoint, MountOptions(view=view, noexec=True)):
        for same in ("", "noexec", "nosuid,nodev,noexec"):
            assert helper.main([str(clip), str(mountpoint), "-o", f"remount,ro,{same}"]) == 0
        for other, named in (("exec", "noexec"), ("allow_suid", "suid"), ("noexec,dev,suid", "suid, dev")):
            assert helper.main([str(clip), str(mountpoint), "-o", f"remount,ro,{other}"]) == 32
            assert f"cannot be remounted with another setting of {named}; unmount it" in capsys.readouterr().err
    assert helper.main([str(clip), str(mountpoint), "-o", "remount,ro,noexec"]) == 32
    assert "there is no clipfs mount on" in capsys.readouterr().err


@pytest.mark.usefixtures("runtime")
def test_a_dead_mount_is_not_mounted_already(
    clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str], view: str
) -> None:
    kill(record_of(clipfs.mount(clip, mountpoint, MountOptions(name=str(clip), view=view))))
    assert helper.main([str(clip), str(mountpoint)]) == 32
    assert f"what served it has died, `umount {mountpoint}` or `clipfs gc` removes it" in capsys.readouterr().err
    assert [record.mountpoint for record in clipfs.gc()] == [str(mountpoint)]


@pytest.mark.usefixtures("runtime")
def test_a_path_of_the_same_words_is_another_file_elsewhere(
    clip: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("here", "there", "there"):
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        shutil.copy(clip, "x.clip")
        assert helper.main(["./x.clip", str(mountpoint)]) == 0
    found = sorted(record.clip for record in clipfs.mounts())
    for _ in found:
        clipfs.unmount(mountpoint)
    assert found == [f"{tmp_path}/here/x.clip", f"{tmp_path}/there/x.clip"]


def test_a_fake_mount_mounts_nothing(clip: Path, mountpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert helper.main([str(clip), str(mountpoint), "-fv", "-o", "rw"]) == 0
    assert "read-only" in capsys.readouterr().out
    assert mountinfo.top_at(str(mountpoint)) is None


@pytest.mark.usefixtures("runtime")
def test_an_image_name_is_indexed_first(image: str, mountpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert helper.main([image, str(mountpoint), "-v"]) == 0
    try:
        assert (mountpoint / "hello").read_text() == "hello\n"
        assert str(mountpoint) in capsys.readouterr().out
    finally:
        clipfs.unmount(mountpoint)
