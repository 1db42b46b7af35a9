"""Where events go. A sink is one file in this package and one line in this registry."""

from __future__ import annotations

from typing import Any

from cdc.encoding import Encoder
from cdc.options import SinkOptions
from cdc.sinks.base import Sink
from cdc.sinks.file import FileSink
from cdc.sinks.stdout import StdoutSink

SINKS: dict[str, type[Sink[Any]]] = {
    "file": FileSink,
    "stdout": StdoutSink,
}


def option_models() -> dict[str, type[SinkOptions]]:
    """The configuration model of every sink type, for :func:`cdc.config.load`."""
    return {kind: sink.Options for kind, sink in SINKS.items()}


def create(name: str, options: SinkOptions, encoder: Encoder) -> Sink[Any]:
    """A new, unopened sink for these options, writing events with `encoder`."""
    return SINKS[options.type](name, options, encoder)
