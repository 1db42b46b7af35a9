"""Making a database equal to the configuration: schema, triggers, positions. Saying where it is not, and undoing it.

One database, one transaction: functions that somebody has replaced are put back, Alembic to head, then the triggers of
every table the YAML names (added, changed, removed), then a first position for every new sink. All of it or nothing. A
position is taken together with the triggers, so that what is written between `cdc migrate` and the first `cdc run` is
delivered too.

Locks are asked for with a short lock_timeout: CREATE TRIGGER waits for writers of the table, and everybody else would
queue up behind it. When it comes to nothing the transaction is rolled back and tried again a little later; after the
last try the error names who stands in the way. `uninstall` goes the same way.

A schema called cdc need not be ours: it may be the application's, or somebody's who would like to have the rights of
the role that migrates, and has put functions there for it to run. So before anything in it is read, let alone called,
the catalogue has to say that the schema belongs to this very role and holds nothing, or our version table; and what is
dropped with it is only what our revisions make.

No statement is waited for without end: one of a revision `REVISIONS_DEADLINE`, any other `STATEMENT_DEADLINE`.

Several databases may be migrated at once, by threads of one process. But Alembic's ``op`` and ``context`` exist once in
a process, so revisions are run by one thread at a time; a database at head has none to run, and waits for nobody.
"""

from __future__ import annotations

import io
import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import psycopg2
import psycopg2.extensions as ext
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from psycopg2 import errors as pg
from psycopg2 import sql
from sqlalchemy import Connection as SqlConnection
from sqlalchemy import create_engine
from sqlalchemy.engine.mock import MockConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from cdc import outbox
from cdc.config import DatabaseConfig
from cdc.connection import Connection, first_line
from cdc.errors import DatabaseError, DatabaseUnreachable, InstallError, NotInstalled
from cdc.inventory import Target, arguments, head, migrations_directory, resolve
from cdc.sql import QUERIES

log = logging.getLogger(__name__)

LOCK_TIMEOUT = 2.0
"""Seconds to wait for a table's lock, during which its writers queue up behind us."""
ATTEMPTS = 5
PAUSE = 1.0
"""Seconds between attempts."""
STATEMENT_DEADLINE = 60.0
"""Seconds until a server that does not answer is given up: to capture a table with many partitions takes a while."""
REVISIONS_DEADLINE = 30 * 60.0
"""The same for a statement of a revision, which may be a whole script, over a large outbox."""

ROLES = ("cdc_capture", "cdc_nobody", "cdc_reader")
"""What belongs to the cluster, and so to all of its databases together."""

STARTS = {"now": "here", "earliest": "at the earliest event", "backfill": "here, with the rows there are"}
"""Where a new sink starts, in words."""

BEGIN = """
set local search_path = pg_catalog, pg_temp;
select set_config('lock_timeout', %(lock_timeout)s, true);
select pg_advisory_xact_lock(6513765, 1)
"""
"""How the transaction begins, of the script too. Two migrations of one database would only trip over each other."""

_ALEMBIC = threading.Lock()
"""Held by whoever runs revisions."""

_TRIGGER_RIGHTS = (
    "the migration role needs CREATE on the database, CREATEROLE or, where another role has made cdc_capture, "
    "cdc_nobody and cdc_reader, ADMIN on them, and of every captured table USAGE on its schema and TRIGGER on it and "
    "its partitions; to remove a trigger, or for always, it must own the table (grant them, or set migrate_dsn to a "
    "role that has them)"
)
_REMOVAL_RIGHTS = (
    "the role that uninstalls must own schema cdc and the captured tables (set migrate_dsn to one that does)"
)


