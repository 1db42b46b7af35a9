"""Whatever a table can be and go through, as the exact list of its events.

Each event is one line: op, table, key, before, after. A minus stands where there is nothing. The lists hold on every
major version the tests are run on.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import closing

import psycopg2
import pytest
from psycopg2.extensions import connection, set_wait_callback
from test_capture import Shop

from cdc.connection import _wait

Connect = Callable[..., connection]


@pytest.fixture
def shop(installed: str, connect: Connect) -> Iterator[Shop]:
    with closing(Shop(connect(installed), installed)) as shop:
        yield shop


def told(shop: Shop) -> list[str]:
    """The events since the last call."""
    lines = []
    for event in shop.events():
        parts = ("-" if image is None else image.raw for image in (event.key, event.before, event.after))
        lines.append(" ".join((event.op.value, event.source.table, *parts)))
    return lines


def needs(shop: Shop, version: int) -> None:
    if shop.writer.server_version < version * 10_000:
        pytest.skip(f"PostgreSQL {version} and later")


# -- keys ---------------------------------------------------------------------------------------------------------


def test_any_part_of_a_composite_key_may_change(shop: Shop) -> None:
    shop.run("create table t (a int, v text, b text, primary key (b, a))")
    shop.capture("t")
    shop.run("insert into t values (1, 'x', 'k')")
    shop.run("update t set a = 2")
    shop.run("update t set a = 3, b = 'l', v = 'y'")
    shop.run("update t set v = 'z'")
    shop.run("delete from t")
    assert told(shop) == [
        'insert t {"b":"k","a":1} - {"a":1,"v":"x","b":"k"}',
        'update t {"b":"k","a":2} {"a":1} {"a":2}',
        'update t {"b":"l","a":3} {"a":2,"v":"x","b":"k"} {"a":3,"v":"y","b":"l"}',
        'update t {"b":"l","a":3} {"v":"y"} {"v":"z"}',
        'delete t {"b":"l","a":3} {"a":3,"v":"z","b":"l"} -',
    ]


def test_columns_that_an_index_only_includes_are_no_part_of_the_key(shop: Shop) -> None:
    shop.run("create table t (id int, v text, primary key (id) include (v))")
    shop.capture("t")
    shop.run("insert into t values (1, 'x')")
    assert told(shop) == ['insert t {"id":1} - {"id":1,"v":"x"}']


def test_keys_that_change_places_under_a_deferred_constraint(shop: Shop) -> None:
    shop.run("create table t (id int primary key deferrable initially deferred, v text)")
    shop.capture("t")
    shop.run("insert into t values (1, 'a'), (2, 'b')")
    shop.run("begin; update t set id = 2 where v = 'a'; update t set id = 1 where v = 'b'; commit")
    shop.run("update t set id = 3 - id")
    assert told(shop) == [
        'insert t {"id":1} - {"id":1,"v":"a"}',
        'insert t {"id":2} - {"id":2,"v":"b"}',
        'update t {"id":2} {"id":1} {"id":2}',
        'update t {"id":1} {"id":2} {"id":1}',
        'update t {"id":1} {"id":2} {"id":1}',
        'update t {"id":2} {"id":1} {"id":2}',
    ]


def test_a_transaction_that_a_deferred_constraint_refuses_leaves_nothing(shop: Shop) -> None:
    shop.run("create table t (id int unique deferrable initially deferred)")
    shop.capture("t", key=["id"])
    with pytest.raises(psycopg2.errors.UniqueViolation):
        shop.run("begin; insert into t values (1), (1); commit")
    shop.run("rollback")
    shop.run("insert into t values (1)")
    assert told(shop) == ['insert t {"id":1} - {"id":1}']


def test_without_a_key_rows_that_look_the_same_are_told_one_by_one(shop: Shop) -> None:
    shop.run("create table t (v text)")
    shop.capture("t")
    shop.run("insert into t values ('a'), ('a')")
    shop.run("update t set v = 'b'")
    shop.run("delete from t")
    assert told(shop) == [
        'insert t - - {"v":"a"}',
        'insert t - - {"v":"a"}',
        'update t - {"v":"a"} {"v":"b"}',
        'update t - {"v":"a"} {"v":"b"}',
        'delete t - {"v":"b"} -',
        'delete t - {"v":"b"} -',
    ]


def test_a_key_from_the_yaml_may_be_any_columns_null_included(shop: Shop) -> None:
    shop.run("create table t (a int, b text, c int)")
    shop.capture("t", key=["c", "a"])
    shop.run("insert into t values (1, 'x', 2), (null, 'y', null)")
    shop.run("update t set a = 5 where b = 'y'")
    assert told(shop) == [
        'insert t {"c":2,"a":1} - {"a":1,"b":"x","c":2}',
        'insert t {"c":null,"a":null} - {"a":null,"b":"y","c":null}',
        'update t {"c":null,"a":5} {"a":null} {"a":5}',
    ]


def test_a_key_without_overlaps_holds_its_range(shop: Shop) -> None:
    needs(shop, 18)
    if not shop.one("select exists (select from pg_available_extensions where name = 'btree_gist')"):
        pytest.skip("this server has no btree_gist")
    shop.run("create extension btree_gist")
    shop.run("create table t (id int, at int4range, v text, primary key (id, at without overlaps))")
    shop.capture("t")
    shop.run("insert into t values (1, '[1,5)', 'a')")
    assert told(shop) == ['insert t {"id":1,"at":"[1,5)"} - {"id":1,"at":"[1,5)","v":"a"}']


# -- partitions ---------------------------------------------------------------------------------------------------

PARTS = """
    create table m (id int, at int, v text, primary key (id, at)) partition by range (at);
    create table m1 partition of m for values from (0) to (10);
    create table m2 partition of m for values from (10) to (20) partition by list (at);
    create table m2a partition of m2 for values in (10, 11, 12);
    create table m2d partition of m2 default;
