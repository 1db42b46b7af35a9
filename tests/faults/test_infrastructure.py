"""The instruments of the fault tests, tried out: a fault that was not injected would prove whatever it is to prove."""

from __future__ import annotations

import contextlib
import math
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psycopg2
import pytest
from cluster import Cluster
from harness import SINK, Project, is_stopped, read_lines, until
from judge import Lost, OutOfOrder, Phantom, read_source
from mutants import mutant
from proxy import Proxy
from psycopg2.extensions import connection, make_dsn
from tools import Clock, PgBouncer, required
from verdict import judged, settle
from workload import TABLES, Workload, WriterFailed

pytestmark = pytest.mark.full

FAST = {"fsync": "off"}
"""For tests that kill nothing."""


@pytest.fixture
def proxy(database: str) -> Iterator[Proxy]:
    with Proxy.before(database) as made:
        yield made


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One for all these tests, each of which leaves it running: to make one costs more than most of them."""
    with Cluster() as made:
        yield made


def ask(conn: connection, statement: str = "select 1") -> object:
    with conn.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchone()


def is_answered(conn: connection, seconds: float) -> bool:
    """Whether an answer, or an end, arrives; nothing is taken away."""
    return bool(select.select([conn], [], [], seconds)[0])


class Asking(threading.Thread):
    """Asks in the background: what waits for an answer must not hold up the test."""

    def __init__(self, conn: connection, statement: str = "select 1") -> None:
        super().__init__(name="asking", daemon=True)
        self.answer: object = None
        self.error: psycopg2.Error | None = None
        self._conn = conn
        self._statement = statement
        self.start()

    def run(self) -> None:
        try:
            self.answer = ask(self._conn, self._statement)
        except psycopg2.Error as error:
            self.error = error


# -- the proxy --------------------------------------------------------------------------------------------------


def test_the_proxy_forwards_what_it_is_given_and_counts_who_came(
    proxy: Proxy, database: str, connect: Callable[..., connection]
) -> None:
    big = "x" * 3_000_000
    first, second = connect(proxy.dsn(database)), connect(proxy.dsn(database))
    with first.cursor() as cursor:
        cursor.execute("select length(%s), repeat('y', 3000000)", (big,))
        assert cursor.fetchone() == (len(big), "y" * 3_000_000)
    assert ask(second) == (1,)
    assert (proxy.connections, proxy.open, proxy.cuts) == (2, 2, 0)
    first.close()
    until(lambda: proxy.open == 1, "the proxy lets go of who has left")


def test_a_proxy_before_a_tcp_server_does_as_well(cluster: Cluster, connect: Callable[..., connection]) -> None:
    dsn = cluster.dsn(host="tcp")
    with Proxy.before(dsn) as proxy:
        assert ask(connect(proxy.dsn(dsn))) == (1,)


def test_a_redirected_proxy_leads_those_who_come_later_elsewhere(
    proxy: Proxy, cluster: Cluster, database: str, connect: Callable[..., connection]
) -> None:
    stays = connect(proxy.dsn(database))
    proxy.redirect(cluster.dsn())
    assert ask(connect(proxy.dsn(cluster.dsn())), "show port") == (str(cluster.port),)
    assert ask(stays, "show port") != (str(cluster.port),)


def test_in_a_black_hole_nothing_is_answered_and_nobody_learns_of_the_others_end(
    proxy: Proxy, database: str, connect: Callable[..., connection]
) -> None:
    witness = connect(database).cursor()
    caught = connect(make_dsn(proxy.dsn(database), application_name="caught"))
    proxy.black_hole()
    asking = Asking(caught)
    with pytest.raises(psycopg2.OperationalError, match="timeout expired"):
        psycopg2.connect(proxy.dsn(database), connect_timeout=2)
    assert asking.is_alive()

    proxy.resume()
    assert ask(connect(proxy.dsn(database))) == (1,), "who comes later is served"
    assert asking.is_alive(), "what a black hole has swallowed stays lost"
    witness.execute("select state, query from pg_stat_activity where application_name = 'caught'")
    (found,) = witness.fetchall()
    assert found == ("idle", ""), "the server has not heard the question, nor that anybody has gone"

    assert proxy.cut() == 3  # the caught one, the one who connected into the hole, and the one who was served
    asking.join(10)
    assert isinstance(asking.error, psycopg2.OperationalError)


def test_a_black_hole_can_be_for_one_application(
    proxy: Proxy, database: str, connect: Callable[..., connection]
) -> None:
    names = ("unlucky", "lucky")
    unlucky, lucky = (connect(make_dsn(proxy.dsn(database), application_name=name)) for name in names)
    proxy.black_hole(of="unlucky")
    asking = Asking(unlucky)
    assert ask(lucky) == (1,)
    with pytest.raises(psycopg2.OperationalError, match="timeout expired"):
        psycopg2.connect(make_dsn(proxy.dsn(database), application_name="unlucky"), connect_timeout=2)
    assert ask(connect(proxy.dsn(database))) == (1,)
    assert asking.is_alive()
    assert proxy.cut(of="unlucky") == 2
    assert ask(lucky) == (1,)
    asking.join(10)


def test_a_stall_holds_everything_and_forwards_it_later(
    proxy: Proxy, database: str, connect: Callable[..., connection]
) -> None:
    conn = connect(proxy.dsn(database))
    proxy.stall()
    asking = Asking(conn)
    connected: list[connection] = []
    joining = threading.Thread(target=lambda: connected.append(connect(proxy.dsn(database))), daemon=True)
    joining.start()
    assert not is_answered(conn, 0.3)
    assert asking.is_alive()
    assert not connected
    proxy.resume()
    asking.join(10)
    joining.join(10)
    assert asking.answer == (1,)
    assert ask(connected[0]) == (1,)


def test_a_trickle_takes_its_time(proxy: Proxy, database: str, connect: Callable[..., connection]) -> None:
    conn = connect(proxy.dsn(database))
    proxy.trickle(10_000)
    began = time.monotonic()
    assert ask(conn, "select repeat('x', 10000)") == ("x" * 10_000,)
    assert 0.8 < time.monotonic() - began < 5
    proxy.resume()
    began = time.monotonic()
    assert ask(conn, "select repeat('x', 1000000)") == ("x" * 1_000_000,)
    assert time.monotonic() - began < 5


def test_a_cut_resets_everybody_and_lets_them_come_again(
    proxy: Proxy, database: str, connect: Callable[..., connection]
) -> None:
    idle, busy = connect(proxy.dsn(database)), connect(proxy.dsn(database))
    asking = Asking(busy, "select pg_sleep(60)")
    until(lambda: _asks(connect(database), "pg_sleep"), "it asks")
    assert proxy.cut() == 2
    asking.join(10)
    assert isinstance(asking.error, psycopg2.OperationalError)
    with pytest.raises(psycopg2.OperationalError):
        ask(idle)
    assert (proxy.cuts, proxy.open) == (2, 0)
    assert ask(connect(proxy.dsn(database))) == (1,)


def test_refused_connections_end_at_once_and_others_go_on(
    proxy: Proxy, database: str, connect: Callable[..., connection]
) -> None:
    conn = connect(proxy.dsn(database))
    proxy.refuse()
    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(proxy.dsn(database))
    assert ask(conn) == (1,)
    assert (proxy.refused, proxy.cuts) == (1, 0)
    proxy.resume()
    assert ask(connect(proxy.dsn(database))) == (1,)


def test_a_cut_answer_is_to_a_statement_that_was_committed(
    proxy: Proxy, database: str, connect: Callable[..., connection]
) -> None:
    witness = connect(database).cursor()
    witness.execute("create table t (i int)")
    conn = connect(proxy.dsn(database))
    proxy.cut_answer(lambda sent: b"insert" in sent)
    assert ask(conn, "select 2") == (2,)
    with pytest.raises(psycopg2.OperationalError):
        # More than the server keeps to itself until it has committed.
        ask(conn, "insert into t select i from generate_series(1, 9) i returning repeat('x', 100000)")
    assert (proxy.answers_cut, proxy.cuts) == (1, 1)
    witness.execute("select count(*) from t")
    assert witness.fetchone() == (9,)
    again = connect(proxy.dsn(database))
    assert ask(again, "insert into t values (10) returning i") == (10,), "it was for once"


def test_an_answer_to_the_commit_of_a_block_can_be_cut_too(
    proxy: Proxy, database: str, connect: Callable[..., connection]
) -> None:
    witness = connect(database).cursor()
    witness.execute("create table t (i int)")
    conn = connect(proxy.dsn(database), autocommit=False)
    proxy.cut_answer(lambda sent: b"COMMIT" in sent, times=None, whole=False)
    with conn.cursor() as cursor:
        cursor.execute("insert into t values (1)")
    with pytest.raises(psycopg2.OperationalError):
        conn.commit()
    witness.execute("select count(*) from t")
    assert witness.fetchone() == (1,)


def test_a_server_that_is_down_is_down_behind_a_proxy_too(cluster: Cluster, connect: Callable[..., connection]) -> None:
    with Proxy.before(cluster.dsn()) as proxy:
        conn = connect(proxy.dsn(cluster.dsn()))
        cluster.kill()
        with pytest.raises(psycopg2.DatabaseError):
            ask(conn)
        with pytest.raises(psycopg2.OperationalError):
            psycopg2.connect(proxy.dsn(cluster.dsn()))
        cluster.start()
        assert ask(connect(proxy.dsn(cluster.dsn()))) == (1,)
        assert proxy.cuts == 0


def _asks(conn: connection, what: str) -> bool:
    with contextlib.closing(conn), conn.cursor() as cursor:
        cursor.execute(
            "select from pg_stat_activity where starts_with(query, 'select ' || %s) and state = 'active'", (what,)
        )
        return cursor.rowcount > 0


# -- the cluster ------------------------------------------------------------------------------------------------


def test_a_killed_server_has_left_nobody_behind_and_comes_back_with_what_was_committed(
    cluster: Cluster, connect: Callable[..., connection]
) -> None:
    assert cluster.query("show fsync") == [("on",)]
    logged = len(cluster.log())
    cluster.query("create table t (i int)")
    tcp = connect(cluster.dsn(host="tcp"), autocommit=False)
    ask(tcp, "insert into t values (1) returning i")
    for at_once in (False, True):
        cluster.query("insert into t values (2)")
        busy = connect(cluster.dsn())
        working = Asking(busy, "select count(*) from generate_series(1, 1e12)")
        until(lambda: any("1e12" in backend.query for backend in cluster.backends()), "a backend is busy")
        cluster.kill(at_once=at_once)
        assert not cluster.running
        working.join(10)
        assert isinstance(working.error, psycopg2.DatabaseError)
        cluster.start()  # which fails while an orphan holds the shared memory
    assert cluster.query("select i from t") == [(2,), (2,)]
    assert cluster.log()[logged:].count("automatic recovery in progress") == 2
    cluster.query("drop table t")
    with pytest.raises(psycopg2.DatabaseError):
        tcp.commit()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_keeps_the_address(cluster: Cluster, mode: str, connect: Callable[..., connection]) -> None:
    conn = connect(cluster.dsn())
    cluster.settings["work_mem"] = "5MB"
    logged = len(cluster.log())
    cluster.restart(mode)
    with pytest.raises(psycopg2.DatabaseError):
        ask(conn)
    assert ask(connect(cluster.dsn(host="tcp")), "show work_mem") == ("5MB",)
    assert ("automatic recovery" in cluster.log()[logged:]) == (mode == "immediate")


def test_a_frozen_backend_answers_when_it_is_thawed(cluster: Cluster, connect: Callable[..., connection]) -> None:
    conn = connect(cluster.dsn(application_name="cold feet"))
    pid = cluster.backend("cold").pid
    cluster.freeze(pid)
    asking = Asking(conn)
    assert not is_answered(conn, 0.3)
    assert ask(connect(cluster.dsn())) == (1,)
    cluster.thaw(pid)
    asking.join(10)
    assert asking.answer == (1,)


def test_a_server_with_a_frozen_backend_can_be_killed_and_stopped(
    cluster: Cluster, connect: Callable[..., connection]
) -> None:
    for end in (cluster.kill, lambda: cluster.kill(at_once=True), cluster.stop):
        _ = connect(cluster.dsn(application_name="cold feet"))
        cluster.freeze(cluster.backend("cold").pid)
        end()
        cluster.start()


def test_a_terminated_backend_has_gone(cluster: Cluster, connect: Callable[..., connection]) -> None:
    conn = connect(cluster.dsn(application_name="guest"))
    ask(conn, "select 42")
    (guest,) = cluster.backends("gue")
    assert guest[1:] == ("client backend", "guest", "idle", "select 42")
    cluster.terminate(guest.pid)
    assert guest not in cluster.backends()
    with pytest.raises(psycopg2.OperationalError):
        ask(conn)


def test_a_standby_follows_and_is_promoted_without_what_it_did_not_get(
    clusters: Callable[..., Cluster],
) -> None:
    primary = clusters()
    primary.query("create table t (i int)")
    with primary.standby() as standby:
        primary.query("insert into t values (1)")
        primary.wait_until_replayed(standby)
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
            standby.query("insert into t values (0)")
        sender = next(backend for backend in primary.backends() if backend.kind == "walsender")
        primary.freeze(sender.pid)
        primary.query("insert into t values (2)")
        primary.kill()
        standby.promote()
        standby.query("insert into t values (3)")
        assert standby.query("select i from t order by i") == [(1,), (3,)]
        assert not standby.query("select pg_is_in_recovery()")[0][0]
        directory = standby.directory
    assert not directory.exists()


def test_a_file_that_may_not_grow_fails_its_writer_and_nobody_else(clusters: Callable[..., Cluster]) -> None:
    cluster = clusters(FAST)
    cluster.query("create table t (x text); alter table t alter x set storage plain")
    cluster.limit_file_size(20 << 20)
    fill = "insert into t select repeat('x', 8000) from generate_series(1, 3000)"
    with pytest.raises(psycopg2.Error, match="could not extend file"):
        cluster.query(fill)
    assert cluster.query("select count(*) from t") == [(0,)]
    cluster.limit_file_size(None)
    cluster.query("truncate t")
    cluster.query(fill)


def test_a_failed_start_says_what_the_server_said(clusters: Callable[..., Cluster]) -> None:
    with pytest.raises(AssertionError, match="invalid value for parameter"):
        clusters({"shared_buffers": "plenty"})


# -- other people's programs ------------------------------------------------------------------------------------


def test_what_is_absent_is_skipped_on_a_laptop_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    assert required(Path("/bin/sh"), "a shell") == Path("/bin/sh")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="a unicorn is not installed"):
        required(None, "a unicorn")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="a unicorn is not installed"):
        required(None, "a unicorn")


def test_pgbouncer_hears_listen_in_session_mode_and_loses_it_in_transaction_mode(
    pgbouncer: Callable[..., PgBouncer], database: str, connect: Callable[..., connection]
) -> None:
    heard = {}
    for mode in ("session", "transaction"):
        conn = connect(pgbouncer(database, mode).dsn(database))
        ask(conn, "select current_database()")
        with conn.cursor() as cursor:
            cursor.execute("listen here")
        with connect(database).cursor() as cursor:
            cursor.execute("notify here")
        is_answered(conn, 0.5)
        conn.poll()
        heard[mode] = len(conn.notifies)
    assert heard == {"session": 1, "transaction": 0}


def test_a_faked_clock_can_be_set_for_the_server_and_for_a_program(
    faketime: Path, clusters: Callable[..., Cluster], tmp_path_factory: pytest.TempPathFactory
) -> None:
    cluster = clusters(FAST)
    clock = Clock(faketime, cluster.directory)
    cluster.environment = clock.environment
    cluster.restart()

    def ahead() -> list[int]:
        """By how many hours: the server's clock, a program's, and the program's monotonic one."""
        ((at,),) = cluster.query("select clock_timestamp()")
        script = "import time; print(time.time(), time.monotonic())"
        told = subprocess.check_output([sys.executable, "-c", script], env=os.environ | clock.environment, text=True)
        wall, monotonic = map(float, told.split())
        now = datetime.now(UTC).timestamp()
        return [round((then - now) / 3600) for then in (at.timestamp(), wall, monotonic - time.monotonic() + now)]

    assert ahead() == [0, 0, 0]
    clock.set("+1d")
    assert ahead() == [24, 24, 0]
    clock.set("-1h")
    assert ahead() == [-1, -1, 0]


