"""Writers who do their worst: many of them over few rows, in every kind of transaction, and each keeps a log."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import psycopg2
from judge import Fact
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
HOT_KEYS = [("hot", (n,)) for n in range(1, 41)] + [("pair", (a, b)) for a in ("x", 'é"\\') for b in range(5)]
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
_SESSIONS = [  # none of these may leak into an event
    "set timezone = 'Asia/Kolkata'; set datestyle = 'SQL, DMY'; set intervalstyle = 'iso_8601'",
    "set bytea_output = 'escape'; set extra_float_digits = 0; set timezone = 'America/St_Johns'",
    "set synchronous_commit = off; set intervalstyle = 'sql_standard'; set datestyle = 'German'",
    "set search_path = public, pg_catalog",
]
_ISOLATION = ["read committed"] * 3 + ["repeatable read", "serializable"]
_RETRY = (psycopg2.errors.SerializationFailure, psycopg2.errors.DeadlockDetected)


class _GivenUp(Exception):
    """The writer rolls back of its own free will."""


@dataclass
class Workload:
    """Many writers over few rows, for some seconds, each keeping a log of what it committed.

    Every insert and update writes a mark that nobody else ever writes, so that each committed change can be told from
    every other, and one that was rolled back would be recognised.

    Attributes:
        dsn, seed: where, and what the writers' choices come from.
        seconds: how long.
        writers: threads that write small transactions.
        open_at, open_for: when one transaction writes its own key, and how long it stays open; None: never.
        linger: seconds; two more threads write their own key first, and a hot one in the end, so late. 0: none.
        lulls: pause everybody now and then, so that the daemon falls asleep in between.
        truncate_at: when table hot is truncated; None: never.
        committed: every change that was committed, with the time just before its COMMIT.
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
            self._over.set()
            self._awake.set()
        self.join()

    def join(self) -> None:
        """Wait until every writer has ended. Raises what one of them could not cope with."""
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    @property
    def running(self) -> bool:
        """Whether anybody still writes."""
        return any(thread.is_alive() for thread in self._threads)

    # -- threads ------------------------------------------------------------------------------------------------

    def _guard(self, job: Callable[..., None], *arguments: object) -> None:
        try:
            job(*arguments)
        except BaseException as error:  # noqa: BLE001  # it is raised again by join
            self._errors.append(error)
            self._over.set()
            self._awake.set()

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
        with self._connect(_SESSIONS[number % len(_SESSIONS)]) as conn:
            writer = _Writer(self, conn, number)
            while not self._over.is_set():
                self._awake.wait()
                isolation = rng.choice(_ISOLATION)
                plan = rng.getrandbits(64)
                for _ in range(5):
                    try:
                        writer.transact(isolation, partial(_small_transaction, plan=plan))
                        outcome = isolation
                    except _RETRY:
                        self._count("retried")
                        continue
                    except psycopg2.errors.UniqueViolation:
                        outcome = "failed"
                    except _GivenUp:
                        outcome = "rolled back"
                    self._count(outcome)
                    break

    def _dawdle(self, number: int) -> None:
        """An early transaction id and an early seq, for a change that is committed late; then a late change."""
        rng = random.Random(f"{self.seed} dawdler {number}")
        with self._connect("") as conn:
            writer = _Writer(self, conn, number)

            def late(w: _Writer) -> None:
                w.upsert("hot", (OWN_KEY + number,), rng)
                self._over.wait(self.linger)
                for table, key in rng.sample(HOT_KEYS, 3):
                    w.upsert(table, key, rng)

            while not self._over.is_set():
                self._awake.wait()
                try:
                    writer.transact("read committed", late)
                except _RETRY:
                    self._count("retried")
                else:
                    self._count("dawdled")

    def _stay_open(self) -> None:
        rng = random.Random(f"{self.seed} open")
        with self._connect("") as conn:

            def stay(w: _Writer) -> None:
                w.upsert("hot", (OWN_KEY,), rng)
                began = time.time()
                self._over.wait(self.open_for)
                w.upsert("hot", (OWN_KEY,), rng)
                self.opened = (began, time.time())

            self._over.wait(self.open_at)
            _Writer(self, conn, 99).transact("read committed", stay)

    def _truncate(self) -> None:
        self._over.wait(self.truncate_at)
        with self._connect("") as conn:
            writer = _Writer(self, conn, 98)
            while True:
                try:
                    writer.transact("read committed", _Writer.truncate)
                except _RETRY:
                    self._count("retried")
                else:
                    self._count("truncated")
                    return

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1

    @contextlib.contextmanager
    def _connect(self, settings: str) -> Iterator[connection]:
        with contextlib.closing(psycopg2.connect(self.dsn)) as conn:
            conn.autocommit = True
            with conn.cursor() as cursor:
                cursor.execute(f"set deadlock_timeout = '20ms'; {settings}")
            conn.autocommit = False
            yield conn


class _Writer:
    """One session, and the log of what it has written."""

    def __init__(self, workload: Workload, conn: connection, number: int) -> None:
        self._workload = workload
        self._conn = conn
        self._cursor = conn.cursor()
        self._mark = number * 10**9
        self.log: list[Fact] = []

    def transact(self, isolation: str, body: Callable[[_Writer], None]) -> None:
        """Run one transaction; what it changed counts only once the COMMIT has succeeded."""
        self.log = []
        try:
            self._cursor.execute(f"set transaction isolation level {isolation}")
            body(self)
            about_to = time.time()
            self._conn.commit()
        except BaseException:
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

    def truncate(self) -> None:
        self._cursor.execute("truncate hot")
        self.log.append(Fact("hot", "truncate", 0))

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


def _small_transaction(writer: _Writer, plan: int) -> None:
    """One to five changes of hot rows, some of them undone; raises _GivenUp to undo them all."""
    rng = random.Random(plan)

    def change(w: _Writer) -> None:
        table, key = rng.choice(HOT_KEYS)
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
                to = rng.choice([k for t, k in HOT_KEYS if t == table and k != key])
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
