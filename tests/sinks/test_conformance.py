"""One suite, every sink: what a destination may do, and what must come of it. The table: `docs/sinks/conformance.md`.

Each sink of the registry is run against its real server (`rig_KIND.py`; see `rig.py`), by the daemon, and directly
where the daemon adds nothing. What a destination cannot do the rig says, with the reason. After each test its cell is
compared with the document; ``python tests/sinks/conformance.py [-k KIND]`` runs the suite and writes the cells.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conformance import DOCUMENT, WRITER, YES, document, read_document
from harness import SINK, Project, until
from psycopg2.extensions import connection
from pydantic import BaseModel, SecretStr
from rig import NotApplicable, Received, Rig
from sql import fetch

from cdc import config as configuration
from cdc.config import Config
from cdc.connection import Connection
from cdc.daemon import Daemon, Plan
from cdc.errors import TransientFailure
from cdc.event import Event, Image, Op
from cdc.formats import encoder
from cdc.outbox import Outbox, Owner
from cdc.sinks import SINKS, create, option_models
from cdc.sinks.base import Sink

QUICKLY = {"initial": "20ms", "max": "200ms"}
MARK = "what-stands-in-a-row"
SECONDS = 60.0
"""Until something has arrived, on a machine that has other things to do."""


@pytest.fixture
def settled(
    rig: Rig, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[[str], contextlib.AbstractContextManager[None]]:
    """``with settled(behaviour):`` around a test: its outcome is what the document says, or the test fails."""

    @contextlib.contextmanager
    def settle(behaviour: str) -> Iterator[None]:
        cell = YES
        try:
            yield
        except NotApplicable as reason:
            cell = str(reason)
        record_property("cell", (rig.kind, behaviour, cell))
        if not request.config.pluginmanager.has_plugin(WRITER):
            said = read_document().get((rig.kind, behaviour))
            assert said == cell, f"{DOCUMENT.name} says {said!r}: run python tests/sinks/conformance.py -k {rig.kind}"

    return settle


def test_the_document_is_about_every_sink_and_every_behaviour(request: pytest.FixtureRequest) -> None:
    if request.config.pluginmanager.has_plugin(WRITER):
        pytest.skip("it is being written")
    cells = read_document()
    assert {kind for kind, _ in cells} == set(SINKS)
    assert DOCUMENT.read_text(encoding="utf-8") == document(cells), "it was edited by hand"


# -- the rigs -----------------------------------------------------------------------------------------------------


def rig_of(kind: str) -> type[Rig]:
    """The class in ``rig_KIND.py``."""
    module = importlib.import_module(f"rig_{kind}")
    (found,) = (
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, Rig) and thing is not Rig
    )
    assert found.kind == kind
    return found


@pytest.mark.parametrize("kind", sorted(SINKS))
def test_every_sink_has_a_rig(kind: str) -> None:
    assert issubclass(rig_of(kind), Rig)


@pytest.fixture(scope="module", params=sorted(SINKS))
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The destination; one server for all tests of a sink."""
    kind: str = request.param
    try:
        made = rig_of(kind)(tmp_path_factory.mktemp(kind))
    except FileNotFoundError as error:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing(f"no {error} on this machine")
    yield made
    made.close()


class Arrivals:
    """What has arrived since a test began."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._before = {received.id for received in rig.received()}

    def all(self) -> list[Received]:
        """In the destination's order, duplicates included."""
        return [received for received in self._rig.received() if received.id not in self._before]

    def ids(self) -> list[int]:
        """Column id of their keys."""
        return [key["id"] for event in map(_event, self.all()) if (key := event.key) is not None]


@pytest.fixture
def arrivals(rig: Rig) -> Arrivals:
    return Arrivals(rig)


def _event(received: Received) -> Event:
    event = Event.from_json(received.body)
    assert event.id == received.id
    return event


# -- the source ---------------------------------------------------------------------------------------------------


