"""``delivery: ephemeral``: the notification is the event. At most once, in commit order, never stored."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import psycopg2
import pytest
from harness import until
from psycopg2.extensions import connection
from sql import fetch, value

from cdc import bell as bell_module
from cdc.bell import Bell, Inbox, Sleeper
from cdc.errors import PartialFailure, PermanentFailure, SinkDisabled, TransientFailure
from cdc.event import Event, Op
from cdc.listener import Listener
from cdc.options import SinkOptions
from cdc.outbox import Owner
from cdc.pipeline import Pipeline
from cdc.sinks.base import Sink

Connect = Callable[..., connection]
OWNER = Owner("test", 1)
ENABLE = "select cdc.enable_capture('{table}', notify => 'ephemeral')"


class Options(SinkOptions):
    type: Literal["list"] = "list"


class ListSink(Sink[Options]):
    """Keeps what it is given; or does what it is told instead."""

    Options = Options

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name, options)
        self.events: list[Event] = []
        self.attempts = 0
        self.failure: Callable[[Sequence[Event]], Exception | None] = lambda batch: None
        self.gate = threading.Event()
        self.gate.set()

    def deliver(self, batch: Sequence[Event]) -> None:
        self.gate.wait(20)
        self.attempts += 1
        if (failure := self.failure(batch)) is not None:
            raise failure
        self.events += batch

    @property
    def keys(self) -> list[Any]:
        return [event.key and event.key["id"] for event in self.events]


class House:
    """What a daemon has for one database: a bell, a listener that takes table `live` for ephemeral, one pipeline."""

    def __init__(self, dsn: str) -> None:
        self.stop = threading.Event()
        self.bell = Bell("adaptive")
        self.sink = ListSink("audit", Options())
        self.listener = Listener(
            dsn,
            database="shop",
            channel="cdc",
            bell=self.bell,
            stop=self.stop,
            process=OWNER.process,
            is_ephemeral=lambda schema, table: table == "live",
        )
        self.pipeline = Pipeline(dsn, database="shop", sink=self.sink, bell=self.bell, stop=self.stop, owner=OWNER)

    def __enter__(self) -> House:
        self.pipeline.start()
        until(lambda: self.pipeline.state == "running", "the pipeline runs")
        self.listener.start()
        until(lambda: self.bell.audible, "somebody hears")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.sink.gate.set()
        self.pipeline.interrupt()
        self.listener.stop()
        self.pipeline.join(10)
        self.listener.join(10)


@pytest.fixture
def shop(installed: str, connect: Connect) -> connection:
    """A writer; table live (id, v, w) is ephemeral, table kept (id) is durable."""
    conn = connect(installed)
    fetch(conn, "create table live (id text primary key, v text, w int); create table kept (id text primary key)")
    fetch(conn, ENABLE.format(table="live"))
    fetch(conn, "select cdc.enable_capture('kept')")
    return conn


@pytest.fixture
def house(installed: str, shop: connection) -> Iterator[House]:
    with House(installed) as made:
        yield made


@pytest.fixture
def heard(installed: str, shop: connection, connect: Connect) -> Callable[[], list[Event]]:
    """What has been notified since the last call."""
    ear = connect(installed)
    fetch(ear, "listen cdc")

    def hear() -> list[Event]:
        fetch(shop, "select pg_notify('cdc', 'end')")
        payloads: list[str] = []

        def all_heard() -> bool:
            ear.poll()
            payloads.extend(note.payload for note in ear.notifies)
            ear.notifies.clear()
            return "end" in payloads

        until(all_heard, "the end is heard")
        payloads.remove("end")
        assert all(len(payload.encode()) < 8000 for payload in payloads)
        return [Event.from_json(payload) for payload in payloads]

    return hear


# -- what the trigger sends ---------------------------------------------------------------------------------------


def test_every_op_is_told_by_its_notification_and_nothing_is_stored(
    shop: connection, heard: Callable[[], list[Event]]
) -> None:
    fetch(shop, "insert into live values ('a', 'x', 1)")
    fetch(shop, "update live set v = 'y'")
    fetch(shop, "update live set v = 'y'")  # changes nothing
    fetch(shop, "delete from live")
    fetch(shop, "truncate live")
    insert, update, delete, truncate = heard()
    assert [event.op for event in (insert, update, delete, truncate)] == [Op.INSERT, Op.UPDATE, Op.DELETE, Op.TRUNCATE]
    assert insert.after == {"id": "a", "v": "x", "w": 1}
    assert (update.key, update.before, update.after) == ({"id": "a"}, {"v": "x"}, {"v": "y"})
    assert update.changed == ("v",)
    assert delete.before == {"id": "a", "v": "y", "w": 1}
    assert len({event.id for event in (insert, update, delete, truncate)}) == 4
    assert value(shop, "select count(*) from cdc.event") == 0


def test_many_equal_changes_of_one_transaction_all_arrive_and_more_than_a_bell_would_ring(
    shop: connection, heard: Callable[[], list[Event]]
) -> None:
    fetch(shop, "insert into live select i, 'x', 0 from generate_series(1, 100) i")
    assert [event.key and event.key["id"] for event in heard()] == [str(i) for i in range(1, 101)]


def test_what_is_rolled_back_is_not_told(shop: connection, heard: Callable[[], list[Event]]) -> None:
    fetch(shop, "begin; insert into live values ('a'); rollback")
    fetch(
        shop, "begin; savepoint s; insert into live values ('b'); rollback to s; insert into live values ('c'); commit"
    )
    assert [event.key for event in heard()] == [{"id": "c"}]


@pytest.mark.parametrize("character", ["x", "é", "🐘", "\\", '"', "\x01"])
def test_a_row_that_does_not_fit_is_a_stub_with_its_key(
    shop: connection, heard: Callable[[], list[Event]], character: str
) -> None:
    fetch(shop, "insert into live values ('a', %s, 1)", (character * 9000,))
    fetch(shop, "update live set w = 2")
    large, small = heard()
    assert (large.truncated, large.key, large.after) == (True, {"id": "a"}, None)
    assert (small.truncated, small.after) == (False, {"w": 2})


def test_a_key_that_does_not_fit_is_a_stub_without_it(shop: connection, heard: Callable[[], list[Event]]) -> None:
    fetch(shop, "alter table live drop constraint live_pkey; insert into live values (repeat('k', 9000))")
    [event] = heard()
    assert (event.op, event.truncated, event.key) == (Op.INSERT, True, None)


def test_a_string_json_cannot_unescape_is_a_stub_and_never_fails_the_write(
    shop: connection, heard: Callable[[], list[Event]]
) -> None:
    fetch(shop, "alter table live add doc json")
    fetch(shop, """insert into live (id, doc) values ('a', '"\\u0000"')""")
    fetch(shop, "update live set v = 'y'")
    insert, update = heard()
    assert (insert.op, insert.key, insert.truncated) == (Op.INSERT, None, True)  # it hides the key too
    assert (update.op, update.key, update.truncated) == (Op.UPDATE, None, True)


def test_the_breaker_silences_it_and_ends_by_itself(shop: connection, heard: Callable[[], list[Event]]) -> None:
    fetch(shop, "update cdc.installation set silent_until = clock_timestamp() + interval '1 hour'")
    fetch(shop, "insert into live values ('a')")
    assert heard() == []
    fetch(shop, "update cdc.installation set silent_until = clock_timestamp()")
    fetch(shop, "insert into live values ('b')")
    assert [event.key for event in heard()] == [{"id": "b"}]


def test_a_prepared_transaction_is_refused_by_postgresql(shop: connection) -> None:
    if value(shop, "show max_prepared_transactions") == "0":
        pytest.skip("the server has no prepared transactions")
    with pytest.raises(psycopg2.errors.FeatureNotSupported):
        fetch(shop, "begin; insert into live values ('a'); prepare transaction 'p'")


# -- what the daemon makes of it ----------------------------------------------------------------------------------


def test_changes_are_delivered_in_commit_order(
    house: House, shop: connection, installed: str, connect: Connect
) -> None:
    first, second = connect(installed, autocommit=False), connect(installed, autocommit=False)
    fetch(first, "insert into live values ('begun first')")
    fetch(second, "insert into live values ('committed first')")
    second.commit()
    first.commit()
    until(lambda: len(house.sink.events) == 2, "both")
    assert house.sink.keys == ["committed first", "begun first"]


def test_durable_and_ephemeral_tables_go_side_by_side(house: House, shop: connection) -> None:
    for number in range(50):
        fetch(shop, "insert into kept values (%s)", (f"k{number}",))
        fetch(shop, "insert into live values (%s)", (f"l{number}",))
    until(lambda: len(house.sink.events) == 100, "all of them")
    for kind in "kl":
        assert [key for key in house.sink.keys if key[0] == kind] == [f"{kind}{number}" for number in range(50)]


def test_a_stream_of_ephemeral_changes_leaves_the_bell_armed(house: House, shop: connection) -> None:
    until(lambda: house.bell.armed_since is not None, "armed")
    since = house.bell.armed_since
    fetch(shop, "insert into live select i from generate_series(1, 3000) i")
    until(lambda: len(house.sink.events) == 3000, "all of them")
    assert house.bell.armed_since == since


def test_what_fails_is_dropped_and_counted_and_never_tried_again(house: House, shop: connection) -> None:
    house.sink.failure = lambda batch: TransientFailure("down")
    fetch(shop, "insert into live values ('lost')")
    until(lambda: house.pipeline.state == "dropping", "it says so")
    until(lambda: value(shop, "select dropped from cdc.sink") == 1, "it is counted")
    assert fetch(shop, "select state, last_error from cdc.sink") == [("dropping", "down")]
    house.sink.failure = lambda batch: None
    fetch(shop, "insert into live values ('next')")
    until(lambda: house.pipeline.state == "running", "it works again")
    assert house.sink.keys == ["next"]
    assert value(shop, "select count(*) from cdc.dead_letter") == 0


def test_of_a_batch_only_what_can_never_be_delivered_is_dropped(house: House, shop: connection) -> None:
    def poison(batch: Sequence[Event]) -> Exception | None:
        return PermanentFailure("bad") if any(e.key == {"id": "7"} for e in batch) else None

    house.sink.failure = poison
    fetch(shop, "insert into live select i from generate_series(1, 20) i")
    until(lambda: len(house.sink.events) == 19, "the others")
    until(lambda: value(shop, "select dropped from cdc.sink") == 1, "it is counted")
    assert house.sink.keys == [str(i) for i in range(1, 21) if i != 7]


def test_of_a_partial_failure_the_rest_counts_as_delivered(house: House, shop: connection) -> None:
    house.sink.gate.clear()
    house.sink.failure = lambda batch: PartialFailure({0: TransientFailure("busy")})
    fetch(shop, "insert into live select i from generate_series(1, 5) i")
    house.sink.gate.set()
    until(lambda: value(shop, "select dropped from cdc.sink") > 0, "it is counted")
    assert value(shop, "select dropped from cdc.sink") <= house.sink.attempts


def test_a_disabled_sink_stops(house: House, shop: connection) -> None:
    house.sink.failure = lambda batch: SinkDisabled("410")
    fetch(shop, "insert into live values ('a')")
    until(lambda: house.pipeline.stopped_because == "410", "it stops")


def test_a_sink_that_hangs_costs_bounded_memory_and_the_rest_is_counted(
    house: House, shop: connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bell_module, "INBOX_EVENTS", 100)
    house.sink.gate.clear()
    fetch(shop, "insert into live values ('in its hands')")
    until(lambda: not house.pipeline._sleeper.inbox._events, "it has been taken")
    fetch(shop, "insert into live select i from generate_series(1, 1000) i")
    until(lambda: house.pipeline._sleeper.inbox.dropped == 900, "no room")
    house.sink.gate.set()
    until(lambda: len(house.sink.events) == 101, "those that found room")
    until(lambda: value(shop, "select dropped from cdc.sink") == 900, "it is counted")
    assert house.sink.keys == ["in its hands", *(str(i) for i in range(1, 101))]  # what came first


def test_an_inbox_is_bounded_in_bytes_too() -> None:
    inbox = Inbox()
    event = Event.from_json(FORGED.format(table="live"))
    for _ in range(5):
        inbox.put(event, bell_module.INBOX_BYTES // 2)
    assert inbox.dropped == 3
    assert len(inbox.take(10)) == 2
    inbox.put(event, bell_module.INBOX_BYTES)
    assert inbox.dropped == 3


def test_whoever_joins_anew_finds_an_empty_inbox() -> None:
    bell = Bell("adaptive")
    sleeper = Sleeper("one", lambda _: True, linger=0.02)
    bell.join(sleeper)
    bell.hand_over(Event.from_json(FORGED.format(table="live")), 100)
    bell.leave(sleeper)
    bell.join(sleeper)
    assert sleeper.inbox.take(10) == []


# -- what anybody may send ----------------------------------------------------------------------------------------

FORGED = json.dumps(
    {
        "version": 1,
        "id": "forged",
        "op": "insert",
        "source": {"database": "shop", "schema": "public", "table": "{table}", "seq": 1, "txid": 1, "ts": "{ts}"},
        "key": {"id": "forged"},
        "before": None,
        "after": {"id": "forged"},
        "changed": None,
        "context": None,
    }
)
for _brace, _double in (("{", "{{"), ("}", "}}")):
    FORGED = FORGED.replace(_brace, _double)
FORGED = FORGED.replace('"{{table}}"', '"{table}"').replace("{{ts}}", "2026-01-01T00:00:00Z")


def test_a_forged_change_of_a_durable_table_only_wakes(house: House, shop: connection) -> None:
    fetch(shop, "select pg_notify('cdc', %s)", (FORGED.format(table="kept"),))
    fetch(shop, "insert into live values ('after it')")
    until(lambda: house.sink.keys == ["after it"], "the later one")


def test_a_flood_of_garbage_is_counted_costs_few_looks_and_delivers_nothing(
    house: House, shop: connection, connect: Connect, installed: str
) -> None:
    until(lambda: house.bell.armed_since is not None, "armed")
    fetch(shop, "select pg_notify('cdc', 'rubbish ' || i) from generate_series(1, 10000) i")
    until(lambda: house.listener.malformed == 10000, "all of it is counted")
    fetch(shop, "insert into kept values ('real')")
    until(lambda: house.sink.keys == ["real"], "what is real")


def test_a_flood_of_forged_rings_costs_at_most_a_look_every_few_milliseconds() -> None:
    bell = Bell("adaptive")
    bell.audible = True
    sleeper = Sleeper("one", lambda _: True, linger=0.02)
    bell.join(sleeper)
    bell.arm()
    looks: list[float] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            bell.looking(sleeper)
            looks.append(sleeper.looked_at)
            bell.found_nothing(sleeper)
            while not bell.rest(sleeper) and not over.is_set():
                pass

    looking = threading.Thread(target=look)
    looking.start()
    until(lambda: bell.wake() or len(looks) > 30, "many looks", pause=0.0001)  # type: ignore[func-returns-value]
    over.set()
    bell.wake()
    looking.join()
    pauses = [after - before for before, after in pairwise(looks[5:])]
    assert min(pauses) >= bell_module.FALSE_ALARM_PAUSE * 0.99
