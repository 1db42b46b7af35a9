"""The book, read: batches of events in an order that loses and reorders nothing, and where each sink stands.

The reading itself is one SQL function, ``cdc.next_batch`` (see the migration, and docs/design.md for why the window
between two snapshots is the only right one); :mod:`cdc.decoding` makes events of its rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from cdc.connection import Connection
from cdc.decoding import CapturedTable, Decoder, Unreadable
from cdc.errors import CdcError, DatabaseError, DatabaseUnreachable, Fenced, TooSlow, Undecodable
from cdc.event import Event
from cdc.sql import QUERIES

LEASE = 6.0
"""Seconds of silence after which a process counts as stopped or cut off, and its sinks may be taken over."""
FOREVER = 1e9
"""Seconds of silence that nobody is relieved for."""
CONFIRM_DEADLINE = 4.5
"""Seconds for the question whether a sink is still ours; with a pipeline's heartbeat, how soon a dead connection is
noticed while there is nothing to do."""
PATIENCE = 600.0
"""Seconds for a page that could not be had in the usual time from a server that is alive: opening a window of tens of
millions of events."""

ELSEWHERE = "positions taken in another cluster, whose transaction ids say nothing here"
ELSEWHERE_CURE = (
    "was the database restored from a dump? run cdc rebase: what the sinks had not delivered is delivered, some of it "
    "again"
)


@dataclass(frozen=True, slots=True)
class Batch:
    """One page of a window.

    Attributes:
        events: by ascending seq.
        last_seq: what to acknowledge once all of it is delivered.
        full: the page ended because of its limits; more is waiting.
        rows: of a table, as they are after these events; see :mod:`cdc.backfill`.
    """

    events: Sequence[Event | Unreadable]
    last_seq: int
    full: bool
    rows: Sequence[Event | Unreadable] = ()


@dataclass(frozen=True, slots=True)
class Owner:
    """A daemon.

    Attributes:
        name: for people: host and process id.
        process: by which the database tells its sessions from those of other daemons; see :func:`join_process`.
    """

    name: str
    process: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A sink has become ours.

    Attributes:
        epoch: the number of this claim.
        happened: what has become of the database since the position was stored: ``promoted``, it is on another timeline
            (a standby was promoted, or it was restored to an earlier time); ``upgraded`` by pg_upgrade.
    """

    epoch: int
    happened: Literal["promoted", "upgraded"] | None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What people want of a sink.

    Attributes:
        paused: it is to deliver nothing.
        requests: grows whenever somebody touches its dead letters, or pauses or resumes it.
    """

    paused: bool
    requests: int


@dataclass(frozen=True, slots=True)
class Skipping:
    """After some tables were rewound: what a position shows was delivered, and of that only their events come again.

    Attributes:
        before: transactions from here on are not shown.
        unless: nor are these, which were in progress.
        tables: ``schema.table`` of those that were rewound.
    """

    before: int
    unless: frozenset[int]
    tables: frozenset[str]

    @classmethod
    def of(cls, position: str, tables: Sequence[str]) -> Skipping:
        """Of a ``pg_snapshot`` as text."""
        _, xmax, in_progress = position.split(":")
        return cls(int(xmax), frozenset(map(int, filter(None, in_progress.split(",")))), frozenset(tables))

    def skips(self, event: Event) -> bool:
        """Whether an event of the stream is not to come again."""
        source = event.source
        if f"{source.schema_name}.{source.table}" in self.tables:
            return False
        return source.txid < self.before and source.txid not in self.unless


class Outbox:
    """One sink's place in the book of one database. Belongs to the thread of its connection."""

    def __init__(
        self, connection: Connection, *, database: str, sink: str, owner: Owner, stores_windows: bool = True
    ) -> None:
        """
        Args:
            connection: an open session; this object does not close it.
            database: the database's name in the configuration.
            sink: the sink's name in the configuration.
            owner: who serves the sink.
            stores_windows: whether each window is stored before its rows are used, so that a session to come reads the
                same one again. Otherwise that is left out where it takes a commit of its own; see ``cdc.next_batch``.
        """
        self._connection = connection
        self._database = database
        self._sink = sink
        self._owner = owner
        self._stores_windows = stores_windows
        self.epoch: int | None = None
        """The number of our claim."""
        self._holder: tuple[int, int] | None = None  # who serves the sink in our place: the claim, and its session
        self._holder_heard_at = 0.0  # the last that we have seen of him
        self._tables: dict[int, CapturedTable] = {}
        self._decoder = Decoder(database, self._table, self._primary_key)

    def claim(self, *, start: str) -> Claim | None:
        """Become the one who serves the sink: a lock of this session, and an epoch that fences off everybody else.

        Args:
            start: where a sink begins that has no position yet: ``now``, ``earliest`` or ``backfill``.

        Returns:
            None when another daemon serves it and has been heard of in the last `LEASE` seconds, or we have not looked
            for so long.

        Raises:
            WrongCluster: the position was taken in another cluster.
            DatabaseError: see :meth:`cdc.connection.Connection.query`.
        """
        register_sink(self._connection, self._sink, start=start)
        parameters: dict[str, object] = {
            "sink": self._sink,
            "owner": self._owner.name,
            "process": self._owner.process,
            "patience": LEASE if self._has_holder_been_silent() else FOREVER,
        }
        self.epoch, happened = self._connection.query(QUERIES["take"], parameters)[0]
        return None if self.epoch is None else Claim(self.epoch, happened)

    def _has_holder_been_silent(self) -> bool:
        """Whether `LEASE` seconds have gone by without a sign of life of whoever serves the sink; True if nobody does.

        The database knows when it last heard from the sessions he has now. When the one that spoke for all of them has
        just been ended, he seems to have been silent for as long as the others have, perhaps since a long delivery
        began. So what counts is the last that we have seen of him, be it that he was there when we first looked.
        """
        rows = self._connection.query(QUERIES["holder"], {"sink": self._sink})
        if not rows:
            return True
        [(epoch, pid, heard_at, now)] = rows
        if self._holder != (epoch, pid):
            self._holder, self._holder_heard_at = (epoch, pid), now
        self._holder_heard_at = max(self._holder_heard_at, heard_at or 0.0)
        return bool(now - self._holder_heard_at >= LEASE)

    def confirm(self) -> Wishes:
        """Make sure that the sink is still ours, and the connection alive. Raises as :meth:`next_batch`.

        Returns:
            What people want of it.
        """
        parameters: dict[str, object] = {"sink": self._sink, "epoch": self.epoch}
        return Wishes(*self._owned(QUERIES["confirm"], parameters, deadline=CONFIRM_DEADLINE))

    def next_batch(self, acked: int | None, *, events: int, bytes_: int) -> Batch | None:
        """Acknowledge what came before and read the next page, in one round trip that commits before it returns.

        Args:
            acked: seq up to which everything handed out is delivered; None when there is nothing new to say.
            events: at most so many events.
            bytes_: roughly so many bytes of images; a single larger event still comes, alone.

        Returns:
            None when everything is delivered.

        Raises:
            Fenced: another daemon has taken over.
            DatabaseError: see :meth:`cdc.connection.Connection.query`.
        """
        parameters: dict[str, object] = {
            "sink": self._sink,
            "epoch": self.epoch,
            "acked": acked,
            "events": events,
            "bytes": bytes_,
            "stored": self._stores_windows,
        }
        try:
            rows = self._page("next_batch", parameters)
        except Undecodable as error:
            # The page is still to come, or comes again: nothing of it was acknowledged.
            if is_committed(error):
                parameters["acked"] = None
            return self._batch_in_bytes(parameters, events=events, bytes_=bytes_)
        if not rows:
            return None
        return Batch(self.decode(rows), rows[-1][0], is_full(rows, events=events, bytes_=bytes_))

    def decode(self, rows: Sequence[tuple[Any, ...]], ids: Sequence[str] | None = None) -> list[Event | Unreadable]:
        """The events of rows of the outbox; see :meth:`cdc.decoding.Decoder.decode`."""
        return self._decoder.decode(rows, ids)

    def skipping(self) -> Skipping | None:
        """What is not to be delivered again, after some tables were rewound. Raises as :meth:`next_batch`."""
        shown, tables = self._owned(QUERIES["skips"], {"sink": self._sink, "epoch": self.epoch})
        return None if shown is None else Skipping.of(shown, tables)

    def _page(self, query: str, parameters: dict[str, object]) -> list[tuple[Any, ...]]:
        try:
            return self._connection.query(QUERIES[query], parameters)
        except TooSlow:
            return self._connection.query(QUERIES[query], parameters, deadline=PATIENCE)

    def _batch_in_bytes(self, parameters: dict[str, object], *, events: int, bytes_: int) -> Batch | None:
        """The next page where something in it is no text: that becomes unreadable, and nothing else does."""
        rows = self._page("next_batch_in_bytes", parameters)
        if not rows:
            return None
        found = self.decode_bytes(rows)
        return Batch(found, rows[-1][0], is_full(rows, events=events, bytes_=bytes_))

    def window(self) -> tuple[str | None, int]:
        """Which window is being read, and up to which seq it is acknowledged. Raises as :meth:`next_batch`.

        Returns:
            A name that no other window has, of any cluster or timeline, or None when none is open; and the seq.
        """
        window, acked = self._owned(QUERIES["window"], {"sink": self._sink, "epoch": self.epoch})
        return window, acked

    def acknowledge(self, acked: int) -> None:
        """Acknowledge without reading on. Raises as :meth:`next_batch`."""
        self._owned(QUERIES["acknowledge"], {"sink": self._sink, "epoch": self.epoch, "acked": acked})

    def set_state(self, state: str, error: str | None = None) -> None:
        """Say what the sink is doing, for `cdc status`. Raises as :meth:`next_batch`."""
        parameters: dict[str, object] = {"sink": self._sink, "epoch": self.epoch, "state": state, "error": error}
        self._owned(QUERIES["set_state"], parameters)

    def add_dropped(self, number: int) -> None:
        """Count ephemeral changes that were not delivered. Raises as :meth:`next_batch`, except Fenced."""
        self._connection.execute(QUERIES["add_dropped"], {"sink": self._sink, "epoch": self.epoch, "dropped": number})

    def _owned(self, query: str, parameters: dict[str, object], *, deadline: float | None = None) -> tuple[Any, ...]:
        """Run a query that returns a row if the sink is ours."""
        rows = self._connection.query(query, parameters, deadline=deadline)
        if not rows:
            raise Fenced(f"sink {self._sink} is served by another daemon")
        return rows[0]

    def decode_bytes(
        self, rows: Sequence[tuple[Any, ...]], ids: Sequence[str] | None = None
    ) -> list[Event | Unreadable]:
        """The events of rows of the outbox, their columns as ``cdc.next_batch`` has them, but texts of rows as bytes.

        Raises:
            DatabaseError: see :meth:`cdc.connection.Connection.query`.
        """
        codec = self._connection.codec
        return [
            event
            for index, row in enumerate(rows)
            for event in self._decoder.decode_bytes(row, codec, None if ids is None else ids[index])
        ]

    # -- what decoding asks for ---------------------------------------------------------------------------------

    def _table(self, table_id: int) -> CapturedTable:
        if table_id not in self._tables:
            self._tables = {
                row[0]: CapturedTable(row[1], row[2], row[3], tuple(row[4]) if row[4] else None, row[5])
                for row in self._connection.query(QUERIES["captured_tables"])
            }
        return self._tables[table_id]

    def _primary_key(self, table: CapturedTable) -> Sequence[str]:
        [(columns,)] = self._connection.query(QUERIES["primary_key"], {"relation": table.relation})
        return columns or ()