@dataclass(frozen=True, slots=True)
class Change:
    """One thing a migration, or its undoing, did."""

    subject: str
    what: str


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
    schema_only: bool = False,
) -> list[Change]:
    """Make one database equal to the configuration.

    Args:
        name: the database's name in the configuration.
        database: what to make it equal to.
        dsn: how to reach it as the role that migrates.
        reader_dsn: how the daemon reaches it; its role is granted cdc_reader.
        sinks: the sinks fed from it, with where each starts (see `STARTS`).
        on_wait: told why an attempt came to nothing, before the next; may raise, so that there is none.
        upgrade: moves the schema; None: to head.
        triggers: go on to triggers and positions, if the schema is at head then.
        schema_only: leave the triggers to somebody else; whether the tables are there is no matter then.

    Returns:
        What changed, with a line for every captured table.

    Raises:
        InstallError: nothing was changed; the message says what to do.
        DatabaseUnreachable, NotPrimary: as :class:`cdc.connection.Connection`.
    """
    migration = _Migration(name, database, sinks, daemon_role(dsn, reader_dsn), upgrade, triggers, schema_only)
    return _attempt(name, dsn, migration, on_wait)


class _Work(Protocol):
    """What is to be done to one database, in one transaction.

    Attributes:
        command: which command does it.
        rights: what its role needs, for people.
        at: the table being worked on, as its oid and name; whose lock it is that could not be had.
    """

    command: ClassVar[str]
    rights: ClassVar[str]
    at: tuple[int, str] | None

    def run(self, connection: Connection) -> list[Change]:
        """All of it or nothing; raises what the server says."""


def _attempt(name: str, dsn: str, work: _Work, on_wait: Callable[[str], None]) -> list[Change]:
    """Do it; after some attempts that came to nothing, say who is in the way. All else as for :func:`migrate`."""
    for attempt in range(1, ATTEMPTS + 1):
        with (
            Connection(dsn, purpose=work.command) as connection,
            Connection(dsn, purpose=f"{work.command} watch") as watch,
        ):
            try:
                return work.run(connection)
            except CommandError as refusal:
                raise _unknown_revision(refusal) from None
            except DatabaseUnreachable as late:
                raise DatabaseUnreachable(f"connection lost: {late}") from None
            except (psycopg2.Error, DBAPIError) as raised:
                error = raised.orig if isinstance(raised, DBAPIError) else raised
                message = first_line(error or raised)
                if isinstance(error, pg.InsufficientPrivilege):
                    raise InstallError(f"{message}: {work.rights}") from None
                if connection.raw.closed:
                    raise DatabaseUnreachable(f"connection lost: {message}") from None
                if isinstance(error, pg.UniqueViolation):  # before PostgreSQL 16 a grant does not wait for another
                    reason = f"another migration of the same cluster was faster: {message}"
                elif isinstance(error, pg.LockNotAvailable | pg.DeadlockDetected):
                    reason = f"a lock could not be had in {LOCK_TIMEOUT:g} s: {_in_the_way(watch, work.at)}"
                else:
                    raise InstallError(message) from None
                if attempt == ATTEMPTS:
                    raise InstallError(
                        f"{reason}; nothing was changed (run `cdc {work.command}` again later)"
                    ) from None
                on_wait(f"{name}: {reason}; trying again")
        time.sleep(PAUSE)
    raise AssertionError("unreachable")


def _unknown_revision(refusal: CommandError) -> InstallError:
    return InstallError(f"{first_line(refusal)} (if a newer cdc has migrated this database, install that one)")


