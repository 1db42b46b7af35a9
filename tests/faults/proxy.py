"""A wire that can be cut: a TCP proxy in front of a PostgreSQL server, with faults that are switched at run time.

One thread serves every connection. A method that changes something returns when it is in force, so that a test never
has to wait for the proxy. What each one does, to connections that are open and to those that come later:

==================  ===================================================================================================
``resume``          forward again, whatever was the matter; only what a black hole swallowed stays lost
``black_hole``      the peer has vanished: connections are accepted, nothing is read, nothing answered, nothing closed;
                    neither side learns of what the other one does, not even that it has gone
``stall``           nothing is forwarded; `resume` forwards all of it
``trickle``         so many bytes a second, for each connection and direction
``refuse``          who connects is reset at once; who is connected stays so
``cut_answer``      a request reaches the server, and the connection is reset before the answer reaches the client
``cut``             every connection there is, reset, once
==================  ===================================================================================================

A fault may be for the sessions of one ``application_name`` only. The proxy speaks enough of the protocol to know that
name and where an answer ends; so the wire has to be in clear, which :meth:`Proxy.dsn` sees to.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from psycopg2.extensions import make_dsn, parse_dsn

Address = Path | tuple[str, int]
"""A unix socket, or host and port."""

_CHUNK = 1 << 16
_HELD = 1 << 18
"""Bytes a direction may hold before its sender has to wait."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: on, and not for a moment, which makes close send RST."""
_TICK = 0.02
"""Seconds between two drops of a trickle."""
_PATIENCE = 10.0


@dataclass(eq=False, slots=True)
class _Fault:
    """What is the matter, and with whom; `left`: how often it still happens, None for ever."""

    kind: Literal["none", "black hole", "stall", "trickle", "refuse", "cut answer"] = "none"
    of: str | None = None
    rate: float = 0.0
    after: Callable[[bytes], bool] = lambda sent: False
    left: int | None = None
    whole: bool = True


