"""Formats: what is written, that no digit is lost, and that names never meet."""

from __future__ import annotations

import importlib
import json
import sys
from decimal import Decimal
from typing import Any, get_args

import pytest
from click.testing import CliRunner
from cloudevents.core.bindings import http, kafka
from cloudevents.core.formats.json import JSONFormat
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cdc import config, formats
from cdc.cli import main
from cdc.encoding import Encoder
from cdc.errors import PermanentFailure
from cdc.event import Event, Json, quote
from cdc.formats import encoder
from cdc.options import Binding, Format
from cdc.sinks import option_models
from cdc.sinks.stdout import StdoutOptions

INSERT = ("insert", '{"id":42}', "null", '{"id":42,"total":12.50}', "null")
UPDATE = ("update", '{"id":42}', '{"total":12.50}', '{"total":13}', '["total"]')
MOVE = ("update", '{"id":43}', '{"id":42}', '{"id":43}', '["id"]')
DELETE = ("delete", '{"id":42}', '{"id":42,"total":13}', "null", "null")
READ = ("read", '{"id":42}', "null", '{"id":42,"total":13}', "null")
TRUNCATE = ("truncate", "null", "null", "null", "null")


def event(op: str, key: str, before: str, after: str, changed: str, *, more: str = "", table: str = "orders") -> Event:
    return Event.from_json(
        f'{{"version":1,"id":"shop-7-20261122080102123456","op":"{op}","source":{{"database":"shop",'
        f'"schema":"public","table":{quote(table)},"seq":7,"txid":9,"ts":"2026-11-22T08:01:02.123456Z"}},'
        f'"key":{key},"before":{before},"after":{after},"changed":{changed},"context":null{more}}}'
    )


def exact(text: str) -> Any:
    return json.loads(text, parse_float=Decimal)


def row_of(name: Format, text: str) -> Any:
    """The row as it is after the change, where the format has it."""
    found = exact(text)
    match name:
        case "native" | "debezium" | "cloudevents-binary":
            return found["after"]
        case "cloudevents":
            return found["data"]["after"]
        case "flat":
            return {column: value for column, value in found.items() if not column.startswith("_")}


