"""The daemon killed between any two steps of parking and replaying: nothing lost, and every key in order."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import SINK, Project, read_lines
from psycopg2.extensions import connection
from sql import fetch, value

from cdc.event import Event

KEYS = 6
# Of one version in five the sink's filter cannot say whether it is wanted: such an event can never be delivered.
REFUSES = "op == 'insert' || after.version % 5 != 2 || after.nothing"


@pytest.fixture
def look(database: str, connect: Callable[..., connection]) -> connection:
    conn = connect(database)
    fetch(conn, "create table item (id integer primary key, version integer not null, note text)")
    return conn


@pytest.fixture
def project(database: str, look: connection, tmp_path: Path) -> Project:
    made = Project(
        tmp_path,
        database,
        {"public.item": {}},
        "out.jsonl",
        sink={"filter": REFUSES, "on_permanent_failure": "park_key", "batch": {"events": 7}},
    )
    made.cdc("migrate")
    fetch(look, "insert into item select n, 0 from generate_series(1, %s) n", (KEYS,))
    return made


def write(look: connection, versions: int) -> None:
    for _ in range(versions):
        for key in range(1, KEYS + 1):
            fetch(look, "update item set version = version + 1 where id = %s", (key,))


def dies_at(project: Project, point: str, count: int) -> None:
    with project.daemon(serving=False, environment={"CDC_CRASH_AT": f"{point}:{count}"}) as daemon:
        assert daemon.ends() == -signal.SIGKILL, daemon.said()[-2000:]


def parked(look: connection) -> int:
    return int(value(look, "select count(*) from cdc.dead_letter where parked"))


def versions_of(project: Project) -> dict[int, list[int]]:
    """Key → the versions as they arrived, each the first time."""
    arrived: dict[int, dict[int, None]] = {}
    for line in read_lines(project.file):
        event = Event.from_json(line)
        assert event.key is not None
        assert event.after is not None
        arrived.setdefault(event.key["id"], {})[event.after["version"]] = None
    return {key: list(versions) for key, versions in arrived.items()}


@pytest.mark.parametrize("count", [1, 8])
def test_killed_after_a_key_was_parked(project: Project, look: connection, count: int) -> None:
    write(look, 12)
    dies_at(project, "after-park", count)
    write(look, 3)
    project.cdc("run", "--until-idle")
    # Of each key the first version that is refused, and all that came later.
    assert parked(look) == KEYS * 14
    assert versions_of(project) == {key: [0, 1] for key in range(1, KEYS + 1)}
    refused = "select count(*) from cdc.dead_letter where reason like 'the filter cannot be evaluated: %'"
    assert value(look, refused) == KEYS * 3
    order = "select event -> 'after' ->> 'version' from cdc.dead_letter where keys = array['{\"id\":1}'] order by seq"
    assert [int(version) for (version,) in fetch(look, order)] == list(range(2, 16))


@pytest.mark.parametrize("point", ["before-replay", "after-replay"])
@pytest.mark.parametrize("count", [1, 5])
def test_killed_while_letters_come_back(project: Project, look: connection, point: str, count: int) -> None:
    write(look, 12)
    project.cdc("run", "--until-idle")
    waiting = parked(look)
    assert waiting == KEYS * 11
    del project.content["sinks"][SINK]["filter"]
    project.write()
    said = project.cdc("dead-letters", "replay", SINK)
    assert "no daemon serves" in said.stderr
    write(look, 2)
    dies_at(project, point, count)
    assert parked(look) > 0
    write(look, 2)
    project.cdc("run", "--until-idle")
    assert parked(look) == 0
    assert json.loads(project.cdc("dead-letters", "list", "--json").stdout) == []
    assert versions_of(project) == {key: list(range(17)) for key in range(1, KEYS + 1)}
    duplicates = len(read_lines(project.file)) - KEYS * 17
    assert duplicates <= 7  # what one kill can repeat: a batch
