"""Sessions: nothing hangs, nobody slow is taken for dead, and what others set or put in between does not matter."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from psycopg2 import sql
from psycopg2.extensions import connection as psycopg2_connection
from psycopg2.extensions import make_dsn, parse_dsn

from cdc import connection
from cdc.connection import Connection
from cdc.embedded import start
from cdc.errors import DatabaseError, DatabaseUnreachable, NotInstalled, NotPrimary, TooSlow

if TYPE_CHECKING:
    from conftest import Server

CANARY = "hunter2"
PATIENCE = 10.0
SOON = 8.0
"""Seconds of slack a busy machine gets on top of a deadline."""
CLOSED_PORT = "1"

Connect = Callable[..., psycopg2_connection]


class Relay:
    """A TCP port of this host that leads to a server, and can be made slow or silent.

    Attributes:
        rate: bytes a second the server's answers may have; None: any.
        cut: set: nothing passes any more, and nobody is told.
    """

    def __init__(self, dsn: str, address: str = "127.0.0.1") -> None:
        self.rate: float | None = None
        self.cut = threading.Event()
        self._dsn = parse_dsn(dsn)
        self._listening = socket.create_server((address, 0))
        self._sockets = [self._listening]
        self.port = str(self._listening.getsockname()[1])
        self.dsn = make_dsn(dsn, host=address, port=self.port)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.cut.set()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = self._server()
                self._sockets += [client, server]
                threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _server(self) -> socket.socket:
        host, port = self._dsn.get("host", "/var/run/postgresql"), self._dsn.get("port", "5432")
        if not host.startswith("/"):
            return socket.create_connection((host, int(port)))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{host}/.s.PGSQL.{port}")
        return server

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                while data and not self.cut.is_set():
                    rate = self.rate if answers else None
                    piece = data[: max(1, int(rate * 0.05))] if rate else data
                    target.sendall(piece)
                    data = data[len(piece) :]
                    if rate:
                        self.cut.wait(len(piece) / rate)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def dsn(server: Server) -> Iterator[str]:
    """The dsn of a database for the tests that leave nothing behind."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield server.create_database(name)
    server.drop_database(name)


@pytest.fixture
def relay(dsn: str) -> Iterator[Relay]:
    """A relay to that database."""
    relay = Relay(dsn)
    yield relay
    relay.close()


@pytest.fixture
def session() -> Iterator[Callable[..., Connection]]:
    """``session(dsn, …)`` opens one of ours, which is closed after the test."""
    opened: list[Connection] = []

    def open_session(dsn: str, **options: Any) -> Connection:
        opened.append(Connection(dsn, purpose="test", **options))
        return opened[-1]

    yield open_session
    for each in opened:
        each.close()


Session = Callable[..., Connection]


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def setting(conn: Connection, name: str) -> str:
    return str(conn.query("select current_setting(%s)", (name,))[0][0])


def one_line(error: BaseException) -> str:
    """An error's text, in which nothing secret is."""
    assert CANARY not in "".join(traceback.format_exception(error))
    assert "\n" not in str(error)
    return str(error)


@contextlib.contextmanager
def cut_soon(relay: Relay) -> Iterator[None]:
    """Cut the wire a little after the block has begun."""
    timer = threading.Timer(0.1, relay.cut.set)
    timer.start()
    yield
    timer.join()


@pytest.fixture
def freeze() -> Iterator[Callable[[Connection], None]]:
    """``freeze(session)`` stops the session's server process until the end of the test."""
    frozen: list[int] = []

    def stop(conn: Connection) -> None:
        name = conn.raw.info.dbname
        try:
            if name not in Path(f"/proc/{conn.pid}/cmdline").read_text():
                pytest.skip("the server runs on another machine")
            os.kill(conn.pid, signal.SIGSTOP)
        except (FileNotFoundError, PermissionError):
            pytest.skip("the server's processes are not ours to stop")
        frozen.append(conn.pid)

    yield stop
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)


# -- deadlines --------------------------------------------------------------------------------------------------


