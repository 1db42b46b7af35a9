"""The book: what a window shows and when, how it is paged, resumed, fenced, decoded, and how its space comes back."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import connection

from cdc import outbox
from cdc.connection import Connection
from cdc.decoding import Unreadable
from cdc.errors import DatabaseUnreachable, Fenced, Undecodable
from cdc.event import Event, Op
from cdc.outbox import Batch, Outbox, Owner

PLENTY = 1 << 40
TURN = 1 << 24
DAY = 86400.0

Connect = Callable[..., connection]


def fetch(conn: connection, statement: str, parameters: object = None) -> list[tuple[Any, ...]]:
    with conn.cursor() as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


def value(conn: connection, statement: str, parameters: object = None) -> Any:
    return fetch(conn, statement, parameters)[0][0]


class Reader:
    """One life of a sink's owner: a session and a claim."""

    def __init__(self, dsn: str, sink: str = "audit", start: str = "earliest", *, stores_windows: bool = True) -> None:
        self.connection = Connection(dsn, purpose=sink)
        owner = Owner("test", 1)
        self.outbox = Outbox(self.connection, database="shop", sink=sink, owner=owner, stores_windows=stores_windows)
        assert self.outbox.claim(start=start)

    def page(self, acked: int | None = None, *, events: int = 100_000, bytes_: int = PLENTY) -> list[Event]:
        return readable(self.outbox.next_batch(acked, events=events, bytes_=bytes_))

    def everything(self, *, events: int = 100_000) -> list[Event]:
        """All there is, acknowledged page by page."""
        return self.everything_after([], events=events)

    def everything_after(self, page: list[Event], *, events: int = 100_000) -> list[Event]:
        """The same, with a page in hand."""
        got: list[Event] = []
        acked = page[-1].source.seq if page else None
        while page := self.page(acked, events=events):
            got += page
            acked = page[-1].source.seq
        return got


def readable(batch: Batch | None) -> list[Event]:
    if batch is None:
        return []
    events = [event for event in batch.events if isinstance(event, Event)]
    assert len(events) == len(batch.events)
    assert batch.last_seq == events[-1].source.seq
    return events


def seqs(events: Sequence[Event]) -> list[int]:
    return [event.source.seq for event in events]


def ids(events: Sequence[Event]) -> list[int]:
    return [event.key["id"] for event in events if event.key is not None]


@pytest.fixture
def shop(installed: str, connect: Connect) -> connection:
    """A writer; table item (id, v) is captured."""
    conn = connect(installed)
    fetch(conn, "create table item (id integer primary key, v integer); select cdc.enable_capture('item')")
    return conn


@pytest.fixture
def session(installed: str, connect: Connect) -> Callable[[], connection]:
    """``session()`` opens a writer whose transactions end when told."""
    return lambda: connect(installed, autocommit=False)


@pytest.fixture(params=["stored", "not stored"])
def read(installed: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., Reader]]:
    """``read(sink="audit", start="earliest")`` claims a sink; its windows are stored before use, or not."""
    readers: list[Reader] = []

    def claim(sink: str = "audit", start: str = "earliest") -> Reader:
        readers.append(Reader(installed, sink, start, stores_windows=request.param == "stored"))
        return readers[-1]

    yield claim
    for reader in readers:
        reader.connection.close()


def kill(conn: connection, reader: Reader) -> None:
    """End a reader's server process, and wait until its locks are free."""
    deadline = time.monotonic() + 10
    fetch(conn, "select pg_terminate_backend(%s)", (reader.connection.pid,))
    while value(conn, "select exists (select from pg_stat_activity where pid = %s)", (reader.connection.pid,)):
        assert time.monotonic() < deadline


def position_row(conn: connection) -> tuple[Any, ...]:
    return fetch(conn, "select xmin, ctid, p.* from cdc.position p")[0]


# -- an idle look -------------------------------------------------------------------------------------------------


def test_nothing_to_read_is_none_and_writes_nothing(shop: connection, read: Callable[..., Reader]) -> None:
    reader = read()
    before = position_row(shop)
    for acked in (None, 0, 5, None):
        assert reader.outbox.next_batch(acked, events=10, bytes_=1000) is None
    assert position_row(shop) == before


def test_an_idle_look_takes_no_transaction_id(shop: connection, session: Callable[[], connection]) -> None:
    one = session()
    fetch(one, "insert into cdc.sink (name, system_identifier, timeline) values ('s', 1, 1)")
    fetch(one, "insert into cdc.position (sink, epoch, snap_lo) values ('s', 0, '3:3:')")
    one.commit()
    assert fetch(one, "select * from cdc.next_batch('s', 0, null, 10, 1000)") == []
    assert value(one, "select pg_current_xact_id_if_assigned()") is None


def test_when_the_end_is_acknowledged_the_next_looks_write_nothing_either(
    shop: connection, read: Callable[..., Reader]
) -> None:
    fetch(shop, "insert into item select i, 0 from generate_series(1, 10) i")
    reader = read()
    assert len(reader.everything(events=5)) == 10
    before = position_row(shop)
    assert reader.page() == []
    assert position_row(shop) == before


def test_other_peoples_transactions_cost_an_idle_sink_nothing(shop: connection, read: Callable[..., Reader]) -> None:
    fetch(shop, "create table other (i integer)")
    reader = read()
    before = position_row(shop)
    for _ in range(20):
        fetch(shop, "insert into other values (1)")
        assert reader.page() == []
    assert position_row(shop) == before


# -- a transaction that stays open --------------------------------------------------------------------------------


def test_what_a_transaction_that_stays_open_keeps_of_the_position_makes_no_batch_slower(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader]
) -> None:
    """Counted in pages, not in seconds: of the position's dead versions, which nobody can clear away meanwhile."""
    fetch(session(), "select pg_current_xact_id()")  # stays open
    reader = read()
    fetch(shop, "insert into item values (1, 0)")
    assert ids(reader.page()) == [1]
    many = (
        "do $$ begin for i in 1..20000 loop update cdc.position set delivered_at = clock_timestamp(); end loop; end $$"
    )
    fetch(shop, many)
    fetch(shop, "insert into item values (2, 0)")
    found = reader.page(value(shop, "select min(seq) from cdc.event"))  # finds the row again
    assert ids(found) == [2]
    fetch(shop, "insert into item values (3, 0)")

    def pages(acked: int) -> int:
        ((plan,),) = reader.connection.query(
            "explain (analyze, buffers, format json)"
            " select * from cdc.next_batch('audit', %(epoch)s, %(acked)s, 9, 999)",
            {"epoch": reader.outbox.epoch, "acked": acked},
        )
        assert plan[0]["Plan"]["Actual Rows"] == 1
        return plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"]

    assert pages(found[0].source.seq) < 100
    reader.connection.execute("set cdc.position_at = ''")  # as if it remembered nothing
    assert pages(found[0].source.seq) > 200


