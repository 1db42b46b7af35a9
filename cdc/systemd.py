"""What the daemon tells systemd: sd_notify's protocol, a datagram of lines to the socket that systemd names.

Without systemd every call does nothing. So does one that fails: an unheard sign of life is systemd's to judge.
"""

from __future__ import annotations

import contextlib
import socket
import time


class Notifier:
    """The way to systemd, or to nobody."""

    def __init__(self, address: str | None = None, watchdog: float | None = None) -> None:
        """
        Args:
            address: the socket, as in ``NOTIFY_SOCKET``; a leading ``@`` means an abstract one. None: nobody listens.
            watchdog: seconds within which it wants to hear of us, as in ``WATCHDOG_USEC``; None: it does not.
        """
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self.watchdog = watchdog if address else None
        """Seconds within which systemd wants to hear of us, or None."""

    def ready(self, status: str) -> None:
        """Started, or reloaded."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """About to read the configuration again."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Draining."""
        self._send("STOPPING=1", "STATUS=Draining.")

    def status(self, status: str) -> None:
        """One line for ``systemctl status``."""
        self._send(f"STATUS={status}")

    def lives(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        # A line break in a status would begin another assignment.
        text = "\n".join(" ".join(line.splitlines()) for line in lines)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(1.0)
            sender.connect(self._address)
            sender.sendall(text.encode())
