"""The database is not where it was: restored from a dump, promoted, upgraded, gone back in time.

A position is made of transaction ids, and each cluster counts its own. So it must never be read in another cluster as
if it said something there; where the ids did go on, as after a promotion or pg_upgrade, nobody shall have to step in.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from cluster import Cluster
from harness import Project, read_lines, until
from proxy import Proxy
from sql import fetch, value
from verdict import settle
from workload import Workload

from cdc.event import Event, Op

Connect = Callable[..., Any]
KEPT = "create table if not exists kept (id int primary key, v int)"


@pytest.fixture
def small(tmp_path: Path) -> Callable[[str], Project]:
    """``small(dsn)``: a project that captures table kept."""

    def make(dsn: str) -> Project:
        with contextlib.closing(psycopg2.connect(dsn)) as conn:
            fetch(conn, KEPT)
            conn.commit()
        directory = tmp_path / f"small-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        project = Project(directory, dsn, {"public.kept": {}}, "{database}.jsonl")
        project.cdc("migrate")
        return project

    return make


def keys(project: Project) -> list[int]:
    return [event.key["id"] for event in events(project) if event.key is not None]


def events(project: Project) -> list[Event]:
    return [Event.from_json(line) for line in read_lines(project.file)]


def move(project: Project, dsn: str) -> None:
    """Let the configuration name another server."""
    project.dsn = dsn
    project.content["databases"]["shop"]["dsn"] = dsn
    project.write()


def dump_and_restore(old: Cluster, new: Cluster, name: str = "shop") -> str:
    """The way everybody moves a database; returns the dsn of the copy."""
    path = new.directory / "socket" / "dump"
    old.run("pg_dump", "-Fc", "-d", old.dsn(name), "-f", path)
    dsn = new.create_database(name)
    for role in ("cdc_capture", "cdc_nobody", "cdc_reader"):  # a dump of one database has no roles
        new.query(f"create role {role} nologin noinherit")
    new.run("pg_restore", "-d", dsn, path)
    return dsn


@pytest.mark.parametrize("further_on", [False, True], ids=["a fresh cluster", "a cluster that has counted further"])
def test_a_dump_restored_elsewhere_is_refused_until_it_is_rebased_and_then_loses_nothing(
    clusters: Callable[..., Cluster],
    small: Callable[[str], Project],
    connect: Connect,
    figures: Callable[..., None],
    further_on: bool,
) -> None:
    old, new = clusters(), clusters()
    project = small(old.create_database("shop"))
    writer = connect(project.dsn)
    for number in range(3000):  # ids go by, as they do
        if number >= 1000 and number % 100 == 0:  # a fresh cluster has counted to some hundreds by the end of a restore
            fetch(writer, "insert into kept values (%s, 0)", (number // 100,))
        else:
            value(writer, "select pg_current_xact_id()")
    project.cdc("run", "--until-idle")
    assert keys(project) == list(range(10, 30))
    fetch(writer, "insert into kept select i, 0 from generate_series(100, 109) i")  # committed, and not delivered
    if further_on:
        with contextlib.closing(psycopg2.connect(new.dsn())) as conn:
            conn.autocommit = True
            for _ in range(6000):
                value(conn, "select pg_current_xact_id()")

    move(project, dump_and_restore(old, new))
    writer = connect(project.dsn)
    fetch(writer, "insert into kept values (200, 0)")  # recorded here, before anybody has noticed
    fetch(writer, "begin; savepoint s; insert into kept values (201, 0); release s; commit")

    refused = project.cdc("run", codes=(1,))
    assert "cdc rebase" in refused.stderr
    assert "another cluster" in refused.stderr
    (problem,) = project.status()["databases"]["shop"]["problems"]
    assert "cdc rebase" in problem
    assert "cdc rebase" in project.cdc("check", codes=(1,)).stdout
    before = len(read_lines(project.file))

    done = project.cdc("rebase").stdout
    assert "rebased mirror" in done
    fetch(writer, "insert into kept values (300, 0)")
    project.cdc("migrate")  # oids are others here: the triggers get to know them
    project.cdc("run", "--until-idle")
    again = keys(project)[before:]
    assert set(again) >= {*range(100, 110), 200, 201, 300}
    assert [key for key in again if key >= 100] == [*range(100, 110), 200, 201, 300]
    if not further_on:
        assert not set(again) & set(range(10, 30)), "delivered before the dump was made, and that can be told"
    assert len({event.id for event in events(project)}) == 20 + 13
    assert project.cdc("rebase").stdout == "shop: the positions are good, nothing to do\n"
    assert project.status()["databases"]["shop"]["problems"] == []
    figures(
        "dump restored elsewhere" + (", further on" if further_on else ""),
        "refused, then lost 0, no id twice",
        repeats=len(again) - 13,
    )


def test_what_was_rewound_past_before_the_dump_does_not_hide_what_comes_after_it(
    clusters: Callable[..., Cluster], small: Callable[[str], Project], connect: Connect
) -> None:
    """Rewinding one table leaves a position to skip up to, in ids that a fresh cluster has yet to count to."""
    old, new = clusters(), clusters()
    dsn = old.create_database("shop")
    writer = connect(dsn)
    fetch(writer, "create table other (id int primary key)")
    project = small(dsn)
    project.content["databases"]["shop"]["tables"] = {"public.kept": {}, "public.other": {}}
    project.write()
    project.cdc("migrate")
    for _ in range(2000):
        value(writer, "select pg_current_xact_id()")
    fetch(writer, "insert into kept values (1, 0)")
    project.cdc("run", "--until-idle")
    project.cdc("sinks", "rewind", "mirror", "--to", "earliest", "--table", "public.other")
    project.cdc("run", "--until-idle")
    assert keys(project) == [1], "the rewound table had nothing to tell"
    move(project, dump_and_restore(old, new))
    project.cdc("rebase")
    project.cdc("migrate")
    fetch(connect(project.dsn), "insert into kept values (2, 0)")
    project.cdc("run", "--until-idle")
    assert keys(project) == [1, 2]


def test_a_backfill_under_way_begins_anew_after_a_dump_was_restored_elsewhere(
    clusters: Callable[..., Cluster], small: Callable[[str], Project], connect: Connect
) -> None:
    old, new = clusters(), clusters()
    dsn = old.create_database("shop")
    fetch(connect(dsn), "create table first (id int primary key); create table gone (id int primary key)")
    project = small(dsn)
    project.content["databases"]["shop"]["tables"] = {"public.kept": {}, "public.first": {}, "public.gone": {}}
    project.write()
    project.cdc("migrate")
    writer = connect(dsn)
    fetch(writer, "insert into kept select i, 0 from generate_series(1, 500) i")
    fetch(writer, "insert into first select i from generate_series(1001, 1500) i")
    project.cdc("run", "--until-idle")
    with project.daemon() as daemon:
        project.cdc("backfill", "start", "mirror", "public.kept", "--chunk", "50", "--rate", "100")
        until(lambda: len(read_lines(project.file)) > 1050, "rows are told of")
        daemon.drain()
    for table in ("public.first", "public.gone"):
        project.cdc("backfill", "start", "mirror", table)
    project.cdc("backfill", "pause", "mirror", "public.first", "public.gone")
    before = len(read_lines(project.file))

    move(project, dump_and_restore(old, new))
    writer = connect(project.dsn)
    fetch(writer, "drop table gone")
    # As if each table had the oid here that the other one had there.
    for table, other in (("kept", "first"), ("first", "kept")):
        fetch(
            writer,
            "update cdc.backfill set relation = %s::regclass, state = 'failed' where table_name = %s",
            (f"public.{other}", table),
        )
    fetch(writer, "update cdc.backfill set state = case table_name when 'first' then 'paused' else 'running' end")
    project.content["databases"]["shop"]["tables"] = {"public.kept": {}, "public.first": {}}
    project.write()
    project.cdc("rebase")
    project.cdc("migrate")
    project.cdc("run", "--until-idle")

    stands = {
        entry["table"]: (entry["state"], entry["reason"])
        for entry in json.loads(project.cdc("backfill", "status", "--json").stdout)["databases"]["shop"]["mirror"]
    }
    assert stands == {
        "public.kept": ("done", None),
        "public.first": ("paused", None),
        "public.gone": ("failed", "the table does not exist"),
    }
    told = [event.key["id"] for event in events(project)[before:] if event.op == Op.READ and event.key is not None]
    assert told == list(range(1, 501))
    project.cdc("backfill", "resume", "mirror")
    project.cdc("run", "--until-idle")
    assert [event.key["id"] for event in events(project)[-500:] if event.key] == list(range(1001, 1501))


@pytest.mark.full
def test_a_running_daemon_whose_database_is_replaced_stops_delivering_and_goes_on_after_a_rebase(
    clusters: Callable[..., Cluster], small: Callable[[str], Project], connect: Connect
) -> None:
    old, new = clusters(), clusters()
    project = small(old.create_database("shop"))
    fetch(connect(project.dsn), "insert into kept values (1, 0)")
    with Proxy.before(old.dsn()) as proxy:
        project.content["databases"]["shop"]["dsn"] = proxy.dsn(project.dsn)
        project.write()
        with project.daemon() as daemon:
            until(lambda: keys(project) == [1], "it delivers")
            dsn = dump_and_restore(old, new)
            old.stop()
            proxy.redirect(dsn)  # the name now leads elsewhere
            proxy.cut()
            fetch(connect(dsn), "insert into kept values (2, 0)")
            daemon.wait_until_it_says("taken in another cluster")
            assert keys(project) == [1]
            project.dsn = dsn
            project.content["databases"]["shop"]["dsn"] = dsn
            project.write()
            project.cdc("rebase")
            until(lambda: 2 in keys(project), "it delivers again")
            assert daemon.drain() == 0


def test_a_promoted_standby_is_announced_and_served_and_loses_nothing_it_has(
    clusters: Callable[..., Cluster],
    mirror: Callable[..., Project],
    figures: Callable[..., None],
    scale: Callable[[int, int], int],
    seed: int,
) -> None:
    """Asynchronous failover: the primary is killed under load, with WAL that the standby never got."""
    rounds = scale(2, 20)
    current = clusters({"max_wal_senders": "10"})
    project = mirror(current.create_database("shop"), database={"retention": "1h"})
    work = Workload(project.dsn, seed, math.inf, writers=6, ledger=True, rate=30)
    ids: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(work)
        for number in range(rounds):
            standby = stack.enter_context(current.standby())
            with project.daemon() as daemon:
                lines = len(read_whole(project.file))
                until(lambda: len(read_whole(project.file)) > lines + 100, "it delivers")  # noqa: B023
                current.kill(at_once=True)
                standby.promote()
                work.dsn = standby.dsn("shop")
                daemon.kill()
            move(project, work.dsn)
            with project.daemon() as daemon:
                until(lambda: "on another timeline" in daemon.said(), f"it says so (round {number})")
                daemon.drain()
            current = standby
        work.stop()
        work.join()
        # What was delivered of the WAL that was lost tells of changes that are no more: that is all there may be.
        verdict = settle(project, work, seed, least=scale(300, 5000), strict=False, dsn=work.dsn)
        for line in read_lines(project.file):
            event = Event.from_json(line)
            assert ids.setdefault(event.id, line) == line, f"two events are called {event.id}"
    assert verdict.lost == 0
    figures(
        "asynchronous failover", "lost 0, event ids reused 0, each announced", rounds=rounds, diverged=verdict.phantoms
    )


def read_whole(path: Path) -> list[bytes]:
    """The whole lines there are at this moment."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def test_a_database_moved_by_pg_upgrade_goes_on_by_itself(
    clusters: Callable[..., Cluster],
    small: Callable[[str], Project],
    connect: Connect,
    postgres_15: Path,
    figures: Callable[..., None],
) -> None:
    old = clusters(bindir=postgres_15, initdb=["--encoding=UTF8", "--locale=C"])
    new = clusters(initdb=["--no-data-checksums", "--encoding=UTF8", "--locale=C"])
    project = small(old.create_database("shop"))
    fetch(connect(project.dsn), "insert into kept select i, 0 from generate_series(1, 10) i")
    project.cdc("run", "--until-idle")
    fetch(connect(project.dsn), "insert into kept select i, 0 from generate_series(11, 20) i")
    new.upgrade_from(old)
    new.start()
    move(project, new.dsn("shop"))
    fetch(connect(project.dsn), "insert into kept values (21, 0)")
    assert project.status()["databases"]["shop"]["problems"] == []
    done = project.cdc("run", "--until-idle")
    assert "moved by pg_upgrade" in done.stderr
    assert keys(project) == list(range(1, 22))
    figures("pg_upgrade 15 to 18", "lost 0, duplicates 0, nobody had to step in")


