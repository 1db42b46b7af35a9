"""Looking on: everything committed, once, in order per row, whatever the writers do, and without a trace."""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest
from click.testing import CliRunner, Result
from harness import CDC, until
from psycopg2.extensions import connection
from sql import fetch, value

from cdc.cli import main
from cdc.connection import Connection
from cdc.event import Event
from cdc.tail import SMALL, Tail

Connect = Callable[..., connection]


@pytest.fixture
def shop(installed: str, connect: Connect) -> connection:
    writer = connect(installed)
    fetch(writer, "create table item (id int primary key, n int); select cdc.enable_capture('item')")
    return writer


@pytest.fixture
def session(installed: str) -> Iterator[Connection]:
    with Connection(installed, purpose="test") as found:
        yield found


def read_all(tail: Tail, page: int = 500) -> list[Event]:
    """All there is now."""
    found: list[Event] = []
    while events := tail.read(page):
        found += [event for event in events if isinstance(event, Event)]
        if len(events) < page:
            break
    return found


def keys(events: list[Event]) -> list[int]:
    return [event.key["id"] for event in events if event.key is not None]


def test_it_begins_with_what_comes_or_with_the_last_of_what_is_kept(shop: connection, session: Connection) -> None:
    fetch(shop, "insert into item select i, 0 from generate_series(1, 5) i")
    tail = Tail(session, database="shop")
    assert tail.read() == []
    assert keys([event for event in tail.last(3) if isinstance(event, Event)]) == [3, 4, 5]
    fetch(shop, "insert into item values (6, 0)")
    (event,) = tail.read()
    assert isinstance(event, Event)
    assert event.source.database == "shop"
    assert event.to_json().startswith('{"version":1,"id":"shop-')
    assert tail.read() == []


def test_what_is_rolled_back_or_not_committed_yet_is_not_seen(
    shop: connection, session: Connection, installed: str, connect: Connect
) -> None:
    tail = Tail(session, database="shop")
    slow = connect(installed, autocommit=False)
    fetch(slow, "insert into item values (1, 0)")
    fetch(shop, "insert into item values (2, 0)")
    assert keys(read_all(tail)) == [2]
    fetch(shop, "begin; insert into item values (3, 0); rollback")
    assert read_all(tail) == []
    slow.commit()
    assert keys(read_all(tail)) == [1]


