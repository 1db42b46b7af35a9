"""The vocabulary of the configuration: what its values may look like, and the fields every sink shares.

A sink's own model lives beside its class in ``cdc/sinks/`` and subclasses `SinkOptions`; `cdc.config`
assembles the rest. Nothing here opens a file or reads the environment.

**Validators** raise a plain ``ValueError("what is wrong (what would be right)")``. `cdc.config` puts the file
and the path in front of that sentence and shows it to the user, so it must never contain the value: any value
may have come from ``${SECRET}``. Lists arrive as tuples, because a frozen model should be frozen all the way
down.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import lru_cache
from ipaddress import ip_address
from typing import Annotated, ClassVar, Final, Literal, NamedTuple, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from cdc import filters

CaptureOp = Literal["insert", "update", "delete", "truncate"]
"""What a trigger can see."""

EventOp = Literal["insert", "update", "delete", "truncate", "read"]
"""What an event can tell: everything captured, and ``read``, a row told of by a backfill."""

FailurePolicy = Literal["dead_letter", "park_key", "stop"]
"""What becomes of an event that can never be delivered."""

Format = Literal["native", "debezium", "cloudevents", "cloudevents-binary", "flat"]
"""How an event is written: docs/formats.md."""

Binding = Literal["http", "kafka"]
"""How a protocol with headers names those that are an event's attributes (CloudEvents' protocol bindings)."""

ALL_CAPTURE_OPS: Final[tuple[CaptureOp, ...]] = get_args(CaptureOp)
ALL_EVENT_OPS: Final[tuple[EventOp, ...]] = get_args(EventOp)

NAME_BYTES: Final = 63
"""PostgreSQL's limit on an identifier (NAMEDATALEN - 1), in bytes of UTF-8."""


class StrictModel(BaseModel):
    """Base of every configuration model: exact types, no unknown keys, immutable, silent about its input."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", hide_input_in_errors=True)


# -- durations and sizes --

_DURATION: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?) ?(ms|s|m|h|d)")
_SECONDS: Final = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
}
# Far above any sensible wait, far below what time.sleep(), Event.wait() and interval overflow at.
_LONGEST_DAYS: Final = 36500

_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?(B|kB|MB|GB|KiB|MiB|GiB)?")
# Far above any size there is, far below what a bigint overflows at; a float and JavaScript still know each byte.
_LARGEST_GIB: Final = 2**23
_BYTES: Final = {
    None: 1,
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}


def _duration(value: object) -> float:
    """Seconds in a text such as ``20ms``; ValueError for anything else, a bare number included."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]*)?", value)):
        raise ValueError("a number without a unit (write a unit, such as 20ms or 5m)")
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("not a duration (write a number and one of ms, s, m, h, d, such as 20ms)")
    seconds = Decimal(found[1]) * _SECONDS[found[2]]
    if seconds > _LONGEST_DAYS * _SECONDS["d"]:
        raise ValueError(f"too long (at most {_LONGEST_DAYS}d)")
    return float(seconds)


def _size(value: object) -> int:
    """Bytes in a text such as ``4MiB`` or in a whole number; ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return _countable(value)
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("not a size (write a number and one of B, kB, MB, GB, KiB, MiB, GiB, such as 4MiB)")
    size = Decimal(found[1]) * _BYTES[found[2]]
    if size != int(size):
        raise ValueError("not a whole number of bytes (write a number such as 512KiB)")
    return _countable(int(size))


def _countable(size: int) -> int:
    if size > _LARGEST_GIB * _BYTES["GiB"]:
        raise ValueError(f"too large (at most {_LARGEST_GIB}GiB)")
    return size


Duration = Annotated[float, BeforeValidator(_duration)]
"""Seconds. Written with a unit, ``200ms``, ``20s``, ``5m``, ``24h`` or ``7d``; a bare number is refused."""

Size = Annotated[int, BeforeValidator(_size)]
"""Bytes. Written as ``512KiB``, ``4MiB``, ``1GiB``, ``4MB`` (decimal), or as a whole number of bytes."""


# -- hosts --


def checked_host(value: str) -> str:
    """The host itself; ValueError for what may hold more than that, because hosts are shown in logs and errors."""
    is_odd = any(letter in "/@" or letter.isspace() or not letter.isprintable() for letter in value)
    if not value or is_odd or (":" in value and not _is_address(value)):
        raise ValueError(
            "not the name or address of a host (write it alone: port, user and password have keys of their own)"
        )
    return value


def _is_address(value: str) -> bool:
    try:
        ip_address(value)
    except ValueError:
        return False
    return True


Host = Annotated[str, AfterValidator(checked_host)]
"""The name of a host, or its IPv4 or IPv6 address without brackets; nothing beside it."""


# -- lists --

_Item = TypeVar("_Item", bound=Hashable)


def _distinct(items: tuple[_Item, ...]) -> tuple[_Item, ...]:
    if not items:
        raise ValueError("an empty list (write at least one entry, or leave the key out)")
    if len(set(items)) < len(items):
        raise ValueError("lists the same entry twice (keep one)")
    return items


Distinct: Final = AfterValidator(_distinct)
"""For ``Annotated[tuple[X, ...], Distinct]``: at least one entry, none of them twice."""


# -- table patterns --

_PART: Final = r'"(?:[^"\x00]|"")+"|[\w$*?-]+'
_PATTERN: Final = re.compile(rf"({_PART})\.({_PART})")
_QUOTED: Final = re.compile(r'"(?:[^"]|"")*"')


class _Part(NamedTuple):
    """One side of a pattern: its text without quotes, and whether ``*`` and ``?`` in it mean something."""

    text: str
    glob: bool

    def matches(self, name: str) -> bool:
        # An unquoted part cannot contain "[": of fnmatch's wildcards only * and ? are left.
        return fnmatchcase(name, self.text) if self.glob else name == self.text


@lru_cache(maxsize=4096)
def _parts(pattern: str) -> tuple[_Part, _Part]:
    """Schema and table of a pattern; ValueError, fit for a finding, when it is not one."""
    found = _PATTERN.fullmatch(pattern)
    if found is None:
        dots = _QUOTED.sub("", pattern).count(".")
        if dots == 0:
            raise ValueError("a table without a schema (write public.orders)")
        if dots > 1:
            raise ValueError('more than one dot (write schema.table; quote a dot in a name: public."weird.name")')
        raise ValueError(
            "not a table pattern (write public.orders, with * and ? for any characters; "
            'quote a name with others: public."weird name")'
        )
    schema, table = (
        _Part(part[1:-1].replace('""', '"'), glob=False)
        if part.startswith('"')
        else _Part(part, glob="*" in part or "?" in part)
        for part in found.groups()
    )
    for part in (schema, table):
        if not part.glob and len(part.text.encode()) > NAME_BYTES:
            raise ValueError(f"a name longer than {NAME_BYTES} bytes (write it as PostgreSQL cut it)")
    return schema, table


def split(pattern: str) -> tuple[str, str]:
    """Schema and table of a pattern, without quotes: ``public."a ""b"" c"`` is ``("public", 'a "b" c')``.

    For the name of one table ask `is_glob` first: afterwards a ``*`` in quotes and one outside look the same.

    Raises:
        ValueError: not a pattern; the message says why and what would be right.
    """
    schema, table = _parts(pattern)
    return schema.text, table.text


def is_glob(pattern: str) -> bool:
    """Whether a pattern may match more than one table: a ``*`` or ``?`` outside quotes.

    Raises:
        ValueError: not a pattern.
    """
    return any(part.glob for part in _parts(pattern))


def matches(pattern: str, schema: str, table: str) -> bool:
    """Whether a pattern covers a table.

    Names compare as PostgreSQL stores them, upper and lower case apart: ``public.Orders`` is not folded and
    means the table that SQL calls ``public."Orders"``.

    Args:
        pattern: ``schema.table``; ``*`` stands for any characters, ``?`` for one; a quoted part is literal.
        schema: name as in ``pg_namespace.nspname``.
        table: name as in ``pg_class.relname``.

    Raises:
        ValueError: not a pattern.
    """
    schema_part, table_part = _parts(pattern)
    return table_part.matches(table) and schema_part.matches(schema)


def like(pattern: str) -> tuple[str, str]:
    """A pattern for SQL's LIKE, on the schema and on the table.

    Raises:
        ValueError: not a pattern.
    """

    def one(part: _Part) -> str:
        text = re.sub(r"([\\%_])", r"\\\1", part.text)
        return text.replace("*", "%").replace("?", "_") if part.glob else text

    schema, table = _parts(pattern)
    return one(schema), one(table)


def _table_pattern(value: str) -> str:
    _parts(value)
    return value


TablePattern = Annotated[str, AfterValidator(_table_pattern)]
"""``schema.table``; ``*`` and ``?`` in either part, or a part in SQL's double quotes. No default schema."""


