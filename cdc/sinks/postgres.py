"""Events in another PostgreSQL: tables that mirror the source's, or one table of events; each event exactly once.

**Exactly once.** Delivery is at least once because a daemon may die between the target's commit and the acknowledgement
at the source. So what was delivered is written down in the target, in the transaction of the data, and what is handed
over again is left out. The note (one row of ``cdc_position`` for each sink and database) holds the name of the window
being read and, of that window, the events applied and not known to be acknowledged: seq and moment of each, which is
what an event's id is made of.

* *Not "everything up to seq"*: seq ascends within a window, not from one window to the next, and of one page some
  events may be applied while others wait or have become dead letters.
* *What can come again* is what was handed out after the last acknowledgement: of the same window, whatever size the
  pages have this time. So events up to the acknowledged seq are dropped from the note, which stays as small as a page.
* *What comes again on purpose* must be applied, not left out. A sink that was rewound, or given a new position after a
  restore, reads another window (its snapshots are taken anew, and its name holds cluster and timeline), and the note
  says nothing about that. An event replayed from the dead letters is not in it, because it was never applied.
* A COMMIT whose answer was lost is like a crash: the events go again, and the note says whether they are needed.

**Only one writes.** The source lets one daemon at a time acknowledge, but one that was stopped (SIGSTOP, a sleeping
laptop) may wake up with a batch in its hands after another has taken over and gone on. Re-applied then, old values
would overwrite new ones. So whoever opens the sink, which is after he became its owner at the source and before he
reads a page, puts a random claim into the note; every transaction begins by locking the note and comparing. Who finds
another claim has been overtaken: he forgets everything and asks the source again who the owner is
(:class:`~cdc.errors.Fenced`). A claim and not the source's epoch, because epochs begin again when a sink is forgotten
or its database restored. Should an overtaken one be so late that he writes his claim over a newer one, the owner finds
it, asks, is told that he is, and claims again; the late one has no page yet and is refused one. A transaction in which
nothing happens for `IDLE` seconds is ended by the server, so that a stopped daemon does not keep the note locked.

**All or one by one.** A batch is one transaction and a few statements. If the target refuses it, nothing of it is done,
and then every event is written behind a savepoint, in the order of the source. What is refused by itself is told by its
index (permanent: the value or a constraint is against it; transient: a foreign key, a lock), later events of its key
wait, the rest is committed. Deferred constraints are checked before the commit, whose error would be nobody's; if they
are against it, the events are written once more, and what is deferred is checked at each: a child before its parent
fails then, and comes again after it. What concerns more than an event (connection, rights, a missing table or column, a
standby, no time) fails the batch as transient, with the reason: somebody can mend it, and dead letters would have to be
replayed.

The error texts of PostgreSQL are shown where they cannot quote a row's values.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

from psycopg2 import errorcodes
from psycopg2.errors import lookup
from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from cdc import crashpoints
from cdc.connection import GRACE, Connection
from cdc.dsn import DsnFile, ServerDsn, describe, either, read_dsn_file, resolved
from cdc.encoding import Encoder
from cdc.errors import (
    DatabaseError,
    DatabaseUnreachable,
    DeliveryError,
    Fenced,
    NotPrimary,
    PartialFailure,
    PermanentFailure,
    SinkDisabled,
    TooSlow,
    TransientFailure,
)
from cdc.event import Event, Json, Op, format_timestamp
from cdc.lanes import Held
from cdc.options import Duration, SinkOptions
from cdc.sinks._mirror import Catalogue, Mirror, Name, Quote, quoter
from cdc.sinks._values import array_literal
from cdc.sinks.base import Page, Sink
from cdc.template import ROUTE, Template, checked

log = logging.getLogger(__name__)

IDLE = 20.0
"""Seconds after which the server ends a transaction of ours in which nothing happens."""

_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")

# The settings are those under which the values were written.
_BEGIN = """
begin;
set local statement_timeout = {statement_timeout};
set local idle_in_transaction_session_timeout = {idle};
set local intervalstyle = 'postgres';
set local lc_monetary = 'C';
set local xmloption = 'content';
"""
_REPLICA = "set local session_replication_role = 'replica';"
_LOCK = """
select claim, source_window, applied from {position} where sink = %s and database = %s for update
"""
_POSITION_TABLE = """
create table if not exists {position} (
  sink text, database text, claim text not null, claimed_at timestamptz not null default now(),
  source_window text, applied bigint[] not null default '{{}}', last_id text, applied_at timestamptz,
  primary key (sink, database))
