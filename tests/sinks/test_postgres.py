"""The postgres sink: what the target's tables hold after each kind of change, and what is said when they cannot.

Changes are made in a captured database and read from its book as a pipeline reads it, page by page; so the sink is told
where in the book it is, and can be handed the same page again. That daemons which die deliver exactly once is shown in
tests/faults/test_exactly_once.py, and how values of every type arrive in tests/integration/test_mirrored_types.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import until
from psycopg2.extensions import connection, make_dsn, parse_dsn
from pydantic import SecretStr, ValidationError
from sql import fetch, value

from cdc.connection import Connection
from cdc.errors import Fenced, PartialFailure, PermanentFailure, SinkDisabled, TransientFailure
from cdc.event import Event, Op
from cdc.outbox import Outbox, Owner
from cdc.sinks import postgres as module
from cdc.sinks.base import Page
from cdc.sinks.postgres import PostgresOptions, PostgresSink

SECRET = "what-stands-in-a-row"


class Pair:
    """A captured database, one beside it, and what the sink is given in between.

    Attributes:
        source, target: sessions, in autocommit.
        dsn: of the target.
    """

    def __init__(self, source: str, target: str, connect: Callable[..., connection]) -> None:
        self.dsn = target
        self.source, self.target = connect(source), connect(target)
        self._reader = Connection(source, purpose="test")
        self._outbox = Outbox(self._reader, database="shop", sink="mirror", owner=Owner("test", 1))
        self._acked: int | None = None
        self._sinks: list[PostgresSink] = []

    def both(self, statement: str) -> None:
        """Make something on both sides."""
        fetch(self.source, statement)
        fetch(self.target, statement)

    def capture(self, *tables: str, image: str = "diff", key: list[str] | None = None) -> None:
        """Capture tables."""
        for table in tables:
            fetch(self.source, "select cdc.enable_capture(%s::regclass, image => %s, key => %s)", (table, image, key))

    def run(self, statement: str) -> None:
        """Change something in the source, in one transaction."""
        fetch(self.source, statement)

    def sink(self, **options: object) -> PostgresSink:
        """A sink of this target, told where the book is open, and opened."""
        made = PostgresSink("mirror", PostgresOptions(type="postgres", dsn=SecretStr(self.dsn), **options))  # type: ignore[arg-type]
        self._sinks.append(made)
        self.claim(made)
        return made

    def claim(self, sink: PostgresSink) -> None:
        """Become the owner at the source, and open the sink, as a pipeline does."""
        assert self._outbox.claim(start="earliest")
        self._acked = None
        sink.begin(self._page())
        sink.open()

    def page(self, sink: PostgresSink, events: int = 500) -> list[Event]:
        """The next page; the one before it counts as delivered."""
        batch = self._outbox.next_batch(self._acked, events=events, bytes_=1 << 24)
        if batch is None:
            self._acked = None
            return []
        self._acked = batch.last_seq
        sink.begin(self._page())
        return [event for event in batch.events if isinstance(event, Event)]

    def deliver(self, sink: PostgresSink, events: int = 500) -> int:
        """Deliver everything; returns how many events."""
        count = 0
        while page := self.page(sink, events):
            sink.deliver(page)
            count += len(page)
        return count

    def is_mirror(self, *tables: str) -> bool:
        """Whether tables have the same rows on both sides, as text."""
        query = "select coalesce(array_agg(t::text order by t::text), '{{}}') from {} t"
        return all(fetch(self.source, query.format(t)) == fetch(self.target, query.format(t)) for t in tables)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """What the target has."""
        return fetch(self.target, query)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._reader.close()

    def _page(self) -> Page:
        return Page("shop", *self._outbox.window())


@pytest.fixture
def pair(installed: str, database: str, connect: Callable[..., connection]) -> Iterator[Pair]:
    made = Pair(installed, database, connect)
    yield made
    made.close()


ITEM = "create table item (id integer primary key, name text, amount numeric, note text default 'none')"


def failures(sink: PostgresSink, batch: Sequence[Event]) -> dict[int, TransientFailure | PermanentFailure]:
    """What a sink says of a batch that it takes in part."""
    with pytest.raises(PartialFailure) as raised:
        sink.deliver(batch)
    return raised.value.failures


# -- a mirror -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("events", [1, 3, 500])
@pytest.mark.parametrize("image", ["diff", "full"])
def test_tables_follow_inserts_updates_deletes_and_truncates(pair: Pair, image: str, events: int) -> None:
    pair.both(ITEM)
    pair.capture("item", image=image)
    sink = pair.sink()
    for statement in (
        "insert into item select g, 'n' || g, g / 3.0 from generate_series(1, 30) g",
        "update item set amount = amount + 1 where id <= 20; update item set note = null where id % 2 = 0",
        "delete from item where id > 25; insert into item values (26, 'again'); delete from item where id = 26",
        "delete from item where id = 1; insert into item (id, name) values (1, 'a'); update item set amount = 7",
        "insert into item values (9, 'x') on conflict (id) do update set name = 'y'; update item set name = null",
        "truncate item; insert into item values (1, 'after')",
    ):
        pair.run(statement)
        assert pair.deliver(sink, events) > 0
        assert pair.is_mirror("item")


@pytest.mark.parametrize("events", [1, 4, 500])
@pytest.mark.parametrize("image", ["diff", "full"])
def test_a_key_that_changes_takes_its_row_along(pair: Pair, image: str, events: int) -> None:
    pair.both(ITEM)
    pair.both("create table twofold (a text, b integer, v text, primary key (b, a))")
    pair.capture("item", "twofold", image=image)
    sink = pair.sink()
    for statement in (
        "insert into item select g, 'n' || g from generate_series(1, 5) g; insert into twofold values ('x', 1, 'v')",
        "update item set id = 10 where id = 1",
        "update item set id = 11, name = 'moved', amount = 2 where id = 10; update item set note = 'z' where id = 11",
        "update item set id = 0 where id = 2; update item set id = 2 where id = 3; update item set id = 3 where id = 0",
        "insert into item values (20, 'new'); update item set id = 21 where id = 20; delete from item where id = 21",
        "delete from item where id = 5; update item set id = 5 where id = 4; insert into item values (4, 'four')",
        "update twofold set a = 'y'; update twofold set a = 'z', b = 2; update twofold set v = 'w'",
    ):
        pair.run(statement)
        pair.deliver(sink, events)
        assert pair.is_mirror("item", "twofold")


def test_an_update_of_keys_in_one_statement_is_followed(pair: Pair) -> None:
    pair.both("create table item (id integer primary key deferrable, v text)")
    pair.run("alter table item add unique (id)")
    fetch(pair.target, "alter table item drop constraint item_pkey; alter table item add primary key (id)")
    pair.run("alter table item drop constraint item_id_key")
    pair.capture("item")
    sink = pair.sink()
    pair.run("insert into item values (1, 'a'), (2, 'b'), (3, 'c')")
    pair.deliver(sink)
    pair.run("update item set id = id + 10")
    pair.deliver(sink)
    assert pair.is_mirror("item")


def test_keys_that_differ_as_text_and_are_equal_are_one_row(pair: Pair) -> None:
    pair.both("create table item (id numeric primary key, v text)")
    pair.capture("item")
    sink = pair.sink()
    pair.run("insert into item values (1.0, 'a')")
    pair.deliver(sink)
    for statement in (
        "update item set id = 1.00",
        "delete from item; insert into item values (1.000, 'b')",
        "update item set id = 1.0, v = 'c'; update item set v = 'd'",
    ):
        pair.run(statement)
        pair.deliver(sink)
        assert pair.is_mirror("item")


def test_generated_and_identity_columns_are_the_sources(pair: Pair) -> None:
    columns = "v integer, twice integer generated always as (v * 2) stored"
    for kind, on in (("always", "by default"), ("by default", "always"), ("always", "always")):
        table = f"{kind}_{on}".replace(" ", "_")
        fetch(pair.source, f"create table {table} (id integer generated {kind} as identity primary key, {columns})")
        fetch(pair.target, f"create table {table} (id integer generated {on} as identity primary key, {columns})")
        pair.capture(table)
        sink = pair.sink()
        pair.run(f"insert into {table} (v) values (1), (2), (3)")
        pair.run(f"delete from {table} where id = 1; update {table} set v = v + 1; insert into {table} (v) values (4)")
        pair.deliver(sink, 2)
        assert pair.is_mirror(table)


def test_an_identity_that_is_no_key_is_the_sources_even_of_a_row_made_anew(pair: Pair) -> None:
    pair.both("create table item (id integer primary key, n integer generated always as identity, v text)")
    pair.capture("item", image="full")
    sink = pair.sink()
    pair.run("insert into item values (1, default, 'a')")
    pair.run("update item set v = 'b'; delete from item; insert into item values (1, default, 'c')")
    pair.deliver(sink)
    assert pair.is_mirror("item")
    assert pair.rows("select n from item") == [(2,)]


@pytest.mark.parametrize("image", ["diff", "full"])
def test_a_key_may_change_beside_an_identity_that_never_does(pair: Pair, image: str) -> None:
    identity = "n integer generated always as identity"
    pair.both(f"create table item (id integer primary key, {identity}, v text)")
    pair.both(f"create table twofold (id integer, {identity}, v text, primary key (id, n))")
    pair.capture("item", "twofold", image=image)
    sink = pair.sink()
    pair.run("insert into item values (1, default, 'a'); insert into twofold values (1, default, 'a')")
    pair.deliver(sink)
    pair.run("update item set id = 2; update twofold set id = 2; update item set v = 'b'; update twofold set v = 'b'")
    pair.deliver(sink, 1)
    assert pair.is_mirror("item", "twofold")


def test_an_identity_keeps_the_value_its_row_was_made_with(pair: Pair) -> None:
    pair.both("create table item (id integer primary key, n integer generated always as identity, v text)")
    pair.capture("item")
    sink = pair.sink()
    pair.run("insert into item values (1, default, 'a'), (2, default, 'a')")
    pair.deliver(sink)
    pair.run("update item set n = default; update item set n = default, v = 'b'")
    pair.run("update item set id = 3, n = default where id = 2")
    pair.deliver(sink, 1)
    assert pair.rows("select * from item order by id") == [(1, 1, "b"), (3, 2, "b")]


def test_a_key_that_only_the_target_lets_nobody_change_is_told_of_with_the_cure(pair: Pair) -> None:
    for conn, kind in ((pair.source, "by default"), (pair.target, "always")):
        fetch(conn, f"create table item (id integer generated {kind} as identity primary key, v text)")
    pair.capture("item")
    sink = pair.sink()
    pair.run("insert into item (v) values ('a')")
    pair.deliver(sink)
    pair.run("update item set id = 5")
    page = pair.page(sink)
    assert refused(sink, page) == (
        'the target: column "id" can only be updated to DEFAULT (let it be generated by default in the target)'
    )
    fetch(pair.target, "alter table item alter id set generated by default")
    sink.deliver(page)
    assert pair.is_mirror("item")


@pytest.mark.parametrize("name", ['a "b" %s', "100%", "n\u00f6te", "x" * 63, "select", "Per Cent %% (%(a)s)"])
def test_names_of_all_kinds(pair: Pair, name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    for conn in (pair.source, pair.target):
        fetch(conn, f"create schema {quoted}; create table {quoted}.{quoted} ({quoted} integer primary key, v text)")
    pair.capture(f"{quoted}.{quoted}")
    sink = pair.sink()
    pair.run(f"insert into {quoted}.{quoted} values (1, '%s'), (2, '100%%'), (3, 'x')")
    pair.deliver(sink)
    pair.run(
        f"update {quoted}.{quoted} set {quoted} = 4 where {quoted} = 3; delete from {quoted}.{quoted} where v = 'x'"
    )
    pair.run(f"update {quoted}.{quoted} set v = 'y' where {quoted} = 1")
    pair.deliver(sink)
    assert pair.is_mirror(f"{quoted}.{quoted}")
    pair.run(f"truncate {quoted}.{quoted}")
    pair.deliver(sink)
    assert pair.is_mirror(f"{quoted}.{quoted}")


def test_a_partitioned_table_is_mirrored_by_its_root(pair: Pair) -> None:
    pair.both("create table item (id integer, day date, v text, primary key (id, day)) partition by range (day)")
    pair.both("create table item_1 partition of item for values from ('2026-01-01') to ('2026-07-01')")
    pair.both("create table item_2 partition of item for values from ('2026-07-01') to ('2027-01-01')")
    pair.capture("item")
    sink = pair.sink()
    pair.run("insert into item values (1, '2026-02-01', 'a'), (2, '2026-08-01', 'b')")
    pair.run("update item set day = '2026-09-01' where id = 1; delete from item where id = 2")
    pair.deliver(sink)
    assert pair.is_mirror("item", "item_1", "item_2")


def test_the_target_table_may_be_another(pair: Pair) -> None:
    pair.run(ITEM)
    fetch(
        pair.target,
        f"create schema shop_replica; set search_path = shop_replica; {ITEM}; alter table item rename to item_copy",
    )
    pair.capture("item")
    sink = pair.sink(table="{database}_replica.{table}_copy")
    pair.run("insert into item values (1, 'a')")
    pair.deliver(sink)
    assert pair.rows("select id, name from shop_replica.item_copy") == [(1, "a")]


def test_rows_without_a_key_are_appended_and_cannot_be_changed(pair: Pair) -> None:
    pair.both("create table log (at integer, v text); create table nothing ()")
    pair.capture("log", "nothing")
    sink = pair.sink()
    pair.run("insert into log values (1, 'a'), (1, 'a'); insert into nothing default values")
    pair.run("insert into nothing default values")
    pair.deliver(sink)
    assert pair.is_mirror("log", "nothing")
    pair.run("update log set v = 'b' where ctid = '(0,1)'; insert into log values (2, 'c')")
    told = failures(sink, pair.page(sink))
    assert list(told) == [0, 1]
    assert isinstance(told[0], PermanentFailure)
    assert "no row of public.log can be found without a key (name one by key: in the table's capture)" in str(told[0])
    assert isinstance(told[1], TransientFailure), "what comes after it in that table waits"


def test_columns_that_only_the_target_has_are_left_alone(pair: Pair) -> None:
    pair.both("create table item (id integer primary key, v text)")
    fetch(pair.target, "alter table item add extra text default 'dear'")
    pair.capture("item", image="full")
    sink = pair.sink()
    pair.run("insert into item values (1, 'a')")
    pair.deliver(sink)
    fetch(pair.target, "update item set extra = 'kept'")
    pair.run("update item set v = 'b'")
    pair.deliver(sink)
    assert pair.rows("select * from item") == [(1, "b", "kept")]


# -- foreign keys, unique values, triggers -----------------------------------------------------------------------------

DEFERRED = "deferrable initially deferred"
FAMILY = f"""
    create table parent (id integer primary key, name text unique);
    create table child (id integer primary key, parent integer references parent {DEFERRED},
                        up integer references child on delete cascade);
