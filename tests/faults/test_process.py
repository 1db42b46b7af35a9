"""Our own process on its bad days: killed between any two lines, hung, full of bugs, torn from its sessions.

* **Killed at a named point.** Under load the daemon dies at each point of :data:`cdc.crashpoints.POINTS` in turn, in
  one project after the other, so that each start has to make good what the last death left behind. In between the
  outbox is turned and truncated, which only a retention of `RETENTION` allows.
* **Killed at any moment**: while it starts, or, when it hurts, right after something was written.
* **Told to stop while a sink hangs**: the standard output of the ``stdout`` sink is a pipe that nobody reads.
* **A bug in one sink**: see ``raises_in_one_sink`` in ``mutants.py``.
* **Its sessions ended** by ``pg_terminate_backend``: the pipeline's, the listener's, the keeper's.

After each: nothing lost, nothing out of order, nothing that was not committed, duplicates at most one batch for each
fault, and no writer has noticed. That a process has died at its point is seen by the signal: nobody else sends it.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import random
import shutil
import signal
import termios
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from harness import CDC, SINK, Daemon, Project, Tail, read_lines, until
from judge import read_source
from mutants import mutant
from psycopg2.extensions import connection
from verdict import judged, settle
from workload import CAPTURED, TABLES, Workload

from cdc.crashpoints import POINTS

BATCH = 500
"""The default of `batch: {events: …}`: what one fault can repeat."""
LOAD: dict[str, Any] = {"rate": 10.0, "linger": 0.05, "truncate_at": 2.0}
RETENTION = "100ms"
HEALED = 15.0
"""Longest back-off between two tries to connect, in seconds, and what it then takes."""
AT_ONCE = 5.0
"""Seconds; a busy machine may take some."""

Scale = Callable[[Any, Any], Any]
Figures = Callable[..., None]
Mirror = Callable[..., Project]
Connect = Callable[..., connection]


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def wait_for_more(file: Path, pause: float = 0.01) -> None:
    """Wait until something is written."""
    began = size(file)
    until(lambda: size(file) > began, "something more is delivered", pause=pause)


def ask(conn: connection, statement: str, *parameters: object) -> list[Any]:
    with conn.cursor() as cursor:
        cursor.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []


# -- killed at a named point ------------------------------------------------------------------------------------

TURNS = "select last_value >> 24 from cdc.event_seq"
"""How often the outbox was turned."""
POISON = "p" * 50
"""A schema whose name makes the sink's file names too long for any file system."""
BELL = ("before-listen", "after-listen", "before-arm", "after-arm")
ELSEWHERE = ("before-commit", "before-close", "after-close", "half-compressed", "after-compress")
"""Points of other sinks, and of files that are closed: see test_exactly_once.py and test_rotation.py."""
TROUBLE = ("in-back-off", "after-dead-letter", "before-rotate", "after-rotate", "draining", "after-acknowledge")
PARKING = ("after-park", "before-replay", "after-replay")
"""Reached under another failure policy: see test_parking_kill.py."""
BACKFILL = ("after-chunk", "before-rows", "between-rows", "after-rows", "after-chunk-stored", "before-backfill-ends")
"""See test_backfill.py."""
ROUTES = {
    "bell": BELL,
    "delivery": tuple(point for point in POINTS if point not in BELL + TROUBLE + PARKING + BACKFILL + ELSEWHERE),
    "trouble": TROUBLE,
}
SELDOM = dict.fromkeys((*BELL, *TROUBLE, "after-claim"), 1) | {"in-back-off": 3, "after-dead-letter": 3}
"""How often a daemon passes a point within a second or two, if it does not pass it with every batch."""
OFTEN = 25