"""
_EXISTS = """
select to_regclass(name) is not null,
       exists (select from pg_catalog.pg_trigger where tgrelid = to_regclass(name) and tgname like '00\\_cdc\\_%%')
  from (values (%s)) as t (name)
"""
_ORIGIN = """
select c.system_identifier::text, i.database_name from pg_catalog.pg_control_system() c, cdc.installation i
"""
_CLAIM = """
insert into {position} (sink, database, claim) values (%s, %s, %s)
on conflict (sink, database) do update set claim = excluded.claim, claimed_at = now()
"""
_CHECK = "set constraints all immediate"
_STORE = """
update {position} set source_window = %s, applied = %s, last_id = %s, applied_at = now()
 where sink = %s and database = %s
"""
_EVENT_TABLE = """
create table if not exists {table} (
  id text primary key, op text not null, database text not null, schema_name text not null, table_name text not null,
  seq bigint not null, txid bigint not null, ts timestamptz not null,
  key json, before json, after json, changed text[], context json, truncated boolean not null)
"""
_APPEND = """
insert into {table} (id, op, database, schema_name, table_name, seq, txid, ts, key, before, after, changed, context,
                     truncated)
select id, op, database, schema_name, table_name, seq, txid, ts, key::json, before::json, after::json, changed::text[],
       context::json, truncated
  from unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::bigint[], %s::bigint[], %s::timestamptz[],
              %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::boolean[])
       as e (id, op, database, schema_name, table_name, seq, txid, ts, key, before, after, changed, context, truncated)
    on conflict do nothing
