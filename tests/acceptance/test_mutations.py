"""The judge has to be seen condemning: readers with a well-known mistake read the same live writers as the real one.

The mistakes are those everybody makes first. ``seq > last`` never sees a change that drew its number early and was
committed late, and nor does ``txid < xmin`` ordered by seq. Ordered by (txid, seq) that one sees everything, and tells
a row's changes in the wrong order when the older transaction wrote last. And a correct stream, spoilt by hand in each
way there is a name for.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import DATABASE, SEEDS, Project, report
from judge import (
    Altered,
    BrokenChain,
    Fact,
    Lost,
    NotTheSource,
    OutOfOrder,
    Phantom,
    State,
    Violation,
    check,
    check_complete,
    facts_of,
    read_source,
    to_stream,
)
from psycopg2.extensions import connection
from workload import CAPTURED, SCHEMA, TABLES, Workload

from cdc.connection import Connection
from cdc.event import Event, Op
from cdc.outbox import Batch, Outbox, Owner

SECONDS = 6.0
LINGER = 0.4
ROUNDS = 3
"""A mistake that does no harm by chance gets another round, with transactions that stay open twice as long."""

_PAGE = 10
"""So small that windows have several."""
_COLUMNS = """seq, txid, to_char(captured_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), captured_table, op,
              old_row::text, new_row::text, context"""


class _CorrectReader:
    """cdc.next_batch, as the pipelines use it."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._outbox = Outbox(conn, database=DATABASE, sink=type(self).__name__, owner=Owner(type(self).__name__, 1))
        assert self._outbox.claim(start="earliest")
        self._acked: int | None = None

    def read(self) -> list[Event]:
        """What is next; an empty list when there is nothing."""
        batch: Batch | None = self._outbox.next_batch(self._acked, events=500, bytes_=1 << 22)
        self._acked = batch.last_seq if batch else None
        return [event for event in batch.events if isinstance(event, Event)] if batch else []


class _SeqReader(_CorrectReader):
    """Remembers the highest seq."""

    _last = 0

    def read(self) -> list[Event]:
        rows = self._conn.query(
            f"select {_COLUMNS} from cdc.event where seq > %s order by seq limit 500", (self._last,)
        )
        if rows:
            self._last = rows[-1][0]
        return self._decode(rows)

    def _decode(self, rows: list[tuple[object, ...]]) -> list[Event]:
        events = [*self._outbox._decoder.decode(rows)]  # the rule is wrong, not the decoding
        return [event for event in events if isinstance(event, Event)]


class _XminReader(_SeqReader):
    """Reads only below the oldest open transaction, by transaction."""

    _place = (0, 0)

    def read(self) -> list[Event]:
        rows = self._conn.query(
            f"""select {_COLUMNS} from cdc.event
                 where txid < pg_snapshot_xmin(pg_current_snapshot()) and (txid, seq) > (%s::text::xid8, %s)
                 order by txid, seq limit 500""",
            self._place,
        )
        if rows:
            self._place = (rows[-1][1], rows[-1][0])
        return self._decode(rows)


class _XminBySeqReader(_SeqReader):
    """Reads only below the oldest open transaction, and remembers the highest seq."""

    def read(self) -> list[Event]:
        rows = self._conn.query(
            f"""select {_COLUMNS} from cdc.event
                 where txid < pg_snapshot_xmin(pg_current_snapshot()) and seq > %s order by seq limit 500""",
            (self._last,),
        )
        if rows:
            self._last = rows[-1][0]
        return self._decode(rows)


class _HastyReader(_SeqReader):
    """Reads windows in pages, and ends each page at a newer snapshot, going on from where the last one ended."""

    _lower = "3:3:"

    def read(self) -> list[Event]:
        upper = self._conn.query("select pg_current_snapshot()::text")[0][0]
        rows = self._conn.query(
            f"""select {_COLUMNS} from cdc.event
                 where pg_visible_in_snapshot(txid, %s::pg_snapshot)
                   and not pg_visible_in_snapshot(txid, %s::pg_snapshot) and seq > %s
                 order by seq limit {_PAGE}""",
            (upper, self._lower, self._last),
        )
        if len(rows) == _PAGE:
            self._last = rows[-1][0]
        else:
            self._last, self._lower = 0, upper
        return self._decode(rows)


class _Reading(threading.Thread):
    """A reader at work for as long as there are writers, and then until it finds nothing more."""

    def __init__(self, dsn: str, reader: type[_CorrectReader]) -> None:
        super().__init__(name=reader.__name__, daemon=True)
        self.lines: list[str] = []
        self.error: BaseException | None = None
        self._dsn = dsn
        self._reader = reader
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with Connection(self._dsn, purpose="test", source=False) as conn:
                reader = self._reader(conn)
                while True:
                    last_look = self._over.is_set()
                    events = reader.read()
                    self.lines += [event.to_json() for event in events]
                    if not events:
                        if last_look:
                            return
                        self._over.wait(0.005)
        except BaseException as error:  # noqa: BLE001  # it is raised again by finish
            self.error = error

    def finish(self) -> list[str]:
        """Everything it read."""
        self._over.set()
        self.join()
        if self.error:
            raise self.error
        return self.lines


