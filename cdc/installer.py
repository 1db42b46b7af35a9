"""Making a database equal to the configuration: schema, triggers, positions. And saying where it is not.

One database, one transaction: Alembic to head, then the triggers of every table the YAML names (added, changed,
removed), then a first position for every new sink. All of it or nothing. A position is taken together with the
triggers, so that what is written between `cdc migrate` and the first `cdc run` is delivered too.

Locks are asked for with a short lock_timeout: CREATE TRIGGER waits for writers of the table, and everybody else would
queue up behind it. When it comes to nothing the transaction is rolled back and tried again a little later; after the
last try the error names who stands in the way.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psycopg2
import psycopg2.extensions as ext
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from psycopg2 import errors as pg
from psycopg2 import sql
from sqlalchemy import Connection as SqlConnection
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from cdc.config import Config, DatabaseConfig, TableConfig
from cdc.connection import Connection, first_line
from cdc.errors import DatabaseError, DatabaseUnreachable, InstallError, NotInstalled
from cdc.options import is_glob, split
from cdc.sql import QUERIES

log = logging.getLogger(__name__)

LOCK_TIMEOUT = 2.0
"""Seconds to wait for a table's lock, during which its writers queue up behind us."""
ATTEMPTS = 5
PAUSE = 1.0
"""Seconds between attempts."""

_TRIGGER_RIGHTS = (
    "the migration role needs CREATE on the database, TRIGGER on every captured table, and CREATEROLE or, where "
    "another role has made cdc_capture, cdc_nobody and cdc_reader, ADMIN on them (grant them, or set migrate_dsn to a "
    "role that has them)"
)


@dataclass(frozen=True, slots=True)
class Change:
    """One thing a migration did."""

    subject: str
    what: str


