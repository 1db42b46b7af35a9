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
from cdc.rowmodel import Validate
from cdc.sinks import option_models


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

    @cached_property
    def config(self) -> Config:
        """The configuration, read when a command first needs it.

        Raises:
            ConfigError: every finding at once.
        """
        config = configuration.load(self._find(), option_models(), self._environ)
        set_up_logging(self._log_level or config.log.level, self._log_format or config.log.format)
        return config

    def load_models(self) -> dict[str, Validate]:
        """Database name → what its events have to pass, with every ``model:`` imported; those beside the file too.

        Raises:
            ConfigError: every one that cannot be had, at once.
        """
        file = self._find()
        if (directory := str(file.parent.resolve())) not in sys.path:
            sys.path.append(directory)  # last: nothing that is installed is replaced
        return rowmodel.load_all(self.config, file)

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
        return list(names) or known

    @contextmanager
    def places(self, names: Collection[str] | None = None) -> Iterator[dict[str, Place]]:
        """How to reach each database, or those named; embedded servers run for as long as this is entered.

        Raises:
            EmbeddedError: a private server does not start.
        """
        with ExitStack() as stack:
            yield {
                name: Place(
                    _reach(database.resolved_dsn.get_secret_value(), stack),
                    _reach(database.resolved_migrate_dsn.get_secret_value(), stack),
                )
                for name, database in self.config.databases.items()
                if names is None or name in names
            }


def _reach(dsn: str, stack: ExitStack) -> str:
    directory = embedded.directory_of(dsn)
    return dsn if directory is None else stack.enter_context(embedded.start(directory)).dsn()


pass_app = click.make_pass_decorator(App)
