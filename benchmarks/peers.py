"""`cdc` beside the other ways to hear of changes, interleaved, on one machine, in one run.

    .venv/bin/python -m benchmarks.peers [--stages S,…] [--peers P,…] [--rounds N] [--seconds S] [--append]

benchmarks/README.md tells what each stage measures, how the peers are installed, and what came out. Every event is
parsed and counted: a run whose count is not exactly what was written fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import chart
from benchmarks.quick import FILL, ROWS, TABLE
from benchmarks.rivals import RIVALS, Cdc, CdcEphemeral, Place, Rival, Untriggered, daemon, migrate, until
from benchmarks.server import Server
from cdc.connection import Connection
from cdc.options import BatchOptions
from cdc.outbox import Outbox, Owner

BULK = 200_000
RATE = 200
"""Changes a second whose latency is measured."""
STAGES = ("capture", "latency", "bulk", "read", "validate", "deliver", "curve", "idle", "many")
AMONG_PEERS = ("capture", "latency", "bulk")


class Results:
    """What was measured, on disk after every single run."""

    def __init__(self, path: Path, *, append: bool) -> None:
        self._path = path
        old = json.loads(path.read_text()) if append and path.exists() else {}
        self.runs: list[dict[str, Any]] = old.get("runs", [])
        self.machine: dict[str, Any] = old.get("machine", {})

    def add(self, stage: str, peer: str, **figures: object) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.runs.append({"stage": stage, "peer": peer, "at": now, **figures})
        shown = ", ".join(f"{name} {_short(value)}" for name, value in figures.items())
        print(f"  {stage} {peer}: {shown}", flush=True)
        self.save()

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"machine": self.machine, "runs": self.runs}, indent=1) + "\n")

    def medians(self, stage: str, **only: object) -> dict[str, dict[str, Any]]:
        """By peer, the median over all rounds of each figure."""
        found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        for run in self.runs:
            if run["stage"] == stage and all(run.get(name) == value for name, value in only.items()):
                for name, value in run.items():
                    if isinstance(value, int | float):
                        found[run["peer"]][name].append(value)
        return {
            peer: {name: statistics.median(values) for name, values in figures.items()} | {"rounds": _rounds(figures)}
            for peer, figures in found.items()
        }


def _rounds(figures: dict[str, list[Any]]) -> int:
    return max(len(values) for values in figures.values())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Bench:
    """Servers, started when somebody needs them, and a new database for every run."""

    def __init__(
        self, results: Results, directory: Path, *, seconds: float, rounds: int, clients: Sequence[int]
    ) -> None:
        self.results = results
        self.seconds = seconds
        self.rounds = rounds
        self.clients = clients
        self._directory = directory
        self._servers: dict[bool, Server] = {}
        self._number = 0

    def server(self, *, logical: bool = False) -> Server:
        if logical not in self._servers:
            server = Server(wal_level="logical" if logical else "replica")
            self._servers[logical] = server
            for name, rows in (("filled", ROWS), ("empty", 0)):
                server.run("postgres", f"create database {name}")
                server.run(
                    name,
                    f"create table bench ({TABLE})",
                    f"insert into bench {FILL.format(rows=rows)}",
                    "vacuum analyze bench",
                )
        return self._servers[logical]

    @contextmanager
    def place(self, rival: Rival, template: str = "filled", *, install: bool = True) -> Iterator[Place]:
        """A new database with the table in it, the peer installed, and everything on disk."""
        server = self.server(logical=rival.logical)
        self._number += 1
        name = f"bench_{self._number}"
        server.run("postgres", f"create database {name} template {template}")
        session = server.connect(name)
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            place = Place(server, name, session, Path(directory))
            try:
                if install:
                    rival.install(place)
                place.run("checkpoint")
                yield place
            finally:
                until(lambda: not place.run("select count(*) from pg_replication_slots where active"), 20)
                place.run("select pg_drop_replication_slot(slot_name) from pg_replication_slots")
                session.close()
                server.run("postgres", f"drop database {name} with (force)")

    def stop(self) -> None:
        for server in self._servers.values():
            server.stop()

    def pgbench(self, place: Place, clients: int) -> tuple[float, int]:
        """One-row updates for a while; transactions a second, and how many there were in all."""
        script = place.directory / "update.sql"
        script.write_text(f"\\set id random(1, {ROWS})\nupdate bench set n = n + 1 where id = :id;\n")
        command = [str(place.server.binaries / "pgbench"), "-n", "-M", "prepared", "-c", str(clients), "-j", "2"]
        command += ["-T", str(int(self.seconds)), "-f", str(script), "-h", str(place.server.home)]
        command += ["-p", str(place.server.port), "-U", "postgres", place.name]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        tps = float(next(line for line in lines if line.startswith("tps")).split()[2])
        number = int(next(line for line in lines if "actually processed" in line).split(":")[1].split("/")[0])
        return tps, number


def _consumed(rival: Rival, place: Place, expected: int, patience: float = 120.0) -> float:
    """Wait until all of it is parsed; the monotonic clock then."""
    deadline = time.monotonic() + patience
    while True:
        tally = rival.tally(place)
        if tally.insert + tally.update + tally.other >= expected:
            return tally.at
        if time.monotonic() > deadline:
            raise TimeoutError(f"{rival.name} has parsed {tally} of {expected} events")
        time.sleep(0.005)


def _exactly(rival: Rival, place: Place, *, insert: int, update: int) -> None:
    """Count what was consumed once more, when no time is taken.

    Raises:
        AssertionError: it is not what was written.
    """
    tally = rival.parsed(place) if isinstance(rival, Cdc) else rival.tally(place)
    if (tally.insert, tally.update, tally.other) != (insert, update, 0):
        raise AssertionError(f"{rival.name} has consumed {tally}, written were {insert} inserts and {update} updates")


# -- among peers ------------------------------------------------------------------------------------------------


def capture(bench: Bench, rival: Rival) -> None:
    """One-row updates by pgbench with the consumer running."""
    for clients in bench.clients:
        with bench.place(rival) as place:
            with rival.consuming(place) as consumer:
                cpu, server = consumer.cpu(), place.server.cpu()
                tps, number = bench.pgbench(place, clients)
                ended = time.monotonic()
                behind = 0.0
                if not isinstance(rival, Untriggered):
                    behind = max(0.0, _consumed(rival, place, number) - ended)
                cpu, server = consumer.cpu() - cpu, place.server.cpu() - server
            if not isinstance(rival, Untriggered):
                _exactly(rival, place, insert=0, update=number)
            each = {"consumer_cpu_us": cpu / number * 1e6, "server_cpu_us": server / number * 1e6}
            bench.results.add("capture", rival.name, clients=clients, tps=tps, behind_s=behind, **each)


def latency(bench: Bench, rival: Rival) -> None:
    """200 one-row updates a second by one writer: from COMMIT having returned to the event parsed."""
    if isinstance(rival, Untriggered):
        return
    with bench.place(rival) as place:
        with rival.consuming(place, trace=True):
            time.sleep(2.0)  # until everybody is at rest, and cdc's bell armed
            keys, sent, committed = _write_evenly(place, bench.seconds * 2)
            time.sleep(1.0 if rival.name != "debezium" else 3.0)
        arrived: dict[int, list[float]] = defaultdict(list)
        for key, at in rival.arrivals(place):
            arrived[key].append(at)
        since_sent, since_commit = [], []
        for key, began, ended in zip(keys, sent, committed, strict=True):
            at = arrived[key].pop(0)
            since_sent.append(at - began)
            since_commit.append(max(0.0, at - ended))
        if any(arrived.values()):
            raise AssertionError(f"{rival.name} has consumed more than was written")
    figures = {}
    for name, delays in (("", since_commit), ("sent_", since_sent)):
        for p in (50, 99):
            figures[f"{name}p{p}_ms"] = sorted(delays)[int(len(delays) * p / 100)] * 1000
    bench.results.add("latency", rival.name, **figures)


def _write_evenly(place: Place, seconds: float, table: str = "bench") -> tuple[list[int], list[float], list[float]]:
    """`RATE` updates a second: their keys, and the monotonic clock before and after each."""
    keys, sent, committed = [], [], []
    with place.session.cursor() as cursor:
        cursor.execute(f"prepare change as update {table} set n = n + 1 where id = $1")
        began = time.monotonic()
        for number in range(int(RATE * seconds)):
            keys.append(number % 1000 + 1)
            sent.append(time.monotonic())
            cursor.execute("execute change (%s)", (keys[-1],))
            committed.append(time.monotonic())
            time.sleep(max(0.0, began + (number + 1) / RATE - time.monotonic()))
        cursor.execute("deallocate change")
    return keys, sent, committed


def bulk(bench: Bench, rival: Rival) -> None:
    """One transaction that inserts 200,000 rows, one that updates them all."""
    with bench.place(rival, "empty") as place:
        with rival.consuming(place) as consumer:
            time.sleep(1.0)
            began = time.monotonic()
            place.run(f"insert into bench {FILL.format(rows=BULK)}")
            place.run("update bench set n = n + 1")
            wrote = time.monotonic() - began
            figures = {"writer_s": wrote}
            if not isinstance(rival, Untriggered):
                figures["consumed_s"] = _consumed(rival, place, 2 * BULK) - began
        if not isinstance(rival, Untriggered):
            _exactly(rival, place, insert=BULK, update=BULK)
            figures["peak_mb"] = consumer.peak
        bench.results.add("bulk", rival.name, **figures)


# -- cdc alone --------------------------------------------------------------------------------------------------


def _backlog(place: Place, events: int) -> float:
    """Write so many events in transactions of up to 100,000; seconds."""
    began = time.monotonic()
    while events > 0:
        step = min(events, ROWS)
        place.run(f"update bench set n = n + 1 where id <= {step}")
        events -= step
    return time.monotonic() - began


def _read(bench: Bench, events: int, *, decode: bool) -> dict[str, float]:
    """A pipeline's reading and nothing else, in this process."""
    with bench.place(Cdc()) as place:
        _backlog(place, events)
        place.run("checkpoint")
        limits = BatchOptions()
        with Connection(place.server.dsn(place.name), purpose="bench") as connection:
            outbox = Outbox(connection, database="bench", sink="out", owner=Owner("bench", 1))
            outbox.claim(start="now")
            if not decode:
                outbox._decoder = _Bare()  # type: ignore[assignment] # the stage before validation
            found, acked = 0, None
            began, cpu = time.monotonic(), time.process_time()
            while batch := outbox.next_batch(acked, events=limits.events, bytes_=limits.bytes):
                found += len(batch.events)
                acked = batch.last_seq
            took, cpu = time.monotonic() - began, time.process_time() - cpu
        if found != events:
            raise AssertionError(f"{found} events read, {events} written")
        return {"events": events, "per_s": events / took, "our_cpu_us": cpu / events * 1e6}


