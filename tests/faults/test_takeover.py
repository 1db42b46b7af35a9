"""Two daemons and one sink: who serves it when the other is killed, stopped, or cut off; and what a zombie may do.

A daemon is taken to have gone when its session has, which the server sees at once after a kill; or when none of its
sessions has said anything for `LEASE` seconds: it is stopped, or the network swallows what it says. Another one then
delivers within `DEADLINE` seconds. The first one, when it wakes, is a zombie: it may hold a batch that it has read,
has written, or was about to acknowledge. Daemons are stopped at those very points (``stops_where_it_would_die`` in
``mutants.py``), and every change of a position is written down with the session that made it (`AUDIT`).

The second half tests the tests. Three mistakes, any of which would lose changes, are made on purpose, each in a
scenario that leaves nothing to chance; the judge has to find the changes lost, and to find the same scenario without
the mistake in order.
"""

from __future__ import annotations

import contextlib
import math
import random
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import SINK, Project, Tail, is_stopped, percentile, until
from judge import Fact, Lost
from mutants import mutant
from proxy import Proxy
from psycopg2 import sql
from psycopg2.extensions import connection, make_dsn
from verdict import Verdict, settle
from workload import Workload

BATCH = 500
"""The default of `batch: {events: …}`: what one fault can repeat."""
DEADLINE = 10.0
"""Seconds within which somebody else delivers, and within which `cdc status` says what is the matter."""
LOAD: dict[str, Any] = {"rate": 10.0, "linger": 0.05, "truncate_at": 2.0}
STOPS = mutant("stops-where-it-would-die")

AUDIT = """
    create table audit (at timestamptz not null default clock_timestamp(), pid int not null, epoch bigint not null);
    create function audit() returns trigger language plpgsql security definer as
    $$ begin insert into public.audit (pid, epoch) values (pg_backend_pid(), new.epoch); return null; end $$;
    create trigger audit after update on cdc.position for each row
      when ((old.snap_lo::text, old.snap_hi::text, old.last_seq)
            is distinct from (new.snap_lo::text, new.snap_hi::text, new.last_seq))
      execute function audit();
"""
"""Every change of a position: which session has made it, in which epoch."""

Scale = Callable[[Any, Any], Any]
Figures = Callable[..., None]
Mirror = Callable[..., Project]
Connect = Callable[..., connection]


def ask(conn: connection, statement: str, *parameters: object) -> list[Any]:
    with conn.cursor() as cursor:
        cursor.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []


def lines(project: Project) -> int:
    return project.file.read_bytes().count(b"\n") if project.file.exists() else 0


def wait_for_more(project: Project, seconds: float = 30.0, pause: float = 0.01) -> float:
    """Wait until something more is delivered; returns the seconds it took."""
    began = lines(project)
    return until(lambda: lines(project) > began, "something more is delivered", seconds, pause)


def sessions(conn: connection) -> int:
    """How many daemons are connected to serve the sink, or to wait for it."""
    found = "select pid from pg_stat_activity where datname = current_database() and application_name = %s"
    return len(ask(conn, found, f"cdc {SINK}"))


def lead(project: Project, dsn: str) -> None:
    """By which way the daemons connect that are started from now on."""
    project.content["databases"]["shop"]["dsn"] = dsn
    project.write()


@contextlib.contextmanager
def a_role_that_may_end_nobody(conn: connection, dsn: str) -> Iterator[str]:
    """A dsn by which a daemon can see of another that it is silent, and cannot end its sessions."""
    role = f"cdc_test_{uuid.uuid4().hex[:12]}"
    create = "create role {} login password 'secret' in role cdc_reader, pg_read_all_stats"
    ask(conn, sql.SQL(create).format(sql.Identifier(role)).as_string(conn))
    try:
        yield make_dsn(dsn, user=role, password="secret")
    finally:
        ask(conn, sql.SQL("drop role {}").format(sql.Identifier(role)).as_string(conn))


