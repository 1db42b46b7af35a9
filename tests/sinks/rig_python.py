"""A sink of the user's own, as a destination under test: a class, named by ``call``, that writes into SQLite."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import ClassVar, Literal

from rig import NotApplicable, Received, Rig

from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.options import SinkOptions
from cdc.sinks.base import Sink

_TABLES = """
    create table if not exists event (n integer primary key, id text not null, body text not null);
    create table if not exists refused (key text not null);
"""
_LIMIT = 100_000


class ShelfOptions(SinkOptions):
    """Options of a `Shelf`."""

    type: Literal["shelf"]
    file: str


class Shelf(Sink[ShelfOptions]):
    """Takes every event that is not refused and not too long, as often as it is handed over."""

    Options = ShelfOptions
    _connection: sqlite3.Connection | None = None

    def open(self) -> None:
        self.close()
        try:
            self._connection = sqlite3.connect(self.options.file, timeout=2)
            self._connection.executescript(_TABLES)
        except sqlite3.OperationalError as error:
            raise TransientFailure(f"cannot open {self.options.file}: {error}") from None

    def deliver(self, batch: Sequence[Event]) -> None:
        assert self._connection is not None
        failures: dict[int, TransientFailure | PermanentFailure] = {}
        with self._connection as database:
            refused = {key for (key,) in database.execute("select key from refused")}
            for index, event in enumerate(batch):
                body = self.encoder.encode(event)
                if event.key is not None and event.key.raw in refused:
                    failures[index] = TransientFailure("not now")
                elif len(body) > _LIMIT:
                    failures[index] = PermanentFailure(f"longer than {_LIMIT} characters")
                else:
                    database.execute("insert into event (id, body) values (?, ?)", (event.id, body))
        if failures:
            raise PartialFailure(failures)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class PythonRig(Rig):
    """Such a class; the daemon finds it by PYTHONPATH."""

    kind: ClassVar[str] = "python"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._file = directory / "shelf.db"
        with closing(sqlite3.connect(self._file)) as database:
            database.executescript(f"pragma journal_mode = wal; {_TABLES}")
        self._path = os.environ.get("PYTHONPATH")
        here = Path(__file__).parent
        added = [str(here), str(here.parent / "support")]
        os.environ["PYTHONPATH"] = os.pathsep.join([*added, *filter(None, [self._path])])

    def configuration(self) -> dict[str, object]:
        return {"type": "python", "call": f"{Path(__file__).stem}:Shelf", "options": {"file": str(self._file)}}

    def received(self) -> list[Received]:
        with closing(sqlite3.connect(self._file, timeout=30)) as database:
            return [Received(*row) for row in database.execute("select id, body from event order by n")]

    def close(self) -> None:
        if self._path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = self._path

    def forbidden(self) -> dict[str, object]:
        raise NotApplicable("credentials are its author's business")

    def limit(self) -> int:
        return _LIMIT

    def refuse(self, key: int | None) -> None:
        with closing(sqlite3.connect(self._file, timeout=30)) as database, database:
            if key is None:
                database.execute("delete from refused")
            else:
                database.execute("insert into refused values (?)", (f'{{"id":{key}}}',))
