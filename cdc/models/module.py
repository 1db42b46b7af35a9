"""A Python module for the people who consume the events, made of what the catalogue knows.

It needs pydantic and nothing of ours. Its parts come in the order in which Python needs them: types of columns
(:data:`_ALIASES`), what every such module has (:data:`_MODELS`), enums and composites, the tables.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cdc.models.catalogue import Catalogue, Column, Table, Type, qualified
from cdc.models.names import Names, class_name, docstring, field_name, literal, member_name, remark, unusable

_WIDTH = 88
"""Where a list of imports is broken, as ruff and black do by default."""


@dataclass(frozen=True, slots=True)
class _Alias:
    """A type the columns may have.

    Attributes:
        text: Python, without the imports.
        imports: ``module member``, or ``module`` alone.
        needs: what else of this table has to come first.
    """

    text: str
    imports: Sequence[str] = ()
    needs: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _Field:
    """A column, and what it is called and said to be in Python."""

    column: Column
    name: str
    annotation: str


_SCALAR = ("typing Annotated", "typing_extensions TypeAliasType")
_MOMENT = (*_SCALAR, "pydantic BeforeValidator", "pydantic Field")


def _moment(name: str, type_: str, imports: Iterable[str], about: str, *, schema: bool, needs: Sequence[str]) -> _Alias:
    """A date or a time: a Python object where there is one for it, the text elsewhere.

    Args:
        name: of the alias.
        type_: of the object.
        imports: what it takes.
        about: its docstring.
        schema: say of the texts in JSON Schema what they look like; pydantic would say date-time or time, which are
            moments with an offset.
        needs: validators, the last to run first, and the pattern of the texts.
    """
    *validators, pattern = needs
    lines = [
        f"{type_} | Annotated[str, Field(pattern={pattern})]",
        'Field(union_mode="left_to_right")',
        *(f"BeforeValidator({validator})" for validator in validators),
        *([f'WithJsonSchema({{"type": "string", "pattern": {pattern}}})'] if schema else []),
    ]
    inner = "".join(f"        {line},\n" for line in lines)
    text = f'{name} = TypeAliasType(\n    "{name}",\n    Annotated[\n{inner}    ],\n)\n"""{about}"""'
    return _Alias(text, [*_MOMENT, *imports, *(["pydantic WithJsonSchema"] if schema else [])], needs)


_ALIASES = {
    "_DATE": _Alias('_DATE = "[0-9]{4,7}-[0-9]{2}-[0-9]{2}"'),
    "_TIME": _Alias(r'_TIME = r"[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?"'),
    "_OFFSET": _Alias('_OFFSET = "[+-][0-9]{2}(:[0-9]{2}){0,2}"'),
    "_DATES": _Alias('_DATES = f"^(-?infinity|{_DATE}( BC)?)$"', needs=["_DATE"]),
    "_TIMES": _Alias('_TIMES = f"^{_TIME}$"', needs=["_TIME"]),
    "_TIMES_TZ": _Alias('_TIMES_TZ = f"^{_TIME}{_OFFSET}$"', needs=["_TIME", "_OFFSET"]),
    "_TIMESTAMPS": _Alias('_TIMESTAMPS = f"^(-?infinity|{_DATE}T{_TIME}( BC)?)$"', needs=["_DATE", "_TIME"]),
    "_TIMESTAMPS_TZ": _Alias(
        '_TIMESTAMPS_TZ = f"^(-?infinity|{_DATE}T{_TIME}{_OFFSET}( BC)?)$"', needs=["_DATE", "_TIME", "_OFFSET"]
    ),
    "_text": _Alias(
        '''\
def _text(value: object) -> object:
    """Let no number through: pydantic would take it for seconds since 1970."""
    is_number = isinstance(value, int | float | Decimal)
    if is_number:
        raise ValueError("a text is expected")
    return value''',
    ),
    "_offset": _Alias(
        '''\
def _offset(value: object) -> object:
    """Write an offset of whole hours as pydantic reads it: +05:00 for +05."""
    if isinstance(value, str) and value[-3:-2] in ("+", "-") and value < "24":
        return value + ":00"
    return value''',
    ),
    "_NUMBERS": _Alias(
        """\
