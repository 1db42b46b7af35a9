"""A pipeline between a real outbox and a sink that follows a script: order, retries, dead letters, states."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from psycopg2.extensions import connection
from scripted import Run, Script, Scripted, caught_up, dead_letters, insert, keys, position, raising, status, wait_for
from sql import fetch, value

from cdc import pipeline
from cdc.bell import Bell
from cdc.cli.logs import JsonFormatter, TextFormatter
from cdc.decoding import Decoder
from cdc.errors import PartialFailure, PermanentFailure, SinkDisabled, TransientFailure
from cdc.event import Event, Op
from cdc.options import BatchOptions

Connect = Callable[..., connection]

SECRET = "4929-1234-5678"


@pytest.fixture
def shop(installed: str, connect: Connect) -> connection:
    """A writer; table item (id, v) is captured."""
    conn = connect(installed)
    fetch(conn, "create table item (id integer primary key, v text); select cdc.enable_capture('item')")
    return conn


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


# -- the plain road -----------------------------------------------------------------------------------------------


def test_what_is_written_is_delivered_in_order_and_acknowledged(shop: connection, prepare: Callable[..., Run]) -> None:
    insert(shop, 1, 2, 3)
    run = prepare(batch=BatchOptions(events=2)).start()
    wait_for(lambda: len(run.sink.delivered) == 3)
    insert(shop, 4)
    wait_for(lambda: len(run.sink.delivered) == 4)
    assert keys(run.sink.delivered) == [1, 2, 3, 4]
    assert max(len(batch) for batch in run.sink.attempts) == 2
    assert run.told == run.sink.delivered
    wait_for(lambda: caught_up(shop))
    assert status(shop) == ("running", None)
    assert run.sink.calls == ["open"]
    run.end()
    assert run.sink.calls == ["open", "close"]


def test_nothing_is_acknowledged_before_the_sink_returns(
    shop: connection, prepare: Callable[..., Run], installed: str, connect: Connect
) -> None:
    insert(shop, 1)
    run = prepare()
    seen: list[tuple[Any, ...]] = []
    side = connect(installed)  # of the pipeline's thread
    run.sink.script = lambda _: seen.append(position(side))
    run.start()
    wait_for(lambda: caught_up(shop))
    ((_, snap_hi, last_seq),) = seen
    assert snap_hi is not None
    assert last_seq < run.sink.delivered[0].source.seq


def test_filters_acknowledge_what_is_not_wanted(shop: connection, prepare: Callable[..., Run]) -> None:
    fetch(shop, "create table other (id integer primary key); select cdc.enable_capture('other')")
    fetch(shop, "insert into other values (100)")
    insert(shop, 1, 2)
    fetch(shop, "update item set v = 'x' where id = 1; delete from item where id = 2; truncate item")
    run = prepare(tables=("public.item",), ops=("insert", "delete")).start()
    wait_for(lambda: caught_up(shop))
    assert [(event.op, event.key["id"]) for event in run.sink.delivered if event.key] == [
        (Op.INSERT, 1),
        (Op.INSERT, 2),
        (Op.DELETE, 2),
    ]
    attempts = len(run.sink.attempts)
    fetch(shop, "insert into other values (101)")
    wait_for(lambda: caught_up(shop))
    assert len(run.sink.attempts) == attempts  # nothing wanted: the sink is not even called


# -- transient failures -------------------------------------------------------------------------------------------


def test_a_transient_failure_is_retried_with_growing_waits_and_order_is_kept(
    shop: connection, prepare: Callable[..., Run]
) -> None:
    insert(shop, 1, 2, 3)
    run = prepare(retry={"initial": "10ms", "max": "200ms"})
    run.sink.script = raising(*[TransientFailure("down")] * 5)
    run.start()
    insert(shop, 4)
    wait_for(lambda: len(run.sink.delivered) == 4)
    assert keys(run.sink.delivered) == [1, 2, 3, 4]
    assert all(attempt == run.sink.attempts[0] for attempt in run.sink.attempts[:6])
    pauses = [later - earlier for earlier, later in zip(run.sink.at[:5], run.sink.at[1:6], strict=True)]
    for number, pause in enumerate(pauses):
        assert pause >= 0.01 * 2**number
    assert dead_letters(shop) == []


def test_a_wait_the_sink_asks_for_is_honoured(shop: connection, prepare: Callable[..., Run]) -> None:
    insert(shop, 1)
    run = prepare(retry={"initial": "1ms", "max": "300ms"})
    run.sink.script = raising(TransientFailure("busy", retry_after=0.2), TransientFailure("busy", retry_after=3600))
    run.start()
    wait_for(lambda: run.sink.delivered)
    first, second, third = run.sink.at
    assert second - first >= 0.2
    assert 0.3 <= third - second < 5


def test_state_and_error_are_seen_within_a_second_and_recovery_clears_the_state(
    shop: connection, prepare: Callable[..., Run], logged: list[logging.LogRecord]
) -> None:
    broken = threading.Event()
    broken.set()

    def script(batch: list[Event]) -> None:
        if broken.is_set():
            raise TransientFailure("connection refused")

    insert(shop, 1)
    run = prepare()
    run.sink.script = script
    run.start()
    wait_for(lambda: run.sink.attempts)
    wait_for(lambda: status(shop) == ("retrying", "connection refused"), 1.0)
    since = value(shop, "select state_since from cdc.sink")
    assert value(shop, "select clock_timestamp() - last_error_at < interval '1 s' from cdc.sink")
    assert run.pipeline.state == "retrying"
    before = position(shop)
    wait_for(lambda: len(run.sink.attempts) > 5)
    assert position(shop) == before
    broken.clear()
    wait_for(lambda: run.sink.delivered)
    wait_for(lambda: status(shop)[0] == "running", 1.0)
    assert run.pipeline.state == "running"
    assert value(shop, "select state_since from cdc.sink") > since
    messages = [record.getMessage() for record in logged]
    assert messages.count("The sink fails; retrying.") == 1  # state changes only
    assert messages.count("The sink works again.") == 1


def test_a_sink_that_cannot_be_opened_is_retried_before_anything_is_read(
    shop: connection, prepare: Callable[..., Run]
) -> None:
    insert(shop, 1)
    run = prepare()
    fails = [TransientFailure("no route"), OSError("no such host"), TransientFailure("no route")]

    def opening() -> None:
        if fails:
            raise fails.pop()

    run.sink.opening = opening
    run.start()
    wait_for(lambda: run.sink.delivered)
    assert run.sink.calls == ["open"] * 4
    wait_for(lambda: status(shop)[0] == "running", 1.0)


def test_an_exception_nobody_expected_is_retried_and_its_text_stays_out_of_sight(
    shop: connection, prepare: Callable[..., Run], logged: list[logging.LogRecord]
) -> None:
    insert(shop, 1, text=SECRET)

    def bug(batch: list[Event]) -> None:
        raise KeyError(batch[0].to_json())

    run = prepare()
    run.sink.script = bug
    run.start()
    wait_for(lambda: status(shop)[0] == "retrying")
    assert status(shop) == ("retrying", "unexpected KeyError")
    run.sink.script = raising()
    wait_for(lambda: run.sink.delivered)
    record = next(r for r in logged if r.getMessage() == "The sink raised what it should not; retrying.")
    assert record.levelno == logging.ERROR
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(record)
        assert "KeyError" in line
        assert "test_pipeline.py:" in line
        assert not any(SECRET in formatter.format(each) for each in logged)


def test_a_mutated_batch_loses_nothing(shop: connection, prepare: Callable[..., Run]) -> None:
    class Careless(Scripted):
        def deliver(self, batch: Sequence[Event]) -> None:
            super().deliver(batch)
            if len(self.taken) == 1:
                batch.clear()  # type: ignore[attr-defined]
                raise TransientFailure("took them off the list, then failed")

    insert(shop, 1, 2)
    run = prepare()
    run.sink.__class__ = Careless
    run.start()
    wait_for(lambda: caught_up(shop))
    assert keys(run.sink.attempts[-1]) == [1, 2]


# -- partial failures ---------------------------------------------------------------------------------------------


def partly(**failures: TransientFailure | PermanentFailure) -> PartialFailure:
    return PartialFailure({int(index[1:]): failure for index, failure in failures.items()})


DOWN = TransientFailure("shard down")
NEVER = PermanentFailure("too large")


def test_a_partial_failure_retries_the_failed_keys_and_their_later_events_only(
    shop: connection, prepare: Callable[..., Run]
) -> None:
    insert(shop, 1, 2, 3)
    fetch(shop, "update item set v = 'a' where id = 1; update item set v = 'b' where id = 2")
    fetch(shop, "update item set v = 'c' where id = 1")
    run = prepare()
    run.sink.script = raising(partly(_0=DOWN), partly(_1=DOWN), None)
    run.start()
    wait_for(lambda: caught_up(shop))
    assert [keys(attempt) for attempt in run.sink.attempts] == [[1, 2, 3, 1, 2, 1], [1, 1, 1], [1, 1]]
    assert [event.op for event in run.sink.attempts[2]] == [Op.UPDATE, Op.UPDATE]
    assert sorted(event.source.seq for event in run.told) == [event.source.seq for event in run.sink.attempts[0]]
    assert dead_letters(shop) == []


def test_when_nothing_of_a_batch_moved_the_pipeline_waits(shop: connection, prepare: Callable[..., Run]) -> None:
    insert(shop, 1, 2)
    run = prepare(retry={"initial": "100ms", "max": "100ms"})
    run.sink.script = raising(partly(_0=DOWN, _1=DOWN))
    run.start()
    wait_for(lambda: caught_up(shop))
    assert [keys(attempt) for attempt in run.sink.attempts] == [[1, 2], [1, 2]]
    assert run.sink.at[1] - run.sink.at[0] >= 0.1
    assert status(shop) == ("running", "shard down")


def test_a_partial_failure_with_both_kinds_sets_aside_and_retries(
    shop: connection, prepare: Callable[..., Run]
) -> None:
    insert(shop, 1, 2, 3, 4)
    run = prepare()
    run.sink.script = raising(partly(_1=NEVER, _2=DOWN))
    run.start()
    wait_for(lambda: caught_up(shop))
    assert [keys(attempt) for attempt in run.sink.attempts] == [[1, 2, 3, 4], [3]]
    assert dead_letters(shop) == [("2", "too large", 1)]
    assert keys(run.told) == [1, 4, 3]


def test_nothing_overtakes_a_truncate_and_a_truncate_overtakes_nothing(
    shop: connection, prepare: Callable[..., Run]
) -> None:
    insert(shop, 1, 2)
    fetch(shop, "truncate item")
    insert(shop, 1)
    run = prepare()
    run.sink.script = raising(partly(_0=DOWN))
    run.start()
    wait_for(lambda: caught_up(shop))
    assert [keys(attempt) for attempt in run.sink.attempts] == [[1, 2, None, 1], [1, None, 1]]
    run.sink.attempts.clear()
    fetch(shop, "begin; truncate item; insert into item values (5, ''), (6, ''); commit")
    wait_for(lambda: run.sink.attempts)
    wait_for(lambda: caught_up(shop))
    assert [keys(attempt) for attempt in run.sink.attempts] == [[None, 5, 6]]
    run.sink.attempts.clear()
    run.sink.script = raising(partly(_0=DOWN))
    fetch(shop, "begin; truncate item; insert into item values (5, ''), (6, ''); commit")
    wait_for(lambda: len(run.sink.attempts) == 2)
    assert [keys(attempt) for attempt in run.sink.attempts] == [[None, 5, 6], [None, 5, 6]]


def test_a_row_whose_key_changes_keeps_its_place_under_both_keys(shop: connection, prepare: Callable[..., Run]) -> None:
    insert(shop, 1, 7)
    fetch(shop, "begin; update item set id = 2 where id = 1; update item set v = 'x' where id = 2; commit")
    run = prepare()
    run.sink.script = raising(partly(_0=DOWN))  # the insert of 1
    run.start()
    wait_for(lambda: caught_up(shop))
    assert [keys(attempt) for attempt in run.sink.attempts] == [[1, 7, 2, 2], [1, 2, 2]]


def test_the_same_key_in_another_table_is_another_row(shop: connection, prepare: Callable[..., Run]) -> None:
    fetch(shop, "create table other (id integer primary key); select cdc.enable_capture('other')")
    insert(shop, 1)
    fetch(shop, "insert into other values (1)")
    run = prepare()
    run.sink.script = raising(partly(_0=DOWN))
    run.start()
    wait_for(lambda: caught_up(shop))
    assert [[event.source.table for event in attempt] for attempt in run.sink.attempts] == [["item", "other"], ["item"]]


# -- permanent failures -------------------------------------------------------------------------------------------


def refusing(*refused: int) -> Script:
    def script(batch: list[Event]) -> None:
        if set(keys(batch)) & set(refused):
            raise PermanentFailure(f"{len(batch)} event(s): field too long")

    return script


def test_a_permanent_failure_becomes_a_dead_letter_and_the_rest_goes_on(
    shop: connection, prepare: Callable[..., Run], logged: list[logging.LogRecord]
) -> None:
    insert(shop, 1, 2, 3, 4, 5, text=SECRET)
    run = prepare()
    run.sink.script = refusing(3)
    run.start()
    wait_for(lambda: caught_up(shop))
    insert(shop, 6)
    wait_for(lambda: 6 in keys(run.sink.delivered))
    assert keys(run.sink.delivered) == [1, 2, 4, 5, 6]
    assert dead_letters(shop) == [("3", "1 event(s): field too long", 1)]
    (event_id, text) = fetch(shop, "select event_id, event::text from cdc.dead_letter")[0]
    dead = Event.from_json(text)
    assert dead.id == event_id
    assert dead.after == {"id": 3, "v": SECRET}
    assert status(shop)[0] == "running"
    for record in logged:
        assert SECRET not in TextFormatter().format(record)


def test_when_everything_is_refused_everything_becomes_a_dead_letter(
    shop: connection, prepare: Callable[..., Run]
) -> None:
    insert(shop, *range(1, 21))
    run = prepare()
    run.sink.script = refusing(*range(1, 21))
    run.start()
    wait_for(lambda: caught_up(shop))
    assert [id_ for id_, _, _ in dead_letters(shop)] == [str(id_) for id_ in range(1, 21)]
    assert run.sink.delivered == []
    assert run.told == []


def test_an_event_that_dies_again_is_still_one_dead_letter(
    shop: connection, prepare: Callable[..., Run], installed: str, connect: Connect
) -> None:
    insert(shop, 1, 2)
    run = prepare()
    side = connect(installed)  # of the pipeline's thread

    def script(batch: list[Event]) -> None:
        if keys(batch) == [2]:
            fetch(side, "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'cdc audit'")
            run.sink.script = refusing(1)
        elif 1 in keys(batch):
            raise PermanentFailure("no")

    run.sink.script = script
    run.start()
    wait_for(lambda: caught_up(shop))
    assert [(id_, attempts) for id_, _, attempts in dead_letters(shop)] == [("1", 2)]
    assert keys(run.sink.delivered)[-1] == 2


def test_under_the_policy_stop_the_pipeline_stops_and_the_position_stays(
    shop: connection, prepare: Callable[..., Run]
) -> None:
    insert(shop, 1)
    run = prepare(on_permanent_failure="stop", batch=BatchOptions(events=2))
    run.sink.script = refusing(4)
    run.start()
    wait_for(lambda: caught_up(shop))
    insert(shop, 2, 3, 4, 5)
    run.pipeline.join(10)
    assert not run.pipeline.is_alive()
    assert run.pipeline.state == "stopped"
    assert run.pipeline.stopped_because is not None
    state, error = status(shop)
    assert state == "stopped"
    assert error == run.pipeline.stopped_because
    assert "can never be delivered: 1 event(s): field too long" in error
    assert keys(run.sink.delivered) == [1, 2, 3]
    assert value(shop, "select last_seq from cdc.position") == run.sink.delivered[2].source.seq
    assert dead_letters(shop) == []
    assert run.sink.calls == ["open", "close"]
    again = prepare()
    again.start()  # somebody has stepped in
    wait_for(lambda: caught_up(shop))
    assert keys(again.sink.delivered) == [4, 5]


def test_a_disabled_sink_stops_and_keeps_nobody_awake(shop: connection, prepare: Callable[..., Run]) -> None:
    insert(shop, 1)
    bell = Bell("adaptive")
    run = prepare(bell=bell)
    run.sink.script = raising(SinkDisabled("410 Gone"))
    run.start()
    run.pipeline.join(10)
    assert not run.pipeline.is_alive()
    assert status(shop) == ("stopped", "410 Gone")
    assert not caught_up(shop)
    assert bell._sleepers == []
    # The server lets go of a closed session in its own time.
    wait_for(lambda: fetch(shop, "select * from pg_locks where locktype = 'advisory'") == [])


def test_a_sink_disabled_while_opening_stops(shop: connection, prepare: Callable[..., Run]) -> None:
    run = prepare()

    def opening() -> None:
        raise SinkDisabled("no such exchange")

    run.sink.opening = opening
    run.start()
    run.pipeline.join(10)
    assert status(shop) == ("stopped", "no such exchange")


def test_an_unreadable_row_becomes_a_dead_letter_and_the_rest_goes_on(
    shop: connection, prepare: Callable[..., Run]
) -> None:
    insert(shop, 1)
    fetch(
        shop,
        """insert into cdc.event_0
           select nextval('cdc.event_seq'), pg_current_xact_id(), clock_timestamp(), max(id), 'i', null, '[1]', null
             from cdc.captured_table""",
    )
    insert(shop, 2)
    run = prepare().start()
    wait_for(lambda: caught_up(shop))
    assert keys(run.sink.delivered) == [1, 2]
    assert fetch(shop, "select reason, event ->> 'new_row' from cdc.dead_letter") == [
        ("not a valid event: ValueError", "[1]")
    ]


def test_a_bug_in_reading_does_not_end_the_thread(
    shop: connection, prepare: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    real = Decoder.decode
    bugs = [ArithmeticError(SECRET), RuntimeError(SECRET)]

    def decode(self: Decoder, rows: Sequence[tuple[Any, ...]], *rest: Any) -> Any:
        if rows and bugs:
            raise bugs.pop()
        return real(self, rows, *rest)

    monkeypatch.setattr(Decoder, "decode", decode)
    insert(shop, 1)
    run = prepare().start()
    wait_for(lambda: run.sink.delivered)
    assert keys(run.sink.delivered) == [1]
    wait_for(lambda: status(shop) == ("running", "unexpected ArithmeticError"))
    assert not any(SECRET in TextFormatter().format(record) for record in logged)
    assert run.sink.calls == ["open", "close"] * 2 + ["open"]


def test_a_sink_that_fails_to_close_does_no_harm(shop: connection, prepare: Callable[..., Run]) -> None:
    run = prepare()

    def closing() -> None:
        raise OSError("already gone")

    run.sink.closing = closing
    run.start()
    insert(shop, 1)
    wait_for(lambda: caught_up(shop))
    fetch(shop, "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'cdc audit'")
    insert(shop, 2)
    wait_for(lambda: 2 in keys(run.sink.delivered))


# -- stopping -----------------------------------------------------------------------------------------------------


def test_a_stop_during_retries_ends_soon_and_acknowledges_only_what_was_delivered(
    shop: connection, prepare: Callable[..., Run]
) -> None:
    insert(shop, 1, 2, 3, 4)
    run = prepare(batch=BatchOptions(events=2), retry={"initial": "1m", "max": "5m"})
    run.sink.script = raising(None, *[TransientFailure("down")] * 100)
    run.start()
    wait_for(lambda: run.pipeline.state == "retrying")
    began = time.monotonic()
    run.end()
    assert time.monotonic() - began < 2
    assert value(shop, "select last_seq from cdc.position") == run.sink.delivered[1].source.seq
    heir = prepare().start()
    wait_for(lambda: caught_up(shop))
    assert keys(heir.sink.delivered) == [3, 4]


def test_a_stop_during_a_delivery_waits_for_it_and_acknowledges_it(
    shop: connection, prepare: Callable[..., Run]
) -> None:
    insert(shop, 1, 2, 3, 4)
    run = prepare(batch=BatchOptions(events=2))
    begun, go_on = threading.Event(), threading.Event()

    def script(batch: list[Event]) -> None:
        begun.set()
        assert go_on.wait(10)

    run.sink.script = script
    run.start()
    assert begun.wait(10)
    run.stop.set()
    run.pipeline.interrupt()
    go_on.set()
    run.end()
    assert keys(run.sink.delivered) == [1, 2]
    assert value(shop, "select last_seq from cdc.position") == run.sink.delivered[1].source.seq


def test_a_stop_while_the_sink_cannot_be_opened_ends_soon(shop: connection, prepare: Callable[..., Run]) -> None:
    run = prepare(retry={"initial": "1m", "max": "5m"})

    def opening() -> None:
        raise TransientFailure("down")

    run.sink.opening = opening
    run.start()
    wait_for(lambda: run.pipeline.state == "retrying")
    run.end(2)


def test_a_stop_while_waiting_for_the_owner_ends_soon(
    shop: connection, prepare: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(owner="first").start()
    wait_for(lambda: value(shop, "select count(*) from cdc.sink where state = 'running'"))
    monkeypatch.setattr(pipeline, "STANDBY_INTERVAL", 60.0)
    second = prepare(owner="second").start()
    wait_for(lambda: value(shop, "select count(*) from pg_stat_activity where application_name = 'cdc audit'") == 2)
    second.end(2)


class AtTheWorstMoment(threading.Event):
    """A stop request that comes right after its flag was read, once `armed`."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = False
        self.interrupt: Callable[[], None] = lambda: None

    def is_set(self) -> bool:
        answer = super().is_set()
        if self.armed and not answer and threading.current_thread() is not threading.main_thread():
            self.set()
            self.interrupt()
        return answer