class Source:
    """A database with a captured table item (id, v), and what its outbox holds.

    Attributes:
        dsn: of the database.
        conn: a writer, in autocommit.
    """

    def __init__(self, dsn: str, conn: connection) -> None:
        self.dsn = dsn
        self.conn = conn
        self._events: list[Event] = []
        self._session = Connection(dsn, purpose="witness")
        self._outbox = Outbox(self._session, database="shop", sink="witness", owner=Owner("witness", 1))
        fetch(conn, "create table item (id integer primary key, v text); select cdc.enable_capture('item')")
        self._outbox.claim(start="earliest")

    def run(self, statement: str, *parameters: object) -> None:
        """One transaction."""
        fetch(self.conn, statement, parameters or None)

    def insert(self, *ids: int, text: str = "x") -> None:
        """One transaction."""
        self.run("insert into item select unnest(%s), %s", list(ids), text)

    def change(self, keys: int, rounds: int) -> None:
        """Change rows 1 to `keys` so many times, each round a transaction."""
        for number in range(rounds):
            self.run("update item set v = v || %s where id <= %s", str(number), keys)

    def events(self) -> list[Event]:
        """Everything that was ever written, in order."""
        acked: int | None = None
        while batch := self._outbox.next_batch(acked, events=5000, bytes_=1 << 24):
            self._events += [event for event in batch.events if isinstance(event, Event)]
            acked = batch.last_seq
        return self._events

    def status(self) -> tuple[str | None, str | None]:
        """State of the sink, and its last error."""
        rows = fetch(self.conn, "select state, last_error from cdc.sink where name = %s", (SINK,))
        return rows[0] if rows else (None, None)

    def is_delivered(self) -> bool:
        """Whether the sink has acknowledged everything."""
        rows = fetch(
            self.conn,
            """select p.snap_hi is null and not exists (select from cdc.event e
                        where not pg_visible_in_snapshot(e.txid, p.snap_lo))
                 from cdc.position p where sink = %s""",
            (SINK,),
        )
        return rows == [(True,)]

    def acknowledged(self) -> tuple[Any, ...]:
        """The sink's position."""
        return fetch(self.conn, "select snap_lo, snap_hi, last_seq from cdc.position where sink = %s", (SINK,))[0]

    def dead_letters(self) -> list[tuple[int, str]]:
        """Column id of their keys, and why."""
        return fetch(self.conn, "select (event -> 'key' ->> 'id')::integer, reason from cdc.dead_letter order by id")

    def close(self) -> None:
        self._session.close()


@pytest.fixture
def source(installed: str, connect: Callable[..., connection]) -> Iterator[Source]:
    made = Source(installed, connect(installed))
    yield made
    made.close()


def judge(source: Source, arrivals: Arrivals) -> int:
    """All of it, nothing else, unchanged, each key in order; returns how many came more than once."""
    written = {event.id: event for event in source.events()}
    arrived = arrivals.all()
    invented = [received.id for received in arrived if received.id not in written]
    assert not invented, f"arrived and never written: {invented[:3]}"
    altered = [received.id for received in arrived if received.body != written[received.id].to_json()]
    assert not altered, f"not what was written: {altered[:3]}"
    first = list(dict.fromkeys(received.id for received in arrived))
    lost = set(written) - set(first)
    assert not lost, f"{len(lost)} of {len(written)} did not arrive"
    last: dict[str, int] = {}
    for event in (written[id_] for id_ in first):
        assert event.key is not None
        assert last.get(event.key.raw, 0) < event.source.seq, f"{event.id} arrived after one made later"
        last[event.key.raw] = event.source.seq
    return len(arrived) - len(first)


# -- the sink, as it is run ---------------------------------------------------------------------------------------


def load(directory: Path, dsn: str, sink: dict[str, object]) -> Config:
    """The configuration of database shop and this one sink, read from a file as it always is."""
    content = {
        "databases": {"shop": {"dsn": dsn, "tables": {"public.item": {}}}},
        "sinks": {SINK: {"start": "earliest", "retry": QUICKLY, **sink}},
    }
    path = directory / "conformance.yaml"
    path.write_text(json.dumps(content))
    return configuration.load(path, option_models(), {})


