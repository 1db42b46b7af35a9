"""Events set aside: where they lie, what waits behind them, and how they come back in order.

A dead letter is a row of ``cdc.dead_letter``, kept until it is replayed or discarded. One that is *parked* holds back
its keys (without a key, its table): whatever comes later of them is set aside too, in order, and is parked itself. A
key is free when its last parked letter has gone.

Two hands write there. The pipeline that serves the sink adds and delivers letters; people mark them for replay, edit
and discard them, at any moment, from any process. What keeps the two apart is ``cdc.sink.requests``: whoever else
touches a sink's letters takes that row first and counts it up. The pipeline sees the new number within seconds and
looks anew, and in between stores nothing behind a letter on the strength of an old look (:meth:`Letters.park`).

The pipeline keeps the keys that wait in memory, not the letters: a million letters of few keys cost what the keys do.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError

from cdc.connection import Connection
from cdc.errors import CdcError, Fenced
from cdc.event import Event, join_object, quote, split_object
from cdc.lanes import Held, Table, reach
from cdc.options import like
from cdc.sql import QUERIES

PATIENCE = 600.0
"""Seconds for a look at all letters of a sink; there may be millions."""
WAITS = "waits for an earlier event of its key, which could not be delivered"
NO_EVENT = "not a valid event"
"""How the reason of an outbox row begins that is none; see :class:`cdc.outbox.Unreadable`."""


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter, as a replay comes by it.

    Attributes:
        version: another one once anybody has changed it.
        text: its event in the native format; None: it is not to be delivered.
    """

    id: int
    version: str
    seq: int
    table: Table
    keys: tuple[str, ...]
    parked: bool
    text: str | None


class Letters:
    """The dead letters of one sink, for the pipeline that serves it. Belongs to the thread of its connection.

    Attributes:
        held: what waits behind a parked letter.
        looks: how often we have looked at the letters.
        requests: how often somebody else had touched them at the last look.
        replaying: whether any was to be delivered then.
        newest: the last letter there was then.
    """

    def __init__(self, connection: Connection, *, database: str, sink: str, epoch: int) -> None:
        self._connection = connection
        self._database = database
        self._sink = sink
        self._epoch = epoch
        self.held = Held()
        self.looks = 0
        self.requests = 0
        self.replaying = False
        self.newest = 0

    def look(self) -> None:
        """Read anew what waits and what is to be replayed.

        Raises:
            Fenced: another daemon has taken over.
            DatabaseError: see :meth:`cdc.connection.Connection.query`.
        """
        # The number first: a request that comes between the two is found by the next look.
        rows = self._connection.query(QUERIES["letters"], self._ours(), deadline=PATIENCE)
        if not rows:
            raise self._fenced()
        [(self.requests, self.replaying, self.newest)] = rows
        self.looks += 1
        self.held = Held()
        for schema, table, key in self._connection.query(
            QUERIES["parked_keys"], {"sink": self._sink}, deadline=PATIENCE
        ):
            self.held.add_reach((self._database, schema, table), () if key is None else (key,))

    def set_aside(self, event: Event, reason: str, *, park: bool) -> None:
        """Store an event that can never be delivered; with `park`, let its keys wait. Raises as :meth:`look`."""
        (_, schema, table), keys = reach(event)
        self._store(
            {
                "event_id": event.id,
                "event": event.to_json(),
                "reason": reason,
                "seq": event.source.seq,
                "schema": schema,
                "table": table,
                "keys": sorted(keys),
                "parked": park,
            }
        )
        if park:
            self.held.add(event)

    def set_text_aside(self, event_id: str, seq: int, text: str, reason: str) -> None:
        """Store what is no event. It has no key that others could wait behind. Raises as :meth:`look`."""
        self._store(
            {
                "event_id": event_id,
                "event": text,
                "reason": reason,
                "seq": seq,
                "schema": None,
                "table": None,
                "keys": [],
                "parked": False,
            }
        )

    def park(self, events: Sequence[Event]) -> bool:
        """Store events that only wait behind what is held; while letters are replayed, they are to follow.

        Returns:
            False, and nothing is stored, when somebody has touched the letters since the last look.

        Raises:
            DatabaseError: see :meth:`cdc.connection.Connection.query`.
        """
        reaches = [reach(event) for event in events]
        parameters: dict[str, object] = {
            **self._ours(),
            "requests": self.requests,
            "wanted": self.replaying,
            "reason": WAITS,
            "event_ids": [event.id for event in events],
            "texts": [event.to_json() for event in events],
            "seqs": [event.source.seq for event in events],
            "schemas": [event.source.schema_name for event in events],
            "tables": [event.source.table for event in events],
            "key_lists": [json.dumps(sorted(keys)) for _, keys in reaches],
        }
        return bool(self._connection.query(QUERIES["park"], parameters))

    def page(self, *, after: tuple[int, int], events: int, bytes_: int) -> list[Letter]:
        """The next letters a replay comes by: those to be delivered, and parked ones between them.

        Args:
            after: seq and id of the letter before.
            events: at most so many letters.
            bytes_: roughly so many bytes of events; a single larger one still comes, alone.
        """
        parameters: dict[str, object] = {
            "sink": self._sink,
            "after_seq": after[0],
            "after_id": after[1],
            "events": events,
            "bytes": bytes_,
        }
        return [
            Letter(id_, version, seq, (self._database, schema or "", table or ""), tuple(keys), parked, text)
            for id_, version, seq, schema, table, keys, parked, text in self._connection.query(
                QUERIES["next_letters"], parameters, deadline=PATIENCE
            )
        ]

    def remove(self, letters: Sequence[Letter]) -> None:
        """Letters that are delivered; one that was edited since it was read stays, to be delivered as it is now."""
        versions = {"ids": [letter.id for letter in letters], "versions": [letter.version for letter in letters]}
        self._connection.query(QUERIES["remove_letters"], {**self._ours(), **versions})

    def keep(self, letter: Letter, reason: str) -> None:
        """A letter that was refused once more, if it is still the one that was."""
        parameters: dict[str, object] = {"id": letter.id, "version": letter.version, "reason": reason}
        self._connection.query(QUERIES["keep_letter"], {**self._ours(), **parameters})

    def put_back(self, ids: Sequence[int]) -> None:
        """Letters that were asked for, and stay because an earlier one of their key does."""
        self._connection.query(QUERIES["put_letters_back"], {**self._ours(), "ids": list(ids)})

    def _store(self, letter: dict[str, object]) -> None:
        if not self._connection.query(QUERIES["set_aside"], {**self._ours(), **letter}):
            raise self._fenced()

    def _ours(self) -> dict[str, object]:
        return {"sink": self._sink, "epoch": self._epoch}

    def _fenced(self) -> Fenced:
        return Fenced(f"sink {self._sink} is served by another daemon")


