"""`--seed N`, when this directory is named on the command line; and a project per test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from harness import Project, report

SEED = 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=SEED, help="what the writers' choices come from")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Printed, and part of every violation."""
    number: int = request.config.getoption("--seed", SEED)
    report(f"seed {number}")
    return number


@pytest.fixture
def project(tmp_path: Path, database: str) -> Iterator[Callable[..., Project]]:
    """``project(tables, path)`` configures an empty database; what was delivered is removed afterwards."""

    def make(tables: Mapping[str, Mapping[str, object]], path: str = "{database}.jsonl") -> Project:
        return Project(tmp_path, database, tables, path)

    yield make
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()
