"""The installed command as scripts and systemd see it: exit codes, one clear line for each failure, no secrets.

0 ok · 1 failure · 2 usage · 69 a database cannot be reached · 78 configuration error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from psycopg2.extensions import connection, cursor, make_dsn

from cdc import embedded, installer
from cdc.config import DatabaseConfig

if TYPE_CHECKING:
    from conftest import Server

PATIENCE = 30.0
SOON = 15.0
"""Seconds within which a command has to say that a database cannot be reached."""
CANARY = "canary-7f3a"
"""A password; no output of any command may hold it."""
UNREACHABLE = f"postgresql://cdc:{CANARY}@127.0.0.1:1/shop"
PROGRAM = str(Path(sys.executable).with_name("cdc"))
ORDERS = {"public.orders": {}}


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float = 0.0

    @property
    def lines(self) -> list[str]:
        return self.stderr.splitlines()


def run(*arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Outcome:
    """Run the installed command; whatever it is and says, it keeps the password to itself and shows no traceback."""
    began = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "CDC_CONFIG"} | dict(env or {})
    done = subprocess.run(
        [PROGRAM, *arguments],
        check=False,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr, time.monotonic() - began)
    refuse_canary(outcome.stdout, outcome.stderr)
    return outcome


def refuse_canary(*outputs: str) -> None:
    for output in outputs:
        assert CANARY not in output
        assert "Traceback" not in output


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


@dataclass
class Shop:
    """A database with a table orders, and a configuration that names it shop and has a password in it.

    Attributes:
        look: a superuser's cursor, in autocommit.
    """

    dsn: str
    look: cursor
    directory: Path
    database: dict[str, Any] = field(default_factory=dict)
    sink: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.database = {"dsn": make_dsn(self.dsn, password=CANARY), "tables": ORDERS}
        self.sink = {"type": "file", "path": str(self.out)}

    @property
    def out(self) -> Path:
        return self.directory / "out.jsonl"

    @property
    def config(self) -> Path:
        return self.write({"databases": {"shop": self.database}, "sinks": {"audit": self.sink}})

    def write(self, config: object) -> Path:
        path = self.directory / "config.yaml"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return path

    def run(self, *arguments: str) -> Outcome:
        return run("-c", str(self.config), *arguments)

    def keys(self) -> list[int]:
        """The keys of the orders delivered so far, in order; a line not yet whole does not count."""
        text = self.out.read_text() if self.out.exists() else ""
        return [json.loads(line)["key"]["id"] for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def insert(self, *ids: int) -> None:
        for id_ in ids:
            self.look.execute("insert into orders values (%s, 'new')", (id_,))

    def one(self, query: str) -> Any:
        self.look.execute(query)
        row = self.look.fetchone()
        assert row is not None
        return row[0]


@pytest.fixture
def fresh(database: str, connect: Callable[..., connection], tmp_path: Path) -> Shop:
    """Not migrated."""
    look = connect(database).cursor()
    look.execute("create table orders (id bigint primary key, status text)")
    return Shop(database, look, tmp_path)


@pytest.fixture
def shop(installed: str, connect: Callable[..., connection], tmp_path: Path) -> Shop:
    """Migrated, orders captured."""
    look = connect(installed).cursor()
    look.execute("create table orders (id bigint primary key, status text)")
    options = DatabaseConfig.model_validate({"dsn": installed, "tables": ORDERS})
    installer.migrate("shop", options, dsn=installed, reader_dsn=installed, sinks={"audit": "now"})
    return Shop(installed, look, tmp_path)


@pytest.fixture
def role(server: Server, connect: Callable[..., connection]) -> Iterator[str]:
    """A role that may log in and nothing else."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    admin = connect(server.admin_dsn).cursor()
    admin.execute(f"create role {name} login password '{CANARY}'")
    yield name
    admin.execute(f"drop role {name}")


# -- 78: configuration ------------------------------------------------------------------------------------------

WRONG = f"""
databases:
  shop:
    dsn: postgresql://cdc:{CANARY}@db1:port/shop
    tabels: {{public.orders: {{}}}}
    retention: 24
sinks:
  audit:
    type: file
    path: ./out/{{tabel}}.jsonl
    databases: [shop, attic]
  other: {{type: pigeon}}
"""