def _round(
    project: Project, seed: object, linger: float, seconds: float, *readers: type[_CorrectReader]
) -> tuple[dict[Fact, float], State, list[list[str]]]:
    """The workload and its readers: what was committed, what stands in the tables, what each one read."""
    with contextlib.closing(Connection(project.dsn, purpose="test", source=False)) as conn:
        conn.execute("drop table if exists hot, pair; " + SCHEMA)
        conn.execute("truncate cdc.event, cdc.sink, cdc.position cascade")
    project.cdc("migrate")
    readings = [_Reading(project.dsn, reader) for reader in readers]
    try:
        with Workload(project.dsn, seed, seconds, linger=linger, truncate_at=seconds / 2) as work:
            work.join()
    finally:
        lines = [reading.finish() for reading in readings]
    return work.committed, read_source(project.dsn, TABLES), lines


@pytest.fixture
def watched(tmp_path: Path, database: str, connect: Callable[..., connection]) -> Iterator[Project]:
    """The writers' tables, captured; nobody runs the daemon."""
    made = Project(tmp_path, database, CAPTURED, "{database}.jsonl")
    with connect(database).cursor() as cursor:
        cursor.execute(SCHEMA)
    made.cdc("migrate")
    yield made
    made.remove_output()


@pytest.mark.parametrize("seed", SEEDS)
def test_readers_with_a_known_mistake_are_caught_and_the_real_one_is_not(watched: Project, seed: int) -> None:
    for attempt in range(ROUNDS):
        linger, round_seed = LINGER * 2**attempt, f"{seed}/{attempt}"
        readers = (_CorrectReader, _SeqReader, _HastyReader, _XminBySeqReader, _XminReader)
        committed, source, (correct, *losing, by_xmin) = _round(watched, round_seed, linger, SECONDS, *readers)
        stream = check(correct, committed, source, round_seed)
        sentences = [_verdict(check, lines, committed, source, round_seed) for lines in (*losing, by_xmin)]
        lost = [len(committed) - len(facts_of(to_stream(lines))) for lines in losing]
        shares = [f"{count} lost ({count / len(committed):.1%})" for count in lost]
        report(
            f"{len(stream.first)} events, linger {linger} s; seq > last: {shares[0]}; "
            f"newer snapshot in mid-window: {shares[1]}; xmin by seq: {shares[2]}; "
            f"xmin by (txid, seq): {_inversions(by_xmin)} keys' changes told too late; "
            f"sentences: {[type(sentence).__name__ for sentence in sentences]}"
        )
        if all(sentences):
            break
    *losses, disorder = sentences
    assert all(isinstance(loss, Lost) for loss in losses)
    assert isinstance(disorder, OutOfOrder)
    check_complete(to_stream(by_xmin), committed, round_seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_correct_stream_is_condemned_for_whatever_is_done_to_it(watched: Project, seed: int) -> None:
    committed, source, (good,) = _round(watched, seed, 0.0, 1.0, _CorrectReader)
    events = [Event.from_json(line) for line in good]
    rng = random.Random(f"{seed} vandal")

    def sentence(lines: list[str]) -> Violation | None:
        return _verdict(check, lines, committed, source, seed)

    assert sentence(good) is None
    anywhere = rng.randrange(len(good))
    again = [*good, good[anywhere], *good[anywhere:]]
    assert sentence(again) is None, "at least once is what was promised"

    assert isinstance(sentence([*good[:anywhere], *good[anywhere + 1 :]]), Lost)
    assert isinstance(sentence(good[:-1]), Lost)
    assert isinstance(sentence([*good, good[anywhere].replace('"version":1', '"version": 1')]), Altered)
    assert isinstance(sentence([*good, good[anywhere].replace('"id":"shop-', '"id":"shop-9')]), Phantom)

    number, update = next(
        (n, event)
        for n, event in enumerate(events)
        if event.op is Op.UPDATE and event.source.table == "hot" and "id" not in (event.changed or ())
    )
    assert update.after is not None
    assert update.before is not None
    rolled_back = good[number].replace(f'"mark":{update.after["mark"]}', '"mark":7')
    assert isinstance(sentence([*good, rolled_back]), Altered)
    assert isinstance(sentence([*good, rolled_back.replace('"id":"shop-', '"id":"shop-9')]), Phantom)

    earlier = max(n for n in range(number) if events[n].key == update.key)
    swapped = list(good)
    swapped[earlier], swapped[number] = swapped[number], swapped[earlier]
    assert isinstance(sentence(swapped), OutOfOrder)
    truncate = next(n for n, event in enumerate(events) if event.op is Op.TRUNCATE)
    late = [*good[:truncate], *good[truncate + 1 :], good[truncate]]
    assert isinstance(sentence(late), OutOfOrder)

    was = update.before["ver"]
    torn = good[number].replace(f'"ver":{was}', f'"ver":{was + 5}', 1)
    assert isinstance(sentence([*good[:number], torn, *good[number + 1 :]]), BrokenChain)

    table, key = next((table, key) for table, rows in source.items() for key in rows)
    row = source[table][key]
    missing_a_digit = source | {table: source[table] | {key: row | {"ver": row["ver"] + "0"}}}
    assert isinstance(_verdict(check, good, committed, missing_a_digit, seed), NotTheSource)
    a_row_more = source | {table: {k: r for k, r in source[table].items() if k != key}}
    assert isinstance(_verdict(check, good, committed, a_row_more, seed), NotTheSource)


def _verdict(judge: Callable[..., object], *arguments: object) -> Violation | None:
    try:
        judge(*arguments)
    except Violation as violation:
        return violation
    return None


def _inversions(lines: list[str]) -> int:
    """How many events came after a later one of their key."""
    latest: dict[str, int] = {}
    count = 0
    for line in to_stream(lines).first:
        key, seq = f"{line.event.source.table} {line.event.key and line.event.key.raw}", line.event.source.seq
        count += seq < latest.get(key, 0)
        latest[key] = max(seq, latest.get(key, 0))
    return count