@pytest.mark.full
def test_a_copy_by_dump_within_one_cluster_goes_on(
    clusters: Callable[..., Cluster], small: Callable[[str], Project], connect: Connect
) -> None:
    """Ids of one cluster go on counting: a position of a dump still says what it said."""
    cluster = clusters()
    project = small(cluster.create_database("shop"))
    fetch(connect(project.dsn), "insert into kept select i, 0 from generate_series(1, 5) i")
    project.cdc("run", "--until-idle")
    fetch(connect(project.dsn), "insert into kept values (6, 0)")
    path = cluster.directory / "socket" / "dump"
    cluster.run("pg_dump", "-Fc", "-d", cluster.dsn("shop"), "-f", path)
    cluster.query("drop database shop with (force)")
    cluster.create_database("shop")
    cluster.run("pg_restore", "-d", cluster.dsn("shop"), path)
    fetch(connect(project.dsn), "insert into kept values (7, 0)")
    project.cdc("migrate")
    project.cdc("run", "--until-idle")
    assert keys(project) == list(range(1, 8))


@pytest.mark.full
def test_rebase_waits_for_writers_and_takes_what_they_committed(
    clusters: Callable[..., Cluster], small: Callable[[str], Project], connect: Connect
) -> None:
    """A transaction that is open during the rebase, and has its id already, writes afterwards."""
    old, new = clusters(), clusters()
    project = small(old.create_database("shop"))
    writer = connect(project.dsn)
    for _ in range(2000):
        value(writer, "select pg_current_xact_id()")
    move(project, dump_and_restore(old, new))
    early = psycopg2.connect(project.dsn)
    value(early, "select pg_current_xact_id()")
    project.cdc("rebase")
    fetch(early, "insert into kept values (1, 0)")
    early.commit()
    early.close()
    project.cdc("run", "--until-idle")
    assert keys(project) == [1]
