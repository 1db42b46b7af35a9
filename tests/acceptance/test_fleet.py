"""`cdc migrate` over many databases: each for itself, several at a time, and safe to interrupt."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import CDC, until
from psycopg2.extensions import connection, make_dsn
from sql import fetch, value

from cdc import inventory
from cdc.cli.migrate import AT_ONCE

if TYPE_CHECKING:
    from conftest import Server

Connect = Callable[..., connection]

PATIENCE = 120.0
UNREACHABLE = "host=127.0.0.1 port=1 dbname=shop user=cdc"


class Fleet:
    """Databases with a table orders, and a configuration that names them all, in this order.

    Attributes:
        dsns: name → how to reach it; one that is changed here counts from the next :meth:`configure` on.
        tables: name → what the configuration captures there, where it is not orders.
        daemon: the daemon's role, where it is not the one that migrates.
    """

    def __init__(self, dsns: dict[str, str], directory: Path) -> None:
        self.dsns = dsns
        self.tables: dict[str, str] = {}
        self.daemon: str | None = None
        self.config = directory / "config.yaml"
        self._directory = directory
        self.configure()

    @property
    def names(self) -> list[str]:
        return list(self.dsns)

    def configure(self) -> None:
        databases: dict[str, dict[str, Any]] = {
            name: {"dsn": dsn, "tables": {self.tables.get(name, "public.orders"): {}}}
            for name, dsn in self.dsns.items()
        }
        for database in databases.values() if self.daemon else ():
            database |= {"dsn": make_dsn(database["dsn"], user=self.daemon), "migrate_dsn": database["dsn"]}
        self.config.write_text(json.dumps({"databases": databases, "sinks": {"audit": {"type": "stdout"}}}))

    def migrate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [CDC, "-c", self.config, "migrate", *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)

    def begin(self) -> tuple[subprocess.Popen[bytes], Path]:
        """Begin to migrate; returns the process and the file its stderr goes to."""
        stderr = self._directory / "stderr"
        with stderr.open("wb") as errors:
            process = subprocess.Popen(
                [CDC, "-c", self.config, "migrate"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
            )
        return process, stderr


@pytest.fixture
def new_fleet(server: Server, tmp_path: Path, connect: Connect) -> Iterator[Callable[..., Fleet]]:
    """``new_fleet(10)``: databases cdc has never seen; with a template's name, copies of that."""
    made: list[str] = []

    def make(size: int, template: str | None = None) -> Fleet:
        prefix = f"fleet_{uuid.uuid4().hex[:8]}"
        first = server.create_database(f"{prefix}_template", template)
        made.append(f"{prefix}_template")
        session = connect(first)
        fetch(session, "create table orders (id bigint primary key, status text)")
        session.close()
        dsns = {}
        for number in range(1, size + 1):
            # Cheaper than a checkpoint for each.
            name = f"{prefix}_{number:02}"
            admin = connect(server.admin_dsn)
            strategy = "strategy wal_log" if server.version >= 150000 else ""
            fetch(admin, f"create database {name} template {prefix}_template {strategy}")
            admin.close()
            made.append(name)
            dsns[f"db_{number:02}"] = make_dsn(first, dbname=name)
        return Fleet(dsns, tmp_path)

    yield make
    for name in made:
        server.drop_database(name)


@pytest.fixture
def use(connect: Connect) -> Callable[[str], connection]:
    """``use(dsn)``: somebody in a transaction that has written to orders."""

    def begin(dsn: str) -> connection:
        session = connect(make_dsn(dsn, application_name="nightly report"), autocommit=False)
        fetch(session, "insert into orders values (1, 'new')")
        return session

    return begin


def waiting(look: connection) -> int:
    """How many migrations wait for a table's lock at this moment, in all databases together."""
    return int(
        value(
            look,
            "select count(*) from pg_locks l join pg_stat_activity a using (pid)"
            " where not l.granted and l.locktype = 'relation' and a.application_name = 'cdc migrate'",
        )
    )


def outcomes(stderr: str, names: Sequence[str]) -> dict[str, str]:
    """The table at the end, which has a line for every database in the order of the file."""
    lines = stderr.splitlines()[-len(names) :]
    found = dict(re.split("  +", line, maxsplit=1) for line in lines)
    assert list(found) == list(names)
    return found


