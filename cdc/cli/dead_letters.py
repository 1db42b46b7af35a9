"""cdc dead-letters: look at the events that were set aside, send them on their way again, or give them up.

Replaying is the daemon's work: these commands only mark letters in the database, and ring. See :mod:`cdc.fates` for
what happens then, and in which order.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click
from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from cdc import dead_letters as letters
from cdc import outbox
from cdc.cli.app import App, Place, pass_app
from cdc.cli.several import check_sink, each, ring
from cdc.cli.terminal import EXIT_FAILURE, age, console, plain, print_data, print_json, print_table
from cdc.connection import Connection
from cdc.dead_letters import Found, Selection
from cdc.errors import CdcError
from cdc.event import quote, split_object
from cdc.options import Duration, split

_LIMIT = 100
_ABANDONED = 15.0
"""Seconds without a daemon after which `--wait` gives up; a take-over is faster."""

_COLUMNS = ("database", "sink", "id", "op", "table", "key", "tried", "since", "state", "reason")
_NUMBERS = ("tried", "since")


# -- what is meant ----------------------------------------------------------------------------------------------


def _moment(context: click.Context, parameter: click.Parameter, value: str | None) -> datetime | None:
    """A time as ISO 8601 (local, where it names no zone), or how long ago, such as 90m."""
    if value is None:
        return None
    try:
        return datetime.fromisoformat(value).astimezone()
    except (ValueError, OverflowError):  # the latter where the year has no other zone
        pass
    try:
        return datetime.now(UTC) - timedelta(seconds=TypeAdapter(Duration).validate_python(value))
    except ValidationError:
        raise click.BadParameter("not a time (write 2026-11-22T08:00, or how long ago: 90m, 2h, 1d)") from None


def _keys(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """The ways a key may be written in the outbox."""
    try:
        return None if value is None else letters.key_texts(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _pattern(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """A pattern as in the configuration."""
    try:
        if value is not None:
            split(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return value


@dataclass(frozen=True, slots=True)
class _Meant:
    """What the options say: which letters, at most how many of each database, and of which databases."""

    selection: Selection
    limit: int | None
    databases: tuple[str, ...]


_CommandT = TypeVar("_CommandT", bound=Callable[..., Any])


def _options(default_limit: int | None) -> Callable[[_CommandT], _CommandT]:
    """The options all four commands share."""
    given = (
        click.option(
            "-d", "--database", "databases", multiple=True, metavar="DB", help="Only this one; may be repeated."
        ),
        click.option("--id", "ids", multiple=True, metavar="ID", help="The event's id; may be repeated."),
        click.option(
            "--table", metavar="TABLE", callback=_pattern, help="Only of this table: schema.table, with * and ?."
        ),
        click.option(
            "--key",
            "keys",
            metavar="KEY",
            callback=_keys,
            help='Only of this row: COLUMN=VALUE, or JSON: \'{"a": 1, "b": 2}\'.',
        ),
        click.option("--reason", metavar="TEXT", help="Only where the reason contains this."),
        click.option(
            "--since", metavar="TIME", callback=_moment, help="Only those set aside since: 2026-11-22T08:00, or 2h ago."
        ),
        click.option("--before", metavar="TIME", callback=_moment, help="Only those set aside before."),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            default=default_limit,
            help="At most so many, the oldest events first.",
        ),
        click.option("--json", "as_json", is_flag=True, help="For machines."),
    )

    def decorate(command: _CommandT) -> _CommandT:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


def _meant(sink: str | None, options: dict[str, Any]) -> _Meant:
    return _Meant(
        Selection(
            sink=sink,
            event_ids=options["ids"] or None,
            table=options["table"],
            keys=options["keys"],
            reason=options["reason"],
            since=options["since"],
            before=options["before"],
        ),
        options["limit"],
        options["databases"],
    )


# -- the databases ----------------------------------------------------------------------------------------------


class _Look:
    """What is done in each of several databases; one that fails does not stop the others."""

    def __init__(self, app: App, names: Sequence[str], places: dict[str, Place]) -> None:
        self._app = app
        self._places = places
        self.names = names
        self.code = 0

    def each(self, work: Callable[[str, Connection], None], names: Sequence[str] | None = None) -> None:
        """Do something in each database, or those named."""

        def do(name: str, place: Place) -> tuple[str, ...]:
            with Connection(place.dsn, purpose="dead-letters") as connection:
                work(name, connection)
            return ()

        self.code = max(self.code, each(self._places, self.names if names is None else names, do))

    def find(self, meant: _Meant, *, whole: bool = False, beyond: int = 0) -> dict[str, list[Found]]:
        """The letters that are meant, by database; `beyond` more than the limit, to know that there are."""
        found: dict[str, list[Found]] = {}
        most = None if meant.limit is None else meant.limit + beyond

        def work(name: str, connection: Connection) -> None:
            if here := list(letters.find(connection, meant.selection, whole=whole, most=most)):
                found[name] = here

        self.each(work)
        return found


@contextmanager
def _looking(app: App, meant: _Meant) -> Iterator[_Look]:
    names = app.select(meant.databases)
    with app.places(names) as places:
        look = _Look(app, names, places)
        yield look
    if look.code:
        sys.exit(look.code)


# -- looking ----------------------------------------------------------------------------------------------------


@click.group("dead-letters")
def dead_letters() -> None:
    """Events that could not be delivered: look at them, replay or discard them.

    Without options a command means all dead letters of the sink, in the order of their events.
    """


@dead_letters.command("list")
@click.argument("sink", required=False)
@_options(_LIMIT)
@pass_app
def list_(app: App, /, sink: str | None, as_json: bool, **options: Any) -> None:
    """List dead letters of SINK, or of all sinks: one line each, without the event.

    State: parked, later events of its key wait; waits, it only waits itself; replaying, it is about to be delivered.
    """
    meant = _meant(sink, options)
    with _looking(app, meant) as look:
        found = look.find(meant, beyond=1)
        rows = [(name, letter) for name, here in found.items() for letter in here[: meant.limit]]
        if not rows:
            check_sink(app, sink)
        if as_json:
            _print_json(rows)
        elif rows:
            _print_list(rows)
        if any(len(here) > (meant.limit or 0) for here in found.values()):
            click.echo(f"there are more than {meant.limit} of a database (--limit N)", err=True)


@dead_letters.command()
@click.argument("sink", required=False)
@_options(_LIMIT)
@pass_app
def show(app: App, /, sink: str | None, as_json: bool, **options: Any) -> None:
    """Show dead letters of SINK, or of all sinks, in full, with the reason."""
    meant = _meant(sink, options)
    with _looking(app, meant) as look:
        rows = [(name, letter) for name, here in look.find(meant, whole=True).items() for letter in here]
        if not rows:
            _nothing(app, look, meant, as_json=as_json)
        elif as_json:
            _print_json(rows)
        else:
            for name, letter in rows:
                _print_whole(name, letter)


def _print_list(rows: Sequence[tuple[str, Found]]) -> None:
    out = console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold" if out.is_terminal else "")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    now = datetime.now(UTC)
    for name, letter in rows:
        cells = (
            name,
            letter.sink,
            letter.event_id,
            letter.op or "-",
            _table(letter) or "-",
            " ".join(letter.keys) or "-",
            str(letter.attempts),
            age((now - letter.died_at).total_seconds()),
            _state(letter) or "-",
            letter.reason,
        )
        table.add_row(*(plain(cell) for cell in cells))
    print_table(table, out)


def _print_whole(name: str, letter: Found) -> None:
    out = console()
    waits = "; later events of its key wait" if letter.parked else ""
    replaying = "; it is about to be delivered" if letter.wanted else ""
    for what, told in (
        ("id", letter.event_id),
        ("sink", f"{letter.sink} of {name}"),
        ("reason", letter.reason),
        ("set aside", f"{_iso(letter.died_at)}, tried {letter.attempts} times{waits}{replaying}"),
    ):
        out.print(plain(f"{what + ':':<11}{told}"))
    # As it is: somebody may want to feed it to a program.
    click.echo(readable(letter.text or "null"))
    click.echo()


def _print_json(rows: Sequence[tuple[str, Found]]) -> None:
    shown = [_json(name, letter) for name, letter in rows]
    print_data("[" + ",".join(f"\n  {text}" for text in shown) + ("\n]" if shown else "]"))


def _json(name: str, letter: Found) -> str:
    """One letter as a JSON object in one line; keys and event digit for digit."""
    plain_ = {
        "database": name,
        "sink": letter.sink,
        "id": letter.event_id,
        "op": letter.op,
        "table": _table(letter),
        "reason": letter.reason,
        "attempts": letter.attempts,
        "set_aside_at": _iso(letter.died_at),
        "parked": letter.parked,
        "replaying": letter.wanted,
    }
    text = json.dumps(plain_, ensure_ascii=False)[:-1] + ', "keys": [' + ", ".join(letter.keys) + "]"
    if letter.text is not None:
        text += ', "event": ' + letter.text.replace("\n", " ").replace("\r", " ")
    return text + "}"


def readable(text: str) -> str:
    """An event as people read and edit it: a line for each member, and for each column of a row; digit for digit."""
    try:
        members = split_object(text)
    except ValueError:
        return text
    lines = []
    for name, raw in members.items():
        if name in ("key", "before", "after", "source", "old_row", "new_row") and raw.startswith("{"):
            columns = [f"    {quote(column)}: {value}" for column, value in split_object(raw).items()]
            raw = "{\n" + ",\n".join(columns) + "\n  }" if columns else "{}"  # noqa: PLW2901  # the same, laid out
        lines.append(f"  {quote(name)}: {raw}")
    return "{\n" + ",\n".join(lines) + "\n}"


def _table(letter: Found) -> str | None:
    return None if letter.table is None else f"{letter.schema}.{letter.table}"


def _state(letter: Found) -> str:
    if letter.wanted:
        return "replaying"
    if not letter.parked:
        return ""
    return "parked" if letter.attempts else "waits"


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _nothing(app: App, look: _Look, meant: _Meant, *, as_json: bool) -> None:
    """Say that nothing was found; that is a failure where somebody named what he was looking for."""
    if not look.code:
        check_sink(app, meant.selection.sink)
    if as_json:
        print_json([])
    if look.code:
        return  # why is said already
    of = f" of sink {meant.selection.sink}" if meant.selection.sink else ""
    click.echo(f"no dead letter{of} is meant (cdc dead-letters list shows those there are)", err=True)
    if meant.selection.event_ids:
        sys.exit(EXIT_FAILURE)


# -- replaying and discarding -----------------------------------------------------------------------------------


@dead_letters.command()
@click.argument("sink")
@_options(None)
@click.option("--edit", is_flag=True, help="Edit the event in $EDITOR first; one letter at a time.")
@click.option("--wait", is_flag=True, help="Wait, and say what has become of them; exit code 1 if any is kept.")
@pass_app
def replay(app: App, /, sink: str, as_json: bool, edit: bool, wait: bool, **options: Any) -> None:
    """Let the daemon that serves SINK deliver dead letters, under their old ids and in the order of their keys.

    One that is delivered is a dead letter no more. One that is refused again is kept, with the new reason, and so is
    everything after it of its key. Of a parked key the letters before those that are meant have to be replayed or
    discarded too: nothing overtakes them.
    """
    meant = _meant(sink, options)
    with _looking(app, meant) as look:
        found = look.find(meant, whole=edit)
        count = sum(map(len, found.values()))
        if edit and count > 1:
            raise click.UsageError(f"--edit takes one dead letter, and {count} are meant (say which with --id)")
        if not count:
            _nothing(app, look, meant, as_json=as_json)
            return
        asked = _Asked(sink, wait=wait, as_json=as_json)

        def work(name: str, connection: Connection) -> None:
            if edit:
                _edit(connection, found[name][0])
                ids = [found[name][0].id]
            else:
                ids = [letter.id for letter in found[name]]
                letters.want(connection, sink, ids)
            ring(app, name, connection)
            asked.tell(name, connection, ids)

        look.each(work, list(found))
        asked.conclude()
        look.code = look.code or asked.code


def _edit(connection: Connection, letter: Found) -> None:
    """Let somebody edit a letter's event until it is one, and ask for it to be delivered."""
    original = text = letter.text or ""
    letters.edited(original, original)  # or it is no event, and editing does not make it one
    text = readable(text)
    while True:
        saved = click.edit(text, extension=".json")
        if saved is None:
            raise CdcError("not saved: nothing is replayed")
        try:
            event = letters.edited(original, saved)
        except CdcError as error:
            click.echo(f"error: {error}", err=True)
            if not sys.stdin.isatty() or not click.confirm("Edit it again?", default=True, err=True):
                raise CdcError("nothing is replayed") from None
            text = saved
            continue
        if not letters.rewrite(connection, letter.sink, letter.id, event):
            raise CdcError("somebody else has replayed or discarded it meanwhile")
        return


