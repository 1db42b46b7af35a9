"""`cdc migrate --schema-only`: a fresh database whose triggers the application's own migrations make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from harness import Project
from psycopg2.extensions import connection
from sql import fetch, value
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from cdc import inventory

Connect = Callable[..., connection]


@pytest.fixture
def project(tmp_path: Path, database: str) -> Project:
    """Its YAML calls a table by its name that is not there."""
    return Project(tmp_path, database, {"public.orders": {}}, "{table}.jsonl")


def test_the_tables_need_not_be_there_and_what_the_migrations_capture_is_delivered(
    project: Project, connect: Connect
) -> None:
    assert "public.orders: no such table" in project.cdc("migrate", codes=(1,)).stderr
    assert project.cdc("migrate", "--schema-only").stdout.splitlines() == [
        f"shop: schema cdc: revision none → {inventory.head()}",
        "shop: sink mirror: starts here",
    ]
    assert project.cdc("migrate", "--schema-only").stdout == ""

    look = connect(project.dsn)
    engine = create_engine(
        "postgresql+psycopg2://", creator=lambda: connect(project.dsn, autocommit=False), poolclass=NullPool
    )
    with engine.begin() as session:
        session.exec_driver_sql("create table orders (id integer primary key)")
        Operations(MigrationContext.configure(session)).enable_capture("public.orders")  # type: ignore[attr-defined]
        session.exec_driver_sql("insert into orders values (1)")
    # What was written before the first run is delivered: the sinks have their positions.
    project.cdc("run", "--until-idle")
    assert len((project.directory / "orders.jsonl").read_text().splitlines()) == 1
    assert project.cdc("check").stdout.startswith("ok ")
    assert project.cdc("migrate").stdout == "shop: public.orders: unchanged\n"
    assert value(look, "select count(*) from cdc.captured") == 1


def test_captures_that_the_yaml_does_not_have_are_left_alone(project: Project, connect: Connect) -> None:
    look = connect(project.dsn)
    project.cdc("migrate", "--schema-only")
    fetch(look, "create table other (id integer primary key); select cdc.enable_capture('other')")
    project.cdc("migrate", "--schema-only")
    assert value(look, "select count(*) from cdc.captured") == 1


def test_the_plan_and_the_script_leave_the_triggers_alone_too(project: Project, connect: Connect) -> None:
    plan = json.loads(project.cdc("migrate", "--schema-only", "--plan", "--json").stdout)
    assert [change["subject"] for change in plan["changes"]] == ["schema cdc", "sink mirror"]
    script = project.cdc("migrate", "--schema-only", "--sql").stdout
    assert "cdc.enable_capture('" not in script
    look = connect(project.dsn)
    fetch(look, script)
    assert value(look, "select version_num from cdc.alembic_version") == inventory.head()
    assert fetch(look, "select name from cdc.sink") == [("mirror",)]
