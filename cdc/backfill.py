"""Existing rows beside the stream: exact, because a position is a snapshot.

A backfill tells a sink of the rows a table has, as events of the operation ``read``. It runs inside the sink's
pipeline, a chunk at a time (:meth:`Backfills.next_batch`):

    one transaction, one snapshot S ──▶ the stream's next page, up to S ──▶ deliver these events
                                   └──▶ the next rows of the table, as S shows them ──▶ then these rows
                                                                                          └──▶ acknowledge both at once

The rows are the state at exactly the point the stream has reached: whatever S shows was delivered before them, and
whatever it does not comes later. No lock is taken, no writer waits, and no transaction is open while a sink works.

* *A chunk is read only with the last page of a window.* As long as there is more in the stream, that goes first.
* *A crash*, wherever: what was not acknowledged is read anew, the page as it was, and after it, under another snapshot,
  the rows as they are then. An event's id says which row of which backfill in which state it is, so a row that has not
  changed comes again under the same id.
* *A row that gets another key* may jump over the place the backfill has reached. Under ``image: diff`` its update does
  not tell all of it, so as long as a backfill is under way the whole row follows such an update as a ``read`` of its
  own, made of what the outbox holds (:meth:`Backfills.complete`).
* *How many rows* a chunk has depends on how long those of the last one took, so that the stream does not wait long.

States: running, paused, done, cancelled; failed: the table cannot be read, with the reason. The stream goes on anyway.
What people want of a backfill stands in ``cdc.backfill``; the pipeline looks when ``cdc.sink.requests`` has grown. One
table is told of after the other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from cdc import crashpoints
from cdc.connection import Connection
from cdc.decoding import Unreadable, moved_row
from cdc.errors import CdcError, Fenced, TooSlow, Undecodable
from cdc.event import Event
from cdc.outbox import PATIENCE, Batch, Outbox, is_committed, is_full
from cdc.sql import QUERIES

log = logging.getLogger(__name__)

TARGET = 0.005
"""Seconds the rows of a chunk should take to be read and delivered: what a change may wait for them."""
QUIET_TARGET = 0.05
"""The same while nothing changes: a chunk costs 3 ms whatever its size."""
QUIET_AFTER = 1.0
"""Seconds without a change until that is believed."""
SMALLEST = 50
"""Rows of a chunk at least, where the backfill's own limit allows."""
PAGE = 5000
"""Events of a page at most while rows are to be told of. They come with the last page of a window only, and a sink that
just keeps up with its stream may not see one of an ordinary size for long."""

State = Literal["running", "paused", "done", "cancelled", "failed"]


@dataclass(slots=True)
class _Task:
    """A backfill of one table that is not over.

    Attributes:
        chunk: at most so many rows at a time.
        rate: at most so many rows a second, or None.
        begun: whether rows of it may have been read.
        by_key: whether it pages along the key, once it has begun.
    """

    id: int
    relation: int
    schema: str
    table: str
    chunk: int
    rate: int | None
    paused: bool
    begun: bool
    by_key: bool


