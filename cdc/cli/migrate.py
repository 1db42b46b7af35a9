"""cdc migrate: make the databases equal to the configuration."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import click
from sqlalchemy import Connection as SqlConnection

from cdc import installer
from cdc.cli.app import App, Place, pass_app
from cdc.errors import CdcError


@click.command()
@click.option("-d", "--database", "names", multiple=True, metavar="DB", help="Only this one; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="What changed, as JSON.")
@pass_app
def migrate(app: App, names: tuple[str, ...], as_json: bool) -> None:
    """Install schema cdc and make the triggers equal to the YAML, on every database.

    Each database is one transaction: all of it or nothing. One that fails does not stop the others.
    """
    selected = app.select(names)
    with app.places(selected) as places:
        failed = migrate_all(app, places, selected, as_json=as_json)
    if failed:
        sys.exit(1)


def migrate_all(
    app: App,
    places: dict[str, Place],
    names: list[str],
    *,
    as_json: bool = False,
    upgrade: Callable[[SqlConnection], None] | None = None,
    triggers: bool = True,
    all_on_stderr: bool = False,
) -> dict[str, str]:
    """Migrate these databases, saying on stdout what changed and on stderr what failed.

    Args:
        app: the configuration.
        places: how to reach each database.
        names: the databases, in this order.
        as_json: what changed as one JSON object.
        upgrade: as for :func:`cdc.installer.migrate`.
        triggers: as for :func:`cdc.installer.migrate`.
        all_on_stderr: stdout belongs to somebody else, such as a sink.

    Returns:
        database → why it was left as it was.
    """
    results: list[dict[str, str]] = []
    failed: dict[str, str] = {}
    for name in names:
        try:
            changes = installer.migrate(
                name,
                app.config.databases[name],
                dsn=places[name].migrate_dsn,
                reader_dsn=places[name].dsn,
                sinks=installer.sinks_of(app.config, name),
                on_wait=lambda line: click.echo(line, err=True),
                upgrade=upgrade,
                triggers=triggers,
            )
        except CdcError as error:
            failed[name] = str(error)
            continue
        for change in changes:
            results.append({"database": name, "subject": change.subject, "change": change.what})
            if not as_json:
                click.echo(f"{name}: {change.subject}: {change.what}", err=all_on_stderr)
    if as_json:
        click.echo(json.dumps({"changes": results, "failed": failed}, ensure_ascii=False, indent=2))
    for name, reason in failed.items():
        click.echo(f"error: {name}: {reason}", err=True)
    if failed and len(names) > 1:
        width = max(map(len, names))
        for name in names:
            click.echo(f"{name:<{width}}  {'failed, left as it was' if name in failed else 'done'}", err=True)
    return failed
