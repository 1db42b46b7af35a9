"""op.enable_capture, op.disable_capture, and autogenerate that writes them: against `cdc migrate`'s own idea of equal.

What an operation has made is judged by `inventory.find_drift`, which compares a database with a YAML file. Most tests
run operations in this process; the documented example runs `alembic` and `cdc` as a user does.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import psycopg2
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.operations import MigrateOperation, Operations
from alembic.operations.ops import DowngradeOps, MigrationScript, UpgradeOps
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg2.extensions import connection, make_dsn, parse_dsn
from sql import fetch, value
from sqlalchemy.pool import NullPool

from cdc import config, installer, inventory
from cdc.config import DatabaseConfig, TableConfig
from cdc.connection import Connection
from cdc.event import Event
from cdc.operations import DisableCapture, EnableCapture
from cdc.outbox import Outbox, Owner
from cdc.sinks import option_models

Connect = Callable[..., connection]
Step = Callable[[Any], object]
"""What a migration's upgrade() does, given `op`."""

DOCUMENT = Path(__file__).parents[2] / "docs" / "alembic.md"
BIN = Path(sys.executable).parent
WEIRD = """o'r"d%e:r \\ ß"""
QUOTED = 'public."' + WEIRD.replace('"', '""') + '"'
TABLES = f"""
    create table orders (id int primary key, status text, note text, card text);
    create table keyless (code text, body text);
    create function paid(status text) returns boolean immutable language sql as 'select status = ''paid''';
    create table {QUOTED} (id int primary key, "it's ""a"" :b\\" text, status text);
"""


class Shop:
    """A database with schema cdc, tables that nobody captures yet, and a YAML file.

    Attributes:
        writer: a session in autocommit.
        config: the file.
    """

    def __init__(self, dsn: str, writer: connection, config_file: Path) -> None:
        self.dsn = dsn
        self.writer = writer
        self.config = config_file

    def configure(self, tables: Mapping[str, Mapping[str, object]], **database: object) -> None:
        """Write the YAML."""
        content = {
            "databases": {"shop": {"dsn": self.dsn, "tables": tables, **database}},
            "sinks": {"audit": {"type": "stdout"}},
        }
        self.config.write_text(json.dumps(content))  # JSON is YAML

    def drift(self) -> dict[str, str]:
        """Where the database differs from the YAML, by table."""
        loaded = config.load(self.config, option_models(), {}).databases["shop"]
        with Connection(self.dsn, purpose="test") as session:
            return {drift.table: drift.state for drift in inventory.find_drift(session, loaded)}

    @contextlib.contextmanager
    def context(self, user: str | None = None, **opts: object) -> Iterator[MigrationContext]:
        """Alembic's context on a connection of its own, as env.py makes it, in one transaction."""
        dsn = make_dsn(self.dsn, user=user) if user else self.dsn
        engine = sa.create_engine("postgresql+psycopg2://", creator=lambda: psycopg2.connect(dsn), poolclass=NullPool)
        with engine.begin() as session:
            yield MigrationContext.configure(session, opts=opts)

    def run(self, step: Step, user: str | None = None) -> None:
        """Run it as `alembic upgrade` does."""
        with self.context(user) as context:
            step(Operations(context))

    def run_script(self, step: Step) -> str:
        """Run what `alembic upgrade --sql` writes, by hand; returns it."""
        script = io.StringIO()
        context = MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True, "output_buffer": script})
        step(Operations(context))
        fetch(self.writer, script.getvalue())
        return script.getvalue()

    def autogenerate(self, models: Step | None = None, user: str | None = None, **opts: object) -> Migration:
        """What `alembic revision --autogenerate` makes of the YAML and of models.

        Args:
            models: changes to the models, beginning with what the database has.
            user: whom to log in as.
            opts: more arguments of ``context.configure``.
        """
        plugins = ["alembic.autogenerate.*", "cdc"]
        options = {"cdc_config": self.config, "cdc_database": "shop", "autogenerate_plugins": plugins} | opts
        with self.context(user, **options) as context:
            assert context.connection is not None
            tables = sa.MetaData()
            tables.reflect(context.connection)
            if models is not None:
                models(tables)
            return Migration(produce_migrations(context, tables), context)

    def state(self, table: str) -> object:
        """How a table is captured, in all that matters to events."""
        return fetch(
            self.writer,
            """select g.tgname, g.tgenabled,
                      regexp_replace(pg_get_triggerdef(g.oid), '\\(''[0-9]+''|, ''[0-9a-f]{32}''\\)$', '(', 'g'),
                      t.image, t.key_columns, t.hidden
                 from pg_trigger g
                 join cdc.captured_table t on t.id = substring(pg_get_triggerdef(g.oid), 'capture\\(''([0-9]+)')::int
                where g.tgrelid = %s::regclass and g.tgname like '00\\_cdc%%' order by 1""",
            (table,),
        )


