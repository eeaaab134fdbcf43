"""From an image's config and what the user says to a runtime spec; no container runs here."""

from __future__ import annotations

import math
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

import clipfs
from assembler import RunOptions, Volume, resolving, runtime_spec
from assembler.command import command, first_read
from assembler.resolving import name_files
from assembler.spec import required_directories
from tests.containers import CONFIG


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("root:x:0:0::/root:\napp:x:1000:1000::/home/app:\n")
    (tmp_path / "etc" / "group").write_text("wheel:x:10:app\n")
    return tmp_path


def spec(root: Path, config: clipfs.ImageConfig = CONFIG, **options: Any) -> dict[str, Any]:
    return runtime_spec(config, RunOptions(**{"command": ("true",), "environ": {}, **options}), root, "web")


def environment(found: dict[str, Any]) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in found["process"]["env"])


def mounts(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["destination"]: each for each in found["mounts"]}


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "options", "words"),
    [
        (("e", "1"), ("c", "2"), {}, "e 1 c 2"),
        (("e", "1"), ("c",), {"command": ("u", "3")}, "e 1 u 3"),
        (("e",), ("c",), {"entrypoint": ("x", "4")}, "x 4"),
        (("e",), ("c",), {"entrypoint": ("x",), "command": ("u",)}, "x u"),
        (("e",), ("c",), {"entrypoint": (), "command": ("u",)}, "u"),
        ((), ("c", "2"), {}, "c 2"),
        ((), ("c", "2"), {"command": ("u",)}, "u"),
        (("e",), (), {}, "e"),
    ],
)
def test_command(entrypoint: tuple[str, ...], cmd: tuple[str, ...], options: dict[str, Any], words: str) -> None:
    config = replace(CONFIG, entrypoint=entrypoint, cmd=cmd)
    assert command(config, RunOptions(**options)) == tuple(words.split())


@pytest.mark.parametrize(("cmd", "options"), [((), {}), (("c",), {"entrypoint": ()}), (("",), {}), (("", "x"), {})])
def test_no_command(cmd: tuple[str, ...], options: dict[str, Any]) -> None:
    with pytest.raises(clipfs.UsageError, match="names no command of its own; say what to run in it"):
        command(replace(CONFIG, cmd=cmd), RunOptions(**options))


@pytest.mark.parametrize(
    ("program", "options", "files"),
    [
        ("sh", {}, ["/usr/local/sbin/sh", "/usr/local/bin/sh", "/usr/sbin/sh", "/usr/bin/sh", "/sbin/sh", "/bin/sh"]),
        ("/bin/sh", {"env": ("PATH=/opt",)}, ["/bin/sh"]),
        ("./serve", {"workdir": "/app"}, ["/app/./serve"]),
        ("bin/serve", {}, ["/srv/bin/serve"]),
        ("serve", {"env": ("PATH=/opt:bin::/x",)}, ["/opt/serve", "/srv/bin/serve", "/srv/serve", "/x/serve"]),
        ("serve", {"env": ("PATH",), "environ": {"PATH": "/mine"}}, ["/mine/serve"]),
    ],
)
def test_what_is_read_first(program: str, options: dict[str, Any], files: list[str]) -> None:
    config = replace(CONFIG, entrypoint=(program, "-x"), working_dir="srv")
    assert first_read(config, RunOptions(**options)) == ("/etc/passwd", *files)


def test_nothing_is_read_for_no_command() -> None:
    with pytest.raises(clipfs.UsageError, match="names no command of its own"):
        first_read(CONFIG, RunOptions())


def test_environment_of_nothing(root: Path) -> None:
    assert environment(spec(root, network="none")) == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOSTNAME": "web",
        "HOME": "/root",
    }