class Proxy:
    """A proxy on a port of its own, from construction until the end of the with-block.

    Attributes:
        port: where it listens, on 127.0.0.1.
        connections: how many clients have connected so far.
        refused: how many of them were reset because of :meth:`refuse`.
        cuts: how many connections the proxy has reset, those whose answer was cut included.
        answers_cut: how many answers were cut.
    """

    def __init__(self, upstream: Address) -> None:
        self.connections = 0
        self.refused = 0
        self.cuts = 0
        self.answers_cut = 0
        self._upstream = upstream
        self._fault = _Fault()
        self._pairs: list[_Pair] = []
        self._strays: list[socket.socket] = []
        """Clients who connected into a black hole; the server never hears of them."""
        self._orders: list[tuple[Callable[[], None], threading.Event]] = []
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._over = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    @classmethod
    def before(cls, dsn: str) -> Proxy:
        """A proxy in front of the server a dsn leads to."""
        return cls(_address(dsn))

    def redirect(self, dsn: str) -> None:
        """From now on lead new connections to another server, as a name or an address does that was moved."""

        def do() -> None:
            self._upstream = _address(dsn)

        self._order(do)

    def dsn(self, dsn: str) -> str:
        """The same database, by way of the proxy."""
        parts = {name: value for name, value in parse_dsn(dsn).items() if name != "hostaddr"}
        clear = {"sslmode": "disable", "gssencmode": "disable"}
        return make_dsn(**parts | {"host": "127.0.0.1", "port": str(self.port)} | clear)

    @property
    def open(self) -> int:
        """How many connections there are now, those in a black hole included."""
        return len(self._pairs) + len(self._strays)

    # -- faults -------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Forward everything, what was held first."""
        self._set(_Fault())

    def black_hole(self, of: str | None = None) -> None:
        """Let the peer vanish: half-open connections, without FIN or RST, for good. `of`: see the head."""
        self._set(_Fault("black hole", of))

    def stall(self, of: str | None = None) -> None:
        """Hold everything until :meth:`resume`."""
        self._set(_Fault("stall", of))

    def trickle(self, bytes_per_second: float, of: str | None = None) -> None:
        """Forward no faster than this, from the first byte on."""
        self._set(_Fault("trickle", of, rate=bytes_per_second))

    def refuse(self) -> None:
        """Reset whoever connects."""
        self._set(_Fault("refuse"))

    def cut_answer(
        self, after: Callable[[bytes], bool], *, of: str | None = None, times: int | None = 1, whole: bool = True
    ) -> None:
        """Let a request through, and reset both sides instead of forwarding the answer.

        Args:
            after: whether the bytes a client has sent since the last answer are such a request, for example
                ``lambda sent: b"next_batch" in sent``.
            of: only in sessions of this application_name.
            times: how often; then everything is forwarded again. None: until :meth:`resume`.
            whole: wait, forwarding nothing, until the answer is complete: what was requested outside of a transaction
                block is then committed for certain. False: reset at its first byte. The server may still be at work
                then, and finds out while it sends the rest, before it commits: the outcome can be either.
        """
        self._set(_Fault("cut answer", of, after=after, left=times, whole=whole))

    def cut(self, of: str | None = None) -> int:
        """Reset every connection, those in a black hole included; returns how many."""
        before = self.cuts

        def do() -> None:
            for pair in list(self._pairs):
                if of is None or pair.application == of:
                    self._cut(pair)
            if of is None:
                self.cuts += len(self._strays)
                self._drop_strays()

        self._order(do)
        return self.cuts - before

    # -- the thread ---------------------------------------------------------------------------------------------

    def _set(self, fault: _Fault) -> None:
        def do() -> None:
            self._fault = fault
            for pair in self._pairs:
                pair.swallowed |= pair.is_hit_by(fault, "black hole")

        self._order(do)

    def _order(self, do: Callable[[], None]) -> None:
        """Have something done in the thread, and wait until it is."""
        done = threading.Event()
        assert self._error is None, f"the proxy is broken: {self._error!r}"
        with self._lock:
            self._orders.append((do, done))
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"!")
        assert done.wait(_PATIENCE), "the proxy does not obey"
        assert self._error is None, f"the proxy has broken: {self._error!r}"

    def _run(self) -> None:
        try:
            while not self._over:
                self._once()
        except BaseException as error:  # noqa: BLE001  # it is raised again by whoever gives the next order
            self._error = error
        finally:
            for pair in list(self._pairs):
                self._drop(pair, reset=True)
            self._drop_strays()
            with self._lock:
                for _, done in self._orders:
                    done.set()

    def _once(self) -> None:
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        poller.register(self._listener, select.POLLIN)
        now = time.monotonic()
        timeout: float | None = None
        for pair in self._pairs:
            for descriptor, events in pair.wants(self._fault, now):
                poller.register(descriptor, events)
            for due in pair.due(self._fault, now):
                timeout = min(timeout if timeout is not None else due, due)
        ready = dict(poller.poll(None if timeout is None else (timeout - now) * 1000))
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        with self._lock:
            orders, self._orders = self._orders, []
        if orders:
            # What was ready may not be wanted any more: look again under the new fault.
            for do, done in orders:
                do()
                done.set()
            return
        for pair in list(self._pairs):
            self._serve(pair, ready)
        if self._listener.fileno() in ready:
            self._accept()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        self.connections += 1
        if self._fault.kind == "refuse":
            self.refused += 1
            _reset(client)
            return
        if self._fault.kind == "black hole" and self._fault.of is None:
            self._strays.append(client)
            return
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            server = _connect(self._upstream)
        except OSError:  # the server is down, which is what the client learns
            _reset(client)
            return
        self._pairs.append(_Pair(client, server))

    def _serve(self, pair: _Pair, ready: dict[int, int]) -> None:
        try:
            pair.serve(ready, self._fault, time.monotonic())
        except _AnswerCut:
            self.answers_cut += 1
            self._cut(pair)
        except OSError:
            self._drop(pair, reset=True)
        else:
            if pair.finished:
                self._drop(pair, reset=False)

    def _cut(self, pair: _Pair) -> None:
        self.cuts += 1
        self._drop(pair, reset=True)

    def _drop(self, pair: _Pair, *, reset: bool) -> None:
        self._pairs.remove(pair)
        pair.close(reset=reset)

    def _drop_strays(self) -> None:
        while self._strays:
            _reset(self._strays.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        def do() -> None:
            self._over = True

        try:
            self._order(do)
        finally:
            self._thread.join(_PATIENCE)
            self._listener.close()
            os.close(self._wake_read)
            os.close(self._wake_write)


class _AnswerCut(Exception):
    """An answer is complete, or begins, that the client is not to get."""


class _Flow:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.held = bytearray()
        self.ended = False
        """The source will send nothing more."""
        self.told = False
        """The target knows that."""
        self.next_drop = 0.0

    def receive(self) -> bytes:
        try:
            data = self.source.recv(_CHUNK)
        except BlockingIOError:
            return b""
        self.ended = not data
        return data

    def send(self, most: int | None = None) -> None:
        if self.held:
            with contextlib.suppress(BlockingIOError):
                del self.held[: self.target.send(self.held[:most])]
        if self.ended and not self.held and not self.told:
            self.told = True
            with contextlib.suppress(OSError):  # it may have gone itself
                self.target.shutdown(socket.SHUT_WR)


class _Pair:
    """A client's connection and the one to the server that was made for it.

    Attributes:
        application: the session's application_name; None until the client has said it.
        swallowed: it is in a black hole, and stays there.
    """

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.application: str | None = None
        self.swallowed = False
        self._up = _Flow(client, server)
        self._down = _Flow(server, client)
        self._messages = _Messages()
        self._request = bytearray()
        """What the client has sent since the last complete answer."""
        self._trap: _Fault | None = None
        """The fault that an answer on its way has fallen victim to."""
        for end in (client, server):
            end.setblocking(False)

    @property
    def finished(self) -> bool:
        return self._up.told and self._down.told

    def is_hit_by(self, fault: _Fault, kind: str) -> bool:
        return fault.kind == kind and (fault.of is None or fault.of == self.application)

    def wants(self, fault: _Fault, now: float) -> Iterator[tuple[socket.socket, int]]:
        """What to wait for. A socket nothing is wanted of is left out: poll tells of its end even when not asked."""
        if self.swallowed or self.is_hit_by(fault, "stall"):
            return
        slow = self.is_hit_by(fault, "trickle")
        for flow, other in ((self._up, self._down), (self._down, self._up)):
            events = 0
            if not flow.ended and len(flow.held) < _HELD:
                events |= select.POLLIN
            if other.held and not (slow and other.next_drop > now):
                events |= select.POLLOUT
            if events:
                yield flow.source, events

    def due(self, fault: _Fault, now: float) -> Iterator[float]:
        """When the next drops of a trickle fall that are not overdue: those wait for their target."""
        if not self.swallowed and self.is_hit_by(fault, "trickle"):
            yield from (flow.next_drop for flow in (self._up, self._down) if flow.held and flow.next_drop > now)

    def serve(self, ready: dict[int, int], fault: _Fault, now: float) -> None:
        """Move what can be moved. Raises OSError when an end is lost, _AnswerCut."""
        if self.swallowed or self.is_hit_by(fault, "stall"):
            return
        if ready.get(self._up.source.fileno(), 0) & ~select.POLLOUT:
            self._hear_client(self._up.receive())
            # Its name may be known only now.
            self.swallowed = self.is_hit_by(fault, "black hole")
            if self.swallowed or self.is_hit_by(fault, "stall"):
                return
        if ready.get(self._down.source.fileno(), 0) & ~select.POLLOUT:
            self._hear_server(self._down.receive(), fault)
        for flow in (self._up, self._down):
            if not self.is_hit_by(fault, "trickle"):
                flow.send()
            elif not flow.held or flow.next_drop <= now:
                drop = max(1, int(fault.rate * _TICK))
                flow.next_drop = now + drop / fault.rate
                flow.send(drop)

    def _hear_client(self, data: bytes) -> None:
        self._up.held += data
        if len(self._request) < _HELD:
            self._request += data
        if self.application is None:
            self.application = _application_name(bytes(self._request))

    def _hear_server(self, data: bytes, fault: _Fault) -> None:
        complete = b"Z" in self._messages.feed(data)
        armed = self.is_hit_by(fault, "cut answer") and fault.left != 0 and self._trap is None
        if armed and self._request and fault.after(bytes(self._request)):
            self._trap = fault
            if fault.left is not None:
                fault.left -= 1
        if complete:
            self._request.clear()
        if self._trap is not None:
            if complete or not self._trap.whole or self._down.ended:
                raise _AnswerCut
            return
        self._down.held += data

    def close(self, *, reset: bool) -> None:
        for end in (self._up.source, self._down.source):
            _reset(end) if reset else end.close()


class _Messages:
    """Finds the messages in what a server sends: a letter, a length that counts itself, and the rest."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._rest = 0

    def feed(self, data: bytes) -> set[bytes]:
        """The letters of the messages that end in `data`."""
        kinds: set[bytes] = set()
        position = 0
        while position < len(data):
            if len(self._head) < 5:
                taken = data[position : position + 5 - len(self._head)]
                position += len(taken)
                self._head += taken
                if len(self._head) < 5:
                    break
                self._rest = struct.unpack_from("!I", self._head, 1)[0] - 4
            skipped = min(self._rest, len(data) - position)
            position += skipped
            self._rest -= skipped
            if self._rest:
                break
            kinds.add(bytes(self._head[:1]))
            self._head.clear()
        return kinds


def _application_name(sent: bytes) -> str | None:
    """The application_name in a session's first message; None if that is not all there yet."""
    if len(sent) < 8 or len(sent) < (length := struct.unpack_from("!I", sent)[0]):
        return None
    words = sent[8:length].split(b"\0")
    return dict(zip(words[::2], words[1::2], strict=False)).get(b"application_name", b"").decode()


def _address(dsn: str) -> Address:
    parts = parse_dsn(dsn)
    host, port = parts["host"], int(parts.get("port", 5432))
    return Path(host) / f".s.PGSQL.{port}" if host.startswith("/") else (host, port)


def _connect(address: Address) -> socket.socket:
    if isinstance(address, Path):
        upstream = socket.socket(socket.AF_UNIX)
        try:
            upstream.connect(str(address))
        except OSError:
            upstream.close()
            raise
        return upstream
    upstream = socket.create_connection(address, timeout=_PATIENCE)
    upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return upstream


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # a unix socket knows no RST; closing it unread does the same
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.close()
