"""Which addresses a sink may connect to, so that no name leads it into a network it was not meant to see.

A name is resolved once, every address it has is checked, and one of just those is connected to: a second look-up could
give another answer. Public addresses may be reached, by TLS. What is private (loopback included) may be if the
configuration says so, and everything else that is no ordinary public address, above all those where clouds hand out
credentials, only if it names the network. An IPv4 address inside an IPv6 one counts as itself.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")  # of IPv6, all that has been given out
_TRANSLATED: Final = (IPv6Network("64:ff9b::/96"), IPv6Network("::/96"))  # the last 32 bits are an IPv4 address
_THIS_HOST: Final = IPv4Network("0.0.0.0/8")
_BROADCAST: Final = IPv4Address("255.255.255.255")
_PRIVATE: Final = tuple(
    ip_network(network)
    for network in (
        "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "::1/128", "fc00::/7",
    )
)  # fmt: skip
_METADATA: Final = tuple(
    ip_network(network)
    for network in (
        "100.100.100.200/32",  # Alibaba
        "192.0.0.192/32",  # Oracle, before
        "168.63.129.16/32",  # Azure, which has taken it from the public ones
        "fd00:ec2::/32",  # Amazon
        "fd20:ce::254/128",  # Google
        "fd00:c1::a9fe:a9fe/128",  # Oracle
        "fd00:42::42/128",  # Scaleway
    )
)
"""Where clouds hand out credentials, as far as other ranges do not say that it is no ordinary address."""


class Refused(Exception):
    """An address that must not be connected to.

    Attributes:
        reason: ``is private (what would allow it)``, without the address.
    """

    def __init__(self, address: Address, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{address} {reason}")


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may be connected to.

    Attributes:
        private: loopback and the private networks.
        networks: these, whatever they are.
        public: public addresses; they are out of the question for what must not leave unencrypted.
    """

    private: bool = False
    networks: tuple[Network, ...] = ()
    public: bool = True

    def check(self, address: Address) -> None:
        """Raises Refused, unless the address may be connected to."""
        plain = _unwrapped(address)
        if plain.is_multicast or plain.is_unspecified or plain in _THIS_HOST or plain == _BROADCAST:
            raise Refused(address, "is no address of a machine (write another)")
        if any(plain in network or address in network for network in self.networks):
            return
        if any(plain in network for network in _METADATA):
            raise Refused(address, "is a cloud's own (allow_private allows it with a list of networks that holds it)")
        if any(plain in network for network in _PRIVATE):
            if not self.private:
                raise Refused(address, "is private (allow_private: true allows that, or a list with its network)")
        elif not _is_public(plain):
            raise Refused(address, "is not public (allow_private allows it with a list of networks that holds it)")
        elif not self.public:
            raise Refused(address, "is public, which HTTP without TLS must not leave for (https, or allow_http: true)")


def literal(host: str) -> Address | None:
    """The address a host is written as, or None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def resolve(host: str, port: int, allowed: Allowed) -> list[str]:
    """The addresses of a host, in the order in which to try them, all of them checked.

    Raises:
        Refused: one of them must not be connected to; then none is.
        OSError: the name cannot be resolved.
    """
    found: dict[str, None] = {}
    for _, _, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        text = str(place[0])
        allowed.check(ip_address(text))
        scope = place[3] if len(place) == 4 else 0
        found[f"{text}%{scope}" if scope and "%" not in text else text] = None
    return list(found)


def _unwrapped(address: Address) -> Address:
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and any(address in network for network in _TRANSLATED) and int(address) > 1:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        return inner or address
    return address


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address):
        return address.is_global and address in _GLOBAL_UNICAST
    return address.is_global and not address.is_reserved
