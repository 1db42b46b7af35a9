"""The consumer kit: from files, requests and messages to events, and from events to rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from cdc.consumer import EventFile, Seen, SignatureError, headers_of, parse, parse_message, parse_webhook, verify
from cdc.event import Event, Op


def line(number: int = 1, op: str = "insert", **images: object) -> str:
    """An event in the native format."""
    if not images and op == "insert":
        images = {"key": {"id": number}, "after": {"id": number, "text": 'a "quoted" } ] text, 日本'}}
    source = {"database": "shop", "schema": "public", "table": "orders", "seq": number, "txid": 1}
    whole: dict[str, object] = {
        "version": 1,
        "id": f"shop-{number}-1",
        "op": op,
        "source": {**source, "ts": "2026-11-22T08:01:02.123456Z"},
        "key": None,
        "before": None,
        "after": None,
        "changed": None,
        "context": None,
    }
    return json.dumps({**whole, **images}, ensure_ascii=False, separators=(",", ":"))


def ids(events: list[Event]) -> list[int]:
    return [event.source.seq for event in events]


# -- bodies -----------------------------------------------------------------------------------------------------

THREE = [line(1), line(2, "truncate"), line(3)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (line(1), [1]),
        (line(1).encode(), [1]),
        (bytearray(line(1).encode()), [1]),
        (memoryview(line(1).encode()), [1]),
        (f"\n  {line(1)}\r\n", [1]),
        (json.dumps(json.loads(line(1)), indent=2), [1]),
        ("\n".join(THREE), [1, 2, 3]),
        ("\n".join(THREE) + "\n", [1, 2, 3]),
        ("[" + ",".join(THREE) + "]", [1, 2, 3]),
        (f"[{line(1)}]", [1]),
        (" [\n" + ",\n".join(THREE) + "\n] ", [1, 2, 3]),
        ("[]", []),
        ("[ ]", []),
        ("", []),
    ],
)
def test_a_body_holds_one_event_or_several(body: Any, expected: list[int]) -> None:
    assert ids(parse(body)) == expected


def test_every_digit_of_a_batch_is_kept() -> None:
    body = line(1).replace('"id":1,', '"id":12345678901234567890.10,')
    for event in parse(f"[{body},{body}]") + parse(f"{body}\n{body}"):
        assert event.after is not None
        assert event.after.raw.startswith('{"id":12345678901234567890.10,')


@pytest.mark.parametrize(
    "body",
    [
        "x",
        "null",
        '"a text"',
        "[",
        "[1]",
        "[{}",
        "]",
        "}{",
        f"[{line(1)}",
        f"[{line(1)} {line(2)}]",
        f"[{line(1)},]",
        f"[,{line(1)}]",
        f"[{line(1)},,{line(2)}]",
        f"{line(1)},{line(2)}",
        f"{line(1)}x",
        f"x{line(1)}",
        f"{line(1)}\n{line(2)[:-1]}",
        f"[[{line(1)}]]",
        '{"op":"insert"}',
        b"\xff",
    ],
)
def test_what_is_no_event_is_a_value_error(body: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  of several kinds
        parse(body)


def test_the_data_of_a_cloudevent_is_read() -> None:
    cloud = f'{{"specversion":"1.0","id":"x","source":"/shop","type":"cdc.insert","data":{line(1)}}}'
    assert ids(parse(cloud)) == [1]
    assert ids(parse(f"[{cloud},{line(2)}]")) == [1, 2]
    native = line(1, key={"id": 1}, after={"specversion": "1.0", "data": {}})
    assert ids(parse(native)) == [1]


@given(st.lists(st.text(), max_size=4))
def test_whatever_stands_in_a_row_a_batch_is_taken_apart_where_it_was_put_together(texts: list[str]) -> None:
    events = [line(number, key={"id": number}, after={"t": text, "j": [{}, text]}) for number, text in enumerate(texts)]
    for body in ("[" + ",".join(events) + "]", "\n".join(events)):
        assert [event.after["t"] for event in parse(body) if event.after] == texts


# -- files ------------------------------------------------------------------------------------------------------


def test_a_file_is_read_to_its_last_whole_line_and_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl"
    file = EventFile(path)
    assert list(file) == []
    path.write_text(line(1) + "\n" + line(2) + "\n" + line(3)[:40])
    assert ids(list(file)) == [1, 2]
    assert ids(list(file)) == []
    # The torn line is cut off, and its event written again.
    path.write_text(line(1) + "\n" + line(2) + "\n" + line(4) + "\n" + line(3) + "\n")
    assert ids(list(file)) == [4, 3]
    assert file.position == path.stat().st_size
    assert ids(list(EventFile(str(path), position=len(line(1).encode()) + 1))) == [2, 4, 3]


def test_an_event_that_was_not_dealt_with_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl"
    path.write_text("".join(line(number) + "\n" for number in (1, 2, 3)))
    file = EventFile(path)
    with pytest.raises(RuntimeError, match="busy"):  # noqa: PT012
        for event in file:
            if event.source.seq == 2:
                raise RuntimeError("busy")
    assert ids(list(file)) == [2, 3]


def test_a_line_that_is_no_event_is_named_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl"
    first = line(1) + "\n"
    path.write_text(first + '{"secret": 4111}\n' + line(3) + "\n")
    file = EventFile(path)
    with pytest.raises(ValueError, match=f"the line at byte {len(first.encode())} is no event") as raised:
        list(file)
    assert "4111" not in str(raised.value)
    assert file.position == len(first.encode())


def test_a_file_that_has_become_shorter_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl"
    path.write_text(line(1) + "\n")
    with pytest.raises(ValueError, match="it has been replaced"):
        list(EventFile(path, position=10_000))


# -- webhooks ---------------------------------------------------------------------------------------------------

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_c29tZSBvdGhlciBzZWNyZXQgb2YgMzIgYnl0ZXM="


def signed(body: str, secret: str = SECRET, age: float = 0, id_: str = "msg_1") -> dict[str, str]:
    at = datetime.now(UTC) - timedelta(seconds=age)
    signature = Webhook(secret).sign(id_, at, body)
    return {"Webhook-Id": id_, "webhook-timestamp": str(int(at.timestamp())), "WEBHOOK-SIGNATURE": signature}


@pytest.mark.parametrize("body", [line(1), "[" + ",".join(THREE) + "]", "\n".join(THREE) + "\n"])
def test_a_signed_request_is_believed(body: str) -> None:
    assert parse_webhook(body.encode(), signed(body), SECRET) == parse(body)
    assert parse_webhook(body, signed(body), [OTHER, SECRET]) == parse(body)
    assert parse_webhook(body) == parse(body)


def test_of_two_signatures_one_is_enough() -> None:
    body = line(1)
    headers = signed(body, OTHER)
    headers["WEBHOOK-SIGNATURE"] += " v1a,AAAA " + signed(body)["WEBHOOK-SIGNATURE"]
    verify(body, headers, SECRET)


@pytest.mark.parametrize(
    "change",
    [
        lambda headers: headers.pop("Webhook-Id"),
        lambda headers: headers.update({"Webhook-Id": "msg_2"}),
        lambda headers: headers.update({"webhook-timestamp": "yesterday"}),
        lambda headers: headers.update({"webhook-timestamp": "1"}),
        lambda headers: headers.update({"WEBHOOK-SIGNATURE": "v1"}),
        lambda headers: headers.update({"WEBHOOK-SIGNATURE": "v1,%%%"}),
        lambda headers: headers.update({"WEBHOOK-SIGNATURE": "v2,AAAA"}),
        lambda headers: headers.update(signed(line(1), OTHER)),
        lambda headers: headers.update(signed(line(1), age=400)),
        lambda headers: headers.update(signed(line(1), age=-400)),
        lambda headers: headers.update(signed(line(2))),
        lambda headers: headers.clear(),
    ],
)
def test_any_other_request_is_not(change: Callable[[dict[str, str]], object]) -> None:
    headers = signed(line(1))
    change(headers)
    with pytest.raises(SignatureError):
        parse_webhook(line(1), headers, SECRET)


def test_without_headers_or_secrets_nothing_is_believed() -> None:
    with pytest.raises(SignatureError):
        parse_webhook(line(1), secret=SECRET)
    with pytest.raises(SignatureError):
        parse_webhook(line(1), signed(line(1)), [])


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_%", "ü"])
def test_what_is_no_secret_is_said_and_not_shown(secret: str) -> None:
    with pytest.raises(ValueError, match=r"^not a secret of Standard Webhooks \(whsec_ and Base64\)$") as raised:
        verify(line(1), signed(line(1)), secret)
    assert not isinstance(raised.value, SignatureError)


def test_a_missing_library_is_named_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "standardwebhooks", None)
    with pytest.raises(ImportError, match=r"pip install 'table-cdc\[webhook\]'"):
        verify(line(1), {}, SECRET)
    assert ids(parse_webhook(line(1))) == [1]


# -- messages ---------------------------------------------------------------------------------------------------


class Confluent:
    """confluent-kafka: methods."""

    def __init__(self, value: bytes | None) -> None:
        self._value = value

    def value(self) -> bytes | None:
        return self._value

    def headers(self) -> list[tuple[str, bytes]] | None:
        return [("cdc-id", b"shop-1-1"), ("content-type", b"application/json")]

    def error(self) -> None:
        return None


class ConsumerRecord(NamedTuple):
    """kafka-python, aiokafka: a named tuple."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