class Migration:
    """What autogenerate has found.

    Attributes:
        upgrade, downgrade: the lines it writes, without comments.
    """

    def __init__(self, script: MigrationScript, context: MigrationContext) -> None:
        assert script.upgrade_ops is not None
        assert script.downgrade_ops is not None
        self.operations = script.upgrade_ops.ops
        self.upgrade = code(script.upgrade_ops, context)
        self.downgrade = code(script.downgrade_ops, context)

    def __bool__(self) -> bool:
        return bool(self.operations)


def code(operations: UpgradeOps | DowngradeOps, context: MigrationContext) -> list[str]:
    text = render_python_code(operations, migration_context=context)
    return [ast.unparse(statement) for statement in ast.parse(re.sub("^    ", "", text, flags=re.MULTILINE)).body]


def executed(lines: list[str]) -> Step:
    """The step that such lines are."""
    return lambda op: exec("\n".join(lines), {"op": op, "sa": sa})  # noqa: S102  # that is what migrations are


@pytest.fixture
def shop(installed: str, connect: Connect, tmp_path: Path) -> Shop:
    writer = connect(installed)
    fetch(writer, TABLES)
    return Shop(installed, writer, tmp_path / "config.yaml")


class Recorder(Operations):
    """An `op` that does nothing but remember."""

    def __init__(self) -> None:
        self.invoked: list[MigrateOperation] = []

    def invoke(self, operation: MigrateOperation) -> None:  # type: ignore[override]
        self.invoked.append(operation)


def evaluated(line: str) -> MigrateOperation:
    """The operation that one line of a migration is."""
    recorder = Recorder()
    exec(line, {"op": recorder})  # noqa: S102
    [operation] = recorder.invoked
    return operation


# -- the plugin ---------------------------------------------------------------------------------------------------


def test_alembic_is_told_of_the_plugin() -> None:
    plugins = {point.name: point.value for point in metadata.entry_points(group="alembic.plugins")}
    assert plugins.get("cdc") == "cdc.operations", "installed before there was one: pip install --editable . again"


@pytest.mark.parametrize("first", ["alembic", "cdc.operations", "cdc.installer"])
def test_whoever_is_imported_first_the_operations_are_there(first: str) -> None:
    script = f"import {first}, alembic.op, cdc.operations; alembic.op.enable_capture, alembic.op.disable_capture"
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_alembic_alone_does_not_bring_the_rest_of_cdc_along() -> None:
    script = "import alembic, sys; print(*(name for name in sys.modules if name.split('.')[0] in ('cdc', 'pydantic')))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["cdc", "cdc.operations"]


# -- the operations -----------------------------------------------------------------------------------------------

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("orders", {"ops": ["update", "insert"]}),
    ("orders", {"image": "full"}),
    ("keyless", {"key": ["code"]}),
    ("orders", {"exclude": ["note"]}),
    ("orders", {"mask": {"note": "hash", "card": "redact"}}),
    ("orders", {"when": {"update": "NEW.status <> OLD.status", "insert": "NEW.status ~ '^\\w:x%s'"}}),
    ("orders", {"when": {"delete": "public.paid(OLD.status) AND OLD.note <> ') EXECUTE FUNCTION cdc.capture(''1'''"}}),
    ("orders", {"always": True}),
    ("orders", {"delivery": "ephemeral"}),
    ("orders", {"notify": "always"}),
    ("orders", {"notify": "off"}),
    ("orders", {"notify_payload": "wake"}),
    ("orders", {"channel": """it's "my" \\ channel: %s"""}),
    ("orders", {"image": "full", "exclude": ["card"], "mask": {"note": "hash"}, "always": True, "ops": ["delete"]}),
]
OPTION_IDS = ["-".join((table, *options)) for table, options in OPTIONS]
OF_THE_DATABASE = ("notify", "notify_payload", "channel")


