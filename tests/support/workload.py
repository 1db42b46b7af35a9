"""Writers who do their worst: many of them over few rows, in every kind of transaction, and each keeps a log.

Where the server may die, a writer's own log is no truth any more: the answer to a COMMIT may be lost, and what was
committed asynchronously may be lost although it was answered. So with ``ledger=True`` each transaction also writes what
it changes into a table that is not captured: the ledger says of every change whether it happened, whatever became of
the server, and it is read in the end. Writers then connect again as often as they have to; any other error is one that
applications would have seen because of us, and fails the test, unless it was said to be expected.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

import psycopg2
from judge import Fact, Violation
from psycopg2.extensions import connection

TABLES: dict[str, tuple[str, ...]] = {"hot": ("id",), "pair": ("a", "b")}
"""What the writers write to, with the key columns; hot is captured as diff, pair in full."""
CAPTURED: dict[str, dict[str, object]] = {"public.hot": {}, "public.pair": {"image": "full"}}
SCHEMA = """
    create table hot (id bigint primary key, ver int not null, mark bigint not null, amount numeric, ratio float8,
                      "Nöte ""x" text, doc jsonb, data json, at timestamptz, took interval, raw bytea, flag boolean);
    create table pair (a text, b int, ver int not null, mark bigint not null, amount numeric, ratio float8,
                      "Nöte ""x" text, doc jsonb, data json, at timestamptz, took interval, raw bytea, flag boolean,
                      primary key (a, b));
