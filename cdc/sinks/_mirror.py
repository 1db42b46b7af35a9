"""Tables that follow tables: what a batch of events makes of each row, written in a few statements.

**Net changes.** All of a batch becomes visible at once, so only the end counts. Per table and key the events are
merged, in order, into one of three things: the whole row (after an insert, a read, or an update that shows all of it),
some columns of a row that is there (after an update that shows what changed), or no row. Then each table is written by
one statement per kind and set of columns: deletes first (what is deleted may hold a unique value that is inserted),
then whole rows, then parts of rows; tables that refer to others after those, and, for deletes, before. An update that
changes a key is written by itself, after what came before it in its table; a truncate after all that came before it,
together with those that follow it directly, for a table others refer to is truncated only with them.

**One by one.** Where that fails (a foreign key wants another order, a value is refused) the sink writes every event by
itself, in the order of the source, and learns which one it was: see ``postgres.py``.

**Rows that are not there.** An insert or read replaces what has its key; a delete of nothing is done. An update under
``image: diff`` does not carry the whole row, so without one to apply it to it is refused (``missing_row``).

Columns: what is generated always in the target is left out; identity columns take the source's values, those that are
generated always only when their row is made: no update may give them one. A column that the target lacks stops the sink
until it is there, because dead letters would have to be replayed row by row (``missing_column``). Columns that only the
target has keep their values, or get their defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal

from psycopg2 import sql

from cdc.errors import PermanentFailure, TransientFailure
from cdc.event import Event, Op, split_row
from cdc.sinks._values import Type, Types, array_literal

Name = tuple[str, str]
"""Schema and table."""
Row = dict[str, str]
"""Column → value as JSON text."""
Names = tuple[str, ...]
"""Of columns."""
Run = Callable[[str, Sequence[object]], list[tuple[Any, ...]]]
"""Runs a statement in the transaction of the batch."""
Quote = Callable[..., str]
"""``quote("public", "orders")``: a name in a statement; each ``%`` in it is doubled."""

_TABLE = """
with recursive
rel as (
  select c.oid from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
   where n.nspname = %s and c.relname = %s and c.relkind in ('r', 'p')),
col as (
  select a.* from rel join pg_catalog.pg_attribute a on a.attrelid = rel.oid and a.attnum > 0 and not a.attisdropped),
typ (oid) as (
  select atttypid from col
  union
  select part.oid
    from typ join pg_catalog.pg_type t on t.oid = typ.oid
   cross join lateral (
     select t.typbasetype where t.typtype = 'd'
     union all
     select t.typelem where t.typsubscript = 'pg_catalog.array_subscript_handler'::regproc
     union all
     select a.atttypid from pg_catalog.pg_attribute a
      where t.typtype = 'c' and a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped) part (oid))
select rel.oid::bigint,
       (select json_agg(json_build_array(attname, atttypid::bigint, attgenerated <> '', attidentity = 'a')
                        order by attnum)
          from col),
       (select json_agg(keys.names)
          from pg_catalog.pg_index i
         cross join lateral (
           select json_agg(col.attname) from unnest(i.indkey[:i.indnkeyatts - 1]) k (num) join col on col.attnum = k.num
         ) keys (names)
         where i.indrelid = rel.oid and i.indisunique and i.indimmediate and i.indisvalid
           and i.indpred is null and i.indexprs is null),
       (select json_agg(distinct confrelid::bigint) from pg_catalog.pg_constraint
         where conrelid = rel.oid and contype = 'f' and conparentid = 0 and confrelid <> rel.oid),
       (select json_agg(json_build_array(
                 t.oid::bigint, n.nspname, t.typname, an.nspname, at.typname, t.typtype, t.typbasetype::bigint,
                 case when t.typsubscript = 'pg_catalog.array_subscript_handler'::regproc
                      then t.typelem::bigint else 0 end,
                 t.typdelim,
                 (select json_agg(json_build_array(a.attname, a.atttypid::bigint) order by a.attnum)
                    from pg_catalog.pg_attribute a
                   where t.typtype = 'c' and a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped)))
          from typ join pg_catalog.pg_type t on t.oid = typ.oid join pg_catalog.pg_namespace n on n.oid = t.typnamespace
          left join pg_catalog.pg_type at on at.oid = t.typarray
          left join pg_catalog.pg_namespace an on an.oid = at.typnamespace)
       , exists (select from pg_catalog.pg_trigger where tgrelid = rel.oid and tgname like '00\\_cdc\\_%%')
  from rel
"""


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the target.

    Attributes:
        generated: the server computes it.
        always: its identity may be given in an insert (overriding), and never changed.
    """

    name: str
    type: int
    generated: bool
    always: bool


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the target, as its catalogue tells it.

    Attributes:
        oid: of the table.
        columns: by name, in the table's order.
        keys: sets of columns that a unique index holds to one row.
        refers_to: oids of tables its foreign keys lead to.
        captured: whether changes of it are events.
    """

    name: Name
    oid: int
    columns: Mapping[str, _Column]
    keys: frozenset[frozenset[str]]
    refers_to: frozenset[int]
    types: Types
    captured: bool

    def __str__(self) -> str:
        return ".".join(self.name)

    def is_covered_by(self, row: Row) -> bool:
        """Whether a row has a value for every column."""
        return all(name in row or column.generated for name, column in self.columns.items())


class Catalogue:
    """The tables of the target, looked up when they are first met, and forgotten when something fails."""

    def __init__(self, check: Callable[[Table], None]) -> None:
        """
        Args:
            check: raises where a table must not be written to.
        """
        self._check = check
        self._tables: dict[Name, Table] = {}

    def clear(self) -> None:
        """Forget: somebody may have changed a table."""
        self._tables.clear()

    def table(self, name: Name, run: Run) -> Table:
        """A table.

        Raises:
            TransientFailure: the target has none of that name; somebody may make it.
        """
        found = self._tables.get(name)
        if found is None:
            found = _look_up(name, run)
            self._check(found)
            self._tables[name] = found
        return found


def _look_up(name: Name, run: Run) -> Table:
    rows = run(_TABLE, name)
    if not rows:
        raise TransientFailure(
            f"the target has no table {'.'.join(name)}, or this role may not see it (create it, with the columns and "
            "the primary key of the source: pg_dump --schema-only; or leave it out with tables)"
        )
    oid, columns, keys, references, types, captured = rows[0]
    return Table(
        name=name,
        oid=oid,
        columns={each[0]: _Column(*each) for each in columns or ()},
        keys=frozenset(frozenset(names) for names in keys or ()),
        refers_to=frozenset(references or ()),
        types=Types(
            {
                number: Type(
                    schema, type_, (where, array) if array else None, kind, base, element, delimiter, dict(parts or ())
                )
                for number, schema, type_, where, array, kind, base, element, delimiter, parts in types or ()
            }
        ),
        captured=captured,
    )


@dataclass(slots=True)
class _Net:
    """What a batch makes of one row.

    Attributes:
        kind: the whole row, some columns of it, or none.
        names: of the columns of its key.
        row: columns, those of the key included.
        anew: the row that was there is deleted first.
    """

    kind: Literal["whole", "part", "none"]
    names: tuple[str, ...]
    row: Row
    anew: bool = False


@dataclass(slots=True)
class _Changes:
    """What a batch makes of one table, as far as it is not written yet.

    Attributes:
        by_key: columns and values of a key → what becomes of its row.
        appended: rows without a key.
    """

    table: Table
    by_key: dict[tuple[str, ...], _Net] = field(default_factory=dict)
    appended: list[Row] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what is written."""
        self.by_key.clear()
        self.appended.clear()


