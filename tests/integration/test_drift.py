"""Whatever somebody changes of what is installed, `cdc check`, `cdc status` and the daemon see; `cdc migrate` mends it.

One list of misdeeds, each told to all of them. What the daemon says is what its keeper asks for once a minute (that it
asks, and logs, is tested with the keeper: test_ownership.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing

import pytest
from psycopg2.extensions import connection
from pydantic import SecretStr
from sql import fetch, value
from test_migrations import describe

from cdc import diagnosis, installer
from cdc.config import Config, DatabaseConfig
from cdc.connection import Connection

Connect = Callable[..., connection]
TABLES: dict[str, Mapping[str, object]] = {
    "public.*": {},
    "public.orders": {"when": {"update": "NEW.status IS DISTINCT FROM OLD.status"}, "exclude": ("note",)},
}
SETUP = """
    create table orders (id integer primary key, status text, note text);
    create table plain (id integer primary key, status text);
    create table parts (id integer, at integer, status text, primary key (id, at)) partition by range (at);
    create table parts_1 partition of parts for values from (0) to (10);
    create table parts_2 partition of parts for values from (10) to (20) partition by range (at);
    create table parts_2a partition of parts_2 for values from (10) to (20);
    create function other() returns trigger language plpgsql as $$ begin return null; end $$;
