"""The network under httpcore: connections to checked addresses, and an end to every attempt.

httpcore's time-outs are per operation, so a server that sends a byte now and then holds a request for ever. Here all
that one thread does between two calls of :meth:`Network.begin` shares one deadline: looking up, connecting, TLS,
writing, reading. Only the look-up of a name can overrun it, by the resolver's own time-outs.

Errors are httpcore's, their text is made here and says nothing that came over the wire.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import httpcore

from cdc.addresses import Allowed, Refused, resolve

_SMALL = 16384


class _Attempt(threading.local):
    ends = 0.0
    connected = False


class Network(httpcore.NetworkBackend):
    """Connects for one sink; every thread has an attempt of its own."""

    def __init__(self, allowed: Allowed | None) -> None:
        """
        Args:
            allowed: what may be connected to; None: anything, as the configuration names it (a proxy).
        """
        self._allowed = allowed
        self._attempt = _Attempt()

    def begin(self, seconds: float) -> None:
        """All that this thread does with the network from here on ends in so many seconds."""
        self._attempt.ends = time.monotonic() + seconds
        self._attempt.connected = False

    def shorten(self, seconds: float) -> None:
        """Bring the end of this thread's attempt forward, to so many seconds from now."""
        self._attempt.ends = min(self._attempt.ends, time.monotonic() + seconds)

    @property
    def connected(self) -> bool:
        """Whether this thread's attempt needed a new connection."""
        return self._attempt.connected

    def left(self, most: float | None) -> float:
        """Seconds an operation of this thread may take. Raises TimeoutError: none are left."""
        left = self._attempt.ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left if most is None else min(left, most)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        self._attempt.connected = True
        try:
            ends = time.monotonic() + self.left(timeout)
            addresses = [host] if self._allowed is None else resolve(host, port, self._allowed)
        except Refused as refused:
            raise httpcore.ConnectError(str(refused)) from None
        except TimeoutError:
            raise httpcore.ConnectTimeout from None
        except OSError as error:
            raise httpcore.ConnectError(f"its name cannot be resolved: {error.strerror}") from None
        for number, address in enumerate(addresses):
            # Each of those left has an equal share of the time left.
            share = max(0.05, (ends - time.monotonic()) / (len(addresses) - number))
            try:
                connected = socket.create_connection((address, port), self.left(share))
            except OSError as error:
                failure = error
            else:
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return Stream(connected, self)
        if isinstance(failure, TimeoutError):
            raise httpcore.ConnectTimeout
        raise httpcore.ConnectError(failure.strerror or type(failure).__name__)

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None
    ) -> httpcore.NetworkStream:
        raise httpcore.UnsupportedProtocol

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Stream(httpcore.NetworkStream):
    """One connection."""

    def __init__(self, connected: socket.socket, network: Network) -> None:
        self._socket = connected
        self._network = network
        self._pending = b""

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        # A server may answer before it has read all, and close: what it says counts.
        with suppress(httpcore.WriteError):
            self._flush(timeout)
        with _told_as(httpcore.ReadTimeout, httpcore.ReadError):
            self._socket.settimeout(self._network.left(timeout))
            return self._socket.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # Head and body come one by one; a small request goes in one piece all the same, when its answer is waited for.
        self._pending = self._pending + buffer if self._pending else buffer
        if len(self._pending) > _SMALL:
            self._flush(timeout)

    def _flush(self, timeout: float | None) -> None:
        rest, self._pending = memoryview(self._pending), b""
        with _told_as(httpcore.WriteTimeout, httpcore.WriteError):
            while rest:
                self._socket.settimeout(self._network.left(timeout))
                rest = rest[self._socket.send(rest) :]

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            with _told_as(httpcore.ConnectTimeout, httpcore.ConnectError):
                self._socket.settimeout(self._network.left(timeout))
                return Stream(ssl_context.wrap_socket(self._socket, server_hostname=server_hostname), self._network)
        except (httpcore.NetworkError, httpcore.TimeoutException):
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return _is_readable(self._socket)
        if info == "ssl_object" and isinstance(self._socket, ssl.SSLSocket):
            return self._socket
        return None


class Connections:
    """A connection to one server for every thread that asks, kept for its next request.

    A pool shared by the threads (httpcore's) costs a request half as much again: it looks at all of its connections for
    each.
    """

    def __init__(
        self, origin: httpcore.Origin, network: Network, *, kept_idle: float, ssl_context: ssl.SSLContext | None
    ) -> None:
        """
        Args:
            origin: the server.
            network: connects.
            kept_idle: seconds after which an idle connection is not used again.
            ssl_context: for an ``https`` origin.
        """
        self._make = partial(
            httpcore.HTTPConnection, origin, ssl_context, keepalive_expiry=kept_idle, network_backend=network
        )
        self._own = threading.local()
        self._all: list[httpcore.HTTPConnection] = []
        self._lock = threading.Lock()

    def handle_request(self, request: httpcore.Request) -> httpcore.Response:
        """Send a request and read the head of its answer; the answer must be closed before this thread's next."""
        connection: httpcore.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None or connection.is_closed() or connection.has_expired():
            fresh = self._make()
            with self._lock:
                if connection is not None:
                    self._all.remove(connection)
                self._all.append(fresh)
            if connection is not None:
                connection.close()
            connection = self._own.connection = fresh
        return connection.handle_request(request)

    def close(self) -> None:
        """Close all of them; no thread may be using one."""
        for connection in self._all:
            connection.close()


@contextmanager
def _told_as(late: type[httpcore.TimeoutException], failed: type[httpcore.NetworkError]) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise late from None
    except ssl.SSLCertVerificationError as error:
        raise failed(f"its certificate is not trusted: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise failed(f"TLS: {error.reason}") from None
    except OSError as error:
        raise failed(error.strerror or type(error).__name__) from None


def _is_readable(connected: socket.socket) -> bool:
    """Whether something, or its end, has come in on a connection; so too for one that is closed."""
    if connected.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    return bool(poll.poll(0))
