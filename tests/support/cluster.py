"""A PostgreSQL of a test's own, to be killed, frozen, starved, copied and promoted.

It is made from the binaries of the embedded server (or of any other installation), and what `cdc.embedded` knows of
binaries, system users and initdb is used from there. Unlike the embedded server it listens on TCP too, is a child of
this process, and survives a crash: fsync is on. Like it, it trusts every connection; on TCP that means everybody on
this machine, for as long as the test runs.

Inside the with-block it runs, unless the test has stopped it; afterwards nothing of it is left.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

import psutil
import psycopg2
from harness import is_stopped, until
from psycopg2 import sql
from psycopg2.extensions import make_dsn
from scratch import scratch

from cdc import embedded

SETTINGS = {"fsync": "on", "shared_buffers": "32MB", "max_connections": "100", "wal_keep_size": "256MB"}
"""What every cluster has unless it is told otherwise; the last keeps a standby going that was away for a while."""
PATIENCE = 60.0
OUR_NAME = "cdc test"
"""application_name of this module's own sessions, which are no part of what happens."""

_WITHOUT_ATTVER = """
    update pg_attribute
       set attoptions = nullif(array(select o from unnest(attoptions) o where not starts_with(o, 'pg_attver=')), '{}')
     where attrelid >= 16384 and attoptions::text like '%pg_attver=%'
"""
_PORTS = range(20000, 30000)
"""Below those the kernel gives to clients: a server that is down must find its own port free again."""
_NOTICE = 2.0
"""Seconds an orphan is given to notice that it is one."""
_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class Backend(NamedTuple):
    """One server process, as pg_stat_activity shows it."""

    pid: int
    kind: str
    application: str
    state: str
    query: str