# -- windows ------------------------------------------------------------------------------------------------------


def test_one_round_trip_acknowledges_and_reads_on(shop: connection, read: Callable[..., Reader]) -> None:
    fetch(shop, "insert into item select i, 0 from generate_series(1, 5) i")
    reader = read()
    first = reader.page(events=2)
    second = reader.page(first[-1].source.seq, events=2)
    assert ids(first) == [1, 2]
    assert ids(second) == [3, 4]
    assert value(shop, "select last_seq from cdc.position") == first[-1].source.seq
    assert value(shop, "select delivered_at from cdc.position") is not None
    assert ids(reader.page(second[-1].source.seq, events=2)) == [5]


def test_what_is_not_acknowledged_comes_again(shop: connection, read: Callable[..., Reader]) -> None:
    fetch(shop, "insert into item select i, 0 from generate_series(1, 5) i")
    reader = read()
    first = reader.page(events=3)
    assert reader.page(events=3) == first
    assert ids(reader.page(first[0].source.seq, events=3)) == [2, 3, 4]


@pytest.fixture
def unstored(installed: str, shop: connection) -> Iterator[Callable[..., tuple[Reader, list[Event]]]]:
    """``unstored(5)`` inserts rows 1 to 5 and reads them: a reader, and a page whose window is not stored."""
    readers: list[Reader] = []

    def begin(rows: int) -> tuple[Reader, list[Event]]:
        reader = Reader(installed, stores_windows=False)
        readers.append(reader)
        for _ in range(10):  # somebody else, such as a checkpoint, may just have written something not on disk yet
            fetch(shop, "insert into item select i, 0 from generate_series(1, %s) i", (rows,))
            page = reader.page()
            assert ids(page) == list(range(1, rows + 1))
            if value(shop, "select snap_hi is null from cdc.position"):
                return reader, page
            fetch(shop, "delete from item")
            reader.everything_after(page)
        raise AssertionError("every window is stored")

    yield begin
    for reader in readers:
        reader.connection.close()


def test_a_window_that_is_on_disk_is_not_stored_before_it_is_acknowledged(
    shop: connection, unstored: Callable[..., tuple[Reader, list[Event]]]
) -> None:
    reader, page = unstored(5)
    position = "select ctid, p.* from cdc.position p"
    before = fetch(shop, position)
    assert reader.page() == page
    assert fetch(shop, position) == before
    assert reader.page(page[1].source.seq) == page[2:]
    assert fetch(shop, "select snap_hi is not null, last_seq, final_seq from cdc.position") == [
        (True, page[1].source.seq, page[4].source.seq)
    ]
    assert reader.page(page[4].source.seq) == []
    assert fetch(shop, "select snap_hi, last_seq from cdc.position") == [(None, 0)]
    assert reader.page() == []
    fetch(shop, "insert into item values (6, 0)")
    assert ids(reader.page()) == [6]


@pytest.mark.parametrize("acknowledged", [2, 5])
def test_a_window_that_is_not_stored_is_acknowledged_by_a_last_word_too(
    shop: connection, unstored: Callable[..., tuple[Reader, list[Event]]], acknowledged: int
) -> None:
    reader, page = unstored(5)
    reader.outbox.acknowledge(page[acknowledged - 1].source.seq)
    fetch(shop, "insert into item values (6, 0)")
    kill(shop, reader)
    again = Reader(shop.dsn, stores_windows=False)
    assert ids(again.everything()) == list(range(acknowledged + 1, 7))
    again.connection.close()


def test_a_window_that_is_not_stored_comes_again_with_what_has_come_meanwhile(
    shop: connection, session: Callable[[], connection], unstored: Callable[..., tuple[Reader, list[Event]]]
) -> None:
    late = session()
    fetch(late, "insert into item values (0, 0)")
    reader, _ = unstored(3)
    late.commit()
    fetch(shop, "update item set v = 1 where id = 2")
    kill(shop, reader)
    again = Reader(shop.dsn, stores_windows=False)
    assert [(event.key or {})["id"] for event in again.everything()] == [0, 1, 2, 3, 2]
    again.connection.close()


def test_a_window_that_is_not_on_disk_yet_is_stored(shop: connection, installed: str) -> None:
    reader = Reader(installed, stores_windows=False)
    fetch(shop, "set synchronous_commit = off")
    for id_ in range(1, 11):  # the WAL writer may be faster, once
        fetch(shop, "insert into item values (%s, 0)", (id_,))
        page = reader.page()
        assert ids(page) == [id_]
        if value(shop, "select snap_hi is not null from cdc.position"):
            break
        reader.page(page[-1].source.seq)
    else:
        raise AssertionError("no window is stored")
    reader.connection.close()


def test_an_older_acknowledgement_takes_nothing_back(shop: connection, read: Callable[..., Reader]) -> None:
    fetch(shop, "insert into item select i, 0 from generate_series(1, 5) i")
    reader = read()
    first = reader.page(events=3)
    reader.page(first[2].source.seq, events=1)
    assert ids(reader.page(first[0].source.seq, events=1)) == [4]


def test_a_window_is_ordered_by_seq_whatever_the_order_of_commits(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader]
) -> None:
    writers = [session() for _ in range(3)]
    for id_ in range(1, 10):
        fetch(writers[id_ % 3], "insert into item values (%s, 0)", (id_,))
    for writer in reversed(writers):
        writer.commit()
    assert ids(read().page()) == list(range(1, 10))


def test_an_open_transaction_holds_nobody_else_up_and_comes_after_its_commit(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader]
) -> None:
    reader = read()
    early, middle, late = session(), session(), session()
    fetch(early, "insert into item values (1, 0)")
    fetch(shop, "insert into item values (2, 0)")
    fetch(middle, "insert into item values (3, 0)")
    fetch(shop, "insert into item values (4, 0)")
    fetch(late, "insert into item values (5, 0)")
    assert ids(reader.everything()) == [2, 4]
    fetch(middle, "insert into item values (6, 0)")
    middle.commit()  # began before the last window, its xid amid the others
    assert ids(reader.everything()) == [3, 6]
    fetch(shop, "insert into item values (7, 0)")
    late.commit()
    assert ids(reader.everything()) == [5, 7]
    early.commit()
    assert ids(reader.everything()) == [1]
    assert reader.page() == []


def test_a_transaction_older_than_the_sink_is_delivered_when_it_commits_later(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader]
) -> None:
    early = session()
    fetch(early, "insert into item values (1, 0)")
    fetch(shop, "insert into item values (2, 0)")
    reader = read(start="now")
    assert reader.page() == []
    early.commit()
    assert ids(reader.everything()) == [1]


