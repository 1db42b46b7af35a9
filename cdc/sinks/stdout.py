"""Events on standard output, one line each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

from cdc.errors import SinkDisabled, TransientFailure
from cdc.event import Event
from cdc.options import SinkOptions
from cdc.sinks.base import Sink


class StdoutOptions(SinkOptions):
    """Options of a ``stdout`` sink: only those every sink has."""

    type: Literal["stdout"]


class StdoutSink(Sink[StdoutOptions]):
    """Writes each event as one line to standard output and flushes before it acknowledges."""

    Options = StdoutOptions

    def deliver(self, batch: Sequence[Event]) -> None:
        try:
            sys.stdout.write("".join(self.encoder.encode(event) + "\n" for event in batch))
            sys.stdout.flush()
        except BrokenPipeError:
            raise SinkDisabled("standard output is closed (the program reading it has ended)") from None
        except OSError as error:
            raise TransientFailure(f"cannot write to standard output: {error.strerror}") from None
