"""What the trigger records, read back through the book: every op, exactly, whatever the table holds or goes through."""

from __future__ import annotations

import json
import select
import time
from collections.abc import Callable, Iterator

import psycopg2
import pytest
from psycopg2.extensions import connection as PgConnection  # noqa: N812  # psycopg2 names a class so

from cdc.connection import Connection
from cdc.event import Event, Image
from cdc.outbox import Outbox, Owner, register_sink

Connect = Callable[..., PgConnection]


class Shop:
    """A database with one captured table, and a reader of everything captured."""

    def __init__(self, writer: PgConnection, dsn: str) -> None:
        self.writer = writer
        self._connection = Connection(dsn, purpose="test")
        register_sink(self._connection, "test", start="earliest")
        self._outbox = Outbox(self._connection, database="shop", sink="test", owner=Owner("test", 1))
        assert self._outbox.claim(start="earliest")
        self._acked: int | None = None

    def run(self, statement: str, parameters: tuple[object, ...] = ()) -> None:
        with self.writer.cursor() as cursor:
            cursor.execute(statement, parameters or None)

    def one(self, statement: str, parameters: tuple[object, ...] = ()) -> object:
        with self.writer.cursor() as cursor:
            cursor.execute(statement, parameters or None)
            row = cursor.fetchone()
        return row[0] if row else None

    def capture(self, table: str, **options: object) -> None:
        named = "".join(f", {name} => %s" for name in options)
        self.run(f"select cdc.enable_capture(%s::regclass{named})", (table, *options.values()))

    def events(self) -> list[Event]:
        """Everything since the last call."""
        found: list[Event] = []
        while batch := self._outbox.next_batch(self._acked, events=500, bytes_=1 << 24):
            for event in batch.events:
                assert isinstance(event, Event), event
                # What is delivered can be read again, and says the same.
                assert Event.from_json(event.to_json()) == event
                found.append(event)
            self._acked = batch.last_seq
        self._acked = None
        return found

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def shop(installed: str, connect: Connect) -> Iterator[Shop]:
    shop = Shop(connect(installed), installed)
    yield shop
    shop.close()


@pytest.fixture
def orders(shop: Shop) -> Shop:
    shop.run("create table orders (id int primary key, status text, total numeric, note text)")
    shop.capture("orders")
    return shop


def test_an_insert_carries_the_whole_row(orders: Shop) -> None:
    orders.run("insert into orders values (42, 'new', 1.10, null)")
    (event,) = orders.events()
    assert event.op == "insert"
    assert event.key == {"id": 42}
    assert event.before is None
    assert event.after is not None
    assert event.after.raw == '{"id":42,"status":"new","total":1.10,"note":null}'
    assert event.changed is None
    assert (event.source.schema_name, event.source.table) == ("public", "orders")
    assert event.source.txid > 0


def test_an_update_carries_only_what_changed(orders: Shop) -> None:
    orders.run("insert into orders values (42, 'new', 1.10, null)")
    orders.run("update orders set status = 'paid', total = 1.1")
    _, event = orders.events()
    assert (event.op, event.key, event.changed) == ("update", {"id": 42}, ("status", "total"))
    assert event.before is not None
    assert event.after is not None
    assert event.before.raw == '{"status":"new","total":1.10}'
    assert event.after.raw == '{"status":"paid","total":1.1}'


def test_full_images_carry_whole_rows_and_still_say_what_changed(orders: Shop) -> None:
    orders.capture("orders", image="full")
    orders.run("insert into orders values (42, 'new', 1, null)")
    orders.run("update orders set status = 'paid'")
    _, event = orders.events()
    assert event.before == {"id": 42, "status": "new", "total": 1, "note": None}
    assert event.after == {"id": 42, "status": "paid", "total": 1, "note": None}
    assert event.changed == ("status",)


def test_a_delete_carries_the_row_that_was(orders: Shop) -> None:
    orders.run("insert into orders values (42, 'new', 1, null)")
    orders.run("delete from orders")
    _, event = orders.events()
    assert (event.op, event.key, event.after) == ("delete", {"id": 42}, None)
    assert event.before == {"id": 42, "status": "new", "total": 1, "note": None}


