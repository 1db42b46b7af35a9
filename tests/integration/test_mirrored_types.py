"""A value of every type goes through an event into another database, and is there what it was here.

The table of values is that of test_types.py. Each goes the whole way: written by a session with odd settings, captured,
read from the book, delivered by the ``postgres`` sink into a table of the same shape, in a database whose own settings
are odd, too; the two rows are then compared as text.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import psycopg2
import pytest
from psycopg2 import sql
from pydantic import SecretStr
from sql import fetch
from test_types import CONTRACT_SETTINGS, GOLDEN, SETUP, Golden, Lab

from cdc.event import Event
from cdc.sinks.postgres import PostgresOptions, PostgresSink

if TYPE_CHECKING:
    from conftest import Server

ROWS = [row for rows in GOLDEN.values() for row in rows]
ODD_DATABASE = """
    alter database {name} set timezone = 'America/St_Johns';
    alter database {name} set datestyle = 'German';
    alter database {name} set intervalstyle = 'sql_standard';
    alter database {name} set bytea_output = 'escape';
    alter database {name} set xmloption = 'document';
"""
LOST = ("[0:2]=", "[-1:0]")
"""Lower bounds of arrays: an event does not tell them. Nor does it tell the null of json from that of SQL."""


class Bench:
    """The laboratory, a database beside it, and a sink between the two."""

    def __init__(self, server: Server, template: str) -> None:
        self.lab = Lab(server, template)
        self._server = server
        self._name = f"test_{uuid.uuid4().hex[:12]}"
        dsn = server.create_database(self._name)
        self.target = psycopg2.connect(dsn)
        self.target.autocommit = True
        for extension in {"citext", "hstore"} - self.lab.lacking:
            fetch(self.target, f"create extension {extension}")
        fetch(self.target, SETUP)
        fetch(self.target, sql.SQL(ODD_DATABASE).format(name=sql.Identifier(self._name)))
        fetch(self.target, CONTRACT_SETTINGS)
        self.sink = PostgresSink("mirror", PostgresOptions(type="postgres", dsn=SecretStr(dsn)))
        self.sink.open()
        self._tables: dict[str, str] = {}

    def table(self, type_: str) -> str:
        """A table with a column v of a type, on both sides."""
        if type_ not in self._tables:
            columns = f"id integer primary key, v {type_}, other integer"
            self._tables[type_] = self.lab.table(columns)
            # The names of types are to be understood as at the source.
            fetch(self.target, "set search_path = public, pg_temp")
            fetch(self.target, f"create table {self._tables[type_]} ({columns})")
            fetch(self.target, CONTRACT_SETTINGS)
        return self._tables[type_]

    def deliver(self) -> None:
        """Deliver what was written, as a pipeline does."""
        acked: int | None = None
        while batch := self.lab._outbox.next_batch(acked, events=500, bytes_=1 << 24):
            self.sink.deliver([event for event in batch.events if isinstance(event, Event)])
            acked = batch.last_seq

    def compare(self, table: str) -> list[str]:
        """Deliver what was written, and see that both tables are the same; returns their rows as text."""
        self.deliver()
        rows = f"select coalesce(array_agg(t::text order by t::text), '{{}}') from {table} t"
        ((here,),) = [self.lab.seen(rows)]
        ((there,),) = fetch(self.target, rows)
        assert there == here
        found: list[str] = here
        return found

    def close(self) -> None:
        self.sink.close()
        self.target.close()
        self.lab.close()
        self._server.drop_database(self._name)


@pytest.fixture(scope="module")
def bench(server: Server, template: str) -> Iterator[Bench]:
    with closing(Bench(server, template)) as made:
        yield made


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.type} {row.written[:30]}" for row in ROWS])
def test_a_value_is_mirrored_exactly(bench: Bench, row: Golden) -> None:
    lab = bench.lab
    if lab.version < row.since:
        pytest.skip(f"PostgreSQL {row.since} and later")
    if row.needs in lab.lacking:
        pytest.skip(f"this server has no {row.needs}")
    table, value = bench.table(row.type), f"cast({row.written} as {row.type})"
    lab.events()
    lab.run(f"insert into {table} values (1, {value}, 0)")
    if any(bounds in row.written for bounds in LOST) or (row.type.startswith("json") and "null" in row.event):
        bench.deliver()
        shown = f"select to_json(v)::text from {table}"
        ((there,),) = fetch(bench.target, shown.replace("to_json(v)::text", "coalesce(to_json(v)::text, 'null')"))
        assert there == row.event
    else:
        assert bench.compare(table) != []
        lab.run(f"update {table} set other = 1; update {table} set v = null")
        bench.compare(table)
        lab.run(f"update {table} set v = {value}; insert into {table} select 2, v, 1 from {table}")
        assert len(bench.compare(table)) == 2
    lab.run(f"delete from {table}")
    assert bench.compare(table) == []