def test_a_stop_request_between_two_looks_is_not_slept_through(shop: connection, installed: str) -> None:
    bell = Bell("adaptive")
    bell.arm()
    run = Run(installed, "audit", {}, "test", bell)
    run.stop = run.pipeline._stop_event = stop = AtTheWorstMoment()
    stop.interrupt = run.pipeline.interrupt
    run.start()
    wait_for(lambda: run.pipeline._sleeper.idle)  # sleeps until it is rung
    stop.armed = True
    bell.wake()
    run.pipeline.join(5)  # and not SAFETY_POLL
    assert not run.pipeline.is_alive()


# -- losing the connection ----------------------------------------------------------------------------------------


def test_a_backend_killed_in_mid_batch_costs_a_repetition_with_the_same_ids(
    shop: connection, prepare: Callable[..., Run], installed: str, connect: Connect
) -> None:
    insert(shop, 1, 2, 3)
    run = prepare()
    side = connect(installed)  # of the pipeline's thread
    killed: list[int] = []

    def script(batch: list[Event]) -> None:
        if not killed:
            rows = fetch(
                side,
                "select pid, pg_terminate_backend(pid) from pg_stat_activity where application_name = 'cdc audit'",
            )
            killed.extend(pid for pid, _ in rows)
            insert(side, 4)

    run.sink.script = script
    run.start()
    wait_for(lambda: 4 in keys(run.sink.delivered))
    first, second = run.sink.attempts[:2]
    assert keys(first) == [1, 2, 3]
    assert second == first
    assert [event.id for event in second] == [event.id for event in first]
    assert second[0].to_json() == first[0].to_json()
    assert keys(run.sink.delivered) == [1, 2, 3, 1, 2, 3, 4]
    wait_for(lambda: caught_up(shop))
    wait_for(lambda: status(shop)[0] == "running")
    assert run.sink.calls == ["open", "close", "open"]
    assert value(shop, "select epoch from cdc.sink") == 2


