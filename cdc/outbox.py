"""The book, read: batches of events in an order that loses and reorders nothing, and where each sink stands.

The reading itself is one SQL function, ``cdc.next_batch`` (see the migration, and docs/design.md for why the window
between two snapshots is the only right one). This side turns its rows into events: the outbox keeps both images of a
changed row as PostgreSQL wrote them, and the difference is taken here, on the text, so that no digit can get lost and
the writer does not pay for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from cdc.connection import Connection
from cdc.event import Event, Json, Op, join_object, quote, split_object
from cdc.sql import QUERIES

_OPS = {"i": Op.INSERT, "u": Op.UPDATE, "d": Op.DELETE, "t": Op.TRUNCATE}


@dataclass(frozen=True, slots=True)
class CapturedTable:
    """How a table was captured when an event of it was recorded."""

    relation: int
    schema: str
    table: str
    key: tuple[str, ...] | None
    image: Literal["diff", "full"]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An outbox row that is not a valid event, although only our trigger may write there."""

    id: str
    seq: int
    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class Batch:
    """One page of a window.

    Attributes:
        events: by ascending seq.
        last_seq: what to acknowledge once all of it is delivered.
        full: the page ended because of its limits; more is waiting.
    """

    events: Sequence[Event | Unreadable]
    last_seq: int
    full: bool


class Outbox:
    """One sink's place in the book of one database. Belongs to the thread of its connection."""

    def __init__(self, connection: Connection, *, database: str, sink: str, owner: str) -> None:
        """
        Args:
            connection: an open session; this object does not close it.
            database: the database's name in the configuration.
            sink: the sink's name in the configuration.
            owner: who serves the sink, for people: host and process id.
        """
        self._connection = connection
        self._database = database
        self._sink = sink
        self._owner = owner
        self._epoch: int | None = None
        self._tables: dict[int, CapturedTable] = {}

    def claim(self, *, start: str) -> bool:
        """Become the one who serves the sink: the session's advisory lock, and a new epoch against the predecessor.

        Args:
            start: where a sink begins that has no position yet, ``now`` or ``earliest``.

        Returns:
            False when another daemon serves it.

        Raises:
            DatabaseError: see :meth:`cdc.connection.Connection.query`.
        """
        register_sink(self._connection, self._sink, start=start)
        if not self._connection.query(QUERIES["try_own"], {"sink": self._sink})[0][0]:
            return False
        self._epoch = self._connection.query(QUERIES["claim"], {"sink": self._sink, "owner": self._owner})[0][0]
        return True

    def next_batch(self, acked: int | None, *, events: int, bytes_: int, deadline: float = 60.0) -> Batch | None:
        """Acknowledge what came before and read the next page, in one round trip that commits before it returns.

        Args:
            acked: seq up to which everything handed out is delivered; None when there is nothing new to say.
            events: at most so many events.
            bytes_: roughly so many bytes of images; a single larger event still comes, alone.
            deadline: seconds.

        Returns:
            None when everything is delivered.

        Raises:
            Fenced: another daemon has taken over.
            DatabaseError: see :meth:`cdc.connection.Connection.query`.
        """
        rows = self._connection.query(
            QUERIES["next_batch"],
            {"sink": self._sink, "epoch": self._epoch, "acked": acked, "events": events, "bytes": bytes_},
            deadline=deadline,
        )
        if not rows:
            return None
        size = sum(len(row[5] or "") + len(row[6] or "") for row in rows)
        return Batch([self._decode(row) for row in rows], rows[-1][0], len(rows) >= events or size >= bytes_)

    def acknowledge(self, acked: int) -> None:
        """Acknowledge without reading on. Raises as :meth:`next_batch`."""
        self._connection.execute(
            QUERIES["acknowledge"], {"sink": self._sink, "epoch": self._epoch, "acked": acked}
        )

    def set_state(self, state: str, error: str | None = None) -> None:
        """Say what the sink is doing, for `cdc status`. Raises as :meth:`next_batch`, except Fenced."""
        self._connection.execute(
            QUERIES["set_state"], {"sink": self._sink, "epoch": self._epoch, "state": state, "error": error}
        )

    def add_dead_letter(self, event: Event | Unreadable, reason: str) -> None:
        """Set an event aside for good, with the reason. Raises as :meth:`next_batch`."""
        text = event.to_json() if isinstance(event, Event) else event.text
        self._connection.execute(
            QUERIES["add_dead_letter"],
            {"sink": self._sink, "event_id": event.id, "event": text, "reason": reason},
        )

    # -- rows to events -----------------------------------------------------------------------------------------

    def _decode(self, row: tuple[Any, ...]) -> Event | Unreadable:
        seq, txid, at, table_id, op, old, new, context = row
        event_id = f"{self._database}-{seq}-{''.join(c for c in at if c.isdigit())}"
        try:
            table = self._table(table_id)
            truncated = op.isupper()
            before, after, changed = (None, None, None) if truncated else images(op, old, new, table.image)
            return Event.model_validate(
                {
                    "id": event_id,
                    "op": _OPS[op.lower()],
                    "source": {
                        "database": self._database,
                        "schema": table.schema,
                        "table": table.table,
                        "seq": seq,
                        "txid": int(txid),
                        "ts": datetime.fromisoformat(at),
                    },
                    "key": self._key(table, new or old),
                    "before": before,
                    "after": after,
                    "changed": changed,
                    "context": as_json(context),
                    "truncated": truncated,
                }
            )
        except (ValueError, LookupError) as error:
            # pydantic's own text would quote the row.
            reason = f"not a valid event: {type(error).__name__}"
            return Unreadable(event_id, seq, f'{{"seq":{seq},"old_row":{old or "null"},"new_row":{new or "null"}}}', reason)

    def _table(self, table_id: int) -> CapturedTable:
        if table_id not in self._tables:
            self._tables = {
                row[0]: CapturedTable(row[1], row[2], row[3], tuple(row[4]) if row[4] else None, row[5])
                for row in self._connection.query(QUERIES["captured_tables"])
            }
        return self._tables[table_id]

    def _key(self, table: CapturedTable, image: str | None) -> str | None:
        if table.key is None or image is None:
            return None
        members = split_object(image)
        columns: Sequence[str] = table.key
        if any(column not in members for column in columns):
            # A key column was renamed since the trigger was made: what the catalogue says now is the best there is.
            columns = self._connection.query(QUERIES["primary_key"], {"relation": table.relation})[0][0] or ()
            if not columns or any(column not in members for column in columns):
                return None
        return join_object({column: members[column] for column in columns})