def test_a_truncate_is_one_event_without_images(orders: Shop) -> None:
    orders.run("insert into orders values (42), (43)")
    orders.run("truncate orders")
    event = orders.events()[-1]
    assert (event.op, event.key, event.before, event.after, event.changed) == ("truncate", None, None, None, None)


def test_a_changed_key_shows_the_new_one_and_keeps_the_old_one_in_before(orders: Shop) -> None:
    orders.run("insert into orders values (42, 'new')")
    orders.run("update orders set id = 43")
    _, event = orders.events()
    assert (event.key, event.before, event.after) == ({"id": 43}, {"id": 42}, {"id": 43})


def test_only_the_wanted_ops_are_captured(orders: Shop) -> None:
    orders.capture("orders", ops=["insert", "delete"])
    orders.run("insert into orders values (42)")
    orders.run("update orders set status = 'x'")
    orders.run("delete from orders")
    orders.run("truncate orders")
    assert [event.op for event in orders.events()] == ["insert", "delete"]


def test_an_update_that_changes_nothing_emits_nothing(orders: Shop) -> None:
    orders.run("insert into orders values (42, 'new', 1, repeat('x', 10000))")
    orders.run("update orders set status = status, note = note")
    assert len(orders.events()) == 1


def test_what_is_rolled_back_was_never_there(orders: Shop) -> None:
    orders.run(
        "begin; insert into orders values (1); savepoint s; insert into orders values (2); rollback to s; commit"
    )
    orders.run("begin; insert into orders values (3); rollback")
    assert [event.key for event in orders.events()] == [{"id": 1}]


def test_a_composite_key_keeps_its_order(shop: Shop) -> None:
    shop.run("create table lines (a int, b text, c int, primary key (b, a))")
    shop.capture("lines")
    shop.run("insert into lines values (1, 'x', 2)")
    (event,) = shop.events()
    assert event.key is not None
    assert event.key.raw == '{"b":"x","a":1}'


def test_a_table_without_a_key_has_none_unless_it_is_told(shop: Shop) -> None:
    shop.run("create table log (at int, what text)")
    shop.capture("log")
    shop.run("insert into log values (1, 'x')")
    shop.capture("log", key=["at"])
    shop.run("insert into log values (2, 'y')")
    assert [event.key for event in shop.events()] == [None, {"at": 2}]


NUMBERS = [
    ("numeric(38,20)", "123456789012345678.12345678901234567890", "123456789012345678.12345678901234567890"),
    ("numeric", "12345678901234567890.123", "12345678901234567890.123"),
    ("numeric", "1.10", "1.10"),
    ("numeric", "NaN", '"NaN"'),
    ("bigint", "9223372036854775807", "9223372036854775807"),
    ("float8", "1e-300", "1e-300"),
    ("float8", "Infinity", '"Infinity"'),
    ("float8", "0.30000000000000004", "0.30000000000000004"),
    ("timestamptz", "infinity", '"infinity"'),
    ("timestamptz", "2026-11-22 08:01:02.123456+05:30", '"2026-11-22T02:31:02.123456+00:00"'),
    ("date", "0044-03-15 BC", '"0044-03-15 BC"'),
    ("bytea", "\\x00ff", '"\\\\x00ff"'),
    ("interval", "1 year 2 days 03:04:05", '"1 year 2 days 03:04:05"'),
    ("money", "12.34", '"$12.34"'),
    ("json", '{"a":"\\u0000", "a":1}', '{"a":"\\u0000", "a":1}'),
    ("json", '"\\ud800"', '"\\ud800"'),
    ("json", '{\n "a": 1 }', '{  "a": 1 }'),
    ("text", 'emoji 🐘 " \\ \t', '"emoji 🐘 \\" \\\\ \\t"'),
    ("int[]", "{1,NULL,3}", "[1,null,3]"),
]


