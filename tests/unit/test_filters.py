"""CEL filters: what compiles, what an event looks like to them, and what cannot be evaluated."""

from __future__ import annotations

import builtins
import re
import threading
from datetime import UTC, datetime
from typing import Any

import pytest

from cdc import filters
from cdc.errors import PermanentFailure
from cdc.event import Event, Image, Json, Op
from cdc.filters import Filter

SECRET = "4929-1234-5678"


def event(
    op: Op = Op.UPDATE,
    *,
    key: str | None = '{"id":42}',
    before: str | None = '{"status":"new"}',
    after: str | None = '{"status":"paid"}',
    changed: tuple[str, ...] | None = ("status",),
    context: str | None = None,
) -> Event:
    return Event.model_validate(
        {
            "id": "shop-7-1",
            "op": op,
            "source": {
                "database": "shop",
                "schema": "public",
                "table": "orders",
                "seq": 7,
                "txid": 1,
                "ts": datetime(2026, 11, 22, 8, 1, 2, 123456, tzinfo=UTC),
            },
            "key": None if key is None else Image(key),
            "before": None if before is None else Image(before),
            "after": None if after is None else Image(after),
            "changed": changed,
            "context": None if context is None else Json(context),
        }
    )


TRUNCATE = event(Op.TRUNCATE, key=None, before=None, after=None, changed=None)


def amounts(number: str) -> Event:
    return event(after=f'{{"amount":{number},"other":1}}')