class _Bare:
    def decode(self, rows: Sequence[object], _ids: object = None) -> Sequence[object]:
        return rows


def read(bench: Bench, events: int) -> None:
    """A backlog, its rows fetched and acknowledged page by page, not looked at."""
    bench.results.add("read", "cdc", **_read(bench, events, decode=False))


def validate(bench: Bench, events: int) -> None:
    """The same, every row validated and made an event."""
    bench.results.add("validate", "cdc", **_read(bench, events, decode=True))


def deliver(bench: Bench, events: int) -> None:
    """The same, by the daemon into the file sink."""
    rival = Cdc()
    with bench.place(rival) as place:
        wrote = _backlog(place, events)
        place.run("checkpoint")
        started = time.monotonic()
        first = 0.0
        rival.out(place).touch()
        with daemon(place) as consumer:
            while rival.tally(place).insert == 0:
                time.sleep(0.002)
            first, already = time.monotonic(), rival.tally(place).insert
            took = _consumed(rival, place, events, 300) - first
            total = time.monotonic() - started
            cpu = consumer.cpu()
        _exactly(rival, place, insert=0, update=events)
        size = rival.out(place).stat().st_size / events
        bench.results.add(
            "deliver",
            "cdc",
            events=events,
            per_s=(events - already) / took,
            with_start_s=total,
            daemon_cpu_us=cpu / events * 1e6,
            peak_mb=consumer.peak,
            writer_us=wrote / events * 1e6,
            line_bytes=size,
        )


