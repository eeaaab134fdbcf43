"""Which addresses a registry may send us to: none that is nearer to this machine than the registry itself.

Whoever runs a registry chooses where its redirects and its token server lead. A registry on the Internet has no
business with what listens on this machine or on the networks behind its firewall, and nobody has any with the services
on link-local addresses, where clouds hand out a machine's credentials.

`Surroundings` is told what connections were made to, so it judges what a name means by where it really led: a name
whose address changes between two looks gains nothing. It opens no connections itself.
"""

from __future__ import annotations

import ipaddress
from enum import IntEnum

from clipfs.errors import SourceError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Reach(IntEnum):
    """From how far away an address can be spoken to."""

    NEVER = 0  # link-local, multicast, nobody's
    MACHINE = 1
    SITE = 2  # private networks, carriers' and providers' own
    WORLD = 3


# Where clouds hand out credentials, other than on link-local addresses: AWS over IPv6, Alibaba, Oracle.
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "192.0.0.192")))

# RFC 6052: IPv4 addresses as hosts without IPv4 see them.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def reach(text: str) -> Reach | None:
    """How far an address can be reached from; None if it is no address but a name."""
    try:
        address = _plain(ipaddress.ip_address(text.strip("[]").partition("%")[0]))
    except ValueError:
        return None
    if address.is_loopback:
        return Reach.MACHINE
    if address in _METADATA or address.is_link_local or address.is_multicast or address.is_unspecified:
        return Reach.NEVER
    return Reach.WORLD if address.is_global else Reach.SITE


def _plain(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one, if that is what it means."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return address.ipv4_mapped
        if address.sixtofour:
            return address.sixtofour
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


class Surroundings:
    """What may be connected to on behalf of the registry at the host `own` (without its port)."""

    def __init__(self, own: str) -> None:
        self._own = own.lower()
        # The farthest place that the registry was seen at: having one near address among others opens no doors.
        self._seen = reach(own)

    def check(self, host: str, address: str) -> None:
        """SourceError unless a connection to `host`, which turned out to be `address`, is acceptable."""
        there = reach(address)
        if there is None:
            return
        if host.lower() == self._own:
            self._seen = max(there, self._seen or there)
        elif there is Reach.NEVER or there < (Reach.WORLD if self._seen is None else self._seen):
            shown = host if host == address else f"{host} ({address})"
            raise SourceError(
                f"{self._own} leads to {shown}, an address that is "
                + ("nobody's to lead to" if there is Reach.NEVER else "nearer to this machine than the registry itself")
                + "; refused"
            )
