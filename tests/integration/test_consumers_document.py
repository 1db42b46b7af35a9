"""docs/consumers.md does what it says: its tables, its configuration, its commands, and every block of Python."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from psycopg2.extensions import connection
from sql import fetch

Connect = Callable[..., connection]

DOCUMENT = (Path(__file__).parents[2] / "docs" / "consumers.md").read_text(encoding="utf-8")
CDC = Path(sys.executable).with_name("cdc")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, flags=re.DOTALL | re.MULTILINE)


def test_everything_in_it_works_as_it_stands(
    database: str, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> None:
        done = subprocess.run(
            [CDC, *arguments], capture_output=True, text=True, check=False, env=os.environ | {"SHOP_DSN": database}
        )
        assert done.returncode == 0, done.stderr

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    writer = connect(database)
    (table, changes), (plain, judged), (models,) = blocks("sql"), blocks("yaml"), blocks("sh")
    fetch(writer, table)
    (tmp_path / "config.yaml").write_text(plain)
    run("migrate")
    fetch(writer, changes)
    run("run", "--until-idle")
    command, *arguments = models.split()
    assert command == "cdc"
    run(*arguments)

    python = blocks("python")
    assert len(python) == DOCUMENT.count("```python")
    names: dict[str, Any] = {"__name__": "document"}
    said = io.StringIO()
    with redirect_stdout(said):
        for block in python:
            exec(compile(block, "consumers.md", "exec", dont_inherit=True), names)  # noqa: S102
    del sys.modules["shop_models"]
    assert said.getvalue().splitlines() == [
        "insert <Image of 8 characters> {'cdc-op': 'insert'}",
        "insert <Image of 8 characters> {'op': 'insert'}",
    ]

    (tmp_path / "config.yaml").write_text(judged)
    run("migrate")
    fetch(
        writer,
        "insert into orders values (3, 'new'); alter table orders drop amount; insert into orders values (4, 'new')",
    )
    run("run", "--until-idle")
    assert len((tmp_path / "out" / "orders.jsonl").read_text().splitlines()) == 5
    assert fetch(writer, "select reason from cdc.dead_letter") == [
        ("the row does not fit shop_models:Orders: after.amount missing",)
    ]
