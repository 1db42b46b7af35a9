"""cdc models: what it writes takes every event there can be, refuses others, and says what they are.

The tables of test_types.py and the random rows of test_random_rows.py are the judges of completeness: every event of
theirs is read by the module written for them, and held against the JSON Schema made of it.
"""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from psycopg2 import sql
from psycopg2.extensions import connection, make_dsn
from pydantic import ValidationError
from test_random_rows import STEPS, Story
from test_random_rows import lab as random_lab  # noqa: F401  a fixture
from test_types import NAMES, ROWS, Golden, Lab, go_through
from written import events_of, load, write

from cdc import models
from cdc.cli import main
from cdc.event import Event

if TYPE_CHECKING:
    from conftest import Server

Connect = Callable[..., connection]

WRONG = [{"no": [1]}]
"""No value of any column, save one of type json."""


class Written:
    """A module, and the JSON Schema made of it."""

    def __init__(self, dsn: str, path: Path) -> None:
        self.path = path
        self.text = write(dsn, path)
        self.module = load(path)
        schema = json.loads(models.json_schema(self.text))
        Draft202012Validator.check_schema(schema)
        # Each table's alone: a validator tries all of oneOf, a hundred here.
        self.schemas = {
            table: Draft202012Validator({"$ref": f"#/$defs/{event.__name__}", "$defs": schema["$defs"]})
            for table, event in self.module.EVENTS.items()
        }

    def read(self, event: Event) -> Any:
        """The event by its class; the schema has to agree that it is one."""
        line = event.to_json()
        typed = self.module.parse(line)
        assert (typed.source.schema_name, typed.source.table) == (event.source.schema_name, event.source.table)
        self.schemas[typed.source.schema_name, typed.source.table].validate(exact(line))
        for image, mine in ((event.before, typed.before), (event.after, typed.after), (event.key, typed.key)):
            assert (image is None) == (mine is None)
            if image is not None:
                # Every column has its field, and no field has a value that was not there.
                assert set(image) == {type(mine).model_fields[name].alias or name for name in mine.model_fields_set}
        return typed

    def refuses(self, event: Event, image: str, column: str) -> bool:
        """Whether the event with a wrong value in one place is no event, to the module and to the schema."""
        document = exact(event.to_json())
        document[image][column] = WRONG
        with pytest.raises(ValidationError):
            self.module.EVENTS[event.source.schema_name, event.source.table].model_validate(document)
        return not self.schemas[event.source.schema_name, event.source.table].is_valid(document)


def exact(line: str) -> Any:
    """JSON with every digit; what no number can hold (in a json column) is text."""

    def number(digits: str) -> object:
        try:
            return Decimal(digits)
        except ArithmeticError:
            return digits

    return json.loads(line, parse_float=number, parse_int=lambda n: int(n) if len(n) < 4000 else Decimal(n))


def mypy(*paths: Path) -> str:
    """What mypy --strict has to say."""
    # What it makes of pydantic is the same for all.
    options = ["--strict", "--no-error-summary", f"--cache-dir={paths[0].parents[1] / 'mypy'}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        cwd=paths[0].parent,
    )
    return done.stdout + done.stderr


def ruff(path: Path) -> str:
    """What ruff has to say by its default rules."""
    command = [Path(sys.executable).with_name("ruff"), "check", "--isolated", "--quiet", "--no-cache", path]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


# -- every type -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every_type(
    server: Server, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Written, dict[str, list[tuple[Golden, list[Event]]]]]]:
    """The models of all tables of the type table, and by type what their rows went through."""
    with closing(Lab(server, template)) as lab:
        rows = [row for row in ROWS if row.since <= lab.version and row.needs not in lab.lacking]
        found: dict[str, list[tuple[Golden, list[Event]]]] = {}
        for row in rows:
            kept, _ = lab.tables_with(row.type)
            go_through(lab, kept, f"cast({row.written} as {row.type})", "null")
            go_through(lab, kept, f"cast({row.written} as {row.type})", "repeat('x', 5000)")
            found.setdefault(row.type, []).append((row, lab.events()))
        yield Written(lab.writer.dsn, tmp_path_factory.mktemp("models") / "every_type.py"), found


