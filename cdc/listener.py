"""The bell: LISTEN, ask to be rung only when everybody sleeps, and survive whatever happens to the connection.

A transaction that NOTIFYs holds a cluster-wide lock through its commit, so writers should ring only when somebody is
asleep. An advisory lock is the flag:

* **armed**: the listener holds it exclusively. Writers are refused the shared lock, and ring.
* **awake** (disarmed): writers get the shared lock, hold it until their transaction ends, and stay silent. The
  pipelines poll, every few milliseconds while changes flow.

Arming uses the *try* form: it succeeds only when no silent writer is in flight, and from then on everybody rings.
After arming, every pipeline looks into the book once more before it sleeps. So each change either was committed
before that look, or rings. (The flag is held while sleeping and not, as would seem natural, while awake: the other
way round a silent writer could commit after the last look.)

States of the bell, and what moves it::

              every pipeline found nothing for SETTLE seconds, and the lock was free
      awake ────────────────────────────────────────────────────────────────────────▶ armed
            ◀────────────────────────────────────────────────────────────────────────
              full batches · more than BUSY_RATE notifications a second · writers queue up to ring · queue half full
              · nobody left to wake · connection lost

On each failure: a lost connection takes the lock with it, so writers fall silent in the same moment in which nobody
would hear them; pipelines poll until the listener is back. A notification that does not come back to its own sender
(PgBouncer in transaction mode accepts LISTEN and delivers nothing) is reported, and the pipelines go on polling. A
slow safety poll covers what nobody thought of.

Two daemons may serve sinks of one database, and only one of them can hold the lock. The other hears what the writers
ring for the first, and polls now and then besides.

The payload is checked by the same model as any event. For a durable table it only tells which pipelines to wake: anyone
may NOTIFY, so it is never delivered from here. For an ephemeral table (``delivery: ephemeral``) it *is* the event, and
goes to the pipelines that want it, in commit order, at most once; what is committed while no listener hears, or while a
pipeline's inbox is full, is not delivered. The listener's thread never waits for a sink.

The breaker. A notification stays in a queue of the whole cluster until every listening session has read it; one that
listens and does not read fills the queue, and then every COMMIT that rings fails. So the queue's fill is read every few
seconds, and more often while much is rung (which is also the only thing that frees a queue that once filled up). Above
`QUEUE_LIMIT` nobody of ours rings any more: the bell is disarmed, and triggers that ring regardless (``notify:
always``, ephemeral tables) are told to stay silent; below half of that it goes on as before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
import uuid
from collections.abc import Callable

from psycopg2 import sql

from cdc import crashpoints
from cdc.bell import DEAF_POLL, SETTLE, SHORTEST_POLL, Bell
from cdc.connection import Connection
from cdc.errors import CdcError, DatabaseError, DatabaseUnreachable
from cdc.event import Event
from cdc.retry import keep_alive
from cdc.sql import QUERIES

log = logging.getLogger(__name__)

BUSY_RATE = 500
"""Notifications a second above which polling is the cheaper way, for writers and for us."""
QUEUE_LOOK = 5
"""Notifications within `SETTLE` seconds after which it is looked whether writers queue up for the lock of those who
ring. Where a COMMIT takes 5 ms they get no further than 200 a second, however many they are: no rate tells of that."""
QUEUE_LENGTH = 2
"""So many of them waiting are a queue."""
DEADLINE = 4.5
"""Seconds for one round trip of the listener; with the gauge's interval, how soon a dead connection is noticed."""
GAUGE_INTERVAL = 5.0
"""Seconds between looks at the notification queue."""
GAUGE_BYTES = 64 * 1024
"""Bytes of payload after which it is looked at earlier; the smallest queue there can be holds eight times as much."""
SELF_TEST_INTERVAL = 60.0
SELF_TEST_DEADLINE = 5.0
QUEUE_LIMIT = 0.5
"""Fill of the cluster's notification queue, 0 to 1, above which nobody shall ring."""
SILENCE = 15.0
"""Seconds for which triggers are told to stay silent, again and again for as long as the queue is too full."""