def is_committed(error: Undecodable) -> bool:
    """Whether a query has done what it did although its answer cannot be read: it was the client who could not.

    What it has acknowledged must not be acknowledged again then: it would be taken for a part of the page that came.
    """
    return not error.sqlstate


def is_full(rows: Sequence[tuple[Any, ...]], *, events: int, bytes_: int) -> bool:
    """Whether a page ended because of its limits; more is waiting then."""
    return len(rows) >= events or sum(_byte_length(row[5]) + _byte_length(row[6]) for row in rows) >= bytes_


def _byte_length(text: str | bytes | memoryview | None) -> int:
    """How long PostgreSQL counts a text."""
    if text is None:
        return 0
    return len(text.encode()) if isinstance(text, str) and not text.isascii() else len(text)


# -- what needs no sink -----------------------------------------------------------------------------------------


def join_process(connection: Connection, process: int) -> None:
    """Let a session be known as one of a daemon's, by an advisory lock that all of them share.

    Args:
        connection: the session.
        process: a number drawn at random by the daemon, 0 to 2^31 - 1.

    Raises:
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    connection.query(QUERIES["join_process"], {"process": process})


def tells_what_is_on_disk(connection: Connection) -> bool:
    """Whether the server says how far its log is on disk; not everybody who offers PostgreSQL lets everybody ask.

    Raises:
        DatabaseUnreachable: see :meth:`cdc.connection.Connection.query`.
    """
    try:
        connection.query(QUERIES["tells_what_is_on_disk"])
    except DatabaseUnreachable:
        raise
    except DatabaseError:
        return False
    return True


def beat(connection: Connection) -> float:
    """Be heard of; seconds since 1970 by the server's clock. Raises as :func:`register_sink`."""
    return float(connection.query(QUERIES["beat"])[0][0])