@pytest.mark.parametrize("command", [["check"], ["migrate"], ["run"]], ids=" ".join)
def test_a_wrong_configuration_is_78_and_every_finding_a_line(fresh: Shop, command: list[str]) -> None:
    path = fresh.write(WRONG)
    outcome = run("-c", str(path), *command)
    assert outcome.code == 78
    assert outcome.stdout == ""
    places = [
        "databases.shop.dsn",
        "databases.shop.tabels",
        "databases.shop.tables",
        "databases.shop.retention",
        "sinks.audit.path",
        "sinks.audit.databases",
        "sinks.other.type",
    ]
    found = [line.removeprefix(f"error: {path}: ").partition(": ")[0].partition("[")[0] for line in outcome.lines]
    assert sorted(found) == sorted(places), outcome.stderr


@pytest.mark.parametrize(
    "content",
    [
        f"databases: {{shop: {{dsn: 'postgresql://cdc:{CANARY}@[db', tables: {{public.orders: }}}}}}\n"
        "sinks: {o: {type: stdout}}",
        "databases: {shop: {dsn: '${NOT_SET_ANYWHERE}', tables: {public.orders: {}}}}\nsinks: {o: {type: stdout}}",
    ],
    ids=["a broken url", "an unset variable"],
)
def test_a_file_that_is_no_configuration_is_78(fresh: Shop, content: str) -> None:
    path = fresh.write(content)
    outcome = run("-c", str(path), "run")
    assert outcome.code == 78
    assert outcome.lines
    assert all(line.startswith(f"error: {path}") for line in outcome.lines), outcome.stderr


def test_a_missing_configuration_file_is_78_however_it_was_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.yaml")
    for outcome in (run("-c", missing, "migrate"), run("run", env={"CDC_CONFIG": missing})):
        assert outcome.code == 78
        (line,) = outcome.lines
        assert missing in line
    if not Path("/etc/cdc/config.yaml").exists():
        outcome = run("run", cwd=tmp_path)
        assert outcome.code == 78
        (line,) = outcome.lines
        assert "config.yaml" in line


def test_a_database_the_configuration_does_not_know_is_78(fresh: Shop) -> None:
    outcome = fresh.run("migrate", "-d", "attic")
    assert (outcome.code, outcome.lines) == (78, ["error: no database attic in the configuration (known: shop)"])


# -- 2: usage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["run", "--wrong"], ["walk"], ["--log-level", "loud", "run"]],
    ids=" ".join,
)
def test_a_wrong_command_line_is_2(arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert "Usage: cdc" in outcome.stderr


def test_help_is_to_be_had_without_a_configuration(tmp_path: Path) -> None:
    outcome = run("run", "--help", cwd=tmp_path)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "--until-idle" in outcome.stdout


# -- 69: a database cannot be reached ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "command"),
    [
        ("127.0.0.1", ["run"]),
        ("127.0.0.1", ["run", "--until-idle"]),
        ("127.0.0.1", ["check"]),
        ("nowhere.invalid", ["run"]),
        ("127.0.0.1", ["rebase"]),
        ("127.0.0.1", ["sinks", "forget", "former"]),
    ],
    ids=str,
)
def test_an_unreachable_database_is_69(fresh: Shop, host: str, command: list[str]) -> None:
    fresh.database["dsn"] = UNREACHABLE.replace("127.0.0.1", host)
    outcome = fresh.run(*command)
    assert outcome.code == 69
    assert outcome.seconds < SOON
    if command[0] != "check":
        (line,) = outcome.lines
        assert line.startswith("error: shop: cannot connect: ")