class Cluster:
    """One PostgreSQL server.

    Attributes:
        directory: everything of it: ``data``, ``socket``, ``log``.
        bindir: its programs.
        port: of the socket and of 127.0.0.1; the same one after every restart.
        settings: count from the next start on.
        environment: of the server, beside the tests' own; counts from the next start on.
    """

    def __init__(
        self,
        settings: Mapping[str, str] = MappingProxyType({}),
        *,
        environment: Mapping[str, str] = MappingProxyType({}),
        file_size: int | None = None,
        bindir: Path | None = None,
        initdb: Sequence[str] = (),
    ) -> None:
        """
        Args:
            settings: beside `SETTINGS`.
            environment: such as ``LD_PRELOAD``.
            file_size: see :meth:`limit_file_size`.
            bindir: of another installation than the embedded one.
            initdb: options for it, in place of those of `cdc.embedded`.
        """
        self.settings = {**SETTINGS, **settings}
        self.environment = dict(environment)
        self.directory = Path()
        self.bindir = bindir or Path()
        self.port = 0
        self._file_size = file_size
        self._other_bindir = bindir
        self._initdb = initdb
        self._source: Cluster | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen: set[int] = set()

    # -- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.directory = scratch("cdc-cluster-")
        try:
            self._account = embedded._service_account(self.directory / "data")
            self.directory.chmod(0o711 if self._account else 0o700)
            self.bindir = self._other_bindir or embedded._reachable_binaries(self.directory, self._account)
            self._make_data()
            (self.directory / "socket").mkdir(0o700)
            embedded._give(self.directory / "socket", self._account)
            self._find_port()
            self.start()
        except BaseException:
            self._destroy()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._destroy()

    def start(self) -> None:
        """Start it, and wait until it takes connections: of a crashed one, until it has recovered."""
        assert not self.running, "it runs"
        self._files._disown_pid_file()
        (self.directory / "socket" / f".s.PGSQL.{self.port}.lock").unlink(missing_ok=True)
        self._launch()
        until(lambda: self._ready() or not self.running, "the server takes connections", PATIENCE, pause=0.02)
        assert self.running, f"the server did not start: {self.log()[-3000:]}"
        if self._file_size is not None:
            self.limit_file_size(self._file_size)

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop it, as ``pg_ctl stop -m`` does, and wait until it has ended. Whatever is frozen is thawed first."""
        for pid in list(self._frozen):
            self.thaw(pid)
        assert self._process is not None
        self._process.send_signal(_SIGNALS[mode])
        self._process.wait(PATIENCE)
        self._process = None

    def restart(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop and start."""
        self.stop(mode)
        self.start()

    def kill(self, *, at_once: bool = False) -> None:
        """SIGKILL the postmaster, and wait until nothing is left, so that it can be started again.

        Args:
            at_once: kill every process of it in the same moment. Else the others notice that the postmaster has gone,
                as it is when somebody kills only that: a COMMIT may still be finished and answered. Those who are
                frozen, or do not look up for a while, are killed too in the end.
        """
        assert self._process is not None
        pid = self._process.pid
        # Stopped, it makes no child that we would not know of.
        os.kill(pid, signal.SIGSTOP)
        until(lambda: is_stopped(pid), "the postmaster is stopped")
        children = psutil.Process(pid).children(recursive=True)
        if at_once:
            _kill(children)
        self._process.kill()
        self._process.wait()
        self._process = None
        self._frozen.clear()
        try:
            until(lambda: all(map(_has_gone, children)), "the orphans notice", _NOTICE)
        except AssertionError:
            _kill(children)
            until(lambda: all(map(_has_gone, children)), "the orphans are gone")

    @property
    def pid(self) -> int:
        """Of the postmaster."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether there is a postmaster."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """What the server has logged since it was made."""
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    # -- sessions -----------------------------------------------------------------------------------------------

    def dsn(self, dbname: str = "postgres", host: Literal["unix", "tcp"] = "unix", **more: str) -> str:
        """How the superuser, or ``user="…"``, reaches a database."""
        where = str(self.directory / "socket") if host == "unix" else "127.0.0.1"
        return make_dsn(**{"host": where, "port": str(self.port), "user": "postgres", "dbname": dbname, **more})

    def query(self, statement: str | sql.Composable, *parameters: object, dbname: str = "postgres") -> list[Any]:
        """Run one statement, outside of a transaction block, in a session of its own; returns the rows."""
        dsn = self.dsn(dbname, application_name=OUR_NAME)
        with contextlib.closing(psycopg2.connect(dsn)) as conn:
            conn.autocommit = True
            with conn.cursor() as cursor:
                cursor.execute(statement, parameters or None)
                return cursor.fetchall() if cursor.description else []

    def create_database(self, name: str) -> str:
        """Make an empty database; returns its dsn, by the socket."""
        self.query(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
        return self.dsn(name)

    def backends(self, application: str = "") -> list[Backend]:
        """Who is connected, clients and standbys; `application`: only those whose application_name begins so."""
        rows = self.query(
            """select pid, backend_type, coalesce(application_name, ''), coalesce(state, ''), coalesce(query, '')
                 from pg_stat_activity
                where backend_type in ('client backend', 'walsender') and application_name <> %s
                  and starts_with(application_name, %s)
                order by backend_start""",
            OUR_NAME,
            application,
        )
        return [Backend(*row) for row in rows]

    def backend(self, application: str, seconds: float = 30.0) -> Backend:
        """Whoever is connected under an application_name that begins so; waits until there is somebody."""
        found: list[Backend] = []

        def look() -> bool:
            found[:] = self.backends(application)
            return bool(found)

        until(look, f"somebody called {application!r} is connected", seconds, pause=0.02)
        return found[0]

    def terminate(self, pid: int) -> None:
        """pg_terminate_backend, and wait until it has gone."""
        self.query("select pg_terminate_backend(%s)", pid)
        until(lambda: not psutil.pid_exists(pid), "the backend has gone")

    def freeze(self, pid: int) -> None:
        """SIGSTOP one process of this server: a backend whose disk hangs, or who was given no processor."""
        assert self._process is not None
        assert pid in {child.pid for child in psutil.Process(self._process.pid).children()}, f"{pid} is not ours"
        self._frozen.add(pid)
        os.kill(pid, signal.SIGSTOP)
        until(lambda: is_stopped(pid), "the backend is frozen")

    def thaw(self, pid: int) -> None:
        """SIGCONT."""
        self._frozen.discard(pid)
        with contextlib.suppress(ProcessLookupError):  # it was killed meanwhile
            os.kill(pid, signal.SIGCONT)

    def limit_file_size(self, bytes_: int | None) -> None:
        """Let no file grow beyond this, of those that live and those to come; None: as large as they like.

        A write that crosses the limit is cut short, the next one fails with EFBIG. It is true of WAL segments too,
        which have 16 MiB from the start; below that the server cannot go on.
        """
        assert self._process is not None
        self._file_size = bytes_
        postmaster = psutil.Process(self._process.pid)
        limit = "unlimited" if bytes_ is None else str(bytes_)
        # The parent first: whoever is born later has its limit. By its own user, as root may not in a container.
        for pid in (postmaster.pid, *(child.pid for child in postmaster.children(recursive=True))):
            command = ["prlimit", "--pid", str(pid), f"--fsize={limit}:"]
            code, output = embedded._call(command, self.directory, self._account)
            assert code == 0 or not psutil.pid_exists(pid), output

    # -- copies -------------------------------------------------------------------------------------------------

    def standby(self, settings: Mapping[str, str] = MappingProxyType({})) -> Cluster:
        """A hot standby, streaming from this one, asynchronously; to be entered like any other cluster."""
        copy = Cluster(
            {**self.settings, **settings}, environment=self.environment, bindir=self._other_bindir, initdb=self._initdb
        )
        copy._source = self
        return copy

    def wait_until_replayed(self, standby: Cluster) -> None:
        """Wait until a standby shows everything that is committed here now."""
        ((lsn,),) = self.query("select pg_current_wal_flush_lsn()")

        def replayed() -> bool:
            return bool(standby.query("select pg_last_wal_replay_lsn() >= %s::pg_lsn", lsn)[0][0])

        until(replayed, "the standby has replayed everything", PATIENCE)

    def promote(self) -> None:
        """Make a primary of a standby, and wait until it writes."""
        assert self.query("select pg_promote(true, 60)") == [(True,)], self.log()[-3000:]

    def upgrade_from(self, old: Cluster) -> None:
        """Stop both, and take over everything of another cluster, as pg_upgrade does it; both stay stopped.

        Since 15.20 each column carries an option (pg_attver) that servers released before it do not know, and that
        their pg_upgrade stumbles over. It cannot be reset, so it is taken out of the old catalogue.
        """
        for (name,) in old.query("select datname from pg_database where datallowconn"):
            old.query(_WITHOUT_ATTVER, dbname=name)
        old.stop()
        self.stop()
        sockets = self.directory / "socket"
        command = ["-b", old.bindir, "-d", old.directory / "data", "-B", self.bindir, "-D", self.directory / "data"]
        self.run("pg_upgrade", *command, "-U", "postgres", "-s", sockets, cwd=sockets)

    def run(self, program: str, *arguments: str | Path, cwd: Path | None = None) -> str:
        """Run one of its programs to its end, as the server's user; returns the output of both streams."""
        command = [str(self.bindir / program), *map(str, arguments)]
        code, output = embedded._call(command, cwd or self.directory, self._account, 2 * PATIENCE)
        assert code == 0, f"{program} ended with {code}: {output[-3000:]}"
        return output

    # -- inside -------------------------------------------------------------------------------------------------

    @property
    def _files(self) -> embedded._Cluster:
        return embedded._Cluster(self.directory, self.bindir, "", self._account)

    def _make_data(self) -> None:
        if self._source is None and not self._initdb:
            self._files.initialise(time.monotonic() + PATIENCE)
            return
        data = self.directory / "data"
        data.mkdir(0o700)
        embedded._give(data, self._account)
        if self._source is None:
            self.run("initdb", "-D", data, "--auth=trust", "--username=postgres", *self._initdb)
        else:
            self.run("pg_basebackup", "-d", self._source.dsn(), "-D", data, "-R", "-X", "stream", "-c", "fast")

    def _find_port(self) -> None:
        for port in random.SystemRandom().sample(_PORTS, 50):
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
                self.port = port
                return
        raise AssertionError("no free port")

    def _launch(self) -> None:
        ours = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.directory / "socket"),
        }
        options = [part for name, value in {**self.settings, **ours}.items() for part in ("-c", f"{name}={value}")]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.bindir / "postgres", "-D", self.directory / "data", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env=inherited | {"LC_ALL": "C"} | self.environment,
                start_new_session=True,  # Ctrl-C is for pytest
                user=self._account.uid if self._account else None,
                group=self._account.gid if self._account else None,
                extra_groups=[] if self._account else None,
            )

    def _ready(self) -> bool:
        try:
            lines = (self.directory / "data" / "postmaster.pid").read_text().split("\n")
        except FileNotFoundError:
            return False
        assert self._process is not None
        # pid, data directory, start time, port, socket directory, address, shared memory, state
        return lines[0].strip() == str(self._process.pid) and [line.strip() for line in lines[7:8]] == ["ready"]

    def _destroy(self) -> None:
        try:
            if self.running:
                self.kill(at_once=True)
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _has_gone(process: psutil.Process) -> bool:
    # Whoever should bury orphans, in a container, may not.
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    return True
