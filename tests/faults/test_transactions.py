"""Transactions that stay open, and such that fail: the one delays nobody else, the other leaves no trace.

What an open transaction has written belongs to the past and cannot be read yet. A reader that waits for it delays
everybody (`WATERMARK`, which has to be condemned); one that passes over it has to come back to it: at its COMMIT, or at
its COMMIT PREPARED, for which no session needs to be there any more. Delay is measured from COMMIT to the line in the
file, in one run, before and while the transaction is open. On a machine with other users the 99th percentile is
uncertain, always towards more; so it is measured up to `TRIES` times, and one good time is proof: a reader that waits
for the transaction waits each time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from cluster import Cluster
from harness import Project, Tail, percentile, until
from judge import Fact, facts_of, to_stream
from psycopg2.extensions import connection
from verdict import settle
from workload import OWN_KEY, Workload

FACTOR, FLOOR = 1.2, 0.005
"""The 99th percentile of the others may become so many times as long, or so many seconds longer."""
TRIES = 3
AT_ONCE = 1.0
"""Seconds from COMMIT to the line, at most: of the open transaction's last change, and of 99 in a hundred others."""
ROWS = 100

Scale = Callable[[Any, Any], Any]
Figures = Callable[..., None]
Connect = Callable[..., connection]
Mirror = Callable[..., Project]


def ask(conn: connection, statement: str, *parameters: object) -> list[Any]:
    with conn.cursor() as cursor:
        cursor.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []


class Period:
    """A while without an open transaction, and one with it.

    Attributes:
        before, during: of the writers' changes, seconds from COMMIT to the line in the file.
        own: of those of the open transaction.
        status: of the database, as `cdc status` said while it was open.
    """

    def __init__(self, project: Project, work: Workload, conn: connection, number: int) -> None:
        self.before: list[float] = []
        self.during: list[float] = []
        self.own: list[float] = []
        self.status: dict[str, Any] = {}
        self._project = project
        self._work = work
        self._conn = conn
        self._marks = [-(ROWS * number + row) for row in range(1, ROWS + 1)]

    def go_through(self, tail: Tail, quiet: float, open_for: float, *, prepared: bool) -> None:
        """See how long others take, before and while a transaction is open that has written.

        Args:
            tail: of the file.
            quiet: seconds before it is opened.
            open_for: seconds it stays open.
            prepared: whether it is prepared, and nobody's from then on.
        """
        began = time.time()
        wait_until(began + quiet)
        quiet_until = time.time()
        ask(self._conn, "begin")
        ask(
            self._conn,
            "insert into hot (id, ver, mark) select %s - mark, 1, mark from unnest(%s::bigint[]) mark",
            OWN_KEY,
            self._marks,
        )
        if prepared:
            ask(self._conn, "prepare transaction 'forgotten'")
        self.status = self._project.status()["databases"]["shop"]
        opened = time.time()  # to look on costs time too
        wait_until(opened + open_for)
        ended = time.time()
        ask(self._conn, "commit prepared 'forgotten'" if prepared else "commit")
        facts = dict.fromkeys((Fact("hot", "insert", mark) for mark in self._marks), ended)
        self._work.committed |= facts

        lines: list[str] = []

        def all_are_there() -> bool:
            # What is being written may end in the middle of a line.
            lines[:] = self._project.file.read_bytes().decode(errors="replace").split("\n")[:-1]
            return sum('"mark":-' in line for line in lines) >= -self._marks[-1]

        until(all_are_there, "what it has written is delivered", pause=0.1)
        tail.wait_for(len(lines))
        for fact, line in facts_of(to_stream(lines)).items():
            at = self._work.committed.get(fact, 0.0)  # 0: it is delivered, and its writer does not know yet
            delay = tail.arrivals[line.number - 1] - at
            if fact in facts:
                self.own.append(delay)
            elif began <= at < quiet_until:
                self.before.append(delay)
            elif opened <= at < ended:
                self.during.append(delay)


def undisturbed(periods: list[Period]) -> bool:
    """Whether the others have once taken no longer than they had without an open transaction in this run."""
    usual = max(p99(period.before) for period in periods)
    return min(p99(period.during) for period in periods) <= max(usual * FACTOR, usual + FLOOR)


def wait_until(moment: float) -> None:
    """Until then nothing is expected to happen that could be waited for."""
    until(lambda: time.time() >= moment, "time passes", math.inf)


def p99(delays: list[float]) -> float:
    return percentile(delays, 0.99)


WATERMARK = "a reader that waits for the oldest open transaction"
CASES = ["open", "prepared", WATERMARK]