@dataclass
class Msg:
    """nats-py."""

    subject: str
    data: bytes
    headers: dict[str, str] | None = None


@dataclass
class IncomingMessage:
    """aio-pika."""

    body: bytes
    headers: dict[str, Any] = field(default_factory=dict)


BODY = line(1).encode()
PAHO = SimpleNamespace(payload=BODY, topic="t", properties=SimpleNamespace(UserProperty=[("id", "shop-1-1")]))


@pytest.mark.parametrize(
    ("message", "headers"),
    [
        (Confluent(BODY), {"cdc-id": "shop-1-1", "content-type": "application/json"}),
        (ConsumerRecord("orders", b"k", BODY, [("cdc-id", b"shop-1-1")]), {"cdc-id": "shop-1-1"}),
        (Msg("orders", BODY, {"Nats-Msg-Id": "shop-1-1"}), {"Nats-Msg-Id": "shop-1-1"}),
        (Msg("orders", BODY), {}),
        (IncomingMessage(BODY, {"id": "shop-1-1", "n": 1}), {"id": "shop-1-1", "n": "1"}),
        (PAHO, {"id": "shop-1-1"}),
        ((SimpleNamespace(delivery_tag=1), SimpleNamespace(headers={"id": "x"}), BODY), {"id": "x"}),
        ((b"1-0", {b"id": b"shop-1-1", b"op": b"insert", b"event": BODY}), {"id": "shop-1-1", "op": "insert"}),
        (("1-0", {"id": "shop-1-1", "event": line(1)}), {"id": "shop-1-1"}),
        ({b"event": BODY}, {}),
        (BODY, {}),
        (line(1), {}),
    ],
)
def test_a_message_of_any_client_is_read(message: object, headers: dict[str, str]) -> None:
    assert ids(parse_message(message)) == [1]
    assert headers_of(message) == headers


