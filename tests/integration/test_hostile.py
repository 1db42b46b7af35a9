"""Somebody with a login and a schema of his own in the captured database, who would like to have more than that."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg2
import pytest
from psycopg2.extensions import connection
from scripted import Run, wait_for
from sql import fetch, value

from cdc import backfill, outbox
from cdc.connection import Connection
from cdc.event import Event, Op
from cdc.outbox import Outbox, Owner

Connect = Callable[..., connection]

SPY = """
    create type lair.mood as enum ('calm', 'sly');
    create table lair.tried (what text, by_whom text, outcome text);
    grant insert on lair.tried to public;
    create function lair.spy(lair.mood) returns json language plpgsql as $spy$
    declare
      attempt text;
    begin
      foreach attempt in array array[
        'insert into cdc.event_0 (seq, txid, captured_at, captured_table, op) values (1, ''1'', now(), 1, ''i'')',
        'select nextval(''cdc.event_seq'')',
        'select * from cdc.event',
        'select * from cdc.secret',
        'select * from cdc.captured_table',
        'select cdc.hash(''1'')',
        'update cdc.installation set database_name = ''mine''',
        'select * from public.orders']
      loop
        begin
          execute attempt;
          raise exception 'it worked: %', attempt using errcode = 'P0099';
        exception
          when insufficient_privilege then null;
        end;
      end loop;
      return to_json(current_user::text);
    end
    $spy$;
    create cast (lair.mood as json) with function lair.spy(lair.mood);
    create table lair.bait (id int primary key, mood lair.mood)
"""


@pytest.fixture
def owner(installed: str, connect: Connect) -> connection:
    """Who migrates, and owns the captured table public.orders."""
    conn = connect(installed)
    fetch(conn, "create table orders (id int primary key, v text)")
    fetch(conn, "select cdc.enable_capture('orders')")
    return conn


@pytest.fixture
def mallory(installed: str, owner: connection, connect: Connect) -> Iterator[connection]:
    """A role without any right but its own schema."""
    role = f"mallory_{installed.rpartition('dbname=test_')[2][:8]}"
    fetch(
        owner,
        f"create role {role} login; create schema lair authorization {role}; grant usage on schema lair to public",
    )
    conn = connect(installed)
    fetch(conn, f"set session authorization {role}")
    yield conn
    conn.close()
    fetch(owner, f"drop owned by {role} cascade; drop role {role}")


def refused(conn: connection, statement: str) -> None:
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        fetch(conn, statement)


def test_his_cast_runs_as_nobody_and_may_do_nothing(owner: connection, mallory: connection) -> None:
    fetch(mallory, SPY)
    fetch(owner, "select cdc.enable_capture('lair.bait')")
    before = value(owner, "select last_value from cdc.event_seq")
    fetch(mallory, "insert into lair.bait values (1, 'sly')")
    ((row, op),) = fetch(owner, "select new_row::text, op from cdc.event")
    assert (row, op) == ('{"id":1,"mood":"cdc_nobody"}', "i"), "an attempt worked, or the cast did not run"
    assert value(owner, "select last_value from cdc.event_seq") - before <= 1


def test_nor_does_it_by_way_of_the_key_of_a_row_that_is_too_large(owner: connection, mallory: connection) -> None:
    fetch(mallory, SPY + "; alter table lair.bait drop constraint bait_pkey, add primary key (mood), add big text")
    fetch(owner, "select cdc.enable_capture('lair.bait')")
    small = value(owner, "select pg_get_functiondef('cdc.capture()'::regprocedure)")
    fetch(owner, small.replace("256 * 1024 * 1024", "10000"))
    fetch(mallory, "insert into lair.bait values (1, 'sly', repeat('x', 20000))")
    assert value(owner, "select new_row::text from cdc.event") == '{"mood" : "cdc_nobody"}'


TRAP = """
    grant usage on schema lair to public;
    create type lair.mood as enum ('calm', 'sly');
    create table lair.caught (by_whom text);
    grant insert on lair.caught to public;
    create function lair.note() returns void language sql as 'insert into lair.caught values (current_user)';
    create function lair.clock_timestamp() returns timestamptz language plpgsql as
      $$ begin perform lair.note(); return pg_catalog.clock_timestamp(); end $$;
    create function lair.octet_length(text) returns integer language plpgsql as
      $$ begin perform lair.note(); return pg_catalog.octet_length($1); end $$;
    create function lair.lower(text) returns text language plpgsql as
      $$ begin perform lair.note(); return pg_catalog.lower($1); end $$;
    create function lair.led() returns void language plpgsql as $$ begin
      perform pg_catalog.set_config(name, setting, false) from lair.settings;
    end $$;
    create function lair.trap(lair.mood) returns json language plpgsql as
      $$ begin perform lair.led(); return pg_catalog.to_json($1::text); end $$;
    create function lair.yes() returns boolean language plpgsql as
      $$ begin perform lair.led(); return true; end $$;
    create table lair.settings (name text, setting text);
    insert into lair.settings values ('search_path', 'lair, pg_catalog');
    grant select on lair.settings to public;
    create cast (lair.mood as json) with function lair.trap(lair.mood);
    create table lair.bait (id int primary key, mood lair.mood)
