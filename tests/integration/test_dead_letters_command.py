"""`cdc dead-letters` on a real database: what is listed, what is asked for, what becomes of it."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from psycopg2.extensions import connection
from scripted import Run, caught_up, insert, keys, wait_for
from sql import fetch, value

from cdc import dead_letters as letters
from cdc.bell import Bell
from cdc.cli import main
from cdc.cli.dead_letters import readable
from cdc.errors import CdcError, PermanentFailure
from cdc.event import Event

Prepare = Callable[..., Run]
Cdc = Callable[..., Result]

EXACT = "12345678901234567890.1234567890"


@pytest.fixture
def configuration(installed: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "databases": {"shop": {"dsn": installed, "tables": {"public.*": {}}}},
        "sinks": {
            "audit": {"type": "file", "path": str(tmp_path / "out.jsonl")},
            "mirror": {"type": "stdout", "databases": ["shop"]},
        },
    }


@pytest.fixture
def cdc(configuration: dict[str, Any], tmp_path: Path) -> Cdc:
    """``cdc("list", "audit", code=0)`` runs ``cdc dead-letters …``."""

    def run(*arguments: str, code: int = 0, **extra: Any) -> Result:
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(configuration))
        result = CliRunner().invoke(main, ["-c", str(path), "dead-letters", *arguments], **extra)
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def served(items: connection, prepare: Prepare) -> Run:
    """A daemon's pipeline: it has refused rows with "bad" in them and takes them now."""

    def script(batch: list[Event]) -> None:
        if any(event.after is not None and "bad" in str(event.after.get("v")) for event in batch):
            raise PermanentFailure("field v: too long")

    insert(items, 1, 2, text="bad")
    fetch(items, "update item set v = 'later' where id = 1")
    run = prepare(bell=Bell("off"), on_permanent_failure="park_key")
    run.sink.script = script
    run.start()
    wait_for(lambda: caught_up(items) and value(items, "select count(*) from cdc.dead_letter") == 3)
    run.sink.script = lambda batch: None
    run.sink.attempts.clear()
    return run


def listed(cdc: Cdc, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(cdc("list", *arguments, "--json").stdout)
    return found


def ids(cdc: Cdc, *arguments: str) -> list[str]:
    return [letter["id"] for letter in listed(cdc, *arguments)]


def editor(directory: Path, script: str) -> dict[str, str]:
    """The environment of somebody whose editor does something to its file, ``$1``."""
    path = directory / "editor"
    path.write_text(f"#!/bin/sh\nset -e\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {"EDITOR": str(path), "VISUAL": "", "PATH": os.environ["PATH"]}


# -- looking ------------------------------------------------------------------------------------------------------


def test_a_list_has_a_line_for_each_letter_in_the_order_of_the_events(cdc: Cdc, served: Run) -> None:
    lines = cdc("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["database", "shop", "shop", "shop"]
    cells = [[cell.strip() for cell in line.split("  ") if cell] for line in lines[1:]]
    assert [(row[1], row[3], row[4], row[5], row[6]) for row in cells] == [
        ("audit", "insert", "public.item", '{"id":1}', "1"),
        ("audit", "insert", "public.item", '{"id":2}', "1"),
        ("audit", "update", "public.item", '{"id":1}', "0"),
    ]
    assert [row[8:] for row in cells] == [
        ["parked", "field v: too long"],
        ["parked", "field v: too long"],
        ["waits", "waits for an earlier event of its key, which could not be delivered"],
    ]


def test_the_json_of_a_letter_has_a_fixed_shape(cdc: Cdc, served: Run) -> None:
    letter = listed(cdc, "audit")[0]
    assert datetime.fromisoformat(letter.pop("set_aside_at")).tzinfo is not None
    assert letter.pop("id").startswith("shop-")
    assert letter == {
        "database": "shop",
        "sink": "audit",
        "op": "insert",
        "table": "public.item",
        "reason": "field v: too long",
        "attempts": 1,
        "parked": True,
        "replaying": False,
        "keys": [{"id": 1}],
    }


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], 3),
        (["audit"], 3),
        (["mirror"], 0),
        (["-d", "shop"], 3),
        (["--table", "public.item"], 3),
        (["--table", "*.it?m"], 3),
        (["--table", "public.it_m"], 0),
        (["--table", 'public."it?m"'], 0),
        (["--key", "id=1"], 2),
        (["--key", '{"id": 2}'], 1),
        (["--key", "id=x"], 0),
        (["--reason", "TOO long"], 2),
        (["--reason", "100%"], 0),
        (["--since", "1h"], 3),
        (["--before", "1h"], 0),
        (["--since", "2001-01-01T00:00"], 3),
        (["--before", "2001-01-01"], 0),
        (["--limit", "2"], 2),
        (["--key", "id=1", "--reason", "waits"], 1),
        (["--id", "shop-1-1"], 0),
    ],
)
def test_letters_are_found_by_what_is_asked(cdc: Cdc, served: Run, arguments: list[str], found: int) -> None:
    assert len(ids(cdc, *arguments)) == found