def configure(shop: Shop, table: str, options: Mapping[str, Any]) -> None:
    """The YAML that says what such options say."""
    of_table = {name: option for name, option in options.items() if name not in OF_THE_DATABASE}
    shop.configure({table: of_table}, **{name: options[name] for name in OF_THE_DATABASE if name in options})


def test_every_option_of_a_table_is_an_option_of_the_operation() -> None:
    tried = {name for _, options in OPTIONS for name in options}
    assert tried == {*TableConfig.model_fields} - {"model"} | {*OF_THE_DATABASE}


@pytest.mark.parametrize(("table", "options"), OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("script", [False, True], ids=["online", "offline"])
def test_an_option_means_what_it_means_in_the_yaml(
    shop: Shop, table: str, options: dict[str, Any], script: bool
) -> None:
    def step(op: Any) -> None:
        op.enable_capture(f"public.{table}", **options)

    configure(shop, f"public.{table}", {})
    shop.run(lambda op: op.enable_capture(f"public.{table}"))
    assert shop.drift() == {}
    configure(shop, f"public.{table}", options)
    assert shop.drift() == {f"public.{table}": "outdated"}
    (shop.run_script if script else shop.run)(step)
    assert shop.drift() == {}


@pytest.mark.parametrize("conforming", ["on", "off"])
@pytest.mark.parametrize("script", [False, True], ids=["online", "offline"])
def test_odd_names_and_values_arrive_as_they_are(shop: Shop, script: bool, conforming: str) -> None:
    column = """it's "a" :b\\"""
    options: dict[str, Any] = {
        "exclude": [column],
        "when": {"update": f"""NEW."{column.replace('"', '""')}" = E'\\'"%s:x\\\\' OR NEW.status LIKE '%'"""},
        "channel": WEIRD,
    }
    fetch(shop.writer, f"set standard_conforming_strings = {conforming}")
    (shop.run_script if script else shop.run)(lambda op: op.enable_capture(QUOTED, **options))
    configure(shop, QUOTED, options)
    assert shop.drift() == {}
    (shop.run_script if script else shop.run)(lambda op: op.disable_capture(QUOTED))
    assert shop.drift() == {f"public.{WEIRD}": "missing"}


def test_events_are_recorded_from_then_on_and_no_longer(shop: Shop) -> None:
    with Connection(shop.dsn, purpose="test") as session:
        outbox = Outbox(session, database="shop", sink="test", owner=Owner("test", 1))
        outbox.claim(start="now")
        fetch(shop.writer, "insert into orders values (1)")
        shop.run(lambda op: op.enable_capture("public.orders", exclude=["note", "card"]))
        fetch(shop.writer, "insert into orders values (2, 'new', 'secret', 'secret')")
        shop.run(lambda op: op.disable_capture("public.orders"))
        fetch(shop.writer, "insert into orders values (3)")
        batch = outbox.next_batch(None, events=10, bytes_=1 << 20)
        assert batch is not None
        [event] = batch.events
        assert isinstance(event, Event)
        assert json.loads(event.to_json())["after"] == {"id": 2, "status": "new"}


def test_a_script_reads_well(shop: Shop) -> None:
    script = shop.run_script(lambda op: op.enable_capture("public.orders", image="full", exclude=["note"]))
    assert script.strip() == (
        "select cdc.enable_capture(relation => '\"public\".\"orders\"'::regclass, image => 'full'::text, "
        "exclude => '{\"note\"}'::text[]);"
    )


def test_a_failing_migration_leaves_nothing_behind(shop: Shop) -> None:
    def step(op: Any) -> None:
        op.enable_capture("public.orders")
        op.enable_capture("public.nowhere")

    with pytest.raises(CommandError, match=r'relation "public.nowhere" does not exist'):
        shop.run(step)
    assert fetch(shop.writer, "select from cdc.captured") == []


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("orders", {}, r"orders: a table without a schema \(write public.orders\)"),
        ("public.*", {}, r"public.\*: several tables \(name one"),
        ("public.orders", {"image": "whole"}, "public.orders: image: Input should be 'diff' or 'full'"),
        ("public.orders", {"exclude": "note"}, "public.orders: exclude: Input should be a valid tuple"),
        ("public.orders", {"ops": []}, "public.orders: ops: an empty list"),
        ("public.orders", {"exclude": ["note"], "mask": {"note": "hash"}}, "exclude and mask both name note"),
        ("public.orders", {"ops": ["insert"], "when": {"update": "true"}}, "a condition for update, which ops leaves"),
        ("public.orders", {"delivery": "ephemeral", "notify": "off"}, "notify: off, and a table with delivery: ephem"),
        ("public.orders", {"channel": "c" * 64}, r"public.orders: channel: not a channel name \(1 to 63 bytes\)"),
    ],
)
def test_what_cdc_check_refuses_the_operation_refuses(
    shop: Shop, table: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shop.run(lambda op: op.enable_capture(table, **options))


def test_an_option_nobody_knows_is_refused(shop: Shop) -> None:
    with pytest.raises(TypeError, match="images"):
        shop.run(lambda op: op.enable_capture("public.orders", images="full"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["nte"]}, "public.orders has no column nte"),
        ({"exclude": ["id"]}, "is identified by id, which cannot be left out"),
        ({"when": {"update": "NEW.nothing"}}, "the condition of update for public.orders is wrong"),
    ],
)
def test_what_the_table_does_not_allow_is_refused_with_the_reason(
    shop: Shop, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CommandError, match=message):
        shop.run(lambda op: op.enable_capture("public.orders", **options))