@dataclass(slots=True)
class _Migration:
    """Making one database equal to the configuration; see :func:`migrate`."""

    command: ClassVar[str] = "migrate"
    rights: ClassVar[str] = _TRIGGER_RIGHTS

    name: str
    database: DatabaseConfig
    sinks: Mapping[str, str]
    daemon_role: str | None
    upgrade: Callable[[SqlConnection], None] | None
    triggers: bool
    schema_only: bool
    at: tuple[int, str] | None = None

    def run(self, connection: Connection) -> list[Change]:
        """See :class:`_Work`."""
        self.at = None
        with _transaction(connection) as transaction, connection.raw.cursor() as cursor:
            cursor.execute(BEGIN, {"lock_timeout": f"{LOCK_TIMEOUT:g}s"})
            there = may_use_schema(_ask(cursor))
            changes = [*self._restore_functions(cursor)] if there else []
            before = _revision(transaction) if there else None
            with _patience(connection):
                if self.upgrade is not None:
                    self.upgrade(transaction)
                elif before != head():
                    upgrade_to_head(transaction)
            after = _revision(transaction)
            if before != after:
                changes.append(Change("schema cdc", f"revision {before or 'none'} → {after or 'none'}"))
            if self.triggers and after == head():
                cursor.execute(QUERIES["name_installation"], {"name": self.name})
                if not self.schema_only:
                    changes += self._reconcile(cursor)
                changes += [*self._register_sinks(cursor), *self._grant_reader(cursor)]
            return changes

    def _restore_functions(self, cursor: ext.cursor) -> Iterator[Change]:
        """Put back what somebody has replaced."""
        cursor.execute("select to_regprocedure('cdc.restore_definitions()') is not null")
        if cursor.fetchone() == (True,):
            cursor.execute("select cdc.restore_definitions()")
            for (name,) in cursor.fetchall():
                yield Change(f"function {name}", "put back")

    def _reconcile(self, cursor: ext.cursor) -> Iterator[Change]:
        """Make the triggers equal to the configuration."""
        cursor.execute(QUERIES["candidate_tables"])
        targets = resolve(cursor.fetchall(), self.database)
        # First: a table that has become a partition has a trigger in the way of its root's.
        removed = [*self._remove_unwanted(cursor, {target.oid for target in targets})]
        for target in targets:
            self.at = (target.oid, target.name)
            try:
                cursor.execute(QUERIES["enable_capture"], arguments(target, self.database))
            except (pg.WrongObjectType, pg.UndefinedColumn, pg.InvalidParameterValue) as error:
                raise InstallError(first_line(error)) from None
            yield Change(target.name, _fetch_text(cursor))
        self.at = None
        yield from removed

    def _remove_unwanted(self, cursor: ext.cursor, wanted: Collection[int]) -> Iterator[Change]:
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
                yield Change(f"sink {sink}", f"starts {STARTS[start]}")

    def _grant_reader(self, cursor: ext.cursor) -> Iterator[Change]:
        """Make the daemon's role a member of cdc_reader, where it is another than the one that migrates."""
        cursor.execute(QUERIES["lacks_reader"], {"role": self.daemon_role})
        if cursor.fetchone() == (True,):
            cursor.execute(sql.SQL("grant cdc_reader to {}").format(sql.Identifier(self.daemon_role or "")))
            yield Change(f"role {self.daemon_role}", "granted cdc_reader")


def daemon_role(dsn: str, reader_dsn: str) -> str | None:
    """The daemon's role, where it has a connection string of its own. Arguments as for :func:`migrate`."""
    return None if reader_dsn == dsn else role_of(reader_dsn)


def role_of(dsn: str) -> str | None:
    """Whom a connection string logs in as; None where only a server that cannot be reached could tell."""
    try:
        # Asking the server knows of PGUSER, service files and the like.
        with Connection(dsn, purpose="migrate") as connection:
            return connection.raw.info.user
    except DatabaseError:
        return ext.parse_dsn(dsn).get("user")


# -- the transaction --------------------------------------------------------------------------------------------


class _Cursor(ext.cursor):
    """Gives every statement a deadline, whoever runs it: SQLAlchemy and Alembic know of none."""

    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002  # its name in psycopg2
        session: Any = self.connection  # of a Connection, which knows of deadlines
        session.allow(self._seconds())
        super().execute(query, vars)

    def _seconds(self) -> float:
        return STATEMENT_DEADLINE


