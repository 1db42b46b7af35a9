"""The server: one thread that listens, a few that answer, and a port that may be taken."""

from __future__ import annotations

import logging
import socket
import threading
from typing import TYPE_CHECKING, Any

from waitress import wasyncore
from waitress.server import create_server

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

log = logging.getLogger(__name__)

RETRY_BIND = 10.0
"""Seconds between tries to have a port that is taken."""

_LIMITS: dict[str, Any] = {
    "threads": 6,
    "connection_limit": 64,
    "channel_timeout": 30,
    "cleanup_interval": 10,
    "max_request_header_size": 16 * 1024,
    "max_request_body_size": 64 * 1024,
    "clear_untrusted_proxy_headers": True,
    "expose_tracebacks": False,
    "asyncore_use_poll": True,
    "ident": None,
}


class Server:
    """Serves one application on one address until stopped; tries on while the port is taken."""

    def __init__(self, address: tuple[str, int], application: WSGIApplication) -> None:
        """
        Args:
            address: host and port; port 0: any that is free, see `port`.
            application: what answers.
        """
        self._address = address
        self._application = application
        self._stop = threading.Event()
        self._bound = threading.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._server: Any = None
        self.port: int | None = None
        """What it listens on; None as long as it does not."""

    def start(self) -> None:
        """Begin to listen, now or as soon as the port is free."""
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; requests that are being answered have a moment."""
        self._stop.set()
        if self._server is not None:
            self._server.pull_trigger()
        self._thread.join(5.0)

    def wait_until_bound(self, seconds: float) -> bool:
        """Whether it listens within so many seconds."""
        return self._bound.wait(seconds)

    def _run(self) -> None:
        # Its own words about queues and clients are no state changes of ours.
        logging.getLogger("waitress").setLevel(logging.CRITICAL)
        complained = False
        while not self._stop.is_set():
            try:
                listening = _listen(self._address)
            except OSError as error:
                if not complained:
                    fields = {"listen": f"{self._address[0]}:{self._address[1]}", "error": error.strerror or str(error)}
                    log.warning("No console and no metrics: the address cannot be had.", extra={"fields": fields})
                    complained = True
                self._stop.wait(RETRY_BIND)
                continue
            try:
                self._serve(listening)
            except Exception:
                log.exception("The HTTP server failed as it should not; starting again.")
                self._stop.wait(RETRY_BIND)

    def _serve(self, listening: socket.socket) -> None:
        sockets: dict[int, Any] = {}
        self._server = create_server(self._application, map=sockets, sockets=[listening], **_LIMITS)
        self.port = listening.getsockname()[1]
        self._bound.set()
        fields = {"listen": f"{self._address[0]}:{self.port}"}
        log.info("Console, metrics and health are served.", extra={"fields": fields})
        try:
            while not self._stop.is_set():
                wasyncore.loop(timeout=1.0, use_poll=True, map=sockets, count=1)
        finally:
            self.port = None
            self._server.task_dispatcher.shutdown(timeout=2)
            wasyncore.close_all(sockets, ignore_all=True)
            self._server = None


def _listen(address: tuple[str, int]) -> socket.socket:
    family, kind, protocol, _, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind(place)
        found.listen(64)
    except OSError:
        found.close()
        raise
    return found
