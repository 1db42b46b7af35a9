"""How far a backfill is said to be."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from cdc.backfill import Backfill

BEGAN = datetime(2026, 11, 29, 12, tzinfo=UTC)


def backfill(*, rows_read: int, estimate: int | None) -> Backfill:
    """One that has been running for ten seconds."""
    return Backfill(
        id=1, sink="audit", relation=16400, schema="public", table="item", state="running", reason=None,
        condition=None, chunk=1000, rate=None, asked_at=BEGAN, ended_at=None, estimate=estimate, rows_read=rows_read,
        rows_told=rows_read, began_at=BEGAN, moved_at=BEGAN + timedelta(seconds=10),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows_read", "estimate", "share", "remaining"),
    [(50, 100, 0.5, 10.0), (0, 100, 0.0, None), (100, 100, 0.99, None), (900, 100, 0.99, None), (50, None, 0.0, None)],
)
def test_what_the_planner_did_not_think_of_is_neither_done_nor_a_matter_of_no_time(
    rows_read: int, estimate: int | None, share: float, remaining: float | None
) -> None:
    found = backfill(rows_read=rows_read, estimate=estimate)
    assert (found.share, found.remaining) == (share, remaining)
