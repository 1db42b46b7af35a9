"""`on_permanent_failure: park_key` and the way back: what waits, for how long, and in which order it comes again."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from psycopg2.extensions import connection
from scripted import Run, Script, caught_up, insert, keys, raising, status, wait_for
from sql import fetch, value

from cdc import dead_letters, outbox
from cdc.connection import Connection
from cdc.dead_letters import NO_EVENT, WAITS, Letters, Selection
from cdc.errors import Fenced, PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.options import BatchOptions
from cdc.outbox import Outbox, Owner

Prepare = Callable[..., Run]
Connect = Callable[..., connection]

PARK: dict[str, object] = {"on_permanent_failure": "park_key"}


def update(conn: connection, id_: int, *texts: str) -> None:
    """One transaction each."""
    for text in texts:
        fetch(conn, "update item set v = %s where id = %s", (text, id_))


def refusing(*texts: str) -> Script:
    """The sink refuses rows with one of these texts."""

    def script(batch: list[Event]) -> None:
        if any(event.after is not None and event.after.get("v") in texts for event in batch):
            raise PermanentFailure("refused")

    return script


def letters(conn: connection, sink: str = "audit") -> list[tuple[Any, ...]]:
    return fetch(
        conn,
        "select event -> 'after' ->> 'v', reason, attempts, parked from cdc.dead_letter where sink = %s order by seq",
        (sink,),
    )


def texts(events: Sequence[Event]) -> list[str]:
    return [str(event.after.get("v", "-")) if event.after is not None else event.op.value for event in events]


def ask(dsn: str, what: Callable[..., object], **selection: Any) -> None:
    """Replay or discard letters, as the command does."""
    with Connection(dsn, purpose="test") as session:
        ids = [found.id for found in dead_letters.find(session, Selection(sink="audit", **selection))]
        assert ids
        what(session, "audit", ids)


def event_ids(conn: connection, *of: str) -> tuple[str, ...]:
    rows = fetch(conn, "select event -> 'after' ->> 'v', event_id from cdc.dead_letter")
    return tuple(id_ for text, id_ in rows if text in of)


def no_letters(conn: connection) -> bool:
    return bool(value(conn, "select count(*) = 0 from cdc.dead_letter"))


def nobody_asks(conn: connection) -> bool:
    return bool(value(conn, "select count(*) = 0 from cdc.dead_letter where wanted"))


# -- waiting ------------------------------------------------------------------------------------------------------


def test_later_events_of_a_refused_key_wait_in_order_and_other_keys_flow(items: connection, prepare: Prepare) -> None:
    insert(items, 1, 2, text="a")
    update(items, 1, "bad", "c", "d")
    update(items, 2, "e")
    run = prepare(**PARK)
    run.sink.script = refusing("bad")
    run.start()
    wait_for(lambda: caught_up(items))
    assert letters(items) == [("bad", "refused", 1, True), ("c", WAITS, 0, True), ("d", WAITS, 0, True)]
    assert sorted(texts(run.sink.delivered)) == ["a", "a", "e"]
    update(items, 1, "f")
    insert(items, 3, text="g")
    wait_for(lambda: caught_up(items))
    assert [text for text, *_ in letters(items)] == ["bad", "c", "d", "f"]
    assert texts(run.sink.delivered)[-1] == "g"
    assert status(items)[0] == "running"


def test_a_changed_key_lets_the_new_key_wait_too(items: connection, prepare: Prepare) -> None:
    insert(items, 1, 5, text="bad")
    run = prepare(**PARK)
    run.sink.script = lambda batch: refusing("bad")(batch) if {1} & set(keys(batch)) else None
    run.start()
    wait_for(lambda: len(letters(items)) == 1)
    fetch(items, "update item set id = 2 where id = 1")
    wait_for(lambda: caught_up(items))
    update(items, 2, "later")
    insert(items, 1, text="again")
    wait_for(lambda: caught_up(items))
    assert [text for text, *_ in letters(items)] == ["bad", None, "later", "again"]
    assert keys(run.sink.delivered) == [5]


def test_an_event_without_a_key_waits_behind_any_of_its_table_and_then_all_wait_behind_it(
    items: connection, prepare: Prepare
) -> None:
    fetch(items, "create table other (id integer primary key); select cdc.enable_capture('other')")
    insert(items, 1, text="bad")
    run = prepare(**PARK)
    run.sink.script = refusing("bad")
    run.start()
    wait_for(lambda: len(letters(items)) == 1)
    insert(items, 2, text="before")
    fetch(items, "truncate item")
    insert(items, 3, text="after")
    fetch(items, "insert into other values (1)")
    wait_for(lambda: caught_up(items))
    assert [text for text, *_ in letters(items)] == ["bad", None, "after"]
    assert [event.source.table for event in run.sink.delivered] == ["item", "other"]


def test_what_a_filter_fails_on_waits_behind_nothing_and_what_came_before_it_is_delivered_first(
    items: connection, prepare: Prepare
) -> None:
    fetch(items, "select cdc.enable_capture('item', image => 'full')")
    insert(items, 1, text="1")
    update(items, 1, "2", "x", "4")
    run = prepare(filter="has(after.v) && int(after.v) > 0", **PARK).start()
    wait_for(lambda: caught_up(items))
    assert texts(run.sink.delivered) == ["1", "2"]
    assert letters(items) == [
        ("x", "the filter cannot be evaluated: a value cannot be converted", 1, True),
        ("4", WAITS, 0, True),
    ]


def test_the_keys_that_wait_outlive_the_daemon(items: connection, prepare: Prepare) -> None:
    insert(items, 1, text="bad")
    first = prepare(**PARK)
    first.sink.script = refusing("bad")
    first.start()
    wait_for(lambda: caught_up(items) and len(letters(items)) == 1)
    first.end()
    update(items, 1, "later")
    heir = prepare(owner="heir", **PARK).start()
    wait_for(lambda: caught_up(items))
    assert letters(items) == [("bad", "refused", 1, True), ("later", WAITS, 0, True)]
    assert heir.sink.attempts == []
    # Nor does another policy let them go: what is stored in their order comes back in it.
    heir.end()
    update(items, 1, "last")
    lax = prepare().start()
    wait_for(lambda: caught_up(items))
    assert [text for text, *_ in letters(items)] == ["bad", "later", "last"]
    assert lax.sink.attempts == []


def test_a_dead_letter_of_the_other_policy_lets_nothing_wait(items: connection, prepare: Prepare) -> None:
    insert(items, 1, text="bad")
    run = prepare()
    run.sink.script = refusing("bad")
    run.start()
    wait_for(lambda: caught_up(items))
    update(items, 1, "later")
    wait_for(lambda: caught_up(items))
    assert letters(items) == [("bad", "refused", 1, False)]
    assert texts(run.sink.delivered) == ["later"]


def test_a_partial_failure_lets_wait_what_the_sink_has_taken_too_early(items: connection, prepare: Prepare) -> None:
    insert(items, 1, 2, text="a")
    update(items, 1, "b")
    run = prepare(**PARK)
    run.sink.script = raising(PartialFailure({0: PermanentFailure("refused")}))
    run.start()
    wait_for(lambda: caught_up(items))
    assert [len(attempt) for attempt in run.sink.attempts] == [3]
    assert letters(items) == [("a", "refused", 1, True), ("b", WAITS, 0, True)]
    assert keys(run.told) == [2]


def test_an_event_too_large_for_the_sink_goes_by_the_policy(items: connection, prepare: Prepare) -> None:
    def at_most_1000(batch: list[Event]) -> None:
        sizes = [len(event.after.raw) if event.after is not None else 0 for event in batch]
        if max(sizes) > 1000:
            large = PermanentFailure("too large: 1000 bytes at most")
            raise PartialFailure({index: large for index, size in enumerate(sizes) if size > 1000})

    insert(items, 1, 2, text="small")
    update(items, 1, "x" * 2000, "small again")
    runs = {policy: prepare(policy, on_permanent_failure=policy) for policy in ("dead_letter", "park_key", "stop")}
    for run in runs.values():
        run.sink.script = at_most_1000
        run.start()
    for policy in ("dead_letter", "park_key"):
        wait_for(lambda policy=policy: caught_up(items, policy))  # type: ignore[misc]
    runs["stop"].pipeline.join(10)
    assert [reason for _, reason, *_ in letters(items, "dead_letter")] == ["too large: 1000 bytes at most"]
    assert [reason for _, reason, *_ in letters(items, "park_key")] == ["too large: 1000 bytes at most", WAITS]
    assert letters(items, "stop") == []
    assert "too large: 1000 bytes at most" in status(items, "stop")[1]


def test_waiting_events_are_stored_by_the_batch(
    items: connection, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[int] = []
    real = Letters.park

    def park(self: Letters, events: Sequence[Event]) -> bool:
        stored.append(len(events))
        return real(self, events)

    monkeypatch.setattr(Letters, "park", park)
    insert(items, 1, text="bad")
    fetch(
        items,
        "do $$ begin for n in 1..2000 loop update item set v = n::text where id = 1; end loop; end $$",
    )
    run = prepare(**PARK)
    run.sink.script = refusing("bad")
    run.start()
    wait_for(lambda: caught_up(items))
    assert sum(stored) == 2000
    assert len(stored) <= 2000 / 500 + 12  # a few halves around the culprit
    assert [text for text, *_ in letters(items)] == ["bad", *map(str, range(1, 2001))]
    assert len(run.pipeline._letters.held._keys) == 1


# -- coming back --------------------------------------------------------------------------------------------------


@pytest.fixture
def parked(items: connection, prepare: Prepare) -> Run:
    """Key 1 waits with three letters, key 2 with two; the sink takes everything now."""
    insert(items, 1, 2, text="bad")
    update(items, 1, "b", "c")
    update(items, 2, "b")
    run = prepare(**PARK)
    run.sink.script = refusing("bad")
    run.start()
    wait_for(lambda: caught_up(items) and len(letters(items)) == 5)
    run.sink.script = raising()
    run.sink.attempts.clear()
    return run


def test_a_replay_delivers_in_order_under_the_old_ids_and_frees_the_key(
    items: connection, installed: str, parked: Run
) -> None:
    rows = fetch(items, "select event_id from cdc.dead_letter order by seq")
    ask(installed, dead_letters.want)
    wait_for(lambda: no_letters(items))
    assert [(event.id,) for event in parked.sink.delivered] == rows
    wait_for(lambda: parked.told == parked.sink.delivered)
    update(items, 1, "free")
    wait_for(lambda: texts(parked.sink.delivered)[-1] == "free")
    assert no_letters(items)


def test_a_replay_of_one_key_leaves_the_other_waiting(items: connection, installed: str, parked: Run) -> None:
    ask(installed, dead_letters.want, keys=dead_letters.key_texts("id=1"))
    wait_for(lambda: len(letters(items)) == 2)
    update(items, 1, "free")
    update(items, 2, "waits")
    wait_for(lambda: caught_up(items))
    assert texts(parked.sink.delivered) == ["bad", "b", "c", "free"]
    assert [text for text, *_ in letters(items)] == ["bad", "b", "waits"]


def test_a_letter_that_is_refused_again_keeps_its_new_reason_and_everything_behind_it(
    items: connection, installed: str, parked: Run
) -> None:
    def script(batch: list[Event]) -> None:
        if any(event.key == {"id": 1} and event.after is not None and event.after["v"] == "b" for event in batch):
            raise PermanentFailure("not this one either")

    parked.sink.script = script
    ask(installed, dead_letters.want)
    wait_for(lambda: nobody_asks(items))
    assert letters(items) == [("b", "not this one either", 1, True), ("c", WAITS, 0, True)]
    assert sorted(texts(parked.sink.delivered)) == ["b", "bad", "bad"]
    update(items, 1, "d")
    wait_for(lambda: caught_up(items))
    assert [text for text, *_ in letters(items)] == ["b", "c", "d"]


def test_a_letter_does_not_overtake_an_earlier_one_of_its_key_nobody_asked_for(
    items: connection, installed: str, parked: Run
) -> None:
    ask(installed, dead_letters.want, event_ids=event_ids(items, "c"))
    wait_for(lambda: nobody_asks(items))
    assert len(letters(items)) == 5
    assert parked.sink.attempts == []


def test_the_first_letter_alone_is_delivered_and_the_others_go_on_waiting(
    items: connection, installed: str, parked: Run
) -> None:
    ask(installed, dead_letters.want, event_ids=event_ids(items, "bad"))
    wait_for(lambda: len(letters(items)) == 3)
    assert texts(parked.sink.delivered) == ["bad", "bad"]
    update(items, 1, "d")
    wait_for(lambda: caught_up(items))
    assert [text for text, *_ in letters(items)] == ["b", "c", "b", "d"]


def test_a_key_is_free_when_its_last_letter_is_discarded(items: connection, installed: str, parked: Run) -> None:
    ask(installed, dead_letters.discard, keys=dead_letters.key_texts('{"id": 1}'))
    update(items, 1, "free")
    update(items, 2, "waits")
    wait_for(lambda: caught_up(items))
    assert texts(parked.sink.delivered) == ["free"]
    assert [text for text, *_ in letters(items)] == ["bad", "b", "waits"]


def test_no_event_is_set_to_wait_behind_a_letter_that_has_just_been_discarded(
    items: connection, installed: str, connect: Connect, parked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The discard comes after the pipeline has decided that the event must wait, and before it is stored."""
    real = Letters.park
    answers: list[bool] = []

    def park(self: Letters, events: Sequence[Event]) -> bool:
        if not answers:
            ask(installed, dead_letters.discard, keys=dead_letters.key_texts("id=1"))
        answers.append(real(self, events))
        return answers[-1]

    monkeypatch.setattr(Letters, "park", park)
    update(items, 1, "free")
    wait_for(lambda: texts(parked.sink.delivered) == ["free"])
    assert answers == [False]
    assert len(letters(items)) == 2


