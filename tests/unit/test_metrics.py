"""What is counted: latencies by batch, a clock that is not ours, threads that are overdue."""

from __future__ import annotations

import time
from bisect import bisect_left
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc import metrics
from cdc.event import Event, Op
from cdc.metrics import LATENCY_BOUNDS, Histogram, Meter, ServerClock, quantile

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


class Clock:
    """A monotonic clock that moves when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def event(age: float) -> Event:
    """Recorded so many seconds before NOW."""
    source = {"database": "shop", "schema": "public", "table": "orders", "seq": 1, "txid": 1}
    return Event.model_validate(
        {
            "id": "shop-1-1",
            "op": Op.INSERT,
            "source": {**source, "ts": NOW - timedelta(seconds=age)},
            "key": None,
            "before": None,
            "after": None,
            "changed": None,
            "context": None,
        }
    )


def meter_at_now() -> Meter:
    server = ServerClock()
    asked = time.monotonic()
    server.heard(NOW.timestamp(), asked, asked)
    return Meter(server)


@given(st.lists(st.integers(0, 5_000_000).map(lambda ms: ms / 1000 + 0.0003), min_size=1, max_size=60))
def test_a_batch_is_counted_as_its_events_one_by_one_would_be(ages: list[float]) -> None:
    batch = [event(age) for age in sorted(ages, reverse=True)]
    one_by_one = [0] * (len(LATENCY_BOUNDS) + 1)
    server = NOW.timestamp()
    for found in batch:
        one_by_one[bisect_left(LATENCY_BOUNDS, server - found.source.ts.timestamp())] += 1
    meter = Meter()
    meter._measure(batch, server)
    assert meter.latency.counts == one_by_one


def test_a_batch_that_is_not_sorted_loses_no_event_of_the_count() -> None:
    meter = Meter()
    meter._measure([event(0.002), event(40.0), event(0.3)], NOW.timestamp())
    assert meter.latency.count == 3


def test_latency_is_measured_at_the_acknowledgement_and_not_at_the_delivery(clock: Clock) -> None:
    meter = meter_at_now()
    meter.took([event(0.0)])
    assert meter.delivered == 1
    assert meter.latency.count == 0
    clock.now += 2.0
    meter.acknowledged()
    assert meter.latency.counts[bisect_left(LATENCY_BOUNDS, 2.0)] == 1
    assert meter.latency.sum == pytest.approx(2.0, abs=0.01)


def test_what_was_never_acknowledged_is_not_measured(clock: Clock) -> None:
    meter = meter_at_now()
    meter.took([event(0.0)])
    meter.lost("the connection is lost", 0.2)
    meter.serves()
    meter.acknowledged()
    assert meter.latency.count == 0


def test_without_the_servers_clock_nothing_is_measured() -> None:
    meter = Meter()
    meter.took([event(0.0)])
    meter.acknowledged()
    assert (meter.delivered, meter.latency.count) == (1, 0)


# -- the server's clock --


def test_a_wrong_clock_of_ours_changes_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ServerClock()
    server.heard(5000.0, clock.now, clock.now)
    monkeypatch.setattr(metrics.time, "time", lambda: 0.0)
    clock.now += 7.5
    assert server.now() == 5007.5
    assert server.ahead == 5007.5


def test_a_slow_answer_moves_nothing_and_a_fast_one_mends(clock: Clock) -> None:
    server = ServerClock()
    server.heard(5000.0, clock.now - 2.0, clock.now)  # somewhere within two seconds
    assert server.now() == 5001.0
    server.heard(5000.0, clock.now - 0.001, clock.now)
    assert server.now() == pytest.approx(5000.001, abs=0.0011)
    exact = server.now()
    server.heard(4999.0, clock.now - 3.0, clock.now)
    assert server.now() == exact


def test_a_step_of_the_servers_clock_is_followed(clock: Clock) -> None:
    server = ServerClock()
    server.heard(5000.0, clock.now, clock.now)
    server.heard(8600.0, clock.now - 0.01, clock.now)
    assert server.now() == pytest.approx(8600.0, abs=0.011)


# -- quantiles, samples --


@given(st.lists(st.floats(0.0001, 3000), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_is_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    histogram = Histogram(LATENCY_BOUNDS)
    for value in values:
        histogram.add(value)
    true = sorted(values)[max(0, -(-int(share * len(values) * 1000) // 1000) - 1)]
    found = quantile(histogram.bounds, histogram.counts, share)
    assert found is not None
    low, high = next((low, high) for low, high in pairwise((0.0, *LATENCY_BOUNDS)) if low < true <= high)
    assert low <= found <= high * 2.5


def test_a_sample_tells_of_what_came_since_the_one_before(clock: Clock) -> None:
    meter = meter_at_now()
    meter.took([event(0.2), event(0.2)])
    meter.acknowledged()
    meter.sample(pending=3, lag=1.5)
    meter.sample(pending=None, lag=None)
    first, second = meter.history
    assert (first.events, first.pending, first.lag) == (2, 3, 1.5)
    assert first.p50 is not None
    assert 0.1 < first.p50 <= 0.25
    assert (second.events, second.p50, second.pending) == (0, None, None)


def test_the_history_reaches_back_an_hour_and_no_further() -> None:
    meter = Meter()
    for _ in range(1000):
        meter.sample(0, 0.0)
    assert len(meter.history) == 360


# -- who is overdue --


def test_a_thread_is_overdue_when_it_says_nothing_for_longer_than_it_said(clock: Clock) -> None:
    meter = Meter()
    meter.lives(4.0)
    clock.now += 63.0
    assert meter.overdue() < 0
    clock.now += 2.0
    assert meter.overdue() > 0
    meter.lives()
    assert meter.overdue() < 0


def test_a_pause_that_was_announced_is_no_hanging(clock: Clock) -> None:
    meter = Meter()
    meter.failed("the sink is down")
    meter.lives(300.0)
    clock.now += 300.0
    assert meter.overdue() < 0
    assert (meter.failures, meter.last_error) == (1, "the sink is down")


def test_a_delivery_may_take_a_quarter_of_an_hour(clock: Clock) -> None:
    meter = Meter()
    meter.delivers()
    clock.now += 899.0
    assert meter.overdue() < 0
    clock.now += 2.0
    assert meter.overdue() > 0