def test_a_server_of_version_15_is_upgraded_with_all_it_holds(
    postgres_15: Path, clusters: Callable[..., Cluster]
) -> None:
    old = clusters(bindir=postgres_15, initdb=["--encoding=UTF8", "--locale=C", "--data-checksums"])
    assert old.query("show server_version_num")[0][0].startswith("15")
    old.create_database("shop")
    old.query("create table t as select 42 as i", dbname="shop")
    new = clusters(FAST)
    new.upgrade_from(old)
    new.start()
    assert new.query("show server_version_num")[0][0] >= "180000"
    assert new.query("select i from t", dbname="shop") == [(42,)]


# -- the project ------------------------------------------------------------------------------------------------


def test_daemons_of_one_project_have_logs_and_environments_of_their_own(
    mirror: Callable[..., Project], database: str
) -> None:
    project = mirror(database, sink={"batch": {"events": 7}}, sinks={"other": {"type": "file", "path": "/dev/null"}})
    with project.daemon() as first, project.daemon(serving=False, environment={"CDC_LOG_ME": "x"}) as second:
        assert Path(f"/proc/{second.process.pid}/environ").read_bytes().count(b"CDC_LOG_ME=x") == 1
        assert first.log != second.log
        assert "Serving." in first.said()
        second.lives_for(0.3)
        first.kill()
        second.wait_until_serving()
        sinks = project.status()["databases"]["shop"]["sinks"]
        assert set(sinks) == {SINK, "other"}
        assert second.drain() == 0
    assert project.peak > 1 << 20


