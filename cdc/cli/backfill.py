"""cdc backfill: let a sink be told of the rows that tables have already, beside the stream.

Telling is the daemon's work: these commands only write down what is wanted, and ring. See :mod:`cdc.backfill`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from cdc import backfill as rows
from cdc import outbox
from cdc.backfill import Backfill, State
from cdc.cli.app import App, Place, databases_option, pass_app
from cdc.cli.several import check_owner, each, fed_from, ring, table_patterns
from cdc.cli.terminal import age, console, plain, print_json, print_table
from cdc.connection import Connection
from cdc.errors import CdcError
from cdc.options import is_glob, matches, split

_COLUMNS = ("database", "sink", "table", "state", "done", "rows", "of about", "rows/s", "left")
_NUMBERS = ("done", "rows", "of about", "rows/s", "left")
_STYLES = {"running": "green", "done": "green", "paused": "yellow", "cancelled": "yellow", "failed": "bold red"}
_REDRAWN = 0.5
"""Seconds between two looks with `--watch`."""


@click.group()
def backfill() -> None:
    """Let sinks be told of the rows that tables have already."""


_sink = click.argument("sink")
_tables = click.argument("tables", nargs=-1, metavar="[TABLE]...", callback=table_patterns)


@backfill.command()
@_sink
@_tables
@databases_option
@click.option("--where", metavar="SQL", help="Only rows that meet this condition; needs migrate_dsn.")
@click.option("--chunk", type=click.IntRange(1, 100_000), default=1000, metavar="N", help="At most N rows at a time.")
@click.option("--rate", type=click.IntRange(1), metavar="ROWS/S", help="At most so many rows a second.")
@pass_app
def start(
    app: App,
    *,
    sink: str,
    tables: tuple[str, ...],
    names: tuple[str, ...],
    where: str | None,
    chunk: int,
    rate: int | None,
) -> None:
    """Let SINK be told of every row of these TABLEs (schema.table, * and ? allowed), or of all it wants.

    The daemon that serves the sink does it, as events of the operation read, in order with the changes that go on
    meanwhile. SQL under --where is about the table's columns by their names, and runs as the role that migrates.
    """
    selected = fed_from(app, sink, names)
    by_name = {split(pattern) for pattern in tables if not is_glob(pattern)}
    found = False

    def ask(name: str, place: Place) -> Iterator[str]:
        nonlocal found
        options = app.config.sinks[sink]
        # A condition is SQL: it is the one who may migrate that asks for it, and whose rights it runs with.
        with Connection(place.dsn if where is None else place.migrate_dsn, purpose="backfill") as connection:
            if where is not None:
                check_owner(connection)
            standing = outbox.attendance(connection, sink)
            if standing is None:
                raise CdcError(f"sink {sink} has no position yet (run cdc migrate)")
            for table in rows.candidates(connection):
                label = f"{table.schema}.{table.table}"
                if not _is_meant(tables, table.schema, table.table):
                    continue
                is_named = (table.schema, table.table) in by_name
                if not options.wants(name, table.schema, table.table, "read"):
                    if is_named:
                        raise CdcError(f"sink {sink} does not want rows of {label} (see its keys tables and ops)")
                    continue
                found = True
                if table.obstacle is not None and not is_named:
                    yield f"{name}: {label} is left out: it {table.obstacle}"
                    continue
                began = rows.start(connection, sink, table, rows=chunk, rate=rate, condition=where)
                yield f"{name}: backfill of {label} for sink {sink} {'is started' if began else 'is under way already'}"
            ring(app, name, connection)
            if standing[0] is None:
                yield f"{name}: no daemon serves the sink at the moment; it begins with the next one"

    with app.places(selected) as places:
        code = each(places, selected, ask)
    if not found and code == 0:
        meant = ", ".join(tables) if tables else "any table"
        raise CdcError(f"sink {sink} is told of no captured table that is {meant} (cdc check shows what is captured)")
    sys.exit(code)


@backfill.command()
@click.argument("sink", required=False)
@_tables
@databases_option
@click.option("--watch", is_flag=True, help="Stay, until none is running.")
@click.option("--json", "as_json", is_flag=True, help='{"databases": {DB: {SINK: [{…}]}}}')
@pass_app
def status(
    app: App, *, sink: str | None, tables: tuple[str, ...], names: tuple[str, ...], watch: bool, as_json: bool
) -> None:
    """Show how far the backfills of SINK are, of all tables or of these TABLEs; or of all sinks.

    Of each table it is the last one.
    """
    selected = app.select(names) if sink is None else fed_from(app, sink, names)
    out = console()
    with app.places(selected) as places:

        def look() -> tuple[dict[str, list[Backfill]], int]:
            found: dict[str, list[Backfill]] = {}

            def ask(name: str, place: Place) -> tuple[str, ...]:
                with Connection(place.dsn, purpose="backfill") as connection:
                    all_ = rows.backfills(connection, sink)
                found[name] = [one for one in all_ if _is_meant(tables, one.schema, one.table)]
                return ()

            code = each(places, selected, ask)
            return found, code

        found, code = look()
        if watch:
            with Live(console=out, auto_refresh=False, transient=True) as live:
                while code == 0 and any(one.state == "running" for all_ in found.values() for one in all_):
                    if out.is_terminal:
                        live.update(Group(_table(found, out)), refresh=True)
                    time.sleep(_REDRAWN)
                    found, code = look()
    if as_json:
        shape = {name: _by_sink(all_) for name, all_ in found.items()}
        print_json({"databases": shape})
    elif any(found.values()):
        print_table(_table(found, out), out)
        for name, all_ in found.items():
            for one in all_:
                if one.reason is not None:
                    out.print(plain(f"{name}: {one.sink}: {one.reason}", _STYLES["failed"]))
    elif code == 0:
        out.print("no backfill (cdc backfill start begins one)")
    sys.exit(code)


@backfill.command()
@_sink
@_tables
@databases_option
@pass_app
def pause(app: App, sink: str, tables: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Stop telling SINK of rows for now; the stream goes on."""
    _change(app, sink, tables, names, state="paused", done="paused", needed="running")


