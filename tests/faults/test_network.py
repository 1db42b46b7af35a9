"""The wire's bad days: it swallows, holds, drips, resets, refuses. The daemon goes through a proxy, the writers do not.

What hangs has to be noticed within `NOTICED` seconds, by the daemon, which says so and begins anew, and by everybody
who asks: `cdc status`, run on the server's side of the wire, says that the sink is down. An answer that is lost says
nothing about what became of the question, so a commit whose answer is cut off may have happened or not; half of the
cuts here are made after it has happened for certain. After each fault the same is true: nothing lost, nothing out of
order, nothing that was not committed, and at most a batch delivered again.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from harness import SINK, Daemon, Project, until
from proxy import Proxy
from psycopg2.extensions import connection
from verdict import Verdict, settle
from workload import CAPTURED, Workload

BATCH = 500
"""The default of `batch: {events: …}`: what one fault can repeat."""
NOTICED = 10.0
"""Seconds within which a wire that hangs has to be noticed."""
HEALED = 25.0
"""Seconds after which it has to be in use again once it works: a try to connect that hangs, and a pause, at most."""

Scale = Callable[[Any, Any], Any]
Figures = Callable[..., None]


class Wire:
    """A project whose daemon goes through a proxy.

    Attributes:
        here: the project, as the daemon sees it.
        there: the same database as it looks from the other end of the wire.
    """

    def __init__(self, proxy: Proxy, here: Project, there: Project) -> None:
        self.proxy = proxy
        self.here = here
        self.there = there

    def size(self) -> int:
        """Bytes that were delivered."""
        return self.here.file.stat().st_size if self.here.file.exists() else 0

    def wait_for_more(self, events: int = 1, seconds: float = 30.0) -> float:
        """Wait until so many more events are delivered; returns the seconds it took."""
        began = self.size()

        def arrived() -> bool:
            if self.size() <= began:
                return False
            with self.here.file.open("rb") as file:
                file.seek(began)
                return file.read().count(b"\n") >= events

        return until(arrived, f"{events} more events are delivered", seconds)

    def state(self) -> str:
        """Of the sink, as `cdc status` says on the server's side."""
        return str(self.there.status()["databases"]["shop"]["sinks"][SINK]["state"])

    def wait_until_seen(self, state: str) -> float:
        """Wait until `cdc status` says so; returns when it was asked, by the clock of ``time.time()``."""
        asked = 0.0

        def seen() -> bool:
            nonlocal asked
            asked = time.time()
            return self.state() == state

        until(seen, f"cdc status says {state}")
        return asked

    def finish(self, daemon: Daemon, work: Workload, seed: int, *, least: int, faults: int) -> Verdict:
        """Let the writers and the daemon end in good order, and judge."""
        work.stop()
        work.join()
        assert daemon.drain() == 0
        return settle(self.here, work, seed, least=least, most_duplicates=faults * BATCH)


@pytest.fixture
def wire(database: str, mirror: Callable[..., Project], tmp_path: Path) -> Iterator[Wire]:
    with Proxy.before(database) as proxy:
        here = mirror(database, database={"dsn": proxy.dsn(database), "migrate_dsn": database})
        (tmp_path / "there").mkdir()
        yield Wire(proxy, here, Project(tmp_path / "there", database, CAPTURED, "nothing.jsonl"))


def said_at(daemon: Daemon, text: str) -> float:
    """When it said something first, by the clock of ``time.time()``."""
    line = next(line for line in daemon.said().splitlines() if text in line)
    return datetime.fromisoformat(line.split()[0]).timestamp()


INTERRUPTED = "The pipeline is interrupted."
DRIPS = "20 bytes a second"
FAULTS: dict[str, Callable[[Proxy], None]] = {
    "black hole": lambda proxy: proxy.black_hole(),
    "stall": lambda proxy: proxy.stall(),
    DRIPS: lambda proxy: proxy.trickle(20),
}
STALLED = 12.0
"""Seconds, so that the daemon has given up, and what it had asked for reaches the server all the same."""


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.full
def test_a_wire_that_hangs_is_noticed_and_given_up_and_used_again_when_it_works(
    *, fault: str, wire: Wire, connect: Callable[..., connection], figures: Figures, scale: Scale, seed: int
) -> None:
    owner = connect(wire.here.dsn)
    work = Workload(wire.here.dsn, seed, math.inf, writers=4, rate=20)
    with wire.here.daemon() as daemon, contextlib.ExitStack() as load:
        daemon.wait_until_it_says("Listening.")
        if fault != DRIPS:  # an answer that is dripping in already is let drip, three times as long
            load.enter_context(work)
            wire.wait_for_more(100)
        # Asleep it has the longest way to go: it has to look before it can wait in vain.
        until(lambda: wire.here.armed(owner), "the daemon asks to be rung")
        assert wire.state() == "running"

        began = time.time()
        FAULTS[fault](wire.proxy)
        if fault == DRIPS:
            load.enter_context(work)
        seen = wire.wait_until_seen("down") - began
        daemon.wait_until_it_says(INTERRUPTED)
        noticed = said_at(daemon, INTERRUPTED) - began
        if fault == "stall":
            daemon.lives_for(max(0.0, began + STALLED - time.time()))
        daemon.lives_for(scale(0.0, 60.0))
        left = wire.size()
        assert daemon.said().count("Serving.") == 1

        lasted = time.time() - began
        wire.proxy.resume()
        healed = wire.wait_for_more(100, HEALED)
        assert wire.size() > left
        wire.wait_until_seen("running")
        work.stop()
        work.join()
        daemon.kill()  # who is still connecting into the hole would take his time to end
    verdict = settle(wire.here, work, seed, least=200, most_duplicates=2 * BATCH)
    assert noticed < NOTICED
    assert seen < NOTICED
    figures(fault, verdict, lasted_s=lasted, noticed_after_s=noticed, seen_after_s=seen, healed_after_s=healed)


