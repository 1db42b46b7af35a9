"""From rows of the outbox to events, at a few microseconds each.

The outbox keeps both images of a changed row as PostgreSQL wrote them, and what they differ in is found here, on the
text: no digit can get lost, and the writer does not pay for it. Most rows are flat objects whose members stand in the
same order on both sides, and most of a batch is never looked at by anybody but the sink that copies it. So

* the rows of a batch are checked by one call of pydantic, strictly;
* of a flat row only the members that differ are taken apart (:func:`difference`); anything else is split properly;
* :class:`RowEvent` is an :class:`~cdc.event.Event` that makes its fields when they are asked for, and writes the native
  format from the texts it already has.

Whatever may be wrong with a row is found while it is decoded, never later in a sink.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from cdc.event import (
    FLAT_VALUE,
    Event,
    Image,
    Json,
    Op,
    Route,
    Source,
    format_timestamp,
    join_object,
    native,
    quote,
    split_row,
    table_names,
)

Row = tuple[int, str, str, int, str, str | None, str | None, str | None]
"""seq, txid, captured_at, captured_table, op, old_row, new_row, context; as ``cdc.next_batch`` returns them. A row that
``cdc.backfill_batch`` has read has op r, or R."""

_ROWS: Final = TypeAdapter(
    list[
        tuple[
            Annotated[int, Field(ge=0)],
            Annotated[str, Field(pattern=r"^[0-9]{1,20}$")],
            Annotated[str, Field(pattern=r"^[0-9]{4,6}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{6}Z$")],
            int,
            Literal["i", "u", "d", "t", "r", "I", "U", "D", "R"],
            str | None,
            str | None,
            str | None,
        ]
    ]
)

NOT_TEXT: Final = "holds bytes that are no characters in the encoding of the database (UTF-8 where that is SQL_ASCII)"

OPS: Final = {"i": Op.INSERT, "u": Op.UPDATE, "d": Op.DELETE, "t": Op.TRUNCATE, "r": Op.READ}
"""What the letters of the outbox mean."""
_DIGITS_ONLY: Final = str.maketrans("", "", "-:.TZ")
_USUAL_LENGTH: Final = len("2026-11-22T08:01:02.123456Z")


@dataclass(frozen=True, slots=True)
class CapturedTable:
    """How a table was captured when an event of it was recorded.

    Attributes:
        relation: its oid then.
        key: the columns that identify a row.
        image: ``diff`` or ``full``.
    """

    relation: int
    schema: str
    table: str
    key: tuple[str, ...] | None
    image: Literal["diff", "full"]
    names: str = field(init=False, repr=False, compare=False)
    """See :func:`cdc.event.table_names`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", table_names(self.schema, self.table))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An outbox row that is not a valid event, although only our trigger may write there."""

    id: str
    seq: int
    text: str
    reason: str


