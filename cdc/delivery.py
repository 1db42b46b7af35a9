"""One attempt: what a sink takes of a batch, and what becomes of each of its events.

No waiting, no retrying, no database: those are the pipeline's. What an attempt is for (the stream of events, or dead
letters on their way back) it is told as a :class:`Fate`.

* What must wait behind an earlier event of its key is taken out before the sink sees it (:meth:`Fate.admit`).
* A permanent failure of a whole batch: halves find the event in few deliveries, in order.
* A partial failure: the rest goes again from the first failed event of each failed key, even where the sink had taken a
  later one; so nothing later of a key stands alone at the destination for good.
* An event that can never be delivered is the fate's to decide (:meth:`Fate.refused`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.lanes import Held


class Fate(Protocol):
    """What becomes of events, one batch after the other."""

    def holds(self, event: Event) -> bool:
        """Whether an event must wait behind an earlier one of its key that could not be delivered."""
        ...

    def admit(self, batch: list[Event]) -> list[Event]:
        """Those that need not wait, in order; the others are off our hands when this returns."""
        ...

    def delivered(self, events: Sequence[Event]) -> None:
        """The sink has them."""
        ...

    def refused(self, event: Event, failure: PermanentFailure) -> None:
        """It can never be delivered. Raises SinkDisabled if the sink is to stop for that."""
        ...


def attempt(deliver: Callable[[list[Event]], None], batch: list[Event], fate: Fate) -> list[Event]:
    """Deliver what can be delivered of a batch.

    Args:
        deliver: hands a list to the sink; raises as :meth:`cdc.sinks.base.Sink.deliver`. The list is its own.
        batch: in order.
        fate: what becomes of its events.

    Returns:
        What must be delivered again, in order.

    Raises:
        TransientFailure: nothing was delivered; SinkDisabled; whatever `fate` raises.
    """
    batch = fate.admit(batch)
    if not batch:
        return []
    try:
        deliver(list(batch))
    except PermanentFailure as failure:
        if len(batch) > 1:
            return _halve(deliver, batch, fate)
        fate.refused(batch[0], failure)
        return []
    except PartialFailure as failure:
        return _sort_out(batch, failure, fate)
    fate.delivered(batch)
    return []


def _halve(deliver: Callable[[list[Event]], None], batch: list[Event], fate: Fate) -> list[Event]:
    """Find the event that a whole batch was refused for."""
    middle = len(batch) // 2
    if again := attempt(deliver, batch[:middle], fate):
        return again + batch[middle:]
    try:
        return attempt(deliver, batch[middle:], fate)
    except TransientFailure:
        return batch[middle:]  # the first half is delivered, and need not come again


def _sort_out(batch: list[Event], error: PartialFailure, fate: Fate) -> list[Event]:
    """What must be delivered again after a partial failure."""
    waiting = Held()
    delivered: list[Event] = []
    again: list[Event] = []
    transient: TransientFailure | None = None
    for index, event in enumerate(batch):
        failure = error.failures.get(index)
        if isinstance(failure, TransientFailure):
            if transient is None or (failure.retry_after or 0) > (transient.retry_after or 0):
                transient = failure
        elif waiting.holds(event) or fate.holds(event):
            pass  # again, whatever the sink said of it; what has to be set aside then is
        elif isinstance(failure, PermanentFailure):
            fate.refused(event, failure)
            continue
        else:
            delivered.append(event)
            continue
        again.append(event)
        waiting.add(event)
    if delivered:
        fate.delivered(delivered)
    if transient is not None and len(again) == len(batch):
        raise transient  # nothing moved: wait before the next attempt
    # Something moved, so this is progress; the failed ones wait their turn in the next attempt.
    return again