def test_a_message_of_a_redis_channel_is_read_and_confirmations_are_not() -> None:
    message = {"type": "message", "pattern": None, "channel": b"orders", "data": BODY}
    assert ids(parse_message(message)) == [1]
    assert parse_message({**message, "type": b"subscribe", "data": 1}) == []


def test_a_tombstone_is_no_event() -> None:
    assert parse_message(Confluent(None)) == []
    assert parse_message(ConsumerRecord("orders", b"k", None, [])) == []


@pytest.mark.parametrize("message", [object(), 5, None, SimpleNamespace(value={"op": "insert"}), ("a", "b")])
def test_what_is_no_message_is_a_type_error(message: object) -> None:
    with pytest.raises(TypeError):
        parse_message(message)


# -- once -------------------------------------------------------------------------------------------------------


def test_what_was_dealt_with_is_not_new_again() -> None:
    seen = Seen()
    events = [Event.from_json(line(number)) for number in (1, 2, 1, 3, 2)]
    assert ids(list(seen.new(events))) == [1, 2, 3]
    assert events[0] in seen
    assert ids(list(seen.new(events))) == []


def test_what_failed_is_new_when_it_comes_again() -> None:
    seen = Seen()
    events = [Event.from_json(line(number)) for number in (1, 2, 3)]
    with pytest.raises(RuntimeError, match="busy"):  # noqa: PT012
        for event in seen.new(events):
            if event.source.seq == 2:
                raise RuntimeError("busy")
    assert ids(list(seen.new(events))) == [2, 3]


