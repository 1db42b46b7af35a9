"""Named points at which the process kills itself, for the fault suite.

Why this is in production code: what survives a crash is decided between two lines of the real process, with real
threads, real connections and half-written files, and no mock has those. A test names the point, the daemon dies there
as under ``kill -9`` (nothing is cleaned up, flushed or rolled back), and the next start has to make it good. A random
``kill -9`` hits such a gap once in a thousand tries; this hits it each time. The cost, unarmed, is one comparison.

Nothing here reads the environment: the command line does (``CDC_CRASH_AT``) and calls :func:`arm`.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Final

POINTS: Final[tuple[str, ...]] = (
    "before-listen",  # the listener is connected and has not sent LISTEN
    "after-listen",  # LISTEN is committed, no window has been read yet
    "before-arm",  # about to ask to be rung
    "after-arm",  # asked to be rung, not asleep yet
    "after-claim",  # the sink is ours, nothing has been read
    "after-read",  # next_batch is committed, its rows are not used yet
    "before-deliver",  # the events are chosen, the sink has none of them
    "half-written",  # file sink: half of the data is written
    "after-write",  # file sink: all of it is written and not synced yet
    "before-commit",  # postgres sink: the target has all of it and has not committed
    "before-close",  # file sink: a file is about to be closed and given its last name
    "after-close",  # file sink: it has that name, and no next one was begun
    "half-compressed",  # file sink: part of a closed file is compressed
    "after-compress",  # file sink: a closed file is there twice, whole and compressed
    "after-deliver",  # the sink has the events, nobody else knows
    "in-back-off",  # the sink failed, about to wait for the next attempt
    "after-dead-letter",  # a dead letter is stored, its batch not acknowledged
    "after-park",  # a dead letter lets its key wait, or an event waits behind one; its batch not acknowledged
    "before-replay",  # dead letters are chosen, the sink has none of them
    "after-replay",  # the sink has them, and they are still dead letters
    "after-chunk",  # a chunk of a table is read with its page, neither is used yet
    "before-rows",  # the page is delivered, the sink has none of the chunk's rows
    "between-rows",  # the sink has some of the chunk's rows
    "after-rows",  # the sink has all of them, page and chunk are not acknowledged
    "after-chunk-stored",  # they are acknowledged, nothing more is read
    "before-backfill-ends",  # all rows of a table are acknowledged, the backfill still counts as running
    "before-acknowledge",  # about to store the position
    "after-acknowledge",  # the position is stored
    "before-rotate",  # about to turn the outbox to its next child table
    "after-rotate",  # the outbox is turned
    "draining",  # told to stop, batches still in hand
)
"""Every point there is, in the order of an event's life."""


class _Trap:
    """The armed point, and how often it has yet to be reached."""

    def __init__(self, point: str, count: int) -> None:
        self.point = point
        self._left = count
        self._lock = threading.Lock()

    def reached(self, point: str) -> None:
        if point == self.point:
            with self._lock:
                self._left -= 1
                if self._left <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)


_trap: _Trap | None = None


def arm(spec: str) -> None:
    """Choose the point to die at; replaces an earlier choice.

    Args:
        spec: ``POINT``, or ``POINT:N`` for the N-th time it is reached, counted from 1 over all threads.

    Raises:
        ValueError: there is no such point, or N is not a number from 1.
    """
    global _trap  # noqa: PLW0603 - one per process, as the death it brings
    point, colon, count = spec.partition(":")
    if point not in POINTS:
        raise ValueError(f"no crash point of that name (known: {', '.join(POINTS)})")
    if colon and not (count.isascii() and count.isdigit() and int(count) > 0):
        raise ValueError("not a number of times to reach a crash point (write POINT or POINT:N, N from 1)")
    _trap = _Trap(point, int(count) if colon else 1)


def armed(point: str) -> bool:
    """Whether this point is the one to die at; for code that has to make a gap to die in."""
    return _trap is not None and _trap.point == point


def reached(point: str) -> None:
    """Die here if this is the armed point and its turn has come; otherwise nothing."""
    if _trap is not None:
        _trap.reached(point)
