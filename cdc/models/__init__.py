"""Models for the people who consume the events: from the catalogue to a Python module, or to a JSON Schema.

What the catalogue knows (`catalogue`) becomes the text of a module (`module`); the JSON Schema is what pydantic says of
that module's classes. The tables are those that carry our triggers, and each is described as its triggers capture it:
excluded columns are left out, masked ones are text.
"""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cdc.models.catalogue import Catalogue, read
from cdc.models.module import write

__all__ = ["Catalogue", "json_schema", "read", "write"]


def json_schema(text: str) -> str:
    """The JSON Schema (draft 2020-12) of the events a module is for: of any of its tables, and each table's alone under
    ``$defs``.

    Args:
        text: of the module, as :func:`write` has it.
    """
    module = ModuleType("cdc.models.written")
    # Its names and texts are made fit by cdc.models.names; nothing else in it comes from the database.
    exec(compile(text, "models.py", "exec", dont_inherit=True), module.__dict__)  # noqa: S102
    events: list[type[BaseModel]] = list(module.EVENTS.values())
    # Under which key an event stands is pydantic's to say: its letters are ASCII, and no two events have the same.
    found, schema = models_json_schema([(event, "validation") for event in events], ref_template="#/$defs/{model}")
    references = [found[event, "validation"]["$ref"] for event in events]
    for reference in references:
        _tell_ops_apart(schema["$defs"][reference.removeprefix("#/$defs/")])
    whole: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": " ".join(line.removeprefix("# ") for line in text.splitlines()[:2]),
        "oneOf": [{"$ref": reference} for reference in references],
        "$defs": schema["$defs"],
    }
    return json.dumps(whole, ensure_ascii=False, indent=2) + "\n"


def _tell_ops_apart(event: dict[str, Any]) -> None:
    """Say which images each operation has; in Python a validator sees to it, of which pydantic knows nothing."""
    row = event["properties"]["after"]["anyOf"][0]
    nothing, something = {"type": "null"}, {"type": "object"}
    images: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "insert": (nothing, row),
        "update": (something, something),
        "delete": (row, nothing),
        "truncate": (nothing, nothing),
        "read": (nothing, row),
    }
    event["if"] = {"properties": {"truncated": {"const": False}}}
    event["then"] = {
        "oneOf": [
            {"properties": {"op": {"const": op}, "before": before, "after": after}}
            for op, (before, after) in images.items()
        ]
    }
    event["else"] = {"properties": {"before": nothing, "after": nothing}}
