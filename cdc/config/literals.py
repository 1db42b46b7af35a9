"""Which secrets stand in the file itself, where whoever can read the file can read them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pydantic import BaseModel, SecretStr

from cdc.config.findings import Findings, KeyPath
from cdc.config.models import Config
from cdc.config.reading import Unreadable, read
from cdc.config.variables import replaced

_ELSEWHERE: Final = "\x00"
"""Stands where the environment has a part of a secret; no text of a file holds it."""

_PASSWORD: Final = re.compile(r"://[^/@\s]*:([^@\s]+)@|(?:^|[\s?&])password\s*=\s*'?([^\s'&]+)")


def literal_secrets(path: Path, config: Config) -> Iterator[KeyPath]:
    """Where a secret stands in a file, in place of a ``${NAME}`` or the name of another file.

    A connection string, or a URL, is a secret only where it holds a password.

    Args:
        path: of the file.
        config: what was read from it.
    """
    with contextlib.suppress(Unreadable):  # it was another file a moment ago
        yield from _within(config, read(path, Findings()), ())


def _within(value: object, written: object, path: KeyPath) -> Iterator[KeyPath]:
    if isinstance(value, SecretStr):
        if isinstance(written, str) and _stands_in(written, value, is_dsn=str(path[-1]).endswith("dsn")):
            yield path
    elif isinstance(value, BaseModel) and isinstance(written, dict):
        for name, field in type(value).model_fields.items():
            key = field.alias or name
            yield from _within(getattr(value, name), written.get(key), (*path, key))
    elif isinstance(value, dict) and isinstance(written, dict):
        for key, item in value.items():
            yield from _within(item, written.get(key), (*path, key))
    elif isinstance(value, tuple) and isinstance(written, tuple):
        for index, (item, text) in enumerate(zip(value, written, strict=False)):
            yield from _within(item, text, (*path, index))
    elif isinstance(value, tuple) and len(value) == 1:  # a list of one may be written without brackets
        yield from _within(value[0], written, path)


def _stands_in(written: str, secret: SecretStr, *, is_dsn: bool) -> bool:
    text = replaced(written, _ELSEWHERE)
    if is_dsn or "://" in text:
        found = _PASSWORD.search(text)
        return found is not None and (found[1] or found[2]).strip(_ELSEWHERE) != ""
    return text == secret.get_secret_value()  # else what is written is the name of its file, or of a variable
