"""CloudEvents 1.0 by the official SDK: structured, one JSON object, or binary, the attributes in headers.

The SDK checks and writes the attributes. The data is the event in the native format and is spliced in as text: the SDK
would parse it, and its JSON numbers are floats.

===================  ==============================================================================================
``id``               the event's id
``source``           ``/DATABASE/SCHEMA/TABLE``, percent-encoded
``type``             ``cdc.insert``, ``cdc.update``, ``cdc.delete``, ``cdc.truncate``, ``cdc.read``
``time``             when the change was captured
``subject``          the key as JSON; none without a key
``partitionkey``     the same, an extension: what must stay in order
``sequence``         `seq` in 20 digits, an extension: grows per key, and in the order of text too
``datacontenttype``  ``application/json``
===================  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC
from typing import ClassVar
from urllib.parse import quote as percent_encoded

from cloudevents.core.bindings import http, kafka
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from cdc.encoding import Encoder
from cdc.event import Event, on_one_line
from cdc.options import Binding

_JSON = JSONFormat()


def _attributes(event: Event) -> CloudEvent:
    """The event without its data."""
    source = event.source
    names = (source.database, source.schema_name, source.table)
    attributes = {
        "id": event.id,
        "source": "/" + "/".join(percent_encoded(name, safe="") for name in names),
        "type": f"cdc.{event.op.value}",
        "specversion": "1.0",
        "time": source.ts.astimezone(UTC),
        "datacontenttype": "application/json",
        "sequence": f"{source.seq:020d}",
    }
    if event.key is not None:
        attributes["subject"] = attributes["partitionkey"] = on_one_line(event.key)
    return CloudEvent(attributes)


class StructuredEncoder(Encoder):
    """``application/cloudevents+json``."""

    content_type: ClassVar[str] = "application/cloudevents+json"
    batch_content_type: ClassVar[str] = "application/cloudevents-batch+json"

    def encode(self, event: Event) -> str:
        envelope = _JSON.write(_attributes(event)).decode()
        return f'{envelope.removesuffix("}")},"data":{event.to_json()}}}'


class BinaryEncoder(Encoder):
    """The native format, with the attributes beside it as headers."""

    def __init__(self, binding: Binding) -> None:
        """
        Args:
            binding: ``ce-id`` and percent-encoded values over HTTP, ``ce_id`` and plain text for Kafka.
        """
        self._binding = binding

    def headers(self, event: Event) -> Mapping[str, str]:
        attributes = _attributes(event)
        found: dict[str, str]
        if self._binding == "kafka":
            found = {name: value.decode() for name, value in kafka.to_binary(attributes, _JSON).headers.items()}
        else:
            found = dict(http.to_binary(attributes, _JSON).headers)
        found.pop("content-type", None)  # every sink says it itself
        return found