def test_the_models_take_every_event_of_the_type_table(every_type: tuple[Written, Any]) -> None:
    written, found = every_type
    number = 0
    for rows in found.values():
        for _, events in rows:
            for event in events:
                typed = written.read(event)
                assert isinstance(typed.after or typed.before, written.module.Row) == (event.op != "update")
                number += 1
    assert number >= 9 * len(ROWS) * 0.9  # five or three events, twice


def test_a_wrong_value_is_refused_whatever_the_type(every_type: tuple[Written, Any]) -> None:
    written, found = every_type
    accepted = set()
    for type_, rows in found.items():
        for _, events in rows:
            inserted, deleted = events[0], events[-1]
            try:
                assert written.refuses(inserted, "after", "v")
                assert written.refuses(deleted, "before", "v")
            except pytest.fail.Exception:
                accepted.add(type_)
            assert written.refuses(inserted, "after", "id")
            assert written.refuses(inserted, "key", "id")
    assert accepted == {"json", "jsonb", "json[]", "document"}


PYTHON: dict[str, tuple[type, ...]] = {
    "smallint": (int,),
    "bigint": (int,),
    "numeric": (Decimal,),
    "numeric(10,2)": (Decimal,),
    "real": (float,),
    "double precision": (float,),
    "money": (str,),
    "text": (str,),
    "citext": (str,),
    "bytea": (str,),
    "bit(8)": (str,),
    "boolean": (bool,),
    "date": (date, str),
    "time": (time, str),
    "time with time zone": (time, str),
    "timestamp": (datetime, str),
    "timestamp with time zone": (datetime, str),
    "interval": (str,),
    "uuid": (UUID,),
    "inet": (str,),
    "xml": (str,),
    "tsvector": (str,),
    "point": (str,),
    "int4range": (str,),
    "int4multirange": (str,),
    "integer[]": (list,),
    "int2vector": (list,),
    "mood": (StrEnum,),
    "whim": (StrEnum,),
    "price": (Decimal,),
    "hstore": (dict,),
    "regclass": (str,),
}


def test_values_become_what_python_has_for_them_and_keep_every_digit(every_type: tuple[Written, Any]) -> None:
    written, found = every_type
    for type_, kinds in PYTHON.items():
        if type_ not in found:
            continue
        values = [(row, written.read(events[0]).after.v) for row, events in found[type_]]
        for row, value in values:
            assert isinstance(value, kinds), (row, value)
            if kinds == (Decimal,):
                assert value.as_tuple() == Decimal(row.event.strip('"')).as_tuple()
        for kind in kinds:
            assert any(isinstance(value, kind) for _, value in values), f"no {kind} among {type_}"


def test_what_python_has_no_object_for_stays_as_postgresql_wrote_it(every_type: tuple[Written, Any]) -> None:
    written, found = every_type
    for type_ in ("date", "time", "time with time zone", "timestamp", "timestamp with time zone"):
        texts = [
            (row.event, typed)
            for row, events in found[type_]
            if isinstance(typed := written.read(events[0]).after.v, str)
        ]
        assert texts
        assert all(json.loads(event) == typed for event, typed in texts)


def test_mypy_and_ruff_accept_the_module_of_every_type(every_type: tuple[Written, Any]) -> None:
    written, _ = every_type
    assert mypy(written.path) == ""
    assert ruff(written.path) == ""


# -- random rows ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_rows(random_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Written:  # noqa: F811
    return Written(random_lab.writer.dsn, tmp_path_factory.mktemp("models") / "random_rows.py")


@pytest.mark.parametrize("table", ["diff", "full"])
@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_the_models_take_every_event_of_random_rows(
    random_lab: Lab,  # noqa: F811
    random_rows: Written,
    table: str,
    steps: list[tuple[str, int, dict[str, str | None]]],
) -> None:
    lab, written = random_lab, random_rows
    lab.run(f"truncate public.{table}")
    lab.events()
    story = Story(lab, table)
    for step in steps:
        story.take(step)
    for event in lab.events():
        typed = written.read(event)
        image = typed.after if event.after is not None else typed.before
        partial = table == "diff" and event.op == "update" and len(event.changed or ()) < len(typed.after.__dict__)
        assert isinstance(image, written.module.Change if partial else written.module.Row)


