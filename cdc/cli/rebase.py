"""cdc rebase: new positions after a database was restored from a dump."""

from __future__ import annotations

import sys

import click

from cdc import outbox
from cdc.cli.app import App, pass_app
from cdc.connection import Connection
from cdc.errors import CdcError


@click.command()
@click.option("-d", "--database", "names", multiple=True, metavar="DB", help="Only this one; may be repeated.")
@pass_app
def rebase(app: App, names: tuple[str, ...]) -> None:
    """Give the sinks of a database that was restored from a dump positions that mean something there.

    What a sink had not delivered when the dump was made, and everything recorded since the restore, is delivered; where
    that cannot be told, again. Writers of captured tables wait meanwhile. Uses migrate_dsn. A database whose positions
    are good is left alone.
    """
    selected = app.select(names)
    failed = False
    with app.places(selected) as places:
        for name in selected:
            try:
                with Connection(places[name].migrate_dsn, purpose="rebase") as connection:
                    moved = outbox.moved_sinks(connection)
                    if not moved:
                        click.echo(f"{name}: the positions are good, nothing to do")
                        continue
                    pending = outbox.rebase(connection)
            except CdcError as error:
                click.echo(f"error: {name}: {error}", err=True)
                failed = True
                continue
            click.echo(f"{name}: rebased {', '.join(moved)}; {pending} events are to be delivered")
    sys.exit(1 if failed else 0)