@pytest.mark.parametrize(
    ("expression", "given"),
    [
        ("op == 'update'", event()),
        ("database + '/' + schema + '.' + table == 'shop/public.orders'", event()),
        ("id == 'shop-7-1'", event()),
        ("ts > timestamp('2026-11-22T08:01:02.123455Z') && ts < timestamp('2026-11-22T08:01:02.123457Z')", event()),
        ("key.id == 42", event()),
        ("before.status == 'new' && after.status == 'paid'", event()),
        ("'status' in changed && size(changed) == 1", event()),
        ("context.actor == 'ann' && context.roles[0] == 'clerk'", event(context='{"actor":"ann","roles":["clerk"]}')),
        # What an event does not have is empty.
        ("!has(after.status) && !has(before.status) && !has(key.id) && size(changed) == 0", TRUNCATE),
        ("!has(context.actor)", event()),
        ("!has(context.actor)", event(context='"no object"')),
        ("after == {}", TRUNCATE),
        # The other side decides, and what is missing does not matter.
        ("op == 'insert' && after.nothing > 1 || true", event()),
        ("op == 'truncate' || after.status == 'paid'", event()),
        # Rows as a whole, names that are no identifiers, nested values.
        ("after.exists(column, after[column] == 'paid')", event()),
        ("after['a b'] == 1 && after[\"c\"] == null", event(after='{"a b":1,"c":null}')),
        ("after.doc.tags.exists(tag, tag == 'x')", event(after='{"doc":{"tags":["y","x"]}}')),
        ("size(after) == 2", event(after='{"a":1,"b":2}')),
        ("after . status == 'paid'", event()),
        ("after // the row\n.status == 'paid'", event()),
        ("(after).status == 'paid'", event()),
        ("after['sta' + 'tus'] == 'paid'", event()),
        ("after.name.size() == 1", event(after='{"name":"\\u00fc"}')),
        # Numbers.
        ("after.amount > 100.0", amounts("150")),
        ("after.amount > 100", amounts("150.5")),
        ("after.amount == 9223372036854775807", amounts("9223372036854775807")),
        ("after.amount == 18446744073709551615u", amounts("18446744073709551615")),
        ("after.amount > 1e19", amounts("18446744073709551616")),
        ("after.amount == 12345678901234567000.0", amounts("12345678901234567890.123")),  # a double
        ("after.amount > 1e300", amounts("9" * 5000)),
        ("after.amount > 1e300", amounts("1e400")),
        ("after.amount < 0", amounts("-9223372036854775809")),
        ("double(after.amount) * 1.5 > 200.0", amounts("150")),
        ("after.amount == 'NaN'", amounts('"NaN"')),  # PostgreSQL writes it as text
        ("type(after.amount) == int && type(before.status) == string", amounts("1")),
    ],
)
def test_a_condition_is_true_of_an_event(expression: str, given: Event) -> None:
    assert Filter(expression).passes(given) is True
    assert Filter(f"!({expression}\n)").passes(given) is False


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("op ==", "not CEL at line 1, column 6 (see docs/delivery.md, Filters)"),
        ("", "not CEL at line 1, column 1 (see docs/delivery.md, Filters)"),
        (
            f"op == 'insert' ||\nsecret == '{SECRET}'",
            "an unknown name at line 2, column 1 (variables: after, before, changed, context, database, id, key, op, "
            "schema, table, ts)",
        ),
        ("op.lower() == 'x'", "an unknown name at line 1, column 9 (variables: after, "),
        ("op == 1", "an operator or function whose operands do not fit at line 1, column 4 (see docs/delivery.md, "),
        (
            "after != null && after.amount > 1",
            "an operator or function whose operands do not fit at line 1, column 7 "
            "(what an event does not have is empty, not null)",
        ),
        ("op", "not a condition: its value is of type string (write one that is true or false)"),
        ("size(changed)", "not a condition: its value is of type int (write one that is true or false)"),
        ("(" * 1000 + "true" + ")" * 1000, "not CEL, or too much of it (see docs/delivery.md, Filters)"),
    ],
)
def test_what_is_no_condition_is_refused_by_its_place_and_not_quoted(expression: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}") as caught:
        filters.check(expression)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("expression", "given", "reason"),
    [
        (
            "after.amount > 1",
            event(),
            "the event does not have a column that it asks for (ask first: has(after.column)",
        ),
        ("after[before.status] == 1", event(before=f'{{"status":"{SECRET}"}}'), "the event does not have a column"),
        ("after.status > 1", event(), "it cannot apply > to string and int64"),
        ("after.a > 1", event(after='{"a":null}'), "it cannot apply > to null_type and int64"),
        ("after.a * 2.0 > 1.0", event(after='{"a":1}'), "it cannot apply * to int64 and double"),
        ("after.a.b == 1", event(after='{"a":null}'), "it looks into a value that holds nothing, such as null"),
        ("int(after.a) > 1", event(after=f'{{"a":"{SECRET}"}}'), "a value cannot be converted"),
        ("after.a + 1 > 1", event(after='{"a":9223372036854775807}'), "a number becomes too large"),
        ("1 / after.a > 1", event(after='{"a":0}'), "it divides by zero"),
        ("op.matches('[')", event(), "it has no valid regular expression"),
        ("after.status", event(), "it gives a string"),
        ("after.a == 'x'", event(after='{"a":"\\ud800"}'), "a value of the event cannot be read"),
        ("after.a == 1", event(after='{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "a value of the event cannot be "),
    ],
)
def test_what_cannot_be_evaluated_is_a_permanent_failure_without_a_value(
    expression: str, given: Event, reason: str
) -> None:
    with pytest.raises(PermanentFailure) as caught:
        Filter(expression).passes(given)
    assert str(caught.value).startswith(f"the filter cannot be evaluated: {reason}")
    assert SECRET not in str(caught.value)


def test_columns_the_condition_does_not_name_are_not_read() -> None:
    given = event(after='{"status":"paid","odd":"\\ud800","deep":' + "[" * 100_000 + "]" * 100_000 + "}")
    # Nested values are skipped, not read: the row itself can be split only if its nesting can.
    with pytest.raises(PermanentFailure):
        Filter("size(after) == 3").passes(given)
    assert Filter("after.status == 'paid'").passes(event(after='{"status":"paid","odd":"\\ud800"}'))
    assert Filter("op == 'update'").passes(given)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("cel_expr_python"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"not installed \(pip install 'table-cdc\[filter\]'\)"):
        filters.check("true")


def test_filters_of_several_threads_do_not_disturb_each_other() -> None:
    wrong: list[int] = []

    def work(least: int) -> None:
        condition = Filter(f"after.amount >= {least}")
        for number in range(2000):
            if condition.passes(amounts(str(number))) is not (number >= least):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(least,)) for least in (10, 500, 1000, 1900)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