@contextlib.contextmanager
def serving(source: Source, directory: Path, sink: dict[str, object]) -> Iterator[None]:
    """The daemon, in a thread of this process."""
    daemon = Daemon(Plan(load(directory, source.dsn, sink), {"shop": source.dsn}))
    failures: list[BaseException] = []

    def run() -> None:
        try:
            daemon.run()
        except Exception as error:  # noqa: BLE001  # told below
            failures.append(error)

    thread = threading.Thread(target=run, name="daemon")
    thread.start()
    try:
        yield
    finally:
        daemon.stop()
        thread.join(SECONDS)
    assert not thread.is_alive(), "the daemon does not stop"
    assert not failures or "stopped" in str(source.status()[0]), failures


@pytest.fixture
def project(rig: Rig, source: Source, tmp_path: Path) -> Callable[..., Project]:
    """``project(**options)``: the installed command, delivering to the rig."""

    def make(**options: object) -> Project:
        made = Project(tmp_path, source.dsn, {"public.item": {}}, "unused")
        made.content["sinks"] = {SINK: {"start": "earliest", "retry": QUICKLY, **rig.configuration(), **options}}
        made.write()
        return made

    return make


@pytest.fixture
def opened() -> Iterator[Callable[..., Sink[Any]]]:
    """``opened(directory, sink)``: the sink itself, not opened; closed after the test."""
    made: list[Sink[Any]] = []

    def make(directory: Path, sink: dict[str, object]) -> Sink[Any]:
        options = load(directory, "dbname=shop", sink).sinks[SINK]
        made.append(create(SINK, options, encoder(options.format, options.binding)))
        return made[-1]

    yield make
    for sink in made:
        sink.close()


def an_event(key: int) -> Event:
    """An insert that was never in a database."""
    return Event.model_validate(
        {
            "id": f"direct-{uuid.uuid4().hex}",
            "op": Op.INSERT,
            "source": {
                "database": "shop",
                "schema": "public",
                "table": "item",
                "seq": key,
                "txid": key,
                "ts": datetime(2026, 11, 22, tzinfo=UTC),
            },
            "key": Image(f'{{"id":{key}}}'),
            "before": None,
            "after": Image(f'{{"id":{key},"v":"{MARK}"}}'),
            "changed": None,
            "context": None,
        }
    )


def secrets_of(directory: Path, sink: dict[str, object]) -> set[str]:
    """Every value of a sink's configuration that must not be seen."""
    found: set[str] = set()

    def look(value: object) -> None:
        if isinstance(value, SecretStr):
            found.add(value.get_secret_value())
        elif isinstance(value, BaseModel):
            for name in type(value).model_fields:
                look(getattr(value, name))
        elif isinstance(value, dict):
            for inner in value.values():
                look(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                look(inner)

    look(load(directory, "dbname=shop", sink).sinks[SINK])
    # A URL is a secret as a whole, and what must not be seen is the password in it.
    return {secret for whole in found for secret in re.findall(r"://[^/@]*:([^/@]+)@", whole) or [whole]}


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Every line that anybody logs, however quietly."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.emit = lambda record: lines.append(  # type: ignore[method-assign]
        f"{handler.format(record)} {getattr(record, 'fields', '')}"
    )
    loggers = logging.getLogger(), logging.getLogger("cdc")
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel("DEBUG")
    yield lines
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


Settled = Callable[[str], contextlib.AbstractContextManager[None]]


# -- behaviours ---------------------------------------------------------------------------------------------------


def test_the_changes_of_a_key_arrive_in_the_order_they_were_made(
    rig: Rig, settled: Settled, source: Source, arrivals: Arrivals, tmp_path: Path
) -> None:
    with settled("order per key"):
        source.insert(*range(1, 21))
        with serving(source, tmp_path, {**rig.configuration(), "batch": {"events": 30}}):
            source.run(";".join(f"update item set v = '{n}' where id <= 5" for n in range(10)))
            source.change(10, 20)
            source.run("update item set id = 100 + id where id = 20")
            source.run("update item set v = 'moved' where id = 120; delete from item where id <= 10")
            source.insert(*range(1, 11), text=MARK)
            until(source.is_delivered, "all of it is acknowledged", SECONDS)
        assert judge(source, arrivals) == 0, "nothing failed, so nothing had to be delivered twice"


