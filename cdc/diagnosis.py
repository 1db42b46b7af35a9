"""What is wrong, and where everything stands: the findings of `cdc check` and the figures of `cdc status`.

Both look at every database at once, change nothing, and go on where a daemon would give up: a database that cannot be
reached, has no schema or refuses our role is a line of the report, and the others are reported all the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeVar

from cdc import backfill, inventory, listener, outbox
from cdc.backfill import Backfill
from cdc.config import Config, DatabaseConfig
from cdc.connection import OLDEST_SERVER, Connection
from cdc.errors import CdcError, DatabaseUnreachable, InstallError, NotInstalled, NotPrimary
from cdc.inventory import Drift
from cdc.options import is_glob, matches, split
from cdc.outbox import OpenTransaction, SinkStatus
from cdc.sql import QUERIES

NEWEST_SERVER = 18
_AT_ONCE = 16

REPLACED = "is not the one that cdc migrate has installed"

Level = Literal["ok", "note", "warning", "error"]
_ResultT = TypeVar("_ResultT")


# -- check ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing `cdc check` has to say.

    Attributes:
        database: its name in the configuration.
        subject: the table, role, setting or key it is about; None: the database as a whole.
        cure: what to do about it, or None.
        unreachable: the database could not be reached; waiting may mend it.
    """

    database: str
    level: Level
    subject: str | None
    message: str
    cure: str | None = None
    unreachable: bool = False


def check(config: Config, names: Sequence[str], dsns: Mapping[str, tuple[str, str]]) -> list[Finding]:
    """Look whether the databases can be served as the configuration wants it.

    Args:
        config: the whole configuration.
        names: the databases to look at.
        dsns: database name → how the daemon and how a migration reaches it.

    Returns:
        By database, in the order of `names`, what is fine first.
    """
    head = inventory.head()

    def one(name: str) -> list[Finding]:
        return _Checkup(name, config.databases[name], len(inventory.sinks_of(config, name)), head).run(*dsns[name])

    return [finding for findings in _all_at_once(one, names) for finding in findings]


