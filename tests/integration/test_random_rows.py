"""Random rows: what an event says of a row is what PostgreSQL's to_json says of it, text for text, and so is the bell.

Hypothesis invents rows of a table with a column of nearly every kind, the settings of a session, and what happens to
the rows. After every statement a witness with the settings of the contract reads the row column by column; the event
that is expected is made of these texts alone.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg2 import sql
from test_types import Facts, Lab, facts

from cdc.event import Event

if TYPE_CHECKING:
    from conftest import Server

# -- literals: what a client might send for a value of each type ----------------------------------------------------

# No zero byte: PostgreSQL has no text with one.
SURROGATE = re.compile("[\ud800-\udfff]")
CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
TEXTS = st.text(CHARACTERS, max_size=20) | st.sampled_from(["", "null", '{"a":1}', "\\u0000", "x" * 3000, "🐘" * 2000])


def quoted(text: str) -> str:
    """An element of an array or a field of a row."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def arrays(elements: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Of one dimension, of two, and with bounds of their own."""
    items = (elements.map(quoted) | st.just("NULL")).map(str)
    flat = st.lists(items, max_size=4).map(lambda found: "{" + ",".join(found) + "}")
    square = st.lists(st.tuples(items, items), min_size=1, max_size=3).map(
        lambda rows: "{" + ",".join("{" + ",".join(row) + "}" for row in rows) + "}"
    )
    shifted = st.tuples(st.integers(-5, 5), items).map(lambda found: f"[{found[0]}:{found[0]}]={{{found[1]}}}")
    return flat | square | shifted


def ranges(bounds: st.SearchStrategy[tuple[str, str]]) -> st.SearchStrategy[str]:
    """Of bounds that are in order, or of none."""
    closed = st.tuples(st.sampled_from("[("), bounds, st.sampled_from("])")).map(
        lambda found: f"{found[0]}{quoted(found[1][0])},{quoted(found[1][1])}{found[2]}"
    )
    return closed | st.sampled_from(["empty", "(,)"]) | bounds.map(lambda found: f"[{quoted(found[0])},)")


