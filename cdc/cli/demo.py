"""cdc demo: the tour in one command.

A private PostgreSQL, a small shop in it, migrate, run, and every change on the screen. Nothing is staged: the
configuration is a file, installed and served by the code of `cdc migrate` and `cdc run`, and a ledger checks what was
delivered against what was committed.

The first Ctrl-C stops the shop, waits until everything is delivered, and sums up; the second one skips the wait and
still tidies up; the third leaves everything where it is.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import TextIOWrapper
from itertools import groupby
from pathlib import Path
from random import Random
from types import FrameType

import click
from rich.console import Console
from rich.text import Text

from cdc import config as configuration
from cdc import embedded, installer, inventory
from cdc.cli import screen
from cdc.cli.logs import set_up_logging
from cdc.cli.workload import TABLES, Ledger, Shop, Workload
from cdc.config import Config
from cdc.connection import Connection
from cdc.daemon import Daemon, Plan
from cdc.errors import CdcError
from cdc.event import Event, Op
from cdc.sinks import option_models
from cdc.sql import QUERIES

READY_DEADLINE = 5.0
"""Seconds until the daemon should be listening; the shop opens after that in any case."""
DRAIN_DEADLINE = 15.0
"""Seconds to wait at the end for changes that have not arrived."""
TICK = 0.05
"""Seconds between looks at the clock and at signals while nothing arrives."""

_CONFIG = """\
# Written by `cdc demo`. Of your own you need no more than this: a dsn, tables, and a sink.
databases:
  shop:
    dsn: {dsn}
    tables:
      "public.*": {{}}
sinks:
  files:
    type: file
    path: {path}
"""


@click.command()
@click.option("--seconds", type=click.IntRange(min=0), default=20, show_default=True, help="How long; 0: until Ctrl-C.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Leave everything there: an absent or empty directory. Default: a temporary one, removed at the end.",
)
@click.option(
    "--rate",
    type=click.IntRange(1, 10_000),
    default=20,
    show_default=True,
    metavar="CHANGES/S",
    help="How busy the shop is.",
)
@click.option("--json", "as_json", is_flag=True, help="The events as JSON Lines, and nothing else, on stdout.")
@click.pass_context
def demo(context: click.Context, seconds: int, directory: Path | None, rate: int, as_json: bool) -> None:
    """Show it all: a private PostgreSQL, a busy little shop, migrate, run.

    Needs no configuration and touches nothing of yours. Ctrl-C ends it.
    """
    chosen = context.find_root().params
    set_up_logging(chosen.get("log_level") or "warning", chosen.get("log_format") or "text")
    tour = _Tour(seconds, rate, as_json)
    try:
        with tour.interrupts.handled(), _directory(directory, tour) as place:
            complete = tour.run(place)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if not complete:
        sys.exit(1)


class _Interrupts:
    """Signals, counted: the first asks for the end, the second raises KeyboardInterrupt, the third ends the process.

    Attributes:
        count: how many have come.
        patient: something starts or stops, which ends by itself and leaves a mess when it is interrupted (the
            children of a killed initdb go on writing); the second signal is then only counted.
    """

    def __init__(self) -> None:
        self.count = 0
        self.patient = True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 2 and not self.patient:
            raise KeyboardInterrupt
        if self.count > 2:
            os._exit(128 + number)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """In here nobody has to be patient."""
        self.patient = False
        try:
            yield
        finally:
            self.patient = True

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle SIGINT, SIGTERM and, unless somebody (nohup) wants it ignored, SIGHUP here."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where everything is.

    Attributes:
        temporary: it is removed at the end.
    """

    directory: Path
    temporary: bool

    @property
    def config(self) -> Path:
        return self.directory / "config.yaml"

    @property
    def server(self) -> Path:
        return self.directory / "postgres"

    @property
    def out(self) -> Path:
        return self.directory / "out"


@contextmanager
def _directory(chosen: Path | None, tour: _Tour) -> Iterator[_Place]:
    """The directory of the demo; a temporary one is removed again, unless somebody still uses the server in it."""
    if set("{}") & set(str(chosen or tempfile.gettempdir())):
        raise CdcError("braces in a path would be placeholders of the file sink (name another with --directory)")
    try:
        if chosen is None:
            place = _Place(Path(tempfile.mkdtemp(prefix="cdc-demo-")).resolve(), temporary=True)
        else:
            place = _Place(_chosen(chosen), temporary=False)
        if os.geteuid() == 0 and place.directory.stat().st_uid == 0 and place.temporary:
            place.directory.chmod(0o711)  # another user runs PostgreSQL in root's stead, and has to get there
    except OSError as error:
        raise CdcError(f"cannot use the directory: {error} (name another with --directory)") from None
    try:
        yield place
    finally:
        if place.temporary and (place.server / "data" / "postmaster.pid").exists():
            tour.say(f"Somebody else still uses the server in {place.directory}: it is left there.")
        elif place.temporary:
            shutil.rmtree(place.directory, ignore_errors=True)


def _chosen(directory: Path) -> Path:
    directory = directory.expanduser().resolve()
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise CdcError(f"{directory} is not empty (name a directory that does not exist yet, or remove this one)")
    return directory


