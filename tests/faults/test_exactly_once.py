"""The postgres sink and sudden death: every event in the target once, whatever happens between two commits.

Two sinks deliver into another database what the worst writers do: one mirrors the tables, one appends every event to a
table. Nothing there hides a second delivery: the table of events has no unique index, and a trigger of the mirror
writes down every row that goes back to an earlier version. A file beside them, at least once, is judged as always, and
tells what the table of events has to hold, word for word.

Daemons that forget what they have applied, or write though they were overtaken, have to be found out.
"""

from __future__ import annotations

import contextlib
import math
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from harness import SINK, Project, is_stopped, read_lines, until
from mutants import mutant
from psycopg2.extensions import connection, parse_dsn
from test_takeover import GUILTY, a_role_that_may_end_nobody, change, lead
from verdict import settle
from workload import SCHEMA, Workload

from cdc.event import Event, Json

BATCH = 500
LOAD: dict[str, Any] = {"rate": 10.0, "linger": 0.05, "truncate_at": 2.0}
POINTS = ("after-deliver", "before-acknowledge", "before-commit", "after-read")
TARGET = f"""
    {SCHEMA}
    create table went_back (of text);
    create function watch() returns trigger language plpgsql as $$
      begin
        if new.ver < old.ver then
          insert into went_back values (tg_relname || ' ' || old.ver || ' to ' || new.ver);
        end if;
        return new;
      end $$;
    create trigger watch before update on hot for each row execute function watch();
    create trigger watch before update on pair for each row execute function watch();
    create table cdc_event (
      id text not null, op text not null, database text not null, schema_name text not null, table_name text not null,
      seq bigint not null, txid bigint not null, ts timestamptz not null, key json, before json, after json,
      changed text[], context json, truncated boolean not null);
"""
SETTINGS = "-c timezone=UTC -c intervalstyle=postgres -c extra_float_digits=1"

Scale = Callable[[Any, Any], Any]
Figures = Callable[..., None]
Mirror = Callable[..., Project]
Connect = Callable[..., connection]


def ask(conn: connection, statement: str, *parameters: object) -> list[Any]:
    with conn.cursor() as cursor:
        cursor.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def target(server: Any, database: str) -> Iterator[str]:
    """The dsn of another database, with the writers' tables and one for events."""
    name = f"{parse_dsn(database)['dbname']}_target"
    dsn = server.create_database(name)
    with contextlib.closing(psycopg2.connect(dsn)) as conn:
        ask(conn, TARGET)
        conn.commit()
    yield dsn
    server.drop_database(name)


@pytest.fixture
def project(mirror: Mirror, database: str, target: str) -> Project:
    """Three sinks, of which the two in the target are called twin and journal."""
    postgres = {"type": "postgres", "dsn": target}
    return mirror(database, sinks={"twin": postgres, "journal": {**postgres, "mode": "append"}})


def rows_of(dsn: str, table: str) -> Counter[str]:
    with contextlib.closing(psycopg2.connect(dsn, options=SETTINGS)) as conn:
        return Counter(text for (text,) in ask(conn, f"select t::text from {table} t"))


def differences(here: Counter[str], there: Counter[str]) -> tuple[int, int]:
    """How many rows are in one and not in the other, both ways."""
    return (here - there).total(), (there - here).total()


def flat(value: Json | str | None) -> str | None:
    """A value as it stands in a line."""
    raw = value.raw if isinstance(value, Json) else value
    return None if raw is None else raw.replace("\n", " ").replace("\r", " ")


def compare(project: Project, source: str, target: str) -> int:
    """See that the target has what the source has, and each event once; returns how many events.

    Everything is delivered, and no daemon runs any more.
    """
    for table in ("hot", "pair"):
        assert differences(rows_of(source, table), rows_of(target, table)) == (0, 0), f"{table} is not the source"
    with contextlib.closing(psycopg2.connect(target)) as conn:
        assert ask(conn, "select of, count(*) from went_back group by of") == []
        told = ask(
            conn,
            "select id, op, key::text, before::text, after::text, changed, table_name, seq from cdc_event order by seq",
        )
    with contextlib.closing(psycopg2.connect(source)) as conn:
        written = [seq for (seq,) in ask(conn, "select seq from cdc.event order by seq")]
    twice = {id_: times for id_, times in Counter(row[0] for row in told).items() if times > 1}
    assert not twice, f"{len(twice)} of {len(told)} events more than once, such as {next(iter(twice.items()))}"
    assert [row[-1] for row in told] == written, "there is a gap"
    lines = {event.id: event for event in map(Event.from_json, read_lines(project.file))}
    for id_, op, key, before, after, changed, table, seq in told:
        event = lines.pop(id_)
        names = None if event.changed is None else list(event.changed)
        assert (op, changed, table, seq) == (event.op.value, names, event.source.table, event.source.seq)
        assert tuple(map(flat, (key, before, after))) == tuple(map(flat, (event.key, event.before, event.after)))
    assert not lines, "the file has more"
    return len(told)


