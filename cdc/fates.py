"""What becomes of an event: of one that comes with the stream, and of a dead letter on its way back.

The stream (:class:`Stream`). What can never be delivered goes by `on_permanent_failure`: it becomes a dead letter
(``dead_letter``), a dead letter that lets its key wait (``park_key``), or it stops the sink (``stop``). What comes
later of a key that waits is stored behind it before the rest of its batch is delivered, and so never overtakes it.

The way back (:class:`Replay`). A replay walks once along a sink's letters in the order of their events, a page at a
time, between the batches of the stream. On its way it notes what stays: parked letters nobody asked for, and those
that are refused again. Whatever comes later of those keys stays too; everything else that was asked for is delivered
under its old id, and then deleted. Events that are set to wait while a replay is under way count as asked for: what
they wait behind may just be leaving. When the walk has come to them, no batch of the stream is read until it is
through, and then the keys that wait are looked up anew. So between the last letter of a key and the next event of it
there is no gap to overtake in. A page may be in hand for hours while the sink is down; when somebody edits or discards
letters meanwhile, the walk begins anew and finds them as they are.

A crash in between repeats what was delivered and not yet deleted, under the same ids.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from cdc import crashpoints
from cdc.dead_letters import NO_EVENT, Letter, Letters
from cdc.errors import PermanentFailure, SinkDisabled
from cdc.event import Event
from cdc.lanes import Held
from cdc.options import BatchOptions, FailurePolicy

log = logging.getLogger(__name__)

Told = Callable[[Sequence[Event]], None]
Fields = Callable[..., dict[str, object]]


class Stream:
    """The fate of events that come with the stream; see :class:`cdc.delivery.Fate`."""

    def __init__(self, letters: Letters, policy: FailurePolicy, told: Told, fields: Fields) -> None:
        """
        Args:
            letters: where those go that cannot be delivered.
            policy: what `on_permanent_failure` says.
            told: told of every event that was delivered.
            fields: makes the fields of a line in the log.
        """
        self._letters = letters
        self._policy = policy
        self._told = told
        self._fields = fields

    def holds(self, event: Event) -> bool:
        return bool(self._letters.held) and self._letters.held.holds(event)

    def admit(self, batch: list[Event]) -> list[Event]:
        while held := self._letters.held:
            waiting, rest = [], []
            for event in batch:
                if held.holds(event):
                    held.add(event)  # a change of its key lets the other key wait too
                    waiting.append(event)
                else:
                    rest.append(event)
            if not waiting:
                break
            if self._letters.park(waiting):
                crashpoints.reached("after-park")
                log.info("Events wait behind a dead letter of their key.", extra=self._fields(events=len(waiting)))
                return rest
            self._letters.look()
        return batch

    def delivered(self, events: Sequence[Event]) -> None:
        self._told(events)

    def refused(self, event: Event, failure: PermanentFailure) -> None:
        if self._policy == "stop":
            raise SinkDisabled(f"event {event.id} can never be delivered: {failure}")
        park = self._policy == "park_key"
        self._letters.set_aside(event, str(failure), park=park)
        crashpoints.reached("after-park" if park else "after-dead-letter")
        log.error("An event became a dead letter.", extra=self._fields(event_id=event.id, error=str(failure)))

    def refused_text(self, event_id: str, seq: int, text: str, reason: str) -> None:
        """The same of something that is no event; nothing can wait behind it."""
        if self._policy == "stop":
            raise SinkDisabled(f"event {event_id} can never be delivered: {reason}")
        self._letters.set_text_aside(event_id, seq, text, reason)
        log.error("An event became a dead letter.", extra=self._fields(event_id=event_id, error=reason))


class Replay:
    """One walk along the letters of a sink; also the fate of those it delivers.

    Attributes:
        looks: which look at the letters it is based on.
        catching_up: whether it has come to letters that were stored while it was under way.
    """

    def __init__(
        self, letters: Letters, wants: Callable[[Event], bool], batch: BatchOptions, told: Told, fields: Fields
    ) -> None:
        """
        Args:
            wants: whether the sink's configuration wants an event; raises PermanentFailure where that cannot be said.
            batch: how much is delivered at once.
            letters, told, fields: as for :class:`Stream`.
        """
        self.looks = letters.looks
        self.catching_up = False
        self._letters = letters
        self._wants = wants
        self._batch = batch
        self._told = told
        self._fields = fields
        self._newest = letters.newest
        self._after = (-1, -1)
        self._stays = Held()  # behind the letters passed so far
        self._failed = Held()  # behind those of this page that the sink has refused
        self._page: dict[str, Letter] = {}

    def next_page(self) -> list[Event] | None:
        """The next events to deliver, perhaps none of this page; None when the walk is over.

        What was handed out before must be done with: it is not looked at again.
        """
        page = self._letters.page(after=self._after, events=self._batch.events, bytes_=self._batch.bytes)
        if not page:
            return None
        self._after = (page[-1].seq, page[-1].id)
        self.catching_up = any(letter.id > self._newest for letter in page)
        self._failed = Held()
        self._page = {}
        chosen: list[Event] = []
        behind: list[int] = []
        unwanted: list[Letter] = []
        for letter in page:
            if letter.text is None:
                self._stay(letter)
            elif self._stays.holds_reach(letter.table, letter.keys):
                behind.append(letter.id)
                self._stay(letter)
            else:
                self._choose(letter, letter.text, chosen, unwanted)
        if behind:
            self._letters.put_back(behind)
        if unwanted:
            self._letters.remove(unwanted)
            log.info("Dead letters are not wanted any more.", extra=self._fields(events=len(unwanted)))
        return chosen

    def holds(self, event: Event) -> bool:
        letter = self._page[event.id]
        return self._failed.holds_reach(letter.table, letter.keys)

    def admit(self, batch: list[Event]) -> list[Event]:
        if self.looks != self._letters.looks:
            return []  # somebody has touched the letters since this page was read, perhaps these
        if not self._failed:
            return batch
        rest: list[Event] = []
        behind: list[int] = []
        for event in batch:
            if self._fails(event):
                behind.append(self._page[event.id].id)
            else:
                rest.append(event)
        if behind:
            self._letters.put_back(behind)
        return rest

    def delivered(self, events: Sequence[Event]) -> None:
        crashpoints.reached("after-replay")
        self._letters.remove([self._page[event.id] for event in events])
        log.info("Dead letters are delivered.", extra=self._fields(events=len(events)))
        self._told(events)

    def refused(self, event: Event, failure: PermanentFailure) -> None:
        letter = self._page[event.id]
        self._refused(letter, failure)
        self._failed.add_reach(letter.table, letter.keys)

    def _choose(self, letter: Letter, text: str, chosen: list[Event], unwanted: list[Letter]) -> None:
        try:
            event = Event.from_json(text)
        except ValueError:
            self._refused(letter, PermanentFailure(NO_EVENT))
            return
        try:
            wanted = self._wants(event)
        except PermanentFailure as failure:
            self._refused(letter, failure)
            return
        if wanted:
            self._page[event.id] = letter
            chosen.append(event)
        else:
            unwanted.append(letter)

    def _fails(self, event: Event) -> bool:
        """Whether an event must stay because one before it was refused; then so must what comes after it."""
        letter = self._page[event.id]
        if not self._failed.holds_reach(letter.table, letter.keys):
            return False
        self._failed.add_reach(letter.table, letter.keys)
        self._stay(letter)
        return True

    def _refused(self, letter: Letter, failure: PermanentFailure) -> None:
        self._stay(letter)
        self._letters.keep(letter, str(failure))
        log.error("A dead letter was refused again.", extra=self._fields(letter=letter.id, error=str(failure)))

    def _stay(self, letter: Letter) -> None:
        """Let everything that comes after a letter, and is of its keys, stay where it is."""
        self._stays.add_reach(letter.table, letter.keys)
