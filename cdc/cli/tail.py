"""cdc tail: changes as they are committed, without a sink and without a trace."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence

import click

from cdc.cli.app import App, databases_option, pass_app
from cdc.cli.screen import line
from cdc.cli.terminal import console, plain, print_data
from cdc.connection import Connection
from cdc.daemon import check_revision
from cdc.decoding import Unreadable
from cdc.errors import CdcError, DatabaseUnreachable
from cdc.event import Event
from cdc.options import is_glob, matches
from cdc.retry import keep_alive
from cdc.tail import Tail

INTERVAL = 0.1
"""Seconds between looks while nothing comes."""
PAGE = 500
WAITING = 10
"""Pages read ahead of a terminal that is slow."""


@click.command()
@click.argument("tables", nargs=-1, metavar="[TABLE]…")
@databases_option
@click.option("-n", "--last", type=click.IntRange(0, 100_000), default=0, help="Begin with so many of what is kept.")
@click.option("--json", "as_json", is_flag=True, help="One event a line, in the native format.")
@pass_app
def tail(app: App, tables: tuple[str, ...], names: tuple[str, ...], last: int, as_json: bool) -> None:
    """Show changes as they are committed, of all tables or of those named, until Ctrl-C.

    TABLE is schema.table, or a table in any schema; * and ? stand for any characters. Reads the outbox from a position
    of its own, which nobody stores: no sink is disturbed, and cdc_reader is all it needs. Ephemeral changes are not in
    the outbox and not seen.
    """
    patterns = [_pattern(table) for table in tables]
    selected = app.select(names)
    out = console()
    with app.places(selected) as places:
        readers = [_Reader(name, places[name].dsn, last) for name in selected]
        for name, event in _all_of(readers):
            if isinstance(event, Unreadable):
                click.echo(f"error: {name}: event {event.id} cannot be read: {event.reason}", err=True)
                continue
            source = event.source
            if patterns and not any(matches(pattern, source.schema_name, source.table) for pattern in patterns):
                continue
            if as_json:
                print_data(event.to_json())
            else:
                text = line(event)
                out.print(plain(f"{name}  ", "dim") + text if len(selected) > 1 else text)


def _pattern(table: str) -> str:
    pattern = table if "." in table else f"*.{table}"
    try:
        is_glob(pattern)
    except ValueError as error:
        raise click.UsageError(f"{table}: {error}") from None
    return pattern


_Found = tuple[str, Event | Unreadable | CdcError]


class _Reader(threading.Thread):
    """Reads one database, and reads on after it was lost; one that was never there is an error."""

    def __init__(self, name: str, dsn: str, last: int) -> None:
        super().__init__(name=f"{name}/tail", daemon=True)
        self._name = name
        self._dsn = dsn
        self._last = last
        self._was_reached = False
        self._found: queue.Queue[_Found] | None = None
        self._stop_event = threading.Event()

    def start_into(self, found: queue.Queue[_Found]) -> None:
        """Begin to put what is read into a queue, which holds the reader up when it is full."""
        self._found = found
        self.start()

    def run(self) -> None:
        try:
            keep_alive(
                self._read, DatabaseUnreachable, maximum=5.0, stop=self._stop_event, before_sleep=self._interrupted
            )
        except CdcError as error:
            self._put(error)

    def _read(self) -> None:
        with Connection(self._dsn, purpose="tail") as connection:
            check_revision(connection)
            reader = Tail(connection, database=self._name)
            self._was_reached = True
            last, self._last = self._last, 0
            for event in reader.last(last) if last else ():
                self._put(event)
            while not self._stop_event.is_set():
                events = reader.read(PAGE)
                for event in events:
                    self._put(event)
                if len(events) < PAGE:
                    self._stop_event.wait(INTERVAL)

    def _put(self, found: Event | Unreadable | CdcError) -> None:
        assert self._found is not None  # noqa: S101  start_into() comes first
        self._found.put((self._name, found))

    def _interrupted(self, error: BaseException, wait: float) -> None:
        if not self._was_reached:
            raise error
        text = f"{self._name}: {error}; what is committed until it is back is not shown"
        click.echo(f"warning: {text}", err=True)


def _all_of(readers: Sequence[_Reader]) -> Iterator[tuple[str, Event | Unreadable]]:
    """What all readers find, as it comes, until Ctrl-C; raises when none is left."""
    found: queue.Queue[_Found] = queue.Queue(WAITING * PAGE)
    for reader in readers:
        reader.start_into(found)
    failed: list[CdcError] = []
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            name, item = found.get()
            if not isinstance(item, CdcError):
                yield name, item
                continue
            failed.append(item)
            click.echo(f"error: {name}: {item}", err=True)
            if len(failed) == len(readers):
                if all(isinstance(error, DatabaseUnreachable) for error in failed):
                    raise DatabaseUnreachable("no database can be reached")
                raise CdcError("no database is left to read")
