"""The server's bad days: killed, restarted, frozen, out of connections, out of queue, out of disk, behind a pooler.

Each test injects one of them under load while the daemon stays alive, lets it heal by itself, and judges: nothing lost,
nothing out of order, nothing that was not committed, duplicates at most a batch for each fault. How long healing took
stands in the figures.

None may pass because nothing has happened. Two faults have to condemn a daemon with a known mistake: the crash under
asynchronous writers one that hands out what it has not flushed (`FORGETFUL`), the full queue one without a breaker. Of
the others it is asserted that somebody met them: the frozen session is still frozen, inserts were refused.
"""

from __future__ import annotations

import contextlib
import math
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
from cluster import Cluster
from harness import CDC, SINK, Daemon, Project, Tail, is_stopped, read_lines, until
from judge import Phantom
from mutants import mutant
from psycopg2 import sql
from psycopg2.extensions import connection
from tools import PgBouncer, required
from verdict import Verdict, settle
from workload import CAPTURED, Workload

from cdc.event import Event

BATCH = 500
"""The default of `batch: {events: …}`: what one fault can repeat."""
NOTICED = 10.0
"""Seconds within which whatever hangs has to be noticed and got around."""
WRITES = 30
"""Of each writer that could queue up to ring."""
PAUSES = 10.0
"""Longest pause between two tries to connect, in seconds."""

Scale = Callable[[Any, Any], Any]
Figures = Callable[..., None]
Mirror = Callable[..., Project]
Clusters = Callable[..., Cluster]
Connect = Callable[..., connection]
Pool = Callable[[str, str], PgBouncer]


def size(project: Project) -> int:
    return project.file.stat().st_size if project.file.exists() else 0


def wait_for_more(project: Project, events: int = 1, seconds: float = 30.0) -> float:
    """Wait until so many more events are delivered; returns the seconds it took."""
    began = size(project)

    def arrived() -> bool:
        if size(project) <= began:
            return False
        with project.file.open("rb") as file:
            file.seek(began)
            return file.read().count(b"\n") >= events

    return until(arrived, f"{events} more events are delivered", seconds)


def ask(conn: connection, statement: str, *parameters: object) -> list[Any]:
    with conn.cursor() as cursor:
        cursor.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []


def finish(project: Project, daemon: Daemon, work: Workload, seed: int, **bounds: int) -> Verdict:
    """Let the writers and the daemon end in good order, and judge."""
    work.stop()
    work.join()
    assert daemon.drain() == 0
    return settle(project, work, seed, **bounds)  # type: ignore[arg-type]  # most_duplicates and least are numbers


# -- killed, restarted, frozen ----------------------------------------------------------------------------------


@pytest.mark.parametrize("commits", ["synchronous", "asynchronous"])
def test_a_killed_server_loses_nothing_and_nothing_it_forgot_was_delivered(
    *, commits: str, clusters: Clusters, mirror: Mirror, figures: Figures, scale: Scale, seed: int
) -> None:
    cluster = clusters()
    project = mirror(cluster.create_database("shop"))
    kills = scale(2, 10)
    rng = random.Random(f"{seed} {commits} killer")
    healed = []
    share = 1.0 if commits == "asynchronous" else 0.0
    work = Workload(project.dsn, seed, math.inf, rate=40, lulls=False, ledger=True, asynchronous=share)
    with project.daemon() as daemon, work:
        for number in range(1, kills + 1):
            wait_for_more(project, 100)
            daemon.lives_for(rng.uniform(0.1, 0.8))
            cluster.kill(at_once=number % 2 == 1)
            cluster.start()
            began = time.monotonic()
            daemon.wait_until_it_says("Serving.", 1 + number)
            wait_for_more(project)
            healed.append(time.monotonic() - began)
        wait_for_more(project, 100)
        verdict = finish(project, daemon, work, seed, least=scale(300, 3000), most_duplicates=kills * BATCH)
    forgotten = len(work.committed.keys() - work.read_ledger().keys())
    assert cluster.log().count("automatic recovery in progress") == kills
    assert work.outcomes["disconnected"] >= kills
    assert max(healed) < PAUSES + 5
    if commits == "synchronous":
        assert forgotten == 0, "the server forgot what it had promised to keep"
    else:
        assert forgotten >= scale(0, 1), "the server forgot nothing: there was nothing to be careful with"
    figures(
        f"SIGKILL of PostgreSQL, {commits} commits",
        verdict,
        kills=kills,
        per_kill=verdict.per_fault(kills),
        forgotten_by_the_server=forgotten,
        healed_after_s=max(healed),
    )


