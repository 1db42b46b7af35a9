# ruff: noqa: E501  # values of keys are easier to read on one line
"""Existing rows beside the stream, through the pipeline: what is told, in what order, and what a row may be."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from psycopg2.extensions import connection
from scripted import Run, caught_up, dead_letters, insert, wait_for
from sql import fetch, value

from cdc import backfill, outbox
from cdc.connection import Connection
from cdc.errors import CdcError, DatabaseError, PermanentFailure
from cdc.event import Event, Op

Prepare = Callable[..., Run]


def ask(dsn: str, table: str = "item", *, rows: int = 1000, rate: int | None = None, where: str | None = None) -> None:
    """Start a backfill for sink audit, which is registered if need be."""
    with Connection(dsn, purpose="test") as connection:
        outbox.register_sink(connection, "audit", start="now")
        (candidate,) = (found for found in backfill.candidates(connection) if found.table == table)
        backfill.start(connection, "audit", candidate, rows=rows, rate=rate, condition=where)


def until_open(gate: threading.Event) -> None:
    assert gate.wait(10)


def state_of(conn: connection, table: str = "item") -> Any:
    rows = fetch(conn, "select state from cdc.backfill where table_name = %s order by id desc limit 1", (table,))
    return rows[0][0] if rows else None


def told(run: Run) -> list[Event]:
    return [event for event in run.sink.delivered if event.op is Op.READ]


def copy_of(events: list[Event]) -> dict[Any, dict[str, Any]]:
    table: dict[Any, dict[str, Any]] = {}
    for event in events:
        event.apply_to(table)
    return table


def rows_of(conn: connection, table: str = "item", key: str = "id") -> dict[Any, dict[str, Any]]:
    found = [row for (row,) in fetch(conn, f"select to_json(t) from {table} t")]
    return {row[key]: row for row in found}


# -- what is told -----------------------------------------------------------------------------------------------


def test_a_backfill_tells_of_every_row_once_and_ends(items: connection, installed: str, prepare: Prepare) -> None:
    insert(items, *range(1, 101), text="old")
    ask(installed, rows=7)
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items) == "done")
    run.end()
    assert [event.key for event in told(run)] == [{"id": i} for i in range(1, 101)]
    (first, *_) = told(run)
    assert (first.op, first.before, first.changed, first.context) == (Op.READ, None, None, None)
    assert first.after is not None
    assert first.after.raw == '{"id":1,"v":"old"}'
    assert Event.from_json(first.to_json()) == first
    assert len({event.id for event in told(run)}) == 100
    assert len({(event.source.seq, event.source.ts) for event in told(run)}) == 100
    assert all(event.id.startswith("shop-b1-") for event in told(run))


def test_a_new_sink_may_begin_with_a_backfill_of_all_it_wants(
    items: connection, installed: str, prepare: Prepare
) -> None:
    fetch(
        items,
        """create table other (id integer primary key); create table unwanted (id integer primary key);
           create table heap (v text); create table fleeting (id integer primary key);
           select cdc.enable_capture('other'), cdc.enable_capture('unwanted'), cdc.enable_capture('heap'),
                  cdc.enable_capture('fleeting', notify => 'ephemeral');
           insert into other values (7); insert into unwanted values (7); insert into heap values ('x')""",
    )
    insert(items, 1, 2)
    run = prepare(start="backfill", tables=("public.item", "public.other", "public.heap", "public.fleeting")).start()
    wait_for(lambda: state_of(items) == "done" and state_of(items, "other") == "done")
    assert [(event.source.table, event.key) for event in run.sink.delivered] == [
        ("item", {"id": 1}),
        ("item", {"id": 2}),
        ("other", {"id": 7}),
    ]
    insert(items, 3)
    wait_for(lambda: run.sink.delivered[-1].op is Op.INSERT)
    run.end()
    # Once: not again with the next start.
    again = prepare(start="backfill").start()
    wait_for(lambda: caught_up(items) and again.pipeline.state == "running")
    again.end()
    assert again.sink.delivered == []
    assert value(items, "select count(*) from cdc.backfill") == 2


def test_a_sink_that_wants_no_rows_is_told_of_none(items: connection, prepare: Prepare) -> None:
    insert(items, 1)
    run = prepare(start="backfill", ops=("insert",)).start()
    wait_for(lambda: run.pipeline.state == "running")
    insert(items, 2)
    wait_for(lambda: run.sink.delivered)
    assert [event.op for event in run.sink.delivered] == [Op.INSERT]
    assert value(items, "select count(*) from cdc.backfill") == 0


def test_filters_models_and_the_policy_apply_to_rows(items: connection, installed: str, prepare: Prepare) -> None:
    pytest.importorskip("cel_expr_python")
    insert(items, *range(1, 11))
    ask(installed)
    run = prepare(start="now", filter="op == 'read' && after.id > 4", on_permanent_failure="park_key")

    def refuse(batch: list[Event]) -> None:
        if any(event.key == {"id": 7} for event in batch):
            raise PermanentFailure("never 7")

    run.sink.script = refuse
    run.start()
    wait_for(lambda: state_of(items) == "done")
    run.end()
    assert sorted(event.key["id"] for event in told(run) if event.key) == [5, 6, 8, 9, 10]
    assert [row[:2] for row in dead_letters(items)] == [("7", "never 7")]


def test_what_waits_behind_a_row_comes_back_after_it(items: connection, installed: str, prepare: Prepare) -> None:
    insert(items, 1, 2)
    ask(installed)
    run = prepare(start="now", on_permanent_failure="park_key")
    refusing = [True]

    def refuse(batch: list[Event]) -> None:
        if refusing[0] and any(event.key == {"id": 1} for event in batch):
            raise PermanentFailure("not now")

    run.sink.script = refuse
    run.start()
    wait_for(lambda: state_of(items) == "done")
    fetch(items, "update item set v = 'new'")
    wait_for(lambda: len(dead_letters(items)) == 2)
    refusing[0] = False
    fetch(items, "update cdc.dead_letter set wanted = true; update cdc.sink set requests = requests + 1")
    wait_for(lambda: not dead_letters(items))
    run.end()
    assert [event.op for event in run.sink.delivered if event.key == {"id": 1}] == [Op.READ, Op.UPDATE]


def test_masks_excludes_and_conditions_are_those_of_the_trigger(
    items: connection, installed: str, prepare: Prepare
) -> None:
    fetch(
        items,
        """create table secret (id integer primary key, card text, mail text, note text, kind text);
           select cdc.enable_capture('secret', exclude => '{note}', mask => '{"card": "redact", "mail": "hash"}',
                                     conditions => '{"insert": "NEW.kind <> ''draft''"}');
           insert into secret select g, 'CANARY-card', 'CANARY-mail', 'CANARY-note', case g when 2 then 'draft' else 'x' end
             from generate_series(1, 3) g""",
    )
    # What the trigger made of the same rows.
    captured = [row for (row,) in fetch(items, "select new_row::text from cdc.event order by seq")]
    ask(installed, "secret")
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items, "secret") == "done")
    run.end()
    assert [event.after.raw for event in told(run) if event.after] == captured
    assert len(captured) == 2
    assert "CANARY" not in "".join(event.to_json() for event in run.sink.delivered)
    for table in ("backfill", "backfill_progress", "sink", "moment"):
        assert "CANARY" not in value(items, f"select coalesce(string_agg(t::text, ''), '') from cdc.{table} t")


def test_a_masked_key_is_hashed_as_in_the_stream(items: connection, installed: str, prepare: Prepare) -> None:
    fetch(
        items,
        """create table person (mail text primary key, v integer);
           select cdc.enable_capture('person', mask => '{"mail": "hash"}');
           insert into person values ('CANARY-a', 1), ('CANARY-b', 2)""",
    )
    stream = {key for (key,) in fetch(items, "select new_row ->> 'mail' from cdc.event")}
    ask(installed, "person", rows=1)
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items, "person") == "done")
    run.end()
    assert {event.key["mail"] for event in told(run) if event.key} == stream
    assert "CANARY" not in "".join(event.to_json() for event in run.sink.delivered)


def test_a_condition_chooses_rows_and_none_of_the_rest_is_told(
    items: connection, installed: str, prepare: Prepare
) -> None:
    insert(items, *range(1, 51))
    ask(installed, rows=4, where="id % 10 = 0 -- every tenth")
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items) == "done")
    run.end()
    assert [event.key for event in told(run)] == [{"id": i} for i in (10, 20, 30, 40, 50)]
    with Connection(installed, purpose="test") as session:
        (found,) = backfill.backfills(session)
    assert (found.rows_read, found.rows_told, found.share) == (50, 5, 1.0)


@pytest.mark.parametrize("condition", ["nothing = 1", "id =", "id) or (", "id; drop table item", "'x'"])
def test_a_condition_that_is_none_is_refused_before_anything_begins(
    items: connection, installed: str, condition: str
) -> None:
    with pytest.raises(DatabaseError):
        ask(installed, where=condition)
    assert value(items, "select count(*) from cdc.backfill") == 0
    assert value(items, "select to_regclass('item') is not null")


def test_a_row_with_something_odd_in_it_stops_nobody(items: connection, installed: str, prepare: Prepare) -> None:
    fetch(
        items,
        r"""create table odd (id integer primary key, j json, t text);
            select cdc.enable_capture('odd', exclude => '{t}');
            insert into odd values (1, '{"a": "\u0000"}', 'CANARY'), (2, '[1, 2]', 'CANARY')""",
    )
    ask(installed, "odd")
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items, "odd") == "done")
    run.end()
    assert [(event.truncated, event.key) for event in told(run)] == [(True, {"id": 1}), (False, {"id": 2})]
    assert "CANARY" not in "".join(event.to_json() for event in told(run))


# -- in order with the stream -----------------------------------------------------------------------------------


def test_rows_and_changes_make_exactly_the_table(items: connection, installed: str, prepare: Prepare) -> None:
    insert(items, *range(1, 401), text="old")
    ask(installed, rows=5)
    stop = threading.Event()

    def write() -> None:
        with Connection(installed, purpose="writer", source=False) as session:
            number = 0
            while not stop.is_set():
                number += 1
                session.execute("update item set v = %s where id = %s", (str(number), 1 + number * 37 % 400))
                session.execute("delete from item where id = %s", (1 + number * 101 % 400,))
                session.execute("insert into item values (%s, 'new')", (10_000 + number,))
                # Over the place the backfill has reached, in both directions.
                session.execute(
                    "update item set id = 2000 - id where id = %s and not exists (select from item where id = %s)",
                    (1 + number * 53 % 400, 2000 - (1 + number * 53 % 400)),
                )
                session.execute("update item set id = -id where id = %s", (400 - number % 400,))

    writer = threading.Thread(target=write)
    run = prepare(start="now").start()
    writer.start()
    try:
        wait_for(lambda: state_of(items) == "done", 60)
    finally:
        stop.set()
        writer.join()
    wait_for(lambda: caught_up(items))
    run.end()
    assert len(told(run)) > 100
    assert copy_of(run.sink.delivered) == rows_of(items)


def test_a_table_that_grows_faster_than_its_rows_are_told_of_is_told_of_to_the_end(
    items: connection, installed: str, prepare: Prepare
) -> None:
    insert(items, *range(1, 41))
    ask(installed, rows=4)
    run = prepare(start="now")

    def grow(batch: list[Event]) -> None:
        if any(event.op is Op.READ for event in batch):
            with Connection(installed, purpose="writer", source=False) as session:
                session.execute(
                    "insert into item select max(id) + g, 'new' from item, generate_series(1, 20) g group by g"
                )

    run.sink.script = grow
    run.start()
    wait_for(lambda: state_of(items) == "done")
    wait_for(lambda: caught_up(items))
    run.end()
    assert [event.key for event in told(run)] == [{"id": i} for i in range(1, 41)]
    assert copy_of(run.sink.delivered) == rows_of(items)


def test_a_row_comes_after_the_changes_it_contains_and_before_those_it_does_not(
    items: connection, installed: str, prepare: Prepare
) -> None:
    insert(items, 1, text="a")
    run = prepare(start="now")
    gate = threading.Event()
    run.sink.script = lambda batch: None if [event.op for event in batch] != [Op.READ] else until_open(gate)
    ask(installed)
    fetch(items, "update item set v = 'b'")  # before the chunk is read
    run.start()
    wait_for(lambda: run.sink.attempts and run.sink.attempts[-1][0].op is Op.READ)
    fetch(items, "update item set v = 'c'")  # while it is delivered
    gate.set()
    wait_for(lambda: state_of(items) == "done" and caught_up(items))
    run.end()
    seen = [(event.op.value, event.after["v"]) for event in run.sink.delivered if event.after]
    assert seen == [("update", "b"), ("read", "b"), ("update", "c")]


def test_a_transaction_in_progress_changes_a_row_with_a_higher_seq_than_the_row_is_told_with(
    items: connection, installed: str, prepare: Prepare, connect: Callable[..., connection]
) -> None:
    insert(items, *range(1, 31), text="a")
    open_one = connect(installed)
    open_one.autocommit = False
    fetch(open_one, "update item set v = 'b' where id = 30")  # its seq is drawn
    insert(items, 31)
    ask(installed, rows=3)
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items) == "done")
    open_one.commit()
    wait_for(lambda: caught_up(items))
    run.end()
    (row,) = (event for event in told(run) if event.key == {"id": 30})
    (update,) = (event for event in run.sink.delivered if event.op is Op.UPDATE)
    assert row.source.seq < update.source.seq
    assert copy_of(run.sink.delivered) == rows_of(items)


def test_the_seq_of_rows_follows_what_was_recorded(items: connection, installed: str, prepare: Prepare) -> None:
    insert(items, *range(1, 31), text="a")
    ask(installed, rows=3)
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items) == "done")
    run.end()
    assert told(run)[-1].source.seq == value(items, "select max(seq) from cdc.event")


def test_a_large_window_goes_first(
    items: connection, installed: str, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(items, *range(1, 101))
    ask(installed)
    fetch(items, "update item set v = 'x'")
    # Two pages of updates.
    monkeypatch.setattr(backfill, "PAGE", 60)
    run = prepare(start="now", batch={"events": 10}).start()
    wait_for(lambda: state_of(items) == "done")
    run.end()
    assert [event.op for event in run.sink.delivered] == [Op.UPDATE] * 100 + [Op.READ] * 100
    assert max(map(len, run.sink.taken)) == 10


def test_a_retry_repeats_a_row_under_its_id_and_a_crash_only_where_it_has_not_changed(
    items: connection, installed: str, prepare: Prepare
) -> None:
    insert(items, 1, 2, text="a")
    ask(installed)
    run = prepare(start="now", owner="first")
    run.sink.script = lambda batch: run.stop.set() if batch[0].op is Op.READ else None
    run.start()
    wait_for(lambda: run.sink.taken)
    run.end()
    # As if it had died before it acknowledged.
    fetch(
        items,
        """update cdc.backfill_progress set cursor = null, ended = false, rows_read = 0, rows_told = 0;
           update item set v = 'b' where id = 2""",
    )
    again = prepare(start="now", owner="second").start()
    wait_for(lambda: state_of(items) == "done")
    again.end()
    first, second = ({event.key["id"]: event.id for event in told(one) if event.key} for one in (run, again))
    assert first[1] == second[1]
    assert first[2] != second[2]


# -- what people do to it ---------------------------------------------------------------------------------------


def test_pause_resume_and_cancel_are_noticed_by_the_pipeline(
    items: connection, installed: str, prepare: Prepare
) -> None:
    insert(items, *range(1, 1001))
    ask(installed, rows=1, rate=50)
    run = prepare(start="now").start()
    wait_for(lambda: told(run))
    with Connection(installed, purpose="test") as session:
        assert backfill.change(session, "audit", "paused", None) == ["public.item"]
        assert backfill.change(session, "audit", "paused", None) == []
        wait_for(lambda: run.pipeline._backfills.due_at == float("inf"))
        so_far = len(told(run))
        insert(items, 2000)  # the stream goes on
        wait_for(lambda: run.sink.delivered[-1].key == {"id": 2000})
        assert len(told(run)) == so_far < 1000
        assert backfill.change(session, "audit", "running", None) == ["public.item"]
        wait_for(lambda: len(told(run)) > so_far)
        assert backfill.change(session, "audit", "cancelled", None) == ["public.item"]
        wait_for(lambda: run.pipeline._backfills.due_at == float("inf"))
        run.end()
        (found,) = backfill.backfills(session)
        assert found.state == "cancelled"
        assert found.rows_told == len(told(run)) < 1000
        assert [event.key for event in told(run)] == [{"id": i} for i in range(1, len(told(run)) + 1)]


def test_a_rate_is_kept(items: connection, installed: str, prepare: Prepare) -> None:
    insert(items, *range(1, 61))
    ask(installed, rows=10, rate=100)
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items) == "done")
    run.end()
    # Six chunks of 0.1 s each, the last one's end not waited for.
    began, ended = fetch(items, "select began_at, moved_at from cdc.backfill_progress")[0]
    assert (ended - began).total_seconds() >= 0.5


def test_a_table_is_not_told_of_twice_at_the_same_time(items: connection, installed: str) -> None:
    ask(installed)
    ask(installed)
    assert value(items, "select count(*) from cdc.backfill") == 1


def test_until_idle_counts_rows_that_are_still_to_be_told(items: connection, installed: str) -> None:
    ask(installed)
    with Connection(installed, purpose="test") as session:
        here = outbox.current_snapshot(session)
        assert outbox.sinks_behind(session, ["audit"], here) == ["audit"]
        backfill.change(session, "audit", "paused", None)
        assert outbox.sinks_behind(session, ["audit"], here) == []


# -- what cannot be told ----------------------------------------------------------------------------------------


def test_a_table_without_a_key_needs_full_images(items: connection, installed: str, prepare: Prepare) -> None:
    fetch(items, "create table heap (v text); select cdc.enable_capture('heap'); insert into heap values ('x')")
    with pytest.raises(CdcError, match=r"public\.heap has no primary key .*set image: full"):
        ask(installed, "heap")
    fetch(items, "select cdc.enable_capture('heap', image => 'full')")
    fetch(items, "insert into heap select g::text from generate_series(1, 999) g; delete from heap where v = '500'")
    ask(installed, "heap", rows=100)
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items, "heap") == "done")
    run.end()
    assert sorted(event.after["v"] for event in told(run) if event.after) == sorted(
        v for (v,) in fetch(items, "select v from heap")
    )
    assert all(event.key is None for event in told(run))


@pytest.mark.parametrize("kind", ["by key", "without a key"])
def test_a_partitioned_table_is_told_of_under_its_own_name(
    items: connection, installed: str, prepare: Prepare, kind: str
) -> None:
    key = ", primary key (region, id)" if kind == "by key" else ""
    fetch(
        items,
        f"""create table part (region text, id integer, v text{key}) partition by list (region);
            create table part_a partition of part for values in ('a');
            create table part_b partition of part for values in ('b', 'c') partition by list (region);
            create table part_b1 partition of part_b for values in ('b');
            create table part_b2 partition of part_b default;
            select cdc.enable_capture('part', image => 'full');
            insert into part select chr(97 + g % 3), g, 'x' from generate_series(1, 500) g""",
    )
    ask(installed, "part", rows=50)
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items, "part") == "done")
    run.end()
    assert {event.source.table for event in told(run)} == {"part"}
    assert sorted(event.after["id"] for event in told(run) if event.after) == list(range(1, 501))


def test_children_by_inheritance_are_not_told_of(items: connection, installed: str, prepare: Prepare) -> None:
    fetch(items, "create table child () inherits (item); insert into child values (7, 'x')")
    insert(items, 1)
    ask(installed)
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items) == "done")
    run.end()
    assert [event.key for event in told(run)] == [{"id": 1}]


def test_a_table_that_is_rewritten_in_between_is_read_from_its_beginning(
    items: connection, installed: str, prepare: Prepare
) -> None:
    fetch(
        items,
        """create table heap (v integer); select cdc.enable_capture('heap', image => 'full');
           insert into heap select g from generate_series(1, 300) g""",
    )
    ask(installed, "heap", rows=1, rate=100)
    run = prepare(start="now").start()
    wait_for(lambda: len(told(run)) > 5)
    fetch(items, "delete from heap where v <= 100")
    fetch(items, "vacuum full heap")
    fetch(items, "update cdc.backfill set chunk = 1000, rate = null; update cdc.sink set requests = requests + 1")
    wait_for(lambda: state_of(items, "heap") == "done")
    run.end()
    assert {event.after["v"] for event in told(run) if event.after} >= set(range(101, 301))


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("drop table item", "is not captured"),
        ("select cdc.disable_capture('item')", "is not captured"),
        ("alter table item drop constraint item_pkey, add primary key (v)", "another primary key"),
    ],
)
def test_what_happens_to_a_table_ends_the_backfill_with_the_reason_and_not_the_stream(
    items: connection, installed: str, prepare: Prepare, statement: str, reason: str
) -> None:
    fetch(items, "insert into item select g, g::text from generate_series(1, 500) g")
    fetch(items, "create table other (id integer primary key); select cdc.enable_capture('other')")
    ask(installed, rows=1, rate=20)
    run = prepare(start="now").start()
    wait_for(lambda: len(told(run)) > 2)
    fetch(items, statement)
    if "primary key" in reason:
        fetch(items, "select cdc.enable_capture('item')")
    wait_for(lambda: state_of(items) == "failed")
    assert reason in value(items, "select reason from cdc.backfill")
    fetch(items, "insert into other values (7)")
    wait_for(lambda: run.sink.delivered[-1].source.table == "other")
    assert run.pipeline.state == "running"


def test_an_error_of_a_condition_shows_no_value(items: connection, installed: str, prepare: Prepare) -> None:
    insert(items, 1, text="CANARY")
    ask(installed, where="v::integer > 1")
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items) == "failed")
    run.end()
    assert value(items, "select reason from cdc.backfill") == "reading the table failed with SQLSTATE 22P02"


# -- rights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(installed: str, items: connection) -> str:
    """Somebody with the rights of the daemon's role, and no others; its dsn."""
    role = f"backfiller_{value(items, 'select oid from pg_database where datname = current_database()')}"
    fetch(items, f"create role {role} login; grant cdc_reader to {role}")
    return role