@pytest.mark.full
def test_sessions_that_have_become_half_open_are_replaced_by_new_ones(
    wire: Wire, figures: Figures, scale: Scale, seed: int
) -> None:
    times = scale(1, 10)
    silent = []
    with Workload(wire.here.dsn, seed, math.inf, writers=4, rate=20) as work:
        for _ in range(times):
            with wire.here.daemon() as daemon:
                daemon.wait_until_it_says("Listening.")
                wire.wait_for_more(100)
                wire.proxy.black_hole()
                wire.proxy.resume()  # who is in it stays there; who comes now gets through
                silent.append(wire.wait_for_more(100, NOTICED + 3))
                daemon.wait_until_it_says("Listening.", 2)
                until(lambda: "The keeper is interrupted." in daemon.said(), "the keeper notices")
                if len(silent) == times:
                    verdict = wire.finish(daemon, work, seed, least=200, faults=times)
    assert max(silent) < NOTICED + 2
    figures("half-open sessions", verdict, times=times, silent_for_s=max(silent))


ACKNOWLEDGING = re.compile(rb"cdc\.next_batch\('\w+', \d+, \d+,")
"""The statement that stores a position and reads on."""


def test_an_answer_that_is_lost_on_its_way_says_nothing_and_nothing_is_concluded(
    wire: Wire, figures: Figures, scale: Scale, seed: int
) -> None:
    rng = random.Random(f"{seed} cutter")
    rounds, each = scale(1, 100), 4  # pauses between tries grow: a fresh daemon each round
    committed = 0
    with Workload(wire.here.dsn, seed, math.inf, rate=20) as work:
        for number in range(rounds):
            with wire.here.daemon() as daemon:
                for serving in range(1, each + 1):
                    wire.wait_for_more(20)
                    whole = rng.random() < 0.5
                    wire.proxy.cut_answer(
                        lambda sent: ACKNOWLEDGING.search(sent) is not None, of=f"cdc {SINK}", whole=whole
                    )
                    committed += whole
                    until(lambda: wire.proxy.answers_cut == number * each + serving, "an answer is cut")  # noqa: B023
                    daemon.wait_until_it_says("Serving.", serving + 1)
                wire.wait_for_more(20)
                if number == rounds - 1:
                    verdict = wire.finish(daemon, work, seed, least=scale(100, 5000), faults=rounds * each)
    cuts = wire.proxy.answers_cut
    figures(
        "RST in the middle of a COMMIT",
        verdict,
        cuts=cuts,
        committed_for_certain=committed,
        per_cut=verdict.per_fault(cuts),
    )


@pytest.mark.full
def test_a_wire_that_refuses_is_tried_ever_more_rarely(wire: Wire, figures: Figures, scale: Scale, seed: int) -> None:
    seconds = scale(2.5, 120.0)
    with wire.here.daemon() as daemon, Workload(wire.here.dsn, seed, math.inf, writers=4, rate=20) as work:
        daemon.wait_until_it_says("Listening.")
        wire.wait_for_more(100)
        wire.proxy.refuse()
        began = time.time()
        assert wire.proxy.cut() == 3
        seen = wire.wait_until_seen("down") - began
        assert seen < NOTICED
        daemon.lives_for(max(0.0, began + seconds - time.time()))
        lasted = time.time() - began
        attempts = wire.proxy.refused
        # Pauses of 0.2 s and more, doubling up to 5 s.
        assert 3 * 3 <= attempts <= 3 * (6 + lasted / 5)
        wire.proxy.resume()
        healed = wire.wait_for_more(1, HEALED)
        daemon.wait_until_it_says("Listening.", 2)
        verdict = wire.finish(daemon, work, seed, least=100, faults=1)
    figures("refused connections", verdict, seconds=lasted, attempts=attempts, seen_after_s=seen, healed_after_s=healed)