def test_a_discard_that_is_not_committed_yet_is_waited_for(
    items: connection, installed: str, connect: Connect, parked: Run
) -> None:
    other = connect(installed, autocommit=False)
    fetch(other, "update cdc.sink set requests = requests + 1 where name = 'audit'")
    fetch(other, "delete from cdc.dead_letter where keys = array['{\"id\":1}']")
    update(items, 1, "free")
    waits = "select count(*) from pg_stat_activity where application_name = 'cdc audit' and wait_event_type = 'Lock'"
    wait_for(lambda: value(items, waits))
    other.commit()
    wait_for(lambda: texts(parked.sink.delivered) == ["free"])
    assert len(letters(items)) == 2


def test_a_filter_counts_on_the_way_back_too(items: connection, installed: str, prepare: Prepare) -> None:
    insert(items, 1, 2, 3, text="x")
    update(items, 2, "20")
    wrong = prepare(filter="int(after.v) > 10", **PARK).start()
    wait_for(lambda: caught_up(items) and len(letters(items)) == 4)
    wrong.end()
    mended = prepare(owner="mended", filter="key.id == 3 || int(after.v) > 10", **PARK).start()
    ask(installed, dead_letters.want)
    wait_for(lambda: nobody_asks(items))
    # 3 is wanted now. Of the inserts of the others that still cannot be told, and what comes after them stays.
    assert keys(mended.sink.delivered) == [3]
    assert [text for text, *_ in letters(items)] == ["x", "x", "20"]
    mended.end()
    at_last = prepare(owner="at last", filter="op == 'update'", **PARK).start()
    ask(installed, dead_letters.want)
    wait_for(lambda: no_letters(items))
    assert texts(at_last.sink.delivered) == ["20"]