def images(
    op: str, old: str | None, new: str | None, image: Literal["diff", "full"]
) -> tuple[str | None, str | None, tuple[str, ...] | None]:
    """What an event shows of the outbox's two images: before, after and the changed columns.

    Columns are compared as text, the way PostgreSQL wrote them: what looks the same is the same.

    Raises:
        ValueError: an image is not a JSON object.
    """
    if op != "u" or old is None or new is None:
        return old, new, None
    was, is_ = split_object(old), split_object(new)
    changed = tuple(name for name, value in is_.items() if was.get(name) != value)
    if image == "full":
        return old, new, changed
    return (
        join_object({name: was[name] for name in changed if name in was}),
        join_object({name: is_[name] for name in changed}),
        changed,
    )


def as_json(context: str | None) -> Json | None:
    """The application's cdc.context; text that is not JSON travels as a JSON string."""
    if context is None:
        return None
    value = Json(context)
    try:
        _ = value.value
    except (ValueError, RecursionError):
        return Json(quote(context))
    return value


# -- what needs no sink -----------------------------------------------------------------------------------------


def register_sink(connection: Connection, sink: str, *, start: str) -> bool:
    """Give a sink its first position, ``now`` or ``earliest``; False when it has one already.

    Raises:
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    return bool(connection.query(QUERIES["register_sink"], {"sink": sink, "start": start}))


def current_snapshot(connection: Connection) -> str:
    """Now, as a position. Raises as :func:`register_sink`."""
    return str(connection.query(QUERIES["current_snapshot"])[0][0])


def sinks_behind(connection: Connection, sinks: Sequence[str], target: str) -> list[str]:
    """Which of `sinks` have not delivered everything that snapshot `target` shows. Raises as :func:`register_sink`."""
    return [row[0] for row in connection.query(QUERIES["sinks_behind"], {"sinks": list(sinks), "target": target})]


def rotate(connection: Connection, retention: float) -> list[str]:
    """Give space of the outbox back; see ``cdc.rotate``. Raises as :func:`register_sink`.

    Args:
        retention: seconds events are kept after delivery.
    """
    return list(connection.query(QUERIES["rotate"], {"retention": retention})[0][0])