def forget(cluster: Cluster) -> None:
    """`FORGETFUL`: hand out a page before it is certain that its changes survive."""
    ((source,),) = cluster.query("select pg_get_functiondef('cdc.next_batch'::regproc)", dbname="shop")
    careful = "set_config('synchronous_commit', 'on', true)"
    assert source.count(careful) == 1, "cdc.next_batch no longer says how it commits"
    # For the transaction: what the session has set does not help.
    cluster.query(source.replace(careful, "set_config('synchronous_commit', 'off', true)"), dbname="shop")


FORGETFUL = "cdc.next_batch without its synchronous commit"


@pytest.mark.parametrize("reader", ["cdc", FORGETFUL])
def test_what_an_asynchronous_writer_commits_is_delivered_only_once_it_is_on_disk(
    reader: str, clusters: Clusters, mirror: Mirror, figures: Figures, seed: int
) -> None:
    # Nobody but the reader brings the log to disk: not the WAL writer, nor anybody who writes data pages.
    idle = {"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB", "wal_buffers": "16MB", "autovacuum": "off"}
    cluster = clusters({**idle, "bgwriter_lru_maxpages": "0"})
    project = mirror(cluster.create_database("shop"))
    if reader == FORGETFUL:
        forget(cluster)
    work = Workload(project.dsn, seed, math.inf, writers=4, rate=50, lulls=False, ledger=True, asynchronous=1.0)
    with project.daemon() as daemon, work:
        wait_for_more(project, 200)
        cluster.kill(at_once=True)
        cluster.start()
        daemon.wait_until_it_says("Serving.", 2)
        wait_for_more(project)
        work.stop()
        work.join()
        assert daemon.drain() == 0
    if reader == FORGETFUL:
        with pytest.raises(Phantom, match="changes nobody committed") as condemned:
            settle(project, work, seed)
        figures(f"mutant: {reader}", f"condemned, as it has to be: {str(condemned.value).splitlines()[0]}")
    else:
        figures("SIGKILL while nobody but the reader flushes", settle(project, work, seed, least=200))


@pytest.mark.full
def test_a_restarted_server_is_served_again(
    clusters: Clusters, mirror: Mirror, figures: Figures, scale: Scale, seed: int
) -> None:
    cluster = clusters()
    project = mirror(cluster.create_database("shop"))
    healed = []
    modes = ["fast", "immediate"] * scale(1, 5)
    with project.daemon() as daemon, Workload(project.dsn, seed, math.inf, rate=40, ledger=True) as work:
        for number, mode in enumerate(modes, 2):
            wait_for_more(project, 100)
            cluster.restart(mode)
            began = time.monotonic()
            daemon.wait_until_it_says("Serving.", number)
            wait_for_more(project)
            healed.append(time.monotonic() - began)
        wait_for_more(project, 100)
        until(lambda: daemon.said().count("Listening.") == 1 + len(modes), "the bell is heard again")
        verdict = finish(project, daemon, work, seed, least=300, most_duplicates=len(modes) * BATCH)
    assert max(healed) < PAUSES + 5
    figures("restart, fast and immediate", verdict, restarts=len(modes), healed_after_s=max(healed))


SESSIONS = {
    SINK: "The pipeline is interrupted.",
    "listener": "The listener's connection is lost",
    "keeper": "The keeper is interrupted.",
}
"""The daemon's sessions, by what follows ``cdc`` in their application_name, and what it says when one is lost."""
FROZEN = [tuple(SESSIONS), *((name,) for name in SESSIONS)]