@pytest.mark.parametrize(
    ("kind", "value", "expected"), NUMBERS, ids=[f"{kind}-{value[:12]}" for kind, value, _ in NUMBERS]
)
def test_values_arrive_digit_for_digit(shop: Shop, kind: str, value: str, expected: str) -> None:
    # The session's own settings must not leak into the event.
    shop.run("set timezone = 'Asia/Kolkata'; set bytea_output = 'escape'; set intervalstyle = 'iso_8601'")
    shop.run("set extra_float_digits = -5; set datestyle = 'SQL, DMY'")
    shop.run(f"create table v (id int primary key, v {kind}, other int)")
    shop.capture("v")
    shop.run(f"insert into v values (1, cast(%s as {kind}), 1)", (value,))
    shop.run("update v set other = 2")
    shop.run("update v set v = null")
    inserted, _, cleared = shop.events()
    line = inserted.to_json()
    assert f'"after":{{"id":1,"v":{expected},"other":1}}' in line
    assert f'"before":{{"v":{expected}}}' in cleared.to_json()


@pytest.mark.parametrize(
    "text",
    ["x" * 20_000, "é" * 4_000, "🐘" * 2_000, "x" * 5_000_000],
    ids=["20 kB", "4000 two-byte characters", "2000 emoji", "5 MB"],
)
@pytest.mark.parametrize("notify", ["adaptive", "always"])
def test_large_values_never_fail_the_write_and_arrive_whole(orders: Shop, text: str, notify: str) -> None:
    orders.capture("orders", notify=notify)
    orders.run("insert into orders values (1, 'new', 1, %s)", (text,))
    orders.run("update orders set status = 'paid'")
    orders.run("update orders set note = note || '!'")
    orders.run("delete from orders")
    inserted, paid, longer, deleted = orders.events()
    assert inserted.after == {"id": 1, "status": "new", "total": 1, "note": text}
    assert (paid.before, paid.after) == ({"status": "new"}, {"status": "paid"})
    assert (longer.before, longer.after) == ({"note": text}, {"note": text + "!"})
    assert deleted.before == {"id": 1, "status": "paid", "total": 1, "note": text + "!"}
    assert not any(event.truncated for event in (inserted, paid, longer, deleted))


def test_an_unchanged_wide_column_is_not_stored_again(orders: Shop) -> None:
    orders.run("insert into orders values (1, 'new', 1, repeat('x', 1000000))")
    before = orders.one("select pg_total_relation_size('cdc.event_0')")
    orders.run("alter table cdc.event_0 alter column old_row set storage external")
    for status in range(20):
        orders.run("update orders set status = %s", (str(status),))
    after = orders.one("select pg_total_relation_size('cdc.event_0')")
    assert isinstance(before, int)
    assert isinstance(after, int)
    assert after - before < 100_000
    assert len(orders.events()) == 21


def test_a_wide_row_with_characters_json_cannot_unescape_is_stored_whole(shop: Shop) -> None:
    shop.run("create table docs (id int primary key, doc json, note text)")
    shop.capture("docs", notify="always")
    shop.run("""insert into docs values (1, '{"a":"\\u0000"}', repeat('x', 9000))""")
    shop.run("update docs set note = note || 'y'")
    _, event = shop.events()
    assert event.changed == ("note",)
    assert event.key == {"id": 1}


def test_an_update_of_nothing_but_blanks_in_a_wide_json_value_is_an_event_that_says_so(shop: Shop) -> None:
    shop.run("create table heap (doc json, note text)")
    shop.capture("heap")
    shop.run("insert into heap values ('{\"a\": 1}', repeat('x', 9000))")
    shop.run("update heap set doc = '   {\"a\": 1}'")
    _, event = shop.events()
    assert (event.key, event.before, event.after, event.changed) == (None, {}, {}, ())
    assert not event.truncated
    assert event.apply({"doc": {"a": 1}}) == {"doc": {"a": 1}}


def test_a_row_of_nothing_but_nulls(shop: Shop) -> None:
    shop.run("create table empty (a int, b text, c jsonb)")
    shop.capture("empty")
    shop.run("insert into empty values (null, null, null)")
    (event,) = shop.events()
    assert event.after == {"a": None, "b": None, "c": None}


