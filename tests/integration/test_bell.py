"""The bell: armed when everybody sleeps, silent otherwise, and no wake-up is ever lost."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import psycopg2
import pytest
from psycopg2.extensions import connection

from cdc import bell as bell_module
from cdc import listener, pipeline
from cdc.bell import Bell, Mode, Sleeper
from cdc.connection import Connection
from cdc.errors import TransientFailure
from cdc.event import Event
from cdc.listener import Listener
from cdc.options import BatchOptions, RetryOptions, SinkOptions
from cdc.outbox import Owner
from cdc.pipeline import Pipeline
from cdc.sinks.base import Sink

OWNER = Owner("test", 1)
SOON = 3.0
"""Seconds a delivery may take on a busy machine; a lost wake-up takes SAFETY_POLL, ten times as long."""

Connect = Callable[..., connection]


def fetch(conn: connection, statement: str, parameters: object = None) -> list[tuple[Any, ...]]:
    with conn.cursor() as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


def value(conn: connection, statement: str, parameters: object = None) -> Any:
    return fetch(conn, statement, parameters)[0][0]


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.001)


class Options(SinkOptions):
    type: Literal["collect"] = "collect"


class Collector(Sink[Options]):
    """Keeps what it is given, and when; fails while `broken`."""

    Options = Options

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name, options)
        self.events: list[Event] = []
        self.at: dict[int, float] = {}  # id → when it came
        self.broken = False

    def deliver(self, batch: Sequence[Event]) -> None:
        if self.broken:
            raise TransientFailure("broken")
        now = time.monotonic()
        for event in batch:
            self.events.append(event)
            if event.key is not None:
                self.at.setdefault(event.key["id"], now)


class CountingBell(Bell):
    """Counts what it does."""

    def __init__(self, mode: Mode) -> None:
        super().__init__(mode)
        self.arms = 0
        self.disarms = 0

    def arm(self) -> None:
        self.arms += 1
        super().arm()

    def disarm(self) -> None:
        if self.armed_since is not None:
            self.disarms += 1
        super().disarm()


class House:
    """A listener, a bell and pipelines of one database."""

    def __init__(self, dsn: str, bell: Bell | None = None) -> None:
        self.dsn = dsn
        self.bell = bell or CountingBell("adaptive")
        self.stop = threading.Event()
        self.listener = Listener(
            dsn, database="shop", channel="cdc", bell=self.bell, stop=self.stop, process=OWNER.process
        )
        self.pipelines: list[Pipeline] = []

    def listen(self) -> None:
        self.listener.start()

    def serve(self, sink: str = "audit", **options: object) -> Collector:
        collector = Collector(sink, Options.model_validate(options))
        served = Pipeline(self.dsn, database="shop", sink=collector, bell=self.bell, stop=self.stop, owner=OWNER)
        self.pipelines.append(served)
        served.start()
        wait_for(lambda: served.state == "running")  # from here on it knows where it began
        return collector

    def end(self) -> None:
        self.stop.set()
        for served in self.pipelines:
            served.interrupt()
        self.listener.stop()
        threads = [thread for thread in (*self.pipelines, self.listener) if thread.ident is not None]
        for thread in threads:
            thread.join(15)
        assert not [thread.name for thread in threads if thread.is_alive()]

    @property
    def armed(self) -> bool:
        return self.bell.armed_since is not None


@pytest.fixture
def house(installed: str) -> Iterator[House]:
    """A house with an adaptive bell, to be filled by the test."""
    made = House(installed)
    yield made
    made.end()


@pytest.fixture
def shop(installed: str, connect: Connect) -> connection:
    """A writer; table item (id, v) is captured."""
    conn = connect(installed)
    fetch(conn, "create table item (id integer primary key, v text); select cdc.enable_capture('item')")
    return conn


@pytest.fixture
def ear(installed: str, connect: Connect) -> Callable[[], list[str]]:
    """``ear()`` returns the payloads notified since the last call."""
    conn = connect(installed)
    fetch(conn, "listen cdc")

    def heard() -> list[str]:
        fetch(conn, "select 1")
        payloads = [note.payload for note in conn.notifies if not note.payload.startswith("cdc self-test")]
        conn.notifies.clear()
        return payloads

    return heard


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What the package logs, whether or not a test of the command line has set its logging up."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("cdc")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def ring_lock(conn: connection) -> list[int]:
    """Who asks to be rung."""
    rows = fetch(
        conn,
        """select pid from pg_locks where locktype = 'advisory' and classid = 6513763 and granted
                                      and mode = 'ExclusiveLock'
              and database = (select oid from pg_database where datname = current_database())""",
    )
    return [pid for (pid,) in rows]


def backends(conn: connection, application: str) -> list[int]:
    rows = fetch(
        conn,
        "select pid from pg_stat_activity where datname = current_database() and application_name = %s",
        (application,),
    )
    return [pid for (pid,) in rows]


def insert(conn: connection, id_: int, text: str = "") -> None:
    fetch(conn, "insert into item values (%s, %s)", (id_, text))


def arrives(collector: Collector, id_: int, seconds: float = SOON) -> None:
    wait_for(lambda: id_ in collector.at, seconds)


# -- awake and asleep ---------------------------------------------------------------------------------------------


def test_the_bell_is_armed_when_everybody_sleeps_and_stays_armed_for_single_changes(
    house: House, shop: connection, ear: Callable[[], list[str]]
) -> None:
    house.listen()
    one, two = house.serve("one"), house.serve("two")
    wait_for(lambda: house.armed)
    assert ring_lock(shop) == backends(shop, "cdc listener")
    for id_ in range(5):
        insert(shop, id_)
        arrives(one, id_)
        arrives(two, id_)
    assert house.armed
    assert isinstance(house.bell, CountingBell)
    assert (house.bell.arms, house.bell.disarms) == (1, 0)
    heard = [Event.from_json(payload) for payload in ear()]
    assert heard == one.events == two.events
    assert house.listener.malformed == 0


def test_writers_are_silent_while_nobody_asks_to_be_rung(
    house: House, shop: connection, ear: Callable[[], list[str]]
) -> None:
    for id_ in range(3):
        insert(shop, id_)
    assert ear() == []
    house.listen()
    wait_for(lambda: house.bell.audible)
    insert(shop, 3)
    assert ear() == []  # there is a listener, and no pipeline that sleeps
    house.serve()
    wait_for(lambda: house.armed)
    insert(shop, 4)
    (heard,) = ear()
    assert Event.from_json(heard).key == {"id": 4}


def test_one_pipeline_that_works_keeps_the_bell_from_being_armed(house: House, shop: connection) -> None:
    house.listen()
    asleep = Sleeper("asleep", lambda _: True, linger=0.02)
    busy = Sleeper("busy", lambda _: True, linger=0.02)
    for sleeper in (asleep, busy):
        house.bell.join(sleeper)
    resting = threading.Thread(target=doze, args=(house, asleep))
    resting.start()
    until = time.monotonic() + 5 * bell_module.SETTLE
    while time.monotonic() < until:
        house.bell.looking(busy)
        house.bell.found(busy, full=False)
        house.bell.pace(busy, 1)
        assert not house.armed
        assert ring_lock(shop) == []
    house.bell.leave(busy)
    wait_for(lambda: house.armed)
    house.stop.set()
    house.bell.wake()
    resting.join(5)
    assert not resting.is_alive()


def doze(house: House, sleeper: Sleeper) -> None:
    """Look and find nothing, until the house ends."""
    while not house.stop.is_set():
        house.bell.looking(sleeper)
        house.bell.found_nothing(sleeper)
        house.bell.rest(sleeper)


def test_an_event_wakes_only_those_who_want_it() -> None:
    bell = Bell("adaptive")
    orders = Sleeper("orders", lambda event: event.source.table == "orders", linger=0.02)
    everything = Sleeper("everything", lambda _: True, linger=0.02)
    bell.join(orders)
    bell.join(everything)
    event = Event.from_json(forged("items"))
    bell.wake(event)
    assert (orders.called, everything.called) == (False, True)
    bell.wake()
    assert orders.called
    bell.looking(orders)
    bell.leave(orders)
    bell.wake()
    assert not orders.called


def test_whoever_looked_before_the_bell_was_armed_looks_once_more() -> None:
    bell = Bell("adaptive")
    bell.audible = True
    sleeper = Sleeper("one", lambda _: True, linger=0.02)
    bell.join(sleeper)
    bell.looking(sleeper)
    bell.arm()
    began = time.monotonic()
    bell.found_nothing(sleeper)
    bell.rest(sleeper)
    assert time.monotonic() - began < SOON
    bell.looking(sleeper)
    timer = threading.Timer(0.05, bell.wake)
    timer.start()
    began = time.monotonic()
    bell.found_nothing(sleeper)
    bell.rest(sleeper)
    assert 0.04 < time.monotonic() - began < SOON
    timer.join()


def test_a_ring_during_a_look_is_not_forgotten() -> None:
    bell = Bell("adaptive")
    sleeper = Sleeper("one", lambda _: True, linger=0.02)
    bell.join(sleeper)
    bell.arm()
    bell.looking(sleeper)
    bell.wake()
    began = time.monotonic()
    bell.found_nothing(sleeper)
    bell.rest(sleeper)
    assert time.monotonic() - began < SOON


def test_asleep_and_armed_no_statement_runs(house: House, shop: connection) -> None:
    house.listen()
    sink = house.serve("one")
    house.serve("two")
    insert(shop, 1)
    arrives(sink, 1)
    wait_for(lambda: house.armed)

    def last_statements() -> list[tuple[Any, ...]]:
        return fetch(
            shop,
            """select pid, query_start from pg_stat_activity
                where datname = current_database() and application_name in ('cdc one', 'cdc two') order by pid""",
        )

    settled = [last_statements()]

    def unchanged_for_a_moment() -> bool:
        settled.append(last_statements())
        del settled[:-50]
        return len(settled) == 50 and settled[0] == settled[-1]

    wait_for(unchanged_for_a_moment)  # the last look, after the bell was armed
    before = last_statements()
    assert len(before) == 2
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        assert last_statements() == before
    insert(shop, 2)
    arrives(sink, 2)


# -- no wake-up is lost -------------------------------------------------------------------------------------------


def test_the_bell_is_not_armed_while_a_silent_writer_is_in_flight(
    house: House, shop: connection, installed: str, connect: Connect, ear: Callable[[], list[str]]
) -> None:
    silent = connect(installed, autocommit=False)
    insert(silent, 1)
    house.listen()
    sink = house.serve()
    wait_for(lambda: house.pipelines[0].state == "running" and house.bell.audible)
    until = time.monotonic() + 5 * bell_module.SETTLE
    while time.monotonic() < until:
        assert not house.armed
        assert ring_lock(shop) == []
    insert(shop, 2)  # others are delivered meanwhile
    arrives(sink, 2)
    silent.commit()
    arrives(sink, 1)
    assert ear() == []
    wait_for(lambda: house.armed)


def test_a_silent_writer_that_rolled_back_its_only_savepoint_does_not_count(
    house: House, shop: connection, installed: str, connect: Connect, ear: Callable[[], list[str]]
) -> None:
    writer = connect(installed, autocommit=False)
    fetch(writer, "savepoint a")
    insert(writer, 1)
    fetch(writer, "rollback to a")  # and with it goes its lock
    house.listen()
    sink = house.serve()
    wait_for(lambda: house.armed)
    insert(writer, 2)
    writer.commit()
    arrives(sink, 2)
    assert len(ear()) == 1


def test_a_writer_that_rang_before_a_savepoint_was_rolled_back_still_rings(
    house: House, shop: connection, installed: str, connect: Connect
) -> None:
    house.listen()
    sink = house.serve()
    wait_for(lambda: house.armed)
    writer = connect(installed, autocommit=False)
    for id_ in range(0, 60, 2):
        fetch(writer, "savepoint a")
        insert(writer, id_)
        fetch(writer, "rollback to a")
    insert(writer, 1)
    writer.commit()
    arrives(sink, 1)
    assert len(sink.events) == 1


class TimedBell(CountingBell):
    """Tells, in the listener's thread, that it is about to arm."""

    def __init__(self) -> None:
        super().__init__("adaptive")
        self.about_to_arm = threading.Event()

    def should_arm(self) -> bool:
        answer = super().should_arm()
        if answer:
            self.about_to_arm.set()
        return answer


