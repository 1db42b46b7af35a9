"""Step four, cross-check: what no model sees alone.

It looks at the plain tree, not at the models, so that a finding elsewhere hides none of its own.
"""

from __future__ import annotations

from cdc.config.findings import Findings, at
from cdc.config.words import known_words
from cdc.dsn import printable
from cdc.options import is_glob, split


def cross_check(data: object, findings: Findings) -> None:
    """Find tables written in two ways, and databases that sinks name and nobody configured."""
    databases = at(data, ("databases",))
    if not isinstance(databases, dict):
        return
    for name in databases:
        _tables_written_twice(name, at(databases, (name, "tables")), findings)
    sinks = at(data, ("sinks",))
    for name in sinks if isinstance(sinks, dict) else ():
        wanted = at(sinks, (name, "databases"))
        for index, database in enumerate(wanted if isinstance(wanted, tuple) else ()):
            if isinstance(database, str) and database and database not in databases:
                known = [printable(key) for key in databases]
                message = f"no such database ({known_words(database, known)})"
                findings.add(("sinks", name, "databases", index), message)


def _tables_written_twice(database: str, tables: object, findings: Findings) -> None:
    seen: dict[tuple[str, str], str] = {}
    for pattern in tables if isinstance(tables, dict) else ():
        try:
            first = pattern if is_glob(pattern) else seen.setdefault(split(pattern), pattern)
        except ValueError:
            continue  # validation says so
        if first != pattern:
            message = f"the same table as {printable(first)} (keep one)"
            findings.add(("databases", database, "tables", pattern), message)
