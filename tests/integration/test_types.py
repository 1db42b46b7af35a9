"""How a value of every type stands in an event: one table, held against the book, notifications and docs/types.md.

:data:`GOLDEN` says for each type what is written, as SQL, and what the event then holds, as JSON text. A session with
odd settings writes every row of it into a table that is captured through the outbox, once as a narrow row and once as a
wide one, which the trigger stores in another way, and into a table whose notifications are the events. It must also be
what PostgreSQL's own to_json says under the settings of the contract. docs/types.md is made of the same table::

    python tests/integration/test_types.py

Below it: names of all kinds, generated columns, and values of many megabytes.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
import pytest
from psycopg2 import sql

from cdc.connection import Connection
from cdc.decoding import Unreadable
from cdc.event import Event
from cdc.outbox import Outbox, Owner

if TYPE_CHECKING:
    from conftest import Server

DOCUMENT = Path(__file__).parents[2] / "docs" / "types.md"


@dataclass(frozen=True)
class Golden:
    """One value.

    Attributes:
        type: as in CREATE TABLE.
        written: an SQL expression, cast to the type.
        event: the JSON text in the event.
        since: the first major version of PostgreSQL that has it.
        needs: an extension, or ``xml`` for a server built with libxml.
        unescapable: whether it holds a string that PostgreSQL's JSON functions cannot take apart: a notification of the
            row is then a stub.
    """

    type: str
    written: str
    event: str
    since: int = 14
    needs: str = ""
    unescapable: bool = False


SETUP = """
    create type mood as enum ('sad', 'so "so"', 'it''s 🙂');
    create type pair as (a integer, "b c" text);
    create type nest as (p pair, ps pair[], at timestamptz, doc json);
    create type shrunk as (a integer, gone text, b integer);
    alter type shrunk drop attribute gone;
    create table "A person" (id integer, born date);
    create domain price as numeric(10, 2) check (value >= 0);
    create domain prices as price[];
    create domain document as json;
    create domain proper as pair check ((value).a > 0);
    create domain whim as mood;
    create type weights as range (subtype = float8, multirange_type_name = weightses);
