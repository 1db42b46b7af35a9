"""One pipeline per database and sink: read → filter → deliver → retry → set aside → acknowledge.

Guarantees, given that the outbox hands out each key's events in order and repeats what was not acknowledged:

* an event is acknowledged only after the sink has returned from delivering it, or after it was stored as a dead
  letter, or when the sink's configuration does not want it;
* while an event is being retried nothing later of its key is delivered. After a partial failure the rest of the
  batch goes again from the first failed event of each failed key, even where the sink had taken a later one;
* a sink that is slow, down or broken holds back nobody else: the thread, the connection and the position are its own;
* a daemon that was stopped and continued asks, before it delivers, whether the sink is still its own (stopped again
  right after the answer, it delivers one batch twice), and acknowledges nothing once another has taken over: every
  acknowledgement names the epoch.

Ephemeral changes (``delivery: ephemeral``) come from the listener, are delivered between two batches and never twice:
what fails is dropped, and counted.

States, as `cdc status` shows them::

    waiting ──claimed──▶ running ◀──────────▶ retrying        (transient failure, for ever)
       ▲                    │    ◀──────────▶ dropping        (ephemeral changes are lost because the sink fails)
       └── connection lost ─┴──▶ stopped                      (disabled, or a permanent failure under `stop`)

On each failure: no connection, or a lost one: reconnect with back-off and read the same window again. Fenced (another
daemon took over): forget everything and wait until the sink is free. An exception nobody expected: logged with its
traceback, treated as transient. A stop request ends waits and retries; what was delivered until then is acknowledged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cdc import crashpoints
from cdc.bell import HEARTBEAT, Bell, Sleeper
from cdc.connection import Connection
from cdc.decoding import Unreadable
from cdc.errors import (
    CdcError,
    DatabaseError,
    DatabaseUnreachable,
    DeliveryError,
    Fenced,
    PartialFailure,
    PermanentFailure,
    SinkDisabled,
    TransientFailure,
)
from cdc.event import Event, Route
from cdc.lanes import Table, reach
from cdc.options import SinkOptions
from cdc.outbox import Batch, Outbox, Owner, join_process
from cdc.retry import keep_alive, retrying
from cdc.sinks.base import Page, Sink

log = logging.getLogger(__name__)

STANDBY_INTERVAL = 1.0
"""Seconds between tries to take a sink that another daemon serves."""
CONFIRM_AFTER = 2.0
"""Seconds without a word from the database after which a pipeline makes sure that the sink is still its own before it
delivers; well below the lease after which another daemon may take it."""
SMALLEST_SHARE = 1 / 256
"""Of a batch's limits, as long as pages are lost on the way again and again."""
COUNT_INTERVAL = 1.0
"""Seconds between two notes of how many ephemeral changes were dropped."""