class _Served(threading.Thread):
    """The daemon's thread; what it raises is kept for the main thread."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(name="daemon", daemon=True)
        self.error: BaseException | None = None
        self._served = daemon

    def run(self) -> None:
        try:
            self._served.run()
        except BaseException as error:  # noqa: BLE001 - raised again by the main thread
            self.error = error


@dataclass(slots=True)
class _Tour:
    """One run of the demo, from the main thread: it prints, waits and counts; the others work.

    Attributes:
        seconds: how long the shop is open, 0 for ever.
        rate: changes per second to aim at.
        as_json: events on stdout in the native format.
    """

    seconds: int
    rate: int
    as_json: bool
    interrupts: _Interrupts = field(default_factory=_Interrupts)
    _began: float = field(default_factory=time.monotonic)
    _out: Console = field(default_factory=lambda: _console(stderr=False))
    _talk: Console = field(default_factory=lambda: _console(stderr=True))
    _ledger: Ledger = field(default_factory=Ledger)
    _delivered: queue.SimpleQueue[tuple[datetime, Sequence[Event]]] = field(default_factory=queue.SimpleQueue)
    _latencies: array[float] = field(default_factory=lambda: array("d"))

    # -- the steps ----------------------------------------------------------------------------------------------

    def run(self, place: _Place) -> bool:
        """Everything.

        Returns:
            Whether all that was committed was delivered, and nothing else.

        Raises:
            CdcError: with the cause.
            KeyboardInterrupt: at the second signal.
        """
        self._step(f"starting a private PostgreSQL in {place.server}")
        with embedded.start(place.server) as server:
            self._step(f"PostgreSQL {server.version} is up")
            return self._serve(server, place)

    def _serve(self, server: embedded.EmbeddedServer, place: _Place) -> bool:
        if self._asked_to_stop():
            self._step("stopped before the shop was open")
            return True
        dsn = server.dsn()
        with Connection(dsn, purpose="demo", source=False) as connection:
            Shop(connection, Random()).furnish()  # noqa: S311 - nothing secret is drawn here
        self._step(f"a small shop is in it: tables {', '.join(TABLES)}")
        config = self._configure(place)
        self._step(f"configuration written: {place.config}")
        changes = installer.migrate(
            "shop",
            config.databases["shop"],
            dsn=dsn,
            reader_dsn=dsn,
            sinks=inventory.sinks_of(config, "shop"),
            on_wait=self.say,
        )
        for what, group in groupby(changes, lambda change: change.what):
            self._step(f"cdc migrate: {', '.join(change.subject for change in group)}: {what}")
        if self._asked_to_stop():
            self._step("stopped before the shop was open")
            return True
        return self._watch(
            Daemon(Plan(config, {"shop": dsn}), on_delivered=self._take), dsn, place, server.bindir / "psql"
        )

    def _configure(self, place: _Place) -> Config:
        dsn, path = f"embedded:{place.server}", str(place.out / "{table}.jsonl")
        try:
            place.config.write_text(
                # JSON strings are YAML strings.
                _CONFIG.format(dsn=json.dumps(dsn, ensure_ascii=False), path=json.dumps(path, ensure_ascii=False)),
                encoding="utf-8",
            )
        except OSError as error:
            raise CdcError(f"cannot write {place.config}: {error.strerror}") from None
        return configuration.load(place.config, option_models(), os.environ)

    def _watch(self, daemon: Daemon, dsn: str, place: _Place, psql: Path) -> bool:
        served = _Served(daemon)
        workload = Workload(dsn, rate=self.rate, ledger=self._ledger, random=Random())  # noqa: S311 - as above
        with ExitStack() as stack:
            stack.callback(served.join, 3.0)
            stack.callback(daemon.stop)
            stack.callback(workload.stop)
            served.start()
            self._wait_until_listening(dsn, served)
            until = f"for {self.seconds} s; Ctrl-C ends it earlier" if self.seconds else "until Ctrl-C"
            self._step(f"cdc run: listening; the shop is open at about {self.rate} changes/s, {until}")
            self._step(f"join in, if you like: {shlex.quote(str(psql))} {_double_quoted(dsn)}\n")
            opened = time.monotonic()
            workload.start()
            with self.interrupts.raised():
                self._follow(workload, served, until=opened + self.seconds if self.seconds else None)
                workload.join()
                open_for = time.monotonic() - opened
                self._drain(served)
        if served.is_alive():
            self.say("The daemon did not stop in time.")
        return self._sum_up(open_for, place)

    def _wait_until_listening(self, dsn: str, served: _Served) -> None:
        """So that the first latencies tell of delivery, and not of the daemon's start."""
        deadline = time.monotonic() + READY_DEADLINE
        with Connection(dsn, purpose="demo") as connection:
            while not connection.query(QUERIES["armed"])[0][0] and time.monotonic() < deadline:
                self._check(served)
                time.sleep(TICK)

    def _take(self, sink: str, events: Sequence[Event]) -> None:
        """Called by the pipeline after a delivery: the clock is read here, before anything is printed."""
        self._delivered.put((datetime.now(UTC), events))

    def _follow(self, workload: Workload, served: _Served, *, until: float | None) -> None:
        """Print what arrives until the time is over, or somebody asks for the end."""
        while workload.is_alive():
            self._show_next(TICK)
            self._check(served)
            if (until is not None and time.monotonic() >= until) or self._asked_to_stop():
                workload.stop()
        if workload.error is not None:
            raise CdcError(f"the sample shop cannot go on: {workload.error}")

    def _drain(self, served: _Served) -> None:
        deadline = time.monotonic() + DRAIN_DEADLINE
        while self._show_next(TICK) or (self._ledger.missing() and time.monotonic() < deadline):
            self._check(served)

    def _show_next(self, timeout: float) -> bool:
        """Print the next delivery; False when none came in time."""
        try:
            at, events = self._delivered.get(timeout=timeout)
        except queue.Empty:
            return False
        for event in events:
            self._ledger.arrived(event)
            self._latencies.append((at - event.source.ts).total_seconds() * 1000)
            self._show(event)
        return True

    def _check(self, served: _Served) -> None:
        if served.error is not None:
            raise served.error

    def _asked_to_stop(self) -> bool:
        return self.interrupts.count > 0

    # -- the screen ---------------------------------------------------------------------------------------------

    def _show(self, event: Event) -> None:
        if self.as_json:
            click.echo(event.to_json().encode())
        elif self._out.is_terminal:
            self._out.print(screen.line(event), no_wrap=True, overflow="ellipsis")
        else:
            self._out.print(screen.line(event), soft_wrap=True)

    def _step(self, what: str) -> None:
        self.say(Text.assemble((f"{time.monotonic() - self._began:5.1f} s  ", "dim"), what))

    def say(self, line: str | Text) -> None:
        """One line on stderr; that nobody reads it any more must not keep us from tidying up."""
        with suppress(OSError):
            self._talk.print(line, soft_wrap=True)

    def _sum_up(self, open_for: float, place: _Place) -> bool:
        console = self._talk if self.as_json else self._out
        ledger, missing = self._ledger, self._ledger.missing()
        phantoms, repeats, foreign = ledger.phantoms(), ledger.repeats(), ledger.foreign()
        verdict = Text()
        if missing:
            what = ", ".join(f"{count} {op.value} of {table}" for (table, op), count in missing.items())
            verdict.append(f"{missing.total()} of {ledger.changes} changes were not delivered: {what}", "bold red")
        else:
            verdict.append(f"all {ledger.changes} changes delivered", "bold green")
        if phantoms:
            verdict.append(f"; {phantoms} more, from transactions that were rolled back", "bold red")
        if repeats:
            verdict.append(f"; {repeats} of them more than once")
        if foreign:
            verdict.append(f"; and {foreign} that somebody else made")
        work = f"{_many(ledger.changes, 'change')} in {_many(ledger.transactions, 'transaction')}, {open_for:.1f} s"
        if ledger.rollbacks:
            work += f"; {_many(ledger.rollbacks, 'transaction')} rolled back"
        rows = {
            "committed": Text(work),
            "delivered": Text.assemble(verdict, f" ({_listed(ledger.arrivals)})" if ledger.arrivals else ""),
        }
        if self._latencies:
            rows["latency"] = Text(f"{_percentiles(self._latencies)}, from the trigger to the line being on disk")
        rows["files"] = Text(f"{_weighed(place.out)} in {place.out}")
        if place.temporary:
            rows["files"].append(" (removed now; --directory DIR keeps everything)")
            begin = "write a config.yaml for a database of yours (cdc demo --directory DIR leaves one to start from)"
        else:
            begin = f"write a config.yaml for a database of yours, beginning with {place.config}"
        rows["next"] = Text(begin)
        rows[""] = Text("cdc migrate && cdc run")
        console.print()
        for name, text in rows.items():
            console.print(Text.assemble((f"{name:<11}", "bold"), text), soft_wrap=True)
        return not missing and not phantoms


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="replace")  # a terminal that cannot show an arrow is no reason to end
    return Console(
        stderr=stderr,
        highlight=False,
        markup=False,
        emoji=False,
        color_system=None if os.environ.get("NO_COLOR") else "auto",  # not even bold
    )


def _double_quoted(text: str) -> str:
    """A shell word; unlike shlex.quote, readable where the text has single quotes."""
    return '"' + re.sub(r'(["$`\\])', r"\\\1", text) + '"'


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _weighed(directory: Path) -> str:
    """How much is there: ``402 lines in 4 files``."""
    lines = 0
    paths = sorted(directory.glob("*.jsonl"))
    for path in paths:
        with path.open("rb") as file:
            lines += sum(1 for _ in file)
    return f"{_many(lines, 'line')} of {_many(len(paths), 'file')}"


def _listed(arrivals: Counter[Op]) -> str:
    return ", ".join(f"{arrivals[op]} {op.value}" for op in Op if arrivals[op])


def _percentiles(values: array[float]) -> str:
    ordered = sorted(values)
    found = {p: ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 95, 99)}
    return " · ".join(f"p{p} {value:.1f} ms" for p, value in found.items())
