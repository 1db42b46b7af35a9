"""The wire model: exact, strict, and the same through every road."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cdc.event import Event, Image, Json, join_object, split_array, split_object, split_row

LINE = (
    '{"version":1,"id":"shop-7-20261122080102123456","op":"update",'
    '"source":{"database":"shop","schema":"public","table":"orders","seq":7,"txid":7512,'
    '"ts":"2026-11-22T08:01:02.123456Z"},"key":{"id":42},"before":{"price":1.10},'
    '"after":{"price":12345678901234567890.123},"changed":["price"],"context":{"actor":"ann"}}'
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.decimals(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


def write(value: object) -> str:
    """A value as PostgreSQL's to_json would: compact, decimals as plain digits."""
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, list):
        return "[" + ",".join(map(write, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k, ensure_ascii=False)}:{write(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def test_a_line_read_and_written_again_is_the_same_line() -> None:
    assert Event.from_json(LINE).to_json() == LINE


def test_a_truncated_event_says_so_and_others_do_not() -> None:
    stub = LINE.replace('"before":{"price":1.10},', '"before":null,')
    stub = stub.replace('"after":{"price":12345678901234567890.123}', '"after":null')
    stub = stub[:-1] + ',"truncated":true}'
    assert Event.from_json(stub).truncated
    assert Event.from_json(stub).to_json() == stub
    assert "truncated" not in Event.from_json(LINE).to_json()


def test_numbers_keep_every_digit_when_looked_at() -> None:
    after = Event.from_json(LINE).after
    assert after is not None
    assert after["price"] == Decimal("12345678901234567890.123")
    assert Image('{"n":9223372036854775807}')["n"] == 9223372036854775807


def test_an_image_is_a_mapping_that_does_not_show_its_values() -> None:
    image = Image('{"a":1,"b":[null]}')
    assert dict(image) == {"a": 1, "b": [None]}
    assert len(image) == 2
    assert image == {"a": 1, "b": [None]}
    assert repr(Image('{"card":"4111"}')) == "<Image of 15 characters>"


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "null",
        "[]",
        "{",
        "{}",
        '{"version":1',
        LINE + "x",
        LINE.replace('"version":1', '"version":2'),
        LINE.replace('"op":"update"', '"op":"upsert"'),
        LINE.replace('"seq":7', '"seq":"7"'),
        LINE.replace('"seq":7', '"seq":7.0'),
        LINE.replace('"key":{"id":42}', '"key":[42]'),
        LINE.replace('"context":', '"surprise":1,"context":'),
        LINE.replace('"ts":"2026-11-22T08:01:02.123456Z"', '"ts":"yesterday"'),
        LINE.replace('"ts":"2026-11-22T08:01:02.123456Z"', '"ts":"2026-11-22T08:01:02"'),
        '{"a":' + "[" * 100_000,
        '{"a":{"b":}}',
    ],
)
def test_a_forged_or_broken_payload_is_a_value_error_and_nothing_else(payload: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # pydantic's error is one, and json's
        Event.from_json(payload)


def test_a_validation_error_does_not_quote_the_row() -> None:
    with pytest.raises(ValidationError) as raised:
        Event.from_json(LINE.replace('"seq":7', '"seq":"secret"'))
    assert "secret" not in str(raised.value)


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=6))
def test_splitting_leaves_every_member_as_it_was_written(row: dict[str, object]) -> None:
    text = write(row)
    expected = {name: write(value) for name, value in row.items()}
    assert split_object(text) == expected
    assert split_row(text) == expected
    assert split_object(join_object(expected)) == expected


@given(st.lists(JSON_VALUES, max_size=6))
def test_an_array_is_split_as_it_was_written(values: list[object]) -> None:
    expected = [write(value) for value in values]
    assert split_array(write(values)) == expected
    assert split_array(f" [\n{' , '.join(expected)}\t] ") == expected


def test_an_array_of_any_depth_is_split() -> None:
    deep = "[" * 3000 + "]" * 3000
    assert split_array(f"[1,{deep}]") == ["1", deep]


@pytest.mark.parametrize("text", ["", "[", "[1", "[1,", "[1,]", "[1 2]", "{}", "1", "[] 1", '["]', "[,1]"])
def test_what_is_no_array_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # its words are nobody's contract
        split_array(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1}',
        '{"a":"x,\\"y\\":{","b":null}',
        '{"a\\"b":1}',
        '{"a":{"b":1},"c":2}',
        '{"a":[1,2],"b":"]"}',
        '{"j":{\n "pretty" : [1,\n 2]}}',
        "{}",
        '{"":""}',
        '{"a":"\\u0000\\ud800"}',
        '{"a":"\\\\"}',
    ],
)
def test_the_fast_road_and_the_careful_road_agree(text: str) -> None:
    assert split_row(text) == split_object(text)


def test_a_json_column_with_line_breaks_stays_one_line() -> None:
    event = Event.from_json(LINE).model_copy(update={"after": Image('{"j":{\r\n"a": 1}}')})
    assert "\n" not in event.to_json()
    assert "\r" not in event.to_json()
    assert json.loads(event.to_json())["after"] == {"j": {"a": 1}}


def test_a_lone_surrogate_in_a_json_column_survives() -> None:
    event = Event.from_json(LINE).model_copy(update={"context": Json('"\\ud800"')})
    assert Event.from_json(event.to_json()).context == "\ud800"