"""

GOLDEN: dict[str, Sequence[Golden]] = {
    "Numbers": [
        Golden("smallint", "'-32768'", "-32768"),
        Golden("integer", "'2147483647'", "2147483647"),
        Golden("bigint", "'-9223372036854775808'", "-9223372036854775808"),
        Golden("bigint", "'9223372036854775807'", "9223372036854775807"),
        Golden("numeric", "'1.10'", "1.10"),
        Golden("numeric", "'12345678901234567890.12345678901234567890'", "12345678901234567890.12345678901234567890"),
        Golden("numeric", "'1e-300'", f"0.{'0' * 299}1"),
        Golden("numeric", "'1e300'", f"1{'0' * 300}"),
        Golden("numeric", "repeat('9', 1000)", "9" * 1000),
        Golden("numeric", "repeat('9', 1000) || '.' || repeat('9', 1000)", f"{'9' * 1000}.{'9' * 1000}"),
        Golden("numeric", "'NaN'", '"NaN"'),
        Golden("numeric", "'Infinity'", '"Infinity"'),
        Golden("numeric", "'-Infinity'", '"-Infinity"'),
        Golden("numeric(10,2)", "'1.005'", "1.01"),
        Golden("numeric(3,-2)", "'12345'", "12300", since=15),
        Golden("real", "'0.1'", "0.1"),
        Golden("real", "'3.4028235e38'", "3.4028235e+38"),
        Golden("real", "'1e-45'", "1e-45"),
        Golden("real", "'NaN'", '"NaN"'),
        Golden("double precision", "'0.30000000000000004'", "0.30000000000000004"),
        Golden("double precision", "'1e-300'", "1e-300"),
        Golden("double precision", "'1e300'", "1e+300"),
        Golden("double precision", "'1.7976931348623157e308'", "1.7976931348623157e+308"),
        Golden("double precision", "'5e-324'", "5e-324"),
        Golden("double precision", "'-0'", "-0"),
        Golden("double precision", "'NaN'", '"NaN"'),
        Golden("double precision", "'Infinity'", '"Infinity"'),
        Golden("double precision", "'-Infinity'", '"-Infinity"'),
        Golden("money", "'12.34'", '"$12.34"'),
        Golden("money", "'-92233720368547758.08'", '"-$92,233,720,368,547,758.08"'),
    ],
    "Text": [
        Golden("text", "''", '""'),
        Golden("text", "'NULL'", '"NULL"'),
        Golden(
            "text", r"""E'"quoted", back\\slash, it''s, a/slash'""", r'''"\"quoted\", back\\slash, it's, a/slash"'''
        ),
        Golden("text", r"E'\b\t\n\f\r\u0001\u001f'", r'"\b\t\n\f\r\u0001\u001f"'),
        Golden("text", r"E'é € 日本 🐘 e\u0301'", '"é € 日本 🐘 e\u0301"'),
        Golden("text", r"E'\u007f\u2028\ufeff\U0010ffff'", '"\x7f\u2028\ufeff\U0010ffff"'),
        Golden("varchar(10)", "'ab '", '"ab "'),
        Golden("char(5)", "'ab'", '"ab   "'),
        Golden("name", "'a name'", '"a name"'),
        Golden('"char"', "'a'", '"a"'),
        Golden('"char"', '0::"char"', '""'),
        Golden('"char"', '(-56)::"char"', r'"\\310"', since=16),
        Golden("citext", "'Ab'", '"Ab"', needs="citext"),
    ],
    "Bytes, bits, booleans": [
        Golden("bytea", r"'\x'", r'"\\x"'),
        Golden("bytea", r"'\x00ff5c27'", r'"\\x00ff5c27"'),
        Golden("bit(8)", "B'10100101'", '"10100101"'),
        Golden("bit varying", "B''", '""'),
        Golden("bit varying(8)", "B'101'", '"101"'),
        Golden("boolean", "true", "true"),
        Golden("boolean", "false", "false"),
    ],
    "Dates and times": [
        Golden("date", "'2026-11-22'", '"2026-11-22"'),
        Golden("date", "'infinity'", '"infinity"'),
        Golden("date", "'-infinity'", '"-infinity"'),
        Golden("date", "'0044-03-15 BC'", '"0044-03-15 BC"'),
        Golden("date", "'4714-11-24 BC'", '"4714-11-24 BC"'),
        Golden("date", "'5874897-12-31'", '"5874897-12-31"'),
        Golden("time", "'23:59:59.999999'", '"23:59:59.999999"'),
        Golden("time", "'24:00:00'", '"24:00:00"'),
        Golden("time(0)", "'12:34:56.7'", '"12:34:57"'),
        Golden("time with time zone", "'08:01:02.5+05:30'", '"08:01:02.5+05:30"'),
        Golden("time with time zone", "'24:00:00-15:59:59'", '"24:00:00-15:59:59"'),
        Golden("timestamp", "'2026-11-22 08:01:02.123456'", '"2026-11-22T08:01:02.123456"'),
        Golden("timestamp", "'infinity'", '"infinity"'),
        Golden("timestamp", "'-infinity'", '"-infinity"'),
        Golden("timestamp", "'0044-03-15 12:00:00 BC'", '"0044-03-15T12:00:00 BC"'),
        Golden("timestamp", "'294276-12-31 23:59:59.999999'", '"294276-12-31T23:59:59.999999"'),
        Golden("timestamp with time zone", "'2026-11-22 08:01:02.123456+05:30'", '"2026-11-22T02:31:02.123456+00:00"'),
        Golden("timestamp with time zone", "'infinity'", '"infinity"'),
        Golden("timestamp with time zone", "'-infinity'", '"-infinity"'),
        Golden("timestamp with time zone", "'4714-11-24 00:00:00+00 BC'", '"4714-11-24T00:00:00+00:00 BC"'),
        Golden("interval", "'1 year -2 days 03:04:05.678901'", '"1 year -2 days +03:04:05.678901"'),
        Golden("interval", "'-1 mons +25 hours'", '"-1 mons +25:00:00"'),
        Golden("interval", "'0'", '"00:00:00"'),
        Golden("interval", "'178000000 years'", '"178000000 years"'),
        Golden("interval", "'infinity'", '"infinity"', since=17),
        Golden("interval", "'-infinity'", '"-infinity"', since=17),
    ],
    "Identities and networks": [
        Golden("uuid", "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'", '"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"'),
        Golden("inet", "'192.168.0.1'", '"192.168.0.1"'),
        Golden("inet", "'192.168.0.1/24'", '"192.168.0.1/24"'),
        Golden("inet", "'2001:DB8::1/64'", '"2001:db8::1/64"'),
        Golden("cidr", "'10.0.0.0/8'", '"10.0.0.0/8"'),
        Golden("macaddr", "'08-00-2B-01-02-03'", '"08:00:2b:01:02:03"'),
        Golden("macaddr8", "'08:00:2b:01:02:03'", '"08:00:2b:ff:fe:01:02:03"'),
    ],
    "JSON": [
        Golden("json", """'{"b": 1.10,  "a":[1, {}]}'""", '{"b": 1.10,  "a":[1, {}]}'),
        Golden("json", """'{"a": 1, "a": 2}'""", '{"a": 1, "a": 2}'),
        Golden("json", r"""E'{\n  "a":\t1\r\n}'""", '{   "a":\t1  }'),
        Golden("json", "'12345678901234567890.10e-400'", "12345678901234567890.10e-400"),
        Golden("json", "'1e99999999999999999999'", "1e99999999999999999999"),
        Golden("json", r"""'"\ud83d\udc18 \u00e9 é"'""", r'"\ud83d\udc18 \u00e9 é"'),
        Golden("json", r"""'"\u0000"'""", r'"\u0000"', unescapable=True),
        Golden("json", r"""'["\ud800", "\udc00\ud800"]'""", r'["\ud800", "\udc00\ud800"]', unescapable=True),
        Golden("json", "'null'", "null"),
        Golden("json", "repeat('[', 500) || repeat(']', 500)", "[" * 500 + "]" * 500),
        Golden("jsonb", """'{"b": 1.10,  "a":[1, {}]}'""", '{"a": [1, {}], "b": 1.10}'),
        Golden("jsonb", """'{"a": 1, "a": 2}'""", '{"a": 2}'),
        Golden("jsonb", "'[1e3, 1.00, -0, 12345678901234567890.12345]'", "[1000, 1.00, 0, 12345678901234567890.12345]"),
        Golden("jsonb", r"""'"\ud83d\udc18 \u00e9 \n"'""", r'"🐘 é \n"'),
        Golden("jsonb", "'null'", "null"),
        Golden("jsonb", "repeat('[', 500) || repeat(']', 500)", "[" * 500 + "]" * 500),
        Golden("jsonpath", "'$.a[*] ? (@ > 1)'", r'"$.\"a\"[*]?(@ > 1)"'),
    ],
    "XML": [
        Golden("xml", """'<a b="1">é &amp; <c/></a>'""", r'"<a b=\"1\">é &amp; <c/></a>"', needs="xml"),
        Golden("xml", """'<?xml version="1.0" encoding="UTF-8"?><a/>'""", '"<a/>"', needs="xml"),
    ],
    "Text search": [
        Golden("tsvector", "'fat:2,4C ''it''''s'':1A'", "\"'fat':2,4C 'it''s':1A\""),
        Golden("tsquery", "'fat & !(rat | cat:AB*) <2> dog'", "\"'fat' & !( 'rat' | 'cat':*AB ) <2> 'dog'\""),
    ],
    "Geometry": [
        Golden("point", "'(1.5,-2e300)'", '"(1.5,-2e+300)"'),
        Golden("line", "'{1,-1,0.1}'", '"{1,-1,0.1}"'),
        Golden("lseg", "'[(0,0),(1,1)]'", '"[(0,0),(1,1)]"'),
        Golden("box", "'(0,0),(1,1)'", '"(1,1),(0,0)"'),
        Golden("path", "'[(0,0),(1,1)]'", '"[(0,0),(1,1)]"'),
        Golden("path", "'((0,0),(1,1))'", '"((0,0),(1,1))"'),
        Golden("polygon", "'((0,0),(1,1),(1,0))'", '"((0,0),(1,1),(1,0))"'),
        Golden("circle", "'<(1,2),0.1>'", '"<(1,2),0.1>"'),
    ],
    "Ranges": [
        Golden("int4range", "'(1,5]'", '"[2,6)"'),
        Golden("int4range", "'empty'", '"empty"'),
        Golden("int4range", "'(,)'", '"(,)"'),
        Golden("int8range", "'[1,)'", '"[1,)"'),
        Golden("numrange", "'[1.10,2.20]'", '"[1.10,2.20]"'),
        Golden("daterange", "'[2026-01-01,2026-12-31]'", '"[2026-01-01,2027-01-01)"'),
        Golden("tsrange", "'[2026-01-01 00:00,infinity)'", r'"[\"2026-01-01 00:00:00\",infinity)"'),
        Golden(
            "tstzrange",
            "'(2026-01-01 00:00+05:30,2026-06-01 00:00+05:30]'",
            r'"(\"2025-12-31 18:30:00+00\",\"2026-05-31 18:30:00+00\"]"',
        ),
        Golden("weights", "'[0.1,1e300)'", '"[0.1,1e+300)"'),
        Golden("int4multirange", "'{[1,3),[5,7)}'", '"{[1,3),[5,7)}"'),
        Golden("int8multirange", "'{}'", '"{}"'),
        Golden("nummultirange", "'{[1.10,2.20],(3,)}'", '"{[1.10,2.20],(3,)}"'),
        Golden("datemultirange", "'{[2026-01-01,2026-02-01)}'", '"{[2026-01-01,2026-02-01)}"'),
        Golden(
            "tsmultirange",
            "'{[2026-01-01,2026-02-01)}'",
            r'"{[\"2026-01-01 00:00:00\",\"2026-02-01 00:00:00\")}"',
        ),
        Golden(
            "tstzmultirange",
            "'{[2026-01-01 00:00+05:30,2026-02-01 00:00+05:30)}'",
            r'"{[\"2025-12-31 18:30:00+00\",\"2026-01-31 18:30:00+00\")}"',
        ),
    ],
    "Arrays": [
        Golden("integer[]", "'{}'", "[]"),
        Golden("integer[]", "'{1,NULL,3}'", "[1,null,3]"),
        Golden("integer[]", "'{{1,2},{3,4}}'", "[[1,2],[3,4]]"),
        Golden("integer[]", "'[0:2]={1,2,3}'", "[1,2,3]"),
        Golden("integer[]", "'[-1:0][5:6]={{1,2},{3,4}}'", "[[1,2],[3,4]]"),
        Golden("integer[]", "'{{{{{{1}}}}}}'", "[[[[[[1]]]]]]"),
        Golden(
            "text[]",
            r"""array['a,b', '{}', '"', E'\\', '', 'NULL', null]""",
            r'["a,b","{}","\"","\\","","NULL",null]',
        ),
        Golden("numeric[]", "'{1.10,NaN}'", '[1.10,"NaN"]'),
        Golden("boolean[]", "'{t,f}'", "[true,false]"),
        Golden("bytea[]", r"array['\x00ff'::bytea]", r'["\\x00ff"]'),
        Golden(
            "timestamp with time zone[]",
            "'{2026-11-22 08:01:02+05:30,infinity}'",
            '["2026-11-22T02:31:02+00:00","infinity"]',
        ),
        Golden("interval[]", "'{1 day,1 mon}'", '["1 day","1 mon"]'),
        Golden("json[]", """array['{"a":  1}', 'null', null]::json[]""", '[{"a":  1},null,null]'),
        Golden("int4range[]", """'{"[1,3)",empty}'""", '["[1,3)","empty"]'),
        Golden("int2vector", "'1 2 3'", "[1,2,3]"),
        Golden("oidvector", "'1 2 3'", '["1","2","3"]'),
    ],
    "Types of one's own": [
        Golden("mood", "'sad'", '"sad"'),
        Golden("mood", """'so "so"'""", r'"so \"so\""'),
        Golden("mood[]", "array['it''s 🙂', null]::mood[]", '["it\'s 🙂",null]'),
        Golden("price", "'1.1'", "1.10"),
        Golden("prices", "'{1.1,NULL}'", "[1.10,null]"),
        Golden("document", """'{"a":  1}'""", '{"a":  1}'),
        Golden("whim", "'sad'", '"sad"'),
        Golden("pair", "row(1, 'x')", '{"a":1,"b c":"x"}'),
        Golden("pair", "row(null, null)", '{"a":null,"b c":null}'),
        Golden("proper", "row(1, 'x')::pair", '{"a":1,"b c":"x"}'),
        Golden("shrunk", "row(1, 2)", '{"a":1,"b":2}'),
        Golden('"A person"', "row(1, '2026-11-22')", '{"id":1,"born":"2026-11-22"}'),
        Golden(
            "nest",
            """row(row(1, '"'), array[row(2, null)::pair, null], '2026-11-22 08:01:02+05:30', '{"a":  1}')""",
            r'{"p":{"a":1,"b c":"\""},"ps":[{"a":2,"b c":null},null],'
            r'"at":"2026-11-22T02:31:02+00:00","doc":{"a":  1}}',
        ),
        Golden("pair[]", "array[row(1, 'x')::pair]", '[{"a":1,"b c":"x"}]'),
        Golden(
            "hstore",
            r"""'a=>1, "c d"=>"x\"y", b=>NULL'""",
            r'{"a": "1", "b": null, "c d": "x\"y"}',
            needs="hstore",
        ),
    ],
    "The system's own": [
        Golden("oid", "'4294967295'", '"4294967295"'),
        Golden("regclass", "'pg_catalog.pg_class'", '"pg_class"'),
        Golden("regclass", """'public."A person"'""", r'"public.\"A person\""'),
        Golden("regclass", "'4294967295'", '"4294967295"'),
        Golden("regproc", "'pg_catalog.now'", '"now"'),
        Golden("regprocedure", "'pg_catalog.abs(integer)'", '"abs(integer)"'),
        Golden("regoper", "'pg_catalog.||/'", '"||/"'),
        Golden("regoperator", "'pg_catalog.+(integer,integer)'", '"+(integer,integer)"'),
        Golden("regtype", "'public.mood'", '"public.mood"'),
        Golden("regrole", "'pg_monitor'", '"pg_monitor"'),
        Golden("regnamespace", "'public'", '"public"'),
        Golden("regcollation", """'pg_catalog."C"'""", r'"\"C\""'),
        Golden("regconfig", "'pg_catalog.english'", '"english"'),
        Golden("regdictionary", "'pg_catalog.simple'", '"simple"'),
        Golden("xid", "'4294967295'", '"4294967295"'),
        Golden("xid8", "'18446744073709551615'", '"18446744073709551615"'),
        Golden("cid", "'7'", '"7"'),
        Golden("tid", "'(4294967295,65535)'", '"(4294967295,65535)"'),
        Golden("pg_lsn", "'16/B374D848'", '"16/B374D848"'),
        Golden("pg_snapshot", "'10:20:10,14,15'", '"10:20:10,14,15"'),
        Golden("txid_snapshot", "'10:20:10,14,15'", '"10:20:10,14,15"'),
        Golden("refcursor", "'a cursor'", '"a cursor"'),
        Golden("aclitem", "'pg_monitor=r*/pg_monitor'", '"pg_monitor=r*/pg_monitor"'),
    ],
}

UNWRITABLE = {
    "gtsvector": "a key of a GiST index",
    "pg_brin_bloom_summary": "what a BRIN index keeps",
    "pg_brin_minmax_multi_summary": "what a BRIN index keeps",
    "pg_dependencies": "extended statistics",
    "pg_mcv_list": "extended statistics",
    "pg_ndistinct": "extended statistics",
    "pg_node_tree": "a parsed expression in the catalogue",
}
"""Types of pg_catalog that have no input function: no user can have a value."""

ODD_SETTINGS = """
    set timezone = 'Asia/Kolkata';
    set datestyle = 'SQL, DMY';
    set intervalstyle = 'iso_8601';
    set extra_float_digits = -15;
    set bytea_output = 'escape';
    set search_path = public, pg_temp;
    set synchronous_commit = off;