def test_environment_the_last_word_counts(root: Path) -> None:
    config = replace(CONFIG, env=("PATH=/image", "A=image", "B=image", "EMPTY=", "EQ=a=b", "BARE", "=odd"))
    given = ("A=user", "HOME=/mine", "FROM", "UNSET", "B", "B=again", "N=\n")
    found = environment(spec(root, config, env=given, environ={"FROM": "caller", "B": "caller", "A": "caller"}))
    assert found.items() >= {
        "PATH": "/image", "A": "user", "B": "again", "EMPTY": "", "EQ": "a=b", "BARE": "", "HOME": "/mine",
        "FROM": "caller", "N": "\n",
    }.items()  # fmt: skip
    assert not {"UNSET", "", "TERM"} & found.keys()


def test_a_terminal_has_a_kind_and_the_image_may_choose_it(root: Path) -> None:
    assert environment(spec(root, tty=True))["TERM"] == "xterm"
    assert environment(spec(root, replace(CONFIG, env=("TERM=vt100",)), tty=True))["TERM"] == "vt100"
    assert spec(root, tty=True)["process"]["terminal"] is True


def test_user_of_the_image_and_of_the_caller(root: Path) -> None:
    config = replace(CONFIG, user="app")
    found = spec(root, config)
    assert found["process"]["user"] == {"uid": 1000, "gid": 1000, "additionalGids": [10, 1000], "umask": 0o022}
    assert environment(found)["HOME"] == "/home/app"
    assert spec(root, config, user="0:0")["process"]["user"]["uid"] == 0
    # An empty variable of a shell is no reason to be root.
    assert spec(root, config, user="")["process"]["user"]["uid"] == 1000


def test_capabilities_are_dockers(root: Path) -> None:
    """As /proc/self/status in `docker run` says: 00000000a80425fb."""
    docker = 0xA80425FB
    bits = {
        "CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "FSETID": 4, "KILL": 5, "SETGID": 6, "SETUID": 7, "SETPCAP": 8,
        "NET_BIND_SERVICE": 10, "NET_RAW": 13, "SYS_CHROOT": 18, "MKNOD": 27, "AUDIT_WRITE": 29, "SETFCAP": 31,
    }  # fmt: skip
    found = spec(root)["process"]["capabilities"]
    assert sum(1 << bits[each.removeprefix("CAP_")] for each in found["bounding"]) == docker
    assert found["bounding"] == found["permitted"] == found["effective"]
    assert found["inheritable"] == found["ambient"] == []
    other = spec(root, user="app")["process"]["capabilities"]
    assert other == {**{key: [] for key in found}, "bounding": found["bounding"]}


@pytest.mark.parametrize(
    ("image", "user", "directory"),
    [("", None, "/"), ("/srv", None, "/srv"), ("srv/x", None, "/srv/x"), ("//srv", None, "/srv"), ("/srv", "/w", "/w")],
)
def test_working_directory(root: Path, image: str, user: str | None, directory: str) -> None:
    config, options = replace(CONFIG, working_dir=image), RunOptions(command=("true",), workdir=user)
    assert runtime_spec(config, options, root, "web")["process"]["cwd"] == directory
    assert directory in required_directories(config, options)


def test_what_must_exist(root: Path) -> None:
    config = replace(CONFIG, volumes=("/data", "cache"), working_dir="/srv")
    assert set(required_directories(config, RunOptions(required=("/x",)))) == {"/x", "/data", "cache", "/srv"}


def test_network(root: Path) -> None:
    host, none = spec(root), spec(root, network="none")
    kinds = {each["type"] for each in host["linux"]["namespaces"]}
    assert kinds >= {"pid", "ipc", "uts", "mount"}
    assert {each["type"] for each in none["linux"]["namespaces"]} == kinds | {"network"}
    assert (host["hostname"], none["hostname"]) == (socket.gethostname(), "web")
    assert spec(root, hostname="box")["hostname"] == "box"
    assert environment(spec(root, hostname="box"))["HOSTNAME"] == "box"
    files = {"/etc/hosts": Path("/bundle/hosts")}
    found = mounts(runtime_spec(CONFIG, RunOptions(command=("true",)), root, "web", files))["/etc/hosts"]
    assert (found["source"], found["options"]) == ("/bundle/hosts", ["bind", "rprivate", "rw"])
    read_only = RunOptions(command=("true",), read_only=True)
    assert mounts(runtime_spec(CONFIG, read_only, root, "web", files))["/etc/hosts"]["options"][-1] == "ro"