def test_the_daemons_role_reads_tables_only_as_they_are_captured(
    items: connection, daemon: str, connect: Callable[..., connection], installed: str
) -> None:
    fetch(
        items,
        """create table plain (id integer primary key, v text); insert into plain values (1, 'CANARY');
           insert into item values (1, 'x')""",
    )
    with Connection(installed, purpose="test") as session:
        outbox.register_sink(session, "audit", start="now")
    session = connect(installed)
    fetch(session, f"set role {daemon}")

    def refused(statement: str) -> str:
        with pytest.raises(Exception, match=r"permission denied|must be") as caught:
            fetch(session, statement)
        return str(caught.value)

    refused("select * from plain")
    refused("select * from item")
    # It asks for any table, and gets those that are captured.
    fetch(
        session,
        """insert into cdc.backfill (sink, relation, schema_name, table_name)
           values ('audit', 'plain'::regclass::oid, 'public', 'plain'), ('audit', 'item'::regclass::oid, 'public', 'item')""",
    )
    call = "select op, new_row from cdc.backfill_batch('audit', 0, null, 100, 1000000, %s, null, 100)"
    assert fetch(session, call % 1) == [
        ("x", "table public.plain is not captured (name it under tables, then run cdc migrate)")
    ]
    assert ("r", '{"id":1,"v":"x"}') in fetch(session, call % 2)
    # A condition is SQL that runs as who migrates: it is not the daemon's to write.
    refused(
        "insert into cdc.backfill (sink, relation, schema_name, table_name, condition) values ('audit', 1, '', '', 'x')"
    )
    refused("update cdc.backfill set condition = 'pg_sleep(1) is null'")
    refused("update cdc.backfill set relation = 1")
    refused("select cdc.check_condition('item'::regclass, 'true')")
    refused("select cdc.captured_image(i, 1, '', '{id}') from cdc.sink i")
    refused("select cdc.passes(i, 'true') from cdc.sink i")
    refused("select * from cdc.scans('item'::regclass, null, null, null)")
    fetch(session, "reset role")
    fetch(items, f"drop owned by {daemon}; drop role {daemon}")