def test_what_is_no_event_stays_and_says_so(items: connection, installed: str, prepare: Prepare) -> None:
    fetch(
        items,
        """insert into cdc.event_0
           select nextval('cdc.event_seq'), pg_current_xact_id(), clock_timestamp(), max(id), 'i', null, '[1]', null
             from cdc.captured_table""",
    )
    prepare(**PARK).start()
    wait_for(lambda: caught_up(items))
    insert(items, 1)
    wait_for(lambda: caught_up(items))
    assert fetch(items, "select parked, attempts from cdc.dead_letter") == [(False, 1)]
    ask(installed, dead_letters.want)
    wait_for(lambda: nobody_asks(items))
    assert fetch(items, "select reason, attempts from cdc.dead_letter") == [(NO_EVENT, 2)]


def test_dead_letters_of_the_other_policy_come_back_in_order_too(
    items: connection, installed: str, prepare: Prepare
) -> None:
    insert(items, 1, text="bad")
    update(items, 1, "fine", "worse", "worst")
    run = prepare()
    run.sink.script = refusing("bad", "worse", "worst")
    run.start()
    wait_for(lambda: caught_up(items))
    run.sink.script = refusing("worse")
    ask(installed, dead_letters.want)
    wait_for(lambda: nobody_asks(items))
    # "worse" is refused again, and what came after it of the key is not to overtake it.
    assert letters(items) == [("worse", "refused", 2, False), ("worst", "refused", 1, False)]
    assert texts(run.sink.delivered) == ["fine", "bad"]


