"""What the console and ``/readyz`` show, as JSON, from memory. docs/json.md tells each key."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version

from cdc.config import HttpConfig
from cdc.fleet import Database, Fleet
from cdc.health import LOST_AFTER, Trouble, backlog, troubles
from cdc.metrics import LATENCY_BOUNDS, SAMPLE_INTERVAL, Meter, quantile
from cdc.outbox import OpenTransaction
from cdc.pipeline import Pipeline

LONG_OPEN = 5.0
"""Seconds after which an open transaction is worth a word."""


def readiness(fleet: Fleet, found: Sequence[Trouble]) -> dict[str, object]:
    """What ``/readyz`` answers: whether changes are delivered, how fast, and what holds them back."""
    databases: dict[str, object] = {}
    for database in fleet.databases.values():
        pulse = database.keeper.pulse if database.keeper else None
        databases[database.name] = {
            "oldest_transaction": transaction(pulse.oldest) if pulse and pulse.oldest else None,
            "sinks": {
                sink: {
                    "state": pipeline.state,
                    "lag_seconds": _lag(database, pipeline),
                    "commit_to_ack_p99_seconds": latency(pipeline.meter)[1],
                    "last_error": pipeline.meter.last_error,
                }
                for sink, pipeline in database.pipelines.items()
            },
        }
    return {"ready": not found, "reasons": [trouble.to_json() for trouble in found], "databases": databases}


def overview(fleet: Fleet, config: HttpConfig) -> dict[str, object]:
    """What the console draws, but for its plots, live tail and dead letters."""
    for database in fleet.databases.values():
        if database.keeper is not None:
            database.keeper.ask(soon=True)
    found = troubles(fleet, config.stalled_after)
    return {
        "now": round(time.time(), 3),
        "version": version("table-cdc"),
        "owner": fleet.owner,
        "ready": not found,
        "troubles": [trouble.to_json() for trouble in found],
        "reload": {"at": round(fleet.reloaded_at, 3), "error": fleet.reload_error},
        "can_change": config.secret is not None,
        "shows_values": config.show_values,
        "needs_token_to_read": config.show_values and config.secret is not None,
        "databases": [_database(fleet, database) for database in fleet.databases.values()],
    }


def history(fleet: Fleet) -> dict[str, object]:
    """The last hour of every pipeline: columns of numbers, a null where nothing was known or nothing came."""
    return {
        "interval": SAMPLE_INTERVAL,
        "sinks": [
            {
                "database": pipeline.database,
                "sink": pipeline.sink,
                "at": [round(sample.at, 1) for sample in samples],
                "rate": [round(sample.events / SAMPLE_INTERVAL, 2) for sample in samples],
                "p50": [_rounded(sample.p50) for sample in samples],
                "p99": [_rounded(sample.p99) for sample in samples],
                "pending": [sample.pending for sample in samples],
                "lag": [_rounded(sample.lag) for sample in samples],
            }
            for pipeline in fleet.pipelines()
            for samples in [list(pipeline.meter.history)]
        ],
    }


def transaction(oldest: OpenTransaction) -> dict[str, object]:
    """A transaction, as in `cdc status --json`."""
    return {
        "pid": oldest.pid,
        "prepared": oldest.prepared,
        "application": oldest.application,
        "state": oldest.state,
        "database": oldest.database,
        "age_seconds": _rounded(oldest.age),
    }


def latency(meter: Meter) -> tuple[float | None, float | None]:
    """Median and 99th percentile, in seconds, of the last samples in which something came, or of all there is."""
    for sample in reversed(meter.history):
        if sample.p50 is not None:
            return _rounded(sample.p50), _rounded(sample.p99)
    counts = list(meter.latency.counts)
    return _rounded(quantile(LATENCY_BOUNDS, counts, 0.5)), _rounded(quantile(LATENCY_BOUNDS, counts, 0.99))


def _database(fleet: Fleet, database: Database) -> dict[str, object]:
    keeper, now = database.keeper, time.monotonic()
    pulse = keeper.pulse if keeper else None
    oldest = pulse.oldest if pulse else None
    silent = now - max(keeper.heard_at if keeper else 0.0, database.since)
    unknown = sorted(set(keeper.sinks) - set(database.sinks)) if keeper else []
    return {
        "name": database.name,
        "up": silent <= LOST_AFTER and pulse is not None,
        "silent_seconds": round(silent, 1),
        "trouble": keeper.trouble if keeper else "",
        "measured_seconds": round(now - keeper.measured_at, 1) if keeper and pulse else None,
        "armed": pulse.armed if pulse else None,
        "notify_queue_usage": pulse.queue_usage if pulse else None,
        "outbox_bytes": pulse.outbox_bytes if pulse else None,
        "outbox_alarm_bytes": database.options.outbox_alarm,
        "oldest_transaction": transaction(oldest) if oldest and (oldest.age or 0) > LONG_OPEN else None,
        "drift": list(keeper.drift) if keeper else [],
        "unknown_sinks": unknown,
        "tables": list(database.options.tables),
        "sinks": [_sink(fleet, database, pipeline) for pipeline in database.pipelines.values()],
    }


def _sink(fleet: Fleet, database: Database, pipeline: Pipeline) -> dict[str, object]:
    meter, now = pipeline.meter, time.monotonic()
    status = database.keeper.sinks.get(pipeline.sink) if database.keeper else None
    options = fleet.config.sinks.get(pipeline.sink)
    behind = backlog(database, pipeline)
    p50, p99 = latency(meter)
    return {
        "name": pipeline.sink,
        "type": options.type if options else None,
        "state": "stopped" if pipeline.stopped_because else pipeline.state,
        "stopped_because": pipeline.stopped_because,
        "owner": status.owner if status else None,
        "pending": behind[0] if behind else None,
        "pending_capped": bool(status and status.capped and behind and behind[0]),
        "lag_seconds": _lag(database, pipeline),
        "dead_letters": status.dead_letters if status else None,
        "parked": status.parked if status else None,
        "paused": status.paused if status else False,
        "dropped": status.dropped if status else None,
        "backfills": [
            one.to_json()
            for one in (database.keeper.backfills if database.keeper else ())
            if one.sink == pipeline.sink and one.state in ("running", "paused", "failed")
        ],
        "delivered": meter.delivered,
        "filtered": pipeline.filtered,
        "failures": meter.failures,
        "rate": round(meter.history[-1].events / SAMPLE_INTERVAL, 2) if meter.history else None,
        "p50_seconds": p50,
        "p99_seconds": p99,
        "acknowledged_seconds": None if meter.acknowledged_at is None else round(now - meter.acknowledged_at, 1),
        "last_error": meter.last_error,
        "last_error_seconds": None if meter.last_error_at is None else round(now - meter.last_error_at, 1),
    }


def _lag(database: Database, pipeline: Pipeline) -> float | None:
    behind = backlog(database, pipeline)
    return _rounded(behind[1]) if behind else None


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 5)