"""
CONTRACT_SETTINGS = """
    set timezone = 'UTC';
    set datestyle = 'ISO, MDY';
    set intervalstyle = 'postgres';
    set extra_float_digits = 1;
    set bytea_output = 'hex';
    set lc_monetary = 'C';
    set search_path = pg_catalog, pg_temp;
"""
"""What the contract's form of a value depends on. Nothing that is not in a JSON string may differ."""


# -- docs/types.md ----------------------------------------------------------------------------------------------

HEAD = """\
# How values stand in an event

<!-- Generated from tests/integration/test_types.py by `python tests/integration/test_types.py`; do not edit. -->

A value in `key`, `before` or `after` is what PostgreSQL's own `to_json` writes under `TimeZone=UTC`,
`IntervalStyle=postgres`, `DateStyle=ISO`, `bytea_output=hex`, `extra_float_digits=1`, `lc_monetary=C` and an empty
`search_path`, whatever the settings of the session that wrote it. Every row below is tested on every version of
PostgreSQL the tests run on, through the outbox and through a notification.

* Numbers are JSON numbers with every digit; a parser that reads them as doubles loses some. What JSON has no number for
  (`NaN`, the infinities) is a string.
* Two values that look the same in the event are the same to it: an update from one to the other is no event. That is so
  for arrays that differ in their lower bounds only, and for the JSON value `null` and SQL's NULL.
* Line breaks between the tokens of a `json` value are spaces in the event, so that an event is one line.
* `money` is written as under `lc_monetary = C`, in hundredths. Where the database counts in other fractions (yen have
  none), the digits are right and the point is not.
* A type for which somebody has defined a cast to `json`, as `hstore` has one, is written by that cast.
* Some strings PostgreSQL's own JSON functions cannot take apart (¹). They come whole through the outbox; a notification
  of their row, and so an event of an ephemeral table, is a stub with `"truncated": true`.
* A `json` or `jsonb` value may be nested as deeply as PostgreSQL takes it. Many a consumer's parser gives up sooner:
  Python's at about 950 levels (`cdc.event.Event.from_json` does not).
* Bytes that are no characters, as a database in SQL_ASCII takes them and PostgreSQL 14 gives them for a `"char"`, are
  no event: it becomes a dead letter, with the bytes in hex, and the others go on. In a notification it is a stub. So
  it is with a character that another encoding of the database has and UTF-8 has not.
* A row of more than 256 MiB as JSON is reported by its key, with `"truncated": true`. So is an update whose two rows
  together are longer than that.
* Stored generated columns are in the event. Virtual ones (PostgreSQL 18) no trigger sees: they are left out. One that
  is added to a captured table stands as `null` until the next `cdc migrate`, and `cdc check` asks for it; so it does
  always in a row that also holds such a string as under ¹.
"""


