"""What the conformance suite needs of a destination: the sink's configuration, and what can be done to its server.

One subclass per sink, in ``tests/sinks/rig_KIND.py``. Each runs a real server of its own on a free loopback port, so
that stopping, stalling and filling it harms nobody. What a destination cannot do it says with :class:`NotApplicable`
and the reason; that stands in the table of the documentation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


class NotApplicable(Exception):
    """The behaviour does not exist at this destination; the text says why, in a few words."""


@dataclass(frozen=True, slots=True)
class Received:
    """One event as the destination has it.

    Attributes:
        id: the event's id, from where a consumer would read it.
        body: its text.
    """

    id: str
    body: str


class Rig(ABC):
    """A destination under test.

    Attributes:
        kind: the sink's type.
        deduplicates: the destination itself drops an event whose id it has had.
    """

    kind: ClassVar[str]
    deduplicates: ClassVar[bool] = False

    def __init__(self, directory: Path) -> None:
        """Start the server; everything it writes goes below `directory`.

        Raises:
            FileNotFoundError: the server's program is not on this machine.
        """
        self.directory = directory

    @abstractmethod
    def configuration(self) -> dict[str, object]:
        """The YAML block of a sink that delivers here, ``type`` included."""

    @abstractmethod
    def received(self) -> list[Received]:
        """All that the destination has taken so far, duplicates included, in its own order."""

    @abstractmethod
    def close(self) -> None:
        """Stop the server and let go of everything."""

    def stop(self) -> None:
        """Let the server be gone, as by a crash."""
        raise NotApplicable("no server")

    def start(self) -> None:
        """Bring it back with what it had acknowledged."""
        raise NotApplicable("no server")

    def stall(self) -> None:
        """Let the server take connections and answer nothing."""
        raise NotApplicable("no server")

    def resume(self) -> None:
        """End :meth:`stall`."""
        raise NotApplicable("no server")

    def forbidden(self) -> dict[str, object]:
        """A configuration whose credentials the server refuses."""
        raise NotApplicable("no credentials")

    def limit(self) -> int:
        """Bytes of an event beyond which the destination refuses it for good."""
        raise NotApplicable("no limit")

    def refuse(self, key: int | None) -> None:
        """From now on refuse events whose key is ``{"id": key}``, one by one, as transient; None: take all again."""
        raise NotApplicable("takes all of a batch or nothing")
