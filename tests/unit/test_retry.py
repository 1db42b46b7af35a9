"""Trying again: how waits grow, what caps them, and what ends them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from cdc import retry
from cdc.errors import CdcError, DatabaseUnreachable, PermanentFailure, TransientFailure
from cdc.retry import keep_alive, retrying


class Clockless(threading.Event):
    """A stop event whose waits are written down instead of waited; `limit` of them set it."""

    def __init__(self, limit: int = 10**9) -> None:
        super().__init__()
        self.waits: list[float] = []
        self.limit = limit

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is not None:
            self.waits.append(timeout)
        if len(self.waits) >= self.limit:
            self.set()
        return self.is_set()


class Clock:
    """A clock that moves when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(retry.time, "monotonic", lambda: self.now)


def failing(times: int, error: BaseException) -> Callable[[], str]:
    """Fails so many times, then works."""
    left = [times]

    def action() -> str:
        if left[0]:
            left[0] -= 1
            raise error
        return "done"

    return action


def ignore(error: BaseException, wait: float) -> None:
    pass


def waits(times: int, *, initial: float, maximum: float, retry_after: float | None = None) -> list[float]:
    stop = Clockless()
    attempts = retrying(TransientFailure, initial=initial, maximum=maximum, stop=stop, before_sleep=ignore)
    assert attempts(failing(times, TransientFailure("down", retry_after=retry_after))) == "done"
    return stop.waits


def test_what_works_at_once_does_not_wait() -> None:
    assert waits(0, initial=1.0, maximum=60.0) == []


def test_waits_double_with_jitter_up_to_the_first() -> None:
    for _ in range(20):
        for number, wait in enumerate(waits(6, initial=1.0, maximum=1000.0)):
            assert 2**number <= wait <= 2**number + 1


def test_waits_differ() -> None:
    assert len({waits(1, initial=1.0, maximum=60.0)[0] for _ in range(20)}) > 1


def test_waits_never_exceed_the_maximum() -> None:
    seen = waits(3000, initial=0.2, maximum=5.0)  # 2 ** 3000 is beyond any float
    assert max(seen) == 5.0
    assert seen[-1000:] == [5.0] * 1000


def test_a_maximum_equal_to_the_first_wait_is_kept() -> None:
    assert waits(5, initial=3.0, maximum=3.0) == [3.0] * 5


def test_a_wait_the_sink_asked_for_is_honoured_when_it_is_longer() -> None:
    assert waits(2, initial=1.0, maximum=60.0, retry_after=30.0) == [30.0, 30.0]
    assert 1.0 <= waits(1, initial=1.0, maximum=60.0, retry_after=0.0)[0] <= 2.0
    assert 1.0 <= waits(1, initial=1.0, maximum=60.0, retry_after=-5.0)[0] <= 2.0


def test_a_wait_the_sink_asked_for_is_capped() -> None:
    assert waits(2, initial=1.0, maximum=60.0, retry_after=86400.0) == [60.0, 60.0]


def test_every_failure_is_told_with_the_wait_that_follows() -> None:
    stop = Clockless()
    told: list[tuple[BaseException, float]] = []
    error = TransientFailure("down")
    attempts = retrying(
        TransientFailure, initial=0.1, maximum=9.0, stop=stop, before_sleep=lambda *what: told.append(what)
    )
    attempts(failing(3, error))
    assert [what for what, _ in told] == [error] * 3
    assert [wait for _, wait in told] == stop.waits


def test_other_errors_are_raised_at_once() -> None:
    stop = Clockless()
    attempts = retrying(TransientFailure, initial=1.0, maximum=9.0, stop=stop, before_sleep=ignore)
    with pytest.raises(PermanentFailure):
        attempts(failing(1, PermanentFailure("never")))
    assert stop.waits == []