def document() -> str:
    """What docs/types.md has to say."""
    parts = [HEAD]
    for section, rows in GOLDEN.items():
        parts.append(f"\n## {section}\n\n| type | written | in the event |\n|---|---|---|\n")
        for row in rows:
            remarks = [f"PostgreSQL {row.since} and later"] if row.since > 14 else []
            if row.needs:
                remarks.append("built with libxml" if row.needs == "xml" else f"extension {row.needs}")
            remark = f" ({', '.join(remarks)})" if remarks else ""
            mark = " ¹" if row.unescapable else ""
            parts.append(f"| {_code(row.type)}{remark} | {_code(row.written)} | {_code(row.event)}{mark} |\n")
    return "".join(parts)


def _code(text: str) -> str:
    """A cell, long ones with their middle left out, and what cannot be seen by its number."""
    length = len(text)
    if length > 90:
        text = f"{text[:24]}…{text[-24:]}"
    text = "".join(c if c.isprintable() or c == "\u0301" else f"⟨U+{ord(c):04X}⟩" for c in text)
    cell = "`" + text.replace("|", "\\|") + "`"
    return f"{cell} ({length} characters)" if length > 90 else cell


def test_the_documentation_is_made_of_this_table() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run python tests/integration/test_types.py"


# -- the laboratory -----------------------------------------------------------------------------------------------


