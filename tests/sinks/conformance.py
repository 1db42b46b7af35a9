"""The table of what was tested of each sink, docs/sinks/conformance.md, and how it is written.

    python tests/sinks/conformance.py [-k KIND]

runs the suite, `test_conformance.py`, and writes the cells of the tests that passed; all others stay as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cdc.sinks import SINKS

DOCUMENT = Path(__file__).parents[2] / "docs" / "sinks" / "conformance.md"
BEHAVIOURS = {
    "order per key": "changes of a few keys, of one transaction and of many, arrive in the order they were made",
    "at least once": "the daemon is killed at named points and at any moment; everything arrives, in order",
    "same id": "what is delivered again after a kill has its old id, and is the same byte for byte",
    "partial failure": "one key is refused: the others arrive once, that key waits, and then arrives in order",
    "back-pressure": "the server stalls under a backlog: memory stays flat, nothing is acknowledged, nothing is lost",
    "oversize": "an event above the limit becomes a dead letter, and those before and after it arrive",
    "refused credentials": "the state and the error say so, without the secret; nothing is acknowledged",
    "server restart": "killed while events flow, and back: everything arrives, in order, under the same ids",
    "unreachable": "nobody there at the start: a transient failure names the place and no secret; then it works",
    "close and open": "close comes before open, twice, and in the middle: harmless",
}
"""Columns of the table, and what the test does."""

YES = "yes"
NO = "n/a"
WRITER = "conformance-writer"

HEAD = """\
# What was tested of each sink

<!-- Generated from tests/sinks/test_conformance.py by `python tests/sinks/conformance.py`; do not edit. -->

One suite runs against every sink, on its real server, through the daemon.

"""


def document(cells: dict[tuple[str, str], str]) -> str:
    """What docs/sinks/conformance.md has to say.

    Args:
        cells: sink and behaviour → YES, or why it does not apply.
    """
    kinds = sorted({kind for kind, _ in cells})
    parts = [HEAD, "| behaviour | the test |\n|---|---|\n"]
    parts += [f"| {name} | {what} |\n" for name, what in BEHAVIOURS.items()]
    parts.append(f"\n| sink | {' | '.join(BEHAVIOURS)} |\n|{'---|' * (len(BEHAVIOURS) + 1)}\n")
    for kind in kinds:
        row = [YES if cells.get((kind, name)) == YES else NO for name in BEHAVIOURS]
        parts.append(f"| {kind} | {' | '.join(row)} |\n")
    parts.append("\n| sink | does not apply | because |\n|---|---|---|\n")
    for kind in kinds:
        reasons: dict[str, list[str]] = {}
        for name in BEHAVIOURS:
            if cells.get((kind, name), YES) != YES:
                reasons.setdefault(cells[kind, name], []).append(name)
        parts += [
            f"| {kind} | {'all of it' if len(names) == len(BEHAVIOURS) else ', '.join(names)} | {reason} |\n"
            for reason, names in reasons.items()
        ]
    return "".join(parts)


def read_document() -> dict[tuple[str, str], str]:
    """The cells of the document as it is."""
    if not DOCUMENT.exists():
        return {}
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in DOCUMENT.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    cells: dict[tuple[str, str], str] = {}
    for row in rows:
        if len(row) == len(BEHAVIOURS) + 1 and row[1] in (YES, NO):
            cells.update({(row[0], name): cell for name, cell in zip(BEHAVIOURS, row[1:], strict=True)})
    for kind, *rest in rows:
        if len(rest) == 2 and (kind, next(iter(BEHAVIOURS))) in cells:
            names = BEHAVIOURS if rest[0] == "all of it" else rest[0].split(", ")
            cells.update({(kind, name): rest[1] for name in names})
    return cells


class Writer:
    """The plugin that collects the cells of a run, which are not compared then."""

    __name__ = WRITER

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.cells.update({(kind, name): cell for _, (kind, name, cell) in report.user_properties})


def main() -> int:
    """Run and write; returns pytest's exit code."""
    writer = Writer()
    suite = Path(__file__).with_name("test_conformance.py")
    code = pytest.main([str(suite), "-q", *sys.argv[1:]], plugins=[writer])
    cells = {cell: what for cell, what in read_document().items() if cell[0] in SINKS} | writer.cells
    DOCUMENT.write_text(document(cells), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