# -- for people -------------------------------------------------------------------------------------------------

PAGE = 5000
"""How many letters are looked at, or changed in one transaction, at a time: a pipeline may wait for such a change."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters somebody means; None: any.

    Attributes:
        sink: name of the sink.
        event_ids: ids of the events.
        table: pattern as in the configuration, ``schema.table``.
        keys: how the key may be written in JSON; see :func:`key_texts`.
        reason: part of the reason, in any case.
        since, before: when they were set aside.
    """

    sink: str | None = None
    event_ids: tuple[str, ...] | None = None
    table: str | None = None
    keys: tuple[str, ...] | None = None
    reason: str | None = None
    since: datetime | None = None
    before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """One dead letter, as people see it.

    Attributes:
        op, schema, table: of its event; None where it is none.
        keys: the event's key as JSON, and where it was changed the one before.
        reason: why it was not delivered.
        attempts: how often that was tried; 0: it only waits.
        died_at: when it was set aside.
        parked: whether later events of its keys wait.
        wanted: whether it is to be delivered.
        text: the event, if it was asked for.
    """

    id: int
    sink: str
    event_id: str
    seq: int
    op: str | None
    schema: str | None
    table: str | None
    keys: tuple[str, ...]
    reason: str
    attempts: int
    died_at: datetime
    parked: bool
    wanted: bool
    text: str | None


@dataclass(frozen=True, slots=True)
class Left:
    """A letter that is still there."""

    id: int
    event_id: str
    wanted: bool
    reason: str