class Lab:
    """A database, a writer with odd settings who hears his own notifications, a reader of the book, and a witness.

    The witness has the settings of the contract, and sees what was written.

    Attributes:
        version: the server's, such as 18.
        lacking: what it has not of what :attr:`Golden.needs` names.
    """

    def __init__(self, server: Server, template: str) -> None:
        self._server = server
        self._name = f"test_{uuid.uuid4().hex[:12]}"
        dsn = server.create_database(self._name, template)
        self.writer, self._witness = psycopg2.connect(dsn), psycopg2.connect(dsn)
        self.writer.autocommit = self._witness.autocommit = True
        self._reader = Connection(dsn, purpose="test")
        self._outbox = Outbox(self._reader, database="shop", sink="test", owner=Owner("test", 1))
        assert self._outbox.claim(start="earliest")
        self._tables = 0
        self._pairs: dict[str, tuple[str, str]] = {}

        self.version = server.version // 10_000
        with self._witness.cursor() as cursor:
            cursor.execute("select array(select name::text from pg_available_extensions)")
            ((available,),) = cursor.fetchall()
            cursor.execute(CONTRACT_SETTINGS)
        self.lacking = {"citext", "hstore"} - set(available)
        for extension in {"citext", "hstore"} - self.lacking:
            self.run(f"create extension {extension}")
        try:
            self.run("select xmlparse(content '')")
        except psycopg2.errors.FeatureNotSupported:
            self.lacking.add("xml")
        self.run(SETUP)
        self.run("listen cdc")
        self.run(ODD_SETTINGS)

    def close(self) -> None:
        """Leave, and drop the database."""
        self.writer.close()
        self._witness.close()
        self._reader.close()
        self._server.drop_database(self._name)

    def run(self, statement: str | sql.Composable, parameters: tuple[object, ...] = ()) -> None:
        """A statement of the writer."""
        with self.writer.cursor() as cursor:
            cursor.execute(statement, parameters or None)

    def seen(self, query: str | sql.Composable, parameters: tuple[object, ...] = ()) -> tuple[Any, ...]:
        """The one row a query has for the witness."""
        with self._witness.cursor() as cursor:
            cursor.execute(query, parameters or None)
            (row,) = cursor.fetchall()
        return row

    def table(self, columns: str, **options: object) -> str:
        """Make a captured table; returns its name."""
        self._tables += 1
        name = f"public.t{self._tables}"
        self.run(f"create table {name} ({columns})")
        self.capture(name, **options)
        return name

    def tables_with(self, type_: str) -> tuple[str, str]:
        """A table with a column v of a type, and an ephemeral one; they are empty between tests."""
        if type_ not in self._pairs:
            columns = f"id integer primary key, v {type_}, other integer, pad text"
            self._pairs[type_] = self.table(columns), self.table(columns, notify="ephemeral")
        return self._pairs[type_]

    def capture(self, table: str, **options: object) -> None:
        """Capture a table, or capture it otherwise."""
        named = "".join(f", {name} => %s" for name in options)
        self.run(f"select cdc.enable_capture(%s::regclass{named})", (table, *options.values()))

    def events(self) -> list[Event]:
        """What came into the book since the last call, as whoever reads the line of a file has it."""
        found: list[Event | Unreadable] = []
        acked: int | None = None
        while batch := self._outbox.next_batch(acked, events=500, bytes_=1 << 24):
            found += batch.events
            acked = batch.last_seq
        events = [event for event in found if isinstance(event, Event)]
        assert len(events) == len(found), "some cannot be read"
        return [Event.from_json(event.to_json()) for event in events]

    def empty(self) -> None:
        """Throw away what the book holds."""
        self.run("truncate cdc.event_0, cdc.event_1, cdc.event_2")

    def heard(self) -> list[str]:
        """The notifications since the last call; one's own have come by the time a statement has ended."""
        self.writer.poll()
        payloads = [note.payload for note in self.writer.notifies]
        self.writer.notifies.clear()
        return payloads

    def told(self) -> list[Event]:
        """The same where the notification is the event, read as :meth:`events` are."""
        return [Event.from_json(Event.from_json(payload).to_json()) for payload in self.heard()]


