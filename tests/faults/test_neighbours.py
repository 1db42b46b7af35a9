"""One sink in trouble, and its neighbours: they deliver as fast as before, and it loses nothing.

Writers keep a steady pace for three spells of equal length: all is well; one sink of three is in trouble; it works
again and catches up. The other two are files, and what they take is measured from each COMMIT to the line in the file.
In the end all three are judged: lost 0, out of order 0, invented 0, duplicates bounded.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from harness import CDC, Project, Tail, percentile, read_lines, until
from judge import facts_of, read_source, to_stream
from mutants import mutant
from psycopg2.extensions import connection
from receiver import OK, Answer, Receiver, Request
from test_takeover import GUILTY
from verdict import Verdict, judged, settle
from workload import TABLES, Workload

LOAD: dict[str, Any] = {"rate": 6.0, "lulls": False}
AT_ONCE = 8
"""Requests under way when the receiver goes away, and so at most so many duplicates."""
CLOSE = 50
"""Events by which the troubled sink may be behind the writers to have caught up."""
ROOM = 0.1
"""Seconds by which a p99 may differ on a machine that has other things to do, beside a factor of two."""

Scale = Callable[[Any, Any], Any]
Figures = Callable[..., None]
Mirror = Callable[..., Project]
Connect = Callable[..., connection]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    with contextlib.suppress(OSError):
        made.stop()


@pytest.fixture
def project(mirror: Mirror, database: str, receiver: Receiver) -> Project:
    """Two files and a webhook."""
    hooks = {
        "type": "webhook",
        "url": f"{receiver.url}/in",
        "allow_private": True,
        "concurrency": AT_ONCE,
        "timeout": "5s",
        "retry": {"initial": "100ms", "max": "2s"},
    }
    made = mirror(database, sinks={"hooks": hooks})
    made.content["sinks"]["beside"] = {"type": "file", "path": str(made.directory / "beside.jsonl")}
    made.write()
    made.cdc("migrate")
    return made


def slowly(request: Request) -> Answer:
    """A second for each."""
    second = threading.Event()
    threading.Timer(1.0, second.set).start()
    return Answer(wait=second)


def spells(
    project: Project,
    work: Workload,
    receiver: Receiver,
    seconds: float,
    trouble: Callable[[], Callable[[], None]],
    *,
    program: Sequence[str | Path] = (CDC,),
) -> tuple[list[float], float]:
    """Run them, with a daemon that is drained in the end.

    Args:
        program: the daemon.
        trouble: lets the trouble begin; returns what ends it.

    Returns:
        When each spell began and the last one ended, and the seconds until the sink had caught up.
    """

    def behind() -> int:
        return len(work.committed) - len({request.id for request in list(receiver.taken)})

    with project.daemon(program=program, serving=False) as daemon:
        daemon.wait_until_it_says("Serving.", times=3)
        until(lambda: len(receiver.taken) > 50, "all is well")
        times = [time.time()]
        daemon.lives_for(seconds)
        times.append(time.time())
        end = trouble()
        daemon.lives_for(seconds)
        assert behind() > CLOSE, "it is not behind: this tested nothing"
        times.append(time.time())
        end()
        caught_up = until(lambda: behind() < CLOSE, "it catches up", 60 + seconds, pause=0.1)
        daemon.lives_for(max(0.0, seconds - caught_up))
        times.append(time.time())
        work.stop()
        work.join()
        assert daemon.drain() == 0
    return times, caught_up


def delays(lines: list[str], arrivals: list[float], work: Workload, times: list[float]) -> list[list[float]]:
    """Seconds from COMMIT to the line, of the changes of each spell."""
    found: list[list[float]] = [[] for _ in times[1:]]
    for fact, line in facts_of(to_stream(lines)).items():
        committed = work.committed[fact]
        for number, (began, ended) in enumerate(pairwise(times)):
            if began <= committed < ended:
                found[number].append(arrivals[line.number - 1] - committed)
    return found


def judge_and_compare(
    project: Project, work: Workload, receiver: Receiver, times: list[float], tails: dict[str, Tail], seed: int
) -> tuple[Verdict, dict[str, float]]:
    """Judge what all three have; returns what the webhook has, and the worse p99 of the files in each spell, in ms."""
    settle(project, work, seed, least=100, most_duplicates=0)
    source = read_source(project.dsn, TABLES)
    judged(read_lines(project.directory / "beside.jsonl"), work.committed, source, seed, most_duplicates=0)
    bodies = [request.body.decode() for request in list(receiver.taken)]
    verdict = judged(bodies, work.committed, source, seed, least=100, most_duplicates=AT_ONCE)
    worst = [0.0, 0.0, 0.0]
    for name, tail in tails.items():
        lines = read_lines(project.directory / name)
        tail.wait_for(len(lines))
        for number, values in enumerate(delays(lines, tail.arrivals, work, times)):
            assert len(values) > 50, "too little happened in one of the spells"
            worst[number] = max(worst[number], percentile(values, 0.99))
    before, meanwhile, afterwards = worst
    assert meanwhile <= 2 * before + ROOM, f"p99 of the others: {before:.3f} s before, {meanwhile:.3f} s meanwhile"
    milliseconds = {"p99_before": before, "meanwhile": meanwhile, "catching_up": afterwards}
    return verdict, {name: round(value * 1000, 1) for name, value in milliseconds.items()}


@contextlib.contextmanager
def watched(project: Project) -> Iterator[dict[str, Tail]]:
    """The two files, by name."""
    with Tail(project.file) as one, Tail(project.directory / "beside.jsonl") as other:
        yield {project.file.name: one, "beside.jsonl": other}


@pytest.mark.timeout(600)
def test_a_sink_that_is_down_delays_nobody_and_catches_up(
    project: Project, receiver: Receiver, database: str, figures: Figures, scale: Scale, seed: int
) -> None:
    seconds = scale(5.0, 60.0)

    def goes_down() -> Callable[[], None]:
        receiver.stop()
        return receiver.start

    with watched(project) as tails, Workload(database, seed, math.inf, **LOAD) as work:
        times, caught_up = spells(project, work, receiver, seconds, goes_down)
        verdict, p99 = judge_and_compare(project, work, receiver, times, tails, seed)
    figures("one sink down, the others' p99 in ms", verdict, seconds=seconds, caught_up_in_s=caught_up, **p99)


@pytest.mark.timeout(600)
@GUILTY
def test_a_sink_that_takes_a_second_for_each_event_delays_nobody(
    guilty: bool, project: Project, receiver: Receiver, database: str, figures: Figures, scale: Scale, seed: int
) -> None:
    seconds = 5.0 if guilty else scale(5.0, 60.0)
    program = mutant("lets-one-deliver-at-a-time" if guilty else "harmless")
    project.content["sinks"]["hooks"]["concurrency"] = 1
    project.write()
    taken: list[int] = []

    def becomes_slow() -> Callable[[], None]:
        receiver.answer = slowly
        taken.append(len(receiver.taken))
        return becomes_quick

    def becomes_quick() -> None:
        taken.append(len(receiver.taken))
        receiver.answer = lambda request: OK

    with watched(project) as tails, Workload(database, seed, math.inf, **LOAD) as work:
        times, caught_up = spells(project, work, receiver, seconds, becomes_slow, program=program)
        if guilty:
            with pytest.raises(AssertionError, match="p99 of the others"):
                judge_and_compare(project, work, receiver, times, tails, seed)
            figures("mutant: lets one deliver at a time", "condemned: the others wait")
            return
        verdict, p99 = judge_and_compare(project, work, receiver, times, tails, seed)
    began, ended = taken
    assert ended - began <= seconds + 3, "it was not slow"
    assert verdict.duplicates == 0
    figures(
        "one sink slow, the others' p99 in ms",
        verdict,
        seconds=seconds,
        it_took=ended - began,
        caught_up_in_s=caught_up,
        **p99,
    )
