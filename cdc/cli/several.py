"""What commands do to several databases, one after the other; one that fails does not stop the others.

And how they are told of several tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import click

from cdc import inventory, outbox
from cdc.cli.app import App, Place
from cdc.cli.terminal import EXIT_FAILURE, EXIT_UNREACHABLE, lenient_stdout
from cdc.connection import Connection
from cdc.errors import CdcError, ConfigError, DatabaseUnreachable
from cdc.options import split
from cdc.sql import QUERIES


def table_patterns(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """The callback of a parameter that takes tables, written as in the configuration."""
    for pattern in value:
        try:
            split(pattern)
        except ValueError as error:
            raise click.BadParameter(f"{pattern}: {error}") from None
    return value


def check_owner(connection: Connection) -> None:
    """Raise CdcError if schema cdc is another role's, before functions of it are called by whoever migrates."""
    for owner, _, role, _ in connection.query(QUERIES["schema_cdc"]):
        if owner != role:
            raise CdcError(f"schema cdc belongs to {owner}, not to {role} (let migrate_dsn be the role that migrated)")


def check_sink(app: App, sink: str | None) -> None:
    """Raise ConfigError for a sink that the configuration does not name; None: whichever."""
    if sink is not None and sink not in app.config.sinks:
        raise ConfigError([f"no sink {sink} in the configuration (known: {', '.join(app.config.sinks)})"])


def fed_from(app: App, sink: str, names: tuple[str, ...]) -> list[str]:
    """The databases that are meant, of those a sink delivers from.

    Raises:
        ConfigError: there is none, or no such sink.
    """
    check_sink(app, sink)
    selected = [name for name in app.select(names) if sink in inventory.sinks_of(app.config, name)]
    if not selected:
        raise ConfigError([f"sink {sink} does not deliver from {', '.join(names)} (see its key databases)"])
    return selected


def each(places: Mapping[str, Place], names: Sequence[str], do: Callable[[str, Place], Iterable[str]]) -> int:
    """Do something in each database, and print what it says of it; returns the exit code of the worst.

    Args:
        do: gets a database's name and how to reach it; raises CdcError.
    """
    code = 0
    lenient_stdout()
    for name in names:
        try:
            for line in do(name, places[name]):
                click.echo(line)
        except CdcError as error:
            click.echo(f"error: {name}: {error}", err=True)
            code = max(code, EXIT_UNREACHABLE if isinstance(error, DatabaseUnreachable) else EXIT_FAILURE)
    return code


def ring(app: App, name: str, connection: Connection) -> None:
    """Let the daemon look soon, where it listens."""
    options = app.config.databases[name]
    if options.notify != "off":
        outbox.ring(connection, options.channel)