def test_lenient_hides_a_column_that_comes_later(shop: Shop) -> None:
    shop.run(lambda op: op.enable_capture("public.orders", exclude=["secret"], lenient=True))
    shop.configure({"public.order*": {"exclude": ["secret"]}})
    assert shop.drift() == {}


@pytest.mark.parametrize("step", ["enable_capture", "disable_capture"])
def test_without_schema_cdc_the_migration_says_what_to_do(database: str, connect: Connect, step: str) -> None:
    shop = Shop(database, connect(database), Path())
    fetch(shop.writer, "create table orders (id int primary key)")
    with pytest.raises(CommandError, match=r"schema cdc is not installed in this database \(run `cdc migrate` first\)"):
        shop.run(lambda op: getattr(op, step)("public.orders"))


def test_with_an_older_schema_cdc_the_migration_says_what_to_do(shop: Shop) -> None:
    with shop.context() as context:
        command.downgrade(installer.alembic_config(connection=context.connection), "0002")
    with pytest.raises(CommandError, match=r"an older revision than this cdc \(run `cdc migrate` first\)"):
        shop.run(lambda op: op.enable_capture("public.orders"))


@pytest.fixture
def role(shop: Shop) -> Iterator[str]:
    """Somebody who may log in."""
    name = f"{shop.writer.info.dbname}_app"
    fetch(shop.writer, f"create role {name} login")
    yield name
    fetch(shop.writer, f"drop owned by {name}")
    fetch(shop.writer, f"drop role {name}")


def test_somebody_without_the_right_is_told_whose_it_is(shop: Shop, role: str) -> None:
    with pytest.raises(CommandError, match=r"belongs to postgres, not to .* run as the role that runs `cdc migrate`"):
        shop.run(lambda op: op.enable_capture("public.orders"), user=role)


# -- backwards ----------------------------------------------------------------------------------------------------


def test_the_reverse_of_enabling_is_disabling_and_back() -> None:
    enable = EnableCapture("public.orders", {"image": "full"})
    disable = enable.reverse()
    assert isinstance(disable, DisableCapture)
    again = disable.reverse()
    assert again.to_diff_tuple() == enable.to_diff_tuple() == ("enable_capture", "public.orders", {"image": "full"})


def test_the_reverse_of_a_change_is_the_change_back() -> None:
    change = EnableCapture("public.orders", {"image": "full"}, previous={"always": True})
    back = change.reverse()
    assert back.to_diff_tuple() == ("enable_capture", "public.orders", {"always": True})
    assert back.reverse().to_diff_tuple() == change.to_diff_tuple()