def migrations_directory() -> Path:
    """Where the revisions are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def head() -> str:
    """The revision this program works with."""
    return str(ScriptDirectory(str(migrations_directory())).get_current_head())


def migrate(
    name: str,
    database: DatabaseConfig,
    *,
    dsn: str,
    reader_dsn: str,
    sinks: Mapping[str, str],
    on_wait: Callable[[str], None] = log.info,
    upgrade: Callable[[SqlConnection], None] | None = None,
    triggers: bool = True,
) -> list[Change]:
    """Make one database equal to the configuration.

    Args:
        name: the database's name in the configuration.
        database: what to make it equal to.
        dsn: how to reach it as the role that migrates.
        reader_dsn: how the daemon reaches it; its role is granted cdc_reader.
        sinks: the sinks fed from it, with where each starts (``now`` or ``earliest``).
        on_wait: told why an attempt came to nothing, before the next.
        upgrade: moves the schema; None: to head.
        triggers: go on to triggers and positions, if the schema is at head then.

    Returns:
        What changed, with a line for every captured table.

    Raises:
        InstallError: nothing was changed; the message says what to do.
        DatabaseUnreachable, NotPrimary: as :class:`cdc.connection.Connection`.
    """
    migration = _Migration(name, database, sinks, _daemon_role(dsn, reader_dsn), upgrade or upgrade_to_head, triggers)
    for attempt in range(1, ATTEMPTS + 1):
        with Connection(dsn, purpose="migrate") as connection, Connection(dsn, purpose="migrate watch") as watch:
            try:
                return migration.run(connection)
            except CommandError as refusal:
                raise InstallError(
                    f"{first_line(refusal)} (if a newer cdc has migrated this database, install that one)"
                ) from None
            except (psycopg2.Error, DBAPIError) as raised:
                error = raised.orig if isinstance(raised, DBAPIError) else raised
                message = first_line(error or raised)
                if isinstance(error, pg.InsufficientPrivilege):
                    raise InstallError(f"{message}: {_TRIGGER_RIGHTS}") from None
                if connection.raw.closed:
                    raise DatabaseUnreachable(f"connection lost: {message}") from None
                if not isinstance(error, pg.LockNotAvailable | pg.DeadlockDetected):
                    raise InstallError(message) from None
                reason = f"a lock could not be had in {LOCK_TIMEOUT:g} s: {_in_the_way(watch, migration.at)}"
                if attempt == ATTEMPTS:
                    raise InstallError(f"{reason}; nothing was changed (run `cdc migrate` again later)") from None
                on_wait(f"{name}: {reason}; trying again")
        time.sleep(PAUSE)
    raise AssertionError("unreachable")


@dataclass(slots=True)
class _Migration:
    """What is to be done to one database, in one transaction.

    Attributes:
        at: the table being worked on, as its oid and name; whose lock it is that could not be had.
    """

    name: str
    database: DatabaseConfig
    sinks: Mapping[str, str]
    daemon_role: str | None
    upgrade: Callable[[SqlConnection], None]
    triggers: bool
    at: tuple[int, str] | None = None

    def run(self, connection: Connection) -> list[Change]:
        """All of it or nothing; raises what the server says."""
        self.at = None
        with _transaction(connection) as transaction, connection.raw.cursor() as cursor:
            cursor.execute("select set_config('lock_timeout', %s, true)", (f"{LOCK_TIMEOUT:g}s",))
            # Two migrations at once would only trip over each other.
            cursor.execute("select pg_advisory_xact_lock(6513765, 1)")
            before = _revision(transaction)
            self.upgrade(transaction)
            after = _revision(transaction)
            changes = []
            if before != after:
                changes.append(Change("schema cdc", f"revision {before or 'none'} → {after or 'none'}"))
            if self.triggers and after == head():
                cursor.execute(
                    "update cdc.installation set database_name = %(name)s where database_name <> %(name)s",
                    {"name": self.name},
                )
                changes += [*self._reconcile(cursor), *self._register_sinks(cursor), *self._grant_reader(cursor)]
            return changes

    def _reconcile(self, cursor: ext.cursor) -> Iterator[Change]:
        """Make the triggers equal to the configuration."""
        cursor.execute(QUERIES["candidate_tables"])
        targets = resolve(cursor.fetchall(), self.database)
        for target in targets:
            self.at = (target.oid, target.name)
            try:
                cursor.execute(QUERIES["enable_capture"], _arguments(target, self.database))
            except (pg.WrongObjectType, pg.UndefinedColumn, pg.InvalidParameterValue) as error:
                raise InstallError(first_line(error)) from None
            yield Change(target.name, _fetch_text(cursor))
        wanted = {target.oid for target in targets}
        cursor.execute(QUERIES["captured"])
        for relation, schema, table in cursor.fetchall():
            if relation not in wanted:
                self.at = (relation, f"{schema}.{table}")
                cursor.execute("select cdc.disable_capture(%s::oid::regclass)", (relation,))
                yield Change(f"{schema}.{table}", _fetch_text(cursor))
        self.at = None

    def _register_sinks(self, cursor: ext.cursor) -> Iterator[Change]:
        for sink, start in self.sinks.items():
            cursor.execute(QUERIES["register_sink"], {"sink": sink, "start": start})
            if cursor.fetchall():
                yield Change(f"sink {sink}", f"starts {'here' if start == 'now' else 'at the earliest event'}")

    def _grant_reader(self, cursor: ext.cursor) -> Iterator[Change]:
        """Make the daemon's role a member of cdc_reader, where it is another than the one that migrates."""
        cursor.execute(
            "select pg_has_role(rolname, 'cdc_reader', 'member') from pg_roles"
            " where rolname = %s and rolname <> current_user",
            (self.daemon_role,),
        )
        if cursor.fetchone() == (False,):
            cursor.execute(sql.SQL("grant cdc_reader to {}").format(sql.Identifier(self.daemon_role or "")))
            yield Change(f"role {self.daemon_role}", "granted cdc_reader")


def _daemon_role(dsn: str, reader_dsn: str) -> str | None:
    """The daemon's role, where it has a connection string of its own."""
    if reader_dsn == dsn:
        return None
    try:
        # Asking the server knows of PGUSER, service files and the like.
        with Connection(reader_dsn, purpose="migrate") as connection:
            return connection.raw.info.user
    except DatabaseError:
        return ext.parse_dsn(reader_dsn).get("user")


@contextmanager
def _transaction(connection: Connection) -> Iterator[SqlConnection]:
    """A transaction on our session that SQLAlchemy, and so Alembic, can work in; committed at the end."""
    connection.raw.autocommit = False
    connection.wait_forever()  # waiting for locks is bounded by lock_timeout
    engine = create_engine("postgresql+psycopg2://", creator=lambda: connection.raw, poolclass=NullPool)
    sql_connection = engine.connect()
    try:
        yield sql_connection
        connection.raw.commit()
    except BaseException:
        if not connection.raw.closed:
            connection.raw.rollback()
        raise
    finally:
        if not sql_connection.invalidated:
            sql_connection.detach()


def alembic_config(**attributes: object) -> AlembicConfig:
    """Alembic's configuration for our revisions, run in-process."""
    config = AlembicConfig()
    config.set_main_option("script_location", str(migrations_directory()))
    config.attributes.update(attributes)
    return config


