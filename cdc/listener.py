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
              full batches · more than BUSY_RATE notifications a second · queue half full · nobody left to wake
              · connection lost

On each failure: a lost connection takes the lock with it, so writers fall silent in the same moment in which nobody
would hear them; pipelines poll until the listener is back. A notification that does not come back to its own sender
(PgBouncer in transaction mode accepts LISTEN and delivers nothing) is reported, and the pipelines go on polling. A
slow safety poll covers what nobody thought of.

The payload is checked by the same model as any event and used only to tell which pipelines to wake: anyone may NOTIFY,
so it is never delivered from here. The listener's thread never waits for a sink.
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
from dataclasses import dataclass, field
from typing import Literal

from psycopg2 import sql

from cdc.connection import Connection
from cdc.errors import CdcError, DatabaseUnreachable
from cdc.event import Event
from cdc.retry import keep_alive
from cdc.sql import QUERIES

log = logging.getLogger(__name__)

SETTLE = 0.1
"""Seconds without a change before the bell is armed again."""
BUSY_RATE = 500
"""Notifications a second above which polling is the cheaper way, for writers and for us."""
GAUGE_INTERVAL = 5.0
"""Seconds between looks at the notification queue."""
SELF_TEST_INTERVAL = 60.0
SELF_TEST_DEADLINE = 5.0
QUEUE_LIMIT = 0.5
"""Fill of the cluster's notification queue, 0 to 1, above which we stop asking to be rung."""
SHORTEST_POLL = 0.002
GATHER = 0.005
"""Seconds in which changes gather into one batch while they keep coming; a batch costs as much as a dozen events."""
SAFETY_POLL = 30.0
"""Seconds between looks into the book while armed."""
DEAF_POLL = 0.5
"""Longest pause between looks when no bell can be heard (``notify: off``, or notifications do not arrive)."""

Mode = Literal["adaptive", "always", "off"]


@dataclass(eq=False)
class Sleeper:
    """One pipeline's place at the bell.

    Attributes:
        wants: whether the pipeline cares for a notified event.
        linger: seconds; longest pause between polls while awake.
    """

    name: str
    wants: Callable[[Event], bool]
    linger: float
    woken: threading.Event = field(default_factory=threading.Event)
    looked_at: float = 0.0
    """When the last look into the book began, by the monotonic clock."""
    active_at: float = float("-inf")
    """When a look last found something."""
    idle: bool = False
    pause: float = SHORTEST_POLL


class Bell:
    """What the listener and the pipelines of one database share. All methods may be called from any thread."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.armed_since: float | None = None
        self.audible = False
        """Whether a listener is there to hear a ring."""
        self.crowded = False
        """Whether a full batch was seen since the bell was last armed: more is coming than rings are good for."""
        self._lock = threading.Lock()
        self._sleepers: list[Sleeper] = []
        self._knock: Callable[[], None] = lambda: None

    # -- for pipelines ------------------------------------------------------------------------------------------

    def join(self, sleeper: Sleeper) -> None:
        """Take part: the bell is not armed before this pipeline has found nothing to do."""
        sleeper.idle = False
        with self._lock:
            if sleeper not in self._sleepers:
                self._sleepers.append(sleeper)

    def leave(self, sleeper: Sleeper) -> None:
        """Stop taking part; a pipeline that serves nothing must not keep the others awake."""
        with self._lock:
            if sleeper in self._sleepers:
                self._sleepers.remove(sleeper)
        self._knock()

    def looking(self, sleeper: Sleeper) -> None:
        """Say that a look into the book begins now. Wake-ups from here on count for the next rest."""
        sleeper.woken.clear()
        sleeper.looked_at = time.monotonic()

    def found(self, sleeper: Sleeper, *, full: bool) -> None:
        """Say that the look found events; a full batch means that more are waiting."""
        sleeper.active_at = time.monotonic()
        sleeper.idle = False
        sleeper.pause = SHORTEST_POLL
        if full and self.armed_since is not None and self.mode == "adaptive":
            self.crowded = True
            self._knock()

    def pace(self, sleeper: Sleeper) -> None:
        """After a batch that was not full: while awake, let a few changes gather instead of fetching each alone."""
        if self.armed_since is None and self.audible:
            sleeper.woken.wait(min(GATHER, sleeper.linger))

    def rest(self, sleeper: Sleeper) -> None:
        """Wait after a look that found nothing: until woken, or until it is time to look again."""
        sleeper.idle = True
        armed = self.armed_since
        if armed is not None:
            if sleeper.looked_at > armed:
                sleeper.woken.wait(SAFETY_POLL)
            return  # armed after the look began: look once more
        if self._settled():
            self._knock()
        # A look may be dear: it passes over what an open transaction has written. It shall not take all of a core.
        sleeper.woken.wait(max(sleeper.pause, 2 * (time.monotonic() - sleeper.looked_at)))
        longest = sleeper.linger if self.audible else max(sleeper.linger, DEAF_POLL)
        sleeper.pause = min(sleeper.pause * 2, max(longest, SHORTEST_POLL))

    # -- for the listener ---------------------------------------------------------------------------------------

    def attach(self, knock: Callable[[], None]) -> None:
        """Let the pipelines call the listener's attention."""
        self._knock = knock

    def wake(self, event: Event | None = None) -> None:
        """Wake the pipelines that want `event`, or all of them."""
        with self._lock:
            sleepers = list(self._sleepers)
        for sleeper in sleepers:
            if event is None or sleeper.wants(event):
                sleeper.woken.set()

    def arm(self) -> None:
        """From now on somebody rings; everybody looks once more."""
        self.crowded = False
        self.armed_since = time.monotonic()
        self.wake()

    def disarm(self) -> None:
        """From now on nobody rings; everybody polls. To be called before the lock is given back."""
        self.armed_since = None
        self.wake()

    def should_arm(self) -> bool:
        """Whether everybody sleeps."""
        return self.armed_since is None and self._settled()

    def should_disarm(self) -> bool:
        """Whether being rung is of no use: more is coming than rings are good for, or nobody is left to be woken."""
        with self._lock:
            return self.crowded or not self._sleepers

    def _settled(self) -> bool:
        now = time.monotonic()
        with self._lock:
            return bool(self._sleepers) and all(s.idle and now - s.active_at >= SETTLE for s in self._sleepers)