def test_a_change_of_what_was_captured_by_default_is_no_first_capture() -> None:
    change = EnableCapture("public.orders", {"image": "full"}, previous={})
    assert change.reverse().to_diff_tuple() == ("enable_capture", "public.orders", {})


def test_disabling_without_knowing_what_cannot_be_reversed() -> None:
    with pytest.raises(ValueError, match="does not know how the table was captured"):
        DisableCapture("public.orders").reverse()


# -- autogenerate -------------------------------------------------------------------------------------------------


def test_nothing_is_written_when_there_is_no_difference(shop: Shop) -> None:
    shop.configure({"public.orders": {"image": "full"}}, channel="bell")
    shop.run(lambda op: op.enable_capture("public.orders", image="full", channel="bell"))
    assert not shop.autogenerate()


def test_without_the_plugin_alembic_is_as_it_was(shop: Shop) -> None:
    shop.configure({"public.orders": {}})
    assert not shop.autogenerate(autogenerate_plugins=["alembic.autogenerate.*"])


def test_a_table_that_is_not_captured_is_enabled(shop: Shop) -> None:
    shop.configure({"public.orders": {}, QUOTED: {"image": "full"}}, notify="always")
    migration = shop.autogenerate()
    assert migration.upgrade == [
        f"op.enable_capture({QUOTED!r}, image='full', notify='always')",
        "op.enable_capture('public.orders', notify='always')",
    ]
    assert migration.downgrade == ["op.disable_capture('public.orders')", f"op.disable_capture({QUOTED!r})"]
    shop.run(executed(migration.upgrade))
    assert shop.drift() == {}
    assert not shop.autogenerate()


def test_a_captured_table_that_the_yaml_does_not_have_is_disabled(shop: Shop) -> None:
    shop.configure({"public.orders": {}})
    shop.run(lambda op: (op.enable_capture("public.orders"), op.enable_capture("public.keyless", key=["code"])))
    before = shop.state("keyless")
    migration = shop.autogenerate()
    assert migration.upgrade == ["op.disable_capture('public.keyless')"]
    assert migration.downgrade == ["op.enable_capture('public.keyless', key=['code'])"]
    shop.run(executed(migration.upgrade))
    assert shop.drift() == {}
    assert shop.state("keyless") == []
    shop.run(executed(migration.downgrade))
    assert shop.state("keyless") == before


@pytest.mark.parametrize(("table", "options"), OPTIONS, ids=OPTION_IDS)
def test_a_change_is_written_and_its_downgrade_restores_what_was(
    shop: Shop, table: str, options: dict[str, Any]
) -> None:
    shop.run(lambda op: op.enable_capture(f"public.{table}", **options))
    before = shop.state(table)
    shop.configure({f"public.{table}": {"always": "always" not in options}})
    migration = shop.autogenerate()
    assert len(migration.upgrade) == 1
    shop.run(executed(migration.upgrade))
    assert shop.drift() == {}
    assert not shop.autogenerate()
    assert shop.state(table) != before
    shop.run(executed(migration.downgrade))
    assert shop.state(table) == before


def test_the_downgrade_names_only_what_is_not_the_default(shop: Shop) -> None:
    shop.run(lambda op: op.enable_capture("public.orders", mask={"note": "hash"}, ops=["delete", "insert"]))
    shop.configure({"public.orders": {}})
    assert shop.autogenerate().downgrade == [
        "op.enable_capture('public.orders', ops=['insert', 'delete'], mask={'note': 'hash'})"
    ]


def test_a_renamed_column_is_hidden_again_by_its_new_name(shop: Shop) -> None:
    shop.run(lambda op: op.enable_capture("public.orders", exclude=["note"], mask={"card": "hash"}))
    fetch(shop.writer, "alter table orders rename note to remark")
    fetch(shop.writer, "alter table orders drop card")
    shop.configure({"public.orders": {}})
    assert shop.autogenerate().downgrade == [
        "op.enable_capture('public.orders', exclude=['remark'], mask={'card': 'hash'}, lenient=True)"
    ]