def note_stall(connection: Connection, sink: str, *, epoch: int, seconds: float) -> None:
    """Say, in the owner's stead, that a sink has not returned for so many seconds. Raises as :func:`register_sink`."""
    connection.query(QUERIES["note_stall"], {"sink": sink, "epoch": epoch, "seconds": seconds})


def set_state(connection: Connection, sink: str, *, epoch: int, state: str) -> None:
    """Say, in the owner's stead, what a sink is doing. Raises as :func:`register_sink`."""
    connection.query(QUERIES["set_state"], {"sink": sink, "epoch": epoch, "state": state, "error": None})


def register_sink(connection: Connection, sink: str, *, start: str) -> bool:
    """Give a sink its first position (``now``, ``earliest``, ``backfill``); False when it has one already.

    Raises:
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    return bool(connection.query(QUERIES["register_sink"], {"sink": sink, "start": start}))


def note_moment(connection: Connection) -> float:
    """As :func:`beat`, and remember now as a position that a sink can be rewound to."""
    return float(connection.query(QUERIES["note_moment"])[0][0])


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


def forget_sink(connection: Connection, sink: str, *, dead_letters: bool) -> None:
    """Remove a sink's position, and its dead letters if told to.

    Raises:
        CdcError: a daemon serves it; or it has dead letters, which are not to be discarded.
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    letters, owner = connection.query(QUERIES["forgettable"], {"sink": sink})[0]
    if letters and not dead_letters:
        raise CdcError(f"sink {sink} has {letters} dead letters (--dead-letters discards them)")
    if not connection.query(QUERIES["forget_sink"], {"sink": sink}):
        raise CdcError(f"sink {sink} is served by {owner} (stop that daemon, or let it have the new configuration)")


