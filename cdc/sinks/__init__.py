"""Where events go. A sink is one file in this package and one line in this registry.

Importing this package, and reading a configuration, needs none of the sinks' client libraries. Other packages offer
sinks by entry points of the group ``cdc.sinks``: the name is the type, the object a subclass of
:class:`~cdc.sinks.base.Sink`. Such a package is imported when a configuration names its type. A type of our own cannot
be replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, Final

from cdc.encoding import Encoder
from cdc.options import SinkOptions
from cdc.sinks.base import Sink, how_to_get
from cdc.sinks.file import FileSink
from cdc.sinks.kafka import KafkaSink
from cdc.sinks.mqtt import MqttSink
from cdc.sinks.nats import NatsSink
from cdc.sinks.postgres import PostgresSink
from cdc.sinks.python import PythonSink, checked
from cdc.sinks.rabbitmq import RabbitmqSink
from cdc.sinks.redis import RedisSink
from cdc.sinks.stdout import StdoutSink
from cdc.sinks.webhook import WebhookSink

SINKS: dict[str, type[Sink[Any]]] = {
    "file": FileSink,
    "kafka": KafkaSink,
    "mqtt": MqttSink,
    "nats": NatsSink,
    "postgres": PostgresSink,
    "python": PythonSink,
    "rabbitmq": RabbitmqSink,
    "redis": RedisSink,
    "stdout": StdoutSink,
    "webhook": WebhookSink,
}


ENTRY_POINTS: Final = "cdc.sinks"
"""The group by which other packages offer sinks."""


def sink_class(kind: str) -> type[Sink[Any]]:
    """The sink of a type.

    Raises:
        KeyError: nobody has one of that type.
        ValueError: a package offers one, which cannot be used.
    """
    if kind in SINKS:
        return SINKS[kind]
    offers = [point for point in _offered() if point.name == kind]
    if not offers:
        raise KeyError(kind)
    packages = " and ".join(sorted({point.dist.name if point.dist else point.value for point in offers}))
    if len(offers) > 1:
        raise ValueError(f"{packages} offer a sink of this type (uninstall all but one)")
    try:
        found = checked(offers[0].load(), offers[0].value).sink
    except Exception as error:  # noqa: BLE001  # a package may fail in any way while it is imported
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{packages} offers it, and cannot be used: {reason} (mend or uninstall it)") from None
    if found is None:
        raise ValueError(f"{packages} offers it, and has a function there (name it by type: python and call)")
    return found


def _offered() -> list[EntryPoint]:
    return list(entry_points(group=ENTRY_POINTS))


class _Models(Mapping[str, type[SinkOptions]]):
    """Type → model; what other packages offer is imported when it is asked for."""

    def __getitem__(self, kind: str) -> type[SinkOptions]:
        return sink_class(kind).Options

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*SINKS, *sorted(point.name for point in _offered())])

    def __len__(self) -> int:
        return len(list(iter(self)))


def option_models() -> Mapping[str, type[SinkOptions]]:
    """The configuration model of every sink type, for :func:`cdc.config.load`."""
    return _Models()


def create(name: str, options: SinkOptions, encoder: Encoder) -> Sink[Any]:
    """A new, unopened sink for these options, writing events with `encoder`."""
    return sink_class(options.type).make(name, options, encoder)


def missing_clients(sinks: Mapping[str, SinkOptions]) -> dict[str, str]:
    """Which sinks cannot work because a client library is not installed.

    Args:
        sinks: name in the configuration → options.

    Returns:
        Name in the configuration → what is missing, with the cure.
    """
    found: dict[str, str] = {}
    for name, options in sinks.items():
        absent = [client for client in sink_class(options.type).clients if find_spec(client.partition(".")[0]) is None]
        if absent:
            found[name] = f"its client library is not installed: {', '.join(absent)} ({how_to_get(options.type)})"
    return found
