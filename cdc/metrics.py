"""What the daemon counts, in memory: for each pipeline a meter, for each database its clock.

Nothing here talks to anybody. A pipeline's thread tells its :class:`Meter` what it does, once per batch and never once
per event; :mod:`cdc.http` and the watchdog read it. Numbers are replaced, not locked: a reader may see a batch's events
counted and its duration not yet, for an instant.

Two questions are answered for each pipeline:

* *How long from the change to its acknowledgement?* Events carry the time of the server's clock, and this process has
  another. :class:`ServerClock` keeps the difference, measured with every sign of life of the keeper, against the
  monotonic clock: neither a step of our wall clock nor a wrong one changes a figure.
* *Does the thread still move?* Whatever it does next it says until when it will be heard of again; a thread that is
  overdue hangs. A sink that fails is no such case: waiting for the next attempt is a thing that is said.

:class:`History` keeps the last hour, a sample every `SAMPLE_INTERVAL`, for the console.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cdc.event import Event

LATENCY_BOUNDS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0,
)  # fmt: skip
"""Upper bounds, in seconds, of the buckets of ``cdc_commit_to_ack_seconds``."""
BATCH_BOUNDS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 5000.0, 20_000.0, 100_000.0)
"""Upper bounds of the buckets of ``cdc_batch_events``."""

SAMPLE_INTERVAL = 10.0
"""Seconds between two samples of the history."""
HISTORY = 3600.0
"""Seconds the history reaches back."""

PATIENCE = 60.0
"""Seconds a thread may be late before it counts as hanging."""
DELIVERY_PATIENCE = 900.0
"""Seconds for one delivery; sinks have deadlines of their own, and a large batch to a slow one may take minutes."""


class Histogram:
    """Counts by bucket; cheaper than observing one by one, because a batch is counted at once."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        """How many fell into each bucket; the last one has no upper bound."""
        self.sum = 0.0

    def add(self, value: float, number: int = 1) -> None:
        """Count one value, or a number of equal ones."""
        self.counts[bisect_left(self.bounds, value)] += number
        self.sum += value * number

    @property
    def count(self) -> int:
        """How many values were counted."""
        return sum(self.counts)


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """A quantile of a histogram, linear inside its bucket; None when it is empty.

    Args:
        bounds: upper bounds of the buckets.
        counts: how many fell into each; one more than bounds.
        share: 0 to 1.
    """
    wanted = share * sum(counts)
    if not wanted:
        return None
    below = 0
    for index, number in enumerate(counts):
        if below + number >= wanted:
            if index == len(bounds):
                break
            low = bounds[index - 1] if index else 0.0
            return low + (bounds[index] - low) * (wanted - below) / number
        below += number
    return bounds[-1]


class ServerClock:
    """What the server's clock says now, from what it said before and the monotonic time since.

    Each answer says: the server's time was this, at some moment between our question and the answer. An estimate that
    is possible stays, one that is not is moved to the nearest that is; so slow answers do no harm and fast ones mend.
    """

    def __init__(self) -> None:
        self._offset: float | None = None  # server's time minus monotonic time

    def heard(self, server: float, asked: float, answered: float) -> None:
        """Take note of an answer.

        Args:
            server: seconds since 1970 by the server's clock.
            asked, answered: when, by the monotonic clock.
        """
        earliest, latest = server - answered, server - asked
        if self._offset is None:
            self._offset = (earliest + latest) / 2
        else:
            self._offset = min(max(self._offset, earliest), latest)

    def now(self) -> float | None:
        """Seconds since 1970 by the server's clock; None before the first answer."""
        return None if self._offset is None else self._offset + time.monotonic()

    @property
    def ahead(self) -> float | None:
        """Seconds the server's clock is ahead of ours; None before the first answer."""
        now = self.now()
        return None if now is None else now - time.time()


@dataclass(frozen=True, slots=True)
class Sample:
    """One pipeline at one moment.

    Attributes:
        at: seconds since 1970 by our own clock, for the axis of a plot.
        events: delivered since the sample before.
        p50, p99: seconds from change to acknowledgement, of what was acknowledged since the sample before, if any.
        pending: events not delivered yet; None: not known.
        lag: seconds since the oldest of them was recorded; None: not known.
    """

    at: float
    events: int
    p50: float | None
    p99: float | None
    pending: int | None
    lag: float | None


