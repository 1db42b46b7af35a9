"""What capture costs the writer, and how fast changes come out: the README's figures, in one run.

    .venv/bin/python benchmarks/quick.py [--dsn DSN] [--seconds S] [--rounds N]

Without --dsn an embedded PostgreSQL with its default durability (fsync on) is used; --only runs one stage. Writers are
pgbench, the daemon is the installed command with a file sink. Ratios are medians of interleaved rounds on one machine
at one time; absolute figures are worth no more than the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

import psutil
import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from cdc import embedded
from cdc.event import Event

CDC = Path(sys.executable).with_name("cdc")
ROWS = 100_000
TABLE = "id bigint primary key, n int, price numeric, name text, note text, at timestamptz"
FILL = "select g, 0, g * 1.1, 'name ' || g, 'some note or other', now() from generate_series(1, {rows}) g"


class Bench:
    """One database, one configuration, and pgbench."""

    def __init__(self, dsn: str, pgbench: str, directory: Path) -> None:
        self.dsn = dsn
        self.pgbench = pgbench
        self.out = directory / "out.jsonl"
        self.config = directory / "config.yaml"
        self.script = directory / "update.sql"
        self.script.write_text(f"\\set id random(1, {ROWS})\nupdate bench set n = n + 1 where id = :id;\n")
        self.session = psycopg2.connect(dsn)
        self.session.autocommit = True

    def run(self, statement: str) -> object:
        with self.session.cursor() as cursor:
            cursor.execute(statement)
            row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None

    def configure(self, notify: str = "adaptive") -> None:
        tables = {"public.bench": {}}
        self.config.write_text(
            json.dumps(
                {
                    "databases": {"bench": {"dsn": self.dsn, "tables": tables, "notify": notify}},
                    "sinks": {"out": {"type": "file", "path": str(self.out)}},
                }
            )
        )
        subprocess.run([CDC, "-c", self.config, "migrate"], check=True, stdout=subprocess.DEVNULL)

    def fresh(self, rows: int) -> None:
        self.run("drop table if exists bench")
        self.run(f"create table bench ({TABLE})")
        self.run(f"insert into bench {FILL.format(rows=rows)}")
        self.run("vacuum analyze bench")

    @contextmanager
    def daemon(self) -> Iterator[psutil.Process]:
        command = [CDC, "-c", self.config, "--log-level", "warning", "run"]
        process = subprocess.Popen(command)
        try:
            while not self.run(
                "select exists (select from pg_locks where locktype = 'advisory' and classid = 6513764)"
            ):
                time.sleep(0.05)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)

    def tps(self, clients: int, seconds: float) -> float:
        place = parse_dsn(self.dsn)
        command = [self.pgbench, "-n", "-M", "prepared", "-c", str(clients), "-j", "2", "-T", str(int(seconds))]
        command += ["-f", str(self.script), "-h", place.get("host", ""), "-p", place.get("port", "5432")]
        command += ["-U", place["user"], place["dbname"]]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return float(next(line for line in output.splitlines() if line.startswith("tps")).split()[2])

    def triggers(self, verb: str) -> None:
        self.run(f"alter table bench {verb} trigger user")


def writers(bench: Bench, seconds: float, rounds: int) -> None:
    """One-row updates by pgbench: without a trigger, captured with the daemon running, and the plain NOTIFY pattern."""
    for clients in (8, 32):
        bench.fresh(ROWS)
        bench.configure()
        bench.run("create table if not exists plain_note (id bigint)")
        bench.run(
            "create or replace function plain_notify() returns trigger language plpgsql as "
            "$$ begin perform pg_notify('plain', to_json(new)::text); return null; end $$"
        )
        bench.run("create trigger plain after update on bench for each row execute function plain_notify()")
        figures: dict[str, list[float]] = {"untriggered": [], "captured": [], "plain NOTIFY": []}
        for _ in range(rounds):
            bench.triggers("disable")
            figures["untriggered"].append(bench.tps(clients, seconds))
            bench.run('alter table bench enable trigger "00_cdc_capture"')
            with bench.daemon():
                figures["captured"].append(bench.tps(clients, seconds))
            bench.triggers("disable")
            bench.run("alter table bench enable trigger plain")
            figures["plain NOTIFY"].append(bench.tps(clients, seconds))
            bench.triggers("disable")
        base = statistics.median(figures["untriggered"])
        shown = ", ".join(
            f"{name} {statistics.median(tps):.0f} tps ({statistics.median(tps) / base:.2f})"
            for name, tps in figures.items()
        )
        print(f"one-row updates, {clients} clients: {shown}")


def latency(bench: Bench, seconds: float, rate: int = 200) -> None:
    """From the writer's COMMIT having returned to the line being readable in the file."""
    bench.fresh(1000)
    bench.configure()
    bench.out.unlink(missing_ok=True)
    bench.out.touch()
    committed: dict[int, float] = {}
    delays: list[float] = []
    done = threading.Event()

    def tail() -> None:
        rest = ""
        with bench.out.open() as file:
            while not done.is_set():
                text = file.read()
                if not text:
                    time.sleep(0.0002)
                    continue
                now = time.perf_counter()
                *lines, rest = (rest + text).split("\n")
                for line in lines:
                    key = Event.from_json(line).key
                    delays.append(now - committed[key["id"] if key else 0])

    with bench.daemon():
        time.sleep(1)  # until the bell is armed
        reader = threading.Thread(target=tail)
        reader.start()
        began = time.perf_counter()
        for number in range(int(rate * seconds)):
            key = number % 1000 + 1
            # Set before too: the line may be there before the COMMIT has returned to us.
            committed[key] = time.perf_counter()
            bench.run(f"update bench set n = n + 1 where id = {key}")
            committed[key] = time.perf_counter()
            time.sleep(max(0.0, began + (number + 1) / rate - time.perf_counter()))
        time.sleep(1)
        done.set()
        reader.join()
    delays.sort()
    shown = " ".join(f"p{p} {delays[int(len(delays) * p / 100)] * 1000:.1f}" for p in (50, 99))
    print(f"latency at {rate} changes/s, commit to line on disk: {shown} ms ({len(delays)} events)")