"""


@pytest.fixture
def parts(shop: Shop) -> Shop:
    shop.run(PARTS)
    shop.capture("m")
    return shop


def test_a_row_that_moves_between_partitions_is_deleted_and_inserted_under_its_key(shop: Shop) -> None:
    # The key has to hold what the table is partitioned by; told by a column that does not change, it is one key.
    shop.run("create table m (id int, at int, v text) partition by list (at)")
    shop.run("create table m1 partition of m for values in (1); create table m2 partition of m for values in (2)")
    shop.capture("m", key=["id"])
    shop.run("insert into m values (7, 1, 'a')")
    shop.run("update m set at = 2, v = 'b'")
    shop.run("update m set v = 'c'")
    assert told(shop) == [
        'insert m {"id":7} - {"id":7,"at":1,"v":"a"}',
        'delete m {"id":7} {"id":7,"at":1,"v":"a"} -',
        'insert m {"id":7} - {"id":7,"at":2,"v":"b"}',
        'update m {"id":7} {"v":"b"} {"v":"c"}',
    ]


def test_rows_are_told_under_the_roots_name_whatever_the_level_and_wherever_they_are_written(parts: Shop) -> None:
    parts.run("insert into m values (1, 5, 'a'), (2, 11, 'b'), (3, 19, 'c')")
    parts.run("insert into m1 values (4, 6, 'd')")
    parts.run("insert into m2 values (5, 12, 'e')")
    parts.run("insert into m2d values (6, 15, 'f')")
    parts.run("update m1 set v = 'x' where id = 4")
    parts.run("update m set at = 19 where id = 5")
    parts.run("delete from m2a")
    parts.run("delete from m2 where id = 6")
    assert told(parts) == [
        'insert m {"id":1,"at":5} - {"id":1,"at":5,"v":"a"}',
        'insert m {"id":2,"at":11} - {"id":2,"at":11,"v":"b"}',
        'insert m {"id":3,"at":19} - {"id":3,"at":19,"v":"c"}',
        'insert m {"id":4,"at":6} - {"id":4,"at":6,"v":"d"}',
        'insert m {"id":5,"at":12} - {"id":5,"at":12,"v":"e"}',
        'insert m {"id":6,"at":15} - {"id":6,"at":15,"v":"f"}',
        'update m {"id":4,"at":6} {"v":"d"} {"v":"x"}',
        'delete m {"id":5,"at":12} {"id":5,"at":12,"v":"e"} -',
        'insert m {"id":5,"at":19} - {"id":5,"at":19,"v":"e"}',
        'delete m {"id":2,"at":11} {"id":2,"at":11,"v":"b"} -',
        'delete m {"id":6,"at":15} {"id":6,"at":15,"v":"f"} -',
    ]


def test_attaching_and_detaching_move_rows_without_a_word(parts: Shop) -> None:
    parts.run("create table m3 (v text, gone text, at int not null, id int not null)")
    parts.run("alter table m3 drop gone")
    parts.run("insert into m3 values ('old', 25, 1)")
    parts.run("alter table m attach partition m3 for values from (20) to (30)")
    parts.run("insert into m values (2, 25, 'new')")
    parts.run("update m set v = 'seen' where id = 1")
    parts.run("alter table m detach partition m3")
    parts.run("update m3 set v = 'unseen'")
    parts.run("insert into m3 values ('unseen', 26, 3)")
    # Its columns stand in an order of their own.
    assert told(parts) == [
        'insert m {"id":2,"at":25} - {"v":"new","at":25,"id":2}',
        'update m {"id":1,"at":25} {"v":"old"} {"v":"seen"}',
    ]


def test_a_captured_table_cannot_be_attached_to_a_captured_one_before_it_is_released(parts: Shop) -> None:
    parts.run("create table m3 (id int, at int, v text, primary key (id, at))")
    parts.capture("m3")
    parts.run("insert into m3 values (1, 25, 'own')")
    with pytest.raises(psycopg2.errors.DuplicateObject, match="00_cdc_capture"):
        parts.run("alter table m attach partition m3 for values from (20) to (30)")
    parts.run("select cdc.disable_capture('m3')")
    parts.run("alter table m attach partition m3 for values from (20) to (30)")
    parts.run("update m3 set v = 'of m'")
    assert told(parts) == [
        'insert m3 {"id":1,"at":25} - {"id":1,"at":25,"v":"own"}',
        'update m {"id":1,"at":25} {"v":"own"} {"v":"of m"}',
    ]


def test_truncating_the_root_is_one_event_and_truncating_a_leaf_none(parts: Shop) -> None:
    parts.run("insert into m values (1, 5), (2, 11)")
    parts.run("truncate m1")
    parts.run("truncate m2")
    parts.run("insert into m values (3, 5)")
    parts.run("truncate m")
    assert told(parts) == [
        'insert m {"id":1,"at":5} - {"id":1,"at":5,"v":null}',
        'insert m {"id":2,"at":11} - {"id":2,"at":11,"v":null}',
        'insert m {"id":3,"at":5} - {"id":3,"at":5,"v":null}',
        "truncate m - - -",
    ]


def test_partitions_that_come_later_are_captured_and_dropped_ones_go_without_a_word(parts: Shop) -> None:
    parts.run("create table m3 partition of m default")
    parts.run("insert into m values (1, 99)")
    parts.run("drop table m3")
    parts.run("create table m4 partition of m for values from (30) to (40) partition by hash (id)")
    parts.run("create table m4a partition of m4 for values with (modulus 1, remainder 0)")
    parts.run("insert into m values (1, 35)")
    assert told(parts) == [
        'insert m {"id":1,"at":99} - {"id":1,"at":99,"v":null}',
        'insert m {"id":1,"at":35} - {"id":1,"at":35,"v":null}',
    ]


def test_a_move_that_a_trigger_of_the_new_partition_refuses_is_a_delete(shop: Shop) -> None:
    shop.run("create table m (id int, at int) partition by list (at)")
    shop.run("create table m1 partition of m for values in (1); create table m2 partition of m for values in (2)")
    shop.run("create function refuse() returns trigger language plpgsql as $$ begin return null; end $$")
    shop.run("create trigger refuse before insert on m2 for each row execute function refuse()")
    shop.capture("m", key=["id"])
    shop.run("insert into m values (1, 1)")
    shop.run("update m set at = 2")
    assert shop.one("select count(*) from m") == 0
    assert told(shop) == ['insert m {"id":1} - {"id":1,"at":1}', 'delete m {"id":1} {"id":1,"at":1} -']


# -- inheritance --------------------------------------------------------------------------------------------------


def test_a_table_that_inherits_is_a_table_of_its_own(shop: Shop) -> None:
    shop.run("create table animal (id int primary key, name text)")
    shop.run("create table dog (tricks int, primary key (id)) inherits (animal)")
    shop.capture("animal")
    shop.run("insert into animal values (1, 'cat'); insert into dog values (2, 'rex', 3)")
    shop.run("update animal set name = upper(name)")  # both
    shop.capture("dog")
    shop.run("update animal set name = lower(name)")
    shop.run("delete from only animal")
    shop.run("truncate animal")  # both
    assert told(shop) == [
        'insert animal {"id":1} - {"id":1,"name":"cat"}',
        'update animal {"id":1} {"name":"cat"} {"name":"CAT"}',
        'update animal {"id":1} {"name":"CAT"} {"name":"cat"}',
        'update dog {"id":2} {"name":"REX"} {"name":"rex"}',
        'delete animal {"id":1} {"id":1,"name":"cat"} -',
        "truncate animal - - -",
        "truncate dog - - -",
    ]


# -- foreign keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "after_update", "after_delete"),
    [
        (
            "on update cascade on delete cascade",
            'update child {"id":7} {"parent":1} {"parent":2}',
            'delete child {"id":7} {"id":7,"parent":2} -',
        ),
        (
            "on update set null on delete set null",
            'update child {"id":7} {"parent":1} {"parent":null}',
            'update child {"id":7} {"parent":2} {"parent":null}',
        ),
        (
            "on update set default on delete set default",
            'update child {"id":7} {"parent":1} {"parent":0}',
            'update child {"id":7} {"parent":2} {"parent":0}',
        ),
    ],
    ids=["cascade", "set null", "set default"],
)
@pytest.mark.parametrize("deferred", ["", "deferrable initially deferred"], ids=["at once", "deferred"])
def test_what_a_foreign_key_does_to_the_child_is_told_after_the_parent(
    shop: Shop, action: str, after_update: str, after_delete: str, deferred: str
) -> None:
    shop.run("create table parent (id int primary key); insert into parent values (0), (1)")
    shop.run(
        f"create table child (id int primary key, parent int default 0 references parent {action} {deferred});"
        " insert into child values (7, 1)"
    )
    shop.capture("parent")
    shop.capture("child")
    shop.run("update parent set id = 2 where id = 1")
    shop.run("update child set parent = 2")
    updated = told(shop)
    assert updated[:2] == ['update parent {"id":2} {"id":1} {"id":2}', after_update]
    shop.run("delete from parent where id = 2")
    assert told(shop) == ['delete parent {"id":2} {"id":2} -', after_delete]


def test_a_tree_that_deletes_itself_is_told_branch_by_branch(shop: Shop) -> None:
    shop.run("create table node (id int primary key, above int references node on delete cascade)")
    shop.capture("node")
    shop.run("insert into node values (1, null), (2, 1), (3, 2)")
    shop.run("delete from node where id = 1")
    assert told(shop)[3:] == [
        'delete node {"id":1} {"id":1,"above":null} -',
        'delete node {"id":2} {"id":2,"above":1} -',
        'delete node {"id":3} {"id":3,"above":2} -',
    ]


def test_a_child_that_comes_before_its_parent_is_told_in_the_order_of_writing(shop: Shop) -> None:
    shop.run("create table parent (id int primary key)")
    shop.run("create table child (id int primary key, p int references parent deferrable initially deferred)")
    shop.capture("parent")
    shop.capture("child")
    shop.run("begin; insert into child values (1, 1); insert into parent values (1); commit")
    shop.run("truncate parent cascade")
    assert told(shop) == [
        'insert child {"id":1} - {"id":1,"p":1}',
        'insert parent {"id":1} - {"id":1}',
        "truncate parent - - -",
        "truncate child - - -",
    ]


# -- triggers, rules and views of others ------------------------------------------------------------------------------


def trigger(shop: Shop, name: str, when: str, body: str, table: str = "t") -> None:
    shop.run(f"create function {name}() returns trigger language plpgsql as $$ begin {body} end $$")
    shop.run(f"create trigger {name} {when} on {table} for each row execute function {name}()")


@pytest.fixture
def plain(shop: Shop) -> Shop:
    shop.run("create table t (id int primary key, v text, n int default 0)")
    shop.capture("t")
    return shop


def test_what_a_trigger_before_the_write_makes_of_a_row_is_what_is_told(plain: Shop) -> None:
    trigger(plain, "shout", "before insert or update", "new.v := upper(new.v); return new;")
    plain.run("insert into t values (1, 'a')")
    plain.run("update t set v = 'a'")  # no change, after all
    plain.run("update t set v = 'b'")
    assert told(plain) == [
        'insert t {"id":1} - {"id":1,"v":"A","n":0}',
        'update t {"id":1} {"v":"A"} {"v":"B"}',
    ]


def test_a_write_that_a_trigger_swallows_is_none(plain: Shop) -> None:
    trigger(plain, "swallow", "before insert or update or delete", "return null;")
    plain.run("insert into t values (1, 'a')")
    assert told(plain) == []


@pytest.mark.parametrize("name", ["aaa", "01", "00_d", "00_"])
def test_a_trigger_that_writes_to_its_own_row_is_told_after_what_set_it_off(plain: Shop, name: str) -> None:
    plain.run(
        "create function count_up() returns trigger language plpgsql as"
        " $$ begin if new.n < 2 then update t set n = n + 1 where id = new.id; end if; return null; end $$"
    )
    plain.run(f'create trigger "{name}" after insert or update on t for each row execute function count_up()')
    plain.run("insert into t values (1, 'a')")
    expected = [
        'insert t {"id":1} - {"id":1,"v":"a","n":0}',
        'update t {"id":1} {"n":0} {"n":1}',
        'update t {"id":1} {"n":1} {"n":2}',
    ]
    found = told(plain)
    if name < "00_cdc_":  # then the last comes first
        assert found == expected[::-1]
        return
    assert found == expected


def test_a_trigger_that_writes_elsewhere_is_told_after_what_set_it_off(plain: Shop) -> None:
    plain.run("create table log (id int generated always as identity primary key, what text)")
    plain.capture("log")
    trigger(plain, "note", "after insert", "insert into log (what) values (new.v); return null;")
    plain.run("insert into t values (1, 'a'), (2, 'b')")
    assert told(plain) == [
        'insert t {"id":1} - {"id":1,"v":"a","n":0}',
        'insert log {"id":1} - {"id":1,"what":"a"}',
        'insert t {"id":2} - {"id":2,"v":"b","n":0}',
        'insert log {"id":2} - {"id":2,"what":"b"}',
    ]


def test_a_deferred_trigger_writes_at_the_end_and_is_told_so(plain: Shop) -> None:
    plain.run(
        "create function finish() returns trigger language plpgsql as"
        " $$ begin update t set v = 'done' where id = new.id; return null; end $$"
    )
    plain.run(
        "create constraint trigger finish after insert on t deferrable initially deferred for each row"
        " execute function finish()"
    )
    plain.run("begin; insert into t values (1, 'a'); insert into t values (2, 'b'); commit")
    assert told(plain) == [
        'insert t {"id":1} - {"id":1,"v":"a","n":0}',
        'insert t {"id":2} - {"id":2,"v":"b","n":0}',
        'update t {"id":1} {"v":"a"} {"v":"done"}',
        'update t {"id":2} {"v":"b"} {"v":"done"}',
    ]


def test_an_error_in_a_later_trigger_leaves_nothing(plain: Shop) -> None:
    trigger(plain, "zz_fail", "after insert", "raise exception 'no'; return null;")
    with pytest.raises(psycopg2.errors.RaiseException):
        plain.run("insert into t values (1, 'a')")
    assert told(plain) == []


def test_a_write_through_a_view_or_a_rule_is_told_of_the_table(plain: Shop) -> None:
    plain.run("create view simple as select id, v from t where id > 0 with check option")
    plain.run("insert into simple values (1, 'a'); update simple set v = 'b'; delete from simple")
    plain.run("create view odd as select id, v || '!' as v from t")
    trigger(plain, "through", "instead of insert", "insert into t values (new.id, new.v); return new;", "odd")
    plain.run("insert into odd values (2, 'c')")
    plain.run("create table inbox (id int, v text)")
    plain.run("create rule pass_on as on insert to inbox do instead insert into t values (new.id, new.v)")
    plain.run("insert into inbox values (3, 'd')")
    assert told(plain) == [
        'insert t {"id":1} - {"id":1,"v":"a","n":0}',
        'update t {"id":1} {"v":"a"} {"v":"b"}',
        'delete t {"id":1} {"id":1,"v":"b","n":0} -',
        'insert t {"id":2} - {"id":2,"v":"c","n":0}',
        'insert t {"id":3} - {"id":3,"v":"d","n":0}',
    ]


# -- ways of writing --------------------------------------------------------------------------------------------------


def test_a_merge_is_told_by_what_it_does_to_each_row(plain: Shop) -> None:
    needs(plain, 15)
    plain.run("insert into t values (1, 'a'), (2, 'b'), (3, 'c')")
    told(plain)
    plain.run("""
        merge into t using (values (1, 'x'), (2, null), (3, 'c'), (4, 'd'), (5, 'no')) as s (id, v) on t.id = s.id
        when matched and s.v is null then delete
        when matched and s.v = t.v then do nothing
        when matched then update set v = s.v
        when not matched and s.v = 'no' then do nothing
        when not matched then insert (id, v) values (s.id, s.v)
    """)
    assert sorted(told(plain)) == [
        'delete t {"id":2} {"id":2,"v":"b","n":0} -',
        'insert t {"id":4} - {"id":4,"v":"d","n":0}',
        'update t {"id":1} {"v":"a"} {"v":"x"}',
    ]


def test_a_merge_that_reaches_rows_without_a_source_tells_of_them(plain: Shop) -> None:
    needs(plain, 17)
    plain.run("insert into t values (1, 'a'), (2, 'b')")
    told(plain)
    plain.run("""
        merge into t using (values (1)) as s (id) on t.id = s.id
        when not matched by source then delete
        when matched then update set n = 9
    """)
    assert sorted(told(plain)) == [
        'delete t {"id":2} {"id":2,"v":"b","n":0} -',
        'update t {"id":1} {"n":0} {"n":9}',
    ]


def test_a_merge_over_partitions_moves_rows(parts: Shop) -> None:
    needs(parts, 15)
    parts.run("insert into m values (1, 5, 'a')")
    told(parts)
    parts.run("""
        merge into m using (values (1, 11), (2, 15)) as s (id, at) on m.id = s.id
        when matched then update set at = s.at
        when not matched then insert values (s.id, s.at, 'new')
    """)
    assert told(parts) == [
        'delete m {"id":1,"at":5} {"id":1,"at":5,"v":"a"} -',
        'insert m {"id":1,"at":11} - {"id":1,"at":11,"v":"a"}',
        'insert m {"id":2,"at":15} - {"id":2,"at":15,"v":"new"}',
    ]


def test_an_upsert_is_what_it_comes_to(plain: Shop) -> None:
    for _ in range(2):
        plain.run("insert into t values (1, 'a') on conflict (id) do update set n = t.n + 1")
        plain.run("insert into t values (1, 'a') on conflict do nothing")
    plain.run("insert into t values (1, 'b'), (2, 'c') on conflict (id) do update set v = excluded.v where t.n > 5")
    assert told(plain) == [
        'insert t {"id":1} - {"id":1,"v":"a","n":0}',
        'update t {"id":1} {"n":0} {"n":1}',
        'insert t {"id":2} - {"id":2,"v":"c","n":0}',
    ]


def test_a_copy_is_an_insert_of_each_row(parts: Shop) -> None:
    set_wait_callback(None)  # psycopg2 does not copy while there is one
    try:
        with parts.writer.cursor() as cursor:
            cursor.copy_expert("copy m (id, v, at) from stdin", io.StringIO("1\ta\t5\n2\t\\N\t11\n"))
            cursor.copy_expert("copy m1 from stdin with (format csv)", io.StringIO("3,6,c\n"))
    finally:
        set_wait_callback(_wait)
    assert told(parts) == [
        'insert m {"id":1,"at":5} - {"id":1,"at":5,"v":"a"}',
        'insert m {"id":2,"at":11} - {"id":2,"at":11,"v":null}',
        'insert m {"id":3,"at":6} - {"id":3,"at":6,"v":"c"}',
    ]


def test_several_writes_in_one_statement_are_told_in_the_order_they_were_made(plain: Shop) -> None:
    plain.run("create table u (id int primary key, v text); insert into u values (1, 'old'), (2, 'old')")
    plain.capture("u")
    plain.run("""
        with gone as (delete from u where id = 1 returning *),
             moved as (insert into t select id, v from gone returning *)
        update u set v = moved.v || '!' from moved
    """)
    assert told(plain) == [
        'delete u {"id":1} {"id":1,"v":"old"} -',
        'insert t {"id":1} - {"id":1,"v":"old","n":0}',
        'update u {"id":2} {"v":"old"} {"v":"old!"}',
    ]


def test_a_statement_that_is_undone_halfway_leaves_what_was_not(plain: Shop) -> None:
    plain.run("""
        begin;
        insert into t values (1, 'a');
        savepoint one; insert into t values (2, 'b'); savepoint two; update t set v = 'x'; rollback to one;
        do $$ begin
          insert into t values (3, 'c');
          begin insert into t values (4, 'd'); perform 1 / 0; exception when division_by_zero then null; end;
        end $$;
        commit
    """)
    assert told(plain) == [
        'insert t {"id":1} - {"id":1,"v":"a","n":0}',
        'insert t {"id":3} - {"id":3,"v":"c","n":0}',
    ]


def test_a_thousand_changes_of_one_row_are_a_thousand_events_in_order(plain: Shop) -> None:
    plain.run("insert into t values (1, 'a')")
    plain.run("do $$ begin for i in 1..1000 loop update t set n = 1 - n; end loop; end $$")
    assert told(plain)[1:] == ['update t {"id":1} {"n":0} {"n":1}', 'update t {"id":1} {"n":1} {"n":0}'] * 500


def test_changes_of_the_tables_own_definition_are_no_events(plain: Shop) -> None:
    plain.run("insert into t values (1, 'a')")
    plain.run("alter table t add w int default 7, alter n type bigint, alter v set not null")
    plain.run("cluster t using t_pkey")
    plain.run("vacuum full t")
    plain.run("update t set w = 8")
    assert told(plain) == ['insert t {"id":1} - {"id":1,"v":"a","n":0}', 'update t {"id":1} {"w":7} {"w":8}']


def test_replicated_writes_are_told_where_asked_for(plain: Shop) -> None:
    plain.run("create table u (id int primary key)")
    plain.capture("u", always=True)
    plain.run("set session_replication_role = replica")
    plain.run("insert into t values (1); truncate t; insert into u values (1); update u set id = 2; truncate u")
    plain.run("reset session_replication_role")
    plain.run("insert into u values (3)")
    assert told(plain) == [
        'insert u {"id":1} - {"id":1}',
        'update u {"id":2} {"id":1} {"id":2}',
        "truncate u - - -",
        'insert u {"id":3} - {"id":3}',
    ]


def test_partitions_that_come_later_are_told_of_replicated_writes_too(shop: Shop) -> None:
    shop.run(PARTS)
    shop.capture("m", always=True)
    shop.run("create table m3 partition of m for values from (20) to (30)")
    shop.run("create table m4 (like m including all); alter table m attach partition m4 for values from (30) to (40)")
    shop.run("set session_replication_role = replica; insert into m values (1, 5), (2, 25), (3, 35)")
    assert len(told(shop)) == 3


def test_row_security_hides_nothing_from_capture(plain: Shop) -> None:
    plain.run("alter table t enable row level security; alter table t force row level security")
    plain.run("drop role if exists cdc_test_tenant; create role cdc_test_tenant; grant all on t to cdc_test_tenant")
    plain.run("create policy own on t using (id < 10) with check (true)")
    try:
        plain.run("set role cdc_test_tenant; insert into t values (50, 'x'); reset role")
        assert told(plain) == ['insert t {"id":50} - {"id":50,"v":"x","n":0}']
    finally:
        plain.run("reset role; drop owned by cdc_test_tenant; drop role cdc_test_tenant")


# -- shapes -------------------------------------------------------------------------------------------------------


def test_a_table_may_have_no_columns_and_as_many_as_postgresql_takes(shop: Shop) -> None:
    shop.run("create table none ()")
    shop.capture("none")
    shop.run("insert into none default values")
    shop.run("delete from none")
    assert told(shop) == ["insert none - - {}", "delete none - {} -"]
    names = [f"c{i}" for i in range(1599)]
    shop.run(f"create table many (id int primary key, {', '.join(f'{name} int' for name in names)})")
    shop.capture("many")
    shop.run("insert into many (id, c1598) values (1, 7)")
    shop.run("update many set c0 = 1")
    inserted, updated = told(shop)
    assert inserted.startswith('insert many {"id":1} - {"id":1,"c0":null,')
    assert inserted.endswith(',"c1597":null,"c1598":7}')
    assert updated == 'update many {"id":1} {"c0":null} {"c0":1}'


REFUSED = {
    "an unlogged table": (
        "create unlogged table odd (id int)",
        "it is unlogged, and a crash empties it without an event",
    ),
    "a temporary table": ("create temp table odd (id int)", "it is temporary"),
    "a view": ("create view odd as select 1 as id", "it is a view (name the tables below it)"),
    "a materialized view": (
        "create materialized view odd as select 1 as id",
        "it is a materialized view (name the tables below it)",
    ),
    "a partition": (
        "create table roots (id int) partition by list (id); create table odd partition of roots default",
        "it is a partition (name the partitioned table itself)",
    ),
    "a sequence": ("create sequence odd", "it is not a table"),
    "an index": ("create table roots (id int); create index odd on roots (id)", "it is not a table"),
    "a type": ("create type odd as (id int)", "it is not a table"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_table_to_capture_is_refused_with_the_reason(shop: Shop, case: str) -> None:
    statement, reason = REFUSED[case]
    shop.run(statement)
    with pytest.raises(psycopg2.errors.WrongObjectType) as refused:
        shop.capture("odd")
    assert str(refused.value.diag.message_primary).endswith(f"odd cannot be captured: {reason}")


def test_a_foreign_table_is_refused_with_the_reason(shop: Shop) -> None:
    shop.run("create foreign data wrapper nothing; create server nowhere foreign data wrapper nothing")
    shop.run("create foreign table odd (id int) server nowhere")
    with pytest.raises(psycopg2.errors.WrongObjectType, match=r"it is a foreign table \(capture it where it lives\)"):
        shop.capture("odd")


def test_a_captured_table_that_becomes_unlogged_is_no_longer_captured_as_it_should(plain: Shop) -> None:
    plain.run("alter table t set unlogged")
    with pytest.raises(psycopg2.errors.WrongObjectType, match="it is unlogged"):
        plain.capture("t")


# -- transaction ids ----------------------------------------------------------------------------------------------


def test_a_hundred_thousand_rows_take_one_transaction_id(plain: Shop) -> None:
    def next_id() -> int:
        return int(str(plain.one("select pg_snapshot_xmax(pg_current_snapshot())")))

    before = next_id()
    plain.run("insert into t select i, 'new' from generate_series(1, 100000) i")
    plain.run("update t set v = 'changed'")
    plain.run("delete from t")
    taken = next_id() - before
    # Each row of the book says in which transaction or savepoint it was written.
    plain.run(
        "create temp table written as select count(*) as events, count(distinct xmin::text) as ids from cdc.event"
    )
    assert plain.one("select events from written") == 300_000
    assert plain.one("select ids from written") == 3
    assert taken < 50  # the server's own housekeeping takes some