def test_only_the_last_ids_are_remembered() -> None:
    seen = Seen(2)
    one, two, three = (Event.from_json(line(number)) for number in (1, 2, 3))
    for event in (one, two, one, three):
        seen.add(event)
    assert [event in seen for event in (one, two, three)] == [True, False, True]


# -- rows -------------------------------------------------------------------------------------------------------


def change(number: int, op: str, **images: object) -> Event:
    return Event.from_json(line(number, op, **images))


def test_a_change_is_applied_to_a_row() -> None:
    row = {"id": 1, "status": "new", "amount": Decimal("1.10")}
    assert change(1, "insert", key={"id": 1}, after=json.loads('{"id": 1, "status": "new"}')).apply(None) == {
        "id": 1,
        "status": "new",
    }
    paid = change(2, "update", key={"id": 1}, before={"status": "new"}, after={"status": "paid"}, changed=["status"])
    assert paid.apply(row) == {**row, "status": "paid"}
    assert row["status"] == "new"
    assert paid.apply(None) == {"id": 1, "status": "paid"}
    full = change(3, "update", key={"id": 1}, before=row_json(), after={"id": 1, "status": "paid"}, changed=["status"])
    assert full.apply({**row, "dropped since": 1}) == {"id": 1, "status": "paid"}
    assert change(4, "delete", key={"id": 1}, before={"id": 1}).apply(row) is None
    assert change(5, "truncate").apply(row) is None
    assert change(6, "read", key={"id": 1}, after={"id": 1}).apply(row) == {"id": 1}
    with pytest.raises(ValueError, match="truncated"):
        change(7, "update", key={"id": 1}, truncated=True).apply(row)


def row_json() -> dict[str, object]:
    return {"id": 1, "status": "new"}


def test_a_key_is_what_a_row_is_looked_up_by() -> None:
    def of(key: object, **images: object) -> Event:
        return change(1, "update", key=key, after={"x": 1}, changed=["x"], **{"before": {"x": 0}, **images})

    assert of({"id": 7}).identity == 7
    assert of({"a": 1, "b": "x"}).identity == (1, "x")
    assert of({"a": [1, [2]], "b": {"c": [3]}}).identity == ((1, (2,)), (("c", (3,)),))
    assert of(None).identity is None
    moved = of({"a": 1, "b": 2}, before={"b": 1})
    assert (moved.former_identity, moved.identity) == ((1, 1), (1, 2))
    assert of({"a": 1}, before=None).former_identity == 1


def test_changes_are_applied_to_a_table() -> None:
    table: dict[Any, dict[str, Any]] = {}
    for event in (
        change(1, "insert", key={"id": 1}, after={"id": 1, "v": "a"}),
        change(2, "read", key={"id": 2}, after={"id": 2, "v": "b"}),
        change(3, "update", key={"id": 1}, before={"v": "a"}, after={"v": "c"}, changed=["v"]),
        change(4, "update", key={"id": 3}, before={"id": 2}, after={"id": 3}, changed=["id"]),
    ):
        event.apply_to(table)
    assert table == {1: {"id": 1, "v": "c"}, 3: {"id": 3, "v": "b"}}
    change(5, "delete", key={"id": 1}, before={"id": 1, "v": "c"}).apply_to(table)
    change(6, "delete", key={"id": 3}, truncated=True).apply_to(table)
    assert table == {}
    change(7, "insert", key={"id": 1}, after={"id": 1}).apply_to(table)
    change(8, "truncate").apply_to(table)
    assert table == {}