"""
LEDGER = "create table ledger (table_name text not null, op text not null, mark bigint not null)"
"""Where writers with ``ledger=True`` tell the truth; never captured."""
OWN_KEY = 1000
"""Of the transaction that stays open, in table hot."""

_VALUES: dict[str, Callable[[random.Random], object]] = {
    "amount": lambda r: r.choice(
        ["12345678901234567890.123", "NaN", "0.00", f"{r.getrandbits(90)}.{r.getrandbits(60)}"]
    ),
    "ratio": lambda r: r.choice([float("inf"), -0.0, 1e-300, r.random(), 0.1 + 0.2]),
    '"Nöte ""x"': lambda r: r.choice(
        ["", "null", "a\tb\nc\\d\"e'f", "\u2028\x7f\x01", "🐘" * r.randrange(9), f"{r.random()}"]
    ),
    "doc": lambda r: json.dumps({"n": r.random(), "list": [r.getrandbits(70), None, "\u00e9\n"], "o": {"}": "{"}}),
    "data": lambda r: r.choice(['{"a" :1.0, "a":2e5}', "[ 1,2 ]", '"\\u00e9"', "1E400", f"{r.getrandbits(80)}"]),
    "at": lambda r: r.choice(
        ["infinity", "0044-03-15 12:00:00+00 BC", f"20{r.randrange(10, 99)}-02-03 04:05:06.789+05:30"]
    ),
    "took": lambda r: f"{r.randrange(40)} months -{r.randrange(90)} days {r.randrange(99)}.5 seconds",
    "raw": lambda r: r.randbytes(r.randrange(12)),
    "flag": lambda r: r.random() < 0.5,
}
_CHANGES = {"upsert": 25, "update": 40, "insert": 10, "delete": 8, "move": 8, "touch": 4, "plain": 1}
"""What a writer does, and how often."""
_GENERATIONS = itertools.count()
"""Marks of one workload are not those of the next over the same tables."""
_SESSIONS = [  # none of these may leak into an event
    "set timezone = 'Asia/Kolkata'; set datestyle = 'SQL, DMY'; set intervalstyle = 'iso_8601'",
    "set bytea_output = 'escape'; set extra_float_digits = 0; set timezone = 'America/St_Johns'",
    "set synchronous_commit = off; set intervalstyle = 'sql_standard'; set datestyle = 'German'",
    "set search_path = public, pg_catalog",
]
_ISOLATION = ["read committed"] * 3 + ["repeatable read", "serializable"]
_RETRY = (psycopg2.errors.SerializationFailure, psycopg2.errors.DeadlockDetected)
_LOST = ("08", "57P01", "57P02", "57P03")
"""SQLSTATEs, or their classes, with which a server takes its leave: broken off, shut down, crashed, not up yet."""
_CUT_OFF = (psycopg2.DatabaseError, psycopg2.OperationalError, psycopg2.InterfaceError)
"""What psycopg2 raises, without a SQLSTATE, when the connection fails; the session need not count as closed then."""
_BREATH = 0.05
"""Seconds between two tries to connect."""
_Key = tuple[str, tuple[object, ...]]
"""Table and key."""


class WriterFailed(Violation):
    """A writer met an error it would not have met without us."""


class _GivenUp(Exception):
    """The writer rolls back of its own free will."""


def hot_keys(count: int) -> list[_Key]:
    """So many keys, 10 to 1000; a fifth of them in table pair."""
    pairs = count // 10
    hot: list[_Key] = [("hot", (n,)) for n in range(1, count - 2 * pairs + 1)]
    return hot + [("pair", (a, b)) for a in ("x", 'é"\\') for b in range(pairs)]


@dataclass
class Workload:
    """Many writers over few rows, for some seconds, each keeping a log of what it committed.

    Every insert and update writes a mark that nobody else ever writes, so that each committed change can be told from
    every other, and one that was rolled back would be recognised.

    Attributes:
        dsn, seed: where, and what the writers' choices come from. Who has to connect again does so to the dsn of then.
        seconds: how long, unless :meth:`stop` comes first.
        writers: threads that write small transactions.
        open_at, open_for: when one transaction writes its own key, and how long it stays open; None: never.
        linger: seconds; two more threads write their own key first, and a hot one in the end, so late. 0: none.
        lulls: pause everybody now and then, so that the daemon falls asleep in between.
        truncate_at: when table hot is truncated; None: never.
        keys: how many they all write to; see :func:`hot_keys`.
        rate: small transactions a second, of each writer; None: as many as they can.
        ledger: see the head of this module; table ledger has to be there.
        asynchronous: share of the sessions, 0 to 1, that commit with ``synchronous_commit = off``; None: every fourth
            writer.
        expected: SQLSTATEs that are no failure of ours, such as of a full disk; the transaction is given up.
        committed: every change whose COMMIT was answered, with the time just before it; without a ledger, the truth.
        outcomes: of transactions: how many committed, by isolation level, were retried, failed, rolled back, met
            ``expected SQLSTATE``; and how often somebody was disconnected.
    """

    dsn: str
    seed: object
    seconds: float
    writers: int = 8
    open_at: float | None = None
    open_for: float = 5.0
    linger: float = 0.0
    lulls: bool = True
    truncate_at: float | None = None
    keys: int = 50
    rate: float | None = None
    ledger: bool = False
    asynchronous: float | None = None
    expected: Collection[str] = ()
    committed: dict[Fact, float] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    opened: tuple[float, float] = (0.0, 0.0)
    """When the long transaction wrote first, and when it had ended."""

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._awake = threading.Event()
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self._lock = threading.Lock()
        self._keys = hot_keys(self.keys)
        self.generation = next(_GENERATIONS)

    def __enter__(self) -> Workload:
        self._began = time.monotonic()
        self._awake.set()
        jobs: list[tuple[Callable[..., None], tuple[object, ...]]] = [(self._write, (n,)) for n in range(self.writers)]
        jobs += [(self._dawdle, (100 + n,)) for n in range(2 if self.linger else 0)]
        jobs += [(self._conduct, ())]
        if self.open_at is not None:
            jobs += [(self._stay_open, ())]
        if self.truncate_at is not None:
            jobs += [(self._truncate, ())]
        self._threads = [threading.Thread(target=self._guard, args=(job, *arguments)) for job, arguments in jobs]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.stop()
        self.join()

    def stop(self) -> None:
        """Let every writer end after its transaction; returns at once."""
        self._over.set()
        self._awake.set()

    def join(self) -> None:
        """Wait until every writer has ended. Raises what one of them could not cope with, such as WriterFailed."""
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    @property
    def running(self) -> bool:
        """Whether anybody still writes."""
        return any(thread.is_alive() for thread in self._threads)

    def read_ledger(self, dsn: str | None = None) -> dict[Fact, float]:
        """Every change that was committed and has survived, as the judge wants it; from another server, if given."""
        with contextlib.closing(psycopg2.connect(dsn or self.dsn)) as conn, conn.cursor() as cursor:
            cursor.execute("select table_name, op, mark from ledger")
            facts = [Fact(*row) for row in cursor.fetchall()]
        assert len(set(facts)) == len(facts), "a writer has told one fact twice"
        return dict.fromkeys(facts, 0.0)

    # -- threads ------------------------------------------------------------------------------------------------

    def _guard(self, job: Callable[..., None], *arguments: object) -> None:
        try:
            job(*arguments)
        except psycopg2.Error as error:
            failure = WriterFailed(self.seed, f"{type(error).__name__} ({error.pgcode}): {str(error).strip()}")
            failure.__cause__ = error
            self._errors.append(failure)
            self.stop()
        except BaseException as error:  # noqa: BLE001  # it is raised again by join
            self._errors.append(error)
            self.stop()

    def _conduct(self) -> None:
        rng = random.Random(f"{self.seed} conductor")
        while not self._over.wait(rng.uniform(0.5, 1.5)):
            if self._elapsed() > self.seconds:
                self._over.set()
            elif self.lulls:
                self._awake.clear()
                self._over.wait(rng.uniform(0.12, 0.4))
                self._awake.set()
        self._awake.set()

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _write(self, number: int) -> None:
        rng = random.Random(f"{self.seed} writer {number}")
        pace = _Pace(self.rate, rng.random() if self.rate else 0.0)

        def write(writer: _Writer) -> None:
            while not self._over.is_set():
                self._awake.wait()
                if self._over.wait(pace.next()):
                    return
                isolation = rng.choice(_ISOLATION)
                body = partial(_small_transaction, plan=rng.getrandbits(64), keys=self._keys)
                for _ in range(5):
                    outcome = self._transact(writer, isolation, body)
                    self._count(outcome)
                    if outcome != "retried":
                        break

        self._live(number, write, _SESSIONS[number % len(_SESSIONS)], share=number / self.writers)

    def _dawdle(self, number: int) -> None:
        """An early transaction id and an early seq, for a change that is committed late; then a late change."""
        rng = random.Random(f"{self.seed} dawdler {number}")

        def late(w: _Writer) -> None:
            w.upsert("hot", (OWN_KEY + number,), rng)
            self._over.wait(self.linger)
            for table, key in rng.sample(self._keys, 3):
                w.upsert(table, key, rng)

        def dawdle(writer: _Writer) -> None:
            while not self._over.is_set():
                self._awake.wait()
                outcome = self._transact(writer, "read committed", late)
                self._count("dawdled" if outcome == "read committed" else outcome)

        self._live(number, dawdle)

    def _stay_open(self) -> None:
        rng = random.Random(f"{self.seed} open")

        def stay(w: _Writer) -> None:
            w.upsert("hot", (OWN_KEY,), rng)
            began = time.time()
            self._over.wait(self.open_for)
            w.upsert("hot", (OWN_KEY,), rng)
            self.opened = (began, time.time())

        self._wait_until(self.open_at)
        self._live(99, lambda writer: self._insist(writer, stay, "stayed open"))

    def _truncate(self) -> None:
        before: list[int] = []

        def truncate(writer: _Writer) -> None:
            number = writer.count_truncations() if self.ledger else 0
            before.append(number)
            # Connected again, it may have happened: the answer was lost.
            if number == before[0]:
                self._insist(writer, partial(_Writer.truncate, number=number), "truncated")
            else:
                self._count("truncated")

        self._wait_until(self.truncate_at)
        self._live(98, truncate)

    def _wait_until(self, at: float | None) -> None:
        self._over.wait(max(0.0, (at or 0.0) - self._elapsed()))

    def _insist(self, writer: _Writer, body: Callable[[_Writer], None], done: str) -> None:
        """One transaction, as often as it takes."""
        while (outcome := self._transact(writer, "read committed", body)) != "read committed":
            self._count(outcome)
            if outcome != "retried" and self._over.is_set():
                return
        self._count(done)

    def _transact(self, writer: _Writer, isolation: str, body: Callable[[_Writer], None]) -> str:
        """One transaction; returns how it ended: the isolation level if it was committed."""
        try:
            writer.transact(isolation, body)
        except _RETRY:
            return "retried"
        except psycopg2.errors.UniqueViolation:
            return "failed"
        except _GivenUp:
            return "rolled back"
        except psycopg2.Error as error:
            if error.pgcode not in self.expected:
                raise
            self._over.wait(_BREATH)
            return f"expected {error.pgcode}"
        return isolation

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1

    # -- sessions -----------------------------------------------------------------------------------------------

    def _live(
        self, number: int, live: Callable[[_Writer], None], settings: str = "", *, share: float | None = None
    ) -> None:
        """Let one writer do what it does, in one session after another if there is a ledger to tell the truth.

        Args:
            number: of the writer.
            live: returns when it is done; called again in a new session when the old one was lost.
            settings: of its sessions.
            share: which part of the writers comes before this one; None: it is none of the many.
        """
        if self.asynchronous is not None:
            off = self.asynchronous > share if share is not None else self.asynchronous >= 1
            settings += f"; set synchronous_commit = {'off' if off else 'on'}"
        writer = _Writer(self, number)
        while not self._live_once(writer, live, settings):
            self._count("disconnected")
            if self._over.wait(_BREATH):
                return

    def _live_once(self, writer: _Writer, live: Callable[[_Writer], None], settings: str) -> bool:
        """One session's life; False when it was lost, or could not begin."""
        try:
            conn = self._connect(settings)
        except psycopg2.OperationalError:
            if not self.ledger:
                raise
            return False
        with contextlib.closing(conn):
            try:
                writer.use(conn)
                live(writer)
            except psycopg2.Error as error:
                if not self.ledger or not (conn.closed or _is_lost(error)):
                    raise
                return False
        return True

    def _connect(self, settings: str) -> connection:
        conn = psycopg2.connect(self.dsn)
        try:
            conn.autocommit = True
            with conn.cursor() as cursor:
                cursor.execute(f"set deadlock_timeout = '20ms'; {settings}")
            conn.autocommit = False
        except BaseException:
            conn.close()
            raise
        return conn


