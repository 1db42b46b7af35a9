"""What can be done from the console: pause and resume a sink or its backfills; look at, replay, discard dead letters.

By the same functions as the commands `cdc sinks`, `cdc backfill` and `cdc dead-letters`, each on a connection of its
own, so nothing depends on which daemon serves the sink. Whoever showed the token may do it, and the log says that it
was done.
"""

from __future__ import annotations

import logging
from typing import Any

from cdc import backfill, dead_letters, outbox
from cdc.connection import Connection
from cdc.dead_letters import Found, Selection
from cdc.fleet import Database, Fleet

log = logging.getLogger(__name__)

MOST_LETTERS = 100
"""Of each database that are shown."""
LONGEST_EVENT = 4000
"""Characters of an event that are shown."""


class NoSuch(Exception):
    """What was asked for does not exist, or makes no sense; the text is for the one who asked."""


class Actions:
    """Does it for one daemon."""

    def __init__(self, fleet: Fleet, *, values: bool) -> None:
        """
        Args:
            fleet: whose databases are meant.
            values: whether events are shown with dead letters.
        """
        self._fleet = fleet
        self._values = values

    def letters(self) -> dict[str, object]:
        """The first dead letters of each database, by sink and in order.

        Raises:
            DatabaseError: see :meth:`cdc.connection.Connection.query`.
        """
        found: list[dict[str, object]] = []
        more = False
        for database in self._fleet.databases.values():
            known = database.keeper.sinks if database.keeper else {}
            if not any(status.dead_letters for status in known.values()):
                continue
            with Connection(database.dsn, purpose="console") as connection:
                letters = dead_letters.find(connection, Selection(), whole=self._values, most=MOST_LETTERS + 1)
                shown = [self._shown(database, letter) for letter in letters]
            more = more or len(shown) > MOST_LETTERS
            found += shown[:MOST_LETTERS]
        return {"letters": found, "more": more}

    def set_paused(self, asked: Any, client: str, *, paused: bool) -> str:
        """Pause a sink, or let it go on. Raises NoSuch, and DatabaseError as :meth:`letters`."""
        database, sink = self._meant(asked)
        with Connection(database.dsn, purpose="console") as connection:
            if not outbox.set_paused(connection, sink, paused=paused):
                raise NoSuch(f"sink {sink} has no position yet (run cdc migrate)")
            self._ring(connection, database)
        self._note("pause" if paused else "resume", database, sink, client)
        return "Paused; what comes waits in the outbox." if paused else "Resumed."

    def set_backfills_paused(self, asked: Any, client: str, *, paused: bool) -> str:
        """Pause all backfills of a sink, or let them go on. Raises as :meth:`set_paused`."""
        database, sink = self._meant(asked)
        with Connection(database.dsn, purpose="console") as connection:
            tables = backfill.change(connection, sink, "paused" if paused else "running", None)
            self._ring(connection, database)
        if not tables:
            raise NoSuch(f"sink {sink} has no backfill that is {'running' if paused else 'paused'}")
        self._note("pause backfill" if paused else "resume backfill", database, sink, client, tables=",".join(tables))
        return f"{'Paused' if paused else 'Resumed'}: {', '.join(tables)}."

    def replay(self, asked: Any, client: str) -> str:
        """Ask for dead letters to be delivered. Raises as :meth:`set_paused`."""
        database, sink = self._meant(asked)
        with Connection(database.dsn, purpose="console") as connection:
            wanted = dead_letters.want(connection, sink, self._ids(connection, sink, asked))
            self._ring(connection, database)
        self._note("replay", database, sink, client, letters=wanted)
        return f"{wanted} to be delivered again; what fails once more stays."

    def discard(self, asked: Any, client: str) -> str:
        """Delete the dead letters that are named. Raises as :meth:`set_paused`."""
        database, sink = self._meant(asked)
        if asked.get("ids") is None:
            raise NoSuch("which ones is not said (write ids)")
        with Connection(database.dsn, purpose="console") as connection:
            gone = dead_letters.discard(connection, sink, self._ids(connection, sink, asked))
            self._ring(connection, database)
        self._note("discard", database, sink, client, letters=gone)
        return f"{gone} discarded."

    def _meant(self, asked: Any) -> tuple[Database, str]:
        name, sink = (asked.get("database"), asked.get("sink")) if isinstance(asked, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(sink, str):
            raise NoSuch("not an action (write database and sink)")
        database = self._fleet.databases.get(name)
        if database is None or sink not in {*database.sinks, *(database.keeper.sinks if database.keeper else ())}:
            raise NoSuch("no such database or sink")
        return database, sink

    def _ids(self, connection: Connection, sink: str, asked: Any) -> list[int]:
        ids = asked.get("ids")
        if ids is None:
            return [letter.id for letter in dead_letters.find(connection, Selection(sink=sink))]
        if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < 2**63 for one in ids):
            raise NoSuch("ids are no list of numbers")
        return ids

    def _ring(self, connection: Connection, database: Database) -> None:
        if database.options.notify != "off":
            outbox.ring(connection, database.options.channel)
        if database.keeper is not None:
            database.keeper.ask(soon=True)

    def _note(self, action: str, database: Database, sink: str, client: str, **fields: object) -> None:
        told = {"database": database.name, "sink": sink, "action": action, "from": client, **fields}
        log.info("Done from the console.", extra={"fields": told})

    def _shown(self, database: Database, letter: Found) -> dict[str, object]:
        table = None if letter.table is None else f"{letter.schema}.{letter.table}"
        text = letter.text
        if text is not None and len(text) > LONGEST_EVENT:
            text = f"{text[: LONGEST_EVENT - 1]}…"
        return {
            "database": database.name,
            "sink": letter.sink,
            "id": letter.id,
            "event_id": letter.event_id,
            "op": letter.op,
            "table": table,
            "reason": letter.reason,
            "attempts": letter.attempts,
            "died_at": letter.died_at.isoformat().replace("+00:00", "Z"),
            "parked": letter.parked,
            "wanted": letter.wanted,
            "event": text if self._values else None,
        }