def test_a_replay_waits_for_a_sink_that_is_down_and_goes_on_in_order(
    items: connection, installed: str, parked: Run
) -> None:
    parked.sink.script = raising(
        TransientFailure("down"), TransientFailure("down"), PartialFailure({0: TransientFailure("down")})
    )
    ask(installed, dead_letters.want)
    wait_for(lambda: no_letters(items))

    def of_key_1() -> list[str]:
        return texts([event for event in parked.told if event.key == {"id": 1}])

    wait_for(lambda: len(of_key_1()) >= 3)  # the letters go first
    assert of_key_1() == ["bad", "b", "c"]


@pytest.mark.parametrize("when", ["while the sink is down", "while the sink takes it"])
def test_what_is_edited_or_discarded_on_its_way_back_is_not_delivered_as_it_was(
    items: connection, installed: str, parked: Run, when: str
) -> None:
    touched = threading.Event()

    def touch() -> None:
        with Connection(installed, purpose="test") as session:
            found = dead_letters.find(session, Selection(sink="audit", keys=('{"id":1}',)), whole=True)
            first, second, third = found
            edited = Event.from_json((first.text or "").replace('"bad"', '"good"'))
            assert dead_letters.rewrite(session, "audit", first.id, edited)
            assert dead_letters.discard(session, "audit", [second.id]) == 1
            assert dead_letters.want(session, "audit", [first.id, third.id]) == 2
        touched.set()

    looks = parked.pipeline._letters.looks + 1  # for the replay that is asked for

    def noticed() -> bool:
        return parked.pipeline._letters.looks > looks

    def script(batch: list[Event]) -> None:
        if not touched.is_set():
            touch()
        if when == "while the sink is down" and not noticed():
            raise TransientFailure("down")

    parked.sink.script = script
    ask(installed, dead_letters.want)
    wait_for(lambda: no_letters(items))
    # What the sink had in hand when it was edited cannot be taken from it; what it is now comes all the same.
    expected = ["good", "c"] if when == "while the sink is down" else ["bad", "b", "c", "good"]

    def of_key_1() -> list[str]:
        return texts([event for event in parked.told if event.key == {"id": 1}])

    wait_for(lambda: len(of_key_1()) >= len(expected))  # the letters go first
    assert of_key_1() == expected