@pytest.mark.parametrize("images", [{"key": None, "after": {"v": 1}}, {"key": {"id": 1}, "truncated": True}])
def test_what_cannot_be_applied_changes_nothing(images: dict[str, object]) -> None:
    table = {1: {"id": 1, "v": 0}}
    with pytest.raises(ValueError):  # noqa: PT011  of two kinds
        change(1, "insert", **images).apply_to(table)
    assert table == {1: {"id": 1, "v": 0}}


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "move", "delete", "truncate"]), st.integers(1, 3), st.integers(1, 3)),
    min_size=1,
    max_size=12,
)


def history(steps: list[tuple[str, int, int]], *, full: bool, moves: bool) -> tuple[list[Event], dict[int, Any]]:
    """What is done to a table of three keys, as events, and what it holds in the end."""
    table: dict[int, dict[str, Any]] = {}
    events: list[Event] = []

    def add(op: Op, key: int, was: Mapping[str, Any] | None, row: Mapping[str, Any] | None) -> None:
        images: dict[str, Any] = {"key": {"id": key}, "before": was, "after": row}
        if op is Op.UPDATE and was is not None and row is not None:
            images["changed"] = [name for name in row if was[name] != row[name]]
            if not full:
                for side in ("before", "after"):
                    images[side] = {name: images[side][name] for name in images["changed"]}
        events.append(change(len(events) + 1, op.value, **images))

    for what, key, other in steps:
        n = len(events)
        if what == "truncate":
            table.clear()
            events.append(change(n + 1, "truncate"))
        elif key not in table:
            table[key] = {"id": key, "a": n, "b": n, "c": -n}
            add(Op.INSERT, key, None, table[key])
        elif what == "delete":
            add(Op.DELETE, key, table.pop(key), None)
        elif what == "move" and moves and other not in table:
            was = table.pop(key)
            table[other] = {**was, "id": other, "a": n}
            add(Op.UPDATE, other, was, table[other])
        else:
            was = table[key]
            table[key] = {**was, "ab"[other % 2]: n}
            add(Op.UPDATE, key, was, table[key])
    return events, table


@pytest.mark.parametrize(("full", "moves"), [(True, True), (False, False)])
@given(steps=STEPS, back=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=3))
def test_what_comes_again_does_no_harm(
    full: bool, moves: bool, steps: list[tuple[str, int, int]], back: list[tuple[int, int]]
) -> None:
    events, expected = history(steps, full=full, moves=moves)
    table: dict[Any, Any] = {}
    for event in with_returns(events, back):
        event.apply_to(table)
    assert table == expected


@given(steps=STEPS, back=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=3))
def test_what_comes_again_and_was_seen_does_no_harm_at_all(
    steps: list[tuple[str, int, int]], back: list[tuple[int, int]]
) -> None:
    events, expected = history(steps, full=False, moves=True)
    table: dict[Any, Any] = {}
    for event in Seen().new(with_returns(events, back)):
        event.apply_to(table)
    assert table == expected


def with_returns(events: list[Event], back: list[tuple[int, int]]) -> list[Event]:
    """The events, as they come when a daemon dies here and there and the next begins further back."""
    delivered: list[Event] = []
    position = 0
    for far, to in back:
        end = min(len(events), position + far)
        delivered += events[position:end]
        position = max(0, end - to)
    return delivered + events[position:]


def test_bytes_are_read_as_utf_8() -> None:
    assert Event.from_json(line(1).encode()) == Event.from_json(line(1))
    with pytest.raises(ValueError, match="utf-8"):
        Event.from_json(b"\xff")
