"""cdc status: where every database and sink stands, and what holds delivery back."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cdc import diagnosis
from cdc.backfill import Backfill
from cdc.cli.app import App, databases_option, pass_app
from cdc.cli.terminal import EXIT_UNREACHABLE, age, byte_size, console, plain, print_json, print_table
from cdc.diagnosis import DatabaseStatus, SinkLine, is_silent
from cdc.outbox import OpenTransaction

RECENT = 900.0
"""Seconds for which the last error of a sink that runs again is shown."""
LONG_OPEN = 5.0
"""Seconds after which an open transaction is worth a line."""

QUEUE_IS_FILLING = 0.1
"""Fill of the notification queue that is worth a line."""

_STYLES = {"running": "green", "waiting": "cyan", "new": "cyan", "unknown": "yellow", "paused": "yellow"}
_BAD = "bold red"
_COLUMNS = ("database", "sink", "state", "pending", "lag", "last delivery", "dead letters", "owner")
_NUMBERS = ("pending", "lag", "last delivery", "dead letters")


@click.command()
@databases_option
@click.option("--json", "as_json", is_flag=True, help='{"databases": {DB: {"state", …, "sinks": {SINK: {…}}}}}')
@pass_app
def status(app: App, names: tuple[str, ...], as_json: bool) -> None:
    """Show every sink's state, pending events and lag, and what holds delivery back.

    A sink is running, retrying, dropping (ephemeral changes, because it fails), stalled (in one delivery for long),
    paused or stopped, as its daemon says; down: no daemon serves it; new: it has no position yet; unknown: the
    configuration no longer has it. Exit code 69 when a database cannot be reached.
    """
    selected = app.select(names)
    with app.places(selected) as places:
        databases = diagnosis.status(app.config, selected, {name: place.dsn for name, place in places.items()})
    if as_json:
        shape = {"databases": {name: database.to_json() for name, database in databases.items()}}
        print_json(shape)
    else:
        _show(databases, console(), datetime.now(UTC))
    if any(database.state == "unreachable" for database in databases.values()):
        sys.exit(EXIT_UNREACHABLE)


def _show(databases: Mapping[str, DatabaseStatus], out: Console, now: datetime) -> None:
    rows = [(name, sink, line) for name, database in databases.items() for sink, line in database.sinks.items()]
    out.print(_verdict(databases, rows))
    out.print()
    if rows:
        _print_table(rows, out, now)
        out.print()
    for name, database in databases.items():
        bad = database.state != "ok" or bool(database.drift or database.problems)
        out.print(plain(f"{name}: {_summary(database)}", _BAD if bad else ""))
        for note in _notes(database, now):
            out.print(plain(f"{name}: {note}"))


def _verdict(databases: Mapping[str, DatabaseStatus], rows: list[tuple[str, str, SinkLine]]) -> Text:
    """The first thing somebody wants to know: whether all is well, and if not, how much is not."""
    lost = [name for name, database in databases.items() if database.state != "ok"]
    halted = [f"{name}/{sink}" for name, sink, line in rows if line.state not in ("running", "paused", "new")]
    new = [f"{name}/{sink}" for name, sink, line in rows if line.state == "new"]
    paused = [f"{name}/{sink}" for name, sink, line in rows if line.state == "paused"]
    drifted = [name for name, database in databases.items() if database.drift or database.problems]
    letters = sum(line.detail.dead_letters for _, _, line in rows if line.detail)
    parts = [
        f"{_of(len(lost), len(databases), 'database')} cannot be served: {', '.join(lost)}" if lost else "",
        f"{_of(len(halted), len(rows), 'sink')} {'does' if len(halted) == 1 else 'do'} not deliver: {', '.join(halted)}"
        if halted
        else "",
        f"{_of(len(new), len(rows), 'sink')} {'has' if len(new) == 1 else 'have'} no position yet (run cdc migrate): "
        f"{', '.join(new)}"
        if new
        else "",
        f"{_of(len(paused), len(rows), 'sink')} paused: {', '.join(paused)}" if paused else "",
        f"look at the triggers of {', '.join(drifted)}" if drifted else "",
        f"{letters} dead letter{'' if letters == 1 else 's'}" if letters else "",
    ]
    said = "; ".join(filter(None, parts))
    if said:
        return plain(said, _BAD if lost or halted or drifted else "yellow")
    lag = max((line.detail.lag for _, _, line in rows if line.detail), default=0.0)
    return plain(f"all is delivered, {'up to date' if lag < 1 else f'at most {age(lag)} behind'}", "green")


def _of(some: int, all_: int, noun: str) -> str:
    return f"{some} of {all_} {noun}{'' if all_ == 1 else 's'}"


def _print_table(rows: list[tuple[str, str, SinkLine]], out: Console, now: datetime) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold" if out.is_terminal else "")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    for name, sink, line in rows:
        detail = line.detail
        cells = ["-", "-", "never", "0", "-"]
        if detail is not None:
            cells = [
                f"{detail.pending}+" if detail.capped else str(detail.pending),
                age(detail.lag),
                f"{age((now - detail.delivered_at).total_seconds())} ago" if detail.delivered_at else "never",
                str(detail.dead_letters),
                detail.owner or "-",
            ]
        state = plain(line.state, _STYLES.get(line.state, _BAD))
        table.add_row(plain(name), plain(sink), state, *(plain(cell) for cell in cells))
    print_table(table, out)


def _summary(database: DatabaseStatus) -> str:
    if database.state != "ok":
        return f"{database.state}: {database.error}"
    parts = [
        f"revision {database.revision}",
        "armed" if database.armed else "not armed",
        f"outbox {byte_size(database.outbox_bytes or 0)}",
        f"drift in {database.drift} (run cdc check)" if database.drift else "no drift",
    ]
    return ", ".join(parts)


def _notes(database: DatabaseStatus, now: datetime) -> Iterator[str]:
    """What somebody should know, one sentence each."""
    yield from database.problems
    if database.outbox_held_by:
        yield (f"the outbox keeps what {', '.join(database.outbox_held_by)} has not delivered, beyond its retention")
    if (database.notify_queue_usage or 0) > QUEUE_IS_FILLING:
        yield (
            f"the notification queue is {database.notify_queue_usage:.0%} full: a session listens and does not read "
            "(the server's log names its pid)"
        )
    oldest = database.oldest_transaction
    if oldest is not None and (oldest.age is None or oldest.age > LONG_OPEN):
        yield _open_transaction(oldest)
    for sink, line in database.sinks.items():
        text = _about(sink, line, now)
        if text:
            yield f"{sink}: {text}"
        for one in line.backfills:
            yield f"{sink}: {_backfill(one)}"


def _about(sink: str, line: SinkLine, now: datetime) -> str | None:
    detail = line.detail
    if detail is None:
        return "new: it has no position yet and gets one from cdc migrate or cdc run"
    error = ""
    if detail.last_error and detail.last_error_at:
        since = (now - detail.last_error_at).total_seconds()
        if line.state != "running" or since < RECENT:
            error = f"last error {age(since)} ago: {detail.last_error}"
    served_by = f"; the last one was {detail.owner}, look into its log" if detail.owner else ""
    silent = f"down: its daemon {detail.owner} has said nothing for {age(detail.silent_for or 0)}: stopped, or cut off"
    explained = {
        "down": silent if is_silent(detail) else f"down: no daemon serves it (start cdc run{served_by})",
        "stopped": "stopped: it takes nothing more (mend the cause, then restart cdc run)",
        "paused": f"paused: nothing is delivered until cdc sinks resume {sink}"
        + ("" if detail.served else "; no daemon serves it"),
        "stalled": "stalled: it has not returned from a delivery for "
        f"{age((now - detail.state_since).total_seconds())} (its destination hangs, or is very slow)",
        "unknown": "unknown: the configuration no longer has it, and its position keeps the outbox from being given "
        "back (cdc sinks forget, if it is not coming back)",
    }.get(line.state, line.state if error and line.state != "running" else "")
    dropped = f"{detail.dropped} ephemeral changes were dropped so far" if detail.dropped else ""
    parked = (
        f"later events of their keys wait behind {detail.parked} dead letters (cdc dead-letters list {sink})"
        if detail.parked
        else ""
    )
    return "; ".join(filter(None, (explained, error, parked, dropped))) or None


def _backfill(one: Backfill) -> str:
    what = f"backfill of {one.schema}.{one.table}"
    if one.state == "failed":
        return f"{what} has failed: {one.reason}"
    left = "" if one.remaining is None else f", {age(one.remaining)} left"
    paused = f", paused until cdc backfill resume {one.sink}" if one.state == "paused" else ""
    return f"{what}: {one.share:.0%} of about {one.estimate or 0} rows{left}{paused}"


def _open_transaction(oldest: OpenTransaction) -> str:
    who = f"prepared as {oldest.prepared!r}" if oldest.prepared else f"pid {oldest.pid}"
    details = [f"database {oldest.database}", *filter(None, (oldest.application, oldest.state))]
    since = "age not visible to this role" if oldest.age is None else f"open for {age(oldest.age)}"
    return (
        f"oldest open transaction: {who} ({', '.join(details)}), {since}; until it ends its changes are not delivered "
        "and the outbox is not given back"
    )
