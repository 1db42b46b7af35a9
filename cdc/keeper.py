"""The keeper: one thread and one connection for each database, which says that this daemon is alive and keeps house.

Alive. Ownership of a sink is a lock of a session, and a session can outlive the process behind it by hours: when it is
stopped, when its host is gone, when the network swallows packets. So the keeper says something every `BEAT` seconds.
A daemon none of whose sessions has said anything for :data:`cdc.outbox.LEASE` seconds may be relieved of its sinks
(``cdc.take``). It is one voice for all pipelines because a pipeline may rightly be silent for minutes, while its sink
takes its time. An idle beat writes nothing.

House. The outbox's space is given back once it has been delivered and kept for `retention`; that it has grown beyond
`outbox_alarm` is said aloud, with the sink that holds it. So is drift: a table of the configuration without its
trigger, a trigger that is disabled or not the one the configuration wants, a captured table that it does not name.

Watch. A pipeline whose sink does not return from a delivery cannot say so itself; the keeper says it in its stead.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from cdc import crashpoints, outbox
from cdc.connection import Connection
from cdc.errors import DatabaseError
from cdc.retry import keep_alive

log = logging.getLogger(__name__)

BEAT = 1.5
"""Seconds between two signs of life."""
DEADLINE = 5.0
"""Seconds for one round trip of the keeper, except for rotation."""
HOUSEKEEPING = (1.0, 300.0)
"""Shortest and longest pause between rotations of the outbox, in seconds; in between, a tenth of the retention."""
MEASURING = 10.0
"""Seconds between looks at the outbox's size."""
RECONCILING = 60.0
"""Seconds between looks at the triggers."""


class Keeper(threading.Thread):
    """The thread that keeps the ownership of one database's pipelines believable, and its outbox small."""

    def __init__(
        self,
        dsn: str,
        *,
        database: str,
        process: int,
        retention: float,
        alarm: int,
        find_drift: Callable[[Connection], Sequence[str]] = lambda connection: (),
        watch: Callable[[Connection], None] = lambda connection: None,
    ) -> None:
        """
        Args:
            dsn: the database.
            database: its name in the configuration.
            process: the daemon's number, see :func:`cdc.outbox.join_process`.
            retention: seconds events are kept after delivery.
            alarm: bytes above which the outbox is too large.
            find_drift: where the triggers differ from the configuration, one sentence each.
            watch: looks after the pipelines, with every beat.
        """
        super().__init__(name=f"{database}/keeper", daemon=True)
        self._dsn = dsn
        self._database = database
        self._process = process
        self._retention = retention
        self._alarm = alarm
        self._find_drift = find_drift
        self._watch = watch
        self.drift: Sequence[str] = ()
        """Where the triggers differed from the configuration, when they were last looked at."""
        self._stop_event = threading.Event()
        self._is_large = False
        self._last_trouble = ""
        self.outbox_bytes = 0
        """The outbox on disk, when it was last looked at."""

    def run(self) -> None:
        keep_alive(self._serve, DatabaseError, maximum=5.0, stop=self._stop_event, before_sleep=self._lost)

    def stop(self) -> None:
        """End the thread soon; to be called when no pipeline is left, or others would take the sinks for abandoned."""
        self._stop_event.set()

    def _serve(self) -> None:
        shortest, longest = HOUSEKEEPING
        pause = min(max(self._retention / 10, shortest), longest)
        tidy_at = time.monotonic() + pause
        measure_at = reconcile_at = 0.0
        with Connection(self._dsn, purpose="keeper", deadline=DEADLINE) as connection:
            outbox.join_process(connection, self._process)
            while not self._stop_event.wait(BEAT):
                now = time.monotonic()
                if now >= tidy_at:
                    tidy_at = now + pause
                    self._tidy_up(connection)
                if now >= measure_at:
                    measure_at = now + MEASURING
                    self._measure(connection)
                if now >= reconcile_at:
                    reconcile_at = now + RECONCILING
                    self._reconcile(connection)
                outbox.beat(connection)
                self._watch(connection)
                self._last_trouble = ""

    def _tidy_up(self, connection: Connection) -> None:
        crashpoints.reached("before-rotate")
        done = outbox.rotate(connection, self._retention)
        crashpoints.reached("after-rotate")
        if done:
            log.info("The outbox was tidied up.", extra=self._fields(done=",".join(done)))

    def _measure(self, connection: Connection) -> None:
        self.outbox_bytes = outbox.size(connection)
        is_large = self.outbox_bytes > self._alarm
        if is_large and not self._is_large:
            holders = [
                f"{sink.name} ({sink.pending}{'+' if sink.capped else ''} events behind)"
                for sink in outbox.sink_statuses(connection)
                if sink.lag > self._retention or sink.capped
            ]
            log.error(
                "The outbox has grown beyond its alarm.",
                extra=self._fields(
                    bytes=self.outbox_bytes,
                    alarm=self._alarm,
                    held_by=", ".join(holders) or "no sink that is far behind",
                ),
            )
        elif self._is_large and not is_large:
            log.info("The outbox is below its alarm again.", extra=self._fields(bytes=self.outbox_bytes))
        self._is_large = is_large

    def _reconcile(self, connection: Connection) -> None:
        drift = self._find_drift(connection)
        if drift and drift != self.drift:
            log.error(
                "The triggers are not what the configuration says; run cdc migrate.",
                extra=self._fields(drift="; ".join(drift)),
            )
        elif self.drift and not drift:
            log.info("The triggers are what the configuration says again.", extra=self._fields())
        self.drift = drift

    def _lost(self, error: BaseException, wait: float) -> None:
        if str(error) != self._last_trouble:
            log.warning("The keeper is interrupted.", extra=self._fields(error=str(error), retry_in=round(wait, 1)))
        self._last_trouble = str(error)

    def _fields(self, **fields: object) -> dict[str, object]:
        return {"fields": {"database": self._database, **fields}}