class _Checkup:
    """The look at one database."""

    def __init__(self, name: str, options: DatabaseConfig, sinks: int, head: str) -> None:
        self._name = name
        self._options = options
        self._sinks = sinks
        self._head = head
        self._findings: list[Finding] = []

    def run(self, dsn: str, migrate_dsn: str) -> list[Finding]:
        place = summary = None
        try:
            with Connection(dsn, purpose="check") as connection:
                place = connection.query(QUERIES["same_place"])
                summary = self._database(connection, dsn)
        except CdcError as error:
            self._failed("dsn", error)
        if migrate_dsn != dsn:
            try:
                with Connection(migrate_dsn, purpose="check") as connection:
                    if place and connection.query(QUERIES["same_place"]) != place:
                        self._add("error", "migrate_dsn", "is another database than dsn", "let both name the same one")
            except CdcError as error:
                self._failed("migrate_dsn", error)
        if summary and not any(finding.level == "error" for finding in self._findings):
            self._findings.insert(0, Finding(self._name, "ok", None, summary))
        return self._findings

    def _add(self, level: Level, subject: str | None, message: str, cure: str | None = None) -> None:
        self._findings.append(Finding(self._name, level, subject, message, cure))

    def _failed(self, key: str, error: CdcError) -> None:
        subject = None if key == "dsn" else key
        unreachable = isinstance(error, DatabaseUnreachable)
        message, cure = _parted(str(error))
        if unreachable:
            message = str(error)
            where = f" at {self._options.describe()}" if key == "dsn" else ""
            cure = _cure_of_connecting(message, f"databases.{self._name}.{key}", where)
        self._findings.append(Finding(self._name, "error", subject, message, cure, unreachable))

    def _database(self, connection: Connection, dsn: str) -> str | None:
        """Look at all of it; returns the line for when all of it is fine, None when there is no looking further."""
        version, encoding, role, prepared, queue_usage, sees_all = connection.query(QUERIES["server_facts"])[0]
        version = version.split()[0]
        major = connection.server_version // 10000
        if major > NEWEST_SERVER:
            self._add(
                "warning",
                None,
                f"PostgreSQL {version} is newer than this program knows ({OLDEST_SERVER} to {NEWEST_SERVER})",
                "look for a newer cdc",
            )
        self._settings(connection, encoding, prepared, queue_usage)
        if not self._sinks:
            self._add("warning", "sinks", "no sink is fed from this database", "add it to a sink's `databases`")
        candidates = _candidates(connection)
        self._tables(connection, candidates)
        captured = self._schema(connection, role, sees_all, candidates)
        if self._options.notify != "off" or connection.pooled:
            self._bell(connection, dsn)
        if captured is None:
            return None
        return (
            f"PostgreSQL {version}, revision {self._head}, {_count(captured, 'table')} captured, "
            f"{_count(self._sinks, 'sink')}"
        )

    def _settings(self, connection: Connection, encoding: str, prepared: int, queue_usage: float) -> None:
        if encoding != "UTF8":
            reason = (
                "the server takes any bytes, and events are UTF-8: a row that is not becomes a dead letter"
                if encoding == "SQL_ASCII"
                else "events are UTF-8: a row with a character that has no counterpart there becomes a dead letter"
            )
            self._add("warning", "server_encoding", f"is {encoding}: {reason}", "recreate the database as UTF8")
        if prepared > 0 and self._options.notify != "off":
            self._add(
                "note",
                "max_prepared_transactions",
                "is above 0: PREPARE TRANSACTION fails in a transaction that has rung",
                "set notify: off where two-phase commit writes to captured tables",
            )
        for where in connection.query(QUERIES["replica_defaults"]):
            self._add(
                "warning",
                "session_replication_role",
                f"is replica for {where[0]}: changes made there are not captured",
                "reset it, or set always: true on the tables",
            )
        if queue_usage > listener.QUEUE_LIMIT:
            self._add(
                "warning",
                "notification queue",
                f"is {queue_usage:.0%} full; at 100% every NOTIFY fails, and with it the writers' commits",
                "end the session that listens and does not read; the server's log names its pid",
            )

    def _tables(self, connection: Connection, candidates: Sequence[_Candidate]) -> None:
        for pattern in self._options.tables:
            if is_glob(pattern) and not any(c.plain and matches(pattern, c.schema, c.table) for c in candidates):
                self._add("warning", f"tables.{pattern}", "matches no table", "correct it, or create the tables first")
        wanted = _wanted(candidates, self._options)
        for candidate in wanted:
            options = self._options.options_for(candidate.schema, candidate.table)
            if candidate.plain and not candidate.has_key and options is not None and not options.key:
                self._add(
                    "note",
                    candidate.name,
                    "has no primary key: its events carry no key, and no order is promised for the changes of a row",
                    "add one, or name the identifying columns under `key`",
                )
        names = {(candidate.schema, candidate.table) for candidate in wanted}
        for schema, table in connection.query(QUERIES["deferrable_keys"]):
            if (schema, table) in names:
                self._add(
                    "note",
                    f"{schema}.{table}",
                    "has a deferrable primary key: for a while two rows may have the same one, and between the changes "
                    "of the two no order is promised",
                    "make it NOT DEFERRABLE where that matters",
                )
        for schema, table, *child in connection.query(QUERIES["inheriting_tables"]):
            if (schema, table) in names and tuple(child) not in names:
                self._add(
                    "note",
                    f"{schema}.{table}",
                    f"rows of {'.'.join(child)}, which inherits from it, are not captured with it",
                    "name that table too",
                )

    def _schema(
        self, connection: Connection, role: str, sees_all: bool, candidates: Sequence[_Candidate]
    ) -> int | None:
        """Privileges, revision, triggers; the number of captured tables, None when it cannot be known."""
        missing = [(privilege, object_) for privilege, object_ in connection.query(QUERIES["missing_privileges"])]
        subject = f"role {role}"
        if ("usage", "schema cdc") in missing:
            # Everything else may still be granted, but nothing of it is of use.
            self._add("error", subject, "may not use schema cdc", f"grant cdc_reader to {role}, or run cdc migrate")
            return None
        for privilege, object_ in missing:
            self._add("error", subject, f"lacks {privilege} on {object_}", _cure_of_privilege(privilege, object_, role))
        if ("select", "table cdc.alembic_version") in missing:
            return None
        revision = inventory.installed_revision(connection)
        if revision is None:
            self._add("error", None, "cdc is not installed", "run cdc migrate")
            return None
        if revision != self._head:
            self._add("error", None, f"schema cdc is at revision {revision}, not {self._head}", "run cdc migrate")
            return None
        if missing:
            return None  # what follows may need just that
        if not sees_all:
            self._add(
                "note",
                subject,
                "cannot see how long transactions of other roles have been open",
                f"grant pg_read_all_stats to {role}",
            )
        if moved := outbox.moved_sinks(connection):
            self._add("error", f"sink {', '.join(moved)}", outbox.ELSEWHERE, outbox.ELSEWHERE_CURE)
        if (size := outbox.size(connection)) > self._options.outbox_alarm:
            self._add(
                "warning",
                "outbox",
                f"takes {size} bytes on disk, more than outbox_alarm allows",
                "look at cdc status for the sink that is behind or the transaction that is open",
            )
        self._triggers(connection, candidates)
        return len(connection.query(QUERIES["captured"]))

    def _triggers(self, connection: Connection, candidates: Sequence[_Candidate]) -> None:
        for name in inventory.replaced_functions(connection):
            self._add("error", f"function {name}", REPLACED, "run cdc migrate, which puts it back")
        drifts, problems = _drift(connection, self._options, candidates)
        disabled = _disabled(connection)
        for problem in problems:
            message, cure = _parted(problem)
            self._add("error", "tables", message, cure or "correct `tables`")
        for drift in drifts:
            cure = "run cdc migrate, which removes the trigger, or add it to `tables`"
            message = _told(drift, disabled)
            self._add("error", drift.table, message, cure if drift.state == "unmanaged" else "run cdc migrate")

    def _bell(self, connection: Connection, dsn: str) -> None:
        if not listener.hears_itself(connection, self._options.channel, dsn):
            self._add(
                "error",
                f"channel {self._options.channel}",
                listener.DEAF,
                listener.DEAF_CURE,
            )


