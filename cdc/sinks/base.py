"""What a sink is: one small class in one file, with the model of its configuration beside it.

A sink is opened once, is given batches in order, one at a time and from one thread, and is closed once. It returns
from :meth:`Sink.deliver` only when the destination has the events for good; what it cannot deliver it raises as

* :class:`~cdc.errors.TransientFailure`: try the same events again later,
* :class:`~cdc.errors.PermanentFailure`: never try again (the pipeline finds out which event of a batch it was),
* :class:`~cdc.errors.PartialFailure`: these of the batch failed, each for its own reason; the rest is delivered,
* :class:`~cdc.errors.SinkDisabled`: somebody has to step in.

Any other exception counts as transient: a bug must not lose an event. Retrying, dead letters, filters, positions and
order are the pipeline's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from cdc.encoding import Encoder
from cdc.event import Event
from cdc.options import SinkOptions

OptionsT = TypeVar("OptionsT", bound=SinkOptions)


class Sink(ABC, Generic[OptionsT]):
    """Base of every sink.

    Attributes:
        options: the model of this sink's configuration.
    """

    Options: ClassVar[type[SinkOptions]]

    def __init__(self, name: str, options: OptionsT, encoder: Encoder | None = None) -> None:
        """
        Args:
            name: the sink's name in the configuration.
            options: its validated configuration.
            encoder: the sink's format; the native one by default.
        """
        self.name = name
        self.options = options
        self.encoder = encoder or Encoder()

    def open(self) -> None:
        """Get ready. Called before the first batch, and again after :meth:`close`.

        Raises:
            DeliveryError: as in :meth:`deliver`.
        """
        return

    @abstractmethod
    def deliver(self, batch: Sequence[Event]) -> None:
        """Hand over a batch, in this order; return when the destination has it for good.

        Raises:
            TransientFailure, PermanentFailure, PartialFailure, SinkDisabled: see the head of this module.
        """

    def close(self) -> None:
        """Let go of everything; harmless when called twice or before :meth:`open`."""
        return
