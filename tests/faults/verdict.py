"""What a fault did to the stream, in numbers; and the one line with which a fault test ends.

``settle(project, work, seed)`` delivers what is left, sees that nothing is delivered in vain, and judges the whole;
:func:`judged` only judges. Both raise the judge's own violations. ``strict=False`` counts instead, for a fault after
which something else than nothing is promised, such as a failover that lost transactions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from harness import Project, read_lines
from judge import (
    Altered,
    Fact,
    Line,
    State,
    Stream,
    Violation,
    check,
    check_chain,
    check_mirror,
    inversions,
    read_source,
    to_stream,
    told,
)
from workload import TABLES, Workload


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a stream compares with what was committed.

    Attributes:
        committed: changes.
        events: delivered, each counted once.
        duplicates: deliveries of events that had been delivered before.
        lost: committed changes that were not delivered.
        inversions: events whose first delivery came after that of a later change of their key, or table at a TRUNCATE.
        phantoms: events of changes that nobody committed, or that another event told of already.
        mirrored: whether each event fitted those before it, and all of them together give the source tables.
        violation: the first one; None: none.
    """

    committed: int
    events: int
    duplicates: int
    lost: int
    inversions: int
    phantoms: int
    mirrored: bool
    violation: Violation | None

    def per_fault(self, faults: int) -> float:
        """Mean number of duplicates."""
        return self.duplicates / faults if faults else 0.0

    def __str__(self) -> str:
        """What the table of figures says of it."""
        counts = f"lost {self.lost}, inversions {self.inversions}, phantoms {self.phantoms}"
        return f"{counts}, mirror {'equal' if self.mirrored else 'different'}"


def judged(
    texts: Iterable[str],
    committed: Mapping[Fact, float],
    source: State,
    seed: object = None,
    *,
    least: int = 0,
    most_duplicates: int | None = None,
    strict: bool = True,
) -> Verdict:
    """Compare what was delivered with what was committed and with what stands in the tables.

    Args:
        texts: the lines that were delivered.
        committed: the truth: ``work.read_ledger()``, or ``work.committed`` where nobody crashed.
        source: see :func:`judge.read_source`.
        seed: shown with a violation.
        least: committed changes below which the test has tested nothing.
        most_duplicates: what the fault may cost.
        strict: raise; False: count.

    Raises:
        Violation: see :mod:`judge`; AssertionError: too little was done, or too much of it twice.
    """
    texts = list(texts)
    violation = None
    try:
        stream = check(texts, committed, source, seed)
    except Violation as found:
        if strict:
            raise
        violation = found
        stream = _without_altered(texts)
    lost, phantoms = _differences(stream, committed)
    verdict = Verdict(
        committed=len(committed),
        events=len(stream.first),
        duplicates=stream.duplicates,
        lost=lost,
        inversions=sum(1 for _ in inversions(stream)),
        phantoms=phantoms,
        mirrored=violation is None or _is_mirror(stream, source),
        violation=violation,
    )
    assert verdict.committed >= least, f"only {verdict.committed} changes were committed: this tested nothing"
    if most_duplicates is not None:
        assert verdict.duplicates <= most_duplicates, f"{verdict.duplicates} duplicates (seed {seed})"
    return verdict


def settle(
    project: Project,
    work: Workload,
    seed: object,
    *,
    least: int = 0,
    most_duplicates: int | None = None,
    strict: bool = True,
    dsn: str | None = None,
) -> Verdict:
    """Wait for the writers, deliver what is left, and judge the whole. Arguments and errors as of :func:`judged`.

    No daemon may run any more. `dsn`: where the truth is, if no longer where the project began.
    """
    work.join()
    project.cdc("run", "--until-idle")
    lines = read_lines(project.file)
    project.cdc("run", "--until-idle")
    assert read_lines(project.file) == lines, "nothing was left to deliver, and something was delivered"
    committed = work.read_ledger(dsn) if work.ledger else work.committed
    source = read_source(dsn or project.dsn, TABLES)
    return judged(lines, committed, source, seed, least=least, most_duplicates=most_duplicates, strict=strict)


def _differences(stream: Stream, committed: Mapping[Fact, float]) -> tuple[int, int]:
    """How many changes are lost, and how many events are phantoms."""
    facts: dict[Fact, Line] = {}
    phantoms = 0
    for fact, line in told(stream):
        if fact is None or fact in facts or fact not in committed:
            phantoms += 1
        else:
            facts[fact] = line
    return len(committed) - len(facts), phantoms


def _without_altered(texts: list[str]) -> Stream:
    """The stream, whatever was done to the repeated lines."""
    try:
        return to_stream(texts)
    except Altered:
        kept: dict[str, str] = {}
        ids = [line.event.id for text in texts for line in to_stream([text]).first]
        for event_id, text in zip(ids, texts, strict=True):
            kept.setdefault(event_id, text)
        return Stream(to_stream(kept.values()).first, len(texts) - len(kept))


def _is_mirror(stream: Stream, source: State) -> bool:
    try:
        check_mirror(check_chain(stream), source)
    except Violation:
        return False
    return True