class Listener(threading.Thread):
    """The thread that holds the LISTEN connection of one database."""

    def __init__(self, dsn: str, *, database: str, channel: str, bell: Bell, stop: threading.Event) -> None:
        super().__init__(name=f"{database}/listener", daemon=True)
        self._dsn = dsn
        self._database = database
        self._channel = channel
        self._bell = bell
        self._stop_event = stop
        self._knock_read, self._knock_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._burst_began = 0.0
        self._burst = 0
        self._hold_until = 0.0
        self.malformed = 0
        """Notifications that were no event."""
        self.received = 0
        self.queue_usage = 0.0

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
        with Connection(self._dsn, purpose="listener") as connection:
            try:
                _listen(connection, self._channel)
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
            if now >= next_gauge:
                next_gauge = now + GAUGE_INTERVAL
                self._read_gauge(connection)
            if now >= next_test:
                next_test = now + SELF_TEST_INTERVAL
                self._self_test(connection)
            # Whatever the socket says: a query reads the rings that arrive along with its answer.
            self._hear(connection)
            if self._bell.mode == "adaptive":
                self._set_bell(connection)
            ready = {fd for fd, _ in poller.poll(max(0.0, min(next_gauge, next_test) - time.monotonic()) * 1000)}
            if self._knock_read in ready:
                os.read(self._knock_read, 4096)

    def _hear(self, connection: Connection) -> None:
        for _, payload in connection.notifications():
            self.received += 1
            now = time.monotonic()
            if now - self._burst_began > SETTLE:
                self._burst_began, self._burst = now, 0
            self._burst += 1
            if payload.startswith(_SELF_TEST):
                continue
            try:
                self._bell.wake(Event.from_json(payload) if payload else None)
            except Exception:  # noqa: BLE001  anybody may have written it, and everybody must be woken
                if not self.malformed:
                    log.warning("A notification is not an event; it only wakes.", extra=self._fields())
                self.malformed += 1
                self._bell.wake()

    def _set_bell(self, connection: Connection) -> None:
        now = time.monotonic()
        busy = self._burst > BUSY_RATE * SETTLE and now - self._burst_began <= SETTLE
        if self._bell.armed_since is not None:
            # What these queries read along is not lost: arming and disarming wake everybody, and refused we poll.
            if busy or self._bell.should_disarm():
                self._disarm(connection)
        elif now >= self._hold_until and not busy and self._bell.should_arm():
            if connection.query(QUERIES["arm"])[0][0]:
                self._bell.arm()
            else:
                self._hold_until = now + SHORTEST_POLL * 10  # a silent writer is in flight

    def _disarm(self, connection: Connection) -> None:
        self._bell.disarm()
        connection.query(QUERIES["disarm"])
        self._burst = 0
        self._hold_until = time.monotonic() + SETTLE

    def _read_gauge(self, connection: Connection) -> None:
        usage = float(connection.query(QUERIES["queue_usage"])[0][0])
        if usage > QUEUE_LIMIT >= self.queue_usage:
            log.error(
                "The notification queue is over half full: a session listens and does not read. Not asking to be rung.",
                extra=self._fields(usage=usage),
            )
        self.queue_usage = usage
        if usage > QUEUE_LIMIT and self._bell.mode == "adaptive":
            if self._bell.armed_since is not None:
                self._disarm(connection)
            self._hold_until = time.monotonic() + GAUGE_INTERVAL

    def _self_test(self, connection: Connection) -> None:
        """Ring ourselves, and demand to hear it.

        Raises:
            CdcError: nothing came.
        """
        others = _ring_back(connection, self._channel)
        if others is None:
            raise CdcError(
                "notifications do not arrive on this connection; PgBouncer in transaction mode does this "
                "(let dsn go to PostgreSQL directly or through a session pool, or set notify: off)"
            )
        if others:
            self._bell.wake()

    def _fields(self, **fields: object) -> dict[str, object]:
        return {"fields": {"database": self._database, **fields}}


_SELF_TEST = "cdc self-test "


def hears_itself(connection: Connection, channel: str) -> bool:
    """Whether a notification of this session's own comes back to it within `SELF_TEST_DEADLINE`, for `cdc check`.

    Raises:
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    _listen(connection, channel)
    return _ring_back(connection, channel) is not None


def _listen(connection: Connection, channel: str) -> None:
    connection.execute(sql.SQL("listen {}").format(sql.Identifier(channel)).as_string(connection.raw))


def _ring_back(connection: Connection, channel: str) -> set[str] | None:
    """Ring ourselves, and wait for it: what else was heard meanwhile, or None when it has not come in time."""
    nonce = f"{_SELF_TEST}{uuid.uuid4()}"
    connection.query(QUERIES["ring_self"], {"channel": channel, "nonce": nonce})
    deadline = time.monotonic() + SELF_TEST_DEADLINE
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    heard: set[str] = set()
    while True:
        heard.update(payload for _, payload in connection.notifications())
        if nonce in heard:
            return heard - {nonce}
        if (left := deadline - time.monotonic()) <= 0 or not poller.poll(left * 1000):
            return None