# -- status -----------------------------------------------------------------------------------------------------

DatabaseState = Literal["ok", "unreachable", "standby", "not installed", "wrong revision", "error"]


@dataclass(frozen=True, slots=True)
class SinkLine:
    """One sink as `cdc status` shows it.

    Attributes:
        state: ``running``, ``retrying``, ``dropping``, ``stopped``: as its pipeline says; ``down``: nobody serves it;
            ``new``: it has no position yet; ``unknown``: the configuration no longer has it.
        detail: what the database knows; None for a sink without a position.
        backfills: those that are not over, and those that have failed; of each table the last one.
    """

    state: str
    detail: SinkStatus | None = None
    backfills: Sequence[Backfill] = ()


@dataclass(frozen=True, slots=True)
class DatabaseStatus:
    """One database as `cdc status` shows it; what could not be read is None.

    Attributes:
        state: ``ok``, or why the rest is missing.
        error: the same as a sentence, with the cure.
        revision: of schema cdc.
        outbox_held_by: sinks with events older than `retention` to deliver: the outbox cannot be given back before.
        notify_queue_usage: how full the cluster's notification queue is, 0 to 1.
        drift: tables whose triggers are not what the configuration says, and functions that were replaced.
        problems: what needs somebody's attention, such as what keeps a table from being captured; a sentence each.
    """

    state: DatabaseState
    error: str | None = None
    revision: str | None = None
    armed: bool | None = None
    outbox_bytes: int | None = None
    outbox_held_by: Sequence[str] = ()
    notify_queue_usage: float | None = None
    oldest_transaction: OpenTransaction | None = None
    drift: int | None = None
    problems: Sequence[str] = ()
    sinks: Mapping[str, SinkLine] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """The documented shape of `cdc status --json`; times in ISO 8601, durations in seconds."""
        oldest = self.oldest_transaction
        return {
            "state": self.state,
            "error": self.error,
            "revision": self.revision,
            "armed": self.armed,
            "outbox_bytes": self.outbox_bytes,
            "outbox_held_by": list(self.outbox_held_by),
            "notify_queue_usage": self.notify_queue_usage,
            "oldest_transaction": oldest
            and {
                "pid": oldest.pid,
                "prepared": oldest.prepared,
                "application": oldest.application,
                "state": oldest.state,
                "database": oldest.database,
                "age_seconds": None if oldest.age is None else round(oldest.age, 3),
            },
            "drift": self.drift,
            "problems": list(self.problems),
            "sinks": {name: _sink_json(line) for name, line in self.sinks.items()},
        }


def status(config: Config, names: Sequence[str], dsns: Mapping[str, str]) -> dict[str, DatabaseStatus]:
    """Where the databases and their sinks stand.

    Args:
        config: the whole configuration.
        names: the databases to look at.
        dsns: database name → how the daemon reaches it.
    """
    head = inventory.head()

    def one(name: str) -> DatabaseStatus:
        try:
            with Connection(dsns[name], purpose="status") as connection:
                return _status(connection, config.databases[name], list(inventory.sinks_of(config, name)), head)
        except CdcError as error:
            state, text = _state_of(error), str(error)
            if state == "unreachable":
                where = f" at {config.databases[name].describe()}"
                text = f"{text} ({_cure_of_connecting(text, f'databases.{name}.dsn', where)})"
            elif state == "error" and not _parted(text)[1]:
                text = f"{text} (run cdc check)"
            return DatabaseStatus(state, text)

    return dict(zip(names, _all_at_once(one, names), strict=True))


