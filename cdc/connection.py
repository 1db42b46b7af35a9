"""One session with PostgreSQL that cannot hang.

A frozen server process, a stalled network and a half-open connection are invisible to statement_timeout, keepalives
and tcp_user_timeout alike, so every call carries a deadline on this side of the wire: psycopg2 waits through
:func:`_wait`, which gives up when the session's time is over. The session is then closed for good; its owner makes
a new one.

A slow server is no frozen one. The server's statement_timeout ends `GRACE` seconds before our deadline, so a server
that lives says :class:`~cdc.errors.TooSlow`, and the session goes on. It travels with each statement and ends with it:
set for the session it would, through a pool that shares sessions, cancel other people's statements. (A commit that
waits for a synchronous standby is beyond statement_timeout: it looks frozen.) A deadline is for the whole answer, not
for each piece of it: one that comes in drops is given up as well, and whoever asked may ask for less.

Connecting: libpq, used this way, waits for a vanished host for ever and never gets to the next one. So the hosts of
the connection string, and the addresses of each, are tried one after the other, each with a fair share of the time
that is left; a standby is passed over. What a service file or PGHOSTADDR says is known to libpq only: such a dsn goes
to it as it is, in one attempt. Neither does libpq know when to stop asking for an address; it is asked for here.

On the other side, the server is told to end the session by itself within about 20 s when our host has vanished or we
no longer read (a LISTEN session that is not read keeps VACUUM from cleaning up), and when we have gone during a query.

Sessions are autocommit, belong to one thread each, and speak in this package's errors: what a new session may heal is
:class:`~cdc.errors.DatabaseUnreachable`, everything else another :class:`~cdc.errors.DatabaseError`. Messages hold the
server's primary message only: DETAIL and CONTEXT quote row values.
"""

from __future__ import annotations

import os
import queue
import re
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import psycopg2
import psycopg2.extensions as ext

from cdc.errors import (
    DatabaseError,
    DatabaseUnreachable,
    Fenced,
    NotInstalled,
    NotPrimary,
    TooSlow,
    Undecodable,
    WrongCluster,
)

OLDEST_SERVER = 14
"""Lowest major version this program works with."""
CONNECT_DEADLINE = 9.0
"""Seconds to reach a server, log in and prepare the session, whichever of the named hosts it is."""
HOST_DEADLINE = 3.0
"""Seconds each host gets at least; with more than three hosts connecting may take longer than `CONNECT_DEADLINE`."""
QUERY_DEADLINE = 9.0
"""Seconds for one round trip, unless the caller knows better."""
GRACE = 2.0
"""Seconds between the server's time-out and ours."""

# Within about 20 s, and the same on both sides.
_KEEPALIVE = {"idle": 5, "interval": 5, "count": 3}
_TCP_USER_TIMEOUT = 20_000

# One round trip makes the session independent of what the role, the database and the server have set. Timeouts would
# end an idle LISTEN session or a long page; a position must be on disk once committed; a default of serializable lets
# a standby refuse every query, hence the first statement. Unknown to older servers: transaction_timeout. A server that
# is not on Linux may refuse client_connection_check_interval.
_PREPARE = """
set transaction isolation level read committed;
select pg_catalog.pg_is_in_recovery(), pg_catalog.pg_backend_pid(),
       pg_catalog.count(pg_catalog.set_config(name, value, false))
  from (values
        ('search_path', %(search_path)s),
        ('statement_timeout', '0'),
        ('lock_timeout', '0'),
        ('transaction_timeout', '0'),
        ('idle_in_transaction_session_timeout', '0'),
        ('idle_session_timeout', '0'),
        ('default_transaction_read_only', 'off'),
        ('default_transaction_isolation', 'read committed'),
        ('default_transaction_deferrable', 'off'),
        ('synchronous_commit',
         case pg_catalog.current_setting('synchronous_commit') when 'remote_apply' then 'remote_apply' else 'on' end),
        ('timezone', 'UTC'),
        ('datestyle', 'ISO'),
        ('jit', 'off'),
        ('tcp_keepalives_idle', %(idle)s),
        ('tcp_keepalives_interval', %(interval)s),
        ('tcp_keepalives_count', %(count)s),
        ('tcp_user_timeout', %(tcp_user_timeout)s),
        ('client_connection_check_interval', case when pg_catalog.version() like '%%linux%%' then '5s' end)
       ) as wanted (name, value)
 where pg_catalog.current_setting(name, true) is not null and value is not null
"""