class Listener(threading.Thread):
    """The thread that holds the LISTEN connection of one database."""

    def __init__(
        self,
        dsn: str,
        *,
        database: str,
        channel: str,
        bell: Bell,
        stop: threading.Event,
        process: int,
        is_ephemeral: Callable[[str, str], bool] | None = None,
    ) -> None:
        """
        Args:
            dsn: the database.
            database: its name in the configuration.
            channel: what to LISTEN to.
            bell: shared with the database's pipelines.
            stop: ends the thread.
            process: the daemon's number, see :func:`cdc.outbox.join_process`.
            is_ephemeral: whether the changes of a table, given by schema and name, are delivered from here; None: of
                none.
        """
        super().__init__(name=f"{database}/listener", daemon=True)
        self._dsn = dsn
        self._database = database
        self._channel = channel
        self._bell = bell
        self._stop_event = stop
        self._process = process
        self._is_ephemeral = is_ephemeral
        self._rings_anyway = is_ephemeral is not None or bell.mode == "always"
        """Whether there are triggers that ring whatever the lock says."""
        self._knock_read, self._knock_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._burst_began = 0.0
        self._burst = 0
        self._hold_until = 0.0
        self._looked_at = 0.0
        self._bytes_since_gauge = 0
        self._too_full = False
        self.malformed = 0
        """Notifications that were no event."""
        self.received = 0
        self.queue_usage = 0.0
        self.heard_at = float("-inf")
        """When the database last said how full the queue is, by the monotonic clock."""

    def run(self) -> None:
        self._bell.attach(self._knock)
        try:
            while not self._stop_event.is_set():
                try:
                    keep_alive(
                        self._serve, DatabaseUnreachable, maximum=5.0, stop=self._stop_event, before_sleep=self._lost
                    )
                except CdcError as error:
                    log.error("The bell is out of order; polling instead.", extra=self._fields(error=str(error)))
                    self._stop_event.wait(SELF_TEST_INTERVAL)
                except Exception:
                    log.exception("The bell failed as it should not; polling instead.", extra=self._fields())
                    self._stop_event.wait(SELF_TEST_INTERVAL)
        finally:
            self._bell.disarm()

    def stop(self) -> None:
        """End the thread soon; it closes its connection."""
        self._stop_event.set()
        self._knock()

    def _knock(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it has been knocked often enough
            os.write(self._knock_write, b"!")

    def _lost(self, error: BaseException, wait: float) -> None:
        log.warning(
            "The listener's connection is lost; polling until it is back.",
            extra=self._fields(error=str(error), retry_in=round(wait, 1)),
        )

    def _serve(self) -> None:
        """Hear one connection until it is lost or the thread is to stop."""
        with Connection(self._dsn, purpose="listener", deadline=DEADLINE) as connection:
            try:
                connection.query(QUERIES["join_process"], {"process": self._process})
                crashpoints.reached("before-listen")
                _listen(connection, self._channel)
                crashpoints.reached("after-listen")
                self._self_test(connection)
                log.info("Listening.", extra=self._fields(channel=self._channel))
                self._bell.audible = True
                if self._bell.mode == "always":
                    self._bell.arm()
                self._loop(connection)
            finally:
                self._bell.audible = False
                self._bell.disarm()

    def _loop(self, connection: Connection) -> None:
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLIN)
        poller.register(self._knock_read, select.POLLIN)
        next_gauge = 0.0
        next_test = time.monotonic() + SELF_TEST_INTERVAL
        while not self._stop_event.is_set():
            now = time.monotonic()
            if now >= next_gauge or self._bytes_since_gauge > GAUGE_BYTES:
                next_gauge = now + GAUGE_INTERVAL
                self._read_gauge(connection)
            if now >= next_test:
                next_test = now + SELF_TEST_INTERVAL
                self._self_test(connection)
            # Whatever the socket says: a query reads the rings that arrive along with its answer.
            self._hear(connection)
            if self._bell.mode == "adaptive":
                self._set_bell(connection)
                if connection.raw.notifies:
                    continue
            ready = {fd for fd, _ in poller.poll(max(0.0, min(next_gauge, next_test) - time.monotonic()) * 1000)}
            if self._knock_read in ready:
                os.read(self._knock_read, 4096)

    # -- what is heard ------------------------------------------------------------------------------------------

    def _hear(self, connection: Connection) -> None:
        for _, payload in connection.notifications():
            self.received += 1
            self._bytes_since_gauge += len(payload)
            if not payload.startswith(_SELF_TEST):
                self._take(payload)

    def _take(self, payload: str) -> None:
        """Do what one notification asks for: hand its event over, or wake somebody."""
        if self._is_ephemeral is None and self._rate_is_high():
            # A flood: it is not worth reading, everybody is to be woken anyway.
            self._burst += 1
            self.malformed += bool(payload) and not payload.startswith(_EVENT)
            self._bell.wake()
            return
        event = None
        if payload:
            try:
                event = Event.from_json(payload)
            except Exception:  # noqa: BLE001  anybody may have written it, and everybody must be woken
                if not self.malformed:
                    log.warning("A notification is not an event; it only wakes.", extra=self._fields())
                self.malformed += 1
        if (
            event is not None
            and self._is_ephemeral is not None
            and self._is_ephemeral(event.source.schema_name, event.source.table)
        ):
            self._bell.hand_over(event, len(payload))
            return
        now = time.monotonic()
        if now - self._burst_began > SETTLE:
            self._burst_began, self._burst = now, 0
        self._burst += 1
        self._bell.wake(event)

    def _writers_queue(self, connection: Connection) -> bool:
        """Whether those who ring wait for each other; asked once in `SETTLE` seconds at most."""
        now = time.monotonic()
        if self._burst < QUEUE_LOOK or now - self._looked_at < SETTLE:
            return False
        self._looked_at = now
        return int(connection.query(QUERIES["ringers_waiting"])[0][0]) >= QUEUE_LENGTH

    def _rate_is_high(self) -> bool:
        return self._burst > BUSY_RATE * SETTLE and time.monotonic() - self._burst_began <= SETTLE

    # -- arming -------------------------------------------------------------------------------------------------

    def _set_bell(self, connection: Connection) -> None:
        now = time.monotonic()
        busy = self._rate_is_high()
        if self._bell.armed_since is not None:
            if busy or self._bell.should_disarm() or self._writers_queue(connection):
                self._disarm(connection)
        elif now >= self._hold_until and not busy and self._bell.should_arm():
            crashpoints.reached("before-arm")
            if connection.query(QUERIES["arm"])[0][0]:
                crashpoints.reached("after-arm")
                self._bell.arm()
                return
            # A silent writer is in flight, or another daemon's listener has been faster.
            self._bell.armed_by_another = bool(connection.query(QUERIES["armed_by_another"])[0][0])
            self._hold_until = now + (DEAF_POLL if self._bell.armed_by_another else SHORTEST_POLL * 10)

    def _disarm(self, connection: Connection) -> None:
        self._bell.disarm()
        connection.query(QUERIES["disarm"])
        self._burst = 0
        self._hold_until = time.monotonic() + SETTLE

    # -- the breaker --------------------------------------------------------------------------------------------

    def _read_gauge(self, connection: Connection) -> None:
        self._bytes_since_gauge = 0
        usage = self.queue_usage = float(connection.query(QUERIES["queue_usage"])[0][0])
        self.heard_at = time.monotonic()
        if not self._too_full and usage > QUEUE_LIMIT:
            self._too_full = True
            log.error(
                "The notification queue is over half full: a session listens and does not read. Nobody rings any more.",
                extra=self._fields(usage=round(usage, 3), ephemeral="dropped" if self._rings_anyway else "none"),
            )
        elif self._too_full and usage < QUEUE_LIMIT / 2:
            self._too_full = False
            log.info("The notification queue has drained; ringing again.", extra=self._fields(usage=round(usage, 3)))
            self._silence(connection, 0)
        if self._too_full:
            self._silence(connection, SILENCE)
            if self._bell.mode == "adaptive":
                if self._bell.armed_since is not None:
                    self._disarm(connection)
                self._hold_until = time.monotonic() + GAUGE_INTERVAL + 1
            elif self._bell.armed_since is not None:
                self._bell.disarm()  # there is no lock to give back; nobody is rung, so everybody looks by himself
        elif self._bell.mode == "always" and self._bell.armed_since is None:
            self._bell.arm()

    def _silence(self, connection: Connection, seconds: float) -> None:
        """Keep triggers that ring regardless from ringing."""
        if not self._rings_anyway:
            return
        try:
            connection.query(QUERIES["silence"], {"seconds": seconds})
        except DatabaseUnreachable:
            raise
        except DatabaseError as error:
            log.error("The triggers could not be told to stay silent.", extra=self._fields(error=str(error)))

    # -- self-test ----------------------------------------------------------------------------------------------

    def _self_test(self, connection: Connection) -> None:
        """Ring ourselves, and demand to hear it.

        Raises:
            CdcError: nothing came.
        """
        others = _ring_back(connection, self._channel)
        if others is None:
            raise CdcError(f"{DEAF} ({DEAF_CURE})")
        for payload in others:
            self._take(payload)

    def _fields(self, **fields: object) -> dict[str, object]:
        return {"fields": {"database": self._database, **fields}}