def freeze_idle(cluster: Cluster, application: str) -> int:
    """Freeze a backend between two statements; returns its pid.

    One that holds the row of its sink is another matter: it stops everybody until it ends.
    """
    frozen: list[int] = []

    def freeze() -> bool:
        pid = cluster.backend(application).pid
        cluster.freeze(pid)
        if any(backend.pid == pid and backend.state == "idle" for backend in cluster.backends(application)):
            frozen.append(pid)
            return True
        cluster.thaw(pid)
        return False

    until(freeze, f"{application!r} is frozen while it does nothing")
    return frozen[0]


@pytest.mark.full
def test_a_frozen_backend_is_noticed_and_got_around_while_it_stays_frozen(
    clusters: Clusters, mirror: Mirror, figures: Figures, scale: Scale, seed: int
) -> None:
    cluster = clusters()
    project = mirror(cluster.create_database("shop"))
    noticed: dict[str, list[float]] = {name: [] for name in SESSIONS}
    silent: list[float] = []
    cases = FROZEN[: scale(1, len(FROZEN))] * scale(1, 3)
    work = Workload(project.dsn, seed, math.inf, writers=4, rate=20, lulls=False)
    with Tail(project.file) as tail, work:
        for names in cases:
            with project.daemon() as daemon:  # a fresh one each time: pauses between tries grow
                daemon.wait_until_it_says("Listening.")
                wait_for_more(project, 100)
                pids = {name: freeze_idle(cluster, f"cdc {name}") for name in names}
                began = time.time()
                for name in sorted(names, key=list(SESSIONS)[::-1].index):  # whose deadline comes first
                    daemon.wait_until_it_says(SESSIONS[name])
                    noticed[name].append(time.time() - began)
                if SINK in names:
                    daemon.wait_until_it_says("Serving.", 2)
                if "listener" in names:
                    daemon.wait_until_it_says("Listening.", 2)
                wait_for_more(project, 100, seconds=5)
                silent.append(longest_gap(tail.arrivals, began))
                for name, pid in pids.items():
                    assert is_stopped(pid), "it was thawed meanwhile: this tested nothing"
                    until(lambda: len(cluster.backends(f"cdc {name}")) == 2, f"a new {name} is there", 5)  # noqa: B023  # called at once
                    cluster.thaw(pid)
                    until(lambda: not psutil.pid_exists(pid), f"the old {name} has gone", 5)  # noqa: B023
                assert daemon.drain() == 0
        work.stop()
    verdict = settle(project, work, seed, least=300, most_duplicates=len(cases) * BATCH)
    for name, seconds in noticed.items():
        assert max(seconds) < NOTICED, f"{name}: {seconds}"
    assert max(silent) < NOTICED + 2
    figures(
        "frozen backends",
        verdict,
        frozen=sum(map(len, noticed.values())),
        noticed_after_s="/".join(f"{max(seconds):.1f}" for seconds in noticed.values()),
        longest_silence_s=max(silent),
    )


def longest_gap(arrivals: list[float], since: float) -> float:
    """Seconds between two deliveries, at most, from a moment until now."""
    moments = [since, *(at for at in arrivals if at > since), time.time()]
    return max(after - before for before, after in pairwise(moments))


# -- settings, connections, poolers -----------------------------------------------------------------------------

UNFRIENDLY = {
    "statement_timeout": "700ms",
    "lock_timeout": "1ms",
    "transaction_timeout": "700ms",
    "idle_in_transaction_session_timeout": "1ms",
    "idle_session_timeout": "1s",
    "default_transaction_read_only": "on",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
}
"""What an administrator may have set for a role, for good reasons that do not apply to a daemon."""


def clerk(cluster: Cluster) -> str:
    """The dsn of an ordinary role in database shop."""
    cluster.query("create role clerk login")
    return cluster.dsn("shop", user="clerk")


