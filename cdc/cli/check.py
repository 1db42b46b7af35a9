"""cdc check: can this configuration be served, and if not, what is to be done."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import click

from cdc import diagnosis
from cdc.cli.app import App, databases_option, pass_app
from cdc.cli.terminal import EXIT_FAILURE, EXIT_UNREACHABLE, console, plain, print_json
from cdc.config import literal_secrets, shown
from cdc.diagnosis import Finding

_NO_DATABASE = ""
"""In place of a database's name, of a finding about the file itself."""
_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


@click.command()
@databases_option
@click.option("--json", "as_json", is_flag=True, help="A list of {database, level, subject, message, cure}.")
@pass_app
def check(app: App, names: tuple[str, ...], as_json: bool) -> None:
    """Look at configuration, connections, privileges, server settings, schema and triggers; change nothing.

    One finding a line, with its cure in parentheses: ok, note, warning or error. Exit code 0 without an error, 69 when
    the only errors are databases that cannot be reached, 1 otherwise.
    """
    selected = app.select(names)
    app.load_models(app.config)
    app.check_clients(app.config)
    with app.places(selected) as places:
        dsns = {name: (place.dsn, place.migrate_dsn) for name, place in places.items()}
        findings = diagnosis.check(app.config, selected, dsns) + _exposed(app, selected)
    if as_json:
        print_json([_as_json(finding) for finding in findings])
    else:
        out = console()
        for finding in findings:
            out.print(plain(f"{finding.level:<7}", _STYLES[finding.level]), plain(_line(finding, app.path)))
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        sys.exit(EXIT_UNREACHABLE if all(error.unreachable for error in errors) else EXIT_FAILURE)


def _exposed(app: App, names: list[str]) -> list[Finding]:
    """The secrets that stand in a configuration file that everybody can read."""
    path = app.path
    if not path.stat().st_mode & stat.S_IROTH:
        return []
    cure = f"chmod o-r {path}"
    findings = []
    for place in literal_secrets(path, app.config):
        match place:
            case ("databases", str(name), str(key)):
                if name in names:
                    message = f"holds a password, and {path} can be read by everybody"
                    findings.append(Finding(name, "warning", key, message, cure))
            case _:
                message = "is a secret, and everybody can read the file"
                findings.append(Finding(_NO_DATABASE, "warning", shown(place), message, cure))
    return findings


def _line(finding: Finding, path: Path) -> str:
    subject = f"{finding.subject}: " if finding.subject else ""
    cure = f" ({finding.cure})" if finding.cure else ""
    return f"{finding.database or path}: {subject}{finding.message}{cure}"


def _as_json(finding: Finding) -> dict[str, str | None]:
    return {
        "database": finding.database or None,
        "level": finding.level,
        "subject": finding.subject,
        "message": finding.message,
        "cure": finding.cure,
    }
