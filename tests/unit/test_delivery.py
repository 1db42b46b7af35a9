"""One attempt: what goes to the sink, what is refused, what goes again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import pytest

from cdc.delivery import attempt
from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event, Image, Op
from cdc.lanes import Held

DOWN = TransientFailure("down")
NEVER = PermanentFailure("never")


def event(key: str) -> Event:
    """Of the row its first letter names; the rest tells it from others: a1, a2, b1."""
    return Event.model_validate(
        {
            "id": key,
            "op": Op.INSERT,
            "source": {
                "database": "shop",
                "schema": "public",
                "table": "orders",
                "seq": 1,
                "txid": 1,
                "ts": datetime(2026, 11, 22, tzinfo=UTC),
            },
            "key": Image(f'{{"id":"{key[0]}"}}'),
            "before": None,
            "after": Image("{}"),
            "changed": None,
            "context": None,
        }
    )


def names(events: Sequence[Event]) -> str:
    return " ".join(each.id for each in events)


class Parking:
    """A fate that lets keys wait once they were refused."""

    def __init__(self) -> None:
        self.held = Held()
        self.taken: list[str] = []
        self.given_up: list[str] = []
        self.waiting: list[str] = []

    def holds(self, event: Event) -> bool:
        return self.held.holds(event)

    def admit(self, batch: list[Event]) -> list[Event]:
        self.waiting += [each.id for each in batch if self.holds(each)]
        return [each for each in batch if not self.holds(each)]

    def delivered(self, events: Sequence[Event]) -> None:
        self.taken += [each.id for each in events]

    def refused(self, event: Event, failure: PermanentFailure) -> None:
        self.given_up.append(event.id)
        self.held.add(event)


def deliver(batch: str, sink: Callable[[list[Event]], None]) -> tuple[Parking, str]:
    fate = Parking()
    return fate, names(attempt(sink, [event(key) for key in batch.split()], fate))


def refusing(*keys: str) -> Callable[[list[Event]], None]:
    def sink(batch: list[Event]) -> None:
        if {each.id for each in batch} & set(keys):
            raise PermanentFailure("never")

    return sink


def failing(**failures: TransientFailure | PermanentFailure) -> Callable[[list[Event]], None]:
    def sink(batch: list[Event]) -> None:
        raise PartialFailure({n: failures[each.id] for n, each in enumerate(batch) if each.id in failures})

    return sink


def test_halves_find_the_refused_event_and_what_comes_later_of_its_key_never_reaches_the_sink() -> None:
    seen: list[str] = []

    def sink(batch: list[Event]) -> None:
        seen.append(names(batch))
        refusing("a1")(batch)

    fate, again = deliver("a1 b1 a2 b2", sink)
    assert again == ""
    assert (fate.given_up, fate.waiting, fate.taken) == (["a1"], ["a2"], ["b1", "b2"])
    assert seen == ["a1 b1 a2 b2", "a1 b1", "a1", "b1", "b2"]


def test_what_one_half_has_taken_does_not_come_again_because_the_other_fails() -> None:
    def sink(batch: list[Event]) -> None:
        refusing("b1")(batch)
        if batch[0].id == "c1":
            raise DOWN

    fate, again = deliver("a1 b1 c1 d1", sink)
    assert (fate.taken, fate.given_up, again) == (["a1"], ["b1"], "c1 d1")


def test_a_transient_failure_of_everything_is_raised() -> None:
    def sink(batch: list[Event]) -> None:
        raise DOWN

    with pytest.raises(TransientFailure):
        deliver("a1 b1", sink)


def test_after_a_partial_failure_what_comes_later_of_a_refused_key_waits_though_the_sink_took_it() -> None:
    fate, again = deliver("a1 b1 a2", failing(a1=NEVER))
    assert (fate.given_up, fate.taken, again) == (["a1"], ["b1"], "a2")
    assert attempt(refusing(), [event("a2")], fate) == []
    assert fate.waiting == ["a2"]


def test_an_event_that_is_refused_behind_one_that_waits_is_tried_after_it() -> None:
    fate, again = deliver("a1 b1 a2", failing(a1=DOWN, a2=NEVER))
    assert (fate.given_up, fate.taken, again) == ([], ["b1"], "a1 a2")


def test_of_several_waits_the_longest_is_kept() -> None:
    later = TransientFailure("busy", retry_after=5)
    with pytest.raises(TransientFailure) as caught:
        deliver("a1 b1 c1", failing(a1=DOWN, b1=later, c1=TransientFailure("busy", retry_after=1)))
    assert caught.value is later


def test_a_partial_failure_of_nothing_is_a_delivery() -> None:
    fate, again = deliver("a1 b1", failing())
    assert (fate.taken, again) == (["a1", "b1"], "")
