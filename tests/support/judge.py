"""The judge of what was delivered.

:func:`check` knows what the writers committed and what stands in the tables in the end, and reads the file
the sink wrote. Its invariants, each with an error of its own:

========================  =============================================================================================
:class:`Altered`          an event delivered again has the same id and identical bytes
:class:`Lost`             every committed change is there
:class:`Phantom`          nothing is there that was not committed, and nothing twice under two ids
:class:`OutOfOrder`       first deliveries of a key, and of a table around a TRUNCATE, ascend by seq
:class:`BrokenChain`      each `before` is what the events until then had made of the row
:class:`NotTheSource`     the events, applied in order, give the source tables, column by column, as text
========================  =============================================================================================

Duplicates are no error: delivery is at least once. They are dropped by event id, the first one counts.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import psycopg2

from cdc.event import Event, Image, Op, join_object, split_object

Row = dict[str, str]
"""Column → value, as the JSON text PostgreSQL wrote."""
State = dict[str, dict[str, Row]]
"""Table → key as JSON text → row."""


class Fact(NamedTuple):
    """One change, told by what it wrote: an insert or update by its own mark, a delete by the one it removed."""

    table: str
    op: str
    mark: int


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the sink's file; the number counts from 1."""

    number: int
    text: str
    event: Event

    def __str__(self) -> str:
        return f"line {self.number}: {self.text if len(self.text) < 1000 else self.text[:1000] + '…'}"


@dataclass(frozen=True, slots=True)
class Stream:
    """What was delivered: the first delivery of each event, in order, and how many others there were."""

    first: list[Line]
    duplicates: int


class Violation(AssertionError):
    """An invariant does not hold."""

    def __init__(self, seed: object, what: str, *lines: Line | str | None) -> None:
        super().__init__("\n  ".join([f"{type(self).__name__}: {what} (seed {seed})", *map(str, filter(None, lines))]))


class Altered(Violation):
    """Delivered again, and different."""


class Lost(Violation):
    """Committed, and never delivered."""


class Phantom(Violation):
    """Delivered, and never committed; or one change as two events."""


class OutOfOrder(Violation):
    """A later change of a key was delivered before an earlier one."""


class BrokenChain(Violation):
    """An event does not fit what the events before it had made of its row."""


class NotTheSource(Violation):
    """The events, applied, give something else than the tables."""


def to_stream(texts: Iterable[str], seed: object = None) -> Stream:
    """Parse lines and drop the repeated ones. Raises Altered."""
    first: dict[str, Line] = {}
    duplicates = 0
    for number, text in enumerate(texts, 1):
        line = Line(number, text, Event.from_json(text))
        earlier = first.setdefault(line.event.id, line)
        if earlier is not line:
            duplicates += 1
            if earlier.text != text:
                raise Altered(seed, f"two events under one id {line.event.id}", earlier, line)
    return Stream(list(first.values()), duplicates)


def told(stream: Stream) -> Iterator[tuple[Fact | None, Line]]:
    """What each event says was changed; None if it does not say. A TRUNCATE has no mark: a table's n-th is the n-th."""
    truncated: Counter[str] = Counter()
    for line in stream.first:
        event = line.event
        table = event.source.table
        if event.op is Op.TRUNCATE:
            mark = truncated[table]
            truncated[table] += 1
        else:
            image = event.before if event.op is Op.DELETE else event.after
            if image is None or "mark" not in image:
                yield None, line
                continue
            mark = image["mark"]
        yield Fact(table, event.op.value, mark), line


def facts_of(stream: Stream, seed: object = None) -> dict[Fact, Line]:
    """What the events say was changed. Raises Phantom."""
    facts: dict[Fact, Line] = {}
    for fact, line in told(stream):
        if fact is None:
            raise Phantom(seed, "an event without the mark its writer made", line)
        if fact in facts:
            raise Phantom(seed, f"{fact} has two ids", facts[fact], line)
        facts[fact] = line
    return facts


def check_complete(stream: Stream, committed: Mapping[Fact, float], seed: object = None) -> None:
    """Raises Lost, Phantom."""
    facts = facts_of(stream, seed)
    if missing := [fact for fact in committed if fact not in facts]:
        raise Lost(seed, f"{len(missing)} of {len(committed)} committed changes, such as {missing[0]}")
    if extra := [fact for fact in facts if fact not in committed]:
        raise Phantom(seed, f"{len(extra)} changes nobody committed, such as {extra[0]}", facts[extra[0]])


def inversions(stream: Stream) -> Iterator[tuple[str, Line, Line]]:
    """First deliveries that come after a later one: of what, the later change, and the earlier one that came after."""
    latest: dict[tuple[str, str], Line] = {}  # by table and key
    newest: dict[str, Line] = {}  # by table
    truncated: dict[str, Line] = {}  # by table
    for line in stream.first:
        table = line.event.source.table
        around = f"around the TRUNCATE of {table}"
        before: list[tuple[str, Line | None]] = [(around, truncated.get(table))]
        if line.event.op is Op.TRUNCATE:
            before.append((around, newest.get(table)))
            truncated[table] = line
        else:
            for key in set(_keys(line.event)):
                before.append((f"{table} {key}", latest.get((table, key))))
                latest[table, key] = _later(latest.get((table, key)), line)
        newest[table] = _later(newest.get(table), line)
        for of, earlier in before:
            if earlier is not None and _later(earlier, line) is earlier:
                yield of, earlier, line
                break


def _later(line: Line | None, other: Line) -> Line:
    """The one with the higher seq; the first one if it is the same."""
    return other if line is None or line.event.source.seq < other.event.source.seq else line


def check_order(stream: Stream, seed: object = None) -> None:
    """Raises OutOfOrder."""
    for of, earlier, line in inversions(stream):
        raise OutOfOrder(seed, of, earlier, line)


def check_chain(stream: Stream, seed: object = None) -> State:
    """Apply every event to empty tables; returns what they then hold. Raises BrokenChain."""
    mirror = _Mirror(seed)
    for line in stream.first:
        mirror.apply(line)
    return mirror.tables


class _Mirror:
    """Tables made of events alone, each of which must fit what is there."""

    def __init__(self, seed: object) -> None:
        self.tables: State = {}
        self._seed = seed
        self._latest: dict[tuple[str, str], Line] = {}
        """By table and key: the event that touched the row last."""

    def apply(self, line: Line) -> None:
        event = line.event
        rows = self.tables.setdefault(event.source.table, {})
        match event.op:
            case Op.TRUNCATE:
                rows.clear()
            case Op.INSERT:
                self._insert(rows, line)
            case Op.UPDATE:
                self._update(rows, line)
            case Op.DELETE:
                self._delete(rows, line)
            case _:
                raise self._broken(line, "", f"{event.op.value} without a backfill")

    def _insert(self, rows: dict[str, Row], line: Line) -> None:
        _, key = _keys(line.event)
        if line.event.before is not None or key in rows:
            raise self._broken(line, key, "inserted, and already there")
        self._put(rows, line, key, _members(line.event.after))

    def _update(self, rows: dict[str, Row], line: Line) -> None:
        event = line.event
        old_key, key = _keys(event)
        before, after = _members(event.before), _members(event.after)
        row = self._take(rows, line, old_key)
        if list(before) != list(after):
            raise self._broken(line, old_key, "before and after tell of different columns")
        if event.changed != tuple(column for column in after if before[column] != after[column]):
            raise self._broken(line, old_key, "changed does not name what changed")
        if key in rows:
            raise self._broken(line, key, "moved to a key that is taken")
        self._put(rows, line, key, row | after)

    def _delete(self, rows: dict[str, Row], line: Line) -> None:
        key, _ = _keys(line.event)
        if self._take(rows, line, key) != _members(line.event.before) or line.event.after is not None:
            raise self._broken(line, key, "a delete tells the whole row, and nothing after it")

    def _take(self, rows: dict[str, Row], line: Line, key: str) -> Row:
        if key not in rows:
            raise self._broken(line, key, f"{line.event.op.value}d, and not there")
        row = rows[key]
        if wrong := sorted(column for column, value in _members(line.event.before).items() if row.get(column) != value):
            raise self._broken(line, key, f"before is not what was there: {', '.join(wrong)}")
        del rows[key]
        self._latest[line.event.source.table, key] = line
        return row

    def _put(self, rows: dict[str, Row], line: Line, key: str, row: Row) -> None:
        if join_object({column: row.get(column, "") for column in _members(line.event.key)}) != key:
            raise self._broken(line, key, "the key is not the row's")
        rows[key] = row
        self._latest[line.event.source.table, key] = line

    def _broken(self, line: Line, key: str, what: str) -> BrokenChain:
        table = line.event.source.table
        return BrokenChain(self._seed, f"{table} {key}: {what}", self._latest.get((table, key)), line)


def check_mirror(applied: State, source: State, seed: object = None) -> None:
    """Raises NotTheSource."""
    for table, rows in source.items():
        mirrored = applied.get(table, {})
        for key in sorted(rows.keys() | mirrored.keys()):
            if rows.get(key) != mirrored.get(key):
                raise NotTheSource(seed, f"{table} {key}", f"source: {rows.get(key)}", f"mirror: {mirrored.get(key)}")


def check(texts: Iterable[str], committed: Mapping[Fact, float], source: State, seed: object = None) -> Stream:
    """Every invariant at once; see the head of this module."""
    stream = to_stream(texts, seed)
    check_complete(stream, committed, seed)
    check_order(stream, seed)
    check_mirror(check_chain(stream, seed), source, seed)
    return stream


def read_source(dsn: str, tables: Mapping[str, tuple[str, ...]]) -> State:
    """What stands in the tables, as the contract says events show it.

    Args:
        dsn: where.
        tables: name → key columns.
    """
    source: State = {}
    with contextlib.closing(psycopg2.connect(dsn, options="-c timezone=UTC -c intervalstyle=postgres")) as conn:
        with conn.cursor() as cursor:
            for table, key_columns in tables.items():
                cursor.execute(f"select to_json(t)::text from {table} t")
                rows = (split_object(text) for (text,) in cursor)
                source[table] = {join_object({column: row[column] for column in key_columns}): row for row in rows}
    return source


def _members(image: Image | None) -> Row:
    return {} if image is None else split_object(image.raw)


def _keys(event: Event) -> tuple[str, str]:
    """The key before and after a change; the same one twice unless it was changed."""
    key = _members(event.key)
    before = _members(event.before)
    return join_object({column: before.get(column, value) for column, value in key.items()}), join_object(key)