def test_columns_may_come_go_and_be_renamed_while_captured(orders: Shop) -> None:
    orders.run("insert into orders values (1, 'new')")
    orders.run("alter table orders add column colour text default 'red'")
    orders.run("update orders set status = 'paid'")
    orders.run("alter table orders rename column status to state")
    orders.run("update orders set state = 'sent'")
    orders.run("alter table orders drop column note, drop column total")
    orders.run("update orders set colour = 'blue'")
    orders.run("alter table orders alter column state type varchar(10)")
    orders.run("delete from orders")
    _, paid, sent, blue, gone = orders.events()
    assert paid.after == {"status": "paid"}
    assert sent.after == {"state": "sent"}
    assert blue.after == {"colour": "blue"}
    assert gone.before == {"id": 1, "state": "sent", "colour": "blue"}


def test_a_renamed_key_column_is_followed(orders: Shop) -> None:
    orders.run("alter table orders rename column id to number")
    orders.run("insert into orders values (1, 'new')")
    (event,) = orders.events()
    assert event.key == {"number": 1}


def test_a_partitioned_table_is_reported_by_its_own_name(shop: Shop) -> None:
    shop.run("create table m (id int, at int, primary key (id, at)) partition by range (at)")
    shop.run("create table m1 partition of m for values from (0) to (10)")
    shop.capture("m")
    shop.run("create table m2 partition of m for values from (10) to (20)")
    shop.run("insert into m values (1, 5)")
    shop.run("insert into m2 values (2, 15)")
    shop.run("update m set at = 16 where id = 1")
    assert [(e.op, e.source.table, e.key) for e in shop.events()] == [
        ("insert", "m", {"id": 1, "at": 5}),
        ("insert", "m", {"id": 2, "at": 15}),
        ("delete", "m", {"id": 1, "at": 5}),
        ("insert", "m", {"id": 1, "at": 16}),
    ]


def test_the_change_is_recorded_before_what_another_trigger_makes_of_it(orders: Shop) -> None:
    orders.run(
        "create function react() returns trigger language plpgsql as "
        "$$ begin update orders set note = 'seen' where id = new.id; return null; end $$"
    )
    orders.run("create trigger aaa after insert on orders for each row execute function react()")
    orders.run("insert into orders values (1, 'new')")
    assert [event.op for event in orders.events()] == ["insert", "update"]


def test_upserts_copies_and_cascades_are_what_they_do_to_rows(orders: Shop) -> None:
    orders.run("create table items (id int primary key, order_id int references orders on delete cascade)")
    orders.capture("items")
    orders.run("insert into orders values (1, 'new') on conflict (id) do update set status = 'again'")
    orders.run("insert into orders values (1, 'new') on conflict (id) do update set status = 'again'")
    orders.run("insert into orders values (1, 'new') on conflict do nothing")
    orders.run("insert into items values (10, 1)")
    orders.run(
        "with gone as (delete from items where id = 10 returning order_id) update orders set note = 'w' from gone"
    )
    orders.run("insert into items values (11, 1)")
    orders.run("delete from orders")
    assert [(e.source.table, e.op) for e in orders.events()] == [
        ("orders", "insert"),
        ("orders", "update"),
        ("items", "insert"),
        ("items", "delete"),
        ("orders", "update"),
        ("items", "insert"),
        ("orders", "delete"),
        ("items", "delete"),
    ]


@pytest.mark.parametrize(
    ("context", "expected"), [('{"actor": "ann"}', {"actor": "ann"}), ("not json", "not json"), ("", None)]
)
def test_the_applications_context_travels_with_the_event(orders: Shop, context: str, expected: object) -> None:
    orders.capture("orders", notify="always")
    orders.run("begin")
    orders.run("select set_config('cdc.context', %s, true)", (context,))
    orders.run("insert into orders values (1)")
    orders.run("commit")
    orders.run("insert into orders values (2)")
    first, second = orders.events()
    assert (first.context.value if first.context else None) == expected
    assert second.context is None


def test_replicated_writes_are_captured_only_where_asked(orders: Shop) -> None:
    orders.run("set session_replication_role = replica")
    orders.run("insert into orders values (1)")
    orders.run("set session_replication_role = origin")
    orders.capture("orders", always=True)
    orders.run("set session_replication_role = replica")
    orders.run("insert into orders values (2)")
    assert [event.key for event in orders.events()] == [{"id": 2}]


def test_each_row_takes_no_transaction_id_of_its_own(orders: Shop) -> None:
    before = orders.one("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
    orders.run("insert into orders select n, 'new', 1, repeat('x', 5000) from generate_series(1, 1000) n")
    orders.run("update orders set status = 'paid'")
    after = orders.one("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
    assert isinstance(before, int)
    assert isinstance(after, int)
    assert after - before < 20


# -- the writer's rights, and nobody's more -----------------------------------------------------------------------


def test_a_writer_needs_no_right_but_the_one_to_his_table(orders: Shop, installed: str) -> None:
    orders.run("drop role if exists cdc_test_clerk")
    orders.run("create role cdc_test_clerk")
    orders.run("grant insert on orders to cdc_test_clerk")
    try:
        orders.run("set role cdc_test_clerk")
        orders.run("insert into orders values (1)")
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            orders.run("select * from cdc.event_0")
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            orders.run(
                "create temp table mine (a int); create trigger t after insert on mine "
                "for each row execute function cdc.capture('1', 'off', 'cdc', 'diff')"
            )
    finally:
        orders.run("reset role")
        orders.run("drop owned by cdc_test_clerk; drop role cdc_test_clerk")
    assert len(orders.events()) == 1


def test_a_cast_made_by_a_user_runs_with_no_rights_and_cannot_stop_his_write(shop: Shop) -> None:
    shop.run("create type mood as enum ('good', 'bad')")
    shop.run(
        "create function spy(mood) returns json language plpgsql as "
        "$$ begin return to_json(current_user::text || ':' || (select count(*) from cdc.event_0)); end $$"
    )
    shop.run("create cast (mood as json) with function spy(mood)")
    shop.run("create table people (id int primary key, mood mood)")
    shop.capture("people")
    shop.run("insert into people values (1, 'good')")
    (event,) = shop.events()
    # The cast failed for want of a right; the event says which row, and that it is not all.
    assert (event.key, event.after, event.truncated) == ({"id": 1}, None, True)


def test_a_temporary_table_cannot_take_the_outbox_place(orders: Shop) -> None:
    orders.run("create temp table event_0 (like cdc.event); set search_path = pg_temp, public")
    orders.run("insert into public.orders values (1)")
    assert len(orders.events()) == 1
    assert orders.one("select count(*) from pg_temp.event_0") == 0


# -- the bell ---------------------------------------------------------------------------------------------------


class Ear:
    """A session that listens, and a session that pretends to be a sleeping daemon."""

    def __init__(self, connect: Connect, dsn: str) -> None:
        self._session = connect(dsn)
        with self._session.cursor() as cursor:
            cursor.execute("listen cdc")
        self._daemon = connect(dsn)

    def arm(self) -> None:
        with self._daemon.cursor() as cursor:
            cursor.execute("select pg_try_advisory_lock(6513763, 1)")
            assert cursor.fetchone() == (True,)

    def heard(self) -> list[str]:
        """All that was notified until now: up to a mark sent last."""
        with self._session.cursor() as cursor:
            cursor.execute("select pg_notify('cdc', 'mark')")
        payloads: list[str] = []
        deadline = time.monotonic() + 10
        while "mark" not in payloads:
            assert time.monotonic() < deadline
            select.select([self._session], [], [], 0.1)
            self._session.poll()
            payloads += [note.payload for note in self._session.notifies]
            self._session.notifies.clear()
        return [payload for payload in payloads if payload != "mark"]


@pytest.fixture
def ear(installed: str, connect: Connect) -> Ear:
    return Ear(connect, installed)


def test_nobody_rings_while_nobody_sleeps(orders: Shop, ear: Ear) -> None:
    orders.run("insert into orders values (1)")
    assert ear.heard() == []


def test_the_notification_of_a_sleeper_is_the_event_itself(orders: Shop, ear: Ear) -> None:
    ear.arm()
    orders.run("insert into orders values (1, 'new', 1.10, 'é\"')")
    orders.run("select set_config('cdc.context', '{\"a\": 1}', false)")
    orders.run("update orders set status = 'paid'")
    orders.run("update orders set id = 2")
    orders.capture("orders", image="full")
    orders.run("update orders set status = 'sent'")
    orders.run("delete from orders")
    orders.run("truncate orders")
    rung = ear.heard()
    assert rung == [event.to_json() for event in orders.events()]
    assert len(rung) == 6


def test_a_payload_never_reaches_the_limit_at_which_the_write_would_fail(orders: Shop, ear: Ear) -> None:
    ear.arm()
    sizes = [*range(7300, 7900, 7), 8000, 20_000]
    for number, size in enumerate(sizes):
        orders.run("insert into orders values (%s, 'new', 1, %s)", (number, "é" * (size // 2)))
    rung = ear.heard()
    events = orders.events()
    assert len(rung) == len(events) == len(sizes)
    assert max(len(payload.encode()) for payload in rung) < 8000
    whole = [payload for payload in rung if "truncated" not in payload]
    stubs = [json.loads(payload) for payload in rung if "truncated" in payload]
    assert len(max(whole, key=len).encode()) > 7950
    assert stubs
    assert all(s["before"] is None and s["after"] is None and s["key"]["id"] >= 0 for s in stubs)
    assert {Event.from_json(payload).id for payload in rung} == {event.id for event in events}


def test_a_key_too_long_for_a_payload_only_wakes(shop: Shop, ear: Ear) -> None:
    shop.run("create table k (id text primary key)")
    shop.run("alter table k alter column id set storage external")
    shop.run("alter table k drop constraint k_pkey")
    shop.capture("k", key=["id"])
    ear.arm()
    shop.run("insert into k values (repeat('x', 9000))")
    assert ear.heard() == [""]
    (event,) = shop.events()
    assert event.key == {"id": "x" * 9000}


def test_a_transaction_rings_a_few_dozen_times_and_then_says_there_is_more(orders: Shop, ear: Ear) -> None:
    ear.arm()
    orders.run("insert into orders select n from generate_series(1, 10000) n")
    rung = ear.heard()
    assert len(rung) == 32
    assert rung[-1] == ""
    assert all(rung[:-1])


def test_wake_sends_no_data(orders: Shop, ear: Ear) -> None:
    orders.capture("orders", notify="always", notify_payload="wake")
    orders.run("insert into orders values (1, 'secret')")
    assert ear.heard() == [""]


def test_off_never_rings_and_lets_transactions_be_prepared(orders: Shop, ear: Ear) -> None:
    orders.capture("orders", notify="off")
    ear.arm()
    orders.run("insert into orders values (1)")
    assert ear.heard() == []
    assert len(orders.events()) == 1


def test_settings_named_like_ours_with_nonsense_in_them_do_no_harm(orders: Shop, ear: Ear) -> None:
    ear.arm()
    orders.run("select set_config('cdc.rung', 'nonsense', false), set_config('cdc.context', '{', false)")
    orders.run("insert into orders values (1)")
    (event,) = orders.events()
    assert event.context == "{"
    assert ear.heard() == [event.to_json()]


@pytest.mark.slow
def test_a_row_too_large_for_any_reader_is_reported_by_its_key(orders: Shop) -> None:
    orders.run("insert into orders values (1, 'new', 1, repeat('x', 140000000))")
    orders.run("update orders set note = note || 'y'")
    inserted, longer = orders.events()
    assert isinstance(inserted.after, Image)
    assert len(inserted.after["note"]) == 140_000_000
    assert (longer.op, longer.key, longer.before, longer.after, longer.truncated) == (
        "update",
        {"id": 1},
        None,
        None,
        True,
    )