def test_by_default_everything_is_given_up_within_ten_seconds_and_the_server_gives_up_first(
    dsn: str, session: Session
) -> None:
    assert max(connection.CONNECT_DEADLINE, connection.QUERY_DEADLINE) < 10
    assert setting(session(dsn), "statement_timeout") == "7s"
    assert setting(session(dsn, deadline=5.0), "statement_timeout") == "3s"


@pytest.mark.parametrize("size", [10, 30_000_000], ids=["small question", "larger than any buffer"])
def test_a_frozen_server_process_is_given_up(
    dsn: str, session: Session, freeze: Callable[[Connection], None], size: int
) -> None:
    conn = session(dsn, deadline=0.5)
    freeze(conn)
    with within(0.5 + SOON), pytest.raises(DatabaseUnreachable, match=r"^connection lost: no answer in time$"):
        conn.query("select length(%s)", ("x" * size,))
    assert conn.raw.closed
    with within(SOON):
        conn.close()


def test_a_half_open_connection_is_given_up(relay: Relay, session: Session) -> None:
    conn = session(relay.dsn, deadline=0.5)
    relay.cut.set()
    with within(0.5 + SOON), pytest.raises(DatabaseUnreachable, match="no answer in time"):
        conn.query("select 1")


def test_a_session_that_was_given_up_stays_lost(relay: Relay, session: Session) -> None:
    conn = session(relay.dsn, deadline=0.2)
    relay.cut.set()
    for _ in range(2):
        with pytest.raises(DatabaseUnreachable):
            conn.query("select 1")
    with pytest.raises(DatabaseUnreachable):
        conn.notifications()


def test_a_server_that_is_slow_but_lives_is_too_slow_and_the_session_goes_on(dsn: str, session: Session) -> None:
    conn = session(dsn, deadline=0.5)
    for _ in range(2):
        with pytest.raises(TooSlow, match=r"^canceling statement due to statement timeout$"):
            conn.query("select pg_sleep(60)")
        assert conn.query("select pg_backend_pid()") == [(conn.pid,)]


def test_who_waits_for_a_lock_is_too_slow_and_not_lost(dsn: str, session: Session, connect: Connect) -> None:
    with connect(dsn).cursor() as cursor:
        cursor.execute("select pg_advisory_lock(1)")
    conn = session(dsn, deadline=0.5)
    with pytest.raises(TooSlow):
        conn.query("select pg_advisory_lock(1)")
    assert conn.query("select 1") == [(1,)]


def test_a_query_an_administrator_cancels_is_worth_doing_again(dsn: str, session: Session, connect: Connect) -> None:
    conn = session(dsn)
    with connect(dsn).cursor() as cursor, ThreadPoolExecutor(1) as pool:
        sleeping = pool.submit(conn.query, "select pg_sleep(60)")

        def cancelled() -> bool:
            active = "pid = %s and state = 'active'"
            cursor.execute(f"select pg_cancel_backend(pid) from pg_stat_activity where {active}", (conn.pid,))
            return sleeping.done()

        until(cancelled)
        with pytest.raises(TooSlow, match="user request"):
            sleeping.result()
    assert conn.query("select 1") == [(1,)]


def test_the_server_is_told_of_each_call_s_deadline_which_ends_with_the_call(dsn: str, session: Session) -> None:
    conn = session(dsn, deadline=0.5)
    assert conn.query("select current_setting('statement_timeout') from pg_sleep(0.7)", deadline=60.0) == [("58s",)]
    assert setting(conn, "statement_timeout") == "250ms"
    for deadline in (0.8, 0.2):
        with within(deadline + SOON), pytest.raises(TooSlow):
            conn.query("select pg_sleep(60)", deadline=deadline)
    with pytest.raises(DatabaseError, match="division by zero") as raised:
        conn.query("select 1/0", deadline=60.0)
    assert raised.value.sqlstate == "22012"
    assert setting(conn, "statement_timeout") == "250ms"
    with conn.raw.cursor() as cursor:
        cursor.execute("show statement_timeout")
        assert cursor.fetchone() == ("0",)