def wait_for_status(project: Project, began: float, **wanted: str) -> float:
    """How long after `began` one has to ask `cdc status` for it to say so of the sink, in seconds.

    Raises AssertionError if it says something else to who asks when `DEADLINE` has passed.
    """
    asked = 0.0

    def says() -> bool:
        nonlocal asked
        asked = time.monotonic() - began
        told = project.status()["databases"]["shop"]["sinks"][SINK]
        right = all(str(told[name]).endswith(value) for name, value in wanted.items())
        assert right or asked < DEADLINE, f"asked after {asked:.1f} s, cdc status says {told}"
        return right

    until(says, f"cdc status says {wanted}")
    return asked


# -- killed -----------------------------------------------------------------------------------------------------


def test_when_the_owner_is_killed_the_other_delivers_within_seconds(
    mirror: Mirror, database: str, connect: Connect, figures: Figures, scale: Scale, seed: int
) -> None:
    project = mirror(database)
    conn = connect(database)
    rng = random.Random(f"{seed} usurper")
    rounds = scale(3, 20)
    silent: list[float] = []
    shown: list[float] = []
    with (
        contextlib.ExitStack() as daemons,
        Workload(project.dsn, seed, math.inf, lulls=False, **LOAD) as work,
        Tail(project.file) as tail,
    ):
        owner = daemons.enter_context(project.daemon())
        for _ in range(rounds):
            other = daemons.enter_context(project.daemon(serving=False))
            until(lambda: sessions(conn) == 2, "the other stands by")
            owner.lives_for(rng.uniform(0.0, 0.5))
            wait_for_more(project, pause=0.0005)
            assert "Serving." not in other.said()
            killed_at, began = time.time(), time.monotonic()
            owner.kill()
            delivered = lines(project)
            until(lambda: len(tail.arrivals) > delivered, "the other delivers", DEADLINE)  # noqa: B023  # called at once
            silent.append(tail.arrivals[delivered] - killed_at)
            shown.append(wait_for_status(project, began, state="running", owner=f":{other.process.pid}"))
            owner = other
        work.stop()
        work.join()
        assert owner.drain() == 0
    verdict = settle(project, work, seed, least=50 * rounds, most_duplicates=rounds * BATCH)
    assert max(silent) < DEADLINE
    figures(
        "SIGKILL of the owner while another daemon stands by",
        verdict,
        kills=rounds,
        per_kill=verdict.per_fault(rounds),
        first_line_of_the_other_after_s=f"p50 {percentile(silent, 0.5):.2f}, max {max(silent):.2f}",
        shown_by_status_within_s=max(shown),
    )


# -- stopped ----------------------------------------------------------------------------------------------------

OWNER = "select k.epoch, h.pid from cdc.sink k, cdc.holder(k.id, k.epoch) h"


