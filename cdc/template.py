"""Names made of an event: paths, topics, subjects, routing keys, headers.

``{database}``, ``{schema}``, ``{table}`` and ``{op}`` stand for the event's own in every template. Where a sink allows
it, so do ``{id}``, ``{key}`` (the key as JSON) and ``{key.COLUMN}`` (one column of it, text without its quotes).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final

from pydantic import AfterValidator

from cdc.errors import PermanentFailure
from cdc.event import Event, Route, split_row

ROUTE: Final = ("database", "schema", "table", "op")
"""Placeholders that say where an event comes from."""
CONTENT: Final = ("id", "key", "key.COLUMN")
"""Placeholders that say which row it is about."""

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_CACHED = 10_000


def check(text: str, *names: str) -> str:
    """The text itself, if it is a template that uses only these placeholders. Raises ValueError, fit for a finding."""
    known = ", ".join(f"{{{name}}}" for name in names)
    for name in _PLACEHOLDER.findall(text):
        if name not in names and not ("key.COLUMN" in names and name.startswith("key.") and len(name) > len("key.")):
            raise ValueError(f"a placeholder that does not exist (known: {known})")
    if set("{}") & set(fixed_part(text)):
        raise ValueError(f"a brace without its partner (placeholders: {known})")
    return text


def checked(*names: str) -> AfterValidator:
    """For ``Annotated[str, checked(*ROUTE)]``: a template that uses only these placeholders."""
    return AfterValidator(lambda text: check(text, *names))


def fixed_part(text: str) -> str:
    """A template without its placeholders."""
    return _PLACEHOLDER.sub("", text)


class Template:
    """A checked template, ready to be filled in."""

    def __init__(self, text: str, quote: Callable[[str], str] = str) -> None:
        """
        Args:
            text: what :func:`checked` has let through.
            quote: applied to whatever is filled in, so that a name from the database says only what it is.
        """
        self._text = text
        self._quote = quote
        placeholders = _PLACEHOLDER.findall(text)
        self._is_fixed = not placeholders
        self._is_route = all(name in ROUTE for name in placeholders)
        self._by_route = lru_cache(maxsize=_CACHED)(self._of_route)

    def fill(self, event: Event) -> str:
        """The name for an event.

        Raises:
            PermanentFailure: the event has no such key column.
        """
        if self._is_fixed:
            return self._text
        if self._is_route:
            return self._by_route(event.route)
        return self._put_in(lambda name: _value(event, name))

    def _of_route(self, route: Route) -> str:
        return self._put_in(dict(zip(ROUTE, map(str, route), strict=True)).__getitem__)

    def _put_in(self, value: Callable[[str], str]) -> str:
        return _PLACEHOLDER.sub(lambda found: self._quote(value(found[1])), self._text)


_VALUES: Final[Mapping[str, Callable[[Event], str]]] = {
    "database": lambda event: event.source.database,
    "schema": lambda event: event.source.schema_name,
    "table": lambda event: event.source.table,
    "op": lambda event: event.op.value,
    "id": lambda event: event.id,
    "key": lambda event: "null" if event.key is None else event.key.raw,
}


def _value(event: Event, name: str) -> str:
    if name in _VALUES:
        return _VALUES[name](event)
    column = name.removeprefix("key.")
    if event.key is None or column not in event.key:
        raise PermanentFailure(f"the event has no key column {column}, which a template asks for")
    value = event.key[column]
    return value if isinstance(value, str) else split_row(event.key.raw)[column]