# -- a small shop -----------------------------------------------------------------------------------------------

SHOP = r"""
    create type status as enum ('new', 'paid', 'so "so"', '2nd', '🛒', '');
    comment on type status is 'Where an order stands.';
    create type place as (street text, "no." integer);
    create domain money_ as numeric(12, 2) check (value >= 0);
    create schema billing;
    create table orders (
        id bigint primary key, status status not null, amount money_, ship_to place, lines text[],
        "class" text, "model_dump" text, "1st" text, "a b" text, a_b text, _private text, date date,
        email text, card text not null, doc jsonb not null, secret text,
        total numeric generated always as (amount * 2) stored
    );
    comment on column orders.amount is 'In "euro", with \ cents';
    create table billing.orders (customer integer, no integer, at timestamptz not null, primary key (customer, no));
    create table log (line text not null);
    select cdc.enable_capture(
        'orders', mask => '{"email": "hash", "card": "redact", "doc": "hash"}', exclude => '{secret}');
    select cdc.enable_capture('billing.orders', image => 'full');
    select cdc.enable_capture('log');
"""
ABOUT_ORDERS = 'What customers have """ordered""" \\.\n\nIt says "paid"'


@pytest.fixture
def shop(installed: str, connect: Connect) -> Any:
    """A cursor on a database with three captured tables."""
    cursor = connect(installed).cursor()
    cursor.execute(SHOP)
    cursor.execute("comment on table orders is %s", (ABOUT_ORDERS,))
    return cursor


