"""How an event is written for a sink, as the sink sees it: text, its media type, and headers to go beside it.

The formats themselves are in :mod:`cdc.formats`. A sink is handed one and asks no further.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from cdc.event import Event


class Encoder:
    """A format; this one is the native format of the contract."""

    content_type: ClassVar[str] = "application/json"
    """Media type of what :meth:`encode` returns."""
    batch_content_type: ClassVar[str] = "application/json"
    """Media type of a JSON array of such texts."""

    def encode(self, event: Event) -> str:
        """The event as one line of text. Raises PermanentFailure when the format cannot say it."""
        return event.to_json()

    def headers(self, event: Event) -> Mapping[str, str]:
        """What goes beside the text where a sink has headers; the text alone says everything elsewhere."""
        return {}
