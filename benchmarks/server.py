"""A PostgreSQL of the benchmark's own: the system's binaries, a data directory in a temporary one, fsync on."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import psycopg2
from psycopg2.extensions import connection, make_dsn

BINARIES = Path("/usr/lib/postgresql/15/bin")
"""Debian's PostgreSQL 15, the version the peers' packages are built for."""

# The defaults, except that no checkpoint falls into somebody's measurement, and that WAL is not recycled in mid-run.
_SETTINGS = {
    "fsync": "on",
    "max_connections": "200",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "1h",
    "max_replication_slots": "10",
    "shared_buffers": "512MB",
}


class Server:
    """Started by the constructor, gone with all its data after :meth:`stop`."""

    def __init__(self, *, wal_level: str = "replica", binaries: Path = BINARIES) -> None:
        """
        Args:
            wal_level: ``logical`` for those who decode the WAL; it costs everybody who writes.
            binaries: where initdb and postgres are.

        Raises:
            FileNotFoundError: no PostgreSQL there.
        """
        if not (binaries / "postgres").exists():
            raise FileNotFoundError(f"no PostgreSQL in {binaries} (apt-get install postgresql-15)")
        self.binaries = binaries
        self.wal_level = wal_level
        self.home = Path(tempfile.mkdtemp(prefix="cdc-peers-pg-"))
        self.log = self.home / "log"
        self._user: str | None = None
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            self._user = "postgres"
            account = pwd.getpwnam(self._user)
            os.chown(self.home, account.pw_uid, account.pw_gid)
        self._run(
            ["initdb", "-D", str(self.home / "data"), "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C"]
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        settings = _SETTINGS | {"wal_level": wal_level, "unix_socket_directories": str(self.home)}
        if "output_plugin_libraries" in self._knows():  # since the minor releases of late 2026
            settings["output_plugin_libraries"] = "pgoutput, wal2json"
        command = [str(binaries / "postgres"), "-D", str(self.home / "data"), "-p", str(self.port)]
        command += [f"--{name}={value}" for name, value in settings.items()]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, user=self._user, stdout=log, stderr=log, cwd="/")
        deadline = time.monotonic() + 60
        while True:
            try:
                self.connect("postgres").close()
                break
            except psycopg2.OperationalError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.05)

    def _run(self, command: Sequence[str]) -> None:
        program = [str(self.binaries / command[0]), *command[1:]]
        subprocess.run(program, check=True, user=self._user, stdout=subprocess.DEVNULL, cwd="/")

    def _knows(self) -> str:
        command = [str(self.binaries / "postgres"), "--describe-config"]
        return subprocess.run(command, check=True, capture_output=True, text=True, user=self._user, cwd="/").stdout

    def dsn(self, database: str) -> str:
        return make_dsn(host=str(self.home), port=self.port, user="postgres", dbname=database)

    def connect(self, database: str) -> connection:
        """A session in autocommit."""
        session = psycopg2.connect(self.dsn(database))
        session.autocommit = True
        return session

    def run(self, database: str, *statements: str) -> None:
        """Statements, each its own transaction."""
        session = self.connect(database)
        with session.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
        session.close()

    def cpu(self) -> float:
        """Seconds of CPU all its processes have used, those that have ended included."""
        postmaster = psutil.Process(self._process.pid)
        own = postmaster.cpu_times()
        used = own.user + own.system + own.children_user + own.children_system
        for process in postmaster.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used += times.user + times.system
        return used

    def version(self) -> str:
        command = [str(self.binaries / "postgres"), "--version"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[2]

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.home, ignore_errors=True)