def test_the_search_path_is_left_as_it_was(shop: Shop) -> None:
    shop.run(lambda op: op.enable_capture("public.orders", when={"delete": "public.paid(OLD.status)"}))
    shop.configure({"public.keyless": {}})
    with shop.context(
        autogenerate_plugins=["alembic.autogenerate.*", "cdc"], cdc_config=shop.config, cdc_database="shop"
    ) as context:
        assert context.connection is not None
        context.connection.exec_driver_sql("set search_path = public, information_schema")
        produce_migrations(context, sa.MetaData())
        assert context.connection.exec_driver_sql("show search_path").scalar() == "public, information_schema"


def test_a_trigger_that_somebody_disabled_is_enabled_again(shop: Shop) -> None:
    shop.configure({"public.orders": {}})
    shop.run(lambda op: op.enable_capture("public.orders"))
    fetch(shop.writer, 'alter table orders disable trigger "00_cdc_capture"')
    migration = shop.autogenerate()
    assert migration.upgrade == ["op.enable_capture('public.orders')"] == migration.downgrade
    shop.run(executed(migration.upgrade))
    assert shop.drift() == {}


def test_a_table_the_migration_creates_is_captured_after_that(shop: Shop) -> None:
    shop.configure({"public.*s": {"exclude": ["note"]}, "public.invoices": {"exclude": ["note"]}})
    shop.run(lambda op: op.enable_capture("public.orders", exclude=["note"]))

    def models(tables: sa.MetaData) -> None:
        for name in ("invoices", "payments"):
            sa.Table(name, tables, sa.Column("id", sa.Integer, primary_key=True), sa.Column("note", sa.Text))
        sa.Table("refunds", tables, sa.Column("id", sa.Integer, primary_key=True))

    migration = shop.autogenerate(models)
    assert [line.split("(")[0] for line in migration.upgrade] == ["op.create_table"] * 3 + ["op.enable_capture"] * 4
    assert migration.upgrade[3:] == [
        "op.enable_capture('public.invoices', exclude=['note'])",
        "op.enable_capture('public.keyless', exclude=['note'], lenient=True)",
        "op.enable_capture('public.payments', exclude=['note'])",
        "op.enable_capture('public.refunds', exclude=['note'], lenient=True)",
    ]


def test_a_table_the_migration_drops_is_disabled_before_and_captured_again_by_the_downgrade(shop: Shop) -> None:
    shop.configure({"public.order*": {}, "public.keyless": {}})
    shop.run(lambda op: (op.enable_capture("public.orders", image="full"), op.enable_capture("public.keyless")))
    migration = shop.autogenerate(lambda tables: tables.remove(tables.tables["orders"]))
    assert migration.upgrade == ["op.disable_capture('public.orders')", "op.drop_table('orders')"]
    assert migration.downgrade[-1] == "op.enable_capture('public.orders', image='full')"
    shop.run(executed(migration.upgrade))
    shop.run(executed(migration.downgrade))
    shop.configure({"public.orders": {"image": "full"}, "public.keyless": {}})
    assert shop.drift() == {}


def test_a_column_the_migration_adds_may_be_hidden_at_once(shop: Shop) -> None:
    shop.configure({"public.orders": {"exclude": ["secret"]}})
    shop.run(lambda op: op.enable_capture("public.orders"))
    migration = shop.autogenerate(lambda tables: tables.tables["orders"].append_column(sa.Column("secret", sa.Text)))
    assert [line.split("(")[0] for line in migration.upgrade] == ["op.add_column", "op.enable_capture"]
    shop.run(executed(migration.upgrade))
    assert shop.drift() == {}
    shop.run(executed(migration.downgrade))
    shop.configure({"public.orders": {}})
    assert shop.drift() == {}


def test_a_hidden_column_the_migration_drops_is_hidden_again_by_the_downgrade(shop: Shop) -> None:
    shop.configure({"public.orders": {}})
    shop.run(lambda op: op.enable_capture("public.orders", exclude=["note"]))

    def models(tables: sa.MetaData) -> None:
        old = tables.tables["orders"]
        tables.remove(old)
        sa.Table(
            "orders",
            tables,
            *(
                sa.Column(c.name, c.type, primary_key=c.primary_key, nullable=c.nullable)
                for c in old.columns
                if c.name != "note"
            ),
        )

    migration = shop.autogenerate(models)
    shop.run(executed(migration.upgrade))
    assert shop.drift() == {}
    shop.run(executed(migration.downgrade))
    fetch(shop.writer, "insert into orders (id, note) values (1, 'secret')")
    assert value(shop.writer, "select new_row::jsonb ? 'note' from cdc.event") is False


