"""Who serves a sink, how another takes it over, and what the one it was taken from may still do."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Project, until
from psycopg2.extensions import connection
from sql import fetch, value

from cdc import config as configuration
from cdc import diagnosis, outbox
from cdc.connection import Connection
from cdc.errors import DatabaseUnreachable, Fenced
from cdc.keeper import BEAT, LONGEST_SILENCE, Keeper
from cdc.outbox import LEASE, Outbox, Owner, join_process
from cdc.sinks import option_models

Connect = Callable[..., connection]


class Daemon:
    """Two sessions of one process: a keeper's, which only speaks when told to, and a pipeline's."""

    def __init__(self, dsn: str, process: int) -> None:
        self.owner = Owner(f"host:{process}", process)
        self.dsn = dsn
        self.keeper = Connection(dsn, purpose="keeper")
        self.session = Connection(dsn, purpose="audit")
        for session in (self.keeper, self.session):
            join_process(session, process)
        self.outbox = Outbox(self.session, database="shop", sink="audit", owner=self.owner)

    def claim(self) -> int | None:
        claim = self.outbox.claim(start="now")
        return claim and claim.epoch

    def close(self) -> None:
        self.keeper.close()
        self.session.close()


@pytest.fixture
def daemon(installed: str) -> Iterator[Callable[[int], Daemon]]:
    """``daemon(process)``: sessions of a daemon of that number."""
    made: list[Daemon] = []

    def make(process: int) -> Daemon:
        made.append(Daemon(installed, process))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def look(installed: str, connect: Connect) -> connection:
    return connect(installed)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever claims has seen for the whole lease that the other one says nothing."""
    monkeypatch.setattr(Outbox, "_has_holder_been_silent", lambda self: True)


def fall_silent(look: connection, one: Daemon) -> None:
    """Make it look as if a process had last spoken before the lease began: ours cannot wait so long."""
    fetch(
        look,
        """create or replace function cdc.holder(
             sink_id integer, epoch bigint, out pid integer, out process integer, out heard_at timestamptz
           ) returns setof record language sql stable as $$
             select l.pid, %s, clock_timestamp() - make_interval(secs => %s) from pg_locks l
              where l.locktype = 'advisory' and l.classid = 6513764 and l.objid = cdc.slot(sink_id, epoch)::oid
           $$""",
        (one.owner.process, LEASE + 1),
    )


@contextlib.contextmanager
def at_work(keeper: Keeper) -> Iterator[None]:
    """A keeper's thread, for as long as this is entered."""
    keeper.start()
    try:
        yield
    finally:
        keeper.stop()
        keeper.join(10)


def test_whoever_comes_first_has_it_and_the_second_waits(daemon: Callable[[int], Daemon]) -> None:
    first, second = daemon(1), daemon(2)
    assert first.claim() == 1
    assert second.claim() is None
    first.outbox.confirm()


