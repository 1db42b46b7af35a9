"""cdc migrate: make the databases equal to the configuration, or say what that would take.

Databases are worked on a few at a time and told of in the order of the file. Ctrl-C begins no further one and lets
those under way finish: each is one transaction, so a database is done or as it was. A second Ctrl-C does not wait for
them; the server then undoes what was not committed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import Connection as SqlConnection

from cdc import installer, inventory, planner
from cdc.cli.app import App, Place, databases_option, pass_app
from cdc.cli.terminal import EXIT_FAILURE, EXIT_UNREACHABLE, byte_size, plain, print_data, print_json
from cdc.errors import CdcError, DatabaseUnreachable, InstallError
from cdc.planner import Step

EXIT_INTERRUPTED = 130  # as a shell has it for SIGINT
AT_ONCE = 8
"""Databases worked on at a time, with up to three sessions each: what is waited for is connections and locks."""
NEWS = 10
"""Where nobody watches a bar, every so many databases are worth a line."""

_ResultT = TypeVar("_ResultT")
_NOT_BEGUN = "not begun"


@click.command()
@databases_option
@click.option("--plan", "only_plan", is_flag=True, help="Say what would change, and what it would wait for.")
@click.option("--sql", "as_sql", is_flag=True, help="Write the script of one database, for a DBA to run.")
@click.option("--schema-only", is_flag=True, help="Leave the triggers to your own migrations; tables may be missing.")
@click.option("--json", "as_json", is_flag=True, help="What changed, or would, as JSON.")
@pass_app
def migrate(
    app: App, names: tuple[str, ...], *, only_plan: bool, as_sql: bool, schema_only: bool, as_json: bool
) -> None:
    """Install schema cdc and make the triggers equal to the YAML, on every database.

    Each database is one transaction: all of it or nothing. One that fails does not stop the others. --plan and --sql
    change nothing and lock nothing.
    """
    if as_sql and (only_plan or as_json):
        raise click.UsageError("--sql goes with neither --plan nor --json")
    selected = app.select(names)
    if as_sql and len(selected) > 1:
        raise click.UsageError("a script is for one database: name it with -d")
    with app.places(selected) as places:
        if as_sql:
            _write_script(app, places, selected[0], schema_only=schema_only)
        elif only_plan:
            _show_plan(app, places, selected, schema_only=schema_only, as_json=as_json)
        elif migrate_all(app, places, selected, schema_only=schema_only, as_json=as_json):
            sys.exit(EXIT_FAILURE)


def migrate_all(
    app: App,
    places: dict[str, Place],
    names: list[str],
    *,
    schema_only: bool = False,
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
        schema_only: as for :func:`cdc.installer.migrate`.
        as_json: what changed as one JSON object.
        upgrade: as for :func:`cdc.installer.migrate`.
        triggers: as for :func:`cdc.installer.migrate`.
        all_on_stderr: stdout belongs to somebody else, such as a sink.

    Returns:
        database → why it was left as it was.

    Raises:
        SystemExit: interrupted; what has become of each database is on stderr.
    """

    def work(name: str) -> list[dict[str, str]]:
        changes = installer.migrate(
            name,
            app.config.databases[name],
            dsn=places[name].migrate_dsn,
            reader_dsn=places[name].dsn,
            sinks=inventory.sinks_of(app.config, name),
            on_wait=fleet.on_wait,
            upgrade=upgrade,
            triggers=triggers,
            schema_only=schema_only,
        )
        return [{"database": name, "subject": change.subject, "change": change.what} for change in changes]

    def tell(changes: list[dict[str, str]]) -> None:
        for change in changes if not as_json else ():
            fleet.say("{database}: {subject}: {change}".format_map(change), err=all_on_stderr)

    # Alembic's own command has one context for all of its databases.
    fleet = Fleet(names, work, tell, at_once=1 if upgrade else AT_ONCE)
    fleet.run()
    failed = fleet.failures(app)
    if as_json:
        changes = [change for result in fleet.results.values() for change in result]
        print_json({"changes": changes, "failed": failed})
    fleet.conclude(failed, "done", "failed, left as it was")
    return failed


