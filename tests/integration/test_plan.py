"""`cdc migrate --plan` and `--sql`: what migrating would do, told without doing it, and what it does then.

The plan has to say what `cdc migrate` says afterwards, and the lock it names has to be the one that is taken. The
script, run by psycopg2 or psql, has to leave what `cdc migrate` leaves.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from alembic import command
from click.testing import CliRunner, Result
from harness import until
from psycopg2 import errors
from psycopg2.extensions import connection, make_dsn, parse_dsn
from sql import fetch
from test_installer import KINDS, ODD, TABLES, Shop
from test_migrations import alembic_in_process, describe

from cdc import installer, inventory, planner
from cdc.cli import main
from cdc.config import DatabaseConfig
from cdc.connection import Connection
from cdc.errors import DatabaseUnreachable, InstallError
from cdc.installer import Holder
from cdc.options import split

if TYPE_CHECKING:
    from conftest import Server

Connect = Callable[..., connection]

UNREACHABLE = "host=127.0.0.1 port=1 dbname=shop user=cdc"
ORDERS: Mapping[str, Mapping[str, Any]] = {"public.orders": {}}
ADD, DROP = "SHARE ROW EXCLUSIVE", "ACCESS EXCLUSIVE"


@pytest.fixture
def fresh(database: str, connect: Connect, tmp_path: Path) -> Shop:
    """A database cdc has never seen."""
    cursor = connect(database).cursor()
    cursor.execute(TABLES)
    return Shop(database, cursor, tmp_path)


@pytest.fixture
def shop(installed: str, connect: Connect, tmp_path: Path) -> Shop:
    """A database with schema cdc and nothing captured."""
    cursor = connect(installed).cursor()
    cursor.execute(TABLES)
    return Shop(installed, cursor, tmp_path)


def cdc(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["-c", str(config), "migrate", *arguments])


def planned(config: Path) -> list[dict[str, Any]]:
    """The steps of a plan that succeeds."""
    result = cdc(config, "--plan", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["failed"] == {}
    return list(answer["changes"])


def migrated(config: Path) -> list[tuple[str, str]]:
    """What migrating changes."""
    result = cdc(config, "--json")
    assert result.exit_code == 0, result.output
    changes = [(change["subject"], change["change"]) for change in json.loads(result.stdout)["changes"]]
    return [change for change in changes if change[1] != "unchanged"]


# -- the plan ---------------------------------------------------------------------------------------------------


def test_the_plan_of_a_fresh_database_says_line_by_line_what_would_be_made(fresh: Shop) -> None:
    fresh.run("insert into orders select n, 'new' from generate_series(1, 1000) n")
    fresh.run("analyze orders")
    before = fresh.everything()
    result = cdc(fresh.configure({"public.orders": {}, "public.customers": {}}), "--plan")
    assert (result.exit_code, result.stderr) == (0, "")
    size = fresh.one("select pg_total_relation_size('orders') / 1024")
    assert result.stdout.splitlines() == [
        f"shop: schema cdc: revision none → {inventory.head()}",
        f"shop: public.customers: added ({ADD} on 16.0 KiB, rows never counted; nobody is in the way)",
        f"shop: public.orders: added ({ADD} on {size}.0 KiB, about 1000 rows; nobody is in the way)",
        "shop: sink audit: starts here",
    ]
    assert fresh.everything() == before


def test_where_nothing_would_change_the_plan_says_so(fresh: Shop) -> None:
    config = fresh.configure(ORDERS)
    assert cdc(config).exit_code == 0
    assert cdc(config, "--plan").stdout == "shop: nothing to do\n"
    assert planned(config) == []


ROWS = ["insert", "update", "delete"]
SITUATIONS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any], str, Mapping[str, str]]] = {
    "one more table": (ORDERS, {**ORDERS, "public.notes": {}}, "", {"public.notes": ADD}),
    "other options": (ORDERS, {"public.orders": {"image": "full", "always": True}}, "", {"public.orders": ADD}),
    "fewer ops": (ORDERS, {"public.orders": {"ops": ["insert", "truncate"]}}, "", {"public.orders": ADD}),
    "truncate no more": (ORDERS, {"public.orders": {"ops": ROWS}}, "", {"public.orders": DROP}),
    "truncate alone": (ORDERS, {"public.orders": {"ops": ["truncate"]}}, "", {"public.orders": DROP}),
    "a condition": (ORDERS, {"public.orders": {"when": {"insert": "NEW.id > 1"}}}, "", {"public.orders": ADD}),
    "conditions for all ops": (
        ORDERS,
        {"public.orders": {"ops": ["insert"], "when": {"insert": "NEW.id > 1"}}},
        "",
        {"public.orders": DROP},
    ),
    "no condition any more": (
        {"public.orders": {"when": {"insert": "NEW.id > 1"}}},
        ORDERS,
        "",
        {"public.orders": DROP},
    ),
    "a table less": ({**ORDERS, "public.notes": {}}, ORDERS, "", {"public.notes": DROP}),
    "a trigger switched off": (ORDERS, ORDERS, "alter table orders disable trigger all", {"public.orders": ADD}),
    "a trigger lost": (ORDERS, ORDERS, 'drop trigger "00_cdc_truncate" on orders', {"public.orders": ADD}),
    "all triggers lost": (ORDERS, ORDERS, "drop table orders; create table orders (id int)", {"public.orders": ADD}),
    "a hidden column": (ORDERS, {"public.orders": {"mask": {"status": "hash"}}}, "", {"public.orders": ADD}),
    "partitions": ({}, {"billing.archive": {}}, KINDS, {"billing.archive": ADD}),
    "partitions no more": ({"billing.archive": {}}, ORDERS, KINDS, {"public.orders": ADD, "billing.archive": DROP}),
}
"""What was configured, what becomes of it, what happens in between (KINDS: before), and the locks of the change."""


@pytest.fixture(params=SITUATIONS)
def situation(request: pytest.FixtureRequest, shop: Shop) -> tuple[Path, Mapping[str, Any], Mapping[str, str]]:
    was, becomes, happens, locks = SITUATIONS[request.param]
    if happens is KINDS:
        shop.run(KINDS)
    if was:
        shop.migrate(was, sinks={"audit": "now"})
    if happens and happens is not KINDS:
        shop.run(happens)
    return shop.configure(becomes), becomes, locks


def test_the_plan_says_what_migrating_then_does(
    shop: Shop, situation: tuple[Path, Mapping[str, Any], Mapping[str, str]]
) -> None:
    config, _, locks = situation
    before = shop.everything()
    steps = planned(config)
    assert shop.everything() == before
    assert {step["subject"]: step["lock"] for step in steps if step["lock"]} == locks
    assert [(step["subject"], step["change"]) for step in steps] == migrated(config)
    assert planned(config) == []


def test_the_lock_of_the_plan_is_the_lock_that_is_taken(
    shop: Shop, situation: tuple[Path, Mapping[str, Any], Mapping[str, str]], connect: Connect
) -> None:
    config, _, locks = situation
    text = cdc(config, "--sql").stdout
    session = connect(shop.dsn)
    fetch(session, text.removesuffix("commit;\n"))
    strongest = fetch(
        session,
        "select n.nspname || '.' || c.relname, l.mode from pg_locks l join pg_class c on c.oid = l.relation"
        " join pg_namespace n on n.oid = c.relnamespace"
        " where l.pid = pg_backend_pid() and n.nspname in ('public', 'billing') and c.relkind in ('r', 'p')"
        " and l.mode in ('ShareRowExclusiveLock', 'AccessExclusiveLock') order by l.mode desc",
    )
    taken = {table: {"ShareRowExclusiveLock": ADD, "AccessExclusiveLock": DROP}[mode] for table, mode in strongest}
    # That a partitioned table's lock is one of its partitions too is what the plan says of it.
    partitions = {f"billing.{name}" for name in ("archive_1", "archive_2", "archive_2_a")}
    assert {table: lock for table, lock in taken.items() if table not in partitions} == locks
    assert {lock for table, lock in taken.items() if table in partitions} <= {locks.get("billing.archive")}
    fetch(session, "rollback")


def test_new_sinks_and_a_new_name_and_a_grant_are_in_the_plan(shop: Shop) -> None:
    role = f"daemon_{shop.one('select current_database()')}"
    shop.run(f"create role {role} login")
    try:
        sinks = {
            "audit": {"type": "stdout"},
            "all": {"type": "file", "path": str(shop.directory / "x"), "start": "earliest"},
        }
        shop.run("update cdc.installation set database_name = 'boutique'")
        config = shop.configure(ORDERS, sinks=sinks, dsn=make_dsn(shop.dsn, user=role), migrate_dsn=shop.dsn)
        steps = [(step["subject"], step["change"]) for step in planned(config)]
        assert steps == [
            ("name in events", "boutique → shop"),
            ("public.orders", "added"),
            ("sink audit", "starts here"),
            ("sink all", "starts at the earliest event"),
            (f"role {role}", "granted cdc_reader"),
        ]
        assert migrated(config) == steps[1:]  # the name is changed without a word
        assert shop.one("select database_name from cdc.installation") == "shop"
        assert planned(config) == []
    finally:
        shop.run(f"drop role {role}")


@pytest.mark.parametrize("revision", ["0001", "0002"])
def test_an_older_revision_is_brought_up_and_its_triggers_are_compared_then(fresh: Shop, revision: str) -> None:
    alembic_in_process(fresh.dsn, command.upgrade, revision)
    fresh.run("select cdc.enable_capture('orders')")
    config = fresh.configure({**ORDERS, "public.notes": {}})
    before = fresh.everything()
    steps = [(step["subject"], step["change"], step["lock"]) for step in planned(config)]
    assert steps == [
        ("schema cdc", f"revision {revision} → {inventory.head()}", DROP),
        ("name in events", "none → shop", None),
        ("public.notes", "added", ADD),
        ("public.orders", f"compared at revision {inventory.head()}, and changed if need be", ADD),
        ("sink audit", "starts here", None),
    ]
    assert fresh.everything() == before
    assert ("public.notes", "added") in migrated(config)
    assert planned(config) == []


def test_a_schema_of_a_revision_unknown_here_is_refused_as_migrating_does(shop: Shop) -> None:
    shop.run("update cdc.alembic_version set version_num = '9999'")
    config = shop.configure(ORDERS)
    refusals = {cdc(config, *arguments).stderr for arguments in ((), ("--plan",))}
    (refusal,) = refusals
    assert "9999" in refusal
    assert cdc(config, "--sql").exit_code == 1


REFUSED: dict[str, Mapping[str, Any]] = {
    "a missing table": {"public.nothing": {}, "public.nowhere": {}},
    "a view": {"billing.recent": {}},
    "an unlogged table": {"billing.scratch": {}},
    "a foreign table": {"billing.remote": {}},
    "a partition": {"billing.archive_1": {}},
    "a needless key": {"public.orders": {"key": ["status"]}},
    "a key that is not there": {"public.notes": {"key": ["nr"]}},
    "a hidden column that is not there": {"public.notes": {"exclude": ["nr"]}},
    "a masked column that is not there": {"public.notes": {"mask": {"nr": "hash"}}},
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("where", ["fresh", "shop"])
def test_what_migrating_refuses_the_plan_refuses_too(request: pytest.FixtureRequest, where: str, case: str) -> None:
    shop: Shop = request.getfixturevalue(where)
    shop.run(KINDS)
    config = shop.configure(REFUSED[case])
    plan, migration = cdc(config, "--plan"), cdc(config)
    assert (plan.exit_code, plan.stdout, migration.exit_code) == (1, "", 1)
    # Before the first migration the reason is the catalogue's alone, and shorter.
    told = " ".join(plan.stderr.split()[:7])
    assert migration.stderr.startswith(told if where == "fresh" else plan.stderr)


def test_what_a_glob_covers_without_the_hidden_column_is_no_matter(fresh: Shop) -> None:
    fresh.run(KINDS)
    config = fresh.configure({"billing.*": {"exclude": ["note"]}})
    assert [step["subject"] for step in planned(config)][1:-1] == ["billing.archive", "billing.invoices"]
    assert cdc(config).exit_code == 0


# -- who is in the way ------------------------------------------------------------------------------------------


@pytest.fixture
def session(shop: Shop, connect: Connect) -> connection:
    """A session called nightly report, with a transaction to be."""
    return connect(make_dsn(shop.dsn, application_name="nightly report"), autocommit=False)


def in_the_way(config: Path) -> list[tuple[str, int, str]]:
    return [
        (step["subject"], holder["pid"], holder["application"])
        for step in planned(config)
        for holder in step.get("in_the_way", ())
    ]


def test_a_writer_is_in_the_way_of_a_new_trigger_and_a_reader_is_not(shop: Shop, session: connection) -> None:
    config = shop.configure({"public.orders": {}, "public.customers": {}})
    fetch(session, "select * from orders; select * from customers for update")
    assert in_the_way(config) == []
    fetch(session, "insert into orders values (1, 'new')")
    assert in_the_way(config) == [("public.orders", session.info.backend_pid, "nightly report")]


def test_a_reader_is_in_the_way_of_a_trigger_that_has_to_go(shop: Shop, session: connection) -> None:
    shop.migrate({"public.orders": {}, "public.customers": {}})
    config = shop.configure({"public.customers": {}})
    assert in_the_way(config) == []
    fetch(session, "select * from orders")
    assert in_the_way(config) == [("public.orders", session.info.backend_pid, "nightly report")]


def test_whoever_has_written_to_a_partition_is_in_the_way(shop: Shop, session: connection) -> None:
    shop.run(KINDS)
    fetch(session, "insert into billing.archive_2_a values (1, 2010)")
    config = shop.configure({"billing.archive": {}})
    assert in_the_way(config) == [("billing.archive", session.info.backend_pid, "nightly report")]
    (step,) = (step for step in planned(config) if step["subject"] == "billing.archive")
    assert step["partitions"] == 3


def test_what_to_expect_of_those_in_the_way_depends_on_how_old_they_are(
    shop: Shop, session: connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shop.configure(ORDERS)

    def wait() -> tuple[str, float | None]:
        step = planned(config)[0]
        return step["expected_wait"], max((holder["age_seconds"] for holder in step["in_the_way"]), default=None)

    assert wait() == ("none", None)
    fetch(session, "insert into orders values (1, 'new')")
    monkeypatch.setattr(installer, "LOCK_TIMEOUT", 600.0)
    assert wait()[0] == "moments"
    assert "a short wait for pid" in cdc(config, "--plan").stdout
    monkeypatch.setattr(installer, "LOCK_TIMEOUT", 0.2)
    until(lambda: (wait()[1] or 0) > 0.2, "the transaction is older than the patience")
    assert wait()[0] == "until they end"
    line = cdc(config, "--plan").stdout.splitlines()[0]
    assert f"waits for pid {session.info.backend_pid} (nightly report, idle in transaction, for " in line
    assert line.endswith(" s), 5 times 0.2 s at most)")


def test_a_transaction_whose_age_may_not_be_seen_is_named_without_it() -> None:
    assert str(Holder(7, None, "psql", "", None)) == "pid 7 (psql)"
    assert str(Holder(None, "x-1", "clerk", "", 3.0)) == "prepared transaction x-1 (clerk, for 3 s)"
    assert planner.Step("t", "added", ADD, None, [Holder(7, None, "psql", "", None)]).wait == "until they end"


@pytest.mark.parametrize("table", ["billing.invoices", "billing.archive_2_a", "billing.archive"])
def test_a_table_that_is_locked_altogether_does_not_stop_the_plan(shop: Shop, session: connection, table: str) -> None:
    shop.run(KINDS)
    fetch(session, f"lock table {table} in access exclusive mode")
    steps = {step["subject"]: step for step in planned(shop.configure({"billing.*": {}}))}
    locked = "billing.invoices" if table == "billing.invoices" else "billing.archive"
    assert steps[locked]["bytes"] is None
    assert [holder["pid"] for holder in steps[locked]["in_the_way"]] == [session.info.backend_pid]
    assert all(step["bytes"] is not None for name, step in steps.items() if name not in (locked, "sink audit"))


@pytest.mark.parametrize("where", ["fresh", "shop"])
def test_planning_writes_nothing_and_takes_the_weakest_locks_there_are(
    request: pytest.FixtureRequest, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop: Shop = request.getfixturevalue(where)
    shop.run(KINDS)
    modes: set[str] = set()

    class Watched(Connection):
        """Runs each statement in a transaction that may not write, and looks what it has locked."""

        def query(self, sql: str, *parameters: Any, **options: Any) -> list[tuple[Any, ...]]:
            super().query("begin read only")
            try:
                rows = super().query(sql, *parameters, **options)
                modes.update(row[0] for row in super().query("select mode from pg_locks where pid = pg_backend_pid()"))
            finally:
                fetch(self.raw, "rollback")
            return rows

    monkeypatch.setattr(planner, "Connection", Watched)
    options = DatabaseConfig.model_validate({"dsn": shop.dsn, "tables": {"*.*": {}}})
    arguments: dict[str, Any] = {"dsn": shop.dsn, "reader_dsn": shop.dsn, "sinks": {"audit": "now"}}
    assert planner.plan("shop", options, **arguments)
    assert planner.script("shop", options, **arguments)
    assert modes - {"ExclusiveLock"} == {"AccessShareLock"}  # exclusive: of its own transaction number


# -- several databases ------------------------------------------------------------------------------------------


def several(directory: Path, databases: Mapping[str, Mapping[str, Any]]) -> Path:
    path = directory / "several.yaml"
    path.write_text(json.dumps({"databases": databases, "sinks": {"audit": {"type": "stdout"}}}))
    return path


def test_a_database_that_fails_leaves_the_plans_of_the_others(shop: Shop) -> None:
    away = {"dsn": UNREACHABLE, "tables": ORDERS}
    wrong = {"dsn": shop.dsn, "tables": {"public.nothing": {}}}
    good = {"dsn": shop.dsn, "tables": ORDERS}
    config = several(shop.directory, {"wrong": wrong, "away": away, "shop": good})
    result = cdc(config, "--plan")
    assert result.exit_code == 1
    assert [line.split(" (")[0] for line in result.stdout.splitlines()] == [
        "shop: public.orders: added",
        "shop: sink audit: starts here",
    ]
    first, second, *table = result.stderr.splitlines()
    assert first == "error: wrong: public.nothing: no such table (correct `tables`, or create it first)"
    assert second.startswith("error: away: cannot connect: ")
    assert "databases.away.dsn" in second
    assert table == ["wrong  failed", "away   failed", "shop   planned"]
    failed = json.loads(cdc(config, "--plan", "--json").stdout)["failed"]
    assert set(failed) == {"wrong", "away"}


def test_when_only_the_way_there_fails_the_exit_code_says_so(shop: Shop) -> None:
    away = {"dsn": UNREACHABLE, "tables": ORDERS}
    config = several(shop.directory, {"away": away, "shop": {"dsn": shop.dsn, "tables": ORDERS}})
    assert cdc(config, "--plan").exit_code == 69
    assert cdc(config, "--sql", "-d", "away").exit_code == 69


def test_a_script_is_for_one_database_and_for_nothing_else(shop: Shop) -> None:
    options = {"dsn": shop.dsn, "tables": ORDERS}
    config = several(shop.directory, {"shop": options, "other": options})
    refusals = [cdc(config, *arguments) for arguments in (["--sql"], ["--sql", "--plan"], ["--sql", "--json"])]
    assert [(refusal.exit_code, refusal.stdout) for refusal in refusals] == [(2, "")] * 3
    assert "name it with -d" in refusals[0].stderr
    assert cdc(config, "--sql", "-d", "shop").exit_code == 0


# -- the script -------------------------------------------------------------------------------------------------


def by_psycopg2(dsn: str, text: str, connect: Connect) -> None:
    fetch(connect(dsn), text)


def by_psql(dsn: str, text: str, connect: Connect) -> None:
    done = psql(dsn, text, "-1", "-v", "ON_ERROR_STOP=1")
    assert done.returncode == 0, done.stderr


def psql(dsn: str, text: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("psql")
    if program is None:
        pytest.skip("there is no psql here")
    return subprocess.run(
        [program, "-X", "-q", *options, "-f", "-", "-d", make_dsn(**parse_dsn(dsn))],
        input=text,
        check=False,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        env=os.environ | environment,
    )


Run = Callable[[str, str, Connect], None]


def contents(shop: Shop) -> dict[str, object]:
    """What a migration writes into tables of its own, but for when and where."""
    found: dict[str, object] = {}
    for table in ("captured_table", "installation", "alembic_version", "sink", "position"):
        columns = {"sink": "name, epoch, state", "position": "sink, epoch, last_seq"}.get(table, "*")
        found[table] = shop.query(
            f"select (to_jsonb(t) - 'since' - 'relation')::text from (select {columns} from cdc.{table}) t order by 1"
        )
    return found


@pytest.fixture
def other(server: Server, database: str, connect: Connect, tmp_path: Path) -> Any:
    """A second database cdc has never seen."""
    name = f"{parse_dsn(database)['dbname']}_other"
    dsn = server.create_database(name)
    session = connect(dsn)
    fetch(session, TABLES)
    (tmp_path / "other").mkdir()
    yield Shop(dsn, session.cursor(), tmp_path / "other")
    server.drop_database(name)


TABLES_OF_A_SCRIPT = {
    "public.orders": {"when": {"update": "NEW.status <> '100%'"}, "mask": {"status": "hash"}},
    "public.customers": {"ops": ["insert"], "always": True, "exclude": ["name"]},
    "public.notes": {"key": ["code"], "image": "full", "delivery": "ephemeral"},
}


@pytest.mark.parametrize("run", [by_psycopg2, by_psql], ids=["psycopg2", "psql"])
@pytest.mark.parametrize("revision", ["base", "0001", "0002", "head"])
def test_the_script_does_what_migrating_does(
    fresh: Shop, other: Shop, connect: Connect, revision: str, run: Run
) -> None:
    for one in (fresh, other):
        if revision != "base":
            alembic_in_process(one.dsn, command.upgrade, revision)
            one.run("select cdc.enable_capture('orders')")
            one.run("create table gone (id integer); select cdc.enable_capture('gone')")
    config = fresh.configure(TABLES_OF_A_SCRIPT)
    before = fresh.everything()
    script = cdc(config, "--sql")
    assert (script.exit_code, script.stderr) == (0, "")
    assert fresh.everything() == before

    run(fresh.dsn, script.stdout, connect)
    assert cdc(other.configure(TABLES_OF_A_SCRIPT)).exit_code == 0
    assert describe(fresh.dsn) == describe(other.dsn)
    assert contents(fresh) == contents(other)
    assert fresh.query("select version_num from cdc.alembic_version") == [(inventory.head(),)]
    after = fresh.everything()
    assert cdc(config).stdout.splitlines() == [
        f"shop: public.{table}: unchanged" for table in ("customers", "notes", "orders")
    ]
    assert fresh.everything() == after


def test_the_script_after_the_schema_was_taken_down_makes_it_again(fresh: Shop, connect: Connect) -> None:
    alembic_in_process(fresh.dsn, command.upgrade, "head")
    alembic_in_process(fresh.dsn, command.downgrade, "base")
    config = fresh.configure(ORDERS)
    by_psycopg2(fresh.dsn, cdc(config, "--sql").stdout, connect)
    assert cdc(config).stdout == "shop: public.orders: unchanged\n"


@pytest.mark.parametrize("case", ODD)
def test_a_table_with_an_odd_name_gets_through_a_script(shop: Shop, connect: Connect, case: str) -> None:
    pattern = f"public.{ODD[case]}"
    name = split(pattern)[1]
    quoted = '"' + name.replace('"', '""') + '"'
    shop.cursor.execute(f"create table {quoted} ({quoted} integer)")
    channel = "a $grant$ \\ 'b' \"c\"; 100%"
    config = shop.configure({pattern: {"key": [name]}, "public.orders": {}}, channel=channel)
    by_psql(shop.dsn, cdc(config, "--sql").stdout, connect)
    assert migrated(config) == []
    assert shop.captured() == sorted([name, "orders"])
    by_psql(shop.dsn, cdc(shop.configure(ORDERS, channel=channel), "--sql").stdout, connect)
    assert shop.captured() == ["orders"]


@pytest.mark.parametrize("encoding", ["WIN1252", "LATIN1", "EUC_JP"])
def test_a_script_means_the_same_whatever_encoding_psql_is_set_to(shop: Shop, encoding: str) -> None:
    # A pattern may cover tables without the hidden column: a name that was misread would go by without a word.
    shop.run('create table "Aufträge €" (id integer primary key, "geheim für uns" text)')
    config = shop.configure({"public.*": {"exclude": ["geheim für uns"]}})
    text = cdc(config, "--sql").stdout
    done = psql(shop.dsn, text, "-1", "-v", "ON_ERROR_STOP=1", PGCLIENTENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert migrated(config) == []
    shop.run("""insert into "Aufträge €" values (1, 'canary')""")
    assert shop.one("select new_row::text from cdc.event") == '{"id":1}'


def test_the_daemons_role_is_granted_its_rights_by_the_script(shop: Shop, connect: Connect) -> None:
    role = f"the $grant$ 'daemon' {shop.one('select current_database()')}"
    shop.run(f'create role "{role}" login')
    try:
        # Whoever writes the script may be the daemon's role itself, and whoever runs it another one.
        config = shop.configure(ORDERS)
        options = DatabaseConfig.model_validate({"dsn": shop.dsn, "tables": ORDERS})
        reader = make_dsn(shop.dsn, user=role)
        text = planner.script("shop", options, dsn=shop.dsn, reader_dsn=reader, sinks={"audit": "now"})
        by_psql(shop.dsn, text, connect)
        assert shop.one("select pg_has_role(%s, 'cdc_reader', 'member')", role)
        assert planned(config) == []
        # Run by that role there is nothing to grant, and it is not even tried: it could not.
        shop.run(f'revoke cdc_reader from "{role}"')
        session = connect(reader)
        fetch(session, text[text.index("select set_config('cdc.daemon'") :].replace("commit;", ""))
    finally:
        shop.run(f'drop role "{role}"')


def test_a_script_is_not_run_twice_nor_where_it_was_not_written_for(fresh: Shop, connect: Connect) -> None:
    config = fresh.configure(ORDERS)
    text = cdc(config, "--sql").stdout
    by_psycopg2(fresh.dsn, text, connect)
    before = fresh.everything()
    with pytest.raises(errors.RaiseException, match=f"revision none .* is at {inventory.head()}"):
        by_psycopg2(fresh.dsn, text, connect)
    done = psql(fresh.dsn, text)
    assert "ERROR" in done.stderr
    assert fresh.everything() == before


def test_a_script_that_cannot_have_a_lock_changes_nothing_however_it_is_run(fresh: Shop, connect: Connect) -> None:
    session = connect(fresh.dsn, autocommit=False)
    fetch(session, "insert into orders values (1, 'new')")
    text = cdc(fresh.configure({"public.customers": {}, "public.orders": {}}), "--sql").stdout
    before = fresh.everything()
    with pytest.raises(errors.LockNotAvailable):
        by_psycopg2(fresh.dsn, text, connect)
    # Carelessly: neither in one transaction nor stopping at the first error.
    assert "lock timeout" in psql(fresh.dsn, text).stderr
    assert fresh.everything() == before
    session.rollback()
    by_psycopg2(fresh.dsn, text, connect)


def test_the_script_tells_a_reader_what_each_statement_is_for(shop: Shop) -> None:
    shop.migrate({"public.orders": {}, "public.customers": {}})
    text = cdc(shop.configure({"public.customers": {}, "public.notes": {}}), "--sql").stdout
    comments = [line for line in text.splitlines() if line.startswith("-- ")]
    assert f"-- public.orders: removed, {DROP}" in comments
    assert f"-- public.notes: added, {ADD}" in comments
    assert "-- public.customers: unchanged" in comments
    assert any("psql -1 -v ON_ERROR_STOP=1 -f FILE" in comment for comment in comments)
    assert "select cdc.disable_capture('public.orders'::regclass);" in text
    assert text.count("select cdc.enable_capture('public.") == 2


def test_a_lost_database_is_not_taken_for_a_wrong_configuration() -> None:
    options = DatabaseConfig.model_validate({"dsn": UNREACHABLE, "tables": ORDERS})
    for what in (planner.plan, planner.script):
        with pytest.raises(DatabaseUnreachable) as caught:
            what("shop", options, dsn=UNREACHABLE, reader_dsn=UNREACHABLE, sinks={})
        assert not isinstance(caught.value, InstallError)
