"""Pausing a sink, a sink that hangs, and one that is slow: noticed soon, shown, and nobody else's trouble."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from psycopg2.extensions import connection
from scripted import Run, Scripted, caught_up, insert, keys, raising, status, wait_for
from sql import fetch, value

from cdc import daemon, outbox, pipeline
from cdc.bell import HEARTBEAT, Bell
from cdc.cli import main
from cdc.config import Config
from cdc.connection import Connection
from cdc.daemon import Daemon, Plan
from cdc.errors import CdcError, TransientFailure
from cdc.event import Event
from cdc.keeper import BEAT, Keeper
from cdc.options import BatchOptions
from cdc.outbox import Outbox, Owner
from cdc.sinks import option_models

Connect = Callable[..., connection]
Prepare = Callable[..., Run]

NOTICED = HEARTBEAT + 1.0


@pytest.fixture
def sinks(installed: str, tmp_path: Path) -> Callable[..., Result]:
    """``sinks("pause", "audit")`` runs ``cdc sinks …``."""
    content = {
        "databases": {"shop": {"dsn": installed, "tables": {"public.item": {}}}},
        "sinks": {"audit": {"type": "stdout"}, "other": {"type": "stdout"}},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(content))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["-c", str(tmp_path / "config.yaml"), "sinks", *arguments])

    return run


# -- pausing ------------------------------------------------------------------------------------------------------


def test_a_paused_sink_is_given_nothing_until_it_is_resumed_and_goes_on_where_it_was(
    items: connection, prepare: Prepare, sinks: Callable[..., Result]
) -> None:
    run = prepare().start()
    insert(items, 1)
    wait_for(lambda: caught_up(items))
    assert sinks("pause", "audit").stdout == "shop: sink audit is paused\n"
    wait_for(lambda: status(items)[0] == "paused", NOTICED)
    assert run.pipeline.state == "paused"
    insert(items, 2, 3)
    assert sinks("resume", "audit").stdout == "shop: sink audit is resumed\n"
    wait_for(lambda: caught_up(items))
    assert keys(run.sink.delivered) == [1, 2, 3]
    wait_for(lambda: status(items)[0] == "running")
    assert run.sink.calls == ["open"]


def test_a_pause_outlives_the_daemon_and_nothing_is_read_or_opened(
    items: connection, prepare: Prepare, sinks: Callable[..., Result]
) -> None:
    first = prepare().start()
    wait_for(lambda: status(items)[0] == "running")
    first.end()
    assert sinks("pause", "audit").stdout == "shop: sink audit is paused (no daemon serves it at the moment)\n"
    insert(items, 1)
    heir = prepare(owner="heir").start()
    wait_for(lambda: status(items)[0] == "paused")
    assert not caught_up(items)
    assert heir.sink.calls == []
    sinks("resume", "audit")
    wait_for(lambda: keys(heir.sink.delivered) == [1], NOTICED + 5)


def test_a_busy_sink_is_paused_between_two_batches_and_what_it_had_is_acknowledged(
    items: connection, prepare: Prepare, sinks: Callable[..., Result], connect: Connect, installed: str
) -> None:
    fetch(items, "insert into item select n, '' from generate_series(1, 5000) n")
    run = prepare(batch=BatchOptions(events=1))
    run.sink.script = lambda batch: time.sleep(0.002)
    run.start()
    wait_for(lambda: len(run.sink.delivered) > 10)
    sinks("pause", "audit")
    wait_for(lambda: status(items)[0] == "paused", NOTICED)
    count = len(run.sink.delivered)
    assert count < 5000
    assert value(items, "select last_seq from cdc.position") == run.sink.delivered[-1].source.seq
    sinks("resume", "audit")
    wait_for(lambda: len(run.sink.delivered) > count, NOTICED)
    assert keys(run.sink.delivered[: count + 1]) == list(range(1, count + 2))


def test_a_sink_that_is_being_retried_can_be_paused_and_is_tried_at_once_when_it_goes_on(
    items: connection, prepare: Prepare, sinks: Callable[..., Result]
) -> None:
    insert(items, 1)
    run = prepare(retry={"initial": "1h", "max": "1h"})
    run.sink.script = raising(TransientFailure("down"))
    run.start()
    wait_for(lambda: status(items)[0] == "retrying")
    sinks("pause", "audit")
    wait_for(lambda: status(items)[0] == "paused", NOTICED)
    sinks("resume", "audit")
    wait_for(lambda: keys(run.sink.delivered) == [1], NOTICED)
    wait_for(lambda: status(items)[0] == "running")


def test_a_paused_sink_ends_at_once_when_told_to(
    items: connection, prepare: Prepare, sinks: Callable[..., Result]
) -> None:
    run = prepare().start()
    wait_for(lambda: status(items)[0] == "running")
    sinks("pause", "audit")
    wait_for(lambda: status(items)[0] == "paused", NOTICED)
    run.end(3)


def test_while_one_sink_is_paused_the_others_sleep_and_are_rung(
    items: connection, prepare: Prepare, sinks: Callable[..., Result]
) -> None:
    bell = Bell("adaptive")
    paused, other = prepare("audit", bell=bell).start(), prepare("other", bell=bell).start()
    wait_for(lambda: status(items, "audit")[0] == status(items, "other")[0] == "running")
    sinks("pause", "audit")
    wait_for(lambda: status(items, "audit")[0] == "paused", NOTICED)
    wait_for(bell.should_arm)
    assert paused.pipeline._sleeper.away
    insert(items, 1)
    wait_for(lambda: keys(other.sink.delivered) == [1])


def test_ephemeral_changes_of_a_paused_sink_are_dropped_and_counted(
    items: connection, prepare: Prepare, sinks: Callable[..., Result]
) -> None:
    bell = Bell("adaptive")
    run = prepare(bell=bell).start()
    insert(items, 1)
    wait_for(lambda: caught_up(items))
    event = run.sink.delivered[0]
    sinks("pause", "audit")
    wait_for(lambda: status(items)[0] == "paused", NOTICED)
    bell.hand_over(event, 100)
    wait_for(lambda: value(items, "select dropped from cdc.sink") == 1, NOTICED)
    sinks("resume", "audit")
    wait_for(lambda: status(items)[0] == "running", NOTICED)
    assert len(run.sink.delivered) == 1


def test_an_idle_pipeline_asks_no_more_than_it_has_to(
    items: connection, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    real = Connection.query

    def query(self: Connection, *arguments: Any, **keywords: Any) -> Any:
        if threading.current_thread().name == "shop/audit":
            asked.append(time.monotonic())
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(Connection, "query", query)
    bell = Bell("adaptive")
    run = prepare(bell=bell).start()
    wait_for(lambda: bell._sleepers)
    bell.audible = True
    wait_for(bell.should_arm)
    bell.arm()
    wait_for(lambda: run.pipeline._sleeper.idle and run.pipeline._sleeper.due > time.monotonic() + 20)
    began, before = time.monotonic(), len(asked)
    wait_for(lambda: len(asked) >= before + 2, 3 * HEARTBEAT)
    assert time.monotonic() - began >= HEARTBEAT


def test_a_sink_the_configuration_does_not_know_and_one_without_a_position_are_told_apart(
    items: connection, sinks: Callable[..., Result]
) -> None:
    unknown = sinks("pause", "audti")
    assert (unknown.exit_code, "no sink audti in the configuration (known: audit, other)" in unknown.stderr) == (
        78,
        True,
    )
    new = sinks("pause", "audit")
    assert (new.exit_code, new.stderr) == (1, "error: shop: sink audit has no position yet (run cdc migrate)\n")


def test_until_idle_does_not_wait_for_a_sink_that_is_paused(installed: str, items: connection) -> None:
    config = Config.model_validate(
        {
            "databases": {"shop": {"dsn": installed, "tables": {"public.item": {}}}},
            "sinks": {"audit": {"type": "stdout", "start": "earliest"}},
        },
        context={"sink_types": option_models()},
    )
    with Connection(installed, purpose="test") as session:
        outbox.register_sink(session, "audit", start="earliest")
        outbox.set_paused(session, "audit", paused=True)
    insert(items, 1)
    with pytest.raises(CdcError, match=r"shop/audit: paused \(cdc sinks resume audit\)"):
        Daemon(Plan(config, {"shop": installed})).run(until_idle=True)


# -- hanging ------------------------------------------------------------------------------------------------------


@pytest.fixture
def go_on() -> Iterator[threading.Event]:
    """Lets the sink of `hanging` return; it does at the end in any case."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def hanging(items: connection, prepare: Prepare, go_on: threading.Event) -> Run:
    """A pipeline whose sink has not returned."""
    run = prepare()

    def script(batch: list[Event]) -> None:
        assert go_on.wait(60)

    run.sink.script = script
    insert(items, 1)
    run.start()
    wait_for(lambda: run.sink.attempts)
    return run