def test_an_owner_whose_voice_is_ended_is_not_taken_for_silent(
    daemon: Callable[[int], Daemon], look: connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keeper's session is ended from outside, its pipeline has been in a delivery for longer than the lease."""
    monkeypatch.setattr(outbox, "LEASE", 1.0)
    first, second = daemon(1), daemon(2)
    assert first.claim() == 1
    for _ in range(15):
        outbox.beat(first.keeper)
        assert second.claim() is None
        time.sleep(0.1)
    fetch(look, "select pg_terminate_backend(%s)", (first.keeper.pid,))
    until(lambda: not fetch(look, "select 1 from pg_stat_activity where pid = %s", (first.keeper.pid,)), "it has gone")
    assert second.claim() is None
    with Connection(first.dsn, purpose="keeper") as again:
        join_process(again, 1)
        outbox.beat(again)
        assert second.claim() is None
        first.outbox.confirm()


def test_a_sink_whose_owner_has_gone_is_free_at_once(daemon: Callable[[int], Daemon]) -> None:
    first, second = daemon(1), daemon(2)
    first.claim()
    first.close()
    epochs: list[int | None] = []
    until(lambda: (epochs.append(second.claim()) or epochs[-1]) is not None, "the second has it", seconds=LEASE)
    assert epochs[-1] == 2


def test_an_owner_that_says_nothing_for_the_lease_loses_it_and_is_ended(
    daemon: Callable[[int], Daemon], look: connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "LEASE", 1.0)
    first, second = daemon(1), daemon(2)
    assert first.claim() == 1
    fall_silent(look, first)
    began = time.monotonic()
    until(lambda: second.claim() == 2, "the second has it", pause=0.1)
    assert time.monotonic() - began > 0.9  # however long ago the database says it was
    with pytest.raises(DatabaseUnreachable):
        first.outbox.confirm()
    with pytest.raises(DatabaseUnreachable):
        first.keeper.query("select 1")
    second.outbox.confirm()


def test_an_owner_one_of_whose_sessions_speaks_keeps_it_though_the_pipeline_is_silent(
    daemon: Callable[[int], Daemon], look: connection
) -> None:
    first, second = daemon(1), daemon(2)
    first.claim()
    heard = "select heard_at from cdc.sink k, cdc.holder(k.id, k.epoch)"
    before = value(look, heard)
    first.keeper.query("select 1")
    assert value(look, heard) > before
    assert second.claim() is None


def test_a_session_that_was_given_up_does_not_keep_its_own_daemon_out(daemon: Callable[[int], Daemon]) -> None:
    # Its server process is frozen, say: it holds its lock for ever, and the pipeline has connected anew.
    first, again = daemon(1), daemon(1)
    assert first.claim() == 1
    assert again.claim() == 2
    with pytest.raises((Fenced, DatabaseUnreachable)):
        first.outbox.confirm()
    again.keeper.query("select 1")  # only the session that held the lock was ended
    first.keeper.query("select 1")


@pytest.mark.usefixtures("watched")
def test_a_process_whose_silence_our_role_may_not_see_is_left_alone(
    daemon: Callable[[int], Daemon], look: connection
) -> None:
    first, second = daemon(1), daemon(2)
    first.claim()
    fall_silent(look, first)
    fetch(look, "alter function cdc.holder(integer, bigint) rename to holder_seen")
    fetch(
        look,
        """create function cdc.holder(
             sink_id integer, epoch bigint, out pid integer, out process integer, out heard_at timestamptz
           ) returns setof record language sql stable as
           $$ select pid, process, null::timestamptz from cdc.holder_seen(sink_id, epoch) $$""",
    )
    assert second.claim() is None


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("silent", [False, True])
def test_of_many_who_claim_at_once_one_gets_it(daemon: Callable[[int], Daemon], look: connection, silent: bool) -> None:
    first = daemon(1)
    first.claim()
    if silent:
        fall_silent(look, first)
    else:
        first.close()
    rivals = [daemon(number) for number in range(2, 10)]
    for _ in range(3 if silent else 1):
        epoch = value(look, "select epoch from cdc.sink")
        won: list[int] = []

        def claim(rival: Daemon, won: list[int] = won) -> None:
            try:
                if (got := rival.claim()) is not None:
                    won.append(got)
            except DatabaseUnreachable:  # the one that had it a moment ago
                pass

        threads = [threading.Thread(target=claim, args=(rival,)) for rival in rivals if not rival.session.raw.closed]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == len(set(won))  # no epoch was handed out twice
        assert max(won) == value(look, "select epoch from cdc.sink") == epoch + len(won)
        if not silent:
            assert won == [2]
            return


def test_the_lock_of_a_thousand_epochs_ago_is_another(look: connection) -> None:
    slots = [row[0] for row in fetch(look, "select cdc.slot(7, e) from generate_series(0, 1023) e")]
    assert len(set(slots)) == 1024
    assert value(look, "select cdc.slot(7, 0) <> cdc.slot(8, 0)")
    assert value(look, "select cdc.slot(2147483647, 9223372036854775807)") >= 0


def test_the_keeper_is_heard_and_rotates_and_raises_the_alarm(
    installed: str, look: connection, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.keeper.BEAT", 0.02)
    caplog.set_level("INFO")
    keeper = Keeper(installed, database="shop", process=5, retention=0.0, alarm=1)
    speaking = """select max(state_change) from pg_stat_activity a join pg_locks l using (pid)
                   where l.classid = 6513766 and l.objid = 5"""
    with at_work(keeper):
        until(lambda: value(look, speaking) is not None, "it is there")
        before = value(look, speaking)
        until(lambda: value(look, speaking) > before, "it speaks")
        until(lambda: "The outbox has grown beyond its alarm." in caplog.text, "the alarm")
    assert not keeper.is_alive()
    assert caplog.text.count("beyond its alarm") == 1


@pytest.mark.parametrize(("others_silent_for", "least"), [(0.0, 0.6), (float("inf"), 0.2)])
def test_the_keeper_leaves_it_to_the_others_to_be_heard_but_not_for_long(
    installed: str, monkeypatch: pytest.MonkeyPatch, others_silent_for: float, least: float
) -> None:
    monkeypatch.setattr("cdc.keeper.BEAT", 0.2)
    monkeypatch.setattr("cdc.keeper.LONGEST_SILENCE", 0.6)
    spoke: list[float] = []
    real = outbox.beat

    def beat(connection: Connection) -> float:
        spoke.append(time.monotonic())
        return real(connection)

    monkeypatch.setattr(outbox, "beat", beat)
    keeper = Keeper(
        installed, database="shop", process=5, retention=60.0, alarm=2**40, others_silent_for=lambda: others_silent_for
    )
    with at_work(keeper):
        until(lambda: len(spoke) >= 4, "it speaks all the same")
    pauses = [later - earlier for earlier, later in itertools.pairwise(spoke)]
    assert min(pauses) >= least
    if others_silent_for > 0:
        assert min(pauses) < 0.6  # nobody else is heard: it does not wait for long


def test_work_that_takes_too_long_costs_the_keeper_neither_its_voice_nor_its_session(
    installed: str, look: connection, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.keeper.BEAT", 0.02)
    monkeypatch.setattr("cdc.keeper.RECONCILING", 0.02)
    tried: list[int] = []

    def slow(connection: Connection) -> list[str]:
        tried.append(connection.pid)
        connection.query("select pg_sleep(60)", deadline=0.4)
        return []

    keeper = Keeper(installed, database="shop", process=5, retention=60.0, alarm=2**40, find_drift=slow)
    with at_work(keeper):
        until(lambda: len(tried) >= 3, "it tries again")
        assert len(set(tried)) == 1
        assert time.monotonic() - keeper.heard_at < 2.0
        assert keeper.trouble == ""
    assert caplog.text.count("The keeper has no time for its work.") == 1


def test_the_keeper_outlives_what_nobody_expected(
    installed: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.keeper.BEAT", 0.02)
    failures = [RuntimeError("can't start new thread")]

    def watch(_: Connection) -> None:
        if failures:
            raise failures.pop()

    keeper = Keeper(installed, database="shop", process=5, retention=60.0, alarm=2**40, watch=watch)
    with at_work(keeper):
        until(lambda: "The keeper failed as it should not" in caplog.text, "it fails")
        failed_at = time.monotonic()
        until(lambda: keeper.heard_at > failed_at and not keeper.trouble, "and goes on")


def test_figures_are_fresh_while_somebody_asks(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.02), ("MEASURING", 60.0), ("WATCHED", 0.2), ("ASKED_FOR", 60.0), ("FRESH", 0.0)):
        monkeypatch.setattr(f"cdc.keeper.{name}", seconds)
    keeper = Keeper(installed, database="shop", process=5, retention=60.0, alarm=2**40)
    with at_work(keeper):
        until(lambda: keeper.measured_at > 0, "it measures once")
        first = keeper.measured_at
        time.sleep(0.4)
        assert keeper.measured_at == first
        keeper.ask()
        until(lambda: keeper.measured_at > first + 0.6, "again and again")


def test_what_the_keeper_may_leave_out_is_well_within_the_lease() -> None:
    assert BEAT < LONGEST_SILENCE
    assert LONGEST_SILENCE + 1.5 < LEASE


def test_a_running_daemon_says_that_triggers_differ_and_when_they_are_right_again(
    tmp_path: Path, database: str, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    look = connect(database)
    fetch(look, "create table one (id int primary key); create table two (id int primary key)")
    project = Project(tmp_path, database, {"public.*": {}}, "{table}.jsonl")
    project.cdc("migrate")
    options = configuration.load(project.config, option_models(), {}).databases["shop"]
    for name, seconds in (("BEAT", 0.02), ("RECONCILING", 0.02)):
        monkeypatch.setattr(f"cdc.keeper.{name}", seconds)
    keeper = Keeper(
        database,
        database="shop",
        process=5,
        retention=60.0,
        alarm=2**40,
        find_drift=lambda connection: diagnosis.find_drift(connection, options),
    )
    with at_work(keeper):
        for spoil, sentence in (
            ('drop trigger "00_cdc_capture" on one', "public.one: trigger differs from the configuration"),
            ('alter table two disable trigger "00_cdc_capture"', "public.two: trigger is disabled"),
            ("create table three (id int primary key)", "public.three: trigger is missing"),
        ):
            fetch(look, spoil)
            until(lambda: any(sentence in told for told in keeper.drift), sentence)  # noqa: B023  # called at once
        project.cdc("migrate")
        until(lambda: not keeper.drift, "all is well again")
    said = [record.getMessage() for record in caplog.records if "configuration says" in record.getMessage()]
    assert said[-1] == "The triggers are what the configuration says again."
    assert 1 < len(said) <= 7
