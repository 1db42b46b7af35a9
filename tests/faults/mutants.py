"""Daemons with a known mistake: the suite has to condemn each of them, or it proves nothing.

As a program, ``mutants.py NAME -- ARGUMENT…``, this is `cdc ARGUMENT…` with one patch; :func:`mutant` gives the part
before the arguments, for ``project.daemon(program=mutant(NAME))``. A mutant is a function that patches the package and
says in its docstring which line it breaks; the decorator registers it.
"""

from __future__ import annotations

import itertools
import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from cdc.errors import Fenced

MUTANTS: dict[str, Callable[[], None]] = {}
"""Name → what makes it."""


def mutation(patch: Callable[[], None]) -> Callable[[], None]:
    """Register a mutant under the name of its function, with hyphens."""
    MUTANTS[patch.__name__.replace("_", "-")] = patch
    return patch


def mutant(name: str) -> list[str]:
    """The command that is `cdc` with this mistake."""
    assert name in MUTANTS, f"no mutant of that name (known: {', '.join(MUTANTS)})"
    return [sys.executable, str(Path(__file__)), name, "--"]


@mutation
def harmless() -> None:
    """Breaks nothing and says so in the log: that patches arrive where they should."""
    from cdc.daemon import Daemon  # noqa: PLC0415  # only a mutant patches the package, not who asks for its name

    run = Daemon.run

    def patched(self: Daemon, *arguments: object, **options: object) -> None:
        logging.getLogger("cdc.mutant").info("A harmless mutant runs.")
        run(self, *arguments, **options)  # type: ignore[arg-type]

    Daemon.run = patched  # type: ignore[method-assign]


@mutation
def stops_where_it_would_die() -> None:
    """Breaks nothing: at the point of CDC_CRASH_AT the process stops, as by SIGSTOP, until somebody lets it go on."""
    from cdc import crashpoints  # noqa: PLC0415  # as above

    def reached(self: crashpoints._Trap, point: str) -> None:
        if point != self.point:
            return
        with self._lock:
            self._left -= 1
            if self._left == 0:
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread makes no step more

    crashpoints._Trap.reached = reached  # type: ignore[method-assign]


@mutation
def ignores_the_epoch() -> None:
    """Acknowledges, reads on and confirms whoever owns the sink; and stops where it would die, to fall behind."""
    from cdc.sql import QUERIES  # noqa: PLC0415

    stops_where_it_would_die()
    for name in ("confirm", "next_batch", "acknowledge", "set_state"):
        assert "%(epoch)s" in QUERIES[name]
        QUERIES[name] = QUERIES[name].replace("%(epoch)s", "(select k.epoch from cdc.sink k where k.name = %(sink)s)")


@mutation
def acknowledges_before_it_delivers() -> None:
    """Stores the position of a batch before the sink has it."""
    from cdc.outbox import Batch, Outbox  # noqa: PLC0415
    from cdc.pipeline import Pipeline  # noqa: PLC0415

    process = Pipeline._process

    def hasty(self: Pipeline, outbox: Outbox, batch: Batch) -> bool:
        outbox.acknowledge(batch.last_seq)
        return process(self, outbox, batch)

    Pipeline._process = hasty  # type: ignore[method-assign]


@mutation
def raises_in_one_sink() -> None:
    """Has bugs in the sink called shaky, and in its pipeline: each time another exception, at another moment."""
    from cdc.event import Event  # noqa: PLC0415
    from cdc.outbox import Batch, Outbox  # noqa: PLC0415
    from cdc.pipeline import Pipeline  # noqa: PLC0415
    from cdc.sinks.file import FileSink  # noqa: PLC0415

    deliver, close, process = FileSink.deliver, FileSink.close, Pipeline._process
    deliveries, batches = itertools.count(1), itertools.count(1)

    def delivers(self: FileSink, batch: Sequence[Event]) -> None:
        number = next(deliveries) % 8 if self.name == "shaky" else 0
        if number == 3:
            raise ZeroDivisionError("before it was written")
        deliver(self, batch)
        if number == 6:
            raise LookupError("after it was written")

    def closes(self: FileSink) -> None:
        close(self)
        if self.name == "shaky":
            raise RuntimeError("while it was closed")

    def processes(self: Pipeline, outbox: Outbox, batch: Batch) -> bool:
        if self.sink == "shaky" and next(batches) % 20 == 0:
            raise TypeError("nobody's fault")
        return process(self, outbox, batch)

    FileSink.deliver = delivers  # type: ignore[method-assign]
    FileSink.close = closes  # type: ignore[method-assign]
    Pipeline._process = processes  # type: ignore[method-assign]


