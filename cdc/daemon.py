"""The daemon: one listener, one keeper and one thread per sink for every database, until told to stop.

Starting fails fast: every database is tried once, and a reason no waiting mends (not migrated, no right, a standby)
ends the start. A database that cannot be reached is waited for as long as another one can be served. From then on
everything heals by itself and says so in the log.

Stopping: the first signal drains (each pipeline finishes and acknowledges the batch in its hands), the second one
ends the process at once; what was not acknowledged is delivered again by the next start. A sink that does not return
is waited for no longer than `stop_timeout`.

Reloading (SIGHUP): the configuration is read again, and what runs is made equal to it. A pipeline whose configuration
did not change goes on undisturbed. One whose did finishes the batch in its hands under the old one, and only once its
thread has ended the new one begins: two of one daemon would fence each other off. A configuration that is wrong changes
nothing, and the log says why. A database that cannot be served yet (not migrated, not reachable) is taken in all the
same: its threads try on, and say so.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import FrameType

from cdc import diagnosis, health, inventory, listener, outbox
from cdc.bell import Bell
from cdc.config import Config, DatabaseConfig
from cdc.connection import Connection
from cdc.errors import CdcError, DatabaseUnreachable, NotInstalled, WrongCluster
from cdc.event import Event
from cdc.fleet import Database, Fleet
from cdc.formats import encoder
from cdc.keeper import Keeper
from cdc.listener import Listener
from cdc.metrics import SAMPLE_INTERVAL, Meter
from cdc.outbox import Owner
from cdc.pipeline import Pipeline
from cdc.rowmodel import Validate
from cdc.sinks import create
from cdc.systemd import Notifier

log = logging.getLogger(__name__)

IDLE_CHECK_INTERVAL = 0.05
ALIVE_INTERVAL = 1.0
"""Seconds between looks at the threads; a third of systemd's watchdog at least, which wants to be fed."""
CONVERGE_INTERVAL = 0.1
"""Seconds between looks whether a pipeline has ended that another one is to follow."""
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """A configuration, and what it leads to.

    Attributes:
        config: the whole of it.
        dsns: database name → how to reach it.
        validators: database name → what its events have to pass; see :func:`cdc.rowmodel.load_all`.
    """

    config: Config
    dsns: Mapping[str, str]
    validators: Mapping[str, Validate] = field(default_factory=dict)

    def database(self, name: str) -> Database:
        """One of its databases, with nothing running for it yet."""
        sinks = inventory.sinks_of(self.config, name)
        return Database(name, self.dsns[name], self.config.databases[name], sinks, self.validators.get(name))