@pytest.mark.full
def test_time_outs_and_defaults_of_the_daemons_role_do_not_matter(
    clusters: Clusters, mirror: Mirror, figures: Figures, connect: Connect, seed: int
) -> None:
    cluster = clusters({"fsync": "off"})
    dsn = cluster.create_database("shop")
    theirs = clerk(cluster)
    project = mirror(dsn, database={"dsn": theirs, "migrate_dsn": dsn})
    for name, value in UNFRIENDLY.items():
        cluster.query(f"alter role clerk in database shop set {name} = '{value}'")
    assert ask(connect(theirs), "show statement_timeout") == [("700ms",)]
    owner = connect(dsn)
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Listening.")
        until(lambda: project.armed(owner), "the daemon sleeps")
        pids = {backend.pid for backend in cluster.backends("cdc ")}
        daemon.lives_for(1.5)  # without a word, where each session may be idle for 1 s
        with Workload(dsn, seed, math.inf, writers=4, rate=50) as work:
            wait_for_more(project, 50)
            ask(owner, "begin; select from cdc.position for update")
            daemon.lives_for(1.0)  # with a statement that waits, where it may take 0.7 s, and for a lock 1 ms
            ((waiting,),) = cluster.query(
                "select count(*) from pg_stat_activity where application_name = %s and wait_event_type = 'Lock'",
                f"cdc {SINK}",
            )
            assert waiting == 1
            ask(owner, "rollback")
            wait_for_more(project, 50)
            assert {backend.pid for backend in cluster.backends("cdc ")} == pids, "a session was lost"
            verdict = finish(project, daemon, work, seed, least=100, most_duplicates=0)
        assert "WARNING" not in daemon.said()
        assert "ERROR" not in daemon.said()
    figures("time-outs and defaults of the daemon's role", verdict, settings=len(UNFRIENDLY))


@pytest.mark.full
def test_a_server_without_a_free_connection_is_waited_for_and_that_is_seen(
    clusters: Clusters, mirror: Mirror, figures: Figures, scale: Scale, seed: int
) -> None:
    cluster = clusters({"max_connections": "20", "superuser_reserved_connections": "3", "fsync": "off"})
    dsn = cluster.create_database("shop")
    theirs = clerk(cluster)
    project = mirror(dsn, database={"dsn": theirs, "migrate_dsn": dsn})
    seconds = scale(2, 60)
    refused = "remaining connection slots are reserved"
    with (
        contextlib.ExitStack() as crowd,
        project.daemon() as daemon,
        Workload(dsn, seed, math.inf, writers=4, rate=20) as work,
    ):
        wait_for_more(project, 50)

        def nobody_of_ours_is_left() -> bool:
            for backend in cluster.backends("cdc "):
                cluster.terminate(backend.pid)
            while True:
                try:
                    other = psycopg2.connect(theirs, application_name="crowd")
                except psycopg2.OperationalError as error:
                    assert refused in str(error)  # noqa: PT017  # it comes in the end, not at once
                    return not cluster.backends("cdc ")
                crowd.enter_context(contextlib.closing(other))

        until(nobody_of_ours_is_left, "others have every connection")
        before = cluster.log().count(refused)
        daemon.lives_for(seconds)
        attempts = cluster.log().count(refused) - before
        left = size(project)
        assert 3 <= attempts <= 3 * (6 + seconds / 2), "each of the three threads tries, and ever more rarely"
        said = project.cdc("status", codes=(69,)).stdout
        assert "shop: unreachable: " in said
        assert refused in said
        shop = project.status()["databases"]["shop"]
        assert (shop["state"], shop["sinks"]) == ("unreachable", {})
        assert size(project) == left

        crowd.close()
        healed = wait_for_more(project, 1, PAUSES + 5)
        daemon.wait_until_it_says("Listening.", 2, PAUSES)
        verdict = finish(project, daemon, work, seed, least=100, most_duplicates=BATCH)
    figures(
        "no free connection", verdict, seconds=seconds, attempts=attempts, healed_after_s=healed, status="exit code 69"
    )


