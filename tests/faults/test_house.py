"""What a daemon must not grow on: churn, a long outage, a sink that is stopped; and clocks that jump.

The outbox gives its space back by truncating whole tables, so its size is measured on disk, over time.
"""

from __future__ import annotations

import contextlib
import math
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from cluster import Cluster
from harness import Project, Tail, read_lines, until
from psycopg2.extensions import connection
from sql import fetch, value
from tools import Clock
from verdict import settle
from workload import Workload

from cdc.sql import QUERIES

MOST_MEMORY = 200 * 2**20
BATCH = 500
Connect = Callable[..., connection]


class Churn:
    """Clients that update one row each of table churn, again and again, as fast as the server lets them."""

    def __init__(self, dsn: str, clients: int) -> None:
        self.changes = 0
        self._dsn = dsn
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._update, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Churn:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        assert not self._errors, self._errors

    def _update(self, number: int) -> None:
        try:
            with contextlib.closing(psycopg2.connect(self._dsn)) as conn:
                conn.autocommit = True
                while not self._over.is_set():
                    fetch(conn, "update churn set n = n + 1, label = md5(n::text) where id = %s", (number,))
                    with self._lock:
                        self.changes += 1
        except BaseException as error:  # noqa: BLE001  # raised again at the end
            self._errors.append(error)


@pytest.fixture
def project(tmp_path: Path, cluster: Cluster) -> Iterator[Project]:
    """Table churn, captured, kept for 2 seconds."""
    dsn = cluster.create_database("shop")
    with contextlib.closing(psycopg2.connect(dsn)) as conn:
        fetch(conn, "create table churn (id int primary key, n int not null, label text not null)")
        fetch(conn, "insert into churn select i, 0, '' from generate_series(0, 99) i")
        conn.commit()
    made = Project(tmp_path, dsn, {"public.churn": {}}, "{database}.jsonl", database={"retention": "2s"})
    made.cdc("migrate")
    yield made
    made.remove_output()


def outbox_bytes(look: connection) -> int:
    return int(value(look, QUERIES["outbox_bytes"]))


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_under_churn_the_outbox_stays_as_small_as_its_retention_allows(
    project: Project, connect: Connect, figures: Callable[..., None], scale: Callable[[float, float], float]
) -> None:
    seconds, retention = scale(16.0, 1800.0), scale(2.0, 60.0)
    project.content["databases"]["shop"]["retention"] = f"{retention:g}s"
    project.write()
    look = connect(project.dsn)
    sizes: list[int] = []
    changes: list[int] = []
    began = time.monotonic()
    with project.daemon() as daemon, Churn(project.dsn, 4) as churn:
        while (passed := time.monotonic() - began) < seconds:
            if passed >= len(sizes) * seconds / 32:
                sizes.append(outbox_bytes(look))
                changes.append(churn.changes)
            daemon.lives_for(0.1)
        rate = churn.changes / passed
        memory = daemon.peak_rss()
    truncated = daemon.said().count("truncated")
    per_event = value(look, "select avg(pg_column_size(e))::int + 100 from cdc.event e")  # two index entries, headers
    # Three tables take turns of a third of the retention; one is emptied when it is older than all of it.
    allowed = per_event * rate * (2 * retention + 5)
    early, late = max(sizes[8:16]), max(sizes[16:])
    figures(
        f"churn for {seconds:.0f} s, retention {retention:.0f} s",
        "outbox bounded, writers failed 0",
        changes_per_s=rate,
        outbox_MiB_over_time=" ".join(f"{size / 2**20:.1f}" for size in sizes[::4]),
        truncations=truncated,
        peak_MiB=memory / 2**20,
    )
    assert churn.changes > 50 * seconds, "hardly any churn"
    assert truncated >= seconds / retention / 8
    # Where the writers got faster meanwhile, because others left the machine, there is as much more to keep.
    faster = max(1.0, (changes[-1] - changes[15]) / (changes[15] - changes[0]))
    assert late < early * faster * 1.5 + 2**20, "it grows"
    assert late < allowed + 2**20, f"{late} bytes on disk, {allowed:.0f} would do"
    assert memory < MOST_MEMORY


