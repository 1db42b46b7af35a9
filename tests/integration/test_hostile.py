"""Somebody with a login and a schema of his own in the captured database, who would like to have more than that."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg2
import pytest
from psycopg2.extensions import connection
from sql import fetch, value

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
