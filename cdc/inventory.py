"""What a database has of us, held against the configuration: the revision, the functions, the triggers.

It only looks; what makes the two equal is :mod:`cdc.installer`. The daemon looks at every start and now and then, and
so nothing here needs Alembic, which takes longer to import than all the rest of the daemon.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cdc.config import Config, DatabaseConfig, TableConfig
from cdc.connection import Connection
from cdc.errors import DatabaseError, InstallError, NotInstalled
from cdc.options import is_glob, split
from cdc.sql import QUERIES

# -- the schema -------------------------------------------------------------------------------------------------


def migrations_directory() -> Path:
    """Where the revisions are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def head() -> str:
    """The revision this program works with."""
    return max(script.name.partition("_")[0] for script in (migrations_directory() / "versions").glob("[0-9]*_*.py"))


def installed_revision(connection: Connection) -> str | None:
    """The revision of schema cdc in this database, None without one. Raises as Connection.query."""
    try:
        rows = connection.query(QUERIES["revision"])
    except NotInstalled:
        return None
    return str(rows[0][0]) if rows else None


def replaced_functions(connection: Connection) -> list[str]:
    """Functions of schema cdc that are not what the revisions have made. Raises as Connection.query."""
    try:
        return [row[0] for row in connection.query(QUERIES["replaced_functions"])]
    except NotInstalled:  # or of a revision that does not keep account of them
        return []


# -- triggers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """A table the configuration wants captured."""

    oid: int
    schema: str
    table: str
    options: TableConfig

    @property
    def name(self) -> str:
        return f"{self.schema}.{self.table}"


def resolve(candidates: Iterable[tuple[Any, ...]], database: DatabaseConfig) -> list[Target]:
    """The tables the configuration's patterns stand for.

    Args:
        candidates: what there is, from the query ``candidate_tables``.
        database: the configuration.

    Raises:
        InstallError: names that are not there, all of them.
    """
    found = {(schema, table): (oid, plain) for oid, schema, table, plain in candidates}
    missing = [p for p in database.tables if not is_glob(p) and split(p) not in found]
    if missing:
        raise InstallError(
            "; ".join(f"{pattern}: no such table" for pattern in missing) + " (correct `tables`, or create it first)"
        )
    targets = []
    for (schema, table), (oid, plain) in found.items():
        options = database.options_for(schema, table)
        named = any(not is_glob(p) and split(p) == (schema, table) for p in database.tables)
        # A glob means ordinary tables; naming anything else is for cdc.capture_plan to refuse, with the reason.
        if options is not None and (plain or named):
            targets.append(Target(oid, schema, table, options))
    return sorted(targets, key=lambda target: target.name)


def arguments(target: Target, database: DatabaseConfig) -> dict[str, object]:
    """What the queries about a table's triggers ask for."""
    options = target.options
    return {
        "relation": target.oid,
        "ops": list(options.ops),
        "image": options.image,
        "key": list(options.key) if options.key else None,
        "always": options.always,
        # Where the notification is the event, the trigger rings whatever the bell's mode.
        "notify": "ephemeral" if options.delivery == "ephemeral" else database.notify,
        "notify_payload": database.notify_payload,
        "channel": database.channel,
        "exclude": list(options.exclude),
        "mask": json.dumps(options.mask),
        "conditions": json.dumps(options.when),
        # What a glob says is meant for many tables, some of which do not have the column.
        "lenient": not database.names(target.schema, target.table),
    }


def capture_state(connection: Connection, target: Target, database: DatabaseConfig) -> str:
    """Whether a table's triggers are what the configuration says: ``installed``, ``outdated`` or ``missing``.

    Raises:
        DatabaseError: it cannot be captured so; or see :meth:`cdc.connection.Connection.query`.
    """
    return str(connection.query(QUERIES["capture_state"], arguments(target, database))[0][0])


@dataclass(frozen=True, slots=True)
class Drift:
    """A table whose triggers are not what the configuration says."""

    table: str
    state: Literal["missing", "outdated", "unmanaged"]


def find_drift(connection: Connection, database: DatabaseConfig) -> list[Drift]:
    """Where the triggers of a database differ from the configuration; takes no lock, changes nothing.

    Raises:
        InstallError: a table that is not there, or that cannot be captured.
        DatabaseError: as Connection.query.
    """
    targets = resolve(connection.query(QUERIES["candidate_tables"]), database)
    drifts = []
    for target in targets:
        try:
            state = capture_state(connection, target, database)
        except DatabaseError as error:
            raise InstallError(str(error)) from None
        if state != "installed":
            drifts.append(Drift(target.name, "missing" if state == "missing" else "outdated"))
    wanted = {target.oid for target in targets}
    drifts += [
        Drift(f"{schema}.{table}", "unmanaged")
        for relation, schema, table in connection.query(QUERIES["captured"])
        if relation not in wanted
    ]
    return drifts


def sinks_of(config: Config, database: str) -> dict[str, str]:
    """The sinks fed from a database, with where each starts."""
    return {
        name: options.start
        for name, options in config.sinks.items()
        if options.databases is None or database in options.databases
    }
