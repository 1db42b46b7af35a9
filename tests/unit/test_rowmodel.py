"""`model:` in the YAML: which rows fit, which do not and what is said of them, and which references lead nowhere."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    create_model,
    field_validator,
    model_validator,
)

from cdc import config as configuration
from cdc.errors import ConfigError
from cdc.event import Event
from cdc.rowmodel import RowModel, exact, load, load_all
from cdc.sinks import option_models

SOURCE = '"source":{"database":"shop","schema":"public","table":"orders","seq":7,"txid":7,"ts":"2026-11-22T08:01:02Z"}'


def event(op: str, *, before: str = "null", after: str = "null", changed: str = "null", more: str = "") -> Event:
    images = f'"key":null,"before":{before},"after":{after},"changed":{changed},"context":null{more}'
    return Event.from_json(f'{{"version":1,"id":"shop-7-1","op":"{op}",{SOURCE},{images}}}')


def insert(row: str) -> Event:
    return event("insert", after=row)


def update(before: str, after: str) -> Event:
    return event("update", before=before, after=after, changed=json.dumps(list(json.loads(after))))


def said(model: type[BaseModel], one: Event, image: Literal["diff", "full"] = "diff") -> str | None:
    reason = RowModel(model, reference="shop:M", image=image).validate(one)
    if reason is None:
        return None
    head = "the row does not fit shop:M: "
    assert reason.startswith(head)
    return reason.removeprefix(head)


class Status(StrEnum):
    NEW = "new"
    PAID = "paid"


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: int
    status: Status
    amount: Annotated[Decimal, Field(ge=0, max_digits=40)] | None
    paid_on: date | None = None

    @model_validator(mode="after")
    def _paid_some_day(self) -> Self:
        if self.status is Status.PAID and self.paid_on is None:
            raise ValueError("4111-1111 paid, and no day of it")
        return self


GOOD = '{"id":1,"status":"new","amount":1.10}'


# -- which rows -------------------------------------------------------------------------------------------------


def test_a_row_that_fits_is_delivered() -> None:
    assert said(Order, insert(GOOD)) is None
    assert said(Order, event("read", after=GOOD)) is None
    assert said(Order, event("delete", before=GOOD)) is None
    assert said(Order, update('{"status":"new"}', '{"status":"paid"}')) is None


def test_whole_rows_are_judged_whole() -> None:
    assert said(Order, insert('{"id":1,"amount":null}')) == "after.status missing"
    assert said(Order, event("read", after='{"id":1,"status":"new","amount":-1}')) == "after.amount greater_than_equal"
    assert said(Order, event("delete", before='{"id":"x","status":"lost"}')) == (
        "before.id int_parsing, before.status enum, before.amount missing"
    )
    assert said(Order, insert('{"id":1,"status":"paid","amount":1}')) == "after.* value_error"


def test_of_a_diff_only_the_given_columns_count() -> None:
    assert said(Order, update('{"amount":1}', '{"amount":-1}')) == "after.amount greater_than_equal"
    assert said(Order, update('{"status":"old","id":1}', '{"status":"paid","id":2}')) == "before.status enum"
    assert said(Order, update('{"note":"x"}', '{"note":"y"}')) == (
        "before.note extra_forbidden, after.note extra_forbidden"
    )
    assert said(Order, update("{}", '{"amount":null}')) is None  # the column is new


def test_both_rows_of_an_update_under_image_full_are_judged_whole() -> None:
    short = '{"id":1,"status":"new"}'
    full = event("update", before=GOOD, after=short, changed='["status"]')
    assert said(Order, full, "full") == said(Order, full, "diff") == "after.amount missing"
    # All columns changed: nothing but the configuration tells it from a diff.
    paid = '{"id":2,"status":"paid","amount":2}'
    assert said(Order, update(GOOD, paid), "full") == "after.* value_error"
    assert said(Order, update(GOOD, paid), "diff") is None


def test_a_diff_from_before_image_full_is_still_judged_as_one() -> None:
    assert said(Order, update('{"status":"new"}', '{"status":"paid"}'), "full") is None
    assert said(Order, update('{"status":"new"}', '{"status":"lost"}'), "full") == "after.status enum"


def test_what_has_no_row_has_nothing_to_judge() -> None:
    assert said(Order, event("truncate")) is None
    assert said(Order, event("insert", more=',"truncated":true')) is None


def test_nothing_that_is_said_is_a_value() -> None:
    class Doc(BaseModel):
        doc: dict[str, int]
        name: Literal["x"]

        @field_validator("name", mode="before")
        @classmethod
        def _named(cls, value: str) -> str:
            raise ValueError(f"{value} is secret")

    reason = said(Doc, insert('{"doc":{"4111-1111":"4222-2222"},"name":"4333-3333"}'))
    assert reason == "after.doc int_parsing, after.name value_error"


def test_a_model_with_a_mistake_of_its_own_is_named_as_that() -> None:
    class Wrong(BaseModel):
        id: int

        @model_validator(mode="before")
        @classmethod
        def _look(cls, data: Any) -> Any:
            return {"id": data["id"], "x": data["status"]}

    assert said(Wrong, insert('{"id":1}')) == "after.* KeyError"
    assert said(Wrong, update('{"id":1}', '{"id":2}')) is None


def test_a_long_list_is_cut() -> None:
    row = "{" + ",".join(f'"c{n:02}":1' for n in range(25)) + "}"

    class Nothing(BaseModel):
        model_config = ConfigDict(extra="forbid")

    reason = said(Nothing, insert(row))
    assert reason is not None
    assert reason.count("extra_forbidden") == 10
    assert reason.endswith("after.c09 extra_forbidden and 15 more")


@pytest.mark.parametrize("by_alias", [True, False])
def test_a_column_is_known_by_its_alias(by_alias: bool) -> None:
    class Aliased(BaseModel):
        model_config = ConfigDict(loc_by_alias=by_alias)

        class_: int = Field(alias="class")
        either: int = Field(validation_alias=AliasChoices("one", AliasPath("other", "deep")))
        missing: int

    assert said(Aliased, update('{"class":1}', '{"class":"x"}')) is not None
    assert said(Aliased, update('{"one":1}', '{"one":"x"}')) is not None
    assert said(Aliased, update('{"other":{"deep":1}}', '{"other":{"deep":"x"}}')) is not None
    assert said(Aliased, update('{"class":1}', '{"class":2}')) is None
    assert said(Aliased, update('{"other":{"deep":1}}', '{"other":{"deep":2}}')) is None


# -- digit for digit --------------------------------------------------------------------------------------------


def seen_by(annotation: Any, raw: str, **config: Any) -> Any:
    """What a validator of a field sees."""
    seen: list[Any] = []

    class Look(BaseModel):
        model_config = ConfigDict(**config)
        v: annotation

        @field_validator("v")
        @classmethod
        def _look(cls, value: Any) -> Any:
            seen.append(value)
            return value

    reason = said(Look, insert(f'{{"v":{raw}}}'))
    return reason if reason is not None else seen[0]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "digits",
    [
        "12345678901234567890.123",
        "0.1000000000000000055511151231257827",
        "9" * 5000,
        "-" + "9" * 1000 + "." + "9" * 1000,
        "0." + "0" * 299 + "1",
        "1.10",
        "7",
        "-9223372036854775808",
    ],
)
def test_a_decimal_has_every_digit(digits: str, strict: bool) -> None:
    assert seen_by(Decimal, digits, strict=strict) == Decimal(digits)


@given(st.decimals(allow_nan=False, allow_infinity=False))
def test_any_decimal_has_every_digit(number: Decimal) -> None:
    assert seen_by(Decimal, format(number, "f")) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_double_is_one_to_a_strict_model(number: float) -> None:
    assert seen_by(float, repr(number), strict=True) == number


def test_a_number_no_double_holds_does_not_fit_a_strict_float() -> None:
    assert seen_by(float, "12345678901234567890.123", strict=True) == "after.v float_type"
    assert seen_by(int, "12345678901234567890", strict=True) == 12345678901234567890


def test_a_strict_model_takes_what_json_writes_as_text() -> None:
    assert seen_by(date, '"2026-11-22"', strict=True) == date(2026, 11, 22)
    assert isinstance(seen_by(datetime, '"2026-11-22T08:01:02.5+00:00"', strict=True), datetime)
    assert isinstance(seen_by(UUID, '"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"', strict=True), UUID)
    assert seen_by(Status, '"paid"', strict=True) is Status.PAID
    assert seen_by(tuple[int, ...], "[1,2]", strict=True) == (1, 2)
    assert seen_by(int, '"1"', strict=True) == "after.v int_type"


@pytest.mark.parametrize(
    "raw",
    [
        '{"b": 1.10,  "a":[1, {}]}',
        r'["\ud800", "\udc00\ud800"]',
        r'"\u0000"',
        "12345678901234567890.10e-400",
        "1e99999999999999999999",
        "[" * 220 + "]" * 220,  # JsonValue itself ends at 255
        "null",
    ],
)
@pytest.mark.parametrize("annotation", [Any, JsonValue])
def test_whatever_a_json_column_holds_fits_where_anything_does(raw: str, annotation: Any) -> None:
    model = create_model("Holder", v=(annotation, ...), id=(int, ...))
    assert said(model, insert(f'{{"v":{raw},"id":1}}')) is None
    assert said(model, insert(f'{{"v":{raw},"id":"x"}}')) == "after.id int_parsing"


def test_numbers_inside_of_texts_are_no_numbers() -> None:
    text = r'{"a\"1.234567890123456789":"1.234567890123456789","b":[1.234567890123456789,-1e400],"c":1.5}'
    assert (
        exact(text)
        == r'{"a\"1.234567890123456789":"1.234567890123456789","b":["1.234567890123456789","-1e400"],"c":1.5}'
    )


def test_a_value_of_thousands_of_levels_fits_where_anything_does() -> None:
    model = create_model("Holder", v=(Any, ...), amount=(Decimal, ...))
    row = f'{{"v":{"[" * 5000 + "]" * 5000},"amount":12345678901234567890.10}}'
    assert said(model, insert(row)) is None
    assert said(model, insert(row.replace(".10}", '.10,"amount":"x"}'))) == "after.amount decimal_parsing"


# -- references -------------------------------------------------------------------------------------------------


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to import from; what was imported is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


MODULE = """
from pydantic import BaseModel

