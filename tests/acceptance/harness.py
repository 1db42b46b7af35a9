"""The installed `cdc` as a user runs it: its configuration, its processes, and the file its sink writes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from psycopg2.extensions import connection

from cdc.sql import QUERIES

CDC = Path(sys.executable).with_name("cdc")
DATABASE = "shop"
SINK = "mirror"
SEEDS = [1]
"""What the writers' choices come from; a seed is part of a test's name and of every violation."""


def until(condition: Callable[[], bool], what: str, seconds: float = 30.0, pause: float = 0.01) -> float:
    """Wait for a condition; returns the seconds it took. Raises AssertionError at the deadline."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        assert waited < seconds, f"not within {seconds} s: {what}"
        threading.Event().wait(pause)
    return time.monotonic() - began


class Project:
    """One config.yaml, the command `cdc`, and the file its sink writes."""

    def __init__(self, directory: Path, dsn: str, tables: Mapping[str, Mapping[str, object]], path: str) -> None:
        """
        Args:
            directory: for everything; empty.
            dsn: of database ``shop``.
            tables: name → options, as in the configuration.
            path: of the sink, relative to `directory`.
        """
        self.directory = directory
        self.dsn = dsn
        self.config = directory / "config.yaml"
        self.log = directory / "cdc.log"
        content = {  # JSON is YAML
            "databases": {DATABASE: {"dsn": dsn, "tables": tables}},
            "sinks": {SINK: {"type": "file", "path": str(directory / path)}},
        }
        self.config.write_text(json.dumps(content))

    def cdc(self, *arguments: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run one command to its end; its stderr stands in the log too."""
        done = subprocess.run(
            [CDC, "-c", self.config, *arguments], capture_output=True, text=True, timeout=timeout, check=False
        )
        with self.log.open("a") as log:
            log.write(done.stderr)
        assert done.returncode == 0, f"cdc {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}"
        return done

    @contextlib.contextmanager
    def daemon(self) -> Iterator[Daemon]:
        """`cdc run`, serving; killed afterwards if it is still there."""
        daemon = Daemon(self)
        try:
            daemon.wait_until_serving()
            yield daemon
        finally:
            daemon.kill()

    def remove_output(self) -> None:
        """Remove what was delivered: pytest keeps a test's directory for a while, and this may be large."""
        for path in self.directory.glob("*.jsonl"):
            path.unlink()

    def armed(self, conn: connection) -> bool:
        """Whether the daemon sleeps and asks to be rung."""
        with conn.cursor() as cursor:
            cursor.execute(QUERIES["armed"])
            (armed,) = cursor.fetchone() or (False,)
        return bool(armed)


class Daemon:
    """One process of `cdc run`."""

    def __init__(self, project: Project) -> None:
        self._project = project
        with project.log.open("ab") as log:
            self._log_from = log.tell()
            self.process = subprocess.Popen(
                [CDC, "-c", project.config, "run"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def said(self) -> str:
        """What the process has logged."""
        with self._project.log.open("rb") as log:
            log.seek(self._log_from)
            return log.read().decode()

    def wait_until_serving(self) -> None:
        """Wait until the sink is owned and served."""
        until(lambda: "Serving." in self.said() or self.process.poll() is not None, "the daemon serves")
        assert self.process.poll() is None, f"the daemon ended at its start: {self.said()[-2000:]}"

    def lives_for(self, seconds: float) -> None:
        """Let it work for a while; AssertionError if it ends by itself."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        raise AssertionError(f"the daemon ended by itself with {code}: {self.said()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def drain(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def peak_rss(self) -> int:
        """The most memory it ever had resident, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024


class Tail(threading.Thread):
    """Notes when each line of a file showed up.

    Attributes:
        arrivals: by line number, from 0; seconds by the clock of ``time.time()``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(name="tail", daemon=True)
        self.arrivals: list[float] = []
        self._path = path
        self._done = threading.Event()

    def run(self) -> None:
        descriptor: int | None = None
        position = 0
        try:
            while not self._done.wait(0.002):
                if descriptor is None:
                    if not self._path.exists():
                        continue
                    descriptor = os.open(self._path, os.O_RDONLY)
                data = os.pread(descriptor, 1 << 22, position)
                now = time.time()
                # A torn last line is not a line: after a kill it is cut off again.
                position += data.rfind(b"\n") + 1
                self.arrivals.extend([now] * data.count(b"\n"))
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def wait_for(self, lines: int) -> None:
        """Wait until so many lines have been seen."""
        until(lambda: len(self.arrivals) >= lines, f"{lines} lines are seen")

    def __enter__(self) -> Tail:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


def read_lines(path: Path) -> list[str]:
    """The lines of a file of JSON Lines. Raises AssertionError if the last one is torn."""
    if not path.exists():
        return []
    text = path.read_bytes().decode()
    assert not text or text.endswith("\n"), f"{path} ends in the middle of a line"
    return text.split("\n")[:-1]


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def report(figures: str) -> None:
    """Show what was measured; `pytest -s` or `-rP` lets it through."""
    print(f"\n{figures}")  # noqa: T201  # the one place