"""


WHEN_CHECKED = pytest.mark.parametrize("checked", ["", DEFERRED], ids=["at once", "deferred"])
"""When the target checks that a child has a parent."""


@WHEN_CHECKED
def test_tables_that_refer_to_each_other_are_written_in_an_order_that_works(pair: Pair, checked: str) -> None:
    fetch(pair.source, FAMILY)
    fetch(pair.target, FAMILY.replace(DEFERRED, checked))
    pair.capture("child", "parent")
    sink = pair.sink()
    for statement in (
        "insert into child values (1, 1, null), (2, 1, 1); insert into parent values (1, 'a'), (2, 'b')",
        "insert into parent values (3, 'c'); update child set parent = 3; delete from parent where id = 1",
        "delete from parent where id = 3; delete from child where id = 1",
        "insert into parent values (4, 'd'); insert into child values (5, 4, null); delete from parent where id = 2",
        "truncate parent, child",
        "insert into parent values (1, 'a'); insert into child values (1, 1, null)",
        "truncate parent cascade",
    ):
        pair.run(statement)
        pair.deliver(sink)
        assert pair.is_mirror("parent", "child"), statement


@WHEN_CHECKED
def test_a_row_whose_parent_is_missing_holds_up_itself_and_waits(pair: Pair, checked: str) -> None:
    fetch(pair.source, FAMILY.replace(f"references parent {DEFERRED}", ""))
    fetch(pair.target, FAMILY.replace(DEFERRED, checked))
    pair.capture("child", "parent")
    sink = pair.sink()
    pair.run("insert into child values (1, 7, null), (2, null, null); update child set up = 2 where id = 1")
    page = pair.page(sink)
    told = failures(sink, page)
    assert {index: type(failure) for index, failure in told.items()} == {0: TransientFailure, 2: TransientFailure}
    assert 'violates foreign key constraint "child_parent_fkey" (what it refers to, or' in str(told[0])
    assert str(told[2]) == "waits for an earlier event of its key"
    assert pair.rows("select id from child") == [(2,)]
    fetch(pair.target, "insert into parent values (7, 'late')")
    sink.deliver([page[index] for index in told])
    assert pair.rows("select * from child order by id") == [(1, 7, 2), (2, None, None)]


@WHEN_CHECKED
def test_a_child_before_its_parent_comes_again_where_a_row_beside_it_has_none(pair: Pair, checked: str) -> None:
    fetch(pair.source, FAMILY.replace(f"references parent {DEFERRED}", ""))
    fetch(pair.target, FAMILY.replace(DEFERRED, checked))
    pair.capture("child", "parent")
    sink = pair.sink()
    pair.run("insert into child values (1, 7, null), (2, 1, null); insert into parent values (1, 'a')")
    page = pair.page(sink)
    told = failures(sink, page)
    assert {index: type(failure) for index, failure in told.items()} == {0: TransientFailure, 1: TransientFailure}
    assert list(failures(sink, [page[0], page[1]])) == [0]
    assert pair.rows("select id, parent from child") == [(2, 1)]


@WHEN_CHECKED
def test_a_child_whose_parent_is_on_the_next_page_is_told_of_with_the_cure(pair: Pair, checked: str) -> None:
    fetch(pair.source, FAMILY)
    fetch(pair.target, FAMILY.replace(DEFERRED, checked))
    pair.capture("child", "parent")
    pair.run("insert into child values (1, 1, null), (2, null, null); insert into parent values (1, 'a')")
    small = pair.sink()
    told = failures(small, pair.page(small, 2))
    assert list(told) == [0]
    assert "(what it refers to, or what refers to it, may still come; if only on a later page" in str(told[0])
    assert "raise batch.events, or set replication_role: replica)" in str(told[0])
    pair.deliver(pair.sink(), 3)
    assert pair.is_mirror("parent", "child")


def test_a_row_that_others_must_not_lose_waits_to_be_deleted(pair: Pair) -> None:
    pair.both(
        "create table parent (id integer primary key); create table child (id integer primary key, parent integer)"
    )
    fetch(pair.target, "alter table child add foreign key (parent) references parent on delete restrict")
    pair.capture("parent", "child")
    sink = pair.sink()
    pair.run("insert into parent values (1), (2), (3); insert into child values (1, 1), (2, 2)")
    pair.deliver(sink)
    pair.run("delete from parent where id = 1; delete from parent where id = 3")
    page = pair.page(sink)
    told = failures(sink, page)
    assert {index: type(failure) for index, failure in told.items()} == {0: TransientFailure}
    assert pair.rows("select id from parent order by id") == [(1,), (2,)]
    fetch(pair.target, "delete from child where id = 1")
    sink.deliver([page[0]])
    assert pair.rows("select id from parent") == [(2,)]


def test_what_is_refused_at_the_end_of_a_transaction_is_refused_by_itself(pair: Pair) -> None:
    pair.run("create table item (id integer primary key, v text, w text)")
    fetch(pair.target, f"create table item (id integer primary key, v text unique {DEFERRED}, w text)")
    pair.capture("item")
    sink = pair.sink()
    pair.run("insert into item values (1, 'a'), (2, 'a'), (3, 'b'); update item set w = 'c' where id = 2")
    told = failures(sink, pair.page(sink))
    assert {index: type(failure) for index, failure in told.items()} == {1: PermanentFailure, 3: TransientFailure}
    assert str(told[1]) == 'the target: duplicate key value violates unique constraint "item_v_key"'
    assert pair.rows("select id, v from item order by id") == [(1, "a"), (3, "b")]


def test_values_that_change_places_are_not_held_up_by_what_is_refused_beside_them(pair: Pair) -> None:
    pair.both(f"create table item (id integer primary key, v text unique {DEFERRED})")
    fetch(pair.target, "alter table item add check (id < 9)")
    pair.capture("item")
    sink = pair.sink()
    pair.run("insert into item values (1, 'a'), (2, 'b')")
    pair.deliver(sink)
    pair.run("insert into item values (9, 'z'); update item set v = case v when 'a' then 'b' else 'a' end where id < 9")
    assert list(failures(sink, pair.page(sink))) == [0]
    assert pair.rows("select * from item order by id") == [(1, "b"), (2, "a")]


def test_a_table_is_truncated_after_rows_of_it_that_are_still_to_be_checked(pair: Pair) -> None:
    pair.both(FAMILY)
    pair.capture("child", "parent")
    sink = pair.sink()
    pair.run("insert into parent values (1, 'a')")
    pair.run("insert into child values (1, 1, null)")
    pair.run("update child set id = 2")
    pair.run("truncate child")
    pair.run("insert into child values (3, 1, null)")
    page = pair.page(sink)
    told = failures(sink, page)
    assert {type(failure) for failure in told.values()} == {TransientFailure}
    sink.deliver([page[index] for index in told])
    assert pair.is_mirror("parent", "child")


def test_a_unique_value_may_go_from_row_to_row(pair: Pair) -> None:
    pair.both("create table item (id integer primary key, v text unique)")
    pair.capture("item")
    sink = pair.sink()
    for statement in (
        "insert into item values (1, 'a'), (2, 'b')",
        "delete from item where id = 1; insert into item values (3, 'a')",
        "update item set v = 'x' where id = 2; update item set v = 'b' where id = 3",
        "update item set v = 'c' where id = 2; update item set v = 'x' where id = 3;"
        "update item set v = 'b' where id = 2",
        "update item set v = 'y' where id = 2; insert into item values (4, 'a')",
    ):
        pair.run(statement)
        pair.deliver(sink)
        assert pair.is_mirror("item")


@pytest.mark.parametrize("role", ["origin", "replica"])
def test_the_targets_triggers_fire_unless_the_role_is_replica(pair: Pair, role: str) -> None:
    pair.both("create table item (id integer primary key, v text)")
    fetch(
        pair.target,
        """create function shout() returns trigger language plpgsql as
             $$ begin new.v := upper(new.v); return new; end $$;
           create trigger shout before insert on item for each row execute function shout()""",
    )
    pair.capture("item")
    sink = pair.sink(replication_role=role)
    pair.run("insert into item values (1, 'a')")
    pair.deliver(sink)
    assert pair.rows("select v from item") == [("A" if role == "origin" else "a",)]


def test_truncates_may_be_ignored(pair: Pair) -> None:
    pair.both(ITEM)
    pair.capture("item")
    sink = pair.sink(truncate="ignore")
    pair.run("insert into item values (1, 'a'); truncate item")
    pair.deliver(sink)
    assert pair.rows("select id from item") == [(1,)]


# -- a target that is not like the source ------------------------------------------------------------------------------


def refused(sink: PostgresSink, batch: Sequence[Event]) -> str:
    """What a sink that takes nothing of a batch, and is to be tried again, says."""
    with pytest.raises(TransientFailure) as raised:
        sink.deliver(batch)
    return str(raised.value)


def test_what_the_target_lacks_is_named_and_waited_for(pair: Pair) -> None:
    pair.run(ITEM)
    pair.capture("item")
    sink = pair.sink()
    pair.run("insert into item values (1, 'a', 2)")
    page = pair.page(sink)
    assert refused(sink, page).startswith(
        "the target has no table public.item, or this role may not see it (create it,"
    )
    fetch(pair.target, "create table item (id integer, name text)")
    assert "public.item of the target has no column amount (add it; or exclude it" in refused(sink, page)
    fetch(pair.target, "alter table item add amount numeric, add note text")
    assert refused(sink, page) == (
        "public.item has no primary key or unique index on (id), by which its rows are found (create one)"
    )
    fetch(pair.target, "create unique index on item (id) where id > 0")
    assert "no primary key or unique index on (id)" in refused(sink, page)
    fetch(pair.target, "create unique index on item (id)")
    sink.deliver(page)
    assert pair.is_mirror("item")


def test_a_table_that_changes_while_it_is_mirrored_is_looked_at_again(pair: Pair) -> None:
    pair.both("create table item (id integer primary key, v text, w text)")
    pair.capture("item")
    sink = pair.sink()
    pair.run("insert into item values (1, 'a', 'b')")
    pair.deliver(sink)
    pair.both(
        "alter table item add more integer; alter table item rename w to x; alter table item alter v type varchar(5)"
    )
    pair.run("update item set more = 1, x = 'c'; insert into item values (2, 'abcde', 'd', 3)")
    page = pair.page(sink)
    with contextlib.suppress(TransientFailure):  # it may be told of the column by what it remembers
        sink.deliver(page)
    sink.deliver(page)
    assert pair.is_mirror("item")


def test_columns_that_the_target_lacks_may_be_ignored(pair: Pair) -> None:
    pair.run("create table item (id integer primary key, v text, secret text)")
    fetch(pair.target, "create table item (id integer primary key, v text)")
    pair.capture("item")
    sink = pair.sink(missing_column="ignore")
    pair.run(
        "insert into item values (1, 'a', 's'); update item set secret = 't'; update item set v = 'b', secret = null"
    )
    pair.deliver(sink, 1)
    assert pair.rows("select * from item") == [(1, "b")]


def test_an_update_of_a_row_that_is_not_there_is_refused_by_itself(pair: Pair) -> None:
    pair.both(ITEM)
    pair.run("insert into item values (1, 'old'), (2, 'old')")
    pair.capture("item")
    sink = pair.sink()
    pair.run(
        "update item set name = 'new' where id = 1; insert into item values (3, 'c');"
        "update item set amount = 1 where id = 1"
    )
    page = pair.page(sink)
    told = failures(sink, page)
    assert {index: type(failure) for index, failure in told.items()} == {0: PermanentFailure, 2: TransientFailure}
    assert str(told[0]).startswith("public.item of the target has no row with that key, and the update shows only")
    assert pair.rows("select id, name from item") == [(3, "c")]
    assert list(failures(sink, [page[2]])) == [0], "without that one, the next is refused by itself, too"


def test_updates_of_rows_that_are_not_there_may_be_ignored_and_are_told_of_once(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pair.both(ITEM)
    pair.run("insert into item values (1, 'old'), (2, 'old')")
    pair.capture("item")
    sink = pair.sink(missing_row="ignore")
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            pair.run(f"update item set name = 'n{number}'; insert into item values ({number + 10})")
            pair.deliver(sink)
    assert pair.rows("select id from item order by id") == [(10,), (11,), (12,)]
    (record,) = caplog.records
    assert record.getMessage() == "Updates of rows that are not there are ignored, from now on in silence."
    assert vars(record)["fields"] == {"sink": "mirror", "updates": 2}


def test_an_update_that_shows_all_of_a_row_makes_it(pair: Pair) -> None:
    pair.both("create table item (id integer primary key, v text)")
    pair.both("create table other (id integer primary key, v text, w text)")
    pair.run("insert into item values (1, 'a'); insert into other values (1, 'a', 'b')")
    pair.capture("item")
    pair.capture("other", image="full")
    sink = pair.sink()
    pair.run("update item set v = 'b'; update other set v = 'c'; update other set id = 2")
    pair.deliver(sink, 1)
    assert pair.is_mirror("item", "other")


def test_an_event_without_its_row_is_permanent_and_its_delete_is_not(
    pair: Pair, make_event: Callable[..., Event]
) -> None:
    fetch(pair.target, "create table orders (id integer primary key, text text)")
    sink = pair.sink()
    event = make_event(1)
    stub = event.model_copy(update={"after": None, "truncated": True})
    told = failures(sink, [stub, make_event(2)])
    assert {index: type(failure) for index, failure in told.items()} == {0: PermanentFailure}
    assert "copy it by hand" in str(told[0])
    sink.deliver([stub.model_copy(update={"op": Op.DELETE})])


@pytest.mark.parametrize(
    ("type_", "said"),
    {
        "integer": "invalid input syntax for type integer",
        "smallint": "invalid input syntax for type smallint",
        "varchar(3)": "value too long for type character varying(3)",
        "mood": "invalid input value for enum mood",
        "text check (length(v) < 9)": 'new row for relation "item" violates check constraint "item_v_check"',
        "interval": "interval field overflow",
    }.items(),
)
def test_a_value_that_the_target_refuses_is_permanent_and_is_not_shown(pair: Pair, type_: str, said: str) -> None:
    value = "999999999999 years" if type_ == "interval" else SECRET
    pair.run("create table item (id integer primary key, v text)")
    fetch(pair.target, f"create type mood as enum ('1', '3'); create table item (id integer primary key, v {type_})")
    pair.capture("item")
    sink = pair.sink()
    pair.run(f"insert into item values (1, '1'), (2, '{value}'), (3, '3'); update item set v = v || v where id = 2")
    told = failures(sink, pair.page(sink))
    assert {index: type(failure) for index, failure in told.items()} == {1: PermanentFailure, 3: TransientFailure}
    assert str(told[1]) == f"the target: {said}"
    assert pair.rows("select id from item order by id") == [(1,), (3,)]


STATES = {
    "40001": TransientFailure,
    "40P01": TransientFailure,
    "25006": TransientFailure,
    "53100": TransientFailure,
    "57014": TransientFailure,
    "42501": TransientFailure,
    "42P01": TransientFailure,
    "0A000": TransientFailure,
    "XX000": TransientFailure,
    "42999": TransientFailure,
    "53999": TransientFailure,
    "CDC06": TransientFailure,
    "55P03": PartialFailure,
    "23001": PartialFailure,
    "23503": PartialFailure,
    "23505": PartialFailure,
    "22003": PartialFailure,
    "P0001": PartialFailure,
    "P0999": PartialFailure,
    "UE001": PartialFailure,
    "45000": PartialFailure,
    "PT403": PartialFailure,
}


@pytest.mark.parametrize("mode", ["mirror", "append"])
@pytest.mark.parametrize("state", STATES)
def test_what_concerns_one_event_fails_it_and_what_concerns_the_target_fails_the_batch(
    pair: Pair, state: str, mode: str, make_event: Callable[..., Event]
) -> None:
    table = "orders" if mode == "mirror" else "cdc_event"
    sink = pair.sink(mode=mode, **({"create": True} if mode == "append" else {}))
    fetch(pair.target, "create table orders (id integer primary key, text text)")
    sink.deliver([make_event(1)])
    fetch(
        pair.target,
        f"""create function refuse() returns trigger language plpgsql as $$
              begin
                if new::text like '%refused%' then raise exception '{SECRET}' using errcode = '{state}'; end if;
                return new;
              end $$;
            create trigger refuse before insert on {table} for each row execute function refuse()""",
    )
    with pytest.raises(STATES[state]) as raised:
        sink.deliver([make_event(2), make_event(3, text="refused"), make_event(4)])
    rows = pair.rows(f"select count(*) from {table}")
    if isinstance(raised.value, PartialFailure):
        assert list(raised.value.failures) == [1]
        assert isinstance(raised.value.failures[1], TransientFailure) == (state in {"55P03", "23001", "23503"})
        if state[:2] in {"22", "P0", "UE", "45", "PT"}:
            assert SECRET not in str(raised.value.failures[1])
        assert rows == [(3,)]
    else:
        assert rows == [(1,)]
    sink.deliver([make_event(5)])


def test_a_lock_that_is_not_given_is_waited_for_until_time_is_over(
    pair: Pair, connect: Callable[..., connection]
) -> None:
    pair.both(ITEM)
    pair.capture("item")
    sink = pair.sink(timeout="1s")
    pair.run("insert into item values (1, 'a')")
    other = connect(pair.dsn, autocommit=False)
    fetch(other, "lock table item")
    page = pair.page(sink)
    assert refused(sink, page) == "the target did not finish in 1 s (raise timeout, or lower batch.events)"
    other.rollback()
    sink.deliver(page)
    assert pair.is_mirror("item")


@pytest.mark.parametrize("mode", ["mirror", "append"])
def test_a_sink_that_would_feed_itself_is_stopped(pair: Pair, installed: str, mode: str) -> None:
    pair.run(f"{ITEM}; create table cdc_event (id text primary key)")
    pair.capture("item", "cdc_event")
    pair.dsn = installed
    sink = pair.sink(mode=mode)
    pair.run("insert into item values (1, 'a')")
    with pytest.raises(SinkDisabled, match="is captured by the very database the events come from"):
        sink.deliver(pair.page(sink))
    copy = pair.sink(mode=mode, table="public.copy", **({"create": True} if mode == "append" else {}))
    if mode == "mirror":
        pair.run(ITEM.replace("item", "copy"))
    pair.deliver(copy)
    assert value(pair.source, "select count(*) from copy") == 1


# -- exactly once -----------------------------------------------------------------------------------------------------

COUNTED = """
    create table applied (what text);
    create function note() returns trigger language plpgsql as $$
      begin insert into applied values (tg_op || ' ' || coalesce(new.id, old.id)); return null; end $$;
    create trigger note after insert or update or delete on item for each row execute function note();
