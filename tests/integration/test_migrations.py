"""The revisions: what they make, that they can be undone, and that every way of running them comes to the same.

``golden/schema.txt`` describes the schema in words that PostgreSQL 14 to 18 agree on. After a deliberate change
``python tests/integration/test_migrations.py`` writes it anew; the difference belongs into the same commit.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from psycopg2.extensions import connection, cursor
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from cdc import installer, inventory
from cdc.embedded import start
from cdc.sql import QUERIES

CHECKOUT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden") / "schema.txt"
PATIENCE = 60.0

# -- the schema in words ----------------------------------------------------------------------------------------

# Everywhere: the owner's own rights are not told (PostgreSQL 17 invented one), the owner of the schema has no name.
_GRANTS = """
    coalesce((select string_agg(grantee || ' ' || privileges, '; ' order by grantee)
       from (select case a.grantee when 0 then 'public' when s.nspowner then 'the migration role'
                                   else a.grantee::regrole::text end as grantee,
                    string_agg(a.privilege_type || case when a.is_grantable then '*' else '' end, ','
                               order by a.privilege_type) as privileges
               from aclexplode({acl}) a, pg_namespace s
              where s.nspname = 'cdc' and a.grantee <> {owner}
              group by 1) g), 'nobody')
"""
_OWNER = "case {owner} when s.nspowner then 'the migration role' else {owner}::regrole::text end"

_RELATION_ACL = """coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char", c.relowner))"""

_SCHEMA_ACL = "coalesce(s.nspacl, acldefault('n', s.nspowner))"
_FUNCTION_ACL = "coalesce(p.proacl, acldefault('f', p.proowner))"