@pytest.mark.parametrize(
    ("fate", "points"),
    [
        pytest.param("ended", ("before-deliver", "after-read", "after-deliver"), id="ended"),
        pytest.param("fenced off", ("after-write", "before-acknowledge"), id="fenced-off"),
    ],
)
def test_a_stopped_owner_is_relieved_and_acknowledges_nothing_when_it_goes_on(
    fate: str,
    points: tuple[str, ...],
    mirror: Mirror,
    database: str,
    connect: Connect,
    figures: Figures,
    scale: Scale,
    seed: int,
) -> None:
    """Its sessions are ended by whoever relieves it; where that one has not the right to, the epoch has to do."""
    project = mirror(database)
    conn = connect(database)
    ask(conn, AUDIT)
    rng = random.Random(f"{seed} medusa")
    rounds = scale(1, 10)
    silent: list[float] = []
    with (
        a_role_that_may_end_nobody(conn, database) if fate == "fenced off" else contextlib.nullcontext(database) as dsn,
        Workload(project.dsn, seed, math.inf, **LOAD) as work,
    ):
        for number in range(rounds):
            point = f"{points[number % len(points)]}:{rng.randint(5, 25)}"
            lead(project, database)
            with project.daemon(program=STOPS, environment={"CDC_CRASH_AT": point}) as owner:
                until(lambda: is_stopped(owner.process.pid), f"it stops at {point}")
                began, delivered = time.monotonic(), lines(project)
                lead(project, dsn)
                with project.daemon(serving=False) as other:
                    until(lambda: sessions(conn) == 2 or "Serving." in other.said(), "the other stands by")
                    until(lambda: lines(project) > delivered, "the other delivers", DEADLINE)  # noqa: B023
                    silent.append(time.monotonic() - began)
                    ((epoch, pid),) = serving = ask(conn, OWNER)
                    owner.thaw()
                    owner.wait_until_it_says("The pipeline is interrupted.")
                    until(lambda: sessions(conn) == 2, "it stands by")
                    wait_for_more(project)
                    since = "select min(at) from audit where epoch = %s"
                    made = ask(conn, f"select epoch, pid from audit where at >= ({since})", epoch)
                    assert set(made) == {(epoch, pid)}, "somebody else has acknowledged something"
                    assert ask(conn, OWNER) == serving
                    other.kill()
                owner.wait_until_it_says("Serving.", times=2, seconds=DEADLINE)
                wait_for_more(project)
                assert owner.drain() == 0
            assert ("is served by another daemon" in owner.said()) == (fate == "fenced off")
        lead(project, database)
        work.stop()
    verdict = settle(project, work, seed, least=300 * rounds, most_duplicates=2 * rounds * BATCH)
    figures(
        f"SIGSTOP of the owner, at {', '.join(points[:rounds])}, which is then {fate}; SIGCONT",
        verdict,
        stops=rounds,
        duplicates_per_stop=verdict.per_fault(rounds),
        first_line_of_the_other_after_s=f"p50 {percentile(silent, 0.5):.2f}, max {max(silent):.2f}",
    )


@pytest.mark.full
def test_a_lone_daemon_that_is_stopped_is_down_until_it_goes_on(
    mirror: Mirror, database: str, connect: Connect, figures: Figures, scale: Scale, seed: int
) -> None:
    project = mirror(database)
    conn = connect(database)
    seconds = scale(12.0, 60.0)
    with project.daemon() as daemon, Workload(project.dsn, seed, math.inf, **LOAD) as work:
        wait_for_more(project, pause=0.0005)
        daemon.freeze()
        began, delivered = time.monotonic(), lines(project)
        down = wait_for_status(project, began, state="down", owner=f":{daemon.process.pid}")
        until(lambda: time.monotonic() - began > seconds, "it is stopped for long enough", 2 * seconds)
        assert lines(project) == delivered
        daemon.thaw()
        back = wait_for_more(project, DEADLINE)
        assert ask(conn, "select epoch from cdc.sink") == [(1,)], "nobody else was there, and it claimed anew"
        wait_for_status(project, time.monotonic(), state="running", owner=f":{daemon.process.pid}")
        work.stop()
        work.join()
        assert daemon.drain() == 0
    verdict = settle(project, work, seed, least=50 * int(seconds), most_duplicates=BATCH)
    figures(
        "SIGSTOP and SIGCONT of the only daemon",
        verdict,
        stopped_for_s=seconds,
        down_in_status_after_s=down,
        delivering_again_after_s=back,
    )


