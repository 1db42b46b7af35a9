"""What the listener and the pipelines of one database share: who sleeps, who is woken, and what need not be read.

The listener (:mod:`cdc.listener`) tells the whole story of the bell. This is its quiet half: state in memory and
threads' waiting, no connection. A pipeline that found nothing rests here until it is time to look into the book again:
because it was rung, because a while has passed, or, while nobody would ring, a few milliseconds later.

A wake-up is a hint and may be false: anybody can NOTIFY. A pipeline that was woken for nothing a few times in a row
looks at most every `FALSE_ALARM_PAUSE`, however often it is woken.

Ephemeral changes come with the notification itself. They wait in the pipeline's :class:`Inbox`, which is bounded and
counts what it had to drop.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from cdc.event import Event

SETTLE = 0.1
"""Seconds without a change before the bell is armed again."""
SHORTEST_POLL = 0.002
GATHER = 0.005
"""Seconds in which changes gather into one batch while they keep coming; a batch costs as much as a dozen events."""
CROWD = 16
"""Events in one batch from which on they come so fast that gathering for all of the sink's `batch.linger` pays: each
batch costs the writers' machine a commit."""
SAFETY_POLL = 30.0
"""Seconds between looks into the book while armed."""
DEAF_POLL = 0.5
"""Longest pause between looks when no bell of our own can be heard (``notify: off``, notifications do not arrive, or
another daemon's listener is the one who asks to be rung)."""
FALSE_ALARMS = 3
FALSE_ALARM_PAUSE = 0.005
"""Seconds from one look to the next once `FALSE_ALARMS` rings in a row were followed by nothing."""
HEARTBEAT = 5.0
"""Longest rest, in seconds; a pipeline that sleeps uses its connection now and then, or nobody would see it break."""
INBOX_EVENTS = 10_000
INBOX_BYTES = 32 * 2**20

Mode = Literal["adaptive", "always", "off"]


class Inbox:
    """Ephemeral changes on their way from the listener to one pipeline; bounded. May be used from any thread."""

    def __init__(self) -> None:
        self.dropped = 0
        """Changes that found no room, so far."""
        self._events: deque[tuple[Event, int]] = deque()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, event: Event, size: int) -> None:
        """Add a change of `size` bytes, or count it as dropped: what came first goes first."""
        with self._lock:
            if len(self._events) >= INBOX_EVENTS or self._bytes + size > INBOX_BYTES:
                self.dropped += 1
                return
            self._events.append((event, size))
            self._bytes += size

    def take(self, most: int) -> list[Event]:
        """Remove the first changes, at most so many."""
        with self._lock:
            taken = [self._events.popleft() for _ in range(min(most, len(self._events)))]
            self._bytes -= sum(size for _, size in taken)
        return [event for event, _ in taken]


@dataclass(eq=False)
class Sleeper:
    """One pipeline's place at the bell.

    Attributes:
        wants: whether the pipeline cares for a notified event.
        linger: seconds; longest pause between polls while awake.
    """

    name: str
    wants: Callable[[Event], bool]
    linger: float
    inbox: Inbox = field(default_factory=Inbox)
    woken: threading.Event = field(default_factory=threading.Event)
    called: bool = False
    """Whether somebody has asked for a look into the book since the last one began."""
    looked_at: float = 0.0
    """When the last look into the book began, by the monotonic clock."""
    due: float = 0.0
    """When to look again if nobody calls."""
    active_at: float = float("-inf")
    """When a look last found something."""
    idle: bool = False
    away: bool = False
    """Whether the pipeline is waiting for its sink, and so cannot be woken."""
    pause: float = SHORTEST_POLL
    false_alarms: int = 0