EARLIEST = "3:3:"
"""The position before everything that is kept."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a sink stands against another position.

    Attributes:
        position: up to which it has delivered everything.
        covers: whether that shows everything the other does.
        passed: whether it has delivered everything the other shows.
        owner: who serves it; None: nobody.
        id, epoch: of its claim.
    """

    position: str
    covers: bool
    passed: bool
    owner: str | None
    id: int
    epoch: int


def position_at(connection: Connection, moment: datetime) -> str:
    """A position that shows nothing committed after a moment; what it does not show may have been before.

    Raises:
        CdcError: the outbox does not have everything since then.
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    [(position, first)] = connection.query(QUERIES["moments"], {"moment": moment})
    if position is None:
        since = "a moment that is yet to come" if first is None else first.isoformat(timespec="seconds")
        raise CdcError(
            f"the outbox is known to have everything only since {since} (--to earliest: all that it still has)"
        )
    return str(position)


def events_since(connection: Connection, position: str) -> list[tuple[str, str, str, int]]:
    """How many events of which schema, table and operation there are after a position. Raises as :func:`register_sink`.

    The operation is that of the outbox, one letter; see :data:`cdc.decoding.OPS`.
    """
    rows = connection.query(QUERIES["events_since"], {"position": position}, deadline=PATIENCE)
    return [(schema, table, op, number) for schema, table, op, number in rows]


def captured_names(connection: Connection) -> list[tuple[str, str]]:
    """Schema and name of every table that is or was captured. Raises as :func:`register_sink`."""
    return sorted({(row[2], row[3]) for row in connection.query(QUERIES["captured_tables"])})


def standing(connection: Connection, sink: str, position: str) -> Standing | None:
    """Where a sink stands against a position; None: it has none. Raises as :func:`register_sink`."""
    rows = connection.query(QUERIES["stands_at"], {"sink": sink, "position": position})
    return Standing(*rows[0]) if rows else None


def rewind(connection: Connection, sink: str, position: str, tables: Sequence[str] | None, *, patience: float) -> bool:
    """Let a sink go on from another position.

    Whoever serves it is fenced off, and nobody serves it anew before he has noticed or `patience` is over: what he has
    in hand would come between events that are older.

    Args:
        connection: an open session, to be closed afterwards.
        position: where it goes on.
        tables: ``schema.table`` of those whose events alone come again; None: all.
        patience: seconds.

    Returns:
        Whether whoever served it has let go.

    Raises:
        DatabaseError: see :meth:`cdc.connection.Connection.query`; also when the sink has not come that far.
    """
    at = standing(connection, sink, position)
    if at is None:
        return True
    claim: dict[str, object] = {"id": at.id, "epoch": at.epoch}
    connection.query(QUERIES["hold_rewound"], claim)
    parameters: dict[str, object] = {
        "sink": sink,
        "position": position,
        "tables": None if tables is None else list(tables),
    }
    connection.query(QUERIES["rewind"], parameters)
    ends = time.monotonic() + patience
    while connection.query(QUERIES["still_held"], claim)[0][0]:
        if time.monotonic() > ends:
            return False
        time.sleep(0.1)
    return True


def set_paused(connection: Connection, sink: str, *, paused: bool) -> bool:
    """Let a sink deliver nothing, or go on; its daemon notices within seconds. Raises as :func:`register_sink`.

    Returns:
        False when the sink has no position.
    """
    return bool(connection.query(QUERIES["set_paused"], {"sink": sink, "paused": paused}))


def attendance(connection: Connection, sink: str) -> tuple[str | None, bool] | None:
    """Who serves a sink, and whether it is paused; None: it has no position. Raises as :func:`register_sink`."""
    rows = connection.query(QUERIES["attendance"], {"sink": sink})
    return (rows[0][0], rows[0][1]) if rows else None


def ring(connection: Connection, channel: str) -> None:
    """Let every pipeline of the database look, and ask what is wanted of it. Raises as :func:`register_sink`."""
    connection.query(QUERIES["ring_self"], {"channel": channel, "nonce": ""})


def moved_sinks(connection: Connection) -> list[str]:
    """Sinks whose position was taken in another cluster and says nothing here. Raises as :func:`register_sink`."""
    return [row[0] for row in connection.query(QUERIES["moved_sinks"])]


def rebase(connection: Connection) -> int:
    """Give every sink a position that means something here; see ``cdc.rebase``. Raises as :func:`register_sink`.

    Returns:
        How many events will be delivered, some of them again.
    """
    return int(connection.query(QUERIES["rebase"], deadline=PATIENCE)[0][0])


# -- for people -------------------------------------------------------------------------------------------------

PENDING_CAP = 100_000
"""Pending events are counted up to here."""


@dataclass(frozen=True, slots=True)
class SinkStatus:
    """Where one sink of one database stands, as the database knows it.

    Attributes:
        state: what its last pipeline said of itself; see the head of :mod:`cdc.pipeline`.
        state_since: when that began.
        paused: whether it is to deliver nothing.
        served: whether a daemon serves it now.
        silent_for: seconds since that daemon was last heard of; None where our role may not see it.
        pending: events not delivered yet, those it will filter out included; at most `PENDING_CAP`.
        capped: whether there are more than that.
        lag: seconds since the oldest pending event was recorded; 0 when nothing is pending.
        dead_letters: events set aside.
        parked: those of them that let later events of their key wait.
        dropped: ephemeral changes it was not given.
    """

    name: str
    state: str
    owner: str | None
    last_error: str | None
    last_error_at: datetime | None
    delivered_at: datetime | None
    served: bool
    silent_for: float | None
    pending: int
    capped: bool
    lag: float
    dead_letters: int
    dropped: int
    parked: int
    paused: bool
    state_since: datetime


@dataclass(frozen=True, slots=True)
class OpenTransaction:
    """A transaction that has written and not ended: nobody has its changes yet, and retention waits for it.

    Attributes:
        pid: its server process; None for a prepared one.
        prepared: the name it was prepared under, or None.
        state: ``active``, ``idle in transaction``, …; empty where our role may not see it.
        database: where it is; perhaps another database of the same cluster.
        age: seconds since it began; None where our role may not see it.
    """

    pid: int | None
    prepared: str | None
    application: str
    state: str
    database: str
    age: float | None


def sink_statuses(connection: Connection) -> list[SinkStatus]:
    """Every sink this database knows, by name. Raises as :func:`register_sink`."""
    statuses = []
    for row in connection.query(QUERIES["sink_status"]):
        name, state, owner, last_error, last_error_at, delivered_at, served, silent_for, pending, lag, *counts = row
        capped = pending > PENDING_CAP
        if capped:
            # The query has seen any hundred thousand of them, not the oldest.
            oldest = connection.query(QUERIES["oldest_pending"], {"sink": name})
            lag = (oldest[0][0] if oldest else None) or lag
        statuses.append(
            SinkStatus(
                name=name,
                state=state,
                owner=owner,
                last_error=last_error,
                last_error_at=last_error_at,
                delivered_at=delivered_at,
                served=served,
                silent_for=silent_for,
                pending=min(pending, PENDING_CAP),
                capped=capped,
                lag=max(lag or 0.0, 0.0),
                dead_letters=counts[0],
                dropped=counts[1],
                parked=counts[2],
                paused=counts[3],
                state_since=counts[4],
            )
        )
    return statuses


@dataclass(frozen=True, slots=True)
class Pulse:
    """How a database does, beside its sinks.

    Attributes:
        outbox_bytes: the outbox on disk, indexes included.
        queue_usage: how full the cluster's notification queue is, 0 to 1.
        armed: whether a listener asks writers to ring.
        oldest: the writing transaction that has been open for longest, if there is one.
    """

    outbox_bytes: int
    queue_usage: float
    armed: bool
    oldest: OpenTransaction | None


def pulse(connection: Connection) -> Pulse:
    """How the database does. Raises as :func:`register_sink`."""
    [(outbox_bytes, queue_usage, armed, *oldest)] = connection.query(QUERIES["pulse"])
    return Pulse(outbox_bytes, float(queue_usage), armed, OpenTransaction(*oldest) if oldest[3] is not None else None)


def size(connection: Connection) -> int:
    """Bytes of the outbox on disk, indexes included. Raises as :func:`register_sink`."""
    return int(connection.query(QUERIES["outbox_bytes"])[0][0])
