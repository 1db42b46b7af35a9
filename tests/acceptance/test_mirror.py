"""The mirror test: writers do their worst, and the file, applied to empty tables, gives what they left behind."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest
from harness import SEEDS, Project, Tail, percentile, read_lines, report, until
from judge import Line, Stream, check, facts_of, read_source
from psycopg2.extensions import connection
from workload import CAPTURED, OWN_KEY, SCHEMA, TABLES, Workload

SECONDS = 20.0
OPEN_AT, OPEN_FOR = 3.0, 5.0
TRUNCATE_AT = 12.0
LINGER = 0.2
BATCH = 500
"""The default of `batch: {events: …}`: what one crash can repeat."""
LEAST_EVENTS = 2000
LATENCY = 1.0


@pytest.fixture
def mirror(tmp_path: Path, database: str, connect: Callable[..., connection]) -> Iterator[Project]:
    """The writers' tables, captured."""
    made = Project(tmp_path, database, CAPTURED, "{database}.jsonl")
    with connect(database).cursor() as cursor:
        cursor.execute(SCHEMA)
    made.cdc("migrate")
    yield made
    made.remove_output()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_file_is_a_mirror_and_an_open_transaction_delays_nobody_else(mirror: Project, seed: int) -> None:
    file = mirror.directory / "shop.jsonl"
    with Tail(file) as tail, _Armings(mirror) as armings, mirror.daemon() as daemon:
        with _workload(mirror, seed) as work:
            work.join()
        assert daemon.drain() == 0
        stream = _finish(mirror, file, work, seed)
        tail.wait_for(len(stream.first) + stream.duplicates)

    assert stream.duplicates == 0, "nobody was killed, so nothing had to be delivered twice"
    from_capture, from_commit, own = _latencies(stream, tail.arrivals, work)
    report(
        f"armed {armings.count} times; while a transaction stayed open {work.opened[1] - work.opened[0]:.1f} s: "
        f"{len(from_capture)} events of others, {_figures('capture to file', from_capture)}, "
        f"{_figures('COMMIT to file', from_commit)}; its own {own:.3f} s after COMMIT"
    )
    assert armings.count >= 3, "the bell was hardly ever armed: the test did not test it"
    assert len(from_capture) > 200, "too little happened while the transaction was open"
    assert percentile(from_capture, 0.99) < LATENCY
    assert percentile(from_commit, 0.99) < LATENCY
    assert own < LATENCY


@pytest.mark.parametrize("seed", SEEDS)
def test_a_daemon_killed_every_second_loses_nothing_and_keeps_the_order(mirror: Project, seed: int) -> None:
    file = mirror.directory / "shop.jsonl"
    rng = random.Random(f"{seed} killer")
    grown: list[int] = []  # by daemon: bytes it wrote
    with _workload(mirror, seed) as work:
        while work.running:
            began = _size(file)
            with mirror.daemon() as daemon:
                daemon.lives_for(rng.uniform(0.1, 1.0))
                if len(grown) % 3:  # where it hurts: delivered, and perhaps not yet acknowledged
                    size = _size(file)
                    until(lambda: _size(file) > size or not work.running, "something is delivered", pause=0.0005)  # noqa: B023  # called at once
            grown.append(_size(file) - began)
    kills = len(grown)
    by_killed = file.read_bytes().count(b"\n")
    stream = _finish(mirror, file, work, seed)
    report(
        f"{kills} kills, {sum(1 for size in grown if size > 0)} of them after deliveries, in all {by_killed} lines; "
        f"{stream.duplicates} duplicates, {stream.duplicates / kills:.1f} per kill"
    )
    assert kills >= 5
    assert sum(1 for size in grown if size > 0) >= kills / 2, "those that were killed had hardly delivered anything"
    assert stream.duplicates > 0, "no kill came between a delivery and its acknowledgement"
    assert stream.duplicates <= kills * BATCH


def _workload(mirror: Project, seed: int) -> Workload:
    return Workload(
        mirror.dsn, seed, SECONDS, open_at=OPEN_AT, open_for=OPEN_FOR, linger=LINGER, truncate_at=TRUNCATE_AT
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _finish(mirror: Project, file: Path, work: Workload, seed: int) -> Stream:
    """Deliver what is left, see that a second time adds nothing, and judge the whole."""
    mirror.cdc("run", "--until-idle")
    lines = read_lines(file)
    mirror.cdc("run", "--until-idle")
    assert read_lines(file) == lines, "nothing was left to deliver, and something was delivered"
    stream = check(lines, work.committed, read_source(mirror.dsn, TABLES), seed)
    ops = Counter(line.event.op.value for line in stream.first)
    moved = sum(1 for line in stream.first if {"id", "b"} & set(line.event.changed or ()))
    report(f"{len(stream.first)} events: {dict(ops)}, {moved} changed keys; transactions: {dict(work.outcomes)}")
    assert len(stream.first) > LEAST_EVENTS
    assert ops["truncate"] == 1
    return stream


def _latencies(stream: Stream, arrivals: list[float], work: Workload) -> tuple[list[float], list[float], float]:
    """Seconds to the file, of what others captured while the transaction was open: from capture and from COMMIT;
    and from the COMMIT of that transaction to its last event."""
    began, ended = work.opened
    from_capture, from_commit, own = [], [], 0.0
    for fact, line in facts_of(stream).items():
        arrived = arrivals[line.number - 1]
        if _is_own(line):
            own = max(own, arrived - work.committed[fact])
        elif began <= line.event.source.ts.timestamp() <= ended:
            from_capture.append(arrived - line.event.source.ts.timestamp())
            from_commit.append(arrived - work.committed[fact])
    return from_capture, from_commit, own


def _is_own(line: Line) -> bool:
    return line.event.key is not None and line.event.key.get("id") == OWN_KEY


def _figures(what: str, values: list[float]) -> str:
    p50, p99 = (percentile(values, share) * 1000 for share in (0.5, 0.99))
    return f"{what} p50 {p50:.0f} p99 {p99:.0f} max {max(values) * 1000:.0f} ms"


class _Armings(threading.Thread):
    """Counts how often the bell was seen to become armed."""

    def __init__(self, project: Project) -> None:
        super().__init__(name="armings", daemon=True)
        self.count = 0
        self._project = project
        self._done = threading.Event()

    def run(self) -> None:
        with contextlib.closing(psycopg2.connect(self._project.dsn)) as conn:
            conn.autocommit = True
            was = False
            while not self._done.wait(0.02):
                is_ = self._project.armed(conn)
                self.count += is_ and not was
                was = is_

    def __enter__(self) -> _Armings:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()
