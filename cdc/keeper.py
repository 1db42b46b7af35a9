"""The keeper: one thread and one connection for each database, which says that this daemon is alive and keeps house.

Alive. Ownership of a sink is a lock of a session, and a session can outlive the process behind it by hours: when it is
stopped, when its host is gone, when the network swallows packets. A daemon none of whose sessions has said anything
for :data:`cdc.outbox.LEASE` seconds may be relieved of its sinks (``cdc.take``), so the keeper says something when all
of them have been silent for `BEAT` seconds. It is one voice for all pipelines because a pipeline may rightly be silent
for minutes, while its sink takes its time. An idle beat writes nothing.

House. The outbox's space is given back once it has been delivered and kept for `retention`; that it has grown beyond
`outbox_alarm` is said aloud, with the sink that holds it. So is drift: a table of the configuration without its
trigger, a trigger that is disabled or not the one the configuration wants, a captured table that it does not name.

Moments. Where the book stood is noted, with a beat every `MOMENTS` seconds, if something was recorded: a timestamp
alone would not tell what was committed before it.

Watch. A pipeline whose sink does not return from a delivery cannot say so itself; the keeper says it in its stead.

Figures. What it measures on its way is kept for whoever asks (:mod:`cdc.http`), who never waits for the database: the
server's clock with each beat, the outbox and the sinks' backlogs every `MEASURING` seconds, or `WATCHED` while somebody
asks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from cdc import backfill, crashpoints, outbox
from cdc.backfill import Backfill
from cdc.connection import Connection
from cdc.errors import DatabaseError, TooSlow
from cdc.metrics import ServerClock
from cdc.outbox import Pulse, SinkStatus
from cdc.retry import keep_alive

log = logging.getLogger(__name__)

BEAT = 2.5
"""Seconds of silence of all of a daemon's sessions after which the keeper breaks it."""
LONGEST_SILENCE = 4.0
"""Seconds after which it speaks whoever else did: a session that has just spoken may be closed, and then nobody sees
that it spoke. Well below the lease; with `DEADLINE`, how soon the keeper's own dead connection is noticed."""
DEADLINE = 5.0
"""Seconds for one round trip of the keeper, except for rotation."""
HOUSEKEEPING = (1.0, 300.0)
"""Shortest and longest pause between rotations of the outbox, in seconds; in between, a tenth of the retention."""
MEASURING = 20.0
"""Seconds between looks at the outbox and the backlogs while nobody asks."""
WATCHED = 5.0
"""The same, at least, while somebody does; with `LONGEST_SILENCE`, how old what he is shown may be."""
FRESH = 2.0
"""The same, at least, where he sits and looks."""
ASKED_FOR = 120.0
"""Seconds after a question in which the next one is expected."""
MOMENTS = 10.0
"""Least seconds between notes of a position to go back to (``cdc sinks rewind --to TIMESTAMP``)."""
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
        others_silent_for: Callable[[], float] = lambda: float("inf"),
        clock: ServerClock | None = None,
    ) -> None:
        """
        Args:
            dsn: the database.
            database: its name in the configuration.
            process: the daemon's number, see :func:`cdc.outbox.join_process`.
            retention: seconds events are kept after delivery.
            alarm: bytes above which the outbox is too large.
            find_drift: where the triggers differ from the configuration, one sentence each.
            watch: looks after the pipelines, whenever the keeper is awake.
            others_silent_for: seconds since the database last answered another session of this daemon.
            clock: told what the server's clock says.
        """
        super().__init__(name=f"{database}/keeper", daemon=True)
        self._dsn = dsn
        self._database = database
        self._process = process
        self.retention = retention
        self.alarm = alarm
        """May be replaced while it runs, as may `retention`."""
        self._find_drift = find_drift
        self._watch = watch
        self._others_silent_for = others_silent_for
        self.drift: Sequence[str] = ()
        """Where the triggers differed from the configuration, when they were last looked at."""
        self.pulse: Pulse | None = None
        self.sinks: Mapping[str, SinkStatus] = {}
        """Every sink the database knows, by name; as `pulse`, from the last look."""
        self.backfills: Sequence[Backfill] = ()
        """The last backfill of each table for each sink, from then."""
        self.measured_at = float("-inf")
        """When that was, by the monotonic clock."""
        self.heard_at = float("-inf")
        """When the database last answered, by the monotonic clock."""
        self.trouble = ""
        """Why it does not answer; empty while it does."""
        self._clock = clock or ServerClock()
        self._stop_event = threading.Event()
        self._moment_at = 0.0
        self._is_large = False
        self._asked_at = float("-inf")
        self._is_wanted_soon = False
        self._too_slow: set[str] = set()

    def run(self) -> None:
        keep_alive(self._outlive, DatabaseError, maximum=5.0, stop=self._stop_event, before_sleep=self._lost)

    def stop(self) -> None:
        """End the thread soon; to be called when no pipeline is left, or others would take the sinks for abandoned."""
        self._stop_event.set()

    def ask(self, *, soon: bool = False) -> None:
        """Let it look at the outbox and the backlogs more often for a while. May be called from any thread.

        Args:
            soon: and with its next sign of life.
        """
        self._asked_at = time.monotonic()
        self._is_wanted_soon |= soon

    def _outlive(self) -> None:
        try:
            self._serve()
        except DatabaseError:
            raise
        except Exception as error:
            # The thread must outlive a bug of ours, and a system that is short of threads: nobody else would beat.
            log.exception("The keeper failed as it should not; starting again.", extra=self._fields())
            raise DatabaseError(f"unexpected {type(error).__name__}") from None

    def _serve(self) -> None:
        tidied_at = time.monotonic()
        reconcile_at = 0.0
        with Connection(self._dsn, purpose="keeper", deadline=DEADLINE) as connection:
            outbox.join_process(connection, self._process)
            self._beat(connection)
            self._work("measure", self._measure, connection)
            while not self._stop_event.wait(self._silence_left()):
                if self._silence_left() <= 0.0:
                    self._beat(connection)
                now = time.monotonic()
                shortest, longest = HOUSEKEEPING
                if now >= tidied_at + min(max(self.retention / 10, shortest), longest):
                    tidied_at = now
                    self._work("tidy up", self._tidy_up, connection)
                if now >= self.measured_at + self._measuring(now):
                    self._is_wanted_soon = False
                    self._work("measure", self._measure, connection)
                if now >= reconcile_at:
                    reconcile_at = now + RECONCILING
                    self._work("look at the triggers", self._reconcile, connection)
                self._watch(connection)

    def _work(self, what: str, do: Callable[[Connection], None], connection: Connection) -> None:
        """Do what is not worth the sign of life that comes after it."""
        try:
            do(connection)
            self._too_slow.discard(what)
        except TooSlow as error:
            if what not in self._too_slow:
                log.warning("The keeper has no time for its work.", extra=self._fields(work=what, error=str(error)))
            self._too_slow.add(what)
        self.heard_at = time.monotonic()  # either way the database has answered

    def _measuring(self, now: float) -> float:
        """Seconds from one look at the outbox and the backlogs to the next."""
        if self._is_wanted_soon:
            return FRESH
        return WATCHED if now < self._asked_at + ASKED_FOR else MEASURING

    def _silence_left(self) -> float:
        """Seconds for which nobody need speak."""
        own = time.monotonic() - self.heard_at
        return max(0.0, min(BEAT - min(own, self._others_silent_for()), LONGEST_SILENCE - own))

    def _beat(self, connection: Connection) -> None:
        asked = time.monotonic()
        if asked >= self._moment_at:
            self._moment_at = asked + MOMENTS
            server = outbox.note_moment(connection)
        else:
            server = outbox.beat(connection)
        self.heard_at = time.monotonic()
        self._clock.heard(server, asked, self.heard_at)
        self.trouble = ""

    def _tidy_up(self, connection: Connection) -> None:
        crashpoints.reached("before-rotate")
        done = outbox.rotate(connection, self.retention)
        crashpoints.reached("after-rotate")
        if done:
            log.info("The outbox was tidied up.", extra=self._fields(done=",".join(done)))

    def _measure(self, connection: Connection) -> None:
        sinks = outbox.sink_statuses(connection)
        pulse = outbox.pulse(connection)
        self.backfills = backfill.backfills(connection)
        self.sinks, self.pulse = {sink.name: sink for sink in sinks}, pulse
        self.measured_at = time.monotonic()
        is_large = pulse.outbox_bytes > self.alarm
        if is_large and not self._is_large:
            holders = [
                f"{sink.name} ({sink.pending}{'+' if sink.capped else ''} events behind)"
                for sink in sinks
                if sink.lag > self.retention or sink.capped
            ]
            log.error(
                "The outbox has grown beyond its alarm.",
                extra=self._fields(
                    bytes=pulse.outbox_bytes,
                    alarm=self.alarm,
                    held_by=", ".join(holders) or "no sink that is far behind",
                ),
            )
        elif self._is_large and not is_large:
            log.info("The outbox is below its alarm again.", extra=self._fields(bytes=pulse.outbox_bytes))
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
        if str(error) != self.trouble:
            log.warning("The keeper is interrupted.", extra=self._fields(error=str(error), retry_in=round(wait, 1)))
        self.trouble = str(error)

    def _fields(self, **fields: object) -> dict[str, object]:
        return {"fields": {"database": self._database, **fields}}