# The message of 57014 says whether time was over or an administrator cancelled, but in the server's language. Both
# mean: the server lives, the session is good, and it is worth doing again.
# 22021 and 22P05 come from the conversion of an answer to UTF-8.
_SQLSTATES_OF_THEIR_OWN: dict[str, type[DatabaseError]] = {
    "CDC01": Fenced,
    "CDC02": WrongCluster,
    "57014": TooSlow,
    "22021": Undecodable,
    "22P05": Undecodable,
}
_SQLSTATE_FORBIDDEN = "42501"
_SQLSTATES_NOT_INSTALLED = {"3F000", "42P01", "42883"}
# Connection exceptions, operator intervention (shutdown, crash, starting up), too many connections.
_UNREACHABLE_CLASSES = ("08", "57P", "53300")
_NOT_IN_TIME = "no answer in time"


class _Session(ext.connection):
    """A psycopg2 connection that knows until when it may wait.

    Attributes:
        expires: when to give up, by the monotonic clock.
    """

    def __init__(self, dsn: str, *args: Any, until: float, **kwargs: Any) -> None:
        # Set first: logging in is already done through _wait.
        self.expires = until
        super().__init__(dsn, *args, **kwargs)

    def allow(self, seconds: float) -> None:
        """Begin a new deadline."""
        self.expires = time.monotonic() + seconds


def _wait(session: Any) -> None:
    """psycopg2's wait callback: poll until the answer is there or the session's deadline has passed."""
    expires: float | None = getattr(session, "expires", None)  # connections of others have none
    while (state := session.poll()) != ext.POLL_OK:
        # A new one each time: while connecting, the socket may be another one after every step.
        poller = select.poll()
        poller.register(session.fileno(), select.POLLIN if state == ext.POLL_READ else select.POLLOUT)
        if expires is None:
            poller.poll()
            continue
        # At least one look, in case it was this process that has slept.
        if not poller.poll(max(expires - time.monotonic(), 0.0) * 1000):
            raise DatabaseUnreachable(_NOT_IN_TIME)


@dataclass(frozen=True, slots=True)
class _Host:
    """One of the hosts a connection string names, with what belongs to it; each part may be empty."""

    name: str
    address: str
    port: str

    def __str__(self) -> str:
        place = self.name or self.address or "local socket"
        if ":" in place:
            place = f"[{place}]"
        return f"{place}:{self.port}" if self.port else place

    def addresses(self, until: float) -> list[str]:
        """What its name stands for; empty text where libpq needs no help.

        Raises:
            DatabaseUnreachable: the name is not known, or not answered for in time.
        """
        if self.address or not self.name or self.name.startswith(("/", "@")):  # a directory or abstract socket
            return [self.address]
        answers: queue.SimpleQueue[list[str] | str] = queue.SimpleQueue()

        def ask() -> None:
            try:
                found = socket.getaddrinfo(self.name, None, type=socket.SOCK_STREAM)
                answers.put(list(dict.fromkeys(str(address[0]) for *_, address in found)))
            except OSError as error:
                answers.put(error.strerror or type(error).__name__)
            except UnicodeError:
                answers.put("not a host name")

        # The resolver knows no deadline; a thread that is waited for no longer ends when the resolver gives up.
        threading.Thread(target=ask, name="look-up", daemon=True).start()
        try:
            answer = answers.get(timeout=max(until - time.monotonic(), 0.0))
        except queue.Empty:
            answer = _NOT_IN_TIME
        if isinstance(answer, str):
            raise DatabaseUnreachable(f'could not translate host name "{self.name}" to address: {answer}')
        return answer