# -- what every sink shares --


class BatchOptions(StrictModel):
    """How much is handed to a sink at once.

    Attributes:
        events: at most so many events.
        bytes: at most so many bytes of row data.
        linger: seconds; the longest pause between polls of the outbox while changes are flowing.
    """

    events: int = Field(default=500, ge=1, le=100_000)
    bytes: Size = Field(default=4 * 2**20, ge=1)
    linger: Duration = Field(default=0.020, gt=0)


class RetryOptions(StrictModel):
    """Pauses between attempts after a transient failure.

    Attributes:
        initial: seconds before the second attempt; it doubles from there.
        max: seconds no pause exceeds.
    """

    initial: Duration = Field(default=0.2, gt=0)
    max: Duration = Field(default=300.0, gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> RetryOptions:
        if self.initial > self.max:
            raise ValueError("initial is longer than max (write a max of at least initial)")
        return self


class TlsOptions(StrictModel):
    """How a sink's connection is encrypted; files are read again at each connection.

    Attributes:
        ca: file of the authorities to trust, PEM; None: the system's.
        certificate: file of the client's own certificate, and those up to its authority, PEM.
        key: file of its private key, without a passphrase; None: in the certificate's file.
        verify: whether the server must prove who it is; False is for tests.
    """

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    verify: bool = True

    @model_validator(mode="after")
    def _key_needs_certificate(self) -> TlsOptions:
        if self.key is not None and self.certificate is None:
            raise ValueError("key without certificate (name both, or neither)")
        return self


class SinkOptions(StrictModel):
    """The fields every sink shares; a sink subclasses this and narrows `type` to its own ``Literal``.

    Attributes:
        binding: how headers go beside an event at this sink; None: it has no headers.
        type: the sink's name in the registry.
        databases: names of configured databases; None means all of them.
        tables: patterns of the tables whose events this sink wants.
        ops: the operations it wants.
        filter: CEL expression over the event; see `cdc.filters`.
        format: shape of the event on the wire.
        start: where a sink begins that has no position yet.
        batch: how much is handed over at once.
        retry: pauses after a transient failure.
        on_permanent_failure: what becomes of an event that can never be delivered.
    """

    binding: ClassVar[Binding | None] = None

    type: str
    databases: Annotated[tuple[str, ...], Distinct] | None = None
    tables: Annotated[tuple[TablePattern, ...], Distinct] = ("*.*",)
    ops: Annotated[tuple[EventOp, ...], Distinct] = ALL_EVENT_OPS
    filter: Annotated[str, AfterValidator(filters.check)] | None = None
    format: Format = "native"
    start: Literal["now", "earliest", "backfill"] = "now"
    batch: BatchOptions = BatchOptions()
    retry: RetryOptions = RetryOptions()
    on_permanent_failure: FailurePolicy = "dead_letter"

    @field_validator("format")
    @classmethod
    def _can_be_written(cls, value: Format) -> Format:
        if value == "cloudevents-binary" and cls.binding is None:
            raise ValueError("a format for sinks with headers, which this one is not (write cloudevents)")
        return value

    def wants(self, database: str, schema: str, table: str, op: EventOp) -> bool:
        """Whether an event of this database, table and operation is to be delivered here."""
        return (
            op in self.ops
            and (self.databases is None or database in self.databases)
            and any(matches(pattern, schema, table) for pattern in self.tables)
        )
