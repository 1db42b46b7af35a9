"""One statement on a test's own connection."""

from __future__ import annotations

from typing import Any

from psycopg2.extensions import connection


def fetch(conn: connection, statement: str, parameters: object = None) -> list[tuple[Any, ...]]:
    """Run a statement; returns its rows, an empty list when it has none."""
    with conn.cursor() as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


def value(conn: connection, statement: str, parameters: object = None) -> Any:
    """The first column of the only row."""
    [(found, *_)] = fetch(conn, statement, parameters)
    return found
