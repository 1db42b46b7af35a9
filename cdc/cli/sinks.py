"""cdc sinks: what can be done to a sink's position."""

from __future__ import annotations

import sys

import click

from cdc import outbox
from cdc.cli.app import App, pass_app
from cdc.connection import Connection
from cdc.errors import CdcError, ConfigError


@click.group()
def sinks() -> None:
    """Manage the positions of sinks."""


@sinks.command()
@click.argument("sink")
@click.option("-d", "--database", "names", multiple=True, metavar="DB", help="Only this one; may be repeated.")
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