class Decoder:
    """Reads the rows of one database."""

    def __init__(
        self,
        database: str,
        table: Callable[[int], CapturedTable],
        primary_key: Callable[[CapturedTable], Sequence[str]],
    ) -> None:
        """
        Args:
            database: its name in the configuration.
            table: how the table with an id in cdc.captured_table was captured; LookupError when there is none.
            primary_key: what identifies a row of a table by today's catalogue; empty when nothing does.
        """
        self._database = database
        self._tables = table
        self._primary_key = primary_key

    def decode(self, rows: Sequence[tuple[Any, ...]], ids: Sequence[str] | None = None) -> list[Event | Unreadable]:
        """The events of a page, in its order.

        Args:
            rows: as `Row`.
            ids: one for each, where seq and moment make none; what makes them unique in the database.
        """
        try:
            checked: Sequence[Row | None] = _ROWS.validate_python(rows, strict=True)
        except ValidationError:
            checked = [_checked(row) for row in rows]
        read = self._read
        events: list[Event | Unreadable] = []
        for index, (row, valid) in enumerate(zip(rows, checked, strict=True)):
            id_ = self._id(row[0], str(row[2])) if ids is None else f"{self._database}-{ids[index]}"
            try:
                if valid is None:
                    raise ValueError("not a row of the outbox")
                events.append(read(valid, id_))
            except (ValueError, LookupError) as error:
                events.append(self._unreadable(row, id_, error))
        return events

    def decode_bytes(self, row: tuple[Any, ...], codec: str, id_: str | None = None) -> list[Event | Unreadable]:
        """The event of a row whose texts are bytes, as one of a page is that could not be had as text.

        Args:
            row: as `Row`, with `bytes` for old_row, new_row and context.
            codec: Python's name for the encoding of the database.
            id_: as for :meth:`decode`.
        """
        *head, old, new, context = row
        images = [None if image is None else bytes(image) for image in (old, new)]
        try:
            texts = [None if image is None else image.decode(codec) for image in images]
        except UnicodeDecodeError:
            was, is_ = ("null" if image is None else f'"{image.hex()}"' for image in images)
            text = f'{{"seq":{head[0]},"old_row_in_hex":{was},"new_row_in_hex":{is_}}}'
            name = self._id(head[0], head[2]) if id_ is None else f"{self._database}-{id_}"
            return [Unreadable(name, head[0], text, NOT_TEXT)]
        # What the application says of itself is no reason to keep the change from anybody.
        said = None if context is None else bytes(context).decode(codec, "backslashreplace")
        return self.decode([(*head, *texts, said)], None if id_ is None else [id_])

    def _read(self, row: Row, id_: str) -> Event:
        _, _, _, table_id, op, old, new, context = row
        table = self._tables(table_id)
        before, after, changed = old, new, None
        if op == "u" and old is not None and new is not None:
            before, after, changed = difference(old, new)
            if table.image == "full":
                before, after = old, new
        elif op.isupper():
            before = after = None
        image = new if new is not None else old
        return row_event(
            {
                "_row": row,
                "_table": table,
                "_database": self._database,
                "_id": id_,
                "_key": None if image is None or table.key is None else self._key(table, table.key, image),
                "_before": before,
                "_after": after,
                "_changed": changed,
                "_context": None if context is None else as_json(context),
            }
        )

    def _unreadable(self, row: tuple[Any, ...], id_: str, error: Exception) -> Unreadable:
        seq, _, _, _, _, old, new, _ = row
        text = f'{{"seq":{seq},"old_row":{old or "null"},"new_row":{new or "null"}}}'
        # The error's own text would quote the row.
        return Unreadable(id_, seq, text, f"not a valid event: {type(error).__name__}")

    def _id(self, seq: int, at: str) -> str:
        if len(at) == _USUAL_LENGTH:
            return f"{self._database}-{seq}-{at[:4]}{at[5:7]}{at[8:10]}{at[11:13]}{at[14:16]}{at[17:19]}{at[20:26]}"
        return f"{self._database}-{seq}-{at.translate(_DIGITS_ONLY)}"

    def _key(self, table: CapturedTable, columns: Sequence[str], image: str) -> str | None:
        if len(columns) == 1 and (first := _FIRST_MEMBER.match(image)) and first[1] == columns[0]:
            return f'{{"{first[1]}":{first[2]}}}'
        members = split_row(image)
        if any(column not in members for column in columns):
            # A key column was renamed since the trigger was made: what the catalogue says now is the best there is.
            columns = self._primary_key(table)
            if not columns or any(column not in members for column in columns):
                return None
        return join_object({column: members[column] for column in columns})


def _checked(row: tuple[Any, ...]) -> Row | None:
    try:
        (valid,) = _ROWS.validate_python([row], strict=True)
    except ValidationError:
        return None
    return valid


# -- what two images differ in -----------------------------------------------------------------------------------

_TWO_MEMBERS: Final = re.compile(rf'([^"\\]*)":(?:{FLAT_VALUE})\0\1":(?:{FLAT_VALUE})').fullmatch
"""One member in both images, but for the quote before its name. PostgreSQL has no zero byte in a text."""
_FIRST_MEMBER: Final = re.compile(rf'\{{"([^"\\]*)":({FLAT_VALUE})[,}}]')


def difference(old: str, new: str) -> tuple[str, str, tuple[str, ...]]:
    """What two images of one row differ in: the columns before, after, and their names.

    Columns are compared as text, the way PostgreSQL wrote them: what looks the same is the same.

    Raises:
        ValueError: not two JSON objects.
    """
    # Cut at every `,"`. In a flat object that is between two members or, where a string ends with a comma, before its
    # closing quote; a piece that is cut there is no whole member, and is noticed if it differs. (A name that ends with
    # a comma is cut as well, and pieces of that may look whole.)
    was, is_ = old[2:-1].split(',"'), new[2:-1].split(',"')
    if len(was) != len(is_) or ',":' in new or "[" in new or "[" in old or new.count("{") != 1 or old.count("{") != 1:
        return _split_difference(old, new)
    names = []
    before = after = ""
    for a, b in zip(was, is_, strict=True):
        if a != b:
            members = _TWO_MEMBERS(f"{a}\0{b}")
            if members is None:
                return _split_difference(old, new)
            names.append(members[1])
            before += f',"{a}'
            after += f',"{b}'
    return f"{{{before[1:]}}}", f"{{{after[1:]}}}", tuple(names)