def test_pgbouncer_in_transaction_mode_is_refused_whatever_notify_says(
    mirror: Mirror, database: str, pgbouncer: Pool, figures: Figures, tmp_path: Path
) -> None:
    mirror(database)
    pooled = pgbouncer(database, "transaction").dsn(database)
    with contextlib.ExitStack() as stack:
        daemons = {}
        for notify in ("adaptive", "off"):
            (tmp_path / notify).mkdir()
            project = Project(tmp_path / notify, pooled, CAPTURED, "out.jsonl", database={"notify": notify})
            daemons[notify] = stack.enter_context(project.daemon(serving=False))
        assert "PgBouncer in transaction mode" in project.cdc("check", codes=(1,)).stdout
        for notify, daemon in daemons.items():
            assert daemon.ends() == 1, notify
            assert "PgBouncer in transaction mode" in daemon.said(), notify
            assert "Traceback" not in daemon.said()
            assert "Serving." not in daemon.said()
    figures(
        "PgBouncer, transaction pooling",
        "refused with exit code 1, by name",
        notify="adaptive and off",
        found_by="run, check",
    )


@pytest.mark.full
def test_pgbouncer_in_session_mode_does_no_harm(
    *, mirror: Mirror, database: str, pgbouncer: Pool, figures: Figures, scale: Scale, seed: int
) -> None:
    pool = pgbouncer(database, "session")
    project = mirror(database, database={"dsn": pool.dsn(database), "migrate_dsn": database})
    with project.daemon() as daemon, Workload(database, seed, math.inf, writers=4, rate=50) as work:
        daemon.wait_until_it_says("Listening.")
        wait_for_more(project, scale(300, 10_000), seconds=300)
        verdict = finish(project, daemon, work, seed, least=300, most_duplicates=0)
    figures("PgBouncer, session pooling", verdict)


# -- the notification queue -------------------------------------------------------------------------------------

QUEUE = 64 * 8192
"""Bytes of the smallest notification queue that a server of version 17 or later can be given."""
OVER_HALF = "The notification queue is over half full"
DRAINED = "The notification queue has drained"


def stop_reading(conn: connection) -> None:
    """Listen, and never come to read what was notified: a transaction is open."""
    ask(conn, "listen anything")
    ask(conn, "begin")
    ask(conn, "select 1")


def fill_up_to(share: float, conn: connection) -> None:
    """What others notify fills the queue too, as it is one for the whole cluster."""
    while ask(conn, "select pg_notification_queue_usage()")[0][0] < share:
        ask(conn, "select pg_notify('theirs', repeat('x', 7000))")


class Gauge(threading.Thread):
    """How full the notification queue has been at most. To ask may free it, which is the daemon's duty in the end."""

    def __init__(self, conn: connection) -> None:
        super().__init__(name="gauge", daemon=True)
        self.highest = 0.0
        self._conn = conn
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.02):
            ((usage,),) = ask(self._conn, "select pg_notification_queue_usage()")
            self.highest = max(self.highest, usage)

    def __enter__(self) -> Gauge:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._over.set()
        self.join()


@pytest.mark.parametrize("daemon_is", ["cdc", "rings-whatever-happens"])
@pytest.mark.full
def test_a_session_that_never_reads_fills_the_queue_and_no_writer_notices(
    *, daemon_is: str, clusters: Clusters, mirror: Mirror, figures: Figures, connect: Connect, scale: Scale, seed: int
) -> None:
    cluster = clusters({"max_notify_queue_pages": "64", "fsync": "off"})
    project = mirror(cluster.create_database("shop"))
    owner, deaf = connect(project.dsn), connect(project.dsn)
    is_mutant = daemon_is != "cdc"
    # Not so much at once that the daemon would rather poll.
    work = Workload(project.dsn, seed, math.inf, rate=12, expected={"54000"} if is_mutant else ())
    gauge = Gauge(connect(project.dsn))
    with project.daemon(program=mutant(daemon_is) if is_mutant else (CDC,)) as daemon, gauge:
        daemon.wait_until_it_says("Listening.")
        until(lambda: project.armed(owner), "the daemon asks to be rung")
        stop_reading(deaf)
        fill_up_to(0.85 if is_mutant else 0.4, owner)
        assert OVER_HALF not in daemon.said()
        with work:
            if is_mutant:
                until(lambda: work.outcomes["expected 54000"] > 0, "a writer fails")
                work.stop()
                figures("mutant: rings whatever happens", "condemned, as it has to be: writers failed with 54000")
                return
            daemon.wait_until_it_says(OVER_HALF)
            until(lambda: not project.armed(owner), "nobody is asked to ring")
            status = project.status()["databases"]["shop"]
            assert 0.4 < status["notify_queue_usage"] < 1
            assert "the notification queue is" in project.cdc("status").stdout
            began = size(project)
            until(lambda: size(project) > began + scale(0.6, 40) * QUEUE, "more is delivered than it holds", 600)
            gauge.stop()
            deaf.close()
            daemon.wait_until_it_says(DRAINED)
            work.stop()
            work.join()
            until(lambda: project.armed(owner), "the daemon asks to be rung again")
            verdict = finish(project, daemon, work, seed, least=500, most_duplicates=0)
    assert gauge.highest < 1
    figures(
        "notification queue full",
        verdict,
        highest_fill=gauge.highest,
        delivered_meanwhile_KiB=(project.file.stat().st_size - began) // 1024,
    )


class Chatter(threading.Thread):
    """Writes to one ephemeral table, one row in a transaction, and fails as its first writer does."""

    def __init__(self, conn: connection, rate: float) -> None:
        super().__init__(name="chatter", daemon=True)
        self.committed = 0
        self.error: psycopg2.Error | None = None
        self._conn = conn
        self._pause = 1 / rate
        self._over = threading.Event()

    def run(self) -> None:
        try:
            while not self._over.wait(self._pause):
                ask(self._conn, "insert into live values (%s, repeat('x', 500))", self.committed)
                self.committed += 1
        except psycopg2.Error as error:
            self.error = error

    def __enter__(self) -> Chatter:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


@pytest.mark.full
def test_ephemeral_changes_are_dropped_rather_than_fill_the_queue_and_come_again_later(
    clusters: Clusters, mirror: Mirror, figures: Figures, connect: Connect, tmp_path: Path
) -> None:
    cluster = clusters({"max_notify_queue_pages": "64", "fsync": "off"})
    heard = tmp_path / "live.jsonl"
    project = mirror(
        cluster.create_database("shop"), sinks={"live": {"type": "file", "path": str(heard), "tables": ["public.live"]}}
    )
    deaf = connect(project.dsn)
    ask(deaf, "create table live (id bigint primary key, text text)")
    project.content["databases"]["shop"]["tables"] = {**CAPTURED, "public.live": {"delivery": "ephemeral"}}
    project.write()
    project.cdc("migrate")

    def keys() -> list[int]:
        return [Event.from_json(line).after["id"] for line in read_lines(heard)]  # type: ignore[index,misc]

    with (
        project.daemon() as daemon,
        Gauge(connect(project.dsn)) as gauge,
        Chatter(connect(project.dsn), rate=600) as chatter,
    ):
        daemon.wait_until_it_says("Listening.")
        until(heard.exists, "the first change is delivered")
        stop_reading(deaf)
        daemon.wait_until_it_says(OVER_HALF)
        silent_from = chatter.committed
        until(lambda: chatter.committed > silent_from + 1000, "it would be full by now")
        gauge.stop()
        deaf.close()
        silent_to = chatter.committed
        daemon.wait_until_it_says(DRAINED)
        until(lambda: keys()[-1] > silent_to, "changes come again")
        assert chatter.error is None
    assert gauge.highest < 1
    found = set(keys())
    dropped = sum(key not in found for key in range(silent_from, silent_to))
    assert dropped > 900
    figures(
        "notification queue full, ephemeral changes",
        "writers failed 0",
        committed=chatter.committed,
        dropped=dropped,
        highest_fill=gauge.highest,
    )


# -- the disk ---------------------------------------------------------------------------------------------------