def test_a_second_pipeline_waits_and_takes_over_when_the_first_is_terminated(
    shop: connection, prepare: Callable[..., Run]
) -> None:
    first = prepare(owner="first").start()
    insert(shop, 1)
    wait_for(lambda: caught_up(shop))
    second = prepare(owner="second").start()
    wait_for(lambda: value(shop, "select count(*) from pg_stat_activity where application_name = 'cdc audit'") == 2)
    insert(shop, 2)
    wait_for(lambda: caught_up(shop))
    assert second.pipeline.state == "waiting"
    assert second.sink.calls == []
    # The first may be back before the second looks again; in the end it is not.
    first.stop.set()
    fetch(
        shop,
        """select pg_terminate_backend(l.pid) from pg_locks l
            where l.locktype = 'advisory' and l.classid = 6513764
              and l.database = (select oid from pg_database where datname = current_database())""",
    )
    wait_for(lambda: value(shop, "select owner from cdc.sink") == "second")
    insert(shop, 3)
    wait_for(lambda: caught_up(shop))
    assert keys(first.sink.delivered) == [1, 2]
    assert keys(second.sink.delivered) == [3]


def test_a_fenced_pipeline_acknowledges_nothing_and_waits(
    shop: connection, prepare: Callable[..., Run], connect: Connect, installed: str
) -> None:
    insert(shop, 1)
    run = prepare()
    rival = connect(installed)

    def script(batch: list[Event]) -> None:
        fetch(shop, "update cdc.sink set epoch = epoch + 1, owner = 'rival'; update cdc.position set epoch = epoch + 1")
        run.sink.script = raising()

    run.sink.script = script
    run.start()
    wait_for(lambda: run.sink.attempts)
    # Its connection, and with it its lock, goes when it finds out; the rival is then faster.
    wait_for(lambda: value(rival, "select pg_try_advisory_lock(6513764, id) from cdc.sink"))
    wait_for(lambda: run.sink.calls[-1:] == ["close"])
    assert not caught_up(shop)
    assert value(shop, "select delivered_at from cdc.position") is None
    wait_for(lambda: run.pipeline.state == "waiting")
    rival.close()
    wait_for(lambda: caught_up(shop))
    assert keys(run.sink.delivered) == [1, 1]