def test_fifty_databases_three_of_which_cannot_be_migrated(
    new_fleet: Callable[..., Fleet], use: Callable[[str], connection], connect: Connect
) -> None:
    fleet = new_fleet(50)
    away, locked, lacking = "db_07", "db_19", "db_33"
    there = fleet.dsns[away]
    fleet.dsns[away] = UNREACHABLE
    session = use(fleet.dsns[locked])
    fleet.tables[lacking] = "public.invoices"
    fleet.configure()

    done = fleet.migrate()
    assert done.returncode == 1
    good = [name for name in fleet.names if name not in (away, locked, lacking)]
    assert len(good) == 47
    assert done.stdout.splitlines() == [
        f"{name}: {line}"
        for name in good
        for line in (
            f"schema cdc: revision none → {inventory.head()}",
            "public.orders: added",
            "sink audit: starts here",
        )
    ]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == [away, locked, lacking]
    assert errors[0].startswith(f"error: {away}: cannot connect: ")
    assert f"(start it or correct databases.{away}.dsn, see cdc check -d {away}; then run this again)" in errors[0]
    assert f"public.orders is in use by pid {session.info.backend_pid} (nightly report, idle in trans" in errors[1]
    assert errors[1].endswith("; nothing was changed (run `cdc migrate` again later)")
    assert errors[2] == f"error: {lacking}: public.invoices: no such table (correct `tables`, or create it first)"
    table = outcomes(done.stderr, fleet.names)
    assert [name for name, outcome in table.items() if outcome == "done"] == good
    assert {table[name] for name in (away, locked, lacking)} == {"failed, left as it was"}
    assert "50 of 50 databases" in done.stderr

    # Each of the three is mended as its line says.
    fleet.dsns[away] = there
    session.rollback()
    fetch(connect(fleet.dsns[lacking]), "create table invoices (id bigint primary key)")
    fleet.configure()
    done = fleet.migrate("--json")
    assert done.returncode == 0, done.stderr
    changes: dict[str, list[str]] = {name: [] for name in fleet.names}
    for change in json.loads(done.stdout)["changes"]:
        changes[change["database"]].append(change["change"])
    assert {name for name in good if changes[name] != ["unchanged"]} == set()
    assert all(changes[name][1:] == ["added", "starts here"] for name in (away, locked, lacking))


def test_databases_are_waited_for_together(
    new_fleet: Callable[..., Fleet], use: Callable[[str], connection], template: str, connect: Connect, server: Server
) -> None:
    fleet = new_fleet(3, template)
    sessions = [use(dsn) for dsn in fleet.dsns.values()]
    look = connect(server.admin_dsn)
    process, _ = fleet.begin()
    with process:
        until(lambda: waiting(look) == len(sessions), "all of them wait at the same time")
        for session in sessions:
            session.rollback()
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    # In the order of the file, whichever was through first.
    assert [line.split(":")[0] for line in output.decode().splitlines()][::2] == fleet.names


def test_databases_of_one_cluster_grant_one_role_its_rights_at_once(
    new_fleet: Callable[..., Fleet], template: str, connect: Connect, server: Server
) -> None:
    # Before PostgreSQL 16 all but the first of them fail, and succeed the next time.
    admin = connect(server.admin_dsn)
    fleet = new_fleet(6, template)
    fleet.daemon = f"daemon_{uuid.uuid4().hex[:8]}"
    fleet.configure()
    fetch(admin, f"create role {fleet.daemon} login")
    try:
        done = fleet.migrate()
        assert done.returncode == 0, done.stderr
        assert f"role {fleet.daemon}: granted cdc_reader" in done.stdout
        assert fleet.migrate().stdout.splitlines() == [f"{name}: public.orders: unchanged" for name in fleet.names]
    finally:
        fetch(admin, f"drop role {fleet.daemon}")


@pytest.fixture
def stuck(
    new_fleet: Callable[..., Fleet], use: Callable[[str], connection], template: str, connect: Connect, server: Server
) -> Iterator[tuple[Fleet, subprocess.Popen[bytes], Path, list[connection]]]:
    """A migration of which the first database is through, as many as there may be at once wait, and two are to come."""
    fleet = new_fleet(AT_ONCE + 3, template)
    sessions = [use(fleet.dsns[name]) for name in fleet.names[1:-2]]
    look = connect(server.admin_dsn)
    process, stderr = fleet.begin()
    with process:
        until(lambda: waiting(look) == AT_ONCE, "the rest waits")
        yield fleet, process, stderr, sessions
        process.kill()


def test_after_ctrl_c_every_database_is_done_or_as_it_was(
    stuck: tuple[Fleet, subprocess.Popen[bytes], Path, list[connection]], connect: Connect
) -> None:
    fleet, process, stderr, sessions = stuck
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    said = stderr.read_text()
    assert "interrupted: finishing what is under way; once more to leave at once" in said
    assert "Traceback" not in said
    first, *locked = fleet.names
    to_come = [locked.pop(), locked.pop()]
    table = outcomes(said, fleet.names)
    assert table[first] == "done"
    assert {table[name] for name in locked} == {"failed, left as it was"}
    assert {table[name] for name in to_come} == {"not begun"}
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {name}: interrupted while it waited for a lock; nothing was changed" for name in locked]
    assert {line.split(":")[0] for line in output.decode().splitlines()} == {first}
    captured = "select count(*) from cdc.captured"
    assert [name for name, dsn in fleet.dsns.items() if value(connect(dsn), captured)] == [first]

    for session in sessions:
        session.rollback()
    assert fleet.migrate().returncode == 0
    assert all(value(connect(dsn), captured) == 1 for dsn in fleet.dsns.values())


