"""The daemon: one listener, one keeper and one thread per sink for every database, until told to stop.

Starting fails fast: every database is tried once, and a reason no waiting mends (not migrated, no right, a standby)
ends the start. A database that cannot be reached is waited for as long as another one can be served. From then on
everything heals by itself and says so in the log.

Stopping: the first signal drains (each pipeline finishes and acknowledges the batch in its hands), the second one
ends the process at once; what was not acknowledged is delivered again by the next start. A sink that does not return
is waited for no longer than `stop_timeout`.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, MappingProxyType

from cdc import diagnosis, installer, listener, outbox
from cdc.bell import Bell
from cdc.config import Config, DatabaseConfig
from cdc.connection import Connection
from cdc.errors import CdcError, DatabaseUnreachable, NotInstalled, WrongCluster
from cdc.event import Event
from cdc.formats import FORMATS
from cdc.keeper import Keeper
from cdc.listener import Listener
from cdc.outbox import Owner
from cdc.pipeline import Pipeline
from cdc.rowmodel import Validate
from cdc.sinks import create

log = logging.getLogger(__name__)

IDLE_CHECK_INTERVAL = 0.05
ALIVE_INTERVAL = 1.0


@dataclass(slots=True)
class _Database:
    """What runs for one database."""

    name: str
    dsn: str
    options: DatabaseConfig
    sinks: dict[str, str]
    listener: Listener | None = None
    keeper: Keeper | None = None
    pipelines: Sequence[Pipeline] = ()
    target: str | None = None
    """Where ``--until-idle`` is to get to: the position at the start."""


class Daemon:
    """Everything that runs for one configuration."""

    def __init__(
        self,
        config: Config,
        dsns: Mapping[str, str],
        *,
        validators: Mapping[str, Validate] = MappingProxyType({}),
        on_delivered: Callable[[str, Sequence[Event]], None] | None = None,
    ) -> None:
        """
        Args:
            config: the whole configuration.
            dsns: database name → how to reach it.
            validators: database name → what its events have to pass; see :func:`cdc.rowmodel.load_all`.
            on_delivered: told the sink's name and the events, after each delivery, in the pipeline's thread.
        """
        self._config = config
        self._validators = validators
        self._on_delivered = on_delivered
        self._stop = threading.Event()
        self._signal: int | None = None
        self._nudge_read, self._nudge_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._owner = Owner(f"{socket.gethostname()}:{os.getpid()}", secrets.randbits(31))
        self.stuck: Sequence[str] = ()
        """The pipelines that had not ended when the daemon did: their sinks hang."""
        self._databases = [
            _Database(name, dsns[name], options, installer.sinks_of(config, name))
            for name, options in config.databases.items()
        ]

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, *, until_idle: bool = False) -> None:
        """Serve until stopped, or until everything committed before the start is delivered.

        Raises:
            DatabaseUnreachable: no database could be reached at the start (with until_idle: not all of them).
            CdcError: a database cannot be served, every sink has stopped for good, or some have not ended in time.
        """
        unreachable: list[str] = []
        for database in self._databases:
            try:
                self._prepare(database)
            except DatabaseUnreachable as error:
                unreachable.append(f"{database.name}: {error}")
            except CdcError as error:
                raise type(error)(f"{database.name}: {error}") from None
        if unreachable and (until_idle or len(unreachable) == len(self._databases)):
            raise DatabaseUnreachable("; ".join(unreachable))
        for line in unreachable:
            log.warning("A database cannot be reached; waiting for it.", extra={"fields": {"error": line}})
        spare_the_collector()
        for database in self._databases:
            self._start(database)
        try:
            if until_idle:
                self._wait_until_idle()
            else:
                self._wait()
        finally:
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
        for database in self._databases:
            for pipeline in database.pipelines:
                pipeline.interrupt()
            if database.listener is not None:
                database.listener.stop()

    def handle_signals(self) -> None:
        """Let SIGTERM and SIGINT drain, and end the process when they come again."""

        # It runs in the middle of whatever the main thread is doing, which may hold any lock: so it takes none.
        def on_signal(number: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                os.write(2, b"second signal: ending now\n")
                os._exit(128 + number)
            self._signal = number
            os.write(self._nudge_write, b"!")

        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)

    def _prepare(self, database: _Database) -> None:
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

    def _start(self, database: _Database) -> None:
        options = database.options
        bell = Bell(options.notify)
        database.keeper = Keeper(
            database.dsn,
            database=database.name,
            process=self._owner.process,
            retention=options.retention,
            alarm=options.outbox_alarm,
            find_drift=lambda connection: diagnosis.find_drift(connection, options),
            watch=lambda connection: _watch(database, connection),
        )
        if options.notify != "off":
            database.listener = Listener(
                database.dsn,
                database=database.name,
                channel=options.channel,
                bell=bell,
                stop=self._stop,
                process=self._owner.process,
                is_ephemeral=functools.lru_cache(options.is_ephemeral) if options.has_ephemeral else None,
            )
        database.pipelines = [self._pipeline(database, name, bell) for name in database.sinks]
        for thread in (database.keeper, database.listener, *database.pipelines):
            if thread is not None:
                thread.start()

    def _pipeline(self, database: _Database, name: str, bell: Bell) -> Pipeline:
        options = self._config.sinks[name]
        told = self._on_delivered
        return Pipeline(
            database.dsn,
            database=database.name,
            sink=create(name, options, FORMATS[options.format]),
            bell=bell,
            stop=self._stop,
            owner=self._owner,
            on_delivered=(lambda events: told(name, events)) if told else None,
            validate=self._validators.get(database.name),
        )

    # -- waiting ------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        while not self._pause(ALIVE_INTERVAL):
            self._check_alive()

    def _pause(self, seconds: float) -> bool:
        """Wait in the main thread, unless told to stop; returns whether that has happened."""
        if select.select([self._nudge_read], [], [], 0 if self._stop.is_set() else seconds)[0]:
            os.read(self._nudge_read, 64)
        if self._signal is not None and not self._stop.is_set():
            name = signal.Signals(self._signal).name
            log.info("Draining; a second signal ends at once.", extra={"fields": {"signal": name}})
            self.stop()
        return self._stop.is_set()

    def _wait_until_idle(self) -> None:
        for database in self._databases:
            while database.sinks and not self._stop.is_set():
                try:
                    with Connection(database.dsn, purpose="until-idle") as connection:
                        while self._is_behind(database, connection) and not self._pause(IDLE_CHECK_INTERVAL):
                            self._check_alive()
                    break
                except DatabaseUnreachable:
                    self._pause(ALIVE_INTERVAL)

    def _is_behind(self, database: _Database, connection: Connection) -> bool:
        behind = outbox.sinks_behind(connection, list(database.sinks), database.target or "")
        for pipeline in database.pipelines:
            if pipeline.sink in behind and pipeline.stopped_because:
                raise CdcError(f"{pipeline.name}: {pipeline.stopped_because}")
            if pipeline.sink in behind and pipeline.state == "paused":
                raise CdcError(f"{pipeline.name}: paused (cdc sinks resume {pipeline.sink})")
        return bool(behind)

    def _check_alive(self) -> None:
        """Raise when no pipeline is left that could deliver anything."""
        pipelines = [pipeline for database in self._databases for pipeline in database.pipelines]
        if pipelines and not any(pipeline.is_alive() for pipeline in pipelines):
            raise CdcError("; ".join(f"{p.name}: {p.stopped_because or 'ended'}" for p in pipelines))

    def _join(self) -> None:
        ends = time.monotonic() + self._config.stop_timeout
        for database in self._databases:
            for thread in (database.listener, *database.pipelines):
                if thread is not None:
                    thread.join(max(0.0, ends - time.monotonic()))
            if database.keeper is not None:
                database.keeper.stop()
        self.stuck = [p.name for database in self._databases for p in database.pipelines if p.is_alive()]
        if self.stuck:
            log.error("Ending without sinks that hang.", extra={"fields": {"pipelines": ", ".join(self.stuck)}})


def _watch(database: _Database, connection: Connection) -> None:
    for pipeline in database.pipelines:
        pipeline.note_stall(connection)


def spare_the_collector() -> None:
    """Look for garbage in cycles less often: events come and go by the thousand and are in no cycle."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def check_revision(connection: Connection) -> None:
    """Whether this program and the database's schema belong together.

    Raises:
        NotInstalled: no schema, or one of another revision.
    """
    installed, wanted = installer.installed_revision(connection), installer.head()
    if installed is None:
        raise NotInstalled("cdc is not installed in this database (run `cdc migrate`)")
    if installed != wanted:
        raise NotInstalled(f"schema cdc is at revision {installed}, this program needs {wanted} (run `cdc migrate`)")
