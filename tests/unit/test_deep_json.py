"""JSON nested more deeply than Python's own decoder goes: the same values, the same errors, at any depth."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc import event
from cdc.event import Event, Image, Json, split_object, split_row

DEPTH = 20_000
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@given(JSON_VALUES, st.sampled_from([None, 0, 2]), st.booleans())
def test_the_reader_for_deep_values_reads_others_as_the_usual_one_does(
    value: object, indent: int | None, escaped: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=escaped)
    found, end = event._read_deep(text, 0, raw=False)
    assert end == len(text)
    assert repr(found) == repr(event._decoder.decode(text))


@given(JSON_VALUES, st.integers(0, 200), st.sampled_from('[]{},:"0x '))
def test_whatever_the_usual_reader_refuses_the_one_for_deep_values_refuses_too(
    value: object, place: int, character: str
) -> None:
    text = json.dumps(value)
    place = min(place, len(text))
    spoilt = text[:place] + character + text[place + 1 :]

    def outcome(read: Any) -> object:
        try:
            return repr(read(spoilt))
        except (ValueError, IndexError):
            return None

    assert outcome(lambda text: event._read_deep(text, event._skip(text, 0), raw=False)) == outcome(
        lambda text: event._decoder.raw_decode(text, event._skip(text, 0))
    )


@pytest.mark.parametrize(
    "nest", [("[", "]"), ('{"a":', "}"), ('[1.10, {"b": [', "]}]")], ids=["arrays", "objects", "both"]
)
def test_a_row_is_split_whatever_the_depth_of_its_values(nest: tuple[str, str]) -> None:
    deep = nest[0] * DEPTH + "7" + nest[1] * DEPTH
    for split in (split_object, split_row):
        assert split(f'{{"id":1,"v":{deep},"w":"x"}}') == {"id": "1", "v": deep, "w": '"x"'}


def test_an_event_with_a_deep_value_goes_through_whole_and_can_be_looked_into() -> None:
    deep = "[" * DEPTH + "12345678901234567890.10" + "]" * DEPTH
    line = (
        '{"version":1,"id":"shop-7-1","op":"insert","source":{"database":"shop","schema":"public","table":"t","seq":7,'
        f'"txid":1,"ts":"2026-11-22T08:01:02.123456Z"}},"key":null,"before":null,"after":{{"v":{deep}}},'
        f'"changed":null,"context":{deep}}}'
    )
    found = Event.from_json(line)
    assert found.to_json() == line
    assert isinstance(found.after, Image)
    value = found.after["v"]
    while isinstance(value, list):
        (value,) = value
    assert value == Decimal("12345678901234567890.10")


@pytest.mark.parametrize(
    "end", ["", "]" * (DEPTH - 1), "]" * DEPTH + "x", "}" * DEPTH, ",]" + "]" * DEPTH, "NaN" + "]" * DEPTH]
)
def test_deep_text_that_is_no_json_is_a_value_error(end: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # json's own error is one
        _ = Json("[" * DEPTH + end).value
    with pytest.raises(ValueError):  # noqa: PT011
        split_object('{"v":' + "[" * DEPTH + end + "}")


def test_a_forged_event_that_is_deep_where_it_should_not_be_is_a_value_error() -> None:
    deep = "[" * 3000 + "]" * 3000
    for name in ("version", "id", "op", "source", "key", "changed"):
        with pytest.raises(ValueError):  # noqa: PT011  # pydantic's error is one
            Event.from_json(f'{{"{name}":{deep}}}')