class Backfills:
    """What one sink has to be told of the rows of one database. Belongs to the thread of its connection."""

    def __init__(
        self,
        connection: Connection,
        outbox: Outbox,
        *,
        sink: str,
        wants: Callable[[str, str], bool],
        fields: Callable[..., dict[str, object]],
    ) -> None:
        """
        Args:
            connection: an open session; this object does not close it.
            outbox: the sink's place in the book, claimed.
            sink: its name in the configuration.
            wants: whether the sink's configuration wants rows of a table, by schema and name.
            fields: makes the fields of a line in the log.
        """
        self._connection = connection
        self._outbox = outbox
        self._sink = sink
        self._wants = wants
        self._fields = fields
        self._tasks: list[_Task] = []
        self._moving: frozenset[int] = frozenset()  # tables whose rows may jump over the place we have reached
        self._handed: tuple[int, int] | None = None  # backfill and chunk, not acknowledged yet
        self._rows = float(SMALLEST)  # of the next chunk
        self._read_at = 0.0
        self._took = 0.0  # to read the rows in hand
        self._changed_at = float("-inf")  # when the stream last brought something
        self.due_at = float("inf")
        """When the next chunk is to be read, by the monotonic clock."""

    def look(self) -> None:
        """Read anew what is to be done.

        Raises:
            Fenced: another daemon has taken over.
            DatabaseError: see :meth:`cdc.connection.Connection.query`.
        """
        rows = self._connection.query(QUERIES["backfill_due"], {"sink": self._sink, "epoch": self._outbox.epoch})
        if not rows:
            raise Fenced(f"sink {self._sink} is served by another daemon")
        if rows[0][0]:
            self._ask()
        before = self._task()
        self._tasks = [
            _Task(*row) for row in self._connection.query(QUERIES["unfinished_backfills"], {"sink": self._sink})
        ]
        self._note()
        task = self._task()
        if task is not None and (before is None or before.id != task.id):
            self.due_at = min(self.due_at, time.monotonic())
            log.info("A backfill is under way.", extra=self._fields(table=f"{task.schema}.{task.table}"))

    def _ask(self) -> None:
        """Ask for the backfill this new sink begins with."""
        chosen = []
        for relation, schema, table, obstacle in self._connection.query(QUERIES["backfill_candidates"]):
            if not self._wants(schema, table):
                continue
            if obstacle is None:
                chosen.append((relation, schema, table))
            else:
                log.warning(
                    "The rows of a table are left out of the backfill.",
                    extra=self._fields(table=f"{schema}.{table}", reason=obstacle),
                )
        parameters: dict[str, object] = {
            "sink": self._sink,
            "relations": [relation for relation, _, _ in chosen],
            "schemas": [schema for _, schema, _ in chosen],
            "tables": [table for _, _, table in chosen],
        }
        self._connection.query(QUERIES["begin_with_backfill"], parameters)

    def _task(self) -> _Task | None:
        return next((task for task in self._tasks if not task.paused), None)

    def _note(self) -> None:
        self._moving = frozenset(task.relation for task in self._tasks if task.begun and task.by_key)
        if self._task() is None:
            self.due_at = float("inf")

    @property
    def chunk(self) -> str:
        """A name for the chunk in hand that no other has."""
        return "rows/{}/{}".format(*self._handed or ("", ""))

    # -- reading ------------------------------------------------------------------------------------------------

    def next_batch(self, acked: int | None, *, events: int, bytes_: int, roomy: bool = False) -> Batch | None:
        """As :meth:`cdc.outbox.Outbox.next_batch`, with rows of a table where their turn has come.

        Args:
            acked: also acknowledges the rows of the batch before.
            events: at most so many events.
            roomy: while rows are to be told of the page may have `PAGE` events: see :func:`slices`.
            bytes_: roughly so many bytes of images, of events and of rows.
        """
        task, now = self._task(), time.monotonic()
        due = now >= self.due_at
        # Changes that came while a chunk was on its way need not wait for the next one to be read.
        stream_first = self._handed is not None and acked is not None and now - self._changed_at < QUIET_AFTER
        if task is None or not due or stream_first:
            if self._handed is not None and acked is not None:
                self.acknowledge(acked)
                acked = None
            batch = self._outbox.next_batch(acked, events=events, bytes_=bytes_)
            if batch is not None:
                self._changed_at = now
                return self.complete(batch)
            if task is None or not due:
                return None
        events = max(events, PAGE) if roomy else events
        done = self._handed if acked is not None else None
        self._read_at = time.monotonic()
        parameters: dict[str, object] = {
            "sink": self._sink,
            "epoch": self._outbox.epoch,
            "acked": acked,
            "events": events,
            "bytes": bytes_,
            "backfill": task.id,
            "done": done[1] if done is not None and done[0] == task.id else None,
            "rows": max(1, min(task.chunk, int(self._rows))),
        }
        if done is not None and done[0] != task.id:  # somebody has paused or cancelled that one
            self.acknowledge(acked or 0)
            parameters["acked"] = None
        try:
            found = self._page("backfill_batch", parameters)
        except Undecodable as error:
            if is_committed(error):
                parameters["acked"] = parameters["done"] = None
            return self._sort(task, self._page("backfill_batch_in_bytes", parameters), events, bytes_, in_bytes=True)
        return self._sort(task, found, events, bytes_, in_bytes=False)

    def _page(self, query: str, parameters: dict[str, object]) -> list[tuple[Any, ...]]:
        try:
            return self._connection.query(QUERIES[query], parameters, one_snapshot=True)
        except TooSlow:
            self._rows = SMALLEST
            parameters["rows"] = 1
            return self._connection.query(QUERIES[query], parameters, deadline=PATIENCE, one_snapshot=True)

    def _sort(
        self, task: _Task, found: list[tuple[Any, ...]], events: int, bytes_: int, *, in_bytes: bool
    ) -> Batch | None:
        """Tell the page, the rows and what else there is to say about them from each other."""
        self._handed = None
        crashpoints.reached("after-chunk")
        control = found.pop() if found and found[-1][4] == "x" else None
        page = [row[:8] for row in found if row[4] not in ("r", "R")]
        if page:
            self._changed_at = self._read_at
        rows: Sequence[Event | Unreadable] = ()
        if control is not None:
            chunk, looked_at, over, obstacle = control[0], control[3], control[5], control[6]
            if over is not None:
                self._end(task, "done", None)
            elif obstacle is not None:
                self._end(task, "failed", _text(obstacle))
            else:
                if not task.begun:
                    self.look()  # how it pages is known from here on
                self._handed = (task.id, chunk)
                self.due_at = self._read_at + (looked_at / task.rate if task.rate else 0.0)
                told = [row for row in found if row[4] in ("r", "R")]
                self._took = (time.monotonic() - self._read_at) * looked_at / (looked_at + len(page) + 1)
                decode = self._outbox.decode_bytes if in_bytes else self._outbox.decode
                rows = decode([row[:8] for row in told], [row[8] for row in told])
        if not page and self._handed is None:
            return None
        decoded = self._outbox.decode_bytes(page) if in_bytes else self._outbox.decode(page)
        full = is_full(page, events=events, bytes_=bytes_)
        return self.complete(Batch(decoded, page[-1][0] if page else 0, full, rows))

    def complete(self, batch: Batch) -> Batch:
        """Let an update that makes a row jump over the place we have reached be followed by the whole row."""
        if not self._moving:
            return batch
        events: list[Event | Unreadable] = []
        for event in batch.events:
            events.append(event)
            if (row := moved_row(event, self._moving)) is not None:
                events.append(row)
        return batch if len(events) == len(batch.events) else Batch(events, batch.last_seq, batch.full, batch.rows)

    def acknowledge(self, acked: int) -> None:
        """Acknowledge without reading on: a page, and the rows that came with it. Raises as :meth:`look`."""
        if self._handed is None:
            self._outbox.acknowledge(acked)
            return
        backfill, chunk = self._handed
        self._handed = None
        parameters: dict[str, object] = {
            "sink": self._sink,
            "epoch": self._outbox.epoch,
            "acked": acked,
            "backfill": backfill,
            "done": chunk,
        }
        if not self._connection.query(QUERIES["acknowledge_chunk"], parameters):
            raise Fenced(f"sink {self._sink} is served by another daemon")
        crashpoints.reached("after-chunk-stored")

    def delivered(self, seconds: float) -> None:
        """The rows in hand are delivered, which took so long: choose how many come next."""
        target = QUIET_TARGET if self._read_at - self._changed_at > QUIET_AFTER else TARGET
        factor = target / max(self._took + seconds, 0.001)
        self._rows = max(float(SMALLEST), self._rows * min(2.0, max(0.5, factor)))
        self._rows = min(self._rows, 100_000.0)

    def _end(self, task: _Task, state: State, reason: str | None) -> None:
        crashpoints.reached("before-backfill-ends")
        parameters: dict[str, object] = {
            "backfill": task.id,
            "state": state,
            "reason": reason,
            "epoch": self._outbox.epoch,
        }
        self._connection.query(QUERIES["end_backfill"], parameters)
        table = f"{task.schema}.{task.table}"
        if state == "done":
            log.info("A backfill is done.", extra=self._fields(table=table))
        else:
            log.error("A backfill has failed.", extra=self._fields(table=table, error=reason))
        self.due_at = time.monotonic()
        self.look()