def test_a_frozen_daemon_does_nothing_until_it_is_thawed(
    mirror: Callable[..., Project], database: str, connect: Callable[..., connection]
) -> None:
    project = mirror(database)
    with project.daemon() as daemon:
        daemon.freeze()
        assert is_stopped(daemon.process.pid)
        with connect(database).cursor() as cursor:
            cursor.execute("insert into hot (id, ver, mark) values (1, 1, 1)")
        with pytest.raises(AssertionError, match="not within"):
            until(lambda: bool(read_lines(project.file)), "it is delivered", seconds=0.5)
        daemon.thaw()
        until(lambda: bool(read_lines(project.file)), "it is delivered")
        daemon.freeze()
        daemon.kill()
        assert daemon.ends() == -signal.SIGKILL


def test_a_mutant_is_the_daemon_with_a_patch(mirror: Callable[..., Project], database: str) -> None:
    project = mirror(database)
    with project.daemon(program=mutant("harmless")) as daemon:
        daemon.wait_until_it_says("A harmless mutant runs.")
        assert daemon.drain() == 0
    with pytest.raises(AssertionError, match=r"known: .*harmless"):
        mutant("unheard-of")


def test_a_daemon_that_ends_at_its_start_says_why(mirror: Callable[..., Project], database: str) -> None:
    project = mirror(database)
    project.content["sinks"][SINK]["type"] = "pigeon"
    project.write()
    with pytest.raises(AssertionError, match="unknown sink type"), project.daemon():
        pass