def test_events_that_come_while_their_key_is_replayed_follow_and_the_key_is_free_in_the_end(
    items: connection, installed: str, connect: Connect, parked: Run
) -> None:
    side = connect(installed)  # of the pipeline's thread
    came: list[str] = []

    def script(batch: list[Event]) -> None:
        if len(came) < 5:
            came.append(f"came {len(came)}")
            update(side, 1, came[-1])
            insert(side, 10 + len(came), text="other")

    parked.sink.script = script
    parked.pipeline._options = parked.pipeline._options.model_copy(update={"batch": BatchOptions(events=1)})
    ask(installed, dead_letters.want)
    wait_for(lambda: no_letters(items) and caught_up(items) and len(came) == 5)
    of_key_1 = [event for event in parked.sink.delivered if event.key == {"id": 1}]
    assert texts(of_key_1) == ["bad", "b", "c", *came]
    assert sum(text == "other" for text in texts(parked.sink.delivered)) == 5


def test_events_and_letters_take_turns(items: connection, installed: str, connect: Connect, parked: Run) -> None:
    fetch(items, "insert into item select n, 'fine' from generate_series(100, 119) n")
    wait_for(lambda: caught_up(items))
    update(items, 1, *[f"letter {n}" for n in range(20)])
    wait_for(lambda: caught_up(items))
    parked.pipeline._options = parked.pipeline._options.model_copy(update={"batch": BatchOptions(events=2)})
    side = connect(installed)
    parked.sink.attempts.clear()

    def script(batch: list[Event]) -> None:
        if len(parked.sink.attempts) == 1:  # now there are many of both
            fetch(side, "update item set v = 'news' where id between 100 and 119")

    parked.sink.script = script
    ask(installed, dead_letters.want)
    wait_for(lambda: no_letters(items) and caught_up(items))
    kinds = ["news" if "news" in texts(attempt) else "letter" for attempt in parked.sink.attempts]
    assert kinds[1:11] == ["news", "letter"] * 5