def test_a_sink_the_database_refuses_shows_why_and_recovers(shop: connection, prepare: Callable[..., Run]) -> None:
    prepare().start()
    insert(shop, 1)
    wait_for(lambda: caught_up(shop))
    fetch(shop, "alter function cdc.next_batch rename to next_batch_gone")
    insert(shop, 2)
    wait_for(lambda: status(shop)[0] == "retrying")
    assert "next_batch" in status(shop)[1]
    fetch(shop, "alter function cdc.next_batch_gone rename to next_batch")
    wait_for(lambda: caught_up(shop))
    wait_for(lambda: status(shop)[0] == "running", 1.0)


def test_a_slow_sink_does_not_hold_back_another(shop: connection, prepare: Callable[..., Run]) -> None:
    insert(shop, 1)
    bell = Bell("off")
    slow, quick, broken = prepare("slow", bell=bell), prepare("quick", bell=bell), prepare("broken", bell=bell)
    stuck, go_on = threading.Event(), threading.Event()

    def script(batch: list[Event]) -> None:
        stuck.set()
        assert go_on.wait(30)

    slow.sink.script = script
    broken.sink.script = raising(*[TransientFailure("down")] * 100_000)
    for run in (slow, quick, broken):
        run.start()
    assert stuck.wait(10)
    for id_ in range(2, 12):
        insert(shop, id_)
        wait_for(lambda id_=id_: id_ in keys(quick.sink.delivered), 3.0)
    wait_for(lambda: caught_up(shop, "quick"))
    assert not caught_up(shop, "slow")
    assert not caught_up(shop, "broken")
    assert slow.sink.delivered == broken.sink.delivered == []
    go_on.set()
    wait_for(lambda: caught_up(shop, "slow"))
    assert keys(slow.sink.delivered) == list(range(1, 12))
