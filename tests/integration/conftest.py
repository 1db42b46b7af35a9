"""A table, and pipelines with scripted sinks over it, for whoever wants to watch one at work."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from psycopg2.extensions import connection
from scripted import Run
from sql import fetch

from cdc import pipeline
from cdc.bell import Bell


@pytest.fixture
def items(installed: str, connect: Callable[..., connection]) -> connection:
    """A writer; table item (id, v) is captured."""
    conn = connect(installed)
    fetch(conn, "create table item (id integer primary key, v text); select cdc.enable_capture('item')")
    return conn


@pytest.fixture
def prepare(installed: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """``prepare(name="audit", owner="test", **options)`` makes a pipeline that polls; ``.start()`` starts it."""
    monkeypatch.setattr(pipeline, "STANDBY_INTERVAL", 0.05)
    runs: list[Run] = []

    def make(name: str = "audit", owner: str = "test", bell: Bell | None = None, **options: object) -> Run:
        runs.append(Run(installed, name, options, owner, bell or Bell("off")))
        return runs[-1]

    yield make
    for run in runs:
        run.stop.set()
    for run in runs:
        run.end()