class _RevisionCursor(_Cursor):
    """The same for revisions."""

    def _seconds(self) -> float:
        return REVISIONS_DEADLINE


@contextmanager
def _patience(connection: Connection) -> Iterator[None]:
    """Statements may take as long as revisions do."""
    connection.raw.cursor_factory = _RevisionCursor
    try:
        yield
    finally:
        connection.raw.cursor_factory = _Cursor


@contextmanager
def _transaction(connection: Connection) -> Iterator[SqlConnection]:
    """A transaction on our session that SQLAlchemy, and so Alembic, can work in; committed at the end."""
    connection.raw.autocommit = False
    connection.raw.cursor_factory = _Cursor
    engine = create_engine("postgresql+psycopg2://", creator=lambda: connection.raw, poolclass=NullPool)
    sql_connection = engine.connect()
    try:
        yield sql_connection
        connection.allow(STATEMENT_DEADLINE)
        connection.raw.commit()
    except BaseException:
        if not connection.raw.closed:
            connection.allow(STATEMENT_DEADLINE)
            connection.raw.rollback()
        raise
    finally:
        if not sql_connection.invalidated:
            sql_connection.detach()


# -- the schema -------------------------------------------------------------------------------------------------

Ask = Callable[[str], Sequence[tuple[Any, ...]]]
"""Runs a query without parameters and returns its rows, as :meth:`cdc.connection.Connection.query`."""


def _ask(cursor: ext.cursor) -> Ask:
    def ask(query: str) -> Sequence[tuple[Any, ...]]:
        cursor.execute(query)
        return cursor.fetchall()

    return ask


def may_use_schema(ask: Ask, *, reading: bool = False) -> bool:
    """Whether there is a schema cdc, to be asked before anything in it is; nothing of it is trusted until then.

    Args:
        ask: runs a query in the database.
        reading: nothing is to be changed. Then it may be another's for a role that could not migrate: it is the
            daemon's, which reads there all the time.

    Raises:
        InstallError: it is not ours, or another role's.
    """
    for owner, version_owner, role, may_create in ask(QUERIES["schema_cdc"]):
        if may_create or not reading:
            _refuse_another_owner("migrate", owner, version_owner, role)
        if version_owner is None and (things := [what for _, _, what in ask(QUERIES["contents_of_cdc"])]):
            raise InstallError(f"schema cdc is not of cdc: it holds {_some(things)} (rename or drop the schema)")
        return True
    return False


def _may_remove_schema(ask: Ask) -> bool | None:
    """Whether schema cdc is ours to remove; None: there is none. False: it has nothing to do with us.

    Raises:
        InstallError: another role has installed it.
    """
    for owner, version_owner, role, _ in ask(QUERIES["schema_cdc"]):
        if version_owner is not None:
            _refuse_another_owner("uninstall", owner, version_owner, role)
        return version_owner is not None
    return None


def _refuse_another_owner(command: str, owner: str, version_owner: str | None, role: str) -> None:
    # Membership of the owner, which a superuser has of everybody, is no reason to run his functions.
    if owner != role:
        raise InstallError(
            f"schema cdc belongs to {owner}, not to {role} (if {owner} has installed cdc, {command} as that role; if "
            "not, drop or rename the schema)"
        )
    if version_owner not in (None, owner):
        raise InstallError(
            f"schema cdc belongs to {owner}, and its table alembic_version to {version_owner} (let one role own all of "
            "it)"
        )


_KINDS = {"function": "function", "sequence": "relation", "table": "relation", "type": "type", "view": "relation"}


def _made_by_revisions() -> set[tuple[str, str]]:
    """What the revisions make in schema cdc, as (kind, name): read off their scripts, and so true of new ones."""
    creates = re.compile(rf"^create (?:or replace )?({'|'.join(_KINDS)}) cdc\.(\w+)", re.MULTILINE)
    scripts = (migrations_directory() / "sql").glob("*.up.sql")
    made = {(_KINDS[what], name) for path in scripts for what, name in creates.findall(path.read_text("utf-8"))}
    return made | {("relation", "alembic_version")}