class Scaffold:
    """Where daemons are put to death, each at a named point.

    Attributes:
        poisoned: events that can never be delivered.
    """

    def __init__(self, project: Project, conn: connection, rng: random.Random) -> None:
        self.poisoned = 0
        self._project = project
        self._conn = conn
        self._rng = rng

    def execute(self, point: str) -> None:
        """Start a daemon and bring it to that point; AssertionError unless it dies there."""
        count = self._rng.randint(1, SELDOM.get(point, OFTEN))
        with self._prepared(point, count):
            armed = {"CDC_CRASH_AT": f"{point}:{count}"}
            for _ in range(10):
                with self._project.daemon(serving=False, environment=armed) as daemon:
                    if point in {"draining", "after-acknowledge"}:
                        self._tell_to_stop(daemon)
                    code = daemon.ends()
                if not (code == 0 and point == "after-acknowledge"):  # it had nothing in hand that moment
                    break
        assert code == -signal.SIGKILL, f"not dead at {armed['CDC_CRASH_AT']}, but {code}: {daemon.said()[-2000:]}"

    def _tell_to_stop(self, daemon: Daemon) -> None:
        daemon.wait_until_serving()
        wait_for_more(self._project.file, pause=0.0005)
        daemon.process.send_signal(signal.SIGTERM)

    @contextlib.contextmanager
    def _prepared(self, point: str, count: int) -> Iterator[None]:
        """Make what a point needs to be reached, and mend it."""
        if point in {"before-arm", "after-arm"}:
            self._hold_the_writers()  # and the daemon falls asleep
            try:
                yield
            finally:
                ask(self._conn, "commit")
        elif point == "in-back-off":
            directory = self._project.file.parent
            away = directory.rename(directory.with_name("away"))
            directory.write_text("in the way")
            try:
                yield
            finally:
                directory.unlink()
                away.rename(directory)
        else:
            if point == "after-dead-letter":
                self.poisoned += count
                ask(self._conn, f"insert into {POISON}.poison select from generate_series(1, {count})")
            yield

    def _hold_the_writers(self) -> None:
        ask(self._conn, "set deadlock_timeout = '50ms'")
        while True:
            try:
                ask(self._conn, "begin; lock table hot, pair")
            except psycopg2.errors.DeadlockDetected:  # they lock the two in any order
                ask(self._conn, "rollback")
            else:
                return


@pytest.fixture
def scaffold(
    tmp_path: Path, database: str, mirror: Mirror, connect: Connect
) -> Iterator[Callable[[random.Random], tuple[Project, Scaffold]]]:
    """A project whose sink can be got into every kind of trouble, and the scaffold before it."""
    out = tmp_path / "out"

    def make(rng: random.Random) -> tuple[Project, Scaffold]:
        conn = connect(database)
        ask(conn, f"create schema {POISON}; create table {POISON}.poison (id serial primary key)")
        project = mirror(
            database,
            database={"retention": RETENTION, "tables": {**CAPTURED, f"{POISON}.poison": {}}},
            sink={"path": str(out / ("{schema}" * 6 + ".jsonl"))},
        )
        project.file = out / ("public" * 6 + ".jsonl")
        return project, Scaffold(project, conn, rng)

    yield make
    shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("route", ROUTES)
def test_a_daemon_that_dies_at_a_named_point_loses_nothing(
    route: str,
    scaffold: Callable[[random.Random], tuple[Project, Scaffold]],
    connect: Connect,
    figures: Figures,
    scale: Scale,
    seed: int,
) -> None:
    rng = random.Random(f"{seed} executioner {route}")
    project, place = scaffold(rng)
    conn = connect(project.dsn)
    points = [point for _ in range(scale(1, 10)) for point in rng.sample(ROUTES[route], len(ROUTES[route]))]
    with Workload(project.dsn, seed, math.inf, **LOAD) as work:
        for point in points:
            place.execute(point)
            ask(conn, "select cdc.rotate(%s)", RETENTION)
        until(lambda: work.outcomes["truncated"] > 0, "the TRUNCATE is done")
        work.stop()
    deaths = len(points)
    verdict = settle(project, work, seed, least=30 * deaths, most_duplicates=deaths * BATCH)

    if route == "delivery":
        # Dead with a batch that the sink has and nobody knows of.
        assert verdict.duplicates > 0, "no death cost a duplicate"
    if route == "trouble":
        told = "select count(*), sum(attempts) from cdc.dead_letter where reason like '%too long%'"
        ((letters, attempts),) = ask(conn, told)
        assert letters == place.poisoned, "each poisoned event is one dead letter"
        assert attempts > letters, "none was met again after the death"
    ((turns,),) = ask(conn, TURNS)
    assert turns > 0
    figures(
        f"SIGKILL at the points of {route}: {', '.join(dict.fromkeys(points))}",
        verdict,
        kills=deaths,
        per_kill=verdict.per_fault(deaths),
        outbox_turned=turns,
    )


# -- killed at any moment ---------------------------------------------------------------------------------------