_DESCRIPTION = {
    "schema": f"""
        select 'cdc', 'granted to ' || {_GRANTS.format(acl=_SCHEMA_ACL, owner="s.nspowner")}
          from pg_namespace s where s.nspname = 'cdc'
    """,
    "role": """
        select rolname,
               concat_ws(' ', 'may', case when rolsuper then 'everything' end, case when rolinherit then 'inherit' end,
                         case when rolcreaterole then 'createrole' end, case when rolcreatedb then 'createdb' end,
                         case when rolcanlogin then 'login' end, case when rolreplication then 'replicate' end,
                         case when rolbypassrls then 'bypassrls' end)
          from pg_roles where rolname in ('cdc_capture', 'cdc_nobody', 'cdc_reader')
    """,
    "relation": f"""
        select c.relname,
               case c.relkind when 'r' then 'table' when 'v' then 'view' when 'S' then 'sequence'
                              else c.relkind::text end,
               case c.relpersistence when 'p' then 'permanent' else c.relpersistence::text end,
               'options ' || coalesce(array_to_string(c.reloptions, ','), 'none'),
               'owned by ' || {_OWNER.format(owner="c.relowner")},
               'granted to ' || {_GRANTS.format(acl=_RELATION_ACL, owner="c.relowner")},
               'inherits ' || coalesce((select string_agg(i.inhparent::regclass::text, ',') from pg_inherits i
                                         where i.inhrelid = c.oid), 'nothing'),
               case when c.relrowsecurity then 'row security' end,
               case when c.relreplident = 'f' then 'replica identity full' end
          from pg_class c join pg_namespace s on s.oid = c.relnamespace
         where s.nspname = 'cdc' and c.relkind not in ('i', 'c')
    """,
    # In the outbox its place too, for the trigger goes by it: among those that are there, whatever was there before.
    "column": f"""
        select c.relname || '.' || a.attname,
               case when c.relname like 'event%' then row_number() over (partition by c.oid order by a.attnum) end,
               format_type(a.atttypid, a.atttypmod),
               case when a.attnotnull then 'not null' else 'null' end,
               'default ' || coalesce(pg_get_expr(d.adbin, d.adrelid), 'none'),
               case a.attidentity when '' then null else 'identity ' || a.attidentity::text end,
               'granted to ' || {_GRANTS.format(acl="a.attacl", owner="c.relowner")}
          from pg_attribute a
          join pg_class c on c.oid = a.attrelid
          join pg_namespace s on s.oid = c.relnamespace
          left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
         where s.nspname = 'cdc' and c.relkind in ('r', 'v') and a.attnum > 0 and not a.attisdropped
    """,
    # Since PostgreSQL 18 NOT NULL is a constraint; the columns tell of it.
    "constraint": """
        select k.conrelid::regclass || '.' || k.conname, pg_get_constraintdef(k.oid)
          from pg_constraint k join pg_namespace s on s.oid = k.connamespace
         where s.nspname = 'cdc' and k.contype <> 'n'
    """,
    "index": """
        select c.relname, pg_get_indexdef(c.oid)
          from pg_class c join pg_namespace s on s.oid = c.relnamespace where s.nspname = 'cdc' and c.relkind = 'i'
    """,
    "sequence": """
        select c.relname, format_type(q.seqtypid, null), 'start ' || q.seqstart, 'by ' || q.seqincrement,
               'from ' || q.seqmin, 'to ' || q.seqmax, 'cache ' || q.seqcache, case when q.seqcycle then 'cycle' end
          from pg_sequence q
          join pg_class c on c.oid = q.seqrelid
          join pg_namespace s on s.oid = c.relnamespace where s.nspname = 'cdc'
    """,
    "function": f"""
        select p.oid::regprocedure::text, 'returns ' || pg_get_function_result(p.oid),
               'arguments ' || pg_get_function_arguments(p.oid), l.lanname,
               case p.provolatile when 'i' then 'immutable' when 's' then 'stable' else 'volatile' end,
               'parallel ' || case p.proparallel when 's' then 'safe' when 'r' then 'restricted' else 'unsafe' end,
               case when p.prosecdef then 'security definer' else 'security invoker' end,
               case when p.proisstrict then 'strict' end,
               'owned by ' || {_OWNER.format(owner="p.proowner")},
               'granted to ' || {_GRANTS.format(acl=_FUNCTION_ACL, owner="p.proowner")},
               'set ' || coalesce((select string_agg(c, ', ' order by c) from unnest(p.proconfig) as c), 'nothing'),
               'md5 ' || md5(coalesce(nullif(p.prosrc, ''), pg_get_function_sqlbody(p.oid)))
          from pg_proc p
          join pg_namespace s on s.oid = p.pronamespace
          join pg_language l on l.oid = p.prolang where s.nspname = 'cdc'
    """,
    # Not its text: PostgreSQL 16 began to write views otherwise.
    "view": """
        select r.ev_class::regclass::text, 'reads ' || string_agg(distinct d.refobjid::regclass::text, ',')
          from pg_rewrite r
          join pg_class c on c.oid = r.ev_class
          join pg_namespace s on s.oid = c.relnamespace
          join pg_depend d on d.objid = r.oid and d.classid = 'pg_rewrite'::regclass
               and d.refclassid = 'pg_class'::regclass and d.refobjid <> r.ev_class
         where s.nspname = 'cdc' group by r.ev_class
    """,
    "trigger": """
        select g.tgrelid::regclass || '.' || g.tgname, pg_get_triggerdef(g.oid)
          from pg_trigger g where not g.tgisinternal
    """,
    "type": """
        select t.typname, t.typtype from pg_type t join pg_namespace s on s.oid = t.typnamespace
          left join pg_class c on c.oid = t.typrelid
         where s.nspname = 'cdc' and (t.typtype in ('d', 'e', 'r') or (t.typtype = 'c' and c.relkind = 'c'))
    """,
    "comment": """
        select pg_describe_object(d.classoid, d.objoid, d.objsubid), d.description
          from pg_description d
         where d.objoid >= 16384 and pg_describe_object(d.classoid, d.objoid, d.objsubid) ~ '\\mcdc\\M'
    """,
    "default privilege": "select d.defaclobjtype, d.defaclacl::text from pg_default_acl d",
}


def describe(dsn: str) -> str:
    """Schema cdc and whatever else a migration may leave in a database, one line each."""
    lines = []
    with contextlib.closing(psycopg2.connect(dsn)) as session, session.cursor() as found:
        # With an empty path names are qualified, whoever is asking.
        found.execute("set search_path = ''")
        for kind, query in _DESCRIPTION.items():
            found.execute(query)
            lines += sorted(f"{kind} " + ", ".join(str(part) for part in row if part is not None) for row in found)
    return "".join(f"{line}\n" for line in lines)


# -- running them -----------------------------------------------------------------------------------------------