def test_code_of_others_runs_without_any_rights(items: connection, installed: str, prepare: Prepare) -> None:
    fetch(
        items,
        """create function spy() returns boolean language plpgsql as $$
             begin
               if current_setting('spy.armed', true) = 'on' and current_user <> 'cdc_nobody' then
                 raise exception 'run as %', current_user;
               end if;
               return true;
             end $$;
           create type mood as enum ('good', 'bad');
           create function as_json(m mood) returns json language plpgsql as $$
             begin perform public.spy(); return to_json('cast'::text); end $$;
           create cast (mood as json) with function as_json(mood);
           create function as_text(m mood) returns text language plpgsql as $$
             begin perform public.spy(); return 'good'; end $$;
           create cast (mood as text) with function as_text(mood);
           create function as_mood(t text) returns mood language plpgsql as $$
             begin perform public.spy(); return 'good'; end $$;
           create cast (text as mood) with function as_mood(text) as implicit;
           create domain checked as text check (spy());
           create table trap (m mood, c checked, v text, primary key (m, c));
           insert into trap values ('good', 'a', 'x'), ('good', 'b', 'x'), ('bad', 'a', 'x');
           select cdc.enable_capture('trap', conditions => '{"insert": "public.spy() and NEW.v = ''x''"}')""",
    )
    name = value(items, "select current_database()")
    fetch(items, f"alter database {name} set spy.armed = 'on'")
    ask(installed, "trap", rows=1)
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items, "trap") in ("done", "failed"))
    run.end()
    assert value(items, "select reason from cdc.backfill") is None
    assert [event.truncated for event in told(run)] == [False] * 3
    assert [(event.after["m"], event.after["c"]) for event in told(run) if event.after] == [
        ("cast", "a"),
        ("cast", "b"),
        ("cast", "a"),
    ]


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        (
            "revoke all on item from {role}",
            "permission denied for table item (let the role that migrates select from it)",
        ),
        ("alter table item enable row level security", "row-level security policy for table"),
    ],
)
def test_what_the_role_that_migrated_may_not_read_is_an_error_and_not_missing(
    items: connection, installed: str, prepare: Prepare, statement: str, reason: str
) -> None:
    insert(items, 1, 2)
    role = f"migrator_{value(items, 'select oid from pg_database where datname = current_database()')}"
    fetch(
        items,
        f"""create role {role};
            grant all on schema cdc to {role}; grant all on all tables in schema cdc to {role};
            grant all on all sequences in schema cdc to {role}; grant all on all functions in schema cdc to {role};
            alter function cdc.backfill_batch(text, bigint, bigint, integer, bigint, integer, bigint, integer) owner to {role};
            grant select on item to {role}""",
    )
    fetch(items, statement.format(role=role))
    ask(installed)
    run = prepare(start="now").start()
    wait_for(lambda: state_of(items) == "failed")
    run.end()
    assert reason in value(items, "select reason from cdc.backfill")
    assert told(run) == []
    fetch(items, f"reassign owned by {role} to current_user; drop owned by {role}; drop role {role}")


