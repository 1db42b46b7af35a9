"""A table of events in a PostgreSQL of its own, as a destination under test."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import ClassVar

import psutil
from cluster import Cluster
from rig import Received, Rig

from cdc.event import quote

# Beside the columns the sink writes there is one that tells the order of arrival, and what some rows are refused by.
_SETUP = """
    create table public.cdc_event (
      id text primary key, op text not null, database text not null, schema_name text not null,
      table_name text not null, seq bigint not null, txid bigint not null, ts timestamptz not null,
      key json, before json, after json, changed text[], context json, truncated boolean not null,
      arrived bigint generated always as identity,
      check (octet_length(after::text) < {limit}));
    create table refused (key text);
    create function refuse() returns trigger language plpgsql as $$
      begin
        if exists (select from refused r where r.key = new.key::text) then
          raise exception 'not now' using errcode = '55P03';
        end if;
        return new;
      end $$;
    create trigger refuse before insert on public.cdc_event for each row execute function refuse();
    create role locked login password 'right';
"""
_RECEIVED = """
    select id, op, database, schema_name, table_name, seq, txid,
           to_char(ts at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
           coalesce(key::text, 'null'), coalesce(before::text, 'null'), coalesce(after::text, 'null'), changed,
           coalesce(context::text, 'null')
      from public.cdc_event order by arrived
"""
_LIMIT = 1_000_000


class PostgresRig(Rig):
    """Mode append; mode mirror has tests of its own, test_postgres.py."""

    kind: ClassVar[str] = "postgres"
    deduplicates: ClassVar[bool] = True

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._running = contextlib.ExitStack()
        self._cluster = self._running.enter_context(Cluster({"max_connections": "30"}))
        self._cluster.query(_SETUP.format(limit=_LIMIT))
        rules = self._cluster.directory / "data" / "pg_hba.conf"
        rules.write_text(f"host all locked 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
        self._cluster.query("select pg_reload_conf()")
        self._frozen: list[int] = []
        self._seen: list[Received] = []

    def configuration(self) -> dict[str, object]:
        dsn = f"postgresql://postgres:unused@127.0.0.1:{self._cluster.port}/postgres"
        return {"type": "postgres", "dsn": dsn, "mode": "append", "timeout": "2s"}

    def received(self) -> list[Received]:
        if self._cluster.running and not self._frozen:
            self._seen = [Received(row[0], _body(*row)) for row in self._cluster.query(_RECEIVED)]
        return self._seen

    def close(self) -> None:
        self._running.close()

    def stop(self) -> None:
        self._cluster.kill()

    def start(self) -> None:
        self._cluster.start()

    def stall(self) -> None:
        pid = self._cluster.pid
        self._frozen = [child.pid for child in psutil.Process(pid).children()]
        for each in self._frozen:
            self._cluster.freeze(each)
        psutil.Process(pid).suspend()

    def resume(self) -> None:
        psutil.Process(self._cluster.pid).resume()
        for each in self._frozen:
            self._cluster.thaw(each)
        self._frozen = []

    def forbidden(self) -> dict[str, object]:
        dsn = f"postgresql://locked:wr0ng-one@127.0.0.1:{self._cluster.port}/postgres"
        return {**self.configuration(), "dsn": dsn}

    def limit(self) -> int:
        return _LIMIT

    def refuse(self, key: int | None) -> None:
        self._cluster.query(
            "delete from refused" if key is None else f"insert into refused values ('{{\"id\":{key}}}')"
        )


def _body(*row: object) -> str:
    """The event, made of the columns of its row."""
    id_, op, database, schema, table, seq, txid, ts, key, before, after, changed, context = row
    assert isinstance(changed, list | None)
    names = "null" if changed is None else "[" + ",".join(map(quote, changed)) + "]"
    return (
        f'{{"version":1,"id":{quote(str(id_))},"op":"{op}","source":{{"database":{quote(str(database))},'
        f'"schema":{quote(str(schema))},"table":{quote(str(table))},"seq":{seq},"txid":{txid},"ts":"{ts}"}},'
        f'"key":{key},"before":{before},"after":{after},"changed":{names},"context":{context}}}'
    )
