"""What systemd is told, over a real socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc.cli.run import _notifier
from cdc.systemd import Notifier


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as found:
        found.bind(str(tmp_path / "notify"))
        found.settimeout(5)
        yield found


def test_each_word_is_one_datagram_of_assignments(listening: socket.socket) -> None:
    notifier = Notifier(listening.getsockname())
    notifier.ready("all is well")
    notifier.lives()
    notifier.status("one\nSTOPPING=1")
    notifier.stopping()
    said = [listening.recv(4096).decode() for _ in range(4)]
    assert said == [
        "READY=1\nSTATUS=all is well",
        "WATCHDOG=1",
        "STATUS=one STOPPING=1",
        "STOPPING=1\nSTATUS=Draining.",
    ]


def test_a_reload_carries_the_monotonic_time(listening: socket.socket) -> None:
    Notifier(listening.getsockname()).reloading()
    first, second = listening.recv(4096).decode().splitlines()
    assert first == "RELOADING=1"
    assert second.removeprefix("MONOTONIC_USEC=").isdigit()


def test_an_abstract_socket_is_one_too() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as found:
        found.bind("\0cdc-test-notify")
        found.settimeout(5)
        Notifier("@cdc-test-notify").lives()
        assert found.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", [None, "", "/nowhere/at/all"])
def test_without_anybody_who_listens_nothing_happens(address: str | None) -> None:
    Notifier(address).ready("unheard")


def test_the_environment_says_where_and_how_often(tmp_path: Path) -> None:
    where = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    assert _notifier({**where, "WATCHDOG_USEC": "60000000"}).watchdog == 60.0
    assert _notifier({**where, "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}).watchdog is None
    assert _notifier({"WATCHDOG_USEC": "60000000"}).watchdog is None
    assert _notifier({**where, "WATCHDOG_USEC": "soon"}).watchdog is None
