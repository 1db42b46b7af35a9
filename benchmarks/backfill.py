"""What a backfill costs those beside it: the stream's latency, and the writers' throughput.

    .venv/bin/python -m benchmarks.backfill [--dsn DSN] [--rows N] [--seconds S] [--rounds N] [--only latency|writers]

Without --dsn an embedded PostgreSQL with its default durability is used. A table of --rows rows; eight writers update
random rows of it, at a fixed rate for the latency (commit until the line stands in the file) and as fast as they can
for the throughput; the daemon is the installed command with a file sink. Each round measures without a backfill and
then during one, which is started again until the time is over. Ratios of one machine at one time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg2

from cdc import embedded

CDC = Path(sys.executable).with_name("cdc")
WRITERS = 8


class Stand:
    """One database, one configuration, one file.

    Attributes:
        committed: transactions so far.
        at: when a version was committed.
        seen: how long after that its line was there.
    """

    def __init__(self, dsn: str, directory: Path, rows: int) -> None:
        self.dsn = dsn
        self.rows = rows
        self.file = directory / "out.jsonl"
        self.config = directory / "config.yaml"
        self.committed = 0
        self.at: dict[int, float] = {}
        self.seen: list[float] = []
        self.session = psycopg2.connect(dsn)
        self.session.autocommit = True
        with self.session.cursor() as cursor:
            cursor.execute("create sequence version")
            cursor.execute("create table bench (id bigint primary key, ver bigint not null default 0, note text)")
            cursor.execute("insert into bench select g, 0, repeat('x', 100) from generate_series(1, %s) g", (rows,))
            cursor.execute("analyze bench")
        content = {
            "databases": {"shop": {"dsn": dsn, "tables": {"public.bench": {}}}},
            "sinks": {"out": {"type": "file", "path": str(self.file)}},
        }
        self.config.write_text(json.dumps(content))
        self.cdc("migrate")

    def cdc(self, *arguments: str) -> None:
        subprocess.run([CDC, "-c", self.config, *arguments], check=True, capture_output=True)

    @contextmanager
    def daemon(self) -> Iterator[None]:
        process = subprocess.Popen([CDC, "-c", self.config, "run"], stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)

    @contextmanager
    def backfills(self, wanted: bool) -> Iterator[None]:
        """One after the other, if wanted, until the block ends."""
        done = threading.Event()

        def again() -> None:
            with psycopg2.connect(self.dsn) as session, session.cursor() as cursor:
                while not done.wait(0.2):
                    cursor.execute("select from cdc.backfill where state = 'running'")
                    if not cursor.fetchall():
                        self.cdc("backfill", "start", "out")
                    session.rollback()

        if wanted:
            self.cdc("backfill", "start", "out")
        thread = threading.Thread(target=again)
        if wanted:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if wanted:
                thread.join()
                subprocess.run([CDC, "-c", self.config, "backfill", "cancel", "out"], check=False, capture_output=True)

    def told(self) -> int:
        """Rows told of so far."""
        with self.session.cursor() as cursor:
            cursor.execute("select coalesce(sum(rows_told), 0) from cdc.backfill_progress")
            return int(cursor.fetchone()[0])  # type: ignore[index]  # an aggregate has a row

    def write(self, done: threading.Event, pause: float, seed: int) -> None:
        rng = random.Random(seed)  # noqa: S311  # which row, no secret
        with psycopg2.connect(self.dsn) as conn, conn.cursor() as cursor:
            while not done.wait(pause * rng.uniform(0.5, 1.5)):
                cursor.execute(
                    "update bench set ver = nextval('version') where id = %s returning ver",
                    (rng.randint(1, self.rows),),
                )
                (version,) = cursor.fetchone() or (0,)
                conn.commit()
                self.committed += 1
                if pause:
                    self.at[version] = time.monotonic()

    def watch(self, done: threading.Event) -> None:
        with self.file.open("rb") as file:
            file.seek(0, os.SEEK_END)
            rest = b""
            while not done.is_set():
                data = file.read()
                if not data:
                    time.sleep(0.0005)
                    continue
                now = time.monotonic()
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if b'"op":"update"' in line:
                        at = self.at.pop(int(json.loads(line)["after"]["ver"]), now)
                        self.seen.append(max(now - at, 0.0))

    def measure(self, seconds: float, pause: float, backfill: bool) -> tuple[float, float]:
        """The 99th percentile of the latency in ms (0 without a pause), and transactions a second."""
        done = threading.Event()
        threads = [threading.Thread(target=self.write, args=(done, pause, seed)) for seed in range(WRITERS)]
        if pause:
            threads.append(threading.Thread(target=self.watch, args=(done,)))
        with self.backfills(backfill):
            for thread in threads:
                thread.start()
            time.sleep(1.0)
            self.seen.clear()
            before, began = self.committed, time.monotonic()
            time.sleep(seconds)
            rate = (self.committed - before) / (time.monotonic() - began)
            seen = sorted(self.seen)
            done.set()
            for thread in threads:
                thread.join()
        return (seen[int(len(seen) * 0.99)] * 1000 if seen else 0.0), rate


def run(dsn: str, directory: Path, given: argparse.Namespace) -> None:
    stand = Stand(dsn, directory, given.rows)
    with stand.daemon():
        stand.file.touch()
        for stage, pause in (("latency", WRITERS / given.rate), ("writers", 0.0)):
            if given.only not in (None, stage):
                continue
            found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
            told = stand.told()
            for _ in range(given.rounds):
                for backfill in (False, True):
                    found[backfill].append(stand.measure(given.seconds, pause, backfill))
            told = stand.told() - told
            spent = given.rounds * (given.seconds + 1)
            column = 0 if stage == "latency" else 1
            without, during = (statistics.median(one[column] for one in found[which]) for which in (False, True))
            if stage == "latency":
                print(f"p99 from commit to line: {without:.1f} ms without, {during:.1f} ms during a backfill", end=" ")
            else:
                print(f"writers: {without:.0f} transactions/s without, {during:.0f} during a backfill", end=" ")
            print(f"(x {during / max(without, 0.001):.2f}); {told / spent:.0f} rows/s told")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dsn", help="an empty database to use, as a superuser (default: an embedded server)")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rate", type=float, default=200.0, help="transactions a second, for the latency")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("latency", "writers"))
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {given.rows} rows of about 130 bytes, {WRITERS} writers")
    with tempfile.TemporaryDirectory() as directory:
        if given.dsn:
            run(given.dsn, Path(directory), given)
            return
        # Of its own, and directly in /tmp: as root, PostgreSQL runs as somebody who may not enter ours.
        home = Path(tempfile.mkdtemp(prefix="cdc-bench-pg-"))
        try:
            with embedded.start(home) as server:
                run(server.dsn(), Path(directory), given)
        finally:
            shutil.rmtree(home)


if __name__ == "__main__":
    main()
