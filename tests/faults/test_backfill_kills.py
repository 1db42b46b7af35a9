"""A backfill under fire: eight writers change the table it reads, and the daemon is killed over and over.

Every write of a row draws a higher version, keys are never used twice, rows change their keys in both directions. What
has to hold of the lines of the file, in their order:

* applied one after the other they make exactly the table;
* leaving out what comes again under an old id, a row's version never goes down: a row is told of after every change it
  contains and before every one it does not;
* no writer has noticed; memory is bounded.

Two mutants have to be condemned: rows delivered before the page they belong after, and after the next one.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from harness import Project, report, until
from mutants import mutant
from psycopg2.extensions import connection
from sql import fetch

from cdc.consumer import EventFile
from cdc.event import Op

WRITERS = 8
MEMORY = 200 * 2**20
POINTS = ("after-chunk", "before-rows", "between-rows", "after-rows", "after-chunk-stored", "before-backfill-ends")
"""The last one is reached once; it ends the rest."""
SCHEMA = """
create sequence version;
create sequence fresh start 1000000000;
create table item (id bigint primary key, ver bigint not null default nextval('version'), note text not null);
insert into item (id, note) select g, 'row ' || g from generate_series(1, {rows}) g;
"""

Scale = Callable[[Any, Any], Any]
Figures = Callable[..., None]
Connect = Callable[..., connection]


class Writers:
    """Eight threads that change the table until they are told to stop.

    Attributes:
        committed: transactions so far.
        failed: what a writer was told that it should not have been.
    """

    def __init__(self, dsn: str, seed: int, rows: int, pause: float = 0.0) -> None:
        self.committed = 0
        self.failed: list[str] = []
        self._rows = rows
        self._pause = pause
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(dsn, random.Random(f"{seed} writer {number}")))
            for number in range(WRITERS)
        ]

    def _run(self, dsn: str, rng: random.Random) -> None:
        try:
            with contextlib.closing(psycopg2.connect(dsn)) as conn:
                while not self._stop.wait(self._pause):
                    with conn.cursor() as cursor:
                        for _ in range(rng.choice((1, 1, 1, 2, 3))):
                            self._write(cursor, rng)
                    if rng.random() < 0.05:
                        conn.rollback()
                    else:
                        conn.commit()
                        self.committed += 1
        except psycopg2.errors.DeadlockDetected:
            self._run(dsn, rng)  # they lock rows in any order; nobody else's fault
        except psycopg2.Error as error:
            self.failed.append(str(error))

    def _write(self, cursor: Any, rng: random.Random) -> None:
        one = rng.randint(1, self._rows)
        what = rng.random()
        if what < 0.7:
            cursor.execute("update item set ver = nextval('version'), note = %s where id = %s", (str(what), one))
        elif what < 0.8:
            cursor.execute("insert into item (id, note) values (nextval('fresh'), 'new')")
        elif what < 0.9:
            cursor.execute("delete from item where id = %s", (one,))
        else:
            # Ahead of the place the backfill has reached, or behind it.
            sign = rng.choice(("", "-"))
            cursor.execute(
                f"update item set id = {sign}nextval('fresh'), ver = nextval('version') where id = %s", (one,)
            )

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class WrongOrder(AssertionError):
    """A row's version went down."""


class NotTheTable(AssertionError):
    """The lines do not make the table."""


def judge(path: Path, conn: connection) -> dict[str, int]:
    """Read the file against the table. Raises WrongOrder, NotTheTable.

    Returns:
        How many lines there are, how many rows were told of, and how many lines had come before.
    """
    seen: set[str] = set()
    versions: dict[int, int] = {}
    copy: dict[Any, dict[str, Any]] = {}
    counts = {"lines": 0, "told": 0, "again": 0}
    for event in EventFile(path):
        counts["lines"] += 1
        counts["told"] += event.op is Op.READ
        event.apply_to(copy)
        if event.id in seen:
            counts["again"] += 1
            continue
        seen.add(event.id)
        if event.op is Op.DELETE:
            continue
        assert event.after is not None
        version, key = event.after["ver"], event.identity
        before = max(versions.get(key, 0), versions.get(event.former_identity, 0))
        if version < before or (version == before and event.op is not Op.READ):
            raise WrongOrder(f"{event.id}: row {key} has version {version} after {before}")
        versions[key] = version
    with conn.cursor("all") as cursor:  # in pages, for there may be a million
        cursor.execute("select id, ver, note from item")
        number = 0
        for id_, ver, note in cursor:
            number += 1
            if copy.get(id_) != {"id": id_, "ver": ver, "note": note}:
                raise NotTheTable(f"row {id_}: {copy.get(id_)} is told, {(id_, ver, note)} is there")
    if number != len(copy):
        raise NotTheTable(f"{len(copy)} rows are told, {number} are there")
    return counts


@pytest.fixture
def project(tmp_path: Path, database: str, connect: Connect) -> Iterator[Callable[..., Project]]:
    """``project(rows)``: a table of so many rows, captured after they were there."""
    made: list[Project] = []

    def make(rows: int) -> Project:
        fetch(connect(database), SCHEMA.format(rows=rows) + "analyze item")
        made.append(Project(tmp_path, database, {"public.item": {}}, "item.jsonl"))
        made[0].cdc("migrate")
        return made[0]

    yield make
    for one in made:
        one.remove_output()


def progress(conn: connection) -> tuple[str, int]:
    """The state of the last backfill and the key it has come to; how many rows there are left the writers decide."""
    rows = fetch(
        conn,
        """select b.state, coalesce(p.cursor[1]::bigint, 0) from cdc.backfill b
             left join cdc.backfill_progress p on p.backfill = b.id order by b.id desc limit 1""",
    )
    return rows[0] if rows else ("none", 0)


