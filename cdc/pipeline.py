"""One pipeline per database and sink: read → filter → deliver → retry → set aside → acknowledge.

Guarantees, given that the outbox hands out each key's events in order and repeats what was not acknowledged:

* an event is acknowledged only after the sink has returned from delivering it, or after it was stored as a dead
  letter, or when the sink's configuration does not want it;
* an event that does not fit its table's model is no sink's to take: a permanent failure, before it is delivered;
* while an event is being retried nothing later of its key is delivered (:mod:`cdc.delivery` tells of one attempt);
* what became of events that cannot be delivered, and how they come back, is told in :mod:`cdc.fates`. Before dead
  letters are delivered all that was delivered of the stream is acknowledged: it does not come again after them;
* a sink that is slow, down, hanging or broken holds back nobody else: the thread, the connection and the position are
  its own;
* a daemon that was stopped and continued asks, before it delivers, whether the sink is still its own (stopped again
  right after the answer, it delivers one batch twice), and acknowledges nothing once another has taken over: every
  acknowledgement names the epoch.

Ephemeral changes (``delivery: ephemeral``) come from the listener, are delivered between two batches and never twice:
what fails is dropped, and counted.

Existing rows come with the stream's pages (:mod:`cdc.backfill`), after the page they belong to, and have the fate of
any other event.

What people want of the sink (``cdc sinks pause``, ``cdc dead-letters replay``) stands in the database. The pipeline
asks when it makes sure that the sink is still its own: at most once a second, at least every `HEARTBEAT` seconds.

States, as `cdc status` shows them::

    waiting ──claimed──▶ running ◀──────────▶ retrying        (transient failure, for ever)
       ▲                    │    ◀──────────▶ paused          (somebody said so; also out of retrying)
       │                    │    ◀──────────▶ stalled         (the sink does not return from a delivery)
       │                    │    ◀──────────▶ dropping        (ephemeral changes are lost because the sink fails)
       └── connection lost ─┴──▶ stopped                      (disabled, or a permanent failure under `stop`)

On each failure: no connection, or a lost one: reconnect with back-off and read the same window again. Fenced (another
daemon took over): forget everything and wait until the sink is free. An exception nobody expected: logged with its
traceback, treated as transient. A sink that does not return: nothing can be done but say so (the keeper does, this
thread hangs); the daemon ends without it when it is told to stop. A stop request ends waits and retries; what was
delivered until then is acknowledged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

from cdc import crashpoints
from cdc import outbox as book
from cdc.backfill import Backfills, slices
from cdc.bell import HEARTBEAT, INBOX_EVENTS, Bell, Sleeper
from cdc.connection import Connection
from cdc.dead_letters import Letters
from cdc.decoding import Unreadable
from cdc.delivery import Fate, attempt
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
from cdc.event import Event, Op, Route
from cdc.fates import Replay, Stream
from cdc.filters import Filter
from cdc.metrics import Meter
from cdc.options import SinkOptions
from cdc.outbox import PATIENCE, Batch, Outbox, Owner, Skipping, join_process
from cdc.retry import keep_alive, retrying
from cdc.sinks.base import Page, Sink

log = logging.getLogger(__name__)

STANDBY_INTERVAL = 1.0
"""Seconds between tries to take a sink that another daemon serves."""
CONFIRM_AFTER = 2.0
"""Seconds without a word from the database after which a pipeline makes sure that the sink is still its own before it
delivers; well below the lease after which another daemon may take it."""
ASK_AFTER = 1.0
"""Seconds after which a pipeline that is at work asks anew what people want of its sink."""
STALLED_AFTER = 5.0
"""Seconds in one delivery after which a sink counts as stalled."""
SMALLEST_SHARE = 1 / 256
"""Of a batch's limits, as long as pages are lost on the way again and again."""
LARGEST_SHARE = 8
"""Batches read and acknowledged as one page while a backlog is got through: each page costs a commit."""
PROMPT = 0.1
"""Seconds in which a page has to be off our hands for the next to be larger. A crash repeats a page."""
ROUTES = 10_000
"""Routes whose fate is remembered; forged notifications may come with any number of them."""
COUNT_INTERVAL = 1.0
"""Seconds between two notes of how many ephemeral changes were dropped."""


