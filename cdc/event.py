"""The wire model: what one change looks like to everybody outside the database.

An :class:`Event` is validated by pydantic, strict and frozen. The images of the row (`key`, `before`, `after`)
are kept as PostgreSQL wrote them: a float-based JSON parser turns 12345678901234567890.123 into
12345678901234567000, so the text travels untouched from the trigger to the sink and is parsed, exactly, only
when somebody looks inside (:class:`Image`).

The native format is the one of the contract: one JSON object, its fields in a fixed order, no line breaks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from json.decoder import scanstring  # type: ignore[attr-defined]  # C speed; typeshed leaves it out
from json.encoder import encode_basestring
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

quote = encode_basestring
"""A text as a JSON string, non-ASCII characters as they are."""


def _whole(digits: str) -> int | Decimal:
    try:
        return int(digits)
    except ValueError:  # Python refuses to convert more than 4300 digits to int
        return Decimal(digits)


def _fraction(digits: str) -> Decimal | str:
    try:
        return Decimal(digits)
    except ArithmeticError:  # an exponent beyond Decimal's: legal JSON, and a number to nobody
        return digits


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_int=_whole, parse_float=_fraction, parse_constant=_no_number)
# Finds where a value ends and makes nothing of its numbers.
_scanner = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_no_number)
_WHITESPACE = re.compile(r"[ \t\n\r]*")


class Op(StrEnum):
    """What happened to the row; ``read`` is an existing row, delivered by a backfill."""

    INSERT = "insert"
    UPDATE = "update"
    DELETE = "delete"
    TRUNCATE = "truncate"
    READ = "read"


def split_object(text: str) -> dict[str, str]:
    """Split a JSON object into its members, each value left as the text it was written in.

    Raises:
        ValueError: `text` is not exactly one JSON object.
    """
    members: dict[str, str] = {}
    try:
        position = _skip(text, 0)
        if text[position] != "{":
            raise ValueError("not a JSON object")
        position = _skip(text, position + 1)
        while text[position] != "}":
            if members:
                position = _skip(text, _expect(text, position, ","))
            name, position = scanstring(text, _expect(text, position, '"'))
            start = _skip(text, _expect(text, _skip(text, position), ":"))
            end = _end_of(text, start)
            members[name] = text[start:end]
            position = _skip(text, end)
        if _skip(text, position + 1) != len(text):
            raise ValueError("text after the JSON object")
    except IndexError:
        raise ValueError("the JSON object ends too early") from None
    return members


FLAT_VALUE = r'"[^"\\]*(?:\\.[^"\\]*)*"|[^",{}\[\]]+'
"""Pattern of a value without others in it, as PostgreSQL writes it between a colon and a comma or brace."""
_FLAT_MEMBER = re.compile(rf'"([^"\\]*)":({FLAT_VALUE})[,}}]')


def split_row(text: str) -> dict[str, str]:
    """:func:`split_object` for text that PostgreSQL wrote: several times faster on rows without nested values.

    Raises:
        ValueError: `text` is not a JSON object.
    """
    members = _FLAT_MEMBER.findall(text)
    # Each member stands in the text with two quotes, a colon and a comma or brace; the brace before it all makes one
    # more. Where the sum differs something was skipped: a nested value, an escape in a name, white space.
    if sum([len(name) + len(value) for name, value in members]) + 4 * len(members) + 1 == len(text):
        return dict(members)
    return split_object(text)


_FLAT_ARRAY = re.compile(r'\[([^\s",{}\[\]]+(?:,[^\s",{}\[\]]+)*)\]')


def split_array(text: str) -> list[str]:
    """Split a JSON array into its elements, each left as the text it was written in.

    Raises:
        ValueError: `text` is not exactly one JSON array.
    """
    if flat := _FLAT_ARRAY.fullmatch(text):  # numbers, as PostgreSQL writes them
        return flat[1].split(",")
    elements: list[str] = []
    try:
        position = _skip(text, 0)
        if text[position] != "[":
            raise ValueError("not a JSON array")
        position = _skip(text, position + 1)
        while text[position] != "]":
            if elements:
                position = _skip(text, _expect(text, position, ","))
            end = _end_of(text, position)
            elements.append(text[position:end])
            position = _skip(text, end)
        if _skip(text, position + 1) != len(text):
            raise ValueError("text after the JSON array")
    except IndexError:
        raise ValueError("the JSON array ends too early") from None
    return elements


def join_object(members: Mapping[str, str]) -> str:
    """The inverse of :func:`split_object`."""
    return "{" + ",".join([f"{quote(name)}:{value}" for name, value in members.items()]) + "}"


def _end_of(text: str, position: int) -> int:
    """Where the JSON value ends that begins here. Raises ValueError, IndexError."""
    try:
        end: int = _scanner.raw_decode(text, position)[1]
    except RecursionError:
        end = _read_deep(text, position, raw=True)[1]
    return end


_SCALAR = re.compile(r"true|false|null|(?P<whole>-?(?:0|[1-9][0-9]*))(?P<rest>(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)")
_CONSTANTS = {"true": True, "false": False, "null": None}


def _read_deep(text: str, position: int, *, raw: bool) -> tuple[Any, int]:
    """One JSON value, however deeply it is nested, and where it ends.

    Python's own decoder recurses, and gives up at some 950 levels; PostgreSQL takes what max_stack_depth allows, which
    is thousands. This one is slower by far, and for such values only.

    Args:
        text: what holds the value.
        position: where the value begins.
        raw: make nothing of numbers.

    Raises:
        ValueError: not JSON.
        IndexError: the text ends too early.
    """
    open_: list[Any] = []  # the arrays and objects around the value that comes next
    names: list[str] = []  # under which name it, or what it is in, comes into an object
    while True:
        position = _skip(text, position)
        value: Any
        if text[position] in "[{":
            is_object = text[position] == "{"
            value = {} if is_object else []
            position = _skip(text, position + 1)
            if text[position] not in "]}":
                open_.append(value)
                if is_object:
                    position = _read_name(text, position, names)
                continue
            position = _expect(text, position, "}" if is_object else "]")
        else:
            value, position = _read_scalar(text, position, raw=raw)
        # Put it where it belongs, and so with whatever ends here.
        while open_:
            around = open_[-1]
            is_object = isinstance(around, dict)
            if is_object:
                around[names.pop()] = value
            else:
                around.append(value)
            position = _skip(text, position)
            if text[position] == ",":
                position = _skip(text, position + 1)
                if is_object:
                    position = _read_name(text, position, names)
                break
            position = _expect(text, position, "}" if is_object else "]")
            value = open_.pop()
        else:
            return value, position


def _read_scalar(text: str, position: int, *, raw: bool) -> tuple[Any, int]:
    if text[position] == '"':
        return scanstring(text, position + 1)  # type: ignore[no-any-return]  # see its import
    found = _SCALAR.match(text, position)
    if found is None:
        raise ValueError(f"a value expected at character {position}")
    if found["whole"] is None:
        return _CONSTANTS[found[0]], found.end()
    if raw:
        return found[0], found.end()
    return _fraction(found[0]) if found["rest"] else _whole(found[0]), found.end()


def _read_name(text: str, position: int, names: list[str]) -> int:
    name, position = scanstring(text, _expect(text, position, '"'))
    names.append(name)
    return _expect(text, _skip(text, position), ":")


def _skip(text: str, position: int) -> int:
    return _WHITESPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches the empty text too


def _expect(text: str, position: int, character: str) -> int:
    if text[position] != character:
        raise ValueError(f"{character!r} expected at character {position}")
    return position + 1


def _decode(text: str) -> Any:
    """The one JSON value that a text is. Raises ValueError."""
    try:
        return _decoder.decode(text)
    except RecursionError:
        pass
    try:
        value, end = _read_deep(text, 0, raw=False)
    except IndexError:
        raise ValueError("the JSON value ends too early") from None
    if _skip(text, end) != len(text):
        raise ValueError("text after the JSON value")
    return value


class Json:
    """One JSON value, kept as the text it was written in.

    Attributes:
        raw: the JSON text.
    """

    __slots__ = ("_value", "raw")

    _value: Any

    def __init__(self, raw: str) -> None:
        self.raw = raw

    @property
    def value(self) -> Any:
        """The parsed value, digit for digit: whole numbers as ``int``, others as ``Decimal``.

        A number neither can hold (4300 digits and more; an exponent of 19 digits) is a ``Decimal`` or its own text.
        """
        try:
            return self._value
        except AttributeError:
            self._value = _decode(self.raw)
            return self._value

    def __eq__(self, other: object) -> bool:
        return bool(self.value == (other.value if isinstance(other, Json) else other))

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        # Row values stay out of logs and tracebacks.
        return f"<{type(self).__name__} of {len(self.raw)} characters>"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.is_instance_schema(cls)


class Image(Json, Mapping[str, Any]):
    """A row, or part of one: a read-only mapping from column name to value."""

    __slots__ = ()

    def __getitem__(self, column: str) -> Any:
        return self.value[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self.value)

    def __len__(self) -> int:
        return len(self.value)

    def __hash__(self) -> int:
        return hash(self.raw)

    __eq__ = Json.__eq__
    __repr__ = Json.__repr__


class _Model(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True
    )


Route = tuple[str, str, str, Op]
"""Database, schema, table and operation: what decides where an event goes."""


class Source(_Model):
    """Where and when a change happened."""

    database: str
    """The database's name in the configuration."""
    schema_name: str = Field(alias="schema")
    table: str
    seq: int
    """The event's number in the outbox of its database; grows per key, has gaps."""
    txid: int
    """The top-level transaction the change was part of."""
    ts: AwareDatetime
    """When the trigger recorded the change, by the server's clock, in microseconds."""