def test_a_database_that_does_not_answer_is_69(fresh: Shop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor() as pool:
        fresh.database["dsn"] = UNREACHABLE.replace(":1/", f":{silent.getsockname()[1]}/")
        path = str(fresh.config)
        waiting = [pool.submit(run, "-c", path, "run", *options) for options in ([], ["--until-idle"])]
        outcomes = [future.result() for future in waiting]
    for outcome in outcomes:
        assert (outcome.code, outcome.lines) == (69, ["error: shop: cannot connect: no answer in time"])
        assert outcome.seconds < SOON


def test_a_refused_login_is_69_and_the_reason_the_server_s(fresh: Shop) -> None:
    fresh.database["dsn"] = make_dsn(fresh.dsn, user="nobody_of_this_name", password=CANARY)
    outcome = fresh.run("run")
    assert outcome.code == 69
    (line,) = outcome.lines
    assert 'role "nobody_of_this_name" does not exist' in line or "authentication failed" in line


def test_until_idle_cannot_do_with_half_of_the_databases(shop: Shop) -> None:
    away = {"dsn": UNREACHABLE, "tables": ORDERS}
    path = shop.write({"databases": {"shop": shop.database, "away": away}, "sinks": {"audit": shop.sink}})
    outcome = run("-c", str(path), "run", "--until-idle")
    assert outcome.code == 69
    (line,) = outcome.lines
    assert line.startswith("error: away: cannot connect: ")


# -- 1: failure -------------------------------------------------------------------------------------------------


def test_migrating_an_unreachable_database_is_1(fresh: Shop) -> None:
    fresh.database["dsn"] = UNREACHABLE
    for command in (["migrate"], ["run", "--migrate"]):
        outcome = fresh.run(*command)
        assert (outcome.code, outcome.stdout) == (1, "")
        (line,) = outcome.lines
        assert line.startswith("error: shop: cannot connect: ")


@pytest.mark.parametrize("command", [["run"], ["run", "--until-idle"]], ids=" ".join)
def test_running_without_having_migrated_is_1_and_says_to_migrate(fresh: Shop, command: list[str]) -> None:
    outcome = fresh.run(*command)
    assert outcome.code == 1
    assert outcome.lines == ["error: shop: cdc is not installed in this database (run `cdc migrate`)"]


def test_a_schema_of_another_revision_is_1_and_says_to_migrate(shop: Shop) -> None:
    shop.look.execute("update cdc.alembic_version set version_num = '0000'")
    outcome = shop.run("run")
    assert outcome.code == 1
    (line,) = outcome.lines
    assert line.startswith("error: shop: schema cdc is at revision 0000, this program needs ")
    assert line.endswith(" (run `cdc migrate`)")


def test_a_schema_of_a_revision_unknown_here_is_1_and_left_alone(shop: Shop) -> None:
    shop.look.execute("update cdc.alembic_version set version_num = '9999'")
    outcome = shop.run("migrate")
    assert (outcome.code, outcome.stdout) == (1, "")
    (line,) = outcome.lines
    assert line.startswith("error: shop: ")
    assert "9999" in line
    assert shop.one("select version_num from cdc.alembic_version") == "9999"


def test_a_daemon_without_privileges_is_1_with_one_line(shop: Shop, role: str) -> None:
    shop.database["dsn"] = make_dsn(shop.dsn, user=role, password=CANARY)
    outcome = shop.run("run")
    assert outcome.code == 1
    (line,) = outcome.lines
    assert line.startswith("error: shop: permission denied for ")


def test_a_migration_without_privileges_is_1_with_one_line_and_nothing_half_done(fresh: Shop, role: str) -> None:
    fresh.database["dsn"] = make_dsn(fresh.dsn, user=role, password=CANARY)
    outcome = fresh.run("migrate")
    assert (outcome.code, outcome.stdout) == (1, "")
    (line,) = outcome.lines
    assert line.startswith("error: shop: permission denied for database ")
    assert "migrate_dsn" in line
    assert fresh.one("select to_regnamespace('cdc')") is None


@pytest.mark.parametrize("command", [["migrate"], ["run", "--migrate"]], ids=" ".join)
def test_a_missing_table_is_1_with_one_line_and_nothing_half_done(fresh: Shop, command: list[str]) -> None:
    fresh.database["tables"] = {**ORDERS, "public.nothing": {}, "public.nowhere": {}}
    outcome = fresh.run(*command)
    assert (outcome.code, outcome.stdout) == (1, "")
    assert outcome.lines == [
        "error: shop: public.nothing: no such table; public.nowhere: no such table "
        "(correct `tables`, or create it first)"
    ]
    assert fresh.one("select to_regnamespace('cdc')") is None
    assert fresh.one("select count(*) from pg_trigger where not tgisinternal") == 0


def test_a_sink_that_has_stopped_for_good_is_1(shop: Shop) -> None:
    too_long = shop.directory / ("x" * 300 + "{table}")
    shop.sink = {"type": "file", "path": str(too_long), "on_permanent_failure": "stop"}
    shop.insert(1)
    outcome = shop.run("run", "--until-idle")
    assert outcome.code == 1
    assert outcome.lines[-1].startswith("error: shop/audit: ")
    assert "can never be delivered: cannot write" in outcome.lines[-1]


# -- a standby --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standby(server: Server) -> Iterator[str]:
    """The dsn of a hot standby of the session's server, in the database postgres."""
    if server.embedded is None:
        pytest.skip("a standby is made of the embedded server only")
    directory = Path(tempfile.mkdtemp(prefix="cdc-standby-")).resolve()
    account = embedded._service_account(Path("/nonexistent"))
    data = directory / "data"
    try:
        directory.chmod(0o711)
        (directory / "start.lock").touch(0o600)
        data.mkdir(0o700)
        embedded._give(data, account)
        program = str(server.embedded.bindir / "pg_basebackup")
        command = [program, "-D", "data", "-R", "-c", "fast", "-d", server.admin_dsn]
        code, output = embedded._call(command, directory, account, timeout=PATIENCE)
        assert code == 0, output
        with embedded.start(directory, settings={"fsync": "off", "shared_buffers": "32MB"}) as running:
            yield running.dsn()
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize("command", [["run"], ["run", "--until-idle"], ["migrate"], ["check"]], ids=" ".join)
def test_a_standby_is_1_and_the_line_says_so(fresh: Shop, standby: str, command: list[str]) -> None:
    fresh.database["dsn"] = make_dsn(standby, password=CANARY)
    outcome = fresh.run(*command)
    assert outcome.code == 1
    text = outcome.stdout if command == ["check"] else outcome.stderr
    (line,) = [line for line in text.splitlines() if "is a standby" in line]
    assert "shop: the server is a standby" in line
    assert "primary" in line


def test_a_dsn_that_asks_for_the_primary_leaves_a_standby_out(fresh: Shop, standby: str) -> None:
    fresh.database["dsn"] = make_dsn(standby, password=CANARY, target_session_attrs="read-write")
    outcome = fresh.run("run")
    assert outcome.code == 69
    assert len(outcome.lines) == 1


# -- 0: running and stopping ------------------------------------------------------------------------------------


@dataclass
class Daemon:
    """A ``cdc run`` in the background."""

    process: subprocess.Popen[bytes]
    log: Path

    def says(self, sentence: str) -> bool:
        return sentence in self.log.read_text()

    def wait_until(self, sentence: str) -> None:
        wait_for(lambda: self.says(sentence) or self.process.poll() is not None)
        assert self.says(sentence), self.log.read_text()

    def has_open(self, path: Path) -> bool:
        """Whether it has opened a file: the sink does when it is handed its first batch."""
        return str(path) in {file.path for file in psutil.Process(self.process.pid).open_files()}

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        return self.process.wait(PATIENCE)


@contextlib.contextmanager
def running(shop: Shop, *options: str) -> Iterator[Daemon]:
    log = shop.directory / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([PROGRAM, "-c", str(shop.config), "run", *options], stdout=stderr, stderr=stderr)
    try:
        yield Daemon(process, log)
    finally:
        process.kill()
        process.wait()
        refuse_canary(log.read_text())


@contextlib.contextmanager
def stuck(shop: Shop) -> Iterator[Callable[[], None]]:
    """While this is entered, or until the function it gives is called, the file sink waits for its file."""
    descriptor = os.open(shop.out, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield lambda: fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: signal.Signals(number).name)
def test_an_idle_daemon_that_is_told_to_stop_exits_0(shop: Shop, number: int) -> None:
    with running(shop) as daemon:
        daemon.wait_until("Serving.")
        shop.insert(1)
        wait_for(lambda: shop.keys() == [1])
        daemon.signal(number)
        assert daemon.end() == 0
    assert shop.run("run", "--until-idle").code == 0
    assert shop.keys() == [1]


def test_the_first_signal_lets_the_batch_in_hand_be_delivered_and_acknowledged(shop: Shop) -> None:
    with stuck(shop) as release, running(shop) as daemon:
        daemon.wait_until("Serving.")
        shop.insert(1)
        wait_for(lambda: daemon.has_open(shop.out))
        daemon.signal(signal.SIGTERM)
        daemon.wait_until("Draining")
        shop.insert(2)  # too late for this daemon
        assert daemon.process.poll() is None
        release()
        assert daemon.end() == 0
    assert shop.keys() == [1]
    assert shop.one("select last_seq = (select min(seq) from cdc.event) from cdc.position")
    assert shop.run("run", "--until-idle").code == 0
    assert shop.keys() == [1, 2]


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [(signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGTERM, signal.SIGINT, 130)],
    ids=["TERM TERM", "TERM INT"],
)
def test_the_second_signal_ends_at_once_and_what_was_in_hand_comes_again(
    shop: Shop, first: int, second: int, code: int
) -> None:
    with stuck(shop), running(shop) as daemon:
        daemon.wait_until("Serving.")
        shop.insert(1)
        wait_for(lambda: daemon.has_open(shop.out))
        daemon.signal(first)
        daemon.wait_until("Draining")
        daemon.signal(second)
        assert daemon.end() == code
        assert daemon.says("second signal")
    assert shop.keys() == []
    assert shop.run("run", "--until-idle").code == 0
    assert shop.keys() == [1]