# -- paging -----------------------------------------------------------------------------------------------------

KEYS = {
    "smallint": ("smallint", "select g from generate_series(-40, 40) g"),
    "bigint": ("bigint", "select g * 4611686018427387 from generate_series(-40, 40) g"),
    "numeric": ("numeric", "select x from unnest('{-1e50,-1.000001,-1,0,0.1,1e-30,2.50,1e50,NaN,Infinity,-Infinity}'::numeric[]) x"),
    "double": ("float8", "select x from unnest('{-1e300,-0.1,0,0.1,0.30000000000000004,1e-300,5,NaN,Infinity,-Infinity}'::float8[]) x"),
    "real": ("float4", "select x from unnest('{-1e30,-0.1,0,0.1,1.17549435e-38,3.4028235e38,NaN}'::float4[]) x"),
    "text": ("text", r"select x from unnest(array['', ' ', 'a', 'B', 'é', 'z', E'it''s', E'back\\slash', E'line\nbreak', '%s', '{}', 'null', 'ü', repeat('x', 2000)]) x"),
    "text in another collation": ('text collate "{collation}"', "select x from unnest(array['a','B','b','A','é','e','Z','z','ß','ss']) x"),
    "varchar": ("varchar(20)", "select 'v' || g from generate_series(1, 30) g"),
    "char": ("char(5)", "select x from unnest(array['a','ab','abc','b','']) x"),
    "name": ("name", "select ('n' || g)::name from generate_series(1, 30) g"),
    "one char": ('"char"', "select x::text::\"char\" from unnest(array['a','b','Z','1']) x"),
    "uuid": ("uuid", "select md5(g::text)::uuid from generate_series(1, 50) g"),
    "timestamptz": ("timestamptz", "select x from unnest('{-infinity,0044-03-15 12:00+00 BC,1970-01-01 00:00:00.000001+00,2026-03-29 01:30+00,2026-03-29 02:30+00,infinity}'::timestamptz[]) x"),
    "timestamp": ("timestamp", "select '2026-01-01'::timestamp + g * interval '1 day 1 microsecond' from generate_series(1, 30) g"),
    "date": ("date", "select x from unnest('{-infinity,0044-03-15 BC,2026-11-28,294276-01-01,infinity}'::date[]) x"),
    "time": ("time", "select x from unnest('{00:00,12:34:56.789,24:00}'::time[]) x"),
    "timetz": ("timetz", "select x from unnest('{00:00+02,00:00-02,12:34:56.789+00}'::timetz[]) x"),
    "interval": ("interval", "select x from unnest('{-1 year,00:00,1 mon,31 days,-1 day +02:00,1 year 2 mons 3 days 04:05:06.7}'::interval[]) x"),
    "bytea": ("bytea", r"select x from unnest(array['\x'::bytea, '\x00', '\xff', '\x5c', '\x27', '\x0001', '\xdeadbeef']) x"),
    "boolean": ("boolean", "select x from unnest('{t,f}'::boolean[]) x"),
    "bits": ("bit varying(9)", "select x from unnest(array[B'0', B'1', B'01', B'111111111']) x"),
    "bit": ("bit(3)", "select x from unnest(array[B'000', B'101', B'111']) x"),
    "inet": ("inet", "select x from unnest('{10.0.0.1,10.0.0.1/8,::1,fe80::/10,255.255.255.255}'::inet[]) x"),
    "money": ("money", "select (g * 100.25)::numeric::money from generate_series(-5, 5) g"),
    "enum": ("mood", "select x from unnest('{zz,a,\"it''s\",M}'::mood[]) x"),
    "domain": ("positive", "select g from generate_series(1, 30) g"),
    "array": ("integer[]", "select x from (values ('{}'::integer[]), ('{1}'), ('{1,null}'), ('{1,2}'), ('{2}'), ('[3:4]={5,6}')) v (x)"),
    "text array": ("text[]", r"""select x from (values ('{}'::text[]), ('{"a,b"}'), ('{NULL}'), ('{"null"}'), ('{"\"","\\"}')) v (x)"""),
    "range": ("int4range", "select x from unnest('{empty,\"[1,5)\",\"(,3)\",\"[7,)\",\"[1,9)\"}'::int4range[]) x"),
    "composite": ("pair", "select row(g % 3, 'x,\"' || g)::pair from generate_series(1, 20) g"),
    "jsonb": ("jsonb", """select x from unnest(array['1', '"a"', '{"b": [1, null]}', 'null', '[]']::jsonb[]) x"""),
    "lsn": ("pg_lsn", "select ('0/' || to_hex(g))::pg_lsn from generate_series(1, 20) g"),
}  # fmt: skip
"""What a key may be of, and values of it."""


