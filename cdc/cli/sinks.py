"""cdc sinks: what can be done to a sink and its position."""

from __future__ import annotations

import sys

import click

from cdc import installer, outbox
from cdc.cli.app import App, pass_app
from cdc.cli.terminal import EXIT_FAILURE, EXIT_UNREACHABLE
from cdc.connection import Connection
from cdc.errors import CdcError, ConfigError, DatabaseUnreachable


@click.group()
def sinks() -> None:
    """Pause and resume sinks, and manage their positions."""


_databases = click.option(
    "-d", "--database", "names", multiple=True, metavar="DB", help="Only this one; may be repeated."
)


@sinks.command()
@click.argument("sink")
@_databases
@pass_app
def pause(app: App, sink: str, names: tuple[str, ...]) -> None:
    """Let SINK deliver nothing until it is resumed, whichever daemon serves it.

    What it has in hand is delivered; then the outbox keeps its events, over a restart too. Ephemeral changes are
    dropped.
    """
    _set_paused(app, sink, names, paused=True)


@sinks.command()
@click.argument("sink")
@_databases
@pass_app
def resume(app: App, sink: str, names: tuple[str, ...]) -> None:
    """Let SINK go on where it was paused."""
    _set_paused(app, sink, names, paused=False)


def _set_paused(app: App, sink: str, names: tuple[str, ...], *, paused: bool) -> None:
    if sink not in app.config.sinks:
        known = ", ".join(app.config.sinks)
        raise ConfigError([f"no sink {sink} in the configuration (known: {known})"])
    selected = [name for name in app.select(names) if sink in installer.sinks_of(app.config, name)]
    if not selected:
        raise ConfigError([f"sink {sink} does not deliver from {', '.join(names)} (see its key databases)"])
    code = 0
    with app.places(selected) as places:
        for name in selected:
            try:
                with Connection(places[name].dsn, purpose="pause" if paused else "resume") as connection:
                    if not outbox.set_paused(connection, sink, paused=paused):
                        raise CdcError(f"sink {sink} has no position yet (run cdc migrate)")
                    if app.config.databases[name].notify != "off":
                        outbox.ring(connection, app.config.databases[name].channel)
                    standing = outbox.attendance(connection, sink)
            except CdcError as error:
                click.echo(f"error: {name}: {error}", err=True)
                code = max(code, EXIT_UNREACHABLE if isinstance(error, DatabaseUnreachable) else EXIT_FAILURE)
                continue
            served = standing is not None and standing[0] is not None
            nobody = "" if served else " (no daemon serves it at the moment)"
            click.echo(f"{name}: sink {sink} is {'paused' if paused else 'resumed'}{nobody}")
    sys.exit(code)


@sinks.command()
@click.argument("sink")
@_databases
@click.option(
    "--dead-letters", is_flag=True, help="Discard the sink's dead letters too; without it they are in the way."
)
@pass_app
def forget(app: App, sink: str, names: tuple[str, ...], dead_letters: bool) -> None:
    """Remove the position of SINK, which the configuration no longer has.

    Until then the outbox keeps everything the sink has not delivered. Should it come back, it starts like a new one.
    """
    if sink in app.config.sinks:
        raise ConfigError([f"sink {sink} is in the configuration, and would start anew (remove it there first)"])
    selected = app.select(names)
    forgotten, failed = 0, False
    with app.places(selected) as places:
        for name in selected:
            try:
                with Connection(places[name].dsn, purpose="forget") as connection:
                    position = next((s for s in outbox.sink_statuses(connection) if s.name == sink), None)
                    if position is None:
                        continue
                    outbox.forget_sink(connection, sink, dead_letters=dead_letters)
            except CdcError as error:
                click.echo(f"error: {name}: {error}", err=True)
                failed = True
                continue
            forgotten += 1
            pending = f"{position.pending}{'+' if position.capped else ''}"
            click.echo(f"{name}: sink {sink} is forgotten, with {pending} pending events")
    if not forgotten and not failed:
        raise CdcError(f"no database has a position of sink {sink} (cdc status shows those there are)")
    sys.exit(1 if failed else 0)
