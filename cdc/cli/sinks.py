"""cdc sinks: what can be done to a sink and its position."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime

import click

from cdc import outbox
from cdc.cli.app import App, Place, databases_option, pass_app
from cdc.cli.several import each, fed_from, ring, table_patterns
from cdc.connection import Connection
from cdc.decoding import OPS
from cdc.errors import CdcError, ConfigError
from cdc.options import matches

_PATIENCE = 10.0
"""Seconds whoever serves a sink has to notice that it was rewound, before another may serve it."""


@click.group()
def sinks() -> None:
    """Pause and resume sinks, and manage their positions."""


@sinks.command()
@click.argument("sink")
@databases_option
@pass_app
def pause(app: App, sink: str, names: tuple[str, ...]) -> None:
    """Let SINK deliver nothing until it is resumed, whichever daemon serves it.

    What it has in hand is delivered; then the outbox keeps its events, over a restart too. Ephemeral changes are
    dropped.
    """
    _set_paused(app, sink, names, paused=True)


@sinks.command()
@click.argument("sink")
@databases_option
@pass_app
def resume(app: App, sink: str, names: tuple[str, ...]) -> None:
    """Let SINK go on where it was paused."""
    _set_paused(app, sink, names, paused=False)


def _set_paused(app: App, sink: str, names: tuple[str, ...], *, paused: bool) -> None:
    selected = fed_from(app, sink, names)

    def do(name: str, place: Place) -> Iterator[str]:
        with Connection(place.dsn, purpose="pause" if paused else "resume") as connection:
            if not outbox.set_paused(connection, sink, paused=paused):
                raise CdcError(f"sink {sink} has no position yet (run cdc migrate)")
            ring(app, name, connection)
            standing = outbox.attendance(connection, sink)
        served = standing is not None and standing[0] is not None
        nobody = "" if served else " (no daemon serves it at the moment)"
        yield f"{name}: sink {sink} is {'paused' if paused else 'resumed'}{nobody}"

    with app.places(selected) as places:
        sys.exit(each(places, selected, do))


def _target(context: click.Context, parameter: click.Parameter, value: str) -> str | datetime:
    if value in ("earliest", "now"):
        return value
    try:
        return datetime.fromisoformat(value).astimezone()
    except (ValueError, OverflowError):  # the latter where the year has no other zone
        raise click.BadParameter("not a position (write earliest, now, or a time such as 2026-11-22T08:00)") from None


@sinks.command()
@click.argument("sink")
@click.option(
    "--to",
    "target",
    required=True,
    callback=_target,
    metavar="earliest|now|TIMESTAMP",
    help="Where it goes on: at all that is kept, here, or at what was committed since then.",
)
@click.option(
    "--table",
    "tables",
    multiple=True,
    metavar="TABLE",
    callback=table_patterns,
    help="Only its events again; may be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Say how many events would come, and change nothing.")
@databases_option
@pass_app
def rewind(
    app: App, *, sink: str, target: str | datetime, tables: tuple[str, ...], dry_run: bool, names: tuple[str, ...]
) -> None:
    """Let SINK go on from another position, as far back as the outbox reaches.

    Events come again under their old ids and in their old order, up to where the sink stands, and then the rest. With
    --table those of other tables are left out until then; the stream waits meanwhile.
    """
    selected = fed_from(app, sink, names)

    def do(name: str, place: Place) -> Iterator[str]:
        with Connection(place.dsn, purpose="rewind") as connection:
            yield from _rewind(app, connection, name, sink=sink, target=target, tables=tables, dry_run=dry_run)

    with app.places(selected) as places:
        sys.exit(each(places, selected, do))


def _destination(
    connection: Connection, sink: str, target: str | datetime, *, alone: bool
) -> tuple[str, outbox.Standing]:
    """Where a sink is to go on, and where it stands. Raises CdcError where it cannot go there.

    Args:
        alone: only some tables are to come again.
    """
    here = outbox.current_snapshot(connection)
    if isinstance(target, datetime):
        if target > datetime.now(UTC):
            raise CdcError("that time is yet to come (--to now leaves out what is not delivered)")
        position = outbox.position_at(connection, target)
    else:
        position = outbox.EARLIEST if target == "earliest" else here
    at = outbox.standing(connection, sink, position)
    if at is None:
        raise CdcError(f"sink {sink} has no position yet (run cdc migrate)")
    if at.passed and not at.covers:
        position = at.position  # nothing lies between
    if not at.passed and alone:
        raise CdcError(
            "the sink has not come that far, and a single table cannot go ahead of the others (rewind to an earlier "
            "time, or the whole sink with --to now)"
        )
    if not at.passed and target != "now":
        raise CdcError(
            "the sink has not come that far: it would miss what it has not delivered (--to now leaves out all of it)"
        )
    return position, at


def _rewind(
    app: App,
    connection: Connection,
    name: str,
    *,
    sink: str,
    target: str | datetime,
    tables: tuple[str, ...],
    dry_run: bool,
) -> Iterator[str]:
    position, at = _destination(connection, sink, target, alone=bool(tables))
    captured = outbox.captured_names(connection)
    meant = [f"{s}.{t}" for s, t in captured if any(matches(pattern, s, t) for pattern in tables)]
    if tables and not meant:
        raise CdcError(f"no captured table is {', '.join(tables)} (cdc check shows what is captured)")
    options = app.config.sinks[sink]
    counted = [
        (f"{schema}.{table}", number)
        for schema, table, op, number in outbox.events_since(connection, position if target != "now" else at.position)
        if options.wants(name, schema, table, OPS[op].value) and (not tables or f"{schema}.{table}" in meant)
    ]
    number = sum(count for _, count in counted)
    events = f"{number} event{'' if number == 1 else 's'}"
    if target == "now":
        said = f"{events} not delivered {'would be' if dry_run else 'are'} left out"
    else:
        said = f"{events} {'would come' if dry_run else 'will come'} (again), before its filter"
    if dry_run:
        for table in sorted({table for table, _ in counted}):
            yield f"{name}: {table}: {sum(count for one, count in counted if one == table)}"
        yield f"{name}: {said}"
        return
    let_go = outbox.rewind(connection, sink, position, meant if tables else None, patience=_PATIENCE)
    ring(app, name, connection)
    yield f"{name}: sink {sink} is rewound; {said}"
    if not let_go:
        yield f"{name}: {at.owner} has a batch in hand that may still come in between"
    elif at.owner is None:
        yield f"{name}: no daemon serves it at the moment"


@sinks.command()
@click.argument("sink")
@databases_option
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
    forgotten = 0

    def do(name: str, place: Place) -> Iterator[str]:
        nonlocal forgotten
        with Connection(place.dsn, purpose="forget") as connection:
            position = next((s for s in outbox.sink_statuses(connection) if s.name == sink), None)
            if position is None:
                return
            outbox.forget_sink(connection, sink, dead_letters=dead_letters)
        forgotten += 1
        pending = f"{position.pending}{'+' if position.capped else ''}"
        yield f"{name}: sink {sink} is forgotten, with {pending} pending events"

    with app.places(selected) as places:
        code = each(places, selected, do)
    if not forgotten and code == 0:
        raise CdcError(f"no database has a position of sink {sink} (cdc status shows those there are)")
    sys.exit(code)