@pytest.mark.parametrize("kind", KEYS)
def test_paging_comes_by_every_key_once_and_in_order(installed: str, items: connection, kind: str) -> None:
    type_, values = KEYS[kind]
    if "{collation}" in type_:
        rows = fetch(
            items,
            """select collname from pg_collation c
                where collname !~* '^(c|posix|default|ucs_basic|pg_c)' and collencoding in (-1, pg_char_to_encoding('UTF8'))
                order by collname limit 1""",
        )
        if not rows:
            pytest.skip("this server knows no collation but C")
        type_ = type_.replace("{collation}", rows[0][0])
    fetch(
        items,
        f"""create type mood as enum ('zz', 'a', 'it''s', 'M'); create type pair as (a integer, b text);
            create domain positive as integer check (value > 0);
            create table keyed (k {type_}, n serial, primary key (k));
            select cdc.enable_capture('keyed');
            insert into keyed (k) {values};
            create table twofold (a integer, k {type_}, n serial, z text not null, primary key (a, k, z) include (n));
            insert into twofold (a, k, z) select a, w.x, z from generate_series(1, 2) a, ({values}) w (x), unnest('{{p,q}}'::text[]) z;
            select cdc.enable_capture('twofold')""",
    )
    for table, order in (("keyed", "k"), ("twofold", "a, k, z")):
        expected = [n for (n,) in fetch(items, f"select n from {table} order by {order}")]
        for size in (1, 3):
            assert page_through(items, table, size) == expected, size
        middle = len(expected) // 2
        assert beyond(items, table, order, middle) == [False] * (middle + 1) + [True] * (len(expected) - middle - 1)


