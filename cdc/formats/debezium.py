"""The envelope of Debezium's PostgreSQL connector, as JSON without a schema (``schemas.enable=false``).

What is said otherwise than Debezium says it, because there is no write-ahead log to say it from:

* ``source.lsn`` is the event's `seq`, which like a log position grows with every change of a row. ``source.sequence``
  holds it once more, in Debezium's form. ``source.xmin`` is null.
* ``ts_ms`` (and ``ts_us``, ``ts_ns``) of both the envelope and the source are the moment of capture: an event is the
  same text on every attempt.
* ``source`` carries three members more: ``id`` to de-duplicate by, ``context``, and ``changed``.
* Values are PostgreSQL's own JSON: numbers with all their digits, dates and times as text, and not the codes of
  Debezium's data types, for which a schema would be needed.

Under ``image: diff`` an update shows the columns that changed, and the key. Consumers that replace whole rows want
``image: full``. An event whose row could not be captured (``"truncated": true``) cannot be said here.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from importlib import metadata
from typing import Final

from cdc.encoding import Encoder
from cdc.errors import PermanentFailure
from cdc.event import Event, Op, join_object, on_one_line, quote, split_row

_OPS: Final = {Op.INSERT: "c", Op.UPDATE: "u", Op.DELETE: "d", Op.TRUNCATE: "t", Op.READ: "r"}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class DebeziumEncoder(Encoder):
    """Writes the envelope; see the head of this module."""

    def __init__(self) -> None:
        self._version = quote(metadata.version("table-cdc"))

    def encode(self, event: Event) -> str:
        if event.truncated:
            raise PermanentFailure("a row that was too large to capture, which format debezium has no words for")
        source = event.source
        before, after = on_one_line(event.before), on_one_line(event.after)
        if event.op is Op.UPDATE and event.key is not None:
            key = split_row(on_one_line(event.key))
            before, after = (
                image if image == "null" else join_object(key | split_row(image)) for image in (before, after)
            )
        microseconds = (source.ts - _EPOCH) // _MICROSECOND
        times = f'"ts_ms":{microseconds // 1000},"ts_us":{microseconds},"ts_ns":{microseconds * 1000}'
        changed = "null" if event.changed is None else "[" + ",".join(map(quote, event.changed)) + "]"
        return (
            f'{{"before":{before},"after":{after},'
            f'"source":{{"version":{self._version},"connector":"postgresql","name":{quote(source.database)},{times},'
            f'"snapshot":"{"true" if event.op is Op.READ else "false"}","db":{quote(source.database)},'
            f'"sequence":"[null,\\"{source.seq}\\"]","schema":{quote(source.schema_name)},'
            f'"table":{quote(source.table)},"txId":{source.txid},"lsn":{source.seq},"xmin":null,'
            f'"id":{quote(event.id)},"changed":{changed},"context":{on_one_line(event.context)}}},'
            f'"op":"{_OPS[event.op]}",{times},"transaction":null}}'
        )
