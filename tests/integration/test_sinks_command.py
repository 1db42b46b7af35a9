"""`cdc sinks forget`: a position nobody needs any more is removed, and nothing that somebody may still want."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from psycopg2.extensions import connection
from sql import fetch, value

from cdc.cli import main
from cdc.connection import Connection
from cdc.outbox import Outbox, Owner

Connect = Callable[..., connection]


@pytest.fixture
def look(installed: str, connect: Connect) -> connection:
    """The database, with the position of a sink `old` that the configuration does not have."""
    conn = connect(installed)
    fetch(conn, "create table item (id int primary key); select cdc.enable_capture('item')")
    with Connection(installed, purpose="test") as session:
        Outbox(session, database="shop", sink="old", owner=Owner("db1:4711", 4711)).claim(start="now")
    fetch(conn, "insert into item values (1), (2)")
    return conn


@pytest.fixture
def forget(installed: str, tmp_path: Path) -> Callable[..., Result]:
    content = {
        "databases": {
            "shop": {"dsn": installed, "tables": {"public.item": {}}},
            "away": {"dsn": "host=127.0.0.1 port=1", "tables": {"public.item": {}}},
        },
        "sinks": {"audit": {"type": "stdout"}},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(content))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["-c", str(tmp_path / "config.yaml"), "sinks", "forget", *arguments])

    return run


def test_the_position_is_removed_and_what_it_held_is_told(look: connection, forget: Callable[..., Result]) -> None:
    done = forget("old", "-d", "shop")
    assert (done.exit_code, done.stdout) == (0, "shop: sink old is forgotten, with 2 pending events\n")
    assert value(look, "select count(*) from cdc.sink where name = 'old'") == 0


def test_a_sink_that_is_configured_is_kept(look: connection, forget: Callable[..., Result]) -> None:
    done = forget("audit")
    assert done.exit_code == 78
    assert "audit is in the configuration" in done.stderr


def test_a_sink_that_is_served_is_kept_and_its_daemon_named(
    look: connection, forget: Callable[..., Result], installed: str
) -> None:
    with Connection(installed, purpose="test") as session:
        Outbox(session, database="shop", sink="old", owner=Owner("db1:4711", 4711)).claim(start="now")
        done = forget("old", "-d", "shop")
    assert done.exit_code == 1
    assert "served by db1:4711" in done.stderr
    assert value(look, "select count(*) from cdc.sink where name = 'old'") == 1


def test_dead_letters_are_not_discarded_unasked(look: connection, forget: Callable[..., Result]) -> None:
    fetch(look, "insert into cdc.dead_letter (sink, event_id, event, reason) values ('old', 'x', '{}', 'no')")
    done = forget("old", "-d", "shop")
    assert done.exit_code == 1
    assert "1 dead letters (--dead-letters discards them)" in done.stderr
    assert forget("old", "-d", "shop", "--dead-letters").exit_code == 0
    assert value(look, "select count(*) from cdc.dead_letter") == 0


def test_a_sink_nobody_knows_is_an_error(look: connection, forget: Callable[..., Result]) -> None:
    done = forget("nobody", "-d", "shop")
    assert done.exit_code == 1
    assert "no database has a position of sink nobody" in done.stderr


def test_a_database_that_cannot_be_reached_does_not_stop_the_others(
    look: connection, forget: Callable[..., Result]
) -> None:
    done = forget("old")
    assert done.exit_code == 69
    assert "error: away: cannot connect" in done.stderr
    assert "shop: sink old is forgotten" in done.stdout
