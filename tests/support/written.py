"""A module that `cdc models` has written, imported, and events for it to read."""

from __future__ import annotations

import importlib.util
import uuid
from pathlib import Path
from types import ModuleType

from cdc import models
from cdc.connection import Connection
from cdc.event import Event
from cdc.outbox import Outbox, Owner


def write(dsn: str, path: Path, *patterns: str) -> str:
    """Write the models of a database; returns the text."""
    with Connection(dsn, purpose="test") as connection:
        text = models.write(models.read(connection, patterns), database="shop", version="0.0.0")
    path.write_text(text, encoding="utf-8")
    return text


def load(path: Path) -> ModuleType:
    """The module, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"written_{uuid.uuid4().hex}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def events_of(dsn: str) -> list[Event]:
    """Everything the book of a database holds."""
    with Connection(dsn, purpose="test") as connection:
        outbox = Outbox(connection, database="shop", sink="test", owner=Owner("test", 1))
        assert outbox.claim(start="earliest")
        batch = outbox.next_batch(None, events=10_000, bytes_=1 << 26)
        events = [] if batch is None else [event for event in batch.events if isinstance(event, Event)]
        assert batch is None or (len(events) == len(batch.events) and not batch.full)
        return events