def key_of(table: str) -> str:
    """What cdc.scans is to be told of a table, as SQL."""
    name = f"'{table}'::regclass"
    return f"(select array_agg(k) from cdc.capture_of({name}) c, cdc.paging({name}, c.captured) k)"


def beyond(conn: connection, table: str, order: str, number: int) -> list[bool]:
    """Of each row of a table in order, whether cdc.scans has it come after the one of that number."""
    scans = f"select place, beyond, source from cdc.scans('{table}'::regclass, {key_of(table)}, null, %s)"
    ((place, nothing, source),) = fetch(conn, scans, (None,))
    assert nothing == "false"
    query = f"select {place} from {source} as new order by {order} offset {number} limit 1"
    last = value(conn, query.replace("%", "%%"), ())
    ((_, condition, _),) = fetch(conn, scans, (last,))
    query = f"select {condition} from {source} as new order by {order}"
    return [answer for (answer,) in fetch(conn, query.replace("%", "%%"), ())]


def page_through(conn: connection, table: str, size: int) -> list[int]:
    """All of a table, by the queries of cdc.scans, `size` rows at a time."""
    cursor: list[str] | None = None
    found: list[int] = []
    while True:
        page: list[tuple[int, list[str]]] = []
        for place, source, rest in fetch(
            conn,
            f"select place, source, rest from cdc.scans('{table}'::regclass, {key_of(table)}, %s, null)",
            (cursor,),
        ):
            query = f"select new.n, {place} from {source} as new {rest} limit {size - len(page)}"
            page += fetch(conn, query.replace("%", "%%"), ())
            if len(page) == size:
                break
        if not page:
            return found
        found += [n for n, _ in page]
        cursor = page[-1][1]


