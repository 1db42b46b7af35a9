"""From a value in an event to what PostgreSQL's own input functions read, by the type of the column it goes to.

PostgreSQL can do this itself (``json_populate_record``), and not exactly: it writes the strings of a ``json`` column
anew, refuses a whole batch for one ``\\u0000`` in it, and has no way for types with a cast to json of their own, as
``hstore``. So the text is made here, from the text in the event, and no value is ever parsed into a number, a date or a
float:

* a JSON string is its characters, a number or boolean its own text, ``null`` is NULL;
* ``json`` and ``jsonb`` are the JSON as it stands there;
* arrays and composites are PostgreSQL's literals of them, element by element; ``int2vector`` and ``hstore`` likewise.

What is lost before it gets here cannot be had: the lower bounds of arrays, and whether ``null`` in a json column was
JSON's or SQL's. A nested array in ``json[]`` is taken for an element that is an array, not for a second dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # C speed; typeshed leaves it out

from cdc.errors import TransientFailure
from cdc.event import split_array, split_row

Write = Callable[[str], str | None]
"""JSON text → the text of the value; None for NULL.

Raises ValueError where the type has no such value, TransientFailure where the target's type is not the source's.
"""


@dataclass(frozen=True, slots=True)
class Type:
    """A type of the target, as its catalogue tells it.

    Attributes:
        schema, name: of the type.
        array: schema and name of the type of its arrays, or None.
        kind: ``b`` base, ``c`` composite, ``d`` domain, ``e`` enum, ``r`` range, ``m`` multirange.
        base: oid of the type a domain is made of, or 0.
        element: oid of the type of an array's elements, or 0.
        delimiter: between the elements of its arrays.
        attributes: of a composite: name → oid of the type.
    """

    schema: str
    name: str
    array: tuple[str, str] | None
    kind: str
    base: int
    element: int
    delimiter: str
    attributes: Mapping[str, int]

    @property
    def is_vector(self) -> bool:
        """An array that is written without braces."""
        return self.schema == "pg_catalog" and self.name in {"int2vector", "oidvector"}


class Types:
    """The types of a table, and how their values are written."""

    def __init__(self, types: Mapping[int, Type]) -> None:
        """
        Args:
            types: oid → type, of every type that a column, or a part of one, has.
        """
        self._types = types
        self._writers: dict[int, Write] = {}

    def __getitem__(self, oid: int) -> Type:
        return self._types[oid]

    def basic(self, oid: int) -> Type:
        """The type itself, or what a domain is made of in the end."""
        found = self._types[oid]
        while found.kind == "d":
            found = self._types[found.base]
        return found

    def writer(self, oid: int) -> Write:
        """How values of a type are written."""
        found = self._writers.get(oid)
        if found is None:
            found = self._writers[oid] = self._writer(self.basic(oid))
        return found

    def _writer(self, basic: Type) -> Write:
        if basic.is_vector:
            return _vector
        if basic.element:
            return self._array(basic)
        if basic.kind == "c":
            return self._composite(basic)
        if basic.name in {"json", "jsonb"} and basic.schema == "pg_catalog":
            return _document
        if basic.name == "hstore":
            return _hstore
        return _scalar

    def _array(self, basic: Type) -> Write:
        write = self.writer(basic.element)
        element = self.basic(basic.element)
        has_dimensions = not (element.element or element.is_vector or write is _document)
        delimiter = self._types[basic.element].delimiter

        def literal(text: str) -> str:
            if text == "null":
                return "NULL"
            if has_dimensions and text.startswith("["):
                return "{" + delimiter.join([literal(each) for each in split_array(text)]) + "}"
            return quoted(write(text))

        def array(text: str) -> str | None:
            if text == "null":
                return None
            return "{" + delimiter.join([literal(each) for each in split_array(text)]) + "}"

        return array

    def _composite(self, basic: Type) -> Write:
        writers = {name: self.writer(oid) for name, oid in basic.attributes.items()}

        def composite(text: str) -> str | None:
            if text == "null":
                return None
            values = split_row(text)
            if unknown := [name for name in values if name not in writers]:
                name = f"{basic.schema}.{basic.name}"
                raise TransientFailure(f"type {name} of the target has no attribute {unknown[0]} (add it)")
            written = [write(values[name]) if name in values else None for name, write in writers.items()]
            return "(" + ",".join(["" if each is None else quoted(each) for each in written]) + ")"

        return composite


def quoted(text: str | None) -> str:
    """An element of an array literal, or a field of a row literal; NULL is the word."""
    if text is None:
        return "NULL"
    if "\\" in text or '"' in text:
        text = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def array_literal(texts: Iterable[str | None], delimiter: str) -> str:
    """An array of one dimension, of values already written."""
    return "{" + delimiter.join([quoted(text) for text in texts]) + "}"


def _scalar(text: str) -> str | None:
    if text.startswith('"'):
        return str(scanstring(text, 1)[0]) if "\\" in text else text[1:-1]
    return None if text == "null" else text


def _document(text: str) -> str | None:
    return None if text == "null" else text


def _vector(text: str) -> str | None:
    return None if text == "null" else " ".join([_scalar(each) or "" for each in split_array(text)])


def _hstore(text: str) -> str | None:
    if text == "null":
        return None
    # Its own cast to json makes every value a string, or null; other casts leave numbers and booleans as they are.
    return ",".join([f"{quoted(name)}=>{quoted(_scalar(value))}" for name, value in split_row(text).items()])