class Mirror:
    """Writes events into tables, within a transaction that somebody else begins and ends."""

    def __init__(
        self,
        quote: Quote,
        run: Run,
        catalogue: Catalogue,
        *,
        table_of: Callable[[Event], Name],
        truncate: bool,
        missing_row: Literal["fail", "ignore"],
        missing_column: Literal["wait", "ignore"],
    ) -> None:
        """
        Args:
            quote, run: how to name and reach things in the target.
            catalogue: its tables.
            table_of: which of them an event goes to.
            truncate: whether to follow a TRUNCATE.
            missing_row, missing_column: see the head of this module.
        """
        self._quote = quote
        self._run = run
        self._catalogue = catalogue
        self._table_of = table_of
        self._truncate = truncate
        self._missing_row = missing_row
        self._missing_column = missing_column
        self._pending: dict[Name, _Changes] = {}
        self.ignored = 0
        """Updates left out because their row is not there."""

    def write(self, events: Sequence[Event]) -> None:
        """Write events, given in the order of the source.

        Raises:
            TransientFailure: the target lacks a table, a column or an index.
            PermanentFailure: one of them cannot be written; the transaction has to be given up, as after the next.
            DatabaseError: the target refuses.
        """
        truncated: dict[Name, Table] = {}
        for event in events:
            if event.op is Op.TRUNCATE:
                if self._truncate:
                    name = self._table_of(event)
                    truncated[name] = self._catalogue.table(name, self._run)
                continue
            if truncated:
                self._truncate_all(truncated)
                truncated = {}
            try:
                self._take(event)
            except ValueError:
                raise PermanentFailure("its row is not the JSON it should be") from None
        if truncated:
            self._truncate_all(truncated)
        self._flush(self._pending.values())
        self._pending.clear()

    # -- from events to net changes -----------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        name = self._table_of(event)
        changes = self._pending.get(name)
        if changes is None:
            changes = self._pending[name] = _Changes(self._catalogue.table(name, self._run))
        table = changes.table
        if event.truncated and event.op is not Op.DELETE:
            raise PermanentFailure("the row was too large for its event (copy it by hand)")
        shown = {} if event.after is None else split_row(event.after.raw)
        after = self._known(table, shown)
        if event.key is None:
            if event.op not in (Op.INSERT, Op.READ):
                raise PermanentFailure(
                    f"no row of {table} can be found without a key (name one by key: in the table's capture)"
                )
            changes.appended.append(after)
            return
        key_row = split_row(event.key.raw)
        names = tuple(key_row)
        self._check_key(table, key_row)
        key = (*names, *key_row.values())
        known = changes.by_key.get(key)
        anew = known is not None and (known.kind == "none" or known.anew)
        if event.op is Op.DELETE:
            changes.by_key[key] = _Net("none", names, key_row)
            return
        if event.op is not Op.UPDATE:
            changes.by_key[key] = _Net("whole", names, key_row | after, anew)
            return
        # Under image: full it shows what has not changed, too.
        is_whole = len(shown) > len(event.changed or ()) or table.is_covered_by(key_row | after)
        old_key_row = key_row
        if event.before is not None:
            before = split_row(event.before.raw)
            old_key_row = {column: before.get(column, value) for column, value in key_row.items()}
        if old_key_row != key_row:
            self._flush([changes])
            changes.clear()
            self._move(table, old_key_row, key_row | after, is_whole=is_whole)
        elif is_whole and (known is None or known.kind != "none"):
            changes.by_key[key] = _Net("whole", names, key_row | after, anew)
        elif known is None:
            changes.by_key[key] = _Net("part", names, key_row | after)
        elif known.kind == "none":
            self._is_missing(table, 1)
        else:
            known.row.update(after)

    def _check_key(self, table: Table, key_row: Row) -> None:
        if frozenset(key_row) not in table.keys:
            raise TransientFailure(
                f"{table} has no primary key or unique index on ({', '.join(key_row)}), by which its rows are found "
                "(create one)"
            )
        if "null" in key_row.values():
            raise PermanentFailure(f"no row of {table} can be found by a key that is null")

    def _known(self, table: Table, row: Row) -> Row:
        """Of a row, what the target takes."""
        columns = table.columns
        unknown = [name for name in row if name not in columns]
        if unknown and self._missing_column == "wait":
            raise TransientFailure(
                f"{table} of the target has no column {unknown[0]} (add it; or exclude it in the table's capture; or "
                "set missing_column: ignore)"
            )
        return {name: value for name, value in row.items() if name in columns and not columns[name].generated}

    def _is_missing(self, table: Table, count: int) -> None:
        if count and self._missing_row == "fail":
            raise PermanentFailure(
                f"{table} of the target has no row with that key, and the update shows only what changed (copy the "
                "rows that were there before the sink began, or capture it with image: full, or set missing_row: "
                "ignore)"
            )
        self.ignored += count

    # -- from net changes to statements -------------------------------------------------------------------------

    def _flush(self, pending: Iterable[_Changes]) -> None:
        ordered = _by_reference([changes for changes in pending if changes.by_key or changes.appended])
        for changes in reversed(ordered):
            for names, rows in _grouped(changes, lambda net: net.kind == "none" or net.anew, key_only=True):
                self._delete(changes.table, names, rows)
        for changes in ordered:
            for names, rows in _grouped(changes, lambda net: net.kind == "whole"):
                self._upsert(changes.table, names, rows)
            for rows in _alike(changes.appended):
                self._insert(changes.table, rows)
        for changes in ordered:
            for names, rows in _grouped(changes, lambda net: net.kind == "part"):
                self._update(changes.table, names, rows)

    def _delete(self, table: Table, names: Names, rows: list[Row]) -> None:
        r = self._rows(table, rows, names)
        self._run(f"delete from {self._quote(*table.name)} t using {r.sql} where {self._is(r, names)}", r.values)

    def _insert(self, table: Table, rows: list[Row], conflict: str = "") -> None:
        into = f"insert into {self._quote(*table.name)} as t"
        if not rows[0]:
            for _ in rows:
                self._run(f"{into} default values", ())
            return
        r = self._rows(table, rows, tuple(rows[0]))
        columns = ", ".join(self._quote(name) for name in rows[0])
        values = ", ".join(r.column.values())
        self._run(f"{into} ({columns}) overriding system value select {values} from {r.sql} {conflict}", r.values)

    def _upsert(self, table: Table, names: Names, rows: list[Row]) -> None:
        changed = [name for name in rows[0] if name not in names and not table.columns[name].always]
        assigned = ", ".join(f"{self._quote(name)} = excluded.{self._quote(name)}" for name in changed)
        on = ", ".join(self._quote(name) for name in names)
        self._insert(table, rows, f"on conflict ({on}) do {f'update set {assigned}' if assigned else 'nothing'}")

    def _update(self, table: Table, names: Names, rows: list[Row]) -> None:
        r = self._rows(table, rows, tuple(rows[0]))
        assigned = self._assigned(r, [name for name in rows[0] if name not in names and not table.columns[name].always])
        target = f"{self._quote(*table.name)} t"
        statement = f"update {target} set {assigned} from {r.sql}" if assigned else f"select 1 from {target}, {r.sql}"
        returning = "returning 1" if assigned else ""
        found = self._run(f"{statement} where {self._is(r, names)} {returning}", r.values)
        self._is_missing(table, len(rows) - len(found))

    def _move(self, table: Table, old: Row, new: Row, *, is_whole: bool) -> None:
        """An update that changes the key. If the row is there under its new key only, this was done before."""
        names, target = tuple(old), f"{self._quote(*table.name)} t"
        o, n = self._rows(table, [old], names, "o"), self._rows(table, [new], names, "n")
        # Keys that differ as text may be equal to the target: 1.0 and 1.00.
        differs = " or ".join(f"{o.column[name]} <> {n.column[name]}" for name in names)
        self._run(
            f"delete from {target} using {o.sql}, {n.sql} where {self._is(n, names)} and ({differs}) "
            f"and exists (select from {target} where {self._is(o, names)})",
            (*o.values, *n.values),
        )
        n = self._rows(table, [new], tuple(new), "n")
        # A key that is generated always cannot be changed; were it left out, the row would keep it without a word.
        changed = [name for name in new if not table.columns[name].always or old.get(name, new[name]) != new[name]]
        moved = self._run(
            f"update {target} set {self._assigned(n, changed)} from {o.sql}, {n.sql} where {self._is(o, names)} "
            "returning 1",
            (*o.values, *n.values),
        )
        if not moved:
            (self._upsert if is_whole else self._update)(table, names, [new])

    def _truncate_all(self, tables: Mapping[Name, Table]) -> None:
        for name in tables:
            self._pending.pop(name, None)
        self._flush(self._pending.values())
        self._pending.clear()
        self._run(f"truncate {', '.join(self._quote(*name) for name in tables)}", ())

    def _rows(self, table: Table, rows: list[Row], columns: Names, alias: str = "r") -> _Rows:
        """Rows as something to select from.

        Args:
            table: whose types they have.
            rows: each has all the columns.
            columns: those to be had.
            alias: what it is called in the statement.
        """
        arrays, casts, values = [], [], []
        for number, name in enumerate(columns):
            oid = table.columns[name].type
            type_, basic = table.types[oid], table.types.basic(oid)
            write = table.types.writer(oid)
            try:
                texts = [write(row[name]) for row in rows]
            except ValueError:
                raise PermanentFailure(f"a value of {table}.{name} is not what its type is written as") from None
            if type_.array is None or basic.element or basic.kind == "c":
                # An array of these would not come out of unnest() as it went in.
                arrays.append("%s::text[]")
                casts.append(f"c{number}::{self._quote(type_.schema, type_.name)}")
                values.append(array_literal(texts, ","))
            else:
                arrays.append(f"%s::{self._quote(*type_.array)}")
                casts.append(f"c{number}")
                values.append(array_literal(texts, type_.delimiter))
        named = ", ".join(f"c{number}" for number in range(len(columns)))
        return _Rows(
            f"(select {', '.join(casts)} from unnest({', '.join(arrays)}) as u ({named})) as {alias} ({named})",
            values,
            {name: f"{alias}.c{number}" for number, name in enumerate(columns)},
        )

    def _is(self, rows: _Rows, names: Names) -> str:
        return " and ".join(f"t.{self._quote(name)} = {rows.column[name]}" for name in names)

    def _assigned(self, rows: _Rows, names: Iterable[str]) -> str:
        return ", ".join(f"{self._quote(name)} = {rows.column[name]}" for name in names)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows in a statement.

    Attributes:
        sql: an item of FROM.
        values: its parameters.
        column: name → how it is referred to.
    """

    sql: str
    values: Sequence[object]
    column: Mapping[str, str]


def _by_reference(pending: list[_Changes]) -> list[_Changes]:
    """Tables after those they refer to; in a circle there is no such order, and any will do."""
    by_oid = {changes.table.oid: changes for changes in pending}
    graph = {oid: changes.table.refers_to & by_oid.keys() for oid, changes in by_oid.items()}
    try:
        return [by_oid[oid] for oid in TopologicalSorter(graph).static_order()]
    except CycleError:
        return pending


def _grouped(
    changes: _Changes, wanted: Callable[[_Net], bool], *, key_only: bool = False
) -> Iterator[tuple[Names, list[Row]]]:
    """Rows that one statement can write, with the names of their key columns."""
    groups: dict[tuple[Names, frozenset[str]], list[Row]] = {}
    for net in changes.by_key.values():
        if wanted(net):
            columns = net.names if key_only else net.row
            groups.setdefault((net.names, frozenset(columns)), []).append(net.row)
    for (names, _), rows in groups.items():
        yield names, rows


def _alike(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows that one statement can insert."""
    groups: dict[frozenset[str], list[Row]] = {}
    for row in rows:
        groups.setdefault(frozenset(row), []).append(row)
    yield from groups.values()


def quoter(context: Any) -> Quote:
    """How names are quoted for a session of psycopg2."""
    known: dict[tuple[str, ...], str] = {}

    def quote(*names: str) -> str:
        found = known.get(names)
        if found is None:
            found = known[names] = sql.Identifier(*names).as_string(context).replace("%", "%%")
        return found

    return quote