class Pipeline(threading.Thread):
    """The thread that serves one sink from one database.

    Attributes:
        database, sink: their names in the configuration.
        state: as in the head of this module.
        stopped_because: why the pipeline has ended by itself, or None.
        filtered: events read and not wanted by the sink's configuration, so far.
        meter: what else it has done.
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
        meter: Meter | None = None,
        on_delivered: Callable[[Sequence[Event]], None] | None = None,
        validate: Callable[[Event], str | None] | None = None,
    ) -> None:
        super().__init__(name=f"{database}/{sink.name}", daemon=True)
        self.database = database
        self.sink = sink.name
        self.state = "waiting"
        self.stopped_because: str | None = None
        self.filtered = 0
        self.meter = meter or Meter()
        self._dsn = dsn
        self._sink = sink
        self._options: SinkOptions = sink.options
        self._bell = bell
        self._stop_event = stop
        self._owner = owner
        self._told: Callable[[Sequence[Event]], None] = on_delivered or (lambda events: None)
        self._filter = Filter(self._options.filter) if self._options.filter is not None else None
        self._validate = validate
        self._sleeper = Sleeper(self.name, self._wants, linger=self._options.batch.linger)
        self._wants_route = lru_cache(maxsize=ROUTES)(self._decide)
        self._share = 1.0  # of a batch's limits: less where a slow line is too slow for them, more in a backlog
        self._heard_at = 0.0
        self._asked_at = 0.0
        self._paused = False
        self._epoch = 0
        self._letters: Letters
        self._stream: Stream
        self._replay: Replay | None = None
        self._backfills: Backfills
        self._rows: Stream
        self._skipping: Skipping | None = None
        self._stall = threading.Lock()  # what the keeper's thread may look at and set
        self._busy_since: float | None = None
        self._before_stall = ""
        self._failed = 0  # ephemeral changes the sink did not take, or that fit no model
        self._last_misfit = ""
        self._counted = 0  # dropped changes the database knows of
        self._counted_at = 0.0
        self._last_loss = ""

    def run(self) -> None:
        keep_alive(self._serve, CdcError, maximum=10.0, stop=self._stop_event, before_sleep=self._lost)

    def stop(self) -> None:
        """End the thread soon: it finishes and acknowledges the batch in its hands. May be called from any thread."""
        self._stop_event.set()
        self.interrupt()

    def interrupt(self) -> None:
        """End the current wait, so that a stop request is noticed."""
        self._sleeper.woken.set()

    # -- one connection's life ----------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Serve the sink over one connection, until stopped or disabled; raises what ends the connection's use."""
        with Connection(self._dsn, purpose=self.sink) as connection:
            join_process(connection, self._owner.process)
            outbox = Outbox(
                connection,
                database=self.database,
                sink=self.sink,
                owner=self._owner,
                stores_windows=self._sink.keeps_position or not book.tells_what_is_on_disk(connection),
            )
            while (claim := outbox.claim(start=self._options.start)) is None:
                self.state = "waiting"
                self.meter.lives(STANDBY_INTERVAL)
                if self._stop_event.wait(STANDBY_INTERVAL):
                    return
            crashpoints.reached("after-claim")
            self._begin(connection, outbox, claim.epoch)
            self.meter.serves()
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
                self._letters.look()
                self._backfills.look()
                self._ask(outbox)
                self._wait_while_paused(outbox)
                self._turn_to(outbox)
                self._guarded(outbox, self._watched, outbox, self._sink.open)
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

    def _begin(self, connection: Connection, outbox: Outbox, epoch: int) -> None:
        """Forget whatever was known under an earlier claim."""
        self._epoch = epoch
        self._letters = Letters(connection, database=self.database, sink=self.sink, epoch=epoch)
        policy = self._options.on_permanent_failure
        self._stream = Stream(self._letters, policy, self._took, self._fields)
        self._rows = Stream(self._letters, policy, self._returned, self._fields)
        self._backfills = Backfills(connection, outbox, sink=self.sink, wants=self._wants_rows, fields=self._fields)
        self._skipping = outbox.skipping()
        self._replay = None

    def _loop(self, outbox: Outbox) -> None:
        acked: int | None = None
        is_time = True
        while not self._stop_event.is_set():  # a stop request that comes later ends the next rest
            if self._paused:
                self._acknowledge(outbox, acked)
                acked = None
                self._wait_while_paused(outbox)
                is_time = True
                continue
            if self._letters.replaying:
                self._acknowledge(outbox, acked)
                acked = None
                if not self._replay_some(outbox):
                    return
                is_time = True
            lively = self._sleeper.called
            if is_time:
                if self.silent_for() > CONFIRM_AFTER:
                    self._ask(outbox)  # a dead connection answers no page either, and is waited for longer then
                batch = self._look(outbox, acked)
                acked = None
                if batch is not None:
                    lively = True
                    self._turn_to(outbox, batch)
                    began = time.monotonic()
                    if not self._process(outbox, batch):
                        return
                    acked = batch.last_seq
                    self._choose_share(batch, time.monotonic() - began)
                    if not batch.full:
                        self._bell.pace(self._sleeper, len(batch.events))
            self._pass_on(outbox)
            if not self._letters.replaying:
                self._sleeper.due = min(self._sleeper.due, self._backfills.due_at)
                is_time = self._bell.rest(self._sleeper)
            if self._unasked_for() >= (ASK_AFTER if lively else HEARTBEAT):
                self._ask(outbox)
        crashpoints.reached("draining")
        self._acknowledge(outbox, acked)

    def _look(self, outbox: Outbox, acked: int | None) -> Batch | None:
        """Acknowledge, and look into the book."""
        self._bell.looking(self._sleeper)
        if acked is not None:
            crashpoints.reached("before-acknowledge")
        batch = self._read(outbox, acked)
        crashpoints.reached("after-read")
        self._heard()
        if acked is not None:
            self.meter.acknowledged()
        if self.state != "dropping":
            self._become(outbox, "running")
        if batch is None:
            self.meter.rests()
            self._bell.found_nothing(self._sleeper)
        else:
            self.meter.read(len(batch.events) + len(batch.rows))
            self._bell.found(self._sleeper, full=batch.full)
        return batch

    def _acknowledge(self, outbox: Outbox, acked: int | None) -> None:
        """Store how far we have got, where no batch is read that would say so along with it."""
        if acked is not None:
            self._backfills.acknowledge(acked)
            self.meter.acknowledged()
            crashpoints.reached("after-acknowledge")

    def _read(self, outbox: Outbox, acked: int | None) -> Batch | None:
        """The next page."""
        limits = self._options.batch
        # Letters that are delivered again take turns with the stream, a batch each.
        share = min(self._share, 1.0) if self._letters.replaying else self._share
        self.meter.lives(PATIENCE)
        try:
            batch = self._backfills.next_batch(
                acked,
                events=max(1, int(limits.events * share)),
                bytes_=max(1, int(limits.bytes * min(1.0, share))),
                roomy=share >= 1.0,
            )
        except DatabaseUnreachable:
            self._share = max(min(1.0, self._share) / 4, SMALLEST_SHARE)
            raise
        return batch

    def _choose_share(self, batch: Batch, took: float) -> None:
        """How large the next page may be, now that one was got off our hands in so many seconds.

        Smaller for a while after one that did not come through in time; larger in a backlog the sink takes quickly.
        """
        if self._share < 1.0:
            if batch.full:
                self._share = min(1.0, self._share * 2)
        elif not batch.full or took > 2 * PROMPT:
            self._share = max(1.0, self._share / 2)
        elif took < PROMPT:
            self._share = min(float(LARGEST_SHARE), self._share * 2)

    def _turn_to(self, outbox: Outbox, batch: Batch | None = None) -> None:
        """Tell a sink that keeps the position itself where in the book it is."""
        if self._sink.keeps_position:
            window, after = outbox.window()
            if batch is not None and not batch.events:
                window = self._backfills.chunk  # rows alone are of no window, and never come again as they are
            self._sink.begin(Page(self.database, window, after))

    def _process(self, outbox: Outbox, batch: Batch) -> bool:
        """Get a batch off our hands, its rows after its events; False when stopped before all of it was."""
        size = self._options.batch.events
        for some in slices(batch.events, size):
            if not self._dispose(outbox, some, self._stream):
                return False
        if batch.rows:
            crashpoints.reached("before-rows")
            began = time.monotonic()
            for some in slices(batch.rows, size):
                if not self._dispose(outbox, some, self._rows):
                    return False
                crashpoints.reached("between-rows")
            self._backfills.delivered(time.monotonic() - began)
            crashpoints.reached("after-rows")
        return True

    def _dispose(self, outbox: Outbox, events: Sequence[Event | Unreadable], fate: Stream) -> bool:
        """Get events off our hands; False when stopped before all of them were."""
        chosen: list[Event] = []
        for event in events:
            try:
                if isinstance(event, Event) and not self._passed_over(event) and self._chooses(event):
                    chosen.append(event)
                    continue
            except PermanentFailure as error:
                failure = error
            else:
                if isinstance(event, Event):
                    self.filtered += 1
                    continue
                failure = PermanentFailure(event.reason)
            # What came before it goes first: it may be of the same key.
            if not self._deliver(outbox, chosen, fate):
                return False
            chosen = []
            if isinstance(event, Unreadable):
                fate.refused_text(event.id, event.seq, event.text, event.reason)
            else:
                fate.refused(event, failure)
        return self._deliver(outbox, chosen, fate)

    def _deliver(self, outbox: Outbox, events: list[Event], fate: Fate) -> bool:
        """Get events off our hands, as often as it takes; False when stopped before all of them were."""
        while events:
            try:
                again = self._guarded(outbox, attempt, partial(self._hand_over, outbox), events, fate)
            except TransientFailure:
                return False
            if again:
                log.warning("Part of a batch failed; delivering the rest again.", extra=self._fields(events=len(again)))
            events = again
        return True

    def _passed_over(self, event: Event) -> bool:
        """Whether an event of the stream comes again only because other tables were rewound."""
        return self._skipping is not None and self._skipping.skips(event)

    def _chooses(self, event: Event) -> bool:
        """Whether an event is to be delivered; raises as `_fits`."""
        return self._wants(event) and self._fits(event)

    def _fits(self, event: Event) -> bool:
        """Whether the filter lets an event pass.

        Raises:
            PermanentFailure: that cannot be said, or the event is to be delivered and does not fit its table's model.
        """
        if self._filter is not None and not self._filter.passes(event):
            return False
        if self._validate is not None and (reason := self._validate(event)) is not None:
            raise PermanentFailure(reason)
        return True

    def _wants(self, event: Event) -> bool:
        return self._wants_route(event.route)

    def _wants_rows(self, schema: str, table: str) -> bool:
        return self._options.wants(self.database, schema, table, Op.READ.value)

    def _decide(self, route: Route) -> bool:
        # A notification may still carry the database's former name; which database it is, we know.
        _, schema, table, op = route
        return self._options.wants(self.database, schema, table, op.value)

    # -- delivery -----------------------------------------------------------------------------------------------

    def _guarded(self, outbox: Outbox, action: Callable[..., Any], *arguments: Any) -> Any:
        """Do something with the sink, as often as it takes; raises TransientFailure only when told to stop."""

        def failed(error: BaseException, wait: float) -> None:
            if self.state != "retrying":
                log.warning("The sink fails; retrying.", extra=self._fields(error=str(error), retry_in=round(wait, 1)))
            self._bell.step_out(self._sleeper)
            self._become(outbox, "retrying", str(error))
            self._heard()
            self.meter.lives(wait)
            self._count_dropped(outbox)
            crashpoints.reached("in-back-off")

        def act() -> Any:
            try:
                return action(*arguments)
            except (DeliveryError, DatabaseError):
                raise
            except Exception as error:
                log.exception("The sink raised what it should not; retrying.", extra=self._fields())
                raise TransientFailure(f"unexpected {type(error).__name__}") from None

        options = self._options.retry
        attempts = retrying(
            TransientFailure,
            initial=options.initial,
            maximum=options.max,
            stop=self._stop_event,
            before_sleep=failed,
            sleep=partial(self._back_off, outbox),
        )
        result = attempts(act)
        if self.state == "retrying":
            log.info("The sink works again.", extra=self._fields())
            self._bell.step_in(self._sleeper)
            self._become(outbox, "running")
        return result

    def _hand_over(self, outbox: Outbox, events: list[Event]) -> None:
        """Give the sink a list of its own. Raises as :meth:`cdc.sinks.base.Sink.deliver`, and DatabaseError."""
        if self.silent_for() > CONFIRM_AFTER:
            self._ask(outbox)  # whether the sink is still ours
        crashpoints.reached("before-deliver")
        self._watched(outbox, self._sink.deliver, events)
        crashpoints.reached("after-deliver")

    def _replay_some(self, outbox: Outbox) -> bool:
        """Deliver the next dead letters that were asked for; False when stopped before all of them were."""
        while True:
            replay = self._replay
            if replay is None or replay.looks != self._letters.looks:
                replay = self._replay = Replay(
                    self._letters, self._chooses, self._options.batch, self._returned, self._fields
                )
            events = replay.next_page()
            if events is None:
                self._replay = None
                self._letters.look()
                return True
            crashpoints.reached("before-replay")
            if not self._deliver(outbox, events, replay):
                return False
            if not replay.catching_up:
                return True

    def _took(self, events: Sequence[Event]) -> None:
        """The sink has taken events of the stream."""
        self.meter.took(events)
        self._told(events)

    def _returned(self, events: Sequence[Event]) -> None:
        """The sink has taken dead letters."""
        self.meter.returned(events)
        self._told(events)

    def _back_off(self, outbox: Outbox, seconds: float) -> None:
        """Wait for the next attempt, and for as long as the sink is paused."""
        ends = time.monotonic() + seconds
        while not self._stop_event.is_set() and (left := ends - time.monotonic()) > 0:
            self._stop_event.wait(min(left, HEARTBEAT))
            if self._unasked_for() >= ASK_AFTER:
                self._ask(outbox)
            if self._paused:
                self._wait_while_paused(outbox)
                return

    def _watched(self, outbox: Outbox, action: Callable[..., Any], *arguments: Any) -> Any:
        """Do something with the sink that may hang, while the keeper watches."""
        self._busy_since = time.monotonic()
        self.meter.delivers()
        try:
            return action(*arguments)
        except Exception as error:
            # What this package did not raise may quote a row.
            first = next(iter(error.failures.values()), error) if isinstance(error, PartialFailure) else error
            self.meter.failed(str(first) if isinstance(first, CdcError) else f"unexpected {type(first).__name__}")
            raise
        finally:
            with self._stall:
                self._busy_since = None
                stalled = self.state == "stalled"
            if stalled:
                log.info("The sink has returned.", extra=self._fields())
                self._bell.step_in(self._sleeper)
                self._become(outbox, self._before_stall)

    def note_stall(self, connection: Connection) -> None:
        """Say so if the sink does not return from a delivery; for the keeper's thread.

        Raises:
            DatabaseError: see :meth:`cdc.connection.Connection.query`.
        """
        since = self._busy_since
        if since is None or self.state == "stalled" or (seconds := time.monotonic() - since) < STALLED_AFTER:
            return
        book.note_stall(connection, self.sink, epoch=self._epoch, seconds=seconds)
        with self._stall:
            if stalled := self._busy_since == since:
                self._before_stall, self.state = self.state, "stalled"
        if stalled:
            self._bell.step_out(self._sleeper)  # the others may sleep
            log.warning("The sink does not return.", extra=self._fields(seconds=round(seconds)))
        else:  # it has, meanwhile
            book.set_state(connection, self.sink, epoch=self._epoch, state=self.state)

    # -- ephemeral changes --------------------------------------------------------------------------------------

    def _pass_on(self, outbox: Outbox) -> None:
        """Deliver what the listener has handed over, once."""
        while not self._stop_event.is_set() and (events := self._sleeper.inbox.take(self._options.batch.events)):
            if self.silent_for() > CONFIRM_AFTER:
                self._ask(outbox)
            self._pass_batch_on(outbox, self._passing(events))
        self._count_dropped(outbox)

    def _passing(self, events: list[Event]) -> list[Event]:
        """Those that the filter lets pass; one that it fails on, or that does not fit its model, is dropped."""
        passing: list[Event] = []
        for event in events:
            try:
                if self._fits(event):
                    passing.append(event)
                else:
                    self.filtered += 1
            except PermanentFailure as error:
                self._drop_misfit(event, error)
        return passing

    def _pass_batch_on(self, outbox: Outbox, batch: list[Event]) -> None:
        if not batch:
            return
        try:
            self._watched(outbox, self._sink.deliver, list(batch))
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
            self.meter.passed_on(batch)
            self._told(batch)

    def _drop(self, outbox: Outbox, number: int, error: str) -> None:
        self._failed += number
        if self.state != "dropping":
            log.error("The sink fails; ephemeral changes are dropped.", extra=self._fields(error=error))
            self._become(outbox, "dropping", error)

    def _drop_misfit(self, event: Event, error: PermanentFailure) -> None:
        self._failed += 1
        if str(error) != self._last_misfit:
            self._last_misfit = str(error)
            log.error("An ephemeral change is dropped.", extra=self._fields(event_id=event.id, error=str(error)))

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
        self.meter.lives(HEARTBEAT)

    def silent_for(self) -> float:
        """Seconds since the database last answered this pipeline. May be called from any thread."""
        return _now() - self._heard_at

    # -- what people want ---------------------------------------------------------------------------------------

    def _ask(self, outbox: Outbox) -> bool:
        """Ask the database whether the sink is still ours, and what people want of it; returns whether it is paused."""
        wishes = outbox.confirm()
        self._heard()
        self._asked_at = time.monotonic()
        self._paused = wishes.paused
        if wishes.requests != self._letters.requests:
            self._letters.look()
            self._backfills.look()
        return wishes.paused

    def _unasked_for(self) -> float:
        return time.monotonic() - self._asked_at

    def _wait_while_paused(self, outbox: Outbox) -> None:
        """While the sink is paused do nothing but look whether it still is. Its ephemeral changes are dropped."""
        if not self._paused or self._stop_event.is_set():
            return
        before = "retrying" if self.state == "retrying" else "running"
        log.info("The sink is paused.", extra=self._fields())
        self._bell.step_out(self._sleeper)
        self._become(outbox, "paused")
        paused = True
        while paused and not self._stop_event.is_set():
            self._sleeper.woken.wait(HEARTBEAT)
            self._stop_event.wait(max(0.0, ASK_AFTER - self._unasked_for()))
            self._sleeper.woken.clear()
            self._failed += len(self._sleeper.inbox.take(INBOX_EVENTS))
            paused = self._ask(outbox)
            self._count_dropped(outbox)
        if not paused:
            log.info("The sink is resumed.", extra=self._fields())
            self._become(outbox, before)
        if before == "running":
            self._bell.step_in(self._sleeper)

    # -- state --------------------------------------------------------------------------------------------------

    def _become(self, outbox: Outbox, state: str, error: str | None = None) -> None:
        if state == self.state and error is None:
            return
        self.state = state
        outbox.set_state(state, error)

    def _lost(self, error: BaseException, wait: float) -> None:
        self.state = "waiting"
        self.meter.lost(str(error), wait)
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
