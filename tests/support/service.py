"""A server program of a test's own, on a free loopback port, to be killed, frozen and started again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from harness import is_stopped, until

PATIENCE = 60.0
_PORTS = range(20000, 30000)
"""Below those the kernel gives to clients: a server that is down must find its own port free again."""


def program(name: str) -> str:
    """Where a program is. Raises FileNotFoundError: it is not on this machine."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise FileNotFoundError(name)
    return found


def needed(name: str) -> str:
    """The same for a test, which is skipped where the program is missing, and fails there under CI=true."""
    try:
        return program(name)
    except FileNotFoundError:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing(f"no {name} on this machine")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses."""
    for port in random.SystemRandom().sample(_PORTS, 50):
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("50 ports and all of them taken")


class Service:
    """One server.

    Attributes:
        command: counts from the next start on.
    """

    def __init__(self, command: Sequence[str | Path], port: int, log: Path, *, patience: float = PATIENCE) -> None:
        """Start it.

        Args:
            command: the program and what it is told.
            port: where it will take connections, on 127.0.0.1.
            log: for what it says on both its streams.
            patience: seconds it may take to start.
        """
        self.command = command
        self._port = port
        self._log = log
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        assert self._process is None, "it runs"
        with self._log.open("ab") as log:
            self._process = process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._log.parent
            )
        what = f"{Path(self.command[0]).name} takes connections"
        until(lambda: self._listens() or process.poll() is not None, what, self._patience)
        assert process.poll() is None, f"it ended: {self._log.read_text(errors='replace')[-3000:]}"

    def kill(self) -> None:
        """SIGKILL, frozen or not; harmless when it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def terminate(self) -> None:
        """SIGTERM, for one that keeps in memory until then what it has acknowledged; waits until it has ended."""
        assert self._process is not None, "it does not run"
        self._process.terminate()
        self._process.wait(PATIENCE)
        self._process = None

    def freeze(self) -> None:
        """SIGSTOP: connections are taken, by the kernel, and nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)
        until(lambda: is_stopped(self.pid), "the server is stopped")

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        """Send another signal, such as the one that lets it read its configuration again."""
        os.kill(self.pid, number)

    def _listens(self) -> bool:
        with closing(socket.socket()) as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self._port)) == 0