def test_files_to_find_names_by(tmp_path: Path) -> None:
    found = name_files(tmp_path, "none", "web")
    assert {place: path.read_text() for place, path in found.items()} == {
        "/etc/hosts": "127.0.0.1\tlocalhost web\n::1\tlocalhost\n"
    }
    found = name_files(tmp_path, "host", "web")
    assert list(found) == [place for place in ("/etc/hosts", "/etc/resolv.conf") if Path(place).is_file()]
    assert all(path.read_bytes() == Path(place).read_bytes() for place, path in found.items())
    assert {path.parent for path in found.values()} == {tmp_path}


def test_a_name_that_is_no_text_is_refused_where_all_are(tmp_path: Path) -> None:
    """That is, when the bundle is written (`Container.write_config`)."""
    assert name_files(tmp_path, "none", "\udcff")["/etc/hosts"].read_bytes().startswith(b"127.0.0.1\tlocalhost \xff\n")


def test_files_of_the_host_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").mkdir()
    (tmp_path / "resolv.conf").symlink_to("resolv.conf")
    monkeypatch.setattr(resolving, "_HOSTS", str(tmp_path / "hosts"))
    monkeypatch.setattr(resolving, "_RESOLV_CONF", str(tmp_path / "resolv.conf"))
    assert name_files(tmp_path, "host", "web") == {}


def test_limits(root: Path) -> None:
    nothing = {"allow": False, "access": "rwm"}
    assert spec(root)["linux"]["resources"] == {"devices": [nothing]}
    found = spec(root, memory=64 << 20, cpus=1.5)["linux"]["resources"]
    assert found["memory"] == {"limit": 64 << 20, "swap": 64 << 20}
    assert found["cpu"] == {"quota": 150_000, "period": 100_000}


def test_mounts_in_their_order(root: Path, tmp_path: Path) -> None:
    """What the user says comes last, and covers what is there; what lies in something else comes after that."""
    volumes = (Volume(tmp_path, "/data/ro", read_only=True), Volume(tmp_path, "/data"))
    found = spec(root, volumes=volumes, tmpfs=("/data/cache/", "/run", "/small:size=1m,mode=700"), network="none")
    assert [each["destination"] for each in found["mounts"]] == [
        "/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/sys/fs/cgroup", "/run", "/small", "/data",
        "/data/cache/", "/data/ro",
    ]  # fmt: skip
    by_place = mounts(found)
    assert by_place["/data"]["options"] == ["rbind", "rprivate", "rw"]
    assert by_place["/data/ro"]["options"] == ["rbind", "rprivate", "rro"]
    assert by_place["/small"]["options"][-2:] == ["size=1m", "mode=700"]
    assert {"nosuid", "noexec", "nodev", "ro"} <= set(by_place["/sys"]["options"])


@pytest.mark.parametrize("network", ["host", "none"])
@pytest.mark.parametrize("place", ["//etc/../etc", "/etc/hosts"])
def test_who_brings_his_own_etc_has_no_other(
    root: Path, tmp_path: Path, network: Literal["host", "none"], place: str
) -> None:
    """It may be read-only, and is his: nothing is made in it to be mounted on."""
    options = RunOptions(command=("true",), network=network, environ={}, volumes=(Volume(tmp_path, place),))
    found = runtime_spec(CONFIG, options, root, "web", {"/etc/hosts": tmp_path / "hosts"})["mounts"]
    assert [each["source"] for each in found if each["destination"] in (place, "/etc/hosts")] == [str(tmp_path)]


