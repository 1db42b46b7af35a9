"""cdc check: can this configuration be served, and if not, what is to be done."""

from __future__ import annotations

import json
import sys

import click

from cdc import diagnosis
from cdc.cli.app import App, pass_app
from cdc.cli.terminal import EXIT_FAILURE, EXIT_UNREACHABLE, console, plain
from cdc.diagnosis import Finding

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


@click.command()
@click.option("-d", "--database", "names", multiple=True, metavar="DB", help="Only this one; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="A list of {database, level, subject, message, cure}.")
@pass_app
def check(app: App, names: tuple[str, ...], as_json: bool) -> None:
    """Look at configuration, connections, privileges, server settings, schema and triggers; change nothing.

    One finding a line, with its cure in parentheses: ok, note, warning or error. Exit code 0 without an error, 69 when
    the only errors are databases that cannot be reached, 1 otherwise.
    """
    selected = app.select(names)
    app.load_models()
    with app.places(selected) as places:
        dsns = {name: (place.dsn, place.migrate_dsn) for name, place in places.items()}
        findings = diagnosis.check(app.config, selected, dsns)
    if as_json:
        click.echo(json.dumps([_as_json(finding) for finding in findings], ensure_ascii=False, indent=2))
    else:
        out = console()
        for finding in findings:
            out.print(plain(f"{finding.level:<7}", _STYLES[finding.level]), plain(_line(finding)))
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        sys.exit(EXIT_UNREACHABLE if all(error.unreachable for error in errors) else EXIT_FAILURE)


def _line(finding: Finding) -> str:
    subject = f"{finding.subject}: " if finding.subject else ""
    cure = f" ({finding.cure})" if finding.cure else ""
    return f"{finding.database}: {subject}{finding.message}{cure}"


def _as_json(finding: Finding) -> dict[str, str | None]:
    return {
        "database": finding.database,
        "level": finding.level,
        "subject": finding.subject,
        "message": finding.message,
        "cure": finding.cure,
    }