def test_letters_are_found_by_id(cdc: Cdc, served: Run) -> None:
    first, second, third = ids(cdc)
    assert ids(cdc, "--id", third, "--id", first) == [first, third]
    assert second


def test_a_list_that_is_cut_says_so(cdc: Cdc, served: Run) -> None:
    assert "there are more than 2 of a database (--limit N)" in cdc("list", "--limit", "2").stderr
    assert cdc("list", "--limit", "3").stderr == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--since", "yesterday"], "not a time (write 2026-11-22T08:00, or how long ago: 90m, 2h, 1d)"),
        (["--since", "9999-12-31T23:59:59-10:00"], "not a time (write 2026-11-22T08:00, or how long ago"),
        (["--before", "0001-01-01T00:00:00+10:00"], "not a time (write 2026-11-22T08:00, or how long ago"),
        (["--key", "42"], "not a key (write COLUMN=VALUE, or JSON such as"),
        (["--key", '{"id": 1'], "Invalid value for '--key'"),
        (["--table", "item"], "a table without a schema (write public.orders)"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(cdc: Cdc, arguments: list[str], complaint: str) -> None:
    assert complaint in cdc("list", *arguments, code=2).stderr


@pytest.mark.parametrize("arguments", [["list"], ["show"], ["replay"], ["discard", "--yes"]])
@pytest.mark.parametrize("shape", [[], ["--json"]])
def test_a_sink_nobody_knows_is_an_error(cdc: Cdc, items: connection, arguments: list[str], shape: list[str]) -> None:
    done = cdc(*arguments, "audti", *shape, code=78)
    assert "no sink audti in the configuration (known: audit, mirror)" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [["list"], ["show"], ["replay"], ["replay", "--wait"], ["discard", "--yes"]])
def test_nothing_is_an_empty_list_for_machines(
    cdc: Cdc, items: connection, configuration: dict[str, Any], arguments: list[str]
) -> None:
    assert cdc(*arguments, "audit", "--json").stdout == "[]\n"
    configuration["databases"]["shop"]["dsn"] = "host=127.0.0.1 port=1"
    assert cdc(*arguments, "audit", "--json", code=69).stdout == "[]\n"


def test_a_database_that_cannot_be_reached_does_not_stop_the_others(
    cdc: Cdc, served: Run, configuration: dict[str, Any]
) -> None:
    configuration["databases"]["away"] = {"dsn": "host=127.0.0.1 port=1", "tables": {"public.*": {}}}
    done = cdc("list", code=69)
    assert "error: away: cannot connect" in done.stderr
    assert done.stdout.count("public.item") == 3


def test_show_prints_the_event_in_full_digit_for_digit(
    cdc: Cdc, items: connection, served: Run, prepare: Prepare
) -> None:
    fetch(items, "create table price (id integer primary key, amount numeric); select cdc.enable_capture('price')")

    def refuse(batch: list[Event]) -> None:
        raise PermanentFailure("no")

    served.sink.script = refuse
    fetch(items, f"insert into price values (7, {EXACT})")
    wait_for(lambda: len(ids(cdc, "--table", "public.price")) == 1)
    text = cdc("show", "audit", "--table", "public.price").stdout
    assert "reason:    no\n" in text
    assert f'"amount": {EXACT}\n' in text
    event = Event.from_json(text[text.index("{\n") :].strip())
    assert [event.id] == ids(cdc, "--table", "public.price")
    [line] = [line for line in cdc("show", "--table", "public.price", "--json").stdout.splitlines() if "event" in line]
    assert f'"amount":{EXACT}' in line
    assert json.loads(line)["event"]["key"] == {"id": 7}