_NUMBERS = WithJsonSchema(
    {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
)""",
        ["pydantic WithJsonSchema"],
    ),
    "Boolean": _Alias(
        '''\
Boolean = TypeAliasType("Boolean", Annotated[bool, Strict()])
"""boolean"""''',
        [*_SCALAR, "pydantic Strict"],
    ),
    "Integer": _Alias(
        '''\
Integer = TypeAliasType("Integer", Annotated[int, Strict()])
"""smallint, integer, bigint"""''',
        [*_SCALAR, "pydantic Strict"],
    ),
    "Numeric": _Alias(
        '''\
Numeric = TypeAliasType(
    "Numeric", Annotated[Decimal, Field(allow_inf_nan=True), _NUMBERS]
)
"""numeric: digit for digit, NaN and the infinities included"""''',
        _SCALAR,
        ["_NUMBERS"],
    ),
    "Double": _Alias(
        '''\
Double = TypeAliasType("Double", Annotated[float, _NUMBERS])
"""real, double precision: NaN and the infinities included"""''',
        _SCALAR,
        ["_NUMBERS"],
    ),
    "Date": _moment(
        "Date",
        "date",
        ["datetime date"],
        "date: infinity, years BC and beyond 9999 stay text",
        schema=False,
        needs=["_text", "_DATES"],
    ),
    "Time": _moment(
        "Time", "time", ["datetime time"], "time: 24:00:00 stays text", schema=True, needs=["_text", "_TIMES"]
    ),
    "TimeTz": _moment(
        "TimeTz",
        "time",
        ["datetime time"],
        "time with time zone: 24:00:00 and offsets with seconds stay text",
        schema=True,
        needs=["_offset", "_text", "_TIMES_TZ"],
    ),
    "Timestamp": _moment(
        "Timestamp",
        "NaiveDatetime",
        ["pydantic NaiveDatetime"],
        "timestamp: infinity, years BC and beyond 9999 stay text",
        schema=True,
        needs=["_text", "_TIMESTAMPS"],
    ),
    "TimestampTz": _moment(
        "TimestampTz",
        "AwareDatetime",
        [],
        "timestamp with time zone: infinity, years BC and beyond 9999 stay text",
        schema=False,
        needs=["_text", "_TIMESTAMPS_TZ"],
    ),
    "Hstore": _Alias(
        '''\
Hstore = TypeAliasType("Hstore", dict[str, str | None])
"""hstore"""''',
        ["typing_extensions TypeAliasType"],
    ),
    "Array": _Alias(
        '''\
ElementT = TypeVar("ElementT")
Array = TypeAliasType(
    "Array", "list[ElementT | None | Array[ElementT]]", type_params=(ElementT,)
)
"""An array: PostgreSQL lets a value have more dimensions than were declared"""''',
        ["typing TypeVar", "typing_extensions TypeAliasType"],
    ),
    "UUID": _Alias("", ["uuid UUID"]),
    "Any": _Alias(""),
    "str": _Alias(""),
}
"""What annotations of columns are made of, and what these are made of, in the order in which Python needs them."""

_TYPES = {
    "bool": "Boolean",
    "int2": "Integer",
    "int4": "Integer",
    "int8": "Integer",
    "numeric": "Numeric",
    "float4": "Double",
    "float8": "Double",
    "date": "Date",
    "time": "Time",
    "timetz": "TimeTz",
    "timestamp": "Timestamp",
    "timestamptz": "TimestampTz",
    "uuid": "UUID",
    "json": "Any",
    "jsonb": "Any",
}
"""Types of pg_catalog that are more to Python than text."""

_MODELS_IMPORTS = (
    "json",
    "decimal Decimal",
    "typing Any",
    "typing Literal",
    "typing Self",
    "pydantic AwareDatetime",
    "pydantic BaseModel",
    "pydantic ConfigDict",
    "pydantic Field",
    "pydantic model_validator",
)
_MODELS = '''\
def _whole(digits: str) -> int | Decimal:
    try:
        return int(digits)
    except ValueError:  # more digits than Python makes an int of
        return Decimal(digits)


def _fraction(digits: str) -> Decimal | str:
    try:
        return Decimal(digits)
    except ArithmeticError:  # an exponent no Decimal has
        return digits


class Model(BaseModel):
    """Reads what it knows and passes over the rest, such as columns added later."""

    model_config = ConfigDict(
        frozen=True, hide_input_in_errors=True, protected_namespaces=()
    )

    @classmethod
    def model_validate_json(
        cls, json_data: str | bytes | bytearray, **options: Any
    ) -> Self:
        """Digit for digit; pydantic itself reads JSON's numbers as doubles."""
        data = json.loads(json_data, parse_int=_whole, parse_float=_fraction)
        return cls.model_validate(data, **options)


class Row(Model):
    """A whole row."""


class Change(Model):
    """The columns that an update changed; `model_fields_set` names them."""


class Source(Model):
    """Where and when the change happened."""

    database: str
    schema_name: str = Field(alias="schema")
    table: str
    seq: int
    txid: int
    ts: AwareDatetime


class Event(Model):
    """One change. `id` is the same however often it is delivered."""

    version: Literal[1]
    id: str
    op: Literal["insert", "update", "delete", "truncate", "read"]
    source: Source
    key: Model | None
    before: Model | None
    after: Model | None
    changed: tuple[str, ...] | None
    context: Any
    truncated: bool = False
    """The row was too large: `key` says which one, `before` and `after` are None."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        wanted = {
            "insert": (False, True),
            "update": (True, True),
            "delete": (True, False),
            "truncate": (False, False),
            "read": (False, True),
        }[self.op]
        if self.truncated:
            wanted = (False, False)
        if (self.before is not None, self.after is not None) != wanted:
            raise ValueError("before and after do not go with op")
        images = (self.before, self.after)
        if self.op != "update" and any(isinstance(image, Change) for image in images):
            raise ValueError("columns are missing in before or after")
        return self'''
_PARSE = '''\
def parse(line: str | bytes) -> Event:
    """Read an event of one of these tables, as the class of its table.

    Raises:
        KeyError: an event of another table.
        ValueError: not an event, or not one of the table as it was.
    """
    data = json.loads(line, parse_int=_whole, parse_float=_fraction)
    source = Event.model_validate(data).source
    return EVENTS[source.schema_name, source.table].model_validate(data)'''

_SUFFIXES = ("", "Key", "Change", "Source", "Event")
"""What is written for each table."""
_GLOBALS = {
    *(name for name in _ALIASES),
    *("ElementT", "_whole", "_fraction", "Model", "Row", "Change", "Source", "Event", "EVENTS", "parse", "json"),
    *("Annotated", "Any", "AwareDatetime", "BaseModel", "BeforeValidator", "ConfigDict", "Decimal", "Field", "Literal"),
    *("NaiveDatetime", "Self", "StrEnum", "Strict", "TypeAliasType", "TypeVar", "UUID", "WithJsonSchema"),
    *("date", "time", "model_validator"),
    *dir(builtins),
}
"""Every name of the module that is not a table's or a type's."""
_IN_ANNOTATIONS = {*(name for name in _ALIASES), *_TYPES.values(), "Field", "None"}


def write(catalogue: Catalogue, *, database: str, version: str) -> str:
    """The module's text; the same catalogue gives the same text.

    Args:
        catalogue: the tables.
        database: what the database is called in its events.
        version: of this program.
    """
    return _Module(catalogue).text(database, version)


class _Module:
    """A module in the making: what has been used so far, and so has to be imported and defined."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._imports = set(_MODELS_IMPORTS)
        self._aliases: set[str] = set()
        self._names = Names(_GLOBALS)
        self._tables = {
            (table.schema, table.name): self._names.take(class_name(table.schema, table.name), _SUFFIXES)
            for table in catalogue.tables
        }
        self._types: dict[int, str] = {}
        self._classes: list[str] = []

    def text(self, database: str, version: str) -> str:
        tables = [part for table in self._catalogue.tables for part in self._table(table)]
        names = ", ".join(str(table) for table in self._catalogue.tables)
        head = [
            f"# Models of the events of database {remark(database)}, written by cdc {version} from its catalogue.",
            f"# Tables: {remark(names)}",
            "# Write it anew (cdc models) when the tables change, rather than edit it.",
        ]
        parts = []
        for title, texts in (
            ("types of columns", list(self._defined())),
            ("what all tables share", [_MODELS]),
            ("enums and composite types", self._classes),
            ("tables", tables),
            ("any of them", [self._registry(), _PARSE]),
        ):
            if texts:
                gap = "\n\n\n" if texts[0].startswith(("def ", "class ")) else "\n\n"
                parts += [f"# -- {title} --{gap}{texts[0]}", *texts[1:]]
        return "\n".join([*head, "", self._import_lines(), "", "\n\n\n".join(parts)]) + "\n"

    # -- what is used -------------------------------------------------------------------------------------------

    def _use(self, alias: str) -> str:
        """Note that an alias is needed."""
        if alias not in self._aliases:
            self._aliases.add(alias)
            self._imports.update(_ALIASES[alias].imports)
            for other in _ALIASES[alias].needs:
                self._use(other)
        return alias

    def _defined(self) -> Iterator[str]:
        """The aliases that are needed: patterns, functions, types."""
        used = [name for name in _ALIASES if name in self._aliases and _ALIASES[name].text]
        patterns = [_ALIASES[name].text for name in used if name.startswith("_") and name.isupper()]
        types = [_ALIASES[name].text for name in used if not name.startswith("_")]
        if patterns:
            yield "\n".join(patterns)
        yield from (_ALIASES[name].text for name in used if name.startswith("_") and name.islower())
        if types:
            yield "\n\n".join(types)

    def _import_lines(self) -> str:
        """The imports, as isort orders them."""
        plain = sorted(module for module in self._imports if " " not in module)
        froms: dict[str, set[str]] = {}
        for name in self._imports:
            if " " in name:
                module, member = name.split()
                froms.setdefault(module, set()).add(member)
        foreign = ("pydantic", "typing_extensions")
        own = [f"import {module}" for module in plain]
        own += [_import(module, froms[module]) for module in sorted(froms) if module not in foreign]
        return "\n".join(own) + "\n\n" + "\n".join(_import(m, froms[m]) for m in foreign if m in froms)

    # -- types --------------------------------------------------------------------------------------------------

    def _annotation(self, column: Column) -> str:
        found = self._use_of(column.type)
        nullable = column.nullable or found == "Any"  # JSON's null looks like NULL
        if column.hidden:
            found = "str"
        return f"{found} | None" if nullable and found != "Any" else found

    def _use_of(self, oid: int) -> str:
        """What stands for a type in annotations; enums and composites are defined on the way."""
        found = self._catalogue.base(oid)
        if found.kind == "array":
            return f"{self._use('Array')}[{self._use_of(found.of)}]"
        if found.kind == "hstore":
            return self._use("Hstore")
        if found.kind == "cast":
            return self._use("Any")
        if found.kind in ("enum", "composite"):
            return self._class_of(oid, found)
        return self._use(_TYPES.get(found.name, "str") if found.schema == "pg_catalog" else "str")

    def _class_of(self, oid: int, found: Type) -> str:
        while (at := self._catalogue.types[oid]).kind == "domain":
            oid = at.of
        if oid not in self._types:
            self._types[oid] = name = self._names.take(class_name(found.schema, found.name))
            define = self._enum if found.kind == "enum" else self._composite
            self._classes.append(define(name, found))  # after those it is made of
        return self._types[oid]

    def _enum(self, name: str, found: Type) -> str:
        self._imports.add("enum StrEnum")
        names = Names()
        lines = [f"    {names.take(member_name(label))} = {literal(label)}" for label in found.labels]
        return _class(name, "StrEnum", found.comment or f"The enum {qualified(found.schema, found.name)}.", lines)

    def _composite(self, name: str, found: Type) -> str:
        lines = [self._line(field) for field in self._fields(found.attributes)]
        return _class(
            name, "Model", found.comment or f"The composite type {qualified(found.schema, found.name)}.", lines
        )

    # -- tables -------------------------------------------------------------------------------------------------

    def _table(self, table: Table) -> Iterator[str]:
        name = self._tables[table.schema, table.name]
        fields = self._fields(table.columns)
        yield _class(name, "Row", table.comment or f"A row of {table}.", [self._line(field) for field in fields])
        key = "None"
        if table.key:
            key = f"{name}Key | None"
            keys = [field for column in table.key for field in fields if field.column.name == column]
            lines = [self._line(field, bare=True) for field in keys]
            yield _class(f"{name}Key", "Model", f"What identifies a row of {table}.", lines)
        image = f"{name} | None"
        if table.image == "diff":
            image = f"{name} | {name}Change | None"
            about = f"The columns of {table} that an update changed; the others are None."
            lines = [self._line(field, bare=True, partial=True) for field in fields]
            yield _class(f"{name}Change", "Change", about, lines)
        source = [
            f'    schema_name: Literal[{literal(table.schema)}] = Field(alias="schema")',
            f"    table: Literal[{literal(table.name)}]",
        ]
        yield _class(f"{name}Source", "Source", f"Where and when a change of {table} happened.", source)
        event = [f"    source: {name}Source", f"    key: {key}", f"    before: {image}", f"    after: {image}"]
        yield _class(f"{name}Event", "Event", f"A change of {table}.", event)

    def _fields(self, columns: Sequence[Column]) -> list[_Field]:
        annotations = [self._annotation(column) for column in columns]  # first: they name types
        reserved = unusable({*_IN_ANNOTATIONS, *self._types.values(), *self._tables.values()})
        names = Names()
        wanted = {column.name: field_name(column.name, reserved) for column in columns}
        # Who can be called what he is called comes first.
        by_fit = sorted(columns, key=lambda column: wanted[column.name] != column.name)
        given = {column.name: names.take(wanted[column.name]) for column in by_fit}
        return [_Field(column, given[column.name], type_) for column, type_ in zip(columns, annotations, strict=True)]

    def _line(self, field: _Field, *, bare: bool = False, partial: bool = False) -> str:
        """One field.

        Args:
            field: which.
            bare: without comments.
            partial: it may be left out.
        """
        column, annotation = field.column, field.annotation
        if partial and annotation != "Any" and not annotation.endswith("| None"):
            annotation += " | None"
        options = ["default=None"] if partial else []
        if field.name != column.name:
            options.append(f"alias={literal(column.name)}")
        if column.comment and not bare:
            options.append(f"description={literal(column.comment)}")
        head, tail = f"    {field.name}: {annotation}", "" if bare else f"  # {self._remark(column)}"
        if not options:
            return head + tail
        if options == ["default=None"]:
            return f"{head} = None{tail}"
        listed = ", ".join(options)
        if len(line := f"{head} = Field({listed}){tail}") <= _WIDTH:
            return line
        if len(line := f"        {listed}") > _WIDTH:
            line = "\n".join(f"        {option}," for option in options)
        return f"{head} = Field(\n{line}\n    ){tail}"

    def _remark(self, column: Column) -> str:
        written = remark(self._catalogue.written(column))
        return f"{written}, masked: {column.hidden}" if column.hidden else written

    def _registry(self) -> str:
        lines = ["EVENTS: dict[tuple[str, str], type[Event]] = {"]
        for (schema, table), name in self._tables.items():
            lines.append(f"    ({literal(schema)}, {literal(table)}): {name}Event,")
        return "\n".join([*lines, "}", '"""Schema and table → the class of their events."""'])


def _class(name: str, base: str, about: str, lines: Sequence[str]) -> str:
    head = [f"class {name}({base}):", *docstring(about if about.strip() else name, "    ")]
    return "\n".join([*head, "", *lines] if lines else head)


def _import(module: str, members: Iterable[str]) -> str:
    """One import: constants, classes, functions, each by name; broken where it is long."""
    ordered = sorted(members, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    line = f"from {module} import {', '.join(ordered)}"
    if len(line) <= _WIDTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in ordered) + ")"