"""


def test_what_is_handed_over_again_is_left_out_whatever_the_size_of_its_pages(pair: Pair) -> None:
    pair.both(ITEM)
    fetch(pair.target, COUNTED)
    pair.capture("item")
    sink = pair.sink()
    pair.run("insert into item select g, 'a' from generate_series(1, 10) g")
    sink.deliver(pair.page(sink, 4))
    sink.deliver(pair.page(sink, 4))  # and the daemon dies
    sink.close()
    again = pair.sink()
    for size in (1, 2, 3, 4, 5):
        again.deliver(pair.page(again, size))
    assert pair.deliver(again) == 0
    assert pair.is_mirror("item")
    assert pair.rows("select count(*) from applied") == [(10,)]


def test_of_a_batch_that_was_taken_in_part_only_the_rest_is_applied(pair: Pair) -> None:
    pair.both(ITEM)
    fetch(pair.target, COUNTED)
    fetch(pair.target, "alter table item add check (id not in (2, 3))")
    pair.capture("item")
    sink = pair.sink()
    pair.run("insert into item select g, 'a' from generate_series(1, 5) g")
    assert list(failures(sink, pair.page(sink))) == [1, 2]
    fetch(pair.target, "alter table item drop constraint item_id_check; alter table item add check (id <> 3)")
    again = pair.sink()
    page = pair.page(again, 2)
    again.deliver(page)  # 1 is left out
    assert list(failures(again, pair.page(again))) == [0]  # and so are 4 and 5
    assert pair.rows("select id from item order by id") == [(1,), (2,), (4,), (5,)]
    assert pair.rows("select count(*), count(distinct what) from applied") == [(4, 4)]


def test_what_comes_again_on_purpose_is_applied_again(pair: Pair) -> None:
    pair.both(ITEM)
    pair.capture("item")
    sink = pair.sink()
    before = value(pair.source, "select snap_lo from cdc.position")
    pair.run("insert into item values (1, 'a')")
    sink.deliver(pair.page(sink))
    fetch(pair.target, "delete from item")
    # Rewound while it was delivered and not acknowledged.
    fetch(
        pair.source,
        "update cdc.position set snap_lo = %s, snap_hi = null, last_seq = 0, range_seq = null, final_seq = null",
        (before,),
    )
    again = pair.sink()
    assert pair.deliver(again) == 1
    assert pair.is_mirror("item")


def test_another_event_under_the_same_number_is_not_left_out(pair: Pair, make_event: Callable[..., Event]) -> None:
    """A machine set back to a snapshot draws the same numbers for the same transactions, at another moment."""
    fetch(pair.target, "create table orders (id integer primary key, text text)")
    sink = pair.sink()
    sink.begin(Page("shop", "a window", 0))
    event = make_event(1)
    sink.deliver([event])
    at = event.source.ts.replace(year=2027)
    other = make_event(1, key=2).model_copy(update={"source": event.source.model_copy(update={"ts": at})})
    sink.deliver([event, other.model_copy(update={"after": make_event(2).after})])
    assert pair.rows("select id from orders order by id") == [(1,), (2,)]


def test_a_commit_whose_answer_was_lost_is_not_repeated(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.both(ITEM)
    fetch(pair.target, COUNTED)
    pair.capture("item")
    sink = pair.sink()
    pair.run("insert into item values (1, 'a')")
    page = pair.page(sink)
    step = PostgresSink._step

    def cut(self: PostgresSink, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        rows = step(self, statement, values)
        if statement == "commit":
            assert self._session is not None
            fetch(pair.target, "select pg_terminate_backend(%s)", (self._session.pid,))
            step(self, "select 1")
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(PostgresSink, "_step", cut)
        assert refused(sink, page).startswith("the target: connection lost:")
    sink.deliver(page)
    assert pair.rows("select what from applied") == [("INSERT 1",)]


def test_who_was_overtaken_writes_nothing(pair: Pair) -> None:
    pair.both(ITEM)
    pair.capture("item")
    pair.run("insert into item values (1, 'a')")
    late = pair.sink()
    page = pair.page(late)
    owner = pair.sink()
    pair.deliver(owner)
    pair.run("update item set name = 'b'")
    pair.deliver(owner)
    with pytest.raises(Fenced, match=r"another daemon writes to this target as sink mirror of database shop \(if that"):
        late.deliver(page)
    assert pair.is_mirror("item")


def test_a_late_claim_makes_the_owner_claim_again(pair: Pair) -> None:
    pair.both(ITEM)
    pair.capture("item")
    owner = pair.sink()
    pair.run("insert into item values (1, 'a')")
    page = pair.page(owner)
    late = PostgresSink("mirror", owner.options)
    late.begin(Page("shop", None, 0))
    late.open()
    late.close()
    with pytest.raises(Fenced):
        owner.deliver(page)
    pair.claim(owner)
    assert pair.deliver(owner) == 1
    assert pair.is_mirror("item")


def test_each_database_and_sink_has_a_note_of_its_own(pair: Pair, make_event: Callable[..., Event]) -> None:
    sinks = []
    for name, database in (("one", "shop"), ("two", "shop"), ("one", "other")):
        sink = PostgresSink(name, PostgresOptions(type="postgres", dsn=SecretStr(pair.dsn), mode="append", create=True))
        sink.begin(Page(database, "w", 0))
        sink.open()
        sinks.append(sink)
    for number, sink in enumerate(sinks):
        sink.deliver([make_event(number + 1)])
        sink.close()
    assert pair.rows("select sink, database, last_id, source_window from cdc_position order by last_id") == [
        ("one", "shop", "shop-1-1", "w"),
        ("two", "shop", "shop-2-1", "w"),
        ("one", "other", "shop-3-1", "w"),
    ]


def test_who_stops_in_the_middle_of_a_transaction_keeps_nobody_out_for_long(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE", 0.3)
    pair.both(ITEM)
    pair.capture("item")
    stopped = pair.sink()
    pair.run("insert into item values (1, 'a')")
    page = pair.page(stopped)
    write = stopped._write

    def stop(events: Sequence[Event]) -> None:
        write(events)
        pair.deliver(pair.sink())  # the new owner waits for the note until the server has ended our transaction

    monkeypatch.setattr(stopped, "_write", stop)
    refused(stopped, page)
    assert pair.is_mirror("item")


def test_the_note_stays_as_small_as_a_page(pair: Pair) -> None:
    pair.both(ITEM)
    pair.capture("item")
    sink = pair.sink()
    pair.run("insert into item select g, 'a' from generate_series(1, 100) g")
    while page := pair.page(sink, 7):
        sink.deliver(page)
        assert pair.rows("select array_length(applied, 1) from cdc_position") == [(len(page),)]


# -- a table of events ------------------------------------------------------------------------------------------------


def test_each_event_is_a_row_with_every_digit(pair: Pair) -> None:
    pair.run("create table item (id integer primary key, doc json, n numeric, v text)")
    pair.capture("item")
    sink = pair.sink(mode="append", create=True)
    pair.run(
        """set cdc.context = '{"actor": "ann"}';
           insert into item values (1, '{"a" : 1.0, "a":2e5, "z": "\\u0000"}', 12345678901234567890.1230, null);
           update item set v = 'a"b\\c', n = 1.50; delete from item; truncate item; reset cdc.context"""
    )
    page = pair.page(sink)
    sink.deliver(page)
    rows = pair.rows(
        "select id, op, database, schema_name, table_name, seq, txid, ts, key::text, before::text, after::text,"
        " changed, context::text, truncated from cdc_event order by seq"
    )
    for event, row in zip(page, rows, strict=True):
        source = event.source
        images = [None if image is None else image.raw for image in (event.key, event.before, event.after)]
        assert list(row) == [
            *(event.id, event.op.value, "shop", "public", "item", source.seq, source.txid, source.ts),
            *images,
            None if event.changed is None else list(event.changed),
            '{"actor": "ann"}',
            False,
        ]
    assert [row[1] for row in rows] == ["insert", "update", "delete", "truncate"]


def test_no_event_is_appended_twice_not_even_by_a_rewind(pair: Pair) -> None:
    pair.run(ITEM)
    pair.capture("item")
    sink = pair.sink(mode="append", create=True)
    pair.run("insert into item values (1, 'a'), (2, 'b')")
    page = pair.page(sink)
    sink.deliver(page)
    sink.begin(Page("shop", "another window", 0))
    sink.deliver(page)
    assert pair.rows("select count(*) from cdc_event") == [(2,)]


def test_a_table_of_events_may_have_any_name_and_more_columns(pair: Pair) -> None:
    pair.run(ITEM)
    pair.capture("item")
    fetch(pair.target, "create schema audit")
    sink = pair.sink(mode="append", create=True, table="audit.{table}_events", position_table="audit.position")
    pair.run("insert into item values (1, 'a')")
    pair.deliver(sink)
    fetch(pair.target, "alter table audit.item_events add arrived timestamptz default clock_timestamp()")
    pair.run("insert into item values (2, 'a')")
    pair.deliver(sink)
    assert pair.rows("select count(arrived) from audit.item_events") == [(2,)]
    assert pair.rows("select count(*) from audit.position") == [(1,)]


def test_a_table_of_events_is_made_only_when_told_to(pair: Pair) -> None:
    pair.run(ITEM)
    pair.capture("item")
    sink = pair.sink(mode="append")
    pair.run("insert into item values (1, 'a')")
    page = pair.page(sink)
    assert refused(sink, page) == "the target has no table public.cdc_event (create it, or set create: true)"
    fetch(pair.target, "create table cdc_event (id text primary key)")
    assert "make the target's tables like those" in refused(sink, page)


def test_the_tables_of_the_documentation_are_those_the_sink_needs(
    pair: Pair, connect: Callable[..., connection], make_event: Callable[..., Event]
) -> None:
    """Made by a DBA; the sink's role may write them and nothing else."""
    text = (Path(__file__).parents[2] / "docs" / "sinks" / "postgres.md").read_text()
    for block in text.split("```sql\n")[1:]:
        fetch(pair.target, block.split("```")[0])
    assert pair.rows("select to_regclass('cdc_position') is not null, to_regclass('cdc_event') is not null") == [
        (True, True)
    ]
    role = f"writer_{parse_dsn(pair.dsn)['dbname']}"
    fetch(pair.target, f"revoke create on schema public from public; create role {role} login")
    try:
        fetch(
            pair.target, f"grant select, insert, update on cdc_position to {role}; grant insert on cdc_event to {role}"
        )
        options = PostgresOptions(type="postgres", dsn=SecretStr(make_dsn(pair.dsn, user=role)), mode="append")
        sink = PostgresSink("mirror", options)
        sink.begin(Page("shop", "w", 0))
        sink.open()
        sink.deliver([make_event(1)])
        sink.close()
        assert pair.rows("select id from cdc_event") == [("shop-1-1",)]
    finally:
        fetch(pair.target, f"drop owned by {role}; drop role {role}")


