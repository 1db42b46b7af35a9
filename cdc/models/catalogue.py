"""What the catalogue knows of the captured tables: columns as they reach an event, and the types these are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cdc.connection import Connection
from cdc.errors import CdcError
from cdc.options import matches
from cdc.sql import QUERIES

Kind = Literal["domain", "array", "composite", "hstore", "cast", "enum", "other"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table, or an attribute of a composite type.

    Attributes:
        name: as in the event.
        type: oid of its type.
        written: the type as PostgreSQL writes it, with its modifiers; qualified or not, as the session's path has it.
        nullable: whether the event may hold null.
        hidden: how `mask` hides it.
        comment: what COMMENT ON COLUMN says.
    """

    name: str
    type: int
    written: str
    nullable: bool = True
    hidden: Literal["hash", "redact"] | None = None
    comment: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A captured table.

    Attributes:
        schema, name: what its events call it.
        key: the names of the columns that identify a row.
        comment: what COMMENT ON TABLE says.
    """

    schema: str
    name: str
    image: Literal["diff", "full"]
    key: Sequence[str]
    columns: Sequence[Column]
    comment: str | None

    def __str__(self) -> str:
        return qualified(self.schema, self.name)


@dataclass(frozen=True, slots=True)
class Type:
    """A type.

    Attributes:
        kind: how to_json treats it; ``cast``: by a cast to json that somebody has defined.
        of: oid of a domain's base type or an array's element type.
        labels: of an enum.
        attributes: of a composite.
        comment: what COMMENT ON TYPE says.
    """

    schema: str
    name: str
    kind: Kind
    of: int
    labels: Sequence[str]
    attributes: Sequence[Column]
    comment: str | None


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All that models are made of.

    Attributes:
        tables: by schema and name.
        types: oid → type, everything the columns lead to.
    """

    tables: Sequence[Table]
    types: Mapping[int, Type]

    def base(self, oid: int) -> Type:
        """A type, seen through any domains."""
        found = self.types[oid]
        while found.kind == "domain":
            found = self.types[found.of]
        return found

    def written(self, column: Column) -> str:
        """A column's type as SQL has it, the same whatever the session's search path is."""
        found, suffix = self.types[column.type], ""
        if found.kind == "array" and self.types[found.of].schema != "pg_catalog":
            found, suffix = self.types[found.of], "[]"
        return column.written if found.schema == "pg_catalog" else qualified(found.schema, found.name) + suffix


def qualified(schema: str, name: str) -> str:
    """``schema.name``, with SQL's quotes where a part needs them."""
    parts = (
        part if re.fullmatch(r"[a-z_][a-z0-9_$]*", part) else '"' + part.replace('"', '""') + '"'
        for part in (schema, name)
    )
    return ".".join(parts)


def read(connection: Connection, patterns: Sequence[str] = ()) -> Catalogue:
    """What the catalogue knows of the captured tables.

    Args:
        connection: to a database with schema cdc.
        patterns: of the tables that matter; none: all.

    Raises:
        CdcError: no table is captured, or none that a pattern means.
        DatabaseError: see :meth:`cdc.connection.Connection.query`.
    """
    captured = connection.query(QUERIES["captured_as"])
    if not captured:
        raise CdcError("no table is captured in this database (run cdc migrate)")
    if lost := [pattern for pattern in patterns if not any(matches(pattern, row[2], row[3]) for row in captured)]:
        known = ", ".join(qualified(row[2], row[3]) for row in captured)
        raise CdcError(f"no captured table is {' or '.join(lost)} (captured: {known})")
    captured = [row for row in captured if not patterns or any(matches(p, row[2], row[3]) for p in patterns)]
    columns: dict[int, list[Column]] = {}
    parameters: dict[str, object] = {
        "relations": [row[0] for row in captured],
        "captures": [row[1] for row in captured],
    }
    for relation, *column in connection.query(QUERIES["captured_columns"], parameters):
        columns.setdefault(relation, []).append(Column(*column))
    tables = [
        Table(schema, name, image, key or (), columns.get(relation, ()), comment)
        for relation, _, schema, name, image, key, comment in captured
    ]
    wanted = sorted({column.type for table in tables for column in table.columns})
    types = {
        oid: Type(schema, name, kind, of, labels, [Column(*attribute) for attribute in attributes], comment)
        for oid, schema, name, kind, of, labels, attributes, comment in connection.query(
            QUERIES["types_within"], {"types": wanted}
        )
    }
    return Catalogue(sorted(tables, key=lambda table: (table.schema, table.name)), types)