def test_a_database_that_is_away_has_a_status(mirror: Callable[..., Project], database: str) -> None:
    with Proxy.before(database) as proxy:
        project = mirror(database, database={"dsn": proxy.dsn(database)})
        assert project.status()["databases"]["shop"]["state"] == "ok"
        proxy.refuse()
        assert project.status()["databases"]["shop"]["state"] == "unreachable"


# -- the ledger, the verdict, and the table ---------------------------------------------------------------------


def test_writers_live_through_crashes_and_the_ledger_tells_what_has_survived(
    cluster: Cluster, mirror: Callable[..., Project], figures: Callable[..., None], seed: int
) -> None:
    """Also what a fault test looks like."""
    project = mirror(cluster.create_database("shop"))
    rng = random.Random(f"{seed} nemesis")
    options = {"ledger": True, "asynchronous": 0.5, "keys": 10, "rate": 25.0, "linger": 0.1, "truncate_at": 0.5}
    work = Workload(project.dsn, seed, math.inf, open_at=0.2, open_for=1.0, **options)
    with project.daemon() as daemon, work:
        for kill in range(2):
            committed = len(work.committed)
            enough = committed + rng.randrange(100, 200)
            until(lambda: len(work.committed) > enough, "writers write")  # noqa: B023  # called at once
            cluster.kill(at_once=bool(kill))
            cluster.start()
        enough = len(work.committed) + 100
        until(lambda: len(work.committed) > enough and work.outcomes["truncated"] > 0, "writers write on")
        work.stop()
        work.join()
        assert daemon.drain() == 0
    verdict = settle(project, work, seed, least=300, most_duplicates=2 * 500)
    ledger = work.read_ledger()
    assert sum(fact.op == "truncate" for fact in ledger) == 1
    assert work.outcomes["disconnected"] >= 2 * work.writers
    assert verdict.committed == verdict.events == len(ledger)
    figures(
        "SIGKILL of PostgreSQL (this is the infrastructure's own)",
        verdict,
        kills=2,
        duplicates_per_kill=verdict.per_fault(2),
        answered_and_lost=len(work.committed.keys() - ledger.keys()),
        committed_and_unanswered=len(ledger.keys() - work.committed.keys()),
        peak_MiB=project.peak / 2**20,
    )


