"""`model:` as a user meets it: a class beside config.yaml, `cdc run`, dead letters with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Project, read_lines, until
from psycopg2.extensions import connection
from sql import fetch, value

from cdc.event import Event

Connect = Callable[..., connection]

CANARY = "canary-7f3a"
MODELS = """
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BaseModel, Field


class Order(BaseModel):
    id: int
    status: Literal["new", "paid"]
    amount: Annotated[Decimal, Field(max_digits=30)]
"""
ORDERS = (
    "create table orders (id int primary key, status text, amount numeric); create table notes (id int primary key)"
)


@pytest.fixture
def project(tmp_path: Path, database: str, connect: Connect) -> Project:
    """Orders have a model, notes have none; two sinks, one of which wants no updates."""
    fetch(connect(database), ORDERS)
    tables = {"public.orders": {"model": "row_models_here:Order"}, "public.notes": {}}
    inserts = {"type": "file", "path": str(tmp_path / "inserts.jsonl"), "ops": ["insert"]}
    made = Project(tmp_path, database, tables, "all.jsonl", sinks={"inserts": inserts})
    (tmp_path / "row_models_here.py").write_text(MODELS)
    made.cdc("migrate")
    return made


def delivered(project: Project, name: str = "all") -> list[tuple[str, Any]]:
    """Operation and key of each event of a sink's file."""
    events = map(Event.from_json, read_lines(project.directory / f"{name}.jsonl"))
    return [(event.op.value, event.key and event.key["id"]) for event in events]


def dead_letters(writer: connection) -> list[tuple[Any, ...]]:
    query = "select sink, event ->> 'op', event -> 'key' ->> 'id', reason from cdc.dead_letter order by id"
    return fetch(writer, query)


def test_what_does_not_fit_is_a_dead_letter_of_every_sink_that_wants_it(project: Project, connect: Connect) -> None:
    writer = connect(project.dsn)
    fetch(
        writer,
        f"""
        insert into orders values (1, 'new', 12345678901234567890.123456789);
        insert into orders values (2, '{CANARY}', 1);
        insert into notes values (7);
        update orders set status = 'paid';
        update orders set amount = 'NaN' where id = 1;
        delete from orders;
        """,
    )
    log = project.cdc("run", "--until-idle").stderr
    assert delivered(project) == [("insert", 1), ("insert", 7), ("update", 1), ("delete", 2)]
    assert delivered(project, "inserts") == [("insert", 1), ("insert", 7)]
    fit = "the row does not fit row_models_here:Order: "
    assert sorted(dead_letters(writer)) == [
        ("inserts", "insert", "2", f"{fit}after.status literal_error"),
        ("mirror", "delete", "1", f"{fit}before.amount finite_number"),
        ("mirror", "insert", "2", f"{fit}after.status literal_error"),
        ("mirror", "update", "1", f"{fit}after.amount finite_number"),
        ("mirror", "update", "2", f"{fit}before.status literal_error"),
    ]
    assert "after.status literal_error" in log
    assert CANARY not in log
    assert CANARY not in project.cdc("status").stdout
    assert read_lines(project.file)[0].count("12345678901234567890.123456789") == 1


def test_a_sink_that_stops_at_what_can_never_be_delivered_stops_here_too(project: Project, connect: Connect) -> None:
    project.content["sinks"]["mirror"]["on_permanent_failure"] = "stop"
    del project.content["sinks"]["inserts"]
    project.write()
    writer = connect(project.dsn)
    fetch(writer, "insert into orders values (1, 'lost', 1)")
    assert "after.status literal_error" in project.cdc("run", "--until-idle", codes=(1,)).stderr
    assert (delivered(project), dead_letters(writer)) == ([], [])
    assert project.status()["databases"]["shop"]["sinks"]["mirror"]["state"] == "stopped"