@pytest.mark.parametrize("page", [500, 7])
def test_under_random_writers_each_event_is_seen_once_and_each_rows_in_order(
    shop: connection, session: Connection, installed: str, page: int
) -> None:
    tail = Tail(session, database="shop")
    done = threading.Event()

    def write(seed: int) -> None:
        choose = random.Random(seed)
        with psycopg2.connect(installed) as conn, conn.cursor() as cursor:
            for _ in range(150):
                for _ in range(choose.choice([1, 1, 3, 40])):
                    # Ordered, so that writers do not deadlock.
                    cursor.execute(
                        "insert into item values (%s, 0) on conflict (id) do update set n = item.n + 1",
                        (choose.randint(1, 30),),
                    )
                    if choose.random() < 0.3:
                        break
                conn.rollback() if choose.random() < 0.2 else conn.commit()

    def writing(seed: int) -> None:
        while True:
            try:
                write(seed)
            except psycopg2.errors.DeadlockDetected:
                continue
            return

    threads = [threading.Thread(target=writing, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    seen: list[Event] = []
    while any(thread.is_alive() for thread in threads):
        seen += read_all(tail, page)
    done.set()
    while more := read_all(tail, page):
        seen += more
    recorded = {row[0] for row in fetch(shop, "select seq from cdc.event")}
    counted = Counter(event.source.seq for event in seen)
    assert len(recorded) > 500
    assert set(counted) == recorded
    assert max(counted.values()) == 1
    last: dict[int, int] = {}
    for event in seen:
        assert event.key is not None
        assert last.get(event.key["id"], 0) < event.source.seq
        last[event.key["id"]] = event.source.seq


def test_a_large_transaction_comes_in_pages_and_whole(
    shop: connection, session: Connection, installed: str, connect: Connect
) -> None:
    tail = Tail(session, database="shop")
    number = SMALL * 3
    slow = connect(installed, autocommit=False)
    fetch(slow, "insert into item values (-1, 0)")
    fetch(shop, f"insert into item select i, 0 from generate_series(1, {number}) i")
    assert keys(read_all(tail, 1000)) == list(range(1, number + 1))
    slow.commit()
    assert keys(read_all(tail)) == [-1]


def test_it_leaves_no_trace_and_needs_no_more_than_to_be_a_reader(
    shop: connection, installed: str, connect: Connect
) -> None:
    role = f"tail_{installed.rpartition('test_')[2].split()[0]}".strip("'\"")
    fetch(shop, f"create role {role} login; grant cdc_reader to {role}")
    try:
        before = fetch(shop, "select * from cdc.position")
        dsn = psycopg2.extensions.make_dsn(installed, user=role)
        with Connection(dsn, purpose="test") as session:
            tail = Tail(session, database="shop")
            fetch(shop, "insert into item values (1, 0)")
            assert keys(read_all(tail)) == [1]
            # It writes nothing, not even a transaction id.
            assert session.query("select pg_current_xact_id_if_assigned()") == [(None,)]
        assert fetch(shop, "select * from cdc.position") == before
    finally:
        fetch(shop, f"drop role {role}")


# -- the command --


@pytest.fixture
def config(tmp_path: Path, installed: str) -> Path:
    path = tmp_path / "config.yaml"
    content = {
        "databases": {"shop": {"dsn": installed, "tables": {"public.*": {}}}},
        "sinks": {"out": {"type": "stdout"}},
    }
    path.write_text(json.dumps(content))
    return path


def run(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["-c", str(config), *arguments])


def test_the_command_prints_json_lines_of_the_tables_it_is_asked_for(
    config: Path, shop: connection, tmp_path: Path
) -> None:
    fetch(shop, "create table other (id int primary key); select cdc.enable_capture('other')")
    fetch(shop, "insert into item values (1, 0); insert into other values (7); insert into item values (2, 0)")
    out = tmp_path / "out"
    with out.open("wb") as file:
        command = [CDC, "-c", config, "tail", "--json", "--last", "10", "it?m", "public.none"]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE)
    try:
        until(lambda: out.read_bytes().count(b"\n") == 2, "what was kept is there")
        fetch(shop, "insert into other values (8); update item set n = 5 where id = 2")
        until(lambda: out.read_bytes().count(b"\n") == 3, "and what comes")
    finally:
        process.terminate()
        process.wait(10)
        assert process.stderr is not None
        process.stderr.close()
    events = [Event.from_json(line) for line in out.read_text().splitlines()]
    assert [(event.op.value, event.source.table) for event in events] == [
        ("insert", "item"), ("insert", "item"), ("update", "item"),
    ]  # fmt: skip


def test_it_reads_on_after_its_connection_was_lost(config: Path, shop: connection, tmp_path: Path) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    with out.open("wb") as stdout, said.open("wb") as stderr:
        process = subprocess.Popen([CDC, "-c", config, "tail"], stdout=stdout, stderr=stderr)
    mine = "application_name = 'cdc tail' and datname = current_database()"
    try:
        until(lambda: value(shop, f"select count(*) from pg_stat_activity where {mine}") == 1, "it is there")
        fetch(shop, f"select pg_terminate_backend(pid) from pg_stat_activity where {mine}")
        until(lambda: b"is not shown" in said.read_bytes(), "it says what is missing")

        def comes() -> bool:
            fetch(shop, "insert into item select coalesce(max(id), 0) + 1, 0 from item")
            return b"insert" in out.read_bytes()

        until(comes, "it reads on", pause=0.2)
    finally:
        process.terminate()
        process.wait(10)


def test_a_database_that_was_never_reached_is_not_waited_for(config: Path, shop: connection, tmp_path: Path) -> None:
    content = json.loads(config.read_text())
    content["databases"]["away"] = {"dsn": "host=127.0.0.1 port=1 password=canary", "tables": {"public.*": {}}}
    config.write_text(json.dumps(content))
    result = run(config, "tail", "-d", "away")
    assert result.exit_code == 69
    assert result.stderr.startswith("error: away: cannot connect: ")
    assert "is not shown" not in result.stderr
    out, said = tmp_path / "out", tmp_path / "said"
    fetch(shop, "insert into item values (1, 0)")
    with out.open("wb") as stdout, said.open("wb") as stderr:
        process = subprocess.Popen([CDC, "-c", config, "tail", "-n", "1"], stdout=stdout, stderr=stderr)
    try:
        until(lambda: b"error: away: cannot connect: " in said.read_bytes(), "it says which is not there")
        until(lambda: b"insert" in out.read_bytes(), "and shows the other one")
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(("arguments", "shown"), [([], b"e?"), (["--json"], '"größe→"'.encode())])
def test_letters_the_terminal_does_not_have_are_no_reason_to_end(
    config: Path, shop: connection, tmp_path: Path, encoding: str, arguments: list[str], shown: bytes
) -> None:
    fetch(shop, """create table "größe→" (id int primary key); select cdc.enable_capture('"größe→"')""")
    fetch(shop, """insert into "größe→" values (1)""")
    out, said = tmp_path / "out", tmp_path / "said"
    with out.open("wb") as stdout, said.open("wb") as stderr:
        command = [CDC, "-c", config, "tail", "-n", "1", *arguments]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
    try:
        until(lambda: out.read_bytes().count(b"\n") == 1 or process.poll() is not None, "there is a line")
        assert process.poll() is None, said.read_text()
        assert shown in out.read_bytes()
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("table", ["a.b.c", 'public."open', "a b"])
def test_a_table_nobody_can_mean_is_a_mistake_of_usage(config: Path, table: str) -> None:
    assert run(config, "tail", table).exit_code == 2


def test_without_a_schema_it_says_what_to_do(tmp_path: Path, database: str) -> None:
    path = tmp_path / "config.yaml"
    content = {
        "databases": {"shop": {"dsn": database, "tables": {"public.*": {}}}},
        "sinks": {"out": {"type": "stdout"}},
    }
    path.write_text(json.dumps(content))
    result = run(path, "tail")
    assert result.exit_code == 1
    assert "run `cdc migrate`" in result.stderr


def test_every_shell_gets_a_script_that_its_own_parser_accepts(config: Path, tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        result = run(config, "completion", shell)
        assert result.exit_code == 0
        assert "_CDC_COMPLETE" in result.stdout
    script = tmp_path / "completion.bash"
    script.write_text(run(config, "completion", "bash").stdout)
    subprocess.run(["/bin/bash", "-n", script], check=True)