def test_a_replay_survives_the_daemon(items: connection, installed: str, prepare: Prepare, parked: Run) -> None:
    parked.end()
    ask(installed, dead_letters.want)
    heir = prepare(owner="heir", **PARK).start()
    wait_for(lambda: no_letters(items))
    assert [
        text for text, id_ in zip(texts(heir.sink.delivered), keys(heir.sink.delivered), strict=True) if id_ == 1
    ] == [
        "bad",
        "b",
        "c",
    ]


def test_before_letters_are_delivered_what_came_before_is_acknowledged(
    items: connection, installed: str, connect: Connect, parked: Run
) -> None:
    side = connect(installed)
    seen: list[tuple[Any, ...]] = []

    def script(batch: list[Event]) -> None:
        if "new" in texts(batch):
            ask(installed, dead_letters.want)
            parked.pipeline._asked_at = 0.0
        else:
            seen.append((caught_up(side), value(side, "select last_seq from cdc.position")))

    parked.sink.script = script
    insert(items, 9, text="new")
    wait_for(lambda: no_letters(items))
    new = next(event for event in parked.sink.delivered if event.key == {"id": 9})
    assert seen
    assert all(done or last_seq >= new.source.seq for done, last_seq in seen)


def test_until_idle_letters_that_were_asked_for_count_as_behind(items: connection, installed: str, parked: Run) -> None:
    parked.end()
    with Connection(installed, purpose="test") as session:
        target = outbox.current_snapshot(session)
        assert outbox.sinks_behind(session, ["audit"], target) == []
        ask(installed, dead_letters.want)
        assert outbox.sinks_behind(session, ["audit"], target) == ["audit"]


