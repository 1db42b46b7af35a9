"""The live tail of the console: the book of every database, read while somebody watches, and by one reader for all.

A page asks again and again for what came after the number it has seen. The readers begin with the first question and
end `ATTENTION` seconds after the last one, so nobody's looking away costs a query.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping

from cdc.connection import Connection
from cdc.decoding import Unreadable
from cdc.errors import CdcError
from cdc.event import Event, Image, format_timestamp, split_object
from cdc.fleet import Fleet
from cdc.tail import Tail

log = logging.getLogger(__name__)

KEPT = 1000
"""Events a page may be behind."""
PAGE = 200
ATTENTION = 15.0
INTERVAL = 0.25
RETRY = 3.0
LONGEST_VALUE = 200
"""Characters of a value that are shown."""

Shown = dict[str, object]


class Tailing:
    """What the pages that show the live tail share."""

    def __init__(self, fleet: Fleet, *, values: bool) -> None:
        """
        Args:
            fleet: whose databases are read.
            values: whether row values leave this process.
        """
        self._fleet = fleet
        self._values = values
        self._lock = threading.Lock()
        self._events: deque[Shown] = deque(maxlen=KEPT)
        self._number = 0
        self._asked_at = float("-inf")
        self._readers: dict[str, threading.Thread] = {}
        self._errors: dict[str, str] = {}
        self._stop = threading.Event()

    def after(self, number: int | None) -> dict[str, object]:
        """What has been seen after the event of this number, the newest `KEPT` at most.

        Args:
            number: ``last`` of the answer before; None: from here on.
        """
        self._asked_at = time.monotonic()
        with self._lock:
            for database in self._fleet.databases.values():
                reader = self._readers.get(database.name)
                if reader is None or not reader.is_alive():
                    arguments = (database.name, database.dsn)
                    reader = threading.Thread(
                        target=self._read, args=arguments, name=f"{database.name}/tail", daemon=True
                    )
                    self._readers[database.name] = reader
                    reader.start()
            # A number from before a restart of the daemon means nothing here.
            known = self._number if number is None or number > self._number else number
            events = [event for event in self._events if event["n"] > known]  # type: ignore[operator]
            missed = self._number - known - len(events)
            return {"last": self._number, "events": events, "missed": missed, "errors": dict(self._errors)}

    def stop(self) -> None:
        """Let the readers end."""
        self._stop.set()

    def _read(self, name: str, dsn: str) -> None:
        while self._is_watched(name):
            try:
                with Connection(dsn, purpose="console") as connection:
                    tail = Tail(connection, database=name)
                    self._errors.pop(name, None)
                    while self._is_watched(name):
                        events = tail.read(PAGE)
                        self._add(events)
                        if len(events) < PAGE:
                            self._stop.wait(INTERVAL)
            except CdcError as error:
                self._errors[name] = str(error)
                self._stop.wait(RETRY)
            except Exception:
                log.exception("The live tail failed as it should not.", extra={"fields": {"database": name}})
                self._errors[name] = "unexpected; the daemon's log says more"
                self._stop.wait(RETRY)

    def _is_watched(self, name: str) -> bool:
        return (
            not self._stop.is_set() and name in self._fleet.databases and time.monotonic() - self._asked_at < ATTENTION
        )

    def _add(self, events: list[Event | Unreadable]) -> None:
        with self._lock:
            for event in events:
                if isinstance(event, Event):
                    self._number += 1
                    self._events.append({"n": self._number, **shown(event, values=self._values)})


def shown(event: Event, *, values: bool) -> Shown:
    """An event for a page; without row values unless they are allowed.

    Args:
        event: any.
        values: whether key, before, after and context are part of it, each value as the text it is in JSON.
    """
    source = event.source
    told: Shown = {
        "id": event.id,
        "op": event.op.value,
        "database": source.database,
        "schema": source.schema_name,
        "table": source.table,
        "seq": source.seq,
        "txid": source.txid,
        "ts": format_timestamp(source.ts),
        "changed": None if event.changed is None else list(event.changed),
        "truncated": event.truncated,
    }
    if values:
        told |= {
            "key": _columns(event.key),
            "before": _columns(event.before),
            "after": _columns(event.after),
            "context": None if event.context is None else _cut(event.context.raw),
        }
    return told


def _columns(image: Image | None) -> Mapping[str, str] | None:
    return None if image is None else {name: _cut(raw) for name, raw in split_object(image.raw).items()}


def _cut(raw: str) -> str:
    return raw if len(raw) <= LONGEST_VALUE else raw[: LONGEST_VALUE - 1] + "…"