@pytest.fixture
def keeper(installed: str, hanging: Run) -> Iterator[Keeper]:
    """The keeper of the same daemon, which looks after the pipeline."""
    thread = Keeper(
        installed,
        database="shop",
        process=hanging.pipeline._owner.process,
        retention=3600.0,
        alarm=2**40,
        watch=hanging.pipeline.note_stall,
    )
    thread.start()
    yield thread
    thread.stop()
    thread.join(10)


def test_a_sink_that_hangs_is_seen_within_ten_seconds_with_how_long_and_stays_ours(
    items: connection, installed: str, hanging: Run, keeper: Keeper, go_on: threading.Event
) -> None:
    wait_for(lambda: status(items)[0] == "stalled", 10.0)
    with Connection(installed, purpose="test") as session:
        [seen] = outbox.sink_statuses(session)
        assert (seen.state, seen.served) == ("stalled", True)
        assert value(items, "select clock_timestamp() - state_since >= interval '5 s' from cdc.sink")
        # Its own thread is silent; the keeper speaks for it.
        wait_for(lambda: time.monotonic() - hanging.sink.at[0] > outbox.LEASE + BEAT)
        rival = Outbox(session, database="shop", sink="audit", owner=Owner("rival", 99))
        assert rival.claim(start="now") is None
    assert hanging.pipeline._sleeper.away
    go_on.set()
    wait_for(lambda: caught_up(items))
    wait_for(lambda: status(items)[0] == "running")
    assert keys(hanging.sink.delivered) == [1]
    assert not hanging.pipeline._sleeper.away