DEAF = "notifications do not arrive on this connection; PgBouncer in transaction mode does this"
DEAF_CURE = "let dsn go to PostgreSQL directly or through a session pool"
_SELF_TEST = "cdc self-test "
_EVENT = '{"version":1,'
"""How `cdc.payload` begins."""


def hears_itself(connection: Connection, channel: str, dsn: str) -> bool:
    """Whether a notification comes back to this session within `SELF_TEST_DEADLINE`, for `cdc check`.

    Behind a pooler the one who rings is a second client. A transaction pool that gives LISTEN and NOTIFY to one server
    process hands the notification over with the answer to NOTIFY, and a session that rang itself would look sound.

    Args:
        dsn: how `connection` was reached.

    Raises:
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    _listen(connection, channel)
    if not connection.pooled:
        return _ring_back(connection, channel) is not None
    with Connection(dsn, purpose="self-test") as ringer:
        return _ring_back(connection, channel, ringer) is not None


def _listen(connection: Connection, channel: str) -> None:
    connection.execute(sql.SQL("listen {}").format(sql.Identifier(channel)).as_string(connection.raw))


def _ring_back(connection: Connection, channel: str, ringer: Connection | None = None) -> list[str] | None:
    """Ring ourselves, and wait for it: what else was heard meanwhile, in order; None when it has not come in time."""
    nonce = f"{_SELF_TEST}{uuid.uuid4()}"
    (ringer or connection).query(QUERIES["ring_self"], {"channel": channel, "nonce": nonce})
    deadline = time.monotonic() + SELF_TEST_DEADLINE
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    heard: list[str] = []
    while True:
        heard += [payload for _, payload in connection.notifications()]
        if nonce in heard:
            return [payload for payload in heard if not payload.startswith(_SELF_TEST)]
        if (left := deadline - time.monotonic()) <= 0 or not poller.poll(left * 1000):
            return None
