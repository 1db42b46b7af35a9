"""Whether what runs also delivers; behind ``/readyz``, the console and the watchdog.

A process that lives proves nothing. What counts is that each sink's oldest undelivered change does not grow old, and
that each database answers. Everything here is read from memory: judging never waits for what it judges.

The watchdog asks less than ``/readyz``: a sink that is down is not mended by a restart, a thread that hangs may be.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cdc.bell import SAFETY_POLL
from cdc.fleet import Database, Fleet
from cdc.pipeline import Pipeline

LOST_AFTER = 10.0
"""Seconds without an answer after which a database counts as lost; the keeper asks every 4 s at least."""

GRACE = 5.0
"""Seconds by which a look may be late."""

Reason = Literal["lost", "stopped", "hanging", "stalled", "unserved", "dropping"]


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why delivery stands still somewhere.

    Attributes:
        sink: None: the database as a whole.
        reason: ``lost``, the database does not answer; ``stopped``, the sink takes nothing more; ``hanging``, the
            pipeline's thread is overdue; ``stalled``, old changes wait and nothing was acknowledged for a while;
            ``unserved``, no daemon serves the sink; ``dropping``, the sink fails and ephemeral changes are lost.
        detail: for people, in a sentence without row values.
        seconds: for how long; None: not known.
    """

    database: str
    sink: str | None
    reason: Reason
    detail: str
    seconds: float | None

    def to_json(self) -> dict[str, object]:
        """As ``/readyz`` and ``/api/overview`` show it."""
        return {
            "database": self.database,
            "sink": self.sink,
            "reason": self.reason,
            "detail": self.detail,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
        }


def troubles(fleet: Fleet, stalled_after: float) -> list[Trouble]:
    """Everything that keeps changes from being delivered.

    Args:
        fleet: what runs.
        stalled_after: seconds a change may wait while nothing is acknowledged.
    """
    now = time.monotonic()
    return [found for database in fleet.databases.values() for found in _of(database, stalled_after, now)]


def hanging(fleet: Fleet) -> list[Pipeline]:
    """Pipelines whose thread should have been heard of long ago."""
    return [p for p in [*fleet.pipelines(), *fleet.leaving] if p.is_alive() and p.meter.overdue() > 0]


def backlog(database: Database, pipeline: Pipeline) -> tuple[int, float] | None:
    """How many events are still to be delivered, and seconds since the oldest was recorded; None: not known.

    It is what the keeper saw last, older by now unless something has been acknowledged since. A pipeline that sleeps is
    not woken for what its sink does not want: what the book holds beyond its position then is no backlog, until the
    next look that nobody asked for.
    """
    keeper, meter, now = database.keeper, pipeline.meter, time.monotonic()
    status = keeper.sinks.get(pipeline.sink) if keeper else None
    if keeper is None or status is None:
        return None
    rests = pipeline.state == "running" and meter.rests_since is not None
    if not status.pending or (rests and now - (meter.rests_since or 0.0) < SAFETY_POLL + GRACE):
        return 0, 0.0
    return status.pending, status.lag + now - max(keeper.measured_at, meter.quiet_since)


def _of(database: Database, stalled_after: float, now: float) -> Iterator[Trouble]:
    keeper = database.keeper
    heard_at = max(keeper.heard_at if keeper else 0.0, database.since)
    lost = now - heard_at > LOST_AFTER
    if lost:
        why = (keeper.trouble if keeper else "") or "no answer"
        yield Trouble(database.name, None, "lost", why, now - heard_at)
    for sink, pipeline in database.pipelines.items():
        found = _of_pipeline(database, pipeline, stalled_after, now, lost=lost)
        if found:
            reason, detail, seconds = found
            yield Trouble(database.name, sink, reason, detail, seconds)


def _of_pipeline(
    database: Database, pipeline: Pipeline, stalled_after: float, now: float, *, lost: bool
) -> tuple[Reason, str, float | None] | None:
    meter = pipeline.meter
    late = meter.overdue()
    found: tuple[Reason, str, float | None] | None = None
    if pipeline.stopped_because:
        found = "stopped", pipeline.stopped_because, None
    elif not pipeline.is_alive():
        found = "stopped", "its thread has ended unexpectedly; the log says why", None
    elif late > 0:
        found = "hanging", "its thread does not move", late
    elif pipeline.state == "dropping":
        found = "dropping", meter.last_error or "the sink fails", None
    elif not lost and now - meter.quiet_since > stalled_after:
        found = _of_quiet(database, pipeline, stalled_after, now - meter.quiet_since)
    return found


def _of_quiet(
    database: Database, pipeline: Pipeline, stalled_after: float, quiet: float
) -> tuple[Reason, str, float | None] | None:
    """Of a pipeline that has acknowledged nothing for so many seconds."""
    status = database.keeper.sinks.get(pipeline.sink) if database.keeper else None
    if status is None:
        return None
    if pipeline.state == "waiting" and not status.served:  # not by another daemon either
        return "unserved", pipeline.meter.last_error or "no daemon has taken it yet", quiet
    _, lag = backlog(database, pipeline) or (0, 0.0)
    if pipeline.state in ("running", "retrying", "stalled") and lag > stalled_after:
        error = pipeline.meter.last_error if pipeline.state == "retrying" else None
        hangs = "the sink does not return from a delivery" if pipeline.state == "stalled" else None
        return "stalled", error or hangs or "nothing was acknowledged", min(lag, quiet)
    return None
