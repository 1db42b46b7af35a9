"""What runs: the databases served, each with its listener, its keeper and one pipeline per sink.

The daemon's main thread changes it; HTTP, the watchdog and whoever else wants to know read it. A reader gets a mapping
that nobody changes any more: a change makes a new one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from cdc.bell import Bell
from cdc.config import Config, DatabaseConfig
from cdc.keeper import Keeper
from cdc.listener import Listener
from cdc.metrics import ServerClock
from cdc.pipeline import Pipeline
from cdc.rowmodel import Validate


@dataclass(slots=True)
class Database:
    """What runs for one database.

    Attributes:
        dsn: how the daemon reaches it.
        options: its configuration; replaced by a reload that needs no restart.
        sinks: sink → where it starts without a position; the pipelines there should be.
        validate: what its events have to pass.
        pipelines: those there are.
        target: where ``--until-idle`` is to get to: the position at the start.
        since: when it was taken in, by the monotonic clock.
    """

    name: str
    dsn: str
    options: DatabaseConfig
    sinks: Mapping[str, str]
    validate: Validate | None = None
    clock: ServerClock = field(default_factory=ServerClock)
    listener: Listener | None = None
    keeper: Keeper | None = None
    pipelines: Mapping[str, Pipeline] = field(default_factory=dict)
    bell: Bell = field(default_factory=lambda: Bell("off"))
    target: str | None = None
    since: float = field(default_factory=time.monotonic)


class Fleet:
    """Everything that runs for one configuration.

    Attributes:
        owner: the daemon's name, as `cdc status` shows it.
        config: what is in force.
        databases: by name.
        leaving: pipelines that were told to end by a reload, and have not yet.
        reloaded_at: when the configuration in force was read, seconds since 1970.
        reload_error: why the last reload was refused; None: it was not.
    """

    def __init__(self, config: Config, owner: str) -> None:
        self.config = config
        self.owner = owner
        self.databases: Mapping[str, Database] = {}
        self.leaving: list[Pipeline] = []
        self.reloaded_at = time.time()
        self.reload_error: str | None = None

    def pipelines(self) -> list[Pipeline]:
        """Those that are to deliver now."""
        return [pipeline for database in self.databases.values() for pipeline in database.pipelines.values()]
