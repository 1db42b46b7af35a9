"""cdc run: the daemon, with its console."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cdc import crashpoints
from cdc.cli.app import App, Place, pass_app
from cdc.cli.logs import in_background
from cdc.cli.terminal import EXIT_FAILURE
from cdc.config import Config, HttpConfig
from cdc.daemon import Daemon, Plan
from cdc.errors import CdcError, ConfigError
from cdc.fleet import Fleet
from cdc.systemd import Notifier

if TYPE_CHECKING:
    from cdc.http.app import App as Pages
    from cdc.http.server import Server

log = logging.getLogger(__name__)

MISSING = "http: needs the extra http (pip install 'table-cdc[http]', or leave the block http out)"


@click.command()
@click.option("--migrate", "first_migrate", is_flag=True, help="Make the databases equal to the YAML first.")
@click.option("--until-idle", is_flag=True, help="End once all that was committed before the start is delivered.")
@pass_app
def run(app: App, first_migrate: bool, until_idle: bool) -> None:
    """Deliver changes to the sinks until stopped.

    SIGTERM or SIGINT finishes and acknowledges what is in flight, within stop_timeout; a second one ends at once.
    SIGHUP reads the configuration again: only what has changed is restarted, and a wrong one changes nothing.
    """
    if spec := os.environ.get("CDC_CRASH_AT"):
        try:
            crashpoints.arm(spec)
        except ValueError as error:
            raise click.UsageError(f"CDC_CRASH_AT: {error}") from None
    console = Console(app.path)
    daemon: Daemon | None = None

    def plan(places: Mapping[str, Place]) -> Plan:
        return Plan(app.config, {name: place.dsn for name, place in places.items()}, app.load_models(app.config))

    def check(config: Config) -> None:
        console.check(config.http)
        app.check_clients(config)
        app.load_models(config)

    check(app.config)
    try:
        with app.places() as places, contextlib.ExitStack() as stack, in_background():
            if first_migrate:
                from cdc.cli.migrate import migrate_all  # needs Alembic, which the daemon does not

                if migrate_all(app, places, list(places), all_on_stderr=True):
                    sys.exit(1)

            def reread() -> Plan:
                config = app.read_again(check=check)
                again = plan(app.reach(config, stack))
                if daemon is not None:
                    console.show(daemon.fleet, config.http)
                return again

            daemon = Daemon(plan(places), reread=reread, notifier=_notifier(os.environ))
            daemon.handle_signals()
            threading.excepthook = _thread_failed
            console.show(daemon.fleet, app.config.http)
            with console:
                daemon.run(until_idle=until_idle)
    except CdcError as error:
        if daemon is None or not daemon.stuck:
            raise
        # A thread that hangs in somebody's library may keep Python from ending, and what it holds would not be missed.
        click.echo(f"error: {error}", err=True)
        os._exit(EXIT_FAILURE)


def _notifier(environ: Mapping[str, str]) -> Notifier:
    """The way to systemd, as it says in the environment."""
    for_us = environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
    microseconds = environ.get("WATCHDOG_USEC", "") if for_us else ""
    watchdog = int(microseconds) / 1e6 if microseconds.isdigit() else None
    return Notifier(environ.get("NOTIFY_SOCKET"), watchdog)


def _thread_failed(arguments: threading.ExceptHookArgs) -> None:
    """In place of a traceback on stderr, whose text may quote a row."""
    fields = {"thread": arguments.thread.name if arguments.thread else "?"}
    trace = (arguments.exc_type, arguments.exc_value or arguments.exc_type(), arguments.exc_traceback)
    log.critical("A thread has ended as it should not.", exc_info=trace, extra={"fields": fields})


class Console(contextlib.AbstractContextManager["Console"]):
    """The HTTP server as the configuration at `path` wants it; gone when this is left."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._config: HttpConfig | None = None
        self._server: Server | None = None
        self._pages: Pages | None = None

    def check(self, config: HttpConfig | None) -> None:
        """Raise ConfigError when what the server needs is not installed."""
        if config is not None:
            try:
                import prometheus_client  # noqa: F401
                import waitress  # noqa: F401
            except ImportError:
                raise ConfigError([f"{self._path}: {MISSING}"]) from None

    def show(self, fleet: Fleet, config: HttpConfig | None) -> None:
        """Serve what runs, in place of what was served before; None: nothing."""
        if config == self._config and (self._server is not None) == (config is not None):
            return
        self._close()
        self._config = config
        if config is not None:
            from cdc.http.app import App as Pages
            from cdc.http.server import Server

            self._pages = Pages(fleet, config)
            self._server = Server(config.address, self._pages)
            self._server.start()

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._server is not None and self._pages is not None:
            self._pages.close()
            self._server.stop()
        self._server = self._pages = None