class _Asked:
    """Tells what becomes of letters that were asked for."""

    def __init__(self, sink: str, *, wait: bool, as_json: bool) -> None:
        self.code = 0
        self._sink = sink
        self._wait = wait
        self._as_json = as_json
        self._shape: list[dict[str, object]] = []

    def tell(self, name: str, connection: Connection, ids: Sequence[int]) -> None:
        hint = self._hindrance(connection)
        if self._wait and not hint:
            hint = self._until_done(connection, ids)
        if not self._wait or hint:
            self.code = EXIT_FAILURE if self._wait else 0
            self._shape.append({"database": name, "sink": self._sink, "asked": len(ids), "hindrance": hint})
            if not self._as_json:
                click.echo(f"{name}: {_letters(len(ids))} of sink {self._sink} to be delivered")
            if hint:
                click.echo(f"{name}: {hint}", err=True)
            return
        kept = letters.left(connection, ids)
        done = len(ids) - len(kept)
        self.code = self.code or (EXIT_FAILURE if kept else 0)
        listed: list[dict[str, object]] = [{"id": letter.event_id, "reason": letter.reason} for letter in kept]
        self._shape.append({"database": name, "sink": self._sink, "asked": len(ids), "done": done, "kept": listed})
        if not self._as_json:
            click.echo(f"{name}: {_letters(done)} of sink {self._sink} done, {len(kept)} kept")
            for letter in kept:
                click.echo(f"{name}: {letter.event_id}: {letter.reason}")

    def conclude(self) -> None:
        if self._as_json:
            print_json(self._shape)

    def _hindrance(self, connection: Connection) -> str | None:
        """Why nothing will happen for now."""
        standing = outbox.attendance(connection, self._sink)
        if standing is None or standing[0] is None:
            return f"no daemon serves sink {self._sink} at the moment; it is done once one does (start cdc run)"
        if standing[1]:
            return f"sink {self._sink} is paused; it is done once it goes on (cdc sinks resume {self._sink})"
        return None

    def _until_done(self, connection: Connection, ids: Sequence[int]) -> str | None:
        """Wait until no letter is about to be delivered any more; or say what has come in between."""
        pause = 0.1
        hindered_since = None
        while any(letter.wanted for letter in letters.left(connection, ids)):
            hint = self._hindrance(connection)
            if hint is None:
                hindered_since = None
            else:
                hindered_since = hindered_since or time.monotonic()
                if time.monotonic() - hindered_since > _ABANDONED:
                    return hint
            time.sleep(pause)
            pause = min(pause * 1.5, 2.0)
        return None


@dead_letters.command()
@click.argument("sink")
@_options(None)
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def discard(app: App, /, sink: str, as_json: bool, yes: bool, **options: Any) -> None:
    """Delete dead letters of SINK: these events are never delivered. Asks first."""
    meant = _meant(sink, options)
    with _looking(app, meant) as look:
        found = look.find(meant)
        if not found:
            _nothing(app, look, meant, as_json=as_json)
            return
        for name, here in found.items():
            click.echo(f"{name}: to be lost: {_letters(len(here))} of sink {sink}", err=True)
        if not yes:
            if not sys.stdin.isatty():
                raise click.UsageError("there is no terminal to ask on (say --yes)")
            click.confirm("Discard them?", abort=True, err=True)
        shape: list[dict[str, object]] = []

        def work(name: str, connection: Connection) -> None:
            gone = letters.discard(connection, sink, [letter.id for letter in found[name]])
            ring(app, name, connection)
            shape.append({"database": name, "sink": sink, "discarded": gone})
            if not as_json:
                click.echo(f"{name}: {_letters(gone)} of sink {sink} discarded")

        look.each(work, list(found))
        if as_json:
            print_json(shape)


def _letters(number: int) -> str:
    return f"{number} dead letter{'' if number == 1 else 's'}"
