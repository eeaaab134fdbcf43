"""Which proxy a request goes through, as the environment says, by the rules of Go's programs: docker, podman, skopeo.

HTTP_PROXY, HTTPS_PROXY (for the scheme of what is asked for), ALL_PROXY for either, and NO_PROXY: a list of names
(``example.com`` means what is below it too, ``.example.com`` only that), addresses and networks, with or without a
port, or ``*``. Of each, the lower-case spelling comes first. This machine itself is never reached through a proxy.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping

from clipfs.errors import UsageError
from clipfs.sources.auth import is_loopback
from clipfs.sources.redact import without_login

_ENTRY = re.compile(r"(?P<host>\[[^\]]*\]|[^:]*)(?::(?P<port>[0-9]{1,5}))?")


def proxy_for(scheme: str, host: str, port: int, environment: Mapping[str, str]) -> str | None:
    """The URL of the proxy, None for a direct connection. `host` is without brackets."""
    if is_loopback(host) or _excepted(host.lower(), port, _value(environment, "no_proxy")):
        return None
    url = _value(environment, f"{scheme}_proxy") or _value(environment, "all_proxy")
    if not url:
        return None
    if "://" not in url:
        url = f"http://{url}"
    if not url.lower().startswith(("http://", "https://")):
        raise UsageError(
            f"the environment names the proxy {without_login(url)}; clipfs speaks to http:// and https:// ones"
        )
    return url


def _value(environment: Mapping[str, str], name: str) -> str:
    return (environment.get(name) or environment.get(name.upper()) or "").strip()


def _excepted(host: str, port: int, exceptions: str) -> bool:
    return any(_covers(entry.strip().lower(), host, port) for entry in exceptions.split(",") if entry.strip())


def _covers(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    try:
        network = ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        pass  # a name, or something with a port
    else:
        try:
            return ipaddress.ip_address(host) in network
        except ValueError:
            return False
    parts = _ENTRY.fullmatch(entry)
    if parts is None or (parts["port"] and int(parts["port"]) != port):
        return False
    name = parts["host"].strip("[]").removeprefix("*")
    return host == name or host.endswith(name if name.startswith(".") else f".{name}")