def test_show_of_an_id_that_is_not_there_fails(cdc: Cdc, served: Run) -> None:
    assert "no dead letter of sink audit is meant" in cdc("show", "audit", "--id", "shop-1-1", code=1).stderr


# -- replaying ----------------------------------------------------------------------------------------------------


def test_replay_hands_letters_to_the_daemon_and_says_what_has_become_of_them(
    cdc: Cdc, items: connection, served: Run
) -> None:
    before = ids(cdc)
    done = cdc("replay", "audit", "--wait")
    assert done.stdout == "shop: 3 dead letters of sink audit done, 0 kept\n"
    assert [event.id for event in served.sink.delivered] == before
    assert listed(cdc) == []


def test_what_is_refused_again_is_kept_and_told(cdc: Cdc, items: connection, served: Run) -> None:
    def script(batch: list[Event]) -> None:
        if 1 in keys(batch):
            raise PermanentFailure("no such topic")

    served.sink.script = script
    first, _, third = ids(cdc)
    done = cdc("replay", "audit", "--wait", code=1)
    assert done.stdout.splitlines() == [
        "shop: 1 dead letter of sink audit done, 2 kept",
        f"shop: {first}: no such topic",
        f"shop: {third}: {letters.WAITS}",
    ]
    assert [(letter["attempts"], letter["replaying"]) for letter in listed(cdc)] == [(2, False), (0, False)]
    [told] = json.loads(cdc("replay", "audit", "--wait", "--json", code=1).stdout)
    assert (told["asked"], told["done"], told["kept"][0]) == (2, 0, {"id": first, "reason": "no such topic"})


def test_replay_without_a_daemon_says_so_and_is_done_by_the_next_one(
    cdc: Cdc, items: connection, served: Run, prepare: Prepare
) -> None:
    served.end()
    done = cdc("replay", "audit")
    assert done.stdout == "shop: 3 dead letters of sink audit to be delivered\n"
    assert "no daemon serves sink audit at the moment; it is done once one does (start cdc run)" in done.stderr
    assert [letter["replaying"] for letter in listed(cdc)] == [True] * 3
    assert "no daemon serves sink audit" in cdc("replay", "audit", "--wait", code=1).stderr
    heir = prepare(owner="heir", on_permanent_failure="park_key").start()
    wait_for(lambda: listed(cdc) == [])
    assert len(heir.sink.delivered) == 3


def test_replay_to_a_paused_sink_says_so(cdc: Cdc, items: connection, served: Run) -> None:
    fetch(items, "update cdc.sink set paused = true, requests = requests + 1")
    assert "sink audit is paused; it is done once it goes on (cdc sinks resume audit)" in cdc("replay", "audit").stderr


def test_every_key_of_what_replay_answers_is_documented(cdc: Cdc, items: connection, served: Run) -> None:
    told = set(re.findall(r"`(\w+)`", (Path(__file__).parents[2] / "docs" / "json.md").read_text()))
    [asked] = json.loads(cdc("replay", "audit", "--key", "id=2", "--json").stdout)
    assert asked == {"database": "shop", "sink": "audit", "asked": 1, "hindrance": None}
    wait_for(lambda: len(listed(cdc)) == 2)
    served.end()
    [hindered] = json.loads(cdc("replay", "audit", "--wait", "--json", code=1).stdout)
    assert hindered["hindrance"].startswith("no daemon serves sink audit")
    assert set(asked) | set(hindered) <= told


def test_replay_of_nothing_is_no_failure_unless_it_was_named(cdc: Cdc, items: connection) -> None:
    assert "no dead letter of sink audit is meant" in cdc("replay", "audit").stderr
    cdc("replay", "audit", "--id", "shop-1-1", code=1)
    cdc("replay", code=2)


def test_of_many_letters_the_first_are_replayed_first(cdc: Cdc, items: connection, served: Run) -> None:
    cdc("replay", "audit", "--limit", "1", "--wait")
    assert keys(served.sink.delivered) == [1]
    assert len(listed(cdc)) == 2


# -- editing ------------------------------------------------------------------------------------------------------


