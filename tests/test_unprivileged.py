"""Mounts of a user who is not root: fusermount3 makes them, and whoever may ends them.

All of it happens in a mount namespace of its own, where /dev/fuse is open to all as it is on most machines, and where
the interpreter and our code are in places that everybody can read, wherever the repository is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import clipfs
from tests.conftest import require_programs, require_root
from tests.mounts import run

pytest_plugins = ("tests.mount_fixtures",)

REPOSITORY = Path(__file__).parent.parent
NOBODY = "setpriv --reuid 65534 --regid 65534 --clear-groups --"

# $1 is a public directory; $python runs our code for anybody.
PREAMBLE = f"""
set -e
cd "$1"
world="$1/world"
mkdir "$world"
mount -t tmpfs -o mode=755 none "$world"
mkdir -p "$world/base" "$world/site" "$world/code/clipfs" "$world/code/assembler"
mount --bind {sys.base_prefix} "$world/base"
mount --bind {sysconfig.get_path("purelib")} "$world/site"
mount --bind {REPOSITORY}/clipfs "$world/code/clipfs"
mount --bind {REPOSITORY}/assembler "$world/code/assembler"
mknod -m 666 "$world/fuse" c 10 229
mount --bind "$world/fuse" /dev/fuse
python="$world/python"
cat > "$python" <<END
#!/bin/sh
export PYTHONPATH="$world/code:$world/site" PYTHONDONTWRITEBYTECODE=1 LD_LIBRARY_PATH="$world/base/lib"
exec "$world/base/bin/python3.{sys.version_info.minor}" "\\$@"
END
chmod 755 "$python"
set +e
"""

# What the scripts in Python begin with. `wait` is bounded: a pidfd says when the process has ended.
PYTHON = """
import os, select, subprocess, sys, clipfs
from clipfs import MountError, MountOptions, state
from clipfs.mounting import mountinfo
place = "home/mnt"
def wait(mounted):
    try:
        with open(os.pidfd_open(mounted.pid), "rb", buffering=0) as process:
            assert select.select([process], [], [], 20)[0], "it does not end"
    except ProcessLookupError:
        pass
"""


@pytest.fixture
def home(image: str, public: Path) -> Path:
    """A directory of nobody's, with a mountpoint in it; beside it are the image and its index, for all to read."""
    require_root()
    require_programs("fusermount3", "setpriv", "unshare")
    layout = public / "oci"
    shutil.copytree(image.split(":")[1], layout)
    clipfs.build(f"oci:{layout}:latest", public / "small.clip")
    (public / "home" / "mnt").mkdir(parents=True)
    for path in (public / "home", public / "home" / "mnt"):
        os.chown(path, 65534, 65534)
    return public / "home"


def shell(home: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script as root in the prepared namespace; ``$nobody COMMAND`` is what somebody else does."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CLIPFS_STATE": str(home / "state"), "nobody": NOBODY}
    return run("unshare", "--mount", "sh", "-c", PREAMBLE + script, "sh", home.parent, env=environment)


