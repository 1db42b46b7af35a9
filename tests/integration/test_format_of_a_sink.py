"""The format a sink's configuration names is what the daemon writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
from harness import Project
from psycopg2.extensions import connection
from sql import fetch

NUMBER = "12345678901234567890.1230"


@pytest.mark.parametrize(
    ("name", "path"),
    [("debezium", ("after",)), ("cloudevents", ("data", "after")), ("flat", ())],
)
def test_a_row_arrives_in_the_format_of_the_sink_with_every_digit(
    database: str, connect: Callable[..., connection], tmp_path: Path, name: str, path: tuple[str, ...]
) -> None:
    writer = connect(database)
    fetch(writer, "create table item (id integer primary key, price numeric)")
    project = Project(tmp_path, database, {"public.item": {}}, "out.jsonl", sink={"format": name})
    project.cdc("migrate")
    fetch(writer, f"insert into item values (1, {NUMBER})")
    project.cdc("run", "--until-idle")
    (line,) = project.file.read_text().splitlines()
    found = json.loads(line, parse_float=Decimal)
    for key in path:
        found = found[key]
    assert found["id"] == 1
    assert str(found["price"]) == NUMBER
