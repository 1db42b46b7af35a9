"""One session with PostgreSQL that cannot hang.

A frozen server process, a stalled network and a half-open connection are invisible to statement_timeout, keepalives
and tcp_user_timeout alike, so every call carries a deadline on this side of the wire: psycopg2 waits through
:func:`_wait`, which gives up when the session's time is over. The session is then closed for good; its owner makes
a new one.

Sessions are autocommit, belong to one thread each, and speak in this package's errors: what a new session may heal is
:class:`~cdc.errors.DatabaseUnreachable`, everything else another :class:`~cdc.errors.DatabaseError`. Messages hold the
server's primary message only: DETAIL and CONTEXT quote row values.
"""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import psycopg2
import psycopg2.extensions as ext

from cdc.errors import DatabaseError, DatabaseUnreachable, Fenced, NotInstalled, NotPrimary

OLDEST_SERVER = 14
"""Lowest major version this program works with."""
CONNECT_DEADLINE = 10.0
"""Seconds to reach the server and log in."""
QUERY_DEADLINE = 30.0
"""Seconds for one round trip, unless the caller knows better."""

# Timeouts a role may carry would end an idle LISTEN session or a long page; a position must be on disk once committed.
_SETTINGS = (
    "set synchronous_commit = on; set statement_timeout = 0; set lock_timeout = 0; "
    "set idle_in_transaction_session_timeout = 0; set idle_session_timeout = 0; set timezone = 'UTC'; set jit = off"
)

_SQLSTATE_FENCED = "CDC01"
_SQLSTATE_FORBIDDEN = "42501"
_SQLSTATES_NOT_INSTALLED = {"3F000", "42P01", "42883"}
# Connection exceptions, operator intervention (shutdown, crash, starting up), too many connections.
_UNREACHABLE_CLASSES = ("08", "57P", "53300")


class _Session(ext.connection):
    """A psycopg2 connection that knows until when it may wait."""

    def __init__(self, dsn: str, *args: Any, **kwargs: Any) -> None:
        # Set first: logging in is already done through _wait.
        self.expires: float | None = time.monotonic() + CONNECT_DEADLINE
        super().__init__(dsn, *args, **kwargs)


def _wait(session: Any) -> None:
    """psycopg2's wait callback: poll until the answer is there or the session's deadline has passed."""
    expires: float | None = getattr(session, "expires", None)  # connections of others have none
    poller = select.poll()
    watched = 0
    while (state := session.poll()) != ext.POLL_OK:
        wanted = select.POLLIN if state == ext.POLL_READ else select.POLLOUT
        if wanted != watched:
            poller.register(session.fileno(), wanted)
            watched = wanted
        if expires is None:
            poller.poll()
        elif (left := expires - time.monotonic()) <= 0 or not poller.poll(left * 1000):
            raise DatabaseUnreachable("no answer in time")


class Connection:
    """An autocommit session with deadlines. Not to be shared between threads.

    Attributes:
        server_version: as PostgreSQL counts, 150004 for 15.4.
        pid: the server process that serves this session.
    """

    def __init__(self, dsn: str, *, purpose: str, read_write: bool = True) -> None:
        """Connect and prepare the session.

        Args:
            dsn: libpq URL or key=value string.
            purpose: shown to DBAs as application_name, after ``cdc``.
            read_write: refuse a standby.

        Raises:
            DatabaseUnreachable: no server, no answer in time, or it refuses the login.
            NotPrimary: the server is a standby.
            DatabaseError: the server is too old.
        """
        ext.set_wait_callback(_wait)
        try:
            self._session = psycopg2.connect(
                dsn,
                connection_factory=_Session,
                application_name=f"cdc {purpose}",
                client_encoding="UTF8",
            )
        except (psycopg2.Error, DatabaseUnreachable) as error:
            raise DatabaseUnreachable(f"cannot connect: {first_line(error)}") from None
        self._session.autocommit = True
        self.server_version: int = self._session.server_version
        if self.server_version < OLDEST_SERVER * 10000:
            self.close()
            version = self.server_version // 10000
            raise DatabaseError(f"PostgreSQL {version} is too old (upgrade to {OLDEST_SERVER} or later)")
        self.pid: int = self._session.info.backend_pid
        try:
            self.execute(_SETTINGS)
            if read_write and self.query("select pg_is_in_recovery()")[0][0]:
                raise NotPrimary(
                    "the server is a standby (let dsn name the primary, or add target_session_attrs=read-write)"
                )
        except BaseException:
            self.close()
            raise

    def query(
        self, sql: str, parameters: Sequence[object] | dict[str, object] = (), *, deadline: float = QUERY_DEADLINE
    ) -> list[tuple[Any, ...]]:
        """Run one statement, commit it, and return all its rows (an empty list when it has none).

        Args:
            sql: the statement; identifiers only through ``psycopg2.sql``.
            parameters: its values.
            deadline: seconds until the session is given up.

        Raises:
            DatabaseUnreachable: the session is lost, or nothing came in time; it is closed.
            Fenced: another daemon owns the sink.
            NotInstalled: an object of schema cdc does not exist.
            DatabaseError: the server refused the statement.
        """
        session = self._session
        session.expires = time.monotonic() + deadline
        try:
            with session.cursor() as cursor:
                cursor.execute(sql, parameters or None)
                return cursor.fetchall() if cursor.description else []
        except (psycopg2.Error, DatabaseUnreachable) as error:
            raise self._translate(error) from None

    def execute(self, sql: str, parameters: Sequence[object] | dict[str, object] = ()) -> None:
        """Run one statement, or several separated by semicolons, for their effect. Raises as :meth:`query`."""
        self.query(sql, parameters)

    def notifications(self) -> list[tuple[str, str]]:
        """What has been notified since the last call, as (channel, payload), without waiting.

        Raises:
            DatabaseUnreachable: the session is lost.
        """
        try:
            self._session.expires = time.monotonic() + QUERY_DEADLINE
            self._session.poll()
        except (psycopg2.Error, DatabaseUnreachable) as error:
            raise self._translate(error) from None
        arrived = [(note.channel, note.payload) for note in self._session.notifies]
        self._session.notifies.clear()
        return arrived

    def wait_forever(self) -> None:
        """Lift the deadline until the next call that sets one: for work whose waiting the server bounds."""
        self._session.expires = None

    def fileno(self) -> int:
        """The socket, for ``select``."""
        return self._session.fileno()

    @property
    def raw(self) -> ext.connection:
        """The psycopg2 connection, for libraries that want one."""
        return self._session

    def close(self) -> None:
        """Close the session; harmless when it is closed already."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _translate(self, error: Exception) -> DatabaseError:
        sqlstate = getattr(error, "pgcode", None) or ""
        message = first_line(error)
        if self._session.closed or isinstance(error, DatabaseUnreachable) or sqlstate.startswith(_UNREACHABLE_CLASSES):
            self.close()
            return DatabaseUnreachable(f"connection lost: {message}")
        if sqlstate == _SQLSTATE_FENCED:
            return Fenced(message)
        if sqlstate in _SQLSTATES_NOT_INSTALLED and "cdc" in message:
            return NotInstalled(f"{message} (run `cdc migrate`)")
        if sqlstate == _SQLSTATE_FORBIDDEN and "cdc" in message:
            return DatabaseError(f"{message} (grant cdc_reader to this role, as `cdc migrate` does)")
        return DatabaseError(message)


def first_line(error: BaseException) -> str:
    """The server's primary message, or the first line of any other error; never row values."""
    primary = getattr(getattr(error, "diag", None), "message_primary", None)
    text = primary or str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip()
