"""The metrics, as Prometheus wants them: read from memory at each scrape.

Figures that only the database knows are left out, rather than repeated, once they are older than `STALE` seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from cdc.config import Config
from cdc.fleet import Database, Fleet
from cdc.health import LOST_AFTER, backlog, troubles
from cdc.keeper import MEASURING
from cdc.metrics import Histogram

STALE = MEASURING + LOST_AFTER
STATES = ("waiting", "running", "retrying", "dropping", "paused", "stalled", "stopped")
"""What a pipeline may say of itself; see the head of :mod:`cdc.pipeline`."""

_SINK = ("database", "sink")
_DATABASE = ("database",)


class FleetCollector(Collector):
    """Every ``cdc_…`` metric there is."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """All families, described; without a database there are no samples in them."""
        fleet = self._fleet
        for database in fleet.databases.values():
            if database.keeper is not None:
                database.keeper.ask()
        yield InfoMetricFamily("cdc_build", "The program that runs.", {"version": version("table-cdc")})
        yield GaugeMetricFamily(
            "cdc_config_last_reload_successful",
            "Whether the last reload was accepted; the configuration of before stays in force otherwise.",
            value=float(fleet.reload_error is None),
        )
        yield GaugeMetricFamily(
            "cdc_config_last_reload_success_timestamp_seconds",
            "When the configuration in force was read.",
            value=fleet.reloaded_at,
        )
        yield from self._of_sinks()
        yield from self._of_databases()

    def _of_sinks(self) -> Iterator[Metric]:
        delivered = CounterMetricFamily("cdc_events_delivered", "Events a sink has taken.", labels=_SINK)
        filtered = CounterMetricFamily(
            "cdc_events_filtered", "Events read that the sink's configuration does not want.", labels=_SINK
        )
        failures = CounterMetricFamily("cdc_delivery_failures", "Attempts to deliver that failed.", labels=_SINK)
        latency = HistogramMetricFamily(
            "cdc_commit_to_ack_seconds",
            "From the moment the trigger recorded a change to its acknowledgement, by the server's clock.",
            labels=_SINK,
        )
        batches = HistogramMetricFamily("cdc_batch_events", "Events in a batch, as read.", labels=_SINK)
        state = GaugeMetricFamily("cdc_sink_state", "1 for what the pipeline does now.", labels=(*_SINK, "state"))
        stalled = GaugeMetricFamily("cdc_sink_stalled", "1 while /readyz complains of the sink.", labels=_SINK)
        last = GaugeMetricFamily(
            "cdc_last_acknowledged_age_seconds", "Since something was last acknowledged.", labels=_SINK
        )
        pending = GaugeMetricFamily(
            "cdc_pending_events", "Events not delivered yet, counted up to 100000.", labels=_SINK
        )
        lag = GaugeMetricFamily("cdc_lag_seconds", "Since the oldest pending event was recorded.", labels=_SINK)
        letters = GaugeMetricFamily(
            "cdc_dead_letters", "Events set aside because they cannot be delivered.", labels=_SINK
        )
        dropped = CounterMetricFamily("cdc_events_dropped", "Ephemeral changes that were not delivered.", labels=_SINK)
        backfills = GaugeMetricFamily(
            "cdc_backfill_running", "1 while a table's rows are being told of.", labels=(*_SINK, "table")
        )
        share = GaugeMetricFamily(
            "cdc_backfill_done_ratio",
            "How much of a table is told of, 0 to 1, as far as one can say.",
            labels=(*_SINK, "table"),
        )
        rows = GaugeMetricFamily(
            "cdc_backfill_rows", "Rows of a table looked at by its last backfill.", labels=(*_SINK, "table")
        )
        now = time.monotonic()
        limit = self._fleet.config.http.stalled_after if self._fleet.config.http else 60.0
        in_trouble = {(found.database, found.sink) for found in troubles(self._fleet, limit)}
        for database in self._fleet.databases.values():
            fresh = _fresh(database, now)
            for sink, pipeline in database.pipelines.items():
                labels, meter = (database.name, sink), pipeline.meter
                delivered.add_metric(labels, meter.delivered)
                filtered.add_metric(labels, pipeline.filtered)
                failures.add_metric(labels, meter.failures)
                latency.add_metric(labels, *_buckets(meter.latency))
                batches.add_metric(labels, *_buckets(meter.batches))
                for name in dict.fromkeys((*STATES, pipeline.state)):
                    state.add_metric((*labels, name), float(name == pipeline.state))
                stalled.add_metric(labels, float(labels in in_trouble))
                if meter.acknowledged_at is not None:
                    last.add_metric(labels, now - meter.acknowledged_at)
            keeper = database.keeper
            for sink, status in keeper.sinks.items() if keeper and fresh else ():
                labels = (database.name, sink)
                behind = status.pending, status.lag
                if (ours := database.pipelines.get(sink)) is not None:
                    behind = backlog(database, ours) or behind
                pending.add_metric(labels, behind[0])
                lag.add_metric(labels, behind[1])
                letters.add_metric(labels, status.dead_letters)
                dropped.add_metric(labels, status.dropped)
            for one in keeper.backfills if keeper and fresh else ():
                table = (database.name, one.sink, f"{one.schema}.{one.table}")
                backfills.add_metric(table, float(one.state == "running"))
                share.add_metric(table, one.share)
                rows.add_metric(table, one.rows_read)
        yield from (
            delivered,
            filtered,
            failures,
            latency,
            batches,
            state,
            stalled,
            last,
            pending,
            lag,
            letters,
            dropped,
            backfills,
            share,
            rows,
        )

    def _of_databases(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("cdc_database_up", "Whether the database answers.", labels=_DATABASE)
        usage = GaugeMetricFamily(
            "cdc_notify_queue_usage", "How full the cluster's notification queue is, 0 to 1.", labels=_DATABASE
        )
        armed = GaugeMetricFamily("cdc_armed", "1 while all sleep and writers are asked to ring.", labels=_DATABASE)
        size = GaugeMetricFamily("cdc_outbox_bytes", "The outbox on disk, indexes included.", labels=_DATABASE)
        oldest = GaugeMetricFamily(
            "cdc_oldest_transaction_seconds",
            "Age of the writing transaction that has been open for longest in the cluster; 0 when there is none.",
            labels=_DATABASE,
        )
        drift = GaugeMetricFamily(
            "cdc_trigger_drift", "Tables whose triggers are not what the configuration says.", labels=_DATABASE
        )
        heard = CounterMetricFamily("cdc_notifications_received", "Notifications heard.", labels=_DATABASE)
        ahead = GaugeMetricFamily(
            "cdc_clock_offset_seconds", "How far the server's clock is ahead of the daemon's.", labels=_DATABASE
        )
        now = time.monotonic()
        for database in self._fleet.databases.values():
            labels, keeper = (database.name,), database.keeper
            up.add_metric(labels, float(keeper is not None and now - keeper.heard_at <= LOST_AFTER))
            if database.listener is not None:
                heard.add_metric(labels, database.listener.received)
            if database.clock.ahead is not None:
                ahead.add_metric(labels, database.clock.ahead)
            if keeper is None or keeper.pulse is None or not _fresh(database, now):
                continue
            pulse = keeper.pulse
            usage.add_metric(labels, pulse.queue_usage)
            armed.add_metric(labels, float(pulse.armed))
            size.add_metric(labels, pulse.outbox_bytes)
            oldest.add_metric(labels, (pulse.oldest.age or 0.0) if pulse.oldest else 0.0)
            drift.add_metric(labels, len(keeper.drift))
        yield from (up, usage, armed, size, oldest, drift, heard, ahead)


def registry(fleet: Fleet) -> CollectorRegistry:
    """What ``/metrics`` shows: ours, and what is known of any process."""
    found = CollectorRegistry()
    found.register(FleetCollector(fleet))
    ProcessCollector(registry=found)
    PlatformCollector(registry=found)
    return found


def described() -> Mapping[str, str]:
    """Every metric of ours by the name a scrape shows, with what it says; for the documentation's test."""
    names: dict[str, str] = {}
    for family in FleetCollector(Fleet(Config.model_construct(http=None), "")).collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        names[family.name + suffix] = family.documentation
    return names


def _fresh(database: Database, now: float) -> bool:
    return database.keeper is not None and now - database.keeper.measured_at <= STALE


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Cumulated counts by upper bound, and the sum."""
    total, buckets = 0, []
    for bound, number in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        total += number
        buckets.append((_bound(bound), float(total)))
    return buckets, histogram.sum


def _bound(bound: float) -> str:
    return "+Inf" if bound == float("inf") else repr(bound)