def test_kill_9_at_any_moment_loses_nothing(
    mirror: Mirror, database: str, connect: Connect, figures: Figures, scale: Scale, seed: int
) -> None:
    project = mirror(database, database={"retention": RETENTION})
    conn = connect(database)
    rng = random.Random(f"{seed} killer")
    kills = scale(12, 300)
    had_delivered = 0
    with Workload(project.dsn, seed, math.inf, open_at=1.0, open_for=scale(2.0, 10.0), **LOAD) as work:
        for number in range(kills):
            began = size(project.file)
            with project.daemon(serving=False) as daemon:
                if number % 3 == 0:  # perhaps before it serves anything
                    daemon.lives_for(rng.uniform(0.05, 1.0))
                else:
                    daemon.wait_until_serving()
                    daemon.lives_for(rng.uniform(0.05, 1.0))
                    # Where it hurts: delivered, and perhaps not yet acknowledged.
                    wait_for_more(project.file, pause=0.0005)
                    daemon.lives_for(rng.uniform(0.0, 0.005))
                daemon.kill()
            had_delivered += size(project.file) > began
            ask(conn, "select cdc.rotate(%s)", RETENTION)
        work.stop()
    verdict = settle(project, work, seed, least=80 * kills, most_duplicates=kills * BATCH)
    assert work.outcomes["truncated"] == work.outcomes["stayed open"] == 1
    assert had_delivered >= kills / 2, "most of them had delivered nothing"
    assert verdict.duplicates > 0, "no kill came between a delivery and its acknowledgement"
    figures(
        "SIGKILL at any moment",
        verdict,
        kills=kills,
        after_deliveries=had_delivered,
        per_kill=verdict.per_fault(kills),
        outbox_turned=ask(conn, TURNS)[0][0],
        peak_MiB=project.peak / 2**20,
    )


# -- told to stop while a sink hangs ----------------------------------------------------------------------------

PIPED = ("/bin/sh", "-c", 'exec "$0" "$@" > "$PIPE"', CDC)
"""`cdc`, its standard output to what $PIPE names."""


class Screen:
    """What stands at the other end of a daemon's standard output, and looks only when told to.

    Attributes:
        lines: whole ones, so far.
    """

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.lines: list[str] = []
        self.environment = {"PIPE": str(path)}
        self._pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._room = fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, 4096)

    @property
    def full(self) -> bool:
        """Whether the one who writes has to wait."""
        unread = bytearray(4)
        fcntl.ioctl(self._pipe, termios.FIONREAD, unread)
        return int.from_bytes(unread, "little") >= self._room

    def read_until(self, ended: Callable[[], bool]) -> None:
        """Read everything until the daemon has ended; half a line in the end was cut off by its death."""
        text = b""

        def look() -> bool:
            nonlocal text
            has_ended = ended()
            with contextlib.suppress(BlockingIOError):
                while data := os.read(self._pipe, 1 << 16):
                    text += data
            return has_ended

        until(look, "the daemon ends")
        self.lines += text.decode(errors="replace").split("\n")[:-1]

    def close(self) -> None:
        os.close(self._pipe)


@pytest.mark.full
def test_a_daemon_whose_sink_hangs_ends_at_the_second_signal_and_when_the_sink_moves_at_the_first(
    tmp_path: Path, mirror: Mirror, database: str, connect: Connect, figures: Figures, seed: int
) -> None:
    project = mirror(database, sinks={"screen": {"type": "stdout"}})
    conn = connect(database)

    def served() -> list[str]:
        connected = "select application_name from pg_stat_activity where datname = current_database()"
        return [name for (name,) in ask(conn, connected) if name in {"cdc mirror", "cdc screen"}]

    with contextlib.closing(Screen(tmp_path / "pipe")) as screen, Workload(project.dsn, seed, math.inf, **LOAD) as work:
        for patient in (False, True):
            with project.daemon(program=PIPED, environment=screen.environment) as daemon:
                until(lambda: screen.full, "the sink hangs")
                wait_for_more(project.file)
                began = time.monotonic()
                daemon.process.send_signal(signal.SIGTERM)
                until(lambda: served() == ["cdc screen"], "the other pipeline has drained")
                daemon.lives_for(0.5)
                if patient:
                    screen.read_until(lambda: daemon.process.poll() is not None)
                    assert daemon.ends() == 0
                else:
                    drained = time.monotonic() - began
                    began = time.monotonic()
                    daemon.process.send_signal(signal.SIGTERM)
                    assert daemon.ends() == 128 + signal.SIGTERM
                    ended = time.monotonic() - began
                    screen.read_until(lambda: True)
        until(lambda: work.outcomes["truncated"] > 0, "the TRUNCATE is done")
        work.stop()
    assert ended < AT_ONCE
    rest = project.cdc("run", "--until-idle").stdout.split("\n")[:-1]
    assert rest, "nothing was left for the screen, so it has not hung"
    verdict = settle(project, work, seed, least=300, most_duplicates=0)
    shown = judged(
        [*screen.lines, *rest], work.committed, read_source(project.dsn, TABLES), seed, most_duplicates=BATCH
    )
    figures(
        "SIGTERM while a sink hangs",
        shown,
        other_sinks=f"lost {verdict.lost}, duplicates {verdict.duplicates}, drained within {drained:.2g} s",
        second_signal_ends_within_s=ended,
    )