def rate_of(writers: Writers, seconds: float) -> float:
    """Transactions a second, for a while."""
    began, before = time.monotonic(), writers.committed
    threading.Event().wait(seconds)
    return (writers.committed - before) / (time.monotonic() - began)


def test_a_backfill_is_exact_while_eight_writers_change_the_table_and_the_daemon_is_killed(
    project: Callable[..., Project],
    database: str,
    connect: Connect,
    figures: Figures,
    scale: Scale,
    seed: int,
) -> None:
    rows, kills = scale(20_000, 1_000_000), scale(3, 20)
    place = project(rows)
    conn, source = connect(database), connect(database)
    source.autocommit = False
    rng = random.Random(f"{seed} backfill")
    # Slow enough for the kills to hit it.
    limits = ("--rate", str(scale(8000, 40_000)))
    with Writers(database, seed, rows, pause=0.005) as writers:
        with place.daemon():
            without = rate_of(writers, scale(2.0, 20.0))
        place.cdc("backfill", "start", "mirror", "public.item", *limits)
        began, before = time.monotonic(), writers.committed
        for number in range(kills):
            with place.daemon(serving=False) as daemon:
                wanted = rows * (number + 1) // (kills + 2)
                until(lambda: progress(conn)[1] >= wanted, "it has got further", 600)  # noqa: B023  # called at once
                daemon.lives_for(rng.uniform(0.0, 0.1))
                # Where it hurts: delivered, and perhaps not yet acknowledged.
                size = place.file.stat().st_size
                until(lambda: place.file.stat().st_size > size, "more is delivered", pause=0.0005)  # noqa: B023  # as above
                daemon.kill()
            assert progress(conn)[0] == "running", "it was over before it could be killed"
        with place.daemon() as daemon:
            until(lambda: progress(conn)[0] == "done", "the backfill is done", 1800)
            took = time.monotonic() - began
            during = (writers.committed - before) / took
            daemon.drain()
    assert writers.failed == []
    place.cdc("run", "--until-idle", timeout=600)
    found = judge(place.file, source)
    assert found["told"] >= rows * 0.5, "most rows were deleted before they could be told of"
    if kills >= 20:
        assert found["again"] > 0, "no kill came between a delivery and its acknowledgement"
    assert place.peak < MEMORY
    report(f"writers: {without:.0f} transactions/s without, {during:.0f} during the backfill (kills included)")
    figures(
        "SIGKILL during a backfill, 8 writers",
        "lines in order make the table, no row's version goes down, writers failed 0",
        rows=rows,
        kills=kills,
        seconds=took,
        **found,
        peak_MiB=place.peak / 2**20,
        writers_per_second_without=without,
        during=during,
    )


def test_a_daemon_that_dies_at_each_step_of_a_chunk_loses_nothing(
    project: Callable[..., Project], database: str, connect: Connect, figures: Figures, scale: Scale, seed: int
) -> None:
    place = project(scale(3000, 30_000))
    conn, source = connect(database), connect(database)
    source.autocommit = False
    rng = random.Random(f"{seed} chunks")
    with Writers(database, seed, scale(3000, 30_000), pause=0.02) as writers:
        # So many rows a second that the next chunk is not due at once: else it is stored as the next one is read.
        place.cdc("backfill", "start", "mirror", "--chunk", "40", "--rate", "1000")
        points = [point for _ in range(scale(1, 4)) for point in rng.sample(POINTS[:-1], len(POINTS) - 1)]
        for point in (*points, POINTS[-1]):
            count = rng.randint(1, 3) if point != POINTS[-1] else 1
            with place.daemon(serving=False, environment={"CDC_CRASH_AT": f"{point}:{count}"}) as daemon:
                assert daemon.ends(120) == -signal.SIGKILL, daemon.said()[-2000:]
            assert progress(conn)[0] == "running"
        with place.daemon() as daemon:
            until(lambda: progress(conn)[0] == "done", "the backfill is done", 300)
            daemon.drain()
    assert writers.failed == []
    place.cdc("run", "--until-idle")
    found = judge(place.file, source)
    assert found["again"] > 0
    figures(
        f"SIGKILL at {', '.join(POINTS)}",
        "lines in order make the table, no row's version goes down",
        kills=len(points) + 1,
        **found,
    )


@pytest.mark.parametrize("name", ["tells-of-rows-before-the-page", "tells-of-rows-a-page-later"])
def test_a_backfill_that_does_not_share_the_snapshot_of_its_page_is_condemned(
    project: Callable[..., Project], database: str, connect: Connect, scale: Scale, seed: int, name: str
) -> None:
    # Few rows, so that the writers meet those that are being read.
    place = project(300)
    conn, source = connect(database), connect(database)
    source.autocommit = False
    with Writers(database, seed, 300, pause=0.005) as writers, place.daemon(program=mutant(name)) as daemon:
        for _ in range(scale(4, 20)):
            fetch(
                conn,
                """insert into cdc.backfill (sink, relation, schema_name, table_name, chunk)
                   values ('mirror', 'item'::regclass, 'public', 'item', 50);
                   update cdc.sink set requests = requests + 1;
                   insert into item (id, note) select g, 'again' from generate_series(1, 300) g
                       on conflict do nothing""",
            )
            until(lambda: progress(conn)[0] == "done", "the backfill is done", 60)
        daemon.drain()
    assert writers.failed == []
    place.cdc("run", "--until-idle")
    with pytest.raises((WrongOrder, NotTheTable)):
        judge(place.file, source)