def in_order(numbers: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(numbers, numbers).map(lambda pair: (min(pair), max(pair)))


def json_texts(strings: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Values as different programs write them: with white space or without, escaped or not."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | strings
    values = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
        max_leaves=6,
    )
    return st.builds(write, values, st.sampled_from([None, 0, 2]), st.booleans())


def write(value: object, indent: int | None, escaped: bool) -> str:
    text = json.dumps(value, indent=indent, ensure_ascii=escaped)
    # Half of a surrogate pair can be sent escaped only.
    return text if text.isascii() or not SURROGATE.search(text) else write(value, indent, True)


def moment(microseconds: int) -> str:
    return (datetime(2000, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)).isoformat()


FLOATS = st.floats().map(str)
MOMENTS = st.integers(-6 * 10**16, 24 * 10**16)  # the years 99 to 9600
INFINITIES = st.sampled_from(["infinity", "-infinity"])
# What json_each cannot take apart belongs to json only: jsonb refuses it.
ANY_STRINGS = st.text(max_size=8) | st.sampled_from(["\0", "a\ud800"])

COLUMNS: dict[str, tuple[str, st.SearchStrategy[str]]] = {
    "flag": ("boolean", st.sampled_from(["true", "false"])),
    "small": ("smallint", st.integers(-(2**15), 2**15 - 1).map(str)),
    "whole": ("integer", st.integers(-(2**31), 2**31 - 1).map(str)),
    "big": ("bigint", st.integers(-(2**63), 2**63 - 1).map(str)),
    "exact": (
        "numeric",
        st.builds(lambda digits, places: f"{digits}e{places}", st.integers(-(10**40), 10**40), st.integers(-300, 300))
        | st.sampled_from(["NaN", "Infinity", "-Infinity", "0.000"]),
    ),
    "single": ("real", st.floats(width=32).map(str)),
    "double": ("double precision", FLOATS),
    "cash": ("money", st.integers(-(2**63), 2**63 - 1).map(lambda cents: f"{Decimal(cents).scaleb(-2):f}")),
    "words": ("text", TEXTS),
    "padded": ("char(10)", st.text(CHARACTERS, max_size=10)),
    'odd "név" 🙂': ("varchar", TEXTS),
    "mood": ("mood", st.sampled_from(["sad", 'so "so"', "it's 🙂"])),
    "bytes": ("bytea", st.binary(max_size=20).map(lambda found: "\\x" + found.hex())),
    "bits": ("bit varying", st.text("01", max_size=20)),
    "day": ("date", st.dates().map(str) | INFINITIES | st.just("0044-03-15 BC")),
    "clock": ("time", st.times().map(str) | st.just("24:00:00")),
    "clock_there": (
        "time with time zone",
        st.builds(lambda at, minutes: f"{at}{minutes:+03}:30", st.times(), st.integers(-15, 14)),
    ),
    "local": ("timestamp", MOMENTS.map(lambda n: moment(n)[:-6]) | INFINITIES),
    "at": ("timestamp with time zone", MOMENTS.map(moment) | INFINITIES),
    "span": (
        "interval",
        st.builds(
            "{} mons {} days {} hours {} microseconds".format,
            st.integers(-5000, 5000),
            st.integers(-5000, 5000),
            st.integers(-5000, 5000),
            st.integers(-(2**31) + 1, 2**31 - 1),  # PostgreSQL 14 reads no more
        ),
    ),
    "id_there": ("uuid", st.uuids().map(str)),
    "host": ("inet", st.ip_addresses().map(str)),
    "doc": ("json", json_texts(ANY_STRINGS)),
    "docb": ("jsonb", json_texts(st.text(CHARACTERS, max_size=8))),
    "numbers": ("integer[]", arrays(st.integers(-9, 9).map(str))),
    "texts": ("text[]", arrays(st.text(CHARACTERS, max_size=5))),
    "pair": ("pair", st.builds(lambda a, b: f"({a},{quoted(b)})", st.integers(-9, 9), st.text(CHARACTERS, max_size=5))),
    "pairs": ("pair[]", arrays(st.integers(-9, 9).map(lambda a: f'({a},"x,""y")'))),
    "cost": ("price", st.integers(0, 10**9).map(lambda cents: f"{Decimal(cents).scaleb(-2):f}")),
    "numbers_between": ("int4range", ranges(in_order(st.integers(-99, 99)).map(lambda p: (str(p[0]), str(p[1]))))),
    "times_between": ("tstzrange", ranges(in_order(MOMENTS).map(lambda p: (moment(p[0]), moment(p[1]))))),
    "times_apart": (
        "tstzmultirange",
        in_order(MOMENTS).map(lambda p: f'{{["{moment(p[0])}","{moment(p[1])}"]}}') | st.just("{}"),
    ),
    "place": ("point", st.tuples(FLOATS, FLOATS).map(lambda p: f"({p[0]},{p[1]})")),
    "terms": ("tsvector", st.lists(st.text(string.ascii_letters, min_size=1, max_size=5), max_size=4).map(" ".join)),
}
SETTINGS = {
    "timezone": ["UTC", "Asia/Kathmandu", "America/St_Johns", "<ODD>-13:45"],
    "datestyle": ["ISO, MDY", "SQL, DMY", "German", "Postgres, YMD"],
    "intervalstyle": ["postgres", "postgres_verbose", "iso_8601", "sql_standard"],
    "extra_float_digits": ["-15", "0", "1", "3"],
    "bytea_output": ["hex", "escape"],
    "search_path": ["public", "pg_temp, public", "public, cdc"],
}

# -- what happens to the rows -------------------------------------------------------------------------------------

VALUES = st.fixed_dictionaries({}, optional={name: st.none() | value for name, (_, value) in COLUMNS.items()})
STEPS = st.lists(
    st.tuples(st.sampled_from(["change", "change", "move", "delete"]), st.sampled_from([1, 2]), VALUES),
    min_size=1,
    max_size=6,
)
"""What to do with the row of a number; whatever it is, a row that is not there is inserted."""
UNESCAPABLE = re.compile(r"\\u0000|\\u[dD][89a-fA-F]")
"""What may keep a notification from carrying the row."""

Row = dict[str, str]
"""Of each column, the JSON text."""


@pytest.fixture(scope="module")
def lab(server: Server, template: str) -> Iterator[Lab]:
    with closing(Lab(server, template)) as made:
        columns = [
            sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(type_)) for name, (type_, _) in COLUMNS.items()
        ]
        for image in ("diff", "full"):
            names = {"table": sql.Identifier(image), "columns": sql.SQL(", ").join(columns)}
            made.run(sql.SQL("create table {table} (id integer primary key, {columns})").format(**names))
            made.capture(image, image=image, notify="always")
        yield made