@pytest.fixture(scope="module")
def laboratory(server: Server, template: str) -> Iterator[Lab]:
    with closing(Lab(server, template)) as made:
        yield made


@pytest.fixture
def lab(laboratory: Lab) -> Lab:
    """One for the whole module; what an earlier test has left behind is gone."""
    laboratory.events()
    laboratory.heard()
    return laboratory


Facts = tuple[str, str | None, str | None, str | None, tuple[str, ...] | None, bool]


def facts(event: Event) -> Facts:
    """All that an event says of a row, as text: op, key, before, after, changed, truncated."""
    key, before, after = (None if image is None else image.raw for image in (event.key, event.before, event.after))
    return event.op.value, key, before, after, event.changed, event.truncated


# -- every type -------------------------------------------------------------------------------------------------

ROWS = [row for rows in GOLDEN.values() for row in rows]


def go_through(lab: Lab, table: str, value: str, pad: str) -> None:
    """A row comes with a value, keeps it, loses it, gets it back, and goes; all of it or nothing."""
    lab.run(f"""
        insert into {table} values (1, {value}, 0, {pad});
        update {table} set other = 1;
        update {table} set v = null;
        update {table} set v = {value};
        delete from {table};
    """)


def what_that_makes(value: str, pad: str) -> list[Facts]:
    key, with_it, without = '{"id":1}', f'{{"v":{value}}}', '{"v":null}'
    first, last = (f'{{"id":1,"v":{value},"other":{other},"pad":{pad}}}' for other in (0, 1))
    gone_and_back: list[Facts] = [
        ("update", key, with_it, without, ("v",), False),
        ("update", key, without, with_it, ("v",), False),
    ]
    return [
        ("insert", key, None, first, None, False),
        ("update", key, '{"other":0}', '{"other":1}', ("other",), False),
        *(gone_and_back if value != "null" else []),  # json's null looks like NULL
        ("delete", key, last, None, None, False),
    ]


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.type} {row.written[:30]}" for row in ROWS])
def test_a_value_stands_in_the_event_as_the_table_says(lab: Lab, row: Golden) -> None:
    if lab.version < row.since:
        pytest.skip(f"PostgreSQL {row.since} and later")
    if row.needs in lab.lacking:
        pytest.skip(f"this server has no {row.needs}")
    value = f"cast({row.written} as {row.type})"
    lab.run(f"drop table if exists sample; create table sample as select {value} as v")
    (said,) = lab.seen("select to_json(v)::text from public.sample")
    assert said.replace("\n", " ").replace("\r", " ") == row.event

    kept, live = lab.tables_with(row.type)
    go_through(lab, kept, value, "null")
    go_through(lab, kept, value, "repeat('x', 5000)")  # beyond 4 kB the trigger itself takes the difference
    wide = f'"{"x" * 5000}"'
    assert [facts(event) for event in lab.events()] == [
        *what_that_makes(row.event, "null"),
        *what_that_makes(row.event, wide),
    ]

    go_through(lab, live, value, "null")
    told = [facts(event) for event in lab.told()]
    if row.unescapable:
        stubs = [(op, None, None, True) for op, *_ in what_that_makes(row.event, "null")]
        assert [(op, before, after, truncated) for op, _, before, after, _, truncated in told] == stubs
    else:
        assert told == what_that_makes(row.event, "null")
    assert lab.events() == []


def test_every_type_a_user_can_have_a_value_of_is_in_the_table(lab: Lab) -> None:
    named = [row.type for row in ROWS if row.since <= lab.version]
    (missing,) = lab.seen(
        "select coalesce(string_agg(t.typname, ', ' order by t.typname), 'none') from pg_type t"
        " where t.typnamespace = 'pg_catalog'::regnamespace and t.typtype in ('b', 'r', 'm')"
        " and not exists (select from pg_type e where e.typarray = t.oid)"
        f" and t.typname <> all (array{list(UNWRITABLE)})"
        " and t.oid <> all (select to_regtype(name)::oid from unnest("
        f"  array[{', '.join('$$' + name + '$$' for name in named)}]) as name where to_regtype(name) is not null)"
    )
    assert missing == "none"


@pytest.mark.parametrize(
    ("type_", "one", "other"),
    [("integer[]", "'{1,2}'", "'[0:1]={1,2}'"), ("json", "'null'", "null"), ("jsonb", "null", "'null'")],
    ids=["bounds of an array", "null of json", "null of jsonb"],
)
def test_what_looks_the_same_is_the_same(lab: Lab, type_: str, one: str, other: str) -> None:
    table = lab.table(f"v {type_}")
    lab.run(f"insert into {table} values ({one})")
    lab.run(f"update {table} set v = {other}")
    assert [event.op for event in lab.events()] == ["insert"]