def test_a_row_changed_by_an_older_transaction_later_keeps_its_order(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader]
) -> None:
    reader = read()
    early = session()
    fetch(early, "insert into item values (100, 0)")  # takes the lower xid
    fetch(shop, "insert into item values (1, 1)")
    fetch(shop, "update item set v = 2 where id = 1")
    fetch(early, "update item set v = 3 where id = 1")
    assert [(e.op, e.after["v"]) for e in reader.everything() if e.after] == [(Op.INSERT, 1), (Op.UPDATE, 2)]
    early.commit()
    last = reader.everything()
    assert [(e.key["id"], e.after["v"]) for e in last if e.key and e.after] == [(100, 0), (1, 3)]
    assert last[0].source.txid == last[1].source.txid


@pytest.mark.parametrize("events", [1, 2, 100])
def test_one_window_orders_a_row_by_seq_though_its_xids_run_the_other_way(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader], events: int
) -> None:
    reader = read()
    early = session()
    fetch(early, "insert into item values (100, 0)")
    fetch(shop, "insert into item values (1, 1)")
    fetch(early, "update item set v = 2 where id = 1")
    early.commit()
    fetch(shop, "update item set v = 3 where id = 1")
    assert ids(reader.everything(events=events)) == [100, 1, 1, 1]


def test_rolled_back_rows_never_appear(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader]
) -> None:
    reader = read()
    writer = session()
    fetch(writer, "insert into item values (1, 0)")
    assert reader.page() == []
    writer.rollback()
    assert reader.page() == []
    fetch(writer, "insert into item values (2, 0)")
    fetch(writer, "savepoint a; insert into item values (3, 0); savepoint b; insert into item values (4, 0)")
    fetch(writer, "rollback to a; insert into item values (5, 0); savepoint c; insert into item values (6, 0)")
    fetch(writer, "release c")
    assert reader.page() == []
    writer.commit()
    events = reader.everything()
    assert ids(events) == [2, 5, 6]
    assert len({event.source.txid for event in events}) == 1


def test_a_window_stays_the_same_until_it_is_exhausted(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader]
) -> None:
    open_one = session()
    fetch(open_one, "insert into item values (100, 0)")
    fetch(shop, "insert into item select i, 0 from generate_series(1, 4) i")
    reader = read()
    first = reader.page(events=2)
    snapshots = fetch(shop, "select snap_lo, snap_hi from cdc.position")
    open_one.commit()  # has the lowest seq of all
    fetch(shop, "insert into item values (5, 0)")
    assert ids(reader.page(first[-1].source.seq, events=2)) == [3, 4]
    assert fetch(shop, "select snap_lo, snap_hi from cdc.position") == snapshots
    assert ids(reader.everything()) == [3, 4, 100, 5]


def test_a_new_owner_reads_the_same_window_from_where_it_was_acknowledged(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader]
) -> None:
    open_one = session()
    fetch(open_one, "insert into item values (100, 0)")
    fetch(shop, "insert into item select i, 0 from generate_series(1, 6) i")
    reader = read()
    first = reader.page(events=2)
    lost = reader.page(first[-1].source.seq, events=2)
    snapshots = fetch(shop, "select snap_lo, snap_hi from cdc.position")
    open_one.commit()
    fetch(shop, "insert into item values (7, 0)")
    kill(shop, reader)
    heir = read()
    again = heir.page(events=3)
    assert again[:2] == lost
    assert [event.id for event in again[:2]] == [event.id for event in lost]
    assert ids(again) == [3, 4, 5]
    assert fetch(shop, "select snap_lo, snap_hi from cdc.position") == snapshots
    assert ids(heir.page(again[-1].source.seq)) == [6]
    assert ids(heir.everything()) == [6, 100, 7]


def test_a_new_owner_reads_the_last_page_again_with_smaller_pages(
    shop: connection, read: Callable[..., Reader]
) -> None:
    fetch(shop, "insert into item select i, 0 from generate_series(1, 6) i")
    reader = read()
    reader.page()  # the whole window; its end is known and stored
    fetch(shop, "insert into item values (7, 0)")
    kill(shop, reader)
    assert ids(read().everything(events=4)) == [1, 2, 3, 4, 5, 6, 7]


def test_acknowledging_without_reading_on_is_enough(shop: connection, read: Callable[..., Reader]) -> None:
    fetch(shop, "insert into item select i, 0 from generate_series(1, 6) i")
    reader = read()
    page = reader.page(events=4)
    reader.outbox.acknowledge(page[2].source.seq)
    kill(shop, reader)
    assert ids(read().everything()) == [4, 5, 6]


def test_a_page_ends_with_the_event_that_passes_the_byte_limit(shop: connection, read: Callable[..., Reader]) -> None:
    fetch(shop, "create table doc (id integer primary key, body text); select cdc.enable_capture('doc')")
    for id_, size in enumerate((10, 10, 100_000, 10, 100_000, 100_000, 10), start=1):
        fetch(shop, "insert into doc values (%s, repeat('x', %s))", (id_, size))
    reader = read()
    pages, acked, full = [], None, []
    while batch := reader.outbox.next_batch(acked, events=100, bytes_=50_000):
        pages.append(ids(readable(batch)))
        full.append(batch.full)
        acked = batch.last_seq
    assert pages == [[1, 2, 3], [4, 5], [6], [7]]
    assert full == [True, True, True, False]


def test_a_page_that_ends_at_the_byte_limit_is_full_whatever_the_characters(
    shop: connection, read: Callable[..., Reader]
) -> None:
    fetch(shop, "create table doc (id integer primary key, body text); select cdc.enable_capture('doc')")
    fetch(shop, "insert into doc select i, repeat('é', 40000) from generate_series(1, 2) i")
    batch = read().outbox.next_batch(None, events=100, bytes_=50_000)
    assert batch is not None
    assert len(batch.events) == 1
    assert batch.full


def test_a_page_holds_no_more_events_than_asked_for(shop: connection, read: Callable[..., Reader]) -> None:
    fetch(shop, "insert into item select i, 0 from generate_series(1, 7) i")
    reader = read()
    batch = reader.outbox.next_batch(None, events=7, bytes_=PLENTY)
    assert batch is not None
    assert batch.full  # perhaps more is waiting; nobody can know
    assert reader.outbox.next_batch(batch.last_seq, events=7, bytes_=PLENTY) is None


def test_two_sinks_go_their_own_ways(shop: connection, read: Callable[..., Reader]) -> None:
    fetch(shop, "insert into item select i, 0 from generate_series(1, 4) i")
    one, two = read("one"), read("two")
    assert ids(one.everything()) == [1, 2, 3, 4]
    assert ids(two.page(events=1)) == [1]
    late = read("late", start="now")
    fetch(shop, "insert into item values (5, 0)")
    assert ids(one.everything()) == [5]
    assert ids(late.everything()) == [5]
    assert ids(two.everything()) == [1, 2, 3, 4, 5]