def test_a_longer_deadline_gives_up_a_session_too(relay: Relay, session: Session) -> None:
    conn = session(relay.dsn, deadline=0.1)
    with cut_soon(relay), within(0.6 + SOON), pytest.raises(DatabaseUnreachable, match="no answer in time"):
        conn.query("select pg_sleep(60)", deadline=0.6)


def test_a_page_too_large_for_a_slow_line_arrives_with_more_time(relay: Relay, session: Session) -> None:
    # Larger than what the wire itself can hold: 20 MB.
    page = "select repeat('x', 10000) from generate_series(1, 2000)"
    relay.rate = 12_000_000
    with pytest.raises((TooSlow, DatabaseUnreachable)):
        session(relay.dsn, deadline=1.0).query(page)
    assert len(session(relay.dsn, deadline=1.0).query(page, deadline=60.0)) == 2000


def test_an_answer_in_drops_is_given_up_in_the_end(relay: Relay, session: Session) -> None:
    conn = session(relay.dsn)
    relay.rate = 20
    with within(0.3 + SOON), pytest.raises(DatabaseUnreachable, match="no answer in time"):
        conn.query("select repeat('x', 1000)", deadline=0.3)


def test_work_that_is_allowed_longer_is_ended_by_neither_side(dsn: str, session: Session) -> None:
    conn = session(dsn, deadline=0.2)
    conn.raw.autocommit = False
    conn.allow(60.0)
    with conn.raw.cursor() as cursor:
        cursor.execute("select pg_sleep(0.5)")
        conn.raw.rollback()
        cursor.execute("select pg_sleep(0.5), current_setting('statement_timeout')")
        assert cursor.fetchone() == ("", "0")
    conn.raw.rollback()
    assert not conn.raw.autocommit


# -- what others have set ---------------------------------------------------------------------------------------

HOSTILE = {
    "statement_timeout": ("2s", "7s"),
    "lock_timeout": ("1ms", "0"),
    "transaction_timeout": ("2s", "0"),
    "idle_in_transaction_session_timeout": ("1ms", "0"),
    "idle_session_timeout": ("2s", "0"),
    "default_transaction_read_only": ("on", "off"),
    "default_transaction_isolation": ("serializable", "read committed"),
    "default_transaction_deferrable": ("on", "off"),
    "synchronous_commit": ("off", "on"),
    "timezone": ("Asia/Kolkata", "UTC"),
    "datestyle": ("German, DMY", "ISO, DMY"),
    "jit": ("on", "off"),
}
"""What a role may carry, and what is to become of it."""


@pytest.mark.parametrize("whose", ["alter database {database}", "alter role current_user in database {database}"])
def test_what_a_role_or_a_database_carries_does_not_matter(
    server: Server, database: str, session: Session, connect: Connect, whose: str
) -> None:
    settings = {n: v for n, v in HOSTILE.items() if n != "transaction_timeout" or server.version >= 170000}
    with connect(database).cursor() as cursor:
        alter = sql.SQL(whose + " set {name} = {value}")  # fmt: skip
        for name, (value, _) in settings.items():
            cursor.execute(
                alter.format(
                    database=sql.Identifier(parse_dsn(database)["dbname"]),
                    name=sql.Identifier(name),
                    value=sql.SQL(value) if name == "datestyle" else sql.Literal(value),
                )
            )
    with contextlib.closing(connect(database)) as other, other.cursor() as cursor:
        cursor.execute("show jit")
        assert cursor.fetchone() == ("on",)
    conn = session(database)
    assert {name: setting(conn, name) for name in settings} == {name: wanted for name, (_, wanted) in settings.items()}
    assert conn.query("show transaction_isolation") == [("read committed",)]
    conn.execute("create table public.written (at timestamptz); insert into public.written values (now())")
    assert conn.query("select at from public.written")[0][0].tzinfo is not None