def _is_lost(error: psycopg2.Error) -> bool:
    return type(error) in _CUT_OFF if error.pgcode is None else error.pgcode.startswith(_LOST)


class _Pace:
    """So many a second, without making up for what was missed."""

    def __init__(self, rate: float | None, phase: float) -> None:
        self._interval = 1 / rate if rate else 0.0
        self._next = time.monotonic() + phase * self._interval

    def next(self) -> float:
        """Seconds until the next one is due."""
        now = time.monotonic()
        due = max(self._next, now)
        self._next = due + self._interval
        return due - now


class _Writer:
    """One session at a time, and the log of what its transaction has written."""

    def __init__(self, workload: Workload, number: int) -> None:
        self._workload = workload
        self._mark = (workload.generation * 1000 + number) * 10**9
        self.log: list[Fact] = []

    def use(self, conn: connection) -> None:
        """Go on in this session."""
        self._conn = conn
        self._cursor = conn.cursor()

    def transact(self, isolation: str, body: Callable[[_Writer], None]) -> None:
        """Run one transaction; what it changed counts only once the COMMIT has succeeded."""
        self.log = []
        try:
            self._cursor.execute(f"set transaction isolation level {isolation}")
            body(self)
            if self._workload.ledger:
                self._tell()
            about_to = time.time()
            self._conn.commit()
        except BaseException:
            if not self._conn.closed:
                self._conn.rollback()
            raise
        self._workload.committed.update(dict.fromkeys(self.log, about_to))

    def insert(self, table: str, key: tuple[object, ...], rng: random.Random, conflict: str = "") -> None:
        columns = self._columns(rng, len(_VALUES))
        names = [*TABLES[table], "ver", "mark", *columns]
        values = [*key, 1, self._next_mark(), *columns.values()]
        self._execute(
            table,
            f"insert into {table} as t ({', '.join(names)}) values ({', '.join(['%s'] * len(names))}) {conflict}",
            values,
        )

    def upsert(self, table: str, key: tuple[object, ...], rng: random.Random) -> None:
        changed = ["mark", *rng.sample(list(_VALUES), rng.randrange(3))]
        self.insert(
            table,
            key,
            rng,
            f"on conflict ({', '.join(TABLES[table])}) do update set ver = t.ver + 1, "
            + ", ".join(f"{column} = excluded.{column}" for column in changed),
        )

    def update(
        self, table: str, key: tuple[object, ...], rng: random.Random, to: tuple[object, ...] | None = None
    ) -> None:
        columns = self._columns(rng, rng.randrange(3))
        if to is not None:
            columns.update(zip(TABLES[table], to, strict=True))
        assignments = "".join(f", {column} = %s" for column in columns)
        self._execute(
            table,
            f"update {table} set ver = ver + 1, mark = %s{assignments} where {_is(table)}",
            [self._next_mark(), *columns.values(), *key],
        )

    def touch(self, table: str, key: tuple[object, ...]) -> None:
        """An update that changes nothing, and so is no event."""
        self._cursor.execute(f"update {table} set ver = ver where {_is(table)}", key)

    def delete(self, table: str, key: tuple[object, ...]) -> None:
        self._cursor.execute(f"delete from {table} where {_is(table)} returning mark", key)
        self.log += [Fact(table, "delete", mark) for (mark,) in self._cursor.fetchall()]

    def truncate(self, number: int) -> None:
        self._cursor.execute("truncate hot")
        self.log.append(Fact("hot", "truncate", number))

    def count_truncations(self) -> int:
        """How many there were, says the ledger."""
        self._cursor.execute("select count(*) from ledger where op = 'truncate'")
        (count,) = self._cursor.fetchone() or (0,)
        self._conn.rollback()
        return int(count)

    def _tell(self) -> None:
        """Enter the transaction's changes into the ledger."""
        if self.log:
            columns = [list(column) for column in zip(*self.log, strict=True)]
            self._cursor.execute("insert into ledger select * from unnest(%s, %s, %s::bigint[])", columns)

    def savepoint(self, body: Callable[[_Writer], None]) -> None:
        """Do something, and undo it."""
        self._cursor.execute("savepoint s")
        logged = len(self.log)
        body(self)
        self._cursor.execute("rollback to savepoint s")
        del self.log[logged:]

    def _execute(self, table: str, statement: str, values: list[object]) -> None:
        self._cursor.execute(f"{statement} returning ver, mark", values)
        self.log += [Fact(table, "insert" if ver == 1 else "update", mark) for ver, mark in self._cursor.fetchall()]

    def _next_mark(self) -> int:
        self._mark += 1
        return self._mark

    def _columns(self, rng: random.Random, count: int) -> dict[str, object]:
        return {
            column: None if rng.random() < 0.15 else _VALUES[column](rng) for column in rng.sample(list(_VALUES), count)
        }


def _is(table: str) -> str:
    return " and ".join(f"{column} = %s" for column in TABLES[table])


def _small_transaction(writer: _Writer, plan: int, keys: list[_Key]) -> None:
    """One to five changes of hot rows, some of them undone; raises _GivenUp to undo them all."""
    rng = random.Random(plan)

    def change(w: _Writer) -> None:
        table, key = rng.choice(keys)
        match rng.choices(list(_CHANGES), list(_CHANGES.values()))[0]:
            case "upsert":
                w.upsert(table, key, rng)
            case "update":
                w.update(table, key, rng)
            case "insert":
                w.insert(table, key, rng, "on conflict do nothing")
            case "delete":
                w.delete(table, key)
            case "move":
                to = rng.choice([k for t, k in keys if t == table and k != key])
                w.delete(table, to)
                w.update(table, key, rng, to)
            case "touch":
                w.touch(table, key)
            case "plain":
                w.insert(table, key, rng)

    for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
        if rng.random() < 0.15:
            writer.savepoint(change)
        else:
            change(writer)
    if rng.random() < 0.08:
        raise _GivenUp
