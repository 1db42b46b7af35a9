"""`filter:` of a sink: one condition over the event, in the Common Expression Language (https://cel.dev).

The expression is compiled once, against the types below, so that a name that does not exist and an operator that does
not fit are found when the configuration is read. Each event is then put to it as the variables it names, and no
others; of a row it names single columns of (``after.amount``) only those are read.

The variables are the event's own, with one difference that makes ``has(after.amount)`` safe everywhere: what the
event does not have is empty, not null.

| variable | type | |
|---|---|---|
| op | string | insert, update, delete, truncate, read |
| database, schema, table | string | |
| id | string | |
| ts | timestamp | when the change was recorded |
| key, before, after | map(string, dyn) | empty where the event has none |
| changed | list(string) | empty except for an update |
| context | map(string, dyn) | cdc.context, if it is a JSON object; else empty |

Values are those of the JSON. Whole numbers are int (to 2^63-1) or uint (to 2^64-1); all other numbers, and larger
ones, are double, which holds 15 to 17 digits. CEL compares int, uint and double with each other, and refuses to
calculate across them: ``double(after.amount) * 1.19 > 100.0``.

An event for which the condition cannot be evaluated (a column it does not have, types that do not fit) is a permanent
failure of that event: it must neither pass nor be lost. The text of such a failure holds no value of the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from cdc.errors import PermanentFailure
from cdc.event import Event, Image, Json, split_row

_MISSING = "a filter needs a library that is not installed (pip install 'table-cdc[filter]')"
_LITERAL = r""""[^"\\]*"|'[^'\\]*'"""


class Filter:
    """A compiled condition. For one thread at a time."""

    def __init__(self, expression: str) -> None:
        """
        Raises:
            ValueError: not a condition, fit for a finding; or the library is missing. Does not quote the expression.
        """
        try:
            from cel_expr_python import cel  # noqa: PLC0415  # an extra
        except ImportError:
            raise ValueError(_MISSING) from None
        types = {
            **dict.fromkeys(("op", "database", "schema", "table", "id"), cel.Type.STRING),
            **dict.fromkeys(("key", "before", "after", "context"), cel.Type.Map(cel.Type.STRING, cel.Type.DYN)),
            "changed": cel.Type.List(cel.Type.STRING),
            "ts": cel.Type.TIMESTAMP,
        }
        try:
            self._program = cel.NewEnv(variables=types).compile(expression)
        except RuntimeError as error:
            raise ValueError(_complaint(str(error), sorted(types))) from None
        kind = self._program.return_type()
        if kind not in (cel.Type.BOOL, cel.Type.DYN):
            raise ValueError(
                f"not a condition: its value is of type {kind.name().lower()} (write one that is true or false)"
            )
        self._error = cel.Type.ERROR
        self._variables = {
            name: make
            for name, make in {**_PLAIN, **_maps(expression)}.items()
            if re.search(rf"\b{name}\b", expression)
        }

    def passes(self, event: Event) -> bool:
        """Whether the condition is true of an event.

        Raises:
            PermanentFailure: it cannot be evaluated.
        """
        try:
            found = self._program.eval(data={name: make(event) for name, make in self._variables.items()})
        except (RuntimeError, ValueError, TypeError, RecursionError):
            raise PermanentFailure("the filter cannot be evaluated: a value of the event cannot be read") from None
        value = found.value()
        if found.type() == self._error:
            raise PermanentFailure(f"the filter cannot be evaluated: {_reason(str(value))}")
        if not isinstance(value, bool):
            raise PermanentFailure(f"the filter cannot be evaluated: it gives a {found.type().name().lower()}")
        return value


def check(expression: str) -> str:
    """For a field of the configuration: the expression itself, if it compiles. Raises ValueError as :class:`Filter`."""
    Filter(expression)
    return expression


# -- the event as CEL sees it -----------------------------------------------------------------------------------

