"""How an event is written for a sink: an encoder for each name the configuration uses."""

from __future__ import annotations

from cdc.encoding import Encoder

FORMATS: dict[str, Encoder] = {"native": Encoder()}
