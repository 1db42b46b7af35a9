"""The daemon's HTTP side, as a client sees it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

TOKEN = "correct-horse-battery-staple"


@dataclass(frozen=True)
class Page:
    """An answer."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        """Its body, read."""
        return json.loads(self.text)


def get(
    port: int,
    path: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] = MappingProxyType({}),
    body: object = None,
) -> Page:
    """Ask, on a connection of its own; a body goes as JSON unless the headers say otherwise."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        sent = {"Content-Type": "application/json"} if body is not None else {}
        data = body if isinstance(body, str | bytes | None) else json.dumps(body)
        connection.request(method, path, body=data, headers={**sent, **headers})
        answer = connection.getresponse()
        return Page(answer.status, dict(answer.getheaders()), answer.read().decode())
    finally:
        connection.close()


def metrics(port: int) -> dict[str, float]:
    """Every sample of ``/metrics``: name with labels → value."""
    page = get(port, "/metrics")
    assert page.status == 200
    lines = [line for line in page.text.splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