def test_a_position_is_on_disk_once_committed(database: str, session: Session, connect: Connect) -> None:
    wanted = {"off": "on", "local": "on", "remote_write": "on", "on": "on", "remote_apply": "remote_apply"}
    name = sql.Identifier(parse_dsn(database)["dbname"])
    with connect(database).cursor() as cursor:
        for theirs, ours in wanted.items():
            cursor.execute(sql.SQL("alter database {} set synchronous_commit = {}").format(name, sql.Literal(theirs)))
            assert setting(session(database), "synchronous_commit") == ours


def test_the_server_is_told_to_end_a_session_that_nobody_reads(dsn: str, session: Session) -> None:
    conn = session(dsn)
    # On a unix socket the tcp_ settings are taken and show 0; whoever vanishes there takes the socket along.
    wanted = ("0", "0", "0", "0") if conn.raw.info.host.startswith("/") else ("5", "5", "3", "20000")
    names = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout")
    assert tuple(setting(conn, name) for name in names) == wanted
    assert setting(conn, "client_connection_check_interval") == "5s"


@pytest.mark.parametrize(("theirs", "idle"), [({}, 5), ({"keepalives_idle": "77"}, 77)], ids=["ours", "the dsn's"])
def test_our_side_notices_a_vanished_server_unless_the_dsn_knows_better(
    relay: Relay, session: Session, theirs: dict[str, str], idle: int
) -> None:
    conn = session(make_dsn(relay.dsn, **theirs))
    with socket.socket(fileno=os.dup(conn.fileno())) as wire:
        assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == idle
        assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000


# -- several hosts ----------------------------------------------------------------------------------------------


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting has a second in all."""
    monkeypatch.setattr(connection, "CONNECT_DEADLINE", 1.0)
    monkeypatch.setattr(connection, "HOST_DEADLINE", 0.5)


@pytest.fixture
def silent() -> Iterator[str]:
    """A port where everybody is accepted and nobody answered."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield str(listening.getsockname()[1])