def make_it_wait(conn: connection) -> None:
    """`WATERMARK`: read up to where everything has ended, as those do who keep one number for a position."""
    ((source,),) = ask(conn, "select pg_get_functiondef('cdc.next_batch'::regproc)")
    now = "now_snap := pg_current_snapshot();"
    assert source.count(now) == 1, "cdc.next_batch no longer says where a window ends"
    xmin = "pg_snapshot_xmin(pg_current_snapshot())"
    ask(conn, source.replace(now, f"now_snap := format('%s:%s:', {xmin}, {xmin})::pg_snapshot;"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.full
def test_a_transaction_that_stays_open_delays_nobody_and_is_delivered_when_it_ends(
    *,
    case: str,
    clusters: Callable[..., Cluster],
    mirror: Mirror,
    connect: Connect,
    figures: Figures,
    scale: Scale,
    seed: int,
) -> None:
    cluster = clusters({"max_prepared_transactions": "10", "fsync": "off"})
    # Who has rung cannot be prepared.
    options = {"database": {"notify": "off"}} if case == "prepared" else {}
    project = mirror(cluster.create_database("shop"), **options)
    conn = connect(project.dsn)
    quiet, open_for = scale((3.0, 20.0), (120.0, 600.0))
    if case == WATERMARK:
        make_it_wait(conn)
        quiet, open_for = 1.0, 3.0
    elif case == "prepared":
        open_for = scale(5.0, 600.0)
    work = Workload(project.dsn, seed, math.inf, writers=4, rate=25, lulls=False)
    periods: list[Period] = []
    with Tail(project.file) as tail, project.daemon() as daemon, work:
        until(lambda: len(tail.arrivals) > 100, "changes flow")
        while not periods or (len(periods) < TRIES and case != WATERMARK and not undisturbed(periods)):
            periods.append(Period(project, work, conn, len(periods)))
            periods[-1].go_through(tail, quiet, open_for, prepared=case == "prepared")
        work.stop()
        work.join()
        assert daemon.drain() == 0
    verdict = settle(project, work, seed, least=300, most_duplicates=0)

    period = periods[-1]
    oldest = period.status["oldest_transaction"]
    assert len(period.own) == ROWS
    assert max(period.own) < AT_ONCE
    if case == WATERMARK:
        assert not undisturbed(periods)
        assert p99(period.during) > open_for * 0.9
        figures(f"mutant: {case}", "condemned, as it has to be", others_p99_s=p99(period.during))
        return
    assert len(period.before) > 40 * quiet
    assert len(period.during) > 40 * open_for
    assert oldest["prepared"] == ("forgotten" if case == "prepared" else None)
    assert oldest["age_seconds"] > 0
    measured = ", ".join(f"{1000 * p99(p.before):.1f} → {1000 * p99(p.during):.1f}" for p in periods)
    assert undisturbed(periods), f"p99 of the others, ms: {measured}"
    assert min(p99(p.during) for p in periods) < AT_ONCE
    figures(
        f"a transaction {case} for {open_for:.0f} s",
        verdict,
        others_p99_ms=measured,
        p50_ms=f"{1000 * percentile(period.before, 0.5):.1f} → {1000 * percentile(period.during, 0.5):.1f}",
        its_own_after_s=max(period.own),
    )


def test_a_transaction_that_failed_leaves_no_trace(
    *, mirror: Mirror, database: str, connect: Connect, figures: Figures, scale: Scale, seed: int
) -> None:
    project = mirror(database)
    conn = connect(database)
    # So few rows that they are always in each other's way.
    work = Workload(database, seed, scale(4.0, 300.0), keys=12, rate=60)
    with project.daemon() as daemon:
        with work:
            work.join()
        assert daemon.drain() == 0
    verdict = settle(project, work, seed, least=scale(300, 20_000), most_duplicates=0)
    ((deadlocks,),) = ask(conn, "select deadlocks from pg_stat_database where datname = current_database()")
    outcomes = work.outcomes
    serialization = outcomes["retried"] - deadlocks
    assert outcomes["serializable"] > 20
    assert serialization > 20, f"hardly anybody failed to be serialized: {dict(outcomes)}, {deadlocks} deadlocks"
    assert deadlocks > 0
    assert outcomes["rolled back"] > 5
    assert outcomes["failed"] > 0
    figures(
        "failed transactions",
        verdict,
        serialization=serialization,
        deadlocks=deadlocks,
        rolled_back=outcomes["rolled back"],
        constraint=outcomes["failed"],
    )