@pytest.fixture
def config(installed: str, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    tables: dict[str, object] = {"*.*": {}}
    content = {
        "databases": {"shop": {"dsn": installed, "tables": tables}},
        "sinks": {"audit": {"type": "file", "path": str(tmp_path / "out.jsonl")}},
    }
    path.write_text(json.dumps(content))
    return path


def run(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["-c", str(config), "models", *arguments])


@pytest.fixture
def written(shop: Any, installed: str, tmp_path: Path) -> ModuleType:
    write(installed, tmp_path / "shop_models.py")
    return load(tmp_path / "shop_models.py")


def test_the_module_says_what_the_catalogue_says(written: ModuleType) -> None:
    order = written.Orders
    assert inspect.cleandoc(order.__doc__) == ABOUT_ORDERS
    assert order.model_fields["amount"].description == 'In "euro", with \\ cents'
    assert written.Status.__doc__ == "Where an order stands."
    assert {member.name: member.value for member in written.Status} == {
        "NEW": "new",
        "PAID": "paid",
        "SO_SO": 'so "so"',
        "VALUE_2ND": "2nd",
        "VALUE": "🛒",
        "VALUE2": "",
    }
    assert {name: field.alias for name, field in order.model_fields.items() if field.alias} == {
        "class_": "class",
        "model_dump_": "model_dump",
        "column_1st": "1st",
        "a_b2": "a b",
        "private": "_private",
    }
    assert list(order.model_fields)[-4:] == ["email", "card", "doc", "total"]
    assert written.Place.model_fields["no_"].alias == "no."
    assert list(written.EVENTS) == [("billing", "orders"), ("public", "log"), ("public", "orders")]
    assert written.LogEvent.model_fields["key"].annotation is type(None)
    assert list(written.BillingOrdersKey.model_fields) == ["customer", "no"]


def test_masked_columns_are_text_and_null_only_where_the_event_may_have_null(written: ModuleType) -> None:
    (orders,) = (
        node
        for node in ast.parse(Path(written.__file__ or "").read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Orders"
    )
    annotations = {
        ast.unparse(field.target): ast.unparse(field.annotation)
        for field in orders.body
        if isinstance(field, ast.AnnAssign)
    }
    assert annotations["email"] == "str | None"
    assert annotations["card"] == "str"
    assert annotations["doc"] == "str | None"  # the JSON value null is not hashed
    assert annotations["date"] == "Date | None"
    assert annotations["lines"] == "Array[str] | None"
    assert annotations["amount"] == "Numeric | None"
    assert annotations["status"] == "Status"


def line(op: str, table: str = "orders", schema: str = "public", **fields: object) -> str:
    source = {"database": "shop", "schema": schema, "table": table, "seq": 1, "txid": 2, "ts": "2026-11-22T08:01:02Z"}
    whole = {"before": None, "after": None, "key": None, "changed": None, "context": None, **fields}
    return json.dumps({"version": 1, "id": "shop-1", "op": op, "source": source, **whole})


LOG = {"line": "x"}
BILL = {"customer": 1, "no": 2, "at": "2026-11-22T08:01:02+00:00"}
BILLING = {"schema": "billing", "key": {"customer": 1, "no": 2}}


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (line("insert", "log", after=LOG), True),
        (line("read", "log", after=LOG), True),
        (line("delete", "log", before=LOG), True),
        (line("update", "log", before=LOG, after={"line": "y"}, changed=["line"]), True),
        (line("update", "log", before={}, after=LOG, changed=["line"]), True),  # the column is new
        (line("truncate", "log"), True),
        (line("insert", "log", truncated=True), True),
        (line("insert", "log"), False),
        (line("insert", "log", after={}), False),
        (line("insert", "log", after={"line": None}), False),
        (line("insert", "log", after=LOG, before=LOG), False),
        (line("delete", "log", after=LOG), False),
        (line("update", "log", after=LOG, changed=["line"]), False),
        (line("truncate", "log", before=LOG), False),
        (line("insert", "log", after=LOG, truncated=True), False),
        (line("insert", "log", after=LOG, key={"line": "x"}), False),
        (line("upsert", "log", after=LOG), False),
        (line("insert", after=BILL, **BILLING), True),
        (line("update", before=BILL, after=BILL, changed=[], **BILLING), True),
        (line("update", before={"no": 1}, after={"no": 2}, changed=["no"], **BILLING), False),  # image: full
        (line("insert", after={**BILL, "at": 5}, **BILLING), False),  # not 1970
        (line("insert", after={**BILL, "no": "2"}, **BILLING), False),
        (line("insert", after={**BILL, "no": True}, **BILLING), False),
        (line("insert", after={**BILL, "added_later": 1}, **BILLING), True),
    ],
)
def test_an_event_has_the_images_of_its_operation(installed: str, written: ModuleType, text: str, good: bool) -> None:
    schema = Draft202012Validator(json.loads(models.json_schema(Path(written.__file__ or "").read_text())))
    if good:
        assert written.parse(text).op == json.loads(text)["op"]
        assert type(written.parse(text)).model_validate_json(text) == written.parse(text)
    else:
        with pytest.raises(ValidationError):
            written.parse(text)
    assert schema.is_valid(json.loads(text)) is good


def test_an_event_of_another_table_is_not_taken_for_one_of_these(written: ModuleType) -> None:
    with pytest.raises(KeyError):
        written.parse(line("truncate", "customers"))
    with pytest.raises(ValidationError):
        written.LogEvent.model_validate_json(line("truncate", "customers"))
    with pytest.raises(ValidationError):
        written.parse("[]")


def test_json_is_read_digit_for_digit(written: ModuleType) -> None:
    place = written.Orders.model_fields
    text = '{"line": "x", "n": 12345678901234567890.123}'
    assert written.Log.model_validate_json(text).line == "x"
    assert "amount" in place
    amount = "12345678901234567890.10"
    event = line("update", before={"amount": None}, after={"amount": 0}, changed=["amount"], key={"id": 1})
    typed = written.parse(event.replace('"amount": 0', f'"amount": {amount}'))
    assert str(typed.after.amount) == amount
    assert typed.after.model_fields_set == {"amount"}
    assert typed.after.status is None


