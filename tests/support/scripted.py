"""A pipeline between a real outbox and a sink that follows a script, for tests that watch one at work."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from psycopg2.extensions import connection
from sql import fetch

from cdc.bell import Bell
from cdc.event import Event
from cdc.options import SinkOptions
from cdc.outbox import Owner
from cdc.pipeline import Pipeline
from cdc.sinks.base import Sink

Script = Callable[[list[Event]], None]

QUICKLY = {"initial": "10ms", "max": "50ms"}


def wait_for(condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.002)


class Options(SinkOptions):
    type: Literal["scripted"] = "scripted"


class Scripted(Sink[Options]):
    """Runs `script` on each batch: it may raise, wait, or look.

    Attributes:
        attempts: every batch it was handed.
        taken: every batch it returned from.
        calls: what else was called, in order.
    """

    Options = Options

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name, options)
        self.script: Script = lambda batch: None
        self.opening: Callable[[], None] = lambda: None
        self.closing: Callable[[], None] = lambda: None
        self.attempts: list[list[Event]] = []
        self.at: list[float] = []
        self.taken: list[list[Event]] = []
        self.calls: list[str] = []

    def open(self) -> None:
        self.calls.append("open")
        self.opening()

    def deliver(self, batch: Sequence[Event]) -> None:
        self.at.append(time.monotonic())
        self.attempts.append(list(batch))
        self.script(list(batch))
        self.taken.append(list(batch))

    def close(self) -> None:
        self.calls.append("close")
        self.closing()

    @property
    def delivered(self) -> list[Event]:
        return [event for batch in self.taken for event in batch]


def raising(*errors: Exception | None) -> Script:
    """One outcome for each attempt, in this order; afterwards everything works."""
    left = list(errors)

    def script(batch: list[Event]) -> None:
        if left and (error := left.pop(0)) is not None:
            raise error

    return script


def keys(events: Sequence[Event]) -> list[int | None]:
    return [event.key["id"] if event.key is not None else None for event in events]


class Run:
    """A pipeline that runs, and its sink."""

    def __init__(self, dsn: str, name: str, options: dict[str, object], owner: str, bell: Bell) -> None:
        self.sink = Scripted(name, Options.model_validate({"start": "earliest", "retry": QUICKLY, **options}))
        self.stop = threading.Event()
        self.told: list[Event] = []
        self.pipeline = Pipeline(
            dsn,
            database="shop",
            sink=self.sink,
            bell=bell,
            stop=self.stop,
            owner=Owner(owner, zlib.crc32(owner.encode()) >> 1),
            on_delivered=self.told.extend,
        )

    def start(self) -> Run:
        self.pipeline.start()
        return self

    def end(self, seconds: float = 10.0) -> None:
        self.stop.set()
        self.pipeline.interrupt()
        if self.pipeline.ident is not None:
            self.pipeline.join(seconds)
            assert not self.pipeline.is_alive()


def insert(conn: connection, *ids: int, text: str = "") -> None:
    """One transaction."""
    fetch(
        conn, "insert into item select i, %s from unnest(%s) with ordinality as u (i, n) order by n", (text, list(ids))
    )


def position(conn: connection, sink: str = "audit") -> tuple[Any, ...]:
    return fetch(conn, "select snap_lo, snap_hi, last_seq from cdc.position where sink = %s", (sink,))[0]


def status(conn: connection, sink: str = "audit") -> tuple[Any, ...]:
    rows = fetch(conn, "select state, last_error from cdc.sink where name = %s", (sink,))
    return rows[0] if rows else (None, None)


def caught_up(conn: connection, sink: str = "audit") -> bool:
    """Whether everything there is has been acknowledged."""
    rows = fetch(
        conn,
        """select k.snap_hi is null and not exists (select from cdc.event e
                    where not pg_visible_in_snapshot(e.txid, k.snap_lo))
             from cdc.position k where sink = %s""",
        (sink,),
    )
    return rows == [(True,)]


def dead_letters(conn: connection) -> list[tuple[Any, ...]]:
    return fetch(conn, "select event -> 'key' ->> 'id', reason, attempts from cdc.dead_letter order by id")