def test_no_setting_makes_names_be_quoted(lab: Lab) -> None:
    table = lab.table("v regtype")
    lab.run(f"begin; set local quote_all_identifiers = on; insert into {table} values ('public.mood'); commit")
    (event,) = lab.events()
    assert event.after == {"v": "public.mood"}


def test_json_may_be_nested_as_deeply_as_postgresql_takes_it(lab: Lab) -> None:
    table = lab.table("v json")
    lab.run(f"insert into {table} values (cast(repeat('[', 5000) || repeat(']', 5000) as json))")
    (event,) = lab.events()
    assert event.after is not None
    assert event.after.raw == '{"v":' + "[" * 5000 + "]" * 5000 + "}"


# -- columns the database fills in --------------------------------------------------------------------------------


def test_stored_generated_and_identity_columns_are_in_the_event(lab: Lab) -> None:
    table = lab.table(
        "id integer generated always as identity primary key, price numeric,"
        " gross numeric generated always as (price * 1.20) stored, at date default '2026-11-22'"
    )
    lab.run(f"insert into {table} (price) values (1.5)")
    lab.run(f"update {table} set price = 2")
    inserted, updated = lab.events()
    assert inserted.after is not None
    assert inserted.after.raw == '{"id":1,"price":1.5,"gross":1.800,"at":"2026-11-22"}'
    assert (updated.before, updated.after) == (
        {"price": 1.5, "gross": Decimal("1.8")},
        {"price": 2, "gross": Decimal("2.4")},
    )


TWICE = "twice integer generated always as (id * 2) virtual"


@pytest.fixture
def virtual(lab: Lab) -> Lab:
    if lab.version < 18:
        pytest.skip("PostgreSQL 18 and later")
    return lab


@pytest.mark.parametrize("notify", ["adaptive", "ephemeral"])
@pytest.mark.parametrize("pad", ["", "x" * 5000], ids=["narrow", "wide"])
def test_virtual_generated_columns_are_left_out_of_every_event(virtual: Lab, notify: str, pad: str) -> None:
    table = virtual.table(f"id integer primary key, {TWICE}, pad text", notify=notify)
    virtual.run(f"insert into {table} values (1, default, '{pad}')")
    virtual.run(f"update {table} set id = 2")
    virtual.run(f"delete from {table}")
    inserted, updated, deleted = virtual.events() if notify == "adaptive" else virtual.told()
    assert updated.after == {"id": 2}
    assert inserted.after == {"id": 1, "pad": pad}
    assert deleted.before == {"id": 2, "pad": pad}


def test_with_full_images_virtual_columns_are_left_out_too(virtual: Lab) -> None:
    table = virtual.table(f"id integer primary key, {TWICE}", image="full")
    virtual.run(f"insert into {table} values (1)")
    virtual.run(f"update {table} set id = 2")
    _, updated = virtual.events()
    assert (updated.before, updated.after, updated.changed) == ({"id": 1}, {"id": 2}, ("id",))


def test_a_virtual_column_beside_hidden_ones_is_left_out(virtual: Lab) -> None:
    table = virtual.table(
        f"id integer primary key, {TWICE}, secret text, card text", exclude=["secret"], mask='{"card": "redact"}'
    )
    virtual.run(f"insert into {table} values (1, default, 's', 'c')")
    (event,) = virtual.events()
    assert event.after == {"id": 1, "card": "***"}


def test_a_virtual_column_that_comes_later_is_drift_and_left_out_once_migrated(virtual: Lab) -> None:
    table = virtual.table("id integer primary key")
    virtual.run(f"alter table {table} add {TWICE}")
    virtual.run(f"insert into {table} values (1)")
    assert virtual.events()[0].after == {"id": 1, "twice": None}
    assert virtual.seen("select cdc.enable_capture(%s::regclass)", (table,)) == ("changed",)
    virtual.run(f"insert into {table} values (2)")
    assert virtual.events()[0].after == {"id": 2}
    # And a real column that takes its name is shown at once.
    virtual.run(f"alter table {table} drop twice; alter table {table} add twice integer default 7")
    virtual.run(f"insert into {table} values (3)")
    assert virtual.events()[0].after == {"id": 3, "twice": 7}


def test_a_row_that_cannot_be_taken_apart_keeps_its_virtual_columns_as_null(virtual: Lab) -> None:
    table = virtual.table(f"id integer primary key, {TWICE}, doc json")
    virtual.run(f"""insert into {table} values (1, default, '"\\u0000"')""")
    (event,) = virtual.events()
    assert event.after is not None
    assert event.after.raw == r'{"id":1,"twice":null,"doc":"\u0000"}'


def test_a_virtual_column_may_be_a_condition_and_not_a_key(virtual: Lab) -> None:
    table = virtual.table(f"id integer, {TWICE}", conditions='{"insert": "NEW.twice > 2"}')
    virtual.run(f"insert into {table} values (1), (2)")
    assert [event.after for event in virtual.events()] == [{"id": 2}]
    with pytest.raises(
        psycopg2.errors.InvalidParameterValue, match="a virtual generated column, which no trigger sees"
    ):
        virtual.capture(table, key=["twice"])


# -- names --------------------------------------------------------------------------------------------------------