def test_swap_that_nobody_counts(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtimes would fail where the kernel has no such file."""
    monkeypatch.setattr("assembler.spec._CGROUPS", tmp_path)
    assert spec(root, memory=64 << 20)["linux"]["resources"]["memory"] == {"limit": 64 << 20}
    for name in ("memory.swap.max", "system.slice/memory.swap.max", "memory/memory.memsw.limit_in_bytes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        found = spec(root, memory=64 << 20)["linux"]["resources"]["memory"]
        assert found == {"limit": 64 << 20, "swap": 64 << 20}
        (tmp_path / name).unlink()


def test_a_volume_that_does_not_exist(root: Path) -> None:
    with pytest.raises(clipfs.UsageError, match="the volume /no/such/thing does not exist"):
        spec(root, volumes=(Volume(Path("/no/such/thing"), "/x"),))


def test_volumes_of_the_image_stay_writable_on_a_read_only_root(root: Path) -> None:
    (root / "var" / "data").mkdir(parents=True)
    (root / "data").symlink_to("/../var/data")
    config = replace(CONFIG, volumes=("/data",))
    assert "/var/data" not in mounts(spec(root, config))
    found = spec(root, config, read_only=True)
    assert found["root"] == {"path": str(root), "readonly": True}
    assert mounts(found)["/var/data"]["source"] == str(root / "var" / "data")


def test_what_is_hidden(root: Path) -> None:
    found = spec(root)["linux"]
    assert {"/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"} <= set(found["maskedPaths"])
    assert {"/proc/sys", "/proc/sysrq-trigger", "/proc/bus"} <= set(found["readonlyPaths"])


def test_the_stop_signal_is_passed_on(root: Path) -> None:
    found = spec(root, replace(CONFIG, stop_signal="SIGQUIT"))
    assert found["annotations"] == {"org.opencontainers.image.stopSignal": "SIGQUIT"}
    assert "annotations" not in spec(root)


@pytest.mark.parametrize(
    ("text", "volume"),
    [
        ("/a:/b", Volume(Path("/a"), "/b")),
        ("/a:/b:rw", Volume(Path("/a"), "/b")),
        ("/a:/b:ro", Volume(Path("/a"), "/b", read_only=True)),
        ("rel/a:/b", Volume(Path("rel/a").absolute(), "/b")),
    ],
)
def test_volumes(text: str, volume: Volume) -> None:
    assert Volume.parse(text) == volume


@pytest.mark.parametrize("text", ["", "/a", "/a:", ":/b", "/a:b", "/a:/b:", "/a:/b:rx", "/a:/b:ro:z", "/a:/b:RO"])
def test_no_volumes(text: str) -> None:
    with pytest.raises(clipfs.UsageError, match="a volume is given as SRC:/DST or SRC:/DST:ro, not"):
        Volume.parse(text)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"workdir": "rel"}, "a working directory is an absolute path inside the container, not 'rel'"),
        ({"workdir": ""}, "a working directory is an absolute path inside the container, not ''"),
        ({"tmpfs": ("run",)}, "a tmpfs is an absolute path"),
        ({"tmpfs": ("/:size=1m",)}, "a tmpfs lies below the root"),
        ({"volumes": (Volume(Path("/a"), "//"),)}, "a volume lies below the root"),
        ({"volumes": (Volume(Path("/a"), "/b/../.."),)}, "a volume lies below the root"),
        ({"tmpfs": ("/a/x",), "volumes": (Volume(Path("/a"), "//a/./x/"),)}, "two volumes or tmpfs are to be at /a/x"),
        ({"network": "bridge"}, "a network is 'host' or 'none', not 'bridge'"),
        ({"cpus": 0.0}, "at least 0.01 CPUs"),
        ({"cpus": -1.0}, "at least 0.01 CPUs"),
        ({"cpus": math.nan}, "at least 0.01 CPUs"),
        ({"cpus": math.inf}, "at most 8192"),
        ({"memory": 0}, "at least 6 MiB of memory, not 0 bytes"),
        ({"env": ("",)}, "a variable is given as K=V or K, not ''"),
        ({"env": ("=x",)}, "a variable is given as K=V or K"),
        ({"env": ("A=\0",)}, "a variable is given as K=V or K"),
        ({"required": ("",)}, "needs a name"),
        ({"hostname": "x" * 65}, "a host name has at most 64 bytes"),
        ({"hostname": "ä" * 33}, "a host name has at most 64 bytes"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(clipfs.UsageError, match=sentence):
        RunOptions(**options)
