"""Trying again, the same way everywhere: capped exponential back-off with jitter, for ever, until told to stop.

The loop is tenacity's; this file says what to retry, how long to wait, and that a stop ends the wait at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_when_event_set,
    wait_exponential,
    wait_random,
)
from tenacity.nap import sleep_using_event

from cdc.errors import CdcError, TransientFailure


def retrying(
    errors: type[CdcError] | tuple[type[CdcError], ...],
    *,
    initial: float,
    maximum: float,
    stop: threading.Event,
    before_sleep: Callable[[BaseException, float], None],
    sleep: Callable[[float], None] | None = None,
) -> Retrying:
    """A tenacity loop that retries `errors` until it succeeds or `stop` is set.

    Args:
        errors: what is worth retrying; anything else, and the last of these once stopped, is raised to the caller.
        initial: seconds before the second attempt; doubles from there, plus jitter of up to `initial`.
        maximum: seconds no wait exceeds, not even one a sink asked for with retry_after.
        stop: ends the waiting.
        before_sleep: told of every failure and of the seconds until the next attempt.
        sleep: waits so many seconds, in place of waiting for `stop`.
    """
    # Not wait_exponential_jitter: tenacity 9.2 renamed its arguments and warns of the old names.
    back_off = wait_exponential(multiplier=initial, max=maximum) + wait_random(0, initial)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after if isinstance(error, TransientFailure) else None
        return min(maximum, max(back_off(state), asked or 0.0))

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if error is not None:
            before_sleep(error, state.upcoming_sleep)

    return Retrying(
        retry=retry_if_exception_type(errors),
        wait=wait,
        stop=stop_when_event_set(stop),
        sleep=sleep or sleep_using_event(stop),
        before_sleep=tell,
        reraise=True,
    )


STABLE = 30.0
"""Seconds after which something that was kept alive counts as having worked."""


class _Lasted(Exception):
    def __init__(self, error: BaseException) -> None:
        self.error = error


def keep_alive(
    action: Callable[[], None],
    errors: type[CdcError],
    *,
    maximum: float,
    stop: threading.Event,
    before_sleep: Callable[[BaseException, float], None],
) -> None:
    """Run `action` until it returns or `stop` is set, starting it again after each of `errors`.

    Waits grow from 0.2 s to `maximum` while it keeps failing early, and begin anew once it has lasted STABLE seconds.
    """
    initial = 0.2

    def timed() -> None:
        began = time.monotonic()
        try:
            action()
        except errors as error:
            if time.monotonic() - began > STABLE:
                raise _Lasted(error) from error
            raise

    while not stop.is_set():
        try:
            retrying(errors, initial=initial, maximum=maximum, stop=stop, before_sleep=before_sleep)(timed)
        except _Lasted as lasted:
            before_sleep(lasted.error, initial)
            stop.wait(initial)
        except errors:
            if not stop.is_set():
                raise
        else:
            return