class SmallDisk:
    """A file system of its own, in memory, that a server can have a tablespace on."""

    def __init__(self, owner: int, megabytes: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cdc-disk-"))
        self._options = f"size={megabytes}m,uid={owner},mode=700"

    def __enter__(self) -> SmallDisk:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", self._options, "tmpfs", self.directory], capture_output=True, check=False
        )
        if done.returncode:
            self.directory.rmdir()
            required(None, f"the right to mount a file system ({done.stderr.decode().strip()})")
        return self

    def grow(self, megabytes: int) -> None:
        """Give space."""
        subprocess.run(["mount", "-o", f"remount,size={megabytes}m", self.directory], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", self.directory], check=True)  # the server may still be there
        self.directory.rmdir()


def test_an_outbox_without_space_fails_its_writers_and_loses_nothing(
    *, clusters: Clusters, mirror: Mirror, figures: Figures, connect: Connect, scale: Scale, seed: int
) -> None:
    cluster = clusters({"fsync": "off"})
    project = mirror(cluster.create_database("shop"))
    with SmallDisk((cluster.directory / "data").stat().st_uid, megabytes=scale(1, 16)) as disk:
        cluster.query(sql.SQL("create tablespace small location {}").format(sql.Literal(str(disk.directory))))
        for leaf in range(3):
            cluster.query(f"alter table cdc.event_{leaf} set tablespace small", dbname="shop")
        work = Workload(project.dsn, seed, math.inf, rate=40, ledger=True, expected={"53100"})
        with project.daemon() as daemon, work:
            until(lambda: work.outcomes["expected 53100"] >= 50, "writers are refused", 300)
            said = refusal(connect(project.dsn))
            assert "could not extend file" in said
            assert "No space left on device" in said

            def all_is_delivered() -> bool:
                return bool(project.status()["databases"]["shop"]["sinks"][SINK]["pending"] == 0)

            until(all_is_delivered, "what was committed is delivered")
            disk.grow(megabytes=256)
            wait_for_more(project, scale(200, 2000), 60)
            verdict = finish(project, daemon, work, seed, least=500, most_duplicates=0)
            assert "interrupted" not in daemon.said()
    figures("outbox without space", verdict, refused=work.outcomes["expected 53100"])


def refusal(conn: connection) -> str:
    """What a writer is told. He commits nothing."""
    said = ""
    while not said:
        ask(conn, "begin")
        try:
            ask(conn, "insert into hot (id, ver, mark) values (5000, 1, -1)")
        except psycopg2.errors.DiskFull as error:
            said = str(error)
        ask(conn, "rollback")
    assert ask(conn, "select from hot where id = 5000") == []
    return said


def test_writers_whose_commits_are_slow_do_not_queue_up_to_ring(
    clusters: Clusters, mirror: Mirror, connect: Connect, figures: Figures
) -> None:
    """Counted in rings: who rings holds a lock through his COMMIT, and while all do they commit one after the other."""
    cluster = clusters({"fsync": "on", "commit_delay": "20000", "commit_siblings": "0"})
    project = mirror(cluster.create_database("shop"))
    conn = connect(project.dsn)
    ear = connect(project.dsn)
    ask(ear, "listen cdc")

    def write(number: int) -> None:
        writer = connect(project.dsn)
        for row in range(number * WRITES, (number + 1) * WRITES):
            ask(writer, "insert into hot (id, ver, mark) values (%s, 1, %s)", 10_000 + row, -1 - row)

    with project.daemon() as daemon:
        daemon.wait_until_it_says("Listening.")
        until(lambda: project.armed(conn), "the daemon sleeps")
        writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        until(lambda: project.file.read_bytes().count(b"\n") == 8 * WRITES, "all is delivered")
        assert daemon.drain() == 0
    ask(ear, "select 1")
    rung = len(ear.notifies)
    assert rung < 8 * WRITES / 2
    figures("8 writers whose COMMIT takes 20 ms", "they do not queue up to ring", of=8 * WRITES, rang=rung)