@pytest.mark.parametrize("type_", ["checked_pair", "checked[]", "checked_range"], ids=["composite", "array", "range"])
def test_a_key_whose_values_run_code_of_a_user_is_not_paged_along(
    items: connection, installed: str, type_: str
) -> None:
    fetch(
        items,
        f"""create domain checked as integer check (value > 0); create type checked_pair as (a checked, b integer);
            create type checked_range as range (subtype = checked);
            create table keyed (k {type_} primary key);
            select cdc.enable_capture('keyed')""",
    )
    assert fetch(items, "select * from cdc.paging('keyed'::regclass, (select max(id) from cdc.captured_table))") == []
    with pytest.raises(CdcError, match="set image: full"):
        ask(installed, "keyed")


def test_a_chunk_costs_the_same_wherever_it_is(items: connection, installed: str) -> None:
    fetch(
        items,
        """create table wide (a integer, b text, c integer, primary key (a, b, c)); select cdc.enable_capture('wide');
           alter table wide disable trigger all;
           insert into wide select g % 3, g::text, g from generate_series(1, 20000) g; analyze wide""",
    )
    scans = fetch(
        items, f"select source, rest from cdc.scans('wide'::regclass, {key_of('wide')}, '{{1,5000,5000}}', '{{2,9,9}}')"
    )
    assert len(scans) == 3
    fetch(items, "set enable_seqscan = off; set enable_bitmapscan = off; set enable_sort = off")
    for source, rest in scans:
        plan = json.dumps(fetch(items, f"explain (format json) select * from {source} as new {rest} limit 10"))
        assert "Index" in plan
        assert "Index Cond" in plan
        assert "Sort" not in plan
