"""An HTTP server that takes events and misbehaves as it is told; it shares no code with the client under test."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as it came in.

    Attributes:
        method, path: of its first line.
        headers: with names in lower case; a header that came twice has both values, with a line break between.
        body: of it.
        certificate: of the client, if it showed one.
        connection: a number that requests of one connection share.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    certificate: dict[str, Any] | None
    connection: int

    @property
    def id(self) -> str:
        """Its webhook-id."""
        return self.headers["webhook-id"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What to do with a request.

    Attributes:
        status: to answer with.
        headers: beside Content-Length.
        body: of the answer.
        wait: not before this is set.
        pause: seconds between any two bytes of the answer, or with `slow_body` of its body.
        length: what Content-Length says, when that is a lie.
        cut: close the connection in place of an answer.
        raw: bytes to send in place of an answer.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    wait: threading.Event | None = None
    pause: float = 0.0
    slow_body: bool = False
    length: int | None = None
    cut: bool = False
    raw: bytes | None = None


OK = Answer()


class Receiver:
    """The server, in threads of this process.

    Attributes:
        requests: all that came in whole, in the order of their arrival.
        taken: those of them that were answered with 2xx, or would have been if the sender had waited.
        answer: decides what happens to a request.
        port: of 127.0.0.1.
        url: of it, without a path.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        """Start it, on a free port. `tls`: makes it an HTTPS server."""
        self.requests: list[Request] = []
        self.taken: list[Request] = []
        self.answer: Callable[[Request], Answer] = lambda request: OK
        self.port = 0
        self._tls = tls
        self._host = host
        self._open: set[socket.socket] = set()
        self._connections = 0
        self._lock = threading.Lock()
        self._flows = threading.Event()
        self._flows.set()
        self.start()
        self.url = f"{'https' if tls else 'http'}://{host}:{self.port}"

    def start(self) -> None:
        """Take connections, on the port of before."""
        self._ended = threading.Event()
        self._server = _Server((self._host, self.port), _handler(self))
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="receiver")
        self._thread.start()

    def stop(self) -> None:
        """Cut all connections and take no more."""
        self._ended.set()
        self._server.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):  # the other side may have gone
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()  # waits for the threads of the connections

    def stall(self) -> None:
        """Answer nothing until :meth:`resume`."""
        self._flows.clear()

    def resume(self) -> None:
        """End :meth:`stall`."""
        self._flows.set()

    @property
    def connections(self) -> int:
        """How many were made so far."""
        return self._connections

    # -- for the handler ----------------------------------------------------------------------------------------

    def began(self, connection: socket.socket) -> tuple[socket.socket, int]:
        if self._tls is not None:
            connection.settimeout(10)
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._open.add(connection)
            self._connections += 1
            number = self._connections
        if isinstance(connection, ssl.SSLSocket):
            try:
                connection.do_handshake()
            except OSError:
                self.ended(connection)
                raise
        return connection, number

    def ended(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)
            connection.close()

    def came(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            answer = self.answer(request)
            if answer.raw is None and not answer.cut and 200 <= answer.status < 300:
                self.taken.append(request)
        self.wait_for(self._flows)
        if answer.wait is not None:
            self.wait_for(answer.wait)
        return answer

    def wait_for(self, event: threading.Event) -> None:
        while not event.wait(0.01) and not self._ended.is_set():
            pass

    def pause(self, seconds: float) -> None:
        self._ended.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections break in these tests; nobody wants to read of it."""

    def server_bind(self) -> None:
        socket_ = self.socket
        socket_.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        socket_.bind(self.server_address)
        self.server_address = socket_.getsockname()
        self.server_name, self.server_port = "receiver", self.server_address[1]

    def shutdown_request(self, request: Any) -> None:
        """The handler has closed it."""


def _handler(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def setup(self) -> None:
            self.request, self._number = receiver.began(self.request)
            super().setup()

        def finish(self) -> None:
            try:
                super().finish()
            except OSError:
                pass
            finally:
                self.rfile.close()
                receiver.ended(self.request)

        def log_message(self, *arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            self._serve()

        def do_PUT(self) -> None:
            self._serve()

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            names = {name.lower() for name in self.headers}
            headers = {name: "\n".join(self.headers.get_all(name, [])) for name in names}
            certificate = self.request.getpeercert() if isinstance(self.request, ssl.SSLSocket) else None
            answer = receiver.came(Request(self.command, self.path, headers, body, certificate or None, self._number))
            if answer.cut:
                self.close_connection = True
                return
            self._send(answer)

        def _send(self, answer: Answer) -> None:
            if answer.raw is not None:
                content = answer.raw
                self.close_connection = True
            else:
                length = len(answer.body) if answer.length is None else answer.length
                lines = [f"HTTP/1.1 {answer.status} As It Was Told", f"Content-Length: {length}"]
                lines += [f"{name}: {value}" for name, value in answer.headers.items()]
                content = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + answer.body
            try:
                if not answer.pause:
                    self.wfile.write(content)
                    return
                start = content.index(b"\r\n\r\n") + 4 if answer.slow_body else 0
                self.wfile.write(content[:start])
                for position in range(start, len(content)):
                    self.wfile.write(content[position : position + 1])
                    self.wfile.flush()
                    receiver.pause(answer.pause)
            except OSError:  # the sender has gone
                self.close_connection = True

    return Handler