@pytest.fixture
def vanished() -> Iterator[str]:
    """A port that does not react at all, like that of a host without power."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, socket.socket() as first:
        first.connect(listening.getsockname())
        yield str(listening.getsockname()[1])


@pytest.fixture
def refusing() -> str:
    return CLOSED_PORT


@pytest.mark.parametrize("first", ["refusing", "silent", "vanished"])
@pytest.mark.usefixtures("hurried")
def test_a_host_that_does_not_serve_is_passed_over(
    relay: Relay, session: Session, request: pytest.FixtureRequest, first: str
) -> None:
    port = request.getfixturevalue(first)
    conn = session(make_dsn(relay.dsn, host="127.0.0.1,127.0.0.1", port=f"{port},{relay.port}"))
    assert conn.query("select 1") == [(1,)]


@pytest.mark.usefixtures("hurried")
def test_when_no_host_serves_the_error_names_each_and_why(silent: str) -> None:
    dsn = f"postgresql://cdc:{CANARY}@127.0.0.1:{silent},localhost:{CLOSED_PORT},nowhere.invalid,127.0.0.1:1/shop"
    with within(4 * 0.5 + SOON), pytest.raises(DatabaseUnreachable) as caught:
        Connection(dsn, purpose="test")
    reasons = one_line(caught.value).removeprefix("cannot connect: ").split("; ")
    assert reasons[0] == f"127.0.0.1:{silent}: no answer in time"
    assert reasons[1] == f"localhost:{CLOSED_PORT}: Connection refused"
    assert reasons[2].startswith('nowhere.invalid: could not translate host name "nowhere.invalid" to address: ')
    assert reasons[3] == "127.0.0.1:1: Connection refused"


@pytest.mark.usefixtures("hurried")
def test_a_single_host_that_does_not_answer_is_told_as_such(silent: str) -> None:
    with within(1.0 + SOON), pytest.raises(DatabaseUnreachable) as caught:
        Connection(f"host=127.0.0.1 port={silent} password={CANARY}", purpose="test")
    assert one_line(caught.value) == "cannot connect: no answer in time"


def test_sockets_and_addresses_are_hosts_too(dsn: str, relay: Relay, session: Session) -> None:
    nowhere = {"host": "/nonexistent,elsewhere.invalid", "hostaddr": f",{socket.gethostbyname('127.0.0.1')}"}
    conn = session(make_dsn(relay.dsn, **nowhere))
    assert conn.raw.info.host == "elsewhere.invalid"
    assert session(make_dsn(dsn, connect_timeout="3")).query("select 1") == [(1,)]


def test_lists_that_do_not_pair_are_refused_in_libpq_s_words() -> None:
    with pytest.raises(DatabaseUnreachable, match="could not match 3 port numbers to 2 hosts"):
        Connection("host=a,b port=1,2,3", purpose="test")


@pytest.mark.usefixtures("hurried")
def test_every_address_of_a_name_is_tried(relay: Relay, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def getaddrinfo(name: str, *arguments: Any, **options: Any) -> list[Any]:
        numbers = ["127.0.0.2", "127.0.0.1"] if name == "db.example" else [name]
        return [found for number in numbers for found in look_up(number, *arguments, **options)]

    with socket.create_server(("127.0.0.2", int(relay.port))):
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        conn = session(make_dsn(relay.dsn, host="db.example"))
    assert conn.query("select 1") == [(1,)]
    # The name, and not the address, is what certificates and ~/.pgpass are about.
    assert conn.raw.info.host == "db.example"
    with pytest.raises(DatabaseUnreachable) as caught:
        session(make_dsn(relay.dsn, host="db.example", port=CLOSED_PORT))
    assert str(caught.value) == "cannot connect: Connection refused"


@pytest.mark.usefixtures("hurried")
def test_a_resolver_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def getaddrinfo(*_: object, **__: object) -> list[object]:
        answer.wait(PATIENCE)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    try:
        with within(1.0 + SOON), pytest.raises(DatabaseUnreachable) as caught:
            Connection("host=db.example", purpose="test")
    finally:
        answer.set()
    assert str(caught.value) == (
        'cannot connect: could not translate host name "db.example" to address: no answer in time'
    )


def test_libpq_s_own_ways_to_name_a_server_work(
    dsn: str, session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = parse_dsn(dsn)
    services = tmp_path / "services"
    services.write_text("[shop]\n" + "".join(f"{name}={value}\n" for name, value in parts.items()))
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    assert session("service=shop").raw.info.dbname == parts["dbname"]
    monkeypatch.setenv("PGSERVICE", "shop")
    assert session("").raw.info.dbname == parts["dbname"]
    monkeypatch.delenv("PGSERVICE")
    for name in ("host", "port", "user", "password"):
        if name in parts:
            monkeypatch.setenv(f"PG{name.upper()}", parts[name])
    assert session(f"dbname={parts['dbname']}").query("select 1") == [(1,)]


# -- a standby --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standby(server: Server) -> Iterator[str]:
    """The dsn of a standby, which has a default that lets it refuse every query."""
    directory = Path(tempfile.mkdtemp(prefix="cdc-tests-"))
    user = parse_dsn(server.admin_dsn).get("user", "postgres")
    try:
        with start(directory, settings={"fsync": "off"}) as first, Connection(first.dsn(), purpose="test") as conn:
            if user != "postgres":
                conn.execute(f'create role "{user}" superuser login')
        mark = directory / "data" / "standby.signal"
        mark.touch()
        os.chown(mark, mark.parent.stat().st_uid, mark.parent.stat().st_gid)
        with start(directory, settings={"fsync": "off", "default_transaction_isolation": "serializable"}) as second:
            yield make_dsn(second.dsn(), user=user)
    finally:
        shutil.rmtree(directory)


def both(standby: str, primary: str, **options: str) -> str:
    """The dsn of two hosts, the standby first."""
    ours, theirs = parse_dsn(standby), parse_dsn(primary)
    host, port = (f"{ours[name]},{theirs.get(name, '')}" for name in ("host", "port"))
    return make_dsn(primary, host=host, port=port, dbname="postgres", **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_session_attrs": "any"},
        {"target_session_attrs": "read-write"},
        {"target_session_attrs": "primary"},
        {"target_session_attrs": "prefer-standby"},
        {"load_balance_hosts": "random"},
    ],
    ids=str,
)
def test_a_standby_is_passed_over(server: Server, standby: str, session: Session, options: dict[str, str]) -> None:
    conn = session(both(standby, server.admin_dsn, **options))
    assert conn.query("select pg_is_in_recovery()") == [(False,)]


def test_a_standby_is_good_enough_for_reading(server: Server, standby: str, session: Session) -> None:
    conn = session(both(standby, server.admin_dsn), read_write=False)
    assert conn.query("select pg_is_in_recovery()") == [(True,)]


def test_a_primary_that_is_read_only_by_default_is_a_primary(database: str, session: Session, connect: Connect) -> None:
    with connect(database).cursor() as cursor:
        name = sql.Identifier(parse_dsn(database)["dbname"])
        cursor.execute(sql.SQL("alter database {} set default_transaction_read_only = on").format(name))
    conn = session(make_dsn(database, target_session_attrs="read-write"))
    conn.execute("create table public.written ()")


def test_a_lone_standby_is_told_as_such_and_with_the_cure(standby: str) -> None:
    with pytest.raises(NotPrimary) as caught:
        Connection(standby, purpose="test")
    assert str(caught.value) == "the server is a standby (let dsn name the primary, or every host of the cluster)"


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"target_session_attrs": "read-write"}, "the server is a standby"),
        ({"host": "{host},127.0.0.1", "port": "{port},1"}, "{place}: the server is a standby; 127.0.0.1:1: {refused}"),
        ({"host": "{host},{host}/."}, "{place}: the server is a standby; {host}/.:{port}: the server is a standby"),
    ],
    ids=["a primary is asked for", "beside a closed port", "two of them"],
)
def test_where_a_standby_may_become_the_primary_it_is_worth_waiting(
    standby: str, options: dict[str, str], reasons: str
) -> None:
    parts = parse_dsn(standby)
    words = {"host": parts["host"], "port": parts["port"], "place": f"{parts['host']}:{parts['port']}"}
    with pytest.raises(DatabaseUnreachable) as caught:
        Connection(
            make_dsn(standby, **{name: value.format(**words) for name, value in options.items()}), purpose="test"
        )
    assert one_line(caught.value) == "cannot connect: " + reasons.format(**words, refused="Connection refused")


# -- a pooler ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(dsn: str) -> Iterator[Callable[[str], str]]:
    """``pool(mode)`` starts PgBouncer before this test's database and returns the dsn that goes through it."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no pgbouncer on this machine")
    directory = Path(tempfile.mkdtemp(prefix="cdc-tests-"))
    parts = parse_dsn(dsn)
    # Not as root, and where the server's socket is private, as whoever owns that.
    host = Path(parts.get("host", "/"))
    owner = pwd.getpwuid(host.stat().st_uid) if str(host) != "/" and host.is_dir() else pwd.getpwnam("nobody")
    owner = pwd.getpwnam("nobody") if owner.pw_uid == 0 else owner
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, directory)

        def launch(mode: str) -> str:
            target = " ".join(f"{name}={value}" for name, value in parts.items())
            (directory / "ini").write_text(
                f"[databases]\n{parts['dbname']} = {target}\n[pgbouncer]\npool_mode = {mode}\nauth_type = any\n"
                f"listen_addr =\nlisten_port = 6432\nunix_socket_dir = {directory}\n"
            )
            if os.geteuid() == 0:
                for path in (directory, directory / "ini"):
                    os.chown(path, owner.pw_uid, owner.pw_gid)
            user = owner.pw_uid if os.geteuid() == 0 else None
            process = subprocess.Popen(
                [program, directory / "ini"], user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            undo.callback(process.wait)
            undo.callback(process.kill)
            until((directory / ".s.PGSQL.6432").exists)
            return f"host={directory} port=6432 user=cdc dbname={parts['dbname']}"

        yield launch


@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_a_pooler_in_between_is_noticed(pool: Callable[[str], str], session: Session, mode: str) -> None:
    conn = session(pool(mode))
    assert conn.pooled
    assert conn.query("select pg_backend_pid()") == [(conn.pid,)]
    assert setting(conn, "default_transaction_isolation") == "read committed"


def test_deadlines_do_not_leak_to_others_of_a_pool(
    pool: Callable[[str], str], session: Session, connect: Connect
) -> None:
    shared = pool("transaction")
    conn = session(shared)
    assert setting(conn, "statement_timeout") == "7s"
    with contextlib.closing(connect(shared)) as other, other.cursor() as cursor:
        cursor.execute("select pg_backend_pid(), current_setting('statement_timeout')")
        assert cursor.fetchone() == (conn.pid, "0")


def test_a_direct_session_is_not_pooled(dsn: str, relay: Relay, session: Session) -> None:
    for each in (dsn, relay.dsn):
        conn = session(each)
        assert not conn.pooled
        assert conn.query("select pg_backend_pid()") == [(conn.pid,)]


# -- words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (f"host=127.0.0.1 port=1 password={CANARY}", "Connection refused"),
        (f"postgresql://cdc:{CANARY}@127.0.0.1:1,localhost:1/shop", "localhost:1: Connection refused"),
        (f"password=my {CANARY}", "dsn is not a connection string"),
        (f"postgresql://cdc:%{CANARY}@localhost/shop", "dsn is not a connection string"),
        (f"host=127.0.0.1 sslmod=require password={CANARY}", 'invalid connection option "sslmod"'),
        (f"postgresql://cdc:{CANARY}@localhost/shop?sslmod=require", 'invalid URI query parameter: "sslmod"'),
        (f"host=127.0.0.1 sslmode=perhaps password={CANARY}", 'invalid sslmode value: "perhaps"'),
        (f"host=a,b port=1,2,3 password={CANARY}", "could not match 3 port numbers to 2 hosts"),
    ],
)
def test_a_failed_attempt_says_why_in_one_line_and_keeps_the_password(wrong: str, says: str) -> None:
    with pytest.raises(DatabaseError) as caught:
        Connection(wrong, purpose="test")
    text = one_line(caught.value)
    assert text.startswith("cannot connect: ")
    assert text.endswith(says)