def alembic_config(**attributes: object) -> AlembicConfig:
    """Alembic's configuration for our revisions, run in-process."""
    config = AlembicConfig()
    config.set_main_option("script_location", str(migrations_directory()))
    config.attributes.update(attributes)
    return config


def upgrade_to_head(transaction: SqlConnection) -> None:
    """Run our revisions, in-process, inside the caller's transaction."""
    with _ALEMBIC:
        command.upgrade(alembic_config(connection=transaction), "head")


def upgrade_script(revision: str | None) -> str:
    """What :func:`upgrade_to_head` would run in a schema cdc at a revision (None: without one), as SQL text.

    Raises:
        InstallError: a revision this program does not know.
    """
    scripts = ScriptDirectory(str(migrations_directory()))
    text = io.StringIO()

    def steps(heads: Any, _: MigrationContext) -> Any:
        return scripts._upgrade_revs("head", heads)  # what alembic.command.upgrade goes by

    context = MigrationContext.configure(
        dialect_name="postgresql",
        opts={
            "as_sql": True,
            "output_buffer": text,
            "version_table_schema": "cdc",
            "transactional_ddl": False,
            "script": scripts,
            "starting_rev": revision,
            "fn": steps,
        },
    )

    class Recorder(MockConnection):
        """Alembic's stand-in for a connection has no method for plain text, which is what our revisions are."""

        def exec_driver_sql(self, statement: str) -> None:
            context.impl.static_output(statement.replace("%%", "%").strip())

    recorder: Any = Recorder(context.dialect, lambda construct, *_, **__: context.impl._exec(construct))
    context.connection = context.impl.connection = recorder
    try:
        with _ALEMBIC, Operations.context(context):
            context.run_migrations()
    except CommandError as refusal:
        raise _unknown_revision(refusal) from None
    # A schema that was taken down has left its version table, empty.
    script = text.getvalue().replace(
        "CREATE TABLE cdc.alembic_version", "CREATE TABLE IF NOT EXISTS cdc.alembic_version"
    )
    script = script.encode("ascii", "replace").decode()  # its comments have more than the database's encoding may
    return f"{script}\nselect cdc.keep_definitions();\n"


def _revision(transaction: SqlConnection) -> str | None:
    if transaction.exec_driver_sql("select to_regclass('cdc.alembic_version')").scalar() is None:
        return None
    value = transaction.exec_driver_sql(QUERIES["revision"]).scalar()
    return None if value is None else str(value)


# -- triggers ---------------------------------------------------------------------------------------------------


def enable_statement(connection: Connection, target: Target, database: DatabaseConfig, quoted: str) -> str:
    """The statement that makes a table's triggers what the configuration says, written out for people.

    Args:
        connection: any session.
        target: the table.
        database: the configuration.
        quoted: the table's name as SQL, which stands in it in place of the number.
    """
    query = QUERIES["enable_capture"].replace("%(relation)s::oid::regclass", "%(relation)s::regclass")
    return written_out(connection, query, arguments(target, database) | {"relation": quoted})


def written_out(connection: Connection, query: str, parameters: Mapping[str, object]) -> str:
    """A query with its parameters filled in, without comments at its head, with a semicolon."""
    lines = query.strip().splitlines()
    statement = "\n".join(itertools.dropwhile(lambda line: line.startswith("--"), lines))
    with connection.raw.cursor() as cursor:
        return str(cursor.mogrify(statement, parameters).decode()) + ";"


def _fetch_text(cursor: ext.cursor) -> str:
    row = cursor.fetchone()
    return str(row[0]) if row else ""