def test_large_letters_come_back_a_few_at_a_time(items: connection, installed: str, prepare: Prepare) -> None:
    insert(items, *range(1, 9), text="x" * 1000)
    run = prepare(**PARK)
    run.sink.script = refusing("x" * 1000)
    run.start()
    wait_for(lambda: caught_up(items) and len(letters(items)) == 8)
    run.end()
    heir = prepare(batch=BatchOptions(bytes=2600), **PARK).start()
    ask(installed, dead_letters.want)
    wait_for(lambda: no_letters(items))
    assert [len(attempt) for attempt in heir.sink.attempts] == [2, 2, 2, 2]


# -- who may write ------------------------------------------------------------------------------------------------


def test_a_former_owner_stores_no_letter(items: connection, installed: str, prepare: Prepare) -> None:
    insert(items, 1, text="a")
    run = prepare(**PARK).start()
    wait_for(lambda: caught_up(items))
    event = run.sink.delivered[0]
    run.end()
    with Connection(installed, purpose="test") as session:
        book = Outbox(session, database="shop", sink="audit", owner=Owner("zombie", 1))
        claim = book.claim(start="now")
        assert claim is not None
        zombie = Letters(session, database="shop", sink="audit", epoch=claim.epoch)
        zombie.look()
        fetch(items, "update cdc.sink set epoch = epoch + 1")
        assert zombie.park([event]) is False
        with pytest.raises(Fenced):
            zombie.set_aside(event, "no", park=True)
        with pytest.raises(Fenced):
            zombie.look()
    assert no_letters(items)


# -- at random ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_refused_replayed_and_discarded_no_key_is_out_of_order(
    items: connection, installed: str, prepare: Prepare, seed: int
) -> None:
    """Versions of eight rows are written, refused at random, and replayed all the time. At the end nothing is refused.

    Every version arrives, and no version arrives for the first time after a later one of its row.
    """
    rng = random.Random(seed)
    lock = threading.Lock()
    share = 0.1

    def script(batch: list[Event]) -> None:
        with lock:
            luck = rng.random()
            failures: dict[int, TransientFailure | PermanentFailure] = {}
            for index in range(len(batch)):
                if rng.random() < share / 3:
                    failures[index] = rng.choice([PermanentFailure("no"), TransientFailure("down")])
        if luck < share and len(batch) > 0:
            raise PermanentFailure("no")
        if failures:
            raise PartialFailure(failures)

    insert(items, *range(8), text="0")
    run = prepare(batch=BatchOptions(events=20), **PARK)
    run.sink.script = script
    run.start()
    for version in range(1, 120):
        for id_ in rng.sample(range(8), 3):
            fetch(items, "update item set v = (v::int + 1)::text where id = %s", (id_,))
        if version % 10 == 0:
            with Connection(installed, purpose="test") as session:
                found = [each.id for each in dead_letters.find(session, Selection(sink="audit"))]
                dead_letters.want(session, "audit", [id_ for id_ in found if rng.random() < 0.8])
    share = 0.0

    def settled() -> bool:
        all_read = caught_up(items)  # from here on no letter comes up any more
        with Connection(installed, purpose="test") as session:
            found = [each.id for each in dead_letters.find(session, Selection(sink="audit"))]
            if found and nobody_asks(items):
                dead_letters.want(session, "audit", found)
        return all_read and not found

    wait_for(settled, 30)
    run.end()  # a letter is gone from the database before it is told of
    arrived: dict[int, list[int]] = {}
    for event in run.told:
        assert event.key is not None
        assert event.after is not None
        arrived.setdefault(event.key["id"], []).append(int(event.after["v"]))
    for id_, last in fetch(items, "select id, v::int from item"):
        first = list(dict.fromkeys(arrived[id_]))
        assert first == list(range(last + 1)), f"seed {seed}, row {id_}"
    assert sorted(arrived) == list(range(8))