def find(
    connection: Connection, selection: Selection, *, whole: bool = False, most: int | None = None
) -> Iterator[Found]:
    """The dead letters of one database that are meant, by sink and in the order of their events.

    Args:
        whole: with their events.
        most: at most so many.

    Raises:
        ValueError: `table` is no pattern.
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    schema, table = (None, None) if selection.table is None else like(selection.table)
    parameters: dict[str, object] = {
        "sink": selection.sink,
        "event_ids": None if selection.event_ids is None else list(selection.event_ids),
        "schema": schema,
        "table": table,
        "keys": None if selection.keys is None else list(selection.keys),
        "reason": selection.reason,
        "since": selection.since,
        "before": selection.before,
        "whole": whole,
    }
    after: tuple[str, int, int] = ("", -1, -1)
    left = most
    while left is None or left > 0:
        limit = min(100 if whole else PAGE, PAGE if left is None else left)
        page = [
            Found(*row)
            for row in connection.query(
                QUERIES["dead_letters"],
                {**parameters, "after_sink": after[0], "after_seq": after[1], "after_id": after[2], "limit": limit},
                deadline=PATIENCE,
            )
        ]
        yield from page
        if len(page) < limit:
            return
        after = (page[-1].sink, page[-1].seq, page[-1].id)
        left = None if left is None else left - len(page)


def want(connection: Connection, sink: str, ids: Sequence[int]) -> int:
    """Ask for letters of a sink to be delivered, the first ones first. Raises as :func:`find`.

    Returns:
        How many of them are still there.
    """
    return _change(connection, "want_letters", sink, ids)


def discard(connection: Connection, sink: str, ids: Sequence[int]) -> int:
    """Delete letters of a sink; returns how many. Raises as :func:`find`."""
    return _change(connection, "discard_letters", sink, ids)


def rewrite(connection: Connection, sink: str, id_: int, event: Event) -> bool:
    """Put an edited event into a letter's place and ask for it to be delivered; False: the letter has gone.

    Raises as :func:`find`.
    """
    parameters: dict[str, object] = {"sink": sink, "id": id_, "event": event.to_json()}
    return bool(connection.query(_after_request("rewrite_letter"), parameters))


def left(connection: Connection, ids: Sequence[int]) -> list[Left]:
    """Those of the letters that are still there. Raises as :func:`find`."""
    found: list[Left] = []
    for start in range(0, len(ids), PAGE):
        rows = connection.query(QUERIES["letters_left"], {"ids": list(ids[start : start + PAGE])}, deadline=PATIENCE)
        found += [Left(*row) for row in rows]
    return found


def edited(before: str, after: str) -> Event:
    """An event somebody has edited.

    Args:
        before: the event as it was, in the native format.
        after: what has become of it.

    Raises:
        CdcError: it is no event, or no longer the same one: its id, source and key must stay.
    """
    try:
        original = Event.from_json(before)
    except ValueError:
        raise CdcError(f"{NO_EVENT}, and cannot be replayed (discard it)") from None
    try:
        event = Event.from_json(after)
    except ValueError as error:
        raise CdcError(f"not an event: {_what_is_wrong(error)}") from None
    for name in ("id", "source", "key"):
        if getattr(event, name) != getattr(original, name):
            raise CdcError(
                f"{name} was changed (it must stay: receivers know the event by it, and its order depends on it)"
            )
    return event


def key_texts(text: str) -> tuple[str, ...]:
    """How a key may be written in the outbox.

    Args:
        text: ``COLUMN=VALUE``, or the key as a JSON object, its columns in any order.

    Raises:
        ValueError: it is neither.
    """
    if not text.lstrip().startswith("{"):
        column, equals, value = text.partition("=")
        if not equals or not column:
            raise ValueError('not a key (write COLUMN=VALUE, or JSON such as {"id": 42})')
        return tuple(join_object({column: written}) for written in (value, quote(value)) if _is_json(written))
    members = {name: quote(json.loads(raw)) if raw.startswith('"') else raw for name, raw in split_object(text).items()}
    if len(members) > 4:
        return (join_object(members),)  # in the order they have there
    return tuple(join_object(dict(order)) for order in itertools.permutations(members.items()))


def _change(connection: Connection, query: str, sink: str, ids: Sequence[int]) -> int:
    changed = 0
    for start in range(0, len(ids), PAGE):
        parameters: dict[str, object] = {"sink": sink, "ids": list(ids[start : start + PAGE])}
        changed += len(connection.query(_after_request(query), parameters, deadline=PATIENCE))
    return changed


def _after_request(query: str) -> str:
    return f"{QUERIES['request']};\n{QUERIES[query]}"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _what_is_wrong(error: ValueError) -> str:
    """A few words on why a text is no event."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return str(error)