def test_what_a_target_lacks_is_not_explained_by_our_schema(dsn: str, session: Session) -> None:
    for source, kind in ((True, NotInstalled), (False, DatabaseError)):
        with pytest.raises(DatabaseError) as caught:
            session(dsn, source=source).query("select from cdc_position")
        assert type(caught.value) is kind
        assert ("cdc migrate" in str(caught.value)) is source


def test_a_refused_login_may_be_healed_by_waiting(dsn: str) -> None:
    with pytest.raises(DatabaseUnreachable) as caught:
        Connection(make_dsn(dsn, user="nobody_of_this_name", password=CANARY), purpose="test")
    assert "nobody_of_this_name" in one_line(caught.value)


def test_a_server_that_has_no_room_may_be_healed_by_waiting(dsn: str, connect: Connect) -> None:
    with connect(dsn).cursor() as cursor:
        role = f"{parse_dsn(dsn)['dbname']}_guest"
        create = sql.SQL("create role {} login connection limit 0 password {}")
        cursor.execute(create.format(sql.Identifier(role), sql.Literal(CANARY)))
        try:
            with pytest.raises(DatabaseUnreachable) as caught:
                Connection(make_dsn(dsn, user=role, password=CANARY), purpose="test")
        finally:
            cursor.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))
    assert "too many connections for role" in one_line(caught.value)


def test_an_error_never_shows_a_row(database: str, session: Session) -> None:
    conn = session(database)
    conn.execute(f"create table public.secrets (word text primary key); insert into public.secrets values ('{CANARY}')")
    with pytest.raises(DatabaseError) as caught:
        conn.execute("insert into public.secrets values (%s)", (CANARY,))
    assert one_line(caught.value) == 'duplicate key value violates unique constraint "secrets_pkey"'