USE = """
from decimal import Decimal
from typing import assert_type

from shop_models import (
    BillingOrders, BillingOrdersEvent, Orders, OrdersChange, OrdersEvent, OrdersKey, Place, Status, parse
)


def use(line: str) -> None:
    event = parse(line)
    match event:
        case OrdersEvent(op="insert", after=Orders() as order):
            assert_type(order.id, int)
            assert_type(order.status, Status)
            assert_type(order.amount, Decimal | None)
            assert_type(order.ship_to, Place | None)
            assert_type(order.card, str)
        case OrdersEvent():
            assert_type(event.key, OrdersKey | None)
            assert_type(event.after, Orders | OrdersChange | None)
            if event.after is not None:
                assert_type(event.after.amount, Decimal | None)
        case BillingOrdersEvent():
            assert_type(event.after, BillingOrders | None)
        case _:
            pass
"""


def test_mypy_knows_the_columns(written: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(USE)
    assert mypy(tmp_path / "use.py", tmp_path / "shop_models.py") == ""
    misuse = "import shop_models\n\n\ndef f(o: shop_models.Orders) -> int:\n    return o.status\n"
    (tmp_path / "misuse.py").write_text(misuse)
    assert "Incompatible return value type" in mypy(tmp_path / "misuse.py")


def test_ruff_has_nothing_to_say_and_nothing_to_format(written: ModuleType) -> None:
    path = Path(written.__file__ or "")
    assert ruff(path) == ""
    command = [Path(sys.executable).with_name("ruff"), "format", "--isolated", "--no-cache", "--diff", path]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stdout == ""


def test_real_events_of_the_shop_are_taken(shop: Any, installed: str, written: ModuleType, connect: Connect) -> None:
    shop.execute(
        "insert into orders (id, status, amount, ship_to, lines, card, email, doc, secret)"
        " values (1, '🛒', 1.10, row('Main', 1), '{{a,b},{c,null}}', 'card', 'e', 'null', 's');"
        "update orders set amount = 2, secret = 't'; delete from orders; truncate log"
    )
    inserted, updated, deleted, truncated = (written.parse(event.to_json()) for event in events_of(installed))
    assert inserted.after.status is written.Status.VALUE
    assert inserted.after.ship_to == written.Place.model_validate({"street": "Main", "no.": 1})
    assert inserted.after.lines == [["a", "b"], ["c", None]]
    assert (inserted.after.card, inserted.after.doc, len(inserted.after.email)) == ("***", None, 64)
    assert (updated.before.amount, updated.after.amount, updated.after.total) == (Decimal("1.10"), 2, 4)
    assert (updated.changed, updated.key.id) == (("amount", "total"), 1)
    assert deleted.before.amount == 2
    assert isinstance(truncated, written.LogEvent)
    assert truncated.source.ts.tzinfo == UTC or truncated.source.ts.utcoffset() is not None


def test_a_not_null_that_old_rows_need_not_keep_promises_nothing(
    shop: Any, installed: str, tmp_path: Path, server: Server
) -> None:
    if server.version < 180000:
        pytest.skip("PostgreSQL 18 and later")
    shop.execute("alter table billing.orders add note text, add constraint n not null note not valid")
    write(installed, tmp_path / "m.py")
    assert str(load(tmp_path / "m.py").BillingOrders.model_fields["note"].annotation) == "str | None"


def test_what_a_virtual_column_holds_is_not_in_the_models(
    shop: Any, installed: str, tmp_path: Path, server: Server
) -> None:
    if server.version < 180000:
        pytest.skip("PostgreSQL 18 and later")
    shop.execute("alter table billing.orders add twice integer generated always as (no * 2) virtual")
    write(installed, tmp_path / "m.py")
    assert "twice" not in load(tmp_path / "m.py").BillingOrders.model_fields


def test_a_column_that_was_renamed_stays_hidden(shop: Any, installed: str, tmp_path: Path) -> None:
    shop.execute("alter table orders rename secret to note; alter table orders rename email to mail")
    write(installed, tmp_path / "m.py")
    order = load(tmp_path / "m.py").Orders
    assert "note" not in order.model_fields
    assert "masked: hash" in next(x for x in (tmp_path / "m.py").read_text().splitlines() if x.startswith("    mail: "))


def test_a_key_column_that_was_renamed_is_in_the_key(shop: Any, installed: str, tmp_path: Path) -> None:
    shop.execute("alter table orders rename id to number")
    write(installed, tmp_path / "m.py")
    assert list(load(tmp_path / "m.py").OrdersKey.model_fields) == ["number"]


def test_a_partitioned_table_is_one_and_its_partitions_are_none(shop: Any, installed: str, tmp_path: Path) -> None:
    shop.execute("""
        create table parted (id integer primary key) partition by range (id);
        create table parted_1 partition of parted for values from (0) to (10);
        select cdc.enable_capture('parted');
    """)
    write(installed, tmp_path / "m.py")
    assert [name for _, name in load(tmp_path / "m.py").EVENTS] == ["orders", "log", "orders", "parted"]


def test_a_type_with_somebodys_cast_to_json_may_be_anything(shop: Any, installed: str, tmp_path: Path) -> None:
    shop.execute("""
        create type spin as enum ('up', 'down');
        create function spin_json(spin) returns json immutable language sql as 'select to_json($1 = ''up'')';
        create cast (spin as json) with function spin_json(spin);
        create table atom (id integer primary key, spin spin not null);
        select cdc.enable_capture('atom');
        insert into atom values (1, 'up');
    """)
    write(installed, tmp_path / "m.py")
    (event,) = events_of(installed)
    assert load(tmp_path / "m.py").parse(event.to_json()).after.spin is True


# -- hostile names and comments -----------------------------------------------------------------------------------

EVIL = '"""\nimport os; os.abort()\n"""\\" \\\\"""" \\'
MAKE = """
    create schema {types};
    create type {type} as enum ({label}, {other_label});
    create schema {name};
    create table {table} ({name} {type} primary key, {other} text);
    select cdc.enable_capture({regclass}::regclass);
    comment on type {type} is {comment};
    comment on table {table} is {comment};
    comment on column {column} is {comment};
    insert into {table} values ({label}, 'x');
"""


def test_nothing_of_the_database_becomes_code(installed: str, connect: Connect, tmp_path: Path) -> None:
    conn = connect(installed)
    shop = {
        "Order",
        "Orders",
        "orders",
        "Event",
        "event",
        "Model",
        "None",
        "def",
        "self",
        "Field",
        "str",
        "value_error",
    }
    names = sorted({*NAMES.values(), *shop})
    for number, name in enumerate(names):
        parts: dict[str, sql.Composable] = {
            "types": sql.Identifier(f"s{number}"),
            "type": sql.Identifier(f"s{number}", name),
            "name": sql.Identifier(name),
            "other": sql.Identifier(name[:-1] + "z"),
            "table": sql.Identifier(name, name),
            "column": sql.Identifier(name, name, name),
            "regclass": sql.Literal(sql.Identifier(name, name).as_string(conn)),
            "label": sql.Literal(name),
            "other_label": sql.Literal(name[:-1] + "z"),
            "comment": sql.Literal(EVIL),
        }
        with conn.cursor() as cursor:
            cursor.execute(sql.SQL(MAKE).format(**parts))
    text = write(installed, tmp_path / "m.py")
    module = load(tmp_path / "m.py")
    assert set(module.EVENTS) == {(name, name) for name in names}
    assert ruff(tmp_path / "m.py") == ""
    assert mypy(tmp_path / "m.py") == ""
    assert calls(text) == calls(write(installed, tmp_path / "one.py", "Order.Order"))
    for event in events_of(installed):
        row = module.parse(event.to_json()).after
        assert set(event.after or ()) == {type(row).model_fields[name].alias or name for name in row.model_fields_set}
        assert inspect.cleandoc(type(row).__doc__) == inspect.cleandoc(EVIL)
    assert len(json.loads(models.json_schema(text))["oneOf"]) == len(names)


def calls(text: str) -> set[str]:
    """What a module calls."""
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}