def _split_difference(old: str, new: str) -> tuple[str, str, tuple[str, ...]]:
    was, is_ = split_row(old), split_row(new)
    changed = tuple([name for name, value in is_.items() if was.get(name) != value])
    before = join_object({name: was[name] for name in changed if name in was})
    return before, join_object({name: is_[name] for name in changed}), changed


def as_json(context: str) -> Json:
    """The application's cdc.context; text that is not JSON travels as a JSON string."""
    value = Json(context)
    try:
        _ = value.value
    except ValueError:
        return Json(quote(context))
    return value


# -- the event ---------------------------------------------------------------------------------------------------


def _image(text: str | None) -> Image | None:
    return None if text is None else Image(text)


_FIELDS: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {
    "version": lambda parts: 1,
    "id": lambda parts: parts["_id"],
    "op": lambda parts: OPS[parts["_row"][4].lower()],
    "source": lambda parts: Source.model_construct(
        database=parts["_database"],
        schema_name=parts["_table"].schema,
        table=parts["_table"].table,
        seq=parts["_row"][0],
        txid=int(parts["_row"][1]),
        ts=datetime.fromisoformat(parts["_row"][2]),
    ),
    "key": lambda parts: _image(parts["_key"]),
    "before": lambda parts: _image(parts["_before"]),
    "after": lambda parts: _image(parts["_after"]),
    "changed": lambda parts: parts["_changed"],
    "context": lambda parts: parts["_context"],
    "truncated": lambda parts: parts["_row"][4].isupper(),
}


class RowEvent(Event):
    """An event that makes each field when it is first asked for.

    What looks at an event as a whole, as pydantic's own methods do, needs :meth:`complete`.
    """

    def __getattr__(self, name: str) -> Any:
        make = _FIELDS.get(name)
        if make is None:
            raise AttributeError(name)
        parts = self.__dict__
        value = parts[name] = make(parts)
        return value

    @property
    def route(self) -> Route:
        """See :attr:`cdc.event.Event.route`."""
        parts = self.__dict__
        table = parts["_table"]
        return (parts["_database"], table.schema, table.table, OPS[parts["_row"][4].lower()])

    def complete(self) -> Event:
        """The same as a plain :class:`~cdc.event.Event`, for people's own code."""
        return Event.model_construct(**{name: getattr(self, name) for name in Event.model_fields})

    def __eq__(self, other: object) -> bool:
        return self.complete() == (other.complete() if isinstance(other, RowEvent) else other)

    def __hash__(self) -> int:
        return hash(self.complete())

    def __repr__(self) -> str:
        return repr(self.complete())

    def to_json(self) -> str:
        """See :meth:`cdc.event.Event.to_json`."""
        parts = self.__dict__
        seq, txid, at, _, op, _, _, _ = parts["_row"]
        context = parts["_context"]
        return native(
            id_=parts["_id"],
            op=OPS[op.lower()],
            database=parts["_database"],
            names=parts["_table"].names,
            seq=seq,
            txid=txid,
            ts=at,
            key=parts["_key"],
            before=parts["_before"],
            after=parts["_after"],
            changed=parts["_changed"],
            context=None if context is None else context.raw,
            truncated=op.isupper(),
        )


def moved_row(event: Event | Unreadable, relations: Collection[int]) -> RowEvent | None:
    """The whole row, as op ``read``, of an update that tells a part of it and has changed its key; None for others.

    Args:
        event: of a page.
        relations: oids of the tables it may be of.
    """
    if not isinstance(event, RowEvent):
        return None
    parts = event.__dict__
    table, row = parts["_table"], parts["_row"]
    if row[4] != "u" or table.relation not in relations or table.image == "full" or table.key is None:
        return None
    if set(table.key).isdisjoint(parts["_changed"]):
        return None
    # A moment of its own: with its seq it tells one event from all others.
    at = format_timestamp(datetime.fromisoformat(row[2]) + timedelta(microseconds=1))
    return row_event(
        {
            "_row": (row[0], row[1], at, row[3], "r", None, row[6], None),
            "_table": table,
            "_database": parts["_database"],
            "_id": f"{parts['_id']}-row",
            "_key": parts["_key"],
            "_before": None,
            "_after": row[6],
            "_changed": None,
            "_context": None,
        }
    )


def row_event(parts: dict[str, Any]) -> RowEvent:
    """A `RowEvent` of checked parts; pydantic's own constructor would take as long as all the rest."""
    event = RowEvent.__new__(RowEvent)
    object.__setattr__(event, "__dict__", parts)
    return event
