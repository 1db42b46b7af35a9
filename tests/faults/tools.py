"""Programs of others that some faults need, where they are installed: PgBouncer, libfaketime, an older PostgreSQL.

:func:`required` decides what their absence means: on a laptop the test is skipped, in CI (environment variable ``CI``
is ``true``) it fails, because there nobody would notice that it never runs.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Literal, Self, TypeVar

import psycopg2
import pytest
from harness import until
from psycopg2.extensions import make_dsn, parse_dsn

from cdc import embedded

_Found = TypeVar("_Found")


def required(found: _Found | None, what: str) -> _Found:
    """What was looked for; where it is absent, the end of the test."""
    if found is not None:
        return found
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is not installed, and CI must not skip", pytrace=False)
    pytest.skip(f"{what} is not installed")


def find_pgbouncer() -> Path | None:
    """The program; distributions hide it from ordinary users' paths."""
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
    return Path(found) if found else None


def find_postgres(major: int) -> Path | None:
    """Where Debian keeps the server programs of a major version."""
    bindir = Path(f"/usr/lib/postgresql/{major}/bin")
    return bindir if (bindir / "postgres").exists() else None


def find_faketime() -> Path | None:
    """The library of libfaketime that is made for threads."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


class PgBouncer:
    """A PgBouncer in front of a server, from the beginning to the end of the with-block.

    Attributes:
        port: where it listens, on 127.0.0.1.
    """

    def __init__(
        self, program: Path, upstream: str, mode: Literal["transaction", "session", "statement"] = "transaction"
    ) -> None:
        """
        Args:
            program: see :func:`find_pgbouncer`.
            upstream: a dsn; its server has to trust the user it names. Every database of it can be reached.
            mode: ``pool_mode``.
        """
        self.port = 0
        self._program = program
        self._upstream = {name: value for name, value in parse_dsn(upstream).items() if name in _ROUTE}
        self._mode = mode

    def dsn(self, dsn: str) -> str:
        """The same database, by way of PgBouncer."""
        return make_dsn(dsn, host="127.0.0.1", port=str(self.port), sslmode="disable", gssencmode="disable")

    def log(self) -> str:
        """What it has logged."""
        return (self._directory / "log").read_text()

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="cdc-pgbouncer-"))
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_process"):
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._directory)

    def _start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        route = " ".join(f"{name}={value}" for name, value in self._upstream.items())
        config = self._directory / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = {route}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\n"
            # Everybody is let in, as the one user the route names.
            f"unix_socket_dir =\nauth_type = any\npool_mode = {self._mode}\nmax_client_conn = 200\n"
        )
        # It refuses to run as root, and has to reach the server's socket: so it is the user who runs the server.
        account = embedded._service_account(self._directory / "none")
        self._directory.chmod(0o755)
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [self._program, config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
            )
        until(lambda: self._answers() or self._process.poll() is not None, "PgBouncer answers")
        assert self._process.poll() is None, f"PgBouncer did not start: {self.log()[-2000:]}"

    def _answers(self) -> bool:
        try:
            psycopg2.connect(self.dsn("dbname=postgres")).close()
        except psycopg2.OperationalError as error:
            # Refused by the server behind it would be an answer too.
            return "onnection refused" not in str(error)
        return True


_ROUTE = ("host", "port", "user")


class Clock:
    """A wall clock that can be set while processes look at it; their monotonic clock stays true.

    Attributes:
        environment: what those processes have to be started with.
    """

    def __init__(self, library: Path, directory: Path) -> None:
        """
        Args:
            library: see :func:`find_faketime`.
            directory: for a file that every process can read.
        """
        self._file = directory / "clock"
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",  # its name in older versions
        }
        self.set("+0")

    def set(self, offset: str) -> None:
        """Set it to the true time plus an offset, such as ``-1h`` or ``+1d``; ``+0``: to the true time."""
        new = self._file.with_suffix(".new")
        new.write_text(offset)
        new.chmod(0o644)
        new.rename(self._file)  # nobody shall read half of it