def test_a_daemon_that_is_killed_loses_nothing_and_keeps_the_order(
    settled: Settled, source: Source, arrivals: Arrivals, project: Callable[..., Project]
) -> None:
    batch = 40
    with settled("at least once"):
        made = project(batch={"events": batch})
        source.insert(*range(1, 21))
        for point in ("before-deliver:2", "after-deliver:2", "before-acknowledge:2"):
            source.change(20, 5)
            with made.daemon(environment={"CDC_CRASH_AT": point}, serving=False) as daemon:
                assert daemon.ends(SECONDS) == -9
        source.change(20, 5)
        seen = len(arrivals.all())
        with made.daemon(serving=False):
            until(lambda: len(arrivals.all()) > seen, "more arrives", SECONDS)
        made.cdc("run", "--until-idle")
        duplicates = judge(source, arrivals)
        # Of a backlog pages of one, two and four batches are read, and what was delivered of one comes again.
        assert duplicates <= (0 + 1 + 2 + 4) * batch


def test_what_comes_again_has_its_old_id(
    rig: Rig, settled: Settled, source: Source, arrivals: Arrivals, project: Callable[..., Project]
) -> None:
    with settled("same id"):
        made = project()
        source.insert(*range(1, 31))
        with made.daemon(environment={"CDC_CRASH_AT": "after-deliver"}, serving=False) as daemon:
            assert daemon.ends(SECONDS) == -9
        made.cdc("run", "--until-idle")
        assert judge(source, arrivals) == (0 if rig.deduplicates else 30)


def test_only_what_failed_goes_again_and_nothing_later_of_its_key_overtakes_it(
    rig: Rig, settled: Settled, source: Source, arrivals: Arrivals, tmp_path: Path
) -> None:
    with settled("partial failure"):
        rig.refuse(2)
        try:
            source.run(
                "insert into item select unnest(array[1, 2, 3]), 'x';"
                + ";".join(f"update item set v = '{n}' where id <= 3" for n in range(9))
            )
            with serving(source, tmp_path, rig.configuration()):
                until(lambda: sum(key != 2 for key in arrivals.ids()) == 20, "the others arrive", SECONDS)
                until(lambda: source.status()[0] == "retrying", "the failure is seen", SECONDS)
                assert 2 not in arrivals.ids()
                rig.refuse(None)
                until(source.is_delivered, "the rest arrives", SECONDS)
        finally:
            rig.refuse(None)
        assert judge(source, arrivals) == 0
        assert source.dead_letters() == []


def test_a_server_that_stalls_is_waited_for_in_flat_memory(
    rig: Rig, settled: Settled, source: Source, arrivals: Arrivals, project: Callable[..., Project]
) -> None:
    with settled("back-pressure"):
        made = project(batch={"events": 50, "bytes": "512KiB"})
        source.insert(*range(1, 101), text=MARK * 400)  # what a batch costs in memory is paid before the stall
        with made.daemon() as daemon:
            until(source.is_delivered, "it is warm", SECONDS)
            rig.stall()
            try:
                before = daemon.peak_rss()
                source.run("insert into item select g, repeat(%s, 400) from generate_series(101, 3100) g", MARK)
                until(lambda: source.status()[0] == "retrying", "it gives up waiting", SECONDS)
                position = source.acknowledged()
                said = source.status()[1] or ""
                failed = fetch(source.conn, "select last_error_at from cdc.sink where name = %s", (SINK,))
                until(
                    lambda: fetch(source.conn, "select last_error_at from cdc.sink where name = %s", (SINK,)) != failed,
                    "it tries again",
                    SECONDS,
                )
                assert source.acknowledged() == position
                assert MARK not in said
                grown = daemon.peak_rss() - before
                assert grown < 16 * 2**20, f"{grown} bytes for a backlog of 24 MB"
            finally:
                rig.resume()
            until(source.is_delivered, "all of it arrives", SECONDS)
            assert daemon.drain() == 0
        judge(source, arrivals)


