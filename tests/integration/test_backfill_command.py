"""cdc backfill: what it asks for, what it shows, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from psycopg2.extensions import connection
from scripted import Run, insert, wait_for
from sql import fetch, value

from cdc.cli import main

Command = Callable[..., Result]


@pytest.fixture
def cdc(installed: str, tmp_path: Path, items: connection) -> Command:
    """``cdc(…)`` runs a command for database shop, whose sinks are called audit and picky; audit has a position."""
    config = tmp_path / "config.yaml"
    content: dict[str, Any] = {
        "databases": {"shop": {"dsn": installed, "tables": {"public.item": {}}, "notify": "off"}},
        "sinks": {
            "audit": {"type": "file", "path": str(tmp_path / "out.jsonl")},
            "picky": {"type": "file", "path": str(tmp_path / "out.jsonl"), "ops": ["insert"]},
        },
    }
    config.write_text(json.dumps(content))
    fetch(
        items,
        """insert into cdc.sink (name, system_identifier, timeline)
           select w, p.system_identifier, p.timeline from cdc.place() p, unnest('{audit,picky}'::text[]) w;
           insert into cdc.position (sink, epoch, snap_lo) select name, 0, pg_current_snapshot() from cdc.sink""",
    )

    def run(*arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(main, ["-c", str(config), *arguments])
        assert done.exit_code == code, (done.output, done.stderr)
        return done

    return run


def test_start_asks_for_every_table_the_sink_wants_and_says_what_it_leaves_out(items: connection, cdc: Command) -> None:
    fetch(items, "create table heap (v text); select cdc.enable_capture('heap')")
    said = cdc("backfill", "start", "audit").output.splitlines()
    assert said[0].startswith("shop: public.heap is left out: it has no primary key")
    assert said[1] == "shop: backfill of public.item for sink audit is started"
    assert said[2].startswith("shop: no daemon serves the sink")
    assert "is under way already" in cdc("backfill", "start", "audit", "public.item").output
    assert fetch(items, "select sink, table_name, chunk, rate, state from cdc.backfill") == [
        ("audit", "item", 1000, None, "running")
    ]


def test_limits_and_a_condition_are_kept(items: connection, cdc: Command) -> None:
    cdc("backfill", "start", "audit", "public.i*", "--where", "id > 7", "--chunk", "50", "--rate", "100")
    assert fetch(items, "select chunk, rate, condition from cdc.backfill") == [(50, 100, "id > 7")]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("start", "nobody"), 78, "no sink nobody in the configuration"),
        (("start", "audit", "item"), 2, "schema"),
        (("start", "audit", "public.nothing"), 1, "is told of no captured table that is public.nothing"),
        (("start", "picky", "public.item"), 1, "does not want rows of public.item (see its keys tables and ops)"),
        (("start", "audit", "--where", "nothing = 1"), 1, 'column "nothing" does not exist'),
        (("start", "audit", "--chunk", "0"), 2, "0 is not in the range"),
        (("start", "audit", "--rate", "0"), 2, "0 is not in the range"),
        (("start", "audit", "-d", "nowhere"), 78, "no database nowhere"),
        (("pause", "audit"), 1, "has no backfill that is running"),
        (("resume", "audit"), 1, "has no backfill that is paused"),
        (("cancel", "audit", "public.item"), 1, "has no backfill that is under way"),
        (("status", "nobody"), 78, "no sink nobody"),
    ],
)
def test_what_cannot_be_meant_is_said_with_its_cure(
    cdc: Command, arguments: tuple[str, ...], code: int, said: str
) -> None:
    assert said in cdc("backfill", *arguments, code=code).stderr


def test_a_table_without_a_key_named_by_itself_is_an_error(items: connection, cdc: Command) -> None:
    fetch(items, "create table heap (v text); select cdc.enable_capture('heap')")
    assert "public.heap has no primary key" in cdc("backfill", "start", "audit", "public.heap", code=1).stderr


def test_a_name_in_quotes_is_that_name(items: connection, cdc: Command) -> None:
    fetch(items, "create table heap (v text); select cdc.enable_capture('heap')")
    for written in ('public."heap"', '"public".heap', '"public"."heap"'):
        assert "public.heap has no primary key" in cdc("backfill", "start", "audit", written, code=1).stderr
        assert "does not want rows of public.heap" in cdc("backfill", "start", "picky", written, code=1).stderr
    fetch(items, """create table "h*p" (v text); select cdc.enable_capture('"h*p"')""")
    assert "left out" in cdc("backfill", "start", "audit", "public.h*p").output
    assert "public.h*p has no primary key" in cdc("backfill", "start", "audit", 'public."h*p"', code=1).stderr


def test_pause_resume_and_cancel_name_the_tables(items: connection, cdc: Command) -> None:
    fetch(items, "create table other (id integer primary key); select cdc.enable_capture('other')")
    cdc("backfill", "start", "audit")
    assert cdc("backfill", "pause", "audit", "public.item").output == (
        "shop: backfill of public.item for sink audit is paused\n"
    )
    assert cdc("backfill", "resume", "audit").output == "shop: backfill of public.item for sink audit is resumed\n"
    said = cdc("backfill", "cancel", "audit").output.splitlines()
    assert [line.split()[3] for line in said] == ["public.item", "public.other"]
    assert {state for (state,) in fetch(items, "select state from cdc.backfill")} == {"cancelled"}
    assert value(items, "select requests from cdc.sink where name = 'audit'") == 5


def test_status_shows_how_far_it_is_in_words_and_as_json(
    items: connection, cdc: Command, prepare: Callable[..., Run]
) -> None:
    assert cdc("backfill", "status").output == "no backfill (cdc backfill start begins one)\n"
    insert(items, *range(1, 201))
    fetch(items, "analyze item")
    cdc("backfill", "start", "audit", "--rate", "50", "--chunk", "10")
    run = prepare(start="now").start()
    wait_for(lambda: value(items, "select count(*) from cdc.backfill_progress where rows_read > 10") == 1)
    header, line = cdc("backfill", "status", "audit").output.splitlines()
    assert header.split() == ["database", "sink", "table", "state", "done", "rows", "of", "about", "rows/s", "left"]
    assert line.split()[:4] == ["shop", "audit", "public.item", "running"]
    assert line.split()[6] == "200"
    [found] = json.loads(cdc("backfill", "status", "--json").output)["databases"]["shop"]["audit"]
    assert (found["table"], found["state"], found["estimate"], found["rate"]) == ("public.item", "running", 200, 50)
    assert 0 < found["share"] < 1
    assert 0 < found["remaining_seconds"] < 60
    fetch(items, "update cdc.backfill set rate = null; update cdc.sink set requests = requests + 1")
    said = cdc("backfill", "status", "--watch").output.splitlines()
    assert said[-1].split()[3:7] == ["done", "100%", "200", "200"]
    run.end()


def test_status_may_be_asked_of_some_tables(items: connection, cdc: Command) -> None:
    fetch(items, "create table other (id integer primary key); select cdc.enable_capture('other')")
    cdc("backfill", "start", "audit")

    def shown(*tables: str) -> list[str]:
        found = json.loads(cdc("backfill", "status", "audit", *tables, "--json").output)["databases"]["shop"]
        return [one["table"] for one in found.get("audit", [])]

    assert shown() == ["public.item", "public.other"]
    assert shown("public.item") == shown("public.i*", "public.none") == ["public.item"]
    assert shown('public."other"') == ["public.other"]
    assert shown("public.none") == []
    assert [line.split()[2] for line in cdc("backfill", "status", "audit", "public.other").output.splitlines()[1:]] == [
        "public.other"
    ]
    assert "a table without a schema" in cdc("backfill", "status", "audit", "item", code=2).stderr


def test_why_one_failed_stands_below_the_table(items: connection, cdc: Command, prepare: Callable[..., Run]) -> None:
    insert(items, 1)
    cdc("backfill", "start", "audit", "--where", "v::integer > 0")
    run = prepare(start="now").start()
    wait_for(lambda: value(items, "select state from cdc.backfill") == "failed")
    run.end()
    assert "shop: audit: reading the table failed with SQLSTATE 22P02" in cdc("backfill", "status").output
