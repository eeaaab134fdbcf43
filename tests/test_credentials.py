"""Where credentials are found, and that they are not shown."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from clipfs.errors import UsageError
from clipfs.sources.credentials import Credentials, find

Write = Callable[[str, object], Path]


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has nothing, not even the login of whoever runs the tests."""
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path


@pytest.fixture
def write(home: Path) -> Write:
    def write(name: str, value: object) -> Path:
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
        return path

    return write


@pytest.fixture
def helper(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a program docker-credential-NAME into PATH."""
    monkeypatch.setenv("PATH", str(home), prepend=":")

    def install(name: str, script: str) -> None:
        path = home / f"docker-credential-{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return install


def test_nothing_is_no_error() -> None:
    assert find("example.com", "app") is None


@pytest.mark.parametrize("name", ["run/containers/auth.json", ".config/containers/auth.json", ".docker/config.json"])
def test_the_usual_places(write: Write, name: str) -> None:
    write(name, {"auths": {"example.com": auth("u", "p:q")}})
    assert find("example.com", "app") == Credentials("u", "p:q")
    assert find("example.org", "app") is None


def test_named_places(write: Write, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(".docker/config.json", {"auths": {"example.com": auth("default", "p")}})
    write("other/config.json", {"auths": {"example.com": auth("docker", "p")}})
    write("file.json", {"auths": {"example.com": auth("podman", "p")}})
    option = write("option.json", {"auths": {"example.com": auth("option", "p")}})

    def user() -> str | None:
        found = find("example.com", "app")
        return found.user if found else None

    assert user() == "default"
    monkeypatch.setenv("DOCKER_CONFIG", str(home / "other"))
    assert user() == "docker"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(home / "file.json"))
    assert user() == "podman"
    assert find("example.com", "app", option) == Credentials("option", "p")


def test_the_most_specific_key_counts(write: Write) -> None:
    write(
        ".docker/config.json",
        {"auths": {"h:5000": auth("host", "p"), "h:5000/a": auth("part", "p"), "h:5000/a/b": auth("all", "p")}},
    )
    users = [found.user for name in ("a/b", "a/c", "x") if (found := find("h:5000", name))]
    assert users == ["all", "part", "host"]


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io", "registry-1.docker.io", "index.docker.io"])
def test_docker_hub_has_many_names(write: Write, key: str) -> None:
    write(".docker/config.json", {"auths": {key: auth("hub", "p")}})
    assert find("docker.io", "library/debian") == Credentials("hub", "p")


def test_what_else_a_login_by_browser_leaves_is_not_taken(write: Write) -> None:
    hub = "https://index.docker.io/v1/"
    names = {"": "token", "access-token": "access", "refresh-token": "refresh"}
    write(".docker/config.json", {"auths": {hub + name: auth("u", secret) for name, secret in names.items()}})
    assert find("docker.io", "library/debian") == Credentials("u", "token")


def test_keys_may_be_urls(write: Write) -> None:
    write(".docker/config.json", {"auths": {"https://h:5000/v2/": auth("u", "p")}})
    assert find("h:5000", "app") == Credentials("u", "p")


def test_tokens_and_plain_users(write: Write) -> None:
    entries = {
        "token": {"identitytoken": "t", **auth("u", "")},
        "plain": {"username": "u", "password": "p"},
        "none": {},
    }
    write(".docker/config.json", {"auths": entries})
    assert find("token", "x") == Credentials("u", "", "t")
    assert find("plain", "x") == Credentials("u", "p")
    assert find("none", "x") is None


def test_helpers(write: Write, helper: Callable[[str, str], None]) -> None:
    helper("one", """read host; [ "$1" = get ] && echo "{\\"Username\\": \\"one-$host\\", \\"Secret\\": \\"s\\"}\"""")
    helper("all", """read host; echo "{\\"Username\\": \\"<token>\\", \\"Secret\\": \\"$host\\"}\"""")
    write(
        ".docker/config.json",
        {"credHelpers": {"h:1": "one"}, "credsStore": "all", "auths": {"h:1": auth("file", "p"), "h:2": {}}},
    )
    assert find("h:1", "x") == Credentials("one-h:1", "s")
    assert find("h:2", "x") == Credentials("", "", "h:2")
    assert find("docker.io", "x") == Credentials("", "", "https://index.docker.io/v1/")


def test_a_helper_for_docker_hub(write: Write, helper: Callable[[str, str], None]) -> None:
    """Docker itself knows this key only."""
    helper("hub", """read host; echo "{\\"Username\\": \\"u\\", \\"Secret\\": \\"$host\\"}\"""")
    write(".docker/config.json", {"credHelpers": {"https://index.docker.io/v1/": "hub"}})
    assert find("docker.io", "library/debian") == Credentials("u", "https://index.docker.io/v1/")


@pytest.mark.parametrize(
    ("script", "word"),
    [("echo 'credentials not found'; exit 1", ""), ("echo '{\"Secret\": [\"s3cret\"]}'", "malformed"),
     ("echo s3cret", "malformed"), ("exec sleep 60", "no answer in"), (None, "No such file")],
)  # fmt: skip
def test_helpers_that_fail_leave_the_file(
    write: Write,
    helper: Callable[[str, str], None],
    script: str | None,
    word: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if script is not None:
        helper("bad", script)
    write(".docker/config.json", {"credsStore": "bad", "auths": {"h": auth("file", "p")}})
    with caplog.at_level(logging.WARNING):
        assert find("h", "x", patience=0.5) == Credentials("file", "p")
    assert word in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "-x", "a b"])
def test_helpers_are_programs_not_paths(write: Write, name: str) -> None:
    write(".docker/config.json", {"credHelpers": {"h": name}})
    if name:
        with pytest.raises(UsageError, match="no program's name"):
            find("h", "x")
    else:
        assert find("h", "x") is None


def test_a_named_file_must_be_there(home: Path) -> None:
    with pytest.raises(UsageError, match="no credentials file"):
        find("h", "x", home / "missing.json")


@pytest.mark.parametrize(
    "value",
    [[], {"auths": 1}, *({"auths": {"h": {"auth": text}}} for text in ("%", "éé==")), {"credHelpers": {"h": 1}}],
)
def test_malformed_files_are_named(write: Write, value: object) -> None:
    path = write("bad.json", value)
    with pytest.raises(UsageError, match=r"bad\.json"):
        find("h", "x", path)


def test_secrets_are_not_shown() -> None:
    assert "s3cret" not in repr(Credentials("u", "s3cret", "s3cret"))