# -- digits, whatever the format ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", get_args(Format))
@pytest.mark.parametrize("op", ["insert", "update"])
def test_no_format_costs_a_digit(name: Format, op: str) -> None:
    numbers = {
        "n": "12345678901234567890.1230",
        "big": "9223372036854775807",
        "tiny": "1e-400",
        "long": "0." + "123456789" * 100,
    }
    row = '{"id":1,' + ",".join(f'"{column}":{digits}' for column, digits in numbers.items()) + "}"
    text = encoder(name, "http").encode(event(op, '{"id":1}', "null" if op == "insert" else "{}", row, "null"))
    for digits in numbers.values():
        assert digits in text, "as it was written"
    found = row_of(name, text)
    assert [str(found[column]) for column in numbers] == [str(Decimal(digits)) for digits in numbers.values()]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.decimals(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def _written(value: Any) -> str:
    """JSON, decimals as they are."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(name)}:{_written(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",\n".join(map(_written, value)) + "]"
    return json.dumps(value)


@given(row=st.dictionaries(st.text(min_size=1).filter(lambda name: not name.startswith("_")), _JSON, max_size=5))
@pytest.mark.parametrize("name", get_args(Format))
def test_every_row_comes_through_whole_and_on_one_line(name: Format, row: dict[str, Any]) -> None:
    change = event("insert", "null", "null", _written(row), "null")
    text = encoder(name, "http").encode(change)
    assert "\n" not in text
    assert row_of(name, text) == Json(_written(row)).value


@pytest.mark.parametrize("name", get_args(Format))
@pytest.mark.parametrize("change", [INSERT, UPDATE, MOVE, DELETE, READ, TRUNCATE])
def test_an_event_is_the_same_text_on_every_attempt(name: Format, change: tuple[str, ...]) -> None:
    one, other = encoder(name, "http"), encoder(name, "http")
    assert one.encode(event(*change)) == other.encode(event(*change))
    assert one.headers(event(*change)) == other.headers(event(*change))


# -- debezium -----------------------------------------------------------------------------------------------------

SOURCE = (
    '"source":{"version":"VERSION","connector":"postgresql","name":"shop","ts_ms":1795334462123,'
    '"ts_us":1795334462123456,"ts_ns":1795334462123456000,"snapshot":"SNAPSHOT","db":"shop",'
    '"sequence":"[null,\\"7\\"]","schema":"public","table":"orders","txId":9,"lsn":7,"xmin":null,'
    '"id":"shop-7-20261122080102123456","changed":CHANGED,"context":null}'
)
TIMES = '"ts_ms":1795334462123,"ts_us":1795334462123456,"ts_ns":1795334462123456000'


@pytest.mark.parametrize(
    ("change", "op", "before", "after"),
    [
        (INSERT, "c", "null", '{"id":42,"total":12.50}'),
        (UPDATE, "u", '{"id":42,"total":12.50}', '{"id":42,"total":13}'),
        (MOVE, "u", '{"id":42}', '{"id":43}'),
        (DELETE, "d", '{"id":42,"total":13}', "null"),
        (READ, "r", "null", '{"id":42,"total":13}'),
        (TRUNCATE, "t", "null", "null"),
    ],
)
def test_debezium(change: tuple[str, ...], op: str, before: str, after: str) -> None:
    source = SOURCE.replace("CHANGED", change[4]).replace("SNAPSHOT", "true" if op == "r" else "false")
    text = encoder("debezium").encode(event(*change))
    source = source.replace("VERSION", json.loads(text)["source"]["version"])
    assert text == f'{{"before":{before},"after":{after},{source},"op":"{op}",{TIMES},"transaction":null}}'


def test_debezium_has_no_words_for_a_row_that_could_not_be_captured() -> None:
    with pytest.raises(PermanentFailure, match="too large to capture"):
        encoder("debezium").encode(event("update", '{"id":1}', "null", "null", "null", more=',"truncated":true'))


# -- flat ---------------------------------------------------------------------------------------------------------

HEAD = (
    '{"_id":"shop-7-20261122080102123456","_op":"OP","_database":"shop","_schema":"public","_table":"orders","_seq":7,'
    '"_txid":9,"_ts":"2026-11-22T08:01:02.123456Z"'
)


@pytest.mark.parametrize(
    ("change", "rest"),
    [
        (INSERT, ',"id":42,"total":12.50}'),
        (UPDATE, ',"id":42,"total":13}'),
        (MOVE, ',"_old_key":{"id":42},"id":43}'),
        (DELETE, ',"id":42,"total":13}'),
        (READ, ',"id":42,"total":13}'),
        (TRUNCATE, "}"),
    ],
)
def test_flat(change: tuple[str, ...], rest: str) -> None:
    assert encoder("flat").encode(event(*change)) == HEAD.replace("OP", change[0]) + rest


def test_flat_says_what_is_missing() -> None:
    change = event("update", '{"id":42}', "null", "null", "null", more=',"truncated":true')
    assert encoder("flat").encode(change) == HEAD.replace("OP", "update") + ',"_truncated":true,"id":42}'


def test_flat_gives_way_to_no_column() -> None:
    row = '{"_op":1,"__op":2,"_ops":3,"op":4,"_id":5,"_truncated":6,"_old_key":7}'
    found = json.loads(encoder("flat").encode(event("insert", "null", "null", row, "null")))
    assert {
        name: value for name, value in found.items() if isinstance(value, int) and name not in ("_seq", "_txid")
    } == {
        "__op": 1,
        "___op": 2,
        "_ops": 3,
        "op": 4,
        "__id": 5,
        "__truncated": 6,
        "__old_key": 7,
    }


@given(st.sets(st.from_regex(r"_{0,3}(id|op|ts|seq|context|old_key|other)", fullmatch=True)))
def test_flat_names_never_meet(columns: set[str]) -> None:
    row = "{" + ",".join(f'"{column}":true' for column in columns) + "}"
    text = encoder("flat").encode(event("insert", "null", "null", row, "null"))
    names = [name for name, _ in json.loads(text, object_pairs_hook=list)]
    assert len(names) == len(set(names)) == 8 + len(columns)


# -- cloudevents --------------------------------------------------------------------------------------------------


def test_cloudevents() -> None:
    change = event(*UPDATE)
    assert encoder("cloudevents").encode(change) == (
        '{"id": "shop-7-20261122080102123456", "source": "/shop/public/orders", "type": "cdc.update", '
        '"specversion": "1.0", "time": "2026-11-22T08:01:02.123456Z", "datacontenttype": "application/json", '
        '"sequence": "00000000000000000007", "subject": "{\\"id\\":42}", "partitionkey": "{\\"id\\":42}",'
        f'"data":{change.to_json()}}}'
    )


def test_binary_cloudevents_are_the_native_text_with_headers() -> None:
    change = event(*INSERT, table="odd ä")
    over_http, for_kafka = encoder("cloudevents-binary", "http"), encoder("cloudevents-binary", "kafka")
    assert over_http.encode(change) == for_kafka.encode(change) == change.to_json()
    assert over_http.headers(change) == {
        "ce-id": "shop-7-20261122080102123456",
        "ce-source": "/shop/public/odd%2520%25C3%25A4",
        "ce-type": "cdc.insert",
        "ce-specversion": "1.0",
        "ce-time": "2026-11-22T08:01:02.123456Z",
        "ce-sequence": "00000000000000000007",
        "ce-subject": "{%22id%22:42}",
        "ce-partitionkey": "{%22id%22:42}",
    }
    assert for_kafka.headers(change) == {
        "ce_id": "shop-7-20261122080102123456",
        "ce_source": "/shop/public/odd%20%C3%A4",
        "ce_type": "cdc.insert",
        "ce_specversion": "1.0",
        "ce_time": "2026-11-22T08:01:02.123456Z",
        "ce_sequence": "00000000000000000007",
        "ce_subject": '{"id":42}',
        "ce_partitionkey": '{"id":42}',
    }


@pytest.mark.parametrize("binding", get_args(Binding))
@pytest.mark.parametrize("change", [INSERT, UPDATE, MOVE, DELETE, READ, TRUNCATE])
@pytest.mark.parametrize("key", ["ascii", "ä € \U0001f600 %41 ~"])
def test_the_sdk_reads_both_modes_over_both_protocols(binding: Binding, change: tuple[str, ...], key: str) -> None:
    op, had_key, *rest = change
    one = event(op, "null" if had_key == "null" else f'{{"code":{quote(key)}}}', *rest)
    for name in ("cloudevents", "cloudevents-binary"):
        form = encoder(name, binding)
        body, headers = form.encode(one).encode(), {**form.headers(one), "content-type": form.content_type}
        if binding == "http":
            read = http.from_http_event(http.HTTPMessage(headers, body))
        else:
            message = kafka.KafkaMessage({name: value.encode() for name, value in headers.items()}, None, body)
            read = kafka.from_kafka(message, JSONFormat())
        assert read.get_id() == one.id
        assert read.get_type() == f"cdc.{op}"
        assert read.get_source() == "/shop/public/orders"
        assert read.get_time() == one.source.ts
        assert read.get_subject() == (None if one.key is None else one.key.raw)
        assert read.get_extension("partitionkey") == read.get_subject()
        assert read.get_extension("sequence") == f"{one.source.seq:020d}"
        assert Event.from_json(json.dumps(read.get_data(), ensure_ascii=False)).id == one.id


# -- configuration ------------------------------------------------------------------------------------------------


def test_every_format_of_the_configuration_has_an_encoder() -> None:
    for name in get_args(Format):
        assert isinstance(encoder(name, "http"), Encoder)


def test_a_format_that_needs_headers_is_refused_where_there_are_none() -> None:
    with pytest.raises(ValidationError, match=r"for sinks with headers, which this one is not \(write cloudevents\)"):
        StdoutOptions(type="stdout", format="cloudevents-binary")


def test_the_refusal_names_the_place(tmp_path: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        json.dumps(
            {
                "databases": {"shop": {"dsn": "host=127.0.0.1", "tables": {"public.item": {}}}},
                "sinks": {"out": {"type": "stdout", "format": "cloudevents-binary"}},
            }
        )
    )
    with pytest.raises(config.ConfigError, match=r"sinks\.out\.format: a format for sinks with headers"):
        config.load(path, option_models(), {})


def test_a_missing_library_is_a_configuration_error_of_who_uses_the_format(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    path = tmp_path / "config.yaml"
    path.write_text(
        json.dumps(
            {
                "databases": {"shop": {"dsn": "host=127.0.0.1 port=1", "tables": {"public.item": {}}}},
                "sinks": {"out": {"type": "stdout"}, "events": {"type": "stdout", "format": "cloudevents"}},
            }
        )
    )
    done = CliRunner().invoke(main, ["-c", str(path), "run"])
    assert done.exit_code == 78
    assert (
        f"{path}: sinks.events.format: its library is not installed: cloudevents "
        "(pip install 'table-cdc[cloudevents]')" in done.stderr
    )
    assert "sinks.out" not in done.stderr


def test_other_formats_need_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cloudevents"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cloudevents", None)
    monkeypatch.delitem(sys.modules, "cdc.formats.cloudevents", raising=False)
    importlib.reload(formats)
    for name in ("native", "debezium", "flat"):
        assert formats.encoder(name).encode(event(*INSERT))
    with pytest.raises(ImportError):
        formats.encoder("cloudevents")