NAMES = {
    "quotes": 'a "b" c',
    "an apostrophe": "it's",
    "a backslash": "a\\b\\",
    "an emoji": "🛒",
    "63 bytes": "n" * 63,
    "63 bytes of 21 characters": "€" * 21,
    "a reserved word": "select",
    "a word of PL/pgSQL": "new",
    "a variable of the trigger": "old_image",
    "a column of the outbox": "seq",
    "a field of the event": "before",
    "leading digits": "1st",
    "digits": "42",
    "capital letters": "Order",
    "white space": "  a\tb\n",
    "control characters": "\x01\x7f\u2028",
    "a dot": "a.b",
    "percent signs": "%s %I %(x)s %",
    "a dollar": "$1 $$",
    "what looks like a member": '":1,"b":{',
    "what looks like the end": '"}',
    "braces": "{}[]",
    "__proto__": "__proto__",
}


@pytest.mark.parametrize("case", NAMES)
def test_any_name_may_be_a_schemas_a_tables_and_a_columns(lab: Lab, case: str) -> None:
    name = NAMES[case]
    other = name[:-1] + "z"
    table = sql.Identifier(name, name).as_string(lab.writer)

    def run(template: str) -> None:
        names = {"schema": name, "table": (name, name), "column": name, "other": other}
        quoted = {word: sql.Identifier(*((n,) if isinstance(n, str) else n)) for word, n in names.items()}
        lab.run(sql.SQL(template).format(**quoted))

    run("create schema {schema}; create table {table} ({column} integer primary key, {other} text)")
    lab.capture(table)
    for read in (lab.events, lab.told):
        run("insert into {table} values (1, 'x')")
        (row,) = lab.seen(f"select to_json(t)::text from {table} t")
        run("update {table} set {other} = repeat('y', 5000)")
        run("update {table} set {column} = 2")
        run("delete from {table}")
        events = read()
        assert {(event.source.schema_name, event.source.table) for event in events} == {(name, name)}
        assert [event.key for event in events] == [{name: 1}, {name: 1}, {name: 2}, {name: 2}]
        inserted, grown, moved, deleted = events
        assert inserted.after is not None
        assert inserted.after.raw == row
        assert (grown.before, grown.after, grown.changed) == ({other: "x"}, {other: "y" * 5000}, (other,))
        assert (moved.before, moved.after, moved.changed) == ({name: 1}, {name: 2}, (name,))
        assert deleted.before == {name: 2, other: "y" * 5000}
        lab.capture(table, notify="ephemeral")


# -- size -----------------------------------------------------------------------------------------------------------

LARGE = {
    "text": ("text", "repeat('x', {n})"),
    "characters of four bytes": ("text", "repeat('🐘', {n} / 4)"),
    "control characters": ("text", "repeat(E'\\u0001', {n})"),
    "bytea": ("bytea", "decode(repeat('00ff', {n} / 2), 'hex')"),
    "json": ("json", "cast('[' || repeat('1.10,', {n} / 5) || '0]' as json)"),
    "jsonb": ("jsonb", "(select jsonb_object_agg(i, repeat('x', 90)) from generate_series(1, {n} / 100) i)"),
    "numbers": ("numeric[]", "array(select 1.10 from generate_series(1, {n} / 4))"),
    "bits": ("bit varying", "cast(repeat('01', {n} / 2) as bit varying)"),
}
"""Of what type, and how n bytes of it are written. As JSON it may be longer: six times as long, at most."""
MOST = 256 * 2**20
"""Bytes of images, as JSON, up to which an event has them; of an update, before what is equal is left out."""


def come_and_go(lab: Lab, kind: str, size: int) -> tuple[str, list[Event], list[Event]]:
    """A row with a large value comes, keeps it, and goes; returns it as JSON, the events, and the notifications."""
    type_, value = LARGE[kind]
    columns = f"id integer primary key, v {type_}, other integer"
    tables = lab.table(columns), lab.table(columns, notify="ephemeral")
    for table in tables:
        lab.run(f"insert into {table} values (1, {value.format(n=size)}, 0)")
        if table == tables[0]:
            (row,) = lab.seen(f"select to_json(t)::text from {table} t")
        lab.run(f"update {table} set other = 1")
        lab.run(f"delete from {table}")
        lab.run(f"drop table {table}")
    return row, lab.events(), lab.told()


def judge(row: str, events: list[Event], told: list[Event]) -> None:
    """Whole in the book as long as nobody chokes on it; its key in a notification, which has 8 kB."""
    key = '{"id":1}'

    def fits(rows: int, fact: Facts) -> Facts:
        return fact if rows * len(row.encode()) <= MOST else only_key(fact[0])

    def only_key(op: str) -> Facts:
        return op, key, None, None, None, True

    inserted = fits(1, ("insert", key, None, row, None, False))
    updated = fits(2, ("update", key, '{"other":0}', '{"other":1}', ("other",), False))
    deleted = fits(1, ("delete", key, row.removesuffix("0}") + "1}", None, None, False))
    assert [facts(event) for event in events] == [inserted, updated, deleted]
    assert [facts(event) for event in told] == [only_key("insert"), updated, only_key("delete")]


@pytest.mark.parametrize("size", [9_000, 1_000_000], ids=["9 kB", "1 MB"])
@pytest.mark.parametrize("kind", LARGE)
def test_a_large_value_arrives_whole_and_a_notification_has_the_key(lab: Lab, kind: str, size: int) -> None:
    judge(*come_and_go(lab, kind, size))


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGE)
def test_a_hundred_megabytes_arrive_whole_or_are_reported_by_their_key(lab: Lab, kind: str) -> None:
    judge(*come_and_go(lab, kind, 100_000_000))
    lab.empty()


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
