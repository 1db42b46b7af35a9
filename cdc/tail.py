"""Looking on: what is written into the book, as it is committed, for people.

The same windows as a pipeline's (docs/design.md), read by queries that change nothing, from a position kept in memory.
So nobody's delivery is touched, membership of `cdc_reader` is enough, and with the process the position is gone.
Ephemeral changes are not in the book and not seen here.
"""

from __future__ import annotations

from cdc.connection import Connection
from cdc.decoding import Unreadable
from cdc.event import Event
from cdc.outbox import Outbox, Owner, current_snapshot
from cdc.sql import QUERIES

SMALL = 5000
"""Windows of more events are read along seq."""


class Tail:
    """One reader of one database. Belongs to the thread of its connection."""

    def __init__(self, connection: Connection, *, database: str) -> None:
        """
        Args:
            connection: an open session, used for nothing else; this object does not close it.
            database: its name in the configuration.

        Raises:
            DatabaseError: see :meth:`cdc.connection.Connection.query`.
        """
        self._connection = connection
        self._book = Outbox(connection, database=database, sink="", owner=Owner("tail", 0))
        connection.query(QUERIES["walk_indexes"])
        self._position = current_snapshot(connection)
        self._until: str | None = None
        self._last_seq = 0
        self._is_large = False

    def last(self, events: int) -> list[Event | Unreadable]:
        """The last so many events from before this reader began, oldest first. Raises as :meth:`read`."""
        rows = self._connection.query(QUERIES["tail_last"], {"until": self._position, "events": events})
        return self._book.decode_bytes(rows[::-1])

    def read(self, events: int = 500) -> list[Event | Unreadable]:
        """What has been committed since, in order, at most so many at once; empty when there is nothing new.

        Raises:
            DatabaseError: see :meth:`cdc.connection.Connection.query`.
        """
        if self._until is None:
            until, number, first = self._connection.query(QUERIES["tail_window"], {"position": self._position})[0]
            if not number:
                self._position = until
                return []
            self._until, self._is_large = until, number > SMALL
            if self._is_large:
                first = self._connection.query(QUERIES["tail_first"], self._window())[0][0]
            self._last_seq = first - 1
        query = QUERIES["tail_large" if self._is_large else "tail_small"]
        rows = self._connection.query(query, {**self._window(), "last_seq": self._last_seq, "events": events})
        if len(rows) < events:
            self._position, self._until = str(self._until), None
        else:
            self._last_seq = rows[-1][0]
        return self._book.decode_bytes(rows)

    def _window(self) -> dict[str, object]:
        return {"position": self._position, "until": self._until}