def test_an_edited_event_is_delivered_under_its_old_id(
    cdc: Cdc, items: connection, served: Run, tmp_path: Path
) -> None:
    first = ids(cdc)[0]
    environment = editor(tmp_path, f'sed -i \'s/"v": "bad"/"v": {EXACT}/\' "$1"')
    cdc("replay", "audit", "--id", first, "--edit", "--wait", env=environment)
    [event] = served.sink.delivered
    assert event.id == first
    assert event.after is not None
    assert f'"v":{EXACT}' in event.after.raw


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ('sed -i \'s/"op".*//\' "$1"', "error: not an event: "),
        ('sed -i \'s/"id": "shop/"id": "shoq/\' "$1"', "error: id was changed (it must stay: "),
        ('sed -i \'s/"txid": [0-9]*/"txid": 1/\' "$1"', "error: source was changed (it must stay: "),
        ('sed -i \'s/"id": 1$/"id": 9/\' "$1"', "error: key was changed (it must stay: "),
        ('echo nonsense > "$1"', "error: not an event: "),
        ("true", "error: shop: not saved: nothing is replayed"),
    ],
)
def test_what_is_no_longer_the_event_is_refused_and_nothing_is_replayed(
    cdc: Cdc, items: connection, served: Run, tmp_path: Path, script: str, complaint: str
) -> None:
    first = ids(cdc)[0]
    before = fetch(items, "select event::text, wanted from cdc.dead_letter order by id")
    done = cdc("replay", "audit", "--id", first, "--edit", env=editor(tmp_path, script), code=1)
    assert complaint in done.stderr
    assert "nothing is replayed" in done.stderr
    assert fetch(items, "select event::text, wanted from cdc.dead_letter order by id") == before


def test_one_letter_is_edited_at_a_time(cdc: Cdc, served: Run) -> None:
    assert "--edit takes one dead letter, and 3 are meant (say which with --id)" in (
        cdc("replay", "audit", "--edit", code=2).stderr
    )


def test_what_is_no_event_is_not_edited(cdc: Cdc, items: connection, tmp_path: Path) -> None:
    fetch(
        items, "insert into cdc.dead_letter (sink, event_id, event, reason) values ('audit', 'x', '{\"seq\":1}', 'no')"
    )
    done = cdc("replay", "audit", "--edit", env=editor(tmp_path, "exit 1"), code=1)
    assert "not a valid event, and cannot be replayed (discard it)" in done.stderr


def test_an_edited_event_may_not_be_another_one() -> None:
    source = '{"database":"d","schema":"s","table":"t","seq":1,"txid":1,"ts":"2026-11-22T08:01:02.123456Z"}'
    line = (
        f'{{"version":1,"id":"d-1-1","op":"insert","source":{source},"key":{{"id":1}},"before":null,'
        '"after":{"id":1,"v":1.10},"changed":null,"context":null}'
    )
    assert letters.edited(line, readable(line)).to_json() == line
    with pytest.raises(CdcError, match=r"not an event: "):
        letters.edited(line, line.replace('"op":"insert"', '"op":"upsert"'))


# -- discarding ---------------------------------------------------------------------------------------------------


def test_discard_asks_unless_told_not_to(cdc: Cdc, items: connection, served: Run) -> None:
    refused = cdc("discard", "audit", code=2)
    assert "shop: to be lost: 3 dead letters of sink audit" in refused.stderr
    assert "there is no terminal to ask on (say --yes)" in refused.stderr
    assert len(listed(cdc)) == 3
    assert cdc("discard", "audit", "--key", "id=1", "--yes").stdout == "shop: 2 dead letters of sink audit discarded\n"
    assert [letter["keys"] for letter in listed(cdc)] == [[{"id": 2}]]
    assert json.loads(cdc("discard", "audit", "--yes", "--json").stdout) == [
        {"database": "shop", "sink": "audit", "discarded": 1}
    ]
    fetch(items, "update item set v = 'free' where id = 1")
    wait_for(lambda: keys(served.sink.delivered) == [1])


# -- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("id=42", {'{"id":42}', '{"id":"42"}'}),
        ("code=a b", {'{"code":"a b"}'}),
        ("code=", {'{"code":""}'}),
        ('{"id": 42}', {'{"id":42}'}),
        ('{"id": 12345678901234567890.10}', {'{"id":12345678901234567890.10}'}),
        ('{"a": 1, "b": "\\u00fc/"}', {'{"a":1,"b":"ü/"}', '{"b":"ü/","a":1}'}),
    ],
)
def test_a_key_may_be_written_in_several_ways(text: str, written: set[str]) -> None:
    assert set(letters.key_texts(text)) == written