class Meter:
    """What one pipeline has done. Told by the pipeline's thread, read by others."""

    def __init__(self, clock: ServerClock | None = None) -> None:
        """
        Args:
            clock: of the pipeline's database; without one no latency is measured.
        """
        self.delivered = 0
        """Events the sink has taken, ephemeral ones included."""
        self.failures = 0
        """Attempts to deliver that failed."""
        self.batches = Histogram(BATCH_BOUNDS)
        self.latency = Histogram(LATENCY_BOUNDS)
        self.acknowledged_at: float | None = None
        """When something was last acknowledged, by the monotonic clock."""
        self.quiet_since = time.monotonic()
        """Since when nothing has been acknowledged although it could have been, by the monotonic clock."""
        self.rests_since: float | None = None
        """Since when all it wants is delivered, as far as it knows, by the monotonic clock; None: it is at work."""
        self.last_error: str | None = None
        self.last_error_at: float | None = None
        """By the monotonic clock."""
        self.history: deque[Sample] = deque(maxlen=int(HISTORY / SAMPLE_INTERVAL))
        self._clock = clock or ServerClock()
        self._in_hand: list[Sequence[Event]] = []
        self._due = time.monotonic() + PATIENCE
        self._sampled_events = 0
        self._sampled_counts = list(self.latency.counts)

    # -- told by the pipeline -----------------------------------------------------------------------------------

    def serves(self) -> None:
        """The sink is ours from here on."""
        self._in_hand.clear()
        self.rests_since = None
        self.quiet_since = time.monotonic()

    def lives(self, seconds: float = 0.0) -> None:
        """The thread moves, and will be heard of again after so many seconds."""
        self._due = time.monotonic() + seconds + PATIENCE

    def delivers(self) -> None:
        """The sink is handed something."""
        self._due = time.monotonic() + DELIVERY_PATIENCE

    def read(self, events: int) -> None:
        """A batch of so many events was read."""
        self.rests_since = None
        self.batches.add(float(events))

    def took(self, events: Sequence[Event]) -> None:
        """The sink has taken these events; they are to be acknowledged."""
        self.delivered += len(events)
        self._in_hand.append(events)

    def acknowledged(self) -> None:
        """All that the sink has taken is acknowledged; also when it was nothing of what was read."""
        self.acknowledged_at = self.quiet_since = time.monotonic()
        now = self._clock.now()
        if now is not None:
            for events in self._in_hand:
                self._measure(events, now)
        self._in_hand.clear()

    def rests(self) -> None:
        """There is nothing to deliver."""
        self.quiet_since = self.rests_since = time.monotonic()

    def returned(self, events: Sequence[Event]) -> None:
        """The sink has taken these dead letters; how old they are says nothing of how fast we are."""
        self.delivered += len(events)

    def passed_on(self, events: Sequence[Event]) -> None:
        """The sink has taken these ephemeral changes, which nobody acknowledges."""
        self.delivered += len(events)
        now = self._clock.now()
        if now is not None:
            self._measure(events, now)

    def failed(self, error: str) -> None:
        """An attempt has failed."""
        self.failures += 1
        self._complain(error)
        self.lives()

    def lost(self, error: str, wait: float) -> None:
        """The pipeline is interrupted and begins anew after so many seconds."""
        self._in_hand.clear()
        self.rests_since = None
        self._complain(error)
        self.lives(wait)

    def _complain(self, error: str) -> None:
        self.last_error, self.last_error_at = error, time.monotonic()

    def _measure(self, events: Sequence[Event], now: float) -> None:
        """Count a batch's latencies: it is sorted by time all but exactly, so halving finds where a bucket ends."""
        if not events:
            return
        oldest, newest = max(now - _recorded(events[0]), 0.0), max(now - _recorded(events[-1]), 0.0)
        high, low = (bisect_left(LATENCY_BOUNDS, age) for age in (oldest, newest))
        counts = self.latency.counts
        start = 0
        for bucket in range(high, low, -1):
            # Ages fall along the batch: what is older than the lower bound of this bucket belongs to it.
            end = bisect_left(events, now - LATENCY_BOUNDS[bucket - 1], lo=start, key=_recorded)
            counts[bucket] += end - start
            start = end
        counts[low] += len(events) - start
        self.latency.sum += (oldest + newest) / 2 * len(events)

    # -- asked by others ----------------------------------------------------------------------------------------

    def overdue(self) -> float:
        """Seconds for which the thread should have been heard of; negative while all is well."""
        return time.monotonic() - self._due

    def sample(self, pending: int | None, lag: float | None) -> None:
        """Add a sample to the history; to be called every `SAMPLE_INTERVAL` by one thread."""
        counts = list(self.latency.counts)
        since = [now - before for now, before in zip(counts, self._sampled_counts, strict=True)]
        delivered = self.delivered
        self.history.append(
            Sample(
                at=time.time(),
                events=delivered - self._sampled_events,
                p50=quantile(LATENCY_BOUNDS, since, 0.5),
                p99=quantile(LATENCY_BOUNDS, since, 0.99),
                pending=pending,
                lag=lag,
            )
        )
        self._sampled_counts, self._sampled_events = counts, delivered


def _recorded(event: Event) -> float:
    return event.source.ts.timestamp()
