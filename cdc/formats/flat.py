"""One flat object: the row's columns at the top level, and beside them what is known of the change.

=============  =====================================================================================================
``_id``        the event's id, to de-duplicate by
``_op``        insert, update, delete, truncate or read
``_database``  the database's name in the configuration
``_schema``
``_table``
``_seq``       grows per key
``_txid``      the transaction
``_ts``        when the change was captured, ISO 8601, UTC
``_old_key``   only of an update that changed the key: the key before, an object
``_context``   only where the application has set one
``_truncated`` only, and true, where the row was too large to capture: the key is all there is
=============  =====================================================================================================

An insert, an update and a read show the row as it is now: all of it, or under ``image: diff`` the columns an update
changed and the key. A delete shows the row as it was. A truncate shows no column. A column of the same name as one of
these, or as one of these with more underscores in front, has one underscore more here: ``_op`` is ``__op``, ``__op`` is
``___op``. So no two names meet, whatever the columns are called.
"""

from __future__ import annotations

import re
from typing import Final

from cdc.encoding import Encoder
from cdc.event import Event, Op, format_timestamp, join_object, on_one_line, quote, split_row

_TAKEN: Final = re.compile(r"_+(id|op|database|schema|table|seq|txid|ts|old_key|context|truncated)")


class FlatEncoder(Encoder):
    """Writes flat objects; see the head of this module."""

    def encode(self, event: Event) -> str:
        source = event.source
        key = {} if event.key is None else split_row(on_one_line(event.key))
        text = (
            f'{{"_id":{quote(event.id)},"_op":"{event.op.value}","_database":{quote(source.database)},'
            f'"_schema":{quote(source.schema_name)},"_table":{quote(source.table)},"_seq":{source.seq},'
            f'"_txid":{source.txid},"_ts":"{format_timestamp(source.ts)}"'
        )
        if event.op is Op.UPDATE and event.before is not None:
            was = split_row(on_one_line(event.before))
            old = {name: was.get(name, value) for name, value in key.items()}
            if old != key:
                text += f',"_old_key":{join_object(old)}'
        if event.context is not None:
            text += f',"_context":{on_one_line(event.context)}'
        if event.truncated:
            text += ',"_truncated":true'
        image = event.before if event.op is Op.DELETE else event.after
        row = key | ({} if image is None else split_row(on_one_line(image)))
        for name, value in row.items():
            text += f",{quote('_' + name if _TAKEN.fullmatch(name) else name)}:{value}"
        return text + "}"