def test_a_sink_that_returns_while_the_keeper_looks_is_not_left_stalled(
    items: connection, installed: str, hanging: Run, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "STALLED_AFTER", 0.0)
    real = outbox.note_stall

    def note_stall(*arguments: Any, **keywords: Any) -> None:
        real(*arguments, **keywords)
        go_on.set()
        wait_for(lambda: caught_up(items))

    monkeypatch.setattr(outbox, "note_stall", note_stall)
    with Connection(installed, purpose="test") as session:
        hanging.pipeline.note_stall(session)
    assert status(items)[0] == "running"
    assert hanging.pipeline.state == "running"


def test_while_it_hangs_the_others_deliver_and_sleep(
    items: connection, prepare: Prepare, hanging: Run, keeper: Keeper
) -> None:
    other = prepare("other", bell=hanging.pipeline._bell).start()
    for id_ in range(2, 12):
        insert(items, id_)
        wait_for(lambda id_=id_: id_ in keys(other.sink.delivered), 3.0)  # type: ignore[misc]
    wait_for(lambda: status(items)[0] == "stalled", 10.0)
    wait_for(hanging.pipeline._bell.should_arm)


def test_a_daemon_told_to_stop_does_not_wait_for_a_sink_that_hangs_and_loses_nothing(
    installed: str, items: connection, monkeypatch: pytest.MonkeyPatch, prepare: Prepare
) -> None:
    made: list[Scripted] = []
    waited: list[bool] = []
    go_on = threading.Event()

    def create(name: str, options: Any, encoder: Any) -> Scripted:
        made.append(Scripted(name, options))
        if name == "audit":
            made[-1].script = lambda batch: waited.append(go_on.wait(60))
        return made[-1]

    monkeypatch.setattr(daemon, "create", create)
    config = Config.model_validate(
        {
            "databases": {"shop": {"dsn": installed, "tables": {"public.item": {}}}},
            "sinks": {name: {"type": "stdout", "start": "earliest"} for name in ("audit", "other")},
            "stop_timeout": "2s",
        },
        context={"sink_types": option_models()},
    )
    insert(items, 1)
    served = Daemon(Plan(config, {"shop": installed}))
    failure: list[CdcError] = []

    def run() -> None:
        try:
            served.run()
        except CdcError as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_for(lambda: caught_up(items, "other") and any(sink.attempts for sink in made if sink.name == "audit"))
        began = time.monotonic()
        served.stop()
        thread.join(10)
        assert not thread.is_alive()
        assert 2.0 <= time.monotonic() - began < 6.0
        assert served.stuck == ["shop/audit"]
        assert "not ended within stop_timeout: shop/audit" in str(failure[0])
        assert caught_up(items, "other")
        assert not caught_up(items, "audit")
    finally:
        go_on.set()
    wait_for(lambda: not any(pipeline.is_alive() for pipeline in served.fleet.pipelines()))
    heir = prepare("audit", owner="heir").start()
    wait_for(lambda: caught_up(items, "audit"))
    assert len(heir.sink.delivered) <= 1  # the sink has returned after all, and that was acknowledged


# -- slow ---------------------------------------------------------------------------------------------------------


def test_a_sink_that_takes_one_a_second_costs_the_others_nothing(items: connection, prepare: Prepare) -> None:
    bell = Bell("off")
    slow, quick = prepare("slow", bell=bell, batch=BatchOptions(events=1)), prepare("quick", bell=bell)
    pace = threading.Event()
    waited: list[bool] = []
    slow.sink.script = lambda batch: waited.append(pace.wait(1.0))
    slow.start()
    wait_for(lambda: status(items, "slow")[0] == "running")
    fetch(items, "insert into item select n, '' from generate_series(1, 20000) n")
    began = time.monotonic()
    quick.start()
    wait_for(lambda: caught_up(items, "quick"), 60)
    took = time.monotonic() - began
    wait_for(lambda: slow.sink.attempts)  # nobody rings: it may still have been asleep
    assert len(quick.sink.delivered) == 20000
    assert len(slow.sink.taken) <= took + 2
    assert status(items, "slow")[0] == "running"
    assert slow.pipeline.state == "running"
    # It holds one batch, and the rest is in the outbox.
    assert max(len(attempt) for attempt in slow.sink.attempts) == 1
    pace.set()