class Bell:
    """What the listener and the pipelines of one database share. All methods may be called from any thread."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.armed_since: float | None = None
        self.audible = False
        """Whether a listener is there to hear a ring."""
        self.armed_by_another = False
        """Whether another daemon's listener asks the writers to ring, which ours hears too while that one sleeps."""
        self.crowded = False
        """Whether a full batch was seen since the bell was last armed: more is coming than rings are good for."""
        self._lock = threading.Lock()
        self._sleepers: list[Sleeper] = []
        self._knock: Callable[[], None] = lambda: None

    # -- for pipelines ------------------------------------------------------------------------------------------

    def join(self, sleeper: Sleeper) -> None:
        """Take part: the bell is not armed before this pipeline has found nothing to do."""
        sleeper.idle = sleeper.away = False
        sleeper.inbox.take(INBOX_EVENTS)  # from before it last left; whoever served the sink meanwhile had them too
        with self._lock:
            if sleeper not in self._sleepers:
                self._sleepers.append(sleeper)

    def leave(self, sleeper: Sleeper) -> None:
        """Stop taking part; a pipeline that serves nothing must not keep the others awake."""
        with self._lock:
            if sleeper in self._sleepers:
                self._sleepers.remove(sleeper)
        self._knock()

    def step_out(self, sleeper: Sleeper) -> None:
        """Say that this pipeline waits for its sink: the others may sleep meanwhile."""
        sleeper.away = True
        self._knock()

    def step_in(self, sleeper: Sleeper) -> None:
        """Say that it is back."""
        sleeper.idle = sleeper.away = False

    def looking(self, sleeper: Sleeper) -> None:
        """Say that a look into the book begins now. Wake-ups from here on count for the next rest."""
        sleeper.false_alarms += sleeper.called
        sleeper.called = False
        sleeper.looked_at = time.monotonic()

    def found(self, sleeper: Sleeper, *, full: bool) -> None:
        """Say that the look found events; a full batch means that more are waiting."""
        sleeper.active_at = time.monotonic()
        sleeper.idle = False
        sleeper.pause = SHORTEST_POLL
        sleeper.false_alarms = 0
        sleeper.due = 0.0
        if full and self.armed_since is not None and self.mode == "adaptive":
            self.crowded = True
            self._knock()

    def found_nothing(self, sleeper: Sleeper) -> None:
        """Say that the look found nothing: from here on the pipeline rests."""
        sleeper.idle = True
        now = time.monotonic()
        armed = self.armed_since
        if armed is not None:
            # Armed after the look began: whoever wrote in between did not ring.
            sleeper.due = now + SAFETY_POLL if sleeper.looked_at > armed else now
            return
        if self._settled():
            self._knock()
        # A look may be dear: it passes over what an open transaction has written. It shall not take all of a core.
        sleeper.due = now + max(sleeper.pause, 2 * (now - sleeper.looked_at))
        hears = self.audible and not self.armed_by_another
        longest = sleeper.linger if hears else max(sleeper.linger, DEAF_POLL)
        sleeper.pause = min(sleeper.pause * 2, max(longest, SHORTEST_POLL))

    def pace(self, sleeper: Sleeper, events: int) -> None:
        """After a batch of so many events, not a full one: let changes gather while awake, not fetch each alone."""
        sleeper.due = 0.0
        if self.armed_since is None and self.audible:
            gather = sleeper.linger if events >= CROWD else min(GATHER, sleeper.linger)
            sleeper.due = sleeper.looked_at + gather

    def rest(self, sleeper: Sleeper) -> bool:
        """Wait until there is something to do, at most `HEARTBEAT` seconds; whether it is time for a look."""
        if not self._is_due(sleeper):
            sleeper.woken.wait(min(HEARTBEAT, max(0.0, sleeper.due - time.monotonic())))
        sleeper.woken.clear()
        if sleeper.called and sleeper.false_alarms >= FALSE_ALARMS:
            time.sleep(max(0.0, sleeper.looked_at + FALSE_ALARM_PAUSE - time.monotonic()))
        return self._is_due(sleeper)

    def _is_due(self, sleeper: Sleeper) -> bool:
        return sleeper.called or time.monotonic() >= sleeper.due

    # -- for the listener ---------------------------------------------------------------------------------------

    def attach(self, knock: Callable[[], None]) -> None:
        """Let the pipelines call the listener's attention."""
        self._knock = knock

    def wake(self, event: Event | None = None) -> None:
        """Wake the pipelines that want `event`, or all of them, for a look into the book."""
        for sleeper in self._present():
            if event is None or sleeper.wants(event):
                sleeper.called = True
                sleeper.woken.set()

    def hand_over(self, event: Event, size: int) -> None:
        """Give an ephemeral change of `size` bytes to the pipelines that want it."""
        for sleeper in self._present():
            if sleeper.wants(event):
                sleeper.inbox.put(event, size)
                sleeper.woken.set()

    def arm(self) -> None:
        """From now on somebody rings; everybody looks once more."""
        self.crowded = False
        self.armed_by_another = False
        self.armed_since = time.monotonic()
        self.wake()

    def disarm(self) -> None:
        """From now on nobody rings; everybody polls. To be called before the lock is given back."""
        self.armed_since = None
        self.wake()

    def should_arm(self) -> bool:
        """Whether everybody sleeps."""
        return self.armed_since is None and self._settled()

    def should_disarm(self) -> bool:
        """Whether being rung is of no use: more is coming than rings are good for, or nobody is left to be woken."""
        return self.crowded or all(sleeper.away for sleeper in self._present())

    def _present(self) -> list[Sleeper]:
        with self._lock:
            return list(self._sleepers)

    def _settled(self) -> bool:
        now = time.monotonic()
        here = [sleeper for sleeper in self._present() if not sleeper.away]
        return bool(here) and all(s.idle and now - s.active_at >= SETTLE for s in here)