@mutation
def tells_of_rows_before_the_page() -> None:
    """Delivers the rows of a chunk before the events they belong after: as if they were of a newer snapshot."""
    from cdc.backfill import Backfills  # noqa: PLC0415
    from cdc.outbox import Batch  # noqa: PLC0415

    next_batch = Backfills.next_batch

    def hasty(self: Backfills, acked: int | None, **limits: int) -> Batch | None:
        batch = next_batch(self, acked, **limits)  # type: ignore[arg-type]
        if batch is None or not batch.rows:
            return batch
        return Batch([*batch.rows, *batch.events], batch.last_seq, batch.full)

    Backfills.next_batch = hasty  # type: ignore[method-assign]


@mutation
def tells_of_rows_a_page_later() -> None:
    """Delivers the rows of a chunk after the next page: as if they were of an older snapshot."""
    from cdc.backfill import Backfills  # noqa: PLC0415
    from cdc.outbox import Batch  # noqa: PLC0415

    next_batch = Backfills.next_batch
    kept: list[object] = []

    def slow(self: Backfills, acked: int | None, **limits: int) -> Batch | None:
        batch = next_batch(self, acked, **limits)  # type: ignore[arg-type]
        if batch is None:
            return batch
        late, kept[:] = [*kept], batch.rows
        return Batch(batch.events, batch.last_seq, batch.full, late)  # type: ignore[arg-type]

    Backfills.next_batch = slow  # type: ignore[method-assign]


@mutation
def rings_whatever_happens() -> None:
    """Has no breaker: it asks to be rung however full the notification queue is."""
    from cdc import listener  # noqa: PLC0415

    listener.QUEUE_LIMIT = 2.0


@mutation
def lets_one_deliver_at_a_time() -> None:
    """All its sinks wait for the one that delivers."""
    from cdc.pipeline import Pipeline  # noqa: PLC0415

    turn = threading.Lock()
    hand_over = Pipeline._hand_over

    def waits(self: Pipeline, *arguments: object) -> None:
        with turn:
            hand_over(self, *arguments)  # type: ignore[arg-type]

    Pipeline._hand_over = waits  # type: ignore[method-assign]


@mutation
def forgets_what_it_wrote() -> None:
    """Its postgres sink does not note in the target what it has applied."""
    from cdc.sinks.postgres import PostgresSink  # noqa: PLC0415

    PostgresSink._note = lambda self, applied, events: None  # type: ignore[method-assign]


@mutation
def ignores_the_claim() -> None:
    """Its postgres sink writes whoever has claimed the target since; and stops where it would die, to fall behind."""
    from cdc.sinks import postgres  # noqa: PLC0415

    stops_where_it_would_die()
    start = postgres.PostgresSink._start

    def starts(self: postgres.PostgresSink) -> set[tuple[int, int]]:
        try:
            return start(self)
        except Fenced:
            return set()

    postgres.PostgresSink._start = starts  # type: ignore[method-assign]


def main() -> None:
    """Become the mutant, then the command."""
    name, separator, *arguments = sys.argv[1:]
    assert separator == "--", "usage: mutants.py NAME -- ARGUMENT…"
    MUTANTS[name]()
    sys.argv = ["cdc", *arguments]

    from cdc.cli import main as cdc  # noqa: PLC0415  # after the patch

    cdc()


if __name__ == "__main__":
    main()
