"""How an event is written for a sink: an encoder for each name the configuration uses.

All of them splice the row's values in as the text PostgreSQL wrote: no format costs a digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from cdc.encoding import Encoder
from cdc.formats.debezium import DebeziumEncoder
from cdc.formats.flat import FlatEncoder
from cdc.options import Binding, Format, SinkOptions


def encoder(name: Format, binding: Binding | None = None) -> Encoder:
    """The encoder for a format.

    Args:
        name: as in the configuration.
        binding: how the sink names headers; None: it has none.

    Raises:
        ImportError: the format's library is not installed; see :func:`missing_libraries`.
    """
    match name:
        case "native":
            return Encoder()
        case "debezium":
            return DebeziumEncoder()
        case "flat":
            return FlatEncoder()
        case "cloudevents":
            from cdc.formats.cloudevents import StructuredEncoder

            return StructuredEncoder()
        case "cloudevents-binary":
            from cdc.formats.cloudevents import BinaryEncoder

            return BinaryEncoder(binding or "http")


def missing_libraries(sinks: Mapping[str, SinkOptions]) -> dict[str, str]:
    """Which sinks cannot work because the library of their format is not installed.

    Args:
        sinks: name in the configuration → options.

    Returns:
        Name in the configuration → what is missing, with the cure.
    """
    if find_spec("cloudevents") is not None:
        return {}
    return {
        name: "its library is not installed: cloudevents (pip install 'table-cdc[cloudevents]')"
        for name, options in sinks.items()
        if options.format.startswith("cloudevents")
    }