@dataclass(frozen=True, slots=True)
class Holder:
    """A transaction that a trigger of a table has to wait for.

    Attributes:
        pid: its server process; None for a prepared one.
        prepared: the name it was prepared under, or None.
        who: its application, or else its role, or what kind of process it is.
        age: seconds since it began; None where our role may not see it.
    """

    pid: int | None
    prepared: str | None
    who: str
    state: str
    age: float | None

    def __str__(self) -> str:
        name = f"pid {self.pid}" if self.pid else f"prepared transaction {self.prepared}"
        details = [self.who, self.state, *([] if self.age is None else [f"for {self.age:.0f} s"])]
        return f"{name} ({', '.join(filter(None, details))})"


def holders(connection: Connection, relation: int, *, exclusive: bool) -> list[Holder]:
    """Who a trigger of a table has to wait for, longest first; at most five.

    Args:
        connection: a session without locks of its own.
        relation: the table's oid.
        exclusive: for dropping a trigger, which even readers are in the way of.

    Raises:
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    parameters: dict[str, object] = {"relation": relation, "exclusive": exclusive}
    return [Holder(*row) for row in connection.query(QUERIES["holders"], parameters)]


def _in_the_way(watch: Connection, table: tuple[int, str] | None) -> str:
    """Who holds the lock that could not be had, for people."""
    # Without one a revision was at work: on tables of its own, or on roles, which belong to the whole cluster.
    tables = [table] if table else [(oid, f"cdc.{name}") for oid, name in watch.query(QUERIES["tables_of_cdc"])]
    for relation, name in tables:
        if found := holders(watch, relation, exclusive=False) or holders(watch, relation, exclusive=True):
            return "; ".join(f"{name} is in use by {holder}" for holder in found)
    if table:
        return f"{table[1]} was in use by somebody who has ended meanwhile"
    return "another migration is at work on this database or its cluster"


# -- uninstall --------------------------------------------------------------------------------------------------


def losses(connection: Connection) -> list[str]:
    """What would be lost for good with schema cdc, each as words.

    Raises:
        InstallError: it could not be removed.
        DatabaseError: as Connection.query.
    """
    if not _may_remove_schema(connection.query):
        return []
    try:
        found = outbox.sink_statuses(connection)
    except NotInstalled:
        if connection.query("select to_regclass('cdc.event') is null") == [(True,)]:
            return []
        return ["whatever the sinks have not delivered (at its revision this program cannot tell what that is)"]
    lost = []
    for sink in found:
        pending = f"{sink.pending}{'+' if sink.capped else ''} pending events" if sink.pending else ""
        letters = f"{sink.dead_letters} dead letters" if sink.dead_letters else ""
        if what := " and ".join(filter(None, (pending, letters))):
            lost.append(f"{what} of sink {sink.name}")
    return lost


def uninstall(name: str, *, dsn: str, force: bool = False, on_wait: Callable[[str], None] = log.info) -> list[Change]:
    """Take cdc out of one database, and its roles out of the cluster when no other database depends on them.

    Args:
        name: the database's name in the configuration.
        dsn: how to reach it as the role that migrates.
        force: even while a daemon serves it.
        on_wait: as for :func:`migrate`.

    Returns:
        What was removed, and what had to stay; nothing when there was nothing.

    Raises:
        InstallError: nothing was changed; the message says what to do.
        DatabaseUnreachable, NotPrimary: as :class:`cdc.connection.Connection`.
    """
    return _attempt(name, dsn, _Removal(force), on_wait)


@dataclass(slots=True)
class _Removal:
    """Taking cdc out of a database, whatever its revision; see :func:`uninstall`."""

    command: ClassVar[str] = "uninstall"
    rights: ClassVar[str] = _REMOVAL_RIGHTS

    force: bool
    at: tuple[int, str] | None = None

    def run(self, connection: Connection) -> list[Change]:
        """See :class:`_Work`."""
        self.at = None
        with _transaction(connection), connection.raw.cursor() as cursor:
            cursor.execute(BEGIN, {"lock_timeout": f"{LOCK_TIMEOUT:g}s"})
            ours = _may_remove_schema(_ask(cursor))
            if not ours:
                stays = [Change("schema cdc", "stays: it is not of cdc")] if ours is False else []
                return [*stays, *self._remove_roles(cursor)]
            self._refuse_while_others_are_in_it(cursor)
            cursor.execute(QUERIES["tables_of_cdc"])
            tables = cursor.fetchall()
            # First, because from here on no daemon can begin to serve a sink.
            self._lock(cursor, [table for table in tables if table[1] == "sink"])
            if not self.force:
                self._refuse_while_served(cursor)
            changes = [*self._remove_triggers(cursor)]
            self._lock(cursor, tables)
            return [*changes, *self._remove_schema(cursor), *self._remove_roles(cursor)]

    def _refuse_while_others_are_in_it(self, cursor: ext.cursor) -> None:
        cursor.execute(QUERIES["contents_of_cdc"])
        ours = _made_by_revisions()
        if others := [what for kind, name, what in cursor.fetchall() if (kind, name) not in ours]:
            raise InstallError(
                f"schema cdc holds what cdc has not made: {', '.join(others)} (move or drop that first; if a newer cdc "
                "has made it, uninstall with that one)"
            )

    def _lock(self, cursor: ext.cursor, tables: Iterable[tuple[Any, ...]]) -> None:
        for relation, table in tables:
            self.at = (relation, f"cdc.{table}")
            cursor.execute(sql.SQL("lock table {} in access exclusive mode").format(sql.Identifier("cdc", table)))
        self.at = None

    def _refuse_while_served(self, cursor: ext.cursor) -> None:
        cursor.execute("select to_regprocedure('cdc.holder(integer, bigint)') is null")
        if cursor.fetchone() == (True,):
            return  # a revision whose daemons this program knows nothing of
        cursor.execute(QUERIES["served_sinks"])
        if served := cursor.fetchall():
            sinks = ", ".join(f"{sink} by {owner}" for sink, owner in served)
            raise InstallError(f"a daemon is at work: it serves {sinks} (stop it, or say --force)")

    def _remove_triggers(self, cursor: ext.cursor) -> Iterator[Change]:
        cursor.execute(QUERIES["triggers_of_cdc"])
        tables = []
        for relation, schema, table, trigger in cursor.fetchall():
            self.at = (relation, f"{schema}.{table}")
            statement = sql.SQL("drop trigger {} on {}")
            cursor.execute(statement.format(sql.Identifier(trigger), sql.Identifier(schema, table)))
            tables.append(f"{schema}.{table}")
        for name in dict.fromkeys(tables):
            yield Change(name, "removed")

    def _remove_schema(self, cursor: ext.cursor) -> Iterator[Change]:
        cursor.execute(QUERIES["dependents_of_cdc"])
        if others := [str(row[0]) for row in cursor.fetchall()]:
            raise InstallError(f"depends on schema cdc: {', '.join(others)} (drop that first)")
        cursor.execute("drop schema cdc cascade")
        yield Change("schema cdc", "removed")

    def _remove_roles(self, cursor: ext.cursor) -> Iterator[Change]:
        for role in ROLES:
            cursor.execute("select from pg_roles where rolname = %s", (role,))
            if cursor.fetchone() is None:
                continue
            cursor.execute("savepoint before_role")
            try:
                cursor.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))
            except (pg.DependentObjectsStillExist, pg.InsufficientPrivilege, pg.ObjectInUse) as error:
                cursor.execute("rollback to before_role")
                cursor.execute(QUERIES["databases_of_role"], {"role": role})
                users = [str(row[0]) for row in cursor.fetchall()]
                why = f"in use by database {_some(users)}" if users else first_line(error)
                yield Change(f"role {role}", f"stays: {why}")
            else:
                yield Change(f"role {role}", "removed")


def _some(names: Sequence[str]) -> str:
    """A few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
