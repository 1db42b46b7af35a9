"""``model: module:Class``: the rows of a table are held against a pydantic model before they are delivered.

Of an insert, a read and a delete, that is the row; so are both rows of an update under ``image: full``. An update under
``image: diff`` has only some columns, each of which is held against its field: that others are missing is no error, and
what the model says of several fields together (its model validators) does not count. A truncate, or an event that is
truncated, has nothing to look at.

Numbers count digit for digit, and everything else as JSON has it: a date is a text, to a strict model too. pydantic's
own way from JSON makes doubles of numbers, and its way from Python objects has strict models refuse texts for dates,
UUIDs and enums. So JSON is what it reads, with every number in quotes that a double does not hold: to a ``Decimal``
that is the same number, and a strict ``float`` is no place for it.

The classes are imported when a command starts that needs them. What is wrong with one is an error of the configuration.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import AliasChoices, AliasPath, BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from cdc.config import Config, DatabaseConfig
from cdc.errors import ConfigError
from cdc.event import Event, Image, Op

Validate = Callable[[Event], str | None]
"""Why an event does not fit the model of its table; None when it does, or there is none."""

_STRING_OR_NUMBER: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?')
_DIGITS_OF_A_DOUBLE: Final = 15
_DIGITS_OF_AN_INT: Final = 4300
_MOST_TOLD: Final = 10


def load_all(config: Config, file: Path) -> dict[str, Validate]:
    """Import every class that ``model:`` names.

    Args:
        config: the whole configuration.
        file: where it stands, for what is wrong with it.

    Returns:
        By the name of a database that has any models.

    Raises:
        ConfigError: every reference that leads to no model, at once.
    """
    findings = []
    validators: dict[str, Validate] = {}
    for name, database in config.databases.items():
        classes: dict[str, type[BaseModel]] = {}
        for pattern, table in database.tables.items():
            if table.model is None:
                continue
            try:
                classes[table.model] = load(table.model)
            except ValueError as error:
                findings.append(f"{file}: databases.{name}.tables.{pattern}.model: {error}")
        if classes:
            validators[name] = _validator(database, classes)
    if findings:
        raise ConfigError(findings)
    return validators


def load(reference: str) -> type[BaseModel]:
    """The class that ``module:Class`` names.

    Raises:
        ValueError: what is wrong (what would be right).
    """
    module, _, name = reference.partition(":")
    try:
        found: object = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"{module} needs module {error.name} (install it where cdc runs)") from None
        raise ValueError(f"no module {error.name} (install it where cdc runs, or put it beside this file)") from None
    except Exception as error:  # noqa: BLE001  whatever the module does
        # Its text is the module's own, and may say anything.
        reason = f"{module} cannot be imported: {type(error).__name__}"
        raise ValueError(f"{reason} (python -c 'import {module}' says more)") from None
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise ValueError(f"{module} has no {name} (name a class it has)")
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        what = f"{name} is no pydantic model (name a subclass of pydantic.BaseModel)"
        raise ValueError(what)  # noqa: TRY004  a finding like the others
    try:
        found.model_rebuild()
    except (PydanticUserError, NameError):
        raise ValueError(f"{name} names a type that its module does not have (import it there)") from None
    return found


def _validator(database: DatabaseConfig, classes: Mapping[str, type[BaseModel]]) -> Validate:
    @cache
    def model_of(schema: str, table: str) -> RowModel | None:
        options = database.options_for(schema, table)
        if options is None or options.model is None:
            return None
        return RowModel(classes[options.model], reference=options.model, image=options.image)

    def validate(event: Event) -> str | None:
        _, schema, table, _ = event.route
        model = model_of(schema, table)
        return None if model is None else model.validate(event)

    return validate


class RowModel:
    """The model of one table's rows."""

    def __init__(self, model: type[BaseModel], *, reference: str, image: Literal["diff", "full"]) -> None:
        """
        Args:
            model: the class.
            reference: as the configuration names it.
            image: how the table is captured now; an event in the outbox may have been captured otherwise.
        """
        self._reference = reference
        self._adapter = TypeAdapter(model)
        self._image = image
        self._columns = {name: _columns_of(name, field) for name, field in model.model_fields.items()}

    def validate(self, event: Event) -> str | None:
        """Why an event does not fit: columns and kinds of errors, no values; None when it does."""
        is_part = event.op is Op.UPDATE and event.after is not None and set(event.after) == set(event.changed or ())
        found = dict.fromkeys(
            f"{side}.{column} {kind}"
            for side, image in (("before", event.before), ("after", event.after))
            if image is not None
            for column, kind in self._errors(image, is_part=is_part)
        )
        if not found:
            return None
        told = ", ".join(list(found)[:_MOST_TOLD])
        more = f" and {len(found) - _MOST_TOLD} more" if len(found) > _MOST_TOLD else ""
        return f"the row does not fit {self._reference}: {told}{more}"

    def _errors(self, image: Image, *, is_part: bool) -> Iterator[tuple[str, str]]:
        """Column and kind of each error."""
        try:
            self._read(image)
        except ValidationError as error:
            details = _details(error)
        except Exception as error:  # noqa: BLE001  of the model's own code
            if not is_part:
                yield "*", type(error).__name__
            return
        else:
            return
        if is_part and self._image == "full":
            # Whole rows that changed in every column, unless the event is older than `image: full`.
            is_part = any(detail["type"] == "missing" and len(detail["loc"]) == 1 for detail in details)
        for detail in details:
            where = detail["loc"][:1]  # what follows may be made of the row's own words
            if not is_part or (where and self._has(image, where[0])):
                yield str(where[0]) if where else "*", detail["type"]

    def _read(self, image: Image) -> None:
        """Raises ValidationError, or what the model's own code raises."""
        text = exact(image.raw)
        try:
            self._adapter.validate_json(text)
        except ValidationError as error:
            if not _is_unparsed(error):
                raise
            # In a column of type json, and beyond pydantic's parser: half a surrogate pair, hundreds of levels.
            self._adapter.validate_python(_loads(text, image))

    def _has(self, image: Image, where: str | int) -> bool:
        """Whether an image has the column an error is about, which may go by the field's name."""
        return where in image or any(column in image for column in self._columns.get(str(where), ()))