_PLAIN: Final[Mapping[str, Callable[[Event], Any]]] = {
    "op": lambda event: event.op.value,
    "database": lambda event: event.source.database,
    "schema": lambda event: event.source.schema_name,
    "table": lambda event: event.source.table,
    "id": lambda event: event.id,
    "ts": lambda event: event.source.ts,
    "changed": lambda event: list(event.changed or ()),
    "context": lambda event: _context(event.context),
}


def _maps(expression: str) -> dict[str, Callable[[Event], Any]]:
    key, before, after = (_columns(name, expression) for name in ("key", "before", "after"))
    return {
        "key": lambda event: _map(event.key, key),
        "before": lambda event: _map(event.before, before),
        "after": lambda event: _map(event.after, after),
    }


def _columns(name: str, expression: str) -> frozenset[str] | None:
    """The columns an expression names of a row; None where it may look at any.

    Errs on the side of None: every mention of the row must be followed by one column's name and nothing that could
    make it a function's.
    """
    if "//" in expression:
        return None  # perhaps a comment between a name and what follows it
    column = rf"\s*\.\s*([A-Za-z_]\w*)\b(?!\s*\()|\s*\[\s*({_LITERAL})\s*\]"
    found = [
        re.match(column, expression[mention.end() :], re.ASCII) for mention in re.finditer(rf"\b{name}\b", expression)
    ]
    if not all(found):
        return None
    return frozenset(match[1] or match[2][1:-1] for match in found if match)


def _map(image: Image | None, columns: frozenset[str] | None) -> dict[str, Any]:
    if image is None:
        return {}
    row = split_row(image.raw)
    return {name: _value(row[name]) for name in (row if columns is None else columns) if name in row}


def _context(context: Json | None) -> dict[str, Any]:
    value = None if context is None else _value(context.raw)
    return value if isinstance(value, dict) else {}


def _value(raw: str) -> Any:
    return _decoder.decode(raw)


def _whole(digits: str) -> int | float:
    try:
        number = int(digits)
    except ValueError:  # Python refuses to convert more than 4300 digits to int
        return float(digits)
    return number if -(2**63) <= number < 2**64 else float(digits)


_decoder = json.JSONDecoder(parse_int=_whole)


# -- what is wrong, without a value -----------------------------------------------------------------------------


def _complaint(error: str, variables: list[str]) -> str:
    """What the compiler says, as a finding."""
    found = re.search(r"<input>:(\d+):(\d+): (.*)", error)
    if found is None:
        return "not CEL, or too much of it (see docs/delivery.md, Filters)"
    line, column, message = found.groups()
    place = f"line {line}, column {column}"
    if message.startswith("undeclared reference"):
        return f"an unknown name at {place} (variables: {', '.join(variables)})"
    if message.startswith("found no matching overload"):
        cure = (
            "what an event does not have is empty, not null"
            if "null_type" in message
            else "see docs/delivery.md, Filters"
        )
        return f"an operator or function whose operands do not fit at {place} ({cure})"
    return f"not CEL at {place} (see docs/delivery.md, Filters)"


def _reason(error: str) -> str:
    """What the evaluation says, without what may have come from a row."""
    if error.startswith("NOT_FOUND"):
        return "the event does not have a column that it asks for (ask first: has(after.column))"
    if found := re.fullmatch(r"UNKNOWN: No matching overloads found : ([^\s(]+)\(([\w, ]*)\)", error):
        return f"it cannot apply {found[1].strip('_@')} to {found[2].replace(', ', ' and ')}"
    if "SELECT to non-message" in error:
        return "it looks into a value that holds nothing, such as null"
    for sign, reason in _REASONS.items():
        if sign in error:
            return reason
    return "an operation of it fails"


_REASONS: Final = {
    "regular expression": "it has no valid regular expression",
    "divide by zero": "it divides by zero",
    "modulus by zero": "it divides by zero",
    "overflow": "a number becomes too large",
    "onver": "a value cannot be converted",  # cannot convert, conversion failed
}