class Event(_Model):
    """One change, as delivered.

    `before` and `after` hold only the changed columns of an update under ``image: diff``, and whole rows
    otherwise; an insert has no `before`, a delete no `after`, a truncate neither. `id` is the same on every
    attempt and is never used twice: receivers de-duplicate by it.
    """

    version: Literal[1] = 1
    id: str
    op: Op
    source: Source
    key: Image | None
    before: Image | None
    after: Image | None
    changed: tuple[str, ...] | None
    context: Json | None
    truncated: bool = False
    """True when the images did not fit and were left out."""

    @property
    def route(self) -> Route:
        """Where it comes from, and its operation."""
        return (self.source.database, self.source.schema_name, self.source.table, self.op)

    @classmethod
    def from_json(cls, text: str | bytes | bytearray) -> Event:
        """Read an event in the native format: a line of a file, a webhook body, a notification.

        Args:
            text: bytes are UTF-8.

        Raises:
            ValueError: not a JSON object, or not an event (pydantic's ValidationError is a ValueError).
        """
        if not isinstance(text, str):
            text = text.decode()
        members = split_object(text)
        fields: dict[str, Any] = {}
        for name, raw in members.items():
            if name in ("key", "before", "after"):
                fields[name] = None if raw == "null" else Image(join_object(split_object(raw)))
            elif name == "context":
                fields[name] = None if raw == "null" else Json(raw)
            else:
                fields[name] = _decode(raw)
        if isinstance(source := fields.get("source"), dict) and isinstance(source.get("ts"), str):
            source["ts"] = datetime.fromisoformat(source["ts"])
        if isinstance(fields.get("changed"), list):
            fields["changed"] = tuple(fields["changed"])
        if isinstance(fields.get("op"), str):
            fields["op"] = Op(fields["op"])
        return cls.model_validate(fields)

    def to_json(self) -> str:
        """The event in the native format: one line, fields in the contract's order, every digit kept."""
        source = self.source
        return native(
            id_=self.id,
            op=self.op,
            database=source.database,
            names=table_names(source.schema_name, source.table),
            seq=source.seq,
            txid=source.txid,
            ts=format_timestamp(source.ts),
            key=_raw(self.key),
            before=_raw(self.before),
            after=_raw(self.after),
            changed=self.changed,
            context=_raw(self.context),
            truncated=self.truncated,
        )

    # -- for consumers; more in cdc.consumer --

    @property
    def identity(self) -> Any:
        """The row's key to look it up by: its value, a tuple of them if it has several columns, None without a key."""
        return None if self.key is None else _identity(self.key.values())

    @property
    def former_identity(self) -> Any:
        """The same as it was before the change; another one only if an update has changed the key."""
        if self.key is None or self.before is None:
            return self.identity
        return _identity(self.before.get(name, value) for name, value in self.key.items())

    def apply(self, row: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """The row as this change leaves it; None when there is none any more.

        Args:
            row: as it was. None, because the consumer began in the middle or the event has come again: the result of
                an update under ``image: diff`` has the key and the columns that changed.

        Raises:
            ValueError: the event is truncated, and does not say.
        """
        if self.op in (Op.DELETE, Op.TRUNCATE):
            return None
        if self.after is None:
            raise ValueError("a truncated event does not tell the row (read it where it is)")
        if self.op is Op.UPDATE and len(self.after) == len(self.changed or ()):
            return {**(row if row is not None else self.key or {}), **self.after}
        return dict(self.after)

    def apply_to(self, table: MutableMapping[Any, dict[str, Any]]) -> None:
        """Do to a table, a mapping from `identity` to row, what the change did.

        The events of a table in their order make it equal to the table. That some come again does no harm under
        ``image: full``, or where keys do not change; else they have to be left out (:class:`cdc.consumer.Seen`). Rows
        that exchange their keys, as a deferrable key lets them, are beyond it.

        Raises:
            ValueError: the table has no key; or the event is truncated. Nothing has changed then.
        """
        if self.op is Op.TRUNCATE:
            table.clear()
            return
        if self.key is None:
            raise ValueError("an event without a key is about no particular row (give the table a key)")
        was, is_ = self.former_identity, self.identity
        row = self.apply(table.get(is_, table.get(was)))  # moved already, if the event comes again
        table.pop(was, None)
        if row is not None:
            table[is_] = row


def _identity(values: Iterable[Any]) -> Any:
    parts = tuple([_hashable(value) for value in values])
    return parts[0] if len(parts) == 1 else parts


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple([_hashable(item) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _hashable(item)) for name, item in value.items()])
    return value


