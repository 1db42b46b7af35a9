"""Which addresses may be connected to."""

from __future__ import annotations

import socket
from ipaddress import IPv4Network, IPv6Network, ip_address

import pytest

from cdc.addresses import Allowed, Refused, literal, resolve

PRIVATE = [
    "127.0.0.1",
    "127.255.255.254",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "100.64.0.1",
    "::1",
    "fd00::1",
]
SPECIAL = [
    "169.254.169.254",
    "192.0.2.1",
    "198.18.0.1",
    "203.0.113.1",
    "240.0.0.1",
    "fe80::1",
    "fec0::1",
    "2001:db8::1",
    "2001::1",
    "5f00::1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "fd00:ec2::23",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fd00:42::42",
    "fd00:c1::a9fe:a9fe",
]
NOBODY = ["0.0.0.0", "0.1.2.3", "255.255.255.255", "224.0.0.1", "239.1.2.3", "::", "ff02::1"]  # noqa: S104
PUBLIC = ["8.8.8.8", "1.1.1.1", "168.63.129.15", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1"]


def may(address: str, allowed: Allowed) -> bool:
    try:
        allowed.check(ip_address(address))
    except Refused:
        return False
    return True


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_may_always_be_connected_to(address: str) -> None:
    assert may(address, Allowed())


@pytest.mark.parametrize("address", PRIVATE)
def test_private_ones_when_that_is_said(address: str) -> None:
    assert not may(address, Allowed())
    assert may(address, Allowed(private=True))


@pytest.mark.parametrize("address", SPECIAL)
def test_other_special_ones_only_when_their_network_is_named(address: str) -> None:
    assert not may(address, Allowed())
    assert not may(address, Allowed(private=True))
    network = IPv6Network(f"{address}/128") if ":" in address else IPv4Network(f"{address}/32")
    assert may(address, Allowed(networks=(network,)))


@pytest.mark.parametrize("address", NOBODY)
def test_what_is_no_machine_never(address: str) -> None:
    everything = Allowed(private=True, networks=(IPv4Network("0.0.0.0/0"), IPv6Network("::/0")))
    assert not may(address, everything)


def _hexadecimal(address: str) -> str:
    """The last 32 bits of an IPv6 address that holds an IPv4 one."""
    a, b, c, d = (int(part) for part in address.split("."))
    return f"{a:02x}{b:02x}:{c:02x}{d:02x}"


@pytest.mark.parametrize(
    ("inner", "allowed", "expected"),
    [
        ("127.0.0.1", Allowed(), False),
        ("127.0.0.1", Allowed(private=True), True),
        ("10.1.2.3", Allowed(networks=(IPv4Network("10.1.0.0/16"),)), True),
        ("169.254.169.254", Allowed(private=True), False),
        ("100.100.100.200", Allowed(private=True), False),
        ("168.63.129.16", Allowed(private=True), False),
        ("8.8.8.8", Allowed(), True),
        ("0.1.2.3", Allowed(private=True), False),
    ],
)
def test_an_address_inside_another_counts_as_itself(inner: str, allowed: Allowed, expected: bool) -> None:
    plain, in_hexadecimal = inner, _hexadecimal(inner)
    for address in (f"::ffff:{plain}", f"2002:{in_hexadecimal}::", f"64:ff9b::{plain}", f"::{plain}"):
        assert may(address, allowed) is expected, address


def test_what_is_public_is_out_of_the_question_for_what_must_stay_inside() -> None:
    inside = Allowed(private=True, networks=(IPv4Network("8.8.4.0/24"),), public=False)
    assert may("10.0.0.1", inside)
    assert may("8.8.4.4", inside)
    assert not may("8.8.8.8", inside)
    assert not may("::ffff:8.8.8.8", inside)


def test_a_refusal_says_what_would_allow_it() -> None:
    with pytest.raises(Refused, match=r"^10\.0\.0\.7 is private \(allow_private: true allows that, or a list"):
        Allowed().check(ip_address("10.0.0.7"))
    with pytest.raises(Refused, match=r"is not public \(allow_private allows it with a list of networks"):
        Allowed(private=True).check(ip_address("::ffff:169.254.169.254"))
    with pytest.raises(
        Refused, match=r"^168\.63\.129\.16 is a cloud's own \(allow_private allows it with a list of networks"
    ):
        Allowed().check(ip_address("168.63.129.16"))


def test_one_wrong_address_of_a_name_is_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: real("8.8.8.8", *a, **k) + real("10.0.0.1", *a, **k)
    )
    with pytest.raises(Refused):
        resolve("example.com", 443, Allowed())
    assert resolve("example.com", 443, Allowed(private=True)) == ["8.8.8.8", "10.0.0.1"]


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "017700000001"])
def test_odd_spellings_of_an_address_are_checked_like_any_name(host: str) -> None:
    assert literal(host) is None
    with pytest.raises(Refused):
        resolve(host, 80, Allowed())


def test_addresses_are_told_from_names() -> None:
    assert literal("example.com") is None
    assert literal("::1") == ip_address("::1")