class Fleet(Generic[_ResultT]):
    """Something done to many databases, a few at a time.

    Attributes:
        results: database → what came of it, in the order of the databases.
        errors: database → why nothing came of it.
        not_begun: those that were still to come when it was interrupted.
        interrupted: somebody has pressed Ctrl-C.
    """

    def __init__(
        self,
        names: Sequence[str],
        work: Callable[[str], _ResultT],
        tell: Callable[[_ResultT], None],
        *,
        at_once: int = AT_ONCE,
    ) -> None:
        """
        Args:
            names: the databases.
            work: does it to one, in a thread of its own.
            tell: says what came of it; called for one after the other in the order of `names`.
            at_once: how many at a time.
        """
        self.results: dict[str, _ResultT] = {}
        self.errors: dict[str, CdcError] = {}
        self.not_begun: set[str] = set()
        self.interrupted = False
        self._names = names
        self._work = work
        self._tell = tell
        self._at_once = at_once
        self._bar: Progress | None = None

    def run(self) -> None:
        """Do it to all of them, as far as it can be done."""
        with ThreadPoolExecutor(self._at_once, thread_name_prefix="database") as pool, self._progress() as on:
            futures = {name: pool.submit(self._work, name) for name in self._names}
            for future in futures.values():
                future.add_done_callback(on)
            for name, future in futures.items():
                while name not in {*self.results, *self.errors, *self.not_begun}:
                    try:
                        self._take(name, future)
                    except KeyboardInterrupt:
                        self._interrupt(futures)

    def say(self, line: str, *, err: bool = False) -> None:
        """Print a line; where there is a bar, above it."""
        if self._bar is not None and (sys.stderr if err else sys.stdout).isatty():
            self._bar.console.print(plain(line), soft_wrap=True)
        else:
            click.echo(line, err=err)

    def on_wait(self, line: str) -> None:
        """For :func:`cdc.installer.migrate`: say it, unless there is to be no other attempt."""
        if self.interrupted:
            raise InstallError("interrupted while it waited for a lock; nothing was changed")
        self.say(line, err=True)

    def failures(self, app: App) -> dict[str, str]:
        """Database → why nothing came of it, and what to do."""
        return {name: _with_cure(app, name, error) for name, error in self.errors.items()} | {
            name: _NOT_BEGUN for name in self._names if name in self.not_begun
        }

    def exit_code(self) -> int:
        """Of what failed: whether it was only the way there."""
        unreachable = all(isinstance(error, DatabaseUnreachable) for error in self.errors.values())
        return EXIT_UNREACHABLE if unreachable else EXIT_FAILURE

    def conclude(self, failed: Mapping[str, str], done: str, left: str) -> None:
        """Say on stderr what failed and, if anything did or it was interrupted, what has become of each database.

        Raises:
            SystemExit: interrupted.
        """
        for name in self.errors:
            click.echo(f"error: {name}: {failed[name]}", err=True)
        if self.interrupted or (failed and len(self._names) > 1):
            width = max(map(len, self._names))
            for name in self._names:
                state = done if name in self.results else left if name in self.errors else _NOT_BEGUN
                click.echo(f"{name:<{width}}  {state}", err=True)
        if self.interrupted:
            sys.exit(EXIT_INTERRUPTED)

    def _take(self, name: str, future: Future[_ResultT]) -> None:
        """Wait for what comes of one database, and tell it."""
        if future.cancelled():
            self.not_begun.add(name)
            return
        try:
            result = future.result()
        except CdcError as error:
            self.errors[name] = error
        else:
            self._tell(result)
            self.results[name] = result

    def _interrupt(self, futures: Mapping[str, Future[_ResultT]]) -> None:
        if self.interrupted:
            under_way = [name for name, future in futures.items() if not future.done()]
            self.say(
                f"error: left at once: {', '.join(under_way)}: done, or as it was (run this again to be sure)", err=True
            )
            if self._bar is not None:
                self._bar.stop()  # which shows the cursor again
            # The threads would be waited for. Nobody waits for the server: it undoes what was not committed.
            sys.stdout.flush()
            os._exit(EXIT_INTERRUPTED)
        self.interrupted = True
        for future in futures.values():
            future.cancel()
        self.say("interrupted: finishing what is under way; once more to leave at once", err=True)

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Callable[[object], None]]:
        """Show how far it has come: a bar where somebody watches, now and then a line elsewhere.

        Yields:
            what to call for each database that is through, from any thread.
        """
        total = len(self._names)
        if total > 1 and sys.stderr.isatty():
            columns = (TextColumn("databases"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            console = Console(stderr=True, highlight=False)
            # Lines go through say(): what click prints would not be caught.
            with Progress(
                *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
            ) as bar:
                self._bar = bar
                task = bar.add_task("", total=total)
                yield lambda _: bar.advance(task)
                self._bar = None
            return
        through, lock = 0, threading.Lock()

        def on(_: object) -> None:
            nonlocal through
            with lock:
                through += 1
                if through % NEWS == 0:
                    click.echo(f"{through} of {total} databases", err=True)

        yield on


def _with_cure(app: App, name: str, error: CdcError) -> str:
    if not isinstance(error, DatabaseUnreachable):
        return str(error)
    database = app.config.databases[name]
    key = "migrate_dsn" if database.migrate_dsn else "dsn" if database.dsn else "dsn_file"
    return f"{error} (start it or correct databases.{name}.{key}, see cdc check -d {name}; then run this again)"


# -- what it would take -----------------------------------------------------------------------------------------


def _write_script(app: App, places: dict[str, Place], name: str, *, schema_only: bool) -> None:
    place = places[name]
    text = planner.script(
        name,
        app.config.databases[name],
        dsn=place.migrate_dsn,
        reader_dsn=place.dsn,
        sinks=inventory.sinks_of(app.config, name),
        schema_only=schema_only,
    )
    print_data(text, nl=False)


def _show_plan(app: App, places: dict[str, Place], names: list[str], *, schema_only: bool, as_json: bool) -> None:
    def work(name: str) -> tuple[str, list[Step]]:
        place = places[name]
        steps = planner.plan(
            name,
            app.config.databases[name],
            dsn=place.migrate_dsn,
            reader_dsn=place.dsn,
            sinks=inventory.sinks_of(app.config, name),
            schema_only=schema_only,
        )
        return name, steps

    def tell(planned: tuple[str, list[Step]]) -> None:
        name, steps = planned
        for line in [] if as_json else [_line(step) for step in steps] or ["nothing to do"]:
            fleet.say(f"{name}: {line}")

    fleet = Fleet(names, work, tell)
    fleet.run()
    failed = fleet.failures(app)
    if as_json:
        changes = [{"database": name, **_as_json(step)} for name, steps in fleet.results.values() for step in steps]
        print_json({"changes": changes, "failed": failed})
    fleet.conclude(failed, "planned", "failed")
    if failed:
        sys.exit(fleet.exit_code())


def _line(step: Step) -> str:
    """One step of a plan, for people."""
    if step.lock is None:
        return f"{step.subject}: {step.what}"
    if step.size is None:
        return f"{step.subject}: {step.what} ({step.lock} on its tables)"
    size = "a size not to be had while it is locked" if step.size.bytes is None else byte_size(step.size.bytes)
    rows = "rows never counted" if step.size.rows is None else f"about {step.size.rows} rows"
    partitions = f", {step.size.partitions} partitions" if step.size.partitions else ""
    wait = {
        "none": "nobody is in the way",
        "moments": "a short wait for {}",
        "until they end": "waits for {}, {} times {:g} s at most",
    }[step.wait].format(", ".join(map(str, step.in_the_way)), installer.ATTEMPTS, installer.LOCK_TIMEOUT)
    return f"{step.subject}: {step.what} ({step.lock} on {size}, {rows}{partitions}; {wait})"


def _as_json(step: Step) -> dict[str, object]:
    shape: dict[str, object] = {"subject": step.subject, "change": step.what, "lock": step.lock}
    if step.size is not None:
        shape |= {
            "bytes": step.size.bytes,
            "estimated_rows": step.size.rows,
            "partitions": step.size.partitions,
            "expected_wait": step.wait,
            "in_the_way": [
                {
                    "pid": holder.pid,
                    "prepared": holder.prepared,
                    "application": holder.who,
                    "state": holder.state,
                    "age_seconds": None if holder.age is None else round(holder.age, 3),
                }
                for holder in step.in_the_way
            ],
        }
    return shape
