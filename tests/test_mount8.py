"""mount(8), umount(8) and fstab, with our helpers where they look for them, in a mount namespace of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require_root
from tests.mounts import files, run, settled

pytest_plugins = ("tests.mount_fixtures",)
pytestmark = pytest.mark.usefixtures("runtime")

REPOSITORY = Path(__file__).parent.parent

# Our helpers in /sbin, which is where mount(8) looks, of a mount namespace that ends with the script; as the README has
# it, they are links to the program that pip makes of an entry point.
PREAMBLE = """
set -e
mkdir "$1/sbin" "$1/upper" "$1/work"
printf '#!%s\\nimport sys\\nfrom clipfs.cli.helper import main\\nsys.exit(main())\\n' "$2" > "$1/installed"
chmod +x "$1/installed"
ln -s "$1/installed" "$1/sbin/mount.clipfs"
ln -s "$1/installed" "$1/sbin/mount.fuse.clipfs"
mount -t overlay sbin -o "lowerdir=$1/sbin:/usr/sbin" /usr/sbin
cd "$1"
set +e
"""


def in_namespace(directory: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script with our helpers in /sbin; it starts in `directory`."""
    require_root()
    command = ("unshare", "--mount", "sh", "-c", PREAMBLE + script, "sh", directory, sys.executable)
    return run(*command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})


@pytest.mark.parametrize("fstype", ["clipfs", "fuse.clipfs"])
def test_mount_finds_us(clip: Path, tmp_path: Path, runtime: Path, fstype: str, view: str) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "small.clip").symlink_to(clip)
    done = in_namespace(
        tmp_path,
        f"""
        mount -t {fstype} small.clip mnt -o ro,allow_other,cache=8M,log=log || exit
        cat mnt/hello; findmnt -no FSTYPE mnt
        mount -o remount,ro mnt; echo $?
        mount -o remount,noatime mnt; echo $?
        mount -o remount,rw mnt 2>&1 | grep -c read-only
        touch mnt/new 2>&1 | grep -c Read-only
        umount mnt; echo $? $(ls mnt | wc -l)
        """,
    )
    assert done.stderr == ""
    # Of EROFS, mount(8) asks the kernel, who agrees and changes nothing.
    refused = "1" if view == "fuse" else "0"
    fstype = "fuse.clipfs" if view == "fuse" else "erofs"
    assert done.stdout.split() == ["hello", fstype, "0", "0", refused, "1", "0", "0"]
    assert " serving " in (tmp_path / "log").read_text()
    assert (settled(), files(runtime)) == ([], [])


def test_a_line_of_fstab(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "small.clip").symlink_to(clip)
    options = "ro,_netdev,nofail,noatime,x-systemd.automount,x-systemd.idle-timeout=60,cache=8M"
    line = f"{tmp_path}/small.clip {tmp_path}/mnt clipfs {options} 0 0\n"
    (tmp_path / "fstab").write_text(line)
    done = in_namespace(
        tmp_path,
        """
        mount -T fstab "$1/mnt" || exit
        cat mnt/hello
        umount mnt
        mount -T fstab -a && cat mnt/hello && umount mnt
        """,
    )
    assert (done.stdout, done.stderr) == ("hello\nhello\n", "")