def curve(bench: Bench, largest: int) -> None:
    """With 10^4 events retained, ten times more, and so on: does what comes next cost more?"""
    rival, retained = Cdc(), 0
    with bench.place(rival) as place:
        size = 10_000
        while size <= largest:
            _backlog(place, size - retained)
            retained = size
            # A sink of a new name begins here: what was before is retained, and nobody's any more.
            configuration = json.loads((place.directory / "config.yaml").read_text())
            configuration["sinks"] = {f"out{size}": {"type": "file", "path": str(place.directory / f"{size}.jsonl")}}
            migrate(configuration, place.directory / "config.yaml")
            place.run(f"delete from cdc.sink where name <> 'out{size}'")
            place.run("checkpoint")
            tps, number = bench.pgbench(place, 8)
            retained += number
            began = time.monotonic()
            place.run("update bench set n = n + 1 where id <= 50000")
            wrote = time.monotonic() - began
            began = time.monotonic()
            out = place.directory / f"{size}.jsonl"
            out.touch()
            with daemon(place) as consumer:
                while out.stat().st_size == 0:
                    time.sleep(0.002)
                first = time.monotonic()
                until(lambda out=out, n=number + 50_000: sum(1 for _ in out.open()) >= n)
                took = time.monotonic() - first
            retained += 50_000
            bench.results.add(
                "curve",
                f"{size:,}",
                retained=size,
                tps=tps,
                writer_us=wrote / 50_000 * 1e6,
                read_per_s=(number + 50_000) / took,
                peak_mb=consumer.peak,
            )
            size *= 10