def wait_for_more(conn: connection) -> None:
    """Wait until something more is committed in the target."""
    count = "select count(*) from cdc_event"
    began = ask(conn, count)
    until(lambda: ask(conn, count) != began, "something more is in the target", pause=0.002)


def kill(project: Project, conn: connection, rng: random.Random, number: int) -> None:
    """Start a daemon, and let it die: at a named point, right after it has committed something, or at any moment."""
    way = number % 3
    armed = {"CDC_CRASH_AT": f"{rng.choice(POINTS)}:{rng.randint(3, 60)}"} if way == 0 else {}
    with project.daemon(serving=False, environment=armed) as daemon:
        if armed:
            assert daemon.ends(60) == -9, f"not dead at {armed}: {daemon.said()[-2000:]}"
            return
        daemon.wait_until_it_says("Serving.", times=3)
        daemon.lives_for(rng.uniform(0.05, 0.5))
        if way == 1:
            wait_for_more(conn)
            daemon.lives_for(rng.uniform(0.0, 0.005))
        daemon.kill()


@pytest.mark.timeout(1800)
def test_each_event_is_in_the_target_once_however_often_the_daemon_dies(
    project: Project, database: str, target: str, connect: Connect, figures: Figures, scale: Scale, seed: int
) -> None:
    rng = random.Random(f"{seed} once")
    conn = connect(target)
    kills = scale(9, 100)
    with Workload(database, seed, math.inf, **LOAD) as work:
        for number in range(kills):
            kill(project, conn, rng, number)
        until(lambda: work.outcomes["truncated"] > 0, "the TRUNCATE is done")
        work.stop()
    verdict = settle(project, work, seed, least=50 * kills, most_duplicates=kills * BATCH)
    events = compare(project, database, target)
    assert work.outcomes["rolled back"] > 0
    figures(
        "SIGKILL, and the postgres sink: each event once",
        verdict,
        kills=kills,
        in_the_target=events,
        duplicates_there=0,
        gaps_there=0,
        mirror_there="equal",
    )


@GUILTY
def test_forgetting_what_was_applied_is_found_out(
    guilty: bool, project: Project, database: str, target: str, connect: Connect, figures: Figures
) -> None:
    """A daemon dies between the target's commit and the acknowledgement; the next one is handed the same events."""
    project.content["sinks"] = {"journal": project.content["sinks"]["journal"]}
    project.write()
    program = mutant("forgets-what-it-wrote" if guilty else "harmless")
    ask(connect(database), "insert into hot (id, ver, mark) select g, 1, g from generate_series(1, 20) g")
    with project.daemon(program=program, serving=False, environment={"CDC_CRASH_AT": "after-deliver"}) as daemon:
        assert daemon.ends() == -signal.SIGKILL
    project.cdc("run", "--until-idle")
    ((events, ids),) = ask(connect(target), "select count(*), count(distinct id) from cdc_event")
    assert ids == 20
    assert events == (40 if guilty else 20)
    if guilty:
        figures("mutant: forgets what it wrote", f"condemned: {events - ids} events twice")


@GUILTY
def test_a_daemon_that_was_overtaken_writes_nothing(
    guilty: bool, mirror: Mirror, database: str, target: str, connect: Connect, figures: Figures
) -> None:
    """It stops with two versions of a row in its hands, and goes on when another has delivered the third and fourth."""
    project = mirror(database)
    project.content["sinks"] = {SINK: {"type": "postgres", "dsn": target}}
    project.write()
    conn, there = connect(database), connect(target)
    ask(conn, "insert into hot (id, ver, mark) values (1, 1, 1)")
    ask(conn, "update hot set ver = 2")
    program = mutant("ignores-the-claim" if guilty else "stops-where-it-would-die")
    with (
        a_role_that_may_end_nobody(conn, database) as dsn,
        project.daemon(program=program, environment={"CDC_CRASH_AT": "before-deliver:1"}) as late,
    ):
        until(lambda: is_stopped(late.process.pid), "it stops")
        # Who is silent, has been so for long: the lease is another test's business.
        change(conn, "cdc.holder", "max(a.state_change)", "max(a.state_change) - interval '1 min'")
        lead(project, dsn)
        with project.daemon():
            until(lambda: ask(there, "select ver from hot") == [(2,)], "the other delivers it")
            ask(conn, "update hot set ver = 3; update hot set ver = 4")
            until(lambda: ask(there, "select ver from hot") == [(4,)], "and more")
            late.thaw()
            if guilty:
                until(lambda: ask(there, "select ver from hot") == [(2,)], "it overwrites that")
            else:
                late.wait_until_it_says("another daemon writes to this target")
                assert ask(there, "select ver from hot") == [(4,)]
    assert ask(there, "select of from went_back") == ([("hot 4 to 2",)] if guilty else [])
    if guilty:
        figures("mutant: ignores the claim", "condemned: an old version over a new one")