def test_mount_passes_on_what_went_wrong(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    done = in_namespace(
        tmp_path,
        """
        mount -t clipfs none.clip mnt; echo $?
        mount -t clipfs none.clip mnt -o frobnicate; echo $?
        """,
    )
    assert done.stdout == "32\n1\n"
    missing, unknown = done.stderr.splitlines()[:2]
    assert "there is no file" in missing
    assert "frobnicate" in unknown


def test_mount_in_another_namespace(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    done = in_namespace(
        tmp_path,
        f"""
        mkfifo ready hold
        unshare --mount sh -c 'echo > ready; read line < hold; cat mnt/hello; umount mnt' &
        read line < ready
        mount -N $! -t clipfs {shlex.quote(str(clip))} "$1/mnt"; echo $?
        ls mnt | wc -l
        echo > hold
        wait
        """,
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["0", "0", "hello"]


@pytest.fixture
def place(clip: Path, tmp_path: Path) -> Path:
    """A directory with ``small.clip`` and a mountpoint ``mnt``."""
    (tmp_path / "mnt").mkdir()
    (tmp_path / "small.clip").symlink_to(clip)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-n", ""),
        ("-v", "mount.clipfs: an image is read-only, and is mounted so"),
        ("-r -v", "is mounted on"),
        ("-s -o frobnicate", ""),
        ("-o noexec,nosuid,nodev,relatime,lazytime,sync,silent,auto,group", ""),
        ("-o user,comment=x,X-anything=1,x-systemd.requires=a.service,_netdev,nofail", ""),
    ],
)
def test_switches_and_options_of_mount_s_own(place: Path, words: str, said: str) -> None:
    done = in_namespace(place, f"mount {words} -t clipfs small.clip mnt; echo $?; cat mnt/hello; umount mnt")
    assert done.stderr == ""
    assert said in done.stdout
    assert done.stdout.endswith("0\nhello\n")


def test_a_fake_mount_is_none(place: Path) -> None:
    done = in_namespace(place, "mount -f -v -n -s -t clipfs small.clip mnt; echo $? $(ls mnt | wc -l)")
    assert done.stderr == ""
    assert "would mount" in done.stdout
    assert done.stdout.endswith("\n0 0\n")


def test_the_options_reach_the_kernel(place: Path) -> None:
    done = in_namespace(
        place,
        """
        mount -t clipfs small.clip mnt -o noexec,allow_suid,allow_dev; findmnt -no VFS-OPTIONS mnt; umount mnt
        mount -t clipfs small.clip mnt; findmnt -no VFS-OPTIONS mnt; umount mnt
        """,
    )
    assert done.stderr == ""
    given, usual = (set(line.split(",")) for line in done.stdout.split())
    assert {"ro", "noexec"} <= given
    assert not {"nosuid", "nodev"} & given
    assert {"ro", "nosuid", "nodev"} <= usual
    assert "noexec" not in usual


@pytest.mark.parametrize(
    ("view", "end"),
    [
        ("fuse", "umount mnt"),
        ("fuse", "umount -l mnt"),
        ("fuse", "umount SPEC"),
        ("fuse", "fusermount3 -u mnt"),
        ("fuse", "umount -a -t fuse.clipfs"),
        ("kernel", "umount mnt"),
        ("kernel", "umount -l mnt"),
    ],
    indirect=["view"],
)
def test_all_of_fstab_twice_is_once(place: Path, image: str, runtime: Path, view: str, end: str) -> None:
    """An image, by its name: the table of mounts shows that, or the helper knows."""
    (place / "fstab").write_text(f"{image} {place}/mnt clipfs _netdev,nofail,x-systemd.device-timeout=9 0 0\n")
    done = in_namespace(
        place,
        f"""
        mount -T fstab -a; echo $?
        mount -T fstab -a; echo $?
        findmnt -no SOURCE mnt
        grep -c "$1/mnt" /proc/self/mountinfo
        {end.replace("SPEC", image)}; echo $? $(ls mnt | wc -l)
        """,
    )
    assert done.stderr == ""
    first, second, source, mounted, ended = done.stdout.splitlines()
    assert (first, second, mounted, ended) == ("0", "0", "1", "0 0")
    assert source == image if view == "fuse" else "/checked/" in source
    assert (settled(), files(runtime)) == ([], [])


@pytest.mark.parametrize(
    ("spec", "options", "code", "said"),
    [
        ("none.clip", "nofail", 0, ""),
        ("none.clip", "ro", 32, "there is no file"),
        ("bad.clip", "nofail", 32, "is not a .clip file"),
    ],
)
def test_nofail_forgives_what_is_not_there_and_nothing_else(
    place: Path, spec: str, options: str, code: int, said: str
) -> None:
    (place / "fstab").write_text(f"{place}/{spec} {place}/mnt clipfs {options} 0 0\n")
    (place / "bad.clip").write_bytes(b"bad")
    done = in_namespace(place, "mount -T fstab -a; echo $?")
    assert done.stdout == f"{code}\n"
    assert said in done.stderr if said else done.stderr == ""


def test_the_exit_code_is_a_sentence_s(place: Path) -> None:
    """32 and one sentence for each; mount(8) adds nothing of its own."""
    (place / "bad.clip").write_bytes(b"bad")
    for spec, target, option in (
        ("none.clip", "mnt", "ro"),
        ("bad.clip", "mnt", "ro"),
        ("small.clip", "mnt", "log=/none/log"),
        ("oci:none", "mnt", "ro"),
        ("oci:none:tag", "mnt", "ro"),
    ):
        done = in_namespace(
            place, f"mount -t clipfs {spec} {target} -o {option}; echo $?; rm -r sbin upper work installed"
        )
        assert done.stdout == "32\n", (spec, done)
        assert done.stderr.startswith("mount.clipfs: ")
        assert done.stderr.count("\n") == 1


def test_the_process_outlives_the_session_that_started_it(place: Path) -> None:
    """mount(8) returns, whoever called it reads the end of its output, and its directory can be unmounted."""
    done = in_namespace(
        place,
        """
        mkdir elsewhere && mount -t tmpfs none elsewhere && cd elsewhere
        said=$(setsid mount -v -t clipfs ../small.clip ../mnt)
        cd .. && umount elsewhere && cat mnt/hello && umount mnt
        """,
    )
    assert (done.stdout, done.stderr) == ("hello\n", "")


def test_a_directory_that_is_mounted_when_somebody_looks(place: Path, runtime: Path) -> None:
    """``x-systemd.automount``: until it is mounted, the kernel lets nobody in but systemd's process group."""
    done = in_namespace(place, '"$2" -m tests.automount "$1/small.clip" "$1/mnt"; echo $?; umount mnt; umount mnt')
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"
    assert "hello" in done.stdout.splitlines()
    assert (settled(), files(runtime)) == ([], [])
