"""cdc uninstall: take everything away that `cdc migrate` has made."""

from __future__ import annotations

import sys

import click

from cdc import installer
from cdc.cli.app import App, Place, databases_option, pass_app
from cdc.cli.migrate import EXIT_INTERRUPTED, Fleet
from cdc.cli.terminal import EXIT_FAILURE
from cdc.connection import Connection
from cdc.installer import Change


@click.command()
@databases_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Even while a daemon serves it.")
@pass_app
def uninstall(app: App, names: tuple[str, ...], yes: bool, force: bool) -> None:
    """Remove the triggers, the functions and schema cdc; with the last database of a cluster, cdc's roles too.

    Each database is one transaction: all of it or nothing. What the sinks have not delivered, and their dead letters,
    are lost; they are named first. What cdc has not made is not removed. Uses migrate_dsn.
    """
    selected = app.select(names)
    with app.places(selected) as places:
        _tell_losses(places, selected)
        if not yes:
            if not sys.stdin.isatty():
                raise click.UsageError("there is no terminal to ask on (say --yes)")
            click.confirm(f"Remove cdc from {', '.join(selected)}?", abort=True, err=True)
        _uninstall_all(app, places, selected, force=force)


def _tell_losses(places: dict[str, Place], names: list[str]) -> None:
    def work(name: str) -> tuple[str, list[str]]:
        with Connection(places[name].migrate_dsn, purpose="uninstall") as connection:
            return name, installer.losses(connection)

    def tell(found: tuple[str, list[str]]) -> None:
        name, lost = found
        for what in lost:
            fleet.say(f"{name}: to be lost: {what}", err=True)

    # What cannot be looked at cannot be uninstalled either, and that is where its error is told.
    fleet = Fleet(names, work, tell)
    fleet.run()
    if fleet.interrupted:
        sys.exit(EXIT_INTERRUPTED)


def _uninstall_all(app: App, places: dict[str, Place], names: list[str], *, force: bool) -> None:
    def work(name: str) -> tuple[str, list[Change]]:
        return name, installer.uninstall(name, dsn=places[name].migrate_dsn, force=force, on_wait=fleet.on_wait)

    def tell(done: tuple[str, list[Change]]) -> None:
        name, changes = done
        for line in [f"{change.subject}: {change.what}" for change in changes] or ["cdc is not installed"]:
            fleet.say(f"{name}: {line}")

    # One after the other: of two that end together, each would leave the roles to the other.
    fleet = Fleet(names, work, tell, at_once=1)
    fleet.run()
    failed = fleet.failures(app)
    fleet.conclude(failed, "uninstalled", "failed, left as it was")
    if failed:
        # 69 is for who has changed nothing and may simply come again.
        sys.exit(EXIT_FAILURE if fleet.results else fleet.exit_code())