def idle(bench: Bench, seconds: float) -> None:
    """A daemon with nothing to do: CPU, and statements in the server's log."""
    with bench.place(Cdc()) as place:
        (place.directory / "out.jsonl").touch()
        place.run(f"alter database {place.name} set log_statement = 'all'")
        with daemon(place) as consumer:
            time.sleep(10.0)
            before, cpu = _statements(place.server), consumer.cpu()
            time.sleep(seconds)
            used, asked = consumer.cpu() - cpu, _statements(place.server) - before
        bench.results.add(
            "idle", "cdc", seconds=seconds, cpu_percent=100 * used / seconds, statements=asked, peak_mb=consumer.peak
        )


def _statements(server: Server) -> int:
    with server.log.open(errors="replace") as lines:
        return sum(1 for line in lines if "LOG:  statement:" in line or "LOG:  execute" in line)


def many(bench: Bench, _: object = None) -> None:
    """100 tables, 10 sinks and 5 databases in one process, beside one of each: latency at 200 changes/s, memory."""
    for databases, tables, sinks in ((1, 1, 1), (5, 20, 10)):
        rival = Cdc()
        with bench.place(rival, install=False) as place:
            names = [place.name, *(f"{place.name}_{n}" for n in range(1, databases))]
            for name in names[1:]:
                place.server.run("postgres", f"create database {name} template filled")
            for name in names:
                place.server.run(name, *(f"create table bench_{number} ({TABLE})" for number in range(1, tables)))
            captured = {"public.bench": {}} | {f"public.bench_{n}": {} for n in range(1, tables)}
            configuration = {
                "databases": {n: {"dsn": place.server.dsn(n), "tables": captured} for n in names},
                "sinks": {
                    "out": {"type": "file", "path": str(rival.out(place))},
                    **{
                        f"out{n}": {"type": "file", "path": str(place.directory / f"out{n}.jsonl")}
                        for n in range(1, sinks)
                    },
                },
            }
            migrate(configuration, place.directory / "config.yaml")
            place.run("checkpoint")
            with rival.consuming(place, trace=True) as consumer:
                time.sleep(5.0)
                cpu = consumer.cpu()
                keys, _sent, committed = _write_evenly(place, bench.seconds * 2)
                cpu = consumer.cpu() - cpu
                time.sleep(1.0)
            arrived: dict[int, list[float]] = defaultdict(list)
            for key, at in rival.arrivals(place):
                arrived[key].append(at)
            delays = sorted(max(0.0, arrived[k].pop(0) - c) for k, c in zip(keys, committed, strict=True))
            for name in names[1:]:
                place.server.run("postgres", f"drop database {name} with (force)")
            bench.results.add(
                "many",
                f"{databases * tables} tables, {sinks} sinks, {databases} databases",
                p50_ms=delays[len(delays) // 2] * 1000,
                p99_ms=delays[int(len(delays) * 0.99)] * 1000,
                cpu_percent=100 * cpu / (bench.seconds * 2),
                peak_mb=consumer.peak,
            )


# -- what came out ----------------------------------------------------------------------------------------------


def report(results: Results) -> str:
    """Medians and ratios as Markdown tables."""
    titles = {rival.name: rival.title for rival in RIVALS}
    lines: list[str] = []
    tables: dict[int, dict[str, dict[str, Any]]] = {n: results.medians("capture", clients=n) for n in (8, 32)}
    late, bulked = results.medians("latency"), results.medians("bulk")
    if any(tables.values()) or late or bulked:
        heads = ["", "8 clients, tps", "of untriggered", "32 clients, tps", "of untriggered", "p50 / p99 ms"]
        heads += ["bulk writer s", "of untriggered", "400k consumed after s", "peak RSS MB"]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for name, title in titles.items():
            cells = [title]
            for table in tables.values():
                tps, base = table.get(name, {}).get("tps"), table.get("untriggered", {}).get("tps")
                cells += [f"{tps:.0f}" if tps else "", f"{tps / base:.2f}" if tps and base else ""]
            one = late.get(name, {})
            cells.append(f"{one['p50_ms']:.2f} / {one['p99_ms']:.1f}" if one else "")
            one, base = bulked.get(name, {}), bulked.get("untriggered", {}).get("writer_s")
            cells += [
                f"{one['writer_s']:.1f}" if one else "",
                f"{one['writer_s'] / base:.1f}" if one and base else "",
                f"{one['consumed_s']:.1f}" if "consumed_s" in one else "",
                f"{one['peak_mb']:.0f}" if "peak_mb" in one else "",
            ]
            if any(cells[1:]):
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    for stage in STAGES:
        if stage in AMONG_PEERS or not (found := results.medians(stage)):
            continue
        heads = list(dict.fromkeys(name for figures in found.values() for name in figures))
        lines += [f"| {stage} | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 1)]
        for peer, figures in found.items():
            lines.append(f"| {peer} | " + " | ".join(_short(figures.get(name, "")) for name in heads) + " |")
        lines.append("")
    return "\n".join(lines)


def _machine(server: Server, rivals: Sequence[Rival]) -> dict[str, Any]:
    processors = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in processors if line.startswith("model name")), "")
    git = [shutil.which("git") or "/usr/bin/git", "describe", "--always", "--dirty"]
    revision = subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip()
    return {
        "cores": os.cpu_count(),
        "processor": f"{platform.machine()} {model}",
        "python": platform.python_version(),
        "postgresql": server.version(),
        "revision": revision,
        "versions": {rival.name: rival.version() for rival in rivals if rival.version()},
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="capture,latency,bulk", help=f"of {','.join(STAGES)}; all; report: no run")
    parser.add_argument("--peers", help=f"of {','.join(rival.name for rival in RIVALS)}; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of load in one round of capture; latency takes two")
    parser.add_argument("--clients", default="8,32")
    parser.add_argument("--events", type=int, default=1_000_000, help="of a backlog")
    parser.add_argument("--retained", type=int, default=1_000_000, help="where the curve ends")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/latest.json"))
    parser.add_argument("--append", action="store_true", help="add rounds to the file in place of beginning a new one")
    parser.add_argument("--svg", type=Path, help="draw the chart there")
    options = parser.parse_args()
    options.stages = list(STAGES) if options.stages == "all" else options.stages.split(",")
    options.peers = options.peers.split(",") if options.peers else [rival.name for rival in RIVALS]
    for name, known in ((options.stages, {*STAGES, "report"}), (options.peers, {rival.name for rival in RIVALS})):
        if unknown := set(name) - known:
            parser.error(f"unknown: {', '.join(unknown)}")
    return options