def native(
    *,
    id_: str,
    op: Op,
    database: str,
    names: str,
    seq: int,
    txid: int | str,
    ts: str,
    key: str | None,
    before: str | None,
    after: str | None,
    changed: Iterable[str] | None,
    context: str | None,
    truncated: bool,
) -> str:
    """The native format, of parts that are JSON text already: `names` by :func:`table_names`, images, context."""
    line = (
        f'{{"version":1,"id":{quote(id_)},"op":"{op.value}","source":{{"database":{quote(database)},{names},'
        f'"seq":{seq},"txid":{txid},"ts":"{ts}"}},'
        f'"key":{key or "null"},"before":{before or "null"},"after":{after or "null"},'
        f'"changed":{"null" if changed is None else "[" + ",".join(map(quote, changed)) + "]"},'
        f'"context":{context or "null"}' + (',"truncated":true}' if truncated else "}")
    )
    return _one_line(line)


def table_names(schema: str, table: str) -> str:
    """Schema and table as the native format has them."""
    return f'"schema":{quote(schema)},"table":{quote(table)}'


def format_timestamp(moment: datetime) -> str:
    """A moment in UTC as the contract writes it: ``2026-11-22T08:01:02.123456Z``."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")[: -len("+00:00")] + "Z"


def _raw(value: Json | None) -> str | None:
    return None if value is None else value.raw


def on_one_line(value: Json | None) -> str:
    """The text of a value, or ``null``, without line breaks."""
    return "null" if value is None else _one_line(value.raw)


def _one_line(text: str) -> str:
    # A column of type json keeps the line breaks it was written with. Inside a JSON string a raw one is illegal, so
    # every one found here is white space between tokens.
    return text.replace("\n", " ").replace("\r", " ")