def test_until_idle_with_nothing_to_do_exits_0(shop: Shop) -> None:
    outcome = shop.run("run", "--until-idle")
    assert (outcome.code, outcome.stdout) == (0, "")
    assert shop.keys() == []


def test_until_idle_ends_although_a_writer_goes_on(shop: Shop, connect: Callable[..., connection]) -> None:
    committed = 0
    enough = threading.Event()
    session = connect(shop.dsn)

    def write() -> None:
        nonlocal committed
        with session.cursor() as busy:
            while not enough.is_set():
                busy.execute("insert into orders values (%s, 'new')", (committed + 1,))
                committed += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        wait_for(lambda: committed >= 300)
        before = committed
        outcome = shop.run("run", "--until-idle")
        assert writer.is_alive()
    finally:
        enough.set()
        writer.join()
    assert outcome.code == 0
    assert before < committed
    keys = shop.keys()
    assert keys == list(range(1, len(keys) + 1))
    assert len(keys) >= before
    # And the next one takes up where this one stopped.
    assert shop.run("run", "--until-idle").code == 0
    assert shop.keys() == list(range(1, committed + 1))


def test_until_idle_does_not_wait_for_a_transaction_that_is_still_open(
    shop: Shop, connect: Callable[..., connection]
) -> None:
    session = connect(shop.dsn, autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("insert into orders values (1, 'new')")
    shop.insert(2)
    assert shop.run("run", "--until-idle").code == 0
    assert shop.keys() == [2]
    session.commit()
    assert shop.run("run", "--until-idle").code == 0
    assert shop.keys() == [2, 1]


def test_run_migrate_is_all_in_one(fresh: Shop) -> None:
    outcome = fresh.run("run", "--migrate", "--until-idle")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout == ""
    assert "shop: public.orders: added" in outcome.lines
    fresh.insert(1)
    assert fresh.run("run", "--migrate", "--until-idle").code == 0
    assert fresh.keys() == [1]


def test_on_stdout_there_is_nothing_but_events(fresh: Shop) -> None:
    fresh.sink = {"type": "stdout"}
    assert fresh.run("migrate").code == 0
    fresh.insert(1, 2)
    outcome = fresh.run("run", "--migrate", "--until-idle")
    assert outcome.code == 0
    assert [json.loads(line)["key"]["id"] for line in outcome.stdout.splitlines()] == [1, 2]


def test_secrets_are_in_no_output_even_at_the_most_talkative(shop: Shop) -> None:
    shop.insert(1)
    for format_, command in (
        ("text", ["check"]),
        ("text", ["status"]),
        ("text", ["migrate"]),
        ("json", ["migrate", "--json"]),
        ("json", ["run", "--until-idle"]),
    ):
        run("--log-level", "debug", "--log-format", format_, "-c", str(shop.config), *command)
    assert CANARY not in shop.out.read_text()