def _columns_of(name: str, field: FieldInfo) -> list[str]:
    """What a field may be called in a row."""
    alias = field.validation_alias or field.alias or name
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
    return [str(choice.path[0]) if isinstance(choice, AliasPath) else choice for choice in choices]


def _details(error: ValidationError) -> list[ErrorDetails]:
    return error.errors(include_url=False, include_context=False, include_input=False)


def _is_unparsed(error: ValidationError) -> bool:
    if error.error_count() > 1:
        return False
    (detail,) = _details(error)
    return detail["type"] == "json_invalid" and not detail["loc"]


def _loads(text: str, image: Image) -> Any:
    try:
        return json.loads(text)
    except RecursionError:  # thousands of levels
        return image.value


def exact(text: str) -> str:
    """JSON with every number in quotes that a double, or Python's int, does not hold digit for digit."""
    return _STRING_OR_NUMBER.sub(_in_quotes_if_inexact, text)


def _in_quotes_if_inexact(found: re.Match[str]) -> str:
    token = found[0]
    if token.startswith('"') or (len(token) <= _DIGITS_OF_A_DOUBLE and "e" not in token.lower()):
        return token
    if token.lstrip("-").isdigit():
        return token if len(token) <= _DIGITS_OF_AN_INT else f'"{token}"'
    try:
        held = Decimal(repr(float(token))) == Decimal(token)
    except ArithmeticError:  # an exponent no Decimal has
        held = False
    return token if held else f'"{token}"'