# -- the command ------------------------------------------------------------------------------------------------


def test_the_command_writes_the_module_to_stdout_and_nothing_else(shop: Any, config: Path, tmp_path: Path) -> None:
    first, second = run(config), run(config)
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout
    assert first.stderr == ""
    head = first.stdout.splitlines()[:2]
    assert head[0].startswith("# Models of the events of database shop, written by cdc ")
    assert head[1] == "# Tables: billing.orders, public.log, public.orders"
    (tmp_path / "m.py").write_text(first.stdout)
    assert set(load(tmp_path / "m.py").EVENTS) == {("billing", "orders"), ("public", "log"), ("public", "orders")}


def test_tables_may_be_named_and_a_file_too(shop: Any, config: Path, tmp_path: Path) -> None:
    result = run(config, "billing.*", "public.log", "-o", str(tmp_path / "m.py"))
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"{tmp_path / 'm.py'}: models of 2 tables\n"
    assert set(load(tmp_path / "m.py").EVENTS) == {("billing", "orders"), ("public", "log")}


@pytest.mark.parametrize("arguments", [("--json",), ("--format", "jsonschema")])
def test_a_json_schema_may_be_had_instead(shop: Any, config: Path, arguments: tuple[str, ...]) -> None:
    schema = json.loads(run(config, *arguments).stdout)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$defs"]["Orders"]["properties"]["amount"]["description"] == 'In "euro", with \\ cents'
    assert schema["$defs"]["Status"]["enum"] == ["new", "paid", 'so "so"', "2nd", "🛒", ""]
    assert len(schema["oneOf"]) == 3