class Daemon:
    """Everything that runs for one configuration."""

    def __init__(
        self,
        plan: Plan,
        *,
        on_delivered: Callable[[str, Sequence[Event]], None] | None = None,
        reread: Callable[[], Plan] | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        """
        Args:
            plan: what is to run.
            on_delivered: told the sink's name and the events, after each delivery, in the pipeline's thread.
            reread: makes the plan anew for a reload, or raises ConfigError; None: there is no reloading.
            notifier: to systemd.
        """
        self._on_delivered = on_delivered
        self._reread = reread
        self._notifier = notifier or Notifier()
        self._stop = threading.Event()
        self._signal: int | None = None
        self._hung_up = False
        self._nudge_read, self._nudge_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._owner = Owner(f"{socket.gethostname()}:{os.getpid()}", secrets.randbits(31))
        self.stuck: Sequence[str] = ()
        """The pipelines that had not ended when the daemon did: their sinks hang."""
        self._left: list[Database] = []  # databases a reload has removed, as long as a pipeline of theirs lives
        self._sample_at = 0.0
        self._hanging: set[str] = set()
        self._wanted = [plan.database(name) for name in plan.config.databases]
        self.fleet = Fleet(plan.config, self._owner.name)

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, *, until_idle: bool = False) -> None:
        """Serve until stopped, or until everything committed before the start is delivered.

        Raises:
            DatabaseUnreachable: no database could be reached at the start (with until_idle: not all of them).
            CdcError: a database cannot be served; with until_idle: a sink that is behind has stopped for good; no
                pipeline is left, and not because sinks have stopped; or some have not ended in time.
        """
        unreachable: list[str] = []
        for database, error in self._prepare_all(self._wanted):
            if isinstance(error, DatabaseUnreachable):
                unreachable.append(f"{database.name}: {error}")
            elif error is not None:
                raise type(error)(f"{database.name}: {error}")
        if unreachable and (until_idle or len(unreachable) == len(self._wanted)):
            raise DatabaseUnreachable("; ".join(unreachable))
        for line in unreachable:
            log.warning("A database cannot be reached; waiting for it.", extra={"fields": {"error": line}})
        spare_the_collector()
        self.fleet.databases = {database.name: database for database in self._wanted}
        for database in self._wanted:
            self._start(database)
        self._converge()
        self._notifier.ready(self._summary())
        try:
            if until_idle:
                self._wait_until_idle()
            else:
                self._wait()
        finally:
            self._notifier.stopping()
            self.stop()
            self._join()
        if self.stuck:
            raise CdcError(
                f"not ended within stop_timeout: {', '.join(self.stuck)} (the sink hangs; what it has in hand is "
                "delivered again)"
            )

    def stop(self) -> None:
        """Begin to drain; returns at once. May be called from any thread."""
        self._stop.set()
        with contextlib.suppress(BlockingIOError):
            os.write(self._nudge_write, b"!")
        for pipeline in self.fleet.pipelines():
            pipeline.stop()
        for database in self.fleet.databases.values():
            if database.listener is not None:
                database.listener.stop()

    def handle_signals(self) -> None:
        """Let SIGTERM and SIGINT drain, and end the process when they come again; let SIGHUP reload."""

        # It runs in the middle of whatever the main thread is doing, which may hold any lock: so it takes none.
        def on_signal(number: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                os.write(2, b"second signal: ending now\n")
                os._exit(128 + number)
            self._signal = number
            nudge()

        def on_hangup(number: int, frame: FrameType | None) -> None:
            self._hung_up = True
            nudge()

        def nudge() -> None:
            with contextlib.suppress(BlockingIOError):  # full: it has been nudged often enough
                os.write(self._nudge_write, b"!")

        if self._reread is not None:
            signal.signal(signal.SIGHUP, on_hangup)
        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)

    def _prepare_all(self, databases: Sequence[Database]) -> list[tuple[Database, CdcError | None]]:
        """Prepare each, with what stands in the way of serving it; one that does not answer holds up no other."""

        def attempt(database: Database) -> CdcError | None:
            try:
                self._prepare(database)
            except CdcError as error:
                return error
            return None

        with ThreadPoolExecutor(max_workers=_AT_ONCE, thread_name_prefix="start") as pool:
            return list(zip(databases, pool.map(attempt, databases), strict=True))

    def _prepare(self, database: Database) -> None:
        """Look whether a database can be served, and make its sinks known to it."""
        with Connection(database.dsn, purpose="start") as connection:
            check_revision(connection)
            if connection.pooled and not listener.hears_itself(connection, database.options.channel, database.dsn):
                raise CdcError(
                    f"{listener.DEAF}, and who serves a sink is kept by a session too, whatever notify says "
                    f"({listener.DEAF_CURE})"
                )
            if moved := outbox.moved_sinks(connection):
                raise WrongCluster(f"{outbox.ELSEWHERE}: {', '.join(moved)} ({outbox.ELSEWHERE_CURE})")
            for sink, start in database.sinks.items():
                if outbox.register_sink(connection, sink, start=start):
                    log.info(
                        "A new sink begins.",
                        extra={"fields": {"database": database.name, "sink": sink, "start": start}},
                    )
            database.target = outbox.current_snapshot(connection)

    def _start(self, database: Database) -> None:
        """Start what a database needs besides pipelines."""
        options = database.options
        database.bell = Bell(options.notify)
        database.keeper = Keeper(
            database.dsn,
            database=database.name,
            process=self._owner.process,
            retention=options.retention,
            alarm=options.outbox_alarm,
            find_drift=lambda connection: diagnosis.find_drift(connection, database.options),
            watch=lambda connection: _watch(database, connection),
            others_silent_for=lambda: _silent_for(database),
            clock=database.clock,
        )
        if options.notify != "off":
            database.listener = Listener(
                database.dsn,
                database=database.name,
                channel=options.channel,
                bell=database.bell,
                stop=threading.Event(),
                process=self._owner.process,
                is_ephemeral=functools.lru_cache(options.is_ephemeral) if options.has_ephemeral else None,
            )
        for thread in (database.keeper, database.listener):
            if thread is not None:
                thread.start()

    def _converge(self) -> None:
        """Start the pipelines there should be and are not, once nobody is left who serves their sinks."""
        self.fleet.leaving = leaving = [pipeline for pipeline in self.fleet.leaving if pipeline.is_alive()]
        busy = {(pipeline.database, pipeline.sink) for pipeline in leaving}
        for database in self.fleet.databases.values():
            for name in database.sinks:
                if name not in database.pipelines and (database.name, name) not in busy:
                    pipeline = self._pipeline(database, name)
                    database.pipelines = {**database.pipelines, name: pipeline}
                    pipeline.start()
        for database in self._left[:]:
            # Its keeper speaks for its pipelines, to the last.
            if not any(name == database.name for name, _ in busy):
                self._left.remove(database)
                if database.keeper is not None:
                    database.keeper.stop()

    def _pipeline(self, database: Database, name: str) -> Pipeline:
        options = self.fleet.config.sinks[name]
        told = self._on_delivered
        return Pipeline(
            database.dsn,
            database=database.name,
            sink=create(name, options, encoder(options.format, options.binding)),
            bell=database.bell,
            stop=threading.Event(),
            owner=self._owner,
            meter=Meter(database.clock),
            on_delivered=(lambda events: told(name, events)) if told else None,
            validate=database.validate,
        )

    # -- reloading ----------------------------------------------------------------------------------------------

    def _reload(self) -> None:
        """Read the configuration again, and make what runs equal to it; a wrong one changes nothing."""
        assert self._reread is not None  # noqa: S101  # the signal is not handled otherwise
        self._notifier.reloading()
        try:
            plan = self._reread()
        except CdcError as error:
            self.fleet.reload_error = str(error)
            for line in str(error).splitlines():
                log.error("The configuration was not reloaded; the old one stays.", extra={"fields": {"error": line}})
        else:
            self._apply(plan)
        self._notifier.ready(self._summary())

    def _apply(self, plan: Plan) -> None:
        config = plan.config
        before, self.fleet.config = self.fleet.config, config
        databases = dict(self.fleet.databases)
        changed: list[str] = []
        for name, database in self.fleet.databases.items():
            options = config.databases.get(name)
            if options is None or plan.dsns[name] != database.dsn or not _can_stay(database.options, options):
                changed.append(name)
                del databases[name]
                self._dismiss(database, database.pipelines)
                if database.listener is not None:
                    database.listener.stop()
                self._left.append(database)
                continue
            other_models = _models(database.options) != _models(options)
            database.options, database.validate = options, plan.validators.get(name)
            if database.keeper is not None:
                database.keeper.retention, database.keeper.alarm = options.retention, options.outbox_alarm
            sinks = inventory.sinks_of(config, name)
            old = [s for s in database.sinks if other_models or s not in sinks or config.sinks[s] != before.sinks[s]]
            changed += [
                f"{name}/{sink}" for sink in dict.fromkeys([*old, *(s for s in sinks if s not in database.sinks)])
            ]
            database.sinks = sinks
            self._dismiss(database, old)
        added = [plan.database(name) for name in config.databases if name not in databases]
        changed += [database.name for database in added if database.name not in changed]
        for database, error in self._prepare_all(added):
            if error is not None:
                fields = {"database": database.name, "error": str(error)}
                log.error("A database cannot be served yet; trying on.", extra={"fields": fields})
        for database in added:
            databases[database.name] = database
        # In the order of the configuration; replaced as a whole, for it is read by others.
        self.fleet.databases = {name: databases[name] for name in config.databases}
        for database in added:
            self._start(database)
        self.fleet.reload_error, self.fleet.reloaded_at = None, time.time()
        log.info("The configuration was reloaded.", extra={"fields": {"changed": ", ".join(changed) or "nothing"}})
        self._converge()

    def _dismiss(self, database: Database, sinks: Collection[str]) -> None:
        """Let pipelines finish what they have in hand, and end."""
        gone = [pipeline for name, pipeline in database.pipelines.items() if name in sinks]
        database.pipelines = {name: kept for name, kept in database.pipelines.items() if kept not in gone}
        self.fleet.leaving = [*self.fleet.leaving, *gone]
        for pipeline in gone:
            pipeline.stop()

    # -- waiting ------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        while not self._pause(self._interval()):
            if self._hung_up:
                self._hung_up = False
                self._reload()
            self._tick()

    def _interval(self) -> float:
        if self.fleet.leaving:  # their successors wait for them
            return CONVERGE_INTERVAL
        return min(ALIVE_INTERVAL, (self._notifier.watchdog or 60.0) / 3)

    def _pause(self, seconds: float) -> bool:
        """Wait in the main thread, unless told to stop; returns whether that has happened."""
        if select.select([self._nudge_read], [], [], 0 if self._stop.is_set() else seconds)[0]:
            os.read(self._nudge_read, 64)
        if self._signal is not None and not self._stop.is_set():
            name = signal.Signals(self._signal).name
            log.info("Draining; a second signal ends at once.", extra={"fields": {"signal": name}})
            self.stop()
        return self._stop.is_set()

    def _tick(self) -> None:
        """What the main thread does every second or so."""
        self._converge()
        self._check_alive()
        self._feed_watchdog()
        now = time.monotonic()
        if now >= self._sample_at:
            self._sample_at = now + SAMPLE_INTERVAL
            for database in self.fleet.databases.values():
                for pipeline in database.pipelines.values():
                    pipeline.meter.sample(*(health.backlog(database, pipeline) or (None, None)))
            self._notifier.status(self._summary())

    def _feed_watchdog(self) -> None:
        hanging = {pipeline.name for pipeline in health.hanging(self.fleet)}
        for name in hanging - self._hanging:
            log.error("A pipeline's thread hangs; the watchdog is not fed.", extra={"fields": {"pipeline": name}})
        self._hanging = hanging
        if not hanging:
            self._notifier.lives()

    def _summary(self) -> str:
        """One line for systemd."""
        pipelines = self.fleet.pipelines()
        states = [pipeline.state for pipeline in pipelines]
        told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "no sinks"
        refused = "; the last reload was refused" if self.fleet.reload_error else ""
        return f"{len(self.fleet.databases)} databases; sinks: {told}{refused}"

    def _wait_until_idle(self) -> None:
        for database in self.fleet.databases.values():
            while database.sinks and not self._stop.is_set():
                try:
                    with Connection(database.dsn, purpose="until-idle") as connection:
                        while self._is_behind(database, connection) and not self._pause(IDLE_CHECK_INTERVAL):
                            self._tick()
                    break
                except DatabaseUnreachable:
                    self._pause(ALIVE_INTERVAL)

    def _is_behind(self, database: Database, connection: Connection) -> bool:
        behind = outbox.sinks_behind(connection, list(database.sinks), database.target or "")
        for pipeline in database.pipelines.values():
            if pipeline.sink in behind and pipeline.stopped_because:
                raise CdcError(f"{pipeline.name}: {pipeline.stopped_because}")
            if pipeline.sink in behind and pipeline.state == "paused":
                raise CdcError(f"{pipeline.name}: paused (cdc sinks resume {pipeline.sink})")
        return bool(behind)

    def _check_alive(self) -> None:
        """Raise when no pipeline is left, and a new start may heal that.

        A sink that has stopped is not healed by one: it waits for somebody, and is there to be seen until then.
        """
        pipelines = self.fleet.pipelines()
        if any(pipeline.is_alive() for pipeline in pipelines):
            return
        if ended := [pipeline.name for pipeline in pipelines if not pipeline.stopped_because]:
            raise CdcError(f"ended as they should not: {', '.join(ended)}")

    def _join(self) -> None:
        ends = time.monotonic() + self.fleet.config.stop_timeout
        databases = [*self.fleet.databases.values(), *self._left]
        pipelines = [*self.fleet.pipelines(), *self.fleet.leaving]
        for thread in (*pipelines, *(database.listener for database in databases)):
            if thread is not None:
                thread.join(max(0.0, ends - time.monotonic()))
        for database in databases:
            if database.keeper is not None:
                database.keeper.stop()
        self.stuck = [pipeline.name for pipeline in pipelines if pipeline.is_alive()]
        if self.stuck:
            log.error("Ending without sinks that hang.", extra={"fields": {"pipelines": ", ".join(self.stuck)}})