def test_an_event_that_is_too_large_becomes_a_dead_letter_and_the_others_flow(
    rig: Rig, settled: Settled, source: Source, arrivals: Arrivals, tmp_path: Path, logged: list[str]
) -> None:
    with settled("oversize"):
        source.conn.autocommit = False
        source.insert(1)
        source.insert(2, text=MARK * (rig.limit() // len(MARK) + 1))
        source.insert(3)
        source.conn.commit()
        source.conn.autocommit = True
        with serving(source, tmp_path, {**rig.configuration(), "batch": {"bytes": "1GiB"}}):
            source.insert(4)
            until(source.is_delivered, "all of it is settled", SECONDS)
        ((key, reason),) = source.dead_letters()
        assert key == 2
        assert MARK not in reason
        assert not any(MARK in line for line in logged)
        assert sorted(set(arrivals.ids())) == [1, 3, 4]


def test_refused_credentials_are_told_without_the_secret(
    rig: Rig, settled: Settled, source: Source, arrivals: Arrivals, tmp_path: Path, logged: list[str]
) -> None:
    with settled("refused credentials"):
        sink = rig.forbidden()
        secrets = secrets_of(tmp_path, sink)
        assert secrets, "the credentials are no SecretStr"
        source.insert(1)
        with serving(source, tmp_path, sink):
            until(lambda: source.status()[0] in ("retrying", "stopped"), "the state says so", SECONDS)
            until(lambda: bool(source.status()[1]), "the error says so", SECONDS)
            error = source.status()[1] or ""
        assert not source.is_delivered()
        assert arrivals.all() == []
        for secret in secrets:
            assert secret not in error
            assert not any(secret in line for line in logged)
        assert "unexpected" not in error


def test_a_server_that_is_killed_and_comes_back_gets_everything(
    rig: Rig, settled: Settled, source: Source, arrivals: Arrivals, tmp_path: Path
) -> None:
    with settled("server restart"):
        with serving(source, tmp_path, {**rig.configuration(), "batch": {"events": 50}}):
            source.run("insert into item select g, 'x' from generate_series(1, 1500) g")
            until(lambda: len(arrivals.all()) > 100, "events flow", SECONDS)
            rig.stop()
            try:
                source.change(20, 5)
                until(lambda: source.status()[0] == "retrying", "it is missed", SECONDS)
                assert MARK not in (source.status()[1] or "")
            finally:
                rig.start()
            source.change(20, 2)
            until(source.is_delivered, "all of it arrives", SECONDS)
        judge(source, arrivals)


def test_a_server_that_is_not_there_is_named_and_waited_for(
    rig: Rig,
    settled: Settled,
    arrivals: Arrivals,
    opened: Callable[..., Sink[Any]],
    tmp_path: Path,
    logged: list[str],
) -> None:
    with settled("unreachable"):
        address = re.search(r"127\.0\.0\.1|localhost", json.dumps(rig.configuration()))
        secrets = secrets_of(tmp_path, rig.configuration())
        sink = opened(tmp_path, rig.configuration())
        event = an_event(1)
        rig.stop()
        try:
            with pytest.raises(TransientFailure) as raised:
                _open_and_deliver(sink, [event])
        finally:
            rig.start()
        assert address is None or address[0] in str(raised.value)
        for secret in secrets:
            assert secret not in str(raised.value)
            assert not any(secret in line for line in logged)
        assert MARK not in str(raised.value)

        def works() -> bool:
            try:
                _open_and_deliver(sink, [event])
            except TransientFailure:
                return False
            return True

        until(works, "it works", SECONDS)
        assert {received.id for received in arrivals.all()} == {event.id}


def _open_and_deliver(sink: Sink[Any], batch: Sequence[Event]) -> None:
    sink.open()
    sink.deliver(batch)


def test_a_sink_may_be_closed_at_any_time_and_opened_again(
    rig: Rig, settled: Settled, arrivals: Arrivals, opened: Callable[..., Sink[Any]], tmp_path: Path
) -> None:
    with settled("close and open"):
        sink = opened(tmp_path, rig.configuration())
        sink.close()
        first, second = [an_event(1), an_event(2)], [an_event(1)]
        _open_and_deliver(sink, first)
        sink.close()
        sink.close()
        _open_and_deliver(sink, second)
        sink.close()
        assert sorted(received.id for received in arrivals.all()) == sorted(event.id for event in first + second)