# -- a bug in one sink ------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_sink_full_of_bugs_holds_up_nobody_else_and_loses_nothing_itself(
    mirror: Mirror, database: str, connect: Connect, figures: Figures, scale: Scale, seed: int
) -> None:
    retry = {"initial": "10ms", "max": "100ms"}
    project = mirror(database)
    shaky_file = project.directory / "shaky.jsonl"
    project.content["sinks"]["shaky"] = {"type": "file", "path": str(shaky_file), "start": "earliest", "retry": retry}
    project.write()
    conn = connect(database)
    seconds = scale(6.0, 60.0)

    def standing(sink: str) -> tuple[int, str, object]:
        return tuple(ask(conn, "select epoch, state, state_since from cdc.sink where name = %s", sink)[0])

    with (
        project.daemon(program=mutant("raises-in-one-sink")) as daemon,
        Tail(project.file) as tail,
    ):
        until(lambda: standing(SINK)[1] == "running", "the good sink runs")
        before = standing(SINK)
        with Workload(project.dsn, seed, seconds, **LOAD) as work:
            work.join()
        assert standing(SINK) == before, "the good sink was interrupted"
        assert daemon.drain() == 0
    said = daemon.said()
    raised = said.count("The sink raised what it should not")
    broken = said.count("The pipeline failed as it should not")
    assert raised >= 15
    assert broken >= 2
    assert said.count("The sink could not be closed.") >= broken
    assert standing("shaky")[0] > broken
    verdict = settle(project, work, seed, least=50 * int(seconds), most_duplicates=0)
    shaky = judged(
        read_lines(shaky_file),
        work.committed,
        read_source(project.dsn, TABLES),
        seed,
        most_duplicates=(raised + broken) * BATCH,
    )
    pause = max(later - earlier for earlier, later in pairwise(tail.arrivals))
    assert pause < AT_ONCE, "the good sink waited for the bad one"
    figures(
        "bugs in one sink",
        shaky,
        raised=raised,
        pipeline_broken=broken,
        other_sink=f"lost {verdict.lost}, duplicates {verdict.duplicates}, longest pause {pause:.2g} s",
    )


# -- sessions ended ---------------------------------------------------------------------------------------------

SESSIONS = ("cdc mirror", "cdc listener", "cdc keeper")


@pytest.mark.full
def test_a_daemon_whose_sessions_are_terminated_comes_back_and_loses_nothing(
    mirror: Mirror, database: str, connect: Connect, figures: Figures, scale: Scale, seed: int
) -> None:
    project = mirror(database)
    conn = connect(database)
    rng = random.Random(f"{seed} administrator")
    rounds = scale(4, 60)
    healed: list[float] = []

    def pids() -> dict[str, int]:
        found = "select application_name, pid from pg_stat_activity where datname = current_database()"
        return {name: pid for name, pid in ask(conn, found) if name in SESSIONS}

    with project.daemon() as daemon, Workload(project.dsn, seed, math.inf, **LOAD) as work:
        for _ in range(rounds):
            until(lambda: len(pids()) == len(SESSIONS), "all are connected", HEALED)
            wait_for_more(project.file, pause=0.0005)
            killed = pids()
            for name in rng.sample(SESSIONS, len(SESSIONS)):
                assert ask(conn, "select pg_terminate_backend(%s)", killed[name]) == [(True,)]
                if rng.random() < 0.5:
                    daemon.lives_for(rng.uniform(0.0, 0.3))
            began = time.monotonic()
            back = pids
            until(
                lambda: len(back()) == len(SESSIONS) and not set(back().values()) & set(killed.values()),  # noqa: B023  # called at once
                "all are connected anew",
                HEALED,
            )
            wait_for_more(project.file)
            healed.append(time.monotonic() - began)
        work.stop()
        work.join()
        assert daemon.drain() == 0
    said = daemon.said()
    assert said.count("The pipeline is interrupted.") >= rounds
    assert said.count("The listener's connection is lost") >= rounds
    assert said.count("The keeper is interrupted.") >= 1
    assert ask(conn, "select epoch from cdc.sink") == [(1 + rounds,)]
    verdict = settle(project, work, seed, least=100 * rounds, most_duplicates=rounds * BATCH)
    figures(
        "pg_terminate_backend of the pipeline's, the listener's and the keeper's session",
        verdict,
        kills=rounds * len(SESSIONS),
        per_round=verdict.per_fault(rounds),
        delivering_again_after_s=max(healed),
    )