def main() -> None:
    options = _options()
    stages = options.stages
    rivals = []
    for rival in (rival for rival in RIVALS if rival.name in options.peers):
        if missing := rival.missing():
            print(f"skipped: {rival.title}, for want of {missing}")
        else:
            rivals.append(rival)
    results = Results(options.json, append=options.append or stages == ["report"])
    directory = tempfile.TemporaryDirectory(prefix="cdc-peers-")
    clients = [int(number) for number in options.clients.split(",")]
    bench = Bench(results, Path(directory.name), seconds=options.seconds, rounds=options.rounds, clients=clients)
    among: dict[str, Callable[[Bench, Rival], None]] = {"capture": capture, "latency": latency, "bulk": bulk}
    alone: dict[str, Callable[[], None]] = {
        "read": lambda: read(bench, options.events),
        "validate": lambda: validate(bench, options.events),
        "deliver": lambda: deliver(bench, options.events),
        "curve": lambda: curve(bench, options.retained),
        "idle": lambda: idle(bench, 60.0),
        "many": lambda: many(bench),
    }
    try:
        if stages != ["report"]:
            results.machine = _machine(bench.server(), rivals)
        for stage, beside in among.items():
            for number in range(options.rounds if stage in stages else 0):
                # Another order in each round: nobody is always the first. A durable run tells of an ephemeral one all
                # but its latency.
                for rival in random.Random(number).sample(rivals, len(rivals)):  # noqa: S311
                    if not isinstance(rival, CdcEphemeral) or stage == "latency":
                        beside(bench, rival)
        for stage, measure in alone.items():
            if stage in stages:
                measure()
    finally:
        bench.stop()
        directory.cleanup()
    print(json.dumps(results.machine))
    print()
    print(report(results))
    if options.svg:
        titles = {rival.name: rival.title for rival in RIVALS}
        medians = results.medians("capture", clients=8), results.medians("latency"), results.medians("bulk")
        options.svg.write_text(chart.draw(*medians, titles))


if __name__ == "__main__":
    main()