def upgrade_to_head(transaction: SqlConnection) -> None:
    """Run our revisions, in-process, inside the caller's transaction."""
    command.upgrade(alembic_config(connection=transaction), "head")


def _revision(transaction: SqlConnection) -> str | None:
    if transaction.exec_driver_sql("select to_regclass('cdc.alembic_version')").scalar() is None:
        return None
    value = transaction.exec_driver_sql(QUERIES["revision"]).scalar()
    return None if value is None else str(value)


# -- triggers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """A table the configuration wants captured."""

    oid: int
    schema: str
    table: str
    options: TableConfig

    @property
    def name(self) -> str:
        return f"{self.schema}.{self.table}"


def resolve(candidates: Iterable[tuple[Any, ...]], database: DatabaseConfig) -> list[Target]:
    """The tables the configuration's patterns stand for.

    Args:
        candidates: what there is, from the query ``candidate_tables``.
        database: the configuration.

    Raises:
        InstallError: names that are not there, all of them.
    """
    found = {(schema, table): (oid, plain) for oid, schema, table, plain in candidates}
    missing = [p for p in database.tables if not is_glob(p) and split(p) not in found]
    if missing:
        raise InstallError(
            "; ".join(f"{pattern}: no such table" for pattern in missing) + " (correct `tables`, or create it first)"
        )
    targets = []
    for (schema, table), (oid, plain) in found.items():
        options = database.options_for(schema, table)
        named = any(not is_glob(p) and split(p) == (schema, table) for p in database.tables)
        # A glob means ordinary tables; naming anything else is for cdc.capture_plan to refuse, with the reason.
        if options is not None and (plain or named):
            targets.append(Target(oid, schema, table, options))
    return sorted(targets, key=lambda target: target.name)


def _arguments(target: Target, database: DatabaseConfig) -> dict[str, object]:
    options = target.options
    return {
        "relation": target.oid,
        "ops": list(options.ops),
        "image": options.image,
        "key": list(options.key) if options.key else None,
        "always": options.always,
        # Where the notification is the event, the trigger rings whatever the bell's mode.
        "notify": "ephemeral" if options.delivery == "ephemeral" else database.notify,
        "notify_payload": database.notify_payload,
        "channel": database.channel,
        "exclude": list(options.exclude),
        "mask": json.dumps(options.mask),
        "conditions": json.dumps(options.when),
        # What a glob says is meant for many tables, some of which do not have the column.
        "lenient": not database.names(target.schema, target.table),
    }


def _fetch_text(cursor: ext.cursor) -> str:
    row = cursor.fetchone()
    return str(row[0]) if row else ""


def _in_the_way(watch: Connection, table: tuple[int, str] | None) -> str:
    """Who holds the lock that could not be had, for people."""
    if table is None:
        return "another migration is at work on this database or its cluster"
    relation, name = table
    holders = watch.query(QUERIES["in_the_way"], {"relation": relation})
    if not holders:
        return f"{name} was in use by somebody who has ended meanwhile"
    return "; ".join(
        f"{name} is in use by pid {pid} ({who}, {state}, for {age:.0f} s)" for pid, who, state, age in holders
    )


# -- drift ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drift:
    """A table whose triggers are not what the configuration says."""

    table: str
    state: Literal["missing", "outdated", "unmanaged"]


def installed_revision(connection: Connection) -> str | None:
    """The revision of schema cdc in this database, None without one. Raises as Connection.query."""
    try:
        rows = connection.query(QUERIES["revision"])
    except NotInstalled:
        return None
    return str(rows[0][0]) if rows else None


def find_drift(connection: Connection, database: DatabaseConfig) -> list[Drift]:
    """Where the triggers of a database differ from the configuration; takes no lock, changes nothing.

    Raises:
        InstallError: a table that is not there, or that cannot be captured.
        DatabaseError: as Connection.query.
    """
    targets = resolve(connection.query(QUERIES["candidate_tables"]), database)
    drifts = []
    for target in targets:
        try:
            state = connection.query(QUERIES["capture_state"], _arguments(target, database))[0][0]
        except DatabaseError as error:
            raise InstallError(str(error)) from None
        if state != "installed":
            drifts.append(Drift(target.name, state))
    wanted = {target.oid for target in targets}
    drifts += [
        Drift(f"{schema}.{table}", "unmanaged")
        for relation, schema, table in connection.query(QUERIES["captured"])
        if relation not in wanted
    ]
    return drifts


def sinks_of(config: Config, database: str) -> dict[str, str]:
    """The sinks fed from a database, with where each starts."""
    return {
        name: options.start
        for name, options in config.sinks.items()
        if options.databases is None or database in options.databases
    }
