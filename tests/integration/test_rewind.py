"""Going back to an earlier position, and what a moment is worth as one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from psycopg2.extensions import connection
from scripted import Run, caught_up, insert, keys, wait_for
from sql import fetch, value

from cdc import outbox
from cdc.cli import main
from cdc.connection import Connection
from cdc.errors import CdcError, DatabaseError, PermanentFailure
from cdc.event import Event

Prepare = Callable[..., Run]
Command = Callable[..., Result]


@pytest.fixture
def cdc(installed: str, tmp_path: Path) -> Command:
    """``cdc(…)`` runs a command for database shop, whose sink is called audit."""
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "databases": {
                    "shop": {"dsn": installed, "tables": {"public.item": {}, "public.other": {}}, "notify": "off"}
                },
                "sinks": {"audit": {"type": "file", "path": str(tmp_path / "out.jsonl"), "tables": ["public.*"]}},
            }
        )
    )

    def run(*arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(main, ["-c", str(config), *arguments])
        assert done.exit_code == code, (done.output, done.stderr)
        return done

    return run


@pytest.fixture
def other(items: connection) -> connection:
    fetch(items, "create table other (id integer primary key); select cdc.enable_capture('other')")
    return items


def note(installed: str) -> datetime:
    """Note a moment, and return one after it."""
    with Connection(installed, purpose="test") as session:
        outbox.note_moment(session)
        [(now,)] = session.query("select clock_timestamp()")
        return now


def ran(prepare: Prepare, conn: connection, **options: Any) -> Run:
    """A pipeline that has delivered everything there is, and has ended."""
    run = prepare(**options).start()
    wait_for(lambda: run.pipeline.state == "running" and caught_up(conn))
    run.end()
    return run


def test_the_earliest_position_brings_all_that_is_kept_under_the_same_ids(
    items: connection, prepare: Prepare, cdc: Command
) -> None:
    insert(items, 1, 2, 3)
    first = ran(prepare, items)
    assert "3 events would come" in cdc("sinks", "rewind", "audit", "--to", "earliest", "--dry-run").output
    assert ran(prepare, items).sink.delivered == []
    said = cdc("sinks", "rewind", "audit", "--to", "earliest").output
    assert "shop: sink audit is rewound; 3 events will come" in said
    assert "no daemon serves it" in said
    again = ran(prepare, items)
    assert [event.id for event in again.sink.delivered] == [event.id for event in first.sink.delivered]


def test_a_moment_brings_what_was_committed_since_also_of_transactions_that_were_open_then(
    items: connection, installed: str, prepare: Prepare, cdc: Command, connect: Callable[..., connection]
) -> None:
    insert(items, 1)
    open_one = connect(installed)
    open_one.autocommit = False
    fetch(open_one, "insert into item values (2, 'written before the moment, committed after it')")
    moment = note(installed)
    open_one.commit()
    insert(items, 3)
    ran(prepare, items)
    assert "2 events would come" in cdc("sinks", "rewind", "audit", "--to", moment.isoformat(), "--dry-run").output
    cdc("sinks", "rewind", "audit", "--to", moment.isoformat())
    assert keys(ran(prepare, items).sink.delivered) == [2, 3]


def test_a_moment_between_two_notes_repeats_rather_than_loses(
    items: connection, installed: str, prepare: Prepare, cdc: Command
) -> None:
    insert(items, 1)
    note(installed)
    insert(items, 2)
    moment = value(items, "select clock_timestamp()")
    insert(items, 3)
    note(installed)
    ran(prepare, items)
    cdc("sinks", "rewind", "audit", "--to", moment.isoformat())
    assert keys(ran(prepare, items).sink.delivered) == [2, 3]


def test_an_idle_database_notes_nothing(items: connection, installed: str) -> None:
    note(installed)
    before = value(items, "select count(*) from cdc.moment")
    note(installed)
    assert value(items, "select count(*) from cdc.moment") == before
    insert(items, 1)
    note(installed)
    assert value(items, "select count(*) from cdc.moment") == before + 1


def test_a_sink_that_has_nothing_to_deliver_has_come_as_far_as_any_moment(
    items: connection, installed: str, prepare: Prepare, cdc: Command
) -> None:
    insert(items, 1)
    ran(prepare, items)
    moment = note(installed)  # its position is from before
    assert "0 events will come" in cdc("sinks", "rewind", "audit", "--to", moment.isoformat()).output
    insert(items, 2)
    assert keys(ran(prepare, items).sink.delivered) == [2]


def test_what_the_outbox_no_longer_has_is_refused_with_the_moment_it_begins_at(
    items: connection, installed: str, prepare: Prepare, cdc: Command
) -> None:
    insert(items, 1)
    gone = note(installed)
    insert(items, 2)
    kept = note(installed)
    ran(prepare, items)
    # Two turns: the first begins the next child, the second truncates the one before.
    fetch(items, "select cdc.rotate('0 s')")
    insert(items, 3)
    assert "truncated" in value(items, "select cdc.rotate('0 s')")
    ran(prepare, items)
    insert(items, 4)
    said = cdc("sinks", "rewind", "audit", "--to", gone.isoformat(), code=1).stderr
    assert "the outbox is known to have everything only since" in said
    # What was truncated had been committed by then: from here on the outbox has all.
    cdc("sinks", "rewind", "audit", "--to", kept.isoformat())
    assert keys(ran(prepare, items).sink.delivered) == [3, 4]


def test_what_is_committed_while_a_moment_is_noted_counts_as_earlier(
    items: connection, installed: str, connect: Callable[..., connection]
) -> None:
    slow = connect(installed)
    noting = threading.Thread(target=fetch, args=(slow, "select pg_sleep(0.4), cdc.note_moment()"))
    noting.start()
    wait_for(lambda: value(items, "select count(*) from pg_stat_activity where query like '%note_moment()' ") >= 1)
    time.sleep(0.1)
    insert(items, 1)
    committed_at = value(items, "select clock_timestamp()")
    noting.join()
    at, shows = fetch(
        items,
        "select at, (select bool_and(pg_visible_in_snapshot(e.txid, m.snap)) from cdc.event e)"
        " from cdc.moment m order by at desc limit 1",
    )[0]
    assert shows
    assert at > committed_at, "whoever goes back to a moment before it would miss it"


def test_a_position_whose_events_were_given_back_meanwhile_is_refused(
    items: connection, installed: str, prepare: Prepare
) -> None:
    insert(items, 1)
    moment = note(installed)
    insert(items, 2)
    ran(prepare, items)
    with Connection(installed, purpose="test") as session:
        position = outbox.position_at(session, moment)
        fetch(items, "select cdc.rotate('0 s')")
        insert(items, 3)
        note(installed)
        assert "truncated" in value(items, "select cdc.rotate('0 s')")
        before = value(items, "select snap_lo::text from cdc.position")
        with pytest.raises(DatabaseError, match="has not everything since then any more"):
            outbox.rewind(session, "audit", position, None, patience=1.0)
    assert value(items, "select snap_lo::text from cdc.position") == before
    with Connection(installed, purpose="test") as session:
        outbox.rewind(session, "audit", outbox.EARLIEST, None, patience=1.0)
    assert keys(ran(prepare, items).sink.delivered) == [3]


def test_forward_is_now_alone_and_says_what_it_leaves_out(
    items: connection, installed: str, prepare: Prepare, cdc: Command
) -> None:
    insert(items, 1)
    ran(prepare, items)
    insert(items, 2, 3)
    moment = note(installed)
    said = cdc("sinks", "rewind", "audit", "--to", moment.isoformat(), code=1).stderr
    assert "has not come that far" in said
    assert (
        "2 events not delivered would be left out" in cdc("sinks", "rewind", "audit", "--to", "now", "--dry-run").output
    )
    assert "2 events not delivered are left out" in cdc("sinks", "rewind", "audit", "--to", "now").output
    insert(items, 4)
    assert keys(ran(prepare, items).sink.delivered) == [4]


def test_one_table_comes_again_alone_and_in_order_with_what_follows(
    other: connection, prepare: Prepare, cdc: Command
) -> None:
    insert(other, 1)
    fetch(other, "insert into other values (1), (2)")
    fetch(other, "update item set v = 'b'")
    ran(prepare, other)
    said = cdc("sinks", "rewind", "audit", "--to", "earliest", "--table", "public.item", "--dry-run").output
    assert "public.item: 2" in said
    assert "2 events would come" in said
    cdc("sinks", "rewind", "audit", "--to", "earliest", "--table", "public.item")
    # Not delivered yet when it was rewound.
    fetch(other, "insert into other values (3); update item set v = 'c'")
    run = ran(prepare, other)
    seen = [(event.source.table, event.op.value) for event in run.sink.delivered]
    assert seen == [("item", "insert"), ("item", "update"), ("other", "insert"), ("item", "update")]
    assert run.pipeline.filtered == 2
    # And another, before all of the first was through.
    cdc("sinks", "rewind", "audit", "--to", "earliest", "--table", "public.item")
    cdc("sinks", "rewind", "audit", "--to", "earliest", "--table", "public.other")
    assert len(ran(prepare, other).sink.delivered) == 6
    # The whole sink forgets what was said of tables.
    cdc("sinks", "rewind", "audit", "--to", "earliest", "--table", "public.item")
    cdc("sinks", "rewind", "audit", "--to", "earliest")
    assert len(ran(prepare, other).sink.delivered) == 6
    assert fetch(other, "select skip_shown, skip_but from cdc.sink") == [(None, None)]


def test_a_table_cannot_go_ahead_of_the_others(other: connection, prepare: Prepare, cdc: Command) -> None:
    ran(prepare, other)
    insert(other, 1)
    said = cdc("sinks", "rewind", "audit", "--to", "now", "--table", "public.item", code=1).stderr
    assert "cannot go ahead of the others" in said
    said = cdc("sinks", "rewind", "audit", "--to", "earliest", "--table", "public.nothing", code=1).stderr
    assert "no captured table is public.nothing" in said


def test_dead_letters_that_are_replayed_meanwhile_are_not_skipped(
    other: connection, prepare: Prepare, cdc: Command
) -> None:
    fetch(other, "insert into other values (1)")
    run = prepare()

    def refuse(batch: list[Event]) -> None:
        raise PermanentFailure("never")

    run.sink.script = refuse
    run.start()
    wait_for(lambda: value(other, "select count(*) from cdc.dead_letter") == 1 and caught_up(other))
    run.end()
    cdc("sinks", "rewind", "audit", "--to", "earliest", "--table", "public.item")
    fetch(other, "update cdc.dead_letter set wanted = true")
    again = ran(prepare, other)
    assert [event.source.table for event in again.sink.delivered] == ["other"]
    assert value(other, "select count(*) from cdc.dead_letter") == 0


def test_a_daemon_that_serves_the_sink_begins_anew_at_once(items: connection, prepare: Prepare, cdc: Command) -> None:
    insert(items, 1, 2)
    run = prepare().start()
    wait_for(lambda: caught_up(items) and run.sink.delivered)
    epoch = value(items, "select epoch from cdc.sink")
    said = cdc("sinks", "rewind", "audit", "--to", "earliest").output
    assert "in hand" not in said
    assert "no daemon" not in said
    wait_for(lambda: len(run.sink.delivered) == 4)
    insert(items, 3)
    wait_for(lambda: caught_up(items) and len(run.sink.delivered) == 5)
    run.end()
    assert keys(run.sink.delivered) == [1, 2, 1, 2, 3]
    assert value(items, "select epoch from cdc.sink") == epoch + 2


def test_nobody_takes_the_sink_while_the_one_before_has_a_batch_in_hand(
    items: connection, prepare: Prepare, cdc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(items, 1)
    gate, held = threading.Event(), threading.Event()
    run = prepare(owner="first")

    def hold(batch: list[Event]) -> None:
        held.set()
        assert gate.wait(20)

    run.sink.script = hold
    run.start()
    assert held.wait(10)
    standby = prepare(owner="second").start()
    done: list[Result] = []
    rewinding = threading.Thread(target=lambda: done.append(cdc("sinks", "rewind", "audit", "--to", "earliest")))
    rewinding.start()
    wait_for(lambda: value(items, "select epoch from cdc.sink") == 2)
    assert standby.sink.attempts == []
    gate.set()
    rewinding.join()
    wait_for(lambda: caught_up(items))
    run.end()
    standby.end()
    assert "in hand" not in done[0].output
    assert keys(run.sink.delivered + standby.sink.delivered) == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("nobody", "--to", "now"), 78, "no sink nobody in the configuration"),
        (("audit", "--to", "yesterday"), 2, "not a position"),
        (("audit",), 2, "Missing option '--to'"),
        (("audit", "--to", "2099-01-01"), 1, "yet to come"),
        (("audit", "--to", "9999-12-31T23:59:59-10:00"), 2, "not a position"),
        (("audit", "--to", "0001-01-01T00:00:00+10:00"), 2, "not a position"),
        (("audit", "--to", "earliest", "--table", "orders"), 2, "a table without a schema (write public.orders)"),
        (("audit", "--to", "now", "-d", "nowhere"), 78, "no database nowhere"),
        (("audit", "--to", "now"), 1, "has no position yet (run cdc migrate)"),
    ],
)
def test_what_cannot_be_meant_is_said_with_its_cure(
    items: connection, cdc: Command, arguments: tuple[str, ...], code: int, said: str
) -> None:
    assert said in cdc("sinks", "rewind", *arguments, code=code).stderr


def test_moments_of_another_cluster_are_none(items: connection, installed: str) -> None:
    fetch(items, "update cdc.moment set system_identifier = system_identifier + 1")
    with Connection(installed, purpose="test") as session, pytest.raises(CdcError, match="earliest"):
        outbox.position_at(session, datetime.now(UTC))
