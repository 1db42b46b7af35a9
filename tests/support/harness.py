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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

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
    """One config.yaml, the command `cdc`, and the file its sink writes.

    Attributes:
        content: of the configuration; what is changed here counts from the next :meth:`write` on.
        environment: of every process, beside the tests' own.
        peak: the most memory one of its daemons was seen to have had resident, in bytes.
    """

    def __init__(
        self,
        directory: Path,
        dsn: str,
        tables: Mapping[str, Mapping[str, object]],
        path: str,
        *,
        database: Mapping[str, object] = MappingProxyType({}),
        sink: Mapping[str, object] = MappingProxyType({}),
        databases: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
        sinks: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            directory: for everything; empty.
            dsn: of database ``shop``.
            tables: name → options, as in the configuration.
            path: of the sink, relative to `directory`.
            database: more options of database ``shop``; its ``dsn`` may lead through a proxy.
            sink: more options of the sink.
            databases, sinks: others, by name.
            environment: see above.
        """
        self.directory = directory
        self.dsn = dsn
        self.config = directory / "config.yaml"
        self.log = directory / "cdc.log"
        self.file = directory / path.replace("{database}", DATABASE)
        self.environment = dict(environment)
        self.peak = 0
        self.content: dict[str, dict[str, dict[str, object]]] = {
            "databases": {DATABASE: {"dsn": dsn, "tables": tables, **database}, **_copy(databases)},
            "sinks": {SINK: {"type": "file", "path": str(directory / path), **sink}, **_copy(sinks)},
        }
        self._daemons = 0
        self.write()

    def write(self) -> None:
        """Write config.yaml anew."""
        self.config.write_text(json.dumps(self.content))  # JSON is YAML

    def cdc(
        self, *arguments: str, timeout: float = 120.0, codes: Collection[int] = (0,)
    ) -> subprocess.CompletedProcess[str]:
        """Run one command to its end, which has to be with one of `codes`; its stderr stands in the log too."""
        done = subprocess.run(
            [CDC, "-c", self.config, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=os.environ | self.environment,
        )
        with self.log.open("a") as log:
            log.write(done.stderr)
        assert done.returncode in codes, (
            f"cdc {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}"
        )
        return done

    def status(self) -> dict[str, Any]:
        """What `cdc status --json` says, also of a database that cannot be reached."""
        found: dict[str, Any] = json.loads(self.cdc("status", "--json", codes=(0, 69)).stdout)
        return found

    @contextlib.contextmanager
    def daemon(
        self,
        *options: str,
        program: Sequence[str | Path] = (CDC,),
        environment: Mapping[str, str] = MappingProxyType({}),
        serving: bool = True,
    ) -> Iterator[Daemon]:
        """`cdc run`; killed afterwards if it is still there. Any number at a time, each with a log of its own.

        Args:
            options: of ``run``.
            program: what to run in place of the installed command, such as one with a known mistake.
            environment: beside the project's, such as ``CDC_CRASH_AT``.
            serving: wait until it serves its sink; a second daemon does not while there is the first.
        """
        self._daemons += 1
        log = self.directory / f"daemon-{self._daemons}.log"
        daemon = Daemon(self, [*program, "-c", self.config, "run", *options], log, self.environment | dict(environment))
        try:
            if serving:
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

    def __init__(
        self, project: Project, command: Sequence[str | Path], log: Path, environment: Mapping[str, str]
    ) -> None:
        self.log = log
        self._project = project
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | environment
            )

    def said(self) -> str:
        """What the process has logged."""
        return self.log.read_bytes().decode()

    def wait_until_serving(self) -> None:
        """Wait until the sink is owned and served."""
        self.wait_until_it_says("Serving.")

    def wait_until_it_says(self, text: str, times: int = 1, seconds: float = 30.0) -> None:
        """Wait until a text stands in its log, so many times."""

        def found() -> bool:
            return self.said().count(text) >= times

        until(lambda: found() or self.process.poll() is not None, f"the daemon says {text!r}", seconds)
        assert found(), f"the daemon ended with {self.process.poll()} before it said {text!r}: {self.said()[-2000:]}"

    def lives_for(self, seconds: float) -> None:
        """Let it work for a while; AssertionError if it ends by itself."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        raise AssertionError(f"the daemon ended by itself with {code}: {self.said()[-2000:]}")

    def ends(self, seconds: float = 30.0) -> int:
        """Wait until it ends by itself, as at a crash point; returns the exit code, or minus the signal."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon lives on after {seconds} s: {self.said()[-2000:]}") from None

    def freeze(self) -> None:
        """SIGSTOP; returns when no thread of it runs any more."""
        self.process.send_signal(signal.SIGSTOP)
        until(lambda: is_stopped(self.process.pid), "the daemon is stopped")

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, frozen or not."""
        self._note_peak()
        self.process.kill()
        self.process.wait()

    def drain(self) -> int:
        """SIGTERM; returns the exit code."""
        self._note_peak()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def peak_rss(self) -> int:
        """The most memory it ever had resident, in bytes; while it lives."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def _note_peak(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ValueError):  # it ends at this moment, and a zombie has no memory
                self._project.peak = max(self._project.peak, self.peak_rss())


def is_stopped(pid: int) -> bool:
    """Whether no thread of a process runs, because of SIGSTOP."""
    try:
        # Each thread stops by itself. The state stands behind the name, which may hold anything.
        stats = [stat.read_text() for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):  # one has ended meanwhile
        return False
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def _copy(options: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, object]]:
    return {name: dict(values) for name, values in options.items()}


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