def test_what_a_writer_met_because_of_us_is_a_failure_and_what_was_expected_is_counted(
    mirror: Callable[..., Project], database: str, connect: Callable[..., connection], seed: int
) -> None:
    mirror(database)
    with connect(database).cursor() as cursor:
        cursor.execute("""
            create function full_up() returns trigger language plpgsql as
            $$ begin raise 'too many notifications in the NOTIFY queue' using errcode = '54000'; end $$;
            create trigger full_up before update on pair for each row execute function full_up()""")
    with pytest.raises(WriterFailed, match=rf"54000.*too many notifications(?s:.*)\(seed {seed}\)"):
        with Workload(database, seed, 10.0, ledger=True):
            pass
    with Workload(database, seed, 1.0, ledger=True, rate=20.0, truncate_at=0.5, expected={"54000"}) as work:
        pass
    assert work.outcomes["expected 54000"] > 0
    assert work.committed
    assert set(work.committed) <= set(work.read_ledger())


def test_the_rate_of_the_writers_is_kept(mirror: Callable[..., Project], database: str, seed: int) -> None:
    mirror(database)
    with Workload(database, seed, 2.0, rate=10.0, lulls=False) as work:
        pass
    ended = sum(count for outcome, count in work.outcomes.items() if outcome != "retried")
    assert 8 * 10 * 1.5 < ended < 8 * 10 * 4