# -- cut off ----------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_an_owner_that_is_cut_off_is_relieved_and_stands_by_when_the_network_is_back(
    mirror: Mirror, database: str, connect: Connect, figures: Figures, scale: Scale, seed: int
) -> None:
    conn = connect(database)
    rounds = scale(1, 10)
    silent: list[float] = []
    healed: list[float] = []
    with Proxy.before(database) as proxy:
        project = mirror(database, database={"dsn": proxy.dsn(database)})
        ask(conn, AUDIT)
        with project.daemon() as first, Workload(project.dsn, seed, math.inf, **LOAD) as work:
            lead(project, database)
            for number in range(rounds):
                with project.daemon(serving=False) as second:
                    until(lambda: sessions(conn) == 2, "the second stands by")
                    wait_for_more(project, pause=0.0005)
                    began = time.monotonic()
                    # Of a stall, what was on its way arrives in the end; perhaps an acknowledgement.
                    proxy.stall() if number % 2 else proxy.black_hole()
                    second.wait_until_serving()
                    wait_for_more(project, DEADLINE)
                    silent.append(time.monotonic() - began)
                    ((epoch, pid),) = serving = ask(conn, OWNER)
                    until(lambda: sessions(conn) == 1, "the one that cannot be heard has no session left")

                    began = time.monotonic()
                    proxy.resume()
                    proxy.cut()  # what the server answers to a peer whose session it has ended
                    first.wait_until_it_says("The pipeline is interrupted.", times=1 + number)
                    until(lambda: sessions(conn) == 2, "the first stands by", DEADLINE)
                    healed.append(time.monotonic() - began)
                    wait_for_more(project)
                    since = "select min(at) from audit where epoch = %s"
                    assert set(ask(conn, f"select epoch, pid from audit where at >= ({since})", epoch)) == {
                        (epoch, pid)
                    }
                    assert ask(conn, OWNER) == serving
                    second.kill()
                first.wait_until_it_says("Serving.", times=2 + number, seconds=DEADLINE)
                wait_for_more(project)
            work.stop()
            work.join()
            assert first.drain() == 0
        assert proxy.cuts >= rounds
    assert max(silent) < DEADLINE
    verdict = settle(project, work, seed, least=300 * rounds, most_duplicates=2 * rounds * BATCH)
    figures(
        "the network between the owner and the server is cut, while another daemon stands by",
        verdict,
        cuts=rounds,
        duplicates_per_cut=verdict.per_fault(rounds),
        first_line_of_the_other_after_s=f"p50 {percentile(silent, 0.5):.2f}, max {max(silent):.2f}",
        standing_by_after_s=max(healed),
    )


# -- tests of the tests -----------------------------------------------------------------------------------------

PAGE = 10
"""`batch: {events: …}` where it matters which page of which window was handed out."""
GUILTY = pytest.mark.parametrize("guilty", [False, True], ids=["as-it-is", "with-the-mistake"])


def judge(project: Project, work: Workload, seed: int, mistake: str, figures: Figures) -> Verdict:
    """Deliver what is left; AssertionError unless the mistake, if there is one, has lost something."""
    verdict = settle(project, work, seed, strict=False)
    if not mistake:
        assert verdict.violation is None, verdict.violation
        return verdict
    assert isinstance(verdict.violation, Lost), f"{mistake} was not found out: {verdict}"
    figures(f"mutant: {mistake}", f"condemned: {verdict}", committed=verdict.committed)
    return verdict


def change(conn: connection, function: str, what: str, to: str) -> None:
    """Replace a piece of a function's text."""
    ((source,),) = ask(conn, "select pg_get_functiondef(%s::regproc)", function)
    assert source.count(what) == 1, f"{function} no longer says {what!r}"
    ask(conn, source.replace(what, to))


def insert(conn: connection, work: Workload, first: int, last: int) -> None:
    """Insert rows of these numbers, in that order, which `work` shall know as committed."""
    ask(conn, "insert into hot (id, ver, mark) select i, 1, i from generate_series(%s, %s) i", first, last)
    work.committed.update({Fact("hot", "insert", mark): 0.0 for mark in range(first, last + 1)})


@GUILTY
def test_acknowledging_before_delivering_is_found_out(
    guilty: bool, mirror: Mirror, database: str, figures: Figures, seed: int
) -> None:
    mistake = "acknowledges before it delivers" if guilty else ""
    program = {"program": mutant("acknowledges-before-it-delivers")} if guilty else {}
    project = mirror(database)
    rng = random.Random(f"{seed} hasty")
    with Workload(project.dsn, seed, math.inf, **LOAD) as work:
        for _ in range(2):
            armed = {"CDC_CRASH_AT": f"before-deliver:{rng.randint(1, 25)}"}
            with project.daemon(serving=False, environment=armed, **program) as daemon:  # type: ignore[arg-type]
                assert daemon.ends() == -signal.SIGKILL
        work.stop()
    assert judge(project, work, seed, mistake, figures).committed > 100


