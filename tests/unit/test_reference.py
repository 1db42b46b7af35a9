"""docs/configuration.md is made from the models, and stands as they are.

``python tests/unit/test_reference.py`` writes it anew.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cdc.config import Config, DatabaseConfig, DsnFile, HttpConfig, LogConfig, TableConfig
from cdc.options import BatchOptions, Duration, RetryOptions, SinkOptions, Size, TlsOptions
from cdc.sinks import option_models

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration reference

Made from the models that check the file (`python tests/unit/test_reference.py`). All of it in one file:
[config.example.yaml](../config.example.yaml). `cdc check` names everything that is wrong at once, with place and cure.

One YAML 1.2 document, at most 256 KiB. Unknown keys, duplicate keys, anchors, aliases and tags are errors. `${NAME}`
and `${NAME:-default}` in values are replaced from the environment after parsing, so that a variable can add neither
keys nor structure; `$${` is a plain `${`. Inside `{ }` and `[ ]` one whose default
holds a comma, a brace or a blank needs quotes.

Durations are written with a unit: `20ms`, `5s`, `10m`, `24h`, `7d`. Sizes: `512KiB`, `4MiB`, `1GB`, or a number of
bytes. Tables: `schema.table`; `*` and `?` stand for any characters; odd names in quotes: `'public."weird name"'`.
"""

BLOCKS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("The file", "", Config),
    ("databases.NAME", "A name is a letter, then letters, digits, `_` or `-`, at most 63 in all.", DatabaseConfig),
    (
        "databases.NAME.tables.PATTERN",
        "A table's own name beats a pattern; among patterns the first wins.",
        TableConfig,
    ),
    ("sinks.NAME", "What every sink has, whatever its type.", SinkOptions),
    ("sinks.NAME.batch", "", BatchOptions),
    ("sinks.NAME.retry", "", RetryOptions),
    ("sinks.NAME.tls", "Of the sinks that have one; `tls: {}` is TLS with nothing special.", TlsOptions),
    ("http", "Left out: no console, no metrics, no health. Needs `pip install 'table-cdc[http]'`.", HttpConfig),
    ("log", "`--log-level` and `--log-format` overrule it.", LogConfig),
)


def page() -> str:
    parts = [INTRODUCTION]
    for title, words, model in BLOCKS:
        parts += [f"## {title}\n", f"{words}\n" if words else "", *table(model)]
    for kind, options in sorted(option_models().items()):
        own = [name for name in options.model_fields if name not in SinkOptions.model_fields]
        title = f"sinks.NAME, type: {kind}"
        parts += [f"## {title}\n", *(table(options, own) if own else ["Nothing beyond what every sink has.\n"])]
        for name in own:
            block = block_of(options.model_fields[name].annotation)
            if block is not None and block not in [shared for _, _, shared in BLOCKS]:
                parts += [f"## sinks.NAME.{name}, type: {kind}\n", *table(block)]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def block_of(annotation: Any) -> type[BaseModel] | None:
    """The model behind a key that is a block of keys of its own."""
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


def table(model: type[BaseModel], names: list[str] | None = None) -> list[str]:
    described = explanations(model)
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if names is None or name in names:
            key = field.alias or name
            rows.append(f"| `{key}` | {kind_of(field)} | {default_of(field)} | {described[name]} |")
    return ["\n".join(rows) + "\n"]


def explanations(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings say of each key: under ``Attributes:``, or below the key itself."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if not (isinstance(owner, type) and issubclass(owner, BaseModel)) or owner is BaseModel:
            continue
        document = inspect.cleandoc(owner.__doc__ or "")
        _, _, attributes = document.partition("Attributes:\n")
        keys = r"^ {4}\w+(?:, \w+)*: "
        for names, text in re.findall(rf"({keys})(.*?)(?={keys}|\Z)", attributes, re.DOTALL | re.MULTILINE):
            found.update(dict.fromkeys(names.strip(" :").split(", "), tidy(text)))
        [body] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(body, ast.ClassDef)
        for key, below in pairwise(body.body):
            if (
                isinstance(key, ast.AnnAssign)
                and isinstance(key.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found.setdefault(key.target.id, tidy(below.value.value))
    for name in model.model_fields:
        found.setdefault(name, "")
    return found


def tidy(text: str) -> str:
    words = " ".join(text.split()).replace("``", "`").rstrip(".").replace("None means all", "left out: all")
    words = words.replace("None: ", "left out: ")
    words = re.sub(r"; see `[\w.]+`.*", "", words)
    return words.replace("|", "\\|")


def kind_of(field: FieldInfo) -> str:
    return kind(field.annotation, field.metadata)


def kind(annotation: Any, metadata: Any = ()) -> str:  # noqa: PLR0911  one for each kind there is
    origin = get_origin(annotation)
    if origin is Annotated:
        return kind(get_args(annotation)[0], get_args(annotation)[1:])
    for known, word in ((Duration, "duration"), (Size, "size")):
        if set(get_args(known)[1:]) & set(metadata):
            return word
    if origin in (Union, UnionType):
        return " or ".join(kind(one, metadata) for one in get_args(annotation) if one is not NoneType)
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in get_args(annotation))
    if origin is tuple:
        return f"list of {kind(get_args(annotation)[0])}"
    if origin is dict:
        return f"{kind(get_args(annotation)[0])} → {kind(get_args(annotation)[1])}"
    if annotation in (str, SecretStr):
        return "text"
    names = {bool: "`true`, `false`", int: "whole number", float: "number", DsnFile: "name of a file"}
    if annotation in names:
        return names[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    return "value"


def default_of(field: FieldInfo) -> str:  # noqa: PLR0911  one for each kind there is
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None or default is PydanticUndefined or default in ((), {}):
        return "-"
    if isinstance(default, SecretStr):
        return f"`{default.get_secret_value()}`"
    if isinstance(default, BaseModel):
        return "its defaults"
    if kind_of(field) == "duration":
        return f"`{duration(float(default))}`"
    if kind_of(field) == "size":
        return f"`{size(int(default))}`"
    if isinstance(default, tuple):
        return ", ".join(f"`{item}`" for item in default)
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("m", 60), ("s", 1)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds * 1000:g}ms"


def size(number: int) -> str:
    for unit, length in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number % length == 0:
            return f"{number // length}{unit}"
    return str(number)


def undescribed() -> Iterator[str]:
    for model in (*(block[2] for block in BLOCKS), *option_models().values()):
        for name, words in explanations(model).items():
            if name in model.model_fields and not words and name != "type":
                yield f"{model.__name__}.{name}"


def test_the_reference_stands_as_the_models_are() -> None:
    assert page() == PAGE.read_text(encoding="utf-8"), "stale: run python tests/unit/test_reference.py"


def test_every_key_is_described() -> None:
    assert not list(undescribed())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(page())
    sys.stdout.write("\n".join(undescribed()) + "\n")