class Order(BaseModel):
    id: int

class Shop:
    class Customer(BaseModel):
        name: str

class Later(BaseModel):
    order: "Nowhere"

number = 1
"""


def test_a_class_is_found_by_module_and_name(modules: Path) -> None:
    (modules / "row_shop.py").write_text(MODULE)
    assert load("row_shop:Order").__name__ == "Order"
    assert load("row_shop:Shop.Customer").__name__ == "Customer"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("row_none:Order", "no module row_none (install it where cdc runs, or put it beside this file)"),
        ("row_shop.deep:Order", "no module row_shop.deep (install it where cdc runs, or put it beside this file)"),
        ("row_needy:Order", "row_needy needs module row_absent (install it where cdc runs)"),
        ("row_broken:Order", "row_broken cannot be imported: SyntaxError (python -c 'import row_broken' says more)"),
        ("row_raises:Order", "row_raises cannot be imported: RuntimeError (python -c 'import row_raises' says more)"),
        ("row_shop:Odrer", "row_shop has no Odrer (name a class it has)"),
        ("row_shop:Order.id", "row_shop has no Order.id (name a class it has)"),
        ("row_shop:number", "number is no pydantic model (name a subclass of pydantic.BaseModel)"),
        ("row_shop:Shop", "Shop is no pydantic model (name a subclass of pydantic.BaseModel)"),
        ("row_shop:Later", "Later names a type that its module does not have (import it there)"),
    ],
)
def test_a_reference_that_leads_to_no_model_says_why(modules: Path, reference: str, message: str) -> None:
    (modules / "row_shop.py").write_text(MODULE)
    (modules / "row_needy.py").write_text("import row_absent")
    (modules / "row_broken.py").write_text("def")
    (modules / "row_raises.py").write_text("raise RuntimeError('hunter2')")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(reference)


CONFIG = """
databases:
  shop:
    dsn: postgresql://cdc@localhost/shop
    tables:
      public.orders: {model: "row_shop:Order"}
      "billing.*": {model: "row_none:Bill"}
      public.plain: {}
  crm:
    dsn: postgresql://cdc@localhost/crm
    tables: {public.people: {model: "row_shop:Shop"}, public.notes: {}}
  log:
    dsn: postgresql://cdc@localhost/log
    tables: {public.log: {}}