def _status(connection: Connection, options: DatabaseConfig, sinks: Sequence[str], head: str) -> DatabaseStatus:
    revision = inventory.installed_revision(connection)
    if revision is None:
        raise NotInstalled("cdc is not installed in this database (run cdc migrate)")
    if revision != head:
        reason = f"schema cdc is at revision {revision}, this program needs {head} (run cdc migrate)"
        return DatabaseStatus("wrong revision", reason, revision)
    known = {sink.name: sink for sink in outbox.sink_statuses(connection)}
    lines = {name: SinkLine("new") for name in sinks if name not in known}
    under_way: dict[str, list[Backfill]] = {}
    for one in backfill.backfills(connection):
        if one.state in ("running", "paused", "failed"):
            under_way.setdefault(one.sink, []).append(one)
    lines |= {
        name: SinkLine(_shown_state(sink, configured=name in sinks), sink, under_way.get(name, ()))
        for name, sink in known.items()
    }
    drifts, problems = _drift(connection, options, _candidates(connection))
    replaced = inventory.replaced_functions(connection)
    if moved := outbox.moved_sinks(connection):
        problems.append(f"{outbox.ELSEWHERE}: {', '.join(moved)} ({outbox.ELSEWHERE_CURE})")
    pulse = outbox.pulse(connection)
    if pulse.outbox_bytes > options.outbox_alarm:
        problems.append(f"the outbox takes {pulse.outbox_bytes} bytes on disk, more than outbox_alarm allows")
    return DatabaseStatus(
        "ok",
        revision=revision,
        armed=pulse.armed,
        outbox_bytes=pulse.outbox_bytes,
        outbox_held_by=[name for name, sink in known.items() if sink.lag > options.retention],
        notify_queue_usage=pulse.queue_usage,
        oldest_transaction=pulse.oldest,
        drift=len(drifts) + len(replaced),
        problems=problems,
        sinks={name: lines[name] for name in sorted(lines)},
    )


def _shown_state(sink: SinkStatus, *, configured: bool) -> str:
    if not configured:
        return "unknown"
    if sink.state == "stopped":
        return sink.state
    if sink.paused and (sink.state == "paused" or not sink.served):
        return "paused"
    return sink.state if sink.served and not is_silent(sink) else "down"


def is_silent(sink: SinkStatus) -> bool:
    """Whether the daemon that serves a sink is stopped or cut off: its session is there, and it is not."""
    return sink.silent_for is not None and sink.silent_for > outbox.LEASE


def _sink_json(line: SinkLine) -> dict[str, object]:
    sink = line.detail
    if sink is None:
        return {
            "state": line.state,
            "backfills": [],
            "pending": None,
            "pending_capped": False,
            "lag_seconds": None,
            "delivered_at": None,
            "last_error": None,
            "last_error_at": None,
            "dead_letters": 0,
            "dropped": 0,
            "parked": 0,
            "paused": False,
            "state_since": None,
            "owner": None,
        }
    return {
        "state": line.state,
        "backfills": [one.to_json() for one in line.backfills],
        "pending": sink.pending,
        "pending_capped": sink.capped,
        "lag_seconds": round(sink.lag, 3),
        "delivered_at": _iso(sink.delivered_at),
        "last_error": sink.last_error,
        "last_error_at": _iso(sink.last_error_at),
        "dead_letters": sink.dead_letters,
        "dropped": sink.dropped,
        "parked": sink.parked,
        "paused": sink.paused,
        "state_since": _iso(sink.state_since),
        "owner": sink.owner,
    }


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat().replace("+00:00", "Z")


def _state_of(error: CdcError) -> DatabaseState:
    if isinstance(error, DatabaseUnreachable):
        return "unreachable"
    if isinstance(error, NotPrimary):
        return "standby"
    return "not installed" if isinstance(error, NotInstalled) else "error"