"""


class Shop:
    """A migrated database, and everybody who looks for drift."""

    def __init__(self, dsn: str, look: connection) -> None:
        self.look = look
        self.dsn = dsn
        self.tables = dict(TABLES)

    @property
    def options(self) -> DatabaseConfig:
        return DatabaseConfig.model_validate({"dsn": SecretStr(self.dsn), "tables": self.tables})

    def migrate(self) -> list[str]:
        """Returns what was changed."""
        changes = installer.migrate("shop", self.options, dsn=self.dsn, reader_dsn=self.dsn, sinks={})
        return [f"{change.subject}: {change.what}" for change in changes if change.what != "unchanged"]

    def checked(self) -> list[str]:
        """The errors of `cdc check`."""
        config = Config.model_construct(databases={"shop": self.options}, sinks={})
        findings = diagnosis.check(config, ["shop"], {"shop": (self.dsn, self.dsn)})
        return [f"{finding.subject}: {finding.message}" for finding in findings if finding.level == "error"]

    def counted(self) -> int | None:
        """The drift of `cdc status`."""
        config = Config.model_construct(databases={"shop": self.options}, sinks={})
        return diagnosis.status(config, ["shop"], {"shop": self.dsn})["shop"].drift

    def logged(self) -> list[str]:
        """What the running daemon says."""
        with closing(Connection(self.dsn, purpose="test")) as session:
            return diagnosis.find_drift(session, self.options)

    def recorded(self, statement: str) -> int:
        """How many events a statement makes."""
        before = value(self.look, "select count(*) from cdc.event")
        fetch(self.look, statement)
        return int(value(self.look, "select count(*) from cdc.event") - before)


@pytest.fixture
def shop(installed: str, connect: Connect) -> Shop:
    look = connect(installed)
    fetch(look, SETUP)
    shop = Shop(installed, look)
    shop.migrate()
    assert (shop.checked(), shop.counted(), shop.logged(), shop.migrate()) == ([], 0, [], [])
    return shop


DIFFERS = "trigger differs from the configuration"
DISABLED = "trigger is disabled: changes are not captured"
MISSING = "trigger is missing"
REPLACED = diagnosis.REPLACED
CALL = "execute function cdc.capture('1', 'adaptive', 'cdc', 'diff')"
AN_ORDER = 'create or replace trigger "00_cdc_update" after update on orders for each row'
ARGUMENTS = """(select string_agg(quote_literal(a), ', ') from unnest(string_to_array(encode(
    substring(tgargs for length(tgargs) - 1), 'escape'), '\\000')) a)"""

MISDEEDS = {
    "its triggers are dropped": (
        'drop trigger "00_cdc_capture" on plain; drop trigger "00_cdc_truncate" on plain',
        [f"public.plain: {MISSING}"],
    ),
    "one of them is dropped": ('drop trigger "00_cdc_truncate" on plain', [f"public.plain: {DIFFERS}"]),
    "that of a condition is dropped": ('drop trigger "00_cdc_update" on orders', [f"public.orders: {DIFFERS}"]),
    "one is renamed": ('alter trigger "00_cdc_capture" on plain rename to later', [f"public.plain: {DIFFERS}"]),
    "one more is made": (
        f'create trigger "00_cdc_more" after insert on plain for each row {CALL}',
        [f"public.plain: {DIFFERS}"],
    ),
    "it is disabled": ('alter table plain disable trigger "00_cdc_capture"', [f"public.plain: {DISABLED}"]),
    "all of them are": ("alter table orders disable trigger all", [f"public.orders: {DISABLED}"]),
    "it fires for replicas only": (
        'alter table plain enable replica trigger "00_cdc_capture"',
        [f"public.plain: {DISABLED}"],
    ),
    "it fires for replicas too": (
        'alter table plain enable always trigger "00_cdc_capture"',
        [f"public.plain: {DIFFERS}"],
    ),
    "it is disabled in a partition": (
        'alter table parts_1 disable trigger "00_cdc_capture"',
        [f"public.parts: {DISABLED}"],
    ),
    "it is disabled in a partition of a partition": (
        'alter table parts_2a disable trigger "00_cdc_capture"',
        [f"public.parts: {DISABLED}"],
    ),
    "it is made for fewer operations": (
        f'create or replace trigger "00_cdc_capture" after insert on plain for each row {CALL}',
        [f"public.plain: {DIFFERS}"],
    ),
    "it is given other arguments": (
        'create or replace trigger "00_cdc_capture" after insert or update or delete on plain for each row'
        " execute function cdc.capture('1', 'off', 'cdc', 'diff')",
        [f"public.plain: {DIFFERS}"],
    ),
    "it is given another function": (
        'create or replace trigger "00_cdc_capture" after insert or update or delete on plain for each row'
        " execute function other()",
        [f"public.plain: {DIFFERS}"],
    ),
    "it is given a condition": (
        'do $do$ begin execute (select \'create or replace trigger "00_cdc_capture" after insert or update or delete on'
        f" plain for each row when (false) execute function cdc.capture(' || {ARGUMENTS} || ')' from pg_trigger"
        " where tgrelid = 'plain'::regclass and tgname = '00_cdc_capture'); end $do$",
        [f"public.plain: {DIFFERS}"],
    ),
    "it is given columns": (
        'do $do$ begin execute (select \'create or replace trigger "00_cdc_capture" after insert or delete or update of'
        f" status on plain for each row execute function cdc.capture(' || {ARGUMENTS} || ')' from pg_trigger"
        " where tgrelid = 'plain'::regclass and tgname = '00_cdc_capture'); end $do$",
        [f"public.plain: {DIFFERS}"],
    ),
    "its condition is another": (
        f"do $do$ begin execute (select '{AN_ORDER} when (new.id > 7) execute function cdc.capture(' || {ARGUMENTS}"
        " || ')' from pg_trigger where tgrelid = 'orders'::regclass and tgname = '00_cdc_update'); end $do$",
        [f"public.orders: {DIFFERS}"],
    ),
    "its condition is gone": (
        f"do $do$ begin execute (select '{AN_ORDER} execute function cdc.capture(' || {ARGUMENTS} || ')'"
        " from pg_trigger where tgrelid = 'orders'::regclass and tgname = '00_cdc_update'); end $do$",
        [f"public.orders: {DIFFERS}"],
    ),
    "a partition has none": (
        "delete from pg_depend where classid = 'pg_trigger'::regclass and objid = (select oid from pg_trigger"
        " where tgrelid = 'parts_1'::regclass and tgname = '00_cdc_capture');"
        " delete from pg_trigger where tgrelid = 'parts_1'::regclass and tgname = '00_cdc_capture'",
        [f"public.parts: {DIFFERS}"],
    ),
    "the table is made anew": (
        "drop table plain; create table plain (id integer primary key, status text)",
        [f"public.plain: {MISSING}"],
    ),
    "the table is renamed": ("alter table plain rename to simple", [f"public.simple: {DIFFERS}"]),
    "the table is moved": (
        "create schema elsewhere; alter table plain set schema elsewhere",
        ["elsewhere.plain: is captured, and the configuration does not name it"],
    ),
    "the key is another": (
        "alter table plain drop constraint plain_pkey; alter table plain add primary key (id, status)",
        [f"public.plain: {DIFFERS}"],
    ),
    "a table is new": ("create table more (id integer primary key)", [f"public.more: {MISSING}"]),
    "a partition leaves": (
        "alter table parts detach partition parts_1",
        [f"public.parts_1: {MISSING}"],
    ),
    "the trigger's function is replaced": (
        "create or replace function cdc.capture() returns trigger language plpgsql security definer as"
        " $$ begin return null; end $$",
        [f"function cdc.capture(): {REPLACED}"],
    ),
    "its settings are changed": (
        "alter function cdc.capture() set timezone = 'Asia/Kolkata'",
        [f"function cdc.capture(): {REPLACED}"],
    ),
    "its settings are taken away": ("alter function cdc.capture() reset all", [f"function cdc.capture(): {REPLACED}"]),
    "it runs as whoever writes": (
        "alter function cdc.capture() security invoker",
        [f"function cdc.capture(): {REPLACED}"],
    ),
    "another of our functions is replaced": (
        "create or replace function cdc.leaf_of(seq bigint) returns integer language sql immutable return 0",
        [f"function cdc.leaf_of(bigint): {REPLACED}"],
    ),
    "a function is dropped, and its triggers with it": (
        "drop function cdc.capture() cascade",
        [
            f"function cdc.capture(): {REPLACED}",
            *(f"public.{table}: {MISSING}" for table in ("orders", "parts", "plain")),
        ],
    ),
    "a function is dropped": (
        "drop function cdc.diff(json, json, text[])",
        [f"function cdc.diff(json, json, text[]): {REPLACED}"],
    ),
}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_it_is_seen_by_everybody_and_mended_by_migrate(shop: Shop, misdeed: str) -> None:
    statement, told = MISDEEDS[misdeed]
    before = describe(shop.dsn)
    fetch(shop.look, "set allow_system_table_mods = on")
    fetch(shop.look, statement)
    assert shop.checked() == told
    assert shop.counted() == len(told)
    assert shop.logged() == told
    changes = shop.migrate()
    assert len(changes) == len(told), changes
    assert (shop.checked(), shop.counted(), shop.logged()) == ([], 0, [])
    assert shop.migrate() == []
    described = describe(shop.dsn).splitlines()
    ours = [line for line in before.splitlines() if "cdc." in line.split(",")[0] and not line.startswith("trigger ")]
    assert [line for line in described if "cdc." in line.split(",")[0] and not line.startswith("trigger ")] == ours
    # And it works.
    assert shop.recorded("insert into orders values (1, 'new', 'n'); update orders set note = 'x'") == 1
    assert shop.recorded("update orders set status = 'paid'; delete from orders; truncate orders") == 3
    assert shop.recorded("insert into parts values (2, 15); update parts set status = 'x'") == 2
    if misdeed != "a partition leaves":
        assert shop.recorded("insert into parts values (1, 5); update parts set status = 'y' where at = 5") == 2
    assert value(
        shop.look, "select bool_and(coalesce(new_row, old_row)::text not like '%note%') from cdc.event where op <> 't'"
    )


def test_a_changed_yaml_is_drift_until_migrated(shop: Shop) -> None:
    shop.tables["public.plain"] = {"image": "full"}
    assert shop.checked() == shop.logged() == [f"public.plain: {DIFFERS}"]
    assert shop.counted() == 1
    assert shop.migrate() == ["public.plain: changed"]
    assert (shop.checked(), shop.counted(), shop.logged()) == ([], 0, [])
    shop.tables["public.orders"] = {"when": {"update": "NEW.status IS DISTINCT FROM  OLD.status"}}
    assert shop.logged() == [f"public.orders: {DIFFERS}"]
    assert shop.migrate() == ["public.orders: changed"]
    assert shop.migrate() == []


def test_a_table_named_in_the_yaml_and_renamed_is_a_problem_until_the_yaml_follows(shop: Shop) -> None:
    fetch(shop.look, "alter table orders rename to purchases")
    expected = [
        "public.orders: no such table",
        f"public.purchases: {DIFFERS}",
    ]
    assert [line.replace("tables: ", "") for line in shop.checked()] == expected
    assert [line.partition(" (")[0] for line in shop.logged()] == expected
    with pytest.raises(installer.InstallError, match=r"public\.orders: no such table"):
        shop.migrate()
    # Until then it is captured under its old name.
    assert shop.recorded("insert into purchases values (1, 'new', 'n')") == 1
    shop.tables["public.purchases"] = shop.tables.pop("public.orders")
    assert shop.migrate() == ["public.purchases: changed"]
    assert (shop.checked(), shop.counted(), shop.logged()) == ([], 0, [])


def test_a_captured_table_that_becomes_a_partition_is_captured_with_its_root(shop: Shop) -> None:
    fetch(
        shop.look,
        "create table tree (id integer primary key, status text) partition by range (id);"
        " alter table tree attach partition plain for values from (0) to (100)",
    )
    assert shop.logged() == [
        f"public.tree: {MISSING}",
        "public.plain: is captured, and the configuration does not name it",
    ]
    assert shop.migrate() == ["public.tree: added", "public.plain: removed"]
    assert (shop.checked(), shop.counted(), shop.logged()) == ([], 0, [])
    assert shop.recorded("insert into tree values (1, 'new'); insert into plain values (2, 'new')") == 2


def test_a_restored_function_has_its_owner_and_its_grants_again(shop: Shop) -> None:
    before = describe(shop.dsn)
    fetch(shop.look, "drop function cdc.image(anyelement); drop function cdc.hash(json)")
    fetch(shop.look, "grant execute on function cdc.hide(integer, json) to public")
    assert shop.migrate() == ["function cdc.hash(json): put back", "function cdc.image(anyelement): put back"]
    fetch(shop.look, "revoke execute on function cdc.hide(integer, json) from public")
    assert describe(shop.dsn) == before


def test_a_plan_tells_of_replaced_functions_and_its_script_puts_them_back(shop: Shop) -> None:
    from cdc import planner  # noqa: PLC0415  # here only

    fetch(shop.look, MISDEEDS["the trigger's function is replaced"][0])
    steps = planner.plan("shop", shop.options, dsn=shop.dsn, reader_dsn=shop.dsn, sinks={})
    assert [(step.subject, step.what, step.lock) for step in steps] == [("function cdc.capture()", "put back", None)]
    fetch(shop.look, planner.script("shop", shop.options, dsn=shop.dsn, reader_dsn=shop.dsn, sinks={}))
    assert shop.logged() == []


def test_a_function_of_somebody_else_in_our_schema_is_no_drift(shop: Shop) -> None:
    fetch(shop.look, "create function cdc.mine() returns integer language sql return 1")
    assert shop.logged() == []