def test_what_cannot_be_captured_is_said_at_once(shop: Shop) -> None:
    fetch(shop.writer, "create view totals as select 1 as total")
    shop.configure({"public.totals": {}})
    with pytest.raises(CommandError, match="totals cannot be captured: it is a view"):
        shop.autogenerate()


def test_a_name_that_is_nowhere_is_said_at_once(shop: Shop) -> None:
    shop.configure({"public.nowhere": {}})
    with pytest.raises(CommandError, match=r"public\.nowhere: no such table"):
        shop.autogenerate()


def test_what_include_name_leaves_out_is_left_alone(shop: Shop) -> None:
    fetch(shop.writer, "create schema billing; create table billing.bills (id int primary key)")
    shop.configure({"*.*": {"image": "full"}})
    shop.run(lambda op: op.enable_capture("billing.bills"))

    def include_name(name: str | None, kind: str, _: object) -> bool:
        return {"schema": name is None, "table": name == "orders"}.get(kind, True)

    def models(tables: sa.MetaData) -> None:
        for table in list(tables.tables.values()):
            if table.name != "orders":
                tables.remove(table)

    migration = shop.autogenerate(models, include_schemas=True, include_name=include_name)
    assert migration.upgrade == ["op.enable_capture('public.orders', image='full')"]


def test_schema_cdc_is_not_offered_for_dropping(shop: Shop) -> None:
    def include_name(name: str | None, kind: str, _: object) -> bool:
        return (kind, name) != ("schema", "cdc")

    shop.configure({"public.nothing*": {}})
    assert not shop.autogenerate(include_schemas=True, include_name=include_name)


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # types of ours that SQLAlchemy does not know
def test_nor_is_it_when_env_py_forgets_to_leave_it_out(shop: Shop) -> None:
    shop.configure({"public.nothing*": {}})
    assert not shop.autogenerate(include_schemas=True)


def test_a_reader_may_compare(shop: Shop, role: str) -> None:
    shop.configure({"public.orders": {}})
    shop.run(lambda op: op.enable_capture("public.orders", mask={"note": "hash"}))
    fetch(shop.writer, f"grant cdc_reader to {role}")
    migration = shop.autogenerate(user=role)
    assert migration.upgrade == ["op.enable_capture('public.orders')"]
    assert migration.downgrade == ["op.enable_capture('public.orders', mask={'note': 'hash'})"]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ({"cdc_config": None}, r"which file\? \(context.configure\(…, cdc_config="),
        ({"cdc_database": "shoe"}, r"which database\? \(cdc_database is one of shop\)"),
        ({"cdc_config": "nowhere.yaml"}, "nowhere.yaml: "),
    ],
)
def test_env_py_says_which_file_and_which_database(shop: Shop, opts: dict[str, object], message: str) -> None:
    shop.configure({"public.orders": {}})
    with pytest.raises(CommandError, match=message):
        shop.autogenerate(**opts)


def test_the_only_database_need_not_be_named(shop: Shop) -> None:
    shop.configure({"public.orders": {}})
    assert shop.autogenerate(cdc_database=None)


def test_without_schema_cdc_there_is_nothing_to_compare(database: str, connect: Connect, tmp_path: Path) -> None:
    shop = Shop(database, connect(database), tmp_path / "config.yaml")
    shop.configure({"public.order*": {}})
    with pytest.raises(CommandError, match="schema cdc is not installed"):
        shop.autogenerate()


# -- rendering ----------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=15)
"""Anything a name, or a condition, may be made of."""