def test_a_position_table_that_may_not_be_made_is_told_of(pair: Pair) -> None:
    role = f"writer_{parse_dsn(pair.dsn)['dbname']}"
    fetch(pair.target, f"revoke create on schema public from public; create role {role} login")
    try:
        sink = PostgresSink("m", PostgresOptions(type="postgres", dsn=SecretStr(make_dsn(pair.dsn, user=role))))
        sink.begin(Page("shop", None, 0))
        with pytest.raises(TransientFailure, match="permission denied for schema public") as raised:
            sink.open()
        assert "public.cdc_position" in str(raised.value)
    finally:
        fetch(pair.target, f"drop owned by {role}; drop role {role}")


# -- configuration -----------------------------------------------------------------------------------------------------

DSN = "host=db dbname=x"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dsn": None}, "no connection string (write dsn or dsn_file)"),
        ({"dsn": SecretStr("embedded:./x")}, "embedded: is for source databases"),
        ({"dsn": SecretStr("nonsense")}, "not a connection string"),
        ({"table": "orders"}, "not a schema and a table"),
        ({"table": "a.b.c"}, "not a schema and a table"),
        ({"table": "{schema}."}, "not a schema and a table"),
        ({"table": "public.{key}"}, "a placeholder that does not exist"),
        ({"position_table": "public.{table}"}, "a placeholder that does not exist"),
        ({"create": True}, "create: true is for mode: append"),
        ({"mode": "append", "truncate": "ignore"}, "truncate is for mode: mirror"),
        ({"mode": "append", "missing_row": "fail"}, "missing_row is for mode: mirror"),
        ({"timeout": "500ms"}, "greater than or equal to 1"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_at_start(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        PostgresOptions(**{"type": "postgres", "dsn": SecretStr(DSN), **options})
    assert said in str(raised.value)


def test_a_connection_string_may_stand_in_a_file(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "target.dsn"
    path.write_text(pair.dsn)
    path.chmod(0o600)
    sink = PostgresSink("m", PostgresOptions.model_validate({"type": "postgres", "dsn_file": str(path)}))
    sink.open()
    sink.close()
    sink.close()


def test_a_server_that_is_not_there_is_named_without_the_password() -> None:
    dsn = SecretStr("postgresql://u:hunter2@127.0.0.1:1/x")
    sink = PostgresSink("m", PostgresOptions(type="postgres", dsn=dsn))
    with pytest.raises(TransientFailure, match=r"cannot connect: .*127\.0\.0\.1") as raised:
        sink.open()
    assert "hunter2" not in str(raised.value)


def test_a_standby_is_waited_for(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    prepare = module.Connection._run

    def standby(self: Connection, sql: str, parameters: Any) -> list[tuple[Any, ...]]:
        rows = prepare(self, sql, parameters)
        return [(True, *rows[0][1:])] if "pg_is_in_recovery" in sql else rows

    monkeypatch.setattr(module.Connection, "_run", standby)
    sink = PostgresSink("m", PostgresOptions(type="postgres", dsn=SecretStr(pair.dsn)))
    with pytest.raises(TransientFailure, match="the server is a standby"):
        sink.open()


def test_a_server_that_stops_answering_is_given_up(pair: Pair) -> None:
    pair.both(ITEM)
    pair.capture("item")
    sink = pair.sink(timeout="1s")
    pair.run("insert into item values (1, 'a')")
    page = pair.page(sink)
    assert sink._session is not None
    fetch(pair.target, "select pg_terminate_backend(%s)", (sink._session.pid,))
    until(
        lambda: pair.rows("select count(*) from pg_stat_activity where application_name = 'cdc sink mirror'") == [(0,)],
        "gone",
    )
    assert refused(sink, page).startswith("the target: connection lost")
    sink.deliver(page)
    assert pair.is_mirror("item")


def test_connections_are_closed_with_the_sink(pair: Pair) -> None:
    sink = pair.sink()
    count = (
        "select count(*) from pg_stat_activity"
        " where application_name = 'cdc sink mirror' and datname = current_database()"
    )
    assert pair.rows(count) == [(1,)]
    sink.close()
    until(lambda: pair.rows(count) == [(0,)], "the session is gone")