sinks:
  out: {type: stdout}
"""


def test_all_that_is_wrong_with_models_comes_at_once_with_its_place(modules: Path) -> None:
    (modules / "row_shop.py").write_text(MODULE)
    path = modules / "c.yaml"
    path.write_text(CONFIG)
    config = configuration.load(path, option_models(), {})  # imports nothing
    with pytest.raises(ConfigError) as raised:
        load_all(config, path)
    assert [finding.removeprefix(f"{path}: ").split(" (")[0] for finding in raised.value.findings] == [
        "databases.shop.tables.billing.*.model: no module row_none",
        "databases.crm.tables.public.people.model: Shop is no pydantic model",
    ]


def test_each_table_has_its_own_model_and_others_have_none(modules: Path) -> None:
    (modules / "row_shop.py").write_text(MODULE)
    path = modules / "c.yaml"
    path.write_text(
        CONFIG.replace("row_none:Bill", "row_shop:Shop.Customer").replace("row_shop:Shop}", "row_shop:Order}")
    )
    path.write_text(path.read_text().replace('"row_shop:Shop"', '"row_shop:Order"'))
    validators = load_all(configuration.load(path, option_models(), {}), path)
    assert set(validators) == {"shop", "crm"}
    validate = validators["shop"]

    def of(schema: str, table: str, row: str) -> str | None:
        line = (
            insert(row)
            .to_json()
            .replace('"schema":"public","table":"orders"', f'"schema":"{schema}","table":"{table}"')
        )
        return validate(Event.from_json(line))

    assert of("public", "orders", '{"id":1}') is None
    assert of("public", "orders", '{"name":"x"}') == "the row does not fit row_shop:Order: after.id missing"
    assert of("billing", "anything", '{"name":"x"}') is None
    assert of("billing", "anything", "{}") == "the row does not fit row_shop:Shop.Customer: after.name missing"
    assert of("public", "plain", "{}") is None
    assert of("public", "elsewhere", "{}") is None


@pytest.mark.parametrize("model", ["shop.models", "shop.models:", ":Order", "shop models:Order", "a:b:c", "1a:B"])
def test_what_is_no_reference_is_refused_when_the_file_is_read(tmp_path: Path, model: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.replace("row_shop:Order", model))
    with pytest.raises(ConfigError) as raised:
        configuration.load(path, option_models(), {})
    (finding,) = raised.value.findings
    assert finding.startswith(
        f"{path}: databases.shop.tables.public.orders.model: not a module and its class (write it"
    )