@settings(deadline=None)
@given(
    schema=NAMES,
    table=NAMES,
    options=st.fixed_dictionaries(
        {},
        optional={
            "ops": st.permutations(["insert", "update", "delete", "truncate"]),
            "image": st.sampled_from(["diff", "full"]),
            "key": st.lists(NAMES, min_size=1, max_size=3, unique=True),
            "exclude": st.lists(NAMES, max_size=3),
            "when": st.dictionaries(st.sampled_from(["insert", "update", "delete"]), NAMES),
            "always": st.booleans(),
            "delivery": st.sampled_from(["durable", "ephemeral"]),
            "notify": st.sampled_from(["adaptive", "always"]),
            "channel": NAMES,
            "lenient": st.booleans(),
        },
    ),
)
def test_what_is_rendered_evaluates_to_the_same_operation(schema: str, table: str, options: dict[str, Any]) -> None:
    name = ".".join('"' + part.replace('"', '""') + '"' for part in (schema, table))
    enable = EnableCapture(name, options)
    context = MigrationContext.configure(dialect_name="postgresql")
    [line] = code(UpgradeOps([enable]), context)
    assert evaluated(line).to_diff_tuple() == enable.to_diff_tuple()
    [line] = code(UpgradeOps([enable.reverse()]), context)
    assert evaluated(line).to_diff_tuple() == ("disable_capture", name)


def test_defaults_are_not_rendered() -> None:
    written = {
        **{name: field.get_default(call_default_factory=True) for name, field in TableConfig.model_fields.items()},
        **{name: DatabaseConfig.model_fields[name].default for name in OF_THE_DATABASE},
    }
    del written["model"]
    assert EnableCapture("public.orders", written).options == {}
    assert evaluated("op.enable_capture('public.orders')").to_diff_tuple() == ("enable_capture", "public.orders", {})


# -- the document -------------------------------------------------------------------------------------------------


def blocks() -> list[tuple[str, str]]:
    """The document's code blocks with their languages, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def url(dsn: str) -> str:
    """A connection string as a URL, which libpq and SQLAlchemy both understand."""
    parts = parse_dsn(dsn)
    return f"postgresql:///{quote(parts.pop('dbname'))}?{urlencode(parts, quote_via=quote)}"


def functions(source: str) -> dict[str, str]:
    """The functions of a migration, without comments."""
    return {f.name: ast.unparse(f) for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}


def test_the_documented_example_does_what_the_document_says(database: str, connect: Connect, tmp_path: Path) -> None:
    writer = connect(database)
    environment = os.environ | {"SHOP_DSN": url(database), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def run(line: str) -> str:
        done = subprocess.run(
            line.split(), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def recorded() -> list[tuple[Any, ...]]:
        """What becomes of a new order, of another number for it, and of its payment: operations, columns."""
        fetch(writer, "insert into orders values (1, 'new', 'a note')")
        fetch(writer, "update orders set id = 2")
        fetch(writer, "update orders set status = 'paid'")
        found = fetch(writer, "select op, array(select json_object_keys(new_row)) from cdc.event order by seq")
        fetch(
            writer, "set session_replication_role = replica; truncate orders, cdc.event; reset session_replication_role"
        )
        return found

    with_a_condition = [("i", ["id", "status"]), ("u", ["id", "status"])]
    looks: list[tuple[str, Callable[[str], bool]]] = [
        ("alembic upgrade head", lambda _: recorded() == with_a_condition),
        ("alembic check", lambda said: "No new upgrade operations" in said),
        ("cdc check", lambda said: "orders" not in said),
        ("alembic upgrade head", lambda _: recorded() == [*with_a_condition, ("u", ["id", "status"])]),
        ("alembic downgrade -1", lambda _: recorded() == with_a_condition),
        ("alembic upgrade 0001:0002 --sql", lambda said: "select cdc.enable_capture(relation =>" in said),
        ("alembic downgrade base", lambda _: fetch(writer, "select from cdc.captured") == []),
    ]
    for language, block in blocks():
        path = re.match(r"# (\S+)\n", block)
        if language == "sh":
            for line in block.splitlines():
                said = run(line)
                if looks and looks[0][0] == line:
                    assert looks.pop(0)[1](said), f"{line}: {said}"
        elif path is not None and "versions" in path[1]:
            assert functions((tmp_path / path[1]).read_text()) == functions(block)
        elif path is not None:
            (tmp_path / path[1]).write_text(block)
    assert looks == []