@pytest.mark.full
def test_after_an_outage_the_backlog_is_caught_up_in_flat_memory_while_changes_go_on(
    project: Project, connect: Connect, figures: Callable[..., None], scale: Callable[[int, int], int]
) -> None:
    backlog = scale(60_000, 1_000_000)
    writer = connect(project.dsn)
    fetch(writer, "insert into churn select i, 0, '' from generate_series(1000, 1999) i")
    for _ in range(backlog // 1000):
        fetch(writer, "update churn set n = n + 1, label = md5(n::text) where id >= 1000")
    backlog += 1000
    with Churn(project.dsn, 1) as churn:
        arrivals, began = churn.changes, time.monotonic()
        with Tail(project.file) as tail, project.daemon() as daemon:
            until(lambda: len(tail.arrivals) >= backlog, "the backlog is delivered", seconds=600, pause=0.1)
            seconds = time.monotonic() - began
            arrival_rate = (churn.changes - arrivals) / seconds
            delivered = len(tail.arrivals)
            memory = daemon.peak_rss()
            until(lambda: project.status()["databases"]["shop"]["sinks"]["mirror"]["lag_seconds"] < 5, "no lag")
    figures(
        f"backlog of {backlog} events after an outage",
        "all delivered, memory flat",
        events_per_s=delivered / seconds,
        arrivals_per_s=arrival_rate,
        times_the_arrivals=delivered / seconds / arrival_rate,
        peak_MiB=memory / 2**20,
    )
    assert delivered / seconds >= 5 * arrival_rate
    assert memory < MOST_MEMORY


@pytest.mark.full
def test_a_sink_that_stands_still_holds_the_outbox_says_so_and_can_be_forgotten(
    project: Project, connect: Connect
) -> None:
    sink = dict(project.content["sinks"]["mirror"])
    project.content["sinks"]["left"] = {**sink, "path": str(project.directory / "left.jsonl")}
    project.write()
    project.cdc("migrate")
    del project.content["sinks"]["left"]  # nobody wants it any more, and its position is still there
    project.content["databases"]["shop"]["retention"] = "1s"
    project.content["databases"]["shop"]["outbox_alarm"] = "1MiB"
    project.write()
    look = connect(project.dsn)
    with project.daemon() as daemon, Churn(project.dsn, 2):
        daemon.wait_until_it_says("The outbox has grown beyond its alarm.", seconds=60)
        assert "left (" in daemon.said()
        shown = project.status()["databases"]["shop"]
        assert shown["outbox_held_by"] == ["left"]
        assert shown["sinks"]["left"]["state"] == "unknown"
        assert any("outbox_alarm" in problem for problem in shown["problems"])
        assert "the outbox keeps what left has not delivered" in project.cdc("status").stdout
        held = outbox_bytes(look)
        refused = project.cdc("sinks", "forget", "mirror", codes=(78,)).stderr
        assert "remove it there first" in refused
        assert "sink left is forgotten" in project.cdc("sinks", "forget", "left").stdout
        until(lambda: outbox_bytes(look) < held / 2, "its space is given back", seconds=60, pause=0.2)
        assert project.status()["databases"]["shop"]["outbox_held_by"] == []
        project.cdc("sinks", "forget", "left", codes=(1,))  # twice is once too often


@pytest.mark.full
def test_an_open_transaction_that_wrote_nothing_here_keeps_no_space(project: Project, connect: Connect) -> None:
    idle = connect(project.dsn, autocommit=False)
    value(idle, "select pg_current_xact_id()")
    look = connect(project.dsn)
    with project.daemon() as daemon:
        with Churn(project.dsn, 1):
            daemon.wait_until_it_says("truncated", seconds=40)
        until(lambda: value(look, "select count(*) from cdc.event") == 0, "all is given back", seconds=40, pause=0.2)


@pytest.mark.parametrize("history", [10_000, 100_000])
@pytest.mark.full
def test_what_a_read_touches_does_not_grow_with_the_history_that_is_kept(
    project: Project, connect: Connect, history: int, figures: Callable[..., None]
) -> None:
    """Counted in pages, not in seconds: of the same ten events, behind a short and a long history."""
    project.content["databases"]["shop"]["retention"] = "1h"
    project.write()
    writer = connect(project.dsn)
    fetch(writer, "insert into churn select i, 0, '' from generate_series(1000, %s) i", (1000 + history - 1,))
    project.cdc("run", "--until-idle")
    fetch(writer, "update churn set n = 1 where id < 10")
    fetch(writer, "update cdc.sink set epoch = 77; update cdc.position set epoch = 77")
    fetch(
        writer, "select count(*) from cdc.next_batch('mirror', 77, null, 500, 1000000)"
    )  # plans, and opens the window
    plan = value(
        writer, "explain (analyze, buffers, format json) select * from cdc.next_batch('mirror', 77, null, 500, 1000000)"
    )[0]["Plan"]
    pages = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    assert plan["Actual Rows"] == 10
    assert pages < 150
    figures(f"a read behind {history} kept events", "pages bounded", pages=pages)


# -- clocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["the daemon's", "the server's"])
def test_a_clock_that_jumps_costs_nothing(
    whose: str,
    clusters: Callable[..., Cluster],
    mirror: Callable[..., Project],
    faketime: Path,
    figures: Callable[..., None],
    scale: Callable[[int, int], int],
    seed: int,
) -> None:
    directory = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    directory.chmod(0o755)
    try:
        clock = Clock(faketime, directory)
        on_server = whose == "the server's"
        cluster = clusters(environment=clock.environment if on_server else {})
        project = mirror(
            cluster.create_database("shop"),
            database={"retention": "1h"},
            environment={} if on_server else clock.environment,
        )
        jumps = ["+1h", "-1h", "+1d", "-1d", "+0"] * scale(1, 5)
        # PostgreSQL's own timers, deadlock_timeout among them, wait out a clock that is set back: so nobody else to
        # wait for.
        writers = 1 if on_server else 4
        with Workload(project.dsn, seed, math.inf, writers=writers, ledger=True, rate=120 / writers) as work:
            with project.daemon() as daemon:
                for jump in jumps:
                    clock.set(jump)
                    lines = count_lines(project.file)
                    until(lambda: count_lines(project.file) > lines + 50, f"it delivers after {jump}")  # noqa: B023
                work.stop()
                assert daemon.drain() == 0
            verdict = settle(project, work, seed, least=50 * len(jumps), most_duplicates=BATCH)
        figures(f"{whose} clock jumps by hours and days", verdict, jumps=len(jumps))
    finally:
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


# -- the sink's disk ----------------------------------------------------------------------------------------------


def test_a_full_disk_is_waited_for_and_leaves_no_torn_line(
    cluster: Cluster, mirror: Callable[..., Project], figures: Callable[..., None], seed: int
) -> None:
    """RLIMIT_FSIZE cuts a write short and fails the next one: what a full disk does, byte by byte."""
    project = mirror(cluster.create_database("shop"))
    with Workload(project.dsn, seed, math.inf, writers=4, ledger=True, rate=40) as work:
        with project.daemon() as daemon:
            for number in range(1, 4):
                limit = count_bytes(project.file) + 20_011 * number
                resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                until(lambda: shown(project)["state"] == "retrying", "status says so", seconds=20)
                assert "full" in shown(project)["last_error"] or "large" in shown(project)["last_error"]
                read_lines(project.file)  # whole lines, or it fails
                resource.prlimit(
                    daemon.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                )
                until(lambda: shown(project)["state"] == "running", "it goes on", seconds=20)
            work.stop()
            assert daemon.drain() == 0
        verdict = settle(project, work, seed, least=300, most_duplicates=0)
    figures("file sink's disk full (short write, then an error)", verdict, times=3)


def count_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def shown(project: Project) -> dict[str, Any]:
    found: dict[str, Any] = project.status()["databases"]["shop"]["sinks"]["mirror"]
    return found
