"""What every command starts from: the configuration, and how to reach its databases."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click

from cdc import config as configuration
from cdc import embedded, rowmodel
from cdc.cli.logs import set_up_logging
from cdc.config import Config
from cdc.errors import ConfigError
from cdc.formats import missing_libraries
from cdc.rowmodel import Validate
from cdc.sinks import missing_clients, option_models


@dataclass(frozen=True, slots=True)
class Place:
    """How to reach one database: as the daemon, and as the role that migrates."""

    dsn: str
    migrate_dsn: str


class App:
    """The global options, and the configuration they lead to."""

    def __init__(
        self, find: Callable[[], Path], environ: Mapping[str, str], log_level: str | None, log_format: str | None
    ) -> None:
        self._find = find
        self._environ = environ
        self._log_level = log_level
        self._log_format = log_format
        self._embedded: dict[Path, str] = {}

    @cached_property
    def path(self) -> Path:
        """The configuration file. Raises ConfigError when there is none."""
        return self._find()

    @cached_property
    def config(self) -> Config:
        """The configuration, read when a command first needs it.

        Raises:
            ConfigError: every finding at once.
        """
        return self.read_again()

    def read_again(self, *, check: Callable[[Config], None] = lambda config: None) -> Config:
        """The configuration as the file has it now; it counts from here on, unless something is wrong with it.

        Args:
            check: raises ConfigError for what it cannot accept.

        Raises:
            ConfigError: every finding at once.
        """
        config = configuration.load(self.path, option_models(), self._environ)
        check(config)
        set_up_logging(self._log_level or config.log.level, self._log_format or config.log.format, self._environ)
        self.__dict__["config"] = config
        return config

    def load_models(self, config: Config) -> dict[str, Validate]:
        """Database name → what its events have to pass, with every ``model:`` imported; those beside the file too.

        Raises:
            ConfigError: every one that cannot be had, at once.
        """
        if (directory := str(self.path.parent.resolve())) not in sys.path:
            sys.path.append(directory)  # last: nothing that is installed is replaced
        return rowmodel.load_all(config, self.path)

    def check_clients(self, config: Config) -> None:
        """Whether this program can speak to every sink; only the commands that do, or judge, ask.

        Raises:
            ConfigError: sinks whose client library, or whose format's, is not installed.
        """
        clients, libraries = missing_clients(config.sinks), missing_libraries(config.sinks)
        if clients or libraries:
            raise ConfigError(
                [f"{self.path}: sinks.{name}.type: {message}" for name, message in clients.items()]
                + [f"{self.path}: sinks.{name}.format: {message}" for name, message in libraries.items()]
            )

    def select(self, names: tuple[str, ...]) -> list[str]:
        """The databases a command is about: those named, or all.

        Raises:
            ConfigError: a name the configuration does not have.
        """
        known = list(self.config.databases)
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(
                [f"no database {name} in the configuration (known: {', '.join(known)})" for name in unknown]
            )
        return list(dict.fromkeys(names)) or known

    @contextmanager
    def places(self, names: Collection[str] | None = None) -> Iterator[dict[str, Place]]:
        """How to reach each database, or those named; embedded servers run for as long as this is entered.

        Raises:
            EmbeddedError: a private server does not start.
        """
        with ExitStack() as stack:
            yield self.reach(self.config, stack, names)

    def reach(self, config: Config, stack: ExitStack, names: Collection[str] | None = None) -> dict[str, Place]:
        """How to reach each database of a configuration; embedded servers not running yet run until `stack` is closed.

        Raises:
            EmbeddedError: a private server does not start.
        """
        return {
            name: Place(
                self._reach(database.resolved_dsn.get_secret_value(), stack),
                self._reach(database.resolved_migrate_dsn.get_secret_value(), stack),
            )
            for name, database in config.databases.items()
            if names is None or name in names
        }

    def _reach(self, dsn: str, stack: ExitStack) -> str:
        directory = embedded.directory_of(dsn)
        if directory is None:
            return dsn
        if directory not in self._embedded:
            self._embedded[directory] = stack.enter_context(embedded.start(directory)).dsn()
            stack.callback(self._embedded.pop, directory)
        return self._embedded[directory]


pass_app = click.make_pass_decorator(App)
databases_option = click.option(
    "-d", "--database", "names", multiple=True, metavar="DB", help="Only this one; may be repeated."
)