def _watch(database: Database, connection: Connection) -> None:
    for pipeline in list(database.pipelines.values()):
        pipeline.note_stall(connection)


def _silent_for(database: Database) -> float:
    """Seconds since the database last answered its pipelines and its listener."""
    silences = [pipeline.silent_for() for pipeline in list(database.pipelines.values())]
    if database.listener is not None:
        silences.append(time.monotonic() - database.listener.heard_at)
    return min(silences, default=float("inf"))


def spare_the_collector() -> None:
    """Look for garbage in cycles less often: events come and go by the thousand and are in no cycle.

    What is there by now stays for good: looking at it again and again took a tenth of the CPU of reading a backlog.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _can_stay(before: DatabaseConfig, after: DatabaseConfig) -> bool:
    """Whether what runs for a database can go on when its configuration becomes another, given the same dsn.

    What the triggers do is for `cdc migrate`; what matters to listener and pipelines is who rings, and how.
    """
    ephemeral = [
        {pattern: table.delivery for pattern, table in options.tables.items()} if options.has_ephemeral else None
        for options in (before, after)
    ]
    return (before.notify, before.channel, ephemeral[0]) == (after.notify, after.channel, ephemeral[1])


def _models(options: DatabaseConfig) -> dict[str, tuple[str, str]]:
    """What :mod:`cdc.rowmodel` holds rows against. (The classes of a module that was imported stay as they were.)"""
    return {pattern: (table.model, table.image) for pattern, table in options.tables.items() if table.model}


def check_revision(connection: Connection) -> None:
    """Whether this program and the database's schema belong together.

    Raises:
        NotInstalled: no schema, or one of another revision.
    """
    installed, wanted = inventory.installed_revision(connection), inventory.head()
    if installed is None:
        raise NotInstalled("cdc is not installed in this database (run `cdc migrate`)")
    if installed != wanted:
        raise NotInstalled(f"schema cdc is at revision {installed}, this program needs {wanted} (run `cdc migrate`)")