class Connection:
    """An autocommit session with deadlines. Not to be shared between threads.

    Attributes:
        server_version: as PostgreSQL counts, 150004 for 15.4.
        pid: the server process that serves this session; behind a transaction pool, the one that did at first.
        pooled: whether there is a pooler such as PgBouncer in between.
    """

    server_version: int
    pid: int
    pooled: bool
    _session: _Session

    def __init__(
        self,
        dsn: str,
        *,
        purpose: str,
        read_write: bool = True,
        deadline: float = QUERY_DEADLINE,
        source: bool = True,
    ) -> None:
        """Connect and prepare the session.

        Args:
            dsn: libpq URL or key=value string.
            purpose: shown to DBAs as application_name, after ``cdc``.
            read_write: refuse a standby, or pass it over where the dsn names several hosts.
            deadline: seconds for one round trip, unless a call says otherwise.
            source: for work with schema cdc: what the server complains about is explained by that, and all other names
                have to be written with their schema.

        Raises:
            DatabaseUnreachable: no server, no answer in time, it refuses the login, or none of several is the primary.
            NotPrimary: the server is a standby, the only one the dsn names, and the dsn does not ask for a primary.
            DatabaseError: the server is too old, or the dsn is none.
        """
        self._deadline = deadline
        self._source = source
        parts = _parse(dsn)
        options = {"application_name": f"cdc {purpose}", "client_encoding": "UTF8", **_options(parts, read_write)}
        hosts = _hosts(parts)
        failures: list[tuple[_Host | None, DatabaseUnreachable | NotPrimary]] = []
        ends = time.monotonic() + max(CONNECT_DEADLINE, HOST_DEADLINE * len(hosts))
        for host, host_ends in _shares(hosts or [None], ends):
            try:
                addresses = host.addresses(host_ends) if host else [""]
            except DatabaseUnreachable as error:
                failures.append((host, error))
                continue
            for address, until in _shares(addresses, host_ends):
                place = {"host": host.name, "hostaddr": address, "port": host.port or None} if host else {}
                try:
                    self._log_in(ext.make_dsn(dsn, **options, **place), until, read_write)
                except (DatabaseUnreachable, NotPrimary) as error:
                    failures.append((host, error))
                else:
                    return
        raise _verdict(failures, may_heal=_wants_primary(parts))

    def _log_in(self, dsn: str, until: float, read_write: bool) -> None:
        """One attempt to get a session, and to prepare it."""
        ext.set_wait_callback(_wait)
        try:
            self._session = psycopg2.connect(dsn, connection_factory=partial(_Session, until=until))
        except (psycopg2.Error, DatabaseUnreachable) as error:
            raise DatabaseUnreachable(first_line(error)) from None
        try:
            self._session.autocommit = True
            self.server_version = self._session.server_version
            if self.server_version < OLDEST_SERVER * 10000:
                version = self.server_version // 10000
                raise DatabaseError(f"PostgreSQL {version} is too old (upgrade to {OLDEST_SERVER} or later)")
            settings: dict[str, object] = {name: str(value) for name, value in _KEEPALIVE.items()}
            settings["tcp_user_timeout"] = str(_TCP_USER_TIMEOUT)
            # Or a function that somebody has put into schema public would be called where it fits better than
            # PostgreSQL's own (CVE-2018-1058). Elsewhere triggers of others may need the path as it is.
            settings["search_path"] = "pg_catalog, pg_temp" if self._source else None
            [(standby, self.pid, _)] = self._run(_PREPARE, settings)
            # PgBouncer hands out a process number of its own making.
            self.pooled = self.pid != self._session.info.backend_pid
            if read_write and standby:
                raise NotPrimary("the server is a standby")
        except BaseException:
            self.close()
            raise

    def query(
        self,
        sql: str,
        parameters: Sequence[object] | dict[str, object] = (),
        *,
        deadline: float | None = None,
        one_snapshot: bool = False,
    ) -> list[tuple[Any, ...]]:
        """Run one statement, commit it, and return all its rows (an empty list when it has none).

        Args:
            sql: the statement; identifiers only through ``psycopg2.sql``.
            parameters: its values.
            deadline: seconds until the session is given up; None: the session's own.
            one_snapshot: run it repeatable read: whatever it calls sees the same.

        Raises:
            TooSlow: the server lives, but has not finished in time, or somebody cancelled; the session is good.
            DatabaseUnreachable: the session is lost, or nothing came in time; it is closed.
            Fenced: another daemon owns the sink.
            WrongCluster: the sink's position was taken in another cluster.
            Undecodable: the answer cannot be had as text; what the statement did may be done.
            NotInstalled: an object of schema cdc does not exist.
            DatabaseError: the server refused the statement.
        """
        deadline = self._deadline if deadline is None else deadline
        self._session.allow(deadline)
        # Sent together they are one transaction.
        isolation = "set transaction isolation level repeatable read;\n" if one_snapshot else ""
        return self._run(f"{isolation}set local statement_timeout = {_server_share(deadline)};\n{sql}", parameters)

    def step(
        self, sql: str, parameters: Sequence[object] | dict[str, object] = (), *, deadline: float | None = None
    ) -> list[tuple[Any, ...]]:
        """Run one statement of a transaction, the one that begins it included; as :meth:`query` otherwise.

        What the server lets it take is the transaction's to say (``set local statement_timeout``), and should be less.
        """
        self._session.allow(self._deadline if deadline is None else deadline)
        return self._run(sql, parameters)

    def execute(self, sql: str, parameters: Sequence[object] | dict[str, object] = ()) -> None:
        """Run one statement, or several separated by semicolons, for their effect. Raises as :meth:`query`."""
        self.query(sql, parameters)

    def notifications(self) -> list[tuple[str, str]]:
        """What has been notified since the last call, as (channel, payload), without waiting.

        Raises:
            DatabaseUnreachable: the session is lost.
        """
        try:
            self._session.poll()
        except (psycopg2.Error, DatabaseUnreachable) as error:
            raise self._translate(error) from None
        arrived = [(note.channel, note.payload) for note in self._session.notifies]
        self._session.notifies.clear()
        return arrived

    def allow(self, seconds: float) -> None:
        """Begin a new deadline, for work on `raw`; it holds until the next one, or the next query()."""
        self._session.allow(seconds)

    def fileno(self) -> int:
        """The socket, for ``select``."""
        return self._session.fileno()

    @property
    def codec(self) -> str:
        """The Python codec for bytes as they stand in the database; where it takes any, they should be UTF-8."""
        encoding = self._session.info.parameter_status("server_encoding") or "SQL_ASCII"
        return "utf_8" if encoding == "SQL_ASCII" else ext.encodings.get(encoding, "ascii")

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

    def _run(self, sql: str, parameters: Sequence[object] | dict[str, object]) -> list[tuple[Any, ...]]:
        """Run a statement under the deadline that has begun. Raises as :meth:`query`."""
        try:
            with self._session.cursor() as cursor:
                cursor.execute(sql, parameters or None)
                return cursor.fetchall() if cursor.description else []
        except (psycopg2.Error, DatabaseUnreachable) as error:
            raise self._translate(error) from None
        except UnicodeDecodeError:
            raise Undecodable("the answer holds bytes that are no characters") from None

    def _translate(self, error: Exception) -> DatabaseError:
        sqlstate = getattr(error, "pgcode", None) or ""
        translated = self._in_our_words(error, sqlstate)
        translated.sqlstate = sqlstate
        return translated

    def _in_our_words(self, error: Exception, sqlstate: str) -> DatabaseError:
        message = first_line(error)
        # A server that breaks off in the middle is not always seen to have gone; what it sent has no SQLSTATE then.
        broke_off = not sqlstate and type(error) in {psycopg2.DatabaseError, psycopg2.OperationalError}
        lost = self._session.closed or broke_off or sqlstate.startswith(_UNREACHABLE_CLASSES)
        if lost or isinstance(error, DatabaseUnreachable):
            self.close()
            return DatabaseUnreachable(f"connection lost: {message}")
        if sqlstate in _SQLSTATES_OF_THEIR_OWN:
            return _SQLSTATES_OF_THEIR_OWN[sqlstate](message)
        if self._source and sqlstate in _SQLSTATES_NOT_INSTALLED and "cdc" in message:
            return NotInstalled(f"{message} (run `cdc migrate`)")
        if self._source and sqlstate == _SQLSTATE_FORBIDDEN and "cdc" in message:
            return DatabaseError(f"{message} (grant cdc_reader to this role, as `cdc migrate` does)")
        return DatabaseError(message)


