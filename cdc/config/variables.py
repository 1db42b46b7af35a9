"""Step two, expand: ``${NAME}`` and ``${NAME:-default}`` in the texts of a tree, and ``$${`` for a plain ``${``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from cdc.config.findings import BROKEN, Findings, KeyPath

_VARIABLE: Final = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}|\$\{")


def replaced(text: str, by: str) -> str:
    """A text with something else in place of every variable, whatever the environment has."""
    return _VARIABLE.sub(lambda found: "${" if found[0] == "$${" else by, text)


def expand(value: object, environ: Mapping[str, str], findings: Findings, path: KeyPath = ()) -> object:
    """The same tree with every variable in its texts replaced; keys stay as they are.

    As in a shell, ``:-`` also stands in for a variable that is empty.
    """
    if isinstance(value, dict):
        return {key: expand(item, environ, findings, (*path, key)) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(expand(item, environ, findings, (*path, index)) for index, item in enumerate(value))
    if not isinstance(value, str):
        return value

    def replace(found: re.Match[str]) -> str:
        name, default = found[1], found[2]
        if found[0] == "$${":
            return "${"
        if name is None:
            findings.settle(path, "malformed ${ (write ${NAME} or ${NAME:-default}; $${ for a plain ${)")
            return BROKEN
        findings.expanded.add(path)
        if name in environ and (environ[name] or default is None):
            return environ[name]
        if default is not None:
            return default
        findings.settle(path, f"${{{name}}} is not set (set the environment variable, or write ${{{name}:-default}})")
        return BROKEN

    text = _VARIABLE.sub(replace, value)
    if re.search("[\ud800-\udfff]", text):  # how os.environ passes on bytes that are not UTF-8
        findings.settle(path, "a variable that is not UTF-8 text (set it again, in UTF-8)")
        return BROKEN
    return text
