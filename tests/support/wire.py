"""A wire between clients and a server, for servers that must not be killed themselves.

    python wire.py PORT UPSTREAM [PEM]

forwards TCP connections to 127.0.0.1:UPSTREAM until it is killed, which cuts them all. PEM: a certificate with its key;
clients have to speak TLS then, and the server is spoken to in clear.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import sys
import threading
from pathlib import Path

from service import Service

_CHUNK = 1 << 18


def wire(port: int, upstream: int, directory: Path, pem: Path | None = None) -> Service:
    """A wire, as a process: :meth:`Service.kill` cuts it, :meth:`Service.start` mends it.

    Args:
        port: where clients connect.
        upstream: where the server listens.
        directory: for its log.
        pem: as in the head of this module.
    """
    arguments = [str(port), str(upstream), *([] if pem is None else [pem])]
    return Service([sys.executable, Path(__file__), *arguments], port, directory / "wire.log")


def _forward(client: socket.socket, upstream: int, tls: ssl.SSLContext | None) -> None:
    """Until one of the two has gone."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        stack.enter_context(client)
        if tls is not None:
            client = stack.enter_context(tls.wrap_socket(client, server_side=True))
        server = stack.enter_context(socket.create_connection(("127.0.0.1", upstream)))
        other = {client: server, server: client}
        selector = stack.enter_context(selectors.DefaultSelector())
        for end in other:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(end, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                end = key.fileobj
                assert isinstance(end, socket.socket)
                while True:
                    if not (data := end.recv(_CHUNK)):
                        return
                    other[end].sendall(data)
                    if not (isinstance(end, ssl.SSLSocket) and end.pending()):
                        break


def main() -> None:
    port, upstream, *pem = sys.argv[1:]
    tls = None
    if pem:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(pem[0])
    with socket.create_server(("127.0.0.1", int(port))) as listener:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_forward, args=(client, int(upstream), tls), daemon=True).start()


if __name__ == "__main__":
    main()
