"""Which events of a batch must stay in order, and names made of events."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from cdc.errors import PermanentFailure
from cdc.event import Event, Image, Op
from cdc.lanes import Held, lanes, reach
from cdc.template import CONTENT, ROUTE, Template, checked


def event(key: int | None, *, was: int | None = None, table: str = "orders", text: str = "x") -> Event:
    """An update; `was` is the key it had before."""
    return Event.model_validate(
        {
            "id": "shop-1-1",
            "op": Op.UPDATE,
            "source": {
                "database": "shop",
                "schema": "public",
                "table": table,
                "seq": 1,
                "txid": 1,
                "ts": datetime(2026, 11, 22, tzinfo=UTC),
            },
            "key": None if key is None else Image(f'{{"id":{key},"code":"a/{text}"}}'),
            "before": Image("{}" if was is None else f'{{"id":{was}}}'),
            "after": Image("{}" if was is None else f'{{"id":{key}}}'),
            "changed": (),
            "context": None,
        }
    )


def test_each_key_is_a_lane_of_its_own_and_keeps_its_order() -> None:
    assert lanes([event(1), event(2), event(1), event(3), event(2)]) == [[0, 2], [1, 4], [3]]


def test_a_changed_key_ties_two_lanes_together() -> None:
    assert lanes([event(1), event(2), event(3, was=1), event(3), event(4, was=2)]) == [[0, 2, 3], [1, 4]]


def test_an_event_without_a_key_ties_all_of_its_table_and_nothing_else() -> None:
    batch = [event(1), event(2), event(1, table="items"), event(None), event(1), event(9)]
    assert lanes(batch) == [[0, 1, 3, 4, 5], [2]]


def test_what_is_held_holds_its_key_its_former_key_and_what_has_no_key() -> None:
    held = Held()
    assert not held
    held.add(event(2, was=1))
    assert held
    assert [held.holds(event(key)) for key in (1, 2, 3)] == [True, True, False]
    assert held.holds(event(9, was=2))
    assert held.holds(event(None))
    assert not held.holds(event(1, table="items"))


def test_a_table_is_held_whole_by_an_event_without_a_key() -> None:
    held = Held()
    held.add(event(None))
    assert held.holds(event(1))
    assert held.holds(event(None))
    assert not held.holds(event(None, table="items"))


@given(st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 5)), st.one_of(st.none(), st.integers(0, 5)))))
def test_events_that_share_a_key_are_in_one_lane_in_their_order(
    keys: Sequence[tuple[int | None, int | None]],
) -> None:
    batch = [event(key, was=was) for key, was in keys]
    found = lanes(batch)
    assert sorted(index for lane in found for index in lane) == list(range(len(batch)))
    lane_of = {index: number for number, lane in enumerate(found) for index in lane}
    for first in range(len(batch)):
        for second in range(first + 1, len(batch)):
            one, other = reach(batch[first])[1], reach(batch[second])[1]
            if not one or not other or one & other:
                assert lane_of[first] == lane_of[second]
    assert all(lane == sorted(lane) for lane in found)


def test_a_template_is_filled_in_and_quoted() -> None:
    assert Template("{database}.{schema}.{table}.{op}").fill(event(1)) == "shop.public.orders.update"
    assert Template("k/{key.code}/{key.id}", lambda text: text.replace("/", "%2F")).fill(event(7)) == "k/a%2Fx/7"
    assert Template("{key} {id}").fill(event(None)) == "null shop-1-1"


def test_a_key_column_that_is_not_there_is_a_permanent_failure_of_the_event() -> None:
    with pytest.raises(PermanentFailure, match="no key column number"):
        Template("{key.number}").fill(event(1))


@pytest.mark.parametrize(
    ("text", "finding"),
    [("{tabel}", "a placeholder that does not exist"), ("{table", "a brace without"), ("{key.}", "does not exist")],
)
def test_a_wrong_template_is_refused_with_what_there_is(text: str, finding: str) -> None:
    with pytest.raises(ValidationError, match=finding):
        TypeAdapter(Annotated[str, checked(*ROUTE, *CONTENT)]).validate_python(text)
    with pytest.raises(ValidationError, match=r"known: \{database\}, \{schema\}, \{table\}, \{op\}"):
        TypeAdapter(Annotated[str, checked(*ROUTE)]).validate_python("{key}")