def slices(events: Sequence[Event | Unreadable], size: int) -> list[Sequence[Event | Unreadable]]:
    """A page, or rows of a chunk, as many at a time as a batch has events."""
    if len(events) <= size:
        return [events]
    return [events[start : start + size] for start in range(0, len(events), size)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else bytes(value).decode(errors="replace")


# -- for people -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A captured table.

    Attributes:
        obstacle: why its rows cannot be told of, or None.
    """

    relation: int
    schema: str
    table: str
    obstacle: str | None


@dataclass(frozen=True, slots=True)
class Backfill:
    """The last backfill of a table for a sink.

    Attributes:
        relation: the table's oid.
        reason: why it failed, or None.
        condition: SQL that its rows meet, or None: all.
        chunk: at most so many rows at a time.
        rate: at most so many rows a second, or None.
        estimate: rows of the table when it began, by the planner; None: it has not begun.
        rows_read: rows looked at so far.
        rows_told: those of them that became events.
    """

    id: int
    sink: str
    relation: int
    schema: str
    table: str
    state: State
    reason: str | None
    condition: str | None
    chunk: int
    rate: int | None
    asked_at: datetime
    ended_at: datetime | None
    estimate: int | None
    rows_read: int
    rows_told: int
    began_at: datetime | None
    moved_at: datetime | None

    @property
    def share(self) -> float:
        """How much of it is done, 0 to 1, as far as one can say."""
        if self.state == "done":
            return 1.0
        if not self.estimate:
            return 0.0
        return min(self.rows_read / self.estimate, 0.99)  # the planner may have thought of fewer rows than there are

    @property
    def speed(self) -> float | None:
        """Rows a second since it began; None: not known."""
        if self.began_at is None or self.moved_at is None or not self.rows_read:
            return None
        return self.rows_read / max((self.moved_at - self.began_at).total_seconds(), 0.001)

    @property
    def remaining(self) -> float | None:
        """Seconds it will take, if it goes on as it has; None: not known."""
        if self.state != "running" or self.speed is None or not self.estimate or self.rows_read >= self.estimate:
            return None
        return (self.estimate - self.rows_read) / self.speed

    def to_json(self) -> dict[str, Any]:
        """As ``cdc backfill status --json`` prints it."""
        return {
            "id": self.id,
            "table": f"{self.schema}.{self.table}",
            "state": self.state,
            "reason": self.reason,
            "condition": self.condition,
            "chunk": self.chunk,
            "rate": self.rate,
            "rows_read": self.rows_read,
            "rows_told": self.rows_told,
            "estimate": self.estimate,
            "share": round(self.share, 4),
            "rows_per_second": None if self.speed is None else round(self.speed, 1),
            "remaining_seconds": None if self.remaining is None else round(self.remaining, 1),
            "asked_at": self.asked_at.isoformat(),
            "began_at": self.began_at.isoformat() if self.began_at else None,
            "ended_at": self.ended_at.isoformat() if self.ended_at else None,
        }


def backfills(connection: Connection, sink: str | None = None) -> list[Backfill]:
    """The last backfill of each table, of every sink or of one.

    Raises:
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    return [Backfill(*row) for row in connection.query(QUERIES["backfills"], {"sink": sink})]


def candidates(connection: Connection) -> list[Candidate]:
    """Every captured table. Raises as :func:`backfills`."""
    return [Candidate(*row) for row in connection.query(QUERIES["backfill_candidates"])]


def start(
    connection: Connection, sink: str, table: Candidate, *, rows: int, rate: int | None, condition: str | None
) -> bool:
    """Ask for the rows of a table; False when they are being told of already.

    Args:
        connection: with a condition, of who migrates.
        rows: at most so many at a time.
        rate: at most so many a second.
        condition: SQL that they have to meet.

    Raises:
        CdcError: the table cannot be read, or the condition is none.
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    if table.obstacle is not None:
        raise CdcError(f"{table.schema}.{table.table} {table.obstacle}")
    parameters: dict[str, object] = {
        "sink": sink,
        "relation": table.relation,
        "schema": table.schema,
        "table": table.table,
        "rows": rows,
        "rate": rate,
        "condition": condition,
    }
    if condition is not None:
        connection.query(QUERIES["check_condition"], parameters)
    query = "start_backfill" if condition is None else "start_backfill_where"
    started = bool(connection.query(QUERIES[query], parameters))
    connection.query(QUERIES["request"], {"sink": sink})
    return started


FROM: dict[State, tuple[State, ...]] = {
    "paused": ("running",),
    "running": ("paused",),
    "cancelled": ("running", "paused"),
}
"""State → the states it can be brought about from."""


def change(connection: Connection, sink: str, state: State, relations: Sequence[int] | None) -> list[str]:
    """Pause, resume or cancel backfills of a sink. Raises as :func:`backfills`.

    Args:
        state: ``paused``, ``running`` or ``cancelled``.
        relations: of these tables; None: all.

    Returns:
        The tables it was done to, ``schema.table``.
    """
    parameters: dict[str, object] = {
        "sink": sink,
        "state": state,
        "states": list(FROM[state]),
        "relations": None if relations is None else list(relations),
    }
    changed = connection.query(QUERIES["change_backfills"], parameters)
    connection.query(QUERIES["request"], {"sink": sink})
    return sorted(f"{schema}.{table}" for schema, table in changed)
