"""What is captured of a table, and what is never: exclude, mask, when. Canaries must be found nowhere."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from harness import Project, read_lines
from psycopg2.extensions import connection
from sql import fetch, value

from cdc.connection import Connection
from cdc.event import Event, Op
from cdc.outbox import Outbox, Owner

Connect = Callable[..., connection]
CANARY = "canary-5f2d"


class Shop:
    """A writer, and what its changes become."""

    def __init__(self, writer: connection, reader: Connection) -> None:
        self.writer = writer
        self._outbox = Outbox(reader, database="shop", sink="test", owner=Owner("test", 1))
        self._outbox.claim(start="now")
        self._acked: int | None = None

    def enable(self, table: str, **options: object) -> str:
        names = {"when": "conditions"}
        given = {names.get(name, name): json.dumps(o) if isinstance(o, dict) else o for name, o in options.items()}
        arguments = "".join(f", {name} => %({name})s" for name in given)
        return str(
            value(self.writer, f"select cdc.enable_capture(%(table)s::regclass{arguments})", given | {"table": table})
        )

    def do(self, statement: str, parameters: object = None) -> list[Event]:
        """Run it; what it became."""
        fetch(self.writer, statement, parameters)
        batch = self._outbox.next_batch(self._acked, events=1000, bytes_=1 << 30)
        self._acked = batch.last_seq if batch else None
        events = [event for event in batch.events if isinstance(event, Event)] if batch else []
        assert batch is None or len(events) == len(batch.events)
        return events

    def stored(self) -> str:
        """Everything schema cdc holds, as text, except the secret."""
        tables = fetch(
            self.writer,
            """select c.oid::regclass::text from pg_class c where c.relnamespace = 'cdc'::regnamespace
                and c.relkind = 'r' and c.relname <> 'secret'""",
        )
        return "\n".join(str(fetch(self.writer, f"select t::text from {table} t")) for (table,) in tables)


@pytest.fixture
def shop(installed: str, connect: Connect) -> Shop:
    """Table person (id, name, email, card, note, doc), not captured yet."""
    writer = connect(installed)
    fetch(
        writer,
        "create table person (id int primary key, name text, email text, card text, note text, doc json, at date)",
    )
    return Shop(writer, Connection(installed, purpose="test"))


HIDING: dict[str, Any] = {"exclude": ["note"], "mask": {"email": "hash", "card": "redact"}}
ROW = f"(1, 'Ann', '{CANARY}-email', '{CANARY}-card', '{CANARY}-note', '{{}}', null)"


# -- exclude and mask ---------------------------------------------------------------------------------------------


def test_what_is_hidden_is_hidden_in_every_op(shop: Shop) -> None:
    shop.enable("person", **HIDING)
    (insert,) = shop.do(f"insert into person values {ROW}")
    assert insert.after is not None
    assert list(insert.after) == ["id", "name", "email", "card", "doc", "at"]
    assert insert.after["card"] == "***"
    assert re.fullmatch("[0-9a-f]{64}", insert.after["email"])
    (update,) = shop.do("update person set name = 'Bob', email = 'new', card = 'new', note = 'new'")
    assert update.changed == ("name", "email")  # that a redacted column has changed is not told either
    assert update.before is not None
    assert update.before["email"] == insert.after["email"]
    assert shop.do("update person set note = 'other', card = 'other'") == []  # nothing visible has changed
    (delete,) = shop.do("delete from person")
    assert delete.before is not None
    assert "note" not in delete.before
    assert delete.before["card"] == "***"


@pytest.mark.parametrize(
    "meanwhile",
    [
        "select cdc.enable_capture('person', exclude => '{note}')",
        "alter table person rename note to remark",
        "alter table person add more text",
    ],
)
def test_a_transaction_older_than_what_is_hidden_shows_no_more_than_the_key(
    shop: Shop, installed: str, connect: Connect, meanwhile: str
) -> None:
    """Its snapshot has not the rules, or not the columns, that its own rows go by."""
    if "enable" not in meanwhile:
        shop.enable("person", exclude=["note"])
    old = connect(installed, autocommit=False)
    fetch(old, "set transaction isolation level repeatable read")
    fetch(old, "select 1")
    fetch(shop.writer, meanwhile)
    fetch(old, f"insert into person values {ROW}")
    old.commit()
    (event,) = shop.do("select 1")
    assert event.truncated
    assert f"{CANARY}-note" not in shop.stored()
    (event,) = shop.do(f"insert into person values {ROW.replace('1', '2', 1)}")
    assert event.after is not None
    assert f"{CANARY}-note" not in shop.stored()


def test_null_stays_null_whatever_is_done_to_the_column(shop: Shop) -> None:
    shop.enable("person", **HIDING)
    (insert,) = shop.do("insert into person (id) values (1)")
    assert insert.after is not None
    assert (insert.after["email"], insert.after["card"]) == (None, None)


def test_a_hash_is_an_hmac_with_the_installations_secret_equal_for_equal_values(shop: Shop) -> None:
    shop.enable("person", mask={"email": "hash", "at": "hash"})
    first, second = shop.do("insert into person (id, email) values (1, 'a@b.c'), (2, 'a@b.c')")
    assert first.after is not None
    assert second.after is not None
    assert first.after["email"] == second.after["email"]
    inner = bytes(value(shop.writer, "select inner_pad from cdc.secret"))
    key = bytes(byte ^ 0x36 for byte in inner)
    assert first.after["email"] == hmac.new(key, b'"a@b.c"', hashlib.sha256).hexdigest()


def test_a_hashed_key_identifies_and_a_left_out_one_is_refused(shop: Shop) -> None:
    shop.enable("person", mask={"id": "hash"})
    (insert,) = shop.do("insert into person (id) values (1)")
    (delete,) = shop.do("delete from person")
    assert insert.key == delete.key
    assert insert.key is not None
    assert len(insert.key["id"]) == 64
    for hiding in ({"exclude": ["id"]}, {"mask": {"id": "redact"}}):
        with pytest.raises(psycopg2.errors.InvalidParameterValue, match="identified by id"):
            shop.enable("person", **hiding)


def test_wide_rows_and_rows_too_wide_hide_as_well(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.enable("person", **HIDING)
    shop.do(f"insert into person values {ROW}")
    (update,) = shop.do("update person set name = repeat('x', 9000), card = %s", (CANARY,))
    assert update.changed == ("name",)
    assert CANARY not in shop.stored()
    small = fetch(shop.writer, "select pg_get_functiondef('cdc.capture()'::regprocedure)")[0][0]
    fetch(shop.writer, small.replace("256 * 1024 * 1024", "10000"))
    (cut,) = shop.do("update person set name = repeat('y', 20000), note = %s", (CANARY,))
    assert cut.truncated
    assert cut.key == {"id": 1}
    assert CANARY not in shop.stored()


def test_a_row_that_cannot_be_taken_apart_shows_its_key_and_nothing_else(shop: Shop) -> None:
    shop.enable("person", **HIDING)
    (insert,) = shop.do("insert into person (id, note, doc) values (1, %s, %s)", (CANARY, '"\\u0000"'))
    assert (insert.truncated, insert.key, insert.after) == (True, {"id": 1}, None)
    assert CANARY not in shop.stored()


def test_a_renamed_column_stays_hidden_and_so_does_a_new_one_of_the_old_name(shop: Shop) -> None:
    shop.enable("person", **HIDING)
    fetch(shop.writer, "alter table person rename note to memo; alter table person add note text")
    (insert,) = shop.do("insert into person (id, memo, note) values (1, %s, %s)", (CANARY, CANARY))
    assert insert.after is not None
    assert not {"memo", "note"} & set(insert.after)
    assert CANARY not in shop.stored()


def test_partitions_hide_what_their_root_hides(shop: Shop) -> None:
    fetch(
        shop.writer,
        """create table part (id int, junk int, note text, name text, primary key (id)) partition by range (id);
           create table part_1 (name text, id int not null, note text, junk int);
           alter table part attach partition part_1 for values from (0) to (10)""",
    )
    shop.enable("part", exclude=["note"])
    (insert,) = shop.do("insert into part (id, note, name) values (1, %s, 'Ann')", (CANARY,))
    assert insert.after == {"name": "Ann", "id": 1, "junk": None}
    fetch(shop.writer, "alter table part rename note to memo")
    assert len(shop.do("insert into part (id, memo) values (2, %s)", (CANARY,))) == 1
    assert CANARY not in shop.stored()


def test_a_column_that_is_not_there_is_an_error_unless_a_glob_meant_many_tables(shop: Shop) -> None:
    with pytest.raises(psycopg2.errors.UndefinedColumn, match="no column nmae"):
        shop.enable("person", exclude=["nmae"])
    shop.enable("person", exclude=["later"], lenient=True)
    fetch(shop.writer, "alter table person add later text")
    assert len(shop.do("insert into person (id, later) values (1, %s)", (CANARY,))) == 1
    assert CANARY not in shop.stored()


# -- when ---------------------------------------------------------------------------------------------------------


def test_a_condition_decides_for_its_op_and_the_others_are_captured(shop: Shop) -> None:
    assert shop.enable("person", when={"update": "NEW.name IS DISTINCT FROM OLD.name"}) == "added"
    assert shop.enable("person", when={"update": "NEW.name IS DISTINCT FROM OLD.name"}) == "unchanged"
    events = shop.do(
        "insert into person (id) values (1); update person set note = 'x';"
        " update person set name = 'y'; delete from person"
    )
    assert [event.op for event in events] == [Op.INSERT, Op.UPDATE, Op.DELETE]
    assert shop.enable("person", when={"insert": "NEW.id > 10", "delete": "OLD.id > 10"}) == "changed"
    events = shop.do("insert into person (id) values (1), (11); update person set name = 'z'; delete from person")
    assert [(event.op, event.key and event.key["id"]) for event in events] == [
        (Op.INSERT, 11), (Op.UPDATE, 1), (Op.UPDATE, 11), (Op.DELETE, 11),
    ]  # fmt: skip
    assert shop.enable("person") == "changed"
    assert value(shop.writer, "select triggers from cdc.captured") == ["00_cdc_capture", "00_cdc_truncate"]


def test_a_condition_postgresql_does_not_understand_names_the_table_and_the_op(shop: Shop) -> None:
    for condition in ("NEW.nmae = 1", "NEW.id =", "OLD.id = 1 and", "NEW.id", "(select true)"):
        with pytest.raises(
            psycopg2.errors.InvalidParameterValue, match=r"condition of insert for public\.person is wrong"
        ):
            shop.enable("person", when={"insert": condition})
    assert fetch(shop.writer, "select * from cdc.captured") == []


def test_disabling_removes_the_triggers_of_conditions_too(shop: Shop) -> None:
    shop.enable("person", when={"update": "true", "delete": "true"})
    assert value(shop.writer, "select cdc.disable_capture('person')") == "removed"
    assert fetch(shop.writer, "select 1 from pg_trigger where tgname like '00%%'") == []


# -- nowhere ------------------------------------------------------------------------------------------------------


def test_a_canary_is_nowhere_not_in_the_book_a_payload_a_log_a_file_or_an_error(
    tmp_path: Path, database: str, connect: Connect
) -> None:
    writer, ear = connect(database), connect(database)
    fetch(writer, "create table person (id int primary key, name text, email text, card text, note text)")
    fetch(writer, "create table live (like person including all)")
    fetch(ear, "listen cdc")
    tables = {"public.person": HIDING, "public.live": {**HIDING, "delivery": "ephemeral"}}
    project = Project(tmp_path, database, tables, "{table}.jsonl", database={"notify": "always"})
    project.cdc("migrate")
    with project.daemon(
        "--migrate",
    ) as daemon:
        for table in ("person", "live"):
            for statement in (
                f"insert into {table} values (1, 'a', '{CANARY}', '{CANARY}', '{CANARY}')",
                f"update {table} set name = 'b', email = email || 'x', note = note || 'x'",
                f"update {table} set id = 2, name = repeat('b', 9000)",
                f"delete from {table}",
            ):
                fetch(writer, statement)
        daemon.wait_until_it_says("Listening.")
        daemon.drain()
    project.cdc("run", "--until-idle")
    fetch(writer, "select pg_notify('cdc', 'end')")
    payloads: list[str] = []
    while "end" not in payloads:
        ear.poll()
        payloads += [note.payload for note in ear.notifies]
        ear.notifies.clear()
    assert len(payloads) > 8
    assert len(read_lines(tmp_path / "person.jsonl")) == 4
    everything = payloads + [
        path.read_text() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".yaml"
    ]
    for table in ("cdc.event", "cdc.captured_table", "cdc.sink", "cdc.position", "cdc.dead_letter"):
        everything.append(str(fetch(writer, f"select t::text from {table} t")))
    # The user's write fails for want of space in the outbox: PostgreSQL's own error quotes the row that failed.
    fetch(writer, "alter table cdc.event_0 add check (false) not valid")
    with pytest.raises(psycopg2.errors.CheckViolation) as failed:
        fetch(writer, f"insert into person values (3, 'a', '{CANARY}', '{CANARY}', '{CANARY}')")
    everything.append(str(failed.value))
    assert not [text for text in everything if CANARY in text]
