"""What must stay in order: the events of one key, and all of a table where an event of it has no key.

An update that changes its key belongs to both keys. A lane is a set of events that are tied to each other, directly or
through others; events of different lanes may be delivered side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from cdc.errors import PermanentFailure, TransientFailure
from cdc.event import Event, Op, join_object, split_row

Table = tuple[str, str, str]
"""Database, schema and name."""


def reach(event: Event) -> tuple[Table, frozenset[str]]:
    """What must stay in order with an event: its table, and its key before and after; no key: all of the table."""
    table = (event.source.database, event.source.schema_name, event.source.table)
    if event.key is None:
        return table, frozenset()
    keys = {event.key.raw}
    if event.op is Op.UPDATE and event.before is not None:
        was = split_row(event.before.raw)
        keys.add(join_object({name: was.get(name, value) for name, value in split_row(event.key.raw).items()}))
    return table, frozenset(keys)


class Held:
    """What later events must wait behind: keys, and tables all of whose events must wait."""

    def __init__(self) -> None:
        self._keys: dict[Table, set[str]] = {}
        self._closed: set[Table] = set()

    def __bool__(self) -> bool:
        return bool(self._keys)

    def add(self, event: Event) -> None:
        """Let everything wait that must stay in order with this event."""
        self.add_reach(*reach(event))

    def add_reach(self, table: Table, keys: Collection[str]) -> None:
        """The same, of an event that :func:`reach` has said this of."""
        self._keys.setdefault(table, set()).update(keys)
        if not keys:
            self._closed.add(table)

    def holds(self, event: Event) -> bool:
        """Whether an event must wait. Of a table nothing is held of, that is found out without reading its images."""
        source = event.source
        if (source.database, source.schema_name, source.table) not in self._keys:
            return False
        return self.holds_reach(*reach(event))

    def holds_reach(self, table: Table, keys: Collection[str]) -> bool:
        """The same, of an event that :func:`reach` has said this of."""
        held = self._keys.get(table)
        return held is not None and (not keys or table in self._closed or not held.isdisjoint(keys))


def lanes(batch: Sequence[Event]) -> list[list[int]]:
    """Split a batch into lanes: lists of indexes, ascending in each, the lanes in the order in which they begin."""
    parent = list(range(len(batch)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    last_of_key: dict[tuple[Table, str], int] = {}
    keys_of_table: dict[Table, set[str]] = {}
    barrier: dict[Table, int] = {}  # the last event without a key
    for index, event in enumerate(batch):
        table, keys = reach(event)
        tied = [barrier[table]] if table in barrier else []
        for key in keys or keys_of_table.get(table, set()):
            if (table, key) in last_of_key:
                tied.append(last_of_key[table, key])
        if keys:
            keys_of_table.setdefault(table, set()).update(keys)
            last_of_key.update(((table, key), index) for key in keys)
        else:
            barrier[table] = index
        for other in tied:
            parent[root(other)] = root(index)
    found: dict[int, list[int]] = {}
    for index in range(len(batch)):
        found.setdefault(root(index), []).append(index)
    return list(found.values())


def in_waves(
    batch: Sequence[Event],
    send: Callable[[Sequence[int]], Mapping[int, TransientFailure | PermanentFailure]],
    *,
    at_once: int,
) -> dict[int, TransientFailure | PermanentFailure]:
    """Send a batch where each event may fail by itself: a lane one event after another, the lanes side by side.

    After a failure nothing more of that lane is sent.

    Args:
        batch: the events, in order.
        send: sends the events with these indexes, no two of one lane, and waits for what becomes of them; returns which
            failed.
        at_once: it is given at most so many.

    Returns:
        Index → why it failed, for a :class:`~cdc.errors.PartialFailure`.
    """
    failures: dict[int, TransientFailure | PermanentFailure] = {}
    waits = TransientFailure("an event before it, of the same key, was not taken")
    going = lanes(batch)
    depth = 0
    while going:
        wave = [lane[depth] for lane in going]
        for start in range(0, len(wave), at_once):
            failures.update(send(wave[start : start + at_once]))
        depth += 1
        for lane in going:
            if lane[depth - 1] in failures:
                failures.update(dict.fromkeys(lane[depth:], waits))
        going = [lane for lane in going if len(lane) > depth and lane[depth] not in failures]
    return failures
