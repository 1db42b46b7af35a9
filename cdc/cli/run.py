"""cdc run: the daemon."""

from __future__ import annotations

import os
import sys

import click

from cdc import crashpoints
from cdc.cli.app import App, pass_app
from cdc.cli.migrate import migrate_all
from cdc.cli.terminal import EXIT_FAILURE
from cdc.daemon import Daemon
from cdc.errors import CdcError


@click.command()
@click.option("--migrate", "first_migrate", is_flag=True, help="Make the databases equal to the YAML first.")
@click.option("--until-idle", is_flag=True, help="End once all that was committed before the start is delivered.")
@pass_app
def run(app: App, first_migrate: bool, until_idle: bool) -> None:
    """Deliver changes to the sinks until stopped.

    SIGTERM or SIGINT finishes and acknowledges what is in flight, within stop_timeout; a second one ends at once.
    """
    if spec := os.environ.get("CDC_CRASH_AT"):
        try:
            crashpoints.arm(spec)
        except ValueError as error:
            raise click.UsageError(f"CDC_CRASH_AT: {error}") from None
    validators = app.load_models()
    daemon = None
    try:
        with app.places() as places:
            if first_migrate and migrate_all(app, places, list(places), all_on_stderr=True):
                sys.exit(1)
            daemon = Daemon(app.config, {name: place.dsn for name, place in places.items()}, validators=validators)
            daemon.handle_signals()
            daemon.run(until_idle=until_idle)
    except CdcError as error:
        if daemon is None or not daemon.stuck:
            raise
        # A thread that hangs in somebody's library may keep Python from ending, and what it holds would not be missed.
        click.echo(f"error: {error}", err=True)
        os._exit(EXIT_FAILURE)