def first_line(error: BaseException) -> str:
    """The server's primary message, or the first line of any other error; never row values."""
    primary = getattr(getattr(error, "diag", None), "message_primary", None)
    text = primary or str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip()


def _server_share(deadline: float) -> int:
    """The statement_timeout, in ms, that goes with a deadline: sooner by `GRACE`, or by half of a short one."""
    return max(1, round(max(deadline - GRACE, deadline / 2) * 1000))


# -- where to connect to ----------------------------------------------------------------------------------------


def _parse(dsn: str) -> dict[str, str]:
    try:
        return {name: str(value) for name, value in ext.parse_dsn(dsn).items()}
    except psycopg2.ProgrammingError as error:
        # libpq quotes what it does not understand, and that may be a piece of a password. An option's name is none.
        found = re.search(r'invalid (?:connection option|URI query parameter:) "\w+"', str(error))
        raise DatabaseError(f"cannot connect: {found[0] if found else 'dsn is not a connection string'}") from None


def _has_service(parts: dict[str, str]) -> bool:
    return "service" in parts or "PGSERVICE" in os.environ


def _wants_primary(parts: dict[str, str]) -> bool:
    return parts.get("target_session_attrs") in {"read-write", "primary"}


def _options(parts: dict[str, str], read_write: bool) -> dict[str, object]:
    """What to say beyond the connection string, where it is silent."""
    options: dict[str, object] = {}
    if not _has_service(parts):  # what is said here would overrule it
        options |= {f"keepalives_{name}": value for name, value in _KEEPALIVE.items()}
        options["tcp_user_timeout"] = _TCP_USER_TIMEOUT
        options = {name: value for name, value in options.items() if name not in parts}
    if read_write and _wants_primary(parts):
        # We look for ourselves; to libpq a primary whose default is read-only is none.
        options["target_session_attrs"] = "any"
    return options


