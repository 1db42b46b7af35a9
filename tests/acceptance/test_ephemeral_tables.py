"""`delivery: ephemeral` as a user meets it: YAML, `cdc migrate`, `cdc run`, a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Project, percentile, read_lines, report, until
from psycopg2.extensions import connection
from sql import fetch, value

from cdc.event import Event

Connect = Callable[..., connection]


@pytest.fixture
def project(tmp_path: Path, database: str, connect: Connect) -> Iterator[Project]:
    """Table live is ephemeral, every other one durable."""
    fetch(connect(database), "create table live (id int primary key); create table kept (id int primary key)")
    tables = {"public.live": {"delivery": "ephemeral"}, "public.*": {}}
    made = Project(tmp_path, database, tables, "{table}.jsonl")
    made.cdc("migrate")
    yield made
    made.remove_output()


def keys(project: Project, table: str) -> list[int]:
    lines = read_lines(project.directory / f"{table}.jsonl")
    return [event.key["id"] for event in map(Event.from_json, lines) if event.key is not None]


def test_two_daemons_deliver_each_change_once_and_in_order(project: Project, connect: Connect) -> None:
    writer = connect(project.dsn)
    with project.daemon() as one, project.daemon(serving=False) as other:
        other.wait_until_it_says("Listening.")
        one.wait_until_it_says("Listening.")
        for id_ in range(300):
            fetch(writer, "insert into live values (%s)", (id_,))
            if id_ % 10 == 0:
                fetch(writer, "insert into kept values (%s)", (id_,))
        until(lambda: len(keys(project, "live")) == 300 and len(keys(project, "kept")) == 30, "everything is there")
        assert (one.drain(), other.drain()) == (0, 0)
    assert keys(project, "live") == list(range(300))
    assert keys(project, "kept") == list(range(0, 300, 10))
    assert value(writer, "select count(*) from cdc.event") == 30


def test_what_is_committed_while_no_daemon_listens_is_lost_and_that_is_the_bargain(
    project: Project, connect: Connect
) -> None:
    writer = connect(project.dsn)
    fetch(writer, "insert into live values (1); insert into kept values (1)")
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Listening.")
        fetch(writer, "insert into live values (2)")
        until(lambda: keys(project, "live") == [2] and keys(project, "kept") == [1], "they are there")


def test_from_commit_to_the_line_takes_a_millisecond_or_so(project: Project, connect: Connect) -> None:
    """A figure, and a bound ten times as high: this machine is shared."""
    writer = connect(project.dsn)
    waits = []
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Listening.")
        path = project.directory / "live.jsonl"
        for id_ in range(200):
            size = path.stat().st_size if path.exists() else 0
            began = time.perf_counter()
            fetch(writer, "insert into live values (%s)", (id_,))
            until(lambda: path.exists() and path.stat().st_size > size, "it is there", pause=0.0001)  # noqa: B023
            waits.append(time.perf_counter() - began)
    p50, p99 = percentile(waits, 0.5), percentile(waits, 0.99)
    report(f"ephemeral, COMMIT included: p50 {p50 * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms")
    assert p50 < 0.1


def test_an_ephemeral_table_without_notify_is_a_configuration_error(project: Project) -> None:
    project.content["databases"]["shop"]["notify"] = "off"
    project.write()
    refused = project.cdc("check", codes=(78,))
    assert "delivery: ephemeral" in refused.stderr
    assert "databases.shop" in refused.stderr


def test_a_table_may_become_ephemeral_and_durable_again(project: Project, connect: Connect) -> None:
    writer = connect(project.dsn)
    for delivery, stored in (("durable", 1), ("ephemeral", 1), ("durable", 2)):
        project.content["databases"]["shop"]["tables"] = {"public.live": {"delivery": delivery}}
        project.write()
        assert json.loads(project.cdc("migrate", "--json").stdout)["failed"] == {}
        fetch(writer, "delete from live; insert into live values (1)")
        assert value(writer, "select count(*) from cdc.event where op = 'i'") == stored