def test_what_the_teller_raises_ends_the_retrying() -> None:
    def lost(error: BaseException, wait: float) -> None:
        raise DatabaseUnreachable("the state could not be stored")

    attempts = retrying(TransientFailure, initial=1.0, maximum=9.0, stop=Clockless(), before_sleep=lost)
    with pytest.raises(DatabaseUnreachable):
        attempts(failing(1, TransientFailure("down")))


def test_a_stop_request_ends_a_wait_at_once_and_raises_the_last_failure() -> None:
    stop = threading.Event()
    waiting = threading.Event()
    attempts = retrying(TransientFailure, initial=60.0, maximum=60.0, stop=stop, before_sleep=lambda *_: waiting.set())
    timer = threading.Thread(target=lambda: waiting.wait(10) and stop.set())
    timer.start()
    began = time.monotonic()
    with pytest.raises(TransientFailure, match="down"):
        attempts(failing(10**9, TransientFailure("down")))
    assert time.monotonic() - began < 5
    timer.join()


def test_when_stopped_already_there_is_one_attempt_and_no_wait() -> None:
    stop = Clockless()
    stop.set()
    attempts = retrying(TransientFailure, initial=1.0, maximum=9.0, stop=stop, before_sleep=ignore)
    with pytest.raises(TransientFailure):
        attempts(failing(10**9, TransientFailure("down")))
    assert stop.waits == []


# -- keeping something alive --------------------------------------------------------------------------------------


def test_what_returns_is_not_started_again() -> None:
    calls: list[int] = []
    keep_alive(lambda: calls.append(1), CdcError, maximum=5.0, stop=threading.Event(), before_sleep=ignore)
    assert calls == [1]


def test_nothing_is_started_once_stopped() -> None:
    stop = threading.Event()
    stop.set()
    calls: list[int] = []
    keep_alive(lambda: calls.append(1), CdcError, maximum=5.0, stop=stop, before_sleep=ignore)
    assert calls == []


def test_early_failures_back_off_up_to_the_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    stop = Clockless(limit=12)

    def action() -> None:
        raise DatabaseUnreachable("gone")

    keep_alive(action, DatabaseUnreachable, maximum=5.0, stop=stop, before_sleep=ignore)
    assert len(stop.waits) == 12
    for number, wait in enumerate(stop.waits[:4]):
        assert 0.2 * 2**number <= wait <= 0.2 * 2**number + 0.2
    assert stop.waits[-4:] == [5.0] * 4


def test_a_life_that_lasted_starts_the_back_off_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stop = Clockless(limit=16)
    lives: list[int] = []
    told: list[BaseException] = []

    def action() -> None:
        lives.append(1)
        clock.now += retry.STABLE + 1 if len(lives) in (8, 9) else 1
        raise DatabaseUnreachable(f"life {len(lives)}")

    keep_alive(action, DatabaseUnreachable, maximum=100.0, stop=stop, before_sleep=lambda error, _: told.append(error))
    assert stop.waits[6] > 10
    assert stop.waits[7:9] == [0.2, 0.2]  # lives 8 and 9 lasted
    assert stop.waits[9] < 0.5
    assert stop.waits[12] > 1.5
    assert [str(error) for error in told] == [f"life {number}" for number in range(1, 17)]


def test_a_life_that_lasted_almost_long_enough_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stop = Clockless(limit=8)

    def action() -> None:
        clock.now += retry.STABLE
        raise DatabaseUnreachable("gone")

    keep_alive(action, DatabaseUnreachable, maximum=1000.0, stop=stop, before_sleep=ignore)
    assert stop.waits[-1] > 20


def test_other_errors_of_a_life_are_raised() -> None:
    with pytest.raises(ValueError, match="a bug"):
        keep_alive(failing(1, ValueError("a bug")), CdcError, maximum=1.0, stop=Clockless(), before_sleep=ignore)  # type: ignore[arg-type]


def test_an_error_while_stopping_is_swallowed() -> None:
    stop = threading.Event()

    def action() -> None:
        stop.set()
        raise DatabaseUnreachable("gone")

    keep_alive(action, CdcError, maximum=1.0, stop=stop, before_sleep=ignore)