def test_a_verdict_counts_what_was_done_to_a_stream(mirror: Callable[..., Project], database: str, seed: int) -> None:
    project = mirror(database)
    with Workload(database, seed, 1.0, ledger=True, rate=20.0) as work:
        pass
    assert settle(project, work, seed, least=50, most_duplicates=0).violation is None
    good, ledger, source = read_lines(project.file), work.read_ledger(), read_source(database, TABLES)

    def counts(lines: list[str]) -> tuple[int, ...]:
        found = judged(lines, ledger, source, strict=False)
        return found.lost, found.inversions, found.phantoms, found.duplicates, found.mirrored

    assert counts(good) == (0, 0, 0, 0, True)
    assert counts([*good, *good[:3]]) == (0, 0, 0, 3, True)
    assert counts(good[:-2])[0] == 2
    with pytest.raises(Lost):
        judged(good[:-2], ledger, source, seed)
    assert counts([*good, good[0].replace('"id":"shop-', '"id":"shop-9')])[2] == 1
    with pytest.raises(Phantom):
        judged([*good, good[0].replace('"id":"shop-', '"id":"shop-9')], ledger, source, seed)
    backwards = counts(good[::-1])
    assert backwards[1] > 10
    assert backwards[4] is False
    with pytest.raises(OutOfOrder, match=rf"seed {seed}"):
        judged(good[::-1], ledger, source, seed)
    assert judged([*good, good[0].replace('"version":1', '"version": 1')], ledger, source, strict=False).duplicates == 1
    with pytest.raises(AssertionError, match="tested nothing"):
        judged(good, ledger, source, seed, least=10**6)
    with pytest.raises(AssertionError, match="1 duplicates"):
        judged([*good, good[0]], ledger, source, seed, most_duplicates=0)


_SUITE = """
    import pytest

    @pytest.mark.parametrize("fault", ["first", "second"])
    def test_it(fault, figures, scale, seed):
        figures(f"the {fault}", "lost 0", kills=scale(5, 300), seed=seed, mean_per_kill=1.23456)
        assert fault == "first"
"""


@pytest.mark.parametrize("parallel", [(), ("-n", "2")], ids=["one process", "xdist"])
def test_figures_of_every_test_stand_in_one_table_at_the_end(tmp_path: Path, parallel: tuple[str, ...]) -> None:
    here = Path(__file__).parent
    suite = tmp_path / "suite" / "faults"
    suite.mkdir(parents=True)
    for module in ("conftest.py", "cluster.py", "tools.py", "verdict.py"):
        (suite / module).symlink_to(here / module)
    (suite / "test_it.py").write_text("\n".join(line[4:] for line in _SUITE.splitlines()))
    (suite / "pytest.ini").write_text(f"[pytest]\npythonpath = {here.parent / 'support'}\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(suite), "--full", "--seed", "7", *parallel]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=suite, timeout=60)
    assert done.returncode == 1, done.stdout
    lines = done.stdout.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.split("|")[1].strip(" -") for line in table] == ["fault", "", "the first", "the second"]
    assert len({len(line) for line in table}) == 1, "aligned"
    assert "| lost 0 " in table[2]
    assert "| kills 300, seed 7, mean per kill 1.23 |" in table[2]
    assert "VIOLATED: " in table[3]
    assert any("faults: full, seed 7" in line for line in lines)
    assert any("--seed 7 --full" in line for line in lines), "how to see a failure again"