"""


def _two_parts(text: str) -> str:
    """Schema and table, each a template of its own."""
    parts = _PLACEHOLDER.sub("x", text).split(".")
    if len(parts) != 2 or not all(parts):
        raise ValueError("not a schema and a table (write public.cdc_event, or {schema}.{table})")
    return text


class PostgresOptions(SinkOptions):
    """Options of a ``postgres`` sink.

    Attributes:
        dsn: connection string of the target.
        dsn_file: the file it was read from instead.
        mode: ``mirror``, tables follow tables; ``append``, one row for each event.
        table: template of the table an event goes to; see `target_table`.
        create: in mode append, make the table of events if it is not there.
        truncate: in mode mirror, what a TRUNCATE at the source does.
        missing_row: in mode mirror, what becomes of an update that shows only what changed, of a row that is not there.
        missing_column: in mode mirror, what happens when an event shows a column that the target has not.
        replication_role: ``replica`` fires no triggers and checks no foreign keys.
        position_table: where the target keeps how far delivery has come; made if it is not there.
        timeout: seconds for each statement.
    """

    type: Literal["postgres"]
    dsn: ServerDsn | None = None
    dsn_file: Annotated[DsnFile, BeforeValidator(read_dsn_file)] | None = Field(default=None, validate_default=True)
    mode: Literal["mirror", "append"] = "mirror"
    table: Annotated[str, checked(*ROUTE), AfterValidator(_two_parts)] | None = None
    create: bool = False
    truncate: Literal["apply", "ignore"] = "apply"
    missing_row: Literal["fail", "ignore"] = "fail"
    missing_column: Literal["wait", "ignore"] = "wait"
    replication_role: Literal["origin", "replica"] = "origin"
    position_table: Annotated[str, checked(), AfterValidator(_two_parts)] = "public.cdc_position"
    timeout: Duration = Field(default=30.0, ge=1.0)

    _either = field_validator("dsn_file")(either)

    @field_validator("format")
    @classmethod
    def _columns_have_no_format(cls, value: str) -> str:
        if value != "native":
            raise ValueError("does not apply to columns (leave it out)")
        return value

    @model_validator(mode="after")
    def _belongs_to_mode(self) -> PostgresOptions:
        if self.mode == "mirror" and self.create:
            raise ValueError("create: true is for mode: append (make the tables of a mirror by pg_dump --schema-only)")
        for name in ("truncate", "missing_row", "missing_column"):
            if self.mode == "append" and name in self.model_fields_set:
                raise ValueError(f"{name} is for mode: mirror (leave it out)")
        return self

    @property
    def target_table(self) -> str:
        """`table`, or what is usual in the mode: ``{schema}.{table}``, or ``public.cdc_event``."""
        return self.table or ("{schema}.{table}" if self.mode == "mirror" else "public.cdc_event")


class _Refused(Exception):
    """The target refuses something of a batch, and it may be one event only."""


class PostgresSink(Sink[PostgresOptions]):
    """Writes events into tables of another database; see the head of this module."""

    Options = PostgresOptions
    keeps_position = True

    def __init__(self, name: str, options: PostgresOptions, encoder: Encoder | None = None) -> None:
        super().__init__(name, options, encoder)
        schema, _, table = options.target_table.partition(".")
        self._schema, self._table = Template(schema), Template(table)
        self._page: Page | None = None
        self._claim: str | None = None
        self._session: Connection | None = None
        self._quote: Quote = quoter(None)
        self._catalogue = Catalogue(lambda table: self._check_captured(table.name, table.captured))
        self._origin: tuple[str, str] | None = None  # of the target: cluster and database, where it has schema cdc
        self._event_tables: set[Name] = set()  # those known to be there
        self._has_ignored = False

    # -- life ---------------------------------------------------------------------------------------------------

    def begin(self, page: Page) -> None:
        self._page = page

    def open(self) -> None:
        self.close()
        with self._in_our_words():
            session = self._connected()
            self._origin = _origin(session)
            if self._page is not None:
                position = self._position()
                if not session.query("select to_regclass(%s)", [position.replace("%%", "%")])[0][0]:
                    self._make_position_table(session, position.replace("%%", "%"))
                self._claim = secrets.token_hex(8)
                session.query(_CLAIM.format(position=position), [self.name, self._page.database, self._claim])

    def _make_position_table(self, session: Connection, position: str) -> None:
        try:
            session.query(_POSITION_TABLE.format(position=position))
        except DatabaseUnreachable:
            raise
        except DatabaseError as error:
            raise TransientFailure(
                f"the target: cannot create {self.options.position_table}: {error} (create it as docs/sinks/postgres.md"
                " says, or let position_table name another schema)"
            ) from None

    def deliver(self, batch: Sequence[Event]) -> None:
        with self._in_our_words():
            try:
                self._deliver_all(batch)
            except (DeliveryError, DatabaseError, _Refused) as error:
                self._forget()
                if not isinstance(error, PermanentFailure | _Refused):
                    raise
                try:
                    self._deliver_each(batch)
                except _Refused:
                    self._forget()
                    self._deliver_each(batch, checked_at_once=True)

    def close(self) -> None:
        session, self._session = self._session, None
        self._claim = None
        self._forget()
        if session is not None:
            session.close()

    def _forget(self) -> None:
        """Look again at what the target has: somebody may have changed it."""
        self._catalogue.clear()
        self._event_tables.clear()

    # -- delivery -----------------------------------------------------------------------------------------------

    def _deliver_all(self, batch: Sequence[Event]) -> None:
        """A batch at once, or nothing of it. Raises _Refused, DeliveryError, DatabaseError."""
        with self._transaction() as applied:
            events = [event for event in batch if _mark(event) not in applied]
            with self._may_refuse():
                self._write(events)
            self._note(applied, events)

    def _deliver_each(self, batch: Sequence[Event], *, checked_at_once: bool = False) -> None:
        """A batch event by event, without what is refused.

        Args:
            batch: the events.
            checked_at_once: whether deferred constraints are checked at each event.

        Raises:
            PartialFailure: the rest is written.
            _Refused: a deferred constraint is against some of it; nothing is written.
            DeliveryError, DatabaseError: nothing is written.
        """
        failures: dict[int, TransientFailure | PermanentFailure] = {}
        waiting = Held()
        written: list[Event] = []
        with self._transaction() as applied:
            if checked_at_once:
                self._step(_CHECK)
            for indexes in _units(batch, applied):
                events = [batch[index] for index in indexes]
                failure: TransientFailure | PermanentFailure | None = None
                if any(waiting.holds(event) for event in events):
                    failure = TransientFailure("waits for an earlier event of its key")
                else:
                    failure = self._try(events)
                if failure is None:
                    written += events
                    continue
                failures.update(dict.fromkeys(indexes, failure))
                for event in events:
                    waiting.add(event)
            self._note(applied, written)
        if failures:
            raise PartialFailure(failures)

    @contextmanager
    def _may_refuse(self) -> Iterator[None]:
        """Where an error of the target may be one event's alone. Raises _Refused, DatabaseError."""
        try:
            yield
        except DatabaseError as error:
            if self._judge(error)[1]:
                raise _Refused from None
            raise

    def _try(self, events: Sequence[Event]) -> TransientFailure | PermanentFailure | None:
        """Write events that stand or fall together; returns why they were refused."""
        self._step("savepoint each")
        try:
            self._write(events)
        except PermanentFailure as error:
            failure: TransientFailure | PermanentFailure = error
        except DatabaseError as error:
            failure, is_its_own = self._judge(error)
            if not is_its_own:
                raise
        else:
            self._step("release savepoint each")
            return None
        self._step("rollback to savepoint each")
        return failure

    def _write(self, events: Sequence[Event]) -> None:
        if self.options.mode == "append":
            self._append(events)
            return
        options = self.options
        mirror = Mirror(
            self._quote,
            self._step,
            self._catalogue,
            table_of=self._table_of,
            truncate=options.truncate == "apply",
            missing_row=options.missing_row,
            missing_column=options.missing_column,
        )
        mirror.write(events)
        if mirror.ignored and not self._has_ignored:
            self._has_ignored = True
            fields = {"sink": self.name, "updates": mirror.ignored}
            log.warning(
                "Updates of rows that are not there are ignored, from now on in silence.", extra={"fields": fields}
            )

    def _append(self, events: Sequence[Event]) -> None:
        tables: dict[Name, list[Event]] = {}
        for event in events:
            tables.setdefault(self._table_of(event), []).append(event)
        for name, rows in tables.items():
            self._check_event_table(name)
            columns = zip(*map(_columns, rows), strict=True)
            self._step(_APPEND.format(table=self._quote(*name)), [array_literal(column, ",") for column in columns])

    def _check_event_table(self, name: Name) -> None:
        if name in self._event_tables:
            return
        table = self._quote(*name)
        ((exists, captured),) = self._step(_EXISTS, [table.replace("%%", "%")])
        self._check_captured(name, captured)
        if not exists:
            if not self.options.create:
                raise TransientFailure(f"the target has no table {'.'.join(name)} (create it, or set create: true)")
            self._step(_EVENT_TABLE.format(table=table))
        self._event_tables.add(name)

    def _check_captured(self, name: Name, captured: bool) -> None:
        """Raise SinkDisabled where every event would make another one: the target's table is the one it comes from."""
        page = self._page
        if captured and self._origin and page and page.window:
            cluster, database = self._origin
            if page.database == database and page.window.startswith(f"{cluster}/"):
                raise SinkDisabled(
                    f"{'.'.join(name)} of the target is captured by the very database the events come from (let dsn "
                    "name another database, or table a table that is not captured)"
                )

    def _table_of(self, event: Event) -> Name:
        return self._schema.fill(event), self._table.fill(event)

    # -- the transaction, and the note in it --------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[set[_Mark]]:
        """A transaction that is committed, or undone on an error; gives what the note says is applied.

        Raises:
            Fenced: another claim stands in the note.
            _Refused: a deferred constraint is against what was done.
        """
        self._connected()
        try:
            yield self._start()
            with self._may_refuse():
                self._step(_CHECK)
            crashpoints.reached("before-commit")
            self._step("commit")
        except BaseException:
            with suppress(DatabaseError):
                self._step("rollback")
            raise

    def _start(self) -> set[_Mark]:
        options, page = self.options, self._page
        begin = _BEGIN.format(
            statement_timeout=round(options.timeout * 1000),
            idle=round(IDLE * 1000),
        )
        if options.replication_role == "replica":
            begin += _REPLICA
        if page is None:
            self._step(begin)
            return set()
        rows = self._step(begin + _LOCK.format(position=self._position()), [self.name, page.database])
        if not rows or rows[0][0] != self._claim:
            raise Fenced(
                f"another daemon writes to this target as sink {self.name} of database {page.database} (if that is "
                "another configuration, rename the sink in one of them)"
            )
        _, window, applied = rows[0]
        return {(seq, moment) for seq, moment in applied if seq > page.after} if window == page.window else set()

    def _note(self, applied: set[_Mark], events: Sequence[Event]) -> None:
        """Write down that these are applied, too."""
        page = self._page
        if page is None or not events:
            return
        marks = applied.union(mark for mark in map(_mark, events) if mark[0] > page.after)
        literal = "{" + ",".join([f"{{{seq},{moment}}}" for seq, moment in sorted(marks)]) + "}"
        self._step(
            _STORE.format(position=self._position()),
            [page.window, literal, events[-1].id, self.name, page.database],
        )

    def _position(self) -> str:
        return self._quote(*self.options.position_table.split("."))

    # -- the session --------------------------------------------------------------------------------------------

    def _connected(self) -> Connection:
        if self._session is None or self._session.raw.closed:
            self._forget()
            dsn, deadline = resolved(self.options.dsn, self.options.dsn_file), self.options.timeout + GRACE
            try:
                self._session = Connection(
                    dsn.get_secret_value(), purpose=f"sink {self.name}", deadline=deadline, source=False
                )
            except DatabaseError as error:
                raise type(error)(f"{error} [{describe(dsn)}]") from None
            self._quote = quoter(self._session.raw)
        return self._session

    def _step(self, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        if self._session is None:
            raise DatabaseUnreachable("no connection")
        # Names come with each % doubled, which psycopg2 undoes only where there are values.
        return self._session.step(statement if values else statement.replace("%%", "%"), values)

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except Fenced:
            raise
        except DatabaseError as error:
            # What is one event's alone was sorted out before.
            raise TransientFailure(str(self._judge(error)[0])) from None

    def _judge(self, error: DatabaseError) -> tuple[TransientFailure | PermanentFailure, bool]:
        """What an error of the target means, and whether it may be one event's alone."""
        state, kind = error.sqlstate, error.sqlstate[:2]
        if isinstance(error, TooSlow):
            cure = "raise timeout, or lower batch.events"
            return TransientFailure(f"the target did not finish in {self.options.timeout:g} s ({cure})"), False
        if isinstance(error, DatabaseUnreachable | NotPrimary) or not state:
            return TransientFailure(f"the target: {error}"), False
        if state in _FOREIGN_KEY:
            cure = (
                "what it refers to, or what refers to it, may still come; if only on a later page, raise batch.events, "
                "or set replication_role: replica"
            )
            return TransientFailure(f"the target: {error} ({cure})"), True
        if state in _IN_USE:
            return TransientFailure(f"the target: {error}"), True
        if kind in _REFUSALS or kind not in _CLASSES:
            return PermanentFailure(f"the target: {_without_values(error)}"), True
        known = _CURES.get(state) or _CURES.get(kind)
        return TransientFailure(f"the target: {error}" + (f" ({known})" if known else "")), False


_FOREIGN_KEY: Final = ("23503", "23001")
"""Violations of a foreign key; the second from PostgreSQL 18 on, under ``on delete restrict``."""
_IN_USE: Final = ("55P03", "55006")
"""A lock that is not given; a TRUNCATE of a table of which rows are still to be checked: it passes without them."""
_REFUSALS: Final = ("21", "22", "23", "44", "54", "P0")
"""Classes of SQLSTATE that say that a row is wrong: its values, a constraint, a limit, a trigger of the target."""
_CLASSES: Final = {code for name, code in vars(errorcodes).items() if name.startswith("CLASS_")} | {"CD"}
"""PostgreSQL's classes, and that of our capture. One of another class is what a trigger of the target says of a row."""
_CURES: Final = {
    "25006": "let dsn name the primary, or every host of the cluster",
    "428C9": "let it be generated by default in the target",
    "42501": "grant it to the role in dsn",
    "0A000": "where a foreign key forbids a TRUNCATE, raise batch.events, so that the TRUNCATE of all its tables comes "
    "at once, or set truncate: ignore",
    "42": "make the target's tables like those of the source",
}


def _origin(session: Connection) -> tuple[str, str] | None:
    """Cluster and name of a database that is a source of ours, too."""
    if not session.query("select to_regclass('cdc.installation')")[0][0]:
        return None
    try:
        rows = session.query(_ORIGIN)
    except DatabaseUnreachable:
        raise
    except DatabaseError:
        return None  # a role that may not look there is not the daemon's at the source
    return rows[0] if rows else None


def _without_values(error: DatabaseError) -> str:
    """What PostgreSQL says, without the row's values."""
    if error.sqlstate[:2] in _CLASSES - {"22", "P0"}:
        return str(error)
    if known := _NO_VALUES.match(str(error)):
        return known[0]
    try:
        name: str = lookup(error.sqlstate).__name__
    except KeyError:
        return f"SQLSTATE {error.sqlstate}"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


_NO_VALUES = re.compile(r"invalid input syntax for type [^:]+|invalid input value for enum [^:]+|value too long .*")

_Mark = tuple[int, int]
"""Of an event: its seq, and the moment it was recorded, in microseconds. Together they are what its id is made of."""


def _mark(event: Event) -> _Mark:
    return event.source.seq, (event.source.ts - _BEGINNING) // _MICROSECOND


def _units(batch: Sequence[Event], applied: Collection[_Mark]) -> Iterator[list[int]]:
    """What of a batch is not applied, as lists of indexes: events one by one, a TRUNCATE with those that follow it."""
    unit: list[int] = []
    for index, event in enumerate(batch):
        if _mark(event) in applied:
            continue
        if unit and not (event.op is Op.TRUNCATE and batch[unit[0]].op is Op.TRUNCATE):
            yield unit
            unit = []
        unit.append(index)
    if unit:
        yield unit


def _columns(event: Event) -> tuple[str | None, ...]:
    """An event as a row of the table of events."""
    source = event.source
    return (
        event.id,
        event.op.value,
        source.database,
        source.schema_name,
        source.table,
        str(source.seq),
        str(source.txid),
        format_timestamp(source.ts),
        _raw(event.key),
        _raw(event.before),
        _raw(event.after),
        None if event.changed is None else array_literal(event.changed, ","),
        _raw(event.context),
        str(event.truncated),
    )


def _raw(value: Json | None) -> str | None:
    return None if value is None else value.raw