def alembic_in_process(dsn: str, step: Callable[..., None], revision: str) -> None:
    engine = create_engine("postgresql+psycopg2://", creator=lambda: psycopg2.connect(dsn), poolclass=NullPool)
    with engine.begin() as transaction:
        step(installer.alembic_config(connection=transaction), revision)
    engine.dispose()


def alembic(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Plain Alembic, as a user runs it in a checkout."""
    program = str(Path(sys.executable).with_name("alembic"))
    return subprocess.run(
        [program, *arguments], cwd=CHECKOUT, check=False, capture_output=True, text=True, timeout=PATIENCE
    )


def cdc(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).with_name("cdc"))
    command_line = [program, "-c", str(config), *arguments]
    return subprocess.run(command_line, check=False, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture
def look(database: str, connect: Callable[..., connection]) -> cursor:
    """A superuser's cursor in the fresh database, where there is a table orders."""
    found = connect(database).cursor()
    found.execute("create table orders (id bigint primary key, status text)")
    return found


def configured(directory: Path, dsn: str, **database: Any) -> Path:
    config = {
        "databases": {"shop": {"dsn": dsn, "tables": {"public.*": {}}, **database}},
        "sinks": {"audit": {"type": "file", "path": str(directory / "out.jsonl")}},
    }
    path = directory / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def one(look: cursor, query: str) -> Any:
    look.execute(query)
    row = look.fetchone()
    assert row is not None
    return row[0]


# -- the schema -------------------------------------------------------------------------------------------------


def test_the_schema_is_as_described(installed: str) -> None:
    assert describe(installed).splitlines() == GOLDEN.read_text(encoding="utf-8").splitlines(), (
        "if this is meant: python tests/integration/test_migrations.py"
    )


def test_up_down_up_gives_the_same_schema(database: str) -> None:
    alembic_in_process(database, command.upgrade, "head")
    first = describe(database)
    alembic_in_process(database, command.downgrade, "base")
    alembic_in_process(database, command.upgrade, "head")
    assert describe(database) == first == GOLDEN.read_text(encoding="utf-8")


def test_every_revision_can_be_undone_and_done_again(database: str) -> None:
    for number, _ in enumerate((inventory.migrations_directory() / "versions").glob("*.py")):
        below = describe(database)
        alembic_in_process(database, command.upgrade, "+1")
        before = describe(database)
        alembic_in_process(database, command.downgrade, "-1")
        if number > 0:  # of the first one its roles are left
            assert describe(database) == below
        alembic_in_process(database, command.upgrade, "+1")
        assert describe(database) == before


def test_dead_letters_of_an_earlier_revision_get_their_place_and_their_key(
    database: str, connect: Callable[..., connection]
) -> None:
    with create_engine("postgresql+psycopg2://", creator=lambda: psycopg2.connect(database)).connect() as session:
        scripts = ScriptDirectory.from_config(installer.alembic_config(connection=session))
    revision = scripts.get_revision("0005")
    assert isinstance(revision.down_revision, str)
    alembic_in_process(database, command.upgrade, revision.down_revision)
    look = connect(database).cursor()
    source = '{"database":"shop","schema":"od d","table":"a\\"\\\\b","seq":184467,"txid":7,"ts":"2026-11-22T08:01:02Z"}'
    row = '"before":null,"after":{"id":"},\\"key\\":{","doc":"\\u0000"},"changed":null,"context":null}'
    letters = {
        "shop-184467-20261122080102123456": f'{{"version":1,"op":"insert","source":{source},"key":{{"id":"}}x"}},{row}',
        "s-h-9-1": f'{{"version":1,"op":"truncate","source":{source},"key":null,{row}',
        "shop-10-2": '{"seq":10,"old_row":null,"new_row":[1]}',
        "odd": "{}",
    }
    for event_id, event in letters.items():
        look.execute(
            "insert into cdc.dead_letter (sink, event_id, event, reason) values ('audit', %s, %s, 'no')",
            (event_id, event),
        )
    alembic_in_process(database, command.upgrade, "0005")
    look.execute("select seq, schema_name, table_name, keys, parked, wanted from cdc.dead_letter order by id")
    assert look.fetchall() == [
        (184467, "od d", 'a"\\b', ['{"id":"}x"}'], False, False),
        (9, "od d", 'a"\\b', [], False, False),
        (10, None, None, [], False, False),
        (0, None, None, [], False, False),
    ]


def test_after_down_nothing_is_left_but_the_version_table(database: str, look: cursor, tmp_path: Path) -> None:
    assert cdc(configured(tmp_path, database), "migrate").returncode == 0
    look.execute("insert into orders values (1, 'new')")
    alembic_in_process(database, command.downgrade, "base")
    left = [line for line in describe(database).splitlines() if not line.startswith(("schema ", "role "))]
    assert [line.split(",")[0] for line in left] == [
        "relation alembic_version",
        "column alembic_version.version_num",
        "constraint cdc.alembic_version.alembic_version_pkc",
        "index alembic_version_pkc",
    ]
    assert one(look, "select count(*) from cdc.alembic_version") == 0
    # Orders can be written without cdc.
    look.execute("insert into orders values (2, 'new')")
    look.execute("truncate orders")


def test_down_forgets_whom_the_schema_was_open_to(database: str) -> None:
    alembic_in_process(database, command.upgrade, "head")
    alembic_in_process(database, command.downgrade, "base")
    assert describe(database).splitlines()[0] == "schema cdc, granted to nobody"
    (relation,) = [line for line in describe(database).splitlines() if line.startswith("relation ")]
    assert "granted to nobody" in relation


def test_migrations_import_nothing_of_the_package() -> None:
    for revision in (CHECKOUT / "migrations" / "versions").glob("*.py"):
        assert not re.search(r"^\s*(from|import) cdc\b", revision.read_text(), re.MULTILINE), revision.name


def test_every_revision_has_both_its_scripts() -> None:
    directory = CHECKOUT / "migrations"
    revisions = sorted(path.stem for path in (directory / "versions").glob("*.py"))
    scripts = sorted(path.name for path in (directory / "sql").iterdir())
    assert scripts == sorted(f"{name}.{way}.sql" for name in revisions for way in ("up", "down"))


# -- plain Alembic ----------------------------------------------------------------------------------------------


def test_plain_alembic_does_what_cdc_migrate_does(
    database: str, look: cursor, installed: str, connect: Callable[..., connection], tmp_path: Path
) -> None:
    other = connect(installed).cursor()
    other.execute("create table orders (id bigint primary key, status text)")
    by_cdc = cdc(configured(tmp_path, installed), "migrate")
    done = alembic("-x", f"config={configured(tmp_path, database)}", "upgrade", "head")
    assert (done.returncode, by_cdc.returncode) == (0, 0), done.stderr + by_cdc.stderr
    assert done.stdout.splitlines() == [
        f"shop: schema cdc: revision none → {inventory.head()}",
        "shop: public.orders: added",
        "shop: sink audit: starts here",
    ]
    assert describe(database) == describe(installed)
    for table in ("captured_table", "installation", "alembic_version", "sink", "position"):
        # The rest is when and where.
        columns = {"sink": "name, epoch, state", "position": "sink, epoch, last_seq"}.get(table, "*")
        rows = f"select (to_jsonb(t) - 'since' - 'relation')::text from (select {columns} from cdc.{table}) t"
        assert one(look, rows) == one(other, rows)
    again = alembic("-x", f"config={tmp_path / 'config.yaml'}", "upgrade", "head")
    assert again.stdout == "shop: public.orders: unchanged\n"
    assert cdc(tmp_path / "config.yaml", "migrate").stdout == "shop: public.orders: unchanged\n"


def test_plain_alembic_can_be_told_one_database(database: str, look: cursor, tmp_path: Path) -> None:
    config = {
        "databases": {
            "shop": {"dsn": database, "tables": {"public.*": {}}},
            "away": {"dsn": "host=127.0.0.1 port=1 user=cdc", "tables": {"public.*": {}}},
        },
        "sinks": {"audit": {"type": "stdout"}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    both = alembic("-x", f"config={path}", "upgrade", "head")
    assert both.returncode == 1
    assert "error: away: cannot connect" in both.stderr
    assert "Traceback" not in both.stderr
    done = alembic("-x", f"config={path}", "-x", "database=shop", "upgrade", "head")
    assert (done.returncode, done.stdout) == (0, "shop: public.orders: unchanged\n")
    wrong = alembic("-x", f"config={path}", "-x", "database=nowhere", "upgrade", "head")
    assert wrong.returncode == 1
    assert wrong.stderr == "error: no database nowhere in the configuration (known: shop, away)\n"


def test_asking_for_the_revision_touches_nothing(database: str, look: cursor, tmp_path: Path) -> None:
    config = configured(tmp_path, database)
    assert alembic("-x", f"config={config}", "current").returncode == 0
    assert one(look, "select to_regnamespace('cdc')") is None
    assert cdc(config, "migrate").returncode == 0
    look.execute('drop trigger "00_cdc_capture" on orders')
    before = describe(database)
    done = alembic("-x", f"config={config}", "current")
    assert done.returncode == 0, done.stderr
    assert inventory.head() in done.stdout
    assert describe(database) == before


def test_plain_alembic_takes_everything_down_again(database: str, look: cursor, tmp_path: Path) -> None:
    config = configured(tmp_path, database)
    assert alembic("-x", f"config={config}", "upgrade", "head").returncode == 0
    done = alembic("-x", f"config={config}", "downgrade", "base")
    assert (done.returncode, done.stdout) == (0, f"shop: schema cdc: revision {inventory.head()} → none\n")
    assert one(look, "select count(*) from pg_trigger where tgname like '00_cdc%'") == 0
    assert alembic("-x", f"config={config}", "upgrade", "head").returncode == 0
    assert describe(database).count("trigger public.orders.00_cdc") == 2


def test_plain_alembic_without_a_configuration_does_the_schema_alone(database: str) -> None:
    assert alembic("-x", f"dsn={database}", "upgrade", "head").returncode == 0
    assert describe(database) == GOLDEN.read_text(encoding="utf-8")
    assert inventory.head() in alembic("-x", f"dsn={database}", "current").stdout
    assert alembic("-x", f"dsn={database}", "downgrade", "base").returncode == 0


def test_plain_alembic_that_is_not_told_where_says_how_to() -> None:
    done = alembic("upgrade", "head")
    assert done.returncode == 1
    assert done.stderr == "alembic: say which databases: -x config=config.yaml, or -x dsn=postgresql://…\n"


def test_plain_alembic_has_no_offline_mode_and_says_so(database: str, look: cursor) -> None:
    done = alembic("-x", f"dsn={database}", "upgrade", "head", "--sql")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "migrations/sql" in done.stderr
    assert one(look, "select to_regnamespace('cdc')") is None


def test_plain_alembic_with_a_bad_configuration_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("databases: {}")
    done = alembic("-x", f"config={path}", "upgrade", "head")
    assert done.returncode == 1
    assert [line.split(": ")[:3] for line in done.stderr.splitlines()] == [
        ["error", str(path), "databases"],
        ["error", str(path), "sinks"],
    ]


def test_an_unreachable_database_is_one_clear_line_without_its_password() -> None:
    done = alembic("-x", "dsn=postgresql://cdc:canary@127.0.0.1:1/shop", "upgrade", "head")
    assert done.returncode == 1
    assert "canary" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# -- the queries ------------------------------------------------------------------------------------------------

PARAMETERS = {
    "acked": 7,
    "after_id": 1,
    "after_seq": 7,
    "after_sink": "audit",
    "backfill": 1,
    "condition": "true",
    "done": 1,
    "moment": "2026-11-22T08:00:00Z",
    "rate": 1000,
    "rows": 1000,
    "stored": False,
    "version": "731",
    "versions": ["731"],
    "states": ["running"],
    "always": False,
    "before": None,
    "bytes": 4_194_304,
    "captures": [1],
    "channel": "cdc",
    "epoch": 1,
    "error": "the disk is full",
    "event": '{"id": "shop-7-1"}',
    "event_id": "shop-7-1",
    "event_ids": ["shop-7-1"],
    "events": 500,
    "id": 1,
    "ids": [1],
    "image": "diff",
    "key": None,
    "key_lists": ["[]"],
    "keys": ['{"id":7}'],
    "limit": 100,
    "nonce": "a nonce",
    "notify": "adaptive",
    "notify_payload": "diff",
    "conditions": "{}",
    "dropped": 3,
    "exclude": ["note"],
    "exclusive": True,
    "lenient": True,
    "mask": "{}",
    "last_seq": 7,
    "name": "shop",
    "patience": 5.0,
    "position": "3:3:",
    "process": 4711,
    "seconds": 15.0,
    "ops": ["insert", "update"],
    "owner": "host:1",
    "parked": True,
    "paused": True,
    "reason": "never",
    "relation": 1259,
    "relations": [1259],
    "requests": 1,
    "retention": 86_400.0,
    "role": "cdc_reader",
    "schema": "public",
    "schemas": ["public"],
    "seq": 7,
    "seqs": [7],
    "since": None,
    "sink": "audit",
    "sinks": ["audit"],
    "start": "now",
    "state": "running",
    "table": "orders",
    "tables": ["orders"],
    "target": "3:3:",
    "until": "9:12:10",
    "texts": ["{}"],
    "wanted": False,
    "whole": True,
    "types": [23],
}
"""Something plausible for every parameter a query may have."""

OF_A_MIGRATION = {"check_condition", "enable_capture", "name_installation", "rebase", "start_backfill_where"}
"""What only the migrating role does."""


def explain(look: cursor, name: str) -> None:
    query = QUERIES[name]
    wanted = set(re.findall(r"%\((\w+)\)s", query))
    assert wanted <= PARAMETERS.keys(), f"{name}: say something plausible for {wanted - PARAMETERS.keys()}"
    parameters = {parameter: PARAMETERS[parameter] for parameter in wanted}
    look.execute("explain " + query, parameters or None)
    assert look.fetchall()


@pytest.fixture(scope="module")
def explained(server: Any, template: str) -> Iterator[cursor]:
    """One installed database for all queries, and a role in it that is the daemon's."""
    name = f"{template}_explained"
    role = f"{template}_daemon"
    with contextlib.closing(psycopg2.connect(server.create_database(name, template))) as session:
        session.autocommit = True
        with session.cursor() as look:
            look.execute(f"create role {role} login; grant cdc_reader to {role}")
            yield look
            look.execute(f"reset role; drop role {role}")
    server.drop_database(name)


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_is_understood_by_the_server(explained: cursor, name: str) -> None:
    explain(explained, name)


@pytest.mark.parametrize("name", sorted(set(QUERIES) - OF_A_MIGRATION))
def test_every_query_of_the_daemon_is_allowed_to_it(explained: cursor, template: str, name: str) -> None:
    explained.execute(f"set role {template}_daemon")
    try:
        explain(explained, name)
    finally:
        explained.execute("reset role")


def test_every_query_says_what_it_is_for() -> None:
    for name, query in QUERIES.items():
        assert query.startswith("-- "), name


# -- the wheel --------------------------------------------------------------------------------------------------


def test_the_wheel_holds_whatever_an_installed_cdc_needs(tmp_path: Path) -> None:
    # From a copy: the build leaves nothing behind, and another one may run beside this.
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "tests")
    shutil.copytree(CHECKOUT, source, ignore=unwanted)
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    command_line = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(command_line, check=True, capture_output=True, timeout=PATIENCE)
    (wheel,) = tmp_path.glob("table_cdc-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for directory, inside in (("cdc", "cdc"), ("migrations", "cdc/migrations")):
        there = {
            f"{inside}/{path.relative_to(CHECKOUT / directory)}"
            for path in (CHECKOUT / directory).rglob("*")
            if path.is_file() and path.suffix in {".py", ".sql", ".typed", ".service", ".html", ".js", ".css", ".svg"}
        }
        assert there <= names, there - names
    assert {"cdc/migrations/env.py", "cdc/sql/queries.sql", "cdc/py.typed"} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_the_migrations_of_an_installed_package_are_found_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "cdc"
    shutil.copytree(CHECKOUT / "migrations", package / "migrations")
    monkeypatch.setattr(inventory, "__file__", str(package / "inventory.py"))
    assert inventory.migrations_directory() == package / "migrations"
    assert inventory.head()


def main() -> None:
    """Write the golden description anew, from an embedded server."""
    directory = Path(tempfile.mkdtemp(prefix="cdc-golden-"))
    try:
        with start(directory) as server:
            alembic_in_process(server.dsn(), command.upgrade, "head")
            GOLDEN.parent.mkdir(exist_ok=True)
            GOLDEN.write_text(describe(server.dsn()), encoding="utf-8")
    finally:
        shutil.rmtree(directory)
    sys.stdout.write(f"written: {GOLDEN}\n")


if __name__ == "__main__":
    main()
