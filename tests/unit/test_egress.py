"""The network under the HTTP client: one deadline for all that an attempt does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import httpcore
import pytest

from cdc.addresses import Allowed
from cdc.egress import Network, Stream


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: our end, and the other one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def network() -> Network:
    network = Network(Allowed(private=True))
    network.begin(5)
    return network


def test_head_and_body_of_a_small_request_go_in_one_piece(
    pair: tuple[socket.socket, socket.socket], network: Network
) -> None:
    ours, theirs = pair
    stream = Stream(ours, network)
    stream.write(b"head ")
    stream.write(b"body")
    theirs.sendall(b"answer")
    assert stream.read(100) == b"answer"
    assert theirs.recv(100) == b"head body"


def test_what_was_answered_before_all_was_sent_is_read(
    pair: tuple[socket.socket, socket.socket], network: Network
) -> None:
    ours, theirs = pair
    theirs.sendall(b"too large")
    theirs.close()
    stream = Stream(ours, network)
    stream.write(b"body")
    assert stream.read(100) == b"too large"
    assert stream.read(100) == b""


def test_a_large_request_that_nobody_reads_ends_with_the_deadline(
    pair: tuple[socket.socket, socket.socket], network: Network
) -> None:
    network.begin(0.2)
    began = time.monotonic()
    with pytest.raises(httpcore.WriteTimeout):
        Stream(pair[0], network).write(b"x" * 10**7)
    assert 0.15 < time.monotonic() - began < 3


def test_reading_bit_by_bit_does_not_move_the_deadline(
    pair: tuple[socket.socket, socket.socket], network: Network
) -> None:
    ours, theirs = pair
    network.begin(0.3)
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.02):
            theirs.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    stream = Stream(ours, network)

    def read_on() -> None:
        while True:
            stream.read(1, timeout=60)

    began = time.monotonic()
    try:
        with pytest.raises(httpcore.ReadTimeout):
            read_on()
    finally:
        stop.set()
        thread.join()
    assert 0.25 < time.monotonic() - began < 3


def test_an_operation_has_its_own_time_out_within_the_deadline(
    pair: tuple[socket.socket, socket.socket], network: Network
) -> None:
    network.begin(60)
    with pytest.raises(httpcore.ReadTimeout):
        Stream(pair[0], network).read(1, timeout=0.05)


def test_every_thread_has_an_attempt_of_its_own(network: Network) -> None:
    found: list[float] = []

    def other() -> None:
        network.begin(1000)
        found.append(network.left(None))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found[0] > 900
    assert network.left(None) <= 5


def test_addresses_share_the_time_there_is(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    patience: list[float] = []

    def connect(address: object, timeout: float) -> socket.socket:
        patience.append(timeout)
        raise TimeoutError

    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{number}", 80)) for number in (1, 2, 3, 4)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: answer)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(httpcore.ConnectTimeout):
        network.connect_tcp("hooks.example.com", 80, timeout=2)
    assert [round(seconds, 1) for seconds in patience] == [0.5, 0.7, 1.0, 2.0]  # these failed at once


def test_a_connection_that_is_closed_or_has_something_to_read_is_not_fit_for_a_request(
    pair: tuple[socket.socket, socket.socket], network: Network
) -> None:
    ours, theirs = pair
    stream = Stream(ours, network)
    assert not stream.get_extra_info("is_readable")
    theirs.close()
    assert stream.get_extra_info("is_readable")
    stream.close()
    assert stream.get_extra_info("is_readable")