def test_tables_of_any_name_are_in_the_json_schema(shop: Any, config: Path) -> None:
    for name in ("größe", "grüße", "注文", "Größe"):  # of some, pydantic makes the same key
        shop.execute(f'create table "{name}" (id int primary key, "ß" int); select cdc.enable_capture(\'"{name}"\')')
    schema = json.loads(run(config, "--json", "public.*r*e", "public.注文").stdout)
    Draft202012Validator.check_schema(schema)
    events = [schema["$defs"][one["$ref"].removeprefix("#/$defs/")] for one in schema["oneOf"]]
    assert len(schema["oneOf"]) == len({one["$ref"] for one in schema["oneOf"]}) == 4
    assert all("oneOf" in event["then"] for event in events)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("a.b",), 1, "no captured table is a.b (captured: billing.orders, public.log, public.orders)"),
        (("orders",), 2, "orders: a table without a schema (write public.orders)"),
        (("-d", "shap"), 78, "no database shap in the configuration (known: shop)"),
        (("--json", "--format", "pydantic"), 2, "--json is --format jsonschema"),
        (("-o", "/dev/full/x"), 1, "/dev/full/x cannot be written: Not a directory"),
    ],
)
def test_what_cannot_be_done_is_said(
    shop: Any, config: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = run(config, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


def test_models_are_of_one_database(shop: Any, config: Path) -> None:
    content = json.loads(config.read_text())
    content["databases"]["other"] = content["databases"]["shop"]
    config.write_text(json.dumps(content))
    result = run(config)
    assert result.exit_code == 2
    assert "models are of one database: name it with -d" in result.stderr
    assert run(config, "-d", "other").stdout.startswith("# Models of the events of database other,")


def test_without_captures_or_without_the_schema_it_says_what_to_do(installed: str, database: str, config: Path) -> None:
    result = run(config)
    assert (result.exit_code, result.stderr) == (
        1,
        "error: no table is captured in this database (run cdc migrate)\n",
    )
    config.write_text(config.read_text().replace(installed, database))
    result = run(config)
    assert result.exit_code == 1
    assert "cdc is not installed in this database" in result.stderr


def test_the_daemons_role_is_enough(shop: Any, installed: str, connect: Connect, tmp_path: Path) -> None:
    role = f"models_{uuid.uuid4().hex}"
    shop.execute(f"create role {role} login; grant cdc_reader to {role}")
    try:
        write(make_dsn(installed, user=role), tmp_path / "m.py")
    finally:
        shop.execute(f"drop role {role}")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_the_same_text_as_a_literal_and_as_a_docstring(text: str) -> None:
    assert ast.literal_eval(models.names.literal(text)) == text
    if text.strip():
        lines = models.names.docstring(text, "    ")
        (definition,) = ast.parse("class C:\n" + "\n".join(lines) + "\n").body
        assert isinstance(definition, ast.ClassDef)
        (only,) = definition.body
        assert isinstance(only, ast.Expr)
        said = ast.get_docstring(definition)
        assert said is not None
        assert "".join(said.split()) == "".join(text.split())
