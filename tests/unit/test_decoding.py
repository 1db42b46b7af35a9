"""What two images differ in, however their text is made; and events that make their fields when asked."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdc.decoding import CapturedTable, Decoder, RowEvent, Unreadable, _split_difference, difference
from cdc.event import Event, Image, Op

ORDERS = CapturedTable(1, "public", "orders", ("id",), "diff")
WHOLE = CapturedTable(2, "public", 'or"ders', ("a", "id"), "full")
AT = "2026-11-22T08:01:02.123456Z"


def decoder(catalogue: tuple[str, ...] = ()) -> Decoder:
    tables = {1: ORDERS, 2: WHOLE, 3: CapturedTable(3, "public", "log", None, "diff")}
    return Decoder("shop", tables.__getitem__, lambda table: catalogue)


def one(row: tuple[Any, ...], catalogue: tuple[str, ...] = ()) -> Event | Unreadable:
    (event,) = decoder(catalogue).decode([row])
    return event


def update(old: str, new: str, table: int = 1) -> Event:
    event = one((7, "9", AT, table, "u", old, new, None))
    assert isinstance(event, Event)
    return event


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.text(alphabet=st.sampled_from(list('ab,":{}[]\\ \n\t€'))),
        st.floats(allow_nan=False, allow_infinity=False),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=3)),
    max_leaves=4,
)
NAMES = st.text(alphabet=st.sampled_from(list('ab,":{}\\ é')), max_size=4)
ROWS = st.lists(st.tuples(NAMES, VALUES, VALUES, st.booleans()), max_size=6, unique_by=lambda member: member[0])


def image(members: dict[str, object]) -> str:
    return json.dumps(members, ensure_ascii=False, separators=(",", ":"))


@given(ROWS)
@example([("a", "x,", "x,", True), ("b", "y", "y,", False)])
@example([("a", "x,", "x", False), ("b", "y", "y,", False)])
@example([("a", ',"b":1', "x", False), ("b", 1, 2, False)])
@example([("a,", 5, 6, False), ("b", 1, 1, True)])
@example([(",", ":x,", ":y,", False), ("b", 1, 1, True)])
@example([("j", {"b": 1, "c": 2, "d": 3}, {"b": 1, "c": 4, "d": 3}, False), ("c", 2, 2, True)])
def test_the_quick_way_finds_what_the_thorough_one_finds(rows: list[tuple[str, object, object, bool]]) -> None:
    old = image({name: was for name, was, _, _ in rows})
    new = image({name: was if same else is_ for name, was, is_, same in rows})
    assert difference(old, new) == _split_difference(old, new)


def test_columns_that_came_or_went_between_the_two_images_are_in_the_difference() -> None:
    assert difference('{"a":1,"b":2}', '{"a":1,"b":2,"c":3}') == ("{}", '{"c":3}', ("c",))
    assert difference('{"a":1,"b":2}', '{"a":1}') == ("{}", "{}", ())
    assert difference('{"a":1,"b":2}', '{"a":1,"c":2}') == ("{}", '{"c":2}', ("c",))


def test_an_event_of_a_row_is_the_event_that_its_json_says() -> None:
    old, new = '{"id":1,"v":"a\\"","n":1.10}', '{"id":1,"v":"b","n":1.10}'
    for row in (
        (1, "5", AT, 1, "u", old, new, '{"actor": "ann"}'),
        (2, "5", AT, 1, "i", None, new, "no json"),
        (3, "5", AT, 1, "d", old, None, None),
        (4, "5", AT, 1, "t", None, None, None),
        (5, "5", AT, 1, "U", None, '{"id":1}', None),
        (6, "5", AT, 2, "u", '{"a":1,"id":2,"x":3}', '{"a":1,"id":2,"x":4}', None),
        (7, "5", AT, 3, "i", None, '{"x":[1,\r\n2]}', None),
    ):
        event = one(row)
        assert isinstance(event, RowEvent)
        assert "\n" not in event.to_json()
        read = Event.from_json(event.to_json())
        assert read == event.complete() == event == read
        assert hash(event) == hash(event.complete())
        assert repr(event) == repr(read)
        assert read.to_json() == event.to_json() == event.complete().to_json()
        assert type(event.complete()) is Event
        assert event.route == read.route
        assert event.complete().model_dump() == read.model_dump()


def test_the_fields_of_an_event_are_those_of_its_row() -> None:
    event = update('{"id":1,"v":"a"}', '{"id":1,"v":"b"}')
    assert (event.version, event.id, event.op) == (1, "shop-7-20261122080102123456", Op.UPDATE)
    assert (event.key, event.before, event.after) == ({"id": 1}, {"v": "a"}, {"v": "b"})
    assert event.changed == ("v",)
    assert (event.context, event.truncated) == (None, False)
    source = event.source
    assert (source.database, source.schema_name, source.table, source.seq, source.txid) == (
        "shop",
        "public",
        "orders",
        7,
        9,
    )
    assert source.ts == datetime(2026, 11, 22, 8, 1, 2, 123456, tzinfo=UTC)
    assert event.key is event.key
    with pytest.raises(AttributeError):
        _ = event.nothing  # type: ignore[attr-defined]


def test_a_key_is_found_wherever_it_stands() -> None:
    assert update('{"v":1,"id":"a,\\"b"}', '{"v":2,"id":"a,\\"b"}').key == {"id": 'a,"b'}
    assert update('{"x":0,"id":2,"a":{"b":1}}', '{"x":1,"id":2,"a":{"b":1}}', 2).key == {"a": {"b": 1}, "id": 2}


def test_a_key_that_was_renamed_is_looked_up_in_the_catalogue() -> None:
    row = (7, "9", AT, 1, "i", None, '{"number":1,"v":2}', None)
    renamed, gone = one(row, ("number",)), one(row, ("other",))
    assert isinstance(renamed, Event)
    assert isinstance(gone, Event)
    assert renamed.key == Image('{"number":1}')
    assert gone.key is None


@pytest.mark.parametrize(
    "row",
    [
        (7, "9", AT, 99, "i", None, '{"id":1}', None),
        (7, "x", AT, 1, "i", None, '{"id":1}', None),
        (7, "9", "yesterday", 1, "i", None, '{"id":1}', None),
        (7, "9", AT, 1, "x", None, '{"id":1}', None),
        (7, "9", AT, 1, "u", "[1]", '{"id":1}', None),
    ],
    ids=["unknown table", "txid", "time", "op", "no object"],
)
def test_a_row_that_is_no_event_spoils_nothing_else(row: tuple[Any, ...]) -> None:
    good = (8, "9", AT, 1, "i", None, '{"id":2}', None)
    bad, event = decoder().decode([row, good])
    assert isinstance(bad, Unreadable)
    assert bad.seq == 7
    assert bad.reason.startswith("not a valid event: ")
    assert isinstance(event, Event)
    assert event.key == {"id": 2}