# -- what both need ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Something that could be named under `tables`.

    Attributes:
        plain: whether a glob may mean it.
    """

    schema: str
    table: str
    plain: bool
    has_key: bool

    @property
    def name(self) -> str:
        return f"{self.schema}.{self.table}"


def _candidates(connection: Connection) -> list[_Candidate]:
    return [_Candidate(*row) for row in connection.query(QUERIES["candidate_keys"])]


def _wanted(candidates: Sequence[_Candidate], options: DatabaseConfig) -> list[_Candidate]:
    """Those the configuration wants captured; as :func:`cdc.inventory.resolve` sees it."""
    named = {split(pattern) for pattern in options.tables if not is_glob(pattern)}
    return [
        c
        for c in candidates
        if (c.plain or (c.schema, c.table) in named) and options.options_for(c.schema, c.table) is not None
    ]


def _drift(
    connection: Connection, options: DatabaseConfig, candidates: Sequence[_Candidate]
) -> tuple[list[Drift], list[str]]:
    """Where the triggers differ, and what keeps tables from being captured at all.

    Raises:
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    try:
        return inventory.find_drift(connection, options), []
    except InstallError:
        pass
    # One table of the configuration is wrong; to hear of the others too each is asked for alone.
    there = {(c.schema, c.table) for c in candidates}
    problems = [
        f"{pattern}: no such table (correct `tables`, or create it first)"
        for pattern in options.tables
        if not is_glob(pattern) and split(pattern) not in there
    ]
    drifts: list[Drift] = []
    wanted = _wanted(candidates, options)
    for candidate in wanted:
        alone = {_quoted(candidate): options.options_for(candidate.schema, candidate.table)}
        try:
            found = inventory.find_drift(connection, options.model_copy(update={"tables": alone}))
        except InstallError as error:
            problems.append(str(error))
        else:
            drifts += [drift for drift in found if drift.state != "unmanaged"]
    names = {candidate.name for candidate in wanted}
    everything = inventory.find_drift(connection, options.model_copy(update={"tables": {}}))
    return drifts + [drift for drift in everything if drift.table not in names], problems


def find_drift(connection: Connection, options: DatabaseConfig) -> list[str]:
    """Where a database differs from what `cdc migrate` would make it, one sentence each, for the daemon.

    Raises:
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    drifts, problems = _drift(connection, options, _candidates(connection))
    disabled = _disabled(connection)
    replaced = [f"function {name}: {REPLACED}" for name in inventory.replaced_functions(connection)]
    return [*problems, *replaced, *(f"{drift.table}: {_told(drift, disabled)}" for drift in drifts)]


def _disabled(connection: Connection) -> set[str]:
    return {row[0] for row in connection.query(QUERIES["disabled_captures"])}


def _told(drift: Drift, disabled: Collection[str]) -> str:
    if drift.table in disabled and drift.state == "outdated":
        return "trigger is disabled: changes are not captured"
    return {
        "missing": "trigger is missing",
        "outdated": "trigger differs from the configuration",
        "unmanaged": "is captured, and the configuration does not name it",
    }[drift.state]


def _quoted(candidate: _Candidate) -> str:
    return ".".join('"' + part.replace('"', '""') + '"' for part in (candidate.schema, candidate.table))


def _all_at_once(look: Callable[[str], _ResultT], names: Sequence[str]) -> list[_ResultT]:
    """One result for each name; a server that does not answer costs its deadline once, not once per database."""
    with ThreadPoolExecutor(max_workers=_AT_ONCE, thread_name_prefix="look") as pool:
        return list(pool.map(look, names))


def _parted(text: str) -> tuple[str, str | None]:
    """An error's text as message and cure; this package's errors end in ``(what to do)``."""
    found = re.fullmatch(r"(.+?) \((.+)\)", text, re.DOTALL)
    return (found[1], found[2]) if found else (text, None)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cure_of_privilege(privilege: str, object_: str, role: str) -> str:
    # "table cdc.sink" is "cdc.sink" to GRANT, and a function would need its argument types.
    if object_.startswith("function"):
        return "run cdc migrate"
    return f"run cdc migrate, or: grant {privilege} on {object_} to {role}"


def _cure_of_connecting(message: str, key: str, where: str) -> str:
    """What to do about a failed connection; `where` is `` at …`` or nothing: libpq does not always name the server."""
    for sign, cure in (
        ("password authentication failed", f"correct user and password in {key}"),
        ("no password supplied", f"add the password to {key} or to ~/.pgpass"),
        ("pg_hba.conf", "let the server's pg_hba.conf admit this host, user and database"),
        ("does not exist", f"create it, or correct {key}"),
        ("could not translate host name", f"correct the host in {key}"),
        ("Connection refused", f"start the server{where}, or correct {key}"),
        ("No such file or directory", f"start the server{where}, or correct {key}"),
        ("no answer in time", f"look at the network between here and the server{where}"),
        ("connection slots", "raise max_connections, or end sessions that are not needed"),
        ("too many", "raise the limit, or end sessions that are not needed"),
        ("starting up", "try again in a moment"),
        ("shutting down", "try again when the server is back"),
    ):
        if sign in message:
            return cure
    return f"look into the log of the server{where}, or correct {key}"