def _hosts(parts: dict[str, str]) -> list[_Host]:
    """The hosts of a connection string, paired as libpq pairs them; none: let libpq find its way."""
    if not parts.keys() & {"host", "hostaddr"} or _has_service(parts) or "PGHOSTADDR" in os.environ:
        return []
    names, addresses, ports = (parts.get(name, "").split(",") for name in ("host", "hostaddr", "port"))
    count = max(len(names), len(addresses))
    names, addresses = (part * count if part == [""] else part for part in (names, addresses))
    ports = ports * count if len(ports) == 1 else ports
    if not len(names) == len(addresses) == len(ports):
        return []  # libpq has the words for it
    return [_Host(*host) for host in zip(names, addresses, ports, strict=True)]


_Item = TypeVar("_Item")


def _shares(items: Sequence[_Item], ends: float) -> Iterator[tuple[_Item, float]]:
    """Each item with the time until when it may take, so that what is left is shared fairly by those still to come."""
    for number, item in enumerate(items):
        now = time.monotonic()
        yield item, now + max(ends - now, 0.0) / (len(items) - number)


def _verdict(
    failures: Sequence[tuple[_Host | None, DatabaseUnreachable | NotPrimary]], *, may_heal: bool
) -> DatabaseError:
    """One error for all attempts, in one line.

    Args:
        failures: where and why.
        may_heal: the dsn asks for a primary, so a lone standby is to be waited for like one of several.
    """
    reasons = list(dict.fromkeys((host, str(error)) for host, error in failures))
    if len(reasons) == 1:
        why = reasons[0][1]
        if isinstance(failures[0][1], NotPrimary) and not may_heal:
            return NotPrimary(f"{why} (let dsn name the primary, or every host of the cluster)")
        return DatabaseUnreachable(f"cannot connect: {why}")
    # libpq says where it has been, sometimes.
    told = "; ".join(f"{host}: {re.sub('^connection to server .*? failed: ', '', why)}" for host, why in reasons)
    return DatabaseUnreachable(f"cannot connect: {told}")