def test_a_silent_commit_at_the_very_moment_of_arming_is_delivered_at_once(
    installed: str, shop: connection, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (listener, bell_module):
        monkeypatch.setattr(module, "SETTLE", 0.004)
        monkeypatch.setattr(module, "SHORTEST_POLL", 0.0003)
    chance = random.Random(7)
    bell = TimedBell()
    house = House(installed, bell)
    house.listen()
    # One event is a full batch: whenever one is found while armed, the bell is disarmed.
    sink = house.serve(batch=BatchOptions(events=1))
    silent = connect(installed, autocommit=False)
    slowest, quiet, loud = 0.0, 0, 1000
    try:
        for id_ in range(300):
            while house.armed:
                loud += 1
                insert(shop, loud)  # a full batch
                arrives(sink, loud, 10)
            insert(silent, id_)
            quiet += not house.armed
            bell.about_to_arm.clear()
            bell.about_to_arm.wait(0.03)  # not seen: armed already, and the insert rang
            spin(chance.random() * 0.002)
            silent.commit()
            began = time.monotonic()
            arrives(sink, id_, 10)
            slowest = max(slowest, sink.at[id_] - began)
            spin(chance.random() * 0.006)
    finally:
        house.end()
    assert slowest < SOON
    assert quiet > 100
    assert bell.arms > 40
    assert bell.disarms > 40


def spin(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0)


@pytest.mark.parametrize("seed", range(3))
def test_random_writers_around_arming_and_disarming_never_wait_for_the_safety_poll(
    installed: str, shop: connection, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for module in (listener, bell_module):
        monkeypatch.setattr(module, "SETTLE", 0.005)
        monkeypatch.setattr(module, "SHORTEST_POLL", 0.0003)
    house = House(installed)
    assert isinstance(house.bell, CountingBell)
    house.listen()
    sinks = [house.serve("one", batch=BatchOptions(events=2)), house.serve("two", batch=BatchOptions(events=3))]
    committed: dict[int, float] = {}
    failures: list[BaseException] = []

    def write(number: int) -> None:
        chance = random.Random(seed * 10 + number)
        try:
            conn = psycopg2.connect(installed)
            for id_ in range(number * 1000, number * 1000 + 800):
                # On a busy machine it takes longer until there was quiet often enough.
                if id_ >= number * 1000 + 80 and house.bell.arms > 3:
                    break
                insert(conn, id_)
                spin(chance.choice([0, 0, 0.002, 0.01]) * chance.random())
                if chance.random() < 0.2:
                    conn.rollback()
                else:
                    conn.commit()
                    committed[id_] = time.monotonic()
                spin(chance.choice([0, 0.02, 0.04]) * chance.random())
            conn.close()
        except BaseException as error:
            failures.append(error)
            raise

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    try:
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert not failures
        for sink in sinks:
            wait_for(lambda sink=sink: len(sink.at) >= len(committed))
    finally:
        house.end()
    for sink in sinks:
        assert set(sink.at) == set(committed)
        assert len(sink.events) == len(committed)
        assert max(sink.at[id_] - at for id_, at in committed.items()) < SOON
    assert house.bell.arms > 2
    assert house.bell.disarms > 2


def test_a_ring_that_comes_along_with_the_answer_to_a_query_is_heard(
    installed: str, shop: connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "GAUGE_INTERVAL", 0.0005)  # the listener asks all the time
    house = House(installed)
    house.listen()
    sink = house.serve()
    try:
        wait_for(lambda: house.armed)
        for id_ in range(150):
            insert(shop, id_)
            arrives(sink, id_)
    finally:
        house.end()


def test_rings_amid_self_tests_are_heard(installed: str, shop: connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "SELF_TEST_INTERVAL", 0.0005)
    house = House(installed)
    house.listen()
    sink = house.serve()
    try:
        wait_for(lambda: house.armed)
        for id_ in range(100):
            insert(shop, id_)
            arrives(sink, id_)
    finally:
        house.end()


def test_a_sink_of_a_renamed_database_is_woken_all_the_same(house: House, shop: connection) -> None:
    fetch(shop, "update cdc.installation set database_name = 'before'")
    house.listen()
    sink = house.serve(databases=("shop",))
    wait_for(lambda: house.armed)
    insert(shop, 1)
    arrives(sink, 1)
    assert sink.events[0].source.database == "shop"


def test_a_transaction_that_rings_more_than_it_may_wakes_those_who_want_only_its_end(
    house: House, shop: connection
) -> None:
    fetch(shop, "create table tail (id integer primary key); select cdc.enable_capture('tail')")
    house.listen()
    sink = house.serve(tables=("public.tail",))
    wait_for(lambda: house.armed)
    fetch(
        shop, "begin; insert into item select i, '' from generate_series(1, 100) i; insert into tail values (1); commit"
    )
    arrives(sink, 1)
    assert len(sink.events) == 1


# -- under load ---------------------------------------------------------------------------------------------------


def test_full_batches_disarm_and_quiet_arms_again(house: House, shop: connection, ear: Callable[[], list[str]]) -> None:
    house.listen()
    sink = house.serve(batch=BatchOptions(events=10))
    wait_for(lambda: house.armed)
    assert isinstance(house.bell, CountingBell)
    fetch(shop, "insert into item select i, '' from generate_series(1, 100) i")
    arrives(sink, 100)
    wait_for(lambda: house.bell.disarms == 1)  # type: ignore[attr-defined]
    wait_for(lambda: house.armed)
    assert house.bell.arms == 2
    assert len(ear()) == 32
    insert(shop, 101)
    arrives(sink, 101)
    assert len(ear()) == 1


def test_a_flood_of_notifications_disarms_and_writers_fall_silent(
    house: House, shop: connection, ear: Callable[[], list[str]]
) -> None:
    house.listen()
    sink = house.serve()
    wait_for(lambda: house.armed)
    assert isinstance(house.bell, CountingBell)
    id_ = 0
    deadline = time.monotonic() + 15
    while house.bell.disarms == 0:
        assert time.monotonic() < deadline
        # Each statement is a transaction of ten rings.
        fetch(shop, "insert into item select i, '' from generate_series(%s, %s) i", (id_, id_ + 9))
        id_ += 10
    assert len(ear()) <= id_
    for _ in range(20):
        insert(shop, id_)
        id_ += 1
    arrives(sink, id_ - 1)
    assert len(ear()) < 20  # silent until it was quiet for a while
    wait_for(lambda: house.armed)
    insert(shop, id_)
    arrives(sink, id_)
    assert len(sink.events) == id_ + 1


def test_a_sink_that_is_down_does_not_keep_the_others_awake(house: House, shop: connection) -> None:
    house.listen()
    sink = house.serve("works")
    down = house.serve("down", retry=RetryOptions.model_validate({"initial": "200ms", "max": "1s"}))
    wait_for(lambda: house.armed)
    down.broken = True
    insert(shop, 1)
    arrives(sink, 1)
    wait_for(lambda: house.pipelines[1].state == "retrying")
    fetch(shop, "select cdc.enable_capture('item', notify => 'off')")
    fetch(shop, "insert into item select i, '' from generate_series(2, 2000) i")
    fetch(shop, "select cdc.enable_capture('item')")
    insert(shop, 2001)
    arrives(sink, 2001)
    wait_for(lambda: house.armed)
    down.broken = False
    house.pipelines[1].interrupt()
    arrives(down, 2001, 15)
    wait_for(lambda: house.armed)
    insert(shop, 2002)
    arrives(down, 2002)
    arrives(sink, 2002)


def test_when_nobody_is_left_to_wake_nobody_is_asked_to_ring(
    house: House, shop: connection, ear: Callable[[], list[str]]
) -> None:
    house.listen()
    sleeper = Sleeper("one", lambda _: True, linger=0.02)
    house.bell.join(sleeper)
    dozing = threading.Thread(target=doze, args=(house, sleeper))
    dozing.start()
    wait_for(lambda: house.armed)
    house.bell.leave(sleeper)
    wait_for(lambda: not house.armed)
    wait_for(lambda: ring_lock(shop) == [])
    insert(shop, 1)
    assert ear() == []
    house.stop.set()
    house.bell.wake()
    sleeper.woken.set()
    dozing.join(5)
    assert not dozing.is_alive()


# -- what anybody may send ----------------------------------------------------------------------------------------


def forged(table: str = "item") -> str:
    return json.dumps(
        {
            "version": 1,
            "id": "shop-1-forged",
            "op": "insert",
            "source": {
                "database": "shop",
                "schema": "public",
                "table": table,
                "seq": 1,
                "txid": 1,
                "ts": "2026-11-22T08:01:02.123456Z",
            },
            "key": {"id": 666},
            "before": None,
            "after": {"id": 666},
            "changed": None,
            "context": None,
        }
    )


MALFORMED = [
    "hello",
    "{",
    "[]",
    "{}",
    "null",
    '{"version": 1}',
    "{" * 7000,
    '{"a":' * 1200 + "1" + "}" * 1200,
    "[" * 7000,
    '{"a": 1e99999999999999999999}',
    '{"key": 1e99999999999999999999}',
    '{"version": ' + "9" * 7000 + "}",
    '{"source": {"ts": "never"}}',
    '{"op": "\\ud800"}',
    forged().replace('"public"', '"\\ud800"'),
    forged().replace('"insert"', '"drop"'),
    forged().replace('"version": 1', '"version": 2'),
    forged().replace('{"id": 666}', "666"),
]


def test_forged_and_malformed_notifications_wake_and_are_never_delivered(
    house: House, shop: connection, logged: list[logging.LogRecord]
) -> None:
    house.listen()
    sink = house.serve()
    wait_for(lambda: house.armed)
    for number, payload in enumerate((*MALFORMED, forged(), "")):
        fetch(shop, "select pg_notify('cdc', %s)", (payload,))
        wait_for(lambda number=number: house.listener.received == number + 1)
    assert len(MALFORMED) - 2 <= house.listener.malformed <= len(MALFORMED)
    insert(shop, 1)
    arrives(sink, 1)
    assert [event.key for event in sink.events] == [{"id": 1}]
    assert house.armed
    warnings = [record for record in logged if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in warnings] == ["A notification is not an event; it only wakes."]


def test_a_forged_self_test_hides_nobody_elses_ring(house: House, shop: connection) -> None:
    house.listen()
    sink = house.serve()
    wait_for(lambda: house.armed)
    fetch(shop, "begin; select pg_notify('cdc', 'cdc self-test 1'); insert into item values (1, ''); commit")
    arrives(sink, 1)


# -- what breaks --------------------------------------------------------------------------------------------------


def test_a_killed_listener_leaves_no_lock_and_comes_back(
    house: House, shop: connection, ear: Callable[[], list[str]], logged: list[logging.LogRecord]
) -> None:
    house.listen()
    sink = house.serve()
    for round_ in range(3):
        wait_for(lambda: house.armed)
        (pid,) = ring_lock(shop)
        ear()
        fetch(shop, "select pg_terminate_backend(%s)", (pid,))
        wait_for(lambda pid=pid: pid not in backends(shop, "cdc listener"))
        insert(shop, round_)  # perhaps nobody hears; polling finds it
        arrives(sink, round_)
        wait_for(lambda: house.armed)
        assert ring_lock(shop) != [pid]
        insert(shop, round_ + 100)
        arrives(sink, round_ + 100)
    messages = [record.getMessage() for record in logged]
    assert messages.count("The listener's connection is lost; polling until it is back.") == 3
    assert messages.count("Listening.") == 4


def test_while_the_listener_is_away_writers_are_silent_and_events_come_all_the_same(
    house: House, shop: connection, ear: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    house.listen()
    sink = house.serve()
    wait_for(lambda: house.armed)
    away = threading.Event()
    real = listener.Connection

    def no_connection(dsn: str, **arguments: Any) -> Any:
        if away.is_set():
            raise listener.DatabaseUnreachable("cannot connect: somebody cut the wire")
        return real(dsn, **arguments)

    monkeypatch.setattr(listener, "Connection", no_connection)
    away.set()
    fetch(shop, "select pg_terminate_backend(%s)", ring_lock(shop))
    wait_for(lambda: ring_lock(shop) == [])
    wait_for(lambda: not house.bell.audible)
    assert not house.armed
    ear()
    for id_ in range(5):
        insert(shop, id_)
        arrives(sink, id_)
    assert ear() == []
    away.clear()
    wait_for(lambda: house.armed)


def test_stopping_ends_every_thread_and_gives_every_lock_back(house: House, shop: connection) -> None:
    house.listen()
    house.serve("one")
    house.serve("two")
    wait_for(lambda: house.armed)
    began = time.monotonic()
    house.end()
    assert time.monotonic() - began < 5
    assert not house.armed
    wait_for(
        lambda: (
            value(
                shop,
                """select count(*) from pg_stat_activity
                    where datname = current_database() and application_name ~ '^cdc '""",
            )
            == 0
        )
    )
    assert fetch(shop, "select * from pg_locks where locktype = 'advisory'") == []


def test_a_listener_that_hears_nothing_says_so_and_polling_goes_on(
    house: House, shop: connection, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    # What PgBouncer in transaction mode does: everything is accepted, nothing ever arrives.
    ring = listener.QUERIES["ring_self"]
    monkeypatch.setitem(listener.QUERIES, "ring_self", "select %(channel)s::text, %(nonce)s::text")
    monkeypatch.setattr(listener, "SELF_TEST_DEADLINE", 0.05)
    monkeypatch.setattr(listener, "SELF_TEST_INTERVAL", 0.2)
    house.listen()
    sink = house.serve()
    wait_for(lambda: [r for r in logged if r.levelno == logging.ERROR])
    (error, *_) = [r for r in logged if r.levelno == logging.ERROR]
    assert error.getMessage() == "The bell is out of order; polling instead."
    assert "notifications do not arrive" in error.fields["error"]  # type: ignore[attr-defined]
    assert "session pool" in error.fields["error"]  # type: ignore[attr-defined]
    for id_ in range(3):
        insert(shop, id_)
        arrives(sink, id_)
    assert not house.armed
    assert ring_lock(shop) == []
    monkeypatch.setitem(listener.QUERIES, "ring_self", ring)
    wait_for(lambda: house.armed)


def test_a_listener_that_goes_deaf_later_is_found_out_and_gives_the_lock_back(
    house: House, shop: connection, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    monkeypatch.setattr(listener, "SELF_TEST_DEADLINE", 0.05)
    monkeypatch.setattr(listener, "SELF_TEST_INTERVAL", 0.1)
    house.listen()
    sink = house.serve()
    wait_for(lambda: house.armed)
    monkeypatch.setitem(listener.QUERIES, "ring_self", "select %(channel)s::text, %(nonce)s::text")
    wait_for(lambda: [r for r in logged if r.levelno == logging.ERROR])
    wait_for(lambda: not house.armed and ring_lock(shop) == [])
    insert(shop, 1)
    arrives(sink, 1)


def test_a_half_full_notification_queue_disarms_until_it_is_read(
    house: House, shop: connection, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    usage = listener.QUERIES["queue_usage"]
    monkeypatch.setattr(listener, "GAUGE_INTERVAL", 0.05)
    house.listen()
    sink = house.serve()
    wait_for(lambda: house.armed)
    monkeypatch.setitem(listener.QUERIES, "queue_usage", "select 0.75")
    wait_for(lambda: house.listener.queue_usage == 0.75)
    wait_for(lambda: not house.armed and ring_lock(shop) == [])
    insert(shop, 1)
    arrives(sink, 1)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        assert not house.armed
    assert len([r for r in logged if r.levelno == logging.ERROR]) == 1  # once, not at every look
    monkeypatch.setitem(listener.QUERIES, "queue_usage", usage)
    wait_for(lambda: house.armed)
    assert house.listener.queue_usage < 0.5


def test_two_houses_on_one_database_both_get_everything(installed: str, house: House, shop: connection) -> None:
    """Only one of them can be armed; the other polls, and both hear."""
    house.listen()
    one = house.serve("one")
    wait_for(lambda: house.armed)
    other = House(installed)
    other.listen()
    two = other.serve("two")
    try:
        for id_ in range(20):
            insert(shop, id_)
            arrives(one, id_)
            arrives(two, id_)
        assert not (house.armed and other.armed)
        house.end()
        wait_for(lambda: other.armed)
        insert(shop, 20)
        arrives(two, 20)
    finally:
        other.end()


# -- modes --------------------------------------------------------------------------------------------------------


def test_notify_off_polls_and_never_rings(installed: str, shop: connection, ear: Callable[[], list[str]]) -> None:
    fetch(shop, "select cdc.enable_capture('item', notify => 'off')")
    house = House(installed, Bell("off"))  # the daemon starts no listener then
    sink = house.serve()
    try:
        for id_ in range(5):
            insert(shop, id_)
            arrives(sink, id_)
        assert ear() == []
        assert fetch(shop, "select * from pg_locks where locktype = 'advisory' and classid = 6513763") == []
    finally:
        house.end()


def test_notify_off_takes_no_lock_in_the_writer(shop: connection, installed: str, connect: Connect) -> None:
    fetch(shop, "select cdc.enable_capture('item', notify => 'off')")
    writer = connect(installed, autocommit=False)
    insert(writer, 1)
    assert fetch(shop, "select * from pg_locks where locktype = 'advisory'") == []
    writer.rollback()


def test_notify_always_rings_without_a_daemon(shop: connection, ear: Callable[[], list[str]]) -> None:
    fetch(shop, "select cdc.enable_capture('item', notify => 'always')")
    insert(shop, 1)
    fetch(shop, "update item set v = 'new'")
    first, second = [Event.from_json(payload) for payload in ear()]
    assert first.after == {"id": 1, "v": ""}
    assert (second.before, second.after, second.changed) == ({"v": ""}, {"v": "new"}, ("v",))


def test_notify_always_takes_no_lock_and_sleeps(installed: str, shop: connection) -> None:
    fetch(shop, "select cdc.enable_capture('item', notify => 'always')")
    house = House(installed, CountingBell("always"))
    house.listen()
    sink = house.serve(batch=BatchOptions(events=1))
    try:
        wait_for(lambda: house.armed)
        for id_ in range(100):
            insert(shop, id_)
        for id_ in range(100):
            arrives(sink, id_)
        assert house.armed
        assert fetch(shop, "select * from pg_locks where locktype = 'advisory' and classid = 6513763") == []
        insert(shop, 100)
        arrives(sink, 100)
    finally:
        house.end()


def test_a_ring_that_is_read_along_with_another_answer_is_heard_at_once(
    house: House, shop: connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking, asked = threading.Event(), threading.Event()

    def ask(self: Listener, connection: Connection) -> bool:
        if asking.is_set() and not asked.is_set():
            asked.set()
            connection.query("select pg_sleep(0.5)")
        return False

    monkeypatch.setattr(Listener, "_writers_queue", ask)
    house.listen()
    sink = house.serve()
    wait_for(lambda: house.armed)
    asking.set()
    house.listener._knock()
    assert asked.wait(10)
    insert(shop, 1)
    arrives(sink, 1)
    assert house.armed


def test_under_notify_always_nobody_sleeps_while_the_queue_is_too_full(
    installed: str, shop: connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The triggers are told to be silent then."""
    fetch(shop, "select cdc.enable_capture('item', notify => 'always')")
    monkeypatch.setattr(listener, "GAUGE_INTERVAL", 0.1)
    house = House(installed, CountingBell("always"))
    house.listen()
    sink = house.serve()
    try:
        wait_for(lambda: house.armed)
        monkeypatch.setattr(listener, "QUEUE_LIMIT", -1.0)
        wait_for(lambda: not house.armed)
        assert value(shop, "select silent_until > clock_timestamp() from cdc.installation")
        insert(shop, 1)
        arrives(sink, 1)
        monkeypatch.setattr(listener, "QUEUE_LIMIT", 0.5)
        wait_for(lambda: house.armed)
        insert(shop, 2)
        arrives(sink, 2)
    finally:
        house.end()


def test_one_transaction_rings_at_most_32_times_the_last_time_without_a_payload(
    shop: connection, ear: Callable[[], list[str]]
) -> None:
    fetch(shop, "select cdc.enable_capture('item', notify => 'always')")
    fetch(shop, "insert into item select i, '' from generate_series(1, 31) i")
    assert "" not in ear()
    fetch(shop, "insert into item select i, '' from generate_series(32, 63) i")
    heard = ear()
    assert len(heard) == 32
    assert heard[-1] == ""
    assert [Event.from_json(payload).key["id"] for payload in heard[:-1]] == list(range(32, 63))  # type: ignore[index]
    fetch(shop, "insert into item select i, '' from generate_series(64, 5000) i")
    heard = ear()
    assert len(heard) == 32
    assert heard[-1] == ""


@pytest.mark.parametrize("character", ["x", "é", "€", "\\", "\n"])
def test_a_payload_that_does_not_fit_is_the_stub(
    shop: connection, ear: Callable[[], list[str]], character: str
) -> None:
    fetch(shop, "select cdc.enable_capture('item', notify => 'always')")
    sizes = {}
    for number, length in enumerate((3000, 7600, 7690, 7700, 7710, 7720, 8000, 100_000)):
        text = character * (length // max(len(character.encode()), len(json.dumps(character, ensure_ascii=False)) - 2))
        insert(shop, number, text)
        (payload,) = ear()
        event = Event.from_json(payload)
        assert len(payload.encode()) < 8000
        assert event.key == {"id": number}
        assert event.truncated == (event.after is None)
        if event.after is not None:
            assert event.after["v"] == text
        sizes[length] = event.truncated
    assert not sizes[3000]
    assert sizes[8000]
    assert sizes[100_000]


def test_a_key_too_long_for_the_stub_rings_without_a_payload(shop: connection, ear: Callable[[], list[str]]) -> None:
    fetch(
        shop,
        """create table wide (v text, primary key (v));
           select cdc.enable_capture('wide', notify => 'always');
           alter table wide drop constraint wide_pkey;
           insert into wide values (repeat('x', 9000))""",
    )
    assert ear() == [""]


def test_notify_payload_wake_sends_no_data(house: House, shop: connection, ear: Callable[[], list[str]]) -> None:
    fetch(shop, "select cdc.enable_capture('item', notify_payload => 'wake')")
    house.listen()
    sink = house.serve()
    wait_for(lambda: house.armed)
    insert(shop, 1, "secret")
    arrives(sink, 1)
    assert ear() == [""]
    assert house.listener.malformed == 0


def test_linger_bounds_the_pause_between_looks_while_awake() -> None:
    bell = Bell("adaptive")
    bell.audible = True
    sleeper = Sleeper("one", lambda _: True, linger=0.01)
    bell.join(sleeper)
    for _ in range(20):
        bell.looking(sleeper)
        bell.found_nothing(sleeper)
        bell.rest(sleeper)
    assert sleeper.pause == 0.01
    bell.audible = False
    bell.looking(sleeper)
    bell.found_nothing(sleeper)
    bell.rest(sleeper)
    assert sleeper.pause == 0.02
    bell.found(sleeper, full=False)
    assert sleeper.pause == bell_module.SHORTEST_POLL


def test_the_standby_interval_is_short() -> None:
    assert pipeline.STANDBY_INTERVAL <= 5.0  # a sink moves within seconds when its owner dies
