"""Step three, validate: from a plain tree to a `Config`, or from pydantic's errors to findings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from cdc.config.findings import Findings, KeyPath, at
from cdc.config.models import Config
from cdc.config.words import cure, known_words, listed, nearest
from cdc.options import SinkOptions

# pydantic's names for "wrong type" → what was expected.
_EXPECTED: Final = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "mapping_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "dataclass_type": "the name of a file",
    "dataclass_exact_type": "the name of a file",
    "tuple_type": "a list",
    "list_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "url_type": "a URL",
    "url_parsing": "a URL",
}

# pydantic's names for "out of range" → what to say, filled in from the error's own context.
_RANGES: Final = {
    "greater_than": "too small (more than {gt})",
    "greater_than_equal": "too small (at least {ge})",
    "less_than": "too large (less than {lt})",
    "less_than_equal": "too large (at most {le})",
    "too_short": "too few entries (at least {min_length})",
    "too_long": "too many entries (at most {max_length})",
    "string_too_short": "too short (at least {min_length} characters)",
    "string_too_long": "too long (at most {max_length} characters)",
    "string_pattern_mismatch": "not of the right form (it should match {pattern})",
    "url_scheme": "a URL of the wrong kind (it should begin with {expected_schemes})",
}


def validate(data: object, sink_types: Mapping[str, type[SinkOptions]], findings: Findings) -> Config | None:
    """The configuration a tree stands for; None when pydantic refuses it, and `findings` says why."""
    try:
        return Config.model_validate(data, context={"sink_types": sink_types})
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    for detail in details:
        # What is missing is not in the file; its finding sorts where its mapping begins.
        missing = detail["loc"][-1:] if detail["type"] == "missing" else ()
        path: KeyPath = ()
        for part in detail["loc"][: -1 if missing else None]:
            # What is not in the file ("[key]", a field left at its default, a branch of a union) is left out:
            # the finding belongs to the innermost place somebody wrote.
            if (*path, part) in findings.places:
                path = (*path, part)
        if path in findings.settled:
            continue
        message = _in_words(detail, path, data, sink_types)
        if path in findings.expanded and detail["type"] in _EXPECTED:
            message = message.removesuffix(")") + "; what ${NAME} gives is always text)"
        findings.add((*path, *missing), message, place=findings.places[path])
    return None


def _in_words(detail: ErrorDetails, path: KeyPath, data: object, sink_types: Mapping[str, type[SinkOptions]]) -> str:
    """One pydantic error as ``what is wrong (what would be right)``, without its value and without jargon."""
    kind, context, value = detail["type"], detail.get("ctx", {}), at(data, path)
    message = ""
    if kind == "missing":
        message = "missing (this key is required)"
    elif kind == "extra_forbidden":
        keys = _keys_beside(path, data, sink_types)
        known = known_words("", keys) if keys else "see the documentation of this sink"
        message = f"unknown key ({nearest(str(path[-1]), keys) or known})"
    elif kind == "literal_error":
        words = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        word = path[-1] if detail["loc"][-1] == "[key]" else value
        choice = listed(words, "or")
        if isinstance(word, str):
            message = f"not a known word ({cure(f'write {choice}', nearest(word, words))})"
        else:
            message = f"found {_kind(word)} (expected {choice})"
    elif kind in ("value_error", "assertion_error"):
        message = " ".join(str(context.get("error", "")).split())
    elif kind in _EXPECTED:
        message = f"found {_kind(value)} (expected {_EXPECTED[kind]})"
    elif kind in _RANGES:
        message = _RANGES[kind].format_map(context)
    return message or "not accepted (see the documentation of this key)"


def _keys_beside(path: KeyPath, data: object, sink_types: Mapping[str, type[SinkOptions]]) -> list[str]:
    """The keys a model knows, at the place where it was given one it does not know."""
    kind: Any = Config
    for index, part in enumerate(path[:-1]):
        if index == 1 and path[0] == "sinks":
            kind = sink_types.get(str(at(data, (*path[:2], "type"))), SinkOptions)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            known = _fields(kind).get(str(part))
            kind = known.annotation if known else None
        while get_origin(kind) in (Annotated, Union, UnionType):
            kind = next(branch for branch in get_args(kind) if branch is not NoneType)
    return list(_fields(kind))


def _fields(kind: object) -> Mapping[str, FieldInfo]:
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}


def _kind(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case tuple():
            return "a list"
        case _:
            return "keys and values"