"""
"""Code of his that leads the session to more of it: functions of the names that our own call next."""
SETTINGS = """
    select nullif(current_setting('cdc.window', true), ''), current_setting('client_encoding'),
           current_setting('search_path'), current_setting('default_transaction_read_only')
"""


def test_his_cast_does_not_lead_the_trigger_to_his_functions(owner: connection, mallory: connection) -> None:
    fetch(mallory, TRAP)
    fetch(owner, "select cdc.enable_capture('lair.bait')")
    fetch(mallory, "insert into lair.bait values (1, 'sly')")
    assert fetch(owner, "select op, new_row::text from cdc.event") == [("I", '{"id" : 1}')]
    fetch(mallory, "alter table lair.bait drop constraint bait_pkey, add primary key (mood)")
    fetch(owner, "select cdc.enable_capture('lair.bait')")
    fetch(mallory, "delete from lair.bait")
    assert fetch(owner, "select op, new_row from cdc.event order by seq desc limit 1") == [("D", None)]
    assert fetch(owner, "select * from lair.caught") == []


def test_nor_a_backfill_nor_the_session_that_reads_it(
    owner: connection, mallory: connection, installed: str, prepare: Callable[..., Run]
) -> None:
    fetch(mallory, TRAP)
    fetch(mallory, "insert into lair.bait values (1, 'sly'), (2, 'calm')")
    fetch(owner, "select cdc.enable_capture('lair.bait')")
    with Connection(installed, purpose="test") as reader:
        outbox.register_sink(reader, "audit", start="now")
        (bait,) = (found for found in backfill.candidates(reader) if found.table == "bait")
        backfill.start(reader, "audit", bait, rows=1, rate=None, condition=None)
    run = prepare(start="now").start()
    wait_for(lambda: value(owner, "select state from cdc.backfill") == "done")
    run.end()
    assert [(event.key, event.truncated) for event in run.sink.delivered] == [({"id": 1}, True), ({"id": 2}, True)]
    assert fetch(owner, "select * from lair.caught") == []


@pytest.mark.parametrize("led_by", ["cast", "condition"])
def test_what_his_code_sets_in_the_session_of_a_backfill_is_taken_back(
    owner: connection, mallory: connection, installed: str, led_by: str
) -> None:
    """Settings in which the session keeps how far it has come, or that change what it says."""
    fetch(mallory, TRAP)
    fetch(mallory, "update lair.settings set name = 'cdc.window', setting = 'forged'")
    fetch(
        mallory,
        "insert into lair.settings values ('client_encoding', 'LATIN1'), ('default_transaction_read_only', 'on')",
    )
    fetch(mallory, "insert into lair.bait values (1, 'sly')")
    if led_by == "condition":
        fetch(mallory, "drop cast (lair.mood as json); create cast (lair.mood as json) with inout")
    condition = "{}" if led_by == "cast" else """{"insert": "lair.yes()"}"""
    fetch(owner, f"select cdc.enable_capture('lair.bait', conditions => '{condition}')")
    with Connection(installed, purpose="test") as reader:
        outbox.register_sink(reader, "audit", start="now")
        (bait,) = (found for found in backfill.candidates(reader) if found.table == "bait")
        backfill.start(reader, "audit", bait, rows=10, rate=None, condition=None)
        book = Outbox(reader, database="shop", sink="audit", owner=Owner("test", 1))
        book.claim(start="now")
        rows = backfill.Backfills(reader, book, sink="audit", wants=lambda *table: True, fields=lambda **fields: fields)
        rows.look()
        before = reader.query(SETTINGS)
        batch = rows.next_batch(None, events=100, bytes_=1 << 20)
        assert batch is not None
        assert [event.op for event in batch.rows if isinstance(event, Event)] == [Op.READ]
        assert reader.query(SETTINGS) == before


def test_he_cannot_attach_the_trigger_to_a_table_of_his_own(mallory: connection) -> None:
    fetch(mallory, "create table lair.own (id int)")
    refused(mallory, "create trigger t after insert on lair.own for each row execute function cdc.capture('1')")


@pytest.mark.parametrize(
    "statement",
    [
        "select * from cdc.event",
        "select * from cdc.event_0",
        "select * from cdc.sink",
        "select * from cdc.position",
        "select * from cdc.dead_letter",
        "select * from cdc.secret",
        "insert into cdc.event_0 (seq) values (1)",
        "truncate cdc.event_0",
        "select nextval('cdc.event_seq')",
        "select cdc.rotate('0 s')",
        "select cdc.rebase()",
        "select cdc.image(1)",
        "select cdc.enable_capture('lair.own')",
        "set role cdc_capture",
        "set role cdc_nobody",
        "set role cdc_reader",
    ],
)
def test_nothing_of_schema_cdc_is_his(owner: connection, mallory: connection, statement: str) -> None:
    fetch(mallory, "create table lair.own (id int)")
    refused(mallory, statement)


def test_what_he_puts_before_our_names_is_not_used(owner: connection, mallory: connection) -> None:
    role = value(mallory, "select current_user")
    fetch(owner, f"grant insert on orders to {role}")
    fetch(
        mallory,
        """create temp table event_0 (like pg_class); create temp table event (x int);
           create temp table captured_table (x int);
           create function pg_temp.to_json(anyelement) returns json language sql as $$ select '{}'::json $$;
           create function pg_temp.nextval(regclass) returns bigint language sql as $$ select 1::bigint $$;
           create function lair.octet_length(text) returns int language sql as $$ select 1 $$;
           set search_path = pg_temp, lair, public, pg_catalog""",
    )
    fetch(mallory, "insert into public.orders values (1, 'true')")
    assert value(owner, "select new_row::text from cdc.event") == '{"id":1,"v":"true"}'


@pytest.mark.parametrize("path", ['"$user", public', "public, pg_catalog"])
def test_functions_of_his_in_public_are_not_called_by_our_sessions(
    owner: connection, mallory: connection, installed: str, path: str
) -> None:
    """Up to PostgreSQL 14 everybody may put them there, with PostgreSQL's names and fitting better what we call."""
    role, database = value(mallory, "select current_user"), value(owner, "select current_database()")
    fetch(owner, f"grant create on schema public to {role}; alter database {database} set search_path = {path}")
    fetch(mallory, "create table lair.caught (by_whom text); grant usage on schema lair to public")
    fetch(mallory, "grant insert on lair.caught to public")
    for name, result in (("make_interval(secs numeric)", "interval"), ("count(text)", "bigint")):
        fetch(
            mallory,
            f"create function public.{name} returns {result} language plpgsql as $$ begin"
            " insert into lair.caught values (current_user); return null; end $$",
        )
    with Connection(installed, purpose="audit") as session:
        book = Outbox(session, database="shop", sink="audit", owner=Owner("test", 1))
        assert book.claim(start="earliest")
        outbox.rotate(session, 60.0)
        assert outbox.pulse(session)
    assert fetch(owner, "select * from lair.caught") == []


def test_what_he_sets_for_his_session_does_not_show(owner: connection, mallory: connection) -> None:
    fetch(
        owner,
        f"grant insert on orders to {value(mallory, 'select current_user')}; alter table orders add at timestamptz",
    )
    fetch(
        mallory,
        """set timezone = 'Asia/Kolkata'; set datestyle = 'German'; set cdc.rung = 'x'; set row_security = off;
           set cdc.context = '{"actor": "somebody else"'""",
    )
    fetch(mallory, "insert into orders values (1, 'v', '2026-01-02 03:04:05+00')")
    ((row, context),) = fetch(owner, "select new_row::text, context from cdc.event")
    assert row == '{"id":1,"v":"v","at":"2026-01-02T03:04:05+00:00"}'
    assert context == '{"actor": "somebody else"'  # what it says is the writer's business; it travels as a string