@GUILTY
def test_ignoring_the_epoch_is_found_out(
    guilty: bool, mirror: Mirror, database: str, connect: Connect, figures: Figures, seed: int
) -> None:
    """A zombie's acknowledgement counts in a window it has never seen.

    1 to 30 are written first and committed last. The zombie delivers 31 to 40 and stops. The other, who may not end its
    session, delivers them too, sees 1 to 30 committed, and dies with ten of them delivered. Now the zombie says that
    everything up to 40 is delivered.
    """
    mistake = "ignores the epoch" if guilty else ""
    project = mirror(database, sink={"batch": {"events": PAGE}})
    work = Workload(database, seed, 0.0)
    conn, late = connect(database), connect(database, autocommit=False)
    insert(late, work, 1, 30)
    insert(conn, work, 31, 40)
    with a_role_that_may_end_nobody(conn, database) as dsn:
        stops = {"CDC_CRASH_AT": "before-acknowledge:1"}
        with project.daemon(program=mutant("ignores-the-epoch") if guilty else STOPS, environment=stops) as zombie:
            until(lambda: is_stopped(zombie.process.pid), "the zombie stops")
            assert lines(project) == 10
            # Who is silent, has been so for long: the lease is another test's business.
            change(conn, "cdc.holder", "max(a.state_change)", "max(a.state_change) - interval '1 min'")
            lead(project, dsn)
            with project.daemon(serving=False, environment={"CDC_CRASH_AT": "before-deliver:3"}) as other:
                until(lambda: lines(project) == 20, "the other delivers it again", DEADLINE)
                late.commit()
                assert other.ends() == -signal.SIGKILL
            assert lines(project) == 30
            assert ask(conn, POSITION) == [(False, 0, 2)]  # a backlog is read two batches at a time
            zombie.thaw()
            until(lambda: ask(conn, POSITION)[0][0], "the window is closed")
            assert ("is served by another daemon" in zombie.said()) is not guilty
            assert zombie.drain() == 0
        lead(project, database)
        assert judge(project, work, seed, mistake, figures).lost == (20 if guilty else 0)


POSITION = "select snap_hi is null, last_seq, epoch from cdc.position"


@GUILTY
def test_resuming_with_a_new_upper_snapshot_is_found_out(
    guilty: bool, mirror: Mirror, database: str, connect: Connect, figures: Figures, seed: int
) -> None:
    """A window that is resumed must be the same window.

    1 to 30 are written first and committed last. The daemon dies when 31 to 50 are delivered of a window that ends with
    60. If that window then ended now, 1 to 30 would be in it, and behind the place where it is resumed.
    """
    mistake = "resumes a window with a new upper snapshot" if guilty else ""
    project = mirror(database, sink={"batch": {"events": PAGE}})
    work = Workload(database, seed, 0.0)
    conn, late = connect(database), connect(database, autocommit=False)
    if guilty:
        resumes = "    else\n      ended := array(select x from pg_snapshot_xip(s.snap_lo) as x"
        anew = "    else\n      if p_acked is null then s.snap_hi := pg_current_snapshot(); moved := true; end if;"
        change(conn, "cdc.next_batch", resumes, resumes.replace("    else", anew))
    insert(late, work, 1, 30)
    insert(conn, work, 31, 60)
    with project.daemon(serving=False, environment={"CDC_CRASH_AT": "before-deliver:3"}) as daemon:
        assert daemon.ends() == -signal.SIGKILL
    assert ask(conn, POSITION) == [(False, 40, 1)]  # the second page has two batches
    late.commit()
    assert judge(project, work, seed, mistake, figures).lost == (30 if guilty else 0)