def test_a_table_that_changes_is_judged_as_it_is(project: Project, connect: Connect) -> None:
    writer = connect(project.dsn)
    with project.daemon() as daemon:
        fetch(writer, "insert into orders values (1, 'new', 1)")
        fetch(writer, "alter table orders add note text; insert into orders values (2, 'new', 1, 'x')")
        fetch(writer, "alter table orders rename amount to price; insert into orders values (3, 'new', 1)")
        fetch(writer, "alter table orders rename price to amount; insert into orders values (4, 'new', 1)")
        until(lambda: ("insert", 4) in delivered(project), "the last one is delivered")
        assert daemon.drain() == 0
    assert delivered(project) == [("insert", 1), ("insert", 2), ("insert", 4)]
    assert {row[2:] for row in dead_letters(writer)} == {
        ("3", "the row does not fit row_models_here:Order: after.amount missing")
    }


def test_the_models_cdc_writes_will_do(project: Project, connect: Connect) -> None:
    models = project.directory / "row_models_written.py"
    project.cdc("models", "public.orders", "--output", str(models))
    project.content["databases"]["shop"]["tables"] = {"public.*": {"model": "row_models_written:Orders"}}
    project.content["databases"]["shop"]["tables"]["public.notes"] = {}  # type: ignore[index]
    project.write()
    writer = connect(project.dsn)
    fetch(
        writer,
        """
        insert into orders values (1, null, 'NaN'), (2, 'x', 12345678901234567890.123456789);
        update orders set status = 'y';
        alter table orders alter status type integer using 5;
        insert into orders values (3, 5, 5);
        """,
    )
    project.cdc("migrate")
    project.cdc("run", "--until-idle")
    assert delivered(project) == [("insert", 1), ("insert", 2), ("update", 1), ("update", 2)]
    assert [row[2:] for row in dead_letters(writer)] == [
        ("3", "the row does not fit row_models_written:Orders: after.status string_type")
    ] * 2


def test_an_ephemeral_change_that_does_not_fit_is_dropped_and_counted(project: Project, connect: Connect) -> None:
    tables: Any = project.content["databases"]["shop"]["tables"]
    tables["public.orders"]["delivery"] = "ephemeral"
    project.write()
    project.cdc("migrate")
    writer = connect(project.dsn)
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Listening.")
        for id_, status in ((1, "new"), (2, CANARY), (3, CANARY), (4, "paid")):
            fetch(writer, "insert into orders values (%s, %s, 1)", (id_, status))
        until(lambda: ("insert", 4) in delivered(project), "the last one is delivered")
        until(lambda: project.status()["databases"]["shop"]["sinks"]["mirror"]["dropped"] == 2, "two are counted")
        assert daemon.drain() == 0
    assert delivered(project) == [("insert", 1), ("insert", 4)]
    assert daemon.said().count("An ephemeral change is dropped.") == 2  # once for each sink
    assert CANARY not in daemon.said()
    assert value(writer, "select count(*) from cdc.dead_letter") == 0


def test_a_model_that_cannot_be_had_is_an_error_of_the_configuration(project: Project) -> None:
    place = f"error: {project.config}: databases.shop.tables.public.orders.model: "
    (project.directory / "row_models_here.py").unlink()
    tables: Any = project.content["databases"]["shop"]["tables"]
    tables["public.notes"]["model"] = "json:JSONDecoder"
    project.write()
    notes = f"{place.replace('orders', 'notes')}JSONDecoder is no pydantic model"
    for command in (["run", "--until-idle"], ["check"], ["check", "--json"]):
        done = project.cdc(*command, codes=(78,))
        assert done.stdout == ""
        assert done.stderr.splitlines() == [
            f"{place}no module row_models_here (install it where cdc runs, or put it beside this file)",
            f"{notes} (name a subclass of pydantic.BaseModel)",
        ]
    # Who delivers nothing imports nothing.
    for command in (["status", "--json"], ["migrate", "--json"], ["models"]):
        project.cdc(*command)
    tables["public.orders"]["model"] = "orders"
    project.write()
    assert f"{place}not a module and its class" in project.cdc("status", codes=(78,)).stderr
    assert json.loads(project.config.read_text())
