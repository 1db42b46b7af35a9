"""Databases in other encodings than UTF-8, and bytes that are no characters: nothing blocked, nothing lost in silence.

What can be told as UTF-8 is an event. What cannot becomes a dead letter that holds the bytes, and a stub where the
notification is the event; whatever stands around it goes its way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg2
import pytest
from harness import Project, until
from psycopg2 import sql
from psycopg2.extensions import connection, make_dsn
from sql import fetch, value

from cdc.decoding import NOT_TEXT
from cdc.event import Event

if TYPE_CHECKING:
    from conftest import Server

Connect = Callable[..., connection]


@pytest.fixture
def new_database(server: Server) -> Iterator[Callable[[str], str]]:
    """``new_database(encoding)`` makes one, and returns its dsn."""
    names: list[str] = []

    def make(encoding: str) -> str:
        names.append(f"test_{uuid.uuid4().hex[:12]}")
        with contextlib.closing(psycopg2.connect(server.admin_dsn)) as admin:
            admin.autocommit = True
            statement = "create database {} template template0 encoding {} locale 'C'"
            fetch(admin, sql.SQL(statement).format(sql.Identifier(names[-1]), sql.Literal(encoding)).as_string(admin))
        return make_dsn(server.admin_dsn, dbname=names[-1])

    yield make
    for name in names:
        server.drop_database(name)


class Shop:
    """A project over table notes, and a writer who sends bytes as they are."""

    def __init__(self, directory: Path, dsn: str, connect: Connect, **options: object) -> None:
        self.writer = connect(dsn)
        encoding = value(self.writer, "show server_encoding")
        self.writer.set_client_encoding("UTF8" if encoding == "UTF8" else encoding)
        fetch(self.writer, "create table notes (id integer primary key, note text)")
        self.project = Project(directory, dsn, {"public.notes": options}, "notes.jsonl")
        self.project.cdc("migrate")

    def write(self, id_: int, note: bytes) -> None:
        with self.writer.cursor() as cursor:
            cursor.execute(b"insert into notes values (%d, '%s')" % (id_, note))

    def delivered(self) -> list[Event]:
        path = self.project.file
        return [Event.from_json(line) for line in path.read_text().splitlines()] if path.exists() else []

    def dead(self) -> list[tuple[str, str, str]]:
        """Event ids, texts and reasons."""
        return [
            tuple(row)
            for row in fetch(self.writer, "select event_id, event::text, reason from cdc.dead_letter order by id")
        ]


def notes(events: list[Event]) -> list[object]:
    return [event.after and event.after["note"] for event in events]


def test_in_sql_ascii_what_is_utf8_is_delivered_and_what_is_not_becomes_a_dead_letter(
    tmp_path: Path, new_database: Callable[[str], str], connect: Connect
) -> None:
    shop = Shop(tmp_path, new_database("SQL_ASCII"), connect)
    shop.write(1, "café 🐘 \\".encode())
    shop.write(2, b"caf\xe9")
    shop.write(3, b"plain")
    shop.project.cdc("run", "--until-idle")
    assert notes(shop.delivered()) == ["café 🐘 \\", "plain"]
    [(event_id, text, reason)] = shop.dead()
    assert reason == NOT_TEXT
    assert event_id.startswith("shop-2-")
    letter = json.loads(text)
    assert letter["old_row_in_hex"] is None
    assert bytes.fromhex(letter["new_row_in_hex"]) == b'{"id":2,"note":"caf\xe9"}'
    # What it is changed into may be text again, and what follows is told.
    fetch(shop.writer, "update notes set note = 'x' where id = 2; delete from notes where id = 2")
    shop.project.cdc("run", "--until-idle")
    assert [event.op for event in shop.delivered()] == ["insert", "insert", "delete"]
    assert len(shop.dead()) == 2
    assert shop.project.status()["databases"]["shop"]["sinks"]["mirror"]["dead_letters"] == 2


def test_a_page_of_many_gets_through_whole_but_for_those_that_cannot(
    tmp_path: Path, new_database: Callable[[str], str], connect: Connect
) -> None:
    shop = Shop(tmp_path, new_database("SQL_ASCII"), connect)
    with shop.writer.cursor() as cursor:
        cursor.execute(
            b"insert into notes select i, case when i % 100 = 0 then '\xff' || i else 'note ' || i end"
            b" from generate_series(1, 1200) i"
        )
    shop.project.cdc("run", "--until-idle")
    assert [event.key and event.key["id"] for event in shop.delivered()] == [i for i in range(1, 1201) if i % 100]
    assert len(shop.dead()) == 12


def test_a_context_that_is_no_text_keeps_no_change_from_anybody(
    tmp_path: Path, new_database: Callable[[str], str], connect: Connect
) -> None:
    shop = Shop(tmp_path, new_database("SQL_ASCII"), connect)
    with shop.writer.cursor() as cursor:
        cursor.execute(b"set cdc.context = 'caf\xe9'")
    shop.write(1, b"plain")
    shop.project.cdc("run", "--until-idle")
    (event,) = shop.delivered()
    assert event.context == "caf\\xe9"
    assert shop.dead() == []


def test_a_daemon_that_listens_is_not_thrown_out_by_what_is_no_text(
    tmp_path: Path, new_database: Callable[[str], str], connect: Connect
) -> None:
    shop = Shop(tmp_path, new_database("SQL_ASCII"), connect)
    with shop.project.daemon() as daemon:
        until(lambda: shop.project.armed(shop.writer), "the bell is armed")
        shop.write(1, b"caf\xe9")
        until(lambda: len(shop.dead()) == 1, "the dead letter is there", 10)
        until(lambda: shop.project.armed(shop.writer), "the bell is armed again")
        shop.write(2, "café".encode())
        until(lambda: notes(shop.delivered()) == ["café"], "the other is delivered", 10)
        daemon.drain()
    assert daemon.said().count("Listening.") == 1
    assert "lost" not in daemon.said()


def test_where_the_notification_is_the_event_it_is_a_stub_with_the_key(
    tmp_path: Path, new_database: Callable[[str], str], connect: Connect
) -> None:
    shop = Shop(tmp_path, new_database("SQL_ASCII"), connect, delivery="ephemeral")
    with shop.project.daemon() as daemon:
        daemon.wait_until_it_says("Listening.")
        shop.write(1, b"caf\xe9")
        shop.write(2, "café".encode())
        until(lambda: len(shop.delivered()) == 2, "both are delivered")
    stub, whole = shop.delivered()
    assert (stub.key, stub.after, stub.truncated) == ({"id": 1}, None, True)
    assert notes([whole]) == ["café"]


@pytest.mark.parametrize(
    ("encoding", "bytes_", "note"), [("LATIN1", b"caf\xe9", "café"), ("EUC_JP", b"\xc6\xfc", "日")]
)
def test_other_encodings_are_told_in_utf8(
    tmp_path: Path, new_database: Callable[[str], str], connect: Connect, encoding: str, bytes_: bytes, note: str
) -> None:
    shop = Shop(tmp_path, new_database(encoding), connect)
    shop.write(1, bytes_)
    shop.project.cdc("run", "--until-idle")
    assert notes(shop.delivered()) == [note]


def test_a_character_without_a_counterpart_in_utf8_becomes_a_dead_letter(
    tmp_path: Path, new_database: Callable[[str], str], connect: Connect
) -> None:
    shop = Shop(tmp_path, new_database("EUC_JP"), connect)
    nothing = b"\xa9\xa1"  # a place in the table where no character is
    shop.write(1, b"a" + nothing)
    shop.write(2, b"\xc6\xfc")
    shop.project.cdc("run", "--until-idle")
    assert notes(shop.delivered()) == ["日"]
    [(_, text, reason)] = shop.dead()
    assert reason == NOT_TEXT
    assert nothing in bytes.fromhex(json.loads(text)["new_row_in_hex"])


def test_a_char_of_one_high_byte_is_a_dead_letter_where_the_server_writes_it_so(
    tmp_path: Path, database: str, connect: Connect
) -> None:
    shop = Shop(tmp_path, database, connect)
    fetch(shop.writer, """alter table notes add c "char" """)
    fetch(shop.writer, """insert into notes values (1, 'a\\b', (-56)::"char"), (2, 'y', 'c')""")
    shop.project.cdc("run", "--until-idle")
    if value(shop.writer, """select octet_length(((-56)::"char")::text) > 1"""):  # of 15 the newer ones do so
        assert [event.after and event.after["c"] for event in shop.delivered()] == ["\\310", "c"]
        return
    assert notes(shop.delivered()) == ["y"]
    [(_, text, _)] = shop.dead()
    assert bytes.fromhex(json.loads(text)["new_row_in_hex"]) == b'{"id":1,"note":"a\\\\b","c":"\xc8"}'


def test_no_value_of_a_dead_letter_is_in_the_log(
    tmp_path: Path, new_database: Callable[[str], str], connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    shop = Shop(tmp_path, new_database("SQL_ASCII"), connect)
    shop.write(1, b"canary \xe9")
    shop.project.cdc("--log-level", "debug", "run", "--until-idle")
    log = shop.project.log.read_text()
    assert "An event became a dead letter." in log
    assert "canary" not in log
    assert b"canary".hex() not in log