class Pipeline(threading.Thread):
    """The thread that serves one sink from one database.

    Attributes:
        database, sink: their names in the configuration.
        state: as in the head of this module.
        stopped_because: why the pipeline has ended by itself, or None.
    """

    def __init__(
        self,
        dsn: str,
        *,
        database: str,
        sink: Sink[Any],
        bell: Bell,
        stop: threading.Event,
        owner: Owner,
        on_delivered: Callable[[Sequence[Event]], None] | None = None,
    ) -> None:
        super().__init__(name=f"{database}/{sink.name}", daemon=True)
        self.database = database
        self.sink = sink.name
        self.state = "waiting"
        self.stopped_because: str | None = None
        self._dsn = dsn
        self._sink = sink
        self._options: SinkOptions = sink.options
        self._bell = bell
        self._stop_event = stop
        self._owner = owner
        self._on_delivered = on_delivered
        self._sleeper = Sleeper(self.name, self._wants, linger=self._options.batch.linger)
        self._wanted: dict[Route, bool] = {}
        self._share = 1.0  # of a batch's limits, which a slow line may be too slow for
        self._heard_at = 0.0
        self._failed = 0  # ephemeral changes the sink did not take
        self._counted = 0  # dropped changes the database knows of
        self._counted_at = 0.0
        self._last_loss = ""

    def run(self) -> None:
        keep_alive(self._serve, CdcError, maximum=10.0, stop=self._stop_event, before_sleep=self._lost)

    def interrupt(self) -> None:
        """End the current wait, so that a stop request is noticed."""
        self._sleeper.woken.set()

    # -- one connection's life ----------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Serve the sink over one connection, until stopped or disabled; raises what ends the connection's use."""
        with Connection(self._dsn, purpose=self.sink) as connection:
            join_process(connection, self._owner.process)
            outbox = Outbox(connection, database=self.database, sink=self.sink, owner=self._owner)
            while (claim := outbox.claim(start=self._options.start)) is None:
                self.state = "waiting"
                if self._stop_event.wait(STANDBY_INTERVAL):
                    return
            crashpoints.reached("after-claim")
            self._heard()
            self._last_loss = ""
            log.info("Serving.", extra=self._fields(owner=self._owner.name, epoch=claim.epoch))
            if claim.happened == "promoted":
                log.warning(
                    "The database is on another timeline: a standby was promoted, or it was restored to an earlier "
                    "time. Going on from the position it has; some events may come again, and changes it has lost may "
                    "have been delivered.",
                    extra=self._fields(),
                )
            elif claim.happened == "upgraded":
                log.warning("The database was moved by pg_upgrade; its positions are still good.", extra=self._fields())
            self._bell.join(self._sleeper)
            try:
                self._turn_to(outbox)
                self._guarded(outbox, self._sink.open)
                self._loop(outbox)
            except SinkDisabled as error:
                self.stopped_because = str(error)
                self._become(outbox, "stopped", str(error))
                log.error("The sink is stopped.", extra=self._fields(error=str(error)))
            except (Fenced, DatabaseUnreachable):
                raise
            except DatabaseError as error:
                # The session is good, the server says no: let it be seen where people look.
                self._become(outbox, "retrying", str(error))
                raise
            except CdcError:
                raise
            except Exception as error:
                # The thread must outlive a bug of ours: nobody else would serve the sink.
                log.exception("The pipeline failed as it should not; starting again.", extra=self._fields())
                self._become(outbox, "retrying", f"unexpected {type(error).__name__}")
                raise CdcError(f"unexpected {type(error).__name__}") from None
            finally:
                self._bell.leave(self._sleeper)
                self._close_sink()

    def _loop(self, outbox: Outbox) -> None:
        acked: int | None = None
        is_time = True
        while not self._stop_event.is_set():  # a stop request that comes later ends the next rest
            if is_time:
                self._bell.looking(self._sleeper)
                if acked is not None:
                    crashpoints.reached("before-acknowledge")
                batch = self._read(outbox, acked)
                crashpoints.reached("after-read")
                self._heard()
                if self.state != "dropping":
                    self._become(outbox, "running")
                if batch is None:
                    acked = None
                    self._bell.found_nothing(self._sleeper)
                else:
                    self._bell.found(self._sleeper, full=batch.full)
                    self._turn_to(outbox)
                    if not self._process(outbox, batch):
                        return
                    acked = batch.last_seq
                    if not batch.full:
                        self._bell.pace(self._sleeper)
            self._pass_on(outbox)
            is_time = self._bell.rest(self._sleeper)
            if not is_time and self._silent_for() >= HEARTBEAT:
                outbox.confirm()
                self._heard()
        crashpoints.reached("draining")
        if acked is not None:
            outbox.acknowledge(acked)
            crashpoints.reached("after-acknowledge")

    def _read(self, outbox: Outbox, acked: int | None) -> Batch | None:
        """The next page; smaller ones for a while after a page that did not come through in time."""
        limits = self._options.batch
        try:
            batch = outbox.next_batch(
                acked, events=max(1, int(limits.events * self._share)), bytes_=max(1, int(limits.bytes * self._share))
            )
        except DatabaseUnreachable:
            self._share = max(self._share / 4, SMALLEST_SHARE)
            raise
        if batch is not None and batch.full:
            self._share = min(1.0, self._share * 2)
        return batch

    def _turn_to(self, outbox: Outbox) -> None:
        """Tell a sink that keeps the position itself where in the book it is."""
        if self._sink.keeps_position:
            self._sink.begin(Page(self.database, *outbox.window()))

    def _process(self, outbox: Outbox, batch: Batch) -> bool:
        """Get a batch off our hands; False when stopped before all of it was."""
        for event in batch.events:
            if isinstance(event, Unreadable):
                self._set_aside(outbox, event, event.reason)
        wanted = [event for event in batch.events if isinstance(event, Event) and self._wants(event)]
        while wanted:
            try:
                wanted = self._guarded(outbox, self._attempt, outbox, wanted)
            except TransientFailure:
                return False
        return True

    def _wants(self, event: Event) -> bool:
        route = event.route
        wanted = self._wanted.get(route)
        if wanted is None:
            # A notification may still carry the database's former name; which database it is, we know.
            _, schema, table, op = route
            wanted = self._wanted[route] = self._options.wants(self.database, schema, table, op.value)
        return wanted

    # -- delivery -----------------------------------------------------------------------------------------------

    def _guarded(self, outbox: Outbox, action: Callable[..., Any], *arguments: Any) -> Any:
        """Do something with the sink, as often as it takes; raises TransientFailure only when told to stop."""

        def failed(error: BaseException, wait: float) -> None:
            if self.state != "retrying":
                log.warning("The sink fails; retrying.", extra=self._fields(error=str(error), retry_in=round(wait, 1)))
            self._bell.step_out(self._sleeper)
            self._become(outbox, "retrying", str(error))
            self._heard()
            self._count_dropped(outbox)
            crashpoints.reached("in-back-off")

        def attempt() -> Any:
            try:
                return action(*arguments)
            except (DeliveryError, DatabaseError):
                raise
            except Exception as error:
                log.exception("The sink raised what it should not; retrying.", extra=self._fields())
                raise TransientFailure(f"unexpected {type(error).__name__}") from None

        options = self._options.retry
        attempts = retrying(
            TransientFailure, initial=options.initial, maximum=options.max, stop=self._stop_event, before_sleep=failed
        )
        result = attempts(attempt)
        if self.state == "retrying":
            log.info("The sink works again.", extra=self._fields())
            self._bell.step_in(self._sleeper)
            self._become(outbox, "running")
        return result

    def _attempt(self, outbox: Outbox, batch: list[Event]) -> list[Event]:
        """Deliver what can be delivered of a batch.

        Returns:
            What must be delivered again, in order.

        Raises:
            TransientFailure: nothing was delivered; SinkDisabled; DatabaseError.
        """
        self._make_sure(outbox)
        try:
            crashpoints.reached("before-deliver")
            self._sink.deliver(list(batch))  # whatever the sink does with its list, ours stays
            crashpoints.reached("after-deliver")
        except PermanentFailure as error:
            if len(batch) > 1:
                # At least one of them is the culprit: halves find it in few deliveries, in order.
                middle = len(batch) // 2
                again = self._attempt(outbox, batch[:middle])
                return again + batch[middle:] if again else self._attempt(outbox, batch[middle:])
            self._give_up(outbox, batch[0], error)
        except PartialFailure as error:
            return self._sort_out(outbox, batch, error)
        else:
            if self._on_delivered:
                self._on_delivered(batch)
        return []

    def _sort_out(self, outbox: Outbox, batch: list[Event], error: PartialFailure) -> list[Event]:
        held: dict[Table, set[str]] = {}  # table → keys that wait
        closed: set[Table] = set()  # tables of which an event without a key waits
        again: list[Event] = []
        transient: TransientFailure | None = None
        for index, event in enumerate(batch):
            failure = error.failures.get(index)
            if isinstance(failure, PermanentFailure):
                self._give_up(outbox, event, failure)
                continue
            table, keys = reach(event)
            waits = table in closed or (table in held and (not keys or not keys.isdisjoint(held[table])))
            if isinstance(failure, TransientFailure):
                transient = failure
            elif not waits:
                if self._on_delivered:
                    self._on_delivered([event])
                continue
            again.append(event)
            held.setdefault(table, set()).update(keys)
            if not keys:
                closed.add(table)
        if transient is not None and len(again) == len(batch):
            raise transient  # nothing moved: wait before the next attempt
        if transient is not None:
            # Something moved, so this is progress; the failed ones wait their turn in the next attempt.
            log.warning("Part of a batch failed; delivering the rest again.", extra=self._fields(events=len(again)))
        return again

    def _give_up(self, outbox: Outbox, event: Event, error: PermanentFailure) -> None:
        if self._options.on_permanent_failure == "stop":
            raise SinkDisabled(f"event {event.id} can never be delivered: {error}")
        self._set_aside(outbox, event, str(error))

    def _set_aside(self, outbox: Outbox, event: Event | Unreadable, reason: str) -> None:
        outbox.add_dead_letter(event, reason)
        crashpoints.reached("after-dead-letter")
        log.error("An event became a dead letter.", extra=self._fields(event_id=event.id, error=reason))

    # -- ephemeral changes --------------------------------------------------------------------------------------

    def _pass_on(self, outbox: Outbox) -> None:
        """Deliver what the listener has handed over, once."""
        while not self._stop_event.is_set() and (events := self._sleeper.inbox.take(self._options.batch.events)):
            self._make_sure(outbox)
            self._pass_batch_on(outbox, events)
        self._count_dropped(outbox)

    def _pass_batch_on(self, outbox: Outbox, batch: list[Event]) -> None:
        try:
            self._sink.deliver(list(batch))
        except (SinkDisabled, Fenced):
            raise
        except PermanentFailure as error:
            if len(batch) > 1:
                middle = len(batch) // 2
                self._pass_batch_on(outbox, batch[:middle])
                self._pass_batch_on(outbox, batch[middle:])
            else:
                self._drop(outbox, 1, str(error))
        except PartialFailure as error:
            self._drop(outbox, len(error.failures), str(error))
        except DeliveryError as error:
            self._drop(outbox, len(batch), str(error))
        except Exception as error:
            log.exception("The sink raised what it should not.", extra=self._fields())
            self._drop(outbox, len(batch), f"unexpected {type(error).__name__}")
        else:
            if self.state == "dropping":
                log.info("The sink works again.", extra=self._fields())
                self._become(outbox, "running")
            if self._on_delivered:
                self._on_delivered(batch)

    def _drop(self, outbox: Outbox, number: int, error: str) -> None:
        self._failed += number
        if self.state != "dropping":
            log.error("The sink fails; ephemeral changes are dropped.", extra=self._fields(error=error))
            self._become(outbox, "dropping", error)

    def _count_dropped(self, outbox: Outbox) -> None:
        """Let the database know how many were dropped, now and then."""
        dropped = self._failed + self._sleeper.inbox.dropped
        now = time.monotonic()
        if dropped > self._counted and now - self._counted_at >= COUNT_INTERVAL:
            outbox.add_dropped(dropped - self._counted)
            self._counted, self._counted_at = dropped, now

    # -- ownership ----------------------------------------------------------------------------------------------

    def _heard(self) -> None:
        """Note that the database has just answered, under our epoch."""
        self._heard_at = _now()

    def _silent_for(self) -> float:
        return _now() - self._heard_at

    def _make_sure(self, outbox: Outbox) -> None:
        """Before delivering: unless the database has just said so, ask whether the sink is still ours."""
        if self._silent_for() > CONFIRM_AFTER:
            outbox.confirm()
            self._heard()

    # -- state --------------------------------------------------------------------------------------------------

    def _become(self, outbox: Outbox, state: str, error: str | None = None) -> None:
        if state == self.state and error is None:
            return
        self.state = state
        outbox.set_state(state, error)

    def _lost(self, error: BaseException, wait: float) -> None:
        self.state = "waiting"
        level = logging.WARNING if isinstance(error, DatabaseUnreachable | Fenced) else logging.ERROR
        if str(error) == self._last_loss:
            level = logging.DEBUG  # said already
        self._last_loss = str(error)
        log.log(level, "The pipeline is interrupted.", extra=self._fields(error=str(error), retry_in=round(wait, 1)))

    def _close_sink(self) -> None:
        try:
            self._sink.close()
        except Exception:
            log.exception("The sink could not be closed.", extra=self._fields())

    def _fields(self, **fields: object) -> dict[str, object]:
        return {"fields": {"database": self.database, "sink": self.sink, **fields}}


def _now() -> float:
    """Seconds by a clock that goes on while the process is stopped and while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
