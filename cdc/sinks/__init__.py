"""Where events go. A sink is one file in this package and one line in this registry.

Importing this package, and reading a configuration, needs none of the sinks' client libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from cdc.encoding import Encoder
from cdc.options import SinkOptions
from cdc.sinks.base import Sink, how_to_get
from cdc.sinks.file import FileSink
from cdc.sinks.kafka import KafkaSink
from cdc.sinks.mqtt import MqttSink
from cdc.sinks.nats import NatsSink
from cdc.sinks.rabbitmq import RabbitmqSink
from cdc.sinks.redis import RedisSink
from cdc.sinks.stdout import StdoutSink
from cdc.sinks.webhook import WebhookSink

SINKS: dict[str, type[Sink[Any]]] = {
    "file": FileSink,
    "kafka": KafkaSink,
    "mqtt": MqttSink,
    "nats": NatsSink,
    "rabbitmq": RabbitmqSink,
    "redis": RedisSink,
    "stdout": StdoutSink,
    "webhook": WebhookSink,
}


def option_models() -> dict[str, type[SinkOptions]]:
    """The configuration model of every sink type, for :func:`cdc.config.load`."""
    return {kind: sink.Options for kind, sink in SINKS.items()}


def create(name: str, options: SinkOptions, encoder: Encoder) -> Sink[Any]:
    """A new, unopened sink for these options, writing events with `encoder`."""
    return SINKS[options.type](name, options, encoder)


def missing_clients(sinks: Mapping[str, SinkOptions]) -> dict[str, str]:
    """Which sinks cannot work because a client library is not installed.

    Args:
        sinks: name in the configuration → options.

    Returns:
        Name in the configuration → what is missing, with the cure.
    """
    found: dict[str, str] = {}
    for name, options in sinks.items():
        absent = [client for client in SINKS[options.type].clients if find_spec(client.partition(".")[0]) is None]
        if absent:
            found[name] = f"its client library is not installed: {', '.join(absent)} ({how_to_get(options.type)})"
    return found
