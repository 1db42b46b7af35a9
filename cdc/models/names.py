"""Names and texts of a database as Python: every name is usable and taken once, every text is a literal and no more.

Whoever may create a table or comment on one decides what stands here, and the module is imported by others: nothing of
it may be anything but a name, a string or a comment.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from collections.abc import Collection, Iterable

from pydantic import BaseModel


class Names:
    """The names of one scope: a module's, a class's."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

    def take(self, name: str, suffixes: Collection[str] = ("",)) -> str:
        """A name nobody has taken yet, with a number if need be; it is free, and then taken, with each suffix."""
        number = 1
        while True:
            free = name if number == 1 else f"{name}{number}" if not name[-1].isdigit() else f"{name}_{number}"
            wanted = {free + suffix for suffix in suffixes}
            if not wanted & self._taken:
                self._taken |= wanted
                return free
            number += 1


def class_name(schema: str, name: str) -> str:
    """``OrderItems`` for public.order_items, ``BillingOrders`` for billing.orders."""
    parts = [name] if schema == "public" else [schema, name]
    pascal = "".join(word[:1].upper() + word[1:] for part in parts for word in _words(part))
    return _identifier(pascal, "T")


def member_name(label: str) -> str:
    """``NOT_YET`` for the label ``not yet`` of an enum."""
    return _identifier("_".join(_words(label)).upper(), "VALUE")


def field_name(column: str, reserved: Collection[str]) -> str:
    """The column itself where that can be an attribute, else something near: ``class_``, ``column_1st``.

    Args:
        column: its name.
        reserved: what an attribute must not be called either; see :func:`unusable`.
    """
    letters = "".join(c if ("a" + c).isidentifier() else "_" for c in unicodedata.normalize("NFKC", column))
    name = _identifier(letters.lstrip("_"), "column")  # pydantic keeps a leading underscore for itself
    while name in reserved:
        name += "_"
    return name


def unusable(globals_: Iterable[str]) -> frozenset[str]:
    """What no field may be called: what pydantic's models have, and what annotations say (``date: Date``)."""
    return frozenset({*dir(BaseModel), *globals_, "self", "cls"})


def _words(text: str) -> list[str]:
    letters = "".join(c if ("a" + c).isidentifier() else "_" for c in unicodedata.normalize("NFKC", text))
    return [word for word in letters.split("_") if word]


def _identifier(name: str, prefix: str) -> str:
    """An identifier that Python leaves as it is: it folds some characters into others."""
    name = unicodedata.normalize("NFKC", name)
    if not name.isidentifier():
        name = f"{prefix}_{name}" if name else prefix
    if not name.isidentifier():
        name = prefix
    return name + "_" if keyword.iskeyword(name) else name


def literal(text: str) -> str:
    """A text as a string literal on one line; what cannot be seen is escaped."""
    quote = "'" if '"' in text and "'" not in text else '"'
    return quote + "".join("\\" + c if c in (quote, "\\") else _visible(c) for c in text) + quote


def remark(text: str) -> str:
    """A text for the rest of a line."""
    return "".join(map(_visible, text))


def docstring(text: str, indent: str) -> list[str]:
    """A docstring, as the lines it takes; `text` is not blank."""
    lines = [line.rstrip() for line in re.split(r"\r\n|\r|\n", text.expandtabs().strip())]
    escaped = ["".join("\\\\" if c == "\\" else _visible(c) for c in line) for line in lines]
    # Quotes that would end the docstring: three of them, or one before the three at its end.
    escaped = [line.replace('"', '\\"') if '"""' in line or line.endswith('"') else line for line in escaped]
    first, *rest = escaped
    if not rest:
        return [f'{indent}"""{first}"""']
    return [f'{indent}"""{first}', *(indent + line if line else "" for line in rest), f'{indent}"""']


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character) or (
        f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )
