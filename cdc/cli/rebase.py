"""cdc rebase: new positions after a database was restored from a dump."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from cdc import outbox
from cdc.cli.app import App, Place, databases_option, pass_app
from cdc.cli.several import check_owner, each
from cdc.connection import Connection


@click.command()
@databases_option
@pass_app
def rebase(app: App, names: tuple[str, ...]) -> None:
    """Give the sinks of a database that was restored from a dump positions that mean something there.

    What a sink had not delivered when the dump was made, and everything recorded since the restore, is delivered; where
    that cannot be told, again. Writers of captured tables wait meanwhile. Uses migrate_dsn. A database whose positions
    are good is left alone.
    """
    selected = app.select(names)

    def do(name: str, place: Place) -> Iterator[str]:
        with Connection(place.migrate_dsn, purpose="rebase") as connection:
            check_owner(connection)
            moved = outbox.moved_sinks(connection)
            if not moved:
                yield f"{name}: the positions are good, nothing to do"
                return
            pending = outbox.rebase(connection)
        yield f"{name}: rebased {', '.join(moved)}; {pending} events are to be delivered"

    with app.places(selected) as places:
        sys.exit(each(places, selected, do))