class Story:
    """What was done to the rows of one table, and what the events of it should say."""

    def __init__(self, lab: Lab, table: str) -> None:
        self.rows: dict[int, Row] = {}
        self.expected: list[Facts] = []
        self.involved: list[str] = []
        """For each event, the rows it is about."""
        self._lab = lab
        self._table = sql.Identifier("public", table)
        self._full = table == "full"

    def take(self, step: tuple[str, int, dict[str, str | None]]) -> None:
        """Do one thing, and tell what should come of it."""
        what, number, values = step
        if number not in self.rows:
            names = ["id", *values]
            places = [sql.SQL("%s"), *(sql.SQL("%s::" + COLUMNS[name][0]) for name in values)]
            self._run("insert into {table} ({names}) values ({places})", names, places, (number, *values.values()))
            self.rows[number] = row = self._read(number)
            self._expect("insert", None, row, row, None)
            return
        was = self.rows.pop(number)
        if what == "delete":
            self._run("delete from {table} where id = %s", [], [], (number,))
            self._expect("delete", was, None, was, None)
            return
        to = number if what == "change" else 10 + len(self.expected)
        places = [sql.SQL("%s"), *(sql.SQL("%s::" + COLUMNS[name][0]) for name in values)]
        self._run(
            "update {table} set ({names}) = row({places}) where id = %s",
            ["id", *values],
            places,
            (to, *values.values(), number),
        )
        self.rows[to] = row = self._read(to)
        changed = tuple(name for name in row if row[name] != was[name])
        if changed:
            before, after = (was, row) if self._full else ({c: r[c] for c in changed} for r in (was, row))
            self._expect("update", before, after, row, changed)
            self.involved[-1] = one_line(was) + one_line(row)

    def _expect(
        self, op: str, before: Row | None, after: Row | None, row: Row, changed: tuple[str, ...] | None
    ) -> None:
        images = [None if image is None else one_line(image) for image in (before, after)]
        self.expected.append((op, one_line({"id": row["id"]}), images[0], images[1], changed, False))
        self.involved.append(one_line(row))

    def _run(self, template: str, names: list[str], places: list[sql.SQL], parameters: tuple[object, ...]) -> None:
        parts = {"names": sql.SQL(", ").join(map(sql.Identifier, names)), "places": sql.SQL(", ").join(places)}
        self._lab.run(sql.SQL(template).format(table=self._table, **parts), parameters)

    def _read(self, number: int) -> Row:
        """What to_json says of each column of a row."""
        names = ["id", *COLUMNS]
        texts = sql.SQL(", ").join(
            sql.SQL("coalesce(to_json({})::text, 'null')").format(sql.Identifier(name)) for name in names
        )
        query = sql.SQL("select {} from {} where id = %s").format(texts, self._table)
        return dict(zip(names, self._lab.seen(query, (number,)), strict=True))


def one_line(image: Row) -> str:
    """A row as it stands in an event, where the line breaks of json are spaces."""
    members = ",".join(f"{json.dumps(name, ensure_ascii=False)}:{text}" for name, text in image.items())
    return "{" + members.replace("\n", " ").replace("\r", " ") + "}"


@pytest.mark.parametrize("table", ["diff", "full"])
@settings(max_examples=50, deadline=None)
@given(steps=STEPS, session=st.fixed_dictionaries({name: st.sampled_from(found) for name, found in SETTINGS.items()}))
def test_an_event_says_of_a_row_what_to_json_says(
    lab: Lab, table: str, steps: list[tuple[str, int, dict[str, str | None]]], session: dict[str, str]
) -> None:
    lab.run(f"truncate public.{table}")  # what an example that failed has left
    lab.events()
    lab.heard()
    for name, setting in session.items():
        lab.run("select set_config(%s, %s, false)", (name, setting))
    story = Story(lab, table)
    for step in steps:
        story.take(step)

    events = lab.events()
    assert [facts(event) for event in events] == story.expected
    payloads = lab.heard()
    assert len(payloads) == len(events)
    for event, payload, involved in zip(events, payloads, story.involved, strict=True):
        line = event.to_json()
        if payload and not (heard := Event.from_json(payload)).truncated:
            assert heard.to_json() == line
        elif len(line.encode()) < 8000:
            assert payload == ""
            assert UNESCAPABLE.search(involved)
        else:
            assert not payload or (heard.id, heard.key) == (event.id, event.key)
