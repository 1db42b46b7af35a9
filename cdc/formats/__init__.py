"""How an event is written for a sink: one function from an event to its text, by the name the configuration uses."""

from __future__ import annotations

from collections.abc import Callable

from cdc.event import Event

FORMATS: dict[str, Callable[[Event], str]] = {"native": Event.to_json}