@backfill.command()
@_sink
@_tables
@databases_option
@pass_app
def resume(app: App, sink: str, tables: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Go on where the backfill was paused."""
    _change(app, sink, tables, names, state="running", done="resumed", needed="paused")


@backfill.command()
@_sink
@_tables
@databases_option
@pass_app
def cancel(app: App, sink: str, tables: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Give a backfill up; what was told stays told."""
    _change(app, sink, tables, names, state="cancelled", done="cancelled", needed="under way")


def _change(
    app: App, sink: str, tables: tuple[str, ...], names: tuple[str, ...], *, state: State, done: str, needed: str
) -> None:
    selected = fed_from(app, sink, names)
    changed = False

    def ask(name: str, place: Place) -> Iterator[str]:
        nonlocal changed
        with Connection(place.dsn, purpose="backfill") as connection:
            relations = None
            if tables:
                known = [one for one in rows.backfills(connection, sink) if one.state in rows.FROM[state]]
                relations = [one.relation for one in known if _is_meant(tables, one.schema, one.table)]
            for table in rows.change(connection, sink, state, relations):
                changed = True
                yield f"{name}: backfill of {table} for sink {sink} is {done}"
            ring(app, name, connection)

    with app.places(selected) as places:
        code = each(places, selected, ask)
    if not changed and code == 0:
        raise CdcError(f"sink {sink} has no backfill that is {needed} (see cdc backfill status {sink})")
    sys.exit(code)


def _is_meant(patterns: Sequence[str], schema: str, table: str) -> bool:
    """Whether a table is one of those that were asked for; all are where none was."""
    return not patterns or any(matches(pattern, schema, table) for pattern in patterns)


def _by_sink(all_: Sequence[Backfill]) -> dict[str, list[dict[str, object]]]:
    shape: dict[str, list[dict[str, object]]] = {}
    for one in all_:
        shape.setdefault(one.sink, []).append(one.to_json())
    return shape


def _table(found: dict[str, list[Backfill]], out: Console) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold" if out.is_terminal else "")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    if out.is_terminal:
        table.add_column("", min_width=20)
    for name, all_ in found.items():
        for one in all_:
            estimate = max(one.estimate or 0, one.rows_read)
            cells = [
                plain(name),
                plain(one.sink),
                plain(f"{one.schema}.{one.table}"),
                plain(one.state, _STYLES[one.state]),
                plain(f"{one.share:.0%}"),
                plain(f"{one.rows_read:,}"),
                plain("-" if one.estimate is None else f"{one.rows_read if one.state == 'done' else estimate:,}"),
                plain("-" if one.speed is None else f"{one.speed:,.0f}"),
                plain("-" if one.remaining is None else age(one.remaining)),
            ]
            bar = [ProgressBar(total=1.0, completed=one.share, width=20)] if out.is_terminal else []
            table.add_row(*cells, *bar)
    return table