def python(home: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a Python script as nobody."""
    (home.parent / "script.py").write_text(PYTHON + script)
    return shell(home, '$nobody "$python" script.py')


def test_mount_read_unmount(home: Path) -> None:
    done = python(
        home,
        """
with clipfs.mount("small.clip", place) as mounted:
    print(sorted(os.listdir(place)), open(place + "/hello").read().strip(), os.stat(place + "/secret").st_uid)
    try:
        open(place + "/secret")
    except PermissionError:
        print("permissions hold")
wait(mounted)
print(mountinfo.top_at(os.path.abspath(place)), state.records())
""",
    )
    assert done.stderr == ""
    listing, held, after = done.stdout.splitlines()
    assert listing == "['big', 'bin', 'hello', 'secret', 'usr', 'zero'] hello 0"
    assert (held, after) == ("permissions hold", "None []")


def test_it_ends_whoever_ends_it(home: Path) -> None:
    done = python(
        home,
        """
for end in ("umount", "umount -l", "fusermount3 -u", "fusermount3 -u -z", sys.executable + " -m clipfs umount"):
    mounted = clipfs.mount("small.clip", place)
    subprocess.run([*end.split(), place], check=True)
    wait(mounted)
    assert mountinfo.top_at(os.path.abspath(place)) is None, end
    assert state.records() == [], end
    print(end)
for number in (15, 2):
    mounted = clipfs.mount("small.clip", place)
    os.kill(mounted.pid, number)
    wait(mounted)
    assert mountinfo.top_at(os.path.abspath(place)) is None, number
    print(number)
""",
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 7


def test_a_mount_in_use_and_a_process_that_was_killed(home: Path) -> None:
    done = python(
        home,
        """
mounted = clipfs.mount("small.clip", place)
file = open(place + "/big", "rb")
try:
    mounted.unmount()
except MountError as error:
    print(error)
mounted.unmount(force=True)
wait(mounted)
print(mountinfo.top_at(os.path.abspath(place)))
try:
    file.close()
except OSError:
    pass
mounted = clipfs.mount("small.clip", place)
[record] = state.records()
for process in (record.process, record.worker):
    os.kill(process.pid, 9)
    wait(process)
print(len(clipfs.gc()), mountinfo.top_at(os.path.abspath(place)), clipfs.mounts())
""",
    )
    assert done.stderr == ""
    busy, forced, cleaned = done.stdout.splitlines()
    assert "in use" in busy or "busy" in busy
    assert (forced, cleaned) == ("None", "1 None []")


def test_the_command_cleans_up_beside_roots_containers(home: Path) -> None:
    """They are where nobody else can look; that is no reason to leave his own mounts."""
    (home.parent / "containers" / "web").mkdir(parents=True)
    (home.parent / "containers").chmod(0o700)
    done = python(
        home,
        """
mounted = clipfs.mount("small.clip", place)
[record] = state.records()
for process in (record.process, record.worker):
    os.kill(process.pid, 9)
    wait(process)
command = [sys.executable, "-m", "clipfs", "gc"]
environ = {**os.environ, "CLIPFS_CONTAINERS": os.path.abspath("containers")}
subprocess.run(command, env=environ, check=True, stderr=sys.stdout)
print(mountinfo.top_at(os.path.abspath(place)), flush=True)
print(subprocess.run([*command, "--base", "containers"], stderr=sys.stdout).returncode)
""",
    )
    assert done.stderr == ""
    removed, left, refused, code = done.stdout.splitlines()
    assert (removed, left) == (f"removed mount {home}/mnt", "None")
    assert (code, "Permission denied" in refused) == ("74", True)


def test_a_worker_that_dies_and_one_that_is_replaced(home: Path) -> None:
    """Takeover and upgrade need no more rights than the mount: the supervisor has the descriptor."""
    done = python(
        home,
        """
with clipfs.mount("small.clip", place, MountOptions(cache=1 << 20, cache_size=0, prefetch="none")) as mounted:
    def worker():
        [record] = state.records()
        return record.worker
    whole = open(place + "/big", "rb").read()
    first = worker()
    os.kill(first.pid, 9)
    print(open(place + "/big", "rb").read() == whole, os.listdir(place + "/usr/bin"))
    mounted.upgrade()
    second = worker()
    print(open(place + "/big", "rb").read() == whole, second != first, second.alive)
    status = open(f"/proc/{second.pid}/status").read().split()
    print(status[status.index("NoNewPrivs:") + 1], status[status.index("CapEff:") + 1])
wait(mounted)
""",
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["True ['id']", "True True True", "1 0000000000000000"]


def test_others_look_in_only_if_the_machine_s_owner_lets_them(home: Path) -> None:
    done = shell(
        home,
        """
        # Not even root may look into the mount of somebody who could make it hang.
        mount="$nobody $python -m clipfs mount small.clip home/mnt"
        $mount && cat home/mnt/hello 2>&1
        $nobody "$python" -m clipfs umount home/mnt
        $mount -o allow_other; echo $?
        echo user_allow_other > fuse.conf && mount --bind fuse.conf /etc/fuse.conf
        $mount -o allow_other && cat home/mnt/hello
        $nobody "$python" -m clipfs umount home/mnt
        """,
    )
    assert done.stdout == "cat: home/mnt/hello: Permission denied\n32\nhello\n"
    assert done.stderr.count("\n") == 1
    assert "user_allow_other" in done.stderr


def test_what_fusermount_refuses_is_told_in_its_words(home: Path) -> None:
    done = shell(
        home,
        """
        mkdir theirs
        $nobody "$python" -m clipfs mount small.clip theirs; echo $?
        chmod 600 "$world/fuse"
        $nobody "$python" -m clipfs mount small.clip home/mnt; echo $?
        umount /dev/fuse; mount --bind /dev/null /dev/fuse
        $nobody "$python" -m clipfs mount small.clip home/mnt; echo $?
        """,
    )
    assert done.stdout.split() == ["32"] * 3
    theirs, closed, absent = done.stderr.splitlines()
    assert "write access to mountpoint" in theirs
    assert "/dev/fuse: Permission denied" in closed
    assert "cannot mount on" in absent


def test_what_fusermount_refuses_of_a_name_that_is_no_text(home: Path) -> None:
    done = shell(
        home,
        """
        odd="home/$(printf '\\377')"
        $nobody mkdir "$odd"
        $nobody "$python" -m clipfs mount small.clip "$odd"
        $nobody sh -c 'exec 3<"$2/hello"; "$1" -m clipfs umount "$2"; echo $?' sh "$python" "$odd"
        $nobody "$python" -m clipfs umount "$odd"; echo $?
        """,
    )
    assert done.stdout.split() == ["32", "0"]
    assert done.stderr.count("\n") == 1
    assert "\\xff: Device or resource busy" in done.stderr


def test_a_line_of_fstab_that_says_user(home: Path) -> None:
    """mount(8) drops its privileges before it starts us; umount(8) knows whose mount it is by the kernel's word."""
    (home.parent / "fstab").write_text(f"{home.parent}/small.clip {home}/mnt clipfs user,noauto,_netdev 0 0\n")
    done = shell(
        home,
        """
        mkdir sbin
        printf '#!/bin/sh\\nexec %s -m clipfs.cli.helper "$@"\\n' "$python" > sbin/mount.clipfs
        chmod +x sbin/mount.clipfs
        mount -t overlay sbin -o "lowerdir=$PWD/sbin:/usr/sbin" /usr/sbin
        mount --bind fstab /etc/fstab
        for end in "umount" "umount -l" "fusermount3 -u"; do
            $nobody mount home/mnt && $nobody cat home/mnt/hello && $nobody $end home/mnt || echo "not by $end"
        done
        $nobody mount home/mnt && setpriv --reuid 1 --regid 1 --clear-groups umount home/mnt 2>/dev/null
        echo "others: $?"
        umount home/mnt; echo "root: $?"
        """,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["hello"] * 3 + ["others: 32", "root: 0"]


def test_a_user_without_a_home(home: Path) -> None:
    """The mount works, it just keeps nothing on disk. An index made on the way has no place, which is said."""
    done = shell(
        home,
        """
        mkdir -m 1777 run
        env="env -u CLIPFS_STATE -u HOME XDG_RUNTIME_DIR=$PWD/run"
        $nobody $env "$python" -m clipfs mount small.clip home/mnt -o "log=$PWD/home/log" && cat home/log
        $nobody cat home/mnt/hello
        $nobody $env "$python" -m clipfs umount home/mnt
        ls -A run/clipfs/mounts
        $nobody $env "$python" -m clipfs mount "oci:$PWD/oci:latest" home/mnt; echo $?
        # Who is not even in /etc/passwd.
        setpriv --reuid 4242 --regid 4242 --clear-groups $env "$python" -m clipfs inspect "oci:$PWD/oci:latest"; echo $?
        """,
    )
    assert "there is no cache on disk: cannot use directory" in done.stdout
    assert done.stdout.splitlines()[-3:] == ["hello", "74", "1"]
    homeless, nameless = done.stderr.splitlines()
    assert "cannot use directory" in homeless
    assert "set HOME or CLIPFS_CACHE" in nameless