def test_what_an_unreadable_answer_has_acknowledged_is_not_acknowledged_again(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may send a byte that is no character; by then what came before is acknowledged."""
    early = session()
    fetch(early, "insert into item values (1, 0)")
    fetch(shop, "insert into item values (2, 0)")
    reader = read()
    page = reader.page()
    assert ids(page) == [2]
    early.commit()  # with a lower seq than what is acknowledged now, in a window of its own
    real, failures = reader.connection._run, ["the first answer"]

    def run(sql: str, parameters: Any) -> list[tuple[Any, ...]]:
        rows = real(sql, parameters)
        if "cdc.next_batch" in sql and failures:
            failures.clear()
            raise Undecodable("the answer holds bytes that are no characters")
        return rows

    monkeypatch.setattr(reader.connection, "_run", run)
    assert ids(reader.page(page[-1].source.seq)) == [1]
    assert not failures


# -- large windows ------------------------------------------------------------------------------------------------

SMALL = "small constant integer := 5000;"


def always_large(conn: connection) -> None:
    """Let windows of more than two events take the road meant for those of more than 5000."""
    body = value(conn, "select pg_get_functiondef('cdc.next_batch'::regproc)")
    assert SMALL in body
    fetch(conn, body.replace(SMALL, "small constant integer := 2;"))


@pytest.mark.parametrize("events", [700, 5000, 20_000])
def test_a_large_window_amid_old_transactions_comes_whole_and_in_order(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader], events: int
) -> None:
    reader = read()
    olds = [session() for _ in range(4)]
    for number, old in enumerate(olds):
        fetch(old, "insert into item select i, 0 from generate_series(%s, %s) i", (number * 1000, number * 1000 + 299))
    fetch(shop, "insert into item values (-1, 0)")
    assert ids(reader.everything()) == [-1]  # the old ones are now in progress in the lower snapshot
    low = reader.page()
    assert low == []
    never = session()
    for round_ in range(3):
        fetch(shop, "insert into item select i, %s from generate_series(%s, %s) i", (round_, *span(10_000, round_)))
        fetch(never, "insert into item select i, 0 from generate_series(%s, %s) i", span(500_000, round_))
        for number, old in enumerate(olds):
            fetch(old, "update item set v = v + 1 where id between %s and %s", (number * 1000, number * 1000 + 299))
    delivered = value(shop, "select seq from cdc.event where (new_row ->> 'id')::integer = -1")
    olds[0].commit()
    olds[2].rollback()
    olds[3].commit()
    reference = [seq for (seq,) in fetch(shop, "select seq from cdc.event where seq <> %s order by seq", (delivered,))]
    assert len(reference) == 6000 + 2 * 1200
    got = reader.everything(events=events)
    assert seqs(got) == reference
    olds[1].commit()
    never.commit()
    rest = fetch(
        shop, "select seq from cdc.event where seq <> all (%s) and seq <> %s order by seq", (reference, delivered)
    )
    assert seqs(reader.everything(events=events)) == [seq for (seq,) in rest]


def span(start: int, round_: int) -> tuple[int, int]:
    return start + round_ * 2000, start + round_ * 2000 + 1999


def test_a_large_window_resumes_in_its_middle(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader]
) -> None:
    old = session()
    fetch(old, "insert into item values (-1, 0)")
    fetch(shop, "insert into item select i, 0 from generate_series(1, 6000) i")
    reader = read()
    first = reader.page(events=2500)
    reader.page(first[-1].source.seq, events=2500)
    old.commit()
    fetch(shop, "update item set v = 1")
    kill(shop, reader)
    heir = read()
    got = first + heir.everything(events=2500)
    assert ids(got)[:6000] == list(range(1, 6001))
    assert len(set(seqs(got))) == len(got) == 6000 + 1 + 6001


class Traffic:
    """Random transactions of several sessions on a few rows, one step at a time, without ever waiting for a lock."""

    def __init__(self, chance: random.Random, sessions: Sequence[connection]) -> None:
        self.chance = chance
        self.sessions = sessions
        self.holder: dict[int, int] = {}  # row → session
        self.marks: dict[int, int] = dict.fromkeys(range(len(sessions)), 0)  # session → open savepoints

    def step(self) -> None:
        number = self.chance.randrange(len(self.sessions))
        what = self.chance.random()
        if what < 0.12:
            self.end(number)
        elif what < 0.18:
            fetch(self.sessions[number], "savepoint s")
            self.marks[number] += 1
        elif what < 0.24 and self.marks[number]:
            # Its row locks are given back, yet the row stays ours here: simpler, and still a legal history.
            fetch(self.sessions[number], "rollback to s; release s")
            self.marks[number] -= 1
        else:
            free = [row for row in range(8) if self.holder.get(row, number) == number]
            if free:
                row = self.chance.choice(free)
                self.holder[row] = number
                self.write(self.sessions[number], row)

    def write(self, conn: connection, row: int) -> None:
        if self.chance.random() < 0.2:
            fetch(conn, "delete from item where id = %s", (row,))
        else:
            fetch(conn, "insert into item values (%s, 0) on conflict (id) do update set v = item.v + 1", (row,))

    def end(self, number: int) -> None:
        if self.chance.random() < 0.75:
            self.sessions[number].commit()
        else:
            self.sessions[number].rollback()
        self.marks[number] = 0
        self.holder = {row: holder for row, holder in self.holder.items() if holder != number}


@pytest.mark.parametrize("large", [False, True], ids=["small windows", "large windows"])
@pytest.mark.parametrize("seed", range(10))
def test_every_committed_event_comes_once_and_each_row_in_order(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader], seed: int, large: bool
) -> None:
    if large:
        always_large(shop)
    chance = random.Random(seed)
    traffic = Traffic(chance, [session() for _ in range(5)])
    reader = read()
    taken: list[Event] = []  # acknowledged, in this order
    in_hand: list[Event] = []
    for _ in range(250):
        for _ in range(chance.randrange(1, 8)):
            traffic.step()
        luck = chance.random()
        if luck < 0.08:
            kill(shop, reader)
            reader = read()
            again = reader.page(events=chance.randrange(1, 12))
            assert again[: len(in_hand)] == in_hand[: len(again)]
            in_hand = again
            continue
        accepted = in_hand if luck < 0.85 else in_hand[: chance.randrange(len(in_hand) + 1)]
        taken += accepted
        acked = accepted[-1].source.seq if accepted else None
        following = reader.page(acked, events=chance.randrange(1, 12), bytes_=chance.choice([1, 100, PLENTY]))
        left = in_hand[len(accepted) :]
        assert following[: len(left)] == left[: len(following)]
        in_hand = following
    for number in range(len(traffic.sessions)):
        traffic.end(number)
    taken += in_hand
    if in_hand:
        reader.outbox.acknowledge(in_hand[-1].source.seq)
    taken += reader.everything(events=chance.randrange(1, 50))
    reference = [seq for (seq,) in fetch(shop, "select seq from cdc.event order by seq")]
    assert len(reference) > 100
    assert sorted(seqs(taken)) == reference
    for row in range(8):
        mine = [event.source.seq for event in taken if event.key is not None and event.key["id"] == row]
        assert mine == sorted(mine)
    final = {event.key["id"]: event for event in taken if event.key is not None}
    alive = {row for row, event in final.items() if event.op is not Op.DELETE}
    assert alive == {row for (row,) in fetch(shop, "select id from item")}


# -- ownership ----------------------------------------------------------------------------------------------------


def test_a_sink_has_one_owner_at_a_time(shop: connection, installed: str, read: Callable[..., Reader]) -> None:
    owner = read()
    epoch = value(shop, "select epoch from cdc.sink")
    with Connection(installed, purpose="rival") as session:
        rival = Outbox(session, database="shop", sink="audit", owner=Owner("rival", 2))
        assert not rival.claim(start="earliest")
        assert not rival.claim(start="earliest")
        assert value(shop, "select epoch from cdc.sink") == epoch
        kill(shop, owner)
        assert rival.claim(start="earliest")
        assert fetch(shop, "select epoch, owner from cdc.sink") == [(epoch + 1, "rival")]
    with pytest.raises(DatabaseUnreachable):
        owner.page()


def test_two_who_claim_at_once_do_not_both_get_it(shop: connection, installed: str) -> None:
    def claim(number: int) -> tuple[Connection, bool]:
        session = Connection(installed, purpose=f"rival {number}")
        outbox = Outbox(session, database="shop", sink="audit", owner=Owner(str(number), number))
        return session, outbox.claim(start="now") is not None

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(claim, range(8)))
        assert sum(won for _, won in results) == 1
        for session, _ in results:
            session.close()
        deadline = time.monotonic() + 10
        while value(shop, "select count(*) from pg_locks where locktype = 'advisory'"):
            assert time.monotonic() < deadline


def test_an_owner_of_an_older_epoch_is_refused_and_changes_nothing(
    shop: connection, installed: str, read: Callable[..., Reader]
) -> None:
    fetch(shop, "insert into item select i, 0 from generate_series(1, 6) i")
    old = read()
    page = old.page(events=2)
    old.connection.query("select pg_advisory_unlock_all()")  # alive, and does not know that it lost the sink
    heir = read()
    before = position_row(shop)
    with pytest.raises(Fenced):
        old.page(page[-1].source.seq)
    with pytest.raises(Fenced):
        old.page()
    with pytest.raises(Fenced):
        old.outbox.acknowledge(page[-1].source.seq)
    with pytest.raises(Fenced):
        old.outbox.set_state("retrying", "not mine any more")
    with pytest.raises(Fenced):
        old.outbox.confirm()
    assert position_row(shop) == before
    assert ids(heir.everything()) == [1, 2, 3, 4, 5, 6]


def test_a_page_is_committed_synchronously_whatever_the_session_says(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader]
) -> None:
    fetch(shop, "insert into item values (1, 0)")
    read()
    one = session()
    fetch(one, "set synchronous_commit = off")
    one.commit()
    fetch(one, "select * from cdc.next_batch('audit', 1, null, 10, 1000)")
    assert value(one, "show synchronous_commit") == "on"
    one.commit()
    assert value(one, "show synchronous_commit") == "off"


# -- rows to events -----------------------------------------------------------------------------------------------


def only(events: list[Event]) -> Event:
    (event,) = events
    return event


def test_a_diff_holds_what_changed_and_the_key(shop: connection, read: Callable[..., Reader]) -> None:
    fetch(
        shop,
        """create table p (a integer, b text, c numeric, d timestamptz, primary key (b, a));
           select cdc.enable_capture('p');
           insert into p values (1, 'x', 12345678901234567890.123, null)""",
    )
    fetch(shop, "update p set c = 0.10, d = '2026-01-02 03:04:05+02'")
    fetch(shop, "delete from p")
    insert, update, delete = read().everything()
    assert insert.to_json().endswith(
        '"key":{"b":"x","a":1},"before":null,"after":{"a":1,"b":"x","c":12345678901234567890.123,"d":null},'
        '"changed":null,"context":null}'
    )
    assert update.to_json().endswith(
        '"key":{"b":"x","a":1},"before":{"c":12345678901234567890.123,"d":null},'
        '"after":{"c":0.10,"d":"2026-01-02T01:04:05+00:00"},"changed":["c","d"],"context":null}'
    )
    assert delete.to_json().endswith(
        '"key":{"b":"x","a":1},"before":{"a":1,"b":"x","c":0.10,"d":"2026-01-02T01:04:05+00:00"},"after":null,'
        '"changed":null,"context":null}'
    )
    assert insert.source.database == "shop"
    assert (insert.source.schema_name, insert.source.table) == ("public", "p")
    assert insert.id == f"shop-{insert.source.seq}-{insert.source.ts:%Y%m%d%H%M%S%f}"


def test_full_images_hold_whole_rows_and_still_say_what_changed(shop: connection, read: Callable[..., Reader]) -> None:
    fetch(shop, "select cdc.enable_capture('item', image => 'full'); insert into item values (1, 1)")
    fetch(shop, "update item set v = 2")
    _, update = read().everything()
    assert update.before == {"id": 1, "v": 1}
    assert update.after == {"id": 1, "v": 2}
    assert update.changed == ("v",)


def test_a_changed_key_is_told_by_its_new_value_with_the_old_one_before(
    shop: connection, read: Callable[..., Reader]
) -> None:
    fetch(shop, "insert into item values (1, 1)")
    fetch(shop, "update item set id = 2")
    _, update = read().everything()
    assert update.key == {"id": 2}
    assert update.before == {"id": 1}
    assert update.after == {"id": 2}


def test_a_table_without_primary_key_has_the_key_it_was_given_or_none(
    shop: connection, read: Callable[..., Reader]
) -> None:
    fetch(shop, "create table given (no integer, v integer); select cdc.enable_capture('given', key => '{no}')")
    fetch(shop, "create table bare (no integer); select cdc.enable_capture('bare')")
    fetch(shop, "insert into given values (1, 2); insert into bare values (3); truncate given")
    given, bare, truncate = read().everything()
    assert given.key == {"no": 1}
    assert bare.key is None
    assert bare.after == {"no": 3}
    assert (truncate.op, truncate.key, truncate.before, truncate.after) == (Op.TRUNCATE, None, None, None)


def captured(conn: connection, table: str = "item") -> int:
    return int(value(conn, "select max(id) from cdc.captured_table where table_name = %s", (table,)))


def write_by_hand(conn: connection, op: str, old: str | None, new: str | None, context: str | None = None) -> None:
    fetch(
        conn,
        """insert into cdc.event_0
           values (nextval('cdc.event_seq'), pg_current_xact_id(), clock_timestamp(), %s, %s, %s, %s, %s)""",
        (captured(conn), op, old, new, context),
    )


def test_a_row_too_large_is_an_event_without_images_that_says_so(shop: connection, read: Callable[..., Reader]) -> None:
    for op in "IUD":
        write_by_hand(shop, op, None, '{"id" : 7}')
    write_by_hand(shop, "U", None, None)
    insert, update, delete, keyless = read().everything()
    assert [event.op for event in (insert, update, delete)] == [Op.INSERT, Op.UPDATE, Op.DELETE]
    for event in (insert, update, delete):
        assert event.truncated
        assert event.key == {"id": 7}
        assert (event.before, event.after, event.changed) == (None, None, None)
        assert event.to_json().endswith(',"truncated":true}')
    assert keyless.truncated
    assert keyless.key is None


@pytest.mark.parametrize(
    ("context", "seen"),
    [
        ('{"actor": "ann"}', {"actor": "ann"}),
        ("42", 42),
        ("not json", "not json"),
        ('{"open": ', '{"open": '),
        ('"\\ud800"', "\ud800"),
        ("a\nb", "a\nb"),
    ],
)
def test_the_context_travels_as_json_or_as_the_text_it_is(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader], context: str, seen: object
) -> None:
    one = session()
    fetch(one, "select set_config('cdc.context', %s, true)", (context,))
    fetch(one, "insert into item values (1, 0)")
    one.commit()
    fetch(one, "insert into item values (2, 0)")
    one.commit()
    first, second = read().everything()
    assert first.context is not None
    assert first.context.value == seen
    assert json.loads(first.to_json())["context"] == seen
    assert second.context is None


def test_after_a_key_column_was_renamed_the_catalogue_knows_the_key(
    shop: connection, read: Callable[..., Reader]
) -> None:
    fetch(shop, "insert into item values (1, 0)")
    fetch(shop, "alter table item rename id to number")
    fetch(shop, "insert into item values (2, 0)")
    before, after = read().everything()
    assert before.key is None or before.key == {"id": 1}
    assert after.key == {"number": 2}


def test_events_of_a_dropped_table_can_still_be_read(shop: connection, read: Callable[..., Reader]) -> None:
    fetch(shop, "insert into item values (1, 0); drop table item")
    assert only(read().everything()).key == {"id": 1}


@pytest.mark.parametrize(
    ("op", "new"),
    [("i", "[1, 2]"), ("i", '"text"'), ("u", "17"), ("x", '{"id": 1}')],
)
def test_a_row_that_is_no_event_is_handed_out_as_unreadable_amid_the_others(
    shop: connection, read: Callable[..., Reader], op: str, new: str
) -> None:
    fetch(shop, "insert into item values (1, 0)")
    write_by_hand(shop, op, None, new)
    fetch(shop, "insert into item values (2, 0)")
    batch = read().outbox.next_batch(None, events=10, bytes_=PLENTY)
    assert batch is not None
    first, broken, last = batch.events
    assert isinstance(first, Event)
    assert isinstance(broken, Unreadable)
    assert isinstance(last, Event)
    assert first.source.seq < broken.seq < last.source.seq
    assert broken.id.startswith(f"shop-{broken.seq}-2")
    assert "1" not in broken.reason
    assert value(shop, "select (%s::json ->> 'seq')::bigint", (broken.text,)) == broken.seq


def test_a_row_of_an_unknown_table_is_unreadable(shop: connection, read: Callable[..., Reader]) -> None:
    write_by_hand(shop, "i", None, '{"id": 1}')
    fetch(shop, "update cdc.event_0 set captured_table = 999")
    batch = read().outbox.next_batch(None, events=10, bytes_=PLENTY)
    assert batch is not None
    assert isinstance(batch.events[0], Unreadable)


@pytest.mark.parametrize(
    "number", ["1e99999999999999999999", "-1E-99999999999999999999", "9" * 5000], ids=["huge", "tiny", "long"]
)
def test_numbers_python_cannot_hold_travel_as_they_were_written(
    shop: connection, read: Callable[..., Reader], number: str
) -> None:
    fetch(shop, "create table doc (id integer primary key, body json); select cdc.enable_capture('doc')")
    fetch(shop, "insert into doc values (1, %s)", (f'{{"n": {number}}}',))
    event = only(read().everything())
    assert event.key == {"id": 1}
    assert event.after is not None
    assert number in event.after.raw


@pytest.mark.parametrize(
    "context",
    [pytest.param("1e99999999999999999999", id="huge"), pytest.param("9" * 5000, id="long")],
)
def test_a_context_python_cannot_hold_harms_nobody(
    shop: connection, session: Callable[[], connection], read: Callable[..., Reader], context: str
) -> None:
    one = session()
    fetch(one, "select set_config('cdc.context', %s, true)", (context,))
    fetch(one, "insert into item values (1, 0)")
    one.commit()
    event = only(read().everything())
    assert event.context is not None
    assert context in event.context.raw


# -- positions ----------------------------------------------------------------------------------------------------


def snapshot(chance: random.Random) -> tuple[int, list[int]]:
    """xmax and the ids in progress, in the shape PostgreSQL makes: the id before xmax has always ended."""
    xmax = chance.randrange(4, 16)
    return xmax, sorted(chance.sample(range(3, xmax - 1), chance.randrange(min(5, xmax - 4) + 1)))


def written(shot: tuple[int, list[int]]) -> str:
    xmax, running = shot
    return f"{running[0] if running else xmax}:{xmax}:{','.join(map(str, running))}"


def test_covers_says_what_visibility_says(shop: connection) -> None:
    chance = random.Random(1)
    pairs = [(snapshot(chance), snapshot(chance)) for _ in range(3000)]
    rows = fetch(
        shop,
        """select cdc.covers(p, t), not exists (select from generate_series(3, 20) x
                     where pg_visible_in_snapshot(x::text::xid8, t) and not pg_visible_in_snapshot(x::text::xid8, p))
             from unnest(%s::pg_snapshot[], %s::pg_snapshot[]) as pairs (p, t)""",
        ([written(p) for p, _ in pairs], [written(t) for _, t in pairs]),
    )
    assert [row for row in rows if row[0] != row[1]] == []
    assert {row[0] for row in rows} == {True, False}


def test_a_sink_is_behind_only_while_something_shown_is_not_delivered(
    shop: connection, installed: str, session: Callable[[], connection], read: Callable[..., Reader]
) -> None:
    def behind() -> list[str]:
        with Connection(installed, purpose="test") as conn:
            return sorted(outbox.sinks_behind(conn, ["one", "two", "nobody"], target or outbox.current_snapshot(conn)))

    target = ""
    one, two = read("one"), read("two")
    assert behind() == []  # nothing to deliver
    early = session()
    fetch(early, "insert into item values (1, 0)")
    assert behind() == []  # not committed, so not shown
    fetch(shop, "insert into item values (2, 0)")
    assert behind() == ["one", "two"]
    one.everything()
    assert behind() == ["two"]
    page = two.page()
    assert behind() == ["two"]  # handed out is not delivered
    with Connection(installed, purpose="test") as conn:
        target = outbox.current_snapshot(conn)
    early.commit()
    two.page(page[-1].source.seq)
    two.everything()
    assert behind() == []  # what came later does not count
    target = ""
    assert behind() == ["one"]
    one.everything()
    assert behind() == []


# -- space --------------------------------------------------------------------------------------------------------


@pytest.fixture
def rotate(installed: str) -> Callable[[float], list[str]]:
    def call(retention: float = 60.0) -> list[str]:
        with Connection(installed, purpose="housekeeper") as conn:
            return outbox.rotate(conn, retention)

    return call


def age(conn: connection, seconds: float = DAY) -> None:
    """Let every event be older than it is."""
    fetch(conn, "update cdc.event set captured_at = captured_at - make_interval(secs => %s)", (seconds,))


def counts(conn: connection) -> list[int]:
    return [value(conn, f"select count(*) from cdc.event_{leaf}") for leaf in range(3)]


def fill(conn: connection, reader: Reader, rotate: Callable[..., list[str]], leaves: Sequence[int] = (1, 1, 1)) -> None:
    """Three turns of one old, delivered event each; the next two rotations may truncate the first two children."""
    for id_ in range(3):
        if id_:
            assert rotate() == ["turned"]
        fetch(conn, "insert into item values (%s, 0)", (id_,))
        reader.everything()
        age(conn, 21)
    age(conn)
    assert counts(conn) == list(leaves)


def test_without_events_there_is_nothing_to_turn(shop: connection, rotate: Callable[..., list[str]]) -> None:
    assert rotate() == []
    assert rotate(0.0) == []


def test_events_younger_than_a_third_of_retention_do_not_turn(
    shop: connection, read: Callable[..., Reader], rotate: Callable[..., list[str]]
) -> None:
    fetch(shop, "insert into item values (1, 0)")
    read().everything()
    assert rotate() == []
    age(shop, 15)
    assert rotate() == []
    age(shop, 6)
    assert rotate() == ["turned"]
    assert rotate() == []
    assert value(shop, "select last_value from cdc.event_seq") == TURN


def test_a_full_cycle_gives_space_back_and_readers_get_everything_in_order(
    shop: connection, read: Callable[..., Reader], rotate: Callable[..., list[str]]
) -> None:
    reader = read()
    got: list[Event] = []
    history = []
    for round_ in range(9):
        fetch(shop, "insert into item select i, 0 from generate_series(%s, %s) i", (round_ * 10, round_ * 10 + 9))
        got += reader.everything(events=4)
        age(shop)
        history.append((*rotate(), *counts(shop)))
    assert ids(got) == list(range(90))
    assert seqs(got) == sorted(seqs(got))
    assert history[:2] == [("turned", 10, 0, 0), ("truncated", "turned", 0, 10, 0)]
    assert all(sum(row[-3:]) == 10 for row in history)
    assert all(row[:2] == ("truncated", "turned") for row in history[1:])
    assert value(shop, "select last_value from cdc.event_seq") == 9 * TURN


def test_nothing_is_truncated_while_a_sink_is_behind(
    shop: connection, read: Callable[..., Reader], rotate: Callable[..., list[str]]
) -> None:
    fast, slow = read("fast"), read("slow")
    for id_ in range(3):
        fetch(shop, "insert into item values (%s, 0)", (id_,))
        fast.everything()
        age(shop)
        rotate()
    assert counts(shop) == [1, 1, 1]
    assert rotate() == []
    page = slow.page(events=2)
    assert rotate() == []  # a window is open
    assert ids(page) == [0, 1]
    rest = slow.page(page[-1].source.seq, events=2)
    assert rotate() == []
    assert ids(rest) == [2]
    slow.page(rest[-1].source.seq)
    assert rotate() == ["truncated", "turned"]
    assert counts(shop) == [0, 1, 1]
    assert rotate() == ["truncated"]
    assert counts(shop) == [0, 0, 1]


def test_rows_younger_than_retention_are_kept(
    shop: connection, read: Callable[..., Reader], rotate: Callable[..., list[str]]
) -> None:
    reader = read()
    fill(shop, reader, rotate)
    assert rotate(4 * DAY) == []
    fetch(shop, "update cdc.event_0 set captured_at = clock_timestamp()")
    assert rotate() == ["truncated"]
    assert counts(shop) == [1, 0, 1]
    age(shop)
    assert rotate() == ["truncated", "turned"]


def test_a_young_row_of_an_old_transaction_is_kept(
    shop: connection,
    session: Callable[[], connection],
    read: Callable[..., Reader],
    rotate: Callable[..., list[str]],
) -> None:
    reader = read()
    early = session()
    value(early, "select pg_current_xact_id()")
    fetch(shop, "insert into item values (1, 0)")
    age(shop)
    fetch(early, "insert into item values (2, 0)")  # lower xid, younger row
    early.commit()
    reader.everything()
    assert rotate() == ["turned"]
    assert rotate() == []
    assert counts(shop)[0] == 2


def test_an_open_writer_there_keeps_a_child_and_nobody_waits(
    shop: connection,
    session: Callable[[], connection],
    read: Callable[..., Reader],
    rotate: Callable[..., list[str]],
) -> None:
    reader = read()
    long = session()
    fetch(long, "insert into item values (100, 0)")  # in event_0
    for id_ in range(3):
        fetch(shop, "insert into item values (%s, 0)", (id_,))
        reader.everything()
        fetch(shop, "update cdc.event set captured_at = captured_at - interval '1 day'")
        rotate()
    began = time.monotonic()
    assert rotate() == []
    assert time.monotonic() - began < 5
    long.commit()
    assert rotate() == []  # nobody has its row yet, and it is young
    assert ids(reader.everything()) == [100]
    age(shop)
    assert rotate() == ["truncated", "turned"]


def test_a_reader_there_keeps_a_child_and_nobody_waits(
    shop: connection,
    session: Callable[[], connection],
    read: Callable[..., Reader],
    rotate: Callable[..., list[str]],
) -> None:
    reader = read()
    fill(shop, reader, rotate)
    dump = session()
    fetch(dump, "select count(*) from cdc.event_0")
    began = time.monotonic()
    assert rotate() == ["truncated"]
    assert counts(shop) == [1, 0, 1]
    assert time.monotonic() - began < 5
    dump.rollback()
    assert rotate() == ["truncated", "turned"]


def test_readers_that_are_always_there_do_not_keep_a_child(
    shop: connection,
    session: Callable[[], connection],
    read: Callable[..., Reader],
    rotate: Callable[..., list[str]],
) -> None:
    """One of them always holds a lock on all children, as many busy sinks would; none holds it for long."""
    reader = read()
    fill(shop, reader, rotate)
    looks = [0] * 4
    done: list[str] = []

    def look(number: int) -> None:
        conn = session()
        while not done:
            fetch(conn, "select pg_sleep(0.01) from (select count(*) from cdc.event) e")
            conn.rollback()
            looks[number] += 1

    with ThreadPoolExecutor(4) as pool:
        looking = pool.map(look, range(4))
        while min(looks) < 3:
            time.sleep(0.01)
        try:
            done = rotate()
        finally:
            done = done or ["failed"]
    assert list(looking) == [None] * 4
    assert done == ["truncated", "turned"]


def test_a_publication_of_all_tables_is_in_nobodys_way(
    shop: connection, read: Callable[..., Reader], rotate: Callable[..., list[str]]
) -> None:
    """With one PostgreSQL refuses updates and deletes in tables whose rows have no identity, at any wal_level."""
    fetch(shop, "create publication everything for all tables")
    fetch(shop, "insert into item values (100, 0)")
    fetch(shop, "select cdc.note_moment()")
    reader = read()
    assert ids(reader.everything()) == [100]
    fill(shop, reader, rotate, leaves=[2, 1, 1])
    assert rotate() == ["truncated", "turned"]
    assert fetch(shop, "select * from cdc.moment") == []
    fetch(shop, "insert into item values (101, 0)")
    assert value(shop, "select cdc.rebase()") >= 1
    fetch(shop, "delete from cdc.sink")
    without = """select c.relname from pg_class c
                  where c.relnamespace = 'cdc'::regnamespace and c.relkind = 'r' and c.relreplident <> 'f'
                    and not exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary)"""
    assert fetch(shop, without) == [("secret",)], "that one is never changed"


def test_a_rolled_back_writer_leaves_nothing_in_the_way(
    shop: connection,
    session: Callable[[], connection],
    read: Callable[..., Reader],
    rotate: Callable[..., list[str]],
) -> None:
    reader = read()
    lost = session()
    fetch(lost, "insert into item values (100, 0)")
    fill(shop, reader, rotate)
    assert rotate() == ["truncated"]
    assert counts(shop) == [1, 0, 1]
    lost.rollback()
    fetch(shop, "insert into item values (101, 0)")  # lets the position move past the one that is gone
    reader.everything()
    age(shop)
    assert rotate() == ["truncated", "turned"]


def test_a_transaction_may_write_across_a_turn(
    shop: connection,
    session: Callable[[], connection],
    read: Callable[..., Reader],
    rotate: Callable[..., list[str]],
) -> None:
    reader = read()
    fetch(shop, "insert into item values (1, 0)")
    age(shop)
    writer = session()
    fetch(writer, "insert into item values (2, 0)")
    assert rotate() == ["turned"]
    fetch(writer, "insert into item values (3, 0); update item set v = 1 where id = 1")
    writer.commit()
    got = reader.everything(events=1)
    assert ids(got) == [1, 2, 3, 1]
    assert [seq >> 24 for seq in seqs(got)] == [0, 0, 1, 1]


@pytest.mark.parametrize("large", [False, True], ids=["small windows", "large windows"])
def test_events_of_three_turns_come_in_order(shop: connection, read: Callable[..., Reader], large: bool) -> None:
    if large:
        always_large(shop)
    for turn in range(3):
        fetch(shop, "select setval('cdc.event_seq', %s)", (turn * TURN + TURN - 3,))
        fetch(shop, "insert into item select i, 0 from generate_series(%s, %s) i", (turn * 10, turn * 10 + 4))
    assert counts(shop) == [5, 5, 5]  # each goes on into the next turn; the fourth is in the first child again
    got = read().everything(events=2)
    assert ids(got) == [*range(5), *range(10, 15), *range(20, 25)]


def test_a_child_that_holds_two_turns_is_kept_for_the_younger_one(
    shop: connection, read: Callable[..., Reader], rotate: Callable[..., list[str]]
) -> None:
    reader = read()
    fetch(shop, "insert into item values (1, 0)")
    reader.everything()
    age(shop)
    fetch(shop, "select setval('cdc.event_seq', %s)", (3 * TURN,))
    fetch(shop, "insert into item values (2, 0)")
    fetch(shop, "select setval('cdc.event_seq', %s)", (5 * TURN,))
    assert rotate() == []
    assert counts(shop)[0] == 2
    assert ids(reader.everything()) == [2]
    assert rotate() == []
    age(shop)
    assert rotate() == ["truncated"]


# Not strict: it takes luck to catch the moment.
def test_rotating_at_once_from_everywhere_never_hands_out_a_number_twice(
    shop: connection, installed: str, read: Callable[..., Reader]
) -> None:
    """Two daemons keep house, writers write, a sink reads; retention is nothing, so every call turns if it can."""
    until = time.monotonic() + 2.0

    def keep_house(_: int) -> int:
        turned = 0
        with Connection(installed, purpose="housekeeper") as conn:
            while time.monotonic() < until:
                turned += "turned" in outbox.rotate(conn, 0.0)
        return turned

    def write(number: int) -> int:
        wrote = 0
        conn = psycopg2.connect(installed)
        conn.autocommit = True
        while time.monotonic() < until:
            fetch(conn, "insert into item values (%s, 0)", (number * 1_000_000 + wrote,))
            wrote += 1
        conn.close()
        return wrote

    reader = read()
    got: list[Event] = []
    with ThreadPoolExecutor(5) as pool:
        keepers = [pool.submit(keep_house, number) for number in range(2)]
        writers = [pool.submit(write, number) for number in range(3)]
        while not all(future.done() for future in (*keepers, *writers)):
            got += reader.everything()
    got += reader.everything()
    assert sum(future.result() for future in keepers) > 3
    assert len(got) == sum(future.result() for future in writers)
    assert len(set(seqs(got))) == len(got)
    for number in range(3):
        mine = [id_ for id_ in ids(got) if id_ // 1_000_000 == number]
        assert mine == sorted(mine)