def backlog(bench: Bench, rows: int = 200_000) -> None:
    """Everything a daemon that was away finds when it comes back."""
    bench.fresh(rows)
    bench.configure()
    bench.out.unlink(missing_ok=True)
    began = time.perf_counter()
    bench.run("update bench set n = n + 1")
    wrote = time.perf_counter() - began
    began, peak = time.perf_counter(), 0
    with bench.daemon() as daemon:
        while not bench.out.exists() or bench.out.stat().st_size == 0:
            time.sleep(0.01)
        while bench.run("select snap_hi is not null or (select count(*) from cdc.position) = 0 from cdc.position"):
            peak = max(peak, daemon.memory_info().rss)
            time.sleep(0.05)
        took = time.perf_counter() - began
    lines = sum(1 for _ in bench.out.open())
    print(
        f"backlog of {rows} updates of one transaction: written in {wrote:.1f} s, read at {lines / took:.0f} events/s "
        f"(its start included), peak RSS {peak / 2**20:.0f} MiB, {bench.out.stat().st_size // lines} bytes each"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dsn", help="a superuser's dsn; a database cdc_bench is made there and dropped")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["writers", "latency", "backlog"])
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="cdc-bench-"))
    # A directory of its own: PostgreSQL may have to run as another user than we do.
    home = Path(tempfile.mkdtemp(prefix="cdc-bench-pg-"))
    server = None if options.dsn else embedded.start(home)
    admin = options.dsn or (server.dsn() if server else "")
    pgbench = str(server.bindir / "pgbench") if server else shutil.which("pgbench") or "pgbench"
    session = psycopg2.connect(admin)
    session.autocommit = True
    try:
        with session.cursor() as cursor:
            cursor.execute("drop database if exists cdc_bench with (force)")
            cursor.execute("create database cdc_bench")
            cursor.execute("show server_version")
            (version,) = cursor.fetchone() or ("?",)
        print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, PostgreSQL {version}")
        bench = Bench(make_dsn(admin, dbname="cdc_bench"), pgbench, directory)
        stages = {
            "latency": lambda: latency(bench, options.seconds * 2),
            "backlog": lambda: backlog(bench),
            "writers": lambda: writers(bench, options.seconds, options.rounds),
        }
        for name, stage in stages.items():
            if options.only in (None, name):
                stage()
        bench.session.close()
        with session.cursor() as cursor:
            cursor.execute("drop database cdc_bench with (force)")
    finally:
        session.close()
        if server:
            server.stop()
        for path in (directory, home):
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