def test_a_second_ctrl_c_waits_for_nobody(
    stuck: tuple[Fleet, subprocess.Popen[bytes], Path, list[connection]],
) -> None:
    fleet, process, stderr, _ = stuck
    process.send_signal(signal.SIGINT)
    until(lambda: "interrupted: finishing" in stderr.read_text(), "it has heard the first")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    *_, last = stderr.read_text().splitlines()
    assert last.startswith("error: left at once: ")
    assert all(name in last for name in fleet.names[1:-2])
    assert "done, or as it was (run this again to be sure)" in last


def test_killed_in_the_middle_every_database_is_whole_or_untouched(
    new_fleet: Callable[..., Fleet], connect: Connect, server: Server
) -> None:
    fleet = new_fleet(6)
    looks = {name: connect(dsn) for name, dsn in fleet.dsns.items()}
    process, _ = fleet.begin()
    with process:
        until(
            lambda: any(value(look, "select to_regnamespace('cdc') is not null") for look in looks.values()),
            "one of them is through",
        )
        process.kill()
    sessions = "select count(*) from pg_stat_activity where application_name like 'cdc migrate%'"
    until(lambda: value(connect(server.admin_dsn), sessions) == 0, "the server has given them up")
    states = {}
    for name, look in looks.items():
        triggers = value(look, "select count(*) from pg_trigger where tgname like '00\\_cdc\\_%'")
        if value(look, "select to_regnamespace('cdc') is null"):
            states[name] = (False, triggers, 0)
        else:
            states[name] = (True, triggers, value(look, "select count(*) from cdc.sink"))
    assert set(states.values()) == {(False, 0, 0), (True, 2, 1)}
    assert fleet.migrate().returncode == 0


@pytest.mark.parametrize("piped", [True, False], ids=["stdout piped", "all of it"])
def test_on_a_terminal_a_bar_shows_how_far_it_is_and_lines_stay_whole(
    new_fleet: Callable[..., Fleet], piped: bool
) -> None:
    fleet = new_fleet(3)
    ours, theirs = pty.openpty()
    stdout = subprocess.PIPE if piped else theirs
    with subprocess.Popen([CDC, "-c", fleet.config, "migrate"], stdin=theirs, stdout=stdout, stderr=theirs) as process:
        os.close(theirs)
        shown = read_all(ours)
        output = process.stdout.read().decode() if process.stdout else ""
    assert process.returncode == 0
    assert "databases" in shown
    assert "3/3" in shown
    schema = f"schema cdc: revision none → {inventory.head()}"
    expected = [
        f"{name}: {line}"
        for name in fleet.names
        for line in (schema, "public.orders: added", "sink audit: starts here")
    ]
    if piped:
        assert output.splitlines() == expected
        assert "orders" not in shown
    else:
        # A terminal shows of each line what stands behind the last command to clear it.
        visible = [line.rpartition("\x1b[2K")[2].strip() for line in shown.split("\n")]
        assert [line for line in visible if "db_" in line] == expected


def test_in_a_pipe_there_is_no_bar(new_fleet: Callable[..., Fleet]) -> None:
    assert new_fleet(2).migrate().stderr == ""


def read_all(terminal: int) -> str:
    """What is shown on a terminal until nobody has it open any more."""
    shown = b""
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(terminal)
    return shown.decode()


def plan(fleet: Fleet) -> list[dict[str, Any]]:
    return list(json.loads(fleet.migrate("--plan", "--json").stdout)["changes"])


def test_a_fleet_can_be_planned_migrated_and_uninstalled(new_fleet: Callable[..., Fleet], connect: Connect) -> None:
    fleet = new_fleet(3)
    subjects = ["schema cdc", "public.orders", "sink audit"]
    assert [(step["database"], step["subject"]) for step in plan(fleet)] == [
        (name, subject) for name in fleet.names for subject in subjects
    ]
    assert fleet.migrate().returncode == 0
    assert plan(fleet) == []
    command = [CDC, "-c", fleet.config, "uninstall", "--yes"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert not any(value(connect(dsn), "select to_regnamespace('cdc') is not null") for dsn in fleet.dsns.values())
